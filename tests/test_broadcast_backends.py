"""Broadcast against the real Collector and the real Jaeger: what is sent is taken, understood and found again."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from backends import Collector, Jaeger, Span, collector, jaeger, need, nginx, otlp
from backends.process import get_json
from broadcast_records import ATTEMPT, attributes, failed, generation, record, to_bytes
from broadcast_runs import collector as to_collector
from broadcast_runs import counts, running, settled
from fake_collector import until

from broadcast import Broadcast, Destination, Settings, delivery, encode, replay
from broadcast.destinations import target
from broadcast.exchange import exchange

ODD: list[dict[str, Any]] = [
    {},
    {"trace": {"lone": "\ud800", "nul": "\0", "sep": "\u2028", "big": 10**400, "nan": float("nan")}},
    {"trace": {"n": None, "l": [1], "o": {"a": {}}}},
    {"trace": {"trace_id": "\ud800", "parent_span_id": "zz", "trace_name": "\0", "span_name": "a\ud800", "": 1, "\ud800": 2}},
    {"trace": {f"k{n}": n for n in range(2_000)}},
    {"user": "\ud83d\ude00 \u202e", "session_id": "s" * 256, "requested_model": "\ud800/x"},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "x" * 1_000_000 + "\ud800"}]}]},
    {"attempts": [ATTEMPT | {"error": "no\0\ud800", "error_type": "upstream_error", "status": 500}, ATTEMPT]},
    {"outcome": "cancelled", "error_type": "client_disconnected", "error": "gone"},
]


def now(**changes: Any) -> dict[str, Any]:
    """Jaeger looks back one hour only."""
    return record(ts_ms=int(time.time() * 1000) - 10_000, **changes)


@pytest.fixture
def the_collector(tmp_path: Path) -> Iterator[Collector]:
    need(collector)
    with collector(tmp_path) as backend:
        yield backend


@pytest.fixture(scope="module")
def the_jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    need(jaeger)
    with jaeger(tmp_path_factory.mktemp("jaeger")) as backend:
        yield backend


def test_the_collector_takes_every_oddity_and_gives_back_every_attribute_with_its_type(
    tmp_path: Path, the_collector: Collector
) -> None:
    records = [now(**changes) for changes in ODD] + [failed(**changes) for changes in ODD[1:5]]
    with running(tmp_path, to_collector("c", the_collector.endpoint + "/v1/traces")) as made:
        for one in records:
            made.sink(one)
        assert settled(made, "c", len(records))["delivered"] == len(records)
    back = {span["span_id"]: span for span in the_collector.spans()}
    for one in records:
        for span in [s for e in encode(one, privacy=False)["resourceSpans"] for s in e["scopeSpans"][0]["spans"]]:
            received = back[span["spanId"]]
            assert received["trace_id"] == span["traceId"]
            assert received["parent_span_id"] == span.get("parentSpanId")
            assert received["name"] == span["name"]
            assert received["attributes"] == attributes(span)
            assert {key: type(value) for key, value in received["attributes"].items()} == {
                key: type(value) for key, value in attributes(span).items()
            }
            assert received["resource"]["service.name"] == "openrouter"


def test_one_bad_id_would_have_cost_a_whole_batch(the_collector: Collector) -> None:
    document = encode(now(), privacy=True)
    document["resourceSpans"][0]["scopeSpans"][0]["spans"][0]["traceId"] = "app_trace_001"
    answer = exchange(target(to_collector("c", the_collector.endpoint + "/v1/traces")), to_bytes(document), 5, ())
    assert (answer.cause, answer.status) == ("http", 400)


@pytest.mark.parametrize("auth", ["bearer", "basic"])
def test_a_gateway_with_a_key_takes_it_and_refuses_another(tmp_path: Path, auth: Any) -> None:
    need(collector)
    with collector(tmp_path, auth=auth) as gateway, running(tmp_path) as made:
        config = {"endpoint": gateway.endpoint + "/v1/traces", "headers": gateway.headers}
        body = {"type": "otel-collector", "config": config}
        wrong = {"headers": {"Authorization": "Bearer no"}}
        status, told = made.api("POST", "/destinations", body | {"config": config | wrong})
        assert (status, told["status"]) == (422, 401)
        assert "Bearer or Basic" in told["advice"]
        assert made.api("POST", "/destinations", body)[0] == 201
        made.sink(now())
        assert settled(made, "otel-collector", 1)["delivered"] == 1
        assert next(span["name"] for span in gateway.spans()) == "openrouter-connection-test"


def test_axioms_form_works_against_a_gateway_with_a_bearer_token(tmp_path: Path) -> None:
    need(collector)
    with collector(tmp_path, auth="bearer") as gateway:
        token = gateway.headers["Authorization"].removeprefix("Bearer ")
        d = Destination("a", "axiom", token=token, dataset="d", endpoint=gateway.endpoint)
        with running(tmp_path, d) as made:
            made.sink(now())
            assert settled(made, "a", 1)["delivered"] == 1


AXIOM = """
log_format connections "$connection $status";
server {
    listen 127.0.0.1:%PORT%;
    access_log %DIR%/access.log connections;
    location = /v1/traces {
        if ($http_authorization != "Bearer xaat-secret") { return 401; }
        if ($http_x_axiom_dataset != "llm") { return 403; }
        proxy_pass COLLECTOR;
    }
}
"""


def test_axioms_headers_pass_a_gateway_of_nginx_over_one_connection(tmp_path: Path, the_collector: Collector) -> None:
    need(nginx)
    with nginx(AXIOM.replace("COLLECTOR", the_collector.endpoint), tmp_path) as gateway, running(tmp_path) as made:
        config = {"token": "xaat-secret", "dataset": "llm", "endpoint": gateway.endpoint}
        for wrong, status, advice in (
            ({"token": "xaat-wrong"}, 401, "may ingest"),
            ({"dataset": "other"}, 403, "exactly that name"),
        ):
            refused, told = made.api("POST", "/destinations", {"type": "axiom", "config": config | wrong})
            assert (refused, told["status"]) == (422, status)
            assert advice in told["advice"]
        assert made.api("POST", "/destinations", {"type": "axiom", "config": config})[0] == 201
        for n in range(1, 6):
            made.sink(now())
            assert settled(made, "axiom", n)["delivered"] == n
        lines = [line.split() for line in gateway.access_log()]
    assert [status for _, status in lines] == ["401", "403"] + ["200"] * 6
    assert len({connection for connection, _ in lines[3:]}) == 1  # after the three tests
    assert len([span for span in the_collector.spans() if span["name"] == "LLM Generation"]) == 5


class GrafanaGateway(Collector):
    """A Collector that listens where Grafana's gateway does and knows one instance."""

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        config["receivers"]["otlp"]["protocols"]["http"]["traces_url_path"] = "/otlp/v1/traces"
        config["extensions"]["basicauth"]["htpasswd"]["inline"] = "123456:glc_secret"
        return config


