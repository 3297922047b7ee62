"""A Broadcast at work on a database of its own, and the equation that must hold whatever was done to it."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from fake_collector import until

from broadcast import Broadcast, Destination, Settings


def collector(name: str, url: str, **more: Any) -> Destination:
    return Destination(name=name, type="otel-collector", endpoint=url, **more)


def configured(folder: Path, *destinations: Destination, **settings: Any) -> Settings:
    given: dict[str, Any] = {"enabled": True, "database": str(folder / "state" / "broadcast.db"), "destinations": destinations}
    return Settings(**(given | settings))


@contextmanager
def running(folder: Path, *destinations: Destination, listening: Any = set, **settings: Any) -> Iterator[Broadcast]:
    made = Broadcast(configured(folder, *destinations, **settings), listening=listening)
    try:
        yield made
        check_ledger(made)
    finally:
        made.close(0.5)


def counts(broadcast: Broadcast, name: str) -> dict[str, Any]:
    found: dict[str, Any] = broadcast.stats()["destinations"][name]
    return found


def check_ledger(broadcast: Broadcast) -> None:
    """accepted = delivered + dropped + queued for each destination, and the counters are what the tables hold."""
    for name, have in broadcast.stats()["destinations"].items():
        assert have["accepted"] == have["delivered"] + sum(have["dropped"].values()) + have["queued"], name
    database = Path(broadcast.settings.database)
    if not database.exists():
        return
    with closing(sqlite3.connect(database, timeout=5)) as db:
        db.execute("BEGIN")
        rows = {d: (n, size) for d, n, size in db.execute("SELECT destination, COUNT(*), SUM(bytes) FROM queue GROUP BY 1")}
        ledger = {(d, kind): n for d, kind, n in db.execute("SELECT destination, kind, n FROM ledger")}
        for destination in {d for d, _ in ledger}:
            have = tuple(ledger.get((destination, kind), 0) for kind in ("queued", "queued_bytes"))
            assert have == rows.get(destination, (0, 0))
        (orphans,) = db.execute("SELECT COUNT(*) FROM payload WHERE id NOT IN (SELECT payload FROM queue)").fetchone()
        assert orphans == 0


def settled(broadcast: Broadcast, name: str, accepted: int, seconds: float = 10.0) -> dict[str, Any]:
    """Wait until so many records were accepted and none is queued; gives the counters."""

    def done() -> dict[str, Any] | None:
        have = counts(broadcast, name)
        return have if have["accepted"] == accepted and not have["queued"] else None

    found: dict[str, Any] = until(done, seconds)
    return found
