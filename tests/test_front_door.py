"""What the front door answers: routes, refusals, headers, who may come in."""

from __future__ import annotations

import gc
import gzip
import json
import re
import socket
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import App, RouterFactory
from fake_upstream import (
    FakeUpstream,
    chat_completion,
    error_answer,
    json_answer,
    openai_chunks,
    stream,
)
from router_process import INBOUND_KEY, ROOT, RouterProcess, chat_body, statuses

CHAT = "/v1/chat/completions"
GENERATION_ID = re.compile(r"gen-(\d{10,11})-[A-Za-z0-9]{20}")
MakeApp = Callable[..., App]


def post(app: App, path: str = CHAT, body: Any = None, headers: dict[str, str] | None = None, **environ: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(chat_body() if body is None else body).encode()
    return app.call("POST", path, data, headers, **environ)


# --- the routes, as a WSGI callable under the validator


def test_health_says_ok_as_text(app: MakeApp) -> None:
    answer = app().call("GET", "/health")
    assert (answer.status, answer.body.strip()) == (200, b"ok")
    assert answer.headers["content-type"].startswith("text/plain")


def test_a_chat_comes_back_as_the_upstream_wrote_it(app: MakeApp, upstream: FakeUpstream) -> None:
    said = chat_completion("hello", system_fingerprint="fp_1", x_vendor={"deep": [1, 2.5, None]})
    upstream.script(json_answer(said))
    answer = post(app())
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("application/json")
    assert answer.json() == said


def test_the_upstream_sees_the_body_unchanged_but_for_what_is_ours(app: MakeApp, upstream: FakeUpstream) -> None:
    body = chat_body("hi", temperature=0.5, user="u-1", x_unknown={"kept": [True, None, 1e-7]}, seed=2**60)
    post(app(), body={**body, "plugins": [], "trace": {"a": 1}, "session_id": "s", "models": ["fake-model"]})
    assert upstream.posts[0].json() == body
    assert upstream.posts[0].path == "/v1/chat/completions"


def test_numbers_and_escapes_reach_the_upstream_digit_by_digit(app: MakeApp, upstream: FakeUpstream) -> None:
    body = (
        b'{"model":"fake-model","messages":[{"role":"user","content":"\\u00e9 \xe2\x98\x83"}],'
        b'"top_p":0.30000000000000004,"big":123456789012345678901234567890,"exp":1E+2}'
    )
    post(app(), body=body)
    sent = upstream.posts[0].body
    for piece in (b"0.30000000000000004", b"123456789012345678901234567890"):
        assert piece in sent
    assert json.loads(sent) == json.loads(body)


def test_metadata_is_forwarded_only_to_an_upstream_that_wants_it(app: MakeApp, upstream: FakeUpstream) -> None:
    extra: dict[str, Any] = {"plugins": [], "trace": {"a": 1}, "session_id": "s", "models": ["fake-model"]}
    post(app(provider="forward_metadata = true"), body=chat_body(**extra))
    sent = upstream.posts[0].json()
    assert (sent["trace"], sent["session_id"]) == ({"a": 1}, "s")
    assert "plugins" not in sent
    assert "models" not in sent


ASKED: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/messages": {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 9},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "hi"}]},
    "/v1/responses": {"input": "hi"},
    "/v1/embeddings": {"input": "hi"},
}
FORMATS = {"/v1/messages/count_tokens": ["anthropic"], "/v1/embeddings": ["openai", "ollama"]}
"""The upstreams that are asked of each path; elsewhere all of them, and an openai one that speaks /responses itself."""


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(
    ("path", "format"), [(p, f) for p in ASKED for f in FORMATS.get(p, ["openai", "anthropic", "ollama", "responses"])]
)
def test_metadata_is_forwarded_in_whatever_language_and_wherever_it_was_said(
    app: MakeApp, upstream: FakeUpstream, path: str, format: str, wanted: bool
) -> None:
    kind = f'format = "{format}"' if format != "responses" else 'format = "openai"\nresponses = true'
    provider = f'[[providers]]\nname = "up"\n{kind}\nbase_url = "{{upstream}}/v1"\nforward_metadata = {str(wanted).lower()}\n'
    application = app(providers=provider)
    body = {"model": "fake-model", **ASKED[path], "trace": {"a": 1}, "plugins": [], "models": ["fake-model"]}
    post(application, path, {**body, "session_id": "s"}, {"X-Session-Id": "by-header"})
    post(application, path, body, {"X-Session-Id": "by-header"})
    post(application, path, {k: v for k, v in body.items() if k != "trace"})
    asked = [sent.json() for sent in upstream.posts if "show" not in sent.path]
    told = [{k: v for k, v in a.items() if k in ("trace", "session_id", "plugins", "models")} for a in asked]
    said = [{"trace": {"a": 1}, "session_id": "s"}, {"trace": {"a": 1}, "session_id": "by-header"}, {}]
    again = [t for i, t in enumerate(told) if i == 0 or t != told[i - 1]]  # the fake answers in one language only
    assert again == (said if wanted else [{}])


