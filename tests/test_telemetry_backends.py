"""Telemetry as real backends understand it: the OpenTelemetry Collector's own records, Jaeger's query API."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from backends import Collector, Jaeger, collector, jaeger, mlflow, need
from backends.otlp import tree
from conftest import RouterFactory
from fake_upstream import (
    FakeUpstream,
    chat_completion,
    chunks,
    error_answer,
    json_answer,
    openai_chunks,
    silence,
    stream,
    stream_head,
)
from router_process import RULES, RouterProcess, chat_body, until

USAGE = {"prompt_tokens": 9, "completion_tokens": 4}
BEGUN = openai_chunks("one two", finish=None, done=False)
SHOWN = ("router.outcome", "error.type", "router.attempt", "gen_ai.usage.output_tokens")


def on(url: str, more: str = "") -> str:
    return f'{RULES}\n[telemetry]\nenabled = true\notlp_endpoint = "{url}"\n{more}\n'


@pytest.fixture
def the_collector(tmp_path: Path) -> Iterator[Collector]:
    need(collector)
    with collector(tmp_path) as running:
        yield running


@pytest.fixture
def the_jaeger(tmp_path: Path) -> Iterator[Jaeger]:
    need(jaeger)
    with jaeger(tmp_path) as running:
        yield running


def lines(text: str) -> list[str]:
    """A printed tree without what differs from run to run: (depth, name, status)."""
    found = []
    for line in text.splitlines():
        bare = line.lstrip("│├└─ ")
        depth = (len(line) - len(bare)) // 3
        words = bare.split("  ")
        status = next((w.split()[0] for w in words if w.startswith("ERROR")), "")
        found.append(f"{'  ' * depth}{words[0]} {status}".rstrip())
    return found


def test_the_collector_reads_all_three_signals(router: RouterFactory, upstream: FakeUpstream, the_collector: Collector) -> None:
    process = router(rules=on(the_collector.endpoint))
    upstream.script(stream(openai_chunks("one two", USAGE)))
    with process.stream() as reply:
        reply.read()
    assert process.stop() == 0
    trace_id = reply.headers["x-router-trace-id"]
    the_collector.wait_for(lambda: len(the_collector.trace(trace_id)) == 5)
    assert lines(tree(the_collector.trace(trace_id))) == [
        "request", "  dispatch_stream", "    provider.send", "      provider.http", "    dispatch_stream.body",
    ]  # fmt: skip
    counted = the_collector.wait_for(lambda: [m for m in the_collector.metrics() if m["name"] == "router.requests"])
    assert counted[-1]["points"][0]["value"] == 1
    stopping = the_collector.wait_for(lambda: [r for r in the_collector.log_records() if r["body"].startswith("stopping")])
    assert stopping[0]["resource"]["service.name"] == "opensourcellmrouter"


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_collector_that_wants_credentials_gets_them_from_headers(auth: Any, router: RouterFactory, tmp_path: Path) -> None:
    need(collector)
    with collector(tmp_path, auth=auth) as gateway:
        header = json.dumps(gateway.headers["Authorization"])
        allowed = router(rules=on(gateway.endpoint, f"headers = {{ Authorization = {header} }}"))
        trace_id = allowed.chat().headers["x-router-trace-id"]
        gateway.wait_for(lambda: gateway.trace(trace_id))
        refused = router(rules=on(gateway.endpoint))
        refused.chat()
        error = until(lambda: refused.stats()["telemetry"]["last_error"], 10, "the refusal")
        assert "HTTP 401" in error
        assert refused.stats()["telemetry"]["spans"]["exported"] == 0


def test_a_collector_that_hangs_and_comes_back_gets_everything(router: RouterFactory, the_collector: Collector) -> None:
    process = router(rules=on(the_collector.endpoint))
    process.chat()
    the_collector.wait_for(lambda: len(the_collector.spans()) >= 4)
    the_collector.pause()
    ids = {process.chat().headers["x-router-trace-id"] for _ in range(20)}
    assert process.stats()["telemetry"]["spans"]["failed"] == 0
    the_collector.resume()
    the_collector.wait_for(lambda: ids <= {s["trace_id"] for s in the_collector.spans()}, 30)
    assert process.stats()["telemetry"]["spans"]["dropped"] == 0


def test_jaeger_shows_every_kind_of_request(router: RouterFactory, upstream: FakeUpstream, the_jaeger: Jaeger) -> None:
    process = router(server="threads = 8\nmax_in_flight = 1", provider="idle_timeout = 0.5", rules=on(the_jaeger.endpoint))
    trees = {}

    def shown(name: str, trace_id: str, count: int) -> list[str]:
        spans = the_jaeger.wait_trace(trace_id, count, 15)
        trees[name] = the_jaeger.tree(spans, SHOWN)
        return lines(trees[name])

    upstream.script(json_answer(chat_completion("fine", USAGE)))
    whole = process.chat().headers["x-router-trace-id"]
    upstream.script(stream(openai_chunks("one two", USAGE), 0.02))
    streamed = read(process)
    upstream.script(error_answer(500))
    errored = process.chat().headers["x-router-trace-id"]
    upstream.script(stream_head() + chunks(BEGUN) + silence())
    broken = read(process)
    upstream.script(stream_head() + chunks(BEGUN) + silence())
    cancelled, overloaded = leave_with_another_waiting(process)

    assert shown("whole", whole, 4) == ["request", "  dispatch", "    provider.send", "      provider.http"]
    assert shown("streamed", streamed, 5) == [
        "request", "  dispatch_stream", "    provider.send", "      provider.http", "    dispatch_stream.body",
    ]  # fmt: skip
    assert shown("errored", errored, 4) == [
        "request ERROR", "  dispatch ERROR", "    provider.send ERROR", "      provider.http ERROR",
    ]  # fmt: skip
    assert shown("broken", broken, 5) == [
        "request ERROR", "  dispatch_stream", "    provider.send ERROR", "      provider.http ERROR",
        "    dispatch_stream.body ERROR",
    ]  # fmt: skip
    assert shown("cancelled", cancelled, 5) == [
        "request", "  dispatch_stream", "    provider.send", "      provider.http", "    dispatch_stream.body",
    ]  # fmt: skip
    assert shown("overloaded", overloaded, 2) == ["request ERROR", "  dispatch ERROR"]
    assert "opensourcellmrouter" in the_jaeger.services()
    assert whole in the_jaeger.find("opensourcellmrouter", {"router.outcome": "ok"}, name="request")
    assert overloaded in the_jaeger.find("opensourcellmrouter", {"error.type": "overloaded"})


@pytest.mark.slow
@pytest.mark.xdist_group("mlflow")
def test_mlflow_reads_conversation_and_usage(router: RouterFactory, upstream: FakeUpstream, tmp_path: Path) -> None:
    need(mlflow)
    with mlflow(tmp_path) as reader:
        process = router(rules=on(reader.endpoint, 'capture_content = true\nheaders = { x-mlflow-experiment-id = "0" }'))
        upstream.script(json_answer(chat_completion("fine", USAGE)))
        trace_id = process.chat("how are you?").headers["x-router-trace-id"]
        spans = {s["name"]: s["attributes"] for s in reader.wait_trace(trace_id, 4)}
        assert reader.info(trace_id)["state"] == "OK"
        usage = json.loads(reader.info(trace_id)["trace_metadata"]["mlflow.trace.tokenUsage"])
    assert usage == {"input_tokens": 9, "output_tokens": 4, "total_tokens": 13}
    assert spans["provider.send"]["mlflow.spanInputs"] == [
        {"role": "user", "parts": [{"type": "text", "content": "how are you?"}]}
    ]


def read(process: RouterProcess) -> str:
    with process.stream() as reply:
        reply.read()
    return reply.headers["x-router-trace-id"]


def leave_with_another_waiting(process: RouterProcess) -> tuple[str, str]:
    """The traces of a client that leaves in the middle of its stream, and of one that was refused meanwhile."""
    with contextlib.closing(process.stream()) as leaving:
        leaving.next()
        refused = process.post("/v1/chat/completions", chat_body())
        assert refused.status == 503
    return leaving.headers["x-router-trace-id"], refused.headers["x-router-trace-id"]
