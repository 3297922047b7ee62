"""What providers do wrong: dead, slow, broken, lying, hostile. The client learns the truth, and nothing piles up."""

from __future__ import annotations

import gzip
import json
import math
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from conftest import RouterFactory
from fake_upstream import (
    DONE,
    FakeUpstream,
    Received,
    Script,
    answer,
    chat_completion,
    chunk_object,
    chunks,
    completion_for,
    end,
    error_answer,
    event,
    fin,
    framed,
    head,
    json_answer,
    openai_chunks,
    pause,
    raw,
    silence,
    stream,
    stream_head,
    trickle,
    usage_object,
)
from router_process import PROVIDER_KEY, SECRET_PROMPT, RouterProcess, free_port, until

KEYED = 'api_key_env = "KEY"\n'
KEY = {"KEY": PROVIDER_KEY}


@pytest.fixture
def process(router: RouterFactory) -> Iterator[RouterProcess]:
    """A router with small limits, which must be as good as new after the test."""
    made = router(provider=KEYED + "connect_timeout = 1\nread_timeout = 1\nidle_timeout = 1\ntotal_timeout = 4", environment=KEY)
    made.chat("warm up")
    before = made.resources()
    yield made
    assert made.get("/health").status == 200
    made.comes_back_to(before)


def last(process: RouterProcess, count: int = 2) -> dict[str, Any]:
    """The record after the warm-up's."""
    return process.settled(count)[-1]


def streamed(process: RouterProcess, text: str = "hi", **more: Any) -> tuple[int, bytes]:
    with process.stream(text, **more) as reply:
        return reply.status, reply.read()


def error_event(body: bytes) -> dict[str, Any]:
    """The error object a broken stream ends with."""
    assert b"[DONE]" not in body
    block = body.split(b"\n\n")[-2]
    error: dict[str, Any] = json.loads(block.removeprefix(b"data: "))["error"]
    assert error["src"] == "router"
    return error


# --- not there


def test_a_refused_connection_is_a_502(router: RouterFactory) -> None:
    process = router(upstream=f"http://127.0.0.1:{free_port()}")
    for reply in (process.chat(), process.chat(stream=True)):
        assert reply.status == 502
        assert reply.error["message"]
    for record in process.settled(2):
        assert (record["outcome"], record["status"], record["attempts"][0]["status"]) == ("error", 502, None)


def test_a_name_that_does_not_exist_is_a_502(router: RouterFactory) -> None:
    process = router(upstream="http://does-not-exist.invalid", provider="connect_timeout = 5")
    answered = process.chat(timeout=30)
    assert answered.status == 502
    assert answered.error["message"]


def test_a_connection_nobody_accepts_is_a_504_within_the_connect_limit(router: RouterFactory) -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for sock in waiting:
            sock.setblocking(False)
            sock.connect_ex(address)
        process = router(upstream=f"http://127.0.0.1:{address[1]}", provider="connect_timeout = 0.5")
        began = time.monotonic()
        assert process.chat().status == 504
        assert time.monotonic() - began < 4
        assert process.record()["outcome"] == "timeout"
        for sock in waiting:
            sock.close()


