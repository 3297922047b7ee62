"""Whose child a request is: the rules of W3C Trace Context, the sampler, and the ids on a thread."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from router_process import ROOT

from telemetry import Trace, begin

CALLER = "00-12345678901234567890123456789012-1234567890123456-01"
TRACE_ID = "12345678901234567890123456789012"


def test_a_request_without_headers_begins_a_trace_of_its_own() -> None:
    trace = begin(1.0, None, None)
    assert re.fullmatch("[0-9a-f]{32}", trace.trace_id)
    assert re.fullmatch("[0-9a-f]{16}", trace.span_id)
    assert (trace.parent_span_id, trace.tracestate, trace.sampled) == (None, None, True)
    assert begin(1.0, None, None).trace_id != trace.trace_id


def test_a_caller_is_continued_with_a_span_id_of_our_own() -> None:
    trace = begin(1.0, CALLER, "foo=1,bar=2")
    assert (trace.trace_id, trace.parent_span_id, trace.tracestate) == (TRACE_ID, "1234567890123456", "foo=1,bar=2")
    assert trace.span_id != trace.parent_span_id


@pytest.mark.parametrize(
    "header",
    [
        f"00-{TRACE_ID}-1234567890123456-01.",
        f"00-{TRACE_ID}-1234567890123456-01-what-the-future-will-be-like",
        f"cc-{TRACE_ID}-1234567890123456-01.what-the-future-will-be-like",
        f"ff-{TRACE_ID}-1234567890123456-01",
        f".0-{TRACE_ID}-1234567890123456-01",
        f"000-{TRACE_ID}-1234567890123456-01",
        f"0-{TRACE_ID}-1234567890123456-01",
        "00-00000000000000000000000000000000-1234567890123456-01",
        f"00-{TRACE_ID}-0000000000000000-01",
        "00-.2345678901234567890123456789012-1234567890123456-01",
        f"00-{TRACE_ID}3-1234567890123456-01",
        f"00-{TRACE_ID[:-1]}-1234567890123456-01",
        f"00-{TRACE_ID}-123456789012345.-01",
        f"00-{TRACE_ID}-12345678901234567-01",
        f"00-{TRACE_ID}-123456789012345-01",
        f"00-{TRACE_ID}-1234567890123456-.0",
        f"00-{TRACE_ID}-1234567890123456-001",
        f"00-{TRACE_ID}-1234567890123456-1",
        f"00-{TRACE_ID.replace('1', 'A')}-1234567890123456-01",
        f"{CALLER},{CALLER}",
        f"{CALLER}, {CALLER}",
        f"00-{TRACE_ID}-1234567890123456-01\n",
        "",
        "x" * 300_000,
        "\ud800",
    ],
)
def test_a_bad_traceparent_is_ignored_and_its_tracestate_with_it(header: str) -> None:
    trace = begin(1.0, header, "foo=1")
    assert trace.trace_id not in (TRACE_ID, "0" * 32)
    assert (trace.parent_span_id, trace.tracestate) == (None, None)


@pytest.mark.parametrize(
    "header",
    [f" {CALLER}", f"\t {CALLER} \t", f"cc-{TRACE_ID}-1234567890123456-01", f"cc-{TRACE_ID}-1234567890123456-01-and-more"],
)
def test_white_space_and_future_versions_are_understood(header: str) -> None:
    assert begin(1.0, header, None).trace_id == TRACE_ID


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ("foo=1 \t , \t bar=2, \t baz=3", "foo=1,bar=2,baz=3"),
        ("foo=1,", "foo=1"),
        (",foo=1,,bar=2", "foo=1,bar=2"),
        ("", None),
        (",".join(f"bar{n:02d}={n:02d}" for n in range(32)), ",".join(f"bar{n:02d}={n:02d}" for n in range(32))),
        (",".join(f"bar{n:02d}={n:02d}" for n in range(33)), None),
        ("foo=1,foo=1", None),
        ("foo=1,foo=2", None),
        ("foo =1", None),
        ("FOO=1", None),
        ("foo.bar=1", None),
        ("foo@=1,bar=2", None),
        ("@foo=1,bar=2", None),
        ("foo@@bar=1,bar=2", None),
        ("foo@bar@baz=1,bar=2", None),
        ("foo=1," + "z" * 256 + "=1", "foo=1," + "z" * 256 + "=1"),
        ("foo=1," + "z" * 257 + "=1", None),
        ("foo=1," + "t" * 241 + "@" + "v" * 14 + "=1", "foo=1," + "t" * 241 + "@" + "v" * 14 + "=1"),
        ("foo=1," + "t" * 242 + "@v=1", None),
        ("foo=1,t@" + "v" * 15 + "=1", None),
        ("foo=bar=baz", None),
        ("foo=,bar=3", None),
        ("foo=\x7f", None),
        ("foo=b\u00e4r", None),
        ("a=1," * 100_000, None),
    ],
)
def test_a_tracestate_is_passed_on_whole_or_not_at_all(header: str, kept: str | None) -> None:
    assert begin(1.0, CALLER, header).tracestate == kept


def test_every_character_a_tracestate_may_hold_is_kept() -> None:
    key = "abcdefghijklmnopqrstuvwxyz0123456789_-*/"
    value = "".join(chr(c) for c in range(0x20, 0x7F) if chr(c) not in ",=")
    for entry in (f"{key}={value}", f"{key}@a-z0-9_-*/={value}"):
        assert begin(1.0, CALLER, entry).tracestate == entry


def test_a_tracestate_over_512_characters_loses_its_longest_entries_and_then_its_oldest() -> None:
    short = [f"s{n}={'x' * 40}" for n in range(10)]
    long = "l=" + "y" * 150
    assert begin(1.0, CALLER, ",".join([long, *short])).tracestate == ",".join(short)
    many = [f"s{n}={'x' * 100}" for n in range(10)]
    kept = begin(1.0, CALLER, ",".join(many)).tracestate
    assert kept == ",".join(many[:4])


def test_the_caller_decides_about_its_trace_whatever_the_ratio() -> None:
    assert begin(0.0, CALLER, None).sampled
    assert not begin(1.0, CALLER.removesuffix("01") + "00", None).sampled


@pytest.mark.parametrize("ratio", [0.0, 0.25, 1.0])
def test_new_traces_are_sampled_by_the_ratio(ratio: float) -> None:
    sampled = sum(begin(ratio, None, None).sampled for _ in range(4000)) / 4000
    assert abs(sampled - ratio) <= (0.05 if 0 < ratio < 1 else 0)


def test_the_ratio_decides_as_the_sdk_does() -> None:
    from opentelemetry.sdk.trace.sampling import Decision, TraceIdRatioBased

    sdk = TraceIdRatioBased(0.3)
    for trace in (begin(0.3, None, None) for _ in range(500)):
        assert trace.sampled == (sdk.should_sample(None, int(trace.trace_id, 16), "x").decision is Decision.RECORD_AND_SAMPLE)


def test_what_a_provider_is_told_names_the_span_that_calls_it() -> None:
    trace = begin(1.0, CALLER, None)
    child = trace.child_id()
    assert trace.traceparent(child) == f"00-{TRACE_ID}-{child}-01"
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-03", begin(1.0, None, None).traceparent(child))
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-02", begin(0.0, None, None).traceparent(child))


def test_ids_of_many_requests_are_all_different() -> None:
    made = [Trace("1" * 32, sampled=True) for _ in range(1000)]
    assert len({t.span_id for t in made} | {t.child_id() for t in made}) == 2000


def test_importing_the_room_imports_nothing_of_opentelemetry_and_starts_no_thread() -> None:
    script = (
        "import sys, threading, telemetry; telemetry.begin(1.0, None, None);"
        "assert threading.active_count() == 1;"
        "print([m for m in sys.modules if m.split('.')[0] in ('opentelemetry', 'google', 'requests', 'urllib3', 'http', 'ssl')])"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
