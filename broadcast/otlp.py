"""OTLP/HTTP JSON (the OTLP specification's mapping of its protobuf messages), written straight as text.

Whatever values come in, what goes out is valid: ids are the caller's business, all else is repaired and marked beside it.
Written as text because every finished request passes through here once for each kind of privacy, and a tree of dicts that is
dumped afterwards takes three times as long.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any, Final

Pairs = list[tuple[str, Any]]

LONGEST_VALUE: Final = 10_000_000  # OpenRouter's own limit
LONGEST_KEY: Final = 256
LONGEST_NAME: Final = 1_024
INTERNAL, SERVER, CLIENT = 1, 2, 3
NANOS: Final = 1_000_000  # in a millisecond

_quoted = json.encoder.encode_basestring
_dumped = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


def envelope(fragments: Iterable[bytes]) -> bytes:
    """One export request of what `entries` gave, encoded."""
    return b'{"resourceSpans":[' + b",".join(fragments) + b"]}"


def entries(about: Pairs, scope: str, spans: Iterable[str]) -> str:
    """One `resourceSpans` entry per span, with the same resource and scope."""
    begin = f'{{"resource":{{"attributes":{attributes(about)}}},"scopeSpans":[{{"scope":{{"name":{_quoted(scope)}}},"spans":['
    return ",".join(f"{begin}{span}]}}]}}" for span in spans)


def span(
    trace_id: str, span_id: str, parent: str | None, name: str, kind: int, window: tuple[int, int], failed: str | None,
    attributes: str, events: str = "",
) -> str:  # fmt: skip
    """One span; `window` in milliseconds, `failed` why it failed, `attributes` and `events` as the functions here give them."""
    above = f'"parentSpanId":"{parent}",' if parent else ""
    status = f'{{"code":2,"message":{_quoted(clean(failed)[0])}}}' if failed else '{"code":1}'
    return (
        f'{{"traceId":"{trace_id}","spanId":"{span_id}",{above}"name":{_quoted(clean(name, LONGEST_NAME)[0])},"kind":{kind},'
        f'"startTimeUnixNano":"{window[0] * NANOS}","endTimeUnixNano":"{window[1] * NANOS}","status":{status},'
        f'"attributes":{attributes}' + (f',"events":[{events}]}}' if events else "}")
    )


def event(name: str, at_ms: int, pairs: Pairs) -> str:
    """One event of a span."""
    return f'{{"timeUnixNano":"{at_ms * NANOS}","name":{_quoted(name)},"attributes":{attributes(pairs)}}}'


def attributes(pairs: Pairs) -> str:
    """Key-values: None left out, keys unique, lists and objects as JSON text, every change marked beside it."""
    made: dict[str, str] = {}
    before, written, marks = None, "", list[str]()  # some long texts stand under several keys, one after the other
    for wanted, given in pairs:
        if given is None:
            continue
        key = wanted if _is_plain(wanted, LONGEST_KEY) and wanted not in made else _key(wanted, made)
        if isinstance(given, bool | int | float):
            made[key] = _number(given)
            continue
        if given is not before and isinstance(given, str) and _is_plain(given, LONGEST_VALUE):
            before, written, marks = given, f'{{"stringValue":{_quoted(given)}}}', []
        elif given is not before:
            text, marks = clean(given if isinstance(given, str) else as_json(given))
            before, written = given, f'{{"stringValue":{_quoted(text)}}}'
        made[key] = written
        for mark in marks:
            made[f"{key}.{mark}"] = '{"boolValue":true}'
    return "[" + ",".join([f'{{"key":{_quoted(key)},"value":{value}}}' for key, value in made.items()]) + "]"


def _is_plain(text: str, most: int) -> bool:
    """Is there nothing that `clean` would do to it?"""
    return len(text) <= most and text.isascii() and "\0" not in text


def _number(value: bool | int | float) -> str:
    if isinstance(value, bool):
        return '{"boolValue":true}' if value else '{"boolValue":false}'
    if isinstance(value, int):
        return f'{{"intValue":{value}}}' if -(2**63) <= value < 2**63 else f'{{"stringValue":"{_digits(value)}"}}'
    return f'{{"doubleValue":{value!r}}}' if math.isfinite(value) else f'{{"stringValue":"{_not_finite(value)}"}}'


def _not_finite(value: float) -> str:
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _digits(value: int) -> str:
    try:
        return str(value)
    except ValueError:  # more digits than Python converts
        return hex(value)


def _key(wanted: str, taken: Mapping[str, Any]) -> str:
    """A key nobody has yet: cut, repaired or doubled ones end in a digest of what was sent."""
    key, marks = clean(wanted, LONGEST_KEY)
    key = f"{key}~{digest(wanted)[:8]}" if marks else key
    while key in taken:
        key = f"{key[:LONGEST_KEY]}~{digest(key)[:8]}"
    return key


def digest(text: str) -> str:
    """SHA-256 in hex, of any text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def clean(text: str, most: int = LONGEST_VALUE) -> tuple[str, list[str]]:
    """Text that is valid UTF-8 without NUL (which databases behind a receiver refuse), and what was done to it."""
    text, marks = (text[:most], ["truncated"]) if len(text) > most else (text, [])
    if _is_plain(text, most):
        return text, marks
    # Through UTF-16, so that two halves that belong together become the character they spell.
    repaired = text.replace("\0", "\ufffd").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return repaired, marks if repaired == text else [*marks, "repaired"]


def as_json(value: Any) -> str:
    """JSON text of anything: what JSON has no word for becomes text."""
    try:
        return _dumped(value)
    except (ValueError, TypeError, RecursionError):
        return _dumped(_plain(value, 0))


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
