"""One finished record in, one OTLP/HTTP JSON document out, as OpenRouter's Broadcast would have sent it.

Pure: nothing here waits, reads a clock or keeps anything. What a record means as spans and attributes is here, how these are
written is `otlp`'s. With privacy on, content is never touched, so there is nothing to strip.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Final

from broadcast import otlp
from broadcast.otlp import Pairs, as_json, digest

Record = Mapping[str, Any]
SCOPE: Final = "openrouter"

MOST_METADATA: Final = 1_000  # keys of one `trace` object
INLINE_MEDIA: Final = 4_096  # OpenRouter strips multimodal parts; a thumbnail or a URL is worth keeping

NAMES: Final = ("trace_name", "span_name", "generation_name")
RESERVED: Final = ("trace_id", "parent_span_id", *NAMES)
HEX32, HEX16 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OUR_WORD = re.compile(r"[a-z][a-z0-9_.]{0,63}")
MODEL_NAME, FINISH_WORD = re.compile(r"[\w./:@+-]{1,128}", re.ASCII), re.compile(r"[A-Za-z][A-Za-z_-]{0,31}")
REASONING_LEVELS: Final = frozenset(("none", "minimal", "low", "medium", "high", "xhigh", "max"))
OUTPUT_TYPES: Final = {"json_schema": "json", "json_object": "json", "text": "text"}

# All that a private destination learns of a failure: an upstream's own words may quote the prompt.
# "The client has disconnected" and "Provider returned error" are OpenRouter's, so that its queries match.
SENTENCES: Final = {
    "client_disconnected": "The client has disconnected",
    "client_stalled": "The client stopped reading",
    "stream_idle_timeout": "The provider stopped in the middle of its answer",
    "overloaded": "The router had no free place for the request",
    "shutdown": "The router was shutting down",
    "cancelled": "The client has disconnected",
    "timeout": "The provider did not answer in time",
    "rejected": "The request was rejected",
    "error": "Provider returned error",
}
CONTENT_KEYS: Final = frozenset(
    (
        "trace.input", "span.input", "gen_ai.prompt", "trace.output", "span.output", "gen_ai.completion", "trace.tags",
        "gen_ai.input.messages", "gen_ai.output.messages", "gen_ai.system_instructions", "gen_ai.tool.definitions",
        "gen_ai.request.stop_sequences",
    )
)  # fmt: skip


def encode(record: Record, *, privacy: bool, service_name: str = "openrouter", service_version: str = "1.0.0") -> dict[str, Any]:
    """Give the OTLP/HTTP JSON document of one finished request; one `resourceSpans` entry per span, as OpenRouter does."""
    document: dict[str, Any] = json.loads(otlp.envelope([fragment(record, privacy, service_name, service_version)]))
    return document


def fragment(record: Record, privacy: bool, service_name: str, service_version: str) -> bytes:
    """The same document as it is written, but for its envelope: what is queued, so that a batch is a join."""
    about: Pairs = [("service.name", service_name), ("openrouter.trace.id", record["generation_id"])]
    about.append(("service.version", service_version))
    return otlp.entries(about, SCOPE, _spans(record, privacy, service_name)).encode()


def connection_test(service_name: str, now_ms: int) -> bytes:
    """OpenRouter's own test: one real span, because some gateways answer an empty request before they look at the key."""
    name, window = f"{service_name}-connection-test", (now_ms, now_ms + 1)
    span = otlp.span(f"{1:032x}", f"{1:016x}", None, name, otlp.INTERNAL, window, None, "[]")
    return otlp.envelope([otlp.entries([("service.name", service_name)], SCOPE, [span]).encode()])


def halves(line: bytes) -> list[bytes]:
    """A document of several records as two of half as many; one of a single record as it is."""
    records: dict[str, list[bytes]] = {}
    for entry in json.loads(line)["resourceSpans"]:
        about = {pair.get("key"): pair.get("value") for pair in entry["resource"]["attributes"]}
        records.setdefault(str(about.get("openrouter.trace.id")), []).append(json.dumps(entry, separators=(",", ":")).encode())
    parts, middle = [b",".join(spans) for spans in records.values()], len(records) // 2
    return [otlp.envelope(part) for part in (parts[:middle], parts[middle:]) if part]


def unfit(line: bytes, privacy: bool) -> str:
    """Why a document written earlier is not for such a destination (not_otlp, content), or nothing."""
    try:
        document = json.loads(line)
        spans = [span for entry in document["resourceSpans"] for scope in entry["scopeSpans"] for span in scope["spans"]]
        return "content" if privacy and any(map(_has_content, spans)) else ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "not_otlp"


