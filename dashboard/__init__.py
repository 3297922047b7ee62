"""What people look at: one page, its script and style, nothing from outside.

`feed` keeps the last requests and hands events to those who watch, `series` keeps the numbers of the last day, `terminal`
is the feed for people without a browser. The files of the page lie beside them as package data, so that they are found in
a folder, a wheel and a zip archive alike.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from importlib import resources
from typing import Any

from .feed import Feed, Full, Watcher
from .series import WINDOWS, Series

__all__ = ["Dashboard", "Full", "Watcher"]

log = logging.getLogger("opensourcellmrouter")

Event = Mapping[str, Any]
TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
}
PAGES = {"": "index.html", "observability": "index.html", "sign-in": "sign-in.html", "observability/sign-in": "sign-in.html"}
"""What is asked for -> the file. All addresses in a page are relative to it, so that it works behind any prefix; those
below /dashboard/ stand one level deeper."""


class Dashboard:
    """The page's side of the router: takes events, answers its API, hands out its files."""

    def __init__(
        self, *, max_watchers: int, spans: Callable[[dict[str, Any]], list[dict[str, Any]]], trace_url: str = "",
        held: int = 500, held_bytes: int = 16 * 2**20,
    ) -> None:  # fmt: skip
        self._feed = Feed(max_watchers=max_watchers, held=held, held_bytes=held_bytes)
        self._series = Series()
        self._spans, self._trace_url = spans, trace_url
        self._assets: dict[str, tuple[str, bytes] | None] = {}

    def sink(self, event: Event) -> None:
        """Take an event of a request. Never waits for anybody, never raises."""
        try:
            self._feed.sink(event)
            if event["type"] == "complete":
                self._series.add(event)
        except Exception as e:  # noqa: BLE001 - a request must never notice its onlookers
            log.error("the dashboard cannot show an event: %s", type(e).__name__)

    def watch(self, last_event_id: str | None = None, gone: Callable[[], bool] = bool) -> Watcher:
        """Somebody who watches from now on, or from after the event of this id. Raises Full."""
        return self._feed.watch(last_event_id, gone)

    def close_all(self) -> None:
        """End every watcher; what comes later is not kept."""
        self._feed.close()

    def stats(self) -> dict[str, int]:
        """How many watch, and how many events were too many for one of them."""
        return self._feed.stats()

    def api(self, path: str, query: Mapping[str, str]) -> dict[str, Any] | None:
        """Answer a GET below /api/v1/dashboard; None: there is nothing at this path."""
        if path == "/requests":
            return self._feed.listed(query.get("text", ""))
        if path == "/series":
            window = query.get("window", "5m")
            return self._series.told(window if window in WINDOWS else "5m", query.get("provider"), query.get("model"))
        found = re.fullmatch(r"/requests/(\d{1,18})", path, re.ASCII)
        return self._request(int(found[1])) if found else None

    def _request(self, id: int) -> dict[str, Any] | None:
        held = self._feed.get(id)
        if held is None:
            return None
        record = held.record()
        if record is None:
            return {"state": held.state, "record": None, "spans": [], "trace_url": ""}
        spans = self._spans({**record, **held.private})
        return {"state": held.state, "record": record, "spans": _placed(spans), "trace_url": self._link(record)}

    def _link(self, record: Event) -> str:
        """Where the tracing backend shows this request; only ever a web address."""
        trace_id = record.get("trace_id")
        if not trace_id or not self._trace_url.startswith(("http://", "https://")):
            return ""
        return self._trace_url.replace("{trace_id}", str(trace_id))

    def asset(self, name: str) -> tuple[str, bytes] | None:
        """(content type, content) of a page or of one of its files; None: there is no such file."""
        if name not in PAGES and not re.fullmatch(r"[a-z-]+\.(css|js)", name):
            return None
        if name not in self._assets:
            self._assets[name] = _read(PAGES.get(name, name), below=name.startswith("observability"))
        return self._assets[name]


def _read(file: str, *, below: bool) -> tuple[str, bytes] | None:
    try:
        content = resources.files(__name__).joinpath(file).read_bytes()
    except (FileNotFoundError, KeyError):  # a folder's and a zip archive's ways to say so
        return None
    content = content.replace(b'="dashboard/', b'="') if below else content
    return TYPES[file.rpartition(".")[2]], content


def _placed(spans: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Spans with their place on the request's own clock: a browser's numbers are too coarse for epoch nanoseconds."""
    start = min((span["start_ns"] for span in spans), default=0)
    return [{**s, "offset_ms": (s["start_ns"] - start) / 1e6, "duration_ms": (s["end_ns"] - s["start_ns"]) / 1e6} for s in spans]
