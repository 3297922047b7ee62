"""Showing why: POST /v1/route and `router.py route` tell what would be asked and for which reason, and ask nobody."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deciding import ROUTE, Fakes, House, MakeApp, always, config, fake_providers, provider, refused_url, rule, set_clock, table
from fake_upstream import Received, Script, error_answer, json_answer, openai_chunks, stream
from router_process import PROVIDER_KEY, ROOT, chat_body, filled, until

MakeHouse = Callable[..., House]


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def house(app: MakeApp) -> MakeHouse:
    return lambda *parts, **more: House(app(config(*parts, **more)))


KEYWORDS = "[classifiers.keyword]\nenabled = true\n" + table("[classifiers.keyword.tags]", code=["refactor"])


def some(fakes: Fakes) -> list[str]:
    return [
        provider("a", fakes["a"], cost_per_1m_tokens=4, quality=8),
        provider("b", fakes["b"], cost_per_1m_tokens=1),
        KEYWORDS,
        rule("tag", tag="code", provider="a", rewrite_model="coder", name="code"),
        rule("price", max_cost_per_1m_tokens=2),
        rule("fallback", quality_bias=1.0),
    ]


def test_the_answer_has_exactly_this_shape(house: MakeHouse, fakes: Fakes) -> None:
    told = house(*some(fakes)).route("please refactor")
    reasons = [told_rule.pop("reason") for told_rule in told["rules"]]
    assert all(isinstance(reason, str) and reason for reason in reasons)
    over = told["rules"][1]["candidates"][1].pop("skipped")
    assert "2" in over
    assert told == {
        "tags": ["code"],
        "rules": [
            {
                "index": 0, "type": "tag", "name": "code", "matched": True,
                "candidates": [{"provider": "a", "model": "coder", "value": None, "skipped": None}],
            },
            {
                "index": 1, "type": "price", "name": told["rules"][1]["name"], "matched": True,
                "candidates": [
                    {"provider": "b", "model": "fake-model", "value": 1.0, "skipped": None},
                    {"provider": "a", "model": "fake-model", "value": 4.0},
                ],
            },
            {
                "index": 2, "type": "fallback", "name": told["rules"][2]["name"], "matched": True,
                "candidates": [
                    {"provider": "a", "model": "fake-model", "value": 8.0, "skipped": None},
                    {"provider": "b", "model": "fake-model", "value": 0.0, "skipped": None},
                ],
            },
        ],
        "chosen": [{"provider": "a", "model": "coder"}, {"provider": "b", "model": "fake-model"}],
    }  # fmt: skip
    assert all(told_rule["name"] in ("", None) for told_rule in told["rules"][1:]), "no name was given"


def test_nothing_is_sent_and_nothing_is_left(house: MakeHouse, fakes: Fakes, tmp_path: Path) -> None:
    here = house(*some(fakes))
    before = here.stats()
    for body in (chat_body(), chat_body(stream=True), chat_body(model="other", models=["x"])):
        assert here.post(ROUTE, body).status == 200
    assert here.post(ROUTE, {"model": 5}).status == 400
    after = here.stats()
    assert fakes.counts() == {}
    assert here.events == []
    log = tmp_path / "app.jsonl"
    assert not log.exists() or log.read_bytes() == b""
    for told in (before, after):
        told.pop("uptime_s")
        told.pop("refused")
    assert after == before


def test_it_asks_for_the_order_that_a_request_then_goes_by(house: MakeHouse, fakes: Fakes) -> None:
    always(error_answer(500), *fakes("a b"))
    here = house(*some(fakes), attempts=2)
    for text in ("please refactor", "hello"):
        told = here.route(text)["chosen"]
        here.chat(text)
        asked = [{"provider": a["provider"], "model": a["model"]} for a in here.records[-1]["attempts"]]
        assert asked == told


def test_it_does_not_use_up_the_probe(house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = set_clock(monkeypatch)
    here = house(provider("a", fakes["a"]), attempts=1, failures=1)
    fakes["a"].script(error_answer(500))
    here.chat()
    told = here.route()
    assert told["chosen"] == []
    assert told["rules"][0]["candidates"][0]["skipped"] == "resting"
    clock.advance(31)
    for _ in range(3):
        assert here.route()["chosen"] == [{"provider": "a", "model": "fake-model"}]
    assert here.chat().status == 200


def test_the_alias_under_api_answers_too(house: MakeHouse, fakes: Fakes) -> None:
    here = house(*some(fakes))
    assert here.post("/api/v1/route", chat_body()).json() == here.route()


def test_whoever_a_plugin_names_is_chosen(house: MakeHouse, fakes: Fakes) -> None:
    tiers = table("[plugins.pareto-router]", enabled=False, tiers={"fast": ["a", "b"]})
    here = house(*some(fakes), tiers)
    told = here.route(plugins=[{"id": "pareto-router", "tier": "fast"}])
    assert [c["provider"] for c in told["chosen"]] == ["a", "b"]
    assert [c["provider"] for c in here.route()["chosen"]] == ["b", "a"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": [{"role": "user", "content": "hi"}]}, "model"),
        (chat_body(plugins=[{"id": "nobody"}]), "plugins"),
        (chat_body(models="x"), "models"),
        (chat_body(temperature="hot"), "temperature"),
    ],
)
def test_what_a_chat_refuses_it_refuses(house: MakeHouse, fakes: Fakes, body: dict[str, Any], param: str) -> None:
    answered = house(*some(fakes)).post(ROUTE, body)
    assert (answered.status, answered.error["param"]) == (400, param)


def test_a_plugin_that_fails_fails_the_dry_run_by_name(house: MakeHouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "class P:\n    def on_start(self, request): raise RuntimeError\nplugin = lambda s: P()\n"
    (tmp_path / "failing_dry_run.py").write_text(source)
    here = house(provider("a"), table("[plugins.stranger]", enabled=True, module="failing_dry_run"))
    answered = here.post(ROUTE, chat_body())
    assert answered.status == 500
    assert "stranger" in answered.error["message"]


def test_the_record_carries_rule_and_reason_in_short(house: MakeHouse, fakes: Fakes) -> None:
    here = house(*some(fakes))
    here.chat("please refactor")
    assert (here.record["rule"], here.record["tags"]) == ("code", ["code"])
    assert here.record["reason"] == here.route("please refactor")["rules"][0]["reason"]


# --- measured numbers


def test_rules_go_by_what_was_measured_once_there_is_enough_of_it(
    house: MakeHouse, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twenty streams make a number; ten minutes later it is forgotten again."""
    clock = set_clock(monkeypatch)
    always(stream(openai_chunks("one two three", {"prompt_tokens": 1, "completion_tokens": 3}), gap=0.002), fakes["a"])
    here = house(
        provider("a", fakes["a"], latency_ms=90_000),
        rule("latency", max_latency_ms=60_000, name="quick"),
        rule("throughput", min_tokens_per_sec=0.001, name="much"),
        rule("fallback", name="any"),
    )

    def told() -> list[tuple[bool, Any]]:
        return [(verdict["matched"], verdict["candidates"][0]["value"]) for verdict in here.route()["rules"][:2]]

    for _ in range(19):
        assert here.chat(stream=True).headers["x-router-rule"] == "any"
    assert told() == [(False, 90_000), (False, None)]
    here.chat()
    assert told()[0] == (False, 90_000), "a whole answer has no first token"
    here.chat(stream=True)
    (quick, ttft), (much, speed) = told()
    assert (quick, much) == (True, True)
    first_tokens = sorted(record["attempts"][0]["first_token_ms"] for record in here.records if record["stream"])
    assert ttft == pytest.approx((first_tokens[9] + first_tokens[10]) / 2)
    assert speed > 0
    assert here.chat(stream=True).headers["x-router-rule"] == "quick"
    clock.advance(601)
    assert told() == [(False, 90_000), (False, None)]


