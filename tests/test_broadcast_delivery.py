"""From the record to the destination, whatever the destination does: nothing lost that is not counted, nobody harmed."""

from __future__ import annotations

import email.utils
import gzip
import json
import os
import resource
import socket
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from broadcast_records import GENERATION_ID, RECORD, failed, record, to_bytes
from broadcast_runs import check_ledger, collector, configured, counts, running, settled
from fake_collector import OK, FakeCollector, Received, Reply, read_request, until

from broadcast import Broadcast, Destination, Settings, delivery, encode, replay
from broadcast.delivery import Searcher
from broadcast.destinations import skip_reason
from broadcast.exchange import retry_after

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(delivery, "BACKOFF_MOST", 0.1)
    monkeypatch.setattr(delivery, "_warned", {})


@pytest.fixture
def receiver() -> Iterator[FakeCollector]:
    with FakeCollector() as made:
        yield made


def accepted(broadcast: Broadcast, n: int) -> bool:
    return bool(counts(broadcast, "a")["accepted"] == n)


def sent(broadcast: Broadcast, n: int, **changes: Any) -> list[str]:
    made = [record(**changes) for _ in range(n)]
    for one in made:
        broadcast.sink(one)
    return [one["generation_id"] for one in made]


# -- the plain case


def test_a_record_arrives_as_gzipped_otlp_json_with_the_destinations_headers(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url, headers={"Authorization": "Bearer dest-TOKEN"})) as made:
        made.sink(RECORD)
        settled(made, "a", 1)
    (got,) = receiver.received
    assert (got.method, got.path) == ("POST", "/v1/traces")
    assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
    assert got.headers["content-type"] == "application/json"
    assert got.headers["content-encoding"] == "gzip"
    assert got.headers["authorization"] == "Bearer dest-TOKEN"
    assert got.document == encode(RECORD, privacy=False)


def test_other_events_are_nobodys_business(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url)) as made:
        for kind in ("start", "classified", "routed"):
            made.sink({"type": kind, "id": 1})
        made.sink(record())
        assert settled(made, "a", 1)["delivered"] == 1


def test_a_record_is_in_the_database_within_100_ms(tmp_path: Path) -> None:
    with FakeCollector(Reply(hang=True)) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        until(lambda: counts(made, "a")["accepted"] == 1)
        taken = []
        for n in range(2, 22):
            begun = time.monotonic()
            sent(made, 1)
            until(partial(accepted, made, n))
            taken.append(time.monotonic() - begun)
        assert sorted(taken)[10] < 0.1, "the median: a busy machine may hold up any one of them"


def test_the_database_is_ours_alone_from_the_beginning(tmp_path: Path, receiver: FakeCollector) -> None:
    before = os.umask(0)
    try:
        with running(tmp_path, collector("a", receiver.url)) as made:
            sent(made, 1)
            settled(made, "a", 1)
            folder = tmp_path / "state"
            assert stat.S_IMODE(folder.stat().st_mode) == 0o700
            modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    finally:
        os.umask(before)
    assert modes == dict.fromkeys(("broadcast.db", "broadcast.db-wal", "broadcast.db-shm"), 0o600)


def test_switched_off_there_is_no_file_and_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with running(tmp_path, collector("a", "http://127.0.0.1:9/v1/traces"), enabled=False) as made:
        sent(made, 3)
        assert threading.active_count() == before
        assert made.stats()["enabled"] is False
        assert counts(made, "a")["accepted"] == 0
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_behind_after_close(tmp_path: Path, receiver: FakeCollector) -> None:
    before = threading.active_count()
    with running(tmp_path, *(collector(f"d{n}", receiver.url) for n in range(3))) as made:
        sent(made, 3)
        for n in range(3):
            settled(made, f"d{n}", 3)
        assert threading.active_count() > before
    until(lambda: threading.active_count() == before)


