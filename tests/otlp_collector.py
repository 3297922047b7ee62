"""A collector that reads strictly what it is sent and answers whatever a test wants it to.

It speaks raw sockets, so that an answer can be cut, trickled, endless or missing. What it accepts it decodes with the
official protobuf messages; what breaks a rule of OTLP is kept in `faults` and refused with 400.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from backends import otlp
from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceRequest, ExportLogsServiceResponse
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest, ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest, ExportTraceServiceResponse

T = TypeVar("T")
KINDS: dict[str, Any] = {
    "/v1/traces": ExportTraceServiceRequest, "/v1/metrics": ExportMetricsServiceRequest, "/v1/logs": ExportLogsServiceRequest,
}  # fmt: skip
ANSWERS: dict[str, tuple[Any, str]] = {
    "/v1/traces": (ExportTraceServiceResponse, "rejected_spans"),
    "/v1/metrics": (ExportMetricsServiceResponse, "rejected_data_points"),
    "/v1/logs": (ExportLogsServiceResponse, "rejected_log_records"),
}  # fmt: skip
HANG = object()
"""As a step of an answer: say nothing more, until the collector is closed or the client leaves."""
CLOSE = object()
"""As a step of an answer: end the connection in order."""
RESET = object()
"""As a step of an answer: break the connection with RST."""
Step = bytes | float | object
"""Bytes are sent, a number of seconds is waited."""


def reply(status: int, body: bytes = b"", content_type: str | None = "application/x-protobuf", **headers: str) -> bytes:
    """An HTTP answer."""
    lines = [f"HTTP/1.1 {status} Scripted", f"Content-Length: {len(body)}"]
    lines += [f"Content-Type: {content_type}"] if content_type else []
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


OK = reply(200)


def partial(path: str, rejected: int, message: str) -> bytes:
    """What a collector answers that took only a part."""
    kind, count = ANSWERS[path]
    return reply(200, kind(partial_success={count: rejected, "error_message": message}).SerializeToString())


def until(condition: Callable[[], T | Literal[False]], seconds: float = 10.0, what: str = "") -> T:
    """Polls until the condition holds and gives its value; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}; last seen: {value!r}"
        time.sleep(0.01)
    return value


@dataclass
class Received:
    """One request as it came; `export` is its content as OTLP JSON has it."""

    path: str
    headers: dict[str, str]
    body: bytes
    at: float
    export: dict[str, Any] = field(default_factory=dict)


class OtlpCollector:
    """Listens from the start; `script(path, ...)` tells what the next requests to a path are answered, after that OK."""

    def __init__(self, port: int = 0, tls: ssl.SSLContext | None = None) -> None:
        self.received: list[Received] = []
        self.faults: list[str] = []
        self.always: dict[str, Sequence[Step]] = {}
        self._scripts: dict[str, deque[Sequence[Step]]] = {path: deque() for path in KINDS}
        self._closing = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", port))
        self._connections: list[socket.socket] = []
        self.port: int = self._listener.getsockname()[1]
        self.url = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        self._tls = tls
        threading.Thread(target=self._accept, daemon=True).start()

    def script(self, path: str, *answers: bytes | Sequence[Step]) -> None:
        self._scripts[path].extend([a] if isinstance(a, bytes) else a for a in answers)

    def answer_always(self, answer: bytes | Sequence[Step], *paths: str) -> None:
        for path in paths or KINDS:
            self.always[path] = [answer] if isinstance(answer, bytes) else answer

    def close(self) -> None:
        self._closing.set()
        for open_one in (self._listener, *self._connections):  # a thread that waits in accept would get one more
            with contextlib.suppress(OSError):
                open_one.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    # what came
    def exports(self, path: str) -> Iterator[dict[str, Any]]:
        return (r.export for r in list(self.received) if r.path == path)

    def spans(self) -> list[otlp.Span]:
        return [span for export in self.exports("/v1/traces") for span in otlp.spans(export)]

    def log_records(self) -> list[otlp.LogRecord]:
        return [line for export in self.exports("/v1/logs") for line in otlp.log_records(export)]

    def metrics(self) -> dict[str, otlp.Metric]:
        """The metrics by name as the last export told them."""
        exports = list(self.exports("/v1/metrics"))
        return {m["name"]: m for m in otlp.metrics(exports[-1])} if exports else {}

    def everything(self) -> bytes:
        return b"\n".join(repr(r.headers).encode() + r.body for r in self.received)

    # the server
    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), self._tls.wrap_socket(connection, True) if self._tls else connection as connection:
            source = connection.makefile("rb")
            while request := self._read(source):
                self._take(request)
                if not self._play(connection, request):
                    return

    def _read(self, source: Any) -> Received | None:
        line = source.readline().split()
        if len(line) != 3:
            return None
        headers: dict[str, str] = {}
        while (field_line := source.readline().strip()) != b"":
            name, _, value = field_line.decode("latin-1").partition(":")
            headers[name.lower()] = value.strip()
        length = int(headers.get("content-length", "0"))
        body = source.read(length)
        if len(body) < length:
            return None  # the sender gave up
        return Received(line[1].decode(), headers, body, time.monotonic())

    def _take(self, request: Received) -> None:
        problems = list(_problems(request))
        self.faults += problems
        self.received.append(request)

    def _play(self, connection: socket.socket, request: Received) -> bool:
        script = self._scripts.get(request.path)
        steps = script.popleft() if script else self.always.get(request.path, [OK])
        for step in steps:
            if step is HANG:
                self._closing.wait()
                return False
            if step is CLOSE:
                return False
            if step is RESET:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return False
            if isinstance(step, bytes):
                connection.sendall(step)
            elif isinstance(step, threading.Event):
                step.wait(30)
            elif isinstance(step, float) and self._closing.wait(step):
                return False
        return True


def _problems(request: Received) -> Iterator[str]:
    """What breaks a rule of OTLP/HTTP; reads the export on the way."""
    kind = KINDS.get(request.path)
    if kind is None:
        yield f"unknown path {request.path}"
        return
    if request.headers.get("content-type") != "application/x-protobuf":
        yield f"content-type {request.headers.get('content-type')}"
    try:
        message = kind.FromString(request.body)
    except DecodeError as e:
        yield f"not protobuf: {e}"
        return
    request.export = MessageToDict(message, use_integers_for_enums=True)
    try:
        found: Any = {"/v1/traces": otlp.spans, "/v1/metrics": otlp.metrics, "/v1/logs": otlp.log_records}[request.path](
            request.export
        )
    except (ValueError, KeyError) as e:
        yield f"{request.path}: {e!r}"
        return
    if not found:
        yield f"an empty export to {request.path}"
    for item in found:
        if not item["resource"].get("service.name"):
            yield "no service.name"
        if request.path == "/v1/traces":
            yield from _span_problems(item)


def _span_problems(span: otlp.Span) -> Iterator[str]:
    for name in ("trace_id", "span_id"):
        if set(span[name]) == {"0"}:
            yield f"{name} is all zero"
    if span["end"] < span["start"] or not span["start"]:
        yield f"{span['name']}: from {span['start']} to {span['end']}"
    if span["parent_span_id"] == span["span_id"]:
        yield f"{span['name']} is its own parent"
    if not span["name"] or span["kind"] == "unspecified":
        yield f"a span without name or kind: {span}"
