"""The front of the room: a sink for records, the switch, the counters and the settings API.

`Broadcast` decides who takes part and leaves the rest to the modules below.
"""

from __future__ import annotations

import logging
import os
import re
import sqlite3
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from broadcast.delivery import Delivery, Searcher, resend, warn
from broadcast.destinations import (
    OWN_FIELDS,
    TYPES,
    BadAddress,
    Destination,
    Entry,
    Listening,
    Settings,
    connection,
    from_json,
    read_config,
    show,
    show_request,
    skip_reason,
    target,
    to_json,
    unmask,
)
from broadcast.encoder import Record, encode
from broadcast.otlp import digest
from broadcast.store import Store
from broadcast.trial import not_tried, try_out

__all__ = ["Broadcast", "Destination", "Settings", "encode", "replay"]

log = logging.getLogger("opensourcellmrouter.broadcast")
MOST_DESTINATIONS: Final = 64
TESTS_AT_ONCE: Final = 4
TESTS_A_MINUTE: Final = 60
EDITABLE: Final = ("name", "type", "enabled", "config", "privacy_mode", "sampling_rate", "api_keys", "filter_rules")
SHOWN_ONLY: Final = ("id", "source", "created_at", "updated_at")  # taken and ignored: what was read can be sent back
Reply = tuple[int, dict[str, Any]]


class Unusable(ValueError):
    """The database cannot be opened."""


class ApiError(Exception):
    """An answer of the settings API that is not a success."""

    def __init__(self, status: int, message: str, param: str | None = None, /, **more: Any) -> None:
        super().__init__(message)
        kinds = {403: "permission_error", 404: "not_found_error", 429: "rate_limit_error", 503: "server_error"}
        error = {"message": message, "type": kinds.get(status, "invalid_request_error"), "param": param, "code": None}
        self.reply: Reply = status, {"error": error, **more}


