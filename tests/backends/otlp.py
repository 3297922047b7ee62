"""Reads OTLP JSON, as a backend gives it back, into plain dicts a test can compare.

Strict where a sender may be wrong: an attribute named twice is an error, an integer stays int and a double float (0 is
0.0), ids are lower-case hex. Lenient where only the backends differ: numbers may be strings, enums numbers or names.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypedDict

KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
STATUSES = ("unset", "ok", "error")
TEMPORALITIES = ("unspecified", "delta", "cumulative")

# The JSON a backend returns is foreign; what it holds is asserted by the tests, not by the type checker.
Json = dict[str, Any]
Attributes = dict[str, Any]


class Scope(TypedDict):
    name: str
    version: str
    attributes: Attributes


class Event(TypedDict):
    name: str
    time: int
    attributes: Attributes


class Link(TypedDict):
    trace_id: str
    span_id: str
    attributes: Attributes


class Status(TypedDict):
    code: str
    message: str


class Span(TypedDict):
    trace_id: str
    span_id: str
    parent_span_id: str | None
    trace_state: str
    name: str
    kind: str
    start: int
    end: int
    attributes: Attributes
    status: Status
    events: list[Event]
    links: list[Link]
    resource: Attributes
    scope: Scope


class Point(TypedDict):
    """A number has `value`; a histogram has `count`, `sum`, `min`, `max`, `bounds` and `buckets`; the rest is None."""

    attributes: Attributes
    start: int
    time: int
    value: int | float | None
    count: int | None
    sum: float | None
    min: float | None
    max: float | None
    bounds: list[float]
    buckets: list[int]
    exemplars: list[Json]


class Metric(TypedDict):
    name: str
    description: str
    unit: str
    kind: str
    monotonic: bool | None
    temporality: str | None
    points: list[Point]
    resource: Attributes
    scope: Scope


class LogRecord(TypedDict):
    time: int
    observed: int
    severity: int
    severity_text: str
    event_name: str
    body: Any
    attributes: Attributes
    trace_id: str | None
    span_id: str | None
    resource: Attributes
    scope: Scope


def spans(export: Json) -> list[Span]:
    """Every span of one ExportTraceServiceRequest."""
    return [_span(*found) for found in _items(export, "resourceSpans", "scopeSpans", "spans")]


def metrics(export: Json) -> list[Metric]:
    """Every metric of one ExportMetricsServiceRequest."""
    return [_metric(*found) for found in _items(export, "resourceMetrics", "scopeMetrics", "metrics")]


def log_records(export: Json) -> list[LogRecord]:
    """Every record of one ExportLogsServiceRequest."""
    return [_log_record(*found) for found in _items(export, "resourceLogs", "scopeLogs", "logRecords")]


def value(raw: Json) -> Any:
    """A Python value of the same type as the OTLP AnyValue; an empty one is None."""
    for key, convert in _VALUES.items():
        if key in raw:
            return convert(raw[key])
    if raw:
        raise ValueError(f"unknown kind of value: {raw}")
    return None


def attributes(raw: Sequence[Json]) -> Attributes:
    """A dict of the key-value list; raises ValueError for a key that stands in it twice."""
    found: Attributes = {}
    for pair in raw:
        if pair["key"] in found:
            raise ValueError(f"attribute {pair['key']} is there twice")
        found[pair["key"]] = value(pair.get("value", {}))
    return found


def tree(spans: Iterable[Span], show: Sequence[str] = ()) -> str:
    """The spans as an indented text tree: name, kind, start after the first one, duration, status, the attributes asked
    for. A span whose parent is not among them is a root and says so."""
    ordered = sorted(spans, key=lambda span: (span["start"], -span["end"]))
    known = {span["span_id"] for span in ordered}
    roots = [span for span in ordered if span["parent_span_id"] not in known]
    began = ordered[0]["start"] if ordered else 0

    def lines(span: Span, lead: str, below: str) -> Iterator[str]:
        yield lead + _headline(span, began, known, show)
        children = [child for child in ordered if child["parent_span_id"] == span["span_id"]]
        for child in children:
            last = child is children[-1]
            yield from lines(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    return "\n".join(line for root in roots for line in lines(root, "", ""))


def _headline(span: Span, began: int, known: set[str], show: Sequence[str]) -> str:
    offset, duration = (span["start"] - began) / 1e6, (span["end"] - span["start"]) / 1e6
    parts = [span["name"], span["kind"].upper(), f"+{offset:.1f} ms", f"{duration:.1f} ms"]
    if span["status"]["code"] != "unset":
        parts.append(f"{span['status']['code'].upper()} {span['status']['message']}".rstrip())
    if span["parent_span_id"] and span["parent_span_id"] not in known:
        parts.append(f"(parent {span['parent_span_id']} is not here)")
    parts += [f"{key}={span['attributes'][key]}" for key in show if key in span["attributes"]]
    return "  ".join(parts)


def _items(export: Json, resources: str, scopes: str, items: str) -> Iterator[tuple[Json, Attributes, Scope]]:
    for resource in export.get(resources, []):
        of_resource = attributes(resource.get("resource", {}).get("attributes", []))
        for scope in resource.get(scopes, []):
            of_scope = _scope(scope.get("scope", {}))
            for item in scope.get(items, []):
                yield item, of_resource, of_scope


def _scope(raw: Json) -> Scope:
    return {
        "name": raw.get("name", ""),
        "version": raw.get("version", ""),
        "attributes": attributes(raw.get("attributes", [])),
    }


def _span(raw: Json, resource: Attributes, scope: Scope) -> Span:
    status = raw.get("status", {})
    return {
        "trace_id": identifier(raw["traceId"], 16),
        "span_id": identifier(raw["spanId"], 8),
        "parent_span_id": identifier(raw.get("parentSpanId"), 8) or None,
        "trace_state": raw.get("traceState", ""),
        "name": raw.get("name", ""),
        "kind": _enum(raw.get("kind"), KINDS, "SPAN_KIND_"),
        "start": int(raw.get("startTimeUnixNano", 0)),
        "end": int(raw.get("endTimeUnixNano", 0)),
        "attributes": attributes(raw.get("attributes", [])),
        "status": {
            "code": _enum(status.get("code"), STATUSES, "STATUS_CODE_"),
            "message": status.get("message", ""),
        },
        "events": [_event(event) for event in raw.get("events", [])],
        "links": [_link(link) for link in raw.get("links", [])],
        "resource": resource,
        "scope": scope,
    }


def _event(raw: Json) -> Event:
    return {
        "name": raw.get("name", ""),
        "time": int(raw.get("timeUnixNano", 0)),
        "attributes": attributes(raw.get("attributes", [])),
    }


def _link(raw: Json) -> Link:
    return {
        "trace_id": identifier(raw["traceId"], 16),
        "span_id": identifier(raw["spanId"], 8),
        "attributes": attributes(raw.get("attributes", [])),
    }


def _metric(raw: Json, resource: Attributes, scope: Scope) -> Metric:
    kind = next(name for name in ("sum", "gauge", "histogram", "exponentialHistogram", "summary") if name in raw)
    data = raw[kind]
    temporality = data.get("aggregationTemporality")
    return {
        "name": raw.get("name", ""),
        "description": raw.get("description", ""),
        "unit": raw.get("unit", ""),
        "kind": kind,
        # Absent means false in OTLP JSON, but only a sum has it at all.
        "monotonic": bool(data.get("isMonotonic")) if kind == "sum" else None,
        "temporality": _enum(temporality, TEMPORALITIES, "AGGREGATION_TEMPORALITY_") if temporality else None,
        "points": [_point(point) for point in data.get("dataPoints", [])],
        "resource": resource,
        "scope": scope,
    }


def _point(raw: Json) -> Point:
    return {
        "attributes": attributes(raw.get("attributes", [])),
        "start": int(raw.get("startTimeUnixNano", 0)),
        "time": int(raw.get("timeUnixNano", 0)),
        "value": _number(raw),
        "count": int(raw["count"]) if "count" in raw else None,
        "sum": float(raw["sum"]) if "sum" in raw else None,
        "min": float(raw["min"]) if "min" in raw else None,
        "max": float(raw["max"]) if "max" in raw else None,
        "bounds": [float(bound) for bound in raw.get("explicitBounds", [])],
        "buckets": [int(count) for count in raw.get("bucketCounts", [])],
        "exemplars": raw.get("exemplars", []),
    }


def _number(raw: Json) -> int | float | None:
    if "asInt" in raw:
        return int(raw["asInt"])
    return float(raw["asDouble"]) if "asDouble" in raw else None


def _log_record(raw: Json, resource: Attributes, scope: Scope) -> LogRecord:
    return {
        "time": int(raw.get("timeUnixNano", 0)),
        "observed": int(raw.get("observedTimeUnixNano", 0)),
        "severity": int(raw.get("severityNumber", 0)),
        "severity_text": raw.get("severityText", ""),
        "event_name": raw.get("eventName", ""),
        "body": value(raw.get("body", {})),
        "attributes": attributes(raw.get("attributes", [])),
        "trace_id": identifier(raw.get("traceId"), 16) or None,
        "span_id": identifier(raw.get("spanId"), 8) or None,
        "resource": resource,
        "scope": scope,
    }


def identifier(raw: str | None, size: int) -> str:
    """The id in hex: OTLP JSON has it so, protobuf's own JSON in base64; the two never have the same length."""
    if not raw or len(raw) == 2 * size:
        return raw or ""
    decoded = base64.b64decode(raw, validate=True)
    if len(decoded) != size:
        raise ValueError(f"an id of {size} bytes cannot be {raw!r}")
    return decoded.hex()


def _enum(raw: int | str | None, names: Sequence[str], prefix: str) -> str:
    if isinstance(raw, str) and not raw.isdigit():
        return raw.removeprefix(prefix).lower()
    return names[int(raw or 0)]


_VALUES: dict[str, Callable[[Any], Any]] = {
    "stringValue": str,
    "boolValue": bool,
    "intValue": int,
    "doubleValue": float,
    "bytesValue": base64.b64decode,
    "arrayValue": lambda raw: [value(item) for item in raw.get("values", [])],
    "kvlistValue": lambda raw: attributes(raw.get("values", [])),
}