def test_several_records_share_a_request_and_keep_their_order(tmp_path: Path) -> None:
    with FakeCollector(Reply(wait=0.2), OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        ids = sent(made, 200)
        settled(made, "a", 200)
        assert receiver.generations() == ids
        assert max(len(list(got.document["resourceSpans"])) for got in receiver.received) <= 64 * 3
        assert len(receiver.received) < 20


def test_a_batch_stays_below_a_mebibyte_but_one_record_may_be_larger(tmp_path: Path) -> None:
    large = [{"role": "user", "content": [{"type": "text", "text": "x" * 150_000}]}]
    huge = [{"role": "user", "content": [{"type": "text", "text": "x" * 600_000}]}]
    with FakeCollector(Reply(wait=0.2), OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        ids = sent(made, 4, messages=large) + sent(made, 1, messages=huge) + sent(made, 2)
        settled(made, "a", 7)
        assert receiver.generations() == ids
        sizes = [(len(got.text), len(list(got.spans())) // 3) for got in receiver.received]
        assert all(size <= 1 << 20 or records == 1 for size, records in sizes)
        assert max(size for size, _ in sizes) > 1 << 20


def test_privacy_and_open_destinations_get_the_same_record_each_in_its_own_form(tmp_path: Path, receiver: FakeCollector) -> None:
    with (
        FakeCollector() as private,
        running(tmp_path, collector("open", receiver.url), collector("private", private.url, privacy_mode=True)) as made,
    ):
        made.sink(RECORD)
        settled(made, "open", 1)
        settled(made, "private", 1)
        assert receiver.received[0].document == encode(RECORD, privacy=False)
        assert private.received[0].document == encode(RECORD, privacy=True)


# -- which records


@pytest.mark.parametrize("how", ["reload", "restart"])
def test_privacy_switched_on_holds_for_what_is_queued_already(tmp_path: Path, how: str) -> None:
    with FakeCollector(Reply(503)) as receiver:
        prompt = [{"role": "user", "content": [{"type": "text", "text": "SECRET-PROMPT"}]}]
        private = collector("a", receiver.url, privacy_mode=True)
        made = Broadcast(configured(tmp_path, collector("a", receiver.url)))
        sent(made, 3, messages=prompt)
        until(lambda: counts(made, "a")["last_error"])
        seen = len(receiver.received)
        if how == "reload":
            made.reload(configured(tmp_path, private))
        else:
            made.close(0)
            seen = len(receiver.received)
            made = Broadcast(configured(tmp_path, private))
        receiver.script(OK)
        ids = sent(made, 2, messages=prompt)
        have = settled(made, "a", 5)
        assert (have["delivered"], have["dropped"]) == (2, {"privacy": 3})
        late = [got for got in receiver.received[seen:] if b"SECRET-PROMPT" in got.text]
        assert len(late) <= (1 if how == "reload" else 0)  # what was on the wire at that moment
        assert receiver.generations()[-2:] == ids
        check_ledger(made)
        made.close(0.5)


def test_sampling_keeps_or_leaves_whole_sessions_and_counts_what_it_left(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url, sampling_rate=0.5)) as made:
        for session in range(60):
            for _ in range(3):
                made.sink(record(session_id=f"session {session}"))
        until(lambda: counts(made, "a")["accepted"] + counts(made, "a")["skipped"].get("sampling", 0) == 180)
        settled(made, "a", counts(made, "a")["accepted"])
        found = [span for span in receiver.spans() if span["name"] == "LLM Generation"]
        sessions = [next(p["value"]["stringValue"] for p in span["attributes"] if p["key"] == "session.id") for span in found]
        assert all(sessions.count(session) == 3 for session in sessions)
        assert 15 < len(set(sessions)) < 45


def test_a_destination_takes_only_the_keys_it_names(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url, api_keys=("team",))) as made:
        (wanted,) = sent(made, 1, api_key_name="team")
        sent(made, 2, api_key_name="other")
        sent(made, 1, api_key_name=None)
        until(lambda: counts(made, "a")["skipped"] == {"api_key": 3})
        settled(made, "a", 1)
        assert receiver.generations() == [wanted]


RULES: list[tuple[dict[str, Any], bool]] = [
    ({"field": "model", "operator": "equals", "value": "anthropic/claude-haiku-4.5"}, True),
    ({"field": "model", "operator": "not_equals", "value": "anthropic/claude-haiku-4.5"}, False),
    ({"field": "model", "operator": "starts_with", "value": "anthropic/"}, True),
    ({"field": "model", "operator": "ends_with", "value": "4.5"}, True),
    ({"field": "model", "operator": "contains", "value": "haiku"}, True),
    ({"field": "model", "operator": "not_contains", "value": "haiku"}, False),
    ({"field": "model", "operator": "regex", "value": "^anthropic/.*-[0-9.]+$"}, True),
    ({"field": "model", "operator": "regex", "value": "gpt"}, False),
    ({"field": "provider", "operator": "equals", "value": "Amazon Bedrock"}, True),
    ({"field": "input", "operator": "contains", "value": "Hello"}, True),
    ({"field": "output", "operator": "equals", "value": "Hi."}, True),
    ({"field": "finish_reason", "operator": "equals", "value": "tool_calls"}, True),
    ({"field": "api_key_name", "operator": "equals", "value": "fixture key"}, True),
    ({"field": "total_tokens", "operator": "equals", "value": 3058}, True),
    ({"field": "total_tokens", "operator": "equals", "value": "3058"}, True),
    ({"field": "total_tokens", "operator": "gt", "value": 3057}, True),
    ({"field": "prompt_tokens", "operator": "lt", "value": 2489}, False),
    ({"field": "completion_tokens", "operator": "gte", "value": "569"}, True),
    ({"field": "total_cost", "operator": "lte", "value": 0.005334}, True),
    ({"field": "session_id", "operator": "exists"}, False),
    ({"field": "session_id", "operator": "not_exists"}, True),
    ({"field": "model", "operator": "exists"}, True),
    ({"field": "model", "operator": "not_exists"}, False),
    ({"field": "user_id", "operator": "equals", "value": "u"}, False),
    ({"field": "user_id", "operator": "not_equals", "value": "u"}, True),
    ({"field": "user_id", "operator": "not_contains", "value": "u"}, True),
]


@pytest.fixture(scope="module")
def search() -> Iterator[Searcher]:
    made = Searcher()
    yield made
    made.close()


@pytest.mark.parametrize(("rule", "passes"), RULES, ids=[f"{r['field']}-{r['operator']}" for r, _ in RULES])
def test_a_filter_rule_passes_or_not(rule: dict[str, Any], passes: bool, search: Searcher) -> None:
    d = collector("a", "http://h/v1/traces", filter_rules={"groups": [{"rules": [rule]}]})
    assert (skip_reason(d, RECORD, search) is None) == passes


def test_groups_are_alternatives_and_logic_joins_the_rules_of_one(search: Searcher) -> None:
    yes = {"field": "model", "operator": "contains", "value": "haiku"}
    no = {"field": "model", "operator": "contains", "value": "gpt"}
    for groups, passes in (
        ([{"logic": "and", "rules": [yes, no]}], False),
        ([{"logic": "or", "rules": [yes, no]}], True),
        ([{"rules": [no]}, {"rules": [yes]}], True),
        ([{"rules": [no]}, {"rules": [no]}], False),
        ([], True),
    ):
        d = collector("a", "http://h/v1/traces", filter_rules={"groups": groups})
        assert (skip_reason(d, RECORD, search) is None) == passes
    resting = collector("a", "http://h/v1/traces", filter_rules={"enabled": False, "groups": [{"rules": [no]}]})
    assert skip_reason(resting, RECORD, search) is None


def test_a_regular_expression_that_explodes_holds_up_nothing(tmp_path: Path, receiver: FakeCollector) -> None:
    explodes = {"groups": [{"rules": [{"field": "input", "operator": "regex", "value": "(a+)+$"}]}]}
    bad = [{"role": "user", "content": [{"type": "text", "text": "a" * 4_000 + "b"}]}]
    good = [{"role": "user", "content": [{"type": "text", "text": "aaa"}]}]
    with running(tmp_path, collector("filtered", receiver.url, filter_rules=explodes)) as made:
        sent(made, 1, messages=bad)
        slowest = 0.0
        for _ in range(100):  # the interpreter stays free while the child is busy
            begun = time.monotonic()
            time.sleep(0.002)
            slowest = max(slowest, time.monotonic() - begun)
        (wanted,) = sent(made, 1, messages=good)
        assert settled(made, "filtered", 1)["skipped"] == {"filter": 1}
        assert receiver.generations() == [wanted]
        assert slowest < 0.2


def test_a_filter_that_takes_its_time_delays_no_other_destination(tmp_path: Path, receiver: FakeCollector) -> None:
    explodes = {"groups": [{"rules": [{"field": "input", "operator": "regex", "value": "(a+)+$"}]}]}
    bad = [{"role": "user", "content": [{"type": "text", "text": "a" * 4_000 + "b"}]}]
    with (
        FakeCollector() as other,
        running(tmp_path, collector("slow", other.url, filter_rules=explodes), collector("a", receiver.url)) as made,
    ):
        begun = time.monotonic()
        ids = sent(made, 20, messages=bad)
        settled(made, "a", 20)
        assert time.monotonic() - begun < 20 * 0.25
        assert receiver.generations() == ids
        until(lambda: counts(made, "slow")["skipped"] == {"filter": 20}, 20)


# -- answers that are failures


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 409, 413, 415, 422, 500, 501, 505])
def test_a_status_that_is_not_to_be_retried_drops_the_record_and_says_why(tmp_path: Path, status: int) -> None:
    with FakeCollector(Reply(status, body=b'{"code":3,"message":"SECRET-PROMPT"}'), OK) as receiver:
        with running(tmp_path, collector("a", receiver.url)) as made:
            sent(made, 1)
            have = settled(made, "a", 1)
            assert have["dropped"] == {f"http_{status}": 1}
            assert have["last_error"] == f"HTTP {status}"
            assert have["last_success"] is None
            (good,) = sent(made, 1)
            assert settled(made, "a", 2)["delivered"] == 1
        assert receiver.generations()[1:] == [good]


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_status_that_passes_is_tried_again_until_it_has(tmp_path: Path, status: int) -> None:
    with FakeCollector(Reply(status), Reply(status), OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        ids = sent(made, 1)
        have = settled(made, "a", 1)
        assert (have["delivered"], have["dropped"]) == (1, {})
        assert have["last_error"] == f"HTTP {status}"
        assert have["last_success"] is not None
        assert receiver.generations() == ids * 3


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply(301, {"Location": "http://127.0.0.1:1/"}, b""), "http_301"),
        (Reply(302, {"Location": "/login"}, b""), "http_302"),
        (Reply(307, {"Location": "http://127.0.0.1:1/"}, b""), "http_307"),
        (Reply(200, {"Content-Type": "text/html"}, b"<html>sign in</html>"), "bad_answer"),
        (Reply(200, {}, b"<!doctype html>"), "bad_answer"),
        (Reply(200, {"Content-Type": "text/html"}, b"hello"), "bad_answer"),
        (Reply(200, body=b"\x00\xffgarbage"), "bad_answer"),
        (Reply(200, {}, b"OK"), "bad_answer"),
        (Reply(200, body=b"[]"), "bad_answer"),
        (Reply(200, body=b'{"error":"no"}'), "bad_answer"),
        (Reply(200, body=b"[" * 60_000), "bad_answer"),
        (Reply(200, body=b" " * 70_000 + b"{}"), "bad_answer"),
        (Reply(200, body=b'{"partialSuccess":{"rejectedSpans":3,"errorMessage":"no"}}'), "rejected"),
        (Reply(200, body=b'{"partialSuccess":{"rejectedSpans":"3"}}'), "rejected"),
        (Reply(200, body=b'{"partialSuccess":{"rejectedSpans":"many"}}'), "rejected"),
        (Reply(200, {"Content-Type": "application/x-protobuf"}, b"\x0a\x06\x08\x03\x12\x02no"), "rejected"),
        (Reply(200, {"Content-Type": "application/x-protobuf"}, b"\x0a\x03\x08\xac\x02"), "rejected"),
        (Reply(200, {"Content-Encoding": "gzip"}, gzip.compress(b" " * 20_000_000)), "bad_answer"),
        (Reply(200, {"Content-Encoding": "gzip"}, b"not gzip"), "bad_answer"),
        (Reply(raw=b"SSH-2.0-OpenSSH_9.2\r\n"), "bad_answer"),
        (Reply(raw=b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 5_000 + b"\r\n{}"), "bad_answer"),
    ],
)
def test_what_only_looks_like_success_is_a_failure_and_is_counted(tmp_path: Path, reply: Reply, reason: str) -> None:
    with FakeCollector(reply) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        have = settled(made, "a", 1)
        assert have["dropped"] == {reason: 1}
        assert have["delivered"] == 0
        assert have["last_error"]
        assert len(receiver.received) == 1


