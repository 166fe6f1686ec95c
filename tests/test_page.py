"""The report of a comparison in a real browser."""

import re
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browser import complaints, luminance, set_scheme, set_screen, show
from conftest import QUESTIONS, TINY
from faults import assert_points_at, without_normalisation
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from export.comparison.config import CompareConfig
from export.comparison.page import LogAxis, marked, render
from export.comparison.run import compare

ROWS, BROKEN = 16, 2
SPACED = "\n two  lines,\tthe second\n  indented "
CONTROL, ARABIC = "red: \x1b[31m\x00", "كم عدد الأشكال؟"
HOSTILE = '<script>window.ran = true</script><img src=x onerror="window.ran = true"> "What" & \'why\'?'


@pytest.fixture(scope="module")
def outcome(tiny_bundle, tmp_path_factory):
    """A comparison of a damaged bundle: rows that are equal, that differ, and that failed."""
    folder = tmp_path_factory.mktemp("page")
    rows = pq.read_table(QUESTIONS).to_pylist()[:ROWS]
    rows[1]["image"], rows[2]["prompt"], rows[3]["prompt"] = None, "", HOSTILE
    rows[4]["prompt"], rows[5]["prompt"], rows[6]["prompt"] = SPACED, CONTROL, ARABIC
    rows[4]["id"], rows[5]["id"] = "W" * 300, None
    pq.write_table(pa.Table.from_pylist(rows, pq.read_schema(QUESTIONS)), folder / "questions.parquet")
    bundle = shutil.copytree(tiny_bundle.path, folder / "bundle")
    without_normalisation(bundle)
    config = CompareConfig(
        bundle=bundle,
        checkpoint=TINY,
        input=(str(folder / "questions.parquet"),),
        output=folder / "out",
        layers=True,
    )
    return compare(config)


@pytest.fixture
def page(chromium, outcome):
    """The report, just opened."""
    show(chromium, outcome.page)
    yield chromium
    assert complaints(chromium) == []


def _visible(driver):
    return [card for card in driver.find_elements(By.CLASS_NAME, "card") if card.is_displayed()]


def _button(driver, name):
    return driver.find_element(By.CSS_SELECTOR, f"button[data-filter={name}]")


def test_the_verdict_comes_first(page, outcome):
    heading = page.find_element(By.TAG_NAME, "h1")
    assert heading.text == "✗ The bundle differs from its checkpoint"
    assert heading.location["y"] < 100
    reasons = [item.text for item in page.find_elements(By.CSS_SELECTOR, "#verdict li")]
    assert reasons == outcome.summary["verdict"]["reasons"]
    assert "differs" in page.title
    assert f"{BROKEN} of {ROWS} rows could not be compared." in page.find_element(By.ID, "verdict").text


def test_filters_show_what_they_say(page, outcome):
    agreement = outcome.summary["agreement"]
    differing = agreement["ties"] + agreement["real_differences"]
    assert 0 < differing < ROWS - BROKEN
    for name, count in (("differing", differing), ("errors", BROKEN), ("all", ROWS)):
        button = _button(page, name)
        button.click()
        shown = _visible(page)
        assert len(shown) == count
        assert button.text.split()[-1] == str(count)
        assert button.get_attribute("aria-pressed") == "true"
        if name != "all":
            assert {card.get_attribute("data-kind") for card in shown} == {name}
    Select(page.find_element(By.TAG_NAME, "select")).select_by_visible_text("Describe the image.")
    assert 0 < len(_visible(page)) < ROWS
    assert {card.find_element(By.CLASS_NAME, "prompt").text for card in _visible(page)} == {"Describe the image."}
    _button(page, "errors").click()
    assert page.find_element(By.ID, "shown").text == "no such row"


def test_a_prompt_is_found_with_all_its_spaces(page):
    choice = Select(page.find_element(By.TAG_NAME, "select"))
    values = [option.get_attribute("value") for option in choice.options]
    assert values.count("") == 1
    choice.select_by_index(values.index(SPACED))
    (card,) = _visible(page)
    assert card.find_element(By.CLASS_NAME, "prompt").get_property("innerText") == SPACED


def test_differing_words_are_marked(page):
    _button(page, "differing").click()
    for card in _visible(page):
        assert card.find_elements(By.CSS_SELECTOR, ".reference mark, .answer mark")
        assert "Token" in card.text


def test_keys_step_through_rows_and_choose_filters(page):
    def press(key):
        page.switch_to.active_element.send_keys(key)
        return page.switch_to.active_element

    body = page.find_element(By.TAG_NAME, "body")
    body.send_keys("d")
    shown = _visible(page)
    assert _button(page, "differing").get_attribute("aria-pressed") == "true"
    body.send_keys("j")
    assert page.switch_to.active_element == shown[0]
    assert press("j") == shown[1]
    assert page.execute_script("return arguments[0].getBoundingClientRect().top", shown[1]) < 300
    assert press("k") == shown[0]
    assert press("k") == shown[0]
    press("e")
    assert len(_visible(page)) == BROKEN
    press("a")
    assert len(_visible(page)) == ROWS
    # Keys of the browser's own are left alone.
    body.send_keys(Keys.CONTROL, "d")
    assert len(_visible(page)) == ROWS


