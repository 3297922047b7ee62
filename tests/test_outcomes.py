"""Whatever happens to a request: one record, one count, the right outcome, and nothing left behind.

Each case is a script for the upstream and what its one record must say. Every case is run once to warm up and then
several times over, whole and streamed, and counted: lines, counters, threads, files, sockets.
"""

from __future__ import annotations

import contextlib
import json
import re
import socket
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from conftest import RouterFactory
from fake_upstream import (
    FakeUpstream,
    Script,
    answer,
    chat_completion,
    chunks,
    end,
    error_answer,
    fin,
    head,
    hold,
    json_answer,
    openai_chunks,
    pause,
    raw,
    reset,
    silence,
    stream,
    stream_head,
)
from router_process import PROVIDER, PROVIDER_KEY, SECRET_PROMPT, RouterProcess, chat_body, until

LIMITS = 'read_timeout = 0.6\nidle_timeout = 0.6\napi_key_env = "KEY"'
BEGUN = openai_chunks("one two", finish=None, done=False)
HALF = stream_head() + chunks(BEGUN) + pause(0.1)


@dataclass
class Case:
    """`sent` is what the client sees: a status, or 200 with an error event where the stream had begun."""

    script: Script
    outcome: str
    sent: int
    stream: bool = False
    error_type: str | None = None
    content: str | None = None
    attempt_status: int | None = 200
    usage_source: str | None = None
    more: dict[str, Any] = field(default_factory=dict)


USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 4,
    "prompt_tokens_details": {"cached_tokens": 5},
    "completion_tokens_details": {"reasoning_tokens": 1},
}
CASES = {
    "ok": Case(json_answer(chat_completion("fine", USAGE)), "ok", 200, content="fine", usage_source="reported"),
    "ok streamed": Case(stream(openai_chunks("so fine", USAGE)), "ok", 200, True, content="so fine", usage_source="reported"),
    "ok, no usage": Case(stream(openai_chunks("so fine")), "ok", 200, True, content="so fine", usage_source="estimated"),
    "ok, finish but no DONE": Case(stream(openai_chunks("fine", done=False)), "ok", 200, True, content="fine"),
    "ok, close-delimited": Case(stream(openai_chunks("fine"), framing="close"), "ok", 200, True, content="fine"),
    "400": Case(error_answer(400, "too hot"), "error", 400, attempt_status=400),
    "400 to a stream": Case(error_answer(400, "too hot"), "error", 400, True, attempt_status=400),
    "404": Case(error_answer(404), "error", 404, attempt_status=404),
    "401": Case(error_answer(401), "error", 502, error_type="provider_auth_error", attempt_status=401),
    "403": Case(error_answer(403), "error", 502, error_type="provider_auth_error", attempt_status=403),
    "429": Case(error_answer(429), "error", 429, attempt_status=429),
    "500": Case(error_answer(500), "error", 502, attempt_status=500),
    "500 to a stream": Case(error_answer(500), "error", 502, True, attempt_status=500),
    "503 in html": Case(answer(b"<html>busy</html>", 503, {"Content-Type": "text/html"}), "error", 502, attempt_status=503),
    "a redirect": Case(
        answer(b"", 307, {"Location": "http://127.0.0.1:9/"}),
        "error",
        502,
        error_type="unexpected_redirect",
        attempt_status=307,
    ),
    "reset at once": Case(reset(), "error", 502, attempt_status=None),
    "closed at once": Case(fin(), "error", 502, attempt_status=None),
    "reset in the head": Case(raw(b"HTTP/1.1 200 OK\r\nContent-Ty") + reset(), "error", 502, attempt_status=None),
    "not http": Case(raw(b"SSH-2.0-OpenSSH_9.2\r\n") + fin(), "error", 502, attempt_status=None),
    "cut body": Case(
        raw(head(200, {"Content-Type": "application/json", "Content-Length": "500"}) + b'{"id": "x"') + fin(),
        "error",
        502,
    ),
    "html": Case(answer(b"<html>log in</html>", 200, {"Content-Type": "text/html"}), "error", 502),
    "empty": Case(answer(b"", 200), "error", 502),
    "half a json": Case(answer(b'{"id": "x", "choices": [', 200), "error", 502),
    "a json list": Case(answer(b"[1]", 200), "error", 502),
    "an error in a 200": Case(json_answer({"error": {"message": "no"}}), "error", 502),
    "stream: html": Case(answer(b"<html>log in</html>", 200, {"Content-Type": "text/html"}), "error", 502, True),
    "stream: empty": Case(stream([]), "error", 502, True),
    "stream: only DONE": Case(stream([b"data: [DONE]\n\n"]), "error", 502, True),
    "stream: garbage first": Case(stream([b"data: {nonsense\n\n"]), "error", 502, True),
    "stream: cut before the first event": Case(stream_head() + fin(), "error", 502, True),
    "stream: reset before the first event": Case(stream_head() + reset(), "error", 502, True),
    "stream: error first": Case(stream([b'data: {"error": {"message": "no", "type": "server_error"}}\n\n']), "error", 502, True),
    "silence": Case(silence(), "timeout", 504, attempt_status=None),
    "silence to a stream": Case(silence(), "timeout", 504, True, attempt_status=None),
    "silence after the head": Case(stream_head() + silence(), "timeout", 504, True),
    "silence in the body": Case(
        raw(head(200, {"Content-Type": "application/json", "Content-Length": "500"}) + b'{"id"') + silence(),
        "timeout",
        504,
    ),
    "stall": Case(HALF + silence(), "timeout", 200, True, error_type="stream_idle_timeout", content="one two"),
    "reset in the middle": Case(HALF + reset(), "error", 200, True, content="one two"),
    "cut in the middle": Case(HALF + fin(), "error", 200, True, content="one two"),
    "ended in the middle": Case(HALF + end(), "error", 200, True, content="one two"),
    "cut in the middle, close-delimited": Case(
        stream_head("close") + raw(b"".join(BEGUN)) + pause(0.1) + fin(), "error", 200, True, content="one two"
    ),
    "bad chunk size in the middle": Case(HALF + raw(b"zz\r\n") + pause(0.1) + fin(), "error", 200, True, content="one two"),
    "error event in the middle": Case(
        HALF + chunks([b'data: {"error": {"message": "no", "type": "x"}}\n\n']) + end(),
        "error",
        200,
        True,
        content="one two",
    ),
}