@pytest.mark.parametrize("pasted", ["", "/", "/otlp", "/otlp/v1/traces", "/v1/traces"])
def test_grafanas_form_works_against_a_gateway_like_grafanas(tmp_path: Path, pasted: str) -> None:
    need(collector)
    with GrafanaGateway(tmp_path, auth="basic") as gateway, running(tmp_path) as made:
        config = {"base_url": gateway.endpoint + pasted, "instance_id": "123456", "api_key": "glc_secret"}
        status, told = made.api("POST", "/destinations", {"type": "grafana", "config": config | {"instance_id": "654321"}})
        assert (status, told["status"]) == (422, 401)
        assert "joined as Basic" in told["advice"]
        assert made.api("POST", "/destinations", {"type": "grafana", "config": config})[0] == 201
        made.sink(now())
        assert settled(made, "grafana", 1)["delivered"] == 1


def test_a_collector_that_stops_and_returns_gets_everything_once_or_again_under_the_same_ids(
    tmp_path: Path, the_collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_FIRST", 0.05)
    monkeypatch.setattr(delivery, "BACKOFF_MOST", 0.2)
    with running(tmp_path, to_collector("c", the_collector.endpoint + "/v1/traces"), timeout=1.0) as made:
        ids = []
        for phase in ("up", "stopped", "hanging", "up again"):
            if phase == "stopped":
                the_collector.stop()
            elif phase == "hanging":
                the_collector.start()
                the_collector.pause()
            elif phase == "up again":
                the_collector.resume()
            for _ in range(50):
                ids.append((one := now())["generation_id"])
                made.sink(one)
            if phase == "up":
                settled(made, "c", 50)
        assert settled(made, "c", 200, 20)["delivered"] == 200
    spans = [span for span in the_collector.spans() if span["name"] == "LLM Generation"]
    assert list(dict.fromkeys(span["attributes"]["gen_ai.response.id"] for span in spans)) == ids


# -- the Grafana document's list of queries, each with Jaeger's counterpart


def wanted() -> dict[str, dict[str, Any]]:
    """Requests that differ in what the document's queries ask for."""
    trace = {"trace_id": "monitoring_pipeline_001", "trace_name": "Metric Analysis Pipeline"}
    trace |= {"generation_name": "Anomaly Detection"}
    trace |= {"environment": "production", "alert_id": "alert_789"}
    return {
        "turbo": now(requested_model="openai/gpt-4-turbo", user="user_abc123"),
        "slow": now(duration_ms=6_000.0, attempts=[ATTEMPT | {"duration_ms": 5_900.0}]),
        "failed": failed(ts_ms=int(time.time() * 1000) - 10_000),
        "pipeline": now(requested_model="openai/gpt-4o", trace=trace, user="user_12345", session_id="session_abc"),
        "private": now(requested_model="openai/gpt-4o", trace={"environment": "staging"}),
    }


@pytest.fixture(scope="module")
def asked(the_jaeger: Jaeger, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The trace ids of these requests, which Jaeger has."""
    requests = wanted()
    folder = tmp_path_factory.mktemp("broadcast")
    jaeger_itself = Destination("j", "jaeger", base_url=the_jaeger.endpoint)
    with running(folder, jaeger_itself) as made:
        for one in requests.values():
            made.sink(one)
        assert settled(made, "j", len(requests))["delivered"] == len(requests)
    ids = {name: generation(encode(one, privacy=True))["traceId"] for name, one in requests.items()}
    until(lambda: set(ids.values()) <= set(the_jaeger.find("openrouter")))
    return ids


def test_view_all_traces(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    assert set(asked.values()) <= set(the_jaeger.find("openrouter"))
    assert "openrouter" in the_jaeger.services()


def test_filter_by_model(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    assert the_jaeger.find("openrouter", {"gen_ai.request.model": "openai/gpt-4-turbo"}) == [asked["turbo"]]


def test_find_slow_requests(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    query = urlencode({"service": "openrouter", "minDuration": "5s", "lookback": "1h", "limit": 100})
    found = [trace["traceID"] for trace in get_json(f"{the_jaeger.query}/api/traces?{query}")["data"]]
    assert asked["slow"] in found
    assert asked["turbo"] not in found


def test_find_requests_by_user(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    assert the_jaeger.find("openrouter", {"user.id": "user_abc123"}) == [asked["turbo"]]


def test_find_errors(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    wrong = [span for span in the_jaeger.trace(asked["failed"]) if span["status"]["code"] == "error"]
    assert [span["name"] for span in wrong] == ["LLM Generation", "provider attempt 1: Amazon Bedrock"]
    assert the_jaeger.find("openrouter", {"span.level": "ERROR"}) == [asked["failed"]]


def test_find_requests_by_pattern(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    models = {name: root(the_jaeger, trace)["attributes"]["gen_ai.request.model"] for name, trace in asked.items()}
    assert {name for name, model in models.items() if re.fullmatch(".*gpt-4.*", model)} == {"turbo", "pipeline", "private"}


def test_query_custom_metadata_by_environment(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    assert the_jaeger.find("openrouter", {"trace.metadata.environment": "production"}) == [asked["pipeline"]]


def test_query_custom_metadata_by_alert(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    assert the_jaeger.find("openrouter", {"trace.metadata.alert_id": "alert_789"}) == [asked["pipeline"]]


# The same list once more in the Collector's own language of conditions, which knows patterns, durations and the status as
# TraceQL does: each query is a pipeline that lets through the spans it finds.
OURS = 'resource.attributes["service.name"] == "openrouter"'
QUERIES = {
    "view all": ("true", {"turbo", "slow", "failed", "pipeline", "private"}),
    "filter by model": ('attributes["gen_ai.request.model"] == "openai/gpt-4-turbo"', {"turbo"}),
    "find slow requests": ('end_time - start_time > Duration("5s")', {"slow"}),
    "find requests by user": ('attributes["user.id"] == "user_abc123"', {"turbo"}),
    "find errors": ("status.code == STATUS_CODE_ERROR", {"failed"}),
    "find by pattern": ('IsMatch(attributes["gen_ai.request.model"], "^.*gpt-4.*$")', {"turbo", "pipeline", "private"}),
    "query by environment": ('attributes["trace.metadata.environment"] == "production"', {"pipeline"}),
    "query by alert": ('attributes["trace.metadata.alert_id"] == "alert_789"', {"pipeline"}),
    "tokens are integers": ('attributes["gen_ai.usage.total_tokens"] == 3058', {"turbo", "slow", "pipeline", "private"}),
    "cost is a double": ('attributes["gen_ai.usage.total_cost"] == 0.005334', {"turbo", "slow", "pipeline", "private"}),
}


class Querying(Collector):
    """A Collector with a pipeline per query."""

    def _config(self) -> dict[str, Any]:
        config = super()._config()
        config["processors"] = {}
        for number, (condition, _) in enumerate(QUERIES.values()):
            config["processors"][f"filter/{number}"] = {
                "error_mode": "propagate",
                "traces": {"span": [f"not ({OURS} and {condition})"]},
            }
            config["exporters"][f"file/{number}"] = config["exporters"]["file"] | {"path": str(self.found(number))}
            config["service"]["pipelines"][f"traces/{number}"] = {
                "receivers": ["otlp"],
                "processors": [f"filter/{number}"],
                "exporters": [f"file/{number}"],
            }
        return config

    def found(self, number: int) -> Path:
        return self.directory / f"found-{number}.jsonl"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """query -> the names of the requests whose spans the Collector let through."""
    need(collector)
    folder, requests = tmp_path_factory.mktemp("querying"), wanted()
    names = {generation(encode(one, privacy=True))["traceId"]: name for name, one in requests.items()}
    with Querying(folder) as backend:
        with running(folder, to_collector("q", backend.endpoint + "/v1/traces", privacy_mode=True)) as made:
            for one in requests.values():
                made.sink(one)
            assert settled(made, "q", len(requests))["delivered"] == len(requests)
        lines = [backend.found(number).read_text("utf-8").splitlines() for number in range(len(QUERIES))]
    told = ({names[span["trace_id"]] for line in some for span in otlp.spans(json.loads(line))} for some in lines)
    return dict(zip(QUERIES, told, strict=True))


@pytest.mark.parametrize("query", QUERIES)
def test_the_collectors_own_conditions_find_what_traceql_would(found: dict[str, set[str]], query: str) -> None:
    assert found[query] == QUERIES[query][1]


def root(backend: Jaeger, trace_id: str) -> Span:
    found = [span for span in backend.trace(trace_id) if span["attributes"]["span.type"] == "generation"]
    assert len(found) == 1
    return found[0]


def test_the_names_of_the_trace_object_are_the_tree_that_jaeger_shows(the_jaeger: Jaeger, asked: dict[str, str]) -> None:
    shown = the_jaeger.tree(asked["pipeline"]).splitlines()
    assert [line.strip(" └─├│").partition("  ")[0] for line in shown] == [
        "Metric Analysis Pipeline",
        "Anomaly Detection",
        "provider attempt 1: Amazon Bedrock",
        "generation",
    ]


def test_several_requests_join_an_existing_trace_under_its_span(the_jaeger: Jaeger, tmp_path: Path) -> None:
    trace_id, parent = hashlib.sha256(str(tmp_path).encode()).hexdigest()[:32], "00f067aa0ba902b7"
    mine = encode(now(trace={"trace_id": trace_id}), privacy=True)
    mine["resourceSpans"] = mine["resourceSpans"][:1]
    span = mine["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    span |= {"spanId": parent, "name": "the application's own span"}
    there = Destination("j", "jaeger", base_url=the_jaeger.endpoint)
    assert exchange(target(there), to_bytes(mine), 5, ()).cause == "ok"
    with running(tmp_path, there) as made:
        for _ in range(2):
            made.sink(now(trace={"trace_id": trace_id.upper(), "parent_span_id": parent}))
        settled(made, "j", 2)
    spans = the_jaeger.wait_trace(trace_id, 7)
    assert [s["name"] for s in spans if s["parent_span_id"] == parent] == ["LLM Generation"] * 2


def test_a_thousand_requests_reach_a_healthy_a_returning_and_not_a_hanging_destination(
    tmp_path: Path, the_collector: Collector, the_jaeger: Jaeger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_FIRST", 0.05)
    monkeypatch.setattr(delivery, "BACKOFF_MOST", 0.2)
    need(collector)
    with collector(tmp_path) as hanging:
        hanging.pause()
        the_collector.stop()
        endpoints = {"healthy": the_jaeger.endpoint, "returning": the_collector.endpoint, "hanging": hanging.endpoint}
        made_for = [to_collector(name, url + "/v1/traces") for name, url in endpoints.items()]
        with running(tmp_path, *made_for, timeout=1.0, queue_max_items=1_500) as made:
            begun = time.monotonic()
            for _ in range(1_000):
                made.sink(now())
            handed_over = time.monotonic() - begun
            assert settled(made, "healthy", 1_000)["delivered"] == 1_000
            assert counts(made, "returning")["delivered"] == 0
            the_collector.start()
            assert settled(made, "returning", 1_000)["delivered"] == 1_000
            have = counts(made, "hanging")
            assert (have["accepted"], have["queued"], have["dropped"]) == (1_000, 1_000, {})
            assert handed_over < 1.0
        hanging.resume()
    assert len({span["trace_id"] for span in the_collector.spans()}) == 1_000


def test_replay_of_a_file_brings_it_to_a_real_backend(tmp_path: Path, the_collector: Collector) -> None:
    path = tmp_path / "traces.jsonl"
    there = to_collector("c", the_collector.endpoint + "/v1/traces", enabled=False)
    with running(tmp_path, Destination("f", "file", path=str(path)), there) as made:
        for _ in range(20):
            made.sink(now())
        settled(made, "f", 20)
        told = replay(str(path), made.settings, "c")
    assert told["delivered"] == told["lines"]
    assert len([span for span in the_collector.spans() if span["name"] == "LLM Generation"]) == 20


def test_doctor_finds_the_real_ones_well(tmp_path: Path, the_collector: Collector) -> None:
    made = Broadcast(
        Settings(database=str(tmp_path / "x.db"), destinations=(to_collector("c", the_collector.endpoint + "/v1/traces"),)),
        start=False,
    )
    assert json.dumps(made.doctor()) == '[{"place": "broadcast destination c", "ok": true, "message": "Accepted", "cure": ""}]'
