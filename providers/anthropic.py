"""Anthropic Messages: the client face and the upstream face of `/v1/messages`, its events and its errors.

Its turns alternate, and its answers are blocks in a row, each begun and ended by name; everybody else sends text, thinking
and tool calls as they come. So to build a request is to merge turns, and to render a stream is to let one block out at a
time while the pieces of others wait (`Renderer`). Where both sides speak Anthropic nothing is rebuilt.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
    Tool,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
    count,
    dig,
    dumps,
    event_data,
    forwarded,
    is_header_text,
    malformed,
    read_field,
    read_object,
    read_strings,
    router_fields,
    sse,
)  # fmt: skip
from providers.openai import EFFORTS, tool_use_block

OPERATIONS = ("count_tokens",)


# The client face: requests --------------------------------------------------------------------------------------------
def parse_request(body: Body, headers: Mapping[str, str]) -> Request:
    """A message request in the router's words. Raises BadRequest naming the field that cannot be."""
    request = _parse(body, headers)
    if read_field(body.data, "max_tokens", int, "a whole number", required=True) < 0:
        raise BadRequest("max_tokens must not be negative", param="max_tokens")
    return request


def parse_count_tokens(body: Body, headers: Mapping[str, str]) -> Request:
    """A token count in the router's words: the same body, of which only the input matters."""
    request = _parse(body, headers)
    request.operation, request.stream = "count_tokens", False
    return request


def _parse(body: Body, headers: Mapping[str, str]) -> Request:
    data = body.data
    model = read_field(data, "model", str, "a string", required=True)
    request = Request("anthropic", body, model, router=router_fields(data, headers))
    if not request.model:
        raise BadRequest("model must not be empty", param="model")
    for name, (attribute, types, what) in _PLAIN.items():
        value = read_field(data, name, types, what)
        if value is not None:
            setattr(request, attribute, value)
    request.stop = read_strings(request.stop, "stop_sequences")
    request.system = _system(data.get("system"), "system")
    _read_messages(data, request)
    tools = read_field(data, "tools", list, "a list") or []
    request.tools = [_tool(t, f"tools[{i}]") for i, t in enumerate(tools)]
    request.tool_choice, request.parallel_tool_calls = _tool_choice(read_field(data, "tool_choice", dict, "an object"))
    request.response_format = _response_format(data)
    request.reasoning = _reasoning(data)
    _read_metadata(data, request)
    request.extra = _left_over(data, request)
    return request


_NUMBER = (int, float)
_PLAIN: dict[str, tuple[str, Any, str]] = {
    "stream": ("stream", bool, "true or false"),
    "max_tokens": ("max_tokens", int, "a whole number"),
    "temperature": ("temperature", _NUMBER, "a number"),
    "top_p": ("top_p", _NUMBER, "a number"),
    "top_k": ("top_k", int, "a whole number"),
    "stop_sequences": ("stop", list, "a list of strings"),
}
_KNOWN = ROUTER_FIELDS | frozenset(_PLAIN) | frozenset((
    "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "output_format", "metadata",
    "service_tier",
))  # fmt: skip


def _system(system: Any, place: str) -> list[Block]:
    if system is None:
        return []
    blocks = _content(system, place)
    if any(b["type"] != "text" for b in blocks):
        raise BadRequest(f"{place} must be a string or a list of text blocks", param=place)
    return blocks


def _read_messages(data: Mapping[str, Any], request: Request) -> None:
    messages = read_field(data, "messages", list, "a list", required=True)
    if not messages:
        raise BadRequest("messages must not be empty", param="messages")
    for i, m in enumerate(messages):
        place = f"messages[{i}]"
        if not isinstance(m, dict) or m.get("role") not in ("user", "assistant", "system"):
            raise BadRequest(f"{place}.role must be user, assistant or system", param=f"{place}.role")
        blocks = _content(m.get("content"), f"{place}.content")
        results = [b for b in blocks if b["type"] == "tool_result" and m["role"] == "user"]
        said = [b for b in blocks if not (b["type"] == "tool_result" and m["role"] == "user")]
        request.messages += [Message("tool", results)] if results else []
        request.messages += [Message(m["role"], said)] if said or not results else []
    if request.messages[-1].role == "assistant":
        request.dropped.append("prefill")  # elsewhere an answer begins anew


def _content(content: Any, place: str) -> list[Block]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of blocks", param=place)
    return [_block(b, f"{place}[{i}]") for i, b in enumerate(content)]


def _block(block: Any, place: str) -> Block:
    if not isinstance(block, dict) or not isinstance(block.get("type"), str):
        raise BadRequest(f"{place} must be an object with a type", param=place)
    return _BLOCKS.get(block["type"], _given)(block, place)


def _kept(block: Block, *names: str) -> Block:
    return {name: block[name] for name in names if block.get(name) is not None}


def _text(block: Block, place: str) -> Block:
    text = read_field(block, "text", str, "a string", required=True, place=place)
    return {"type": "text", "text": text, **_kept(block, "cache_control", "citations")}


def _image(block: Block, place: str) -> Block:
    return {"type": "image", **_source(block, place), **_kept(block, "cache_control", "transformations")}


def _document(block: Block, place: str) -> Block:
    """A document by its bytes, its URL, its text, its content blocks, or the id of an uploaded file."""
    for name in ("title", "context"):
        read_field(block, name, str, "a string", place=place)
    return {"type": "document", **_source(block, place), **_kept(block, "title", "context", "citations", "cache_control")}


