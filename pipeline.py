"""The decision: who answers this request, and the one record of what happened.

A `Run` is one accepted request. Whatever its client and its provider speak and whether it streams or not, it is the same
sequence of events: the rules name candidates, an attempt turns a candidate's answer into events, the fold over them is the
answer, and `Run.close` - the only place where a request ends - makes the one record of it and hands that to every sink
(log, feed, broadcast, telemetry). The outcome is "cancelled" until something else is known, so a client that leaves without
a word is told apart from one that was served.

Rules, plugins and classifiers are tables of small parts: `RULES`, `PLUGINS`, `CLASSIFIERS`.
"""

from __future__ import annotations

import logging
import random
import statistics
import string
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import providers
from providers import (
    Answer,
    Call,
    ClientGone,
    Event,
    Malformed,
    NoProvider,
    Provider,
    Reasoning,
    Reply,
    Request,
    RequestError,
    Stamp,
    Text,
    ToolCall,
    Upstream,
    UpstreamError,
    Usage,
)  # fmt: skip

log = logging.getLogger("opensourcellmrouter.pipeline")

HOLD = 5.0
"""Seconds for which the head of a stream is held back, so that an early failure is a real status and may still move on to
the next candidate; longer, and a proxy's read timeout would count the loading of a model."""
HEARTBEAT = 15.0
"""Seconds of upstream silence after which a waiting client gets an SSE comment."""
Sink = Callable[[dict[str, Any]], None]
Blocks = list[tuple[bytes, list[Event]]]


