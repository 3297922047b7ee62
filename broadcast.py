"""What users' destinations see: each finished request as a trace in OpenRouter's Broadcast format.

Strategy, in the order of this file:

* `encode` is pure: one finished record in, one OTLP/HTTP JSON document out. Nothing a client sends can make it fail or
  make it invalid; what does not fit is repaired and marked. With privacy on the content is never touched, so there is
  nothing to strip.
* `Destination` is one place to send to. `TYPES` is the table of what each type needs and where it sends.
* `Store` is the SQLite file: destinations made on the page, and one queue per destination. Every count lives in the same
  transaction as the rows it counts, so `accepted = delivered + dropped + queued` holds across kill -9.
* `exchange` speaks HTTP once to an address that was checked, under one deadline, and judges the answer. It uses
  http.client on a socket of ours: that has no redirects, retries, proxies or netrc to turn off, and the address that
  was checked is by construction the address connected to.
* `Writer` (one thread) takes records from requests into the store; `Worker` (one thread per destination) takes them out.
* `Broadcast` ties it together and answers the settings API.
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
from dataclasses import MISSING, dataclass, field, fields
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

__all__ = ["BadAddress", "Broadcast", "Destination", "Settings", "encode", "replay"]

log = logging.getLogger("broadcast")
Record = Mapping[str, Any]
Pairs = list[tuple[str, Any]]

# ---------------------------------------------------------------------------------------------------------------------
# The encoder
# ---------------------------------------------------------------------------------------------------------------------

LONGEST_VALUE: Final = 10_000_000  # OpenRouter's own limit
LONGEST_KEY: Final = 256
LONGEST_NAME: Final = 1_024
MOST_METADATA: Final = 1_000  # keys of one `trace` object
INLINE_MEDIA: Final = 4_096  # OpenRouter strips multimodal parts; a thumbnail or a URL is worth keeping

INTERNAL, SERVER, CLIENT = 1, 2, 3
RESERVED: Final = ("trace_id", "trace_name", "span_name", "generation_name", "parent_span_id")
HEX32, HEX16 = re.compile(r"[0-9a-f]{32}"), re.compile(r"[0-9a-f]{16}")
UUID_FORM = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
OUR_WORD = re.compile(r"[a-z][a-z0-9_.]{0,63}")
REASONING_LEVELS: Final = frozenset(("none", "minimal", "low", "medium", "high", "xhigh", "max"))

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


def encode(
    record: Record, *, privacy: bool, service_name: str = "openrouter", service_version: str = "1.0.0"
) -> dict[str, Any]:
    """Give the OTLP/HTTP JSON document of one finished request; one `resourceSpans` entry per span, as OpenRouter does."""
    about = [
        ("service.name", service_name),
        ("openrouter.trace.id", record["generation_id"]),
        ("service.version", service_version),
    ]
    resource = {"attributes": _attributes(about)}
    return _document(resource, _spans(record, privacy, service_name))


def _document(resource: dict[str, Any], spans: Iterable[dict[str, Any]]) -> dict[str, Any]:
    scope = {"name": "openrouter"}
    return {
        "resourceSpans": [
            {"resource": resource, "scopeSpans": [{"scope": scope, "spans": [span]}]} for span in spans
        ]
    }


def to_bytes(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


ENVELOPE: Final = (b'{"resourceSpans":[', b"]}")


def fragment(document: Mapping[str, Any]) -> bytes:
    """The entries without their envelope: what is queued, so that a batch is a join."""
    return to_bytes(document)[len(ENVELOPE[0]) : -len(ENVELOPE[1])]


def envelope(fragments: Iterable[bytes]) -> bytes:
    return ENVELOPE[0] + b",".join(fragments) + ENVELOPE[1]


def _spans(record: Record, privacy: bool, service_name: str) -> list[dict[str, Any]]:
    """The optional spans above, the generation, then one child per attempt and one for the answer's body."""
    given = record.get("trace") or {}
    generation_id = record["generation_id"]
    trace_id = _trace_id(given.get("trace_id"), generation_id)
    start, end = _window(record)
    failure = _failure(record, privacy)

    def span(
        seed: str, parent: str | None, name: str, kind: int, window: tuple[int, int], failed: str | None, pairs: Pairs
    ) -> dict[str, Any]:
        made: dict[str, Any] = {"traceId": trace_id, "spanId": _hash(seed)[:16], "parentSpanId": parent, "name": _name(name), "kind": kind}
        made |= {"startTimeUnixNano": _nanos(window[0]), "endTimeUnixNano": _nanos(window[1])}
        made |= {"status": {"code": 2, "message": _clean(failed)[0]} if failed else {"code": 1}}
        made["attributes"] = _attributes(pairs)
        return {key: value for key, value in made.items() if value is not None}

    parent, made = _parent(given), []
    for key, suffix in (("trace_name", "trace"), ("span_name", "span")):
        if name := _given_name(given, key):
            seed = f"{generation_id}:{suffix}"
            made.append(span(seed, parent, name, INTERNAL, (start, end), failure, _child(record, seed, failure)))
            parent = made[-1]["spanId"]
    name = _given_name(given, "generation_name") or "LLM Generation"
    pairs = _generation(record, privacy, failure, service_name) + _metadata(given, trace_id)
    root = span(generation_id, parent, name, CLIENT, (start, end), failure, pairs)
    if failure:
        root["events"] = [_exception(failure, root["endTimeUnixNano"])]
    made.append(root)
    for seed, name, window, failed, pairs in _parts(record, privacy):
        made.append(span(seed, root["spanId"], name, SERVER, window, failed, pairs))
    return made


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _nanos(ms: int) -> str:
    return str(ms * 1_000_000)


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


def _given_name(given: Mapping[str, Any], key: str) -> str | None:
    name = given.get(key)
    return _name(name) if isinstance(name, str) and name.strip() else None


def _name(text: str) -> str:
    return _clean(text, LONGEST_NAME)[0]


def _failure(record: Record, privacy: bool) -> str | None:
    outcome = record.get("outcome") or "error"
    return None if outcome == "ok" else _told(outcome, record.get("error_type"), record.get("error"), privacy)


def _told(outcome: str, error_type: Any, error: Any, privacy: bool) -> str:
    fixed = SENTENCES.get(str(error_type)) or SENTENCES.get(outcome) or SENTENCES["error"]
    return fixed if privacy or outcome == "cancelled" or not error else str(error)


def _error_type(given: Any, otherwise: str) -> str:
    """Only a word of ours: an upstream's free text has no place in an attribute that is also sent in private."""
    return given if isinstance(given, str) and OUR_WORD.fullmatch(given) else otherwise


def _exception(failure: str, at: str) -> dict[str, Any]:
    pairs = [("exception.type", "Error"), ("exception.message", failure)]
    return {"timeUnixNano": at, "name": "exception", "attributes": _attributes(pairs)}


def _metadata(given: Mapping[str, Any], trace_id: str) -> Pairs:
    """The client's own keys; a reserved one too if what was sent is not what is shown."""
    shown = {"trace_id": trace_id, "parent_span_id": _parent(given)}
    shown |= {key: _given_name(given, key) for key in ("trace_name", "span_name", "generation_name")}
    kept = {key: value for key, value in given.items() if key not in RESERVED or value != shown[key]}
    pairs: Pairs = [("trace.metadata.truncated", True)] if len(kept) > MOST_METADATA else []
    for key, value in islice(kept.items(), MOST_METADATA):
        pairs.append((f"trace.metadata.{key}", "null" if value is None else value))
    return pairs


def _generation(record: Record, privacy: bool, failure: str | None, service_name: str) -> Pairs:
    """Every attribute of the generation span that we know, in OpenRouter's words and in the current GenAI ones."""
    get, ok = record.get, failure is None
    answer, attempts = get("response") or {}, get("attempts") or []
    responses = _json([_provider_response(attempt) for attempt in attempts]) if attempts else None
    vendor = _vendor(record)
    finish = answer.get("finish_reason") if ok else None
    return [
        ("trace.name", _given_name(get("trace") or {}, "trace_name") or "OpenRouter Request"),
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
        ("trace.metadata.openrouter.provider_name", get("provider")),
        ("trace.metadata.openrouter.provider_slug", get("provider")),
        ("trace.metadata.openrouter.finish_reason", answer.get("native_finish_reason") if ok else None),
    ]


def _level(failure: str | None) -> Pairs:
    return [("span.level", "ERROR" if failure else "DEFAULT"), ("span.status_message", failure)]


def _vendor(record: Record) -> str | None:
    """The model's author, as OpenRouter has it: the part before the slash; else who made what served it."""
    for model in (record.get("requested_model"), record.get("sent_model")):
        author, slash, _ = str(model or "").partition("/")
        if author and slash:
            return author
    return record.get("vendor") or record.get("provider_format") or record.get("provider")


def _provider_response(attempt: Mapping[str, Any]) -> dict[str, Any]:
    headers = attempt.get("headers_ms")
    return {
        "id": attempt.get("request_id"),
        "provider_name": attempt.get("provider"),
        "status": attempt.get("status"),
        "latency": round(_positive(attempt.get("duration_ms") if headers is None else headers)),
        "is_byok": False,
        "model_permaslug": attempt.get("model"),
    }


def _parameters(record: Record) -> Pairs:
    request = record.get("request") or {}
    limit = next((request[key] for key in ("max_tokens", "max_completion_tokens", "max_output_tokens") if key in request), None)
    reasoning, shape = request.get("reasoning"), request.get("response_format")
    level = request.get("reasoning_effort") or (reasoning.get("effort") if isinstance(reasoning, dict) else None)
    kind = shape.get("type") if isinstance(shape, dict) else None
    return [
        *((f"gen_ai.request.{key}", _double(request.get(key))) for key in ("temperature", "top_p")),
        *((f"gen_ai.request.{key}", _double(request.get(key))) for key in ("frequency_penalty", "presence_penalty")),
        ("gen_ai.request.max_tokens", _count(limit)),
        ("gen_ai.request.top_k", _count(request.get("top_k"))),
        ("gen_ai.request.seed", _count(request.get("seed"))),
        ("gen_ai.request.choice.count", _count(request.get("n")) if request.get("n") != 1 else None),
        ("gen_ai.request.reasoning.level", level if isinstance(level, str) and level in REASONING_LEVELS else None),
        ("gen_ai.request.stream", True if record.get("stream") else None),
        ("gen_ai.output.type", {"json_schema": "json", "json_object": "json", "text": "text"}.get(str(kind))),
    ]


def _usage(record: Record, ok: bool) -> Pairs:
    """Tokens are always integers and money always a double: TraceQL never compares one with the other."""
    usage = (record.get("response") or {}).get("usage") or {}
    count = {key: _count(value) for key, value in usage.items()} if record.get("usage_source") != "none" else {}
    read, written, thought = (count.get(f"{key}_tokens") for key in ("cached_input", "cache_write_input", "reasoning"))
    sent, made = count.get("input_tokens"), count.get("output_tokens")
    cost = record.get("cost") or {}
    cost = cost if ok or cost.get("source") == "reported" else {}
    return [
        ("gen_ai.usage.input_tokens", sent),
        ("gen_ai.usage.output_tokens", made),
        ("gen_ai.usage.total_tokens", sent + made if sent is not None and made is not None else None),
        *((f"gen_ai.usage.{key}_cost", _double(cost.get(key))) for key in ("input", "output", "total")),
        ("gen_ai.usage.input_tokens.cached", read),
        ("gen_ai.usage.input_tokens.cache_write", written),
        ("gen_ai.usage.output_tokens.reasoning", thought),
        ("gen_ai.usage.cache_read.input_tokens", read),
        ("gen_ai.usage.cache_creation.input_tokens", written),
        ("gen_ai.usage.cache_write.input_tokens", written),
        ("gen_ai.usage.reasoning.output_tokens", thought),
        *((f"trace.metadata.openrouter.{key}", _double(cost.get(key))) for key in ("input_unit_price", "output_unit_price")),
    ]


