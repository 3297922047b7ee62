"""The real backends themselves: each receives what is sent as plain OTLP/HTTP JSON and gives it back unharmed.

What a test elsewhere asserts on a backend's word is worth as much as this: that the strict ones refuse what is wrong,
that types survive, that nothing is left behind. A backend that is not installed is skipped with the reason.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import urllib3
from backends import Backend, Collector, Jaeger, Mlflow, MockOtlp, Span, collector, jaeger, mlflow, mockotlp, need, nginx
from backends import otlp as reader
from backends.process import until

ALL: list[type[Backend]] = [collector, jaeger, mockotlp, mlflow]
# One MLflow serves all its tests in one worker: it takes five seconds and half a gigabyte to start.
IN_ONE_WORKER = pytest.mark.xdist_group("mlflow")


@pytest.fixture(scope="module")
def the_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mlflow]:
    need(mlflow)
    with mlflow(tmp_path_factory.mktemp("mlflow")) as running:
        yield running


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


@pytest.fixture
def the_mock(tmp_path: Path) -> Iterator[MockOtlp]:
    need(mockotlp)
    with mockotlp(tmp_path) as running:
        yield running


@pytest.fixture(params=["collector", "jaeger", "mock", pytest.param("mlflow", marks=IN_ONE_WORKER)])
def backend(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"the_{request.param}")


@pytest.fixture(params=["collector", "jaeger", pytest.param("mlflow", marks=IN_ONE_WORKER)])
def strict_backend(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"the_{request.param}")


@pytest.fixture(params=["collector", "jaeger"])
def stricter_backend(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(f"the_{request.param}")


def an_id(size: int) -> str:
    return secrets.token_hex(size)


def a_span(trace_id: str, name: str = "request", parent: str | None = None, **fields: Any) -> dict[str, Any]:
    now = time.time_ns()
    return {
        "traceId": trace_id,
        "spanId": an_id(8),
        "name": name,
        "kind": 2,
        "startTimeUnixNano": str(now - 5_000_000),
        "endTimeUnixNano": str(now),
        "attributes": [
            {"key": "gen_ai.request.model", "value": {"stringValue": "llama3"}},
            {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "5"}},
            {"key": "router.cost", "value": {"doubleValue": 0}},
        ],
        **({"parentSpanId": parent} if parent else {}),
        **fields,
    }


def an_export(*spans: dict[str, Any], service: str = "router") -> dict[str, Any]:
    resource = {"attributes": [{"key": "service.name", "value": {"stringValue": service}}]}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "test"}, "spans": list(spans)}]}]}


def post(to: Backend, export: Any, signal: str = "traces", **headers: str) -> urllib3.BaseHTTPResponse:
    fields = {"Content-Type": "application/json", **getattr(to, "headers", {}), **headers}
    with urllib3.PoolManager(retries=False, timeout=20) as pool:
        body = json.dumps(export).encode()
        return pool.request("POST", f"{to.endpoint}/v1/{signal}", body=body, headers=fields, redirect=False)


def spans_of(backend: Any, trace_id: str, count: int = 1) -> list[Span]:
    """The trace as the backend gives it back, whichever way this backend is asked."""
    if isinstance(backend, Jaeger | Mlflow):
        return backend.wait_trace(trace_id, count)
    spans: list[Span] = backend.wait_for(lambda: len(backend.trace(trace_id)) >= count and backend.trace(trace_id))
    return spans


def test_a_span_sent_as_json_is_given_back(backend: Any) -> None:
    trace_id = an_id(16)
    sent = a_span(trace_id)
    assert post(backend, an_export(sent)).status == 200
    (span,) = spans_of(backend, trace_id)
    assert (span["name"], span["span_id"], span["parent_span_id"]) == ("request", sent["spanId"], None)
    assert span["end"] - span["start"] == 5_000_000
    assert span["attributes"]["gen_ai.request.model"] == "llama3"


def test_a_parent_and_its_child_stay_related(backend: Any) -> None:
    trace_id = an_id(16)
    root = a_span(trace_id)
    child = a_span(trace_id, "dispatch", root["spanId"])
    post(backend, an_export(root, child))
    parents = {span["name"]: span["parent_span_id"] for span in spans_of(backend, trace_id, 2)}
    assert parents == {"request": None, "dispatch": root["spanId"]}


def test_an_integer_stays_an_integer_and_a_zero_cost_a_double(backend: Any) -> None:
    trace_id = an_id(16)
    post(backend, an_export(a_span(trace_id)))
    (span,) = spans_of(backend, trace_id)
    found = [span["attributes"][key] for key in ("gen_ai.usage.input_tokens", "router.cost")]
    assert [(type(value), value) for value in found] == [(int, 5), (float, 0.0)]


def test_a_trace_id_that_is_not_hex_is_refused_with_400(strict_backend: Any) -> None:
    good = a_span(an_id(16))
    assert post(strict_backend, an_export(good, a_span("not-hex-not-hex-not-hex-not-hex!"))).status == 400
    assert post(strict_backend, an_export(good)).status == 200


@pytest.mark.parametrize("size", [1, 15, 17])
def test_a_trace_id_of_the_wrong_length_is_refused_with_its_neighbours(stricter_backend: Any, size: int) -> None:
    lost, kept = an_id(16), an_id(16)
    assert post(stricter_backend, an_export(a_span(lost), a_span(an_id(size)))).status == 400
    assert post(stricter_backend, an_export(a_span(kept))).status == 200
    assert spans_of(stricter_backend, kept)
    assert not stricter_backend.trace(lost)


def test_the_mock_recorder_takes_a_bad_trace_id_for_good(the_mock: MockOtlp) -> None:
    assert post(the_mock, an_export(a_span("zz"))).status == 200
    assert the_mock.wait_for(the_mock.requests)[0]["path"] == "/v1/traces"


def test_the_mock_recorder_survives_what_it_cannot_parse_and_says_so(the_mock: MockOtlp) -> None:
    headers = {"Content-Type": "application/json", "X-Seen": "yes"}
    with urllib3.PoolManager(retries=False) as pool:
        answer = pool.request("POST", f"{the_mock.endpoint}/v1/traces", body=b"\x1f\x8bnot json", headers=headers)
    assert answer.status == 200
    assert "SyntaxError" in the_mock.wait_for(the_mock.faults)[0]
    assert the_mock.requests()[0]["headers"]["x-seen"] == "yes"
    trace_id = an_id(16)
    post(the_mock, an_export(a_span(trace_id)))
    assert spans_of(the_mock, trace_id)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
def test_a_collector_with_auth_wants_its_header(auth: Any, tmp_path: Path) -> None:
    need(collector)
    with collector(tmp_path, auth=auth) as gateway:
        trace_id = an_id(16)
        export = an_export(a_span(trace_id))
        wrong = gateway.headers["Authorization"][:-1] + "!"
        assert post(gateway, export, Authorization=wrong).status == 401
        assert post(gateway, export, Authorization="").status == 401
        assert not gateway.spans()
        assert post(gateway, export).status == 200
        assert len(spans_of(gateway, trace_id)) == 1


def test_the_collector_reads_all_three_signals_of_the_protobuf_exporters(the_collector: Collector) -> None:
    sent = subprocess.run([sys.executable, "-c", _SDK, the_collector.endpoint], capture_output=True, text=True)
    assert sent.returncode == 0, sent.stderr
    trace_id = sent.stdout.strip()
    the_collector.wait_for(lambda: the_collector.metrics() and the_collector.log_records() and the_collector.spans())
    (span,) = the_collector.trace(trace_id)
    assert (span["name"], span["kind"]) == ("request", "server")
    assert span["attributes"] == {"n": 1, "cost": 0.0, "tags": ["a", "b"], "yes": True}
    assert span["status"] == {"code": "error", "message": "no answer"}
    assert [event["attributes"]["exception.message"] for event in span["events"]] == ["boom"]
    assert (span["resource"]["service.name"], span["scope"]["name"]) == ("router", "test")
    counter, histogram = sorted(the_collector.metrics(), key=lambda metric: metric["kind"], reverse=True)
    assert (counter["name"], counter["kind"], counter["monotonic"]) == ("router.requests", "sum", True)
    assert [(point["attributes"], point["value"]) for point in counter["points"]] == [({"error": False}, 3)]
    (point,) = histogram["points"]
    assert (histogram["unit"], histogram["temporality"], point["count"]) == ("ms", "cumulative", 2)
    assert (point["sum"], point["bounds"], point["buckets"]) == (11.0, [1.0, 5.0], [1, 0, 1])
    (record,) = the_collector.log_records()
    assert (record["body"], record["severity_text"], record["trace_id"]) == ("hello", "INFO", trace_id)
    assert record["span_id"] == span["span_id"]


_SDK = """
import sys
from opentelemetry._logs import LogRecord, SeverityNumber
from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk._logs import LoggerProvider
from opentelemetry.sdk._logs.export import SimpleLogRecordProcessor
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.trace import SpanKind, Status, StatusCode, set_span_in_context

