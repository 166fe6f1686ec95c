"""A job of a hundred million rows knows in little memory what is left to do."""

import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import ROOT

from qvl_batch.input.containers.parquet import footer_sha256
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.parts import PartRecord, Tally
from qvl_batch.output.resume import Job
from qvl_batch.output.writer import ROWS_PER_FILE
from qvl_batch.rows import InputFile
from qvl_batch.schema import ANSWER_FIELDS, ID, Answer

FILES, ROWS_OF_FILE, ROWS_OF_GROUP = 1_000, 100_000, 100
#: Growth of the process, in bytes.
BOUND = 200e6
SCRIPT = """
import re, sys
from pathlib import Path
from qvl_batch.config import CaptionConfig
from qvl_batch.output.storage import folder_at
from qvl_batch.output.resume import Job, OutputFolder
from qvl_batch.input.source import open_source

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

folder = Path(sys.argv[1])
config = CaptionConfig(bundle=folder, input=(str(folder / "input"),), output=str(folder / "out"))
before = peak()
output = folder_at(config.output)
held = Job.of(output)
source = open_source(config, held.files)
with OutputFolder(output, held, source.columns.output_schema(), overwrite=False) as answers:
    left = source.without(answers.done)
    units = sum(1 for part in left.parts(200_000) for unit in part)
    print(source.rows, answers.done.count, left.rows, units, peak() - before)
"""


def _write_linked_files(folder):
    """Files of a hundred thousand rows in small row groups, as image sets have them; all are links to one."""
    folder.mkdir()
    schema = pa.schema({"id": pa.string(), "image": pa.binary(), "prompt": pa.string()})
    nothing = pa.table([pa.nulls(ROWS_OF_FILE, kind) for kind in schema.types], schema=schema)
    first = folder / "0000.parquet"
    pq.write_table(nothing, first, row_group_size=ROWS_OF_GROUP)
    for number in range(1, FILES):
        (folder / f"{number:04d}.parquet").hardlink_to(first)
    with pa.OSFile(str(first)) as opened:
        footer = footer_sha256(opened)
    return [InputFile(str(path), path.stat().st_size, ROWS_OF_FILE, footer) for path in sorted(folder.iterdir())]


def _write_footers(folder, files):
    """Parts without their rows, each of which says that it answers rows in several spans; half of all rows."""
    folder.mkdir()
    Job({}, tuple(files)).write(LocalFolder(folder))
    empty = pa.schema([pa.field(ID, pa.string()), *ANSWER_FIELDS]).empty_table()
    some = pa.Table.from_pylist([Answer("yes", "stop", 600, 3).record()] * ROWS_PER_FILE, pa.schema(ANSWER_FIELDS))
    tally = Tally.of(some)
    for number in range(FILES):
        for start in range(0, ROWS_OF_FILE, 2 * ROWS_PER_FILE):
            every_other = [(at, min(at + 8, ROWS_OF_FILE)) for at in range(start, start + 2 * ROWS_PER_FILE, 16)]
            spans = [span for span in every_other if span[0] < span[1]]
            footer = PartRecord({number: spans}, tally).footer()
            path = folder / f"part-{number:06d}-{start:012d}.parquet"
            pq.write_table(empty.replace_schema_metadata({b"qvl_batch": footer}), path)


@pytest.mark.long
def test_what_is_left_of_a_hundred_million_rows_takes_little_memory(tmp_path):
    _write_footers(tmp_path / "out", _write_linked_files(tmp_path / "input"))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, check=True)
    rows, done, left, units, growth = map(int, result.stdout.split())
    assert rows == FILES * ROWS_OF_FILE == done + left
    assert done == rows // 2
    assert units == rows // ROWS_OF_GROUP
    assert 0 < growth < BOUND
