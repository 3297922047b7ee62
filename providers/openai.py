"""OpenAI Chat Completions: the client face and the upstream face of `/v1/chat/completions`, its SSE and its errors; and
`/v1/embeddings`.

Most providers and local servers speak it, with fields of their own. So where both sides speak it nothing is rebuilt: the
client's bytes go on with another `model`, the provider's come back as they came.
"""

from __future__ import annotations

import array
import base64
import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import telemetry
from providers import (
    ROUTER_FIELDS,
    SHAPE_ERRORS,
    Answer,
    BadRequest,
    Begin,
    Block,
    BlockParser,
    Body,
    Call,
    Done,
    Event,
    Finish,
    Malformed,
    Message,
    Provider,
    Reasoning,
    Request,
    RequestError,
    Stamp,
    Text,
    Timings,
    Tool,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
    Vectors,
    amount,
    block_text,
    dig,
    dumps,
    event_data,
    malformed,
    read_field,
    read_object,
    read_strings,
    router_fields,
    sse,
)  # fmt: skip

OPERATIONS = ("embeddings",)
EFFORTS = {"none": 0, "minimal": 1024, "low": 4096, "medium": 16384, "high": 32768, "xhigh": 65536, "max": 131072}
"""reasoning_effort <-> tokens the model may think."""


# The client face: requests --------------------------------------------------------------------------------------------
def parse_request(body: Body, headers: Mapping[str, str]) -> Request:
    """A chat request in the router's words. Raises BadRequest naming the field that cannot be."""
    data = body.data
    request = _begin(body, headers)
    for name, (attribute, types, what) in _PLAIN.items():
        value = read_field(data, name, types, what)
        if value is not None:
            setattr(request, attribute, value)
    request.include_usage = bool(dig(read_field(data, "stream_options", dict, "an object"), "include_usage"))
    request.stop = read_strings(request.stop, "stop")
    if not 1 <= request.n <= 128:
        raise BadRequest("n must lie between 1 and 128", param="n")
    _read_messages(data, request)
    request.tools = [_tool(t, f"tools[{i}]") for i, t in enumerate(read_field(data, "tools", list, "a list") or [])]
    functions = read_field(data, "functions", list, "a list") or []
    request.tools += [_function(f, f"functions[{i}]", {}) for i, f in enumerate(functions)]
    _read_choice(data, request)
    request.response_format = _response_format(data.get("response_format"))
    request.reasoning = _reasoning(data)
    request.extra = {k: v for k, v in data.items() if k not in _KNOWN and v is not None}
    return request


