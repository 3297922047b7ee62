"""The languages: the words every wire format is translated through, and the only code that talks to an upstream.

A format is one file of pure functions in this folder and its name is its registration: `format = "ollama"` is
`providers/ollama.py`. A file may have two faces. The client face hears a client and answers it: `parse_request`, `render`,
`Renderer` (streams), `render_error`, `render_stream_error`. (Where the error that ends a stream must know what was said before,
that is `Renderer.fail`, and `Relay` for a stream that is passed on as it comes.) The upstream face speaks to a provider:
`build`, `parse`, `Parser` (streams). Between the two lie the words of this module: `Request`, `Event`, `Answer`. So N client
and M upstream formats cost N + M files, never N x M. What an upstream can do beyond "chat" it says in `OPERATIONS`; and if
all its models can do the same, in `CAPABILITIES` what that is.

Part 1 holds the words, part 2 reads JSON and SSE, part 3 is the exchange with an upstream: urllib3 keeps the connections
(pool, connect, TLS), one request and its answer run over the pooled socket here, because only so does every wait have
an end: it is woken four times a second to look at the clock and at the client.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import pkgutil
import queue
import re
import select
import ssl
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC
from email.utils import parsedate_to_datetime
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import urlsplit

import telemetry

Block = dict[str, Any]
"""One piece of content: text, image, document, audio, tool_use, tool_result, thinking or redacted_thinking (key `type`)."""


# 1. The words ------------------------------------------------------------------------------------------------------
class RequestError(Exception):
    """Anything a client is told instead of an answer; each client face renders it in its own dialect.

    `kind` is one of the keys of every face's error table; `code` names the case for programs and for the record.
    """

    status = 500
    kind = "internal"
    src: str | None = "router"

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status or self.status
        self.kind = kind or self.kind
        self.code = code or self.kind
        self.param = param
        self.headers = dict(headers or {})


class BadRequest(RequestError):
    """The client did wrong: `param` names the field."""

    status = 400
    kind = "invalid_request"


class NoProvider(RequestError):
    """No rule yields a candidate (404), or all of them are resting or busy (503)."""

    status = 404
    kind = "not_found"


class UpstreamError(RequestError):
    """The provider did wrong. `upstream_status` is what it said, if it said anything.

    `retryable` allows the next candidate to be tried; `refused` says that the provider surely did no work for this
    request, so even the same provider may be asked again. `detail` is the upstream's own (scrubbed) error object; it
    may echo the client's words, so it goes to that client and nowhere else.
    """

    status = 502
    kind = "upstream"

    def __init__(
        self,
        message: str,
        *,
        upstream_status: int | None = None,
        retryable: bool = False,
        refused: bool = False,
        detail: dict[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(message, **more)
        self.upstream_status = upstream_status
        self.retryable = retryable
        self.refused = refused
        self.detail = detail


class ClientGone(Exception):
    """The client hung up while its answer was on the way; `code` says how it was noticed."""

    def __init__(self, code: str = "client_disconnected") -> None:
        super().__init__(code)
        self.code = code


@dataclass(slots=True)
class Message:
    """One turn. `role` is user, assistant, tool (only tool_result blocks) or system (one in mid-conversation)."""

    role: str
    content: list[Block]


@dataclass(slots=True)
class Tool:
    """A function the model may call; `extra` keeps what only one dialect knows (strict, cache_control)."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Request:
    """What a client asked, in no dialect. None always means: the client did not say.

    `tool_choice` is "auto", "none", "required" or a tool's name prefixed by "tool:". `response_format` is None,
    {"type": "json_object"} or {"type": "json_schema", "name", "schema", "strict"}. `reasoning` is the number of tokens the
    model may think (0: not at all). `operation` is "chat", "embeddings" (then `inputs` is set) or "count_tokens". `router`
    holds the router's own fields: plugins, trace, session_id, models. `forced` are the (provider, model or None) that a
    plugin wants asked instead of whom the rules name. `dropped` names what the client said that has no words here; `bound`
    (field -> why) what cannot be left out either, so that only a provider that gets the client's own bytes may be asked.
    """

    format: str
    body: Body
    model: str
    operation: str = "chat"
    stream: bool = False
    include_usage: bool = False
    system: list[Block] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    tools: list[Tool] = field(default_factory=list)
    tool_choice: str | None = None
    parallel_tool_calls: bool | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: list[str] = field(default_factory=list)
    n: int = 1
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    response_format: dict[str, Any] | None = None
    reasoning: int | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inputs: list[Any] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    router: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    forced: list[tuple[str, str | None]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    bound: dict[str, str] = field(default_factory=dict)
    changed: bool = False

    def native(self, format: str) -> bool:
        """May the client's own bytes go on to a provider of this format? Not once a plugin has changed the request."""
        return self.format == format and not self.changed

    @property
    def text_field(self) -> str:
        """The field in which a client of this language writes its messages, for the errors that name it."""
        return "input" if self.format == "responses" else "messages"

    def said(self) -> str:
        """The text people wrote, system prompt included: no images, no tool calls and what they brought back."""
        blocks = [*self.system, *(b for m in self.messages for b in m.content)]
        return "\n".join(b["text"] for b in blocks if b["type"] == "text")

    def text(self) -> str:
        """All the text the client wrote, system prompt included, for classifiers and token estimates."""
        blocks = [*self.system, *(b for m in self.messages for b in m.content)]
        return "\n".join(block_text(b) for b in blocks)


ROUTER_FIELDS = frozenset(("plugins", "trace", "session_id", "models"))
"""Top-level fields of a request that are meant for the router and never sent on."""


def router_fields(data: Mapping[str, Any], headers: Mapping[str, str]) -> dict[str, Any]:
    """The router's own fields of a body, checked; the header x-session-id counts where the body has no session_id.

    `headers` has lower-case names. Raises BadRequest naming the field.
    """
    found = {name: data[name] for name in ROUTER_FIELDS if data.get(name) is not None}
    found.setdefault("session_id", headers.get("x-session-id"))
    session, trace = found["session_id"], found.setdefault("trace", {})
    if session is not None and not (isinstance(session, str) and len(session) <= 256):
        raise BadRequest("session_id must be a string of at most 256 characters", param="session_id")
    if not isinstance(trace, dict):
        raise BadRequest("trace must be an object", param="trace")
    models = found.setdefault("models", [])
    if not (isinstance(models, list) and all(isinstance(m, str) and m for m in models)):
        raise BadRequest("models must be a list of model names", param="models")
    plugins = found.setdefault("plugins", [])
    if not (isinstance(plugins, list) and all(isinstance(p, dict) and isinstance(p.get("id"), str) for p in plugins)):
        raise BadRequest('plugins must be a list of objects like {"id": "response-healing"}', param="plugins")
    return found


def read_field(data: Mapping[str, Any], name: str, types: Any, what: str, *, required: bool = False, place: str = "") -> Any:
    """A field of a client's JSON object, None where it is not there. Raises BadRequest naming it (below `place`)."""
    value, path = data.get(name), f"{place}.{name}" if place else name
    if value is None and not required:
        return None
    wrong_bool = isinstance(value, bool) and types is not bool
    if value is None or wrong_bool or not isinstance(value, types):
        raise BadRequest(f"{path} {'is required' if value is None else f'must be {what}'}", param=path)
    return value


def below_one(data: Mapping[str, Any], *names: str) -> dict[str, str]:
    """Those of these limits, read as whole numbers before, that are below 1 -> why that cannot be said to every provider:
    to some it is no limit at all, so they may have the client's own bytes (see `Request.bound`)."""
    return {name: f"{name} must be at least 1" for name in names if data.get(name) is not None and data[name] < 1}


def read_strings(value: str | list[Any] | None, name: str) -> list[str]:
    """A string, or a list of them, as a list. Raises BadRequest naming the field."""
    values = [value] if isinstance(value, str) else value or []
    if not all(isinstance(v, str) for v in values):
        raise BadRequest(f"{name} must be a list of strings", param=name)
    return values


def block_text(block: Block) -> str:
    """The text of a block: what a reader of plain text would see of it, "" for an image."""
    content = block.get("text") or block.get("thinking") or block.get("content") or ""
    if isinstance(content, list):
        return "\n".join(block_text(b) for b in content if isinstance(b, dict))
    return content if isinstance(content, str) else ""


READS = {"image": "vision", "audio": "audio", "document": "documents"}
"""Block that is not text -> what a model must be able to do to read it (`vision` is Ollama's word, its /api/show lists it)."""


def shown(request: Request) -> dict[str, str]:
    """What a model must be able to do to read all blocks, also those that tools brought back -> the type of the block."""
    blocks = [b for m in request.messages for b in m.content]
    results = [b["content"] for b in blocks if b["type"] == "tool_result" and isinstance(b.get("content"), list)]
    types = {b["type"] for content in (blocks, *results) for b in content}
    return {need: kind for kind, need in READS.items() if kind in types}


@dataclass(slots=True)
class Usage:
    """Token counts of one answer. Input includes cached and cache-write tokens; output includes reasoning."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_input_tokens: int = 0
    cache_write_input_tokens: int = 0
    reasoning_tokens: int = 0
    cost: float | None = None

    @classmethod
    def of(cls, counts: Mapping[str, Any], **paths: str) -> Usage:
        """Read counts by dotted path (`input_tokens="prompt_tokens"`); whatever is no sane count is left at 0."""
        return cls(**{name: count(dig(counts, path)) for name, path in paths.items()})


def dig(value: Any, path: str) -> Any:
    """`dig({"a": {"b": 1}}, "a.b")` is 1; None where the path ends early."""
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def count(value: Any) -> int:
    """A token count from the network: an int in 0..2^53, whole floats too; anything else is 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return 0
    return int(value) if 0 <= value < 2**53 and value == int(value) else 0


def amount(value: Any) -> float | None:
    """A sum of money from the network: a finite number >= 0, else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if 0 <= value < 1e12 else None


# The events of an answer: whole answers and streams are the same sequence, only cut differently.
@dataclass(slots=True)
class Begin:
    """The answer has begun: the upstream's own id and model, if it told them."""

    id: str | None = None
    model: str | None = None


@dataclass(slots=True)
class Text:
    """A piece of answer text; `choice` counts from 0 where n > 1 were asked for."""

    text: str
    choice: int = 0


@dataclass(slots=True)
class Reasoning:
    """A piece of the model's thinking; a signature or a redacted block comes as its own event."""

    text: str = ""
    signature: str | None = None
    redacted: str | None = None


@dataclass(slots=True)
class ToolCall:
    """A piece of tool call number `index`; id and name come with its first piece, arguments as JSON text in pieces."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""


@dataclass(slots=True)
class Finish:
    """Why generation ended: stop, length, tool_calls, content_filter; `native` is the upstream's own word."""

    reason: str
    native: str | None = None
    stop_sequence: str | None = None
    choice: int = 0


@dataclass(slots=True)
class Used:
    """Token counts as the upstream reports them; a later report replaces an earlier one."""

    usage: Usage


@dataclass(slots=True)
class Timings:
    """Where a local model spent its time, in milliseconds (Ollama's durations, llama.cpp's timings)."""

    load_ms: float | None = None
    prefill_ms: float | None = None
    decode_ms: float | None = None


@dataclass(slots=True)
class Done:
    """The upstream says that the answer is complete ([DONE], message_stop, done: true)."""


@dataclass(slots=True)
class Malformed:
    """A block that could not be read; a same-language client gets it as it came, anyone else an error."""

    what: str


@dataclass(slots=True)
class Vectors:
    """The answer to an embeddings request: one list of floats (or one base64 string) per input, in order."""

    vectors: list[Any]


Event = Begin | Text | Reasoning | ToolCall | Finish | Used | Timings | Done | Malformed | Vectors
KEEP_CHARS = 4 * 1024 * 1024
"""The most answer text kept for the record; a longer answer flows on, its record says that it was cut."""


class Answer:
    """The fold over an answer's events: what a non-streamed client gets and what the record keeps."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.model: str | None = None
        self.finish: Finish | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.tool_calls: dict[int, ToolCall] = {}
        self.thinking: list[Block] = []
        self.vectors: list[Any] = []
        self.malformed = 0
        self.truncated = False
        self.changed = False
        self.done = False
        self.tags: list[str] = []
        self.choices: dict[int, list[str]] = {0: []}
        self._kept = 0

    def events(self) -> list[Event]:
        """The events whose fold this is."""
        events: list[Event] = [Begin(self.id, self.model)]
        events += [Reasoning(b.get("thinking", ""), b.get("signature"), b.get("data")) for b in self.thinking]
        events += [Text("".join(pieces), choice) for choice, pieces in sorted(self.choices.items()) if pieces]
        events += [call for _, call in sorted(self.tool_calls.items())]
        events.append(self.finish or Finish("tool_calls" if self.tool_calls else "stop"))
        return [*events, *([Used(self.usage)] if self.usage else []), Done()]

    def add(self, event: Event) -> None:
        """Take in the next event."""
        self._takes[type(event)](self, event)

    @property
    def text(self) -> str:
        return "".join(self.choices[0])

    @text.setter
    def text(self, value: str) -> None:
        self.choices[0], self.changed = [value], True

    @property
    def reasoning(self) -> str:
        return "".join(b.get("thinking", "") for b in self.thinking)

    @property
    def complete(self) -> bool:
        """Did the upstream say in any way that this is all? (Some servers never send [DONE].)"""
        return self.done or self.finish is not None

    @property
    def empty(self) -> bool:
        return not (self.tool_calls or self.thinking or any(self.choices.values()))

    def _keep(self, size: int) -> bool:
        self._kept += size
        self.truncated = self.truncated or self._kept > KEEP_CHARS
        return not self.truncated

    def _begin(self, event: Begin) -> None:
        self.id, self.model = event.id or self.id, event.model or self.model

    def _text(self, event: Text) -> None:
        if self._keep(len(event.text)):
            self.choices.setdefault(event.choice, []).append(event.text)

    def _reasoning(self, event: Reasoning) -> None:
        if not self._keep(len(event.text)):
            return
        if event.redacted is not None:
            self.thinking.append({"type": "redacted_thinking", "data": event.redacted})
            return
        if not self.thinking or self.thinking[-1]["type"] != "thinking" or "signature" in self.thinking[-1]:
            self.thinking.append({"type": "thinking", "thinking": ""})
        block = self.thinking[-1]
        block["thinking"] += event.text
        if event.signature is not None:
            block["signature"] = event.signature

    def _tool_call(self, event: ToolCall) -> None:
        call = self.tool_calls.setdefault(event.index, ToolCall(event.index))
        call.id, call.name = event.id or call.id, event.name or call.name
        if self._keep(len(event.arguments)):
            call.arguments += event.arguments

    def _finish(self, event: Finish) -> None:
        if event.choice == 0 or self.finish is None:
            self.finish = event

    def _used(self, event: Used) -> None:
        self.usage = event.usage

    def _timings(self, event: Timings) -> None:
        self.timings = event

    def _done(self, event: Done) -> None:
        self.done = True

    def _vectors(self, event: Vectors) -> None:
        self.vectors = event.vectors

    def _malformed(self, event: Malformed) -> None:
        self.malformed += 1

    _takes: dict[type, Callable[..., None]] = {  # noqa: RUF012 - a dispatch table, never changed
        Begin: _begin, Text: _text, Reasoning: _reasoning, ToolCall: _tool_call, Finish: _finish,
        Used: _used, Timings: _timings, Done: _done, Malformed: _malformed, Vectors: _vectors,
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Stamp:
    """What a rendered answer says of itself: an id, when it was made (Unix seconds), and by which model."""

    id: str
    created: int
    model: str


@dataclass(slots=True)
class Call:
    """One HTTP request to a provider, as a format's `build` gives it; `dropped` names what the target cannot express."""

    path: str
    body: bytes
    kind: str
    headers: dict[str, str] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    method: str = "POST"


@dataclass(frozen=True)
class Prices:
    """What tokens cost, in USD per million: a provider's own keys, or those of one of its models (they win)."""

    cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "input and output alike"})
    input_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "input"})
    output_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "output"})
    cached_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "cached input"})

    def __post_init__(self) -> None:
        check_prices(self)