def test_tls_with_a_server_that_speaks_none_is_a_502(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(upstream=upstream.url.replace("http", "https"), provider="read_timeout = 2\nconnect_timeout = 2")
    answered = process.chat()
    assert answered.status in (502, 504)
    assert process.record()["outcome"] in ("error", "timeout")


# --- slow


def test_a_trickled_head_ends_at_the_first_byte_limit(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(trickle(head(200, {"X-Filler": "x" * 500}), 0.05))
    began = time.monotonic()
    assert process.chat().status == 504
    assert time.monotonic() - began < 5, "bytes are no answer: the head must be whole"
    assert last(process)["outcome"] == "timeout"


def test_a_trickled_body_ends_at_the_total_limit(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(
        raw(head(200, {"Content-Length": "1000", "Content-Type": "application/json"})) + trickle(b'{"id": "' + b"x" * 900, 0.3)
    )
    began = time.monotonic()
    assert process.chat().status == 504
    assert 3 < time.monotonic() - began < 7
    assert last(process)["outcome"] == "timeout"


def test_a_trickled_stream_ends_at_the_total_limit(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("a " * 100, finish=None, done=False), 0.3))
    began = time.monotonic()
    status, body = streamed(process)
    assert 3 < time.monotonic() - began < 7
    assert status == 200
    assert error_event(body)["message"]
    record = last(process)
    assert record["outcome"] == "timeout"
    assert record["response"]["content"].startswith("a a")
    assert upstream.posts[1].closed_within(1)


def test_a_line_that_never_ends_is_idle(process: RouterProcess, upstream: FakeUpstream) -> None:
    """Bytes without an event: whichever limit ends it, it ends."""
    upstream.script(stream_head() + chunks(openai_chunks("a", None, None, False)) + chunks([b"x"] * 100, 0.2))
    began = time.monotonic()
    status, body = streamed(process)
    assert time.monotonic() - began < 7
    assert status == 200
    assert error_event(body)
    assert last(process)["outcome"] == "timeout"


def test_the_limits_bind_each_by_itself(router: RouterFactory, upstream: FakeUpstream) -> None:
    """A slow first byte is not idleness, and a stream may last longer than a first byte may take."""
    process = router(provider="read_timeout = 3\nidle_timeout = 0.7\ntotal_timeout = 20")
    upstream.script(pause(1.5) + stream_head() + chunks(openai_chunks("a b c d e f"), 0.35) + end())
    status, body = streamed(process)
    assert (status, body.endswith(DONE)) == (200, True)
    assert process.record()["outcome"] == "ok"


def test_a_stalled_connection_is_not_used_again(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(stream_head() + chunks(openai_chunks("a", None, None, False)) + silence())
    streamed(process)
    assert process.chat().status == 200
    stalled, after = upstream.posts[1:]
    assert stalled.connection != after.connection
    assert stalled.closed_within(1)


# --- SSE, by the book

WELL_FORMED: dict[str, Callable[[list[bytes]], list[bytes]]] = {
    "as it is": lambda blocks: blocks,
    "CRLF": lambda blocks: [block.replace(b"\n", b"\r\n") for block in blocks],
    "CR": lambda blocks: [block.replace(b"\n", b"\r") for block in blocks],
    "CRLF split over reads": lambda blocks: _split_after(b"".join(blocks).replace(b"\n", b"\r\n"), b"\r"),
    "one byte a chunk": lambda blocks: [bytes([byte]) for byte in b"".join(blocks)],
    "all at once": lambda blocks: [b"".join(blocks)],
    "no space after the colon": lambda blocks: [block.replace(b"data: ", b"data:") for block in blocks],
    "a byte order mark": lambda blocks: [b"\xef\xbb\xbf" + blocks[0], *blocks[1:]],
    "comments between": lambda blocks: [piece for block in blocks for piece in (b": ping\n\n", block)],
    "comments inside": lambda blocks: [b": ping\n" + block for block in blocks],
    "event, id and retry": lambda blocks: [b"event: message\nid: 1\nretry: 5\n" + block for block in blocks],
    "unknown fields": lambda blocks: [b"nonsense\nfoo: bar\n" + block for block in blocks],
    "data in several lines": lambda blocks: [block.replace(b', "object"', b',\ndata: "object"') for block in blocks],
    "blank lines between": lambda blocks: [b"\n\n" + block + b"\n" for block in blocks],
    "the last blank line missing": lambda blocks: [*blocks[:-1], blocks[-1].rstrip(b"\n")],
    "the last line end missing": lambda blocks: [*blocks[:-1], blocks[-1].removesuffix(b"\n\n") + b"\n"],
}


def _split_after(data: bytes, mark: bytes) -> list[bytes]:
    return [piece + mark for piece in data.split(mark)[:-1]] + [data.split(mark)[-1]]


TEXT = "a é☃ \U0001f600 b"


@pytest.mark.parametrize("form", WELL_FORMED)
def test_every_way_to_write_an_event_stream_is_understood_and_passed_on(
    process: RouterProcess, upstream: FakeUpstream, form: str
) -> None:
    pieces = WELL_FORMED[form](openai_chunks(TEXT, {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}))
    upstream.script(stream([piece for piece in pieces if piece]))
    status, body = streamed(process, stream_options={"include_usage": True})
    assert status == 200
    blocks = b"".join(pieces).removeprefix(b"\xef\xbb\xbf").rstrip(b"\n")  # byte for byte is said of blocks
    assert body.removeprefix(b"\xef\xbb\xbf").rstrip(b"\n") == blocks
    record = last(process)
    assert (record["outcome"], record["response"]["content"]) == ("ok", TEXT)
    assert (record["usage_source"], record["response"]["usage"]["output_tokens"]) == ("reported", 5)


@pytest.mark.parametrize("form", ["as it is", "CRLF", "CR", "one byte a chunk", "CRLF split over reads", "all at once"])
def test_usage_is_hidden_in_every_way_of_writing(process: RouterProcess, upstream: FakeUpstream, form: str) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    upstream.script(stream(WELL_FORMED[form](openai_chunks(TEXT, usage))))
    _, body = streamed(process)
    assert body == b"".join(WELL_FORMED[form](openai_chunks(TEXT)))
    assert last(process)["response"]["usage"]["output_tokens"] == 5


def test_characters_that_look_like_line_ends_are_none(process: RouterProcess, upstream: FakeUpstream) -> None:
    text = "a\u2028b\u2029c\u0085d\x7fe"
    blocks = openai_chunks("x")
    blocks[1] = b"data: " + json.dumps(chunk_object({"content": text}), ensure_ascii=False).encode() + b"\n\n"
    joined = b"".join(blocks)
    upstream.script(stream([joined[at : at + 1] for at in range(len(joined))]))
    _, body = streamed(process)
    assert body == joined
    assert last(process)["response"]["content"] == text


def test_a_block_that_is_not_json_passes_and_is_counted_and_the_good_ones_are_not_lost(
    process: RouterProcess, upstream: FakeUpstream
) -> None:
    blocks = openai_chunks("one two")
    planted = [blocks[0], blocks[1], b"data: {broken\n\n", b"data: [1]\n\n", b"data: \xff\xfe\n\n", b"data\n\n", *blocks[2:]]
    upstream.script(stream(planted))
    _, body = streamed(process)
    assert body == b"".join(planted)
    record = last(process)
    assert (record["outcome"], record["response"]["content"]) == ("ok", "one two")


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": []},
        {"choices": None},
        {"choices": [{}]},
        {"choices": [{"delta": None, "index": 0, "finish_reason": None}]},
        {"choices": [{"delta": {"content": None}}]},
        {"choices": [{"delta": {"content": [{"type": "text", "text": "x"}]}}]},
        {"choices": [{"delta": {"tool_calls": None}}]},
        {"choices": [{"delta": {"tool_calls": [{}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": 10**9, "function": {"arguments": "x"}}]}}]},
        {"choices": [{"delta": {"tool_calls": [{"index": -1, "function": {"name": 5, "arguments": {"a": 1}}}]}}]},
        {"choices": [{"index": 99, "delta": {"content": "other"}}]},
        {"choices": "x"},
        {"choices": [5]},
        {"usage": []},
        {"usage": "x"},
        {},
        {"model": 5, "id": ["x"], "choices": [{"delta": {"content": 5}}]},
    ],
)
def test_an_odd_chunk_passes_and_does_no_harm(process: RouterProcess, upstream: FakeUpstream, chunk: dict[str, Any]) -> None:
    blocks = openai_chunks("one two")
    upstream.script(stream([*blocks[:2], event(chunk), *blocks[2:]]))
    status, body = streamed(process)
    assert (status, body) == (200, b"".join([*blocks[:2], event(chunk), *blocks[2:]]))
    record = last(process)
    assert record["outcome"] == "ok"
    assert record["response"]["content"].startswith("one")
    assert record["response"]["content"].endswith(" two")


@pytest.mark.parametrize(
    "change",
    [
        {"choices": []},
        {"choices": None},
        {"choices": "x"},
        {"choices": [{}]},
        {"choices": [{"message": None}]},
        {"choices": [{"message": {"content": [1]}}]},
        {"choices": [{"message": {"content": "x", "tool_calls": "y"}}]},
        {"usage": "x"},
        {"id": 5, "model": None, "created": "x"},
    ],
)
def test_an_odd_whole_answer_is_passed_on_or_refused_but_never_an_accident(
    process: RouterProcess, upstream: FakeUpstream, change: dict[str, Any]
) -> None:
    said = {**chat_completion(), **change}
    upstream.script(json_answer(said))
    answered = process.chat()
    assert answered.status in (200, 502)
    if answered.status == 200:
        assert answered.json() == said
    else:
        assert answered.error
    assert last(process)["outcome"] == ("ok" if answered.status == 200 else "error")


def test_a_stream_for_one_who_asked_for_none_is_no_answer(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(stream(openai_chunks("x")))
    assert process.chat().status == 502
    assert last(process)["outcome"] == "error"


def test_a_whole_answer_for_one_who_asked_for_a_stream_is_no_fake_success(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(json_answer(chat_completion("whole")))
    status, body = streamed(process)
    record = last(process)
    if status == 200:
        assert b"whole" in body
        assert body.endswith(DONE)
        assert record["outcome"] == "ok"
    else:
        assert status == 502
        assert record["outcome"] == "error"


def test_data_after_done_is_not_waited_for(process: RouterProcess, upstream: FakeUpstream) -> None:
    """[DONE] is the end, whether or not the provider closes its side."""
    upstream.script(stream_head() + chunks(openai_chunks("x")) + silence())
    began = time.monotonic()
    status, body = streamed(process)
    assert time.monotonic() - began < 3
    assert (status, body) == (200, b"".join(openai_chunks("x")))
    assert last(process)["outcome"] == "ok"


# --- HTTP, by the book and off it

FINE = json.dumps(chat_completion("fine")).encode()
JSON = {"Content-Type": "application/json"}
GOOD_HTTP = {
    "an informational answer first": raw(b"HTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
    + answer(FINE),
    "no reason phrase": raw(b"HTTP/1.1 200\r\nContent-Length: %d\r\n\r\n" % len(FINE) + FINE),
    "HTTP/1.0": raw(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n" + FINE) + fin(),
    "close-delimited": raw(head(200, JSON) + FINE) + fin(),
    "chunked": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + framed(FINE[:9]) + framed(FINE[9:])) + end(),
    "chunked, in capitals": raw(head(200, {**JSON, "TRANSFER-ENCODING": "Chunked"}) + framed(FINE)) + end(),
    "chunk extensions and trailers": raw(
        head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"%x;a=b\r\n%s\r\n0;c\r\nX-Trailer: 1\r\n\r\n" % (len(FINE), FINE)
    ),
    "trickled": trickle(head(200, {**JSON, "Content-Length": str(len(FINE))}) + FINE, 0.0005),
    "connection: close": answer(FINE, 200, {"Connection": "close"}) + fin(),
    "odd header spacing": raw(b"HTTP/1.1 200 OK\r\nContent-Length:%d   \r\nX:\r\n\r\n" % len(FINE) + FINE),
    "no content type": raw(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(FINE) + FINE),
}


@pytest.mark.parametrize("how", GOOD_HTTP)
def test_every_correct_answer_is_understood(process: RouterProcess, upstream: FakeUpstream, how: str) -> None:
    upstream.script(GOOD_HTTP[how])
    answered = process.chat()
    assert (answered.status, answered.json()) == (200, json.loads(FINE))
    assert process.chat().status == 200, "the connection is in order for the next, or closed"
    process.settled(3)


BAD_HTTP = {
    "a body shorter than said": raw(head(200, {**JSON, "Content-Length": "5000"}) + FINE) + fin(),
    "a chunked body cut": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + framed(FINE)) + fin(),
    "a chunk cut": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"fff\r\n" + FINE) + fin(),
    "a chunk size of words": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"many\r\n" + FINE) + fin(),
    "a chunk size below zero": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"-5\r\n" + FINE) + fin(),
    "a chunk size of a terabyte": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"ffffffffff\r\nx") + fin(),
    "a chunk size line without end": raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}) + b"1" * 3_000_000) + fin(),
    "two lengths": raw(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: %d\r\n\r\n" % len(FINE) + FINE) + fin(),
    "a length of words": raw(head(200, {**JSON, "Content-Length": "some"}) + FINE) + fin(),
    "a length below zero": raw(head(200, {**JSON, "Content-Length": "-1"}) + FINE) + fin(),
    "no status": raw(b"HTTP/1.1 OK\r\n\r\n") + fin(),
    "a status of words": raw(b"HTTP/1.1 two hundred\r\n\r\n") + fin(),
    "a status of five digits": raw(b"HTTP/1.1 20000 OK\r\nContent-Length: 0\r\n\r\n") + fin(),
    "status 99": raw(b"HTTP/1.1 099 OK\r\nContent-Length: 0\r\n\r\n") + fin(),
    "204": raw(b"HTTP/1.1 204 No Content\r\n\r\n"),
    "304": raw(b"HTTP/1.1 304 Not Modified\r\n\r\n"),
    "206": answer(b"{}", 206),
    "101": raw(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n") + fin(),
    "endless informational answers": raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000) + fin(),
    "a header of 1 MB": raw(head(200, {**JSON, "X-Big": "x" * 1_000_000})) + fin(),
    "10000 headers": raw(head(200, {f"X-{number}": "y" * 20 for number in range(10_000)})) + fin(),
    "a head without end": raw(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 300_000) + fin(),
    "binary": raw(bytes(range(256)) * 100) + fin(),
    "brotli when not asked": answer(b"\x0b\x02\x80abc\x03", 200, {"Content-Encoding": "br"}),
    "gzip that is none": answer(b"not gzip", 200, {"Content-Encoding": "gzip"}),
    "gzip cut": answer(gzip.compress(FINE)[:-20], 200, {"Content-Encoding": "gzip"}),
    "gzip nested": answer(FINE, 200, {"Content-Encoding": ", ".join(["gzip"] * 50)}),
    "utf-16": answer(json.dumps(chat_completion()).encode("utf-16"), 200),
    "deep": answer(b'{"choices":' + b"[" * 100_000 + b"]" * 100_000 + b"}", 200),
    "not utf-8": answer(b'{"choices": [{"message": {"content": "\xff"}}]}', 200),
}


@pytest.mark.parametrize("how", BAD_HTTP)
def test_every_wrong_answer_is_a_502(process: RouterProcess, upstream: FakeUpstream, how: str) -> None:
    upstream.script(BAD_HTTP[how])
    answered = process.chat()
    assert answered.status == 502
    assert answered.error["message"]
    sent = upstream.posts[1]
    until(lambda: sent.answered.is_set() or sent.closed_within(0), 10, "the upstream is through with it")
    assert process.chat().status == 200
    records = process.settled(3)
    assert [record["outcome"] for record in records] == ["ok", "error", "ok"]
    assert len(upstream.posts) == 3


@pytest.mark.parametrize("how", ["204", "a status of words", "two lengths", "a header of 1 MB", "gzip that is none", "binary"])
def test_a_stream_that_begins_wrong_is_a_502_too(process: RouterProcess, upstream: FakeUpstream, how: str) -> None:
    upstream.script(BAD_HTTP[how])
    status, body = streamed(process)
    assert status == 502
    assert json.loads(body)["error"]["src"] == "router"
    assert last(process)["outcome"] == "error"


def test_two_framings_at_once_are_not_trusted(process: RouterProcess, upstream: FakeUpstream) -> None:
    """Length and chunked together: refused, or read as chunked on a connection that is not used again."""
    poison = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}"
    both = {**JSON, "Transfer-Encoding": "chunked", "Content-Length": "3"}
    upstream.script(raw(head(200, both) + framed(FINE) + b"0\r\n\r\n" + poison))
    assert process.chat().status in (200, 502)
    assert process.chat().json() == chat_completion(), "the next answer is its own"
    assert upstream.posts[1].connection != upstream.posts[2].connection


def test_bytes_behind_an_answer_are_nobodys_answer(process: RouterProcess, upstream: FakeUpstream) -> None:
    poison = json.dumps(chat_completion("POISON")).encode()
    both = [head(200, {**JSON, "Content-Length": str(len(body))}) + body for body in (FINE, poison)]
    upstream.script(raw(b"".join(both)))  # in one piece: what comes later than the check nobody can tell
    assert process.chat().json() == json.loads(FINE)
    for _ in range(3):
        assert b"POISON" not in process.chat().body
    process.settled(5)


def test_gzip_is_not_asked_for_unless_it_is_understood(process: RouterProcess, upstream: FakeUpstream) -> None:
    asked = {part.strip().split(";")[0] for part in (upstream.posts[0].header("accept-encoding") or "identity").split(",")}
    assert asked <= {"gzip", "identity", "deflate"}
    assert process


def test_a_gzipped_stream_is_understood_or_refused(process: RouterProcess, upstream: FakeUpstream) -> None:
    packer = zlib.compressobj(wbits=31)
    pieces = [packer.compress(block) + packer.flush(zlib.Z_SYNC_FLUSH) for block in openai_chunks("one two")]
    upstream.script(stream([*pieces, packer.flush()], headers={"Content-Encoding": "gzip"}))
    status, body = streamed(process)
    record = last(process)
    if status == 200:
        assert body == b"".join(openai_chunks("one two"))
        assert (record["outcome"], record["response"]["content"]) == ("ok", "one two")
    else:
        assert (status, record["outcome"]) == (502, "error")


def test_a_gzip_bomb_is_bounded(process: RouterProcess, upstream: FakeUpstream) -> None:
    bomb = gzip.compress(b" " * (300 << 20), 9)
    memory = process.memory()
    upstream.script(answer(bomb, 200, {"Content-Encoding": "gzip"}))
    assert process.chat(timeout=30).status == 502
    assert process.memory() - memory < 150 << 20
    assert last(process)["outcome"] == "error"


def test_an_endless_whole_answer_is_capped(process: RouterProcess, upstream: FakeUpstream) -> None:
    memory = process.memory()
    flood = raw(head(200, {**JSON, "Transfer-Encoding": "chunked"}))
    for _ in range(300):
        flood += raw(framed(b" " * (1 << 20)))
    upstream.script(flood)
    assert process.chat(timeout=30).status in (502, 504)
    assert upstream.posts[1].closed_within(5)
    assert process.memory() - memory < 200 << 20


def test_an_endless_error_answer_is_capped(process: RouterProcess, upstream: FakeUpstream) -> None:
    flood = raw(head(400, {**JSON, "Transfer-Encoding": "chunked"}))
    for _ in range(100):
        flood += raw(framed(b"x" * (1 << 20)))
    upstream.script(flood)
    answered = process.chat(timeout=30)
    assert answered.status in (400, 502)
    assert len(answered.body) < 100_000
    assert last(process)["outcome"] == "error"


def test_one_line_of_200_mb_is_cut_or_flows_and_does_not_stay(process: RouterProcess, upstream: FakeUpstream) -> None:
    memory = process.memory()
    peak = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, process.memory())

    upstream.script(
        stream_head() + chunks(openai_chunks("a", None, None, False)) + chunks([b"data: "] + [b"x" * (1 << 20)] * 200)
    )
    watching = threading.Thread(target=watch)
    watching.start()
    try:
        status, body = streamed(process)
    finally:
        done.set()
        watching.join()
    assert status == 200
    assert b"[DONE]" not in body
    assert last(process)["outcome"] in ("error", "timeout")
    assert peak - memory < 64 << 20


