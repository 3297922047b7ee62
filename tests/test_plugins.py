"""Parts that look at requests and answers: the hooks, what strangers may break (their own request), the built-in ones.

Foreign modules are written into the test's own folder and put on the path, as PYTHONPATH would.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import RouterFactory
from deciding import (
    CHAT,
    MESSAGES,
    RESPONSES,
    Fakes,
    House,
    MakeApp,
    always,
    config,
    fake_providers,
    provider,
    rule,
    sse_text,
    table,
)
from fake_upstream import answer as whole
from fake_upstream import chat_completion, error_answer, json_answer, openai_chunks, stream
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from router_process import ROOT, Answer, RouterProcess, chat_body, until

NUMBER = itertools.count()
MakeHouse = Callable[..., House]
Foreign = Callable[..., str]
OPENAI = '{ "model": "fake-model", "messages": [{"role": "user", "content": "h\\u0069"}], "temperature": 1.0e0, "zzz": [ ] }'


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


@pytest.fixture
def house(app: MakeApp, fakes: Fakes) -> MakeHouse:
    """A router with the provider `a` and these parts."""
    return lambda *parts, **more: House(app(config(provider("a", fakes["a"]), *parts, **more)))


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Foreign:
    """`foreign(source)` is the name of a module of that source on the path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> str:
        name = f"foreign_{next(NUMBER)}"
        (tmp_path / f"{name}.py").write_text(source, "utf-8")
        return name

    return write


def plugin(id: str, module: str = "", kind: str = "plugins", enabled: bool = True, **keys: Any) -> str:
    told = {"enabled": enabled, **({"module": module} if module else {}), **keys}
    return table(f"[{kind}.{id}]", **told)


def hook(name: str, body: str, head: str = "") -> str:
    """The source of a plugin with one hook."""
    arguments = "request, answer" if name in ("post_response", "on_end") else "request"
    lines = "\n".join(f"        {line}" for line in body.split("\n"))
    imports = f"{head}\nimport plugins, providers, time\n"
    return f"{imports}class P:\n    def {name}(self, {arguments}):\n{lines}\nplugin = lambda settings: P()\n"


def classifier(body: str) -> str:
    lines = "\n".join(f"        {line}" for line in body.split("\n"))
    return f"import time\nclass C:\n    def classify(self, request):\n{lines}\nclassifier = lambda settings: C()\n"


def response_classifier(body: str) -> str:
    lines = "\n".join(f"        {line}" for line in body.split("\n"))
    return (
        f"import time\nclass C:\n    def classify_response(self, request, answer):\n{lines}\n"
        "response_classifier = lambda settings: C()\n"
    )


def asking(path: str, text: str = "hi", **more: Any) -> dict[str, Any]:
    if path == RESPONSES:
        return {"model": "m", "input": text, **more}
    return {"model": "m", "max_tokens": 50, "messages": [{"role": "user", "content": text}], **more}


def text_of(path: str, answered: Answer, streamed: bool) -> str:
    """What a client of this dialect reads."""
    if path == CHAT:
        return sse_text(answered.body) if streamed else str(answered.json()["choices"][0]["message"]["content"])
    if not streamed:
        blocks = answered.json()["content"] if path == MESSAGES else answered.json()["output"][-1]["content"]
        return "".join(block["text"] for block in blocks)
    data = [json.loads(line[6:]) for line in answered.body.decode().split("\n") if line.startswith("data: {")]
    if path == MESSAGES:
        return "".join(event["delta"].get("text", "") for event in data if event["type"] == "content_block_delta")
    return "".join(event["delta"] for event in data if event["type"] == "response.output_text.delta")


# --- the order of things

DIARY = """
calls = []
class P:
    def on_start(self, request): calls.append("on_start")
    def pre_request(self, request): calls.append("pre_request")
    def post_response(self, request, answer): calls.append("post_response " + answer.text)
    def on_end(self, request, answer): calls.append("on_end " + answer.text)
    def classify(self, request): calls.append("classify"); return ["seen"]
    def classify_response(self, request, answer): calls.append("classify_response"); return ["read"]
plugin = classifier = response_classifier = lambda settings: P()
"""


def diary_house(house: MakeHouse, foreign: Foreign) -> tuple[House, list[str], str]:
    module = foreign(DIARY)
    here = house(*[plugin("diary", module, kind) for kind in ("plugins", "classifiers", "response_classifiers")])
    return here, sys.modules[module].calls, module


def test_the_hooks_of_a_whole_answer_in_their_order(house: MakeHouse, foreign: Foreign) -> None:
    here, calls, _ = diary_house(house, foreign)
    answered = here.chat()
    assert calls == [
        "on_start", "classify", "pre_request", "post_response hello there", "classify_response", "on_end hello there",
    ]  # fmt: skip
    assert (answered.headers["x-router-request-tags"], answered.headers["x-router-response-tags"]) == ("seen", "read")
    record = here.record
    assert (record["tags"], record["response"]["tags"]) == (["seen"], ["read"])
    assert (record["plugins"], record["skipped_plugins"]) == (["diary"], [])


def test_a_stream_takes_the_same_path_and_notes_what_it_skips(house: MakeHouse, foreign: Foreign) -> None:
    here, calls, _ = diary_house(house, foreign)
    answered = here.chat(stream=True)
    assert sse_text(answered.body) == "one two three"
    assert calls == ["on_start", "classify", "pre_request", "classify_response", "on_end one two three"]
    assert answered.headers["x-router-request-tags"] == "seen"
    assert "x-router-response-tags" not in answered.headers, "known only when all has left"
    assert (here.record["plugins"], here.record["skipped_plugins"]) == (["diary"], ["diary"])
    assert here.record["response"]["tags"] == ["read"]


@pytest.mark.parametrize("streamed", [False, True])
def test_on_end_comes_once_whatever_happened(house: MakeHouse, foreign: Foreign, fakes: Fakes, streamed: bool) -> None:
    always(error_answer(500), fakes["a"])
    here, calls, _ = diary_house(house, foreign)
    assert here.chat(stream=streamed).status == 502
    assert calls == ["on_start", "classify", "pre_request", "on_end "]


def test_plugins_run_in_the_order_of_the_file(house: MakeHouse, foreign: Foreign) -> None:
    modules = [foreign(hook("pre_request", f'request.user = (request.user or "") + "{letter}"')) for letter in "zab"]
    here = house(*[plugin(f"p{number}", module) for number, module in enumerate(modules)])
    here.chat()
    assert here.record["user"] == "zab"
    assert here.record["plugins"] == ["p0", "p1", "p2"]


# --- a hook that answers by itself

PONG = "answer = providers.Answer()\nanswer.text = 'pong'\nreturn answer"


