"""The pictures of the README: `make screenshots` writes docs/*.png.

A real router serves the page to a real browser; what is seen in it is made up here, from one seed and for one moment, so that
the pictures only change when the page does. Needs Chromium and Playwright; `--check` also runs axe-core over every picture
(npm install --prefix .backends/npm axe-core).
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import dashboard_browser  # noqa: E402
from telemetry_records import a_record, a_response, an_attempt  # noqa: E402

NOW = 1_789_999_200.0  # a Monday afternoon, 14:00 UTC
CONFIG = """
[server]
dashboard = true
trace_url = "http://jaeger.internal:16686/trace/{trace_id}"

[broadcast]
database = "FOLDER/broadcast.db"

[breaker]
failures = 3

[[providers]]
name = "ollama"
format = "echo"
models = ["llama3.2:3b", "qwen2.5-coder:7b"]

[[providers]]
name = "anthropic"
format = "echo"
models = ["claude-sonnet-4-5"]

[[providers]]
name = "openai"
format = "echo"
models = ["gpt-5-mini"]

[[providers]]
name = "vllm-lab"
format = "openai"
base_url = "http://127.0.0.1:9/v1"
models = ["mistral-small"]

[[routers]]
name = "lab"
type = "prefix"
model_prefix = "mistral"
provider = "vllm-lab"
"""

# provider, model, vendor, share of the traffic, first token ms, ms per token, USD per 1M tokens in and out
MODELS = [
    ("ollama", "llama3.2:3b", "ollama", 0.42, 190, 14, 0.0, 0.0),
    ("anthropic", "claude-sonnet-4-5", "anthropic", 0.26, 620, 17, 3.0, 15.0),
    ("openai", "gpt-5-mini", "openai", 0.2, 410, 9, 0.25, 2.0),
    ("ollama", "qwen2.5-coder:7b", "ollama", 0.12, 340, 26, 0.0, 0.0),
]
TALK = [
    ("Summarise this incident report in three sentences.", "Between 09:12 and 09:40 the payment queue stopped draining."),
    ("Write a Python function that merges two sorted lists.", "def merge(a, b):\n    ..."),
    ("Translate to German: the delivery is delayed until Thursday.", "Die Lieferung verzögert sich bis Donnerstag."),
    ("Classify this ticket: 'cannot log in since the update'.", "authentication"),
    ("What changed between these two contracts?", "Three clauses differ: the notice period, the liability cap and the venue."),
    ("Give me five names for an internal metrics dashboard.", "Lighthouse, Pulse, Ledger, Northstar, Lookout."),
    ("Explain the difference between a mutex and a semaphore.", "A mutex admits one holder, a semaphore a number of them."),
    ("Extract all dates from the text as JSON.", '{"dates": ["2026-03-01", "2026-04-15"]}'),
]
RULES = [("by-price", "cheapest that can"), ("code", "tag code"), ("default", "best score")]


class Stage:
    """The router with its made-up past."""

    def __init__(self, folder: Path) -> None:
        import router

        place = folder / "config.toml"
        place.write_text(CONFIG.replace("FOLDER", str(folder)), "utf-8")
        self.app = router.create_app(str(place))
        self.page = self.app.dashboard
        self.random = random.Random(20)
        self.clock = NOW - 300
        self.page._series._clock = lambda: self.clock
        self.page._series._started = NOW - 7200

    def play(self) -> None:
        """Five minutes of traffic, then what is in flight."""
        for number, moment in enumerate(sorted(self.random.uniform(-300, -0.2) for _ in range(460)), 1):
            self.clock = NOW + moment
            self.page.sink(self._request(number))
        self.clock = NOW - 0.1
        self.page.sink(self.hero(461))
        for id, (model, provider, ago) in enumerate([("gpt-5-mini", "openai", 0.4), ("llama3.2:3b", "ollama", 2.9)], 462):
            at = int((NOW - ago) * 1000)
            self.page.sink({"type": "start", "id": id, "ts_ms": at, "model": model, "in_flight": 2})
            self.page.sink({"type": "classified", "id": id, "ts_ms": at, "tags": []})
            if provider == "ollama":
                self.page.sink({"type": "routed", "id": id, "ts_ms": at, "provider": provider, "model": model})
        self.clock = NOW
        self.app.pipeline.in_flight = 2

    def rest(self, provider: str) -> None:
        """Let a provider fail until it rests."""
        from conftest import App

        body = json.dumps({"model": "mistral-small", "messages": [{"role": "user", "content": "hi"}]}).encode()
        sinks, self.app.pipeline.sinks[:] = list(self.app.pipeline.sinks), []
        for _ in range(3):
            App(self.app).call("POST", "/v1/chat/completions", body)
        self.app.pipeline.sinks[:] = sinks

    def _request(self, number: int) -> dict[str, Any]:
        draw = self.random
        provider, model, vendor, _, first, pace, price_in, price_out = draw.choices(MODELS, [m[3] for m in MODELS])[0]
        outcome = draw.choices(["ok", "error", "cancelled", "timeout"], [0.955, 0.02, 0.015, 0.01])[0]
        ttft = first * draw.lognormvariate(0, 0.25)
        out = int(draw.lognormvariate(4, 0.7))
        duration = 5000.0 if outcome == "timeout" else ttft + out * pace * draw.uniform(0.8, 1.3)
        asked, said = TALK[number % len(TALK)]
        said_in = draw.randrange(40, 1800)
        usage = self._usage(said_in, out)
        rule, reason = draw.choice(RULES)
        cost = self._cost(said_in, out, price_in, price_out)
        return self._record(
            number, provider, model, vendor, outcome=outcome, duration_ms=round(duration, 1), ttft_ms=round(ttft, 1),
            opened_ms=round(ttft, 1), rule=rule, reason=reason, cost=cost, tags=["code"] if "Python" in asked else [],
            messages=[{"role": "user", "content": [{"type": "text", "text": asked}]}],
            response=a_response(content=said, model=model, usage=usage) if outcome == "ok" else None,
        )  # fmt: skip

    def _record(self, number: int, provider: str, model: str, vendor: str, **more: Any) -> dict[str, Any]:
        at = self.clock - more["duration_ms"] / 1000
        letters = "".join(self.random.choices("abcdefghjkmnpqrstuvwxyzABCDEFGHJKLMNPQRSTUVWXYZ23456789", k=20))
        failed = more["outcome"] != "ok"
        status = {"ok": 200, "error": 502, "timeout": 504, "cancelled": 200}[more["outcome"]]
        told = {"error": "the provider failed (503)", "timeout": "no first byte within 5 s", "cancelled": "client_disconnected"}
        attempt = an_attempt(
            provider=provider, model=model, vendor=vendor, duration_ms=more["duration_ms"] - 1.9, kind="openai_stream",
            first_token_ms=more["ttft_ms"] - 1.5, headers_ms=more["ttft_ms"] - 4, status=None if failed else 200,
        )  # fmt: skip
        return a_record(**{
            "id": number, "ts_ms": int(at * 1000), "ts_ns": int(at * 1e9), "generation_id": f"gen-{int(at)}-{letters}",
            "trace_id": f"{self.random.getrandbits(128):032x}", "provider": provider, "provider_format": vendor, "vendor": vendor,
            "requested_model": model, "sent_model": model, "stream": True, "status": status, "overhead_ms": 0.4,
            "error": told.get(more["outcome"]), "error_type": "upstream_error" if failed else None, "attempts": [attempt],
            "api_key_name": "web-shop", "user": "user-7", "session_id": "checkout-831", "client_address": "10.0.4.17",
            "server_address": "10.0.7.2", "server_port": 11434, **more,
        })  # fmt: skip

    def _usage(self, told: int, said: int) -> dict[str, int]:
        return {
            "input_tokens": told, "output_tokens": said, "cached_input_tokens": 0, "cache_write_input_tokens": 0,
            "reasoning_tokens": 0,
        }  # fmt: skip

    def _cost(self, told: int, said: int, price_in: float, price_out: float) -> dict[str, Any]:
        costs = {"input": told * price_in / 1e6, "output": said * price_out / 1e6}
        prices = {"input_unit_price": price_in / 1e6, "output_unit_price": price_out / 1e6, "source": "configured"}
        return {**costs, "total": sum(costs.values()), **prices}

    def hero(self, number: int) -> dict[str, Any]:
        """A request whose first provider failed and whose second had to load its model."""
        refused = an_attempt(
            provider="openai", model="gpt-5-mini", vendor="openai", status=503, error="the provider failed (503)",
            error_type="upstream_503", start_ms=1.2, duration_ms=412.0, headers_ms=410.0, kind="openai_stream",
            span_id=None, request_id="req_8f2c",
        )  # fmt: skip
        served = an_attempt(
            provider="ollama", model="qwen2.5-coder:7b", format="ollama", vendor="ollama", attempt=2, start_ms=415.0,
            duration_ms=3410.0, headers_ms=1290.0, first_token_ms=1302.0, kind="ollama_stream", span_id=None, request_id=None,
            timings={"load_ms": 880.0, "prefill_ms": 395.0, "decode_ms": 2060.0},
        )  # fmt: skip
        asked = "Write a Python function that merges two sorted lists, and say what it costs."
        said = (
            "def merge(a, b):\n    merged, i, j = [], 0, 0\n    while i < len(a) and j < len(b):\n"
            "        if a[i] <= b[j]:\n            merged.append(a[i]); i += 1\n        else:\n"
            "            merged.append(b[j]); j += 1\n    return merged + a[i:] + b[j:]\n\n"
            "It looks at every element once: O(len(a) + len(b)) time, and as much room for the result."
        )
        return self._record(
            number, "ollama", "qwen2.5-coder:7b", "ollama", outcome="ok", duration_ms=3828.0, ttft_ms=1717.0, opened_ms=1718.0,
            requested_model="coder", rule="code", reason="tag code", tags=["code"], attempts=[refused, served],
            system="You write short, correct code.", cost=self._cost(214, 118, 0.0, 0.0), overhead_ms=2.1,
            messages=[{"role": "user", "content": [{"type": "text", "text": asked}]}], trace={"environment": "production"},
            response=a_response(content=said, model="qwen2.5-coder:7b", usage=self._usage(214, 118)),
        )  # fmt: skip


COUNTERS = {"queued": 0, "dropped": {}, "skipped": {}, "last_error": None, "last_error_at": None}
DESTINATIONS: list[dict[str, Any]] = [
    {"id": "1", "name": "Production", "type": "grafana", "config": {
        "base_url": "https://otlp-gateway-prod-eu-west-2.grafana.net", "instance_id": "482910", "api_key": "glc_…Zx4="}},
    {"id": "2", "name": "Team collector", "type": "otel-collector", "privacy_mode": True, "sampling_rate": 0.25,
     "config": {"endpoint": "http://collector.internal:4318/v1/traces"}},
    {"id": "3", "name": "Finance webhook", "type": "webhook", "config": {"url": "https://hooks.example.com/llm-costs"},
     "filter_rules": {"enabled": True, "groups": [{"logic": "and", "rules": [
         {"field": "total_cost", "operator": "gt", "value": 0.05}]}]}},
    {"id": "4", "name": "Archive", "type": "file", "source": "file", "config": {"path": "/var/lib/router/archive.jsonl"}},
]  # fmt: skip
PLAIN = {"enabled": True, "privacy_mode": False, "sampling_rate": 1, "api_keys": None, "filter_rules": None, "source": "page"}
COUNTED: dict[str, dict[str, Any]] = {
    "Production": {"accepted": 18_204, "delivered": 18_201, "queued": 3, "last_success": "2026-09-21T13:59:58Z"},
    "Team collector": {"accepted": 4_466, "delivered": 4_466, "skipped": {"sampling": 13_738},
                       "last_success": "2026-09-21T13:59:41Z"},
    "Finance webhook": {"accepted": 96, "delivered": 71, "queued": 25, "last_error": "status 503", "skipped": {"filter": 18_108},
                        "last_error_at": "2026-09-21T13:59:30Z", "last_success": "2026-09-21T12:10:02Z"},
    "Archive": {"accepted": 18_204, "delivered": 18_204, "last_success": "2026-09-21T13:59:58Z"},
}  # fmt: skip
REFUSED = {
    "ok": False, "status": 401, "latency_ms": 184, "message": "401 Unauthorized",
    "advice": "Instance id and token are joined as Basic: check the stack's id and the right traces:write.",
}  # fmt: skip


def pretend(page: Any, stats: dict[str, Any]) -> None:
    """Destinations that look like those of a company, instead of addresses on this machine."""
    ids = {d["name"]: d["id"] for d in DESTINATIONS}
    told = {name: {"id": ids[name], **COUNTERS, **counts} for name, counts in COUNTED.items()}
    stats = {**stats, "broadcast": {"enabled": True, "destinations": told}}
    answers = {
        "**/api/v1/observability": {"enabled": True},
        "**/api/v1/observability/destinations": {"destinations": [{**PLAIN, **d} for d in DESTINATIONS]},
        "**/api/v1/observability/destinations/test": REFUSED,
        "**/api/v1/stats": stats,
    }
    for url, answer in answers.items():
        page.route(url, answering(answer))


def answering(answer: dict[str, Any]) -> Callable[[Any], None]:
    return lambda route: route.fulfill(json=answer)


def waterfall(page: Any) -> None:
    page.locator('[data-id="461"]').click()
    page.locator(".span").first.wait_for()


def phone_overview(page: Any) -> None:
    page.get_by_role("button", name="Overview").click()


def phone_waterfall(page: Any) -> None:
    waterfall(page)
    page.evaluate("scrollBy(0, document.querySelector('.waterfall').getBoundingClientRect().top - 150)")


def form(page: Any) -> None:
    page.get_by_role("button", name="Add a destination").click()
    page.get_by_role("button", name="Grafana Cloud").click()
    page.get_by_label("Name", exact=True).fill("Grafana Cloud EU")
    page.get_by_label("OTLP gateway").fill("https://otlp-gateway-prod-eu-west-2.grafana.net/otlp")
    page.get_by_label("Instance ID").fill("482910")
    page.get_by_label("Access policy token").fill("glc_not-a-real-token")
    page.get_by_label("Privacy mode").check()
    page.get_by_role("button", name="Test connection").click()
    page.locator("form .notice").wait_for()


Act = Callable[[Any], None]
# name -> address, width, height, dark, what is done before the picture
PICTURES: dict[str, tuple[str, int, int, bool, Act | None]] = {
    "feed-light": ("/dashboard", 1440, 900, False, None),
    "feed-dark": ("/dashboard", 1440, 900, True, None),
    "waterfall-light": ("/dashboard", 1440, 900, False, waterfall),
    "waterfall-dark": ("/dashboard", 1440, 900, True, waterfall),
    "observability-light": ("/dashboard/observability", 1280, 900, False, None),
    "observability-dark": ("/dashboard/observability", 1280, 900, True, None),
    "destination-form": ("/dashboard/observability", 1280, 1290, False, form),
    "phone-feed": ("/dashboard", 390, 844, False, None),
    "phone-overview": ("/dashboard", 390, 844, True, phone_overview),
    "phone-waterfall": ("/dashboard", 390, 844, False, phone_waterfall),
    "phone-observability": ("/dashboard/observability", 390, 844, True, None),
}


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    from waitress.server import create_server

    server = create_server(app, host="127.0.0.1", port=0, threads=16)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.effective_port}"
    finally:
        app.dashboard.close_all()
        server.task_dispatcher.shutdown()
        server.close()


def take(chromium: Any, base: str, stage: Stage, name: str, check: bool) -> list[str]:
    """One picture; what axe-core finds serious in it."""
    path, width, height, dark, act = PICTURES[name]
    looked = dashboard_browser.Visit(
        chromium, base, width=width, height=height, color_scheme="dark" if dark else "light", timezone_id="UTC",
        device_scale_factor=2 if width < 500 else 1.5, reduced_motion="reduce",
    )  # fmt: skip
    page = looked.page
    page.clock.set_fixed_time(NOW)
    if "observability" in path:
        pretend(page, stage.app.stats())
    looked.open(path)
    page.locator(".card, .destination").first.wait_for()
    page.locator("#tiles .tile, .destination").first.wait_for(state="attached")
    page.wait_for_load_state("load")
    if act:
        act(page)
        page.mouse.move(0, 0)
    page.wait_for_timeout(400)
    page.screenshot(path=str(ROOT / "docs" / f"{name}.png"))
    found = looked.axe() if check else []
    looked.check()
    looked.close()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Write docs/*.png, the pictures of the page.")
    parser.add_argument("names", nargs="*", help=f"which of them: {', '.join(PICTURES)} (default: all)")
    parser.add_argument("--check", action="store_true", help="also look for accessibility problems, with axe-core")
    args = parser.parse_args()
    if why := dashboard_browser.missing():
        print(f"no pictures: {why}")
        return 1
    if args.check and not dashboard_browser.AXE.exists() and shutil.which("npm"):
        subprocess.run(["npm", "install", "--silent", "--prefix", str(ROOT / ".backends/npm"), "axe-core"], check=True)
    (ROOT / "docs").mkdir(exist_ok=True)
    found = 0
    with tempfile.TemporaryDirectory() as folder, dashboard_browser.browser() as chromium:
        stage = Stage(Path(folder))
        stage.rest("vllm-lab")
        stage.play()
        with served(stage.app) as base:
            for name in args.names or PICTURES:
                problems = take(chromium, base, stage, name, args.check)
                found += len(problems)
                print(f"docs/{name}.png", *problems, sep="\n    ")
        stage.app.close()
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
