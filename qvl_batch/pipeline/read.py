"""The stage that reads: units of rows become tables.

It runs in short tasks, in many processes, so this module imports no ONNX Runtime.
"""

from collections.abc import Iterable, Iterator

import pyarrow as pa

from qvl_batch.clock import Clock
from qvl_batch.columns import seconds_column, with_columns
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.input_columns import InputColumns
from qvl_batch.input.reader import read_unit
from qvl_batch.input.units import Lost, Unit
from qvl_batch.pipeline.crash_guard import Attempts, GuardedRead


def read_units(
    units: pa.Table,
    columns: InputColumns,
    prompt: str | None,
    fetcher: Fetcher,
    rows_per_table: int,
    attempts: Attempts,
) -> Iterator[pa.Table]:
    """Read units in tables of at most so many rows.

    Args:
        units: one a row, the fields of `Unit` as columns.
        columns: which columns to read, and as what.
        prompt: asked of every row in place of its prompt column.
        fetcher: reads images that are not in the file itself.
        rows_per_table: bound on the memory in use.
        attempts: counts attempts at rows.
    """

    def read(unit: Unit, rows_per_table: int, lost: Lost | None = None) -> Iterator[pa.Table]:
        return read_unit(unit, columns, prompt, rows_per_table, fetcher, lost)

    guarded = GuardedRead(read, rows_per_table, attempts)
    yield from timed(guarded([Unit(**unit) for unit in units.to_pylist()]))


def timed(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Add to each table the seconds that it took to produce, consumer time excluded."""
    clock, coming = Clock(), iter(tables)
    while True:
        with clock.running():
            table = next(coming, None)
        if table is None:
            return
        seconds = seconds_column("read", clock.take(), table.num_rows) if table.num_rows else {}
        yield with_columns(table, seconds)
