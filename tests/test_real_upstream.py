"""Real neighbours: llama.cpp's own server behind the router, Debian's nginx in front of it with the shipped nginx.conf."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.client import HTTPConnection, IncompleteRead
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_llama
from conftest import RouterFactory
from fake_upstream import FakeUpstream, chunks, end, hold, openai_chunks, reset, stream_head
from router_process import CONFIG, ROOT, RouterProcess, free_port, until
from tiny_llama import LlamaServer

PROVIDER = '[[providers]]\nname = "llama"\nformat = "openai"\nbase_url = "{llama}/v1"\nmodels = ["tiny"]\n'
MESSAGES: Any = [{"role": "user", "content": "hello you"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's server comes with the test extra")
    yield from tiny_llama.running(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def process(router: RouterFactory, llama: LlamaServer) -> RouterProcess:
    return router(providers=PROVIDER, llama=llama.url)


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0, timeout=20) as made:
        yield made


@pytest.mark.xdist_group("llama")
def test_a_real_model_answers(client: openai.OpenAI, process: RouterProcess) -> None:
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=12)
    assert answer.usage
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].finish_reason == "length"
    assert answer.model_extra
    assert answer.model_extra["timings"]["predicted_n"] == 12
    record = process.record()
    assert record["response"]["content"] == answer.choices[0].message.content
    assert record["response"]["usage"]["output_tokens"] == 12
    assert record["response"]["stop_reason"] == "max_tokens"
    timings = record["attempts"][0]["timings"]
    assert timings["prefill_ms"] > 0
    assert timings["decode_ms"] > 0


@pytest.mark.xdist_group("llama")
@pytest.mark.parametrize("asked", [False, True])
def test_a_real_model_streams(client: openai.OpenAI, process: RouterProcess, asked: bool) -> None:
    events = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=300, stream=True, stream_options={"include_usage": asked}
    )
    seen = list(events)
    text = "".join(event.choices[0].delta.content or "" for event in seen if event.choices)
    assert (seen[-1].usage is not None) == asked
    record = process.record()
    assert (record["outcome"], record["response"]["content"]) == ("ok", text)
    assert record["usage_source"] == "reported"
    assert record["response"]["usage"]["output_tokens"] == 300
    assert record["attempts"][0]["timings"]["decode_ms"] > 0
    assert record["ttft_ms"] < record["duration_ms"]


@pytest.mark.xdist_group("llama")
def test_a_real_stream_is_what_the_model_sends(process: RouterProcess, llama: LlamaServer) -> None:
    """Greedy and seeded, through the router and past it: the same words in the same pieces."""
    texts = []
    for url in (process.url, llama.url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            events = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=40, stream=True, temperature=0, seed=1
            )
            texts.append([event.choices[0].delta.content for event in events if event.choices])
    assert texts[0] == texts[1]


@pytest.mark.xdist_group("llama")
def test_a_client_that_leaves_cancels_the_real_model(client: openai.OpenAI, process: RouterProcess, llama: LlamaServer) -> None:
    before = llama.log.count("cancel task")
    with client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30000, stream=True) as events:
        next(iter(events))
    left = time.monotonic()
    until(lambda: llama.log.count("cancel task") > before, 3, "llama.cpp cancels its task")
    assert time.monotonic() - left < 1.5
    record = process.record()
    assert record["outcome"] == "cancelled"
    assert record["response"]["usage"]["output_tokens"] > 0


@pytest.mark.xdist_group("llama")
def test_a_real_refusal_reaches_the_client(client: openai.OpenAI, process: RouterProcess) -> None:
    with pytest.raises(openai.BadRequestError, match="context size"):
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x " * 300_000}])
    assert process.record()["attempts"][0]["status"] == 400


@pytest.mark.xdist_group("llama")
def test_a_real_server_that_dies_in_the_middle_is_an_error(router: RouterFactory, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    running = tiny_llama.running(tmp_path)
    server = next(running)
    process = router(providers=PROVIDER, llama=server.url)
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0) as client:
        events = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=30000, stream=True)
        next(iter(events))
        server.kill()
        with pytest.raises(openai.APIError):
            list(events)
        with pytest.raises(openai.InternalServerError):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
    running.close()
    assert [record["outcome"] for record in process.settled(2)] == ["error", "error"]


# --- nginx

SHIPPED = ROOT / "deploy" / "nginx.conf"
BINARIES = os.pathsep.join(["/usr/sbin", "/usr/local/sbin", os.environ.get("PATH", "")])


class Nginx:
    """The shipped nginx.conf on other ports, in a folder of its own."""

    def __init__(self, folder: Path, router_port: int) -> None:
        binary = shutil.which("nginx", path=BINARIES)
        if not binary:
            pytest.skip("nginx is not installed")
        self.port = free_port()
        self._log = folder / "nginx-error.log"
        self._child = subprocess.Popen(
            [binary, "-p", str(folder), "-c", str(self._configured(folder, router_port)), "-e", str(self._log)],
            stdin=subprocess.DEVNULL,
        )
        until(self._up, 10, "nginx listens")

    def _configured(self, folder: Path, router_port: int) -> Path:
        """Only ports and paths differ from what is shipped; every path nginx writes to lies in the folder."""
        text = SHIPPED.read_text("utf-8")
        for old, new in {"127.0.0.1:8090": f"127.0.0.1:{router_port}", "listen 80;": f"listen 127.0.0.1:{self.port};"}.items():
            assert text.count(old) == 1, f"{old} in {SHIPPED}"
            text = text.replace(old, new)
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        places = "".join(f"    {kind}_temp_path {folder}/{kind};\n" for kind in kinds)
        alone = f"daemon off;\nmaster_process off;\npid {folder}/nginx.pid;\n"
        conf = folder / "nginx.conf"
        conf.write_text(alone + text.replace("http {\n", "http {\n" + places, 1), "utf-8")
        return conf

    def _up(self) -> bool:
        assert self._child.poll() is None, self._log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(10)


@pytest.fixture
def behind(router: RouterFactory, tmp_path: Path) -> Iterator[RouterProcess]:
    """A router that trusts the nginx in front of it; `port` is nginx's."""
    process = router(CONFIG, server='trusted_proxy = "127.0.0.1"')
    nginx = Nginx(tmp_path, process.port)
    direct, process.port = process.port, nginx.port
    yield process
    process.port = direct
    nginx.close()


