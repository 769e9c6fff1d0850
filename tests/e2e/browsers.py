"""A browser in front of a gateway, and what its user does and sees."""

from __future__ import annotations

import io
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from playwright.sync_api import (
    Browser,
    Download,
    Locator,
    Page,
    Request,
    sync_playwright,
)

from tests.e2e.gateways import ADMIN_KEY, ROOT, LiveGateway

WEB = ROOT / "web"
AXE = WEB / "node_modules" / "axe-core" / "axe.min.js"
PAGES = ROOT / "gateway" / "pages" / "index.html"
PATIENCE_MS = 15_000
COLOURS = 96
"""Of a picture that is kept: enough for text on plain ground."""


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start Debian's Chromium; without it tests are skipped, in CI they fail."""
    found = shutil.which("chromium")
    lacking = [
        what
        for what, there in (
            ("Chromium is not installed", found),
            ("the pages are not built", PAGES.exists()),
            ("axe is not installed", AXE.exists()),
        )
        if not there
    ]
    if lacking:
        message = f"{lacking[0]}: make test sets it up, with Node 20 or newer"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        # Root has no sandbox; what is shown comes from this machine only.
        browser = playwright.chromium.launch(
            executable_path=found, args=["--no-sandbox", "--disable-gpu"]
        )
        yield browser
        browser.close()


@dataclass
class User:
    """Somebody at a page of the gateway; what the page asked for is kept."""

    page: Page
    gateway: LiveGateway
    key: str
    asked: list[Request] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.set_default_timeout(PATIENCE_MS)
        self.page.on("request", lambda request: self.asked.append(request))  # noqa: PLW0108 - the library marks what it is given
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))
        self.page.on("console", self._heard)

    def enter(self, key: str | None = None) -> None:
        """Open the front page and enter a key."""
        if not self.page.url.startswith(self.gateway.url):
            self.page.goto(self.gateway.url)
        self.page.get_by_label("API key or admin key").fill(key or self.key)
        self.page.get_by_role("button", name="Enter", exact=True).click()

    def enter_as_operator(self) -> None:
        """Enter the admin key beside the other one."""
        self.page.get_by_role("tab", name="Route").click()
        self.page.get_by_role("button", name="Enter the admin key").click()
        self.enter(ADMIN_KEY)
        self.page.get_by_text("Make an upstream misbehave").wait_for()

    def pick(self, group: str, choice: str) -> None:
        """Choose one of a group."""
        self.group(group).get_by_role("radio", name=choice, exact=True).check()

    def group(self, name: str) -> Locator:
        """Find the group of choices with a name."""
        return self.page.get_by_role("group", name=name)

    def upload(self, name: str, content: bytes, kind: str = "image/png") -> None:
        """Pick a file."""
        file: Any = {"name": name, "mimeType": kind, "buffer": content}
        self.page.locator("#files").set_input_files([file])

    def generate(self, prompt: str | None = None) -> str:
        """Have a picture made; returns the id of the new task."""
        if prompt is not None:
            self.page.get_by_label("Prompt").fill(prompt)
        before = self.page.locator(".history li").count()
        self.page.get_by_role("button", name="Generate").click()
        self.page.locator(".history li").nth(before).wait_for()
        task_id = self.page.locator(".history li").first.get_attribute("data-task")
        assert task_id is not None
        return task_id

    def result(self, state: str = "completed") -> Locator:
        """Wait until the open task is in a state."""
        found = self.page.locator(f".result[data-state={state}]")
        found.wait_for()
        return found

    def amounts(self) -> dict[str, str | None]:
        """Read the price that is shown, as the exact numbers behind it."""
        found = self.page.locator("[data-amount]").all()
        return {
            each.get_attribute("data-amount") or "": each.get_attribute("value")
            for each in found
        }

    def api(self) -> httpx.Client:
        """The API, with the user's own key."""
        return self.gateway.client(self.key)

    def offences(self, rules: Sequence[str] = ()) -> list[str]:
        """Have axe look at the page; returns what breaks a rule, and where.

        Without ``rules``, all that it has.
        """
        if not self.page.evaluate("() => 'axe' in window"):
            self.page.evaluate(AXE.read_text())
        only = {"runOnly": list(rules)} if rules else {}
        found = self.page.evaluate("only => axe.run(document, only)", only)
        return [
            f"{each['id']}: {node['html'][:120]} {node['failureSummary'][:200]}"
            for each in found["violations"]
            for node in each["nodes"]
        ]

    def portray(self, name: str) -> None:
        """Keep a picture of the page for the documentation, if that is asked for."""
        if os.environ.get("IMAGEWAY_PORTRAITS"):
            folder = ROOT / "docs" / "pictures"
            folder.mkdir(exist_ok=True)
            picture = Image.open(io.BytesIO(self.page.screenshot(full_page=True)))
            few = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
            few.save(folder / f"{name}.png", optimize=True)

    def check_manners(self) -> None:
        """See that nothing broke, and that the page asked nobody but its gateway."""
        assert not self.troubles
        strangers = [
            each.url
            for each in self.asked
            if not each.url.startswith((f"{self.gateway.url}/", "blob:"))
        ]
        assert not strangers

    def _heard(self, message: Any) -> None:
        if re.search("Content Security Policy|Refused to", message.text):
            self.troubles.append(message.text)


def words_of(language: str) -> dict[str, str]:
    """Read the words of a language out of the page's source."""
    text = (WEB / "src" / "words" / f"{language}.ts").read_text()
    found = re.findall(r'^  "([\w.]+)":\s*"((?:[^"\\]|\\.)*)",$', text, re.MULTILINE)
    assert len(found) == len(re.findall(r'^  "[\w.]+":', text, re.MULTILINE))
    return dict(found)


def save(download: Download, folder: Path) -> bytes:
    """Take a download's bytes."""
    path = folder / download.suggested_filename
    download.save_as(path)
    return path.read_bytes()
