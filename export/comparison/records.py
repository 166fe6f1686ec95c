"""Results of a comparison so far, on disk: a part for each chunk of questions.

    DIR/_parts/settings.json        what the parts depend on
    DIR/_parts/part-000000.parquet  the first chunk; parts are written atomically

A comparison that was stopped resumes with the questions that are in no part. Parts of different
comparisons are never mixed: everything that changes their rows is in `settings.json`. A row of the
input that was asked about again is in several parts, of which the last counts.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from export.comparison.layers import Drift
from export.comparison.measures import Measures, measured
from export.comparison.questions import Question
from export.comparison.traces import INPUT_STAGES, Trace
from qvl_batch.errors import OutputError
from qvl_batch.output.local_folder import LocalFolder
from qvl_batch.output.parts import parquet
from qvl_batch.output.resume import Job, check_same_settings
from qvl_batch.output.storage import folder_at
from qvl_batch.rows import Row
from qvl_batch.schema import ERROR_FIELDS, Failure, error_values

COMPARISON, SUMMARY, PAGE = "comparison.parquet", "summary.json", "report.html"
PARTS, SETTINGS = "_parts", "settings.json"

#: Columns of `comparison.parquet` after `id`; parts also have `thumbnail`.
FIELDS = (
    pa.field("file", pa.int32()),
    pa.field("row", pa.int64()),
    pa.field("prompt", pa.string()),
    pa.field("fit", pa.string()),
    pa.field("image_width", pa.list_(pa.int32())),
    pa.field("image_height", pa.list_(pa.int32())),
    pa.field("expected", pa.string()),
    pa.field("reference", pa.string()),
    pa.field("answer", pa.string()),
    pa.field("reference_tokens", pa.int32()),
    pa.field("answer_tokens", pa.int32()),
    pa.field("error_side", pa.string()),
    *ERROR_FIELDS,
    pa.field("equal", pa.bool_()),
    pa.field("input_equal", pa.bool_()),
    pa.field("first_difference", pa.int32()),
    pa.field("reference_token", pa.int64()),
    pa.field("answer_token", pa.int64()),
    pa.field("reference_token_text", pa.string()),
    pa.field("answer_token_text", pa.string()),
    pa.field("reference_margin", pa.float64()),
    pa.field("answer_margin", pa.float64()),
    pa.field("logits_error", pa.float64()),
    pa.field("token_agreement", pa.float64()),
    pa.field("edit_similarity", pa.float64()),
    pa.field("first_token_kl", pa.float64()),
    pa.field("vision_cosine", pa.float64()),
    pa.field("vision_error", pa.float64()),
    pa.field("prefill_error", pa.float64()),
    pa.field("decode_error", pa.float64()),
    pa.field("layer_error", pa.list_(pa.float64())),
    pa.field("layer_own_error", pa.list_(pa.float64())),
)
THUMBNAIL = pa.field("thumbnail", pa.binary())


def record(
    question: Question,
    reference: Trace | Failure | None,
    candidate: Trace | Failure | None,
    measures: Measures | None,
    drift: Drift | None,
    texts: tuple[str | None, str | None],
) -> dict[str, Any]:
    """A row of `comparison.parquet`. One that could not be put to both sides has no answers.

    Args:
        question: what was asked.
        reference: result of the other side; None if it was not asked.
        candidate: result of the bundle; None if the input had failed.
        measures: of the two traces, if there are two.
        drift: by layer, if it was measured.
        texts: of the first tokens that differ, reference first.
    """
    side, failure = _failure(question, reference, candidate)
    if side == "input":
        reference = candidate = None
    sizes = [image.size for image in question.images]
    return {
        "id": question.id,
        "file": question.file,
        "row": question.row,
        "prompt": question.prompt,
        "fit": question.fit,
        "image_width": [size.width for size in sizes],
        "image_height": [size.height for size in sizes],
        "expected": question.expected,
        "reference": reference.text if isinstance(reference, Trace) else None,
        "answer": candidate.text if isinstance(candidate, Trace) else None,
        "reference_tokens": len(reference.token_ids) if isinstance(reference, Trace) else None,
        "answer_tokens": len(candidate.token_ids) if isinstance(candidate, Trace) else None,
        "error_side": side,
        **error_values(failure),
        **measured(measures),
        "equal": measures.equal if measures else None if side == "input" else False,
        "reference_token_text": texts[0],
        "answer_token_text": texts[1],
        "layer_error": drift.total if drift else None,
        "layer_own_error": drift.own if drift else None,
        THUMBNAIL.name: question.thumbnail(),
    }


def _failure(
    question: Question, reference: Trace | Failure | None, candidate: Trace | Failure | None
) -> tuple[str | None, Failure | None]:
    """The side that failed, or `input` if the failure is due to the input; and the failure. Both None without one."""
    sides = {"input": question.failure, "bundle": candidate, "reference": reference}
    failed = {side: failure for side, failure in sides.items() if isinstance(failure, Failure)}
    # Including a row that is too long for only one side's contract: there is nothing to compare it with.
    before = (("input", failure) for failure in failed.values() if failure.stage in INPUT_STAGES)
    return next(before, next(iter(failed.items()), (None, None)))


@dataclass(frozen=True, slots=True)
class Records:
    """The parts of one comparison.

    Args:
        output: the output folder.
        schema: schema of the parts.
    """

    output: Path
    schema: pa.Schema

    @classmethod
    def open(cls, output: Path, id_type: pa.DataType, settings: dict[str, Any], *, overwrite: bool) -> "Records":
        """Open the parts of a comparison with these settings, or create them.

        Raises:
            OutputError: the folder holds a comparison with other settings, or cannot be written.
        """
        parts = output / PARTS
        # As they are read back: JSON turns tuples into lists.
        settings = json.loads(json.dumps(settings))
        try:
            if Job.of(folder_at(str(output))):
                raise OutputError(f"{output} holds the answers of a job: give another --output")
            if overwrite:
                _clear(output)
            if (parts / SETTINGS).is_file():
                check_same_settings(output, "a comparison", json.loads((parts / SETTINGS).read_text()), settings)
            elif any((output / name).exists() for name in (COMPARISON, SUMMARY, PAGE)):
                raise OutputError(f"{output} holds a report already: give another --output, or --overwrite")
            parts.mkdir(parents=True, exist_ok=True)
            LocalFolder(parts).write(SETTINGS, json.dumps(settings, indent=1).encode())
        except (OSError, ValueError) as error:
            raise OutputError(f"{output} cannot be used: {error}; give another --output") from error
        return cls(output, pa.schema([pa.field("id", id_type), *FIELDS, THUMBNAIL]))

    def failures(self) -> dict[Row, int]:
        """Number of failed questions for each row that was asked about."""
        asked = self._latest(["file", "row", "error_side"])
        return {row: sum(each["error_side"] is not None for each in found) for row, found in asked.items()}

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Write a part; its results for a row of the input replace those of earlier parts."""
        name = f"part-{len(self._files()):06d}.parquet"
        LocalFolder(self.output / PARTS).write(name, parquet(pa.Table.from_pylist(rows, self.schema)))

    def read(self) -> list[dict[str, Any]]:
        """All rows, in the order of the input."""
        latest = self._latest(None)
        return [each for row in sorted(latest) for each in latest[row]]

    def _latest(self, columns: list[str] | None) -> dict[Row, list[dict[str, Any]]]:
        """Results for each row of the input, from the last part that has it."""
        latest: dict[Row, list[dict[str, Any]]] = {}
        for path in self._files():
            found: dict[Row, list[dict[str, Any]]] = {}
            for each in pq.read_table(path, columns=columns).to_pylist():
                found.setdefault((each["file"], each["row"]), []).append(each)
            latest |= found
        return latest

    def _files(self) -> list[Path]:
        return sorted((self.output / PARTS).glob("part-*.parquet"))

    def publish(self, rows: list[dict[str, Any]], summary: dict[str, Any], page: str) -> None:
        """Write `comparison.parquet`, `summary.json` and `report.html`."""
        schema = self.schema.remove(self.schema.get_field_index(THUMBNAIL.name)).append(
            pa.field("difference", pa.string())
        )
        folder = LocalFolder(self.output)
        folder.write(COMPARISON, parquet(pa.Table.from_pylist(rows, schema)))
        folder.write(SUMMARY, json.dumps(summary, indent=1, allow_nan=False).encode() + b"\n")
        folder.write(PAGE, page.encode())


def _clear(output: Path) -> None:
    for name in (COMPARISON, SUMMARY, PAGE):
        (output / name).unlink(missing_ok=True)
    if (output / PARTS / SETTINGS).is_file():
        shutil.rmtree(output / PARTS)
