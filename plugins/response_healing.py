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
        if request.response_format is None and not text.strip().startswith(("```", "{", "[")):
            return
        healed = heal(text)
        if healed is not None and healed != text:
            answer.text = healed


plugin = ResponseHealing


def heal(text: str) -> str | None:
    """The JSON in a text, repaired; the text itself if it is valid, None if there is nothing to repair."""
    if _is_json(text):
        return text
    fenced = re.search(r"```[\w-]*[ \t]*\r?\n?(.*?)(?:```|\Z)", text, re.DOTALL)
    for candidate in ([fenced[1]] if fenced else []) + [text]:
        start = re.search(r"[{\[]", candidate)
        if start and (repaired := _repair(candidate[start.start() :])) is not None:
            return repaired
    return None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _repair(text: str) -> str | None:
    """The object or array at the beginning of a text: what follows it goes, commas before a closing bracket go, an
    unclosed string and unclosed brackets are closed."""
    out, closers, in_string, at = [], [], False, 0
    while at < len(text):
        c = text[at]
        if in_string:
            out.append(text[at : at + 2] if c == "\\" else c)
            at += c == "\\"
            in_string = c != '"'
        elif c == '"':
            in_string = True
            out.append(c)
        elif c in "{[":
            closers.append("}" if c == "{" else "]")
            out.append(c)
        elif c in "}]":
            if not closers or closers.pop() != c:
                return None
            _drop_comma(out)
            out.append(c)
            if not closers:
                break
        else:
            out.append(c)
        at += 1
    repaired = _close("".join(out), in_string, closers)
    return repaired if _is_json(repaired) else None


def _drop_comma(out: list[str]) -> None:
    while out and (out[-1].isspace() or out[-1] == ","):
        out.pop()


def _close(text: str, in_string: bool, closers: list[str]) -> str:
    """A text that broke off, made whole: an open string ends, a key without its value goes, open brackets close."""
    if in_string:
        text = re.sub(r"\\(u[0-9a-fA-F]{0,3})?\Z", "", text) + '"'
    if closers:
        text = text.rstrip().rstrip(",")
        if text.endswith(":"):
            text += " null"
        elif closers[-1] == "}" and re.search(r'[{,]\s*"(?:[^"\\]|\\.)*"\Z', text):
            text += ": null"
    for word in ("true", "false", "null"):  # a literal that broke off
        if cut := re.search(r"[:\[,]\s*([a-z]+)\Z", text):
            text += word[len(cut[1]) :] if word.startswith(cut[1]) and word != cut[1] else ""
    return text + "".join(reversed(closers))
