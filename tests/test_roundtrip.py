"""Two languages, there and back: what is said in one and retold in the other keeps its meaning.

The golden files of `wire/openai` and `wire/anthropic` show each step once: what a client says (`client`), the router's words
for it (`canonical`, for answers `events`), and what it becomes in either language (`openai`, `anthropic`). A bug report
becomes another file. Hypothesis does the same with requests, answers and broken bytes that nobody thought of.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from anthropic.types import ErrorResponse, Message, RawMessageStreamEvent
from anthropic.types.message_create_params import MessageCreateParamsNonStreaming
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.chat.completion_create_params import CompletionCreateParamsNonStreaming
from pydantic import TypeAdapter
from wire_files import canonical, cases, cut, events, fold, heard, heard_in_pieces, raw, read, written

import providers
from plugins.structure import Structure
from providers import Answer, BadRequest, Body, Event, Provider, Request, Stamp, UpstreamError
from providers import anthropic as claude
from providers import openai as chat

LANGUAGES = ("openai", "anthropic")
STAMP = Stamp("aaaabbbbccccddddeeee", 1700000000, "sent-model")
UPSTREAMS = {name: Provider("up", name, "http://127.0.0.1:1") for name in LANGUAGES}
ELSEWHERE = Request("elsewhere", Body(b"{}"), "m", include_usage=True)
"""A request of a client that speaks neither language."""
PARAMS: dict[str, TypeAdapter[Any]] = {
    "openai": TypeAdapter(CompletionCreateParamsNonStreaming),
    "anthropic": TypeAdapter(MessageCreateParamsNonStreaming),
}
WHOLE: dict[str, Any] = {"openai": ChatCompletion, "anthropic": Message}
STREAMED: dict[str, TypeAdapter[Any]] = {
    "openai": TypeAdapter(ChatCompletionChunk),
    "anthropic": TypeAdapter(RawMessageStreamEvent),
}
BEYOND = {("openai", "image_in_tool_result")}
"""Requests that many servers take although OpenAI's own schema does not have them."""


def language(name: str) -> Any:
    return providers.language(name)


def every(folder: str, ending: str) -> list[Any]:
    return [pytest.param(name, case, id=f"{name}-{case}") for name in LANGUAGES for case in cases(f"{name}/{folder}", ending)]


def conform(schema: TypeAdapter[Any], body: Any) -> None:
    """Raises ValidationError unless the body is what the schema says, down to its leaves."""
    _walk(schema.validate_python(body, strict=True))


def _walk(value: Any) -> None:
    """Pydantic looks into an Iterable only once somebody does."""
    if isinstance(value, dict):
        _walk(list(value.values()))
    elif not isinstance(value, (str, int, float, type(None))):
        for inner in value:
            _walk(inner)


def folded(told: list[Event]) -> Answer:
    answer = Answer()
    for event in told:
        answer.add(event)
    return answer


def rendered(name: str, told: list[Event], request: Request = ELSEWHERE) -> bytes:
    renderer = language(name).Renderer(request, STAMP)
    return b"".join([*(renderer.feed(e) for e in told), renderer.end()])


# --- requests, file by file


@pytest.mark.parametrize(("name", "case"), every("requests", ".client.json"))
def test_a_request_is_heard(name: str, case: str) -> None:
    folder = f"{name}/requests"
    assert canonical(heard(name, read(folder, f"{case}.client.json"))) == read(folder, f"{case}.canonical.json")


@pytest.mark.parametrize("target", LANGUAGES)
@pytest.mark.parametrize(("name", "case"), every("requests", ".client.json"))
def test_a_request_is_retold(name: str, case: str, target: str) -> None:
    request = heard(name, read(f"{name}/requests", f"{case}.client.json"))
    request.changed = True  # else the client's own bytes go on
    call = language(target).build(request, "sent-model", UPSTREAMS[target])
    told = {"dropped": call.dropped, "body": json.loads(call.body)}
    assert told == read(f"{name}/requests", f"{case}.{target}.json")


@pytest.mark.parametrize("target", LANGUAGES)
@pytest.mark.parametrize(("name", "case"), every("requests", ".client.json"))
def test_what_is_retold_is_what_the_vendor_published(name: str, case: str, target: str) -> None:
    conform(PARAMS[target], read(f"{name}/requests", f"{case}.{target}.json")["body"])


