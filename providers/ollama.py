"""Ollama: the upstream face of its own API, `/api/chat` and `/api/embed`, and its list of models and what they can do.

It speaks newline-delimited JSON. Unlike its OpenAI imitation it tells where the time went, lets a model think or not, and
says what each model is able to do. A call it makes comes whole, in one line, and without an id where the version is old.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any

import telemetry
from providers import (
    BadRequest,
    Begin,
    Block,
    BlockParser,
    Call,
    Done,
    Event,
    Finish,
    Lines,
    Malformed,
    Message,
    Provider,
    Reasoning,
    Request,
    Text,
    Timings,
    Tool,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
    Vectors,
    block_text,
    count,
    dig,
    dumps,
    forwarded,
    malformed,
    read_object,
)  # fmt: skip

OPERATIONS = ("embeddings",)


def endpoint(base_url: str) -> str:
    """The URL that paths are appended to, whichever of Ollama's own addresses was told: the host, .../api or .../v1."""
    return re.sub(r"/+(api|v1)(/chat(/completions)?)?$", "", base_url.rstrip("/"))


def credentials(key: str) -> dict[str, str]:
    """The header that carries a key: ollama.com and proxies want one."""
    return {"authorization": f"Bearer {key}"}


# What can be asked beside requests --------------------------------------------------------------------------------------
def models_call() -> Call:
    """Asks for the models that are on the machine."""
    return Call("/api/tags", b"", "list_models", method="GET")


def parse_models(body: dict[str, Any]) -> list[str]:
    """The names in an answer to `models_call`."""
    return [m["model"] if "model" in m else m["name"] for m in body["models"]]


def capabilities_call(model: str) -> Call:
    """Asks what a model can do."""
    return Call("/api/show", dumps({"model": model}).encode(), "model_capabilities")


def parse_capabilities(body: dict[str, Any]) -> set[str]:
    """completion, tools, vision, thinking, embedding, insert: what an answer to `capabilities_call` lists."""
    return {c for c in body.get("capabilities") or () if isinstance(c, str)}


# Requests ---------------------------------------------------------------------------------------------------------------
def build(request: Request, model: str, provider: Provider) -> Call:
    """The request in Ollama's words. Raises BadRequest for what would change its meaning: n, an image's URL, a document."""
    if request.operation == "embeddings":
        return _build_embed(request, model, provider)
    if request.n > 1:
        raise BadRequest("an ollama provider gives one answer, n must be 1", param="n")
    body: dict[str, Any] = {"model": model, "messages": _messages(request), "stream": request.stream}
    if tools := [_build_tool(t) for t in _callable(request)]:
        body["tools"] = tools
    if request.response_format:
        body["format"] = request.response_format.get("schema", "json")
    if request.reasoning is not None:
        body["think"] = _think(request.reasoning, model)
    if options := _options(request):
        body["options"] = options
    kind = "ollama_stream" if request.stream else "ollama_chat"
    body |= _keep_alive(request) | forwarded(request, provider)
    return Call("/api/chat", dumps(body).encode(), kind, dropped=_dropped(request))


_OPTIONS = {
    "temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "seed": "seed", "stop": "stop", "max_tokens": "num_predict",
    "presence_penalty": "presence_penalty", "frequency_penalty": "frequency_penalty",
}  # fmt: skip
_UNSAID = ("parallel_tool_calls", "user", "metadata", "service_tier")


def _options(request: Request) -> dict[str, Any]:
    told = {option: getattr(request, name) for name, option in _OPTIONS.items()}
    return {option: value for option, value in told.items() if value not in (None, [])}


def _keep_alive(request: Request) -> dict[str, Any]:
    """How long the model stays loaded, if the client said so: no other API has it, so its clients send it as it is."""
    told = request.body.data.get("keep_alive")
    return {"keep_alive": told} if isinstance(told, (str, int, float)) else {}


