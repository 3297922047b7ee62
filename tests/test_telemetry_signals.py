"""What the metrics count and what of the program's log is taken along."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
from backends.otlp import Metric, Point
from otlp_collector import OtlpCollector, reply, until
from telemetry_records import a_record, a_response, a_stream, an_attempt

import telemetry
from telemetry import Settings, Telemetry

log = logging.getLogger("opensourcellmrouter.test")
SECONDS = [0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92]


@pytest.fixture
def collector() -> Iterator[OtlpCollector]:
    running = OtlpCollector()
    yield running
    running.close()
    assert running.faults == []


@pytest.fixture
def to(collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> Iterator[Telemetry]:
    monkeypatch.setattr(telemetry.Lane, "LINGER", 0.01)
    monkeypatch.setattr(telemetry.Meters, "LINGER", 0.01)
    started = telemetry.start(Settings(enabled=True, otlp_endpoint=collector.url), "0.1")
    yield started
    started.flush_and_stop(2)


def measured(to: Telemetry, collector: OtlpCollector, *records: dict[str, Any]) -> dict[str, Metric]:
    """The metrics after these requests."""
    for record in records:
        to.sink({"type": "start"})
        to.sink(record)
    to.flush_and_stop(60)
    return collector.metrics()


def points(metric: Metric) -> list[tuple[Any, ...]]:
    """(attributes, value) of a sum's points, (attributes, count, sum) of a histogram's."""
    if metric["kind"] == "sum":
        return [(p["attributes"], p["value"]) for p in metric["points"]]
    return [(p["attributes"], p["count"], p["sum"]) for p in metric["points"]]


def of(metric: Metric, **labels: Any) -> Point:
    (found,) = [p for p in metric["points"] if all(p["attributes"].get(k) == v for k, v in labels.items())]
    return found


# --- metrics


def test_the_four_instruments_have_their_names_kinds_and_attributes(to: Telemetry, collector: OtlpCollector) -> None:
    found = measured(to, collector, a_record(), a_record())
    labels = {"provider": "up", "model": "llama3", "error": False}
    kinds = {n: (m["kind"], m["monotonic"], m["temporality"]) for n, m in found.items() if n.startswith("router.")}
    assert kinds == {
        "router.requests": ("sum", True, "cumulative"),
        "router.request.duration_ms": ("histogram", None, "cumulative"),
        "router.tokens.input": ("sum", True, "cumulative"),
        "router.tokens.output": ("sum", True, "cumulative"),
        "router.overhead_ms": ("histogram", None, "cumulative"),
        "router.in_flight": ("sum", False, "cumulative"),
    }
    assert points(found["router.requests"]) == [(labels, 2)]
    assert points(found["router.request.duration_ms"]) == [(labels, 2, 90.0)]
    assert points(found["router.tokens.input"]) == [(labels, 24)]
    assert points(found["router.tokens.output"]) == [(labels, 10)]
    assert points(found["router.overhead_ms"]) == [(labels, 2, 10.0)]
    assert points(found["router.in_flight"]) == [({}, 0)]


def test_the_genai_histograms_have_the_conventions_buckets_and_attributes(to: Telemetry, collector: OtlpCollector) -> None:
    found = measured(to, collector, a_stream())
    labels = {
        "gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "llama3",
        "gen_ai.response.model": "llama3-8b", "server.address": "127.0.0.1", "server.port": 9100,
    }  # fmt: skip
    duration, tokens, first = (
        found[n] for n in ("gen_ai.client.operation.duration", "gen_ai.client.token.usage", "gen_ai.server.time_to_first_token")
    )
    assert points(duration) == [(labels, 1, 0.058)]
    assert points(tokens) == [
        ({**labels, "gen_ai.token.type": "input"}, 1, 12.0),
        ({**labels, "gen_ai.token.type": "output"}, 1, 5.0),
    ]
    assert points(first) == [(labels, 1, 0.02)]
    assert (duration["unit"], tokens["unit"], first["unit"]) == ("s", "{token}", "s")
    assert duration["points"][0]["bounds"] == SECONDS
    assert tokens["points"][0]["bounds"] == [4.0**n for n in range(14)]
    assert first["points"][0]["bounds"] == [0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10]


@pytest.mark.parametrize("outcome", ["error", "timeout", "rejected"])
def test_a_failure_is_counted_as_error_and_its_tokens_are_not(outcome: str, to: Telemetry, collector: OtlpCollector) -> None:
    failed = a_record(outcome=outcome, status=502, error="x", error_type="upstream_500")
    found = measured(to, collector, failed)
    labels = {"provider": "up", "model": "llama3", "error": True}
    assert points(found["router.requests"]) == [(labels, 1)]
    assert points(found["router.request.duration_ms"]) == [(labels, 1, 45.0)]
    assert not {"router.tokens.input", "router.tokens.output", "gen_ai.client.token.usage"} & found.keys()
    assert of(found["gen_ai.client.operation.duration"])["attributes"]["error.type"] == "upstream_500"


def test_tokens_of_a_client_that_left_count(to: Telemetry, collector: OtlpCollector) -> None:
    left = a_stream(outcome="cancelled", error="x", error_type="client_disconnected", usage_source="estimated")
    found = measured(to, collector, left, a_stream(outcome="cancelled", error_type="client_disconnected", usage_source="none"))
    assert points(found["router.requests"]) == [({"provider": "up", "model": "llama3", "error": False}, 2)]
    assert points(found["router.tokens.output"]) == [({"provider": "up", "model": "llama3", "error": False}, 5)]


def test_a_request_that_nobody_answered_is_counted_without_a_provider(to: Telemetry, collector: OtlpCollector) -> None:
    refused = a_record(outcome="rejected", status=503, error="x", error_type="overloaded", attempts=[], response=None,
                       provider=None, sent_model=None, vendor=None, server_address=None, server_port=None,
                       usage_source="none")  # fmt: skip
    found = measured(to, collector, refused)
    assert points(found["router.requests"]) == [({"provider": "none", "model": "none", "error": True}, 1)]
    assert not [name for name in found if name.startswith("gen_ai")]


def test_a_failover_is_one_request(to: Telemetry, collector: OtlpCollector) -> None:
    attempts = [an_attempt(status=500, error_type="upstream_500", duration_ms=3.0), an_attempt(attempt=2, duration_ms=30.0)]
    found = measured(to, collector, a_record(attempts=attempts))
    assert of(found["router.requests"])["value"] == 1
    assert (of(found["gen_ai.client.operation.duration"])["count"], of(found["gen_ai.client.operation.duration"])["sum"]) == (
        1,
        0.03,
    )


def test_model_names_are_bounded_and_the_known_ones_stay(to: Telemetry, collector: OtlpCollector) -> None:
    records = [a_record(sent_model=f"m{n}", response=a_response(model=f"r{n}")) for n in range(1000)]
    found = measured(to, collector, *records, a_record(sent_model="m0"))
    counted = {a["model"]: value for a, value in points(found["router.requests"])}
    assert len(counted) == telemetry.MODELS + 1
    assert (counted["m0"], counted["m255"], counted["other"]) == (2, 1, 1000 - telemetry.MODELS)
    named = {p["attributes"]["gen_ai.response.model"] for p in found["gen_ai.client.operation.duration"]["points"]}
    assert len(named) <= telemetry.MODELS + 2


def test_a_model_name_no_backend_could_store_is_repaired(to: Telemetry, collector: OtlpCollector) -> None:
    found = measured(to, collector, a_record(sent_model="m\ud800" + "x" * 5000))
    model = of(found["router.requests"])["attributes"]["model"]
    assert model.startswith("m�xxx")
    assert len(model) == 201


def test_requests_under_way_are_told_while_they_run(
    to: Telemetry, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(3):
        to.sink({"type": "start"})
    to.sink(a_record())
    to.flush_and_stop(2)
    assert points(collector.metrics()["router.in_flight"]) == [({}, 2)]


def test_metrics_are_exported_from_time_to_time(collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "100")
    started = telemetry.start(Settings(enabled=True, otlp_endpoint=collector.url), "0.1")
    until(lambda: [r.path for r in collector.received].count("/v1/metrics") >= 3)
    started.flush_and_stop(2)


def test_no_request_goes_uncounted_when_the_queue_is_full(
    to: Telemetry, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(telemetry.Meters, "ITEMS", 10)

    def finish() -> bool:
        to.sink(a_record())
        return True

    workers = [threading.Thread(target=lambda: [finish() for _ in range(100)]) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    to.flush_and_stop(3)
    assert of(collector.metrics()["router.requests"])["value"] == 800
    assert of(collector.metrics()["router.in_flight"])["value"] == -800


def test_a_record_that_cannot_be_measured_costs_itself_only(to: Telemetry, collector: OtlpCollector) -> None:
    unsampled = to.begin(f"00-{'1' * 32}-{'1' * 16}-00", None)
    found = measured(to, collector, a_record(duration_ms="long", _trace=unsampled), a_record())
    assert of(found["router.requests"])["value"] == 1
    assert points(found["router.in_flight"]) == [({}, 0)]


# --- logs


def lines(collector: OtlpCollector, count: int) -> list[Any]:
    return until(lambda: len(collector.log_records()) >= count and collector.log_records())


def test_lines_carry_level_time_and_logger(to: Telemetry, collector: OtlpCollector) -> None:
    began = time.time_ns()
    log.debug("not this one")
    for level, text in ((20, "an info"), (30, "a warning"), (40, "an error"), (50, "the end")):
        log.log(level, "%s", text)
    found = lines(collector, 4)
    assert [(f["severity"], f["severity_text"], f["body"]) for f in found] == [
        (9, "INFO", "an info"), (13, "WARNING", "a warning"), (17, "ERROR", "an error"), (21, "CRITICAL", "the end"),
    ]  # fmt: skip
    assert all(began <= f["time"] <= time.time_ns() for f in found)
    assert {f["scope"]["name"] for f in found} == {"opensourcellmrouter.test"}
    assert {(f["trace_id"], f["span_id"]) for f in found} == {(None, None)}


def test_lines_carry_the_ids_of_the_request_of_their_thread_and_of_no_other(to: Telemetry, collector: OtlpCollector) -> None:
    trace = to.begin(None, None)
    telemetry.enter(trace)
    log.info("inside")
    other = threading.Thread(target=lambda: log.info("elsewhere"))
    other.start()
    other.join()
    telemetry.leave()
    log.info("after")
    found = {f["body"]: (f["trace_id"], f["span_id"]) for f in lines(collector, 3)}
    assert found == {"inside": (trace.trace_id, trace.span_id), "elsewhere": (None, None), "after": (None, None)}


def test_an_exception_tells_its_kind_and_place_but_not_its_words(to: Telemetry, collector: OtlpCollector) -> None:
    try:
        raise ValueError("SECRET-PROMPT")
    except ValueError:
        log.exception("a reader failed")
    (line,) = lines(collector, 1)
    assert (line["body"], line["attributes"]["exception.type"]) == ("a reader failed", "ValueError")
    assert "test_telemetry_signals.py" in line["attributes"]["exception.stacktrace"]
    assert b"SECRET-PROMPT\x00" not in collector.everything().replace(b'SECRET-PROMPT")', b"")


def test_keys_are_taken_out_of_lines(to: Telemetry, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("opensourcellmrouter"), "propagate", False)  # pytest's own log raises for the second
    telemetry.keep_secret("dest-TOKEN-in-a-line")
    log.warning("the key is %s and %s", "dest-TOKEN-in-a-line", "Bearer abcdef")
    log.warning("a broken %d line", "dest-TOKEN-in-a-line")
    first, second = lines(collector, 2)
    assert first["body"] == "the key is [redacted] and Bearer [redacted]"
    assert second["body"] == "a broken %d line"


def test_strange_and_huge_lines_survive(to: Telemetry, collector: OtlpCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("opensourcellmrouter"), "propagate", False)  # pytest's own log could not store them
    log.warning("a\ud800b\x00c")
    log.warning("x" * 1_000_000)
    first, second = lines(collector, 2)
    assert first["body"] == "a�b�c"
    assert len(second["body"]) == 8192


def test_nobody_elses_lines_are_taken_and_none_about_telemetry_itself(to: Telemetry, collector: OtlpCollector) -> None:
    for name in ("urllib3.connectionpool", "opentelemetry.exporter", "requests", "waitress", "opensourcellmrouter.telemetry"):
        logging.getLogger(name).error("from %s", name)
    log.info("ours")
    to.flush_and_stop(2)
    assert [line["body"] for line in collector.log_records()] == ["ours"]


def test_failing_exports_do_not_feed_themselves(to: Telemetry, collector: OtlpCollector) -> None:
    collector.answer_always(reply(500))
    log.info("one")
    until(lambda: to.stats()["logs"]["failed"])
    to.sink(a_record())
    until(lambda: to.stats()["spans"]["failed"])
    to.flush_and_stop(1)
    assert to.stats()["logs"] == {"exported": 0, "failed": 1, "dropped": 0}


def test_logging_is_left_as_it_was(collector: OtlpCollector) -> None:
    names = ("", "opensourcellmrouter", "opentelemetry")
    before = [(logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names]
    started = telemetry.start(Settings(enabled=True, otlp_endpoint=collector.url), "0.1")
    assert logging.getLogger("opensourcellmrouter").isEnabledFor(logging.INFO)
    started.flush_and_stop(1)
    assert [(logging.getLogger(n).level, list(logging.getLogger(n).handlers)) for n in names] == before
