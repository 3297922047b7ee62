"""What clients do wrong, on the wire: odd framing, odd JSON, too much, too slow. The next client must not notice."""

from __future__ import annotations

import gzip
import json
import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream, json_answer
from router_process import SECRET_PROMPT, RouterProcess, chat_body, read_all, statuses

CHAT = b"/v1/chat/completions"
BODY = json.dumps(chat_body(SECRET_PROMPT)).encode()
GET_MODELS = b"GET /v1/models HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture
def process(router: RouterFactory) -> Iterator[RouterProcess]:
    """A router that must still answer when the test is over, with nothing left behind."""
    made = router(server="max_body_bytes = 1000000")
    made.chat("warm up")
    before = made.resources()
    yield made
    asked = time.monotonic()
    assert made.get("/health").status == 200
    assert time.monotonic() - asked < 1
    made.comes_back_to(before)
    assert not re.search(rb"Traceback|File \"", made.stderr.read_bytes())


def post(*headers: bytes, body: bytes = b"", version: bytes = b"1.1", path: bytes = CHAT) -> bytes:
    lines = [b"POST %s HTTP/%s" % (path, version), b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def length(body: bytes = BODY) -> bytes:
    return b"Content-Length: %d" % len(body)


def chunked(body: bytes = BODY) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


# --- framing that two readers could read differently

SMUGGLING = {
    "length and chunked": post(b"Content-Length: 6", b"Transfer-Encoding: chunked", body=b"0\r\n\r\n" + GET_MODELS),
    "chunked and length": post(b"Transfer-Encoding: chunked", length(), body=chunked() + GET_MODELS),
    "chunked twice": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked", body=chunked() + GET_MODELS),
    "chunked, chunked": post(b"Transfer-Encoding: chunked, chunked", body=chunked() + GET_MODELS),
    "chunked, then identity": post(b"Transfer-Encoding: chunked", b"Transfer-Encoding: identity", body=chunked()),
    "xchunked": post(b"Transfer-Encoding: xchunked", body=chunked() + GET_MODELS),
    "gzip, chunked": post(b"Transfer-Encoding: gzip, chunked", body=chunked() + GET_MODELS),
    "chunked behind a tab": post(b"Transfer-Encoding:\x0bchunked", body=chunked() + GET_MODELS),
    "chunked in 1.0": post(b"Transfer-Encoding: chunked", body=chunked() + GET_MODELS, version=b"1.0"),
    "length with a plus": post(b"Content-Length: +%d" % len(BODY), body=BODY + GET_MODELS),
    "length below zero": post(b"Content-Length: -1", body=BODY + GET_MODELS),
    "length in hex": post(b"Content-Length: 0x10", body=BODY + GET_MODELS),
    "length with underscore": post(b"Content-Length: 1_0", body=BODY + GET_MODELS),
    "length in other digits": post("Content-Length: ٣".encode(), body=BODY + GET_MODELS),
    "two lengths": post(b"Content-Length: 5", length(), body=BODY + GET_MODELS),
    "two lengths in one": post(b"Content-Length: 5, %d" % len(BODY), body=BODY + GET_MODELS),
    "a length of nothing": post(b"Content-Length:", body=BODY + GET_MODELS),
    "a folded header": post(length(), b"X-A: b", b" c", body=BODY + GET_MODELS),
    "a folded length": post(b"Content-Length:", b" %d" % len(BODY), body=BODY + GET_MODELS),
    "a space before the colon": post(b"Content-Length : %d" % len(BODY), body=BODY + GET_MODELS),
    "a space before chunked": post(b"Transfer-Encoding : chunked", length(), body=BODY + GET_MODELS),
    "a header without colon": post(length(), b"Nonsense", body=BODY + GET_MODELS),
    "a header without name": post(length(), b": x", body=BODY + GET_MODELS),
    "a nul in a header": post(length(), b"X-A: a\x00b", body=BODY + GET_MODELS),
    "a bare cr in a header": post(length(), b"X-A: a\rX-B: c", body=BODY + GET_MODELS),
    "a bare lf in a header": post(length(), b"X-A: a\nTransfer-Encoding: chunked", body=BODY + GET_MODELS),
    "a bad chunk size": post(b"Transfer-Encoding: chunked", body=b"zz\r\nabc\r\n0\r\n\r\n" + GET_MODELS),
    "a chunk size below zero": post(b"Transfer-Encoding: chunked", body=b"-1\r\nabc\r\n0\r\n\r\n" + GET_MODELS),
    "a chunk size with plus": post(b"Transfer-Encoding: chunked", body=b"+3\r\nabc\r\n0\r\n\r\n" + GET_MODELS),
    "a chunk size in 0x": post(b"Transfer-Encoding: chunked", body=b"0x3\r\nabc\r\n0\r\n\r\n" + GET_MODELS),
    "a chunk longer than said": post(b"Transfer-Encoding: chunked", body=b"3\r\nabcdef\r\n0\r\n\r\n" + GET_MODELS),
    "a bad chunk extension": post(b"Transfer-Encoding: chunked", body=b"3;\x00\nabc\r\n0\r\n\r\n" + GET_MODELS),
    "only line feeds": b"POST %s HTTP/1.1\nHost: x\nContent-Length: 2\n\n{}" % CHAT + GET_MODELS,
    "a space in the target": b"GET /v1/models /x HTTP/1.1\r\nHost: x\r\n\r\n" + GET_MODELS,
    "a nul in the target": b"GET /v1/mod\x00els HTTP/1.1\r\nHost: x\r\n\r\n" + GET_MODELS,
    "no version": b"GET /v1/models\r\nHost: x\r\n\r\n" + GET_MODELS,
    "two hosts": b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n" + GET_MODELS,
    "no host": b"GET /v1/models HTTP/1.1\r\n\r\n" + GET_MODELS,
}
# What may be answered as if it were well-formed, because no two readers differ about it.
HARMLESS = {
    "a nul in the target",
    "a header without name",
    "two hosts",
    "no host",
    "only line feeds",
    "no version",
    "length in other digits",
}


@pytest.mark.parametrize("case", SMUGGLING)
def test_doubtful_framing_gets_one_refusal_and_the_connection_is_closed(
    process: RouterProcess, upstream: FakeUpstream, case: str
) -> None:
    data = process.raw(SMUGGLING[case], timeout=2)
    answers = statuses(data)
    if case in HARMLESS:
        assert all(status in (200, 400, 404) for status in answers), data
    else:
        assert len(answers) == 1, f"what came behind was answered as a second request: {data!r}"
        assert answers[0] in (400, 411, 413, 501), data
        assert b'"object": "list"' not in data
    assert [request.path for request in upstream.posts] == ["/v1/chat/completions"], "only the warm-up went upstream"
    assert len(process.settled(1)) == 1


def test_a_refusal_by_the_parser_is_clean(process: RouterProcess) -> None:
    data = process.raw(SMUGGLING["length with a plus"] + b"SECRET", timeout=3)
    assert b"Traceback" not in data
    assert SECRET_PROMPT.encode() not in data


def test_well_formed_chunks_with_extensions_and_trailers_are_taken(process: RouterProcess) -> None:
    half = len(BODY) // 2
    body = b"%x;name=value\r\n%s\r\n%X\r\n%s\r\n0\r\nX-Trailer: 1\r\n\r\n"
    body %= (half, BODY[:half], len(BODY) - half, BODY[half:])
    data = process.raw(post(b"Transfer-Encoding: chunked", b"Connection: close", body=body))
    assert statuses(data) == [200]


# --- targets and sizes


@pytest.mark.parametrize(
    ("target", "allowed"),
    [
        (b"http://x/v1/models", (200, 400, 404)),
        (b"//v1/models", (200, 400, 404)),
        (b"/v1/../v1/models", (400, 404)),
        (b"/v1/models/", (200, 404)),
        (b"/V1/models", (404,)),
        (b"/v1/%6dodels", (200, 404)),
        (b"/v1%2Fmodels", (200, 404)),
        (b"/v1/models/%00", (400, 404)),
        (b"/v1/models/%ff%fe", (400, 404)),
        (b"/v1/models/" + "é".encode(), (400, 404)),
        (b"*", (400, 404, 405)),
        (b"x", (400, 404)),
    ],
)
def test_an_odd_target_is_answered(process: RouterProcess, target: bytes, allowed: tuple[int, ...]) -> None:
    data = process.raw(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % target, timeout=5)
    assert len(statuses(data)) == 1
    assert statuses(data)[0] in allowed, data


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 400_000 + b"\r\n\r\n",
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: abcdefghijklmnopqrst\r\n" % n for n in range(20_000)) + b"\r\n",
        b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    ],
    ids=["one huge header", "20000 headers", "a huge target"],
)
def test_a_huge_head_is_refused(process: RouterProcess, request_bytes: bytes) -> None:
    memory = process.memory()
    for _ in range(5):
        answers = statuses(process.raw(request_bytes, timeout=5))
        assert answers in ([431], [414], [400], []), answers
    assert process.memory() - memory < 32 << 20


