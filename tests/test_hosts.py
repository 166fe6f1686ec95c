"""A run's report says whose images failed, and why most did, in memory that does not grow with the hosts."""

import random
from collections import Counter

import pyarrow as pa
import pytest
from test_run_page import BACKWARDS, HOSTILE, _PageParser, _record

from qvl_batch.columns import COLUMNS, LOCATIONS, located
from qvl_batch.output.parts import Tally
from qvl_batch.report import hosts as module
from qvl_batch.report.hosts import HostFailures, reason_of
from qvl_batch.report.page import render
from qvl_batch.report.summary import Report
from qvl_batch.schema import Failure, image_number


def _table(*rows):
    """Rows as the hosts of their images, the stage that failed, and its message."""
    hosts, stages, messages = zip(*rows, strict=True)
    text = {"error_stage": stages, "error_message": messages}
    columns = {name: pa.array(values, pa.string()) for name, values in text.items()}
    places = [row and [host and f"https://{host}/a.png" for host in row] for row in hosts]
    return located(pa.table({LOCATIONS: pa.array(places, COLUMNS[LOCATIONS].type), **columns}))


def _record_of(*rows):
    counted = HostFailures()
    for row in rows:
        counted.add(_table(row))
    return counted.record()


def _lost(host, at, why="404 Not Found"):
    return ([host], "image", f"https://{host}/{at} cannot be read: {why}")


def test_failures_are_counted_by_host_with_their_commonest_reason():
    fine = (["a.example"], None, None)
    record = _record_of(
        _lost("a.example", 1), fine, _lost("a.example", 2, "403 Forbidden"), _lost("a.example", 3), fine,
        _lost("b.example:8080", 1),
        (["c.example", "a.example", None], None, None),
        (["c.example", "a.example"], "image", "image 2 of 2: https://a.example/4 cannot be read: 404 Not Found"),
        (["c.example", "c.example"], "image", "the 2 images have 9 bytes; the limit is 8"),
        (["d.example"], "decode", "the answer repeats itself"),
        ([None], "image", "a.png cannot be read: FileNotFoundError"),
        ([], "layout", "the prompt is null"),
        (None, "read", "the row cannot be read"),
    )  # fmt: skip
    assert record == {
        "hosts": 4,
        "failing": 2,
        "are_all": True,
        "most_failures": [
            {"host": "a.example", "failures": 4, "rows": 7, "reason": "cannot be read: 404 Not Found"},
            {"host": "b.example:8080", "failures": 1, "rows": 1, "reason": "cannot be read: 404 Not Found"},
        ],
    }


def test_a_run_without_addresses_has_no_hosts():
    assert _record_of(([None], "image", "it is no image"), ([], None, None)) is None


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("https://a/b%20c?d cannot be read: 404 Not Found", "cannot be read: 404 Not Found"),
        ("image 2 of 3: https://a/b did not arrive within 30 s", "did not arrive within 30 s"),
        ("https://aaaaaaa… (1,234 characters) cannot be read: 500", "cannot be read: 500"),
        (
            "https://a/b is redirected to http://c/d?…, which is not inside any address of --allow-images-from",
            "is redirected to … which is not inside any address of --allow-images-from",
        ),
        ("it is no image of a known format", "it is no image of a known format"),
    ],
)
def test_reasons_of_different_images_are_alike(message, reason):
    assert reason_of(message) == reason


def test_the_number_of_an_image_is_read_as_it_was_written():
    failure = Failure("image", "ImageError", "https://a/b cannot be read")
    for count in (2, 12):
        assert image_number(failure.of_image(2, count).message, count) == 2
    assert image_number(failure.of_image(1, 1).message, 1) == 1
    assert image_number("image 9 of 3: x", 3) is image_number("the 3 images have 9 bytes", 3) is None


def test_hosts_with_most_failures_are_found_among_any_number_of_hosts(monkeypatch):
    monkeypatch.setattr(module, "MOST_HOSTS", 200)
    draw = random.Random(7)  # noqa: S311
    names = [f"bad{at % 5}.example" for at in range(1000)] + [f"{at}.example" for at in range(5000)]
    draw.shuffle(names)
    counted, failures = HostFailures(), Counter(names)
    for at in range(0, len(names), 8):
        counted.add(_table(*(_lost(name, at, f"reason {at}") for name in names[at : at + 8])))
        assert len(counted._hosts) <= 208  # noqa: SLF001
    record = counted.record()
    assert not record["are_all"]
    assert len(record["most_failures"]) == 20
    assert {each["host"] for each in record["most_failures"][:5]} == {f"bad{at}.example" for at in range(5)}
    for each in record["most_failures"]:
        assert 0 < each["failures"] <= failures[each["host"]]


def test_a_reason_of_most_failures_is_found_among_any_number_of_reasons():
    rows = [_lost("a.example", at, f"reason {at}") for at in range(400)]
    rows += [_lost("a.example", at) for at in range(500)]
    random.Random(7).shuffle(rows)  # noqa: S311
    counted = HostFailures()
    counted.add(_table(*rows))
    (host,) = counted.record()["most_failures"]
    assert (host["failures"], host["reason"]) == (900, "cannot be read: 404 Not Found")
    assert len(counted._hosts["a.example"].reasons) <= module.MOST_REASONS  # noqa: SLF001


def _hosts(**changes):
    most = [{"host": "a.example", "failures": 1_234, "rows": 5_678, "reason": "cannot be read: 404 Not Found"}]
    return {"hosts": 9_000, "failing": 17, "are_all": True, "most_failures": most} | changes


def test_the_page_and_the_summary_show_failures_by_host():
    page = _PageParser(render(_record(hosts=_hosts()), [])).text
    assert "Failures by host Images of 17 of 9,000 hosts failed in this run; those with the most failures:" in page
    assert "a.example 1,234 5,678 cannot be read: 404 Not Found" in page
    said = str(Report("out", Tally(), details={"hosts": _hosts()}))
    assert (
        "hosts     17 of 9,000 with failed images, most of a.example, 1,234 of its 5,678 rows: "
        "cannot be read: 404 Not Found\n"
    ) in said
    page = _PageParser(render(_record(hosts=_hosts(are_all=False)), [])).text
    assert "Images of at least 17 of at least 9,000 hosts failed" in page
    assert "Hosts with few failures were forgotten" in page
    none = _hosts(failing=0, most_failures=[])
    assert "Failures by host" not in render(_record(hosts=none), []) + render(_record(), [])
    assert "hosts  " not in str(Report("out", Tally(), details={"hosts": none}))


def test_hosts_and_reasons_of_strangers_cannot_harm_the_page():
    most = [{"host": HOSTILE, "failures": 1, "rows": 1, "reason": HOSTILE + BACKWARDS}]
    page = render(_record(hosts=_hosts(most_failures=most)), [])
    assert "<script>window" not in page
    assert "\u0007" not in page
