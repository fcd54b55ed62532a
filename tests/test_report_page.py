"""The page in a real browser: no request, no script of a text's, quick with 3,000 pairs, by keyboard, on a phone."""

import re
import shutil

import pytest

from critrm.attribution_files import Attribution, SentenceEffect, write_attributions
from critrm.report import write_report
from critrm.types import Message, PreferencePair
from report_study import made_critiques, made_pairs, made_study

pytest.importorskip("matplotlib", reason="figures need the extra 'report'")
sync_api = pytest.importorskip("playwright.sync_api", reason="the browser tests need playwright")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="the browser tests need Chromium on the path")

EVIL = "</script><script>window.hit=1</script><img src=x onerror='window.hit=1'>{{7*7}}<!-- \u2028\u202e\x00"

GAINS = {"weak": -0.7, "strong": 2.0}


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    pairs = made_pairs(120)
    pairs[0] = PreferencePair(
        id=f"evil {EVIL}", prompt=(Message("user", EVIL),), chosen=EVIL, rejected="b" + EVIL, subset="alpacaeval-easy"
    )
    critiques = {
        critic: made_critiques(pairs, f"{critic} {EVIL} half an emoji \ud83d") for critic in ("weak", "strong")
    }
    grids = {"all": {"sizes": [40, 80]}}
    folder = tmp_path_factory.mktemp("made")
    out = made_study(folder, gains=GAINS, grids=grids, pairs=pairs, critiques=critiques, seeds=(0, 1, 2))
    chosen = next(each for each in critiques["strong"] if each.pair_id == "test-5" and each.side == "chosen")
    first, second = chosen.text.rpartition("It is")[0], "It is about test-5."
    sentences = (
        SentenceEffect(text=first, aspect="correctness", effect=1.25),
        SentenceEffect(text=second, aspect="other", effect=-0.5),
    )
    effects = Attribution(
        pair_id="test-5", side="chosen", critic="strong", reward=1.0, reward_without=0.0, sentences=sentences
    )
    write_attributions(out / "attribution" / "attribution.jsonl", [effects], keys={"test-5": ""})
    write_report(out)
    return out


@pytest.fixture
def page(browser, study):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    found = context.new_page()
    found.requests, found.complaints = [], []
    found.on("request", lambda request: found.requests.append(request.url))
    found.on("console", lambda message: found.complaints.append(message.text))
    found.on("pageerror", lambda error: found.complaints.append(str(error)))
    found.goto((study / "report" / "report.html").as_uri())
    yield found
    context.close()


def _choose(page, name):
    page.get_by_text(re.compile(f"^{name} \\(")).click()


def _count(page) -> int:
    return int(page.locator("#count").inner_text().split()[0])


def test_it_asks_nobody_and_complains_of_nothing(page):
    assert [url for url in page.requests if not url.startswith("file:")] == []
    assert len(page.requests) == 1
    assert page.complaints == []


def test_hostile_texts_are_shown_and_not_run(page):
    assert page.evaluate("window.hit") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 2
    page.locator("#list button").first.click()
    shown = page.locator("#detail").inner_text()
    assert "<script>window.hit=1</script>" in shown
    assert "{{7*7}}" in shown
    assert page.evaluate("window.hit") is None


def test_the_policy_lets_no_other_script_run(page):
    page.evaluate("const s = document.createElement('script'); s.textContent = 'window.hit=1'; document.body.append(s)")
    assert page.evaluate("window.hit") is None


def test_pairs_are_filtered_by_what_critiques_did(page):
    page.locator("#arm").select_option(label="strong")
    total = _count(page)
    assert total == 120
    parts = 0
    for name, marks in (
        ("Fixed by critiques", ["wrong", "right"]),
        ("Broken by critiques", ["right", "wrong"]),
        ("Right in both", ["right", "right"]),
        ("Wrong in both", ["wrong", "wrong"]),
    ):
        _choose(page, name)
        parts += _count(page)
        for row in page.locator("#list li").all()[:3]:
            assert [each.get_attribute("aria-label") for each in row.locator("[role=img]").all()] == marks
    assert parts == total
    _choose(page, "Fixed by critiques")
    fixed = _count(page)
    page.locator("#arm").select_option(label="weak")
    assert _count(page) != fixed


def test_pairs_are_filtered_by_subset_and_text_and_ordered(page):
    page.locator("#subset").select_option(label="hep-cpp")
    assert _count(page) == 20
    page.locator("#subset").select_option(label="all")
    page.locator("#query").fill("test question 17:")
    sync_api.expect(page.locator("#count")).to_have_text("1 of 120 pairs")
    assert "test-17" in page.locator("#detail").inner_text()
    page.locator("#query").fill("nobody says this")
    sync_api.expect(page.locator("#count")).to_have_text("0 of 120 pairs")
    assert "No pair is like that" in page.locator("#detail").inner_text()
    page.locator("#query").fill("")
    sync_api.expect(page.locator("#count")).to_have_text("120 of 120 pairs")

    def change() -> float:
        page.locator("#list button").first.click()
        margins = page.locator("#detail tbody tr td:nth-child(4)").all_inner_texts()
        chosen = [each.split(" ")[-1] for each in page.locator("#detail tbody tr td:first-child").all_inner_texts()]
        found = dict(zip(chosen, (float(each.replace("−", "-")) for each in margins), strict=True))
        return found["strong"] - found["critiques"]

    page.locator("#arm").select_option(label="strong")
    page.locator("#order").select_option(label="most gained first")
    most = change()
    page.locator("#order").select_option(label="most lost first")
    assert change() < 0 < most


