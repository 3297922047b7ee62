"""What is configured: the settings, the destinations, what each type of them needs and takes, and where it sends.

`TYPES` is the table of types: their own fields, and the URL and headers these become, in any of the forms people paste. A
Destination that exists is valid: every rule is checked when it is made, and says the field and the cure. An address is
judged by what it is, not by how it is spelled (`refusal`). Filters and samples decide which records a destination takes
(`skip_reason`). The JSON form of the settings API is here too, because what is secret is known here: secrets leave as
masks, and a mask that comes back means what is stored.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import re
import socket
import urllib.parse
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Final, NamedTuple

from broadcast.encoder import Record, as_count, as_double, blocks
from broadcast.otlp import digest


class BadAddress(ValueError):
    """A URL we do not send to; in the settings API that is a failed test rather than a malformed request."""


class RefusedAddress(BadAddress):
    """One that we would not send to if there were anything there."""


class Target(NamedTuple):
    """Where one request goes."""

    scheme: str
    host: str
    port: int
    path: str
    method: str
    headers: dict[str, str]
    plain: bool  # a webhook's program seldom inflates gzip, and answers in its own words

    def __repr__(self) -> str:  # path and headers may hold secrets
        return f"Target({self.authority!r})"

    @property
    def origin(self) -> tuple[str, str, int]:
        return self.scheme, self.host, self.port

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


PORTS: Final = {"http": 80, "https": 443}
NOT_YOURS: Final = frozenset(
    (
        "host", "content-length", "transfer-encoding", "connection", "content-type", "content-encoding", "expect", "te",
        "accept-encoding", "trailer", "upgrade", "keep-alive", "proxy-authorization", "proxy-connection", "user-agent",
    )
)  # fmt: skip
MOST_HEADERS: Final = 50
HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,128}")
HEADER_VALUE = re.compile(r"[\x21-\x7e\xa0-\xff](?:[\x20-\x7e\xa0-\xff]{0,8190}[\x21-\x7e\xa0-\xff])?")

Own = Iterable[tuple[str, int]]  # where this router itself listens
Listening = Callable[[], Own]


def _doc(line: str) -> dict[str, str]:
    return {"doc": line}


@dataclass(frozen=True, repr=False)
class Destination:
    """One place to send to, from [[broadcast.destinations]] or from the page."""

    name: str = field(metadata=_doc("its name on the page and in /api/v1/stats"))
    type: str = field(metadata=_doc("otel-collector, grafana, axiom, jaeger, tempo, honeycomb, lightstep, webhook or file"))
    enabled: bool = field(default=True, metadata=_doc("false: takes nothing, keeps what is queued"))
    endpoint: str = field(default="", metadata=_doc("otel-collector: the URL as it is; axiom, honeycomb, lightstep: a region's"))
    headers: dict[str, Any] = field(default_factory=dict, metadata=_doc("further request headers, for authentication"))
    base_url: str = field(default="", metadata=_doc("grafana, jaeger, tempo: the gateway; /v1/traces is added"))
    instance_id: str | int = field(default="", metadata=_doc("grafana: the numeric id"))
    api_key: str = field(default="", metadata=_doc("grafana, honeycomb"))
    token: str = field(default="", metadata=_doc("axiom"))
    dataset: str = field(default="", metadata=_doc("axiom; honeycomb Classic"))
    tenant: str = field(default="", metadata=_doc("tempo (X-Scope-OrgID), jaeger (x-tenant)"))
    access_token: str = field(default="", metadata=_doc("lightstep"))
    url: str = field(default="", metadata=_doc("webhook"))
    method: str = field(default="POST", metadata=_doc("webhook: POST or PUT"))
    path: str = field(default="", metadata=_doc("file: one OTLP JSON request per line, mode 0600"))
    privacy_mode: bool = field(default=False, metadata=_doc("true: no prompt, answer or tool argument ever goes there"))
    sampling_rate: float = field(default=1.0, metadata=_doc("0.0001-1, of whole sessions"))
    api_keys: tuple[str, ...] = field(default=(), metadata=_doc("names of [[api_keys]] whose requests it takes; empty: all"))
    filter_rules: dict[str, Any] = field(
        default_factory=dict, metadata=_doc("{enabled, groups = [{logic, rules = [{field, operator, value}]}]}")
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "instance_id", str(self.instance_id))
        if not self.name or len(self.name) > 128 or not self.name.isprintable():
            raise ValueError("name: 1 to 128 printable characters")
        if self.type not in TYPES:
            raise ValueError(f"type: {self.type!r} is not one of {', '.join(TYPES)}")
        if not 0.0001 <= self.sampling_rate <= 1:
            raise ValueError("sampling_rate: must lie between 0.0001 and 1")
        _check_fields(self)
        check_headers(self.headers)
        check_filters(self.filter_rules)
        if self.type != "file":
            target(self)

    def __repr__(self) -> str:  # most other fields may hold secrets
        return f"Destination({self.name!r}, {self.type!r})"


# -- the types

Place = tuple[str, dict[str, str]]  # URL and headers


class Kind(NamedTuple):
    """One destination type: its own fields, and the URL and headers they become."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    place: Callable[[Destination, str], Place]


