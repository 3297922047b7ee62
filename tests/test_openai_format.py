"""OpenAI's language beyond the golden files: embeddings, the odd ways of its many imitators, what is refused, what is dropped."""

from __future__ import annotations

import array
import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream, chunk_object, event, json_answer, stream
from hypothesis import given
from hypothesis import strategies as st
from openai.types import CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from router_process import RouterProcess
from wire_files import fold, heard, heard_in_pieces

from providers import (
    Answer,
    BadRequest,
    Begin,
    Body,
    Call,
    Finish,
    Malformed,
    Provider,
    Reasoning,
    Request,
    RequestError,
    Stamp,
    Text,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
)
from providers import openai as chat

UP = Provider("up", "openai", "http://127.0.0.1:1/v1")
OPENAI = Provider("openai", "openai", "https://api.openai.com/v1")
STAMP = Stamp("aaaabbbbccccddddeeee", 1700000000, "sent-model")
HI: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
CLAUDE: dict[str, Any] = {**HI, "max_tokens": 10}
FUNCTION = {"name": "look", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
PATCH = {"type": "custom", "custom": {"name": "patch"}}


def told(provider: Provider = UP, model: str = "sent-model", **more: Any) -> Call:
    """What an Anthropic client's request becomes."""
    return chat.build(heard("anthropic", {**CLAUDE, **more}), model, provider)


def body_of(call: Call) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call.body)
    return found


def folded(events: list[Any]) -> Answer:
    answer = Answer()
    for e in events:
        answer.add(e)
    return answer