def _dropped(request: Request) -> list[str]:
    """What was asked for and is not in Ollama's words."""
    images = [b for m in request.messages for b in m.content if b["type"] == "image"]
    noted = {
        "tool_choice": request.tool_choice not in (None, "auto", "none"),
        "tools": any(not _is_function(t) for t in request.tools),
        "strict": any(t.extra.get("strict") for t in request.tools),
        "detail": any(b.get("detail") not in (None, "auto") for b in images),
        **{name: getattr(request, name) is not None for name in _UNSAID},
    }
    noted |= dict.fromkeys(request.extra.keys() - {"keep_alive"}, True)
    return sorted(name for name, dropped in noted.items() if dropped)


def _think(tokens: int, model: str) -> bool | str:
    """gpt-oss takes levels and only them; any other model takes on or off, and refuses a level."""
    if "gpt-oss" not in model:
        return tokens > 0
    return "low" if tokens <= 4096 else "medium" if tokens <= 16384 else "high"


def _callable(request: Request) -> list[Tool]:
    return [] if request.tool_choice == "none" else [t for t in request.tools if _is_function(t)]


def _is_function(tool: Tool) -> bool:
    """A tool that runs at its vendor's (web search and the like) keeps its type; Ollama has none of those."""
    return tool.extra.get("type", "function") == "function" or bool(tool.parameters)


