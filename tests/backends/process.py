"""A backend as a child process: started on free loopback ports, waited for, stopped with all its children.

Between choosing a port and the child binding it another process may take it; the child then exits, and the start is
tried again with other ports. Everything a backend writes lies in its own directory under the test's tmp_path.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self, TypeVar

import urllib3

ROOT = Path(__file__).resolve().parents[2]
TRIES = 3
T = TypeVar("T")


def installed() -> Path:
    """Where install.sh put the backends."""
    return Path(os.environ.get("BACKENDS_DIR") or ROOT / ".backends")


def reason_without(name: str) -> str | None:
    """Why the backend cannot be used, None when it can: its stamp is written last, so a half installed one has none."""
    if (installed() / f"{name}.stamp").is_file():
        return None
    return f"{name} is not installed (tests/backends/install.sh)"


def reason_without_program(name: str) -> str | None:
    return None if program(name) else f"{name} is not installed"


def program(name: str) -> str | None:
    """The full path of a program; daemons live in /usr/sbin, which is not on everybody's PATH."""
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin"]))


def until(probe: Callable[[], T], timeout: float, what: Callable[[], str]) -> T:
    """The first true value of probe(); AssertionError naming what() after that many seconds."""
    deadline = time.monotonic() + timeout
    while not (found := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"nothing after {timeout} s: {what()}")
        time.sleep(0.02)
    return found


class Backend(ABC):
    """Entered it runs, left it is gone. A backend adds its command line and what tells that it is up."""

    name: ClassVar[str]
    ports_needed: ClassVar[int] = 1
    start_timeout: ClassVar[float] = 30

    def __init__(self, tmp_path: Path) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=tmp_path))
        self.log = self.directory / "output.log"
        self.ports: list[int] = []
        self._child: subprocess.Popen[bytes] | None = None

    @classmethod
    def available(cls) -> str | None:
        """None, or the reason why a test must be skipped."""
        return reason_without(cls.name)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.ports[0]}"

    @property
    def pid(self) -> int:
        assert self._child, f"{self.name} is not running"
        return self._child.pid

    def log_text(self) -> str:
        return self.log.read_text("utf-8", "replace")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        """Runs it until it answers. After stop() it comes back on the same ports, with what it had written."""
        again = bool(self.ports)
        for _ in range(TRIES):
            if not again:
                self.ports = free_ports(self.ports_needed)
            if self._launch():
                return
        raise AssertionError(f"{self.name} ended at once: {self.log_text()[-4000:]}")

    def stop(self, timeout: float = 10) -> None:
        """Ends it and every process it started; asks first, so that what it holds is on disk when this returns."""
        if not self._child:
            return
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._child.wait(timeout)
        self._signal(signal.SIGKILL)
        self._child.wait()
        self._child = None

    def pause(self) -> None:
        """A backend that hangs: the kernel still accepts connections, nobody answers them."""
        self._signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED)  # the signal returns before the last thread stands still

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    @abstractmethod
    def command(self) -> list[str]:
        """The command line, whose configuration is written into the directory here, now that the ports are known."""

    def environment(self) -> dict[str, str]:
        return {**os.environ, "TMPDIR": str(self.directory)}

    def ready(self) -> bool:
        """Whether it can be used; asked again and again after the start."""
        return accepts(self.ports[0])

    def _launch(self) -> bool:
        """False when it ended before it was ready, as it does when one of its ports is taken."""
        with self.log.open("ab") as log:
            child = self._child = subprocess.Popen(
                self.command(),
                cwd=self.directory,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            until(lambda: child.poll() is not None or self.ready(), self.start_timeout, self.log_text)
        except BaseException:
            self.stop()
            raise
        if child.poll() is None:
            return True
        self.stop()
        return False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def get_json(url: str, timeout: float = 10) -> Any:
    """The JSON at the address, None for a 404; AssertionError for any other answer but 200."""
    with urllib3.PoolManager(retries=False, timeout=timeout) as pool:
        answer = pool.request("GET", url, redirect=False)
        if answer.status == 404:
            return None
        assert answer.status == 200, f"{url}: {answer.status} {answer.data[:500]!r}"
        return answer.json()


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def answers(url: str) -> bool:
    """Whether the address answers 200."""
    with urllib3.PoolManager(retries=False, timeout=1) as pool:
        try:
            return pool.request("GET", url, redirect=False).status == 200
        except urllib3.exceptions.HTTPError:
            return False


def free_ports(count: int) -> list[int]:
    """Free ones below the range from which the kernel takes the ports of clients and of servers that ask for any."""
    found: set[int] = set()
    while len(found) < count:
        port = random.SystemRandom().randrange(20000, 32000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            found.add(port)
    return list(found)
