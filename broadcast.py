"""What users' destinations see: each finished request as a trace in OpenRouter's Broadcast format.

Strategy, in the order of this file:

* `encode` is pure: one finished record in, one OTLP/HTTP JSON document out. Nothing a client sends can make it fail or
  make it invalid; what does not fit is repaired and marked. With privacy on, content is never touched: nothing to strip.
* `Destination` is one place to send to. `TYPES` is the table of what each type needs and where it sends.
* `Store` is the SQLite file: destinations made on the page, and one queue per destination. Every count lives in the same
  transaction as the rows it counts, so `accepted = delivered + dropped + queued` holds across kill -9.
* `exchange` speaks HTTP once to an address that was checked, under one deadline, and judges the answer. It uses
  http.client on a socket of ours: there are no redirects, retries, proxies or netrc to turn off, and the address that
  was checked is by construction the address connected to.
* `Writer` (one thread) takes records from requests into the store; `Worker` (one thread per destination) takes them out.
* `Broadcast` ties it together and answers the settings API; `replay` sends what a `file` destination wrote.
"""

from __future__ import annotations

import base64
import contextlib
import email.utils
import hashlib
import http.client
import io
import ipaddress
import json
import logging
import math
import os
import random
import re
import socket
import sqlite3
import ssl
import stat
import subprocess
import sys
import threading
import time
import urllib.parse
import uuid
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["BadAddress", "Broadcast", "Destination", "Settings", "encode", "replay"]

log = logging.getLogger("broadcast")
Record = Mapping[str, Any]
Pairs = list[tuple[str, Any]]

# ------------------------------------------------------------------------------------------------------- the encoder

LONGEST_VALUE: Final = 10_000_000  # OpenRouter's own limit
LONGEST_KEY: Final = 256
LONGEST_NAME: Final = 1_024
MOST_METADATA: Final = 1_000  # keys of one `trace` object
INLINE_MEDIA: Final = 4_096  # OpenRouter strips multimodal parts; a thumbnail or a URL is worth keeping

INTERNAL, SERVER, CLIENT = 1, 2, 3
NANOS: Final = 1_000_000  # in a millisecond
NAMES: Final = ("trace_name", "span_name", "generation_name")
RESERVED: Final = ("trace_id", "parent_span_id", *NAMES)
HEX32, HEX16 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OUR_WORD = re.compile(r"[a-z][a-z0-9_.]{0,63}")
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
    about = {"service.name": service_name, "openrouter.trace.id": record["generation_id"], "service.version": service_version}
    return _document(list(about.items()), _spans(record, privacy, service_name))


def _document(about: Pairs, spans: Iterable[dict[str, Any]]) -> dict[str, Any]:
    resource, scope = {"attributes": _attributes(about)}, {"name": "openrouter"}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": scope, "spans": [span]}]} for span in spans]}


def to_bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def fragment(document: Mapping[str, Any]) -> bytes:
    """The entries without their envelope: what is queued, so that a batch is a join."""
    return to_bytes(document)[len(b'{"resourceSpans":[') : -len(b"]}")]


def envelope(fragments: Iterable[bytes]) -> bytes:
    return b'{"resourceSpans":[' + b",".join(fragments) + b"]}"


def _spans(record: Record, privacy: bool, service_name: str) -> list[dict[str, Any]]:
    """The optional spans above, the generation, then one child per attempt and one for the answer's body."""
    given, generation_id, whole = record.get("trace") or {}, record["generation_id"], _window(record)
    trace_id, parent, names = _trace_id(given.get("trace_id"), generation_id), _parent(given), _names(given)
    failure = _failure(record, privacy)
    made: list[dict[str, Any]] = []

    def add(seed: str, name: str, kind: int, window: tuple[int, int], failed: str | None, pairs: Pairs) -> dict[str, Any]:
        span: dict[str, Any] = {"traceId": trace_id, "spanId": _hash(seed)[:16]}
        span |= {"parentSpanId": parent} if parent else {}
        span |= {"name": _clean(name, LONGEST_NAME)[0], "kind": kind}
        span |= {"startTimeUnixNano": str(window[0] * NANOS), "endTimeUnixNano": str(window[1] * NANOS)}
        span |= {"status": {"code": 2, "message": _clean(failed)[0]} if failed else {"code": 1}}
        made.append(span | {"attributes": _attributes(pairs)})
        return made[-1]

    for key, suffix in (("trace_name", "trace"), ("span_name", "span")):
        if name := names[key]:
            seed = f"{generation_id}:{suffix}"
            parent = add(seed, name, INTERNAL, whole, failure, _child(record, seed, failure))["spanId"]
    pairs = _generation(record, privacy, failure, service_name) + _metadata(given, trace_id, names)
    root = add(generation_id, names["generation_name"] or "LLM Generation", CLIENT, whole, failure, pairs)
    if failure:
        said = _attributes([("exception.type", "Error"), ("exception.message", failure)])
        root["events"] = [{"timeUnixNano": root["endTimeUnixNano"], "name": "exception", "attributes": said}]
    parent = root["spanId"]
    for seed, name, window, failed, pairs in _parts(record, privacy):
        add(seed, name, SERVER, window, failed, pairs)
    return made


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _window(record: Record) -> tuple[int, int]:
    start = int(record["ts_ms"])
    return start, start + round(_positive(record.get("duration_ms")))


def _trace_id(given: Any, generation_id: str) -> str:
    """32 hex digits whatever was given: a receiver refuses a whole batch for one bad id."""
    text = str(given) if isinstance(given, str | int | float) and not isinstance(given, bool) else ""
    if not text.strip():
        return _hash(generation_id)[:32]
    plain = text.strip().lower()
    plain = plain.replace("-", "") if UUID_FORM.fullmatch(plain) else plain
    return plain if HEX32.fullmatch(plain) and plain.strip("0") else _hash(text)[:32]


def _parent(given: Mapping[str, Any]) -> str | None:
    wanted = given.get("parent_span_id")
    plain = wanted.strip().lower() if isinstance(wanted, str) else ""
    return plain if HEX16.fullmatch(plain) and plain.strip("0") else None


def _names(given: Mapping[str, Any]) -> dict[str, str | None]:
    wanted = {key: given.get(key) for key in NAMES}
    return {k: _clean(name, LONGEST_NAME)[0] if isinstance(name, str) and name.strip() else None for k, name in wanted.items()}


def _metadata(given: Mapping[str, Any], trace_id: str, names: Mapping[str, Any]) -> Pairs:
    """The client's own keys; a reserved one too if what was sent is not what is shown."""
    shown = {"trace_id": trace_id, "parent_span_id": _parent(given), **names}
    kept = {key: value for key, value in given.items() if key not in RESERVED or value != shown[key]}
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
    return given if isinstance(given, str) and OUR_WORD.fullmatch(given) else otherwise


def _generation(record: Record, privacy: bool, failure: str | None, service_name: str) -> Pairs:
    """Every attribute of the generation span that we know, in OpenRouter's words and in the current GenAI ones."""
    get, ok, vendor = record.get, failure is None, _vendor(record)
    answer, attempts, provider = get("response") or {}, get("attempts") or [], get("provider")
    responses = _json([_provider_response(attempt) for attempt in attempts]) if attempts else None
    finish = answer.get("finish_reason") if ok else None
    return [
        ("trace.name", _names(get("trace") or {})["trace_name"] or "OpenRouter Request"),
        ("user.id", get("user")),
        ("session.id", get("session_id")),
        ("gen_ai.conversation.id", get("session_id")),
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
        ("gen_ai.response.model", answer.get("model") or get("sent_model")),
        ("gen_ai.response.id", record["generation_id"]),
        *_parameters(record),
        *_usage(record, ok),
        *([] if privacy else _content(record)),
        ("gen_ai.response.finish_reasons", _json([finish]) if finish else None),
        ("gen_ai.response.finish_reason", finish),
        ("server.address", get("server_address")),
        ("server.port", get("server_port")),
        ("trace.metadata.openrouter.source", service_name),
        ("trace.metadata.openrouter.api_key_name", get("api_key_name")),
        *_timings(record, attempts[-1] if attempts else {}),
        ("trace.metadata.openrouter.provider_name", provider),
        ("trace.metadata.openrouter.provider_slug", "-".join(provider.lower().split()) if provider else None),
        ("trace.metadata.openrouter.finish_reason", answer.get("native_finish_reason") if ok else None),
    ]


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
        *((f"gen_ai.request.{key}", _double(request.get(key))) for key in doubles),
        ("gen_ai.request.max_tokens", next((limit for limit in map(_count, limits) if limit is not None), None)),
        *((f"gen_ai.request.{key}", _count(request.get(key))) for key in ("top_k", "seed")),
        ("gen_ai.request.choice.count", _count(request.get("n")) if request.get("n") != 1 else None),
        ("gen_ai.request.reasoning.level", level if isinstance(level, str) and level in REASONING_LEVELS else None),
        ("gen_ai.request.stream", True if record.get("stream") else None),
        ("gen_ai.output.type", OUTPUT_TYPES.get(str(shape.get("type"))) if isinstance(shape, dict) else None),
    ]


def _usage(record: Record, ok: bool) -> Pairs:
    """Tokens are always integers and money always a double: TraceQL never compares one with the other."""
    usage = (record.get("response") or {}).get("usage") or {}
    count = {key: _count(value) for key, value in usage.items()} if record.get("usage_source") != "none" else {}
    read, written, thought = (count.get(f"{key}_tokens") for key in ("cached_input", "cache_write_input", "reasoning"))
    sent, made, cost = count.get("input_tokens"), count.get("output_tokens"), record.get("cost") or {}
    cost = {key: _double(value) for key, value in cost.items()} if ok or cost.get("source") == "reported" else {}
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


