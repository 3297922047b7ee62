"""A provider killed in the middle of a steady load, and back again: what the clients, the records and the providers say.

    python tests/failover_load.py [--rate 50] [--seconds 12]

Two providers run as processes of their own and write down every request they receive, before they answer it. The better one
is killed (SIGKILL) after a quarter of the time and started again after the half. Every request carries its own `user`, so
that each provider's list can be compared with the records one by one. Not a test of the suite: run it by hand and read.
Exit code 1 if a client saw an error before its first byte, if a count differs, or if the breaker did not open and close.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from fake_upstream import chat_completion, framed, openai_chunks
from router_process import RouterProcess, chat_body, free_port, until

USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
GAP = 0.02
"""Seconds between the words of a stream; a whole answer takes as long as a stream."""
CONFIG = """
[server]
port = {port}
threads = 128

[logging]
enabled = true
path = "{log}"

[retry]
attempts = 3

[breaker]
failures = 5
cooldown_seconds = 1

[[providers]]
name = "better"
format = "openai"
base_url = "http://127.0.0.1:{better}/v1"
quality = 9

[[providers]]
name = "other"
format = "openai"
base_url = "http://127.0.0.1:{other}/v1"

[[routers]]
type = "fallback"
"""


# --- a provider, in its own process


class Provider(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    log_file = -1

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        os.write(self.log_file, f"{asked['user']}\n".encode())
        words = openai_chunks("one two three four", USAGE)
        if not asked.get("stream"):
            time.sleep(GAP * len(words))
            return self._send("application/json", [json.dumps(chat_completion("one two three four", USAGE)).encode()], 0)
        return self._send("text/event-stream", words, GAP)

    def _send(self, kind: str, pieces: list[bytes], gap: float) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in pieces:
            self.wfile.write(framed(piece))
            time.sleep(gap)
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 256
    daemon_threads = True


def provide(port: int, log: str) -> None:
    Provider.log_file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    Server(("127.0.0.1", port), Provider).serve_forever()


class Child:
    """A provider that can be killed and started again on its port; what it received outlives it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.port, self.log = name, free_port(), folder / f"{name}.received"
        self.start()

    def start(self) -> None:
        command = [sys.executable, __file__, "--provide", str(self.port), str(self.log)]
        self.process = subprocess.Popen(command)
        until(self._listens, 20, f"{self.name} listens")

    def _listens(self) -> bool:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=1)
        try:
            connection.connect()
        except OSError:
            return False
        finally:
            connection.close()
        return True

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def received(self) -> Counter[str]:
        return Counter(self.log.read_text("ascii").split())


# --- the clients


def ask(process: RouterProcess, number: int) -> tuple[str, str]:
    """(how it went, in detail): `ok`, `broken` after the first byte, `error` before it."""
    connection = process.connection(30)
    body = chat_body(user=f"u{number}", stream=bool(number % 2))
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = response.read()
    except (OSError, HTTPException) as failed:
        return "error", type(failed).__name__
    finally:
        connection.close()
    if response.status != 200:
        return "error", f"{response.status} {data[:120]!r}"
    whole = data.endswith(b"data: [DONE]\n\n") if body["stream"] else b'"one two three four"' in data
    return ("ok", "") if whole else ("broken", data.decode("utf-8", "replace").strip().split("\n")[-1][:160])


class Watcher(threading.Thread):
    """Looks at the breaker 20 times a second and notes every change."""

    def __init__(self, process: RouterProcess, began: float) -> None:
        super().__init__(daemon=True)
        self.changes: list[tuple[float, str]] = []
        self.stopping = threading.Event()
        self._process, self._began = process, began

    def run(self) -> None:
        while not self.stopping.wait(0.05):
            state = self._process.stats()["providers"]["better"]["breaker"]
            if not self.changes or self.changes[-1][1] != state:
                self.changes.append((time.monotonic() - self._began, state))


