"""Columns by the names that options give them: columns, fields of structs, and partitions of folders.

What enters: a name, and a schema, a table, or the path of a file. What leaves: what has that name there.

A name with dots, such as `meta.id`, is that of a column, or else of a field of the structs of a column. Folders that
are named like `split=train` are partitions, as Hive has them: all rows of the files in them have that value.
"""

from collections.abc import Iterable
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.compute as pc

#: Value of a partition that stands for null.
_NULL_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def find_field(schema: pa.Schema, name: str) -> pa.Field | None:
    """The column or the field of that name, which the result has too; None if there is none, or several."""
    path = _path(schema, name)
    if path is None:
        return None
    field = schema.field(path[0])
    for index in path[1:]:
        field = field.type.field(index)
    return field.with_name(name)


def find_column(table: pa.Table, name: str) -> pa.ChunkedArray | None:
    """Values of the column or the field of that name, null where a struct is; None if there is none, or several."""
    path = _path(table.schema, name)
    if path is None:
        return None
    column = table.column(path[0])
    return pc.struct_field(column, path[1:]) if path[1:] else column


def whole_columns(schema: pa.Schema, names: Iterable[str]) -> list[pa.Field]:
    """The columns that have these names, or structs with fields of these names, each once; names of neither count
    nothing.
    """
    paths = (_path(schema, name) for name in names)
    return [schema.field(index) for index in dict.fromkeys(path[0] for path in paths if path is not None)]


def partitions(file: str) -> dict[str, str | None]:
    """Partitions that a file is in, by name. Of several with the same name, that of the innermost folder counts."""
    pairs = [folder.split("=", 1) for folder in Path(file).parent.parts if "=" in folder]
    values = {unquote(name): unquote(value) for name, value in pairs}
    return {name: None if value == _NULL_PARTITION else value for name, value in values.items()}


def _path(fields: pa.Schema | pa.StructType, name: str) -> list[int] | None:
    """Index of the column of that name; for a field of structs, also its index in them, and so on."""
    names = [field.name for field in fields]
    if name in names:
        return [names.index(name)] if names.count(name) == 1 else None
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        outer, inner = ".".join(parts[:end]), ".".join(parts[end:])
        if names.count(outer) == 1 and pa.types.is_struct(kind := fields.field(outer).type):
            path = _path(kind, inner)
            if path is not None:
                return [names.index(outer), *path]
    return None
