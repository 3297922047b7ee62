"""Imports only go down: the map of the house, held."""

from __future__ import annotations

import ast
import configparser
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "router": {"server", "journal", "pipeline", "rules", "plugins", "providers", "telemetry", "broadcast", "dashboard"},
    "server": {"providers"},
    "journal": {"providers"},
    "pipeline": {"rules", "plugins", "providers", "telemetry"},
    "rules": {"providers"},
    "plugins": {"plugins", "providers"},
    "providers": {"providers", "telemetry"},
    "telemetry": set(),
    "broadcast": {"broadcast"},
    "dashboard": {"dashboard"},
}
RUNTIME = {"waitress", "urllib3", "opentelemetry"}


def files(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py")) if (ROOT / room).is_dir() else [ROOT / f"{room}.py"]


def imported(path: Path) -> set[str]:
    """The top-level names of every import in a file, those inside functions too."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    plain = {alias.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for alias in n.names}
    return plain | {n.module.split(".")[0] for n in nodes if isinstance(n, ast.ImportFrom) and n.module and not n.level}


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    for path in files(room):
        upward = imported(path) & set(ROOMS) - ROOMS[room]
        assert not upward, f"{path.relative_to(ROOT)} imports {upward}"


def test_the_words_do_not_know_the_languages() -> None:
    words = ast.parse((ROOT / "providers" / "__init__.py").read_text())
    froms = {n.module for n in ast.walk(words) if isinstance(n, ast.ImportFrom) and n.module}
    assert not {m for m in froms if m.startswith("providers")}


@pytest.mark.parametrize("room", ROOMS)
def test_only_five_packages_are_used_at_run_time(room: str) -> None:
    for path in files(room):
        foreign = imported(path) - set(ROOMS) - set(sys.stdlib_module_names) - RUNTIME
        assert not foreign - ({"google", "requests"} if room == "telemetry" else set()), f"{path.name}: {foreign}"


def test_the_package_ships_every_room() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    shipped = set(setup["options"]["py_modules"].split()) | set(setup["options"]["packages"].split())
    assert shipped == set(ROOMS)


def test_every_module_says_what_it_is_for() -> None:
    for room in ROOMS:
        for path in files(room):
            said = ast.get_docstring(ast.parse(path.read_text()))
            assert said and said.split("\n\n")[0].endswith("."), path
