"""The feed in a terminal, against a feed that is real HTTP."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from telemetry_records import a_record, a_stream

from dashboard import terminal

Script = list[tuple[int, str, bytes]]


class Feed(ThreadingHTTPServer):
    """Answers each GET with the next (status, content type, body) of its script, and remembers what it was asked."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: Script = []
        self.asked: list[tuple[str, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, Feed)
        self.server.asked.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        status, kind, body = self.server.script.pop(0) if self.server.script else (404, "text/plain", b"")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        return


@pytest.fixture
def feed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Feed]:
    monkeypatch.setattr(terminal.time, "sleep", lambda seconds: None)
    server = Feed()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def sse(*events: dict[str, Any], first: int = 1) -> tuple[int, str, bytes]:
    lines = (f"id: life-{n}\ndata: {json.dumps(event)}\n\n" for n, event in enumerate(events, first))
    return 200, "text/event-stream; charset=utf-8", (": here\n\n" + "".join(lines)).encode()


def watched(feed: Feed, *script: tuple[int, str, bytes], key: str | None = None, colour: bool = False) -> tuple[int, list[str]]:
    """What `watch` returns and prints for this script; after it the feed answers 404, which ends it."""
    feed.script = list(script)
    out = io.StringIO()
    code = terminal.watch(feed.url, key, out, colour)
    return code, out.getvalue().splitlines()


def test_each_finished_request_is_one_line(feed):
    start = {"type": "start", "id": 1, "ts_ms": 1, "model": "gpt", "in_flight": 1}
    failed = a_record(id=2, outcome="error", status=502, error="the provider failed (500)", error_type="upstream_500")
    _, lines = watched(feed, sse(start, a_stream(), failed))
    first, second = (line for line in lines if not line.startswith(("--", "http")))
    for part in ("ok", "200", "60 ms", "up", "gpt -> llama3", "12 -> 5 tokens", "first 20 ms", "$0.3"):
        assert part in first
    for part in ("error", "502", "upstream_500: the provider failed (500)"):
        assert part in second
    assert "\x1b" not in "".join(lines)


def test_colours_come_only_when_asked_for(feed):
    _, lines = watched(feed, sse(a_record()), colour=True)
    assert any("\x1b[32mok" in line for line in lines)


def test_a_broken_connection_is_taken_up_where_it_broke(feed):
    _, lines = watched(feed, sse(a_record(), a_record(id=2)), (503, "application/json", b"{}"), sse(a_record(id=3), first=3))
    assert sum(line.startswith("--") and "trying again" in line for line in lines) == 3
    assert [headers.get("last-event-id") for _, headers in feed.asked] == [None, "life-2", "life-2", "life-3"]
    assert sum("tokens" in line for line in lines) == 3


def test_the_key_goes_into_a_header_and_never_into_the_address(feed):
    watched(feed, sse(a_record()), key="secret-key")
    path, headers = feed.asked[0]
    assert path == "/dashboard/events" and headers["authorization"] == "Bearer secret-key"


@pytest.mark.parametrize(
    ("status", "says"),
    [(401, "--api-key-env"), (403, "allowed_hosts"), (404, "server.dashboard"), (503, "max_watchers"), (302, "answered 302")],
)
def test_a_refusal_says_what_to_do(feed, status, says):
    code, lines = watched(feed, (status, "application/json", b"{}"))
    assert code == 1
    assert len(lines) == 1 and says in lines[0]
    assert len(feed.asked) == 1


def test_something_else_at_that_address_is_not_taken_for_a_feed(feed):
    code, lines = watched(feed, (200, "text/html", b"<html>"))
    assert code == 1 and "not with a feed" in lines[0]
    code, lines = watched(feed, (200, "text/event-stream", b"data: <html>\n\n"))
    assert code == 1 and "not the router's feed" in lines[-1]


def test_nobody_there_is_told_in_one_line():
    out = io.StringIO()
    assert terminal.watch("http://127.0.0.1:9", None, out, False) == 1
    assert "cannot be reached" in out.getvalue() and out.getvalue().count("\n") == 1


def test_a_terminal_is_never_told_what_a_client_wants_it_to_do(feed):
    bad = "\x1b]0;owned\x07\x1b[2J\r\nfake line\u202e\u2028\x9b31m"
    record = a_record(requested_model=bad, sent_model=bad, provider=bad, error=bad, error_type=bad, outcome="ok")
    _, lines = watched(feed, sse(record))
    (line,) = (line for line in lines if not line.startswith(("--", "http")))
    assert line.isprintable()
    assert "fake line" in line


def test_skipped_events_are_told(feed):
    _, lines = watched(feed, sse({"type": "skipped", "count": 7}))
    assert any("7 events were too many" in line for line in lines)


@pytest.mark.parametrize(
    ("given", "asked"),
    [
        ("localhost:8090", "http://localhost:8090/dashboard/events"),
        ("http://localhost:8090/", "http://localhost:8090/dashboard/events"),
        ("https://h/llm", "https://h/llm/dashboard/events"),
        ("https://h/llm/dashboard", "https://h/llm/dashboard/events"),
        ("https://h/llm/dashboard/observability", "https://h/llm/dashboard/events"),
        ("https://h/dashboard/events?api_key=x", "https://h/dashboard/events"),
    ],
)
def test_any_of_the_routers_addresses_will_do(given, asked):
    assert terminal.events_url(given) == asked
