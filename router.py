"""The front door: reads config.toml, answers HTTP, offers the commands.

Top to bottom: settings and the one reader of the file, the WSGI application, the commands. Nobody imports this module.
"""

from __future__ import annotations

import ctypes
import dataclasses
import difflib
import functools
import gc
import hmac
import logging
import os
import re
import secrets
import sys
import threading
import time
import tomllib
import types
import typing
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import journal
import pipeline
import plugins
import providers
import rules
import server
import telemetry
from providers import BadRequest, ClientGone, RequestError

__version__ = "0.1.0"
log = logging.getLogger("opensourcellmrouter")


# Settings -------------------------------------------------------------------------------------------------------------
class ConfigError(Exception):
    """The configuration cannot be used; the text begins with the place in the file."""


@dataclass(frozen=True)
class ApiKey:
    """One [[api_keys]] table."""

    name: str = field(metadata={"doc": "what records, spans and filters call it"})
    key_env: str = field(metadata={"doc": "environment variable with the key"})


BROADCAST_DATABASE = "state/broadcast.db"
"""broadcast.Settings' own default, told here so that a router without Broadcast need not import that room to look for it."""
PARTS = {"plugins": "plugin", "classifiers": "classifier", "response_classifiers": "response_classifier"}
"""The sections of parts -> the function that makes one (see plugins/__init__.py)."""


@dataclass(frozen=True)
class Config:
    """The whole file."""

    server: server.Settings = field(default_factory=server.Settings)
    api_keys: tuple[ApiKey, ...] = ()
    logging: journal.Settings = field(default_factory=journal.Settings)
    telemetry: telemetry.Settings = field(default_factory=telemetry.Settings)
    retry: pipeline.Retry = field(default_factory=pipeline.Retry)
    breaker: rules.Breaker = field(default_factory=rules.Breaker)
    providers: tuple[providers.Provider, ...] = ()
    routers: tuple[rules.Rule, ...] = ()
    plugins: dict[str, dict[str, Any]] = field(default_factory=dict)
    classifiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    response_classifiers: dict[str, dict[str, Any]] = field(default_factory=dict)
    broadcast: Any = None
    """The [broadcast] section as broadcast.Settings; None, and that room not imported, where the file has none."""

    def __post_init__(self) -> None:
        names = [p.name for p in self.providers]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(f"providers[{i}].name: {name!r} is taken by an earlier provider")
        for i, rule in enumerate(self.routers):
            for place, name in rule.references().items():
                if name not in names:
                    raise ValueError(f"routers[{i}].{place}: no provider is named {name!r}{_suggest(name, names)}")
        for kind in PARTS:
            for id, table in getattr(self, kind).items():
                if not isinstance(table.get("enabled", False), bool):
                    raise ValueError(f"{kind}.{id}.enabled: must be true or false")


def load(path: str | Path, environ: Mapping[str, str] = os.environ) -> Config:
    """Read and check a configuration file. Raises ConfigError with one line that begins with the place."""
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(text)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read: {e.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8") from None
    except tomllib.TOMLDecodeError as e:
        raise ConfigError(f"{path}: is not TOML: {e}") from None
    reader = Reader(environ)
    section = table.pop("broadcast", None)
    config: Config = reader.read(Config, table, path.name)
    if section is not None:
        import broadcast

        settings = reader.read(broadcast.Settings, section, f"{path.name}.broadcast")
        config = dataclasses.replace(config, broadcast=settings)
        known = [key.name for key in config.api_keys]
        for i, d in enumerate(settings.destinations):
            for name in d.api_keys:
                if name not in known:
                    place = f"{path.name}.broadcast.destinations[{i}].api_keys"
                    raise ConfigError(f"{place}: no [[api_keys]] is named {name!r}{_suggest(name, known)}")
    try:
        overridden = telemetry.from_environment(config.telemetry, table.get("telemetry", {}), environ)
    except ValueError as e:
        raise ConfigError(f"{path.name}.telemetry{_joint(e)}{e}") from None
    return dataclasses.replace(config, telemetry=overridden)


class Reader:
    """Turns TOML tables into the rooms' frozen dataclasses: unknown keys, wrong types and broken rules are refused with
    their place; `${NAME}` in headers and keys is read from the environment."""

    SECRETS = frozenset(("headers", "api_key", "token", "access_token"))

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._environ = environ

    def read(self, cls: Any, table: Any, place: str) -> Any:
        """An instance of the dataclass from a table. Raises ConfigError."""
        if not isinstance(table, dict):
            raise ConfigError(f"{place}: must be a table")
        if cls is rules.Rule:
            cls, table = self._rule(table, place)
        hints, fields = _hints(cls), {f.name: f for f in dataclasses.fields(cls)}
        for key in table:
            if key not in fields:
                raise ConfigError(f"{place}.{key}: unknown key{_suggest(key, fields)}")
        for name, f in fields.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in table:
                raise ConfigError(f"{place}.{name}: required")
        values = {k: self._value(hints[k], v, f"{place}.{k}", k in self.SECRETS) for k, v in table.items()}
        try:
            return cls(**values)
        except ValueError as e:
            raise ConfigError(f"{place}{_joint(e)}{e}") from None

    def _rule(self, table: dict[str, Any], place: str) -> tuple[type, dict[str, Any]]:
        kind = table.get("type")
        if kind not in rules.RULES:
            told = "required" if kind is None else f"unknown rule type {kind!r}"
            raise ConfigError(f"{place}.type: {told}, known are {', '.join(rules.RULES)}")
        return rules.RULES[kind], {k: v for k, v in table.items() if k != "type"}

    def _value(self, hint: Any, value: Any, place: str, secret: bool) -> Any:
        origin, args = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):
            return self._value(_arm(args, value), value, place, secret)
        if origin is tuple and isinstance(value, list):
            return tuple(self._value(args[0], v, f"{place}[{i}]", secret) for i, v in enumerate(value))
        if origin is dict and isinstance(value, dict):
            return {k: self._value(args[1], v, f"{place}.{k}", secret) for k, v in value.items()}
        if dataclasses.is_dataclass(hint):
            return self.read(hint, value, place)
        if hint is float and type(value) is int:
            value = float(value)
        if hint is not Any and type(value) is not (origin or hint):
            raise ConfigError(f"{place}: must be {_TYPE_NAMES.get(origin or hint, 'of another type')}")
        if isinstance(value, float) and value != value:
            raise ConfigError(f"{place}: must be a number, not nan")
        return self._substitute(value, place) if secret and isinstance(value, str) else value

    def _substitute(self, value: str, place: str) -> str:
        def read(match: re.Match[str]) -> str:
            found = self._environ.get(match[1], "").strip()
            if not found:
                raise ConfigError(f"{place}: the environment variable {match[1]} is not set")
            telemetry.keep_secret(found)
            return found

        return re.sub(r"\$\{(\w+)\}", read, value)


