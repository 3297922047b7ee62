"""What a destination is, and the settings API that keeps them: forms people paste, secrets, tests before saving, refusals."""

from __future__ import annotations

import base64
import ipaddress
import json
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from broadcast_records import RECORD, record
from broadcast_runs import collector, configured, counts, running, settled
from fake_collector import OK, FakeCollector, Reply, until

from broadcast import Broadcast, Destination, Settings, delivery, exchange
from broadcast.destinations import BadAddress, mask, refusal, target
from broadcast.trial import try_out

ROOT = Path(__file__).parent.parent
CAPTURE = ROOT / "tests" / "wire" / "broadcast" / "openrouter-connection-test.capture.json"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(delivery, "BACKOFF_MOST", 0.1)
    monkeypatch.setattr(delivery, "_warned", {})


@pytest.fixture
def receiver() -> Iterator[FakeCollector]:
    with FakeCollector() as made:
        yield made


def url_of(d: Destination) -> str:
    to = target(d)
    return f"{to.scheme}://{to.authority}{to.path}"


# -- types


GRAFANA: dict[str, Any] = {"type": "grafana", "instance_id": "123456", "api_key": "glc_eyJvIjoiMTIzIn0="}


@pytest.mark.parametrize(
    "pasted",
    [
        "https://otlp-gateway-prod-eu-west-2.grafana.net",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/otlp",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/otlp/",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/otlp/v1/traces",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/otlp/v1/traces/",
        "https://otlp-gateway-prod-eu-west-2.grafana.net/v1/traces",
        "otlp-gateway-prod-eu-west-2.grafana.net",
        "otlp-gateway-prod-eu-west-2.grafana.net/otlp",
        "  https://otlp-gateway-prod-eu-west-2.grafana.net/otlp \n",
        "HTTPS://OTLP-gateway-prod-eu-west-2.grafana.net:443/otlp",
    ],
)
def test_any_form_of_grafanas_address_becomes_the_gateways_traces_url(pasted: str) -> None:
    d = Destination(name="g", base_url=pasted, **GRAFANA)
    assert url_of(d) == "https://otlp-gateway-prod-eu-west-2.grafana.net/otlp/v1/traces"
    word, joined = target(d).headers["Authorization"].split(" ")
    assert (word, base64.b64decode(joined)) == ("Basic", b"123456:glc_eyJvIjoiMTIzIn0=")


def test_the_instance_id_may_be_written_as_a_number() -> None:
    assert Destination(name="g", **(GRAFANA | {"instance_id": 123456})) == Destination(name="g", **GRAFANA)


def test_grafanas_address_has_openrouters_default() -> None:
    assert url_of(Destination(name="g", **GRAFANA)) == "https://otlp-gateway-prod-us-west-0.grafana.net/otlp/v1/traces"


PLACES: list[tuple[dict[str, Any], str, dict[str, str]]] = [
    ({"type": "otel-collector", "endpoint": "https://c.example:4318/v1/traces"}, "https://c.example:4318/v1/traces", {}),
    ({"type": "otel-collector", "endpoint": "http://c.example/odd/path?x=1&y=%20"}, "http://c.example/odd/path?x=1&y=%20", {}),
    ({"type": "otel-collector", "endpoint": "http://c.example"}, "http://c.example/", {}),
    ({"type": "otel-collector", "endpoint": "http://[::1]:4318/v1/traces"}, "http://[::1]:4318/v1/traces", {}),
    ({"type": "otel-collector", "endpoint": "https://bücher.example/v1/traces"}, "https://xn--bcher-kva.example/v1/traces", {}),
    ({"type": "axiom", "token": "xaat-1", "dataset": "d"}, "https://api.axiom.co/v1/traces",
     {"Authorization": "Bearer xaat-1", "X-Axiom-Dataset": "d"}),
    ({"type": "axiom", "token": " Bearer xaat-1 ", "dataset": "d"}, "https://api.axiom.co/v1/traces",
     {"Authorization": "Bearer xaat-1", "X-Axiom-Dataset": "d"}),
    ({"type": "axiom", "token": "t", "dataset": "d", "endpoint": "eu.axiom.example"}, "https://eu.axiom.example/v1/traces",
     {"Authorization": "Bearer t", "X-Axiom-Dataset": "d"}),
    ({"type": "jaeger", "base_url": "http://localhost:4318"}, "http://localhost:4318/v1/traces", {}),
    ({"type": "jaeger", "base_url": "localhost:4318/v1/traces"}, "http://localhost:4318/v1/traces", {}),
    ({"type": "jaeger", "base_url": "http://j", "tenant": "acme"}, "http://j/v1/traces", {"x-tenant": "acme"}),
    ({"type": "tempo", "base_url": "http://t:4318/", "tenant": "acme"}, "http://t:4318/v1/traces", {"X-Scope-OrgID": "acme"}),
    ({"type": "tempo", "base_url": "https://gw.example/tempo"}, "https://gw.example/tempo/v1/traces", {}),
    ({"type": "honeycomb", "api_key": "k"}, "https://api.honeycomb.io/v1/traces", {"x-honeycomb-team": "k"}),
    ({"type": "honeycomb", "api_key": "k", "dataset": "d", "endpoint": "https://api.eu1.honeycomb.io"},
     "https://api.eu1.honeycomb.io/v1/traces", {"x-honeycomb-team": "k", "x-honeycomb-dataset": "d"}),
    ({"type": "lightstep", "access_token": "t"}, "https://ingest.lightstep.com/v1/traces", {"lightstep-access-token": "t"}),
    ({"type": "lightstep", "access_token": "t", "endpoint": "https://sat.example/traces/otlp/v0.9"},
     "https://sat.example/traces/otlp/v0.9", {"lightstep-access-token": "t"}),
    ({"type": "webhook", "url": "https://hooks.example/a/b?c=d"}, "https://hooks.example/a/b?c=d", {}),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "url", "headers"), PLACES)
def test_a_type_becomes_its_url_and_headers(fields: dict[str, Any], url: str, headers: dict[str, str]) -> None:
    d = Destination(name="d", **fields, headers={"X-Mine": "1"})
    assert url_of(d) == url
    assert target(d).headers == {"X-Mine": "1"} | headers