def _timings(record: Record, served: Mapping[str, Any]) -> Pairs:
    """Milliseconds since the request's start, from the attempt that answered (the last one)."""
    start, headers, length = (_double(served.get(key)) for key in ("start_ms", "headers_ms", "duration_ms"))
    first, prefix = _double(record.get("ttft_ms")), "trace.metadata.openrouter."
    end = start + length if start is not None and length is not None else None
    made = _count(((record.get("response") or {}).get("usage") or {}).get("output_tokens")) or 0
    return [
        (prefix + "router_latency_ms", _double(record.get("overhead_ms"))),
        (prefix + "provider_request_ms", start),
        (prefix + "provider_headers_ms", start + headers if start is not None and headers is not None else None),
        (prefix + "first_token_ms", first),
        (prefix + "provider_body_end_ms", end),
        (prefix + "provider_time_to_first_token_ms", _double(served.get("first_token_ms"))),
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
        ("span.metadata.status_code", _count(attempt.get("status"))),
        ("span.metadata.is_byok", False),
        ("span.metadata.model_permaslug", attempt.get("model")),
        ("error.type", _error_type(attempt.get("error_type"), "upstream_error") if failed else None),
        ("server.address", attempt.get("server_address")),
        ("server.port", attempt.get("server_port")),
        *((f"span.metadata.{key}", _double(timings.get(key))) for key in ("load_ms", "prefill_ms", "decode_ms")),
        ("trace.metadata.openrouter.provider_name", attempt.get("provider")),
    ]