def check_prices(prices: Prices | Provider) -> None:
    """Raise ValueError for a price that is none."""
    for name in (
        "cost_per_1m_tokens",
        "input_cost_per_1m_tokens",
        "output_cost_per_1m_tokens",
        "cached_cost_per_1m_tokens",
    ):
        if (price := getattr(prices, name)) is not None and not 0 <= price < 1e9:
            raise ValueError(f"{name}: must be a sum of money, 0 or more")


@dataclass(frozen=True)
class Provider:
    """One [[providers]] table: who it is, how to reach it, what it costs, how long to wait for it."""

    name: str = field(metadata={"doc": "how rules, records and headers call it"})
    format: str = field(metadata={"doc": "its wire format: openai, anthropic, ollama or echo"})
    base_url: str = field(default="", metadata={"doc": "where it listens; with or without /v1 and trailing slash"})
    api_key_env: str = field(default="", metadata={"doc": "environment variable with its key; unset: left out with a warning"})
    headers: dict[str, str] = field(default_factory=dict, metadata={"doc": "static extra headers"})
    models: tuple[str, ...] | dict[str, Prices] = field(
        default=(),
        metadata={"doc": 'models it serves, for discover and /v1/models; ["*"]: ask it; or a table of prices per model'},
    )
    cost_per_1m_tokens: float = field(default=0.0, metadata={"doc": "USD, for rules and cost"})
    input_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "USD; overrides for cost"})
    output_cost_per_1m_tokens: float | None = field(default=None, metadata={"doc": "USD; overrides for cost"})
    cached_cost_per_1m_tokens: float | None = field(
        default=None, metadata={"doc": "USD for cached input tokens; input price if unset"}
    )
    quality: float = field(default=0.0, metadata={"doc": "for fallback rules"})
    latency_ms: float | None = field(default=None, metadata={"doc": "for latency rules until enough was measured"})
    throughput_tokens_per_sec: float | None = field(
        default=None, metadata={"doc": "for throughput rules until enough was measured"}
    )
    measured: bool = field(default=True, metadata={"doc": "let measured numbers replace the two above"})
    vendor: str = field(default="", metadata={"doc": "gen_ai.provider.name, where the host does not tell"})
    responses: bool = field(default=False, metadata={"doc": "an openai upstream that speaks /responses itself"})
    forward_metadata: bool = field(default=False, metadata={"doc": "pass trace and session_id on, to a router behind this one"})
    connect_timeout: float = field(default=5.0, metadata={"doc": "seconds to connect"})
    read_timeout: float = field(default=120.0, metadata={"doc": "seconds to the first byte"})
    idle_timeout: float = field(default=60.0, metadata={"doc": "seconds between stream chunks"})
    total_timeout: float = field(default=600.0, metadata={"doc": "seconds for the whole answer"})

    def __post_init__(self) -> None:
        if self.format not in _files() or not hasattr(language(self.format), "endpoint"):
            raise ValueError(f"format: unknown format {self.format!r}, known are {', '.join(formats('endpoint'))}")
        if self.format != "echo" and not self.base_url:
            raise ValueError("base_url: required")
        if self.base_url:
            check_base_url(self.base_url)
        for limit in ("connect_timeout", "read_timeout", "idle_timeout", "total_timeout"):
            if not 0 < getattr(self, limit) <= 86400:
                raise ValueError(f"{limit}: must be more than 0 and at most 86400 seconds")
        for name, value in self.headers.items():
            check_header(name, value)
        check_prices(self)

    def flat_cost(self, model: str) -> float:
        """USD per million tokens of this model, as rules compare it."""
        own = self.models.get(model) if isinstance(self.models, dict) else None
        return self.cost_per_1m_tokens if own is None or own.cost_per_1m_tokens is None else own.cost_per_1m_tokens

    def prices(self, model: str) -> tuple[float, float, float]:
        """USD per input, output and cached input token of this model."""
        own = self.models.get(model) if isinstance(self.models, dict) else None

        def told(name: str) -> float | None:
            value = getattr(own, name, None)
            return getattr(self, name) if value is None and getattr(own, "cost_per_1m_tokens", None) is None else value

        flat = getattr(own, "cost_per_1m_tokens", None)
        flat = self.cost_per_1m_tokens if flat is None else flat
        into, out = (flat if (v := told(f"{side}_cost_per_1m_tokens")) is None else v for side in ("input", "output"))
        cached = told("cached_cost_per_1m_tokens")
        return into / 1e6, out / 1e6, (into if cached is None else cached) / 1e6

    @property
    def vendor_name(self) -> str:
        """What telemetry calls this provider (gen_ai.provider.name): the vendor told, else known by its host, else the format."""
        if self.vendor:
            return self.vendor
        host = urlsplit(self.base_url).hostname or ""
        return next((name for suffix, name in VENDORS.items() if host == suffix or host.endswith("." + suffix)), self.format)


