"""The SQLite file: the destinations made on the page, and one queue per destination.

Every count lives in the same transaction as the rows it counts, so `accepted = delivered + dropped + queued` holds across
kill -9. A body is stored once for all the queues it is in. What the page saves is on disk when the call returns; the
queues, written far more often, outlive a crash of the process but not every power cut.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any, Final, NamedTuple

BATCH_ITEMS: Final = 64
BATCH_BYTES: Final = 1 << 20

SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS destination (
    id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, body TEXT NOT NULL, created_at TEXT NOT NULL, updated_at TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS payload (
    id INTEGER PRIMARY KEY AUTOINCREMENT, body BLOB NOT NULL, private INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS queue (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, destination TEXT NOT NULL, payload INTEGER NOT NULL, bytes INTEGER NOT NULL);
CREATE INDEX IF NOT EXISTS queue_order ON queue (destination, seq);
CREATE INDEX IF NOT EXISTS queue_payload ON queue (payload);
CREATE TABLE IF NOT EXISTS ledger (
    destination TEXT NOT NULL, kind TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (destination, kind));
CREATE TABLE IF NOT EXISTS state (
    destination TEXT PRIMARY KEY, last_error TEXT, last_error_at TEXT, last_success TEXT);
"""
Offers = list[tuple[bytes, bool, list[str]]]  # fragments, whether built without content, and the destinations that take each
Counts = Mapping[tuple[str, str], int]  # (destination, kind) -> n


class Queued(NamedTuple):
    seq: int
    payload: int
    bytes: int


class Waiting(NamedTuple):
    """A record at the head of a queue."""

    seq: int
    body: bytes
    private: bool