def test_a_webhook_gets_plain_json_by_the_method_it_wants_and_may_answer_what_it_likes(tmp_path: Path) -> None:
    replies = (
        Reply(200, {"Content-Type": "text/plain"}, b"thanks"),
        Reply(201, body=b'"ok"'),
        Reply(200, body=b'{"message":"run"}'),
    )
    with FakeCollector(*replies) as receiver:
        hook = Destination("w", "webhook", url=receiver.url + "?a=b", method="PUT")
        with running(tmp_path, hook) as made:
            for n in range(1, 4):
                made.sink(record())
                assert settled(made, "w", n)["delivered"] == n
        got = receiver.received[0]
        assert (got.method, got.path) == ("PUT", "/v1/traces?a=b")
        assert "content-encoding" not in got.headers
        assert json.loads(got.body)["resourceSpans"]


def test_the_documents_axiom_headers_work_with_the_collector_type(tmp_path: Path, receiver: FakeCollector) -> None:
    headers = {"Authorization": "Bearer xaat-your-token", "X-Axiom-Dataset": "your-dataset", "Content-Type": "application/json"}
    with running(tmp_path, collector("a", receiver.url, headers=headers)) as made:
        made.sink(RECORD)
        settled(made, "a", 1)
    assert receiver.received[0].headers["x-axiom-dataset"] == "your-dataset"
    assert receiver.received[0].headers["content-type"] == "application/json"


def one_rule(**rule: Any) -> dict[str, Any]:
    return {"filter_rules": {"groups": [{"rules": [rule]}]}}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"type": "nope"}, "type: "),
    ({"type": "otel-collector"}, "endpoint: required"),
    ({"type": "grafana", "api_key": "k"}, "instance_id: required"),
    ({"type": "grafana", "api_key": "k", "instance_id": "12a"}, "instance_id: must be digits"),
    ({"type": "grafana", "api_key": "k\u2026", "instance_id": "1"}, "api_key: holds a character"),
    ({"type": "grafana", "api_key": "k\nx", "instance_id": "1"}, "api_key: holds a character"),
    ({"type": "axiom", "token": "t"}, "dataset: required"),
    ({"type": "jaeger", "base_url": "http://j", "api_key": "k"}, "api_key: type jaeger has no such field"),
    ({"type": "webhook", "url": "http://w", "method": "GET"}, "method: must be POST or PUT"),
    ({"type": "jaeger", "base_url": "http://j", "method": "PUT"}, "method: type jaeger has no such field"),
    ({"type": "file"}, "path: required"),
    ({"name": ""}, "name: "),
    ({"name": "a\nb"}, "name: "),
    ({"sampling_rate": 0.0}, "sampling_rate: "),
    ({"sampling_rate": 1.5}, "sampling_rate: "),
    ({"sampling_rate": float("nan")}, "sampling_rate: "),
    ({"headers": {"X": "a\r\nInjected: 1"}}, "headers.X: "),
    ({"headers": {"X": "€"}}, "headers.X: "),
    ({"headers": {"X": 5}}, "headers.X: "),
    ({"headers": {"X": ""}}, "headers.X: "),
    ({"headers": {"bad name": "1"}}, "headers: a name"),
    ({"headers": {"": "1"}}, "headers: a name"),
    ({"headers": {"Host": "evil"}}, "headers.Host: is set by the router"),
    ({"headers": {"content-length": "1"}}, "headers.content-length: is set by the router"),
    ({"headers": {"Transfer-Encoding": "chunked"}}, "headers.Transfer-Encoding: is set by the router"),
    ({"headers": {"Content-Type": "text/plain"}}, "headers.Content-Type: is set by the router"),
    ({"headers": {"A": "1", "a": "2"}}, "headers.a: given twice"),
    ({"headers": {f"H{n}": "1" for n in range(100)}}, "headers: at most 50"),
    ({"filter_rules": {"grups": []}}, "filter_rules.grups: unknown key"),
    ({"filter_rules": {"enabled": "yes"}}, "filter_rules.enabled: "),
    ({"filter_rules": {"groups": {}}}, "filter_rules.groups: "),
    ({"filter_rules": {"groups": [{"logic": "xor"}]}}, "filter_rules.groups[0].logic: "),
    (one_rule(field="x", operator="equals", value="1"), "filter_rules.groups[0].rules[0].field"),
    (one_rule(field="model", operator="is"), "filter_rules.groups[0].rules[0].operator"),
    (one_rule(field="model", operator="regex", value="("), "filter_rules.groups[0].rules[0].value"),
    (one_rule(field="model", operator="gt", value="x"), "filter_rules.groups[0].rules[0].value"),
    (one_rule(field="model", operator="equals", value="x" * 1001), "filter_rules.groups[0].rules[0].value"),
    (one_rule(field="model", operator="equals", value="x", more=1), "filter_rules.groups[0].rules[0].more"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "message"), WRONG, ids=[str(n) for n in range(len(WRONG))])
def test_a_mistake_in_a_destination_is_told_with_its_place(fields: dict[str, Any], message: str) -> None:
    base = {"name": "d"} | ({} if "type" in fields else {"type": "otel-collector", "endpoint": "http://c/v1/traces"})
    with pytest.raises(ValueError) as told:
        Destination(**(base | fields))
    assert str(told.value).startswith(message)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "pasted", ["http://[::1", "http://ho\nst", "ho st", "http://host\\@evil", "ftp://host", "http://169.254.169.254", "x@y"]
)
@pytest.mark.parametrize("base", [GRAFANA | {"type": "grafana"}, {"type": "jaeger"}])
def test_an_address_pasted_wrong_is_told_with_the_types_own_field(base: dict[str, Any], pasted: str) -> None:
    with pytest.raises(BadAddress) as told:
        Destination(name="d", base_url=pasted, **base)
    assert str(told.value).startswith("base_url: ")


def test_a_key_of_the_wrong_sort_is_not_repeated_in_the_message() -> None:
    with pytest.raises(ValueError) as told:
        Destination("g", "grafana", instance_id="1", api_key="glc_SECRET\n\x00")
    assert "SECRET" not in str(told.value)