def _home(url: str, scheme: str, ending: str, *strip: str) -> str:
    """Any of the forms people paste: with or without scheme, slash or part of the path."""
    parts = urllib.parse.urlsplit(url if "://" in url else f"{scheme}://{url}")
    path = parts.path.rstrip("/")
    for tail in strip:
        path = path.removesuffix(tail).rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(path=path + ending))


def _region(given: str, home: str) -> str:
    """A region's endpoint as it is, unless it is only a host."""
    if "://" in given and urllib.parse.urlsplit(given).path.strip("/"):
        return given
    return _home(given, "https", "/v1/traces", "/v1/traces") if given else home


def _grafana(d: Destination, url: str) -> Place:
    joined = base64.b64encode(f"{str(d.instance_id).strip()}:{d.api_key.strip()}".encode()).decode()
    url = _home(url or GRAFANA_HOME, "https", "/otlp/v1/traces", "/v1/traces", "/otlp")
    return url, {"Authorization": f"Basic {joined}"}


def _axiom(d: Destination, url: str) -> Place:
    token = re.sub(r"(?i)^bearer\s+", "", d.token.strip())  # pasted with the word in front
    headers = {"Authorization": f"Bearer {token}", "X-Axiom-Dataset": d.dataset.strip()}
    return _region(url, "https://api.axiom.co/v1/traces"), headers


def _honeycomb(d: Destination, url: str) -> Place:
    dataset = {"x-honeycomb-dataset": d.dataset.strip()} if d.dataset else {}
    return _region(url, "https://api.honeycomb.io/v1/traces"), {"x-honeycomb-team": d.api_key.strip()} | dataset


def _lightstep(d: Destination, url: str) -> Place:
    return _region(url, "https://ingest.lightstep.com/v1/traces"), {"lightstep-access-token": d.access_token.strip()}


def _receiver(tenant_header: str) -> Callable[[Destination, str], Place]:
    def place(d: Destination, url: str) -> Place:
        return _home(url, "http", "/v1/traces", "/v1/traces"), {tenant_header: d.tenant.strip()} if d.tenant else {}

    return place


def _as_it_is(_: Destination, url: str) -> Place:
    return url, {}


TYPES: Final[dict[str, Kind]] = {
    "otel-collector": Kind(("endpoint",), ("headers",), _as_it_is),
    "grafana": Kind(("instance_id", "api_key"), ("base_url", "headers"), _grafana),
    "axiom": Kind(("token", "dataset"), ("endpoint", "headers"), _axiom),
    "jaeger": Kind(("base_url",), ("tenant", "headers"), _receiver("x-tenant")),
    "tempo": Kind(("base_url",), ("tenant", "headers"), _receiver("X-Scope-OrgID")),
    "honeycomb": Kind(("api_key",), ("dataset", "endpoint", "headers"), _honeycomb),
    "lightstep": Kind(("access_token",), ("endpoint", "headers"), _lightstep),
    "webhook": Kind(("url",), ("method", "headers"), _as_it_is),
    "file": Kind(("path",), (), _as_it_is),
}
SHARED: Final = ("name", "type", "enabled", "privacy_mode", "sampling_rate", "api_keys", "filter_rules")
OWN_FIELDS: Final = tuple(f.name for f in fields(Destination) if f.name not in SHARED)
GRAFANA_HOME: Final = "https://otlp-gateway-prod-us-west-0.grafana.net"  # OpenRouter's default
URLS: Final = ("endpoint", "base_url", "url")


