"""One delivery: a checked address, one deadline for all of it, and what the answer means.

urllib3 speaks HTTP, without redirects, retries or proxies, over a socket of ours: the address that was checked is by
construction the address connected to, and every read and write shares the deadline. A `Line` keeps its connection for the
next delivery. Success is only what an OTLP receiver would say; a web page with status 200 is not. Type `file` is delivered
by appending a line.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Mapping
from datetime import UTC
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import urllib3
from urllib3 import exceptions as faults
from urllib3.connection import HTTPConnection, HTTPSConnection

from broadcast.destinations import MARK, Address, Destination, Own, Target, literal, refusal, target
from broadcast.store import private_folders

ANSWER_BYTES: Final = 65_536  # the Collector's own exporter reads no more
RETRIED_STATUS: Final = (429, 502, 503, 504)  # the OTLP specification's list
RETRIED_CAUSES: Final = ("dns", "connect", "timeout", "tls", "cut", "disk")
BAD_ANSWERS: Final = ("html", "garbage", "too_long")
# ExportTraceServiceResponse in protobuf: field 1 holds rejected_spans (1, varint) and error_message (2, text).
PARTIAL = re.compile(rb"\x0a[\x80-\xff]*[\0-\x7f](?:\x08([\x80-\xff]{0,8}[\0-\x7f]))?(?:\x12[\x80-\xff]*[\0-\x7f](.*))?", re.S)


class Answer(NamedTuple):
    """What one delivery came to. `message` is ours alone: nothing in it was written by the peer."""

    cause: str  # ok, rejected, http, redirect, address, one of BAD_ANSWERS or of RETRIED_CAUSES
    message: str = ""
    status: int | None = None
    rejected: int = 0
    retry_after: float = 0.0
    said: str = ""  # partialSuccess.errorMessage, scrubbed: for the delivery counters, never for a test

    @property
    def retry(self) -> bool:
        return self.cause in RETRIED_CAUSES or (self.cause == "http" and self.status in RETRIED_STATUS)

    @property
    def error(self) -> str:
        return "" if self.cause == "ok" else f"{self.message}: {self.said}" if self.said else self.message

    @property
    def reason(self) -> str:
        """Its name in the ledger."""
        if self.cause in BAD_ANSWERS:
            return "bad_answer"
        if self.cause in ("http", "redirect"):
            return f"http_{self.status}"
        return "refused_address" if self.cause == "address" else self.cause


class Refused(Exception):
    """The address a name resolved to is one we do not send to."""


# What the two mixins stand on in each of their uses.
if TYPE_CHECKING:
    from socket import socket as _AnySocket

    from urllib3.connection import HTTPConnection as _AnyConnection
else:
    _AnySocket = _AnyConnection = object


class _Timed(_AnySocket):
    """What makes all reads and writes of a socket share one deadline: a peer that trickles cannot stretch it."""

    deadline = 0.0
    heard = False  # a byte has come since `begin`
    ended = False

    def begin(self, deadline: float) -> None:
        self.deadline, self.heard = deadline, False

    def recv_into(self, *args: Any) -> int:
        self._in_time()
        n: int = super().recv_into(*args)
        self.heard, self.ended = self.heard or n > 0, not n
        return n

    def send(self, *args: Any) -> int:
        self._in_time()
        return super().send(*args)

    def sendall(self, *args: Any) -> None:
        self._in_time()
        super().sendall(*args)  # a plain socket's timeout is for all of it, and a TLS socket's sendall calls send

    def _in_time(self) -> None:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self.settimeout(left)


class _PlainSocket(_Timed, socket.socket):
    pass


class _TlsSocket(_Timed, ssl.SSLSocket):
    pass


class _Checked(_AnyConnection):
    """A connection that its line dials."""

    def __init__(self, *args: Any, line: Line, **more: Any) -> None:
        super().__init__(*args, **more)
        self._line = line

    def _new_conn(self) -> socket.socket:
        return self._line.dial()

    def connect(self) -> None:
        super().connect()
        self._line.connected(self.sock)


class _PlainConnection(_Checked, HTTPConnection):
    pass


class _TlsConnection(_Checked, HTTPSConnection):
    pass


class Line:
    """The way to one target: at most one connection, kept between deliveries; for one thread, but for `cut`."""

    def __init__(self, to: Target) -> None:
        self.to = to
        self._pool: urllib3.HTTPConnectionPool | None = None
        self._socket: _Timed | None = None
        self._deadline, self._own = 0.0, list[tuple[str, int]]()
        self._is_cut = False

    def exchange(self, body: bytes, timeout: float, own: Own) -> Answer:
        """Send one OTLP JSON request and judge the answer; never raises for anything the peer or the network does."""
        self._deadline, self._own = time.monotonic() + timeout, list(own)
        kept = self._socket
        if kept:
            kept.begin(self._deadline)
        answer = self._try(body, timeout)
        if answer.cause == "cut" and kept and self._socket is kept and not kept.heard:
            self.close()
            answer = self._try(body, timeout)  # a server may close what is idle just as it is used again
        if answer.cause in RETRIED_CAUSES:
            self.close()
        return answer

    def close(self) -> None:
        """Close the connection; the next delivery makes another."""
        pool, self._pool, self._socket = self._pool, None, None
        if pool:
            pool.close()

    def cut(self) -> None:
        """Wake whoever waits on it, from another thread, for good."""
        self._is_cut = True
        if connected := self._socket:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(connected, socket.SHUT_RDWR)  # not SSLSocket's, which is for its own thread

    def dial(self) -> socket.socket:
        """Resolve once, refuse if any address is refused, connect to exactly what was checked."""
        self._socket = None
        addresses = _resolve(self.to.host, self.to.port, self._deadline)
        for address in addresses:
            if why := refusal(address, self.to.port, self._own):
                raise Refused(why)
        plain = _PlainSocket(fileno=_dial(addresses, self.to.port, self._deadline).detach())
        plain.begin(self._deadline)
        plain.settimeout(max(0.001, self._deadline - time.monotonic()))  # for a TLS handshake it counts as a whole
        return plain

    def connected(self, sock: Any) -> None:
        self._socket = sock
        sock.begin(self._deadline)
        if self._is_cut:
            self.cut()

    def _try(self, body: bytes, timeout: float) -> Answer:
        try:
            return self._converse(body, timeout)
        except (Refused, OSError, http.client.HTTPException, faults.HTTPError) as error:
            root = _root(error)
            if self._socket and self._socket.ended and isinstance(root, http.client.BadStatusLine):
                root = ConnectionResetError()  # cut within the first line of the answer
            return _failed(root, self._socket is not None, timeout)

    def _converse(self, body: bytes, timeout: float) -> Answer:
        to, headers = self.to, {"Host": self.to.authority, "Content-Type": "application/json", "Accept-Encoding": "identity"}
        if not to.plain:
            packer = zlib.compressobj(1, zlib.DEFLATED, 31)  # quickly, as gzip: records repeat themselves a lot
            body = packer.compress(body) + packer.flush()
            headers["Content-Encoding"] = "gzip"
        headers |= {"User-Agent": "opensourcellmrouter"} | to.headers
        self._pool = self._pool or _pool(self)
        how: dict[str, Any] = {"redirect": False, "retries": False, "preload_content": False}
        response = self._pool.urlopen(to.method, to.path, body, headers, timeout=urllib3.Timeout(total=timeout), **how)
        with contextlib.closing(response):  # kept all the same if it has been read to its end
            if self._socket and self._socket.ended:  # within the head, which http.client takes for its end
                raise http.client.IncompleteRead(b"")
            return judge(response.status, response.headers, _read(response), to)


def _read(response: urllib3.BaseHTTPResponse) -> bytes:
    """The body as far as it matters; what is no success is one however little of it comes."""
    try:
        read: bytes = response.read(ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException, faults.HTTPError):
        if 200 <= response.status < 300:
            raise
        return b""
    return read


def _pool(line: Line) -> urllib3.HTTPConnectionPool:
    """urllib3's pool of one connection that the line dials."""
    to = line.to
    if to.scheme == "http":
        pool = urllib3.HTTPConnectionPool(to.host, to.port, line=line)
    else:
        pool = urllib3.HTTPSConnectionPool(to.host, to.port, ssl_context=tls_context(), line=line)
    pool.ConnectionCls = _PlainConnection if to.scheme == "http" else _TlsConnection
    return pool


