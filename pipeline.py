"""The decision: who answers this request, and the one record of what happened.

A `Run` is one accepted request. Whatever its client and its provider speak and whether it streams or not, it is the same
sequence of events: the rules name candidates, an attempt turns a candidate's answer into events, the fold over them is the
answer, and `Run.close` - the only place where a request ends - makes the one record of it and hands that to every sink
(log, feed, broadcast, telemetry). The outcome is "cancelled" until something else is known, so a client that leaves without
a word is told apart from one that was served.

Whom the rules name is `rules`' business, what looks at a request on its way is `plugins`'.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import math
import random
import re
import string
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import plugins
import providers
import telemetry
from plugins import Part
from providers import (
    Answer,
    BadRequest,
    Call,
    ClientGone,
    Done,
    Event,
    Finish,
    Malformed,
    Message,
    NoProvider,
    Provider,
    Reasoning,
    Reply,
    Request,
    RequestError,
    Stamp,
    Text,
    Tool,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
)
from rules import RULES, Asked, Candidate, Lane, Question, Rule, Verdict, offer, rule_label

log = logging.getLogger("opensourcellmrouter.pipeline")

HOLD = 5.0
"""Seconds for which the head of a stream is held back, so that an early failure is a real status and may still move on to
the next candidate; longer, and a proxy's read timeout would count the loading of a model."""
HEARTBEAT = 15.0
"""Seconds of upstream silence after which a waiting client gets an SSE comment."""
Sink = Callable[[dict[str, Any]], None]
Blocks = list[tuple[bytes, list[Event]]]


@dataclass(frozen=True)
class Retry:
    """The [retry] section."""

    attempts: int = field(default=3, metadata={"doc": "attempts one request may use before its first byte"})
    on_status: tuple[int, ...] = field(
        default=(408, 429, 500, 502, 503, 504), metadata={"doc": "upstream statuses that let the next candidate try"}
    )

    def __post_init__(self) -> None:
        if not 1 <= self.attempts <= 20:
            raise ValueError("attempts: must lie between 1 and 20")
        for i, status in enumerate(self.on_status):
            if not 400 <= status <= 599:
                raise ValueError(f"on_status[{i}]: must be an HTTP error status, 400 to 599")


# One attempt ----------------------------------------------------------------------------------------------------------
class Attempt:
    """One candidate asked once: opens the upstream, gives its answer as blocks of events, knows how it went."""

    def __init__(self, run: Run, candidate: Candidate, hold: Asked, number: int) -> None:
        self._run, self._lane = run, candidate.lane
        self._upstream = candidate.lane.upstream
        language = self._lane.language(run.request)
        self._language = providers.language(language)
        self.native = run.request.native(language)
        self._began = time.monotonic()
        self._reply: Reply | None = None
        self._hold = hold
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
        request = self._run.request
        if request.operation == "count_tokens" and "count_tokens" not in getattr(self._language, "OPERATIONS", ()):
            self.native = False
            yield [(b"", [Used(Usage(input_tokens=estimate(request.text())))])]
            return
        if request.reasoning and self._lane.cannot(self.candidate.model, "thinking"):
            request = dataclasses.replace(request, reasoning=None, dropped=[*request.dropped, "reasoning"])
            self._run.request.dropped = request.dropped
        self.call = self._language.build(request, self.candidate.model, self._lane.provider)
        self._mark(self.call)
        self.record["kind"] = self.call.kind
        reply = self._reply = self._upstream.send(self.call, self._run)
        while not reply.head(self._run.until):
            yield None
        self.record["headers_ms"] = self._elapsed()
        self.record["status"] = reply.status
        if reply.status != 200:
            raise self._refusal(reply)
        yield from self._stream(reply) if request.stream else self._whole(reply)

    def _mark(self, call: Call) -> None:
        """Give the provider the ids of the span that its own spans shall hang under."""
        trace = self._run.trace
        if trace is None:
            return
        self.record["span_id"] = trace.child_id()
        if self._run.pipeline.propagate:
            call.headers["traceparent"] = trace.traceparent(self.record["span_id"])
            if trace.tracestate:
                call.headers["tracestate"] = trace.tracestate

    def _refusal(self, reply: Reply) -> UpstreamError:
        body = providers.read_object(reply.read_all())
        parse_error = getattr(self._language, "parse_error", None)
        detail = parse_error(body) if parse_error and body is not None else None
        return providers.refusal(reply.status, reply.headers, detail, self._run.plan.retry.on_status)

    def _whole(self, reply: Reply) -> Iterator[Blocks]:
        data = reply.read() or b""
        reply.streaming()
        data += reply.read_all()
        try:
            events = self._language.parse(data, self._run.request)
        except providers.SHAPE_ERRORS:
            raise providers.malformed("an answer of a shape that its format does not have") from None
        self.begun = True
        yield [(data, events)]

    def _stream(self, reply: Reply) -> Iterator[Blocks | None]:
        parser = self._language.Parser()
        held: Blocks = []
        answer = self._run.answer
        while not answer.done:
            piece = reply.read(self._run.until)
            if piece is None:
                yield None
                continue
            held += parser.feed(piece) if piece else parser.end()
            said = [e for _, events in held for e in events]
            if parser.failure and not self.begun and not any(isinstance(e, _TOKENS) for e in said):
                raise parser.failure
            if not self.begun and any(not isinstance(e, (Done, Malformed)) for e in said):
                self.begun = True
                reply.streaming()
            if self.begun and held:
                for unreadable in (e for e in said if isinstance(e, Malformed) and not self.native):
                    raise providers.malformed(unreadable.what)
                yield held
                held = []
            if parser.failure:
                raise parser.failure
            if not piece:
                break
        if not self.begun:
            raise providers.malformed("nothing that can be read" if held else "an empty answer")
        if not answer.complete:
            raise providers.lost("the provider's stream ended in the middle")
        if answer.done and (rest := parser.end()):
            yield rest
        self._drain(reply)

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
        if self._hold.settled:
            return
        if self._reply is not None:
            self._reply.close()
        self.record["duration_ms"] = self._elapsed()
        if timings := self._run.answer.timings:
            told = {"load_ms": timings.load_ms, "prefill_ms": timings.prefill_ms, "decode_ms": timings.decode_ms}
            self.record["timings"] = told
        self.record["request_id"] = self._run.answer.id
        if error is not None:
            self.record["error"], self.record["error_type"] = str(error), error.code
        self._hold.settle(healthy, failed=isinstance(error, UpstreamError) and error.status not in providers.PASSED_ON)

    def _elapsed(self) -> float:
        return _ms(time.monotonic() - self._began)


