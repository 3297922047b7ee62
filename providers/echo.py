"""Echo, the embedded model: answers without a network, so that a router with nothing behind it answers all the same.

It repeats what the user said last, word by word; every word is a token. It obeys max_tokens, stop and JSON mode, and calls
a tool when it must (tool_choice required, or a tool named). For demonstrations the prompt may hold orders in brackets:

    [[echo delay=2 gap=0.1 words=50 status=503 cut=5 stall=5]]

delay: seconds before the first word; gap: seconds between words; words: that many words instead of the echo; status: fail
with this HTTP status; cut: break off after so many words; stall: fall silent after so many words.

As an upstream it speaks newline-delimited JSON to itself: `serve` is the server, `build`, `parse` and `Parser` the language.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from typing import Any

from providers import (
    SLICE,
    BadRequest,
    Begin,
    BlockParser,
    Call,
    Done,
    Event,
    Finish,
    Lines,
    Provider,
    Request,
    Text,
    Tool,
    ToolCall,
    Usage,
    Used,
    Watch,
    block_text,
    dig,
    dumps,
    late,
    lost,
    read_object,
    shown,
)  # fmt: skip

MODELS = ("echo",)
CAPABILITIES = frozenset(("completion", "tools"))


def endpoint(base_url: str) -> str:
    """Nothing to connect to: the model is in this process."""
    return base_url


def credentials(key: str) -> dict[str, str]:
    """The embedded model wants no key."""
    return {}


def build(request: Request, model: str, provider: Provider) -> Call:
    """What the embedded model needs to know of a request. What it has no use for (sampling) is dropped and noted.

    Raises BadRequest for what it cannot read.
    """
    for kind in shown(request).values():
        raise BadRequest(f"the echo model reads text only, no {kind} in {request.text_field}", param=request.text_field)
    said = [block_text(b) for m in request.messages if m.role == "user" for b in m.content[-1:]]
    order = {
        "say": said[-1] if said else "",
        "input_tokens": len(request.text().split()),
        "stream": request.stream,
        "max_tokens": request.max_tokens,
        "stop": request.stop,
        "json": request.response_format is not None,
        "tool": _chosen(request),
    }
    unused = ("temperature", "top_p", "top_k", "seed", "presence_penalty", "frequency_penalty", "reasoning")
    dropped = [name for name in unused if getattr(request, name) is not None]
    dropped += ["n"] if request.n > 1 else []
    return Call("/", dumps(order).encode(), "echo_stream" if request.stream else "echo_chat", dropped=dropped)


def _chosen(request: Request) -> dict[str, Any] | None:
    """The tool to call, if one must be: never again once its result is in."""
    choice, last = request.tool_choice or "", request.messages[-1:]
    if not request.tools or (last and last[0].role == "tool") or not (choice == "required" or choice.startswith("tool:")):
        return None
    tool = next((t for t in request.tools if choice == f"tool:{t.name}"), request.tools[0])
    return {"name": tool.name, "arguments": _arguments(tool)}


def _arguments(tool: Tool) -> dict[str, Any]:
    """The least that satisfies the tool's schema: every required property with a value of its type."""
    properties = tool.parameters.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = tool.parameters.get("required")
    return {name: _example(properties.get(name)) for name in (required if isinstance(required, list) else [])}


def _example(schema: Any) -> Any:
    options = dig(schema, "enum")
    if isinstance(options, list) and options:
        return options[0]
    kind = dig(schema, "type")
    return {"integer": 1, "number": 1.0, "boolean": True, "array": [], "object": {}}.get(
        kind if isinstance(kind, str) else "", "echo"
    )


# The server ---------------------------------------------------------------------------------------------------------------
def serve(call: Call, watch: Watch, provider: Provider) -> Served:
    """Answer a call in this process; the counterpart of sending it over a connection."""
    order = read_object(call.body) or {}
    return Served(order, watch, provider)


