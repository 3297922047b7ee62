"""Ollama as a provider: what it is asked, what its lines say, and what clients of the router see of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import ollama
import openai
import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream, Received, Script, answer, chunks, end, error_answer, fin, json_answer, raw, stream_head
from hypothesis import given
from hypothesis import strategies as st
from ollama import _types as shapes
from router_process import RouterProcess, until
from wire_files import cases, cut, events, fold, heard, heard_in_pieces, read, written
from wire_files import raw as raw_file

import providers
from providers import BadRequest, Provider, UpstreamError, Usage
from providers import ollama as face

REQUESTS, ANSWERS = "ollama/requests", "ollama/answers"
PROVIDER = Provider("local", "ollama", "http://127.0.0.1:11434")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR4nGNgYGBgAAAABQABh6FO1AAAAABJRU5ErkJggg=="
CONFIG = """
[[providers]]
name = "local"
format = "ollama"
base_url = "{upstream}"
models = ["qwen3:8b"]
"""
TAGS = {"models": [{"name": "qwen3:8b", "model": "qwen3:8b", "size": 5, "digest": "d", "details": {"family": "qwen3"}}]}
SHOW = {"capabilities": ["completion", "tools", "thinking"], "details": {"family": "qwen3"}, "model_info": {}}


def user(content: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": content}]}


def lines_script(data: bytes) -> Script:
    """Newline-delimited JSON as Ollama sends it, a line per chunk."""
    return stream_head(headers={"Content-Type": "application/x-ndjson"}) + chunks(data.splitlines(keepends=True)) + end()


def ollama_that(says: Script | Callable[[Received], Script]) -> Callable[[Received], Script]:
    """An Ollama that knows one model and answers every chat alike."""
    known = {"/api/tags": json_answer(TAGS), "/api/show": json_answer(SHOW)}

    def speak(received: Received) -> Script:
        found = known.get(received.path, says)
        return found(received) if callable(found) else found

    return speak


# --- what it is asked


@pytest.mark.parametrize("case", cases(REQUESTS, ".client.json"))
def test_a_request_in_its_words(case: str) -> None:
    told = read(REQUESTS, f"{case}.client.json")
    call = face.build(heard("openai", told), told["model"], PROVIDER)
    asked = {"kind": call.kind, "dropped": call.dropped, "body": json.loads(call.body)}
    assert (call.method, call.path) == ("POST", "/api/chat")
    assert asked == read(REQUESTS, f"{case}.upstream.json")


@pytest.mark.parametrize("case", cases(REQUESTS, ".upstream.json"))
def test_its_own_client_takes_the_request_for_one_of_its_own(case: str) -> None:
    body = read(REQUESTS, f"{case}.upstream.json")["body"]
    known = shapes.ChatRequest.model_fields.keys() | {"stream"}
    assert body.keys() <= known
    shapes.ChatRequest.model_validate(body, strict=True)
    assert (body.get("options") or {}).keys() <= shapes.Options.model_fields.keys()


@pytest.mark.parametrize(
    ("format", "told", "param"),
    [
        ("openai", {**user("hi"), "n": 2}, "n"),
        ("openai", user([{"type": "image_url", "image_url": {"url": "https://host/a.png"}}]), "messages"),
        ("openai", user([{"type": "file", "file": {"file_data": "data:application/pdf;base64,JVBERi0="}}]), "messages"),
        ("openai", user([{"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}]), "messages"),
        ("responses", {"model": "m", "input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}, "input"),
        (
            "responses",
            {"model": "m", "input": [{"role": "user", "content": [{"type": "input_image", "image_url": "http://h/a"}]}]},
            "input",
        ),
    ],
)
def test_what_would_change_its_meaning_is_refused(format: str, told: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as refused:
        face.build(heard(format, told), "m", PROVIDER)
    assert refused.value.param == param
    assert param in refused.value.message


def test_an_image_in_a_tools_result_goes_along() -> None:
    result = [{"type": "input_text", "text": "seen"}, {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}"}]
    call = {"type": "function_call", "call_id": "c", "name": "look", "arguments": "{}"}
    told = {"model": "m", "input": [call, {"type": "function_call_output", "call_id": "c", "output": result}]}
    message = json.loads(face.build(heard("responses", told), "m", PROVIDER).body)["messages"][1]
    assert message == {"role": "tool", "content": "seen", "tool_name": "look", "tool_call_id": "c", "images": [PNG]}


def test_hosted_tools_are_left_out_and_noted() -> None:
    tools = [{"type": "web_search"}, {"type": "function", "name": "f", "parameters": {}, "strict": True}]
    call = face.build(heard("responses", {"model": "m", "input": "hi", "tools": tools}), "m", PROVIDER)
    assert [t["function"]["name"] for t in json.loads(call.body)["tools"]] == ["f"]
    assert call.dropped == ["strict", "tools"]


@pytest.mark.parametrize(
    ("base_url", "endpoint"),
    [
        ("http://host:11434", "http://host:11434"),
        ("http://host:11434/", "http://host:11434"),
        ("http://host:11434/v1", "http://host:11434"),
        ("http://host:11434/v1/", "http://host:11434"),
        ("http://host:11434/api", "http://host:11434"),
        ("http://host:11434/api/", "http://host:11434"),
        ("http://host:11434/api/chat", "http://host:11434"),
        ("http://host:11434/v1/chat/completions", "http://host:11434"),
        ("https://ollama.com", "https://ollama.com"),
        ("https://host/behind/ollama/api", "https://host/behind/ollama"),
        ("https://host/api/v1", "https://host/api"),
    ],
)
def test_every_address_of_it_that_people_write_is_understood(base_url: str, endpoint: str) -> None:
    assert face.endpoint(base_url) == endpoint


def embeddings(inputs: list[Any], **extra: Any) -> providers.Request:
    request = heard("openai", user("hi"))
    request.operation, request.inputs, request.extra = "embeddings", inputs, extra
    return request


def test_embeddings_are_asked_of_its_own_endpoint() -> None:
    call = face.build(embeddings(["a", "b"], dimensions=64, encoding_format="float"), "m", PROVIDER)
    assert (call.path, call.kind, call.dropped) == ("/api/embed", "ollama_embed", [])
    assert json.loads(call.body) == {"model": "m", "input": ["a", "b"], "dimensions": 64}
    shapes.EmbedRequest.model_validate_json(call.body)


def test_embeddings_of_tokens_are_refused() -> None:
    with pytest.raises(BadRequest) as refused:
        face.build(embeddings([[1, 2]]), "m", PROVIDER)
    assert refused.value.param == "input"


def test_embeddings_come_back_in_order() -> None:
    told = {"model": "m", "embeddings": [[0.5, 1.0], [2.0, 3.0]], "prompt_eval_count": 8, "load_duration": 2000000}
    shapes.EmbedResponse.model_validate(told)
    assert written(face.parse(json.dumps(told).encode(), embeddings(["a", "b"]))) == [
        {"event": "Begin", "model": "m"},
        {"event": "Vectors", "vectors": [[0.5, 1.0], [2.0, 3.0]]},
        {"event": "Used", "usage": {"input_tokens": 8}},
        {"event": "Timings", "load_ms": 2.0},
    ]


# --- what it says


@pytest.mark.parametrize("case", cases(ANSWERS, ".ndjson"))
def test_a_stream_in_the_routers_words(case: str) -> None:
    data = raw_file(ANSWERS, f"{case}.ndjson")
    assert heard_in_pieces(face.Parser(), [data]) == events(read(ANSWERS, f"{case}.events.json"))


@given(st.sampled_from(cases(ANSWERS, ".ndjson")), st.lists(st.integers(min_value=0, max_value=10**6), max_size=6))
def test_a_stream_cut_anywhere_says_the_same(case: str, places: list[int]) -> None:
    data = raw_file(ANSWERS, f"{case}.ndjson")
    assert heard_in_pieces(face.Parser(), cut(data, places)) == events(read(ANSWERS, f"{case}.events.json"))


@pytest.mark.parametrize("case", cases(ANSWERS, ".ndjson"))
def test_a_stream_without_its_last_newline_is_complete(case: str) -> None:
    data = raw_file(ANSWERS, f"{case}.ndjson")
    assert fold(heard_in_pieces(face.Parser(), [data[:-1]])) == fold(events(read(ANSWERS, f"{case}.events.json")))


@pytest.mark.parametrize("case", ["text", "thinking", "tools", "length"])
def test_a_whole_answer_says_what_its_stream_says(case: str) -> None:
    lines = [json.loads(line) for line in raw_file(ANSWERS, f"{case}.ndjson").splitlines()]
    messages = [line["message"] for line in lines]
    whole = {key: "".join(m.get(key, "") for m in messages) for key in ("content", "thinking")}
    calls = [call for m in messages for call in m.get("tool_calls", ())]
    told = {**lines[-1], "message": {"role": "assistant", **whole, "tool_calls": calls}}
    shapes.ChatResponse.model_validate(told)
    expected = fold(events(read(ANSWERS, f"{case}.events.json")))
    found = fold(face.parse(json.dumps(told).encode(), heard("openai", user("hi"))))
    assert {**found, "calls": [c[1:] for c in found["calls"]]} == {**expected, "calls": [c[1:] for c in expected["calls"]]}


def test_calls_without_an_id_get_one_that_no_other_call_has() -> None:
    calls = [e.id for e in events(read(ANSWERS, "tools.events.json")) if isinstance(e, providers.ToolCall)]
    assert len(set(calls)) == 3
    later = raw_file(ANSWERS, "tools.ndjson").replace(b"10:00:00.123456789Z", b"10:00:07.123456789Z")
    again = [e.id for e in heard_in_pieces(face.Parser(), [later]) if isinstance(e, providers.ToolCall)]
    assert not {*calls[:2]} & {*again[:2]}, "the same call a moment later is another call"


@pytest.mark.parametrize("case", cases(ANSWERS, ".ndjson"))
def test_its_own_client_reads_the_same_text(case: str, upstream: FakeUpstream) -> None:
    upstream.default = lines_script(raw_file(ANSWERS, f"{case}.ndjson"))
    with ollama.Client(host=upstream.url) as client:
        seen = list(client.chat("qwen3:8b", [{"role": "user", "content": "hi"}], stream=True))
    expected = fold(events(read(ANSWERS, f"{case}.events.json")))
    assert "".join(part.message.content or "" for part in seen) == expected["text"]
    assert "".join(part.message.thinking or "" for part in seen) == "".join(b["thinking"] for b in expected["thinking"])
    names = [call.function.name for part in seen for call in part.message.tool_calls or ()]
    assert names == [name for _, name, _ in expected["calls"]]
    assert (seen[-1].eval_count or 0) == (expected["usage"] or Usage()).output_tokens
    assert seen[-1].done


@pytest.mark.parametrize(
    "said", [b'{"error":"an error was encountered while running the model"}', b'{"error":{"message":"bad"}}']
)
def test_an_error_in_a_stream_is_the_providers_failure(said: bytes) -> None:
    first = raw_file(ANSWERS, "text.ndjson").splitlines(keepends=True)[0]
    parser = face.Parser()
    assert parser.feed(first)
    with pytest.raises(UpstreamError) as failed:
        parser.feed(said + b"\n")
    assert failed.value.code == "upstream_in_band_error"
    assert failed.value.detail is not None
    assert failed.value.detail["message"] in ("an error was encountered while running the model", "bad")


@pytest.mark.parametrize(
    ("said", "what"),
    [
        (b"", "not JSON"),
        (b"[]", "not JSON"),
        (b'{"model":"m","done":true}', "without a message"),
        (b'{"message":{"content":"half"},"done":false}', "without an end"),
        (b'{"error":"no"}', "reported an error"),
    ],
)
def test_a_whole_answer_that_is_none_is_the_providers_failure(said: bytes, what: str) -> None:
    with pytest.raises(UpstreamError, match=what):
        face.parse(said, heard("openai", user("hi")))


def test_a_line_that_is_not_json_is_told_apart() -> None:
    assert written(heard_in_pieces(face.Parser(), [b"<html>\n"])) == [{"event": "Malformed", "what": "a line that is not JSON"}]


@pytest.mark.parametrize("said", [b'{"message":7,"done":true}\n', b'{"message":{"tool_calls":[{"function":{}}]}}\n'])
def test_a_line_of_another_shape_is_told_apart(said: bytes) -> None:
    assert [type(e) for e in heard_in_pieces(face.Parser(), [said])] == [providers.Malformed]


def test_its_error_object_is_read_and_keys_are_taken_out() -> None:
    assert face.parse_error({"error": 'model "x" not found'}) == {"message": 'model "x" not found'}
    assert face.parse_error({"error": "key sk-proj-0123456789abcdefghij is wrong"}) == {"message": "key [redacted] is wrong"}
    assert face.parse_error({"error": 7}) is None
    assert face.parse_error({}) is None


# --- what it has and can


def test_its_models_and_what_they_can_do(upstream: FakeUpstream) -> None:
    upstream.default = ollama_that(json_answer({}))
    with ollama.Client(host=upstream.url) as client:
        assert face.parse_models(TAGS) == [m.model for m in client.list().models] == ["qwen3:8b"]
        able = set(client.show("qwen3:8b").capabilities or ())
    assert face.parse_capabilities(SHOW) == able == {"completion", "tools", "thinking"}
    by_client = [(r.method, r.path) for r in upstream.requests]
    calls = [face.models_call(), face.capabilities_call("qwen3:8b")]
    assert [(c.method, c.path) for c in calls] == by_client
    assert json.loads(calls[1].body) == {"model": "qwen3:8b"}


def test_an_old_version_tells_no_capabilities() -> None:
    assert face.parse_capabilities({"details": {}}) == set()
    assert face.parse_models({"models": [{"name": "old:latest"}]}) == ["old:latest"]


# --- through the router


@pytest.fixture
def process(router: RouterFactory, upstream: FakeUpstream) -> RouterProcess:
    upstream.default = ollama_that(lambda received: chat(received, "text"))
    return router(providers=CONFIG)


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


def chat(received: Received, case: str) -> Script:
    """The answer of a case, as a stream or whole, as asked for."""
    data = raw_file(ANSWERS, f"{case}.ndjson")
    if received.json()["stream"]:
        return lines_script(data)
    lines = [json.loads(line) for line in data.splitlines()]
    text = "".join(line["message"]["content"] for line in lines)
    calls = [call for line in lines for call in line["message"].get("tool_calls", ())]
    return json_answer({**lines[-1], "message": {"role": "assistant", "content": text, "tool_calls": calls}})


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model="qwen3:8b", messages=[{"role": "user", "content": "hi"}], **more)


def test_an_openai_client_gets_a_whole_answer(client: openai.OpenAI, process: RouterProcess) -> None:
    completion = ask(client, user="me")
    assert completion.choices[0].message.content == "Hello wörld 😀"
    assert completion.choices[0].finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (26, 290)
    record = process.record()
    assert (record["provider_format"], record["attempts"][0]["kind"]) == ("ollama", "ollama_chat")
    assert record["dropped"] == ["user"]
    assert record["response"]["native_finish_reason"] == "stop"


def test_an_openai_client_gets_a_stream(client: openai.OpenAI, process: RouterProcess) -> None:
    with ask(client, stream=True, stream_options={"include_usage": True}) as stream:
        seen = list(stream)
    assert "".join(e.choices[0].delta.content or "" for e in seen if e.choices) == "Hello wörld 😀"
    assert seen[-1].usage.completion_tokens == 290
    record = process.record()
    assert record["outcome"] == "ok"
    assert record["usage_source"] == "reported"
    assert (record["response"]["usage"]["input_tokens"], record["response"]["model"]) == (26, "qwen3:8b")


def test_where_the_time_went_is_kept(client: openai.OpenAI, process: RouterProcess) -> None:
    ask(client)
    timings = process.record()["attempts"][0]["timings"]
    assert timings == {"load_ms": 1525.959, "prefill_ms": 325.953, "decode_ms": 4709.213}


@pytest.mark.parametrize("stream", [False, True])
def test_parallel_calls_reach_an_openai_client(client: openai.OpenAI, upstream: FakeUpstream, stream: bool) -> None:
    upstream.default = ollama_that(lambda received: chat(received, "tools"))
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    answer = ask(client, stream=stream, tools=tools)
    choices = [e.choices[0] for e in answer] if stream else answer.choices
    said = [choice.delta if stream else choice.message for choice in choices]
    calls = [call for message in said for call in message.tool_calls or ()]
    assert [call.function.name for call in calls] == ["weather", "now", "weather"]
    assert [json.loads(call.function.arguments) for call in calls] == [{"city": "Paris"}, {}, {"city": "Rome"}]
    assert choices[-1].finish_reason == "tool_calls"


def test_a_failure_in_the_stream_reaches_an_openai_client(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    first = raw_file(ANSWERS, "text.ndjson").splitlines(keepends=True)[0]
    upstream.default = ollama_that(lines_script(first + b'{"error":"out of memory"}\n'))
    with pytest.raises(openai.APIError), ask(client, stream=True) as stream:
        assert [e.choices[0].delta.content for e in stream] == ["Hello"], "and then it raises"


def test_a_stream_that_breaks_off_is_not_complete(client: openai.OpenAI, upstream: FakeUpstream, process: RouterProcess) -> None:
    first = raw_file(ANSWERS, "text.ndjson").splitlines(keepends=True)[0]
    upstream.default = ollama_that(stream_head("close") + raw(first) + fin())
    with pytest.raises(openai.APIError), ask(client, stream=True) as stream:
        list(stream)
    record = process.record()
    assert (record["outcome"], record["response"]["content"]) == ("error", "Hello")


def test_a_model_it_does_not_have_is_the_clients_error(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.default = ollama_that(answer(b'{"error":"model \'qwen3:8b\' not found"}', 404))
    with pytest.raises(openai.NotFoundError, match="model 'qwen3:8b' not found"):
        ask(client)


def test_what_it_cannot_be_told_is_the_clients_error(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, n=2)
    assert refused.value.param == "n"
    assert not [r for r in upstream.requests if r.path == "/api/chat"]


def test_its_models_are_found_and_listed(router: RouterFactory, upstream: FakeUpstream) -> None:
    upstream.default = ollama_that(error_answer(500))
    process = router(providers=CONFIG.replace('models = ["qwen3:8b"]', ""))
    found = until(lambda: process.get("/v1/models").json()["data"], 10, "the model is listed")
    assert [(m["id"], m["owned_by"]) for m in found] == [("qwen3:8b", "local")]


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/api", "/api/"])
def test_every_form_of_its_address_reaches_it(router: RouterFactory, upstream: FakeUpstream, ending: str) -> None:
    upstream.default = ollama_that(lambda received: chat(received, "text"))
    process = router(providers=CONFIG.replace("{upstream}", "{upstream}" + ending))
    assert process.chat(model="qwen3:8b").status == 200
    assert [r.path for r in upstream.requests if "chat" in r.path] == ["/api/chat"]
