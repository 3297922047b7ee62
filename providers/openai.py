"""OpenAI Chat Completions: the client face and the upstream face of `/v1/chat/completions`, its SSE and its errors.

Most providers and local servers speak it, with fields of their own. So where both sides speak it nothing is rebuilt: the
client's bytes go on with another `model`, the provider's come back as they came.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import telemetry
from providers import (
    ROUTER_FIELDS,
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
    amount,
    dig,
    dumps,
    event_data,
    malformed,
    read_object,
    router_fields,
    sse,
)  # fmt: skip

EFFORTS = {"none": 0, "minimal": 1024, "low": 4096, "medium": 16384, "high": 32768, "xhigh": 65536}
"""reasoning_effort <-> tokens the model may think."""


# The client face: requests --------------------------------------------------------------------------------------------
def parse_request(body: Body, headers: Mapping[str, str]) -> Request:
    """A chat request in the router's words. Raises BadRequest naming the field that cannot be."""
    data = body.data
    request = Request("openai", body, _field(data, "model", str, "a string"), router=router_fields(data, headers))
    if not request.model:
        raise BadRequest("model must not be empty", param="model")
    for name, (attribute, types, what) in _PLAIN.items():
        value = _field(data, name, types, what, required=False)
        if value is not None:
            setattr(request, attribute, value)
    request.stream = bool(request.stream)
    request.include_usage = bool(dig(data, "stream_options.include_usage"))
    request.stop = [request.stop] if isinstance(request.stop, str) else _strings(request.stop, "stop")
    if not 1 <= request.n <= 128:
        raise BadRequest("n must lie between 1 and 128", param="n")
    _read_messages(data, request)
    request.tools = [_tool(t, i) for i, t in enumerate(_field(data, "tools", list, "a list", required=False) or [])]
    request.tool_choice = _tool_choice(data.get("tool_choice"))
    request.response_format = _response_format(data.get("response_format"))
    effort = data.get("reasoning_effort") or dig(data, "reasoning.effort")
    request.reasoning = EFFORTS.get(effort) if isinstance(effort, str) else None
    request.extra = {k: v for k, v in data.items() if k in _EXTRA and v is not None}
    return request


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
_EXTRA = frozenset(("logprobs", "top_logprobs", "logit_bias", "modalities", "audio", "prediction", "store", "verbosity",
                    "web_search_options", "prompt_cache_key", "safety_identifier", "functions", "function_call"))  # fmt: skip


def _field(data: Mapping[str, Any], name: str, types: Any, what: str, *, required: bool = True) -> Any:
    value = data.get(name)
    if value is None and not required:
        return None
    wrong_bool = isinstance(value, bool) and types is not bool
    if value is None or wrong_bool or not isinstance(value, types):
        raise BadRequest(f"{name} {'is required' if value is None else f'must be {what}'}", param=name)
    return value


def _strings(values: list[Any], name: str) -> list[str]:
    if not all(isinstance(v, str) for v in values):
        raise BadRequest(f"{name} must be a list of strings", param=name)
    return values


def _read_messages(data: Mapping[str, Any], request: Request) -> None:
    messages = _field(data, "messages", list, "a list")
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    for i, m in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            raise BadRequest(f"{place} must be an object with a role", param=place)
        read = _ROLES.get(m["role"])
        if read is None:
            raise BadRequest(f"{place}.role: unknown role {m['role'][:40]!r}", param=f"{place}.role")
        message = read(m, place)
        if message.role == "system" and not request.messages:
            request.system += message.content
        else:
            request.messages.append(message)


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
    if kind in ("text", "refusal"):
        text = part.get(kind)
        if not isinstance(text, str):
            raise BadRequest(f"{place}.{kind} must be a string", param=f"{place}.{kind}")
        return {"type": "text", "text": text, **{k: part[k] for k in ("cache_control",) if k in part}}
    if kind == "image_url":
        url = dig(part, "image_url.url") if isinstance(part.get("image_url"), dict) else part.get("image_url")
        if not isinstance(url, str):
            raise BadRequest(f"{place}.image_url.url must be a string", param=f"{place}.image_url")
        detail = dig(part, "image_url.detail")
        return {**image_block(url), **({"detail": detail} if detail else {})}
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "audio", **part["input_audio"]}
    if kind == "file" and isinstance(part.get("file"), dict):
        return {"type": "document", **part["file"]}
    raise BadRequest(f"{place}.type: unknown part", param=place)