def _timings(record: Record, served: Mapping[str, Any]) -> Pairs:
    """Milliseconds from the request's start, from the attempt that answered (the last one)."""
    start, first = _double(served.get("start_ms")), _double(record.get("ttft_ms"))
    headers, length = _double(served.get("headers_ms")), _double(served.get("duration_ms"))
    end = start + length if start is not None and length is not None else None
    made = _count(((record.get("response") or {}).get("usage") or {}).get("output_tokens")) or 0
    between = (end - first) / (made - 1) if end is not None and first is not None and made > 1 else None
    prefix = "trace.metadata.openrouter."
    return [
        (prefix + "router_latency_ms", _double(record.get("overhead_ms"))),
        (prefix + "provider_request_ms", start),
        (prefix + "provider_headers_ms", start + headers if start is not None and headers is not None else None),
        (prefix + "first_token_ms", first),
        (prefix + "provider_body_end_ms", end),
        (prefix + "provider_time_to_first_token_ms", _double(served.get("first_token_ms"))),
        (prefix + "inter_token_latency_ms", between),
        ("gen_ai.response.time_to_first_chunk", first / 1000 if first is not None and record.get("stream") else None),
    ]


def _child(record: Record, seed: str, failure: str | None) -> Pairs:
    operation = record.get("operation") or "chat"
    return [
        ("span.type", "span"),
        *_level(failure),
        ("gen_ai.operation.name", operation),
        ("gen_ai.response.id", seed),
    ]


def _parts(record: Record, privacy: bool) -> Iterator[tuple[str, str, tuple[int, int], str | None, Pairs]]:
    """One child per attempt; the one that answered ends with its headers, and `generation` is the body after them."""
    start, end = _window(record)
    for index, attempt in enumerate(record.get("attempts") or []):
        begun = min(end, start + round(_positive(attempt.get("start_ms"))))
        over = min(end, begun + round(_positive(attempt.get("duration_ms"))))
        failed = _attempt_failure(attempt, privacy)
        headers = None if failed or attempt.get("headers_ms") is None else _positive(attempt["headers_ms"])
        turn = over if headers is None else min(over, begun + round(headers))
        seed = f"{record['generation_id']}:attempt-{index}"
        pairs = _child(record, seed, failed) + _attempt(attempt, index, failed)
        yield seed, f"provider attempt {index + 1}: {attempt.get('provider')}", (begun, turn), failed, pairs
        if headers is not None:
            seed = f"{record['generation_id']}:generation"
            yield seed, "generation", (turn, over), None, _child(record, seed, None)


def _attempt_failure(attempt: Mapping[str, Any], privacy: bool) -> str | None:
    if not attempt.get("error") and not attempt.get("error_type"):
        return None
    kind = attempt.get("error_type")
    return _told("cancelled" if kind == "client_disconnected" else "error", kind, attempt.get("error"), privacy)


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
    """Prompt and answer, only ever called for a destination that may have them."""
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
        {
            "id": call.get("id"),
            "index": index,
            "type": "function",
            "function": {"name": call.get("name"), "arguments": call.get("arguments")},
        }
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