def test_no_repr_shows_a_secret() -> None:
    d = Destination("a", "otel-collector", endpoint="http://c/v1/traces?key=SECRET", headers={"Authorization": "Bearer SECRET"})
    assert "SECRET" not in repr(d) + repr(Settings(destinations=(d,))) + repr(target(d)) + repr([d])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"queue_max_items": 0}, "queue_max_items: "),
        ({"queue_max_bytes": 1}, "queue_max_bytes: "),
        ({"timeout": 0.0}, "timeout: "),
        ({"max_elapsed": -1.0}, "max_elapsed: "),
        ({"service_name": " "}, "service_name: "),
        ({"database": ""}, "database: "),
        ({"destinations": (collector("a", "http://c"), collector("a", "http://d"))}, "destinations: the name 'a'"),
    ],
)
def test_a_mistake_in_the_table_is_told(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as told:
        Settings(**given)
    assert str(told.value).startswith(message)


def test_every_key_says_what_it_is_for() -> None:
    for table in (Settings, Destination):
        assert all(field.metadata["doc"] for field in table.__dataclass_fields__.values())


# -- addresses


REFUSED = [
    "http://169.254.169.254/latest/meta-data/",
    "http://169.254.0.1/",
    "http://2852039166/",
    "http://0xA9FEA9FE/",
    "http://0xa9.0xfe.0xa9.0xfe/",
    "http://0251.0376.0251.0376/",
    "http://025177524776/",
    "http://169.254.43518/",
    "http://169.16689662/",
    "http://[::ffff:169.254.169.254]/",
    "http://[::ffff:a9fe:a9fe]/",
    "http://[0:0:0:0:0:ffff:a9fe:a9fe]/",
    "http://[::169.254.169.254]/",
    "http://[64:ff9b::a9fe:a9fe]/",
    "http://[2002:a9fe:a9fe::1]/",
    "http://[fe80::1]/",
    "http://[febf::1]/",
    "http://[fd00:ec2::254]/",
    "http://[FD00:0EC2:0:0:0:0:0:254]/",
    "http://100.100.100.200/",
    "http://0x646464c8/",
    "http://user@169.254.169.254/",
    "http://evil@host/",
    "http://user:pass@host/v1/traces",
    "http://good.example@169.254.169.254/",
    "file:///etc/passwd",
    "gopher://host/",
    "unix:///run/x.sock",
    "http+unix://%2frun%2fx/",
    "ftp://host/",
    "javascript:alert(1)",
    "//host/v1/traces",
    "host:4318/v1/traces",
    "http://",
    "http:///v1/traces",
    "http://host:0/",
    "http://host:99999/",
    "http://host:abc/",
    "http://[::1/",
    "http://host\\@evil/",
    "http://ho st/",
    "http://host/a b",
    "http://host/\r\nX: y",
    "http://host/\x00",
    "http://" + "a" * 70 + "ü.example/",
    "",
]


@pytest.mark.parametrize("url", [url for url in REFUSED if url])
def test_what_is_not_an_address_for_us_is_refused(url: str) -> None:
    with pytest.raises(BadAddress) as told:
        collector("a", url)
    assert str(told.value).startswith("endpoint: ")


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:4318/", "http://10.0.0.1/", "http://[::1]/", "http://192.168.0.1/", "http://100.100.100.201/"]
)
def test_private_networks_are_allowed_because_that_is_where_collectors_live(url: str) -> None:
    assert url_of(collector("a", url)) == url


OWN_SPELLINGS = ["127.0.0.1", "localhost", "0x7f000001", "2130706433", "017700000001", "127.1", "0.0.0.0", "[::ffff:127.0.0.1]"]


@pytest.mark.parametrize("bound", ["127.0.0.1", "0.0.0.0", "", "localhost", "::"])
@pytest.mark.parametrize("spelled", OWN_SPELLINGS)
def test_the_routers_own_address_is_refused_in_every_spelling(
    tmp_path: Path, receiver: FakeCollector, bound: str, spelled: str
) -> None:
    url = f"http://{spelled}:{receiver.port}/v1/traces"
    with running(tmp_path, collector("a", url), listening=lambda: {(bound, receiver.port)}) as made:
        made.sink(RECORD)
        have = settled(made, "a", 1)
        assert have["dropped"] == {"refused_address": 1}
        assert have["last_error"] == "Not sent: that is this router's own address"
    assert receiver.connections == 0


def test_another_port_or_host_is_not_the_routers_own() -> None:
    loopback, other = ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("192.0.2.1")
    assert refusal(loopback, 4318, [("127.0.0.1", 8090)]) is None
    assert refusal(other, 8090, [("127.0.0.1", 8090)]) is None
    assert refusal(other, 8090, [("0.0.0.0", 8090)]) is None


def test_a_name_that_resolves_to_a_refused_address_is_not_connected_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, 80)) for host in ("127.0.0.1", "169.254.169.254")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: places)
    with running(tmp_path, collector("a", "http://rebind.example/v1/traces")) as made:
        made.sink(RECORD)
        assert settled(made, "a", 1)["dropped"] == {"refused_address": 1}


def test_the_address_that_was_checked_is_the_address_connected_to(
    tmp_path: Path, receiver: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    genuine = socket.getaddrinfo

    def once(host: Any, *more: Any, **named: Any) -> Any:
        asked.append(host)
        return genuine("127.0.0.1" if host == "collector.example" else host, *more, **named)

    monkeypatch.setattr(socket, "getaddrinfo", once)
    with running(tmp_path, collector("a", f"http://collector.example:{receiver.port}/v1/traces")) as made:
        made.sink(RECORD)
        assert settled(made, "a", 1)["delivered"] == 1
    assert asked.count("collector.example") == 1
    assert receiver.received[0].headers["host"] == f"collector.example:{receiver.port}"


def test_a_resolver_that_hangs_is_bounded_by_the_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: ended.wait(30) and [])
    try:
        d = collector("a", "http://slow.example/v1/traces")
        begun = time.monotonic()
        result = try_out(d, Settings(timeout=0.3), ())
        assert time.monotonic() - begun < 1
        assert (result["ok"], result["message"]) == (False, "No complete answer within 0.3 s")
    finally:
        ended.set()


def test_the_first_address_that_answers_is_used(tmp_path: Path, receiver: FakeCollector, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [(socket.AF_INET, 1, 6, "", (host, receiver.port)) for host in ("127.0.0.9", "127.0.0.1")]
    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: places if host == "two.example" else genuine(host, *a, **k))
    with running(tmp_path, collector("a", f"http://two.example:{receiver.port}/v1/traces")) as made:
        made.sink(RECORD)
        assert settled(made, "a", 1)["delivered"] == 1


