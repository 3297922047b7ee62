"""What an answer cost: prices per provider, per model and for cached tokens; what the upstream itself reports wins."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from deciding import CHAT, MESSAGES, Fakes, House, MakeApp, always, config, fake_providers, provider, rule, table
from fake_upstream import Script, chat_completion, chunks, error_answer, fin, json_answer, openai_chunks, stream, stream_head
from router_process import chat_body

MakeHouse = Callable[..., House]
USAGE = {"prompt_tokens": 1000, "completion_tokens": 200, "prompt_tokens_details": {"cached_tokens": 400}}
PRICED = {"input_cost_per_1m_tokens": 3.0, "output_cost_per_1m_tokens": 15, "cached_cost_per_1m_tokens": 0.3}
USD = 1e-6


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def house(app: MakeApp) -> MakeHouse:
    return lambda *parts, **more: House(app(config(*parts, **more)))


def said(streamed: bool = False, **usage: Any) -> Script:
    counts = {**USAGE, **usage}
    return stream(openai_chunks("fine", counts)) if streamed else json_answer(chat_completion("fine", counts))


def check(cost: dict[str, Any] | None, into: float, out: float, source: str = "configured", total: float | None = None) -> None:
    assert cost is not None
    assert cost["input"] == pytest.approx(into * USD)
    assert cost["output"] == pytest.approx(out * USD)
    assert cost["total"] == pytest.approx(into * USD + out * USD if total is None else total)
    assert cost["source"] == source


PRICES: dict[str, tuple[dict[str, Any], float, float]] = {
    # keys of the provider -> what 600 fresh + 400 cached input and 200 output tokens cost, in millionths
    "one price for all": ({"cost_per_1m_tokens": 5.0}, 1000 * 5, 200 * 5),
    "input, output and cached": (PRICED, 600 * 3 + 400 * 0.3, 200 * 15),
    "cached costs what input costs": ({"input_cost_per_1m_tokens": 3, "output_cost_per_1m_tokens": 15}, 1000 * 3, 200 * 15),
    "an own price for output": ({"cost_per_1m_tokens": 5, "output_cost_per_1m_tokens": 20}, 1000 * 5, 200 * 20),
    "an own price for input": ({"cost_per_1m_tokens": 5, "input_cost_per_1m_tokens": 1}, 1000 * 1, 200 * 5),
    "cached for nothing": ({"cost_per_1m_tokens": 5, "cached_cost_per_1m_tokens": 0}, 600 * 5, 200 * 5),
    "input for nothing": ({"cost_per_1m_tokens": 5, "input_cost_per_1m_tokens": 0}, 0, 200 * 5),
    "no price": ({}, 0, 0),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", PRICES)
def test_a_providers_prices(house: MakeHouse, fakes: Fakes, name: str, streamed: bool) -> None:
    keys, into, out = PRICES[name]
    always(said(streamed), fakes["a"])
    here = house(provider("a", fakes["a"], **keys))
    here.chat(stream=streamed)
    check(here.record["cost"], into, out)
    assert here.record["usage_source"] == "reported"


def test_unit_prices_are_per_token(house: MakeHouse, fakes: Fakes) -> None:
    always(said(), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED))
    here.chat()
    cost = here.record["cost"]
    assert (cost["input_unit_price"], cost["output_unit_price"]) == (pytest.approx(3 * USD), pytest.approx(15 * USD))


MODELS = table('[providers.models."big"]', **{key: 10 * value for key, value in PRICED.items()}) + table(
    '[providers.models."flat"]', cost_per_1m_tokens=1
)


@pytest.mark.parametrize(
    ("model", "into", "out"),
    [
        ("small", 600 * 3 + 400 * 0.3, 200 * 15),
        ("big", 600 * 30 + 400 * 3, 200 * 150),
        ("flat", 1000, 200),
    ],
)
def test_a_models_own_prices_win(house: MakeHouse, fakes: Fakes, model: str, into: float, out: float) -> None:
    always(said(), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED) + MODELS)
    here.chat(model=model)
    check(here.record["cost"], into, out)


def test_the_model_that_was_sent_is_the_one_to_pay_for(house: MakeHouse, fakes: Fakes) -> None:
    always(said(), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED) + MODELS, rule("fallback", rewrite_model="flat"))
    here.chat(model="big")
    check(here.record["cost"], 1000, 200)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("reported", [0.0123, 0, 3])
def test_what_the_upstream_reports_wins(house: MakeHouse, fakes: Fakes, reported: float, streamed: bool) -> None:
    always(said(streamed, cost=reported), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED))
    here.chat(stream=streamed)
    cost = here.record["cost"]
    assert (cost["total"], cost["source"]) == (pytest.approx(reported), "reported")


@pytest.mark.parametrize("reported", ["0.1", -1, True, None, {}, [1], 10**400])
def test_a_report_that_is_no_sum_of_money_counts_for_nothing(house: MakeHouse, fakes: Fakes, reported: Any) -> None:
    always(said(cost=reported), fakes["a"])
    here = house(provider("a", fakes["a"], cost_per_1m_tokens=5))
    assert here.chat().status == 200
    check(here.record["cost"], 5000, 1000)


def test_the_anthropic_way_of_counting_costs_the_same(house: MakeHouse, fakes: Fakes) -> None:
    """There input_tokens leaves the cached ones out; it is the same request."""
    usage = {"input_tokens": 600, "cache_read_input_tokens": 400, "cache_creation_input_tokens": 0, "output_tokens": 200}
    message = {
        "id": "msg", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "fine"}],
        "stop_reason": "end_turn", "stop_sequence": None, "usage": usage,
    }  # fmt: skip
    always(json_answer(message), fakes["a"])
    here = house(provider("a", fakes["a"], format="anthropic", **PRICED))
    here.chat()
    here.post(MESSAGES, {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]})
    for record in here.records:
        check(record["cost"], 600 * 3 + 400 * 0.3, 200 * 15)


def test_the_one_who_answered_is_the_one_to_pay(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(500), fakes["a"])
    always(said(), fakes["b"])
    here = house(provider("a", fakes["a"], quality=99, cost_per_1m_tokens=50), provider("b", fakes["b"], cost_per_1m_tokens=5))
    here.chat()
    check(here.record["cost"], 5000, 1000)


def test_an_estimate_costs_too_and_says_that_it_is_one(house: MakeHouse, fakes: Fakes) -> None:
    always(stream(openai_chunks("four letters make one")), fakes["a"])
    here = house(provider("a", fakes["a"], cost_per_1m_tokens=5))
    here.chat(stream=True)
    assert here.record["usage_source"] == "estimated"
    assert here.record["cost"]["total"] > 0


@pytest.mark.parametrize("status", [400, 429, 500])
def test_a_failed_request_costs_nothing(house: MakeHouse, fakes: Fakes, status: int) -> None:
    always(error_answer(status), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED), attempts=1)
    here.chat()
    assert here.record["cost"] is None
    assert here.record["usage_source"] == "none"


def test_a_broken_stream_has_a_cost_only_if_one_was_reported(house: MakeHouse, fakes: Fakes) -> None:
    here = house(provider("a", fakes["a"], **PRICED))
    for usage in (USAGE, {**USAGE, "cost": 0.5}):
        events = openai_chunks("one two", usage, finish=None, done=False)
        fakes["a"].script(stream_head() + chunks(events) + fin())
        here.chat(stream=True)
    costs = [record["cost"] for record in here.records]
    assert costs[0] is None
    assert costs[1]["total"] == pytest.approx(0.5)


def test_counting_tokens_costs_nothing_and_says_nothing_of_the_provider(house: MakeHouse, fakes: Fakes) -> None:
    here = house(provider("a", fakes["a"], **PRICED), attempts=1, failures=2, cooldown=600)
    always(error_answer(500), fakes["a"])
    for _ in range(2):
        assert here.chat().status == 502
        assert here.post("/v1/messages/count_tokens", chat_body()).status in (200, 503)
    assert here.breaker() == "open"
    counted = [record for record in here.records if record["operation"] == "count_tokens"]
    assert counted[0]["cost"] is None
    assert counted[0]["response"]["usage"]["input_tokens"] > 0
    assert here.stats()["providers"]["a"]["cost_usd"] == 0


def test_embeddings_cost_their_input(house: MakeHouse, fakes: Fakes) -> None:
    vectors = {"object": "list", "model": "e", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}]}
    always(json_answer({**vectors, "usage": {"prompt_tokens": 1000, "total_tokens": 1000}}), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED))
    assert here.post("/v1/embeddings", {"model": "e", "input": "x"}).status == 200
    check(here.record["cost"], 3000, 0)


def test_stats_add_up_what_each_provider_cost(house: MakeHouse, fakes: Fakes) -> None:
    always(said(), fakes["a"])
    always(said(cost=0.25), fakes["b"])
    rules = [rule("prefix", model_prefix="b", provider="b"), rule("fallback", providers=["a"])]
    here = house(provider("a", fakes["a"], cost_per_1m_tokens=5), provider("b", fakes["b"]), *rules)
    for model in ("x", "x", "b"):
        here.chat(model=model)
    providers = here.stats()["providers"]
    assert providers["a"]["cost_usd"] == pytest.approx(2 * 6000 * USD)
    assert providers["b"]["cost_usd"] == pytest.approx(0.25)
    assert sum(record["cost"]["total"] for record in here.records) == pytest.approx(
        sum(told["cost_usd"] for told in providers.values())
    )


def test_a_million_odd_tokens_stay_a_number(house: MakeHouse, fakes: Fakes) -> None:
    always(said(prompt_tokens=2**60, completion_tokens=-5, prompt_tokens_details={"cached_tokens": 2**52}), fakes["a"])
    here = house(provider("a", fakes["a"], **PRICED))
    here.post(CHAT, chat_body())
    assert all(math.isfinite(here.record["cost"][key]) and here.record["cost"][key] >= 0 for key in ("input", "output", "total"))


@pytest.mark.parametrize(
    "keys", [{"cost_per_1m_tokens": -1}, {"input_cost_per_1m_tokens": float("inf")}, {"output_cost_per_1m_tokens": "1"}]
)
def test_a_price_that_is_none_is_a_start_error(app: MakeApp, keys: dict[str, Any]) -> None:
    import router

    text = config(provider("a")).replace('format = "echo"', 'format = "echo"\n' + next(iter(keys)) + " = VALUE")
    value = next(iter(keys.values()))
    with pytest.raises(router.ConfigError, match=r"\.toml\.providers\[0\].*" + next(iter(keys))):
        app(text.replace("VALUE", "inf" if value == float("inf") else repr(value).replace("'", '"')))