def _check_fields(d: Destination) -> None:
    """The type's own fields: those it needs, none of another's, and nothing a header cannot carry."""
    required, optional, _ = TYPES[d.type]
    for name in OWN_FIELDS:
        value = getattr(d, name)
        given = value not in ("", {}) and (name, value) != ("method", "POST")
        if given and name not in required + optional:
            raise ValueError(f"{name}: type {d.type} has no such field, only {', '.join(required + optional)}")
        if isinstance(value, str) and name not in SECRETS and "${" in value:
            raise ValueError(f"{name}: ${{NAME}} is read in headers, api_key, token and access_token only")
        if not given and name in required:
            raise ValueError(f"{name}: required for type {d.type}")
        in_a_header = name not in (*URLS, "headers", "method", "path")
        if given and in_a_header and not HEADER_VALUE.fullmatch(value.strip()):
            raise ValueError(f"{name}: holds a character that a header cannot carry; paste it again")
    if d.instance_id and not re.fullmatch(r"[0-9]{1,20}", str(d.instance_id).strip()):
        raise ValueError("instance_id: must be digits only; it is the number on the stack's page")
    if d.method not in ("POST", "PUT"):
        raise ValueError("method: must be POST or PUT")


def check_headers(headers: Mapping[str, Any]) -> None:
    """Raise ValueError for a header that we set ourselves, that is no header, or that comes twice."""
    if len(headers) > MOST_HEADERS:
        raise ValueError(f"headers: at most {MOST_HEADERS}")
    doubled = [name for name, n in Counter(map(str.lower, headers)).items() if n > 1]
    if doubled:
        raise ValueError(f"headers.{doubled[0]}: given twice in different spellings")
    for name, value in headers.items():
        if not HEADER_NAME.fullmatch(name):
            raise ValueError("headers: a name is empty, too long or holds a character that names cannot have")
        if name.lower() in NOT_YOURS and (name.lower(), value) != ("content-type", "application/json"):
            raise ValueError(f"headers.{name}: is set by the router itself; leave it out")
        if not isinstance(value, str) or not HEADER_VALUE.fullmatch(value.strip(" \t")):
            raise ValueError(f"headers.{name}: must be text without line breaks, control or non-latin-1 characters")


def target(d: Destination) -> Target:
    """Where `d` sends, by the type's table; raises ValueError, for a URL BadAddress."""
    kind = TYPES[d.type]
    key = next(name for name in URLS if name in kind.required + kind.optional)
    pasted = getattr(d, key).strip()
    if not pasted.isprintable() or " " in pasted or "\\" in pasted:
        raise BadAddress(f"{key}: the URL holds a space, a backslash or a control character")
    try:
        url, own = kind.place(d, pasted)
    except ValueError:
        raise BadAddress(f"{key}: that is not a URL") from None
    if doubled := {name.lower() for name in own} & {name.lower() for name in d.headers}:
        raise ValueError(f"headers.{min(doubled)}: type {d.type} sets it from its own fields")
    given = {name: value.strip(" \t") for name, value in d.headers.items() if name.lower() != "content-type"}
    return Target(*_split(url, key), d.method, given | own, d.type == "webhook")


