"""A provider that says exactly the bytes a test wrote down, and remembers exactly what it was asked.

http.server hides half of the faults a router must survive, so this one speaks raw sockets: a `Script` is a row of
steps, each of them one thing done to the connection (send these bytes, wait, reset). Scripts are added with `+`. Each
POST takes the next script of the queue, else the default. A connection lives on as HTTP/1.1 says unless a step
ended it, and the time at which the other side closed it is kept with the request that was running.
"""

from __future__ import annotations

import contextlib
import json
import select
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Usage = dict[str, Any]


class Gone(Exception):
    """The router closed the connection while a script was running."""


class Finished(Exception):
    """A step ended the connection; nothing further may be read from it."""


class Broken(Finished):
    """Ended without a word: the sockets' owner closes it now, and lingering is off."""


@dataclass
class Received:
    """One request as it arrived."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes
    connection: int
    at: float
    _closed: threading.Event = field(default_factory=threading.Event)
    closed_at: float | None = None
    answered: threading.Event = field(default_factory=threading.Event)

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key.lower() == name.lower()), None)

    def json(self) -> Any:
        return json.loads(self.body)

    def closed_within(self, seconds: float) -> bool:
        """Whether the router closed this request's connection, waiting that long for it."""
        return self._closed.wait(seconds)

    def close_seen(self) -> None:
        if self.closed_at is None:
            self.closed_at = time.monotonic()
            self._closed.set()


class Wire:
    """A connection as the steps see it."""

    def __init__(self, sock: socket.socket, stopping: threading.Event) -> None:
        self.sock = sock
        self._stopping = stopping

    def send(self, data: bytes) -> None:
        try:
            self.sock.sendall(data)
        except OSError as broken:
            raise Gone from broken

    def wait(self, seconds: float, until: threading.Event | None = None) -> None:
        """Waits, but not for a peer that has left."""
        deadline = time.monotonic() + seconds
        while not (until and until.is_set()):
            left = deadline - time.monotonic()
            if left <= 0 or self._stopping.is_set():
                return
            if self._left(min(left, 0.02)):
                raise Gone

    def _left(self, seconds: float) -> bool:
        poller = select.poll()
        poller.register(self.sock, select.POLLIN | select.POLLRDHUP)
        for _, event in poller.poll(seconds * 1000):
            if event & (select.POLLRDHUP | select.POLLHUP | select.POLLERR):
                return True
            time.sleep(min(seconds, 0.01))  # pipelined bytes keep POLLIN set; do not spin on them
        return False


Step = Callable[[Wire], None]


class Script:
    """A row of steps; `+` puts rows behind each other."""

    def __init__(self, *steps: Step) -> None:
        self.steps = steps

    def __add__(self, other: Script) -> Script:
        return Script(*self.steps, *other.steps)

    def run(self, wire: Wire) -> None:
        for step in self.steps:
            step(wire)


# --- single steps


def raw(data: bytes) -> Script:
    return Script(lambda wire: wire.send(data))


def pause(seconds: float) -> Script:
    return Script(lambda wire: wire.wait(seconds))


def hold(until: threading.Event, at_most: float = 30.0) -> Script:
    """Waits for the test to say go on."""
    return Script(lambda wire: wire.wait(at_most, until))


def silence() -> Script:
    """Says nothing for longer than any test lasts."""
    return pause(120.0)


def tell(event: threading.Event) -> Script:
    """Lets the test know that the script has come this far."""
    return Script(lambda wire: event.set())


def trickle(data: bytes, every: float) -> Script:
    def step(wire: Wire) -> None:
        for number in range(len(data)):
            wire.send(data[number : number + 1])
            wire.wait(every)

    return Script(step)


def reset() -> Script:
    def step(wire: Wire) -> None:
        wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        raise Broken

    return Script(step)


def fin() -> Script:
    def step(wire: Wire) -> None:
        with contextlib.suppress(OSError):
            wire.sock.shutdown(socket.SHUT_WR)
        raise Finished

    return Script(step)


