"""The official openai package as the client: what its users do must work, and what breaks must raise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any, cast

import openai
import pytest
from conftest import RouterFactory
from fake_upstream import (
    FakeUpstream,
    chat_completion,
    chunk_object,
    chunks,
    end,
    error_answer,
    event,
    fin,
    hold,
    json_answer,
    openai_chunks,
    pause,
    reset,
    silence,
    stream,
    stream_head,
    tell,
)
from openai.types.chat import ChatCompletionMessageParam
from router_process import INBOUND_KEY, RouterProcess

MODEL = "fake-model"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "hi"}]
USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


@pytest.fixture
def process(router: RouterFactory) -> RouterProcess:
    return router(provider="read_timeout = 2\nidle_timeout = 2")


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, **more)


def stream_of(client: openai.OpenAI, **more: Any) -> openai.Stream[Any]:
    return cast("openai.Stream[Any]", ask(client, stream=True, **more))


def text_of(events: Any) -> str:
    return "".join(event.choices[0].delta.content or "" for event in events if event.choices)


# --- what works


def test_a_chat(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(json_answer(chat_completion("good day", USAGE)))
    answer = ask(client)
    assert answer.choices[0].message.content == "good day"
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (12, 3)
    assert (answer.id, answer.model) == ("chatcmpl-fake", "fake-model-0613")


def test_a_stream(client: openai.OpenAI, process: RouterProcess) -> None:
    with stream_of(client) as events:
        seen = list(events)
    assert text_of(seen) == "one two three"
    assert [event.usage for event in seen] == [None] * len(seen)
    assert seen[-1].choices[0].finish_reason == "stop"
    record = process.record()
    assert (record["outcome"], record["stream"]) == ("ok", True)
    assert record["response"]["content"] == "one two three"
    assert record["response"]["usage"]["input_tokens"] == 7, "usage is known although nobody asked"


def test_a_stream_with_usage(client: openai.OpenAI) -> None:
    with stream_of(client, stream_options={"include_usage": True}) as events:
        seen = list(events)
    assert text_of(seen) == "one two three"
    assert seen[-1].choices == []
    assert seen[-1].usage.total_tokens == 10


def test_a_stream_arrives_while_it_is_made(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    go_on = threading.Event()
    first = openai_chunks("early", finish=None, done=False)
    upstream.script(stream_head() + chunks(first) + hold(go_on) + chunks(openai_chunks("late")) + end())
    with stream_of(client) as events:
        assert next(events).choices[0].delta.role == "assistant"
        assert next(events).choices[0].delta.content == "early"
        go_on.set()
        assert text_of(events) == "late"


def test_tools_arrive_whole(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    call = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    pieces = [{"tool_calls": [call]}]
    pieces += [{"tool_calls": [{"index": 0, "function": {"arguments": part}}]} for part in ('{"city"', ':"Pa', 'ris"}')]
    blocks = [event(chunk_object(cast("dict[str, Any]", piece))) for piece in pieces]
    upstream.script(stream([*blocks, event(chunk_object({}, "tool_calls")), b"data: [DONE]\n\n"]))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with stream_of(client, tools=tools) as events:
        arguments = "".join(e.choices[0].delta.tool_calls[0].function.arguments for e in events if e.choices[0].delta.tool_calls)
    assert arguments == '{"city":"Paris"}'
    assert upstream.posts[0].json()["tools"] == tools


def test_unknown_fields_arrive_unchanged(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    extra = {"mirostat": 2, "x_nested": {"a": [1, {"b": None}], "é": "☃"}, "guided_regex": "\\d+\n", "min_p": 0.1}
    answer = ask(client, extra_body=extra, temperature=0.1, logit_bias={"50256": -100}, metadata={"k": "v"})
    assert answer.choices
    sent = upstream.posts[0].json()
    assert {key: sent[key] for key in extra} == extra
    assert (sent["temperature"], sent["logit_bias"], sent["metadata"]) == (0.1, {"50256": -100}, {"k": "v"})


def test_unknown_answer_fields_come_back_unchanged(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(json_answer(chat_completion("x", citations=["a"], x_groq={"id": "r"})))
    answer = ask(client)
    assert answer.model_extra == {"citations": ["a"], "x_groq": {"id": "r"}}


def test_headers_can_be_read_with_the_answer(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES)
    assert raw.headers["x-router-provider"] == "up"
    assert raw.headers["x-generation-id"].startswith("gen-")


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["fake-model"]
    assert client.models.retrieve("fake-model").object == "model"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nothing")


def test_the_async_client_chats_and_streams_at_once(process: RouterProcess) -> None:
    async def talk() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0) as client:

            async def whole() -> str:
                answer = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
                return answer.choices[0].message.content or ""

            async def streamed() -> str:
                events = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
                return "".join([event.choices[0].delta.content or "" async for event in events])

            return await asyncio.gather(*[whole() if number % 2 else streamed() for number in range(10)])

    assert asyncio.run(talk()) == ["one two three", "hello there"] * 5
    assert {record["outcome"] for record in process.settled(10)} == {"ok"}


def test_an_async_client_that_cancels_closes_the_upstream(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("a b", finish=None, done=False)) + silence())

    async def leave() -> None:
        async with openai.AsyncOpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=0) as client:
            events = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
            await anext(aiter(events))
            await events.close()

    asyncio.run(leave())
    assert upstream.posts[0].closed_within(5)
    assert process.record()["outcome"] == "cancelled"


# --- what must raise


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize(
    ("status", "raised", "seen"),
    [
        (400, openai.BadRequestError, 400),
        (404, openai.NotFoundError, 404),
        (409, openai.ConflictError, 409),
        (413, openai.APIStatusError, 413),
        (422, openai.UnprocessableEntityError, 422),
        (429, openai.RateLimitError, 429),
        (401, openai.InternalServerError, 502),
        (403, openai.InternalServerError, 502),
        (500, openai.InternalServerError, 502),
        (503, openai.InternalServerError, 502),
    ],
)
def test_an_error_of_the_upstream(
    client: openai.OpenAI,
    process: RouterProcess,
    upstream: FakeUpstream,
    streamed: bool,
    status: int,
    raised: type[openai.APIStatusError],
    seen: int,
) -> None:
    upstream.default = error_answer(status, "the upstream's own words")
    with pytest.raises(raised) as caught:
        ask(client, stream=streamed)
    assert caught.value.status_code == seen
    body = cast("dict[str, Any]", caught.value.body)
    if seen == status:
        assert body["message"] == "the upstream's own words"
        assert "src" not in body, "ours can be told from an upstream's"
    else:
        assert body["src"] == "router"
    record = process.record()
    assert (record["outcome"], record["status"]) == ("error", seen)
    assert [attempt["status"] for attempt in record["attempts"]] == [status]


def test_a_rate_limit_says_when_to_come_back(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.default = error_answer(429, "slow down", {"Retry-After": "17"})
    with pytest.raises(openai.RateLimitError) as caught:
        ask(client)
    assert caught.value.response.headers["retry-after"] == "17"


def test_the_clients_own_retries_follow_the_retry_after(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(error_answer(429, "slow down", {"Retry-After": "1"}))
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="x", max_retries=1) as client:
        assert ask(client).choices
    first, second = upstream.posts
    assert second.at - first.at >= 0.9
    assert [record["outcome"] for record in process.settled(2)] == ["error", "ok"]


def test_a_wrong_key(router: RouterFactory) -> None:
    process = router(server='api_key_env = "INBOUND"', environment={"INBOUND": INBOUND_KEY})
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            ask(client)
        assert ask(client.with_options(api_key=INBOUND_KEY)).choices


def test_a_bad_request_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages="hi")  # type: ignore[arg-type]
    assert caught.value.param == "messages"
    assert caught.value.type == "invalid_request_error"


BROKEN = {
    "reset": reset(),
    "an end without the chunked end": fin(),
    "a clean end without finish or DONE": end(),
    "an error event": chunks([event({"error": {"message": "overheated", "type": "server_error"}})]) + end(),
    "silence": silence(),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_stream_that_breaks_raises_an_api_error(
    client: openai.OpenAI, process: RouterProcess, upstream: FakeUpstream, how: str
) -> None:
    beginning = stream_head() + chunks(openai_chunks("one two", finish=None, done=False)) + pause(0.2)
    upstream.script(beginning + BROKEN[how])
    seen: list[str] = []
    with stream_of(client) as events, pytest.raises(openai.APIError) as caught:
        seen.extend(event.choices[0].delta.content or "" for event in events)
    assert not isinstance(caught.value, (openai.APIConnectionError, openai.APIStatusError)), "in-band, the body ended well"
    record = process.record()
    assert record["outcome"] == ("timeout" if how == "silence" else "error")
    assert record["response"]["content"] == "one two"
    assert record["response"]["stop_reason"] == "other"


def test_an_upstream_that_never_answers_is_a_504(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(silence())
    with pytest.raises(openai.InternalServerError) as caught:
        ask(client)
    assert caught.value.status_code == 504


def test_a_client_whose_own_timeout_is_shorter_is_cancelled(
    process: RouterProcess, client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    upstream.script(silence())
    with pytest.raises(openai.APITimeoutError):
        ask(client.with_options(timeout=0.5))
    assert upstream.posts[0].closed_within(1.5)
    assert process.record()["outcome"] == "cancelled"


def test_a_client_that_leaves_in_the_middle_is_cancelled_and_keeps_what_was_said(
    process: RouterProcess, client: openai.OpenAI, upstream: FakeUpstream
) -> None:
    said = threading.Event()
    first = openai_chunks("one two", finish=None, done=False)
    upstream.script(stream_head() + chunks(first) + tell(said) + silence())
    with stream_of(client) as events:
        for _ in first:
            next(events)
    assert upstream.posts[0].closed_within(1.5)
    record = process.record()
    assert record["outcome"] == "cancelled"
    assert record["error_type"] == "client_disconnected"
    assert record["response"]["content"] == "one two"
