"""Real neighbours: llama.cpp's own server behind the router, Debian's nginx in front of it with the shipped nginx.conf."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import tiny_llama
from conftest import RouterFactory
from fake_upstream import FakeUpstream, chat_completion, chunks, end, hold, json_answer, openai_chunks, pause, reset, stream_head
from router_process import ROOT, RouterProcess, Stream, chat_body, free_port, until
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
    body = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 40,
        "stream": True,
        "temperature": 0,
        "seed": 1,
        "cache_prompt": False,
    }
    texts = []
    for url in (process.url, llama.url):
        with openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as client:
            events = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=40, stream=True, temperature=0, seed=1
            )
            texts.append([event.choices[0].delta.content for event in events if event.choices])
    assert body
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


class Nginx:
    """The shipped nginx.conf with other ports, in a folder of its own."""

    def __init__(self, folder: Path, router_port: int) -> None:
        self.port = free_port()
        binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin:" + (shutil.os.environ.get("PATH") or ""))
        if not binary:
            pytest.skip("nginx is not installed")
        self.conf = folder / "nginx.conf"
        self.conf.write_text(whole_conf(folder, self.port, router_port))
        self.log = folder / "nginx-error.log"
        self._child = subprocess.Popen(
            [binary, "-p", str(folder), "-c", str(self.conf), "-e", str(self.log), "-g", "daemon off; master_process off;"],
            stdin=subprocess.DEVNULL,
        )
        until(self._up, 10, "nginx listens")

    def _up(self) -> bool:
        assert self._child.poll() is None, self.log.read_text()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def close(self) -> None:
        self._child.terminate()
        self._child.wait(10)


def whole_conf(folder: Path, port: int, router_port: int) -> str:
    raise NotImplementedError


@pytest.fixture
def behind_nginx(router: RouterFactory, tmp_path: Path) -> Iterator[RouterProcess]:
    process = router(server='trusted_proxy = "127.0.0.1"')
    nginx = Nginx(tmp_path, process.port)
    yield process
    nginx.close()
