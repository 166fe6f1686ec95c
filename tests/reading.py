"""The input of a job, read in this process."""

import pyarrow as pa

from qvl_batch.config import CaptionConfig
from qvl_batch.input.fetch import Fetcher
from qvl_batch.input.reader import read_unit


def caption_config(folder, *inputs, **options):
    """Settings of a job with these inputs, or all of a folder."""
    chosen = inputs or (str(folder),)
    return CaptionConfig(bundle=folder, input=tuple(map(str, chosen)), output=folder / "out", **options)


def read_rows(source, prompt=None, rows_per_table=8, allowed=()):
    """All rows of an opened source; `allowed` are places that images may be fetched from."""
    fetcher = Fetcher(allowed)
    tables = [
        table for unit in source.units() for table in read_unit(unit, source.columns, prompt, rows_per_table, fetcher)
    ]
    assert all(table.num_rows <= rows_per_table for table in tables)
    return pa.concat_tables(tables)