def _split(url: str, key: str) -> tuple[str, str, int, str]:
    """Scheme, host, port and path of a URL we would send to; raises BadAddress with the cure, in the name of `key`."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = PORTS.get(parts.scheme, 0) if parts.port is None else parts.port
        name = parts.hostname or ""
        host = name if name.isascii() else name.encode("idna").decode()
    except (ValueError, UnicodeError):
        raise BadAddress(f"{key}: that is not a URL") from None
    if parts.scheme not in PORTS or not host:
        raise BadAddress(f"{key}: must start with http:// or https:// and name a host")
    if "@" in parts.netloc:
        raise BadAddress(f"{key}: no user or password in the URL; put them into a header")
    if not port:
        raise BadAddress(f"{key}: port 0 cannot be connected to")
    if (address := literal(host)) and (why := refusal(address, port, ())):
        raise RefusedAddress(f"{key}: {why}")
    path, query = (urllib.parse.quote(part, safe="/%:@!$&'()*+,;=~-._") for part in (parts.path or "/", parts.query))
    return parts.scheme, host, port, f"{path}?{query}" if query else path


# -- where a request may go: not, however the address is spelled, to link-local (cloud metadata lives there) and the two
# metadata addresses outside of it

REFUSED: Final = tuple(map(ipaddress.ip_network, ("169.254.0.0/16", "fe80::/10", "fd00:ec2::254/128", "100.100.100.200/32")))
CARRIES_V4: Final = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("::/96"))
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def literal(host: str) -> Address | None:
    """The address that a host spells, in any form a resolver takes: dotted, integer, hex, octal, IPv6."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host)
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def refusal(address: Address, port: int, own: Own) -> str | None:
    """Why nothing is sent to this address, or None."""
    forms = list(_forms(address))
    if any(form.version == net.version and form in net for form in forms for net in REFUSED):
        return "link-local and cloud metadata addresses are refused"
    if any(port == used and _listens(host, form) for host, used in own for form in forms):
        return "that is this router's own address"
    return None


def _forms(address: Address) -> Iterator[Address]:
    yield address
    if isinstance(address, ipaddress.IPv6Address):
        yield from (form for form in (address.ipv4_mapped, address.sixtofour) if form)
        yield from address.teredo or ()
        if any(address in net for net in CARRIES_V4):
            yield ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)


def _listens(host: str, address: Address) -> bool:
    """Does a server bound to `host` answer on `address`?"""
    bound = ipaddress.IPv4Address("127.0.0.1") if host == "localhost" else literal(host or "0.0.0.0")
    if bound is None or bound.is_unspecified:
        return _is_local(address)
    return address == bound or ((address.is_loopback or address.is_unspecified) and bound.is_loopback)


def _is_local(address: Address) -> bool:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.bind((str(address), 0))
        return True
    return False


@dataclass(frozen=True)
class Settings:
    """The [broadcast] table."""

    enabled: bool = field(default=False, metadata=_doc("the Enable Broadcast switch; the page can change it"))
    service_name: str = field(default="openrouter", metadata=_doc("service.name; the default fits OpenRouter's queries"))
    service_version: str = field(default="1.0.0", metadata=_doc("service.version"))
    database: str = field(default="state/broadcast.db", metadata=_doc("SQLite file: the page's destinations, and the queues"))
    queue_max_items: int = field(default=10_000, metadata=_doc("per destination; overflow drops the oldest, counted"))
    queue_max_bytes: int = field(default=67_108_864, metadata=_doc("per destination; overflow drops the oldest, counted"))
    timeout: float = field(default=10.0, metadata=_doc("seconds for one delivery"))
    max_elapsed: float = field(default=3600.0, metadata=_doc("seconds for all tries of one batch"))
    test_required: bool = field(default=True, metadata=_doc("a destination is saved only if its test passes"))
    destinations: tuple[Destination, ...] = field(default=(), metadata=_doc("[[broadcast.destinations]]; read-only on the page"))

    def __post_init__(self) -> None:
        limits = {"queue_max_items": (1, 10**9), "queue_max_bytes": (1_024, 2**40)}
        for key, (least, most) in (limits | {"timeout": (0.01, 600), "max_elapsed": (0, 2_592_000)}).items():
            if not least <= getattr(self, key) <= most:
                raise ValueError(f"{key}: must lie between {least} and {most}")
        for key in ("service_name", "service_version", "database"):
            if not getattr(self, key).strip():
                raise ValueError(f"{key}: must not be empty")
        names = Counter(d.name for d in self.destinations)
        if doubled := [name for name, n in names.items() if n > 1]:
            raise ValueError(f"destinations: the name {doubled[0]!r} is used twice")