@pytest.mark.parametrize(
    "reply",
    [
        OK,
        Reply(200, body=b"{}"),
        Reply(202, {}, b""),
        Reply(204, {}, b""),
        Reply(200, {}, b"  \n"),
        Reply(200, body=b'{"partialSuccess":{"rejectedSpans":"0","errorMessage":"a warning"}}'),
        Reply(200, body=b'{"partialSuccess":null}'),
        Reply(200, {"Content-Type": "application/x-protobuf"}, b"\x0a\x00"),
        Reply(200, {"Content-Type": "application/x-protobuf"}, b"\x0a\x04\x12\x02ok"),
        Reply(200, {"Content-Type": "application/json", "Content-Encoding": "gzip"}, gzip.compress(b"{}")),
        Reply(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"),
        Reply(raw=b"HTTP/1.0 200 OK\r\n\r\n{}"),
    ],
)
def test_every_form_of_success_is_success(tmp_path: Path, reply: Reply) -> None:
    with FakeCollector(reply) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        have = settled(made, "a", 1)
        assert (have["delivered"], have["dropped"], have["last_error"]) == (1, {}, None)


def test_a_rejection_of_some_spans_counts_so_many_records_and_shows_the_message_scrubbed(tmp_path: Path) -> None:
    said = json.dumps(
        {"partialSuccess": {"rejectedSpans": 2, "errorMessage": "Bearer dest-TOKEN-0123 may not\nwrite " + "x" * 999}}
    )
    replies = Reply(503, {"Retry-After": "0"}), Reply(200, body=said.encode())
    d = {"headers": {"Authorization": "Bearer dest-TOKEN-0123"}}
    with FakeCollector(*replies) as receiver, running(tmp_path, collector("a", receiver.url, **d)) as made:
        sent(made, 5)
        until(lambda: len(receiver.received) >= 2)
        have = settled(made, "a", 5)
        # A record is three spans here, and a receiver tells of spans: two of them are one record.
        total = len(receiver.received[1:])
        assert have["dropped"] == {"rejected": total}
        assert have["delivered"] == 5 - total
        assert "may not write" in have["last_error"]
        assert "dest-TOKEN" not in have["last_error"]
        assert len(have["last_error"]) < 300


def test_413_halves_the_batch_until_only_the_record_that_is_too_large_is_dropped(tmp_path: Path) -> None:
    class Small(FakeCollector):
        """Refuses every request above 60 kB."""

        def _answer(self, stream: socket.socket) -> None:
            if got := read_request(stream):
                with self._lock:
                    self.received.append(got)
                fits = len(got.text) < 60_000
                stream.sendall((OK if fits else Reply(413, body=b"")).wire())

    with Small() as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        ids = sent(made, 6)
        (large,) = sent(made, 1, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 60_000}]}])
        ids += sent(made, 6)
        have = settled(made, "a", 13)
        assert have["dropped"] == {"http_413": 1}
        assert have["delivered"] == 12
        small = [got for got in receiver.received if len(got.text) < 60_000]
        arrived = [
            next(p["value"]["stringValue"] for p in span["attributes"] if p["key"] == "gen_ai.response.id")
            for got in small
            for span in got.spans()
            if span["name"] == "LLM Generation"
        ]
        assert arrived == ids
        assert large not in arrived


