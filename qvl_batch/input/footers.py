"""Footers of parquet files, and files whose footer has a record of Arrow types that cannot be read.

What enters: open files. What leaves: footers, and parquet files that are ready to be read.

Arrow writes its own types beside those of parquet, under `ARROW:schema`. Where that record is damaged, or of a newer
Arrow, Arrow refuses the whole file; its columns are read as what parquet's own types say.
"""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC = b"PAR1"
_ARROW_SCHEMA = b"ARROW:schema"


def footer(file: pa.NativeFile) -> bytes:
    """The footer of an open parquet file."""
    end = file.size() - 8  # the last 8 bytes are the footer's length and `PAR1`
    start = max(0, end - int.from_bytes(file.read_at(4, end), "little"))
    found: bytes = file.read_at(end - start, start)
    return found


def parquet_file(file: pa.NativeFile, **options: Any) -> pq.ParquetFile:
    """Open a parquet file, if need be without its record of Arrow types.

    Args:
        file: the open file.
        options: of `pq.ParquetFile`.

    Raises:
        OSError, pa.ArrowException: it cannot be read, and not for that record.
    """
    try:
        return pq.ParquetFile(file, **options)
    except (OSError, pa.ArrowException):
        if file.size() < len(_MAGIC) + 8 or _ARROW_SCHEMA not in (found := footer(file)):
            raise
        # Under another name, of the same length, Arrow does not look at it.
        renamed = found.replace(_ARROW_SCHEMA, b"-" * len(_ARROW_SCHEMA))
        alone = _MAGIC + renamed + len(renamed).to_bytes(4, "little") + _MAGIC
        return pq.ParquetFile(file, metadata=pq.read_metadata(pa.BufferReader(alone)), **options)