@pytest.mark.parametrize("path", [CHAT, MESSAGES, RESPONSES])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["on_start", "pre_request"])
def test_a_hook_may_answer_by_itself(
    house: MakeHouse, foreign: Foreign, fakes: Fakes, name: str, streamed: bool, path: str
) -> None:
    here = house(plugin("ping", foreign(hook(name, PONG))))
    answered = here.post(path, asking(path, stream=streamed))
    assert answered.status == 200
    assert text_of(path, answered, streamed) == "pong"
    assert fakes.counts() == {}
    record = here.record
    assert (record["outcome"], record["status"], record["provider"], record["attempts"]) == ("ok", 200, None, [])
    assert record["response"]["content"] == "pong", "what the client was told is in the record"
    assert record["plugins"] == ["ping"]
    assert record["cost"] is None
    assert answered.headers["x-generation-id"] == record["generation_id"]
    assert "x-router-provider" not in answered.headers


def test_a_streamed_answer_of_a_plugin_ends_as_the_dialect_ends(house: MakeHouse, foreign: Foreign) -> None:
    here = house(plugin("ping", foreign(hook("on_start", PONG))))
    assert here.chat(stream=True).body.endswith(b"data: [DONE]\n\n")


def test_after_an_answer_nothing_else_is_asked(house: MakeHouse, foreign: Foreign) -> None:
    here, calls, module = diary_house(house, foreign)
    ahead = house(
        plugin("first", foreign(hook("on_start", PONG))), plugin("diary", module), plugin("diary", module, "classifiers")
    )
    calls.clear()
    assert ahead.chat().status == 200
    assert "on_start" not in calls
    assert "classify" not in calls
    assert "pre_request" not in calls


def test_post_response_may_replace_the_answer(house: MakeHouse, foreign: Foreign) -> None:
    here = house(plugin("other", foreign(hook("post_response", PONG))))
    assert text_of(CHAT, here.chat(), False) == "pong"
    assert here.record["response"]["content"] == "pong"


@pytest.mark.parametrize("path", [CHAT, MESSAGES])
def test_post_response_may_change_the_answer_it_is_given(house: MakeHouse, foreign: Foreign, path: str) -> None:
    here = house(plugin("loud", foreign(hook("post_response", "answer.text = answer.text.upper()"))))
    assert text_of(path, here.post(path, asking(path)), False) == "HELLO THERE"
    assert here.record["response"]["content"] == "HELLO THERE"


# --- a hook that stops


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["on_start", "pre_request"])
def test_a_hook_may_stop_the_request(house: MakeHouse, foreign: Foreign, fakes: Fakes, name: str, streamed: bool) -> None:
    here = house(plugin("guard", foreign(hook(name, "return plugins.STOP"))))
    answered = here.chat(stream=streamed)
    assert answered.status == 403
    assert "guard" in answered.error["message"]
    assert fakes.counts() == {}
    assert (here.record["outcome"], here.record["status"]) in (("error", 403), ("rejected", 403))


def test_stop_after_the_answer_skips_the_plugins_behind_it(house: MakeHouse, foreign: Foreign) -> None:
    first = foreign(hook("post_response", "return plugins.STOP"))
    second = foreign(hook("post_response", PONG))
    here = house(plugin("first", first), plugin("second", second))
    assert text_of(CHAT, here.chat(), False) == "hello there"
    assert here.record["outcome"] == "ok"


# --- a hook that changes the request


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", ["on_start", "pre_request"])
def test_what_a_hook_changes_reaches_the_provider(
    house: MakeHouse, foreign: Foreign, fakes: Fakes, name: str, streamed: bool
) -> None:
    change = "request.messages[-1].content[0]['text'] = 'changed'\nrequest.temperature = 0.25\nrequest.stop.append('END')"
    here = house(plugin("editor", foreign(hook(name, change))))
    assert here.chat(stream=streamed, seed=7).status == 200
    sent = fakes["a"].posts[0].json()
    assert sent["messages"][-1]["content"] in ("changed", [{"type": "text", "text": "changed"}])
    assert sent["temperature"] == 0.25
    assert sent["stop"] in ("END", ["END"])
    assert sent["seed"] == 7, "and nothing else is lost"
    assert sent["model"] == "fake-model"


def test_what_is_only_looked_at_stays_byte_for_byte(house: MakeHouse, foreign: Foreign, fakes: Fakes) -> None:
    look = "request.text(); sorted(m.role for m in request.messages); request.body.data; list(request.tools)"
    here = house(plugin("reader", foreign(hook("pre_request", look))))
    here._app.call("POST", CHAT, OPENAI.encode())
    assert fakes["a"].posts[0].body == OPENAI.encode()


def test_a_hook_may_change_the_model_and_the_rules_go_by_it(app: MakeApp, foreign: Foreign, fakes: Fakes) -> None:
    module = foreign(hook("pre_request", "request.model = 'big'"))
    rules = [rule("prefix", model_prefix="big", provider="b"), rule()]
    here = House(app(config(provider("a", fakes["a"]), provider("b", fakes["b"]), plugin("upgrade", module), *rules)))
    answered = here.chat(model="small")
    assert (answered.headers["x-router-provider"], answered.headers["x-router-model"]) == ("b", "big")
    assert fakes["b"].posts[0].json()["model"] == "big"
    assert (here.record["requested_model"], here.record["sent_model"]) == ("small", "big")


@pytest.mark.parametrize("name", ["on_start", "pre_request"])
def test_a_hook_may_name_who_answers(app: MakeApp, foreign: Foreign, fakes: Fakes, name: str) -> None:
    module = foreign(hook(name, "request.forced = [('b', 'other'), ('a', None)]"))
    always(error_answer(500), fakes["b"])
    here = House(app(config(provider("a", fakes["a"], quality=9), provider("b", fakes["b"]), plugin("chooser", module))))
    answered = here.chat()
    assert answered.headers["x-router-rule"] == "forced:chooser"
    assert [(a["provider"], a["model"]) for a in here.record["attempts"]] == [("b", "other"), ("a", "fake-model")]


def test_a_hook_may_change_what_is_embedded(house: MakeHouse, foreign: Foreign, fakes: Fakes) -> None:
    vectors = {"object": "list", "model": "e", "data": [{"object": "embedding", "index": 0, "embedding": [0.5]}], "usage": {}}
    always(json_answer(vectors), fakes["a"])
    here = house(plugin("editor", foreign(hook("pre_request", "request.inputs = ['changed']"))))
    assert here.post("/v1/embeddings", {"model": "e", "input": "told"}).status == 200
    assert fakes["a"].posts[0].json()["input"] in ("changed", ["changed"])


# --- strangers that fail before there is an answer

BAD = {
    "raises": "raise RuntimeError('SECRET-PROMPT')",
    "raises with the prompt in it": "raise ValueError(request.text())",
    "leaves the program": "raise SystemExit(3)",
    "is interrupted": "raise KeyboardInterrupt",
    "ends a loop that is not its own": "raise StopIteration",
    "runs in circles": "def f(): return f()\nf()",
    "hangs": "while True: time.sleep(0.01)",
    "is busy for ever": "n = 0\nwhile True: n += 1",
}