def _build_tool(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    parameters = {"type": "object", "properties": {}, **tool.parameters}  # templates walk through properties
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": parameters}}


def _messages(request: Request) -> list[dict[str, Any]]:
    field = request.text_field
    built = [{"role": "system", "content": _text(request.system)}] if request.system else []
    names: dict[str, str] = {}
    for message in request.messages:
        names |= {b["id"]: b["name"] for b in message.content if b["type"] == "tool_use"}
        if message.role == "tool":
            built += [_build_result(b, names, field) for b in message.content]
        else:
            built.append(_build_message(message, field))
    return built


def _build_message(message: Message, field: str) -> dict[str, Any]:
    built = {"role": message.role, "content": _text(message.content), **_images(message.content, field)}
    if thoughts := "".join(b["thinking"] for b in message.content if b["type"] == "thinking"):
        built["thinking"] = thoughts
    if calls := [b for b in message.content if b["type"] == "tool_use"]:
        built["tool_calls"] = [{"id": b["id"], "function": {"name": b["name"], "arguments": b["input"]}} for b in calls]
    return built


def _build_result(block: Block, names: Mapping[str, str], field: str) -> dict[str, Any]:
    """A tool's result. Older versions know the tool by its name, newer ones the call by its id."""
    id, content = block["tool_use_id"], block["content"]
    blocks = [{"type": "text", "text": content}] if isinstance(content, str) else content
    built = {"role": "tool", "content": _text(blocks), "tool_name": names.get(id, id), "tool_call_id": id}
    return built | _images(blocks, field)


def _text(blocks: list[Block]) -> str:
    return "\n\n".join(block_text(b) for b in blocks if b["type"] == "text")


_SAID = frozenset(("text", "image", "thinking", "redacted_thinking", "tool_use"))


def _images(blocks: list[Block], field: str) -> dict[str, Any]:
    """The images among blocks, as the bytes Ollama wants. It fetches nothing, and it reads no documents."""
    for block in blocks:
        if block["type"] not in _SAID:
            raise BadRequest(f"an ollama provider takes no {block['type']} in {field}", param=field)
        if block["type"] == "image" and "data" not in block:
            raise BadRequest(f"an ollama provider takes images in {field} as base64 data only", param=field)
    images = [b["data"] for b in blocks if b["type"] == "image"]
    return {"images": images} if images else {}


def _build_embed(request: Request, model: str, provider: Provider) -> Call:
    if not all(isinstance(i, str) for i in request.inputs):
        raise BadRequest("an ollama provider takes input as text, not as tokens", param="input")
    extra = {"dimensions": request.extra["dimensions"]} if "dimensions" in request.extra else {}
    body = {"model": model, "input": request.inputs, **extra, **_keep_alive(request), **forwarded(request, provider)}
    dropped = [name for name in _dropped(request) if name not in ("dimensions", "encoding_format")]
    return Call("/api/embed", dumps(body).encode(), "ollama_embed", dropped=dropped)


# Answers ----------------------------------------------------------------------------------------------------------------
FINISH = {"stop": "stop", "length": "length", "load": "stop", "unload": "stop"}


def parse(data: bytes, request: Request) -> list[Event]:
    """The events of a whole answer. Raises UpstreamError if the body is none."""
    body = read_object(data)
    if body is None:
        raise malformed("an answer that is not JSON")
    _raise_error(body)
    if request.operation == "embeddings":
        return _embed_events(body)
    if not isinstance(body.get("message"), dict) or body.get("done") is False:
        raise malformed("an answer without an end" if "message" in body else "an answer without a message")
    return Parser().read(body)


class Parser(BlockParser):
    """The events of a line: a piece of thinking or of text, whole tool calls, and in the last one all the numbers."""

    cutter = Lines

    def __init__(self) -> None:
        super().__init__()
        self._begun = False
        self._calls = 0

    def events(self, block: bytes) -> list[Event]:
        line = read_object(block)
        return [Malformed("a line that is not JSON")] if line is None else self.read(line)

    def read(self, line: dict[str, Any]) -> list[Event]:
        """What a line says; a whole answer is the only line there is."""
        _raise_error(line)
        events: list[Event] = [] if self._begun else [Begin(model=_word(line.get("model")))]
        self._begun = True
        message = line.get("message") or {}
        if thought := message.get("thinking"):
            events.append(Reasoning(thought))
        if text := message.get("content"):
            events.append(Text(text))
        events += [self._call(call, line) for call in message.get("tool_calls") or ()]
        return events + self._end(line) if line.get("done") else events

    def _call(self, call: dict[str, Any], line: dict[str, Any]) -> ToolCall:
        index, self._calls = self._calls, self._calls + 1
        name, arguments = call["function"]["name"], call["function"].get("arguments") or {}
        arguments = arguments if isinstance(arguments, str) else dumps(arguments)
        return ToolCall(index, _word(call.get("id")) or _call_id(line, index, name, arguments), name, arguments)

    def _end(self, line: dict[str, Any]) -> list[Event]:
        native = _word(line.get("done_reason")) or "stop"
        reason = FINISH.get(native, "stop")
        finish = Finish("tool_calls" if self._calls and reason == "stop" else reason, native)
        return [*_number_events(line), finish, Done()]


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _call_id(line: dict[str, Any], index: int, name: str, arguments: str) -> str:
    """An id for a call that came without one. Of the same line always the same, of another moment another, so that the
    calls of a long conversation stay apart."""
    what = f"{line.get('created_at')}|{index}|{name}|{arguments}"
    return f"call_{hashlib.sha256(what.encode()).hexdigest()[:24]}"


def _number_events(line: dict[str, Any]) -> list[Event]:
    events: list[Event] = []
    if "prompt_eval_count" in line or "eval_count" in line:
        events.append(Used(Usage.of(line, input_tokens="prompt_eval_count", output_tokens="eval_count")))
    told = {name: count(line[path]) / 1e6 for name, path in _DURATIONS.items() if path in line}
    return [*events, Timings(**told)] if told else events


_DURATIONS = {"load_ms": "load_duration", "prefill_ms": "prompt_eval_duration", "decode_ms": "eval_duration"}
"""Our milliseconds <- Ollama's nanoseconds."""


def _embed_events(body: dict[str, Any]) -> list[Event]:
    vectors = body.get("embeddings")
    if not isinstance(vectors, list):
        raise malformed("an answer without embeddings")
    return [Begin(model=_word(body.get("model"))), Vectors(vectors), *_number_events(body)]


def _raise_error(body: dict[str, Any]) -> None:
    if body.get("error"):
        raise UpstreamError("the provider reported an error in its answer", code="upstream_in_band_error", retryable=True,
                            detail=parse_error(body))  # fmt: skip


def parse_error(body: dict[str, Any]) -> dict[str, Any] | None:
    """The message of Ollama's error object, keys scrubbed; None if it is none. (Proxies before it wrap it like OpenAI.)"""
    error = body.get("error")
    text = dig(error, "message") if isinstance(error, dict) else error
    return {"message": telemetry.scrub(text)} if isinstance(text, str) else None
