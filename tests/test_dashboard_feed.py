"""The feed without a browser: what is held, who watches, and what the page's API says of it."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from telemetry_records import a_record, a_response, a_stream

import dashboard
import telemetry
from dashboard import feed

ROOT = Path(__file__).resolve().parent.parent


def a_dashboard(**changes: Any) -> dashboard.Dashboard:
    return dashboard.Dashboard(**{"max_watchers": 2, "spans": telemetry.spans, **changes})


def a_start(id: int = 1, **changes: Any) -> dict[str, Any]:
    return {"type": "start", "id": id, "ts_ms": 1000 + id, "model": "gpt", "in_flight": 1, **changes}


def events(watcher: dashboard.Watcher, count: int) -> list[dict[str, Any]]:
    """The next events a watcher is told of."""
    told: list[dict[str, Any]] = []
    deadline = time.monotonic() + 5
    while len(told) < count:
        assert time.monotonic() < deadline, told
        told += [event for _, event in blocks(next(watcher))]
    return told


def blocks(data: bytes) -> list[tuple[str | None, dict[str, Any]]]:
    """(id, event) of each event in these bytes."""
    assert data.endswith(b"\n\n")
    found = []
    for block in data.decode("ascii").split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        if "data" in fields:
            found.append((fields.get("id"), json.loads(fields["data"])))
    return found


def in_background(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


# What watchers are told


def test_a_watcher_hears_every_event_in_order_with_ids():
    page = a_dashboard()
    watcher = page.watch()
    page.sink(a_start())
    page.sink({"type": "classified", "id": 1, "ts_ms": 1002, "tags": ["code"]})
    page.sink({"type": "routed", "id": 1, "ts_ms": 1003, "provider": "up", "model": "llama3"})
    page.sink(a_record())
    told = blocks(next(watcher))
    assert [event["type"] for _, event in told] == ["start", "classified", "routed", "complete"]
    assert told[1][1]["tags"] == ["code"]
    ids = [id for id, _ in told]
    assert len(set(ids)) == 4 and all(ids)
    watcher.close()


def test_the_complete_event_is_the_record_without_what_begins_with_an_underscore():
    page = a_dashboard()
    watcher = page.watch()
    record = a_record(_trace=telemetry.Trace("a" * 32, sampled=True))
    page.sink(record)
    (event,) = events(watcher, 1)
    assert event == {key: value for key, value in record.items() if key != "_trace"}
    watcher.close()


def test_who_comes_back_is_told_what_happened_in_between():
    page = a_dashboard()
    watcher = page.watch()
    page.sink(a_record(id=1))
    ((last, _),) = blocks(next(watcher))
    watcher.close()
    page.sink(a_record(id=2))
    page.sink(a_start(3))
    again = page.watch(last)
    assert [event["id"] for event in events(again, 2)] == [2, 3]
    again.close()


def test_an_event_id_of_another_life_of_the_process_means_everything_that_is_held():
    page = a_dashboard()
    page.sink(a_record(id=1))
    page.sink(a_record(id=2))
    for stale in ("0-17", "nonsense", "17", f"{'9' * 400}-1"):
        watcher = page.watch(stale)
        assert [event["id"] for event in events(watcher, 2)] == [1, 2]
        watcher.close()


def test_a_newcomer_is_told_only_what_happens_from_now_on():
    page = a_dashboard()
    page.sink(a_record(id=1))
    watcher = page.watch()
    page.sink(a_record(id=2))
    assert [event["id"] for event in events(watcher, 1)] == [2]
    watcher.close()


def test_the_list_and_the_feed_join_without_a_gap():
    page = a_dashboard()
    page.sink(a_record(id=1))
    listed = page.api("/requests", {})
    assert listed is not None
    page.sink(a_record(id=2))
    watcher = page.watch(listed["last_event_id"])
    assert [event["id"] for event in events(watcher, 1)] == [2]
    watcher.close()


def test_more_watchers_than_may_be_are_refused_until_one_leaves():
    page = a_dashboard(max_watchers=1)
    first = page.watch()
    with pytest.raises(dashboard.Full):
        page.watch()
    assert page.stats()["watchers"] == 1
    first.close()
    first.close()
    assert page.stats()["watchers"] == 0
    page.watch().close()


def test_a_watcher_that_was_never_read_can_be_closed():
    page = a_dashboard()
    page.watch().close()
    assert page.stats()["watchers"] == 0


def test_a_watcher_ends_within_a_second_when_its_client_left():
    page = a_dashboard()
    left = threading.Event()
    watcher = page.watch(None, left.is_set)
    pieces: list[bytes] = []
    reader = in_background(lambda: pieces.extend(watcher))
    left.set()
    reader.join(1.0)
    assert not reader.is_alive()
    assert page.stats()["watchers"] == 0


def test_closing_the_feed_ends_every_watcher_at_once():
    page = a_dashboard()
    readers = [in_background(lambda: list(page.watch())) for _ in range(2)]
    deadline = time.monotonic() + 5
    while page.stats()["watchers"] < 2:
        assert time.monotonic() < deadline
    page.close_all()
    for reader in readers:
        reader.join(0.4)
        assert not reader.is_alive()
    with pytest.raises(dashboard.Full):
        page.watch()


def test_a_silent_feed_says_something_now_and_then(monkeypatch):
    monkeypatch.setattr(feed, "HEARTBEAT", 0.05)
    page = a_dashboard()
    watcher = page.watch()
    assert next(watcher).startswith(b":")
    began = time.monotonic()
    assert next(watcher).startswith(b":")
    assert time.monotonic() - began >= 0.04
    watcher.close()


def test_a_watcher_that_does_not_read_loses_the_oldest_events_and_is_told_how_many():
    page = a_dashboard(held=10)
    slow, quick = page.watch(), page.watch()
    for id in range(feed.QUEUE_ITEMS + 50):
        page.sink(a_start(id))
        if id % 100 == 0:
            next(quick)
    told = events(slow, 2)
    assert told[0] == {"type": "skipped", "count": 50}
    assert told[1]["id"] == 50
    assert page.stats()["skipped"] == 50
    assert {"type": "skipped", "count": 50} not in events(quick, 1)
    slow.close()
    quick.close()


def test_a_watchers_queue_is_bounded_in_bytes_too(monkeypatch):
    monkeypatch.setattr(feed, "QUEUE_BYTES", 100_000)
    page = a_dashboard()
    watcher = page.watch()
    for id in range(50):
        page.sink(a_record(id=id, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 10_000}]}]))
    told = events(watcher, 2)
    assert told[0]["type"] == "skipped"
    assert told[0]["count"] > 30
    watcher.close()


def test_the_order_holds_when_many_threads_bring_events():
    page = a_dashboard(held=10_000)
    watcher = page.watch()
    threads = [in_background(lambda base=base: [page.sink(a_start(base + i)) for i in range(50)]) for base in range(0, 500, 50)]
    for thread in threads:
        thread.join()
    data = b""
    while data.count(b"data: ") < 500:
        data += next(watcher)
    numbers = [int(str(id).rpartition("-")[2]) for id, _ in blocks(data)]
    assert numbers == sorted(numbers) and len(set(numbers)) == 500
    watcher.close()


# What is held


def test_a_request_in_flight_is_listed_with_how_far_it_has_come():
    page = a_dashboard()
    page.sink(a_start())
    page.sink({"type": "routed", "id": 1, "ts_ms": 2000, "provider": "up", "model": "llama3"})
    listed = page.api("/requests", {})
    assert listed is not None
    assert listed["requests"] == [
        {
            "id": 1,
            "stage": "routed",
            "ts_ms": 1001,
            "requested_model": "gpt",
            "in_flight": 1,
            "provider": "up",
            "sent_model": "llama3",
        }
    ]
    told = page.api("/requests/1", {})
    assert told is not None and told["record"] is None and told["state"]["stage"] == "routed"


def test_the_list_tells_what_a_card_shows_newest_first():
    page = a_dashboard()
    page.sink(a_record(id=1))
    page.sink(a_stream(id=2, outcome="error", error_type="cut"))
    listed = page.api("/requests", {})
    assert listed is not None
    newest, oldest = listed["requests"]
    assert (newest["id"], newest["outcome"], newest["error_type"]) == (2, "error", "cut")
    assert oldest["prompt"] == "hi" and oldest["answer"] == "hello"
    assert (oldest["input_tokens"], oldest["output_tokens"], oldest["cost"], oldest["attempts"]) == (12, 5, 0.3, 1)


def test_no_more_than_the_last_requests_are_held():
    page = a_dashboard(held=5)
    for id in range(20):
        page.sink(a_record(id=id))
    listed = page.api("/requests", {})
    assert listed is not None
    assert [request["id"] for request in listed["requests"]] == [19, 18, 17, 16, 15]
    assert page.api("/requests/3", {}) is None


def test_a_long_request_stays_listed_however_many_finish_meanwhile():
    page = a_dashboard(held=5)
    page.sink(a_start(1))
    for id in range(2, 30):
        page.sink(a_start(id))
        page.sink(a_record(id=id))
    listed = page.api("/requests", {})
    assert listed is not None
    assert listed["requests"][-1]["id"] == 1
    assert listed["requests"][-1]["stage"] == "start"


def test_when_the_bytes_run_out_the_oldest_lose_their_content_but_not_their_waterfall():
    page = a_dashboard(held=500, held_bytes=4_000_000)
    text = [{"role": "user", "content": [{"type": "text", "text": "x" * 30_000}]}]
    for id in range(500):
        page.sink(a_stream(id=id, messages=text, request={"model": "gpt", "temperature": 0.5, "stop": "END"}))
    listed = page.api("/requests", {})
    assert listed is not None and len(listed["requests"]) == 500
    oldest, newest = page.api("/requests/0", {}), page.api("/requests/499", {})
    assert oldest is not None and newest is not None
    assert newest["record"]["messages"] == text
    assert oldest["record"]["messages"] == [] and oldest["record"]["content_held"] is False
    assert oldest["record"]["response"]["usage"]["output_tokens"] == 5
    assert oldest["record"]["request"] == {"temperature": 0.5}
    assert [span["name"] for span in oldest["spans"]] == [span["name"] for span in newest["spans"]]
    assert page._feed._bytes <= 4_000_000


def test_a_record_of_many_megabytes_is_cut_for_the_page_and_says_so():
    page = a_dashboard()
    long = [{"role": "user", "content": [{"type": "text", "text": "x" * 5_000_000}]} for _ in range(40)]
    record = a_record(messages=long, requested_model="m" * 1_000_000, error="e" * 1_000_000, trace={"k": "v" * 1_000_000})
    watcher = page.watch()
    page.sink(record)
    data = next(watcher)
    assert len(data) < 1_200_000
    ((_, event),) = blocks(data)
    assert event["messages"][-1]["content"][0]["text"].endswith("more characters)")
    assert record["messages"][0]["content"][0]["text"] == "x" * 5_000_000
    watcher.close()


def test_a_searched_text_is_found_in_prompts_and_answers_whatever_its_case():
    page = a_dashboard()
    page.sink(a_record(id=1, messages=[{"role": "user", "content": [{"type": "text", "text": "Der Fluß ist BREIT"}]}]))
    page.sink(a_record(id=2, response=a_response(content='say "so"')))
    page.sink(a_start(3, model="Mistral"))

    def found(text: str) -> list[int]:
        listed = page.api("/requests", {"text": text})
        assert listed is not None
        return [request["id"] for request in listed["requests"]]

    assert found("breit") == [1]
    assert found("FLUß") == [1]
    assert found('say "SO"') == [2]
    assert found("mistral") == [3]
    assert found("messages") == []  # the name of a key is nothing anybody said
    assert found("") == [3, 2, 1]


# Whatever is said


def nested(levels: int) -> Any:
    value: Any = "end"
    for _ in range(levels):
        value = {"k": [value]}
    return value


@pytest.mark.parametrize(
    "odd",
    ["\ud800", "a\u2028b\u2029\x00\x1b[31m", "</script><img src=x onerror=alert(1)>", "\U0001f600" * 50_000, 10**400, -(10**5000),
     float("nan"), float("inf"), nested(50), nested(250), {"\udfff": 1}, b"bytes", {1, 2}, [None] * 100_000],
    ids=["surrogate", "separators", "html", "emoji", "many digits", "more digits", "nan", "inf", "nested", "too nested", "key",
         "bytes", "set", "long list"],
)  # fmt: skip
def test_nothing_a_client_says_keeps_a_request_from_being_shown(odd):
    page = a_dashboard()
    watcher = page.watch()
    page.sink(a_record(user=odd, trace={"odd": odd}, messages=[{"role": "user", "content": [{"type": "text", "text": odd}]}]))
    data = next(watcher)
    data.decode("ascii")
    ((_, event),) = blocks(data)
    assert event["id"] == 1
    told = page.api("/requests/1", {})
    assert told is not None and told["spans"]
    text = json.dumps(page.api("/requests", {})) + json.dumps(told, allow_nan=False)
    assert "\\ud800" not in text.replace("\\ud83d\\ude00", "")
    watcher.close()


def test_a_lone_surrogate_is_shown_as_the_replacement_character():
    page = a_dashboard()
    page.sink(a_record(user="a\ud800b"))
    told = page.api("/requests/1", {})
    assert told is not None and told["record"]["user"] == "a\ufffdb"


def test_a_sink_never_raises_but_says_in_the_log_what_it_cannot_show(caplog):
    page = a_dashboard()
    page.sink({"type": "complete"})
    assert "cannot show an event: KeyError" in caplog.text
    page.sink(a_record())
    assert page.api("/requests/1", {}) is not None


# One request


def test_the_detail_holds_the_spans_with_their_place_on_the_requests_clock():
    page = a_dashboard()
    page.sink(a_stream())
    told = page.api("/requests/1", {})
    assert told is not None
    placed = {span["name"]: (span["offset_ms"], span["duration_ms"]) for span in told["spans"]}
    assert placed["request"] == (0, 60)
    assert placed["dispatch_stream"] == (0, 20)
    assert placed["provider.http"] == pytest.approx((1.5, 58))
    assert placed["dispatch_stream.body"] == pytest.approx((20, 40))


def test_the_trace_link_holds_the_trace_id_and_is_only_ever_a_web_address():
    linked = a_dashboard(trace_url="http://jaeger:16686/trace/{trace_id}")
    linked.sink(a_record(trace_id="ab" * 16))
    linked.sink(a_record(id=2))
    told, untraced = linked.api("/requests/1", {}), linked.api("/requests/2", {})
    assert told is not None and told["trace_url"] == f"http://jaeger:16686/trace/{'ab' * 16}"
    assert untraced is not None and untraced["trace_url"] == ""
    script = a_dashboard(trace_url="javascript:alert('{trace_id}')")
    script.sink(a_record(trace_id="ab" * 16))
    told = script.api("/requests/1", {})
    assert told is not None and told["trace_url"] == ""


@pytest.mark.parametrize(
    "path", ["", "/", "/requests/", "/requests/9", "/requests/x", "/requests/1/2", "/requests/٣", "/nothing"]
)
def test_what_is_not_there_is_none(path):
    assert a_dashboard().api(path, {}) is None


# The files of the page


def test_the_pages_files_have_their_types_and_nothing_else_is_given_away():
    page = a_dashboard()
    kinds = {
        name: page.asset(name) for name in ("", "observability", "app.js", "style.css", "sign-in", "sign-in.js", "sign-in.css")
    }
    assert {name: kind[0].partition(";")[0] for name, kind in kinds.items() if kind} == {
        "": "text/html", "observability": "text/html", "app.js": "text/javascript", "style.css": "text/css",
        "sign-in": "text/html", "sign-in.js": "text/javascript", "sign-in.css": "text/css",
    }  # fmt: skip
    for name in ("__init__.py", "feed.py", "../router.py", "..%2frouter.py", "style.css/", "no.js", "py.typed", ".", "index"):
        assert page.asset(name) is None, name


def test_every_address_in_a_page_is_relative_to_where_it_stands():
    page = a_dashboard()
    above, below = page.asset(""), page.asset("observability")
    assert above is not None and below is not None
    assert b'src="dashboard/app.js"' in above[1] and b'src="app.js"' in below[1]
    for name in ("", "observability", "sign-in", "observability/sign-in"):
        asset = page.asset(name)
        assert asset is not None
        text = asset[1].replace(b"xmlns='http://www.w3.org/2000/svg'", b"")
        for part in (b'href="/', b'src="/', b"://", b"<base", b"style=", b"onclick="):
            assert part not in text, (name, part)


FORBIDDEN = ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function", "srcdoc", "setHTML")


def test_no_script_of_the_page_reads_html_or_runs_text():
    scripts = [path for path in (ROOT / "dashboard").iterdir() if path.suffix == ".js"]
    assert len(scripts) > 8
    for path in scripts:
        text = path.read_text("utf-8")
        for forbidden in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
            "srcdoc",
            "setHTML",
        ):
            assert forbidden not in text, f"{path.name} uses {forbidden}"
        assert text.count("\n") <= 400, f"{path.name} is too long to be read"


def test_the_package_gives_its_files_out_of_a_zip_archive_too(tmp_path):
    archive = tmp_path / "router.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for path in (ROOT / "dashboard").iterdir():
            if path.is_file():
                zipped.write(path, f"dashboard/{path.name}")
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dashboard;"
        "page = dashboard.Dashboard(max_watchers=1, spans=list);"
        "print(len(page.asset('')[1]), page.asset('app.js')[0], page.asset('nothing.js'))"
    )
    said = subprocess.run([sys.executable, "-c", program, str(archive)], capture_output=True, text=True, cwd=tmp_path, check=True)
    size, *rest = said.stdout.split(maxsplit=1)
    assert int(size) > 1000 and rest == ["text/javascript; charset=utf-8 None\n"]