class Broadcast:
    """All of it: a sink for records, the threads behind it, the counters and the settings API.

    `start=False` is for commands beside a running router (doctor, replay): it reads, tests and answers, but starts no
    thread and makes no file. Raises ValueError if the database cannot be used.
    """

    def __init__(self, settings: Settings, *, listening: Listening = set, start: bool = True) -> None:
        self.settings, self.listening = settings, listening
        self._lock = threading.RLock()
        self._delivery: Delivery | None = None  # from when there is a database
        self._latest: Record | None = None
        self._search = Searcher()  # for what the page asks
        self._testing = threading.BoundedSemaphore(TESTS_AT_ONCE)
        self._tested: deque[float] = deque(maxlen=TESTS_A_MINUTE)
        self._started = start
        if Path(settings.database).exists() or (start and settings.enabled and settings.destinations):
            self._open()
        self._refresh()

    def sink(self, event: Record) -> None:
        """Take a finished request's record; any other event is ignored. Never waits, never raises."""
        if event.get("type") == "complete":
            self._latest = event
            if delivery := self._delivery:
                delivery.put(event)

    # -- who takes part

    @property
    def store(self) -> Store:
        return self._open().store

    def _open(self) -> Delivery:
        with self._lock:
            if not self._delivery:
                s = self.settings
                try:
                    store = Store(s.database, s.queue_max_items, s.queue_max_bytes)
                except (OSError, sqlite3.Error) as error:
                    why = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
                    raise Unusable(f"database: {s.database} cannot be used ({why}); move it away or mend it") from None
                self._delivery = Delivery(store, s, self.listening)
            return self._delivery

    @property
    def enabled(self) -> bool:
        """What the page chose last, unless the file was changed after that."""
        chosen, in_file = self._delivery.store.switch() if self._delivery else None, self.settings.enabled
        return chosen["enabled"] if chosen and chosen["in_file"] == in_file else in_file

    def entries(self) -> list[Entry]:
        made = [Entry(_file_id(d.name), d, "file", None, None) for d in self.settings.destinations]
        for identity, body, created, updated in self._delivery.store.saved() if self._delivery else []:
            try:
                made.append(Entry(identity, from_json(body), "page", created, updated))
            except (ValueError, LookupError, TypeError):
                warn(identity, f"a saved destination ({identity}) is no longer valid and rests")
        return made

    def _refresh(self) -> None:
        """At the start and after a reload: a destination that left config.toml takes its queue with it."""
        if not (self._started and self._delivery):
            return self._apply()
        store = self._delivery.store
        known = [_file_id(d.name) for d in self.settings.destinations] + [row[0] for row in store.saved()]
        store.expect(known)
        self._apply()
        if lost := store.keep_only(known):
            log.warning("broadcast: %d queued records of removed destinations were dropped", lost)
        return None

    def _apply(self) -> None:
        """Let deliveries fit the settings: none while switched off."""
        with self._lock:
            takers = [e for e in self.entries() if e.destination.enabled] if self._started and self.enabled else []
            if takers or (self._started and self._delivery):
                self._open().fit(takers)

    def reload(self, settings: Settings) -> None:
        """Go on with another [broadcast] table. Raises ValueError, and then all stays as it was, if it names another database
        or the database cannot be used."""
        if settings.database != self.settings.database:
            raise ValueError("database: can only be changed by a restart")
        with self._lock:
            before = self.settings
            try:
                self._go_by(settings)
            except sqlite3.Error as error:
                self.settings = before
                if self._delivery:
                    self._delivery.reload(before)
                raise Unusable(f"database: {settings.database} cannot be used now ({error})") from None

    def _go_by(self, settings: Settings) -> None:
        self.settings = settings
        if self._delivery:
            self._delivery.reload(settings)
        self._refresh()

    def close(self, timeout: float) -> None:
        """Commit what was handed over, deliver what can be within `timeout`, and leave the rest in the database."""
        deadline = time.monotonic() + timeout
        with self._lock:
            self._started = False
        if self._delivery:
            self._delivery.close(deadline)
        self._search.close()

    # -- what it shows

    def stats(self) -> dict[str, Any]:
        """The `broadcast` object of GET /api/v1/stats."""
        ledger = self._delivery.store.ledger() if self._delivery else {}
        shown: dict[str, Any] = {}
        for entry in self.entries():  # the file's come first; it may name one as the page did before
            name = entry.destination.name
            shown[f"{name} ({entry.source})" if name in shown else name] = _counters(entry.id, ledger.get(entry.id, {}))
        return {"enabled": self.enabled, "destinations": shown}

    def doctor(self) -> list[dict[str, Any]]:
        """Test every enabled destination, also before Broadcast is switched on: [{place, ok, message, cure}]."""
        findings = []
        for d in (entry.destination for entry in self.entries() if entry.destination.enabled):
            result = try_out(d, self.settings, self.listening())
            found = {"ok": result["ok"], "message": result["message"], "cure": result["advice"]}
            findings.append({"place": f"broadcast destination {d.name}"} | found)
        return findings

    # -- the settings API

    def api(self, method: str, path: str, body: Any = None) -> Reply:
        """Answer a request below /api/v1/observability, its JSON body already read."""
        try:
            return self._route(method, path.rstrip("/"), body)
        except ApiError as error:
            return error.reply
        except sqlite3.IntegrityError:
            return ApiError(409, "name: another destination has it", "name").reply
        except (sqlite3.Error, OSError, Unusable) as error:
            log.error("broadcast: the settings cannot be read or written: %s", type(error).__name__)
            return ApiError(503, "The settings cannot be read or written now").reply
        except ValueError as error:
            place = str(error).partition(": ")[0]
            return ApiError(400, str(error), f"config.{place}" if place.partition(".")[0] in OWN_FIELDS else place).reply

    def _route(self, method: str, path: str, body: Any) -> Reply:
        for pattern, methods in ROUTES:
            if match := pattern.fullmatch(path):
                if method not in methods:
                    raise ApiError(405, f"Only {', '.join(methods)} here", allow=list(methods))
                return methods[method](self, body, *match.groups())
        raise ApiError(404, "There is nothing here")

    def _put_switch(self, body: Any) -> Reply:
        if not isinstance(_only(body, ("enabled",)).get("enabled"), bool):
            raise ValueError("enabled: must be true or false")
        with self._lock:
            self.store.set_switch(body["enabled"], self.settings.enabled)
            self._apply()
        return 200, {"enabled": self.enabled}

    def _entry(self, identity: str, *, editable: bool = False) -> Entry:
        entry = next((entry for entry in self.entries() if entry.id == identity), None)
        if entry is None:
            raise ApiError(404, "There is no such destination")
        if editable and entry.source == "file":
            raise ApiError(403, "This destination is in config.toml; change it there")
        return entry

    def _post(self, body: Any) -> Reply:
        if len(self.entries()) >= MOST_DESTINATIONS:
            raise ApiError(400, f"There are {MOST_DESTINATIONS} destinations already")
        return 201, self._save(str(uuid.uuid4()), body, None)

    def _put(self, body: Any, identity: str) -> Reply:
        return 200, self._save(identity, body, self._entry(identity, editable=True))

    def _save(self, identity: str, body: Any, stored: Entry | None) -> dict[str, Any]:
        """Test exactly what is about to be stored, then store it: nothing changes if the test fails."""
        try:
            draft = self._draft(body, stored)
        except BadAddress as error:
            raise _failed_test(not_tried(error)) from None
        renamed = stored is None or stored.destination.name != draft.name
        if renamed and any(e.id != identity and e.destination.name == draft.name for e in self.entries()):
            raise ApiError(409, "name: another destination has it", "name")
        # A destination that broke can be switched off without mending it first.
        resting = stored is not None and not draft.enabled and connection(draft) == connection(stored.destination)
        if self.settings.test_required and not resting:
            result = self._tried(draft)
            if not result["ok"]:
                raise _failed_test(result)
        with self._lock:
            if stored:
                self._entry(identity, editable=True)  # deleted meanwhile?
            self.store.save(identity, draft.name, to_json(draft))
            self._apply()
            return show(self._entry(identity))

    def _delete(self, _: Any, identity: str) -> Reply:
        with self._lock:
            self._entry(identity, editable=True)
            delivery = self._open()
            delivery.store.delete(identity)
            delivery.given.pop(identity, None)
            self._apply()
        return 200, {"id": identity, "deleted": True}

    def _test(self, body: Any) -> Reply:
        stored = self._entry(str(body["id"])) if isinstance(body, dict) and "id" in body else None
        try:
            draft = stored.destination if stored and not set(body) - set(SHOWN_ONLY) else self._draft(body, stored)
        except BadAddress as error:
            return 200, not_tried(error)
        return 200, self._tried(draft)

    def _tried(self, draft: Destination) -> dict[str, Any]:
        """One test, bounded in time, in number at once and in number a minute."""
        now = time.monotonic()
        with self._lock:
            if len(self._tested) == TESTS_A_MINUTE and now - self._tested[0] < 60:
                raise ApiError(429, "Too many connection tests; wait a minute")
            self._tested.append(now)
        if not self._testing.acquire(blocking=False):
            raise ApiError(429, "Too many connection tests at once; wait for the others")
        try:
            return try_out(draft, self.settings, self.listening())
        finally:
            self._testing.release()

    def _payload(self, _: Any, identity: str) -> Reply:
        """Exactly what this destination would get for the last record that is for it."""
        d, record = self._entry(identity).destination, self._latest
        if record is None or skip_reason(d, record, self._search):
            record = self._delivery.given.get(identity) if self._delivery else None
        names = {"service_name": self.settings.service_name, "service_version": self.settings.service_version}
        payload = encode(record, privacy=d.privacy_mode, **names) if record else None
        return 200, {"generation_id": record and record["generation_id"], "request": show_request(d), "payload": payload}

    def _draft(self, body: Any, stored: Entry | None) -> Destination:
        """The destination that `body` describes, on top of the stored one; masked values stand for what is stored."""
        merged = to_json(stored.destination) if stored else {"config": {}}
        given = _only(body, EDITABLE + SHOWN_ONLY).items()
        merged |= {k: v for k, v in given if k in EDITABLE and (v is not None or k in ("api_keys", "filter_rules"))}
        kind = merged.get("type")
        if not isinstance(kind, str) or kind not in TYPES:
            raise ValueError(f"type: must be one of {', '.join(name for name in TYPES if name != 'file')}")
        if kind == "file":
            raise ValueError("type: file destinations are made in config.toml only")
        names = {entry.destination.name for entry in self.entries()}
        merged.setdefault("name", next(n for n in (kind, *(f"{kind} {i}" for i in range(2, 99))) if n not in names))
        merged["config"], kept = unmask(read_config(merged["config"]), stored)
        made = from_json(merged)
        if kept and stored and target(made).origin != target(stored.destination).origin:
            raise ValueError(f"config.{kept[0]}: the address changed, so enter it again")
        return made


