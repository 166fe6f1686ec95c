"""The record between the stages of the pipeline: every column, and which stages write, read and drop it.

    read ─ prepare ─ vision ─ decoder ─ driver

Tables have one row for each row of the input: its id and kept columns, which the stages pass through (the decoder stage
draws answers by the id), and the columns of `COLUMNS`, whose names begin with `OWN`. A stage adds and drops columns as
`COLUMNS` says, and uses no others. A failed row keeps its place and carries its failure to the end; what it has no
value for is null. A row without images has empty lists. The decoder stage replaces features, conversations and failures
by the columns of an answer, `schema.answer_fields`.

This module knows nothing of what the stages do.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.rows import Row
from qvl_batch.schema import LOCATION_FIELD, Failure, image_number, readable

Step = Literal["read", "prepare", "vision", "decoder", "driver"]

#: Prefix of the columns below; reserved, no column of the input may have it.
OWN = "__qvl_"
#: File number, and index of the row in that file: together the row's place in the input.
FILE, ROW = f"{OWN}file", f"{OWN}row"
#: The conversation, as `conversation.to_json` writes it. It names images by their index in the lists below.
MESSAGES = f"{OWN}messages"
#: What the answer must be, as `Constraint.to_json` writes it; null in rows that no column says it of.
CONSTRAINT = f"{OWN}constraint"
#: How the answer is drawn, as `Sampling.to_json` writes it; null in rows that no column says it of.
SAMPLING = f"{OWN}sampling"
#: The row's images as bytes of files; as pixels, uint8 (H, W, 3); and as features, float32 (T_img, D).
IMAGES, PIXELS, FEATURES = f"{OWN}images", f"{OWN}pixels", f"{OWN}features"
#: For each image of the row, the path or address that it comes from, without what can give access; null of one that is
#: in the row itself.
LOCATIONS = f"{OWN}locations"
#: Five numbers for each image, one image after the other: width and height of the original, upright; width and height
#: of what the model saw, W and H of its pixels; EXIF orientation of the file, 1 if it has none.
SIZES = f"{OWN}sizes"
#: Hash of each image as it is seen: equal for equal pixels from equal files.
IMAGE_KEYS = f"{OWN}image_keys"
#: Stage, type and message of a failed row's error; null in all other rows.
FAILURE = tuple(f"{OWN}error_{field.name}" for field in fields(Failure))
#: Small JPEG of a sampled row's pixels, its images side by side, and the start of its last question; null in all other
#: rows. Where the report shows the rows that the model is least sure of, all rows have them.
THUMBNAIL, ASKED = f"{OWN}thumbnail", f"{OWN}asked"
#: Unix time at which the vision stage started on the row's table.
STARTED = f"{OWN}started"
#: Names of the actors that processed the row, by stage.
WORKERS = {"vision": f"{OWN}vision_worker", "decoder": f"{OWN}decoder_worker"}
#: Busy thread-seconds, by kind of work. The first row of a table holds the seconds since the previous table, all other
#: rows 0, so that tables can be split and concatenated, and the sum of a column is the busy time of its stage. Seconds
#: that a worker has not passed on when it dies are lost.
SECONDS = {work: f"{OWN}{work}_seconds" for work in ("read", "image", "vision", "prefill", "decode")}


@dataclass(frozen=True, slots=True)
class Column:
    """Type of a column, the steps that write it and read it, and the step that drops it."""

    type: pa.DataType
    written_by: tuple[Step, ...]
    read_by: tuple[Step, ...]
    dropped_by: Step


COLUMNS: dict[str, Column] = {
    FILE: Column(pa.int32(), ("read",), ("prepare", "vision", "decoder", "driver"), "driver"),
    ROW: Column(pa.int64(), ("read",), ("prepare", "vision", "decoder", "driver"), "driver"),
    MESSAGES: Column(pa.large_string(), ("read",), ("prepare", "decoder"), "decoder"),
    CONSTRAINT: Column(pa.large_string(), ("read",), ("decoder",), "decoder"),
    SAMPLING: Column(pa.large_string(), ("read",), ("decoder",), "decoder"),
    LOCATIONS: Column(pa.list_(pa.string()), ("read",), ("driver",), "driver"),
    IMAGES: Column(pa.large_list(pa.large_binary()), ("read",), ("prepare",), "prepare"),
    **dict.fromkeys(
        FAILURE,
        Column(pa.string(), ("read", "prepare", "vision"), ("prepare", "vision", "decoder"), "decoder"),
    ),
    PIXELS: Column(pa.large_list(pa.large_binary()), ("prepare",), ("vision",), "vision"),
    SIZES: Column(pa.list_(pa.int32()), ("prepare",), ("vision", "decoder"), "decoder"),
    IMAGE_KEYS: Column(pa.list_(pa.binary()), ("prepare",), ("vision", "decoder"), "decoder"),
    THUMBNAIL: Column(pa.binary(), ("prepare",), ("driver",), "driver"),
    ASKED: Column(pa.large_string(), ("prepare",), ("driver",), "driver"),
    FEATURES: Column(pa.large_list(pa.large_binary()), ("vision",), ("decoder",), "decoder"),
    STARTED: Column(pa.float64(), ("vision",), ("driver",), "driver"),
    WORKERS["vision"]: Column(pa.string(), ("vision",), ("driver",), "driver"),
    WORKERS["decoder"]: Column(pa.string(), ("decoder",), ("driver",), "driver"),
    SECONDS["read"]: Column(pa.float64(), ("read",), ("driver",), "driver"),
    SECONDS["image"]: Column(pa.float64(), ("prepare",), ("driver",), "driver"),
    SECONDS["vision"]: Column(pa.float64(), ("vision",), ("driver",), "driver"),
    SECONDS["prefill"]: Column(pa.float64(), ("decoder",), ("driver",), "driver"),
    SECONDS["decode"]: Column(pa.float64(), ("decoder",), ("driver",), "driver"),
}


def array(name: str, values: Iterable[Any]) -> pa.Array:
    """Arrow array of a column of `COLUMNS`, in its type."""
    return pa.array(values, COLUMNS[name].type)


def with_columns(table: pa.Table, columns: Mapping[str, pa.Array]) -> pa.Table:
    """Append columns to a table."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def place_columns(places: Sequence[Row]) -> dict[str, pa.Array]:
    """Columns `FILE` and `ROW` of places in the input."""
    return {FILE: array(FILE, [file for file, _ in places]), ROW: array(ROW, [row for _, row in places])}


