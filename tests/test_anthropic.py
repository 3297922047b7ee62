"""Anthropic's language, both faces: what the golden files do not show, and the official package before the router."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
import tiny_llama
from anthropic.types import MessageTokensCount
from conftest import RouterFactory
from fake_upstream import FakeUpstream, chunks, end, fin, hold, json_answer, openai_chunks, stream, stream_head
from router_process import INBOUND_KEY, PROVIDER_KEY, RouterProcess
from tiny_llama import LlamaServer
from wire_files import fold, heard, heard_in_pieces, raw

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
from providers import anthropic as claude

UP = Provider("up", "anthropic", "https://api.anthropic.com")
STAMP = Stamp("aaaabbbbccccddddeeee", 1700000000, "sent-model")
HI: dict[str, Any] = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
AUDIO = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
TOOL: dict[str, Any] = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}


def told(model: str = "sent-model", provider: Provider = UP, **more: Any) -> Call:
    """What an OpenAI client's request becomes."""
    return claude.build(heard("openai", {**CHAT, **more}), model, provider)


def body_of(call: Call) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call.body)
    return found


def said(data: bytes) -> list[dict[str, Any]]:
    return [json.loads(line[6:]) for line in data.decode().split("\n") if line.startswith("data: ")]


# --- where it goes


@pytest.mark.parametrize(
    "base",
    ["https://a.example", "https://a.example/", "https://a.example/v1", "https://a.example/v1/", "https://a.example/v1/messages"],
)
def test_every_way_to_write_the_address_is_the_same_address(base: str) -> None:
    assert claude.endpoint(base) == "https://a.example/v1"


def test_a_path_before_v1_is_kept() -> None:
    assert claude.endpoint("https://a.example/anthropic") == "https://a.example/anthropic/v1"


def test_the_version_is_ours_unless_somebody_says_another() -> None:
    request = heard("anthropic", HI)
    named = Provider("up", "anthropic", UP.base_url, headers={"Anthropic-Version": "2024-01-01", "anthropic-beta": "c"})
    assert claude.build(request, "m", UP).headers == {"anthropic-version": "2023-06-01"}
    assert claude.build(request, "m", named).headers == {"anthropic-version": "2024-01-01", "anthropic-beta": "c"}
    request.headers = {"anthropic-version": "2026-10-21", "anthropic-beta": "a,b"}
    assert claude.build(request, "m", named).headers == {"anthropic-version": "2026-10-21", "anthropic-beta": "a,b,c"}


def test_a_header_that_could_not_be_sent_is_not_taken_over() -> None:
    request = heard("anthropic", HI)
    request.headers = {"anthropic-beta": "a\r\nx-api-key: b", "anthropic-version": "\u2028"}
    assert claude.build(request, "m", UP).headers == {"anthropic-version": "2023-06-01"}


# --- the same language


def test_the_clients_bytes_go_on_but_for_the_model() -> None:
    text = (
        '{ "model":"mine", "max_tokens" : 1e1,\n "messages":[{"role":"user","content":"h\\u00ef"}], "new":{"a":[1.0]},'
        ' "plugins":[], "trace":{"a":1}, "session_id":"s" }'
    )
    text = text.replace("1e1", "10")
    request = claude.parse_request(Body(text.encode()), {})
    call = claude.build(request, "theirs", UP)
    assert (call.path, call.kind, call.dropped) == ("/messages", "anthropic_messages", [])
    assert call.body.decode() == (
        '{"model":"theirs","max_tokens" : 10,"messages":[{"role":"user","content":"h\\u00ef"}],"new":{"a":[1.0]}}'
    )
    onward = Provider("up", "anthropic", UP.base_url, forward_metadata=True)
    assert body_of(claude.build(request, "theirs", onward)).keys() == {
        "model", "max_tokens", "messages", "new", "trace", "session_id",
    }  # fmt: skip


def test_thinking_that_the_router_made_up_for_another_provider_is_not_shown_to_anthropic() -> None:
    made = {"type": "thinking", "thinking": "hm", "signature": ""}
    real = {"type": "thinking", "thinking": "hm", "signature": "c2ln"}
    turns = [{"role": "assistant", "content": c} for c in ([made, real, {"type": "text", "text": "a"}], [made], "b")]
    call = claude.build(heard("anthropic", {**HI, "messages": [*HI["messages"], *turns]}), "m", UP)
    assert [m["content"] for m in body_of(call)["messages"]] == ["hi", [real, {"type": "text", "text": "a"}], "b"]
    assert call.dropped == ["thinking"]


