"""What the operator sees: spans, metrics, logs; off means absent.

The lowest room: it imports none of ours, and nothing of OpenTelemetry before `start()` is called with telemetry enabled.

Nothing is opened and closed while a request runs. Its ids are made when it is accepted (`Trace`), because the head of the
answer and the provider want them; its record, at the end, holds every time and fact, and `spans` makes the tree of it: a pure
function, also for the page's waterfall. So every span ends exactly once, parents are right, and no context is left on a
thread. A request pays for two queue entries; building, counting, encoding and sending happen on threads of their own, one
for each signal, behind queues that are bounded in items and bytes: a collector that hangs costs telemetry, counted, and
nothing else.

OpenTelemetry's SDK counts the metrics and its OTLP exporters carry all three signals. Two of their parts are replaced. The
exchange with the collector (`Post`), because they believe redirects, login pages and partial successes, read answers without
end, and let ~/.netrc and OTEL_* variables steer them. And the encoding of spans (`encode`), because theirs costs more than
all the rest of telemetry together; a test holds ours to theirs, byte for byte.

Part 1 holds the scrubber of the program (every sink stands above this room), 2 the settings, 3 trace context, 4 the tree of
a request, 5 its protobuf, 6 the delivery, 7 OpenTelemetry.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import logging
import os
import re
import socket
import struct
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    from http.client import HTTPConnection, HTTPResponse

log = logging.getLogger("opensourcellmrouter.telemetry")

# 1. Secrets -----------------------------------------------------------------------------------------------------------
_secrets: set[str] = set()
_known: re.Pattern[str] | None = None
_long: tuple[str, ...] = ()
"""Those that nobody writes by chance: a key that is an everyday word must not go out of every prompt."""
# What a key looks like although nobody registered it: credentials of an Authorization header, keys in a query, vendors'
# prefixes. "basic" is also a word, so what follows it must not look like one.
_shapes = re.compile(
    r"(?P<keep>\b(?i:bearer)\s+|[?&][\w-]*(?i:key|token|secret)=)(?!\[redacted\])[^\s&\"',}\]]+"
    r"|(?P<basic>\b(?i:basic)\s+)(?=[a-z]*[0-9A-Z+/=])[\w+/]{8,}={0,2}"
    r"|\b(?i:sk|pk|rk|gsk|glc|glsa|hf|ghp|xai|xaat|xoxb|AIza)[-_][\w-]{8,}"
)


def keep_secret(value: str) -> None:
    """Register a key or token; from now on `scrub` takes it out of every text. Values under 4 characters are ignored."""
    global _known, _long
    value = value.strip()
    if len(value) < 4 or value in _secrets:
        return
    _secrets.add(value)
    longest_first = sorted(_secrets, key=len, reverse=True)
    _known = re.compile("|".join(map(re.escape, longest_first)))
    _long = tuple(secret for secret in longest_first if len(secret) >= 8)
    _short.cache_clear()


def scrub(text: str) -> str:
    """Give the text with every registered secret, and all that looks like one, replaced by `[redacted]`."""
    if _known is not None:
        text = _known.sub("[redacted]", text)
    return _shapes.sub(lambda m: (m["keep"] or m["basic"] or "") + "[redacted]", text)


def hold_secret(texts: Iterable[Any]) -> bool:
    """Is a registered secret (of 8 characters or more) in one of these texts? Quick, also for long ones."""
    if not _long:
        return False
    whole = "\n".join([str(text) for text in texts if text])
    return any(secret in whole for secret in _long)


def without_secrets(value: Any) -> Any:
    """The same lists, dicts and texts, with every secret that `hold_secret` knows replaced by `[redacted]`."""
    if isinstance(value, str):
        for secret in _long:
            value = value.replace(secret, "[redacted]")
        return value
    if isinstance(value, list):
        return [without_secrets(item) for item in value]
    if type(value) is dict:
        return {without_secrets(key): without_secrets(item) for key, item in value.items()}
    return value


VALUE_CHARS = 4096
"""The most characters of one attribute; captured content may have more."""
_BROKEN = re.compile("[\x00\ud800-\udfff]")


def _text(value: str, limit: int = VALUE_CHARS) -> str:
    """A text as it may leave the process: scrubbed, of sane length, and such that every backend can store it."""
    if len(value) > limit:
        value = value[: limit + 1024]  # a secret that the cut would go through is still seen whole
    value = scrub(value)
    if len(value) > limit:
        value = value[:limit] + "…"
    return _BROKEN.sub("�", value)


@functools.lru_cache(maxsize=4096)
def _short(value: str) -> str:
    """`_text` of the names that come again with every request."""
    return _text(value)


# 2. Settings ----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Settings:
    """The `[telemetry]` section. For a missing key its OTEL_* variable counts, then the default."""

    enabled: bool = field(default=False, metadata={"doc": "export traces, metrics and logs over OTLP/HTTP"})
    otlp_endpoint: str = field(
        default="http://localhost:4318",
        metadata={
            "doc": "OTLP/HTTP base; /v1/traces, /v1/metrics and /v1/logs are appended",
            "env": "OTEL_EXPORTER_OTLP_ENDPOINT",
        },
    )
    service_name: str = field(default="opensourcellmrouter", metadata={"doc": "service.name", "env": "OTEL_SERVICE_NAME"})
    sample_ratio: float = field(
        default=1.0, metadata={"doc": "0.0 to 1.0, parent-based; traces only", "env": "OTEL_TRACES_SAMPLER_ARG"}
    )
    headers: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "for authenticated collectors", "env": "OTEL_EXPORTER_OTLP_HEADERS"}
    )
    resource: dict[str, str] = field(
        default_factory=dict, metadata={"doc": "extra resource attributes", "env": "OTEL_RESOURCE_ATTRIBUTES"}
    )
    capture_content: bool = field(default=False, metadata={"doc": "opt in to gen_ai.input.messages and gen_ai.output.messages"})
    propagate: bool = field(default=True, metadata={"doc": "send traceparent to providers"})
    shutdown_seconds: float = field(default=5.0, metadata={"doc": "the most that flushing may delay the exit"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.sample_ratio <= 1.0:
            raise ValueError("sample_ratio: must lie between 0 and 1")
        if not 0 <= self.shutdown_seconds <= 300:
            raise ValueError("shutdown_seconds: must lie between 0 and 300")
        _check_endpoint(self.otlp_endpoint)
        for name, value in self.headers.items():
            _check_header(name, value)


def _check_endpoint(url: str) -> None:
    if not url.startswith(("http://", "https://")):
        raise ValueError("otlp_endpoint: must begin with http:// or https://")
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text tells neither the key nor what to write
        raise ValueError("otlp_endpoint: a port is a number up to 65535, an IPv6 address stands in brackets") from None
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("otlp_endpoint: must hold no user, password, query or fragment (credentials go into headers)")
    if not parts.hostname or port == 0 or not url.isprintable() or " " in url:
        raise ValueError("otlp_endpoint: must look like http://host:4318")


def _check_header(name: str, value: str) -> None:
    """Raise ValueError unless name and value can stand in a request (RFC 9110, 5.1 and 5.5) and are not ours to set."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in _OUR_HEADERS:
        raise ValueError(f"headers.{name}: this header cannot be set")
    if not all(" " <= c <= "\xff" and c != "\x7f" for c in value):
        raise ValueError(f"headers.{name}: the value holds a control or non-latin-1 character")


_OUR_HEADERS = frozenset(
    ("host", "content-length", "content-type", "content-encoding", "transfer-encoding", "connection", "expect", "upgrade",
     "te", "trailer", "accept-encoding")
)  # fmt: skip


def from_environment(settings: Settings, told: Mapping[str, Any], environ: Mapping[str, str]) -> Settings:
    """The settings with OTEL_* variables in place of the keys that the file does not tell. Raises ValueError.

    Where telemetry is off nothing else is read: the variables are other programs' too, and off means that they stop nothing.
    """
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        settings = replace(settings, enabled=False)
    if not settings.enabled:
        return settings
    for f in fields(Settings):
        variable = f.metadata.get("env", "")
        value = environ.get(variable, "")
        if not value or f.name in told:
            continue
        try:
            settings = replace(settings, **{f.name: _from_text(f.name, value)})
        except ValueError as e:
            raise ValueError(f"{e} (from {variable})") from None
    return settings


def _from_text(name: str, value: str) -> Any:
    if name in ("headers", "resource"):  # W3C baggage form: k=v,k2=v2, percent-encoded
        pairs = (pair.partition("=") for pair in value.split(",") if "=" in pair)
        return {k.strip(): unquote(v.strip()) for k, _, v in pairs}
    if name != "sample_ratio":
        return value
    try:
        return float(value)
    except ValueError:
        raise ValueError(f"{name}: must be a number") from None


# 3. Trace context -----------------------------------------------------------------------------------------------------
class Trace:
    """The ids of one request, made when it is accepted: its trace, its `request` span, and whose child that is."""

    __slots__ = ("flags", "parent_span_id", "sampled", "span_id", "trace_id", "tracestate")

    def __init__(
        self,
        trace_id: str,
        parent_span_id: str | None = None,
        *,
        sampled: bool,
        random: bool = True,
        tracestate: str | None = None,
    ) -> None:
        self.trace_id = trace_id
        self.span_id = os.urandom(8).hex()
        self.parent_span_id = parent_span_id
        self.sampled = sampled
        self.tracestate = tracestate
        self.flags = sampled | random << 1

    def child_id(self) -> str:
        """A new span id: 16 random hex digits."""
        return os.urandom(8).hex()

    def traceparent(self, span_id: str) -> str:
        """The header that makes whoever gets it a child of this span."""
        return f"00-{self.trace_id}-{span_id}-{self.flags:02x}"


