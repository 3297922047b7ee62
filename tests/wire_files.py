"""Golden files: requests, canonical words and streams as they stand under tests/wire, one set of files per case."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import providers
from providers import Answer, Body, Event, Request, Usage

WIRE = Path(__file__).resolve().parent / "wire"


def cases(folder: str, ending: str) -> list[str]:
    """The names of the cases in a folder that have a file with this ending."""
    return sorted(p.name.removesuffix(ending) for p in (WIRE / folder).iterdir() if p.name.endswith(ending))


def read(folder: str, name: str) -> Any:
    """What a JSON file says."""
    return json.loads((WIRE / folder / name).read_text("utf-8"))


def raw(folder: str, name: str) -> bytes:
    """A file's bytes."""
    return (WIRE / folder / name).read_bytes()


def heard(format: str, told: dict[str, Any]) -> Request:
    """The request that a client of this language made by sending this object."""
    request: Request = providers.language(format).parse_request(Body(json.dumps(told).encode()), {})
    return request


def canonical(request: Request) -> dict[str, Any]:
    """What a request says in the router's words, without all that the client did not say."""
    said = _said(request)
    for known in ("format", "body", "router", "include_usage"):
        said.pop(known, None)
    return {**said, **{name: [_said(v) for v in said[name]] for name in ("messages", "tools") if name in said}}


def _said(value: Any) -> dict[str, Any]:
    """The fields of a dataclass that are not at their default."""
    found = {}
    for f in dataclasses.fields(value):
        default = f.default_factory() if callable(f.default_factory) else f.default
        if getattr(value, f.name) != default:
            found[f.name] = getattr(value, f.name)
    return found


def written(events: Iterable[Event]) -> list[dict[str, Any]]:
    """Events as JSON."""
    told = [{"event": type(e).__name__, **_said(e)} for e in events]
    return [{k: _said(v) if isinstance(v, Usage) else v for k, v in t.items()} for t in told]


def events(told: list[dict[str, Any]]) -> list[Event]:
    """Events from JSON."""
    return [_event(**t) for t in told]


def _event(event: str, **told: Any) -> Event:
    if "usage" in told:
        told["usage"] = Usage(**told["usage"])
    made: Event = getattr(providers, event)(**told)
    return made


def fold(events: Iterable[Event]) -> dict[str, Any]:
    """What is left of events once they are an answer: the same for every way of cutting it into pieces."""
    answer = Answer()
    for event in events:
        answer.add(event)
    calls = [(c.id, c.name, c.arguments) for _, c in sorted(answer.tool_calls.items())]
    reason = (answer.finish.reason, answer.finish.native) if answer.finish else None
    kept = {"id": answer.id, "model": answer.model, "text": answer.text, "thinking": answer.thinking, "calls": calls}
    return {**kept, "finish": reason, "usage": answer.usage, "timings": answer.timings, "done": answer.done}


def heard_in_pieces(parser: Any, pieces: Iterable[bytes]) -> list[Event]:
    """The events of a stream that arrives in these pieces."""
    found = [event for piece in pieces for _, said in parser.feed(piece) for event in said]
    return found + [event for _, said in parser.end() for event in said]


def cut(data: bytes, places: Iterable[int]) -> list[bytes]:
    """The data, cut at these places."""
    at = sorted({0, len(data), *(p % (len(data) + 1) for p in places)})
    return [data[a:b] for a, b in itertools.pairwise(at)] or [data]
