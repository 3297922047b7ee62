"""Broadcast behind the whole server: whatever ends a request, each destination hears of it once, and no more than it may."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import pytest
from broadcast_records import attributes
from conftest import RouterFactory
from fake_collector import OK, FakeCollector, Reply
from fake_upstream import FakeUpstream, Script, chat_completion, error_answer, hold, json_answer, openai_chunks, silence, stream
from router_process import CONFIG, INBOUND_KEY, PROVIDER, PROVIDER_KEY, ROOT, SECRET_PROMPT, RouterProcess, chat_body, until
from test_outcomes import CASES, LIMITS, dial_and_send, leave, run

BROADCAST = """
[broadcast]
enabled = true
database = "{tmp}/state/broadcast.db"
timeout = 2
{broadcast}

{destinations}
"""
ROUTER = CONFIG + BROADCAST
WIRE = Path(__file__).parent / "wire" / "broadcast"
GENERATION = "LLM Generation"
PROMISED = 0.5
"""Seconds from an answer to its record's being on disk, on a machine that is busy with other tests; 0.1 is what is promised."""


@pytest.fixture
def broadcaster(router: RouterFactory) -> RouterFactory:
    """`broadcaster(destinations=...)` is a running router with Broadcast switched on."""

    def factory(config: str = ROUTER, **values: Any) -> RouterProcess:
        return router(config, **{"broadcast": "", "destinations": "", **values})

    return factory


def destination(name: str, receiver: FakeCollector, **more: Any) -> str:
    given = {"name": name, "type": "otel-collector", "endpoint": receiver.url} | more
    lines = [f"{key} = {json.dumps(value)}" for key, value in given.items()]
    return "\n".join(["[[broadcast.destinations]]", *lines, ""])


@pytest.fixture
def receiver() -> Iterator[FakeCollector]:
    with FakeCollector(Reply(keep=True)) as made:
        yield made


@pytest.fixture
def private() -> Iterator[FakeCollector]:
    with FakeCollector(Reply(keep=True)) as made:
        yield made


def counts(process: RouterProcess) -> dict[str, Any]:
    """The counters per destination, once they have been seen to add up."""
    made: dict[str, Any] = process.stats()["broadcast"]["destinations"]
    for name, have in made.items():
        assert have["accepted"] == have["delivered"] + sum(have["dropped"].values()) + have["queued"], (name, have)
    return made


def delivered(process: RouterProcess, name: str, n: int, seconds: float = 15.0) -> None:
    until(lambda: counts(process)[name]["delivered"] == n, seconds, f"{n} records delivered to {name}")


def generations(receiver: FakeCollector) -> list[dict[str, Any]]:
    """The span of each request, in the order of arrival."""
    return [span for span in receiver.spans() if attributes(span)["span.type"] == "generation"]


def ids(receiver: FakeCollector) -> list[str]:
    return [attributes(span)["gen_ai.response.id"] for span in generations(receiver)]


# -- one request, one trace


def test_every_end_of_a_request_is_one_trace_at_every_destination(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector, private: FakeCollector
) -> None:
    destinations = destination("open", receiver) + destination("private", private, privacy_mode=True)
    process = broadcaster(destinations=destinations, provider=LIMITS, environment={"KEY": PROVIDER_KEY})
    for case in CASES.values():
        upstream.default = case.script
        run(process, case)
    for how, streamed in (("close", False), ("reset", True)):
        upstream.default = silence()
        asked = len(upstream.posts)
        sock = dial_and_send(process, stream=streamed)
        until(lambda asked=asked: len(upstream.posts) > asked)
        leave(sock, how)
    until(lambda: process.stats()["in_flight"] == 0)
    assert process.chat(models=["x"], plugins=[{"id": "nobody"}]).status == 400
    records = process.settled(len(CASES) + 3)
    for name, at in (("open", receiver), ("private", private)):
        delivered(process, name, len(records))
        assert sorted(ids(at)) == sorted(record["generation_id"] for record in records)
        told = {attributes(span)["gen_ai.response.id"]: span for span in generations(at)}
        for record in records:
            span = told[record["generation_id"]]
            said = attributes(span)
            assert said["router.outcome"] == record["outcome"]
            assert span["status"]["code"] == (1 if record["outcome"] == "ok" else 2)
            digest = hashlib.sha256(record["generation_id"].encode()).hexdigest()
            assert (span["traceId"], span["spanId"]) == (digest[:32], digest[:16])
            assert ("gen_ai.usage.input_tokens" in said) == (record["usage_source"] != "none")
    assert SECRET_PROMPT.encode() not in b"".join(request.text for request in private.received)