# Settings ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Retry:
    """The [retry] section."""

    attempts: int = field(default=3, metadata={"doc": "attempts one request may use before its first byte"})
    on_status: tuple[int, ...] = field(
        default=(408, 429, 500, 502, 503, 504), metadata={"doc": "upstream statuses that let the next candidate try"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 20:
            raise ValueError("attempts must lie between 1 and 20")
        if not all(400 <= s <= 599 for s in self.on_status):
            raise ValueError("on_status takes HTTP error statuses, 400 to 599")


@dataclass(frozen=True)
class Breaker:
    """The [breaker] section."""

    failures: int = field(default=5, metadata={"doc": "consecutive failures that rest a provider"})
    cooldown_seconds: float = field(default=30.0, metadata={"doc": "seconds it rests; then one probe decides"})

    def __post_init__(self) -> None:
        if self.failures < 1 or not 0 < self.cooldown_seconds <= 86400:
            raise ValueError("failures must be at least 1 and cooldown_seconds between 0 and 86400")


# A provider in service ------------------------------------------------------------------------------------------------
class Lane:
    """A provider in service: its upstream, its breaker, and what was measured of it lately."""

    def __init__(self, upstream: Upstream, breaker: Breaker) -> None:
        self.upstream = upstream
        self.provider: Provider = upstream.provider
        self.name = upstream.name
        self.requests = self.errors = 0
        self._breaker = breaker
        self._failures = 0
        self._rests_until = 0.0
        self._probing = False
        self._lock = threading.Lock()
        self._measured: dict[str, deque[tuple[float, float]]] = {
            "ttft_ms": deque(maxlen=100),
            "tokens_per_s": deque(maxlen=100),
        }

    @property
    def models(self) -> tuple[str, ...]:
        """The models it is known to serve."""
        return getattr(self.upstream.language, "MODELS", ()) + tuple(m for m in self.provider.models if m != "*")

    def resting(self) -> float:
        """Seconds until this provider may be asked again; 0 when it may."""
        with self._lock:
            if self._probing:
                return self._breaker.cooldown_seconds
            return max(0.0, self._rests_until - time.monotonic())

    def asked(self) -> bool:
        """Take the lane for one attempt; False if it rests. After a rest only one attempt, the probe, gets it."""
        with self._lock:
            self.requests += 1
            if self._failures < self._breaker.failures:
                return True
            if self._probing or time.monotonic() < self._rests_until:
                self.requests -= 1
                return False
            self._probing = True
            return True

    def answered(self, healthy: bool | None) -> None:
        """How the attempt went; None says nothing of the provider (the client left, its request was at fault)."""
        with self._lock:
            self._probing = False
            if healthy:
                self._failures = 0
            elif healthy is not None:
                self.errors += 1
                self._failures += 1
                if self._failures >= self._breaker.failures:
                    self._rests_until = time.monotonic() + self._breaker.cooldown_seconds

    def measure(self, name: str, value: float) -> None:
        self._measured[name].append((time.monotonic(), value))

    def measured(self, name: str, least: int = 1) -> float | None:
        """The median over the last ten minutes, None with fewer than `least` values."""
        since = time.monotonic() - 600
        values = [v for t, v in tuple(self._measured[name]) if t >= since]
        return statistics.median(values) if len(values) >= least else None

    def number(self, name: str, configured: float | None) -> float | None:
        """What rules go by: measured once 20 requests tell it, configured before."""
        measured = self.measured(name, least=20) if self.provider.measured else None
        return configured if measured is None else measured

    def stats(self) -> dict[str, Any]:
        """This provider's part of /api/v1/stats."""
        state = "open" if self.resting() else "closed" if self._failures < self._breaker.failures else "half-open"
        numbers = {name: self.measured(name) for name in self._measured}
        return {
            "requests": self.requests,
            "errors": self.errors,
            **numbers,
            "breaker": state,
            "models": list(self.models),
        }


# Rules ----------------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Candidate:
    """A provider a rule names: the model to send, the number it was judged by, and why it is not drawn (None: it may be)."""

    lane: Lane
    model: str
    value: float | None = None
    skipped: str | None = None


@dataclass(slots=True)
class Verdict:
    """What a rule says of a request: the reason in short and its candidates in order."""

    reason: str
    candidates: list[Candidate] = field(default_factory=list)

    @property
    def live(self) -> list[Candidate]:
        return [c for c in self.candidates if c.skipped is None]


@dataclass(slots=True)
class Question:
    """What rules decide about: a model name, the request's tags, and the providers in service."""

    model: str
    tags: Sequence[str]
    lanes: Mapping[str, Lane]

    def among(self, names: Sequence[str]) -> list[Lane]:
        """The named providers that are in service, all for no names; left-out ones are never drawn."""
        return [self.lanes[n] for n in names if n in self.lanes] if names else list(self.lanes.values())


@dataclass(frozen=True)
class Rule:
    """One [[routers]] table. A rule yields candidates, or passes through to the next."""

    name: str = field(default="", kw_only=True, metadata={"doc": "what X-Router-Rule and the record call it"})

    def names(self) -> list[str]:
        """The providers this rule refers to, for the check at start."""
        one = getattr(self, "provider", "")
        return [one] if one else list(getattr(self, "providers", ()))

    def judge(self, question: Question) -> Verdict:
        raise NotImplementedError


@dataclass(frozen=True)
class Prefix(Rule):
    """Models whose name begins with `model_prefix` go to one provider."""

    model_prefix: str = field(metadata={"doc": "what the model's name begins with"})
    provider: str = field(metadata={"doc": "who answers"})
    rewrite_model: str = field(default="", metadata={"doc": "the model to send instead"})

    def judge(self, question: Question) -> Verdict:
        if not question.model.startswith(self.model_prefix):
            return Verdict(f"the model does not begin with {self.model_prefix!r}")
        lanes = question.among([self.provider])
        return Verdict(f"the model begins with {self.model_prefix!r}", _offer(lanes, question, self.rewrite_model))


@dataclass(frozen=True)
class Fallback(Rule):
    """Any model, the best provider first: score = quality_bias * quality - (1 - quality_bias) * cost_per_1m_tokens."""

    providers: tuple[str, ...] = field(default=(), metadata={"doc": "empty: all"})
    quality_bias: float = field(default=0.5, metadata={"doc": "0: the cheapest, 1: the best"})
    rewrite_model: str = field(default="", metadata={"doc": "the model to send instead"})

    def __post_init__(self) -> None:
        if not 0.0 <= self.quality_bias <= 1.0:
            raise ValueError("quality_bias must lie between 0 and 1")

    def judge(self, question: Question) -> Verdict:
        offered = _offer(question.among(self.providers), question, self.rewrite_model)
        for candidate in offered:
            p = candidate.lane.provider
            candidate.value = self.quality_bias * p.quality - (1 - self.quality_bias) * p.cost_per_1m_tokens
        return Verdict("by score", sorted(offered, key=lambda c: -(c.value or 0.0)))


@dataclass(frozen=True)
class Random(Rule):
    """Any model, each live candidate equally likely."""

    providers: tuple[str, ...] = field(default=(), metadata={"doc": "empty: all"})
    rewrite_model: str = field(default="", metadata={"doc": "the model to send instead"})
    candidates: tuple[dict[str, str], ...] = field(default=(), metadata={"doc": "pairs of provider and model instead"})

    def __post_init__(self) -> None:
        for pair in self.candidates:
            if set(pair) - {"provider", "model"} or "provider" not in pair:
                raise ValueError("candidates takes tables with provider and model")

    def names(self) -> list[str]:
        return [*self.providers, *(c["provider"] for c in self.candidates)]

    def judge(self, question: Question) -> Verdict:
        if self.candidates:
            offered = [
                c for pair in self.candidates for c in _offer(question.among([pair["provider"]]), question, pair.get("model", ""))
            ]
        else:
            offered = _offer(question.among(self.providers), question, self.rewrite_model)
        return Verdict("at random", random.sample(offered, len(offered)))


def _offer(lanes: Sequence[Lane], question: Question, rewrite: str) -> list[Candidate]:
    """Candidates for these providers; a resting one is named but never drawn."""
    return [Candidate(lane, rewrite or question.model, skipped="resting" if lane.resting() else None) for lane in lanes]


RULES: dict[str, type[Rule]] = {"prefix": Prefix, "fallback": Fallback, "random": Random}


def rule_label(rule: Rule, index: int) -> str:
    """How headers and records call a rule: its name, else its place and type."""
    kind = next(kind for kind, cls in RULES.items() if type(rule) is cls)
    return rule.name or f"{index}:{kind}"


# One attempt ----------------------------------------------------------------------------------------------------------
class Attempt:
    """One candidate asked once: opens the upstream, gives its answer as blocks of events, knows how it went."""

    def __init__(self, run: Run, candidate: Candidate, number: int) -> None:
        self._run, self._lane = run, candidate.lane
        self._upstream = candidate.lane.upstream
        self._began = time.monotonic()
        self._reply: Reply | None = None
        self._settled = False
        self.candidate = candidate
        self.call: Call | None = None
        self.begun = False
        self.first_token: float | None = None
        self.record: dict[str, Any] = {
            "provider": candidate.lane.name, "model": candidate.model, "format": self._lane.provider.format,
            "vendor": self._upstream.vendor, "server_address": self._upstream.address, "server_port": self._upstream.port,
            "kind": None, "attempt": number, "status": None, "error": None, "error_type": None,
            "start_ms": _ms(self._began - run.accepted), "duration_ms": None, "headers_ms": None, "first_token_ms": None,
            "request_id": None, "span_id": None, "timings": None,
        }  # fmt: skip

    def blocks(self) -> Iterator[Blocks | None]:
        """The answer as it comes; None whenever `run.until` passed with nothing new. Raises UpstreamError."""
        request, language = self._run.request, self._upstream.language
        self.call = language.build(request, self.candidate.model, self._lane.provider)
        self.record["kind"] = self.call.kind
        reply = self._reply = self._upstream.send(self.call, self._run)
        while not reply.head(self._run.until):
            yield None
        self.record["headers_ms"] = self._elapsed()
        self.record["status"] = reply.status
        if reply.status != 200:
            raise self._refusal(reply)
        yield from self._stream(reply) if request.stream else self._whole(reply)

    def _refusal(self, reply: Reply) -> UpstreamError:
        body = providers.read_object(reply.read_all())
        parse_error = getattr(self._upstream.language, "parse_error", None)
        detail = parse_error(body) if parse_error and body is not None else None
        return providers.refusal(reply.status, reply.headers, detail, self._run.pipeline.retry.on_status)

    def _whole(self, reply: Reply) -> Iterator[Blocks]:
        data = reply.read_all()
        try:
            events = self._upstream.language.parse(data, self._run.request)
        except providers.SHAPE_ERRORS:
            raise providers.malformed("an answer of a shape that its format does not have") from None
        self.begun = True
        yield [(data, events)]

    def _stream(self, reply: Reply) -> Iterator[Blocks | None]:
        parser = self._upstream.language.Parser()
        held: Blocks = []
        while not self._run.answer.done:
            piece = reply.read(self._run.until)
            if piece is None:
                yield None
                continue
            held += parser.feed(piece) if piece else parser.end()
            if not self.begun and any(events for _, events in held):
                self._begin(held, reply)
            if self.begun and held:
                yield held
                held = []
            if not piece:
                break
        if not self.begun:
            raise providers.malformed("an empty answer")
        if not self._run.answer.complete:
            raise providers.lost("the provider's stream ended in the middle")
        self._drain(reply)

    def _begin(self, held: Blocks, reply: Reply) -> None:
        if any(isinstance(e, Malformed) for _, events in held for e in events[:1]):
            raise providers.malformed("a stream that does not begin with an event")
        self.begun = True
        reply.streaming()

    def _drain(self, reply: Reply) -> None:
        """The answer is complete; read the end of its framing, if it comes at once, so that the connection can be kept."""
        try:
            while reply.read(time.monotonic()):
                pass
        except (RequestError, ClientGone):
            return  # the answer was complete before; the connection is closed instead of kept

    def token(self) -> None:
        """The first token of the answer has come."""
        self.first_token = time.monotonic()
        self.record["first_token_ms"] = self._elapsed()

    def settle(self, error: RequestError | ClientGone | None, *, healthy: bool | None) -> None:
        """Note how it went and let go of the upstream; only the first call counts."""
        if self._settled:
            return
        self._settled = True
        if self._reply is not None:
            self._reply.close()
        self.record["duration_ms"] = self._elapsed()
        if error is not None:
            self.record["error"], self.record["error_type"] = str(error), error.code
        self._lane.answered(healthy)

    def _elapsed(self) -> float:
        return _ms(time.monotonic() - self._began)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


# One request ----------------------------------------------------------------------------------------------------------
@dataclass(slots=True)
class Arrival:
    """What the front door knows of a request beyond its body."""

    route: str
    method: str = "POST"
    client_address: str = ""
    api_key_name: str | None = None
    client_gone: Callable[[], bool] = bool
    gone_code: Callable[[], str] = lambda: "client_disconnected"
    traceparent: str | None = None
    tracestate: str | None = None
    accepted: float = field(default_factory=time.monotonic)


class Shutdown(RequestError):
    """The router is stopping and its drain time is over."""

    status = 503
    kind = "overloaded"


class Overloaded(RequestError):
    """More requests than may run at once."""

    status = 503
    kind = "overloaded"


_ALPHABET = string.ascii_letters + string.digits


class Run:
    """One accepted request, from its acceptance to its record.

    `open` gets the answer under way (for a whole answer: all of it) or raises the RequestError the client is to be told.
    Then `headers` are known, and `whole` or the iteration gives the body. `close` ends it, whenever it is called.
    """

    def __init__(self, pipeline: Pipeline, request: Request, arrival: Arrival) -> None:
        self.pipeline, self.request, self.arrival = pipeline, request, arrival
        self.accepted = arrival.accepted
        self.ts_ns = time.time_ns()
        self.ts_ms = self.ts_ns // 1_000_000
        self.generation_id = f"gen-{self.ts_ms // 1000}-{''.join(random.choices(_ALPHABET, k=20))}"
        self.id, self.in_flight = pipeline.enter()
        self.answer = Answer()
        self.until = float("inf")
        self.rule: str | None = None
        self.reason: str | None = None
        self.tags: list[str] = []
        self.attempt: Attempt | None = None
        self.whole = b""
        self._attempts: list[Attempt] = []
        self._outcome, self._status = "cancelled", 200
        self._error: RequestError | ClientGone | None = None
        self._tried: set[str] = set()
        self._last_error: UpstreamError | None = None
        self._committed = False
        self._ended = False
        self._closed = False
        self._opened: float | None = None
        self._flow: Iterator[Blocks | None] = self._answer_blocks()
        self._first: Blocks | None = None
        self._render: Callable[[Blocks], bytes] = lambda blocks: b""
        self._tail: Callable[[], bytes] = bytes
        self._emit("start", model=request.model, in_flight=self.in_flight)

    # what interrupts a wait
    def check(self) -> None:
        """Raise what ends this request although its provider is still at work: the client left, or the router stops."""
        if self.arrival.client_gone():
            raise ClientGone(self.arrival.gone_code())
        if self.pipeline.aborting:
            raise Shutdown("the router is shutting down", code="shutdown")

    # getting an answer
    def open(self) -> None:
        """Bring the answer under way. Raises the RequestError the client is to be told, or ClientGone."""
        try:
            if self.in_flight > self.pipeline.max_in_flight:
                raise Overloaded("too many requests at once", code="overloaded", headers={"retry-after": "1"})
            if self.request.stream:
                self._open_stream()
            else:
                self._open_whole()
        except (RequestError, ClientGone) as e:
            self._fail(e)
            raise
        finally:
            self._opened = time.monotonic()

    def _open_stream(self) -> None:
        self.until = self.accepted + HOLD
        self._first = next(self._flow)
        self._committed = True
        self._choose_renderer()
        self.until = 0.0  # a head that was held back goes out with a comment at once

    def _open_whole(self) -> None:
        data = b""
        for blocks in self._flow:
            data = blocks[0][0] if blocks else data
        face = self.pipeline.face(self.request)
        if self._same_language:
            self.whole = data
        else:
            self.whole = providers.dumps(face.render(self.answer, self.request, self._stamp())).encode()
        self._outcome = "ok"

    def _answer_blocks(self) -> Iterator[Blocks | None]:
        """The blocks of the first attempt that succeeds, each already in the fold."""
        for candidate in self._candidates():
            attempt = self.attempt = Attempt(self, candidate, len(self._attempts) + 1)
            self._attempts.append(attempt)
            self._emit("routed", provider=candidate.lane.name, model=candidate.model)
            try:
                for blocks in attempt.blocks():
                    self._fold(attempt, blocks or ())
                    yield blocks
            except UpstreamError as e:
                attempt.settle(e, healthy=False if e.retryable or e.status >= 500 else None)
                if self._committed or attempt.begun or not e.retryable:
                    raise
                self._last_error = e
            else:
                attempt.settle(None, healthy=True)
                return
        raise self._nobody()

    def _fold(self, attempt: Attempt, blocks: Sequence[tuple[bytes, list[Event]]]) -> None:
        for _, events in blocks:
            for event in events:
                self.answer.add(event)
                if attempt.first_token is None and isinstance(event, (Text, Reasoning, ToolCall)) and self.request.stream:
                    attempt.token()

    def _candidates(self) -> Iterator[Candidate]:
        """Whom to ask, one after the other: rule by rule, each provider once, within retry.attempts."""
        left = self.pipeline.retry.attempts
        for label, verdict in self.pipeline.walk(self.request.model, self.tags):
            for candidate in verdict.live:
                if left and candidate.lane.name not in self._tried and candidate.lane.asked():
                    left -= 1
                    self._tried.add(candidate.lane.name)
                    self.rule, self.reason = label, verdict.reason
                    yield candidate

    def _nobody(self) -> RequestError:
        if self._last_error is not None:
            return self._last_error
        resting = [lane.resting() for lane in self.pipeline.lanes.values()]
        named = any(v.candidates for _, v in self.pipeline.walk(self.request.model, self.tags))
        if named and any(resting):
            soonest = max(1, round(min(s for s in resting if s)))
            text = "every provider for this model is resting after failures"
            return NoProvider(text, status=503, kind="overloaded", code="all_resting", headers={"retry-after": str(soonest)})
        text = f"no rule routes the model {self.request.model[:200]!r} to a provider"
        return NoProvider(text, code="model_not_found", param="model")

    # giving it to the client
    @property
    def _same_language(self) -> bool:
        return self.attempt is not None and self.attempt.candidate.lane.provider.format == self.request.format

    def _choose_renderer(self) -> None:
        face = self.pipeline.face(self.request)
        if self._same_language:
            self._render = lambda blocks: b"".join(raw for raw, events in blocks if not face.hides(events, self.request))
        else:
            renderer = face.Renderer(self.request, self._stamp())
            self._render = lambda blocks: b"".join(renderer.feed(e) for _, events in blocks for e in events)
            self._tail = renderer.end

    def _stamp(self) -> Stamp:
        model = self.answer.model or (self.attempt.candidate.model if self.attempt else self.request.model)
        return Stamp(self.generation_id[15:], self.ts_ms // 1000, model)

    def headers(self) -> list[tuple[str, str]]:
        """The X-Router-* response headers, as far as they are known."""
        known: dict[str, Any] = {"X-Generation-Id": self.generation_id, "X-Router-Rule": self.rule}
        if self.attempt is not None:
            known["X-Router-Provider"] = self.attempt.candidate.lane.name
            known["X-Router-Model"] = self.attempt.candidate.model
        known["X-Router-Request-Tags"] = ",".join(self.tags)
        if not self.request.stream and self._outcome == "ok":
            known["X-Router-Response-Tags"] = ",".join(self.answer.tags)
            usage, _ = self._usage()
            known |= {"X-Router-Input-Tokens": usage.input_tokens, "X-Router-Output-Tokens": usage.output_tokens}
        return [(name, header_text(str(value))) for name, value in known.items() if value not in (None, "")]

    def __iter__(self) -> Run:
        return self

    def __next__(self) -> bytes:
        """The next bytes of a stream. A failure comes as the dialect's own error event, and nothing after it."""
        if self._ended:
            raise StopIteration
        try:
            return self._next()
        except RequestError as e:
            self._fail(e)
            self._ended = True
            frame: bytes = self.pipeline.face(self.request).render_stream_error(e)
            return frame
        except ClientGone as e:
            self._fail(e)
            self._ended = True
            raise StopIteration from None

    def _next(self) -> bytes:
        while True:
            if self.answer.done and self._tail is bytes and self._first is None:
                self._outcome = "ok"  # its last event has been taken; what follows is only framing
            blocks, self._first = self._first or next(self._flow, []), None
            if blocks == []:
                return self._end()
            if blocks is None:
                self.until = time.monotonic() + HEARTBEAT
                return b": keep-alive\n\n"
            self.until = time.monotonic() + HEARTBEAT
            if data := self._render(blocks):
                return data

    def _end(self) -> bytes:
        tail, self._tail = self._tail(), bytes
        if tail:
            return tail
        self._outcome, self._ended = "ok", True
        raise StopIteration

    # the end
    def _fail(self, error: RequestError | ClientGone) -> None:
        if self._error is not None or self._outcome == "ok":
            return
        self._error = error
        if isinstance(error, ClientGone):
            self._outcome, self._status = "cancelled", 499
            return
        rejected = isinstance(error, (NoProvider, Overloaded))
        self._outcome = "rejected" if rejected else "timeout" if error.kind == "timeout" else "error"
        if not self._committed:
            self._status = error.status

    def crashed(self) -> None:
        """A bug of ours ended the request."""
        self._fail(RequestError("internal error", code="internal"))
        self.close()

    def close(self) -> None:
        """End the request: let go of the upstream, count it, record it. Only the first call does anything."""
        if self._closed:
            return
        self._closed = True
        if self._outcome == "cancelled" and self._error is None:
            self._fail(ClientGone(self.arrival.gone_code()))
        if self.attempt is not None:
            self.attempt.settle(self._error, healthy=None)
        record = self._record()
        self.pipeline.leave(self, record)

    def _usage(self) -> tuple[Usage, str]:
        """Token counts and where they are from: the upstream, or four characters to the token of what was said."""
        if self.answer.usage is not None:
            return self.answer.usage, "reported"
        if self.answer.empty and self._outcome != "ok":
            return Usage(), "none"
        said = sum(len(t) for texts in self.answer.choices.values() for t in texts) + len(self.answer.reasoning)
        said += sum(len(c.arguments) for c in self.answer.tool_calls.values())
        return Usage(input_tokens=-(-len(self.request.text()) // 4), output_tokens=-(-said // 4)), "estimated"

    def _record(self) -> dict[str, Any]:
        now = time.monotonic()
        attempts = [a.record for a in self._attempts]
        last = attempts[-1] if attempts else {}
        first_token = self.attempt.first_token if self.attempt else None
        duration = _ms(now - self.accepted)
        usage, source = self._usage()
        self._measure(first_token, now, usage)
        error = self._error
        return {
            "type": "complete", "id": self.id, "ts_ms": self.ts_ms, "ts_ns": self.ts_ns, "generation_id": self.generation_id,
            "trace_id": None, "outcome": self._outcome, "status": self._status,
            "error": str(error) if error else None, "error_type": error.code if error else None,
            "provider": last.get("provider"), "requested_model": self.request.model, "sent_model": last.get("model"),
            "stream": self.request.stream, "duration_ms": duration,
            "ttft_ms": None if first_token is None else _ms(first_token - self.accepted),
            "opened_ms": None if self._opened is None else _ms(self._opened - self.accepted),
            "overhead_ms": round(duration - sum(a["duration_ms"] for a in attempts), 3),
            "rule": self.rule, "reason": self.reason, "tags": self.tags,
            "client_format": self.request.format, "operation": self.request.operation,
            "method": self.arrival.method, "route": self.arrival.route,
            "client_address": self.arrival.client_address, "api_key_name": self.arrival.api_key_name,
            "provider_format": last.get("format"), "vendor": last.get("vendor"),
            "server_address": last.get("server_address"), "server_port": last.get("server_port"),
            "plugins": [], "skipped_plugins": [],
            "dropped": self.attempt.call.dropped if self.attempt and self.attempt.call else [],
            "system": "\n\n".join(providers.block_text(b) for b in self.request.system) or None,
            "messages": [{"role": m.role, "content": m.content} for m in self.request.messages],
            "tools": [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in self.request.tools],
            "request": {k: v for k, v in self.request.body.data.items() if k not in _TOLD_APART},
            "response": self._response(usage) if self._attempts and not (self.answer.empty and self._outcome != "ok") else None,
            "usage_source": source, "cost": self._cost(usage, source), "attempts": attempts,
            "user": self.request.user, "session_id": self.request.router.get("session_id"),
            "trace": self.request.router.get("trace") or {},
            "traceparent": self.arrival.traceparent, "tracestate": self.arrival.tracestate,
        }  # fmt: skip

    def _measure(self, first_token: float | None, now: float, usage: Usage) -> None:
        if self._outcome != "ok" or first_token is None or self.attempt is None:
            return
        lane = self.attempt.candidate.lane
        lane.measure("ttft_ms", self.attempt.record["first_token_ms"])
        if now > first_token and usage.output_tokens > 1:
            lane.measure("tokens_per_s", round(usage.output_tokens / (now - first_token), 3))

    def _response(self, usage: Usage) -> dict[str, Any]:
        answer = self.answer
        counts = {
            "input_tokens": usage.input_tokens, "output_tokens": usage.output_tokens,
            "cached_input_tokens": usage.cached_input_tokens, "cache_write_input_tokens": usage.cache_write_input_tokens,
            "reasoning_tokens": usage.reasoning_tokens,
        }  # fmt: skip
        finish = answer.finish if self._outcome in ("ok", "cancelled") else None
        return {
            "id": answer.id, "model": answer.model, "content": answer.text, "reasoning": answer.reasoning or None,
            "stop_reason": _STOP_REASONS.get(finish.reason, "other") if finish else "other",
            "finish_reason": finish.reason if finish else None, "native_finish_reason": finish.native if finish else None,
            "tool_calls": [{"id": c.id, "name": c.name, "arguments": c.arguments} for _, c in sorted(answer.tool_calls.items())],
            "usage": counts, "tags": answer.tags, **({"truncated": True} if answer.truncated else {}),
            **({"malformed_blocks": answer.malformed} if answer.malformed else {}),
        }  # fmt: skip

    def _cost(self, usage: Usage, source: str) -> dict[str, Any] | None:
        if self.attempt is None or source == "none" or (self._outcome not in ("ok", "cancelled") and usage.cost is None):
            return None
        return price(usage, self.attempt.candidate.lane.provider, self.attempt.candidate.model)

    def _emit(self, kind: str, **more: Any) -> None:
        self.pipeline.emit({"type": kind, "id": self.id, "ts_ms": int(time.time() * 1000), **more})


_TOLD_APART = frozenset(("messages", "system", "input", "instructions", "tools")) | providers.ROUTER_FIELDS
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def header_text(value: str) -> str:
    """A value as it can stand in a response header: what is not printable ASCII becomes a question mark."""
    return "".join(c if " " <= c <= "~" else "?" for c in value[:1024])


def price(usage: Usage, provider: Provider, model: str) -> dict[str, Any]:
    """What an answer cost in USD. A cost the upstream reports wins over configured prices; the model's prices win over
    the provider's."""
    into, out, cached = provider.prices(model)
    fresh = max(0, usage.input_tokens - usage.cached_input_tokens)
    parts = {"input": fresh * into + usage.cached_input_tokens * cached, "output": usage.output_tokens * out}
    total, source = parts["input"] + parts["output"], "configured"
    if usage.cost is not None:
        total, source = usage.cost, "reported"
    return {**parts, "total": total, "input_unit_price": into, "output_unit_price": out, "source": source}


class Pipeline:
    """Everything requests share: the providers in service, the rules, the sinks, and the counts."""

    def __init__(self, lanes: Mapping[str, Lane], rules: Sequence[Rule], retry: Retry, max_in_flight: int) -> None:
        self.lanes, self.rules, self.retry, self.max_in_flight = dict(lanes), list(rules), retry, max_in_flight
        self.sinks: list[Sink] = []
        self.aborting = False
        self.in_flight = 0
        self.counts = dict.fromkeys(("accepted", "ok", "error", "cancelled", "timeout", "rejected"), 0)
        self._lock = threading.Lock()

    def start(self, request: Request, arrival: Arrival) -> Run:
        """Accept a well-formed request."""
        return Run(self, request, arrival)

    def enter(self) -> tuple[int, int]:
        """Count a request in: its number and how many are running now, itself included."""
        with self._lock:
            self.counts["accepted"] += 1
            self.in_flight += 1
            return self.counts["accepted"], self.in_flight

    def leave(self, run: Run, record: dict[str, Any]) -> None:
        """Count a request out and give its record to every sink."""
        with self._lock:
            self.in_flight -= 1
            self.counts[record["outcome"]] += 1
        self.emit(record)

    def emit(self, event: dict[str, Any]) -> None:
        """Hand an event to every sink. A sink that fails is told of in the program's log; requests never notice."""
        for sink in self.sinks:
            try:
                sink(event)
            except Exception:
                log.exception("a reader of records failed")

    def face(self, request: Request) -> Any:
        """The client face that a request came through."""
        return providers.language(request.format)

    def walk(self, model: str, tags: Sequence[str]) -> Iterator[tuple[str, Verdict]]:
        """Each rule's verdict on a model, in the order of the file."""
        question = Question(model, tags, self.lanes)
        for index, rule in enumerate(self.rules):
            yield rule_label(rule, index), rule.judge(question)

    def models(self) -> dict[str, str]:
        """Every model any provider is known to serve -> the first provider that does."""
        served: dict[str, str] = {}
        for lane in self.lanes.values():
            for model in lane.models:
                served.setdefault(model, lane.name)
        return served

    def stats(self) -> dict[str, Any]:
        """The pipeline's part of /api/v1/stats."""
        with self._lock:
            counts = dict(self.counts)
        return {
            "in_flight": self.in_flight,
            "requests": counts,
            "providers": {n: lane.stats() for n, lane in self.lanes.items()},
        }
