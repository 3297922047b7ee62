"""The process under load and under signals: it serves, it drains, it leaves, and it keeps its books to the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import RouterFactory
from fake_upstream import (
    FakeUpstream,
    Received,
    Script,
    chat_completion,
    chunk_object,
    chunks,
    end,
    event,
    hold,
    json_answer,
    openai_chunks,
    pause,
    silence,
    stream_head,
)
from router_process import SECRET_PROMPT, RouterProcess, Stream, chat_body, free_port, read_all, statuses, until

BEGUN = openai_chunks("one two", finish=None, done=False)


def listening(process: RouterProcess) -> bool:
    with contextlib.suppress(OSError), process.dial(1):
        return True
    return False


def held(gate: threading.Event) -> Script:
    """Half a stream, and the other half when the gate opens."""
    return stream_head() + chunks(BEGUN) + hold(gate) + chunks(openai_chunks("and three")) + end()


# --- load


def test_200_slow_streams_arrive_whole_and_in_order_while_health_answers(router: RouterFactory, upstream: FakeUpstream) -> None:
    count, pieces = 200, 20
    process = router(server="threads = 256")

    def numbered(received: Received) -> Script:
        mark = received.json()["messages"][0]["content"]
        events = [event(chunk_object({"content": f"{mark}:{number} "})) for number in range(pieces)]
        return stream_head() + chunks(events, 0.2) + chunks([event(chunk_object({}, "stop")), b"data: [DONE]\n\n"]) + end()

    upstream.default = numbered
    most = 0

    def one(number: int) -> str:
        with process.stream(f"s{number}", timeout=60) as reply:
            blocks = [json.loads(block[6:]) for block in reply.blocks() if b"[DONE]" not in block]
        return "".join(block["choices"][0]["delta"].get("content", "") for block in blocks)

    with ThreadPoolExecutor(count) as pool:
        texts = [pool.submit(one, number) for number in range(count)]
        while not all(text.done() for text in texts):
            asked = time.monotonic()
            assert process.get("/health").status == 200
            assert time.monotonic() - asked < 1.5
            most = max(most, upstream.open_connections)
            time.sleep(0.1)
    expected = ["".join(f"s{number}:{piece} " for piece in range(pieces)) for number in range(count)]
    assert [text.result() for text in texts] == expected
    assert most == count, "all were open at once"
    assert {record["outcome"] for record in process.settled(count)} == {"ok"}


def test_more_than_may_be_in_flight_is_refused_at_once_and_health_answers(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="threads = 12\nmax_in_flight = 6")
    gate = threading.Event()
    upstream.default = held(gate)
    with ThreadPoolExecutor(60) as pool:
        running = [pool.submit(process.stream) for _ in range(6)]
        upstream.wait_for(6)
        asked = time.monotonic()
        refused = list(pool.map(lambda _: process.chat(timeout=5), range(50)))
        assert time.monotonic() - asked < 5
        assert {answer.status for answer in refused} == {503}
        assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
        asked = time.monotonic()
        assert process.get("/health").status == 200
        assert process.get("/v1/models").status == 200
        assert time.monotonic() - asked < 1
        gate.set()
        for future in running:
            with future.result() as reply:
                assert reply.read().endswith(b"data: [DONE]\n\n")
    outcomes = [record["outcome"] for record in process.settled(56)]
    assert (outcomes.count("ok"), outcomes.count("rejected")) == (6, 50)
    assert len(upstream.posts) == 6


def test_health_answers_under_the_default_limits_with_every_slot_taken(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="threads = 8")
    gate = threading.Event()
    upstream.default = hold(gate) + json_answer(chat_completion())
    with ThreadPoolExecutor(30) as pool:
        asked = [pool.submit(process.chat) for _ in range(30)]
        until(lambda: sum(future.done() for future in asked) >= 22, 10, "all but a few are refused at once")
        began = time.monotonic()
        assert process.get("/health").status == 200
        assert time.monotonic() - began < 1
        gate.set()
        answered = [future.result().status for future in asked]
    assert answered.count(200) == len(upstream.posts) >= 4
    assert answered.count(503) == 30 - len(upstream.posts)
    process.settled(30)


def cpu_seconds(process: RouterProcess) -> float:
    columns = Path(f"/proc/{process.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(columns[11]) + int(columns[12])) / os.sysconf("SC_CLK_TCK")


def test_an_idle_router_sleeps_and_waiting_costs_next_to_nothing(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router()
    process.chat()
    began = cpu_seconds(process)
    time.sleep(2)  # the measure itself
    assert cpu_seconds(process) - began < 0.1
    gate = threading.Event()
    upstream.default = held(gate)
    with ThreadPoolExecutor(30) as pool:
        waiting = list(pool.map(lambda _: process.stream(), range(30)))
        began = cpu_seconds(process)
        time.sleep(2)
        assert cpu_seconds(process) - began < 0.6, "30 streams wait for a silent model"
        gate.set()
        for reply in waiting:
            assert reply.read().endswith(b"data: [DONE]\n\n")
            reply.close()


def test_big_prompts_do_not_pile_up(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(logging="content = false")
    messages = [{"role": "user", "content": "word " * 20}] * 40_000
    body = json.dumps({"model": "fake-model", "messages": messages}).encode()
    memory = []
    for _ in range(16):
        assert process.post("/v1/chat/completions", body, timeout=60).status == 200
        memory.append(process.memory())
    assert len(upstream.posts[0].json()["messages"]) == 40_000
    process.settled(16)
    assert memory[-1] - memory[7] < 64 << 20


# --- clients that do not read


def deaf(process: RouterProcess, **more: Any) -> socket.socket:
    """A client that asks, and never reads."""
    body = json.dumps(chat_body(SECRET_PROMPT, **more)).encode()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    sock.connect(("127.0.0.1", process.port))
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return sock


def test_clients_that_never_read_are_cut_and_everybody_else_is_served(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="threads = 6\nmax_in_flight = 5\nsend_timeout = 1")
    process.chat()
    before = process.resources()
    flood = stream_head() + chunks([event(chunk_object({"content": "x" * 60000}))] * 1000) + end()
    upstream.script(*[flood] * 5)
    socks = [deaf(process, stream=True) for _ in range(5)]
    upstream.wait_for(6)
    assert process.get("/health").status == 200
    requests = upstream.posts[1:6]
    assert all(request.closed_within(10) for request in requests), "the upstream is let go with its client"
    assert process.chat().status == 200
    for sock in socks:
        sock.close()
    records = process.settled(7)
    stalled = [record for record in records if record["stream"]]
    assert {(record["outcome"], record["error_type"]) for record in stalled} == {("cancelled", "client_stalled")}
    assert all(record["response"]["content"].startswith("xxx") for record in stalled)
    process.comes_back_to(before)


def test_a_whole_answer_nobody_reads_does_not_hold_its_socket(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="send_timeout = 1")
    process.chat()
    before = process.resources()
    upstream.script(*[json_answer(chat_completion("x" * 8_000_000))] * 3)
    socks = []
    for number in range(1, 4):
        socks.append(deaf(process))
        assert upstream.wait_for(number + 1)[number].answered.wait(10)
        until(lambda: process.stats()["in_flight"] == 0, 15)
    process.comes_back_to(before, 15)
    for sock in socks:
        sock.close()
    assert len(process.settled(4)) == 4


def test_a_slow_reader_is_not_a_deaf_one(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="send_timeout = 1")
    text = "x" * 400_000
    upstream.script(json_answer(chat_completion(text)))
    with deaf(process) as sock:
        sock.settimeout(10)
        data = b""
        while len(data) < 400_000:
            piece = sock.recv(16384)
            assert piece, "cut while reading"
            data += piece
            time.sleep(0.08)
    assert process.record()["outcome"] == "ok"


def test_a_client_that_had_nothing_to_read_is_not_a_deaf_one(router: RouterFactory, upstream: FakeUpstream) -> None:
    """The clock of send_timeout starts when there is something to send, not when the client last got something."""
    process = router(server="send_timeout = 0.5\nthreads = 64")
    silences = [pause(0.7) + chunks(BEGUN) for _ in range(4)]
    late = stream_head() + chunks(BEGUN) + silences[0] + silences[1] + silences[2] + silences[3]
    upstream.default = late + chunks(openai_chunks("late")) + end()
    done = threading.Event()

    def ask(_: int) -> bool:
        with process.stream() as reply:
            return reply.read().endswith(b"data: [DONE]\n\n")

    def keep_the_loop_busy() -> None:
        connection = process.connection()
        while not done.is_set():
            connection.request("GET", "/health")
            connection.getresponse().read()
        connection.close()

    with ThreadPoolExecutor(26) as pool:
        busy = [pool.submit(keep_the_loop_busy) for _ in range(2)]
        try:
            assert all(pool.map(ask, range(24)))
        finally:
            done.set()
    assert [future.result() for future in busy] == [None, None]
    assert {record["outcome"] for record in process.settled(24)} == {"ok"}


# --- leaving


def test_sigterm_with_nothing_to_do_is_exit_0(router: RouterFactory) -> None:
    process = router()
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 3
    assert not listening(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_running_requests_finish_while_nobody_new_is_let_in(
    router: RouterFactory, upstream: FakeUpstream, number: signal.Signals
) -> None:
    process = router(server="drain_seconds = 20")
    gate = threading.Event()
    upstream.script(*[held(gate)] * 5, *[hold(gate) + json_answer(chat_completion("whole"))] * 3)
    with ThreadPoolExecutor(8) as pool:
        streams = [pool.submit(process.stream) for _ in range(5)]
        upstream.wait_for(5)
        wholes = [pool.submit(process.chat) for _ in range(3)]
        upstream.wait_for(8)
        process.signal(number)
        until(lambda: not listening(process), 5, "the listener is closed")
        gate.set()
        for future in streams:
            with future.result() as reply:
                assert reply.read().endswith(b"data: [DONE]\n\n")
        assert [future.result().status for future in wholes] == [200] * 3
    assert process.exit_code() == 0
    records = process.records(8)
    assert [record["outcome"] for record in records] == ["ok"] * 8


def test_an_idle_connection_does_not_hold_up_the_exit(router: RouterFactory) -> None:
    process = router(server="drain_seconds = 20")
    connection = process.connection()
    connection.request("GET", "/health")
    assert connection.getresponse().read()
    half = process.dial()
    half.sendall(b"POST /v1/chat")
    began = time.monotonic()
    assert process.stop() == 0
    assert time.monotonic() - began < 5
    connection.close()
    half.close()


def test_a_keep_alive_connection_is_not_served_for_ever_while_draining(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="drain_seconds = 20")
    gate = threading.Event()
    upstream.script(hold(gate) + json_answer(chat_completion()))
    idle = process.connection()
    idle.request("GET", "/health")
    idle.getresponse().read()
    with ThreadPoolExecutor() as pool:
        running = pool.submit(process.chat)
        upstream.wait_for(1)
        process.signal(signal.SIGTERM)
        until(lambda: not listening(process), 5)
        status = None
        with contextlib.suppress(OSError):
            idle.request("POST", "/v1/chat/completions", json.dumps(chat_body()))
            status = idle.getresponse().status
        gate.set()
        assert running.result().status == 200
    idle.close()
    assert status in (None, 503), "closed, or told that we are leaving"
    assert process.exit_code() == 0
    assert len(upstream.posts) == 1


def test_what_is_still_running_at_the_deadline_gets_an_error_and_a_record(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="drain_seconds = 0.5")
    upstream.script(*[stream_head() + chunks(BEGUN) + silence()] * 5, *[silence()] * 3)
    with ThreadPoolExecutor(8) as pool:
        streams: list[Stream] = [process.stream() for _ in range(5)]
        for reply in streams:
            assert reply.status == 200
        wholes = [pool.submit(process.chat) for _ in range(3)]
        upstream.wait_for(8)
        began = time.monotonic()
        process.signal(signal.SIGTERM)
        bodies = [reply.read() for reply in streams]
        answers = [future.result() for future in wholes]
    assert process.exit_code() == 0
    assert time.monotonic() - began < 6
    for reply, body in zip(streams, bodies, strict=True):
        reply.close()
        last = body.removeprefix(b"".join(BEGUN))
        assert json.loads(last.removeprefix(b"data: "))["error"]["message"]
        assert b"[DONE]" not in body
    for answer in answers:
        assert answer.status == 503
        assert answer.error["message"]
    records = process.records(8)
    assert len(records) == 8
    assert {(record["outcome"], record["error_type"]) for record in records} == {("error", "shutdown")}
    assert [record["response"]["content"] for record in records if record["stream"]] == ["one two"] * 5
    assert all(request.closed_within(1) for request in upstream.posts)


@pytest.mark.parametrize("numbers", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGTERM)])
def test_a_second_signal_ends_it_within_3_seconds(
    router: RouterFactory, upstream: FakeUpstream, numbers: tuple[signal.Signals, signal.Signals]
) -> None:
    process = router(server="drain_seconds = 60")
    upstream.script(stream_head() + chunks(BEGUN) + silence(), silence())
    with process.stream(timeout=30) as reply, ThreadPoolExecutor() as pool:
        assert reply.next()
        whole = pool.submit(lambda: ignoring_ends(process))
        upstream.wait_for(2)
        process.signal(numbers[0])
        until(lambda: not listening(process), 5)
        began = time.monotonic()
        process.signal(numbers[1])
        process.exit_code(10)
        assert time.monotonic() - began < 3
        whole.result()
    assert not listening(process)
    for line in process.log.read_bytes().splitlines():
        json.loads(line)


def ignoring_ends(process: RouterProcess) -> None:
    with contextlib.suppress(OSError):
        process.chat()


def test_after_sigkill_it_starts_again_on_the_same_port(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router()
    assert process.chat().status == 200
    upstream.script(stream_head() + chunks(BEGUN) + silence())
    with process.stream() as reply:
        assert reply.next()
        process.kill()
    process.launch()
    assert until(process._up_or_dead) == "up"
    upstream.default = json_answer(chat_completion())
    assert process.chat().status == 200
    assert all(json.loads(line) for line in process.lines())


def test_a_client_that_hangs_up_on_an_answer_being_written_is_no_sigpipe(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router()
    upstream.default = json_answer(chat_completion("x" * 3_000_000))
    for number in range(1, 6):
        with deaf(process):
            upstream.wait_for(number)
    assert process.get("/health").status == 200
    until(lambda: process.stats()["in_flight"] == 0)


# --- SIGHUP


def test_sighup_reads_the_configuration_again(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router()
    gate = threading.Event()
    upstream.script(held(gate))
    with process.stream() as reply:
        assert reply.next()
        rules = '[[routers]]\nname = "renamed"\ntype = "fallback"\nrewrite_model = "other"\n'
        process.write_config(rules=rules)
        process.signal(signal.SIGHUP)
        until(lambda: process.chat().headers.get("x-router-rule") == "renamed", 10, "the new rules are in use")
        gate.set()
        assert reply.read().endswith(b"data: [DONE]\n\n"), "a running stream is not touched"
    assert process.chat().headers["x-router-model"] == "other"
    stats = process.stats()
    assert stats["requests"]["ok"] == len(process.settled(stats["requests"]["accepted"]))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_comes_with_the_first_connection_is_obeyed(router: RouterFactory, number: int) -> None:
    for _ in range(5):
        process = router(start=False)
        process.port = free_port()
        process.write_config()
        process.launch()
        until(lambda process=process: listening(process), 10, "it listens")
        process.signal(number)
        if number == signal.SIGHUP:
            until(lambda process=process: "was read again" in process.errors())
            process.signal(signal.SIGTERM)
        assert process.exit_code() == 0


def test_sighup_with_a_broken_file_keeps_the_old_configuration(router: RouterFactory) -> None:
    process = router()
    process.write_config(rules='[[routers]]\ntype = "fallbak"\n')
    process.signal(signal.SIGHUP)
    until(lambda: "config.toml.routers[0]" in process.output(), 10, "the mistake is named")
    answer = process.chat()
    assert (answer.status, answer.headers["x-router-rule"]) == (200, "0:fallback")


# --- one loop for all sockets


def test_the_loop_does_not_spin_on_what_a_worker_is_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its turns would keep the interpreter from the worker, and a stream of many chunks would crawl."""
    from waitress.channel import HTTPChannel

    import server

    triggered: list[bool] = []
    channel: Any = object.__new__(server._channel_class(SimpleNamespace(), 1000))  # type: ignore[arg-type]
    channel.total_outbufs_len, channel.will_close, channel.close_when_flushed = 0, False, False
    channel.adj = SimpleNamespace(outbuf_high_watermark=100)
    channel.server = SimpleNamespace(pull_trigger=lambda: triggered.append(channel.writable()))

    def send(self: Any, data: bytes) -> int:
        """As waitress: what is taken over waits until the socket has taken it."""
        self.total_outbufs_len += len(data)
        seen.append(self.writable())
        self.total_outbufs_len -= taken
        return len(data)

    monkeypatch.setattr(HTTPChannel, "write_soon", send)
    for size, taken, while_sending, after in ((5, 5, False, []), (5, 3, False, [True]), (98, 50, True, [True])):
        seen: list[bool] = []
        triggered.clear()
        channel.write_soon(b"x" * size)
        assert (seen, triggered) == ([while_sending], after), (size, taken)