# --- on the command line


def run(*words: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "router.py"), "route", *words]
    full = {"PATH": os.environ["PATH"], "HOME": str(folder), **(environment or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=folder, env=full, check=False)


def written(folder: Path, *parts: str) -> Path:
    place = folder / "config.toml"
    place.write_text(filled(config(*parts), {"port": "8090", "log": str(folder / "requests.jsonl")}), "utf-8")
    return place


def test_the_command_tells_tags_rules_candidates_and_order(fakes: Fakes, tmp_path: Path) -> None:
    place = written(tmp_path, *some(fakes), provider("gone", refused_url(), api_key_env="UNSET_KEY"))
    done = run(str(place), "-m", "big", "please refactor", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "tags: code"
    told = [line for line in lines if re.match(r"(yes|no )", line)]
    assert [line.split()[:2] for line in told] == [["yes", "0:tag"], ["yes", "1:price:"], ["yes", "2:fallback:"]]
    assert "code" in told[0]
    assert any(re.search(r"\bb\b.*\bbig\b.*\b1\b", line) for line in lines), "a candidate with its number"
    assert any(re.search(r"\ba\b.*4.*skipped.*2", line) for line in lines), "and why it is not drawn"
    assert re.search(r"a \(coder\).*b \(big\)", lines[-1]), "the order"
    assert fakes.counts() == {}
    assert not (tmp_path / "requests.jsonl").exists()
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stdout, "no colour where nobody looks"


def test_a_rule_that_does_not_match_is_a_no_with_its_reason(fakes: Fakes, tmp_path: Path) -> None:
    done = run(str(written(tmp_path, *some(fakes))), "-m", "m", "hello", folder=tmp_path)
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("no"))
    assert "0:tag" in line
    assert "code" in line.split(":", 2)[2]
    assert done.stdout.splitlines()[0] == "tags: none"


@pytest.mark.parametrize("words", [["-m", "m", "hello"], ["hello", "-m", "m"], ["--model", "m", "hello"], ["--model=m", "hello"]])
def test_the_configuration_of_the_folder_is_the_default(fakes: Fakes, tmp_path: Path, words: list[str]) -> None:
    written(tmp_path, *some(fakes))
    done = run(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "b (m)" in done.stdout.splitlines()[-1]


def test_nobody_to_ask_is_exit_1(fakes: Fakes, tmp_path: Path) -> None:
    place = written(tmp_path, provider("a", fakes["a"]), rule("prefix", model_prefix="x", provider="a"))
    done = run(str(place), "-m", "m", "hello", folder=tmp_path)
    assert done.returncode == 1
    assert "nobody" in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "words", [[], ["hello"], ["-m", "m"], ["a", "b", "c", "-m", "m"], ["config.toml", "-m", "m", "hello", "--loud"]]
)
def test_wrong_words_are_exit_2(fakes: Fakes, tmp_path: Path, words: list[str]) -> None:
    written(tmp_path, *some(fakes))
    done = run(*words, folder=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_that_cannot_be_used_is_exit_2_in_one_line(tmp_path: Path) -> None:
    place = written(tmp_path, provider("a"), rule("prefix", model_prefix="x", provider="b"))
    done = run(str(place), "-m", "m", "hello", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("config.toml.routers[0]")
    assert len(done.stderr.splitlines()) == 1
    missing = run(str(tmp_path / "missing.toml"), "-m", "m", "hello", folder=tmp_path)
    assert missing.returncode == 2
    assert "missing.toml" in missing.stderr


def ollama(received: Received) -> Script:
    """Two models, one of them without eyes."""
    if received.path == "/api/tags":
        return json_answer(
            {"models": [{"name": "llava:7b", "model": "llava:7b"}, {"name": "phi3:latest", "model": "phi3:latest"}]}
        )
    able = ["completion", "vision"] if "llava" in received.body.decode() else ["completion"]
    return json_answer({"capabilities": able})


def test_the_command_finds_out_first_what_a_local_server_has(fakes: Fakes, tmp_path: Path) -> None:
    fakes["o"].default = ollama
    place = written(
        tmp_path,
        provider("o", fakes["o"].url, format="ollama"),
        provider("a", fakes["a"], api_key_env="KEY"),
        rule("discover", provider="o"),
        rule("fallback", providers=["a"]),
    )
    done = run(str(place), "-m", "phi3", "hello", folder=tmp_path, environment={"KEY": PROVIDER_KEY})
    assert done.returncode == 0, done.stderr
    assert re.search(r"o \(phi3\).*a \(phi3\)", done.stdout.splitlines()[-1])
    assert {request.path for request in fakes["o"].requests} <= {"/api/tags", "/api/show"}
    assert fakes["a"].requests == []
    assert PROVIDER_KEY not in done.stdout + done.stderr


def test_a_local_server_that_is_down_does_not_hold_it_up(fakes: Fakes, tmp_path: Path) -> None:
    place = written(
        tmp_path,
        provider("o", refused_url().removesuffix("/v1"), format="ollama"),
        provider("a", fakes["a"]),
        rule("discover", provider="o"),
        rule("fallback", providers=["a"]),
    )
    done = run(str(place), "-m", "m", "hello", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "a (m)" in done.stdout.splitlines()[-1]


def test_incapable_models_are_known_from_the_server_that_has_them(app: MakeApp, fakes: Fakes) -> None:
    fakes["o"].default = ollama
    parts = [provider("o", fakes["o"].url, format="ollama"), provider("a", fakes["a"]), rule("discover", provider="o"), rule()]
    here = House(app(config(*parts)))
    until(lambda: len(here.stats()["providers"]["o"]["models"]) == 2, 10, "the models are known")
    image = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}]}]
    until(lambda: not here.route(model="phi3:latest", messages=image)["rules"][0]["matched"], 10, "and what they can do")
    assert here.route(model="llava:7b", messages=image)["chosen"][0]["provider"] == "o"
    told = here.route(model="phi3:latest", messages=image)
    assert "vision" in told["rules"][0]["candidates"][0]["skipped"]
    assert told["chosen"] == [{"provider": "a", "model": "phi3:latest"}]
