"""One finished record becomes OpenRouter's trace: against the captures, the documents' examples and the strict JSON form."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from broadcast_records import ATTEMPT, GENERATION_ID, RECORD, attributes, failed, generation, record, spans, to_bytes
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broadcast.encoder import encode, fragment
from broadcast.otlp import envelope

WIRE = Path(__file__).parent / "wire" / "broadcast"
RESPONSE: dict[str, Any] = RECORD["response"]


def capture(name: str) -> dict[str, Any]:
    made: dict[str, Any] = json.loads((WIRE / name).read_text())
    return made


def one(**changes: Any) -> dict[str, Any]:
    return attributes(generation(encode(record(**changes), privacy=False)))


def by_name(document: dict[str, Any], name: str) -> dict[str, Any]:
    found = [span for span in spans(document) if span["name"] == name]
    assert len(found) == 1
    return found[0]


# -- against the captures


LACKING = {
    "gen_ai.usage.input_tokens.cache_write_5m": "the record has one number for all cache writes, whatever their life",
    "gen_ai.usage.input_tokens.cache_write_1h": "the record has one number for all cache writes, whatever their life",
    "span.metadata.endpoint_id": "an id of OpenRouter's own catalogue",
}
OWN_VALUE = {
    "gen_ai.prompt": "the capture's prompt is shortened",
    "gen_ai.completion": "the capture's completion is shortened",
    "trace.metadata.provider_responses": "without endpoint_id, as above",
    "span.metadata.provider_responses": "without endpoint_id, as above",
    "trace.metadata.openrouter.provider_slug": "OpenRouter's adds a region; ours is the name in lower case",
}


def test_every_attribute_of_the_capture_is_there_but_for_those_we_cannot_know() -> None:
    theirs, ours = spans(capture("openrouter-generation.capture.json")), spans(encode(RECORD, privacy=False))
    lacking = {key for a, b in zip(theirs, ours, strict=True) for key in attributes(a).keys() - attributes(b).keys()}
    for key in sorted(lacking):
        print(f"{key}: {LACKING.get(key, 'UNEXPLAINED')}")
    assert lacking == set(LACKING)


def test_every_attribute_has_the_captures_type_and_value() -> None:
    for theirs, ours in zip(
        spans(capture("openrouter-generation.capture.json")), spans(encode(RECORD, privacy=False)), strict=True
    ):
        have = {pair["key"]: pair["value"] for pair in ours["attributes"]}
        for pair in theirs["attributes"]:
            if pair["key"] in LACKING:
                continue
            assert have[pair["key"]].keys() == pair["value"].keys(), pair["key"]
            if pair["key"] not in OWN_VALUE:
                assert have[pair["key"]] == pair["value"], pair["key"]


def test_ids_kinds_names_status_parents_and_the_roots_times_are_the_captures() -> None:
    theirs, ours = spans(capture("openrouter-generation.capture.json")), spans(encode(RECORD, privacy=False))
    for a, b in zip(theirs, ours, strict=True):
        for key in ("traceId", "spanId", "parentSpanId", "name", "kind", "status"):
            assert a.get(key) == b.get(key)
        assert a.keys() == b.keys()
    for key in ("startTimeUnixNano", "endTimeUnixNano"):
        assert theirs[0][key] == ours[0][key]


def test_the_envelope_is_the_captures_one_resource_entry_per_span() -> None:
    theirs, ours = capture("openrouter-generation.capture.json"), encode(RECORD, privacy=False)
    for a, b in zip(theirs["resourceSpans"], ours["resourceSpans"], strict=True):
        assert b["resource"] == a["resource"]
        assert [scope["scope"] for scope in b["scopeSpans"]] == [scope["scope"] for scope in a["scopeSpans"]]
        assert len(b["scopeSpans"][0]["spans"]) == 1


def test_the_content_attributes_have_the_captures_inner_shape() -> None:
    theirs = attributes(spans(capture("openrouter-generation.capture.json"))[0])
    ours = attributes(generation(encode(RECORD, privacy=False)))
    for key in ("gen_ai.prompt", "gen_ai.completion", "trace.metadata.provider_responses"):
        a, b = json.loads(theirs[key]), json.loads(ours[key])
        assert shape(b) == shape(a) or key == "trace.metadata.provider_responses"
    inner = json.loads(ours["trace.metadata.provider_responses"])[0]
    assert inner.keys() == json.loads(theirs["trace.metadata.provider_responses"])[0].keys() - {"endpoint_id"}


def shape(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items() if key != "rawRequest"}
    return [shape(item) for item in value[:1]] if isinstance(value, list) else type(value).__name__


# -- the documents' examples


@pytest.mark.parametrize("name", ["collector-example", "grafana-example"])
def test_the_documents_example_becomes_its_golden_file(name: str) -> None:
    client = capture(f"{name}.client.json")
    text = client["messages"][0]["content"]
    made = encode(
        RECORD
        | {
            "requested_model": client["model"],
            "sent_model": "gpt-4o",
            "user": client["user"],
            "session_id": client["session_id"],
            "trace": client["trace"],
            "messages": [{"role": "user", "content": [{"type": "text", "text": text}]}],
            "request": {"model": client["model"]},
            "stream": False,
        },
        privacy=False,
    )
    assert made == capture(f"{name}.otlp.json")


def test_the_collector_documents_example_is_what_its_text_promises() -> None:
    client = capture("collector-example.client.json")
    made = encode(record(trace=client["trace"], user=client["user"], session_id=client["session_id"]), privacy=False)
    root, inner = by_name(made, "Chat Handler"), by_name(made, "Generate Response")
    assert "parentSpanId" not in root
    assert inner["parentSpanId"] == root["spanId"]
    assert {span["traceId"] for span in spans(made)} == {hashlib.sha256(b"app_trace_001").hexdigest()[:32]}
    have = attributes(inner)
    assert have["trace.metadata.environment"] == "staging"
    assert have["trace.metadata.deployment"] == "us-east-1"
    assert (have["user.id"], have["session.id"]) == ("user_12345", "session_abc")
    assert have["trace.metadata.trace_id"] == "app_trace_001"


def test_the_grafana_documents_custom_queries_find_their_attributes() -> None:
    have = one(trace=capture("grafana-example.client.json")["trace"], user="user_abc123", requested_model="openai/gpt-4-turbo")
    assert have["trace.metadata.alert_id"] == "alert_789"
    assert have["trace.metadata.environment"] == "production"
    assert have["user.id"] == "user_abc123"
    assert have["gen_ai.request.model"] == "openai/gpt-4-turbo"
    assert have["gen_ai.system"] == "openai"


# -- ids and hierarchy


def test_ids_follow_the_sha256_rule() -> None:
    made = spans(encode(RECORD, privacy=False))
    assert made[0]["traceId"] == hashlib.sha256(GENERATION_ID.encode()).hexdigest()[:32]
    assert [span["spanId"] for span in made] == [
        hashlib.sha256(seed.encode()).hexdigest()[:16]
        for seed in (GENERATION_ID, f"{GENERATION_ID}:attempt-0", f"{GENERATION_ID}:generation")
    ]


@pytest.mark.parametrize(
    ("sent", "trace_id"),
    [
        ("0AF7651916CD43DD8448EB211C80319C", "0af7651916cd43dd8448eb211c80319c"),
        ("0af76519-16cd-43dd-8448-eb211c80319c", "0af7651916cd43dd8448eb211c80319c"),
        ("app_trace_001", hashlib.sha256(b"app_trace_001").hexdigest()[:32]),
        ("0" * 32, hashlib.sha256(b"0" * 32).hexdigest()[:32]),
        ("0af76519-16cd43dd8448eb211c80319c", hashlib.sha256(b"0af76519-16cd43dd8448eb211c80319c").hexdigest()[:32]),
        ("x" * 500, hashlib.sha256(b"x" * 500).hexdigest()[:32]),
        ("Überwachung", hashlib.sha256("Überwachung".encode()).hexdigest()[:32]),
        (17, hashlib.sha256(b"17").hexdigest()[:32]),
    ],
)
def test_any_trace_id_becomes_a_valid_one_and_the_original_is_kept(sent: Any, trace_id: str) -> None:
    made = encode(record(trace={"trace_id": sent}), privacy=True)
    assert {span["traceId"] for span in spans(made)} == {trace_id}
    assert attributes(generation(made))["trace.metadata.trace_id"] == sent


def test_a_trace_id_of_32_hex_digits_is_used_as_it_is() -> None:
    made = encode(record(trace={"trace_id": "0af7651916cd43dd8448eb211c80319c"}), privacy=True)
    assert {span["traceId"] for span in spans(made)} == {"0af7651916cd43dd8448eb211c80319c"}
    assert "trace.metadata.trace_id" not in attributes(generation(made))


@pytest.mark.parametrize("sent", ["", "  ", None, [], {"a": 1}, True])
def test_what_cannot_name_a_group_leaves_the_requests_own_trace_id(sent: Any) -> None:
    made = encode(RECORD | {"trace": {"trace_id": sent}}, privacy=True)
    assert {span["traceId"] for span in spans(made)} == {hashlib.sha256(GENERATION_ID.encode()).hexdigest()[:32]}


@pytest.mark.parametrize("key", ["trace_id", "parent_span_id", "trace_name", "span_name", "generation_name"])
def test_a_key_that_is_null_says_nothing(key: str) -> None:
    made = attributes(generation(encode(record(trace={key: None}), privacy=False)))
    assert f"trace.metadata.{key}" not in made


def test_an_empty_session_is_none() -> None:
    made = attributes(generation(encode(record(session_id=""), privacy=False)))
    assert "session.id" not in made
    assert "gen_ai.conversation.id" not in made


def test_tokens_that_were_only_counted_are_not_summed_up() -> None:
    made = attributes(generation(encode(record(operation="count_tokens", cost=None), privacy=False)))
    assert made["gen_ai.operation.name"] == "count_tokens"
    assert not [key for key in made if key.startswith("gen_ai.usage.")]


def test_two_requests_with_one_trace_id_share_a_trace_and_no_span() -> None:
    first, second = (spans(encode(record(trace={"trace_id": "run 7", "trace_name": "run"}), privacy=True)) for _ in range(2))
    assert {span["traceId"] for span in first} == {span["traceId"] for span in second}
    assert not {span["spanId"] for span in first} & {span["spanId"] for span in second}


def test_names_build_a_tree_under_the_clients_own_span() -> None:
    trace = {"parent_span_id": "00F067AA0BA902B7", "trace_name": "job", "span_name": "step", "generation_name": "ask"}
    made = encode(RECORD | {"trace": trace}, privacy=True)
    job, step, ask = (by_name(made, name) for name in ("job", "step", "ask"))
    assert job["parentSpanId"] == "00f067aa0ba902b7"
    assert step["parentSpanId"] == job["spanId"] == hashlib.sha256(f"{GENERATION_ID}:trace".encode()).hexdigest()[:16]
    assert ask["parentSpanId"] == step["spanId"] == hashlib.sha256(f"{GENERATION_ID}:span".encode()).hexdigest()[:16]
    assert [span["parentSpanId"] for span in spans(made)[3:]] == [ask["spanId"]] * 2
    assert attributes(ask)["trace.name"] == "job"
    assert [span["kind"] for span in spans(made)] == [1, 1, 3, 2, 2]


@pytest.mark.parametrize("sent", ["0" * 16, "xyz", "00f067aa0ba902b", 12, None, "00f067aa0ba902b7ff"])
def test_a_parent_that_is_no_span_id_is_kept_as_metadata_only(sent: Any) -> None:
    made = generation(encode(record(trace={"parent_span_id": sent}), privacy=True))
    assert "parentSpanId" not in made
    assert ("trace.metadata.parent_span_id" in attributes(made)) == (sent is not None)


def test_only_the_generation_span_carries_tokens_and_money() -> None:
    made = encode(record(trace={"trace_name": "a", "span_name": "b"}), privacy=False)
    others = [span for span in spans(made) if attributes(span)["span.type"] == "span"]
    assert len(others) == 4
    assert not [key for span in others for key in attributes(span) if key.startswith("gen_ai.usage")]


# -- metadata


def test_metadata_keeps_its_scalar_types() -> None:
    have = encode(record(trace={"s": "x", "i": 3, "f": 2.5, "b": True, "n": None, "l": [1, "a"], "o": {"k": 1}}), privacy=True)
    pairs = {pair["key"]: pair["value"] for pair in generation(have)["attributes"]}
    assert pairs["trace.metadata.s"] == {"stringValue": "x"}
    assert pairs["trace.metadata.i"] == {"intValue": 3}
    assert pairs["trace.metadata.f"] == {"doubleValue": 2.5}
    assert pairs["trace.metadata.b"] == {"boolValue": True}
    assert pairs["trace.metadata.n"] == {"stringValue": "null"}
    assert pairs["trace.metadata.l"] == {"stringValue": '[1,"a"]'}
    assert pairs["trace.metadata.o"] == {"stringValue": '{"k":1}'}


def test_metadata_cannot_take_the_place_of_an_attribute_of_ours() -> None:
    have = one(trace={"openrouter.provider_name": "forged", "provider_responses": "forged"})
    assert have["trace.metadata.openrouter.provider_name"] == "Amazon Bedrock"
    assert have["trace.metadata.provider_responses"].startswith('[{"id"')
    moved = [key for key, value in have.items() if value == "forged"]
    assert len(moved) == 2
    assert all(re.search(r"~[0-9a-f]{8}$", key) for key in moved)


def test_a_long_value_is_cut_and_marked() -> None:
    have = one(trace={"big": "x" * 10_000_001})
    assert len(have["trace.metadata.big"]) == 10_000_000
    assert have["trace.metadata.big.truncated"] is True


def test_a_long_key_is_cut_and_stays_its_own() -> None:
    have = one(trace={"k" * 1_000_000: 1, "k" * 1_000_001: 2})
    assert sorted(have[key] for key in have if "kkk" in key) == [1, 2]
    assert max(map(len, have)) < 300


def test_ten_thousand_keys_are_bounded_and_marked() -> None:
    have = one(trace={f"k{n}": n for n in range(10_000)})
    assert have["trace.metadata.truncated"] is True
    assert sum(key.startswith("trace.metadata.k") for key in have) == 1_000


def test_odd_text_and_numbers_are_repaired_and_marked_and_their_neighbours_stay() -> None:
    trace = {"lone": "a\ud800b", "pair": "\ud83d\ude00", "nul": "a\0b", "sep": "a\u2028b", "big": 10**400, "good": 1}
    have = one(trace=trace)
    assert (have["trace.metadata.lone"], have["trace.metadata.lone.repaired"]) == ("a\ufffdb", True)
    assert (have["trace.metadata.pair"], have["trace.metadata.pair.repaired"]) == ("😀", True)
    assert (have["trace.metadata.nul"], have["trace.metadata.nul.repaired"]) == ("a\ufffdb", True)
    assert have["trace.metadata.sep"] == "a\u2028b"
    assert "trace.metadata.sep.repaired" not in have
    assert have["trace.metadata.big"] == str(10**400)
    assert have["trace.metadata.good"] == 1


def test_numbers_json_has_no_word_for_become_text() -> None:
    have = one(trace={"nan": float("nan"), "inf": float("inf"), "deep": {"x": [float("-inf")]}, "huge": 10**5000})
    assert (have["trace.metadata.nan"], have["trace.metadata.inf"]) == ("NaN", "Infinity")
    assert have["trace.metadata.deep"] == '{"x":["-Infinity"]}'
    assert have["trace.metadata.huge"].startswith("0x")


def test_the_edges_of_a_64_bit_integer_stay_integers() -> None:
    have = one(trace={"least": -(2**63), "most": 2**63 - 1, "beyond": 2**63})
    assert (have["trace.metadata.least"], have["trace.metadata.most"]) == (-(2**63), 2**63 - 1)
    assert have["trace.metadata.beyond"] == str(2**63)


def test_metadata_a_thousand_levels_deep_is_cut_and_not_lost() -> None:
    deep: Any = "end"
    for _ in range(5_000):
        deep = [deep]
    assert "deeper levels left out" in one(trace={"deep": deep})["trace.metadata.deep"]


# -- usage, money, parameters, content


def test_money_is_a_double_even_when_nothing_was_paid_and_tokens_are_integers() -> None:
    cost = dict.fromkeys(("input", "output", "total"), 0) | {"source": "configured"}
    pairs = {p["key"]: p["value"] for p in generation(encode(record(cost=cost), privacy=True))["attributes"]}
    assert pairs["gen_ai.usage.total_cost"] == {"doubleValue": 0.0}
    assert b'"gen_ai.usage.total_cost","value":{"doubleValue":0.0}' in to_bytes(encode(record(cost=cost), privacy=True))
    assert pairs["gen_ai.usage.total_tokens"] == {"intValue": 3058}


@pytest.mark.parametrize("bad", [-1, 1.5, "12", True, 2**63, None])
def test_a_count_that_is_none_is_left_out(bad: Any) -> None:
    have = one(response=RESPONSE | {"usage": RESPONSE["usage"] | {"input_tokens": bad}})
    assert "gen_ai.usage.input_tokens" not in have
    assert "gen_ai.usage.total_tokens" not in have
    assert have["gen_ai.usage.output_tokens"] == 569


def test_request_parameters_keep_one_type_each() -> None:
    request = {"temperature": 1, "top_p": 0.5, "max_tokens": 100, "seed": 7, "n": 2, "reasoning_effort": "high", "stop": "END"}
    made = generation(encode(record(request=request | {"response_format": {"type": "json_object"}}), privacy=False))
    pairs = {pair["key"]: pair["value"] for pair in made["attributes"]}
    assert pairs["gen_ai.request.temperature"] == {"doubleValue": 1.0}
    assert pairs["gen_ai.request.max_tokens"] == {"intValue": 100}
    assert pairs["gen_ai.request.choice.count"] == {"intValue": 2}
    assert pairs["gen_ai.request.reasoning.level"] == {"stringValue": "high"}
    assert pairs["gen_ai.request.stop_sequences"] == {"stringValue": '["END"]'}
    assert pairs["gen_ai.output.type"] == {"stringValue": "json"}


def test_the_author_is_the_part_before_the_slash_else_who_served_it() -> None:
    assert one(requested_model="x-ai/grok", vendor="openai")["gen_ai.system"] == "x-ai"
    assert one(requested_model="fast", sent_model="openai/gpt-4o")["gen_ai.provider.name"] == "openai"
    assert one(requested_model="llama3", sent_model="llama3", vendor="ollama")["gen_ai.provider.name"] == "ollama"


def test_prompt_and_answer_are_there_three_times_in_openrouters_words_and_once_in_the_current_ones() -> None:
    have = one(system="Be brief.", tools=[{"name": "write", "description": "d", "parameters": {}}])
    assert have["trace.input"] == have["span.input"] == have["gen_ai.prompt"]
    assert have["trace.output"] == have["span.output"] == have["gen_ai.completion"]
    assert json.loads(have["gen_ai.prompt"])["messages"][0] == {"role": "system", "content": "Be brief."}
    assert json.loads(have["gen_ai.completion"])["rawRequest"] == RECORD["request"]
    assert json.loads(have["gen_ai.input.messages"]) == [{"role": "user", "parts": [{"type": "text", "content": "Hello!"}]}]
    output = json.loads(have["gen_ai.output.messages"])
    assert [part["type"] for part in output[0]["parts"]] == ["reasoning", "text", "tool_call"]
    assert output[0]["finish_reason"] == "tool_calls"


def test_every_kind_of_block_has_its_part() -> None:
    content = [
        {"type": "thinking", "thinking": "hm"},
        {"type": "tool_use", "id": "t", "name": "f", "input": {"a": 1}},
        {"type": "tool_result", "tool_use_id": "t", "content": "42"},
        {"type": "image", "url": "https://pictures.example/1.png"},
        {"type": "image", "media_type": "image/png", "data": "aGk="},
        {"type": "new", "x": 1},
    ]
    parts = json.loads(one(messages=[{"role": "user", "content": content}])["gen_ai.input.messages"])[0]["parts"]
    assert [part["type"] for part in parts] == ["reasoning", "tool_call", "tool_call_response", "uri", "blob", "new"]


def test_the_bulk_of_media_is_left_out_and_said() -> None:
    image = {"type": "image", "media_type": "image/png", "data": "A" * 100_000}
    content = [image, {"type": "tool_result", "tool_use_id": "t", "content": [image]}, {"type": "text", "text": "B" * 100_000}]
    prompt = one(messages=[{"role": "user", "content": content}])["gen_ai.prompt"]
    assert "A" * 100 not in prompt
    assert prompt.count("[100000 characters left out]") == 2
    assert "B" * 100_000 in prompt


# -- failures


def test_a_failed_request_is_an_error_with_one_exception_event_and_its_message() -> None:
    made = generation(encode(failed(), privacy=False))
    assert made["status"] == {"code": 2, "message": "upstream said no"}
    assert [event["name"] for event in made["events"]] == ["exception"]
    assert attributes(made["events"][0]) == {"exception.type": "Error", "exception.message": "upstream said no"}
    assert made["events"][0]["timeUnixNano"] == made["endTimeUnixNano"]
    have = attributes(made)
    assert (have["span.level"], have["span.status_message"], have["error.type"]) == (
        "ERROR",
        "upstream said no",
        "upstream_error",
    )
    assert not [key for key in have if "finish_reason" in key or "cost" in key]


def test_a_client_that_left_is_told_in_openrouters_own_words() -> None:
    made = encode(failed(outcome="cancelled", error_type="client_disconnected", error="gone: Hello!"), privacy=False)
    assert generation(made)["status"] == {"code": 2, "message": "The client has disconnected"}


def test_a_broken_answer_keeps_its_tokens_and_text_but_no_finish_and_no_configured_cost() -> None:
    changes = {"outcome": "error", "error_type": "stream_idle_timeout", "error": "stalled"}
    have = attributes(generation(encode(record(**changes), privacy=False)))
    assert have["gen_ai.usage.output_tokens"] == 569
    assert "Hi." in have["gen_ai.completion"]
    assert not [key for key in have if "finish_reason" in key or "cost" in key]
    reported = record(**changes, cost=RECORD["cost"] | {"source": "reported"})
    assert attributes(generation(encode(reported, privacy=False)))["gen_ai.usage.total_cost"] == 0.005334


def test_nothing_is_said_of_tokens_nobody_counted() -> None:
    assert not [key for key in one(usage_source="none") if "tokens" in key and "usage" in key]


def test_a_failover_shows_each_attempt_in_its_time() -> None:
    first = ATTEMPT | {
        "provider": "One",
        "start_ms": 0.0,
        "duration_ms": 40.0,
        "status": 503,
        "error": "busy",
        "headers_ms": 30.0,
    }
    made = encode(record(attempts=[first | {"error_type": "upstream_error"}, ATTEMPT]), privacy=False)
    one, two = by_name(made, "provider attempt 1: One"), by_name(made, "provider attempt 2: Amazon Bedrock")
    assert one["status"] == {"code": 2, "message": "busy"}
    assert two["status"] == {"code": 1}
    assert attributes(one)["span.metadata.status_code"] == 503
    assert [attributes(span)["span.metadata.attempt_index"] for span in (one, two)] == [0, 1]
    assert int(one["endTimeUnixNano"]) - int(one["startTimeUnixNano"]) == 40_000_000
    assert by_name(made, "generation")["startTimeUnixNano"] == two["endTimeUnixNano"]
    assert generation(made)["status"] == {"code": 1}
    assert len(json.loads(attributes(generation(made))["trace.metadata.provider_responses"])) == 2


def test_a_request_nobody_was_asked_about_is_one_span() -> None:
    made = spans(encode(failed(outcome="rejected", attempts=[], provider=None, error_type="overloaded"), privacy=True))
    assert [span["name"] for span in made] == ["LLM Generation"]
    assert made[0]["status"]["message"] == "The router had no free place for the request"


def test_children_never_outlive_their_parent() -> None:
    made = spans(encode(record(duration_ms=100.0, attempts=[ATTEMPT]), privacy=True))
    assert all(int(span["endTimeUnixNano"]) <= int(made[0]["endTimeUnixNano"]) for span in made)
    assert all(int(span["startTimeUnixNano"]) <= int(span["endTimeUnixNano"]) for span in made)


def test_model_load_prefill_and_decode_times_are_on_the_attempt() -> None:
    attempt = ATTEMPT | {"timings": {"load_ms": 12.5, "prefill_ms": 3, "decode_ms": None}}
    have = attributes(by_name(encode(record(attempts=[attempt]), privacy=True), "provider attempt 1: Amazon Bedrock"))
    assert (have["span.metadata.load_ms"], have["span.metadata.prefill_ms"]) == (12.5, 3.0)
    assert "span.metadata.decode_ms" not in have


def test_service_name_and_version_can_be_ones_own() -> None:
    made = encode(RECORD, privacy=True, service_name="router", service_version="2")
    resource = {pair["key"]: pair["value"]["stringValue"] for pair in made["resourceSpans"][0]["resource"]["attributes"]}
    assert resource == {"service.name": "router", "openrouter.trace.id": GENERATION_ID, "service.version": "2"}


def test_encoding_changes_nothing_in_the_record() -> None:
    before = json.dumps(RECORD, sort_keys=True)
    encode(RECORD, privacy=False)
    encode(RECORD, privacy=True)
    assert json.dumps(RECORD, sort_keys=True) == before


# -- the strict JSON form


SPAN_KEYS = {
    "traceId", "spanId", "parentSpanId", "name", "kind", "startTimeUnixNano", "endTimeUnixNano", "status", "attributes", "events"
}  # fmt: skip


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    assert len(dict(pairs)) == len(pairs), "a name came twice in one object"
    return dict(pairs)


def no_constant(name: str) -> Any:
    raise AssertionError(f"{name} is not JSON")


def check_strictly(one: dict[str, Any], privacy: bool) -> dict[str, Any]:
    """OTLP JSON as receivers take it: hex ids, integer enums, times as decimal strings, one typed value per unique key."""
    text = envelope([fragment(one, privacy, "openrouter", "1.0.0")]).decode()
    document: dict[str, Any] = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    assert document == encode(one, privacy=privacy)
    assert text == json.dumps(document, ensure_ascii=False, separators=(",", ":")), "written as any JSON writer would"
    assert document.keys() == {"resourceSpans"}
    for entry in document["resourceSpans"]:
        check_attributes(entry["resource"]["attributes"])
        (scope,) = entry["scopeSpans"]
        (span,) = scope["spans"]
        check_span(span)
    return document


def check_span(span: dict[str, Any]) -> None:
    assert span.keys() <= SPAN_KEYS
    assert re.fullmatch(r"[0-9a-f]{32}", span["traceId"])
    assert span["traceId"].strip("0")
    for key in ("spanId", "parentSpanId"):
        assert re.fullmatch(r"[0-9a-f]{16}", span.get(key, "a" * 16))
    assert type(span["kind"]) is int
    assert 1 <= span["kind"] <= 5
    assert span["name"]
    times = [span["startTimeUnixNano"], span["endTimeUnixNano"], *(event["timeUnixNano"] for event in span.get("events", []))]
    assert all(re.fullmatch(r"[0-9]{19}", time) for time in times)
    assert span["status"]["code"] in (1, 2)
    assert ("message" in span["status"]) == (span["status"]["code"] == 2)
    check_attributes(span["attributes"])
    for event in span.get("events", []):
        check_attributes(event["attributes"])


TYPES: dict[str, Any] = {"stringValue": str, "intValue": int, "doubleValue": float, "boolValue": bool}


def check_attributes(pairs: list[dict[str, Any]]) -> None:
    keys = [pair["key"] for pair in pairs]
    assert len(set(keys)) == len(keys)
    for pair in pairs:
        assert pair.keys() == {"key", "value"}
        kind, value = next(iter(pair["value"].items()))
        assert len(pair["value"]) == 1
        assert type(value) is TYPES[kind]
        assert kind != "intValue" or -(2**63) <= value < 2**63
        assert pair["key"]
        assert "\0" not in f"{pair['key']}{value}"


def check_with_the_projects_own_codec(document: dict[str, Any]) -> None:
    """Through OpenTelemetry's generated OTLP JSON classes and back, nothing lost."""
    service = pytest.importorskip("opentelemetry.proto_json.collector.trace.v1.trace_service")
    read = service.ExportTraceServiceRequest.from_dict(document).to_dict()
    assert len(read["resourceSpans"]) == len(document["resourceSpans"])
    for ours, theirs in zip(spans(document), spans(read), strict=True):
        for key in ("traceId", "spanId", "name", "kind", "startTimeUnixNano", "endTimeUnixNano"):
            assert ours[key] == theirs[key]
        assert [pair["key"] for pair in ours["attributes"]] == [pair["key"] for pair in theirs["attributes"]]