_TRACEPARENT = re.compile(r"[ \t]*([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?[ \t]*")
_MEMBER = re.compile(  # one vendor's entry of a tracestate (W3C Trace Context, 3.3.1.3)
    r"(?:[a-z0-9][a-z0-9_*/-]{0,255}|[a-z0-9][a-z0-9_*/-]{0,240}@[a-z][a-z0-9_*/-]{0,13})=[ -+\--<>-~]{0,255}[!-+\--<>-~]"
)


def begin(ratio: float, traceparent: str | None, tracestate: str | None) -> Trace:
    """The ids of a new request: those of the caller's trace if its headers are in order (W3C Trace Context, 3.2 and 3.3),
    else of a new one. A caller's trace is sampled if the caller sampled it, a new one by the ratio."""
    told = _TRACEPARENT.fullmatch(traceparent or "")
    if told is None or told[1] == "ff" or (told[1] == "00" and told[5]) or not int(told[2], 16) or not int(told[3], 16):
        trace_id = os.urandom(16).hex()
        return Trace(trace_id, sampled=int(trace_id[16:], 16) < round(ratio * 2**64))
    flags = int(told[4], 16)
    return Trace(told[2], told[3], sampled=bool(flags & 1), random=bool(flags & 2), tracestate=_tracestate(tracestate))


def _tracestate(header: str | None) -> str | None:
    """The caller's vendor entries as they may be passed on; None if the list breaks a rule, for then all of it is void."""
    if not header or len(header) > 8192:
        return None
    members = [m for part in header.split(",") if (m := part.strip(" \t"))]
    keys = {m.partition("=")[0] for m in members}
    if len(members) > 32 or len(keys) < len(members) or not all(_MEMBER.fullmatch(m) for m in members):
        return None
    for longer_than in (128, 0):  # 512 characters are passed on; the longest entries go first, then the oldest
        for member in members[::-1]:
            if len(",".join(members)) > 512 and len(member) > longer_than:
                members.remove(member)
    return ",".join(members) or None


_here = threading.local()


def enter(trace: Trace | None) -> None:
    """From now on this thread's log lines carry the ids of this request."""
    _here.trace = trace


def leave() -> None:
    """This thread is done with its request."""
    _here.trace = None


# 4. The tree of a request ---------------------------------------------------------------------------------------------
Span = dict[str, Any]
_FAILED = frozenset(("error", "timeout", "rejected"))
_CLIENTS_OWN = frozenset((400, 404, 409, 413, 422))
"""Statuses that say the request itself is at fault: nothing of ours failed."""


def spans(record: Mapping[str, Any], content: bool = False) -> list[Span]:
    """The spans of a finished request, `request` first. With `content` they hold what was asked and answered, too.

    A span is `{"name", "kind", "span_id", "parent_span_id", "start_ns", "end_ns", "attributes", "status", "status_message",
    "events"}`; status is "error" or None, an event `{"name", "time_ns", "attributes"}`. Ids are those of the record's trace,
    else (telemetry is off) made from its generation id, so that they are the same whenever they are made.
    """
    tree = _Tree(record)
    tree.request()
    outcome = tree.dispatch()
    for index, attempt in enumerate(record["attempts"]):
        tree.attempt(index, attempt, content)
    if _is_under_way(record):
        outcome = tree.body()
    tree.explain(outcome)
    return tree.spans


def span_count(record: Mapping[str, Any]) -> int:
    """How many spans `spans` makes of a record."""
    timed = sum(1 for a in record["attempts"] for v in (a["timings"] or {}).values() if v)
    sent = sum(a["kind"] is not None for a in record["attempts"])
    return 2 + len(record["attempts"]) + sent + timed + _is_under_way(record)


def _is_under_way(record: Mapping[str, Any]) -> bool:
    """Did the client get the head of a stream? Only then is there a body to speak of."""
    return bool(record["stream"] and record["opened_ms"] is not None and record["status"] < 400)


class _Fault(NamedTuple):
    """What went wrong somewhere; it is a failure unless it was the client's own doing."""

    kind: str
    message: str
    failure: bool


class _Tree:
    """The spans of one record in the making."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record
        self.spans: list[Span] = []
        self._trace: Trace | None = record.get("_trace")
        self._start = record["ts_ns"]
        self._root = self._trace.span_id if self._trace else _digest(record["generation_id"])
        self._first = int(self._root, 16)
        self._fault = _fault(record, record["outcome"] in _FAILED)
        self._faults = [self._attempt_fault(a) for a in record["attempts"]]
        self._response = record["response"] or {}
        usage = _used(record)
        self._usage = {
            "gen_ai.usage.input_tokens": usage["input_tokens"],
            "gen_ai.usage.output_tokens": usage["output_tokens"],
        } if usage else {}  # fmt: skip

    def request(self) -> None:
        record = self.record
        attributes = {
            "http.request.method": record["method"], "http.route": record["route"], "url.path": record["route"],
            "http.response.status_code": record["status"], "client.address": record["client_address"] or None,
            "router.outcome": record["outcome"], "router.client_format": record["client_format"],
            "router.api_key_name": record["api_key_name"], "user.id": record["user"], "session.id": record["session_id"],
            "gen_ai.provider.name": record["vendor"], "gen_ai.request.model": record["requested_model"],
            "gen_ai.response.model": self._response.get("model"), **self._usage,
            "router.cost": record["cost"]["total"] if record["cost"] else None,
            "router.overhead_ms": record["overhead_ms"],
        }  # fmt: skip
        parent = self._trace.parent_span_id if self._trace else None
        self._add("request", self._root, parent, 0, record["duration_ms"], attributes, kind="server", fault=self._fault)

    def dispatch(self) -> Span:
        record = self.record
        attributes = {
            "request_id": record["generation_id"], "provider": record["provider"],
            "model": record["sent_model"] or record["requested_model"], "tags": record["tags"],
            "router.rule": record["rule"], "router.dropped": record["dropped"] or None,
            "router.outcome": None if _is_under_way(record) else record["outcome"],
        }  # fmt: skip
        name, fault = "dispatch_stream" if record["stream"] else "dispatch", None if _is_under_way(record) else self._fault
        opened = record["duration_ms"] if record["opened_ms"] is None else record["opened_ms"]
        return self._add(name, self._id(1), self._root, 0, opened, attributes, fault=fault)

    def attempt(self, index: int, attempt: Mapping[str, Any], content: bool) -> None:
        last = index == len(self.record["attempts"]) - 1
        send, call = self._id(8 * index + 8), attempt["span_id"] or self._id(8 * index + 9)
        start, end = attempt["start_ms"], attempt["start_ms"] + (attempt["duration_ms"] or 0)
        fault = self._faults[index]
        who = {"provider": attempt["provider"], "model": attempt["model"]}
        attributes = {**who, "router.attempt": attempt["attempt"], **self._gen_ai(attempt, last)}
        if content and last:
            attributes |= _content(self.record)
        sent = self._add("provider.send", send, self._id(1), start, end, attributes, fault=fault)
        if fault and fault.failure:
            sent["events"] = [_exception(sent, fault)]
        if attempt["kind"] is not None:  # else nothing was sent: the router answered by itself, or could not say it
            self._add("provider.http", call, send, start, end, _http(attempt), kind="client", fault=fault)
        for n, (name, begin_ms, end_ms) in enumerate(_phases(attempt)):
            self._add(name, self._id(8 * index + 10 + n), send, start + begin_ms, start + end_ms, who)

    def body(self) -> Span:
        record = self.record
        attributes = {
            "provider": record["provider"], "model": record["sent_model"], "router.outcome": record["outcome"],
            **self._usage, "gen_ai.response.finish_reasons": self._finish(),
            "gen_ai.response.time_to_first_chunk": _seconds(record["ttft_ms"]),
        }  # fmt: skip
        start, end = record["opened_ms"], record["duration_ms"]
        return self._add("dispatch_stream.body", self._id(2), self._id(1), start, end, attributes, fault=self._fault)

    def explain(self, outcome: Span) -> None:
        """A failure that no attempt is to blame for is told of where the outcome stands."""
        if self._fault and self._fault.failure and not any(f and f.failure for f in self._faults):
            outcome["events"] = [_exception(outcome, self._fault)]

    def _gen_ai(self, attempt: Mapping[str, Any], last: bool) -> dict[str, Any]:
        """The GenAI conventions' attributes of one exchange with a provider; the answer is that of the last attempt."""
        record, response = self.record, self._response
        told: dict[str, Any] = {
            "gen_ai.operation.name": record["operation"], "gen_ai.provider.name": attempt["vendor"],
            "gen_ai.system": attempt["vendor"], "gen_ai.request.model": attempt["model"],
            "gen_ai.conversation.id": record["session_id"], "gen_ai.request.stream": record["stream"] or None,
            "server.address": attempt["server_address"], "server.port": attempt["server_port"],
            **(record["params"] if "params" in record else _params(record["request"])),
        }  # fmt: skip
        if record["stream"]:
            told["gen_ai.response.time_to_first_chunk"] = _seconds(attempt["first_token_ms"])
        if not last or not response:
            return told
        usage = response["usage"] if self._usage else {}
        return told | self._usage | {
            "gen_ai.response.id": response["id"], "gen_ai.response.model": response["model"],
            "gen_ai.response.finish_reasons": self._finish(),
            "gen_ai.usage.cache_read.input_tokens": usage.get("cached_input_tokens") or None,
            "gen_ai.usage.cache_write.input_tokens": usage.get("cache_write_input_tokens") or None,
            "gen_ai.usage.reasoning.output_tokens": usage.get("reasoning_tokens") or None,
        }  # fmt: skip

    def _finish(self) -> list[str] | None:
        reason = self._response.get("finish_reason")
        return [reason] if reason else None

    def _attempt_fault(self, attempt: Mapping[str, Any]) -> _Fault | None:
        record = self.record
        left = record["outcome"] == "cancelled" and attempt["error_type"] == record["error_type"]
        return _fault(attempt, failed=not left)

    def _id(self, number: int) -> str:
        """The id of a span that nobody outside was told of: steps from the first one, so that it need not be stored."""
        return f"{(self._first + number * 0x9E3779B97F4A7C15) % 2**64 or 1:016x}"

    def _add(
        self, name: str, span_id: str, parent: str | None, begin_ms: float, end_ms: float, attributes: dict[str, Any],
        *, kind: str = "internal", fault: _Fault | None = None,
    ) -> Span:  # fmt: skip
        if fault:
            attributes["error.type"] = fault.kind
        failure = fault if fault and fault.failure else None
        start = self._start + int(begin_ms * 1e6)
        span: Span = {
            "name": name, "kind": kind, "span_id": span_id, "parent_span_id": parent,
            "start_ns": start, "end_ns": max(start, self._start + int(end_ms * 1e6)), "attributes": _clean(attributes),
            "status": failure and "error", "status_message": failure and _text(failure.message, 1024), "events": [],
        }  # fmt: skip
        self.spans.append(span)
        return span


