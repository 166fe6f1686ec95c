"""A job of two input files, answers to its rows, and the answers in an output folder."""

import html
import json
import re

import pyarrow as pa
import pyarrow.parquet as pq

from qvl_batch.columns import FILE, ROW
from qvl_batch.output.resume import Job
from qvl_batch.rows import InputFile
from qvl_batch.schema import ANSWER_FIELDS, ID, LOCATION_FIELD, Answer, Failure

FILES = (InputFile("/in/a.parquet", 10, 6, "a"), InputFile("/in/b.parquet", 20, 5, "b"))
JOB_OF_FILES = Job({"bundle": "abc", "--fit": "crop", "--keep-columns": ["x"]}, FILES)
#: Columns of answers that follow from no option.
ANSWER_COLUMNS = [
    "answer", "finish_reason", "prompt_tokens", "answer_tokens", "image_width", "image_height", "seen_width",
    "seen_height", "error_stage", "error_type", "error_message", "error_location",
]  # fmt: skip
SCHEMA = pa.schema([pa.field(ID, pa.int64()), *ANSWER_FIELDS, LOCATION_FIELD])


def answers_to(*rows):
    """Answers to rows, given as numbers of a file and of a row in it; each even row of a file has failed."""
    answers = [Answer("yes", "stop", 9, 2) if row[1] % 2 else Answer.failed(Failure("image", "E", "m")) for row in rows]
    columns = {field.name: [answer.record()[field.name] for answer in answers] for field in ANSWER_FIELDS}
    files, places = zip(*rows, strict=True)
    own = {FILE: pa.array(files, pa.int32()), ROW: pa.array(places, pa.int64()), ID: places}
    columns[LOCATION_FIELD.name] = [None if row[1] % 2 else f"/images/{row[1]}.jpg" for row in rows]
    return pa.table(
        own | {field.name: pa.array(columns[field.name], field.type) for field in SCHEMA if field.name != ID}
    )


def read_answers(folder):
    """All part files of an output folder as one table."""
    return pa.concat_tables([pq.read_table(path) for path in sorted(folder.glob("part-*.parquet"))])


def rows_by_id(folder):
    """All rows of an output folder in the order of their ids."""
    return sorted(read_answers(folder).to_pylist(), key=lambda row: str(row["id"]))


def shown_page(folder):
    """Figures of a job, its page, and the page's rows: id, prompt, answer, and whether there is an image."""
    page = (folder / "_report.html").read_text()
    rows = []
    for card in page.split("<article")[1:]:
        texts = [
            re.search(rf'<p class="{name}"[^>]*>(.*?)</p>', card, re.DOTALL) for name in ("id", "prompt", "answer")
        ]
        rows.append((*(html.unescape(text[1]) if text else None for text in texts), "data:image/jpeg" in card))
    return json.loads((folder / "_run.json").read_text()), page, rows
