"""Broadcast under a steady load: three real Collectors behind the whole server, one well, one down for a minute, one hanging.

    python tests/broadcast_load.py [--rate 100] [--seconds 10] [--down 60]

Every second request goes to a second router, alike but without Broadcast, so that both latencies are measured in the same
moments of the same machine. After the one that was down has returned, the load comes once more. What must hold is checked:
every answered request reached the Collector that was well at once and the one that was down after it came back, each under the
id its client was told, in order; the queue of the one that hangs stays within its limit and every record that it lost is
counted; `accepted = delivered + dropped + queued` at every look; a stop is not held up by the one that hangs. Latencies go
into no check: they depend on the machine. Exit code 1 if something is not as it should be, 2 without a Collector (make
backends).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from backends import Collector, collector
from router_process import RouterProcess, until

ROUTER = """
[server]
port = {port}

[[providers]]
name = "echo"
format = "echo"

[[routers]]
type = "fallback"
{broadcast}
"""
BROADCAST = """
[broadcast]
enabled = true
database = "{tmp}/broadcast.db"
"""
DESTINATION = """
[[broadcast.destinations]]
name = "%s"
type = "otel-collector"
endpoint = "%s/v1/traces"
"""
NAMES = ("well", "down", "hanging")


class Client:
    """One keep-alive connection to a router; what it was told and how long that took."""

    def __init__(self, process: RouterProcess) -> None:
        self._connection = HTTPConnection("127.0.0.1", process.port, timeout=20)
        self.generations: list[str] = []
        self.milliseconds: list[float] = []

    def ask(self, number: int) -> None:
        """Every second answer is streamed; all of it is read."""
        body = {"model": "echo", "messages": [{"role": "user", "content": f"request {number} " + "and more words " * 20}]}
        body |= {"stream": bool(number % 2), "session_id": f"session {number % 7}", "trace": {"number": number}}
        began = time.perf_counter()
        self._connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = self._connection.getresponse()
        response.read()
        self.milliseconds.append((time.perf_counter() - began) * 1000)
        assert response.status == 200
        self.generations.append(response.headers["X-Generation-Id"])


class Looks(threading.Thread):
    """Looks at the counters ten times a second: the equation must hold each time, and the deepest queues are kept."""

    def __init__(self, process: RouterProcess) -> None:
        super().__init__(daemon=True)
        self._process, self.ending = process, threading.Event()
        self.deepest = dict.fromkeys(NAMES, 0)
        self.looks = 0
        self.wrong: list[str] = []

    def run(self) -> None:
        while not self.ending.wait(0.1):
            self.looks += 1
            for name, have in counters(self._process).items():
                self.deepest[name] = max(self.deepest[name], have["queued"])
                if have["accepted"] != have["delivered"] + sum(have["dropped"].values()) + have["queued"]:
                    self.wrong.append(f"the equation does not hold for {name}: {have}")


def counters(process: RouterProcess) -> dict[str, Any]:
    made: dict[str, Any] = process.stats()["broadcast"]["destinations"]
    return made


def arrived(backend: Collector) -> list[str]:
    """The generation ids in the order of arrival, each once."""
    spans = (span["attributes"] for span in backend.spans() if span["name"] == "LLM Generation")
    return list(dict.fromkeys(attributes["gen_ai.response.id"] for attributes in spans))


def offer(clients: list[Client], rate: float, seconds: float) -> None:
    """By the clock; the clients take turns in going first."""
    began = time.monotonic()
    for number in range(int(rate * seconds)):
        time.sleep(max(0.0, began + number / rate - time.monotonic()))
        for client in clients if number % 4 < 2 else reversed(clients):
            client.ask(number)


def tell_latencies(clients: dict[str, Client], skip: int) -> None:
    for name, client in clients.items():
        ms = sorted(client.milliseconds[skip:])
        shares = {f"p{share}": ms[min(len(ms) - 1, len(ms) * share // 100)] for share in (50, 90, 99)}
        print(f"{name:15}" + "   ".join(f"{label} {value:6.2f} ms" for label, value in shares.items()))


def check(told: list[str], backends: dict[str, Collector], hanging: dict[str, Any], most: int) -> Iterator[str]:
    for name in ("well", "down"):
        if arrived(backends[name]) != told:
            yield f"{name} did not get every request in order: {len(arrived(backends[name]))} of {len(told)}"
    over = len(told) - hanging["delivered"] - most
    if (hanging["accepted"], hanging["queued"], hanging["dropped"]) != (len(told), most, {"queue_full": over}):
        yield f"hanging: {hanging}"


class Stage:
    """Three Collectors and two routers, one with Broadcast and one without."""

    def __init__(self, stack: ExitStack, most: int) -> None:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.backends = {name: stack.enter_context(collector(folder)) for name in NAMES}
        destinations = "".join(DESTINATION % (name, backend.endpoint) for name, backend in self.backends.items())
        broadcast = BROADCAST + f"queue_max_items = {most}\n" + destinations
        routers = []
        for name, text in (("with", broadcast), ("without", "")):
            (folder / name).mkdir()
            routers.append(RouterProcess(folder / name, ROUTER, broadcast=text))
            stack.callback(routers[-1].kill)
            routers[-1].start()
        self.router = routers[0]
        self.clients = {"with Broadcast": Client(routers[0]), "without": Client(routers[1])}
        self.told = self.clients["with Broadcast"].generations

    def offer(self, rate: float, seconds: float) -> None:
        offer(list(self.clients.values()), rate, seconds)

    def wait(self, name: str, seconds: float) -> float:
        """Until everything has been delivered there; how long that took."""
        began = time.monotonic()
        until(lambda: counters(self.router)[name]["delivered"] == len(self.told), seconds, f"everything arrived at {name}")
        return time.monotonic() - began


def run(rate: float, seconds: float, down: float) -> Iterator[str]:
    """Do it all; gives what was not as it should be."""
    most = int(rate * (seconds + 2))
    with ExitStack() as stack:
        stage = Stage(stack, most)
        stage.offer(rate, 1)  # warm, and seen by all three
        warm = len(stage.told)
        for name in NAMES:
            stage.wait(name, 10)
        stage.backends["down"].stop()
        stage.backends["hanging"].pause()
        gone = time.monotonic()
        looks = Looks(stage.router)
        stack.callback(looks.ending.set)
        looks.start()
        stage.offer(rate, seconds)
        print(f"well: everything there {stage.wait('well', 10):.2f} s after the last answer, at most", end=" ")
        print(f"{looks.deepest['well']} waited at once")
        time.sleep(max(0.0, gone + down - time.monotonic()))
        print(f"down: for {time.monotonic() - gone:.0f} s, {looks.deepest['down']} waited, everything there", end=" ")
        stage.backends["down"].start()
        print(f"{stage.wait('down', 90):.1f} s after it listened again")
        stage.offer(rate, seconds)
        for name in ("well", "down"):
            stage.wait(name, 10)
        looks.ending.set()
        looks.join()
        hanging = counters(stage.router)["hanging"]
        print("hanging:", {key: hanging[key] for key in ("accepted", "delivered", "dropped", "queued")})
        print(f"{looks.looks} looks at the counters, {len(looks.wrong)} at which the equation did not hold")
        tell_latencies(stage.clients, warm)
        yield from looks.wrong[:5]
        yield from check(stage.told, stage.backends, hanging, most)
        began = time.monotonic()
        code = stage.router.stop()
        print(f"stopped in {time.monotonic() - began:.2f} s while one of them hangs")
        if code or time.monotonic() - began > 5:
            yield f"stopping took {time.monotonic() - began:.1f} s, exit code {code}"
        stage.router.check_cleanliness()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rate", type=float, default=100.0, help="requests per second, to each of the two routers")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--down", type=float, default=60.0, help="seconds that one of the destinations is down")
    args = parser.parse_args()
    if reason := collector.available():
        print(reason)
        return 2
    wrong = list(run(args.rate, args.seconds, args.down))
    print("\n".join(f"WRONG: {line}" for line in wrong) or "all as it should be")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
