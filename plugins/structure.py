"""Tags requests by their shape: vision, tools, json, long."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from providers import Block, Request


class Structure:
    """Settings: long_chars = 100000, a request with more characters of text than that is `long`."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._long = settings.get("long_chars", 100_000)
        if unknown := set(settings) - {"long_chars"}:
            raise ValueError(f"{min(unknown)}: unknown key, known is long_chars")
        if type(self._long) is not int or self._long < 1:
            raise ValueError("long_chars: must be a whole number of at least 1")

    def classify(self, request: Request) -> list[str]:
        shape = {
            "vision": any(_has_image(b) for m in request.messages for b in m.content),
            "tools": bool(request.tools),
            "json": request.response_format is not None,
            "long": len(request.text()) > self._long,
        }
        return [tag for tag, is_so in shape.items() if is_so]


classifier = Structure


def _has_image(block: Block) -> bool:
    inner = block.get("content")
    return block["type"] == "image" or (isinstance(inner, list) and any(_has_image(b) for b in inner))