def limit(how: str) -> float:
    """A short one only for those that use it up; the others must be found out by what they do."""
    return 0.2 if how in ("hangs", "is busy for ever") else 30


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What ends a hanging hook must reach it, and not a callback of the garbage collector that runs on its thread just then."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("where", ["on_start", "pre_request"])
@pytest.mark.parametrize("how", BAD)
def test_a_part_that_fails_fails_its_own_request_by_name(
    house: MakeHouse, foreign: Foreign, fakes: Fakes, caplog: pytest.LogCaptureFixture, how: str, where: str, streamed: bool
) -> None:
    here = house(plugin("stranger", foreign(hook(where, BAD[how])), timeout=limit(how)))
    answered = here.chat("SECRET-PROMPT", stream=streamed)
    assert answered.status == 500
    assert "stranger" in answered.error["message"]
    assert "SECRET-PROMPT" not in answered.body.decode() + caplog.text
    assert "stranger" in caplog.text, "the operator's log names it"
    assert fakes.counts() == {}
    assert (here.record["outcome"], here.record["status"]) == ("error", 500)
    no_thread_stays()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("how", BAD)
def test_a_classifier_that_fails_costs_its_tags_and_nothing_else(
    house: MakeHouse, foreign: Foreign, caplog: pytest.LogCaptureFixture, how: str, streamed: bool
) -> None:
    stranger = plugin("stranger", foreign(classifier(BAD[how])), "classifiers", timeout=limit(how))
    here = house(stranger, plugin("structure", kind="classifiers"))
    assert here.chat("SECRET-PROMPT", stream=streamed, tools=[TOOL]).status == 200
    assert here.record["tags"] == ["tools"]
    assert "stranger" in caplog.text
    assert "SECRET-PROMPT" not in caplog.text
    no_thread_stays()


def no_thread_stays() -> None:
    until(lambda: not any(thread.name == "plugin" for thread in threading.enumerate()), 10, "its thread ends")


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES])
def test_the_failure_is_told_in_the_clients_language(house: MakeHouse, foreign: Foreign, path: str) -> None:
    here = house(plugin("stranger", foreign(hook("on_start", "raise RuntimeError"))))
    answered = here.post(path, asking(path))
    assert answered.status == 500
    error = answered.json()["error"]
    assert "stranger" in error["message"]
    assert error["src"] == "router"


def test_the_default_limit_of_a_hook_is_finite(foreign: Foreign) -> None:
    import plugins

    assert 0 < plugins.SECONDS <= 30


def test_requests_beside_a_slow_one_go_on(house: MakeHouse, foreign: Foreign) -> None:
    slow = "if 'slow' in request.text():\n    began.set()\n    assert go.wait(20)"
    module = foreign(hook("pre_request", slow, "import threading\nbegan, go = threading.Event(), threading.Event()"))
    here = house(plugin("stranger", module, timeout=30))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(here.chat, "slow")
        assert sys.modules[module].began.wait(10)
        assert here.chat("quick").status == 200
        assert not waiting.done()
        sys.modules[module].go.set()
        assert waiting.result(20).status == 200


# --- strangers that return what they should not

RETURNS = ["'text'", "42", "{}", "[]", "True", "object()", "providers.Answer", "(None,)", "b'x'"]


@pytest.mark.parametrize("value", RETURNS)
@pytest.mark.parametrize("name", ["on_start", "pre_request", "post_response"])
def test_a_wrong_return_value_is_told_and_does_no_harm(
    house: MakeHouse, foreign: Foreign, caplog: pytest.LogCaptureFixture, name: str, value: str
) -> None:
    """Before the answer it may fail the request by name or pass with a warning; afterwards the answer stands."""
    caplog.set_level(logging.WARNING)
    here = house(plugin("stranger", foreign(hook(name, f"return {value}"))))
    answered = here.chat()
    if answered.status != 200:
        assert name in ("on_start", "pre_request")
        assert answered.status == 500
        assert "stranger" in answered.error["message"]
    else:
        assert text_of(CHAT, answered, False) == "hello there"
    assert "stranger" in caplog.text, "its author is told"
    assert len(here.settled(1)) == 1


TAGS = ["'abc'", "5", "[1]", "[None]", "{'a': 1}", "[['a']]", "[b'a']", "object()", "(t for t in ('a', 3))", "True", "1.5"]


@pytest.mark.parametrize("value", TAGS)
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("side", ["classifiers", "response_classifiers"])
def test_tags_that_are_none_do_no_harm(house: MakeHouse, foreign: Foreign, side: str, streamed: bool, value: str) -> None:
    make = classifier if side == "classifiers" else response_classifier
    here = house(plugin("stranger", foreign(make(f"return {value}")), side))
    assert here.chat(stream=streamed).status == 200
    (record,) = here.settled(1)
    tags = record["tags"] + ((record["response"] or {}).get("tags") or [])
    assert all(isinstance(tag, str) for tag in tags)
    assert tags in ([], ["a"]), "letters of a word are no tags"


@pytest.mark.parametrize("value", ["None", "[]", "()", "['a', 'a']", "('a',)"])
def test_tags_may_come_in_a_list_or_a_tuple_or_not_at_all(house: MakeHouse, foreign: Foreign, value: str) -> None:
    here = house(plugin("stranger", foreign(classifier(f"return {value}")), "classifiers"))
    assert here.chat().status == 200
    assert here.record["tags"] == (["a"] if "a" in value else [])


def test_tags_cannot_break_a_header(house: MakeHouse, foreign: Foreign) -> None:
    here = house(plugin("stranger", foreign(classifier("return ['a\\r\\nX-Evil: 1', 'ü', '', 'b' * 5000]")), "classifiers"))
    answered = here.chat()
    assert answered.status == 200
    assert "x-evil" not in answered.headers
    assert len(answered.headers["x-router-request-tags"]) < 4096


# --- strangers that destroy

