"""The real telemetry backends the tests send to: started on free loopback ports for one test, gone after it.

    need(collector)                          # skips the test with a reason where it is not installed
    with collector(tmp_path) as backend:
        ...                                  # send to backend.endpoint + "/v1/traces"
        spans = backend.wait_for(lambda: backend.spans(), timeout=5)

`install.sh` puts them where `process.installed()` looks. All of them give what they received in the shapes of `otlp`.
"""

from __future__ import annotations

import base64
import json
import os
from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar
from urllib.parse import urlencode

import pytest

from . import otlp
from .otlp import Attributes, Json, LogRecord, Metric, Span, tree
from .process import Backend, answers, get_json, installed, program, reason_without_program, until

__all__ = [
    "Attributes",
    "Backend",
    "Collector",
    "Jaeger",
    "LogRecord",
    "Metric",
    "Mlflow",
    "MockOtlp",
    "Nginx",
    "Span",
    "collector",
    "jaeger",
    "mlflow",
    "mockotlp",
    "need",
    "nginx",
    "tree",
]

USER, SECRET = "router", "collector-secret"
T = TypeVar("T")


def need(backend: type[Backend]) -> None:
    """Skips the running test with the reason why the backend cannot be had."""
    if reason := backend.available():
        pytest.skip(reason)


