"""Real agents at work through the router: a scripted model has them run a command, and sees what came of it.

They are fetched by `make agents`; where they are not, these tests are skipped.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import agents
import pytest
from conftest import RouterFactory
from fake_upstream import (
    DONE,
    FakeUpstream,
    Received,
    Script,
    chunk_object,
    error_answer,
    event,
    fin,
    json_answer,
    openai_chunks,
    raw,
    stream,
    stream_head,
    usage_object,
)
from router_process import PROVIDER, RouterProcess

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("agents")]
MODEL = agents.MODEL
COMMAND = "printf written-by-an-agent > made.txt; cat made.txt"
USAGE = {"prompt_tokens": 20, "completion_tokens": 5, "total_tokens": 25}
SHELLS = {"codex": ("exec_command", "cmd"), "claude": ("Bash", "command")}
"""The tool with which an agent runs a command, and what it calls the command."""
TOLD = {"codex": "the provider's stream ended in the middle", "claude": "the provider failed (500)"}
"""What an agent says of an answer that broke. Claude Code asks once more, for a whole answer, and tells of that."""
ROUTES = {"codex": ("responses", "/v1/responses"), "claude": ("anthropic", "/v1/messages")}


@pytest.fixture(params=sorted(agents.AGENTS))
def agent(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    if agents.installed(name) is None:
        pytest.skip(f"{agents.PACKAGES[name]} is not installed: make agents")
    return name


def called(agent: str, received: Received) -> dict[str, Any] | None:
    """The call of the shell that the model makes, None when it has nothing to call or has seen what came of it."""
    asked, (tool, argument) = received.json(), SHELLS[agent]
    tools = {t["function"]["name"] for t in asked.get("tools", ())}
    done = tool not in tools or any(m["role"] == "tool" for m in asked["messages"])
    return None if done else {"name": tool, "arguments": {argument: COMMAND}}


def openai_says(agent: str, received: Received) -> Script:
    """A model behind an openai provider: calls the shell once, then says that it is done."""
    function = called(agent, received)
    if function is None:
        return stream(openai_chunks("All is done.", USAGE))
    function["arguments"] = json.dumps(function["arguments"])
    call = {"index": 0, "id": "call_1", "type": "function", "function": function}
    said = [chunk_object({"tool_calls": [call]}), chunk_object({}, "tool_calls"), usage_object(USAGE)]
    return stream([*map(event, said), DONE])


def ollama_says(agent: str, received: Received) -> Script:
    """The same behind Ollama."""
    if received.path != "/api/chat":
        return json_answer({"models": []})
    function = called(agent, received)
    said: dict[str, Any] = {"content": "All is done."}
    if function is not None:
        said = {"content": "", "tool_calls": [{"id": "call_1", "function": function}]}
    told: list[dict[str, Any]] = [{"message": {"role": "assistant", **said}, "done": False}]
    told.append({"message": {"role": "assistant", "content": ""}, "done": True, "done_reason": "stop", "eval_count": 5})
    return stream([json.dumps({"model": MODEL, **line}).encode() + b"\n" for line in told])


UPSTREAMS = {
    "openai": (PROVIDER, openai_says),
    "ollama": (PROVIDER.replace('"openai"', '"ollama"').replace("/v1", ""), ollama_says),
}


def work(agent: str, process: RouterProcess, folder: Path) -> agents.Ended:
    home = folder / agent
    home.mkdir()
    return agents.run(agent, process.url, "Make the file made.txt.", home)


@pytest.mark.parametrize("format", UPSTREAMS)
def test_an_agent_runs_a_command_and_hears_its_output(
    agent: str, format: str, router: RouterFactory, upstream: FakeUpstream, tmp_path: Path
) -> None:
    provider, says = UPSTREAMS[format]
    upstream.default = functools.partial(says, agent)
    process = router(providers=provider)
    ended = work(agent, process, tmp_path)
    assert ended.code == 0, ended.output
    assert "All is done." in ended.output
    assert (tmp_path / agent / "work" / "made.txt").read_text("utf-8") == "written-by-an-agent"
    chats = [r.json() for r in upstream.posts if "chat" in r.path]
    results = [m for asked in chats for m in asked["messages"] if m["role"] == "tool"]
    assert results, "the model was told what came of its call"
    assert results[0]["tool_call_id"] == "call_1"
    assert "written-by-an-agent" in json.dumps(results[0]["content"])
    records = process.records(2)
    assert {(r["client_format"], r["route"], r["outcome"]) for r in records} == {(*ROUTES[agent], "ok")}


def test_an_agent_hears_the_embedded_model(agent: str, router: RouterFactory, tmp_path: Path) -> None:
    process = router(providers='[[providers]]\nname = "echo"\nformat = "echo"')
    ended = work(agent, process, tmp_path)
    assert ended.code == 0, ended.output
    assert "Make the file made.txt." in ended.output
    assert process.records(1)[-1]["provider"] == "echo"


def test_an_agent_is_told_of_an_answer_that_broke_off(
    agent: str, router: RouterFactory, upstream: FakeUpstream, tmp_path: Path
) -> None:
    broken = stream_head("close") + raw(b"".join(openai_chunks("half an", finish=None, done=False))) + fin()
    upstream.default = lambda received: broken if received.json().get("stream") else error_answer(500)
    ended = work(agent, router(), tmp_path)
    assert ended.code != 0, ended.output
    assert TOLD[agent] in ended.output