def render(events: list[Any], **asked: Any) -> list[dict[str, Any]]:
    """The chunks that an OpenAI client gets of these events."""
    renderer = chat.Renderer(heard("openai", {**HI, "stream": True, **asked}), STAMP)
    data = b"".join([*(renderer.feed(e) for e in events), renderer.end()])
    assert data.endswith(b"data: [DONE]\n\n")
    return [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: {")]


def deltas(told: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [c["choices"][0]["delta"] for c in told if c["choices"]]


# --- what is refused


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"model": None}, "model"),
        ({"model": ""}, "model"),
        ({"messages": None}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].image_url.url"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"id": "a"}]}]}, "messages[0].tool_calls[0]"),
        ({"messages": [{"role": "assistant", "tool_calls": "look"}]}, "messages[0].tool_calls"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"stop": [1]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": True}, "stream_options"),
        ({"tools": [{"type": "function"}]}, "tools[0].function.name"),
        ({"tools": [{"type": "custom", "custom": {}}]}, "tools[0].custom.name"),
        ({"functions": [{}]}, "functions[0].name"),
        ({"tool_choice": "sometimes"}, "tool_choice"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        heard("openai", {**HI, **change})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("limits", "param"),
    [
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": -1}, "max_completion_tokens"),
    ],
)
def test_a_limit_below_1_goes_to_providers_of_the_same_language_only(limits: dict[str, Any], param: str) -> None:
    """To LM Studio and llama.cpp -1 is no limit."""
    request = heard("openai", {**HI, **limits})
    assert request.bound == {param: f"{param} must be at least 1"}
    assert json.loads(chat.build(request, "m", UP).body) == {**HI, **limits, "model": "m"}


@pytest.mark.parametrize(
    "source", [{"type": "url", "url": "https://example.com/a.pdf"}, {"type": "file", "file_id": "file_1"}], ids=["url", "file_id"]
)
def test_a_document_that_openai_cannot_reach_is_refused(source: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as caught:
        told(messages=[{"role": "user", "content": [{"type": "document", "source": source}]}])
    assert caught.value.param == "messages"


# --- what depends on who is asked


@pytest.mark.parametrize(
    ("provider", "model", "field"),
    [
        (UP, "qwen3", "max_tokens"),
        (UP, "gpt-4o", "max_tokens"),
        (UP, "gpt-oss:20b", "max_tokens"),
        (UP, "openai/gpt-5-mini", "max_completion_tokens"),
        (UP, "o3", "max_completion_tokens"),
        (UP, "gpt-10", "max_completion_tokens"),
        (OPENAI, "gpt-4o", "max_completion_tokens"),
        (Provider("a", "openai", "https://x.openai.azure.com/openai/v1"), "mine", "max_completion_tokens"),
    ],
)
def test_the_limit_has_the_name_that_the_provider_knows(provider: Provider, model: str, field: str) -> None:
    assert {"max_tokens", "max_completion_tokens"} & body_of(told(provider, model)).keys() == {field}


def test_thoughts_go_to_servers_that_take_them_and_not_to_openai() -> None:
    turn = {
        "role": "assistant",
        "content": [{"type": "thinking", "thinking": "hm", "signature": "s"}, {"type": "text", "text": "a"}],
    }
    messages = [*HI["messages"], turn, *HI["messages"]]
    assert body_of(told(messages=messages))["messages"][1]["reasoning_content"] == "hm"
    there = told(OPENAI, messages=messages)
    assert "reasoning_content" not in body_of(there)["messages"][1] and there.dropped == ["thinking"]


def test_fields_that_responses_and_chat_share_go_to_openai_only() -> None:
    request = Request("responses", Body(b"{}"), "m", extra={"prompt_cache_key": "k", "verbosity": "low", "top_logprobs": 3})
    there, elsewhere = chat.build(request, "m", OPENAI), chat.build(request, "m", UP)
    assert (body_of(there)["prompt_cache_key"], body_of(there)["verbosity"], there.dropped) == ("k", "low", ["top_logprobs"])
    assert elsewhere.dropped == ["prompt_cache_key", "top_logprobs", "verbosity"]


@pytest.mark.parametrize(
    ("tokens", "effort"),
    [
        (0, "none"), (1024, "minimal"), (1025, "low"), (4096, "low"), (10000, "medium"), (16384, "medium"), (31999, "high"),
        (32768, "high"), (50000, "high"), (65536, "xhigh"), (131072, "max"), (10**9, "high"),
    ],
)  # fmt: skip
def test_a_budget_becomes_an_effort_that_every_model_knows(tokens: int, effort: str) -> None:
    assert chat.effort(tokens) == effort


@pytest.mark.parametrize(
    ("more", "tokens"),
    [
        ({"reasoning_effort": "low"}, 4096), ({"reasoning": {"effort": "high"}}, 32768), ({"reasoning": {"max_tokens": 77}}, 77),
        ({}, None), ({"reasoning_effort": "unheard-of"}, None),
    ],
)  # fmt: skip
def test_effort_is_heard_in_both_its_forms(more: dict[str, Any], tokens: int | None) -> None:
    request = heard("openai", {**HI, **more})
    assert request.reasoning == tokens
    assert request.extra == (more if tokens is None else {})


def test_a_request_changed_by_a_plugin_keeps_its_own_fields() -> None:
    own = {"max_completion_tokens": 7, "n": 2, "logit_bias": {"1": 1}, "top_k": 5, "tools": [PATCH, {"type": "web_search"}]}
    request = heard("openai", {**HI, **own, "trace": {"a": 1}})
    request.changed = True
    call = chat.build(request, "m", UP)
    assert call.dropped == [] and body_of(call) == {**HI, **own}


def test_the_clients_bytes_go_on_but_for_the_model_and_the_wish_for_usage() -> None:
    text = '{"model": "mine",  "messages":[{"role":"user","content":"h\\u00ef"}],"stream":true,"new":[1.0]}'
    call = chat.build(chat.parse_request(Body(text.encode()), {}), "theirs", UP)
    assert call.body.decode() == (
        '{"model": "theirs","messages":[{"role":"user","content":"h\\u00ef"}],"stream":true,"new":[1.0],'
        '"stream_options":{"include_usage": true}}'
    )


# --- answers for clients


def test_free_text_tools_get_their_text_as_it_is() -> None:
    call = ToolCall(0, "c1", "patch", '{"input": "a\\nb"}')
    asked = heard("openai", {**HI, "tools": [PATCH]})
    whole = chat.render(folded([call, Finish("tool_calls")]), asked, STAMP)
    free = {"id": "c1", "type": "custom", "custom": {"name": "patch", "input": "a\nb"}}
    assert whole["choices"][0]["message"]["tool_calls"] == [free]
    ChatCompletion.model_validate(whole, strict=True)
    pieces = [ToolCall(0, "c1", "patch"), ToolCall(0, arguments='{"input": "a'), ToolCall(0, arguments='\\nb"}'), Finish("stop")]
    streamed = render([Begin(), *pieces], tools=[PATCH])
    assert [d for d in deltas(streamed) if "tool_calls" in d] == [{"tool_calls": [{"index": 0, **free}]}]
    assert streamed[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_clients_of_the_old_kind_get_a_function_call() -> None:
    calls = [ToolCall(0, "a", "look", '{"x":'), ToolCall(0, arguments="1}"), ToolCall(1, "b", "look", "{}"), Finish("tool_calls")]
    asked = heard("openai", {**HI, "functions": [FUNCTION]})
    choice = chat.render(folded(calls), asked, STAMP)["choices"][0]
    assert (choice["message"]["function_call"], choice["finish_reason"]) == (
        {"name": "look", "arguments": '{"x":1}'},
        "function_call",
    )
    streamed = render(calls, functions=[FUNCTION])
    pieces = [d["function_call"] for d in deltas(streamed) if "function_call" in d]
    assert pieces == [{"name": "look", "arguments": '{"x":'}, {"arguments": "1}"}]
    assert streamed[-1]["choices"][0]["finish_reason"] == "function_call"
    bare = render([ToolCall(0, "a", "look"), Finish("tool_calls")], functions=[FUNCTION])
    assert "".join(d["function_call"]["arguments"] for d in deltas(bare) if "function_call" in d) == "{}"


def test_a_call_without_an_id_gets_one_that_no_other_answer_has() -> None:
    choice = chat.render(folded([ToolCall(0, None, "look", "{}")]), heard("openai", HI), STAMP)["choices"][0]
    streamed = next(d for d in deltas(render([ToolCall(0, None, "look", "{}")])) if "tool_calls" in d)
    assert choice["message"]["tool_calls"][0]["id"] == streamed["tool_calls"][0]["id"] == "call_aaaabbbbccccddddeeee_0"


def test_a_stream_without_a_reason_ends_with_the_usual_one() -> None:
    assert render([Begin(), Text("a")])[-1]["choices"][0]["finish_reason"] == "stop"
    assert render([Begin(), ToolCall(0, "a", "look", "{}")])[-1]["choices"][0]["finish_reason"] == "tool_calls"


def test_usage_comes_only_to_those_who_asked_and_is_empty_before() -> None:
    events = [Begin(), Text("a"), Finish("stop"), Used(Usage(5, 6))]
    assert all("usage" not in c for c in render(events))
    asked = render(events, stream_options={"include_usage": True})
    assert [c["usage"] for c in asked[:-1]] == [None] * (len(asked) - 1)
    assert (asked[-1]["choices"], asked[-1]["usage"]["total_tokens"]) == ([], 11)


def test_signatures_are_no_piece_of_a_message() -> None:
    assert deltas(render([Begin(), Reasoning("a"), Reasoning(signature="s"), Reasoning(redacted="r"), Finish("stop")])) == [
        {"role": "assistant", "content": ""}, {"reasoning_content": "a"}, {},
    ]  # fmt: skip


def test_a_block_that_could_not_be_read_ends_a_translated_stream() -> None:
    with pytest.raises(UpstreamError, match="an event that is not JSON"):
        render([Malformed("an event that is not JSON")])


@pytest.mark.parametrize(
    ("detail", "type_"),
    [
        ({"message": "no", "type": "overloaded_error"}, "server_error"),
        ({"message": "no", "type": "not_found_error"}, "invalid_request_error"),
        ({"message": "no", "type": "their_own_error"}, "their_own_error"),
        ({"message": "no"}, "rate_limit_error"),
    ],
)
def test_what_a_provider_said_is_told_in_openais_types(detail: dict[str, Any], type_: str) -> None:
    error = UpstreamError("the provider is rate limited (429)", kind="rate_limit", detail=detail)
    assert chat.render_error(error)["error"] == {"message": "no", "type": type_, "param": None, "code": None}
    assert chat.render_error(RequestError("m", kind="overloaded"))["error"]["src"] == "router"


# --- what imitators send


def stream_of(*chunks: dict[str, Any]) -> list[Any]:
    return heard_in_pieces(chat.Parser(), [event(c) for c in chunks])


def calls_of(events: list[Any]) -> list[tuple[str | None, str | None, str]]:
    found: list[tuple[str | None, str | None, str]] = fold(events)["calls"]
    return found


def piece(arguments: Any, **more: Any) -> dict[str, Any]:
    return chunk_object({"tool_calls": [{"function": {"arguments": arguments, **more.pop("function", {})}, **more}]})


def test_calls_that_all_say_index_zero_are_told_apart_by_their_ids() -> None:
    named = {"function": {"name": "look"}}
    told = stream_of(piece('{"a": 1', index=0, id="x", **named), piece("}", index=0), piece("{}", index=0, id="y", **named))
    assert calls_of(told) == [("x", "look", '{"a": 1}'), ("y", "look", "{}")]


def test_calls_without_an_index_are_told_apart_by_their_ids() -> None:
    named = {"function": {"name": "look"}}
    assert calls_of(stream_of(piece("{}", id="x", **named), piece("{}", id="y", **named))) == [
        ("x", "look", "{}"),
        ("y", "look", "{}"),
    ]


def test_an_id_repeated_in_every_piece_is_one_call() -> None:
    named = {"function": {"name": "look"}}
    told = stream_of(piece('{"a"', index=0, id="x", **named), piece(": 1}", index=0, id="x", **named))
    assert calls_of(told) == [("x", "look", '{"a": 1}')]
    sent = [d["tool_calls"][0] for d in deltas(render(told)) if "tool_calls" in d]
    assert [("id" in s, "name" in s["function"]) for s in sent] == [(True, True), (False, False)]  # clients join what comes twice


def test_arguments_that_came_as_an_object_are_text_again() -> None:
    assert calls_of(stream_of(piece({"a": 1}, index=0, id="x", function={"name": "look"}))) == [("x", "look", '{"a":1}')]


@pytest.mark.parametrize(
    "message",
    [
        {"reasoning_content": "hm", "content": "a"},
        {"reasoning": "hm", "content": [{"type": "text", "text": "a"}, {"type": "other"}]},
    ],
)
def test_thoughts_and_content_are_heard_in_their_other_forms(message: dict[str, Any]) -> None:
    answer = folded(chat.parse(json.dumps({"choices": [{"message": message}]}).encode(), heard("openai", HI)))
    assert (answer.reasoning, answer.text) == ("hm", "a")


def test_what_was_spoken_is_kept_as_text() -> None:
    message = {"content": None, "audio": {"id": "a", "data": "", "expires_at": 0, "transcript": "hello"}}
    assert folded(chat.parse(json.dumps({"choices": [{"message": message}]}).encode(), heard("openai", HI))).text == "hello"


def test_the_calls_of_further_choices_do_not_run_into_the_first() -> None:
    call = {"id": "x", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    choices = [{"index": i, "message": {"content": f"{i}", "tool_calls": [call]}} for i in range(2)]
    answer = folded(chat.parse(json.dumps({"choices": choices}).encode(), heard("openai", HI)))
    assert [c.arguments for c in answer.tool_calls.values()] == ["{}"]
    assert {i: "".join(t) for i, t in answer.choices.items()} == {0: "0", 1: "1"}


def test_a_list_of_models_is_its_ids() -> None:
    call = chat.models_call()
    assert (call.method, call.path, call.body) == ("GET", "/models", b"")
    assert chat.parse_models({"object": "list", "data": [{"id": "a"}, {"id": "b"}, {"id": 5}]}) == ["a", "b"]


# --- embeddings


def embeddings(**more: Any) -> Request:
    return chat.parse_embeddings(Body(json.dumps({"model": "m", "input": "hi", **more}).encode()), {})


@pytest.mark.parametrize(
    ("input_", "inputs", "text"),
    [
        ("hi", ["hi"], "hi"), (["a", "b"], ["a", "b"], "a\nb"), ([1, 2], [[1, 2]], ""), ([[1], [2, 3]], [[1], [2, 3]], ""),
    ],
)  # fmt: skip
def test_every_form_of_input_is_a_list_of_inputs(input_: Any, inputs: list[Any], text: str) -> None:
    request = embeddings(input=input_)
    assert (request.operation, request.inputs, request.text()) == ("embeddings", inputs, text)


def test_whether_it_likes_an_empty_text_is_the_providers_business() -> None:
    assert embeddings(input="").inputs == embeddings(input=[""]).inputs == [""]


@pytest.mark.parametrize("input_", [None, [], {}, [[]], [1.5], ["a", 1], [None], 5])
def test_an_input_that_cannot_be_is_refused_by_name(input_: Any) -> None:
    with pytest.raises(BadRequest) as caught:
        embeddings(input=input_)
    assert caught.value.param == "input"


@pytest.mark.parametrize(
    ("more", "param"), [({"encoding_format": "hex"}, "encoding_format"), ({"dimensions": "5"}, "dimensions")]
)
def test_how_vectors_are_wanted_is_looked_at(more: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        embeddings(**more)
    assert caught.value.param == param


def test_embeddings_are_asked_for_in_the_clients_own_bytes() -> None:
    request = embeddings(dimensions=3, new=1)
    call = chat.build(request, "other", UP)
    assert (call.path, call.kind) == ("/embeddings", "openai_embeddings")
    assert body_of(call) == {"model": "other", "input": "hi", "dimensions": 3, "new": 1}
    request.changed = True
    assert body_of(chat.build(request, "other", UP)) == {"model": "other", "input": ["hi"], "dimensions": 3, "new": 1}


def test_vectors_come_in_the_order_of_their_index() -> None:
    data = [{"object": "embedding", "index": 1, "embedding": [2.0]}, {"object": "embedding", "index": 0, "embedding": [1.0]}]
    body = {"object": "list", "data": data, "model": "e", "usage": {"prompt_tokens": 4, "total_tokens": 4}}
    answer = folded(chat.parse(json.dumps(body).encode(), embeddings()))
    assert (answer.vectors, answer.model, answer.usage) == ([[1.0], [2.0]], "e", Usage(4))


@pytest.mark.parametrize("broken", ['{"data": [{"embedding": 5}]}', '{"data": {}}', '{"data": [5]}', "{}", "[]", ""])
def test_an_answer_without_vectors_is_a_failure_of_the_provider(broken: str) -> None:
    with pytest.raises(UpstreamError):
        chat.parse(broken.encode(), embeddings())


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=5), min_size=1, max_size=3)
)
def test_vectors_are_given_in_the_form_that_was_asked_for(vectors: list[list[float]]) -> None:
    packed = [base64.b64encode(array.array("f", v).tobytes()).decode() for v in vectors]
    for said in (vectors, packed):
        answer = Answer()
        answer.vectors = list(said)
        as_text = chat.render(answer, embeddings(encoding_format="base64"), STAMP)
        as_numbers = chat.render(answer, embeddings(), STAMP)
        assert [d["embedding"] for d in as_text["data"]] == packed
        assert [d["embedding"] for d in as_numbers["data"]] == vectors
        CreateEmbeddingResponse.model_validate(as_numbers, strict=True)


# --- the official package before the router

CONFIGURED = """
[[providers]]
name = "up"
format = "openai"
base_url = "{upstream}/v1"

[[providers]]
name = "local"
format = "ollama"
base_url = "{upstream}"
"""
PREFIXES = """
[[routers]]
type = "prefix"
model_prefix = "local-"
provider = "local"

[[routers]]
type = "prefix"
model_prefix = "up-"
provider = "up"
"""


@pytest.fixture
def process(router: RouterFactory) -> RouterProcess:
    return router(providers=CONFIGURED, rules=PREFIXES)


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0, timeout=15) as made:
        yield made


def test_embeddings_pass_through_an_openai_provider(
    client: openai.OpenAI, process: RouterProcess, upstream: FakeUpstream
) -> None:
    data = [{"object": "embedding", "index": 0, "embedding": [0.5, 0.25]}]
    body = {"object": "list", "data": data, "model": "e", "usage": {"prompt_tokens": 4, "total_tokens": 4}}
    upstream.script(json_answer(body))
    answer = client.embeddings.create(model="up-embed", input="hello", encoding_format="float")
    assert (answer.data[0].embedding, answer.usage.prompt_tokens) == ([0.5, 0.25], 4)
    assert (upstream.posts[0].path, upstream.posts[0].json()["input"]) == ("/v1/embeddings", "hello")
    record = process.record()
    assert (record["operation"], record["outcome"], record["response"]["usage"]["input_tokens"]) == ("embeddings", "ok", 4)
    assert record["attempts"][0]["kind"] == "openai_embeddings"


@pytest.mark.parametrize("form", ["float", "base64"])
def test_embeddings_of_an_ollama_provider_come_in_the_form_asked_for(
    client: openai.OpenAI, upstream: FakeUpstream, form: Any
) -> None:
    upstream.script(json_answer({"model": "e", "embeddings": [[0.5, 0.25], [1.0, 0.0]], "prompt_eval_count": 6}))
    answer = client.embeddings.create(model="local-embed", input=["a", "b"], encoding_format=form)
    vectors = [d.embedding for d in answer.data]
    if form == "base64":
        vectors = [array.array("f", base64.b64decode(str(v))).tolist() for v in vectors]
    assert vectors == [[0.5, 0.25], [1.0, 0.0]] and answer.usage.prompt_tokens == 6


def test_several_choices_pass_through(client: openai.OpenAI, process: RouterProcess, upstream: FakeUpstream) -> None:
    choices = [{"index": i, "delta": {"content": f"c{i}"}, "finish_reason": None} for i in (0, 1)]
    ends: list[dict[str, Any]] = [{"index": i, "delta": {}, "finish_reason": "stop"} for i in (0, 1)]
    chunks = [{**chunk_object(), "choices": [c]} for c in (*choices, *ends)]
    upstream.script(stream([*(event(c) for c in chunks), b"data: [DONE]\n\n"]))
    seen: dict[int, str] = {}
    for chunk in client.chat.completions.create(model="up-x", messages=[{"role": "user", "content": "hi"}], n=2, stream=True):
        for choice in chunk.choices:
            seen[choice.index] = seen.get(choice.index, "") + (choice.delta.content or "")
    assert seen == {0: "c0", 1: "c1"}
    assert process.record()["response"]["content"] == "c0"