def _used(record: Mapping[str, Any]) -> Mapping[str, int] | None:
    """The tokens that a request used, as far as somebody knows them; those it only had counted are not among them."""
    unknown = not record["response"] or record["usage_source"] == "none" or record["operation"] == "count_tokens"
    return None if unknown else record["response"].get("usage")


def _fault(told: Mapping[str, Any], failed: bool) -> _Fault | None:
    """What went wrong with a request or an attempt; a client's own 4xx is no failure."""
    kind = told["error_type"]
    return _Fault(kind, told["error"] or kind, failed and told["status"] not in _CLIENTS_OWN) if kind else None


def _exception(span: Span, fault: _Fault) -> dict[str, Any]:
    told = {"exception.type": fault.kind, "exception.message": fault.message}
    return {"name": "exception", "time_ns": span["end_ns"], "attributes": _clean(told)}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _clean(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes that are there, each as it may leave the process."""
    clean: dict[str, Any] = {}
    for name, value in attributes.items():
        if value is None:
            continue
        kind = type(value)
        if kind is str:
            if name not in _CONTENT:  # made of texts that were seen to one by one
                value = _short(value) if len(value) <= 256 else _text(value)
        elif kind is list:
            value = [_short(v) if len(v) <= 256 else _text(v, 256) for v in map(str, value[:128])]
        clean[name] = value
    return clean


def _http(attempt: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "provider": attempt["provider"], "kind": attempt["kind"],
        "server.address": attempt["server_address"], "server.port": attempt["server_port"], "status": attempt["status"],
        "http.request.method": "POST", "http.response.status_code": attempt["status"],
    }  # fmt: skip


def _phases(attempt: Mapping[str, Any]) -> Iterator[tuple[str, float, float]]:
    """(span name, begin, end) of what a local model told of its time. It tells lengths only; decoding begins with the first
    token, the rest lies before it."""
    lengths = {name: (attempt["timings"] or {}).get(f"{name}_ms") or 0.0 for name in ("load", "prefill", "decode")}
    whole = attempt["duration_ms"] or 0.0
    first = attempt["first_token_ms"]
    begin_ms = (whole - lengths["decode"] if first is None else first) - lengths["prefill"] - lengths["load"]
    begin_ms = min(max(begin_ms, 0.0), whole)
    for name, length in lengths.items():
        if length:
            end_ms = min(begin_ms + length, whole)
            yield f"model.{name}", begin_ms, end_ms
            begin_ms = end_ms


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000


def _number(value: Any) -> float | None:
    sane = isinstance(value, (int, float)) and not isinstance(value, bool) and -1e15 < value < 1e15
    return float(value) if sane else None


def _whole(value: Any) -> int | None:
    sane = isinstance(value, (int, float)) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    return int(value) if sane else None


def _words(value: Any) -> list[str] | None:
    words = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    return [w[:256] for w in words[:16] if isinstance(w, str)] or None


def _output_type(value: Any) -> str | None:
    told = value.get("type") if isinstance(value, dict) else None
    return {"json_object": "json", "json_schema": "json", "text": "text"}.get(told) if isinstance(told, str) else None


_PARAMS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "temperature": ("gen_ai.request.temperature", _number),
    "top_p": ("gen_ai.request.top_p", _number),
    "top_k": ("gen_ai.request.top_k", _whole),
    "max_tokens": ("gen_ai.request.max_tokens", _whole),
    "max_completion_tokens": ("gen_ai.request.max_tokens", _whole),
    "max_output_tokens": ("gen_ai.request.max_tokens", _whole),
    "frequency_penalty": ("gen_ai.request.frequency_penalty", _number),
    "presence_penalty": ("gen_ai.request.presence_penalty", _number),
    "seed": ("gen_ai.request.seed", _whole),
    "stop": ("gen_ai.request.stop_sequences", _words),
    "stop_sequences": ("gen_ai.request.stop_sequences", _words),
    "n": ("gen_ai.request.choice.count", lambda n: None if n == 1 else _whole(n)),
    "reasoning_effort": ("gen_ai.request.reasoning.level", lambda v: v[:64] if isinstance(v, str) else None),
    "response_format": ("gen_ai.output.type", _output_type),
}
"""Fields of a client's body, in any dialect -> attribute."""


def _params(request: Mapping[str, Any]) -> dict[str, Any]:
    return {_PARAMS[k][0]: _PARAMS[k][1](v) for k, v in request.items() if k in _PARAMS and v is not None}


# What was said, for those who opt in: the GenAI conventions' messages, as JSON text because a span holds no structures.
_CONTENT = frozenset(("gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.tool.definitions"))
CONTENT_CHARS = 256 * 1024
"""The most of each of these that a span holds; of a longer conversation its last messages stay."""
PIECE_CHARS = 64 * 1024
_LARGE = 8 * 1024 * 1024
"""A conversation larger than this is not captured: only cutting it down would hold up everything else."""


def _content(record: Mapping[str, Any]) -> dict[str, Any]:
    if record.get("size", 0) > _LARGE:
        return {"router.content_truncated": True}
    told: dict[str, Any] = {}
    if record["system"]:
        told["gen_ai.system_instructions"] = _dump([{"type": "text", "content": _text(record["system"], PIECE_CHARS)}])
    if record["messages"]:
        told["gen_ai.input.messages"], whole = _conversation(record["messages"])
        told["router.content_truncated"] = None if whole else True
    if record["tools"]:
        told["gen_ai.tool.definitions"] = _listed({"type": "function", **_deep(t)} for t in record["tools"])
    if record["response"]:
        told["gen_ai.output.messages"] = _said(record["response"])
    return told


def _conversation(messages: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """The messages as JSON text, and whether all of them: where there is no room for all, the last ones stay."""
    room, kept = CONTENT_CHARS, deque[str]()
    for message in reversed(messages):
        parts = deque[str]()
        for block in reversed(message["content"]):
            part = _dump(_part(block))
            room -= len(part) + 32
            if room < 0:
                break
            parts.appendleft(part)
        kept.appendleft(f'{{"role":{_dump(_text(message["role"], 64))},"parts":[{",".join(parts)}]}}')
        if room < 0:
            break
    return f"[{','.join(kept)}]", room >= 0


def _said(response: Mapping[str, Any]) -> str:
    """The answer as JSON text of one message."""
    blocks = [{"type": "thinking", "thinking": response["reasoning"]}] if response["reasoning"] else []
    blocks += [{"type": "text", "text": response["content"]}] if response["content"] else []
    blocks += [{"type": "tool_use", **call, "input": call["arguments"]} for call in response["tool_calls"]]
    finish = _dump(_text(response["finish_reason"] or "error", 64))
    return f'[{{"role":"assistant","parts":{_listed(_part(b) for b in blocks)},"finish_reason":{finish}}}]'


def _listed(items: Iterable[Any]) -> str:
    """The first items there is room for, as a JSON list."""
    room, kept = CONTENT_CHARS, []
    for item in items:
        text = _dump(item)
        room -= len(text) + 1
        if room < 0:
            break
        kept.append(text)
    return f"[{','.join(kept)}]"


def _part(block: Mapping[str, Any]) -> dict[str, Any]:
    """One of our blocks as a part of a message (GenAI conventions, input and output messages)."""
    kind = block.get("type")
    if kind == "text":
        return {"type": "text", "content": _text(str(block.get("text", "")), PIECE_CHARS)}
    if kind == "thinking":
        return {"type": "reasoning", "content": _text(str(block.get("thinking", "")), PIECE_CHARS)}
    if kind == "tool_use":
        called = {"id": block.get("id"), "name": block.get("name"), "arguments": block.get("input")}
        return {"type": "tool_call", **_deep(called)}
    if kind == "tool_result":
        return {"type": "tool_call_response", **_deep({"id": block.get("tool_use_id"), "response": block.get("content")})}
    if kind == "image" and isinstance(block.get("url"), str):
        return {"type": "uri", "modality": "image", "uri": _text(block["url"])}
    # Images, documents and the like: that they were there, not their bytes.
    return {"type": _text(str(kind), 64), **({"mime_type": _text(str(m), 128)} if (m := block.get("media_type")) else {})}


def _deep(value: Any) -> Any:
    """A JSON value with every text in it as it may leave the process."""
    if isinstance(value, str):
        return _text(value, PIECE_CHARS)
    if isinstance(value, list):
        return [_deep(v) for v in value]
    if isinstance(value, dict):
        return {_text(str(k), 256): _deep(v) for k, v in value.items()}
    return value


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


# 5. The tree in protobuf ----------------------------------------------------------------------------------------------
# After opentelemetry/proto/trace/v1/trace.proto. The official encoder makes two objects of each attribute, 130 us for a
# request's spans against 21 us here, where an attribute that was seen before is not encoded again.
def encode(trace: Trace, tree: Sequence[Span]) -> bytes:
    """The spans of one trace as they stand in a ScopeSpans message: field 2, one after the other."""
    trace_id = b"\x0a\x10" + bytes.fromhex(trace.trace_id) + b"\x12\x08"
    state = _field(b"\x1a", trace.tracestate.encode()) if trace.tracestate else b""
    return b"".join([_field(b"\x12", b"".join(_span_fields(s, trace_id, state, trace.parent_span_id))) for s in tree])


def _span_fields(span: Span, trace_id: bytes, state: bytes, caller: str | None) -> list[bytes]:
    parent = span["parent_span_id"]
    parts = [
        trace_id, bytes.fromhex(span["span_id"]), state, b"\x22\x08" + bytes.fromhex(parent) if parent else b"",
        _field(b"\x2a", span["name"].encode()), _KINDS[span["kind"]],
        b"\x39", _fixed64(span["start_ns"]), b"\x41", _fixed64(span["end_ns"]),
    ]  # fmt: skip
    for name, value in span["attributes"].items():
        same_again = type(value) in _REPEATED and (type(value) is not str or len(value) <= 64)
        parts.append(_pair_again(b"\x4a", name, value) if same_again else _pair(b"\x4a", name, value))
    for event in span["events"]:
        told = [_pair(b"\x1a", name, value) for name, value in event["attributes"].items()]
        parts.append(
            _field(b"\x5a", b"\x09" + _fixed64(event["time_ns"]) + _field(b"\x12", event["name"].encode()) + b"".join(told))
        )
    parts.append(
        _field(b"\x7a", _field(b"\x12", (span["status_message"] or "").encode()) + b"\x18\x02" if span["status"] else b"")
    )
    # flags: it is known whether the parent is remote, and (second bit) it is
    parts.append(b"\x85\x01\x00\x03\x00\x00" if parent and parent == caller else b"\x85\x01\x00\x01\x00\x00")
    return parts


def _pair(tag: bytes, name: str, value: Any) -> bytes:
    return _field(tag, _field(b"\x0a", name.encode()) + _field(b"\x12", _any_value(value)))


_pair_again = functools.lru_cache(maxsize=4096, typed=True)(_pair)
_REPEATED = frozenset((str, bool, int))
_KINDS = {"internal": b"\x30\x01", "server": b"\x30\x02", "client": b"\x30\x03"}
_fixed64, _double = struct.Struct("<Q").pack, struct.Struct("<d").pack


def _any_value(value: Any) -> bytes:
    kind = type(value)
    if kind is str:
        return _field(b"\x0a", value.encode())
    if kind is bool:
        return b"\x10\x01" if value else b"\x10\x00"
    if kind is int:
        return b"\x18" + _varint(value % 2**64)
    if kind is float:
        return b"\x21" + _double(value)
    return _field(b"\x2a", b"".join(_field(b"\x0a", _any_value(v)) for v in value))


def _field(tag: bytes, data: bytes) -> bytes:
    """A field of variable length."""
    size = len(data)
    return tag + (_SIZES[size] if size < 1024 else _varint(size)) + data


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


_SIZES = [_varint(n) for n in range(1024)]


# 6. Delivery ----------------------------------------------------------------------------------------------------------
ANSWER_BYTES = 64 * 1024
"""The most that is read of a collector's answer (the Collector's own exporter has the same limit)."""
CONNECT_SECONDS = 5.0
EXCHANGE_SECONDS = 10.0
"""The most that one exchange with the collector may take, whatever comes back and however slowly."""
PATIENCE_SECONDS = 300.0
"""How long one batch is tried again while the collector is away or busy; first after about twice the next number."""
BACKOFF_SECONDS = 0.25


@dataclass(frozen=True)
class Verdict:
    """How an export went: `message` says why it failed, `again` whether it may be tried again, `rejected` how many items
    the collector took out although it accepted the rest."""

    ok: bool
    message: str = ""
    status: int | None = None
    again: bool = False
    wait: float | None = None
    rejected: int = 0


class _Outcome:
    """A verdict as the exporter wants it: a status it knows, or an error it does not try again."""

    def __init__(self, verdict: Verdict) -> None:
        self.status_code = 200 if verdict.ok else None
        self.reason = verdict.message
        self.error = None if verdict.ok else OSError(verdict.message)

    def headers(self) -> dict[str, str]:
        return {}

    def content(self) -> bytes:
        return b""


class Post:
    """The way of one signal to the collector; the official exporter's transport.

    One exchange is one POST over a kept connection and has one deadline for everything from connecting to the last byte of
    the answer. No proxy, no redirect, no credentials but the configured ones. What the answer says is believed only if it
    is an answer of OTLP/HTTP. `verdict` is how the last export went.
    """

    def __init__(
        self, url: str, headers: Mapping[str, str], *, patience: float, tell: Callable[[str], None], read: Callable[[bytes], Any]
    ) -> None:
        self.url = url
        self.verdict = Verdict(ok=True)
        self._parts = urlsplit(url)
        self._headers = {**headers, "content-type": "application/x-protobuf"}
        self._patience, self._tell, self._read = patience, tell, read
        self._connection: HTTPConnection | None = None
        self._stopping = threading.Event()
        self._until = float("inf")
        self._not_before = 0.0

    # what the exporter calls
    def request(self, method: str, url: str, *, data: bytes | None = None, **ignored: Any) -> _Outcome:
        """Deliver an encoded export, again and again where OTLP says so and as long as there is patience."""
        began, tries = time.monotonic(), 0
        while True:
            if not self._stopping.is_set():
                self._pause(self._not_before - time.monotonic())
            self.verdict = verdict = self._exchange(data or b"")
            tries += 1
            if not verdict.ok or verdict.message:
                self._tell(f"{self.url}: {verdict.message}")
            wait = min(BACKOFF_SECONDS * 2**tries, 10.0) if verdict.wait is None else verdict.wait
            wait *= 1.0 + int.from_bytes(os.urandom(1), "big") / 1280  # up to a fifth more, so that routers do not march in step
            if not verdict.again or not self._may_wait(wait, began):
                if verdict.wait is not None:
                    self._not_before = time.monotonic() + min(wait, 3600.0)
                return _Outcome(verdict)
            self._pause(wait)

    def is_connection_error(self, error: Exception | None) -> bool:
        """Never one that the exporter should try again by itself."""
        return False

    def close(self) -> None:
        """Let go of the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    # its end
    def stop(self, until: float) -> None:
        """Wait no longer for better times, and give up at this moment."""
        self._until = until
        self._stopping.set()

    def abort(self) -> None:
        """End the exchange that is under way, from another thread."""
        sock = self._connection.sock if self._connection is not None else None
        if sock is not None:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                log.debug("the collector's connection was gone already")

    def _may_wait(self, wait: float, began: float) -> bool:
        now = time.monotonic()
        if self._stopping.is_set():  # the last chance: who is not there now will not be there in a second
            return self.verdict.status is not None and now + wait < self._until
        return now + wait < began + self._patience

    def _pause(self, seconds: float) -> None:
        if seconds <= 0:
            return
        if self._stopping.is_set():
            time.sleep(min(seconds, max(0.0, self._until - time.monotonic())))
        else:
            self._stopping.wait(seconds)

    # one exchange
    def _exchange(self, data: bytes) -> Verdict:
        import http.client

        deadline = time.monotonic() + EXCHANGE_SECONDS

        def left() -> float:
            seconds = min(deadline, self._until) - time.monotonic()
            if seconds <= 0:
                raise TimeoutError
            return seconds

        try:
            status, headers, body = self._ask(data, left)
        except OSError as e:
            self.close()
            return Verdict(ok=False, message=_failure(e), again=True)
        except http.client.HTTPException:
            self.close()
            return Verdict(ok=False, message="what answers there does not speak HTTP")
        return self._judge(status, headers, body)

    def _ask(self, data: bytes, left: Callable[[], float]) -> tuple[int, Mapping[str, str], bytes | None]:
        """Status, headers and body of the answer; the body is None if it does not end within its limits."""
        import http.client

        kept = self._connection is not None and self._connection.sock is not None
        try:
            response = self._answer(data, left)
        except (ConnectionError, http.client.BadStatusLine):
            self.close()
            if not kept:
                raise
            response = self._answer(data, left)  # the collector had closed the kept connection
        body = _body(response)
        if body is None:
            self.close()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, body

    def _answer(self, data: bytes, left: Callable[[], float]) -> HTTPResponse:
        connection = self._connection
        if connection is None or connection.sock is None:
            connection = self._connection = self._connect(left)
        connection.response_class = functools.partial(_timed_response, left)  # type: ignore[assignment]
        connection.sock.settimeout(left())
        connection.request("POST", f"{self._parts.path}", data, self._headers)
        return connection.getresponse()

    def _connect(self, left: Callable[[], float]) -> HTTPConnection:
        import http.client

        host, timeout = self._parts.hostname or "", min(CONNECT_SECONDS, left())
        if self._parts.scheme == "https":
            import ssl

            tls = ssl.create_default_context()
            port = self._parts.port or 443
            connection: HTTPConnection = http.client.HTTPSConnection(host, port, timeout=timeout, context=tls)
        else:
            connection = http.client.HTTPConnection(host, self._parts.port, timeout=timeout)
        connection.connect()
        return connection

    # what it means
    def _judge(self, status: int, headers: Mapping[str, str], body: bytes | None) -> Verdict:
        if status in (429, 502, 503, 504):
            wait = _retry_after(headers.get("retry-after"))
            return Verdict(ok=False, message=f"HTTP {status}", status=status, again=True, wait=wait)
        if 300 <= status < 400:
            return Verdict(ok=False, message=f"HTTP {status}, a redirect, which is never followed", status=status)
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if not 200 <= status < 300:
            return Verdict(ok=False, message=f"HTTP {status}{_reason_given(kind, body)}", status=status)
        if body is None:
            return Verdict(ok=False, message=f"HTTP {status} with an answer that is too long or does not end", status=status)
        return self._judge_body(status, kind, body)

    def _judge_body(self, status: int, kind: str, body: bytes) -> Verdict:
        if not body:
            return Verdict(ok=True, status=status)
        if kind == "text/html" or body.lstrip()[:1] == b"<":
            return Verdict(ok=False, message=f"HTTP {status} with a web page: this is no OTLP endpoint", status=status)
        try:
            rejected, said = _partial_success(json.loads(body)) if kind == "application/json" else self._read(body)
        except (ValueError, TypeError, RecursionError):
            return Verdict(ok=False, message=f"HTTP {status} with an answer that is not OTLP", status=status)
        message = f"partial success, {rejected} rejected: {_text(said, 300)}" if rejected or said else ""
        return Verdict(ok=True, message=message, status=status, rejected=rejected)


def _body(response: HTTPResponse) -> bytes | None:
    """The body of an answer; None if it is too long or does not end."""
    import http.client

    body = b""
    try:
        while piece := response.read(ANSWER_BYTES + 1 - len(body)):
            body += piece
            if len(body) > ANSWER_BYTES:
                return None
    except (OSError, http.client.HTTPException):
        return None
    return None if response.length else body


class _Timed(io.RawIOBase):
    """What comes from a socket, each read with the time that is left then: a peer that trickles gains nothing."""

    def __init__(self, sock: Any, left: Callable[[], float]) -> None:
        self._sock, self._left = sock, left
        self._raw = sock.makefile("rb", 0)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(self._left())
        read: int | None = self._raw.readinto(buffer)
        return read

    def close(self) -> None:
        self._raw.close()
        super().close()


def _timed_response(left: Callable[[], float], sock: Any, *more: Any, **named: Any) -> HTTPResponse:
    import http.client

    response = http.client.HTTPResponse(sock, *more, **named)
    response.fp.close()
    response.fp = io.BufferedReader(_Timed(sock, left))
    return response


def _failure(error: OSError) -> str:
    """Why there was no answer, in words that hold no header."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    if "certificate" in str(error):
        return f"certificate verification failed: {getattr(error, 'verify_message', '')}"
    return error.strerror or ("the connection was closed" if isinstance(error, ConnectionError) else type(error).__name__)


def _retry_after(value: str | None) -> float | None:
    """Seconds to wait (RFC 9110, 10.2.3: a number or a date); None for anything else."""
    if value is None:
        return None
    if re.fullmatch(r"\d{1,9}", value.strip()):
        return float(value)
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def _partial_success(answer: Any) -> tuple[int, str]:
    """How many items an OTLP/JSON answer says were rejected, and what it says of them."""
    told = answer.get("partialSuccess") or {} if isinstance(answer, dict) else None
    if not isinstance(told, dict):
        raise ValueError("no OTLP answer")
    counts = [int(v) for k, v in told.items() if k.startswith("rejected")]
    return max(0, *counts, 0), str(told.get("errorMessage", ""))


def _reason_given(kind: str, body: bytes | None) -> str:
    """What a collector said when it refused, if it said so as OTLP has it (google.rpc.Status)."""
    from google.rpc.status_pb2 import Status  # type: ignore[import-untyped]

    try:
        if kind == "application/json":
            said = json.loads(body or b"{}").get("message")
        else:
            said = _parsed(Status, body or b"").message if kind == "application/x-protobuf" else None
    except (ValueError, AttributeError, RecursionError):
        return ""
    return f": {_text(said, 300)}" if said and isinstance(said, str) else ""


def _parsed(kind: Any, data: bytes) -> Any:
    """A protobuf message. Raises ValueError."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    try:
        return kind.FromString(data)
    except DecodeError:
        raise ValueError("not protobuf") from None


class Lane:
    """What is exported of one signal: a queue bounded in items and bytes, and the thread that empties it in batches.

    Whoever puts something on it never waits. When it is full the oldest goes, and is counted. `export` gets a batch and
    delivers it by way of `post`. At any time all that was put is exported, failed, dropped, queued or in the thread's hands.
    """

    LINGER = 1.0
    """Seconds that the first item waits for others to share its way."""
    ITEMS, BYTES = 4096, 32 * 1024 * 1024
    BATCH_ITEMS, BATCH_BYTES = 512, 4 * 1024 * 1024
    MANY = 64
    """So many items are sent without lingering."""

    def __init__(self, signal: str, post: Post, export: Callable[[list[Any]], None]) -> None:
        self.signal, self.post = signal, post
        self.exported = self.failed = self.dropped = 0
        self._export = export
        self._queue: deque[tuple[Any, int, int]] = deque()
        self._bytes = self._in_hand = 0
        self._lock = threading.Lock()
        self._work, self._hurry = threading.Event(), threading.Event()
        self._stopping = self._given_up = False
        self._thread = threading.Thread(target=self._run, name=f"telemetry-{signal}", daemon=True)
        self._thread.start()

    def put(self, item: Any, size: int, count: int = 1) -> None:
        """Take an item that stands for so many spans or lines and keeps about so many bytes."""
        with self._lock:
            if self._given_up:
                self.dropped += count
                return
            self._queue.append((item, size, count))
            self._bytes += size
            while len(self._queue) > self.ITEMS or self._bytes > self.BYTES:
                self._bytes -= self._queue[0][1]
                self.dropped += self._queue.popleft()[2]
            much = len(self._queue) >= self.MANY or self._bytes >= self.BATCH_BYTES
        if not self._work.is_set():
            self._work.set()
        if much and not self._hurry.is_set():
            self._hurry.set()

    def stats(self) -> dict[str, int]:
        with self._lock:
            return {"exported": self.exported, "failed": self.failed, "dropped": self.dropped}

    def stop(self, until: float) -> None:
        """Send what is queued, up to this moment."""
        self._stopping = True
        self.post.stop(until)
        self._work.set()
        self._hurry.set()

    def join(self, until: float) -> None:
        """Wait for the thread up to this moment, then give up on it and on what it still had to do."""
        self._thread.join(max(0.0, until - time.monotonic()))
        with self._lock:
            self._given_up = True
            self.failed += self._in_hand
            self.dropped += sum(count for _, _, count in self._queue)
            self._queue.clear()
            self._bytes = self._in_hand = 0
        self.post.abort()
        self._thread.join(0.2)

    def _run(self) -> None:
        while not self._stopping:
            self._work.wait()
            self._hurry.wait(self.LINGER)
            self._work.clear()
            self._hurry.clear()
            while batch := self._take():
                self._deliver(batch)
        while batch := self._take():
            self._deliver(batch)
        self.post.close()

    def _take(self) -> list[tuple[Any, int, int]]:
        batch: list[tuple[Any, int, int]] = []
        size = 0
        with self._lock:
            while self._queue and len(batch) < self.BATCH_ITEMS and size < self.BATCH_BYTES:
                batch.append(self._queue.popleft())
                size += batch[-1][1]
            self._bytes -= size
            self._in_hand = sum(count for _, _, count in batch)
        return batch

    def _deliver(self, batch: list[tuple[Any, int, int]]) -> None:
        try:
            self._export([item for item, _, _ in batch])
            verdict = self.post.verdict
        except Exception as e:  # noqa: BLE001 - a bug may cost the item that wakes it, not the thread and all others
            log.error("telemetry: %s cannot be encoded: %s", self.signal, type(e).__name__)
            verdict = Verdict(ok=False, status=413)
        if verdict.status == 413 and len(batch) > 1:  # too much at once
            half = len(batch) // 2
            self._deliver(batch[:half])
            self._deliver(batch[half:])
            return
        count = sum(count for _, _, count in batch)
        with self._lock:
            if self._given_up:
                return
            failed = min(verdict.rejected, count) if verdict.ok else count
            self.exported += count - failed
            self.failed += failed
            self._in_hand -= count


# 7. OpenTelemetry -----------------------------------------------------------------------------------------------------
METRIC_SECONDS = 15.0
"""Between two exports of the metrics, unless OTEL_METRIC_EXPORT_INTERVAL (milliseconds) says otherwise."""
MODELS = 256
"""Distinct values of the attribute `model`; what comes after is `other`."""
NO_STATS: dict[str, Any] = {
    "enabled": False, **{s: {"exported": 0, "failed": 0, "dropped": 0} for s in ("spans", "metrics", "logs")}, "last_error": None,
}  # fmt: skip
"""What /api/v1/stats says of telemetry that is off."""


def start(settings: Settings, version: str) -> Telemetry:
    """Begin to export. Only here OpenTelemetry is imported and threads are started."""
    for name, value in settings.headers.items():
        if re.search("auth|key|token|secret|cookie|team", name.lower()):
            keep_secret(value)
            keep_secret(value.rpartition(" ")[2])
    return Telemetry(settings, version)


class Telemetry:
    """All that is exported; one per process. Made by `start`."""

    def __init__(self, settings: Settings, version: str) -> None:
        self._settings, self._version = settings, version
        self._last_error: str | None = None
        self._told = float("-inf")
        self._lock = threading.Lock()
        self._stopped = False
        self._resource = _resource(settings, version)
        post = self._post("traces", PATIENCE_SECONDS)
        self._spans = Lane("spans", post, _span_export(post, self._resource, version, settings.capture_content))
        post = self._post("logs", PATIENCE_SECONDS)
        self._logs = Lane("logs", post, _log_export(post, self._resource, version))
        self._metrics = Meters(self._post("metrics", METRIC_SECONDS / 2), self._resource, version)
        self._bridge = _Bridge(self._logs)
        self._bridge.open()

    # what happens to a request
    def begin(self, traceparent: str | None, tracestate: str | None) -> Trace:
        """The ids of a request that comes with these headers (None: without)."""
        return begin(self._settings.sample_ratio, traceparent, tracestate)

    def sink(self, event: dict[str, Any]) -> None:
        """Take an event of a request. Never waits."""
        if event["type"] == "start":
            self._metrics.put(1)
        elif event["type"] == "complete":
            trace = event.get("_trace") or self.begin(event["traceparent"], event["tracestate"])
            facts = _facts(event, trace, self._settings.capture_content)
            self._metrics.put(facts)
            if trace.sampled:
                self._spans.put((trace, facts), facts["size"], span_count(facts))

    def http(
        self, method: str, route: str, status: int, start_ns: int, duration_ms: float, trace: Trace, client_address: str
    ) -> None:
        """The span of an HTTP request that was no accepted LLM request."""
        told = {
            "http.request.method": method if method in _METHODS else "_OTHER", "http.route": route or None,
            "url.path": route or None, "http.response.status_code": status, "client.address": client_address or None,
            "error.type": str(status) if status >= 500 else None,
        }  # fmt: skip
        parent, end_ns = trace.parent_span_id, start_ns + int(duration_ms * 1e6)
        self._lone(trace, "request", "server", trace.span_id, parent, start_ns, end_ns, told, failed=status >= 500)

    def call(
        self, *, kind: str, provider: str, start_ns: int, duration_ms: float, trace: Trace | None = None,
        span_id: str | None = None, server_address: str | None = None, server_port: int | None = None, method: str = "GET",
        status: int | None = None, error: str | None = None, error_type: str | None = None,
    ) -> None:  # fmt: skip
        """The `provider.http` span of a call outside a request's attempts: list_models, model_capabilities.

        With a `span_id` it is that child of the trace's `request` span; with only a trace (of `begin(None, None)`, whose ids
        were sent along) it is that trace's root; with neither it gets a trace of its own.
        """
        child, trace = span_id is not None, trace or self.begin(None, None)
        told = {
            "provider": provider, "kind": kind, "server.address": server_address, "server.port": server_port, "status": status,
            "http.request.method": method, "http.response.status_code": status, "error.type": error_type,
        }  # fmt: skip
        span_id, parent = (span_id, trace.span_id) if child else (trace.span_id, trace.parent_span_id)
        end_ns = start_ns + int(duration_ms * 1e6)
        failed, said = error_type is not None, error or error_type
        self._lone(trace, "provider.http", "client", span_id or "", parent, start_ns, end_ns, told, failed=failed, said=said)

    def _lone(
        self, trace: Trace, name: str, kind: str, span_id: str, parent: str | None, start_ns: int, end_ns: int,
        attributes: dict[str, Any], *, failed: bool, said: str | None = None,
    ) -> None:  # fmt: skip
        if not trace.sampled:
            return
        span: Span = {
            "name": name, "kind": kind, "span_id": span_id, "parent_span_id": parent, "start_ns": start_ns, "end_ns": end_ns,
            "attributes": _clean(attributes), "status": "error" if failed else None,
            "status_message": _text(said, 1024) if said else None, "events": [],
        }  # fmt: skip
        self._spans.put((trace, [span]), 2048)

    # how it goes
    def stats(self) -> dict[str, Any]:
        """The telemetry part of /api/v1/stats."""
        lanes = {lane.signal: lane.stats() for lane in (self._spans, self._metrics, self._logs)}
        return {"enabled": True, **lanes, "last_error": self._last_error}

    def flush_and_stop(self, seconds: float) -> None:
        """Send what is still here, for at most so many seconds whatever the collector does, and end every thread."""
        if self._stopped:
            return
        self._stopped = True
        self._bridge.close()
        until = time.monotonic() + seconds
        lanes: tuple[Lane | Meters, ...] = (self._spans, self._metrics, self._logs)
        before = [lane.failed + lane.dropped for lane in lanes]
        for lane in lanes:
            lane.stop(until)
        for lane in lanes:
            lane.join(until)
        lost = [(lane.failed + lane.dropped - n, lane.signal) for lane, n in zip(lanes, before, strict=True)]
        if any(n for n, _ in lost):
            told = ", ".join(f"{n} {signal}" for n, signal in lost if n)
            log.warning("telemetry: what was left could not be delivered within %g s: %s", seconds, told)

    def probe(self) -> list[dict[str, Any]]:
        """Send one test span, metric and log line, each once, and tell what came back:
        `{"signal", "ok", "status", "latency_ms", "message", "advice"}`."""
        return [self._try(signal) for signal in ("traces", "metrics", "logs")]

    def _try(self, signal: str) -> dict[str, Any]:
        post = self._post(signal, 0.0)
        began = time.monotonic()
        _PROBES[signal](post, self._resource, self._version)
        post.close()
        verdict = post.verdict
        ok = verdict.ok and not verdict.rejected
        message = verdict.message or f"HTTP {verdict.status}"
        return {
            "signal": signal, "ok": ok, "status": verdict.status, "latency_ms": round((time.monotonic() - began) * 1000, 1),
            "message": f"{post.url}: {message}", "advice": "" if ok else _advice(verdict),
        }  # fmt: skip

    def _post(self, signal: str, patience: float) -> Post:
        url = f"{self._settings.otlp_endpoint.rstrip('/')}/v1/{signal}"
        own = {k.lower(): v for k, v in self._settings.headers.items()}
        headers = {"user-agent": f"opensourcellmrouter/{self._version}", **own}
        return Post(url, headers, patience=patience, tell=self._tell, read=_reader(signal))

    def _tell(self, what: str) -> None:
        """Note a failure, and put it into the program's log, at most once a minute."""
        self._last_error = what
        with self._lock:
            now = time.monotonic()
            if now - self._told < 60:
                return
            self._told = now
        log.warning("telemetry does not get through: %s", what)


_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "DELETE", "CONNECT", "OPTIONS", "TRACE", "PATCH"))
_ADVICE = (
    (r"web page", "That is a web server, not a collector: otlp_endpoint must name the OTLP/HTTP port, usually 4318."),
    (r"redirect", "Put the address it redirects to into otlp_endpoint; often it is https instead of http."),
    (r"HTTP 404", "otlp_endpoint is the base: /v1/traces, /v1/metrics and /v1/logs are appended to it."),
    (r"HTTP 40[13]", "The collector wants other credentials: see telemetry.headers."),
    (r"HTTP (405|415)", "This port does not speak OTLP over HTTP with protobuf; gRPC has its own port, usually 4317."),
    (r"HTTP (429|50[234])", "The collector is busy or what lies behind it is away; exports are tried again."),
    (r"partial success|HTTP 400", "The collector took the request but not what was in it; its own log says why."),
    (r"refused", "Nothing listens there: is the collector running, and is this its OTLP/HTTP port (usually 4318)?"),
    (r"no answer in time", "Something accepts connections there and does not answer, or a firewall swallows them."),
    (r"certificate", "The collector's certificate is not trusted here; SSL_CERT_FILE may name the authority that signed it."),
    (r"not OTLP|too long|not speak HTTP", "Something answers there that is no collector."),
)


