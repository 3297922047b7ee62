"""Who is asked after a failure, how often, when - and that the record and the headers tell it.

Each test has fakes that count what they receive. Where waiting is the subject the pipeline's clock is the test's own, so
"half a minute later" is exact and takes no time.
"""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from conftest import RouterFactory
from deciding import (
    CHAT,
    MESSAGES,
    RESPONSES,
    Clock,
    Fakes,
    House,
    MakeApp,
    always,
    config,
    fake_providers,
    provider,
    refused_url,
    rule,
    set_clock,
    sse_text,
)
from fake_upstream import (
    FakeUpstream,
    Script,
    answer,
    chat_completion,
    chunks,
    end,
    error_answer,
    fin,
    head,
    hold,
    json_answer,
    openai_chunks,
    raw,
    reset,
    silence,
    stream,
    stream_head,
)
from router_process import Answer, chat_body, until

MakeHouse = Callable[..., House]
BEGUN = openai_chunks("one two", finish=None, done=False)
HTML = answer(b"<html>log in</html>", 200, {"Content-Type": "text/html"})
QUICK = {"read_timeout": 0.4, "idle_timeout": 0.4}
OK = json_answer(chat_completion("fine"))


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def house(app: MakeApp) -> MakeHouse:
    return lambda *parts, **more: House(app(config(*parts, **more)))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return set_clock(monkeypatch)


def two(fakes: Fakes, **keys: Any) -> list[str]:
    """Two providers, the first of them the better one."""
    return [provider("a", fakes["a"], quality=9, **keys), provider("b", fakes["b"], **keys)]


def names(record: dict[str, Any]) -> list[str]:
    return [attempt["provider"] for attempt in record["attempts"]]


# --- from one provider to the next

MOVES_ON: dict[str, tuple[Script, int | None, str]] = {
    # how the first one fails -> the status in the attempt, and what the error is called (a part of it)
    "408": (error_answer(408), 408, "408"),
    "429": (error_answer(429), 429, "rate_limit"),
    "500": (error_answer(500), 500, "500"),
    "502": (error_answer(502), 502, "502"),
    "503 in HTML": (answer(b"<html>busy</html>", 503, {"Content-Type": "text/html"}), 503, "503"),
    "504": (error_answer(504), 504, "504"),
    "reset at once": (reset(), None, "connection"),
    "closed at once": (fin(), None, "connection"),
    "not HTTP": (raw(b"SSH-2.0-OpenSSH_9.2\r\n") + fin(), None, ""),
    "silence": (silence(), None, "timeout"),
    "HTML": (HTML, 200, "malformed"),
    "an empty 200": (answer(b"", 200), 200, "malformed"),
    "half a JSON": (answer(b'{"id": "x", "choices": [', 200), 200, "malformed"),
    "an error in a 200": (json_answer({"error": {"message": "no"}}), 200, ""),
}
WHOLE_ONLY = {
    "a cut body": (
        raw(head(200, {"Content-Type": "application/json", "Content-Length": "500"}) + b'{"id": "x"') + fin(),
        200,
        "connection",
    )
}
STREAM_ONLY = {
    "an empty stream": (stream([]), 200, "malformed"),
    "only DONE": (stream([b"data: [DONE]\n\n"]), 200, "malformed"),
    "only a comment": (stream([b": hello\n\n"]), 200, "malformed"),
    "cut before the first event": (stream_head() + fin(), 200, ""),
    "reset before the first event": (stream_head() + reset(), 200, ""),
    "silent before the first event": (stream_head() + silence(), 200, "timeout"),
    "an error as first event": (stream([b'data: {"error": {"message": "no"}}\n\n']), 200, ""),
}
CASES = [
    *((name, False, case) for name, case in (MOVES_ON | WHOLE_ONLY).items()),
    *((name, True, case) for name, case in (MOVES_ON | STREAM_ONLY).items()),
]


