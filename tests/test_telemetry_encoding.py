"""Our protobuf of a tree against the official encoder's of the same spans."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans
from opentelemetry.sdk.trace import Event, ReadableSpan
from opentelemetry.trace import SpanContext, SpanKind, Status, StatusCode, TraceFlags, TraceState
from telemetry_records import a_record, a_stream, an_attempt

import telemetry
from telemetry import Span, Trace, begin, encode, spans

KINDS = {"server": SpanKind.SERVER, "client": SpanKind.CLIENT, "internal": SpanKind.INTERNAL}
CALLER = "00-12345678901234567890123456789012-1234567890123456-01"


def readable(trace: Trace, span: Span) -> ReadableSpan:
    """The span as the SDK would hold it."""

    def context(span_id: str, remote: bool = False) -> SpanContext:
        state = TraceState.from_header([trace.tracestate]) if trace.tracestate else None
        return SpanContext(int(trace.trace_id, 16), int(span_id, 16), remote, TraceFlags(trace.flags), state)

    parent = span["parent_span_id"]
    status = Status(StatusCode.ERROR, span["status_message"]) if span["status"] else Status(StatusCode.UNSET)
    return ReadableSpan(
        span["name"], context(span["span_id"]), kind=KINDS[span["kind"]], attributes=span["attributes"],
        parent=context(parent, parent == trace.parent_span_id) if parent else None, start_time=span["start_ns"],
        end_time=span["end_ns"], status=status,
        events=[Event(e["name"], e["attributes"], e["time_ns"]) for e in span["events"]],
    )  # fmt: skip


def assert_same(trace: Trace, tree: list[Span]) -> None:
    official = encode_spans([readable(trace, s) for s in tree]).resource_spans[0].scope_spans[0].spans
    assert list(ScopeSpans.FromString(encode(trace, tree)).spans) == list(official)


def test_a_stream_is_encoded_as_the_official_encoder_does_it() -> None:
    trace = begin(1.0, CALLER, "foo=1,bar=2")
    assert_same(trace, spans(a_stream(_trace=trace, user="größe �", tags=["a", "b"])))


def test_a_failure_with_its_event_is_encoded_as_the_official_encoder_does_it() -> None:
    trace = begin(1.0, None, None)
    failed = an_attempt(error="it failed", error_type="upstream_500", status=500)
    assert_same(trace, spans(a_record(_trace=trace, outcome="error", status=502, error="it failed", error_type="upstream_500",
                                      attempts=[failed])))  # fmt: skip


def test_a_captured_conversation_is_encoded_as_the_official_encoder_does_it() -> None:
    trace = begin(1.0, None, None)
    messages = [{"role": "user", "content": [{"type": "text", "text": "x" * 70_000}]}] * 3
    assert_same(trace, spans(a_record(_trace=trace, messages=messages), content=True))


values = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=300)
    | st.lists(st.text(max_size=10), max_size=5)
)  # fmt: skip
one_span = st.fixed_dictionaries({
    "name": st.text(min_size=1, max_size=2000), "kind": st.sampled_from(list(KINDS)), "span_id": st.just("00000000000000a1"),
    "parent_span_id": st.sampled_from([None, "1234567890123456", "fedcba9876543210"]), "start_ns": st.integers(0, 2**63),
    "end_ns": st.integers(0, 2**63), "attributes": st.dictionaries(st.text(max_size=150), values, max_size=8),
    "status": st.none(), "status_message": st.none(),
    "events": st.lists(st.fixed_dictionaries({
        "name": st.text(max_size=5), "time_ns": st.integers(0, 2**63),
        "attributes": st.dictionaries(st.text(max_size=5), st.text()),
    }), max_size=2),
})  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(one_span, st.booleans())
def test_whatever_a_span_holds_is_encoded_as_the_official_encoder_does_it(span: Span, failed: bool) -> None:
    if failed:
        span = {**span, "status": "error", "status_message": "ü" * 200}
    trace = begin(1.0, CALLER, "foo=1")
    ours = ScopeSpans.FromString(encode(trace, [span])).spans[0].SerializeToString(deterministic=True)
    official = encode_spans([readable(trace, span)]).resource_spans[0].scope_spans[0].spans[0]
    assert ours == official.SerializeToString(deterministic=True)  # as bytes, for NaN is not equal to itself


def test_resource_and_scope_frame_the_spans_of_an_export() -> None:
    resource = telemetry._resource(telemetry.Settings(resource={"deployment.environment": "test"}), "1.2.3")
    trace = begin(1.0, None, None)
    encoded = [encode(trace, spans(a_record(_trace=trace))), encode(trace, spans(a_stream(_trace=trace)))]
    made = ExportTraceServiceRequest.FromString(telemetry._export_request(encoded, telemetry._scope_head(resource, "1.2.3")))
    (one,) = made.resource_spans
    attributes: dict[str, Any] = {a.key: a.value for a in one.resource.attributes}
    assert attributes["service.name"].string_value == "opensourcellmrouter"
    assert attributes["deployment.environment"].string_value == "test"
    (scope,) = one.scope_spans
    assert (scope.scope.name, scope.scope.version) == ("opensourcellmrouter", "1.2.3")
    assert len(scope.spans) == 9