VENDORS = {
    "openai.azure.com": "azure.ai.openai", "services.ai.azure.com": "azure.ai.inference", "openai.com": "openai",
    "anthropic.com": "anthropic", "x.ai": "x_ai", "mistral.ai": "mistral_ai", "groq.com": "groq", "deepseek.com": "deepseek",
    "cohere.com": "cohere", "cohere.ai": "cohere", "perplexity.ai": "perplexity", "moonshot.ai": "moonshot_ai",
    "moonshot.cn": "moonshot_ai", "aiplatform.googleapis.com": "gcp.vertex_ai",
    "generativelanguage.googleapis.com": "gcp.gemini", "amazonaws.com": "aws.bedrock", "openrouter.ai": "openrouter",
}  # fmt: skip
"""Host suffix -> the GenAI conventions' well-known value of gen_ai.provider.name."""


def check_base_url(url: str) -> None:
    """Raise ValueError unless the URL is one a provider can be reached at."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:  # its text tells neither the key nor what to write
        raise ValueError("base_url: a port is a number up to 65535, an IPv6 address stands in brackets") from None
    if not re.fullmatch(r"[!-~]+", url):
        raise ValueError("base_url: must hold no space, control or non-ASCII character")
    if parts.scheme not in ("http", "https") or not parts.hostname or "%" in parts.hostname:
        raise ValueError("base_url: must look like https://host/v1")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise ValueError("base_url: must hold no user, password, query or fragment (keys go into api_key_env)")
    if port == 0:
        raise ValueError("base_url: port 0 cannot be connected to")


def check_header(name: str, value: str) -> None:
    """Raise ValueError unless name and value can stand in a request we send (RFC 9110, 5.1 and 5.5)."""
    if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or name.lower() in FRAMING:
        raise ValueError(f"headers.{name}: this header cannot be set")
    if not is_header_text(value):
        raise ValueError(f"headers.{name}: the value holds a control or non-latin-1 character")


FRAMING = frozenset(("host", "content-length", "transfer-encoding", "connection", "expect", "upgrade", "te", "trailer"))


def is_header_text(value: str) -> bool:
    return all(" " <= c <= "\xff" and c != "\x7f" for c in value)


def read_key(variable: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The key in an environment variable, white space around it removed; None if unset or empty.

    Raises ValueError for a key that can be in no header; the text never holds the key.
    """
    key = environ.get(variable, "").strip()
    if not key:
        return None
    if not is_header_text(key):
        raise ValueError(f"the key in ${variable} holds a control or non-latin-1 character")
    telemetry.keep_secret(key)
    return key


