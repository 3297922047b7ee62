"""Whose request it was: [[api_keys]] open the door, and their names - never the keys - are told to every reader."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import RouterFactory
from deciding import CHAT, MESSAGES, Fakes, House, MakeApp, always, config, fake_providers, provider, rule, table
from fake_upstream import chat_completion, json_answer, openai_chunks, stream
from router_process import INBOUND_KEY, PROVIDER_KEY, chat_body

KEYS = {"ALICE_KEY": "key-alice-0123456789", "BOB_KEY": "  key-bob-0123456789 \n", "SHARED_KEY": INBOUND_KEY}
ALICE, BOB, SHARED = (value.strip() for value in KEYS.values())
NAMED = table("[[api_keys]]", name="alice", key_env="ALICE_KEY") + table("[[api_keys]]", name="bob", key_env="BOB_KEY")
MakeHouse = Callable[..., House]


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def house(app: MakeApp, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> MakeHouse:
    for name, value in KEYS.items():
        monkeypatch.setenv(name, value)

    def make(*parts: str, shared: bool = True, **more: Any) -> House:
        server = 'api_key_env = "SHARED_KEY"' if shared else ""
        return House(app(config(provider("a", fakes["a"], cost_per_1m_tokens=5), *parts, **more), server=server))

    return make


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def test_every_key_opens_and_its_name_is_in_the_record(house: MakeHouse) -> None:
    here = house(NAMED)
    for headers in (bearer(ALICE), {"X-Api-Key": BOB}, {"Authorization": f"bearer {BOB}"}, bearer(SHARED)):
        assert here.chat(headers=headers).status == 200
    assert [record["api_key_name"] for record in here.records] == ["alice", "bob", "bob", None]


def test_named_keys_work_without_a_shared_one(house: MakeHouse) -> None:
    here = house(NAMED, shared=False)
    assert here.chat(headers=bearer(ALICE)).status == 200
    assert here.chat(headers=bearer(SHARED)).status == 401
    assert here.chat().status == 401


@pytest.mark.parametrize("key", ["", "alice", ALICE[:-1], ALICE + "x", ALICE.upper(), f"{ALICE},{BOB}", "ü", "x" * 100_000])
def test_a_wrong_key_is_a_401_without_a_record(house: MakeHouse, fakes: Fakes, key: str) -> None:
    here = house(NAMED)
    answered = here.chat(headers=bearer(key.encode().decode("latin-1")))
    assert answered.status == 401
    assert (here.events, fakes.counts()) == ([], {})
    body = answered.body.decode()
    assert "alice" not in body
    assert "bob" not in body


def test_a_key_of_the_environment_loses_its_white_space(house: MakeHouse) -> None:
    assert house(NAMED).chat(headers=bearer(BOB)).status == 200


@pytest.mark.parametrize("path", [CHAT, MESSAGES, "/v1/route"])
@pytest.mark.parametrize("streamed", [False, True])
def test_every_way_in_knows_the_name(house: MakeHouse, path: str, streamed: bool) -> None:
    here = house(NAMED)
    assert here.post(path, chat_body(max_tokens=5, stream=streamed), bearer(ALICE)).status == 200
    assert [record["api_key_name"] for record in here.records] == ([] if path == "/v1/route" else ["alice"])


def test_a_request_that_fails_has_its_name_too(house: MakeHouse) -> None:
    here = house(NAMED, rule("prefix", model_prefix="nothing-begins-so", provider="a"))
    assert here.chat(headers=bearer(ALICE)).status == 404
    assert [record["api_key_name"] for record in here.records] == ["alice"]


def test_stats_count_requests_and_cost_by_name(house: MakeHouse) -> None:
    here = house(NAMED)
    for key in (ALICE, ALICE, BOB, SHARED):
        here.chat(headers=bearer(key))
    told = here._app.call("GET", "/api/v1/stats", headers=bearer(SHARED)).json()["api_keys"]
    assert told["alice"]["requests"] == 2
    assert told["bob"]["requests"] == 1
    costs = [record["cost"]["total"] for record in here.records]
    assert told["alice"]["cost_usd"] == pytest.approx(costs[0] + costs[1])


def test_the_key_goes_neither_upstream_nor_into_a_record(house: MakeHouse, fakes: Fakes) -> None:
    here = house(NAMED)
    here.chat(headers=bearer(ALICE))
    (sent,) = fakes["a"].posts
    assert ALICE not in str(sent.headers) + sent.body.decode()
    assert ALICE not in str(here.events)


@pytest.mark.parametrize("streamed", [False, True])
def test_a_key_that_a_provider_repeats_reaches_no_reader_of_records(
    house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    monkeypatch.setenv("UP_KEY", PROVIDER_KEY)
    here = house(NAMED, provider("b", fakes["b"], api_key_env="UP_KEY"), rule(providers=["b"]))
    pieces = openai_chunks(f"your key is {PROVIDER_KEY[:9]}")[:-2] + openai_chunks(PROVIDER_KEY[9:] + " indeed")
    always(stream(pieces) if streamed else json_answer(chat_completion(f"your key is {PROVIDER_KEY} indeed")), fakes["b"])
    answer = here.chat(f"mine is {ALICE}", headers=bearer(ALICE), stream=streamed)
    assert answer.status == 200
    for key in (PROVIDER_KEY, ALICE):
        assert key not in str(here.records)
    assert here.records[0]["response"]["content"] == "your key is [redacted] indeed"
    assert here.records[0]["messages"][0]["content"][0]["text"] == "mine is [redacted]"


@pytest.mark.parametrize("written", ["sk-Zm9v\\/YmFy+0123456789", "sk-Zm9v/YmFy\\u002b0123456789"])
def test_a_key_that_is_spelled_with_escapes_is_found_too(
    house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.setenv("UP_KEY", key := "sk-Zm9v/YmFy+0123456789")
    here = house(NAMED, provider("b", fakes["b"], api_key_env="UP_KEY"), rule(providers=["b"]))
    body = json.dumps(chat_body("KEY", session_id="s")).replace("KEY", written).encode()
    assert here.call(CHAT, body, {**bearer(ALICE), "x-session-id": "other"}).status == 200
    here.chat(headers={**bearer(ALICE), "X-Session-Id": f"session of {key}"})
    assert key not in str(here.records)
    assert [record["session_id"] for record in here.records] == ["s", "session of [redacted]"]


def test_keys_among_a_requests_parameters_are_not_recorded(house: MakeHouse) -> None:
    here = house(NAMED)
    secrets = {"api_key": "sk-mine", "token": ["a", "b"], "extra_headers": {"Authorization": "Bearer mine", "X-Kind": "seen"}}
    here.chat(headers=bearer(ALICE), max_tokens=7, **secrets)
    request = here.records[0]["request"]
    assert request["api_key"] == request["token"] == request["extra_headers"]["Authorization"] == "[redacted]"
    assert (request["extra_headers"]["X-Kind"], request["max_tokens"]) == ("seen", 7)


def start_error(app: MakeApp, *parts: str) -> str:
    import router

    with pytest.raises(router.ConfigError) as caught:
        app(config(provider("a"), *parts))
    return str(caught.value)


@pytest.mark.parametrize("value", [None, "", " \n", "key\nwith-a-break", "ключ"])
def test_a_key_that_is_missing_or_unusable_is_a_start_error(
    app: MakeApp, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.setenv("ALICE_KEY", ALICE)
    monkeypatch.delenv("BOB_KEY", raising=False)
    if value is not None:
        monkeypatch.setenv("BOB_KEY", value)
    line = start_error(app, NAMED)
    assert ".toml.api_keys[1].key_env" in line
    assert "BOB_KEY" in line
    assert not value or value.strip() not in line or not value.strip()


@pytest.mark.parametrize(
    "keys", [{"name": "x"}, {"key_env": "ALICE_KEY"}, {"name": "x", "key": "secret"}, {"name": 1, "key_env": "A"}]
)
def test_an_incomplete_table_is_a_start_error(app: MakeApp, keys: dict[str, Any]) -> None:
    line = start_error(app, table("[[api_keys]]", **keys))
    assert ".toml.api_keys[0]" in line
    assert "secret" not in line


def test_two_names_for_one_key_are_a_start_error(app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whose request would it be?"""
    monkeypatch.setenv("ALICE_KEY", ALICE)
    monkeypatch.setenv("BOB_KEY", ALICE)
    line = start_error(app, NAMED)
    assert ".toml.api_keys[1]" in line
    assert ALICE not in line


def test_two_keys_may_have_one_name(house: MakeHouse) -> None:
    """That is how a key is replaced: both work for a while."""
    both = table("[[api_keys]]", name="team", key_env="ALICE_KEY") + table("[[api_keys]]", name="team", key_env="BOB_KEY")
    here = house(both)
    for key in (ALICE, BOB):
        assert here.chat(headers=bearer(key)).status == 200
    assert [record["api_key_name"] for record in here.records] == ["team", "team"]


def test_in_a_running_router_names_are_logged_and_keys_are_not(router: RouterFactory, fakes: Fakes) -> None:
    process = router(config(provider("a", fakes["a"]), NAMED), server='api_key_env = "SHARED_KEY"', environment=KEYS, start=True)
    process.key = SHARED
    assert process.chat(headers={"Authorization": f"Bearer {ALICE}"}).status == 200
    with process.stream(headers={"Authorization": "", "X-Api-Key": BOB}) as reply:
        reply.read()
    process.chat()
    assert [record["api_key_name"] for record in process.settled(3)] == ["alice", "bob", None]
    everything = process.output() + process.log.read_text("utf-8")
    assert not any(key in everything for key in (ALICE, BOB, SHARED))
