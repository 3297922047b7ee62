"""The feed in a terminal: one line for every finished request, until somebody presses Ctrl-C.

What a line shows came from clients and models, so it is made harmless first: a terminal obeys control characters.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any, TextIO
from urllib.parse import urlsplit, urlunsplit

import urllib3

SILENCE = 45.0  # the feed says something every 15 s
LONGEST_PAUSE = 10.0
MOST = 16 * 2**20  # of one event
COLOURS = {"ok": "32", "error": "31", "timeout": "33", "cancelled": "2", "rejected": "35"}
REFUSALS = {
    401: "a valid key is needed: --api-key-env NAME names the environment variable that holds it",
    403: "the router does not answer under this host name: see server.allowed_hosts",
    404: "there is no feed: is this the router's address (with its url_prefix), and is server.dashboard = true?",
    503: "as many watch as may: see server.max_watchers, or close a page",
}


class Refused(Exception):
    """The router answered, but not with its feed."""


def watch(url: str, key: str | None, out: TextIO, colour: bool) -> int:
    """Write a line for each request that finishes. Returns 0 after Ctrl-C, 1 if there is no feed to be had."""
    feed = Follower(events_url(url), key)
    try:
        for event in feed.events():
            if (line := told(event, colour)) is not None:
                print(line, file=out, flush=True)
    except Refused as e:
        print(f"{feed.url}: {e}", file=out, flush=True)
        return 1
    except (KeyboardInterrupt, BrokenPipeError):
        return 0
    return 0


def events_url(url: str) -> str:
    """The feed's address, from the router's, the page's, or its own."""
    parts = urlsplit(url if "://" in url else f"http://{url}")
    path = parts.path.rstrip("/")
    for tail in ("/dashboard/events", "/dashboard/observability", "/dashboard"):
        path = path.removesuffix(tail)
    return urlunsplit((parts.scheme, parts.netloc, f"{path}/dashboard/events", "", ""))


class Follower:
    """Reads the feed and comes back to it, from where it was, whenever the connection breaks."""

    def __init__(self, url: str, key: str | None) -> None:
        self.url = url
        self._headers = {"Accept": "text/event-stream"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._pool = urllib3.PoolManager(timeout=urllib3.Timeout(connect=5.0, read=SILENCE), retries=False)
        self._last: str | None = None
        self._reached = False

    def events(self) -> Iterator[dict[str, Any]]:
        """The events, with `{"type": "note", "text": …}` about the connection among them. Raises Refused."""
        pause = 0.5
        while True:
            try:
                for event in self._connection():
                    pause = 0.5
                    yield event
            except (urllib3.exceptions.HTTPError, OSError) as e:
                if not self._reached:
                    raise Refused(f"cannot be reached ({type(e).__name__})") from None
            yield {"type": "note", "text": f"connection lost, trying again in {pause:g} s"}
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _connection(self) -> Iterator[dict[str, Any]]:
        headers = self._headers | ({"Last-Event-ID": self._last} if self._last else {})
        answer = self._pool.request("GET", self.url, headers=headers, preload_content=False, redirect=False)
        try:
            if answer.status != 200 or not answer.headers.get("Content-Type", "").startswith("text/event-stream"):
                if answer.status >= 500 and self._reached:
                    return  # it may be starting or stopping: come again
                raise Refused(REFUSALS.get(answer.status, f"answered {answer.status}, but not with a feed"))
            yield {"type": "note", "text": f"watching {self.url}" if not self._reached else "connected again"}
            self._reached = True
            yield from self._blocks(answer)
        finally:
            answer.close()

    def _blocks(self, answer: urllib3.BaseHTTPResponse) -> Iterator[dict[str, Any]]:
        rest = b""
        while piece := answer.read1(65536):
            *blocks, rest = (rest + piece).split(b"\n\n")
            for block in blocks:
                yield from self._hear(block)
            if len(rest) > MOST:
                raise Refused("an event is too large to be one of the router's")

    def _hear(self, block: bytes) -> Iterator[dict[str, Any]]:
        for line in block.split(b"\n"):
            if line.startswith(b"id: "):
                self._last = line[4:].decode("latin-1")
            elif line.startswith(b"data: "):
                try:
                    event = json.loads(line[6:])
                except ValueError:
                    raise Refused("what it sends is not the router's feed") from None
                if isinstance(event, dict):
                    yield event


def told(event: dict[str, Any], colour: bool) -> str | None:
    """An event's line; None for one that has none."""
    if event.get("type") == "note":
        return _painted(f"-- {event['text']}", "2", colour)
    if event.get("type") == "skipped":
        return _painted(f"-- {event['count']} events were too many for this terminal", "33", colour)
    return _finished(event, colour) if event.get("type") == "complete" else None


def _finished(record: dict[str, Any], colour: bool) -> str:
    outcome = str(record.get("outcome"))
    model, sent = record.get("requested_model") or "-", record.get("sent_model")
    columns = [
        time.strftime("%H:%M:%S", time.localtime(record["ts_ms"] / 1000)),
        _painted(f"{outcome:9}", COLOURS.get(outcome, "0"), colour),
        f"{record.get('status')!s:3}",
        f"{_duration(record.get('duration_ms')):>8}",
        f"{_clean(record.get('provider') or '-', 20):12}",
        _clean(model if sent in (None, model) else f"{model} -> {sent}", 60),
    ]
    return "  ".join([*columns, *_numbers(record)])


def _numbers(record: dict[str, Any]) -> Iterator[str]:
    usage, cost = (record.get("response") or {}).get("usage") or {}, record.get("cost") or {}
    if usage and record.get("usage_source") != "none":
        yield f"{usage.get('input_tokens')} -> {usage.get('output_tokens')} tokens"
    if record.get("ttft_ms") is not None and record.get("stream"):
        yield f"first {_duration(record['ttft_ms'])}"
    if cost.get("total"):
        yield f"${cost['total']:.3g}"
    if record.get("error"):
        kind, said = _clean(record.get("error_type") or "error", 40), _clean(record["error"], 120)
        yield said if said == kind else f"{kind}: {said}"


def _duration(ms: float | None) -> str:
    if ms is None:
        return "-"
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.2f} s"


def _clean(text: Any, most: int) -> str:
    """Text without anything that a terminal obeys."""
    shown = re.sub(r"[^\S ]+", " ", str(text)[: 4 * most])
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in shown)
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


def _painted(text: str, code: str, colour: bool) -> str:
    return f"\x1b[{code}m{text}\x1b[0m" if colour else text