def test_tls_is_verified_against_the_name_in_the_url(tmp_path: Path, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: genuine("127.0.0.1", *a, **k))
    with FakeCollector(tls=server) as receiver:
        with running(tmp_path, collector("a", f"https://collector.example:{receiver.port}/v1/traces")) as made:
            made.sink(RECORD)
            until(lambda: counts(made, "a")["last_error"])
            assert counts(made, "a")["last_error"].startswith("The certificate was not accepted")
            monkeypatch.setattr(exchange, "_tls", [ssl.create_default_context(cafile=str(certificate))])
            assert settled(made, "a", 1)["delivered"] == 1
        wrong = try_out(collector("b", f"https://other.example:{receiver.port}/v1/traces"), Settings(), ())
        assert not wrong["ok"]
        assert "certificate" in wrong["advice"]
        assert len(receiver.received) == 1


def test_a_tls_handshake_that_hangs_is_bounded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        d = collector("a", f"https://127.0.0.1:{silent.getsockname()[1]}/")
        begun = time.monotonic()
        assert try_out(d, Settings(timeout=0.3), ())["message"] == "No complete answer within 0.3 s"
        assert time.monotonic() - begun < 1


# -- the settings API


@pytest.fixture
def api(tmp_path: Path) -> Iterator[Broadcast]:
    with running(tmp_path, timeout=1.0) as made:
        yield made


def draft(url: str, **more: Any) -> dict[str, Any]:
    return {"name": "mine", "type": "otel-collector", "config": {"endpoint": url, "headers": SECRET_HEADER}} | more


SECRET_HEADER = {"Authorization": "Bearer dest-TOKEN-AbCd"}


def test_a_destination_is_made_tested_shown_masked_and_used(api: Broadcast, receiver: FakeCollector) -> None:
    status, made = api.api("POST", "/destinations", draft(receiver.url, sampling_rate=1, api_keys=None))
    assert status == 201
    assert made["config"] == {"endpoint": receiver.url, "headers": {"Authorization": "Bear…AbCd"}}
    assert made.keys() == {
        "id", "name", "type", "enabled", "config", "privacy_mode", "sampling_rate", "api_keys", "filter_rules", "source",
        "created_at", "updated_at",
    }  # fmt: skip
    assert (made["source"], made["enabled"], made["api_keys"]) == ("page", True, None)
    assert api.api("GET", f"/destinations/{made['id']}") == (200, made)
    assert api.api("GET", "/destinations") == (200, {"destinations": [made]})
    api.sink(RECORD)
    settled(api, "mine", 1)
    assert [got.headers["authorization"] for got in receiver.received] == ["Bearer dest-TOKEN-AbCd"] * 2


def test_the_test_sends_openrouters_own_span_to_exactly_what_is_stored(api: Broadcast, receiver: FakeCollector) -> None:
    api.api("POST", "/destinations", draft(receiver.url))
    (got,) = receiver.received
    theirs = json.loads(CAPTURE.read_text())
    ours = got.document
    span, captured = next(got.spans()), theirs["resourceSpans"][0]["scopeSpans"][0]["spans"][0]
    assert int(span["endTimeUnixNano"]) - int(span["startTimeUnixNano"]) == 1_000_000
    for key in ("startTimeUnixNano", "endTimeUnixNano"):
        assert len(span[key]) == len(captured[key])
        span[key] = captured[key]
    assert ours["resourceSpans"][0]["resource"] == theirs["resourceSpans"][0]["resource"]
    assert span == captured
    assert got.headers["content-encoding"] == "gzip"


def test_a_webhooks_test_says_that_it_is_one(api: Broadcast, receiver: FakeCollector) -> None:
    body = {"type": "webhook", "config": {"url": receiver.url}}
    assert api.api("POST", "/destinations/test", body)[1]["ok"] is True
    assert receiver.received[0].headers["x-test-connection"] == "true"


def test_what_fails_its_test_is_not_saved_and_the_answer_says_why(api: Broadcast) -> None:
    with FakeCollector(Reply(401, body=b"SECRET-BODY")) as refusing:
        status, told = api.api("POST", "/destinations", draft(refusing.url))
    assert status == 422
    assert told.keys() == {"error", "ok", "status", "latency_ms", "message", "advice"}
    assert (told["ok"], told["status"], told["message"]) == (False, 401, "HTTP 401")
    assert "Bearer or Basic" in told["advice"]
    assert "SECRET-BODY" not in json.dumps(told)
    assert "dest-TOKEN" not in json.dumps(told)
    assert api.api("GET", "/destinations") == (200, {"destinations": []})


