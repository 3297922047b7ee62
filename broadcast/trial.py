"""Test Connection: the test span sent exactly as a delivery would be, and the outcome explained by a table of likely causes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

from broadcast.destinations import BadAddress, Destination, Own, RefusedAddress, Settings, Target, target
from broadcast.encoder import connection_test
from broadcast.exchange import Answer, append, exchange

LONGEST_TEST: Final = 15.0
BAD_ADDRESS: Final = "Cloud metadata, link-local addresses and the router itself are refused; name the receiver's own."
BAD_URL: Final = "Use the http:// or https:// address that takes OTLP over HTTP, usually ending in /v1/traces."


def try_out(d: Destination, settings: Settings, own: Own) -> dict[str, Any]:
    """Send the test span to exactly this destination: {ok, status, latency_ms, message, advice}."""
    begun = time.monotonic()
    if d.type == "file":
        answer = append(d.path, b"")
    else:
        to = target(d)
        to = to._replace(headers=to.headers | {"X-Test-Connection": "true"}) if to.plain else to
        test = connection_test(settings.service_name, int(time.time() * 1000))
        answer = exchange(to, test, min(settings.timeout, LONGEST_TEST), own)
    return _result(answer, round((time.monotonic() - begun) * 1000), "" if answer.cause == "ok" else advise(d, answer))


def not_tried(error: BadAddress) -> dict[str, Any]:
    """What a test comes to if nothing can be sent to the URL as it is written."""
    return _result(Answer("address", str(error)), 0, BAD_ADDRESS if isinstance(error, RefusedAddress) else BAD_URL)


def _result(answer: Answer, latency: int, advice: str) -> dict[str, Any]:
    ok = answer.cause == "ok"
    return {"ok": ok, "status": answer.status, "latency_ms": latency, "message": answer.message, "advice": advice}


GATEWAY: Final = "use https://otlp-gateway-prod-<region>.grafana.net, not the address of your Grafana"
Applies = Callable[[Destination, Target], bool]


def _of(*types: str) -> Applies:
    return lambda d, _: d.type in types


GRAFANA: Final = _of("grafana")


def _port(port: int) -> Applies:
    return lambda _, to: to.port == port


def _any(_: Destination, __: Target) -> bool:
    return True


def _odd_path(_: Destination, to: Target) -> bool:
    return not to.path.partition("?")[0].rstrip("/").endswith("/v1/traces")


# cause ("" is any), statuses (none is any), when it applies, the likely cause in one sentence. The first that fits.
HINTS: Final[tuple[tuple[str, tuple[int, ...], Applies, str], ...]] = (
    ("", (), _port(4317), "Port 4317 is OTLP over gRPC; OTLP over HTTP usually listens on 4318."),
    ("", (), _port(16686), "Port 16686 is Jaeger's web page; Jaeger takes OTLP over HTTP on 4318."),
    ("", (), _port(3200), "Port 3200 is Tempo's query API; Tempo takes OTLP over HTTP on 4318."),
    ("address", (), _any, BAD_ADDRESS),
    ("dns", (), _any, "Check the spelling of the host name, and that this machine can resolve it."),
    ("tls", (), _any, "No TLS is spoken there, or the certificate is not of that name or of a CA known here (SSL_CERT_FILE)."),
    ("connect", (), _any, "Is the receiver running, the port right (4318 for OTLP over HTTP), no firewall between?"),
    ("timeout", (), _any, "A firewall may swallow it, or the receiver is overloaded; broadcast.timeout is the limit."),
    ("cut", (), _any, "Something closed the connection: often http:// sent to a TLS port, or a proxy between."),
    ("html", (), GRAFANA, f"That is a web page, not the gateway: {GATEWAY}."),
    ("html", (), _any, "That is a web page, not the gateway: use the address for OTLP, usually ending in /v1/traces."),
    ("redirect", (), GRAFANA, f"That is not the gateway: {GATEWAY}."),
    ("redirect", (), lambda _, to: to.scheme == "http", "Try https://, where most redirects lead; nothing is sent after one."),
    ("redirect", (), _any, "Use the address it leads to; often that is a sign-in page, and the URL is not the gateway's."),
    ("rejected", (), _any, "The receiver took the request but not the span: check its limits, data set and the key's rights."),
    ("too_long", (), _any, "Whatever answers there is not an OTLP receiver: check host, port and path."),
    ("garbage", (), _any, "Something answers, but not as an OTLP/HTTP receiver: check host, port and path."),
    ("disk", (), _any, "Check the path, its permissions and the free space."),
    ("http", (401, 403), GRAFANA, "Instance id and token are joined as Basic: check the stack's id and the right traces:write."),
    ("http", (401, 403), _of("axiom"), "Check that the token may ingest and that the data set has exactly that name."),
    ("http", (401, 403), _of("honeycomb"), "Check the key, and its region (api.honeycomb.io, api.eu1.honeycomb.io)."),
    ("http", (400, 401, 503), _of("tempo"), "With multi-tenancy on, Tempo refuses spans without a tenant: fill it in."),
    ("http", (401,), _any, "The key is missing or wrong: check the header, also whether it needs the word Bearer or Basic."),
    ("http", (403,), _any, "The key is known but may not write traces: check its permissions."),
    ("http", (404,), GRAFANA, "Check the region: https://otlp-gateway-prod-<region>.grafana.net."),
    ("http", (404,), _odd_path, "The path is used as it is: it usually ends in /v1/traces."),
    ("http", (404,), _any, "Nothing takes traces at that path: check host and path."),
    ("http", (405,), _any, "The address does not take this method: the path is probably not the receiver's."),
    ("http", (400,), _any, "The receiver did not understand: does it take OTLP as JSON, and are its headers complete?"),
    ("http", (413,), _any, "The receiver's size limit is very low: raise it there."),
    ("http", (415,), _any, "It does not take OTLP as JSON (some take protobuf only): put an OpenTelemetry Collector between."),
    ("http", (429,), _any, "The receiver limits the rate: try again later, or lower the sampling rate."),
    ("http", (502, 503, 504), _any, "The receiver, or what is behind it, is down or overloaded: try again later."),
    ("", (), _any, "Look into the receiver's log for the reason."),
)


def advise(d: Destination, answer: Answer) -> str:
    """The likely cause of a failure, in one sentence."""
    to = target(d) if d.type != "file" else Target("", "", 0, "", "", {}, False)
    for cause, status, applies, said in HINTS:
        if cause in ("", answer.cause) and (not status or answer.status in status) and applies(d, to):
            return said
    return ""