def test_thinking_of_its_own_goes_on_as_it_came() -> None:
    turn = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "c2ln"}]}
    body = {**HI, "messages": [*HI["messages"], turn]}
    assert claude.build(heard("anthropic", body), "m", UP).body == json.dumps(body).encode()


# --- what is refused


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"model": ""}, "model"),
        ({"model": None}, "model"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].source"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "?"}}]}]},
            "messages[0].content[0].source.type",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "tool_result"}]}]}, "messages[0].content[0].tool_use_id"),
        ({"system": [{"type": "image", "source": {"type": "url", "url": "u"}}]}, "system"),
        ({"system": 5}, "system"),
        ({"tools": [{"name": "x"}]}, "tools[0].input_schema"),
        ({"tools": [{"input_schema": {}}]}, "tools[0].name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"thinking": {"type": "enabled"}}, "thinking.budget_tokens"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format"),
        ({"metadata": {"user_id": 5}}, "metadata.user_id"),
        ({"stop_sequences": "END"}, "stop_sequences"),
        ({"stop_sequences": [1]}, "stop_sequences"),
        ({"session_id": "x" * 257}, "session_id"),
    ],
)
def test_a_request_that_cannot_be_is_refused_by_name(change: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        heard("anthropic", {**HI, **change})
    assert caught.value.param == param and param.split("[")[0].split(".")[0] in caught.value.message


def test_a_token_count_needs_no_limit() -> None:
    request = claude.parse_count_tokens(Body(json.dumps({**CHAT, "stream": True}).encode()), {})
    assert (request.operation, request.stream) == ("count_tokens", False)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"messages": [{"role": "user", "content": [AUDIO]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "file-1"}}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages"),
    ],
)  # fmt: skip
def test_what_anthropic_cannot_do_and_would_change_the_meaning_is_refused(more: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        told(**more)
    assert caught.value.param == param


# --- what depends on the model


@pytest.mark.parametrize(
    ("model", "generation"),
    [
        ("claude-opus-4-7", (4, 7)), ("claude-sonnet-4-20250514", (4, 0)), ("claude-haiku-4-5-20251001", (4, 5)),
        ("claude-3-7-sonnet-20250219", (3, 7)), ("claude-fable-5", (5, 0)), ("anthropic/claude-4.7-opus", (4, 7)),
        ("us.anthropic.claude-opus-4-1-20250805-v1:0", (4, 1)), ("claude-opus-4@20250514", (4, 0)),
        ("claude-mythos-preview", None), ("glm-4.6", None), ("fake-model", None),
    ],
)  # fmt: skip
def test_the_generation_of_a_model_is_in_its_name(model: str, generation: tuple[int, int] | None) -> None:
    assert claude.generation(model) == generation


@pytest.mark.parametrize(
    ("effort", "budget"), [("minimal", 1024), ("low", 4096), ("medium", 16384), ("high", 32768), ("max", 64000 - 1024)]
)
def test_effort_is_a_budget_of_tokens(effort: str, budget: int) -> None:
    body = body_of(told(reasoning_effort=effort))
    assert body["thinking"] == {"type": "enabled", "budget_tokens": budget}
    assert budget < body["max_tokens"] <= 64000


@pytest.mark.parametrize(("effort", "level"), [("minimal", "low"), ("medium", "medium"), ("xhigh", "xhigh"), ("max", "max")])
def test_models_that_decide_for_themselves_are_told_the_effort(effort: str, level: str) -> None:
    call = told("claude-opus-4-8", reasoning_effort=effort, temperature=0, top_p=0.5)
    assert body_of(call)["thinking"] == {"type": "adaptive", "display": "summarized"}
    assert body_of(call)["output_config"] == {"effort": level}
    assert not {"temperature", "top_p"} & body_of(call).keys()
    assert call.dropped == ["temperature", "top_p"]


def test_a_limit_of_nothing_is_a_limit() -> None:
    """With 0 Anthropic fills its cache and says nothing."""
    request = heard("anthropic", {**HI, "max_tokens": 0})
    request.changed = True
    assert body_of(claude.build(request, "m", UP))["max_tokens"] == 0


def test_no_thinking_is_said_as_well() -> None:
    assert body_of(told(reasoning_effort="none"))["thinking"] == {"type": "disabled"}
    assert "thinking" not in body_of(told())


@pytest.mark.parametrize("model", ["claude-sonnet-4-5", "claude-opus-4-8"])
def test_nothing_is_thought_where_a_tool_is_forced(model: str) -> None:
    call = told(model, reasoning_effort="high", tools=[TOOL], tool_choice="required")
    assert "thinking" not in body_of(call) and call.dropped == ["reasoning"]


def test_a_limit_too_small_for_any_thought_wins() -> None:
    call = told(reasoning_effort="high", max_tokens=1024)
    assert "thinking" not in body_of(call) and call.dropped == ["reasoning"]


def test_where_thought_is_given_a_budget_sampling_is_left_to_the_model() -> None:
    call = told(reasoning_effort="low", temperature=0.5)
    assert "temperature" not in body_of(call) and call.dropped == ["temperature"]


def test_newer_models_take_one_of_temperature_and_top_p() -> None:
    call = told("claude-sonnet-4-5", temperature=0.5, top_p=0.9)
    assert (body_of(call)["temperature"], call.dropped) == (0.5, ["top_p"])
    assert body_of(told("claude-sonnet-4-5", top_p=0.9))["top_p"] == 0.9
    assert {"temperature", "top_p"} <= body_of(told("claude-3-5-haiku-latest", temperature=0.5, top_p=0.9)).keys()


def test_older_models_are_asked_in_words_for_an_answer_like_a_schema() -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}
    tool = {"type": "function", "function": {**TOOL["function"], "strict": True}}
    call = told("claude-3-5-haiku-latest", response_format=form, tools=[tool])
    assert body_of(call)["system"] == (
        'Answer with one JSON object and nothing else. It must match this JSON schema: {"type":"object"}'
    )
    assert "strict" not in body_of(call)["tools"][0] and call.dropped == ["response_format", "strict"]