def _joint(error: ValueError) -> str:
    """What joins a place and an error's text: some texts go on with the place ("base_url: required")."""
    return "." if re.match(r"[\w-]+([.\[][^:]*)?: ", str(error)) else ": "


_TYPE_NAMES = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    dict: "a table",
}


def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _arm(args: tuple[Any, ...], value: Any) -> Any:
    """The arm of a union a value is meant for, by its TOML type."""
    kinds = {list: tuple, int: float} if int not in args else {list: tuple}
    wanted = kinds.get(type(value), type(value))
    return next((a for a in args if (typing.get_origin(a) or a) is wanted), args[0])


def _suggest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f", did you mean {close[0]}?" if close else ""


# The WSGI application -------------------------------------------------------------------------------------------------
class Refused(RequestError):
    """A request that is not accepted: no record, counted under `reason`."""

    def __init__(self, message: str, *, reason: str, **more: Any) -> None:
        super().__init__(message, **more)
        self.reason = reason


@dataclass(frozen=True)
class Response:
    """A whole answer of the front door."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Sequence[tuple[str, str]] = ()
    close: Callable[[], None] | None = None
    stream: Iterable[bytes] | None = None


class Whole:
    """The body of a whole answer; its `close` tells the run that the answer was handed over."""

    def __init__(self, response: Response) -> None:
        self._pieces = iter((response.body,))
        self.close = response.close or bool

    def __iter__(self) -> Iterator[bytes]:
        return self._pieces


FACES = {"/v1/chat/completions": "openai", "/v1/messages": "anthropic", "/v1/responses": "responses"}
"""The path of each language's own endpoint: whoever calls it, or below it, is answered in that language."""
ASKED = {
    "/v1/chat/completions": ("openai", "parse_request"), "/v1/embeddings": ("openai", "parse_embeddings"),
    "/v1/route": ("openai", "parse_request"), "/v1/messages": ("anthropic", "parse_request"),
    "/v1/messages/count_tokens": ("anthropic", "parse_count_tokens"), "/v1/responses": ("responses", "parse_request"),
}  # fmt: skip
"""The paths of LLM requests -> the language, and its function that hears them."""


def face_of(path: str) -> Any:
    """The client face in which a path is answered: errors, too, come in the client's own dialect."""
    name = next((f for p, f in FACES.items() if path == p or path.startswith(p + "/")), "openai")
    return providers.language(name)


Methods = dict[str, Callable[[dict[str, Any], str], Response]]


