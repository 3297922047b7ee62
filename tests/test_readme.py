"""The README says what the program does."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest
import readme

import router

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def test_the_table_of_keys_is_the_one_the_code_makes() -> None:
    assert readme.renewed(README) == README, "run `make readme`"


def test_the_shipped_configuration_is_accepted_as_it_is() -> None:
    config = router.load(ROOT / "config.toml", environ={})
    app = router.App(config, environ={})
    assert app.pipeline.plan.models()["echo"]
    app.close()


@pytest.mark.parametrize("block", re.findall(r"```toml\n(.*?)```", README, flags=re.DOTALL))
def test_every_piece_of_configuration_in_the_readme_is_toml(block: str) -> None:
    assert tomllib.loads(block)


def test_every_file_the_readme_links_to_exists() -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_every_make_target_the_readme_names_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)", README)) <= targets


@pytest.mark.parametrize("section", [section for section, _ in readme.SECTIONS if "routers" not in section])
def test_the_shipped_configuration_shows_every_key(section: str) -> None:
    shipped = (ROOT / "config.toml").read_text()
    own = {"type", "method", "url", "instance_id", "api_key", "base_url", "token", "dataset", "tenant", "access_token", "path"}
    for field in dataclasses.fields(dict(readme.SECTIONS)[section]):
        if field.name not in own | {"destinations"}:
            assert re.search(rf"^(# )?{field.name} = ", shipped, flags=re.MULTILINE), f"{section}: {field.name}"
