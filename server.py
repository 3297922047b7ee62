"""The server: waitress, made to survive its clients and to stop in order.

waitress keeps the sockets on the main thread and gives each request a worker. It trusts its clients more than a router can;
what it lacks is added through its own seams (a channel class, a parser class, an error task) and between the turns of its
loop, never inside them.
"""

from __future__ import annotations

import logging
import re
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from providers import RequestError

log = logging.getLogger("opensourcellmrouter.server")


@dataclass(frozen=True)
class Settings:
    """The [server] section."""

    host: str = field(default="127.0.0.1", metadata={"doc": "address to listen on; beyond loopback only with a key"})
    port: int = field(default=8090, metadata={"doc": "port to listen on"})
    unix_socket: str = field(default="", metadata={"doc": "listen on this path instead (behind nginx)"})
    url_prefix: str = field(default="", metadata={"doc": "sub-path under which a proxy embeds the router"})
    trusted_proxy: str = field(default="", metadata={"doc": "address of the proxy whose X-Forwarded-* are believed"})
    threads: int = field(default=64, metadata={"doc": "one request, one thread; at least 2"})
    max_in_flight: int | None = field(
        default=None,
        metadata={"doc": "LLM requests at once, the rest get 503; unset: threads - watchers - 4, at least half"},
    )
    dashboard: bool = field(default=False, metadata={"doc": "serve the page and its feed"})
    max_watchers: int | None = field(
        default=None, metadata={"doc": "feeds at once; unset: 8, never over a quarter of the threads"}
    )
    trace_url: str = field(default="", metadata={"doc": '"http://.../trace/{trace_id}" links a request to the tracing backend'})
    api_key_env: str = field(default="", metadata={"doc": "environment variable with the one shared key"})
    allow_unauthenticated: bool = field(default=False, metadata={"doc": "listen beyond loopback without any key"})
    allowed_hosts: tuple[str, ...] = field(default=(), metadata={"doc": "further Host names for the pages and the settings API"})
    max_body_bytes: int = field(default=33554432, metadata={"doc": "larger requests get 413"})
    drain_seconds: float = field(default=30.0, metadata={"doc": "SIGTERM: how long running requests may go on"})
    send_timeout: float = field(default=30.0, metadata={"doc": "a client that reads nothing for so many seconds is cut"})

    def __post_init__(self) -> None:
        ranges = {
            "threads": (2, 4096), "port": (0, 65535), "max_in_flight": (1, self.threads), "max_watchers": (0, self.threads - 1),
            "max_body_bytes": (1024, 2**31), "drain_seconds": (0, 3600), "send_timeout": (0.1, 3600),
        }  # fmt: skip
        for name, (least, most) in ranges.items():
            value = getattr(self, name)
            if value is not None and not least <= value <= most:
                raise ValueError(f"{name}: must lie between {least} and {most}")
        if self.url_prefix and not re.fullmatch(r"(/[\w.~-]+)+", self.url_prefix):
            raise ValueError("url_prefix: must look like /llm, without a slash at its end")
        if self.trace_url and "{trace_id}" not in self.trace_url:
            raise ValueError("trace_url: must hold {trace_id}")

    @property
    def watchers(self) -> int:
        return min(8, self.threads // 4) if self.max_watchers is None else self.max_watchers

    @property
    def in_flight_limit(self) -> int:
        return self.max_in_flight or max(self.threads - self.watchers - 4, (self.threads + 1) // 2)

    @property
    def exposed(self) -> bool:
        """Can others than this machine's own programs connect?"""
        loopback = self.host in ("localhost", "::1") or self.host.startswith("127.")
        return not self.unix_socket and not loopback


class Application(Protocol):
    """What the server needs of the application beyond its being a WSGI callable."""

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]: ...
    def in_flight(self) -> int: ...
    def drain(self) -> None: ...
    def abort(self) -> None: ...
    def tidy(self) -> None: ...
    def close(self) -> None: ...
    def refuse(self, error: RequestError, reason: str, path: str) -> bytes: ...


REASONS = {
    200: "OK", 201: "Created", 204: "No Content", 400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found",
    405: "Method Not Allowed", 408: "Request Timeout", 409: "Conflict", 413: "Content Too Large", 415: "Unsupported Media Type",
    422: "Unprocessable Content", 429: "Too Many Requests", 431: "Request Header Fields Too Large",
    499: "Client Closed Request", 500: "Internal Server Error", 501: "Not Implemented", 502: "Bad Gateway",
    503: "Service Unavailable", 504: "Gateway Timeout",
}  # fmt: skip


class Signals:
    """What was asked of the process: installed before it listens, so that a signal that comes early is obeyed late."""

    def __init__(self) -> None:
        self.stops = 0
        self.reload_wanted = False
        self.wake: Callable[[], Any] = bool
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGHUP, self._hang_up)

    def _stop(self, number: int, frame: Any) -> None:
        self.stops += 1
        self.wake()

    def _hang_up(self, number: int, frame: Any) -> None:
        self.reload_wanted = True
        self.wake()