def test_a_change_that_fails_its_test_changes_nothing(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    receiver.script(Reply(500))
    status, _ = api.api("PUT", f"/destinations/{made['id']}", {"privacy_mode": True})
    assert status == 422
    assert api.api("GET", f"/destinations/{made['id']}") == (200, made)


def test_without_test_required_a_destination_is_saved_as_it_is(tmp_path: Path) -> None:
    with running(tmp_path, test_required=False) as made:
        assert made.api("POST", "/destinations", draft("http://127.0.0.1:9/v1/traces"))[0] == 201
        assert made.api("POST", "/destinations", draft("http://169.254.169.254/", name="b"))[0] == 422


def test_a_broken_destination_can_be_switched_off_without_a_test(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    receiver.script(Reply(500))
    assert api.api("PUT", f"/destinations/{made['id']}", {"enabled": False})[0] == 200
    assert api.api("PUT", f"/destinations/{made['id']}", {"enabled": True})[0] == 422
    other = {"enabled": False, "config": {"endpoint": receiver.url + "x", "headers": SECRET_HEADER}}
    assert api.api("PUT", f"/destinations/{made['id']}", other)[0] == 422


def test_a_masked_value_sent_back_keeps_the_stored_one(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url + "?key=SECRET-in-the-query"))[1]
    assert made["config"]["endpoint"] == receiver.url + "?…"
    status, changed = api.api("PUT", f"/destinations/{made['id']}", made | {"name": "renamed", "privacy_mode": True})
    assert status == 200
    assert (changed["name"], changed["privacy_mode"], changed["config"]) == ("renamed", True, made["config"])
    assert [got.headers["authorization"] for got in receiver.received] == ["Bearer dest-TOKEN-AbCd"] * 2
    assert [got.path for got in receiver.received] == ["/v1/traces?key=SECRET-in-the-query"] * 2


@pytest.mark.parametrize("change", ["host", "port", "scheme"])
def test_a_masked_value_does_not_follow_to_another_address(api: Broadcast, receiver: FakeCollector, change: str) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    with FakeCollector() as thief:
        urls = {"host": f"http://localhost:{receiver.port}/", "port": thief.url, "scheme": receiver.url.replace("http", "https")}
        config = made["config"] | {"endpoint": urls[change]}
        status, told = api.api("PUT", f"/destinations/{made['id']}", {"config": config})
        assert (status, told["error"]["param"]) == (400, "config.headers.Authorization")
        assert api.api("POST", "/destinations/test", {"id": made["id"], "config": config})[0] == 400
        assert thief.received == []
    assert api.api("GET", f"/destinations/{made['id']}") == (200, made)


@pytest.mark.parametrize(
    "config",
    [
        {"endpoint": "http://h/", "headers": {"Authorization": "Bear…AbCd"}},
        {"endpoint": "http://h/", "headers": {"X-New": "…"}},
        {"endpoint": "http://h/?…"},
    ],
)
def test_a_mask_of_nothing_is_refused(api: Broadcast, config: dict[str, Any]) -> None:
    status, told = api.api("POST", "/destinations", {"type": "otel-collector", "config": config})
    assert (status, told["error"]["type"]) == (400, "invalid_request_error")


def test_short_secrets_are_masked_whole() -> None:
    assert [mask(text) for text in ("", "short", "x" * 15, "abcdefghijklmnop")] == ["…", "…", "…", "abcd…mnop"]


def test_every_secret_field_of_every_type_is_masked(tmp_path: Path) -> None:
    secret = "SECRET-0123456789"
    made: tuple[Destination, ...] = (
        Destination("g", "grafana", instance_id="1", api_key=secret),
        Destination("a", "axiom", token=secret, dataset="open"),
        Destination("h", "honeycomb", api_key=secret),
        Destination("l", "lightstep", access_token=secret),
        Destination("t", "tempo", base_url=f"http://t?key={secret}", tenant="open", headers={"Authorization": secret}),
        Destination("w", "webhook", url=f"http://w/?key={secret}", headers={"X-Any": secret}),
    )
    with running(tmp_path, *made, enabled=False) as room_:
        shown = json.dumps(room_.api("GET", "/destinations")[1], ensure_ascii=False)
        payloads = [room_.api("GET", f"/destinations/{one['id']}/payload")[1] for one in json.loads(shown)["destinations"]]
    assert secret not in shown + json.dumps(payloads)
    assert shown.count("SECR…6789") == 6
    assert base64.b64encode(f"1:{secret}".encode()).decode() not in json.dumps(payloads)
    assert '"open"' in shown


def test_a_secret_in_a_webhooks_path_is_masked_and_comes_back_as_it_was(api: Broadcast, receiver: FakeCollector) -> None:
    url = receiver.url.replace("/v1/traces", "/services/T000/SECRET7890123456789x")
    made = api.api("POST", "/destinations", {"type": "webhook", "config": {"url": url}})[1]
    assert made["config"]["url"] == url.replace("SECRET7890123456789x", "SECR…789x")
    assert api.api("PUT", f"/destinations/{made['id']}", {"config": made["config"], "privacy_mode": True})[0] == 200
    assert [got.path for got in receiver.received] == ["/services/T000/SECRET7890123456789x"] * 2
    shown = api.api("GET", f"/destinations/{made['id']}/payload")[1]
    assert "SECRET" not in json.dumps(shown)


def test_references_and_files_are_refused_over_the_api(api: Broadcast, receiver: FakeCollector) -> None:
    for config in ({"endpoint": receiver.url, "headers": {"A": "Bearer ${HOME}"}}, {"endpoint": receiver.url + "/${HOME}"}):
        status, told = api.api("POST", "/destinations", {"type": "otel-collector", "config": config})
        assert status == 400
        assert "config.toml" in told["error"]["message"]
    assert api.api("POST", "/destinations", {"type": "file", "config": {"path": "/tmp/x"}})[0] == 400
    assert api.api("POST", "/destinations", {"type": "webhook", "config": {"url": receiver.url, "path": "/tmp/x"}})[0] == 400
    assert receiver.received == []


BAD_BODIES: list[tuple[Any, str | None]] = [
    (None, None),
    ([], None),
    ({}, "type"),
    ({"type": "otel-collector", "config": []}, "config"),
    ({"type": "otel-collector", "config": {"endpoint": 5}}, "config.endpoint"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/", "headers": "x"}}, "config.headers"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/", "headers": {"X": "a\r\nb"}}}, "config.headers.X"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/", "headers": {"Host": "a"}}}, "config.headers.Host"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/", "nope": "x"}}, "config.nope"),
    ({"type": "otel-collector", "config": {}}, "config.endpoint"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "nope": 1}, "nope"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "sampling_rate": 0}, "sampling_rate"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "sampling_rate": True}, "sampling_rate"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "enabled": "yes"}, "enabled"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "privacy_mode": 1}, "privacy_mode"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "api_keys": []}, "api_keys"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "api_keys": "a"}, "api_keys"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "filter_rules": []}, "filter_rules"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "filter_rules": {"x": 1}}, "filter_rules.x"),
    ({"type": ["otel-collector"], "config": {}}, "type"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "name": 5}, "name"),
    ({"type": "otel-collector", "config": {"endpoint": "http://h/"}, "name": "\x00"}, "name"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "param"), BAD_BODIES, ids=[str(n) for n in range(len(BAD_BODIES))])
def test_a_malformed_body_is_a_400_naming_the_field(api: Broadcast, body: Any, param: str | None) -> None:
    status, told = api.api("POST", "/destinations", body)
    assert (status, told["error"]["param"]) == (400, param)
    assert api.api("GET", "/destinations")[1] == {"destinations": []}


