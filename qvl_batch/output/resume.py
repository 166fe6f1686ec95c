"""The output folder of a job: whose answers it holds, and to which rows of the input.

    DIR/part-*.parquet   answers; the footer of each says to which rows
    DIR/_job.json        what the answers depend on: bundle, settings, input files in order of number
    DIR/_run.json        figures of the last run that came to its end, if there was anything left for it to do
    DIR/_report.html     the same as a page
    DIR/_lock*           of the job that is writing, if one is

A job that was stopped, or killed at any moment, is gone on with by the same command: rows that a
part answers are done. There is nothing besides the parts that could be behind or ahead of them.

Why not Ray Data's own checkpoints: they hold every finished id in memory, forget by default what
was done when a run succeeds, and a job resumed on two CPUs stood still. Here ids may repeat, and
rows are known by where they stand.
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, Self, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.columns import places_of, with_columns
from qvl_batch.errors import OutputError
from qvl_batch.output.parts import PARTS, PartRecord, Tally, cannot_write, is_part, part_name, read_part, write_part
from qvl_batch.output.storage import Folder
from qvl_batch.rows import InputFile, Row, RowSet

JOB, RUN, REPORT = "_job.json", "_run.json", "_report.html"
FORMAT = 2
#: Footers that are read at a time: on a network's file system each waits.
READERS = 16
Found = TypeVar("Found")


@dataclass(frozen=True, slots=True)
class Job:
    """What makes a job the one that it is.

    Args:
        settings: whatever answers depend on, by the names that a user knows, as JSON has it.
        files: of the input, in order of number.
    """

    settings: dict[str, Any]
    files: tuple[InputFile, ...]

    @classmethod
    def of(cls, folder: Folder) -> "Job | None":
        """The job whose answers a folder holds, None if it holds none.

        Raises:
            OutputError: there are answers, but nothing says whose.
        """
        path = f"{folder}/{JOB}"
        try:
            found = json.loads(folder.read(JOB))
            if found.pop("format") != FORMAT:
                raise OutputError(f"{path} is of another version of qvl-batch; give another --output, or --overwrite")
            return cls(found["settings"], tuple(InputFile(**file) for file in found["files"]))
        except (FileNotFoundError, NotADirectoryError):
            if folder.names(PARTS):
                raise OutputError(
                    f"{folder} holds {PARTS}, and no {JOB} that says whose answers they are: give another --output"
                ) from None
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read: {error}; give another --output, or --overwrite") from error

    def write(self, folder: Folder) -> None:
        """Say in the folder whose it is."""
        record = {"format": FORMAT, "settings": self.settings, "files": [asdict(file) for file in self.files]}
        folder.write(JOB, json.dumps(record, indent=1).encode() + b"\n")


class OutputFolder:
    """The folder of one job, held as long as the context lasts.

    Args:
        folder: where; it need not exist.
        job: what is to be answered.
        schema: of the answers.
        overwrite: delete what the folder holds.
        retry: of each file, how many rows, from its first on, are not done if they failed.

    Raises:
        OutputError: another job is writing there, it holds answers of another job, is damaged, or cannot be
            written to.
    """

    def __init__(
        self, folder: Folder, job: Job, schema: pa.Schema, *, overwrite: bool, retry: Sequence[int] | None = None
    ) -> None:
        self.folder, self.schema = folder, schema
        self._job, self._overwrite, self._retry = job, overwrite, retry
        self.done = RowSet(file.rows for file in job.files)
        #: Rows to answer again, and the file that holds the error of each.
        self.failed: dict[Row, str] = {}
        #: Counts of the answers that are there.
        self.tally = Tally()
        self._holding = ExitStack()

    def __enter__(self) -> Self:
        try:
            with ExitStack() as holding:
                holding.enter_context(self.folder.held())
                self._refuse_foreign_report()
                if self._overwrite:
                    self._clear()
                self._begin()
                self._read_parts()
                self._holding = holding.pop_all()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def reported(self) -> bool:
        """Whether there is a `_run.json` of the answers that are there."""
        try:
            found = json.loads(self.folder.read(RUN))
            counts = [Counter(found[name]) for name in ("finish_reasons", "errors")]
            return bool(found["rows"] == self.tally.rows and counts == [self.tally.finish_reasons, self.tally.errors])
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def write_report(self, record: dict[str, Any], page: str) -> None:
        """Write `_report.html` and `_run.json`.

        Raises:
            OutputError: the folder cannot be written to.
        """
        text = json.dumps(record, indent=1)
        # Numbers in a list stand in one line. A text has no line breaks in JSON.
        text = re.sub(r"\[\n[\d\s.,-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)
        try:
            # A path that is no UTF-8 may be named in it.
            self.folder.write(REPORT, page.encode(errors="replace"))
            self.folder.write(RUN, text.encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def write_none(self) -> None:
        """No rows in, no rows out, but still a table that says so."""
        write_part(self.folder, part_name(0, 0), self.schema.empty_table(), {})

    def _refuse_foreign_report(self) -> None:
        if self.folder.names(REPORT) and not self.folder.names(JOB):
            raise OutputError(f"{self.folder}/{REPORT} is of something else: delete it, or give another --output")

    def _clear(self) -> None:
        for name, ours in _of_parts(self.folder, is_part):
            if not ours:
                raise OutputError(
                    f"{self.folder}/{name} is damaged, or no file of answers, and --overwrite deletes nothing else: "
                    "move it away, or give another --output"
                )
        # The report is known as the job's by what says whose the parts are. That goes before them: parts
        # alone are refused.
        for name in (REPORT, JOB, RUN, *self.folder.names(PARTS)):
            self.folder.remove(name)

    def _begin(self) -> None:
        """Make sure that the answers are this job's."""
        held = Job.of(self.folder)
        if held is not None:
            check_same_settings(self.folder, "answers", held.settings, self._job.settings)
            if held.files != self._job.files[: len(held.files)]:
                raise OutputError(f"another job has just begun in {self.folder}: try again")
        if held != self._job:
            self._job.write(self.folder)

    def _read_parts(self) -> None:
        for name, record in _of_parts(self.folder, PartRecord.read):
            path = f"{self.folder}/{name}"
            try:
                known = sum(self.done.add(file, *span) for file, each in record.rows.items() for span in each)
            except IndexError as error:
                raise OutputError(f"{path} answers {error}, which the input does not have: delete it") from error
            if known:
                raise OutputError(f"{path} answers {known:,} rows that another file answers too: delete one of them")
            self.tally += record.tally
            if self._retry is not None and record.tally.finish_reasons["error"]:
                self._take_errors_out(name, record, self._retry)

    def _take_errors_out(self, name: str, record: PartRecord, retry: Sequence[int]) -> None:
        answers = with_columns(read_part(self.folder, name), record.places())
        errors = answers.filter(pc.equal(answers["finish_reason"], "error"))
        errors = errors.filter(pa.array([row < retry[file] for file, row in places_of(errors)], pa.bool_()))
        self.tally -= Tally.of(errors)
        for place in places_of(errors):
            self.done.remove(*place)
            self.failed[place] = name


def check_same_settings(output: object, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix results that depend on different settings.

    Raises:
        OutputError: names the first setting that differs, and how.
    """
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise OutputError(
                f"{output} holds {what} with another {name} ({_short(found.get(name))} there, "
                f"{_short(wanted.get(name))} now): give another --output, or --overwrite to start again"
            )


def _of_parts(folder: Folder, read: Callable[[Folder, str], Found]) -> Iterator[tuple[str, Found]]:
    """What parts say of themselves, read a few at a time: those of a hundred million rows would take a gigabyte."""
    names = folder.names(PARTS)
    with ThreadPoolExecutor(READERS) as pool:
        for at in range(0, len(names), 4 * READERS):
            some = names[at : at + 4 * READERS]
            yield from zip(some, pool.map(partial(read, folder), some), strict=True)


def _short(value: object) -> str:
    return textwrap.shorten(json.dumps(value), 80)