@pytest.mark.parametrize(("name", "case"), [c for c in every("requests", ".client.json") if tuple(c.values) not in BEYOND])
def test_the_clients_of_these_files_say_what_the_vendor_published(name: str, case: str) -> None:
    conform(PARAMS[name], read(f"{name}/requests", f"{case}.client.json"))


# --- answers, file by file


@pytest.mark.parametrize(("name", "case"), every("answers", ".upstream.sse"))
def test_a_stream_is_heard(name: str, case: str) -> None:
    told = heard_in_pieces(language(name).Parser(), [raw(f"{name}/answers", f"{case}.upstream.sse")])
    assert written(told) == read(f"{name}/answers", f"{case}.events.json")


@pytest.mark.parametrize(("name", "case"), every("answers", ".upstream.json"))
def test_a_whole_answer_is_heard(name: str, case: str) -> None:
    told = language(name).parse(raw(f"{name}/answers", f"{case}.upstream.json"), ELSEWHERE)
    assert written(told) == read(f"{name}/answers", f"{case}.events.json")


@pytest.mark.parametrize("target", LANGUAGES)
@pytest.mark.parametrize(("name", "case"), every("answers", ".upstream.sse"))
def test_a_stream_is_retold(name: str, case: str, target: str) -> None:
    data = rendered(target, events(read(f"{name}/answers", f"{case}.events.json")))
    assert data == raw(f"{name}/answers", f"{case}.{target}.sse")
    for told in _said(data):
        STREAMED[target].validate_python(told, strict=True)


def _said(data: bytes) -> Iterator[Any]:
    """The JSON of the events that carry some; the SDKs know `ping` and [DONE] without a schema."""
    for line in data.decode().split("\n"):
        if line.startswith("data: {") and line != 'data: {"type":"ping"}':
            yield json.loads(line[6:])


@pytest.mark.parametrize("target", LANGUAGES)
@pytest.mark.parametrize(("name", "case"), every("answers", ".upstream.json"))
def test_a_whole_answer_is_retold(name: str, case: str, target: str) -> None:
    answer = folded(events(read(f"{name}/answers", f"{case}.events.json")))
    told = language(target).render(answer, ELSEWHERE, STAMP)
    assert told == read(f"{name}/answers", f"{case}.{target}.json")
    WHOLE[target].model_validate(told, strict=True)


# --- there and back: requests

WORDS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=12).filter(str.strip)
NAMES = st.sampled_from(["look", "get_weather", "run-it", "Z_9"])
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(min_size=1, max_size=6), JSON, max_size=3)
PART = st.one_of(
    WORDS.map(lambda t: {"type": "text", "text": t}),
    st.just({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}),
    st.binary(min_size=1, max_size=9).map(
        lambda b: {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b.hex()}"}}
    ),
)
USER = st.fixed_dictionaries({"role": st.just("user"), "content": WORDS | st.lists(PART, min_size=1, max_size=3)})


@st.composite
def turns(draw: st.DrawFn) -> list[dict[str, Any]]:
    """What a user says, what a model answers, and perhaps the calls it makes with all their results."""
    said = [draw(USER)]
    for number in range(draw(st.integers(0, 3))):
        ids = [f"call_{number}_{i}" for i in range(draw(st.integers(0, 3)))]
        text = draw(WORDS | st.none()) if ids else draw(WORDS)
        answer: dict[str, Any] = {"role": "assistant", "content": text}
        if ids:
            calls = [{"name": draw(NAMES), "arguments": json.dumps(draw(OBJECTS))} for _ in ids]
            answer["tool_calls"] = [{"id": i, "type": "function", "function": c} for i, c in zip(ids, calls, strict=True)]
        results: list[Any] = [{"role": "tool", "tool_call_id": i, "content": draw(WORDS)} for i in ids]
        said += [answer, *results, *([draw(USER)] if not ids or draw(st.booleans()) else [])]
    return said