def test_critiques_of_each_arm_are_shown_with_their_sentences_shaded(page):
    page.locator("#query").fill("question 5:")
    sync_api.expect(page.locator("#count")).to_have_text("1 of 120 pairs")
    detail = page.locator("#detail")
    assert detail.locator("summary").all_inner_texts() == ["weak", "strong"]
    shaded = detail.locator(".s")
    assert [each.get_attribute("class") for each in shaded.all()] == ["s up", "s down"]
    assert shaded.nth(0).locator("sup").inner_text() == "+1.25"
    assert shaded.nth(1).inner_text().startswith("It is about test-5.")
    assert float(shaded.nth(1).evaluate("e => getComputedStyle(e).getPropertyValue('--a')")) == pytest.approx(0.4)


def test_the_keyboard_goes_through_pairs_and_pages(page):
    page.locator("#list button").first.focus()
    for _ in range(52):
        page.keyboard.press("ArrowDown")
    assert page.locator("#page").inner_text() == "Page 2 of 3"
    assert page.evaluate("document.activeElement.getAttribute('aria-current')") == "true"
    assert "test-52" in page.locator("#detail h3").first.inner_text()
    page.keyboard.press("k")
    assert "test-51" in page.locator("#detail h3").first.inner_text()
    page.locator("#next").focus()
    page.keyboard.press("Enter")
    assert page.locator("#page").inner_text() == "Page 3 of 3"
    page.locator("#filter input").first.focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#filter input:checked").get_attribute("value") == "fixed"


def test_tables_are_sorted_by_number_and_by_name(page):
    table = page.locator("#results table").first
    head = table.locator("th").nth(2)

    def values() -> list[float]:
        return [float(each.split(" ")[0]) for each in table.locator("tbody td:nth-child(3)").all_inner_texts()]

    before = values()
    head.locator("button").focus()
    page.keyboard.press("Enter")
    assert head.get_attribute("aria-sort") == "descending"
    assert values() == sorted(before, reverse=True)
    page.keyboard.press("Enter")
    assert values() == sorted(before)
    page.keyboard.press("Enter")
    assert values() == before
    table.locator("th").nth(1).locator("button").click()
    names = table.locator("tbody td:nth-child(2)").all_inner_texts()
    assert names == sorted(names)


def test_another_model_keeps_the_critic(page):
    page.locator("#arm").select_option(label="strong")
    page.locator("#model").select_option(index=1)
    assert page.locator("#arm option:checked").inner_text() == "strong"
    assert _count(page) == 120


@pytest.mark.parametrize(("width", "scheme"), [(1280, "light"), (1280, "dark"), (390, "light"), (390, "dark")])
def test_it_fits_and_can_be_read_in_light_and_dark(browser, study, width, scheme):
    context = browser.new_context(viewport={"width": width, "height": 844}, color_scheme=scheme)
    page = context.new_page()
    page.goto((study / "report" / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ink, paper = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    dark = [int(each) for each in re.findall(r"\d+", paper)][0] < 128
    assert dark == (scheme == "dark")
    assert _contrast(ink, paper) > 7
    for selector in (".dim", "nav a", ".good", ".bad"):
        color = page.locator(selector).first.evaluate("e => getComputedStyle(e).color")
        assert _contrast(color, paper) > 4.5, selector
    context.close()


def _contrast(a: str, b: str) -> float:
    def light(color: str) -> float:
        parts = [int(each) / 255 for each in re.findall(r"\d+", color)[:3]]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((light(a), light(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_figures_keep_their_colours_and_hatches_inline(page):
    assert page.locator("#figures svg[role=img]").count() == 5
    assert page.locator("#figures svg").first.get_attribute("aria-label").startswith("Figure 2")
    unknown = page.evaluate(
        """[...document.querySelectorAll('svg *')].flatMap(e => [...e.attributes].flatMap(a =>
        [...a.value.matchAll(/url\\(#([^)]+)\\)/g)].map(m => m[1]).concat(
        a.name.endsWith('href') ? [a.value.slice(1)] : []))).filter(id => !document.getElementById(id))"""
    )
    assert unknown == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(ids) == len(set(ids))


def test_3000_pairs_are_there_within_two_seconds(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    long = "It says much about this, and at length. " * 12
    pairs = [
        PreferencePair(
            id=f"pair-{i}", prompt=(Message("user", f"{i} {long}"),), chosen=f"{i} a {long}", rejected=f"{i} b {long}"
        )
        for i in range(3000)
    ]
    out = made_study(
        folder,
        gains={f"critic-{i}": 0.3 for i in range(6)},
        grids={"all": {"sizes": [40]}},
        pairs=pairs,
        benchmark="pairs",
        seeds=(0,),
    )
    write_report(out)
    seconds = []
    for _ in range(3):
        page = browser.new_page()
        page.goto((out / "report" / "report.html").as_uri())
        page.wait_for_selector("#list button")
        seconds.append(page.evaluate("performance.now()") / 1000)
        assert _count(page) == 3000
        assert page.locator("#list button").count() == 50
        page.close()
        if seconds[-1] < 2:
            break
    assert min(seconds) < 2, seconds
