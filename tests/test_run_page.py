"""The report of a run says what its record says, in one file that strangers' text cannot harm."""

import re
from html.parser import HTMLParser

import pytest
from browser import complaints, luminance, set_scheme, set_screen, show
from image_files import image_file
from PIL import Image
from selenium.webdriver.common.by import By

from qvl_batch.report.page import Chart, Histogram, figure, percent, printable, render, time_step
from qvl_batch.report.progress import span
from qvl_batch.report.run_stats import Timeline
from qvl_batch.report.utilization import ADVICE

HOSTILE = '<script>window.ran = true</script><img src=x onerror="window.ran = true"> "What" & \'why\'?'
LONG, BACKWARDS = "W" * 100_000, "\u202e\u0000\u0007\x7f\ud800 right to left שלום"
#: What an HTML page may hold no control characters but.
CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\ud800-\udfff]")


def _jpeg():
    return image_file(Image.new("RGB", (160, 160), "teal"), "JPEG")


def _timeline(*bins):
    timeline = Timeline("rows", "answer_tokens", "errors")
    for at, rows, errors in bins:
        timeline.add(at, rows=rows, answer_tokens=3 * rows, errors=errors)
    return timeline.record()


def _record(**changes):
    """A run of an hour that answered 36,000 rows, 90 of which failed."""
    busy = {"read": 0.02, "image": 0.3, "vision": 0.97, "decoder": 0.6}
    stages = {name: {"seconds": 3_600 * share, "at_once": 1, "busy": share} for name, share in busy.items()}
    stages["decoder"]["parts"] = {"prefill": {"seconds": 1_800, "busy": 0.5}, "decode": {"seconds": 360, "busy": 0.1}}
    record = {
        "finished_at": "2026-01-02T03:04:05+00:00",
        "rows": 36_000, "rows_of_this_run": 36_000,
        "finish_reasons": {"stop": 35_810, "length": 100, "error": 90},
        "errors": {"layout: PromptError": 10, "image: ImageError": 80},
        "error_examples": {"image: ImageError": [{"id": 7, "message": "no image"}, {"id": None, "message": "none"}]},
        "unreadable": {
            "rows": 80,
            "list": "_unreadable.parquet",
            "first": [
                {
                    "id": 7, "file": "/data/a.parquet", "row": 4_242, "error_location": "https://host.example/7.png",
                    "error_stage": "image", "error_type": "ImageError", "error_message": "no image",
                },
                {
                    "id": None, "file": "/data/b.parquet", "row": 0, "error_location": None,
                    "error_stage": "read", "error_type": "RecordError", "error_message": "damaged",
                },
            ],
        },
        "prompt_tokens": 21_600_000, "answer_tokens": 1_152_000,
        "seconds": 3_610.0, "startup_seconds": 3.0, "workers_seconds": 10.0,
        "images_per_second": 9.97, "steady_images_per_second": 10.0, "tokens_per_second": 320.0,
        "hours_per_million": 27.778, "price_per_hour": 1.5, "cost_per_million": 41.667,
        "stages": stages, "advice": ADVICE["vision"],
        "timeline": _timeline(*((10 + at, 10, int(at < 90)) for at in range(3_600))),
        "output": "/data/answers",
        "bundle": {"path": "/data/bundle", "sha256": "ab" * 32, "source": {"name": "model"}, "dtype": "int8"},
        "decoding": {"method": "greedy", "prompt": None, "max_new_tokens": 128},
        "fit": "letterbox", "files": 3, "limit": None, "devices": {"decoder": "cpu", "vision": "cpu"},
        "versions": {"ray": "2.60.0"}, "plan": {"vision_workers": 1, "slots": 32},
    }  # fmt: skip
    return record | changes


def _unreadable(text):
    """The entry of rows of which everything is this text."""
    names = ("id", "file", "error_location", "error_stage", "error_type", "error_message")
    return {"rows": 9, "list": "_unreadable.parquet", "first": [dict.fromkeys(names, text) | {"row": 7}] * 2}


