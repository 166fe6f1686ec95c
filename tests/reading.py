"""The input of a job, read in this process."""

import pyarrow as pa

from qvl_batch.columns import IMAGES, MESSAGES
from qvl_batch.config import CaptionConfig
from qvl_batch.conversation import from_json, single_turn
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


def prompts_of(rows):
    """Of rows of one user turn its text, None of rows without a conversation."""
    conversations = [None if text is None else from_json(text) for text in rows[MESSAGES].to_pylist()]
    found = [None if conversation is None else conversation[0].text for conversation in conversations]
    for conversation, prompt in zip(conversations, found, strict=True):
        assert conversation in (None, single_turn(prompt, 1))
    return found


def images_of(rows):
    """Of rows of one image its file, None of rows without images."""
    found = rows[IMAGES].to_pylist()
    assert {len(files) for files in found if files is not None} <= {1}
    return [None if files is None else files[0] for files in found]