class Entry(NamedTuple):
    """A destination as it is known here."""

    id: str
    destination: Destination
    source: str  # page | file
    created_at: str | None
    updated_at: str | None


# -- which records it takes

Search = Callable[[str, str], bool]  # pattern and text -> found
LONGEST_PATTERN: Final = 1_000
SEARCHED: Final = 4_096
TEXT_FIELDS: Final = ("model", "provider", "session_id", "user_id", "api_key_name", "finish_reason", "input", "output")
NUMBER_FIELDS: Final = ("total_cost", "total_tokens", "prompt_tokens", "completion_tokens")
ORDERS: Final[dict[str, Callable[[float, float], bool]]] = {
    "gt": lambda a, b: a > b,
    "lt": lambda a, b: a < b,
    "gte": lambda a, b: a >= b,
    "lte": lambda a, b: a <= b,
}
TEXT_TESTS: Final[dict[str, Callable[[str, str], bool]]] = {
    "equals": lambda have, want: have == want,
    "contains": lambda have, want: want in have,
    "starts_with": str.startswith,
    "ends_with": str.endswith,
}
OPERATORS: Final = (*TEXT_TESTS, *ORDERS, "not_equals", "not_contains", "regex", "exists", "not_exists")


def check_filters(rules: Mapping[str, Any]) -> None:
    """Raise ValueError with the place inside filter_rules."""
    _known(rules, ("enabled", "groups"), "filter_rules")
    if not isinstance(rules.get("enabled", True), bool):
        raise ValueError("filter_rules.enabled: must be true or false")
    for g, group in enumerate(_list(rules.get("groups", []), "filter_rules.groups")):
        place = f"filter_rules.groups[{g}]"
        _known(group, ("logic", "rules"), place)
        if group.get("logic", "and") not in ("and", "or"):
            raise ValueError(f"{place}.logic: must be and, or or")
        for r, rule in enumerate(_list(group.get("rules", []), f"{place}.rules")):
            _known(rule, ("field", "operator", "value"), f"{place}.rules[{r}]")
            _check_rule(rule, f"{place}.rules[{r}]")


def _check_rule(rule: Mapping[str, Any], place: str) -> None:
    operator, value = rule.get("operator"), rule.get("value")
    if rule.get("field") not in TEXT_FIELDS + NUMBER_FIELDS:
        raise ValueError(f"{place}.field: must be one of {', '.join(TEXT_FIELDS + NUMBER_FIELDS)}")
    if operator not in OPERATORS:
        raise ValueError(f"{place}.operator: must be one of {', '.join(OPERATORS)}")
    if operator in ("exists", "not_exists"):
        return
    if operator in ORDERS and _as_number(value) is None:
        raise ValueError(f"{place}.value: {operator} compares with a number")
    if isinstance(value, bool) or not isinstance(value, str | int | float) or len(str(value)) > LONGEST_PATTERN:
        raise ValueError(f"{place}.value: must be text (at most {LONGEST_PATTERN} characters) or a number")
    try:
        re.compile(str(value) if operator == "regex" else "")
    except (re.error, RecursionError, OverflowError):
        raise ValueError(f"{place}.value: not a regular expression") from None


def _known(table: Any, keys: tuple[str, ...], place: str) -> None:
    if not isinstance(table, Mapping):
        raise ValueError(f"{place}: must be a table with {', '.join(keys)}")
    if unknown := sorted(str(key) for key in table if key not in keys):
        raise ValueError(f"{place}.{unknown[0]}: unknown key, only {', '.join(keys)}")


def _list(value: Any, place: str) -> list[Any]:
    if not isinstance(value, list) or len(value) > 100:
        raise ValueError(f"{place}: must be a list of at most 100")
    return value


def _as_number(value: Any) -> float | None:
    with contextlib.suppress(ValueError):
        return as_double(float(value) if isinstance(value, str) else value)
    return None