def test_openrouters_own_spelling_of_the_fields_is_taken_and_a_number_for_the_instance(
    api: Broadcast, receiver: FakeCollector
) -> None:
    home = f"http://127.0.0.1:{receiver.port}"
    config = {"baseUrl": home, "instanceId": 123456, "apiKey": "glc_0123456789abcdef"}
    status, made = api.api("POST", "/destinations", {"type": "grafana", "config": config})
    assert status == 201
    assert made["config"] == {"base_url": home, "instance_id": "123456", "api_key": "glc_…cdef"}
    assert made["name"] == "grafana"
    assert receiver.received[0].path == "/otlp/v1/traces"


def test_null_stands_for_a_missing_value(api: Broadcast, receiver: FakeCollector) -> None:
    body = draft(receiver.url) | dict.fromkeys(("name", "enabled", "privacy_mode", "sampling_rate", "filter_rules", "api_keys"))
    status, made = api.api("POST", "/destinations", body)
    assert (status, made["name"], made["enabled"], made["api_keys"]) == (201, "otel-collector", True, None)
    named = api.api("PUT", f"/destinations/{made['id']}", {"api_keys": ["team"]})[1]
    assert named["api_keys"] == ["team"]
    assert api.api("PUT", f"/destinations/{made['id']}", {"api_keys": None, "name": None})[1]["api_keys"] is None


def test_a_database_that_cannot_be_made_is_a_503_and_not_the_callers_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    made = Broadcast(Settings(database=str(tmp_path / "file" / "x.db")))
    assert made.api("PUT", "", {"enabled": True})[0] == 503
    assert made.api("GET", "/destinations")[0] == 200
    made.close(0)


def test_a_name_that_the_file_took_later_is_shown_twice_and_stays_editable(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path) as made:
        status, told = made.api("POST", "/destinations", draft(receiver.url, name="dup"))
        assert status == 201
        made.reload(replace(made.settings, destinations=(collector("dup", receiver.url),)))
        made.sink(RECORD)
        until(lambda: [have["delivered"] for have in made.stats()["destinations"].values()] == [1, 1])
        assert set(made.stats()["destinations"]) == {"dup", "dup (page)"}
        assert made.api("PUT", f"/destinations/{told['id']}", {"enabled": False})[0] == 200


def test_names_are_unique_and_filled_in(api: Broadcast, receiver: FakeCollector) -> None:
    nameless = {"type": "jaeger", "config": {"base_url": f"http://127.0.0.1:{receiver.port}"}}
    assert [api.api("POST", "/destinations", nameless)[1]["name"] for _ in range(2)] == ["jaeger", "jaeger 2"]
    status, told = api.api("POST", "/destinations", nameless | {"name": "jaeger"})
    assert (status, told["error"]["param"]) == (409, "name")


def test_a_destination_of_the_file_is_shown_tested_and_not_to_be_changed(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("static", receiver.url, headers=SECRET_HEADER)) as made:
        (shown,) = made.api("GET", "/destinations")[1]["destinations"]
        assert (shown["source"], shown["name"], shown["created_at"]) == ("file", "static", None)
        assert shown["config"]["headers"] == {"Authorization": "Bear…AbCd"}
        assert made.api("PUT", f"/destinations/{shown['id']}", {"enabled": False})[0] == 403
        assert made.api("DELETE", f"/destinations/{shown['id']}")[0] == 403
        assert made.api("POST", "/destinations/test", {"id": shown["id"]})[1]["ok"] is True


def test_a_deleted_destination_is_gone_with_its_queue_and_thread(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    receiver.script(Reply(503))
    api.sink(RECORD)
    until(lambda: counts(api, "mine")["queued"] == 1)
    assert api.api("DELETE", f"/destinations/{made['id']}") == (200, {"id": made["id"], "deleted": True})
    assert api.stats()["destinations"] == {}
    for method in ("GET", "PUT", "DELETE"):
        assert api.api(method, f"/destinations/{made['id']}", {})[0] == 404
    until(lambda: not [t for t in threading.enumerate() if t.name.startswith(f"broadcast-{made['id'][:12]}")])


def test_the_switch_starts_and_stops_everything_and_is_remembered(tmp_path: Path, receiver: FakeCollector) -> None:
    before = threading.active_count()
    with running(tmp_path, collector("a", receiver.url), enabled=False) as made:
        assert made.api("GET", "") == (200, {"enabled": False})
        made.sink(record())
        assert made.api("PUT", "", {"enabled": True}) == (200, {"enabled": True})
        made.sink(RECORD)
        settled(made, "a", 1)
    with running(tmp_path, collector("a", receiver.url), enabled=False) as again:
        assert again.api("GET", "/") == (200, {"enabled": True})
        assert again.api("PUT", "", {"enabled": False}) == (200, {"enabled": False})
        until(lambda: threading.active_count() == before)
        again.sink(record())
        assert counts(again, "a")["accepted"] == 1
    with running(tmp_path, collector("a", receiver.url), enabled=True) as changed:
        assert changed.enabled, "the file was changed after the page"
    assert made.api("PUT", "", {"enabled": "yes"})[0] == 400
    assert made.api("PUT", "", {"enabled": True, "more": 1})[0] == 400


def test_what_was_queued_while_switched_off_goes_when_it_is_on_again(api: Broadcast, receiver: FakeCollector) -> None:
    api.api("POST", "/destinations", draft(receiver.url))
    receiver.script(Reply(503))
    api.sink(RECORD)
    until(lambda: counts(api, "mine")["queued"] == 1)
    api.api("PUT", "", {"enabled": False})
    receiver.script(OK)
    assert counts(api, "mine")["queued"] == 1
    api.api("PUT", "", {"enabled": True})
    assert settled(api, "mine", 1)["delivered"] == 1


def test_a_corrected_destination_is_tried_at_once(
    api: Broadcast, receiver: FakeCollector, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    receiver.script(Reply(503, {"Retry-After": "3600"}))
    api.sink(RECORD)
    until(lambda: counts(api, "mine")["last_error"])
    with FakeCollector() as better:
        body = {"config": {"endpoint": better.url, "headers": SECRET_HEADER}}
        assert api.api("PUT", f"/destinations/{made['id']}", body)[0] == 200
        assert settled(api, "mine", 1, 5)["delivered"] == 1


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("POST", "", 405),
        ("DELETE", "/destinations", 405),
        ("GET", "/destinations/test", 405),
        ("PATCH", "/destinations/x", 405),
        ("POST", "/destinations/x/payload", 405),
        ("GET", "/nothing", 404),
        ("GET", "/destinations/x/y", 404),
        ("GET", "/destinations/../x", 404),
        ("GET", "/destinations/unknown", 404),
        ("GET", "/destinations/unknown/payload", 404),
        ("POST", "/destinations/test", 400),
    ],
)
def test_other_methods_and_paths_are_refused(api: Broadcast, method: str, path: str, status: int) -> None:
    told = api.api(method, path, None)
    assert told[0] == status
    assert told[1]["error"]["message"]
    assert status != 405 or told[1]["allow"]