def parse_embeddings(body: Body, headers: Mapping[str, str]) -> Request:
    """An embeddings request in the router's words; its text stands in a message, too, for whoever wants to read it."""
    data = body.data
    request = _begin(body, headers)
    request.operation, request.inputs = "embeddings", _inputs(data.get("input"))
    texts: list[Block] = [{"type": "text", "text": i} for i in request.inputs if isinstance(i, str)]
    request.messages = [Message("user", texts)]
    request.user = read_field(data, "user", str, "a string")
    if read_field(data, "encoding_format", str, "a string") not in (None, "float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    read_field(data, "dimensions", int, "a whole number")
    known = ROUTER_FIELDS | {"model", "input", "user"}
    request.extra = {k: v for k, v in data.items() if k not in known and v is not None}
    return request


def _begin(body: Body, headers: Mapping[str, str]) -> Request:
    model = read_field(body.data, "model", str, "a string", required=True)
    if not model:
        raise BadRequest("model must not be empty", param="model")
    return Request("openai", body, model, router=router_fields(body.data, headers))


def _inputs(told: Any) -> list[Any]:
    """One text or list of token numbers per vector wanted."""
    inputs = [told] if isinstance(told, str) or _is_tokens(told) else told
    if not isinstance(inputs, list) or not inputs or not all(isinstance(i, str) or _is_tokens(i) for i in inputs):
        raise BadRequest("input must be a string, a list of strings, or tokens, and not empty", param="input")
    return inputs


def _is_tokens(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(t) is int for t in value)


_NUMBER, _WHOLE = (int, float), int
_PLAIN: dict[str, tuple[str, Any, str]] = {
    "stream": ("stream", bool, "true or false"),
    "max_tokens": ("max_tokens", _WHOLE, "a whole number"),
    "max_completion_tokens": ("max_tokens", _WHOLE, "a whole number"),
    "temperature": ("temperature", _NUMBER, "a number"),
    "top_p": ("top_p", _NUMBER, "a number"),
    "top_k": ("top_k", _WHOLE, "a whole number"),
    "seed": ("seed", _WHOLE, "a whole number"),
    "stop": ("stop", (str, list), "a string or a list of strings"),
    "n": ("n", _WHOLE, "a whole number"),
    "presence_penalty": ("presence_penalty", _NUMBER, "a number"),
    "frequency_penalty": ("frequency_penalty", _NUMBER, "a number"),
    "parallel_tool_calls": ("parallel_tool_calls", bool, "true or false"),
    "user": ("user", str, "a string"),
    "metadata": ("metadata", dict, "an object"),
    "service_tier": ("service_tier", str, "a string"),
}
_KNOWN = ROUTER_FIELDS | frozenset(_PLAIN) | frozenset((
    "model", "messages", "tools", "tool_choice", "functions", "function_call", "response_format", "reasoning_effort",
    "reasoning", "stream_options",
))  # fmt: skip


def _reasoning(data: Mapping[str, Any]) -> int | None:
    """Tokens the model may think; OpenRouter's `reasoning` object says it as an effort or as a number."""
    effort = data.get("reasoning_effort") or dig(data, "reasoning.effort")
    tokens = dig(data, "reasoning.max_tokens")
    return EFFORTS.get(effort) if isinstance(effort, str) else tokens if type(tokens) is int else None


def _read_messages(data: Mapping[str, Any], request: Request) -> None:
    messages = read_field(data, "messages", list, "a list", required=True)
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    names: dict[str, str] = {}
    for i, m in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            raise BadRequest(f"{place} must be an object with a role", param=place)
        read = _ROLES.get(m["role"])
        if read is None:
            raise BadRequest(f"{place}.role: unknown role {m['role'][:40]!r}", param=f"{place}.role")
        _read_message(read(_with_ids(m, i, names), place), request)
        unsaid = ("name",) if m["role"] != "function" else ()
        request.dropped += [f"messages.{k}" for k in (*unsaid, "audio") if m.get(k) and f"messages.{k}" not in request.dropped]


def _read_message(message: Message, request: Request) -> None:
    last = request.messages[-1] if request.messages else None
    if message.role == "system" and last is None:
        request.system += message.content
    elif message.role == "tool" and last is not None and last.role == "tool":
        last.content += message.content
    else:
        request.messages.append(message)


def _with_ids(m: Mapping[str, Any], index: int, names: dict[str, str]) -> Mapping[str, Any]:
    """The message with ids for calls and results of the legacy kind, which know each other by name; `names` remembers."""
    call = m.get("function_call")
    if isinstance(call, dict):
        id = names[str(call.get("name"))] = f"call_{index}"
        return {**m, "tool_calls": [{"id": id, "type": "function", "function": call}]}
    if m["role"] == "function":
        return {**m, "tool_call_id": names.get(str(m.get("name")), m.get("name"))}
    return m


def _content(m: Mapping[str, Any], place: str) -> list[Block]:
    content = m.get("content")
    if content is None:
        return []
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{place}.content must be a string or a list of parts", param=f"{place}.content")
    return [_part(p, f"{place}.content[{i}]") for i, p in enumerate(content)]


def _part(part: Any, place: str) -> Block:
    kind = part.get("type") if isinstance(part, dict) else None
    read = _PARTS.get(kind) if isinstance(kind, str) else None
    if read is None:
        raise BadRequest(f"{place}.type: unknown part", param=f"{place}.type")
    return {**read(part, place), **{k: part[k] for k in ("cache_control",) if part.get(k) is not None}}


def _text_part(part: Mapping[str, Any], place: str) -> Block:
    text = read_field(part, part["type"], str, "a string", required=True, place=place)
    return {"type": "text", "text": text}


def _image_part(part: Mapping[str, Any], place: str) -> Block:
    told = part.get("image_url")
    image = {"url": told} if isinstance(told, str) else told if isinstance(told, dict) else {}
    url = read_field(image, "url", str, "a string", required=True, place=f"{place}.image_url")
    return {**image_block(url), **({"detail": image["detail"]} if image.get("detail") else {})}


def _audio_part(part: Mapping[str, Any], place: str) -> Block:
    audio = read_field(part, "input_audio", dict, "an object", required=True, place=place)
    return {"type": "audio", **{k: audio[k] for k in ("data", "format") if k in audio}}


def _file_part(part: Mapping[str, Any], place: str) -> Block:
    return document_block(read_field(part, "file", dict, "an object", required=True, place=place))


_PARTS: dict[str, Callable[[Mapping[str, Any], str], Block]] = {
    "text": _text_part, "refusal": _text_part, "image_url": _image_part, "input_audio": _audio_part, "file": _file_part,
}  # fmt: skip


def image_block(url: str) -> Block:
    """An image by its URL; a base64 data: URL (RFC 2397) is taken apart."""
    head, comma, data = url.partition(",")
    if head.startswith("data:") and head.endswith(";base64") and comma:
        return {"type": "image", "media_type": head[5:-7].partition(";")[0] or "image/png", "data": data}
    return {"type": "image", "url": url}


def document_block(file: Mapping[str, Any]) -> Block:
    """A file as a document: by its bytes (media_type, data), its URL or the id under which its vendor keeps it."""
    block: Block = {"type": "document", **{k: file[k] for k in ("file_id", "url") if isinstance(file.get(k), str)}}
    if isinstance(data := file.get("file_data"), str):
        found = image_block(data)
        kind = "text/plain" if str(file.get("filename")).endswith((".txt", ".md")) else "application/pdf"
        block |= {"media_type": found.get("media_type", kind), "data": found.get("data", data)}
    return {**block, **({"title": file["filename"]} if isinstance(file.get("filename"), str) else {})}


def _system(m: Mapping[str, Any], place: str) -> Message:
    return Message("system", _content(m, place))


def _user(m: Mapping[str, Any], place: str) -> Message:
    return Message("user", _content(m, place))


def _assistant(m: Mapping[str, Any], place: str) -> Message:
    thought = m.get("reasoning_content") or m.get("reasoning")
    blocks: list[Block] = [{"type": "thinking", "thinking": thought}] if isinstance(thought, str) and thought else []
    blocks += _content(m, place)
    if isinstance(m.get("refusal"), str):
        blocks.append({"type": "text", "text": m["refusal"]})
    calls = read_field(m, "tool_calls", list, "a list", place=place) or []
    blocks += [_tool_use(c, f"{place}.tool_calls[{i}]") for i, c in enumerate(calls)]
    return Message("assistant", blocks)


def _tool_use(call: Any, place: str) -> Block:
    id = str(dig(call, "id") or place)
    name, text = dig(call, "custom.name"), dig(call, "custom.input")
    if isinstance(name, str) and isinstance(text, str):
        return {"type": "tool_use", "id": id, "name": name, "input": {"input": text}}
    name, arguments = dig(call, "function.name"), dig(call, "function.arguments")
    if not isinstance(name, str) or not isinstance(arguments, (str, type(None))):
        raise BadRequest(f"{place} must be a function call with name and arguments", param=place)
    return tool_use_block(id, name, arguments or "")


def tool_use_block(id: str, name: str, arguments: str) -> Block:
    """A tool call; arguments that are no JSON object (models do that) are kept as text beside an empty input."""
    value = read_object(arguments.encode("utf-8", "surrogatepass")) if arguments.strip() else {}
    block: Block = {"type": "tool_use", "id": id, "name": name, "input": value or {}}
    return block if value is not None else {**block, "arguments": arguments}


def _tool_result(m: Mapping[str, Any], place: str) -> Message:
    id = read_field(m, "tool_call_id", str, "a string", required=True, place=place)
    content = m.get("content")
    plain = content if isinstance(content, str) else _content(m, place) or ""
    return Message("tool", [{"type": "tool_result", "tool_use_id": id, "content": plain}])


_ROLES: dict[str, Callable[[Mapping[str, Any], str], Message]] = {
    "system": _system, "developer": _system, "user": _user, "assistant": _assistant, "tool": _tool_result,
    "function": _tool_result,
}  # fmt: skip


def _tool(tool: Any, place: str) -> Tool:
    if not isinstance(tool, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    kind = tool.get("type", "function")
    if kind == "function":
        return _function(tool.get("function"), f"{place}.function", {})
    if kind == "custom":
        return _custom(read_field(tool, "custom", dict, "an object", required=True, place=place), f"{place}.custom")
    return Tool(str(kind), extra=dict(tool))


def _function(told: Any, place: str, extra: dict[str, Any]) -> Tool:
    function = told if isinstance(told, dict) else {}
    name = read_field(function, "name", str, "a string", required=True, place=place)
    described = read_field(function, "description", str, "a string", place=place)
    parameters = read_field(function, "parameters", dict, "an object", place=place) or {}
    more = {k: v for k, v in function.items() if k not in ("name", "description", "parameters", "type") and v is not None}
    return Tool(name, described, parameters, {**more, **extra})


def _custom(custom: dict[str, Any], place: str) -> Tool:
    """A tool that takes free text: elsewhere a function with one string, and its grammar is told in words."""
    grammar = dig(custom, "format.grammar.definition")
    told = [custom.get("description"), f"The input follows this grammar:\n{grammar}" if grammar else None]
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    described = {"name": custom.get("name"), "description": "\n\n".join(t for t in told if t) or None, "parameters": schema}
    return _function(described, place, {"custom": custom})


def _read_choice(data: Mapping[str, Any], request: Request) -> None:
    """How tools are chosen; where only some are allowed, the others are as if they had not been given."""
    choice = data.get("tool_choice", data.get("function_call"))
    allowed = dig(choice, "allowed_tools.tools")
    if isinstance(allowed, list):
        names = [dig(t, "function.name") or dig(t, "custom.name") for t in allowed]
        request.tools = [t for t in request.tools if t.name in names]
    request.tool_choice = _tool_choice(choice)


def _tool_choice(choice: Any) -> str | None:
    if choice is None or choice in ("auto", "none", "required"):
        return choice  # type: ignore[no-any-return]
    name = dig(choice, "function.name") or dig(choice, "custom.name") or dig(choice, "name")
    if isinstance(name, str):
        return f"tool:{name}"
    mode = dig(choice, "allowed_tools.mode")
    if mode in ("auto", "required"):
        return str(mode)
    raise BadRequest("tool_choice must be auto, none, required or name a function", param="tool_choice")


def _response_format(form: Any) -> dict[str, Any] | None:
    kind = form.get("type") if isinstance(form, dict) else form
    if kind in (None, "text"):
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    told = dig(form, "json_schema")
    if kind == "json_schema" and isinstance(dig(told, "schema"), dict):
        return {"type": kind, "name": told.get("name") or "answer", "schema": told["schema"], "strict": told.get("strict")}
    raise BadRequest("response_format must be text, json_object or json_schema with a schema", param="response_format")


# The client face: answers ---------------------------------------------------------------------------------------------
def render(answer: Answer, request: Request, stamp: Stamp) -> dict[str, Any]:
    """A chat.completion object with every field that the published schema requires."""
    choices = [_choice(answer, index, "".join(text)) for index, text in sorted(answer.choices.items())]
    rendered = {
        "id": stamp.id,
        "object": "chat.completion",
        "created": stamp.created,
        "model": stamp.model,
        "choices": choices,
    }
    return {**rendered, "usage": render_usage(answer.usage)} if answer.usage else rendered


def _choice(answer: Answer, index: int, text: str) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
    if index == 0 and answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if index == 0 and answer.tool_calls:
        message["tool_calls"] = [_call(c) for _, c in sorted(answer.tool_calls.items())]
    elif not text:
        message["content"] = ""
    reason = answer.finish.reason if answer.finish else "stop"
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id or f"call_{call.index}",
        "type": "function",
        "function": {"name": call.name or "", "arguments": call.arguments},
    }


def render_usage(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's names; input includes cached tokens, output includes reasoning."""
    rendered = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens, "audio_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0,
                                      "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }  # fmt: skip
    return {**rendered, "cost": usage.cost} if usage.cost is not None else rendered


class Renderer:
    """A stream for an OpenAI client: role first, one id and time for all chunks, usage only if asked for, [DONE]."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._head = {
            "id": f"chatcmpl-{stamp.id}",
            "object": "chat.completion.chunk",
            "created": stamp.created,
            "model": stamp.model,
        }
        self._usage: Usage | None = None
        self._include_usage = request.include_usage
        self._begun: set[int] = set()

    def feed(self, event: Event) -> bytes:
        """What the client gets to read of this event, b"" for what has no place in this dialect."""
        if isinstance(event, Begin) and event.model:
            self._head["model"] = event.model
        if isinstance(event, Used):
            self._usage = event.usage
        render = _DELTAS.get(type(event))
        if render is None:
            return b""
        delta = render(event)
        choice = getattr(event, "choice", 0)
        reason = event.reason if isinstance(event, Finish) else None
        if choice not in self._begun:
            self._begun.add(choice)
            delta = {"role": "assistant", "content": "", **delta}
        return self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def end(self) -> bytes:
        """The end of a complete answer."""
        usage = self._usage or Usage()
        tail = self._chunk([], usage=render_usage(usage)) if self._include_usage else b""
        return tail + b"data: [DONE]\n\n"

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        return sse(dumps({**self._head, "choices": choices, **more}))


def _delta_tool(event: ToolCall) -> dict[str, Any]:
    call: dict[str, Any] = {"index": event.index}
    if event.name is not None:
        call |= {"id": event.id or f"call_{event.index}", "type": "function"}
    call["function"] = {**({"name": event.name} if event.name is not None else {}), "arguments": event.arguments}
    return {"tool_calls": [call]}


_DELTAS: dict[type, Callable[[Any], dict[str, Any]]] = {
    Begin: lambda e: {},
    Text: lambda e: {"content": e.text},
    Reasoning: lambda e: {"reasoning_content": e.text} if e.text else {},
    ToolCall: _delta_tool,
    Finish: lambda e: {},
}


def hides(events: list[Event], request: Request) -> bool:
    """Is this block of a same-language stream the usage report that only the router asked for?"""
    return not request.include_usage and bool(events) and all(isinstance(e, (Used, Timings)) for e in events)


_TYPES = {
    "authentication": "authentication_error", "permission": "permission_error", "rate_limit": "rate_limit_error",
    "overloaded": "server_error", "upstream": "api_error", "timeout": "timeout_error", "internal": "server_error",
}  # fmt: skip


def render_error(error: RequestError) -> dict[str, Any]:
    """The error object; what an upstream itself said of a bad request is passed on in its words, without our `src`."""
    detail = getattr(error, "detail", None)
    kind = _TYPES.get(error.kind, "invalid_request_error")
    if detail:
        return {"error": {"message": error.message, "type": kind, "param": None, "code": None, **detail}}
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code, "src": error.src}}


def render_stream_error(error: RequestError) -> bytes:
    """The error as the last event of a stream; no [DONE] follows, so nobody takes the answer for complete."""
    return sse(dumps(render_error(error)))


# The upstream face ----------------------------------------------------------------------------------------------------
def endpoint(base_url: str) -> str:
    """The URL that paths are appended to. A bare host gets /v1, as its own clients would; a full path is cut back."""
    url = base_url.rstrip("/").removesuffix("/chat/completions")
    return url if url.count("/") > 2 else url + "/v1"


def credentials(key: str) -> dict[str, str]:
    """The header that carries the provider's key."""
    return {"authorization": f"Bearer {key}"}


def build(request: Request, model: str, provider: Provider) -> Call:
    """The request to an openai-format provider: the client's own bytes where it spoke OpenAI, else rebuilt."""
    kind = "openai_stream" if request.stream else "openai_chat"
    if request.format != "openai":
        body, dropped = _rebuild(request, model)
        return Call("/chat/completions", dumps(body).encode(), kind, dropped=dropped)
    changes: dict[str, Any] = {"model": model}
    if request.stream:
        options = request.body.data.get("stream_options")
        changes["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    kept = {"trace", "session_id"} if provider.forward_metadata else set()
    return Call("/chat/completions", request.body.with_fields(changes, ROUTER_FIELDS - kept), kind)


def _rebuild(request: Request, model: str) -> tuple[dict[str, Any], list[str]]:
    body: dict[str, Any] = {"model": model, "messages": _build_messages(request)}
    for name in (
        "temperature",
        "top_p",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "user",
        "metadata",
        "service_tier",
    ):
        if (value := getattr(request, name)) is not None:
            body[name] = value
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.stop:
        body["stop"] = request.stop
    if request.n != 1:
        body["n"] = request.n
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if request.tools:
        body["tools"] = [_build_tool(t) for t in request.tools]
    if request.tool_choice is not None and request.tools:
        body["tool_choice"] = _build_choice(request.tool_choice)
    if request.parallel_tool_calls is not None and request.tools:
        body["parallel_tool_calls"] = request.parallel_tool_calls
    if request.response_format:
        body["response_format"] = _build_format(request.response_format)
    if request.reasoning is not None:
        body["reasoning_effort"] = effort(request.reasoning)
    return body, [name for name in ("top_k",) if getattr(request, name) is not None]


def effort(tokens: int) -> str:
    """The reasoning_effort that allows about as many tokens of thinking."""
    return next((name for name, budget in EFFORTS.items() if tokens <= budget), "high")


def _build_messages(request: Request) -> list[dict[str, Any]]:
    built: list[dict[str, Any]] = []
    if request.system:
        built.append({"role": "system", "content": "\n\n".join(b["text"] for b in request.system)})
    for message in request.messages:
        built += _BUILD.get(message.role, _build_plain)(message)
    return built


def _build_plain(message: Message) -> list[dict[str, Any]]:
    texts = [b for b in message.content if b["type"] == "text"]
    if len(texts) == len(message.content):
        return [{"role": message.role, "content": "\n\n".join(b["text"] for b in texts)}]
    return [{"role": message.role, "content": [_build_part(b) for b in message.content]}]


def _build_part(block: Block) -> dict[str, Any]:
    if block["type"] == "image":
        url = block.get("url") or f"data:{block['media_type']};base64,{block['data']}"
        return {
            "type": "image_url",
            "image_url": {"url": url, **({"detail": block["detail"]} if "detail" in block else {})},
        }
    if block["type"] == "text":
        return {"type": "text", "text": block["text"]}
    kind = {"audio": "input_audio", "document": "file"}.get(block["type"])
    if kind is None:
        raise BadRequest(f"an openai-format provider takes no {block['type']} block", param="messages")
    return {"type": kind, kind: {k: v for k, v in block.items() if k != "type"}}


def _build_assistant(message: Message) -> list[dict[str, Any]]:
    texts = [b["text"] for b in message.content if b["type"] == "text"]
    thoughts = [b["thinking"] for b in message.content if b["type"] == "thinking"]
    calls = [b for b in message.content if b["type"] == "tool_use"]
    built: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts) if texts else None}
    if thoughts:
        built["reasoning_content"] = "".join(thoughts)
    if calls:
        built["tool_calls"] = [_call(ToolCall(i, c["id"], c["name"], arguments_text(c))) for i, c in enumerate(calls)]
    return [built]


def arguments_text(block: Block) -> str:
    """The arguments of a tool_use block as JSON text."""
    return str(block["arguments"]) if "arguments" in block else json.dumps(block["input"])


def _build_results(message: Message) -> list[dict[str, Any]]:
    built = []
    for block in message.content:
        content = block["content"]
        if not isinstance(content, str):
            content = "\n".join(b["text"] for b in content if b["type"] == "text")
        built.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": content})
    return built


_BUILD = {"assistant": _build_assistant, "tool": _build_results}


def _build_tool(tool: Tool) -> dict[str, Any]:
    described = {"description": tool.description} if tool.description else {}
    strict = {"strict": tool.extra["strict"]} if "strict" in tool.extra else {}
    return {"type": "function", "function": {"name": tool.name, **described, "parameters": tool.parameters, **strict}}


def _build_choice(choice: str) -> Any:
    return {"type": "function", "function": {"name": choice[5:]}} if choice.startswith("tool:") else choice


def _build_format(form: dict[str, Any]) -> dict[str, Any]:
    if form["type"] == "json_object":
        return {"type": "json_object"}
    strict = {"strict": form["strict"]} if form.get("strict") is not None else {}
    return {"type": "json_schema", "json_schema": {"name": form["name"], "schema": form["schema"], **strict}}


FINISH = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
    "content_filter": "content_filter",
}