def test_an_overloaded_request_and_one_without_a_rule_are_traces_too(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector
) -> None:
    rules = '[[routers]]\ntype = "prefix"\nmodel_prefix = "fake"\nprovider = "up"'
    server = "threads = 4\nmax_in_flight = 1"
    process = broadcaster(destinations=destination("open", receiver), rules=rules, server=server)
    go_on = threading.Event()
    upstream.default = hold(go_on) + json_answer(chat_completion())
    waiting = threading.Thread(target=process.chat)
    waiting.start()
    upstream.wait_for(1)
    assert process.chat().status == 503
    go_on.set()
    waiting.join()
    assert process.post("/v1/messages", chat_body(max_tokens=5) | {"model": "unknown"}).status == 404
    delivered(process, "open", 3)
    said = [attributes(span) for span in generations(receiver)]
    kinds = [(one["router.outcome"], one.get("error.type")) for one in said]
    assert sorted(kinds) == [("ok", None), ("rejected", "model_not_found"), ("rejected", "overloaded")] or sorted(
        kinds, key=str
    ) == [("ok", None), ("rejected", "model_not_found"), ("rejected", "overloaded")]


def test_a_failover_is_one_trace_with_a_span_per_attempt(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector
) -> None:
    config = ROUTER.replace("attempts = 1", "attempts = 3")
    second = PROVIDER.replace('"up"', '"second"')
    process = broadcaster(config, destinations=destination("open", receiver), providers=PROVIDER + second)
    upstream.script(error_answer(503), json_answer(chat_completion()))
    assert process.chat().status == 200
    delivered(process, "open", 1)
    spans = receiver.spans()
    assert [(span["name"], span["kind"], span["status"]["code"]) for span in spans] == [
        (GENERATION, 3, 1),
        ("provider attempt 1: up", 2, 2),
        ("provider attempt 2: second", 2, 1),
        ("generation", 2, 1),
    ]
    assert {span["traceId"] for span in spans} == {spans[0]["traceId"]}
    assert {span.get("parentSpanId") for span in spans[1:]} == {spans[0]["spanId"]}


@pytest.mark.parametrize("name", ["collector-example", "grafana-example"])
@pytest.mark.parametrize("streamed", [False, True])
def test_the_documents_example_sent_to_the_server_arrives_as_its_golden_file_says(
    broadcaster: RouterFactory, receiver: FakeCollector, name: str, streamed: bool
) -> None:
    asked = json.loads((WIRE / f"{name}.client.json").read_text("utf-8"))
    golden = json.loads((WIRE / f"{name}.otlp.json").read_text("utf-8"))
    wanted = [span for entry in golden["resourceSpans"] for scope in entry["scopeSpans"] for span in scope["spans"]]
    process = broadcaster(destinations=destination("open", receiver))
    answer = process.post("/api/v1/chat/completions", asked | {"stream": streamed})
    assert answer.status == 200
    delivered(process, "open", 1)
    here = receiver.spans()
    assert [span["name"].partition(":")[0] for span in here] == [span["name"].partition(":")[0] for span in wanted]
    assert {span["traceId"] for span in here} == {span["traceId"] for span in wanted}
    assert ids(receiver) == [answer.headers["x-generation-id"]]
    theirs, ours = (attributes(next(s for s in spans if s["kind"] == 3)) for spans in (wanted, here))
    for key in theirs:
        if key.startswith("trace.") and "openrouter" not in key and "provider" not in key and "put" not in key:
            assert ours[key] == theirs[key], key
    assert {key: ours[key] for key in ("user.id", "session.id", "gen_ai.request.model", "gen_ai.system")} == {
        key: theirs[key] for key in ("user.id", "session.id", "gen_ai.request.model", "gen_ai.system")
    }


