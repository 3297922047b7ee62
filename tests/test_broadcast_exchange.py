"""The connection to a destination: kept between deliveries, given up when it is of no use, never waited for too long."""

from __future__ import annotations

import os
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from urllib.parse import unquote

import pytest
from broadcast_records import record
from broadcast_runs import collector, counts, running, settled
from fake_collector import OK, FakeCollector, Reply, until

from broadcast import delivery, exchange
from broadcast.destinations import target
from broadcast.exchange import Line

KEEP = Reply(keep=True)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, certificate: Path) -> Iterator[ssl.SSLContext]:
    """A server's side of TLS for collector.example, which is this machine and is trusted."""
    genuine = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: genuine("127.0.0.1", *a, **k))
    monkeypatch.setattr(exchange, "_tls", [ssl.create_default_context(cafile=str(certificate))])
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(certificate)
    return server


def line_to(receiver: FakeCollector, host: str = "127.0.0.1") -> Line:
    return Line(target(collector("a", receiver.url.replace("127.0.0.1", host))))


def send(line: Line, timeout: float = 5.0) -> exchange.Answer:
    return line.exchange(b'{"resourceSpans":[]}', timeout, ())


def test_a_connection_is_kept_for_the_next_delivery(tmp_path: Path) -> None:
    with FakeCollector(KEEP) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        for n in range(1, 6):
            made.sink(record())
            settled(made, "a", n)
        assert (receiver.connections, len(receiver.received)) == (1, 5)


def test_so_is_one_over_tls(here: ssl.SSLContext) -> None:
    with FakeCollector(KEEP, tls=here) as receiver:
        line = line_to(receiver, "collector.example")
        assert [send(line).cause for _ in range(3)] == ["ok"] * 3
        assert receiver.connections == 1
        line.close()


@pytest.mark.parametrize("status", [204, 400, 503])
def test_an_answer_without_success_or_body_keeps_the_connection_too(status: int) -> None:
    with FakeCollector(replace(KEEP, status=status, body=b""), KEEP) as receiver:
        line = line_to(receiver)
        assert [send(line).status for _ in range(2)] == [status, 200]
        assert receiver.connections == 1
        line.close()


def test_an_answer_not_read_to_its_end_costs_the_connection() -> None:
    with FakeCollector(replace(KEEP, body=b"x" * 100_000), KEEP) as receiver:
        line = line_to(receiver)
        assert [send(line).cause for _ in range(2)] == ["too_long", "ok"]
        assert receiver.connections == 2
        line.close()


def test_a_kept_connection_that_the_server_closes_as_it_is_used_costs_no_failure(tmp_path: Path) -> None:
    with FakeCollector(KEEP, Reply(raw=b""), KEEP) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        for n in (1, 2):
            made.sink(record())
            settled(made, "a", n)
        assert counts(made, "a")["last_error"] is None
        assert (receiver.connections, len(receiver.received)) == (2, 3)


def test_a_new_connection_that_is_closed_without_an_answer_is_a_failure() -> None:
    with FakeCollector(Reply(raw=b""), OK) as receiver:
        line = line_to(receiver)
        assert send(line).cause == "cut"
        assert len(receiver.received) == 1


def test_a_connection_that_is_not_used_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "KEEP_IDLE", 0.05)
    with FakeCollector(KEEP) as receiver, running(tmp_path, collector("a", receiver.url)) as made:
        made.sink(record())
        settled(made, "a", 1)
        until(lambda: receiver.open == 0)
        made.sink(record())
        settled(made, "a", 2)
        assert receiver.connections == 2


def test_no_connection_is_left_behind(tmp_path: Path) -> None:
    with FakeCollector(KEEP) as receiver:
        with running(tmp_path, collector("a", receiver.url)) as made:
            made.sink(record())
            settled(made, "a", 1)
            assert receiver.open == 1
        until(lambda: receiver.open == 0)


def test_other_settings_are_another_connection(tmp_path: Path) -> None:
    with FakeCollector(KEEP) as old, FakeCollector(KEEP) as new, running(tmp_path, collector("a", old.url)) as made:
        made.sink(record())
        settled(made, "a", 1)
        made.reload(replace(made.settings, destinations=(collector("a", new.url),)))
        made.sink(record())
        settled(made, "a", 2)
        assert (len(old.received), len(new.received)) == (1, 1)
        until(lambda: old.open == 0)


def test_a_second_answer_on_a_kept_connection_has_a_deadline_of_its_own(here: ssl.SSLContext) -> None:
    for tls in (None, here):
        with FakeCollector(KEEP, Reply(trickle=0.05), tls=tls) as receiver:
            line = line_to(receiver, "collector.example")
            assert send(line).cause == "ok"
            time.sleep(0.3)  # longer than the first delivery's limit would have left
            begun = time.monotonic()
            assert send(line, 0.4).cause == "timeout"
            assert 0.3 < time.monotonic() - begun < 1.0
            assert receiver.connections == 1


def test_a_line_that_is_cut_ends_its_wait_and_every_later_one() -> None:
    with FakeCollector(Reply(hang=True)) as receiver:
        line = line_to(receiver)
        threaded = threading.Thread(target=lambda: until(lambda: receiver.received) and line.cut())
        threaded.start()
        begun = time.monotonic()
        assert send(line).cause == "cut"
        assert send(line).cause == "cut"
        assert time.monotonic() - begun < 2
        threaded.join()


@pytest.mark.parametrize("status", [401, 413])
def test_a_refusal_sent_before_the_body_was_read_is_heard(status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as hasty:

        def refuse() -> None:
            connection, _ = hasty.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n" % status)

        refusing = threading.Thread(target=refuse)
        refusing.start()
        line = Line(target(collector("a", f"http://127.0.0.1:{hasty.getsockname()[1]}/v1/traces")))
        assert line.exchange(os.urandom(8_000_000), 5.0, ()).status == status
        line.close()
        refusing.join()


@pytest.mark.parametrize(("status", "cause"), [(200, "cut"), (400, "http")])
def test_how_much_of_a_body_comes_matters_for_a_success_only(status: int, cause: str) -> None:
    cut = b"HTTP/1.1 %d So\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{}" % status
    with FakeCollector(Reply(raw=cut)) as receiver:
        answer = send(line_to(receiver))
        assert answer.cause == cause
        assert answer.retry == (status == 200)


def test_an_ipv6_address_is_an_address() -> None:
    with FakeCollector(host="::1") as receiver:
        line = Line(target(collector("a", f"http://[::1]:{receiver.port}/v1/traces")))
        assert send(line).cause == "ok"
        assert receiver.received[0].headers["host"] == f"[::1]:{receiver.port}"


@pytest.mark.parametrize("path", ["/v1/traces?a=b?c", "/a%2fb//c;d=e", "/ü?q=ä"])
def test_any_path_and_query_reach_the_destination(path: str) -> None:
    with FakeCollector() as receiver:
        line = Line(target(collector("a", receiver.url.replace("/v1/traces", path))))
        assert send(line).cause == "ok"
        assert unquote(receiver.received[0].path) == unquote(path)


def test_nothing_of_the_environment_makes_it_go_through_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FakeCollector() as receiver:
        assert send(line_to(receiver)).cause == "ok"
