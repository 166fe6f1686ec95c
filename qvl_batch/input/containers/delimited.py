"""CSV, and TSV, which has tabs for commas: a row is a record, as RFC 4180 has it.

The first record is the header, with the names of the columns. Values are text, whatever they look like; an empty one is
null. Fields with line breaks, quotes or separators are in double quotes, quotes in them doubled. Blank lines are no
rows.

A record that breaks these rules, or has another number of fields than the header, is a row that cannot be read. If it
is a quote that is never closed, that row is its first line, and the lines after it are read for themselves.
"""

import csv
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa

from qvl_batch.errors import RecordError
from qvl_batch.input.containers.container import Described, Fields, Progress, wanted
from qvl_batch.input.containers.lines import Line, header, is_packed, reading, scanning
from qvl_batch.input.files import FilePath
from qvl_batch.input.units import Piece, Unit, Unread

#: Longest record in bytes. The csv module keeps it as characters one by one.
MOST_BYTES = 1 << 26


@dataclass(frozen=True, slots=True)
class Record:
    """A record: its first line, its fields or why it cannot be read, and whether what follows does not depend on what
    came before it.
    """

    line: Line
    fields: list[str]
    error: RecordError | None = None
    is_border: bool = True


class Csv:
    """CSV and TSV."""

    def describe(self, place: FilePath, progress: Progress) -> Described:
        """As `Container.describe`."""
        with scanning(place, "CSV", progress) as scan:
            records = _records(scan.lines(), place.name)
            names = next(records, None)
            if names is None:
                return scan.described(pa.schema([]))
            if names.error is not None:
                raise ValueError(f"its header cannot be read: line {names.line.number}: {names.error}")
            for record in records:
                scan.row(record.line.offset, record.line.number, may_begin=record.is_border)
            return scan.described(pa.schema([(name, pa.string()) for name in names.fields]))

    def read(self, unit: Unit, fields: Fields, rows_per_table: int) -> Iterator[Piece]:
        """As `Container.read`."""
        with reading(unit) as lines:
            names = next(_records(header(unit), unit.file)).fields
            records = _records(lines, unit.file)
            if is_packed(unit.file):
                next(records)
            for first_row, some in wanted(unit, records, rows_per_table):
                unread: dict[int, Unread] = {}
                columns: dict[str, list[str | None]] = {field.name: [None] * len(some) for field in fields.columns}
                for at, record in enumerate(some):
                    error = record.error
                    if error is None and len(record.fields) != len(names):
                        error = RecordError(f"it has {len(record.fields)} fields, and the header {len(names)}")
                    if error is not None:
                        unread[at] = Unread(f"line {record.line.number}", error)
                        continue
                    for name, value in zip(names, record.fields, strict=True):
                        if name in columns:
                            columns[name][at] = value or None
                table = pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
                yield Piece(first_row, table, unread)


class _Feed:
    """Lines as the csv module takes them: text, one after the other, up to the most bytes of a record.

    Args:
        lines: of the file.
    """

    def __init__(self, lines: Iterator[Line]) -> None:
        self._lines = lines
        self._again: deque[Line] = deque()
        #: Lines that the present record has taken.
        self.taken: list[Line] = []
        #: Why they are no text, if they are none.
        self.error: RecordError | None = None
        self._bytes = 0

    def __iter__(self) -> "_Feed":
        return self

    def __next__(self) -> str:
        if self.taken and (self.taken[-1].error or self._bytes > MOST_BYTES):
            raise StopIteration
        line = self._again.popleft() if self._again else next(self._lines)
        self.taken.append(line)
        self._bytes += len(line.data)
        try:
            return line.data.decode()
        except UnicodeDecodeError as error:
            self.error = RecordError(f"it is not UTF-8: {error}")
            return line.data.decode(errors="replace")

    def begin(self) -> None:
        """Begin with a record."""
        self.taken, self._bytes, self.error = [], 0, None

    def return_all_but_first(self) -> None:
        """Take the lines of the present record after its first as lines of their own."""
        self._again.extendleft(reversed(self.taken[1:]))
        del self.taken[1:]


def _records(lines: Iterator[Line], path: str) -> Iterator[Record]:
    """Records of a text, from the start of one on.

    A record that does not end is read again from its second line on. What was read twice is not read a third time, or
    the time would grow with the square of the text: a second such record in it costs all of its lines.
    """
    delimiter = "\t" if path.lower().removesuffix(".gz").removesuffix(".zst").endswith(".tsv") else ","
    csv.field_size_limit(MOST_BYTES)
    feed, reached = _Feed(lines), 0
    while True:
        feed.begin()
        error: RecordError | None = None
        fields: list[str] = []
        try:
            fields = next(csv.reader(feed, delimiter=delimiter, strict=True))
        except StopIteration:
            return
        except csv.Error as wrong:
            error = RecordError(f"it is no record of CSV: {wrong}")
        first, last = feed.taken[0], feed.taken[-1]
        error = next((line.error for line in feed.taken[:1] if line.error), error)
        if error is None and not first.data.strip(b"\r\n"):
            continue
        is_border = first.offset >= reached
        if error is not None and len(feed.taken) > 1 and is_border:
            reached = last.offset + 1
            feed.return_all_but_first()
            error = RecordError(f"a quote begins in it, and by line {last.number} it is not closed as in CSV: {error}")
        yield Record(first, fields, error or feed.error, is_border)