def _advice(verdict: Verdict) -> str:
    """The likely cause of a failure and its cure."""
    return next((text for shape, text in _ADVICE if re.search(shape, verdict.message)), "See the collector's own log.")


_FACTS = (
    "ts_ns", "generation_id", "outcome", "status", "error", "error_type", "provider", "requested_model", "sent_model", "stream",
    "duration_ms", "ttft_ms", "opened_ms", "overhead_ms", "rule", "tags", "client_format", "operation", "method", "route",
    "client_address", "api_key_name", "vendor", "server_address", "server_port", "dropped", "usage_source", "cost", "attempts",
    "user", "session_id",
)  # fmt: skip
_MEASURED = (
    "outcome", "error_type", "provider", "sent_model", "duration_ms", "ttft_ms", "overhead_ms", "operation", "vendor",
    "server_address", "server_port", "usage_source", "attempts",
)  # fmt: skip
_ANSWERED = ("id", "model", "finish_reason", "usage")


def _facts(record: Mapping[str, Any], trace: Trace, content: bool) -> dict[str, Any]:
    """What is needed of a record later on, so that a queue does not keep prompts alive that nobody will send."""
    response = record["response"]
    facts = {k: record[k] for k in (_FACTS if trace.sampled else _MEASURED)}
    facts["response"] = response and {k: response[k] for k in _ANSWERED}
    if not trace.sampled:
        return facts
    facts["_trace"] = trace
    facts["params"] = _params(record["request"])
    facts["size"] = 4096 + sum(len(v) for v in facts.values() if type(v) is str)
    if content:
        said = {k: record[k] for k in ("system", "messages", "tools", "response")}
        facts |= said
        facts["size"] += _size(said)
    return facts