def formats(face: str) -> list[str]:
    """The names of the formats that have this face ("endpoint": upstreams, "parse_request": clients)."""
    return [name for name in _files() if hasattr(language(name), face)]


@functools.cache
def _files() -> list[str]:
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


@functools.cache
def language(name: str) -> ModuleType:
    """The module of a format. Raises ValueError, listing the known ones, for a name that is no file here."""
    if name not in _files():
        raise ValueError(f"unknown format {name!r}, known are {', '.join(_files())}")
    return importlib.import_module(f"{__name__}.{name}")


# 2. Reading JSON and SSE --------------------------------------------------------------------------------------------
MAX_DEPTH = 100


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [k for k, _ in pairs]
        raise BadRequest("the JSON object has a key twice", param=next(k for k in names if names.count(k) > 1))
    return found


def _no_constant(name: str) -> Any:
    raise BadRequest(f"{name} is not JSON")


def _float(text: str) -> float:
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise BadRequest(f"the number {text[:40]} is too large")
    return value


_strict = json.JSONDecoder(object_pairs_hook=_no_twins, parse_constant=_no_constant, parse_float=_float)
_scan = json.JSONDecoder()


class Body:
    """A request's JSON object: `data` parsed and checked, and the text it was parsed from, so that it can be sent on
    with single top-level fields replaced and every other byte as it was."""

    __slots__ = ("data", "text")

    def __init__(self, raw: bytes) -> None:
        """Raises BadRequest for anything but one well-formed UTF-8 JSON object (RFC 8259) of sane depth."""
        try:
            self.text = raw.decode()
        except UnicodeDecodeError as e:
            raise BadRequest(f"the body is not UTF-8 (byte {e.start})") from None
        try:
            self.data: dict[str, Any] = _strict.decode(self.text)
        except RecursionError:
            raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels") from None
        except json.JSONDecodeError as e:
            raise BadRequest(f"the body is not valid JSON: {e.msg} at line {e.lineno} column {e.colno}") from None
        except ValueError:
            raise BadRequest("the body holds a number with too many digits") from None
        if not isinstance(self.data, dict):
            raise BadRequest("the body must be a JSON object")
        if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and _deeper(self.data, MAX_DEPTH):
            raise BadRequest(f"the body is nested deeper than {MAX_DEPTH} levels")

    def with_fields(self, changes: Mapping[str, Any], without: frozenset[str] | set[str] = frozenset()) -> bytes:
        """The body with these top-level fields set or taken out and everything else byte for byte as it came."""
        changes = {k: v for k, v in changes.items() if k not in self.data or self.data[k] != v}
        if not changes and without.isdisjoint(self.data):
            return self.text.encode()
        members = []
        for key, member, value_at in self._members():
            if key in changes:
                members.append(member[:value_at] + json.dumps(changes[key]))
            elif key not in without:
                members.append(member)
        members += [f"{json.dumps(k)}:{json.dumps(v)}" for k, v in changes.items() if k not in self.data]
        return ("{" + ",".join(members) + "}").encode()

    def _members(self) -> Iterator[tuple[str, str, int]]:
        """(key, the member's text, where in it the value begins) for each top-level member."""
        text, at = self.text, self.text.index("{") + 1
        while (start := _blank(text, at)) < len(text) and text[start] != "}":
            key, after = json.decoder.scanstring(text, start + 1)  # type: ignore[attr-defined]
            value = _blank(text, _blank(text, after) + 1)
            _, end = _scan.raw_decode(text, value)
            yield key, text[start:end], value - start
            at = _blank(text, end)
            if text[at] == "}":
                return
            at += 1