# -- waiting


def test_retry_after_in_seconds_is_waited_for(tmp_path: Path) -> None:
    with FakeCollector(Reply(503, {"Retry-After": "1"}), OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        settled(made, "a", 1)
        assert receiver.received[1].at - receiver.received[0].at >= 0.95


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("120", 120, 120),
        (" 7 ", 7, 7),
        ("soon", 0, 0),
        ("-5", 0, 0),
        ("1.5", 0, 0),
        ("", 0, 0),
        (None, 0, 0),
        ("9" * 400, 0, 0),
        ("Mon, 99 Foo 2026", 0, 0),
    ],
)
def test_retry_after_is_seconds_or_nothing(value: str | None, least: float, most: float) -> None:
    assert least <= retry_after(value) <= most


def test_retry_after_may_be_a_date() -> None:
    assert 90 < retry_after(email.utils.formatdate(time.time() + 100, usegmt=True)) <= 101
    assert retry_after(email.utils.formatdate(time.time() - 100, usegmt=True)) == 0


def test_after_max_elapsed_the_batch_is_dropped_and_counted(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as receiver, running(tmp_path, collector("a", receiver.url), max_elapsed=0.3) as made:
        sent(made, 1)
        assert settled(made, "a", 1)["dropped"] == {"max_elapsed": 1}
        assert len(receiver.received) >= 3
        receiver.script(OK)
        sent(made, 1)
        assert settled(made, "a", 2)["delivered"] == 1


def test_a_retry_after_beyond_max_elapsed_is_not_broken(tmp_path: Path) -> None:
    reply = Reply(429, {"Retry-After": "3600"})
    with FakeCollector(reply) as receiver, running(tmp_path, collector("a", receiver.url), max_elapsed=0.3) as made:
        sent(made, 1)
        assert settled(made, "a", 1)["dropped"] == {"max_elapsed": 1}
        assert len(receiver.received) == 1


def test_waits_grow_and_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_MOST", 10.0)
    with FakeCollector(*[Reply(503)] * 5, OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        settled(made, "a", 1)
        waits = [b.at - a.at for a, b in zip(receiver.received, receiver.received[1:], strict=False)]
        for n, wait in enumerate(waits):
            assert 0.02 * 2**n * 0.5 <= wait <= 0.02 * 2**n * 1.5 + 0.25


def test_a_destination_that_is_down_gets_all_of_it_in_order_when_it_returns(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    with running(tmp_path, collector("a", f"http://127.0.0.1:{port}/v1/traces")) as made:
        ids = sent(made, 500)
        until(lambda: counts(made, "a")["accepted"] == 500)
        until(lambda: counts(made, "a")["last_error"] == "The connection was refused")
        check_ledger(made)
        receiver = FakeCollector()
        receiver._listener.close()
        receiver._listener, receiver.port = socket.create_server(("127.0.0.1", port), backlog=128), port
        with receiver:
            assert settled(made, "a", 500)["delivered"] == 500
            assert receiver.generations() == ids


@pytest.mark.parametrize("reply", [Reply(hang=True), Reply(trickle=0.05), Reply(body=b"{" + b" " * 5_000, trickle=0.02)])
def test_a_hanging_or_trickling_answer_ends_at_the_total_timeout(tmp_path: Path, reply: Reply) -> None:
    with FakeCollector(reply, OK) as receiver, running(tmp_path, collector("a", receiver.url), timeout=0.5) as made:
        begun = time.monotonic()
        ids = sent(made, 1)
        until(lambda: counts(made, "a")["last_error"])
        assert 0.4 < time.monotonic() - begun < 1.0
        assert settled(made, "a", 1)["delivered"] == 1
        assert counts(made, "a")["last_error"] == "No complete answer within 0.5 s"
        assert receiver.generations() == ids * 2


def test_a_receiver_that_does_not_read_ends_at_the_total_timeout(tmp_path: Path) -> None:
    noise = [{"role": "user", "content": [{"type": "text", "text": os.urandom(6_000_000).hex()}]}]
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        url = f"http://127.0.0.1:{deaf.getsockname()[1]}/v1/traces"
        with running(tmp_path, collector("a", url), timeout=0.5, queue_max_bytes=10**9) as made:
            sent(made, 1, messages=noise)
            until(lambda: counts(made, "a")["last_error"] == "No complete answer within 0.5 s", 20)
            assert counts(made, "a")["queued"] == 1


@pytest.mark.parametrize(
    "reply",
    [
        Reply(reset=True),
        Reply(raw=b""),
        Reply(raw=b"HTTP/1.1 20"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Le"),
        Reply(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}"),
    ],
)
def test_a_connection_cut_before_the_answer_is_whole_is_tried_again(tmp_path: Path, reply: Reply) -> None:
    with FakeCollector(reply, OK) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        ids = sent(made, 1)
        assert settled(made, "a", 1)["delivered"] == 1
        assert receiver.generations() == ids * 2
        assert receiver.received[0].document == receiver.received[1].document


# -- one destination harms no other, and none harms a request


def test_a_hanging_destination_delays_no_other(tmp_path: Path, receiver: FakeCollector) -> None:
    with FakeCollector(Reply(hang=True)) as hanging, FakeCollector(Reply(503)) as busy:
        names = {"ok": receiver.url, "hanging": hanging.url, "busy": busy.url}
        with running(tmp_path, *(collector(name, url) for name, url in names.items())) as made:
            begun = time.monotonic()
            ids = sent(made, 300)
            settled(made, "ok", 300)
            assert time.monotonic() - begun < 5
            assert receiver.generations() == ids
            for name in ("hanging", "busy"):
                assert counts(made, name)["queued"] == 300
            check_ledger(made)


def test_overflow_drops_the_oldest_by_number_and_is_counted_exactly(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as receiver, running(tmp_path, collector("a", receiver.url), queue_max_items=50) as made:
        ids = sent(made, 400)
        have = until(lambda: (c := counts(made, "a"))["accepted"] == 400 and c)
        assert have["queued"] <= 50
        receiver.script(OK)
        have = settled(made, "a", 400)
        assert have["delivered"] + have["dropped"]["queue_full"] == 400
        kept = [one for one in dict.fromkeys(receiver.generations()) if ids.index(one) >= 350]
        assert kept == ids[350:]


def test_overflow_drops_the_oldest_by_size(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as receiver, running(tmp_path, collector("a", receiver.url), queue_max_bytes=60_000) as made:
        sent(made, 100)
        have = until(lambda: (c := counts(made, "a"))["accepted"] == 100 and c)
        assert 1 <= have["queued"] < 20
        assert have["queued"] + have["dropped"]["queue_full"] == 100


def test_what_made_room_while_it_was_on_the_wire_and_arrived_counts_as_delivered(tmp_path: Path) -> None:
    with (
        FakeCollector(Reply(wait=0.5), OK) as receiver,
        running(tmp_path, collector("a", receiver.url), queue_max_items=2) as made,
    ):
        first = sent(made, 1)
        until(lambda: receiver.received)
        rest = sent(made, 10)
        until(lambda: counts(made, "a")["dropped"].get("queue_full") == 9)
        assert counts(made, "a")["queued"] == 2
        have = settled(made, "a", 11)
        assert have["dropped"] == {"queue_full": 8}
        assert receiver.generations() == first + rest[-2:]


def test_a_record_larger_than_the_whole_queue_is_dropped_alone(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url), queue_max_bytes=50_000) as made:
        sent(made, 1, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 60_000}]}])
        (good,) = sent(made, 1)
        have = settled(made, "a", 2)
        assert have["dropped"] == {"too_large": 1}
        assert receiver.generations() == [good]


def test_a_record_that_cannot_be_encoded_is_counted_and_its_neighbours_arrive(
    tmp_path: Path, receiver: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    def picky(given: Any, *more: Any) -> Any:
        if given["user"] == "poison":
            raise KeyError("SECRET-PROMPT")
        return genuine(given, *more)

    genuine = delivery.fragment
    monkeypatch.setattr(delivery, "fragment", picky)
    with running(tmp_path, collector("a", receiver.url)) as made:
        before, _, after = sent(made, 1), sent(made, 1, user="poison"), sent(made, 1)
        assert settled(made, "a", 3)["dropped"] == {"encode_error": 1}
        assert receiver.generations() == before + after


@pytest.mark.parametrize(
    "odd", [{"messages": 5}, {"response": {"content": 5}}, {"attempts": [None]}, {"trace": []}, {"ts_ms": None}]
)
def test_a_record_of_another_shape_is_counted_and_raises_nothing(
    tmp_path: Path, receiver: FakeCollector, odd: dict[str, Any]
) -> None:
    with running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1, **odd)
        (good,) = sent(made, 1)
        settled(made, "a", 2)
        assert receiver.generations()[-1] == good


def test_the_sink_never_waits_even_while_the_database_is_locked(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 1)
        settled(made, "a", 1)
        other = sqlite3.connect(made.settings.database, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        begun = time.monotonic()
        sent(made, 500)
        assert time.monotonic() - begun < 0.5
        other.execute("ROLLBACK")
        other.close()
        assert settled(made, "a", 501, 20)["delivered"] == 501


def test_what_no_longer_fits_into_memory_while_the_disk_is_stuck_is_counted(
    tmp_path: Path, receiver: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "INBOX_ITEMS", 20)
    with running(tmp_path, collector("a", receiver.url)) as made:
        other = sqlite3.connect(made.settings.database, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        sent(made, 1)
        assert made._delivery
        (writer,) = made._delivery._writers.values()
        until(lambda: not writer._inbox)  # the writer holds the first one and waits for the disk
        sent(made, 50)
        other.execute("ROLLBACK")
        other.close()
        have = settled(made, "a", 51, 20)
        assert have["dropped"]["queue_full"] == 30


def test_a_full_disk_loses_nothing_that_was_accepted_and_delivery_goes_on(tmp_path: Path) -> None:
    script = """
import resource, signal, sys, time
sys.path[:0] = sys.argv[1:3]
import broadcast
from broadcast_records import to_bytes, record
from broadcast_runs import collector, configured, counts, check_ledger
from pathlib import Path
made = broadcast.Broadcast(configured(Path(sys.argv[3]), collector("a", sys.argv[4])))
made.sink(record()); time.sleep(0.5)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
text = [{"role": "user", "content": [{"type": "text", "text": "x" * 20_000}]}]
for _ in range(30): made.sink(record(messages=text))
time.sleep(1)
before = counts(made, "a")["accepted"]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
deadline = time.monotonic() + 15
while counts(made, "a")["delivered"] < 31 and time.monotonic() < deadline: time.sleep(0.05)
check_ledger(made)
print(before, counts(made, "a")["accepted"], counts(made, "a")["delivered"])
made.close(1)
"""
    with FakeCollector() as receiver:
        command = [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests"), str(tmp_path), receiver.url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    before, accepted, delivered = map(int, done.stdout.split())
    assert before < 31, "the disk was not full in this run"
    assert (accepted, delivered) == (31, 31)
    assert "xxxx" not in done.stderr


def test_a_closed_broadcast_takes_records_silently(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("a", receiver.url)) as made:
        pass
    sent(made, 1)
    assert receiver.received == []


# -- ends and beginnings


def test_close_delivers_what_it_can_and_leaves_the_rest(tmp_path: Path) -> None:
    with FakeCollector(Reply(wait=0.1)) as receiver, FakeCollector(Reply(hang=True)) as hanging:
        made = Broadcast(configured(tmp_path, collector("a", receiver.url), collector("b", hanging.url)))
        ids = sent(made, 100)
        begun = time.monotonic()
        made.close(2)
        assert time.monotonic() - begun < 3.5
        assert receiver.generations() == ids
        hanging.script(OK)
        with running(tmp_path, collector("a", receiver.url), collector("b", hanging.url)) as again:
            assert settled(again, "b", 100)["delivered"] == 100
            assert counts(again, "a")["delivered"] == 100
        assert list(dict.fromkeys(hanging.generations())) == ids


def test_close_is_bounded_while_every_destination_hangs(tmp_path: Path) -> None:
    with FakeCollector(Reply(hang=True)) as hanging:
        made = Broadcast(configured(tmp_path, *(collector(f"d{n}", hanging.url) for n in range(5)), timeout=60))
        sent(made, 10)
        until(lambda: len(hanging.received) == 5)
        begun = time.monotonic()
        made.close(0.5)
        assert time.monotonic() - begun < 2
        again = Broadcast(configured(tmp_path, *(collector(f"d{n}", hanging.url) for n in range(5))), start=False)
        assert all(have["queued"] == 10 for have in again.stats()["destinations"].values())
        again.close(0)


def test_close_is_bounded_while_resolvers_and_the_disk_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(30) and [])
    made = Broadcast(configured(tmp_path, *(collector(f"d{n}", f"http://h{n}.example/") for n in range(10)), timeout=60))
    sent(made, 1)
    until(lambda: sum(t.name == "broadcast-resolve" for t in threading.enumerate()) == 10)
    other = sqlite3.connect(made.settings.database, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    sent(made, 1)
    begun = time.monotonic()
    made.close(0.5)
    assert time.monotonic() - begun < 6
    other.close()
    ended.set()


def test_no_child_process_is_left_behind(tmp_path: Path, receiver: FakeCollector) -> None:
    rules = {"groups": [{"rules": [{"field": "input", "operator": "regex", "value": "Hello"}]}]}
    with running(tmp_path, collector("a", receiver.url, filter_rules=rules)) as made:
        sent(made, 1)
        settled(made, "a", 1)
        assert made._delivery
        (writer,) = made._delivery._writers.values()
        child = writer._search._child
        assert child
        assert child.poll() is None
    assert child.poll() is not None


CHILD = """
import os, random, sys, time
sys.path[:0] = sys.argv[1:3]
import broadcast
from broadcast_records import to_bytes, record
from broadcast_runs import collector, configured
from pathlib import Path
broadcast.delivery.BACKOFF_FIRST = 0.05
made = broadcast.Broadcast(configured(Path(sys.argv[3]), collector("a", sys.argv[4]), collector("b", sys.argv[5])))
os.write(1, b"ready\\n")
while True:
    one = record(generation_id=f"gen-1790606294-{os.urandom(10).hex()}")
    made.sink(one)
    os.write(1, f"{one['generation_id']} {time.monotonic()}\\n".encode())
    time.sleep(random.uniform(0, 0.004))
"""


def test_kill_9_at_any_moment_loses_no_accepted_record(tmp_path: Path) -> None:
    safe: list[str] = []
    with FakeCollector() as quick, FakeCollector(Reply(wait=0.05), Reply(503), Reply(wait=0.02)) as slow:
        for round_ in range(8):
            command = [sys.executable, "-c", CHILD, str(ROOT), str(ROOT / "tests"), str(tmp_path), quick.url, slow.url]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
                assert child.stdout
                assert child.stdout.readline() == "ready\n"
                time.sleep(0.15 + 0.03 * round_)
                killed = time.monotonic()
                child.kill()
                lines = [line.split() for line in child.stdout.read().splitlines()]
            safe += [line[0] for line in lines if len(line) == 2 and float(line[1]) < killed - 0.1]
        slow.script(OK)
        with running(tmp_path, collector("a", quick.url), collector("b", slow.url)) as made:
            for name, receiver in (("a", quick), ("b", slow)):
                have = settled(made, name, counts(made, name)["accepted"], 20)
                arrived = dict.fromkeys(receiver.generations())
                assert not set(safe) - set(arrived)
                assert have["delivered"] == have["accepted"] == len(arrived)
                order = [one for one in arrived if one in set(safe)]
                assert order == safe
    assert len(safe) > 100


def test_a_destination_that_left_the_file_takes_its_queue_with_it(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as busy, FakeCollector() as receiver:
        with running(tmp_path, collector("old", busy.url), collector("kept", receiver.url)) as made:
            sent(made, 3)
            settled(made, "kept", 3)
        with running(tmp_path, collector("kept", receiver.url)) as again:
            assert counts(again, "kept")["delivered"] == 3
            with sqlite3.connect(again.settings.database) as db:
                assert db.execute("SELECT COUNT(*) FROM queue").fetchone() == (0,)
            db.close()


def test_a_destination_that_leaves_while_records_flow_leaves_nothing_behind(tmp_path: Path, receiver: FakeCollector) -> None:
    with FakeCollector(Reply(wait=0.05)) as slow:
        old = collector("old", slow.url)
        with running(tmp_path, old, collector("kept", receiver.url)) as made:
            sending = threading.Thread(target=lambda: sent(made, 300))
            sending.start()
            until(lambda: slow.received)
            made.reload(configured(tmp_path, collector("kept", receiver.url)))
            sending.join()
            settled(made, "kept", 300)
            made.reload(configured(tmp_path, old, collector("kept", receiver.url)))
            have = counts(made, "old")
            assert (have["accepted"], have["delivered"], have["queued"], have["dropped"]) == (0, 0, 0, {})
            sent(made, 2)
            assert settled(made, "old", 2)["delivered"] == 2


def test_a_database_of_before_goes_on(tmp_path: Path, receiver: FakeCollector) -> None:
    (tmp_path / "state").mkdir()
    with sqlite3.connect(tmp_path / "state" / "broadcast.db") as db:
        db.execute("CREATE TABLE payload (id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL)")
    db.close()
    with running(tmp_path, collector("a", receiver.url)) as made:
        sent(made, 2)
        assert settled(made, "a", 2)["delivered"] == 2


def test_a_reload_changes_destinations_without_losing_anything(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as busy, FakeCollector() as receiver, running(tmp_path, collector("a", busy.url)) as made:
        ids = sent(made, 5)
        until(lambda: counts(made, "a")["last_error"])
        made.reload(configured(tmp_path, collector("a", receiver.url)))
        settled(made, "a", 5)
        assert receiver.generations() == ids
        with pytest.raises(ValueError, match="database: can only be changed by a restart"):
            made.reload(Settings(database="elsewhere.db"))


@pytest.mark.parametrize("content", [b"not a database, but long enough to look like something" * 10, None])
def test_a_database_that_cannot_be_used_is_told_at_the_start(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(content) if content else path.mkdir()
    with pytest.raises(ValueError, match=r"^database: .* cannot be used"):
        Broadcast(Settings(enabled=True, database=str(path), destinations=(collector("a", "http://127.0.0.1:9/v1/traces"),)))


# -- files


def test_a_file_gets_one_otlp_request_per_line_readable_by_us_alone(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with running(tmp_path, Destination("f", "file", path=str(path))) as made:
        sent(made, 1)
        settled(made, "f", 1)
        sent(made, 5)
        settled(made, "f", 6)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = path.read_text().splitlines()
    assert sum(len(json.loads(line)["resourceSpans"]) for line in lines) == 6 * 3


def test_a_torn_last_line_is_ended_before_the_next(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(b'{"resourceSpans":[{"resou')
    with running(tmp_path, Destination("f", "file", path=str(path))) as made:
        made.sink(RECORD)
        settled(made, "f", 1)
    lines = path.read_bytes().splitlines()
    assert len(lines) == 2
    assert json.loads(lines[1]) == encode(RECORD, privacy=False)


def test_a_file_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    folder = tmp_path / "no folder"
    folder.touch()
    with running(tmp_path, Destination("f", "file", path=str(folder / "traces.jsonl"))) as made:
        sent(made, 2)
        until(lambda: counts(made, "f")["last_error"])
        assert counts(made, "f")["last_error"].startswith("The file could not be written: ")
        folder.unlink()
        assert settled(made, "f", 2)["delivered"] == 2


def test_a_full_file_system_leaves_no_torn_line(tmp_path: Path) -> None:
    with running(tmp_path, Destination("f", "file", path="/dev/full")) as made:
        sent(made, 1)
        until(lambda: counts(made, "f")["last_error"] == "The file could not be written: No space left on device")
        assert counts(made, "f")["queued"] == 1


def test_replay_sends_every_line_in_order_and_counts(tmp_path: Path, receiver: FakeCollector) -> None:
    path = tmp_path / "traces.jsonl"
    with running(tmp_path, Destination("f", "file", path=str(path))) as made:
        ids = []
        for n in range(3):
            ids += sent(made, 2)
            settled(made, "f", 2 * n + 2)
    lines = len(path.read_bytes().splitlines())
    path.write_bytes(b'{"torn":\n' + path.read_bytes() + b'{"resourceSpans"')
    receiver.script(Reply(503), OK)
    told = replay(str(path), configured(tmp_path, collector("a", receiver.url), enabled=False), "a")
    assert told == {"lines": lines + 2, "delivered": lines, "dropped": {"not_otlp": 2}, "last_error": None}
    assert list(dict.fromkeys(receiver.generations())) == ids
    with pytest.raises(ValueError, match="there is no destination 'b'"):
        replay(str(path), configured(tmp_path, collector("a", receiver.url)), "b")


def test_replay_reports_what_the_destination_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(to_bytes(encode(RECORD, privacy=False)) + b"\n")
    with FakeCollector(Reply(401)) as receiver:
        told = replay(str(path), configured(tmp_path, collector("a", receiver.url)), "a")
    assert told == {"lines": 1, "delivered": 0, "dropped": {"http_401": 1}, "last_error": "HTTP 401"}


def test_replay_cuts_a_line_that_a_destination_takes_in_parts_only(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    with running(tmp_path, Destination("f", "file", path=str(path))) as made:
        ids = sent(made, 40)
        settled(made, "f", 40)
        assert len(path.read_bytes().splitlines()) < 40

    def one_at_a_time(received: Received) -> Reply:
        return OK if len({span["traceId"] for span in received.spans()}) == 1 else Reply(413)

    with FakeCollector() as receiver:
        receiver.answer_with(one_at_a_time)
        told = replay(str(path), configured(tmp_path, collector("later", receiver.url)), "later")
        assert (told["delivered"], told["dropped"]) == (40, {})
        taken = [got for got in receiver.received if one_at_a_time(got) is OK]
        assert [got.document["resourceSpans"][0]["resource"]["attributes"][1]["value"]["stringValue"] for got in taken] == ids


def test_replay_into_the_file_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "traces.jsonl"
    path.write_bytes(to_bytes(encode(RECORD, privacy=False)) + b"\n")
    with pytest.raises(ValueError, match="writes to this very file"):
        replay(str(path), configured(tmp_path, Destination("f", "file", path=str(path))), "f")
    assert len(path.read_bytes().splitlines()) == 1


def test_replay_into_a_private_destination_takes_private_lines_only(tmp_path: Path, receiver: FakeCollector) -> None:
    path = tmp_path / "traces.jsonl"
    kinds = [(RECORD, False), (RECORD, True), (failed(), True), (failed(messages=[]), False)]
    path.write_bytes(b"\n".join(to_bytes(encode(one, privacy=private)) for one, private in kinds))
    private = collector("a", receiver.url, privacy_mode=True)
    told = replay(str(path), configured(tmp_path, private), "a")
    assert told["dropped"] == {"content": 2}
    assert told["delivered"] == 2
    assert GENERATION_ID in receiver.generations()
    assert b"Hello!" not in b"".join(got.text for got in receiver.received)
    assert b"upstream said no" not in b"".join(got.text for got in receiver.received)


def test_memory_stays_bounded_against_an_endless_answer(tmp_path: Path) -> None:
    class Endless(FakeCollector):
        def _answer(self, stream: socket.socket) -> None:
            stream.recv(1 << 20)
            stream.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
            while True:
                stream.sendall(b" " * 65536)

    with Endless() as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        sent(made, 1)
        assert settled(made, "a", 1)["dropped"] == {"bad_answer": 1}
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32_000
