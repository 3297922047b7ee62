"""What holds for every configuration and for every sequence of failures, not only for those somebody thought of.

The chain is compared with a second, naive reading of the rules (`expected`). Failures are drawn for three providers that
count what they receive; the pipeline's clock is the test's, so back-off costs nothing. hypothesis runs derandomized and the
draws of `random` are seeded: what passes once passes always.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import App
from deciding import CHAT, Clock, Fakes, House, config, fake_providers, provider, rest, rule, set_clock
from fake_upstream import (
    Received,
    Script,
    answer,
    chat_completion,
    chunks,
    error_answer,
    fin,
    head,
    json_answer,
    openai_chunks,
    raw,
    reset,
    stream,
    stream_head,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from router_process import chat_body, filled

STEADY = settings(derandomize=True, deadline=None, database=None, max_examples=150, suppress_health_check=list(HealthCheck))

# --- the chain, against a naive reading of the rules

NAMES = ("a", "b", "c", "d")
MODELS = ("x", "x/1", "y")


@dataclass
class House4:
    """Providers by name (their numbers), who is left out and who rests, and the rules in order."""

    providers: dict[str, dict[str, Any]]
    left_out: set[str]
    resting: set[str]
    rules: list[dict[str, Any]]
    model: str
    models: list[str] = field(default_factory=list)


numbers = st.sampled_from([0, 1, 2, 2.5, 10])
maybe = st.none() | numbers
providers = st.fixed_dictionaries(
    {"cost_per_1m_tokens": numbers, "quality": numbers},
    optional={
        "latency_ms": numbers,
        "throughput_tokens_per_sec": numbers,
        "models": st.lists(st.sampled_from(MODELS), max_size=2, unique=True),
    },
)
some_names = st.lists(st.sampled_from(NAMES), max_size=3, unique=True)
rewrites = st.sampled_from(["", "other"])
one_name = st.sampled_from(NAMES)


def table_of(type: str, **keys: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({"type": st.just(type), **keys})


steady_rules = st.one_of(
    table_of("prefix", model_prefix=st.sampled_from(["", "x", "x/", "z"]), provider=one_name, rewrite_model=rewrites),
    table_of("price", providers=some_names, max_cost_per_1m_tokens=numbers),
    table_of("latency", providers=some_names, max_latency_ms=numbers),
    table_of("throughput", providers=some_names, min_tokens_per_sec=numbers),
    table_of("discover", provider=one_name),
    table_of("fallback", providers=some_names, quality_bias=st.sampled_from([0, 0.25, 0.5, 1]), rewrite_model=rewrites),
)


def houses(rules: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[House4]:
    return st.builds(
        House4,
        providers=st.fixed_dictionaries(dict.fromkeys(NAMES, providers)),
        left_out=st.sets(one_name, max_size=2),
        resting=st.sets(one_name, max_size=2),
        rules=st.lists(rules, min_size=1, max_size=4),
        model=st.sampled_from(MODELS),
        models=st.lists(st.sampled_from(MODELS), max_size=2),
    )


def application(house: House4) -> Any:
    import router

    tables = [
        {"name": name, "format": "openai", "base_url": "http://127.0.0.1:9/v1", **keys}
        | ({"api_key_env": "UNSET"} if name in house.left_out else {})
        for name, keys in house.providers.items()
    ]
    told = {"providers": tables, "routers": house.rules, "breaker": {"failures": 1, "cooldown_seconds": 3600}}
    made = router.App(router.Reader({}).read(router.Config, told, "config.toml"), {})
    for name in house.resting - house.left_out:
        rest(made, name)
    return made


def chosen(made: Any, house: House4) -> list[tuple[str, str]]:
    import pipeline

    body = json.dumps(chat_body(model=house.model, models=house.models)).encode()
    told = pipeline.explain(made.pipeline.plan, made.hear("/v1/route", body))
    return [(c["provider"], c["model"]) for c in told["chosen"]]


def expected(house: House4) -> list[tuple[str, str]]:
    """Who is asked in which order, read off the rules one after the other; each provider once."""
    order: dict[str, str] = {}
    for model in (house.model, *house.models):
        for told in house.rules:
            for name in drawn(house, told, model):
                order.setdefault(name, told.get("rewrite_model") or model)
    return list(order.items())


def drawn(house: House4, told: dict[str, Any], model: str) -> list[str]:
    names = [told["provider"]] if "provider" in told else told["providers"] or list(house.providers)
    names = [name for name in names if name not in house.left_out | house.resting]
    number: dict[str, Callable[[str], Any]] = {name: house.providers[name].get for name in names}
    match told["type"]:
        case "prefix":
            return names if model.startswith(told["model_prefix"]) else []
        case "discover":
            return [name for name in names if model in house.providers[name].get("models", ())]
        case "fallback":
            bias = told["quality_bias"]
            score = {n: bias * number[n]("quality") - (1 - bias) * number[n]("cost_per_1m_tokens") for n in names}
            return sorted(names, key=lambda n: -score[n])
    key, limit, sign = {
        "price": ("cost_per_1m_tokens", "max_cost_per_1m_tokens", 1),
        "latency": ("latency_ms", "max_latency_ms", 1),
        "throughput": ("throughput_tokens_per_sec", "min_tokens_per_sec", -1),
    }[told["type"]]
    within = [n for n in names if number[n](key) is not None and sign * number[n](key) <= sign * told[limit]]
    return sorted(within, key=lambda n: sign * number[n](key))


@given(houses(steady_rules))
@STEADY
def test_the_chain_is_what_the_rules_say_every_time(house: House4) -> None:
    if house.left_out == set(NAMES):
        return
    made = application(house)
    assert chosen(made, house) == expected(house)
    assert chosen(made, house) == expected(house), "asked again, the same"


@given(houses(table_of("random", providers=some_names, rewrite_model=rewrites)))
@STEADY
def test_random_shuffles_whom_it_may_draw_and_nobody_else(house: House4) -> None:
    made = application(house)
    first = house.rules[0]
    names = [n for n in first["providers"] or NAMES if n not in house.left_out | house.resting]
    told = chosen(made, house)
    assert sorted(told[: len(names)]) == sorted((name, first["rewrite_model"] or house.model) for name in names)


# --- random is uniform

CRITICAL = {2: 15.2, 3: 17.73, 4: 20.0}
"""chi-square, degrees of freedom -> the value that a fair lottery exceeds once in 2000 tries (p = 0.0005)."""
DRAWS = 4000

LOTTERIES = {
    "all providers": (rule("random"), {"a", "b", "c"}, ()),
    "without the one that rests": (rule("random"), {"b", "c", "d"}, ("a",)),
    "the named ones": (rule("random", providers=["d", "b", "a"]), {"a", "b", "d"}, ()),
    "pairs, two of them at one provider": (
        rule(
            "random",
            candidates=[
                {"provider": "a", "model": "1"},
                {"provider": "b", "model": "1"},
                {"provider": "b", "model": "2"},
                {"provider": "left-out", "model": "1"},
                {"provider": "c", "model": "1"},
            ],
        ),
        {"a/1", "b/1", "b/2", "c/1"},
        (),
    ),
}


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", LOTTERIES)
def test_random_is_uniform_over_the_live_candidates(tmp_path: Path, name: str, seed: int) -> None:
    import pipeline
    import router

    told, live, resting = LOTTERIES[name]
    everybody = "abcd" if name.startswith(("without", "the named")) else "abc"
    places = [provider(n, "http://127.0.0.1:9/v1") for n in everybody]
    places.append(provider("left-out", "http://127.0.0.1:9/v1", api_key_env="UNSET"))
    path = tmp_path / "config.toml"
    path.write_text(filled(config(*places, told, failures=1, cooldown=3600), {"port": "1", "log": str(tmp_path / "log")}))
    made = router.App(router.load(path, {}), {})
    for resting_one in resting:
        rest(made, resting_one)
    request = made.hear("/v1/route", json.dumps(chat_body()).encode())
    random.seed(seed)
    counts = Counter(_winner(pipeline.explain(made.pipeline.plan, request), "/" in min(live)) for _ in range(DRAWS))
    made.close()
    assert set(counts) == live
    fair = DRAWS / len(live)
    chi_square = sum((count - fair) ** 2 / fair for count in counts.values())
    assert chi_square < CRITICAL[len(live) - 1], counts


def _winner(told: dict[str, Any], with_model: bool) -> str:
    first = told["chosen"][0]
    return f"{first['provider']}/{first['model']}" if with_model else str(first["provider"])


# --- no sequence of failures

BEGUN = openai_chunks("one two", finish=None, done=False)
RETRYABLE_STATUS = ("408", "429", "500", "502", "503", "504")
FINAL_STATUS = ("400", "401", "403", "404", "409", "413", "422", "501")
HTML = answer(b"<html>log in</html>", 200, {"Content-Type": "text/html"})
BEHAVIOUR: dict[str, Script] = {
    **{status: error_answer(int(status)) for status in (*RETRYABLE_STATUS, *FINAL_STATUS)},
    "429, wait": error_answer(429, headers={"Retry-After": "1"}),
    "503, wait long": error_answer(503, headers={"Retry-After": "600"}),
    "redirect": answer(b"", 307, {"Location": "http://127.0.0.1:9/"}),
    "reset": reset(),
    "closed": fin(),
    "html": HTML,
    "empty": answer(b"", 200),
    "cut": raw(head(200, {"Content-Type": "application/json", "Content-Length": "500"}) + b'{"id": "x"') + fin(),
    "empty stream": stream([]),
    "error first": stream([b'data: {"error": {"message": "no", "type": "server_error"}}\n\n']),
    "begun, then broken": stream_head() + chunks(BEGUN) + fin(),
}
REFUSED_WORK = {*RETRYABLE_STATUS, "429, wait", "503, wait long"}
kinds = st.sampled_from(["429, wait", "503", "503, wait long"]) | st.sampled_from(["ok", *BEHAVIOUR])
sequences = st.fixed_dictionaries({name: st.lists(kinds, min_size=1, max_size=3) for name in "abc"})


@dataclass
class Sent:
    """What one request led to: who was asked in which order, and how each behaved."""

    log: list[tuple[str, str]] = field(default_factory=list)
    plan: dict[str, list[str]] = field(default_factory=dict)

    def script(self, name: str, received: Received) -> Script:
        left = self.plan[name]
        kind = left.pop(0) if len(left) > 1 else left[0]
        self.log.append((name, kind))
        if kind == "ok":
            return stream(openai_chunks("fine")) if received.json().get("stream") else json_answer(chat_completion("fine"))
        return BEHAVIOUR[kind]


@dataclass
class Playground:
    """One router for each number of attempts, all with the same three providers."""

    fakes: Fakes
    clock: Clock
    folder: Path
    sent: Sent = field(default_factory=Sent)
    houses: dict[int, House] = field(default_factory=dict)

    def house(self, attempts: int) -> House:
        if attempts not in self.houses:
            from router import create_app

            text = config(*[provider(name, self.fakes[name]) for name in "abc"], attempts=attempts, threads=4)
            path = self.folder / f"{attempts}.toml"
            path.write_text(filled(text, {"port": "8090", "log": str(self.folder / f"{attempts}.jsonl")}), "utf-8")
            self.houses[attempts] = House(App(create_app(path)))
        return self.houses[attempts]


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    with fake_providers() as fakes, pytest.MonkeyPatch.context() as patch:
        clock = set_clock(patch)
        ground = Playground(fakes, clock, tmp_path_factory.mktemp("playground"))
        for name in "abc":
            fakes[name].default = _behaves(ground, name)
        yield ground
        for house in ground.houses.values():
            house.application.close()


def _behaves(ground: Playground, name: str) -> Any:
    return lambda received: ground.sent.script(name, received)


@given(plan=sequences, attempts=st.integers(1, 5), streamed=st.booleans())
@settings(STEADY, max_examples=600)
def test_no_sequence_of_failures_sends_too_often(
    playground: Playground, plan: dict[str, list[str]], attempts: int, streamed: bool
) -> None:
    house = playground.house(attempts)
    playground.clock.advance(60)  # the budget for further attempts is full again
    playground.sent = sent = Sent(plan={name: list(kinds) for name, kinds in plan.items()})
    house.events.clear()
    answered = house.post(CHAT, chat_body(stream=streamed))
    check_sends(sent.log, attempts)
    check_answer(sent.log, streamed, answered)
    (record,) = house.records
    assert [(attempt["provider"], attempt["attempt"]) for attempt in record["attempts"]] == [
        (name, number) for number, (name, _) in enumerate(sent.log, 1)
    ]
    assert record["status"] == answered.status
    assert (record["outcome"] == "ok") == (sent.log[-1][1] == "ok")


def works(kind: str, streamed: bool) -> bool:
    """Does this behaviour let the client have a first byte?"""
    return kind == "ok" or (kind == "begun, then broken" and streamed)


def check_sends(log: list[tuple[str, str]], attempts: int) -> None:
    assert 1 <= len(log) <= attempts
    distinct = len({name for name, _ in log})
    assert len({name for name, _ in log[:distinct]}) == distinct, "the others come first"
    for number, (name, kind) in enumerate(log[:-1]):
        assert kind not in FINAL_STATUS, "nobody is asked after a refusal"
        assert kind != "ok"
        if name in {later for later, _ in log[number + 1 :]}:
            assert kind in REFUSED_WORK, f"{name} may be at work after {kind}"
        if kind == "503, wait long":
            assert name not in {later for later, _ in log[number + 1 :]}, "it said when"


def check_answer(log: list[tuple[str, str]], streamed: bool, answered: Any) -> None:
    begun = [number for number, (_, kind) in enumerate(log) if works(kind, streamed)]
    if not begun:
        assert answered.status >= 400
        return
    assert begun == [len(log) - 1], "nothing follows the first byte"
    assert answered.status == 200
    assert answered.headers["x-router-provider"] == log[-1][0]
    assert (b"error" in answered.body) == (log[-1][1] != "ok")


def test_the_fakes_are_what_the_property_takes_them_for(playground: Playground) -> None:
    """A behaviour that never reached the wire would prove nothing."""
    seen = set()
    for kind in ["ok", *BEHAVIOUR]:
        playground.clock.advance(60)
        playground.sent = Sent(plan={name: [kind] for name in "abc"})
        playground.house(1).post(CHAT, chat_body())
        seen |= {kind for _, kind in playground.sent.log}
    assert seen == {"ok", *BEHAVIOUR}


def test_the_other_providers_are_reached_by_what_may_move_on(playground: Playground) -> None:
    """The counterpart: what allows it leads to the second provider, so the limits above are not kept by idleness."""
    for streamed in (False, True):
        for kind in ["ok", *BEHAVIOUR]:
            playground.clock.advance(60)
            playground.sent = sent = Sent(plan={"a": [kind], "b": ["ok"], "c": ["ok"]})
            playground.house(2).post(CHAT, chat_body(stream=streamed))
            stays = works(kind, streamed) or kind in FINAL_STATUS or kind == "redirect"
            assert [name for name, _ in sent.log] == (["a"] if stays else ["a", "b"]), kind