@st.composite
def bodies(draw: st.DrawFn) -> dict[str, Any]:
    """A request as an OpenAI client may make it, of all that Anthropic can say as well."""
    system = [{"role": draw(st.sampled_from(["system", "developer"])), "content": t} for t in draw(st.lists(WORDS, max_size=2))]
    body: dict[str, Any] = {"model": "m", "messages": [*system, *draw(turns())]}
    names = draw(st.lists(NAMES, unique=True, max_size=3))
    if names:
        schema = {"type": "object", "properties": draw(st.dictionaries(WORDS, st.just({"type": "string"}), max_size=2))}
        body["tools"] = [
            {"type": "function", "function": {"name": n, "description": draw(WORDS), "parameters": schema}} for n in names
        ]
        named = {"type": "function", "function": {"name": names[0]}}
        body |= draw(st.fixed_dictionaries({}, optional={"tool_choice": st.sampled_from(["auto", "none", "required", named])}))
        body |= draw(st.fixed_dictionaries({}, optional={"parallel_tool_calls": st.just(False)}))
    told = {
        "max_tokens": st.integers(1, 9999),
        "temperature": st.floats(0, 1),
        "top_p": st.floats(0, 1),
        "stop": st.lists(WORDS, min_size=1, max_size=3),
        "user": st.just("user-1"),
        "stream": st.booleans(),
        "service_tier": st.sampled_from(["auto", "default"]),
    }
    return body | draw(st.fixed_dictionaries({}, optional=told))


def meaning(request: Request) -> dict[str, Any]:
    """What is left of a request when it does not matter how its text is cut into messages and blocks."""
    turns: list[tuple[str, list[Any]]] = []
    for message in request.messages:
        for block in message.content:
            role = "user" if message.role == "tool" else message.role
            said = _block_meaning(block)
            if turns and turns[-1][0] == role:
                last = turns[-1][1]
                joined = last and isinstance(said, str) and isinstance(last[-1], str)
                last[-1:] = [f"{last[-1]}\n\n{said}"] if joined else [*last[-1:], said]
            elif said != "":
                turns.append((role, [said]))
    tools = [(t.name, t.description, {"type": "object", "properties": {}, **t.parameters}) for t in request.tools]
    choice = (request.tool_choice, request.parallel_tool_calls) if tools else None
    system = "\n\n".join(b["text"] for b in request.system)
    plain = ("stream", "max_tokens", "temperature", "top_p", "stop", "user", "service_tier")
    return {"system": system, "turns": turns, "tools": tools, "choice": choice, **{n: getattr(request, n) for n in plain}}


def _block_meaning(block: dict[str, Any]) -> Any:
    if block["type"] == "text":
        return block["text"]
    if block["type"] == "tool_result":
        content = block["content"]
        return ("result", block["tool_use_id"], content if isinstance(content, str) else [_block_meaning(b) for b in content])
    return {k: v for k, v in block.items() if k != "cache_control"}


def retold(request: Request, target: str) -> Request:
    """The request as a client of another language would have made it."""
    request.changed = True
    call = language(target).build(request, request.model, UPSTREAMS[target])
    assert not set(call.dropped) - {"prefill"}, call.dropped
    return heard(target, json.loads(call.body))


@settings(deadline=None)
@given(bodies())
def test_a_request_told_to_anthropic_and_back_keeps_its_meaning(body: dict[str, Any]) -> None:
    first = meaning(heard("openai", body))
    there = retold(heard("openai", body), "anthropic")
    back = retold(there, "openai")
    first["max_tokens"] = back.max_tokens if first["max_tokens"] is None else first["max_tokens"]  # Anthropic must be told one
    choice, several = first["choice"] or (None, None)
    if choice is None and several is not None:  # a place to say it in
        first["choice"] = ("auto", several)
    if choice == "none":  # where nothing is called, nothing is called at once
        first["choice"] = ("none", back.parallel_tool_calls)
    assert meaning(back) == first


@settings(deadline=None)
@given(bodies())
def test_a_request_told_to_openai_and_back_keeps_its_meaning(body: dict[str, Any]) -> None:
    theirs = retold(heard("openai", {"max_tokens": 100, **body}), "anthropic")
    first = meaning(theirs)
    assert meaning(retold(retold(theirs, "openai"), "anthropic")) == first


# --- there and back: answers

PIECES = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=6), max_size=4)


