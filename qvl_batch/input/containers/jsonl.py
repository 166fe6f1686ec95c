"""JSON Lines: a row is a line, a JSON object; blank lines are none. Types are those that `values` infers.

A line that is no object in UTF-8, or names a key twice, is a row that cannot be read, and costs no other.
"""

from collections.abc import Iterator

import pyarrow as pa

from qvl_batch.errors import RecordError
from qvl_batch.input.containers.container import Described, Fields, Progress, wanted
from qvl_batch.input.containers.lines import Line, reading, scanning
from qvl_batch.input.containers.values import Types, column, parse_object
from qvl_batch.input.files import FilePath
from qvl_batch.input.units import Piece, Unit, Unread


class JsonLines:
    """JSON Lines."""

    def describe(self, place: FilePath, progress: Progress) -> Described:
        """As `Container.describe`."""
        types, objects = Types(), 0
        first = ""
        with scanning(place, "JSON Lines", progress) as scan:
            for line in _rows(scan.lines()):
                scan.row(line.offset, line.number)
                try:
                    types.add(_parsed(line))
                    objects += 1
                except RecordError as error:
                    first = first or f"line {line.number}: {error}"
            if first and not objects:
                raise ValueError(f"none of its lines is an object; {first}")
            return scan.described(types.schema(), inferred=True)

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`."""
        with reading(unit) as lines:
            for first_row, some in wanted(unit, _rows(lines), rows_per_table):
                unread: dict[int, Unread] = {}
                records = []
                for at, line in enumerate(some):
                    try:
                        records.append(_parsed(line))
                    except RecordError as error:
                        records.append({})
                        unread[at] = Unread(f"line {line.number}", error)
                yield Piece(first_row, table_of(records, fields), unread)


def table_of(records: list[dict[str, object]], fields: Fields) -> pa.Table:
    """Objects as a table."""
    columns = {field.name: column([each.get(field.name) for each in records], field.type) for field in fields.columns}
    return pa.table(columns or {"": pa.nulls(len(records))})


def _rows(lines: Iterator[Line]) -> Iterator[Line]:
    return (line for line in lines if not line.is_blank)


def _parsed(line: Line) -> dict[str, object]:
    if line.error is not None:
        raise line.error
    return parse_object(line.data)