@pytest.mark.parametrize(("name", "streamed", "case"), CASES, ids=[f"{n}, {'stream' if s else 'whole'}" for n, s, _ in CASES])
def test_what_fails_before_the_first_byte_moves_to_the_next_provider(
    house: MakeHouse, fakes: Fakes, name: str, streamed: bool, case: tuple[Script, int | None, str]
) -> None:
    script, status, called = case
    always(script, fakes["a"])
    here = house(*two(fakes, **QUICK))
    answered = here.chat(stream=streamed)
    assert answered.status == 200
    assert (sse_text(answered.body) if streamed else answered.json()["choices"][0]["message"]["content"]) in (
        "one two three",
        "hello there",
    )
    assert fakes.counts() == {"a": 1, "b": 1}
    check_headers(answered, "b", "0:fallback")
    record = here.record
    assert (record["outcome"], record["provider"], record["error"]) == ("ok", "b", None)
    first, second = record["attempts"]
    assert (first["provider"], first["attempt"], first["status"]) == ("a", 1, status)
    assert first["error"]
    assert called in first["error_type"]
    assert (second["provider"], second["attempt"], second["status"], second["error"]) == ("b", 2, 200, None)
    assert second["start_ms"] + 1 >= first["start_ms"] + first["duration_ms"]


def check_headers(answered: Answer, name: str, told: str) -> None:
    assert answered.headers["x-router-provider"] == name
    assert answered.headers["x-router-model"] == "fake-model"
    assert answered.headers["x-router-rule"] == told
    assert answered.headers["x-generation-id"].startswith("gen-")


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("where", ["nobody listens", "no such name"])
def test_a_connection_that_cannot_be_had_moves_on(house: MakeHouse, fakes: Fakes, where: str, streamed: bool) -> None:
    url = refused_url() if where == "nobody listens" else "http://no-such-host.invalid/v1"
    here = house(provider("a", url, quality=9), provider("b", fakes["b"]))
    assert here.chat(stream=streamed).status == 200
    first, second = here.record["attempts"]
    assert (first["provider"], first["status"], bool(first["error"])) == ("a", None, True)
    assert first["error_type"].startswith("connection")
    assert second["provider"] == "b"
    assert fakes.counts() == {"b": 1}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 422, 501, 307])
def test_a_refusal_is_final(house: MakeHouse, fakes: Fakes, status: int, streamed: bool) -> None:
    always(error_answer(status, "so it is", {"Location": fakes["b"].url}), fakes["a"])
    here = house(*two(fakes))
    answered = here.chat(stream=streamed)
    assert answered.status == (status if status in (400, 404, 409, 413, 422) else 502)
    assert fakes.counts() == {"a": 1}
    check_headers(answered, "a", "0:fallback")
    assert [(a["provider"], a["status"]) for a in here.record["attempts"]] == [("a", status)]


def test_which_statuses_move_on_is_a_setting(app: MakeApp, fakes: Fakes) -> None:
    here = House(app(config(*two(fakes)).replace("attempts = 3", "attempts = 3\non_status = [404, 418]")))
    for status, moves_on in ((404, True), (418, True), (500, False), (503, False)):
        always(error_answer(status), fakes["a"])
        assert (here.chat().status == 200) is moves_on
    assert [len(record["attempts"]) for record in here.records] == [2, 2, 1, 1]


BROKEN = {
    "reset": reset(),
    "cut": fin(),
    "ended without its end": end(),
    "stalled": silence(),
    "an error event": chunks([b'data: {"error": {"message": "no"}}\n\n']) + end(),
    "a chunk size that is none": raw(b"zz\r\n") + fin(),
}


def test_nothing_is_sent_again_after_the_first_byte(router: RouterFactory, fakes: Fakes) -> None:
    """Each break waits until the client has what came before it; so it surely comes after the client's first byte."""
    process = router(config(*two(fakes, **QUICK)))
    for name, how in BROKEN.items():
        go = threading.Event()
        fakes["a"].script(stream_head() + chunks(BEGUN) + hold(go) + how)
        with process.stream() as reply:
            first = reply.next()
            go.set()
            rest = reply.read()
        assert (reply.status, reply.headers["x-router-provider"]) == (200, "a"), name
        assert first == BEGUN[0], name
        assert b"[DONE]" not in rest, name
        assert rest.count(b'"error"') == 1, f"{name}: one error event, in the stream itself"
    assert fakes.counts() == {"a": len(BROKEN)}
    for name, record in zip(BROKEN, process.settled(len(BROKEN)), strict=True):
        assert record["outcome"] == ("timeout" if name == "stalled" else "error"), name
        (attempt,) = record["attempts"]
        assert (attempt["provider"], attempt["status"], bool(attempt["error"])) == ("a", 200, True), name