def run(process: RouterProcess, case: Case) -> tuple[int, bytes]:
    with process.stream(SECRET_PROMPT) if case.stream else _Whole(process) as reply:
        return reply.status, reply.read()


class _Whole:
    """A whole chat with a stream's manners."""

    def __init__(self, process: RouterProcess) -> None:
        answer = process.chat(SECRET_PROMPT)
        self.status = answer.status
        self._body = answer.body

    def read(self) -> bytes:
        return self._body

    def __enter__(self) -> _Whole:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@pytest.mark.parametrize("name", CASES)
def test_one_request_one_outcome(router: RouterFactory, upstream: FakeUpstream, name: str) -> None:
    case = CASES[name]
    process = router(provider=LIMITS, environment={"KEY": PROVIDER_KEY})
    upstream.default = case.script
    run(process, case)
    before = process.resources()
    for _ in range(2):
        status, body = run(process, case)
        assert status == case.sent
        check_body(case, status, body)
    for record in process.settled(3):
        check_record(case, record)
    assert len(upstream.posts) == 3, "nothing was sent twice"
    process.comes_back_to(before)


def check_body(case: Case, status: int, body: bytes) -> None:
    assert b"Traceback" not in body
    assert PROVIDER_KEY.encode() not in body
    if status != 200:
        error = json.loads(body)["error"]
        assert {"message", "type", "param", "code"} <= error.keys()
        if case.attempt_status != 200:  # the words of an error in a 200 are theirs, the status is ours
            expected = None if case.attempt_status == status else "router"
            assert error.get("src") == expected, "ours can be told from theirs"
        assert status < 500 or error["type"] != "invalid_request_error"
        assert case.error_type in (None, error["type"], error["code"])
    elif case.outcome == "ok":
        assert b"error" not in body
    else:
        assert body.startswith(b"".join(BEGUN))
        rest = body.removeprefix(b"".join(BEGUN))
        event = re.fullmatch(rb"data: (.*)\n\n", rest)
        assert event, f"exactly one error event, no [DONE]: {rest!r}"
        assert "message" in json.loads(event[1])["error"]


