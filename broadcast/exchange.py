"""One delivery: a checked address, one deadline for all of it, and what the answer means.

It uses http.client on a socket of ours: there are no redirects, retries, proxies or netrc to turn off, and the address that
was checked is by construction the address connected to. Success is only what an OTLP receiver would say; a web page with
status 200 is not. Type `file` is delivered by appending a line. `try_out` sends a test span the same way and explains the
outcome by a table of likely causes.
"""

from __future__ import annotations

import contextlib
import email.utils
import http.client
import io
import ipaddress
import json
import os
import re
import socket
import ssl
import threading
import time
import zlib
from collections.abc import Callable
from datetime import UTC
from typing import Any, Final, NamedTuple

from broadcast.destinations import MARK, Address, BadAddress, Destination, Own, Settings, Target, literal, refusal, target
from broadcast.encoder import connection_test

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


class Wire:
    """A connected socket of which every read and write shares one deadline: a peer that trickles cannot stretch it."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connection, deadline
        self.ended = False

    def _in_time(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._in_time().send(view) :]

    def recv_into(self, buffer: Any) -> int:
        n = self._in_time().recv_into(buffer)
        self.ended = self.ended or not n
        return n

    def makefile(self, *_: Any) -> io.BufferedReader:
        return io.BufferedReader(_Reading(self))

    def close(self) -> None:
        """Nothing: http.client calls it for `Connection: close`, before it reads the body."""

    def cut(self) -> None:
        """Wake whoever waits on it, from another thread."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def hang_up(self) -> None:
        self._socket.close()


class _Reading(io.RawIOBase):
    def __init__(self, wire: Wire) -> None:
        self._wire = wire

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._wire.recv_into(buffer)


def exchange(to: Target, body: bytes, timeout: float, own: Own, opened: Callable[[Wire], None] = lambda _: None) -> Answer:
    """Send one OTLP JSON request and judge the answer; never raises for anything the peer or the network does."""
    deadline, wire = time.monotonic() + timeout, None
    try:
        wire = _connect(to, deadline, list(own))
        opened(wire)
        return _converse(to, body, wire)
    except (Refused, OSError, http.client.HTTPException) as error:
        return _failed(error, wire is not None, timeout)
    finally:
        if wire:
            wire.hang_up()


def _failed(error: Exception, connected: bool, timeout: float) -> Answer:
    match error:
        case Refused():
            return Answer("address", f"Not sent: {error}")
        case socket.gaierror():
            return Answer("dns", "The host name could not be resolved")
        case TimeoutError():
            return Answer("timeout", f"No complete answer within {timeout:g} s")
        case ssl.SSLCertVerificationError():
            return Answer("tls", f"The certificate was not accepted: {error.verify_message}")
        case ssl.SSLError():
            return Answer("tls", "The TLS connection failed")
        case ConnectionRefusedError():
            return Answer("connect", "The connection was refused")
        case ConnectionError() | http.client.IncompleteRead():
            return Answer("cut", "The connection was cut before the answer was complete")
        case OSError() if not connected:
            return Answer("connect", f"The connection failed: {os.strerror(error.errno or 0)}")
        case OSError():
            return Answer("cut", "The connection was lost")
    return Answer("garbage", "The answer is not HTTP")


def _connect(to: Target, deadline: float, own: Own) -> Wire:
    """Resolve once, refuse if any address is refused, connect to exactly what was checked."""
    addresses = _resolve(to.host, to.port, deadline)
    for address in addresses:
        if why := refusal(address, to.port, own):
            raise Refused(why)
    plain = _dial(addresses, to.port, deadline)
    if to.scheme == "http":
        return Wire(plain, deadline)
    try:
        plain.settimeout(max(0.001, deadline - time.monotonic()))  # counted against the handshake as a whole
        return Wire(tls_context().wrap_socket(plain, server_hostname=to.host), deadline)
    except BaseException:
        plain.close()
        raise


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
    return _tls[0]