PARTS: Final[dict[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "text": lambda b: {"type": "text", "content": b.get("text")},
    "thinking": lambda b: {"type": "reasoning", "content": b.get("thinking")},
    "tool_use": lambda b: {"type": "tool_call", "id": b.get("id"), "name": b.get("name"), "arguments": b.get("input")},
    "tool_result": lambda b: {"type": "tool_call_response", "id": b.get("tool_use_id"), "response": b.get("content")},
    "image": lambda b: (
        {"type": "uri", "modality": "image", "uri": b["url"]}
        if "url" in b
        else {"type": "blob", "modality": "image", "mime_type": b.get("media_type"), "content": b.get("data")}
    ),
}


def _part(block: Any) -> Any:
    make = PARTS.get(str(block.get("type"))) if isinstance(block, dict) else None
    return make(block) if make else block


def _message(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    blocks = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return {"role": message.get("role"), "parts": [_part(block) for block in blocks]}


def _output_message(answer: Mapping[str, Any]) -> dict[str, Any]:
    parts: list[dict[str, Any]] = []
    if answer.get("reasoning"):
        parts.append({"type": "reasoning", "content": answer["reasoning"]})
    if answer.get("content"):
        parts.append({"type": "text", "content": answer["content"]})
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
    return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        return hex(value)


def _key(wanted: str, taken: Mapping[str, Any]) -> str:
    """A key nobody has yet: cut, repaired or doubled ones end in a digest of what was sent."""
    key, marks = _clean(wanted, LONGEST_KEY)
    if marks:
        key = f"{key}~{_hash(wanted)[:8]}"
    while key in taken:
        key = f"{key[:LONGEST_KEY]}~{_hash(key)[:8]}"
    return key


def _clean(text: str, most: int = LONGEST_VALUE) -> tuple[str, list[str]]:
    """Text that is valid UTF-8 without NUL (which databases behind a receiver refuse), and what was done to it."""
    marks = []
    if len(text) > most:
        text, marks = text[:most], ["truncated"]
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
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def _positive(value: Any) -> float:
    return max(0.0, min(_double(value) or 0.0, 1e12))


# ---------------------------------------------------------------------------------------------------------------------
# Destinations: what each type needs, and where it sends
# ---------------------------------------------------------------------------------------------------------------------


class BadAddress(ValueError):
    """A URL we do not send to; in the settings API this is a failed test rather than a malformed request."""


class Target(NamedTuple):
    """Where one request goes. Not a dataclass, and never logged: the path and the headers may hold secrets."""

    scheme: str
    host: str
    port: int
    path: str
    method: str
    headers: dict[str, str]
    plain: bool  # a webhook's receiver seldom inflates gzip and may answer in its own words

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
REFUSED: Final = tuple(
    ipaddress.ip_network(net) for net in ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")
)
CARRIES_V4: Final = tuple(ipaddress.ip_network(net) for net in ("64:ff9b::/96", "::/96"))
Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Listening = Callable[[], Iterable[tuple[str, int]]]


def _doc(text: str) -> Mapping[str, str]:
    return {"doc": text}


@dataclass(frozen=True, repr=False)
class Destination:
    """One place to send to, from [[broadcast.destinations]] or from the page."""

    name: str = field(metadata=_doc("its name on the page and in /api/v1/stats"))
    type: str = field(metadata=_doc("otel-collector, grafana, axiom, jaeger, tempo, honeycomb, lightstep, webhook or file"))
    enabled: bool = field(default=True, metadata=_doc("false: takes nothing, keeps what is queued"))
    endpoint: str = field(default="", metadata=_doc("otel-collector: the URL as it is; axiom, honeycomb, lightstep: a region's"))
    headers: dict[str, Any] = field(default_factory=dict, metadata=_doc("further request headers, for authentication"))
    base_url: str = field(default="", metadata=_doc("grafana, jaeger, tempo: the gateway; /v1/traces is added"))
    instance_id: str = field(default="", metadata=_doc("grafana: the numeric id"))
    api_key: str = field(default="", metadata=_doc("grafana, honeycomb"))
    token: str = field(default="", metadata=_doc("axiom"))
    dataset: str = field(default="", metadata=_doc("axiom; honeycomb Classic"))
    tenant: str = field(default="", metadata=_doc("tempo (X-Scope-OrgID), jaeger (x-tenant)"))
    access_token: str = field(default="", metadata=_doc("lightstep"))
    url: str = field(default="", metadata=_doc("webhook"))
    method: str = field(default="POST", metadata=_doc("webhook: POST or PUT"))
    path: str = field(default="", metadata=_doc("file: one OTLP JSON request per line, mode 0600"))
    privacy_mode: bool = field(default=False, metadata=_doc("true: no prompt, answer or tool argument ever goes there"))
    sampling_rate: float = field(default=1.0, metadata=_doc("0.0001-1, whole sessions"))
    api_keys: tuple[str, ...] = field(default=(), metadata=_doc("names of [[api_keys]]; empty: all"))
    filter_rules: dict[str, Any] = field(default_factory=dict, metadata=_doc("{enabled, groups = [{logic, rules = [{field, operator, value}]}]}"))

    def __post_init__(self) -> None:
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

    def __repr__(self) -> str:
        return f"Destination({self.name!r}, {self.type!r})"


class Kind(NamedTuple):
    """One destination type: its own fields, and what they become."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    place: Callable[[Destination], tuple[str, dict[str, str]]]


def _home(url: str, scheme: str, ending: str, *strip: str) -> str:
    """Any of the forms people paste: with or without scheme, slash or part of the path."""
    parts = urllib.parse.urlsplit(url.strip() if "://" in url else f"{scheme}://{url.strip()}")
    path = parts.path.rstrip("/")
    for tail in strip:
        path = path.removesuffix(tail).rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(path=path + ending))


def _region(given: str, home: str) -> str:
    """A region's endpoint as it is, unless it is only a host."""
    if not given:
        return home
    has_path = urllib.parse.urlsplit(given if "://" in given else f"https://{given}").path.strip("/")
    return given if has_path and "://" in given else _home(given, "https", "/v1/traces", "/v1/traces")


def _secret(value: str, prefix: str = "") -> str:
    """A key without what is often pasted along with it."""
    value = value.strip()
    return value[len(prefix) :].strip() if prefix and value.lower().startswith(prefix) else value


def _grafana(d: Destination) -> tuple[str, dict[str, str]]:
    joined = base64.b64encode(f"{d.instance_id.strip()}:{_secret(d.api_key)}".encode()).decode()
    url = _home(d.base_url or GRAFANA_HOME, "https", "/otlp/v1/traces", "/v1/traces", "/otlp")
    return url, {"Authorization": f"Basic {joined}"}


def _axiom(d: Destination) -> tuple[str, dict[str, str]]:
    headers = {"Authorization": f"Bearer {_secret(d.token, 'bearer ')}", "X-Axiom-Dataset": d.dataset}
    return _region(d.endpoint, "https://api.axiom.co/v1/traces"), headers


def _honeycomb(d: Destination) -> tuple[str, dict[str, str]]:
    headers = {"x-honeycomb-team": _secret(d.api_key)} | ({"x-honeycomb-dataset": d.dataset} if d.dataset else {})
    return _region(d.endpoint, "https://api.honeycomb.io/v1/traces"), headers


def _lightstep(d: Destination) -> tuple[str, dict[str, str]]:
    headers = {"lightstep-access-token": _secret(d.access_token)}
    return _region(d.endpoint, "https://ingest.lightstep.com/v1/traces"), headers


def _receiver(header: str) -> Callable[[Destination], tuple[str, dict[str, str]]]:
    def place(d: Destination) -> tuple[str, dict[str, str]]:
        return _home(d.base_url, "http", "/v1/traces", "/v1/traces"), {header: d.tenant} if d.tenant else {}

    return place


TYPES: Final[dict[str, Kind]] = {
    "otel-collector": Kind(("endpoint",), ("headers",), lambda d: (d.endpoint.strip(), {})),
    "grafana": Kind(("instance_id", "api_key"), ("base_url", "headers"), _grafana),
    "axiom": Kind(("token", "dataset"), ("endpoint", "headers"), _axiom),
    "jaeger": Kind(("base_url",), ("tenant", "headers"), _receiver("x-tenant")),
    "tempo": Kind(("base_url",), ("tenant", "headers"), _receiver("X-Scope-OrgID")),
    "honeycomb": Kind(("api_key",), ("dataset", "endpoint", "headers"), _honeycomb),
    "lightstep": Kind(("access_token",), ("endpoint", "headers"), _lightstep),
    "webhook": Kind(("url",), ("method", "headers"), lambda d: (d.url.strip(), {})),
    "file": Kind(("path",), (), lambda d: ("", {})),
}
SHARED: Final = frozenset(("name", "type", "enabled", "privacy_mode", "sampling_rate", "api_keys", "filter_rules"))
OWN_FIELDS: Final = tuple(f.name for f in fields(Destination) if f.name not in SHARED)
IN_A_HEADER: Final = ("instance_id", "api_key", "token", "dataset", "tenant", "access_token")


def _default(name: str) -> Any:
    made = next(f for f in fields(Destination) if f.name == name)
    return made.default if made.default is not MISSING else {}


def _check_fields(d: Destination) -> None:
    kind = TYPES[d.type]
    for name in OWN_FIELDS:
        given = getattr(d, name) not in (_default(name), "", {})
        if given and name not in kind.required + kind.optional:
            raise ValueError(f"{name}: type {d.type} has no such field, only {', '.join(kind.required + kind.optional)}")
        if not given and name in kind.required:
            raise ValueError(f"{name}: required for type {d.type}")
    for name in IN_A_HEADER:
        if (value := getattr(d, name)) and not HEADER_VALUE.fullmatch(value.strip()):
            raise ValueError(f"{name}: holds a character that a header cannot carry; paste it again")
    if d.instance_id and not re.fullmatch(r"[0-9]{1,20}", d.instance_id.strip()):
        raise ValueError("instance_id: must be digits only; it is the number on the stack's page")
    if d.method not in ("POST", "PUT"):
        raise ValueError("method: must be POST or PUT")


def check_headers(headers: Mapping[str, Any]) -> None:
    """Raise ValueError for a header that we set ourselves, that is no header, or that comes twice."""
    if len(headers) > MOST_HEADERS:
        raise ValueError(f"headers: at most {MOST_HEADERS}")
    seen = set()
    for name, value in headers.items():
        place = f"headers.{name}" if HEADER_NAME.fullmatch(name) else "headers"
        if place == "headers":
            raise ValueError("headers: a name is empty, too long or holds a character that names cannot have")
        if name.lower() in seen:
            raise ValueError(f"{place}: given twice in different spellings")
        seen.add(name.lower())
        if name.lower() in NOT_YOURS and (name.lower(), value) != ("content-type", "application/json"):
            raise ValueError(f"{place}: is set by the router itself; leave it out")
        if not isinstance(value, str) or not HEADER_VALUE.fullmatch(value.strip(" \t")):
            raise ValueError(f"{place}: must be text without line breaks, control or non-latin-1 characters")


def target(d: Destination) -> Target:
    """Where `d` sends, from the type's table; raises ValueError, for a URL BadAddress."""
    url, own = TYPES[d.type].place(d)
    doubled = {name.lower() for name in own} & {name.lower() for name in d.headers}
    if doubled:
        raise ValueError(f"headers.{min(doubled)}: type {d.type} sets it from its own fields")
    given = {name: value.strip(" \t") for name, value in d.headers.items() if name.lower() != "content-type"}
    key = next(name for name in ("base_url", "url", "endpoint") if name in TYPES[d.type].required + TYPES[d.type].optional)
    return Target(*split_url(url, key), d.method, given | own, d.type == "webhook")


def split_url(url: str, key: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of a URL we would send to; raises BadAddress with the cure."""
    if not url.isprintable() or " " in url or "\\" in url:
        raise BadAddress(f"{key}: the URL holds a space, a backslash or a control character")
    try:
        parts = urllib.parse.urlsplit(url)
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
        host = (parts.hostname or "").encode("idna" if not (parts.hostname or "").isascii() else "ascii").decode()
    except (ValueError, UnicodeError):
        raise BadAddress(f"{key}: that is not a URL") from None
    if parts.scheme not in PORTS or not host:
        raise BadAddress(f"{key}: must start with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise BadAddress(f"{key}: no user or password in the URL; put them into a header")
    if not port:
        raise BadAddress(f"{key}: port 0 cannot be connected to")
    if (address := _literal(host)) and (why := refusal(address, port, ())):
        raise BadAddress(f"{key}: {why}")
    path = urllib.parse.quote(parts.path or "/", safe="/%:@!$&'()*+,;=~-._")
    return parts.scheme, host, port, path + (f"?{urllib.parse.quote(parts.query, safe='/%:@!$&()*+,;=~-._?')}" if parts.query else "")


def _literal(host: str) -> Address | None:
    """The address that a host spells, in any form a resolver takes: dotted, integer, hex, octal, IPv6."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def refusal(address: Address, port: int, own: Iterable[tuple[str, int]]) -> str | None:
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
    bound = _literal(host) if host not in ("", "localhost") else ipaddress.IPv4Address("127.0.0.1" if host else 0)
    if bound is None or bound.is_unspecified:
        return _is_local(address)
    return address == bound or ((address.is_loopback or address.is_unspecified) and bound.is_loopback)


def _is_local(address: Address) -> bool:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


# -- which records a destination takes --------------------------------------------------------------------------------

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
OPERATORS: Final = (
    "equals", "not_equals", "contains", "not_contains", "regex", "starts_with", "ends_with", *ORDERS, "exists", "not_exists"
)  # fmt: skip


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
            _check_rule(rule, f"{place}.rules[{r}]")


def _check_rule(rule: Any, place: str) -> None:
    _known(rule, ("field", "operator", "value"), place)
    name, operator, value = rule.get("field"), rule.get("operator"), rule.get("value")
    if name not in TEXT_FIELDS + NUMBER_FIELDS:
        raise ValueError(f"{place}.field: must be one of {', '.join(TEXT_FIELDS + NUMBER_FIELDS)}")
    if operator not in OPERATORS:
        raise ValueError(f"{place}.operator: must be one of {', '.join(OPERATORS)}")
    if operator in ("exists", "not_exists"):
        return
    if operator in ORDERS and _as_number(value) is None:
        raise ValueError(f"{place}.value: {operator} compares with a number")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)) > LONGEST_PATTERN:
        raise ValueError(f"{place}.value: must be text (at most {LONGEST_PATTERN} characters) or a number")
    if operator == "regex":
        try:
            re.compile(str(value))
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


def skip_reason(d: Destination, record: Record, search: Callable[[str, str], bool]) -> str | None:
    """Why this record is not for this destination; None: it takes it."""
    if d.api_keys and record.get("api_key_name") not in d.api_keys:
        return "api_key"
    seed = record.get("session_id") or record["generation_id"]
    # The name is part of the seed, so that each destination draws for itself; a session is in or out as a whole.
    if d.sampling_rate < 1 and int(_hash(f"{d.name}:{seed}")[:13], 16) >= d.sampling_rate * 16**13:
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
    values = {name: record.get(name) for name in ("provider", "session_id", "api_key_name")}
    values |= {"model": record.get("requested_model"), "user_id": record.get("user")}
    values |= {"finish_reason": answer.get("finish_reason"), "output": answer.get("content"), "input": _said(record)}
    values |= {"total_cost": _double(cost.get("total")), "prompt_tokens": sent, "completion_tokens": made}
    return values | {"total_tokens": sent + made if sent is not None and made is not None else None}


def _said(record: Record) -> str:
    blocks = (b for m in record.get("messages") or [] for b in _blocks(m) if isinstance(b, dict))
    texts = (b.get("text") for b in blocks)
    return "\n".join(text for text in (record.get("system"), *texts) if isinstance(text, str))


def _blocks(message: Any) -> list[Any]:
    content = message.get("content") if isinstance(message, dict) else None
    return content if isinstance(content, list) else [{"type": "text", "text": content}]


def _group(group: Mapping[str, Any], values: Mapping[str, Any], search: Callable[[str, str], bool]) -> bool:
    every = all if group.get("logic", "and") == "and" else any
    return every(_rule(rule, values[rule["field"]], search) for rule in group.get("rules", []))


def _rule(rule: Mapping[str, Any], have: Any, search: Callable[[str, str], bool]) -> bool:
    operator, want = rule["operator"], rule.get("value")
    if have is None or have == "" or operator in ("exists", "not_exists"):
        return operator in ("not_equals", "not_contains", "not_exists") if have in (None, "") else operator == "exists"
    if operator in ORDERS:
        number, limit = _as_number(have), _as_number(want)
        return number is not None and limit is not None and ORDERS[operator](number, limit)
    if operator.endswith("equals"):
        same = have == want if isinstance(have, str) and isinstance(want, str) else _as_number(have) == _as_number(want)
        return bool(same) == (operator == "equals")
    text, wanted = str(have), str(want)
    if operator == "regex":
        return search(wanted, text[:SEARCHED])
    if operator.endswith("contains"):
        return (wanted in text) == (operator == "contains")
    return text.startswith(wanted) if operator == "starts_with" else text.endswith(wanted)


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
                _warn("search", "a filter's regular expression took too long; the record was left out")
            return answer.strip() == "1"

    def _ask(self, line: str) -> str:
        if self._child is None:
            command = [sys.executable, "-I", "-S", "-c", SEARCH_PROGRAM]
            pipe = subprocess.PIPE
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


def _warn(key: str, message: str) -> None:
    """One line a minute for each kind of trouble; `message` never holds what a peer or a client wrote."""
    now = time.monotonic()
    if now - _warned.get(key, -60.0) >= 60:
        _warned[key] = now
        log.warning("broadcast: %s", message)


# ---------------------------------------------------------------------------------------------------------------------
# The store: one SQLite file
# ---------------------------------------------------------------------------------------------------------------------

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


class Queued(NamedTuple):
    seq: int
    payload: int
    bytes: int


class Store:
    """Destinations and queues. Every method is one transaction; none waits for a network.

    Kinds in the ledger: accepted, delivered, dropped:<reason>, queued, queued_bytes and skipped:<reason> (records a
    destination never was to have: sampled out, filtered, another key's).
    """

    def __init__(self, path: str, max_items: int, max_bytes: int) -> None:
        self._limits = max_items, max_bytes
        self._lock = threading.RLock()
        self._in_flight: dict[str, int] = {}
        _private_file(Path(path))
        self._db = sqlite3.connect(path, timeout=5, isolation_level=None, check_same_thread=False)
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

    def limit(self, max_items: int, max_bytes: int) -> None:
        with self._lock:
            self._limits = max_items, max_bytes

    def close(self) -> None:
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    # -- the queue

    def accept(self, offers: list[tuple[bytes, list[str]]], counts: Mapping[tuple[str, str], int]) -> None:
        """Put each fragment into the queues of its destinations, and count; the oldest make room for the newest."""
        with self._transaction() as db:
            for body, destinations in offers:
                payload = db.execute("INSERT INTO payload (body) VALUES (?)", (body,)).lastrowid
                rows = [(destination, payload, len(body)) for destination in destinations]
                db.executemany("INSERT INTO queue (destination, payload, bytes) VALUES (?, ?, ?)", rows)
            added = Counter(destination for _, destinations in offers for destination in destinations)
            size: Counter[str] = Counter()
            for body, destinations in offers:
                size.update(dict.fromkeys(destinations, len(body)))
            for destination, n in added.items():
                self._count(db, destination, accepted=n, queued=n, queued_bytes=size[destination])
                self._trim(db, destination)
            for (destination, kind), n in counts.items():
                self._count(db, destination, **{kind: n})

    def _count(self, db: sqlite3.Connection, destination: str, **kinds: int) -> None:
        statement = "INSERT INTO ledger VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET n = n + excluded.n"
        db.executemany(statement, [(destination, kind, n) for kind, n in kinds.items() if n])

    def _trim(self, db: sqlite3.Connection, destination: str) -> None:
        counts = dict(db.execute("SELECT kind, n FROM ledger WHERE destination = ?", (destination,)))
        items, size = counts.get("queued", 0) - self._limits[0], counts.get("queued_bytes", 0) - self._limits[1]
        if items <= 0 and size <= 0:
            return
        # Not what is on the wire just now: it could not be counted as dropped if it arrives.
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ? AND seq > ? ORDER BY seq"
        gone = []
        for row in map(Queued._make, db.execute(select, (destination, self._in_flight.get(destination, 0)))):
            if items <= 0 and size <= 0:
                break
            gone.append(row)
            items, size = items - 1, size - row.bytes
        self._remove(db, destination, gone)
        self._count(db, destination, **{"dropped:queue_full": len(gone)})

    def _remove(self, db: sqlite3.Connection, destination: str, rows: list[Queued]) -> None:
        db.executemany("DELETE FROM queue WHERE seq = ?", [(row.seq,) for row in rows])
        unused = "DELETE FROM payload WHERE id = ? AND NOT EXISTS (SELECT 1 FROM queue WHERE payload = ?)"
        db.executemany(unused, [(row.payload, row.payload) for row in rows])
        self._count(db, destination, queued=-len(rows), queued_bytes=-sum(row.bytes for row in rows))

    def batch(self, destination: str, most: int, until: int | None) -> list[tuple[int, bytes]]:
        """The head of the queue, not beyond `until`: at most `most` records and BATCH_BYTES, but always one."""
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ? AND seq <= ? ORDER BY seq LIMIT ?"
        with self._lock:
            rows: list[Queued] = []
            size = 0
            for row in map(Queued._make, self._db.execute(select, (destination, until or 2**62, most))):
                size += row.bytes + 1
                if rows and size > BATCH_BYTES:
                    break
                rows.append(row)
            if rows:
                self._in_flight[destination] = rows[-1].seq
            return [(row.seq, self._body(row.payload)) for row in rows]

    def _body(self, payload: int) -> bytes:
        body: bytes = self._db.execute("SELECT body FROM payload WHERE id = ?", (payload,)).fetchone()[0]
        return body

    def settle(self, destination: str, last: int, *, dropped: str = "", rejected: int = 0, error: str = "") -> None:
        """End the life of everything up to `last`: delivered but for `rejected`, or `dropped` with that reason."""
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ? AND seq <= ?"
        with self._transaction() as db:
            rows = [Queued._make(row) for row in db.execute(select, (destination, last))]
            if rows:  # none if the destination was deleted meanwhile
                self._remove(db, destination, rows)
                lost = len(rows) if dropped else min(rejected, len(rows))
                reason = f"dropped:{dropped or 'rejected'}"
                self._count(db, destination, **{"delivered": len(rows) - lost, reason: lost})
                self._note(db, destination, error, success=not dropped)
        self.release(destination)

    def release(self, destination: str) -> None:
        """What was on the wire is back in the queue."""
        with self._lock:
            self._in_flight.pop(destination, None)

    def note(self, destination: str, error: str) -> None:
        with self._transaction() as db:
            self._note(db, destination, error, success=False)

    def _note(self, db: sqlite3.Connection, destination: str, error: str, success: bool) -> None:
        db.execute("INSERT OR IGNORE INTO state (destination) VALUES (?)", (destination,))
        if error:
            update = "UPDATE state SET last_error = ?, last_error_at = ? WHERE destination = ?"
            db.execute(update, (error, _now(), destination))
        if success:
            db.execute("UPDATE state SET last_success = ? WHERE destination = ?", (_now(), destination))

    def ledger(self) -> dict[str, dict[str, int]]:
        with self._lock:
            counts: dict[str, dict[str, int]] = {}
            for destination, kind, n in self._db.execute("SELECT destination, kind, n FROM ledger"):
                counts.setdefault(destination, {})[kind] = n
            return counts

    def states(self) -> dict[str, tuple[str | None, str | None, str | None]]:
        with self._lock:
            rows = self._db.execute("SELECT destination, last_error, last_error_at, last_success FROM state")
            return {row[0]: row[1:] for row in rows}

    def keep_only(self, known: Iterable[str]) -> int:
        """Forget the queues and counts of destinations that are no more; gives how many records were still queued."""
        with self._transaction() as db:
            unknown = {row[0] for row in db.execute("SELECT DISTINCT destination FROM ledger")} - set(known)
            return sum(self._forget(db, destination) for destination in unknown)

    def _forget(self, db: sqlite3.Connection, destination: str) -> int:
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ?"
        rows = [Queued._make(row) for row in db.execute(select, (destination,))]
        self._remove(db, destination, rows)
        for table in ("ledger", "state"):
            db.execute(f"DELETE FROM {table} WHERE destination = ?", (destination,))
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
        with self._synced(), self._transaction() as db:
            db.execute(upsert, (identity, name, json.dumps(body), _now(), _now()))

    def delete(self, identity: str) -> None:
        with self._synced(), self._transaction() as db:
            db.execute("DELETE FROM destination WHERE id = ?", (identity,))
            self._forget(db, identity)

    def switch(self) -> dict[str, bool] | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = 'enabled'").fetchone()
            return json.loads(row[0]) if row else None

    def set_switch(self, enabled: bool, in_file: bool) -> None:
        value = json.dumps({"enabled": enabled, "in_file": in_file})
        with self._synced(), self._transaction() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('enabled', ?)", (value,))

    @contextlib.contextmanager
    def _synced(self) -> Iterator[None]:
        """Settings also outlive a power cut; the queue, written far more often, outlives the process."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                yield
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")


def _private_file(path: Path) -> None:
    """Make the file and what is missing above it for us alone, before anything is in it."""
    missing = [folder for folder in path.absolute().parents if not folder.exists()]
    for folder in reversed(missing):
        folder.mkdir(mode=0o700, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)  # SQLite gives its -wal and -shm the same
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


# ---------------------------------------------------------------------------------------------------------------------
# One delivery: one request to a checked address, under one deadline, and what the answer means
# ---------------------------------------------------------------------------------------------------------------------

ANSWER_BYTES: Final = 65_536  # the Collector's own exporter reads no more
RETRIED_STATUS: Final = (429, 502, 503, 504)  # the OTLP specification's list
RETRIED_CAUSES: Final = ("dns", "connect", "timeout", "tls", "cut", "disk")


class Answer(NamedTuple):
    """What one delivery came to. `message` is ours alone: nothing in it was written by the peer."""

    cause: str  # ok, rejected, http, redirect, html, garbage, too_long, address, dns, connect, timeout, tls, cut, disk
    message: str = ""
    status: int | None = None
    rejected: int = 0
    retry_after: float = 0.0
    said: str = ""  # partialSuccess.errorMessage, scrubbed: for the delivery counters, never for the test

    @property
    def retry(self) -> bool:
        return self.cause in RETRIED_CAUSES or (self.cause == "http" and self.status in RETRIED_STATUS)

    @property
    def reason(self) -> str:
        """Its name in the ledger."""
        if self.cause in ("http", "redirect"):
            return f"http_{self.status}"
        return {"html": "bad_answer", "garbage": "bad_answer", "too_long": "bad_answer", "address": "refused_address"}.get(
            self.cause, self.cause
        )


class _Refused(Exception):
    """The resolved address is one we do not send to."""


class Wire:
    """A connected socket of which every read and write shares one deadline: a peer that trickles cannot stretch it."""

    def __init__(self, connection: socket.socket, deadline: float) -> None:
        self._socket, self._deadline = connection, deadline

    def _tick(self) -> socket.socket:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._socket.settimeout(left)
        return self._socket

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._tick().send(view) :]

    def recv_into(self, buffer: Any) -> int:
        return self._tick().recv_into(buffer)

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


def exchange(
    to: Target, body: bytes, timeout: float, own: Iterable[tuple[str, int]], opened: Callable[[Wire], None] = lambda _: None
) -> Answer:
    """Send one OTLP JSON request and judge the answer; never raises for anything the peer or the network does."""
    deadline = time.monotonic() + timeout
    wire: Wire | None = None
    try:
        wire = _connect(to, deadline, list(own))
        opened(wire)
        return _converse(to, body, wire)
    except _Refused as error:
        return Answer("address", f"Not sent: {error}")
    except (socket.gaierror, UnicodeError):
        return Answer("dns", "The host name could not be resolved")
    except TimeoutError:
        return Answer("timeout", f"No complete answer within {timeout:g} s")
    except ssl.SSLCertVerificationError as error:
        return Answer("tls", f"The certificate was not accepted: {error.verify_message}")
    except (ssl.SSLError, ssl.CertificateError):
        return Answer("tls", "The TLS handshake failed")
    except (ConnectionError, http.client.IncompleteRead, http.client.RemoteDisconnected) as error:
        refused = wire is None
        return Answer("connect" if refused else "cut", _lost(error, refused))
    except http.client.HTTPException:
        return Answer("garbage", "The answer is not HTTP")
    except OSError as error:
        return Answer("connect", f"The connection failed: {os.strerror(error.errno) if error.errno else 'unreachable'}")
    finally:
        if wire:
            wire.hang_up()


def _lost(error: Exception, refused: bool) -> str:
    if not refused:
        return "The connection was cut before the answer was complete"
    return "The connection was refused" if isinstance(error, ConnectionRefusedError) else "The connection was cut at once"


def _connect(to: Target, deadline: float, own: list[tuple[str, int]]) -> Wire:
    """Resolve once, refuse if any address is refused, connect to exactly what was checked."""
    addresses = _resolve(to.host, to.port, deadline)
    for address in addresses:
        if why := refusal(address, to.port, own):
            raise _Refused(why)
    plain = _dial(addresses, to.port, deadline)
    if to.scheme == "http":
        return Wire(plain, deadline)
    try:
        plain.settimeout(max(0.001, deadline - time.monotonic()))  # Python counts a handshake against it as a whole
        return Wire(tls_context().wrap_socket(plain, server_hostname=to.host), deadline)
    except BaseException:
        plain.close()
        raise


def _dial(addresses: list[Address], port: int, deadline: float) -> socket.socket:
    for number, address in enumerate(addresses, 1):
        share = (deadline - time.monotonic()) / (len(addresses) - number + 1)
        try:
            return socket.create_connection((str(address), port), max(0.001, share))
        except OSError:
            if number == len(addresses):
                raise
    raise socket.gaierror


def _resolve(host: str, port: int, deadline: float) -> list[Address]:
    """The addresses of a host, within the deadline: a resolver has none of its own, so it waits in a thread."""
    if literal := _literal(host):
        return [literal]
    found: list[Address] = []
    failed: list[OSError] = []

    def ask() -> None:
        try:
            for *_, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                address = ipaddress.ip_address(str(place[0]).partition("%")[0])
                found.extend([address] if address not in found else [])
        except OSError as error:
            failed.append(error)

    asking = threading.Thread(target=ask, name="broadcast-resolve", daemon=True)
    asking.start()
    asking.join(max(0.001, deadline - time.monotonic()))
    if asking.is_alive():
        raise TimeoutError
    if failed or not found:
        raise socket.gaierror
    return found


_tls: list[ssl.SSLContext] = []


def tls_context() -> ssl.SSLContext:
    """One for all, made when first needed: reading the certificates takes longer than many a delivery."""
    if not _tls:
        _tls.append(ssl.create_default_context())
    return _tls[0]


def _converse(to: Target, body: bytes, wire: Wire) -> Answer:
    headers = {"Host": to.authority, "Content-Type": "application/json", "User-Agent": "opensourcellmrouter"}
    if not to.plain:
        body = _gzip(body)
        headers["Content-Encoding"] = "gzip"
    connection = http.client.HTTPConnection(to.host, to.port)
    connection.sock = wire
    connection.request(to.method, to.path, body, headers | {"Accept-Encoding": "identity"} | to.headers)
    with connection.getresponse() as response:
        read = response.read(ANSWER_BYTES + 1)
        if response.length and len(read) <= ANSWER_BYTES:
            raise http.client.IncompleteRead(read, response.length)
        return judge(response.status, response.headers, read, to)


def _gzip(body: bytes) -> bytes:
    packer = zlib.compressobj(5, zlib.DEFLATED, 31)
    return packer.compress(body) + packer.flush()


def judge(status: int, headers: http.client.HTTPMessage, body: bytes, to: Target) -> Answer:
    """Success is a 2xx with nothing in it, or with an OTLP answer that rejects nothing."""
    if 300 <= status < 400:
        return Answer("redirect", f"Redirected (HTTP {status}); redirects are not followed", status)
    if not 200 <= status < 300:
        return Answer("http", f"HTTP {status}", status, retry_after=retry_after(headers.get("Retry-After")))
    if headers.get("Content-Encoding", "identity").lower() in ("gzip", "x-gzip", "deflate"):
        body = _inflate(body)
    if len(body) > ANSWER_BYTES:
        return Answer("too_long", f"HTTP {status} with more than {ANSWER_BYTES} bytes, which is not an OTLP answer", status)
    kind, text = headers.get("Content-Type", "").lower(), body.strip()
    if not text:
        return Answer("ok", "Accepted", status)
    if "html" in kind or text.startswith(b"<"):
        return Answer("html", f"HTTP {status} with a web page instead of an OTLP answer", status)
    if "protobuf" in kind:
        return _partial(status, *_read_protobuf(body), to)
    if "json" in kind or text.startswith(b"{") or not to.plain:
        return _judge_json(status, text, to)
    return Answer("ok", "Accepted", status)


def _judge_json(status: int, text: bytes, to: Target) -> Answer:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        said = None
    if to.plain and said is not None and not isinstance(said, dict):
        return Answer("ok", "Accepted", status)
    if not isinstance(said, dict) or said.get("error") or said.get("errors"):
        return Answer("garbage", f"HTTP {status} with something else than an OTLP answer", status)
    partial = said.get("partialSuccess")
    partial = partial if isinstance(partial, dict) else {}
    number = str(partial.get("rejectedSpans") or 0)
    rejected = int(number) if re.fullmatch(r"[0-9]{1,18}", number) else 1
    return _partial(status, rejected, str(partial.get("errorMessage") or ""), to)


def _partial(status: int, rejected: int, said: str, to: Target) -> Answer:
    if not rejected:
        return Answer("ok", "Accepted", status)
    spans = "1 span" if rejected == 1 else f"{rejected} spans"
    return Answer("rejected", f"HTTP {status}, but {spans} rejected (partialSuccess)", status, rejected, said=_scrub(said, to))


def _scrub(text: str, to: Target) -> str:
    """A peer's sentence, short, printable and without anything we sent to sign in."""
    for value in to.headers.values():
        for secret in {value, value.partition(" ")[2]}:
            text = text.replace(secret, "…") if len(secret) > 3 else text
    return "".join(char if char.isprintable() else " " for char in text)[:200]


def _inflate(body: bytes) -> bytes:
    try:
        return zlib.decompressobj(47).decompress(body, ANSWER_BYTES + 1)
    except zlib.error:
        return b"garbage"


def _read_protobuf(body: bytes) -> tuple[int, str]:
    """rejected_spans and error_message of an ExportTraceServiceResponse (fields 1.1 and 1.2)."""
    rejected, said = 0, ""
    for number, value in _wire_fields(body):
        if number == 1 and isinstance(value, bytes):
            for inner, item in _wire_fields(value):
                rejected = item if inner == 1 and isinstance(item, int) else rejected
                said = item.decode("utf-8", "replace") if inner == 2 and isinstance(item, bytes) else said
    return rejected, said


def _wire_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Fields of a protobuf message, varints and byte strings; stops at anything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data) and shift < 64:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                break
            shift += 7
        return value

    while at < len(data):
        tag = varint()
        if tag & 7 == 0:
            yield tag >> 3, varint()
        elif tag & 7 == 2:
            length = varint()
            at += length
            yield tag >> 3, data[at - length : at]
        else:
            return


