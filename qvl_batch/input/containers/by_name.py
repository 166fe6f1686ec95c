"""The container of each file, by the end of its name.

What enters: places of files, later units. What leaves: what the file's own container makes of them.
"""

from collections.abc import Iterator

from qvl_batch.errors import InputError
from qvl_batch.input.containers.arrow import Arrow
from qvl_batch.input.containers.container import Container, Described, Fields, Progress, Reader
from qvl_batch.input.containers.delimited import Csv
from qvl_batch.input.containers.images import Images
from qvl_batch.input.containers.jsonl import JsonLines
from qvl_batch.input.containers.parquet import Parquet
from qvl_batch.input.containers.tar import WebDataset
from qvl_batch.input.endings import kind_of, spelled
from qvl_batch.input.files import FilePath
from qvl_batch.input.input_columns import InputColumns
from qvl_batch.input.units import Lost, Piece, Unit, Unread

CONTAINERS: dict[str, Container] = {
    "parquet": Parquet(),
    "JSON Lines": JsonLines(),
    "CSV": Csv(),
    "Arrow": Arrow(),
    "tar": WebDataset(),
}


def describe(place: FilePath, progress: Progress) -> Described:
    """Look through a file of the input. One whose name says nothing is taken for parquet.

    Raises:
        InputError: it cannot be read.
    """
    kind = kind_of(place.name)
    try:
        return CONTAINERS[kind or "parquet"].describe(place, progress)
    except InputError as error:
        if kind is not None:
            raise
        raise InputError(
            f"{error}; if it is another kind of file, give it a name that ends in one of {spelled()}"
        ) from error


def read(unit: Unit, columns: InputColumns, rows_per_table: int, lost: Lost | None = None) -> Iterator[Piece]:
    """Read the rows of a unit.

    Args:
        unit: rows to read.
        columns: which columns.
        rows_per_table: most rows of a piece.
        lost: if given, all rows are unread, and at most ids and kept columns are read.

    Raises:
        InputError: the file is gone, or has changed.
    """
    is_folder = unit.file.endswith("/")
    container: Reader = Images() if is_folder else CONTAINERS[kind_of(unit.file) or "parquet"]
    fields = Fields(columns.schemas[unit.file_number], columns.names, columns.copied)
    if lost is None:
        yield from container.read(unit, fields, rows_per_table)
        return
    known = lost.known and bool(fields.of_copied().columns)
    pieces = container.read(unit, fields.of_copied(), rows_per_table) if known else _nulls(unit, fields, rows_per_table)
    for piece in pieces:
        where = {row: unread.where for row, unread in piece.unread.items()}
        unread = {row: Unread(where.get(row, ""), lost.error) for row in range(piece.table.num_rows)}
        yield Piece(piece.first_row, piece.table, unread)


def _nulls(unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
    for start, stop in unit.cuts(rows_per_table):
        yield Piece(start, fields.nulls(stop - start))