RUINS = {
    "no messages": ("pre_request", "request.messages = None"),
    "messages of another kind": ("pre_request", "request.messages = ['hi']"),
    "a model that is none": ("pre_request", "request.model = None"),
    "a forced provider that is none": ("pre_request", "request.forced = 'a'"),
    "a forced provider nobody knows": ("pre_request", "request.forced = [('nobody', None)]"),
    "tools of another kind": ("pre_request", "request.tools = 5"),
    "a temperature in words": ("pre_request", "request.temperature = object()"),
    "no system": ("pre_request", "request.system = None"),
    "a router field of another kind": ("pre_request", "request.router = None"),
    "no text": ("post_response", "answer.text = None; answer.changed = True"),
    "a number for a text": ("post_response", "answer.text = 42; answer.changed = True"),
    "a finish in words": ("post_response", "answer.finish = 'stop'; answer.changed = True"),
    "usage of another kind": ("post_response", "answer.usage = 'none'; answer.changed = True"),
    "tags of another kind": ("post_response", "answer.tags = None"),
    "a broken answer of its own": ("pre_request", "answer = providers.Answer(); answer.choices = None; return answer"),
    "a ruined answer at the end": ("on_end", "answer.choices = None; answer.tags = 5; answer.usage = 'x'"),
    "a ruined request at the end": ("on_end", "request.messages = None; request.system = 3; request.tools = None"),
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", RUINS)
def test_a_destroyer_gets_an_error_and_a_record_and_the_next_request_is_served(
    house: MakeHouse, foreign: Foreign, name: str, streamed: bool
) -> None:
    where, how = RUINS[name]
    only_once = f"if 'ruin' in request.text():\n    {how}"
    here = house(
        plugin("stranger", foreign(hook(where, only_once))), plugin("reader", foreign(hook("pre_request", "request.user")))
    )
    answered = here.chat("ruin", stream=streamed)
    assert answered.status in (200, 400, 404, 500)
    if answered.status == 500:
        assert "src" in answered.any_error, "in the client's dialect"
    assert here.chat("all well").status == 200
    first, second = here.settled(2)
    assert second["outcome"] == "ok"
    json.dumps([first, second]), "readers can write it down"


# --- strangers that fail when there is an answer


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("how", BAD)
@pytest.mark.parametrize("where", ["post_response", "on_end", "classify_response"])
def test_after_the_answer_a_failure_is_a_warning(
    house: MakeHouse, foreign: Foreign, caplog: pytest.LogCaptureFixture, where: str, how: str
) -> None:
    source = response_classifier(BAD[how]) if where == "classify_response" else hook(where, BAD[how])
    kind = "response_classifiers" if where == "classify_response" else "plugins"
    here = house(plugin("stranger", foreign(source), kind, timeout=limit(how)))
    answered = here.chat("SECRET-PROMPT")
    assert (answered.status, text_of(CHAT, answered, False)) == (200, "hello there")
    assert here.record["outcome"] == "ok"
    assert "stranger" in caplog.text
    assert "SECRET-PROMPT" not in caplog.text
    no_thread_stays()


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("how", ["raises", "leaves the program", "hangs"])
@pytest.mark.parametrize("where", ["on_end", "classify_response"])
def test_the_same_for_streams(house: MakeHouse, foreign: Foreign, where: str, how: str) -> None:
    source = response_classifier(BAD[how]) if where == "classify_response" else hook(where, BAD[how])
    kind = "response_classifiers" if where == "classify_response" else "plugins"
    here = house(plugin("stranger", foreign(source), kind, timeout=limit(how)))
    assert sse_text(here.chat(stream=True).body) == "one two three"
    assert here.record["outcome"] == "ok"


def test_one_that_fails_does_not_keep_the_others_from_their_work(house: MakeHouse, foreign: Foreign) -> None:
    here = house(
        plugin("stranger", foreign(hook("post_response", "raise RuntimeError"))),
        plugin("other", foreign(hook("post_response", PONG))),
    )
    assert text_of(CHAT, here.chat(), False) == "pong"


# --- the start


def refused(app: MakeApp, *parts: str) -> str:
    import router

    with pytest.raises(router.ConfigError) as caught:
        app(config(provider("a"), *parts))
    line = str(caught.value)
    assert "\n" not in line
    return line


STARTS = {
    "nobody wrote it": (None, "no_such_module_anywhere"),
    "no maker": ("x = 1", "plugin(settings)"),
    "not Python": ("def plugin(:", "cannot be imported"),
    "raises when imported": ("raise RuntimeError('sk-PROVIDER-0123456789abcdef')", "imported"),
    "leaves when imported": ("raise SystemExit(0)", "imported"),
    "a setting it cannot use": ("def plugin(settings): raise ValueError('size: must be small')", "size: must be small"),
    "raises when made": ("def plugin(settings): return settings['no such key']", ""),
    "makes nothing": ("def plugin(settings): return None", ""),
    "is no maker": ("plugin = 5", ""),
}


@pytest.mark.parametrize("why", STARTS)
def test_a_part_that_cannot_be_had_is_a_start_error_with_its_place(app: MakeApp, foreign: Foreign, why: str) -> None:
    source, words = STARTS[why]
    module = foreign(source) if source else "no_such_module_anywhere"
    line = refused(app, plugin("stranger", module))
    assert re.match(r"\S*\.toml\.plugins\.stranger", line), line
    assert words in line
    assert "sk-PROVIDER" not in line


@pytest.mark.parametrize("kind", ["plugins", "classifiers", "response_classifiers"])
def test_an_unknown_part_is_a_start_error_that_names_the_known_ones(app: MakeApp, kind: str) -> None:
    line = refused(app, plugin("respons-healing", kind=kind))
    known = {"plugins": "response-healing", "classifiers": "keyword", "response_classifiers": "refusal"}[kind]
    assert f".{kind}.respons-healing" in line
    assert known in line


@pytest.mark.parametrize("id", ["web", "pdf"])
def test_the_originals_web_and_pdf_do_not_exist_here(app: MakeApp, id: str) -> None:
    line = refused(app, plugin(id))
    assert f".plugins.{id}" in line
    assert "not exist" in line
    app(config(provider("a"), plugin(id, enabled=False)))


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (plugin("response-healing", strict=True), "plugins.response-healing.strict"),
        (plugin("pareto-router"), "plugins.pareto-router.tiers"),
        (plugin("pareto-router", tiers={"fast": ["nobody"]}), "plugins.pareto-router"),
        (plugin("pareto-router", tiers={"fast": ["a"]}, default_tier="slow"), "plugins.pareto-router.default_tier"),
        (plugin("pareto-router", tiers={"fast": []}), "plugins.pareto-router.tiers"),
        (plugin("pareto-router", tiers={"fast": ["a"]}, default_teir="fast"), "plugins.pareto-router.default_teir"),
        (plugin("keyword", kind="classifiers", tags={"code": "function"}), "classifiers.keyword.tags"),
        (plugin("keyword", kind="classifiers", tagz={}), "classifiers.keyword.tagz"),
        (plugin("structure", kind="classifiers", long_chars=0), "classifiers.structure.long_chars"),
        (plugin("refusal", kind="response_classifiers", phrases="no"), "response_classifiers.refusal.phrases"),
        (table("[plugins.response-healing]", enabled="yes"), "plugins.response-healing.enabled"),
        (table("[plugins.x]", enabled=True, module=5), "plugins.x.module"),
    ],
)
def test_settings_are_checked_by_their_part(app: MakeApp, part: str, place: str) -> None:
    assert f".toml.{place}" in refused(app, part)


@pytest.mark.parametrize(
    ("part", "place"),
    [
        (plugin("response-haeling", enabled=False), "plugins.response-haeling"),
        (table("[plugins.response-haeling]"), "plugins.response-haeling"),
        (plugin("keywrd", kind="classifiers", enabled=False), "classifiers.keywrd"),
        (plugin("web", kind="classifiers", enabled=False), "classifiers.web"),
        (plugin("refusals", kind="response_classifiers", enabled=False), "response_classifiers.refusals"),
        (plugin("response-healing", enabled=False, strict=True), "plugins.response-healing.strict"),
        (plugin("keyword", kind="classifiers", enabled=False, tags={"code": "function"}), "classifiers.keyword.tags"),
        (plugin("structure", kind="classifiers", enabled=False, long_chars=0), "classifiers.structure.long_chars"),
        (plugin("pareto-router", enabled=False, default_teir="fast"), "plugins.pareto-router.default_teir"),
        (plugin("pareto-router", enabled=False, tiers={"fast": ["b"]}), "plugins.pareto-router.tiers.fast[0]"),
        (table("[plugins.x]", enabled=False, module=5), "plugins.x.module"),
    ],
)
def test_a_typo_in_a_part_that_is_off_is_a_start_error_as_well(app: MakeApp, part: str, place: str) -> None:
    assert f".toml.{place}: " in refused(app, part)