# --- what else is left out, and noted


def test_what_looks_like_an_address_is_no_user_id() -> None:
    assert body_of(told(user="user-7"))["metadata"] == {"user_id": "user-7"}
    assert told(user="ann@example.com").dropped == told(user="+49 (30) 123456").dropped == ["user"]
    assert body_of(told(safety_identifier="abc"))["metadata"] == {"user_id": "abc"}


def test_tools_that_run_at_their_vendors_are_left_out_with_the_choice_of_them() -> None:
    request = heard("openai", {**CHAT, "tools": [TOOL, {"type": "web_search"}]})
    request.tool_choice = "tool:web_search"
    call = claude.build(request, "m", UP)
    assert [t["name"] for t in body_of(call)["tools"]] == ["look"]
    assert "tool_choice" not in body_of(call) and call.dropped == ["tools", "tool_choice"]


def test_tiers_that_anthropic_has_not_are_noted() -> None:
    assert told(service_tier="flex").dropped == ["service_tier"]
    assert body_of(told(service_tier="auto"))["service_tier"] == "auto"


def test_a_document_of_text_is_text() -> None:
    part = {"type": "file", "file": {"filename": "a.md", "file_data": "IyBoaQ=="}}
    source = body_of(told(messages=[{"role": "user", "content": [part]}]))["messages"][0]["content"][0]["source"]
    assert source == {"type": "text", "media_type": "text/plain", "data": "# hi"}
    broken = {"type": "file", "file": {"filename": "a.md", "file_data": "IyBoaQ="}}
    with pytest.raises(BadRequest, match="base64"):
        told(messages=[{"role": "user", "content": [broken]}])


# --- counting tokens


def test_only_what_is_counted_is_asked_of_the_counter() -> None:
    request = claude.parse_count_tokens(Body(json.dumps({**HI, "temperature": 0.5, "system": "s"}).encode()), {})
    assert json.loads(claude.build(request, "m", UP).body) == {**HI, "temperature": 0.5, "system": "s"}  # its own words
    request.changed = True
    call = claude.build(request, "m", UP)
    assert (call.path, call.kind) == ("/messages/count_tokens", "anthropic_count_tokens")
    assert body_of(call).keys() == {"model", "messages", "system"}


def test_a_count_is_an_answer() -> None:
    request = claude.parse_count_tokens(Body(json.dumps(HI).encode()), {})
    answer = Answer()
    for event in claude.parse(b'{"input_tokens": 42}', request):
        answer.add(event)
    assert claude.render(answer, request, STAMP) == {"input_tokens": 42}
    MessageTokensCount.model_validate(claude.render(answer, request, STAMP), strict=True)
    with pytest.raises(UpstreamError):
        claude.parse(b'{"input_tokens": "42"}', request)


