"""The live feed: the last requests as they happened, and those who watch.

An event is made into JSON once, in the thread that brings it, and from then on only references travel. What is held is
bounded twice: so many requests, and so many bytes; when the bytes run out the oldest requests lose what was said in them
but keep their numbers, so that their waterfall can still be drawn. A watcher has a bounded queue of its own: one that
reads too slowly loses the oldest events and is told how many.
"""

from __future__ import annotations

import json
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import Any

from .shown import dumps, event_line, mentions, record_line, summary, without_content

EVENTS_OF_A_REQUEST = 16
OVERHEAD = 1_500  # what holding a request costs beyond its JSON, its line in the list included
WORTH_SLIMMING = 2_048
HEARTBEAT = 15.0
LOOK = 0.5  # how long a watcher may not notice that its client left
GATHER = 0.04  # events of so many seconds go out together: fewer wake-ups, and no eye sees the difference
QUEUE_ITEMS, QUEUE_BYTES = 1_000, 4 * 2**20
PIECE = 256 * 1024


class Full(Exception):
    """As many watch as may."""


class Held:
    """One request, as far as it has come. What can be told from its JSON is only worked out when somebody asks."""

    __slots__ = ("_head", "_summary", "events", "id", "json", "private")

    def __init__(self, id: int) -> None:
        self.id = id
        self.events: list[tuple[int, bytes]] = []
        self.json = self._summary = b""
        self.private: dict[str, Any] = {}
        self._head = 0

    def advance(self, number: int, line: bytes) -> None:
        """An event before the last one."""
        if len(self.events) < EVENTS_OF_A_REQUEST:
            self.events.append((number, line))

    def finish(self, number: int, head: bytes, line: bytes, trace: Any) -> None:
        """The last event, which tells all that the earlier ones did. What was said begins after `head`."""
        self.json, self._head, self.events = line, len(head), [(number, line)]
        self.private = {"_trace": trace} if trace is not None else {}

    @property
    def complete(self) -> bool:
        return bool(self.json)

    @property
    def size(self) -> int:
        return len(self.json) + OVERHEAD

    @property
    def state(self) -> dict[str, Any]:
        """How far it has come, as a card shows it."""
        state: dict[str, Any] = {"id": self.id, "stage": "complete"}
        for _, line in () if self.complete else self.events:
            told = json.loads(line)
            if "model" in told:
                told["requested_model" if told["type"] == "start" else "sent_model"] = told.pop("model")
            state |= told | {"stage": told.pop("type"), "ts_ms": state.get("ts_ms", told["ts_ms"])}
        return state

    @property
    def summary(self) -> dict[str, Any]:
        """Its line in the list."""
        if not self.complete:
            return self.state
        if not self._summary:
            self._summary = dumps(summary(json.loads(self.json)))
        told: dict[str, Any] = json.loads(self._summary)
        return told

    def record(self) -> dict[str, Any] | None:
        """The record, once there is one."""
        return json.loads(self.json) if self.json else None

    def slim(self) -> None:
        """Let go of what was said, if that is worth it."""
        if len(self.json) - self._head > WORTH_SLIMMING:
            told = json.loads(self.json)
            self._summary = self._summary or dumps(summary(told))
            self.json = self.json[: self._head] + dumps(without_content(told))[1:]
            self.events = [(number, self.json) for number, _ in self.events]


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
            head, line = record_line(event)
            with self._lock:
                held = self._entry(event["id"])
                self._bytes -= held.size if held.complete else 0
                held.finish(self._send(line), head, line, event.get("_trace"))
                self._fat.append(held)
                self._bytes += held.size
                self._trim()
        else:
            line = event_line(event)
            with self._lock:
                self._entry(event["id"]).advance(self._send(line), line)
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
        return self._held.get(held.id) is held

    def _drop_oldest(self) -> None:
        oldest = next((held for held in self._held.values() if held.complete), None) or next(iter(self._held.values()))
        del self._held[oldest.id]
        self._bytes -= oldest.size if oldest.complete else 0

    # what is held
    def get(self, id: int) -> Held | None:
        """The request with this number."""
        with self._lock:
            return self._held.get(id)

    def listed(self, text: str = "") -> dict[str, Any]:
        """What is held, newest first, and the id of the last event it tells of; with `text`, those that mention it."""
        with self._lock:
            kept, last = list(reversed(self._held.values())), self._id(self._number)
        wanted = text.lower()
        told = [held.summary for held in kept if not wanted or _is_about(wanted, held)]
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


def _is_about(wanted: str, held: Held) -> bool:
    """Does a request mention this? Its JSON is only read where its bytes do not already say no."""
    if not held.complete:
        return mentions(list(held.state.values()), wanted)
    if wanted.isascii() and dumps(wanted)[1:-1].lower() not in held.json.lower():
        return False
    return mentions(json.loads(held.json), wanted)


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