def test_an_unknown_part_is_told_with_the_one_that_was_meant(app: MakeApp) -> None:
    assert "did you mean response-healing?" in refused(app, plugin("response-haeling", enabled=False))
    assert "known are pareto-router, response-healing" in refused(app, plugin("nonsense"))


def test_a_part_that_is_off_may_leave_for_later_what_it_needs_and_is_not_loaded(app: MakeApp) -> None:
    off = [
        plugin("pareto-router", enabled=False), plugin("web", enabled=False, base_url="http://localhost:8888", max_results=5),
        plugin("pdf", enabled=False), plugin("stranger", "no.such_module", enabled=False, size=3),
    ]  # fmt: skip
    app(config(provider("a"), *off))


@pytest.mark.parametrize("limit", ["soon", -1, 0, True, [1]])
def test_a_limit_that_is_none_is_a_start_error(app: MakeApp, foreign: Foreign, limit: Any) -> None:
    module = foreign(hook("pre_request", "return None"))
    assert "plugins.stranger.timeout" in refused(app, plugin("stranger", module, timeout=limit))


def test_settings_reach_their_part_without_what_is_the_routers(house: MakeHouse, foreign: Foreign) -> None:
    module = foreign("seen = []\ndef plugin(settings):\n    seen.append(dict(settings))\n    return object()")
    here = house(plugin("stranger", module, size=3, deep={"a": [1]}))
    assert sys.modules[module].seen[-1] == {"size": 3, "deep": {"a": [1]}}
    assert here.chat().status == 200


def test_serve_refuses_to_start_in_one_line(router: RouterFactory, tmp_path: Path) -> None:
    (tmp_path / "broken_part.py").write_text("import nothing_of_that_name\n")
    process = router(
        config(provider("a"), plugin("stranger", "broken_part")), environment={"PYTHONPATH": str(tmp_path)}, start=False
    )
    process.write_config()
    process.launch()
    assert process.exit_code() == 2
    assert len(process.errors().strip().splitlines()) == 1
    assert "plugins.stranger" in process.errors()


def test_a_foreign_part_on_pythonpath_works_in_a_running_router(router: RouterFactory, fakes: Fakes, tmp_path: Path) -> None:
    """Threads and all: what hangs or leaves the program takes nothing with it."""
    source = "if 'leave' in request.text(): raise SystemExit(1)\nif 'hang' in request.text():\n    while True: time.sleep(0.01)"
    (tmp_path / "on_the_path.py").write_text(hook("pre_request", source))
    text = config(provider("a", fakes["a"]), plugin("stranger", "on_the_path", timeout=0.2))
    process: RouterProcess = router(text, environment={"PYTHONPATH": str(tmp_path)})
    assert process.chat("hi").status == 200
    before = process.resources()
    for word in ("leave", "hang") * 3:
        answered = process.chat(word)
        assert answered.status == 500, word
        assert "stranger" in answered.error["message"]
    assert process.chat("hi").status == 200
    assert [record["status"] for record in process.settled(8)].count(500) == 6
    process.comes_back_to(before)


# --- the request's own plugins

FENCED = '```json\n{"a": 1}\n```'


def healing(fakes: Fakes, text: str = FENCED) -> None:
    always(json_answer(chat_completion(text)), fakes["a"])


def test_a_request_may_turn_a_plugin_on(house: MakeHouse, fakes: Fakes) -> None:
    healing(fakes)
    here = house()
    assert text_of(CHAT, here.chat(), False) == FENCED
    assert text_of(CHAT, here.chat(plugins=[{"id": "response-healing"}]), False) == '{"a": 1}'
    assert [record["plugins"] for record in here.records] == [[], ["response-healing"]]
    assert "plugins" not in fakes["a"].posts[1].json()


def test_a_request_may_turn_a_plugin_off(house: MakeHouse, fakes: Fakes) -> None:
    healing(fakes)
    here = house(plugin("response-healing"))
    assert text_of(CHAT, here.chat(), False) == '{"a": 1}'
    assert text_of(CHAT, here.chat(plugins=[{"id": "response-healing", "enabled": False}]), False) == FENCED


def test_a_request_may_change_a_plugins_settings(house: MakeHouse, foreign: Foreign) -> None:
    source = (
        "import providers\nclass P:\n    def __init__(self, s): self.s = s\n    def pre_request(self, request):\n"
        "        a = providers.Answer(); a.text = repr(sorted(self.s.items())); return a\nplugin = P\n"
    )
    here = house(plugin("teller", foreign(source), size=1, kept=True))
    assert text_of(CHAT, here.chat(), False) == "[('kept', True), ('size', 1)]"
    asked = [{"id": "teller", "size": 2}]
    assert text_of(CHAT, here.chat(plugins=asked), False) == "[('kept', True), ('size', 2)]"
    assert text_of(CHAT, here.chat(), False) == "[('kept', True), ('size', 1)]", "only for that request"


def test_a_foreign_plugin_that_is_off_may_be_turned_on(house: MakeHouse, foreign: Foreign) -> None:
    here = house(plugin("ping", foreign(hook("on_start", PONG)), enabled=False))
    assert text_of(CHAT, here.chat(), False) == "hello there"
    assert text_of(CHAT, here.chat(plugins=[{"id": "ping"}]), False) == "pong"


@pytest.mark.parametrize("id", ["nobody", "keyword", "refusal", "web", "pdf", "", "../x", "os", "response_healing", "__init__"])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_unknown_plugin_is_a_400(house: MakeHouse, fakes: Fakes, id: str, streamed: bool) -> None:
    here = house()
    answered = here.chat(plugins=[{"id": id}], stream=streamed)
    assert (answered.status, answered.error["param"]) == (400, "plugins")
    assert fakes.counts() == {}


@pytest.mark.parametrize("plugins", ["x", {}, [1], [{}], [{"id": 1}], [["id"]], [None]])
def test_plugins_of_a_wrong_shape_are_a_400(house: MakeHouse, fakes: Fakes, plugins: Any) -> None:
    answered = house().chat(plugins=plugins)
    assert (answered.status, answered.error["param"]) == (400, "plugins")
    assert fakes.counts() == {}


def test_a_request_never_chooses_a_module(house: MakeHouse, foreign: Foreign) -> None:
    module = foreign("raise RuntimeError('imported')")
    here = house()
    assert here.chat(plugins=[{"id": "stranger", "module": module}]).status == 400
    assert here.chat(plugins=[{"id": "response-healing", "module": module}]).status in (200, 400)
    assert module not in sys.modules