def test_a_whole_answer_says_who_answered_and_what_it_took(app: MakeApp, upstream: FakeUpstream) -> None:
    upstream.script(json_answer(chat_completion(usage={"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15})))
    headers = post(app()).headers
    assert headers["x-router-provider"] == "up"
    assert headers["x-router-model"] == "fake-model"
    assert headers["x-router-rule"] == "0:fallback"
    assert (headers["x-router-input-tokens"], headers["x-router-output-tokens"]) == ("11", "4")
    match = GENERATION_ID.fullmatch(headers["x-generation-id"])
    assert match
    assert abs(int(match[1]) - time.time()) < 60
    for absent in ("x-router-trace-id", "x-router-request-tags", "x-router-response-tags"):
        assert absent not in headers


def test_a_stream_has_the_same_headers_before_its_first_byte(app: MakeApp) -> None:
    answer = post(app(), body=chat_body(stream=True))
    headers = answer.headers
    assert answer.status == 200
    assert headers["content-type"].startswith("text/event-stream")
    assert headers["x-router-provider"] == "up"
    assert headers["x-router-model"] == "fake-model"
    assert headers["x-router-rule"] == "0:fallback"
    assert GENERATION_ID.fullmatch(headers["x-generation-id"])
    assert headers["cache-control"] == "no-cache"
    assert headers["x-accel-buffering"] == "no"
    for absent in ("x-router-trace-id", "x-router-input-tokens", "x-router-output-tokens", "connection"):
        assert absent not in headers


def test_stream_bytes_are_passed_on_as_they_came(app: MakeApp, upstream: FakeUpstream) -> None:
    blocks = openai_chunks("a b c")
    odd = [b": comment\n\n", b'data:  {"choices": [ ] , "x":1.0e0}\n\n', b"event: x\nid: 7\nretry: 10\ndata: {}\n\n"]
    upstream.script(stream([*blocks[:2], *odd, *blocks[2:]]))
    answer = post(app(), body=chat_body(stream=True))
    assert answer.body == b"".join([*blocks[:2], *odd, *blocks[2:]])


def test_usage_is_asked_for_and_hidden_from_a_client_that_did_not_ask(app: MakeApp, upstream: FakeUpstream) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    upstream.script(stream(openai_chunks("a b", usage)))
    answer = post(app(), body=chat_body(stream=True))
    assert upstream.posts[0].json()["stream_options"]["include_usage"] is True
    assert answer.body == b"".join(openai_chunks("a b"))


def test_usage_is_passed_on_to_a_client_that_asked(app: MakeApp, upstream: FakeUpstream) -> None:
    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    upstream.script(stream(openai_chunks("a b", usage)))
    body = chat_body(stream=True, stream_options={"include_usage": True, "x": 1})
    answer = post(app(), body=body)
    assert upstream.posts[0].json()["stream_options"] == {"include_usage": True, "x": 1}
    assert answer.body == b"".join(openai_chunks("a b", usage))


def test_usage_that_rides_with_text_is_never_cut_out(app: MakeApp, upstream: FakeUpstream) -> None:
    """Some servers repeat usage in every chunk or put it beside finish_reason: only a block of nothing else goes."""
    with_text = b'data: {"choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null}],"usage":{"prompt_tokens":1}}\n\n'
    final = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}],"usage":{"prompt_tokens":1}}\n\n'
    upstream.script(stream([with_text, final, b"data: [DONE]\n\n"]))
    assert post(app(), body=chat_body(stream=True)).body == with_text + final + b"data: [DONE]\n\n"


@pytest.mark.parametrize("path", ["/api/v1/chat/completions", "/api/v1/models"])
def test_the_routes_answer_under_api_v1_too(app: MakeApp, path: str) -> None:
    answer = post(app(), path) if "chat" in path else app().call("GET", path)
    assert answer.status == 200


def test_an_unknown_path_is_a_404_in_json(app: MakeApp) -> None:
    answer = app().call("GET", "/v1/nothing")
    assert answer.status == 404
    assert "message" in answer.error


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", CHAT, {"POST"}),
        ("DELETE", CHAT, {"POST"}),
        ("POST", "/health", {"GET"}),
        ("POST", "/v1/models", {"GET"}),
        ("PUT", "/api/v1/stats", {"GET"}),
    ],
)
def test_a_wrong_method_is_a_405_that_names_the_right_one(app: MakeApp, method: str, path: str, allowed: set[str]) -> None:
    answer = app().call(method, path)
    assert answer.status == 405
    assert allowed <= {name.strip() for name in answer.headers["allow"].split(",")}
    assert "message" in answer.error