# --- answers


def render(*events: Any, request: Request | None = None) -> list[dict[str, Any]]:
    renderer = claude.Renderer(request or heard("anthropic", HI), STAMP)
    return said(b"".join([*(renderer.feed(e) for e in events), renderer.end()]))


def test_a_stream_begins_with_the_input_tokens_where_they_are_known() -> None:
    first = render(Begin("1", "m"), Used(Usage(9, 1, 2, 3)), Text("a"))[0]["message"]["usage"]
    assert (first["input_tokens"], first["cache_read_input_tokens"], first["cache_creation_input_tokens"]) == (4, 2, 3)


def test_counts_that_nobody_told_are_estimated() -> None:
    request = heard("anthropic", {**HI, "messages": [{"role": "user", "content": "x" * 40}]})
    assert render(Begin(), Text("y" * 8), request=request)[-2]["usage"]["input_tokens"] == 10
    assert render(Begin(), Text("y" * 8), request=request)[-2]["usage"]["output_tokens"] == 2
    answer = Answer()
    answer.add(Text("y" * 8))
    usage = claude.render(answer, request, STAMP)["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (10, 2)


def test_calls_come_out_live_as_long_as_they_come_in_one_after_the_other() -> None:
    renderer = claude.Renderer(heard("anthropic", HI), STAMP)
    renderer.feed(ToolCall(0, "a", "look"))
    assert said(renderer.feed(ToolCall(0, arguments='{"x": "}')))[0]["delta"]["partial_json"] == '{"x": "}'
    assert renderer.feed(ToolCall(1, "b", "look")) == b""  # the first is not whole yet
    assert renderer.feed(ToolCall(1, arguments="{}")) == b""
    assert [e["type"] for e in said(renderer.feed(ToolCall(0, arguments='"}')))] == ["content_block_delta"]
    late = said(renderer.feed(ToolCall(2, "c", "look")))
    assert [(e["type"], e["index"]) for e in late] == [
        ("content_block_stop", 0), ("content_block_start", 1), ("content_block_delta", 1), ("content_block_stop", 1),
        ("content_block_start", 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("events", "reason", "sequence"),
    [
        ([Finish("stop", "stop")], "end_turn", None),
        ([Finish("stop", "stop_sequence", "END")], "stop_sequence", "END"),
        ([Finish("length")], "max_tokens", None),
        ([Finish("content_filter")], "refusal", None),
        ([ToolCall(0, "a", "look", "{}"), Finish("stop")], "tool_use", None),
        ([ToolCall(0, "a", "look", "{"), Finish("length")], "max_tokens", None),
        ([Finish("tool_calls")], "end_turn", None),
        ([], "end_turn", None),
    ],
)
def test_every_reason_to_stop_has_its_word(events: list[Any], reason: str, sequence: str | None) -> None:
    answer = Answer()
    for event in events:
        answer.add(event)
    whole = claude.render(answer, heard("anthropic", HI), STAMP)
    assert (whole["stop_reason"], whole["stop_sequence"]) == (reason, sequence)
    streamed = next(e for e in render(Begin(), *events) if e["type"] == "message_delta")["delta"]
    assert (streamed["stop_reason"], streamed["stop_sequence"]) == (reason, sequence)


def test_signed_thoughts_stay_apart() -> None:
    blocks = render(
        Reasoning("a"), Reasoning(signature="1"), Reasoning("b", "2"), Reasoning(redacted="r"), Reasoning("c"), Text("t")
    )
    starts = [e["content_block"] for e in blocks if e["type"] == "content_block_start"]
    assert [(b["type"], b.get("data")) for b in starts] == [
        ("thinking", None), ("thinking", None), ("redacted_thinking", "r"), ("thinking", None), ("text", None),
    ]  # fmt: skip
    deltas = [(e["index"], e["delta"].get("signature")) for e in blocks if e["type"] == "content_block_delta"]
    assert [d for d in deltas if d[1]] == [(0, "1"), (1, "2")]


def test_a_block_that_could_not_be_read_ends_a_translated_stream() -> None:
    renderer = claude.Renderer(heard("anthropic", HI), STAMP)
    with pytest.raises(UpstreamError, match="a chunk that is not JSON"):
        renderer.feed(Malformed("a chunk that is not JSON"))


def test_an_event_nobody_knows_yet_is_nothing() -> None:
    parser = claude.Parser()
    assert (
        heard_in_pieces(parser, [b'event: news\ndata: {"type": "news"}\n\n: comment\n\nevent: ping\ndata: {"type": "ping"}\n\n'])
        == []
    )


def test_the_last_report_of_tokens_keeps_what_it_does_not_repeat() -> None:
    told = fold(heard_in_pieces(claude.Parser(), [raw("anthropic/answers", "cached.upstream.sse")]))
    assert told["usage"] == Usage(130, 9, 100, 20, 4)


# --- errors


@pytest.mark.parametrize(
    ("kind", "type_"),
    [
        ("invalid_request", "invalid_request_error"),
        ("authentication", "authentication_error"),
        ("permission", "permission_error"),
        ("not_found", "not_found_error"),
        ("too_large", "request_too_large"),
        ("rate_limit", "rate_limit_error"),
        ("overloaded", "overloaded_error"),
        ("upstream", "api_error"),
        ("timeout", "timeout_error"),
        ("internal", "api_error"),
    ],
)
def test_every_kind_of_error_has_its_type(kind: str, type_: str) -> None:
    assert claude.render_error(RequestError("m", kind=kind))["error"] == {"type": type_, "message": "m", "src": "router"}


@pytest.mark.parametrize(
    ("detail", "type_"),
    [
        ({"message": "no", "type": "overloaded_error"}, "overloaded_error"),
        ({"message": "no", "type": "server_error", "param": None}, "rate_limit_error"),
        ({"message": "no"}, "rate_limit_error"),
    ],
)
def test_what_a_provider_said_is_told_in_anthropics_types(detail: dict[str, Any], type_: str) -> None:
    error = UpstreamError("the provider is rate limited (429)", kind="rate_limit", detail=detail)
    assert claude.render_error(error)["error"] == {"type": type_, "message": "no"}


def test_an_error_in_the_stream_is_the_providers_failure() -> None:
    event = {"type": "error", "error": {"type": "overloaded_error", "message": "busy, key sk-ant-api03-" + "x" * 80}}
    with pytest.raises(UpstreamError) as caught:
        heard_in_pieces(claude.Parser(), [f"event: error\ndata: {json.dumps(event)}\n\n".encode()])
    assert caught.value.detail and caught.value.detail["type"] == "overloaded_error"
    assert "sk-ant" not in caught.value.detail["message"]


# --- the official package before the router

CONFIGURED = """
[[providers]]
name = "claude"
format = "anthropic"
base_url = "{upstream}"
api_key_env = "CLAUDE_KEY"
models = ["claude-x"]
headers = { anthropic-beta = "from-config" }

[[providers]]
name = "gpt"
format = "openai"
base_url = "{upstream}/v1"
idle_timeout = 5
"""
PREFIXES = """
[[routers]]
type = "prefix"
model_prefix = "claude-"
provider = "claude"

[[routers]]
type = "prefix"
model_prefix = "gpt-"
provider = "gpt"
"""


@pytest.fixture
def process(router: RouterFactory) -> RouterProcess:
    return router(providers=CONFIGURED, rules=PREFIXES, environment={"CLAUDE_KEY": PROVIDER_KEY})


@pytest.fixture
def client(process: RouterProcess) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=process.url, api_key="unused", max_retries=0, timeout=15) as made:
        yield made


def ask(client: anthropic.Anthropic, model: str, **more: Any) -> Any:
    return client.messages.create(model=model, max_tokens=50, messages=[{"role": "user", "content": "hi"}], **more)


def test_a_stream_passes_through_as_it_came(process: RouterProcess, upstream: FakeUpstream) -> None:
    sent = raw("anthropic/answers", "server_tools.upstream.sse").replace(b'"type": "ping"', b'"type": "ping", "new": 1')
    upstream.script(stream([sent[:100], sent[100:150], sent[150:]]))
    got = process.post("/v1/messages?beta=true", {**HI, "model": "claude-x", "stream": True}, {"anthropic-beta": "from-client"})
    assert (got.status, got.body) == (200, sent)
    asked = upstream.posts[0]
    assert (asked.path, asked.header("x-api-key"), asked.header("authorization")) == ("/v1/messages", PROVIDER_KEY, None)
    assert (asked.header("anthropic-version"), asked.header("anthropic-beta")) == ("2023-06-01", "from-client,from-config")
    record = process.record()
    assert (record["outcome"], record["client_format"], record["provider_format"]) == ("ok", "anthropic", "anthropic")
    assert record["response"]["content"] == "Found" and record["attempts"][0]["kind"] == "anthropic_stream"


def test_the_package_says_which_version_it_speaks(client: anthropic.Anthropic, upstream: FakeUpstream) -> None:
    upstream.script(json_answer(json.loads(raw("anthropic/answers", "whole_text.upstream.json"))))
    message = ask(client, "claude-x")
    assert (message.id, message.content[0].text, message.usage.input_tokens) == ("msg_2", "Hi", 10)
    assert upstream.posts[0].header("anthropic-version") == client.default_headers["anthropic-version"]


def test_usage_counts_cached_tokens_once_in_the_record_and_apart_for_the_client(
    client: anthropic.Anthropic, process: RouterProcess, upstream: FakeUpstream
) -> None:
    usage = {"prompt_tokens": 100, "completion_tokens": 5, "total_tokens": 105, "prompt_tokens_details": {"cached_tokens": 90}}
    upstream.script(stream(openai_chunks("a b", usage)))
    with client.messages.stream(model="gpt-x", max_tokens=50, messages=[{"role": "user", "content": "hi"}]) as events:
        message = events.get_final_message()
    assert (message.usage.input_tokens, message.usage.cache_read_input_tokens, message.usage.output_tokens) == (10, 90, 5)
    assert process.record()["response"]["usage"]["input_tokens"] == 100


def test_tokens_are_counted_by_the_provider_that_can_and_estimated_elsewhere(
    client: anthropic.Anthropic, upstream: FakeUpstream
) -> None:
    upstream.script(json_answer({"input_tokens": 77}))
    messages: Any = [{"role": "user", "content": "x" * 40}]
    counted = client.messages.with_raw_response.count_tokens(model="claude-x", messages=messages)
    assert counted.parse().input_tokens == 77 and "x-router-usage-source" not in counted.headers
    assert upstream.posts[0].path == "/v1/messages/count_tokens"
    estimated = client.messages.with_raw_response.count_tokens(model="gpt-x", messages=messages)
    assert (estimated.parse().input_tokens, estimated.headers["x-router-usage-source"]) == (10, "estimated")
    assert len(upstream.posts) == 1


@pytest.mark.parametrize(
    ("status", "raised"),
    [(400, anthropic.BadRequestError), (404, anthropic.NotFoundError), (429, anthropic.RateLimitError)],
)
def test_a_refusal_by_the_provider_is_the_packages_own_error(
    client: anthropic.Anthropic, upstream: FakeUpstream, status: int, raised: type[anthropic.APIStatusError]
) -> None:
    told = {"type": "error", "error": {"type": "invalid_request_error", "message": "because"}, "request_id": "req_1"}
    upstream.script(json_answer(told, status, {"Retry-After": "3"}))
    with pytest.raises(raised, match="because") as caught:
        ask(client, "claude-x")
    assert caught.value.response.headers.get("retry-after") == ("3" if status == 429 else None)


def test_a_request_that_cannot_be_is_the_packages_own_error(client: anthropic.Anthropic, upstream: FakeUpstream) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"tool_choice\.name") as caught:
        ask(client, "claude-x", tool_choice={"type": "tool"})
    assert caught.value.body["error"]["src"] == "router"  # type: ignore[index]
    with pytest.raises(anthropic.NotFoundError, match="nobody-serves-this"):
        ask(client, "nobody-serves-this")
    assert upstream.requests == []