def _source(block: Block, place: str) -> Block:
    source = read_field(block, "source", dict, "an object", required=True, place=place)
    kind, place = source.get("type"), f"{place}.source"
    if kind in ("base64", "text"):
        data = read_field(source, "data", str, "a string", required=True, place=place)
        media_type = read_field(source, "media_type", str, "a string", required=True, place=place)
        return {"text": data} if kind == "text" else {"media_type": media_type, "data": data}
    if kind == "content":
        return {"content": _content(source.get("content"), f"{place}.content")}
    key = {"url": "url", "file": "file_id"}.get(str(kind))
    if key is None:
        raise BadRequest(f"{place}.type: unknown source", param=f"{place}.type")
    return {key: read_field(source, key, str, "a string", required=True, place=place)}


def _search_result(block: Block, place: str) -> Block:
    """What a search of the client's own found; other languages have no such block and read it as text."""
    head = [block[name] for name in ("title", "source") if isinstance(block.get(name), str)]
    found = [b["text"] for b in _system(block.get("content"), f"{place}.content")]
    return {"type": "text", "text": "\n".join([*head, *found]), **_kept(block, "cache_control")}


def _tool_use(block: Block, place: str) -> Block:
    id, name = (read_field(block, key, str, "a string", required=True, place=place) for key in ("id", "name"))
    value = read_field(block, "input", dict, "an object", required=True, place=place)
    return {"type": "tool_use", "id": id, "name": name, "input": value, **_kept(block, "cache_control")}


def _tool_result(block: Block, place: str) -> Block:
    id = read_field(block, "tool_use_id", str, "a string", required=True, place=place)
    content = block.get("content")
    plain = content if isinstance(content, str) else _content(content or [], f"{place}.content")
    wrong = read_field(block, "is_error", bool, "true or false", place=place)
    result: Block = {"type": "tool_result", "tool_use_id": id, "content": plain or "", **_kept(block, "cache_control")}
    return {**result, "is_error": True} if wrong else result


def _thinking(block: Block, place: str) -> Block:
    thinking = read_field(block, "thinking", str, "a string", required=True, place=place)
    signature = read_field(block, "signature", str, "a string", place=place)
    return {"type": "thinking", "thinking": thinking, **({"signature": signature} if signature else {})}


def _redacted(block: Block, place: str) -> Block:
    data = read_field(block, "data", str, "a string", required=True, place=place)
    return {"type": "redacted_thinking", "data": data}


def _given(block: Block, place: str) -> Block:
    """A block only this vendor knows (its own tools' calls and results): kept as it is."""
    if isinstance(block.get("content"), list):
        _content(block["content"], f"{place}.content")
    return dict(block)


_BLOCKS: dict[str, Callable[[Block, str], Block]] = {
    "text": _text, "image": _image, "document": _document, "search_result": _search_result, "tool_use": _tool_use,
    "tool_result": _tool_result, "thinking": _thinking, "redacted_thinking": _redacted,
}  # fmt: skip


