"""The page as people use it, in a real browser, on a running router."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import dashboard_browser
import pytest
from fake_collector import OK, FakeCollector, Reply
from router_process import RouterProcess, until

pytestmark = [
    pytest.mark.skipif(bool(dashboard_browser.missing()), reason=dashboard_browser.missing() or "there is a browser"),
    pytest.mark.xdist_group("browser"),
]
KEY = "sk-page-0123456789abcdef"
CONFIG = """
[server]
port = {port}
dashboard = true
{server}

[broadcast]
database = "{tmp}/state/broadcast.db"
{broadcast}

[retry]
attempts = 1

[[providers]]
name = "echo"
format = "echo"
input_cost_per_1m_tokens = 3.0
output_cost_per_1m_tokens = 15.0

[[providers]]
name = "second"
format = "echo"

[[routers]]
name = "by name"
type = "prefix"
model_prefix = "second/"
provider = "second"

[[routers]]
type = "fallback"
providers = ["echo"]

[classifiers.keyword]
enabled = true
[classifiers.keyword.tags]
code = ["python"]
"""
HOSTILE = "<img src=x onerror=alert(1)>'\"`</script><script>alert(2)</script>\u2028{{7*7}}javascript:alert(3)"


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with dashboard_browser.browser() as started:
        yield started


@pytest.fixture
def page_router(router) -> Callable[..., RouterProcess]:
    def start(**values: str) -> RouterProcess:
        return router(CONFIG, **{"server": "", "broadcast": "", **values})

    return start


@pytest.fixture
def visit(chromium) -> Iterator[Callable[..., dashboard_browser.Visit]]:
    """`visit(router)` is a page in a context of its own, which is checked at the end."""
    made: list[dashboard_browser.Visit] = []

    def open(router: RouterProcess, **context: Any) -> dashboard_browser.Visit:
        made.append(dashboard_browser.Visit(chromium, f"http://127.0.0.1:{router.port}{router.prefix}", **context))
        return made[-1]

    yield open
    try:
        for visited in made:
            visited.check()
    finally:
        for visited in made:
            visited.close()


def chat(router: RouterProcess, text: str, model: str = "echo", **more: Any) -> Any:
    return router.post("/v1/chat/completions", {"model": model, "messages": [{"role": "user", "content": text}], **more})


def hear_out(router: RouterProcess, text: str, **more: Any) -> None:
    stream = router.stream(text, model="echo", **more)
    stream.read()
    stream.close()


def expect(locator: Any) -> Any:
    from playwright.sync_api import expect as of

    return of(locator)


# The walk through the requests


def test_a_request_is_seen_from_its_start_to_its_end(page_router, visit):
    router = page_router()
    page = visit(router).open()
    expect(page.get_by_role("heading", name="No requests yet")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("Live")

    stream = router.stream("tell me [[echo delay=0.3 gap=0.1 words=20]]", model="echo")
    card = page.locator("#running .card")
    expect(card).to_contain_text("waiting for the answer")
    expect(card.locator(".track .past")).to_have_count(3)
    expect(page.locator("#running-count")).to_have_text("1")
    stream.read()
    stream.close()
    done = page.locator("#finished .card")
    expect(done).to_contain_text("ok")
    expect(done).to_contain_text("→ 20 tokens")
    expect(done).to_contain_text(re.compile(r"first token \d+ ms"))
    expect(done.locator(".track .past")).to_have_count(4)
    expect(page.locator("#running .card")).to_have_count(0)
    expect(page.get_by_role("heading", name="No requests yet")).to_be_hidden()


def test_every_outcome_has_its_card(page_router, visit):
    router = page_router()
    page = visit(router).open()
    chat(router, "hello")
    hear_out(router, "stream this")
    chat(router, "fail [[echo status=500]]")
    leaving = router.stream("leave [[echo gap=0.2 words=100]]", model="echo")
    expect(page.locator("#running .card")).to_have_count(1)
    leaving.close()
    expect(page.locator("#finished .card")).to_have_count(4)
    outcomes = page.locator("#finished .card .outcome").all_text_contents()
    assert outcomes == ["cancelled", "error", "ok", "ok"]
    expect(page.locator("#feed-count")).to_have_text("4 requests")


def test_a_chosen_request_shows_the_waterfall_of_its_spans_with_their_lengths(page_router, visit):
    router = page_router()
    page = visit(router).open()
    hear_out(router, "tell me [[echo delay=0.3 gap=0.02 words=20]]", user="anna", session_id="s-1")
    page.locator("#finished .card").click()
    expect(page.locator("#detail-title")).to_have_text("echo")
    expect(page.locator(".span")).to_have_count(5)

    record_id = router.get("/api/v1/dashboard/requests").json()["requests"][0]["id"]
    told = router.get(f"/api/v1/dashboard/requests/{record_id}").json()
    assert re.search(rf"#request-{record_id}$", page.url)
    total = told["record"]["duration_ms"]
    lane = page.locator(".span .lane").first.bounding_box()
    shown = dict(zip(page.locator(".span-name").all_text_contents(), page.locator(".span .bar").all(), strict=True))
    assert set(shown) == {"request", "dispatch_stream", "provider.send", "provider.http", "dispatch_stream.body"}
    for span in told["spans"]:
        bar = shown[span["name"]].bounding_box()
        assert bar["width"] == pytest.approx(lane["width"] * span["duration_ms"] / total, abs=3), span["name"]
        assert bar["x"] - lane["x"] == pytest.approx(lane["width"] * span["offset_ms"] / total, abs=3), span["name"]
    assert shown["dispatch_stream"].bounding_box()["width"] > lane["width"] * 0.25

    span = page.get_by_role("button", name=re.compile("^provider.send "))
    span.click()
    expect(span).to_have_attribute("aria-expanded", "true")
    expect(page.locator(".spans .attributes")).to_contain_text("gen_ai.request.model")
    span.click()
    expect(page.locator(".spans .attributes")).to_have_count(0)

    detail = page.locator("#detail")
    for text in ("anna", "s-1", "1:fallback", "POST /v1/chat/completions", "first token", "word20", "$0.000"):
        expect(detail).to_contain_text(text)
    page.get_by_text("Headers of the answer").click()
    expect(detail).to_contain_text("X-Router-Provider")


def test_a_failed_request_tells_why_and_which_attempt_failed(page_router, visit):
    router = page_router()
    page = visit(router).open()
    chat(router, "fail [[echo status=500]]")
    page.locator("#finished .card").click()
    expect(page.locator("#detail .notice")).to_contain_text("the provider failed (500)")
    expect(page.locator(".bar.error")).to_have_count(4)
    expect(page.locator("tr.why")).to_contain_text("upstream_500")


def test_the_address_leads_to_a_request_and_going_back_leads_out_of_it(page_router, visit):
    router = page_router()
    chat(router, "first")
    chat(router, "second")
    ids = [request["id"] for request in router.get("/api/v1/dashboard/requests").json()["requests"]]
    page = visit(router).open(f"/dashboard#request-{ids[1]}")
    expect(page.locator("#detail")).to_contain_text("first")
    page.locator(f'[data-id="{ids[0]}"]').click()
    expect(page.locator("#detail .turn.is-user")).to_contain_text("second")
    page.go_back()
    expect(page.locator("#detail .turn.is-user")).to_contain_text("first")
    page.get_by_role("button", name="Back").click()
    expect(page.locator("#overview")).to_be_visible()
    assert "#" not in page.url


def test_a_request_that_is_no_longer_held_says_so(page_router, visit):
    router = page_router()
    looked = visit(router)
    looked.expected = ("404",)
    page = looked.open("/dashboard#request-99")
    expect(page.locator("#detail")).to_contain_text("no longer held")


def test_filters_narrow_the_list_and_say_how_much_is_left(page_router, visit):
    router = page_router()
    chat(router, "write python code")
    chat(router, "a poem about rivers", model="second/poet")
    chat(router, "fail [[echo status=500]]")
    page = visit(router).open()
    cards = page.locator("#finished .card")
    expect(cards).to_have_count(3)
    filters = page.locator("#filters")

    filters.locator("[name=provider]").select_option("second")
    expect(cards).to_have_count(1)
    expect(page.locator("#feed-count")).to_have_text("1 of 3 requests")
    page.get_by_role("button", name="Clear filters").click()
    expect(cards).to_have_count(3)
    filters.locator("[name=outcome]").select_option("error")
    expect(cards).to_contain_text("fail")
    page.get_by_role("button", name="Clear filters").click()
    filters.locator("[name=tag]").select_option("code")
    expect(cards).to_contain_text("python")
    page.get_by_role("button", name="Clear filters").click()
    filters.locator("[name=model]").select_option("second/poet")
    expect(cards).to_contain_text("poem")
    page.get_by_role("button", name="Clear filters").click()
    filters.locator("[name=text]").fill("RIVERS")
    expect(cards).to_have_count(1)
    chat(router, "more rivers, many")
    expect(cards).to_have_count(2)
    chat(router, "but no mountains")
    expect(page.locator("#feed-count")).to_have_text("2 of 5 requests")
    filters.locator("[name=text]").fill("nothing like that")
    expect(page.get_by_role("heading", name="Nothing matches")).to_be_visible()


def test_a_paused_list_stands_still_until_it_is_resumed(page_router, visit):
    router = page_router()
    page = visit(router).open()
    chat(router, "one")
    expect(page.locator("#finished .card")).to_have_count(1)
    page.get_by_role("button", name="Pause").click()
    chat(router, "two")
    expect(page.locator("#pause")).to_have_text("Resume (1 new)")
    expect(page.locator("#finished .card")).to_have_count(1)
    page.locator("#pause").click()
    expect(page.locator("#finished .card")).to_have_count(2)


def test_the_keyboard_reaches_everything_in_the_feed(page_router, visit):
    router = page_router()
    for text in ("one", "two", "three"):
        chat(router, text)
    page = visit(router).open()
    expect(page.locator(".card")).to_have_count(3)
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    page.locator("#filters [name=tag]").focus()
    page.keyboard.press("Tab")
    cards = page.locator(".card")
    expect(cards.nth(0)).to_be_focused()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    expect(cards.nth(2)).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(cards.nth(1)).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("#detail-title")).to_be_focused()
    page.locator(".span").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(".spans .attributes")).to_have_count(1)
    page.keyboard.press("Escape")
    expect(page.locator("#overview")).to_be_visible()
    expect(cards.nth(1)).to_be_focused()


def test_focus_stays_on_a_card_that_moves_when_it_finishes(page_router, visit):
    router = page_router()
    page = visit(router).open()
    stream = router.stream("slow [[echo gap=0.1 words=20]]", model="echo")
    card = page.locator("#running .card")
    card.focus()
    stream.read()
    stream.close()
    expect(page.locator("#finished .card")).to_be_focused()


# The overview


def test_the_overview_counts_what_was_asked_and_tells_providers_apart(page_router, visit):
    router = page_router()
    for _ in range(3):
        chat(router, "hello there")
    chat(router, "fail [[echo status=500]]")
    chat(router, "hi", model="second/x")
    page = visit(router).open()
    expect(page.locator("#tiles")).to_contain_text("5 in the last 5 min")
    expect(page.locator("#tiles")).to_contain_text("20 %")
    row = page.locator("#providers tr", has_text="echo")
    expect(row).to_contain_text("healthy")
    expect(row.locator("td").nth(1)).to_have_text("4")
    expect(page.locator("figure.chart")).to_have_count(5)
    shapes = page.locator("figure.chart svg :is(path.line, circle.dot, rect.bar)")
    expect(shapes.nth(3)).to_be_attached()  # three percentiles, and the cost
    page.locator("#group").select_option("provider:second")
    expect(page.locator("#tiles")).to_contain_text("1 in the last 5 min")
    page.get_by_text("24 h", exact=True).click()
    expect(page.locator("#tiles")).to_contain_text("1 in the last 24 h")
    page.locator("figure.chart").first.get_by_text("Table").click()
    expect(page.locator("figure.chart table").first).to_contain_text("all")


def test_a_provider_that_rests_is_shown_as_resting(page_router, visit):
    router = page_router(server="", broadcast="[breaker]\nfailures = 2\ncooldown_seconds = 300")
    for _ in range(3):
        chat(router, "fail [[echo status=500]]")
    page = visit(router).open()
    expect(page.locator("#providers tr", has_text="echo").locator(".state")).to_have_text("resting")
    expect(page.locator("#providers tr", has_text="second").locator(".state")).to_have_text("healthy")


# The connection


def test_a_page_comes_back_after_the_router_was_started_anew(page_router, visit):
    router = page_router()
    chat(router, "before")
    looked = visit(router)
    looked.expected = ("ERR_CONNECTION", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE")
    page = looked.open()
    expect(page.locator("#finished .card")).to_contain_text("before")
    router.stop()
    expect(page.locator("#connection")).to_contain_text("Connection lost")
    router.launch()
    until(lambda: _answers(router), 10, "the router is back")
    expect(page.locator("#connection")).to_have_text("Live", timeout=15_000)
    chat(router, "after")
    expect(page.locator("#finished .card")).to_have_count(1)
    expect(page.locator("#finished .card")).to_contain_text("after")


def _answers(router: RouterProcess) -> bool:
    try:
        return bool(router.get("/health").status == 200)
    except OSError:
        return False


def test_one_watcher_too_many_is_told_so_and_gets_the_next_free_place(page_router, visit):
    router = page_router(server="max_watchers = 1")
    first = visit(router)
    expect(first.open().locator("#connection")).to_have_text("Live")
    second = visit(router)
    second.expected = ("503",)
    page = second.open()
    expect(page.locator("#connection")).to_contain_text("All places for watchers are taken")
    chat(router, "hello")
    first.page.goto("about:blank")
    expect(page.locator("#connection")).to_have_text("Live", timeout=20_000)
    expect(page.locator("#finished .card")).to_have_count(1)
    first.open()


# Broadcast


def test_a_destination_is_added_corrected_saved_and_counted(page_router, visit):
    router = page_router()
    with FakeCollector(Reply(status=401, body=b"SECRET-BODY")) as receiver:
        looked = visit(router)
        looked.expected = ("422",)
        page = looked.open("/dashboard/observability")
        expect(page.get_by_role("heading", name="No destinations yet")).to_be_visible()
        page.get_by_role("switch", name="Enable Broadcast").check()
        expect(page.get_by_text("Broadcast is on.")).to_be_visible()
        page.get_by_role("button", name="Add a destination").click()
        for name in (
            "OpenTelemetry Collector",
            "Grafana Cloud",
            "Axiom",
            "Jaeger",
            "Grafana Tempo",
            "Honeycomb",
            "Lightstep",
            "Webhook",
        ):
            expect(page.get_by_role("button", name=name)).to_be_visible()
        expect(page.locator(".types .only")).to_contain_text("config.toml")

        page.get_by_role("button", name="OpenTelemetry Collector").click()
        expect(page.get_by_role("heading", name="New destination")).to_be_focused()
        save, test = page.get_by_role("button", name="Save"), page.get_by_role("button", name="Test connection")
        expect(save).to_be_disabled()
        page.get_by_label("Name", exact=True).fill("My collector")
        page.get_by_label("Endpoint").fill(receiver.url)
        page.get_by_role("button", name="Add a header").click()
        page.get_by_label("Header name").fill("Authorization")
        page.get_by_label("Header value").fill("Bearer wrong-token-0123456789")
        test.click()
        result = page.locator("form .notice")
        expect(result).to_contain_text("failed (status 401")
        expect(result).to_contain_text("The key is missing or wrong")
        expect(page.locator("body")).not_to_contain_text("SECRET-BODY")
        expect(save).to_be_disabled()

        receiver.script(OK)
        page.get_by_label("Header value").fill("Bearer right-token-0123456789")
        test.click()
        expect(result).to_contain_text("The connection works")
        expect(save).to_be_enabled()
        page.get_by_label("Name", exact=True).fill("Another name")
        expect(save).to_be_disabled()
        expect(page.locator("#save-hint")).to_contain_text("test again")
        page.get_by_label("Name", exact=True).fill("My collector")
        expect(save).to_be_enabled()
        save.click()
        expect(page.get_by_text("My collector is saved.")).to_be_visible()

        card = page.get_by_role("article", name="My collector")
        expect(card).to_contain_text("waiting for requests")
        chat(router, "count me")
        expect(card.locator(".counters div", has_text="Delivered").locator("dd")).to_have_text("1")
        expect(card).to_contain_text("delivering")
        assert receiver.received[-1].headers["authorization"] == "Bearer right-token-0123456789"

        card.get_by_role("button", name="Show payload").click()
        expect(card.locator("pre").nth(1)).to_contain_text("count me")
        shown = json.loads(card.locator("pre").nth(1).text_content())
        assert shown == receiver.received[-1].document

        page.reload()
        expect(card).to_be_visible()
        card.get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Header value")).to_have_value(re.compile("^Bear….*6789$"))
        assert "right-token" not in page.content()
        page.get_by_label("Privacy mode").check()
        test.click()
        expect(save).to_be_enabled()
        save.click()
        expect(card).to_contain_text("privacy mode")
        chat(router, "HIDDEN-PROMPT")
        until(lambda: len(receiver.generations()) == 2, 10, "the second request is delivered")
        assert b"HIDDEN-PROMPT" not in receiver.received[-1].text
        assert receiver.received[-1].headers["authorization"] == "Bearer right-token-0123456789"


def test_a_destination_is_deleted_only_after_a_question(page_router, visit):
    router = page_router()
    with FakeCollector() as receiver:
        add(router, receiver.url, name="Short-lived")
        page = visit(router).open("/dashboard/observability")
        card = page.get_by_role("article", name="Short-lived")
        card.get_by_role("button", name="Delete").click()
        dialog = page.get_by_role("dialog")
        expect(dialog).to_contain_text("Delete Short-lived?")
        page.keyboard.press("Escape")
        expect(dialog).to_have_count(0)
        expect(card).to_be_visible()
        card.get_by_role("button", name="Delete").click()
        dialog.get_by_role("button", name="Delete").click()
        expect(page.get_by_text("Short-lived is deleted.")).to_be_visible()
        expect(card).to_have_count(0)
        assert router.get("/api/v1/observability/destinations").json() == {"destinations": []}


def test_a_destination_of_the_file_is_shown_but_cannot_be_changed(page_router, visit):
    router = page_router(broadcast='[[broadcast.destinations]]\nname = "Archive"\ntype = "file"\npath = "{tmp}/archive.jsonl"')
    page = visit(router).open("/dashboard/observability")
    card = page.get_by_role("article", name="Archive")
    expect(card).to_contain_text("read-only")
    expect(card.get_by_role("button", name="Edit")).to_have_count(0)
    expect(card.get_by_role("button", name="Delete")).to_have_count(0)
    expect(card.get_by_role("switch")).to_be_disabled()
    card.get_by_role("button", name="Test connection").click()
    expect(card).to_contain_text("The connection works")
    card.get_by_role("button", name="Show payload").click()
    expect(card).to_contain_text("Nothing to show yet")


def test_a_broken_destination_shows_its_error_and_can_be_switched_off(page_router, visit):
    router = page_router(broadcast="enabled = true")
    with FakeCollector() as receiver:
        add(router, receiver.url, name="Breaks")
        receiver.script(Reply(status=403))
        looked = visit(router)
        looked.expected = ("422",)
        page = looked.open("/dashboard/observability")
        card = page.get_by_role("article", name="Breaks")
        chat(router, "lost")
        expect(card).to_contain_text("failing")
        expect(card).to_contain_text("Last error")
        expect(card.locator(".counters div", has_text="Dropped")).to_contain_text("http 403")
        toggle = card.get_by_role("switch")
        toggle.uncheck()
        expect(card).to_contain_text("switched off")
        toggle.click()
        expect(card).to_contain_text("may not write traces")
        expect(toggle).not_to_be_checked()


def test_filter_rules_keys_and_sampling_are_kept_as_they_were_entered(page_router, visit):
    router = page_router()
    with FakeCollector() as receiver:
        page = visit(router).open("/dashboard/observability")
        page.get_by_role("button", name="Add a destination").click()
        page.get_by_role("button", name="Webhook").click()
        page.get_by_label("URL").fill(receiver.url)
        page.get_by_label("Method").select_option("PUT")
        page.get_by_label("Sampling").fill("12.5")
        page.get_by_label("Only requests made with these keys").fill("team-a, team-b")
        page.get_by_label("Only requests that pass").check()
        page.get_by_label("Field").select_option("total_cost")
        page.get_by_label("Comparison").select_option("gte")
        page.get_by_label("Value", exact=True).fill("0.01")
        page.get_by_role("button", name="Add a condition").click()
        page.get_by_label("Field").nth(1).select_option("model")
        page.get_by_label("Comparison").nth(1).select_option("exists")
        page.get_by_role("button", name="Test connection").click()
        expect(page.locator("form .notice")).to_contain_text("The connection works")
        page.get_by_role("button", name="Save").click()
        expect(page.get_by_role("article", name="webhook")).to_contain_text("12.5 % of sessions")
        (stored,) = router.get("/api/v1/observability/destinations").json()["destinations"]
        assert stored["sampling_rate"] == 0.125 and stored["api_keys"] == ["team-a", "team-b"]
        assert stored["config"]["method"] == "PUT"
        rules = [{"field": "total_cost", "operator": "gte", "value": 0.01}, {"field": "model", "operator": "exists"}]
        assert stored["filter_rules"] == {"enabled": True, "groups": [{"logic": "and", "rules": rules}]}
        page.get_by_role("button", name="Edit").click()
        expect(page.get_by_label("Value", exact=True).first).to_have_value("0.01")
        expect(page.get_by_label("Sampling")).to_have_value("12.5")


def test_headers_pasted_as_the_json_object_of_a_guide_become_rows(page_router, visit):
    headers = {"Authorization": "Bearer xaat-your-token", "X-Axiom-Dataset": "your-dataset"}
    router = page_router()
    with FakeCollector() as receiver:
        page = visit(router).open("/dashboard/observability")
        page.get_by_role("button", name="Add a destination").click()
        page.get_by_role("button", name="OpenTelemetry Collector").click()
        page.get_by_label("Endpoint").fill(receiver.url)
        page.get_by_role("button", name="Add a header").click()
        page.get_by_label("Header name").evaluate(
            """(field, text) => {
              const data = new DataTransfer();
              data.setData("text", text);
              field.dispatchEvent(new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true }));
            }""",
            json.dumps(headers, indent=2),
        )
        expect(page.get_by_label("Header name")).to_have_count(2)
        page.get_by_role("button", name="Test connection").click()
        expect(page.locator("form .notice")).to_contain_text("The connection works")
        assert headers.items() <= {k.title(): v for k, v in receiver.received[0].headers.items()}.items()


def test_what_is_wrong_with_a_field_is_told_at_the_field(page_router, visit):
    router = page_router()
    looked = visit(router)
    looked.expected = ("400",)
    page = looked.open("/dashboard/observability")
    page.get_by_role("button", name="Add a destination").click()
    page.get_by_role("button", name="Grafana Cloud").click()
    page.get_by_label("Instance ID").fill("my-stack")
    page.get_by_label("Access policy token").fill("glc_0123456789abcdefghij")
    page.get_by_role("button", name="Test connection").click()
    field = page.get_by_label("Instance ID")
    expect(field).to_have_attribute("aria-invalid", "true")
    expect(field).to_be_focused()
    expect(page.get_by_role("button", name="Save")).to_be_disabled()
    assert page.get_by_label("Access policy token").get_attribute("type") == "password"


def add(router: RouterProcess, url: str, **more: Any) -> None:
    body = {"type": "otel-collector", "config": {"endpoint": url}, **more}
    answer = router.post("/api/v1/observability/destinations", body)
    assert answer.status == 201, answer


# The door


def test_with_a_key_the_page_is_behind_a_sign_in_that_keeps_no_key(router, visit):
    process = router(CONFIG, server='api_key_env = "PAGE_KEY"', broadcast="", environment={"PAGE_KEY": KEY})
    process.key = KEY
    for path in ("/dashboard", "/dashboard/observability"):
        looked = visit(process)
        looked.expected = ("401",)
        page = looked.open(path)
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        field = page.get_by_label("API key")
        expect(field).to_be_focused()
        assert page.evaluate("getComputedStyle(document.querySelector('button')).minHeight") == "40px"  # its style is there
        field.fill("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("This is not a valid key.")
        field.fill(KEY)
        page.keyboard.press("Enter")
        expect(page.get_by_role("navigation")).to_be_visible()
        cookies = looked.context.cookies()
        assert [(c["httpOnly"], c["sameSite"]) for c in cookies] == [(True, "Strict")]
        assert KEY not in json.dumps(cookies)
        assert KEY not in page.evaluate("JSON.stringify([localStorage, sessionStorage]) + document.cookie")
        assert not any(KEY in url for url in looked.asked)
        expect(page.locator("main > div:not([hidden])")).to_be_visible()  # all of it is loaded
        page.get_by_role("button", name="Sign out").click()
        expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
        assert looked.context.cookies() == []


def test_behind_a_prefix_every_address_stays_behind_it(router, visit):
    process = router(CONFIG, server='url_prefix = "/llm/here"', broadcast="", start=False)
    process.prefix = "/llm/here"
    process.start()
    looked = visit(process)
    page = looked.open("/dashboard")
    expect(page.locator("#connection")).to_have_text("Live")
    chat(process, "hello")
    page.locator("#finished .card").click()
    expect(page.locator(".span").first).to_be_visible()
    page.get_by_role("link", name="Observability").click()
    expect(page.get_by_role("switch", name="Enable Broadcast")).to_be_enabled()
    page.get_by_role("link", name="Requests").click()
    expect(page.locator("#finished .card")).to_have_count(1)
    assert all("/llm/here/" in url for url in looked.asked if not url.startswith("data:"))


# Whatever is said


def test_hostile_text_is_shown_as_text_and_runs_nothing(page_router, visit):
    router = page_router()
    with FakeCollector() as receiver:
        tool = {
            "type": "function",
            "function": {"name": "get_x", "description": HOSTILE, "parameters": {"type": "object", "title": HOSTILE}},
        }
        body = {
            "model": HOSTILE, "user": HOSTILE, "session_id": HOSTILE, "tools": [tool], "stop": [HOSTILE],
            "messages": [{"role": "system", "content": HOSTILE}, {"role": "user", "content": HOSTILE}],
            "trace": {"trace_name": HOSTILE, HOSTILE: HOSTILE},
        }  # fmt: skip
        assert router.post("/v1/chat/completions", body).status == 200
        add(
            router,
            receiver.url,
            name="<img src=x onerror=alert(1)>",
            config={"endpoint": receiver.url, "headers": {"X-A": "<b>bold"}},
        )
        page = visit(router).open()
        expect(page.locator(".card .model")).to_have_text(HOSTILE)
        page.locator(".card").click()
        expect(page.locator("#detail-title")).to_contain_text("<img src=x onerror=alert(1)>")
        for span in page.locator(".span").all():
            span.click()
        page.evaluate("document.querySelectorAll('details').forEach((folded) => (folded.open = true))")
        expect(page.locator("#detail")).to_contain_text("</script><script>alert(2)</script>")
        assert page.locator("#detail img, #detail script, .feed img").count() == 0
        page.locator("#filters [name=text]").fill(HOSTILE[:40])
        expect(page.locator(".card")).to_have_count(1)
        page.get_by_role("button", name="Back").click()
        expect(page.locator("#models")).to_contain_text("<img src=x onerror")
        page.goto(page.url.partition("#")[0] + "/observability")
        expect(page.get_by_role("article")).to_contain_text("<img src=x onerror=alert(1)>")
        page.get_by_role("button", name="Edit").click()
        expect(page.get_by_role("heading", name="Edit <img")).to_be_visible()
        assert page.locator("main img, main script").count() == 0


# Everybody


@pytest.mark.skipif(
    not dashboard_browser.AXE.exists(), reason="axe-core is not installed: npm install --prefix .backends/npm axe-core"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page_router, visit, scheme):
    router = page_router(broadcast='[[broadcast.destinations]]\nname = "Archive"\ntype = "file"\npath = "{tmp}/archive.jsonl"')
    looked = visit(router, color_scheme=scheme, reduced_motion="reduce")
    page = looked.open()
    expect(page.locator("#feed-empty")).to_be_visible()
    assert not looked.axe(), "nothing there yet"
    for text in ("write python", "fail [[echo status=500]]", "hello"):
        chat(router, text)
    router.stream("leave [[echo gap=0.2 words=50]]", model="echo").close()
    stream = router.stream("wait [[echo gap=1 words=50]]", model="echo")
    expect(page.locator("#finished .card")).to_have_count(4)
    expect(page.locator("#running .card")).to_have_count(1)
    assert not looked.axe(), "feed and overview"
    stream.close()
    page.locator("#finished .card", has_text="fail").click()
    page.locator(".span").nth(2).click()
    page.evaluate("document.querySelectorAll('details').forEach((folded) => (folded.open = true))")
    assert not looked.axe(), "one request"
    page.goto(looked.base + "/dashboard/observability")
    expect(page.get_by_role("article")).to_be_visible()
    page.get_by_role("button", name="Test connection").click()
    expect(page.locator(".notice.good")).to_be_visible()
    assert not looked.axe(), "destinations"
    page.get_by_role("button", name="Add a destination").click()
    assert not looked.axe(), "types"
    page.get_by_role("button", name="Grafana Cloud").click()
    page.get_by_role("button", name="Add a header").click()
    page.get_by_label("Only requests that pass").check()
    assert not looked.axe(), "the form"


@pytest.mark.skipif(
    not dashboard_browser.AXE.exists(), reason="axe-core is not installed: npm install --prefix .backends/npm axe-core"
)
def test_axe_finds_nothing_serious_in_the_sign_in_page(router, visit):
    process = router(CONFIG, server='api_key_env = "PAGE_KEY"', broadcast="", environment={"PAGE_KEY": KEY})
    process.key = KEY
    looked = visit(process)
    looked.expected = ("401",)
    looked.open()
    assert not looked.axe()


@pytest.mark.parametrize("width", [360, 768, 1100, 1920])
def test_nobody_must_scroll_sideways(page_router, visit, width):
    router = page_router()
    hear_out(router, "a long word: " + "x" * 500 + " [[echo words=30]]", user="u" * 300, session_id="s" * 200)
    looked = visit(router, width=width)
    page = looked.open()
    expect(page.locator(".card")).to_have_count(1)
    assert not looked.overflows(), "feed"
    if width < 960:
        page.get_by_role("button", name="Overview").click()
        expect(page.locator("#overview")).to_be_visible()
        assert not looked.overflows(), "overview"
        page.get_by_role("button", name="Feed").click()
    page.locator(".card").click()
    page.locator(".span").first.click()
    page.evaluate("document.querySelectorAll('details').forEach((folded) => (folded.open = true))")
    assert not looked.overflows(), "one request"
    page.goto(looked.base + "/dashboard/observability")
    page.get_by_role("button", name="Add a destination").click()
    assert not looked.overflows(), "types"
    page.get_by_role("button", name="Grafana Cloud").click()
    page.get_by_label("Only requests that pass").check()
    assert not looked.overflows(), "form"


def test_nothing_moves_for_those_who_asked_for_that(page_router, visit):
    router = page_router()
    stream = router.stream("wait [[echo gap=1 words=50]]", model="echo")
    still = visit(router, reduced_motion="reduce").open()
    expect(still.locator("#running .card")).to_have_count(1)
    assert still.evaluate("document.getAnimations().filter((a) => a.constructor.name === 'CSSAnimation').length") == 0
    moving = visit(router, reduced_motion="no-preference").open()
    expect(moving.locator("#running .card")).to_have_count(1)
    assert moving.evaluate("document.getAnimations().filter((a) => a.constructor.name === 'CSSAnimation').length") > 0
    stream.close()


def test_each_view_is_small(page_router, visit):
    """Small enough to be painted at once; how long that takes is the machine's business."""
    router = page_router()
    for path in ("/dashboard", "/dashboard/observability"):
        looked = visit(router)
        sizes: list[int] = []
        looked.page.on("response", lambda answer, sizes=sizes: sizes.append(int(answer.headers.get("content-length", 0))))
        looked.open(path).wait_for_load_state("load")
        expect(looked.page.locator("main > div:not([hidden])")).to_be_visible()
        assert 30_000 < sum(sizes) < 100_000, (path, sizes)