def _size(value: Any) -> int:
    """About how many bytes a JSON value keeps."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return 64 + sum(_size(v) for v in value.values())
    return 64 + sum(map(_size, value)) if isinstance(value, list) else 8


def _resource(settings: Settings, version: str) -> Any:
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.version import __version__ as sdk_version

    told = {_text(k, 256): _text(v) for k, v in settings.resource.items()}
    named = told.get("service.name") if settings.service_name == Settings.service_name else None
    return Resource({
        "telemetry.sdk.language": "python", "telemetry.sdk.name": "opentelemetry", "telemetry.sdk.version": sdk_version,
        "service.version": version, "service.instance.id": os.urandom(16).hex(), "host.name": socket.gethostname(),
        "process.pid": os.getpid(), **told, "service.name": named or _text(settings.service_name, 256),
    })  # fmt: skip


def _reader(signal: str) -> Callable[[bytes], tuple[int, str]]:
    """What reads this signal's protobuf answers: how many items were rejected, and what is said of them."""
    from opentelemetry.proto.collector.logs.v1.logs_service_pb2 import ExportLogsServiceResponse
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    kind, count = {
        "traces": (ExportTraceServiceResponse, "rejected_spans"),
        "metrics": (ExportMetricsServiceResponse, "rejected_data_points"),
        "logs": (ExportLogsServiceResponse, "rejected_log_records"),
    }[signal]

    def read(data: bytes) -> tuple[int, str]:
        answer = _parsed(kind, data)
        if not answer.HasField("partial_success"):
            raise ValueError("nothing in it that is known")
        return max(0, getattr(answer.partial_success, count)), answer.partial_success.error_message

    return read