def test_reading_the_settings_of_a_router_without_broadcast_makes_no_file(tmp_path: Path) -> None:
    with running(tmp_path, enabled=False) as made:
        assert made.api("GET", "/destinations") == (200, {"destinations": []})
        assert made.api("GET", "") == (200, {"enabled": False})
    assert list(tmp_path.iterdir()) == []


# -- show payload


def test_show_payload_is_exactly_what_the_destination_gets(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("private", receiver.url, privacy_mode=True, headers=SECRET_HEADER)) as made:
        (one,) = made.api("GET", "/destinations")[1]["destinations"]
        assert made.api("GET", f"/destinations/{one['id']}/payload")[1]["payload"] is None
        made.sink(RECORD)
        settled(made, "private", 1)
        status, shown = made.api("GET", f"/destinations/{one['id']}/payload")
    assert status == 200
    assert shown["payload"] == receiver.received[0].document
    assert shown["generation_id"] == RECORD["generation_id"]
    assert shown["request"]["url"] == receiver.url
    assert shown["request"]["headers"]["Authorization"] == "Bear…AbCd"


def test_show_payload_shows_the_last_record_that_is_for_it(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(
        tmp_path, collector("a", receiver.url, api_keys=("team",)), collector("off", receiver.url, enabled=False)
    ) as made:
        ids = {one["name"]: one["id"] for one in made.api("GET", "/destinations")[1]["destinations"]}
        mine, other = record(api_key_name="team"), record(api_key_name="x")
        made.sink(mine)
        made.sink(other)
        settled(made, "a", 1)
        assert made.api("GET", f"/destinations/{ids['a']}/payload")[1]["generation_id"] == mine["generation_id"]
        assert made.api("GET", f"/destinations/{ids['off']}/payload")[1]["generation_id"] == other["generation_id"]


# -- test connection


REJECTED = b'{"partialSuccess":{"rejectedSpans":1,"errorMessage":"SECRET"}}'
CAUSES: list[tuple[Reply, str, str]] = [
    (Reply(404), "HTTP 404", "check host and path"),
    (Reply(400), "HTTP 400", "OTLP as JSON"),
    (Reply(403), "HTTP 403", "permissions"),
    (Reply(405), "HTTP 405", "method"),
    (Reply(413), "HTTP 413", "size limit"),
    (Reply(415), "HTTP 415", "Collector between"),
    (Reply(429), "HTTP 429", "rate"),
    (Reply(503), "HTTP 503", "overloaded"),
    (Reply(418), "HTTP 418", "log"),
    (Reply(302, {"Location": "https://e.example/"}, b""), "Redirected (HTTP 302); redirects are not followed", "https://"),
    (Reply(200, {}, b"<html>SECRET"), "HTTP 200 with a web page instead of an OTLP answer", "not the gateway"),
    (Reply(200, body=b"SECRET"), "HTTP 200 with something else than an OTLP answer", "not as an OTLP/HTTP receiver"),
    (Reply(200, body=REJECTED), "HTTP 200, but 1 span rejected (partialSuccess)", "limits"),
    (Reply(200, body=b"x" * 70_000), "HTTP 200 with more than 65536 bytes, which is no OTLP answer", "not an OTLP receiver"),
    (Reply(raw=b"SSH-2.0-OpenSSH\r\n"), "The answer is not HTTP", "not as an OTLP/HTTP receiver"),
    (Reply(reset=True), "The connection was cut before the answer was complete", "TLS port"),
    (Reply(hang=True), "No complete answer within 1 s", "firewall"),
    (Reply(trickle=0.2), "No complete answer within 1 s", "firewall"),
]


@pytest.mark.parametrize(("reply", "message", "advice"), CAUSES, ids=[m for _, m, _ in CAUSES[:-1]] + ["trickle"])
def test_a_failed_test_names_the_likely_cause_and_never_echoes_the_target(
    api: Broadcast, reply: Reply, message: str, advice: str
) -> None:
    with FakeCollector(reply) as target:
        begun = time.monotonic()
        status, told = api.api("POST", "/destinations/test", draft(target.url))
        assert time.monotonic() - begun < 2
    assert (status, told["ok"], told["message"]) == (200, False, message)
    assert advice in told["advice"]
    assert "SECRET" not in json.dumps(told)
    assert told["latency_ms"] >= 0
    assert told.keys() == {"ok", "status", "latency_ms", "message", "advice"}


TYPED: list[tuple[dict[str, Any], int, str]] = [
    (GRAFANA | {"base_url": "http://127.0.0.1:{port}"}, 401, "joined as Basic"),
    (GRAFANA | {"base_url": "http://127.0.0.1:{port}"}, 404, "region"),
    ({"type": "axiom", "token": "t", "dataset": "d", "endpoint": "http://127.0.0.1:{port}"}, 403, "data set"),
    ({"type": "honeycomb", "api_key": "k", "endpoint": "http://127.0.0.1:{port}"}, 401, "api.eu1.honeycomb.io"),
    ({"type": "tempo", "base_url": "http://127.0.0.1:{port}"}, 503, "tenant"),
    ({"type": "otel-collector", "endpoint": "http://127.0.0.1:{port}/otlp"}, 404, "usually ends in /v1/traces"),
]


@pytest.mark.parametrize(("fields", "status", "advice"), TYPED)
def test_advice_knows_the_type(api: Broadcast, fields: dict[str, Any], status: int, advice: str) -> None:
    with FakeCollector(Reply(status)) as target:
        config = {key: value.replace("{port}", str(target.port)) for key, value in fields.items() if key != "type"}
        told = api.api("POST", "/destinations/test", {"type": fields["type"], "config": config})[1]
    assert advice in told["advice"]


@pytest.mark.parametrize("url", REFUSED)
def test_a_test_of_a_refused_address_fails_without_a_connection_and_it_is_not_saved(api: Broadcast, url: str) -> None:
    body = {"type": "otel-collector", "config": {"endpoint": url}}
    status, told = api.api("POST", "/destinations/test", body)
    if url:
        assert (status, told["ok"], told["status"]) == (200, False, None)
        assert told["advice"]
    assert api.api("POST", "/destinations", body)[0] in (400, 422)
    assert api.api("GET", "/destinations")[1] == {"destinations": []}


def test_refused_connections_unknown_hosts_and_grpc_ports_have_their_advice(api: Broadcast) -> None:
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    told = api.api("POST", "/destinations/test", draft(f"http://127.0.0.1:{port}/v1/traces"))[1]
    assert (told["message"], "running" in told["advice"]) == ("The connection was refused", True)
    told = api.api("POST", "/destinations/test", draft("http://127.0.0.1:4317/v1/traces"))[1]
    assert "gRPC" in told["advice"]
    told = api.api("POST", "/destinations/test", draft("http://no-such-host.invalid/v1/traces"))[1]
    assert told["advice"]


def test_a_stored_destination_can_be_tested_with_and_without_changes(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]
    assert api.api("POST", "/destinations/test", {"id": made["id"]})[1]["ok"] is True
    assert api.api("POST", "/destinations/test", made)[1]["ok"] is True
    config = made["config"] | {"endpoint": receiver.url + "/other"}
    assert api.api("POST", "/destinations/test", {"id": made["id"], "config": config})[1]["ok"] is True
    assert [got.headers["authorization"] for got in receiver.received] == ["Bearer dest-TOKEN-AbCd"] * 4
    assert [got.path for got in receiver.received] == ["/v1/traces"] * 3 + ["/v1/traces/other"]
    assert api.api("GET", f"/destinations/{made['id']}") == (200, made)


def test_tests_are_limited_in_number_at_once_and_a_minute(api: Broadcast, monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCollector(Reply(wait=0.5)) as slow:
        told: list[int] = []
        threads = [
            threading.Thread(target=lambda: told.append(api.api("POST", "/destinations/test", draft(slow.url))[0]))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(told) == [200] * 4 + [429] * 4
    with FakeCollector() as quick:
        statuses = [api.api("POST", "/destinations/test", draft(quick.url))[0] for _ in range(60)]
    assert statuses[-1] == 429
    assert statuses.count(200) == 52


def test_concurrent_changes_store_one_of_them_whole(api: Broadcast, receiver: FakeCollector) -> None:
    made = api.api("POST", "/destinations", draft(receiver.url))[1]

    def change(n: int) -> None:
        body = {"config": {"endpoint": f"{receiver.url}/{n}", "headers": {"X-N": f"value of number {n}"}}}
        api.api("PUT", f"/destinations/{made['id']}", body)

    threads = [threading.Thread(target=change, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    config = api._entry(made["id"]).destination
    n = config.endpoint.rpartition("/")[2]
    assert config.headers == {"X-N": f"value of number {n}"}


def test_a_crash_during_a_save_leaves_the_old_or_the_new_one(tmp_path: Path) -> None:
    script = """
import itertools, os, sys
sys.path[:0] = sys.argv[1:3]
import broadcast
from broadcast_runs import configured
from pathlib import Path
made = broadcast.Broadcast(configured(Path(sys.argv[3]), test_required=False))
saved = made.api("GET", "/destinations")[1]["destinations"]
body = {"type": "otel-collector", "name": "d", "config": {"endpoint": "http://127.0.0.1:9/", "headers": {"X": "0"}}}
one = saved[0]["id"] if saved else made.api("POST", "/destinations", body)[1]["id"]
os.write(1, b"ready\\n")
for n in itertools.count():
    value = f"{n:08d}" * 400
    made.api("PUT", f"/destinations/{one}", {"config": {"endpoint": f"http://127.0.0.1:9/{n}", "headers": {"X": value}}})
"""
    for round_ in range(5):
        command = [sys.executable, "-c", script, str(ROOT), str(ROOT / "tests"), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as child:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            time.sleep(0.02 + 0.013 * round_)
            child.kill()
        with running(tmp_path) as made:
            (entry,) = made.entries()
            n = entry.destination.endpoint.rpartition("/")[2]
            assert entry.destination.headers["X"] in (f"{int(n or 0):08d}" * 400, "0")


def test_a_saved_destination_that_is_no_longer_valid_rests_and_harms_nobody(tmp_path: Path, receiver: FakeCollector) -> None:
    with running(tmp_path, collector("good", receiver.url)) as made:
        made.store.save("bad", "bad", {"name": "bad", "type": "gone", "config": {}})
        made.store.save("worse", "worse", {"config": {"nope": 1}})
        made.store.save("worst", "worst", {"name": "worst", "type": "jaeger", "config": {"nope": 1}})
        made.reload(configured(tmp_path, collector("good", receiver.url)))
        made.sink(RECORD)
        assert settled(made, "good", 1)["delivered"] == 1
        assert made.stats()["destinations"].keys() == {"good"}


# -- doctor, import


def test_doctor_tests_every_enabled_destination_and_starts_nothing(tmp_path: Path, receiver: FakeCollector) -> None:
    before = threading.active_count()
    file = Destination("file", "file", path=str(tmp_path / "x.jsonl"))
    with FakeCollector(Reply(401)) as refusing:
        made = Broadcast(
            configured(
                tmp_path,
                collector("a", receiver.url),
                collector("b", refusing.url),
                collector("c", receiver.url, enabled=False),
                file,
            ),
            start=False,
        )
        found = made.doctor()
    until(lambda: threading.active_count() == before)
    assert [(one["place"], one["ok"]) for one in found] == [
        ("broadcast destination a", True),
        ("broadcast destination b", False),
        ("broadcast destination file", True),
    ]
    assert "Bearer or Basic" in found[1]["cure"]
    assert not (tmp_path / "state").exists()


def test_importing_it_brings_no_telemetry_and_nothing_of_ours() -> None:
    script = "import sys; import broadcast; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT, env=os.environ | {"PYTHONPATH": ""}
    )
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert not loaded & {"opentelemetry", "router", "pipeline", "providers", "telemetry", "waitress", "requests"}
