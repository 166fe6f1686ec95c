"""Size of the output, from the size of the sample's answers as a file.

What enters: the answers. What leaves: bytes of all parts of the job.

A part has bytes of its own, such as its schema, and bytes of its rows, which compress better in a larger part. The
latter are taken to grow with a power of the rows, of half the sample and the whole of it. A part of more rows than the
sample has between so many and proportionally many; both ends are in the interval, beside the rows that chance drew.

A job writes a part for `ROWS_PER_FILE` rows, or what has come in `SECONDS_PER_FILE`. If there are many small ones, it
merges them at its end.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from qvl_batch.forecast.intervals import Design, Estimate
from qvl_batch.output.compaction import FEWEST
from qvl_batch.output.parts import FOOTER, ROWS_PER_FILE, SMALL_ROWS, PartRecord, Tally, parquet
from qvl_batch.output.writer import SECONDS_PER_FILE

#: Where the time of the job has no interval, how many times as long it is taken to last at most.
SLOW = 2.0


@dataclass(frozen=True, slots=True)
class PartSize:
    """How the bytes of a part grow with its rows.

    Args:
        own: bytes of a part without rows.
        rows: of the sample.
        of_rows: bytes of these rows.
        power: of the rows that their bytes grow with, at most 1.
    """

    own: int
    rows: int
    of_rows: int
    power: float

    @classmethod
    def of(cls, answers: pa.Table) -> "PartSize":
        """Measure answers, of at least one row."""
        own, half, whole = (_bytes(answers.slice(0, rows)) for rows in (0, answers.num_rows // 2, answers.num_rows))
        power = 1.0
        if own < half < whole:
            # Of an odd number of rows, half is one less.
            power = math.log((whole - own) / (half - own)) / math.log(answers.num_rows / (answers.num_rows // 2))
        return cls(own, answers.num_rows, whole - own, min(power, 1.0))

    def part(self, rows: float, power: float) -> float:
        """Bytes of a part of so many rows."""
        return float(self.own + self.of_rows * (rows / self.rows) ** power)


def output_bytes(answers: pa.Table, nbytes: Sequence[int], design: Design, seconds: Estimate) -> Estimate:
    """Bytes of the answers to all rows that the sample stands for.

    Args:
        answers: to the sample, with the columns of the output, in the order of the input.
        nbytes: of each row before compression, in the order of the design.
        design: how the sample was drawn.
        seconds: in which answers come, the job's without start-up.
    """
    size, rows = PartSize.of(answers), design.population
    full = math.ceil(rows / ROWS_PER_FILE)

    def parts(seconds: float) -> int:
        written = min(max(full, math.ceil(seconds / SECONDS_PER_FILE)), rows)
        return full if written >= FEWEST and rows / written < SMALL_ROWS else written

    def total(parts: int, power: float) -> float:
        return parts * size.part(rows / parts, power)

    value = total(parts(seconds.value), size.power)
    mean = design.mean(nbytes)
    if mean.low is None or mean.high is None:
        return Estimate(value)
    # Parts of fewer rows than the sample: the power makes them larger than their share. Of more: smaller.
    slow = SLOW * seconds.value if seconds.high is None else seconds.high
    most = min(rows, full + math.ceil(slow / SECONDS_PER_FILE), math.ceil(rows / SMALL_ROWS) + FEWEST)
    ends = [total(count, power) for count in (full, most) for power in (size.power, 1.0)]
    return Estimate(value, min(ends) * mean.low / mean.value, max(ends) * mean.high / mean.value)


def _bytes(answers: pa.Table) -> int:
    """Bytes of answers as a part; its record of rows is that of consecutive ones."""
    record = PartRecord({0: [(0, answers.num_rows)]}, Tally.of(answers))
    return len(parquet(answers.replace_schema_metadata({FOOTER: record.footer()})))
