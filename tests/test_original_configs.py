"""Configurations as the Rust original's users have them: taken unchanged, and meaning what they meant.

fixtures/original/*.toml use its keys and nothing else; fixtures/original/cases/ says of each what must come of it.
"""

from __future__ import annotations

import json
import random
import tomllib
from pathlib import Path
from typing import Any

import pytest
from conftest import App
from router_process import chat_body

FOLDER = Path(__file__).parent / "fixtures" / "original"
FILES = sorted(FOLDER.glob("*.toml"))
KEY = "sk-PROVIDER-0123456789abcdef"


def told(path: Path) -> dict[str, Any]:
    return tomllib.loads((FOLDER / "cases" / path.name).read_text("utf-8"))


def application(path: Path) -> Any:
    """What `serve` makes of the file, with nothing running and no log written."""
    import router

    environment = dict.fromkeys(told(path).get("environment", ()), KEY)
    made = router._idle_app(str(path), environment) if _takes_environment(router._idle_app) else None
    if made is None:
        config = router.load(path, environment)
        made = router.App(config, environment)
    for name, models in told(path).get("serves", {}).items():
        made.pipeline.plan.lanes[name].discovered = tuple(models)
    return made


CASES = [(path, case) for path in FILES for case in told(path)["case"]]