def test_head_of_health_is_health_without_a_body(app: MakeApp) -> None:
    answer = app().call("HEAD", "/health")
    assert (answer.status, answer.body) == (200, b"")


def test_nothing_grants_cors(app: MakeApp) -> None:
    application = app()
    asking = {"Origin": "https://evil.example", "Access-Control-Request-Method": "POST"}
    answers = [application.call("OPTIONS", CHAT, b"", asking), post(application, headers=asking)]
    answers.append(application.call("GET", "/v1/models", b"", asking))
    for answer in answers:
        assert not [name for name in answer.headers if name.startswith("access-control-")]


@pytest.mark.parametrize(
    ("origin", "status"),
    [
        ("https://evil.example", 403),
        ("http://10.0.0.7:8090", 403),
        ("null", 403),
        ("http://localhost:3000", 200),
        ("http://127.0.0.1:8090", 200),
        ("https://pages.example", 200),
        ("app://obsidian.md", 200),
    ],
)
def test_a_page_of_another_site_cannot_spend_without_a_key(app: MakeApp, origin: str, status: int) -> None:
    application = app(server='allowed_hosts = ["pages.example"]')
    assert post(application, headers={"Origin": origin}).status == status


def test_a_page_that_has_a_key_may_be_anywhere(router: RouterFactory) -> None:
    process = router(server='api_key_env = "KEY"', environment={"KEY": INBOUND_KEY}, start=False)
    process.key = INBOUND_KEY
    process.start()
    assert process.chat(headers={"Origin": "https://evil.example"}).status == 200


def test_any_content_type_is_taken_if_the_body_is_json(app: MakeApp) -> None:
    application = app()
    for kind in ("text/plain", "application/x-www-form-urlencoded", "application/json; charset=latin-1", ""):
        assert post(application, CONTENT_TYPE=kind).status == 200


def test_a_gzipped_body_is_taken(app: MakeApp, upstream: FakeUpstream) -> None:
    answer = post(app(), body=gzip.compress(json.dumps(chat_body("zipped")).encode()), headers={"Content-Encoding": "gzip"})
    assert answer.status == 200
    assert upstream.posts[0].json()["messages"][0]["content"] == "zipped"
    assert upstream.posts[0].header("content-encoding") is None


@pytest.mark.parametrize("coding", ["br", "deflate", "zstd", "gzip, gzip", "x"])
def test_other_content_codings_are_a_415(app: MakeApp, upstream: FakeUpstream, coding: str) -> None:
    answer = post(app(), headers={"Content-Encoding": coding})
    assert answer.status == 415
    assert "message" in answer.error
    assert not upstream.posts


def test_what_claims_to_be_gzip_and_is_not_is_a_400(app: MakeApp) -> None:
    whole = gzip.compress(json.dumps(chat_body()).encode())
    application = app()
    for body in (b"{}", whole[:-12], b"\x1f\x8b" + b"\0" * 20):
        answer = post(application, body=body, headers={"Content-Encoding": "gzip"})
        assert answer.status == 400
        assert answer.error["type"] == "invalid_request_error"


@pytest.mark.parametrize("cut", [1, 40])
def test_a_body_gzipped_in_several_members_is_taken_whole(app: MakeApp, upstream: FakeUpstream, cut: int) -> None:
    whole = json.dumps(chat_body("zipped in parts")).encode()
    body = gzip.compress(whole[:cut]) + gzip.compress(b"") + gzip.compress(whole[cut:])
    answer = post(app(), body=body, headers={"Content-Encoding": "gzip"})
    assert answer.status == 200, answer.body
    assert upstream.posts[0].json()["messages"] == chat_body("zipped in parts")["messages"]


def test_several_members_are_taken_up_to_the_same_limit(app: MakeApp, upstream: FakeUpstream) -> None:
    body = gzip.compress(b'{"model":"m","x":"' + b"a" * 60_000) + gzip.compress(b"a" * 60_000 + b'"}')
    answer = post(app(server="max_body_bytes = 100000"), body=body, headers={"Content-Encoding": "gzip"})
    assert answer.status == 413
    assert upstream.posts == []


@pytest.mark.parametrize("after", [b"x", b"\0", b"\x1f\x8b", gzip.compress(b"{}", mtime=0)[:-1]])
def test_what_stands_after_a_gzipped_body_and_is_no_further_member_is_a_400(
    app: MakeApp, upstream: FakeUpstream, after: bytes
) -> None:
    body = gzip.compress(json.dumps(chat_body()).encode()) + after
    assert post(app(), body=body, headers={"Content-Encoding": "gzip"}).status == 400
    assert upstream.posts == []


