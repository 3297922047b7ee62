"""The JSONL log: a line for each record, whole lines only, whatever is done to the file, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import RouterFactory
from fake_upstream import FakeUpstream, chat_completion, json_answer, openai_chunks, stream
from router_process import CONFIG, SECRET_PROMPT, RouterProcess, until


def numbered(process: RouterProcess, numbers: range) -> None:
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda number: process.chat("hi", user=f"u{number}"), numbers))
    assert {answer.status for answer in answers} == {200}


def users(*logs: Path) -> list[str]:
    return [json.loads(line)["user"] for log in logs for line in log.read_bytes().splitlines()]


def test_the_log_is_off_unless_asked_for(router: RouterFactory) -> None:
    process = router(CONFIG.replace("enabled = true", "enabled = false"))
    assert process.chat().status == 200
    assert not process.log.exists()
    assert process.stats()["log"] == {"written": 0, "dropped": 0}


def test_the_folder_of_the_log_is_made(router: RouterFactory) -> None:
    process = router(CONFIG.replace('path = "{log}"', 'path = "deep/er/requests.jsonl"'))
    process.log = process.folder / "deep/er/requests.jsonl"
    process.chat()
    assert process.record()["outcome"] == "ok", "relative to where the router was started"


def test_a_line_is_written_at_once_and_appended_to_what_is_there(router: RouterFactory) -> None:
    process = router(start=False)
    process.log.write_bytes(b'{"type":"complete","old":true}\n')
    process.start()
    process.chat()
    old, new = process.records(2)
    assert old == {"type": "complete", "old": True}
    assert new["outcome"] == "ok"


def test_a_torn_line_of_an_earlier_life_does_not_spoil_the_next(router: RouterFactory) -> None:
    process = router(start=False)
    process.log.write_bytes(b'{"type":"complete","cut":"he')
    process.start()
    process.chat()
    until(lambda: len(process.lines()) == 2)
    assert json.loads(process.lines()[1])["outcome"] == "ok"


def test_lines_of_many_threads_are_never_mixed(router: RouterFactory, upstream: FakeUpstream) -> None:
    upstream.default = json_answer(chat_completion("x" * 100_000))
    process = router()
    numbered(process, range(60))
    process.settled(60)
    assert sorted(users(process.log)) == sorted(f"u{number}" for number in range(60))
    assert process.stats()["log"] == {"written": 60, "dropped": 0}


# --- without content


def test_without_content_nothing_that_was_said_is_logged(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(logging="content = false")
    call = {"id": "c", "type": "function", "function": {"name": "weather", "arguments": '{"x": "SECRET-ARGUMENT"}'}}
    answer = chat_completion("SECRET-ANSWER")
    answer["choices"][0]["message"]["tool_calls"] = [call]
    upstream.script(json_answer(answer), stream(openai_chunks("SECRET-ANSWER streamed")))
    messages = [{"role": "system", "content": SECRET_PROMPT}, {"role": "user", "content": SECRET_PROMPT}]
    body = {"model": "fake-model", "messages": messages, "user": "u-1", "trace": {"kept": 1}}
    assert process.post("/v1/chat/completions", body).status == 200
    with process.stream(SECRET_PROMPT) as reply:
        reply.read()
    whole, streamed = process.settled(2)
    assert b"SECRET" not in process.log.read_bytes()
    for record in (whole, streamed):
        assert (record["system"], record["messages"], record["response"]["content"]) == (None, [], "")
        assert record["response"]["usage"]["output_tokens"] > 0
    assert (whole["user"], whole["trace"]) == ("u-1", {"kept": 1})
    assert [(call["name"], call.get("arguments", "")) for call in whole["response"]["tool_calls"]] == [("weather", "")]


def test_without_content_errors_do_not_repeat_the_prompt(router: RouterFactory, upstream: FakeUpstream) -> None:
    process = router(logging="content = false")
    echoed = {"error": {"message": f"cannot parse {SECRET_PROMPT}", "type": "x", "param": None, "code": None}}
    upstream.script(json_answer(echoed, 400), json_answer(echoed, 500))
    assert SECRET_PROMPT in process.chat(SECRET_PROMPT).upstream_error["message"], "to the client who sent it"
    process.chat(SECRET_PROMPT)
    process.settled(2)
    assert SECRET_PROMPT.encode() not in process.log.read_bytes()


# --- rotation


def test_renaming_loses_no_line(router: RouterFactory) -> None:
    process = router()
    rotated = process.folder / "requests.jsonl.1"
    numbered(process, range(20))
    process.log.rename(rotated)
    numbered(process, range(20, 40))
    until(lambda: process.stats()["log"]["written"] == 40)
    time.sleep(1.1)  # the path is looked at again at most once a second
    numbered(process, range(40, 60))
    until(lambda: process.stats()["log"]["written"] == 60)
    assert sorted(users(rotated, process.log)) == sorted(f"u{number}" for number in range(60))
    assert len(users(process.log)) >= 20
    assert open_logs(process) == 1


def test_copytruncate_loses_no_line_and_leaves_no_hole(router: RouterFactory) -> None:
    process = router()
    copied = process.folder / "requests.jsonl.1"
    numbered(process, range(20))
    process.settled(20)
    shutil.copy(process.log, copied)
    os.truncate(process.log, 0)
    numbered(process, range(20, 40))
    until(lambda: process.stats()["log"]["written"] == 40)
    assert b"\0" not in process.log.read_bytes()
    assert sorted(users(copied, process.log)) == sorted(f"u{number}" for number in range(40))


def test_a_deleted_log_is_made_again(router: RouterFactory) -> None:
    process = router()
    process.chat()
    process.settled(1)
    process.log.unlink()
    time.sleep(1.1)  # the path is looked at again at most once a second
    numbered(process, range(5))
    until(lambda: process.log.exists() and len(process.lines()) == 5)
    assert open_logs(process) == 1


def test_rotation_under_fire_loses_nothing(router: RouterFactory) -> None:
    process = router()
    logs = [process.folder / f"requests.jsonl.{number}" for number in range(4)]
    done = threading.Event()

    def rotate() -> None:
        for log in logs:
            if done.wait(0.7):
                return
            if process.log.exists():
                process.log.rename(log)

    rotating = threading.Thread(target=rotate)
    rotating.start()
    sent = 0
    while rotating.is_alive():
        numbered(process, range(sent, sent + 10))
        sent += 10
    done.set()
    rotating.join()
    until(lambda: process.stats()["log"]["written"] == sent)
    there = [log for log in [*logs, process.log] if log.exists()]
    assert sorted(users(*there)) == sorted(f"u{number}" for number in range(sent))
    assert len(there) >= 3
    assert open_logs(process) <= 1


def open_logs(process: RouterProcess) -> int:
    links = [link for link in Path(f"/proc/{process.pid}/fd").iterdir() if link.is_symlink()]
    return sum("requests.jsonl" in str(link.readlink()) for link in links)


# --- a disk that does not take it


def broken_log(process: RouterProcess, requests: int) -> dict[str, Any]:
    for _ in range(requests):
        assert process.chat(SECRET_PROMPT).status == 200
    until(lambda: process.stats()["log"]["dropped"] == requests, 5, "every lost line is counted")
    stats = process.stats()
    assert stats["requests"]["ok"] == requests
    warnings = [line for line in process.errors().splitlines() if "WARNING" in line]
    assert len(warnings) == 1, "one warning a minute"
    return stats


def test_a_full_disk_is_counted_and_warned_of_once_and_nobody_waits(router: RouterFactory) -> None:
    process = router(CONFIG.replace("{log}", "/dev/full"))
    stats = broken_log(process, 10)
    assert stats["log"]["written"] == 0


def test_a_folder_that_cannot_be_written_is_the_same(router: RouterFactory) -> None:
    process = router(CONFIG.replace("{log}", "/proc/nowhere/requests.jsonl"), start=False)
    process.start()
    broken_log(process, 3)


def test_a_folder_in_place_of_the_log_is_the_same(router: RouterFactory) -> None:
    process = router(start=False)
    process.log.mkdir()
    process.start()
    broken_log(process, 3)
    process.log.rmdir()
    time.sleep(1.1)  # the path is looked at again at most once a second
    process.chat()
    until(lambda: process.log.is_file() and len(process.lines()) == 1, 10, "resumed by itself")


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(place)], capture_output=True).returncode:
        pytest.skip("may not mount a tmpfs here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_and_is_emptied_holds_only_whole_lines(
    router: RouterFactory, upstream: FakeUpstream, small_disk: Path
) -> None:
    upstream.default = json_answer(chat_completion("x" * 5000))
    process = router(log=str(small_disk / "requests.jsonl"))
    process.log = small_disk / "requests.jsonl"
    until(lambda: process.chat().status == 200 and process.stats()["log"]["dropped"] > 2, 20)
    full = process.stats()["log"]
    shutil.copy(process.log, process.folder / "kept.jsonl")
    os.truncate(process.log, 0)
    process.chat("after")
    until(lambda: process.stats()["log"]["written"] > full["written"], 10, "resumed")
    good, torn = [], []
    for line in (process.folder / "kept.jsonl").read_bytes().split(b"\n") + process.log.read_bytes().split(b"\n"):
        try:
            good += [json.loads(line)] if line else []
        except ValueError:
            torn.append(line)
    assert len(torn) <= 1, "one fragment may stand on a line of its own"
    assert good[-1]["messages"][0]["content"][0]["text"] == "after"
    counts = process.stats()["log"]
    assert len(good) == counts["written"]
    assert counts["written"] + counts["dropped"] == process.stats()["requests"]["accepted"]


def test_a_pipe_nobody_reads_does_not_hold_up_requests(router: RouterFactory) -> None:
    process = router(start=False)
    os.mkfifo(process.log)
    process.start()
    process.log = process.folder / "none"
    for _ in range(3):
        assert process.chat(timeout=5).status == 200
    assert process.stop() == 0


# --- rooms that are off


def test_the_process_prints_no_request(router: RouterFactory) -> None:
    process = router()
    process.chat(SECRET_PROMPT)
    process.post("/v1/chat/completions", {"model": SECRET_PROMPT})
    process.settled(1)
    assert process.stop() == 0
    assert SECRET_PROMPT not in process.output()
