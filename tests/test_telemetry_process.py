"""Telemetry of the running router, judged by what a collector gets, what clients and providers see, and what is left behind."""

from __future__ import annotations

import json
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from backends.otlp import Span
from conftest import RouterFactory
from fake_upstream import (
    FakeUpstream,
    chat_completion,
    chunks,
    end,
    error_answer,
    fin,
    hold,
    json_answer,
    openai_chunks,
    silence,
    stream,
    stream_head,
)
from otlp_collector import HANG, OtlpCollector, Step, partial, reply
from router_process import INBOUND_KEY, PROVIDER_KEY, RULES, SECRET_PROMPT, chat_body, free_port, until

CALLER = "00-12345678901234567890123456789012-1234567890123456-01"
USAGE = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 5}}
BEGUN = openai_chunks("one two", finish=None, done=False)
TWO = """
[[providers]]
name = "first"
format = "openai"
base_url = "{upstream}/v1"

[[providers]]
name = "second"
format = "openai"
base_url = "{upstream}/v1"
"""


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    running = OtlpCollector()
    yield running
    running.close()
    assert running.faults == []


def on(url: str, more: str = "") -> str:
    """The rules, and telemetry to this collector."""
    return f'{RULES}\n[telemetry]\nenabled = true\notlp_endpoint = "{url}"\n{more}\n'


def trace_of(collector: OtlpCollector, trace_id: str, at_least: int = 1) -> list[Span]:
    """The spans of a trace in the order of their start, the root first."""

    def found() -> list[Span]:
        return [s for s in collector.spans() if s["trace_id"] == trace_id]

    until(lambda: len(found()) >= at_least and any(s["name"] == "request" for s in found()), 10, "the trace")
    return sorted(found(), key=lambda s: (s["start"], s["name"] != "request"))


def shape(spans: list[Span], parent: str | None = None) -> list[Any]:
    ids = {s["span_id"] for s in spans}
    below = [s for s in spans if (s["parent_span_id"] == parent if parent else s["parent_span_id"] not in ids)]
    return [(s["name"], shape(spans, s["span_id"])) for s in below]


def named(spans: list[Span], name: str) -> Span:
    (found,) = [s for s in spans if s["name"] == name]
    return found


def failed(spans: list[Span]) -> set[str]:
    return {s["name"] for s in spans if s["status"]["code"] == "error"}


SEND: Any = ("provider.send", [("provider.http", [])])


# --- off


def test_off_is_absent(router: RouterFactory) -> None:
    """No module, no thread, no connection, and not a header more for clients and providers."""
    process = router()
    answer = process.chat(headers={"traceparent": CALLER})
    assert "x-router-trace-id" not in answer.headers
    mapped = Path(f"/proc/{process.pid}/maps").read_text()
    assert "google" not in mapped
    assert process.stats()["telemetry"]["enabled"] is False
    assert process.record()["trace_id"] is None
    threads = {Path(p, "comm").read_text().strip() for p in Path(f"/proc/{process.pid}/task").iterdir()}
    assert not [name for name in threads if "telem" in name.lower() or "otel" in name.lower()]


def test_off_a_disabled_sdk_turns_off_what_the_file_turns_on(router: RouterFactory, collector: OtlpCollector) -> None:
    process = router(rules=on(collector.url), environment={"OTEL_SDK_DISABLED": "true"})
    assert "x-router-trace-id" not in process.chat().headers
    assert process.stop() == 0
    assert collector.received == []


@pytest.mark.parametrize("told", ["enabled = false", 'enabled = true\nservice_name = "x"'])
def test_off_variables_that_no_collector_could_use_do_not_keep_the_router_from_starting(router: RouterFactory, told: str) -> None:
    """They are other programs' variables, too."""
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": "unix:///run/otel.sock", "OTEL_TRACES_SAMPLER_ARG": "half",
        "OTEL_EXPORTER_OTLP_HEADERS": "host=x",
    }  # fmt: skip
    environment |= {"OTEL_SDK_DISABLED": "TRUE"} if "true" in told else {}
    process = router(rules=f"{RULES}\n[telemetry]\n{told}\n", environment=environment)
    assert process.chat().status == 200
    assert process.stats()["telemetry"]["enabled"] is False


# --- one trace, seen by everybody


