"""Configurations as the users of the Rust original have them: taken unchanged, and meaning what they meant.

fixtures/original/*.toml use its keys and nothing else; the file of the same name in fixtures/original/cases says what must
come of it: who is in service with which keys set, and what some requests lead to.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import App
from router_process import ROOT

FOLDER = Path(__file__).parent / "fixtures" / "original"
FILES = sorted(FOLDER.glob("*.toml"))
KEY = "sk-PROVIDER-0123456789abcdef"
DRAWS = 200
"""Enough that one of four would be missed with a probability of 1e-25."""


def told(path: Path) -> dict[str, Any]:
    return tomllib.loads((FOLDER / "cases" / path.name).read_text("utf-8"))


def application(path: Path) -> Any:
    """What `serve` makes of the file, with nothing running beside it and no log."""
    import journal
    import router

    environment = dict.fromkeys(told(path).get("environment", ()), KEY)
    config = dataclasses.replace(router.load(path, environment), logging=journal.Settings())
    made = router.App(config, environment)
    for name, models in told(path).get("serves", {}).items():
        made.pipeline.plan.lanes[name].discovered = tuple(models)
    return made


def ask(made: Any, case: dict[str, Any]) -> dict[str, Any]:
    asked = {"model": case.get("model", "m"), "messages": [{"role": "user", "content": case.get("prompt", "hi")}]}
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = App(made).call("POST", "/v1/route", json.dumps({**asked, **case.get("body", {})}).encode(), headers)
    assert answer.status == 200, answer
    answered: dict[str, Any] = answer.json()
    return answered


CASES = [pytest.param(path, case, id=f"{path.stem}: {case['it']}") for path in FILES for case in told(path)["case"]]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_it_is_taken_as_it_is(path: Path) -> None:
    made = application(path)
    assert list(made.pipeline.plan.lanes) == told(path)["in_service"]
    assert [part.id for part in made.pipeline.plan.plugins] == told(path).get("plugins", [])
    made.close()


@pytest.mark.parametrize(("path", "case"), CASES)
def test_it_means_what_it_meant(path: Path, case: dict[str, Any]) -> None:
    made = application(path)
    answered = ask(made, case)
    chosen = [f"{c['provider']}/{c['model']}" for c in answered["chosen"]]
    if "chosen" in case:
        assert chosen == case["chosen"]
    if "first" in case:
        assert chosen[0] == case["first"]
    if "tags" in case:
        assert answered["tags"] == case["tags"]
    if "any_of" in case:
        drawn = {"{provider}/{model}".format(**ask(made, case)["chosen"][0]) for _ in range(DRAWS)}
        assert drawn == set(case["any_of"])
    made.close()


def test_the_command_line_takes_them_too() -> None:
    """`check` says ok of one of them, in its own process and with its real environment."""
    command = [sys.executable, str(ROOT / "router.py"), "check", str(FOLDER / "everything.toml")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"OPENAI_API_KEY": KEY}, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    for name in ("workers", "anthropic", "xai"):
        assert name in done.stderr, "who is left out is told"
    assert KEY not in done.stdout + done.stderr


def test_open_to_everybody_without_a_key_is_the_one_thing_refused(tmp_path: Path) -> None:
    """The original listens there unprotected; here that has to be said."""
    import router

    place = tmp_path / "config.toml"
    place.write_text('[server]\nhost = "0.0.0.0"\n' + (FOLDER / "quickest.toml").read_text("utf-8"), "utf-8")
    with pytest.raises(router.ConfigError, match=r"config\.toml\.server\.host.*api_key"):
        router.App(router.load(place, {}), {})


@pytest.mark.parametrize(
    "phrase",
    [
        "I cannot help with that",
        "Sorry, I can\u2019t help with that.",
        "I can't assist with this request",
        "I'm not able to help with that",
        "I am not able to help with it",
        "As an AI language model, I have no opinion",
        "I won't be able to help with that",
    ],
)
def test_the_phrases_that_were_refusals_still_are(phrase: str) -> None:
    import plugins
    from providers import Answer

    answer = Answer()
    answer.text = f"Hm. {phrase}"
    part = plugins.make("response_classifier", "refusal", {})
    assert part.call("classify_response", None, answer) == ["refusal"]