class Service:
    """The application on waitress, made to survive its clients and to stop in order.

    waitress keeps the sockets on the main thread; so all that is done to them here happens between two turns of its loop:
    cutting clients that read nothing (the library would let them hold a worker for ever) or that never finish a request,
    and the drain after SIGTERM.
    """

    RECEIVE_SECONDS = 20.0
    """A request's headers must be complete after this time; its body may take longer at 16 KiB/s or more."""

    def __init__(
        self, app: Application, settings: Settings, listener: socket.socket, signals: Signals, reload: Callable[[], None]
    ) -> None:
        from waitress.server import create_server

        self.app, self.settings, self._signals, self._reload = app, settings, signals, reload
        self._deadline: float | None = None
        self._forced = False
        _raise_file_limit()
        trusted = {"trusted_proxy": "localhost" if self.settings.unix_socket else self.settings.trusted_proxy,
                   "trusted_proxy_headers": {"x-forwarded-for", "x-forwarded-proto", "x-forwarded-host"}}  # fmt: skip
        self._server = create_server(
            app, sockets=[listener], threads=self.settings.threads, connection_limit=max(2000, 4 * self.settings.threads),
            backlog=2048, asyncore_use_poll=True, ident=None, channel_request_lookahead=1, outbuf_high_watermark=2**20,
            max_request_body_size=2**40, channel_timeout=120, clear_untrusted_proxy_headers=False,
            **(trusted if self.settings.trusted_proxy else {}),
        )  # fmt: skip
        self._server.channel_class = _channel_class(app, settings.max_body_bytes)

    def run(self) -> bool:
        """Serve until a signal has been obeyed; True if every request could be ended in order."""
        from waitress import wasyncore

        self._signals.wake = self._server.pull_trigger
        swept = time.monotonic()
        while not self._finished():
            wasyncore.loop(timeout=1.0 if self._deadline is None else 0.05, map=self._server._map, use_poll=True, count=1)
            if time.monotonic() - swept >= 0.5:
                swept = time.monotonic()
                self._sweep()
        ended = self.app.in_flight() == 0
        self.app.close()
        return ended

    def _obey(self) -> None:
        """The first signal to stop starts the drain, the second ends it."""
        if self._signals.reload_wanted:
            self._signals.reload_wanted = False
            self._reload()
        now = time.monotonic()
        if self._signals.stops and self._deadline is None:
            self._deadline = now + self.settings.drain_seconds
        if self._signals.stops > 1 and not self._forced:
            self._deadline, self._forced = now, True

    def _finished(self) -> bool:
        self._obey()
        if self._deadline is None:
            return False
        if self._server.accepting:
            self._close_listener()
        now = time.monotonic()
        if now >= self._deadline:
            self.app.abort()  # every wait ends within a slice, each with an error frame and a record
        channels = list(self._server.active_channels.values())
        busy = self.app.in_flight() or any(c.requests or c.total_outbufs_len for c in channels)
        return not busy or now >= self._deadline + (1.0 if self._forced else 3.0)

    def _close_listener(self) -> None:
        log.info(
            "stopping: %d requests are running, drain for at most %g s",
            self.app.in_flight(),
            self.settings.drain_seconds,
        )
        self.app.drain()
        self._server.accepting = False
        self._server.del_channel()
        self._server.socket.close()
        for channel in list(self._server.active_channels.values()):
            if not channel.requests and not channel.total_outbufs_len and channel.request is None:
                channel.handle_close()
        if self.settings.unix_socket:
            Path(self.settings.unix_socket).unlink(missing_ok=True)

    def _sweep(self) -> None:
        now = time.time()
        for channel in list(self._server.active_channels.values()):
            if channel.total_outbufs_len and now - channel.last_activity > self.settings.send_timeout:
                channel.stalled = True
                channel.handle_close()
            elif channel.received_late(now, self.RECEIVE_SECONDS):
                channel.handle_close()
        self.app.tidy()