def image_block(url: str) -> Block:
    """An image by its URL; a base64 data: URL (RFC 2397) is taken apart."""
    head, comma, data = url.partition(",")
    if head.startswith("data:") and head.endswith(";base64") and comma:
        return {"type": "image", "media_type": head[5:-7] or "image/png", "data": data}
    return {"type": "image", "url": url}


def _system(m: Mapping[str, Any], place: str) -> Message:
    return Message("system", _content(m, place))


def _user(m: Mapping[str, Any], place: str) -> Message:
    return Message("user", _content(m, place))


def _assistant(m: Mapping[str, Any], place: str) -> Message:
    thought = m.get("reasoning_content")
    blocks: list[Block] = [{"type": "thinking", "thinking": thought}] if isinstance(thought, str) and thought else []
    blocks += _content(m, place)
    if isinstance(m.get("refusal"), str):
        blocks.append({"type": "text", "text": m["refusal"]})
    calls = m.get("tool_calls") or []
    if not isinstance(calls, list):
        raise BadRequest(f"{place}.tool_calls must be a list", param=f"{place}.tool_calls")
    blocks += [_tool_use(c, f"{place}.tool_calls[{i}]") for i, c in enumerate(calls)]
    return Message("assistant", blocks)


def _tool_use(call: Any, place: str) -> Block:
    name, arguments = dig(call, "function.name"), dig(call, "function.arguments")
    if not isinstance(name, str) or not isinstance(arguments, (str, type(None))):
        raise BadRequest(f"{place} must be a function call with name and arguments", param=place)
    return tool_use_block(str(call.get("id") or ""), name, arguments or "")


def tool_use_block(id: str, name: str, arguments: str) -> Block:
    """A tool call; arguments that are no JSON object (models do that) are kept as text beside an empty input."""
    value = read_object(arguments.encode("utf-8", "surrogatepass")) if arguments.strip() else {}
    block: Block = {"type": "tool_use", "id": id, "name": name, "input": value or {}}
    return block if value is not None else {**block, "arguments": arguments}


def _tool_result(m: Mapping[str, Any], place: str) -> Message:
    id = m.get("tool_call_id") or m.get("name")
    if not isinstance(id, str):
        raise BadRequest(f"{place}.tool_call_id must be a string", param=f"{place}.tool_call_id")
    blocks = _content(m, place)
    plain = blocks[0]["text"] if len(blocks) == 1 and isinstance(m.get("content"), str) else blocks
    return Message("tool", [{"type": "tool_result", "tool_use_id": id, "content": plain}])


_ROLES: dict[str, Callable[[Mapping[str, Any], str], Message]] = {
    "system": _system, "developer": _system, "user": _user, "assistant": _assistant, "tool": _tool_result,
    "function": _tool_result,
}  # fmt: skip


def _tool(tool: Any, index: int) -> Tool:
    place = f"tools[{index}]"
    if not isinstance(tool, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    if tool.get("type", "function") != "function":
        return Tool(str(dig(tool, f"{tool['type']}.name") or tool["type"]), extra=dict(tool))
    f = tool.get("function")
    if not isinstance(f, dict) or not isinstance(f.get("name"), str):
        raise BadRequest(f"{place}.function.name is required", param=f"{place}.function.name")
    parameters, known = f.get("parameters") or {}, ("name", "description", "parameters")
    if not isinstance(parameters, dict):
        raise BadRequest(f"{place}.function.parameters must be an object", param=f"{place}.function.parameters")
    return Tool(f["name"], f.get("description"), parameters, {k: v for k, v in f.items() if k not in known})


def _tool_choice(choice: Any) -> str | None:
    if choice is None or choice in ("auto", "none", "required"):
        return choice  # type: ignore[no-any-return]
    name = dig(choice, "function.name")
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
    schema = dig(form, "json_schema.schema")
    if kind == "json_schema" and isinstance(schema, dict):
        told = form["json_schema"]
        return {
            "type": "json_schema",
            "name": told.get("name") or "answer",
            "schema": schema,
            "strict": told.get("strict"),
        }
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
