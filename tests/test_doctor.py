"""`router.py doctor`: per provider reachable, authorised, model present - the cause and the cure in a sentence, an exit code."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from deciding import Fakes, always, config, fake_providers, provider, refused_url, rule
from fake_upstream import Received, Script, answer, error_answer, fin, json_answer, silence
from router_process import PROVIDER_KEY, ROOT, filled

Doctor = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def doctor(tmp_path: Path) -> Doctor:
    """`doctor(table, ...)` is what the command says of a configuration of these tables."""

    def run(*parts: str, words: tuple[str, ...] | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        place = tmp_path / "config.toml"
        text = config(*parts)
        place.write_text(filled(text, {"port": "8090", "log": str(tmp_path / "requests.jsonl")}), "utf-8")
        command = [sys.executable, str(ROOT / "router.py"), "doctor", *((str(place),) if words is None else words)]
        full = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), **environment}
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, env=full, check=False)
        assert "Traceback" not in done.stderr, done.stderr
        assert PROVIDER_KEY not in done.stdout + done.stderr
        assert not (tmp_path / "requests.jsonl").exists()
        return done

    return run


def finding(done: subprocess.CompletedProcess[str], name: str) -> str:
    """The one line that tells of this provider."""
    (line,) = (line for line in done.stdout.splitlines() if f"provider {name} " in f"{line} ")
    return line


def models(*names: str) -> Script:
    return json_answer({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "x"} for name in names]})


def tags(*names: str) -> Callable[[Received], Script]:
    told = json_answer({"models": [{"name": name, "model": name} for name in names]})
    return lambda received: told if received.path == "/api/tags" else json_answer({"capabilities": ["completion"]})


def test_all_is_well(doctor: Doctor, fakes: Fakes) -> None:
    always(models("gpt-x", "gpt-y"), fakes["vendor"])
    fakes["local"].default = tags("llama3:latest")
    done = doctor(
        provider("vendor", fakes["vendor"], api_key_env="KEY", models=["gpt-x"]),
        provider("local", fakes["local"].url, format="ollama", models=["llama3:latest"]),
        provider("echo"),
        KEY=PROVIDER_KEY,
    )
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("ok") for line in lines)
    assert "\x1b" not in done.stdout
    assert fakes["vendor"].requests[0].header("Authorization") == f"Bearer {PROVIDER_KEY}"


def test_nothing_is_billed(doctor: Doctor, fakes: Fakes) -> None:
    always(models("m"), fakes["a"])
    doctor(provider("a", fakes["a"]))
    assert fakes["a"].posts == []
    assert [request.path for request in fakes["a"].requests] == ["/v1/models"]


@pytest.mark.parametrize("format", ["openai", "anthropic"])
@pytest.mark.parametrize("status", [401, 403])
def test_a_key_that_is_not_accepted(doctor: Doctor, fakes: Fakes, format: str, status: int) -> None:
    always(error_answer(status, f"Incorrect API key provided: {PROVIDER_KEY}"), fakes["a"])
    done = doctor(provider("a", fakes["a"], format=format, api_key_env="MY_VENDOR_KEY"), MY_VENDOR_KEY=PROVIDER_KEY)
    assert done.returncode == 1
    line = finding(done, "a")
    assert line.startswith("FAIL")
    assert str(status) in line
    assert "MY_VENDOR_KEY" in line, "which key to look at"


def test_an_anthropic_provider_is_asked_for_its_models_too(doctor: Doctor, fakes: Fakes) -> None:
    page = {
        "data": [{"type": "model", "id": "claude-x", "display_name": "X"}],
        "has_more": False,
        "first_id": "a",
        "last_id": "b",
    }
    always(json_answer(page), fakes["a"])
    done = doctor(
        provider("a", fakes["a"], format="anthropic", models=["claude-x", "claude-y"], api_key_env="KEY"), KEY=PROVIDER_KEY
    )
    assert done.returncode == 1
    assert "claude-y" in finding(done, "a")
    (asked,) = fakes["a"].requests
    assert (asked.method, asked.path.split("?")[0]) == ("GET", "/v1/models")
    assert asked.header("x-api-key") == PROVIDER_KEY
    assert asked.header("anthropic-version") == "2023-06-01"


def test_a_provider_that_is_not_there(doctor: Doctor) -> None:
    url = refused_url()
    done = doctor(provider("a", url))
    assert done.returncode == 1
    line = finding(done, "a")
    assert url in line, "the cause"
    assert "running" in line, "the cure"


def test_a_name_that_does_not_exist(doctor: Doctor) -> None:
    done = doctor(provider("a", "http://no-such-host.invalid/v1"))
    assert done.returncode == 1
    assert finding(done, "a").startswith("FAIL")
    assert "no-such-host.invalid" in finding(done, "a")


def test_a_model_that_is_not_there(doctor: Doctor, fakes: Fakes) -> None:
    always(models("gpt-x"), fakes["a"])
    done = doctor(provider("a", fakes["a"], models=["gpt-x", "gpt-z"]))
    assert done.returncode == 1
    line = finding(done, "a")
    assert "gpt-z" in line
    assert "gpt-x" in line, "and what is there instead"


def test_an_ollama_model_that_is_not_pulled(doctor: Doctor, fakes: Fakes) -> None:
    fakes["o"].default = tags("gemma3:latest")
    done = doctor(provider("o", fakes["o"].url, format="ollama", models=["llama3"]))
    assert done.returncode == 1
    assert "llama3" in finding(done, "o")


def test_the_short_name_of_a_pulled_model_is_that_model(doctor: Doctor, fakes: Fakes) -> None:
    fakes["o"].default = tags("llama3:latest")
    done = doctor(provider("o", fakes["o"].url, format="ollama", models=["llama3"]))
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("models_key", [["*"], {"gpt-x": {"cost_per_1m_tokens": 1}}])
def test_other_ways_to_name_models(doctor: Doctor, fakes: Fakes, models_key: Any) -> None:
    always(models("gpt-x"), fakes["a"])
    assert doctor(provider("a", fakes["a"], models=models_key)).returncode == 0


WRONG: dict[str, tuple[Script, str]] = {
    "a web page": (answer(b"<html>hello</html>", 200, {"Content-Type": "text/html"}), "JSON"),
    "another API": (json_answer({"hello": "world"}), "format"),
    "a wrong path": (error_answer(404), "/v1"),
    "a redirect": (answer(b"", 308, {"Location": "https://elsewhere.example/v1/models"}), "base_url"),
    "a server in trouble": (error_answer(500), "500"),
    "too many requests": (error_answer(429), "429"),
    "somebody who hangs up": (fin(), "connection"),
}


@pytest.mark.parametrize("why", WRONG)
def test_what_answers_otherwise_is_a_finding_with_a_cure(doctor: Doctor, fakes: Fakes, why: str) -> None:
    script, words = WRONG[why]
    always(script, fakes["a"])
    done = doctor(provider("a", fakes["a"]))
    assert done.returncode == 1
    line = finding(done, "a")
    assert line.startswith("FAIL")
    assert words in line


def test_a_silent_one_is_not_waited_for_for_ever(doctor: Doctor, fakes: Fakes) -> None:
    always(silence(), fakes["a"])
    began = time.monotonic()
    done = doctor(provider("a", fakes["a"], read_timeout=0.5))
    assert time.monotonic() - began < 15
    assert done.returncode == 1
    assert "0.5" in finding(done, "a")


def test_a_provider_that_is_left_out_is_a_finding(doctor: Doctor, fakes: Fakes) -> None:
    always(models("m"), fakes["a"])
    done = doctor(provider("a", fakes["a"]), provider("b", fakes["b"], api_key_env="UNSET_KEY"))
    assert done.returncode == 1
    assert finding(done, "a").startswith("ok")
    line = finding(done, "b")
    assert line.startswith("FAIL")
    assert "UNSET_KEY" in line, "which variable to set"
    assert fakes["b"].requests == []


def test_one_that_is_ill_does_not_hide_the_others(doctor: Doctor, fakes: Fakes) -> None:
    always(error_answer(500), fakes["a"])
    always(models("m"), fakes["b"])
    done = doctor(provider("a", fakes["a"]), provider("b", fakes["b"]), provider("c", refused_url()))
    assert [finding(done, name)[:4].strip() for name in "abc"] == ["FAIL", "ok", "FAIL"]


def test_an_answer_cannot_paint_the_terminal(doctor: Doctor, fakes: Fakes) -> None:
    always(models("\x1b[31mred\r\nok   provider z  fine"), fakes["a"])
    done = doctor(provider("a", fakes["a"], models=["m"]))
    assert "\x1b" not in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_a_configuration_that_cannot_be_used_is_exit_2(doctor: Doctor) -> None:
    done = doctor(provider("a"), rule("prefix", model_prefix="x", provider="nobody"))
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("config.toml.routers[0]")


@pytest.mark.parametrize("words", [("missing.toml",), ("a", "b"), ("--loud",)])
def test_wrong_words_are_exit_2(doctor: Doctor, words: tuple[str, ...]) -> None:
    assert doctor(provider("a"), words=words).returncode == 2


def test_the_folders_own_configuration_is_the_default(doctor: Doctor) -> None:
    done = doctor(provider("echo"), words=())
    assert done.returncode == 0, done.stderr
    assert finding(done, "echo").startswith("ok")