def _raise_file_limit() -> None:
    """As many open files as the system lets us have: each client and each upstream is one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))


def _channel_class(app: Application, limit: int) -> type:
    """waitress's connection with its parser made strict and its own errors in the client's dialect."""
    from waitress.channel import HTTPChannel
    from waitress.parser import HTTPRequestParser, ParsingError
    from waitress.task import ErrorTask
    from waitress.utilities import BadRequest as MalformedRequest
    from waitress.utilities import RequestEntityTooLarge

    class Parser(HTTPRequestParser):
        """Refuses what two readers could read in two ways (RFC 9112, 6.1 and 11.2): lengths told twice, folded or bare
        lines, one field that must be single twice. A body over the limit is read to its end, so that the client can hear
        why it is refused, but not kept."""

        completed: bool
        too_large = False

        def received(self, data: bytes) -> int:
            if self.body_rcv is None and not self.completed:
                head = (self.header_plus + data).partition(b"\r\n\r\n")[0]
                if head.count(b"\n") != head.count(b"\r\n"):
                    self.error, self.completed = MalformedRequest("bare LF"), True
                    return len(data)
            consumed: int = super().received(data)
            if self.chunked and self.body_rcv is not None and len(self.body_rcv) > limit:
                self._discard()
            if self.too_large and (self.completed or self.body_bytes_received > 4 * limit):
                self.error, self.completed = RequestEntityTooLarge(""), True
            return consumed

        def parse_header(self, header_plus: bytes) -> None:
            lines = header_plus.split(b"\r\n")[1:]
            names = [line.partition(b":")[0].lower() for line in lines]
            single = [name for name in names if name in _SINGLE]
            folded = b"\r\n " in header_plus or b"\r\n\t" in header_plus
            coded = b"transfer-encoding" in single
            if folded or len(single) != len(set(single)) or (coded and b"content-length" in single):
                raise ParsingError("ambiguous header")
            if coded and b"," in lines[names.index(b"transfer-encoding")]:
                raise ParsingError("more than one transfer coding")
            super().parse_header(header_plus)
            if coded and self.version != "1.1":
                raise ParsingError("Transfer-Encoding in HTTP/1.0")
            if self.version == "1.1" and b"host" not in single:
                raise ParsingError("no Host")
            if self.content_length > limit:
                self._discard()

        def _discard(self) -> None:
            self.too_large, self.expect_continue = True, False
            self.body_rcv.getbuf().close()
            self.body_rcv.buf = _Nothing()
            if "100-continue" in self.headers.get("EXPECT", "").lower():
                self.completed, self.error = True, RequestEntityTooLarge("")

    class DialectError(ErrorTask):
        def execute(self) -> None:
            code = self.request.error.code
            reason, text = _PARSE_ERRORS.get(code, _PARSE_ERRORS[400])
            kind = "too_large" if code == 413 else "invalid_request"
            error = RequestError(text, status=code, kind=kind, code=reason)
            body = app.refuse(error, reason, getattr(self.request, "path", ""))
            self.status = f"{code} {REASONS[code]}"
            self.response_headers.append(("Content-Type", "application/json"))
            self.set_close_on_finish()
            self.content_length = len(body)
            self.write(body)

    class Channel(HTTPChannel):
        parser_class = Parser
        error_task_class = DialectError
        stalled = False
        writing = False
        began: float | None = None

        def received(self, data: bytes) -> bool:
            if self.request is None:
                self.began = time.time()
            taken: bool = super().received(data)
            return taken

        def write_soon(self, data: bytes) -> int:
            if not self.total_outbufs_len:
                self.last_activity = time.time()  # the client's time to read begins now, not with its last request
            self.writing = True
            try:
                written: int = super().write_soon(data)
                return written
            finally:
                self.writing = False
                if self.total_outbufs_len:
                    self.server.pull_trigger()

        def writable(self) -> bool:
            """Is there something for the loop to send? Not what a worker is sending at this moment: the loop would spin
            on its lock, and each turn would keep the interpreter from the worker. From the high watermark on it waits for
            us, until there is less."""
            waiting = self.total_outbufs_len >= (self.adj.outbuf_high_watermark if self.writing else 1)
            return bool(waiting or self.will_close or self.close_when_flushed)

        def received_late(self, now: float, seconds: float) -> bool:
            """Has a request been on its way for too long? A deadline for the whole of it: one byte now and then is no
            progress; a body that comes at a decent rate is."""
            if self.request is None:
                return not self.requests and self.began is None and now - self.creation_time > seconds
            waited: float = now - (self.began or now)
            return bool(waited > seconds + self.request.body_bytes_received / 16384)

    return Channel


_SINGLE = frozenset(
    (
        b"content-length",
        b"transfer-encoding",
        b"host",
        b"authorization",
        b"x-api-key",
        b"content-type",
        b"content-encoding",
    )
)
_PARSE_ERRORS = {
    400: ("malformed_http", "the HTTP request is malformed"),
    413: ("request_too_large", "the body is larger than server.max_body_bytes"),
    431: ("headers_too_large", "the request's headers are too large"),
    500: ("internal", "internal error; the router's log tells more"),
    501: ("malformed_http", "this Transfer-Encoding is not understood"),
}


class _Nothing:
    """A buffer that keeps nothing."""

    def append(self, data: bytes) -> None:
        return None

    def close(self) -> None:
        return None

    def __len__(self) -> int:
        return 0


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises OSError, saying where, if the address cannot be had."""
    try:
        if settings.unix_socket:
            return _listen_unix(Path(settings.unix_socket))
        family, _, _, _, address = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as e:
        where = settings.unix_socket or f"{settings.host}:{settings.port}"
        raise OSError(e.errno, f"cannot listen on {where}: {e.strerror}") from None
    return listener


def _listen_unix(path: Path) -> socket.socket:
    """A socket at this path; one that a dead process left behind is replaced, one that answers is not."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    if path.is_socket():
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            if probe.connect_ex(str(path)) == 0:
                raise OSError(98, "Address already in use")
        path.unlink()
    listener.bind(str(path))
    path.chmod(0o660)
    listener.listen(2048)
    return listener
