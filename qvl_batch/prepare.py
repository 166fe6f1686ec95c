"""The stage that decodes and fits images, as a function of an Arrow table.

It runs in short tasks, in many processes, so this module imports neither transformers nor
ONNX Runtime, which would take each of them two seconds.
"""

import pyarrow as pa

from qvl_batch.config import Fit
from qvl_batch.errors import ImageError
from qvl_batch.images import decode_image, fit_image
from qvl_batch.schema import Failure
from qvl_batch.source import FAILURE, IMAGE, OWN, failure_columns, failures_of

PIXELS = f"{OWN}pixels"


def prepare(table: pa.Table, image_size: int, fit: Fit) -> pa.Table:
    """Decode and fit images: the column `IMAGE` becomes `PIXELS`, uint8 (size, size, 3) as bytes."""
    failures = failures_of(table)
    pixels: list[bytes | None] = []
    for index, image in enumerate(table[IMAGE]):
        pixels.append(None)
        if failures[index] is None:
            try:
                pixels[-1] = fit_image(decode_image(image.as_py()), image_size, fit).tobytes()
            except ImageError as error:
                failures[index] = Failure.of(error)
    table = table.drop_columns([IMAGE, *FAILURE])
    return with_columns(table, {PIXELS: pa.array(pixels, pa.large_binary()), **failure_columns(failures)})


def with_columns(table: pa.Table, columns: dict[str, pa.Array]) -> pa.Table:
    """Append columns to a table."""
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table