# -- privacy, through every language


CANARY = "SECRET-PROMPT-canary-Zq7"
PICTURE = base64.b64encode(b"\x89PNG\r\n\x1a\n" + CANARY.encode() * 40).decode()
SCHEMA = {"type": "object", "properties": {"q": {"type": "string", "description": CANARY}}}
OPENAI_TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": CANARY},
    {"role": "user", "content": [{"type": "text", "text": CANARY},
                                 {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PICTURE}"}}]},
    {"role": "assistant", "content": None, "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": json.dumps({"q": CANARY})}}]},
    {"role": "tool", "tool_call_id": "call_1", "content": CANARY},
]  # fmt: skip
ANTHROPIC_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": CANARY},
                                 {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PICTURE}}]},
    {"role": "assistant", "content": [{"type": "tool_use", "id": "call_1", "name": "look", "input": {"q": CANARY}}]},
    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "call_1", "content": CANARY}]},
]  # fmt: skip
RESPONSES_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "input_text", "text": CANARY},
                                 {"type": "input_image", "image_url": f"data:image/png;base64,{PICTURE}"}]},
    {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": json.dumps({"q": CANARY})},
    {"type": "function_call_output", "call_id": "call_1", "output": CANARY},
]  # fmt: skip
FUNCTION = {"name": "look", "description": CANARY, "parameters": SCHEMA}
FACES: dict[str, tuple[str, dict[str, Any]]] = {
    "openai": ("/v1/chat/completions", {
        "messages": OPENAI_TURNS, "tools": [{"type": "function", "function": FUNCTION}], "stop": [CANARY],
        "response_format": {"type": "json_schema", "json_schema": {"name": CANARY, "schema": SCHEMA}}}),
    "anthropic": ("/v1/messages", {
        "messages": ANTHROPIC_TURNS, "system": [{"type": "text", "text": CANARY}], "max_tokens": 100,
        "tools": [{"name": "look", "description": CANARY, "input_schema": SCHEMA}], "stop_sequences": [CANARY]}),
    "responses": ("/v1/responses", {
        "input": RESPONSES_TURNS, "instructions": CANARY, "tools": [{"type": "function", **FUNCTION}]}),
    "embeddings": ("/v1/embeddings", {"input": [CANARY]}),
    "count_tokens": ("/v1/messages/count_tokens", {"messages": ANTHROPIC_TURNS, "system": CANARY}),
}  # fmt: skip
CALL = {"id": "call_2", "type": "function", "function": {"name": "look", "arguments": json.dumps({"q": CANARY})}}


def whole_answer() -> dict[str, Any]:
    made = chat_completion(CANARY)
    made["choices"][0]["message"] |= {"tool_calls": [CALL], "reasoning_content": CANARY}
    return made


def says_it_all(received: Any) -> Script:
    if received.path.endswith("/embeddings"):
        usage = {"prompt_tokens": 3, "total_tokens": 3}
        return json_answer({"object": "list", "model": "embedder", "data": [], "usage": usage})
    if not received.json().get("stream"):
        return json_answer(whole_answer())
    return stream(openai_chunks(f"one {CANARY} two", {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}))


@dataclass(frozen=True)
class Leak:
    """What the provider does with the prompt."""

    answer: Script | Callable[[Any], Script]


LEAKS = {
    "answers with it": Leak(says_it_all),
    "refuses and quotes it": Leak(error_answer(400, f"you said {CANARY}", param=CANARY, code=CANARY)),
    "fails and quotes it": Leak(error_answer(500, f"I cannot bear {CANARY}", code=CANARY)),
    "breaks off": Leak(lambda received: stream(openai_chunks(CANARY, finish=None, done=False))),
    "sends an error in the middle": Leak(
        lambda received: stream([*openai_chunks(CANARY, finish=None, done=False),
                                 b'data: {"error": {"message": "%s", "type": "%s"}}\n\n' % (CANARY.encode(), CANARY.encode())])
    ),
}  # fmt: skip


