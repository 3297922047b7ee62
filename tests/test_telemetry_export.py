"""What reaches a collector, whatever the collector does; and what it costs those who do not wait for it."""

from __future__ import annotations

import gzip
import logging
import os
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
from otlp_collector import CLOSE, HANG, OK, RESET, OtlpCollector, Step, partial, reply, until
from router_process import free_port
from telemetry_records import a_record, a_stream

import telemetry
from telemetry import Settings, Telemetry

Start = Callable[..., Telemetry]
PATHS = {"spans": "/v1/traces", "metrics": "/v1/metrics", "logs": "/v1/logs"}
log = logging.getLogger("opensourcellmrouter.test")


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    running = OtlpCollector()
    yield running
    running.close()
    assert running.faults == []


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """`start(collector.url, sample_ratio=0.5)` is telemetry that exports at once; nothing of it is left in the end."""
    monkeypatch.setattr(telemetry.Lane, "LINGER", 0.01)
    monkeypatch.setattr(telemetry.Meters, "LINGER", 0.01)
    monkeypatch.setattr(telemetry, "METRIC_SECONDS", 0.1)
    monkeypatch.setattr(telemetry, "EXCHANGE_SECONDS", 2.0)
    monkeypatch.setattr(telemetry, "BACKOFF_SECONDS", 0.01)
    started: list[Telemetry] = []

    def factory(url: str, **settings: Any) -> Telemetry:
        started.append(telemetry.start(Settings(enabled=True, otlp_endpoint=url, **settings), "0.1"))
        return started[-1]

    yield factory
    for one in started:
        one.flush_and_stop(1.0)
    until(lambda: not left_behind(), 2, "threads of telemetry")
    assert not [h for h in logging.getLogger("opensourcellmrouter").handlers if h.__class__.__module__ == "telemetry"]


def left_behind() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith("telemetry-")]


def finish(to: Telemetry, count: int = 1, **changes: Any) -> None:
    """So many requests, each of four spans, begin and end."""
    for number in range(count):
        to.sink({"type": "start", "id": number, "ts_ms": 0, "model": "m", "in_flight": 1})
        trace = to.begin(None, None)
        to.sink(a_record(**{"_trace": trace, "trace_id": trace.trace_id, **changes}))


def settled(to: Telemetry, spans: int) -> dict[str, int]:
    """The span counters once so many spans have met their fate."""
    return until(lambda: (s := to.stats()["spans"]) and sum(s.values()) >= spans and s, 60, f"{spans} spans, {to.stats()}")


# --- when all is well


def test_a_request_becomes_spans_metrics_and_log_lines(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url, service_name="mine", resource={"deployment.environment": "test"})
    trace = to.begin(None, None)
    telemetry.enter(trace)
    log.info("hello %s", "there")
    telemetry.leave()
    to.sink({"type": "start"})
    to.sink(a_stream(_trace=trace))
    spans = until(lambda: len(collector.spans()) == 5 and collector.spans())
    assert {s["trace_id"] for s in spans} == {trace.trace_id}
    (line,) = until(collector.log_records)
    assert (line["body"], line["trace_id"], line["span_id"]) == ("hello there", trace.trace_id, trace.span_id)
    until(lambda: collector.metrics().get("router.requests"))
    for item in (spans[0], line):
        assert item["resource"]["service.name"] == "mine"
        assert item["resource"]["service.version"] == "0.1"
        assert item["resource"]["deployment.environment"] == "test"
    stats = to.stats()
    assert (stats["enabled"], stats["spans"], stats["last_error"]) == (True, {"exported": 5, "failed": 0, "dropped": 0}, None)
    assert stats["logs"] == {"exported": 1, "failed": 0, "dropped": 0}


def test_connections_are_kept_and_one_that_the_collector_closed_is_opened_anew(start: Start, collector: OtlpCollector) -> None:
    to = start(
        collector.url,
    )
    for number in range(1, 4):
        collector.script("/v1/traces", [OK, RESET] if number == 2 else OK)
        finish(to)
        settled(to, 4 * number)
    assert to.stats()["spans"] == {"exported": 12, "failed": 0, "dropped": 0}
    assert to.stats()["last_error"] is None