def _tool(tool: Any, place: str) -> Tool:
    if not isinstance(tool, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    if tool.get("type", "custom") not in ("custom", None):
        return Tool(str(tool.get("name") or tool["type"]), extra=dict(tool))
    name = read_field(tool, "name", str, "a string", required=True, place=place)
    schema = read_field(tool, "input_schema", dict, "an object", required=True, place=place)
    description = read_field(tool, "description", str, "a string", place=place)
    return Tool(name, description, schema, _kept(tool, *_TOOL_KEYS))


_TOOL_KEYS = ("cache_control", "strict", "defer_loading", "input_examples", "allowed_callers", "eager_input_streaming")


def _tool_choice(choice: dict[str, Any] | None) -> tuple[str | None, bool | None]:
    """(how tools are chosen, whether several may be called at once)."""
    if choice is None:
        return None, None
    place = "tool_choice"
    single = read_field(choice, "disable_parallel_tool_use", bool, "true or false", place=place)
    several = None if single is None else not single
    if choice.get("type") == "tool":
        return "tool:" + read_field(choice, "name", str, "a string", required=True, place=place), several
    if str(choice.get("type")) not in _CHOICES:
        raise BadRequest("tool_choice.type must be auto, any, tool or none", param="tool_choice.type")
    return _CHOICES[choice["type"]], several


_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def _response_format(data: Mapping[str, Any]) -> dict[str, Any] | None:
    config = read_field(data, "output_config", dict, "an object") or {}
    form = config.get("format") or data.get("output_format")
    if form is None:
        return None
    if dig(form, "type") != "json_schema" or not isinstance(dig(form, "schema"), dict):
        raise BadRequest("output_config.format must be a json_schema with a schema", param="output_config.format")
    return {"type": "json_schema", "name": "answer", "schema": form["schema"], "strict": True}


def _reasoning(data: Mapping[str, Any]) -> int | None:
    """Tokens the model may think: the budget, or what the effort stands for where the model decides; None if left open."""
    thinking = read_field(data, "thinking", dict, "an object") or {}
    if thinking.get("type") == "enabled":
        budget: int = read_field(thinking, "budget_tokens", int, "a whole number", required=True, place="thinking")
        return budget
    if thinking.get("type") == "disabled":
        return 0
    effort = dig(data, "output_config.effort")
    return EFFORTS.get(effort) if thinking.get("type") == "adaptive" and isinstance(effort, str) else None


def _read_metadata(data: Mapping[str, Any], request: Request) -> None:
    metadata = read_field(data, "metadata", dict, "an object") or {}
    request.user = read_field(metadata, "user_id", str, "a string", place="metadata")
    request.metadata = {k: v for k, v in metadata.items() if k != "user_id"} or None
    tier = read_field(data, "service_tier", str, "a string")
    request.service_tier = {"standard_only": "default"}.get(str(tier), tier)


def _left_over(data: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """What was said and has no word of the router's: for another language it is dropped, and noted."""
    extra = {k: v for k, v in data.items() if k not in _KNOWN and v is not None}
    if data.get("thinking") and request.reasoning is None:
        extra["thinking"] = data["thinking"]
    said = {"format", *(("effort",) if dig(data, "thinking.type") == "adaptive" and request.reasoning is not None else ())}
    if config := {k: v for k, v in (data.get("output_config") or {}).items() if k not in said and v is not None}:
        extra["output_config"] = config
    return extra


# The client face: answers ---------------------------------------------------------------------------------------------
def render(answer: Answer, request: Request, stamp: Stamp) -> dict[str, Any]:
    """A message object (or a token count) with every field that the published schema requires."""
    if request.operation == "count_tokens":
        return {"input_tokens": answer.usage.input_tokens if answer.usage else 0}
    reason, sequence = _stop(answer.finish, bool(answer.tool_calls))
    said = sum(map(len, (answer.text, answer.reasoning, *(c.arguments for c in answer.tool_calls.values()))))
    return {
        **_message(f"msg_{stamp.id}", stamp.model, answer.usage or _estimate(request, said)),
        "content": _blocks(answer, stamp),
        "stop_reason": reason,
        "stop_sequence": sequence,
    }


def _message(id: str, model: str, usage: Usage) -> dict[str, Any]:
    """A message object without content yet."""
    rest = {"cache_creation": None, "inference_geo": None, "service_tier": None, "speed": None}
    return {
        "id": id, "type": "message", "role": "assistant", "model": model, "content": [], "stop_reason": None,
        "stop_sequence": None, "stop_details": None, "container": None, "diagnostics": None,
        "usage": {**render_usage(usage), **rest},
    }  # fmt: skip


def _estimate(request: Request, characters: int) -> Usage:
    """Counts for an answer whose provider told none, which this dialect cannot leave out: four characters to the token."""
    return Usage(input_tokens=-(-len(request.text()) // 4), output_tokens=-(-characters // 4))


def render_usage(usage: Usage) -> dict[str, Any]:
    """Token counts in Anthropic's names: cached and cache-write tokens stand beside the input, not in it."""
    cached, written = usage.cached_input_tokens, usage.cache_write_input_tokens
    return {
        "input_tokens": max(0, usage.input_tokens - cached - written),
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"thinking_tokens": usage.reasoning_tokens},
        "server_tool_use": None,
    }


def _blocks(answer: Answer, stamp: Stamp) -> list[Block]:
    blocks = [b if b["type"] == "redacted_thinking" else {"signature": "", **b} for b in answer.thinking]
    if answer.text:
        blocks.append({"type": "text", "text": answer.text, "citations": None})
    for _, call in sorted(answer.tool_calls.items()):
        block = tool_use_block(call.id or _made_id(stamp, call.index), call.name or "", call.arguments)
        blocks.append({k: block[k] for k in ("type", "id", "name", "input")})
    return blocks


def _made_id(stamp: Stamp, index: int) -> str:
    return f"toolu_{stamp.id}_{index}"


_STOP = {"stop": "end_turn", "length": "max_tokens", "content_filter": "refusal"}


def _stop(finish: Finish | None, calls: bool) -> tuple[str, str | None]:
    """(stop_reason, stop_sequence). Agents go on only at tool_use, and some servers say `stop` although a tool is called."""
    if finish is None or finish.reason in ("stop", "tool_calls"):
        sequence = finish.stop_sequence if finish else None
        return ("tool_use" if calls else "stop_sequence" if sequence else "end_turn"), (None if calls else sequence)
    return _STOP.get(finish.reason, "end_turn"), None


@dataclass(slots=True)
class _Lane:
    """A block of a stream: how it begins, the deltas that wait for their turn, and what is known of its arguments."""

    start: Block
    is_tool: bool = False
    waiting: list[Block] = field(default_factory=list)
    arguments: str = ""

    def may_end(self) -> bool:
        """Can nothing more be missing? Text and thinking may end anywhere, arguments only where their object does."""
        if not self.is_tool:
            return True
        return self.arguments.rstrip().endswith("}") and read_object(self.arguments.encode("utf-8", "replace")) is not None


class Renderer:
    """A stream for an Anthropic client: message_start, ping, blocks one after the other, message_delta, message_stop.

    Blocks wait in a queue; the first is open and its pieces go out as they come. A piece for another block waits until the
    open one may end, so calls that arrive interleaved come out whole, each at its own index.
    """

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._request, self._stamp, self._model = request, stamp, stamp.model
        self._queue: dict[tuple[str, int], _Lane] = {}
        self._index = -1
        self._thoughts = self._said = 0
        self._called = False
        self._usage: Usage | None = None
        self._finish: Finish | None = None
        self._started = False

    def feed(self, event: Event) -> bytes:
        """What the client gets to read of this event. Raises UpstreamError for a block that could not be read."""
        take = self._takes.get(type(event))
        return b"" if take is None else take(self, event)

    def end(self) -> bytes:
        """The end of a complete answer: what still waits, why it ended, what it cost."""
        out = self._start()
        while self._queue:
            out += self._close()
        reason, sequence = _stop(self._finish, self._called)
        usage = self._usage or _estimate(self._request, self._said)
        delta = {"stop_reason": reason, "stop_sequence": sequence, "stop_details": None, "container": None}
        out += _event("message_delta", delta=delta, usage=render_usage(usage))
        return out + _event("message_stop")

    # what is only remembered: the message begins with its first piece, when the input tokens may be known
    def _begin(self, event: Begin) -> bytes:
        self._model = event.model or self._model
        return b""

    def _used(self, event: Used) -> bytes:
        self._usage = event.usage
        return b""

    def _finished(self, event: Finish) -> bytes:
        self._finish = event if event.choice == 0 else self._finish
        return b""

    # what goes out
    def _text(self, event: Text) -> bytes:
        if not event.text or event.choice:
            return b""
        start = {"type": "text", "text": "", "citations": None}
        return self._take(("text", 0), start, {"type": "text_delta", "text": event.text}, len(event.text))

    def _reasoning(self, event: Reasoning) -> bytes:
        key, out = ("thinking", self._thoughts), b""
        if event.redacted is not None:
            self._thoughts += 1
            return self._take(("redacted", self._thoughts), {"type": "redacted_thinking", "data": event.redacted}, None)
        start = {"type": "thinking", "thinking": "", "signature": ""}
        if event.text:
            out += self._take(key, start, {"type": "thinking_delta", "thinking": event.text}, len(event.text))
        if event.signature:
            out += self._take(key, start, {"type": "signature_delta", "signature": event.signature})
            self._thoughts += 1  # a signature is the last of its block
        return out

    def _tool_call(self, event: ToolCall) -> bytes:
        self._called = True
        id = event.id or _made_id(self._stamp, event.index)
        start = {"type": "tool_use", "id": id, "name": event.name or "", "input": {}}
        delta = {"type": "input_json_delta", "partial_json": event.arguments} if event.arguments else None
        return self._take(("tool", event.index), start, delta, len(event.arguments))

    def _malformed(self, event: Malformed) -> bytes:
        raise malformed(event.what)

    def _take(self, key: tuple[str, int], start: Block, delta: Block | None, size: int = 0) -> bytes:
        """A piece for a block: out with it if the block is open or can be opened now, else it waits."""
        out = self._start()
        self._said += size
        first = not self._queue
        lane = self._queue.setdefault(key, _Lane(start, is_tool=key[0] == "tool"))
        lane.arguments += delta["partial_json"] if delta and lane.is_tool else ""
        if first:
            out += self._open()
        if next(iter(self._queue)) == key:
            return out + self._deltas([delta] if delta else [])
        lane.waiting += [delta] if delta else []
        while len(self._queue) > 1 and next(iter(self._queue.values())).may_end():
            out += self._close()
        return out

    def _start(self) -> bytes:
        if self._started:
            return b""
        self._started = True
        message = _message(f"msg_{self._stamp.id}", self._model, self._usage or Usage())
        return _event("message_start", message=message) + _event("ping")

    def _open(self) -> bytes:
        lane = next(iter(self._queue.values()))
        self._index += 1
        waiting, lane.waiting = lane.waiting, []
        return _event("content_block_start", index=self._index, content_block=lane.start) + self._deltas(waiting)

    def _deltas(self, deltas: list[Block]) -> bytes:
        return b"".join(_event("content_block_delta", index=self._index, delta=d) for d in deltas)

    def _close(self) -> bytes:
        """End the open block and open the next, if one waits."""
        del self._queue[next(iter(self._queue))]
        return _event("content_block_stop", index=self._index) + (self._open() if self._queue else b"")

    _takes: dict[type, Callable[[Renderer, Any], bytes]] = {  # noqa: RUF012 - a dispatch table, never changed
        Begin: _begin, Text: _text, Reasoning: _reasoning, ToolCall: _tool_call, Finish: _finished, Used: _used,
        Malformed: _malformed,
    }  # fmt: skip


def _event(kind: str, **more: Any) -> bytes:
    return sse(dumps({"type": kind, **more}), kind)


def hides(events: list[Event], request: Request) -> bool:
    """Nothing is asked for that the client did not ask for, so nothing is hidden from it."""
    return False


_TYPES = {
    "authentication": "authentication_error", "permission": "permission_error", "not_found": "not_found_error",
    "too_large": "request_too_large", "rate_limit": "rate_limit_error", "overloaded": "overloaded_error",
    "upstream": "api_error", "timeout": "timeout_error", "internal": "api_error",
}  # fmt: skip
_ERROR_TYPES = frozenset(_TYPES.values()) | {"invalid_request_error", "billing_error", "conflict_error"}


def render_error(error: RequestError) -> dict[str, Any]:
    """The error object; what an upstream itself said of a bad request is passed on in its words, without our `src`."""
    kind = _TYPES.get(error.kind, "invalid_request_error")
    detail = getattr(error, "detail", None)
    if detail:
        said = detail.get("type")
        body = {"type": said if said in _ERROR_TYPES else kind, "message": detail.get("message") or error.message}
    else:
        body = {"type": kind, "message": error.message, "src": error.src}
    return {"type": "error", "error": body, "request_id": None}


def render_stream_error(error: RequestError) -> bytes:
    """The error as the last event of a stream; no message_stop follows, so nobody takes the answer for complete."""
    return sse(dumps(render_error(error)), "error")


# The upstream face: requests ------------------------------------------------------------------------------------------
VERSION = "2023-06-01"
"""The version that requests are built for. (2026-10-21 refuses temperature, top_p and top_k.)"""
ROOM = 16384
"""max_tokens of a client whose language lets it say nothing: room for a long answer, beside what may be thought."""
MOST = 64000
"""What every current model may write, thinking included."""
MODERN, STRUCTURED, ONE_SAMPLER = (4, 7), (4, 5), (4, 1)
"""Claude generations: from MODERN on a model decides itself how much it thinks and samples; from STRUCTURED on it keeps to a
schema; from ONE_SAMPLER on it takes temperature or top_p, not both. Older ones answer such requests with 400."""


def endpoint(base_url: str) -> str:
    """The URL that paths are appended to: always a /v1, whether or not it was written, and whether the path went on."""
    url = base_url.rstrip("/").removesuffix("/messages")
    return url if url.endswith("/v1") else url + "/v1"


def models_call() -> Call:
    """Asks for the models that are served."""
    return Call("/models", b"", "list_models", headers={"anthropic-version": VERSION}, method="GET")


def parse_models(body: dict[str, Any]) -> list[str]:
    """The names in an answer to `models_call`."""
    return [m["id"] for m in body["data"] if isinstance(m["id"], str)]


def credentials(key: str) -> dict[str, str]:
    """The header that carries the provider's key."""
    return {"x-api-key": key}


def build(request: Request, model: str, provider: Provider) -> Call:
    """The request to an anthropic-format provider: the client's own bytes where it spoke Anthropic, else rebuilt.

    Raises BadRequest for what cannot be said and would change the meaning.
    """
    counting = request.operation == "count_tokens"
    path = "/messages/count_tokens" if counting else "/messages"
    kind = "anthropic_count_tokens" if counting else "anthropic_stream" if request.stream else "anthropic_messages"
    headers, onward = _headers(request, provider), forwarded(request, provider)
    if request.native("anthropic"):
        cleaned = _signed_only(request.body.data)
        text = request.body.with_fields({"model": model, **cleaned, **onward}, ROUTER_FIELDS - onward.keys())
        return Call(path, text, kind, headers, ["thinking"] if cleaned else [])
    dropped: list[str] = []
    body = _rebuild(request, model, dropped)
    if counting:
        body = {k: v for k, v in body.items() if k in _COUNTED}
    return Call(path, dumps(body | onward).encode(), kind, headers, list(dict.fromkeys(dropped)))


_COUNTED = frozenset((
    "model", "messages", "system", "tools", "tool_choice", "thinking", "output_config", "cache_control", "speed",
))  # fmt: skip


def _headers(request: Request, provider: Provider) -> dict[str, str]:
    """The version and the betas: the client's own, else what the provider's table says; betas of both."""
    told = {k.lower(): v for k, v in provider.headers.items()}
    asked = {k: v for k in ("anthropic-version", "anthropic-beta") if is_header_text(v := request.headers.get(k) or "")}
    version = asked.get("anthropic-version") or told.get("anthropic-version") or VERSION
    betas = [b for b in (asked.get("anthropic-beta"), told.get("anthropic-beta")) if b]
    return {"anthropic-version": version, **({"anthropic-beta": ",".join(betas)} if betas else {})}


def _signed_only(data: Mapping[str, Any]) -> dict[str, Any]:
    """The messages without thinking that this router itself put into words for another provider, if there is any.

    It has an empty signature, for which Anthropic refuses the whole conversation.
    """
    if not any(_unsigned(b) for m in data["messages"] if isinstance(m["content"], list) for b in m["content"]):
        return {}
    messages = [{**m, "content": _signed(m["content"])} for m in data["messages"]]
    return {"messages": [m for m in messages if m["content"] != []]}


def _signed(content: str | list[Block]) -> str | list[Block]:
    return [b for b in content if not _unsigned(b)] if isinstance(content, list) else content


def _unsigned(block: Block) -> bool:
    return block["type"] == "thinking" and not block.get("signature")


def _rebuild(request: Request, model: str, dropped: list[str]) -> dict[str, Any]:
    own = request.format == "anthropic"
    _refuse(request)
    thinking = (request.reasoning or 0) if request.tool_choice in (None, "auto", "none") else 0
    limit = min(ROOM + thinking, MOST) if request.max_tokens is None else request.max_tokens
    body: dict[str, Any] = {"model": model, "max_tokens": limit}
    body |= _own(request) if own else {}
    system = [*request.system, *(b for m in request.messages if m.role == "system" and not own for b in m.content)]
    body["messages"] = _messages(request, dropped)
    _add_format(request, model, body, system, dropped)
    _add_system(request, body, [w for b in system for w in _write(b, request, dropped)])
    _add_tools(request, model, body, dropped)
    if not own or "thinking" not in body:
        _add_thinking(request, model, body, dropped)
    _add_sampling(request, model, body, dropped)
    _add_rest(request, body, dropped)
    return body


def _refuse(request: Request) -> None:
    if request.n > 1:
        raise BadRequest("an anthropic provider gives one answer, n must be 1", param="n")
    modalities = request.extra.get("modalities")
    if isinstance(modalities, list) and "audio" in modalities:
        raise BadRequest("an anthropic provider does not speak, modalities must be text", param="modalities")


def _own(request: Request) -> dict[str, Any]:
    """The fields that go on as they are when a client's request is rebuilt for its own language (a plugin changed it)."""
    data, kept = request.body.data, dict(request.extra)
    if _reasoning(data) == request.reasoning:
        kept |= {k: data[k] for k in ("thinking", "output_config") if data.get(k) is not None}
    return kept


def _add_system(request: Request, body: dict[str, Any], blocks: list[Block]) -> None:
    """The system prompt, as a string where it is one. Where it is all there is, it is what the user says."""
    if not body["messages"] and not blocks:
        raise BadRequest(f"{request.text_field} must say something", param=request.text_field)
    if not body["messages"]:
        body["messages"] = [{"role": "user", "content": blocks}]
    elif blocks:
        body["system"] = blocks if len(blocks) > 1 or len(blocks[0]) > 2 else blocks[0]["text"]


def _add_format(request: Request, model: str, body: dict[str, Any], system: list[Block], dropped: list[str]) -> None:
    """The schema of the answer, where the model keeps to one; else the model is asked in words, and that is noted."""
    form, config = request.response_format, {k: v for k, v in body.pop("output_config", {}).items() if k != "format"}
    if form and form["type"] == "json_schema" and (generation(model) or STRUCTURED) >= STRUCTURED:
        config["format"] = {"type": "json_schema", "schema": form["schema"]}
    elif form:
        like = f" It must match this JSON schema: {dumps(form['schema'])}" if "schema" in form else ""
        system.append({"type": "text", "text": f"Answer with one JSON object and nothing else.{like}"})
        dropped.append("response_format")
    if config:
        body["output_config"] = config


def _add_tools(request: Request, model: str, body: dict[str, Any], dropped: list[str]) -> None:
    own = request.format == "anthropic"
    tools = [t for t in request.tools if own or t.extra.get("type", "function") in ("function", "custom")]
    dropped += ["tools"] if len(tools) < len(request.tools) else []
    if not tools:
        return
    strict = (generation(model) or STRUCTURED) >= STRUCTURED
    body["tools"] = [_build_tool(t, strict) for t in tools]
    dropped += ["strict"] if not strict and any(t.extra.get("strict") for t in tools) else []
    choice = _build_choice(request)
    if choice.get("name") and choice["name"] not in [t.name for t in tools]:
        dropped.append("tool_choice")
    elif choice:
        body["tool_choice"] = choice


def _build_tool(tool: Tool, strict: bool) -> dict[str, Any]:
    if tool.extra.get("type", "custom") not in ("function", "custom"):
        return dict(tool.extra)
    described = {"description": tool.description} if tool.description else {}
    known = {k: v for k, v in _kept(tool.extra, *_TOOL_KEYS).items() if k != "strict" or (v and strict)}
    return {"name": tool.name, **described, "input_schema": {"type": "object", **tool.parameters}, **known}


def _build_choice(request: Request) -> dict[str, Any]:
    choice, several = request.tool_choice, request.parallel_tool_calls
    single = {} if several is None else {"disable_parallel_tool_use": not several}
    if choice is None:
        return {"type": "auto", **single} if single else {}
    if choice.startswith("tool:"):
        return {"type": "tool", "name": choice[5:], **single}
    return {"type": "none"} if choice == "none" else {"type": "any" if choice == "required" else "auto", **single}


def generation(model: str) -> tuple[int, int] | None:
    """(4, 7) for claude-opus-4-7, (4, 0) for claude-sonnet-4-20250514; None for a model that is no Claude."""
    found = re.search(r"claude-(?:[a-z]+-)*?(\d{1,2})(?:[-.](\d{1,2}))?(?!\d)", model)
    return (int(found[1]), int(found[2] or 0)) if found else None


def _add_thinking(request: Request, model: str, body: dict[str, Any], dropped: list[str]) -> None:
    """How much may be thought: in tokens, or by effort where the model decides itself.

    Not where a tool is forced, nor in the middle of tool calls that were begun without signed thinking: both are refused.
    """
    tokens, modern = request.reasoning, (generation(model) or (0, 0)) >= MODERN
    if not tokens:
        body |= {"thinking": {"type": "disabled"}} if tokens == 0 else {}
        return
    forced = dig(body, "tool_choice.type") in ("any", "tool")
    if forced or (not modern and (_unsigned_loop(body["messages"]) or body["max_tokens"] <= 1024)):
        dropped.append("reasoning")
    elif modern:
        body["thinking"] = {"type": "adaptive", "display": "summarized"}
        effort = next((name for name in ("low", "medium", "high", "xhigh") if tokens <= EFFORTS[name]), "max")
        body["output_config"] = {**body.get("output_config", {}), "effort": effort}
    else:
        budget = max(1024, min(tokens, body["max_tokens"] - 1024))
        body["thinking"] = {"type": "enabled", "budget_tokens": budget}


def _unsigned_loop(messages: list[dict[str, Any]]) -> bool:
    """Does the conversation end with the results of calls whose turn does not begin with thinking?"""
    last = messages[-2:]
    if len(last) < 2 or last[0]["role"] != "assistant" or last[1]["content"][0]["type"] != "tool_result":
        return False
    return last[0]["content"][0]["type"] not in ("thinking", "redacted_thinking")


def _add_sampling(request: Request, model: str, body: dict[str, Any], dropped: list[str]) -> None:
    told = {n: v for n in ("temperature", "top_p", "top_k") if (v := getattr(request, n)) is not None}
    age = generation(model) or (0, 0)
    refused = set(told) if age >= MODERN or dig(body, "thinking.type") == "enabled" else set()
    if age >= ONE_SAMPLER and "temperature" in told:
        refused.add("top_p")
    if told.get("temperature", 0) > 1:  # others go up to 2
        told["temperature"] = 1.0
        dropped.append("temperature")
    body |= {n: v for n, v in told.items() if n not in refused}
    dropped += [n for n in told if n in refused]


def _add_rest(request: Request, body: dict[str, Any], dropped: list[str]) -> None:
    stops = [s for s in request.stop if s.strip()]  # one of white space only is refused
    dropped += ["stop"] if len(stops) < len(request.stop) else []
    body |= {"stop_sequences": stops} if stops else {}
    body |= {"stream": True} if request.stream else {}
    _add_user(request, body, dropped)
    tier = {"auto": "auto", "default": "standard_only"}.get(str(request.service_tier))
    body |= {"service_tier": tier} if tier else {}
    unsaid = ("seed", "presence_penalty", "frequency_penalty", *(() if tier else ("service_tier",)))
    dropped += [name for name in unsaid if getattr(request, name) is not None]
    if request.format != "anthropic":
        dropped += [*(["metadata"] if request.metadata else []), *sorted(request.extra)]


def _add_user(request: Request, body: dict[str, Any], dropped: list[str]) -> None:
    own, user = request.format == "anthropic", request.user or request.extra.get("safety_identifier")
    metadata = dict(request.metadata or {}) if own else {}
    if isinstance(user, str) and (own or not _CONTACT.fullmatch(user)):
        metadata["user_id"] = user
    elif user:
        dropped.append("user")
    body |= {"metadata": metadata} if metadata else {}


_CONTACT = re.compile(r"[^@\s]+@[^@\s]+\.[^@\s]+|\+?[\d\s().-]{7,}")
"""What looks like an address or a telephone number is refused as a user_id."""


def _messages(request: Request, dropped: list[str]) -> list[dict[str, Any]]:
    """The turns, alternating: those of one side that follow each other become one, tool results first in it."""
    turns: list[dict[str, Any]] = []
    for message in request.messages:
        role = {"assistant": "assistant", "system": "system"}.get(message.role, "user")
        if role == "system" and request.format != "anthropic":
            continue
        blocks = [w for b in message.content for w in _write(b, request, dropped)]
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += blocks
        elif blocks:
            turns.append({"role": role, "content": blocks})
    for turn in turns:
        if turn["role"] == "user":
            turn["content"].sort(key=lambda b: b["type"] != "tool_result")
    return turns


def _write(block: Block, request: Request, dropped: list[str]) -> list[Block]:
    """A block in Anthropic's words, or nothing where it can be left out. Raises BadRequest where it cannot."""
    kind = block["type"]
    if kind in _WRITES:
        written = _WRITES[kind](block, request, dropped)
        return [{**written, **_kept(block, "cache_control")}] if written else []
    if request.format == "anthropic":
        return [block]
    raise BadRequest(f"an anthropic provider takes no {kind} in {request.text_field}", param=request.text_field)


def _write_text(block: Block, request: Request, dropped: list[str]) -> Block | None:
    if not block["text"].strip():  # empty ones are refused
        return None
    cited = _kept(block, "citations") if request.format == "anthropic" else {}
    return {"type": "text", "text": block["text"], **cited}


def _write_image(block: Block, request: Request, dropped: list[str]) -> Block:
    dropped += ["detail"] if block.get("detail") not in (None, "auto") else []
    if "data" in block:
        media_type = {"image/jpg": "image/jpeg"}.get(block["media_type"], block["media_type"])
        source = {"type": "base64", "media_type": media_type, "data": block["data"]}
    else:
        source = _remote_source(block, request)
    return {"type": "image", "source": source, **_kept(block, "transformations")}


def _remote_source(block: Block, request: Request) -> Block:
    """A source by URL; a file's id only where it is Anthropic's own."""
    if "url" in block:
        return {"type": "url", "url": block["url"]}
    if "file_id" in block and request.format == "anthropic":
        return {"type": "file", "file_id": block["file_id"]}
    raise BadRequest(f"an anthropic provider cannot read this {block['type']} in {request.text_field}", param=request.text_field)


def _write_document(block: Block, request: Request, dropped: list[str]) -> Block:
    known = _kept(block, "title", "context", "citations")
    if "data" in block and block["media_type"].startswith("text/"):
        source: Block = {"type": "text", "media_type": "text/plain", "data": _decoded(block["data"], request)}
    elif "data" in block:
        source = {"type": "base64", "media_type": block["media_type"], "data": block["data"]}
    elif "text" in block:
        source = {"type": "text", "media_type": "text/plain", "data": block["text"]}
    elif "content" in block:
        source = {"type": "content", "content": [w for b in block["content"] for w in _write(b, request, dropped)]}
    else:
        source = _remote_source(block, request)
    return {"type": "document", "source": source, **known}


def _decoded(data: str, request: Request) -> str:
    try:
        return base64.b64decode(data).decode("utf-8", "replace")
    except ValueError:
        raise BadRequest(f"a document in {request.text_field} is not base64", param=request.text_field) from None


def _write_tool_use(block: Block, request: Request, dropped: list[str]) -> Block:
    dropped += ["arguments"] if "arguments" in block else []  # they were no JSON object
    return {"type": "tool_use", "id": _id(block["id"]), "name": block["name"], "input": block["input"]}


def _write_result(block: Block, request: Request, dropped: list[str]) -> Block:
    content = block["content"]
    plain = content if isinstance(content, str) else [w for b in content for w in _write(b, request, dropped)]
    result = {"type": "tool_result", "tool_use_id": _id(block["tool_use_id"])}
    return {**result, **({"content": plain} if plain else {}), **_kept(block, "is_error")}


def _id(id: str) -> str:
    """A call's id in the characters that are allowed; calls and results are changed alike."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", id) or "_"


def _write_thinking(block: Block, request: Request, dropped: list[str]) -> Block | None:
    if not block.get("signature"):  # thinking is taken back only as it was given out, signed
        dropped.append("thinking")
        return None
    return {"type": "thinking", "thinking": block["thinking"], "signature": block["signature"]}


_WRITES: dict[str, Callable[[Block, Request, list[str]], Block | None]] = {
    "text": _write_text, "image": _write_image, "document": _write_document, "tool_use": _write_tool_use,
    "tool_result": _write_result, "thinking": _write_thinking,
    "redacted_thinking": lambda block, request, dropped: {"type": "redacted_thinking", "data": block["data"]},
}  # fmt: skip


# The upstream face: answers -------------------------------------------------------------------------------------------
FINISH = {
    "end_turn": "stop", "stop_sequence": "stop", "pause_turn": "stop", "max_tokens": "length",
    "model_context_window_exceeded": "length", "tool_use": "tool_calls", "refusal": "content_filter",
}  # fmt: skip


def parse(data: bytes, request: Request) -> list[Event]:
    """The events of a whole answer. Raises UpstreamError if the body is none."""
    body = read_object(data)
    if body is None:
        raise malformed("an answer that is not JSON")
    _raise_error(body)
    if request.operation == "count_tokens":
        if type(body.get("input_tokens")) is not int:
            raise malformed("a token count without input_tokens")
        return [Used(Usage(input_tokens=count(body["input_tokens"])))]
    try:
        return _message_events(body)
    except SHAPE_ERRORS:
        raise malformed("an answer of a shape that its format does not have") from None


def _message_events(body: dict[str, Any]) -> list[Event]:
    events: list[Event] = [Begin(_word(body.get("id")), _word(body.get("model")))]
    calls = 0
    for block in body["content"]:
        read = _READS.get(block["type"])
        events += read(block, calls) if read else []
        calls += block["type"] == "tool_use"
    used = [Used(read_usage(body["usage"]))] if isinstance(body.get("usage"), dict) else []
    return [*events, *_finish_events(body), *used]


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


def _said(holder: Mapping[str, Any], name: str) -> str:
    value = holder[name]
    if not isinstance(value, str):
        raise TypeError(f"{name} is no text")
    return value


def _call(block: Block, index: int) -> ToolCall:
    return ToolCall(index, _word(block.get("id")), _said(block, "name"))


def _arguments(value: Any) -> str:
    if not isinstance(value, (dict, type(None))):
        raise TypeError("input is no object")
    return dumps(value or {})


_READS: dict[str, Callable[[Block, int], list[Event]]] = {
    "text": lambda block, index: [Text(text)] if (text := _said(block, "text")) else [],
    "thinking": lambda block, index: [Reasoning(_said(block, "thinking"), _word(block.get("signature")))],
    "redacted_thinking": lambda block, index: [Reasoning(redacted=_said(block, "data"))],
    "tool_use": lambda block, index: [_call(block, index), ToolCall(index, arguments=_arguments(block.get("input")))],
}


def _finish_events(holder: dict[str, Any]) -> list[Event]:
    native = _word(holder.get("stop_reason"))
    return [Finish(FINISH.get(native, "stop"), native, _word(holder.get("stop_sequence")))] if native else []


def read_usage(counts: Mapping[str, Any]) -> Usage:
    """Token counts in the router's convention: input includes cached and cache-write tokens."""
    usage = Usage.of(
        counts, input_tokens="input_tokens", output_tokens="output_tokens", cached_input_tokens="cache_read_input_tokens",
        cache_write_input_tokens="cache_creation_input_tokens", reasoning_tokens="output_tokens_details.thinking_tokens",
    )  # fmt: skip
    usage.input_tokens += usage.cached_input_tokens + usage.cache_write_input_tokens
    return usage


class Parser(BlockParser):
    """The events of a stream of message events. Calls are counted from 0, whatever the index of their block."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[str, Any] = {}
        self._calls: dict[int, int] = {}
        self._inputs: dict[int, Any] = {}

    def events(self, block: bytes) -> list[Event]:
        _, data = event_data(block)
        if data is None:
            return []
        body = read_object(data)
        if body is None:
            return [Malformed("an event that is not JSON")]
        _raise_error(body)
        read = self._kinds.get(body["type"])
        return read(self, body) if read else []

    def _message_start(self, body: dict[str, Any]) -> list[Event]:
        message = body["message"]
        return [Begin(_word(message.get("id")), _word(message.get("model"))), *self._used(message)]

    def _block_start(self, body: dict[str, Any]) -> list[Event]:
        block, index = body["content_block"], body["index"]
        if block["type"] == "tool_use":
            self._calls[index] = len(self._calls)
            self._inputs[index] = block.get("input")
            return [_call(block, self._calls[index])]
        if block["type"] == "thinking" and not block.get("thinking") and not block.get("signature"):
            return []
        read = _READS.get(block["type"])
        return read(block, 0) if read else []

    def _block_delta(self, body: dict[str, Any]) -> list[Event]:
        delta, index = body["delta"], body["index"]
        kind = delta["type"]
        if kind == "input_json_delta" and index in self._calls:
            piece = _said(delta, "partial_json")
            if piece:
                self._inputs.pop(index, None)
            return [ToolCall(self._calls[index], arguments=piece)] if piece else []
        key, make = _DELTAS.get(kind, ("", None))
        return [make(text)] if make and (text := _said(delta, key)) else []

    def _block_stop(self, body: dict[str, Any]) -> list[Event]:
        """A call whose arguments did not come in pieces has them in its beginning, or has none."""
        index = body["index"]
        return [ToolCall(self._calls[index], arguments=_arguments(self._inputs.pop(index)))] if index in self._inputs else []

    def _message_delta(self, body: dict[str, Any]) -> list[Event]:
        return [*_finish_events(body["delta"]), *self._used(body)]

    def _used(self, holder: dict[str, Any]) -> list[Event]:
        """Counts come twice, the later ones cumulative; what the later report leaves out stands as it was."""
        counts = holder.get("usage")
        if not isinstance(counts, dict):
            return []
        self._counts |= {k: v for k, v in counts.items() if v is not None}
        return [Used(read_usage(self._counts))]

    _kinds: dict[str, Callable[[Parser, dict[str, Any]], list[Event]]] = {  # noqa: RUF012 - a dispatch table
        "message_start": _message_start, "content_block_start": _block_start, "content_block_delta": _block_delta,
        "content_block_stop": _block_stop, "message_delta": _message_delta, "message_stop": lambda self, body: [Done()],
    }  # fmt: skip


_DELTAS: dict[str, tuple[str, Callable[[str], Event]]] = {
    "text_delta": ("text", Text),
    "thinking_delta": ("thinking", Reasoning),
    "signature_delta": ("signature", lambda text: Reasoning(signature=text)),
}


def _raise_error(body: dict[str, Any]) -> None:
    if body.get("type") == "error" or body.get("error"):
        raise UpstreamError("the provider reported an error in its answer", code="upstream_in_band_error", retryable=True,
                            detail=parse_error(body))  # fmt: skip


def parse_error(body: dict[str, Any]) -> dict[str, Any] | None:
    """message and type of an upstream's error object, keys scrubbed; None if it is none."""
    error = body.get("error")
    text = dig(error, "message") if isinstance(error, dict) else error
    if not isinstance(text, str):
        return None
    kind = _word(dig(error, "type"))
    return {"message": telemetry.scrub(text), **({"type": telemetry.scrub(kind)} if kind else {})}
