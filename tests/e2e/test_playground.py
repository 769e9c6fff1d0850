"""The playground as its user meets it: a real browser before a live gateway."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from playwright.sync_api import Browser, expect

from gateway.books import Books
from tests.e2e.browsers import User, chromium, save, words_of
from tests.e2e.gateways import ADMIN_KEY, LiveGateway, new_tenant
from tests.e2e.pictures import EDGE_PX, GREEN, RED, alike, encoded, file_of

FIRST_LOAD_MAX_BYTES = 60_000
CODE_MAX_S = 60
CHEAPEST = "How sandbox-thrifty behaves"
VISITORS_MAX = 20


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def keys(shared_gateway: LiveGateway) -> list[str]:
    """A key for each visitor, of a tenant of their own."""

    async def made(books: Books) -> list[str]:
        tenants = [
            await new_tenant(books, f"visitor-{number}", "1000")
            for number in range(VISITORS_MAX)
        ]
        return [key for key, _ in tenants]

    return shared_gateway.in_books(made)


@pytest.fixture
def visitor(
    browser: Browser, shared_gateway: LiveGateway, keys: list[str]
) -> Iterator[User]:
    """Somebody with a key of a tenant of their own, at the door."""
    key = keys.pop()
    context = browser.new_context(
        viewport={"width": 1280, "height": 1000},
        locale="en-US",
        color_scheme="light",
        reduced_motion="reduce",
    )
    user = User(context.new_page(), shared_gateway, key)
    user.page.goto(shared_gateway.url)
    yield user
    user.check_manners()
    context.close()


@pytest.fixture
def user(visitor: User) -> User:
    """Somebody who has entered their key."""
    visitor.enter()
    visitor.page.get_by_label("Prompt").wait_for()
    return visitor


def test_a_key_is_entered_once_and_no_script_can_read_it(visitor: User) -> None:
    page = visitor.page
    visitor.enter("iwk_live_wrong")
    alert = page.get_by_role("alert")
    expect(alert).to_contain_text("That key is not valid.")
    expect(alert).to_contain_text("invalid_api_key")

    visitor.enter()
    page.get_by_label("Prompt").wait_for()
    page.reload()
    page.get_by_label("Prompt").wait_for()
    readable = page.evaluate(
        "() => document.cookie + JSON.stringify({...localStorage, ...sessionStorage})"
    )
    assert visitor.key[9:] not in readable
    assert "imageway_key" not in readable

    page.get_by_role("button", name="Log out").click()
    page.get_by_label("API key or admin key").wait_for()
    assert page.context.cookies() == []


def test_the_price_follows_each_control_and_is_the_apis(  # noqa: PLR0915 - one by one
    user: User,
) -> None:
    page = user.page
    body: dict[str, Any] = {"model": "gpt-image-2", "quality": "medium", "n": 1}
    seen = set()

    def priced(**change: Any) -> None:
        body.update(change)
        sent = {name: value for name, value in body.items() if value is not None}
        with user.api() as api:
            quote = api.post("/v1/estimate", json=sent).json()
        low, high = quote["low"], quote["high"]
        expected = {"low-credits": low["credits"], "low-usd": low["usd"]}
        if low != high:
            expected |= {"high-credits": high["credits"], "high-usd": high["usd"]}
        shown = page.locator("[data-amount=low-credits]")
        expect(shown).to_have_attribute("value", f"{low['credits']}")
        amounts = {name: float(value or "") for name, value in user.amounts().items()}
        assert amounts == expected
        text = shown.inner_text()
        assert abs(float(text.replace(",", "")) - low["credits"]) < 1e-6
        size = quote["size"]
        expect(page.locator("[data-pixels]")).to_have_attribute("data-pixels", size)
        seen.add(tuple(amounts.values()))

    priced(size="auto")
    user.pick("Aspect ratio", "16:9")
    priced(size="16:9", resolution="1K")
    user.pick("Resolution", "4K")
    priced(resolution="4K")
    user.pick("Quality", "High")
    priced(quality="high")
    page.get_by_label("Number of images").fill("3")
    priced(n=3)
    page.get_by_label("Prompt").fill("a fox 狐" * 50)
    priced(prompt="a fox 狐" * 50)
    user.upload("red.png", file_of(RED))
    page.get_by_text("Ready").wait_for()
    priced(image_urls=["file_any"])
    user.pick("Aspect ratio", "Custom")
    page.get_by_label("Width in pixels").fill("1536")
    priced(size="1536x1024", resolution=None)
    page.get_by_label("Model").select_option("gpt-image-2.5-flare")
    priced(model="gpt-image-2.5-flare")
    assert len(seen) == 9


def test_sizes_are_checked_while_they_are_written(user: User) -> None:
    page = user.page
    generate = page.get_by_role("button", name="Generate")
    for ratio in ("Auto", "Custom"):
        user.pick("Aspect ratio", ratio)
        for tier in ("1K", "2K", "4K"):
            expect(user.group("Resolution").get_by_label(tier)).to_be_disabled()
    assert user.group("Aspect ratio").get_by_role("radio").count() == 17

    for width, height in (("1000", "1024"), ("3840", "3840"), ("4000", "16"), ("", "")):
        page.get_by_label("Width in pixels").fill(width)
        page.get_by_label("Height in pixels").fill(height)
        expect(page.get_by_role("alert")).to_contain_text("invalid_value")
        expect(generate).to_be_disabled()
    page.get_by_label("Width in pixels").fill("3840")
    page.get_by_label("Height in pixels").fill("2160")
    expect(page.locator("[data-pixels='3840x2160']")).to_be_visible()
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(generate).to_be_enabled()


def test_pictures_are_made_enlarged_saved_and_found_again(
    user: User, tmp_path: Path
) -> None:
    page = user.page
    user.pick("Aspect ratio", "3:2")
    page.get_by_label("Number of images").fill("2")
    task_id = user.generate("two lighthouses")
    result = user.result()

    expect(result.locator("img")).to_have_count(2)
    with page.expect_download() as saved:
        result.get_by_role("link", name="Download").first.click()
    picture = Image.open(io.BytesIO(save(saved.value, tmp_path)))
    assert picture.size == (1248, 832)
    result.get_by_role("button", name="Enlarge picture 2").click()
    shown = page.get_by_role("dialog").get_by_role("img")
    assert shown.evaluate("image => image.complete && image.naturalWidth") == 1248
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    everything: list[Any] = []
    page.on("download", lambda each: everything.append(each))  # noqa: PLW0108 - the library marks it
    with page.expect_event("download", lambda _: len(everything) > 1):
        result.get_by_role("button", name="Download all").click()
    expect(page.get_by_text("0 in progress · 1 completed")).to_be_visible()

    page.reload()
    expect(user.result()).to_have_attribute("data-task", task_id)
    user.pick("Aspect ratio", "Auto")
    page.get_by_role("button", name="Vary").click()
    expect(page.get_by_label("Prompt")).to_have_value("two lighthouses")
    expect(user.group("Aspect ratio").get_by_label("3:2")).to_be_checked()
    page.get_by_role("button", name="Run again").click()
    expect(page.get_by_text("0 in progress · 2 completed")).to_be_visible()
    with user.api() as api:
        assert api.get("/v1/tasks").json()["total"] == 2


def test_references_are_checked_before_they_are_uploaded(user: User) -> None:
    page = user.page
    user.upload("notes.png", b"not a picture at all")
    expect(page.get_by_role("alert")).to_have_text(
        "notes.png is not a JPEG, PNG or WebP image."
    )
    files: Any = [
        {
            "name": f"{n}.webp",
            "mimeType": "image/webp",
            "buffer": file_of(GREEN, "webp"),
        }
        for n in range(17)
    ]
    page.locator("#files").set_input_files(files)
    expect(page.get_by_role("alert")).to_have_text(
        "At most 16 images: 16.webp was left out."
    )
    expect(page.locator(".thumbs .ready")).to_have_count(16)
    sent = [each for each in user.asked if "/upload/" in each.url]
    assert len(sent) == 16

    dropped = page.evaluate_handle(
        """bytes => {
            const transfer = new DataTransfer();
            const picture = new Uint8Array(bytes);
            transfer.items.add(new File([picture], "dropped.png", {type: "image/png"}));
            return transfer;
        }""",
        list(file_of(RED)),
    )
    page.get_by_role("button", name="Remove 0.webp").click()
    page.locator(".refs").dispatch_event("drop", {"dataTransfer": dropped})
    page.get_by_text("dropped.png", exact=True).wait_for()
    expect(page.locator(".thumbs .ready")).to_have_count(16)
    page.get_by_role("button", name="Remove 1.webp").click()
    page.evaluate(
        """transfer => dispatchEvent(
            new ClipboardEvent("paste", {clipboardData: transfer, cancelable: true})
        )""",
        dropped,
    )
    expect(page.get_by_text("dropped.png", exact=True)).to_have_count(2)
    expect(page.locator(".thumbs .ready")).to_have_count(16)


def test_only_what_was_painted_over_is_made_anew(user: User) -> None:
    page = user.page
    user.upload("red.png", file_of(RED))
    page.get_by_role("button", name="Paint a mask").click()
    canvas = page.get_by_role("application", name="Area to paint on")
    expect(canvas).to_have_attribute("width", str(EDGE_PX))
    box = canvas.bounding_box()
    assert box is not None
    left, top, edge = box["x"], box["y"], box["width"]
    page.mouse.move(left + edge * 0.15, top + edge * 0.5)
    page.mouse.down()
    page.mouse.move(left + edge * 0.15, top + edge * 0.9, steps=4)
    page.mouse.up()
    canvas.focus()
    for key in ["ArrowUp"] * 20 + ["ArrowRight"] * 33 + ["+", "Space"]:
        page.keyboard.press(key)
    page.get_by_role("button", name="Use the mask").click()
    page.get_by_text("A mask is set.").wait_for()
    user.pick("Aspect ratio", "1:1")
    user.generate("a hole in the left")
    source = user.result().locator("img").get_attribute("src")
    with urllib.request.urlopen(user.gateway.url + str(source), timeout=30) as answer:
        made = Image.open(io.BytesIO(answer.read()))

    assert made.size == (1024, 1024)
    assert not alike(made, (150, 700), RED)  # by the mouse
    assert not alike(made, (830, 512), RED)  # by the keyboard
    assert alike(made, (500, 900), RED)
    assert alike(made, (900, 950), RED)


def test_a_failover_can_be_watched(user: User) -> None:
    page = user.page
    user.enter_as_operator()
    try:
        user.pick(CHEAPEST, "Fails")
        user.generate("somebody has to make it")
        route = page.locator(".way")
        expect(page.locator(".failover")).to_have_text(
            "sandbox-thrifty failed; sandbox-fair made the picture."
        )
        expect(route.get_by_role("listitem")).to_have_count(2)
        expect(route.get_by_role("listitem").first).to_contain_text("HTTP 502")
        expect(route.get_by_role("row", name="sandbox-dear")).to_contain_text("Choice")
        charged = route.get_by_text("Charged in all").inner_text()
        with user.api() as api:
            task_id = page.locator("[data-routed]").get_attribute("data-routed")
            used = api.get(f"/v1/tasks/{task_id}").json()["usage"]["credits_used"]
        assert f"{used:.9f}".rstrip("0") in charged
        user.portray("route")

        user.pick(CHEAPEST, "Refuses")
        page.get_by_role("tab", name="Result").click()
        user.generate("what moderation will not have")
        expect(user.result("failed")).to_contain_text("Moderation refused")
        expect(user.result("failed")).to_contain_text("content_policy_violation")
    finally:
        page.get_by_role("tab", name="Route").click()
        user.pick(CHEAPEST, "Works")
    expect(user.group(CHEAPEST).get_by_label("Works")).to_be_checked()
    page.get_by_role("tab", name="Result").click()
    user.generate("and all is well")
    user.result()


def test_a_slow_task_shows_that_it_runs_and_can_be_cancelled(user: User) -> None:
    page = user.page
    user.enter_as_operator()
    try:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            user.pick(f"How {name} behaves", "Is slow")
        page.get_by_role("tab", name="Result").click()
        user.generate("it takes its time")
        expect(page.get_by_text("1 in progress · 0 completed")).to_be_visible()
        page.get_by_role("progressbar", name="Progress").wait_for()
        page.get_by_role("button", name="Cancel").click()
        expect(user.result("cancelled")).to_contain_text("The task was cancelled.")
        expect(page.get_by_text("0 in progress · 0 completed")).to_be_visible()
    finally:
        for name in ("sandbox-thrifty", "sandbox-fair", "sandbox-dear"):
            user.gateway.sandbox(name, latency_ms=0)


def test_too_little_credit_is_said_in_plain_words(
    browser: Browser, shared_gateway: LiveGateway
) -> None:
    key = shared_gateway.tenant(f"poor-{os.getpid()}", "1")
    poor = User(browser.new_page(locale="en-US"), shared_gateway, key)
    poor.page.goto(shared_gateway.url)
    poor.enter()
    poor.pick("Quality", "High")
    poor.page.get_by_label("Prompt").fill("a palace")
    poor.page.get_by_role("button", name="Generate").click()
    alert = poor.page.get_by_role("alert")
    expect(alert).to_contain_text("There are not enough credits.")
    expect(alert).to_contain_text("insufficient_quota")
    alert.get_by_role("button", name="Dismiss").click()
    expect(alert).to_have_count(0)
    poor.check_manners()
    poor.page.close()


@pytest.mark.parametrize("with_reference", [False, True])
def test_the_code_that_is_shown_runs_as_it_stands(
    user: User, tmp_path: Path, with_reference: bool
) -> None:
    page = user.page
    node = shutil.which("node")
    assert node is not None
    prompt = 'it\'s "quoted", $HOME `ls` \\n [ 1 ] 灯台\nand a second line'
    page.get_by_label("Prompt").fill(prompt)
    user.pick("Aspect ratio", "2:1")
    user.pick("File format", "WEBP")
    if with_reference:
        user.upload("red.png", file_of(RED))
        page.locator(".thumbs .ready").wait_for()
    page.get_by_role("tab", name="Code").click()
    programs = {
        "curl": ["sh", "curl.sh"],
        "Python": [sys.executable, "python.py"],
        "JavaScript": [node, "javascript.mjs"],
    }
    env = os.environ | {"IMAGEWAY_KEY": user.key}
    running = {}
    for language, (program, name) in programs.items():
        user.pick("Language", language)
        shown = page.locator(f"[data-language={language.lower()}]").inner_text()
        assert user.key not in shown
        (tmp_path / name).write_text(shown)
        running[language] = subprocess.Popen(
            [program, name],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    for language, process in running.items():
        out, err = process.communicate(timeout=CODE_MAX_S)
        assert process.returncode == 0, (language, err)
        link = json.loads(out)["data"][0]["url"] if language == "curl" else out.strip()
        with urllib.request.urlopen(link, timeout=30) as answer:
            made = Image.open(io.BytesIO(answer.read()))
        assert (made.size, made.format) == ((1456, 720), "WEBP")


def test_all_of_it_works_without_a_mouse(user: User) -> None:
    page = user.page
    page.reload()
    page.get_by_label("Prompt").wait_for()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    expect(page.get_by_label("Prompt")).to_be_focused()
    page.keyboard.type("typed, not clicked")
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.name") == "ratio":
            break
    page.keyboard.press("ArrowRight")
    expect(user.group("Aspect ratio").get_by_label("1:1")).to_be_checked()
    page.get_by_label("Prompt").press("Control+Enter")
    user.result()
    page.get_by_role("tab", name="Result").press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Code")).to_be_focused()
    expect(page.locator("pre")).to_contain_text("typed, not clicked")


def test_the_console_shows_what_is_left_what_was_made_and_what_was_sent(
    user: User,
) -> None:
    page = user.page
    ask = {"prompt": "a fox", "size": "1:1", "quality": "low"}
    with user.api() as api:
        for number in range(21):
            more = (
                {"callback_url": "https://nowhere.example.com/hook"}
                if number == 0
                else {}
            )
            headers = {"prefer": "respond-async"}
            path = "/v1/images/generations"
            made = api.post(path, json=ask | more, headers=headers)
            assert made.status_code == 200, made.text
        while api.get("/v1/tasks?status=completed").json()["total"] < 21:
            time.sleep(0.1)
        first = api.get("/v1/tasks?page=2").json()["data"][-1]["id"]
        left = api.get("/v1/credits").json()["data"]["user"]
    page.get_by_role("link", name="Console").click()

    balance = page.locator(".figures data")
    expect(balance).to_have_count(3)
    shown = [float(each.get_attribute("value") or "") for each in balance.all()]
    assert shown == [left[f"{name}_credits"] for name in ("remaining", "held", "used")]
    rows = page.get_by_role("region", name="Tasks").get_by_role("row")
    expect(rows).to_have_count(21)
    page.get_by_role("button", name="Older").click()
    expect(rows).to_have_count(2)
    page.get_by_role("combobox", name="State").select_option("failed")
    expect(page.get_by_text("There is nothing yet.")).to_be_visible()
    page.get_by_role("combobox", name="State").select_option("completed")
    page.get_by_role("button", name="Older").click()

    sent = page.get_by_role("region", name="Webhooks")
    expect(sent.get_by_role("row")).to_have_count(2)
    with page.expect_response("**/redeliver") as again:
        sent.get_by_role("button", name="Send again").click()
    assert again.value.status == 200
    page.get_by_role("link", name=first).click()
    expect(user.result()).to_have_attribute("data-task", first)
    expect(page.locator(".history li")).to_have_count(20)


LEFT_AS_THEY_ARE = {"API", "JPEG", "PNG", "WebP", "WEBP", "Cookie", "imageway", "USD"}
LATIN_TEXT = """() => {
    const found = [];
    const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
        const parent = walker.currentNode.parentElement;
        const own = parent.closest('[translate="no"], noscript, script');
        if (!own) found.push(walker.currentNode.data);
    }
    const named = document.querySelectorAll("[aria-label], [placeholder], [alt]");
    for (const each of named) {
        if (each.closest('[translate="no"]')) continue;
        for (const name of ["aria-label", "placeholder", "alt"])
            found.push(each.getAttribute(name) ?? "");
    }
    return found.flatMap(text => text.match(/[A-Za-z][A-Za-z-]{2,}/g) ?? []);
}"""


def test_every_text_is_there_in_japanese(user: User) -> None:
    page = user.page
    english, japanese = words_of("en"), words_of("ja")
    assert english.keys() == japanese.keys()
    alike_in_both = {key for key in english if english[key] == japanese[key]}
    assert not alike_in_both
    user.enter_as_operator()
    page.get_by_label("Language").first.select_option("ja")
    expect(page.locator("html")).to_have_attribute("lang", "ja")
    known = LEFT_AS_THEY_ARE | {"sandbox-thrifty", "sandbox-fair", "sandbox-dear"}

    def foreign() -> set[str]:
        found: list[str] = page.evaluate(LATIN_TEXT)
        return set(found) - known

    page.get_by_label("プロンプト").fill("a prompt stays as it is")
    page.get_by_role("button", name="生成する").click()
    page.locator("[data-attempts='1']").wait_for()
    assert foreign() == set()
    page.get_by_role("tab", name="結果").click()
    user.result()
    assert foreign() == set()
    page.get_by_role("tab", name="コード").click()
    page.get_by_role("radio", name="Python").wait_for()
    assert foreign() <= {"IMAGEWAY", "KEY"}
    page.get_by_role("link", name="コンソール").click()
    page.get_by_role("link", name="task-unified").wait_for()
    assert foreign() <= {"Webhook"}
    page.get_by_role("link", name="運用").click()
    page.get_by_role("rowheader", name="sandbox-fair").wait_for()
    assert foreign() == set()
    page.reload()
    page.get_by_role("button", name="ログアウト").click()
    page.get_by_label("API キーまたは管理キー").fill("wrong")
    page.get_by_role("button", name="入力する").click()
    expect(page.get_by_role("alert")).to_contain_text("キーが正しくありません。")
    assert foreign() <= {"make", "serve"}  # a command


def offences(user: User, portrait: str = "") -> list[str]:
    """Look at a page in both themes, which differ in nothing but their colours."""
    found = []
    for theme, rules in (("dark", ["color-contrast"]), ("light", [])):
        user.page.evaluate(
            "theme => document.documentElement.dataset.theme = theme", theme
        )
        found += user.offences(rules)
        if portrait:
            user.portray(f"{portrait}-{theme}")
    return found


def test_every_page_is_accessible_in_both_themes(visitor: User) -> None:
    page = visitor.page
    page.get_by_label("API key or admin key").wait_for()
    assert offences(visitor) == []
    visitor.enter()
    shades = [Image.linear_gradient("L").rotate(turn) for turn in (0, 90, 180)]
    visitor.upload("dusk.png", encoded(Image.merge("RGB", shades), "png"))
    page.locator(".thumbs .ready").wait_for()
    visitor.pick("Aspect ratio", "16:9")
    page.get_by_label("Number of images").fill("2")
    visitor.generate("a lighthouse at dusk, oil on canvas")
    visitor.result()
    page.mouse.move(0, 0)
    assert offences(visitor, "playground") == []
    page.get_by_role("button", name="Paint a mask").click()
    page.get_by_role("application").focus()
    page.keyboard.press("Space")
    assert offences(visitor) == []
    page.get_by_role("dialog").get_by_role("button", name="Cancel").click()
    page.get_by_role("tab", name="Code").click()
    assert offences(visitor) == []


def test_what_operators_and_telephones_show_is_accessible_too(visitor: User) -> None:
    page = visitor.page
    visitor.enter()
    visitor.generate("a lighthouse")
    visitor.enter_as_operator()
    page.locator("[data-attempts='1']").wait_for()
    visitor.pick("Aspect ratio", "Custom")
    page.get_by_label("Width in pixels").fill("1")
    page.get_by_role("alert").wait_for()
    assert offences(visitor) == []
    page.get_by_role("link", name="Operator").click()
    page.get_by_role("rowheader", name="sandbox-fair").wait_for()
    assert offences(visitor, "operator") == []
    page.get_by_role("link", name="Console").click()
    page.get_by_role("link", name="task-unified").wait_for()
    assert offences(visitor, "console") == []
    page.set_viewport_size({"width": 360, "height": 780})
    page.get_by_role("link", name="Playground").click()
    visitor.pick("Aspect ratio", "1:1")
    page.get_by_role("tab", name="Result").click()
    page.get_by_label("Prompt").wait_for()
    assert offences(visitor, "phone") == []
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360


def test_the_theme_follows_the_system_or_whoever_chooses(visitor: User) -> None:
    page = visitor.page
    ground = "() => getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(ground)
    page.emulate_media(color_scheme="dark")
    dark = page.evaluate(ground)
    page.get_by_label("Colours").select_option("light")
    assert page.evaluate(ground) == light != dark
    page.reload()
    page.get_by_label("API key or admin key").wait_for()
    assert page.evaluate(ground) == light


def test_the_first_load_is_small_and_asks_for_each_file_once(visitor: User) -> None:
    visitor.page.get_by_label("API key or admin key").wait_for()
    sizes = {}
    for request in visitor.asked:
        answer = request.response()
        assert answer is not None
        if request.resource_type in {"script", "stylesheet"}:
            assert answer.headers["content-encoding"] in {"br", "gzip"}
            assert request.url not in sizes
            sizes[request.url] = int(answer.headers["content-length"])

    assert len(sizes) == 2
    assert sum(sizes.values()) < FIRST_LOAD_MAX_BYTES


def test_the_admin_key_alone_sees_upstreams_and_pays_for_nothing(visitor: User) -> None:
    page = visitor.page
    visitor.enter(ADMIN_KEY)
    page.get_by_text("Enter an API key to make pictures").wait_for()
    page.get_by_role("link", name="Operator").click()
    row = page.get_by_role("row", name="sandbox-dear")
    try:
        row.get_by_role("button", name="Drain").click()
        expect(row).to_contain_text("drained")
    finally:
        row.get_by_role("button", name="Enable").click()
    expect(row).to_contain_text("well")
