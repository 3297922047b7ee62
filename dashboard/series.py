"""The numbers of the last day: rates, percentiles, tokens and cost, in all and by provider and by model.

Each window is a ring of time buckets. A bucket holds five sums and two histograms whose bins grow by a quarter each, in
flat arrays that are made once: about 0.9 MB with every group in use, however many requests there are. Groups are capped;
what comes after is counted under `other`, until a group is idle for a day and gives up its place.
"""

from __future__ import annotations

import math
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping
from typing import Any

WINDOWS = {"5m": (60, 5), "1h": (60, 60), "24h": (48, 1800)}
"""Window -> (buckets, seconds of one)."""
MOST = {"provider": 7, "model": 10}
OTHER = "other"
SUMS = ("requests", "failed", "input_tokens", "output_tokens", "cost")
TIMES = ("latency_ms", "ttft_ms")
PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}
BINS = 60
PER_OCTAVE, LEAST = 3, 0.5  # the first bin begins at 0.5 ms, the last ends at 524 s
FULLEST = 65_535
SHORTEST = 1.0  # seconds a bucket must have lasted before a rate is made of it
FAILED = frozenset(("error", "timeout", "rejected"))


class Group:
    """The buckets of one window of one group."""

    def __init__(self, buckets: int) -> None:
        self.sums = array("d", bytes(8 * buckets * len(SUMS)))
        self.bins = array("H", bytes(2 * buckets * len(TIMES) * BINS))

    def clear(self, slot: int) -> None:
        """Empty a bucket for another span of time."""
        width = len(TIMES) * BINS
        self.sums[slot * len(SUMS) : (slot + 1) * len(SUMS)] = array("d", bytes(8 * len(SUMS)))
        self.bins[slot * width : (slot + 1) * width] = array("H", bytes(2 * width))

    def add(self, slot: int, amounts: Iterable[float], bins: Iterable[int | None]) -> None:
        """Count one request."""
        for i, amount in enumerate(amounts, slot * len(SUMS)):
            self.sums[i] += amount
        for i, bin in enumerate(bins, slot * len(TIMES)):
            if bin is not None:
                self._count(i * BINS, bin)

    def _count(self, start: int, bin: int) -> None:
        if self.bins[start + bin] == FULLEST:  # halved all together they keep their shape, which is all percentiles need
            for i in range(start, start + BINS):
                self.bins[i] //= 2
        self.bins[start + bin] += 1

    def sum(self, slot: int, name: str) -> float:
        return self.sums[slot * len(SUMS) + SUMS.index(name)]

    def histogram(self, slot: int, name: str) -> array[int]:
        start = (slot * len(TIMES) + TIMES.index(name)) * BINS
        return self.bins[start : start + BINS]

    def idle(self) -> bool:
        return not any(self.sums[:: len(SUMS)])


def _bin(milliseconds: float) -> int:
    if milliseconds <= LEAST:
        return 0
    return min(BINS - 1, int(PER_OCTAVE * math.log2(milliseconds / LEAST)))


def percentile(bins: Iterable[float], share: float) -> float | None:
    """The value below which that share of a histogram lies, to within a sixth, mostly much closer."""
    bins = list(bins)
    rank = share * sum(bins)
    if not rank:
        return None
    for bin, count in enumerate(bins):
        if count and rank <= count:
            return float(f"{LEAST * 2 ** ((bin + rank / count) / PER_OCTAVE):.3g}")
        rank -= count
    return None


def _percentiles(bins: Iterable[float]) -> dict[str, float | None]:
    bins = list(bins)
    return {name: percentile(bins, share) for name, share in PERCENTILES.items()}