def check_record(case: Case, record: dict[str, Any]) -> None:
    assert record["type"] == "complete"
    assert (record["outcome"], record["status"]) == (case.outcome, case.sent)
    assert record["stream"] is case.stream
    assert re.fullmatch(r"gen-\d+-[A-Za-z0-9]{20}", record["generation_id"])
    assert record["messages"] == [{"role": "user", "content": [{"type": "text", "text": SECRET_PROMPT}]}]
    assert record["duration_ms"] > 0
    assert record["trace_id"] is None
    (attempt,) = record["attempts"]
    assert (attempt["provider"], attempt["attempt"], attempt["status"]) == ("up", 1, case.attempt_status)
    if case.outcome == "ok":
        assert record["error"] is record["error_type"] is attempt["error"] is None
    else:
        assert record["error"]
        assert record["error_type"]
        assert attempt["error"]
        assert case.error_type in (None, record["error_type"])
    check_response(case, record)


def check_response(case: Case, record: dict[str, Any]) -> None:
    response = record["response"]
    if case.content is None:
        assert not response or response["content"] == ""
        return
    assert response["content"] == case.content
    assert response["stop_reason"] == ("end_turn" if case.outcome == "ok" else "other")
    if case.usage_source:
        assert record["usage_source"] == case.usage_source
    if case.usage_source == "reported":
        counts = {"input_tokens": 9, "output_tokens": 4, "cached_input_tokens": 5, "reasoning_tokens": 1}
        assert response["usage"] == {**counts, "cache_write_input_tokens": 0}
    if case.stream:
        assert record["ttft_ms"] is not None
        assert 0 <= record["ttft_ms"] <= record["duration_ms"]


def fields(names: str) -> set[str]:
    return set(names.split())


def test_every_record_has_every_field(router: RouterFactory) -> None:
    process = router(environment={"KEY": PROVIDER_KEY}, provider=LIMITS)
    process.chat("hi", temperature=0.5, user="u-1", session_id="s-1", trace={"env": "test"}, tools=[TOOL], stop=["x"])
    record = process.record()
    assert record.keys() >= fields(
        "type id ts_ms generation_id trace_id client_format operation method route client_address "
        "api_key_name provider provider_format vendor server_address server_port requested_model "
        "sent_model stream outcome status error error_type duration_ms ttft_ms overhead_ms rule "
        "reason tags plugins skipped_plugins dropped system messages tools request response "
        "usage_source cost attempts user session_id trace traceparent tracestate "
    )
    assert record["attempts"][0].keys() >= fields(
        "provider model format vendor server_address server_port kind attempt status error "
        "error_type start_ms duration_ms headers_ms first_token_ms request_id span_id timings "
    )
    assert record["response"].keys() >= fields(
        "id model content reasoning stop_reason finish_reason native_finish_reason tool_calls usage tags "
    )
    assert (record["client_format"], record["operation"], record["route"]) == ("openai", "chat", "/v1/chat/completions")
    assert (record["requested_model"], record["sent_model"]) == ("fake-model", "fake-model")
    assert (record["provider"], record["provider_format"], record["server_address"]) == ("up", "openai", "127.0.0.1")
    assert (record["user"], record["session_id"], record["trace"]) == ("u-1", "s-1", {"env": "test"})
    assert record["tools"] == [{"name": "weather", "description": "d", "parameters": {"type": "object"}}]
    assert record["request"] == {"model": "fake-model", "temperature": 0.5, "user": "u-1", "stop": ["x"]}
    assert (record["response"]["id"], record["response"]["model"]) == ("chatcmpl-fake", "fake-model-0613")
    assert abs(record["ts_ms"] / 1000 - time.time()) < 60
    assert record["rule"] == "0:fallback"
    assert record["attempts"][0]["kind"] == "openai_chat"


