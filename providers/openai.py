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
    below_one,
    block_text,
    dig,
    dumps,
    event_data,
    forwarded,
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
    for name in [name for name in _PLAIN if name in data]:
        attribute, types, what = _PLAIN[name]
        value = read_field(data, name, types, what)
        if value is not None:
            setattr(request, attribute, value)
    request.include_usage = bool(dig(read_field(data, "stream_options", dict, "an object"), "include_usage"))
    request.bound = below_one(data, "max_tokens", "max_completion_tokens")
    request.stop = read_strings(request.stop, "stop")
    if not 1 <= request.n <= 128:
        raise BadRequest("n must lie between 1 and 128", param="n")
    _read_messages(data, request)
    request.tools = [_tool(t, f"tools[{i}]") for i, t in enumerate(read_field(data, "tools", list, "a list") or [])]
    functions = read_field(data, "functions", list, "a list") or []
    request.tools += [_function(f, f"functions[{i}]") for i, f in enumerate(functions)]
    _read_choice(data, request)
    request.response_format = _response_format(data.get("response_format"))
    request.reasoning = _reasoning(data)
    known = _KNOWN if request.reasoning is not None else _KNOWN - {"reasoning", "reasoning_effort"}
    request.extra = {k: v for k, v in data.items() if k not in known and v is not None}
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
        return _function(tool.get("function"), f"{place}.function")
    if kind == "custom":
        return _custom(read_field(tool, "custom", dict, "an object", required=True, place=place), f"{place}.custom")
    return Tool(str(kind), extra=dict(tool))


def _function(told: Any, place: str) -> Tool:
    function = told if isinstance(told, dict) else {}
    name = read_field(function, "name", str, "a string", required=True, place=place)
    described = read_field(function, "description", str, "a string", place=place)
    parameters = read_field(function, "parameters", dict, "an object", place=place) or {}
    more = {k: v for k, v in function.items() if k not in ("name", "description", "parameters", "type") and v is not None}
    return Tool(name, described, parameters, more)


def _custom(custom: dict[str, Any], place: str) -> Tool:
    """A tool that takes free text: elsewhere a function with one string, and its grammar is told in words."""
    grammar = dig(custom, "format.grammar.definition")
    told = [custom.get("description"), f"The input follows this grammar:\n{grammar}" if grammar else None]
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    described = "\n\n".join(t for t in told if isinstance(t, str)) or None
    return _function({"name": custom.get("name"), "description": described, "parameters": schema, "custom": custom}, place)


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
    """A chat.completion object (or a list of embeddings) with every field that the published schema requires."""
    if request.operation == "embeddings":
        return _render_vectors(answer, request, stamp)
    choices = [_choice(answer, index, "".join(text), request, stamp) for index, text in sorted(answer.choices.items())]
    rendered = {
        "id": f"chatcmpl-{stamp.id}",
        "object": "chat.completion",
        "created": stamp.created,
        "model": stamp.model,
        "choices": choices,
    }
    return {**rendered, "usage": render_usage(answer.usage)} if answer.usage else rendered


def _choice(answer: Answer, index: int, text: str, request: Request, stamp: Stamp) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": text or None, "refusal": None}
    if index == 0 and answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    made = [ToolCall(i, c.id or _made_id(stamp, i), c.name, c.arguments) for i, c in sorted(answer.tool_calls.items())]
    calls = made if index == 0 else []
    if calls:
        message |= _called(calls, request)
    elif not text:
        message["content"] = ""
    reason = _reason(answer.finish, bool(calls), request)
    return {"index": index, "message": message, "logprobs": None, "finish_reason": reason}


def _called(calls: list[ToolCall], request: Request) -> dict[str, Any]:
    """The calls of a message, each in the way in which its tool was told: a function, free text, or the legacy function."""
    if _is_legacy(request):
        return {"function_call": {"name": calls[0].name or "", "arguments": calls[0].arguments or "{}"}}
    custom = _custom_names(request)
    return {"tool_calls": [_custom_call(c) if c.name in custom else _call(c) for c in calls]}