@pytest.mark.parametrize("privacy", [False, True])
@pytest.mark.parametrize("make", [record, failed])
def test_what_is_sent_is_strict_otlp_json(make: Any, privacy: bool) -> None:
    one = make(trace={"trace_name": "t", "i": 1, "f": 0.5, "s": "\ud800"}, user="u", session_id="s")
    check_with_the_projects_own_codec(check_strictly(one, privacy))


odd_text = st.text(st.characters(exclude_categories=()), max_size=30)
scalars = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | odd_text
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(odd_text, inner, max_size=4), max_leaves=12
)
names = st.sampled_from(["trace_id", "trace_name", "span_name", "generation_name", "parent_span_id", "environment"])
traces = st.dictionaries(names | odd_text, anything, max_size=8)
blocks = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "tool_use", "tool_result", "thinking", "odd"])}
).flatmap(
    lambda base: st.dictionaries(st.sampled_from(["text", "url", "data", "input", "content", "id"]), anything, max_size=4).map(
        lambda more: base | more
    )
)
messages = st.lists(st.fixed_dictionaries({"role": odd_text, "content": st.lists(blocks, max_size=3)}), max_size=3)
requests = st.dictionaries(
    st.sampled_from(["temperature", "max_tokens", "n", "seed", "stop", "response_format", "reasoning", "reasoning_effort"])
    | odd_text,
    anything,
    max_size=6,
)
outcomes = st.sampled_from(["ok", "error", "cancelled", "timeout", "rejected"])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(
    trace=traces, said=messages, request=requests, user=odd_text, system=st.none() | odd_text, outcome=outcomes, error=odd_text
)
def test_whatever_a_client_sends_is_strict_otlp_json(
    trace: Any, said: Any, request: Any, user: str, system: Any, outcome: str, error: str
) -> None:
    changes = {"trace": trace, "messages": said, "request": request, "user": user, "session_id": user, "system": system}
    changes |= {"outcome": outcome, "error": error, "error_type": error, "requested_model": user, "tools": [trace]}
    for privacy in (False, True):
        check_with_the_projects_own_codec(check_strictly(record(**changes), privacy))


@settings(max_examples=60, deadline=None)
@given(numbers=st.lists(st.none() | st.floats() | st.integers() | st.just(10**400) | st.booleans(), min_size=7, max_size=7))
def test_whatever_a_provider_counts_is_strict_otlp_json(numbers: list[Any]) -> None:
    usage = dict.fromkeys(RESPONSE["usage"], numbers[0])
    attempt = ATTEMPT | {"start_ms": numbers[1], "duration_ms": numbers[2], "headers_ms": numbers[3], "status": numbers[4]}
    cost = dict.fromkeys(("input", "output", "total", "input_unit_price"), numbers[5]) | {"source": "reported"}
    changes = {"response": RESPONSE | {"usage": usage}, "attempts": [attempt], "cost": cost, "ttft_ms": numbers[6]}
    check_strictly(record(**changes, overhead_ms=numbers[6]), False)
