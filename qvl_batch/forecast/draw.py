"""Draws the sample: random rows, spread over files and sizes of images.

What enters: the rows to answer. What leaves: places of rows, and how they were drawn.

`PER_ROW` times as many candidates are drawn first, one at random from each of equal intervals of the rows in order, so
that each file, or group of small files, has its share. Their images' headers are read. Then candidates that are close
by, in order of pixels, make strata, and of each a pair is drawn: small images and large ones are there as often as
among the candidates. Images at addresses count as one size, since to fetch them would take long.

Reading a row of a parquet file or a text can take as long as reading its group. If the groups of so many candidates are
larger than `MOST_READ`, the rows are drawn by the intervals alone, and sizes are left to chance.

The seed is fixed: the same rows are drawn again, as long as the same are left.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from qvl_batch.columns import IMAGES, places_of
from qvl_batch.config import ImageRules
from qvl_batch.errors import ImageError
from qvl_batch.forecast.intervals import Design
from qvl_batch.images.formats import opened
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit
from qvl_batch.input.source import Source
from qvl_batch.report.sample import places_at
from qvl_batch.rows import Row, RowSet

#: Candidates for each row, and most bytes of groups that are read for them.
PER_ROW, MOST_READ = 4, 2_000_000_000
#: Rows of a stratum; strata by size, at least, in each group of files.
PAIR, SIZES = 2, 4
#: Rows that are read at a time.
ROWS_PER_TABLE = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """Rows that were drawn.

    Args:
        places: of the rows, in order of strata.
        design: how they were drawn.
        by_size: whether sizes of images were known for it.
    """

    places: tuple[Row, ...]
    design: Design
    by_size: bool

    def of(self, source: Source) -> Source:
        """The source with these rows alone."""
        others = RowSet(file.rows for file in source.files)
        for number, file in enumerate(source.files):
            others.add(number, 0, file.rows)
        for place in self.places:
            others.remove(*place)
        return source.without(others)


def draw(
    source: Source,
    rows: int,
    allowed: Sequence[str],
    rules: ImageRules,
    say: Callable[[str], None] = lambda _: None,
    seed: int = 0,
) -> Sample:
    """Draw rows of a source, or take all if there are no more.

    Args:
        source: what is left to answer, at least one row.
        rows: to draw, at least two.
        allowed: places that images may be read from; addresses among them are not.
        rules: which images are accepted.
        say: receives a line before images are read.
        seed: of the draw.

    Raises:
        InputError: a file is gone or has changed.
    """
    left, chance = source.rows, random.Random(seed)  # noqa: S311  (nothing secret)
    if left <= rows:
        return Sample(tuple(places_at(range(left), source.spans())), Design.of_all(left), by_size=False)
    candidates = places_at(spread(left, min(left, PER_ROW * rows), chance), source.spans())
    size = bytes_to_read(source, candidates)
    if size > MOST_READ:
        say(f"note      headers of {len(candidates):,} images are in {size / 1e9:,.1f} GB: sizes are left to chance")
        candidates = places_at(spread(left, rows, chance), source.spans())
        pixels = dict.fromkeys(candidates, 0)
    else:
        say(f"sample    sizes of the images of {len(candidates):,} rows are read, to draw {rows:,} of them")
        fetcher = Fetcher(tuple(place for place in allowed if "://" not in place))
        everything = Sample(tuple(candidates), Design.of_all(len(candidates)), by_size=False)
        pixels = pixels_of(everything.of(source), fetcher, rules)
    return drawn(left, candidates, pixels, rows, chance)


def drawn(
    population: int, candidates: Sequence[Row], pixels: Mapping[Row, int], rows: int, chance: random.Random
) -> Sample:
    """Draw the second phase.

    Args:
        population: rows that the candidates stand for.
        candidates: in order.
        pixels: of each candidate's images.
        rows: to draw.
        chance: says which.
    """
    strata = _stratified(candidates, pixels, rows)
    chosen = [chance.sample(stratum, count) for stratum, count in strata]
    design = Design(
        population,
        len(candidates),
        tuple(len(stratum) for stratum, _ in strata),
        tuple(number for number, each in enumerate(chosen) for _ in each),
    )
    return Sample(tuple(row for each in chosen for row in each), design, by_size=any(pixels.values()))


def spread(population: int, count: int, chance: random.Random) -> list[int]:
    """A random number of each of `count` equal intervals, ascending."""
    ends = [population * at // count for at in range(count + 1)]
    return [chance.randrange(start, stop) for start, stop in pairwise(ends)]


def _stratified(candidates: Sequence[Row], pixels: Mapping[Row, int], rows: int) -> list[tuple[list[Row], int]]:
    """Strata of candidates, and how many rows to draw of each.

    Args:
        candidates: in order.
        pixels: of each candidate's images.
        rows: to draw in all.
    """
    strata = rows // PAIR
    files = len({file for file, _ in candidates})
    groups = np.array_split(np.arange(len(candidates)), max(1, min(files, strata // SIZES)))
    order = [candidates[at] for group in groups for at in sorted(group, key=lambda at: (pixels[candidates[at]], at))]
    parts = np.array_split(np.arange(len(order)), strata)
    return [([order[at] for at in part], PAIR + (number < rows % PAIR)) for number, part in enumerate(parts)]


def bytes_to_read(source: Source, places: Sequence[Row]) -> int:
    """Bytes of the groups that these rows are in, about; of folders of images, those of the rows."""
    groups: set[tuple[int, int]] = set()
    size = 0.0
    for number, row in places:
        file = source.files[number]
        if number in source.listings:
            size += file.size / file.rows
            continue
        starts = source.groups[number].rows
        group = int(np.searchsorted(starts, row, side="right")) - 1
        if (number, group) not in groups:
            groups.add((number, group))
            size += file.size * int(starts[group + 1] - starts[group]) / file.rows
    return round(size)


def pixels_of(source: Source, fetcher: Fetcher, rules: ImageRules) -> dict[Row, int]:
    """Pixels of the images of each row of a source, by their headers; 0 for images that cannot be read here."""
    pixels: dict[Row, int] = {}
    for unit in source.units():
        for table in read_unit(unit, source.columns, "?", ROWS_PER_TABLE, fetcher):
            for place, images in zip(places_of(table), table[IMAGES].to_pylist(), strict=True):
                pixels[place] = sum(_pixels(image, rules) for image in images or ())
    return pixels


def _pixels(image: bytes, rules: ImageRules) -> int:
    try:
        width, height = opened(image, rules).size
    except ImageError:
        return 0
    return width * height