TOOL = {"type": "function", "function": {"name": "weather", "description": "d", "parameters": {"type": "object"}}}


def test_the_generation_id_is_the_one_the_client_got(router: RouterFactory) -> None:
    process = router()
    whole = process.chat().headers["x-generation-id"]
    with process.stream() as streamed:
        streamed.read()
    assert [record["generation_id"] for record in process.settled(2)] == [whole, streamed.headers["x-generation-id"]]


def test_ids_count_the_requests_of_the_process(router: RouterFactory) -> None:
    process = router()
    for _ in range(3):
        process.chat()
    ids = [record["id"] for record in process.settled(3)]
    assert ids == [ids[0], ids[0] + 1, ids[0] + 2]


def test_the_body_wins_over_the_session_header(router: RouterFactory) -> None:
    process = router()
    process.chat(headers={"X-Session-Id": "from-header"})
    process.chat(headers={"X-Session-Id": "from-header"}, session_id="from-body")
    assert [record["session_id"] for record in process.settled(2)] == ["from-header", "from-body"]


def test_system_prompts_and_tool_turns_are_recorded_as_blocks(router: RouterFactory) -> None:
    process = router()
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": [{"type": "text", "text": "be kind"}]},
        {"role": "user", "content": [{"type": "text", "text": "look"}, IMAGE]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    process.post("/v1/chat/completions", {"model": "fake-model", "messages": messages})
    record = process.record()
    assert record["system"] == "be brief\n\nbe kind"
    user, assistant, tool = record["messages"]
    assert user["content"] == [
        {"type": "text", "text": "look"},
        {"type": "image", "media_type": "image/png", "data": "aGk="},
    ]
    tool_use = {"type": "tool_use", "id": "call_1", "name": "weather", "input": {"city": "Paris"}}
    assert assistant == {"role": "assistant", "content": [tool_use]}
    (result,) = tool["content"]
    assert (result["type"], result["tool_use_id"]) == ("tool_result", "call_1")
    assert "rain" in json.dumps(result["content"])


IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}


def test_tool_calls_of_a_stream_are_recorded_whole(router: RouterFactory, upstream: FakeUpstream) -> None:
    deltas: list[dict[str, Any]] = []
    for index, (name, parts) in enumerate({"weather": ['{"a"', ": 1}"], "time": ["{}"]}.items()):
        deltas.append({"index": index, "id": f"c{index}", "type": "function", "function": {"name": name, "arguments": ""}})
        deltas += [{"index": index, "function": {"arguments": part}} for part in parts]
    blocks = [b"data: %s\n\n" % json.dumps(_delta({"tool_calls": [delta]})).encode() for delta in deltas]
    upstream.script(stream([*blocks, b"data: %s\n\n" % json.dumps(_delta({}, "tool_calls")).encode(), b"data: [DONE]\n\n"]))
    process = router()
    with process.stream() as reply:
        reply.read()
    response = process.record()["response"]
    assert response["tool_calls"] == [
        {"id": "c0", "name": "weather", "arguments": '{"a": 1}'},
        {"id": "c1", "name": "time", "arguments": "{}"},
    ]
    assert (response["stop_reason"], response["finish_reason"]) == ("tool_use", "tool_calls")


