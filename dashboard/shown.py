"""What can be shown of an event: its JSON, cut to size and repaired where it must be, and a line about it for lists.

Nearly every record is written as JSON just as it is, which costs little. Only one that is too long, or that JSON or a browser
could not hold (lone surrogates, numbers without end), is copied with care first.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

CONTENT = ("system", "messages", "tools", "request", "response")
"""The keys of a record that hold what was said; they go last into its JSON, so that they can be cut off."""
LONGEST_TEXT = 32_768
CONTENT_CHARACTERS, HEAD_CHARACTERS, VALUE_CHARACTERS, LONGEST_KEY = 524_288, 32_768, 4_096, 256
LONE_SURROGATE = re.compile(rb"\\ud[89ab][0-9a-f]{2}(?!\\ud[c-f])|(?<!\\ud[89ab][0-9a-f]{2})\\ud[c-f]")
NODES = 20_000
DEEPEST = 110
PREVIEW = 160


def record_line(record: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """A record as JSON, with what was said at its end; and the part of it before that."""
    told = {key: value for key, value in record.items() if key not in CONTENT and key[0] != "_"}
    said = {key: record.get(key) for key in CONTENT}
    head = _line(told, HEAD_CHARACTERS, _cut_each)[:-1] + b","
    body = dumps(_newest_first(said)) if _is_giant(said) else _line(said, CONTENT_CHARACTERS, _newest_first)
    return head, head + body[1:]


def _is_giant(said: Mapping[str, Any]) -> bool:
    """Are the messages, images most likely, too much even at a glance? Then nobody need write all of it as JSON first."""
    blocks = (block for message in said["messages"] or () for block in message["content"] if isinstance(block, dict))
    return sum(len(v) for block in blocks for v in block.values() if type(v) is str) > CONTENT_CHARACTERS


def _line(value: dict[str, Any], characters: int, cut: Callable[[dict[str, Any]], dict[str, Any]]) -> bytes:
    """A table as JSON: as it is, if it can be, else cut to size and repaired."""
    try:
        line = dumps(value)
    except (TypeError, ValueError, RecursionError):
        return dumps(cut(value))
    fit = len(line) <= characters and (b"\\ud" not in line or not LONE_SURROGATE.search(line))
    return line if fit else dumps(cut(value))


def event_line(event: Mapping[str, Any]) -> bytes:
    """An event before the last one, as JSON."""
    return _line({key: value for key, value in event.items() if key[0] != "_"}, HEAD_CHARACTERS, _cut_each)


def _cut_each(table: dict[str, Any]) -> dict[str, Any]:
    """Every value cut on its own, so that none takes the room of another; the keys are ours."""
    return {key: Cut(VALUE_CHARACTERS)(value) for key, value in table.items()}


def _newest_first(said: dict[str, Any]) -> dict[str, Any]:
    """What was said, cut; the end of it is kept first should it be too much."""
    cut = Cut(CONTENT_CHARACTERS)
    short = {"response": cut(said["response"]), "request": cut(said["request"])}
    short["messages"] = [cut(message) for message in reversed(said["messages"] or [])][::-1]
    return {"system": cut(said["system"]), **short, "tools": cut(said["tools"])}


def without_content(record: Mapping[str, Any]) -> dict[str, Any]:
    cut = Cut(2_048)
    request = {k: v for k, v in (record.get("request") or {}).items() if isinstance(v, bool | int | float) or v is None}
    response = record.get("response")
    if response:
        said = ("content", "reasoning", "tool_calls")
        response = {**{k: cut(v) for k, v in response.items() if k not in said}, "content": "", "reasoning": None}
        response["tool_calls"] = []
    return {"system": None, "messages": [], "tools": [], "request": cut(request), "response": response, "content_held": False}


class Cut:
    """Makes a copy of a JSON-like value that is fit to be shown: long texts cut, numbers that JSON or a browser cannot
    hold as text, lone surrogates repaired, and in all no more than so many characters."""

    def __init__(self, characters: int) -> None:
        self._left, self._nodes = characters, NODES

    def __call__(self, value: Any, depth: int = 0) -> Any:
        kind = type(value)
        if kind is str:
            return self._text(value)
        if value is None or kind is bool:
            return value
        if kind is int:
            return value if -(2**63) < value < 2**63 else _digits(value)
        if kind is float:
            return value if math.isfinite(value) else None
        self._nodes -= 1
        if depth > DEEPEST or self._nodes < 0:
            return "…"
        if isinstance(value, Mapping):
            return {self._text(str(key), LONGEST_KEY): self(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self(item, depth + 1) for item in value]
        return self._text(str(value))

    def _text(self, text: str, at_least: int = 0) -> str:
        most = max(at_least, min(LONGEST_TEXT, self._left))
        if len(text) > most:
            text = f"{text[:most]}… ({len(text) - most} more characters)"
        self._left -= len(text)
        if text.isascii():
            return text
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _digits(number: int) -> str:
    """A whole number as text; of one with thousands of digits only its size, as Python would not print it."""
    return str(number) if number.bit_length() < 8_192 else f"about 10^{number.bit_length() * 0.30103:.0f}"


_encode = json.JSONEncoder(separators=(",", ":"), allow_nan=False, check_circular=False).encode


def dumps(value: Any) -> bytes:
    return _encode(value).encode("ascii")


_SUMMED = (
    "id", "ts_ms", "generation_id", "outcome", "status", "error_type", "provider", "requested_model", "sent_model", "stream",
    "duration_ms", "ttft_ms", "tags", "rule", "client_format", "operation", "api_key_name", "user", "session_id", "usage_source",
)  # fmt: skip


def summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """One line about a finished request, for lists."""
    response, cost, cut = record.get("response") or {}, record.get("cost") or {}, Cut(4_096)
    usage = response.get("usage") or {}
    told = {key: cut(_short(record.get(key))) for key in _SUMMED}
    told |= {"input_tokens": cut(usage.get("input_tokens")), "output_tokens": cut(usage.get("output_tokens"))}
    told |= {"cost": cut(cost.get("total")), "attempts": len(record.get("attempts") or ())}
    return told | {"prompt": cut(_prompt(record)), "answer": cut(_short(response.get("content") or "")), "stage": "complete"}


def _short(value: Any) -> Any:
    return value[:PREVIEW] if isinstance(value, str | list) else value


def _prompt(record: Mapping[str, Any]) -> str:
    """The beginning of what the user said last."""
    for message in reversed(record.get("messages") or []):
        blocks = message.get("content") if isinstance(message, Mapping) and message.get("role") == "user" else None
        for block in blocks if isinstance(blocks, list) else []:
            if isinstance(block, Mapping) and isinstance(block.get("text"), str):
                return str(block["text"][:PREVIEW])
    return ""


def mentions(value: Any, wanted: str) -> bool:
    """Does any text in there hold this one, whatever its case?"""
    if isinstance(value, str):
        return wanted in value.lower()
    if isinstance(value, Mapping):
        return any(mentions(item, wanted) for item in value.values())
    if isinstance(value, list):
        return any(mentions(item, wanted) for item in value)
    return False
