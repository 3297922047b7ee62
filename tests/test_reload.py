"""SIGHUP: the file is read again, checked whole, and swapped in at once - or the old one stays and the log says why.

Whatever happens to the file, requests that are running finish as they began.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import RouterFactory
from deciding import Fakes, always, config, fake_providers, provider, rule, table
from fake_upstream import chat_completion, chunks, end, error_answer, hold, json_answer, openai_chunks, stream_head
from router_process import INBOUND_KEY, RouterProcess, until

EVENTS = openai_chunks("one two three")
OK = json_answer(chat_completion("fine"))


@pytest.fixture
def fakes() -> Iterator[Fakes]:
    with fake_providers() as made:
        yield made


def reload(process: RouterProcess, text: str, says: str) -> None:
    """Another file, the signal, and the line in the log that tells what became of it."""
    before = process.errors().count("\n")
    process.write_config(text)
    process.signal(signal.SIGHUP)
    until(lambda: says in "\n".join(process.errors().split("\n")[before:]), 10, says)


def taken(process: RouterProcess, text: str) -> None:
    reload(process, text, "read again")


def provider_of(process: RouterProcess) -> str:
    return process.chat().headers["x-router-provider"]


@pytest.fixture
def running(router: RouterFactory, fakes: Fakes) -> Callable[..., RouterProcess]:
    return lambda *parts, **more: router(config(provider("a", fakes["a"]), *parts), **more)


def test_a_stream_outlives_its_provider(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running()
    go = threading.Event()
    fakes["a"].script(stream_head() + chunks(EVENTS[:2]) + hold(go) + chunks(EVENTS[2:]) + end())
    with process.stream() as reply:
        first = reply.next()
        taken(process, config(provider("b", fakes["b"])))
        assert provider_of(process) == "b"
        assert list(process.stats()["providers"]) == ["b"]
        go.set()
        assert first + reply.read() == b"".join(EVENTS)
    records = process.settled(2)
    assert [(record["provider"], record["outcome"]) for record in sorted(records, key=lambda r: r["id"])] == [
        ("a", "ok"), ("b", "ok"),
    ]  # fmt: skip


def test_a_running_request_goes_on_by_the_plan_it_began_with(router: RouterFactory, fakes: Fakes) -> None:
    """Its first provider fails after the reload; the second one, which is gone by then, still answers."""
    process = router(config(provider("a", fakes["a"], quality=9), provider("b", fakes["b"])))
    go = threading.Event()
    fakes["a"].script(hold(go) + error_answer(503))
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(process.chat)
        fakes["a"].wait_for(1)
        taken(process, config(provider("a", fakes["a"]), rule("fallback", name="new"), attempts=1))
        go.set()
        answered = waiting.result(15)
    assert answered.status == 200, answered
    assert (answered.headers["x-router-provider"], answered.headers["x-router-rule"]) == ("b", "0:fallback")
    assert process.chat().headers["x-router-rule"] == "new"
    always(error_answer(503), fakes["a"])
    asked = len(fakes["a"].posts)
    assert process.chat().status == 502
    assert len(fakes["a"].posts) == asked + 1, "attempts = 1 counts now"


BROKEN = {
    "not TOML": ("[server\n", "config.toml: is not TOML"),
    "nothing": ("# nothing\n", "config.toml.providers"),
    "an unknown key": (config(provider("a"), "[retrys]\nattempts = 1"), "config.toml.retrys"),
    "a rule for nobody": (config(provider("a"), rule("prefix", model_prefix="x", provider="bb")), "config.toml.routers[0]"),
    "a variable that is not set": (config(provider("a", headers={"X-Key": "${UNSET}"})), "config.toml.providers[0].headers"),
    "nobody with a key": (config(provider("a", "http://127.0.0.1:9", api_key_env="UNSET")), "config.toml.providers"),
    "an inbound key that is not set": (
        config(provider("a"), table("[[api_keys]]", name="x", key_env="UNSET")),
        "config.toml.api_keys[0].key_env",
    ),
    "a plugin that is none": (config(provider("a"), "[plugins.nobody]\nenabled = true"), "config.toml.plugins.nobody"),
    "a price that is none": (config(provider("a", cost_per_1m_tokens=-1)), "config.toml.providers[0]"),
    "web search": (config(provider("a"), "[plugins.web]\nenabled = true"), "config.toml.plugins.web"),
}


def test_a_broken_file_changes_nothing_and_is_named(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running(rule("fallback", name="old"))
    go = threading.Event()
    fakes["a"].script(stream_head() + chunks(EVENTS[:2]) + hold(go, 60) + chunks(EVENTS[2:]) + end())
    with process.stream() as reply:
        first = reply.next()
        for name, (text, place) in BROKEN.items():
            reload(process, text, place)
            answered = process.chat()
            assert (answered.status, answered.headers["x-router-rule"]) == (200, "old"), name
        process.config.unlink()
        process.signal(signal.SIGHUP)
        until(lambda: "cannot be read" in process.errors(), 10, "a missing file is named")
        process.config.write_bytes(b"\xff\xfe\x00")
        process.signal(signal.SIGHUP)
        until(lambda: "is not UTF-8" in process.errors(), 10, "so is one that is no text")
        go.set()
        assert first + reply.read() == b"".join(EVENTS), "the stream noticed nothing"
    assert "Traceback" not in process.errors()
    assert process.errors().count("stays as it was") == len(BROKEN) + 2
    taken(process, config(provider("b", fakes["b"]), rule("fallback", name="new")))
    assert process.chat().headers["x-router-rule"] == "new", "a good one is taken after all of these"
    process.settled(len(BROKEN) + 2)


def test_a_provider_that_did_not_change_keeps_what_is_known_of_it(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running()
    always(error_answer(500), fakes["a"])
    same = config(provider("a", fakes["a"]), attempts=1, failures=2, cooldown=600)
    taken(process, same)
    for _ in range(2):
        process.chat()
    assert process.stats()["providers"]["a"]["breaker"] == "open"
    counted = process.stats()["providers"]["a"]
    taken(process, same.replace("[[routers]]", "[[routers]]\nname = 'again'"))
    assert process.stats()["providers"]["a"] == counted
    assert process.chat().status == 503, "it still rests"
    always(OK, fakes["a"])
    taken(process, config(provider("a", fakes["a"], quality=1), attempts=1, failures=2, cooldown=600))
    assert process.chat().status == 200, "one that did change begins anew"


def test_keys_that_are_gone_open_nothing_and_new_ones_do(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    environment = {"OLD": "key-old-0123456789", "NEW": "key-new-0123456789", "SHARED": INBOUND_KEY}
    process = running(table("[[api_keys]]", name="old", key_env="OLD"), environment=environment)
    headers = {name: {"X-Api-Key": key} for name, key in environment.items()}
    assert [process.chat(headers=headers[name]).status for name in ("OLD", "NEW")] == [200, 401]
    taken(process, config(provider("a", fakes["a"]), table("[[api_keys]]", name="new", key_env="NEW")))
    assert [process.chat(headers=headers[name]).status for name in ("OLD", "NEW")] == [401, 200]
    assert [record["api_key_name"] for record in process.records(2)] == ["old", "new"]


@pytest.mark.parametrize("host", ["0.0.0.0", "127.0.0.1"])
def test_a_reload_never_opens_a_door_that_was_locked(router: RouterFactory, fakes: Fakes, host: str) -> None:
    text = config(provider("a", fakes["a"]))
    process = router(text, server=f'host = "{host}"\napi_key_env = "KEY"', environment={"KEY": INBOUND_KEY}, start=False)
    process.key = INBOUND_KEY
    process.start()
    process.write_config(text, server="")
    process.signal(signal.SIGHUP)
    until(lambda: "[server] has changed, which counts only after a restart" in process.errors())
    assert process.get("/v1/models", {"Authorization": ""}).status == 401
    assert process.get("/v1/models").status == 200


def test_the_last_named_key_is_only_taken_away_by_a_restart(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running(table("[[api_keys]]", name="only", key_env="ONLY"), environment={"ONLY": INBOUND_KEY}, start=False)
    process.key = INBOUND_KEY
    process.start()
    reload(process, config(provider("a", fakes["a"])), "no key would be left")
    assert process.get("/v1/models", {"Authorization": ""}).status == 401


def test_the_session_of_a_key_that_is_gone_is_gone_with_it(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    environment = {"OLD": "key-old-0123456789", "NEW": INBOUND_KEY}
    old, new = (table("[[api_keys]]", name=name.lower(), key_env=name) for name in environment)
    process = running(old, new, environment=environment, server="dashboard = true", start=False)
    process.key = INBOUND_KEY
    process.start()
    signed_in = process.post("/dashboard/session", {"key": environment["OLD"]}, {"Authorization": ""})
    cookie = {"Cookie": signed_in.headers["set-cookie"].partition(";")[0], "Authorization": ""}
    assert process.get("/api/v1/stats", cookie).status == 200
    taken(process, config(provider("a", fakes["a"]), new))
    assert process.get("/api/v1/stats", cookie).status == 401


def test_classifiers_plugins_and_prices_change_too(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running()
    always(json_answer(chat_completion('{"a": 1,}')), fakes["a"])
    process.chat("please refactor")
    parts = [
        provider("a", fakes["a"], cost_per_1m_tokens=5),
        "[plugins.response-healing]\nenabled = true",
        "[classifiers.keyword]\nenabled = true\n" + table("[classifiers.keyword.tags]", code=["refactor"]),
    ]
    taken(process, config(*parts))
    answered = process.chat("please refactor")
    assert answered.json()["choices"][0]["message"]["content"] == '{"a": 1}'
    before, after = process.settled(2)
    assert (before["tags"], before["plugins"], before["cost"]["total"]) == ([], [], 0)
    assert (after["tags"], after["plugins"]) == (["code"], ["response-healing"])
    assert after["cost"]["total"] > 0


def test_a_provider_whose_key_has_come_is_in_service(router: RouterFactory, fakes: Fakes) -> None:
    """The environment is the process's own and stays; the file may name another variable."""
    text = config(provider("a", fakes["a"]), provider("b", fakes["b"], api_key_env="MISSING", quality=9))
    process = router(text, environment={"THERE": "sk-PROVIDER-0123456789abcdef"})
    assert provider_of(process) == "a"
    taken(process, text.replace("MISSING", "THERE"))
    assert provider_of(process) == "b"
    assert fakes["b"].posts[0].header("Authorization") == "Bearer sk-PROVIDER-0123456789abcdef"


def test_what_only_a_restart_can_change_is_told(running: Callable[..., RouterProcess], fakes: Fakes) -> None:
    process = running()
    reload(process, config(provider("a", fakes["a"]), threads=9), "[server]")
    assert "restart" in process.errors()
    assert process.chat().status == 200


def test_many_reloads_under_load_disturb_nobody_and_leave_nothing(router: RouterFactory, fakes: Fakes) -> None:
    texts = [
        config(provider("a", fakes["a"]), provider("b", fakes["b"], quality=quality), rule("fallback"), threads=16)
        for quality in (1, 2)
    ]
    process = router(texts[0])
    for _ in range(3):
        process.chat()
    before = process.resources()
    stop = threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(process.chat().status)

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask) for _ in range(4)]
        try:
            for number in range(20):
                process.write_config(texts[number % 2])
                process.signal(signal.SIGHUP)
                until(lambda n=number: process.errors().count("read again") > 0 and len(statuses) > 4 * n, 10)  # type: ignore[misc]
        finally:
            stop.set()
        for one in asking:
            one.result(15)
    assert set(statuses) == {200}
    process.settled(len(statuses) + 3)
    process.comes_back_to(before)