def skip_reason(d: Destination, record: Record, search: Search) -> str | None:
    """Why this record is not for this destination; None: it takes it."""
    if d.api_keys and record.get("api_key_name") not in d.api_keys:
        return "api_key"
    # A session is in or out as a whole; the name is part of the seed, so that each destination draws for itself.
    seed = f"{d.name}:{record.get('session_id') or record['generation_id']}"
    if d.sampling_rate < 1 and int(digest(seed)[:13], 16) >= d.sampling_rate * 16**13:
        return "sampling"
    groups = d.filter_rules.get("groups") if d.filter_rules.get("enabled", True) else None
    if not groups:
        return None
    values = _filtered(record)
    return None if any(_group(group, values, search) for group in groups) else "filter"


def searches(d: Destination) -> bool:
    """Do its filters need regular expressions, which may take their time?"""
    groups = d.filter_rules.get("groups", []) if d.filter_rules.get("enabled", True) else []
    return any(rule.get("operator") == "regex" for group in groups for rule in group.get("rules", []))


def _filtered(record: Record) -> dict[str, Any]:
    answer, cost = record.get("response") or {}, record.get("cost") or {}
    usage = answer.get("usage") or {}
    sent, made = as_count(usage.get("input_tokens")), as_count(usage.get("output_tokens"))
    texts = (b.get("text") for b in blocks(record))
    values = {name: record.get(name) for name in ("provider", "session_id", "api_key_name")}
    values |= {"model": record.get("requested_model"), "user_id": record.get("user")}
    values |= {"input": "\n".join(text for text in (record.get("system"), *texts) if isinstance(text, str))}
    values |= {"finish_reason": answer.get("finish_reason"), "output": answer.get("content")}
    values |= {"total_cost": as_double(cost.get("total")), "prompt_tokens": sent, "completion_tokens": made}
    return values | {"total_tokens": sent + made if sent is not None and made is not None else None}


def _group(group: Mapping[str, Any], values: Mapping[str, Any], search: Search) -> bool:
    every = all if group.get("logic", "and") == "and" else any
    return every(_rule(rule, values[rule["field"]], search) for rule in group.get("rules", []))


def _rule(rule: Mapping[str, Any], have: Any, search: Search) -> bool:
    operator, want = rule["operator"], rule.get("value")
    test = operator.removeprefix("not_")
    if have in (None, ""):
        return bool(operator != test)
    a, b = _as_number(have), _as_number(want)
    if test in ORDERS:
        return a is not None and b is not None and ORDERS[test](a, b)
    if test == "regex":
        return search(str(want), str(have)[:SEARCHED])
    if test == "exists":
        same = True
    elif test == "equals" and not isinstance(have, str):
        same = a == b
    else:
        same = TEXT_TESTS[test](str(have), str(want))
    return bool(same == (operator == test))


# -- the form in which the settings API takes, keeps and shows it

SECRETS: Final = ("api_key", "token", "access_token")
OPEN_HEADERS: Final = frozenset(("x-axiom-dataset", "x-honeycomb-dataset", "x-scope-orgid", "x-tenant", "content-type"))
MARK: Final = "…"
TOKEN = re.compile(r"(?<=[^/]/)[\w-]{20,}(?=/|$)")


def read_config(given: Any) -> dict[str, Any]:
    """The `config` object with our names (OpenRouter's baseUrl is base_url) and text where text belongs."""
    if not isinstance(given, dict):
        raise ValueError("config: must be an object with the type's fields")
    made = {re.sub(r"(?<=[a-z])[A-Z]", lambda m: f"_{m[0].lower()}", key): value for key, value in given.items()}
    for key, value in made.items():
        place = f"config.{key}"
        if key not in OWN_FIELDS or key == "path":
            raise ValueError(f"{place}: unknown key")
        if key == "instance_id" and isinstance(value, int) and not isinstance(value, bool):
            made[key] = str(value)
        elif not isinstance(value, dict if key == "headers" else str):
            raise ValueError(f"{place}: must be {'an object' if key == 'headers' else 'text'}")
        if any("${" in str(text) for text in (value.values() if isinstance(value, dict) else (value,))):
            raise ValueError(f"{place}: ${{NAME}} works in config.toml only; enter the value")
    return made