def _paced(items: Sequence[Any]) -> Iterator[Any]:
    """The items, with a pause now and then: a thread that computes keeps the interpreter for 5 ms at a time from threads
    that serve requests, unless it lets go of it."""
    for number, item in enumerate(items, 1):
        yield item
        if number % 32 == 0:
            time.sleep(0.0005)


class _Session:
    """`Post` in the shape of a requests.Session."""

    def __init__(self, post: Post) -> None:
        self._post = post
        self.verify: Any = True
        self.cert: Any = None

    def request(self, method: str, url: str, *, data: bytes | None = None, **ignored: Any) -> _Outcome:
        outcome = self._post.request(method, url, data=data)
        if outcome.error is not None:
            raise outcome.error
        return outcome

    def close(self) -> None:
        self._post.close()


def _exporter(kind: Any, post: Post) -> Any:
    """An official exporter that delivers by way of `post` and heeds no OTEL_* variable."""
    from opentelemetry.exporter.otlp.proto.http import Compression

    fixed = {"endpoint": post.url, "timeout": PATIENCE_SECONDS, "compression": Compression.NoCompression}
    try:
        return kind(**fixed, _transport=post)
    except TypeError:  # a version without this parameter, which is private but spares importing requests
        return kind(**fixed, session=_Session(post))