def _has_content(span: Mapping[str, Any]) -> bool:
    keys = {pair.get("key") for pair in span.get("attributes", [])}
    return bool(keys & CONTENT_KEYS) or span["status"].get("message") not in (None, *SENTENCES.values())


def _spans(record: Record, privacy: bool, service_name: str) -> list[str]:
    """The optional spans above, the generation, then one child per attempt and one for the answer's body."""
    given, generation_id, whole = record.get("trace") or {}, record["generation_id"], _window(record)
    trace_id, parent, names = _trace_id(given.get("trace_id"), generation_id), _parent(given), _names(given)
    failure = _failure(record, privacy)
    made: list[str] = []

    def add(seed: str, name: str, kind: int, window: tuple[int, int], failed: str | None, pairs: Pairs, events: str = "") -> str:
        span_id = digest(seed)[:16]
        made.append(otlp.span(trace_id, span_id, parent, name, kind, window, failed, otlp.attributes(pairs), events))
        return span_id

    for key, suffix in (("trace_name", "trace"), ("span_name", "span")):
        if name := names[key]:
            seed = f"{generation_id}:{suffix}"
            parent = add(seed, name, otlp.INTERNAL, whole, failure, _child(record, seed, failure))
    pairs = _generation(record, privacy, failure, service_name) + _metadata(given, trace_id, names)
    said: Pairs = [("exception.type", "Error"), ("exception.message", failure)]
    events = otlp.event("exception", whole[1], said) if failure else ""
    parent = add(generation_id, names["generation_name"] or "LLM Generation", otlp.CLIENT, whole, failure, pairs, events)
    for seed, name, window, failed, pairs in _parts(record, privacy):
        add(seed, name, otlp.SERVER, window, failed, pairs)
    return made


def _window(record: Record) -> tuple[int, int]:
    start = int(record["ts_ms"])
    return start, start + round(_positive(record.get("duration_ms")))