def test_a_wrong_key_is_the_packages_own_error(router: RouterFactory) -> None:
    process = router(server='api_key_env = "ROUTER_KEY"', environment={"ROUTER_KEY": INBOUND_KEY})
    with (
        anthropic.Anthropic(base_url=process.url, api_key="wrong", max_retries=0) as client,
        pytest.raises(anthropic.AuthenticationError),
    ):
        ask(client, "m")


def test_an_error_in_mid_stream_is_raised_by_the_package(
    client: anthropic.Anthropic, process: RouterProcess, upstream: FakeUpstream
) -> None:
    told = {"error": {"message": "the model fell over", "type": "server_error", "param": None, "code": None}}
    heard_all, seen = threading.Event(), ""
    broken = chunks([b"data: " + json.dumps(told).encode() + b"\n\n"]) + end()
    upstream.script(stream_head() + chunks(openai_chunks("a b c", done=False, finish=None)) + hold(heard_all) + broken)
    with (
        pytest.raises(anthropic.APIStatusError, match="the model fell over"),
        client.messages.stream(model="gpt-x", max_tokens=50, messages=[{"role": "user", "content": "hi"}]) as events,
    ):
        for text in events.text_stream:
            seen += text
            if seen == "a b c":
                heard_all.set()
    assert seen == "a b c"
    record = process.record()
    assert (record["outcome"], record["error_type"], record["response"]["content"]) == (
        "error",
        "upstream_in_band_error",
        "a b c",
    )