# spans
def _span_export(post: Post, resource: Any, version: str, content: bool) -> Callable[[list[Any]], None]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import SpanExportResult

    class SpanExporter(OTLPSpanExporter):
        """The official exporter, but it gets its spans encoded."""

        def export(self, spans: Sequence[Any]) -> SpanExportResult:
            done = self._client.export(_export_request(spans, head))
            return SpanExportResult.SUCCESS if done.success else SpanExportResult.FAILURE

    head = _scope_head(resource, version)
    exporter = _exporter(SpanExporter, post)

    def encoded(items: list[tuple[Trace, Any]]) -> Iterator[bytes]:
        for trace, told in _paced(items):
            yield encode(trace, told if isinstance(told, list) else spans(told, content))

    def export(items: list[tuple[Trace, Any]]) -> None:
        exporter.export(list(encoded(items)))

    return export


def _scope_head(resource: Any, version: str) -> tuple[bytes, bytes]:
    """The encoded resource and instrumentation scope that every export begins with."""
    from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import SpanContext

    scope = InstrumentationScope("opensourcellmrouter", version)
    any_span = ReadableSpan("", SpanContext(1, 1, False), resource=resource, instrumentation_scope=scope)
    (made,) = encode_spans([any_span]).resource_spans
    return made.resource.SerializeToString(), made.scope_spans[0].scope.SerializeToString()


def _export_request(encoded: Iterable[bytes], head: tuple[bytes, bytes]) -> bytes:
    """An ExportTraceServiceRequest of spans encoded as ScopeSpans fields."""
    resource, scope = head
    return _field(b"\x0a", _field(b"\x0a", resource) + _field(b"\x12", _field(b"\x0a", scope) + b"".join(encoded)))


# logs
class Line(NamedTuple):
    """One line of the program's log on its way out."""

    time_ns: int
    level: int
    level_name: str
    logger: str
    body: str
    told: dict[str, str]
    trace: Trace | None


class _Bridge(logging.Handler):
    """Takes the program's own lines, but those about telemetry: they would tell of themselves for ever."""

    def __init__(self, lane: Lane) -> None:
        super().__init__(logging.INFO)
        self._lane = lane
        self._levels: dict[str, int] = {}

    def open(self) -> None:
        """Begin to listen. The SDK falls silent meanwhile: what it has to say, `Post` says better."""
        ours = logging.getLogger("opensourcellmrouter")
        self._levels = {name: logging.getLogger(name).level for name in (ours.name, "opentelemetry")}
        logging.getLogger("opentelemetry").setLevel(logging.CRITICAL + 1)
        if ours.getEffectiveLevel() > logging.INFO:
            ours.setLevel(logging.INFO)
        ours.addHandler(self)

    def close(self) -> None:
        """Leave logging as it was."""
        logging.getLogger("opensourcellmrouter").removeHandler(self)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)
        self._levels = {}
        super().close()

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == log.name:
            return
        try:
            body = record.getMessage()[:8192]
        except (TypeError, ValueError):
            body = str(record.msg)[:8192]
        told: dict[str, str] = {}
        if record.exc_info and record.exc_info[0]:
            # Where it was raised and of what kind it is; its text may hold what a client said.
            told = {"exception.type": record.exc_info[0].__name__}
            told["exception.stacktrace"] = "".join(traceback.format_tb(record.exc_info[2]))[-8192:]
        trace: Trace | None = getattr(_here, "trace", None)
        line = Line(int(record.created * 1e9), record.levelno, record.levelname, record.name, body, told, trace)
        self._lane.put(line, len(body) + 512)


def _log_export(post: Post, resource: Any, version: str) -> Callable[[list[Any]], None]:
    from opentelemetry._logs import LogRecord, SeverityNumber
    from opentelemetry.exporter.otlp.proto.http._log_exporter import OTLPLogExporter
    from opentelemetry.sdk._logs import ReadableLogRecord
    from opentelemetry.sdk.util.instrumentation import InstrumentationScope
    from opentelemetry.trace import TraceFlags

    exporter = _exporter(OTLPLogExporter, post)
    severities = {20: SeverityNumber.INFO, 30: SeverityNumber.WARN, 40: SeverityNumber.ERROR}

    def readable(line: Line) -> ReadableLogRecord:
        severity = severities.get(line.level // 10 * 10, SeverityNumber.FATAL)
        made = LogRecord(
            timestamp=line.time_ns, observed_timestamp=line.time_ns, severity_text=line.level_name, severity_number=severity,
            body=_text(line.body, 8192), attributes=_clean(line.told),
        )  # fmt: skip
        if line.trace is not None:
            made.trace_id, made.span_id = int(line.trace.trace_id, 16), int(line.trace.span_id, 16)
            made.trace_flags = TraceFlags(line.trace.flags)
        return ReadableLogRecord(made, resource, InstrumentationScope(line.logger, version))

    def export(items: list[Line]) -> None:
        exporter.export([readable(line) for line in items])

    return export


# metrics
_MILLISECONDS = (5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000)
_OVERHEAD = (0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)
_DURATION = (0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92)
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864)