def retry_after(value: str | None) -> float:
    """Seconds that a Retry-After header asks for, as seconds or as a date; 0 for anything else."""
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    try:
        date = email.utils.parsedate_to_datetime(text)
        date = date if date.tzinfo else date.replace(tzinfo=UTC)
        return max(0.0, date.timestamp() - time.time())
    except (ValueError, OverflowError, IndexError, TypeError):
        return 0.0


def append(path: str, body: bytes) -> Answer:
    """Type `file`: one OTLP JSON request per line; what a full disk leaves behind is taken back."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
        try:
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
    if not body:
        return
    try:
        while line:
            line = line[os.write(descriptor, line) :]
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def send(d: Destination, body: bytes, timeout: float, own: Iterable[tuple[str, int]], **hooks: Any) -> Answer:
    """Deliver one document to a destination of any type."""
    return append(d.path, body) if d.type == "file" else exchange(target(d), body, timeout, own, **hooks)


# ---------------------------------------------------------------------------------------------------------------------
# Test Connection
# ---------------------------------------------------------------------------------------------------------------------


def connection_test(service_name: str) -> bytes:
    """OpenRouter's own test: one real span, because some gateways answer an empty request before they look at the key."""
    now = int(time.time() * 1000)
    span = {
        "traceId": f"{1:032x}",
        "spanId": f"{1:016x}",
        "name": f"{service_name}-connection-test",
        "kind": INTERNAL,
        "startTimeUnixNano": _nanos(now),
        "endTimeUnixNano": _nanos(now + 1),
        "status": {"code": 1},
        "attributes": [],
    }
    return to_bytes(_document({"attributes": _attributes([("service.name", service_name)])}, [span]))


