"""Tags requests by words in their text: `[classifiers.keyword.tags]` maps a tag to the words that call for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from providers import Request


class Keyword:
    """Settings: tags = {tag: [word, ...]}. A word counts wherever it stands in the text, in any case."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        tags = settings.get("tags", {})
        if unknown := set(settings) - {"tags"}:
            raise ValueError(f"{min(unknown)}: unknown key, known is tags")
        if not isinstance(tags, dict) or not all(_is_words(words) for words in tags.values()):
            raise ValueError("tags: must map each tag to a list of words")
        self._tags = {tag: [word.lower() for word in words] for tag, words in tags.items()}

    def classify(self, request: Request) -> list[str]:
        text = request.said().lower()
        return [tag for tag, words in self._tags.items() if any(word in text for word in words)]


classifier = Keyword


def _is_words(words: Any) -> bool:
    return isinstance(words, list) and all(isinstance(w, str) and w for w in words)