def exchange(to: Target, body: bytes, timeout: float, own: Own) -> Answer:
    """One delivery on a connection of its own."""
    line = Line(to)
    try:
        return line.exchange(body, timeout, own)
    finally:
        line.close()


def _root(error: BaseException) -> BaseException:
    """What lies at the bottom of urllib3's wrappings."""
    while isinstance(error, faults.ProtocolError | faults.SSLError) and isinstance(error.args[-1], Exception):
        error = error.args[-1]
    return error


def _failed(error: BaseException, connected: bool, timeout: float) -> Answer:
    match error:
        case Refused():
            return Answer("address", f"Not sent: {error}")
        case socket.gaierror():
            return Answer("dns", "The host name could not be resolved")
        case TimeoutError() | faults.TimeoutError():
            return Answer("timeout", f"No complete answer within {timeout:g} s")
        case ssl.SSLCertVerificationError():
            return Answer("tls", f"The certificate was not accepted: {error.verify_message}")
        case ssl.SSLError():
            return Answer("tls", "The TLS connection failed")
        case ConnectionRefusedError():
            return Answer("connect", "The connection was refused")
        case faults.InvalidChunkLength():
            return Answer("garbage", "The answer is not HTTP")
        case ConnectionError() | http.client.IncompleteRead():
            return Answer("cut", "The connection was cut before the answer was complete")
        case OSError() if not connected:
            return Answer("connect", f"The connection failed: {os.strerror(error.errno or 0)}")
        case OSError():
            return Answer("cut", "The connection was lost")
    return Answer("garbage", "The answer is not HTTP")