def test_images_and_text_are_in_the_page_itself(page, outcome):
    source = outcome.page.read_text()
    assert not [
        part for part in ("http://", "https://", '<link rel="stylesheet', "<script src", "@import") if part in source
    ]
    foreign = "return [...document.images].filter((image) => !image.src.startsWith('data:')).length"
    assert page.execute_script(foreign) == 0
    page.set_script_timeout(20)
    loaded = """const done = arguments[0];
        for (const image of document.images) image.loading = "eager";
        Promise.all([...document.images].map((image) => image.decode())).then(() => done(true), done);"""
    assert page.execute_async_script(loaded) is True
    assert len(page.find_elements(By.TAG_NAME, "img")) == ROWS - 1


def test_what_a_row_says_is_text(page):
    assert page.execute_script("return window.ran") is None
    assert HOSTILE in [card.find_element(By.CLASS_NAME, "prompt").text for card in _visible(page)]
    options = [option.get_attribute("textContent") for option in page.find_elements(By.TAG_NAME, "option")]
    assert HOSTILE in options


def test_what_a_page_cannot_hold_is_shown_by_its_picture(page, outcome):
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", outcome.page.read_text())
    shown = {card.find_element(By.CLASS_NAME, "prompt").text: card for card in _visible(page)}
    assert "(no id)" in shown["red: \u241b[31m\u2400"].text
    assert shown[ARABIC].find_element(By.CLASS_NAME, "prompt").value_of_css_property("direction") == "rtl"
    assert shown[ARABIC].find_element(By.CLASS_NAME, "answer").value_of_css_property("direction") == "ltr"


def test_the_page_fits_a_phone_and_the_dark(page, tmp_path):
    assert luminance(page, "body", "backgroundColor") > luminance(page, "body", "color")
    set_scheme(page, "dark")
    set_screen(page, 390, 844)
    for selector in ("body", ".card", ".badge"):
        background = "body" if selector == "body" else selector
        assert luminance(page, selector, "color") - luminance(page, background, "backgroundColor") > 250, selector
    for width in (1200, 390):
        set_screen(page, width, 844)
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
    picture = tmp_path / "phone.png"
    assert page.save_screenshot(str(picture))
    assert picture.stat().st_size > 10_000


def test_the_plots_show_every_row_and_where_drift_begins(page, outcome):
    lines = page.find_elements(By.CSS_SELECTOR, "#layers .lane")
    assert len(lines) == 12
    red = [line.text for line in lines if line.find_elements(By.CSS_SELECTOR, ".own.over")]
    assert red == ["vision.patch_embed"]
    widths = [line.find_element(By.CLASS_NAME, "own").size["width"] for line in lines]
    assert max(widths) == widths[0] > 1.3 * sorted(widths)[-2]
    dots = page.find_elements(By.CSS_SELECTOR, "#stages .dot")
    assert len(dots) == sum(outcome.summary["drift"][stage]["rows"] for stage in ("vision", "prefill", "decode"))


def test_a_bundle_without_normalisation_is_wrong_from_the_first_layer_on(outcome):
    assert_points_at(outcome, "vision.patch_embed", {"vision.patch_embed"})


def test_a_small_gallery_takes_what_differs_first(outcome):
    kinds = ["not compared"] * 9 + ["equal"] * 40 + ["tie", "failed", "real"]
    rows = [
        {"difference": kind, "prompt": str(i), "thumbnail": None, "reference": "a", "answer": "", "id": i}
        | dict.fromkeys(
            (
                "expected",
                "error_side",
                "first_difference",
                "vision_cosine",
                "vision_error",
                "prefill_error",
                "decode_error",
            )
        )
        for i, kind in enumerate(kinds)
    ]
    page = render(rows, outcome.summary, gallery=5)
    assert re.findall('class="badge (.*?)"', page) == ["not-compared"] * 2 + ["tie", "failed", "real"]
    assert "5 of 52" in page
    assert page.count(">(empty)<") == 5
    assert re.findall('class="badge (.*?)"', render(rows, outcome.summary, gallery=1)) == ["real"]
    assert render(rows, outcome.summary, gallery=20).count('class="badge equal"') == 8
    assert "<article" not in render(rows, outcome.summary, gallery=0)


def test_marks_escape_and_cover_whole_words():
    assert marked("a <b> cat", "a <b> dog") == (
        "a &lt;b&gt; <mark>cat</mark>",
        "a &lt;b&gt; <mark>dog</mark>",
    )
    assert marked("one two", "one 2 3") == ("one <mark>two</mark>", "one <mark>2 3</mark>")
    assert marked("", "yes") == ("", "<mark>yes</mark>")
    assert marked("same", "same") == ("same", "same")


def test_the_axis_has_a_place_for_every_value():
    axis = LogAxis.of([1e-8], 1e-3)
    assert [axis.place(value) for value in (0.0, 1e-9, 1e-8, 1e-3, 5.0, float("nan"), float("inf"))] == [
        0, 0, 0, 100, 100, 100, 100
    ]  # fmt: skip
    assert axis.place(10**-5.5) == 50
    assert [label for _, label in axis.ticks] == ["1e-8", "1e-7", "1e-6", "1e-5", "1e-4", "1e-3"]
    assert LogAxis.of([], 0.0).ticks
    # Where nothing drifts, rows do not stand on the bound.
    nothing = LogAxis.of([0.0], 1e-3)
    assert nothing.place(0.0) < nothing.place(1e-3)