def _delta(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion.chunk", "model": "m", "created": 1, "choices": [choice]}


def test_reasoning_of_a_stream_is_recorded_beside_the_text(router: RouterFactory, upstream: FakeUpstream) -> None:
    deltas = [{"reasoning_content": "let me "}, {"reasoning_content": "think"}, {"content": "42"}]
    blocks = [b"data: %s\n\n" % json.dumps(_delta(delta)).encode() for delta in deltas]
    upstream.script(stream([*blocks, b"data: %s\n\n" % json.dumps(_delta({}, "length")).encode(), b"data: [DONE]\n\n"]))
    process = router()
    with process.stream() as reply:
        assert b"".join(blocks) in reply.read()
    response = process.record()["response"]
    assert (response["reasoning"], response["content"]) == ("let me think", "42")
    assert response["stop_reason"] == "max_tokens"


# --- clients that leave


def dial_and_send(process: RouterProcess, **more: Any) -> socket.socket:
    body = json.dumps(chat_body(SECRET_PROMPT, **more)).encode()
    sock = process.dial()
    sock.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
    return sock


def leave(sock: socket.socket, how: str) -> None:
    if how == "reset":
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("streamed", [False, True])
def test_a_client_gone_before_the_first_byte(router: RouterFactory, upstream: FakeUpstream, streamed: bool, how: str) -> None:
    process = router()
    process.chat()
    before = process.resources()
    upstream.default = silence()
    for number in range(1, 4):
        sock = dial_and_send(process, stream=streamed)
        request = upstream.wait_for(number + 1)[number]
        left = time.monotonic()
        leave(sock, how)
        assert request.closed_within(3)
        assert request.closed_at is not None
        assert request.closed_at - left < 1.0
    for record in process.settled(4)[1:]:
        assert (record["outcome"], record["error_type"]) == ("cancelled", "client_disconnected")
        assert record["usage_source"] in ("none", "estimated")
        assert len(record["attempts"]) == 1
    process.comes_back_to(before)


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("flowing", [False, True])
def test_a_client_gone_during_the_answer(router: RouterFactory, upstream: FakeUpstream, flowing: bool, how: str) -> None:
    process = router()
    process.chat()
    before = process.resources()
    rest = chunks([openai_chunks("x")[1]] * 2000, 0.02) if flowing else silence()
    upstream.default = stream_head() + chunks(BEGUN) + rest
    for number in range(1, 4):
        sock = dial_and_send(process, stream=True)
        data = b""
        while b" two" not in data:
            data += sock.recv(65536)
        left = time.monotonic()
        leave(sock, how)
        request = upstream.posts[number]
        assert request.closed_within(3)
        assert request.closed_at is not None
        assert request.closed_at - left < 1.0
    for record in process.settled(4)[1:]:
        assert (record["outcome"], record["error_type"]) == ("cancelled", "client_disconnected")
        assert record["response"]["content"].startswith("one two")
        assert record["response"]["stop_reason"] == "other"
        assert record["usage_source"] == "estimated"
        assert record["response"]["usage"]["output_tokens"] > 0
        assert record["status"] == 200
    process.comes_back_to(before)


def test_a_count_from_the_start_of_an_answer_is_not_taken_for_all_of_it(router: RouterFactory, upstream: FakeUpstream) -> None:
    begun = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [], "stop_reason": None,
             "usage": {"input_tokens": 9, "output_tokens": 1}}  # fmt: skip
    events = [
        {"type": "message_start", "message": begun},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x" * 1600}},
    ]
    pieces = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode() for event in events]
    process = router(providers=PROVIDER.replace('"openai"', '"anthropic"'))
    upstream.default = stream_head() + chunks(pieces) + pause(0.1) + fin()
    with process.stream(SECRET_PROMPT) as reply:
        reply.read()
    record = process.record()
    assert (record["outcome"], record["usage_source"]) == ("error", "estimated")
    assert (record["response"]["usage"]["input_tokens"], record["response"]["usage"]["output_tokens"]) == (9, 400)


def test_many_clients_gone_leave_nothing_behind(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="threads = 32")
    process.chat()
    before = process.resources()
    upstream.default = HALF + silence()
    for _ in range(8):
        socks = [dial_and_send(process, stream=True) for _ in range(20)]
        for sock in socks:
            assert sock.recv(12)
            sock.close()
        until(lambda: process.stats()["in_flight"] == 0)
    assert {record["outcome"] for record in process.settled(161)[1:]} == {"cancelled"}
    process.comes_back_to(before)
    upstream.default = json_answer(chat_completion())
    assert process.chat().status == 200