def try_out(d: Destination, settings: Settings, own: Iterable[tuple[str, int]]) -> dict[str, Any]:
    """Send the test span to exactly this destination; {ok, status, latency_ms, message, advice}."""
    begun = time.monotonic()
    if d.type == "file":
        answer = append(d.path, b"")
    else:
        to = target(d)
        to = to._replace(headers=to.headers | {"X-Test-Connection": "true"}) if to.plain else to
        answer = exchange(to, connection_test(settings.service_name), settings.timeout, own)
    latency = round((time.monotonic() - begun) * 1000)
    return _result(answer, latency, "" if answer.cause == "ok" else advise(d, answer))


def _result(answer: Answer, latency: int, advice: str) -> dict[str, Any]:
    ok = answer.cause == "ok"
    return {"ok": ok, "status": answer.status, "latency_ms": latency, "message": answer.message, "advice": advice}


class Hint(NamedTuple):
    """One likely cause: when it applies, and the sentence."""

    cause: str
    status: tuple[int, ...]
    applies: Callable[[Destination, Target], bool]
    sentence: str


def _of(*types: str) -> Callable[[Destination, Target], bool]:
    return lambda d, _: d.type in types


def _port(*ports: int) -> Callable[[Destination, Target], bool]:
    return lambda _, to: to.port in ports


def _always(_: Destination, __: Target) -> bool:
    return True


HINTS: Final = tuple(
    Hint(*row)
    for row in (
        ("", (), _port(4317), "Port 4317 is OTLP over gRPC; OTLP over HTTP usually listens on 4318."),
        ("", (), _port(16686), "Port 16686 is Jaeger's web page; Jaeger takes OTLP over HTTP on 4318."),
        ("", (), _port(3200), "Port 3200 is Tempo's query API; Tempo takes OTLP over HTTP on 4318."),
        ("address", (), _always, "Name the receiver's real address; cloud metadata, link-local and the router itself are never sent to."),
        ("dns", (), _always, "Check the spelling of the host name, and that this machine can resolve it."),
        ("tls", (), _always, "The host does not speak TLS there, or its certificate does not fit its name or this machine's CA list (SSL_CERT_FILE)."),
        ("connect", (), _always, "Nothing answers at that host and port: is the receiver running, is the port right (4318 for OTLP over HTTP), is a firewall between?"),
        ("timeout", (), _always, "Host and port may be behind a firewall, or the receiver is overloaded; broadcast.timeout is the limit."),
        ("cut", (), _always, "Something closed the connection: often http:// sent to a TLS port, or a proxy between."),
        ("html", (), _of("grafana"), "That is a web page, not the gateway: use https://otlp-gateway-prod-<region>.grafana.net, not the address of your Grafana."),
        ("html", (), _always, "That is a web page, not the gateway: use the address that takes OTLP, usually ending in /v1/traces."),
        ("redirect", (), _of("grafana"), "Use https://otlp-gateway-prod-<region>.grafana.net, not the address of your Grafana."),
        ("redirect", (), lambda _, to: to.scheme == "http", "Try https:// : most redirects lead there, and a body with a key is never sent after one."),
        ("redirect", (), _always, "Use the address the redirect leads to; often it is a sign-in page, which means the URL is not the gateway's."),
        ("rejected", (), _always, "The receiver took the request but not the span: check its limits, its data set and the key's permissions."),
        ("too_long", (), _always, "The address answers with something large: it is not an OTLP receiver."),
        ("garbage", (), _always, "The address answers, but not as an OTLP/HTTP receiver: check host, port and path."),
        ("disk", (), _always, "Check the path, its permissions and the free space."),
        ("http", (401, 403), _of("grafana"), "Instance id and token are joined as Basic: check that the id is the stack's number and the token has traces:write."),
        ("http", (401, 403), _of("axiom"), "Check that the token may ingest and that the data set has exactly that name."),
        ("http", (401, 403), _of("honeycomb"), "Check the key, and that it belongs to that region (api.honeycomb.io or api.eu1.honeycomb.io)."),
        ("http", (401, 400, 503), _of("tempo"), "With multi-tenancy on, Tempo refuses spans without a tenant: fill in the tenant."),
        ("http", (401,), _always, "The key is missing or wrong: check the Authorization header, also whether it needs the word Bearer or Basic."),
        ("http", (403,), _always, "The key is known but may not write traces: check its permissions."),
        ("http", (404,), lambda _, to: not to.path.rstrip("/").endswith("/v1/traces"), "The path is used as it is: it usually ends in /v1/traces."),
        ("http", (404,), _of("grafana"), "Check the region: https://otlp-gateway-prod-<region>.grafana.net."),
        ("http", (404,), _always, "Nothing takes traces at that path: check host and path."),
        ("http", (405,), _always, "The address does not take this method: the path is probably not the receiver's."),
        ("http", (400,), _always, "The receiver did not accept the request: check that it takes OTLP as JSON, and the headers it wants."),
        ("http", (413,), _always, "The receiver's size limit is very low: raise it there."),
        ("http", (415,), _always, "The receiver does not take OTLP as JSON (some take only protobuf): put an OpenTelemetry Collector in between."),
        ("http", (429,), _always, "The receiver limits the rate: try again later, or lower the sampling rate."),
        ("http", (502, 503, 504), _always, "The receiver or what is behind it is down or overloaded: try again later."),
        ("http", (), lambda d, to: to.plain, "The webhook's program refused it: look into its log."),
        ("", (), _always, "Look into the receiver's log for the reason."),
    )
)  # fmt: skip