class App:
    """The router as a WSGI callable (PEP 3333); `close` lets go of everything it holds."""

    def __init__(self, config: Config, environ: Mapping[str, str] = os.environ, source: str = "config.toml") -> None:
        """Raises ConfigError if a key that the configuration names is missing or unusable."""
        self.config, self._source = config, source
        self.keys, plan = prepare(config, environ, source)
        self.pipeline = pipeline.Pipeline(plan)
        self.draining = False
        self.port = config.server.port
        self._opening = threading.Lock()
        self.refused: Counter[str] = Counter()
        self._started = time.monotonic()
        self.log = journal.Journal(config.logging) if config.logging.enabled else None
        if self.log:
            self.pipeline.sinks.append(self.log.sink)
        self._prefix = config.server.url_prefix
        self.broadcast: Any = None
        self.dashboard: Any = None
        self._sessions: dict[str, tuple[float, bytes]] = {}  # until when, and the key it was traded for
        if config.server.dashboard:
            import dashboard

            self.dashboard = dashboard.Dashboard(
                max_watchers=config.server.watchers, spans=telemetry.spans, trace_url=config.server.trace_url
            )
            self.pipeline.sinks.append(self.dashboard.sink)
        self._plain: dict[str, Methods] = {
            "/health": {"GET": self._health},
            "/v1/models": {"GET": self._models},
            "/api/v1/stats": {"GET": self._stats},
        }
        settings: Methods = dict.fromkeys(("GET", "POST", "PUT", "DELETE"), self._observability)
        self._below: dict[str, Methods] = {"/v1/models/": {"GET": self._model}, "/api/v1/observability": settings}
        if self.dashboard:
            self._plain["/dashboard/events"] = {"GET": self._events}
            self._plain["/dashboard/session"] = {"POST": self._sign_in, "DELETE": self._sign_out}
            self._below |= {"/dashboard": {"GET": self._page}, "/api/v1/dashboard/": {"GET": self._page_data}}
        self._llm = ASKED

    def begin(self) -> None:
        """Start what runs beside the requests: Broadcast, telemetry, and the search for models where a provider can tell
        them. Raises ConfigError if Broadcast's database cannot be used."""
        if self.broadcast is None and self.broadcast_wanted(self.config):
            self._broadcasting(self.config)
        if self.config.telemetry.enabled and self.pipeline.telemetry is None:
            self.pipeline.telemetry = telemetry.start(self.config.telemetry, __version__)
            self.pipeline.sinks.append(self.pipeline.telemetry.sink)
            self.pipeline.propagate = self.config.telemetry.propagate
        if self.pipeline.discovery is None and any(lane.discoverable for lane in self.pipeline.plan.lanes.values()):
            self.pipeline.discovery = pipeline.Discovery(self.pipeline)

    def broadcast_wanted(self, config: Config) -> bool:
        """Is Broadcast on, or may it be: switched on by the page, or with a queue left from an earlier life?"""
        if config.broadcast is None:
            return Path(BROADCAST_DATABASE).exists()
        return bool(config.broadcast.enabled) or Path(config.broadcast.database).exists()

    def reload(self, config: Config, environ: Mapping[str, str], source: str) -> None:
        """Go by another configuration from the next request on. Raises ConfigError, and then all stays as it was.

        Providers that did not change keep their connections, their breaker and what was measured of them. What cannot
        change while the process runs (where it listens, its threads, the log, telemetry) is named in a warning.
        """
        fixed = {section: getattr(self.config, section) for section in ("server", "logging", "telemetry")}
        changed = [section for section, value in fixed.items() if getattr(config, section) != value]
        config = dataclasses.replace(config, **fixed)
        keys, plan = prepare(config, environ, source, self.pipeline.plan)
        if self.keys and not keys:
            raise ConfigError(f"{source}.api_keys: no key would be left; a door that is locked is only opened by a restart")
        self._reload_broadcast(config)
        for section in changed:
            log.warning("%s: [%s] has changed, which counts only after a restart", source, section)
        gone = [lane for name, lane in self.pipeline.plan.lanes.items() if plan.lanes.get(name) is not lane]
        self.config, self.keys, self.pipeline.plan = config, keys, plan
        for lane in gone:
            lane.upstream.retire()
        self.begin()
        if self.pipeline.discovery is not None:
            self.pipeline.discovery.again()

    def _reload_broadcast(self, config: Config) -> None:
        """The same for Broadcast alone; without the section only what the page made goes on."""
        if self.broadcast is None:
            if self.broadcast_wanted(config):
                self._broadcasting(config)
            return
        import broadcast

        try:
            self.broadcast.reload(config.broadcast or broadcast.Settings(database=self.broadcast.settings.database))
        except ValueError as e:
            raise ConfigError(f"{self._source}.broadcast.{e}") from None

    def in_flight(self) -> int:
        """How many LLM requests are running."""
        return self.pipeline.in_flight

    def drain(self) -> None:
        """Accept no further request; those that run go on."""
        self.draining = True

    def abort(self) -> None:
        """End every request: its next wait raises, the client gets an error frame, the record is made."""
        self.pipeline.aborting = True

    def tidy(self) -> None:
        """Close idle connections that are of no use any more."""
        for lane in self.pipeline.plan.lanes.values():
            lane.upstream.tidy()

    def refuse(self, error: RequestError, reason: str, path: str) -> bytes:
        """The body of an answer to something that was no request, in the dialect of its path; counted under the reason."""
        self.refused[reason] += 1
        body: str = providers.dumps(face_of(self._path({"PATH_INFO": path})).render_error(error))
        return body.encode()

    def close(self) -> None:
        """Write out what is queued and close the idle connections."""
        if self.pipeline.discovery is not None:
            self.pipeline.discovery.close()
        if self.log:
            self.log.close()
        if self.dashboard:
            self.dashboard.close_all()
        if self.broadcast:
            self.broadcast.close(2.0)
        if self.pipeline.telemetry:
            self.pipeline.telemetry.flush_and_stop(self.config.telemetry.shutdown_seconds)
        for lane in self.pipeline.plan.lanes.values():
            lane.upstream.close()

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        telemetry.leave()  # a body that was closed on another thread may have left its ids on this one
        path, began = self._path(environ), time.time_ns()
        try:
            answer = self._answer(environ, path)
        except RequestError as e:
            answer = self._error(e, path)
        except Exception as e:  # noqa: BLE001 - the last resort: a bug is a logged 500 in the client's dialect
            log.error("internal error at %s:\n%s", path, pipeline.trace_of(e))
            answer = self._error(RequestError("internal error; the router's log tells more"), path)
        if self.pipeline.telemetry and isinstance(answer, Response) and answer.close is None and not path.startswith(_UNTRACED):
            self._trace(environ, path, answer.status, began)
        return _send(answer, environ, start_response)

    def _trace(self, environ: Mapping[str, Any], path: str, status: int, began_ns: int) -> None:
        """The span of an HTTP request that was no LLM request, or none that was accepted."""
        observer = self.pipeline.telemetry
        assert observer is not None
        trace = observer.begin(environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE"))
        known = path in self._plain or path in self._llm
        route = path if known else next((place for place in self._below if _is_below(path, place)), "")
        duration = (time.time_ns() - began_ns) / 1e6
        observer.http(environ["REQUEST_METHOD"], route, status, began_ns, duration, trace, environ.get("REMOTE_ADDR", ""))

    def _path(self, environ: Mapping[str, Any]) -> str:
        """The path below url_prefix; routing and the gate both go by it. "" is no path of ours."""
        path: str = environ.get("PATH_INFO", "")
        if self._prefix and path != "/health":
            path = path[len(self._prefix) :] if path.startswith(self._prefix + "/") else ""
        alias = path.removeprefix("/api")
        own = path in self._plain or any(_is_below(path, place) for place in self._below)
        return alias if alias.startswith("/v1/") and not own else path

    def _answer(self, environ: dict[str, Any], path: str) -> Response | pipeline.Run:
        if path == "/health":
            return self._handler(environ, path)(environ, path)
        if path.startswith(_FOR_PAGES):
            self._check_host(environ)
        key_name = self._gate(environ, path)
        if isinstance(key_name, Response):
            return key_name
        handler = self._handler(environ, path)
        if path in self._llm:
            self._check_origin(environ, path)
            return self._run(environ, path, key_name)
        return handler(environ, path)

    def _handler(self, environ: Mapping[str, Any], path: str) -> Callable[[dict[str, Any], str], Response]:
        """Who answers; raises 404 for an unknown path and 405 with Allow for a method it does not have. HEAD is GET."""
        methods: Methods | None = {"POST": self._nowhere} if path in self._llm else self._plain.get(path)
        if methods is None:
            methods = next((m for place, m in self._below.items() if _is_below(path, place)), None)
        if methods is None:
            self._nowhere({}, path)
        assert methods is not None
        told = environ["REQUEST_METHOD"]
        method = "GET" if told == "HEAD" else told
        if method not in methods:
            allow = ", ".join(sorted([*methods, *(["HEAD"] if "GET" in methods else [])]))
            raise Refused(f"the method {told[:20]} is not allowed here, only {allow}", status=405, kind="invalid_request",
                          code="method_not_allowed", headers={"allow": allow}, reason="method")  # fmt: skip
        return methods[method]

    def _nowhere(self, environ: dict[str, Any], path: str) -> Response:
        raise Refused("there is nothing at this path", status=404, kind="not_found", code="not_found", reason="not_found")

    # the gate
    def _gate(self, environ: Mapping[str, Any], path: str) -> str | Response | None:
        """The name of the key a request came with (None where none is needed); the sign-in page for a person without
        one. Raises 401 alike for every wrong key."""
        if not self.keys:
            return None
        told = _credential(environ, path)
        if told is None and self.dashboard:
            until, key = self._sessions.get(_cookie(environ), (0.0, b""))
            if until > time.monotonic() and key in self.keys:
                return self.keys[key]
            if environ["REQUEST_METHOD"] in ("GET", "HEAD", "POST") and path in _SIGN_IN:
                return self._sign_in_page(environ, path)
        matched = self._matching(told or b"")
        if matched is None:
            raise Refused("a valid API key is needed", status=401, kind="authentication", code="invalid_api_key",
                          headers={"www-authenticate": "Bearer"}, reason="unauthorized")  # fmt: skip
        return self.keys[matched]

    def _matching(self, told: bytes) -> bytes | None:
        matched = None
        for key in self.keys:
            if hmac.compare_digest(told, key):  # on bytes: a str with non-ASCII characters would raise
                matched = key
        return matched

    def _check_host(self, environ: Mapping[str, Any]) -> None:
        """The pages answer under our own names only, or any web site could reach them by a name that leads here (DNS
        rebinding); and what they change is changed for our own pages only."""
        host = environ.get("HTTP_HOST")
        if host is not None and not self._is_ours(host):
            raise _forbidden("this Host is none of ours; server.allowed_hosts takes further names")
        origin = environ.get("HTTP_ORIGIN")
        changes = environ["REQUEST_METHOD"] not in ("GET", "HEAD")
        if changes and origin is not None and origin.partition("://")[2] != (host or ""):
            raise _forbidden("a page of another origin may change nothing here")

    def _check_origin(self, environ: Mapping[str, Any], path: str) -> None:
        """A web page of another site may not spend the money of whoever looks at it: a request that shows no key of its own
        comes from no foreign page. Programs send no Origin, or one that is no web site's."""
        scheme, _, host = environ.get("HTTP_ORIGIN", "").partition("://")
        if scheme not in ("http", "https", "null") or (self.keys and _credential(environ, path) is not None):
            return
        if _host_name(host) not in ("127.0.0.1", "::1", *self._names()):
            raise _forbidden("a page of another origin needs a key of its own; server.allowed_hosts takes further names")

    def _names(self) -> tuple[str, ...]:
        """The names under which this router is known."""
        return "localhost", self.config.server.host.lower(), *(h.lower() for h in self.config.server.allowed_hosts)

    def _is_ours(self, host: str) -> bool:
        name = _host_name(host)
        if re.fullmatch(r"[0-9.]+|[0-9a-f:]*:[0-9a-f:.]*", name):
            return True  # an address leads where it says
        return name in self._names()

    # the pages and their API
    def _page(self, environ: dict[str, Any], path: str) -> Response:
        name = path.removeprefix("/dashboard").strip("/")
        # The page's addresses are relative: below /dashboard/ it is served as it is one level down.
        asset = self.dashboard.asset("observability" if path == "/dashboard/" else name)
        if asset is None:
            return self._nowhere(environ, path)
        return Response(200, asset[1], asset[0], headers=_PAGE_HEADERS)

    def _page_data(self, environ: dict[str, Any], path: str) -> Response:
        query = dict(parse_qsl(environ.get("QUERY_STRING", "")))
        told = self.dashboard.api(path.removeprefix("/api/v1/dashboard"), query)
        return self._nowhere(environ, path) if told is None else _json(told)

    def _events(self, environ: dict[str, Any], path: str) -> Response:
        import dashboard

        gone = environ.get("waitress.client_disconnected", bool)
        try:
            watcher = self.dashboard.watch(_header(environ, "HTTP_LAST_EVENT_ID"), lambda: gone() or self.draining)
        except dashboard.Full:
            text = f"{self.config.server.watchers} watchers are there already (server.max_watchers)"
            raise Refused(text, status=503, kind="overloaded", code="too_many_watchers", headers={"retry-after": "10"},
                          reason="watchers") from None  # fmt: skip
        return Response(200, b"", stream=watcher, close=watcher.close)

    def _observability(self, environ: dict[str, Any], path: str) -> Response:
        body = None
        raw = self._body(environ)
        if environ["REQUEST_METHOD"] in ("POST", "PUT") or raw:
            if environ.get("CONTENT_TYPE", "").partition(";")[0].strip().lower() != "application/json":
                raise Refused("the settings API takes application/json", status=415, kind="invalid_request",
                              code="unsupported_media_type", reason="unsupported_media_type")  # fmt: skip
            body = providers.Body(raw).data
        try:
            room = self._broadcasting(self.config)
        except ConfigError as e:
            raise RequestError(str(e), status=503, kind="overloaded", code="unavailable") from None
        method = "GET" if environ["REQUEST_METHOD"] == "HEAD" else environ["REQUEST_METHOD"]
        status, told = room.api(method, path.removeprefix("/api/v1/observability"), body)
        allow = told.pop("allow", None) if status == 405 else None
        if "error" in told:
            told["error"]["src"] = "router"
        answer = _json(told, status)
        return dataclasses.replace(answer, headers=[*answer.headers, ("Allow", ", ".join(allow))]) if allow else answer

    def _broadcasting(self, config: Config) -> Any:
        """The broadcast room, opened when it is first needed: at start if it is configured, else by the settings API.
        Raises ConfigError if its database cannot be used."""
        with self._opening:
            if self.broadcast is None:
                import broadcast

                try:
                    room = broadcast.Broadcast(config.broadcast or broadcast.Settings(), listening=self.own_addresses)
                except ValueError as e:
                    raise ConfigError(f"{self._source}.broadcast.{e}") from None
                self.broadcast = room
                self.pipeline.sinks.append(room.sink)
        return self.broadcast

    def own_addresses(self) -> set[tuple[str, int]]:
        """Where this router listens: never a destination."""
        return set() if self.config.server.unix_socket else {(self.config.server.host, self.port)}

    def _sign_in_page(self, environ: Mapping[str, Any], path: str) -> Response:
        if path == "/dashboard/session":
            return self._handler(environ, path)(dict(environ), path)
        if path.startswith("/dashboard/sign-in"):
            kind, content = self.dashboard.asset(path.removeprefix("/dashboard/"))
            return Response(200, content, kind, headers=_PAGE_HEADERS)
        kind, content = self.dashboard.asset("sign-in" if path == "/dashboard" else "observability/sign-in")
        return Response(401, content, kind, headers=_PAGE_HEADERS)

    def _sign_in(self, environ: dict[str, Any], path: str) -> Response:
        """Trade a key for a session cookie, so that the page need not keep the key."""
        key = providers.Body(self._body(environ)).data.get("key")
        matched = self._matching(key.strip().encode("latin-1", "replace")) if isinstance(key, str) else None
        if matched is None:
            raise Refused(
                "this is not a valid key", status=401, kind="authentication", code="invalid_api_key", reason="unauthorized"
            )
        now, token = time.monotonic(), secrets.token_urlsafe(32)
        with self._opening:
            kept = [(name, session) for name, session in self._sessions.items() if session[0] > now]
            self._sessions = {**dict(kept[-999:]), token: (now + _SESSION_SECONDS, matched)}
        return Response(204, b"", headers=[("Set-Cookie", self._cookie_of(environ, token, _SESSION_SECONDS))])

    def _sign_out(self, environ: dict[str, Any], path: str) -> Response:
        with self._opening:
            self._sessions.pop(_cookie(environ), None)
        return Response(204, b"", headers=[("Set-Cookie", self._cookie_of(environ, "", 0))])

    def _cookie_of(self, environ: Mapping[str, Any], token: str, seconds: int) -> str:
        secure = "; Secure" if environ["wsgi.url_scheme"] == "https" else ""
        return f"{_COOKIE}={token}; Path={self._prefix or '/'}; Max-Age={seconds}; HttpOnly; SameSite=Strict{secure}"

    # LLM requests
    def _run(self, environ: dict[str, Any], path: str, key_name: str | None) -> Response | pipeline.Run:
        headers = {h: v for h, e in _PASSED_HEADERS.items() if (v := _header(environ, e)) is not None}
        try:
            request = self.hear(path, self._body(environ), headers)
        except BadRequest:
            self.refused["bad_request"] += 1
            raise
        if self.draining:
            raise Refused("the router is shutting down", status=503, kind="overloaded", code="shutdown", reason="shutdown")
        if path == "/v1/route":
            return _json(pipeline.explain(self.pipeline.plan, request))
        run = self.pipeline.start(request, _arrival(environ, path, key_name))
        try:
            run.open()
        except RequestError as e:
            return self._error(e, path, run)
        except ClientGone:
            return Response(499, b"", close=run.close)
        except BaseException:
            run.crashed()
            raise
        if request.stream:
            return run
        return Response(200, run.whole, headers=run.headers(), close=run.close)

    def hear(self, path: str, body: bytes, headers: Mapping[str, str] = types.MappingProxyType({})) -> providers.Request:
        """The request in a body sent to this path. Raises BadRequest naming the field that cannot be."""
        face, parse = self._llm[path]
        request: providers.Request = getattr(providers.language(face), parse)(providers.Body(body), headers)
        request.headers = dict(headers)
        return request

    def _body(self, environ: Mapping[str, Any]) -> bytes:
        limit = self.config.server.max_body_bytes
        told = environ.get("CONTENT_LENGTH") or "0"
        if not re.fullmatch(r"\d{1,18}", told):
            raise BadRequest("Content-Length is not a number")
        if int(told) > limit:
            raise _too_large(limit)
        data: bytes = environ["wsgi.input"].read(int(told)) if int(told) else b""
        if len(data) < int(told):
            raise BadRequest("the body is shorter than its Content-Length")
        coding = environ.get("HTTP_CONTENT_ENCODING", "identity").strip().lower()
        if coding in ("gzip", "x-gzip"):
            return _inflate(data, limit)
        if coding != "identity":
            raise Refused("only gzip is understood as Content-Encoding", status=415, kind="invalid_request",
                          code="unsupported_media_type", reason="unsupported_media_type")  # fmt: skip
        return data

    # everything else
    def _health(self, environ: dict[str, Any], path: str) -> Response:
        return Response(200, b"ok", "text/plain; charset=utf-8")

    def _models(self, environ: dict[str, Any], path: str) -> Response:
        self.pipeline.know_models()
        listed = [_model_object(m, owner) for m, owner in self.pipeline.plan.models().items()]
        return _json({"object": "list", "data": listed})

    def _model(self, environ: dict[str, Any], path: str) -> Response:
        model = path.removeprefix("/v1/models/").encode("latin-1").decode("utf-8", "replace")
        owner = self.pipeline.plan.models().get(model)
        if owner is None:
            raise Refused(f"no provider is known to serve the model {model[:200]!r}", status=404, kind="not_found",
                          code="model_not_found", param="model", reason="not_found")  # fmt: skip
        return _json(_model_object(model, owner))

    def _stats(self, environ: dict[str, Any], path: str) -> Response:
        return _json(self.stats())

    def stats(self) -> dict[str, Any]:
        """What /api/v1/stats answers."""
        written = {"written": self.log.written, "dropped": self.log.dropped} if self.log else {"written": 0, "dropped": 0}
        uptime = round(time.monotonic() - self._started, 3)
        seen = self.pipeline.telemetry
        return {
            "version": __version__, "uptime_s": uptime, **self.pipeline.stats(), "refused": dict(self.refused), "log": written,
            "telemetry": seen.stats() if seen else telemetry.NO_STATS,
            "broadcast": self.broadcast.stats() if self.broadcast else {"enabled": False, "destinations": {}},
            "feed": self.dashboard.stats() if self.dashboard else {"watchers": 0, "skipped": 0},
        }  # fmt: skip

    def _error(self, error: RequestError, path: str, run: pipeline.Run | None = None) -> Response:
        if isinstance(error, Refused):
            self.refused[error.reason] += 1
        body = providers.dumps(face_of(path).render_error(error)).encode()
        headers = [*error.headers.items(), *(run.headers() if run else ())]
        return Response(error.status, body, headers=headers, close=run.close if run else None)


def create_app(path: str | Path = "config.toml") -> App:
    """The router as a plain WSGI callable for any WSGI server. Raises ConfigError."""
    app = App(load(path), source=Path(path).name)
    app.begin()
    return app


def _send(answer: Response | pipeline.Run, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
    try:
        if isinstance(answer, pipeline.Run):
            start_response("200 OK", [*_STREAM_HEADERS, *answer.headers()])
            return answer
        if answer.stream is not None:
            start_response("200 OK", [*_STREAM_HEADERS, ("X-Content-Type-Options", "nosniff")])
            return answer.stream
        kind = [] if answer.status == 204 else [("Content-Type", answer.content_type), ("Content-Length", str(len(answer.body)))]
        headers = [(_cased(k), v) for k, v in (*kind, *answer.headers)]
        start_response(f"{answer.status} {server.REASONS.get(answer.status, 'Error')}", headers)
        return Whole(dataclasses.replace(answer, body=b"") if environ["REQUEST_METHOD"] == "HEAD" else answer)
    except BaseException:
        if answer.close:
            answer.close()
        raise


_UNTRACED = ("/health", "/dashboard")
_STREAM_HEADERS = [
    ("Content-Type", "text/event-stream; charset=utf-8"),
    ("Cache-Control", "no-cache"),
    ("X-Accel-Buffering", "no"),
]
_PASSED_HEADERS = {
    "x-session-id": "HTTP_X_SESSION_ID",
    "anthropic-beta": "HTTP_ANTHROPIC_BETA",
    "anthropic-version": "HTTP_ANTHROPIC_VERSION",
}


@functools.lru_cache(256)
def _cased(name: str) -> str:
    return "-".join(part.capitalize() for part in name.split("-"))


def _json(value: Any, status: int = 200) -> Response:
    return Response(status, providers.dumps(value).encode(), headers=[("Cache-Control", "no-store")])


def _model_object(model: str, owner: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": owner}


def _header(environ: Mapping[str, Any], name: str) -> str | None:
    """A request header as text; WSGI hands its bytes over as latin-1."""
    value = environ.get(name)
    return None if value is None else str(value).encode("latin-1").decode("utf-8", "replace")


def _credential(environ: Mapping[str, Any], path: str) -> bytes | None:
    """The key a request came with: Authorization: Bearer, else x-api-key, else in the address of the page and its feed."""
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    told = token.strip() if scheme.lower() == "bearer" else environ.get("HTTP_X_API_KEY")
    if told is None and path in ("/dashboard", "/dashboard/events") and environ["REQUEST_METHOD"] == "GET":
        told = dict(parse_qsl(environ.get("QUERY_STRING", ""), encoding="latin-1")).get("api_key")
    return None if told is None else told.encode("latin-1", "replace")


def _cookie(environ: Mapping[str, Any]) -> str:
    found = re.search(rf"(?:^|;)\s*{_COOKIE}=([\w-]+)", environ.get("HTTP_COOKIE", ""))
    return found[1] if found else ""


def _host_name(host: str) -> str:
    """The name in a Host header or an Origin, without port and brackets."""
    return re.sub(r":\d+$", "", host).strip("[]").lower()


def _is_below(path: str, place: str) -> bool:
    """Does a path belong to a place of the route table? One with a slash at its end holds only what is below it."""
    return path.startswith(place) and (place.endswith("/") or path[len(place) :][:1] in ("", "/"))


def _forbidden(text: str) -> Refused:
    return Refused(text, status=403, kind="permission", code="forbidden", reason="forbidden")


_COOKIE = "opensourcellmrouter"
_SESSION_SECONDS = 12 * 3600
_SIGN_IN = frozenset(("/dashboard", "/dashboard/", "/dashboard/observability", "/dashboard/session",
                      "/dashboard/sign-in.js", "/dashboard/sign-in.css"))  # fmt: skip
_FOR_PAGES = ("/dashboard", "/api/v1/stats", "/api/v1/observability", "/api/v1/dashboard")
_PAGE_HEADERS = (
    ("Content-Security-Policy", "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
     "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'"),
    ("X-Content-Type-Options", "nosniff"), ("X-Frame-Options", "DENY"), ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
)  # fmt: skip


def _arrival(environ: Mapping[str, Any], path: str, key_name: str | None) -> pipeline.Arrival:
    arrival = pipeline.Arrival(path, environ["REQUEST_METHOD"], environ.get("REMOTE_ADDR", "")[:100], key_name)
    arrival.traceparent, arrival.tracestate = environ.get("HTTP_TRACEPARENT"), environ.get("HTTP_TRACESTATE")
    gone = environ.get("waitress.client_disconnected")
    if gone is not None:
        channel = getattr(gone, "__self__", None)
        arrival.client_gone = gone
        arrival.gone_code = lambda: "client_stalled" if getattr(channel, "stalled", False) else "client_disconnected"
    return arrival


def _inflate(data: bytes, limit: int) -> bytes:
    """A gzip body unpacked, as far as the limit allows: one member or several in a row (RFC 1952, 2.2), and nothing else.

    It is fed in slices, because the end of a member copies what was fed after it, and a member may be 20 bytes long.
    """
    plain, room, unpacker = [], limit + 1, None
    for at in range(0, len(data), 4096):
        piece = data[at : at + 4096]
        while piece:
            unpacker = unpacker or zlib.decompressobj(wbits=31)
            try:
                plain.append(unpacker.decompress(piece, room))
            except zlib.error:
                raise BadRequest("the body is not gzip as Content-Encoding says") from None
            room -= len(plain[-1])
            if not room:
                raise _too_large(limit)
            piece, unpacker = unpacker.unused_data, None if unpacker.eof else unpacker
    if unpacker or not data:
        raise BadRequest("the gzip body is incomplete")
    return b"".join(plain)


def _too_large(limit: int) -> Refused:
    text = f"the body is larger than server.max_body_bytes = {limit}"
    return Refused(text, status=413, kind="too_large", code="request_too_large", reason="request_too_large")


def _read_keys(config: Config, environ: Mapping[str, str]) -> dict[bytes, str | None]:
    """The keys that open the door -> their names (None: the shared one)."""
    wanted: list[tuple[str, str, str | None]] = [("server.api_key_env", config.server.api_key_env, None)]
    wanted = wanted if config.server.api_key_env else []
    wanted += [(f"api_keys[{i}].key_env", k.key_env, k.name) for i, k in enumerate(config.api_keys)]
    keys: dict[bytes, str | None] = {}
    for place, variable, name in wanted:
        key = _key(place, variable, environ)
        if key is None:
            raise ValueError(f"{place}: the environment variable {variable} is not set")
        if key.encode("latin-1") in keys:
            raise ValueError(f"{place}: the key in {variable} has a name already")
        keys[key.encode("latin-1")] = name
    if config.server.exposed and not keys and not config.server.allow_unauthenticated:
        text = "needs a key (server.api_key_env or [[api_keys]]) or server.allow_unauthenticated = true"
        raise ValueError(f"server.host: listening on {config.server.host} {text}")
    return keys


def _key(place: str, variable: str, environ: Mapping[str, str]) -> str | None:
    try:
        return providers.read_key(variable, environ)
    except ValueError as e:
        raise ValueError(f"{place}: {e}") from None


def prepare(
    config: Config, environ: Mapping[str, str], source: str, old: pipeline.Plan | None = None
) -> tuple[dict[bytes, str | None], pipeline.Plan]:
    """The keys that open the door, and the plan by which requests go. Raises ConfigError."""
    try:
        return _read_keys(config, environ), _plan(config, environ, old)
    except ValueError as e:
        raise ConfigError(f"{source}.{e}") from None


def _plan(config: Config, environ: Mapping[str, str], old: pipeline.Plan | None) -> pipeline.Plan:
    lanes = _lanes(config, environ, old)
    parts = {kind: _parts(config, kind) for kind in PARTS}
    limit = config.server.in_flight_limit
    return pipeline.Plan(lanes, config.routers, config.retry, limit, plugin_settings=config.plugins, **parts)


def _parts(config: Config, kind: str) -> list[plugins.Part]:
    """The enabled parts of a section. Those that are off are checked, too: a request may turn one on."""
    made = []
    for id, settings in getattr(config, kind).items():
        enabled = settings.get("enabled", False)
        try:
            part = (plugins.make if enabled else plugins.rehearse)(PARTS[kind], id, settings)
            _check_references(part, [p.name for p in config.providers])
        except ValueError as e:
            raise ValueError(f"{kind}.{id}{_joint(e)}{e}") from None
        made += [part] if part and enabled else []
    return made


def _check_references(part: plugins.Part | None, names: Sequence[str]) -> None:
    """Raise ValueError if a part of ours names a provider that does not exist."""
    for place, name in {} if part is None or part.foreign else getattr(part.hooks, "references", {}).items():
        if name not in names:
            raise ValueError(f"{place}: no provider is named {name!r}{_suggest(name, names)}")


def _lanes(config: Config, environ: Mapping[str, str], old: pipeline.Plan | None) -> dict[str, rules.Lane]:
    """The providers that can be in service: one whose key is named but unset is left out with a warning."""
    lanes: dict[str, rules.Lane] = {}
    missing: list[str] = []
    for i, provider in enumerate(config.providers):
        key = None
        if provider.api_key_env:
            key = _key(f"providers[{i}].api_key_env", provider.api_key_env, environ)
            if key is None:
                missing.append(
                    f"provider {provider.name} is left out: the environment variable {provider.api_key_env} is not set"
                )
                continue
        for name, value in provider.headers.items():
            if re.search("auth|key|token|secret|cookie", name.lower()):
                telemetry.keep_secret(value)
        before = old.lanes.get(provider.name) if old else None
        if before is not None and before.unchanged(provider, key, config.breaker):
            lanes[provider.name] = before
        else:
            lanes[provider.name] = rules.Lane(providers.Upstream(provider, key, config.server.threads), config.breaker)
    if not lanes:
        raise ValueError(f"providers: no provider is left to answer requests{''.join(f'; {m}' for m in missing)}")
    for line in missing:
        log.warning(line)
    return lanes


# Commands -------------------------------------------------------------------------------------------------------------
class _Scrubbed(logging.Formatter):
    """Program log lines: one line each, secrets taken out."""

    def format(self, record: logging.LogRecord) -> str:
        return telemetry.scrub(super().format(record))


def start_logging(level: int = logging.INFO) -> None:
    """Send the program's own log lines to stderr. logging's habit of printing a record it failed to write is turned off:
    it would print what was scrubbed."""
    logging.raiseExceptions = False
    handler = logging.StreamHandler()
    handler.setFormatter(_Scrubbed("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level, handlers=[handler])
    logging.getLogger("waitress").setLevel(logging.ERROR)  # it reports every client that leaves; the records tell that
    logging.getLogger("urllib3").setLevel(logging.ERROR)
    logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # the telemetry room tells of failures itself, once a minute


def _keep_memory_small() -> None:
    """Have glibc keep two heaps instead of eight per core, and give large blocks back at once: with a thread per request
    every heap would grow to the largest request it ever saw, and Python uses one at a time anyway."""
    tune = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if tune is not None:
        tune(M_ARENA_MAX, 2)
        tune(M_MMAP_THRESHOLD, 1 << 20)


M_ARENA_MAX, M_MMAP_THRESHOLD = -8, -3
"""glibc's malloc.h."""


def _give_memory_back() -> None:
    """Return to the system what starting up has used and freed."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def serve(args: Any) -> int:
    """Run the router until a signal stops it."""
    _keep_memory_small()
    start_logging()
    config = load(args.config)
    signals = server.Signals()
    try:
        listener = server.listen(config.server)
    except OSError as e:
        raise ConfigError(str(e.strerror)) from None
    try:
        app = App(config, source=Path(args.config).name)
    except ConfigError:
        listener.close()
        raise
    app.port = config.server.port if config.server.unix_socket else listener.getsockname()[1]
    service = server.Service(app, config.server, listener, signals, lambda: _reload(app, Path(args.config)))
    app.begin()
    where = config.server.unix_socket or "http://{}:{}".format(*listener.getsockname()[:2])
    log.info("opensourcellmrouter %s listens on %s%s", __version__, where, config.server.url_prefix)
    if not config.routers:
        log.warning("%s has no [[routers]]: no request can be routed", args.config)
    # What is alive now lives as long as the process: the collector need not look at it again with every request.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)
    _give_memory_back()
    return 0 if service.run() else 1


def _reload(app: App, path: Path) -> None:
    """Read the configuration again; what cannot be used leaves all as it was."""
    try:
        app.reload(load(path), os.environ, path.name)
    except ConfigError as e:
        log.error("the configuration stays as it was: %s", e)
    except Exception as e:  # noqa: BLE001 - a bug of ours in reading a file must not end the requests that run
        log.error("the configuration could not be read again:\n%s", pipeline.trace_of(e))
    else:
        log.info("%s was read again", path)


def check(args: Any) -> int:
    """Read and check the configuration, keys included, and start nothing."""
    start_logging()
    app = _idle_app(args.config)
    app.close()
    serving, known = len(app.pipeline.plan.lanes), len(app.config.providers)
    print(f"{args.config}: ok, {serving} of {known} providers, {len(app.config.routers)} rules")
    return 0


def route(args: Any) -> int:
    """Show who would answer a prompt, and why; nothing is sent."""
    start_logging(logging.WARNING)
    app = _idle_app(args.config)
    try:
        for lane in app.pipeline.plan.lanes.values():
            if lane.discoverable:
                pipeline.discover(lane, pipeline.Patience(3.0))
        asked = {"model": args.model, "messages": [{"role": "user", "content": args.prompt}]}
        request = app.hear("/v1/route", providers.dumps(asked).encode())
        told = pipeline.explain(app.pipeline.plan, request)
    except RequestError as e:
        print(e)
        return 1
    finally:
        app.close()
    print("\n".join(_explanation(told)))
    return 0 if told["chosen"] else 1


def _explanation(told: Mapping[str, Any]) -> Iterator[str]:
    """The dry run as lines for a terminal."""
    yield f"tags: {', '.join(told['tags']) or 'none'}"
    for rule in told["rules"]:
        yield (
            f"{'yes' if rule['matched'] else 'no ':3} {rule['index']}:{rule['type']} {rule['name']}".rstrip()
            + f": {rule['reason']}"
        )
        for c in rule["candidates"]:
            value = "" if c["value"] is None else f" ({c['value']:g})"
            yield f"      {c['provider']} -> {c['model']}{value}{', skipped: ' + c['skipped'] if c['skipped'] else ''}"
    order = [f"{c['provider']} ({c['model']})" for c in told["chosen"]]
    yield f"asked in this order: {', then '.join(order)}" if order else "nobody would be asked: no rule yields a candidate"


def doctor(args: Any) -> int:
    """Try everything the configuration connects to; say what is wrong and what cures it."""
    start_logging(logging.WARNING)
    app = _idle_app(args.config)
    findings = [(f"provider {name}", *pipeline.examine(lane)) for name, lane in app.pipeline.plan.lanes.items()]
    out = [p for p in app.config.providers if p.name not in app.pipeline.plan.lanes]
    findings += [(f"provider {p.name}", False, f"left out: set the environment variable {p.api_key_env}") for p in out]
    findings += _telemetry_findings(app.config.telemetry) if app.config.telemetry.enabled else []
    findings += _broadcast_findings(app) if app.config.broadcast or app.broadcast_wanted(app.config) else []
    app.close()
    width = max(len(what) for what, _, _ in findings)
    for what, ok, text in findings:
        print(f"{_coloured('ok  ', '32') if ok else _coloured('FAIL', '31')} {what:{width}}  {_printable(telemetry.scrub(text))}")
    return 0 if all(ok for _, ok, _ in findings) else 1


def _telemetry_findings(settings: telemetry.Settings) -> list[tuple[str, bool, str]]:
    """One test span, metric and log line sent, and what came back."""
    observer = telemetry.start(settings, __version__)
    found = [(f"telemetry {f['signal']}", bool(f["ok"]), f"{f['message']} {f['advice'] or ''}".strip()) for f in observer.probe()]
    observer.flush_and_stop(settings.shutdown_seconds)
    return found


def _broadcast_findings(app: App) -> list[tuple[str, bool, str]]:
    """A test span sent to each destination, and what came back."""
    import broadcast

    try:
        beside = broadcast.Broadcast(app.config.broadcast or broadcast.Settings(), listening=app.own_addresses, start=False)
    except ValueError as e:
        return [("broadcast", False, str(e))]
    found = [(f["place"], bool(f["ok"]), f"{f['message']} {f['cure'] or ''}".strip()) for f in beside.doctor()]
    beside.close(1.0)
    return found


def replay(args: Any) -> int:
    """Send a file destination's lines on to another destination."""
    import broadcast

    start_logging(logging.WARNING)
    settings = load(args.config).broadcast or broadcast.Settings()
    try:
        told = broadcast.replay(args.file, settings, args.to)
    except ValueError as e:
        raise ConfigError(str(e)) from None
    except OSError as e:
        raise ConfigError(f"{args.file}: {e.strerror}") from None
    dropped = ", ".join(f"{n} {reason}" for reason, n in told["dropped"].items())
    print(
        f"{told['lines']} lines, {told['delivered']} delivered"
        + (f"; dropped: {dropped}; {told['last_error']}" if dropped else "")
    )
    return 1 if dropped else 0


def watch(args: Any) -> int:
    """Show the live feed of a running router in a terminal."""
    from dashboard import terminal

    key = os.environ.get(args.api_key_env, "").strip() if args.api_key_env else None
    if args.api_key_env and not key:
        raise ConfigError(f"--api-key-env: the environment variable {args.api_key_env} is not set")
    return terminal.watch(args.url, key, sys.stdout, sys.stdout.isatty() and "NO_COLOR" not in os.environ)


def _printable(text: str) -> str:
    """A text from elsewhere as it may go to a terminal: without what could move its cursor or change its colours."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _coloured(text: str, colour: str) -> str:
    return f"\x1b[{colour}m{text}\x1b[0m" if sys.stdout.isatty() and "NO_COLOR" not in os.environ else text


def _idle_app(path: str) -> App:
    """The application of a configuration, with nothing running beside it."""
    config = dataclasses.replace(load(path), logging=journal.Settings())
    return App(config, source=Path(path).name)


CONFIG = (("config",), {"nargs": "?", "default": "config.toml", "help": "the configuration file (default: config.toml)"})
COMMANDS: dict[str, tuple[Callable[[Any], int], str, tuple[tuple[tuple[str, ...], dict[str, Any]], ...]]] = {
    "serve": (serve, "run the router (the default)", (CONFIG,)),
    "check": (check, "check the configuration and start nothing", (CONFIG,)),
    "doctor": (doctor, "try everything the configuration connects to: causes and cures", (CONFIG,)),
    "watch": (
        watch,
        "show the live feed of a running router",
        (
            (("url",), {"nargs": "?", "default": "http://127.0.0.1:8090", "help": "the router (default: http://127.0.0.1:8090)"}),
            (("--api-key-env",), {"metavar": "NAME", "help": "environment variable with the key"}),
        ),
    ),
    "replay": (
        replay,
        "send the lines of a file destination on to another destination",
        (
            (("file",), {"help": "the file"}),
            (("--to",), {"required": True, "metavar": "NAME", "help": "the destination"}),
            (("--config",), {"default": "config.toml", "help": "where the destination is configured (default: config.toml)"}),
        ),
    ),
    "route": (
        route,
        "show who would answer a prompt, and why; nothing is sent",
        (
            (
                ("words",),
                {
                    "nargs": "+",
                    "metavar": "[config] prompt",
                    "help": "the prompt, after the configuration file if it is not config.toml",
                },
            ),
            (("-m", "--model"), {"required": True, "help": "the model a client would ask for"}),
        ),
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Exit codes: 0 ok, 1 a finding, 2 usage or configuration."""
    import argparse

    words = list(sys.argv[1:] if argv is None else argv)
    if not words or (words[0] not in COMMANDS and not words[0].startswith("-")):
        words.insert(0, "serve")
    parser = argparse.ArgumentParser(
        prog="opensourcellmrouter", description="A small self-hosted LLM router with full sight of every request."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, text, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text)
        for names, options in arguments:
            command.add_argument(*names, **options)
    args, more = parser.parse_known_args(words)
    if args.command == "route":
        args.words += more  # argparse takes the words before -m only
        *config, args.prompt = args.words
        args.config = config[0] if config else "config.toml"
    if (args.command != "route" and more) or len(getattr(args, "words", ())) > 2:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    try:
        return COMMANDS[args.command][0](args)
    except ConfigError as e:
        print(telemetry.scrub(str(e)).replace("\n", " "), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
