"""The matrix of `make matrix`, cell by cell, and that its scripted providers speak as the published schemas say."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import matrix
import ollama
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from fake_upstream import Script
from matrix import ANSWERS, CELLS, REFUSALS, SAYS, Cell, Matrix, table
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from pydantic import TypeAdapter

SAID = [says for answers in ANSWERS.values() for says in answers]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Matrix]:
    with matrix.matrix(tmp_path_factory.mktemp("matrix")) as started:
        yield started
        started.process.check_cleanliness()


@pytest.mark.xdist_group("matrix")
@pytest.mark.parametrize("cell", [c for c in CELLS if not c.reason], ids=str)
def test_every_client_is_answered_by_every_provider(running: Matrix, cell: Cell) -> None:
    running.run(cell)


def test_no_cell_of_the_table_is_empty_without_its_reason() -> None:
    printed = table({cell: "ok" for cell in CELLS if not cell.reason})
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + len(matrix.CLIENTS) * len(matrix.UPSTREAMS)
    for cell in (cell.strip() for row in rows for cell in row):
        assert cell and (not cell.startswith("(") or f"\n{cell} " in printed), printed


def test_a_cell_that_fails_is_shown_as_failing() -> None:
    results = dict.fromkeys(CELLS, "ok") | {Cell("openai", "ollama", "image", True): "FAILS"}
    assert table(results).count("ok/FAILS") == 1


# --- the scripted providers


def sent(script: Script) -> bytes:
    """The body a script sends, without its framing."""

    class Wire:
        data = b""

        def send(self, data: bytes) -> None:
            self.data += data

    wire = Wire()
    script.run(wire)  # type: ignore[arg-type]
    head, _, body = wire.data.partition(b"\r\n\r\n")
    return b"".join(_dechunked(body)) if b"chunked" in head else body


def _dechunked(body: bytes) -> Iterator[bytes]:
    while body:
        size, _, rest = body.partition(b"\r\n")
        yield rest[: int(size, 16)]
        body = rest[int(size, 16) + 2 :]


def events(data: bytes) -> list[Any]:
    """The JSON of each server-sent event."""
    told = [line[6:] for line in data.decode().split("\n") if line.startswith("data: ")]
    return [json.loads(t) for t in told if t != "[DONE]"]


@pytest.mark.parametrize("says", SAID, ids=lambda says: says.text or "calls")
def test_the_scripted_openai_speaks_as_published(says: matrix.Says) -> None:
    ChatCompletion.model_validate_json(sent(SAYS["openai"](says, False)), strict=True)
    chunks = [ChatCompletionChunk.model_validate(e, strict=True) for e in events(sent(SAYS["openai"](says, True)))]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == says.text


@pytest.mark.parametrize("says", SAID, ids=lambda says: says.text or "calls")
def test_the_scripted_anthropic_speaks_as_published(says: matrix.Says) -> None:
    Message.model_validate_json(sent(SAYS["anthropic"](says, False)), strict=True)
    told = [e for e in events(sent(SAYS["anthropic"](says, True))) if e["type"] != "ping"]
    known: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
    assert [known.validate_python(e, strict=True).type for e in told][-1] == "message_stop"


@pytest.mark.parametrize("says", SAID, ids=lambda says: says.text or "calls")
def test_the_scripted_ollama_speaks_as_published(says: matrix.Says) -> None:
    ollama.ChatResponse.model_validate_json(sent(SAYS["ollama"](says, False)), strict=True)
    lines = [ollama.ChatResponse.model_validate_json(line) for line in sent(SAYS["ollama"](says, True)).split(b"\n") if line]
    assert lines[-1].done and "".join(line.message.content or "" for line in lines) == says.text


def test_every_scripted_provider_can_refuse() -> None:
    assert REFUSALS.keys() == SAYS.keys() == set(matrix.UPSTREAMS) - {"echo"}
