"""Records as the pipeline makes them, for tests that need no request."""

from __future__ import annotations

import time
from typing import Any

START = 1_700_000_000_000_000_000


def an_attempt(**changes: Any) -> dict[str, Any]:
    return {
        "provider": "up", "model": "llama3", "format": "openai", "vendor": "openai", "server_address": "127.0.0.1",
        "server_port": 9100, "kind": "openai_chat", "attempt": 1, "status": 200, "error": None, "error_type": None,
        "start_ms": 1.5, "duration_ms": 40.0, "headers_ms": 35.0, "first_token_ms": None, "request_id": "req-1",
        "span_id": "00000000000000a1", "timings": None, **changes,
    }  # fmt: skip


def a_response(**changes: Any) -> dict[str, Any]:
    usage = {
        "input_tokens": 12,
        "output_tokens": 5,
        "cached_input_tokens": 4,
        "cache_write_input_tokens": 2,
        "reasoning_tokens": 3,
    }
    return {
        "id": "chatcmpl-1", "model": "llama3-8b", "content": "hello", "reasoning": None, "stop_reason": "end_turn",
        "finish_reason": "stop", "native_finish_reason": "stop", "tool_calls": [], "usage": usage, "tags": [], **changes,
    }  # fmt: skip


def a_record(**changes: Any) -> dict[str, Any]:
    """The record of a whole answer that went well."""
    return {
        "type": "complete", "id": 1, "ts_ms": START // 1_000_000, "ts_ns": START, "trace_id": None,
        "generation_id": "gen-1700000000-abcdefghijklmnopqrst", "client_format": "openai", "operation": "chat", "method": "POST",
        "route": "/v1/chat/completions", "client_address": "127.0.0.1", "api_key_name": "team", "provider": "up",
        "provider_format": "openai", "vendor": "openai", "server_address": "127.0.0.1", "server_port": 9100,
        "requested_model": "gpt", "sent_model": "llama3", "stream": False, "outcome": "ok", "status": 200, "error": None,
        "error_type": None, "duration_ms": 45.0, "ttft_ms": None, "opened_ms": 43.0, "overhead_ms": 5.0, "rule": "first",
        "reason": "because", "tags": ["tools"], "plugins": [], "skipped_plugins": [], "dropped": [], "system": None,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}], "tools": [],
        "request": {"model": "gpt", "temperature": 0.5, "max_tokens": 100}, "response": a_response(),
        "usage_source": "reported",
        "cost": {"input": 0.1, "output": 0.2, "total": 0.3, "input_unit_price": 1e-6, "output_unit_price": 1e-6,
                 "source": "configured"},
        "attempts": [an_attempt()], "user": None, "session_id": None, "trace": {}, "traceparent": None, "tracestate": None,
        **changes,
    }  # fmt: skip


def a_stream(**changes: Any) -> dict[str, Any]:
    """The record of a streamed answer that went well: first token after 20 ms, last byte after 60 ms."""
    attempt = an_attempt(kind="openai_stream", duration_ms=58.0, headers_ms=10.0, first_token_ms=18.5)
    return a_record(**{"stream": True, "duration_ms": 60.0, "opened_ms": 20.0, "ttft_ms": 20.0, "attempts": [attempt], **changes})


def now_ns() -> int:
    return time.time_ns()