class Store:
    """Destinations and queues. Every method is one transaction; none waits for a network.

    Kinds in the ledger: accepted, delivered, dropped:<reason>, queued, queued_bytes, and skipped:<reason> for records a
    destination was never to have (sampled out, filtered, another key's).
    """

    def __init__(self, path: str, max_items: int, max_bytes: int) -> None:
        self._limits = max_items, max_bytes
        self._deleted: set[str] = set()
        self._lock = threading.RLock()
        _private_file(Path(path))
        self._db = sqlite3.connect(path, timeout=2, isolation_level=None, check_same_thread=False)
        for pragma in ("journal_mode=WAL", "synchronous=NORMAL", "journal_size_limit=16777216"):
            self._db.execute(f"PRAGMA {pragma}")
        self._db.executescript(SCHEMA)
        columns = [row[1] for row in self._db.execute("PRAGMA table_info(payload)")]
        if "private" not in columns:  # a file of before there was such a mark
            self._db.execute("ALTER TABLE payload ADD COLUMN private INTEGER NOT NULL DEFAULT 0")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _synced(self) -> Iterator[sqlite3.Connection]:
        """A transaction that also outlives a power cut, for settings."""
        with self._lock:
            self._db.execute("PRAGMA synchronous=FULL")
            try:
                with self._transaction() as db:
                    yield db
            finally:
                self._db.execute("PRAGMA synchronous=NORMAL")

    def limit(self, max_items: int, max_bytes: int) -> None:
        with self._lock:
            self._limits = max_items, max_bytes

    def close(self) -> None:
        with self._lock:
            with contextlib.suppress(sqlite3.Error):
                self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            self._db.close()

    # -- the queue

    def accept(self, offers: Offers, counts: Counts) -> None:
        """Put each fragment into the queues of its destinations, and count; the oldest make room for the newest."""
        added: Counter[str] = Counter()
        size: Counter[str] = Counter()
        with self._transaction() as db:
            for body, private, given in offers:
                destinations = [destination for destination in given if destination not in self._deleted]
                if not destinations:
                    continue
                payload = db.execute("INSERT INTO payload (body, private) VALUES (?, ?)", (body, private)).lastrowid
                rows = [(destination, payload, len(body)) for destination in destinations]
                db.executemany("INSERT INTO queue (destination, payload, bytes) VALUES (?, ?, ?)", rows)
                added.update(destinations)
                size.update(dict.fromkeys(destinations, len(body)))
            for destination, n in added.items():
                self._count(db, destination, accepted=n, queued=n, queued_bytes=size[destination])
                self._trim(db, destination)
            for (destination, kind), n in counts.items():
                if destination not in self._deleted:
                    self._count(db, destination, **{kind: n})

    def _count(self, db: sqlite3.Connection, destination: str, **kinds: int) -> None:
        upsert = "INSERT INTO ledger VALUES (?, ?, ?) ON CONFLICT (destination, kind) DO UPDATE SET n = n + excluded.n"
        db.executemany(upsert, [(destination, kind, n) for kind, n in kinds.items() if n])

    def _trim(self, db: sqlite3.Connection, destination: str) -> None:
        counts = dict(db.execute("SELECT kind, n FROM ledger WHERE destination = ?", (destination,)))
        items, size = counts.get("queued", 0) - self._limits[0], counts.get("queued_bytes", 0) - self._limits[1]
        gone: list[Queued] = []
        if items > 0 or size > 0:
            for row in self._rows(destination):
                if items <= 0 and size <= 0:
                    break
                gone.append(row)
                items, size = items - 1, size - row.bytes
            self._remove(db, destination, gone)
            self._count(db, destination, **{"dropped:queue_full": len(gone)})

    def _rows(self, destination: str, until: int = 2**62) -> Iterator[Queued]:
        select = "SELECT seq, payload, bytes FROM queue WHERE destination = ? AND seq <= ? ORDER BY seq"
        return map(Queued._make, self._db.execute(select, (destination, until)))

    def _remove(self, db: sqlite3.Connection, destination: str, rows: list[Queued]) -> None:
        db.executemany("DELETE FROM queue WHERE seq = ?", [(row.seq,) for row in rows])
        unused = "DELETE FROM payload WHERE id = ? AND NOT EXISTS (SELECT 1 FROM queue WHERE payload = ?)"
        db.executemany(unused, [(row.payload, row.payload) for row in rows])
        self._count(db, destination, queued=-len(rows), queued_bytes=-sum(row.bytes for row in rows))

    def batch(self, destination: str, most: int, until: int) -> list[Waiting]:
        """The head of the queue, not beyond `until`: at most `most` records and BATCH_BYTES, but always one."""
        rows: list[Queued] = []
        size = 0
        with self._lock:
            for row in islice(self._rows(destination, until), most):
                size += row.bytes + 1
                if rows and size > BATCH_BYTES:
                    break
                rows.append(row)
            select = "SELECT body, private FROM payload WHERE id = ?"
            found = ((row.seq, *self._db.execute(select, (row.payload,)).fetchone()) for row in rows)
            return [Waiting(seq, body, bool(private)) for seq, body, private in found]

    def settle(self, destination: str, batch: list[int], *, rejected: int, error: str, dropped: str = "") -> None:
        """End the life of a batch: delivered but for what was rejected, or dropped with that reason."""
        with self._transaction() as db:
            if destination in self._deleted:
                return  # meanwhile
            rows = list(self._rows(destination, batch[-1]))
            self._remove(db, destination, rows)
            if dropped:
                self._count(db, destination, **{f"dropped:{dropped}": len(rows)})
            else:
                # What made room for newer ones while it was on the wire has arrived after all.
                arrived, lost = {"dropped:queue_full": len(rows) - len(batch)}, min(rejected, len(batch))
                self._count(db, destination, **arrived, **{"delivered": len(batch) - lost, "dropped:rejected": lost})
            self._note(db, destination, error, success=not dropped)

    def discard(self, destination: str, seqs: Iterable[int], reason: str) -> None:
        """Drop single records that must not be delivered any more."""
        with self._transaction() as db:
            wanted = set(seqs)
            rows = [row for row in self._rows(destination, max(wanted)) if row.seq in wanted]
            self._remove(db, destination, rows)
            self._count(db, destination, **{f"dropped:{reason}": len(rows)})

    def note(self, destination: str, error: str) -> None:
        with self._transaction() as db:
            self._note(db, destination, error, success=False)

    def _note(self, db: sqlite3.Connection, destination: str, error: str, *, success: bool) -> None:
        db.execute("INSERT OR IGNORE INTO state (destination) VALUES (?)", (destination,))
        if error:
            update = "UPDATE state SET last_error = ?, last_error_at = ? WHERE destination = ?"
            db.execute(update, (error, _now(), destination))
        if success:
            db.execute("UPDATE state SET last_success = ? WHERE destination = ?", (_now(), destination))

    def ledger(self) -> dict[str, dict[str, Any]]:
        """Per destination its counts, and under `state` (last_error, last_error_at, last_success)."""
        made: dict[str, dict[str, Any]] = {}
        with self._lock:
            for destination, kind, n in self._db.execute("SELECT destination, kind, n FROM ledger"):
                made.setdefault(destination, {})[kind] = n
            for destination, *state in self._db.execute("SELECT * FROM state"):
                made.setdefault(destination, {})["state"] = state
        return made

    def expect(self, known: Iterable[str]) -> None:
        """These are destinations, also if they were deleted before."""
        with self._lock:
            self._deleted -= set(known)

    def keep_only(self, known: Iterable[str]) -> int:
        """Forget the queues and counts of destinations that are no more; gives how many records were still queued."""
        with self._transaction() as db:
            unknown = {row[0] for row in db.execute("SELECT DISTINCT destination FROM ledger")} - set(known)
            self._deleted |= unknown  # records may still be on their way to them
            return sum(self._forget(db, destination) for destination in unknown)

    def _forget(self, db: sqlite3.Connection, destination: str) -> int:
        rows = list(self._rows(destination))
        self._remove(db, destination, rows)
        db.execute("DELETE FROM ledger WHERE destination = ?", (destination,))
        db.execute("DELETE FROM state WHERE destination = ?", (destination,))
        return len(rows)

    # -- what the page saves

    def saved(self) -> list[tuple[str, dict[str, Any], str, str]]:
        with self._lock:
            rows = self._db.execute("SELECT id, body, created_at, updated_at FROM destination ORDER BY created_at, id")
            return [(row[0], json.loads(row[1]), row[2], row[3]) for row in rows]

    def save(self, identity: str, name: str, body: dict[str, Any]) -> None:
        """Insert or replace a destination, on disk when this returns; raises sqlite3.IntegrityError for a taken name."""
        upsert = """INSERT INTO destination VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE
                    SET name = excluded.name, body = excluded.body, updated_at = excluded.updated_at"""
        with self._synced() as db:
            db.execute(upsert, (identity, name, json.dumps(body), _now(), _now()))

    def delete(self, identity: str) -> None:
        with self._synced() as db:
            db.execute("DELETE FROM destination WHERE id = ?", (identity,))
            self._forget(db, identity)
        self._deleted.add(identity)  # a record may still be on its way to it

    def switch(self) -> dict[str, bool] | None:
        with self._lock:
            row = self._db.execute("SELECT value FROM meta WHERE key = 'enabled'").fetchone()
            return json.loads(row[0]) if row else None

    def set_switch(self, enabled: bool, in_file: bool) -> None:
        value = json.dumps({"enabled": enabled, "in_file": in_file})
        with self._synced() as db:
            db.execute("INSERT OR REPLACE INTO meta VALUES ('enabled', ?)", (value,))


def private_folders(path: Path) -> None:
    """Make the folders that are missing above a file, for us alone."""
    for folder in reversed([folder for folder in path.absolute().parents if not folder.exists()]):
        folder.mkdir(mode=0o700, exist_ok=True)


def _private_file(path: Path) -> None:
    """Make the file for us alone, before anything is in it."""
    private_folders(path)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.fchmod(descriptor, 0o600)  # SQLite gives its -wal and -shm the same
    finally:
        os.close(descriptor)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
