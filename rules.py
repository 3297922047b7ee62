"""The candidates: the providers in service, what is known of them, and the rules that name them.

A `Lane` is a provider in service with its breaker, its measured numbers and the models it serves. A rule is a frozen
dataclass whose fields are its keys in the file; it judges a question and gives candidates in order, or passes through to the
next. `RULES` is the table of them.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from providers import Provider, Request, Upstream, shown


@dataclass(frozen=True)
class Breaker:
    """The [breaker] section."""

    failures: int = field(default=5, metadata={"doc": "consecutive failures that rest a provider"})
    cooldown_seconds: float = field(default=30.0, metadata={"doc": "seconds it rests; then one probe decides"})

    def __post_init__(self) -> None:
        if self.failures < 1:
            raise ValueError("failures: must be at least 1")
        if not 0 < self.cooldown_seconds <= 86400:
            raise ValueError("cooldown_seconds: must be more than 0 and at most 86400")


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
        self.cost_usd = 0.0
        self.discovered: tuple[str, ...] = ()
        self.capabilities: dict[str, frozenset[str]] = {}
        self._built_in: frozenset[str] = getattr(upstream.language, "CAPABILITIES", frozenset())
        self._measured: dict[str, deque[tuple[float, float]]] = {
            "ttft_ms": deque(maxlen=100),
            "tokens_per_s": deque(maxlen=100),
        }

    def unchanged(self, provider: Provider, key: str | None, breaker: Breaker) -> bool:
        """May this lane stay in service after a reload?"""
        return (self.provider, self.upstream.key, self._breaker) == (provider, key, breaker)

    @property
    def models(self) -> tuple[str, ...]:
        """The models it is known to serve: told, built in, or found out."""
        told = (*getattr(self.upstream.language, "MODELS", ()), *(m for m in self.provider.models if m != "*"))
        return (*told, *(m for m in self.discovered if m not in told))

    @property
    def discoverable(self) -> bool:
        """Does this provider tell its models when asked, and are we to ask?"""
        asks = self.provider.format == "ollama" or "*" in self.provider.models
        return asks and hasattr(self.upstream.language, "models_call")

    def language(self, request: Request) -> str:
        """The language in which a request goes to this provider: its own, or Responses where both sides speak that."""
        return "responses" if self.provider.responses and request.native("responses") else self.provider.format

    def lacks(self, request: Request, model: str) -> str | None:
        """What the request needs that this provider cannot do with this model; None if nothing is known to be missing."""
        if request.operation == "embeddings" and "embeddings" not in getattr(self.upstream.language, "OPERATIONS", ()):
            return request.operation
        if request.bound and not request.native(self.language(request)):
            return next(iter(request.bound))
        if not (self.capabilities or self._built_in) or request.operation == "count_tokens":
            return None
        return next((need for need in needs(request) if self.cannot(model, need)), None)

    def cannot(self, model: str, need: str) -> bool:
        """Is this model known to be unable to do this? (What nobody told of it, it may be able to do.)"""
        able = self.capabilities.get(model) or self.capabilities.get(f"{model}:latest") or self._built_in
        return bool(able) and need not in able

    def resting(self) -> float:
        """Seconds until this provider may be asked again; 0 when it may."""
        if not self._failures:
            return 0.0
        with self._lock:
            if self._probing:
                return self._breaker.cooldown_seconds
            return max(0.0, self._rests_until - time.monotonic())

    def asked(self) -> Asked | None:
        """Take the lane for one attempt; None if it rests. After a rest only one attempt gets it: the probe."""
        with self._lock:
            probe = self._failures >= self._breaker.failures
            if probe and (self._probing or time.monotonic() < self._rests_until):
                return None
            self._probing = self._probing or probe
            self.requests += 1
            return Asked(self, probe)

    def answered(self, healthy: bool | None, *, probe: bool = False, failed: bool = False) -> None:
        """How an attempt went. Unhealthy ones count for the breaker; None says nothing of the provider's health (the
        client left, the request or the key was at fault). While the lane rests only its probe decides."""
        with self._lock:
            self.errors += failed
            rests = self._failures >= self._breaker.failures
            self._probing = self._probing and not probe
            if healthy is None or (rests and not probe):
                return
            self._failures = 0 if healthy else self._failures + 1
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
            "cost_usd": self.cost_usd,
            "models": list(self.models),
        }


@dataclass(slots=True)
class Asked:
    """One attempt's hold on a lane; `settle` gives it back, once."""

    lane: Lane
    probe: bool
    settled: bool = False

    def settle(self, healthy: bool | None, *, failed: bool = False) -> None:
        """Tell the lane how the attempt went; only the first call counts."""
        if not self.settled:
            self.settled = True
            self.lane.answered(healthy, probe=self.probe, failed=failed)