def parse(data: bytes, request: Request) -> list[Event]:
    """The events of a whole answer. Raises UpstreamError if the body is none."""
    body = read_object(data)
    if body is None:
        raise malformed("an answer that is not JSON")
    _raise_error(body)
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(dig(c, "message"), dict) for c in choices):
        raise malformed("an answer without choices")
    events: list[Event] = [Begin(_text(body.get("id")), _text(body.get("model")))]
    for i, choice in enumerate(choices):
        events += _message_events(choice["message"], i)
        events += _finish_events(choice, i)
    return events + _usage_events(body)


class Parser(BlockParser):
    """The events of a stream of chat.completion.chunk."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    def events(self, block: bytes) -> list[Event]:
        _, data = event_data(block)
        if data is None:
            return []
        if data.strip() == b"[DONE]":
            return [Done()]
        chunk = read_object(data)
        if chunk is None:
            return [Malformed("a chunk that is not JSON")]
        _raise_error(chunk)
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events.append(Begin(_text(chunk.get("id")), _text(chunk.get("model"))))
        for choice in chunk.get("choices") or ():
            index = choice.get("index")
            index = index if type(index) is int else 0
            events += _message_events(choice.get("delta") or {}, index)
            if choice.get("finish_reason"):
                events += _finish_events(choice, index)
        return events + _usage_events(chunk) if chunk.get("usage") or "timings" in chunk else events


def _raise_error(body: dict[str, Any]) -> None:
    if body.get("error"):
        raise UpstreamError("the provider reported an error in its answer", code="upstream_in_band_error", retryable=True,
                            detail=parse_error(body))  # fmt: skip


def parse_error(body: dict[str, Any]) -> dict[str, Any] | None:
    """message, type, param and code of an upstream's error object, keys scrubbed; None if it is none."""
    error = body.get("error")
    if isinstance(error, str):
        return {"message": telemetry.scrub(error)}
    if not isinstance(error, dict) or not isinstance(error.get("message"), str):
        return None
    known = {k: error[k] for k in ("message", "type", "param", "code") if isinstance(error.get(k), (str, int))}
    return {k: telemetry.scrub(v) if isinstance(v, str) else v for k, v in known.items()}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _message_events(message: dict[str, Any], choice: int) -> list[Event]:
    """The events of a whole message or of a delta: the two have the same shape."""
    events: list[Event] = []
    thought = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(thought, str) and thought:
        events.append(Reasoning(thought))
    content = message.get("content") or message.get("refusal")
    if isinstance(content, str) and content:
        events.append(Text(content, choice))
    elif isinstance(content, list):
        events += [Text(p["text"], choice) for p in content if isinstance(dig(p, "text"), str)]
    for i, call in enumerate(message.get("tool_calls") or ()):
        function, index = call.get("function") or {}, call.get("index")
        arguments = function.get("arguments")
        events.append(ToolCall(index if type(index) is int else i, _text(call.get("id")), _text(function.get("name")),
                               arguments if isinstance(arguments, str) else ""))  # fmt: skip
    return events


def _finish_events(choice: dict[str, Any], index: int) -> list[Event]:
    native = choice.get("finish_reason")
    if not isinstance(native, str):
        return []
    return [Finish(FINISH.get(native, "stop"), native, choice=index)]


def _usage_events(body: dict[str, Any]) -> list[Event]:
    events: list[Event] = []
    if isinstance(body.get("usage"), dict):
        usage = Usage.of(
            body["usage"], input_tokens="prompt_tokens", output_tokens="completion_tokens",
            cached_input_tokens="prompt_tokens_details.cached_tokens",
            cache_write_input_tokens="prompt_tokens_details.cache_write_tokens",
            reasoning_tokens="completion_tokens_details.reasoning_tokens",
        )  # fmt: skip
        usage.cost = amount(body["usage"].get("cost"))
        events.append(Used(usage))
    if isinstance(timings := body.get("timings"), dict):  # llama.cpp's own
        events.append(Timings(prefill_ms=amount(timings.get("prompt_ms")), decode_ms=amount(timings.get("predicted_ms"))))
    return events