@pytest.mark.parametrize("settings", [{"strict": True}, {"timeout": "soon"}, {"mode": None}])
def test_settings_a_plugin_does_not_take_are_a_400(house: MakeHouse, fakes: Fakes, settings: dict[str, Any]) -> None:
    answered = house(plugin("response-healing")).chat(plugins=[{"id": "response-healing", **settings}])
    assert (answered.status, answered.error["param"]) == (400, "plugins")
    assert fakes.counts() == {}


def test_settings_a_foreign_plugin_cannot_take_are_a_400_or_a_500_by_name(house: MakeHouse, foreign: Foreign) -> None:
    source = "class P:\n    def __init__(self, s): 1 / s.get('size', 1)\nplugin = P\n"
    answered = house(plugin("stranger", foreign(source))).chat(plugins=[{"id": "stranger", "size": 0}])
    assert answered.status in (400, 500)
    assert "stranger" in answered.error["message"]


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("limit", [3600, "soon", None])
def test_a_request_cannot_lengthen_the_limit_of_a_hook(house: MakeHouse, foreign: Foreign, limit: Any) -> None:
    """The limit is the operator's; a client that could move it would hold a thread for as long as it likes."""
    three_seconds = "end = time.monotonic() + 3\nwhile time.monotonic() < end: time.sleep(0.01)"
    here = house(plugin("stranger", foreign(hook("pre_request", three_seconds)), timeout=0.2))
    answered = here.chat(plugins=[{"id": "stranger", "timeout": limit}])
    assert answered.status in (400, 500)
    assert "stranger" in answered.error["message"]


# --- response-healing


def heal(text: str, asked: dict[str, Any] | None = None) -> str:
    """What the plugin makes of an answer."""
    import plugins
    import providers

    body = providers.Body(b'{"model": "m"}')
    request = providers.Request(format="openai", body=body, model="m", response_format=asked)
    answer = providers.Answer()
    answer.text = text
    plugins.make("plugin", "response-healing", {}).call("post_response", request, answer)
    return answer.text


HEALED: dict[str, tuple[str, Any]] = {
    "a fence": ('```json\n{"a": 1}\n```', {"a": 1}),
    "a fence without a language": ("```\n[1, 2]\n```", [1, 2]),
    "a fence in capitals": ('```JSON\n{"a": 1}\n```\n', {"a": 1}),
    "a fence with CRLF": ('```json\r\n{"a": 1}\r\n```', {"a": 1}),
    "a fence that was cut": ('```json\n{"a": [1, 2', {"a": [1, 2]}),
    "a fence without line breaks": ('```json {"a": 1} ```', {"a": 1}),
    "a fence around text with fences": ('```json\n{"a": "use ```x``` here"}\n```', {"a": "use ```x``` here"}),
    "words after it": ('{"a": 1}\n\nI hope this helps!', {"a": 1}),
    "words with brackets after it": ('{"a": 1}\n\nSee [1] and {2}.', {"a": 1}),
    "a comma at the end of an object": ('{"a": 1,}', {"a": 1}),
    "a comma at the end of a list": ("[1, 2, ]", [1, 2]),
    "commas at every end": ('{"a": [1, 2,], "b": {"c": 3,},\n}', {"a": [1, 2], "b": {"c": 3}}),
    "a comma that is text": ('{"a": "x,}",}', {"a": "x,}"}),
    "a bracket too many": ('{"a": 1}}', {"a": 1}),
    "cut brackets": ('{"a": {"b": [1, [2', {"a": {"b": [1, [2]]}}),
    "cut in a text": ('{"a": "half a sen', {"a": "half a sen"}),
    "cut in a text with quotes": ('{"a": "he said \\"no', {"a": 'he said "no'}),
    "cut after a backslash": ('{"a": "x\\', {"a": "x"}),
    "cut in an escape": ('{"a": "x\\u00', {"a": "x"}),
    "cut after a comma": ('{"a": 1, ', {"a": 1}),
    "cut after a colon": ('{"a": 1, "b":', {"a": 1, "b": None}),
    "cut in a word": ('{"a": tru', {"a": True}),
    "cut in a number": ('{"a": 12.', {"a": 12}),
    "brackets that are text": ('{"a": "]}{[",}', {"a": "]}{["}),
    "white space around it": ('  \n{"a": 1,}\n  ', {"a": 1}),
    "other characters": ('{"ä": "日本\u2028",}', {"ä": "日本\u2028"}),
}
HEALED_IF_ASKED: dict[str, tuple[str, Any]] = {
    "words around it": ('Sure, here is the JSON:\n{"a": 1}\nLet me know!', {"a": 1}),
    "words and a fence": ('Here you go:\n```json\n{"a": 1}\n```\nAnything else?', {"a": 1}),
    "words with brackets in front of it": ('The result [as you asked] is: {"a": 1}', {"a": 1}),
    "a reference in front of the object": ('As said in [1], the object is {"a": 1}', {"a": 1}),
}
UNTOUCHED = {
    "an object": '{"a": 1}',
    "an object with room": '\n {"a":  1 }\n\n',
    "a list": "[]",
    "a text that is JSON": '"just a string"',
    "a number": "42",
    "true": "true",
    "prose": "Hello, how can I help?",
    "prose with brackets": "See chapter [sic] and {x}.",
    "prose with JSON in it": 'You could send {"a": 1} to it.',
    "prose that begins with a reference": "[1] Smith, for one, says that the sky is blue.",
    "prose that begins with a note": "[Note] This is prose.",
    "prose that begins with a placeholder": "{name}, your order is ready.",
    "a program": "```python\nprint([1, 2], {'a': 1})\n```",
    "a program with JSON in it": '```python\nx = {"a": 1}\nprint(x)\n```\nThat prints it.',
    "a shell command": "```bash\ncurl -d '{\"a\": 1}' localhost\n```",
    "a diagram": "```\n+--[box]--+\n```",
    "nothing": "",
    "blanks": "  \n",
    "a lone fence": "```",
    "a lone bracket in words": "{ is a brace",
}
UNTOUCHED_IF_ASKED = {
    name: text for name, text in UNTOUCHED.items() if not name.startswith(("prose with JSON", "a program", "a shell"))
}


@pytest.mark.parametrize("asked", [None, {"type": "json_object"}], ids=["not asked", "asked"])
@pytest.mark.parametrize("name", HEALED)
def test_broken_json_is_healed(name: str, asked: dict[str, Any] | None) -> None:
    text, value = HEALED[name]
    assert json.loads(heal(text, asked)) == value


@pytest.mark.parametrize("name", HEALED_IF_ASKED)
def test_prose_around_json_goes_if_json_was_asked_for(name: str) -> None:
    text, value = HEALED_IF_ASKED[name]
    assert json.loads(heal(text, {"type": "json_object"})) == value
    assert heal(text) == text, "and only then"


@pytest.mark.parametrize("name", UNTOUCHED)
def test_what_is_no_broken_json_is_never_touched(name: str) -> None:
    assert heal(UNTOUCHED[name]) == UNTOUCHED[name]