# --- the silence of a model


def test_heads_are_held_back_so_that_an_early_failure_has_a_status(router: RouterFactory, upstream: FakeUpstream) -> None:
    """Up to a few seconds; later the head goes out, and the failure comes in-band."""
    process = router(provider="read_timeout = 1.5")
    upstream.script(silence())
    with process.stream() as reply:
        assert reply.status == 504


@pytest.mark.slow
def test_waiting_clients_get_the_head_in_time_and_then_heartbeats(router: RouterFactory, upstream: FakeUpstream) -> None:
    """One waits for the first word and one for the next, both for longer than two heartbeats are apart."""
    process = router(provider="read_timeout = 60\nidle_timeout = 60")
    gate = threading.Event()
    both_have_waited = threading.Barrier(2, action=gate.set, timeout=60)
    first = openai_chunks("early", finish=None, done=False)
    rest = chunks(openai_chunks("slow")) + end()
    before, between = hold(gate, 90) + stream_head() + rest, stream_head() + chunks(first) + hold(gate, 90) + rest

    def wait(script: Script, beats: int) -> tuple[float, list[float]]:
        upstream.script(script)
        asked = time.monotonic()
        with process.stream(timeout=60) as reply:
            assert reply.status == 200
            headed = time.monotonic() - asked
            times: list[float] = []
            for block in reply.blocks():
                if block.startswith(b":"):
                    times.append(time.monotonic() - asked)
                if len(times) == beats:
                    break
            both_have_waited.wait()
            assert reply.read().endswith(b"data: [DONE]\n\n")
        return headed, times

    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(wait, before, 2)
        upstream.wait_for(1)
        pausing = pool.submit(wait, between, 1)
        headed, beats = waiting.result()
        assert headed < 12, "the head is held back for a few seconds, not for the model"
        assert beats[0] < 25
        assert beats[1] - beats[0] < 17
        headed, beats = pausing.result()
        assert headed < 2
        assert beats[0] < 17
    records = process.settled(2)
    assert {record["outcome"] for record in records} == {"ok"}
    assert max(record["ttft_ms"] for record in records) > 10_000


def test_a_bare_connection_that_says_nothing_useful_is_answered_and_closed(router: RouterFactory) -> None:
    process = router()
    for data in (
        b"hello\r\n\r\n",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    ):
        with process.dial(5) as sock:
            sock.sendall(data)
            answered = statuses(read_all(sock))
            assert not answered or answered[0] in (400, 404, 505), (data, answered)
    assert process.get("/health").status == 200