def test_a_long_stream_flows_without_piling_up(process: RouterProcess, upstream: FakeUpstream) -> None:
    block = event(chunk_object({"content": "x" * 100}))
    upstream.script(stream_head() + chunks([block * 100] * 500) + chunks(openai_chunks("end")) + end())
    memory = process.memory()
    size = 0
    with process.stream(timeout=60) as reply:
        for piece in iter(lambda: reply._response.read1(1 << 20), b""):
            size += len(piece)
    assert size == len(block) * 50_000 + len(b"".join(openai_chunks("end")))
    record = last(process)
    assert record["outcome"] == "ok"
    assert process.memory() - memory < 100 << 20


# --- what leaks


LEAKS = [
    f"bad key {PROVIDER_KEY} for you",
    f"Authorization: Bearer {PROVIDER_KEY}",
    f"GET http://api.example/v1?key={PROVIDER_KEY}&x=1 failed",
    f"you sent {{'x-api-key': '{PROVIDER_KEY}'}}",
]


@pytest.mark.parametrize("status", [400, 401, 404, 422, 429, 500, 503])
@pytest.mark.parametrize("leak", LEAKS)
def test_a_key_echoed_by_an_upstream_goes_nowhere(process: RouterProcess, upstream: FakeUpstream, status: int, leak: str) -> None:
    upstream.script(error_answer(status, leak, {"X-Debug": PROVIDER_KEY}, detail=leak, code=leak))
    answered = process.chat(SECRET_PROMPT)
    assert PROVIDER_KEY not in answered.body.decode()
    assert PROVIDER_KEY not in str(answered.headers)
    assert answered.any_error["message"]
    assert PROVIDER_KEY not in json.dumps(last(process))