def _converse(to: Target, body: bytes, wire: Wire) -> Answer:
    headers = {"Host": to.authority, "Content-Type": "application/json", "Accept-Encoding": "identity"}
    if not to.plain:
        packer = zlib.compressobj(5, zlib.DEFLATED, 31)  # 31: as gzip
        body = packer.compress(body) + packer.flush()
        headers["Content-Encoding"] = "gzip"
    connection = http.client.HTTPConnection(to.host, to.port)
    connection.sock = wire
    connection.request(to.method, to.path, body, headers | {"User-Agent": "opensourcellmrouter"} | to.headers)
    with connection.getresponse() as response:
        if wire.ended:  # within the head, which http.client takes for its end
            raise http.client.IncompleteRead(b"")
        read = response.read(ANSWER_BYTES + 1)
        if response.length and len(read) <= ANSWER_BYTES:
            raise http.client.IncompleteRead(read, response.length)
        return judge(response.status, response.headers, read, to)


def judge(status: int, headers: http.client.HTTPMessage, body: bytes, to: Target) -> Answer:
    """Success is a 2xx with nothing in it, or with an OTLP answer that rejects nothing."""
    if 300 <= status < 400:
        return Answer("redirect", f"Redirected (HTTP {status}); redirects are not followed", status)
    if not 200 <= status < 300:
        return Answer("http", f"HTTP {status}", status, retry_after=retry_after(headers.get("Retry-After")))
    if headers.get("Content-Encoding", "identity").lower() != "identity":
        body = _inflate(body)
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
    if not isinstance(said, dict) or said.get("error") or said.get("errors"):
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


def _inflate(body: bytes) -> bytes:
    try:
        return zlib.decompressobj(47).decompress(body, ANSWER_BYTES + 1)  # 47: gzip or zlib
    except zlib.error:
        return b"not gzip"


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


def send(d: Destination, body: bytes, timeout: float, own: Own, opened: Callable[[Wire], None] = lambda _: None) -> Answer:
    """Deliver one document to a destination of any type."""
    return append(d.path, body) if d.type == "file" else exchange(target(d), body, timeout, own, opened)


# -- the test, and what its outcome means

LONGEST_TEST: Final = 15.0
BAD_URL: Final = "Use the http:// or https:// address that takes OTLP over HTTP, usually ending in /v1/traces."


def try_out(d: Destination, settings: Settings, own: Own) -> dict[str, Any]:
    """Send the test span to exactly this destination: {ok, status, latency_ms, message, advice}."""
    begun = time.monotonic()
    if d.type == "file":
        answer = append(d.path, b"")
    else:
        to = target(d)
        to = to._replace(headers=to.headers | {"X-Test-Connection": "true"}) if to.plain else to
        test = connection_test(settings.service_name, int(time.time() * 1000))
        answer = exchange(to, test, min(settings.timeout, LONGEST_TEST), own)
    return _result(answer, round((time.monotonic() - begun) * 1000), "" if answer.cause == "ok" else advise(d, answer))


def not_tried(error: BadAddress) -> dict[str, Any]:
    """What a test comes to if nothing can be sent to the URL as it is written."""
    return _result(Answer("address", str(error)), 0, BAD_URL)


def _result(answer: Answer, latency: int, advice: str) -> dict[str, Any]:
    ok = answer.cause == "ok"
    return {"ok": ok, "status": answer.status, "latency_ms": latency, "message": answer.message, "advice": advice}


GATEWAY: Final = "use https://otlp-gateway-prod-<region>.grafana.net, not the address of your Grafana"
Applies = Callable[[Destination, Target], bool]


def _of(*types: str) -> Applies:
    return lambda d, _: d.type in types


GRAFANA: Final = _of("grafana")


def _port(port: int) -> Applies:
    return lambda _, to: to.port == port


def _any(_: Destination, __: Target) -> bool:
    return True


def _odd_path(_: Destination, to: Target) -> bool:
    return not to.path.partition("?")[0].rstrip("/").endswith("/v1/traces")