def _shown_row(**changes):
    row = {
        "id": "scene-1", "prompt": "Why?", "thumbnail": _jpeg(), "answer": "yes", "finish_reason": "stop",
        "prompt_tokens": 600, "answer_tokens": 1, "error_stage": None, "error_type": None, "error_message": None,
    }  # fmt: skip
    return row | changes


def _failed_row(**changes):
    failure = {"error_stage": "image", "error_type": "ImageError", "error_message": "no image"}
    nothing = dict.fromkeys(("thumbnail", "answer", "prompt_tokens", "answer_tokens"))
    return _shown_row(finish_reason="error", **failure, **nothing) | changes


class _PageParser(HTMLParser):
    """Elements, their texts, and every attribute of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.texts, self._open = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data):
        self.texts.append(data.strip())

    @property
    def text(self):
        return " ".join(" ".join(self.texts).replace("\u00a0", " ").split())


def test_a_page_says_what_happened_from_verdict_to_settings():
    rows = [_shown_row(), _shown_row(finish_reason="length", answer="a long"), _failed_row(id=12, prompt=None)]
    page = _PageParser(render(_record(), rows))
    parts = [
        "35,910 of 36,000 rows answered, 90 failed",
        "10.00 images/s once workers had started: a million images take 1 d 3 h and cost 41.67",
        "model , int8", "/data/answers", "2026-01-02 03:04 UTC",
        "36,000 rows", "90 failed", "0.2 %", "9.97 including worker start-up",
        "1,152,000 answer tokens", "1 h this run",
        "Throughput", "Stages", "97 %", "60 %", ADVICE["vision"],
        "Errors", "80 image: ImageError", "7 no image", "(no id) none", "10 layout: PromptError",
        "Could not be read", "80 rows are damaged", "_unreadable.parquet in the same folder; the first 2:",
        "7 https://host.example/7.png 4,242 of /data/a.parquet no image", "(no id) 0 of /data/b.parquet damaged",
        "3 of 36,000, chosen at random", "scene-1 Why? yes 600 + 1 tokens", "cut at the token limit",
        "12 (no prompt) image: ImageError no image",
        "Settings", "/data/bundle", "ab" * 32, "max new tokens 128", "slots 32", "ray 2.60.0",
    ]  # fmt: skip
    places = [page.text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert page.tags.count("img") == 2
    assert page.tags.count("article") == 3
    assert page.tags.count("path") == 2


#: What the record of a run with `--confidence` has besides.
SURE = {
    "confidence": {
        "mean": 0.81, "quantiles": {"0.05": 0.304, "0.5": 0.9871}, "histogram": [*([0] * 4), 30, 0, 5, *([100] * 13)]
    },
    "decoding": {"method": "greedy", "abstain_below": 0.35},
    "finish_reasons": {"stop": 35_880, "abstain": 30, "error": 90},
}  # fmt: skip


def _unsure_row(**changes):
    sure = {"confidence": 0.0123, "choice_probabilities": [("yes", 0.6), ("no", 0.399)]}
    return _shown_row(finish_reason="abstain", **sure) | changes


def test_a_page_says_how_sure_the_model_is_and_shows_where_it_is_not():
    rows = [_unsure_row(id="a"), _unsure_row(id="b", confidence=0.2, choice_probabilities=None, finish_reason="stop")]
    page = _PageParser(render(_record(**SURE), [_shown_row(confidence=0.9999)], rows))
    parts = [
        "35,910 of 36,000 rows answered, 90 failed", "30 of 35,910 answers abstain: confidence below 0.35.",
        "How sure the model is", "median 0.99, mean 0.81, 5 % of the answers below 0.30.",
        "below 0.35, answers abstain",
        "Least sure", "2 of 36,000, those with the least confidence",
        "a Why? yes 600 + 1 tokens, confidence 0.01 abstains yes 0.60, no 0.40",
        "b Why? yes 600 + 1 tokens, confidence 0.20",
        "Rows", "600 + 1 tokens, confidence 0.9999", "abstain below 0.35",
    ]  # fmt: skip
    places = [page.text.find(part) for part in parts]
    assert -1 not in places, parts[places.index(-1)]
    assert places == sorted(places)
    plain = _PageParser(render(_record(), [_shown_row()])).text
    assert not [word for word in ("sure", "confidence", "abstain") if word in plain]


@pytest.mark.parametrize("bins", [[0] * 19 + [1], [1] * 20, [3, *[0] * 18, 9_999_999]])
def test_the_chart_of_confidence_holds_every_answer(bins):
    chart = Histogram.of(bins)
    top = float(chart.counts[-1][1].replace(",", ""))
    assert sum(round(height * top / 100) for _, _, height, *_ in chart.bars) == sum(bins)
    assert [number for *_, number in chart.bars] == [count for count in bins if count]
    assert all(0 < height <= 100 for _, _, height, *_ in chart.bars)
    assert max(left + width for left, width, *_ in chart.bars) == pytest.approx(100)
    assert 2 <= len(chart.counts) <= 8
    assert chart.bars[-1][3] == "0.95 to 1"


def test_a_page_needs_nothing_else_and_runs_nothing():
    source = render(_record(), [_shown_row()])
    page = _PageParser(source)
    assert not {"script", "link rel=stylesheet", "iframe", "object"} & set(page.tags)
    addresses = [value for name, value in page.attributes if name in ("src", "href", "srcset", "action", "data")]
    assert addresses
    assert all(value.startswith("data:") for value in addresses)
    assert not [name for name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in source
    assert "@import" not in source


@pytest.mark.parametrize("text", [HOSTILE, LONG, BACKWARDS])
def test_what_strangers_wrote_is_text(text):
    record = _record(
        output=text,
        errors={text: 3},
        error_examples={text: [{"id": text, "message": text}]},
        unreadable=_unreadable(text),
        bundle={"path": text, "sha256": "a", "source": {"name": text}, "dtype": text},
        decoding={"prompt": text, "system_prompt": text},
        versions={text: text},
    )
    record |= {"confidence": SURE["confidence"]}
    unsure = [_unsure_row(id=text, prompt=text, answer=text, choice_probabilities=[(text, 0.5)])]
    source = render(record, [_shown_row(id=text, prompt=text, answer=text), _failed_row(error_message=text)], unsure)
    assert not CONTROLS.search(source)
    plain = _PageParser(render(_record(confidence=SURE["confidence"]), [_shown_row(), _failed_row()], [_unsure_row()]))
    page = _PageParser(source)
    assert set(page.tags) == set(plain.tags)
    assert {name for name, _ in page.attributes} == {name for name, _ in plain.attributes}
    assert printable(text).strip() in page.texts


def test_control_characters_are_shown_by_their_pictures():
    assert printable("a\x00b\tc\nd\x1b\x7f\x9b\ud800") == "a␀b\tc\nd␛␡\ufffd?"
    assert (printable(7), printable(None)) == (7, None)


@pytest.mark.parametrize(
    ("changes", "heading"),
    [
        ({"finish_reasons": {"stop": 36_000}, "errors": {}}, "✓ All 36,000 rows answered"),
        ({"finish_reasons": {"error": 36_000}}, "✗ All 36,000 rows failed"),
        ({"rows": 0, "rows_of_this_run": 0, "finish_reasons": {}, "errors": {}}, "No rows to answer"),
    ],
)
def test_the_heading_is_the_verdict(changes, heading):
    assert f"<h1>{heading}</h1>" in render(_record(**changes), [])


def test_a_run_that_went_on_tells_its_rows_from_earlier_ones():
    page = _PageParser(render(_record(rows=40_000, finish_reasons={"stop": 39_910, "error": 90}), []))
    assert "4,000 rows were answered by earlier runs. Counts cover all rows; speeds" in page.text
    assert "cover the 36,000 rows of this run" in page.text
    assert "earlier runs" not in _PageParser(render(_record(), [])).text


def test_where_nothing_was_left_to_do_nothing_is_made_up():
    record = _record(rows_of_this_run=0, seconds=0.0, stages={}, advice=None, hours_per_million=None)
    for name in ("timeline", "error_examples", "plan"):
        del record[name]
    page = _PageParser(render(record | {"cost_per_million": None}, []))
    assert "this run had nothing left to do" in page.text
    assert not [part for part in ("Throughput", "Stages", "a million images take") if part in page.text]
    assert "80 image: ImageError" in page.text


def test_after_a_few_rows_nothing_is_said_of_a_million():
    text = _PageParser(render(_record(hours_per_million=None, cost_per_million=None), [])).text
    assert "a million images take" not in text
    assert "\u2013 a million images too few rows to tell" in text
    assert "10.00 images/s" in text


def test_without_a_price_the_time_stands_alone():
    text = _PageParser(render(_record(price_per_hour=None, cost_per_million=None), [])).text
    assert "a million images take 1 d 3 h." in text
    assert "--price-per-hour" in text


@pytest.mark.parametrize("seconds", [0.3, 6.6, 59.0, 61.0, 601.3, 86_000.0, 3e6, 4e7])
def test_the_line_holds_every_row_of_a_run_of_any_length(seconds):
    count = 400
    events = [(seconds * (0.1 + 0.89 * at / count), 8, at % 100 == 0) for at in range(count)]
    chart = Chart.of(_record(
        seconds=seconds, timeline=_timeline(*events), rows_of_this_run=8 * count, workers_seconds=seconds / 10,
        steady_images_per_second=8 * count / (0.9 * seconds),
    ))  # fmt: skip
    assert 1 <= len(chart.steps) <= 82
    ends = [end for end, _ in chart.steps]
    assert (ends == sorted(ends), ends[-1]) == (True, 100.0)
    assert all(0 <= height <= 100 for _, height in chart.steps)
    top = float(chart.rates[-1][1].replace(",", ""))
    widths = [end - start for start, end in zip([0.0, *ends], ends, strict=False)]
    area = sum(width * height for width, (_, height) in zip(widths, chart.steps, strict=True)) / 100**2
    assert area * top * seconds == pytest.approx(8 * count, rel=0.01)
    assert sum(errors for *_, errors in chart.errors) == 4
    assert 2 <= len(chart.rates) <= 8
    assert 1 <= len(chart.times) <= 8
    assert chart.started == pytest.approx(10, abs=0.2)


def test_numbers_are_as_people_say_them():
    times = (0.04, 59.9, 60, 3_600, 3_661, 90_061, 10**8)
    assert [span(seconds).replace("\u00a0", " ") for seconds in times] == [
        "0.0 s", "59.9 s", "1 min", "1 h", "1 h 1 min", "1 d 1 h", "1,157 d 9 h"
    ]  # fmt: skip
    assert [percent(share) for share in (0, 0.0001, 0.006, 0.5, 0.994, 0.9999, 1)] == [
        "0 %", "0.01 %", "0.6 %", "50 %", "99.4 %", "99.9 %", "100 %"
    ]  # fmt: skip
    assert [figure(value) for value in (0.0, 0.0123, 3.14159, 41.667, 123.4, 12345.6)] == [
        "0.00", "0.0123", "3.14", "41.67", "123", "12,346"
    ]  # fmt: skip
    assert [time_step(seconds) for seconds in (0.5, 7, 100, 4_000, 10**5, 10**6)] == [1, 2, 30, 900, 21_600, 172_800]


@pytest.fixture
def hostile_page(chromium, tmp_path):
    """A page full of what strangers wrote, in the browser."""
    texts = (HOSTILE, LONG, BACKWARDS.replace("\ud800", ""), "a " * 5_000)
    rows = [_shown_row(id=text, prompt=text[:1_000], answer=text) for text in texts]
    rows += [_failed_row(id=text, prompt=text[:1_000], error_message=text, error_type=text[:200]) for text in texts]
    kinds = {text[:300]: 9 for text in texts}
    record = _record(
        output=LONG, errors=kinds, error_examples={kind: [{"id": kind, "message": kind * 3}] for kind in kinds},
        answer_tokens=10**15, rows=10**9, rows_of_this_run=10**9, decoding={"prompt": LONG}, price_per_hour=1e6,
        cost_per_million=1e12, unreadable=_unreadable(LONG[:300]),
    )  # fmt: skip
    record |= {name: SURE[name] for name in ("confidence", "finish_reasons")}
    record["decoding"] |= {"abstain_below": 0.35}
    unsure = [_unsure_row(id=text, prompt=text[:1_000], choice_probabilities=[(text, 0.5)] * 2) for text in texts]
    path = tmp_path / "report.html"
    path.write_text(render(record, rows, unsure))
    show(chromium, path)
    yield chromium
    assert complaints(chromium) == []


def test_a_browser_shows_it_on_any_screen_in_the_light_and_the_dark(hostile_page):
    assert luminance(hostile_page, "body", "backgroundColor") > luminance(hostile_page, "body", "color")
    for width in (1200, 390):
        set_screen(hostile_page, width, 844)
        hostile_page.execute_script("document.querySelector('details').open = true")
        assert hostile_page.execute_script("return document.documentElement.scrollWidth") <= width
        beyond = """return [...document.querySelectorAll('main *, header *')].filter((element) =>
            element.getBoundingClientRect().right > window.innerWidth + 1).map((element) => element.outerHTML)"""
        assert hostile_page.execute_script(beyond) == []
        sideways = (
            "return [...document.querySelectorAll('.card p, td bdi')].filter((p) => p.scrollWidth > p.clientWidth)"
        )
        assert hostile_page.execute_script(sideways) == []
    set_scheme(hostile_page, "dark")
    for selector in ("body", ".card", ".figures div"):
        assert luminance(hostile_page, selector, "color") - luminance(hostile_page, "body", "backgroundColor") > 250


def test_a_browser_runs_and_loads_nothing(hostile_page):
    assert hostile_page.execute_script("return window.ran") is None
    assert hostile_page.execute_script("return performance.getEntriesByType('resource').length") == 0
    loaded = "return [...document.images].every((image) => image.src.startsWith('data:image/jpeg'))"
    assert hostile_page.execute_script(loaded)
    for image in hostile_page.find_elements(By.TAG_NAME, "img"):
        hostile_page.execute_script("arguments[0].loading = 'eager'", image)
        assert image.size["width"] == image.size["height"] > 50


def test_bars_are_as_long_as_stages_were_busy(hostile_page):
    lanes = hostile_page.find_elements(By.CSS_SELECTOR, "#stages .lane")
    shares = []
    for lane in lanes:
        bars = lane.find_elements(By.CSS_SELECTOR, ".track i")
        whole = lane.find_element(By.CLASS_NAME, "track").size["width"]
        shares.append(sum(bar.rect["width"] for bar in bars) / whole)
    assert shares == pytest.approx([0.02, 0.3, 0.97, 0.6], abs=0.01)


def test_bars_of_confidence_are_where_and_as_high_as_they_say(hostile_page):
    box = hostile_page.find_element(By.CSS_SELECTOR, "#confidence .box").rect
    bars = hostile_page.find_elements(By.CSS_SELECTOR, "#confidence .bar")
    assert [bar.get_attribute("title") for bar in bars][:2] == ["30 of 0.2 to 0.25", "5 of 0.3 to 0.35"]
    heights = [bar.rect["height"] / bars[-1].rect["height"] for bar in bars]
    assert heights == pytest.approx([0.3, 0.05, *([1] * 13)], abs=0.02)
    assert (bars[0].rect["x"] - box["x"]) / box["width"] == pytest.approx(0.2, abs=0.01)
    least = hostile_page.find_element(By.CSS_SELECTOR, "#confidence .box .least").rect
    assert (least["x"] - box["x"]) / box["width"] == pytest.approx(0.35, abs=0.01)
