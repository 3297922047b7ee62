"""Finished requests as the pipeline hands them to its readers."""

from __future__ import annotations

import itertools
import json
from typing import Any

GENERATION_ID = "gen-1790606294-sdYHTGXUVyDKWCLqX5Op"  # the one in the capture, so that ids can be compared

ATTEMPT: dict[str, Any] = {
    "provider": "Amazon Bedrock",
    "model": "anthropic/claude-4.5-haiku-20251001",
    "format": "anthropic",
    "vendor": "aws.bedrock",
    "server_address": "bedrock.example",
    "server_port": 443,
    "kind": "anthropic_stream",
    "attempt": 1,
    "status": 200,
    "error": None,
    "error_type": None,
    "start_ms": 51.0,
    "duration_ms": 3668.0,
    "headers_ms": 757.0,
    "first_token_ms": 945.0,
    "request_id": "db4476cd-c371-4957-a825-fa17ea555835",
    "span_id": None,
    "timings": None,
}

RECORD: dict[str, Any] = {
    "type": "complete",
    "id": 1,
    "ts_ms": 1790606294318,
    "generation_id": GENERATION_ID,
    "trace_id": None,
    "client_format": "openai",
    "operation": "chat",
    "method": "POST",
    "route": "/v1/chat/completions",
    "client_address": "127.0.0.1",
    "api_key_name": "fixture key",
    "provider": "Amazon Bedrock",
    "provider_format": "anthropic",
    "vendor": "aws.bedrock",
    "server_address": "bedrock.example",
    "server_port": 443,
    "requested_model": "anthropic/claude-haiku-4.5",
    "sent_model": "anthropic/claude-4.5-haiku-20251001",
    "stream": True,
    "outcome": "ok",
    "status": 200,
    "error": None,
    "error_type": None,
    "duration_ms": 3723.0,
    "ttft_ms": 996.0,
    "overhead_ms": 51.0,
    "rule": "0:prefix",
    "reason": "prefix anthropic/",
    "tags": [],
    "plugins": [],
    "skipped_plugins": [],
    "dropped": [],
    "system": None,
    "messages": [{"role": "user", "content": [{"type": "text", "text": "Hello!"}]}],
    "tools": [],
    "request": {"model": "anthropic/claude-haiku-4.5", "stream": True},
    "response": {
        "id": "msg_1",
        "model": "anthropic/claude-haiku-4.5",
        "content": "Hi.",
        "reasoning": "Somebody greets.",
        "stop_reason": "tool_use",
        "finish_reason": "tool_calls",
        "native_finish_reason": "tool_use",
        "tool_calls": [{"id": "toolu_1", "name": "write", "arguments": '{"path":"wc.py"}'}],
        "usage": {
            "input_tokens": 2489,
            "output_tokens": 569,
            "cached_input_tokens": 0,
            "cache_write_input_tokens": 0,
            "reasoning_tokens": 145,
        },
        "tags": [],
    },
    "usage_source": "reported",
    "cost": {
        "input": 0.002489,
        "output": 0.002845,
        "total": 0.005334,
        "input_unit_price": 1e-06,
        "output_unit_price": 5e-06,
        "source": "configured",
    },
    "attempts": [ATTEMPT],
    "user": None,
    "session_id": None,
    "trace": {},
    "traceparent": None,
    "tracestate": None,
}

_numbers = itertools.count(1)


def record(**changes: Any) -> dict[str, Any]:
    """A finished request of its own id, with these changes."""
    number = next(_numbers)
    return RECORD | {"id": number, "generation_id": f"gen-1790606294-{number:020d}"} | changes


def failed(**changes: Any) -> dict[str, Any]:
    """A request whose only attempt was refused with a text that may quote anything."""
    attempt = ATTEMPT | {"status": 400, "error": "upstream said no", "error_type": "upstream_error", "headers_ms": None}
    wrong = {"outcome": "error", "status": 502, "error": "upstream said no", "error_type": "upstream_error"}
    return record(**{**wrong, "response": None, "usage_source": "none", "cost": None, "attempts": [attempt]} | changes)


def to_bytes(document: dict[str, Any]) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def attributes(span: dict[str, Any]) -> dict[str, Any]:
    """key -> value of a span, each key once."""
    pairs = [(pair["key"], next(iter(pair["value"].values()))) for pair in span["attributes"]]
    assert len(dict(pairs)) == len(pairs), "a key came twice"
    return dict(pairs)


def spans(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [span for entry in document["resourceSpans"] for scope in entry["scopeSpans"] for span in scope["spans"]]


def generation(document: dict[str, Any]) -> dict[str, Any]:
    """The one span that carries the request."""
    found = [span for span in spans(document) if attributes(span)["span.type"] == "generation"]
    assert len(found) == 1
    return found[0]
