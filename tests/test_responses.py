"""OpenAI Responses: what its clients say and get, in every way it can be told, and upstreams that speak it themselves."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from conftest import RouterFactory
from fake_upstream import (
    DONE,
    FakeUpstream,
    Received,
    answer,
    chat_completion,
    chunk_object,
    error_answer,
    event,
    fin,
    hold,
    json_answer,
    openai_chunks,
    raw,
    stream,
    stream_head,
    usage_object,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.responses import Response, ResponseStreamEvent, response_create_params
from pydantic import BaseModel, TypeAdapter
from router_process import RouterProcess
from wire_files import canonical, cases, cut, events, fold, heard, heard_in_pieces, read
from wire_files import raw as raw_file

from providers import (
    Answer,
    BadRequest,
    Begin,
    Body,
    Done,
    Event,
    Finish,
    Malformed,
    Provider,
    Reasoning,
    Request,
    Stamp,
    Text,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
    event_data,
    late,
    responses,
)

REQUESTS, STREAMS, UPSTREAM = "responses/requests", "responses/streams", "responses/upstream"
STAMP = Stamp("abcdefghij", 1763632800, "up-model")
BOUND = read("responses", "bound.json")
PATCH = {"model": "m", "input": "hi", "tools": [{"type": "custom", "name": "apply_patch"}]}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": False}


def said(data: bytes) -> list[dict[str, Any]]:
    """The objects of an event stream; each block is named by its type."""
    blocks = [event_data(block + b"\n\n") for block in data.split(b"\n\n") if block]
    told = [(name, json.loads(text or b"")) for name, text in blocks]
    assert [name for name, _ in told] == [obj["type"] for _, obj in told]
    return [obj for _, obj in told]


def rendered(told: list[Event], request: Request | None = None) -> bytes:
    """The stream that a client gets of these events."""
    renderer = responses.Renderer(request or heard("responses", PATCH), STAMP)
    return b"".join(renderer.feed(e) for e in told) + renderer.end()


# --- what its clients say


@pytest.mark.parametrize("case", cases(REQUESTS, ".client.json"))
def test_a_request_in_the_routers_words(case: str) -> None:
    assert canonical(heard("responses", read(REQUESTS, f"{case}.client.json"))) == read(REQUESTS, f"{case}.canonical.json")


@pytest.mark.parametrize("case", cases(REQUESTS, ".client.json"))
def test_the_requests_are_such_as_the_official_client_sends(case: str) -> None:
    told = read(REQUESTS, f"{case}.client.json")
    known = {*response_create_params.ResponseCreateParamsBase.__annotations__, "stream"}
    assert told.keys() <= known | {"client_metadata"}, "the last is Codex's own"


@pytest.mark.parametrize("refused", read("responses", "refused.json"), ids=lambda r: str(r["case"]))
def test_a_request_that_cannot_be_is_refused_by_the_name_of_its_field(refused: dict[str, Any]) -> None:
    with pytest.raises(BadRequest) as error:
        heard("responses", refused["client"])
    assert error.value.param == refused["param"]
    assert refused["param"].split(".")[-1].split("[")[0] in error.value.message


@pytest.mark.parametrize("bound", BOUND, ids=lambda b: str(b["case"]))
def test_what_only_its_vendor_can_know_binds_a_request_to_it(bound: dict[str, Any]) -> None:
    ((param, why),) = heard("responses", bound["client"]).bound.items()
    assert param == bound["param"]
    assert param in why


def test_a_request_that_goes_on_at_its_vendor_need_say_nothing_more() -> None:
    assert heard("responses", {"model": "m", "prompt": {"id": "pmpt_1"}}).messages == []
    assert heard("responses", {"model": "m", "input": [], "previous_response_id": "resp_1"}).messages == []


def test_the_routers_own_fields_are_taken_out() -> None:
    request = heard("responses", {"model": "m", "input": "hi", "session_id": "s", "trace": {"a": 1}, "models": ["b"]})
    assert (request.router["session_id"], request.router["trace"], request.router["models"]) == ("s", {"a": 1}, ["b"])
    assert request.extra == {}


# --- what they get


@pytest.mark.parametrize("case", cases(STREAMS, ".events.json"))
def test_a_stream_as_it_is_told(case: str) -> None:
    assert rendered(events(read(STREAMS, f"{case}.events.json"))) == raw_file(STREAMS, f"{case}.client.sse")


@pytest.mark.parametrize("case", cases(STREAMS, ".client.sse"))
def test_every_event_is_one_of_the_published_schema(case: str) -> None:
    told = said(raw_file(STREAMS, f"{case}.client.sse"))
    assert [obj["sequence_number"] for obj in told] == list(range(len(told)))
    for obj in told:
        parsed = EVENTS.validate_python(obj, strict=True)
        assert parsed.type == obj["type"], "and no other event that has the same fields"


@pytest.mark.parametrize("case", cases(STREAMS, ".client.sse"))
def test_every_item_that_was_added_is_done_and_in_the_response(case: str) -> None:
    told = said(raw_file(STREAMS, f"{case}.client.sse"))
    added = {o["output_index"]: o["item"]["id"] for o in told if o["type"] == "response.output_item.added"}
    done = {o["output_index"]: o["item"] for o in told if o["type"] == "response.output_item.done"}
    output = told[-1]["response"]["output"]
    assert added == {index: item["id"] for index, item in done.items()}
    assert [done[index] for index in sorted(done)] == output
    assert output, "there is always an item"


@pytest.mark.parametrize("case", cases(STREAMS, ".events.json"))
def test_a_whole_answer_is_what_its_stream_ends_in(case: str) -> None:
    request, told = heard("responses", PATCH), events(read(STREAMS, f"{case}.events.json"))
    folded = Answer()
    for e in told:
        folded.add(e)
    whole = responses.render(folded, request, STAMP)
    streamed = said(raw_file(STREAMS, f"{case}.client.sse"))[-1]["response"]
    if case == "text_after_tool":  # the fold joins all text, a stream tells it where it came
        whole["output"], streamed["output"] = [], []
    assert whole == streamed


@pytest.mark.parametrize("case", cases(STREAMS, ".client.sse"))
def test_a_response_has_every_field_that_the_published_schema_requires(case: str) -> None:
    response = said(raw_file(STREAMS, f"{case}.client.sse"))[-1]["response"]
    Response.model_validate(response, strict=True)
    nullable = ("error", "incomplete_details", "instructions", "metadata", "temperature", "top_p", "usage", "reasoning", "text")
    required = {name for name, f in Response.model_fields.items() if f.is_required()} | {*nullable}
    assert required <= response.keys()
    usage = response["usage"]
    assert usage["input_tokens_details"].keys() == {"cached_tokens", "cache_write_tokens"}
    assert usage["output_tokens_details"].keys() == {"reasoning_tokens"}


@pytest.mark.parametrize("case", cases(STREAMS, ".client.sse"))
def test_the_official_client_puts_a_stream_together(case: str, upstream: FakeUpstream) -> None:
    data = raw_file(STREAMS, f"{case}.client.sse")
    upstream.default = stream([data])
    expected = said(data)[-1]["response"]
    with (
        openai.OpenAI(base_url=upstream.url, api_key="unused", max_retries=0) as client,
        client.responses.stream(model="m", input="hi") as seen,
    ):
        texts = [e.delta for e in seen if e.type == "response.output_text.delta"]
    parts = [p["text"] for item in expected["output"] if item["type"] == "message" for p in item["content"]]
    assert "".join(texts) == "".join(parts)


def test_what_the_client_asked_is_repeated() -> None:
    told = {
        "model": "m", "input": "hi", "instructions": "Be brief.", "tools": [WEATHER], "tool_choice": "required", "temperature": 0,
        "top_p": 0.5, "max_output_tokens": 9, "metadata": {"a": "b"}, "parallel_tool_calls": False, "store": True,
        "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}, "user": "me", "truncation": "auto",
    }  # fmt: skip
    response = said(rendered([Text("hi"), Finish("stop"), Done()], heard("responses", told)))[-1]["response"]
    Response.model_validate(response, strict=True)
    changed = {"input", "model", "store", "reasoning", "text"}
    assert {k: response[k] for k in told.keys() - changed} == {k: told[k] for k in told.keys() - changed}
    assert response["reasoning"] == {"effort": "low", "summary": None}
    assert response["text"] == {"format": {"type": "text"}, "verbosity": "low"}
    assert response["store"] is False, "it is not kept, whatever was asked"


# --- there and back

ids = st.integers(0, 10**6).map("call_{}".format)
texts = st.text(min_size=1, max_size=20)
pieces = st.one_of(
    texts.map(Text),
    texts.map(Reasoning),
    texts.map(lambda s: Reasoning(signature=s)),
    texts.map(lambda s: Reasoning(redacted=s)),
    st.tuples(st.integers(0, 3), texts).map(lambda t: ToolCall(t[0], arguments=t[1])),
)


def with_calls_begun(told: list[Event]) -> list[Event]:
    """The same, each tool call numbered by its order and begun with an id and a name."""
    numbers: dict[int, int] = {}
    found: list[Event] = []
    for e in told:
        if isinstance(e, ToolCall):
            if e.index not in numbers:
                numbers[e.index] = len(numbers)
                found.append(ToolCall(numbers[e.index], f"call_{numbers[e.index]}", f"tool{e.index}"))
            e = ToolCall(numbers[e.index], arguments=e.arguments)
        found.append(e)
    return found


@settings(max_examples=150, deadline=None)
@given(st.lists(pieces, max_size=12), st.sampled_from(["stop", "length", "content_filter"]), st.integers(0, 2**53 - 1))
def test_what_is_rendered_is_heard_again(told: list[Event], reason: str, tokens: int) -> None:
    told = with_calls_begun(told)
    called = any(isinstance(e, ToolCall) for e in told)
    finish = Finish("tool_calls" if called and reason == "stop" else reason)
    used = Used(Usage(tokens, 1, tokens, tokens, 1))
    told = [Begin("resp_abcdefghij", "up-model"), *told, used, finish, Done()]
    data = rendered(told)
    for obj in said(data):
        EVENTS.validate_python(obj)
    again, before = fold(heard_in_pieces(responses.Parser(), [data])), fold(told)
    assert again["finish"][0] == before["finish"][0]
    assert {**again, "finish": None} == {**before, "finish": None}


@settings(max_examples=60, deadline=None)
@given(st.lists(pieces, max_size=8))
def test_a_whole_answer_is_heard_again(told: list[Event]) -> None:
    folded = Answer()
    for e in with_calls_begun(told):
        folded.add(e)
    request = heard("responses", PATCH)
    response = responses.render(folded, request, STAMP)
    Response.model_validate(response)
    again = fold(responses.parse(json.dumps(response).encode(), request))
    assert (again["text"], again["thinking"]) == (folded.text, folded.thinking)
    assert again["calls"] == [(c.id, c.name, c.arguments) for _, c in sorted(folded.tool_calls.items())]


@settings(max_examples=60, deadline=None)
@given(st.lists(pieces, max_size=8))
def test_an_answer_can_be_sent_back_as_input(told: list[Event]) -> None:
    """Clients that keep a conversation append the output to their input: every item of it is understood again."""
    folded = Answer()
    for e in with_calls_begun(told):
        folded.add(e)
    output = responses.render(folded, heard("responses", PATCH), STAMP)["output"]
    request = heard("responses", {"model": "m", "input": [{"role": "user", "content": "hi"}, *output]})
    assert not request.dropped
    blocks = request.messages[1].content
    assert [b for b in blocks if b["type"] in ("thinking", "redacted_thinking")] == folded.thinking
    assert "".join(b["text"] for b in blocks if b["type"] == "text") == folded.text
    assert [b["id"] for b in blocks if b["type"] == "tool_use"] == [c.id for _, c in sorted(folded.tool_calls.items())]


# --- what breaks


def test_a_broken_answer_ends_in_an_error_and_a_failed_response() -> None:
    renderer = responses.Renderer(heard("responses", PATCH), STAMP)
    half: list[Event] = [Begin(), Text("half"), ToolCall(0, "call_1", "apply_patch", '{"inp')]
    data = b"".join(renderer.feed(e) for e in half)
    told = said(data + renderer.fail(late("stream_idle", 2.0)))
    assert [obj["sequence_number"] for obj in told] == list(range(len(told)))
    assert [obj["type"] for obj in told[-2:]] == ["error", "response.failed"]
    for obj in told:
        EVENTS.validate_python(obj, strict=True)
    assert told[-2]["code"] == "stream_idle_timeout"
    failed = told[-1]["response"]
    assert (failed["id"], failed["status"]) == ("resp_abcdefghij", "failed")
    assert failed["error"] == {"code": "server_error", "message": "no answer within idle_timeout = 2 s"}
    assert [item["status"] for item in failed["output"]] == ["completed", "incomplete"]


@pytest.mark.parametrize("case", cases(UPSTREAM, ".sse"))
def test_a_stream_passed_on_that_breaks_anywhere_ends_by_its_own_numbers_and_as_its_own_response(case: str) -> None:
    blocks = responses.Parser().feed(raw_file(UPSTREAM, f"{case}.sse"))
    for passed in range(len(blocks)):
        relay = responses.Relay(heard("responses", PATCH), STAMP)
        before = relay.feed(blocks[:passed])
        assert before == b"".join(block for block, _ in blocks[:passed])
        told = said((before + relay.fail(late("stream_idle", 2.0))).replace(b"\r\n", b"\n"))
        assert [obj["sequence_number"] for obj in told] == list(
            range(told[0]["sequence_number"], told[0]["sequence_number"] + len(told))
        )
        assert [obj["type"] for obj in told if obj["type"] in ("response.created", "error", "response.failed")] == [
            "response.created", "error", "response.failed",
        ]  # fmt: skip
        for obj in told[len(said(before.replace(b"\r\n", b"\n"))) :]:
            EVENTS.validate_python(obj, strict=True)
        begun, failed = told[0]["response"], told[-1]["response"]
        assert (failed["id"], failed["model"], failed["status"]) == (begun["id"], begun["model"], "failed")
        _check_broken(told, failed["output"])


def _check_broken(told: list[dict[str, Any]], output: list[dict[str, Any]]) -> None:
    """What has ended is there as it ended, what grew is there as far as it came."""
    ended = {obj["output_index"]: obj["item"] for obj in told if obj["type"] == "response.output_item.done"}
    begun = {obj["output_index"]: obj["item"] for obj in told if obj["type"] == "response.output_item.added"}
    assert [item["id"] for item in output] == [begun[index]["id"] for index in sorted(begun)]
    for index, item in zip(sorted(begun), output, strict=True):
        parts: dict[int, str] = {}
        for obj in told:
            if obj.get("output_index") == index and "delta" in obj:
                part = obj.get("summary_index", obj.get("content_index", 0))
                parts[part] = parts.get(part, "") + obj["delta"]
        assert item == ended[index] if index in ended else item["status"] == "incomplete"
        assert all(json.dumps(text) in json.dumps(item) for text in parts.values())


@pytest.mark.parametrize("how", ["raw", "helper"])
@pytest.mark.parametrize("rendered_before", [True, False])
def test_the_official_client_raises_on_a_broken_answer(how: str, rendered_before: bool, upstream: FakeUpstream) -> None:
    renderer, error = responses.Renderer(heard("responses", PATCH), STAMP), late("stream_idle", 2.0)
    head = renderer.feed(Begin()) + renderer.feed(Text("half"))
    relay = responses.Relay(heard("responses", PATCH), STAMP)
    upstream.default = stream(
        [relay.feed(responses.Parser().feed(head)), renderer.fail(error) if rendered_before else relay.fail(error)]
    )
    seen: list[str] = []
    with (
        openai.OpenAI(base_url=upstream.url, api_key="unused", max_retries=0) as client,
        pytest.raises(openai.APIError, match="no answer within idle_timeout"),
    ):
        listen(client, how, seen)
    assert seen[-1] == "response.output_text.delta", "and nothing after it"


def listen(client: openai.OpenAI, how: str, seen: list[str]) -> None:
    if how == "raw":
        seen += (e.type for e in client.responses.create(model="m", input="hi", stream=True))
        return
    with client.responses.stream(model="m", input="hi") as helper:
        for e in helper:
            seen.append(e.type)


@pytest.mark.parametrize(
    "last",
    [
        {"type": "error", "code": "server_error", "message": "no", "param": None, "sequence_number": 9},
        {"type": "error", "error": {"type": "server_error", "code": "server_error", "message": "no", "param": None}},
        {"type": "response.failed", "response": {"status": "failed", "error": {"code": "server_error", "message": "no"}}},
    ],
)
def test_a_failure_that_an_upstream_tells_is_its_failure(last: dict[str, Any]) -> None:
    with pytest.raises(UpstreamError) as failed:
        heard_in_pieces(responses.Parser(), [event(last)])
    assert failed.value.detail is not None
    assert (failed.value.detail["message"], failed.value.detail["code"]) == ("no", "server_error")


def test_a_failure_without_a_reason_is_a_failure() -> None:
    with pytest.raises(UpstreamError):
        heard_in_pieces(responses.Parser(), [event({"type": "response.failed", "response": {"status": "failed", "error": None}})])


@pytest.mark.parametrize(
    ("told", "what"),
    [
        (b"", "not JSON"),
        (b"{}", "not a finished response"),
        (b'{"status":"in_progress","output":[]}', "not a finished response"),
        (b'{"status":"failed","output":[],"error":{"message":"no"}}', "reported an error"),
        (b'{"status":"cancelled","output":[]}', "reported an error"),
    ],
)
def test_a_whole_answer_that_is_none_is_the_providers_failure(told: bytes, what: str) -> None:
    with pytest.raises(UpstreamError, match=what):
        responses.parse(told, heard("responses", PATCH))


@pytest.mark.parametrize(
    "told", [b"data: <html>\n\n", b'data: {"type":"response.output_text.delta"}\n\n', b'data: {"type":[]}\n\n']
)
def test_an_event_that_cannot_be_read_is_told_apart(told: bytes) -> None:
    assert [type(e) for e in heard_in_pieces(responses.Parser(), [told])] == [Malformed]


# --- upstreams that speak it


@pytest.mark.parametrize("case", cases(UPSTREAM, ".sse"))
def test_a_stream_of_an_upstream_in_the_routers_words(case: str) -> None:
    data = raw_file(UPSTREAM, f"{case}.sse")
    for obj in said(data.replace(b"\r\n", b"\n")):
        EVENTS.validate_python(obj, strict=True)
    assert heard_in_pieces(responses.Parser(), [data]) == events(read(UPSTREAM, f"{case}.events.json"))


@given(st.sampled_from(cases(UPSTREAM, ".sse")), st.lists(st.integers(0, 10**6), max_size=6))
def test_a_stream_cut_anywhere_says_the_same(case: str, places: list[int]) -> None:
    data = raw_file(UPSTREAM, f"{case}.sse")
    parser = responses.Parser()
    blocks = [block for piece in cut(data, places) for block, _ in parser.feed(piece)]
    assert b"".join(blocks) == data, "and every byte of it is there"
    assert heard_in_pieces(responses.Parser(), cut(data, places)) == events(read(UPSTREAM, f"{case}.events.json"))


@pytest.mark.parametrize("case", cases(UPSTREAM, ".wholeevents.json"))
def test_a_whole_answer_of_an_upstream_in_the_routers_words(case: str) -> None:
    data = raw_file(UPSTREAM, f"{case}.json")
    assert responses.parse(data, heard("responses", PATCH)) == events(read(UPSTREAM, f"{case}.wholeevents.json"))


def test_the_clients_bytes_go_on_with_another_model() -> None:
    body = b'{ "model" : "m", "input":"hi", "x_unknown": {"a":1.50}, "session_id":"s" }'
    request = responses.parse_request(Body(body), {})
    call = responses.build(request, "other", Provider("up", "openai", "http://host"))
    assert (call.path, call.kind, call.dropped) == ("/responses", "responses", [])
    assert call.body == b'{"model" : "other","input":"hi","x_unknown": {"a":1.50}}'
    kept = responses.build(request, "m", Provider("up", "openai", "http://host", forward_metadata=True))
    assert kept.body == body


# --- through the router


@pytest.fixture
def process(router: RouterFactory) -> RouterProcess:
    return router(provider="read_timeout = 2\nidle_timeout = 2")


@pytest.fixture
def client(process: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


@pytest.fixture
def native(router: RouterFactory) -> RouterProcess:
    return router(provider="responses = true\nread_timeout = 2\nidle_timeout = 2")


@pytest.fixture
def native_client(native: RouterProcess) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{native.url}/v1", api_key="unused", max_retries=0, timeout=10) as made:
        yield made


def test_a_whole_answer(client: openai.OpenAI, upstream: FakeUpstream, process: RouterProcess) -> None:
    upstream.script(json_answer(chat_completion("good day", {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15})))
    response = client.responses.create(model="fake-model", input="hi", instructions="Be brief.", max_output_tokens=9)
    assert (response.output_text, response.status) == ("good day", "completed")
    assert response.usage
    assert (response.usage.input_tokens, response.usage.output_tokens, response.usage.total_tokens) == (12, 3, 15)
    asked = upstream.posts[0].json()
    assert upstream.posts[0].path == "/v1/chat/completions"
    assert asked["messages"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    record = process.record()
    assert (record["client_format"], record["route"], record["system"]) == ("responses", "/v1/responses", "Be brief.")
    assert response.id.removeprefix("resp_") in record["generation_id"]


def test_a_stream(client: openai.OpenAI, upstream: FakeUpstream, process: RouterProcess) -> None:
    with client.responses.stream(model="fake-model", input="hi") as helper:
        texts = [e.delta for e in helper if e.type == "response.output_text.delta"]
        final = helper.get_final_response()
    assert "".join(texts) == final.output_text == "one two three"
    assert final.usage
    assert final.usage.input_tokens == 7
    assert process.record()["response"]["content"] == "one two three"


def test_a_stream_without_the_helper(client: openai.OpenAI) -> None:
    seen = list(client.responses.create(model="fake-model", input="hi", stream=True))
    assert [e.type for e in seen[:2]] == ["response.created", "response.in_progress"]
    assert seen[-1].type == "response.completed"
    assert [e.sequence_number for e in seen] == list(range(len(seen)))


def tool_chunks(*calls: tuple[str, str, str]) -> list[bytes]:
    """Parallel calls whose arguments come interleaved, a character each."""
    parts = [{"index": i, "id": id, "function": {"name": name, "arguments": ""}} for i, (id, name, _) in enumerate(calls)]
    for at in range(max(len(arguments) for _, _, arguments in calls)):
        parts += [{"index": i, "function": {"arguments": a[at]}} for i, (_, _, a) in enumerate(calls) if at < len(a)]
    usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    deltas = [event(chunk_object({"tool_calls": [part]})) for part in parts]
    return [*deltas, event(chunk_object({}, "tool_calls")), event(usage_object(usage)), DONE]


def test_parallel_calls_that_come_interleaved(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(stream(tool_chunks(("call_1", "weather", '{"city":"Rome"}'), ("call_2", "now", "{}"))))
    with client.responses.stream(model="fake-model", input="hi", tools=[WEATHER]) as helper:  # type: ignore[list-item]
        deltas = [(e.output_index, e.delta) for e in helper if e.type == "response.function_call_arguments.delta"]
        final = helper.get_final_response()
    assert {index for index, _ in deltas} == {0, 1}
    calls = [(c.call_id, c.name, c.arguments) for c in final.output if c.type == "function_call"]
    assert calls == [("call_1", "weather", '{"city":"Rome"}'), ("call_2", "now", "{}")]


def test_a_turn_with_tools_reaches_a_provider_that_speaks_otherwise(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(
        stream(tool_chunks(("call_1", "weather", "{}"), ("call_2", "weather", "{}"))), json_answer(chat_completion("warm"))
    )
    history: list[Any] = [{"role": "user", "content": "weather?"}]
    with client.responses.stream(model="fake-model", input=history, tools=[WEATHER]) as helper:  # type: ignore[list-item]
        history += [item.model_dump(exclude_none=True) for item in helper.get_final_response().output]
    history += [{"type": "function_call_output", "call_id": f"call_{n}", "output": "sun"} for n in (1, 2)]
    assert client.responses.create(model="fake-model", input=history).output_text == "warm"
    messages = upstream.posts[1].json()["messages"]
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool"]
    assert [c["id"] for c in messages[1]["tool_calls"]] == ["call_1", "call_2"]
    assert [m["tool_call_id"] for m in messages[2:]] == ["call_1", "call_2"]


def test_an_answer_in_a_shape(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    class City(BaseModel):
        name: str

    upstream.script(json_answer(chat_completion('{"name":"Rome"}')))
    response = client.responses.parse(model="fake-model", input="hi", text_format=City)
    assert response.output_parsed == City(name="Rome")
    form = upstream.posts[0].json()["response_format"]
    assert (form["type"], form["json_schema"]["name"], form["json_schema"]["strict"]) == ("json_schema", "City", True)


def test_an_answer_that_was_cut_short_is_incomplete(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(stream(openai_chunks("once upon", finish="length")))
    with client.responses.stream(model="fake-model", input="hi") as helper:
        last = list(helper)[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details
    assert last.response.incomplete_details.reason == "max_output_tokens"


NO_INPUT = {"case": "no_input", "param": "input", "client": {"model": "m", "input": []}}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("case", [*BOUND, NO_INPUT], ids=lambda c: str(c["case"]))
def test_what_cannot_be_translated_is_the_clients_error(
    client: openai.OpenAI, upstream: FakeUpstream, case: dict[str, Any], streamed: bool
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**case["client"], stream=streamed)
    assert refused.value.param == case["param"]
    assert upstream.posts == []


def test_an_error_before_the_stream_is_a_status(client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.script(error_answer(429, "slow down", {"Retry-After": "3"}))
    with pytest.raises(openai.RateLimitError) as limited:
        client.responses.create(model="fake-model", input="hi", stream=True)
    assert limited.value.response.headers["retry-after"] == "3"


@pytest.mark.parametrize("how", ["raw", "helper"])
def test_a_stream_that_breaks_off_raises(client: openai.OpenAI, upstream: FakeUpstream, process: RouterProcess, how: str) -> None:
    upstream.script(stream_head("close") + raw(b"".join(openai_chunks("half", finish=None, done=False))) + fin())
    seen: list[str] = []
    with pytest.raises(openai.APIError):
        listen(client, how, seen)
    assert "response.completed" not in seen
    assert process.record()["outcome"] == "error"


ANTHROPIC = """
[[providers]]
name = "claude"
format = "anthropic"
base_url = "{upstream}"
"""


def anthropic_thinking() -> list[bytes]:
    """A message of Anthropic's that thinks, signs it, hides a thought and calls a tool."""
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = [
        (
            {"type": "thinking", "thinking": "", "signature": ""},
            [{"type": "thinking_delta", "thinking": "I must look."}, {"type": "signature_delta", "signature": "c2lnbmVk"}],
        ),
        ({"type": "redacted_thinking", "data": "aGlkZGVu"}, []),
        (
            {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}},
            [{"type": "input_json_delta", "partial_json": "{}"}],
        ),
    ]
    usage = {"input_tokens": 10, "output_tokens": 1}
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "c",
        "content": [],
        "stop_reason": None,
        "usage": usage,
    }
    told: list[dict[str, Any]] = [{"type": "message_start", "message": message}]
    for index, (block, deltas) in enumerate(blocks):
        told.append({"type": "content_block_start", "index": index, "content_block": block})
        told += [{"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas]
        told.append({"type": "content_block_stop", "index": index})
    told.append(
        {"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": None}, "usage": {"output_tokens": 9}}
    )
    told.append({"type": "message_stop"})
    return [f"event: {obj['type']}\ndata: {json.dumps(obj)}\n\n".encode() for obj in told]


def test_what_anthropic_signed_goes_through_a_responses_client_and_back(router: RouterFactory, upstream: FakeUpstream) -> None:
    upstream.default = stream(anthropic_thinking())
    process = router(providers=ANTHROPIC)
    history: list[Any] = [{"role": "user", "content": "weather?"}]
    more: Any = {"model": "c", "tools": [WEATHER], "reasoning": {"effort": "low"}, "max_output_tokens": 9000}
    with openai.OpenAI(base_url=f"{process.url}/v1", api_key="unused", max_retries=0) as client:
        for _ in range(2):
            with client.responses.stream(input=history, **more) as helper:
                output = helper.get_final_response().output
            history += [item.model_dump(exclude_none=True) for item in output]
            history.append({"type": "function_call_output", "call_id": "toolu_1", "output": "sun"})
    assert [item.type for item in output] == ["reasoning", "reasoning", "function_call"]
    sent = upstream.posts[1].json()["messages"]
    assert [m["role"] for m in sent] == ["user", "assistant", "user"]
    thought, hidden, call = sent[1]["content"]
    assert thought == {"type": "thinking", "thinking": "I must look.", "signature": "c2lnbmVk"}
    assert hidden == {"type": "redacted_thinking", "data": "aGlkZGVu"}
    assert (call["type"], call["id"]) == ("tool_use", "toolu_1")


# --- passed on as it is


def responses_that(case: str) -> Callable[[Received], Any]:
    def speak(received: Received) -> Any:
        if received.json().get("stream"):
            return stream([raw_file(UPSTREAM, f"{case}.sse")])
        return answer(raw_file(UPSTREAM, "whole.json"))

    return speak


@pytest.mark.parametrize("case", cases(UPSTREAM, ".sse"))
def test_a_stream_is_passed_on_byte_for_byte(case: str, native: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.default = responses_that(case)
    reply = native.post("/v1/responses", {"model": "fake-model", "input": "hi", "stream": True, "x_unknown": 1})
    assert reply.body == raw_file(UPSTREAM, f"{case}.sse")
    assert (upstream.posts[0].path, upstream.posts[0].json()["x_unknown"]) == ("/v1/responses", 1)
    record = native.record()
    assert record["outcome"] == "ok"
    assert record["response"]["usage"]["cached_input_tokens"] == 30
    assert record["response"]["content"] == fold(events(read(UPSTREAM, f"{case}.events.json")))["text"]
    assert record["dropped"] == []


def test_a_whole_answer_is_passed_on_byte_for_byte(native: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.default = responses_that("text")
    reply = native.post("/v1/responses", {"model": "fake-model", "input": "hi", "tools": [{"type": "web_search"}], "store": True})
    assert reply.body == raw_file(UPSTREAM, "whole.json")
    record = native.record()
    assert [c["name"] for c in record["response"]["tool_calls"]] == ["weather", "now", "apply_patch"]
    assert record["cost"]["total"] == 0.25
    assert record["dropped"] == []


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("bound", BOUND, ids=lambda b: str(b["case"]))
def test_what_cannot_be_translated_is_passed_on_to_its_vendor(
    native: RouterProcess, upstream: FakeUpstream, bound: dict[str, Any], streamed: bool
) -> None:
    upstream.default = responses_that("text")
    reply = native.post("/v1/responses", {**bound["client"], "stream": streamed})
    assert reply.status == 200, reply
    assert upstream.posts[0].path == "/v1/responses"
    assert upstream.posts[0].json() == {**bound["client"], "stream": streamed}
    assert (native.record()["outcome"], native.record()["dropped"]) == ("ok", [])


def test_a_response_in_the_background_has_only_begun(native: RouterProcess, upstream: FakeUpstream) -> None:
    queued = {**read(UPSTREAM, "whole.json"), "status": "queued", "output": [], "usage": None}
    upstream.default = json_answer(queued)
    assert native.post("/v1/responses", {"model": "m", "input": "hi", "background": True}).json() == queued
    assert native.post("/v1/responses", {"model": "m", "input": "hi"}).status == 502, "nobody asked for that"
    assert [record["outcome"] for record in native.settled(2)] == ["ok", "error"]


TWO_KINDS = """
[[providers]]
name = "chat"
format = "openai"
base_url = "{upstream}/chat/v1"

[[providers]]
name = "whole"
format = "openai"
base_url = "{upstream}/whole/v1"
responses = true
"""
IN_ORDER = """
[[routers]]
type = "prefix"
model_prefix = ""
provider = "chat"

[[routers]]
type = "prefix"
model_prefix = ""
provider = "whole"
"""


def test_what_cannot_be_translated_goes_past_those_who_would_need_it(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(providers=TWO_KINDS, rules=IN_ORDER)
    upstream.default = responses_that("text")
    asked = {"model": "m", "input": "hi", "previous_response_id": "resp_1"}
    assert process.post("/v1/responses", asked).headers["x-router-provider"] == "whole"
    assert [sent.path for sent in upstream.posts] == ["/whole/v1/responses"]
    upstream.default = error_answer(503)
    assert process.post("/v1/responses", asked).status == 502, "the one that could is down: that is no fault of the request"


def test_other_clients_still_speak_chat_to_it(native: RouterProcess, upstream: FakeUpstream) -> None:
    assert native.chat().status == 200
    assert upstream.posts[0].path == "/v1/chat/completions"


def test_the_official_client_reads_what_is_passed_on(native_client: openai.OpenAI, upstream: FakeUpstream) -> None:
    upstream.default = responses_that("tools")
    with native_client.responses.stream(model="fake-model", input="hi") as helper:
        final = helper.get_final_response()
    assert [item.type for item in final.output] == ["web_search_call", "function_call", "function_call"]


@pytest.mark.parametrize("told", [True, False])
def test_a_stream_passed_on_that_fails_raises(
    native: RouterProcess, native_client: openai.OpenAI, upstream: FakeUpstream, told: bool
) -> None:
    go_on = threading.Event()
    blocks = raw_file(UPSTREAM, "text.sse").split(b"\n\n")
    failed = {"type": "response.failed", "response": {"status": "failed", "error": {"code": "server_error", "message": "no"}}}
    last = raw(event(failed)) if told else fin()
    upstream.script(stream_head("close") + raw(b"\n\n".join(blocks[:5]) + b"\n\n") + hold(go_on) + last)
    with native_client.responses.create(model="m", input="hi", stream=True) as events:
        seen = [next(events).type for _ in range(5)]
        go_on.set()
        with pytest.raises(openai.APIError, match="no" if told else "ended in the middle"):
            next(events)
    assert seen[-1] == "response.output_text.delta"
    record = native.record()
    assert (record["outcome"], record["response"]["content"]) == ("error", "Hi")


@pytest.mark.parametrize(
    "last", [fin(), raw(event({"type": "error", "message": "no", "sequence_number": 5}))], ids=["cut", "told"]
)
def test_a_stream_passed_on_that_fails_goes_on_counting(native: RouterProcess, upstream: FakeUpstream, last: Any) -> None:
    blocks = raw_file(UPSTREAM, "text.sse").split(b"\n\n")
    upstream.script(stream_head("close") + raw(b"\n\n".join(blocks[:5]) + b"\n\n") + last)
    *_, before, error, end = said(native.post("/v1/responses", {"model": "m", "input": "hi", "stream": True}).body)
    assert [before["sequence_number"], error["sequence_number"], end["sequence_number"]] == [4, 5, 6]
    assert (end["response"]["id"], end["response"]["model"]) == ("resp_67c9", "gpt-4.1-2025-04-14")
    assert [item["content"][0]["text"] for item in end["response"]["output"]] == ["Hi"]
