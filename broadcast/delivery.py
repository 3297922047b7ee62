"""Records in, requests out: the threads between the requests of this router and the destinations.

A writer takes records from request threads, decides who gets each of them, encodes and commits, a group at a time. One
worker per destination takes them out of the store and delivers in order, one request at a time, so that a destination which
hangs delays no other. Nothing is in memory only but what the writer has not committed yet. Regular expressions of filters
run in a child process, and a destination that has some has a writer of its own, so that these delay no other either.
`resend` does a worker's work for the lines of a file.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from broadcast.destinations import Destination, Entry, Listening, Settings, searches, skip_reason
from broadcast.encoder import Record, fragment, halves, unfit
from broadcast.exchange import Answer, Carrier
from broadcast.otlp import envelope
from broadcast.store import Counts, Offers, Store

log = logging.getLogger("opensourcellmrouter.broadcast")
BATCH_ITEMS: Final = 64
BACKOFF_FIRST = 1.0
BACKOFF_MOST = 30.0
KEEP_IDLE: Final = 5.0  # seconds a connection without work is kept: most servers close it soon after
GROUP_ITEMS, GROUP_WEIGHT = 256, 4 << 20  # of one commit
LINGER = 0.02  # seconds after a commit: what comes meanwhile shares the next one, and the next delivery
INBOX_ITEMS, INBOX_WEIGHT = 10_000, 64 << 20  # in memory, while the disk does not answer

Takers = tuple[Entry, ...]

_warned: dict[str, float] = {}


def warn(key: str, message: str) -> None:
    """One line a minute for each kind of trouble; `message` never holds what a peer or a client wrote."""
    now = time.monotonic()
    if now - _warned.get(key, -60.0) >= 60:
        _warned[key] = now
        log.warning("broadcast: %s", message)


SEARCH_PROGRAM: Final = """
import json, re, signal, sys
signal.signal(signal.SIGALRM, signal.SIG_DFL)
for line in sys.stdin:
    pattern, text = json.loads(line)
    signal.setitimer(signal.ITIMER_REAL, 0.25)
    found = re.search(pattern, text) is not None
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(int(found), flush=True)
"""


class Searcher:
    """Regular expressions of filter rules, searched in a child process that a timer of the kernel ends.

    A pattern that explodes on somebody's prompt holds the interpreter lock for minutes: in this process that would
    stop every request. The child starts with the first such rule and ends with its standard input.
    """

    def __init__(self) -> None:
        self._child: subprocess.Popen[str] | None = None
        self._closed = False
        self._lock = threading.Lock()

    def __call__(self, pattern: str, text: str) -> bool:
        with self._lock:
            if self._closed:
                return False
            try:
                answer = self._ask(json.dumps([pattern, text]))
            except OSError:
                answer = ""
            if not answer:
                self._end()
                warn("search", "a filter's regular expression took too long; the record was left out")
            return answer.strip() == "1"

    def _ask(self, line: str) -> str:
        if self._child is None:
            command, pipe = [sys.executable, "-I", "-S", "-c", SEARCH_PROGRAM], subprocess.PIPE
            self._child = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
        assert self._child.stdin and self._child.stdout
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
        return self._child.stdout.readline()

    def _end(self) -> None:
        if self._child:
            self._child.kill()
            with contextlib.suppress(OSError):
                self._child.communicate()
        self._child = None

    def close(self) -> None:
        """Find nothing any more."""
        with self._lock:
            self._closed = True
            self._end()


def weight(record: Record) -> int:
    """About how many bytes a record holds."""
    answer = record.get("response") or {}
    return 4_096 + int(record.get("_bytes", 0)) + len(answer.get("content") or "") + len(answer.get("reasoning") or "")


class Writer:
    """Takes records from request threads and commits them, a group at a time. Its thread is the one that encodes."""

    def __init__(self, owner: Delivery) -> None:
        self._owner = owner
        self._inbox: deque[tuple[Record, Takers, int]] = deque()
        self._weight = 0
        self._lost: Counter[str] = Counter()  # by destination
        self._search = Searcher()
        self._lock = threading.Lock()
        self._wake, self._stop = threading.Event(), threading.Event()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="broadcast-writer", daemon=True)
        self._thread.start()

    def put(self, record: Record, takers: Takers) -> bool:
        """Called in the request's thread: an append. `takers` may have the record. False: this writer has ended."""
        try:
            heavy = weight(record)
        except (TypeError, ValueError, AttributeError):  # an odd record is dealt with, and counted, where it is encoded
            heavy = 0
        with self._lock:
            if self._ended:
                return False
            self._inbox.append((record, takers, heavy))
            self._weight += heavy
            if len(self._inbox) > INBOX_ITEMS or (self._weight > INBOX_WEIGHT and len(self._inbox) > 1):
                _, missing, light = self._inbox.popleft()
                self._weight -= light
                self._lost.update(entry.id for entry in missing)
        self._wake.set()
        return True

    def _take(self) -> tuple[list[tuple[Record, Takers]], Counter[str]]:
        group: list[tuple[Record, Takers]] = []
        heavy = 0
        with self._lock:
            while self._inbox and len(group) < GROUP_ITEMS and heavy < GROUP_WEIGHT:
                record, takers, one = self._inbox.popleft()
                group.append((record, takers))
                heavy += one
            self._weight -= heavy
            lost, self._lost = self._lost, Counter()
        return group, lost

    def _run(self) -> None:
        while not self._end():
            self._wake.wait()
            self._wake.clear()
            while any(taken := self._take()):
                self._commit(*self._offers(*taken))
                self._stop.wait(LINGER)

    def _end(self) -> bool:
        with self._lock:
            self._ended = self._stop.is_set() and not self._inbox
            return self._ended

    def _offers(self, group: list[tuple[Record, Takers]], lost: Mapping[str, int]) -> tuple[Offers, Counts]:
        """What each record means for each destination: a fragment per kind of privacy, and counts of the rest."""
        counts: Counter[tuple[str, str]] = Counter()
        offers: Offers = []
        for identity, n in lost.items():
            counts[identity, "accepted"] = counts[identity, "dropped:queue_full"] = n
        for record, takers in group:
            for privacy in (False, True):
                wanted = [entry for entry in takers if entry.destination.privacy_mode == privacy]
                body, taken, reason = self._offer(record, wanted, privacy, counts)
                if reason:
                    counts.update({(identity, kind): 1 for identity in taken for kind in ("accepted", f"dropped:{reason}")})
                elif taken:
                    offers.append((body, privacy, taken))
        return offers, counts

    def _offer(
        self, record: Record, wanted: list[Entry], privacy: bool, counts: Counter[tuple[str, str]]
    ) -> tuple[bytes, list[str], str]:
        """The fragment, who takes it, and why nobody can have it."""
        taken = [entry.id for entry in wanted]
        try:
            skipped = {entry.id: skip_reason(entry.destination, record, self._search) for entry in wanted}
            counts.update((identity, f"skipped:{reason}") for identity, reason in skipped.items() if reason)
            taken = [identity for identity, reason in skipped.items() if not reason]
            settings = self._owner.settings
            self._owner.given.update(dict.fromkeys(taken, record))
            body = fragment(record, privacy, settings.service_name, settings.service_version) if taken else b""
            return body, taken, "too_large" if len(body) > settings.queue_max_bytes else ""
        except Exception as error:  # noqa: BLE001 - one record must not stop the others
            log.error("broadcast: a record could not be encoded: %s", type(error).__name__)
            return b"", taken, "encode_error"

    def _commit(self, offers: Offers, counts: Counts) -> None:
        pause = 0.1
        while True:
            try:
                self._owner.store.accept(offers, counts)
                break
            except sqlite3.Error as error:
                warn("store", f"the queue cannot be written ({type(error).__name__}); trying again")
                if self._stop.wait(pause):
                    log.error("broadcast: %d records were not written to the queue", len(offers))
                    return
                pause = min(2.0, pause * 2)
        self._owner.wake({destination for _, _, destinations in offers for destination in destinations})

    def leave(self) -> None:
        """Commit what was handed over, then end."""
        self._stop.set()
        self._wake.set()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def cut(self) -> None:
        """End now: what waits for a search is left out, counted and done with at once."""
        self._search.close()


