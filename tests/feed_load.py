"""Does watching cost anything? `python tests/feed_load.py` sends 200 requests a second to a router, first with nobody
watching, then with five watchers, one of them slow, and says what clients and watchers saw.

Numbers go into no assertion: they depend on the machine. What must hold is checked: nobody missed an event without being
told, and the slow watcher was dropped without harm.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import threading
import time
from http.client import HTTPConnection, HTTPException
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from router_process import RouterProcess, until  # noqa: E402

CONFIG = """
[server]
port = {port}
dashboard = {dashboard}

[[providers]]
name = "echo"
format = "echo"

[[routers]]
type = "fallback"
"""
BODY = json.dumps(
    {"model": "echo", "messages": [{"role": "user", "content": "one two three four five six seven " * 20}]}
).encode()


class Clients:
    """Requests at a fixed rate, spread over keep-alive connections; each waits its turn, so that a slow answer delays none."""

    def __init__(self, port: int, rate: float, seconds: float, connections: int = 8) -> None:
        self.latencies: list[float] = []
        self.failed = 0
        self._port, self._count, self._gap = port, int(rate * seconds), 1 / rate
        self._lock = threading.Lock()
        self._next = 0
        self._threads = [threading.Thread(target=self._send) for _ in range(connections)]

    def run(self) -> float:
        self._began = time.monotonic() + 0.2
        for thread in self._threads:
            thread.start()
        for thread in self._threads:
            thread.join()
        return self._count / (time.monotonic() - self._began)

    def _send(self) -> None:
        connection = HTTPConnection("127.0.0.1", self._port, timeout=20)
        while True:
            with self._lock:
                number, self._next = self._next, self._next + 1
            if number >= self._count:
                break
            due = self._began + number * self._gap
            time.sleep(max(0.0, due - time.monotonic()))
            began = time.monotonic()
            connection.request("POST", "/v1/chat/completions", BODY, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            self.latencies.append(1000 * (time.monotonic() - began))
            self.failed += answer.status != 200
        connection.close()


class Watching(threading.Thread):
    """One watcher, as the page is one; a slow one reads 20 kB and then rests."""

    def __init__(self, port: int, slow: bool = False) -> None:
        super().__init__(daemon=True)
        self.slow = slow
        self.finished = self.skipped = self.bytes = 0
        self._connection = HTTPConnection("127.0.0.1", port, timeout=30)
        self._connection.request("GET", "/dashboard/events")
        self._answer = self._connection.getresponse()
        assert self._answer.status == 200

    def run(self) -> None:
        rest = b""
        try:
            while piece := self._answer.read1(20_000 if self.slow else 1 << 20):
                self.bytes += len(piece)
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._hear(line)
                if self.slow:
                    time.sleep(0.5)
        except (OSError, HTTPException):
            return  # the router was stopped, or cut it because it read too slowly

    def _hear(self, line: bytes) -> None:
        if line.startswith(b'data: {"type":"complete"'):
            self.finished += 1
        elif line.startswith(b'data: {"type":"skipped"'):
            self.skipped += int(json.loads(line[6:])["count"])


def one_run(rate: float, seconds: float, watchers: int, slow: int, dashboard: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        router = RouterProcess(Path(folder), CONFIG, dashboard=str(dashboard).lower()).start()
        try:
            Clients(router.port, 50, 1).run()  # warm
            watching = [Watching(router.port, slow=i < slow) for i in range(watchers)]
            for watcher in watching:
                watcher.start()
            clients = Clients(router.port, rate, seconds)
            cpu = processor_seconds(router)
            reached = clients.run()
            cpu = processor_seconds(router) - cpu
            count = len(clients.latencies)
            quick = [w for w in watching if not w.slow]
            if quick:
                until(lambda: all(w.finished + w.skipped >= count for w in quick), 5, "the watchers have caught up")
            tell(dashboard, watching, clients, reached, cpu / count, router)
            assert clients.failed == 0
            for watcher in quick:
                assert watcher.finished == count or watcher.skipped > 0
        finally:
            router.kill()


def tell(dashboard: bool, watching: list[Watching], clients: Clients, reached: float, cpu: float, router: RouterProcess) -> None:
    ms = sorted(clients.latencies)
    p50, p95, p99 = (ms[min(len(ms) - 1, int(share * len(ms)))] for share in (0.5, 0.95, 0.99))
    name = f"{len(watching)} watchers" if dashboard else "no dashboard"
    print(
        f"{name:14} {reached:6.1f} requests/s   p50 {p50:6.2f} ms   p95 {p95:6.2f} ms   p99 {p99:6.2f} ms   "
        f"mean {statistics.mean(ms):6.2f} ms   processor {1000 * cpu:.2f} ms/request"
    )
    for number, watcher in enumerate(watching):
        kind = "slow " if watcher.slow else ""
        print(f"    {kind}watcher {number}: {watcher.finished} finished, {watcher.skipped} skipped, {watcher.bytes / 1e6:.1f} MB")
    if watching:
        print(f"    feed: {router.stats()['feed']}")


def processor_seconds(router: RouterProcess) -> float:
    fields = Path(f"/proc/{router.pid}/stat").read_text("ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=200)
    parser.add_argument("--seconds", type=float, default=10)
    args = parser.parse_args()
    one_run(args.rate, args.seconds, 0, 0, dashboard=False)
    one_run(args.rate, args.seconds, 0, 0, dashboard=True)
    one_run(args.rate, args.seconds, 5, 0, dashboard=True)
    one_run(args.rate, args.seconds, 5, 1, dashboard=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