def test_lone_http_requests_and_calls_are_spans_of_their_own(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url)
    trace = to.begin("00-12345678901234567890123456789012-1234567890123456-01", None)
    to.http("GET", "/v1/models", 200, time.time_ns(), 1.5, trace, "127.0.0.1")
    to.http("BREW", "", 500, time.time_ns(), 1.5, to.begin(None, None), "")
    to.call(
        kind="list_models",
        provider="up",
        start_ns=time.time_ns(),
        duration_ms=3.0,
        server_address="host",
        server_port=80,
        status=200,
    )
    failed: dict[str, Any] = {"error": "cannot connect", "error_type": "connection_refused"}
    ids: dict[str, Any] = {"trace": trace, "span_id": trace.child_id()}
    to.call(kind="model_capabilities", provider="up", start_ns=time.time_ns(), duration_ms=3.0, **ids, **failed)
    models, brew, listed, child = until(lambda: len(collector.spans()) == 4 and collector.spans())
    assert (models["name"], models["kind"], models["parent_span_id"]) == ("request", "server", "1234567890123456")
    assert models["attributes"]["http.route"] == "/v1/models"
    assert models["end"] - models["start"] == 1_500_000
    assert (brew["attributes"]["http.request.method"], brew["status"]["code"]) == ("_OTHER", "error")
    assert "http.route" not in brew["attributes"]
    assert (listed["name"], listed["kind"], listed["parent_span_id"]) == ("provider.http", "client", None)
    assert (listed["attributes"]["kind"], listed["attributes"]["server.port"]) == ("list_models", 80)
    assert (child["trace_id"], child["parent_span_id"]) == (trace.trace_id, trace.span_id)
    assert (child["status"], child["attributes"]["error.type"]) == (
        {"code": "error", "message": "cannot connect"},
        "connection_refused",
    )


# --- which traces


def test_an_unsampled_trace_leaves_no_span_but_is_counted(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url, sample_ratio=0.0)
    finish(to, 10)
    to.http("GET", "/v1/models", 200, time.time_ns(), 1.5, to.begin(None, None), "127.0.0.1")
    to.flush_and_stop(2)
    assert collector.spans() == []
    assert collector.metrics()["router.requests"]["points"][0]["value"] == 10


def test_a_ratio_takes_whole_traces(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url, sample_ratio=0.5)
    finish(to, 200)
    to.flush_and_stop(2)
    traces = {s["trace_id"] for s in collector.spans()}
    assert 50 < len(traces) < 150
    assert len(collector.spans()) == 4 * len(traces)
    assert collector.metrics()["router.requests"]["points"][0]["value"] == 200


def test_a_record_without_ids_is_continued_from_its_headers(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url, sample_ratio=0.0)
    to.sink(a_record(traceparent="00-12345678901234567890123456789012-1234567890123456-01"))
    spans = until(collector.spans)
    assert spans[0]["trace_id"] == "12345678901234567890123456789012"


def test_content_leaves_the_process_only_if_asked_for(start: Start, collector: OtlpCollector) -> None:
    said: dict[str, Any] = {"messages": [{"role": "user", "content": [{"type": "text", "text": "SECRET-PROMPT"}]}]}
    finish(start(collector.url), **said)
    until(collector.spans)
    assert b"SECRET-PROMPT" not in collector.everything()
    finish(start(collector.url, capture_content=True), **said)
    until(lambda: b"SECRET-PROMPT" in collector.everything())


# --- an answer that is no success