def from_json(body: Mapping[str, Any]) -> Destination:
    """From the stored or sent form; raises ValueError naming the field."""
    types = {"name": str, "enabled": bool, "privacy_mode": bool, "sampling_rate": int | float, "filter_rules": dict}
    shared = {key: body[key] for key in types if body.get(key) is not None}
    for key, value in shared.items():
        if not isinstance(value, types[key]) or (key == "sampling_rate" and isinstance(value, bool)):
            raise ValueError(f"{key}: has the wrong type")
    keys = body.get("api_keys")
    if keys is not None and (not isinstance(keys, list) or not keys or not all(isinstance(k, str) and k for k in keys)):
        raise ValueError("api_keys: must be null for all, or a list of at least one name")
    return Destination(type=body["type"], api_keys=tuple(keys or ()), **shared, **body["config"])


def connection(d: Destination) -> tuple[Any, ...]:
    return (d.type, *(getattr(d, name) for name in OWN_FIELDS))


def to_json(d: Destination) -> dict[str, Any]:
    """The form that is stored and, masked, shown."""
    own = TYPES[d.type].required + TYPES[d.type].optional
    body = {key: getattr(d, key) for key in ("name", "type", "enabled", "privacy_mode", "sampling_rate")}
    body |= {"config": {name: getattr(d, name) for name in own if getattr(d, name) not in ("", {})}}
    return body | {"api_keys": list(d.api_keys) or None, "filter_rules": d.filter_rules or None}


def show(entry: Entry) -> dict[str, Any]:
    body = to_json(entry.destination)
    body |= {"config": {name: _masked(name, value) for name, value in body["config"].items()}}
    return {"id": entry.id} | body | {"source": entry.source, "created_at": entry.created_at, "updated_at": entry.updated_at}


def mask(value: str) -> str:
    return f"{value[:4]}{MARK}{value[-4:]}" if len(value) >= 16 else MARK


def _masked(name: str, value: Any) -> Any:
    """A field of `config` as it is shown."""
    if isinstance(value, dict):
        return {key: text if key.lower() in OPEN_HEADERS else mask(text) for key, text in value.items()}
    if name in URLS:  # a key in the query is a secret too, and so is what many a webhook has in its path
        base, has_query, _ = value.partition("?")
        base = TOKEN.sub(lambda match: mask(match[0]), base)
        return f"{base}?{MARK}" if has_query else base
    return mask(value) if name in SECRETS else value


def unmask(config: dict[str, Any], stored: Entry | None) -> tuple[dict[str, Any], list[str]]:
    """Put what is stored in the place of its mask; gives the names that were kept. A mask of nothing is refused."""
    old = to_json(stored.destination)["config"] if stored else {}
    kept: list[str] = []

    def put_back(place: str, given: dict[str, Any], was: Mapping[str, Any], shown: Mapping[str, Any]) -> dict[str, Any]:
        masked = [name for name, value in given.items() if isinstance(value, str) and MARK in value]
        for name in masked:
            if name not in was or given[name] != shown[name]:
                raise ValueError(f"config.{place}{name}: is masked, and nothing stored has that mask; enter it again")
            kept.append(place + name)
        return given | {name: was[name] for name in masked}

    made = put_back("", config, old, {name: _masked(name, value) for name, value in old.items()})
    if "headers" in made:
        held = old.get("headers", {})
        made["headers"] = put_back("headers.", made["headers"], held, _masked("headers", held))
    return made, kept


def show_request(d: Destination) -> dict[str, Any]:
    """The line and headers of a delivery, as they may be shown."""
    if d.type == "file":
        return {"method": "append", "url": d.path, "headers": {}}
    to = target(d)
    url = _masked("url", f"{to.scheme}://{to.authority}{to.path}")
    return {"method": to.method, "url": url, "headers": {"Content-Type": "application/json"} | _masked("", to.headers)}
