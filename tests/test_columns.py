"""The record between the stages is what `columns` says of it: types, who writes, who reads, who drops."""

from itertools import pairwise

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import QUESTIONS

from qvl_batch.bundle.loading import BundleReference
from qvl_batch.columns import COLUMNS, FAILURE, OWN, STARTED, failure_columns, failures_of, places_of, with_columns
from qvl_batch.config import CaptionConfig
from qvl_batch.images.view import View
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.source import open_source
from qvl_batch.pipeline.crash_guard import AttemptsInMemory, Guarded
from qvl_batch.pipeline.prepare import prepare_guarded
from qvl_batch.pipeline.read import read_units
from qvl_batch.pipeline.stages import AnswerForm, DecoderStage, VisionStage
from qvl_batch.schema import ANSWER_FIELDS, Failure

STEPS = ("read", "prepare", "vision", "decoder")


@pytest.fixture(scope="module")
def stages(tiny_bundle):
    """What each step after reading does with a table, as its worker runs it."""
    attempts, bundle = AttemptsInMemory(), BundleReference.of(tiny_bundle)
    view, sample = View.of(tiny_bundle.manifest.layout.resolution), frozenset({(0, 1)})
    vision = VisionStage(bundle, 2, lambda: "v")
    decoder = DecoderStage(bundle, 8, 2, AnswerForm(16), lambda: "d")
    return {
        "prepare": lambda table: prepare_guarded(table, attempts, view=view, sample=sample),
        "vision": Guarded(vision, "vision", attempts),
        "decoder": Guarded(decoder, "decode", attempts),
    }


@pytest.fixture(scope="module")
def tables(tiny_bundle, stages, tmp_path_factory):
    """The table that each step leaves: of rows of which the third has no image that can be decoded."""
    folder = tmp_path_factory.mktemp("rows")
    rows = pq.read_table(QUESTIONS, columns=["id", "image", "prompt"]).slice(0, 3).to_pylist()
    rows[2]["image"]["bytes"] = b"none"
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    source = open_source(CaptionConfig(bundle=tiny_bundle.path, input=(str(folder),), output=str(folder / "out")))
    units = pa.Table.from_pylist([{name: getattr(unit, name) for name in unit.__slots__} for unit in source.units()])
    (table,) = read_units(units, source.columns, None, Fetcher(()), 8, AttemptsInMemory())
    found = {"read": table}
    for step in STEPS[1:]:
        found[step] = table = stages[step](table)
    return found


@pytest.mark.parametrize("step", STEPS)
def test_a_step_leaves_the_columns_that_are_written_and_not_dropped_yet(step, tables):
    order = (*STEPS, "driver")
    at = order.index(step)
    expected = {
        name: column.type
        for name, column in COLUMNS.items()
        if order.index(column.written_by[0]) <= at < order.index(column.dropped_by)
    }
    found = {field.name: field.type for field in tables[step].schema if field.name.startswith(OWN)}
    assert found == expected
    others = {name for name in tables[step].column_names if not name.startswith(OWN)}
    assert others == {"id", *(field.name for field in ANSWER_FIELDS if step == "decoder")}


@pytest.mark.parametrize(("before", "step"), pairwise(STEPS))
def test_a_step_looks_at_the_columns_that_it_is_said_to_read_and_at_no_others(before, step, tables, stages):
    table = tables[before]
    read = [name for name in table.column_names if name in COLUMNS and step in COLUMNS[name].read_by]
    assert stages[step](table.select(read)).num_rows == 3
    for name in read:
        with pytest.raises(KeyError, match=name):
            stages[step](table.select([other for other in read if other != name]))


def test_every_column_is_written_by_a_step_before_those_that_read_and_drop_it():
    order = (*STEPS, "driver")
    for name, column in COLUMNS.items():
        first, last = order.index(column.written_by[0]), order.index(column.dropped_by)
        readers = [order.index(step) for step in column.read_by]
        assert first < min(readers) <= max(readers) <= last, name
        assert all(first <= order.index(step) < last for step in column.written_by), name


def test_a_failure_travels_to_the_answer(tables):
    expected = [None, None, "image"]
    for step in STEPS[1:3]:
        assert [failure and failure.stage for failure in failures_of(tables[step])] == expected
    assert tables["decoder"]["error_stage"].to_pylist() == expected
    assert places_of(tables["decoder"]) == [(0, 0), (0, 1), (0, 2)]
    assert all(tables["decoder"][STARTED].to_pylist())


def test_failures_become_columns_and_again_failures():
    failures = [None, Failure("image", "ImageError", "no image"), Failure("read", "RecordError", ""), None]
    table = with_columns(pa.table({"id": range(4)}), failure_columns(failures))
    assert table.column_names == ["id", *FAILURE]
    assert failures_of(table) == failures
    assert failures_of(table.slice(0, 0)) == []