def test_candidates_run_out(house: MakeHouse, fakes: Fakes) -> None:
    """Every provider once, then the client hears of the last failure, with everything in the record."""
    always(reset(), *fakes("a b c"))
    here = house(provider("a", fakes["a"], quality=2), provider("b", fakes["b"], quality=1), provider("c", fakes["c"]))
    answered = here.chat()
    assert answered.status == 502
    assert answered.error["type"] != "invalid_request_error"
    check_headers(answered, "c", "0:fallback")
    assert fakes.counts() == {"a": 1, "b": 1, "c": 1}
    assert names(here.record) == ["a", "b", "c"]
    assert (here.record["outcome"], here.record["status"], here.record["provider"]) == ("error", 502, "c")


@pytest.mark.parametrize("attempts", [1, 2])
def test_attempts_run_out(house: MakeHouse, fakes: Fakes, attempts: int) -> None:
    always(error_answer(500), *fakes("a b c"))
    here = house(*[provider(name, fakes[name]) for name in "abc"], attempts=attempts)
    assert here.chat().status == 502
    assert sum(fakes.counts().values()) == len(here.record["attempts"]) == attempts


def test_after_the_last_candidate_of_a_rule_comes_the_next_rule(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(500), *fakes("a b"))
    rules = [
        rule("prefix", model_prefix="fake", provider="a", rewrite_model="one"),
        rule("prefix", model_prefix="other", provider="c"),
        rule("price", providers=["b", "a"], max_cost_per_1m_tokens=1, name="cheap"),
        rule("fallback", providers=["c"], rewrite_model="three", name="last"),
    ]
    here = house(*[provider(name, fakes[name]) for name in "abc"], *rules)
    answered = here.chat()
    assert answered.status == 200
    assert [(a["provider"], a["model"]) for a in here.record["attempts"]] == [("a", "one"), ("b", "fake-model"), ("c", "three")]
    assert (answered.headers["x-router-rule"], answered.headers["x-router-model"]) == ("last", "three")
    assert (here.record["rule"], here.record["requested_model"], here.record["sent_model"]) == ("last", "fake-model", "three")
    assert fakes["c"].posts[0].json()["model"] == "three"


def test_a_request_that_streams_and_one_that_does_not_go_the_same_way(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(503), *fakes("a b"))
    here = house(*[provider(name, fakes[name], quality=9 - i) for i, name in enumerate("abc")])
    here.chat()
    here.chat(stream=True)
    whole, streamed = here.records
    assert names(whole) == names(streamed) == ["a", "b", "c"]


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("streamed", [False, True])
def test_every_client_language_has_the_headers_on_answers_and_errors(
    house: MakeHouse, fakes: Fakes, path: str, streamed: bool
) -> None:
    body = {"model": "m", "stream": streamed, "max_tokens": 50, "messages": [{"role": "user", "content": "hi"}]}
    if path == RESPONSES:
        body = {"model": "m", "stream": streamed, "input": "hi"}
    here = house(*two(fakes), rule("fallback", name="best"), attempts=2)
    always(error_answer(500), fakes["a"])
    good = here.post(path, body)
    always(error_answer(500), fakes["b"])
    bad = here.post(path, body)
    assert (good.status, bad.status) == (200, 502)
    for answered in (good, bad):
        assert answered.headers["x-router-provider"] == "b"
        assert answered.headers["x-router-rule"] == "best"
        assert answered.headers["x-router-model"] == "m"
    assert [r["generation_id"] for r in here.records] == [good.headers["x-generation-id"], bad.headers["x-generation-id"]]


