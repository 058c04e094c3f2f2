"""The site in a real browser, wide and narrow: it draws, it reads, and it asks nobody for anything.

How it is read by those who see, hear or print it otherwise: test_site_access.py.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from playwright.sync_api import Route, expect
from reading import Reader, kinds, one

pytestmark = pytest.mark.slow  # builds the site


def all_pages(site: Path) -> list[str]:
    chapters = [path.relative_to(site).as_posix() for path in sorted(site.glob("*/[0-9][0-9]_*.html"))]
    others = ["CONTRIBUTING.html", "CHANGELOG.html", "api/index.html", "api/collectives/plain.html"]
    return [*dict.fromkeys([*kinds(site), *chapters, *others])]


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


def finds_a_function(reader: Reader) -> None:
    page = reader.page
    if page.viewport_size["width"] < 1000:
        page.locator(".md-header__button[for=__search]").click()
    page.locator("input[name=query]").click()
    page.locator("input[name=query]").press_sequentially("all_reduce")
    first = page.locator(".md-search-result__link[href*='api/collectives/']").first
    expect(first).to_be_attached()
    expect(page.locator(".md-search-result__meta")).to_contain_text("matching document")


def test_search_finds_a_function(reader: Reader) -> None:
    index = re.compile("search_index.json$")
    asked: list[str] = []
    reader.page.on("request", lambda request: asked.append(request.url) if index.search(request.url) else None)
    page = reader.open("index.html")
    page.wait_for_load_state("networkidle")
    assert not asked, "the index is loaded before anybody searches"
    finds_a_function(reader)
    assert len(asked) == 1


def test_an_address_with_a_query_searches(reader: Reader) -> None:
    page = reader.open("index.html?q=all_reduce")
    expect(page.locator(".md-search-result__meta")).to_contain_text("matching document")


def test_search_finds_a_function_without_a_server(reader: Reader, site: Path) -> None:
    reader.address = site.as_uri() + "/"
    context = reader.page.context
    context.unroute_all()
    context.route(re.compile("^(?!file:|data:|blob:)"), lambda route: reader.wrong.append(route.request.url))
    for name in ("index.html", one(site, "lessons")):
        reader.open(name)
        finds_a_function(reader)
    assert reader.page.locator(".md-search-result__link").first.get_attribute("href").startswith("file:")


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


def test_pages_are_light(reader: Reader, site: Path, sent: list[tuple[str, int]]) -> None:
    lessons = sorted(path.relative_to(site).as_posix() for path in site.glob("lessons/[0-9][0-9]_*.html"))
    for name, limit in {"index.html": 1_000_000, **dict.fromkeys(lessons, 2_000_000)}.items():
        context = reader.page.context.browser.new_context(viewport=reader.page.viewport_size)  # nothing is cached
        sent.clear()
        page = context.new_page()
        page.goto(reader.address + name, wait_until="load")
        page.wait_for_load_state("networkidle")
        context.close()
        total = sum(size for _, size in sent)
        largest = sorted(sent, key=lambda one: -one[1])[:3]
        assert 50_000 < total < limit, f"{name} loads {total} bytes; the largest are {largest}"


def test_short_answers_are_folded_too(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "interview_questions"))
    for heading in page.locator("article h2").all()[:3]:
        summary = heading.locator("xpath=following-sibling::*[1]/summary")
        expect(summary).to_have_text("In 30 seconds")
        expect(summary.locator("xpath=following-sibling::*[1]")).to_be_hidden()


def test_a_hundred_characters_fit_a_screen(reader: Reader, site: Path) -> None:
    page = reader.open(one(site, "lessons"))
    fit = page.evaluate(
        "(() => {const code = document.querySelector('article pre > code'), style = getComputedStyle(code);"
        " const one = document.createElement('span'); one.textContent = 'x'.repeat(100); code.append(one);"
        " return (code.clientWidth - 2 * parseFloat(style.paddingLeft)) / one.getBoundingClientRect().width * 100})()"
    )
    assert fit >= (100 if page.viewport_size["width"] == 1280 else 40), fit
    expect(page.locator("article .output .md-code__nav:visible")).to_have_count(0)


def test_figures_keep_letters_that_can_be_read(reader: Reader, site: Path) -> None:
    for path in sorted(site.glob("lessons/[0-9][0-9]_*.html")):
        page = reader.open(f"lessons/{path.name}")
        scales = page.locator("article p > img").evaluate_all("all => all.map(one => one.width / one.naturalWidth)")
        assert scales and min(scales) > 0.9, (path.name, scales)  # their letters are 9 points high


@pytest.mark.parametrize("font", [True, False])
def test_indices_are_lower_and_exponents_higher(reader: Reader, font: bool) -> None:
    if not font:
        names = re.compile(r"font-family:[^;]+, math;")

        def without(route: Route) -> None:
            sheet = route.fetch().text()
            assert names.search(sheet)
            route.fulfill(body=names.sub("font-family: 'DejaVu Serif', serif;", sheet), content_type="text/css")

        reader.page.context.route("**/assets/site.css", without)
    page = reader.open("lessons/01_model_and_its_costs.html")
    shifts = page.evaluate(
        "[...document.querySelectorAll('msub, msup')].filter(one => one.checkVisibility()).map(one => {"
        " const [base, script] = [...one.children].map(part => part.getBoundingClientRect());"
        " return one.tagName === 'msub' ? script.bottom - base.bottom : base.top - script.top})"
    )
    assert len(shifts) > 5 and min(shifts) > 1, shifts


def test_figures_of_lessons_are_vectors(reader: Reader, site: Path) -> None:
    for path in sorted(site.glob("lessons/[0-9][0-9]_*.html")):
        page = reader.open(f"lessons/{path.name}")
        sources = page.locator("article img").evaluate_all("all => all.map(one => one.src)")
        assert sources and all(source.endswith(".svg") for source in sources), sources


def test_the_drawing_of_the_chapters(reader: Reader) -> None:
    page = reader.open("index.html")
    outside = page.evaluate(
        "[...document.querySelectorAll('.reading-order rect')].flatMap(rect => {"
        " const box = rect.getBoundingClientRect();"
        " return [...rect.parentNode.querySelectorAll('text')].filter(text => {"
        "  const r = text.getBoundingClientRect();"
        "  return r.width < 5 || r.left < box.left || r.right > box.right || r.top < box.top || r.bottom > box.bottom"
        " }).map(text => text.textContent)})"
    )
    assert not outside, f"words outside their box: {outside}"
    small = page.locator(".reading-order text").first.evaluate("text => text.getBoundingClientRect().height")
    assert small >= 11, "too small to read"
    page.locator(".reading-order a").first.click()
    page.wait_for_url("**/lessons/*.html")


def test_code_of_the_library_stands_in_the_write_up(reader: Reader) -> None:
    page = reader.open("summary/03_data_parallel.html")
    expect(page.get_by_text("def all_reduce_gradients").first).to_be_visible()
    folded = page.locator("details.listing").filter(has_text="GradientBuckets")
    expect(folded.locator("pre")).to_be_hidden()
    folded.locator("summary").click()
    expect(folded.get_by_text("class GradientBuckets").first).to_be_visible()
    page.locator("p.listing a", has_text="GradientBuckets").click()
    page.wait_for_url("**/api/parallel/data.html#picotron_mini.parallel.data.GradientBuckets")
    source = page.locator(".doc-contents:has(> details.mkdocstrings-source) > details.mkdocstrings-source").first
    source.locator("summary").click()
    expect(source.locator("pre", has_text=re.compile("def|class")).first).to_be_visible()


def test_terms_lead_to_the_glossary(reader: Reader, site: Path) -> None:
    for name in (one(site, folder) for folder in ("lessons", "summary", "interview_questions")):
        page = reader.open(name)
        assert page.locator("article a.term").count() > 2
        assert not page.locator(":is(h1, h2, h3, code, summary, a) a.term").count()
        links = page.locator("article a.term").evaluate_all("all => all.map(a => a.getAttribute('href'))")
        assert len(links) == len(set(links)), "a term is linked at its first use only"
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    term = page.locator("article a.term:visible").first
    word = term.inner_text().rstrip("s").lower()
    term.click()
    page.wait_for_url("**/summary/glossary.html#*")
    assert word.split()[0] in page.locator(":target").inner_text().lower()


def shown(reader: Reader) -> list[tuple[str, str]]:
    """Chapter and level of each question that the page of all questions shows."""
    return [
        tuple(pair)
        for pair in reader.page.locator("details.asked:visible").evaluate_all(
            "all => all.map(one => [one.dataset.chapter, one.dataset.level])"
        )
    ]


def test_questions_are_filtered_by_keyboard_and_by_address(reader: Reader) -> None:
    page = reader.open("interview_questions/index.html")
    everything = shown(reader)
    assert len(everything) > 20 and len({chapter for chapter, _ in everything}) > 1
    page.evaluate("window.here = true")  # a page that is loaded anew forgets it
    page.get_by_label("design", exact=True).focus()
    page.keyboard.press("Space")
    design = shown(reader)
    assert design == [pair for pair in everything if pair[1] == "design"] and design
    expect(page.locator(".filter output")).to_have_text(f"{len(design)} of {len(everything)} questions")
    assert page.url.endswith("#level=design")
    page.get_by_label(re.compile(r"\b03 ")).focus()
    page.keyboard.press("Space")
    both = shown(reader)
    assert both == [pair for pair in design if pair[0] == "03"] and both
    assert page.url.endswith("#chapter=03&level=design")
    assert page.locator("article section h2:visible").count() == 1, "a chapter without questions shows no heading"
    assert page.evaluate("window.here") is True
    page.reload()
    assert shown(reader) == both, "the address says what was chosen"
    expect(page.get_by_label("design", exact=True)).to_be_checked()
    page.evaluate("location.hash = '#chapter=00&level=warm-up,advanced'")
    page.wait_for_function("document.querySelector('[value=advanced]').checked")
    assert {chapter for chapter, _ in shown(reader)} == {"00"} and "warm-up" in {level for _, level in shown(reader)}
    page.evaluate(
        "location.hash = '#' + document.querySelector('[data-chapter=\"03\"]').parentNode.querySelector('h2').id"
    )
    page.wait_for_function("document.querySelectorAll('.filter :checked').length === 0")
    assert shown(reader) == everything, "a link to a chapter that was not chosen shows it"
    expect(page.locator("article h2", has_text="03 ")).to_be_in_viewport()
    page.get_by_label("design", exact=True).check()
    page.get_by_text("Show all").focus()
    page.keyboard.press("Enter")
    page.wait_for_function("!location.hash")
    assert shown(reader) == everything


def test_a_question_of_the_list_opens_and_leads_to_its_page(reader: Reader) -> None:
    page = reader.open("interview_questions/index.html")
    asked = page.locator("details.asked").nth(2)
    asked.locator("summary").click()
    asked.locator("a", has_text="The deep answer").click()
    page.wait_for_url("**/interview_questions/00_*.html#q3-*")
    expect(page.locator(":target")).to_be_in_viewport()


def test_without_scripts_all_questions_are_there(reader: Reader) -> None:
    expected = len(shown(reader)) if reader.open("interview_questions/index.html") else 0
    context = reader.page.context.browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(reader.address + "interview_questions/index.html#level=design")
    assert page.locator("details.asked:visible").count() == expected
    expect(page.locator("form.filter")).to_be_hidden()
    page.locator("details.asked summary").first.click()
    expect(page.locator("details.asked a", has_text="The deep answer").first).to_be_visible()
    context.close()