class _Received(Backend):
    """A backend that writes every export it gets as one line of OTLP JSON."""

    def __init__(self, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self._lines: list[Json] = []
        self._read = 0

    def spans(self) -> list[Span]:
        return [span for export in self.exports() for span in otlp.spans(export)]

    def metrics(self) -> list[Metric]:
        return [metric for export in self.exports() for metric in otlp.metrics(export)]

    def log_records(self) -> list[LogRecord]:
        return [record for export in self.exports() for record in otlp.log_records(export)]

    def trace(self, trace_id: str) -> list[Span]:
        return [span for span in self.spans() if span["trace_id"] == trace_id]

    def exports(self) -> list[Json]:
        """Every export request in the order of arrival, as OTLP JSON."""
        return self._parsed()

    def wait_for(self, predicate: Callable[[], T], timeout: float = 10) -> T:
        """The first true value of predicate(); AssertionError with what had arrived by then."""
        return until(predicate, timeout, lambda: f"{self._summary()}\n{self.log_text()[-2000:]}")

    @abstractmethod
    def _file(self) -> Path: ...

    def _parsed(self) -> list[Json]:
        """The file's lines; only what was added since the last call is read, and a half written line waits."""
        if self._file().exists():
            with self._file().open("rb") as file:
                file.seek(self._read)
                whole, newline, _ = file.read().rpartition(b"\n")
            self._read += len(whole + newline)
            self._lines += [json.loads(line) for line in whole.splitlines()]
        return self._lines

    def _summary(self) -> str:
        names = [span["name"] for span in self.spans()]
        return f"spans {names}, {len(self.metrics())} metrics, {len(self.log_records())} log records"


class Collector(_Received):
    """The OpenTelemetry Collector: all three signals, strictly read. With auth it wants the header in `headers`."""

    name = "collector"
    ports_needed = 2

    def __init__(self, tmp_path: Path, *, auth: Literal["basic", "bearer"] | None = None) -> None:
        super().__init__(tmp_path)
        self.headers: dict[str, str] = {"Authorization": _AUTHORIZATION[auth]} if auth else {}
        self._auth = auth

    def command(self) -> list[str]:
        config = self.directory / "collector.json"
        config.write_text(json.dumps(self._config()), "utf-8")
        return [str(installed() / "collector" / "otelcol"), "--config", str(config)]

    def ready(self) -> bool:
        return answers(f"http://127.0.0.1:{self.ports[1]}/")

    def _config(self) -> Json:
        http: Json = {"endpoint": f"127.0.0.1:{self.ports[0]}"}
        if self._auth:
            http["auth"] = {"authenticator": _AUTHENTICATORS[self._auth]}
        pipeline = {"receivers": ["otlp"], "exporters": ["file", "debug"]}
        return {
            "extensions": {
                "health_check": {"endpoint": f"127.0.0.1:{self.ports[1]}"},
                "basicauth": {"htpasswd": {"inline": f"{USER}:{SECRET}"}},
                "bearertokenauth": {"token": SECRET},
            },
            "receivers": {"otlp": {"protocols": {"http": http}}},
            "exporters": {
                # With rotation (never reached) nothing is buffered: what was answered 200 is in the file, come what may.
                "file": {"path": str(self._file()), "rotation": {"max_megabytes": 100_000}},
                "debug": {"verbosity": "basic"},
            },
            "service": {
                "extensions": ["health_check", "basicauth", "bearertokenauth"],
                "pipelines": {"traces": pipeline, "metrics": pipeline, "logs": pipeline},
                "telemetry": {"metrics": {"level": "none"}},
            },
        }

    def _file(self) -> Path:
        return self.directory / "received.jsonl"


_AUTHENTICATORS = {"basic": "basicauth", "bearer": "bearertokenauth"}
_AUTHORIZATION = {
    "basic": "Basic " + base64.b64encode(f"{USER}:{SECRET}".encode()).decode(),
    "bearer": f"Bearer {SECRET}",
}


class MockOtlp(_Received):
    """Elastic's recorder: keeps whatever it is sent and the headers it came with; answers 200 and validates nothing."""

    name = "mockotlp"

    @classmethod
    def available(cls) -> str | None:
        return super().available() or reason_without_program("node")

    def command(self) -> list[str]:
        return ["node", str(Path(__file__).with_name("mockotlp.js")), str(self.ports[0])]

    def environment(self) -> dict[str, str]:
        return {**super().environment(), "NODE_PATH": str(installed() / "npm" / "node_modules")}

    def exports(self) -> list[Json]:
        return [line["export"] for line in self._parsed() if "export" in line]

    def requests(self) -> list[Json]:
        """method, path and headers (names in lower case) of every request."""
        return [line["request"] for line in self._parsed() if "request" in line]

    def faults(self) -> list[str]:
        """What it could not parse, and had answered 200 all the same. It does not know gzip."""
        return [line["fault"] for line in self._parsed() if "fault" in line]

    def _file(self) -> Path:
        return self.log


class Jaeger(Backend):
    """Jaeger v2 with its memory store, read through its query APIs. Its page at `query` is a placeholder: the modules
    it is built from do not hold the user interface."""

    name = "jaeger"
    ports_needed = 4

    @property
    def query(self) -> str:
        return f"http://127.0.0.1:{self.ports[1]}"

    def trace(self, trace_id: str) -> list[Span]:
        """The trace's spans in the order of their start; none when it does not know the trace."""
        found = get_json(f"{self.query}/api/v3/traces/{trace_id}")
        return sorted(otlp.spans(found["result"]), key=lambda span: span["start"]) if found else []

    def find(self, service: str, tags: dict[str, str] | None = None, *, name: str = "", limit: int = 100) -> list[str]:
        """The ids of traces that have a span of this service (and name) with all these tags, compared as text. Not
        for the tag `error`: this version's memory store takes the text "true" for false."""
        query = {"service": service, "limit": str(limit), "lookback": "1h"}
        query |= {"operation": name} if name else {}
        query |= {"tags": json.dumps(tags)} if tags else {}
        found = get_json(f"{self.query}/api/traces?{urlencode(query)}")
        return [trace["traceID"] for trace in found["data"]]

    def services(self) -> list[str]:
        services: list[str] = get_json(f"{self.query}/api/v3/services").get("services", [])
        return services

    def wait_trace(self, trace_id: str, spans: int = 1, timeout: float = 10) -> list[Span]:
        """The trace once it has at least so many spans."""
        until(lambda: len(self.trace(trace_id)) >= spans, timeout, lambda: f"so far:\n{self.tree(trace_id)}")
        return self.trace(trace_id)

    def tree(self, trace: str | Iterable[Span], show: Sequence[str] = ()) -> str:
        """The trace (or its id) as an indented text tree with durations and the attributes asked for."""
        return tree(self.trace(trace) if isinstance(trace, str) else trace, show)

    def command(self) -> list[str]:
        config = self.directory / "jaeger.json"
        config.write_text(json.dumps(self._config()), "utf-8")
        return [str(installed() / "jaeger" / "jaeger"), "--config", str(config)]

    def ready(self) -> bool:
        return answers(f"http://127.0.0.1:{self.ports[3]}/status") and answers(f"{self.query}/api/v3/services")

    def _config(self) -> Json:
        http, query, grpc, health = ({"endpoint": f"127.0.0.1:{port}"} for port in self.ports)
        storage = {"storage": {"traces": "memory"}}
        return {
            "extensions": {
                # Jaeger traces itself unless told not to, and waits for a collector at 4317 before it ends.
                "jaeger_query": {**storage, "http": query, "grpc": grpc, "enable_tracing": False},
                "jaeger_storage": {"backends": {"memory": {"memory": {"max_traces": 100000}}}},
                "healthcheckv2": {"use_v2": True, "http": health},
            },
            "receivers": {"otlp": {"protocols": {"http": http}}},
            "exporters": {"jaeger_storage_exporter": {"trace_storage": "memory"}},
            "service": {
                "extensions": ["jaeger_storage", "jaeger_query", "healthcheckv2"],
                "pipelines": {"traces": {"receivers": ["otlp"], "exporters": ["jaeger_storage_exporter"]}},
                "telemetry": {"metrics": {"level": "none"}},
            },
        }


class Mlflow(Backend):
    """MLflow's tracking server with a SQLite store: a second reader of gen_ai attributes. Send it `headers` as well."""

    name = "mlflow"
    start_timeout = 90
    headers: ClassVar[dict[str, str]] = {"x-mlflow-experiment-id": "0"}

    def trace(self, trace_id: str) -> list[Span]:
        """The trace's spans with the attributes MLflow made of them (mlflow.*) beside those sent; their kind is lost."""
        found = self._get(trace_id)
        return sorted(otlp.spans(_one_scope(found["spans"])), key=lambda span: span["start"]) if found else []

    def info(self, trace_id: str) -> Json:
        """What MLflow shows of the trace as a whole: state, execution_duration, trace_metadata, tags."""
        found = self._get(trace_id)
        info: Json = found["trace_info"] if found else {}
        return info

    def wait_trace(self, trace_id: str, spans: int = 1, timeout: float = 20) -> list[Span]:
        until(lambda: len(self.trace(trace_id)) >= spans, timeout, self.log_text)
        return self.trace(trace_id)

    def command(self) -> list[str]:
        program = str(installed() / "mlflow" / "bin" / "mlflow")
        store = f"sqlite:///{self.directory}/mlflow.db"
        address = ["--host", "127.0.0.1", "--port", str(self.ports[0]), "--workers", "1"]
        return [program, "server", *address, "--backend-store-uri", store, "--artifacts-destination", "artifacts"]

    def environment(self) -> dict[str, str]:
        # The job runner is seven more processes and a gigabyte; usage reports have nowhere to go from a test.
        return {**super().environment(), "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}

    def ready(self) -> bool:
        return answers(f"{self.endpoint}/health")

    def _get(self, trace_id: str) -> Json:
        found = get_json(f"{self.endpoint}/api/3.0/mlflow/traces/get?trace_id=tr-{trace_id}")
        trace: Json = found["trace"] if found else {}
        return trace


def _one_scope(spans: list[Json]) -> Json:
    """MLflow answers with protobuf's own field names; otlp reads those of OTLP JSON."""
    return {"resourceSpans": [{"scopeSpans": [{"spans": [_camel(span) for span in spans]}]}]}


def _camel(raw: Any) -> Any:
    if isinstance(raw, list):
        return [_camel(item) for item in raw]
    if not isinstance(raw, dict):
        return raw
    return {_FIELDS.get(key, key): _camel(item) for key, item in raw.items()}


_FIELDS = {
    name: first + "".join(word.title() for word in rest)
    for name in (
        "trace_id",
        "span_id",
        "parent_span_id",
        "start_time_unix_nano",
        "end_time_unix_nano",
        "time_unix_nano",
        "string_value",
        "bool_value",
        "int_value",
        "double_value",
        "bytes_value",
        "array_value",
        "kvlist_value",
    )
    for first, *rest in [name.split("_")]
}


class Nginx(Backend):
    """nginx with the servers of a configuration; %PORT% in it becomes the port of `endpoint`, %DIR% its directory.

    The text stands inside `http { }`. Access and error log are in the directory."""

    name = "nginx"

    def __init__(self, conf_text: str, tmp_path: Path) -> None:
        super().__init__(tmp_path)
        self._conf_text = conf_text

    @classmethod
    def available(cls) -> str | None:
        return reason_without_program("nginx")

    def access_log(self) -> list[str]:
        return (self.directory / "access.log").read_text("utf-8", "replace").splitlines()

    def command(self) -> list[str]:
        config = self.directory / "nginx.conf"
        text = self._conf_text.replace("%PORT%", str(self.ports[0])).replace("%DIR%", str(self.directory))
        config.write_text(_NGINX % {"user": "user root;" if os.geteuid() == 0 else "", "http": text}, "utf-8")
        return [program("nginx") or "nginx", "-p", f"{self.directory}/", "-c", str(config), "-e", "stderr"]


# Started by root, its workers would be somebody who may not read the test's directory.
_NGINX = """
%(user)s
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr info;
events { worker_connections 256; }
http {
    access_log access.log;
    client_body_temp_path client_body;
    proxy_temp_path proxy;
    fastcgi_temp_path fastcgi;
    uwsgi_temp_path uwsgi;
    scgi_temp_path scgi;
%(http)s
}
"""

collector, jaeger, mlflow, mockotlp, nginx = Collector, Jaeger, Mlflow, MockOtlp, Nginx