def test_header_log_provider_and_collector_agree_about_a_request(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(rules=on(collector.url))
    upstream.script(json_answer(chat_completion("fine", USAGE)))
    answer = process.chat(headers={"traceparent": CALLER, "tracestate": "foo=1"})
    trace_id = answer.headers["x-router-trace-id"]
    assert trace_id == "12345678901234567890123456789012" == process.record()["trace_id"]
    spans = trace_of(collector, trace_id, 4)
    assert shape(spans) == [("request", [("dispatch", [SEND])])]
    assert named(spans, "request")["parent_span_id"] == "1234567890123456"
    (asked,) = upstream.posts
    assert asked.header("traceparent") == f"00-{trace_id}-{named(spans, 'provider.http')['span_id']}-01"
    assert asked.header("tracestate") == "foo=1"
    assert {s["trace_state"] for s in spans} == {"foo=1"}
    attributes = named(spans, "provider.send")["attributes"]
    assert (attributes["gen_ai.usage.input_tokens"], attributes["gen_ai.usage.cache_read.input_tokens"]) == (9, 5)


def test_a_provider_is_told_nothing_if_so_configured(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(rules=on(collector.url, "propagate = false"))
    assert process.chat(headers={"traceparent": CALLER}).status == 200
    assert upstream.posts[0].header("traceparent") is None
    trace_of(collector, "12345678901234567890123456789012", 4)


def test_a_stream_is_set_up_and_then_has_a_body_to_its_last_byte(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(rules=on(collector.url))
    upstream.script(stream(openai_chunks("one two three", USAGE), 0.05))
    with process.stream() as reply_:
        reply_.read()
    spans = trace_of(collector, reply_.headers["x-router-trace-id"], 5)
    assert shape(spans)[0][1] == [("dispatch_stream", [SEND, ("dispatch_stream.body", [])])]
    request, setup, body, send = (
        named(spans, n) for n in ("request", "dispatch_stream", "dispatch_stream.body", "provider.send")
    )
    assert setup["end"] == body["start"] < body["end"] <= request["end"]
    assert body["end"] - body["start"] > 100_000_000
    assert body["attributes"]["gen_ai.response.finish_reasons"] == ["stop"]
    assert body["attributes"]["gen_ai.usage.output_tokens"] == request["attributes"]["gen_ai.usage.output_tokens"] == 4
    first = send["attributes"]["gen_ai.response.time_to_first_chunk"]
    assert 0 < first < (send["end"] - send["start"]) / 1e9 - 0.1
    assert failed(spans) == set()


def test_a_failover_shows_every_attempt(router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector) -> None:
    process = router(CONFIG_RETRY, providers=TWO, rules=on(collector.url))
    upstream.script(error_answer(503), json_answer(chat_completion("fine")))
    answer = process.chat()
    assert answer.status == 200
    spans = trace_of(collector, answer.headers["x-router-trace-id"], 6)
    assert shape(spans) == [("request", [("dispatch", [SEND, SEND])])]
    sends = [s for s in spans if s["name"] == "provider.send"]
    assert [(s["attributes"]["router.attempt"], s["attributes"]["provider"], s["status"]["code"]) for s in sends] == [
        (1, "first", "error"), (2, "second", "unset"),
    ]  # fmt: skip
    assert [e["name"] for s in spans for e in s["events"]] == ["exception"]
    assert sends[0]["events"][0]["attributes"]["exception.type"] == "upstream_503"
    assert named(spans, "request")["status"]["code"] == "unset"
    told = [p.header("traceparent") for p in upstream.posts]
    calls = [s["span_id"] for s in spans if s["name"] == "provider.http"]
    assert [str(t).split("-")[2] for t in told] == calls


CONFIG_RETRY = """
[server]
port = {port}
{server}

[logging]
enabled = true
path = "{log}"

{providers}

{rules}
"""


WHOLE = {"request", "dispatch", "provider.send", "provider.http"}
BROKEN = {"request", "dispatch_stream.body", "provider.send", "provider.http"}


@pytest.mark.parametrize(
    ("script", "streamed", "status", "names"),
    [
        (error_answer(500, f"no {SECRET_PROMPT} {PROVIDER_KEY}"), False, 502, WHOLE),
        (error_answer(400, f"no {SECRET_PROMPT}"), False, 400, set()),
        (silence(), False, 504, WHOLE),
        (error_answer(500), True, 502, {"request", "dispatch_stream", "provider.send", "provider.http"}),
        (stream_head() + chunks(BEGUN) + fin(), True, 200, BROKEN),
        (stream_head() + chunks(BEGUN) + silence(), True, 200, BROKEN),
    ],
)  # fmt: skip
def test_errors_stand_where_they_belong(
    script: Any,
    streamed: bool,
    status: int,
    names: set[str],
    router: RouterFactory,
    upstream: FakeUpstream,
    collector: OtlpCollector,
) -> None:
    process = router(provider='api_key_env = "KEY"\nread_timeout = 0.5\nidle_timeout = 0.5', rules=on(collector.url),
                     environment={"KEY": PROVIDER_KEY})  # fmt: skip
    upstream.script(script)
    got: Any = process.stream(SECRET_PROMPT) if streamed else process.chat(SECRET_PROMPT)
    assert got.status == status
    if streamed:
        got.read()
        got.close()
    spans = trace_of(collector, got.headers["x-router-trace-id"], 4 + (status == 200))
    assert failed(spans) == names
    assert sum(len(s["events"]) for s in spans) == bool(names)
    record = process.record()
    assert named(spans, "request")["attributes"]["error.type"] == record["error_type"]
    assert SECRET_PROMPT.encode() not in collector.everything()
    assert PROVIDER_KEY.encode() not in collector.everything()


@pytest.mark.parametrize("begun", [False, True])
def test_a_client_that_leaves_ends_its_trace(
    begun: bool, router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(rules=on(collector.url))
    upstream.script(stream_head() + chunks(BEGUN) + silence() if begun else silence())
    body = json.dumps(chat_body(stream=True)).encode()
    sock = process.dial()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    upstream.wait_for(1)
    while begun and b" two" not in sock.recv(65536):
        pass
    sock.close()
    spans = trace_of(collector, process.record()["trace_id"], 5 if begun else 4)
    body_span: list[Any] = [("dispatch_stream.body", [])] if begun else []
    assert shape(spans) == [("request", [("dispatch_stream", [SEND, *body_span])])]
    assert (failed(spans), named(spans, "request")["attributes"]["router.outcome"]) == (set(), "cancelled")


def test_an_overloaded_request_is_a_trace_without_attempt(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(server="threads = 8\nmax_in_flight = 1", rules=on(collector.url))
    gate = threading.Event()
    upstream.script(hold(gate) + json_answer(chat_completion()))
    with ThreadPoolExecutor() as pool:
        slow = pool.submit(process.chat)
        upstream.wait_for(1)
        refused = process.chat()
        gate.set()
        assert (slow.result().status, refused.status) == (200, 503)
    spans = trace_of(collector, refused.headers["x-router-trace-id"], 2)
    assert shape(spans) == [("request", [("dispatch", [])])]
    assert failed(spans) == {"request", "dispatch"}


def test_requests_that_are_none_are_lone_spans_but_health_is_not(router: RouterFactory, collector: OtlpCollector) -> None:
    process = router(server='api_key_env = "K"', rules=on(collector.url), environment={"K": INBOUND_KEY})
    for path in ("/health", "/v1/models", "/nothing"):
        process.get(path)
    process.key = INBOUND_KEY
    process.get("/v1/models")
    process.get("/nothing")
    process.request("DELETE", "/v1/models")
    process.post("/v1/chat/completions", b"{")
    assert process.stop() == 0
    found = [(s["attributes"]["http.request.method"], s["attributes"]["http.response.status_code"]) for s in collector.spans()]
    stats = [("GET", 200)] * (len(found) - 6)  # the stats the start may have asked for
    assert sorted(found) == sorted(
        [("GET", 401), ("GET", 401), ("GET", 200), ("GET", 404), ("DELETE", 405), ("POST", 400), *stats]
    )
    assert {(s["name"], s["kind"], s["parent_span_id"]) for s in collector.spans()} == {("request", "server", None)}
    assert INBOUND_KEY.encode() not in collector.everything()


# --- metrics and logs of the process


def test_metrics_of_a_mixed_load_are_exact(router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector) -> None:
    process = router(rules=on(collector.url, "sample_ratio = 0.0"))
    upstream.default = json_answer(chat_completion("fine", USAGE))
    with ThreadPoolExecutor(8) as pool:
        assert {a.status for a in pool.map(lambda _: process.chat(), range(40))} == {200}
    upstream.default = error_answer(500)
    assert process.chat().status == 502
    assert process.stop() == 0
    found = collector.metrics()
    counted = {p["attributes"]["error"]: p["value"] for p in found["router.requests"]["points"]}
    assert counted == {False: 40, True: 1}
    assert [p["value"] for p in found["router.tokens.input"]["points"]] == [360]
    assert [p["value"] for p in found["router.in_flight"]["points"]] == [0]
    assert sum(p["count"] or 0 for p in found["router.overhead_ms"]["points"]) == 41
    assert collector.spans() == []


def test_the_programs_own_lines_arrive_and_keep_no_feedback_going(router: RouterFactory, collector: OtlpCollector) -> None:
    process = router(rules=on(collector.url))
    process.signal(signal.SIGHUP)
    until(lambda: len(collector.log_records()) >= 2, 10, "two lines")
    first, line = collector.log_records()
    assert "listens on" in first["body"]
    assert line["body"].endswith("config.toml was read again")
    assert (line["severity_text"], line["trace_id"]) == ("INFO", None)
    collector.answer_always(reply(500))
    process.chat(SECRET_PROMPT)
    until(lambda: process.stats()["telemetry"]["spans"]["failed"], 10, "a failure")
    before = process.stats()["telemetry"]["logs"]
    time.sleep(2.5)  # two rounds of the lanes: what fed itself would have grown by now
    assert process.stats()["telemetry"]["logs"] == before
    assert process.errors().count("telemetry does not get through") == 1
    assert process.stop() == 0
    assert SECRET_PROMPT.encode() not in collector.everything()


FAILING = f"""
def plugin(settings):
    class Hooks:
        def on_end(self, *told):
            raise ValueError("{SECRET_PROMPT}")

    return Hooks()
"""


def test_a_line_of_a_request_carries_its_ids(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector, tmp_path: Path
) -> None:
    (tmp_path / "failing_part.py").write_text(FAILING)
    process = router(rules=on(collector.url) + '[plugins.failing]\nenabled = true\nmodule = "failing_part"\n',
                     environment={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    answer = process.chat()
    until(lambda: len(collector.log_records()) >= 2, 10, "two lines")
    _, line = collector.log_records()
    root = named(trace_of(collector, answer.headers["x-router-trace-id"], 4), "request")
    assert (line["trace_id"], line["span_id"]) == (root["trace_id"], root["span_id"])
    assert (line["severity_text"], line["body"]) == ("WARNING", "failing failed in on_end: ValueError")
    assert SECRET_PROMPT.encode() not in collector.everything()


def test_a_worker_takes_no_ids_to_the_next_request(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(server="threads = 2", rules=on(collector.url))
    seen = set()
    for _ in range(20):
        answer = process.chat()
        spans = trace_of(collector, answer.headers["x-router-trace-id"], 4)
        assert named(spans, "request")["parent_span_id"] is None
        seen.add(answer.headers["x-router-trace-id"])
    assert len(seen) == 20


# --- a collector in trouble

TROUBLE: dict[str, bytes | list[Step] | None] = {
    "down": None, "hangs": [HANG], "429": reply(429), "503": reply(503, Retry_After="1"), "302": reply(302, Location="/x"),
    "HTML": reply(200, b"<html>log in</html>", "text/html"), "partial success": partial("/v1/traces", 1, "no room"),
    "trickles": [b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n", *[b"x", 0.2] * 99],
}  # fmt: skip


@pytest.mark.parametrize("case", TROUBLE)
def test_a_collector_in_trouble_costs_no_request_and_is_told_of_once(
    case: str, router: RouterFactory, upstream: FakeUpstream
) -> None:
    collector, answer = OtlpCollector(), TROUBLE[case]
    if answer:
        collector.answer_always(answer)
    else:
        collector.close()
    process = router(rules=on(collector.url, "shutdown_seconds = 1"))
    upstream.default = json_answer(chat_completion("fine"))
    process.chat()
    before, slowest = process.memory(), 0.0
    for _ in range(150):
        began = time.monotonic()
        assert process.chat().status == 200
        slowest = max(slowest, time.monotonic() - began)
    assert slowest < 1.0
    assert process.memory() - before < 16 * 2**20
    until(lambda: process.stats()["telemetry"]["last_error"] is not None, 15, "the trouble is told")
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 4
    assert process.errors().count("telemetry does not get through") == 1
    collector.close()


def test_a_busy_end_in_the_middle_of_streams_loses_nothing(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(server="drain_seconds = 5", rules=on(collector.url))
    gate = threading.Event()
    upstream.default = stream_head() + chunks(BEGUN) + hold(gate) + chunks(openai_chunks("and three", USAGE)) + end()
    streams = [process.stream() for _ in range(5)]
    for one in streams:
        one.next()
    ids = {one.headers["x-router-trace-id"] for one in streams}
    process.signal(signal.SIGTERM)
    until(lambda: "stopping" in process.errors(), 5, "the drain")
    gate.set()
    for one in streams:
        assert b"[DONE]" in one.read()
        one.close()
    assert process.exit_code() == 0
    names = [s["name"] for s in collector.spans() if s["trace_id"] in ids]
    assert sorted(set(names)) == ["dispatch_stream", "dispatch_stream.body", "provider.http", "provider.send", "request"]
    assert len(names) == 25
    assert len({(s["trace_id"], s["span_id"]) for s in collector.spans()}) == len(collector.spans())
    assert collector.metrics()["router.requests"]["points"][0]["value"] == 5
    assert [line for line in collector.log_records() if line["body"].startswith("stopping")]


def test_a_drain_that_ends_in_errors_tells_of_every_stream(
    router: RouterFactory, upstream: FakeUpstream, collector: OtlpCollector
) -> None:
    process = router(server="drain_seconds = 0.5", rules=on(collector.url))
    upstream.default = stream_head() + chunks(BEGUN) + silence()
    streams = [process.stream() for _ in range(5)]
    for one in streams:
        one.next()
    process.signal(signal.SIGTERM)
    for one in streams:
        one.read()
        one.close()
    process.exit_code()
    bodies = [s for s in collector.spans() if s["name"] == "dispatch_stream.body"]
    assert [s["attributes"]["error.type"] for s in bodies] == ["shutdown"] * 5
    assert {s["status"]["code"] for s in bodies} == {"error"}


# --- configuration


def test_variables_of_the_environment_stand_in_for_keys_of_the_file(router: RouterFactory, collector: OtlpCollector) -> None:
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_EXPORTER_OTLP_HEADERS": "x-scope=a%20b,authorization=Bearer%20dest-TOKEN",
        "OTEL_SERVICE_NAME": "by-env", "OTEL_RESOURCE_ATTRIBUTES": "deployment.environment=test",
    }  # fmt: skip
    process = router(rules=f"{RULES}\n[telemetry]\nenabled = true\n", environment=environment)
    process.chat()
    spans = until(collector.spans, 10, "spans")
    assert (spans[0]["resource"]["service.name"], spans[0]["resource"]["deployment.environment"]) == ("by-env", "test")
    assert collector.received[0].headers["x-scope"] == "a b"
    assert collector.received[0].headers["authorization"] == "Bearer dest-TOKEN"
    process.stop()
    assert "dest-TOKEN" not in process.output()


def test_headers_of_the_file_read_the_environment_and_win_over_it(router: RouterFactory, collector: OtlpCollector) -> None:
    settings = 'headers = { Authorization = "Bearer ${COLLECTOR}" }\nservice_name = "by-file"'
    environment = {"COLLECTOR": "dest-TOKEN-0123", "OTEL_EXPORTER_OTLP_HEADERS": "x-stray=1", "OTEL_SERVICE_NAME": "by-env"}
    process = router(rules=on(collector.url, settings), environment=environment)
    process.chat()
    spans = until(collector.spans, 10, "spans")
    assert spans[0]["resource"]["service.name"] == "by-file"
    assert collector.received[0].headers["authorization"] == "Bearer dest-TOKEN-0123"
    assert "x-stray" not in collector.received[0].headers


@pytest.mark.parametrize(
    "line",
    ['otlp_endpoint = "http://user:secret@host:4318"', 'otlp_endpoint = "http://host:4318/?key=secret"',
     'headers = { Host = "x" }', 'headers = { Authorization = "a\\nsecret" }', 'headers = { "bad name" = "x" }',
     "shutdown_seconds = -1",
     'otlp_endpoint = "http://"'],
)  # fmt: skip
def test_settings_that_cannot_work_refuse_the_start(line: str, router: RouterFactory) -> None:
    process = router(rules=f"{RULES}\n[telemetry]\n{line}\n", start=False)
    process.port = free_port()
    process.write_config()
    process.launch()
    assert process.exit_code() == 2
    said = process.errors().strip()
    assert re.match(r"config\.toml\.telemetry[.:]", said), said
    assert "\n" not in said
    assert "secret" not in said


def test_nothing_is_connected_to_before_it_is_needed_and_nothing_is_left_open(router: RouterFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        process = router(
            rules=RULES + f'\n[telemetry]\nenabled = false\notlp_endpoint = "http://127.0.0.1:{listener.getsockname()[1]}"\n'
        )
        process.chat()
        with pytest.raises(TimeoutError):
            listener.accept()