def _made_id(stamp: Stamp, index: int) -> str:
    """An id for a call that came without one: no other answer in the same conversation has it."""
    return f"call_{stamp.id}_{index}"


def _is_legacy(request: Request) -> bool:
    return request.format == "openai" and "functions" in request.body.data and "tools" not in request.body.data


def _custom_names(request: Request) -> set[str]:
    return {t.name for t in request.tools if "custom" in t.extra}


def _call(call: ToolCall) -> dict[str, Any]:
    return {
        "id": call.id or "",
        "type": "function",
        "function": {"name": call.name or "", "arguments": call.arguments or "{}"},
    }


def _custom_call(call: ToolCall) -> dict[str, Any]:
    told = dig(read_object(call.arguments.encode("utf-8", "surrogatepass")), "input")
    text = told if isinstance(told, str) else call.arguments
    return {"id": call.id or "", "type": "custom", "custom": {"name": call.name or "", "input": text}}


def _reason(finish: Finish | None, calls: bool, request: Request) -> str:
    """finish_reason. Some servers say `stop` although a tool is called; agents go on only at tool_calls."""
    reason = finish.reason if finish else "stop"
    if reason in ("stop", "tool_calls"):
        reason = "stop" if not calls else "function_call" if _is_legacy(request) else "tool_calls"
    return reason


def render_usage(usage: Usage) -> dict[str, Any]:
    """Token counts in OpenAI's names; input includes cached tokens, output includes reasoning."""
    rendered = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_input_tokens, "audio_tokens": 0,
                                  "cache_write_tokens": usage.cache_write_input_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens, "audio_tokens": 0,
                                      "accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
    }  # fmt: skip
    return {**rendered, "cost": usage.cost} if usage.cost is not None else rendered


def _render_vectors(answer: Answer, request: Request, stamp: Stamp) -> dict[str, Any]:
    packed = request.extra.get("encoding_format") == "base64"
    data = [{"object": "embedding", "index": i, "embedding": _vector(v, packed)} for i, v in enumerate(answer.vectors)]
    used = answer.usage.input_tokens if answer.usage else 0
    usage = {"prompt_tokens": used, "total_tokens": used}
    return {"object": "list", "data": data, "model": stamp.model, "usage": usage}


def _vector(vector: Any, packed: bool) -> Any:
    """A vector as numbers, or packed: base64 of 32-bit floats, the lowest byte first."""
    if packed == isinstance(vector, str):
        return vector
    numbers = array.array("f", base64.b64decode(vector) if isinstance(vector, str) else vector)
    if sys.byteorder == "big":
        numbers.byteswap()
    return base64.b64encode(numbers.tobytes()).decode() if packed else numbers.tolist()


