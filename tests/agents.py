"""Real coding agents before the router: `python tests/agents.py` fetches them from npm, `make agents` runs them.

An agent gets a home of its own, an empty folder to work in and one prompt. Its only way out is the router: every other
address goes to a proxy that nobody listens on.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / ".backends" / "agents"
PACKAGES = {"codex": "@openai/codex@0.169.0", "claude": "@anthropic-ai/claude-code@2.1.197"}
"""The command an agent is started by -> the npm package, in the version that was seen working."""
MODEL = "fake-model"


@dataclass(frozen=True)
class Ended:
    """An agent that has done its work, or given up."""

    code: int
    output: str


def installed(name: str) -> Path | None:
    """Where an agent is, None if it was not fetched."""
    place = FOLDER / "node_modules" / ".bin" / name
    return place if place.exists() else None


def install() -> None:
    """Fetch all agents. Raises CalledProcessError if npm fails."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    npm = shutil.which("npm")
    if npm is None:
        raise SystemExit("the agents come from npm, which is not on this machine")
    subprocess.run([npm, "install", "--prefix", str(FOLDER), "--no-audit", "--no-fund", *PACKAGES.values()], check=True)


def codex(url: str, prompt: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Codex in its mode without a terminal. It speaks /v1/responses."""
    provider = {"name": "router", "base_url": f"{url}/v1", "env_key": "ROUTER_KEY", "wire_api": "responses"}
    told = ",".join(f'{key}="{value}"' for key, value in provider.items())
    retries = "request_max_retries=0,stream_max_retries=0"
    settings = ["model_provider=router", f"model_providers.router={{{told},{retries}}}", "analytics.enabled=false"]
    flags = [flag for setting in settings for flag in ("-c", setting)]
    command = ["exec", "--skip-git-repo-check", "--sandbox", "danger-full-access", "--model", MODEL, *flags, prompt]
    return command, {"CODEX_HOME": str(folder / "home"), "ROUTER_KEY": "unused"}


def claude(url: str, prompt: str, folder: Path) -> tuple[list[str], dict[str, str]]:
    """Claude Code in its mode without a terminal. It speaks /v1/messages."""
    command = ["-p", prompt, "--model", MODEL, "--allowedTools", "Bash"]
    quiet = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "CLAUDE_CODE_MAX_RETRIES": "0"}
    return command, {"ANTHROPIC_BASE_URL": url, "ANTHROPIC_API_KEY": "unused", "ANTHROPIC_SMALL_FAST_MODEL": MODEL, **quiet}


AGENTS: dict[str, Callable[[str, str, Path], tuple[list[str], dict[str, str]]]] = {"codex": codex, "claude": claude}


def run(name: str, url: str, prompt: str, folder: Path, seconds: float = 90.0) -> Ended:
    """Give an agent a prompt; its work is in `folder`/work afterwards. Raises TimeoutExpired."""
    work, home = folder / "work", folder / "home"
    work.mkdir()
    home.mkdir()
    arguments, environment = AGENTS[name](url, prompt, folder)
    nowhere = dict.fromkeys(("HTTPS_PROXY", "HTTP_PROXY", "https_proxy", "http_proxy"), "http://127.0.0.1:9")
    ended = subprocess.run(
        [str(installed(name)), *arguments],
        cwd=work,
        env={"PATH": os.environ["PATH"], "HOME": str(home), **nowhere, "NO_PROXY": "127.0.0.1", **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout.decode(errors="replace"))


if __name__ == "__main__":
    install()