def test_a_gzip_bomb_is_a_413(app: MakeApp, upstream: FakeUpstream) -> None:
    bomb = gzip.compress(b'{"model":"m","x":"' + b"a" * 5_000_000 + b'"}')
    answer = post(app(server="max_body_bytes = 100000"), body=bomb, headers={"Content-Encoding": "gzip"})
    assert answer.status == 413
    assert "message" in answer.error
    assert not upstream.posts


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"model": "fake-model"}, "messages"),
        ({"model": "fake-model", "messages": "hi"}, "messages"),
        ({"model": "fake-model", "messages": ["hi"]}, "messages"),
        ({"model": "fake-model", "messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "model"),
        ({"model": 5, "messages": [{"role": "user", "content": "hi"}]}, "model"),
        (chat_body(stream="yes"), "stream"),
        (chat_body(session_id="x" * 257), "session_id"),
        (chat_body(session_id=5), "session_id"),
        (chat_body(trace="x"), "trace"),
        (chat_body(plugins="x"), "plugins"),
        (chat_body(plugins=[{"id": "no-such-plugin"}]), "plugins"),
        (chat_body(models="x"), "models"),
    ],
)
def test_a_wrong_shape_is_a_400_that_names_the_field(
    app: MakeApp, upstream: FakeUpstream, body: dict[str, Any], named: str
) -> None:
    answer = post(app(), body=body)
    assert answer.status == 400
    assert answer.error["type"] == "invalid_request_error"
    assert named in f"{answer.error['param']} {answer.error['message']}"
    assert not upstream.posts


def test_a_session_of_256_characters_is_taken(app: MakeApp) -> None:
    assert post(app(), body=chat_body(session_id="é" * 256)).status == 200


def test_a_session_header_that_is_too_long_is_refused_too(app: MakeApp) -> None:
    assert post(app(), headers={"X-Session-Id": "x" * 257}).status == 400


def test_a_model_no_rule_wants_is_a_404_that_names_it(app: MakeApp, upstream: FakeUpstream) -> None:
    rules = '[[routers]]\ntype = "prefix"\nmodel_prefix = "known/"\nprovider = "up"\n'
    answer = post(app(rules=rules), body=chat_body() | {"model": "strange-model"})
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert "strange-model" in answer.error["message"]
    assert not upstream.posts


def test_a_prefix_rule_chooses_and_rewrites(app: MakeApp, upstream: FakeUpstream) -> None:
    rules = '[[routers]]\nname = "mine"\ntype = "prefix"\nmodel_prefix = "known/"\nprovider = "up"\n'
    rules += 'rewrite_model = "other"\n'
    answer = post(app(rules=rules), body=chat_body() | {"model": "known/model"})
    assert upstream.posts[0].json()["model"] == "other"
    assert answer.headers["x-router-model"] == "other"
    assert answer.headers["x-router-rule"] == "mine"
    assert answer.json()["model"] == "fake-model-0613"


def test_headers_of_the_upstream_are_not_passed_on(app: MakeApp, upstream: FakeUpstream) -> None:
    planted = {
        "Set-Cookie": "a=b",
        "Server": "x",
        "X-Evil": "1",
        "X-Router-Provider": "liar",
        "Keep-Alive": "timeout=5",
    }
    upstream.script(json_answer(chat_completion(), headers=planted))
    headers = post(app()).headers
    assert not {"set-cookie", "x-evil", "keep-alive"} & headers.keys()
    assert headers["x-router-provider"] == "up"


def test_the_client_decides_neither_upstream_nor_key(app: MakeApp, upstream: FakeUpstream) -> None:
    elsewhere = FakeUpstream()
    try:
        body = chat_body(api_base=elsewhere.url, base_url=elsewhere.url, api_key="sk-client-key", provider={"url": elsewhere.url})
        headers = {"X-Custom-Host": elsewhere.url, "X-Portkey-Custom-Host": elsewhere.url, "X-Api-Base": elsewhere.url}
        assert post(app(), body=body, headers={**headers, "Authorization": "Bearer sk-client-key"}).status == 200
        assert not elsewhere.requests
        assert upstream.posts[0].header("authorization") is None
        assert upstream.posts[0].header("x-custom-host") is None
        assert upstream.posts[0].json()["base_url"] == elsewhere.url, "unknown fields go on as they are"
    finally:
        elsewhere.close()


