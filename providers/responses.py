"""OpenAI Responses: the client face of `/v1/responses`, and the words of upstreams that speak it themselves.

A request is a list of items (messages, calls, results, thoughts) where the other dialects have turns, so items that belong
to one turn are joined. An answer is a list of items as well, and a stream tells how each of them grows: a whole answer is
what such a stream ends in, so both come from one place, `Renderer`. Nothing is kept here between two requests: what refers
to an earlier response can be said to nobody but a vendor that keeps them.

The other face has no address of its own: to an openai provider with `responses = true` the client's bytes go on as they
are, and `parse` and `Parser` only listen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

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
    Tool,
    ToolCall,
    UpstreamError,
    Usage,
    Used,
    amount,
    below_one,
    dig,
    dumps,
    event_data,
    forwarded,
    malformed,
    openai,
    read_field,
    read_object,
    router_fields,
    sse,
)  # fmt: skip

Item = dict[str, Any]
"""One element of `input` or `output`."""
EFFORTS = {**openai.EFFORTS, "max": max(openai.EFFORTS.values())}


# The client face: requests ----------------------------------------------------------------------------------------------
def parse_request(body: Body, headers: Mapping[str, str]) -> Request:
    """A request in the router's words. Raises BadRequest naming the field that cannot be."""
    data = body.data
    request = Request("responses", body, read_field(data, "model", str, "a string", required=True), include_usage=True)
    if not request.model:
        raise BadRequest("model must not be empty", param="model")
    request.router = router_fields(data, headers)
    request.bound = {name: why for name, why in _BOUND.items() if data.get(name)}
    for name, (attribute, types, what) in _PLAIN.items():
        if (value := read_field(data, name, types, what)) is not None:
            setattr(request, attribute, value)
    request.system = [_text_block(text)] if (text := read_field(data, "instructions", str, "a string")) else []
    request.tools = [_tool(t, f"tools[{i}]") for i, t in enumerate(read_field(data, "tools", list, "a list") or [])]
    request.extra = _left_over(data)
    _read_input(data, request)
    request.bound |= below_one(data, "max_output_tokens")
    _read_choice(data.get("tool_choice"), request)
    request.response_format = _response_format(data)
    effort = dig(read_field(data, "reasoning", dict, "an object"), "effort")
    request.reasoning = EFFORTS.get(effort) if isinstance(effort, str) else None
    return request


_STATELESS = "responses are not kept here, so nothing can refer to an earlier one: send the whole input instead of "
_BOUND = {
    "previous_response_id": _STATELESS + "previous_response_id",
    "conversation": _STATELESS + "conversation",
    "prompt": "prompt templates are kept by their vendor: send instructions and input instead of prompt",
    "background": "a response cannot be made in the background, only while the client waits",
}
_NUMBER, _WHOLE = (int, float), int
_PLAIN: dict[str, tuple[str, Any, str]] = {
    "stream": ("stream", bool, "true or false"),
    "max_output_tokens": ("max_tokens", _WHOLE, "a whole number"),
    "temperature": ("temperature", _NUMBER, "a number"),
    "top_p": ("top_p", _NUMBER, "a number"),
    "parallel_tool_calls": ("parallel_tool_calls", bool, "true or false"),
    "user": ("user", str, "a string"),
    "metadata": ("metadata", dict, "an object"),
    "service_tier": ("service_tier", str, "a string"),
}
_WITHOUT_LOSS: dict[str, Callable[[Any], bool]] = {
    "store": lambda v: v is False,
    "truncation": lambda v: v == "disabled",
    "include": lambda v: v in ([], ["reasoning.encrypted_content"]),
    "background": lambda v: v is False,
}
"""Fields that need no words where their value only says what is done anyway."""
_READ = frozenset(("model", "input", "instructions", "tools", "tool_choice", "text", "reasoning", *_PLAIN, *ROUTER_FIELDS))


def _left_over(data: Mapping[str, Any]) -> dict[str, Any]:
    """What was said and has no word of the router's: for another language it is dropped, and noted."""
    said = {k: v for k, v in data.items() if k not in _READ and v is not None}
    verbosity = dig(data, "text.verbosity")
    extra = {k: v for k, v in said.items() if k not in _WITHOUT_LOSS or not _WITHOUT_LOSS[k](v)}
    return {**extra, **({"verbosity": verbosity} if verbosity else {})}


def _text_block(text: str) -> Block:
    return {"type": "text", "text": text}