def advise(d: Destination, answer: Answer) -> str:
    """The likeliest cause in one sentence: the first hint that fits."""
    to = target(d) if d.type != "file" else Target("", "", 0, "", "", {}, False)
    fits = (h for h in HINTS if h.cause in ("", answer.cause) and (not h.status or answer.status in h.status))
    return next(h.sentence for h in fits if h.applies(d, to))


# ---------------------------------------------------------------------------------------------------------------------
# The threads: one writer, one worker per destination
# ---------------------------------------------------------------------------------------------------------------------

BACKOFF_FIRST = 1.0
BACKOFF_MOST = 30.0
GROUP_ITEMS: Final = 256  # records per commit
GROUP_WEIGHT: Final = 4 << 20


def weight(record: Record) -> int:
    """About how many bytes a record holds, without walking all of it."""
    answer = record.get("response") or {}
    total = 4_096 + len(answer.get("content") or "") + len(record.get("system") or "")
    for message in record.get("messages") or []:
        for block in _blocks(message):
            if isinstance(block, dict):
                total += sum(len(value) for value in block.values() if isinstance(value, str))
    return total


class Writer:
    """Takes records from request threads and commits them, a group at a time. The only place that encodes."""

    def __init__(self, owner: Broadcast) -> None:
        self._owner = owner
        self._inbox: deque[tuple[Record, int]] = deque()
        self._weight = self._lost = 0
        self._lock = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="broadcast-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record) -> None:
        """Called in the request's thread: an append. The inbox is only ever long while the disk does not answer."""
        heavy, limits = weight(record), self._owner.settings
        with self._lock:
            self._inbox.append((record, heavy))
            self._weight += heavy
            full = len(self._inbox) > limits.queue_max_items or self._weight > limits.queue_max_bytes
            if full and len(self._inbox) > 1:
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
            while True:
                group, lost = self._take()
                if not group and not lost:
                    break
                self._commit(*self._owner.offers(group, lost))

    def _commit(self, offers: list[tuple[bytes, list[str]]], counts: Mapping[tuple[str, str], int]) -> None:
        pause = 0.1
        while True:
            try:
                self._owner.store.accept(offers, counts)
                break
            except sqlite3.Error as error:
                _warn("store", f"the queue cannot be written ({type(error).__name__}); trying again")
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
        self._since, self._until = 0.0, 0  # the batch being retried: since when, and its last record
        self._wire: Wire | None = None
        self._thread = threading.Thread(target=self._run, name=f"broadcast-{entry.id[:12]}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def change(self, entry: Entry) -> None:
        """Go on with other settings, at once if it was waiting for the old ones to work."""
        self.entry = entry
        self._nudge.set()
        self._wake.set()

    def leave(self) -> None:
        """End when the queue is empty or the destination does not answer."""
        self._leave = True
        self._nudge.set()
        self._wake.set()

    def stop(self, timeout: float) -> None:
        """End now; what was on the wire stays queued and may arrive twice, under the same ids."""
        self.leave()
        self._thread.join(max(0.0, timeout))
        self._stop = True
        if wire := self._wire:
            wire.cut()
        self._thread.join(0.5)

    def _run(self) -> None:
        while not self._stop:
            self._wake.clear()
            try:
                if not self._step():
                    if self._leave:
                        return
                    self._wake.wait()
            except sqlite3.Error as error:
                if self._stop:
                    return
                _warn("store", f"the queue cannot be read or written ({type(error).__name__}); trying again")
                self._pause(1.0)
            except Exception as error:  # noqa: BLE001 - a thread that ends would keep its queue for ever
                log.error("broadcast: delivery to %r failed: %s", self.entry.destination.name, type(error).__name__)
                self._pause(BACKOFF_MOST)

    def _step(self) -> bool:
        """Deliver one batch, or find none."""
        entry, store = self.entry, self._owner.store
        batch = store.batch(entry.id, self._most, self._until or None)
        if not batch:
            emptied, self._until, self._tries = self._until, 0, 0  # what was being retried made room for newer ones
            return bool(emptied)
        answer = self._send(entry.destination, envelope(body for _, body in batch))
        if answer.retry:
            self._again(entry, batch[-1][0], answer)
        elif answer.status == 413 and len(batch) > 1:
            self._most = len(batch) // 2
            store.release(entry.id)
        else:
            self._settle(entry, batch[-1][0], answer)
        return not self._leave or not answer.retry

    def _send(self, d: Destination, body: bytes) -> Answer:
        settings = self._owner.settings
        try:
            return send(d, body, settings.timeout, self._owner.listening(), opened=self._opened)
        finally:
            self._wire = None

    def _opened(self, wire: Wire) -> None:
        self._wire = wire
        if self._stop:
            wire.cut()

    def _settle(self, entry: Entry, last: int, answer: Answer, dropped: str = "") -> None:
        dropped = dropped or ("" if answer.cause in ("ok", "rejected") else answer.reason)
        error = "" if answer.cause == "ok" else answer.message + (f": {answer.said}" if answer.said else "")
        if error:
            _warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}")
        while not self._stop:  # delivered is delivered: a disk that is full must not make it be sent again
            try:
                self._owner.store.settle(entry.id, last, dropped=dropped, rejected=answer.rejected, error=error)
                break
            except sqlite3.Error:
                _warn("store", "what was delivered cannot be written down; trying again")
                self._pause(0.5)
        self._until = self._tries = 0
        self._most = min(BATCH_ITEMS, self._most * 2)

    def _again(self, entry: Entry, last: int, answer: Answer) -> None:
        """Back off as the OTLP specification says, until max_elapsed has passed for this batch."""
        now = time.monotonic()
        if not self._tries:
            self._since, self._until = now, last
        left = self._since + self._owner.settings.max_elapsed - now
        pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self._tries, 16)) * random.uniform(0.5, 1.5)
        pause = max(pause, answer.retry_after)
        self._tries += 1
        if left <= 0:
            return self._settle(entry, last, answer, "max_elapsed")
        self._owner.store.release(entry.id)
        self._owner.store.note(entry.id, answer.message)
        _warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}; trying again")
        if not self._leave and not self._pause(min(pause, left)) and pause > left:
            self._settle(entry, last, answer, "max_elapsed")
        return None

    def _pause(self, seconds: float) -> bool:
        """Wait; true if something changed that is worth another try at once."""
        changed = self._nudge.wait(seconds)
        self._nudge.clear()
        return changed


class Entry(NamedTuple):
    """A destination as it is known here."""

    id: str
    destination: Destination
    source: str  # page | file
    created_at: str | None
    updated_at: str | None


# ---------------------------------------------------------------------------------------------------------------------
# Settings, and the whole
# ---------------------------------------------------------------------------------------------------------------------

MOST_DESTINATIONS: Final = 64
TESTS_AT_ONCE: Final = 4
TESTS_A_MINUTE: Final = 60
SECRETS: Final = ("api_key", "token", "access_token")
URLS: Final = ("endpoint", "base_url", "url")
OPEN_HEADERS: Final = frozenset(("x-axiom-dataset", "x-honeycomb-dataset", "x-scope-orgid", "x-tenant", "content-type"))
MARK: Final = "…"
EDITABLE: Final = ("name", "type", "enabled", "config", "privacy_mode", "sampling_rate", "api_keys", "filter_rules")
SHOWN_ONLY: Final = ("id", "source", "created_at", "updated_at")  # taken and ignored, so that what was read can be sent back
Reply = tuple[int, dict[str, Any]]


@dataclass(frozen=True)
class Settings:
    """The [broadcast] table."""

    enabled: bool = field(default=False, metadata=_doc("the Enable Broadcast switch; the page can change it"))
    service_name: str = field(default="openrouter", metadata=_doc("service.name; the default lets OpenRouter's queries work"))
    service_version: str = field(default="1.0.0", metadata=_doc("service.version"))
    database: str = field(default="state/broadcast.db", metadata=_doc("SQLite file: destinations made on the page, and the queues"))
    queue_max_items: int = field(default=10_000, metadata=_doc("per destination; more drop the oldest, counted"))
    queue_max_bytes: int = field(default=67_108_864, metadata=_doc("per destination; more drop the oldest, counted"))
    timeout: float = field(default=10.0, metadata=_doc("seconds for one delivery"))
    max_elapsed: float = field(default=3600.0, metadata=_doc("seconds for all tries of one batch"))
    test_required: bool = field(default=True, metadata=_doc("a destination is saved only if its test passes"))
    destinations: tuple[Destination, ...] = field(default=(), metadata=_doc("[[broadcast.destinations]], read-only on the page"))

    def __post_init__(self) -> None:
        for key, least, most in (
            ("queue_max_items", 1, 10**9),
            ("queue_max_bytes", 1_024, 2**40),
            ("timeout", 0.01, 600),
            ("max_elapsed", 0, 30 * 86_400),
        ):
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key}: must lie between {least} and {most}")
        for key in ("service_name", "service_version", "database"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key}: must not be empty")
        names = Counter(d.name for d in self.destinations)
        if doubled := [name for name, n in names.items() if n > 1]:
            raise ValueError(f"destinations: the name {doubled[0]!r} is used twice")


class _ApiError(Exception):
    """An answer of the settings API that is not a success."""

    def __init__(self, status: int, message: str, param: str | None = None, **more: Any) -> None:
        super().__init__(message)
        kind = {404: "not_found_error", 405: "invalid_request_error", 429: "rate_limit_error"}.get(status, "invalid_request_error")
        self.reply: Reply = status, {"error": {"message": message, "type": kind, "param": param, "code": None}, **more}


