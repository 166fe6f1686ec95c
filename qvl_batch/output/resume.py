"""The output folder of a job: which job its answers belong to, and which rows of the input are done.

    DIR/part-*.parquet   answers; the footer of each says which rows of the input it answers
    DIR/_job.json        what the answers depend on: bundle, settings, input files in order of number
    DIR/_images-*        the images of each folder of images in the input, as it was listed
    DIR/_run.json        figures of the last run that finished and had rows to answer
    DIR/_report.html     the same as a page
    DIR/_unreadable.parquet   rows that could not be read
    DIR/_plan.*          the forecast of `--plan`, which is no job's; `--overwrite` deletes it
    DIR/_lock*           the lock of the job that is writing, if one is

What enters: a folder and a job. What leaves: the rows that are done, and counts of their answers; or an `OutputError`.
A job that was stopped, or killed at any moment, is resumed by the same command. The footers of the parts are the only
record of progress, so no other record can be behind or ahead of them. Parts that another one replaces are removed
before anything else: a job was killed when it merged them (see `compaction`).

Ray Data's own checkpoints are not used: they hold every finished id in memory, by default forget all progress when a
run succeeds, and a job resumed on two CPUs stalled. Here ids need not be unique: rows are identified by their place.
"""

import json
import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from qvl_batch.columns import place_columns, places_of, with_columns
from qvl_batch.errors import OutputError
from qvl_batch.input.containers.images import fingerprint
from qvl_batch.output.parts import (
    PARTS,
    PartNotes,
    PartRecord,
    Tally,
    cannot_write,
    is_part,
    parquet,
    part_name,
    read_each,
    read_part,
    write_part,
)
from qvl_batch.output.storage import Folder
from qvl_batch.output.unreadable import UNREADABLE, Unreadable, is_listed, remove_list, write_list
from qvl_batch.rows import InputFile, Row, RowSet
from qvl_batch.schema import ID

JOB, RUN, REPORT = "_job.json", "_run.json", "_report.html"
#: A forecast, as values and as a page.
PLAN, PLAN_PAGE = "_plan.json", "_plan.html"
#: Listings of folders of images, which are files of the input.
LISTINGS = "_images-*.parquet"
FORMAT = 4


@dataclass(frozen=True, slots=True)
class Job:
    """The identity of a job: everything that its answers depend on.

    Args:
        settings: JSON values, by the names of the options that users know.
        files: of the input, in order of number.
        listings: of the folders of images among them, by number.
    """

    settings: dict[str, Any]
    files: tuple[InputFile, ...]
    listings: Mapping[int, pa.Table] = field(default_factory=dict, compare=False)

    @classmethod
    def of(cls, folder: Folder) -> "Job | None":
        """The job that a folder belongs to, None if there is none yet.

        Raises:
            OutputError: there are answers without `_job.json`, or it cannot be read or is of another version.
        """
        path = f"{folder}/{JOB}"
        try:
            found = json.loads(folder.read(JOB))
            if found.pop("format") != FORMAT:
                raise OutputError(
                    f"{path} was written by another version of qvl-batch; give another --output, or --overwrite"
                )
            return cls(found["settings"], tuple(InputFile(**file) for file in found["files"]))
        except (FileNotFoundError, NotADirectoryError):
            if folder.names(PARTS):
                raise OutputError(
                    f"{folder} holds {PARTS}, but no {JOB} that says which job they belong to: give another --output"
                ) from None
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise OutputError(f"{path} cannot be read: {error}; give another --output, or --overwrite") from error

    def write(self, folder: Folder) -> None:
        """Write `_job.json`, which makes the folder this job's; before it, the listings that it refers to."""
        there = set(folder.names(LISTINGS))
        for number, listing in self.listings.items():
            if (name := _listing_name(self.files[number])) not in there:
                folder.write(name, parquet(listing))
        record = {"format": FORMAT, "settings": self.settings, "files": [asdict(file) for file in self.files]}
        folder.write(JOB, json.dumps(record, indent=1).encode() + b"\n")