base, resource = sys.argv[1], Resource({"service.name": "router"})
traces = TracerProvider(resource=resource)
traces.add_span_processor(SimpleSpanProcessor(OTLPSpanExporter(base + "/v1/traces")))
logs = LoggerProvider(resource=resource)
logs.add_log_record_processor(SimpleLogRecordProcessor(OTLPLogExporter(base + "/v1/logs")))
reader = PeriodicExportingMetricReader(OTLPMetricExporter(base + "/v1/metrics"))
meters = MeterProvider([reader], resource=resource)
span = traces.get_tracer("test").start_span("request", kind=SpanKind.SERVER)
span.set_attributes({"n": 1, "cost": 0.0, "tags": ["a", "b"], "yes": True})
span.record_exception(ValueError("boom"))
span.set_status(Status(StatusCode.ERROR, "no answer"))
logs.get_logger("test").emit(LogRecord(
    timestamp=1, context=set_span_in_context(span), severity_number=SeverityNumber.INFO, severity_text="INFO",
    body="hello"))
span.end()
meter = meters.get_meter("test")
meter.create_counter("router.requests").add(3, {"error": False})
duration = meter.create_histogram("d", "ms", explicit_bucket_boundaries_advisory=[1, 5])
duration.record(1)
duration.record(10)
for provider in (traces, logs, meters):
    provider.shutdown()
