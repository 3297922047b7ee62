"""The live feed: the last requests as they happened, and those who watch.

An event is made into JSON once, in the thread that brings it, and from then on only references travel. What is held is
bounded twice: so many requests, and so many bytes; when the bytes run out the oldest requests lose what was said in them
but keep their numbers, so that their waterfall can still be drawn. A watcher has a bounded queue of its own: one that
reads too slowly loses the oldest events and is told how many.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

CONTENT = ("system", "messages", "tools", "request", "response")
"""The keys of a record that hold what was said; they go last into its JSON, so that they can be cut off."""
LONGEST_TEXT = 32_768
CONTENT_CHARACTERS, HEAD_CHARACTERS = 524_288, 32_768
NODES = 20_000
DEEPEST = 110
EVENTS_OF_A_REQUEST = 16
HEARTBEAT = 15.0
LOOK = 0.5  # how long a watcher may not notice that its client left
GATHER = 0.04  # events of so many seconds go out together: fewer wake-ups, and no eye sees the difference
QUEUE_ITEMS, QUEUE_BYTES = 1_000, 4 * 2**20
PIECE = 256 * 1024
PREVIEW = 160


class Full(Exception):
    """As many watch as may."""


class Held:
    """One request, as far as it has come."""

    __slots__ = ("_bare", "_head", "events", "json", "private", "state", "summary")

    def __init__(self, id: int) -> None:
        self.state: dict[str, Any] = {"id": id, "stage": "start"}
        self.events: list[tuple[int, bytes]] = []
        self.private: dict[str, Any] = {}
        self.json = self.summary = self._bare = b""
        self._head = 0

    def advance(self, event: Mapping[str, Any], number: int, line: bytes) -> None:
        """An event before the last one."""
        names = {"model": "requested_model"} if event["type"] == "start" else {"model": "sent_model"}
        told = {names.get(key, key): value for key, value in event.items() if key != "type"}
        self.state.update(told, ts_ms=self.state.get("ts_ms", event.get("ts_ms")), stage=event["type"])
        if len(self.events) < EVENTS_OF_A_REQUEST:
            self.events.append((number, line))

    def finish(self, number: int, lines: Lines) -> None:
        """The last event, which tells all that the earlier ones did."""
        self.json, self._head, self._bare = lines.full, lines.head, lines.bare
        self.events, self.summary, self.private = [(number, self.json)], lines.summary, lines.private
        self.state = {"id": self.state["id"], "stage": "complete"}

    def slim(self) -> None:
        """Let go of what was said."""
        self.json, self._bare = self.json[: self._head] + self._bare, b""
        self.events = [(number, self.json) for number, _ in self.events]

    @property
    def complete(self) -> bool:
        return bool(self.json)

    @property
    def size(self) -> int:
        return len(self.json) + len(self._bare) + len(self.summary) + 1_000

    def record(self) -> dict[str, Any] | None:
        """The record, once there is one."""
        return json.loads(self.json) if self.json else None


class Lines:
    """A record as JSON: all of it, and what replaces everything after `head` once the content is let go."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        cut = Cut(HEAD_CHARACTERS)
        told = {key: cut(value) for key, value in record.items() if key not in CONTENT and key[0] != "_"}
        head = _dumps(told)[:-1] + b","
        self.head = len(head)
        self.full = head + _dumps(_content(record))[1:]
        self.bare = _dumps(_without_content(record))[1:]
        self.summary = _dumps(_summary(record))
        self.private = {"_trace": record["_trace"]} if record.get("_trace") else {}


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, the end of it first should it be too much to keep."""
    cut = Cut(CONTENT_CHARACTERS)
    response, request = cut(record.get("response")), cut(record.get("request"))
    messages = [cut(message) for message in reversed(record.get("messages") or [])][::-1]
    return {
        "system": cut(record.get("system")), "messages": messages, "tools": cut(record.get("tools")),
        "request": request, "response": response,
    }  # fmt: skip


def _without_content(record: Mapping[str, Any]) -> dict[str, Any]:
    cut = Cut(2_048)
    request = {k: v for k, v in (record.get("request") or {}).items() if isinstance(v, bool | int | float) or v is None}
    response = record.get("response")
    if response:
        said = ("content", "reasoning", "tool_calls")
        response = {**{k: cut(v) for k, v in response.items() if k not in said}, "content": "", "reasoning": None}
        response["tool_calls"] = []
    return {"system": None, "messages": [], "tools": [], "request": cut(request), "response": response, "content_held": False}


class Cut:
    """Makes a copy of a JSON-like value that is fit to be shown: long texts cut, numbers that JSON or a browser cannot
    hold as text, lone surrogates repaired, and in all no more than so many characters."""

    def __init__(self, characters: int) -> None:
        self._left, self._nodes = characters, NODES

    def __call__(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind is str:
            return self._text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else _digits(value)
        if kind is float:
            return value if math.isfinite(value) else None
        self._nodes -= 1
        if depth > DEEPEST or self._nodes < 0:
            return "…"
        if isinstance(value, Mapping):
            return {self._text(str(key)): self(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item, depth + 1) for item in value]
        return self._text(str(value))

    def _text(self, text: str) -> str:
        most = max(0, min(LONGEST_TEXT, self._left))
        if len(text) > most:
            text = f"{text[:most]}… ({len(text) - most} more characters)"
        self._left -= len(text)
        if text.isascii():
            return text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _digits(number: int) -> str:
    """A whole number as text; of one with thousands of digits only its size, as Python would not print it."""
    return str(number) if number.bit_length() < 8_192 else f"about 10^{number.bit_length() * 0.30103:.0f}"


def _dumps(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":"), allow_nan=False, check_circular=False).encode("ascii")


_SUMMED = (
    "id", "ts_ms", "generation_id", "outcome", "status", "error_type", "provider", "requested_model", "sent_model", "stream",
    "duration_ms", "ttft_ms", "tags", "rule", "client_format", "operation", "api_key_name", "user", "session_id", "usage_source",
)  # fmt: skip


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """One line about a finished request, for lists."""
    response, cost, cut = record.get("response") or {}, record.get("cost") or {}, Cut(4_096)
    usage = response.get("usage") or {}
    told = {key: cut(_short(record.get(key))) for key in _SUMMED}
    told |= {"input_tokens": cut(usage.get("input_tokens")), "output_tokens": cut(usage.get("output_tokens"))}
    told |= {"cost": cut(cost.get("total")), "attempts": len(record.get("attempts") or ())}
    return told | {"prompt": cut(_prompt(record)), "answer": cut(_short(response.get("content") or ""))}


def _short(value: Any) -> Any:
    return value[:PREVIEW] if isinstance(value, str | list) else value


def _prompt(record: Mapping[str, Any]) -> str:
    """The beginning of what the user said last."""
    for message in reversed(record.get("messages") or []):
        blocks = message.get("content") if message.get("role") == "user" else None
        for block in blocks if isinstance(blocks, list) else []:
            if isinstance(block, Mapping) and isinstance(block.get("text"), str):
                return str(block["text"][:PREVIEW])
    return ""


def _mentions(value: Any, wanted: str) -> bool:
    """Does any text in there hold this one, whatever its case?"""
    if isinstance(value, str):
        return wanted in value.lower()
    if isinstance(value, Mapping):
        return any(_mentions(item, wanted) for item in value.values())
    if isinstance(value, list):
        return any(_mentions(item, wanted) for item in value)
    return False


class Feed:
    """The requests that are held, and the watchers."""

    def __init__(self, *, max_watchers: int, held: int, held_bytes: int) -> None:
        self._most_watchers, self._most, self._most_bytes = max_watchers, held, held_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[int, Held] = OrderedDict()
        self._fat: deque[Held] = deque()  # those with content, oldest first
        self._bytes = 0
        self._watchers: tuple[Watcher, ...] = ()
        self._life = f"{time.time_ns() // 1_000_000:x}"  # ids of another life of this process mean nothing in this one
        self._number = 0
        self._skipped = 0
        self._closed = False

    # events
    def sink(self, event: Mapping[str, Any]) -> None:
        """Take an event: hold it, and hand it to everybody who watches."""
        if self._closed:
            return
        if event["type"] == "complete":
            lines = Lines(event)
            with self._lock:
                held = self._entry(event["id"])
                held.finish(self._send(lines.full), lines)
                self._fat.append(held)
                self._bytes += held.size
                self._trim()
        else:
            told = Cut(HEAD_CHARACTERS)({key: value for key, value in event.items() if key[0] != "_"})
            line = _dumps(told)
            with self._lock:
                self._entry(event["id"]).advance(told, self._send(line), line)
                self._trim()

    def _entry(self, id: int) -> Held:
        if id not in self._held:
            self._held[id] = Held(id)
        return self._held[id]

    def _send(self, line: bytes) -> int:
        """Give an event its number and hand it to all who watch."""
        self._number += 1
        if self._watchers:
            chunk = self._chunk(self._number, line)
            for watcher in self._watchers:
                watcher.offer(chunk)
        return self._number

    def _chunk(self, number: int, line: bytes) -> bytes:
        return b"id: %s\ndata: %s\n\n" % (self._id(number).encode(), line)

    def _id(self, number: int) -> str:
        return f"{self._life}-{number}"

    def _trim(self) -> None:
        """Keep to the bounds: first the oldest lose their content, then they go."""
        while len(self._held) > self._most:
            self._drop_oldest()
        while self._bytes > self._most_bytes and self._fat:
            held = self._fat.popleft()
            if self._is_held(held):
                self._bytes -= held.size
                held.slim()
                self._bytes += held.size
        while self._bytes > self._most_bytes:
            self._drop_oldest()
        while self._fat and not self._is_held(self._fat[0]):
            self._fat.popleft()

    def _is_held(self, held: Held) -> bool:
        return self._held.get(held.state["id"]) is held

    def _drop_oldest(self) -> None:
        oldest = next((held for held in self._held.values() if held.complete), None) or next(iter(self._held.values()))
        del self._held[oldest.state["id"]]
        self._bytes -= oldest.size if oldest.complete else 0

    # what is held
    def get(self, id: int) -> Held | None:
        """The request with this number."""
        with self._lock:
            return self._held.get(id)

    def listed(self, text: str = "") -> dict[str, Any]:
        """What is held, newest first, and the id of the last event it tells of; with `text`, those that mention it."""
        with self._lock:
            kept, last = [(h.state, h.summary, h.json) for h in reversed(self._held.values())], self._id(self._number)
        wanted = text.lower()
        told = [_line(state, summary) for state, summary, full in kept if not wanted or _is_about(wanted, state, full)]
        return {"last_event_id": last, "limit": self._most, "requests": told}

    # watchers
    def watch(self, last_event_id: str | None, gone: Callable[[], bool]) -> Watcher:
        """A watcher who is first told what happened after that event, as far as it is still held. Raises Full."""
        with self._lock:
            if len(self._watchers) >= self._most_watchers or self._closed:
                raise Full
            watcher = Watcher(gone, self._leave, self._lost)
            if last_event_id:
                for number, line in sorted(e for held in self._held.values() for e in held.events):
                    if number > self._seen(last_event_id):
                        watcher.offer(self._chunk(number, line))
            self._watchers += (watcher,)
            return watcher

    def _seen(self, event_id: str) -> int:
        """The number of the last event somebody has seen; an id of another life is as good as none."""
        life, _, number = event_id.partition("-")
        return int(number) if life == self._life and number.isdecimal() and len(number) < 18 else 0

    def _leave(self, watcher: Watcher) -> None:
        with self._lock:
            self._watchers = tuple(w for w in self._watchers if w is not watcher)

    def _lost(self) -> None:
        self._skipped += 1

    def close(self) -> None:
        """End every watcher; nobody can come any more, and nothing more is kept."""
        with self._lock:
            self._closed, leaving = True, self._watchers
        for watcher in leaving:
            watcher.end()

    def stats(self) -> dict[str, int]:
        """How many watch, and how many events were too many for one of them."""
        return {"watchers": len(self._watchers), "skipped": self._skipped}


def _line(state: dict[str, Any], summary: bytes) -> dict[str, Any]:
    return {**json.loads(summary), "stage": "complete"} if summary else dict(state)


def _is_about(wanted: str, state: dict[str, Any], full: bytes) -> bool:
    """Does a request mention this? Its JSON is only read where its bytes do not already say no."""
    if not full:
        return _mentions(list(state.values()), wanted)
    if wanted.isascii() and _dumps(wanted)[1:-1].lower() not in full.lower():
        return False
    return _mentions(json.loads(full), wanted)


class Watcher:
    """The feed as one client gets it: an iterator of SSE bytes. `close` may be called at any time, however often."""

    def __init__(self, gone: Callable[[], bool], leave: Callable[[Watcher], None], lost: Callable[[], None]) -> None:
        self._gone, self._leave, self._lost = gone, leave, lost
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._queue: deque[bytes] = deque()
        self._bytes = self._skipped = 0
        self._ended = self._left = False
        self._spoke = float("-inf")

    def offer(self, chunk: bytes) -> None:
        """Put an event into the queue; where it does not fit, the oldest make room."""
        with self._lock:
            self._queue.append(chunk)
            self._bytes += len(chunk)
            while len(self._queue) > QUEUE_ITEMS or (self._bytes > QUEUE_BYTES and len(self._queue) > 1):
                self._bytes -= len(self._queue.popleft())
                self._skipped += 1
                self._lost()
        if not self._wake.is_set():
            self._wake.set()

    def __iter__(self) -> Watcher:
        return self

    def __next__(self) -> bytes:
        """What there is to tell; waits for it, but not past the client's leaving, and says something every 15 s."""
        while not self._ended and not self._gone():
            self._wake.clear()
            piece = self._taken()
            now = time.monotonic()
            if not piece and now - self._spoke >= HEARTBEAT:
                piece = b": here\n\n"
            if piece:
                self._spoke = now
                return piece
            if self._wake.wait(min(LOOK, self._spoke + HEARTBEAT - now)):
                time.sleep(GATHER)
        self.close()
        raise StopIteration

    def _taken(self) -> bytes:
        with self._lock:
            pieces, size = [], 0
            if self._skipped:
                pieces.append(b'data: {"type":"skipped","count":%d}\n\n' % self._skipped)
                self._skipped = 0
            while self._queue and size < PIECE:
                pieces.append(self._queue.popleft())
                size += len(pieces[-1])
            self._bytes -= size
            return b"".join(pieces)

    def end(self) -> None:
        """Let the iteration end, whoever is waiting in it."""
        self._ended = True
        self._wake.set()

    def close(self) -> None:
        """Stop watching."""
        self.end()
        if not self._left:
            self._left = True
            self._leave(self)