def _dial(addresses: list[Address], port: int, deadline: float) -> socket.socket:
    failure: OSError = TimeoutError()
    for number, address in enumerate(addresses):
        share = (deadline - time.monotonic()) / (len(addresses) - number)
        try:
            return socket.create_connection((str(address), port), max(0.001, share))
        except OSError as error:
            failure = error
    raise failure


def _resolve(host: str, port: int, deadline: float) -> list[Address]:
    """The addresses of a host, within the deadline: a resolver has none of its own, so it waits in a thread."""
    if address := literal(host):
        return [address]
    found: list[Address] = []

    def ask() -> None:
        with contextlib.suppress(OSError, UnicodeError):
            places = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            found.extend(ipaddress.ip_address(str(place[0]).partition("%")[0]) for *_, place in places)

    asking = threading.Thread(target=ask, name="broadcast-resolve", daemon=True)
    asking.start()
    asking.join(max(0.001, deadline - time.monotonic()))
    if asking.is_alive():
        raise TimeoutError
    if not found:
        raise socket.gaierror
    return list(dict.fromkeys(found))


_tls: list[ssl.SSLContext] = []


def tls_context() -> ssl.SSLContext:
    """One for all, made when first needed: reading the certificates takes longer than many a delivery."""
    if not _tls:
        _tls.append(ssl.create_default_context())
    _tls[0].sslsocket_class = _TlsSocket
    return _tls[0]