@st.composite
def streams(draw: st.DrawFn) -> list[Event]:
    """What a provider may say: thinking, text and calls in pieces, that come one after the other or all mixed."""
    told: list[Event] = [providers.Begin("id-1", "some-model")]
    lanes: list[list[Event]] = [[providers.Reasoning(t) for t in draw(PIECES)], [providers.Text(t) for t in draw(PIECES)]]
    lanes += [
        [
            providers.ToolCall(i, f"call_{i}", draw(NAMES)),
            *(providers.ToolCall(i, arguments=p) for p in _cut_up(json.dumps(draw(OBJECTS)))),
        ]
        for i in range(draw(st.integers(0, 3)))
    ]
    mixed = draw(st.booleans())
    while any(lanes):
        waiting = [lane for lane in lanes if lane]
        told.append((draw(st.sampled_from(waiting)) if mixed else waiting[0]).pop(0))
    reason = "tool_calls" if any(isinstance(e, providers.ToolCall) for e in told) else "stop"
    told.append(providers.Finish(draw(st.sampled_from([reason, "length", "content_filter"]))))
    used = providers.Usage(
        draw(st.integers(40, 99)), draw(st.integers(20, 99)), draw(st.integers(0, 20)), draw(st.integers(0, 20)), 7
    )
    return [*told, providers.Used(used), providers.Done()]


def _cut_up(text: str) -> list[str]:
    return [text[at : at + 3] for at in range(0, len(text), 3)]


def essence(told: dict[str, Any]) -> dict[str, Any]:
    """What an answer says, without the names and words of its language."""
    calls = [(id, name, json.loads(arguments or "{}")) for id, name, arguments in told["calls"]]
    thinking = "".join(b.get("thinking", "") for b in told["thinking"])
    kept = {k: told[k] for k in ("model", "text", "usage", "done")}
    return {**kept, "calls": sorted(calls), "thinking": thinking, "finish": told["finish"][0]}


@settings(deadline=None)
@given(streams(), st.sampled_from(LANGUAGES), st.lists(st.integers(0, 9999), max_size=6))
def test_a_stream_rendered_and_read_again_is_the_same_answer(told: list[Event], name: str, places: list[int]) -> None:
    again = heard_in_pieces(language(name).Parser(), cut(rendered(name, told), places))
    assert essence(fold(again)) == essence(fold(told))


@settings(deadline=None)
@given(streams(), st.sampled_from(LANGUAGES))
def test_a_whole_answer_rendered_and_read_again_is_the_same_answer(told: list[Event], name: str) -> None:
    object_ = language(name).render(folded(told), ELSEWHERE, STAMP)
    again = [*language(name).parse(json.dumps(object_).encode(), ELSEWHERE), providers.Done()]
    assert essence({**fold(again), "model": "some-model"}) == essence(fold(told))
    WHOLE[name].model_validate(object_, strict=True)


@settings(deadline=None)
@given(streams(), st.sampled_from(LANGUAGES))
def test_every_event_of_a_stream_is_what_the_vendor_published(told: list[Event], name: str) -> None:
    for said in _said(rendered(name, told)):
        STREAMED[name].validate_python(said, strict=True)


@settings(deadline=None)
@given(streams())
def test_anthropic_blocks_never_overlap(told: list[Event]) -> None:
    is_open, last = None, -1
    for said in _said(rendered("anthropic", told)):
        if said["type"] == "content_block_start":
            assert is_open is None and said["index"] == last + 1
            is_open = last = said["index"]
        elif said["type"] == "content_block_delta":
            assert said["index"] == is_open
        elif said["type"] == "content_block_stop":
            assert said["index"] == is_open
            is_open = None
    assert is_open is None


# --- bytes cut anywhere

ENDS = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}


@settings(deadline=None)
@given(st.data())
def test_a_stream_says_the_same_however_its_bytes_arrive(data: st.DataObject) -> None:
    name, case = data.draw(st.sampled_from([tuple(c.values) for c in every("answers", ".upstream.sse")]))
    stream = raw(f"{name}/answers", f"{case}.upstream.sse")
    expected = fold(heard_in_pieces(language(name).Parser(), [stream]))
    ending = data.draw(st.sampled_from(sorted(ENDS)))
    comment = data.draw(st.sampled_from([b"", b": hello\n\n", b"id: 1\nretry: 5\n\n"]))
    other = (data.draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + comment + stream).replace(b"\n", ENDS[ending])
    pieces = cut(other, data.draw(st.lists(st.integers(0, len(other)), max_size=40)))
    assert fold(heard_in_pieces(language(name).Parser(), pieces)) == expected


