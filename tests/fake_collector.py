"""An OTLP/HTTP receiver made of a bare socket, so that it can also misbehave: slow, cut, endless, redirecting, lying."""

from __future__ import annotations

import gzip
import json
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any


@dataclass(frozen=True)
class Reply:
    """One answer of the receiver; `raw` replaces all of it but the waiting."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "application/json"})
    body: bytes = b'{"partialSuccess":{}}'
    wait: float = 0.0  # before the first byte
    trickle: float = 0.0  # between single bytes
    reset: bool = False  # RST instead of an answer
    hang: bool = False  # no answer until the end of the test
    keep: bool = False  # the connection stays open for another request
    raw: bytes | None = None

    def wire(self) -> bytes:
        if self.raw is not None:
            return self.raw
        closing = {} if self.keep else {"Connection": "close"}
        headers = {"Content-Length": str(len(self.body))} | closing | self.headers
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        return f"HTTP/1.1 {self.status} Somehow\r\n{head}\r\n".encode("latin-1") + self.body


OK = Reply()


@dataclass(frozen=True)
class Received:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes  # as it came
    at: float

    @property
    def text(self) -> bytes:
        return gzip.decompress(self.body) if self.headers.get("content-encoding") == "gzip" else self.body

    @property
    def document(self) -> dict[str, Any]:
        made: dict[str, Any] = json.loads(self.text)
        return made

    def spans(self) -> Iterator[dict[str, Any]]:
        for resource in self.document["resourceSpans"]:
            for scope in resource["scopeSpans"]:
                yield from scope["spans"]


class FakeCollector:
    """Answers each request with the next Reply of its script; the last one stays."""

    def __init__(self, *script: Reply, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> None:
        self._script, self._tls, self._host = list(script) or [OK], tls, host
        self._chosen: Callable[[Received], Reply] | None = None
        self._lock = threading.Lock()
        self.received: list[Received] = []
        self.connections = self.open = 0
        self._ended = threading.Event()
        self._listener = socket.create_server((host, 0), backlog=128, family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.port: int = self._listener.getsockname()[1]
        self._thread = threading.Thread(target=self._serve, daemon=True)

    def __enter__(self) -> FakeCollector:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._ended.set()
        with socket.create_connection((self._host, self.port), 1):  # wakes accept
            self._thread.join(2)
        self._listener.close()

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self._host}:{self.port}/v1/traces"

    def script(self, *replies: Reply) -> None:
        with self._lock:
            self._script = list(replies)

    def answer_with(self, chosen: Callable[[Received], Reply]) -> None:
        """Answer each request by what it is."""
        self._chosen = chosen

    def _next(self) -> Reply:
        return self._script.pop(0) if len(self._script) > 1 else self._script[0]

    def spans(self) -> list[dict[str, Any]]:
        return [span for request in list(self.received) for span in request.spans()]

    def generations(self) -> list[str]:
        """The generation ids in the order they arrived."""
        found = []
        for span in self.spans():
            pairs = {pair["key"]: pair["value"] for pair in span["attributes"]}
            if pairs.get("span.type") == {"stringValue": "generation"}:
                found.append(pairs["gen_ai.response.id"]["stringValue"])
        return found

    def _serve(self) -> None:
        while not self._ended.is_set():
            connection, _ = self._listener.accept()
            self.connections += 1
            threading.Thread(target=self._talk, args=(connection,), daemon=True).start()

    def _talk(self, connection: socket.socket) -> None:
        with self._lock:
            self.open += 1
        with connection:
            try:
                connection.settimeout(30)
                stream = self._tls.wrap_socket(connection, server_side=True) if self._tls else connection
                with stream:
                    while self._answer(stream):
                        pass
            except (OSError, ValueError):
                return  # the other side left: that is what is being tested
            finally:
                with self._lock:
                    self.open -= 1

    def _answer(self, stream: socket.socket) -> bool:
        """Answer one request; true if another may come on this connection."""
        received = read_request(stream)
        if received is None:
            return False
        with self._lock:
            self.received.append(received)
            reply = self._chosen(received) if self._chosen else self._next()
        if reply.hang:
            self._ended.wait(60)
            return False
        if reply.wait:
            self._ended.wait(reply.wait)
        if reply.reset:
            stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if not reply.trickle:
            stream.sendall(reply.wire())
            return reply.keep
        for byte in reply.wire():
            stream.sendall(bytes([byte]))
            if self._ended.wait(reply.trickle):
                return False
        return reply.keep


def read_request(stream: socket.socket) -> Received | None:
    data = b""
    while b"\r\n\r\n" not in data:
        more = stream.recv(65536)
        if not more:
            return None
        data += more
    head, _, body = data.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    while len(body) < int(headers.get("content-length", "0")):
        more = stream.recv(1 << 20)
        if not more:
            return None
        body += more
    return Received(method, path, headers, body, time.monotonic())


def until(true: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something to become true, and give it; fails the test after the deadline."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := true():
            return found
        time.sleep(0.005)
    raise AssertionError(f"did not become true within {seconds} s")