def estimate(text: str) -> int:
    """Tokens in a text by rule of thumb: four characters to the token."""
    return -(-len(text) // 4)


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


def trace_of(error: BaseException) -> str:
    """Where an error was raised and of what kind it is, but not its text: that may hold what a client said."""
    return "".join(traceback.format_tb(error.__traceback__)) + type(error).__name__


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
        self.plan = pipeline.plan
        self.accepted = arrival.accepted
        self.requested_model = request.model  # a plugin may change the request's
        self.ts_ns = time.time_ns() - int((time.monotonic() - self.accepted) * 1e9)
        self.ts_ms = self.ts_ns // 1_000_000
        self.generation_id = f"gen-{self.ts_ms // 1000}-{''.join(random.choices(_ALPHABET, k=20))}"
        observer = pipeline.telemetry
        self.trace = observer.begin(arrival.traceparent, arrival.tracestate) if observer else None
        telemetry.enter(self.trace)
        self.id, self.in_flight = pipeline.enter()
        self.answer = Answer()
        self.until = float("inf")
        self.rule: str | None = None
        self.reason: str | None = None
        self.tags: list[str] = []
        self._parts: list[Part] = []
        self._forced_by: str | None = None
        self._given: Answer | None = None
        self._skipped_plugins: list[str] = []
        self._considered: list[Candidate] = []
        self._not_before: dict[str, float] = {}
        self._hold: Asked | None = None
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
        self._render_error: Callable[[RequestError], bytes] = _nothing
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
            if self.in_flight > self.plan.max_in_flight:
                raise Overloaded("too many requests at once", code="overloaded", headers={"retry-after": "1"})
            self._decide()
            if self.request.stream:
                self._open_stream()
            else:
                self._open_whole()
        except (RequestError, ClientGone) as e:
            self._fail(e)
            raise
        finally:
            self._opened = time.monotonic()

    def _decide(self) -> None:
        self.pipeline.know_models()
        self._parts = self.plan.parts_for(self.request)
        self.tags, self._forced_by, self._given = decide(self.plan, self.request, self._parts)
        self._emit("classified", tags=self.tags)
        if self.request.stream:
            self._skipped_plugins = [p.id for p in self._parts if p.has("post_response")]

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
        self._look_at_answer()
        if self._native:
            self.whole = data
        else:
            face = providers.language(self.request.format)
            self.whole = providers.dumps(face.render(self.answer, self.request, self._stamp())).encode()
        self._outcome = "ok"

    def _look_at_answer(self) -> None:
        """The parts that see a whole answer before the client does; what fails here is warned of, the answer stands."""
        for part in self._parts:
            kept = copy.deepcopy(self.answer) if part.foreign else self.answer
            given = self._call_after(part, "post_response")
            if plugins.is_answer(given) and _is_sound_answer(given):
                self.answer, self.answer.changed = given, True
            elif not _is_sound_answer(self.answer) or plugins.is_answer(given):
                log.warning("%s left an answer that cannot be used; it goes out as it was", part.id)
                self.answer = kept
            elif given is plugins.STOP:
                break
            else:
                _warn_of(part, "post_response", given)
            self.answer.changed = self.answer.changed or (part.foreign and _said(self.answer) != _said(kept))
        self._classify_answer()

    def _classify_answer(self) -> None:
        for part in self.plan.response_classifiers:
            if part.has("classify_response"):
                found = _tags(part, "classify_response", self.request, self.answer)
                self.answer.tags += [t for t in found if t not in self.answer.tags]

    def _call_after(self, part: Part, hook: str) -> Any:
        if not part.has(hook):
            return None
        try:
            return part.call(hook, self.request, self.answer)
        except Exception as e:  # noqa: BLE001 - a part may raise anything; the answer is there and stands
            log.warning("%s failed in %s: %s", part.id, hook, type(e).__name__)
            return None

    def _answer_blocks(self) -> Iterator[Blocks | None]:
        """The blocks of the first attempt that succeeds, each already in the fold."""
        if self._given is not None:
            yield self._fold(None, [(b"", self._given.events())])
            return
        for label, reason, candidate in self._candidates():
            self.rule, self.reason = label, reason
            assert self._hold is not None
            attempt = self.attempt = Attempt(self, candidate, self._hold, len(self._attempts) + 1)
            self._attempts.append(attempt)
            self._emit("routed", provider=candidate.lane.name, model=candidate.model)
            try:
                for blocks in attempt.blocks():
                    yield self._fold(attempt, blocks)
            except UpstreamError as e:
                attempt.settle(e, healthy=False if e.retryable or attempt.begun else None)
                if self._committed or attempt.begun or not e.retryable:
                    raise
                self._last_error = e
                self._not_before.pop(candidate.lane.name, None)
                if e.refused:
                    wait = providers.seconds_until(e.headers.get("retry-after"))
                    self._not_before[candidate.lane.name] = time.monotonic() + wait
            else:
                attempt.settle(None, healthy=True if attempt.call else None)  # a count made here says nothing of a provider
                return
        raise self._nobody()

    def _fold(self, attempt: Attempt | None, blocks: Blocks | None) -> Blocks | None:
        for _, events in blocks or ():
            for event in events:
                self.answer.add(event)
                if attempt and attempt.first_token is None and isinstance(event, _TOKENS) and self.request.stream:
                    attempt.token()
        return blocks

    def _candidates(self) -> Iterator[tuple[str, str, Candidate]]:
        """Whom to ask, one after the other, within retry.attempts: each provider once, in the order of the chain; when no
        other is left, those again that surely did no work for this request, after a pause."""
        later: list[tuple[str, str, Candidate]] = []
        asked: list[tuple[str, str, Candidate]] = []
        for entry in self.plan.chain(self.request, self.tags, self._forced_by):
            candidate = entry[2]
            self._considered.append(candidate)
            if candidate.skipped is None and candidate.lane.name in self._tried:
                later.append(entry)
            elif candidate.skipped is None:
                if not self._may_retry():
                    return
                if self._take(candidate):
                    self._tried.add(candidate.lane.name)
                    asked.append(entry)
                    yield entry
        known = {(c.lane.name, c.model) for _, _, c in asked}
        yield from self._again([*(e for e in later if (e[2].lane.name, e[2].model) not in known), *asked])

    def _again(self, queue: list[tuple[str, str, Candidate]]) -> Iterator[tuple[str, str, Candidate]]:
        """The same providers once more, whoever may be asked soonest first: other models of theirs, then the same ones."""
        waited = 0.0
        while may := [e for e in queue if e[2].lane.name in self._not_before]:
            entry = min(may, key=lambda e: self._not_before[e[2].lane.name])
            doubled = 0.25 * 2 ** (len(self._attempts) - 1) * random.uniform(0.8, 1.2)
            pause = max(doubled, self._not_before[entry[2].lane.name] - time.monotonic())
            if waited + pause > HOLD or not self._may_retry():
                return
            waited += pause
            self._sleep(pause)
            queue.remove(entry)
            queue.append(entry)
            if not self._take(entry[2]):
                return
            yield entry

    def _may_retry(self) -> bool:
        """May there be another attempt? The first one always may."""
        return not self._attempts or (len(self._attempts) < self.plan.retry.attempts and self.pipeline.budget.take())

    def _take(self, candidate: Candidate) -> bool:
        self._hold = candidate.lane.asked()
        if self._hold is None:
            candidate.skipped = "resting"
        return self._hold is not None

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            self.check()
            time.sleep(min(left, providers.SLICE))

    def _nobody(self) -> RequestError:
        if self._last_error is not None:
            return self._last_error
        rests = [c.lane.resting() for c in self._considered if c.skipped == "resting"]
        if rests:
            again = {"retry-after": str(max(1, math.ceil(min(rests))))}
            text = "every provider for this model is resting after failures"
            return NoProvider(text, status=503, kind="overloaded", code="all_resting", headers=again)
        cannot = sorted({c.skipped for c in self._considered if c.skipped})
        for need, (place, text) in self._unsaid().items():
            if f"no {need}" in cannot:
                return BadRequest(text, param=place)
        text = f"no rule routes the model {self.request.model[:200]!r} to a provider"
        return NoProvider(text + (f" ({', '.join(cannot)})" if cannot else ""), code="model_not_found", param="model")

    def _unsaid(self) -> dict[str, tuple[str, str]]:
        """What a provider may lack for this request -> the field that needs it, and why it could be told to nobody."""
        request, place = self.request, self.request.text_field
        can = f"no provider for the model {request.model[:200]!r} can read the"
        bound = {name: (name, why) for name, why in request.bound.items()}
        return bound | {need: (place, f"{can} {kind} in {place}") for need, kind in providers.shown(request).items()}

    # giving it to the client
    @property
    def _native(self) -> bool:
        """Does the provider's answer go on as it came?"""
        return self.attempt is not None and self.attempt.native and not self.answer.changed

    def _choose_renderer(self) -> None:
        face = providers.language(self.request.format)
        if self._native and hasattr(face, "Relay"):
            relay = face.Relay(self.request, self._stamp())
            self._render, self._render_error = relay.feed, relay.fail
        elif self._native:
            self._render = lambda blocks: b"".join(raw for raw, events in blocks if not face.hides(events, self.request))
            self._render_error = face.render_stream_error
        else:
            renderer = face.Renderer(self.request, self._stamp())
            self._render = lambda blocks: b"".join(renderer.feed(e) for _, events in blocks for e in events)
            self._tail = renderer.end
            self._render_error = renderer.fail if hasattr(renderer, "fail") else face.render_stream_error

    def _stamp(self) -> Stamp:
        model = self.answer.model or (self.attempt.candidate.model if self.attempt else self.request.model)
        return Stamp(self.generation_id[15:], self.ts_ms // 1000, model)

    def headers(self) -> list[tuple[str, str]]:
        """The X-Router-* response headers, as far as they are known."""
        known: dict[str, Any] = {"X-Generation-Id": self.generation_id, "X-Router-Rule": self.rule}
        if self.attempt is not None:
            known["X-Router-Provider"] = self.attempt.candidate.lane.name
            known["X-Router-Model"] = self.attempt.candidate.model
        known["X-Router-Trace-Id"] = self.trace.trace_id if self.trace else None
        known["X-Router-Request-Tags"] = ",".join(self.tags)
        if not self.request.stream and self._outcome == "ok":
            known["X-Router-Response-Tags"] = ",".join(self.answer.tags)
            usage, source = self._usage()
            known |= {"X-Router-Input-Tokens": usage.input_tokens, "X-Router-Output-Tokens": usage.output_tokens}
            known["X-Router-Usage-Source"] = None if source == "reported" else source
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
            return self._render_error(e)
        except ClientGone as e:
            self._fail(e)
            self._ended = True
            raise StopIteration from None
        except StopIteration:
            raise
        except Exception as e:  # noqa: BLE001 - a bug of ours must not look like an answer, nor like a client that left
            log.error("internal error in a stream:\n%s", trace_of(e))
            self._ended = True
            error = RequestError("internal error", code="internal")
            self._fail(error)
            return self._render_error(error)

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
            self._outcome = "cancelled"
            self._status = 200 if self._committed else 499
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
        if self.request.stream and self._outcome == "ok":
            self._classify_answer()
        self.pipeline.out()
        record = _sealed(self._record(), self.request.body.text)
        for part in self._parts:
            self._call_after(part, "on_end")
        self.pipeline.leave(record)
        telemetry.leave()
        self._let_go()

    def _let_go(self) -> None:
        """Drop what refers back to this object, so that it goes with its last user and not with the next collection."""
        self._flow, self._first = iter(()), None
        self._render = self._tail = self._render_error = _nothing
        self._attempts, self.attempt, self._error, self._last_error = [], None, None, None

    def _usage(self) -> tuple[Usage, str]:
        """Token counts and where they are from: the upstream, or four characters to the token of what was said."""
        told = self.answer.usage
        if told is not None and (self.answer.complete or self._outcome == "ok"):
            counted_here = self.attempt is not None and self.attempt.call is None
            return told, "estimated" if counted_here else "reported"
        if told is None and self.answer.empty and self._outcome != "ok":
            return Usage(), "none"
        said = sum(len(t) for texts in self.answer.choices.values() for t in texts) + len(self.answer.reasoning)
        said += sum(len(c.arguments) for c in self.answer.tool_calls.values())
        made = -(-said // 4)
        if told is None:
            return Usage(input_tokens=estimate(self.request.text()), output_tokens=made), "estimated"
        # What a stream tells at its beginning knows nothing of what came after it.
        return (told, "reported") if told.output_tokens >= made else (dataclasses.replace(told, output_tokens=made), "estimated")

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
            "trace_id": self.trace and self.trace.trace_id, "_trace": self.trace, "_bytes": len(self.request.body.text),
            "outcome": self._outcome, "status": self._status,
            "error": str(error) if error else None, "error_type": error.code if error else None,
            "provider": last.get("provider"), "requested_model": self.requested_model, "sent_model": last.get("model"),
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
            "plugins": [p.id for p in self._parts], "skipped_plugins": self._skipped_plugins,
            "dropped": self._dropped(),
            "system": "\n\n".join(providers.block_text(b) for b in self.request.system) or None,
            "messages": [{"role": m.role, "content": m.content} for m in self.request.messages],
            "tools": [{"name": t.name, "description": t.description, "parameters": t.parameters} for t in self.request.tools],
            "request": _masked({k: v for k, v in self.request.body.data.items() if k not in _TOLD_APART}),
            "response": None if self.answer.empty and self._outcome != "ok" else self._response(usage),
            "usage_source": source, "cost": self._cost(usage, source), "attempts": attempts,
            "user": self.request.user, "session_id": self.request.router.get("session_id") or None,
            "trace": self.request.router.get("trace") or {},
            "traceparent": self.arrival.traceparent, "tracestate": self.arrival.tracestate,
        }  # fmt: skip

    def _dropped(self) -> list[str]:
        """What the client said and the provider was not told."""
        if self.attempt is None or self.attempt.call is None:
            return []
        unheard = [] if self.attempt.native else self.request.dropped
        return list(dict.fromkeys([*unheard, *self.attempt.call.dropped]))

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
        if (
            self.attempt is None
            or source == "none"
            or self.request.operation == "count_tokens"
            or (self._outcome not in ("ok", "cancelled") and usage.cost is None)
        ):
            return None
        return price(usage, self.attempt.candidate.lane.provider, self.attempt.candidate.model)

    def _emit(self, kind: str, **more: Any) -> None:
        self.pipeline.emit({"type": kind, "id": self.id, "ts_ms": int(time.time() * 1000), **more})


_TOLD_APART = frozenset(("messages", "system", "input", "instructions", "tools")) | providers.ROUTER_FIELDS
_KEY_NAME = re.compile(
    r"(?i)(?:.*[_-])?(?:api[_-]?key|secret|password|authorization|(?:access|auth|bearer|refresh)[_-]?token|token|private[_-]?key|cookie)"
)
_NEEDLESS = re.compile(r"\\u00([2-7][0-9a-fA-F])")
_TOKENS = (Text, Reasoning, ToolCall)
_STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


def _masked(value: Any) -> Any:
    """Request parameters without the keys that some clients put among them (`api_key`, `extra_headers`)."""
    if isinstance(value, list):
        return [_masked(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: "[redacted]" if isinstance(v, str | list) and _names_a_key(k[:64]) else _masked(v) for k, v in value.items()}


@functools.lru_cache(1024)
def _names_a_key(name: str) -> bool:
    return _KEY_NAME.fullmatch(name) is not None


def _sealed(record: dict[str, Any], sent: str) -> dict[str, Any]:
    """The record as its readers may have it: no key of ours in it, whatever the client (`sent` is its body) or the
    provider said."""
    sealed: dict[str, Any] = telemetry.without_secrets(record) if telemetry.hold_secret(_what_was_said(record, sent)) else record
    return sealed


def _what_was_said(record: dict[str, Any], sent: str) -> Iterator[Any]:
    yield _unescaped(sent)
    yield record["session_id"]
    yield from (record["response"] or {}).values()


def _unescaped(text: str) -> str:
    """JSON text without the escapes that some writers put where none is needed."""
    text = text.replace("\\/", "/")
    return _NEEDLESS.sub(lambda match: chr(int(match[1], 16)), text) if "\\u00" in text else text


def _said(answer: Answer) -> str:
    """What a plugin may change of an answer and the client would have to hear of."""
    return repr((answer.choices, answer.thinking, answer.tool_calls, answer.finish, answer.usage, answer.id, answer.model))


def _nothing(*_: Any) -> bytes:
    return b""


def header_text(value: str) -> str:
    """A value as it can stand in a response header: what is not printable ASCII becomes a question mark."""
    if value.isascii() and value.isprintable():
        return value[:1024]
    return "".join(c if " " <= c <= "~" else "?" for c in value[:1024])


def price(usage: Usage, provider: Provider, model: str) -> dict[str, Any]:
    """What an answer cost in USD. A cost the upstream reports wins over configured prices; the model's prices win over
    the provider's."""
    into, out, cached = provider.prices(model)
    fresh = max(0, usage.input_tokens - usage.cached_input_tokens)
    parts = {"input": fresh * into + usage.cached_input_tokens * cached, "output": usage.output_tokens * out}
    parts = {name: round(usd, 15) for name, usd in parts.items()}  # 7.5e-06, not 7.500000000000001e-06
    total, source = round(parts["input"] + parts["output"], 15), "configured"
    if usage.cost is not None:
        total, source = usage.cost, "reported"
    return {**parts, "total": total, "input_unit_price": into, "output_unit_price": out, "source": source}


def decide(plan: Plan, request: Request, parts: Sequence[Part]) -> tuple[list[str], str | None, Answer | None]:
    """What happens before the rules: (tags, the plugin that forces candidates, an answer that a plugin gave).

    A plugin may change the request; then the client's own bytes are not sent on. Raises RequestError: what a plugin raises
    as one, or a 500 that names the part that failed.
    """
    tags: list[str] = []
    before = copy.deepcopy(_changeable(request)) if any(p.foreign for p in parts) else None
    try:
        given, forced_by = _ask_plugins(parts, "on_start", request)
        for part in plan.classifiers if given is None else ():
            tags += [t for t in _tags(part, "classify", request) if t not in tags]
        if given is None:
            given, later = _ask_plugins(parts, "pre_request", request)
            forced_by = forced_by or later
    except plugins.PluginError:
        for name, value in (before or {}).items():
            setattr(request, name, value)  # the record tells what was asked, whatever a plugin made of it
        raise
    request.changed = before is not None and _changeable(request) != before
    return tags, forced_by, given


def _ask_plugins(parts: Sequence[Part], hook: str, request: Request) -> tuple[Answer | None, str | None]:
    forced_by: str | None = None
    for part in parts:
        if not part.has(hook):
            continue
        given = _call(part, hook, request)
        if given is plugins.STOP:
            raise plugins.Stopped(f"the plugin {part.id} stopped this request", code="stopped_by_plugin")
        if plugins.is_answer(given):
            return given, None
        _warn_of(part, hook, given)
        if part.foreign and not _is_sound(request):
            log.error("%s left a request that cannot be used after %s", part.id, hook)
            raise plugins.PluginError(f"the plugin {part.id} failed", code="plugin_error")
        if request.forced and forced_by is None:
            forced_by = part.id
    return None, forced_by


def _warn_of(part: Part, hook: str, given: Any) -> None:
    if given is not None:
        log.warning("%s: %s returned a %s; None, an Answer or STOP was expected", part.id, hook, type(given).__name__)


def _call(part: Part, hook: str, request: Request) -> Any:
    try:
        return part.call(hook, request)
    except RequestError:
        raise
    except Exception as e:  # noqa: BLE001 - a part may raise anything; its text may hold what a client said
        log.error("%s failed in %s: %s", part.id, hook, type(e).__name__)
        raise plugins.PluginError(f"the plugin {part.id} failed", code="plugin_error") from None


def _is_sound(request: Request) -> bool:
    """Is a request still what its type says, after foreign hands were on it?"""
    lists = (request.messages, request.system, request.tools, request.forced, request.inputs, request.stop)
    if not isinstance(request.model, str) or not isinstance(request.router, dict) or not all(isinstance(x, list) for x in lists):
        return False
    messages = all(isinstance(m, Message) and isinstance(m.content, list) for m in request.messages)
    blocks = [*request.system, *(b for m in request.messages for b in m.content)] if messages else [None]
    return (
        all(isinstance(b, dict) and isinstance(b.get("type"), str) for b in blocks)
        and all(isinstance(t, Tool) for t in request.tools)
        and all(isinstance(f, (tuple, list)) and len(f) == 2 and isinstance(f[0], str) for f in request.forced)
    )


def _is_sound_answer(answer: Answer) -> bool:
    texts = isinstance(answer.choices, dict) and all(isinstance(t, list) for t in answer.choices.values())
    return (
        texts
        and all(isinstance(piece, str) for t in answer.choices.values() for piece in t)
        and isinstance(answer.tool_calls, dict)
        and all(isinstance(c, ToolCall) for c in answer.tool_calls.values())
        and isinstance(answer.thinking, list)
        and isinstance(answer.finish, (Finish, type(None)))
        and isinstance(answer.usage, (Usage, type(None)))
        and isinstance(answer.tags, list)
        and all(isinstance(t, str) for t in answer.tags)
    )


def _tags(part: Part, hook: str, *args: Any) -> list[str]:
    """A classifier's tags. One that fails costs its tags and a warning, never the request."""
    try:
        found = part.call(hook, *args)
    except Exception as e:  # noqa: BLE001 - a part may raise anything; its text may hold what a client said
        log.warning("the classifier %s failed: %s", part.id, type(e).__name__)
        return []
    told = found if isinstance(found, (list, tuple)) else ()
    return list(dict.fromkeys(tag for tag in told if isinstance(tag, str)))


def _changeable(request: Request) -> dict[str, Any]:
    """What a plugin may change of a request and a provider would have to hear of."""
    names = ("system", "messages", "tools", "tool_choice", "max_tokens", "temperature", "top_p", "top_k", "seed", "stop", "n",
             "presence_penalty", "frequency_penalty", "response_format", "reasoning", "user", "metadata", "extra", "inputs",
             "router")  # fmt: skip
    return {name: getattr(request, name) for name in names}


def explain(plan: Plan, request: Request) -> dict[str, Any]:
    """The dry run of /v1/route: tags, every rule's verdict, and whom the router would ask, in order. Nothing is sent."""
    parts = plan.parts_for(request)
    tags, forced_by, given = decide(plan, request, parts)
    rules = [
        _explained(plan.rules[i], i, verdict, plan.lanes)
        for i, (_, verdict) in enumerate(plan.walk(request.model, request, tags))
    ]
    chosen: dict[str, dict[str, str]] = {}
    for _, _, c in plan.chain(request, tags, forced_by) if given is None else ():
        if c.skipped is None:
            chosen.setdefault(c.lane.name, {"provider": c.lane.name, "model": c.model})
    return {"tags": tags, "rules": rules, "chosen": list(chosen.values())}


def _explained(rule: Rule, index: int, verdict: Verdict, lanes: Mapping[str, Lane]) -> dict[str, Any]:
    candidates = [{"provider": c.lane.name, "model": c.model, "value": c.value, "skipped": c.skipped} for c in verdict.candidates]
    kind = next(kind for kind, cls in RULES.items() if type(rule) is cls)
    out = [name for name in rule.references().values() if name not in lanes]
    reason = verdict.reason + (f"; left out: {', '.join(out)}" if out else "")
    return {"index": index, "type": kind, "name": rule.name, "matched": bool(verdict.live), "reason": reason,
            "candidates": candidates}  # fmt: skip


@dataclass(frozen=True)
class Plan:
    """Everything the configuration decides about requests, in one piece: a reload replaces it whole, and a request that
    is under way ends by the plan it began with."""

    lanes: Mapping[str, Lane]
    rules: Sequence[Rule] = ()
    retry: Retry = field(default_factory=Retry)
    max_in_flight: int = 64
    plugins: Sequence[Part] = ()
    classifiers: Sequence[Part] = ()
    response_classifiers: Sequence[Part] = ()
    plugin_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def walk(self, model: str, request: Request, tags: Sequence[str]) -> Iterator[tuple[str, Verdict]]:
        """Each rule's verdict on a model, in the order of the file."""
        question = Question(model, request, tags, self.lanes)
        for index, rule in enumerate(self.rules):
            yield rule_label(rule, index), rule.judge(question)

    def chain(self, request: Request, tags: Sequence[str], forced_by: str | None) -> Iterator[tuple[str, str, Candidate]]:
        """(rule, reason, candidate) in the order in which they would be asked: whom a plugin forces, else whom the rules
        name; then the same for each of the request's own fallback `models`."""
        if forced_by is not None:
            for name, model in request.forced:
                if name in self.lanes:
                    yield (
                        f"forced:{forced_by}",
                        f"named by {forced_by}",
                        offer(self.lanes[name], model or request.model, request),
                    )
        else:
            for label, verdict in self.walk(request.model, request, tags):
                yield from ((label, verdict.reason, c) for c in verdict.candidates)
        for i, model in enumerate(request.router.get("models", ())):
            for _, verdict in self.walk(model, request, tags):
                yield from ((f"models[{i}]", verdict.reason, c) for c in verdict.candidates)

    def models(self) -> dict[str, str]:
        """Every model any provider is known to serve -> the first provider that does."""
        served: dict[str, str] = {}
        for lane in self.lanes.values():
            for model in lane.models:
                served.setdefault(model, lane.name)
        return served

    def parts_for(self, request: Request) -> list[Part]:
        """The plugins of one request: those in service, with what its own `plugins` field adds, changes or turns off.
        Raises BadRequest for an id that does not exist or settings it does not take."""
        parts = {p.id: p for p in self.plugins}
        for entry in request.router.get("plugins", ()):
            id = entry["id"]
            if entry.get("enabled") is False:
                parts.pop(id, None)
                continue
            settings = {**self.plugin_settings.get(id, {}), **{k: v for k, v in entry.items() if k not in _NOT_BY_REQUEST}}
            try:
                if "timeout" in entry:
                    raise ValueError("timeout: is for the configuration to set")
                parts[id] = plugins.make("plugin", id, settings)
            except ValueError as e:
                raise BadRequest(f"plugins: {id}: {e}"[:500], param="plugins", code="invalid_plugin") from None
        return list(parts.values())


_NOT_BY_REQUEST = frozenset(("id", "enabled", "module"))


class Budget:
    """How often attempts may follow failed ones: a fifth of the requests, and ten a second for quiet times; without it
    a provider that is down would double the load on the others."""

    MOST = 100.0

    def __init__(self) -> None:
        self._left, self._filled = self.MOST, time.monotonic()
        self._lock = threading.Lock()

    def request(self) -> None:
        """A request has come."""
        with self._lock:
            self._left = min(self.MOST, self._left + 0.2)

    def take(self) -> bool:
        """May one more attempt follow a failed one?"""
        with self._lock:
            now = time.monotonic()
            self._left = min(self.MOST, self._left + 10 * (now - self._filled))
            self._filled = now
            if self._left < 1:
                return False
            self._left -= 1
            return True


class Pipeline:
    """Everything requests share: the plan, the sinks, and the counts."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.sinks: list[Sink] = []
        self.telemetry: telemetry.Telemetry | None = None
        self.propagate = True
        self.discovery: Discovery | None = None
        self.aborting = False
        self.in_flight = 0
        self.budget = Budget()
        self.counts = dict.fromkeys(("accepted", "ok", "error", "cancelled", "timeout", "rejected"), 0)
        self.keys: dict[str, dict[str, float]] = {}
        self._lock = threading.Lock()

    def know_models(self) -> None:
        """Wait for the first search for models, if it is still under way (the first moments after the start)."""
        if self.discovery is not None and not self.discovery.once.is_set():
            self.discovery.once.wait(2.0)

    def start(self, request: Request, arrival: Arrival) -> Run:
        """Accept a well-formed request."""
        return Run(self, request, arrival)

    def enter(self) -> tuple[int, int]:
        """Count a request in: its number and how many are running now, itself included."""
        self.budget.request()
        with self._lock:
            self.counts["accepted"] += 1
            self.in_flight += 1
            return self.counts["accepted"], self.in_flight

    def out(self) -> None:
        """A request is running no longer."""
        with self._lock:
            self.in_flight -= 1

    def leave(self, record: dict[str, Any]) -> None:
        """Count how a request ended and give its record to every sink."""
        cost = record["cost"]["total"] if record["cost"] else 0.0
        with self._lock:
            self.counts[record["outcome"]] += 1
            if record["provider"] in self.plan.lanes:
                self.plan.lanes[record["provider"]].cost_usd += cost
            if record["api_key_name"] is not None:
                key = self.keys.setdefault(record["api_key_name"], {"requests": 0, "cost_usd": 0.0})
                key["requests"] += 1
                key["cost_usd"] += cost
        self.emit(record)

    def emit(self, event: dict[str, Any]) -> None:
        """Hand an event to every sink. A sink that fails is told of in the program's log; requests never notice."""
        for sink in self.sinks:
            try:
                sink(event)
            except Exception as e:  # noqa: BLE001 - a reader's bug must not become a client's error
                log.error("a reader of records failed: %s", type(e).__name__)

    def stats(self) -> dict[str, Any]:
        """The pipeline's part of /api/v1/stats."""
        with self._lock:
            counts, keys = dict(self.counts), {name: dict(key) for name, key in self.keys.items()}
        told = {name: lane.stats() for name, lane in self.plan.lanes.items()}
        return {"in_flight": self.in_flight, "requests": counts, "providers": told, **({"api_keys": keys} if keys else {})}


# Discovery ------------------------------------------------------------------------------------------------------------
class Patience:
    """The watch of a call outside any request: it has so many seconds, and ends when the router does."""

    def __init__(self, seconds: float, stop: threading.Event | None = None) -> None:
        self._seconds, self._until, self._stop = seconds, time.monotonic() + seconds, stop

    def check(self) -> None:
        """Raise what ends the call."""
        if self._stop is not None and self._stop.is_set():
            raise ClientGone("shutdown")
        if time.monotonic() > self._until:
            raise UpstreamError(f"no answer within {self._seconds:g} s", status=504, kind="timeout", code="timeout")


class Discovery:
    """Asks the providers that can tell which models they serve, at start and every minute, on a thread of its own."""

    EVERY = 60.0

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._stop = threading.Event()
        self.once = threading.Event()
        self._thread = threading.Thread(target=self._run, name="discovery", daemon=True)
        self._thread.start()

    def again(self) -> None:
        """Ask now (the providers have changed)."""
        threading.Thread(target=self._round, name="discovery-now", daemon=True).start()

    def close(self) -> None:
        """Stop asking."""
        self._stop.set()
        self._thread.join(2.0)

    def _run(self) -> None:
        while True:
            self._round()
            self.once.set()
            if self._stop.wait(self.EVERY):
                return

    def _round(self) -> None:
        for lane in self._pipeline.plan.lanes.values():
            if lane.discoverable and not self._stop.is_set():
                discover(lane, Patience(10.0, self._stop), self._pipeline.telemetry)


def ask(lane: Lane, call: Call, watch: providers.Watch, observer: telemetry.Telemetry | None = None) -> dict[str, Any]:
    """One small question to a provider, outside any request. Raises RequestError (why it failed) or ClientGone."""
    began_ns, began = time.time_ns(), time.monotonic()
    status: int | None = None
    failure: RequestError | ClientGone | None = None
    try:
        reply = lane.upstream.send(call, watch)
        try:
            reply.head()
            status = reply.status
            return _told(reply)
        finally:
            reply.close()
    except (RequestError, ClientGone) as e:
        failure = e
        raise
    finally:
        if observer is not None:
            observer.call(
                kind=call.kind, provider=lane.name, start_ns=began_ns, duration_ms=_ms(time.monotonic() - began),
                server_address=lane.upstream.address, server_port=lane.upstream.port, method=call.method, status=status,
                error=str(failure) if failure else None, error_type=failure.code if failure else None,
            )  # fmt: skip


def _told(reply: Reply) -> dict[str, Any]:
    body = providers.read_object(reply.read_all())
    if reply.status != 200:
        raise providers.refusal(reply.status, reply.headers, None, ())
    if body is None:
        raise providers.malformed("an answer that is not JSON")
    return body


def examine(lane: Lane) -> tuple[bool, str]:
    """Is this provider reachable, is our key accepted, does it serve the models we name? (ok, the finding with its cure)."""
    language = lane.upstream.language
    if not hasattr(language, "models_call"):
        return True, "nothing to connect to" if lane.upstream.address is None else "cannot be asked without sending a prompt"
    try:
        served = language.parse_models(ask(lane, language.models_call(), Patience(10.0)))
    except (RequestError, ClientGone) as e:
        return False, _cure(lane, e)
    except providers.SHAPE_ERRORS:
        return False, "its list of models has another shape: is `format` right?"
    missing = [m for m in lane.provider.models if m != "*" and not {m, f"{m}:latest"} & set(served)]
    if missing:
        return False, f"reachable, but it does not list {', '.join(missing)}; it lists {', '.join(served[:8]) or 'nothing'}"
    return True, f"reachable, lists {len(served)} models"


def _cure(lane: Lane, error: RequestError | ClientGone) -> str:
    cures = {
        "provider_auth_error": f"the key in {lane.provider.api_key_env or '(api_key_env is not set)'} is not accepted",
        "connection_refused": f"nothing answers at {lane.provider.base_url}: is it running, is the address right?",
        "connect_timeout": f"no connection to {lane.provider.base_url}: a firewall, or the wrong address?",
        "unexpected_redirect": "it redirects: base_url must be the address it redirects to",
        "upstream_404": f"{lane.provider.base_url} answers, but not at this path: base_url should probably end in /v1",
    }
    return f"{error}; {cures.get(error.code, 'look at its own log')}"


def discover(lane: Lane, watch: providers.Watch, observer: telemetry.Telemetry | None = None) -> str | None:
    """Learn which models a provider serves and what they can do; the reason if it could not be learnt."""
    language = lane.upstream.language
    try:
        models = language.parse_models(ask(lane, language.models_call(), watch, observer))
        if hasattr(language, "capabilities_call"):
            for model in models:
                if model not in lane.capabilities:
                    told = ask(lane, language.capabilities_call(model), watch, observer)
                    lane.capabilities[model] = frozenset(language.parse_capabilities(told))
    except (RequestError, ClientGone) as e:
        return str(e)
    except providers.SHAPE_ERRORS:
        return "the provider's list of models has a shape that is not its format's"
    if set(models) != set(lane.discovered):
        log.info("%s serves %d models", lane.name, len(models))
    lane.discovered = tuple(models)
    return None