def test_a_head_without_end_is_refused(process: RouterProcess) -> None:
    with process.dial(5) as sock, suppress(ConnectionResetError, BrokenPipeError):
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
        for _ in range(100):
            sock.sendall(b"a" * 65536)
        raise AssertionError("6 MB of header were taken")


def test_a_body_over_the_limit_is_refused_while_it_is_still_coming(process: RouterProcess) -> None:
    memory = process.memory()
    with process.dial(5) as sock:
        sock.sendall(post(b"Transfer-Encoding: chunked"))
        with suppress(ConnectionResetError, BrokenPipeError):
            for _ in range(400):
                sock.sendall(b"10000\r\n" + b"a" * 65536 + b"\r\n")
        answers = statuses(read_all(sock))
    assert answers in ([413], []), answers
    assert process.memory() - memory < 64 << 20


def test_a_gzip_bomb_is_bounded(process: RouterProcess) -> None:
    bomb = gzip.compress(b'{"x":"' + b"a" * (300 << 20) + b'"}', 9)
    assert len(bomb) < 1_000_000
    memory = process.memory()
    answer = process.post(CHAT.decode(), bomb, {"Content-Encoding": "gzip"}, timeout=30)
    assert answer.status == 413
    assert process.memory() - memory < 32 << 20


# --- JSON