def _blank(text: str, at: int) -> int:
    """Where the next character that is no JSON white space stands."""
    while text[at] in " \t\r\n":
        at += 1
    return at


def _deeper(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit):
        level = [c for v in level for c in (v.values() if isinstance(v, dict) else v) if isinstance(c, (dict, list))]
        if not level:
            return False
    return True


_EVENT_END = re.compile(rb"(?>\r\n|\n|\r)(?>\r\n|\n|\r)")
_LINE_END = re.compile(rb"\r\n|\n|\r")
MAX_BLOCK = 8 * 1024 * 1024


class SSE:
    """Cuts a byte stream into server-sent event blocks by the WHATWG rules: CR, LF and CRLF end a line, wherever a read
    happened to end. A block keeps its bytes, blank line included, so that it can be passed on as it came."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """The blocks completed by these bytes. Raises UpstreamError for a block over 8 MiB."""
        searched = max(0, len(self._rest) - 3)
        rest = self._rest + data if self._rest else data
        if b"\r" not in rest:
            *blocks, rest = rest.split(b"\n\n")
            self._keep(rest)
            return [block + b"\n\n" for block in blocks]
        blocks, start = [], 0
        for end in _EVENT_END.finditer(rest, searched):
            if end.end() == len(rest) and rest.endswith(b"\r") and not rest.endswith(b"\r\r"):
                break  # the CR may be half of a CRLF that is still on the way
            blocks.append(rest[start : end.end()])
            start = end.end()
        self._keep(rest[start:])
        return blocks

    def _keep(self, rest: bytes) -> None:
        if len(rest) > MAX_BLOCK:
            raise malformed("a single event of more than 8 MiB")
        self._rest = rest

    def end(self) -> bytes:
        """What came after the last blank line, once the stream is over."""
        rest, self._rest = self._rest, b""
        return rest


def event_data(block: bytes) -> tuple[str, bytes | None]:
    """(event name, data) of a block; None where it carries no data (a comment, an id)."""
    if block.startswith(b"data: ") and block.find(b"\n") >= len(block) - 2 and b"\r" not in block:
        return "", block[6:].rstrip(b"\n")
    name, data = "", []
    for line in _LINE_END.split(block):
        key, colon, value = line.partition(b":")
        value = value[1:] if value.startswith(b" ") else value
        if key == b"data":
            data.append(value)
        elif key == b"event":
            name = value.decode(errors="replace")
    return name, b"\n".join(data) if data else None


class Lines:
    """Cuts newline-delimited JSON into lines; the counterpart of `SSE` for Ollama and echo."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > MAX_BLOCK:
            raise malformed("a single line of more than 8 MiB")
        return [line for line in lines if line.strip()]

    def end(self) -> bytes:
        rest, self._rest = self._rest, b""
        return rest


SHAPE_ERRORS = (AttributeError, TypeError, KeyError, IndexError, ValueError)
"""What reading well-formed JSON of an unexpected shape raises; a format's parser need not check every step."""


class BlockParser:
    """The upstream face of a stream: bytes in, (block as it came, its events) out. A format says how to cut and how to read."""

    cutter: Callable[[], SSE | Lines] = SSE

    def __init__(self) -> None:
        self._cutter = type(self).cutter()
        self._fresh = True
        self.failure: UpstreamError | None = None

    def feed(self, piece: bytes) -> list[tuple[bytes, list[Event]]]:
        """The blocks completed by this piece, each with the events it says. A comment has none. If a block says that the
        provider failed, the blocks before it are given and `failure` is set: what was said before counts. Raises
        UpstreamError at once if nothing came before it."""
        blocks: list[tuple[bytes, list[Event]]] = []
        for block in self._cutter.feed(piece):
            try:
                blocks.append((block, self._read(block)))
            except UpstreamError as e:
                if not blocks:
                    raise
                self.failure = e
                break
        return blocks

    def end(self) -> list[tuple[bytes, list[Event]]]:
        """What stood after the last complete block when the stream ended: a last event whose blank line was forgotten
        counts, half of one does not."""
        rest = self._cutter.end()
        events = self._read(rest) if rest.strip() else []
        broken = rest.strip() and not (events and not any(isinstance(e, Malformed) for e in events))
        return [] if broken or not rest else [(rest, events)]

    def _read(self, block: bytes) -> list[Event]:
        if self._fresh:
            self._fresh, block = False, block.removeprefix(b"\xef\xbb\xbf")
        try:
            return self.events(block)
        except SHAPE_ERRORS:
            return [Malformed("an event of a shape that this format does not have")]

    def events(self, block: bytes) -> list[Event]:
        """What the block says. Raises UpstreamError if it says that the provider failed."""
        raise NotImplementedError


def read_object(data: bytes) -> dict[str, Any] | None:
    """The JSON object in bytes from an upstream, None if it is anything else."""
    try:
        value = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def sse(data: str, event: str = "") -> bytes:
    """One server-sent event as bytes."""
    return (f"event: {event}\ndata: {data}\n\n" if event else f"data: {data}\n\n").encode("utf-8", "surrogatepass")


_compact = json.JSONEncoder(separators=(",", ":")).encode


def dumps(value: Any) -> str:
    """Compact JSON that any reader takes: ASCII only, so a lone surrogate stays an escape and never becomes bad UTF-8."""
    return _compact(value)


# 3. The exchange -----------------------------------------------------------------------------------------------------
SLICE = 0.25
"""Seconds a wait may last before clock and client are looked at; a client that left closes its upstream within 1 s."""
MAX_HEAD = 65536
MAX_ANSWER = 64 * 1024 * 1024
KEEP_IDLE = {"http": 4.0, "https": 30.0}
"""Seconds an idle connection may still be used. Many servers close after 5 s without a word, and a request sent into that
closing could not be told from one that was taken; behind TLS a handshake is dear and servers wait longer."""