print(f"{span.get_span_context().trace_id:032x}")
"""


def test_jaeger_finds_a_trace_by_service_name_and_tags(the_jaeger: Jaeger) -> None:
    wanted, other = an_id(16), an_id(16)
    post(the_jaeger, an_export(a_span(wanted, "dispatch")))
    post(the_jaeger, an_export(a_span(other, "request"), service="another"))
    the_jaeger.wait_trace(other)
    the_jaeger.wait_trace(wanted)
    assert sorted(the_jaeger.services()) == ["another", "router"]
    assert the_jaeger.find("router") == [wanted]
    assert the_jaeger.find("router", {"gen_ai.usage.input_tokens": "5", "router.cost": "0"}, name="dispatch") == [wanted]
    assert the_jaeger.find("router", {"gen_ai.usage.input_tokens": "6"}) == []
    assert the_jaeger.find("router", name="request") == []


def test_jaeger_knows_nothing_of_a_trace_it_never_got(the_jaeger: Jaeger) -> None:
    assert the_jaeger.trace(an_id(16)) == []


def test_jaegers_tree_shows_parents_durations_and_faults(the_jaeger: Jaeger) -> None:
    trace_id, start = an_id(16), 1_800_000_000_000_000_000 - 10**9
    times: dict[str, Any] = {"startTimeUnixNano": str(start), "endTimeUnixNano": str(start + 12_300_000)}
    root = a_span(trace_id, **times)
    send = a_span(trace_id, "provider.send", root["spanId"], kind=1, status={"code": 2, "message": "timeout"}, **times)
    http = a_span(trace_id, "provider.http", send["spanId"], kind=3, **times)
    stray = a_span(trace_id, "stray", "00000000000000aa", **times)
    post(the_jaeger, an_export(http, stray, root, send))
    spans = the_jaeger.wait_trace(trace_id, 4)
    lines = the_jaeger.tree(spans, ["gen_ai.usage.input_tokens"]).splitlines()
    tree = [line for line in lines if "stray" not in line]
    assert tree == [
        "request  SERVER  +0.0 ms  12.3 ms  gen_ai.usage.input_tokens=5",
        "└─ provider.send  INTERNAL  +0.0 ms  12.3 ms  ERROR timeout  gen_ai.usage.input_tokens=5",
        "   └─ provider.http  CLIENT  +0.0 ms  12.3 ms  gen_ai.usage.input_tokens=5",
    ]
    assert [line for line in lines if "(parent 00000000000000aa is not here)" in line and line.startswith("stray")]


@IN_ONE_WORKER
def test_mlflow_counts_the_tokens_of_gen_ai_attributes(the_mlflow: Mlflow) -> None:
    trace_id = an_id(16)
    post(the_mlflow, an_export(a_span(trace_id)))
    (span,) = the_mlflow.wait_trace(trace_id)
    assert span["attributes"]["mlflow.chat.tokenUsage"] == {"input_tokens": 5}
    assert json.loads(the_mlflow.info(trace_id)["trace_metadata"]["mlflow.trace.tokenUsage"])["input_tokens"] == 5


@IN_ONE_WORKER
def test_mlflow_wants_to_know_the_experiment(the_mlflow: Mlflow) -> None:
    headers = {"Content-Type": "application/json"}
    body = json.dumps(an_export(a_span(an_id(16)))).encode()
    with urllib3.PoolManager(retries=False) as pool:
        assert pool.request("POST", f"{the_mlflow.endpoint}/v1/traces", body=body, headers=headers).status == 422


def test_nginx_stands_in_front_of_a_collector_as_a_gateway(the_collector: Collector, tmp_path: Path) -> None:
    need(nginx)
    conf = """
        server {
            listen 127.0.0.1:%PORT%;
            location / { return 404; }
            location = /moved/v1/traces { return 302 /login; }
            location /otlp/ {
                if ($http_x_axiom_dataset != "llm") { return 403; }
                auth_basic "gateway";
                auth_basic_user_file %DIR%/users;
                proxy_pass TARGET/;
            }
        }
    """.replace("TARGET", the_collector.endpoint)
    gateway = nginx(conf, tmp_path)
    (gateway.directory / "users").write_text("123456:{PLAIN}token\n", "utf-8")
    trace_id = an_id(16)
    basic = urllib3.make_headers(basic_auth="123456:token")["authorization"]
    with gateway, urllib3.PoolManager(retries=False) as pool:

        def send(path: str, **headers: str) -> int:
            fields = {"Content-Type": "application/json", **{key.replace("_", "-"): headers[key] for key in headers}}
            body = json.dumps(an_export(a_span(trace_id))).encode()
            return pool.request("POST", gateway.endpoint + path, body=body, headers=fields, redirect=False).status

        assert send("/v1/traces") == 404
        assert send("/moved/v1/traces") == 302
        assert send("/otlp/v1/traces", Authorization=basic) == 403
        assert send("/otlp/v1/traces", X_Axiom_Dataset="llm") == 401
        assert send("/otlp/v1/traces", X_Axiom_Dataset="llm", Authorization=basic) == 200
        until(lambda: len(gateway.access_log()) == 5, 5, gateway.log_text)
    assert [line.split('"')[2].split()[0] for line in gateway.access_log()] == ["404", "302", "403", "401", "200"]
    assert len(spans_of(the_collector, trace_id)) == 1


def test_a_collector_that_was_stopped_comes_back_where_it_was_with_what_it_had(the_collector: Collector) -> None:
    first, second, endpoint = an_id(16), an_id(16), the_collector.endpoint
    post(the_collector, an_export(a_span(first)))
    the_collector.stop()
    with pytest.raises(urllib3.exceptions.NewConnectionError):
        post(the_collector, an_export(a_span(second)))
    the_collector.start()
    assert the_collector.endpoint == endpoint
    post(the_collector, an_export(a_span(second)))
    spans_of(the_collector, second)
    assert [span["trace_id"] for span in the_collector.spans()] == [first, second]


def test_what_the_collector_accepted_outlives_a_kill(the_collector: Collector) -> None:
    trace_ids = [an_id(16) for _ in range(20)]
    for trace_id in trace_ids:
        post(the_collector, an_export(a_span(trace_id)))
    os.killpg(the_collector.pid, signal.SIGKILL)
    assert [span["trace_id"] for span in the_collector.spans()] == trace_ids


def test_a_paused_collector_hangs_until_it_is_resumed(the_collector: Collector) -> None:
    trace_id = an_id(16)
    body = json.dumps(an_export(a_span(trace_id))).encode()
    headers = {"Content-Type": "application/json"}
    the_collector.pause()
    with urllib3.PoolManager(retries=False, timeout=0.5) as pool:
        with pytest.raises(urllib3.exceptions.ReadTimeoutError):
            pool.request("POST", f"{the_collector.endpoint}/v1/traces", body=body, headers=headers)
        the_collector.resume()
        assert pool.request("POST", f"{the_collector.endpoint}/v1/traces", body=body, headers=headers).status == 200
    spans_of(the_collector, trace_id)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.name)
def test_a_backend_that_is_left_leaves_no_process_behind(kind: type[Backend], tmp_path: Path) -> None:
    need(kind)
    with kind(tmp_path) as running:
        group = running.pid
        os.killpg(group, 0)
    with pytest.raises(ProcessLookupError):
        os.killpg(group, 0)


def test_a_backend_that_cannot_start_says_what_it_printed(tmp_path: Path) -> None:
    class Broken(Backend):
        name = "broken"

        def command(self) -> list[str]:
            return [sys.executable, "-c", "raise SystemExit('no configuration')"]

    with pytest.raises(AssertionError, match="ended at once: no configuration"), Broken(tmp_path):
        pytest.fail("it was entered")


def test_a_backend_that_is_not_installed_says_what_would_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BACKENDS_DIR", str(tmp_path))
    reasons = [kind.available() for kind in ALL]
    assert reasons == [f"{kind.name} is not installed (tests/backends/install.sh)" for kind in ALL]


def test_an_attribute_that_is_there_twice_is_no_span_of_ours() -> None:
    twice = [{"key": "a", "value": {"intValue": 1}}, {"key": "a", "value": {"intValue": 2}}]
    with pytest.raises(ValueError, match="attribute a is there twice"):
        reader.spans(an_export(a_span(an_id(16), attributes=twice)))


def test_every_kind_of_value_is_read_as_its_own_type() -> None:
    raw: list[dict[str, Any]] = [
        {"stringValue": "x"},
        {"boolValue": False},
        {"intValue": "9007199254740993"},
        {"doubleValue": 1},
        {"doubleValue": "NaN"},
        {"bytesValue": "AAE="},
        {"arrayValue": {}},
        {"kvlistValue": {"values": [{"key": "k", "value": {"intValue": 1}}]}},
        {},
    ]
    read = [reader.value(item) for item in raw]
    assert [repr(item) for item in read] == [
        "'x'",
        "False",
        "9007199254740993",
        "1.0",
        "nan",
        r"b'\x00\x01'",
        "[]",
        "{'k': 1}",
        "None",
    ]