def test_a_client_that_half_closes_ends_in_one_record_and_a_whole_answer_or_none(
    router: RouterFactory, upstream: FakeUpstream
) -> None:
    """Half-closed or gone, nobody can tell; either reading is fine, half an answer that looks whole is not."""
    process = router()
    go_on = threading.Event()
    upstream.script(stream_head() + chunks(BEGUN) + hold(go_on) + chunks(openai_chunks("more")) + end())
    with dial_and_send(process, stream=True) as sock:
        upstream.wait_for(1)
        sock.shutdown(socket.SHUT_WR)
        data = b""
        with contextlib.suppress(TimeoutError):
            sock.settimeout(1.5)
            while piece := sock.recv(65536):
                data += piece
        go_on.set()
        with contextlib.suppress(ConnectionResetError):
            sock.settimeout(5)
            while piece := sock.recv(65536):
                data += piece
    record = process.record()
    assert record["outcome"] in ("ok", "cancelled")
    assert (b"[DONE]" in data) == (record["outcome"] == "ok")


# --- refused and rejected


def test_an_overloaded_router_says_so_and_records_it(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="threads = 8\nmax_in_flight = 2")
    go_on = threading.Event()
    upstream.script(*[hold(go_on) + json_answer(chat_completion())] * 2)
    with ThreadPoolExecutor() as pool:
        slow = [pool.submit(process.chat) for _ in range(2)]
        upstream.wait_for(2)
        answer = process.chat(SECRET_PROMPT)
        assert answer.status == 503
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.error["code"] == "overloaded" or answer.error["type"] == "overloaded"
        assert process.get("/health").status == 200
        go_on.set()
        assert [future.result().status for future in slow] == [200, 200]
    records = process.settled(3)
    rejected = [record for record in records if record["outcome"] == "rejected"]
    assert len(rejected) == 1
    assert (rejected[0]["status"], rejected[0]["error_type"], rejected[0]["attempts"]) == (503, "overloaded", [])
    assert rejected[0]["requested_model"] == "fake-model"


def test_a_request_no_rule_wants_is_recorded_as_rejected(router: RouterFactory) -> None:
    process = router(rules='[[routers]]\ntype = "prefix"\nmodel_prefix = "known/"\nprovider = "up"\n')
    assert process.chat().status == 404
    record = process.record()
    assert (record["outcome"], record["status"], record["error_type"]) == ("rejected", 404, "model_not_found")
    assert record["attempts"] == []
    assert record["provider"] is None


def test_what_is_not_well_formed_is_counted_and_leaves_no_record(router: RouterFactory) -> None:
    process = router()
    refused = [b"{", b"[]", b"", b"\xff", b'{"model": "fake-model"}']
    for body in refused:
        assert process.post("/v1/chat/completions", body).status == 400
    assert process.settled(0) == []
    assert sum(process.stats()["refused"].values()) == len(refused)


# --- more than one attempt

TWO = """
[[providers]]
name = "up"
format = "openai"
base_url = "{upstream}/v1"
quality = 2.0
read_timeout = 0.6
idle_timeout = 0.6

[[providers]]
name = "second"
format = "openai"
base_url = "{upstream}/second"
quality = 1.0
"""
CONFIG_TWO = """
[server]
port = {port}
[logging]
enabled = true
path = "{log}"
[retry]
attempts = 3
{providers}
{rules}
"""


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    "name",
    ["500", "429", "503 in html", "reset at once", "html", "empty", "silence", "stream: cut before the first event"],
)
def test_a_failure_before_the_first_byte_goes_to_the_next_provider(
    router: RouterFactory, upstream: FakeUpstream, name: str, streamed: bool
) -> None:
    process = router(CONFIG_TWO, providers=TWO)
    good = stream(openai_chunks("fine")) if streamed else json_answer(chat_completion("fine"))
    upstream.script(CASES[name].script, good)
    if streamed:
        with process.stream() as reply:
            status, body, provider = reply.status, reply.read(), reply.headers["x-router-provider"]
        assert body == b"".join(openai_chunks("fine"))
    else:
        answered = process.chat()
        status, provider = answered.status, answered.headers["x-router-provider"]
    assert (status, provider) == (200, "second")
    assert [request.path for request in upstream.posts] == ["/v1/chat/completions", "/second/chat/completions"]
    record = process.record()
    assert (record["outcome"], record["provider"]) == ("ok", "second")
    first, second = record["attempts"]
    assert (first["provider"], first["attempt"], bool(first["error"])) == ("up", 1, True)
    assert (second["provider"], second["attempt"], second["error"]) == ("second", 2, None)
    assert second["start_ms"] >= first["start_ms"] + first["duration_ms"] - 1


