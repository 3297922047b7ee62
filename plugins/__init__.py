"""The parts that look at a request on its way: plugins act on it, classifiers tag it.

A part is a module. A built-in one is a file of this folder (`response-healing` is `response_healing.py`), a foreign one is
named in the configuration (`module = "pkg.mod"`); both offer the same: `plugin(settings)` or `classifier(settings)` gives an
object with any of

    on_start(request)               before anything is decided
    pre_request(request)            after the classifiers, before the rules
    post_response(request, answer)  with the whole answer (not for streams)
    on_end(request, answer)         when everything has been sent
    classify(request) -> list of tags                classifiers
    classify_response(request, answer) -> list of tags      response classifiers

`request` and `answer` are `providers.Request` and `providers.Answer`. A hook returns None (go on), an Answer (that is the
answer), or STOP: before there is an answer the client gets a 403 that names the plugin, afterwards the remaining plugins
are skipped. Settings are a dict; a part raises ValueError for what it cannot use.
"""

from __future__ import annotations

import ctypes
import difflib
import importlib
import pkgutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from providers import Answer, RequestError

STOP = object()
"""What a hook returns to end a request."""
SECONDS = 10.0
"""The most one hook of a foreign part may take (its key `timeout` says otherwise)."""
GONE = {"web": "web search", "pdf": "PDF parsing"}
"""Plugins of the original that do not exist here."""


class PluginError(RequestError):
    """A part failed before there was an answer; the client hears which one, the program's log hears why."""


class Stopped(RequestError):
    """A plugin ended the request."""

    status = 403
    kind = "permission"


@dataclass(frozen=True)
class Part:
    """A plugin or classifier in service: its id, what it was made of, and the object with its hooks."""

    id: str
    settings: Mapping[str, Any]
    hooks: Any
    foreign: bool = False
    timeout: float = SECONDS

    def has(self, hook: str) -> bool:
        return hasattr(self.hooks, hook)

    def call(self, hook: str, *args: Any) -> Any:
        """Run a hook. A foreign one is given `timeout` seconds. Raises what it raises as an Exception, or TimeoutError."""
        function = getattr(self.hooks, hook)
        try:
            return _within(self.timeout, function, args) if self.foreign else function(*args)
        except Exception:
            raise
        except BaseException as e:  # noqa: BLE001 - a part may end itself, not the program
            raise RuntimeError(type(e).__name__) from None


def known(maker: str) -> list[str]:
    """The ids of the built-in parts that have this maker ("plugin", "classifier", "response_classifier")."""
    return [_id(name) for name in _files() if hasattr(importlib.import_module(f"{__name__}.{name}"), maker)]


def _files() -> list[str]:
    return [m.name for m in pkgutil.iter_modules(__path__)]


def _id(file: str) -> str:
    return file.replace("_", "-")


def _is_gone(maker: str, id: str) -> bool:
    return maker == "plugin" and id in GONE


class Missing(ValueError):
    """A setting that a part cannot do without is not there; a part that is off may leave it for later."""


def rehearse(maker: str, id: str, settings: Mapping[str, Any]) -> Part | None:
    """A part that is off as it would be if it were on, because a typo is one even there. None where that cannot be known:
    a foreign part is not loaded before it is used, and one of the original's may be gone. Raises ValueError like `make`."""
    if _is_gone(maker, id) or isinstance(settings.get("module"), str):
        return None
    try:
        return make(maker, id, settings)
    except Missing:
        return None


def make(maker: str, id: str, settings: Mapping[str, Any]) -> Part:
    """The part with this id. Raises ValueError, in words for the configuration file, if it cannot be had."""
    if _is_gone(maker, id):
        raise ValueError(f"enabled: {GONE[id]} does not exist here, it must be false")
    module_name = settings.get("module")
    if module_name is not None and not isinstance(module_name, str):
        raise ValueError("module: must be a string")
    if module_name is None and id not in known(maker):
        raise ValueError(f"unknown {maker.replace('_', ' ')} (a foreign one needs module){_suggest(id, known(maker))}")
    own = {k: v for k, v in settings.items() if k not in _ROUTERS_OWN}
    limit = settings.get("timeout", SECONDS)
    if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not 0 < limit <= 3600:
        raise ValueError("timeout: must be a number of seconds, more than 0 and at most 3600")
    hooks = _made(maker, module_name or f"{__name__}.{id.replace('-', '_')}", own, foreign=module_name is not None)
    return Part(id, own, hooks, module_name is not None, float(limit))


def _suggest(id: str, ids: list[str]) -> str:
    close = difflib.get_close_matches(id, ids, 1)
    return f", did you mean {close[0]}?" if close else f", known are {', '.join(ids)}"


_ROUTERS_OWN = frozenset(("enabled", "module", "timeout"))


def _made(maker: str, name: str, settings: Mapping[str, Any], *, foreign: bool) -> Any:
    """The object with the hooks. Raises ValueError for whatever is wrong with a module that is not ours."""
    try:
        module = importlib.import_module(name)
    except BaseException as e:  # noqa: BLE001 - foreign code runs here, even a SystemExit must not end the program
        why = f": {e}" if isinstance(e, (ImportError, SyntaxError)) else ""  # others may say anything
        raise ValueError(f"module: {name} cannot be imported: {type(e).__name__}{why}") from None
    make_part = getattr(module, maker, None)
    if not callable(make_part):
        raise ValueError(f"module: {name} has no function {maker}(settings)")
    try:
        hooks = make_part(dict(settings))
    except ValueError:
        raise
    except BaseException as e:
        if not foreign:
            raise
        raise ValueError(f"module: {name} failed in {maker}(settings): {type(e).__name__}") from None
    if hooks is None:
        raise ValueError(f"module: {name} gave nothing for {maker}(settings)")
    return hooks


def _within(seconds: float, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Call with a limit, on a thread of its own. One that runs over is interrupted at its next Python instruction, so
    that it does not stay; one that sleeps in C code ends when that returns."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        try:
            outcome["value"] = function(*args)
        except BaseException as e:  # noqa: BLE001 - carried over to the request's thread and raised there
            outcome["error"] = e

    thread = threading.Thread(target=run, name="plugin", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(TimeoutError))
        raise TimeoutError(f"no result within {seconds:g} s")
    if "error" in outcome:
        raise outcome["error"]
    return outcome.get("value")


def is_answer(value: Any) -> bool:
    """Is this what a hook may answer with?"""
    return isinstance(value, Answer)