@pytest.mark.parametrize("leak", LEAKS)
def test_content_reaches_the_open_destination_and_no_byte_of_it_the_private_one(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector, private: FakeCollector, leak: str
) -> None:
    destinations = destination("open", receiver) + destination("private", private, privacy_mode=True)
    process = broadcaster(destinations=destinations)
    upstream.default = LEAKS[leak].answer
    for path, body in FACES.values():
        for streamed in (False, True):
            if not streamed or path in ("/v1/chat/completions", "/v1/messages", "/v1/responses"):
                more = {"stream": True} if streamed else {}
                process.post(path, {"model": "fake-model", "trace": {"environment": "test"}, **body, **more})
    sent = 8
    records = process.settled(sent)
    for name in ("open", "private"):
        delivered(process, name, sent)
    hidden = HIDDEN_FORMS
    for request in private.received:
        everything = request.text + request.body + str(request.headers).encode()
        for form in hidden:
            assert form not in everything
    assert sorted(ids(private)) == sorted(record["generation_id"] for record in records)
    for span in generations(private):
        assert attributes(span)["trace.metadata.environment"] == "test"
        assert attributes(span)["router.outcome"] in ("ok", "error")
    for span in generations(receiver):
        assert CANARY in json.dumps(span)


HIDDEN_FORMS = [
    CANARY.encode(),
    CANARY.lower().encode(),
    PICTURE[40:80].encode(),
    base64.b64encode(CANARY.encode())[:24],
]


# -- keys


def test_a_destination_hears_the_keys_it_names_and_no_secret_goes_anywhere_else(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector, private: FakeCollector
) -> None:
    keys = '[[api_keys]]\nname = "team a"\nkey_env = "A"\n[[api_keys]]\nname = "team b"\nkey_env = "B"\n'
    secret = {"Authorization": "Bearer ${TOKEN}"}
    headers = "headers = { " + ", ".join(f'{k} = "{v}"' for k, v in secret.items()) + " }\n"
    destinations = destination("a", receiver, api_keys=["team a"]) + headers + destination("all", private)
    environment = {"A": INBOUND_KEY, "B": INBOUND_KEY[::-1], "KEY": PROVIDER_KEY, "TOKEN": "dest-TOKEN-0123456789"}
    process = broadcaster(
        ROUTER + keys, destinations=destinations, provider='api_key_env = "KEY"', environment=environment, start=False
    )
    process.key = INBOUND_KEY
    process.start()
    upstream.default = error_answer(400, f"what is {PROVIDER_KEY} and {INBOUND_KEY}?")
    assert process.chat().status == 400
    assert process.chat(headers={"Authorization": f"Bearer {INBOUND_KEY[::-1]}"}).status == 400
    delivered(process, "all", 2)
    delivered(process, "a", 1)
    assert [attributes(s)["trace.metadata.openrouter.api_key_name"] for s in generations(private)] == ["team a", "team b"]
    assert [attributes(s)["trace.metadata.openrouter.api_key_name"] for s in generations(receiver)] == ["team a"]
    assert counts(process)["a"]["skipped"] == {"api_key": 1}
    assert receiver.received[0].headers["authorization"] == "Bearer dest-TOKEN-0123456789"
    shown = process.get("/api/v1/observability/destinations").body + json.dumps(process.stats()).encode()
    command_line = Path(f"/proc/{process.pid}/cmdline").read_bytes()
    for place in (shown, command_line, process.output().encode(), *(r.text for r in receiver.received + private.received)):
        for key in (PROVIDER_KEY, INBOUND_KEY, "dest-TOKEN-0123456789"):
            assert key.encode() not in place


# -- ends, crashes and new beginnings