ROUTES: Final[tuple[tuple[re.Pattern[str], dict[str, Callable[..., Reply]]], ...]] = (
    (re.compile(r""), {"GET": lambda b, _: (200, {"enabled": b.enabled}), "PUT": Broadcast._put_switch}),
    (
        re.compile(r"/destinations"),
        {"GET": lambda b, _: (200, {"destinations": [show(e) for e in b.entries()]}), "POST": Broadcast._post},
    ),
    (re.compile(r"/destinations/test"), {"POST": Broadcast._test}),
    (re.compile(r"/destinations/([^/]+)/payload"), {"GET": Broadcast._payload}),
    (
        re.compile(r"/destinations/([^/]+)"),
        {"GET": lambda b, _, identity: (200, show(b._entry(identity))), "PUT": Broadcast._put, "DELETE": Broadcast._delete},
    ),
)


def _file_id(name: str) -> str:
    return f"file-{digest(name)[:24]}"


def _counters(identity: str, counts: Mapping[str, Any]) -> dict[str, Any]:
    error, error_at, success = counts.get("state") or (None, None, None)

    def by_reason(prefix: str) -> dict[str, int]:
        return {kind.removeprefix(prefix): n for kind, n in sorted(counts.items()) if kind.startswith(prefix) and n}

    made = {"id": identity} | {kind: counts.get(kind, 0) for kind in ("accepted", "delivered", "queued")}
    made |= {"dropped": by_reason("dropped:"), "skipped": by_reason("skipped:")}
    return made | {"last_error": error, "last_error_at": error_at, "last_success": success}


def _failed_test(result: dict[str, Any]) -> ApiError:
    return ApiError(422, f"Not saved, the test failed: {result['message']}", **result)


def _only(body: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(body, dict):
        raise ApiError(400, "The body must be a JSON object")
    if unknown := sorted(key for key in body if key not in keys):
        raise ApiError(400, f"{unknown[0]}: unknown key, only {', '.join(keys)}", unknown[0])
    return body


def replay(path: str, settings: Settings, name: str, *, listening: Listening = set) -> dict[str, Any]:
    """Send the lines that a `file` destination wrote to destination `name`: {lines, delivered, dropped, last_error}.

    Raises ValueError if there is no such destination, OSError if the file cannot be read.
    """
    entries = Broadcast(settings, listening=listening, start=False).entries()
    d = next((entry.destination for entry in entries if entry.destination.name == name), None)
    if d is None:
        raise ValueError(f"--to: there is no destination {name!r}")
    return resend(path, d, settings, listening)
