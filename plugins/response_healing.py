"""Repairs answers that should be JSON and are not quite: fences, prose around, trailing commas, cut brackets.

It acts when the client asked for JSON, or when the answer begins like JSON or like a code fence; it never touches valid JSON
or plain prose. Streams are not healed: their text has left before its end is known.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from providers import Answer, Request


class ResponseHealing:
    """No settings."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        if settings:
            raise ValueError(f"{min(settings)}: unknown key, response-healing has none")

    def post_response(self, request: Request, answer: Answer) -> None:
        text = answer.text
        healed = heal(text, asked=request.response_format is not None)
        if healed is not None and healed != text:
            answer.text = healed


def heal(text: str, asked: bool = True) -> str | None:
    """The JSON in a text, repaired; the text itself if it is valid, None if there is nothing to repair.

    Only where JSON was asked for it is looked for among other words; else the text, or its fence, must begin with it. A list
    is taken only if nothing stands beside it: prose has its own use for square brackets.
    """
    if _is_json(text):
        return text
    fenced = re.search(r"```(?:json[5cl]?)?[ \t]*\r?\n?(?=[ \t\r\n]*[{\[])", text, re.IGNORECASE)
    if fenced and (asked or not text[: fenced.start()].strip()):
        repaired = _repair(text[fenced.end() :].lstrip())
        if repaired is not None:
            return repaired[0]
    return _longest(text) if asked else _alone(text.strip())


def _alone(text: str) -> str | None:
    repaired = _repair(text) if text[:1] in ("{", "[") else None
    return repaired[0] if repaired and (text[0] == "{" or _is_blank(text[repaired[1] :])) else None


def _longest(text: str) -> str | None:
    """The longest object in a text, or the list that it is."""
    found, at = _alone(text.strip()), 0
    while found is None and (start := text.find("{", at)) >= 0:
        repaired = _repair(text[start:])
        at = start + (repaired[1] if repaired else 1)
        found = repaired[0] if repaired else None
    return found


def _is_blank(text: str) -> bool:
    return not text.strip(" \t\r\n}]`")


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class _Open:
    """An open bracket: what closes it, and for an object whether a key comes next."""

    def __init__(self, bracket: str) -> None:
        self.closer = "}" if bracket == "{" else "]"
        self.key = bracket == "{"


def _repair(text: str) -> tuple[str, int] | None:
    """The object or array at the beginning of a text, and where it ends: commas before a closing bracket go, an unclosed
    string and unclosed brackets are closed."""
    out: list[str] = []
    brackets: list[_Open] = []
    in_string, at = False, 0
    while at < len(text):
        c = text[at]
        at += 1
        if in_string:
            out.append(c + text[at : at + 1] if c == "\\" else c)
            at += c == "\\"
            in_string = c != '"'
        elif c in "{[":
            brackets.append(_Open(c))
            out.append(c)
        elif c in "}]":
            if brackets.pop().closer != c:
                return None
            _drop_comma(out)
            out.append(c)
        else:
            in_string = c == '"'
            if c in ":,":
                brackets[-1].key = c == "," and brackets[-1].closer == "}"
            out.append(c)
        if not brackets:
            break
    repaired = _close("".join(out), in_string, brackets)
    return (repaired, at) if _is_json(repaired) else None


def _drop_comma(out: list[str]) -> None:
    while out and (out[-1].isspace() or out[-1] == ","):
        out.pop()


def _close(text: str, in_string: bool, brackets: list[_Open]) -> str:
    """A text that broke off, made whole: an open string ends, half a word or number is completed or cut, a key without its
    value gets null, open brackets close."""
    if not brackets:
        return text
    if in_string:
        text = re.sub(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9a-fA-F]{0,3})?\Z", r"\1", text) + '"'
    text = text.rstrip()
    if not text.endswith('"'):
        text = _whole_word(text).rstrip().rstrip(",").rstrip()
    if text.endswith(":"):
        text += " null"
    elif brackets[-1].key and text.endswith('"'):
        text += ": null"
    return text + "".join(b.closer for b in reversed(brackets))


def _whole_word(text: str) -> str:
    """A literal or number at the end of a text, completed or cut back to what is valid."""
    word = re.search(r"[a-z]+\Z", text)
    for literal in ("true", "false", "null"):
        if word and literal.startswith(word[0]):
            return text[: word.start()] + literal
    number = re.search(r"[-+.eE0-9]+\Z", text)
    if number is None:
        return text
    valid = re.match(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?", number[0])
    return text[: number.start()] + (valid[0] if valid else "")


plugin = ResponseHealing