@pytest.mark.parametrize("name", ["400", "404", "401", "a redirect"])
def test_a_refusal_is_not_asked_again(router: RouterFactory, upstream: FakeUpstream, name: str) -> None:
    process = router(CONFIG_TWO, providers=TWO)
    upstream.default = CASES[name].script
    expected = 1 if name in ("400", "404") else None
    status = process.chat().status
    assert status == CASES[name].sent
    record = process.record()
    assert len(record["attempts"]) == len(upstream.posts)
    if expected:
        assert len(upstream.posts) == expected


@pytest.mark.parametrize("name", ["stall", "reset in the middle", "ended in the middle"])
def test_nothing_is_retried_after_the_first_byte(router: RouterFactory, upstream: FakeUpstream, name: str) -> None:
    process = router(CONFIG_TWO, providers=TWO)
    upstream.script(CASES[name].script)
    with process.stream() as reply:
        check_body(CASES[name], reply.status, reply.read())
    assert len(upstream.posts) == 1
    assert process.record()["response"]["content"] == "one two"


def test_attempts_are_counted_out(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(CONFIG_TWO.replace("attempts = 3", "attempts = 2"), providers=TWO)
    upstream.default = error_answer(500)
    assert process.chat().status == 502
    assert len(upstream.posts) == 2
    assert len(process.record()["attempts"]) == 2


def test_the_only_provider_is_asked_again_after_a_retryable_status(router: RouterFactory, upstream: FakeUpstream) -> None:
    one = TWO.partition('[[providers]]\nname = "second"')[0]
    process = router(CONFIG_TWO, providers=one)
    upstream.script(error_answer(503), error_answer(429), json_answer(chat_completion()))
    assert process.chat().status == 200
    first, second, third = upstream.posts
    assert second.at - first.at > 0.1
    assert third.at - second.at > 0.2
    assert [attempt["status"] for attempt in process.record()["attempts"]] == [503, 429, 200]


@pytest.mark.parametrize("name", ["reset at once", "html", "silence", "cut body"])
def test_the_only_provider_is_not_asked_twice_if_it_may_have_accepted(
    router: RouterFactory, upstream: FakeUpstream, name: str
) -> None:
    one = TWO.partition('[[providers]]\nname = "second"')[0]
    process = router(CONFIG_TWO, providers=one)
    upstream.default = CASES[name].script
    assert process.chat().status == CASES[name].sent
    assert len(upstream.posts) == 1


def test_the_models_of_the_request_are_tried_when_the_rules_run_out(router: RouterFactory, upstream: FakeUpstream) -> None:
    rules = '[[routers]]\ntype = "prefix"\nmodel_prefix = "known/"\nprovider = "up"\n'
    process = router(rules=rules)
    answered = process.chat(models=["strange", "known/b"])
    assert answered.status == 200
    assert upstream.posts[0].json()["model"] == "known/b"
    assert answered.headers["x-router-rule"] == "models[1]"
    assert process.record()["rule"] == "models[1]"


# --- who is asked

THREE = """
[[providers]]
name = "dear"
format = "openai"
base_url = "{upstream}/dear"
quality = 0.9
cost_per_1m_tokens = 2.0
[[providers]]
name = "cheap"
format = "openai"
base_url = "{upstream}/cheap"
quality = 0.5
cost_per_1m_tokens = 0.1
[[providers]]
name = "twin"
format = "openai"
base_url = "{upstream}/twin"
quality = 0.5
cost_per_1m_tokens = 0.1
"""


@pytest.mark.parametrize(
    ("bias", "order"),
    [
        ("", ["cheap", "twin", "dear"]),
        ("quality_bias = 1.0", ["dear", "cheap", "twin"]),
        ("quality_bias = 0.0", ["cheap", "twin", "dear"]),
    ],
)
def test_fallback_asks_the_best_first_and_the_rest_in_order(
    router: RouterFactory, upstream: FakeUpstream, bias: str, order: list[str]
) -> None:
    process = router(CONFIG_TWO, providers=THREE, rules=f'[[routers]]\ntype = "fallback"\n{bias}\n')
    upstream.default = error_answer(503)
    assert process.chat().status == 502
    assert [attempt["provider"] for attempt in process.record()["attempts"]] == order


def test_fallback_is_limited_to_the_providers_it_names(router: RouterFactory, upstream: FakeUpstream) -> None:
    rules = '[[routers]]\ntype = "fallback"\nproviders = ["twin", "dear"]\n'
    process = router(CONFIG_TWO, providers=THREE, rules=rules)
    assert process.chat().headers["x-router-provider"] == "twin"
    assert upstream.posts[0].path == "/twin/chat/completions"


def test_random_draws_from_all_it_may(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(CONFIG_TWO, providers=THREE, rules='[[routers]]\ntype = "random"\n')
    drawn = {process.chat().headers["x-router-provider"] for _ in range(60)}
    assert drawn == {"dear", "cheap", "twin"}
    assert {record["rule"] for record in process.settled(60)} == {"0:random"}


def test_random_draws_from_pairs_of_provider_and_model(router: RouterFactory, upstream: FakeUpstream) -> None:
    pairs = '[{ provider = "dear", model = "m1" }, { provider = "dear", model = "m2" }, { provider = "twin", model = "m3" }]'
    process = router(CONFIG_TWO, providers=THREE, rules=f'[[routers]]\ntype = "random"\ncandidates = {pairs}\n')
    for _ in range(60):
        process.chat()
    asked = {(request.path.split("/")[1], request.json()["model"]) for request in upstream.posts}
    assert asked == {("dear", "m1"), ("dear", "m2"), ("twin", "m3")}


def test_the_first_rule_that_matches_wins(router: RouterFactory) -> None:
    rules = "".join(
        f'[[routers]]\ntype = "prefix"\nmodel_prefix = "{prefix}"\nprovider = "{name}"\n'
        for prefix, name in (("a", "dear"), ("ab", "cheap"), ("", "twin"))
    )
    process = router(CONFIG_TWO, providers=THREE, rules=rules)
    chosen = []
    for model in ("abc", "b"):
        answered = process.post("/v1/chat/completions", {**chat_body(), "model": model})
        chosen.append((answered.headers["x-router-provider"], answered.headers["x-router-rule"]))
    assert chosen == [("dear", "0:prefix"), ("twin", "2:prefix")]


def test_a_provider_that_keeps_failing_rests_and_one_probe_brings_it_back(router: RouterFactory, upstream: FakeUpstream) -> None:
    config = CONFIG_TWO.replace("attempts = 3", "attempts = 1\n[breaker]\nfailures = 3\ncooldown_seconds = 1")
    process = router(config)
    upstream.script(*[error_answer(500)] * 3)
    for _ in range(3):
        assert process.chat().status == 502
    assert process.stats()["providers"]["up"]["breaker"] == "open"
    resting = process.chat()
    assert resting.status == 503
    assert 1 <= int(resting.headers["retry-after"]) <= 2
    assert len(upstream.posts) == 3, "it was not asked"
    until(lambda: process.chat().status == 200, 5, "the probe reopens it")
    assert process.stats()["providers"]["up"]["breaker"] == "closed"
    assert len(upstream.posts) == 4


@pytest.mark.parametrize("status", [400, 404, 422])
def test_a_refusal_does_not_make_a_provider_rest(router: RouterFactory, upstream: FakeUpstream, status: int) -> None:
    config = CONFIG_TWO.replace("attempts = 3", "attempts = 1\n[breaker]\nfailures = 2\ncooldown_seconds = 60")
    process = router(config)
    upstream.script(*[error_answer(status)] * 5)
    for _ in range(5):
        process.chat()
    assert process.chat().status == 200
