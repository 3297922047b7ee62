"""The router in this process, with the providers it talks to and a clock that the test moves.

A `House` is `create_app` of a configuration written by `config` and `provider`. It keeps the records and the events that
every reader gets, and asks the way a client would. Where waiting is the subject, `Clock` stands in for the pipeline's time:
back-off and cool-down then pass at once and to the millisecond, so no test depends on how busy the machine is.
"""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from conftest import App
from fake_upstream import FakeUpstream, Script
from router_process import Answer, chat_body, free_port, until

CHAT, MESSAGES, RESPONSES, ROUTE = "/v1/chat/completions", "/v1/messages", "/v1/responses", "/v1/route"
MakeApp = Callable[..., App]


def toml(value: Any) -> str:
    """A value as TOML writes it."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(toml(item) for item in value) + "]"
    return json.dumps(value)


def table(header: str, **keys: Any) -> str:
    return f"{header}\n" + "".join(f"{key} = {toml(value)}\n" for key, value in keys.items())


def provider(name: str, place: FakeUpstream | str | None = None, **keys: Any) -> str:
    """A [[providers]] table; `place` is a fake, a base URL, or None for the embedded echo."""
    url = place.url + "/v1" if isinstance(place, FakeUpstream) else place
    told = {"name": name, "format": "openai", "base_url": url} if url else {"name": name, "format": "echo"}
    return table("[[providers]]", **{**told, **keys})


def rule(type: str = "fallback", **keys: Any) -> str:
    return table("[[routers]]", type=type, **keys)


def config(*parts: str, attempts: int = 3, failures: int = 100000, cooldown: float = 30, threads: int = 8) -> str:
    """A configuration of these tables; one fallback rule where none is among them."""
    head = [
        f"[server]\nport = {{port}}\nthreads = {threads}\n{{server}}",
        f"[retry]\nattempts = {attempts}",
        f"[breaker]\nfailures = {failures}\ncooldown_seconds = {cooldown}",
        '[logging]\nenabled = true\npath = "{log}"',
    ]
    text = "\n".join([*head, *parts])
    return text if "[[routers]]" in text else f"{text}\n{rule()}"


def refused_url() -> str:
    """Where nobody listens."""
    return f"http://127.0.0.1:{free_port()}/v1"


class Clock:
    """Stands in for the module `time` in the pipeline: sleeping moves it on, nothing else takes any time unless it runs."""

    def __init__(self, frozen: bool = False) -> None:
        self.slept: list[float] = []
        self._offset = 0.0
        self._frozen_at = (time.monotonic(), time.time()) if frozen else None

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._offset += seconds

    def advance(self, seconds: float) -> None:
        self._offset += seconds

    def monotonic(self) -> float:
        return (self._frozen_at[0] if self._frozen_at else time.monotonic()) + self._offset

    def time(self) -> float:
        return (self._frozen_at[1] if self._frozen_at else time.time()) + self._offset

    def time_ns(self) -> int:
        return int(self.time() * 1e9)

    def taken(self) -> float:
        """Seconds slept since the last look."""
        seconds, self.slept = sum(self.slept), []
        return seconds


def set_clock(patch: pytest.MonkeyPatch, frozen: bool = False) -> Clock:
    """The deciding rooms live by this clock from now on."""
    clock = Clock(frozen)
    for room in ("pipeline", "rules"):
        patch.setattr(importlib.import_module(room), "time", clock)
    return clock


def rest(application: Any, name: str) -> None:
    """As many failures in a row as make this provider rest."""
    lane = application.pipeline.plan.lanes[name]
    for _ in range(application.config.breaker.failures):
        lane.asked()
        lane.answered(False)
    assert lane.resting() > 0


class House:
    """A router in this process and what its readers get."""

    def __init__(self, app: App) -> None:
        self._app = app
        self.application = app.application
        self.events: list[dict[str, Any]] = []
        self.application.pipeline.sinks.append(self.events.append)

    @property
    def records(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == "complete"]

    @property
    def record(self) -> dict[str, Any]:
        """Of the only request there was."""
        (record,) = self.records
        assert self.stats()["in_flight"] == 0
        return record

    def post(
        self,
        path: str,
        body: dict[str, Any],
        headers: dict[str, str] | None = None,
        gone: Callable[[], bool] = bool,
    ) -> Answer:
        """One request; `gone` is how the server tells that the client has left."""
        return self.call(path, json.dumps(body).encode(), headers, gone)

    def call(self, path: str, body: bytes, headers: dict[str, str] | None = None, gone: Callable[[], bool] = bool) -> Answer:
        """The same with a body written by hand."""
        try:
            return self._app.call("POST", path, body, headers, **{"waitress.client_disconnected": gone})
        except (SystemExit, KeyboardInterrupt) as escaped:
            raise AssertionError("the request took the program with it") from escaped

    def chat(self, text: str = "hi", headers: dict[str, str] | None = None, **more: Any) -> Answer:
        return self.post(CHAT, chat_body(text, **more), headers)

    def route(self, text: str = "hi", **more: Any) -> dict[str, Any]:
        answer = self.post(ROUTE, chat_body(text, **more))
        assert answer.status == 200, answer
        told: dict[str, Any] = answer.json()
        return told

    def get(self, path: str) -> Any:
        return self._app.call("GET", path).json()

    def stats(self) -> dict[str, Any]:
        stats: dict[str, Any] = self.get("/api/v1/stats")
        return stats

    def breaker(self, name: str = "a") -> str:
        state: str = self.stats()["providers"][name]["breaker"]
        return state

    def settled(self, count: int) -> list[dict[str, Any]]:
        """So many records, agreeing with the counters; nothing runs any more."""
        until(lambda: len(self.records) >= count and self.stats()["in_flight"] == 0, 1, f"{count} requests ended")
        requests = self.stats()["requests"]
        assert requests["accepted"] == len(self.records) == count
        for outcome in ("ok", "error", "cancelled", "timeout", "rejected"):
            assert requests[outcome] == sum(record["outcome"] == outcome for record in self.records), requests
        return self.records


class Fakes:
    """Fake providers by name, closed together."""

    def __init__(self) -> None:
        self._made: dict[str, FakeUpstream] = {}

    def __getitem__(self, name: str) -> FakeUpstream:
        if name not in self._made:
            self._made[name] = FakeUpstream()
        return self._made[name]

    def __call__(self, names: str) -> list[FakeUpstream]:
        return [self[name] for name in names.split()]

    def counts(self) -> dict[str, int]:
        """How many requests each got; those that got none are left out."""
        return {name: len(fake.posts) for name, fake in self._made.items() if fake.posts}

    def close(self) -> None:
        for fake in self._made.values():
            fake.close()


@contextmanager
def fake_providers() -> Iterator[Fakes]:
    fakes = Fakes()
    try:
        yield fakes
    finally:
        fakes.close()


def always(script: Script, *fakes: FakeUpstream) -> None:
    for fake in fakes:
        fake.default = script


def sse_text(body: bytes) -> str:
    """The text of a streamed chat completion."""
    data = [line[6:] for line in body.decode().split("\n") if line.startswith("data: ") and line != "data: [DONE]"]
    choices = [choice for chunk in map(json.loads, data) for choice in chunk.get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)
