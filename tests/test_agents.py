"""Real agents at work through the router: a scripted model has them run a command, and sees what came of it.

They are fetched by `make agents`; where they are not, these tests are skipped.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import agents
import pytest
from conftest import RouterFactory
from fake_upstream import DONE, FakeUpstream, Received, Script, chunk_object, event, openai_chunks, stream, usage_object
from router_process import RouterProcess

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("agents")]
COMMAND = "printf written-by-an-agent > made.txt; cat made.txt"
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
SHELLS = {"codex": ("exec_command", "cmd"), "claude": ("Bash", "command")}
"""The tool with which an agent runs a command, and what it calls the command."""
ROUTES = {"codex": ("responses", "/v1/responses"), "claude": ("anthropic", "/v1/messages")}


@pytest.fixture(params=sorted(agents.AGENTS))
def agent(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if agents.installed(name) is None:
        pytest.skip(f"{agents.PACKAGES[name]} is not installed: make agents")
    return name


def openai_says(agent: str) -> Any:
    """A model behind an openai provider: calls the shell once, then says that it is done."""

    def answer(received: Received) -> Script:
        asked = received.json()
        tools = {t["function"]["name"] for t in asked.get("tools", ())}
        tool, argument = SHELLS[agent]
        if tool not in tools or any(m["role"] == "tool" for m in asked["messages"]):
            return stream(openai_chunks("All is done.", USAGE))
        function = {"name": tool, "arguments": json.dumps({argument: COMMAND})}
        call = {"index": 0, "id": "call_1", "type": "function", "function": function}
        return stream(
            [event(chunk_object({"tool_calls": [call]})), event(chunk_object({}, "tool_calls")), event(usage_object(USAGE)), DONE]
        )

    return answer


def work(agent: str, process: RouterProcess, folder: Path) -> agents.Ended:
    home = folder / agent
    home.mkdir()
    return agents.run(agent, process.url, "Make the file made.txt.", home)


def test_an_agent_runs_a_command_and_hears_its_output(
    agent: str, router: RouterFactory, upstream: FakeUpstream, tmp_path: Path
) -> None:
    upstream.default = openai_says(agent)
    process = router()
    ended = work(agent, process, tmp_path)
    assert ended.code == 0, ended.output
    assert "All is done." in ended.output
    assert (tmp_path / agent / "work" / "made.txt").read_text("utf-8") == "written-by-an-agent"
    results = [m for r in upstream.posts for m in r.json()["messages"] if m["role"] == "tool"]
    assert results, "the model was told what came of its call"
    assert results[0]["tool_call_id"] == "call_1"
    assert "written-by-an-agent" in json.dumps(results[0]["content"])
    records = process.records(2)
    assert {(r["client_format"], r["route"], r["outcome"]) for r in records} == {(*ROUTES[agent], "ok")}