class Broadcast:
    """All of it: a sink for records, the threads behind it, the counters and the settings API.

    `start=False` is for commands beside a running router (doctor): it reads, tests and answers, but starts no thread
    and makes no file. Raises ValueError if the database cannot be used.
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
        if start:
            self._forget_removed()
            self._apply()

    # -- the sink

    def sink(self, event: Record) -> None:
        """Take a finished request's record; any other event is ignored. Never waits, never raises."""
        if event.get("type") != "complete":
            return
        self._latest = event
        if writer := self._writer:
            writer.put(event)

    def offers(self, group: list[Record], lost: int) -> tuple[list[tuple[bytes, list[str]]], Counter[tuple[str, str]]]:
        """What each record means for each destination: a fragment per kind of privacy, and counts of the rest."""
        counts: Counter[tuple[str, str]] = Counter()
        offers: list[tuple[bytes, list[str]]] = []
        takers = self._takers
        for entry in takers if lost else ():
            counts[entry.id, "accepted"] = counts[entry.id, "dropped:handover_full"] = lost
        for record in group:
            for privacy in (False, True):
                wanted = [e for e in takers if e.destination.privacy_mode == privacy]
                self._offer(record, wanted, privacy, offers, counts)
        return offers, counts

    def _offer(
        self,
        record: Record,
        wanted: list[Entry],
        privacy: bool,
        offers: list[tuple[bytes, list[str]]],
        counts: Counter[tuple[str, str]],
    ) -> None:
        try:
            skipped = {entry.id: skip_reason(entry.destination, record, self._search) for entry in wanted}
            counts.update((identity, f"skipped:{reason}") for identity, reason in skipped.items() if reason)
            taken = [identity for identity, reason in skipped.items() if not reason]
            self._given.update(dict.fromkeys(taken, record))
            if taken:
                body = fragment(self._encode(record, privacy))
                reason = "too_large" if len(body) > self.settings.queue_max_bytes else ""
                offers.extend([] if reason else [(body, taken)])
        except Exception as error:  # noqa: BLE001 - one record must not stop the others
            log.error("broadcast: a record could not be encoded: %s", type(error).__name__)
            taken, reason = [entry.id for entry in wanted], "encode_error"
        if taken and reason:
            counts.update({(identity, kind): 1 for identity in taken for kind in ("accepted", f"dropped:{reason}")})

    def _encode(self, record: Record, privacy: bool) -> dict[str, Any]:
        names = {"service_name": self.settings.service_name, "service_version": self.settings.service_version}
        return encode(record, privacy=privacy, **names)

    # -- destinations and threads

    @property
    def store(self) -> Store:
        return self._open()

    def _open(self) -> Store:
        with self._lock:
            if self._store is None:
                s = self.settings
                try:
                    self._store = Store(s.database, s.queue_max_items, s.queue_max_bytes)
                except (OSError, sqlite3.Error) as error:
                    why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                    raise ValueError(f"database: {s.database} cannot be used ({why}); move it away or mend it") from None
            return self._store

    @property
    def enabled(self) -> bool:
        """What the page chose last, unless the file was changed after that."""
        chosen = self._store.switch() if self._store else None
        in_file = self.settings.enabled
        return chosen["enabled"] if chosen and chosen["in_file"] == in_file else in_file

    def entries(self) -> list[Entry]:
        made = [Entry(_file_id(d.name), d, "file", None, None) for d in self.settings.destinations]
        for identity, body, created, updated in self._store.saved() if self._store else []:
            try:
                made.append(Entry(identity, _destination(body), "page", created, updated))
            except ValueError as error:
                _warn(identity, f"a saved destination is no longer valid and rests: {error}")
        return made

    def _forget_removed(self) -> None:
        """A destination that left config.toml takes its queue with it; page-made ones are removed by DELETE."""
        if self._store:
            known = [_file_id(d.name) for d in self.settings.destinations] + [row[0] for row in self._store.saved()]
            if lost := self._store.keep_only(known):
                log.warning("broadcast: %d queued records of removed destinations were dropped", lost)

    def _apply(self) -> None:
        """Let the threads fit the settings: none while switched off or without a destination."""
        with self._lock:
            if not self._started:
                return
            active = {e.id: e for e in self.entries() if e.destination.enabled} if self.enabled else {}
            self._takers = tuple(active.values())
            gone = [self._workers.pop(identity) for identity in list(self._workers) if identity not in active]
            if active and not self._writer:
                self._open()
                self._writer = Writer(self)
            if not active and self._writer:
                writer, self._writer = self._writer, None
                writer.stop(2.0)
            for identity, entry in active.items():
                if identity not in self._workers:
                    self._workers[identity] = Worker(self, entry)
                elif self._workers[identity].entry != entry:
                    self._workers[identity].change(entry)
        for worker in gone:
            worker.stop(0.0)

    def wake(self, destinations: Iterable[str]) -> None:
        workers = self._workers
        for identity in destinations:
            if worker := workers.get(identity):
                worker.wake()

    def reload(self, settings: Settings) -> None:
        """Go on with another [broadcast] table; only the database must stay the same."""
        if settings.database != self.settings.database:
            raise ValueError("database: can only be changed by a restart")
        with self._lock:
            self.settings = settings
            if self._store:
                self._store.limit(settings.queue_max_items, settings.queue_max_bytes)
            self._forget_removed()
            self._apply()

    def close(self, timeout: float) -> None:
        """Commit what was handed over, deliver what can be within `timeout`, and leave the rest in the database."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._started = False
            writer, self._writer = self._writer, None
            workers, self._workers = list(self._workers.values()), {}
        if writer:
            writer.stop(max(0.5, timeout))
        for worker in workers:
            worker.leave()
        for worker in workers:
            worker.stop(deadline - time.monotonic())
        self._search.close()
        if self._store:
            self._store.close()

    def stats(self) -> dict[str, Any]:
        """The `broadcast` object of GET /api/v1/stats."""
        ledger, states = (self._store.ledger(), self._store.states()) if self._store else ({}, {})
        shown = {
            entry.destination.name: _counters(entry.id, ledger.get(entry.id, {}), states.get(entry.id))
            for entry in self.entries()
        }
        return {"enabled": self.enabled, "destinations": shown}

    def doctor(self) -> list[dict[str, Any]]:
        """Test every enabled destination: [{place, ok, message, cure}]."""
        findings = []
        for entry in self.entries():
            if entry.destination.enabled:
                result = try_out(entry.destination, self.settings, self.listening())
                place = f"broadcast destination {entry.destination.name}"
                findings.append({"place": place, "ok": result["ok"], "message": result["message"], "cure": result["advice"]})
        return findings

    # -- the settings API

    def api(self, method: str, path: str, body: Any = None) -> Reply:
        """Answer a request below /api/v1/observability, its JSON body already read."""
        try:
            return self._route(method, path.rstrip("/"), body)
        except _ApiError as error:
            return error.reply
        except sqlite3.IntegrityError:
            return _ApiError(409, "Another destination has that name", "name").reply
        except (sqlite3.Error, OSError) as error:
            log.error("broadcast: the settings cannot be read or written: %s", type(error).__name__)
            return _ApiError(503, "The settings cannot be read or written now").reply
        except ValueError as error:
            return _bad(error).reply

    def _route(self, method: str, path: str, body: Any) -> Reply:
        for pattern, methods in ROUTES:
            if match := pattern.fullmatch(path):
                if method not in methods:
                    allow = sorted(methods)
                    raise _ApiError(405, f"Only {', '.join(allow)} here", None, allow=allow)
                return methods[method](self, body, *match.groups())
        raise _ApiError(404, "There is nothing here")

    def _get_switch(self, _: Any) -> Reply:
        return 200, {"enabled": self.enabled}

    def _put_switch(self, body: Any) -> Reply:
        _only(body, ("enabled",))
        if not isinstance(body.get("enabled"), bool):
            raise _ApiError(400, "enabled: must be true or false", "enabled")
        with self._lock:
            self.store.set_switch(body["enabled"], self.settings.enabled)
            self._apply()
        return 200, {"enabled": self.enabled}

    def _list(self, _: Any) -> Reply:
        return 200, {"destinations": [_shown(entry) for entry in self.entries()]}

    def _entry(self, identity: str) -> Entry:
        for entry in self.entries():
            if entry.id == identity:
                return entry
        raise _ApiError(404, "There is no such destination")

    def _editable(self, identity: str) -> Entry:
        entry = self._entry(identity)
        if entry.source == "file":
            raise _ApiError(403, "This destination is in config.toml; change it there")
        return entry

    def _get(self, _: Any, identity: str) -> Reply:
        return 200, _shown(self._entry(identity))

    def _post(self, body: Any) -> Reply:
        identity = str(uuid.uuid4())
        if len(self.entries()) >= MOST_DESTINATIONS:
            raise _ApiError(400, f"There are {MOST_DESTINATIONS} destinations already")
        return self._save(201, identity, body, None)

    def _put(self, body: Any, identity: str) -> Reply:
        return self._save(200, identity, body, self._editable(identity))

    def _save(self, status: int, identity: str, body: Any, stored: Entry | None) -> Reply:
        """Test exactly what is about to be stored, then store it: nothing changes if the test fails."""
        try:
            draft, merged = self._draft(body, stored)
        except BadAddress as error:
            raise _failed_test(_result(Answer("address", str(error)), 0, BAD_URL)) from None
        if any(e.id != identity and e.destination.name == draft.name for e in self.entries()):
            raise _ApiError(409, "Another destination has that name", "name")
        resting = stored is not None and not draft.enabled and _connection(draft) == _connection(stored.destination)
        if self.settings.test_required and not resting:
            result = self._tried(draft)
            if not result["ok"]:
                raise _failed_test(result)
        with self._lock:
            if stored:
                self._editable(identity)
            self.store.save(identity, draft.name, merged)
            self._apply()
        return status, _shown(self._entry(identity))

    def _delete(self, _: Any, identity: str) -> Reply:
        with self._lock:
            self._editable(identity)
            self.store.delete(identity)
            self._given.pop(identity, None)
            self._apply()
        return 200, {"id": identity, "deleted": True}

    def _test(self, body: Any) -> Reply:
        stored = None
        if isinstance(body, dict) and "id" in body:
            stored = self._entry(str(body["id"]))
        try:
            only_id = stored is not None and not set(body) - set(SHOWN_ONLY)
            draft = stored.destination if stored and only_id else self._draft(body, stored)[0]
        except BadAddress as error:
            return 200, _result(Answer("address", str(error)), 0, BAD_URL)
        return 200, self._tried(draft)

    def _tried(self, draft: Destination) -> dict[str, Any]:
        """One test, bounded in time, in number at once and in number a minute."""
        now = time.monotonic()
        with self._lock:
            if len(self._tested) == TESTS_A_MINUTE and now - self._tested[0] < 60:
                raise _ApiError(429, "Too many connection tests; wait a minute")
            self._tested.append(now)
        if not self._testing.acquire(blocking=False):
            raise _ApiError(429, "Too many connection tests at once; wait for the others")
        try:
            return try_out(draft, self.settings, self.listening())
        finally:
            self._testing.release()

    def _payload(self, _: Any, identity: str) -> Reply:
        """Exactly what this destination would get for the last record that is for it."""
        d = self._entry(identity).destination
        record = self._latest
        if record is None or skip_reason(d, record, self._search):
            record = self._given.get(identity)
        if record is None:
            return 200, {"generation_id": None, "request": _request_line(d), "payload": None}
        document = self._encode(record, d.privacy_mode)
        return 200, {"generation_id": record["generation_id"], "request": _request_line(d), "payload": document}

    def _draft(self, body: Any, stored: Entry | None) -> tuple[Destination, dict[str, Any]]:
        """The destination that `body` describes, on top of the stored one; masked values stand for what is stored."""
        _only(body, EDITABLE + SHOWN_ONLY)
        base = _body(stored.destination) if stored else {}
        merged = base | {key: body[key] for key in EDITABLE if key in body}
        if not isinstance(merged.get("type"), str) or merged["type"] not in TYPES:
            raise _ApiError(400, f"type: must be one of {', '.join(k for k in TYPES if k != 'file')}", "type")
        if merged["type"] == "file" and (stored is None or stored.source == "page"):
            raise _ApiError(400, "type: file destinations are made in config.toml only", "type")
        merged.setdefault("name", self._free_name(merged["type"]))
        config, kept = _unmask(_config(merged.get("config")), stored)
        merged["config"] = config
        made = _destination(merged)
        if kept and stored and (stored.destination.type == "file" or target(made).origin != target(stored.destination).origin):
            raise _ApiError(400, f"{kept[0]}: the address changed, so enter it again", f"config.{kept[0]}")
        return made, _body(made)

    def _free_name(self, kind: str) -> str:
        taken = {entry.destination.name for entry in self.entries()}
        return next(name for name in (kind, *(f"{kind} {n}" for n in range(2, 99))) if name not in taken)


ROUTES: Final[tuple[tuple[re.Pattern[str], dict[str, Callable[..., Reply]]], ...]] = (
    (re.compile(r""), {"GET": Broadcast._get_switch, "PUT": Broadcast._put_switch}),
    (re.compile(r"/destinations"), {"GET": Broadcast._list, "POST": Broadcast._post}),
    (re.compile(r"/destinations/test"), {"POST": Broadcast._test}),
    (re.compile(r"/destinations/([A-Za-z0-9-]{1,64})/payload"), {"GET": Broadcast._payload}),
    (
        re.compile(r"/destinations/([A-Za-z0-9-]{1,64})"),
        {"GET": Broadcast._get, "PUT": Broadcast._put, "DELETE": Broadcast._delete},
    ),
)
BAD_URL: Final = "Use the http:// or https:// address that takes OTLP over HTTP, usually ending in /v1/traces."


def _file_id(name: str) -> str:
    return f"file-{_hash(name)[:24]}"


def _counters(identity: str, counts: Mapping[str, int], state: tuple[str | None, ...] | None) -> dict[str, Any]:
    error, error_at, success = state or (None, None, None)

    def by_reason(prefix: str) -> dict[str, int]:
        return {kind.removeprefix(prefix): n for kind, n in sorted(counts.items()) if kind.startswith(prefix) and n}

    return {
        "id": identity,
        "accepted": counts.get("accepted", 0),
        "delivered": counts.get("delivered", 0),
        "dropped": by_reason("dropped:"),
        "queued": counts.get("queued", 0),
        "skipped": by_reason("skipped:"),
        "last_error": error,
        "last_error_at": error_at,
        "last_success": success,
    }


def _bad(error: ValueError) -> _ApiError:
    place = str(error).partition(":")[0]
    own = place.partition(".")[0] in OWN_FIELDS
    return _ApiError(400, str(error), f"config.{place}" if own else place)


def _failed_test(result: dict[str, Any]) -> _ApiError:
    return _ApiError(422, f"Not saved, the test failed: {result['message']}", None, **result)


def _only(body: Any, keys: tuple[str, ...]) -> None:
    if not isinstance(body, dict):
        raise _ApiError(400, "The body must be a JSON object")
    if unknown := sorted(key for key in body if key not in keys):
        raise _ApiError(400, f"{unknown[0]}: unknown key, only {', '.join(keys)}", unknown[0])


def _config(given: Any) -> dict[str, Any]:
    """The `config` object with our names (baseUrl is base_url) and text where text belongs."""
    if not isinstance(given, dict):
        raise _ApiError(400, "config: must be an object with the type's fields", "config")
    made = {re.sub(r"(?<=[a-z])([A-Z])", lambda m: f"_{m[1].lower()}", key): value for key, value in given.items()}
    for key, value in made.items():
        if key not in OWN_FIELDS or key == "path":
            raise _ApiError(400, f"config.{key}: unknown key", f"config.{key}")
        if key == "instance_id" and isinstance(value, int) and not isinstance(value, bool):
            made[key] = str(value)
        if key == "headers":
            made[key] = _pasted_headers(value)
        elif not isinstance(made[key], str):
            raise _ApiError(400, f"config.{key}: must be text", f"config.{key}")
        if any("${" in str(text) for text in (made[key].values() if key == "headers" else [made[key]])):
            raise _ApiError(400, f"config.{key}: ${{NAME}} works in config.toml only; enter the value", f"config.{key}")
    return made


def _pasted_headers(value: Any) -> dict[str, Any]:
    """Headers as a JSON object, or as the text of one."""
    if isinstance(value, str):
        try:
            value = json.loads(value or "{}")
        except (ValueError, RecursionError):
            value = None
    if not isinstance(value, dict):
        raise _ApiError(400, "config.headers: must be a JSON object of names and values", "config.headers")
    return value


def _destination(body: Mapping[str, Any]) -> Destination:
    """From the stored or sent form; raises ValueError naming the field."""
    wanted = {"name": str, "enabled": bool, "privacy_mode": bool, "sampling_rate": (int, float), "filter_rules": dict}
    shared = {key: body[key] for key in wanted if body.get(key) is not None}
    for key, value in shared.items():
        if not isinstance(value, wanted[key]) or (key == "sampling_rate" and isinstance(value, bool)):  # type: ignore[arg-type]
            raise ValueError(f"{key}: has the wrong type")
    keys = body.get("api_keys")
    if keys is not None and (not isinstance(keys, list) or not keys or not all(isinstance(k, str) and k for k in keys)):
        raise ValueError("api_keys: must be null for all, or a list of at least one name")
    return Destination(type=body["type"], api_keys=tuple(keys or ()), **shared, **body.get("config", {}))


def _connection(d: Destination) -> tuple[Any, ...]:
    return (d.type, *(getattr(d, name) for name in OWN_FIELDS))


def _body(d: Destination) -> dict[str, Any]:
    """The form that is stored and, masked, shown."""
    kind = TYPES[d.type]
    config = {name: getattr(d, name) for name in kind.required + kind.optional if getattr(d, name) not in ("", {})}
    return {
        "name": d.name,
        "type": d.type,
        "enabled": d.enabled,
        "config": config,
        "privacy_mode": d.privacy_mode,
        "sampling_rate": d.sampling_rate,
        "api_keys": list(d.api_keys) or None,
        "filter_rules": d.filter_rules or None,
    }


def _shown(entry: Entry) -> dict[str, Any]:
    body = _body(entry.destination)
    shown = {"id": entry.id} | body | {"config": _masked(body["config"])}
    return shown | {"source": entry.source, "created_at": entry.created_at, "updated_at": entry.updated_at}


def mask(value: str) -> str:
    return f"{value[:4]}{MARK}{value[-4:]}" if len(value) >= 16 else MARK


def _mask_field(name: str, value: str) -> str:
    if name in URLS:  # a key in the query is a secret too
        base, has_query, _ = value.partition("?")
        return f"{base}?{MARK}" if has_query else value
    return mask(value) if name in SECRETS else value


def _mask_header(name: str, value: str) -> str:
    return value if name.lower() in OPEN_HEADERS else mask(value)


def _masked(config: Mapping[str, Any]) -> dict[str, Any]:
    headers = {name: _mask_header(name, value) for name, value in config.get("headers", {}).items()}
    shown = {name: _mask_field(name, value) for name, value in config.items() if name != "headers"}
    return shown | ({"headers": headers} if headers else {})


def _unmask(config: dict[str, Any], stored: Entry | None) -> tuple[dict[str, Any], list[str]]:
    """Put what is stored in the place of its mask; gives the names that were kept. A mask of nothing is refused."""
    old = _body(stored.destination)["config"] if stored else {}
    kept: list[str] = []

    def value_of(place: str, given: Any, was: Any, shown: str | None) -> Any:
        if not isinstance(given, str) or MARK not in given:
            return given
        if was is None or given != shown:
            raise _ApiError(400, f"config.{place}: is masked, and nothing stored has that mask; enter it again", f"config.{place}")
        kept.append(place)
        return was

    made = dict(config)
    for name, given in config.items():
        was = old.get(name)
        if name != "headers":
            made[name] = value_of(name, given, was, _mask_field(name, was) if was else None)
            continue
        held = {key.lower(): value for key, value in (was or {}).items()}
        made[name] = {
            key: value_of(f"headers.{key}", value, held.get(key.lower()), _mask_header(key, held.get(key.lower(), "")))
            for key, value in given.items()
        }
    return made, kept


def _request_line(d: Destination) -> dict[str, Any]:
    if d.type == "file":
        return {"method": "append", "url": d.path, "headers": {}}
    to = target(d)
    url = _mask_field("url", f"{to.scheme}://{to.authority}{to.path}")
    headers = {name: _mask_header(name, value) for name, value in to.headers.items()}
    return {"method": to.method, "url": url, "headers": {"Content-Type": "application/json"} | headers}


# ---------------------------------------------------------------------------------------------------------------------
# Replay of a `file` destination
# ---------------------------------------------------------------------------------------------------------------------


def replay(path: str, settings: Settings, name: str, *, listening: Listening = set) -> dict[str, Any]:
    """Send the lines of a `file` destination to destination `name`, in order.

    Gives {lines, delivered, dropped: {reason: n}, last_error}. Waits as a delivery does while the destination does not
    answer. A private destination only gets lines that were written in private: content is never cut out of a line.
    Raises ValueError if there is no such destination, OSError if the file cannot be read.
    """
    broadcast = Broadcast(settings, listening=listening, start=False)
    d = next((e.destination for e in broadcast.entries() if e.destination.name == name), None)
    if d is None:
        raise ValueError(f"--to: there is no destination {name!r}")
    dropped: Counter[str] = Counter()
    lines, delivered, last_error = 0, 0, None
    with Path(path).open("rb") as file:
        for line in file:
            lines += 1
            reason, answer = _line_reason(line, d.privacy_mode), None
            if not reason:
                answer = _insist(d, line.strip(), settings, listening)
                reason = "" if answer.cause == "ok" else answer.reason
                last_error = answer.message if reason else last_error
            delivered += not reason
            dropped.update([reason] if reason else [])
    return {"lines": lines, "delivered": delivered, "dropped": dict(dropped), "last_error": last_error}


def _line_reason(line: bytes, privacy: bool) -> str:
    try:
        document = json.loads(line)
        spans = [s for r in document["resourceSpans"] for scope in r["scopeSpans"] for s in scope["spans"]]
        return "content" if privacy and any(map(_has_content, spans)) else ""
    except (ValueError, KeyError, TypeError, RecursionError):
        return "not_otlp"


def _has_content(span: Mapping[str, Any]) -> bool:
    keys = {pair.get("key") for pair in span.get("attributes", [])}
    told = span.get("status", {}).get("message")
    return bool(keys & CONTENT_KEYS) or told not in (None, *SENTENCES.values())


def _insist(d: Destination, line: bytes, settings: Settings, listening: Listening) -> Answer:
    begun, pause = time.monotonic(), BACKOFF_FIRST
    while True:
        answer = send(d, line, settings.timeout, listening())
        wait = max(pause, answer.retry_after)
        if not answer.retry or time.monotonic() + wait - begun > settings.max_elapsed:
            return answer
        time.sleep(wait)
        pause = min(BACKOFF_MOST, pause * 2)