class Renderer:
    """A stream for an OpenAI client: role first, one id and time for all chunks, usage only if asked for, [DONE]."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._head = {
            "id": f"chatcmpl-{stamp.id}",
            "object": "chat.completion.chunk",
            "created": stamp.created,
            "model": stamp.model,
        }
        self._request, self._stamp = request, stamp
        self._usage: Usage | None = None
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._calls: dict[int, ToolCall] = {}
        self._custom = _custom_names(request)
        self._legacy = _is_legacy(request)

    def feed(self, event: Event) -> bytes:
        """What the client gets to read of this event. Raises UpstreamError for a block that could not be read."""
        take = self._takes.get(type(event))
        return b"" if take is None else take(self, event)

    def end(self) -> bytes:
        """The end of a complete answer; where the provider gave no reason for it, it is the usual one."""
        out = b"" if 0 in self._finished else self._finish(Finish("stop"))
        if self._request.include_usage:
            out += self._chunk([], usage=render_usage(self._usage or Usage()))
        return out + b"data: [DONE]\n\n"

    def _begin(self, event: Begin) -> bytes:
        self._head["model"] = event.model or self._head["model"]
        return self._delta({}, 0)

    def _used(self, event: Used) -> bytes:
        self._usage = event.usage
        return b""

    def _malformed(self, event: Malformed) -> bytes:
        raise malformed(event.what)

    def _text(self, event: Text) -> bytes:
        return self._delta({"content": event.text}, event.choice)

    def _reasoning(self, event: Reasoning) -> bytes:
        return self._delta({"reasoning_content": event.text}) if event.text else b""

    def _tool_call(self, event: ToolCall) -> bytes:
        """A piece of a call: id and name with the first one only, for clients join what comes twice. Free text comes in
        one piece, once its JSON is complete; of legacy calls there can be but one."""
        first = event.index not in self._calls
        id = event.id or _made_id(self._stamp, event.index)
        call = self._calls.setdefault(event.index, ToolCall(event.index, id, event.name))
        if call.name in self._custom:
            call.arguments += event.arguments
            return b""
        call.arguments = call.arguments or event.arguments[:1]
        named = {"name": call.name or ""} if first else {}
        function = {**named, "arguments": event.arguments}
        if self._legacy:
            return self._delta({"function_call": function}) if event.index == min(self._calls) else b""
        head = {"id": call.id, "type": "function"} if first else {}
        piece = {"index": event.index, **head, "function": function}
        return self._delta({"tool_calls": [piece]}) if first or event.arguments else b""

    def _finish(self, event: Finish) -> bytes:
        self._finished.add(event.choice)
        calls = list(self._calls.values()) if event.choice == 0 else []
        out = b"".join(self._last_piece(c) for c in calls if c.name in self._custom or not c.arguments)
        return out + self._delta({}, event.choice, _reason(event, bool(calls), self._request))

    def _last_piece(self, call: ToolCall) -> bytes:
        """What was held back of a call: its free text, or the empty object that stands for no arguments."""
        if self._legacy:
            return self._delta({"function_call": {"arguments": "{}"}}) if call.index == min(self._calls) else b""
        told = _custom_call(call) if call.name in self._custom else {"function": {"arguments": "{}"}}
        return self._delta({"tool_calls": [{"index": call.index, **told}]})

    def _delta(self, delta: dict[str, Any], choice: int = 0, reason: str | None = None) -> bytes:
        """A chunk with a piece of a message; the first of each choice tells the role, and one with nothing to tell is none."""
        if choice not in self._begun:
            self._begun.add(choice)
            delta = {"role": "assistant", "content": "", **delta}
        if not delta and reason is None:
            return b""
        return self._chunk([{"index": choice, "delta": delta, "logprobs": None, "finish_reason": reason}])

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> bytes:
        told = {"usage": None} if self._request.include_usage else {}
        return sse(dumps({**self._head, "choices": choices, **told, **more}))

    _takes: dict[type, Callable[[Renderer, Any], bytes]] = {  # noqa: RUF012 - a dispatch table, never changed
        Begin: _begin, Text: _text, Reasoning: _reasoning, ToolCall: _tool_call, Finish: _finish, Used: _used,
        Malformed: _malformed,
    }  # fmt: skip


def hides(events: list[Event], request: Request) -> bool:
    """Is this block of a same-language stream the usage report that only the router asked for?"""
    return not request.include_usage and bool(events) and all(isinstance(e, (Used, Timings)) for e in events)


_TYPES = {
    "authentication": "authentication_error", "permission": "permission_error", "rate_limit": "rate_limit_error",
    "overloaded": "server_error", "upstream": "api_error", "timeout": "timeout_error", "internal": "server_error",
}  # fmt: skip
_ELSEWHERE = {
    "not_found_error": "invalid_request_error", "request_too_large": "invalid_request_error", "overloaded_error": "server_error",
    "billing_error": "insufficient_quota", "conflict_error": "invalid_request_error",
}  # fmt: skip
"""Error types of other dialects -> what an OpenAI client knows."""


def render_error(error: RequestError) -> dict[str, Any]:
    """The error object; what an upstream itself said of a bad request is passed on in its words, without our `src`."""
    detail = getattr(error, "detail", None)
    kind = _TYPES.get(error.kind, "invalid_request_error")
    if detail:
        said = detail.get("type", kind)
        told = {**detail, "type": _ELSEWHERE.get(said, said)}
        return {"error": {"message": error.message, "param": None, "code": None, **told}}
    return {"error": {"message": error.message, "type": kind, "param": error.param, "code": error.code, "src": error.src}}


def render_stream_error(error: RequestError) -> bytes:
    """The error as the last event of a stream; no [DONE] follows, so nobody takes the answer for complete."""
    return sse(dumps(render_error(error)))


# The upstream face: requests ------------------------------------------------------------------------------------------
def endpoint(base_url: str) -> str:
    """The URL that paths are appended to. A bare host gets /v1, as its own clients would; a full path is cut back."""
    url = base_url.rstrip("/").removesuffix("/chat/completions")
    return url if url.count("/") > 2 else url + "/v1"


def credentials(key: str) -> dict[str, str]:
    """The header that carries the provider's key."""
    return {"authorization": f"Bearer {key}"}


