"""A real browser on the page: Debian's Chromium driven by Playwright, and an eye on everything a page must not do.

`visit` gives a `Visit`: Playwright's page, and `check`, which fails if the page logged an error, broke the content security
policy, opened a dialog, or asked any other host for anything.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

CHROMIUM = Path("/usr/bin/chromium")
AXE = Path(__file__).resolve().parent.parent / ".backends/npm/node_modules/axe-core/axe.min.js"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--hide-scrollbars", "--force-color-profile=srgb",
]  # fmt: skip
WATCHED = """
window.broken = [];
addEventListener("securitypolicyviolation", (e) => broken.push(`policy: ${e.violatedDirective} ${e.blockedURI}`));
addEventListener("error", (e) => broken.push(`error: ${e.message}`));
addEventListener("unhandledrejection", (e) => broken.push(`rejection: ${e.reason}`));
"""


def missing() -> str:
    """Why there is no browser, or nothing."""
    if not CHROMIUM.exists():
        return f"{CHROMIUM} is not installed (Debian's package chromium)"
    return "" if importlib.util.find_spec("playwright") else "playwright is not installed"


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=str(CHROMIUM), args=FLAGS)
        try:
            yield chromium
        finally:
            chromium.close()


class Visit:
    """One page in a context of its own."""

    def __init__(self, chromium: Any, base: str, *, width: int = 1280, height: int = 860, **context: Any) -> None:
        self.base = base
        self.context = chromium.new_context(viewport={"width": width, "height": height}, **context)
        self.context.add_init_script(WATCHED)
        self.page = self.context.new_page()
        self.page.set_default_timeout(8000)
        self.asked: list[str] = []
        self.dialogs: list[str] = []
        self.logged: list[str] = []
        self.expected: tuple[str, ...] = ()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("dialog", self._dialog)
        self.page.on("console", lambda message: self.logged.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.logged.append(f"error: {error}"))

    def _dialog(self, dialog: Any) -> None:
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, path: str = "/dashboard") -> Any:
        self.page.goto(self.base + path)
        return self.page

    def check(self) -> None:
        """Nothing happened that must not."""
        errors = [line for line in self.logged if line.startswith("error") and not any(part in line for part in self.expected)]
        assert not errors, errors
        assert not self.dialogs, self.dialogs
        broken = self.page.evaluate("window.broken")
        assert not broken, broken
        origin = urlsplit(self.base)[:2]
        for url in self.asked:
            assert url.startswith("data:") or urlsplit(url)[:2] == origin, f"{url} is of another origin"

    def axe(self) -> list[str]:
        """What axe-core finds that is serious: rule, and where. It runs outside the page's own policy."""
        self.page.evaluate(AXE.read_text("utf-8"))
        found = self.page.evaluate("axe.run(document, {resultTypes: ['violations']})")
        return [
            f"{violation['id']} at {[node['target'] for node in violation['nodes']]}: {violation['nodes'][0]['failureSummary']}"
            for violation in found["violations"]
            if violation["impact"] in ("serious", "critical")
        ]

    def overflows(self) -> bool:
        """Must one scroll sideways?"""
        return bool(self.page.evaluate("document.documentElement.scrollWidth > innerWidth"))

    def close(self) -> None:
        self.context.close()
