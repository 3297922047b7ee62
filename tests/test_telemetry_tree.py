"""The spans of a request, made from its record: which there are, whose children, when, and what they say."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from telemetry_records import START, a_record, a_response, a_stream, an_attempt

import telemetry
from telemetry import Trace, begin, span_count, spans

CALLER = "00-12345678901234567890123456789012-1234567890123456-01"


def named(tree: list[telemetry.Span], name: str) -> telemetry.Span:
    (found,) = [s for s in tree if s["name"] == name]
    return found


def shape(tree: list[telemetry.Span], root: str | None = None) -> Any:
    """The tree as nested (name, [children])."""
    parent = tree[0]["parent_span_id"] if root is None else root
    return [(s["name"], shape(tree, s["span_id"])) for s in tree if s["parent_span_id"] == parent]


def errors(tree: list[telemetry.Span]) -> list[str]:
    return [s["name"] for s in tree if s["status"] == "error"]


def events(tree: list[telemetry.Span]) -> list[tuple[str, str]]:
    return [(s["name"], e["attributes"]["exception.type"]) for s in tree for e in s["events"]]


SEND: Any = ("provider.send", [("provider.http", [])])


# --- which spans


def test_a_whole_answer_is_request_dispatch_send_and_http() -> None:
    assert shape(spans(a_record())) == [("request", [("dispatch", [SEND])])]


def test_a_stream_has_a_body_beside_its_attempt() -> None:
    assert shape(spans(a_stream())) == [("request", [("dispatch_stream", [SEND, ("dispatch_stream.body", [])])])]


def test_a_failover_has_one_send_for_each_attempt() -> None:
    failed = an_attempt(status=503, error="the provider failed (503)", error_type="upstream_503", duration_ms=5.0)
    tree = spans(a_record(attempts=[failed, an_attempt(provider="two", attempt=2, start_ms=8.0, span_id="00000000000000a2")]))
    assert shape(tree) == [("request", [("dispatch", [SEND, SEND])])]
    assert [s["attributes"]["router.attempt"] for s in tree if s["name"] == "provider.send"] == [1, 2]
    assert errors(tree) == ["provider.send", "provider.http"]
    assert events(tree) == [("provider.send", "upstream_503")]


def test_an_overloaded_request_has_no_attempt_and_tells_why_on_dispatch() -> None:
    gone = a_record(
        outcome="rejected", status=503, error="too many requests at once", error_type="overloaded", attempts=[], response=None,
        provider=None, sent_model=None, vendor=None, usage_source="none", cost=None, rule=None,
    )  # fmt: skip
    tree = spans(gone)
    assert shape(tree) == [("request", [("dispatch", [])])]
    assert errors(tree) == ["request", "dispatch"]
    assert events(tree) == [("dispatch", "overloaded")]
    assert named(tree, "dispatch")["attributes"]["model"] == "gpt"


def test_a_stream_that_fails_in_its_set_up_has_no_body() -> None:
    failed = an_attempt(status=None, error="no answer", error_type="first_byte_timeout", kind="openai_stream")
    tree = spans(a_stream(outcome="timeout", status=504, error="no answer", error_type="first_byte_timeout", attempts=[failed],
                          response=None, usage_source="none", ttft_ms=None))  # fmt: skip
    assert shape(tree) == [("request", [("dispatch_stream", [SEND])])]
    assert errors(tree) == ["request", "dispatch_stream", "provider.send", "provider.http"]
    assert named(tree, "dispatch_stream")["attributes"]["router.outcome"] == "timeout"


def test_a_stream_that_breaks_later_is_an_error_of_its_body_not_of_its_set_up() -> None:
    broken = an_attempt(error="the provider's stream ended in the middle", error_type="connection_lost", first_token_ms=18.5)
    tree = spans(a_stream(outcome="error", error=broken["error"], error_type="connection_lost", attempts=[broken]))
    assert errors(tree) == ["request", "provider.send", "provider.http", "dispatch_stream.body"]
    assert events(tree) == [("provider.send", "connection_lost")]
    assert named(tree, "dispatch_stream.body")["attributes"]["router.outcome"] == "error"
    assert "router.outcome" not in named(tree, "dispatch_stream")["attributes"]


def test_a_client_that_left_is_no_error_and_says_so() -> None:
    left = an_attempt(error="client_disconnected", error_type="client_disconnected", first_token_ms=18.5)
    tree = spans(a_stream(outcome="cancelled", error="client_disconnected", error_type="client_disconnected", attempts=[left]))
    assert (errors(tree), events(tree)) == ([], [])
    for name in ("request", "dispatch_stream.body"):
        attributes = named(tree, name)["attributes"]
        assert (attributes["router.outcome"], attributes["error.type"]) == ("cancelled", "client_disconnected")


def test_an_attempt_that_failed_before_the_client_left_stays_an_error() -> None:
    failed = an_attempt(status=503, error="503", error_type="upstream_503")
    left = an_attempt(attempt=2, error="client_disconnected", error_type="client_disconnected", span_id="00000000000000a2")
    tree = spans(a_record(outcome="cancelled", status=499, error="client_disconnected", error_type="client_disconnected",
                          attempts=[failed, left]))  # fmt: skip
    assert events(tree) == [("provider.send", "upstream_503")]
    assert errors(tree) == ["provider.send", "provider.http"]


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_a_clients_own_mistake_leaves_the_status_unset(status: int) -> None:
    refused = an_attempt(status=status, error=f"the provider answered {status}", error_type=f"upstream_{status}")
    tree = spans(a_record(outcome="error", status=status, error=refused["error"], error_type=refused["error_type"],
                          attempts=[refused], response=None))  # fmt: skip
    assert (errors(tree), events(tree)) == ([], [])
    assert named(tree, "request")["attributes"]["error.type"] == f"upstream_{status}"


@pytest.mark.parametrize(("upstream", "status", "kind"), [(429, 429, "rate_limit_exceeded"), (401, 502, "provider_auth_error")])
def test_a_provider_that_refuses_us_is_an_error(upstream: int, status: int, kind: str) -> None:
    refused = an_attempt(status=upstream, error="refused", error_type=kind)
    tree = spans(a_record(outcome="error", status=status, error="refused", error_type=kind, attempts=[refused], response=None))
    assert errors(tree) == ["request", "dispatch", "provider.send", "provider.http"]
    assert events(tree) == [("provider.send", kind)]
    assert named(tree, "request")["status_message"] == "refused"


def test_a_failure_that_no_attempt_is_to_blame_for_is_told_where_the_outcome_stands() -> None:
    tree = spans(a_stream(outcome="error", error="internal error", error_type="internal"))
    assert events(tree) == [("dispatch_stream.body", "internal")]


def test_what_a_local_model_tells_of_its_time_lies_within_its_attempt() -> None:
    timed = an_attempt(start_ms=2.0, duration_ms=100.0, timings={"load_ms": 50.0, "prefill_ms": 20.0, "decode_ms": 25.0})
    tree = spans(a_record(attempts=[timed], duration_ms=110.0))
    assert shape(tree)[0][1] == [("dispatch", [("provider.send", [("provider.http", []), ("model.load", []),
                                                                   ("model.prefill", []), ("model.decode", [])])])]  # fmt: skip
    began = [(s["name"], (s["start_ns"] - START) / 1e6, (s["end_ns"] - START) / 1e6) for s in tree if s["name"][:6] == "model."]
    assert began == [("model.load", 7.0, 57.0), ("model.prefill", 57.0, 77.0), ("model.decode", 77.0, 102.0)]


def test_the_decoding_of_a_stream_begins_with_its_first_token() -> None:
    timed = an_attempt(
        start_ms=0.0, duration_ms=100.0, first_token_ms=40.0, timings={"load_ms": 0, "prefill_ms": 15.0, "decode_ms": 500.0}
    )
    tree = spans(a_stream(attempts=[timed], duration_ms=101.0))
    began = {s["name"]: ((s["start_ns"] - START) / 1e6, (s["end_ns"] - START) / 1e6) for s in tree if s["name"][:6] == "model."}
    assert began == {"model.prefill": (25.0, 40.0), "model.decode": (40.0, 100.0)}


# --- ids and times


def test_a_callers_span_is_the_parent_of_the_root() -> None:
    trace = begin(1.0, CALLER, None)
    tree = spans(a_record(_trace=trace))
    assert (tree[0]["span_id"], tree[0]["parent_span_id"]) == (trace.span_id, "1234567890123456")
    assert named(tree, "provider.http")["span_id"] == "00000000000000a1"


def test_without_telemetry_the_same_record_always_gives_the_same_ids() -> None:
    record = a_record(attempts=[an_attempt(span_id=None)])
    assert spans(record) == spans(copy.deepcopy(record))
    other = spans({**record, "generation_id": "gen-1700000000-ABCDEFGHIJKLMNOPQRST"})
    assert {s["span_id"] for s in spans(record)}.isdisjoint(s["span_id"] for s in other)


def test_set_up_ends_where_the_body_begins_and_the_request_ends_with_it() -> None:
    tree = spans(a_stream())
    request, setup, body = (named(tree, n) for n in ("request", "dispatch_stream", "dispatch_stream.body"))
    assert (setup["start_ns"], setup["end_ns"]) == (START, START + 20_000_000)
    assert (body["start_ns"], body["end_ns"]) == (setup["end_ns"], START + 60_000_000)
    assert (request["start_ns"], request["end_ns"]) == (START, body["end_ns"])


# --- what they say


def test_the_root_answers_most_questions_by_itself() -> None:
    root = spans(a_record(user="ann", session_id="s-1"))[0]
    assert root["kind"] == "server"
    assert root["attributes"] == {
        "http.request.method": "POST", "http.route": "/v1/chat/completions", "url.path": "/v1/chat/completions",
        "http.response.status_code": 200, "client.address": "127.0.0.1", "router.outcome": "ok", "router.client_format": "openai",
        "router.api_key_name": "team", "user.id": "ann", "session.id": "s-1", "gen_ai.provider.name": "openai",
        "gen_ai.request.model": "gpt", "gen_ai.response.model": "llama3-8b", "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5, "router.cost": 0.3, "router.overhead_ms": 5.0,
    }  # fmt: skip


def test_dispatch_tells_the_decision() -> None:
    assert named(spans(a_record()), "dispatch")["attributes"] == {
        "request_id": "gen-1700000000-abcdefghijklmnopqrst", "provider": "up", "model": "llama3", "tags": ["tools"],
        "router.rule": "first", "router.outcome": "ok",
    }  # fmt: skip


def test_http_tells_of_the_exchange() -> None:
    span = named(spans(a_record()), "provider.http")
    assert span["kind"] == "client"
    assert span["attributes"] == {
        "provider": "up", "kind": "openai_chat", "server.address": "127.0.0.1", "server.port": 9100, "status": 200,
        "http.request.method": "POST", "http.response.status_code": 200,
    }  # fmt: skip


def test_send_speaks_the_genai_conventions() -> None:
    asked = {"temperature": 0.5, "max_completion_tokens": 100, "top_p": 1, "n": 2, "stop": "END", "seed": 7,
             "reasoning_effort": "low", "frequency_penalty": 0.1, "presence_penalty": -0.1,
             "response_format": {"type": "json_schema"}}  # fmt: skip
    assert named(spans(a_record(request=asked, session_id="s-1")), "provider.send")["attributes"] == {
        "provider": "up", "model": "llama3", "router.attempt": 1, "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "openai", "gen_ai.system": "openai", "gen_ai.request.model": "llama3",
        "gen_ai.conversation.id": "s-1",
        "server.address": "127.0.0.1", "server.port": 9100, "gen_ai.request.temperature": 0.5, "gen_ai.request.max_tokens": 100,
        "gen_ai.request.top_p": 1.0, "gen_ai.request.choice.count": 2, "gen_ai.request.stop_sequences": ["END"],
        "gen_ai.request.seed": 7, "gen_ai.request.reasoning.level": "low", "gen_ai.request.frequency_penalty": 0.1,
        "gen_ai.request.presence_penalty": -0.1, "gen_ai.output.type": "json", "gen_ai.usage.input_tokens": 12,
        "gen_ai.usage.output_tokens": 5, "gen_ai.response.id": "chatcmpl-1", "gen_ai.response.model": "llama3-8b",
        "gen_ai.response.finish_reasons": ["stop"], "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.usage.cache_write.input_tokens": 2, "gen_ai.usage.reasoning.output_tokens": 3,
    }  # fmt: skip


def test_the_first_token_is_told_in_seconds_and_on_streams_only() -> None:
    key = "gen_ai.response.time_to_first_chunk"
    tree = spans(a_stream())
    assert named(tree, "provider.send")["attributes"][key] == 0.0185
    assert named(tree, "dispatch_stream.body")["attributes"][key] == 0.02
    assert named(tree, "provider.send")["attributes"]["gen_ai.request.stream"] is True
    assert not any(key in s["attributes"] or "gen_ai.request.stream" in s["attributes"] for s in spans(a_record()))


def test_only_the_attempt_that_answered_carries_the_answer() -> None:
    failed = an_attempt(status=503, error="x", error_type="upstream_503")
    first, second = (
        s for s in spans(a_record(attempts=[failed, an_attempt(attempt=2, span_id=None)])) if s["name"] == "provider.send"
    )
    assert "gen_ai.usage.input_tokens" not in first["attributes"]
    assert second["attributes"]["gen_ai.usage.input_tokens"] == 12


def test_unknown_usage_is_left_out() -> None:
    tree = spans(a_record(usage_source="none"))
    assert not [k for s in tree for k in s["attributes"] if k.startswith("gen_ai.usage")]


@pytest.mark.parametrize(
    "asked",
    [
        {"temperature": "hot", "max_tokens": 10**400, "seed": True, "top_p": [], "stop": {"a": 1}, "n": None},
        {"temperature": 10**400, "max_tokens": -(10**30), "stop": [1, 2], "reasoning_effort": 5, "response_format": "json"},
    ],
)
def test_what_a_client_sends_of_another_type_is_left_out(asked: dict[str, Any]) -> None:
    attributes = named(spans(a_record(request=asked)), "provider.send")["attributes"]
    assert not [k for k in attributes if k.startswith("gen_ai.request.") and k != "gen_ai.request.model"]


# --- nothing that does not belong there


def test_no_word_of_a_conversation_is_there_unless_asked_for() -> None:
    secret = "SECRET-PROMPT"
    record = a_record(
        system=secret, messages=[{"role": "user", "content": [{"type": "text", "text": secret}]}],
        tools=[{"name": secret, "description": secret, "parameters": {secret: secret}}],
        request={"temperature": 1, "metadata": {"a": secret}, "prediction": secret},
        response=a_response(content=secret, reasoning=secret, tool_calls=[{"id": "c", "name": secret, "arguments": secret}]),
        trace={"note": secret}, reason=secret,
    )  # fmt: skip
    assert secret not in repr(spans(record))
    assert secret in repr(spans(record, content=True))


def test_keys_are_taken_out_of_every_attribute_event_and_status() -> None:
    telemetry.keep_secret("dest-TOKEN-of-the-tree-test")
    leak = "dest-TOKEN-of-the-tree-test"
    attempt = an_attempt(model=leak, error=f"said {leak}", error_type=leak, status=500, provider=leak)
    record = a_record(
        outcome="error", status=502, error=f"https://host/?key={leak}", error_type="upstream_500",
        requested_model=f"x {leak}", user=leak, session_id=leak, tags=[leak], attempts=[attempt],
        rule=leak, system=leak, dropped=[leak],
        messages=[{"role": "user", "content": [{"type": "tool_use", "id": leak, "name": leak, "input": {leak: [leak]}}]}],
        response=a_response(id=leak, model=leak, content=leak, finish_reason=leak),
        request={"stop": [leak], "reasoning_effort": leak},
    )  # fmt: skip
    assert "dest-TOKEN" not in repr(spans(record, content=True))


def test_a_key_registered_later_is_taken_out_of_texts_seen_before() -> None:
    record = a_record(user="late-SECRET-user-name")
    assert spans(record)[0]["attributes"]["user.id"] == "late-SECRET-user-name"
    telemetry.keep_secret("late-SECRET-user-name")
    assert spans(record)[0]["attributes"]["user.id"] == "[redacted]"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("Authorization: Bearer abc.def", "Authorization: Bearer [redacted]"),
        ("Authorization: Basic dXNlcjpwYXNz", "Authorization: Basic [redacted]"),
        ("the basic understanding of a bearer", "the basic understanding of a bearer"),
        ("sk-proj-0123456789", "[redacted]"),
        ("GET /x?api_key=12345&y=1", "GET /x?api_key=[redacted]&y=1"),
        ('{"a": "Bearer xyz"}', '{"a": "Bearer [redacted]"}'),
    ],
)
def test_what_looks_like_a_credential_is_taken_out_once(text: str, left: str) -> None:
    assert telemetry.scrub(text) == left
    assert telemetry.scrub(left) == left


def test_texts_that_no_backend_could_store_are_repaired() -> None:
    tree = spans(a_record(user="a\ud800b\x00c", requested_model="m\udfff", tags=["\ud800"]))
    assert tree[0]["attributes"]["user.id"] == "a�b�c"
    assert tree[0]["attributes"]["gen_ai.request.model"] == "m�"
    assert named(tree, "dispatch")["attributes"]["tags"] == ["�"]


def test_long_values_are_cut_and_say_so() -> None:
    tree = spans(
        a_record(user="u" * 1_000_000, tags=["t"] * 1000, error="e" * 100_000, error_type="x", outcome="error", status=500)
    )
    assert tree[0]["attributes"]["user.id"] == "u" * 4096 + "…"
    assert len(named(tree, "dispatch")["attributes"]["tags"]) == 128
    assert len(tree[0]["status_message"]) == 1025
    assert max(len(s["attributes"]) for s in tree) < 64


# --- the opt-in


def captured(**changes: Any) -> dict[str, Any]:
    attributes: dict[str, Any] = named(spans(a_record(**changes), content=True), "provider.send")["attributes"]
    return attributes


def test_a_conversation_is_captured_in_the_shape_of_the_conventions() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "what is it?"},
                                     {"type": "image", "media_type": "image/png", "data": "AAAA"},
                                     {"type": "image", "url": "https://host/a.png"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"},
                                          {"type": "tool_use", "id": "c1", "name": "look", "input": {"at": 1}}]},
        {"role": "tool", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "a cat"}]},
    ]  # fmt: skip
    answer = a_response(content="a cat", reasoning="seen", finish_reason="tool_calls",
                        tool_calls=[{"id": "c2", "name": "say", "arguments": '{"x":1}'}])  # fmt: skip
    found = captured(messages=messages, system="be brief", response=answer,
                     tools=[{"name": "look", "description": None, "parameters": {"type": "object"}}])  # fmt: skip
    assert json.loads(found["gen_ai.system_instructions"]) == [{"type": "text", "content": "be brief"}]
    assert json.loads(found["gen_ai.input.messages"]) == [
        {"role": "user", "parts": [{"type": "text", "content": "what is it?"}, {"type": "image", "mime_type": "image/png"},
                                   {"type": "uri", "modality": "image", "uri": "https://host/a.png"}]},
        {"role": "assistant", "parts": [{"type": "reasoning", "content": "hm"},
                                        {"type": "tool_call", "id": "c1", "name": "look", "arguments": {"at": 1}}]},
        {"role": "tool", "parts": [{"type": "tool_call_response", "id": "c1", "response": "a cat"}]},
    ]  # fmt: skip
    assert json.loads(found["gen_ai.output.messages"]) == [
        {"role": "assistant", "finish_reason": "tool_calls",
         "parts": [{"type": "reasoning", "content": "seen"}, {"type": "text", "content": "a cat"},
                   {"type": "tool_call", "id": "c2", "name": "say", "arguments": '{"x":1}'}]},
    ]  # fmt: skip
    assert json.loads(found["gen_ai.tool.definitions"]) == [
        {"type": "function", "name": "look", "description": None, "parameters": {"type": "object"}}
    ]


def test_a_long_conversation_keeps_its_end_and_stays_json() -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": f"{n} " + "x" * 10_000}]} for n in range(100)]
    found = captured(messages=messages)
    kept = json.loads(found["gen_ai.input.messages"])
    assert len(found["gen_ai.input.messages"]) <= telemetry.CONTENT_CHARS
    assert kept[-1]["parts"][0]["content"].startswith("99 ")
    assert found["router.content_truncated"] is True
    assert "router.content_truncated" not in captured()


@pytest.mark.parametrize("size", [1_000_000, 20_000_000])
def test_a_single_huge_text_is_cut(size: int) -> None:
    found = captured(messages=[{"role": "user", "content": [{"type": "text", "text": "x" * size}]}])
    assert len(json.loads(found["gen_ai.input.messages"])[0]["parts"][0]["content"]) == telemetry.PIECE_CHARS + 1


def test_captured_text_with_surrogates_and_quoted_keys_stays_json() -> None:
    text = 'say "Bearer abc\\" \ud800\x00 sk-0123456789abcdef"'
    found = captured(messages=[{"role": "user", "content": [{"type": "text", "text": text}]}])
    content = json.loads(found["gen_ai.input.messages"])[0]["parts"][0]["content"]
    assert "abc" not in content
    assert "sk-" not in content
    assert found["gen_ai.input.messages"].encode()


# --- for all records

texts = st.text(max_size=20) | st.just("\ud800\x00") | st.none()
attempts = st.builds(
    an_attempt,
    status=st.sampled_from([None, 200, 400, 429, 500]),
    error_type=st.sampled_from([None, "client_disconnected", "upstream_500"]),
    error=texts, model=st.text(max_size=5), start_ms=st.floats(0, 1e6), duration_ms=st.floats(0, 1e6) | st.none(),
    first_token_ms=st.floats(0, 1e6) | st.none(), span_id=st.none(), vendor=texts, kind=texts,
    timings=st.none() | st.fixed_dictionaries({f"{n}_ms": st.none() | st.floats(0, 1e6) for n in ("load", "prefill", "decode")}),
)  # fmt: skip
records = st.builds(
    a_record,
    outcome=st.sampled_from(["ok", "error", "cancelled", "timeout", "rejected"]),
    status=st.sampled_from([200, 400, 429, 499, 502]),
    stream=st.booleans(), error_type=st.sampled_from([None, "client_disconnected", "upstream_500"]), error=texts, user=texts,
    opened_ms=st.none() | st.floats(0, 1e6), ttft_ms=st.none() | st.floats(0, 1e6), duration_ms=st.floats(0, 1e6),
    attempts=st.lists(attempts, max_size=4),
    response=st.none() | st.builds(a_response, id=texts, model=texts, finish_reason=texts),
    usage_source=st.sampled_from(["reported", "none"]),
    _trace=st.none() | st.builds(Trace, st.just("ab" * 16), sampled=st.just(True)),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(records, st.booleans())
def test_every_record_gives_one_whole_tree(record: dict[str, Any], content: bool) -> None:
    before = copy.deepcopy({k: v for k, v in record.items() if k != "_trace"})
    tree = spans(record, content)
    ids = [s["span_id"] for s in tree]
    assert len(set(ids)) == len(ids) == span_count(record)
    assert all(s["parent_span_id"] in ids for s in tree[1:])
    assert all(s["end_ns"] >= s["start_ns"] >= START for s in tree)
    assert sum(len(s["events"]) for s in tree) >= (errors(tree) != [])
    assert {k: v for k, v in record.items() if k != "_trace"} == before
    json.dumps(tree).encode()
    repr(tree).encode()
