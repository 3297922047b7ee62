"""The numbers of the last day: rates, percentiles and sums against the same computed from the plain list of requests."""

from __future__ import annotations

import json
import random
import sys
from typing import Any

import pytest
from telemetry_records import a_record, a_response

from dashboard import series

NOON = 1_800_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def numbers(clock: Clock) -> series.Series:
    return series.Series(clock)


def finished(**changes: Any) -> dict[str, Any]:
    return a_record(**{"ttft_ms": 100.0, "duration_ms": 1000.0, **changes})


def test_nothing_is_told_as_nothing(numbers):
    told = numbers.told("5m")
    assert told["requests_per_s"] == [None] * 60
    assert told["error_rate"] == [None] * 60
    assert told["latency_ms"]["p50"] == [None] * 60
    assert told["summary"]["requests"] == 0 and told["summary"]["error_rate"] is None
    assert told["providers"] == [] and told["models"] == []


@pytest.mark.parametrize("window", ["5m", "1h", "24h"])
def test_every_window_counts_every_request_of_its_span(numbers, clock, window):
    for _ in range(20):
        numbers.add(finished())
        clock.now += 10
    told = numbers.told(window)
    assert told["summary"]["requests"] == 20
    assert told["summary"]["input_tokens"] == 20 * 12 and told["summary"]["output_tokens"] == 20 * 5
    assert told["summary"]["cost"] == pytest.approx(20 * 0.3)
    assert told["summary"]["requests_per_s"] == pytest.approx(0.1, rel=0.01)
    assert len(told["buckets_ms"]) == len(told["requests_per_s"]) == series.WINDOWS[window][0]


def test_a_request_is_in_the_bucket_of_its_moment_and_leaves_the_window_with_it(numbers, clock):
    clock.now = NOON + 2
    numbers.add(finished())
    told = numbers.told("5m")
    assert told["buckets_ms"][-1] == NOON * 1000
    assert told["requests_per_s"][-1] == 0.5  # one request in the two seconds this bucket has lasted
    clock.now += 60
    told = numbers.told("5m")
    assert [i for i, rate in enumerate(told["requests_per_s"]) if rate] == [59 - 12]
    assert told["requests_per_s"][59 - 12] == 0.2
    clock.now += 299
    assert numbers.told("5m")["summary"]["requests"] == 0
    assert numbers.told("1h")["summary"]["requests"] == 1


def test_no_rate_is_made_of_a_time_before_the_start_nor_of_a_bucket_that_has_only_begun(numbers, clock):
    clock.now = NOON + 13
    assert numbers.told("5m")["requests_per_s"] == [None] * 57 + [0.0] * 3
    clock.now = NOON + 15.5
    assert numbers.told("5m")["requests_per_s"] == [None] * 56 + [0.0] * 3 + [None]


def test_a_day_of_silence_empties_every_bucket(numbers, clock):
    for _ in range(100):
        numbers.add(finished())
        clock.now += 77
    clock.now += 2 * 86_400
    for window in series.WINDOWS:
        assert numbers.told(window)["summary"]["requests"] == 0


def test_a_clock_that_is_set_back_loses_nothing(numbers, clock):
    numbers.add(finished())
    clock.now -= 7200
    numbers.add(finished())
    assert numbers.told("5m")["summary"]["requests"] == 2


@pytest.mark.parametrize("spread", [(0.2, 5.0), (20.0, 400.0), (900.0, 90_000.0)])
def test_percentiles_are_right_to_within_a_sixth(numbers, spread):
    drawn = random.Random(7)
    times = [drawn.uniform(*spread) for _ in range(2000)]
    for ms in times:
        numbers.add(finished(duration_ms=ms, ttft_ms=ms / 2))
    told = numbers.told("5m")["summary"]
    for name, share in series.PERCENTILES.items():
        exact = sorted(times)[int(share * len(times))]
        assert told["latency_ms"][name] == pytest.approx(exact, rel=1 / 6, abs=0.3)
        assert told["ttft_ms"][name] == pytest.approx(exact / 2, rel=1 / 6, abs=0.3)


def test_percentiles_hold_beyond_what_a_bin_can_count(numbers):
    for _ in range(70_000):
        numbers.add(finished(duration_ms=10.0))
    for _ in range(90_000):
        numbers.add(finished(duration_ms=1000.0))
    told = numbers.told("5m")["summary"]
    assert told["requests"] == 160_000
    assert told["latency_ms"]["p50"] == pytest.approx(1000, rel=1 / 6)
    assert told["latency_ms"]["p95"] == pytest.approx(1000, rel=1 / 6)


def test_only_answered_requests_have_a_latency_but_all_are_counted(numbers):
    numbers.add(finished(outcome="ok", duration_ms=100.0))
    numbers.add(finished(outcome="rejected", duration_ms=0.1, ttft_ms=None, provider=None, sent_model=None))
    numbers.add(finished(outcome="cancelled", duration_ms=90_000.0))
    told = numbers.told("5m")["summary"]
    assert told["requests"] == 3 and told["failed"] == 1
    assert told["error_rate"] == pytest.approx(1 / 3, abs=1e-4)
    assert told["latency_ms"]["p99"] == pytest.approx(100, rel=0.15)


def test_providers_and_models_are_told_apart(numbers):
    for _ in range(3):
        numbers.add(finished(provider="a", sent_model="small"))
    numbers.add(finished(provider="b", sent_model="small", outcome="error"))
    told = numbers.told("5m")
    assert {p["name"]: (p["requests"], p["failed"]) for p in told["providers"]} == {"a": (3, 0), "b": (1, 1)}
    assert [(m["name"], m["requests"]) for m in told["models"]] == [("small", 4)]
    assert numbers.told("5m", provider="b")["summary"]["requests"] == 1
    assert numbers.told("5m", model="small")["summary"]["requests"] == 4
    assert numbers.told("5m", provider="nobody")["summary"]["requests"] == 0


def test_names_beyond_the_cap_count_as_other_until_a_place_is_idle(numbers, clock):
    for i in range(30):
        numbers.add(finished(sent_model=f"m{i}"))
    told = {m["name"]: m["requests"] for m in numbers.told("5m")["models"]}
    assert told == {**{f"m{i}": 1 for i in range(10)}, "other": 20}
    clock.now += 86_400 + 1800
    numbers.add(finished(sent_model="new"))
    assert {m["name"]: m["requests"] for m in numbers.told("24h")["models"]} == {"new": 1}


def test_it_all_fits_into_a_megabyte_whatever_clients_call_their_models(numbers, clock):
    for i in range(500):
        numbers.add(finished(provider=f"p{i}", sent_model="m" * 100_000 + str(i)))
        clock.now += 60
    size = 0
    for window in numbers._windows.values():
        for (kind, name), group in window.groups.items():
            size += sys.getsizeof(group.sums) + sys.getsizeof(group.bins) + sys.getsizeof(kind) + sys.getsizeof(name)
    assert size <= 2**20


def test_what_an_upstream_claims_cannot_spoil_the_sums(numbers):
    for odd in (10**400, -5, float("inf"), float("nan"), None, "many", True):
        usage = {"input_tokens": odd, "output_tokens": odd}
        numbers.add(finished(response=a_response(usage=usage), cost={"total": odd}))
    told = numbers.told("5m")
    assert told["summary"]["requests"] == 7
    assert json.loads(json.dumps(told, allow_nan=False))["summary"]["input_tokens"] == 1.0  # true counts as one