def test_the_clients_cookies_and_addresses_stay_with_us(app: MakeApp, upstream: FakeUpstream) -> None:
    post(app(), headers={"Cookie": "a=b", "X-Forwarded-For": "10.0.0.1", "X-Api-Key": "k", "Accept-Encoding": "br"})
    sent = {name.lower() for name, _ in upstream.posts[0].headers}
    assert not {"cookie", "x-forwarded-for", "x-api-key"} & sent
    assert "br" not in (upstream.posts[0].header("accept-encoding") or "")
    assert upstream.posts[0].header("host") == f"127.0.0.1:{upstream.port}"


def test_stats_have_the_shape_tools_rely_on(app: MakeApp) -> None:
    application = app()
    post(application)
    post(application, body=b"{")
    stats = application.call("GET", "/api/v1/stats").json()
    assert stats["requests"] == {"accepted": 1, "ok": 1, "error": 0, "cancelled": 0, "timeout": 0, "rejected": 0}
    assert sum(stats["refused"].values()) == 1
    assert stats["in_flight"] == 0
    assert stats["uptime_s"] >= 0
    assert isinstance(stats["version"], str)
    provider = stats["providers"]["up"]
    assert (provider["requests"], provider["errors"]) == (1, 0)
    assert {"ttft_ms", "tokens_per_s", "breaker", "models"} <= provider.keys()
    assert set(stats["log"]) >= {"written", "dropped"}


RETRY_AFTER = {"7": True, "Wed, 21 Oct 2099 07:28:00 GMT": True} | dict.fromkeys(["soon", "-5", "1.5", "7, 8", ""], False)


@pytest.mark.parametrize("given", RETRY_AFTER)
def test_an_upstreams_retry_after_reaches_the_client_only_if_it_is_one(app: MakeApp, upstream: FakeUpstream, given: str) -> None:
    upstream.script(error_answer(429, "slow down", {"Retry-After": given}))
    answer = post(app())
    assert answer.status == 429
    assert answer.headers.get("retry-after") == (given if RETRY_AFTER[given] else None)


@pytest.mark.parametrize(
    "model",
    ["a\r\nX-Evil: 1", "a\nb", "a\x00b", "模型", "fäke", "\ud800", " a ", "x" * 100_000, "a\x7fb", "a/b:c@d", "<b>", "a,b;c=d"],
    ids=ascii,
)
def test_a_model_name_that_no_header_can_carry_does_no_harm(app: MakeApp, upstream: FakeUpstream, model: str) -> None:
    """It goes upstream as it is; into headers only as far as headers go."""
    application = app()
    for streamed in (False, True):
        answer = post(application, body=chat_body(stream=streamed) | {"model": model})
        assert answer.status in (200, 400)
        assert "x-evil" not in answer.headers
        for name, value in answer.headers.items():
            assert value.isprintable(), name
            assert len(value) < 8000, name
        if answer.status == 200:
            assert ascii(upstream.posts[-1].json()["model"]) == ascii(model)


def test_a_rule_may_have_any_name(app: MakeApp) -> None:
    rules = '[[routers]]\nname = "Küche → 1\\r\\nX-Evil: 1"\ntype = "fallback"\n'
    headers = post(app(rules=rules)).headers
    assert "x-evil" not in headers
    assert headers["x-router-rule"].isascii()


def test_a_query_changes_nothing(app: MakeApp) -> None:
    application = app()
    assert post(application, f"{CHAT}?api-version=2024-06-01&x=%ff").status == 200
    assert application.call("GET", "/v1/models?limit=5").status == 200


@pytest.mark.parametrize("case", ["whole", "stream", "refused", "failed", "broken"])
def test_a_finished_request_is_gone_without_the_garbage_collector(app: MakeApp, upstream: FakeUpstream, case: str) -> None:
    """A request in a reference cycle keeps its whole prompt until the collector comes by, and for big ones that is late."""
    broken = stream(openai_chunks("a", finish=None, done=False))
    scripts = {"refused": error_answer(400), "failed": error_answer(500), "broken": broken}
    application = app()
    post(application)
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        upstream.script(*[scripts[case]] if case in scripts else [])
        post(application, body=chat_body(stream=case in ("stream", "broken")))
        gc.collect()
        kinds = {f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in gc.garbage}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not {kind for kind in kinds if kind.split(".")[0] in ("router", "pipeline", "providers")}


# --- over a socket