@pytest.mark.parametrize(("name", "case"), every("answers", ".upstream.sse"))
def test_a_stream_says_the_same_byte_by_byte(name: str, case: str) -> None:
    stream = raw(f"{name}/answers", f"{case}.upstream.sse")
    expected = heard_in_pieces(language(name).Parser(), [stream])
    assert heard_in_pieces(language(name).Parser(), [stream[i : i + 1] for i in range(len(stream))]) == expected


# --- JSON of any shape


def replaced(value: Any, path: list[Any], other: Any) -> Any:
    """A copy of a JSON value with what stands at the path replaced."""
    if not path:
        return other
    made = copy.copy(value)
    made[path[0]] = replaced(value[path[0]], path[1:], other)
    return made


def paths(value: Any) -> Iterator[list[Any]]:
    yield []
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        for path in paths(inner):
            yield [key, *path]


def spoilt(data: st.DataObject, value: Any) -> Any:
    """The value with one of its parts replaced by any JSON at all."""
    return replaced(value, data.draw(st.sampled_from(list(paths(value)))), data.draw(JSON))


def survives(tell: Callable[[], list[Event]]) -> None:
    """Whatever a provider says is events, or a failure of the provider; and events can always be told on."""
    try:
        told = tell()
        for name in LANGUAGES:
            rendered(name, told)
            json.dumps(language(name).render(folded(told), ELSEWHERE, STAMP))
    except UpstreamError:
        return


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_whole_answer_of_any_shape_is_survived(data: st.DataObject) -> None:
    name, case = data.draw(st.sampled_from([tuple(c.values) for c in every("answers", ".upstream.json")]))
    body = spoilt(data, read(f"{name}/answers", f"{case}.upstream.json"))
    survives(lambda: language(name).parse(json.dumps(body).encode(), ELSEWHERE))


@settings(deadline=None, max_examples=300)
@given(st.data())
def test_a_stream_of_any_shape_is_survived(data: st.DataObject) -> None:
    name, case = data.draw(st.sampled_from([tuple(c.values) for c in every("answers", ".upstream.sse")]))
    blocks = raw(f"{name}/answers", f"{case}.upstream.sse").split(b"\n\n")[:-1]
    at = data.draw(st.integers(0, len(blocks) - 1))
    head, _, told = blocks[at].rpartition(b"data: ")
    if told.startswith(b"{"):
        blocks[at] = head + b"data: " + json.dumps(spoilt(data, json.loads(told))).encode()
    survives(lambda: heard_in_pieces(language(name).Parser(), [b"\n\n".join(blocks) + b"\n\n"]))


@settings(deadline=None)
@given(st.binary(max_size=60), st.sampled_from(LANGUAGES))
def test_bytes_that_are_no_answer_are_a_failure_of_the_provider(data: bytes, name: str) -> None:
    survives(lambda: language(name).parse(data, ELSEWHERE))
    survives(lambda: heard_in_pieces(language(name).Parser(), [data, b"\n\ndata: " + data + b"\n\n"]))


@settings(deadline=None, max_examples=400)
@given(st.data())
def test_a_request_of_any_shape_is_answered_or_refused_by_name(data: st.DataObject) -> None:
    name, case = data.draw(st.sampled_from([tuple(c.values) for c in every("requests", ".client.json")]))
    body = spoilt(data, read(f"{name}/requests", f"{case}.client.json"))
    if not isinstance(body, dict):
        return
    try:
        request = heard(name, body)
        Structure({}).classify(request)
        request.text()
        for target in (*LANGUAGES, "ollama"):
            for request.changed in (False, True):
                call = language(target).build(request, "sent-model", Provider("up", target, "http://127.0.0.1:1"))
                json.loads(call.body)
    except BadRequest as e:
        assert e.param and e.message, repr(e)


@pytest.mark.parametrize("name", LANGUAGES)
def test_an_error_is_told_in_the_clients_own_words(name: str) -> None:
    error = UpstreamError("it broke", status=429, kind="rate_limit")
    told = language(name).render_error(error)
    assert told["error"] == {"message": "it broke", "type": "rate_limit_error", "src": "router"} | (
        {"param": None, "code": "rate_limit"} if name == "openai" else {}
    )
    if name == "anthropic":
        ErrorResponse.model_validate(told, strict=True)
    assert told in _said(language(name).render_stream_error(error))


def test_the_two_languages_of_these_tests_are_files_of_their_own() -> None:
    assert (language("openai"), language("anthropic")) == (chat, claude)