def test_a_key_echoed_inside_a_stream_goes_nowhere(process: RouterProcess, upstream: FakeUpstream) -> None:
    leak = {"error": {"message": f"bad key {PROVIDER_KEY}", "type": "x", "code": None}}
    upstream.script(
        stream([event(leak)]), stream([*openai_chunks("a", None, None, False), event(leak)]), answer(json.dumps(leak).encode())
    )
    for _ in range(2):
        _, body = streamed(process)
        assert PROVIDER_KEY.encode() not in body
    assert PROVIDER_KEY.encode() not in process.chat().body
    process.settled(4)


def test_the_prompt_of_a_5xx_stays_out_of_the_error(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(error_answer(500, f"crashed on {SECRET_PROMPT}"))
    process.chat(SECRET_PROMPT)
    record = last(process)
    assert SECRET_PROMPT not in str(record["error"]) + str(record["attempts"])


def test_an_upstreams_markup_is_not_served_as_markup(process: RouterProcess, upstream: FakeUpstream) -> None:
    page = b"<html><script>alert(1)</script>" + b"x" * 10_000
    upstream.script(*[answer(page, status, {"Content-Type": "text/html"}) for status in (400, 404, 500)])
    for _ in range(3):
        answered = process.chat()
        assert answered.headers["content-type"].startswith("application/json")
        assert len(answered.any_error["message"]) < 2000


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("method", ["whole", "stream"])
def test_a_redirect_is_not_followed(process: RouterProcess, upstream: FakeUpstream, status: int, method: str) -> None:
    target = FakeUpstream()
    try:
        upstream.script(answer(b"", status, {"Location": f"{target.url}/v1/chat/completions"}))
        answered = process.chat(stream=method == "stream")
        assert answered.status == 502
        assert "unexpected_redirect" in (answered.error["type"], answered.error["code"])
        assert target.url not in answered.body.decode()
        assert not target.requests
        assert target.connections == 0
    finally:
        target.close()
    record = last(process)
    assert (record["outcome"], record["error_type"]) == ("error", "unexpected_redirect")
    assert record["attempts"][0]["status"] == status


# --- connections


def test_connections_are_used_again(process: RouterProcess, upstream: FakeUpstream) -> None:
    for number in range(10):
        assert (streamed(process) if number % 2 else (process.chat().status,))[0] == 200
    assert upstream.connections == 1


def test_a_connection_the_provider_closed_while_idle_harms_nobody(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(*[answer(FINE) + fin()] * 5)
    for _ in range(5):
        assert process.chat().status == 200
        assert upstream.posts[-1].answered.wait(5)
    assert len(upstream.posts) == 6, "and nobody is asked twice"


def test_a_connection_that_dies_under_the_request_is_not_billed_twice(process: RouterProcess, upstream: FakeUpstream) -> None:
    """The provider read the request and closed without a word: it may be working on it."""
    upstream.script(fin())
    answered = process.chat()
    assert answered.status == 502
    assert len(upstream.posts) == 2
    assert last(process)["outcome"] == "error"


def test_an_early_refusal_is_heard_while_the_body_is_still_being_sent(router: RouterFactory) -> None:
    """A provider that answers 413 and closes before it has read everything."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def refuse() -> None:
            sock, _ = listener.accept()
            with sock:
                sock.recv(1000)
                body = json.dumps({"error": {"message": "far too long", "type": "x"}}).encode()
                sock.sendall(head(413, {**JSON, "Content-Length": str(len(body)), "Connection": "close"}) + body)
                sock.shutdown(socket.SHUT_WR)
                deadline = time.monotonic() + 3
                sock.settimeout(0.5)
                while time.monotonic() < deadline:
                    try:
                        if not sock.recv(1 << 16):
                            return
                    except OSError:
                        return

        refusing = threading.Thread(target=refuse)
        refusing.start()
        process = router(upstream=f"http://127.0.0.1:{listener.getsockname()[1]}", provider="read_timeout = 5")
        answered = process.chat("x" * 20_000_000)
        refusing.join()
    assert answered.status == 413
    assert "far too long" in answered.upstream_error["message"]


def test_a_provider_that_does_not_read_is_bounded(router: RouterFactory) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = router(upstream=f"http://127.0.0.1:{listener.getsockname()[1]}", provider="read_timeout = 1\ntotal_timeout = 4")
        began = time.monotonic()
        assert process.chat("x" * 20_000_000).status in (502, 504)
        assert time.monotonic() - began < 8
        assert process.record()["outcome"] in ("timeout", "error")


def test_a_failing_provider_leaves_no_connection_behind(process: RouterProcess, upstream: FakeUpstream) -> None:
    scripts: list[Script] = [
        error_answer(429),
        error_answer(500),
        stream_head() + fin(),
        stream_head() + chunks(openai_chunks("a", None, None, False)) + fin(),
        raw(b"nonsense") + fin(),
        answer(b"", 302, {"Location": "/x"}),
    ]
    count = 0
    for _ in range(10):
        for script in scripts:
            upstream.script(script)
            streamed(process)
            count += 1
    process.settled(count + 1)
    until(lambda: upstream.open_connections <= 1)


# --- usage


@pytest.mark.parametrize(
    ("usage", "counted"),
    [
        ({"prompt_tokens": 5, "completion_tokens": 2}, (5, 2)),
        ({"prompt_tokens": -5, "completion_tokens": 2}, None),
        ({"prompt_tokens": "5", "completion_tokens": "2"}, None),
        ({"prompt_tokens": 5.0, "completion_tokens": 2.5}, None),
        ({"prompt_tokens": 2**63, "completion_tokens": 2}, None),
        ({"prompt_tokens": True, "completion_tokens": None}, None),
        ({"prompt_tokens": [], "completion_tokens": {}}, None),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": "x"}, (5, 2)),
        ({"prompt_tokens": 5, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": -3}}, (5, 2)),
        ({}, None),
        (None, None),
        ("many", None),
        ([], None),
    ],
)
@pytest.mark.parametrize("kind", ["whole", "stream"])
def test_odd_usage_is_passed_on_and_never_counted_as_it_is(
    process: RouterProcess, upstream: FakeUpstream, kind: str, usage: Any, counted: tuple[int, int] | None
) -> None:
    if kind == "whole":
        said = {**chat_completion("x"), "usage": usage}
        upstream.script(json_answer(said))
        assert process.chat().json() == said
    else:
        blocks = [*openai_chunks("x")[:-1], event(usage_object(usage)), DONE]
        upstream.script(stream(blocks))
        assert streamed(process, stream_options={"include_usage": True}) == (200, b"".join(blocks))
    record = last(process)
    assert record["outcome"] == "ok"
    assert record["usage_source"] in ("reported", "estimated", "none")
    counts = record["response"]["usage"]
    assert all(type(value) is int and 0 <= value < 2**63 for value in counts.values()), counts
    if counted:
        assert (counts["input_tokens"], counts["output_tokens"]) == counted
    if record["cost"]:
        assert all(math.isfinite(value) and value >= 0 for value in record["cost"].values() if type(value) is float)


def test_usage_in_every_chunk_is_not_added_up(process: RouterProcess, upstream: FakeUpstream) -> None:
    blocks = []
    for number, word in enumerate(["a", " b", " c"], 1):
        usage = {"prompt_tokens": 4, "completion_tokens": number}
        blocks.append(event({**chunk_object({"content": word}), "usage": usage}))
    final = event(usage_object({"prompt_tokens": 4, "completion_tokens": 3}))
    upstream.script(stream([*blocks, event(chunk_object({}, "stop")), final, final, DONE]))
    streamed(process)
    usage = last(process)["response"]["usage"]
    assert (usage["input_tokens"], usage["output_tokens"]) == (4, 3)


def test_usage_of_a_broken_stream_is_kept(process: RouterProcess, upstream: FakeUpstream) -> None:
    block = event({**chunk_object({"content": "a"}), "usage": {"prompt_tokens": 4, "completion_tokens": 1}})
    upstream.script(stream_head() + chunks([block]) + pause(0.1) + fin())
    streamed(process)
    record = last(process)
    assert (record["outcome"], record["usage_source"]) == ("error", "reported")
    assert record["response"]["usage"]["input_tokens"] == 4


def test_a_choice_after_the_finish_is_not_lost(process: RouterProcess, upstream: FakeUpstream) -> None:
    """n = 2: the first choice finishes while the second still speaks."""
    pieces = [
        {"choices": [{"index": 0, "delta": {"content": "first"}}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [{"index": 1, "delta": {"content": "second"}}]},
        {"choices": [{"index": 1, "delta": {}, "finish_reason": "stop"}]},
    ]
    blocks = [event(piece) for piece in pieces] + [DONE]
    upstream.script(stream(blocks, gap=0.1))
    assert streamed(process, n=2) == (200, b"".join(blocks))


def test_the_path_of_the_base_url_is_kept(router: RouterFactory, upstream: FakeUpstream) -> None:
    providers = '[[providers]]\nname = "up"\nformat = "openai"\nbase_url = "{upstream}/a/b%20c/v9/"\n'
    process = router(providers=providers)
    assert process.chat().status == 200
    assert upstream.posts[0].path == "/a/b%20c/v9/chat/completions"


def test_each_request_reaches_the_provider_with_the_configured_key_only(process: RouterProcess, upstream: FakeUpstream) -> None:
    def check(received: Received) -> Script:
        assert received.header("authorization") == f"Bearer {PROVIDER_KEY}"
        return completion_for(received)

    upstream.default = check
    process.chat(headers={"Authorization": "Bearer client", "X-Api-Key": "client"})
    sent = upstream.posts[1]
    assert [value for name, value in sent.headers if name.lower() in ("authorization", "x-api-key")] == [f"Bearer {PROVIDER_KEY}"]