FAILURES: dict[str, bytes | list[Step]] = {
    "a redirect": reply(302, b"", Location="/elsewhere"),
    "a permanent redirect": reply(308, b"", Location="http://127.0.0.1:1/"),
    "a web page": reply(200, b"<html><body>Please log in</body></html>", "text/html; charset=utf-8"),
    "a web page that claims to be something else": reply(200, b"<!DOCTYPE html><html></html>"),
    "garbage": reply(200, b"\x00\xff\xfe garbage"),
    "words": reply(200, b"accepted", "text/plain"),
    "garbage that happens to be protobuf": reply(200, b"xy"),
    "broken JSON": reply(200, b'{"partialSuccess": ', "application/json"),
    "JSON of another kind": reply(200, b"[1, 2]", "application/json"),
    "deep JSON": reply(200, b"[" * 60_000, "application/json"),
    "a gzip body nobody asked for": reply(200, gzip.compress(b"x" * 10_000_000), Content_Encoding="gzip"),
    "a body over 64 KiB": reply(200, b"x" * 65_537),
    "an endless body": [b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 65_536] * 3, HANG],
    "a body that trickles": [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", *[b"x", 0.1] * 50],
    "a body that never comes": [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n", HANG],
    "a body shorter than it says": [b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nxx", RESET],
    "another protocol": [b"SSH-2.0-OpenSSH_9.2\r\n", HANG],
    "bad request": reply(400, b""), "unauthorized": reply(401), "forbidden": reply(403), "not found": reply(404),
    "request timeout": reply(408), "server error": reply(500), "not implemented": reply(501), "too large": reply(413),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILURES)
def test_an_answer_that_is_no_success_is_counted_and_not_repeated(
    case: str, start: Start, collector: OtlpCollector, caplog: pytest.LogCaptureFixture
) -> None:
    collector.script("/v1/traces", FAILURES[case])
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 0, "failed": 4, "dropped": 0}
    assert to.stats()["last_error"].startswith(f"{collector.url}/v1/traces: ")
    assert [r.path for r in collector.received].count("/v1/traces") == 1
    assert [r.levelname for r in caplog.records if r.name == "opensourcellmrouter.telemetry"] == ["WARNING"]
    finish(to)
    assert settled(to, 8) == {"exported": 4, "failed": 4, "dropped": 0}


@pytest.mark.parametrize(
    "answer",
    [reply(200), reply(202), [b"HTTP/1.1 204 No Content\r\n\r\n"], reply(200, b"\n\x00"), reply(200, b"{}", "application/json"),
     reply(200, b'{"partialSuccess":null}', "application/json"), reply(200, b"", "text/html"),
     [b"HTTP/1.1 100 Continue\r\n\r\n", OK], [b"HTTP/1.0 200 OK\r\nConnection: close\r\n\r\n", CLOSE],
     [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: application/x-protobuf\r\n\r\n", b"0\r\n\r\n"]],
)  # fmt: skip
def test_every_kind_of_empty_answer_is_a_success(answer: bytes | list[Step], start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", answer)
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 4, "failed": 0, "dropped": 0}
    assert to.stats()["last_error"] is None


@pytest.mark.parametrize("signal", PATHS)
def test_what_a_collector_rejects_is_counted_as_failed_and_its_words_are_told(
    signal: str, start: Start, collector: OtlpCollector
) -> None:
    telemetry.keep_secret("dest-TOKEN-in-partial")
    collector.script(PATHS[signal], partial(PATHS[signal], 1, "no room, dest-TOKEN-in-partial"))
    to = start(collector.url)
    log.info("one")
    log.info("two")
    finish(to)
    stats = until(lambda: (s := to.stats())[signal]["failed"] and s)
    assert stats[signal]["failed"] == 1
    assert stats[signal]["exported"] >= 1
    assert stats["last_error"] == f"{collector.url}{PATHS[signal]}: partial success, 1 rejected: no room, [redacted]"


def test_partial_success_as_json_is_understood(start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", reply(200, b'{"partialSuccess":{"rejectedSpans":"3","errorMessage":"x"}}', "application/json"))
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 1, "failed": 3, "dropped": 0}


def test_a_remark_without_rejection_is_a_success_that_is_told(start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", partial("/v1/traces", 0, "deprecated field"))
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 4, "failed": 0, "dropped": 0}
    assert "deprecated field" in to.stats()["last_error"]


def test_what_a_collector_says_when_it_refuses_is_told(start: Start, collector: OtlpCollector) -> None:
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    collector.script("/v1/traces", reply(400, Status(code=3, message="invalid length for ID").SerializeToString()))
    to = start(collector.url)
    finish(to)
    settled(to, 4)
    assert to.stats()["last_error"] == f"{collector.url}/v1/traces: HTTP 400: invalid length for ID"


# --- a collector that is busy or away


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_a_busy_collector_is_asked_again(status: int, start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", reply(status), reply(status, Retry_After="soon"), reply(status))
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 4, "failed": 0, "dropped": 0}
    bodies = [r.body for r in collector.received if r.path == "/v1/traces"]
    assert len(bodies) == 4
    assert len(set(bodies)) == 1


@pytest.mark.parametrize("after", ["1", "a date"])
def test_a_collector_that_names_a_time_is_not_asked_before(after: str, start: Start, collector: OtlpCollector) -> None:
    value = formatdate(time.time() + 2, usegmt=True) if after == "a date" else after
    collector.script("/v1/traces", reply(503, Retry_After=value))
    to = start(collector.url)
    finish(to)
    assert settled(to, 4)["exported"] == 4
    first, second = (r.at for r in collector.received if r.path == "/v1/traces")
    assert 0.9 < second - first < 4


def test_a_time_beyond_all_patience_costs_the_batch_and_is_heeded_all_the_same(start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", reply(503, Retry_After="3600"))
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 0, "failed": 4, "dropped": 0}
    finish(to)
    finish(to)
    to.flush_and_stop(1)  # the last chance is taken all the same
    assert to.stats()["spans"] == {"exported": 8, "failed": 4, "dropped": 0}


@pytest.mark.parametrize("case", [[RESET], [b"HTTP/1.1 2", RESET], [HANG], [b"HTTP/1.1 200 OK\r\n", *[b"x", 0.2] * 20]])
def test_no_answer_is_tried_again(case: list[Step], start: Start, collector: OtlpCollector) -> None:
    collector.script("/v1/traces", case, case)
    to = start(collector.url)
    finish(to)
    assert settled(to, 4) == {"exported": 4, "failed": 0, "dropped": 0}


def test_what_happens_while_the_collector_is_down_arrives_when_it_is_back(start: Start) -> None:
    port = free_port()
    to = start(f"http://127.0.0.1:{port}")
    finish(to, 500)
    until(lambda: to.stats()["last_error"])
    assert "Connection refused" in to.stats()["last_error"]
    back = OtlpCollector(port)
    assert settled(to, 2000) == {"exported": 2000, "failed": 0, "dropped": 0}
    assert len({s["trace_id"] for s in back.spans()}) == 500
    to.flush_and_stop(2)
    assert back.metrics()["router.requests"]["points"][0]["value"] == 500
    assert back.faults == []
    back.close()


def test_a_collector_that_stays_away_costs_the_batch_in_the_end(
    start: Start, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(telemetry, "PATIENCE_SECONDS", 0.2)
    to = start(f"http://127.0.0.1:{free_port()}")
    finish(to, 3)
    assert settled(to, 12) == {"exported": 0, "failed": 12, "dropped": 0}
    assert len([r for r in caplog.records if r.name == "opensourcellmrouter.telemetry"]) == 1


def test_a_batch_that_is_too_large_is_halved(start: Start, collector: OtlpCollector) -> None:
    go_on = threading.Event()
    collector.script("/v1/traces", [go_on, OK], reply(413), reply(413))
    to = start(collector.url)
    finish(to)
    until(lambda: any(received.path == "/v1/traces" for received in collector.received))
    finish(to, 8)  # wait behind the first one and travel together
    go_on.set()
    assert settled(to, 36) == {"exported": 36, "failed": 0, "dropped": 0}
    assert len({s["trace_id"] for s in collector.spans()}) == 9


def test_a_record_that_cannot_be_told_costs_itself_only(
    start: Start, collector: OtlpCollector, caplog: pytest.LogCaptureFixture
) -> None:
    to = start(collector.url)
    good, bad = to.begin(None, None), to.begin(None, None)
    to._spans.put((bad, [{"name": "broken"}]), 1)
    to.sink(a_record(_trace=good))
    assert settled(to, 5) == {"exported": 4, "failed": 1, "dropped": 0}


# --- bounds


def test_a_full_queue_loses_the_oldest_and_counts_them(
    start: Start, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry.Lane, "ITEMS", 50)
    collector.script("/v1/traces", [0.4, OK])
    to = start(collector.url)
    finish(to)
    until(lambda: collector.received)
    last = [to.begin(None, None) for _ in range(50)]
    finish(to, 100)
    for trace in last:
        to.sink(a_record(_trace=trace))
    assert settled(to, 604) == {"exported": 204, "failed": 0, "dropped": 400}
    assert {s["trace_id"] for s in collector.spans()} >= {t.trace_id for t in last}
    to.flush_and_stop(2)
    assert collector.metrics()["router.requests"]["points"][0]["value"] == 151  # the metrics know of all of them


def test_the_queue_is_bounded_in_bytes_too(start: Start, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.Lane, "BYTES", 1_000_000)
    collector.script("/v1/traces", [0.4, OK])
    to = start(collector.url, capture_content=True)
    finish(to)
    until(lambda: collector.received)
    finish(to, 20, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 100_000}]}])
    assert to._spans._bytes <= 1_000_000
    stats = settled(to, 84)
    assert stats["dropped"] >= 40
    assert sum(stats.values()) == 84