def test_sigterm_while_a_destination_hangs_loses_nothing(
    broadcaster: RouterFactory, upstream: FakeUpstream, receiver: FakeCollector
) -> None:
    with FakeCollector(Reply(hang=True)) as hanging:
        destinations = destination("open", receiver) + destination("hanging", hanging)
        process = broadcaster(destinations=destinations)
        go_on = threading.Event()
        upstream.default = hold(go_on) + json_answer(chat_completion())
        told: list[str] = []
        asking = [threading.Thread(target=lambda: told.append(process.chat().headers["x-generation-id"])) for _ in range(5)]
        for thread in asking:
            thread.start()
        upstream.wait_for(5)
        process.signal(signal.SIGTERM)
        go_on.set()
        for thread in asking:
            thread.join()
        begun = time.monotonic()
        assert process.exit_code() == 0
        assert time.monotonic() - begun < 6
        assert sorted(ids(receiver)) == sorted(told)
        hanging.script(OK)
        process.start()
        delivered(process, "hanging", 5)
        assert set(ids(hanging)) == set(told)
        assert counts(process)["open"]["delivered"] == 5


def test_kill_9_of_the_router_loses_no_record_that_it_had_time_to_write(
    broadcaster: RouterFactory, receiver: FakeCollector
) -> None:
    with FakeCollector(Reply(wait=0.05), Reply(503, headers={"Retry-After": "1"}), Reply(wait=0.02)) as slow:
        process = broadcaster(destinations=destination("quick", receiver) + destination("slow", slow))
        safe: list[str] = []
        total = 0
        for _ in range(6):
            ended: list[tuple[str, float]] = []
            stopping = threading.Event()

            def ask(ended: list[tuple[str, float]] = ended, stopping: threading.Event = stopping) -> None:
                while not stopping.is_set():
                    try:
                        answer = process.chat()
                    except (OSError, HTTPException):
                        return
                    ended.append((answer.headers["x-generation-id"], time.monotonic()))
                    time.sleep(0.005)

            clients = [threading.Thread(target=ask) for _ in range(3)]
            for client in clients:
                client.start()
            until(lambda ended=ended: len(ended) > 20)
            time.sleep(random.uniform(0.5, 0.7))
            killed = time.monotonic()
            process.kill()
            stopping.set()
            for client in clients:
                client.join()
            safe += [generation for generation, at in ended if at < killed - PROMISED]
            total += len(ended)
            process.start()
        slow.script(OK)
        assert len(safe) > 100
        for name, at in (("quick", receiver), ("slow", slow)):
            until(lambda name=name: counts(process)[name]["queued"] == 0, 20, f"{name} has got everything")
            assert not set(safe) - set(ids(at))
            assert counts(process)[name]["delivered"] == counts(process)[name]["accepted"] == len(set(ids(at)))


def test_what_the_page_makes_is_there_after_a_restart_and_only_we_can_read_it(
    broadcaster: RouterFactory, receiver: FakeCollector
) -> None:
    process = broadcaster(destinations="", broadcast="")
    config = {"endpoint": receiver.url, "headers": {"Authorization": "Bearer dest-TOKEN-0123456789"}}
    made = process.post("/api/v1/observability/destinations", {"name": "mine", "type": "otel-collector", "config": config})
    assert made.status == 201
    assert b"dest-TOKEN" not in made.body
    process.kill()
    process.start()
    process.chat()
    delivered(process, "mine", 1)
    state = process.folder / "state"
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in state.iterdir()} == {0o600}
    assert {request.headers["authorization"] for request in receiver.received} == {"Bearer dest-TOKEN-0123456789"}


def test_a_signal_brings_new_destinations_and_a_file_that_cannot_be_used_changes_nothing(
    broadcaster: RouterFactory, receiver: FakeCollector, private: FakeCollector
) -> None:
    process = broadcaster(destinations=destination("old", receiver))
    process.chat()
    delivered(process, "old", 1)
    process.write_config(destinations=destination("old", receiver) + destination("new", private))
    process.signal(signal.SIGHUP)
    until(lambda: set(counts(process)) == {"old", "new"})
    process.chat()
    delivered(process, "new", 1)
    process.write_config(template=ROUTER.replace("state/broadcast.db", "elsewhere.db"), destinations="")
    process.signal(signal.SIGHUP)
    until(lambda: "can only be changed by a restart" in process.errors())
    process.chat()
    for name, n in (("old", 3), ("new", 2)):
        delivered(process, name, n)
    process.write_config(template=CONFIG)
    process.signal(signal.SIGHUP)
    until(lambda: counts(process) == {})
    assert process.chat().status == 200


