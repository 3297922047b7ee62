"""Every client language against every provider language, by the official packages: `make matrix` prints the table.

The router runs as a child process between the vendors' own SDKs and scripted providers. A provider's bytes are written here
by hand, not by the router's code, so that a cell proves what it says. A cell that cannot be carries its reason.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anthropic
import openai
from fake_upstream import FakeUpstream, Received, Script, answer, chunks, end, fin, head, json_answer, raw, stream_head
from router_process import CONFIG, RouterProcess

CLIENTS = ("openai", "anthropic", "responses")
UPSTREAMS = ("openai", "anthropic", "ollama", "echo")
FEATURES = ("text", "tools", "parallel tools", "image", "structured", "thinking", "error", "cut stream")
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII="
CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"], "additionalProperties": False}
TOOLS = {"get_weather": "The weather in a city", "get_time": "The time in a city"}
USED = (11, 7)
CANNOT = {
    ("echo", "parallel tools"): "echo calls one tool and never two",
    ("echo", "image"): "echo reads text only; an image in what it is asked is a 400 that names the field",
    ("echo", "thinking"): "echo says what it was told and does not think",
}
"""(upstream, feature) -> why there is no such cell, in one sentence."""


@dataclass(frozen=True)
class Cell:
    """One question, asked whole or streamed."""

    client: str
    upstream: str
    feature: str
    stream: bool

    def __str__(self) -> str:
        return f"{self.client}-{self.upstream}-{self.feature}-{'stream' if self.stream else 'whole'}".replace(" ", "_")

    @property
    def reason(self) -> str | None:
        return CANNOT.get((self.upstream, self.feature))


CELLS = [Cell(c, u, f, s) for c in CLIENTS for u in UPSTREAMS for f in FEATURES for s in (False, True)]


# --- what is asked, and what a provider says


@dataclass(frozen=True)
class Ask:
    """A question in nobody's dialect."""

    text: str
    tools: tuple[str, ...] = ()
    must_call: bool = False
    image: bool = False
    structured: bool = False
    thinking: bool = False


@dataclass(frozen=True)
class Says:
    """What a scripted provider answers."""

    text: str = ""
    thinking: str = ""
    calls: tuple[tuple[str, dict[str, str]], ...] = ()


@dataclass
class Seen:
    """What the SDK made of the answer, and what its user sends back to go on."""

    text: str = ""
    thinking: str = ""
    calls: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    finish: str = ""
    used: tuple[int, int] = (0, 0)
    turn: Any = None


ASKS = {
    "text": Ask("Say something"),
    "tools": Ask("The weather in Rome?", tools=("get_weather",), must_call=True),
    "parallel tools": Ask("Weather and time in Rome?", tools=("get_weather", "get_time")),
    "image": Ask("What is in the picture?", image=True),
    "structured": Ask("Name a city", structured=True),
    "thinking": Ask("Think about it", thinking=True),
    "error": Ask("Say something"),
    "cut stream": Ask("one two three four five six"),
}
ROME = {"city": "Rome"}
ANSWERS = {
    "text": [Says("Hello, wörld \u2028 done")],
    "tools": [Says("I look.", calls=(("get_weather", ROME),)), Says("It is sunny.")],
    "parallel tools": [Says(calls=(("get_weather", ROME), ("get_time", ROME))), Says("Sunny at noon.")],
    "image": [Says("A single pixel.")],
    "structured": [Says('{"city": "Rome"}')],
    "thinking": [Says("42", thinking="Six times seven.")],
}