class Watch(Protocol):
    """What interrupts a wait: `check` raises ClientGone or UpstreamError when nobody needs the answer any more."""

    def check(self) -> None: ...


def malformed(what: str) -> UpstreamError:
    """The error for an answer that cannot be read."""
    return UpstreamError(f"the provider sent {what}", code="upstream_malformed", retryable=True)


PASSED_ON = {400: "invalid_request", 404: "not_found", 409: "invalid_request", 413: "too_large", 422: "invalid_request"}
"""What an upstream may tell the client as if it were the only party: the request itself is at fault."""


def refusal(status: int, headers: Mapping[str, str], detail: dict[str, Any] | None, retry_on: tuple[int, ...]) -> UpstreamError:
    """The error for an upstream's answer other than 200; `detail` is its error object with keys scrubbed.

    400, 404, 409, 413 and 422 keep their status, 401 and 403 are about our key (502), 429 stays with its Retry-After,
    all else is 502.
    """
    again = (503 if status == 529 else status) in retry_on  # 529 is Anthropic's word for overloaded
    said: dict[str, Any] = {"upstream_status": status, "retryable": again, "refused": again}
    if status in PASSED_ON:
        text = f"the provider answered {status}"
        return UpstreamError(text, status=status, kind=PASSED_ON[status], code=f"upstream_{status}", detail=detail, **said)
    if status in (401, 403):
        return UpstreamError(f"the provider refused the router's key ({status})", code="provider_auth_error", **said)
    if status in (301, 302, 303, 307, 308):
        return UpstreamError(f"the provider redirected ({status}), which is never followed", code="unexpected_redirect", **said)
    wait = {"retry-after": after} if (after := retry_after(headers.get("retry-after"))) else {}
    if status == 429:
        text = "the provider is rate limited (429)"
        return UpstreamError(text, status=429, kind="rate_limit", code="rate_limit_exceeded", headers=wait, detail=detail, **said)
    return UpstreamError(f"the provider failed ({status})", code=f"upstream_{status}", headers=wait, **said)


def seconds_until(value: str | None) -> float:
    """How long a valid Retry-After asks to wait, from now; 0 for none or a date that is past."""
    if value is None:
        return 0.0
    return float(value) if value.isdecimal() else max(0.0, _date(value) - time.time())


def retry_after(value: str | None) -> str | None:
    """A Retry-After as it came if it is valid (RFC 9110, 10.2.3: seconds or an HTTP-date), else None."""
    if value is None or re.fullmatch(r"\d{1,9}", value):
        return value
    try:
        _date(value)
    except ValueError:
        return None
    return value


_DAY = "Mon|Tue|Wed|Thu|Fri|Sat|Sun"
_MONTH = "Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec"
_TIME = r"\d\d:\d\d:\d\d"
_HTTP_DATE = re.compile(
    rf"(?:{_DAY}), \d\d (?:{_MONTH}) \d{{4}} {_TIME} GMT"
    rf"|(?:Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day, \d\d-(?:{_MONTH})-\d\d {_TIME} GMT"
    rf"|(?:{_DAY}) (?:{_MONTH}) [ \d]\d {_TIME} \d{{4}}"
)
"""IMF-fixdate and the two obsolete forms that a recipient must take (RFC 9110, 5.6.7). All of them are in UTC."""


def _date(value: str) -> float:
    """An HTTP-date as Unix seconds. Raises ValueError for what e-mail would take for a date and HTTP does not."""
    if not _HTTP_DATE.fullmatch(value):
        raise ValueError("no HTTP-date")
    return parsedate_to_datetime(value).replace(tzinfo=UTC).timestamp()


def lost(what: str, *, refused: bool = False) -> UpstreamError:
    """The error for a connection that did not last."""
    return UpstreamError(what, code="connection_refused" if refused else "connection_lost", retryable=True, refused=refused)


def late(limit: str, seconds: float) -> UpstreamError:
    """The error for a limit that passed; `limit` is connect, first_byte, stream_idle or total."""
    text = f"no answer within {LIMITS[limit]} = {seconds:g} s"
    return UpstreamError(text, status=504, kind="timeout", code=f"{limit}_timeout", retryable=limit in ("connect", "first_byte"))


LIMITS = {
    "connect": "connect_timeout",
    "first_byte": "read_timeout",
    "stream_idle": "idle_timeout",
    "total": "total_timeout",
}