def test_a_request_nobody_serves_has_its_generation_id_too(house: MakeHouse, fakes: Fakes) -> None:
    here = house(provider("a", fakes["a"]), rule("prefix", model_prefix="x", provider="a"))
    answered = here.chat()
    assert (answered.status, answered.error["code"]) == (404, "model_not_found")
    assert answered.headers["x-generation-id"] == here.record["generation_id"]
    assert "x-router-provider" not in answered.headers
    assert (here.record["outcome"], here.record["attempts"], here.record["provider"]) == ("rejected", [], None)


# --- the request's own models


def by_model(fakes: Fakes) -> list[str]:
    return [
        *two(fakes),
        rule("prefix", model_prefix="one", provider="a"),
        rule("prefix", model_prefix="two", provider="b"),
    ]


@pytest.mark.parametrize("streamed", [False, True])
def test_models_are_tried_after_the_rules(house: MakeHouse, fakes: Fakes, streamed: bool) -> None:
    always(error_answer(500), fakes["a"])
    here = house(*by_model(fakes))
    answered = here.chat(model="one", models=["nobody-has-this", "two/x"], stream=streamed)
    assert answered.status == 200
    assert (answered.headers["x-router-rule"], answered.headers["x-router-model"]) == ("models[1]", "two/x")
    assert here.record["rule"] == "models[1]"
    assert [(a["provider"], a["model"]) for a in here.record["attempts"]] == [("a", "one"), ("b", "two/x")]
    assert "models" not in fakes["b"].posts[0].json(), "the field is the router's own"


def test_models_do_not_widen_the_attempts(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(500), *fakes("a b"))
    here = house(*by_model(fakes), attempts=1)
    assert here.chat(model="one", models=["two"]).status == 502
    assert fakes.counts() == {"a": 1}


def test_a_refusal_of_the_first_model_is_final_for_the_others_too(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(400, "too hot"), fakes["a"])
    here = house(*by_model(fakes))
    assert here.chat(model="one", models=["two"]).status == 400
    assert fakes.counts() == {"a": 1}


