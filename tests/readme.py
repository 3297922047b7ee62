"""The parts of README.md that are made from the code: `make readme` writes them anew, test_readme.py compares."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import broadcast  # noqa: E402
import journal  # noqa: E402
import pipeline  # noqa: E402
import providers  # noqa: E402
import router  # noqa: E402
import rules  # noqa: E402
import server  # noqa: E402
import telemetry  # noqa: E402

SECTIONS: list[tuple[str, Any]] = [
    ("server", server.Settings),
    ("[[api_keys]]", router.ApiKey),
    ("logging", journal.Settings),
    ("telemetry", telemetry.Settings),
    ("broadcast", broadcast.Settings),
    ("[[broadcast.destinations]]", broadcast.Destination),
    ("retry", pipeline.Retry),
    ("breaker", rules.Breaker),
    ("[[providers]]", providers.Provider),
    ('[providers.models."id"]', providers.Prices),
    *((f'[[routers]] type = "{kind}"', rule) for kind, rule in rules.RULES.items()),
]


def config_table() -> str:
    """Every key of config.toml with its default and meaning, as Markdown."""
    rows = ["| section | key | default | meaning |", "|---|---|---|---|"]
    for section, cls in SECTIONS:
        for field in dataclasses.fields(cls):
            doc = str(field.metadata.get("doc", "")).replace("|", "\\|")
            rows.append(f"| `{section}` | `{field.name}` | {default(field)} | {doc} |")
    return "\n".join(rows)


def default(field: Any) -> str:
    """A field's default as it would stand in the file."""
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


MADE = {"config": config_table}


def renewed(text: str) -> str:
    """The README with its made parts as they should be."""
    for name, make in MADE.items():
        pattern = rf"(<!-- made: {name} -->\n).*?(\n<!-- end -->)"
        text, found = re.subn(pattern, lambda m, make=make: m[1] + make() + m[2], text, flags=re.DOTALL)
        assert found == 1, f"README.md lacks the marks of {name}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(renewed(readme.read_text()))