def test_a_body_of_exactly_the_limit_is_taken_and_one_more_is_not(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(server="max_body_bytes = 20000")
    small = json.dumps(chat_body("")).encode()
    for size, status in {19999: 200, 20000: 200, 20001: 413}.items():
        body = json.dumps(chat_body("x" * (size - len(small)))).encode()
        assert len(body) == size
        assert process.post(CHAT, body).status == status, size
        chunked = b"".join(b"%x\r\n%s\r\n" % (len(body[at : at + 777]), body[at : at + 777]) for at in range(0, size, 777))
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        assert statuses(process.raw(head + chunked + b"0\r\n\r\n")) == [status], f"{size} chunked"
    assert len(upstream.posts) == 4
    process.settled(4)


def test_too_much_is_refused_in_openais_words(router: RouterFactory) -> None:
    process = router(server="max_body_bytes = 20000")
    answer = process.post(CHAT, b"x" * 30000)
    assert answer.status == 413
    assert "message" in answer.error
    assert sum(process.stats()["refused"].values()) == 1
    assert process.settled(0) == []


def test_a_body_that_will_be_refused_is_not_asked_for(router: RouterFactory) -> None:
    process = router(server="max_body_bytes = 20000")
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 10000000\r\nExpect: 100-continue\r\n\r\n"
    assert statuses(process.raw(head.encode())) == [413]


def test_expect_100_continue_is_honoured(router: RouterFactory) -> None:
    process = router()
    body = json.dumps(chat_body()).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    head += "Expect: 100-continue\r\n\r\n"
    with process.dial() as sock:
        sock.sendall(head.encode())
        assert sock.recv(4096).startswith(b"HTTP/1.1 100")
        sock.sendall(body)
        data = b""
        while piece := sock.recv(65536):
            data += piece
    assert statuses(data) == [200]


def test_pipelined_requests_are_answered_in_order(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router()
    requests = b""
    for number in range(5):
        upstream.script(json_answer(chat_completion(f"answer-{number}")))
        body = json.dumps(chat_body()).encode()
        last = "Connection: close\r\n" if number == 4 else ""
        requests += f"POST {CHAT} HTTP/1.1\r\nHost: x\r\n{last}Content-Length: {len(body)}\r\n\r\n".encode() + body
    data = process.raw(requests)
    assert statuses(data) == [200] * 5
    assert re.findall(rb"answer-\d", data) == [b"answer-%d" % number for number in range(5)]
    process.settled(5)


def test_a_connection_serves_one_request_after_another(router: RouterFactory) -> None:
    process = router()
    connection = process.connection()
    for _ in range(3):
        connection.request("POST", CHAT, json.dumps(chat_body()), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert (response.status, bool(response.read())) == (200, True)
        assert connection.sock, "kept alive"
    connection.close()


def test_an_http_1_0_client_is_answered(router: RouterFactory) -> None:
    process = router()
    body = json.dumps(chat_body(stream=True)).encode()
    data = process.raw(f"POST {CHAT} HTTP/1.0\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
    assert statuses(data) == [200]
    assert data.endswith(b"".join(openai_chunks("one two three"))), "no chunk sizes in a 1.0 answer"


def test_the_app_lives_under_its_prefix_and_health_everywhere(router: RouterFactory) -> None:
    process = router(server='url_prefix = "/llm"')
    assert process.get("/health").status == 200
    assert process.get("/llm/health").status == 200
    assert process.post(f"/llm{CHAT}", chat_body()).status == 200
    assert process.get("/llm/v1/models").status == 200
    assert process.post(CHAT, chat_body()).status == 404
    assert process.get("/llmx/v1/models").status == 404


@pytest.mark.parametrize("prefix", ["", "/llm"])
@pytest.mark.parametrize("path", ["/v1/messages", "/api/v1/messages"])
def test_too_much_is_refused_in_the_clients_own_words_wherever_it_asks(router: RouterFactory, prefix: str, path: str) -> None:
    process = router(server=f'max_body_bytes = 2000\nurl_prefix = "{prefix}"')
    answer = process.post(prefix + path, chat_body("x" * 3000))
    assert (answer.status, answer.json()["type"]) == (413, "error")
    assert process.get(f"{prefix}/api/v1/stats").json()["refused"] == {"request_too_large": 1}


def test_it_listens_on_a_unix_socket_instead(router: RouterFactory) -> None:
    process = router(server='unix_socket = "{tmp}/router.sock"', start=False)
    process.port = 1
    process.write_config()
    process.socket_path = str(process.folder / "router.sock")
    process.launch()
    wait_up(process)
    assert process.chat().status == 200
    assert process.record()["outcome"] == "ok"
    assert process.stop() == 0
    process.launch()
    wait_up(process)
    assert process.chat().status == 200, "a socket file left behind is no obstacle"


def test_a_unix_socket_that_is_in_use_is_exit_2(router: RouterFactory) -> None:
    processes = [router(server='unix_socket = "{tmp}/../router.sock"', start=False) for _ in range(2)]
    for process in processes:
        process.port = 1
        process.write_config()
        process.socket_path = str(process.folder / "../router.sock")
    first, second = processes
    first.launch()
    wait_up(first)
    second.launch()
    assert second.exit_code() == 2
    assert len(second.errors().strip().splitlines()) == 1
    assert first.chat().status == 200


def wait_up(process: RouterProcess) -> None:
    deadline = time.monotonic() + 10
    while process._up_or_dead() != "up":
        assert time.monotonic() < deadline, process.errors()
        time.sleep(0.02)


@pytest.mark.parametrize(("proxy", "believed"), [('trusted_proxy = "127.0.0.1"', True), ("", False)])
def test_a_forwarded_address_is_believed_only_from_the_trusted_proxy(router: RouterFactory, proxy: str, believed: bool) -> None:
    process = router(server=proxy)
    process.chat(headers={"X-Forwarded-For": "203.0.113.7"})
    assert process.record()["client_address"] == ("203.0.113.7" if believed else "127.0.0.1")


@pytest.mark.parametrize("value", ["<script>", "", ",", "unknown", "x" * 5000, "2001:db8::1", "[2001:db8::1]:443", "1.2.3.4:5"])
def test_an_odd_forwarded_address_is_no_accident(router: RouterFactory, value: str) -> None:
    process = router(server='trusted_proxy = "127.0.0.1"')
    answer = process.chat(headers={"X-Forwarded-For": value})
    assert answer.status in (200, 400)
    if answer.status == 200:
        assert process.record()["client_address"]


def test_a_forged_forwarded_address_in_front_of_the_proxys_own_is_not_believed(router: RouterFactory) -> None:
    process = router(server='trusted_proxy = "127.0.0.1"')
    process.chat(headers={"X-Forwarded-For": "6.6.6.6, 203.0.113.7"})
    assert process.record()["client_address"] == "203.0.113.7"


# --- who may come in

ONE_KEY = 'api_key_env = "INBOUND"\n'
ENVIRONMENT = {"INBOUND": INBOUND_KEY}


@pytest.fixture
def locked(router: RouterFactory) -> RouterProcess:
    return router(server=ONE_KEY, environment=ENVIRONMENT)


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": f"Bearer {INBOUND_KEY}"},
        {"Authorization": f"bearer {INBOUND_KEY}"},
        {"authorization": f"BEARER  {INBOUND_KEY}"},
        {"x-api-key": INBOUND_KEY},
    ],
)
def test_the_key_opens(locked: RouterProcess, headers: dict[str, str]) -> None:
    assert locked.chat(headers=headers).status == 200
    assert locked.get("/v1/models", headers).status == 200
    assert locked.get("/v1/nothing", headers).status == 404


def test_without_the_key_everything_but_health_is_401(locked: RouterProcess, upstream: FakeUpstream) -> None:
    assert locked.get("/health").status == 200
    for path in (
        "/v1/models",
        "/v1/models/x",
        "/api/v1/models",
        "/api/v1/stats",
        "/v1/nothing",
        "/",
        "/healthy",
        "/health/x",
    ):
        assert locked.get(path).status == 401, path
    for path in (CHAT, f"/api{CHAT}", "/v1/messages", "/v1/responses", "/v1/embeddings", "/v1/route", "/v1/nothing"):
        assert locked.post(path, chat_body()).status == 401, path
    assert locked.request("DELETE", CHAT).status == 401, "401 before 405"
    assert not upstream.posts


WRONG_KEYS = {
    "none": {},
    "empty": {"Authorization": ""},
    "only the scheme": {"Authorization": "Bearer "},
    "wrong": {"Authorization": "Bearer wrong"},
    "prefix": {"Authorization": f"Bearer {INBOUND_KEY[:-1]}"},
    "longer": {"Authorization": f"Bearer {INBOUND_KEY}x"},
    "other scheme": {"Authorization": f"Basic {INBOUND_KEY}"},
    "no scheme": {"Authorization": INBOUND_KEY},
    "not ascii": {"Authorization": "Bearer \xe9\xff"},
    "60 kB": {"Authorization": "Bearer " + "x" * 60_000},
    "x-api-key": {"x-api-key": "wrong"},
    "underscore": {"X_Api_Key": INBOUND_KEY},
    "two in one": {"Authorization": f"Bearer wrong, Bearer {INBOUND_KEY}"},
    "cookie": {"Cookie": f"key={INBOUND_KEY}; session={INBOUND_KEY}"},
}


def test_a_401_is_always_the_same_and_tells_nothing(locked: RouterProcess) -> None:
    seen = {}
    for name, headers in WRONG_KEYS.items():
        answer = locked.get("/v1/models", headers)
        assert answer.status == 401, name
        varying = {"date", "connection", "content-length"}
        seen[name] = (answer.body, tuple(sorted((k, v) for k, v in answer.headers.items() if k not in varying)))
        assert b"wrong" not in answer.body
        assert answer.error["type"]
    locked.key = INBOUND_KEY
    assert len(set(seen.values())) == 1, seen
    assert sum(locked.stats()["refused"].values()) == len(WRONG_KEYS)
    assert not locked.lines()


def test_a_key_in_the_address_opens_nothing_here(locked: RouterProcess) -> None:
    assert locked.get(f"/v1/models?api_key={INBOUND_KEY}").status == 401
    assert locked.post(f"{CHAT}?api_key={INBOUND_KEY}", chat_body()).status == 401


@pytest.mark.parametrize(
    "line",
    [
        "GET //v1/models",
        "GET /v1/../v1/models",
        "GET /health/../v1/models",
        "GET /health/..%2fv1/models",
        "GET /%2e%2e/v1/models",
        "GET /v1%2Fmodels",
        "GET /%76%31/models",
        "GET http://x/v1/models",
        "GET http://x/health/../v1/models",
        "GET /health%00/../v1/models",
        "GET /health;/v1/models",
        "GET /v1/models#/health",
        "GET /v1/models?/health",
        "GET ///health/../v1/models",
    ],
)
def test_no_spelling_of_a_path_walks_around_the_gate(locked: RouterProcess, line: str) -> None:
    data = locked.raw(f"{line} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
    (status,) = statuses(data)
    assert status in (400, 401, 404), data
    assert b'"object"' not in data


def test_two_authorization_headers_open_nothing(locked: RouterProcess) -> None:
    for first, second in (("wrong", INBOUND_KEY), (INBOUND_KEY, "wrong"), (INBOUND_KEY, INBOUND_KEY)):
        request = (
            "GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
            f"Authorization: Bearer {first}\r\nAuthorization: Bearer {second}\r\n\r\n"
        )
        assert statuses(locked.raw(request.encode()))[0] in (400, 401)


def test_named_keys_open_and_their_names_are_recorded(router: RouterFactory) -> None:
    keys = '[[api_keys]]\nname = "alice"\nkey_env = "ALICE"\n[[api_keys]]\nname = "bob"\nkey_env = "BOB"\n'
    process = router(rules=keys + '[[routers]]\ntype = "fallback"\n', environment={"ALICE": "key-alice-1", "BOB": "key-bob-22\n"})
    assert process.chat().status == 401
    for count, (name, key) in enumerate({"alice": "key-alice-1", "bob": "key-bob-22"}.items(), 1):
        assert process.chat(headers={"x-api-key": key}).status == 200
        assert process.records(count)[-1]["api_key_name"] == name
    log = process.log.read_text()
    assert "key-alice-1" not in log
    assert "key-bob-22" not in log


# --- models


def test_models_that_any_provider_serves_are_listed(app: MakeApp) -> None:
    providers = """
[[providers]]
name = "one"
format = "openai"
base_url = "{upstream}/v1"
models = ["a", "vendor/b"]
[[providers]]
name = "two"
format = "openai"
base_url = "{upstream}/v1"
models = ["a", "c"]
"""
    application = app(providers=providers)
    listed = application.call("GET", "/v1/models").json()
    assert listed["object"] == "list"
    assert sorted(model["id"] for model in listed["data"]) == ["a", "c", "vendor/b"]
    for model in listed["data"]:
        assert model["object"] == "model"
        assert isinstance(model["created"], int)
        assert isinstance(model["owned_by"], str)
    one = application.call("GET", "/v1/models/vendor/b")
    assert (one.status, one.json()["id"], one.json()["object"]) == (200, "vendor/b", "model")
    missing = application.call("GET", "/v1/models/nope")
    assert missing.status == 404
    assert missing.error["code"] == "model_not_found"
    assert "nope" in missing.error["message"]


# --- as shipped


def test_the_shipped_configuration_answers_on_a_machine_with_nothing_on_it(router: RouterFactory) -> None:
    shipped = (ROOT / "config.toml").read_text("utf-8")
    assert tomllib.loads(shipped)["server"]["port"] == 8090
    process = router(shipped.replace("8090", "{port}"))
    answer = process.chat("tell me something")
    assert answer.status == 200
    message = answer.json()["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"]
    with process.stream("tell me something") as stream:
        assert stream.read().endswith(b"data: [DONE]\n\n")


def test_a_port_that_is_taken_is_exit_2_in_one_line(router: RouterFactory, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        process = router(start=False)
        process.port = taken.getsockname()[1]
        process.write_config()
        process.launch()
        assert process.exit_code() == 2
    assert len(process.errors().strip().splitlines()) == 1
    assert str(process.port) in process.errors()