def test_a_chunk_of_garbage_ends_a_translated_stream_in_an_error(client: anthropic.Anthropic, upstream: FakeUpstream) -> None:
    upstream.script(stream([*openai_chunks("a b", done=False, finish=None), b"data: {garbage\n\n", *openai_chunks("c")]))
    with (
        pytest.raises(anthropic.APIStatusError, match="not JSON"),
        client.messages.stream(model="gpt-x", max_tokens=50, messages=[{"role": "user", "content": "hi"}]) as events,
    ):
        events.get_final_message()


def test_a_stream_that_breaks_off_never_looks_complete(process: RouterProcess, upstream: FakeUpstream) -> None:
    sent = raw("anthropic/answers", "text.upstream.sse")
    upstream.script(stream_head() + chunks([sent[: sent.index(b"event: message_delta")]]) + fin())
    got = process.post("/v1/messages", {**HI, "model": "claude-x", "stream": True})
    assert b"message_stop" not in got.body
    last = said(got.body)[-1]
    assert last["type"] == "error" and last["error"]["src"] == "router"


def test_a_provider_that_speaks_another_language_than_configured_is_a_failure(
    client: anthropic.Anthropic, upstream: FakeUpstream
) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("a b c")) + end())
    with pytest.raises(anthropic.InternalServerError):
        ask(client, "claude-x", stream=True)