def openai_says(says: Says, stream: bool) -> Script:
    """A chat completion as OpenAI and its kin send it."""
    calls = [
        {"index": i, "id": f"call_{name}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}
        for i, (name, arguments) in enumerate(says.calls)
    ]
    usage = {"prompt_tokens": USED[0], "completion_tokens": USED[1], "total_tokens": sum(USED)}
    finish = "tool_calls" if calls else "stop"
    about = {"id": "chatcmpl-1", "created": 1700000000, "model": "fake-gpt"}
    if not stream:
        message: dict[str, Any] = {"role": "assistant", "content": says.text or None, "refusal": None}
        message |= {"reasoning_content": says.thinking} if says.thinking else {}
        message |= {"tool_calls": [{k: v for k, v in c.items() if k != "index"} for c in calls]} if calls else {}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return json_answer({**about, "object": "chat.completion", "choices": [choice], "usage": usage})

    def chunk(delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return {**about, "object": "chat.completion.chunk", "choices": [choice]}

    told = [chunk({"role": "assistant", "content": ""})]
    told += [chunk({"reasoning_content": piece}) for piece in _pieces(says.thinking)]
    told += [chunk({"content": piece}) for piece in _pieces(says.text)]
    for call in calls:
        function: Any = call["function"]
        told.append(chunk({"tool_calls": [{**call, "function": {"name": function["name"], "arguments": ""}}]}))
        told += [
            chunk({"tool_calls": [{"index": call["index"], "function": {"arguments": piece}}]})
            for piece in _pieces(function["arguments"])
        ]
    told += [chunk({}, finish), {**chunk({}), "choices": [], "usage": usage}]
    return _sse([(None, t) for t in told], last=b"data: [DONE]\n\n")


def anthropic_says(says: Says, stream: bool) -> Script:
    """A message as Anthropic sends it."""
    blocks: list[tuple[dict[str, Any], list[dict[str, Any]]]] = []
    if says.thinking:
        deltas = [{"type": "thinking_delta", "thinking": piece} for piece in _pieces(says.thinking)]
        deltas.append({"type": "signature_delta", "signature": "c2lnbmVk"})
        blocks.append(({"type": "thinking", "thinking": says.thinking, "signature": "c2lnbmVk"}, deltas))
    if says.text:
        deltas = [{"type": "text_delta", "text": piece} for piece in _pieces(says.text)]
        blocks.append(({"type": "text", "text": says.text, "citations": None}, deltas))
    for name, arguments in says.calls:
        deltas = [{"type": "input_json_delta", "partial_json": piece} for piece in _pieces(json.dumps(arguments))]
        blocks.append(({"type": "tool_use", "id": f"toolu_{name}", "name": name, "input": arguments}, deltas))
    finish = "tool_use" if says.calls else "end_turn"
    message: dict[str, Any] = {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "fake-claude", "content": [b for b, _ in blocks],
        "stop_reason": finish, "stop_sequence": None, "usage": {"input_tokens": USED[0], "output_tokens": USED[1]},
    }  # fmt: skip
    if not stream:
        return json_answer(message)
    started = {**message, "content": [], "stop_reason": None, "usage": {"input_tokens": USED[0], "output_tokens": 1}}
    told: list[dict[str, Any]] = [{"type": "message_start", "message": started}, {"type": "ping"}]
    empty: dict[str, Any] = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
    for index, (block, deltas) in enumerate(blocks):
        told.append({"type": "content_block_start", "index": index, "content_block": {**block, **empty[block["type"]]}})
        told += [{"type": "content_block_delta", "index": index, "delta": d} for d in deltas]
        told.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": finish, "stop_sequence": None}
    told += [{"type": "message_delta", "delta": delta, "usage": {"output_tokens": USED[1]}}, {"type": "message_stop"}]
    return _sse([(t["type"], t) for t in told])


def ollama_says(says: Says, stream: bool) -> Script:
    """A chat answer as Ollama sends it: lines when streamed, and a call always in one piece."""
    about = {"model": "fake-llama", "created_at": "2026-11-01T00:00:00Z"}
    calls = [{"id": f"call_{name}", "function": {"name": name, "arguments": arguments}} for name, arguments in says.calls]
    durations = {"total_duration": 9000000, "load_duration": 1000000, "prompt_eval_duration": 2000000, "eval_duration": 6000000}
    counts = {"prompt_eval_count": USED[0], "eval_count": USED[1]}
    numbers = {"done": True, "done_reason": "stop", **counts, **durations}
    if not stream:
        message: dict[str, Any] = {"role": "assistant", "content": says.text}
        message |= {"thinking": says.thinking} if says.thinking else {}
        message |= {"tool_calls": calls} if calls else {}
        return json_answer({**about, "message": message, **numbers})
    said = [{"content": "", "thinking": piece} for piece in _pieces(says.thinking)]
    said += [{"content": piece} for piece in _pieces(says.text)]
    told = [{**about, "message": {"role": "assistant", **m}, "done": False} for m in said]
    told += [{**about, "message": {"role": "assistant", "content": "", "tool_calls": [c]}, "done": False} for c in calls]
    told.append({**about, "message": {"role": "assistant", "content": ""}, **numbers})
    lines = [json.dumps(t, ensure_ascii=False).encode() + b"\n" for t in told]
    return stream_head(headers={"Content-Type": "application/x-ndjson"}) + chunks(lines) + end()


def _pieces(text: str) -> list[str]:
    return [text[at : at + 5] for at in range(0, len(text), 5)]


def _sse(told: list[tuple[str | None, dict[str, Any]]], last: bytes = b"") -> Script:
    blocks = [
        (f"event: {name}\n" if name else "").encode() + b"data: " + json.dumps(t, ensure_ascii=False).encode() + b"\n\n"
        for name, t in told
    ]
    return stream_head() + chunks([*blocks, *([last] if last else [])]) + end()


SAYS: dict[str, Callable[[Says, bool], Script]] = {"openai": openai_says, "anthropic": anthropic_says, "ollama": ollama_says}
REFUSALS = {
    "openai": {"error": {"message": "slow down", "type": "rate_limit_exceeded", "param": None, "code": None}},
    "anthropic": {"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}, "request_id": "req_1"},
    "ollama": {"error": "slow down"},
}


def refuses(upstream: str) -> Script:
    """Too many requests, in the provider's own words."""
    return answer(json.dumps(REFUSALS[upstream]).encode(), 429, {"Retry-After": "7"})


def breaks_off(upstream: str, stream: bool) -> Script:
    """An answer of which the connection lets only half through."""
    sent: list[bytes] = []

    class Wire:
        def send(self, data: bytes) -> None:
            sent.append(data)

        def wait(self, seconds: float, until: Any = None) -> None:
            return None

    SAYS[upstream](Says("one two three four five six"), stream).run(Wire())  # type: ignore[arg-type]
    whole = b"".join(sent)
    if stream:
        return raw(b"".join(sent[: len(sent) // 2])) + fin()
    body = whole.partition(b"\r\n\r\n")[2]
    return raw(head(200, {"Content-Type": "application/json", "Content-Length": str(len(body))}) + body[: len(body) // 2]) + fin()


# --- the official clients


class Chat:
    """The openai package, chat completions."""

    errors: tuple[type[Exception], ...] = (openai.APIError,)

    def __init__(self, url: str) -> None:
        self.sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20)

    def begin(self, ask: Ask, model: str) -> dict[str, Any]:
        """The arguments of the first call."""
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
        content: Any = [{"type": "text", "text": ask.text}, picture] if ask.image else ask.text
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]
        told: dict[str, Any] = {"model": model, "messages": messages, "max_completion_tokens": 5000}
        if ask.tools:
            told["tools"] = [
                {"type": "function", "function": {"name": n, "description": TOOLS[n], "parameters": CITY}} for n in ask.tools
            ]
        told |= {"tool_choice": "required"} if ask.must_call else {}
        if ask.structured:
            told["response_format"] = {"type": "json_schema", "json_schema": {"name": "place", "schema": CITY, "strict": True}}
        return {**told, **({"reasoning_effort": "medium"} if ask.thinking else {})}

    def go_on(self, told: dict[str, Any], seen: Seen, results: list[str]) -> dict[str, Any]:
        """The arguments of the call that brings the results."""
        turn = seen.turn.model_dump(exclude_none=True)
        back = [{"role": "tool", "tool_call_id": id, "content": r} for (id, _, _), r in zip(seen.calls, results, strict=True)]
        again = {k: v for k, v in told.items() if k != "tool_choice"}
        return {**again, "messages": [*told["messages"], turn, *back]}

    def ask(self, told: dict[str, Any], stream: bool) -> Seen:
        """One call and what came of it."""
        if stream:
            return self._streamed(told)
        answer = self.sdk.chat.completions.create(**told)
        type(answer).model_validate(answer.model_dump(by_alias=True), strict=True)
        return self._seen(answer)

    def _streamed(self, told: dict[str, Any]) -> Seen:
        thinking, ids = "", set()
        with self.sdk.chat.completions.stream(**told, stream_options={"include_usage": True}) as events:
            for event in events:
                if event.type == "chunk":
                    ids.add((event.chunk.id, event.chunk.created))
                    thinking += "".join(getattr(c.delta, "reasoning_content", None) or "" for c in event.chunk.choices)
            seen = self._seen(events.get_final_completion())
        assert len(ids) == 1, ids
        seen.thinking = thinking
        return seen

    def _seen(self, answer: Any) -> Seen:
        choice, usage = answer.choices[0], answer.usage
        calls = [(c.id, c.function.name, json.loads(c.function.arguments)) for c in choice.message.tool_calls or ()]
        thinking = getattr(choice.message, "reasoning_content", None) or ""
        used = (usage.prompt_tokens, usage.completion_tokens)
        return Seen(choice.message.content or "", thinking, calls, choice.finish_reason, used, choice.message)


class Messages:
    """The anthropic package."""

    errors: tuple[type[Exception], ...] = (anthropic.APIError,)

    def __init__(self, url: str) -> None:
        self.sdk = anthropic.Anthropic(base_url=url, api_key="unused", max_retries=0, timeout=20)

    def begin(self, ask: Ask, model: str) -> dict[str, Any]:
        source = {"type": "base64", "media_type": "image/png", "data": PNG}
        content: Any = [{"type": "image", "source": source}, {"type": "text", "text": ask.text}] if ask.image else ask.text
        told: dict[str, Any] = {"model": model, "system": "Be brief.", "messages": [{"role": "user", "content": content}]}
        told |= {"max_tokens": 5000}
        if ask.tools:
            told["tools"] = [{"name": n, "description": TOOLS[n], "input_schema": CITY} for n in ask.tools]
        told |= {"tool_choice": {"type": "any"}} if ask.must_call else {}
        told |= {"output_config": {"format": {"type": "json_schema", "schema": CITY}}} if ask.structured else {}
        return {**told, **({"thinking": {"type": "enabled", "budget_tokens": 2048}} if ask.thinking else {})}

    def go_on(self, told: dict[str, Any], seen: Seen, results: list[str]) -> dict[str, Any]:
        back = [
            {"type": "tool_result", "tool_use_id": id, "content": r} for (id, _, _), r in zip(seen.calls, results, strict=True)
        ]
        again = {k: v for k, v in told.items() if k != "tool_choice"}
        return {**again, "messages": [*told["messages"], seen.turn.to_param(), {"role": "user", "content": back}]}

    def ask(self, told: dict[str, Any], stream: bool) -> Seen:
        if stream:
            with self.sdk.messages.stream(**told) as events:
                message: Any = events.get_final_message()
        else:
            message = self.sdk.messages.create(**told)
            type(message).model_validate(message.model_dump(by_alias=True), strict=True)
        text = "".join(b.text for b in message.content if b.type == "text")
        thinking = "".join(b.thinking for b in message.content if b.type == "thinking")
        calls = [(b.id, b.name, b.input) for b in message.content if b.type == "tool_use"]
        used = (message.usage.input_tokens, message.usage.output_tokens)
        return Seen(text, thinking, calls, message.stop_reason, used, message)


class Responses:
    """The openai package, responses."""

    errors: tuple[type[Exception], ...] = (openai.APIError,)

    def __init__(self, url: str) -> None:
        self.sdk = openai.OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0, timeout=20)

    def begin(self, ask: Ask, model: str) -> dict[str, Any]:
        picture = {"type": "input_image", "image_url": f"data:image/png;base64,{PNG}", "detail": "auto"}
        content: Any = [{"type": "input_text", "text": ask.text}, picture] if ask.image else ask.text
        told: dict[str, Any] = {"model": model, "instructions": "Be brief.", "input": [{"role": "user", "content": content}]}
        told |= {"max_output_tokens": 5000, "store": False}
        if ask.tools:
            told["tools"] = [
                {"type": "function", "name": n, "description": TOOLS[n], "parameters": CITY, "strict": True} for n in ask.tools
            ]
        told |= {"tool_choice": "required"} if ask.must_call else {}
        if ask.structured:
            told["text"] = {"format": {"type": "json_schema", "name": "place", "schema": CITY, "strict": True}}
        return {**told, **({"reasoning": {"effort": "medium", "summary": "auto"}} if ask.thinking else {})}

    def go_on(self, told: dict[str, Any], seen: Seen, results: list[str]) -> dict[str, Any]:
        items = [item.model_dump(exclude_none=True) for item in seen.turn.output]
        back = [
            {"type": "function_call_output", "call_id": id, "output": r}
            for (id, _, _), r in zip(seen.calls, results, strict=True)
        ]
        again = {k: v for k, v in told.items() if k != "tool_choice"}
        return {**again, "input": [*told["input"], *items, *back]}

    def ask(self, told: dict[str, Any], stream: bool) -> Seen:
        if stream:
            with self.sdk.responses.stream(**told) as events:
                numbers = [e.sequence_number for e in events if hasattr(e, "sequence_number")]
                response: Any = events.get_final_response()
            assert numbers == sorted(set(numbers)), numbers
        else:
            response = self.sdk.responses.create(**told)
            type(response).model_validate(response.model_dump(by_alias=True), strict=True)
        calls = [(i.call_id, i.name, json.loads(i.arguments)) for i in response.output if i.type == "function_call"]
        thoughts = [part.text for i in response.output if i.type == "reasoning" for part in (i.summary or i.content or ())]
        used = (response.usage.input_tokens, response.usage.output_tokens)
        return Seen(response.output_text, "".join(thoughts), calls, response.status, used, response)


Client = Chat | Messages | Responses
SDKS: dict[str, type[Client]] = {"openai": Chat, "anthropic": Messages, "responses": Responses}
FINISHED = {"openai": ("stop", "tool_calls"), "anthropic": ("end_turn", "tool_use"), "responses": ("completed", "completed")}
"""How each dialect says that an answer is complete, and that a tool is to be called."""


# --- the table


PROVIDERS = "\n".join(
    f'[[providers]]\nname = "{name}"\nformat = "{name}"\n'
    + ("" if name == "echo" else f'base_url = "{{{name}}}"\nread_timeout = 10\nidle_timeout = 10\n')
    for name in UPSTREAMS
)
RULES = "\n".join(f'[[routers]]\ntype = "prefix"\nmodel_prefix = "{name}-"\nprovider = "{name}"\n' for name in UPSTREAMS)


class Matrix:
    """The router between the SDKs and the scripted providers, ready to be asked."""

    def __init__(self, process: RouterProcess, fakes: dict[str, FakeUpstream]) -> None:
        self.process, self.fakes = process, fakes
        self._clients = {name: sdk(process.url) for name, sdk in SDKS.items()}

    def run(self, cell: Cell) -> None:
        """Ask the cell's question. Raises AssertionError, or whatever the SDK raises, if the answer is not right."""
        client, ask = self._clients[cell.client], ASKS[cell.feature]
        if cell.feature in ("error", "cut stream"):
            return self._fails(cell, client, ask)
        before = self._script(cell, ANSWERS.get(cell.feature, []))
        told = client.begin(ask, f"{cell.upstream}-model")
        seen = client.ask(told, cell.stream)
        self._check(cell, ask, seen, 0)
        if ask.tools:
            results = [f"{name}: fine" for _, name, _ in seen.calls]
            self._check(cell, ask, client.ask(client.go_on(told, seen, results), cell.stream), 1)
        if cell.upstream != "echo":
            self._check_asked(cell, ask, self.fakes[cell.upstream].posts[before:])
        return None

    def _script(self, cell: Cell, answers: list[Says]) -> int:
        """Tell the provider what to say; how many requests it had before."""
        if cell.upstream == "echo":
            return 0
        fake = self.fakes[cell.upstream]
        fake.script(*(SAYS[cell.upstream](says, cell.stream) for says in answers))
        return len(fake.posts)

    def _check(self, cell: Cell, ask: Ask, seen: Seen, turn: int) -> None:
        says = _echo_says(cell.feature, turn) if cell.upstream == "echo" else ANSWERS[cell.feature][turn]
        assert (seen.text, seen.thinking) == (says.text, says.thinking), seen
        assert [(name, arguments) for _, name, arguments in seen.calls] == list(says.calls), seen
        assert seen.finish == FINISHED[cell.client][bool(says.calls)], seen
        assert all(seen.used) if cell.upstream == "echo" else seen.used == USED, seen

    def _check_asked(self, cell: Cell, ask: Ask, received: list[Received]) -> None:
        """What the provider was asked holds everything the client said."""
        assert len(received) == 1 + bool(ask.tools), [r.body for r in received]
        body = received[0].json()
        text = json.dumps(body, ensure_ascii=False)
        assert body["model"] == f"{cell.upstream}-model" and body.get("stream", False) == cell.stream
        assert "Be brief." in text and ask.text in text and "5000" in text
        assert not ask.image or PNG in text
        assert all(name in text and TOOLS[name] in text for name in ask.tools)
        assert not ask.structured or json.dumps(CITY) in text
        thinks = ("reasoning_effort", "thinking", "think", "reasoning")
        assert bool(set(thinks) & body.keys()) == ask.thinking, text
        results = [f"{name}: fine" for name in ask.tools]
        assert all(r in json.dumps(received[-1].json()) for r in results)

    def _fails(self, cell: Cell, client: Client, ask: Ask) -> None:
        """The official package must raise; what it raises tells what happened."""
        text = ask.text
        if cell.upstream == "echo":
            text += " [[echo status=429]]" if cell.feature == "error" else " [[echo cut=3]]"
        elif cell.feature == "error":
            self.fakes[cell.upstream].script(refuses(cell.upstream))
        else:
            self.fakes[cell.upstream].script(breaks_off(cell.upstream, cell.stream))
        try:
            seen = client.ask(client.begin(Ask(text), f"{cell.upstream}-model"), cell.stream)
        except client.errors as e:
            raised: Any = e
        else:
            raise AssertionError(f"a broken answer was taken for a good one: {seen}")
        status = getattr(raised, "status_code", 200)
        if cell.feature == "error":
            assert status == 429 and type(raised).__name__ == "RateLimitError", repr(raised)
            assert cell.upstream == "echo" or ("slow down" in str(raised) and raised.response.headers["retry-after"] == "7")
        else:
            assert status == (200 if cell.stream else 502), repr(raised)
            assert "broke off" in str(raised) or "ended in the middle" in str(raised), repr(raised)


def _echo_says(feature: str, turn: int) -> Says:
    ask = ASKS[feature]
    if ask.tools and turn == 0:
        return Says(calls=((ask.tools[0], {"city": "echo"}),))
    return Says(json.dumps({"echo": ask.text}) if ask.structured else ask.text)


@contextmanager
def matrix(folder: Path) -> Iterator[Matrix]:
    """Everything up and running, for as long as it is needed."""
    fakes = {name: FakeUpstream() for name in UPSTREAMS if name != "echo"}
    urls = {name: fake.url for name, fake in fakes.items()}
    process = RouterProcess(folder, CONFIG, None, providers=PROVIDERS, rules=RULES, **urls)
    try:
        yield Matrix(process.start(), fakes)
    finally:
        process.kill()
        for fake in fakes.values():
            fake.close()


def table(results: dict[Cell, str]) -> str:
    """The results as text: whole/streamed in each cell, reasons as numbered sentences below."""
    reasons = sorted(set(CANNOT.values()))
    rows = [["client", "provider", *FEATURES]]
    for client in CLIENTS:
        for upstream in UPSTREAMS:
            row = [client, upstream]
            for feature in FEATURES:
                found = [results.get(Cell(client, upstream, feature, stream), "") for stream in (False, True)]
                why = CANNOT.get((upstream, feature))
                row.append(f"({reasons.index(why) + 1})" if why else "/".join(found))
            rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 2) for w in widths) + "|")
    notes = [f"({i}) {reason}." for i, reason in enumerate(reasons, 1)]
    return "\n".join([*lines, "", "Each cell: answered whole / streamed.", *notes])


def main() -> int:
    """Run every cell and print the table; 1 if one of them fails."""
    results: dict[Cell, str] = {}
    with tempfile.TemporaryDirectory() as folder, matrix(Path(folder)) as running:
        for cell in CELLS:
            if cell.reason:
                continue
            try:
                running.run(cell)
                results[cell] = "ok"
            except Exception as e:  # noqa: BLE001 - whatever an SDK raises is the finding
                results[cell] = "FAILS"
                print(f"{cell}: {type(e).__name__}: {e}", file=sys.stderr)
    print(table(results))
    return int("FAILS" in results.values())


if __name__ == "__main__":
    sys.exit(main())