# --- whole answers

REASONS = {200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 429: "Too Many Requests"}


def head(status: int = 200, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, 'Whatever')}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def answer(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Script:
    """A body with its Content-Length."""
    fields = {"Content-Type": "application/json", **(headers or {})}
    return raw(head(status, {**fields, "Content-Length": str(len(body))}) + body)


def json_answer(obj: Any, status: int = 200, headers: dict[str, str] | None = None) -> Script:
    return answer(json.dumps(obj).encode(), status, headers)


def error_answer(status: int, message: str = "no", headers: dict[str, str] | None = None, **more: Any) -> Script:
    """An error as OpenAI words it."""
    error = {"message": message, "type": "upstream_said_so", "param": None, "code": None, **more}
    return json_answer({"error": error}, status, headers)


STREAM_HEADERS = {"Content-Type": "text/event-stream"}


def stream_head(framing: str = "chunked", headers: dict[str, str] | None = None) -> Script:
    """The head of an event stream; framing is chunked or close."""
    how = {"chunked": {"Transfer-Encoding": "chunked"}, "close": {"Connection": "close"}}[framing]
    return raw(head(200, {**STREAM_HEADERS, **how, **(headers or {})}))


def framed(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def chunks(pieces: Iterable[bytes], gap: float = 0.0) -> Script:
    """Pieces of a chunked body, each sent by itself, without the end."""
    pieces = list(pieces)

    def step(wire: Wire) -> None:
        for piece in pieces:
            wire.send(framed(piece))
            if gap:
                wire.wait(gap)

    return Script(step)


def end() -> Script:
    """The proper end of a chunked body."""
    return raw(b"0\r\n\r\n")


def stream(pieces: Sequence[bytes], gap: float = 0.0, framing: str = "chunked", headers: dict[str, str] | None = None) -> Script:
    """A whole event stream, ended as its framing ends; framing is chunked, length or close."""
    if framing == "length":
        body = b"".join(pieces)
        return raw(head(200, {**STREAM_HEADERS, "Content-Length": str(len(body)), **(headers or {})}) + body)
    if framing == "chunked":
        return stream_head("chunked", headers) + chunks(pieces, gap) + end()
    script = stream_head("close", headers)
    for piece in pieces:
        script += raw(piece) + pause(gap)
    return script + fin()


# --- what OpenAI would say


def chat_completion(text: str = "hello there", usage: Usage | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion",
        "created": 1700000000,
        "model": "fake-model-0613",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": text, "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": usage or {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9},
        **more,
    }


def event(obj: Any) -> bytes:
    return b"data: " + json.dumps(obj).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


def chunk_object(delta: dict[str, Any] | None = None, finish: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "id": "chatcmpl-fake",
        "object": "chat.completion.chunk",
        "created": 1700000000,
        "model": "fake-model-0613",
        "choices": [{"index": 0, "delta": delta or {}, "logprobs": None, "finish_reason": finish}],
        **more,
    }


def usage_object(usage: Usage) -> dict[str, Any]:
    return {**chunk_object(), "choices": [], "usage": usage}


def openai_chunks(
    text: str = "one two three",
    usage: Usage | None = None,
    finish: str | None = "stop",
    done: bool = True,
) -> list[bytes]:
    """The events of a streamed chat completion, a word each; usage rides an own chunk as OpenAI sends it."""
    words = text.split(" ")
    spoken = [word if number == 0 else " " + word for number, word in enumerate(words)]
    events = [event(chunk_object({"role": "assistant", "content": ""}))]
    events += [event(chunk_object({"content": word})) for word in spoken]
    if finish:
        events.append(event(chunk_object({}, finish)))
    if usage:
        events.append(event(usage_object(usage)))
    return [*events, DONE] if done else events


def completion_for(received: Received) -> Script:
    """What a well-behaved provider answers: a stream if asked for one, usage if asked for it."""
    if received.method != "POST":
        return json_answer({"object": "list", "data": []})
    asked = received.json()
    if not asked.get("stream"):
        return json_answer(chat_completion())
    wants_usage = (asked.get("stream_options") or {}).get("include_usage")
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10} if wants_usage else None
    return stream(openai_chunks("one two three", usage))


# --- the server


class FakeUpstream:
    """Listens on a loopback port of the system's choice until closed."""

    def __init__(self) -> None:
        self.requests: list[Received] = []
        self.connections = 0
        self.default: Script | Callable[[Received], Script] = completion_for
        self._queue: deque[Script | Callable[[Received], Script]] = deque()
        self._arrived = threading.Condition()
        self._stopping = threading.Event()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._accept, name="fake-upstream", daemon=True)
        self._thread.start()

    def script(self, *scripts: Script | Callable[[Received], Script]) -> None:
        """What the next POSTs get, one script each; a GET (a look at the models) never takes one."""
        self._queue.extend(scripts)

    def wait_for(self, count: int, seconds: float = 10.0) -> list[Received]:
        """The first `count` requests, once they are here."""
        with self._arrived:
            arrived = self._arrived.wait_for(lambda: len(self.requests) >= count, seconds)
        assert arrived, f"{len(self.requests)} of {count} requests reached the upstream in {seconds} s"
        return self.requests[:count]

    @property
    def posts(self) -> list[Received]:
        return [request for request in self.requests if request.method == "POST"]

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def close(self) -> None:
        self._stopping.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for sock in list(self._open):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(5)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.connections += 1
            self._open.add(sock)
            arguments = (sock, self.connections)
            threading.Thread(target=self._converse, args=arguments, name="fake-upstream", daemon=True).start()

    def _converse(self, sock: socket.socket, number: int) -> None:
        last: Received | None = None
        try:
            with sock, sock.makefile("rb") as source:
                while received := _read_request(source, number):
                    last = received
                    self._answer(received, Wire(sock, self._stopping))
        except (Gone, OSError, ValueError):
            pass  # how the other side left does not matter, that it left is noted below
        except Finished:
            return
        finally:
            self._open.discard(sock)
            if last:
                last.close_seen()

    def _answer(self, received: Received, wire: Wire) -> None:
        scripted = self._queue and received.method == "POST"
        script = self._queue.popleft() if scripted else self.default
        with self._arrived:
            self.requests.append(received)
            self._arrived.notify_all()
        try:
            (script(received) if callable(script) else script).run(wire)
            received.answered.set()
        except Finished as ended:
            received.answered.set()
            if not isinstance(ended, Broken):
                _wait_for_close(wire.sock)
            raise


def _wait_for_close(sock: socket.socket) -> None:
    """After our FIN the other side may still be sending; wait for its own."""
    with contextlib.suppress(OSError):
        sock.settimeout(5)
        while sock.recv(65536):
            pass


def _read_request(source: Any, connection: int) -> Received | None:
    line = source.readline(1 << 20)
    if not line:
        return None
    method, path, _ = line.decode("latin-1").split(" ", 2)
    headers = list(_headers(source))
    by_name = {name.lower(): value for name, value in headers}
    if by_name.get("transfer-encoding", "").lower() == "chunked":
        body = b"".join(_chunked_body(source))
    else:
        body = source.read(int(by_name.get("content-length", "0")))
    return Received(method, path, headers, body, connection, time.monotonic())


def _headers(source: Any) -> Iterator[tuple[str, str]]:
    while (line := source.readline(1 << 20)) not in (b"\r\n", b"\n", b""):
        name, _, value = line.decode("latin-1").partition(":")
        yield name.strip(), value.strip()


def _chunked_body(source: Any) -> Iterator[bytes]:
    while size := int(source.readline(1 << 16).split(b";")[0], 16):
        yield source.read(size)
        source.readline(16)
    source.readline(16)
