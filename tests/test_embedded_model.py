"""Echo, the embedded model, asked through the front door: what the shipped configuration can do by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream, json_answer
from router_process import PROVIDER, RouterProcess, chat_body, until

ECHO = '[[providers]]\nname = "echo"\nformat = "echo"\nidle_timeout = 0.8\nread_timeout = 2\n'


@pytest.fixture
def process(router: RouterFactory) -> RouterProcess:
    return router(providers=ECHO)


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


def ask(client: openai.OpenAI, text: str, **more: Any) -> Any:
    return client.chat.completions.create(model="echo", messages=[{"role": "user", "content": text}], **more)


def test_it_answers_the_same_thing_every_time(client: openai.OpenAI, process: RouterProcess) -> None:
    first, second = ask(client, "one two three"), ask(client, "one two three")
    assert first.choices[0].message.content == second.choices[0].message.content
    assert "one two three" in first.choices[0].message.content
    assert first.choices[0].finish_reason == "stop"
    assert first.usage.completion_tokens == len(first.choices[0].message.content.split())
    assert first.usage.prompt_tokens == 3
    record = process.settled(2)[0]
    assert (record["provider"], record["provider_format"], record["sent_model"]) == ("echo", "echo", "echo")
    assert (record["usage_source"], record["attempts"][0]["kind"]) == ("reported", "echo_chat")


def test_a_whole_answer_has_every_field_of_the_schema(process: RouterProcess) -> None:
    answer = process.chat("hello there").json()
    assert answer["object"] == "chat.completion"
    assert isinstance(answer["id"], str)
    assert isinstance(answer["created"], int)
    assert answer["model"] == "echo"
    (choice,) = answer["choices"]
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "stop")
    assert (choice["message"]["role"], choice["message"]["refusal"]) == ("assistant", None)
    usage = answer["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_it_streams_word_by_word(client: openai.OpenAI, process: RouterProcess) -> None:
    whole = ask(client, "one two three").choices[0].message.content
    chunks = list(ask(client, "one two three", stream=True, stream_options={"include_usage": True}))
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices and chunk.choices[0].delta.content]
    assert "".join(pieces) == whole
    assert len(pieces) == len(whole.split())
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage.completion_tokens == len(pieces)
    assert len({chunk.id for chunk in chunks}) == 1
    assert process.settled(2)[1]["response"]["content"] == whole


def test_a_stream_has_usage_only_for_those_who_ask_and_ends_with_done(process: RouterProcess) -> None:
    with process.stream("one two") as reply:
        body = reply.read()
    assert body.endswith(b"data: [DONE]\n\n")
    assert b"usage" not in body
    for block in body.split(b"\n\n")[:-2]:
        chunk = json.loads(block.removeprefix(b"data: "))
        assert chunk["object"] == "chat.completion.chunk"
        assert {"id", "created", "model", "choices"} <= chunk.keys()
        assert {"index", "delta", "finish_reason"} <= chunk["choices"][0].keys()


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_it_obeys_token_limits(client: openai.OpenAI, name: str) -> None:
    answer = ask(client, "one two three four five", **{name: 2})
    assert len(answer.choices[0].message.content.split()) == 2
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2


def test_it_stops_where_it_is_told(client: openai.OpenAI) -> None:
    answer = ask(client, "one two three four", stop=["three"])
    assert "three" not in answer.choices[0].message.content
    assert "two" in answer.choices[0].message.content
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("told", "ended"),
    [
        ({"stop_sequences": ["four", "three"]}, ("stop_sequence", "three", "one two")),
        ({"stop_sequences": ["three", "three four"]}, ("stop_sequence", "three", "one two")),
        ({"stop_sequences": ["three"], "max_tokens": 1}, ("max_tokens", None, "one")),
        ({"stop_sequences": ["five"]}, ("end_turn", None, "one two three four")),
        ({}, ("end_turn", None, "one two three four")),
    ],
)
def test_an_anthropic_client_is_told_which_sequence_stopped_it(
    process: RouterProcess, told: dict[str, Any], ended: tuple[str, str | None, str], streamed: bool
) -> None:
    with anthropic.Anthropic(base_url=process.url, api_key="unused", max_retries=0, timeout=10) as client:
        asked: Any = {"model": "echo", "max_tokens": 9, "messages": [{"role": "user", "content": "one two three four"}], **told}
        if streamed:
            with client.messages.stream(**asked) as events:
                message: Any = events.get_final_message()
        else:
            message = client.messages.create(**asked)
    assert (message.stop_reason, message.stop_sequence, message.content[0].text) == ended


CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": CITY}},
    {"type": "function", "function": {"name": "clock", "parameters": {"type": "object", "properties": {}}}},
]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("choice", "name"),
    [
        ("required", "weather"),
        ({"type": "function", "function": {"name": "clock"}}, "clock"),
        ("auto", None),
        ("none", None),
    ],
)
def test_it_calls_a_tool_when_it_must(process: RouterProcess, choice: Any, name: str | None, streamed: bool) -> None:
    body = chat_body("hi", tools=TOOLS, tool_choice=choice, stream=streamed)
    answer = process.post("/v1/chat/completions", body)
    assert answer.status == 200
    calls = process.record()["response"]["tool_calls"]
    assert [call["name"] for call in calls] == ([name] if name else [])
    if not streamed:
        (choice,) = answer.json()["choices"]
        assert choice["finish_reason"] == ("tool_calls" if name else "stop")
        if name:
            (call,) = choice["message"]["tool_calls"]
            assert call["type"] == "function"
            assert call["id"]
    if name == "weather":
        assert isinstance(json.loads(calls[0]["arguments"])["city"], str)


def test_it_speaks_json_when_asked(client: openai.OpenAI) -> None:
    answer = ask(client, "hello", response_format={"type": "json_object"})
    assert isinstance(json.loads(answer.choices[0].message.content), dict)


PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABpfZFQAAAAABJRU5ErkJggg=="
OPENAI_IMAGE = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
ANTHROPIC_IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [ANTHROPIC_IMAGE]}
CALL = {"type": "tool_use", "id": "t1", "name": "look", "input": {}}
# Something that is not text, as each client sends it -> the field it stands in.
UNREAD: dict[str, tuple[str, dict[str, Any], str]] = {
    "openai image": ("/v1/chat/completions", {"messages": [{"role": "user", "content": [OPENAI_IMAGE]}]}, "messages"),
    "openai sound": (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "input_audio", "input_audio": {"data": "aGk=", "format": "wav"}}]}]},
        "messages",
    ),
    "anthropic image": (
        "/v1/messages",
        {"max_tokens": 9, "messages": [{"role": "user", "content": [ANTHROPIC_IMAGE]}]},
        "messages",
    ),
    "anthropic document": (
        "/v1/messages",
        {"max_tokens": 9, "messages": [{"role": "user", "content": [ANTHROPIC_IMAGE | {"type": "document"}]}]},
        "messages",
    ),
    "anthropic result": (
        "/v1/messages",
        {"max_tokens": 9, "messages": [{"role": "assistant", "content": [CALL]}, {"role": "user", "content": [RESULT]}]},
        "messages",
    ),
    "responses image": (
        "/v1/responses",
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}]}]},
        "input",
    ),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", UNREAD)
def test_what_it_cannot_read_is_a_400_that_names_the_field(process: RouterProcess, case: str, streamed: bool) -> None:
    path, body, field = UNREAD[case]
    answer = process.post(path, {"model": "echo", "stream": streamed, **body})
    assert answer.status == 400, answer
    error = answer.json()["error"]
    assert field in error["message"]
    assert error.get("param", field) == field, "Anthropic's errors have no place for it"
    assert (process.record()["status"], process.record()["attempts"]) == (400, [])


def test_behind_a_local_model_without_eyes_it_does_not_pretend_to_have_some(
    router: RouterFactory, upstream: FakeUpstream
) -> None:
    """The chain of the shipped configuration, asked about an image."""
    upstream.default = lambda received: json_answer(
        {"models": [{"model": "phi3"}]} if received.path == "/api/tags" else {"capabilities": ["completion"]}
    )
    local = '[[providers]]\nname = "local"\nformat = "ollama"\nbase_url = "{upstream}"\n'
    chain = '[[routers]]\ntype = "discover"\nprovider = "local"\n[[routers]]\ntype = "fallback"\nproviders = ["echo"]\n'
    process = router(providers=local + ECHO, rules=chain)
    until(lambda: process.stats()["providers"]["local"]["models"], 10, "the models are known")
    answer = process.post("/v1/chat/completions", {"model": "phi3", "messages": [{"role": "user", "content": [OPENAI_IMAGE]}]})
    assert (answer.status, answer.error["param"]) == (400, "messages")
    assert "phi3" in answer.error["message"]
    assert [received for received in upstream.posts if received.path == "/api/chat"] == []


def test_an_image_goes_past_it_to_a_provider_that_may_have_eyes(router: RouterFactory) -> None:
    chain = '[[routers]]\ntype = "prefix"\nmodel_prefix = ""\nprovider = "{name}"\n'
    process = router(providers=ECHO + PROVIDER, rules="".join(chain.replace("{name}", name) for name in ("echo", "up")))
    image = [{"role": "user", "content": [OPENAI_IMAGE]}]
    answer = process.post("/v1/chat/completions", {"model": "m", "messages": image})
    assert (answer.status, answer.headers["x-router-provider"]) == (200, "up")
    assert process.chat().headers["x-router-provider"] == "echo"


def test_the_tokens_of_what_it_cannot_read_are_estimated_all_the_same(process: RouterProcess) -> None:
    _, body, _ = UNREAD["anthropic image"]
    answer = process.post("/v1/messages/count_tokens", {"model": "echo", "messages": body["messages"]})
    assert (answer.status, answer.headers["x-router-usage-source"]) == (200, "estimated")


def test_it_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["echo"]


# --- its demonstrations


def test_it_can_be_slow(process: RouterProcess) -> None:
    began = time.monotonic()
    assert process.chat("[[echo delay=0.4]] hi").status == 200
    assert time.monotonic() - began >= 0.4
    assert process.record()["duration_ms"] >= 400


def test_it_can_take_its_time_between_words(process: RouterProcess) -> None:
    with process.stream("[[echo gap=0.1 words=5]]") as reply:
        times = [time.monotonic() for block in reply.blocks() if b'"content"' in block]
    assert times[-1] - times[0] >= 0.3, "not all in one piece"
    assert len(process.record()["response"]["content"].split()) == 5


@pytest.mark.parametrize(("status", "seen"), [(503, 502), (500, 502), (400, 400), (429, 429), (401, 502)])
def test_it_can_fail(process: RouterProcess, status: int, seen: int) -> None:
    answer = process.chat(f"[[echo status={status}]] hi")
    assert answer.status == seen
    assert answer.any_error["message"]
    record = process.record()
    assert (record["outcome"], record["attempts"][0]["status"]) == ("error", status)


@pytest.mark.parametrize(("order", "outcome"), [("cut=3", "error"), ("stall=3", "timeout")])
def test_it_can_break_off_and_fall_silent(process: RouterProcess, order: str, outcome: str) -> None:
    with process.stream(f"[[echo {order} words=9]]") as reply:
        assert reply.status == 200
        body = reply.read()
    assert b"[DONE]" not in body
    assert json.loads(body.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["message"]
    record = process.record()
    assert record["outcome"] == outcome
    assert len(record["response"]["content"].split()) == 3


def test_a_client_that_leaves_stops_it(router: RouterFactory) -> None:
    process = router(providers=ECHO.replace("read_timeout = 2", "read_timeout = 60"))
    before = process.resources()
    with pytest.raises(TimeoutError):
        process.chat("[[echo delay=60]]", timeout=0.5)
    assert process.record()["outcome"] == "cancelled"
    process.comes_back_to(before)
