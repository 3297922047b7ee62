"""Each rule type's decisions, as tables: every file in rules/ is a configuration and the cases that must hold for it.

Above the line `# --- cases` stands a config.toml as an operator writes it, below it what is asked and what POST /v1/route
must say. `rules` holds one line per rule: "yes" or "no", the candidates that may be drawn in their order, each with the
number it was judged by, and after "not" those that may not. `[known]` is what the router has found out by then:
who rests, what was measured, who serves what, what a model can do.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import App
from deciding import rest

FILES = sorted((Path(__file__).parent / "rules").glob("*.toml"))
ENVIRONMENT = {"SET_KEY": "sk-PROVIDER-0123456789abcdef"}


def read(path: Path) -> tuple[str, dict[str, Any], list[dict[str, Any]]]:
    """The configuration, what is known for all of its cases, and the cases."""
    config, line, rest = path.read_text("utf-8").partition("# --- cases\n")
    assert line, f"{path.name} has no line `# --- cases`"
    told = tomllib.loads(rest)
    return config, told.pop("known", {}), told["case"]


def cases() -> Iterator[Any]:
    for path in FILES:
        config, known, told = read(path)
        for case in told:
            yield pytest.param(config, {**known, **case.pop("known", {})}, case, id=f"{path.stem}: {case['it']}")


def router_of(config: str, known: dict[str, Any], folder: Path) -> App:
    """A router with this configuration that knows this of its providers; nothing runs beside it."""
    import router

    place = folder / "config.toml"
    place.write_text(config, "utf-8")
    application = router.App(router.load(place, ENVIRONMENT), ENVIRONMENT)
    lanes = application.pipeline.plan.lanes
    for name in known.get("resting", ()):
        rest(application, name)
    for number in ("ttft_ms", "tokens_per_s"):
        for name, values in known.get(number, {}).items():
            for value in values:
                lanes[name].measure(number, value)
    for name, models in known.get("serves", {}).items():
        lanes[name].discovered = tuple(models)
    for name, able in known.get("able", {}).items():
        lanes[name].capabilities = {model: frozenset(words) for model, words in able.items()}
    return App(application)


def body_of(case: dict[str, Any]) -> dict[str, Any]:
    asked = {"model": case.get("model", "m"), "messages": [{"role": "user", "content": case.get("prompt", "hi")}]}
    return {**asked, **case.get("body", {})}


def in_words(rule: dict[str, Any]) -> str:
    """One rule's verdict as the files write it."""

    def named(candidate: dict[str, Any]) -> str:
        number = "" if candidate["value"] is None else f" {candidate['value']:g}"
        return f"{candidate['provider']}{number}"

    drawn = ", ".join(named(c) for c in rule["candidates"] if c["skipped"] is None)
    left = ", ".join(sorted(named(c) for c in rule["candidates"] if c["skipped"] is not None))
    verdict = "yes" if rule["matched"] else "no"
    return verdict + (f": {drawn}" if drawn else "") + (f"; not {left}" if left else "")


@pytest.mark.parametrize(("config", "known", "case"), list(cases()))
def test_the_rules_decide_as_written(tmp_path: Path, config: str, known: dict[str, Any], case: dict[str, Any]) -> None:
    app = router_of(config, known, tmp_path)
    answer = app.call("POST", "/v1/route", json.dumps(body_of(case)).encode())
    assert answer.status == 200, answer
    told = answer.json()
    chosen = [f"{c['provider']}/{c['model']}" for c in told["chosen"]]
    if case.get("any_order"):
        assert sorted(chosen) == sorted(case["chosen"])
    else:
        assert chosen == case["chosen"]
    if "tags" in case:
        assert told["tags"] == case["tags"]
    if "rules" in case:
        assert [in_words(rule) for rule in told["rules"]] == case["rules"]
    for index, words in case.get("reasons", {}).items():
        assert words in json.dumps(told["rules"][int(index)]), "the reason is told"
    app.application.close()


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_rule_that_does_not_pass_says_why(tmp_path: Path, path: Path) -> None:
    """Whatever the case: a verdict has words, and whoever is not drawn has a reason."""
    config, known, told = read(path)
    for number, case in enumerate(told):
        folder = tmp_path / str(number)
        folder.mkdir()
        app = router_of(config, {**known, **case.get("known", {})}, folder)
        rules = app.call("POST", "/v1/route", json.dumps(body_of(case)).encode()).json()["rules"]
        assert [rule["index"] for rule in rules] == list(range(len(rules)))
        for rule in rules:
            assert rule["reason"].strip()
            assert rule["matched"] == any(candidate["skipped"] is None for candidate in rule["candidates"])
            assert all(candidate["skipped"] != "" for candidate in rule["candidates"])
        app.application.close()


def test_every_rule_type_has_its_table() -> None:
    from rules import RULES

    seen = set()
    for path in FILES:
        seen |= {table["type"] for table in tomllib.loads(read(path)[0])["routers"]}
    assert seen == set(RULES) == {
        "prefix", "tag", "price", "latency", "throughput", "discover", "fallback", "random",
    }  # fmt: skip