# --- a real server that speaks Anthropic: llama.cpp has /v1/messages, too

LLAMA = """
[[providers]]
name = "llama"
format = "anthropic"
base_url = "{llama}"
"""
HELLO: Any = [{"role": "user", "content": "hello you"}]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaServer]:
    pytest.importorskip("xllamacpp", reason="llama.cpp's server comes with the test extra")
    yield from tiny_llama.running(tmp_path_factory.mktemp("llama"))


@pytest.fixture
def before_llama(router: RouterFactory, llama: LlamaServer) -> RouterProcess:
    return router(providers=LLAMA, llama=llama.url)


@pytest.mark.xdist_group("llama")
def test_an_openai_client_hears_a_real_anthropic_server(before_llama: RouterProcess) -> None:
    with openai.OpenAI(base_url=f"{before_llama.url}/v1", api_key="x", max_retries=0, timeout=20) as client:
        asked: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 1}
        whole: Any = client.chat.completions.create(**asked)
        streamed: list[Any] = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices)
    assert whole.choices[0].message.content == text != ""
    assert whole.choices[0].finish_reason == streamed[-2].choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == streamed[-1].usage.completion_tokens == 12
    records = before_llama.settled(2)
    assert [r["attempts"][0]["kind"] for r in records] == ["anthropic_messages", "anthropic_stream"]
    assert [r["dropped"] for r in records] == [["seed"], ["seed"]]
    assert all(r["usage_source"] == "reported" and r["response"]["usage"]["output_tokens"] == 12 for r in records)


@pytest.mark.xdist_group("llama")
def test_the_anthropic_package_hears_a_real_anthropic_server(before_llama: RouterProcess, llama: LlamaServer) -> None:
    said = []
    for url in (before_llama.url, llama.url):
        with anthropic.Anthropic(base_url=url, api_key="x", max_retries=0, timeout=20) as client:
            told: Any = {"model": "tiny", "messages": HELLO, "max_tokens": 12, "extra_body": {"temperature": 0}}
            with client.messages.stream(**told) as events:
                message = events.get_final_message()
            counted = client.messages.count_tokens(model="tiny", messages=HELLO).input_tokens
        said.append((message.content[0].to_dict(), message.stop_reason, message.usage.output_tokens, counted))
    assert said[0] == said[1]
    assert said[0][1:3] == ("max_tokens", 12)