def test_a_database_that_cannot_be_used_is_told_at_the_start(broadcaster: RouterFactory, receiver: FakeCollector) -> None:
    process = broadcaster(destinations=destination("a", receiver), start=False)
    (process.folder / "state").mkdir()
    (process.folder / "state" / "broadcast.db").write_bytes(b"no database" * 100)
    process.port = 1
    process.write_config(server="")
    process.port = 0
    process.write_config()
    process.launch()
    assert process.exit_code() == 2
    assert re.fullmatch(r"config\.toml\.broadcast\.database: .*broadcast\.db cannot be used \(.*\).*\n", process.errors())


def test_what_the_settings_api_made_goes_on_after_a_restart_without_a_section(
    router: RouterFactory, receiver: FakeCollector
) -> None:
    process = router(CONFIG)
    assert process.stats()["broadcast"] == {"enabled": False, "destinations": {}}
    assert not (process.folder / "state").exists()
    body = {"type": "otel-collector", "name": "mine", "config": {"endpoint": receiver.url}}
    assert process.post("/api/v1/observability/destinations", body).status == 201
    switch = process.request("PUT", "/api/v1/observability", {"enabled": True})
    assert (switch.status, switch.json()) == (200, {"enabled": True})
    process.stop()
    process.start()
    process.chat()
    delivered(process, "mine", 1)


# -- off


def test_switched_off_nothing_of_it_is_there(broadcaster: RouterFactory, receiver: FakeCollector) -> None:
    off = ROUTER.replace("enabled = true\ndatabase", "enabled = false\ndatabase")
    process = broadcaster(off, destinations=destination("a", receiver))
    process.chat()
    assert not (process.folder / "state").exists()
    assert process.stats()["broadcast"]["enabled"] is False
    assert receiver.connections == 0


# -- the door of the settings