def models_call() -> Call:
    """Asks for the models that are served."""
    return Call("/models", b"", "list_models", method="GET")


def parse_models(body: dict[str, Any]) -> list[str]:
    """The names in an answer to `models_call`."""
    return [m["id"] for m in body["data"] if isinstance(m["id"], str)]


def build(request: Request, model: str, provider: Provider) -> Call:
    """The request to an openai-format provider: the client's own bytes where it spoke OpenAI, else rebuilt.

    Raises BadRequest for what cannot be said and would change the meaning.
    """
    vectors = request.operation == "embeddings"
    path = "/embeddings" if vectors else "/chat/completions"
    kind = "openai_embeddings" if vectors else "openai_stream" if request.stream else "openai_chat"
    onward = forwarded(request, provider)
    if request.native("openai"):
        changes: dict[str, Any] = {"model": model}
        if request.stream:
            options = request.body.data.get("stream_options")
            changes["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
        return Call(path, request.body.with_fields(changes | onward, ROUTER_FIELDS - onward.keys()), kind)
    dropped: list[str] = []
    body = _rebuild_vectors(request, model) if vectors else _rebuild(request, model, provider, dropped)
    return Call(path, dumps(body | onward).encode(), kind, dropped=list(dict.fromkeys(dropped)))


def _rebuild_vectors(request: Request, model: str) -> dict[str, Any]:
    user = {"user": request.user} if request.user else {}
    return {"model": model, "input": request.inputs, **user, **request.extra}


_SAME = ("temperature", "top_p", "seed", "presence_penalty", "frequency_penalty", "user", "metadata", "service_tier")
_SHARED = frozenset(("prompt_cache_key", "safety_identifier", "verbosity"))
"""Fields of Responses that OpenAI itself takes here, too; other servers may refuse what they do not know."""


def _rebuild(request: Request, model: str, provider: Provider, dropped: list[str]) -> dict[str, Any]:
    own, vendor = request.format == "openai", _is_openai(provider)
    body: dict[str, Any] = {"model": model, "messages": _build_messages(request, vendor, dropped)}
    body |= {name: value for name in _SAME if (value := getattr(request, name)) is not None}
    if request.max_tokens is not None:
        newer = vendor or _REASONER.search(model) or (own and "max_completion_tokens" in request.body.data)
        body["max_completion_tokens" if newer else "max_tokens"] = request.max_tokens
    if request.stop:
        body["stop"] = request.stop
    if request.n != 1:
        body["n"] = request.n
    if request.stream:
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    _add_tools(request, body, dropped)
    if request.response_format:
        body["response_format"] = _build_format(request.response_format)
    if request.reasoning is not None:
        body["reasoning_effort"] = effort(request.reasoning)
    said = {k: v for k, v in request.extra.items() if own or (vendor and k in _SHARED)}
    body |= said
    if request.top_k is not None:
        body |= {"top_k": request.top_k} if own else {}
        dropped += [] if own else ["top_k"]
    dropped += sorted(set(request.extra) - set(said))
    return body


_REASONER = re.compile(r"(^|/)(o\d|gpt-([5-9]|\d\d))")
"""OpenAI's models that refuse max_tokens for max_completion_tokens; many other servers know only the older name."""


def _is_openai(provider: Provider) -> bool:
    host = urlsplit(provider.base_url).hostname or ""
    return host.endswith((".openai.com", ".openai.azure.com"))


def _add_tools(request: Request, body: dict[str, Any], dropped: list[str]) -> None:
    own = request.format == "openai"
    tools = [t for t in request.tools if own or t.extra.get("type", "function") in ("function", "custom")]
    dropped += ["tools"] if len(tools) < len(request.tools) else []
    if not tools:
        return
    body["tools"] = [_build_tool(t, own) for t in tools]
    dropped += ["cache_control"] if any("cache_control" in t.extra for t in tools) and not own else []
    choice = request.tool_choice
    if choice and choice.startswith("tool:") and choice[5:] not in [t.name for t in tools]:
        dropped.append("tool_choice")
    elif choice is not None:
        body["tool_choice"] = _build_choice(choice, _custom_names(request) if own else set())
    if request.parallel_tool_calls is not None:
        body["parallel_tool_calls"] = request.parallel_tool_calls


def effort(tokens: int) -> str:
    """The reasoning_effort that allows about as many tokens of thinking. Names above `high` only by their own number:
    not every model knows them."""
    exact = next((name for name, budget in EFFORTS.items() if tokens == budget), None)
    return exact or next((name for name in ("minimal", "low", "medium") if tokens <= EFFORTS[name]), "high")


def _build_messages(request: Request, vendor: bool, dropped: list[str]) -> list[dict[str, Any]]:
    built: list[dict[str, Any]] = []
    if request.system:
        built.append({"role": "system", "content": "\n\n".join(block_text(b) for b in request.system)})
    for message in request.messages:
        if message.role == "tool":
            built += _build_results(message, request, dropped)
        elif message.role == "assistant":
            built.append(_build_assistant(message, request, vendor, dropped))
        else:
            built.append(_build_plain(message, request, dropped))
    blocks = [*request.system, *(b for m in request.messages for b in m.content)]
    dropped += [name for name in ("cache_control", "citations", "transformations") if any(b.get(name) for b in blocks)]
    return built


def _build_plain(message: Message, request: Request, dropped: list[str]) -> dict[str, Any]:
    parts = [p for b in message.content for p in _build_parts(b, request)]
    return {"role": message.role, "content": _joined(parts)}


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts as one string where they are all text: every server reads that."""
    texts = [p["text"] for p in parts if p["type"] == "text"]
    return "\n\n".join(texts) if len(texts) == len(parts) else parts


def _build_parts(block: Block, request: Request) -> list[dict[str, Any]]:
    build = _BUILD_PARTS.get(block["type"])
    parts = build(block, request) if build else None
    if parts is None:
        raise BadRequest(f"an openai provider cannot read this {block['type']} in {request.text_field}", param=request.text_field)
    return parts


def _build_image(block: Block, request: Request) -> list[dict[str, Any]] | None:
    if "url" not in block and "data" not in block:
        return None
    url = block["url"] if "url" in block else f"data:{block['media_type']};base64,{block['data']}"
    detail = {"detail": block["detail"]} if "detail" in block else {}
    return [{"type": "image_url", "image_url": {"url": url, **detail}}]


def _build_document(block: Block, request: Request) -> list[dict[str, Any]] | None:
    """A file by its bytes; a text as text. A URL is not fetched, another vendor's file id is none."""
    title = {"filename": block["title"]} if "title" in block else {}
    if "data" in block:
        data = f"data:{block['media_type']};base64,{block['data']}"
        return [{"type": "file", "file": {"filename": "document", **title, "file_data": data}}]
    if "file_id" in block and request.format in ("openai", "responses"):
        return [{"type": "file", "file": {"file_id": block["file_id"], **title}}]
    if "text" in block:
        return [{"type": "text", "text": "\n".join([*title.values(), block["text"]])}]
    if "content" in block:
        return [p for b in block["content"] for p in _build_parts(b, request)]
    return None


_BUILD_PARTS: dict[str, Callable[[Block, Request], list[dict[str, Any]] | None]] = {
    "text": lambda block, request: [{"type": "text", "text": block["text"]}],
    "image": _build_image,
    "document": lambda block, request: _build_document(document_block(block) if "file_data" in block else block, request),
    "audio": lambda block, request: [{"type": "input_audio", "input_audio": {k: block[k] for k in block if k != "type"}}],
}


def _build_assistant(message: Message, request: Request, vendor: bool, dropped: list[str]) -> dict[str, Any]:
    texts = [b["text"] for b in message.content if b["type"] == "text"]
    thoughts = [b["thinking"] for b in message.content if b["type"] == "thinking"]
    calls = [b for b in message.content if b["type"] == "tool_use"]
    custom = _custom_names(request) if request.format == "openai" else set()
    built: dict[str, Any] = {"role": "assistant", "content": "\n\n".join(texts) if texts or not calls else None}
    if thoughts and vendor:  # it refuses fields it does not know
        dropped.append("thinking")
    elif thoughts:
        built["reasoning_content"] = "".join(thoughts)
    if calls:
        told = [ToolCall(i, c["id"], c["name"], arguments_text(c)) for i, c in enumerate(calls)]
        built["tool_calls"] = [_custom_call(c) if c.name in custom else _call(c) for c in told]
    dropped += [b["type"] for b in message.content if b["type"] not in ("text", "thinking", "tool_use")]
    return built


def arguments_text(block: Block) -> str:
    """The arguments of a tool_use block as JSON text."""
    return str(block["arguments"]) if "arguments" in block else json.dumps(block["input"])


def _build_results(message: Message, request: Request, dropped: list[str]) -> list[dict[str, Any]]:
    """The results of calls, in text; what else is in them follows as the user's, for a result can hold nothing else."""
    built, shown = [], []
    for block in message.content:
        content = block["content"]
        parts = [p for b in ([] if isinstance(content, str) else content) for p in _build_parts(b, request)]
        text = content if isinstance(content, str) else "\n".join(p["text"] for p in parts if p["type"] == "text")
        built.append({"role": "tool", "tool_call_id": block["tool_use_id"], "content": text})
        shown += [p for p in parts if p["type"] != "text"]
        dropped += ["is_error"] if block.get("is_error") else []
    return [*built, *([{"role": "user", "content": shown}] if shown else [])]


def _build_tool(tool: Tool, own: bool) -> dict[str, Any]:
    if own and "type" in tool.extra:
        return dict(tool.extra)
    if own and "custom" in tool.extra:
        return {"type": "custom", "custom": tool.extra["custom"]}
    described = {"description": tool.description} if tool.description else {}
    bare = tool.parameters == {} or own  # what is said must be a whole schema, but nothing need be said
    schema = tool.parameters if bare else {"type": "object", "properties": {}, **tool.parameters}
    strict = {"strict": tool.extra["strict"]} if tool.extra.get("strict") is not None else {}
    told = {"name": tool.name, **described, **({"parameters": schema} if schema else {}), **strict}
    return {"type": "function", "function": told}


def _build_choice(choice: str, custom: set[str]) -> Any:
    if not choice.startswith("tool:"):
        return choice
    kind = "custom" if choice[5:] in custom else "function"
    return {"type": kind, kind: {"name": choice[5:]}}


def _build_format(form: dict[str, Any]) -> dict[str, Any]:
    if form["type"] == "json_object":
        return {"type": "json_object"}
    strict = {"strict": form["strict"]} if form.get("strict") is not None else {}
    return {"type": "json_schema", "json_schema": {"name": form["name"], "schema": form["schema"], **strict}}


# The upstream face: answers -------------------------------------------------------------------------------------------
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
    try:
        return _vector_events(body) if request.operation == "embeddings" else _answer_events(body)
    except SHAPE_ERRORS:
        raise malformed("an answer of a shape that its format does not have") from None


def _answer_events(body: dict[str, Any]) -> list[Event]:
    choices = body.get("choices")
    if not isinstance(choices, list) or not choices or not all(isinstance(dig(c, "message"), dict) for c in choices):
        raise malformed("an answer without choices")
    events: list[Event] = [Begin(_text(body.get("id")), _text(body.get("model")))]
    for i, choice in enumerate(choices):
        events += _message_events(choice["message"], i, _Calls())
        events += _finish_events(choice, i)
    return events + _usage_events(body)


def _vector_events(body: dict[str, Any]) -> list[Event]:
    data = body["data"]
    if not isinstance(data, list) or not all(isinstance(d["embedding"], (list, str)) for d in data):
        raise malformed("an answer without embeddings")
    placed = sorted(enumerate(data), key=lambda p: p[1]["index"] if type(p[1].get("index")) is int else p[0])
    return [Begin(model=_text(body.get("model"))), Vectors([d["embedding"] for _, d in placed]), *_usage_events(body)]


class _Calls:
    """Which call a piece belongs to. Its index says it, but some servers give every parallel call the same one, or none:
    then another id is another call."""

    def __init__(self) -> None:
        self._current: dict[int, tuple[int, str | None]] = {}
        self._count = 0

    def piece(self, call: dict[str, Any], place: int) -> ToolCall:
        function = call.get("function") or {}
        told = call.get("index")
        key = told if type(told) is int else place
        id, name = _text(call.get("id")), _text(function.get("name"))
        index, known = self._current.get(key, (None, None))
        if index is None or (id and name and known and id != known):
            index, self._count = self._count, self._count + 1
        self._current[key] = (index, id or known)
        arguments = function.get("arguments")
        free = dig(call, "custom.input")
        text = arguments if isinstance(arguments, str) else dumps(arguments) if isinstance(arguments, dict) else ""
        return ToolCall(index, id, name or _text(dig(call, "custom.name")), free if isinstance(free, str) else text)


class Parser(BlockParser):
    """The events of a stream of chat.completion.chunk."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = False
        self._calls = _Calls()

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
            events += _message_events(choice.get("delta") or {}, index, self._calls)
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


def _message_events(message: dict[str, Any], choice: int, calls: _Calls) -> list[Event]:
    """The events of a whole message or of a delta: the two have the same shape. Of further choices only the text counts."""
    content = message.get("content") or message.get("refusal") or dig(message, "audio.transcript")
    texts = [dig(p, "text") for p in content] if isinstance(content, list) else [content]
    said: list[Event] = [Text(t, choice) for t in texts if isinstance(t, str) and t]
    if choice:
        return said
    thought = _text(message.get("reasoning_content")) or _text(message.get("reasoning"))
    legacy = message.get("function_call")
    told = message.get("tool_calls") or ([{"index": 0, "function": legacy}] if legacy else ())
    pieces = [calls.piece(call, i) for i, call in enumerate(told)]
    return [*([Reasoning(thought)] if thought else []), *said, *pieces]


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
