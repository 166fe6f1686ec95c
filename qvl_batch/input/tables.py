"""Folders of tables (Delta, Iceberg, Hudi), which hold the files of all their versions.

What enters: a folder. What leaves: the files of a Delta table's current version, read by `deltalake` where that is
installed; other tables are refused, with the line of Python that lists the files of one version.
"""

from collections.abc import Sequence
from pathlib import Path

from qvl_batch.errors import InputError
from qvl_batch.input.files import FilePath
from qvl_batch.input.store_files import StorePath

#: Table formats: globs that recognise a table's folder, and a Python expression that lists the files of one version.
TABLES: dict[str, tuple[Sequence[str], str]] = {
    "a Delta table": (("_delta_log",), "deltalake.DeltaTable('{}').file_uris()"),
    "an Iceberg table": (
        [f"metadata/{name}" for name in ("v[0-9]*.metadata.json", "[0-9]????-*.metadata.json", "snap-*.avro")],
        (
            "[task.file.file_path.removeprefix('file://') for task in "
            "pyiceberg.table.StaticTable.from_metadata('{}/metadata/VERSION.metadata.json').scan().plan_files()]"
        ),
    ),
    "a Hudi table": (
        (".hoodie",),
        (
            "[each.base_file_relative_path() for each in "
            "hudi.HudiTableBuilder.from_base_uri('{}').build().get_file_slices()]"
        ),
    ),
}
#: What a reader of a Delta table must know, and that changes nothing in what its files of data hold.
_HARMLESS = {"timestampNtz", "v2Checkpoint", "vacuumProtocolCheck"}
_DELTA = "a Delta table"


def files_of_table(folder: FilePath) -> list[Path] | None:
    """Files of the current version of a Delta table, None for any other folder.

    Raises:
        InputError: the table cannot be read, or not from its files alone, or `deltalake` is not installed.
    """
    if isinstance(folder, StorePath):  # `deltalake` would look for credentials in ways of its own
        refuse_table(folder)
        return None
    if not _is(folder, _DELTA):
        return None
    try:
        from deltalake import DeltaTable  # noqa: PLC0415  (an extra)
    except ImportError:
        refuse_table(folder)
        raise
    try:
        table = DeltaTable(folder)
        files = [Path(uri) for uri in table.file_uris()]
        needed = set(table.protocol().reader_features or ()) - _HARMLESS
        mapping = table.metadata().configuration.get("delta.columnMapping.mode", "none")
    except Exception as error:  # the library's own error has no public type
        raise InputError(f"{folder} is {_DELTA} that cannot be read: {error}") from error
    if mapping != "none":
        needed.add("columnMapping")
    if needed:
        raise InputError(
            f"{folder} is {_DELTA} whose files alone do not say its rows ({', '.join(sorted(needed))}): write it out "
            "as plain parquet instead"
        )
    if not files:
        raise InputError(f"{folder} is {_DELTA} without rows in its current version")
    return files


def refuse_table(folder: FilePath) -> None:
    """Refuse the folder of a table.

    Raises:
        InputError: the folder is a table; the message says how to list the files of one version.
    """
    for kind, (_, listing) in TABLES.items():
        if _is(folder, kind):
            is_read = kind == _DELTA and not isinstance(folder, StorePath)
            own = "Give the table's own folder, with `pip install deltalake`; or " if is_read else "To read it, "
            raise InputError(
                f"{folder} is {kind}: its files also hold deleted rows. {own}give the files of one version, which in "
                f"Python {listing.format(folder)} lists; if the table keeps deletes in files of their own, write it "
                "out as plain parquet instead"
            )


def _is(folder: FilePath, kind: str) -> bool:
    signs, _ = TABLES[kind]
    return any(True for sign in signs for _ in folder.glob(sign))  # no match in a folder without read permission