def read_listing(folder: Folder, file: InputFile) -> pa.Table:
    """The listing of a folder of images that is a file of the job in an output folder.

    Raises:
        OutputError: it is not there, or is damaged.
    """
    name = _listing_name(file)
    try:
        with folder.open(name) as opened:
            listing = pq.read_table(opened)
        is_damaged = fingerprint(listing) != file.fingerprint
    except (OSError, KeyError, pa.ArrowException) as error:
        raise _no_listing(f"{folder}/{name}", file, f"cannot be read: {error}") from error
    if is_damaged:
        raise _no_listing(f"{folder}/{name}", file, "is damaged")
    return listing


def _no_listing(path: str, file: InputFile, why: str) -> OutputError:
    what = f"which has the images of {file.path} as they were when this job began"
    return OutputError(f"{path}, {what}, {why}; give another --output, or --overwrite")


def _listing_name(file: InputFile) -> str:
    return f"_images-{file.fingerprint[:16]}.parquet"


class OutputFolder:
    """The folder of one job, held as long as the context lasts.

    Args:
        folder: need not exist.
        job: the job to run or to resume.
        schema: of the answers.
        overwrite: delete the answers and records that the folder holds.
        retry: with `--retry-errors`, for each file of the input, how many of its first rows are answered again if they
            failed.

    Entering the context raises OutputError if another job is writing there, or if the folder holds answers of another
    job, is damaged or cannot be written to.
    """

    def __init__(
        self, folder: Folder, job: Job, schema: pa.Schema, *, overwrite: bool, retry: Sequence[int] | None = None
    ) -> None:
        self.folder, self.schema = folder, schema
        self._job, self._overwrite, self._retry = job, overwrite, retry
        self.done = RowSet(file.rows for file in job.files)
        #: Rows to answer again, and the name of the part that holds the error of each.
        self.failed: dict[Row, str] = {}
        #: Counts of the answers of rows that are done.
        self.tally = Tally()
        self.notes = PartNotes()
        self._holding = ExitStack()

    def __enter__(self) -> Self:
        try:
            with ExitStack() as holding:
                holding.enter_context(self.folder.held())
                self._refuse_foreign_report()
                if self._overwrite:
                    self._clear()
                self._claim()
                self.folder.remove(*self._read_parts())
                self._holding = holding.pop_all()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._holding.close()

    def look(self) -> Self:
        """Collect which rows are done without holding the folder or writing to it; with `overwrite`, none is.

        Raises:
            OutputError: another job is writing there; or as when the context is entered.
        """
        try:
            self.folder.put({})
            self._refuse_foreign_report()
            if not self._overwrite:
                self._check_owner()
                self._read_parts()
        except OSError as error:
            raise cannot_write(self.folder, error) from error
        return self

    def begin(self) -> None:
        """Remove what a run that answers rows makes untrue.

        Raises:
            OutputError: the folder cannot be written to.
        """
        remove_list(self.folder)

    def listed(self) -> bool:
        """Whether the list of rows that could not be read is that of the answers in the folder."""
        return is_listed(self.folder, self.notes)

    def write_list(self) -> Unreadable:
        """Write the list of rows that could not be read.

        Raises:
            OutputError: the folder cannot be written to, or a part is damaged.
        """
        return write_list(self.folder, self.notes, self._job.files, self.schema.field(ID).type)

    def reported(self) -> bool:
        """Whether the counts in `_run.json` are those of the answers in the folder."""
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
        # Put lists of numbers on one line each. Strings are not affected: JSON has no line breaks in them.
        text = re.sub(r"\[\n[\d\s.,-]+\]", lambda numbers: f"[{' '.join(numbers[0][1:-1].split())}]", text)
        try:
            # The page can name a path that is not UTF-8.
            self.folder.write(REPORT, page.encode(errors="replace"))
            self.folder.write(RUN, text.encode() + b"\n")
        except OSError as error:
            raise cannot_write(self.folder, error) from error

    def write_none(self) -> None:
        """Write a part without rows, so that an input without rows has an output with the schema of answers."""
        none = with_columns(self.schema.empty_table(), place_columns([]))
        write_part(self.folder, part_name(0, 0), none, self.schema)

    def _refuse_foreign_report(self) -> None:
        for name in (REPORT, UNREADABLE):
            if self.folder.names(name) and not self.folder.names(JOB):
                raise OutputError(
                    f"{self.folder}/{name} belongs to no job, since there is no {JOB}: delete it, or give another "
                    "--output"
                )

    def _clear(self) -> None:
        """Delete answers and records; refuse if a file named like a part is not a file of answers."""
        for name, is_answers in read_each(self.folder, self.folder.names(PARTS), is_part):
            if not is_answers:
                raise OutputError(
                    f"{self.folder}/{name} is damaged, or not a file of answers, and --overwrite deletes only files of "
                    "answers: move it away, or give another --output"
                )
        # The order makes a crash in between safe. `_job.json` proves that report, list and parts are a job's, so report
        # and list go before it. Parts without `_job.json` are refused, so it goes before them.
        first = (REPORT, UNREADABLE, JOB, RUN, PLAN, PLAN_PAGE)
        for name in (*first, *self.folder.names(LISTINGS), *self.folder.names(PARTS)):
            self.folder.remove(name)

    def _claim(self) -> None:
        """Check that the folder belongs to this job or to none, and write `_job.json`."""
        if self._check_owner() != self._job:
            self._job.write(self.folder)

    def _check_owner(self) -> Job | None:
        """The job that the folder belongs to, which is this one but for files that were added, or None."""
        earlier = Job.of(self.folder)
        if earlier is not None:
            check_same_settings(self.folder, "answers", earlier.settings, self._job.settings)
            if earlier.files != self._job.files[: len(earlier.files)]:
                raise OutputError(f"another job has just begun in {self.folder}: try again")
        return earlier

    def _read_parts(self) -> set[str]:
        """Collect from all footers which rows are done, and the counts of their answers.

        Returns:
            Names of parts that another one replaces, and comes before.
        """
        names = self.folder.names(PARTS)
        replaced: set[str] = set()
        for name, record in read_each(self.folder, names, PartRecord.read):
            if name in replaced:
                continue
            replaced.update(record.replaces)
            self.notes.note(name, record)
            path = f"{self.folder}/{name}"
            try:
                known = sum(self.done.add(file, *span) for file, each in record.rows.items() for span in each)
            except IndexError as error:
                raise OutputError(f"{path} answers {error}, which the input does not have: delete it") from error
            if known:
                raise OutputError(f"{path} answers {known:,} rows that another file answers too: delete one of them")
            self.tally += record.tally
            if self._retry is not None and record.tally.finish_reasons["error"]:
                self._exclude_errors(name, record, self._retry)
        return replaced.intersection(names)

    def _exclude_errors(self, name: str, record: PartRecord, retry: Sequence[int]) -> None:
        """Take the failed rows of a part out of the done rows and the counts."""
        answers = with_columns(read_part(self.folder, name), record.places())
        errors = answers.filter(pc.equal(answers["finish_reason"], "error"))
        errors = errors.filter(pa.array([row < retry[file] for file, row in places_of(errors)], pa.bool_()))
        self.tally -= Tally.of(errors)
        for place in places_of(errors):
            self.done.remove(*place)
            self.failed[place] = name


def check_same_settings(output: object, what: str, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuse to mix results of different settings.

    Args:
        output: folder of the results, for the message.
        what: the results, for the message.
        found: settings of the results that are there.
        wanted: settings of this job.

    Raises:
        OutputError: names the first setting that differs, and its two values.
    """
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) != wanted.get(name):
            raise OutputError(
                f"{output} holds {what} with another {name} ({_short(found.get(name))} there, "
                f"{_short(wanted.get(name))} now): give another --output, or --overwrite to start again"
            )


def _short(value: object) -> str:
    return textwrap.shorten(json.dumps(value), 80)