def test_a_stream_passes_nginx_piece_by_piece(behind: RouterProcess, upstream: FakeUpstream) -> None:
    gates = [threading.Event() for _ in range(3)]
    script = stream_head()
    words = openai_chunks("one two three", finish=None, done=False)[1:]
    for word, gate in zip(words, gates, strict=True):
        script += chunks([word]) + hold(gate)
    upstream.script(script + chunks(openai_chunks("end")) + end())
    with behind.stream() as reply:
        for word, gate in zip(words, gates, strict=True):
            assert reply.next() == word, "it is here although the upstream has not gone on"
            gate.set()
        assert reply.read().endswith(b"data: [DONE]\n\n")
    assert behind.record()["outcome"] == "ok"


def test_a_break_in_the_middle_is_seen_behind_nginx(behind: RouterProcess, upstream: FakeUpstream) -> None:
    begun = openai_chunks("one two", finish=None, done=False)
    upstream.script(stream_head() + chunks(begun) + hold(threading.Event(), 0.2) + reset())
    with (
        openai.OpenAI(base_url=f"{behind.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.APIError),
        client.chat.completions.create(model="fake-model", messages=MESSAGES, stream=True, timeout=5) as events,
    ):
        list(events)


def test_a_router_that_is_killed_leaves_no_whole_looking_stream_behind_nginx(
    behind: RouterProcess, upstream: FakeUpstream
) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("one two", finish=None, done=False)) + hold(threading.Event()))
    with behind.stream() as reply:
        assert reply.next()
        behind.kill()
        with pytest.raises(IncompleteRead):
            reply.read()


def test_a_client_that_leaves_nginx_is_noticed(behind: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("one", finish=None, done=False)) + hold(threading.Event()))
    with behind.stream() as reply:
        assert reply.next()
    assert upstream.posts[0].closed_within(2)
    assert behind.record()["outcome"] == "cancelled"


def test_errors_pass_nginx_in_json(behind: RouterProcess) -> None:
    assert behind.post("/v1/chat/completions", b"{").error["type"] == "invalid_request_error"
    assert behind.get("/v1/nothing").error
    big = behind.post("/v1/chat/completions", b"x" * (32 << 20) + b"x")
    assert big.status == 413
    assert big.error, "nginx's own limit lies above ours"


def test_the_clients_address_is_known_behind_nginx_and_cannot_be_forged(behind: RouterProcess) -> None:
    """The client comes from another loopback address than nginx does, and claims to be a third."""
    connection = HTTPConnection("127.0.0.1", behind.port, timeout=10, source_address=("127.0.0.77", 0))
    body = '{"model": "fake-model", "messages": [{"role": "user", "content": "hi"}]}'
    headers = {"Content-Type": "application/json", "X-Forwarded-For": "6.6.6.6", "Forwarded": "for=6.6.6.6"}
    connection.request("POST", "/v1/chat/completions", body, headers)
    assert connection.getresponse().read()
    connection.close()
    assert behind.record()["client_address"] == "127.0.0.77"