@pytest.mark.parametrize(
    ("method", "path", "headers", "status"),
    [
        ("PUT", "", {"Content-Type": "text/plain"}, 415),
        ("POST", "/destinations", {"Content-Type": "application/x-www-form-urlencoded"}, 415),
        ("POST", "/destinations/test", {"Content-Type": ""}, 415),
        ("PUT", "", {"Origin": "http://evil.example"}, 403),
        ("PUT", "", {"Origin": "null"}, 403),
        ("GET", "/destinations", {"Host": "evil.example"}, 403),
        ("GET", "/destinations", {"Host": "evil.example:8090"}, 403),
        ("GET", "/destinations", {"Host": "localhost:8090"}, 200),
        ("PATCH", "/destinations", {}, 405),
        ("GET", "/nothing", {}, 404),
    ],
)
def test_the_settings_are_for_our_own_pages_and_in_json_only(
    broadcaster: RouterFactory, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    process = broadcaster()
    body = b'{"enabled": false}' if method in ("PUT", "POST", "PATCH") else None
    answer = process.request(method, f"/api/v1/observability{path}", body, {"Content-Type": "application/json", **headers})
    assert answer.status == status, answer
    assert process.get("/api/v1/observability").json() == {"enabled": True}
    if status >= 400:
        assert answer.error["message"]


def test_head_is_answered_like_get_without_a_body(broadcaster: RouterFactory) -> None:
    process = broadcaster()
    for path in ("", "/destinations"):
        answer = process.request("HEAD", f"/api/v1/observability{path}")
        assert (answer.status, answer.body) == (200, b"")


def test_the_settings_want_the_key(broadcaster: RouterFactory) -> None:
    process = broadcaster(destinations="", server='api_key_env = "INBOUND"', environment={"INBOUND": INBOUND_KEY}, start=False)
    process.key = INBOUND_KEY
    process.start()
    assert process.get("/api/v1/observability").status == 200
    assert process.get("/api/v1/observability", {"Authorization": "Bearer no"}).status == 401
    assert process.get("/api/v1/stats", {"Authorization": "Bearer no"}).status == 401


# -- the commands


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    def call(*words: str, config: str) -> subprocess.CompletedProcess[str]:
        place = tmp_path / "config.toml"
        place.write_text(config.replace("{tmp}", str(tmp_path)), "utf-8")
        told = [sys.executable, str(ROOT / "router.py"), *words]
        environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        done = subprocess.run(told, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=environment, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        return done

    return call


ECHO = '[[providers]]\nname = "echo"\nformat = "echo"\n[[routers]]\ntype = "fallback"\n'


def test_replay_brings_an_air_gapped_sites_file_to_a_destination(
    broadcaster: RouterFactory, command: Callable[..., subprocess.CompletedProcess[str]], receiver: FakeCollector, tmp_path: Path
) -> None:
    archive = f'[[broadcast.destinations]]\nname = "archive"\ntype = "file"\npath = "{tmp_path}/traces.jsonl"\n'
    process = broadcaster(destinations=archive)
    told = [process.chat().headers["x-generation-id"] for _ in range(5)]
    delivered(process, "archive", 5)
    process.stop()
    assert stat.S_IMODE((tmp_path / "traces.jsonl").stat().st_mode) == 0o600
    config = ECHO + "[broadcast]\n" + destination("later", receiver, enabled=False)
    done = command("replay", str(tmp_path / "traces.jsonl"), "--to", "later", config=config)
    assert done.returncode == 0, done
    assert re.fullmatch(r"(\d) lines, \1 delivered\n", done.stdout)
    assert ids(receiver) == told
    missing = command("replay", str(tmp_path / "traces.jsonl"), "--to", "nobody", config=config)
    assert (missing.returncode, missing.stderr) == (2, "--to: there is no destination 'nobody'\n")
    receiver.script(Reply(400))
    refused = command("replay", str(tmp_path / "traces.jsonl"), "--to", "later", config=config)
    assert refused.returncode == 1
    assert "http_400" in refused.stdout


def test_doctor_tells_of_a_database_that_cannot_be_used_and_of_the_switch(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    (tmp_path / "b.db").write_bytes(b"no database" * 100)
    done = command("doctor", config=ECHO + '[broadcast]\nenabled = true\ndatabase = "{tmp}/b.db"\n')
    assert done.returncode == 1
    assert re.search(r"FAIL broadcast +database: .*b\.db cannot be used \(file is not a database\)", done.stdout)
    (tmp_path / "b.db").unlink()
    off = command("doctor", config=ECHO + "[broadcast]\nenabled = false\n")
    assert off.returncode == 0


def test_a_destination_may_only_name_keys_that_there_are(
    command: Callable[..., subprocess.CompletedProcess[str]], receiver: FakeCollector
) -> None:
    keys = '[[api_keys]]\nname = "team"\nkey_env = "PATH"\n'
    done = command("check", config=ECHO + keys + "[broadcast]\n" + destination("a", receiver, api_keys=["taem"]))
    assert done.returncode == 2
    assert done.stderr == (
        "config.toml.broadcast.destinations[0].api_keys: no [[api_keys]] is named 'taem', did you mean team?\n"
    )


def test_doctor_tells_each_destinations_cause_and_cure(
    command: Callable[..., subprocess.CompletedProcess[str]], receiver: FakeCollector
) -> None:
    with FakeCollector(Reply(200, {"Content-Type": "text/html"}, b"<html>dest-TOKEN</html>")) as page:
        destinations = destination("well", receiver) + destination("astray", page)
        done = command("doctor", config=ECHO + '[broadcast]\nenabled = true\ndatabase = "{tmp}/b.db"\n' + destinations)
    assert done.returncode == 1
    well, astray = (next(line for line in done.stdout.splitlines() if name in line) for name in ("well", "astray"))
    assert well.startswith("ok ")
    assert astray.startswith("FAIL ")
    assert "That is a web page, not the gateway" in astray
    assert "dest-TOKEN" not in done.stdout + done.stderr