def places_of(table: pa.Table) -> list[Row]:
    """Places in the input of the rows of a table: the inverse of `place_columns`."""
    return list(zip(table[FILE].to_pylist(), table[ROW].to_pylist(), strict=True))


def failure_columns(failures: Sequence[Failure | None]) -> dict[str, pa.Array]:
    """Columns `FAILURE` of failures, None for rows without one."""
    parts = ([getattr(failure, field.name, None) for failure in failures] for field in fields(Failure))
    return {name: array(name, part) for name, part in zip(FAILURE, parts, strict=True)}


def failures_of(table: pa.Table) -> list[Failure | None]:
    """Failures of the rows of a table, None for rows without one: the inverse of `failure_columns`."""
    rows = zip(*(table[name].to_pylist() for name in FAILURE), strict=True)
    return [Failure(*row) if row[0] is not None else None for row in rows]


def located(table: pa.Table) -> pa.Table:
    """Add to a table of answers where the images that failed rows come from, the column `LOCATION_FIELD`."""
    rows = zip(
        table[LOCATIONS].to_pylist(), table["error_stage"].to_pylist(), readable(table["error_message"]), strict=True
    )
    failed: list[str | None] = []
    for locations, stage, message in rows:
        number = image_number(message, len(locations or ())) if stage == "image" else None
        failed.append(locations[number - 1] if number else None)
    return table.append_column(LOCATION_FIELD, pa.array(failed, LOCATION_FIELD.type))


def seconds_column(work: str, seconds: float, rows: int) -> dict[str, pa.Array]:
    """The column of `SECONDS` that passes on busy seconds in a table of `rows` rows, at least one."""
    return {SECONDS[work]: array(SECONDS[work], [seconds, *[0.0] * (rows - 1)])}


def seconds_of(table: pa.Table) -> dict[str, float]:
    """Busy seconds that a table passes on, by kind of work."""
    return {work: float(pc.sum(table[column]).as_py() or 0) for work, column in SECONDS.items()}
