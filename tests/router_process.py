"""The router as its users meet it: a child process behind a socket, judged by what can be seen from outside.

`RouterProcess` starts it, talks to it and reads what it leaves behind: log lines, counters, threads, files, sockets.
Nothing here sleeps to be on the safe side: `until` polls a condition up to a deadline.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any, TypeVar

ROOT = Path(__file__).resolve().parent.parent
PROVIDER_KEY = "sk-PROVIDER-0123456789abcdef"
INBOUND_KEY = "inbound-KEY-0123456789abcdef"
SECRET_PROMPT = "SECRET-PROMPT"
T = TypeVar("T")

# Placeholders are replaced as plain text, so TOML's own braces need no escape. A test fills in what it is about.
CONFIG = """
[server]
port = {port}
{server}

[logging]
enabled = true
path = "{log}"
{logging}

[retry]
attempts = 1

[breaker]
failures = 100000

{providers}

{rules}
"""

PROVIDER = """
[[providers]]
name = "up"
format = "openai"
base_url = "{upstream}/v1"
models = ["fake-model"]
{provider}
"""

RULES = """
[[routers]]
type = "fallback"
"""


def until(condition: Callable[[], T], seconds: float = 10.0, what: str = "") -> T:
    """Polls until the condition holds and gives its value; fails after the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds} s: {what or condition}; last seen: {value!r}")
        time.sleep(0.02)


def free_port() -> int:
    """A port nobody listens on, from below the range the system takes its own from: those are given away at any moment."""
    while True:
        port = random.randrange(10000, 32000)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


def chat_body(text: str = "hi", **more: Any) -> dict[str, Any]:
    return {"model": "fake-model", "messages": [{"role": "user", "content": text}], **more}


@dataclass
class Answer:
    """A whole HTTP answer; header names in lower case."""

    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        """The error object, once it has been seen to be OpenAI's shape and the router's own."""
        assert self.any_error["src"] == "router", self
        return self.any_error

    @property
    def upstream_error(self) -> dict[str, Any]:
        """The same for one that the upstream worded: it must not claim to be ours."""
        assert "src" not in self.any_error, self
        return self.any_error

    @property
    def any_error(self) -> dict[str, Any]:
        assert self.headers["content-type"].startswith("application/json"), self
        assert b"Traceback" not in self.body
        error: dict[str, Any] = self.json()["error"]
        assert {"message", "type", "param", "code"} <= error.keys(), error
        return error


class Stream:
    """A streamed answer being read; `events` are the raw blocks between blank lines."""

    def __init__(self, connection: HTTPConnection, response: HTTPResponse) -> None:
        self._connection = connection
        self._response = response
        self._rest = b""
        self.status = response.status
        self.headers = {name.lower(): value for name, value in response.getheaders()}

    def read(self) -> bytes:
        return self._rest + self._response.read()

    def blocks(self) -> Iterator[bytes]:
        """Every event block with its blank line, as it arrives."""
        while piece := self._response.read1(65536):
            self._rest += piece
            while b"\n\n" in self._rest:
                block, _, self._rest = self._rest.partition(b"\n\n")
                yield block + b"\n\n"

    def next(self) -> bytes:
        return next(self.blocks())

    def close(self) -> None:
        self._response.close()
        self._connection.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class UnixConnection(HTTPConnection):
    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


@dataclass(frozen=True)
class Resources:
    """What a process holds. A pooled connection more or less is no leak."""

    threads: int
    fds: int
    close_wait: int

    def covers(self, later: Resources) -> bool:
        return later.threads <= self.threads + 1 and later.fds <= self.fds + 1 and later.close_wait == 0