def test_a_queue_keeps_no_prompt_that_will_not_be_sent(start: Start) -> None:
    to = start(f"http://127.0.0.1:{free_port()}")
    finish(to, messages=[{"role": "user", "content": [{"type": "text", "text": "x" * 100_000}]}])
    assert to._spans._bytes + 10_000 * (not to._spans._queue) <= 10_000


def test_nobody_waits_for_a_collector_that_hangs(start: Start, collector: OtlpCollector) -> None:
    collector.answer_always([HANG])
    to = start(collector.url)
    finish(to)
    until(lambda: collector.received)
    traces = [to.begin(None, None) for _ in range(500)]
    records = [a_record(_trace=t) for t in traces]
    slowest, began = 0.0, time.monotonic()
    for record in records:
        before = time.monotonic()
        to.sink(record)
        log.warning("a line")
        slowest = max(slowest, time.monotonic() - before)
    assert time.monotonic() - began < 1.0
    assert slowest < 0.3


# --- the end


@pytest.mark.parametrize(
    "answer",
    [[HANG], [b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", *[b"x", 0.1] * 200], [RESET], [*[b"H", 0.1] * 200],
     reply(503, Retry_After="100"), reply(503), reply(302), reply(429, Retry_After="garbage")],
)  # fmt: skip
def test_the_end_comes_in_time_whatever_the_collector_does(
    answer: bytes | list[Step], start: Start, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry, "EXCHANGE_SECONDS", 30.0)
    collector.answer_always(answer)
    to = start(collector.url)
    log.info("a line")
    finish(to, 700)
    until(lambda: len(collector.received) >= 2)
    began = time.monotonic()
    to.flush_and_stop(0.5)
    assert time.monotonic() - began < 1.2
    until(lambda: not left_behind(), 2, "threads")
    stats = to.stats()
    assert sum(stats["spans"].values()) == 2800
    assert sum(stats["logs"].values()) == 1


def test_the_end_comes_in_time_if_no_connection_can_be_made(start: Start) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = [socket.socket() for _ in range(4)]
        for one in waiting:
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        to = start(f"http://127.0.0.1:{full.getsockname()[1]}")
        finish(to)
        until(lambda: to._spans._in_hand)
        began = time.monotonic()
        to.flush_and_stop(0.3)
        assert time.monotonic() - began < 1.2
        for one in waiting:
            one.close()


def test_what_was_lost_in_the_end_is_told(start: Start, collector: OtlpCollector, caplog: pytest.LogCaptureFixture) -> None:
    collector.answer_always([HANG])
    to = start(collector.url)
    finish(to, 3)
    to.flush_and_stop(0.2)
    told = [r.getMessage() for r in caplog.records if r.name == "opensourcellmrouter.telemetry"][-1]
    assert told.startswith("telemetry: what was left could not be delivered within 0.2 s: 12 spans, ")


def test_all_that_is_queued_is_sent_in_the_end(start: Start, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry.Lane, "LINGER", 30.0)
    monkeypatch.setattr(telemetry, "METRIC_SECONDS", 60.0)
    to = start(collector.url)
    finish(to, 20)
    log.info("goodbye")
    to.flush_and_stop(3)
    assert len(collector.spans()) == 80
    assert [line["body"] for line in collector.log_records()] == ["goodbye"]
    assert collector.metrics()["router.requests"]["points"][0]["value"] == 20
    assert to.stats()["spans"] == {"exported": 80, "failed": 0, "dropped": 0}


def test_a_collector_that_is_gone_does_not_delay_the_end(start: Start) -> None:
    to = start(f"http://127.0.0.1:{free_port()}")
    finish(to, 2)
    began = time.monotonic()
    to.flush_and_stop(30)
    assert time.monotonic() - began < 5
    assert to.stats()["spans"] == {"exported": 0, "failed": 8, "dropped": 0}


def test_what_comes_after_the_end_is_counted_as_dropped(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url)
    to.flush_and_stop(1)
    to.flush_and_stop(1)
    finish(to)
    log.info("too late")
    assert to.stats()["spans"]["dropped"] == 4


# --- who steers it


def test_nothing_but_the_settings_steers_the_export(
    start: Start, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login somebody password wrong\n")
    elsewhere = f"http://127.0.0.1:{free_port()}"
    environment = {
        "HOME": str(tmp_path), "NETRC": str(tmp_path / ".netrc"),
        "HTTP_PROXY": elsewhere, "http_proxy": elsewhere, "ALL_PROXY": elsewhere,
        "OTEL_EXPORTER_OTLP_HEADERS": "authorization=Basic%20wrong,x-stray=1", "OTEL_EXPORTER_OTLP_TRACES_HEADERS": "x-stray=2",
        "OTEL_EXPORTER_OTLP_ENDPOINT": elsewhere, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": elsewhere,
        "OTEL_EXPORTER_OTLP_COMPRESSION": "gzip", "OTEL_EXPORTER_OTLP_TIMEOUT": "0.001",
        "OTEL_EXPORTER_OTLP_CERTIFICATE": str(tmp_path / "none"), "OTEL_EXPORTER_OTLP_CLIENT_CERTIFICATE": str(tmp_path / "none"),
        "OTEL_RESOURCE_ATTRIBUTES": "service.name=stray,stray=1", "OTEL_SERVICE_NAME": "stray",
        "OTEL_TRACES_SAMPLER": "always_off",
        "OTEL_METRICS_EXEMPLAR_FILTER": "always_on", "OTEL_ATTRIBUTE_VALUE_LENGTH_LIMIT": "1",
        "OTEL_EXPORTER_OTLP_METRICS_TEMPORALITY_PREFERENCE": "delta",
        "OTEL_EXPORTER_OTLP_METRICS_DEFAULT_HISTOGRAM_AGGREGATION": "base2_exponential_bucket_histogram",
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    to = start(collector.url, headers={"X-Scope": "tenant", "Authorization": "Bearer right"})
    log.info("a line")
    finish(to)
    to.flush_and_stop(3)
    assert {r.path for r in collector.received} == set(PATHS.values())
    for request in collector.received:
        assert (request.headers["authorization"], request.headers["x-scope"]) == ("Bearer right", "tenant")
        assert not {"x-stray", "content-encoding", "expect"} & request.headers.keys()
        assert request.headers["user-agent"] == "opensourcellmrouter/0.1"
    assert {s["resource"]["service.name"] for s in collector.spans()} == {"opensourcellmrouter"}
    assert "stray" not in collector.spans()[0]["resource"]
    histogram = collector.metrics()["router.request.duration_ms"]
    assert (histogram["kind"], histogram["temporality"]) == ("histogram", "cumulative")


def test_the_path_of_the_base_is_kept(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url + "/otlp/")
    finish(to)
    until(lambda: [r for r in collector.received if r.path == "/otlp/v1/traces"])
    collector.faults.clear()
    to.flush_and_stop(1)
    collector.faults.clear()


def test_an_exporter_that_only_knows_sessions_works_as_well(start: Start, collector: OtlpCollector) -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    class Older(OTLPMetricExporter):
        def __init__(self, *, endpoint: str, timeout: float, compression: Any, session: Any) -> None:
            super().__init__(endpoint=endpoint, timeout=timeout, compression=compression, session=session)

    to = start(collector.url)
    post = to._post("metrics", 0.0)
    exporter = telemetry._exporter(Older, post)
    data = to._metrics._reader.get_metrics_data()
    assert exporter.export(data).name == "SUCCESS"
    collector.script("/v1/metrics", reply(404), reply(302))
    assert exporter.export(data).name == "FAILURE"
    exporter.shutdown()


@pytest.mark.parametrize("trusted", [True, False])
def test_a_certificate_is_checked(trusted: bool, start: Start, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    made = subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2", "-subj",
         "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        capture_output=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    if trusted:
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    collector = OtlpCollector(tls=context)
    to = start(collector.url)
    finish(to)
    if trusted:
        assert settled(to, 4) == {"exported": 4, "failed": 0, "dropped": 0}
    else:
        until(lambda: to.stats()["last_error"])
        assert "certificate verification failed" in to.stats()["last_error"]
        assert collector.received == []
    to.flush_and_stop(1)
    collector.close()


# --- the probe


def test_the_probe_sends_one_of_each_and_tells_what_came_back(start: Start, collector: OtlpCollector) -> None:
    to = start(collector.url)
    findings = to.probe()
    assert [(f["signal"], f["ok"], f["status"], f["advice"]) for f in findings] == [
        ("traces", True, 200, ""), ("metrics", True, 200, ""), ("logs", True, 200, ""),
    ]  # fmt: skip
    assert [s["name"] for s in collector.spans()] == ["opensourcellmrouter.probe"]
    assert [line["body"] for line in collector.log_records()] == ["a test line"]
    assert all(f["latency_ms"] >= 0 for f in findings)


@pytest.mark.parametrize(
    ("answer", "words"),
    [(reply(404), "/v1/traces"), (reply(401), "telemetry.headers"), (reply(302), "https"), (reply(415), "gRPC"),
     ([HANG], "firewall"), (reply(200, b"<html>", "text/html"), "4318"), (reply(503), "busy"),
     (partial("/v1/traces", 1, "no"), "own log"),
     ([b"SSH-2.0\r\n"], "no collector"), (reply(200, b"ok", "text/plain"), "no collector")],
)  # fmt: skip
def test_the_probe_names_cause_and_cure(answer: bytes | list[Step], words: str, start: Start, collector: OtlpCollector) -> None:
    collector.answer_always(answer, "/v1/traces")
    finding = start(collector.url).probe()[0]
    assert not finding["ok"]
    assert finding["message"].startswith(f"{collector.url}/v1/traces: ")
    assert words in finding["advice"], finding


def test_the_probe_of_a_closed_port_says_that_nothing_listens(start: Start) -> None:
    began = time.monotonic()
    findings = start(f"http://127.0.0.1:{free_port()}").probe()
    assert [f["ok"] for f in findings] == [False] * 3
    assert all("Nothing listens" in f["advice"] for f in findings)
    assert time.monotonic() - began < 5


def test_memory_stays_flat_while_a_collector_floods_us(start: Start, collector: OtlpCollector) -> None:
    collector.answer_always([b"HTTP/1.1 200 OK\r\n\r\n", *[b"x" * 1_000_000] * 200, HANG])
    to = start(collector.url)
    before = resident()
    for number in range(1, 4):
        finish(to)
        settled(to, 4 * number)
    assert resident() - before < 16 * 2**20


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
