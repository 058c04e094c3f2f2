"""The site for those who see little, listen to it, have no mouse, or hold it on paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, expect
from reading import Reader, kinds, one

pytestmark = pytest.mark.slow  # builds the site


@pytest.mark.parametrize(("reader", "scheme"), [("desktop", "light"), ("phone", "dark")], indirect=["reader"])
def test_an_accessibility_checker_finds_nothing(reader: Reader, site: Path, scheme: str) -> None:
    found = []
    for name in kinds(site):
        reader.page.emulate_media(color_scheme=scheme)
        page = reader.open(name)
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") == (scheme == "light"), background
        page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
        page.wait_for_timeout(200)  # folds open slowly, and what is half transparent has other contrasts
        results = Axe().run(page).response
        assert len(results["passes"]) > 20, "the checker did not look"
        for violation in results["violations"]:
            for node in violation["nodes"]:
                checks = node["any"] + node["all"] + node["none"]
                found.append(f"{name}: {violation['id']}: {node['html'][:120]}: {checks[0]['message']}")
    assert not found, "\n".join(found)


def test_the_skip_link_is_first(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "lessons"))
    page.keyboard.press("Tab")
    link = page.locator("a.md-skip")
    expect(link).to_be_focused()
    expect(link).to_be_in_viewport()
    page.keyboard.press("Enter")
    page.wait_for_function("location.hash")
    expect(page.locator(":target")).to_be_in_viewport()


def test_one_sees_where_the_keyboard_is(reader: Reader, site: Path) -> None:
    for name in (one(site, "interview_questions"), "interview_questions/index.html", "index.html"):
        page = reader.open(name)
        seen = 0
        for _ in range(60):
            page.keyboard.press("Tab")
            style = page.evaluate(
                "(() => {const one = document.activeElement; if (!one || !one.closest('article')) return null;"
                " const style = getComputedStyle(one);"
                " return [one.outerHTML.slice(0, 80), style.outlineStyle, parseFloat(style.outlineWidth)]})()"
            )
            if style:
                seen += 1
                assert style[1] != "none" and style[2] >= 2, f"{name}: no focus to be seen on {style[0]}"
        assert seen > 4, f"{name}: 60 times Tab does not reach the text"


def test_the_menu_of_a_phone_opens_by_keyboard(reader: Reader) -> None:
    page = reader.open("index.html")
    button = page.locator(".md-header__button[for=__drawer]")
    if page.viewport_size["width"] > 1000:
        expect(button).to_be_hidden()
        return
    link = page.locator(".md-sidebar--primary a", has_text="Glossary").first
    expect(link).to_be_hidden()
    for _ in range(5):
        page.keyboard.press("Tab")
        if button.evaluate("one => one === document.activeElement"):
            break
    expect(button).to_be_focused()
    for key in ("Enter", " "):
        page.keyboard.press(key)
        expect(link).to_be_visible()
        page.keyboard.press(key)
        expect(link).to_be_hidden()


def test_a_fold_opens_with_enter(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "interview_questions"))
    answer = page.locator("article details").first
    inside = answer.locator(":scope > :not(summary)").first
    expect(inside).to_be_hidden()
    answer.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(inside).to_be_visible()
    page.keyboard.press("Enter")
    expect(inside).to_be_hidden()


def test_what_scrolls_is_reached_by_keyboard(reader: Reader, site: Path) -> None:
    for name in kinds(site):
        page = reader.open(name)
        page.wait_for_timeout(100)
        stuck = page.evaluate(
            "[...document.querySelectorAll('article *')].filter(one => one.scrollWidth > one.clientWidth + 1"
            " && ['auto', 'scroll'].includes(getComputedStyle(one).overflowX) && one.checkVisibility()"
            " && one.tabIndex < 0 && !one.querySelector('a, button, [tabindex=\"0\"]'))"
            ".map(one => one.outerHTML.slice(0, 80))"
        )
        assert not stuck, f"{name}: {stuck}"


@pytest.mark.parametrize("scripts", [True, False])
def test_on_paper_all_is_unfolded_and_nothing_is_cut_off(
    browser: Browser, address: str, site: Path, scripts: bool
) -> None:
    context = browser.new_context(java_script_enabled=scripts, color_scheme="dark")
    page = context.new_page()
    for name in kinds(site):
        page.emulate_media(media="screen")
        page.goto(address + name)
        page.emulate_media(media="print")
        for part in ("header", ".md-tabs", ".md-sidebar", ".md-footer", ".md-content__button", "form.filter"):
            expect(page.locator(f"{part}:visible")).to_have_count(0)
        for fold in page.locator("article details").all()[:8]:
            inside = fold.locator(":scope > :not(summary)").first
            expect(inside).to_be_visible()
            assert (inside.bounding_box() or {"height": 0})["height"] > 5, f"{name}: a fold is closed on paper"
        if scripts:  # without them `evaluate` has nothing to run in
            cut = page.evaluate(
                "[...document.querySelectorAll('article pre > code')]"
                ".filter(one => one.scrollWidth > one.clientWidth + 1 || one.scrollHeight > one.clientHeight + 1)"
                ".map(one => one.textContent.slice(0, 60))"
            )
            assert not cut, f"{name}: cut off on paper: {cut}"
            ink = page.evaluate("getComputedStyle(document.querySelector('article p')).color")
            assert ink.startswith(("rgba(0, 0, 0", "rgb(0, 0, 0")), f"{name}: a dark theme prints light ink: {ink}"
    context.close()
