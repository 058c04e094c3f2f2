"""The site in a real browser, wide and narrow: it draws, it reads, and it asks nobody for anything.

Needs Chromium. Where there is none the tests are skipped and say so; under CI=true they fail.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, Request, Route, expect, sync_playwright

pytestmark = pytest.mark.slow  # builds the site

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
ON_A_MAC = "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SIZES = {"desktop": (1280, 720), "phone": (390, 844)}


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    path = next((found for name in (*NAMES, ON_A_MAC) if (found := shutil.which(name))), None)
    if path is None:
        message = "no Chromium: the site was NOT looked at in a browser; install the package chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Reader:
    """A page of the site at one size, and what went wrong on it."""

    page: Page
    address: str
    wrong: list[str] = field(default_factory=list)

    def open(self, name: str) -> Page:
        self.page.goto(self.address + name)
        return self.page


@pytest.fixture(params=SIZES)
def reader(request: pytest.FixtureRequest, browser: Browser, address: str) -> Iterator[Reader]:
    width, height = SIZES[request.param]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme="light")
    page = context.new_page()
    page.set_default_timeout(15_000)
    reader = Reader(page, address)

    def guard(route: Route) -> None:
        if route.request.url.startswith((address, "data:", "blob:")):
            route.continue_()
        else:
            reader.wrong.append(f"asked elsewhere: {route.request.url}")
            route.abort()

    def failed(request: Request) -> None:
        if request.failure != "net::ERR_ABORTED":  # the reader went on before it was there
            reader.wrong.append(f"failed: {request.url}: {request.failure}")

    context.route("**/*", guard)
    page.on("console", lambda m: reader.wrong.append(f"{m.type}: {m.text}") if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: reader.wrong.append(f"script: {error}"))
    page.on("requestfailed", failed)
    page.on("response", lambda r: reader.wrong.append(f"{r.status}: {r.url}") if r.status >= 400 else None)
    yield reader
    assert not reader.wrong, "\n".join(reader.wrong)
    context.close()


def one(site: Path, folder: str) -> str:
    """The last chapter's page in a folder of the site."""
    names = sorted(path.name for path in (site / folder).glob("[0-9][0-9]_*.html"))
    assert names, f"no chapter in {folder}"
    return f"{folder}/{names[-1]}"


def all_pages(site: Path) -> list[str]:
    chapters = [path.relative_to(site).as_posix() for path in sorted(site.glob("*/[0-9][0-9]_*.html"))]
    return ["index.html", "CONTRIBUTING.html", "api/index.html", "api/collectives.html", *chapters]


def test_pages_fit_the_screen_and_draw_everything(reader: Reader, site: Path) -> None:
    formulas = 0
    for name in all_pages(site):
        page = reader.open(name)
        expect(page.locator("h1").first).to_be_visible()
        over = page.evaluate("document.scrollingElement.scrollWidth - document.documentElement.clientWidth")
        assert over <= 0, f"{name} is {over} pixels wider than the screen"
        undrawn = page.evaluate(
            "[...document.querySelectorAll('article img')].filter(i => !(i.complete && i.naturalWidth)).map(i => i.src)"
        )
        assert not undrawn, f"{name}: not drawn: {undrawn}"
        flat = page.evaluate(
            "[...document.querySelectorAll('details')].forEach(d => d.open = true);"
            "[...document.querySelectorAll('math')].filter(m => {const r = m.getBoundingClientRect();"
            " return r.width < 3 || r.height < 5}).map(m => m.textContent)"
        )
        assert not flat, f"{name}: formulas without size: {flat}"
        formulas += page.locator("math mfrac, math msub, math msup").count()
    assert formulas, "no page has a formula that is more than a letter"


def test_home_says_how_to_start_on_one_screen(reader: Reader) -> None:
    page = reader.open("index.html")
    height = page.viewport_size["height"]
    for text in ("make train", "make test"):
        box = page.get_by_text(text).first.bounding_box()
        assert box and box["y"] + box["height"] < height, f"{text} is below the first screen"


def test_dark_and_light(reader: Reader) -> None:
    page = reader.open("index.html")
    colours = set()
    for scheme in ("default", "slate", "default"):
        expect(page.locator("body")).to_have_attribute("data-md-color-scheme", scheme)
        colours.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        page.locator("label.md-header__button[for^=__palette]:visible").click()
    assert len(colours) == 2


def test_search_finds_a_function(reader: Reader) -> None:
    page = reader.open("index.html")
    if page.viewport_size["width"] < 1000:
        page.locator("label.md-header__button[for=__search]").click()
    page.locator("input[name=query]").click()
    page.locator("input[name=query]").press_sequentially("all_reduce")
    first = page.locator(".md-search-result__link[href*='api/collectives']").first
    expect(first).to_be_attached()
    expect(page.locator(".md-search-result__meta")).to_contain_text("matching document")


def test_folded_answers_open(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "interview_questions"))
    answer = page.locator("article details").first
    inside = answer.locator(":scope > :not(summary)").first
    expect(inside).to_be_hidden()
    answer.locator("summary").first.click()
    expect(inside).to_be_visible()


def test_from_a_lesson_to_its_questions_and_to_the_library(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "lessons"))
    expect(page.locator("article .highlight").first).to_be_visible()
    expect(page.locator("article .output").first).to_be_visible()
    page.locator(".companions").get_by_text("Questions").click()
    page.wait_for_url("**/interview_questions/*.html")
    page.locator(".companions").get_by_text("Write-up").click()
    page.wait_for_url("**/summary/*.html")
    page.locator("article a[href*='../api/']").first.click()
    page.wait_for_url("**/api/**")
    expect(page.locator("article .doc-heading").first).to_be_visible()
    page.locator("article a[href*='lessons/']").first.click()
    page.wait_for_url("**/lessons/*.html")