def test_another_model_of_the_only_provider_comes_before_the_same_one_again(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    fakes["a"].default = lambda received: error_answer(503) if received.json()["model"] == "big" else OK
    here = house(provider("a", fakes["a"]))
    answered = here.chat(model="big", models=["small"])
    assert answered.status == 200
    assert [request.json()["model"] for request in fakes["a"].posts] == ["big", "small"]
    assert answered.headers["x-router-rule"] == "models[0]"


@pytest.mark.parametrize("models", ["two", [1], {"a": 1}, [""]])
def test_models_of_a_wrong_shape_are_a_400(house: MakeHouse, fakes: Fakes, models: Any) -> None:
    here = house(*two(fakes))
    answered = here.chat(models=models)
    assert (answered.status, answered.error["param"]) == (400, "models")
    assert fakes.counts() == {}


# --- the same provider again


def test_the_only_provider_is_asked_again_with_growing_pauses(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    pauses: list[float] = []

    def script(received: Any) -> Script:
        pauses.append(clock.taken())
        return OK if len(pauses) == 4 else error_answer(503)

    fakes["a"].default = script
    here = house(provider("a", fakes["a"]), attempts=4)
    assert here.chat().status == 200
    assert pauses[0] == 0
    for pause, base in zip(pauses[1:], (0.25, 0.5, 1.0), strict=True):
        assert 0.5 * base <= pause <= 1.5 * base, pauses
    assert [(a["attempt"], a["status"]) for a in here.record["attempts"]] == [(1, 503), (2, 503), (3, 503), (4, 200)]


def test_the_pauses_have_jitter(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    always(error_answer(503), fakes["a"])
    here = house(provider("a", fakes["a"]), attempts=2)
    seen = set()
    for _ in range(8):
        here.chat()
        seen.add(round(clock.taken(), 6))
    assert len(seen) > 1


def test_a_refused_connection_is_tried_again(house: MakeHouse, clock: Clock) -> None:
    here = house(provider("a", refused_url()), attempts=3)
    answered = here.chat()
    assert answered.status == 502
    assert [a["error_type"] for a in here.record["attempts"]] == ["connection_refused"] * 3
    assert clock.taken() > 0


@pytest.mark.parametrize(
    "name", ["reset at once", "closed at once", "not HTTP", "silence", "HTML", "an empty 200", "half a JSON"]
)
@pytest.mark.parametrize("streamed", [False, True])
def test_the_only_provider_is_not_asked_again_if_it_may_be_at_work(
    house: MakeHouse, fakes: Fakes, clock: Clock, name: str, streamed: bool
) -> None:
    always(MOVES_ON[name][0], fakes["a"])
    here = house(provider("a", fakes["a"], **QUICK))
    assert here.chat(stream=streamed).status in (502, 504)
    assert fakes.counts() == {"a": 1}
    assert clock.taken() == 0
    assert len(here.record["attempts"]) == 1


def test_others_come_before_the_same_one_again(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    always(error_answer(503), *fakes("a b"))
    here = house(*two(fakes), attempts=4)
    assert here.chat().status == 502
    assert names(here.record)[:2] == ["a", "b"]
    assert fakes.counts() == {"a": 2, "b": 2}


def test_only_the_one_that_did_no_work_is_asked_again(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    always(error_answer(503), fakes["a"])
    always(reset(), fakes["b"])
    here = house(*two(fakes), attempts=5)
    assert here.chat().status == 502
    assert names(here.record) == ["a", "b", "a", "a", "a"][: len(names(here.record))]
    assert fakes.counts()["b"] == 1
    assert fakes.counts()["a"] >= 2


def test_a_client_that_leaves_during_the_pause_ends_it(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(503, headers={"Retry-After": "4"}), fakes["a"])
    here = house(provider("a", fakes["a"]))
    began = time.monotonic()
    here.post(CHAT, chat_body(), gone=lambda: bool(fakes["a"].posts))
    assert time.monotonic() - began < 3
    assert fakes.counts() == {"a": 1}
    assert here.record["outcome"] == "cancelled"


# --- Retry-After


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_in_seconds_is_waited_for(house: MakeHouse, fakes: Fakes, clock: Clock, status: int) -> None:
    fakes["a"].script(error_answer(status, headers={"Retry-After": "2"}), OK)
    here = house(provider("a", fakes["a"]))
    assert here.chat().status == 200
    assert 1.9 < clock.taken() < 3


def test_retry_after_as_a_date_is_waited_for(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    date = email.utils.formatdate(time.time() + 3, usegmt=True)
    fakes["a"].script(error_answer(429, headers={"Retry-After": date}), OK)
    here = house(provider("a", fakes["a"]))
    assert here.chat().status == 200
    assert 1 < clock.taken() <= 4, "until then, whole seconds"


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_retry_after_beyond_the_budget_is_passed_on_at_once(house: MakeHouse, fakes: Fakes, clock: Clock, form: str) -> None:
    value = "3600" if form == "seconds" else email.utils.formatdate(time.time() + 3600, usegmt=True)
    always(error_answer(429, headers={"Retry-After": value}), fakes["a"])
    here = house(provider("a", fakes["a"]))
    answered = here.chat()
    assert (answered.status, answered.headers["retry-after"]) == (429, value)
    assert fakes.counts() == {"a": 1}, "it said when"
    assert clock.taken() == 0


@pytest.mark.parametrize("form", ["%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %e %H:%M:%S %Y"])
def test_each_form_of_an_http_date_is_waited_for_and_passed_on(
    house: MakeHouse, fakes: Fakes, clock: Clock, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    """All of them are in UTC, wherever the router stands."""
    value = time.strftime(form, time.gmtime(time.time() + 3600))
    always(error_answer(429, headers={"Retry-After": value}), fakes["a"])
    with monkeypatch.context() as patch:
        patch.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        answered = house(provider("a", fakes["a"])).chat()
    time.tzset()
    assert (answered.status, answered.headers["retry-after"]) == (429, value)
    assert fakes.counts() == {"a": 1}, "it said when"


NO_DATES = (
    "Wed, 32 Foo 2026 00:00:00 GMT", "Wed, 31 Feb 2099 00:00:00 GMT", "Wed, 21 Oct 2099 07:28:00",
    "Wed, 21 Oct 2099 07:28:00 -0000", "Wed, 21 Oct 2099 07:28:00 +0200", "21 Oct 2099 07:28:00 GMT", "2099-10-21T07:28:00Z",
)  # fmt: skip


@pytest.mark.parametrize("value", ["soon", "-1", "1.5", "", "0x10", "9" * 40, *NO_DATES])
def test_a_retry_after_that_is_none_counts_for_nothing(house: MakeHouse, fakes: Fakes, clock: Clock, value: str) -> None:
    always(error_answer(429, headers={"Retry-After": value}), fakes["a"])
    here = house(provider("a", fakes["a"]), attempts=2)
    answered = here.chat()
    assert answered.status == 429
    assert "retry-after" not in answered.headers
    assert fakes.counts() == {"a": 2}
    assert clock.taken() < 1, "the usual pause"


def test_a_date_in_the_past_asks_for_no_more_than_the_usual_pause(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    date = email.utils.formatdate(time.time() - 100, usegmt=True)
    fakes["a"].script(error_answer(429, headers={"Retry-After": date}), OK)
    here = house(provider("a", fakes["a"]))
    assert here.chat().status == 200
    assert clock.taken() < 1


def test_each_provider_keeps_its_own_retry_after(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    """One that must not be asked for an hour is not asked just because another one said nothing of the kind."""
    always(error_answer(429, headers={"Retry-After": "3600"}), fakes["a"])
    always(error_answer(503), fakes["b"])
    here = house(*two(fakes), attempts=4)
    here.chat()
    assert fakes.counts()["a"] == 1
    assert fakes.counts()["b"] >= 1


def test_a_retry_after_does_not_hold_up_the_next_provider(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    always(error_answer(429, headers={"Retry-After": "3600"}), fakes["a"])
    here = house(*two(fakes))
    answered = here.chat()
    assert (answered.status, answered.headers["x-router-provider"]) == (200, "b")
    assert "retry-after" not in answered.headers
    assert clock.taken() == 0


# --- the breaker


def resting_house(house: MakeHouse, fakes: Fakes, *more: str, failures: int = 3) -> House:
    return house(provider("a", fakes["a"], quality=9), *more, attempts=len(more) + 1, failures=failures, cooldown=30)


def fail(here: House, fake: FakeUpstream, times: int, script: Script | None = None) -> None:
    """The next requests fail at this provider."""
    before = len(fake.posts)
    fake.script(*[script or error_answer(500)] * times)
    for _ in range(times):
        here.chat()
    assert len(fake.posts) == before + times


def test_after_enough_failures_in_a_row_it_rests(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 2)
    assert here.chat().status == 200
    fail(here, fakes["a"], 2)
    assert here.breaker() == "closed", "a success in between begins the count anew"
    fail(here, fakes["a"], 1)
    assert here.breaker() == "open"
    asked = len(fakes["a"].posts)
    answered = here.chat()
    assert answered.status == 503
    assert 1 <= int(answered.headers["retry-after"]) <= 30
    assert (here.records[-1]["outcome"], here.records[-1]["attempts"]) == ("rejected", [])
    clock.advance(29)
    assert here.chat().status == 503
    assert len(fakes["a"].posts) == asked, "nobody asked it meanwhile"


def test_retry_after_tells_when_the_next_probe_may_be(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    clock.advance(20)
    assert 9 <= int(here.chat().headers["retry-after"]) <= 11


@pytest.mark.parametrize("kind", ["500", "reset at once", "HTML", "silence"])
def test_every_kind_of_failure_counts(house: MakeHouse, fakes: Fakes, clock: Clock, kind: str) -> None:
    here = house(provider("a", fakes["a"], **QUICK), attempts=1, failures=2)
    fail(here, fakes["a"], 2, MOVES_ON[kind][0])
    assert here.breaker() == "open"


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_a_refusal_says_nothing_against_the_provider(house: MakeHouse, fakes: Fakes, clock: Clock, status: int) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 4, error_answer(status))
    assert here.breaker() == "closed"
    assert here.chat().status == 200


def test_a_resting_provider_is_passed_over(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes, provider("b", fakes["b"]))
    fail(here, fakes["a"], 3)
    before = len(fakes["a"].posts)
    answered = here.chat()
    assert (answered.status, answered.headers["x-router-provider"]) == (200, "b")
    assert names(here.records[-1]) == ["b"], "not even an attempt"
    assert len(fakes["a"].posts) == before


def test_one_good_probe_closes_it(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    clock.advance(31)
    assert here.breaker() == "half-open"
    assert here.chat().status == 200
    assert here.breaker() == "closed"
    fail(here, fakes["a"], 2)
    assert here.breaker() == "closed", "it begins with a clean slate"


def test_one_bad_probe_opens_it_for_another_rest(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    clock.advance(31)
    fail(here, fakes["a"], 1)
    assert here.breaker() == "open"
    asked = len(fakes["a"].posts)
    clock.advance(29)
    assert here.chat().status == 503
    assert len(fakes["a"].posts) == asked


@pytest.mark.parametrize("streamed", [False, True])
def test_only_one_request_at_a_time_probes(house: MakeHouse, fakes: Fakes, clock: Clock, streamed: bool) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    asked = len(fakes["a"].posts)
    clock.advance(31)
    go = threading.Event()
    fakes["a"].default = lambda received: hold(go) + (stream(openai_chunks("fine")) if streamed else OK)
    with ThreadPoolExecutor(6) as pool:
        probe = pool.submit(here.chat, stream=streamed)
        fakes["a"].wait_for(asked + 1)
        others = [pool.submit(here.chat, stream=streamed) for _ in range(5)]
        answers = [other.result(10) for other in others]
        go.set()
        assert probe.result(10).status == 200
    assert [answered.status for answered in answers] == [503] * 5
    assert all(int(answered.headers["retry-after"]) >= 1 for answered in answers)
    assert len(fakes["a"].posts) == asked + 1
    assert here.breaker() == "closed"


def test_a_probe_whose_client_leaves_does_not_hold_the_provider_for_ever(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    asked = len(fakes["a"].posts)
    clock.advance(31)
    fakes["a"].script(silence())
    here.post(CHAT, chat_body(), gone=lambda: len(fakes["a"].posts) > asked)
    assert here.records[-1]["outcome"] == "cancelled"
    assert here.chat().status == 200
    assert here.breaker() == "closed"


def test_an_old_request_that_ends_during_the_probe_does_not_let_a_second_one_in(
    house: MakeHouse, fakes: Fakes, clock: Clock
) -> None:
    here = resting_house(house, fakes)
    old_gone, go = threading.Event(), threading.Event()
    fakes["a"].script(silence())
    with ThreadPoolExecutor(2) as pool:
        try:
            old = pool.submit(here.post, CHAT, chat_body(), gone=old_gone.is_set)
            fakes["a"].wait_for(1)
            fail(here, fakes["a"], 3)
            clock.advance(31)
            fakes["a"].script(hold(go) + OK)
            probe = pool.submit(here.chat)
            asked = len(fakes["a"].wait_for(5))
            old_gone.set()
            old.result(10)
            assert here.chat().status == 503, "the probe is still out"
            assert len(fakes["a"].posts) == asked
        finally:
            old_gone.set()
            go.set()
        assert probe.result(10).status == 200


@pytest.mark.parametrize("late", ["good", "bad"])
def test_an_old_request_that_ends_during_the_rest_neither_ends_nor_prolongs_it(
    house: MakeHouse, fakes: Fakes, clock: Clock, late: str
) -> None:
    here = resting_house(house, fakes)
    go = threading.Event()
    fakes["a"].script(hold(go) + (OK if late == "good" else error_answer(500)))
    with ThreadPoolExecutor(1) as pool:
        old = pool.submit(here.chat)
        fakes["a"].wait_for(1)
        fail(here, fakes["a"], 3)
        clock.advance(20)
        go.set()
        assert old.result(10).status == (200 if late == "good" else 502)
    assert here.breaker() == "open", "only a probe closes it"
    clock.advance(11)
    assert here.breaker() == "half-open", "31 s after the failures that opened it"


def test_an_attempt_that_never_reached_the_provider_is_no_probe(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    """A request that is refused for its own sake leaves the breaker as it is, half-open."""
    here = resting_house(house, fakes)
    fail(here, fakes["a"], 3)
    clock.advance(31)
    assert here.chat(models="not a list").status == 400
    assert here.breaker() == "half-open"
    assert here.chat().status == 200


def test_every_candidate_resting_is_a_503_until_the_first_may_be_probed(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    always(error_answer(500), *fakes("a b"))
    here = house(*two(fakes), attempts=1, failures=2)
    for _ in range(2):
        here.chat()
    clock.advance(10)
    for _ in range(2):
        here.chat()
    assert (here.breaker("a"), here.breaker("b")) == ("open", "open")
    answered = here.chat()
    assert answered.status == 503
    assert 19 <= int(answered.headers["retry-after"]) <= 20, "a rests for 20 more seconds, b for 30"


def test_a_break_in_mid_stream_counts_against_the_provider(house: MakeHouse, fakes: Fakes, clock: Clock) -> None:
    here = resting_house(house, fakes)
    fakes["a"].script(*[stream_head() + chunks(BEGUN) + fin()] * 3)
    for _ in range(3):
        here.chat(stream=True)
    assert here.breaker() == "open"


def test_the_breaker_opens_and_closes_in_a_running_router_too(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(config(provider("a", upstream), attempts=1, failures=2, cooldown=0.5))
    upstream.script(*[error_answer(500)] * 2)
    assert [process.chat().status for _ in range(2)] == [502, 502]
    until(lambda: process.chat().status == 200, 10, "a probe closes it")
    assert process.stats()["providers"]["a"]["breaker"] == "closed"
    assert len(upstream.posts) == 3, "while it rested nobody asked it"
    records = process.settled(process.stats()["requests"]["accepted"])
    assert sum(len(record["attempts"]) for record in records) == 3


# --- the budget for further attempts


BURST = 400


@pytest.fixture
def burst(house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> tuple[House, Clock, list[int]]:
    """Many requests in no time, while the better one of two providers fails all of them."""
    clock = set_clock(monkeypatch, frozen=True)
    always(error_answer(503), fakes["a"])
    here = house(*two(fakes), attempts=2)
    return here, clock, [here.chat().status for _ in range(BURST)]


def test_a_dead_provider_does_not_double_the_load(burst: tuple[House, Clock, list[int]], fakes: Fakes) -> None:
    """Attempts that follow failed ones stay a fifth of the requests, beyond what quiet times saved and what time brings."""
    _, clock, statuses = burst
    further = sum(fakes.counts().values()) - BURST
    assert further <= 100 + BURST // 5 + 10 * clock.taken()
    assert statuses[:50] == [200] * 50, "a few failures are always made good"
    assert 502 in statuses[-10:], "then the clients hear of them"


def test_while_another_one_is_left_the_same_one_is_not_asked_again(burst: tuple[House, Clock, list[int]], fakes: Fakes) -> None:
    """Whoever cannot have a second attempt any more is told at once, instead of asking the dead one after a pause."""
    here, clock, _ = burst
    assert fakes.counts()["a"] == BURST
    assert clock.taken() == 0
    assert {attempts.count("a") for attempts in map(names, here.records)} == {1}


def test_the_budget_comes_back_with_time(house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = set_clock(monkeypatch, frozen=True)
    always(error_answer(503), fakes["a"])
    here = house(*two(fakes), attempts=2)
    until(lambda: here.chat().status == 502, 30, "the budget is used up")
    clock.advance(60)
    assert here.chat().status == 200


# --- connections that died while idle


def test_a_connection_that_dies_under_the_request_is_not_billed_twice(house: MakeHouse, fakes: Fakes) -> None:
    fakes["a"].script(OK, fin())
    here = house(provider("a", fakes["a"]))
    assert [here.chat().status, here.chat().status] == [200, 502]
    assert fakes.counts() == {"a": 2}
    assert len(here.records[1]["attempts"]) == 1


def test_with_a_second_provider_nobody_notices(house: MakeHouse, fakes: Fakes) -> None:
    fakes["a"].script(OK, fin())
    here = house(*two(fakes))
    assert [here.chat().status, here.chat().status] == [200, 200]
    assert fakes.counts() == {"a": 2, "b": 1}