@pytest.mark.parametrize("name", UNTOUCHED_IF_ASKED)
def test_even_if_json_was_asked_for_there_must_be_some(name: str) -> None:
    assert heal(UNTOUCHED[name], {"type": "json_schema", "name": "n", "schema": {}, "strict": True}) == UNTOUCHED[name]


STEADY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=200,
    report_multiple_bugs=False,
    suppress_health_check=list(HealthCheck),
)
scalars = st.none() | st.booleans() | st.integers(-1000, 1000) | st.floats(-1e6, 1e6) | st.text(max_size=8)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
objects = st.dictionaries(st.text(max_size=4), values, min_size=1, max_size=3) | st.lists(values, min_size=1, max_size=3)
prose = st.text(st.characters(blacklist_characters="{}[]`", blacklist_categories=["Cs"]), max_size=60)
asked_or_not = st.sampled_from([None, {"type": "json_object"}])


@given(values, st.sampled_from([None, 0, 2]), st.booleans(), asked_or_not)
@STEADY
def test_valid_json_is_never_touched(value: Any, indent: int | None, ascii: bool, asked: dict[str, Any] | None) -> None:
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    assert heal(text, asked) == text
    assert heal(f"\n {text}\n", asked) == f"\n {text}\n"


@given(prose, asked_or_not)
@STEADY
def test_plain_prose_is_never_touched(text: str, asked: dict[str, Any] | None) -> None:
    assert heal(text, asked) == text


@given(objects, st.integers(0, 200))
@STEADY
def test_json_that_broke_off_anywhere_is_json_again(value: Any, at: int) -> None:
    text = json.dumps(value)
    assume(at < len(text))
    healed = heal(text[: at + 1])
    assert type(json.loads(healed)) is type(value), text[: at + 1]


@given(objects)
@STEADY
def test_a_fence_around_valid_json_is_all_that_goes(value: Any) -> None:
    text = json.dumps(value)
    assert json.loads(heal(f"```json\n{text}\n```")) == value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "[" * 3000 + "]" * 2999, '{"a": "' + "\\" * 100_001])
def test_a_hopeless_case_takes_neither_long_nor_the_answer(text: str) -> None:
    began = time.monotonic()
    healed = heal(text)
    assert time.monotonic() - began < 5
    assert healed == text or json.loads(healed) is not None


def test_healing_on_the_wire_in_every_language(house: MakeHouse, fakes: Fakes) -> None:
    healing(fakes)
    here = house(plugin("response-healing"))
    for path in (CHAT, MESSAGES, RESPONSES):
        answered = here.post(path, asking(path))
        assert text_of(path, answered, False) == '{"a": 1}', path
    assert {record["response"]["content"] for record in here.records} == {'{"a": 1}'}


def test_an_answer_that_needs_no_healing_is_passed_on_byte_for_byte(house: MakeHouse, fakes: Fakes) -> None:
    told = b'{"index":0,"message":{"role":"assistant","content":"{\\"a\\": 1.0e0}"},"finish_reason":"stop"}'
    odd = b'{"id" : "x", "choices":[' + told + b'], "zzz": [1]}'
    always(whole(odd), fakes["a"])
    assert house(plugin("response-healing")).chat().body == odd


def test_streams_are_not_healed_and_say_so(house: MakeHouse, fakes: Fakes) -> None:
    always(stream(openai_chunks(FENCED.replace(" ", ""))), fakes["a"])
    here = house(plugin("response-healing"))
    assert sse_text(here.chat(stream=True).body) == FENCED.replace(" ", "")
    assert here.record["skipped_plugins"] == ["response-healing"]


# --- pareto-router

TIERS = {"fast": ["b", {"provider": "c", "model": "tiny"}], "good": ["c", "a"], "gone": ["left-out"]}


@pytest.fixture
def tiers(app: MakeApp, fakes: Fakes) -> Callable[..., House]:
    def make(**keys: Any) -> House:
        places = [provider(name, fakes[name]) for name in "abc"]
        places.append(provider("left-out", fakes["a"], api_key_env="UNSET_KEY"))
        told = {"tiers": TIERS, "default_tier": "good", **keys}
        return House(app(config(*places, plugin("pareto-router", **told))))

    return make


def test_a_tiers_providers_in_order_are_the_candidates(tiers: Callable[..., House], fakes: Fakes) -> None:
    here = tiers()
    answered = here.chat(plugins=[{"id": "pareto-router", "tier": "fast"}])
    assert (answered.headers["x-router-provider"], answered.headers["x-router-model"]) == ("b", "fake-model")
    assert answered.headers["x-router-rule"] == here.record["rule"] == "forced:pareto-router"
    always(error_answer(500), fakes["b"])
    answered = here.chat(plugins=[{"id": "pareto-router", "tier": "fast"}])
    assert (answered.headers["x-router-provider"], answered.headers["x-router-model"]) == ("c", "tiny")


def test_without_a_word_it_is_the_default_tier(tiers: Callable[..., House]) -> None:
    assert tiers().chat().headers["x-router-provider"] == "c"
    assert tiers(default_tier="fast").chat().headers["x-router-provider"] == "b"


def test_a_tier_never_falls_through_to_the_rules(tiers: Callable[..., House], fakes: Fakes) -> None:
    always(error_answer(500), *fakes("b c"))
    here = tiers()
    assert here.chat(plugins=[{"id": "pareto-router", "tier": "fast"}]).status == 502
    assert "a" not in fakes.counts()


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("tier", ["slow", "", "FAST", 5, ["fast"], {"fast": 1}, True])
def test_an_unknown_tier_is_a_400(tiers: Callable[..., House], fakes: Fakes, tier: Any, streamed: bool) -> None:
    answered = tiers().chat(plugins=[{"id": "pareto-router", "tier": tier}], stream=streamed)
    assert answered.status == 400
    assert answered.error["param"] == "plugins"
    assert fakes.counts() == {}


def test_an_unknown_tier_is_answered_with_the_known_ones(tiers: Callable[..., House]) -> None:
    message = tiers().chat(plugins=[{"id": "pareto-router", "tier": "slow"}]).error["message"]
    assert "slow" in message
    assert "fast" in message


def test_a_tier_of_nobody_in_service_is_no_accident(tiers: Callable[..., House], fakes: Fakes) -> None:
    answered = tiers().chat(plugins=[{"id": "pareto-router", "tier": "gone"}])
    assert answered.status in (404, 503)
    assert fakes.counts() == {}


def test_it_may_be_turned_on_by_the_request_alone(tiers: Callable[..., House]) -> None:
    here = tiers(enabled=False)
    assert here.chat().headers["x-router-provider"] == "a"
    assert here.chat(plugins=[{"id": "pareto-router", "tier": "fast"}]).headers["x-router-provider"] == "b"