class Window:
    """One ring of buckets for every group; a slot is emptied when time comes round to it again."""

    def __init__(self, buckets: int, step: int) -> None:
        self.buckets, self.step = buckets, step
        self.groups: dict[tuple[str, str], Group] = {}
        self.now = 0

    def advance(self, now: float) -> int:
        """The slot of this moment. A clock that was set back keeps filling the newest bucket."""
        number = max(self.now, int(now // self.step))
        for passed in range(max(self.now + 1, number - self.buckets + 1), number + 1):
            for group in self.groups.values():
                group.clear(passed % self.buckets)
        self.now = number
        return number % self.buckets

    def slots(self) -> list[int]:
        """Oldest first."""
        return [number % self.buckets for number in range(self.now - self.buckets + 1, self.now + 1)]


class Series:
    """Adds up finished requests; tells them as series for charts."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock, self._started = clock, clock()
        self._lock = threading.Lock()
        self._windows = {name: Window(*shape) for name, shape in WINDOWS.items()}
        self._names: dict[str, list[str]] = {kind: [] for kind in MOST}
        self._open(("", ""))

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a finished request. Percentiles are those of requests that were answered."""
        usage = (record.get("response") or {}).get("usage") or {}
        tokens = (_number(usage.get("input_tokens")), _number(usage.get("output_tokens")))
        cost = _number((record.get("cost") or {}).get("total"))
        amounts = (1.0, float(record["outcome"] in FAILED), *tokens, cost)
        ok = record["outcome"] == "ok"
        bins = [_bin(ms) if ok and ms is not None else None for ms in (record["duration_ms"], record["ttft_ms"])]
        with self._lock:
            now = self._clock()
            slots = [(window, window.advance(now)) for window in self._windows.values()]
            for key in (("", ""), *self._keys(record)):
                for window, slot in slots:
                    window.groups[key].add(slot, amounts, bins)

    def _keys(self, record: Mapping[str, Any]) -> list[tuple[str, str]]:
        """The groups a request belongs to; one without a provider belongs to none."""
        told = {"provider": record["provider"], "model": record["sent_model"] or record["requested_model"]}
        return [(kind, self._place(kind, str(name)[:128])) for kind, name in told.items() if name]

    def _place(self, kind: str, name: str) -> str:
        """The name under which a group counts: its own if there is a place."""
        names = self._names[kind]
        if name in names:
            return name
        if len(names) == MOST[kind]:
            idle = next((n for n in names if self._windows["24h"].groups[kind, n].idle()), None)
            if idle is None:
                name = OTHER
            else:
                names.remove(idle)
        if name not in names and name != OTHER:
            names.append(name)
        self._open((kind, name))
        return name

    def _open(self, key: tuple[str, str]) -> None:
        for window in self._windows.values():
            if key not in window.groups or key[1] != OTHER:
                window.groups[key] = Group(window.buckets)

    def told(self, name: str, provider: str | None = None, model: str | None = None) -> dict[str, Any]:
        """A window's series for everything, or for one provider or one model; and the sums of each."""
        asked = ("provider", provider) if provider else ("model", model) if model else ("", "")
        with self._lock:
            now, window = self._clock(), self._windows[name]
            window.advance(now)
            group = window.groups.get(asked) or Group(window.buckets)
            sums = {
                kind: [self._sums(window, key[1], g, now) for key, g in window.groups.items() if key[0] == kind] for kind in MOST
            }
            return {
                "window": name, "step_s": window.step, "now_ms": int(now * 1000),
                "buckets_ms": [(window.now - i) * window.step * 1000 for i in range(window.buckets - 1, -1, -1)],
                "group": {"provider": provider, "model": model},
                **self._course(window, group, now), "summary": self._sums(window, "", group, now),
                **{f"{kind}s": [told for told in sums[kind] if told["requests"]] for kind in MOST},
            }  # fmt: skip

    def _course(self, window: Window, group: Group, now: float) -> dict[str, Any]:
        """Each number bucket by bucket; the newest bucket counts as far as it has come."""
        slots = window.slots()
        first, oldest = int(self._started // window.step), window.now - window.buckets + 1
        lengths = [float(window.step) if oldest + i >= first else 0.0 for i in range(window.buckets - 1)]
        lengths.append(now - window.now * window.step)
        sums = {name: [group.sum(slot, name) for slot in slots] for name in SUMS}
        rates = {
            f"{name}_per_s": [_rate(n, seconds) for n, seconds in zip(sums[name], lengths, strict=True)]
            for name in ("requests", "failed", "input_tokens", "output_tokens")
        }
        shares = [round(f / n, 4) if n else None for f, n in zip(sums["failed"], sums["requests"], strict=True)]
        times = {name: [_percentiles(group.histogram(slot, name)) for slot in slots] for name in TIMES}
        courses = {name: {p: [t[p] for t in told] for p in PERCENTILES} for name, told in times.items()}
        return {**rates, "error_rate": shares, **courses, "cost": [float(f"{n:.6g}") for n in sums["cost"]]}

    def _sums(self, window: Window, name: str, group: Group, now: float) -> dict[str, Any]:
        """A group's numbers over the whole window, as far back as this process lived."""
        slots = window.slots()
        told: dict[str, Any] = {"name": name, **{key: sum(group.sum(slot, key) for slot in slots) for key in SUMS}}
        lived = max(1.0, min(window.buckets * window.step, now - self._started))
        told["requests_per_s"] = float(f"{told['requests'] / lived:.4g}")
        told["error_rate"] = round(told["failed"] / told["requests"], 4) if told["requests"] else None
        for times in TIMES:
            told[times] = _percentiles(_together(group, slots, times))
        return told


def _together(group: Group, slots: Iterable[int], name: str) -> list[float]:
    """The histograms of several buckets as one; each weighs as much as its bucket had requests (bins may be halved)."""
    whole = [0.0] * BINS
    for slot in slots:
        bins = group.histogram(slot, name)
        if counted := sum(bins):
            weight = group.sum(slot, "requests") / counted
            whole = [have + n * weight for have, n in zip(whole, bins, strict=True)]
    return whole


def _rate(amount: float, seconds: float) -> float | None:
    """None of a bucket that has only begun, or ended before this process did begin."""
    return float(f"{amount / seconds:.4g}") if seconds >= SHORTEST else None


def _number(value: Any) -> float:
    """A sum that cannot be spoilt by what an upstream claims."""
    return float(value) if isinstance(value, int | float) and 0 <= value < 1e15 else 0.0