# cause ("" is any), statuses (none is any), when it applies, the likely cause in one sentence. The first that fits.
HINTS: Final[tuple[tuple[str, tuple[int, ...], Applies, str], ...]] = (
    ("", (), _port(4317), "Port 4317 is OTLP over gRPC; OTLP over HTTP usually listens on 4318."),
    ("", (), _port(16686), "Port 16686 is Jaeger's web page; Jaeger takes OTLP over HTTP on 4318."),
    ("", (), _port(3200), "Port 3200 is Tempo's query API; Tempo takes OTLP over HTTP on 4318."),
    ("address", (), _any, "Cloud metadata, link-local addresses and the router itself are refused; name the receiver's own."),
    ("dns", (), _any, "Check the spelling of the host name, and that this machine can resolve it."),
    ("tls", (), _any, "No TLS is spoken there, or the certificate is not of that name or of a CA known here (SSL_CERT_FILE)."),
    ("connect", (), _any, "Is the receiver running, the port right (4318 for OTLP over HTTP), no firewall between?"),
    ("timeout", (), _any, "A firewall may swallow it, or the receiver is overloaded; broadcast.timeout is the limit."),
    ("cut", (), _any, "Something closed the connection: often http:// sent to a TLS port, or a proxy between."),
    ("html", (), GRAFANA, f"That is a web page, not the gateway: {GATEWAY}."),
    ("html", (), _any, "That is a web page, not the gateway: use the address for OTLP, usually ending in /v1/traces."),
    ("redirect", (), GRAFANA, f"That is not the gateway: {GATEWAY}."),
    ("redirect", (), lambda _, to: to.scheme == "http", "Try https://, where most redirects lead; nothing is sent after one."),
    ("redirect", (), _any, "Use the address it leads to; often that is a sign-in page, and the URL is not the gateway's."),
    ("rejected", (), _any, "The receiver took the request but not the span: check its limits, data set and the key's rights."),
    ("too_long", (), _any, "Whatever answers there is not an OTLP receiver: check host, port and path."),
    ("garbage", (), _any, "Something answers, but not as an OTLP/HTTP receiver: check host, port and path."),
    ("disk", (), _any, "Check the path, its permissions and the free space."),
    ("http", (401, 403), GRAFANA, "Instance id and token are joined as Basic: check the stack's id and the right traces:write."),
    ("http", (401, 403), _of("axiom"), "Check that the token may ingest and that the data set has exactly that name."),
    ("http", (401, 403), _of("honeycomb"), "Check the key, and its region (api.honeycomb.io, api.eu1.honeycomb.io)."),
    ("http", (400, 401, 503), _of("tempo"), "With multi-tenancy on, Tempo refuses spans without a tenant: fill it in."),
    ("http", (401,), _any, "The key is missing or wrong: check the header, also whether it needs the word Bearer or Basic."),
    ("http", (403,), _any, "The key is known but may not write traces: check its permissions."),
    ("http", (404,), GRAFANA, "Check the region: https://otlp-gateway-prod-<region>.grafana.net."),
    ("http", (404,), _odd_path, "The path is used as it is: it usually ends in /v1/traces."),
    ("http", (404,), _any, "Nothing takes traces at that path: check host and path."),
    ("http", (405,), _any, "The address does not take this method: the path is probably not the receiver's."),
    ("http", (400,), _any, "The receiver did not understand: does it take OTLP as JSON, and are its headers complete?"),
    ("http", (413,), _any, "The receiver's size limit is very low: raise it there."),
    ("http", (415,), _any, "It does not take OTLP as JSON (some take protobuf only): put an OpenTelemetry Collector between."),
    ("http", (429,), _any, "The receiver limits the rate: try again later, or lower the sampling rate."),
    ("http", (502, 503, 504), _any, "The receiver, or what is behind it, is down or overloaded: try again later."),
    ("", (), _any, "Look into the receiver's log for the reason."),
)


def advise(d: Destination, answer: Answer) -> str:
    """The likely cause of a failure, in one sentence."""
    to = target(d) if d.type != "file" else Target("", "", 0, "", "", {}, False)
    for cause, status, applies, said in HINTS:
        if cause in ("", answer.cause) and (not status or answer.status in status) and applies(d, to):
            return said
    return ""