class Worker:
    """Takes records out of one destination's queue and delivers them, in order, one request at a time."""

    def __init__(self, owner: Delivery, entry: Entry) -> None:
        self._owner, self.entry = owner, entry
        self._wake, self._nudge = threading.Event(), threading.Event()
        self._stop = self._leave = False
        self._most, self._tries = BATCH_ITEMS, 0
        self._since, self._until = 0.0, 0  # the batch that is tried again: since when, and its last record
        self._carrier: Carrier | None = None
        self._thread = threading.Thread(target=self._run, name=f"broadcast-{entry.id[:12]}", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def change(self, entry: Entry) -> None:
        """Go on with other settings, at once if it was waiting for the old ones to work."""
        self.entry = entry
        self._nudge.set()

    def leave(self) -> None:
        """End when the queue is empty or the destination does not answer."""
        self._leave = True
        self._nudge.set()
        self._wake.set()

    def cut(self) -> None:
        """End now; what is on the wire stays queued and may arrive twice, under the same ids."""
        self._stop = True
        self.leave()
        if carrier := self._carrier:
            carrier.cut()

    def join(self, deadline: float) -> None:
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            self._deliver()
        finally:
            self._rest()

    def _deliver(self) -> None:
        while not self._stop:
            self._wake.clear()
            try:
                if self._step():
                    continue
                if self._leave:
                    return
                if not self._wake.wait(KEEP_IDLE):
                    self._rest()
                    self._wake.wait()
            except sqlite3.Error as error:
                warn("store", f"the queue cannot be read or written ({type(error).__name__}); trying again")
                self._pause(1.0)
            except Exception as error:  # noqa: BLE001 - a thread that ends would keep its queue for ever
                log.error("broadcast: delivery to %r failed: %s", self.entry.destination.name, type(error).__name__)
                self._pause(BACKOFF_MOST)

    def _step(self) -> bool:
        """Deliver one batch; false: there is none, or leaving and no answer."""
        entry, store = self.entry, self._owner.store
        batch = store.batch(entry.id, self._most, self._until or 2**62)
        if not batch:
            emptied, self._until, self._tries = bool(self._until), 0, 0  # what was tried again made room for newer ones
            return emptied
        open_ = [waiting.seq for waiting in batch if not waiting.private] if entry.destination.privacy_mode else []
        if open_:  # from before privacy was switched on
            store.discard(entry.id, open_, "privacy")
            return True
        document, sent = envelope(waiting.body for waiting in batch), [waiting.seq for waiting in batch]
        answer = self._send(entry.destination, document)
        if answer.status == 413 and len(batch) > 1:
            self._most = len(batch) // 2
        elif answer.retry:
            self._again(entry, sent, answer)
            return not self._leave
        else:
            lost = -(-answer.rejected * len(batch) // max(1, document.count(b'"spanId":')))  # of records, told in spans
            dropped = "" if answer.cause in ("ok", "rejected") else answer.reason
            self._settle(entry, sent, answer._replace(rejected=lost), dropped)
        return True

    def _send(self, d: Destination, body: bytes) -> Answer:
        carrier = self._carrier
        if carrier is None or carrier.destination != d:
            self._rest()
            carrier = self._carrier = Carrier(d)
        if self._stop:  # asked before there was anything to cut
            carrier.cut()
        return carrier.send(body, self._owner.settings.timeout, self._owner.listening())

    def _rest(self) -> None:
        if self._carrier:
            self._carrier.close()

    def _settle(self, entry: Entry, batch: list[int], answer: Answer, dropped: str) -> None:
        if answer.cause != "ok":
            warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}")
        while not self._stop:  # what arrived is not sent again because the disk is full
            try:
                self._owner.store.settle(entry.id, batch, rejected=answer.rejected, error=answer.error, dropped=dropped)
                break
            except sqlite3.Error:
                warn("store", "what was delivered cannot be written down; trying again")
                self._pause(0.5)
        self._until = self._tries = 0
        self._most = min(BATCH_ITEMS, self._most * 2)

    def _again(self, entry: Entry, batch: list[int], answer: Answer) -> None:
        """Back off as the OTLP specification says, until max_elapsed has passed for this batch."""
        now, store = time.monotonic(), self._owner.store
        if not self._tries:
            self._since, self._until = now, batch[-1]
        left = self._since + self._owner.settings.max_elapsed - now
        pause = min(BACKOFF_MOST, BACKOFF_FIRST * 2 ** min(self._tries, 16)) * random.uniform(0.5, 1.5)
        pause = max(pause, answer.retry_after)
        self._tries += 1
        if left > 0:
            store.note(entry.id, answer.message)
            warn(entry.id, f"destination {entry.destination.name!r}: {answer.message}; trying again")
            if self._leave or self._pause(min(pause, left)) or pause <= left:
                return
        self._settle(entry, batch, answer, "max_elapsed")

    def _pause(self, seconds: float) -> bool:
        """Wait; true if something changed that is worth another try at once."""
        changed = self._nudge.wait(seconds)
        self._nudge.clear()
        return changed


class Delivery:
    """The writer and the workers on one store, as many as there are destinations to take records.

    `put` may be called by any thread; `fit`, `reload` and `close` by one at a time.
    """

    def __init__(self, store: Store, settings: Settings, listening: Listening) -> None:
        self.store, self.settings, self.listening = store, settings, listening
        self.given: dict[str, Record] = {}  # the last record that was for a destination
        self._writers: dict[str, Writer] = {}  # "" for all whose filters are quick, else by destination
        self._workers: dict[str, Worker] = {}
        self._takers: tuple[tuple[Writer, Takers], ...] = ()

    def put(self, record: Record) -> None:
        """Take a finished request's record. Never waits, never raises."""
        for writer, takers in self._takers:
            if not writer.put(record, takers):
                self._put_again(record, {entry.id for entry in takers})

    def _put_again(self, record: Record, wanted: set[str]) -> None:
        """The settings changed at this moment: by the new ones."""
        for writer, takers in self._takers:
            if mine := tuple(entry for entry in takers if entry.id in wanted):
                writer.put(record, mine)

    def fit(self, takers: Iterable[Entry]) -> None:
        """Let the threads fit the destinations that take records now; none without one."""
        active = {entry.id: entry for entry in takers}
        gone = [self._workers.pop(identity) for identity in list(self._workers) if identity not in active]
        shares: dict[str, list[Entry]] = {}
        for entry in active.values():
            shares.setdefault(entry.id if searches(entry.destination) else "", []).append(entry)
        needed = {key: self._writers.get(key) or Writer(self) for key in shares}
        idle = [writer for key, writer in self._writers.items() if key not in needed]
        self._writers, self._takers = needed, tuple((writer, tuple(shares[key])) for key, writer in needed.items())
        end(idle, time.monotonic() + 1.0)
        for identity, entry in active.items():
            if identity not in self._workers:
                self._workers[identity] = Worker(self, entry)
            elif self._workers[identity].entry != entry:
                self._workers[identity].change(entry)
        end(gone, 0.0)

    def reload(self, settings: Settings) -> None:
        self.settings = settings
        self.store.limit(settings.queue_max_items, settings.queue_max_bytes)

    def close(self, deadline: float) -> None:
        """Commit what was handed over, deliver what can be until then, and leave the rest in the store."""
        writers, self._writers, self._takers = list(self._writers.values()), {}, ()
        workers, self._workers = list(self._workers.values()), {}
        end(writers, max(deadline, time.monotonic() + 0.5))
        end(workers, deadline)
        self.store.close()

    def wake(self, destinations: Iterable[str]) -> None:
        for worker in map(self._workers.get, destinations):
            if worker:
                worker.wake()


def end(threads: Sequence[Writer | Worker], deadline: float) -> None:
    """Let them finish until then, cut those that still wait, and do not wait for one that hangs all the same."""
    for thread in threads:
        thread.leave()
    for thread in threads:
        thread.join(deadline)
    for thread in threads:
        thread.cut()
    grace = time.monotonic() + 0.5
    for thread in threads:
        thread.join(grace)


def resend(path: str, d: Destination, settings: Settings, listening: Listening) -> dict[str, Any]:
    """Send the lines of a file on, in order, waiting as a delivery does: {lines, delivered, dropped, last_error}.

    A private destination only gets lines that were written in private: content is never cut out of a line.
    """
    counts: Counter[str] = Counter()
    last_error = None
    with Path(path).open("rb") as file, contextlib.closing(Carrier(d)) as carrier:
        if d.type == "file" and Path(d.path).exists() and Path(d.path).samefile(path):
            raise ValueError(f"--to: {d.name!r} writes to this very file")
        for line in file:
            for reason, error in _resend_line(carrier, line.strip(), d.privacy_mode, settings, listening):
                counts.update([reason])
                last_error = error or last_error
    delivered = counts.pop("", 0)
    return {"lines": delivered + counts.total(), "delivered": delivered, "dropped": dict(counts), "last_error": last_error}


def _resend_line(
    carrier: Carrier, line: bytes, privacy: bool, settings: Settings, listening: Listening
) -> Iterator[tuple[str, str | None]]:
    """Why the line, or each part of one that had to be cut, was dropped (nothing: it was not), and the error."""
    if reason := unfit(line, privacy):
        yield reason, None
        return
    answer = _insist(carrier, line, settings, listening)
    parts = halves(line) if answer.status == 413 else []
    if len(parts) > 1:
        for part in parts:
            yield from _resend_line(carrier, part, privacy, settings, listening)
    else:
        yield ("", None) if answer.cause == "ok" else (answer.reason, answer.message)


def _insist(carrier: Carrier, line: bytes, settings: Settings, listening: Listening) -> Answer:
    begun, pause = time.monotonic(), BACKOFF_FIRST
    while True:
        answer = carrier.send(line, settings.timeout, listening())
        wait = max(pause, answer.retry_after)
        if not answer.retry or time.monotonic() + wait - begun > settings.max_elapsed:
            return answer
        time.sleep(wait)
        pause = min(BACKOFF_MOST, pause * 2)