def _trace_id(given: Any, generation_id: str) -> str:
    """32 hex digits whatever was given: a receiver refuses a whole batch for one bad id."""
    text = str(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else ""
    if not text.strip():
        return digest(generation_id)[:32]
    plain = text.strip().lower()
    plain = plain.replace("-", "") if UUID_FORM.fullmatch(plain) else plain
    return plain if HEX32.fullmatch(plain) and plain.strip("0") else digest(text)[:32]


def _parent(given: Mapping[str, Any]) -> str | None:
    wanted = given.get("parent_span_id")
    plain = wanted.strip().lower() if isinstance(wanted, str) else ""
    return plain if HEX16.fullmatch(plain) and plain.strip("0") else None


def _names(given: Mapping[str, Any]) -> dict[str, str | None]:
    wanted = {key: given.get(key) for key in NAMES}
    return {
        k: otlp.clean(name, otlp.LONGEST_NAME)[0] if isinstance(name, str) and name.strip() else None
        for k, name in wanted.items()
    }


def _metadata(given: Mapping[str, Any], trace_id: str, names: Mapping[str, Any]) -> Pairs:
    """The client's own keys; a reserved one too if what was sent is not what is shown."""
    shown = {"trace_id": trace_id, "parent_span_id": _parent(given), **names}
    kept = {key: value for key, value in given.items() if key not in RESERVED or value not in (None, shown[key])}
    pairs: Pairs = [("trace.metadata.truncated", True)] if len(kept) > MOST_METADATA else []
    taken = islice(kept.items(), MOST_METADATA)
    return pairs + [(f"trace.metadata.{key}", "null" if value is None else value) for key, value in taken]


def _failure(record: Record, privacy: bool) -> str | None:
    outcome = record.get("outcome") or "error"
    return None if outcome == "ok" else _told(outcome, record.get("error_type"), record.get("error"), privacy)


def _told(outcome: str, error_type: Any, error: Any, privacy: bool) -> str:
    fixed = SENTENCES.get(str(error_type)) or SENTENCES.get(outcome) or SENTENCES["error"]
    return fixed if privacy or outcome == "cancelled" or not error else str(error)


def _error_type(given: Any, otherwise: str) -> str:
    """Only a word of ours: an upstream's free text has no place in an attribute that also goes out in private."""
    return _shaped(OUR_WORD, given) or otherwise


def _generation(record: Record, privacy: bool, failure: str | None, service_name: str) -> Pairs:
    """Every attribute of the generation span that we know, in OpenRouter's words and in the current GenAI ones."""
    get, ok, vendor = record.get, failure is None, _vendor(record)
    answer, attempts, provider = get("response") or {}, get("attempts") or [], get("provider")
    model, native = answer.get("model"), answer.get("native_finish_reason") if ok else None
    if privacy:  # words of the provider's own, which may be anything
        model, native = _shaped(MODEL_NAME, model), _shaped(FINISH_WORD, native)
    responses = as_json([_provider_response(attempt) for attempt in attempts]) if attempts else None
    finish = answer.get("finish_reason") if ok else None
    return [
        ("trace.name", _names(get("trace") or {})["trace_name"] or "OpenRouter Request"),
        ("user.id", get("user")),
        ("session.id", get("session_id") or None),
        ("gen_ai.conversation.id", get("session_id") or None),
        ("trace.metadata.provider_responses", responses),
        ("span.type", "generation"),
        *_level(failure),
        ("span.metadata.provider_responses", responses),
        ("error.type", None if ok else _error_type(get("error_type"), str(get("outcome")))),
        ("router.outcome", get("outcome")),
        ("router.rule", get("rule")),
        ("router.usage_source", get("usage_source")),
        ("gen_ai.operation.name", get("operation") or "chat"),
        ("gen_ai.system", vendor),
        ("gen_ai.provider.name", vendor),
        ("gen_ai.request.model", get("requested_model")),
        ("gen_ai.response.model", model or get("sent_model")),
        ("gen_ai.response.id", record["generation_id"]),
        *_parameters(record),
        *_usage(record, ok),
        *([] if privacy else _content(record)),
        ("gen_ai.response.finish_reasons", as_json([finish]) if finish else None),
        ("gen_ai.response.finish_reason", finish),
        ("server.address", get("server_address")),
        ("server.port", get("server_port")),
        ("trace.metadata.openrouter.source", service_name),
        ("trace.metadata.openrouter.api_key_name", get("api_key_name")),
        *_timings(record, attempts),
        ("trace.metadata.openrouter.provider_name", provider),
        ("trace.metadata.openrouter.provider_slug", "-".join(provider.lower().split()) if provider else None),
        ("trace.metadata.openrouter.finish_reason", native),
    ]


def _shaped(shape: re.Pattern[str], given: Any) -> str | None:
    return given if isinstance(given, str) and shape.fullmatch(given) else None


def _level(failure: str | None) -> Pairs:
    return [("span.level", "ERROR" if failure else "DEFAULT"), ("span.status_message", failure)]


def _vendor(record: Record) -> str | None:
    """The model's author, as OpenRouter has it: the part before the slash; else who made what served it."""
    models = (str(record.get(key) or "").partition("/") for key in ("requested_model", "sent_model"))
    author = next((author for author, slash, _ in models if author and slash), None)
    return author or record.get("vendor") or record.get("provider_format") or record.get("provider")


def _provider_response(attempt: Mapping[str, Any]) -> dict[str, Any]:
    headers = attempt.get("headers_ms")
    latency = round(_positive(attempt.get("duration_ms") if headers is None else headers))
    about = {"id": attempt.get("request_id"), "provider_name": attempt.get("provider"), "status": attempt.get("status")}
    return about | {"latency": latency, "is_byok": False, "model_permaslug": attempt.get("model")}


def _parameters(record: Record) -> Pairs:
    request = record.get("request") or {}
    limits = (request.get(key) for key in ("max_tokens", "max_completion_tokens", "max_output_tokens"))
    reasoning, shape = request.get("reasoning"), request.get("response_format")
    level = request.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    doubles = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
    return [
        *((f"gen_ai.request.{key}", as_double(request.get(key))) for key in doubles),
        ("gen_ai.request.max_tokens", next((limit for limit in map(as_count, limits) if limit is not None), None)),
        *((f"gen_ai.request.{key}", as_count(request.get(key))) for key in ("top_k", "seed")),
        ("gen_ai.request.choice.count", as_count(request.get("n")) if request.get("n") != 1 else None),
        ("gen_ai.request.reasoning.level", level if isinstance(level, str) and level in REASONING_LEVELS else None),
        ("gen_ai.request.stream", True if record.get("stream") else None),
        ("gen_ai.output.type", OUTPUT_TYPES.get(str(shape.get("type"))) if isinstance(shape, dict) else None),
    ]


def _usage(record: Record, ok: bool) -> Pairs:
    """Tokens are always integers and money always a double: TraceQL never compares one with the other."""
    if record.get("operation") == "count_tokens":
        return []  # counted, not used: sums over requests stay true
    usage = (record.get("response") or {}).get("usage") or {}
    count = {key: as_count(value) for key, value in usage.items()} if record.get("usage_source") != "none" else {}
    read, written, thought = (count.get(f"{key}_tokens") for key in ("cached_input", "cache_write_input", "reasoning"))
    sent, made, cost = count.get("input_tokens"), count.get("output_tokens"), record.get("cost") or {}
    cost = {key: as_double(value) for key, value in cost.items()} if ok or cost.get("source") == "reported" else {}
    return [
        ("gen_ai.usage.input_tokens", sent),
        ("gen_ai.usage.output_tokens", made),
        ("gen_ai.usage.total_tokens", sent + made if sent is not None and made is not None else None),
        *((f"gen_ai.usage.{key}_cost", cost.get(key)) for key in ("input", "output", "total")),
        ("gen_ai.usage.input_tokens.cached", read),
        ("gen_ai.usage.input_tokens.cache_write", written),
        ("gen_ai.usage.output_tokens.reasoning", thought),
        ("gen_ai.usage.cache_read.input_tokens", read),
        ("gen_ai.usage.cache_creation.input_tokens", written),
        ("gen_ai.usage.cache_write.input_tokens", written),
        ("gen_ai.usage.reasoning.output_tokens", thought),
        *((f"trace.metadata.openrouter.{key}", cost.get(key)) for key in ("input_unit_price", "output_unit_price")),
    ]


def _timings(record: Record, attempts: Sequence[Mapping[str, Any]]) -> Pairs:
    """Milliseconds since the request's start: when the first provider was asked, and the attempt that answered (the last)."""
    served = attempts[-1] if attempts else {}
    start, headers, length = (as_double(served.get(key)) for key in ("start_ms", "headers_ms", "duration_ms"))
    first, prefix = as_double(record.get("ttft_ms")), "trace.metadata.openrouter."
    end = start + length if start is not None and length is not None else None
    made = as_count(((record.get("response") or {}).get("usage") or {}).get("output_tokens")) or 0
    return [
        (prefix + "router_latency_ms", as_double(attempts[0].get("start_ms") if attempts else record.get("overhead_ms"))),
        (prefix + "provider_request_ms", start),
        (prefix + "provider_headers_ms", start + headers if start is not None and headers is not None else None),
        (prefix + "first_token_ms", first),
        (prefix + "provider_body_end_ms", end),
        (prefix + "provider_time_to_first_token_ms", as_double(served.get("first_token_ms"))),
        (prefix + "inter_token_latency_ms", (end - first) / (made - 1) if end and first and made > 1 else None),
        ("gen_ai.response.time_to_first_chunk", first / 1000 if first is not None and record.get("stream") else None),
    ]


def _child(record: Record, seed: str, failure: str | None) -> Pairs:
    operation = record.get("operation") or "chat"
    return [("span.type", "span"), *_level(failure), ("gen_ai.operation.name", operation), ("gen_ai.response.id", seed)]


def _parts(record: Record, privacy: bool) -> Iterator[tuple[str, str, tuple[int, int], str | None, Pairs]]:
    """One child per attempt; the one that answered ends with its headers, and `generation` is the body after them."""
    start, end = _window(record)
    for index, attempt in enumerate(record.get("attempts") or []):
        begun = min(end, start + round(_positive(attempt.get("start_ms"))))
        over = min(end, begun + round(_positive(attempt.get("duration_ms"))))
        failed = _attempt_failure(attempt, privacy)
        answered = not failed and attempt.get("headers_ms") is not None
        turn = min(over, begun + round(_positive(attempt["headers_ms"]))) if answered else over
        seed = f"{record['generation_id']}:attempt-{index}"
        pairs = _child(record, seed, failed) + _attempt(attempt, index, failed)
        yield seed, f"provider attempt {index + 1}: {attempt.get('provider')}", (begun, turn), failed, pairs
        if answered:
            seed = f"{record['generation_id']}:generation"
            yield seed, "generation", (turn, over), None, _child(record, seed, None)


def _attempt_failure(attempt: Mapping[str, Any], privacy: bool) -> str | None:
    error, kind = attempt.get("error"), attempt.get("error_type")
    outcome = "cancelled" if kind == "client_disconnected" else "error"
    return _told(outcome, kind, error, privacy) if error or kind else None


def _attempt(attempt: Mapping[str, Any], index: int, failed: str | None) -> Pairs:
    timings = attempt.get("timings") or {}
    return [
        ("span.metadata.attempt_index", index),
        ("span.metadata.status_code", as_count(attempt.get("status"))),
        ("span.metadata.is_byok", False),
        ("span.metadata.model_permaslug", attempt.get("model")),
        ("error.type", _error_type(attempt.get("error_type"), "upstream_error") if failed else None),
        ("server.address", attempt.get("server_address")),
        ("server.port", attempt.get("server_port")),
        *((f"span.metadata.{key}", as_double(timings.get(key))) for key in ("load_ms", "prefill_ms", "decode_ms")),
        ("trace.metadata.openrouter.provider_name", attempt.get("provider")),
    ]


def _content(record: Record) -> Pairs:
    """Prompt and answer; only ever called for a destination that may have them."""
    system, messages = record.get("system"), [_slim(message) for message in record.get("messages") or []]
    prompt = as_json({"messages": [{"role": "system", "content": system}, *messages] if system else messages})
    answer, tools, request = record.get("response"), record.get("tools"), record.get("request") or {}
    completion = as_json(_completion(answer, tools, request)) if answer else None
    stop, tags = request.get("stop", request.get("stop_sequences")), record.get("tags")
    return [
        *((key, prompt) for key in ("trace.input", "span.input", "gen_ai.prompt")),
        *((key, completion) for key in ("trace.output", "span.output", "gen_ai.completion")),
        ("gen_ai.system_instructions", as_json([{"type": "text", "content": system}]) if system else None),
        ("gen_ai.input.messages", as_json([_message(message) for message in messages])),
        ("gen_ai.output.messages", as_json([_output_message(answer)]) if answer else None),
        ("gen_ai.tool.definitions", as_json(tools) if tools else None),
        ("gen_ai.request.stop_sequences", None if stop is None else as_json([stop] if isinstance(stop, str) else stop)),
        ("trace.tags", as_json(tags) if tags else None),
    ]


def _completion(answer: Mapping[str, Any], tools: Any, request: Any) -> dict[str, Any]:
    calls = [
        {"id": call.get("id"), "index": index, "type": "function", "function": {k: call.get(k) for k in ("name", "arguments")}}
        for index, call in enumerate(answer.get("tool_calls") or [])
    ]
    said = {"completion": answer.get("content"), "reasoning": answer.get("reasoning"), "toolCalls": calls}
    return said | ({"tools": tools} if tools else {}) | {"rawRequest": request}


def _slim(value: Any) -> Any:
    """A message without the bulk of its media: long strings go out of every block that is not text."""
    if isinstance(value, list):
        return [_slim(item) for item in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") == "tool_result" or "role" in value:
        return value | {"content": _slim(value.get("content"))}
    return value if value.get("type") in ("text", "tool_use", "thinking", "redacted_thinking") else _left_out(value)


def _left_out(value: Any) -> Any:
    if isinstance(value, str) and len(value) > INLINE_MEDIA:
        return f"[{len(value)} characters left out]"
    if isinstance(value, dict):
        return {key: _left_out(item) for key, item in value.items()}
    return [_left_out(item) for item in value] if isinstance(value, list) else value


def _image(block: dict[str, Any]) -> dict[str, Any]:
    inline = {"type": "blob", "modality": "image", "mime_type": block.get("media_type"), "content": block.get("data")}
    return {"type": "uri", "modality": "image", "uri": block["url"]} if "url" in block else inline


PARTS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "text": lambda b: {"type": "text", "content": b.get("text")},
    "thinking": lambda b: {"type": "reasoning", "content": b.get("thinking")},
    "tool_use": lambda b: {"type": "tool_call", "id": b.get("id"), "name": b.get("name"), "arguments": b.get("input")},
    "tool_result": lambda b: {"type": "tool_call_response", "id": b.get("tool_use_id"), "response": b.get("content")},
    "image": _image,
}


def blocks(record: Record) -> Iterator[dict[str, Any]]:
    """The content blocks of all messages."""
    return (b for m in record.get("messages") or [] for b in _blocks(m) if isinstance(b, dict))


def _blocks(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _message(message: Any) -> dict[str, Any]:
    parts = [PARTS.get(str(b.get("type")), dict)(b) if isinstance(b, dict) else b for b in _blocks(message)]
    return {"role": message.get("role") if isinstance(message, dict) else None, "parts": parts}


def _output_message(answer: Mapping[str, Any]) -> dict[str, Any]:
    said = (("reasoning", answer.get("reasoning")), ("text", answer.get("content")))
    parts: list[dict[str, Any]] = [{"type": kind, "content": text} for kind, text in said if text]
    for call in answer.get("tool_calls") or []:
        parts.append({"type": "tool_call", **{key: call.get(key) for key in ("id", "name", "arguments")}})
    return {"role": "assistant", "parts": parts, "finish_reason": answer.get("finish_reason")}


def as_count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def as_double(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _positive(value: Any) -> float:
    return max(0.0, min(as_double(value) or 0.0, 1e12))