class Reply:
    """An answer on the way: `status` and `headers` are here, the body comes through `read`.

    The socket has a timeout of one slice; each slice `_recv` looks at the limits and at the watch. The framing is that of
    RFC 9112, 6: chunked, Content-Length, or until the connection closes.
    """

    def __init__(self, upstream: Upstream, connection: Any, watch: Watch) -> None:
        self._upstream, self._connection, self._watch = upstream, connection, watch
        self._sock = connection.sock
        self._limits = upstream.provider
        now = time.monotonic()
        self._total = now + self._limits.total_timeout
        self._idle, self._limit = now + self._limits.read_timeout, "first_byte"
        self._look = now + SLICE
        self._rest = b""
        self._take: Callable[[bytes], bytes] = bytes
        self.status = 0
        self.headers: dict[str, str] = {}
        self.finished = False
        self._reusable = False
        self._whole_request = True
        self._gunzip: _Gunzip | None = None

    def send(self, data: bytes) -> None:
        """Write the request. A provider that answers and closes before it has read all of it may still be heard."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view) :]
            except (TimeoutError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                self._waited()
                if not self._connection.is_connected:  # urllib3's word for: there is something to read
                    self._whole_request = False
                    return
            except OSError:
                self._whole_request = False
                return  # whatever it said before it closed is still there to be read

    def head(self, until: float = float("inf")) -> bool:
        """Read up to the end of the headers; False if `until` (monotonic) passed first. Call again to go on waiting."""
        while not self.status:
            end = self._rest.find(b"\r\n\r\n")
            if end >= 0:
                self._parse_head(self._rest[:end], self._rest[end + 4 :])
            elif len(self._rest) > MAX_HEAD:
                raise malformed("more than 64 KiB of headers")
            else:
                data = self._recv(until)
                if data is None:
                    return False
                if not data:
                    raise lost("the provider closed the connection without an answer")
                self._rest += data
        return True

    def _parse_head(self, head: bytes, rest: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        status = re.match(rb"HTTP/1\.([01]) (\d{3})(?: |$)", first)
        if not status:
            raise malformed("something that is not HTTP")
        self._rest = rest
        if status[2].startswith(b"1"):
            return  # 100 Continue, 103 Early Hints: the answer proper follows
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not name or name != name.strip() or b"\r" in value or b"\n" in value or b"\0" in value:
                raise malformed("a malformed header")
            key, text = name.decode("latin-1").lower(), value.strip(b" \t").decode("latin-1")
            self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text
        self._frame(int(status[2]), status[1] == b"1")

    def _frame(self, status: int, persistent: bool) -> None:
        """How the body ends (RFC 9112, 6.3) and whether the connection may be used again after it."""
        coding, length = self.headers.get("transfer-encoding"), self.headers.get("content-length")
        self._reusable = persistent and "close" not in self.headers.get("connection", "").lower()
        self._reusable = self._reusable and (coding is None or length is None) and self._whole_request
        packed = self.headers.get("content-encoding", "identity").strip().lower()
        if packed in ("gzip", "x-gzip"):  # not asked for, but some proxies pack everything
            self._gunzip = _Gunzip()
        elif packed not in ("identity", ""):
            raise malformed("an answer in a content coding that was not asked for")
        if status in (204, 304):
            self._take = _Length(0, self)
        elif coding is not None:
            if coding.lower() != "chunked":
                raise malformed("a transfer coding other than chunked")
            self._take = _Chunked(self)
        elif length is not None:
            if len(set(length.split(", "))) != 1 or not length.split(", ")[0].isdecimal():
                raise malformed("a malformed Content-Length")
            self._take = _Length(int(length.split(", ")[0]), self)
        else:
            self._reusable = False
        self.status = status

    def read(self, until: float = float("inf")) -> bytes | None:
        """The next piece of the body, as much as has arrived; b"" at its end; None if `until` (monotonic) passed first.

        Raises UpstreamError for a limit that passed or a body that broke off, and whatever the watch raises.
        """
        while not self.finished:
            if self._rest:
                data, self._rest = self._rest, b""
            else:
                received = self._recv(until)
                if received is None:
                    return None
                if not received:
                    self._ended()
                    break
                data = received
            piece = self._take(data)
            if self._gunzip and piece:
                piece = self._gunzip.feed(piece)
            if piece:
                return piece
        return b""

    def read_all(self, until: float = float("inf")) -> bytes:
        """The rest of the body. Raises UpstreamError if it is larger than 64 MiB."""
        pieces, size = [], 0
        while piece := self.read(until):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_ANSWER:
                raise malformed("an answer of more than 64 MiB")
        return b"".join(pieces)

    def streaming(self) -> None:
        """From now on the limit between two chunks counts, no longer the one to the first byte."""
        self._limit = "stream_idle"
        self._idle = time.monotonic() + self._limits.idle_timeout

    def close(self) -> None:
        """Give the connection back, or close it if its answer was not read to the end. May be called again."""
        connection, self._connection = self._connection, None
        self._take = bytes
        if connection is not None:
            self._upstream.release(connection, reusable=self.finished and self._reusable and not self._rest, headers=self.headers)

    def end_of_body(self, rest: bytes) -> None:
        """The framing says that the body is complete; `rest` came after it (nothing of ours: the connection is spoilt)."""
        self.finished, self._rest = True, rest

    def _ended(self) -> None:
        if self._take is not bytes:
            raise lost("the provider's answer broke off")
        self.finished = True

    def _recv(self, until: float) -> bytes | None:
        while True:
            try:
                data: bytes = self._sock.recv(65536)
            except (TimeoutError, ssl.SSLWantReadError):
                if self._waited() >= until:
                    return None
                continue
            except OSError:
                raise lost("the connection to the provider was lost") from None
            now = time.monotonic()
            if now >= self._look or now >= self._total:
                self._waited()
            if self._limit == "stream_idle":
                self._idle = now + self._limits.idle_timeout
            return data

    def _waited(self) -> float:
        now = time.monotonic()
        self._look = now + SLICE
        self._watch.check()
        if now >= self._total:
            raise late("total", self._limits.total_timeout)
        if now >= self._idle:
            raise late(self._limit, self._limits.read_timeout if self._limit == "first_byte" else self._limits.idle_timeout)
        return now


class _Gunzip:
    """Unpacks a gzip body as it comes. What grows a hundredfold is no answer but a bomb."""

    def __init__(self) -> None:
        self._unpacker = zlib.decompressobj(wbits=31)
        self._packed = self._plain = 0

    def feed(self, data: bytes) -> bytes:
        self._packed += len(data)
        room = max(2**20, 100 * self._packed) - self._plain
        try:
            plain = self._unpacker.decompress(data, max(1, room))
        except zlib.error:
            raise malformed("a gzip body that is none") from None
        self._plain += len(plain)
        if self._unpacker.unconsumed_tail:
            raise malformed("a gzip body of a hundred times its size")
        return plain


class _Length:
    """A body of Content-Length bytes."""

    def __init__(self, length: int, reply: Reply) -> None:
        self._left, self._reply = length, reply
        if not length:
            reply.end_of_body(reply._rest)

    def __call__(self, data: bytes) -> bytes:
        piece, rest = data[: self._left], data[self._left :]
        self._left -= len(piece)
        if not self._left:
            self._reply.end_of_body(rest)
        return piece


class _Chunked:
    """A chunked body (RFC 9112, 7.1): what arrived together is passed on together."""

    def __init__(self, reply: Reply) -> None:
        self._reply = reply
        self._left = 0  # bytes of the current chunk still to come, its CRLF included
        self._line = b""
        self._trailer = False

    def __call__(self, data: bytes) -> bytes:
        out, at, end = [], 0, len(data)
        while at < end:
            if self._left > 2:
                piece = data[at : at + self._left - 2]
                out.append(piece)
                self._left -= len(piece)
                at += len(piece)
            elif self._left:
                if data[at : at + 1] != (b"\r" if self._left == 2 else b"\n"):
                    raise malformed("a malformed chunk")
                self._left -= 1
                at += 1
            else:
                newline = data.find(b"\n", at)
                if newline < 0:
                    self._line += data[at:]
                    if len(self._line) > 4096:
                        raise malformed("a malformed chunk")
                    break
                line, self._line = self._line + data[at:newline], b""
                at = newline + 1
                if self._head(line.rstrip(b"\r")):
                    self._reply.end_of_body(data[at:])
                    break
        return b"".join(out)

    def _head(self, line: bytes) -> bool:
        """Read a chunk's size line, or one of the trailer after the last; True at the very end."""
        if self._trailer:
            return not line
        size = line.partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9a-fA-F]{1,15}", size):
            raise malformed("a malformed chunk")
        self._left = int(size, 16)
        self._trailer = not self._left
        self._left += 2 * bool(self._left)
        return False