class Served:
    """An answer of the embedded model: looks like `providers.Reply`, waits by the same rules, needs no socket."""

    def __init__(self, order: dict[str, Any], watch: Watch, provider: Provider) -> None:
        self._orders = _orders(order["say"])
        self._watch, self._limits = watch, provider
        self._total = time.monotonic() + provider.total_timeout
        self._due = time.monotonic() + self._orders.get("delay", 0.0)
        self._patience, self._limit = provider.read_timeout, "first_byte"
        self._lines = iter(_answer(order, self._orders))
        self._stream = order["stream"]
        self.status = int(self._orders.get("status", 200))
        self.headers: dict[str, str] = {"content-type": "application/x-ndjson"}
        self.finished = False

    def head(self, until: float = float("inf")) -> bool:
        """Wait out the ordered delay; False if `until` passed first."""
        return self._wait(self._due, until)

    def read(self, until: float = float("inf")) -> bytes | None:
        """The next line; b"" at the end; None if `until` passed first."""
        if not self._wait(self._due, until):
            return None
        line = next(self._lines, None)
        if line is None:
            self.finished = True
            return b""
        if self._stream:
            self._due = time.monotonic() + (self._orders.get("gap", 0.0) if "text" in line else 0.0)
        if "stall" in line:
            self._due = float("inf")
            return self.read(until)
        if "cut" in line:
            raise lost("the provider's answer broke off")
        return dumps(line).encode() + b"\n"

    def read_all(self, until: float = float("inf")) -> bytes:
        """All the lines."""
        lines = []
        while line := self.read(until):
            lines.append(line)
        return b"".join(lines)

    def streaming(self) -> None:
        """From now on the limit between two words counts."""
        self._patience, self._limit = self._limits.idle_timeout, "stream_idle"

    def close(self) -> None:
        """Nothing to give back."""
        self.finished = True

    def _wait(self, due: float, until: float) -> bool:
        give_up = time.monotonic() + self._patience
        while (now := time.monotonic()) < due:
            self._watch.check()
            if now >= self._total:
                raise late("total", self._limits.total_timeout)
            if now >= give_up:
                raise late(self._limit, self._patience)
            if now >= until:
                return False
            time.sleep(max(0.0, min(SLICE, due - now, until - now, give_up - now, self._total - now)))
        return True


def _orders(text: str) -> dict[str, float]:
    found = re.search(r"\[\[echo ((?:\s*[a-z]+=[0-9.]+)+)\s*\]\]", text)
    pairs = (pair.split("=") for pair in found[1].split()) if found else ()
    return {name: min(float(value), 1e6) for name, value in pairs if re.fullmatch(r"\d+(\.\d+)?", value)}


def _answer(order: dict[str, Any], orders: dict[str, float]) -> Iterator[dict[str, Any]]:
    if "status" in orders and orders["status"] != 200:
        yield {"error": {"message": "told to fail"}}
        return
    used, stop = 0, None
    yield {"input_tokens": order["input_tokens"]}
    if order["tool"]:
        yield {"tool": order["tool"]}
        used, reason = 1 + len(dumps(order["tool"]["arguments"])) // 4, "tool_calls"
    else:
        words, reason, stop = _words(order, orders)
        for used, word in enumerate(words, 1):
            if used > orders.get("cut", 1e9):
                yield {"cut": True}
            if used > orders.get("stall", 1e9):
                yield {"stall": True}
            yield {"text": word}
    yield {"done": reason, "stop_sequence": stop, "input_tokens": order["input_tokens"], "output_tokens": used}


def _words(order: dict[str, Any], orders: dict[str, float]) -> tuple[list[str], str, str | None]:
    """The words to say, each with the space before it, why there are no more of them, and the stop sequence if it was one."""
    said = re.sub(r"\s*\[\[echo [^\]]*\]\]\s*", " ", order["say"]).strip()
    if "words" in orders:
        said = " ".join(f"word{i}" for i in range(1, int(orders["words"]) + 1))
    said = json.dumps({"echo": said}) if order["json"] else said or "Nothing was said, so there is nothing to echo."
    cuts = {at: stop for stop in reversed(order["stop"]) if stop and (at := said.find(stop)) >= 0}
    words = re.findall(r"\s*\S+", said[: min(cuts)] if cuts else said)
    limit = order["max_tokens"]
    if limit is not None and limit < len(words):
        return words[:limit], "length", None
    return words, "stop", cuts[min(cuts)] if cuts else None


# The language -------------------------------------------------------------------------------------------------------------
def parse(data: bytes, request: Request) -> list[Event]:
    """The events of a whole answer, which is lines as well."""
    return [event for _, events in Parser().feed(data) for event in events]


class Parser(BlockParser):
    """The events of a line."""

    cutter = Lines

    def __init__(self) -> None:
        super().__init__()
        self._begun = False

    def events(self, block: bytes) -> list[Event]:
        line = read_object(block) or {}
        events: list[Event] = []
        if not self._begun:
            self._begun = True
            events += [Begin(model=MODELS[0]), Used(Usage(input_tokens=line.get("input_tokens", 0)))]
        if "text" in line:
            events.append(Text(line["text"]))
        if "tool" in line:
            events.append(ToolCall(0, "call_echo_0", line["tool"]["name"], dumps(line["tool"]["arguments"])))
        if "done" in line:
            usage = Usage(input_tokens=line["input_tokens"], output_tokens=line["output_tokens"])
            events += [Finish(line["done"], line["done"], line["stop_sequence"]), Used(usage), Done()]
        return events
