"""The log: one JSON line per finished request.

A thread of its own writes it, so that no request waits for a disk; a disk that cannot be written to costs lines, which are
counted, and nothing else.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import stat
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import providers

log = logging.getLogger("opensourcellmrouter.journal")


@dataclass(frozen=True)
class Settings:
    """The [logging] section."""

    enabled: bool = field(default=False, metadata={"doc": "write one JSON line per finished request"})
    path: str = field(default="logs/requests.jsonl", metadata={"doc": "the file; may be renamed or truncated while in use"})
    content: bool = field(default=True, metadata={"doc": "false: no messages, no response text"})


class Journal:
    """One JSON line per finished request, written by a thread of its own so that no request waits for a disk.

    A line is part of one write to a file opened for appending, and never of two. The path is looked at before a write, at
    most once a second, so rename and copytruncate lose nothing. A disk that cannot be written to costs lines, which are
    counted and warned of once a minute; where a line was torn, the next begins on a line of its own.
    """

    QUEUE = 10_000

    def __init__(self, settings: Settings) -> None:
        self._path = Path(settings.path)
        self._content = settings.content
        self._queue: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._fd: int | None = None
        self._looked = self._warned = float("-inf")
        self._torn = False
        self.written = self.dropped = 0
        self._thread = threading.Thread(target=self._write_all, name="request-log", daemon=True)
        self._thread.start()

    def sink(self, event: dict[str, Any]) -> None:
        """Take a record to be written; other events are none of the log's business."""
        if event["type"] != "complete":
            return
        if self._queue.qsize() >= self.QUEUE:
            self.dropped += 1
        else:
            self._queue.put(event)

    def close(self, seconds: float = 3.0) -> None:
        """Write what is queued, for at most so many seconds."""
        self._queue.put(None)
        self._thread.join(seconds)

    def _write_all(self) -> None:
        ending = False
        while not ending:
            batch, ending = self._batch()
            if batch:
                self._write(batch)
                time.sleep(0.02)  # what comes meanwhile is then written in one go, without waking a thread for each
        if self._fd is not None:
            os.close(self._fd)

    def _batch(self) -> tuple[list[bytes], bool]:
        """The lines that wait, a quarter megabyte at most, and whether they are the last."""
        lines, size = [], 0
        event = self._queue.get()
        while event is not None:
            try:
                lines.append(_line(event if self._content else without_content(event)))
                size += len(lines[-1])
            except Exception as e:  # noqa: BLE001 - one record that cannot be written must not end the log
                self._lost(1, type(e).__name__)
            if size > 262_144 or self._queue.empty():
                return lines, False
            event = self._queue.get()
        return lines, True

    def _write(self, lines: list[bytes]) -> None:
        try:
            fd = self._file()
            data = b"".join([b"\n", *lines] if self._torn else lines)
            done = os.write(fd, data)
        except OSError as e:
            return self._lost(len(lines), e.strerror or type(e).__name__)
        whole = data[:done].count(b"\n") - (data[:1] == b"\n")
        self.written += whole
        self._torn = done < len(data) and data[done - 1 : done] != b"\n"
        if done < len(data):
            return self._lost(len(lines) - whole, "only part of it could be written")
        return None

    def _file(self) -> int:
        """The open file, opened anew if the path no longer leads to it."""
        now = time.monotonic()
        if self._fd is not None and now - self._looked < 1.0:
            return self._fd
        self._looked = now
        if self._fd is not None and not self._is_at_path(self._fd):
            os.close(self._fd)
            self._fd = None
        if self._fd is None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
            self._fd = os.open(self._path, flags, 0o600)
            if stat.S_ISREG(os.fstat(self._fd).st_mode):
                os.set_blocking(self._fd, True)
                self._torn = _ends_torn(self._path)
        return self._fd

    def _is_at_path(self, fd: int) -> bool:
        try:
            there, here = self._path.stat(), os.fstat(fd)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)

    def _lost(self, lines: int, why: str) -> None:
        self.dropped += lines
        if time.monotonic() - self._warned >= 60:
            self._warned = time.monotonic()
            log.warning("cannot write to %s: %s; %d lines lost so far", self._path, why, self.dropped)


def _ends_torn(path: Path) -> bool:
    """Does the file end in the middle of a line, because of a crash or a full disk in an earlier life?"""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        return size > 0 and file.read(1) != b"\n"


def _line(record: dict[str, Any]) -> bytes:
    """One line of JSON, ASCII only. A lone surrogate (a client may send one as an escape) becomes U+FFFD."""
    record = {key: value for key, value in record.items() if key[0] != "_"}
    line = providers.dumps(record)
    if "\\ud" in line:
        text = json.dumps(record, ensure_ascii=False).encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
        line = providers.dumps(json.loads(text))
    return line.encode() + b"\n"


def without_content(record: dict[str, Any]) -> dict[str, Any]:
    """The record without anything a client or a model said: what is left are names, numbers and outcomes."""
    bare = {**record, "system": None, "messages": [], "tools": [], "request": {}, "trace": record["trace"]}
    if record["response"]:
        calls = [{"id": c["id"], "name": c["name"], "arguments": ""} for c in record["response"]["tool_calls"]]
        bare["response"] = {**record["response"], "content": "", "reasoning": None, "tool_calls": calls}
    return bare