def needs(request: Request) -> list[str]:
    """The capabilities that a request calls for, in Ollama's words (its /api/show lists them) where it has one."""
    functions = any(t.extra.get("type", "function") == "function" or t.parameters for t in request.tools)
    return [*shown(request), *(["tools"] if functions and request.tool_choice != "none" else [])]


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
    """What rules decide about: a model name, the request with its tags, and the providers in service."""

    model: str
    request: Request
    tags: Sequence[str]
    lanes: Mapping[str, Lane]

    def among(self, names: Sequence[str]) -> list[Lane]:
        """The named providers that are in service, all for no names; left-out ones are never drawn."""
        return [self.lanes[n] for n in names if n in self.lanes] if names else list(self.lanes.values())


@dataclass(frozen=True)
class Rule:
    """One [[routers]] table. A rule yields candidates, or passes through to the next."""

    name: str = field(default="", kw_only=True, metadata={"doc": "what X-Router-Rule and the record call it"})

    def references(self) -> dict[str, str]:
        """The providers this rule refers to, each under its place in the rule's table, for the check at start."""
        one = getattr(self, "provider", "")
        return {"provider": one} if one else {f"providers[{i}]": n for i, n in enumerate(getattr(self, "providers", ()))}

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
            raise ValueError("quality_bias: must lie between 0 and 1")

    def judge(self, question: Question) -> Verdict:
        offered = _offer(question.among(self.providers), question, self.rewrite_model)
        for candidate in offered:
            p = candidate.lane.provider
            candidate.value = self.quality_bias * p.quality - (1 - self.quality_bias) * p.flat_cost(candidate.model)
        return Verdict("by score", sorted(offered, key=lambda c: -(c.value or 0.0)))


@dataclass(frozen=True)
class Random(Rule):
    """Any model, each live candidate equally likely."""

    providers: tuple[str, ...] = field(default=(), metadata={"doc": "empty: all"})
    rewrite_model: str = field(default="", metadata={"doc": "the model to send instead"})
    candidates: tuple[dict[str, str], ...] = field(default=(), metadata={"doc": "pairs of provider and model instead"})

    def __post_init__(self) -> None:
        for i, pair in enumerate(self.candidates):
            if unknown := pair.keys() - {"provider", "model"}:
                raise ValueError(f"candidates[{i}].{min(unknown)}: unknown key, known are provider and model")
            if "provider" not in pair:
                raise ValueError(f"candidates[{i}].provider: required")

    def references(self) -> dict[str, str]:
        return super().references() | {f"candidates[{i}].provider": c["provider"] for i, c in enumerate(self.candidates)}

    def judge(self, question: Question) -> Verdict:
        if self.candidates:
            offered = [
                c for pair in self.candidates for c in _offer(question.among([pair["provider"]]), question, pair.get("model", ""))
            ]
        else:
            offered = _offer(question.among(self.providers), question, self.rewrite_model)
        return Verdict("at random", random.sample(offered, len(offered)))


@dataclass(frozen=True)
class Tag(Rule):
    """Requests that a classifier gave this tag go to one provider."""

    tag: str = field(metadata={"doc": "the tag"})
    provider: str = field(metadata={"doc": "who answers"})
    rewrite_model: str = field(default="", metadata={"doc": "the model to send instead"})

    def judge(self, question: Question) -> Verdict:
        if self.tag not in question.tags:
            return Verdict(f"the request is not tagged {self.tag}")
        return Verdict(f"the request is tagged {self.tag}", _offer(question.among([self.provider]), question, self.rewrite_model))