def load(process: RouterProcess, better: Child, rate: float, seconds: float) -> tuple[list[tuple[str, str]], Watcher]:
    """The requests go out by the clock, whether the earlier ones are answered or not."""
    began = time.monotonic()
    watcher = Watcher(process, began)
    watcher.start()
    deeds = [(seconds / 4, better.kill, "killed"), (seconds / 2, better.start, "started again")]
    total = int(rate * seconds)

    def disturb() -> None:
        for at, deed, name in deeds:
            time.sleep(max(0.0, began + at - time.monotonic()))
            deed()
            print(f"{time.monotonic() - began:6.2f} s  better is {name}")

    with ThreadPoolExecutor(128) as pool:
        disturbing = pool.submit(disturb)
        asked = []
        for number in range(total):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            asked.append(pool.submit(ask, process, number))
        results = [one.result() for one in asked]
        disturbing.result()
    until(lambda: watcher.changes[-1][1] == "closed", 10, "the breaker is closed at the end")
    watcher.stopping.set()
    watcher.join()
    return results, watcher


# --- what came of it


def compare(records: list[dict[str, Any]], children: list[Child]) -> list[str]:
    """Where a provider's own list and the records disagree.

    An attempt that has a status was received exactly once, one that was refused never; one whose connection was lost without
    an answer may have been received - the killed provider may have died with it unread.
    """
    wrong: list[str] = []
    for child in children:
        received = child.received()
        surely, perhaps = Counter[str](), Counter[str]()
        for record in records:
            for attempt in record["attempts"]:
                if attempt["provider"] == child.name and attempt["error_type"] != "connection_refused":
                    (perhaps if attempt["status"] is None else surely)[record["user"]] += 1
        for user in received.keys() | surely.keys() | perhaps.keys():
            if not surely[user] <= received[user] <= surely[user] + perhaps[user]:
                wrong.append(
                    f"{child.name} received {user} {received[user]} times; records: {surely[user]} + {perhaps[user]} lost"
                )
        told = f"{sum(surely.values())} attempts with a status, {sum(perhaps.values())} lost without one"
        print(f"{child.name}: received {sum(received.values())}; the records have {told}")
        repeated = [user for user, count in received.items() if count > 1]
        if repeated:
            wrong.append(f"{child.name} was asked twice for {repeated[:5]}")
    return wrong


def report(results: list[tuple[str, str]], watcher: Watcher, records: list[dict[str, Any]], children: list[Child]) -> list[str]:
    outcomes = Counter(kind for kind, _ in results)
    print(f"clients: {outcomes['ok']} ok, {outcomes['error']} errors before the first byte, {outcomes['broken']} broken after it")
    for detail, count in Counter(detail for kind, detail in results if kind != "ok").most_common(5):
        print(f"    {count} x {detail}")
    print("records:", dict(Counter(record["outcome"] for record in records)))
    print("attempts per record:", dict(sorted(Counter(len(record["attempts"]) for record in records).items())))
    over = [record for record in records if len(record["attempts"]) > 1]
    for (first, second), count in Counter(map(_pair, over)).most_common(6):
        print(f"    {count} x {first}, then {second}")
    print("breaker of better:", ", ".join(f"{state} at {at:.2f} s" for at, state in watcher.changes))
    wrong = compare(records, children)
    states = [state for _, state in watcher.changes]
    if outcomes["error"]:
        wrong.append("a client saw an error before its first byte")
    if len(records) != len(results):
        wrong.append(f"{len(records)} records of {len(results)} requests")
    if not over or not all(pair[0].startswith("better") and pair[1] == "other 200" for pair in map(_pair, over)):
        wrong.append("a failed-over record does not show both attempts")
    if states[0] != "closed" or "open" not in states or states[-1] != "closed":
        wrong.append("the breaker did not open and close again")
    if sum(record["outcome"] != "ok" for record in records) != outcomes["broken"] + outcomes["error"]:
        wrong.append("outcomes differ from what the clients saw")
    return wrong


def _pair(record: dict[str, Any]) -> tuple[str, str]:
    said = [f"{a['provider']} {a['error_type'] or a['status']}" for a in record["attempts"]]
    return said[0], " then ".join(said[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rate", type=float, default=50.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=12.0)
    parser.add_argument("--provide", nargs=2, metavar=("PORT", "LOG"), help=argparse.SUPPRESS)
    told = parser.parse_args()
    if told.provide:
        provide(int(told.provide[0]), told.provide[1])
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        children = [Child("better", folder), Child("other", folder)]
        process = RouterProcess(folder, CONFIG, better=str(children[0].port), other=str(children[1].port))
        try:
            process.start()
            results, watcher = load(process, children[0], told.rate, told.seconds)
            wrong = report(results, watcher, process.settled(len(results)), children)
            assert process.stop() == 0
            process.check_cleanliness()
        finally:
            process.kill()
            for child in children:
                child.kill()
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