DEEP = 100_000
BAD_JSON = {
    "nothing": b"",
    "white space": b"  \n",
    "brackets": b"[" * DEEP,
    "brackets, closed": b"[" * DEEP + b"]" * DEEP,
    "objects": b'{"a":' * DEEP + b"1" + b"}" * DEEP,
    "deep inside": BODY[:-1] + b',"x":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "deep in a string": b'{"model":"fake-model","messages":' + b'[{"role":"user","content":' * 5000,
    "nan": BODY[:-1] + b',"temperature":NaN}',
    "infinity": BODY[:-1] + b',"temperature":Infinity}',
    "minus infinity": BODY[:-1] + b',"temperature":-Infinity}',
    "too big for a float": BODY[:-1] + b',"temperature":1e999}',
    "utf-16": BODY.decode().encode("utf-16"),
    "utf-16-le without mark": BODY.decode().encode("utf-16-le"),
    "utf-32": BODY.decode().encode("utf-32"),
    "latin-1": b'{"model":"fake-model","messages":[{"role":"user","content":"\xe9"}]}',
    "overlong": b'{"model":"fake-model","messages":[{"role":"user","content":"\xc0\xaf"}]}',
    "raw surrogate": b'{"model":"fake-model","messages":[{"role":"user","content":"\xed\xa0\x80"}]}',
    "cut character": b'{"model":"fake-model","messages":[{"role":"user","content":"\xe2\x82',
    "duplicate model": b'{"model":"other",' + BODY[1:],
    "duplicate deep inside": BODY[:-1] + b',"metadata":{"a":1,"a":2}}',
    "duplicate by escape": b'{"mod\\u0065l":"other",' + BODY[1:],
    "garbage behind": BODY + b"x",
    "two documents": BODY + BODY,
    "a nul behind": BODY + b"\0",
    "an array": b"[%s]" % BODY,
    "a string": b'"hi"',
    "a number": b"5",
    "null": b"null",
    "a trailing comma": BODY[:-1] + b",}",
    "single quotes": BODY.replace(b'"', b"'"),
    "a comment": b"/* x */" + BODY,
    "a raw newline in a string": b'{"model":"fake-model","messages":[{"role":"user","content":"a\nb"}]}',
    "a bare word": b'{"model":fake}',
    "a leading zero": BODY[:-1] + b',"n":01}',
    "a form": b"model=fake-model&messages=hi",
}


@pytest.mark.parametrize("case", BAD_JSON)
def test_bad_json_is_a_400(process: RouterProcess, upstream: FakeUpstream, case: str) -> None:
    body = BAD_JSON[case]
    if len(body) > 1_000_000:
        body = body[:1_000_000]
    answer = process.post(CHAT.decode(), body, {"Content-Type": "application/json"})
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert len(upstream.posts) == 1
    assert len(process.settled(1)) == 1
    assert sum(process.stats()["refused"].values()) == 1


def test_a_byte_order_mark_is_a_400_or_taken_off(process: RouterProcess, upstream: FakeUpstream) -> None:
    answer = process.post(CHAT.decode(), b"\xef\xbb\xbf" + BODY)
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert upstream.posts[1].json() == json.loads(BODY)
    else:
        assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("digits", [400, 5000, 100_000])
def test_a_huge_number_is_answered_or_refused_but_never_an_accident(
    process: RouterProcess, upstream: FakeUpstream, digits: int
) -> None:
    number = b"1" * digits
    answer = process.post(CHAT.decode(), BODY[:-1] + b',"x":' + number + b"}")
    assert answer.status == (200 if digits == 400 else answer.status)
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert number in upstream.posts[1].body, "passed on digit by digit"
    for line in process.lines():
        json.loads(line, parse_int=str)


HARD_TEXT = {
    "a lone surrogate": "\\ud800",
    "surrogates the wrong way round": "\\udc00\\ud800",
    "a nul": "\\u0000",
    "line separators": "\\u2028\\u2029\\u0085",
    "raw line separators": "\u2028\u2029\u0085\x7f",
    "an emoji": "\U0001f600",
    "an emoji in escapes": "\\ud83d\\ude00",
    "right to left": "\u202eabc\u202c",
    "c1 controls": "\\u0080\\u009f",
    "markup": "</script><img src=x onerror=alert(1)>",
}


@pytest.mark.parametrize("case", HARD_TEXT)
def test_hard_text_is_answered_passed_on_and_logged_as_json(process: RouterProcess, upstream: FakeUpstream, case: str) -> None:
    text = HARD_TEXT[case]
    body = f'{{"model":"fake-model","messages":[{{"role":"user","content":"{text}"}}],"user":"{text}",'
    body += f'"session_id":"{text}","trace":{{"{text}":"{text}"}},"metadata":{{"k":"{text}"}}}}'
    assert process.post(CHAT.decode(), body.encode()).status == 200
    sent = json.loads(body)
    del sent["trace"], sent["session_id"]
    assert ascii(upstream.posts[1].json()) == ascii(sent)
    process.settled(2)
    line = process.lines()[1]
    line.decode("utf-8")
    assert b"\n" not in line
    assert b"\r" not in line
    record = json.loads(line)
    seen = record["messages"][0]["content"][0]["text"]
    expected = "".join("�" if "\ud800" <= c <= "\udfff" else c for c in sent["messages"][0]["content"])
    assert ascii(seen) == ascii(expected)
    assert "\\ud" not in json.dumps(record).replace("\\ud83d\\ude00", ""), "no half of a character"


def test_big_and_nested_metadata_is_answered_and_logged(process: RouterProcess, upstream: FakeUpstream) -> None:
    deep: Any = "end"
    for _ in range(80):
        deep = {"a": deep}
    trace = {"k" * 100_000: "v", "deep": deep, **{f"key{number}": number for number in range(5000)}}
    assert process.chat("hi", trace=trace, user="u" * 100_000).status == 200
    record = process.settled(2)[1]
    assert record["user"]
    assert "trace" not in upstream.posts[1].json()


# --- slow clients


def test_150_slow_heads_shut_nobody_out(router: RouterFactory) -> None:
    """Each is too slow to count as a request and too alive to count as idle."""
    process = router()
    process.chat()
    before = process.resources()
    socks = [process.dial() for _ in range(150)]
    for sock in socks:
        sock.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: ")
    for _ in range(5):
        for sock in socks:
            sock.sendall(b"a")
        asked = time.monotonic()
        assert process.chat().status == 200
        assert process.get("/health").status == 200
        assert time.monotonic() - asked < 2
        time.sleep(0.1)
    for sock in socks:
        sock.close()
    process.comes_back_to(before)


def test_slow_bodies_take_no_thread(router: RouterFactory) -> None:
    process = router(server="threads = 4")
    process.chat()
    before = process.resources()
    socks = [process.dial() for _ in range(20)]
    for sock in socks:
        sock.sendall(post(b"Content-Length: 100000", body=b'{"m'))
    asked = time.monotonic()
    assert process.chat().status == 200
    assert time.monotonic() - asked < 2
    for sock in socks:
        sock.close()
    process.comes_back_to(before)
    process.settled(2)


@pytest.mark.slow
def test_a_head_or_body_that_trickles_is_cut_at_a_total_deadline(router: RouterFactory) -> None:
    """An idle limit would never end these: a byte comes every half second. A minute is what the total may take."""
    process = router()
    before = process.resources()
    slow_head, slow_body = process.dial(), process.dial()
    slow_head.sendall(b"GET /health HTTP/1.1\r\nX-A: ")
    slow_body.sendall(post(b"Content-Length: 100000", body=b"{"))
    alive: list[socket.socket] = [slow_head, slow_body]
    deadline = time.monotonic() + 75
    while alive and time.monotonic() < deadline:
        for sock in list(alive):
            try:
                sock.sendall(b"a")
                sock.settimeout(0.25)
                if not sock.recv(4096):
                    alive.remove(sock)
            except TimeoutError:
                continue
            except OSError:
                alive.remove(sock)
    for sock in (slow_head, slow_body):
        sock.close()
    assert not alive, f"{len(alive)} of 2 still open after 75 s"
    process.comes_back_to(before)


def test_connections_that_say_nothing_shut_nobody_out(router: RouterFactory) -> None:
    process = router()
    socks = [process.dial() for _ in range(300)]
    asked = time.monotonic()
    assert process.chat().status == 200
    assert time.monotonic() - asked < 2
    for sock in socks:
        sock.close()


def test_a_client_that_sends_half_a_body_and_leaves_leaves_nothing(process: RouterProcess) -> None:
    for _ in range(20):
        with process.dial() as sock:
            sock.sendall(post(b"Content-Length: 100000", body=b'{"model"'))
    assert len(process.settled(1)) == 1


def test_floats_that_python_can_read_survive(process: RouterProcess, upstream: FakeUpstream) -> None:
    body = BODY[:-1] + b',"temperature":1.7976931348623157e308,"top_p":5e-324,"x":-0.0}'
    assert process.post(CHAT.decode(), body).status == 200
    sent = upstream.posts[1].json()
    assert (sent["temperature"], sent["top_p"]) == (1.7976931348623157e308, 5e-324)
    assert math.copysign(1, sent["x"]) == -1


def test_an_answer_may_hold_any_text(process: RouterProcess, upstream: FakeUpstream) -> None:
    upstream.script(json_answer({"id": "x", "choices": [{"message": {"content": "\ud800\u2028\x00"}, "finish_reason": "stop"}]}))
    answer = process.chat()
    assert answer.status == 200
    assert ascii(answer.json()["choices"][0]["message"]["content"]) == ascii("\ud800\u2028\x00")
    process.settled(2)
    assert ascii(json.loads(process.lines()[1])["response"]["content"]) == ascii("�\u2028\x00")