class _Idle(queue.LifoQueue[Any]):
    """The idle connections of a pool, the latest used on top (urllib3's `QueueCls`)."""

    def tidy(self, *, everything: bool = False) -> None:
        """Close those that are past their time or that the other side has closed; or all of them.

        Only what has been idle for a second is looked at, outside the lock and with one system call: under load each
        call lets another thread run first, and everybody would wait for the lock meanwhile.
        """
        now = time.monotonic()
        with self.mutex:
            idle = [(i, c) for i, c in enumerate(self.queue) if c is not None and c.sock is not None]
            idle = [(i, c) for i, c in idle if everything or now - getattr(c, "_idle_since", now) > 1.0]
            for i, _ in idle:
                self.queue[i] = None
        heard = _readable([c.sock for _, c in idle])
        for _, connection in idle:
            kept = not everything and connection.sock not in heard and now < connection._use_until
            if not kept or not self._put_back(connection):
                connection.close()

    def _put_back(self, connection: Any) -> bool:
        with self.mutex:
            if None not in self.queue:
                return False
            self.queue[self.queue.index(None)] = connection
            return True


def _readable(sockets: list[Any]) -> list[Any]:
    """Those that have something to say; of an idle connection that is its end, or an answer nobody asked for."""
    poller = select.poll()
    by_fd = {s.fileno(): s for s in sockets}
    for fd in by_fd:
        poller.register(fd, select.POLLIN | select.POLLHUP | select.POLLERR)
    return [by_fd[fd] for fd, _ in poller.poll(0)] if by_fd else []


def forwarded(request: Request, provider: Provider) -> dict[str, Any]:
    """The router's own fields that go on to a provider which is a router itself (`forward_metadata`): trace and session_id,
    whatever language it speaks and wherever the client wrote them."""
    told = {name: request.router.get(name) for name in ("trace", "session_id")} if provider.forward_metadata else {}
    return {name: value for name, value in told.items() if value}


class Upstream:
    """A provider as it runs: its connections, its key, its language. One per [[providers]] table, shared by all threads."""

    def __init__(self, provider: Provider, key: str | None = None, threads: int = 64) -> None:
        self.provider = provider
        self.key = key
        self.name = provider.name
        self.language = language(provider.format)
        self.vendor = provider.vendor_name
        self.address: str | None = None
        self.port: int | None = None
        if provider.base_url:
            self._connect_to(self.language.endpoint(provider.base_url), key, threads)

    def _connect_to(self, url: str, key: str | None, threads: int) -> None:
        import urllib3  # not needed where the embedded model is the only provider

        parts = urlsplit(url)
        self._scheme, self.address = parts.scheme, parts.hostname or ""
        self.port = parts.port or (443 if parts.scheme == "https" else 80)
        kind: Any = urllib3.HTTPSConnectionPool if parts.scheme == "https" else urllib3.HTTPConnectionPool
        tls = {"ssl_context": ssl.create_default_context()} if parts.scheme == "https" else {}
        self._pool = type("Pool", (kind,), {"QueueCls": _Idle})(self.address, self.port, maxsize=threads, **tls)
        self._path = parts.path.rstrip("/")
        standard = {
            "host": _authority(parts.hostname or "", parts.port),
            "accept-encoding": "identity",
            "content-type": "application/json",
        }
        credentials = self.language.credentials(key) if key else {}
        self._head = {**standard, **credentials, **{k.lower(): v for k, v in self.provider.headers.items()}}

    def send(self, call: Call, watch: Watch) -> Reply:
        """Connect and write the request; the answer's head is still to come (`Reply.head`).

        Raises UpstreamError if no connection can be had or made in time.
        """
        if hasattr(self.language, "serve"):
            reply: Reply = self.language.serve(call, watch, self.provider)
            return reply
        reply = Reply(self, self._connection(), watch)
        try:
            reply.send(self._request(call))
        except BaseException:
            reply.close()
            raise
        return reply

    def _request(self, call: Call) -> bytes:
        headers = {**self._head, **call.headers, "content-length": str(len(call.body))}
        lines = "".join(f"{k}: {v}\r\n" for k, v in headers.items())
        return f"{call.method} {self._path}{call.path} HTTP/1.1\r\n{lines}\r\n".encode("latin-1") + call.body

    def _connection(self) -> Any:
        """A connected urllib3 connection, fresh or idle for so short that its server surely still listens.

        `_get_conn`/`_put_conn` are urllib3's own pool operations: the public `urlopen` cannot be interrupted between
        request and answer, which is where a router spends its time.
        """
        from urllib3 import exceptions as errors

        connection = self._pool._get_conn()
        if connection.sock is not None:
            if time.monotonic() < getattr(connection, "_use_until", 0.0):
                return connection  # urllib3 has looked whether it is still connected
            connection.close()
        try:
            connection.timeout = self.provider.connect_timeout
            connection.connect()
        except (errors.HTTPError, OSError) as e:
            self._drop(connection)
            if isinstance(e, (errors.TimeoutError, TimeoutError)) and not isinstance(e, errors.NewConnectionError):
                raise late("connect", self.provider.connect_timeout) from None
            raise lost(f"cannot connect to the provider: {_reason(e)}", refused=True) from None
        connection.sock.settimeout(SLICE)
        return connection

    def _drop(self, connection: Any) -> None:
        connection.close()
        self._pool._put_conn(None)

    def release(self, connection: Any, *, reusable: bool, headers: Mapping[str, str]) -> None:
        """Take back a connection after its answer."""
        if not reusable:
            self._drop(connection)
            return
        told = re.search(r"timeout=(\d+)", headers.get("keep-alive", ""))
        connection._idle_since = time.monotonic()
        connection._use_until = connection._idle_since + (int(told[1]) - 1 if told else KEEP_IDLE[self._scheme])
        self._pool._put_conn(connection)

    def tidy(self) -> None:
        """Close the idle connections that are too old to be used or that the provider has closed."""
        if self.address:
            self._pool.pool.tidy()

    def retire(self) -> None:
        """Out of service: close the idle connections. Requests that began before may still use it."""
        if self.address:
            self._pool.pool.tidy(everything=True)

    def close(self) -> None:
        """Close the idle connections."""
        if self.address:
            self._pool.close()


def _authority(host: str, port: int | None) -> str:
    host = f"[{host}]" if ":" in host else host  # an IPv6 address
    return f"{host}:{port}" if port else host


def _reason(error: Exception) -> str:
    """Why a connection failed, in words that hold no address or key: errno's own text, or the kind of the error."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ssl.SSLCertVerificationError):
            return f"certificate verification failed: {seen.verify_message}"
        if isinstance(seen, OSError) and seen.strerror:
            return seen.strerror
        seen = seen.__cause__ or seen.__context__
    return type(error).__name__