class _Capped:
    """Names as attribute values: the first 256 as they are, whatever else clients think of as `other`."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}

    def __call__(self, name: str | None) -> str:
        name = name or "none"
        if name not in self._known:
            if len(self._known) >= MODELS:
                return "other"
            self._known[name] = _text(name, 200)
        return self._known[name]


class Meters:
    """The metrics: instruments made once, fed from a queue, exported from time to time; all on one thread.

    They are cumulative, so an export that fails loses nothing: the next one says it all.
    """

    signal = "metrics"
    LINGER = 1.0
    ITEMS = 10_000

    def __init__(self, post: Post, resource: Any, version: str) -> None:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.sdk.metrics import AlwaysOffExemplarFilter, MeterProvider
        from opentelemetry.sdk.metrics.export import InMemoryMetricReader

        self.post = post
        self.exported = self.failed = self.dropped = 0
        self._exporter = _exporter(OTLPMetricExporter, post)
        self._reader = InMemoryMetricReader()
        provider = MeterProvider([self._reader], resource, exemplar_filter=AlwaysOffExemplarFilter(), shutdown_on_exit=False)
        self._make(provider.get_meter("opensourcellmrouter", version))
        self._model, self._response_model = _Capped(), _Capped()
        self._queue: deque[Any] = deque()
        self._work, self._stop = threading.Event(), threading.Event()
        self._in_hand = 0
        self._thread = threading.Thread(target=self._run, name="telemetry-metrics", daemon=True)
        self._thread.start()

    def _make(self, meter: Any) -> None:
        def histogram(name: str, unit: str, text: str, bounds: Sequence[float]) -> Any:
            return meter.create_histogram(name, unit, text, explicit_bucket_boundaries_advisory=bounds)

        self._requests = meter.create_counter("router.requests", "{request}", "Requests handled")
        self._input = meter.create_counter("router.tokens.input", "{token}", "Input tokens")
        self._output = meter.create_counter("router.tokens.output", "{token}", "Output tokens")
        self._in_flight = meter.create_up_down_counter("router.in_flight", "{request}", "Requests under way")
        self._in_flight.add(0)
        self._duration = histogram("router.request.duration_ms", "ms", "End-to-end duration", _MILLISECONDS)
        self._overhead = histogram("router.overhead_ms", "ms", "The router's own share of the duration", _OVERHEAD)
        self._gen_ai_duration = histogram("gen_ai.client.operation.duration", "s", "GenAI operation duration", _DURATION)
        self._gen_ai_tokens = histogram("gen_ai.client.token.usage", "{token}", "Input and output tokens used", _TOKENS)
        self._first_token = histogram("gen_ai.server.time_to_first_token", "s", "Time to generate the first token", _FIRST_TOKEN)

    def put(self, item: dict[str, Any] | int) -> None:
        """Take the facts of a finished request, or 1 for one that was accepted."""
        self._queue.append(item)
        if len(self._queue) > self.ITEMS:  # the thread does not keep up; no request may go uncounted
            self._count([self._queue.popleft()])  # by whoever comes now
        if not self._work.is_set():
            self._work.set()

    def stats(self) -> dict[str, int]:
        return {"exported": self.exported, "failed": self.failed, "dropped": self.dropped}

    def stop(self, until: float) -> None:
        """Count what is queued and export once more, up to this moment."""
        self.post.stop(until)
        self._stop.set()
        self._work.set()

    def join(self, until: float) -> None:
        """Wait for the thread up to this moment, then give up on it."""
        self._thread.join(max(0.0, until - time.monotonic()))
        lost, self._in_hand = self._in_hand, 0
        self.failed += lost
        self.post.abort()
        self._thread.join(0.2)

    def _run(self) -> None:
        interval = _interval(os.environ)
        due = time.monotonic() + interval
        while not self._stop.is_set():
            if self._work.wait(max(0.0, due - time.monotonic())):
                self._stop.wait(min(self.LINGER, max(0.0, due - time.monotonic())))
            self._count_all()
            if time.monotonic() >= due:
                self._export()
                due = time.monotonic() + interval
        self._count_all()
        self._export()
        self.post.close()

    def _count_all(self) -> None:
        self._work.clear()
        self._count([self._queue.popleft() for _ in range(len(self._queue))])

    def _count(self, items: Sequence[Any]) -> None:
        """Counters are added up first: each call of the SDK costs as much as making a span."""
        flow = 0
        sums: dict[tuple[str, str, bool], list[int]] = {}
        for item in _paced(items):
            if isinstance(item, int):
                flow += item
            else:
                flow -= 1
                self._measure_safely(item, sums)
        for (provider, model, failed), (requests, tokens_in, tokens_out) in sums.items():
            labels = {"provider": provider, "model": model, "error": failed}
            self._requests.add(requests, labels)
            if not failed:
                self._input.add(tokens_in, labels)
                self._output.add(tokens_out, labels)
        if flow:
            self._in_flight.add(flow)

    def _measure_safely(self, facts: Mapping[str, Any], sums: dict[tuple[str, str, bool], list[int]]) -> None:
        try:
            self._measure(facts, sums)
        except Exception as e:  # noqa: BLE001 - a bug may cost the request that wakes it, not the thread and all others
            log.error("telemetry: a request cannot be measured: %s", type(e).__name__)

    def _measure(self, facts: Mapping[str, Any], sums: dict[tuple[str, str, bool], list[int]]) -> None:
        """One finished request."""
        failed = facts["outcome"] in _FAILED
        provider, model = facts["provider"] or "none", self._model(facts["sent_model"])
        labels = {"provider": provider, "model": model, "error": failed}
        self._duration.record(facts["duration_ms"], labels)
        self._overhead.record(max(0.0, facts["overhead_ms"]), labels)
        usage = None if failed else _used(facts)
        of = sums.setdefault((provider, model, failed), [0, 0, 0])
        of[0] += 1
        if usage:
            of[1] += usage["input_tokens"]
            of[2] += usage["output_tokens"]
        if facts["attempts"]:
            self._measure_gen_ai(facts, usage, failed)

    def _measure_gen_ai(self, facts: Mapping[str, Any], usage: Mapping[str, int] | None, failed: bool) -> None:
        labels: dict[str, Any] = {
            "gen_ai.operation.name": facts["operation"], "gen_ai.provider.name": facts["vendor"] or "none",
            "gen_ai.request.model": self._model(facts["sent_model"]),
        }  # fmt: skip
        if facts["server_address"]:
            labels |= {"server.address": facts["server_address"], "server.port": facts["server_port"]}
        if facts["response"] and facts["response"]["model"]:
            labels["gen_ai.response.model"] = self._response_model(facts["response"]["model"])
        if usage:
            self._gen_ai_tokens.record(usage["input_tokens"], {**labels, "gen_ai.token.type": "input"})
            self._gen_ai_tokens.record(usage["output_tokens"], {**labels, "gen_ai.token.type": "output"})
        if facts["ttft_ms"] is not None:
            self._first_token.record(facts["ttft_ms"] / 1000, labels)
        if failed:
            labels["error.type"] = facts["error_type"] or "error"
        self._gen_ai_duration.record((facts["attempts"][-1]["duration_ms"] or 0.0) / 1000, labels)

    def _export(self) -> None:
        data = self._reader.get_metrics_data()
        metrics = [m for r in data.resource_metrics for s in r.scope_metrics for m in s.metrics] if data else []
        self._in_hand = count = sum(len(m.data.data_points) for m in metrics)
        if not count:
            return
        self._exporter.export(data)
        if self._in_hand:
            verdict = self.post.verdict
            failed = min(verdict.rejected, count) if verdict.ok else count
            self.exported, self.failed, self._in_hand = self.exported + count - failed, self.failed + failed, 0


def _interval(environ: Mapping[str, str]) -> float:
    told = environ.get("OTEL_METRIC_EXPORT_INTERVAL", "")
    return max(0.1, int(told) / 1000) if re.fullmatch(r"\d{1,8}", told) else METRIC_SECONDS


# the probe of `router.py doctor`
def _probe_traces(post: Post, resource: Any, version: str) -> None:
    trace, now = begin(1.0, None, None), time.time_ns()
    span: Span = {
        "name": "opensourcellmrouter.probe", "kind": "internal", "span_id": trace.span_id, "parent_span_id": None,
        "start_ns": now - 1_000_000, "end_ns": now, "attributes": {}, "status": None, "status_message": None, "events": [],
    }  # fmt: skip
    _span_export(post, resource, version, content=False)([(trace, [span])])


def _probe_metrics(post: Post, resource: Any, version: str) -> None:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader

    reader = InMemoryMetricReader()
    meter = MeterProvider([reader], resource, shutdown_on_exit=False).get_meter("opensourcellmrouter", version)
    meter.create_counter("opensourcellmrouter.probe").add(1)
    _exporter(OTLPMetricExporter, post).export(reader.get_metrics_data())


def _probe_logs(post: Post, resource: Any, version: str) -> None:
    line = Line(time.time_ns(), logging.INFO, "INFO", "opensourcellmrouter", "a test line", {}, None)
    _log_export(post, resource, version)([line])


_PROBES = {"traces": _probe_traces, "metrics": _probe_metrics, "logs": _probe_logs}