def _read_input(data: Mapping[str, Any], request: Request) -> None:
    told = read_field(data, "input", (str, list), "a string or a list of items", required=not request.bound)
    items = [{"role": "user", "content": told}] if isinstance(told, str) else told or []
    if not items and not request.bound:
        raise BadRequest("input must not be empty", param="input")
    for i, item in enumerate(items):
        place = f"input[{i}]"
        kind = _kind(item, place)
        if kind == "item_reference":
            request.bound[place] = _STATELESS + f"the reference in {place}"
            continue
        role, blocks = _ITEMS[kind](item, place) if kind in _ITEMS else ("", [])
        if blocks:
            _join(request, role, blocks)
        elif f"input.{kind}" not in request.dropped:  # a hosted tool's trace, a thought that only its vendor can read
            request.dropped.append(f"input.{kind}")


def _kind(item: Any, place: str) -> str:
    """The type of an item; messages and references may leave it out."""
    if not isinstance(item, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    kind = item.get("type") or ("message" if "role" in item else "item_reference")
    if not isinstance(kind, str):
        raise BadRequest(f"{place}.type must be a string", param=f"{place}.type")
    return kind


def _join(request: Request, role: str, blocks: list[Block]) -> None:
    """Add an item's blocks: to the turn that it continues, or as a new one."""
    last = request.messages[-1] if request.messages else None
    if role == "system" and last is None:
        request.system += blocks
    elif last is not None and last.role == role and role in ("assistant", "tool"):
        last.content += blocks
    else:
        request.messages.append(Message(role, blocks))


def _string(item: Item, name: str, place: str) -> str:
    value: str = read_field(item, name, str, "a string", required=True, place=place)
    return value


def _message(item: Item, place: str) -> tuple[str, list[Block]]:
    role = _ROLES.get(_string(item, "role", place))
    if role is None:
        raise BadRequest(f"{place}.role: unknown role {item['role'][:40]!r}", param=f"{place}.role")
    return role, _parts(item.get("content"), f"{place}.content")


def _call(item: Item, place: str) -> tuple[str, list[Block]]:
    id, name = _string(item, "call_id", place), _string(item, "name", place)
    return "assistant", [openai.tool_use_block(id, name, _string(item, "arguments", place))]


def _custom_call(item: Item, place: str) -> tuple[str, list[Block]]:
    id, name = _string(item, "call_id", place), _string(item, "name", place)
    return "assistant", [{"type": "tool_use", "id": id, "name": name, "input": {"input": _string(item, "input", place)}}]


def _result(item: Item, place: str) -> tuple[str, list[Block]]:
    output = item.get("output")
    content = output if isinstance(output, str) else _parts(output, f"{place}.output")
    return "tool", [{"type": "tool_result", "tool_use_id": _string(item, "call_id", place), "content": content}]


def _thought(item: Item, place: str) -> tuple[str, list[Block]]:
    """A reasoning item: what can be read of it, and what another vendor sealed (see `_sealed`)."""
    sealed = item.get("encrypted_content")
    sealed = sealed if isinstance(sealed, str) else ""
    if sealed.startswith(_REDACTED):
        return "assistant", [{"type": "redacted_thinking", "data": sealed.removeprefix(_REDACTED)}]
    block: Block = {"type": "thinking", "thinking": _thought_text(item)}
    if sealed.startswith(_SIGNATURE):
        block["signature"] = sealed.removeprefix(_SIGNATURE)
    elif sealed:
        block["encrypted_content"] = sealed
    return "assistant", [block] if block["thinking"] or "signature" in block else []


def _thought_text(item: Item) -> str:
    parts = item.get("summary") or item.get("content") or ()
    return "\n\n".join(p["text"] for p in parts if isinstance(dig(p, "text"), str))


_SIGNATURE, _REDACTED = "thinking-signature:", "redacted-thinking:"
"""Anthropic's proofs of thinking travel through a Responses client in `encrypted_content`, marked, so that they are told
from what OpenAI sealed: Anthropic wants them back before it goes on after a tool call."""
_ROLES = {"user": "user", "assistant": "assistant", "system": "system", "developer": "system"}
_ITEMS: dict[str, Callable[[Item, str], tuple[str, list[Block]]]] = {
    "message": _message, "function_call": _call, "function_call_output": _result, "reasoning": _thought,
    "custom_tool_call": _custom_call, "custom_tool_call_output": _result,
}  # fmt: skip


def _parts(content: Any, place: str) -> list[Block]:
    if isinstance(content, str):
        return [_text_block(content)]
    if not isinstance(content, list):
        raise BadRequest(f"{place} must be a string or a list of parts", param=place)
    return [_part(p, f"{place}[{i}]") for i, p in enumerate(content)]


def _part(part: Any, place: str) -> Block:
    kind = dig(part, "type")
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return _text_block(_string(part, "text", place))
    if kind == "refusal":
        return _text_block(_string(part, "refusal", place))
    if kind == "input_image" and "file_id" not in part:
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {**openai.image_block(_string(part, "image_url", place)), **detail}
    if kind in ("input_file", "input_image"):
        return _document(part, place)
    if kind == "input_audio" and isinstance(part.get("input_audio"), dict):
        return {"type": "audio", **part["input_audio"]}
    raise BadRequest(f"{place}.type: unknown part", param=place)


def _document(part: Item, place: str) -> Block:
    """A file by its bytes (a data: URL), its URL, or the id under which it was uploaded to its vendor."""
    told = {ours: _string(part, name, place) for name, ours in _FILE.items() if part.get(name) is not None}
    if not told.keys() & {"file_data", "url", "file_id"}:
        raise BadRequest(f"{place} must have file_data, file_url or file_id", param=place)
    return openai.document_block(told)


_FILE = {"file_data": "file_data", "file_url": "url", "file_id": "file_id", "filename": "filename"}


def _tool(tool: Any, place: str) -> Tool:
    if not isinstance(tool, dict):
        raise BadRequest(f"{place} must be an object", param=place)
    kind = _string(tool, "type", place)
    return _TOOLS[kind](tool, place) if kind in _TOOLS else Tool(str(tool.get("name") or kind), extra=dict(tool))


def _function(tool: Item, place: str) -> Tool:
    parameters = read_field(tool, "parameters", dict, "an object", place=place) or {}
    strict = {"strict": tool["strict"]} if tool.get("strict") is not None else {}
    return Tool(_string(tool, "name", place), read_field(tool, "description", str, "a string", place=place), parameters, strict)


def _custom(tool: Item, place: str) -> Tool:
    """A tool that takes free text: elsewhere a function with one string, and the grammar is told in words."""
    described, grammar = read_field(tool, "description", str, "a string", place=place), dig(tool, "format.definition")
    told = [described, f"The input follows this grammar:\n{grammar}" if grammar else None]
    schema = {"type": "object", "properties": {"input": {"type": "string"}}, "required": ["input"]}
    return Tool(_string(tool, "name", place), "\n\n".join(t for t in told if t) or None, schema)


_TOOLS: dict[str, Callable[[Item, str], Tool]] = {"function": _function, "custom": _custom}


def _read_choice(choice: Any, request: Request) -> None:
    kind, name = dig(choice, "type"), dig(choice, "name")
    if choice in (None, "auto", "none", "required"):
        request.tool_choice = choice
    elif kind in _TOOLS and isinstance(name, str):
        request.tool_choice = f"tool:{name}"
    elif kind == "allowed_tools" and choice.get("mode") in ("auto", "required"):
        allowed = [dig(t, "name") or dig(t, "type") for t in choice.get("tools") or ()]
        request.tools = [t for t in request.tools if t.name in allowed]
        request.tool_choice = choice["mode"]
    elif isinstance(kind, str):
        request.dropped.append("tool_choice")  # one of the hosted tools
    else:
        raise BadRequest("tool_choice must be auto, none, required or name a tool", param="tool_choice")


def _response_format(data: Mapping[str, Any]) -> dict[str, Any] | None:
    form = dig(read_field(data, "text", dict, "an object"), "format")
    kind = dig(form, "type")
    if form is None or kind == "text":
        return None
    if kind == "json_object":
        return {"type": "json_object"}
    if kind == "json_schema" and isinstance(form.get("schema"), dict):
        return {"type": kind, "name": form.get("name") or "answer", "schema": form["schema"], "strict": form.get("strict")}
    raise BadRequest("text.format must be text, json_object or json_schema with a schema", param="text.format")


# The client face: answers -----------------------------------------------------------------------------------------------
def render(answer: Answer, request: Request, stamp: Stamp) -> dict[str, Any]:
    """A Response object with every field that the published schema requires: what a stream of this answer would end in."""
    renderer = Renderer(request, stamp)
    for event in answer.events():
        renderer.take(event)
    renderer.close()
    return renderer.response()


def render_usage(usage: Usage) -> dict[str, Any]:
    """Token counts in the names of Responses; input includes cached tokens, output includes reasoning."""
    rendered = {
        "input_tokens": usage.input_tokens,
        "input_tokens_details": {
            "cached_tokens": usage.cached_input_tokens,
            "cache_write_tokens": usage.cache_write_input_tokens,
        },
        "output_tokens": usage.output_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
        "total_tokens": usage.input_tokens + usage.output_tokens,
    }
    return {**rendered, "cost": usage.cost} if usage.cost is not None else rendered


_ECHOED: dict[str, Any] = {
    "background": False, "instructions": None, "max_output_tokens": None, "max_tool_calls": None, "metadata": {},
    "parallel_tool_calls": True, "previous_response_id": None, "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None}, "safety_identifier": None, "service_tier": "default",
    "temperature": 1.0, "text": {"format": {"type": "text"}}, "tool_choice": "auto", "tools": [], "top_logprobs": 0,
    "top_p": 1.0, "truncation": "disabled", "user": None,
}  # fmt: skip
"""What a response repeats of its request, and what it says where the request said nothing."""


def _envelope(told: Mapping[str, Any], stamp: Stamp) -> dict[str, Any]:
    echoed = {k: default if told.get(k) is None else told[k] for k, default in _ECHOED.items()}
    echoed["reasoning"] = {**_ECHOED["reasoning"], **echoed["reasoning"]}
    echoed["text"] = {**_ECHOED["text"], **echoed["text"]}
    return {
        "id": f"resp_{stamp.id}", "object": "response", "created_at": stamp.created, "status": "in_progress",
        "error": None, "incomplete_details": None, "model": stamp.model, "output": [], "store": False, "usage": None, **echoed,
    }  # fmt: skip


class _Growing:
    """An item of an output while it grows: each of its steps gives the events that tell of it."""

    def __init__(self, index: int, item: Item) -> None:
        self.item = item
        self._index = index
        self._pieces: list[str] = []

    def begin(self) -> list[Item]:
        return [self._of_item("added", {**self.item, "status": "in_progress"})]

    def add(self, piece: str) -> list[Item]:
        self._pieces.append(piece)
        return self.grown(piece)

    def grown(self, piece: str) -> list[Item]:
        """The events for a piece that has just been added."""
        raise NotImplementedError

    def end(self, status: str) -> list[Item]:
        """The closing events; from now on `item` is as it will stay."""
        events = self.close("".join(self._pieces))
        self.item["status"] = status
        return [*events, self._of_item("done", self.item)]

    def break_off(self) -> None:
        """Leave the item as it is, incomplete, unless it has ended before."""
        if "status" not in self.item:
            self.close("".join(self._pieces))
            self.item["status"] = "incomplete"

    def close(self, text: str) -> list[Item]:
        """Put what has grown into the item; the events that come before the item's own last one."""
        raise NotImplementedError

    def _event(self, kind: str, **more: Any) -> Item:
        return {"type": f"response.{kind}", "item_id": self.item["id"], "output_index": self._index, **more}

    def _of_item(self, what: str, item: Item) -> Item:
        return {"type": f"response.output_item.{what}", "output_index": self._index, "item": item}


class _GrowingMessage(_Growing):
    def __init__(self, index: int, stamp: Stamp) -> None:
        super().__init__(index, {"id": f"msg_{stamp.id}_{index}", "type": "message", "role": "assistant", "content": []})

    def begin(self) -> list[Item]:
        return [*super().begin(), self._event("content_part.added", content_index=0, part=_output_text(""))]

    def grown(self, piece: str) -> list[Item]:
        return [self._event("output_text.delta", content_index=0, delta=piece, logprobs=[])]

    def close(self, text: str) -> list[Item]:
        part = _output_text(text)
        self.item["content"] = [part]
        return [
            self._event("output_text.done", content_index=0, text=text, logprobs=[]),
            self._event("content_part.done", content_index=0, part=part),
        ]


def _output_text(text: str) -> Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


class _GrowingThought(_Growing):
    """Reasoning is told as a summary, the place where clients look for what may be shown."""

    def __init__(self, index: int, stamp: Stamp) -> None:
        item: Item = {"id": f"rs_{stamp.id}_{index}", "type": "reasoning", "summary": [], "encrypted_content": None}
        super().__init__(index, item)

    def grown(self, piece: str) -> list[Item]:
        delta = self._event("reasoning_summary_text.delta", summary_index=0, delta=piece)
        if len(self._pieces) > 1:
            return [delta]
        return [self._event("reasoning_summary_part.added", summary_index=0, part=_summary("")), delta]

    def close(self, text: str) -> list[Item]:
        if not text:
            return []
        self.item["summary"] = [_summary(text)]
        return [
            self._event("reasoning_summary_text.done", summary_index=0, text=text),
            self._event("reasoning_summary_part.done", summary_index=0, part=_summary(text)),
        ]


def _summary(text: str) -> Item:
    return {"type": "summary_text", "text": text}


class _GrowingCall(_Growing):
    letters, kind, content = "fc", "function_call", "arguments"

    def __init__(self, index: int, stamp: Stamp, call: ToolCall) -> None:
        told = {"call_id": call.id or f"call_{stamp.id}_{index}", "name": call.name or "", self.content: ""}
        super().__init__(index, {"id": f"{self.letters}_{stamp.id}_{index}", "type": self.kind, **told})

    def grown(self, piece: str) -> list[Item]:
        return [self._event("function_call_arguments.delta", delta=piece)] if piece else []

    def close(self, text: str) -> list[Item]:
        self.item["arguments"] = text
        return [self._event("function_call_arguments.done", name=self.item["name"], arguments=text)]


class _GrowingCustomCall(_GrowingCall):
    """A call of a tool that takes free text. The text lies in JSON, so it can be told only when it is complete."""

    letters, kind, content = "ctc", "custom_tool_call", "input"

    def grown(self, piece: str) -> list[Item]:
        return []

    def close(self, text: str) -> list[Item]:
        told = dig(read_object(text.encode("utf-8", "surrogatepass")), "input")
        self.item["input"] = free = told if isinstance(told, str) else text
        return [
            self._event("custom_tool_call_input.delta", delta=free),
            self._event("custom_tool_call_input.done", input=free),
        ]


_ENDINGS = {"length": ("incomplete", "max_output_tokens"), "content_filter": ("incomplete", "content_filter")}
"""finish reason -> (status, why it is incomplete); everything else is completed."""


class Renderer:
    """A stream for a Responses client: every event numbered, items complete when done, the whole response at the end.

    Text and thinking follow each other, so one ends the other; tool calls may grow at the same time and end with the answer.
    """

    def __init__(self, request: Request, stamp: Stamp) -> None:
        told = request.body.data
        self._stamp, self._response = stamp, _envelope(told, stamp)
        self._custom = {dig(t, "name") for t in told.get("tools") or () if dig(t, "type") == "custom"}
        self._items: list[_Growing] = []
        self._writing: _Growing | None = None
        self._calls: dict[int, _Growing] = {}
        self._finish: Finish | None = None
        self._number = 0

    def feed(self, event: Event) -> bytes:
        """What the client gets to read of this event, b"" for what has no place in this dialect."""
        return self._head() + self._tell(self.take(event))

    def end(self) -> bytes:
        """The end of a complete answer."""
        return self._head() + self._tell([*self.close(), self._lifecycle(self._response["status"])])

    def fail(self, error: RequestError) -> bytes:
        """The end of an answer that broke: the error, and the response with what there is of it."""
        head = self._head()
        for growing in self._items:
            growing.break_off()
        self._response |= {"output": [g.item for g in self._items], "status": "failed", "error": _response_error(error)}
        return head + self._tell([_error_event(error), self._lifecycle("failed")])

    def response(self) -> dict[str, Any]:
        """The response as far as it has come."""
        return self._response

    def take(self, event: Event) -> list[Item]:
        """The events, not yet numbered, that tell of an event."""
        take = self._takes.get(type(event))
        return take(self, event) if take else []

    def close(self) -> list[Item]:
        """End everything that still grows; an answer without any item is one with an empty message."""
        status, why = _ENDINGS.get(self._finish.reason if self._finish else "stop", ("completed", None))
        events = [] if self._items else self._write(_GrowingMessage, "")
        events += self._stop_writing(status)
        for call in self._calls.values():
            events += call.end(status)
        self._response |= {"status": status, "output": [g.item for g in self._items]}
        self._response["incomplete_details"] = {"reason": why} if why else None
        self._response["usage"] = self._response["usage"] or render_usage(Usage())
        return events

    def _head(self) -> bytes:
        return b"" if self._number else self._tell([self._lifecycle(what) for what in _BEGINNING])

    def _lifecycle(self, what: str) -> Item:
        return {"type": f"response.{what}", "response": self._response}

    def _tell(self, events: list[Item]) -> bytes:
        blocks = []
        for event in events:
            blocks.append(sse(dumps({**event, "sequence_number": self._number}), event["type"]))
            self._number += 1
        return b"".join(blocks)

    def _start(self, growing: _Growing) -> list[Item]:
        events = self._stop_writing("completed")
        self._items.append(growing)
        self._writing = growing if isinstance(growing, (_GrowingMessage, _GrowingThought)) else None
        return events + growing.begin()

    def _stop_writing(self, status: str) -> list[Item]:
        growing, self._writing = self._writing, None
        return growing.end(status) if growing else []

    def _write(self, kind: type[_GrowingMessage | _GrowingThought], piece: str) -> list[Item]:
        """Add to the item being written, or to a new one if that is of another kind."""
        events: list[Item] = []
        if not isinstance(self._writing, kind):
            events = self._start(kind(len(self._items), self._stamp))
        return events + (self._items[-1].add(piece) if piece else [])

    def _text(self, event: Text) -> list[Item]:
        return self._write(_GrowingMessage, event.text) if event.text and not event.choice else []

    def _reasoning(self, event: Reasoning) -> list[Item]:
        if event.redacted is not None:
            return self._stop_writing("completed") + self._seal(_REDACTED + event.redacted)
        events = self._write(_GrowingThought, event.text) if event.text else []
        return events + (self._seal(_SIGNATURE + event.signature) if event.signature is not None else [])

    def _seal(self, sealed: str) -> list[Item]:
        """What proves a thought belongs to it and ends it; without one it is a thought of its own."""
        events = self._write(_GrowingThought, "")
        self._items[-1].item["encrypted_content"] = sealed
        return events + self._stop_writing("completed")

    def _tool_call(self, event: ToolCall) -> list[Item]:
        events: list[Item] = []
        if event.index not in self._calls:
            kind = _GrowingCustomCall if event.name in self._custom else _GrowingCall
            self._calls[event.index] = kind(len(self._items), self._stamp, event)
            events = self._start(self._calls[event.index])
        return events + self._calls[event.index].add(event.arguments)

    def _finished(self, event: Finish) -> list[Item]:
        self._finish = event
        return []

    def _used(self, event: Used) -> list[Item]:
        self._response["usage"] = render_usage(event.usage)
        return []

    _takes: dict[type, Callable[..., list[Item]]] = {  # noqa: RUF012 - a dispatch table, never changed
        Text: _text, Reasoning: _reasoning, ToolCall: _tool_call, Finish: _finished, Used: _used,
    }  # fmt: skip


class Relay:
    """A stream that is passed on as it came. What it says is only looked at, so that one that breaks can end as it was
    going on: by its own numbers, with its own response and what there is of its items."""

    def __init__(self, request: Request, stamp: Stamp) -> None:
        self._begun = False
        self._number = 0
        self._response = _envelope(request.body.data, stamp)
        self._items: dict[int, Item] = {}
        self._growing: dict[int, dict[int, list[str]]] = {}

    def feed(self, blocks: list[tuple[bytes, list[Event]]]) -> bytes:
        """The blocks as they came."""
        for block, _ in blocks:
            _, data = event_data(block.removeprefix(b"\xef\xbb\xbf"))
            self._look(read_object(data or b"") or {})
        return b"".join(block for block, _ in blocks)

    def fail(self, error: RequestError) -> bytes:
        """The end of an answer that broke: the error, and the response with what there is of it."""
        begin = [] if self._begun else [{"type": f"response.{what}", "response": self._response} for what in _BEGINNING]
        output = [self._broken(index, item) for index, item in sorted(self._items.items())]
        failed = {**self._response, "output": output, "status": "failed", "error": _response_error(error)}
        told = [*begin, _error_event(error), {"type": "response.failed", "response": failed}]
        return b"".join(sse(dumps({**e, "sequence_number": n}), e["type"]) for n, e in enumerate(told, self._number))

    def _look(self, said: Item) -> None:
        if "type" not in said:
            return
        number, index = said.get("sequence_number"), said.get("output_index")
        self._number = (number if type(number) is int else self._number) + 1
        if isinstance(said.get("response"), dict):
            self._begun, self._response = True, said["response"]
        if type(index) is not int:
            return
        if isinstance(said.get("item"), dict):
            self._items[index] = said["item"]
            self._growing[index] = {}
        if said["type"] == "response.output_item.done":
            self._growing.pop(index, None)
        if index in self._growing and isinstance(said.get("delta"), str):
            places = (said.get("summary_index"), said.get("content_index"))
            part = next((place for place in places if type(place) is int), 0)
            self._growing[index].setdefault(part, []).append(said["delta"])

    def _broken(self, index: int, item: Item) -> Item:
        """An item as it stays: with what it had grown to, unless it has ended before."""
        if index not in self._growing:
            return item
        fill, parts = _FILLED.get(str(item.get("type"))), ["".join(pieces) for pieces in self._growing[index].values()]
        return {**item, **(fill(parts) if fill and parts else {}), "status": "incomplete"}


_BEGINNING = ("created", "in_progress")
_FILLED: dict[str, Callable[[list[str]], Item]] = {
    "message": lambda parts: {"content": [_output_text(p) for p in parts]},
    "reasoning": lambda parts: {"summary": [_summary(p) for p in parts]},
    "function_call": lambda parts: {"arguments": "".join(parts)},
    "custom_tool_call": lambda parts: {"input": "".join(parts)},
}
"""Type of an item -> the field that its deltas are the text of."""


def render_error(error: RequestError) -> dict[str, Any]:
    """The error object, the same as everywhere at OpenAI."""
    return openai.render_error(error)


_FAILURES = {"rate_limit": "rate_limit_exceeded", "invalid_request": "invalid_prompt"}


def _response_error(error: RequestError) -> dict[str, Any]:
    """`response.error`: its codes are a closed list, by which Codex decides whether to try again."""
    return {"code": _FAILURES.get(error.kind, "server_error"), "message": render_error(error)["error"]["message"]}


def _error_event(error: RequestError) -> Item:
    """The `error` event. Its fields stand flat, but the official clients raise only for an `error` object in it; Codex
    knows neither and waits for `response.failed`."""
    told = render_error(error)["error"]
    return {"type": "error", "code": told["code"], "message": told["message"], "param": told["param"], "error": told}


# The words of upstreams that speak it -----------------------------------------------------------------------------------
def build(request: Request, model: str, provider: Provider) -> Call:
    """The client's own bytes with another model, for an openai provider that has /responses."""
    onward = forwarded(request, provider)
    kind = "responses_stream" if request.stream else "responses"
    body = request.body.with_fields({"model": model, **onward}, ROUTER_FIELDS - onward.keys())
    return Call("/responses", body, kind)


def parse(data: bytes, request: Request) -> list[Event]:
    """The events of a whole answer. Raises UpstreamError if the body is none, or tells of a failure."""
    body = read_object(data)
    if body is None:
        raise malformed("an answer that is not JSON")
    if body.get("error") or body.get("status") in ("failed", "cancelled"):
        raise _failure(body)
    finished = body.get("status") in (None, "completed", "incomplete") or request.body.data.get("background")
    if not isinstance(body.get("output"), list) or not finished:
        raise malformed("an answer that is not a finished response")
    return [Begin(_word(body.get("id")), _word(body.get("model"))), *_output_events(body["output"]), *_end_events(body)]


def parse_error(body: dict[str, Any]) -> dict[str, Any] | None:
    """message, type, param and code of an upstream's error object, keys scrubbed; None if it is none."""
    return openai.parse_error(body)


def _failure(body: dict[str, Any]) -> UpstreamError:
    return UpstreamError("the provider reported an error in its answer", code="upstream_in_band_error", retryable=True,
                         detail=parse_error(body))  # fmt: skip


def _word(value: Any) -> str | None:
    return value if isinstance(value, str) and value else None


class Parser(BlockParser):
    """The events of a stream of Responses events."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[int, int] = {}
        self._told = False

    def events(self, block: bytes) -> list[Event]:
        _, data = event_data(block)
        if data is None:
            return []
        if data.strip() == b"[DONE]":
            return [Done()]
        said = read_object(data)
        if said is None:
            return [Malformed("an event that is not JSON")]
        hear = self._hears.get(said.get("type", ""))
        events = hear(self, said) if hear else []
        self._told = self._told or any(isinstance(e, (Text, Reasoning, ToolCall)) for e in events)
        return events

    def _begin(self, said: Item) -> list[Event]:
        return [Begin(_word(said["response"].get("id")), _word(said["response"].get("model")))]

    def _delta(self, said: Item) -> list[Event]:
        return [Text(said["delta"])] if said["delta"] else []

    def _thought(self, said: Item) -> list[Event]:
        return [Reasoning(said["delta"])] if said["delta"] else []

    def _part(self, said: Item) -> list[Event]:
        return [Reasoning("\n\n")] if said["summary_index"] else []

    def _added(self, said: Item) -> list[Event]:
        item = said["item"]
        if item["type"] not in ("function_call", "custom_tool_call"):
            return []
        index = self._calls[said["output_index"]] = len(self._calls)
        return [ToolCall(index, _word(item.get("call_id")), _word(item.get("name")), item.get("arguments") or "")]

    def _arguments(self, said: Item) -> list[Event]:
        return [ToolCall(self._calls[said["output_index"]], arguments=said["delta"])]

    def _done(self, said: Item) -> list[Event]:
        item, index = said["item"], self._calls.get(said["output_index"])
        if item["type"] == "custom_tool_call" and index is not None:
            return [ToolCall(index, arguments=dumps({"input": item["input"]}))]
        return _seal_events(item) if item["type"] == "reasoning" else []

    def _end(self, said: Item) -> list[Event]:
        response = said["response"]
        told = [] if self._told else _output_events(response.get("output") or [])
        return [*told, *_end_events(response), Done()]

    def _failed(self, said: Item) -> list[Event]:
        flat = {k: said.get(k) for k in ("message", "code", "param")}
        raise _failure({"error": dig(said, "response.error") or said.get("error") or flat})

    _hears: dict[str, Callable[..., list[Event]]] = {  # noqa: RUF012 - a dispatch table, never changed
        "response.created": _begin,
        "response.output_text.delta": _delta,
        "response.refusal.delta": _delta,
        "response.reasoning_summary_text.delta": _thought,
        "response.reasoning_text.delta": _thought,
        "response.reasoning_summary_part.added": _part,
        "response.output_item.added": _added,
        "response.function_call_arguments.delta": _arguments,
        "response.output_item.done": _done,
        "response.completed": _end,
        "response.incomplete": _end,
        "response.failed": _failed,
        "error": _failed,
    }


def _output_events(output: list[Item]) -> list[Event]:
    events: list[Event] = []
    calls = 0
    for item in output:
        kind = item.get("type")
        if kind == "message":
            events += [Text(p.get("text") or p.get("refusal") or "") for p in item["content"]]
        elif kind == "reasoning":
            text = _thought_text(item)
            events += [*([Reasoning(text)] if text else []), *_seal_events(item)]
        elif kind in ("function_call", "custom_tool_call"):
            arguments = item["arguments"] if kind == "function_call" else dumps({"input": item["input"]})
            events.append(ToolCall(calls, _word(item.get("call_id")), _word(item.get("name")), arguments))
            calls += 1
    return events


def _seal_events(item: Item) -> list[Event]:
    sealed = item.get("encrypted_content") or ""
    if sealed.startswith(_SIGNATURE):
        return [Reasoning(signature=sealed.removeprefix(_SIGNATURE))]
    return [Reasoning(redacted=sealed.removeprefix(_REDACTED))] if sealed.startswith(_REDACTED) else []


_REASONS = {"max_output_tokens": "length", "content_filter": "content_filter"}


def _end_events(response: Item) -> list[Event]:
    events: list[Event] = []
    if isinstance(response.get("usage"), dict):
        usage = Usage.of(
            response["usage"], input_tokens="input_tokens", output_tokens="output_tokens",
            cached_input_tokens="input_tokens_details.cached_tokens",
            cache_write_input_tokens="input_tokens_details.cache_write_tokens",
            reasoning_tokens="output_tokens_details.reasoning_tokens",
        )  # fmt: skip
        usage.cost = amount(response["usage"].get("cost"))
        events.append(Used(usage))
    why = _word(dig(response, "incomplete_details.reason"))
    called = any(dig(i, "type") in ("function_call", "custom_tool_call") for i in response.get("output") or ())
    reason = _REASONS.get(why, "stop") if why else "tool_calls" if called else "stop"
    return [*events, Finish(reason, why or _word(response.get("status")))]