class RouterProcess:
    """One `router.py serve` in its own folder, with an environment that has nothing in it."""

    def __init__(self, folder: Path, config: str, environment: dict[str, str] | None = None, **values: str) -> None:
        self.folder = folder
        self.log = folder / "requests.jsonl"
        self.config = folder / "config.toml"
        self.stdout = folder / "stdout.txt"
        self.stderr = folder / "stderr.txt"
        self.key = ""
        self.prefix = ""
        self.socket_path = ""
        self.traceback_expected = False
        self._values = {"log": str(self.log), "tmp": str(folder), **values}
        self._template = config
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(folder), **(environment or {})}
        self.port = 0
        self.child: subprocess.Popen[bytes] | None = None

    # --- its life

    def write_config(self, template: str | None = None, **values: str) -> None:
        self._template = template or self._template
        self._values |= values
        self.config.write_text(filled(self._template, {**self._values, "port": str(self.port)}), "utf-8")

    def launch(self) -> None:
        """Starts the process and does not wait for anything."""
        with self.stdout.open("ab") as out, self.stderr.open("ab") as err:
            self.child = subprocess.Popen(
                [sys.executable, str(ROOT / "router.py"), "serve", str(self.config)],
                cwd=self.folder,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    def start(self) -> RouterProcess:
        """Starts on a free port and waits until /health answers; another port if somebody was quicker."""
        for last_try in (False, False, True):
            self.port = free_port()
            self.write_config()
            self.launch()
            if until(self._up_or_dead, 10, "the router answers /health") == "up":
                return self
            code = self.exit_code()
            assert not last_try and code == 2, f"the router did not start but ended with {code}: {self.errors()}"
        raise AssertionError

    def _up_or_dead(self) -> str:
        assert self.child
        if self.child.poll() is not None:
            return "dead"
        with contextlib.suppress(OSError):
            if self.get("/health", timeout=2).status == 200 and self._is_mine():
                return "up"
        return ""

    def _is_mine(self) -> bool:
        """Whether it is this process that listens there, and not somebody who was quicker."""
        return bool(self.socket_path) or "LISTEN" in self.sockets()

    def signal(self, number: int) -> None:
        assert self.child
        self.child.send_signal(number)

    def stop(self, seconds: float = 15.0) -> int:
        """SIGTERM; the exit code."""
        self.signal(signal.SIGTERM)
        return self.exit_code(seconds)

    def exit_code(self, seconds: float = 15.0) -> int:
        assert self.child
        return self.child.wait(seconds)

    def kill(self) -> None:
        if self.child and self.child.poll() is None:
            self.child.kill()
            self.child.wait()

    @property
    def pid(self) -> int:
        assert self.child
        return self.child.pid

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}{self.prefix}"

    # --- talking to it

    def connection(self, timeout: float = 15.0) -> HTTPConnection:
        if self.socket_path:
            return UnixConnection(self.socket_path, timeout)
        return HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def request(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        timeout: float = 15.0,
    ) -> Answer:
        """One exchange on its own connection; a dict is sent as JSON, bytes as they are."""
        connection = self.connection(timeout)
        try:
            response = self._send(connection, method, path, body, headers)
            fields = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, fields, response.read())
        finally:
            connection.close()

    def get(self, path: str, headers: dict[str, str] | None = None, timeout: float = 15.0) -> Answer:
        return self.request("GET", path, None, headers, timeout)

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None, timeout: float = 15.0) -> Answer:
        return self.request("POST", path, body, headers, timeout)

    def chat(self, text: str = "hi", headers: dict[str, str] | None = None, timeout: float = 15.0, **more: Any) -> Answer:
        return self.post("/v1/chat/completions", chat_body(text, **more), headers, timeout)

    def stream(self, text: str = "hi", headers: dict[str, str] | None = None, timeout: float = 15.0, **more: Any) -> Stream:
        """A streamed chat, open until closed."""
        connection = self.connection(timeout)
        body = chat_body(text, stream=True, **more)
        try:
            return Stream(connection, self._send(connection, "POST", "/v1/chat/completions", body, headers))
        except BaseException:
            connection.close()
            raise

    def _send(
        self, connection: HTTPConnection, method: str, path: str, body: Any, headers: dict[str, str] | None
    ) -> HTTPResponse:
        fields = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        if isinstance(body, dict):
            body = json.dumps(body).encode()
            fields["Content-Type"] = "application/json"
        connection.request(method, self.prefix + path, body, {**fields, **(headers or {})})
        return connection.getresponse()

    def dial(self, timeout: float = 10.0) -> socket.socket:
        """A bare connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def raw(self, data: bytes, timeout: float = 10.0) -> bytes:
        """What comes back for these bytes, until the router closes or is silent for `timeout`."""
        with self.dial(timeout) as sock:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                sock.sendall(data)
            return read_all(sock)

    # --- what it leaves behind

    def lines(self) -> list[bytes]:
        """The complete lines of the log."""
        data = self.log.read_bytes() if self.log.exists() else b""
        return data.split(b"\n")[:-1]

    def records(self, count: int = 0, seconds: float = 10.0) -> list[dict[str, Any]]:
        """The log, once it has that many lines."""
        until(lambda: len(self.lines()) >= count, seconds, f"{count} lines in the log")
        return [json.loads(line) for line in self.lines()]

    def record(self) -> dict[str, Any]:
        """The only record there is: of a request that has ended, exactly one."""
        return self.settled(1)[0]

    def settled(self, count: int, seconds: float = 10.0) -> list[dict[str, Any]]:
        """Waits until nothing runs any more; then log and counters must both say `count`, line by line."""
        until(lambda: len(self.lines()) >= count and self.stats()["in_flight"] == 0, seconds, f"{count} requests ended")
        records, requests = self.records(), self.stats()["requests"]
        assert len(records) == count, [(record["outcome"], record["error"]) for record in records]
        assert requests["accepted"] == count, requests
        for outcome in ("ok", "error", "cancelled", "timeout", "rejected"):
            assert requests[outcome] == sum(record["outcome"] == outcome for record in records), requests
        return records

    def stats(self) -> dict[str, Any]:
        answer = self.get("/api/v1/stats")
        assert answer.status == 200, answer
        stats: dict[str, Any] = answer.json()
        return stats

    def errors(self) -> str:
        return self.stderr.read_text("utf-8", "replace")

    def output(self) -> str:
        return self.stdout.read_text("utf-8", "replace") + self.errors()

    def threads(self) -> int:
        status = Path(f"/proc/{self.pid}/status").read_text("ascii", "replace")
        return int(next(line for line in status.splitlines() if line.startswith("Threads:")).split()[1])

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))  # noqa: PTH208 - a count, not paths

    def sockets(self) -> dict[str, int]:
        """Its TCP sockets, counted by state ("ESTABLISHED", "CLOSE_WAIT", ...)."""
        mine = set()
        for link in Path(f"/proc/{self.pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                mine.add(str(link.readlink()))
        counts: dict[str, int] = {}
        for line in Path("/proc/net/tcp").read_text("ascii").splitlines()[1:]:
            columns = line.split()
            if f"socket:[{columns[9]}]" in mine:
                state = TCP_STATES.get(columns[3], columns[3])
                counts[state] = counts.get(state, 0) + 1
        return counts

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.pid}/status").read_text("ascii", "replace")
        return int(next(line for line in status.splitlines() if line.startswith("VmRSS:")).split()[1]) * 1024

    def resources(self) -> Resources:
        return Resources(self.threads(), self.fds(), self.sockets().get("CLOSE_WAIT", 0))

    def comes_back_to(self, before: Resources, seconds: float = 10.0) -> None:
        """No thread, file or socket is left behind."""
        deadline = time.monotonic() + seconds
        while not before.covers(now := self.resources()):
            assert time.monotonic() < deadline, f"left behind: {before} became {now}, sockets {self.sockets()}"
            time.sleep(0.05)

    def check_cleanliness(self) -> None:
        """What must hold after every test: no traceback, no key anywhere, no prompt where it does not belong."""
        said = self.output()
        if not self.traceback_expected:
            assert "Traceback" not in said, said[-4000:]
        assert SECRET_PROMPT not in said, "the prompt was printed"
        logged = self.log.read_text("utf-8", "replace") if self.log.is_file() else ""
        for secret in (PROVIDER_KEY, INBOUND_KEY):
            assert secret not in said, "a key was printed"
            assert secret not in logged, "a key was logged"


TCP_STATES = {"01": "ESTABLISHED", "06": "TIME_WAIT", "08": "CLOSE_WAIT", "0A": "LISTEN"}


def filled(template: str, values: dict[str, str]) -> str:
    """The template with its placeholders replaced, including those inside replacements; unknown ones become empty."""
    for _ in range(3):
        for name, value in values.items():
            template = template.replace("{" + name + "}", value)
    for name in ("server", "logging", "provider", "providers", "rules"):
        template = template.replace("{" + name + "}", "")
    return template


def read_all(sock: socket.socket) -> bytes:
    """Until the other side closes or is silent for the socket's timeout."""
    data = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        while piece := sock.recv(65536):
            data += piece
    return data


def statuses(data: bytes) -> list[int]:
    """The status codes of the HTTP answers in these bytes."""
    return [int(part[:3]) for part in data.replace(b"HTTP/1.0 ", b"HTTP/1.1 ").split(b"HTTP/1.1 ")[1:]]