# --- classifiers

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,aGk="}}
TOOL = {"type": "function", "function": {"name": "t", "parameters": {"type": "object"}}}
SHAPES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "plain": ({}, []),
    "an image": ({"messages": [{"role": "user", "content": [IMAGE]}]}, ["vision"]),
    "words about an image": ({"messages": [{"role": "user", "content": "an image"}]}, []),
    "tools": ({"tools": [TOOL]}, ["tools"]),
    "a JSON object": ({"response_format": {"type": "json_object"}}, ["json"]),
    "a JSON schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
        ["json"],
    ),
    "text, said so": ({"response_format": {"type": "text"}}, []),
    "exactly as long as may be": ({"messages": [{"role": "user", "content": "x" * 100}]}, []),
    "longer": ({"messages": [{"role": "user", "content": "x" * 101}]}, ["long"]),
    "all of it": (
        {
            "messages": [{"role": "user", "content": [IMAGE, {"type": "text", "text": "x" * 200}]}],
            "tools": [TOOL],
            "response_format": {"type": "json_object"},
        },
        ["vision", "tools", "json", "long"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_structure_tags_the_requests_shape(house: MakeHouse, name: str) -> None:
    body, tags = SHAPES[name]
    here = house(plugin("structure", kind="classifiers", long_chars=100))
    answered = here.post(CHAT, {**chat_body(), **body})
    assert here.record["tags"] == tags
    assert answered.headers.get("x-router-request-tags") == (",".join(tags) or None)


def test_long_is_over_a_hundred_thousand_unless_told_otherwise(house: MakeHouse) -> None:
    here = house(plugin("structure", kind="classifiers"))
    here.chat("x" * 100_000)
    here.chat("x" * 100_001)
    assert [record["tags"] for record in here.records] == [[], ["long"]]


@pytest.mark.parametrize(
    ("text", "tags"),
    [
        ("Debug this FUNCTION", ["code"]),
        ("two functions", ["code"]),
        ("nothing of the kind", []),
        ("ein Straßenfest", ["street"]),
        ("a.b", ["dot"]),
        ("axb", []),
        ("function and a.b", ["code", "dot"]),
    ],
)
def test_keyword_finds_words_in_any_case_and_takes_them_literally(house: MakeHouse, text: str, tags: list[str]) -> None:
    words = {"code": ["Function", "refactor"], "street": ["straße"], "dot": ["a.b"]}
    here = house(plugin("keyword", kind="classifiers", tags=words))
    here.chat(text)
    assert here.record["tags"] == tags


def test_keyword_hears_every_turn_and_every_language(house: MakeHouse) -> None:
    here = house(plugin("keyword", kind="classifiers", tags={"code": ["refactor"]}))
    here.post(MESSAGES, {"model": "m", "max_tokens": 5, "system": "refactor", "messages": [{"role": "user", "content": "hi"}]})
    here.post(RESPONSES, {"model": "m", "instructions": "be kind", "input": [{"role": "user", "content": "refactor it"}]})
    turns = [{"role": role, "content": text} for role, text in (("user", "refactor"), ("assistant", "ok"), ("user", "thanks"))]
    here.post(CHAT, {"model": "m", "messages": turns})
    assert [record["tags"] for record in here.records] == [["code"]] * 3


def test_tags_of_several_classifiers_are_joined_once_each(house: MakeHouse, foreign: Foreign) -> None:
    module = foreign(classifier("return ['tools', 'mine']"))
    here = house(plugin("structure", kind="classifiers"), plugin("stranger", module, "classifiers"))
    here.chat(tools=[TOOL])
    assert here.record["tags"] == ["tools", "mine"]
    kinds = [event["type"] for event in here.events]
    assert kinds == ["start", "classified", "routed", "complete"]
    assert here.events[1]["tags"] == ["tools", "mine"]


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but I CAN\u2019T HELP WITH THAT.", True),
        ("Sure, here's a haiku about autumn.", False),
        ("I can help with that!", False),
    ],
)
@pytest.mark.parametrize("streamed", [False, True])
def test_refusals_are_tagged(house: MakeHouse, fakes: Fakes, text: str, refused: bool, streamed: bool) -> None:
    always(stream(openai_chunks(text)) if streamed else json_answer(chat_completion(text)), fakes["a"])
    here = house(plugin("refusal", kind="response_classifiers"))
    answered = here.chat(stream=streamed)
    tags = ["refusal"] if refused else []
    assert here.record["response"]["tags"] == tags
    if not streamed:
        assert answered.headers.get("x-router-response-tags") == (",".join(tags) or None)
    assert here.record["tags"] == [], "the request's tags are another matter"


def test_phrases_of_ones_own_replace_the_usual_ones(house: MakeHouse, fakes: Fakes) -> None:
    here = house(plugin("refusal", kind="response_classifiers", phrases=["Not Going To Do that"]))
    always(json_answer(chat_completion("I'm not going to do that.")), fakes["a"])
    here.chat()
    always(json_answer(chat_completion("I can't help with that.")), fakes["a"])
    here.chat()
    assert [record["response"]["tags"] for record in here.records] == [["refusal"], []]


def test_a_refusal_in_the_providers_own_words_counts(house: MakeHouse, fakes: Fakes) -> None:
    filtered = chat_completion("")
    filtered["choices"][0]["finish_reason"] = "content_filter"
    always(json_answer(filtered), fakes["a"])
    here = house(plugin("refusal", kind="response_classifiers"))
    here.chat()
    assert here.record["response"]["tags"] == ["refusal"]


# --- the example of the README

SHOUT = Path(__file__).parent / "examples" / "shout.py"


def test_the_example_is_short_and_the_one_in_the_readme() -> None:
    source = SHOUT.read_text("utf-8")
    assert len(source.splitlines()) <= 40
    readme = ROOT / "README.md"
    if readme.exists() and "class Shout" in (text := readme.read_text("utf-8")):
        assert source.strip() in text


@pytest.fixture
def shouting(house: MakeHouse, monkeypatch: pytest.MonkeyPatch) -> House:
    monkeypatch.syspath_prepend(str(SHOUT.parent))
    return house(plugin("shout", "shout", secret="open sesame"))


def test_the_example_does_what_it_says(shouting: House, fakes: Fakes) -> None:
    assert text_of(CHAT, shouting.chat("hello"), False) == "HELLO THERE"
    assert fakes["a"].posts[0].json()["temperature"] == 0
    assert text_of(CHAT, shouting.chat("ping"), False) == "PONG"
    stopped = shouting.chat("please, open sesame")
    assert (stopped.status, "shout" in stopped.error["message"]) == (403, True)
    assert sse_text(shouting.chat("hello", stream=True).body) == "one two three"
    assert [record["skipped_plugins"] for record in shouting.records] == [[], [], [], ["shout"]]
    assert len(fakes["a"].posts) == 2


def test_the_examples_configuration_is_checked(app: MakeApp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SHOUT.parent))
    assert "plugins.shout.secret: must be a string" in refused(app, plugin("shout", "shout", secret=5))


def test_the_example_needs_nothing_but_pythonpath() -> None:
    """As an operator would check it."""
    text = config(provider("a"), plugin("shout", "shout")).replace("{port}", "8090").replace("{server}", "").replace("{log}", "x")
    command = [sys.executable, str(ROOT / "router.py"), "check", "/dev/stdin"]
    environment = {"PYTHONPATH": str(SHOUT.parent)}
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, env=environment, check=False)
    assert done.returncode == 0, done.stderr