def judge(status: int, headers: Mapping[str, str], body: bytes, to: Target) -> Answer:
    """Success is a 2xx with nothing in it, or with an OTLP answer that rejects nothing."""
    if 300 <= status < 400:
        return Answer("redirect", f"Redirected (HTTP {status}); redirects are not followed", status)
    if not 200 <= status < 300:
        return Answer("http", f"HTTP {status}", status, retry_after=retry_after(headers.get("Retry-After")))
    if len(body) > ANSWER_BYTES:
        return Answer("too_long", f"HTTP {status} with more than {ANSWER_BYTES} bytes, which is no OTLP answer", status)
    kind, text = headers.get("Content-Type", "").lower(), body.strip()
    if "html" in kind or text.startswith(b"<"):
        return Answer("html", f"HTTP {status} with a web page instead of an OTLP answer", status)
    if text and "protobuf" in kind:
        return _judge_protobuf(status, body, to)
    if text and ("json" in kind or text.startswith(b"{") or not to.plain):
        return _judge_json(status, text, to)
    return Answer("ok", "Accepted", status)


def _judge_json(status: int, text: bytes, to: Target) -> Answer:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if to.plain and isinstance(said, str | int | list):  # a webhook's program may say what it likes
        return Answer("ok", "Accepted", status)
    if not isinstance(said, dict) or any(said.get(key) for key in ("error", "errors", "code")):  # code: google.rpc.Status
        return Answer("garbage", f"HTTP {status} with something else than an OTLP answer", status)
    partial = said.get("partialSuccess")
    partial = partial if isinstance(partial, dict) else {}
    number = str(partial.get("rejectedSpans") or 0)
    rejected = int(number) if re.fullmatch(r"[0-9]{1,18}", number) else 1
    return _partial(status, rejected, str(partial.get("errorMessage") or ""), to)


def _judge_protobuf(status: int, body: bytes, to: Target) -> Answer:
    found = PARTIAL.match(body)
    number, said = (found[1] or b"", found[2] or b"") if found else (b"", b"")
    rejected = sum((byte & 0x7F) << 7 * place for place, byte in enumerate(number))
    return _partial(status, rejected, said.decode("utf-8", "replace"), to)


def _partial(status: int, rejected: int, said: str, to: Target) -> Answer:
    if not rejected:
        return Answer("ok", "Accepted", status)
    spans = "1 span" if rejected == 1 else f"{rejected} spans"
    return Answer("rejected", f"HTTP {status}, but {spans} rejected (partialSuccess)", status, rejected, said=_scrub(said, to))


def _scrub(text: str, to: Target) -> str:
    """A peer's sentence, short, printable and without anything we sent to sign in."""
    secrets = {part for value in to.headers.values() for part in (value, value.partition(" ")[2]) if len(part) > 3}
    for secret in secrets:
        text = text.replace(secret, MARK)
    return "".join(char if char.isprintable() else " " for char in text[:200])


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, as seconds or as a date; 0 for anything else."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        return max(0.0, (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - time.time())
    except (ValueError, OverflowError, IndexError, TypeError):
        return 0.0


def append(path: str, body: bytes) -> Answer:
    """Type `file`: one OTLP JSON request per line; what a full disk leaves behind is taken back."""
    try:
        private_folders(Path(path))
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o600)
        try:
            if body:
                _append_line(descriptor, body)
        finally:
            os.close(descriptor)
    except OSError as error:
        return Answer("disk", f"The file could not be written: {os.strerror(error.errno or 0)}")
    return Answer("ok", "Written")


def _append_line(descriptor: int, body: bytes) -> None:
    size = os.fstat(descriptor).st_size
    torn = size and os.pread(descriptor, 1, size - 1) != b"\n"
    line = (b"\n" if torn else b"") + body + b"\n"
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


class Carrier:
    """Delivers to one destination of any type, one document at a time."""

    def __init__(self, d: Destination) -> None:
        self.destination = d
        self._line = None if d.type == "file" else Line(target(d))

    def send(self, body: bytes, timeout: float, own: Own) -> Answer:
        return self._line.exchange(body, timeout, own) if self._line else append(self.destination.path, body)

    def close(self) -> None:
        """Let go of what is kept between deliveries; another may follow."""
        if self._line:
            self._line.close()

    def cut(self) -> None:
        """End a delivery that waits, from another thread, and every later one."""
        if self._line:
            self._line.cut()