@dataclass(frozen=True)
class Limit(Rule):
    """Any model, providers within a limit, the best first; one whose number is unknown passes through to later rules."""

    providers: tuple[str, ...] = field(default=(), metadata={"doc": "empty: all"})

    def rank(
        self, question: Question, number: Callable[[Lane], float | None], limit: float | None, unit: str, *, most: bool
    ) -> Verdict:
        """Candidates whose number is known and at most (or at least) the limit, if there is one."""
        offered = _offer(question.among(self.providers), question, "")
        for candidate in offered:
            value = candidate.value = number(candidate.lane)
            within = value is not None and (limit is None or (value <= limit if most else value >= limit))
            if not within and candidate.skipped is None:
                candidate.skipped = "not known" if value is None else f"{'over' if most else 'under'} {limit:g} {unit}"
        offered.sort(key=lambda c: (c.value is None, (c.value or 0.0) * (1 if most else -1)))
        bound = "" if limit is None else f", {'at most' if most else 'at least'} {limit:g}"
        return Verdict(f"by {unit}{bound}", offered)


@dataclass(frozen=True)
class Price(Limit):
    """Any model, providers that cost at most so much, the cheapest first."""

    max_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "USD; unset: no limit"})

    def judge(self, question: Question) -> Verdict:
        limit = self.max_cost_per_1m_tokens
        return self.rank(question, lambda lane: lane.provider.flat_cost(question.model), limit, "USD per 1M tokens", most=True)


@dataclass(frozen=True)
class Latency(Limit):
    """Any model, providers that begin to answer within so many milliseconds, the fastest first."""

    max_latency_ms: float | None = field(default=None, metadata={"doc": "milliseconds to the first token; unset: no limit"})

    def judge(self, question: Question) -> Verdict:
        return self.rank(
            question, lambda lane: lane.number("ttft_ms", lane.provider.latency_ms), self.max_latency_ms, "ms", most=True
        )


@dataclass(frozen=True)
class Throughput(Limit):
    """Any model, providers that give at least so many tokens per second, the fastest first."""

    min_tokens_per_sec: float | None = field(default=None, metadata={"doc": "tokens per second; unset: no limit"})

    def judge(self, question: Question) -> Verdict:
        def number(lane: Lane) -> float | None:
            return lane.number("tokens_per_s", lane.provider.throughput_tokens_per_sec)

        return self.rank(question, number, self.min_tokens_per_sec, "tokens/s", most=False)


@dataclass(frozen=True)
class Discover(Rule):
    """Models that the provider is known to serve go to it."""

    provider: str = field(default="", metadata={"doc": "who answers; empty: whoever serves the model"})

    def judge(self, question: Question) -> Verdict:
        lanes = question.among([self.provider] if self.provider else [])
        serving = [lane for lane in lanes if serves(lane, question.model)]
        if not serving:
            return Verdict("the model is not served there" if lanes else "the provider is left out")
        return Verdict("the model is served there", _offer(serving, question, ""))


def serves(lane: Lane, model: str) -> bool:
    """Is the provider known to serve this model? Ollama's `llama3` is short for `llama3:latest`."""
    return model in lane.models or (lane.provider.format == "ollama" and f"{model}:latest" in lane.models)


def _offer(lanes: Sequence[Lane], question: Question, rewrite: str) -> list[Candidate]:
    return [offer(lane, rewrite or question.model, question.request) for lane in lanes]


def offer(lane: Lane, model: str, request: Request) -> Candidate:
    """The provider as a candidate: one that rests, or cannot do what is asked, is named but never drawn."""
    lacking = lane.lacks(request, model)
    return Candidate(lane, model, skipped="resting" if lane.resting() else f"no {lacking}" if lacking else None)


RULES: dict[str, type[Rule]] = {
    "prefix": Prefix, "tag": Tag, "price": Price, "latency": Latency, "throughput": Throughput, "discover": Discover,
    "fallback": Fallback, "random": Random,
}  # fmt: skip


def rule_label(rule: Rule, index: int) -> str:
    """How headers and records call a rule: its name, else its place and type."""
    kind = next(kind for kind, cls in RULES.items() if type(rule) is cls)
    return rule.name or f"{index}:{kind}"
