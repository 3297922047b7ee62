"""A canary sent through every place a prompt can hide: absent from a private destination's bytes, present at an open one."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from broadcast_records import ATTEMPT, RECORD, attributes, failed, generation, record, to_bytes
from broadcast_runs import collector, counts, running, settled
from fake_collector import FakeCollector, Reply, until

from broadcast import delivery, encode

CANARY = "SECRET-PROMPT-canary"
HIDDEN = base64.b64encode(f"..{CANARY}..".encode()).decode()


def text(content: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "text", "text": content}]}]


def block(**given: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [given]}]


RESPONSE: dict[str, Any] = RECORD["response"]
CALL = {"id": "c", "name": "f", "arguments": json.dumps({"q": CANARY})}
PLACES: dict[str, dict[str, Any]] = {
    "prompt": {"messages": text(CANARY)},
    "system": {"system": CANARY},
    "tool description": {"tools": [{"name": "f", "description": CANARY, "parameters": {}}]},
    "tool schema": {"tools": [{"name": "f", "description": "", "parameters": {"properties": {CANARY: {}}}}]},
    "tool call in the conversation": {"messages": block(type="tool_use", id="1", name="f", input={"q": CANARY})},
    "tool result": {"messages": block(type="tool_result", tool_use_id="1", content=CANARY)},
    "tool result in blocks": {"messages": block(type="tool_result", tool_use_id="1", content=[{"type": "text", "text": CANARY}])},
    "thinking": {"messages": block(type="thinking", thinking=CANARY, signature="s")},
    "image address": {"messages": block(type="image", url=f"https://pictures.example/{CANARY}.png")},
    "inline image": {"messages": block(type="image", media_type="image/png", data=HIDDEN)},
    "a kind of block we do not know": {"messages": block(type="hologram", depth={"inner": [CANARY]})},
    "answer": {"response": RESPONSE | {"content": CANARY}},
    "reasoning": {"response": RESPONSE | {"reasoning": CANARY}},
    "tool call": {"response": RESPONSE | {"tool_calls": [CALL]}},
    "answer of a broken stream": {
        "response": RESPONSE | {"content": CANARY},
        "outcome": "error",
        "error": "cut",
        "error_type": "stream_idle_timeout",
    },
    "response format": {"request": {"response_format": {"type": "json_schema", "json_schema": {"description": CANARY}}}},
    "stop sequence": {"request": {"stop": [CANARY]}},
    "unknown request field": {"request": {"prediction": {"content": CANARY}}},
    "error": {"outcome": "error", "status": 502, "error": f"bad request: {CANARY}", "error_type": "upstream_error"},
    "error of a timeout": {"outcome": "timeout", "status": 504, "error": f"waited for {CANARY}", "error_type": "timeout"},
    "error of a rejection": {"outcome": "rejected", "status": 404, "error": f"no rule for {CANARY}", "error_type": "no_rule"},
    "attempt's error": {"attempts": [ATTEMPT | {"status": 400, "error": f"you said {CANARY}", "error_type": "upstream_error"}]},
    "classifier tags": {"tags": [CANARY]},
}


@pytest.mark.parametrize("place", PLACES)
def test_the_canary_stays_out_of_private_bytes_and_is_in_the_open_ones(tmp_path: Path, place: str) -> None:
    with (
        FakeCollector() as open_,
        FakeCollector() as private,
        running(tmp_path, collector("open", open_.url), collector("private", private.url, privacy_mode=True)) as made,
    ):
        made.sink(record(**PLACES[place]))
        for name in ("open", "private"):
            assert settled(made, name, 1)["delivered"] == 1
        shown, hidden = open_.received[0], private.received[0]
    assert CANARY.encode() in shown.text or HIDDEN.encode() in shown.text
    for secret in (CANARY.encode(), HIDDEN.encode(), CANARY.lower().encode()):
        assert secret not in hidden.text
        assert secret not in hidden.body
        assert secret not in str(hidden.headers).encode()
    here = encode(RECORD | {"generation_id": "gen-1-x"}, privacy=True)
    assert "gen_ai.usage.input_tokens" in attributes(generation(here))


@pytest.mark.parametrize("error_type", [CANARY, f"bad {CANARY}", "x" * 65, "Überraschung", 5, ["a"]])
def test_an_error_type_that_is_no_word_of_ours_is_not_sent_in_private(error_type: Any) -> None:
    attempt = ATTEMPT | {"error": "x", "error_type": error_type}
    made = encode(failed(error_type=error_type, attempts=[attempt]), privacy=True)
    assert CANARY.encode() not in to_bytes(made)
    assert attributes(generation(made))["error.type"] == "error"


@pytest.mark.parametrize("level", [CANARY, {"effort": CANARY}, CANARY.lower()])
def test_a_reasoning_level_that_is_none_is_not_sent_at_all(level: Any) -> None:
    request = {"reasoning_effort": level} if isinstance(level, str) else {"reasoning": level}
    assert CANARY.lower() not in to_bytes(encode(record(request=request), privacy=True)).decode().lower()


@pytest.mark.parametrize("said", [f"model of {CANARY}", {"x": CANARY}, CANARY + " " * 200])
def test_a_model_or_finish_that_is_no_name_is_not_sent_in_private(said: Any) -> None:
    odd = record(response=RESPONSE | {"model": said, "native_finish_reason": said})
    assert CANARY.encode() not in to_bytes(encode(odd, privacy=True))
    assert attributes(generation(encode(odd, privacy=True)))["gen_ai.response.model"] == odd["sent_model"]
    assert CANARY.encode() in to_bytes(encode(odd, privacy=False))


def test_in_private_everything_else_still_goes() -> None:
    changes: dict[str, Any] = {
        "user": "u1",
        "session_id": "s1",
        "trace": {"trace_name": "job", "environment": "production", "n": 3},
        "request": {"temperature": 0.5, "max_tokens": 9},
    }
    both = [attributes(generation(encode(RECORD | changes, privacy=privacy))) for privacy in (False, True)]
    content = {
        "trace.input", "span.input", "gen_ai.prompt", "trace.output", "span.output", "gen_ai.completion",
        "gen_ai.input.messages", "gen_ai.output.messages",
    }  # fmt: skip
    assert both[0].keys() - both[1].keys() == content
    assert {key: value for key, value in both[0].items() if key not in content} == both[1]


def test_in_private_a_failure_is_told_in_a_fixed_sentence() -> None:
    made = generation(encode(failed(), privacy=True))
    assert made["status"]["message"] == "Provider returned error"
    assert attributes(made)["span.status_message"] == "Provider returned error"
    assert attributes(made["events"][0])["exception.message"] == "Provider returned error"
    assert attributes(made)["error.type"] == "upstream_error"


def test_the_queue_of_a_private_destination_never_holds_content(tmp_path: Path) -> None:
    with FakeCollector(Reply(503)) as busy, running(tmp_path, collector("private", busy.url, privacy_mode=True)) as made:
        made.sink(record(messages=text(CANARY), system=CANARY))
        until(lambda: counts(made, "private")["queued"] == 1)
        for path in (tmp_path / "state").iterdir():
            assert CANARY.encode() not in path.read_bytes()


def test_nothing_a_client_wrote_is_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "BACKOFF_FIRST", 0.02)
    monkeypatch.setattr(delivery, "_warned", {})
    replies = Reply(401, body=CANARY.encode()), Reply(503), Reply(200, {"Content-Type": "text/html"}, b"<p>" + CANARY.encode())
    d = {"headers": {"Authorization": f"Bearer {CANARY}"}}
    with FakeCollector(*replies) as receiver, running(tmp_path, collector("a", receiver.url + f"?key={CANARY}", **d)) as made:
        for n in range(1, 4):
            made.sink(record(messages=text(CANARY), user=CANARY))
            settled(made, "a", n)
        assert CANARY not in json.dumps(made.stats())
    assert caplog.records
    assert CANARY not in caplog.text