def _content(record: Record) -> Pairs:
    """Prompt and answer; only ever called for a destination that may have them."""
    system, messages = record.get("system"), [_slim(message) for message in record.get("messages") or []]
    prompt = _json({"messages": [{"role": "system", "content": system}, *messages] if system else messages})
    answer, tools, request = record.get("response"), record.get("tools"), record.get("request") or {}
    completion = _json(_completion(answer, tools, request)) if answer else None
    stop, tags = request.get("stop", request.get("stop_sequences")), record.get("tags")
    return [
        *((key, prompt) for key in ("trace.input", "span.input", "gen_ai.prompt")),
        *((key, completion) for key in ("trace.output", "span.output", "gen_ai.completion")),
        ("gen_ai.system_instructions", _json([{"type": "text", "content": system}]) if system else None),
        ("gen_ai.input.messages", _json([_message(message) for message in messages])),
        ("gen_ai.output.messages", _json([_output_message(answer)]) if answer else None),
        ("gen_ai.tool.definitions", _json(tools) if tools else None),
        ("gen_ai.request.stop_sequences", None if stop is None else _json([stop] if isinstance(stop, str) else stop)),
        ("trace.tags", _json(tags) if tags else None),
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


def _attributes(pairs: Pairs) -> list[dict[str, Any]]:
    """OTLP key-values: None left out, keys unique, lists and objects as JSON text, every change marked beside it."""
    made: dict[str, dict[str, Any]] = {}
    for wanted, given in pairs:
        if given is None:
            continue
        key = _key(wanted, made)
        if isinstance(given, bool | int | float):
            made[key] = _number(given)
            continue
        text, marks = _clean(given if isinstance(given, str) else _json(given))
        made[key] = {"stringValue": text}
        made |= {f"{key}.{mark}": {"boolValue": True} for mark in marks}
    return [{"key": key, "value": value} for key, value in made.items()]


def _number(value: bool | int | float) -> dict[str, Any]:
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": value} if -(2**63) <= value < 2**63 else {"stringValue": _digits(value)}
    return {"doubleValue": value} if math.isfinite(value) else {"stringValue": _not_finite(value)}


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        return hex(value)


def _key(wanted: str, taken: Mapping[str, Any]) -> str:
    """A key nobody has yet: cut, repaired or doubled ones end in a digest of what was sent."""
    key, marks = _clean(wanted, LONGEST_KEY)
    key = f"{key}~{_hash(wanted)[:8]}" if marks else key
    while key in taken:
        key = f"{key[:LONGEST_KEY]}~{_hash(key)[:8]}"
    return key


def _clean(text: str, most: int = LONGEST_VALUE) -> tuple[str, list[str]]:
    """Text that is valid UTF-8 without NUL (which databases behind a receiver refuse), and what was done to it."""
    text, marks = (text[:most], ["truncated"]) if len(text) > most else (text, [])
    if text.isascii() and "\0" not in text:
        return text, marks
    # Through UTF-16, so that two halves that belong together become the character they spell.
    repaired = text.replace("\0", "\ufffd").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return repaired, marks if repaired == text else [*marks, "repaired"]


def _json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (ValueError, TypeError, RecursionError):
        return json.dumps(_plain(value, 0), ensure_ascii=False, separators=(",", ":"))


def _plain(value: Any, depth: int) -> Any:
    """What JSON can say of anything."""
    if depth > 100:
        return "[deeper levels left out]"
    if isinstance(value, Mapping):
        return {str(key): _plain(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item, depth + 1) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else _not_finite(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _digits(value)
    return value if value is None or isinstance(value, str | int) else f"[{type(value).__name__}]"


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _double(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None


def _positive(value: Any) -> float:
    return max(0.0, min(_double(value) or 0.0, 1e12))


# ------------------------------------------------------------------ destinations: what each type needs, where it sends


class BadAddress(ValueError):
    """A URL we do not send to; in the settings API that is a failed test rather than a malformed request."""


class Target(NamedTuple):
    """Where one request goes."""

    scheme: str
    host: str
    port: int
    path: str
    method: str
    headers: dict[str, str]
    plain: bool  # a webhook's program seldom inflates gzip, and answers in its own words

    def __repr__(self) -> str:  # path and headers may hold secrets
        return f"Target({self.authority!r})"

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


PORTS: Final = {"http": 80, "https": 443}
NOT_YOURS: Final = frozenset(
    (
        "host", "content-length", "transfer-encoding", "connection", "content-type", "content-encoding", "expect", "te",
        "accept-encoding", "trailer", "upgrade", "keep-alive", "proxy-authorization", "proxy-connection", "user-agent",
    )
)  # fmt: skip
MOST_HEADERS: Final = 50
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
HEADER_VALUE = re.compile(r"[\x21-\x7e\xa0-\xff](?:[\x20-\x7e\xa0-\xff]{0,8190}[\x21-\x7e\xa0-\xff])?")
GRAFANA_HOME: Final = "https://otlp-gateway-prod-us-west-0.grafana.net"  # OpenRouter's default

# Where a request may not go, however the address is spelled: link-local (cloud metadata lives there) and the two
# metadata addresses outside of it.
REFUSED: Final = tuple(map(ipaddress.ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
CARRIES_V4: Final = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Own = Iterable[tuple[str, int]]  # where this router itself listens
Listening = Callable[[], Own]
Search = Callable[[str, str], bool]


def _doc(line: str) -> dict[str, str]:
    return {"doc": line}


@dataclass(frozen=True, repr=False)
class Destination:
    """One place to send to, from [[broadcast.destinations]] or from the page."""

    name: str = field(metadata=_doc("its name on the page and in /api/v1/stats"))
    type: str = field(metadata=_doc("otel-collector, grafana, axiom, jaeger, tempo, honeycomb, lightstep, webhook or file"))
    enabled: bool = field(default=True, metadata=_doc("false: takes nothing, keeps what is queued"))
    endpoint: str = field(default="", metadata=_doc("otel-collector: the URL as it is; axiom, honeycomb, lightstep: a region's"))
    headers: dict[str, Any] = field(default_factory=dict, metadata=_doc("further request headers, for authentication"))
    base_url: str = field(default="", metadata=_doc("grafana, jaeger, tempo: the gateway; /v1/traces is added"))
    instance_id: str | int = field(default="", metadata=_doc("grafana: the numeric id"))
    api_key: str = field(default="", metadata=_doc("grafana, honeycomb"))
    token: str = field(default="", metadata=_doc("axiom"))
    dataset: str = field(default="", metadata=_doc("axiom; honeycomb Classic"))
    tenant: str = field(default="", metadata=_doc("tempo (X-Scope-OrgID), jaeger (x-tenant)"))
    access_token: str = field(default="", metadata=_doc("lightstep"))
    url: str = field(default="", metadata=_doc("webhook"))
    method: str = field(default="POST", metadata=_doc("webhook: POST or PUT"))
    path: str = field(default="", metadata=_doc("file: one OTLP JSON request per line, mode 0600"))
    privacy_mode: bool = field(default=False, metadata=_doc("true: no prompt, answer or tool argument ever goes there"))
    sampling_rate: float = field(default=1.0, metadata=_doc("0.0001-1, of whole sessions"))
    api_keys: tuple[str, ...] = field(default=(), metadata=_doc("names of [[api_keys]] whose requests it takes; empty: all"))
    filter_rules: dict[str, Any] = field(
        default_factory=dict, metadata=_doc("{enabled, groups = [{logic, rules = [{field, operator, value}]}]}")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "instance_id", str(self.instance_id))
        if not self.name or len(self.name) > 128 or not self.name.isprintable():
            raise ValueError("name: 1 to 128 printable characters")
        if self.type not in TYPES:
            raise ValueError(f"type: {self.type!r} is not one of {', '.join(TYPES)}")
        if not 0.0001 <= self.sampling_rate <= 1:
            raise ValueError("sampling_rate: must lie between 0.0001 and 1")
        _check_fields(self)
        check_headers(self.headers)
        check_filters(self.filter_rules)
        if self.type != "file":
            target(self)

    def __repr__(self) -> str:  # most other fields may hold secrets
        return f"Destination({self.name!r}, {self.type!r})"


Place = tuple[str, dict[str, str]]  # URL and headers


class Kind(NamedTuple):
    """One destination type: its own fields, and the URL and headers they become."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    place: Callable[[Destination, str], Place]


def _home(url: str, scheme: str, ending: str, *strip: str) -> str:
    """Any of the forms people paste: with or without scheme, slash or part of the path."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"{scheme}://{url}")
    path = parts.path.rstrip("/")
    for tail in strip:
        path = path.removesuffix(tail).rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(path=path + ending))


def _region(given: str, home: str) -> str:
    """A region's endpoint as it is, unless it is only a host."""
    if "://" in given and urllib.parse.urlsplit(given).path.strip("/"):
        return given
    return _home(given, "https", "/v1/traces", "/v1/traces") if given else home


def _grafana(d: Destination, url: str) -> Place:
    joined = base64.b64encode(f"{str(d.instance_id).strip()}:{d.api_key.strip()}".encode()).decode()
    url = _home(url or GRAFANA_HOME, "https", "/otlp/v1/traces", "/v1/traces", "/otlp")
    return url, {"Authorization": f"Basic {joined}"}


def _axiom(d: Destination, url: str) -> Place:
    token = re.sub(r"(?i)^bearer\s+", "", d.token.strip())  # pasted with the word in front
    headers = {"Authorization": f"Bearer {token}", "X-Axiom-Dataset": d.dataset.strip()}
    return _region(url, "https://api.axiom.co/v1/traces"), headers


def _honeycomb(d: Destination, url: str) -> Place:
    dataset = {"x-honeycomb-dataset": d.dataset.strip()} if d.dataset else {}
    return _region(url, "https://api.honeycomb.io/v1/traces"), {"x-honeycomb-team": d.api_key.strip()} | dataset


def _lightstep(d: Destination, url: str) -> Place:
    return _region(url, "https://ingest.lightstep.com/v1/traces"), {"lightstep-access-token": d.access_token.strip()}


def _receiver(tenant_header: str) -> Callable[[Destination, str], Place]:
    def place(d: Destination, url: str) -> Place:
        return _home(url, "http", "/v1/traces", "/v1/traces"), {tenant_header: d.tenant.strip()} if d.tenant else {}

    return place


def _as_it_is(_: Destination, url: str) -> Place:
    return url, {}


TYPES: Final[dict[str, Kind]] = {
    "otel-collector": Kind(("endpoint",), ("headers",), _as_it_is),
    "grafana": Kind(("instance_id", "api_key"), ("base_url", "headers"), _grafana),
    "axiom": Kind(("token", "dataset"), ("endpoint", "headers"), _axiom),
    "jaeger": Kind(("base_url",), ("tenant", "headers"), _receiver("x-tenant")),
    "tempo": Kind(("base_url",), ("tenant", "headers"), _receiver("X-Scope-OrgID")),
    "honeycomb": Kind(("api_key",), ("dataset", "endpoint", "headers"), _honeycomb),
    "lightstep": Kind(("access_token",), ("endpoint", "headers"), _lightstep),
    "webhook": Kind(("url",), ("method", "headers"), _as_it_is),
    "file": Kind(("path",), (), _as_it_is),
}
SHARED: Final = ("name", "type", "enabled", "privacy_mode", "sampling_rate", "api_keys", "filter_rules")
OWN_FIELDS: Final = tuple(f.name for f in fields(Destination) if f.name not in SHARED)
URLS: Final = ("endpoint", "base_url", "url")


def _check_fields(d: Destination) -> None:
    """The type's own fields: those it needs, none of another's, and nothing a header cannot carry."""
    required, optional, _ = TYPES[d.type]
    for name in OWN_FIELDS:
        value = getattr(d, name)
        given = value not in ("", {}) and (name, value) != ("method", "POST")
        if given and name not in required + optional:
            raise ValueError(f"{name}: type {d.type} has no such field, only {', '.join(required + optional)}")
        if not given and name in required:
            raise ValueError(f"{name}: required for type {d.type}")
        in_a_header = name not in (*URLS, "headers", "method", "path")
        if given and in_a_header and not HEADER_VALUE.fullmatch(value.strip()):
            raise ValueError(f"{name}: holds a character that a header cannot carry; paste it again")
    if d.instance_id and not re.fullmatch(r"[0-9]{1,20}", str(d.instance_id).strip()):
        raise ValueError("instance_id: must be digits only; it is the number on the stack's page")
    if d.method not in ("POST", "PUT"):
        raise ValueError("method: must be POST or PUT")


def check_headers(headers: Mapping[str, Any]) -> None:
    """Raise ValueError for a header that we set ourselves, that is no header, or that comes twice."""
    if len(headers) > MOST_HEADERS:
        raise ValueError(f"headers: at most {MOST_HEADERS}")
    doubled = [name for name, n in Counter(map(str.lower, headers)).items() if n > 1]
    if doubled:
        raise ValueError(f"headers.{doubled[0]}: given twice in different spellings")
    for name, value in headers.items():
        if not HEADER_NAME.fullmatch(name):
            raise ValueError("headers: a name is empty, too long or holds a character that names cannot have")
        if name.lower() in NOT_YOURS and (name.lower(), value) != ("content-type", "application/json"):
            raise ValueError(f"headers.{name}: is set by the router itself; leave it out")
        if not isinstance(value, str) or not HEADER_VALUE.fullmatch(value.strip(" \t")):
            raise ValueError(f"headers.{name}: must be text without line breaks, control or non-latin-1 characters")


def target(d: Destination) -> Target:
    """Where `d` sends, by the type's table; raises ValueError, for a URL BadAddress."""
    kind = TYPES[d.type]
    key = next(name for name in URLS if name in kind.required + kind.optional)
    pasted = getattr(d, key).strip()
    if not pasted.isprintable() or " " in pasted or "\\" in pasted:
        raise BadAddress(f"{key}: the URL holds a space, a backslash or a control character")
    try:
        url, own = kind.place(d, pasted)
    except ValueError:
        raise BadAddress(f"{key}: that is not a URL") from None
    if doubled := {name.lower() for name in own} & {name.lower() for name in d.headers}:
        raise ValueError(f"headers.{min(doubled)}: type {d.type} sets it from its own fields")
    given = {name: value.strip(" \t") for name, value in d.headers.items() if name.lower() != "content-type"}
    return Target(*_split(url, key), d.method, given | own, d.type == "webhook")


def _split(url: str, key: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of a URL we would send to; raises BadAddress with the cure, in the name of `key`."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
        name = parts.hostname or ""
        host = name if name.isascii() else name.encode("idna").decode()
    except (ValueError, UnicodeError):
        raise BadAddress(f"{key}: that is not a URL") from None
    if parts.scheme not in PORTS or not host:
        raise BadAddress(f"{key}: must start with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise BadAddress(f"{key}: no user or password in the URL; put them into a header")
    if not port:
        raise BadAddress(f"{key}: port 0 cannot be connected to")
    if (address := literal(host)) and (why := refusal(address, port, ())):
        raise BadAddress(f"{key}: {why}")
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~-._?") for part in (parts.path or "/", parts.query))
    return parts.scheme, host, port, f"{path}?{query}" if query else path


def literal(host: str) -> Address | None:
    """The address that a host spells, in any form a resolver takes: dotted, integer, hex, octal, IPv6."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def refusal(address: Address, port: int, own: Own) -> str | None:
    """Why nothing is sent to this address, or None."""
    forms = list(_forms(address))
    if any(form.version == net.version and form in net for form in forms for net in REFUSED):
        return "link-local and cloud metadata addresses are refused"
    if any(port == used and _listens(host, form) for host, used in own for form in forms):
        return "that is this router's own address"
    return None


def _forms(address: Address) -> Iterator[Address]:
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        yield from (form for form in (address.ipv4_mapped, address.sixtofour) if form)
        yield from address.teredo or ()
        if any(address in net for net in CARRIES_V4):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _listens(host: str, address: Address) -> bool:
    """Does a server bound to `host` answer on `address`?"""
    bound = ipaddress.IPv4Address("127.0.0.1") if host == "localhost" else literal(host or "0.0.0.0")
    if bound is None or bound.is_unspecified:
        return _is_local(address)
    return address == bound or ((address.is_loopback or address.is_unspecified) and bound.is_loopback)


def _is_local(address: Address) -> bool:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


# -------------------------------------------------------------------------------- which records a destination takes

LONGEST_PATTERN: Final = 1_000
SEARCHED: Final = 4_096
TEXT_FIELDS: Final = ("model", "provider", "session_id", "user_id", "api_key_name", "finish_reason", "input", "output")
NUMBER_FIELDS: Final = ("total_cost", "total_tokens", "prompt_tokens", "completion_tokens")
ORDERS: Final[dict[str, Callable[[float, float], bool]]] = {
    "gt": lambda a, b: a > b,
    "lt": lambda a, b: a < b,
    "gte": lambda a, b: a >= b,
    "lte": lambda a, b: a <= b,
}
TEXT_TESTS: Final[dict[str, Callable[[str, str], bool]]] = {
    "equals": lambda have, want: have == want,
    "contains": lambda have, want: want in have,
    "starts_with": str.startswith,
    "ends_with": str.endswith,
}
OPERATORS: Final = (*TEXT_TESTS, *ORDERS, "not_equals", "not_contains", "regex", "exists", "not_exists")


def check_filters(rules: Mapping[str, Any]) -> None:
    """Raise ValueError with the place inside filter_rules."""
    _known(rules, ("enabled", "groups"), "filter_rules")
    if not isinstance(rules.get("enabled", True), bool):
        raise ValueError("filter_rules.enabled: must be true or false")
    for g, group in enumerate(_list(rules.get("groups", []), "filter_rules.groups")):
        place = f"filter_rules.groups[{g}]"
        _known(group, ("logic", "rules"), place)
        if group.get("logic", "and") not in ("and", "or"):
            raise ValueError(f"{place}.logic: must be and, or or")
        for r, rule in enumerate(_list(group.get("rules", []), f"{place}.rules")):
            _known(rule, ("field", "operator", "value"), f"{place}.rules[{r}]")
            _check_rule(rule, f"{place}.rules[{r}]")


def _check_rule(rule: Mapping[str, Any], place: str) -> None:
    operator, value = rule.get("operator"), rule.get("value")
    if rule.get("field") not in TEXT_FIELDS + NUMBER_FIELDS:
        raise ValueError(f"{place}.field: must be one of {', '.join(TEXT_FIELDS + NUMBER_FIELDS)}")
    if operator not in OPERATORS:
        raise ValueError(f"{place}.operator: must be one of {', '.join(OPERATORS)}")
    if operator in ("exists", "not_exists"):
        return
    if operator in ORDERS and _as_number(value) is None:
        raise ValueError(f"{place}.value: {operator} compares with a number")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)) > LONGEST_PATTERN:
        raise ValueError(f"{place}.value: must be text (at most {LONGEST_PATTERN} characters) or a number")
    try:
        re.compile(str(value) if operator == "regex" else "")
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"{place}.value: not a regular expression") from None


def _known(table: Any, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{place}: must be a table with {', '.join(keys)}")
    if unknown := sorted(str(key) for key in table if key not in keys):
        raise ValueError(f"{place}.{unknown[0]}: unknown key, only {', '.join(keys)}")


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > 100:
        raise ValueError(f"{place}: must be a list of at most 100")
    return value


def _as_number(value: Any) -> float | None:
    with contextlib.suppress(ValueError):
        return _double(float(value) if isinstance(value, str) else value)
    return None


def skip_reason(d: Destination, record: Record, search: Search) -> str | None:
    """Why this record is not for this destination; None: it takes it."""
    if d.api_keys and record.get("api_key_name") not in d.api_keys:
        return "api_key"
    # A session is in or out as a whole; the name is part of the seed, so that each destination draws for itself.
    seed = f"{d.name}:{record.get('session_id') or record['generation_id']}"
    if d.sampling_rate < 1 and int(_hash(seed)[:13], 16) >= d.sampling_rate * 16**13:
        return "sampling"
    groups = d.filter_rules.get("groups") if d.filter_rules.get("enabled", True) else None
    if not groups:
        return None
    values = _filtered(record)
    return None if any(_group(group, values, search) for group in groups) else "filter"


def _filtered(record: Record) -> dict[str, Any]:
    answer, cost = record.get("response") or {}, record.get("cost") or {}
    usage = answer.get("usage") or {}
    sent, made = _count(usage.get("input_tokens")), _count(usage.get("output_tokens"))
    texts = (b.get("text") for m in record.get("messages") or [] for b in _blocks(m) if isinstance(b, dict))
    values = {name: record.get(name) for name in ("provider", "session_id", "api_key_name")}
    values |= {"model": record.get("requested_model"), "user_id": record.get("user")}
    values |= {"input": "\n".join(text for text in (record.get("system"), *texts) if isinstance(text, str))}
    values |= {"finish_reason": answer.get("finish_reason"), "output": answer.get("content")}
    values |= {"total_cost": _double(cost.get("total")), "prompt_tokens": sent, "completion_tokens": made}
    return values | {"total_tokens": sent + made if sent is not None and made is not None else None}


def _group(group: Mapping[str, Any], values: Mapping[str, Any], search: Search) -> bool:
    every = all if group.get("logic", "and") == "and" else any
    return every(_rule(rule, values[rule["field"]], search) for rule in group.get("rules", []))


def _rule(rule: Mapping[str, Any], have: Any, search: Search) -> bool:
    operator, want = rule["operator"], rule.get("value")
    test = operator.removeprefix("not_")
    if have is None or have == "":
        return bool(operator != test)
    a, b = _as_number(have), _as_number(want)
    if test in ORDERS:
        return a is not None and b is not None and ORDERS[test](a, b)
    if test == "regex":
        return search(str(want), str(have)[:SEARCHED])
    if test == "exists":
        same = True
    elif test == "equals" and not isinstance(have, str):
        same = a == b
    else:
        same = TEXT_TESTS[test](str(have), str(want))
    return bool(same == (operator == test))


SEARCH_PROGRAM: Final = """
import json, re, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_DFL)
for line in sys.stdin:
    pattern, text = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, 0.25)
    found = re.search(pattern, text) is not None
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(int(found), flush=True)
"""


class Searcher:
    """Regular expressions of filter rules, searched in a child process that a timer of the kernel ends.

    A pattern that explodes on somebody's prompt holds the interpreter lock for minutes: in this process that would
    stop every request. The child starts with the first such rule and ends with its standard input.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def __call__(self, pattern: str, text: str) -> bool:
        with self._lock:
            try:
                answer = self._ask(json.dumps([pattern, text]))
            except OSError:
                answer = ""
            if not answer:
                self._end()
                warn("search", "a filter's regular expression took too long; the record was left out")
            return answer.strip() == "1"

    def _ask(self, line: str) -> str:
        if self._child is None:
            command, pipe = [sys.executable, "-I", "-S", "-c", SEARCH_PROGRAM], subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self._child.stdin and self._child.stdout
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline()

    def _end(self) -> None:
        if self._child:
            self._child.kill()
            with contextlib.suppress(OSError):
                self._child.communicate()
        self._child = None

    def close(self) -> None:
        with self._lock:
            self._end()


_warned: dict[str, float] = {}


def warn(key: str, message: str) -> None:
    """One line a minute for each kind of trouble; `message` never holds what a peer or a client wrote."""
    now = time.monotonic()
    if now - _warned.get(key, -60.0) >= 60:
        _warned[key] = now
        log.warning("broadcast: %s", message)


# ------------------------------------------------------------------------------------------ the store: one SQLite file

BATCH_ITEMS: Final = 64
BATCH_BYTES: Final = 1 << 20

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS destination (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS payload (id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL);
CREATE TABLE IF NOT EXISTS queue (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, destination TEXT NOT NULL, payload INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS queue_order ON queue (destination, seq);
CREATE INDEX IF NOT EXISTS queue_payload ON queue (payload);
CREATE TABLE IF NOT EXISTS ledger (
    destination TEXT NOT NULL, kind TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (destination, kind));
CREATE TABLE IF NOT EXISTS state (
    destination TEXT PRIMARY KEY, last_error TEXT, last_error_at TEXT, last_success TEXT);
"""
Offers = list[tuple[bytes, list[str]]]  # fragments, each with the destinations that take it
Counts = Mapping[tuple[str, str], int]  # (destination, kind) -> n


class Queued(NamedTuple):
    seq: int
    payload: int
    bytes: int


class Store:
    """Destinations and queues. Every method is one transaction; none waits for a network.

    Kinds in the ledger: accepted, delivered, dropped:<reason>, queued, queued_bytes, and skipped:<reason> for records a
    destination was never to have (sampled out, filtered, another key's). A body is stored once for all its queues.
    """

    def __init__(self, path: str, max_items: int, max_bytes: int) -> None:
        self._limits = max_items, max_bytes
        self._lock = threading.RLock()
        _private_file(Path(path))
        self._db = sqlite3.connect(path, timeout=2, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "journal_size_limit=16777216"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _synced(self) -> Iterator[sqlite3.Connection]:
        """A transaction that also outlives a power cut, for settings; the queue, written far more often, a kill -9."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                with self._transaction() as db:
                    yield db
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def limit(self, max_items: int, max_bytes: int) -> None:
        with self._lock:
            self._limits = max_items, max_bytes

    def close(self) -> None:
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    # -- the queue

    def accept(self, offers: Offers, counts: Counts) -> None:
        """Put each fragment into the queues of its destinations, and count; the oldest make room for the newest."""
        added: Counter[str] = Counter()
        size: Counter[str] = Counter()
        with self._transaction() as db:
            for body, destinations in offers:
                payload = db.execute("INSERT INTO payload (body) VALUES (?)", (body,)).lastrowid
                rows = [(destination, payload, len(body)) for destination in destinations]
                db.executemany("INSERT INTO queue (destination, payload, bytes) VALUES (?, ?, ?)", rows)
                added.update(destinations)
                size.update(dict.fromkeys(destinations, len(body)))
            for destination, n in added.items():
                self._count(db, destination, accepted=n, queued=n, queued_bytes=size[destination])
                self._trim(db, destination)
            for (destination, kind), n in counts.items():
                self._count(db, destination, **{kind: n})

    def _count(self, db: sqlite3.Connection, destination: str, **kinds: int) -> None:
        upsert = "INSERT INTO ledger VALUES (?, ?, ?) ON CONFLICT (destination, kind) DO UPDATE SET n = n + excluded.n"
        db.executemany(upsert, [(destination, kind, n) for kind, n in kinds.items() if n])

    def _trim(self, db: sqlite3.Connection, destination: str) -> None:
        counts = dict(db.execute("SELECT kind, n FROM ledger WHERE destination = ?", (destination,)))
        items, size = counts.get("queued", 0) - self._limits[0], counts.get("queued_bytes", 0) - self._limits[1]
        gone: list[Queued] = []
        if items > 0 or size > 0:
            for row in self._rows(destination):
                if items <= 0 and size <= 0:
                    break
                gone.append(row)
                items, size = items - 1, size - row.bytes
            self._remove(db, destination, gone)
            self._count(db, destination, **{"dropped:queue_full": len(gone)})

    def _rows(self, destination: str, until: int = 2**62) -> Iterator[Queued]:
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ? AND seq <= ? ORDER BY seq"
        return map(Queued._make, self._db.execute(select, (destination, until)))

    def _remove(self, db: sqlite3.Connection, destination: str, rows: list[Queued]) -> None:
        db.executemany("DELETE FROM queue WHERE seq = ?", [(row.seq,) for row in rows])
        unused = "DELETE FROM payload WHERE id = ? AND NOT EXISTS (SELECT 1 FROM queue WHERE payload = ?)"
        db.executemany(unused, [(row.payload, row.payload) for row in rows])
        self._count(db, destination, queued=-len(rows), queued_bytes=-sum(row.bytes for row in rows))

    def batch(self, destination: str, most: int, until: int) -> list[tuple[int, bytes]]:
        """The head of the queue, not beyond `until`: at most `most` records and BATCH_BYTES, but always one."""
        rows: list[Queued] = []
        size = 0
        with self._lock:
            for row in islice(self._rows(destination, until), most):
                size += row.bytes + 1
                if rows and size > BATCH_BYTES:
                    break
                rows.append(row)
            select = "SELECT body FROM payload WHERE id = ?"
            return [(row.seq, self._db.execute(select, (row.payload,)).fetchone()[0]) for row in rows]

    def settle(self, destination: str, batch: list[int], answer: Answer, dropped: str = "") -> None:
        """End the life of a batch: delivered but for what was rejected, or dropped with that reason."""
        with self._transaction() as db:
            rows = list(self._rows(destination, batch[-1]))
            if not db.execute("SELECT 1 FROM ledger WHERE destination = ? LIMIT 1", (destination,)).fetchone():
                return  # deleted meanwhile
            self._remove(db, destination, rows)
            if dropped:
                self._count(db, destination, **{f"dropped:{dropped}": len(rows)})
            else:
                # What made room for newer ones while it was on the wire has arrived after all.
                arrived, lost = {"dropped:queue_full": len(rows) - len(batch)}, min(answer.rejected, len(batch))
                self._count(db, destination, **arrived, **{"delivered": len(batch) - lost, "dropped:rejected": lost})
            self._note(db, destination, answer.error, success=not dropped)

    def note(self, destination: str, error: str) -> None:
        with self._transaction() as db:
            self._note(db, destination, error, success=False)

    def _note(self, db: sqlite3.Connection, destination: str, error: str, *, success: bool) -> None:
        db.execute("INSERT OR IGNORE INTO state (destination) VALUES (?)", (destination,))
        if error:
            update = "UPDATE state SET last_error = ?, last_error_at = ? WHERE destination = ?"
            db.execute(update, (error, _now(), destination))
        if success:
            db.execute("UPDATE state SET last_success = ? WHERE destination = ?", (_now(), destination))

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Per destination its counts, and under `state` (last_error, last_error_at, last_success)."""
        made: dict[str, dict[str, Any]] = {}
        with self._lock:
            for destination, kind, n in self._db.execute("SELECT destination, kind, n FROM ledger"):
                made.setdefault(destination, {})[kind] = n
            for destination, *state in self._db.execute("SELECT * FROM state"):
                made.setdefault(destination, {})["state"] = state
        return made

    def keep_only(self, known: Iterable[str]) -> int:
        """Forget the queues and counts of destinations that are no more; gives how many records were still queued."""
        with self._transaction() as db:
            unknown = {row[0] for row in db.execute("SELECT DISTINCT destination FROM ledger")} - set(known)
            return sum(self._forget(db, destination) for destination in unknown)

    def _forget(self, db: sqlite3.Connection, destination: str) -> int:
        rows = list(self._rows(destination))
        self._remove(db, destination, rows)
        db.execute("DELETE FROM ledger WHERE destination = ?", (destination,))
        db.execute("DELETE FROM state WHERE destination = ?", (destination,))
        return len(rows)

    # -- what the page saves

    def saved(self) -> list[tuple[str, dict[str, Any], str, str]]:
        with self._lock:
            rows = self._db.execute("SELECT id, body, created_at, updated_at FROM destination ORDER BY created_at, id")
            return [(row[0], json.loads(row[1]), row[2], row[3]) for row in rows]

    def save(self, identity: str, name: str, body: dict[str, Any]) -> None:
        """Insert or replace a destination, on disk when this returns; raises sqlite3.IntegrityError for a taken name."""
        upsert = """INSERT INTO destination VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
                    SET name = excluded.name, body = excluded.body, updated_at = excluded.updated_at"""
        with self._synced() as db:
            db.execute(upsert, (identity, name, json.dumps(body), _now(), _now()))

    def delete(self, identity: str) -> None:
        with self._synced() as db:
            db.execute("DELETE FROM destination WHERE id = ?", (identity,))
            self._forget(db, identity)

    def switch(self) -> dict[str, bool] | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = 'enabled'").fetchone()
            return json.loads(row[0]) if row else None

    def set_switch(self, enabled: bool, in_file: bool) -> None:
        value = json.dumps({"enabled": enabled, "in_file": in_file})
        with self._synced() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('enabled', ?)", (value,))


def _private_file(path: Path) -> None:
    """Make the file and what is missing above it for us alone, before anything is in it."""
    for folder in reversed([folder for folder in path.absolute().parents if not folder.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)  # SQLite gives its -wal and -shm the same
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------- one delivery: a checked address, one deadline, and what the answer means

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
        return {"http": f"http_{self.status}", "redirect": f"http_{self.status}", "address": "refused_address"}.get(
            self.cause, self.cause
        )


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


# -------------------------------------------------------------------------------------------------------- the test


def connection_test(service_name: str) -> bytes:
    """OpenRouter's own test: one real span, because some gateways answer an empty request before they look at the key."""
    now = int(time.time() * 1000) * NANOS
    span = {"traceId": f"{1:032x}", "spanId": f"{1:016x}", "name": f"{service_name}-connection-test", "kind": INTERNAL}
    span |= {"startTimeUnixNano": str(now), "endTimeUnixNano": str(now + NANOS), "status": {"code": 1}, "attributes": []}
    return to_bytes(_document([("service.name", service_name)], [span]))


def try_out(d: Destination, settings: Settings, own: Own) -> dict[str, Any]:
    """Send the test span to exactly this destination: {ok, status, latency_ms, message, advice}."""
    begun = time.monotonic()
    if d.type == "file":
        answer = append(d.path, b"")
    else:
        to = target(d)
        to = to._replace(headers=to.headers | {"X-Test-Connection": "true"}) if to.plain else to
        answer = exchange(to, connection_test(settings.service_name), min(settings.timeout, LONGEST_TEST), own)
    latency = round((time.monotonic() - begun) * 1000)
    return _result(answer, latency, "" if answer.cause == "ok" else advise(d, answer))


def _result(answer: Answer, latency: int, advice: str) -> dict[str, Any]:
    ok = answer.cause == "ok"
    return {"ok": ok, "status": answer.status, "latency_ms": latency, "message": answer.message, "advice": advice}


LONGEST_TEST: Final = 15.0
BAD_URL: Final = "Use the http:// or https:// address that takes OTLP over HTTP, usually ending in /v1/traces."
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


# ------------------------------------------------------------------------- the threads: one writer, one worker for each

BACKOFF_FIRST = 1.0
BACKOFF_MOST = 30.0
GROUP_ITEMS, GROUP_WEIGHT = 256, 4 << 20  # of one commit
INBOX_ITEMS, INBOX_WEIGHT = 10_000, 64 << 20  # in memory, while the disk does not answer


def end(workers: list[Worker], deadline: float) -> None:
    """Let them deliver until then, cut those that still wait, and do not wait for one that hangs all the same."""
    for worker in workers:
        worker.leave()
    for worker in workers:
        worker.join(deadline)
    for worker in workers:
        worker.cut()
    grace = time.monotonic() + 0.5
    for worker in workers:
        worker.join(grace)


class Entry(NamedTuple):
    """A destination as it is known here."""

    id: str
    destination: Destination
    source: str  # page | file
    created_at: str | None
    updated_at: str | None


def weight(record: Record) -> int:
    """About how many bytes a record holds, without walking all of it."""
    blocks = (b for m in record.get("messages") or [] for b in _blocks(m) if isinstance(b, dict))
    inside = sum(len(value) for block in blocks for value in block.values() if isinstance(value, str))
    return 4_096 + inside + len((record.get("response") or {}).get("content") or "") + len(record.get("system") or "")


class Writer:
    """Takes records from request threads and commits them, a group at a time. Its thread is the one that encodes."""

    def __init__(self, owner: Broadcast) -> None:
        self._owner = owner
        self._inbox: deque[tuple[Record, int]] = deque()
        self._weight = self._lost = 0
        self._lock = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="broadcast-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Called in the request's thread: an append."""
        try:
            heavy = weight(record)
        except (TypeError, AttributeError):  # an odd record is dealt with, and counted, where it is encoded
            heavy = 0
        with self._lock:
            self._inbox.append((record, heavy))
            self._weight += heavy
            if len(self._inbox) > INBOX_ITEMS or (self._weight > INBOX_WEIGHT and len(self._inbox) > 1):
                self._weight -= self._inbox.popleft()[1]
                self._lost += 1
        self._wake.set()

    def _take(self) -> tuple[list[Record], int]:
        group: list[Record] = []
        heavy = 0
        with self._lock:
            while self._inbox and len(group) < GROUP_ITEMS and heavy < GROUP_WEIGHT:
                record, one = self._inbox.popleft()
                group.append(record)
                heavy += one
            self._weight -= heavy
            lost, self._lost = self._lost, 0
        return group, lost

    def _run(self) -> None:
        while not (self._stop.is_set() and not self._inbox):
            self._wake.wait()
            self._wake.clear()
            while (taken := self._take()) != ([], 0):
                self._commit(*self._owner.offers(*taken))

    def _commit(self, offers: Offers, counts: Counts) -> None:
        pause = 0.1
        while True:
            try:
                self._owner.store.accept(offers, counts)
                break
            except sqlite3.Error as error:
                warn("store", f"the queue cannot be written ({type(error).__name__}); trying again")
                if self._stop.wait(pause):
                    log.error("broadcast: %d records were not written to the queue", len(offers))
                    return
                pause = min(2.0, pause * 2)
        self._owner.wake({destination for _, destinations in offers for destination in destinations})

    def stop(self, timeout: float) -> None:
        """Commit what was handed over, then end."""
        self._stop.set()
        self._wake.set()
        self._thread.join(max(0.0, timeout))


class Worker:
    """Takes records out of one destination's queue and delivers them, in order, one request at a time."""

    def __init__(self, owner: Broadcast, entry: Entry) -> None:
        self._owner, self.entry = owner, entry
        self._wake, self._nudge = threading.Event(), threading.Event()
        self._stop = self._leave = False
        self._most, self._tries = BATCH_ITEMS, 0
        self._since, self._until = 0.0, 0  # the batch that is tried again: since when, and its last record
        self._wire: Wire | None = None
        self._thread = threading.Thread(target=self._run, name=f"broadcast-{entry.id[:12]}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def change(self, entry: Entry) -> None:
        """Go on with other settings, at once if it was waiting for the old ones to work."""
        self.entry = entry
        self._nudge.set()

    def leave(self) -> None:
        """End when the queue is empty or the destination does not answer."""
        self._leave = True
        self._nudge.set()
        self._wake.set()

    def cut(self) -> None:
        """End now; what is on the wire stays queued and may arrive twice, under the same ids."""
        self._stop = True
        self.leave()
        if wire := self._wire:
            wire.cut()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while not self._stop:
            self._wake.clear()
            try:
                if self._step():
                    continue
                if self._leave:
                    return
                self._wake.wait()
            except sqlite3.Error as error:
                warn("store", f"the queue cannot be read or written ({type(error).__name__}); trying again")
                self._pause(1.0)
            except Exception as error:  # noqa: BLE001 - a thread that ends would keep its queue for ever
                log.error("broadcast: delivery to %r failed: %s", self.entry.destination.name, type(error).__name__)
                self._pause(BACKOFF_MOST)

    def _step(self) -> bool:
        """Deliver one batch; false: there is none, or leaving and no answer."""
        entry, store = self.entry, self._owner.store
        batch = store.batch(entry.id, self._most, self._until or 2**62)
        if not batch:
            emptied, self._until, self._tries = bool(self._until), 0, 0  # what was tried again made room for newer ones
            return emptied
        answer, sent = self._send(entry.destination, envelope(body for _, body in batch)), [seq for seq, _ in batch]
        if answer.status == 413 and len(batch) > 1:
            self._most = len(batch) // 2
        elif answer.retry:
            self._again(entry, sent, answer)
            return not self._leave
        else:
            self._settle(entry, sent, answer, "" if answer.cause in ("ok", "rejected") else answer.reason)
        return True

    def _send(self, d: Destination, body: bytes) -> Answer:
        try:
            return send(d, body, self._owner.settings.timeout, self._owner.listening(), self._opened)
        finally:
            self._wire = None

    def _opened(self, wire: Wire) -> None:
        self._wire = wire
        if self._stop:
            wire.cut()

    def _settle(self, entry: Entry, batch: list[int], answer: Answer, dropped: str) -> None:
        if answer.cause != "ok":
            warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}")
        while not self._stop:  # what arrived is not sent again because the disk is full
            try:
                self._owner.store.settle(entry.id, batch, answer, dropped)
                break
            except sqlite3.Error:
                warn("store", "what was delivered cannot be written down; trying again")
                self._pause(0.5)
        self._until = self._tries = 0
        self._most = min(BATCH_ITEMS, self._most * 2)

    def _again(self, entry: Entry, batch: list[int], answer: Answer) -> None:
        """Back off as the OTLP specification says, until max_elapsed has passed for this batch."""
        now, store = time.monotonic(), self._owner.store
        if not self._tries:
            self._since, self._until = now, batch[-1]
        left = self._since + self._owner.settings.max_elapsed - now
        pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self._tries, 16)) * random.uniform(0.5, 1.5)
        pause = max(pause, answer.retry_after)
        self._tries += 1
        if left > 0:
            store.note(entry.id, answer.message)
            warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}; trying again")
            if self._leave or self._pause(min(pause, left)) or pause <= left:
                return
        self._settle(entry, batch, answer, "max_elapsed")

    def _pause(self, seconds: float) -> bool:
        """Wait; true if something changed that is worth another try at once."""
        changed = self._nudge.wait(seconds)
        self._nudge.clear()
        return changed


# --------------------------------------------------------------------------------------------- settings, and the whole

MOST_DESTINATIONS: Final = 64
TESTS_AT_ONCE: Final = 4
TESTS_A_MINUTE: Final = 60
SECRETS: Final = ("api_key", "token", "access_token")
OPEN_HEADERS: Final = frozenset(("x-axiom-dataset", "x-honeycomb-dataset", "x-scope-orgid", "x-tenant", "content-type"))
MARK: Final = "…"
EDITABLE: Final = ("name", "type", "enabled", "config", "privacy_mode", "sampling_rate", "api_keys", "filter_rules")
SHOWN_ONLY: Final = ("id", "source", "created_at", "updated_at")  # taken and ignored: what was read can be sent back
Reply = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """The [broadcast] table."""

    enabled: bool = field(default=False, metadata=_doc("the Enable Broadcast switch; the page can change it"))
    service_name: str = field(default="openrouter", metadata=_doc("service.name; the default fits OpenRouter's queries"))
    service_version: str = field(default="1.0.0", metadata=_doc("service.version"))
    database: str = field(default="state/broadcast.db", metadata=_doc("SQLite file: the page's destinations, and the queues"))
    queue_max_items: int = field(default=10_000, metadata=_doc("per destination; overflow drops the oldest, counted"))
    queue_max_bytes: int = field(default=67_108_864, metadata=_doc("per destination; overflow drops the oldest, counted"))
    timeout: float = field(default=10.0, metadata=_doc("seconds for one delivery"))
    max_elapsed: float = field(default=3600.0, metadata=_doc("seconds for all tries of one batch"))
    test_required: bool = field(default=True, metadata=_doc("a destination is saved only if its test passes"))
    destinations: tuple[Destination, ...] = field(default=(), metadata=_doc("[[broadcast.destinations]]; read-only on the page"))

    def __post_init__(self) -> None:
        limits = {"queue_max_items": (1, 10**9), "queue_max_bytes": (1_024, 2**40)}
        for key, (least, most) in (limits | {"timeout": (0.01, 600), "max_elapsed": (0, 2_592_000)}).items():
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key}: must lie between {least} and {most}")
        for key in ("service_name", "service_version", "database"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key}: must not be empty")
        names = Counter(d.name for d in self.destinations)
        if doubled := [name for name, n in names.items() if n > 1]:
            raise ValueError(f"destinations: the name {doubled[0]!r} is used twice")


class Unusable(ValueError):
    """The database cannot be opened."""


class ApiError(Exception):
    """An answer of the settings API that is not a success."""

    def __init__(self, status: int, message: str, param: str | None = None, /, **more: Any) -> None:
        super().__init__(message)
        kinds = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
        error = {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": None}
        self.reply: Reply = status, {"error": error, **more}


class Broadcast:
    """All of it: a sink for records, the threads behind it, the counters and the settings API.

    `start=False` is for commands beside a running router (doctor, replay): it reads, tests and answers, but starts no
    thread and makes no file. Raises ValueError if the database cannot be used.
    """

    def __init__(self, settings: Settings, *, listening: Listening = set, start: bool = True) -> None:
        self.settings, self.listening = settings, listening
        self._lock = threading.RLock()
        self._store: Store | None = None
        self._writer: Writer | None = None
        self._workers: dict[str, Worker] = {}
        self._takers: tuple[Entry, ...] = ()
        self._latest: Record | None = None
        self._given: dict[str, Record] = {}
        self._search = Searcher()
        self._testing = threading.BoundedSemaphore(TESTS_AT_ONCE)
        self._tested: deque[float] = deque(maxlen=TESTS_A_MINUTE)
        self._started = start
        if Path(settings.database).exists() or (start and settings.enabled and settings.destinations):
            self._open()
        self._refresh()

    # -- records

    def sink(self, event: Record) -> None:
        """Take a finished request's record; any other event is ignored. Never waits, never raises."""
        if event.get("type") == "complete":
            self._latest = event
            if writer := self._writer:
                writer.put(event)

    def offers(self, group: list[Record], lost: int) -> tuple[Offers, Counts]:
        """What each record means for each destination: a fragment per kind of privacy, and counts of the rest."""
        counts: Counter[tuple[str, str]] = Counter()
        offers: Offers = []
        takers = self._takers
        for entry in takers if lost else ():
            counts[entry.id, "accepted"] = counts[entry.id, "dropped:queue_full"] = lost
        for record in group:
            for privacy in (False, True):
                wanted = [entry for entry in takers if entry.destination.privacy_mode == privacy]
                body, taken, reason = self._offer(record, wanted, privacy, counts)
                if reason:
                    counts.update({(identity, kind): 1 for identity in taken for kind in ("accepted", f"dropped:{reason}")})
                elif taken:
                    offers.append((body, taken))
        return offers, counts

    def _offer(
        self, record: Record, wanted: list[Entry], privacy: bool, counts: Counter[tuple[str, str]]
    ) -> tuple[bytes, list[str], str]:
        """The fragment, who takes it, and why nobody can have it."""
        try:
            skipped = {entry.id: skip_reason(entry.destination, record, self._search) for entry in wanted}
            counts.update((identity, f"skipped:{reason}") for identity, reason in skipped.items() if reason)
            taken = [identity for identity, reason in skipped.items() if not reason]
            self._given.update(dict.fromkeys(taken, record))
            body = fragment(self._encode(record, privacy)) if taken else b""
            return body, taken, "too_large" if len(body) > self.settings.queue_max_bytes else ""
        except Exception as error:  # noqa: BLE001 - one record must not stop the others
            log.error("broadcast: a record could not be encoded: %s", type(error).__name__)
            return b"", [entry.id for entry in wanted], "encode_error"

    def _encode(self, record: Record, privacy: bool) -> dict[str, Any]:
        names = {"service_name": self.settings.service_name, "service_version": self.settings.service_version}
        return encode(record, privacy=privacy, **names)

    # -- destinations and threads

    @property
    def store(self) -> Store:
        return self._store or self._open()

    def _open(self) -> Store:
        with self._lock:
            s = self.settings
            try:
                self._store = self._store or Store(s.database, s.queue_max_items, s.queue_max_bytes)
            except (OSError, sqlite3.Error) as error:
                why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                raise Unusable(f"database: {s.database} cannot be used ({why}); move it away or mend it") from None
            return self._store

    @property
    def enabled(self) -> bool:
        """What the page chose last, unless the file was changed after that."""
        chosen, in_file = self._store.switch() if self._store else None, self.settings.enabled
        return chosen["enabled"] if chosen and chosen["in_file"] == in_file else in_file

    def entries(self) -> list[Entry]:
        made = [Entry(_file_id(d.name), d, "file", None, None) for d in self.settings.destinations]
        for identity, body, created, updated in self._store.saved() if self._store else []:
            try:
                made.append(Entry(identity, _destination(body), "page", created, updated))
            except (ValueError, LookupError, TypeError):
                warn(identity, f"a saved destination ({identity}) is no longer valid and rests")
        return made

    def _refresh(self) -> None:
        """At the start and after a reload: a destination that left config.toml takes its queue with it."""
        if self._started and self._store:
            known = [_file_id(d.name) for d in self.settings.destinations] + [row[0] for row in self._store.saved()]
            if lost := self._store.keep_only(known):
                log.warning("broadcast: %d queued records of removed destinations were dropped", lost)
        self._apply()

    def _apply(self) -> None:
        """Let the threads fit the settings: none while switched off or without a destination."""
        with self._lock:
            active = {e.id: e for e in self.entries() if e.destination.enabled} if self.enabled and self._started else {}
            self._takers = tuple(active.values())
            gone = [self._workers.pop(identity) for identity in list(self._workers) if identity not in active]
            if active and not self._writer:
                self._open()
                self._writer = Writer(self)
            elif not active and self._writer:
                writer, self._writer = self._writer, None
                writer.stop(2.0)
                self._search.close()
            for identity, entry in active.items():
                if identity not in self._workers:
                    self._workers[identity] = Worker(self, entry)
                elif self._workers[identity].entry != entry:
                    self._workers[identity].change(entry)
        end(gone, 0.0)

    def wake(self, destinations: Iterable[str]) -> None:
        for worker in map(self._workers.get, destinations):
            if worker:
                worker.wake()

    def reload(self, settings: Settings) -> None:
        """Go on with another [broadcast] table; only the database must stay the same."""
        if settings.database != self.settings.database:
            raise ValueError("database: can only be changed by a restart")
        with self._lock:
            self.settings = settings
            if self._store:
                self._store.limit(settings.queue_max_items, settings.queue_max_bytes)
            self._refresh()

    def close(self, timeout: float) -> None:
        """Commit what was handed over, deliver what can be within `timeout`, and leave the rest in the database."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._started = False
            writer, self._writer = self._writer, None
            workers, self._workers = list(self._workers.values()), {}
        if writer:
            writer.stop(max(0.5, timeout))
        end(workers, deadline)
        self._search.close()
        if self._store:
            self._store.close()

    # -- what it shows

    def stats(self) -> dict[str, Any]:
        """The `broadcast` object of GET /api/v1/stats."""
        ledger = self._store.ledger() if self._store else {}
        shown = {entry.destination.name: _counters(entry.id, ledger.get(entry.id, {})) for entry in self.entries()}
        return {"enabled": self.enabled, "destinations": shown}

    def doctor(self) -> list[dict[str, Any]]:
        """Test every enabled destination: [{place, ok, message, cure}]."""
        findings = []
        for d in (entry.destination for entry in self.entries() if entry.destination.enabled):
            result = try_out(d, self.settings, self.listening())
            found = {"ok": result["ok"], "message": result["message"], "cure": result["advice"]}
            findings.append({"place": f"broadcast destination {d.name}"} | found)
        return findings

    # -- the settings API

    def api(self, method: str, path: str, body: Any = None) -> Reply:
        """Answer a request below /api/v1/observability, its JSON body already read."""
        try:
            return self._route(method, path.rstrip("/"), body)
        except ApiError as error:
            return error.reply
        except sqlite3.IntegrityError:
            return ApiError(409, "name: another destination has it", "name").reply
        except (sqlite3.Error, OSError, Unusable) as error:
            log.error("broadcast: the settings cannot be read or written: %s", type(error).__name__)
            return ApiError(503, "The settings cannot be read or written now").reply
        except ValueError as error:
            place = str(error).partition(":")[0]
            return ApiError(400, str(error), f"config.{place}" if place.partition(".")[0] in OWN_FIELDS else place).reply

    def _route(self, method: str, path: str, body: Any) -> Reply:
        for pattern, methods in ROUTES:
            if match := pattern.fullmatch(path):
                if method not in methods:
                    raise ApiError(405, f"Only {', '.join(methods)} here", allow=list(methods))
                return methods[method](self, body, *match.groups())
        raise ApiError(404, "There is nothing here")

    def _put_switch(self, body: Any) -> Reply:
        if not isinstance(_only(body, ("enabled",)).get("enabled"), bool):
            raise ApiError(400, "enabled: must be true or false", "enabled")
        with self._lock:
            self.store.set_switch(body["enabled"], self.settings.enabled)
            self._apply()
        return 200, {"enabled": self.enabled}

    def _entry(self, identity: str, *, editable: bool = False) -> Entry:
        entry = next((entry for entry in self.entries() if entry.id == identity), None)
        if entry is None:
            raise ApiError(404, "There is no such destination")
        if editable and entry.source == "file":
            raise ApiError(403, "This destination is in config.toml; change it there")
        return entry

    def _post(self, body: Any) -> Reply:
        if len(self.entries()) >= MOST_DESTINATIONS:
            raise ApiError(400, f"There are {MOST_DESTINATIONS} destinations already")
        return 201, self._save(str(uuid.uuid4()), body, None)

    def _put(self, body: Any, identity: str) -> Reply:
        return 200, self._save(identity, body, self._entry(identity, editable=True))

    def _save(self, identity: str, body: Any, stored: Entry | None) -> dict[str, Any]:
        """Test exactly what is about to be stored, then store it: nothing changes if the test fails."""
        try:
            draft = self._draft(body, stored)
        except BadAddress as error:
            raise _failed_test(_result(Answer("address", str(error)), 0, BAD_URL)) from None
        if any(e.id != identity and e.destination.name == draft.name for e in self.entries()):
            raise ApiError(409, "name: another destination has it", "name")
        # A destination that broke can be switched off without mending it first.
        resting = stored is not None and not draft.enabled and _connection(draft) == _connection(stored.destination)
        if self.settings.test_required and not resting:
            result = self._tried(draft)
            if not result["ok"]:
                raise _failed_test(result)
        with self._lock:
            if stored:
                self._entry(identity, editable=True)  # deleted meanwhile?
            self.store.save(identity, draft.name, _body(draft))
            self._apply()
            return _shown(self._entry(identity))

    def _delete(self, _: Any, identity: str) -> Reply:
        with self._lock:
            self._entry(identity, editable=True)
            self.store.delete(identity)
            self._given.pop(identity, None)
            self._apply()
        return 200, {"id": identity, "deleted": True}

    def _test(self, body: Any) -> Reply:
        stored = self._entry(str(body["id"])) if isinstance(body, dict) and "id" in body else None
        try:
            draft = stored.destination if stored and not set(body) - set(SHOWN_ONLY) else self._draft(body, stored)
        except BadAddress as error:
            return 200, _result(Answer("address", str(error)), 0, BAD_URL)
        return 200, self._tried(draft)

    def _tried(self, draft: Destination) -> dict[str, Any]:
        """One test, bounded in time, in number at once and in number a minute."""
        now = time.monotonic()
        with self._lock:
            if len(self._tested) == TESTS_A_MINUTE and now - self._tested[0] < 60:
                raise ApiError(429, "Too many connection tests; wait a minute")
            self._tested.append(now)
        if not self._testing.acquire(blocking=False):
            raise ApiError(429, "Too many connection tests at once; wait for the others")
        try:
            return try_out(draft, self.settings, self.listening())
        finally:
            self._testing.release()

    def _payload(self, _: Any, identity: str) -> Reply:
        """Exactly what this destination would get for the last record that is for it."""
        d, record = self._entry(identity).destination, self._latest
        if record is None or skip_reason(d, record, self._search):
            record = self._given.get(identity)
        document = self._encode(record, d.privacy_mode) if record else None
        return 200, {"generation_id": record and record["generation_id"], "request": _request(d), "payload": document}

    def _draft(self, body: Any, stored: Entry | None) -> Destination:
        """The destination that `body` describes, on top of the stored one; masked values stand for what is stored."""
        merged = _body(stored.destination) if stored else {"config": {}}
        given = _only(body, EDITABLE + SHOWN_ONLY).items()
        merged |= {k: v for k, v in given if k in EDITABLE and (v is not None or k in ("api_keys", "filter_rules"))}
        kind = merged.get("type")
        if not isinstance(kind, str) or kind not in TYPES:
            raise ApiError(400, f"type: must be one of {', '.join(name for name in TYPES if name != 'file')}", "type")
        if kind == "file":
            raise ApiError(400, "type: file destinations are made in config.toml only", "type")
        names = {entry.destination.name for entry in self.entries()}
        merged.setdefault("name", next(n for n in (kind, *(f"{kind} {i}" for i in range(2, 99))) if n not in names))
        merged["config"], kept = _unmask(_config(merged["config"]), stored)
        made = _destination(merged)
        if kept and stored and target(made).origin != target(stored.destination).origin:
            raise ApiError(400, f"config.{kept[0]}: the address changed, so enter it again", f"config.{kept[0]}")
        return made


ROUTES: Final[tuple[tuple[re.Pattern[str], dict[str, Callable[..., Reply]]], ...]] = (
    (re.compile(r""), {"GET": lambda b, _: (200, {"enabled": b.enabled}), "PUT": Broadcast._put_switch}),
    (
        re.compile(r"/destinations"),
        {"GET": lambda b, _: (200, {"destinations": [_shown(e) for e in b.entries()]}), "POST": Broadcast._post},
    ),
    (re.compile(r"/destinations/test"), {"POST": Broadcast._test}),
    (re.compile(r"/destinations/([^/]+)/payload"), {"GET": Broadcast._payload}),
    (
        re.compile(r"/destinations/([^/]+)"),
        {"GET": lambda b, _, identity: (200, _shown(b._entry(identity))), "PUT": Broadcast._put, "DELETE": Broadcast._delete},
    ),
)


def _file_id(name: str) -> str:
    return f"file-{_hash(name)[:24]}"


def _counters(identity: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    error, error_at, success = counts.get("state") or (None, None, None)

    def by_reason(prefix: str) -> dict[str, int]:
        return {kind.removeprefix(prefix): n for kind, n in sorted(counts.items()) if kind.startswith(prefix) and n}

    made = {"id": identity} | {kind: counts.get(kind, 0) for kind in ("accepted", "delivered", "queued")}
    made |= {"dropped": by_reason("dropped:"), "skipped": by_reason("skipped:")}
    return made | {"last_error": error, "last_error_at": error_at, "last_success": success}


def _failed_test(result: dict[str, Any]) -> ApiError:
    return ApiError(422, f"Not saved, the test failed: {result['message']}", **result)


def _only(body: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object")
    if unknown := sorted(key for key in body if key not in keys):
        raise ApiError(400, f"{unknown[0]}: unknown key, only {', '.join(keys)}", unknown[0])
    return body


def _config(given: Any) -> dict[str, Any]:
    """The `config` object with our names (OpenRouter's baseUrl is base_url) and text where text belongs."""
    if not isinstance(given, dict):
        raise ApiError(400, "config: must be an object with the type's fields", "config")
    made = {re.sub(r"(?<=[a-z])[A-Z]", lambda m: f"_{m[0].lower()}", key): value for key, value in given.items()}
    for key, value in made.items():
        place = f"config.{key}"
        if key not in OWN_FIELDS or key == "path":
            raise ApiError(400, f"{place}: unknown key", place)
        if key == "instance_id" and isinstance(value, int) and not isinstance(value, bool):
            made[key] = str(value)
        elif not isinstance(value, dict if key == "headers" else str):
            raise ApiError(400, f"{place}: must be {'an object' if key == 'headers' else 'text'}", place)
        if any("${" in str(text) for text in (value.values() if isinstance(value, dict) else (value,))):
            raise ApiError(400, f"{place}: ${{NAME}} works in config.toml only; enter the value", place)
    return made


def _destination(body: Mapping[str, Any]) -> Destination:
    """From the stored or sent form; raises ValueError naming the field."""
    types = {"name": str, "enabled": bool, "privacy_mode": bool, "sampling_rate": int | float, "filter_rules": dict}
    shared = {key: body[key] for key in types if body.get(key) is not None}
    for key, value in shared.items():
        if not isinstance(value, types[key]) or (key == "sampling_rate" and isinstance(value, bool)):
            raise ValueError(f"{key}: has the wrong type")
    keys = body.get("api_keys")
    if keys is not None and (not isinstance(keys, list) or not keys or not all(isinstance(k, str) and k for k in keys)):
        raise ValueError("api_keys: must be null for all, or a list of at least one name")
    return Destination(type=body["type"], api_keys=tuple(keys or ()), **shared, **body["config"])


def _connection(d: Destination) -> tuple[Any, ...]:
    return (d.type, *(getattr(d, name) for name in OWN_FIELDS))


def _body(d: Destination) -> dict[str, Any]:
    """The form that is stored and, masked, shown."""
    own = TYPES[d.type].required + TYPES[d.type].optional
    body = {key: getattr(d, key) for key in ("name", "type", "enabled", "privacy_mode", "sampling_rate")}
    body |= {"config": {name: getattr(d, name) for name in own if getattr(d, name) not in ("", {})}}
    return body | {"api_keys": list(d.api_keys) or None, "filter_rules": d.filter_rules or None}


def _shown(entry: Entry) -> dict[str, Any]:
    body = _body(entry.destination)
    shown = {"id": entry.id} | body | {"config": {name: _masked(name, value) for name, value in body["config"].items()}}
    return shown | {"source": entry.source, "created_at": entry.created_at, "updated_at": entry.updated_at}


def mask(value: str) -> str:
    return f"{value[:4]}{MARK}{value[-4:]}" if len(value) >= 16 else MARK


def _masked(name: str, value: Any) -> Any:
    """A field of `config` as it is shown."""
    if isinstance(value, dict):
        return {key: text if key.lower() in OPEN_HEADERS else mask(text) for key, text in value.items()}
    if name in URLS:  # a key in the query is a secret too
        base, has_query, _ = value.partition("?")
        return f"{base}?{MARK}" if has_query else value
    return mask(value) if name in SECRETS else value


def _unmask(config: dict[str, Any], stored: Entry | None) -> tuple[dict[str, Any], list[str]]:
    """Put what is stored in the place of its mask; gives the names that were kept. A mask of nothing is refused."""
    old = _body(stored.destination)["config"] if stored else {}
    kept: list[str] = []

    def put_back(place: str, given: dict[str, Any], was: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
        masked = [name for name, value in given.items() if isinstance(value, str) and MARK in value]
        for name in masked:
            if name not in was or given[name] != shown[name]:
                where = f"config.{place}{name}"
                raise ApiError(400, f"{where}: is masked, and nothing stored has that mask; enter it again", where)
            kept.append(place + name)
        return given | {name: was[name] for name in masked}

    made = put_back("", config, old, {name: _masked(name, value) for name, value in old.items()})
    if "headers" in made:
        held = old.get("headers", {})
        made["headers"] = put_back("headers.", made["headers"], held, _masked("headers", held))
    return made, kept


def _request(d: Destination) -> dict[str, Any]:
    """The line and headers of a delivery, as they may be shown."""
    if d.type == "file":
        return {"method": "append", "url": d.path, "headers": {}}
    to = target(d)
    url = _masked("url", f"{to.scheme}://{to.authority}{to.path}")
    return {"method": to.method, "url": url, "headers": {"Content-Type": "application/json"} | _masked("", to.headers)}


# ------------------------------------------------------------------------------------------ replay of a file destination


def replay(path: str, settings: Settings, name: str, *, listening: Listening = set) -> dict[str, Any]:
    """Send the lines that a `file` destination wrote to destination `name`, in order: {lines, delivered, dropped, last_error}.

    Waits as a delivery does while the destination does not answer. A private destination only gets lines that were
    written in private: content is never cut out of a line. Raises ValueError if there is no such destination, OSError
    if the file cannot be read.
    """
    entries = Broadcast(settings, listening=listening, start=False).entries()
    d = next((entry.destination for entry in entries if entry.destination.name == name), None)
    if d is None:
        raise ValueError(f"--to: there is no destination {name!r}")
    counts: Counter[str] = Counter()
    last_error = None
    with Path(path).open("rb") as file:
        for line in file:
            reason = _unfit(line, d.privacy_mode)
            if not reason:
                answer = _insist(d, line.strip(), settings, listening)
                reason, last_error = ("", last_error) if answer.cause == "ok" else (answer.reason, answer.message)
            counts.update([reason])
    delivered = counts.pop("", 0)
    return {"lines": delivered + counts.total(), "delivered": delivered, "dropped": dict(counts), "last_error": last_error}


def _unfit(line: bytes, privacy: bool) -> str:
    try:
        document = json.loads(line)
        spans = [span for entry in document["resourceSpans"] for scope in entry["scopeSpans"] for span in scope["spans"]]
        return "content" if privacy and any(map(_has_content, spans)) else ""
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return "not_otlp"


def _has_content(span: Mapping[str, Any]) -> bool:
    keys = {pair.get("key") for pair in span.get("attributes", [])}
    return bool(keys & CONTENT_KEYS) or span["status"].get("message") not in (None, *SENTENCES.values())


def _insist(d: Destination, line: bytes, settings: Settings, listening: Listening) -> Answer:
    begun, pause = time.monotonic(), BACKOFF_FIRST
    while True:
        answer = send(d, line, settings.timeout, listening())
        wait = max(pause, answer.retry_after)
        if not answer.retry or time.monotonic() + wait - begun > settings.max_elapsed:
            return answer
        time.sleep(wait)
        pause = min(BACKOFF_MOST, pause * 2)
