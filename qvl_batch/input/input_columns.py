"""Which columns of the input's files are read, and as which types.

What enters: the schema of a file, and the column names of the settings. What leaves: `InputColumns`, from which the
schema of the answers follows; or an error that names file and column.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import pyarrow as pa

from qvl_batch.config import JobConfig, option_of
from qvl_batch.constraints import Kind
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.common_types import common_type, without_views
from qvl_batch.input.image_cells import WANTED, is_image, is_list_of_images
from qvl_batch.input.lookup import find_column, find_field, partitions
from qvl_batch.sampling import Sampling
from qvl_batch.schema import EXPECTED_FIELD, ID, LOCATION_FIELD, answer_fields, is_bytes, is_text, item_type, plain_type

#: Floats below this are exact integers if they are whole.
EXACT = 2.0**53
#: What a user is told where files have no ids.
BY_PLACE = "files have no column 'id', so rows are identified by file and row (--id-column names another column)"


@dataclass(frozen=True, slots=True)
class Kept:
    """A column of `--keep-columns`.

    Args:
        name: in the input.
        field: name and type in the output; the type is null as long as all files lack the column.
        missing: number of files that lack it, whose rows have nulls.
    """

    name: str
    field: pa.Field
    missing: int = field(default=0, compare=False)

    def joined(self, other: "Kept") -> "Kept | None":
        """The column with a type that holds the values of both files; None if there is no such type."""
        kind = common_type(self.field.type, other.field.type)
        missing = self.missing + other.missing
        return None if kind is None else Kept(self.name, self.field.with_type(kind), missing)


@dataclass(frozen=True, slots=True)
class InputColumns:
    """Columns that the job reads.

    Args:
        id: name in the input, and type in the output; None if rows are identified by file and row.
        kept: the columns of `--keep-columns`.
        image: name; beside messages, files can lack this column, and their rows have no images of their own.
        prompt: name, None if no prompt column is read.
        messages: name, None if rows are an image and a prompt.
        has_lists: rows can have several images or none: the image column is of lists, or there are messages.
        has_text: the image column is text in some file: paths, addresses, or images in base64.
        answer_last_turn_again: an assistant's turn at the end of messages becomes the column `expected`.
        constraint: name of a column that says what each answer must be, and of which kind it is; None if there is none.
        sampling: name of a column that says how each answer is drawn, and what is so where it says nothing; None if
            there is none.
        schemas: of the columns that each file has, by its number.
    """

    id: pa.Field | None
    kept: tuple[Kept, ...]
    image: str
    prompt: str | None
    messages: str | None = None
    has_lists: bool = False
    has_text: bool = field(default=False, compare=False)
    answer_last_turn_again: bool = False
    constraint: tuple[str, Kind] | None = None
    sampling: tuple[str, Sampling] | None = None
    schemas: tuple[pa.Schema, ...] = field(default=(), compare=False)

    @property
    def names(self) -> list[str]:
        """Every column to read, each once. A file can lack kept ones, and beside messages the image column."""
        asked = [name for name in (self.prompt, self.messages) if name is not None]
        asked += [each[0] for each in (self.constraint, self.sampling) if each is not None]
        return list(dict.fromkeys([*self.copied, self.image, *asked]))

    @property
    def copied(self) -> list[str]:
        """Columns whose values are those of the input: the id, if there is one, and the kept ones."""
        return [*([] if self.id is None else [self.id.name]), *(each.name for each in self.kept)]

    def of(self, table: pa.Table, file: str) -> pa.Table:
        """The columns of `names` that a table of a file has, under these names. Those to keep that it lacks have the
        value of the file's partition, or null.
        """
        given, kept = partitions(file), {each.name for each in self.kept}
        schema: list[pa.Field] = []
        values: list[Any] = []
        for name in self.names:
            if (found := find_field(table.schema, name)) is not None:
                values.append(find_column(table, name))
                schema.append(found)
            elif name in kept:
                values.append(pa.repeat(given.get(name), len(table)))
                schema.append(pa.field(name, values[-1].type))
        return pa.table(values, pa.schema(schema))

    @property
    def id_type(self) -> pa.DataType:
        """Type of the id in the output."""
        return pa.string() if self.id is None else self.id.type

    def joined(self, other: "InputColumns") -> "InputColumns | None":
        """Columns whose types hold the values of both files; None if there are no such types.

        Ids must have the same type, or all files lack them. Types of a kept column can differ as `common_type` says.
        One file can have single images, and another lists of them.
        """
        joined = [a.joined(b) for a, b in zip(self.kept, other.kept, strict=True)]
        kept = tuple(each for each in joined if each is not None)
        if (self.id is None) != (other.id is None) or self.id_type != other.id_type or len(kept) < len(joined):
            return None
        lists, text = self.has_lists or other.has_lists, self.has_text or other.has_text
        return replace(self, kept=kept, has_lists=lists, has_text=text)

    def output_schema(self, **options: Any) -> pa.Schema:
        """Schema of the answers; the options are those of `answer_fields`."""
        expected = [EXPECTED_FIELD] if self.answer_last_turn_again else []
        answers = answer_fields(lists=self.has_lists, **options)
        kept = (each.field for each in self.kept)
        return pa.schema([pa.field(ID, self.id_type), *kept, *expected, *answers, LOCATION_FIELD])


def input_columns(schema: pa.Schema, file: str, config: JobConfig) -> InputColumns:
    """Choose and check the columns of one input file.

    Raises:
        InputError: a column is missing, occurs twice or has a type that cannot be used; the message names file and
            column and says what is there.
        ConfigError: a kept column has the name of an output column.
    """
    again = config.answer_last_turn_again
    answers = answer_fields(
        boxes=True, parsed=pa.null(), parsed_confidence=pa.null(), confidence=True, choices=True, samples=True
    )
    reserved = {ID, *(field.name for field in [*answers, LOCATION_FIELD, *([EXPECTED_FIELD] if again else [])])}
    clash = [name for name in config.copied_columns if name in reserved]
    if clash:
        raise ConfigError(
            f"--keep-columns {clash[0]}: the output has a column of this name; keep yours under another one, such as "
            f"--keep-columns {config.copied_columns[clash[0]]}=my_{clash[0]}"
        )
    messages = config.messages_column
    prompt = None if config.prompt is not None or messages is not None else config.prompt_column
    name = config.id_column or ID
    has_ids = config.id_column is not None or name in schema.names
    id_field = _id_field(_field(schema, name, file, "--id-column"), file) if has_ids else None
    if prompt is not None:
        _check_prompt(_field(schema, prompt, file, "--prompt-column"), file)
    if messages is not None:
        _check_messages(_field(schema, messages, file, "--messages-column"), file)
    if config.constraint_column is not None:
        name, kind = config.constraint_column
        _check_constraint(_field(schema, name, file, option_of(f"{kind}_column")), kind, file)
    if config.row_sampling is not None:
        _check_sampling(_field(schema, config.row_sampling[0], file, "--sampling-column"), file)
    lists, text = messages is not None, False
    if messages is None or _has(schema, config.image_column):
        image = _field(schema, config.image_column, file, "--image-column")
        _check_image(image, file)
        lists |= is_list_of_images(image)
        text = is_text(plain_type(item_type(image.type) or image.type))
        if id_field is not None and id_field.name == image.name and is_bytes(plain_type(image.type)):
            raise InputError(f"{file}: column {image.name!r} is both --id-column and --image-column, and holds images")
    return InputColumns(
        id_field,
        tuple(_kept(schema, *each, file) for each in config.copied_columns.items()),
        config.image_column,
        prompt,
        messages,
        has_lists=lists,
        has_text=text,
        answer_last_turn_again=again,
        constraint=config.constraint_column,
        sampling=config.row_sampling,
    )


def _field(schema: pa.Schema, name: str, file: str, option: str) -> pa.Field:
    """The column of that name; `option` names it.

    Raises:
        InputError: there is no such column, or several.
    """
    field = find_field(schema, name)
    if field is None:
        present = ", ".join(schema.names) or "none"
        raise InputError(f"{file} has no single column {name!r} ({option}); it has {present}")
    return field


def _has(schema: pa.Schema, name: str) -> bool:
    """Whether there is such a column or field, or even several."""
    return name in schema.names or find_field(schema, name) is not None


def _kept(schema: pa.Schema, new: str, name: str, file: str) -> Kept:
    """A column to keep as `new`: of the file, of its partition, or missing."""
    if _has(schema, name):
        kind = without_views(_field(schema, name, file, "--keep-columns").type)
        return Kept(name, pa.field(new, kind))
    if name in partitions(file):
        return Kept(name, pa.field(new, pa.string()))
    return Kept(name, pa.field(new, pa.null()), missing=1)


def _id_field(field: pa.Field, file: str) -> pa.Field:
    """With the type in the output: int64, uint64 for uint64, or string. Files can so differ in the width of ids."""
    kind = plain_type(field.type)
    if pa.types.is_integer(kind):
        return pa.field(field.name, pa.uint64() if kind == pa.uint64() else pa.int64())
    if not (is_text(kind) or _is_spelled(kind)):
        raise InputError(
            f"{file}: column {field.name!r} (--id-column) is {field.type}; it must be strings, numbers, dates, times, "
            "UUIDs or bytes"
        )
    return pa.field(field.name, pa.string())


def _is_spelled(kind: pa.DataType) -> bool:
    kinds = (pa.types.is_floating, pa.types.is_decimal, pa.types.is_date, pa.types.is_time, pa.types.is_timestamp)
    return is_bytes(kind) or isinstance(kind, pa.UuidType) or any(is_kind(kind) for is_kind in kinds)


def ids_of(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray | pa.Array:
    """Ids in their type in the output. Those that are no text become text from which they can be read again: bytes in
    hexadecimal; floats in the fewest digits, whole ones without a point, since pandas makes floats of integers where
    one is missing; all others as Arrow writes them.
    """
    own = plain_type(column.type)
    if not _is_spelled(own):
        return column.cast(kind)
    spell: Callable[[Any], str]
    if pa.types.is_floating(own):
        spell = _digits
    elif isinstance(own, pa.UuidType):
        spell = str
    elif is_bytes(own):
        spell = bytes.hex
    else:
        return column.cast(own).cast(kind)
    return pa.array([None if value is None else spell(value) for value in column.to_pylist()], kind)


def _digits(value: float) -> str:
    return str(int(value)) if value.is_integer() and abs(value) < EXACT else repr(value)


def _check_prompt(field: pa.Field, file: str) -> None:
    kind = plain_type(field.type)
    if not (is_text(kind) or pa.types.is_null(kind)):
        raise InputError(f"{file}: column {field.name!r} (--prompt-column) is {field.type}; it must be strings")


def _check_image(field: pa.Field, file: str) -> None:
    if not (is_image(field) or is_list_of_images(field)):
        raise InputError(f"{file}: column {field.name!r} (--image-column) is {field.type}; it must be {WANTED}")


def _check_messages(field: pa.Field, file: str) -> None:
    kind = _without_json(plain_type(field.type))
    item = item_type(kind)
    kinds = (pa.types.is_struct, pa.types.is_map, pa.types.is_null)  # null: of lists that are all empty
    if not (is_text(kind) or pa.types.is_null(kind) or (item and any(is_kind(item) for is_kind in kinds))):
        raise InputError(
            f"{file}: column {field.name!r} (--messages-column) is {field.type}; it must be lists of messages, structs "
            "of role and content or of from and value, or the same as JSON text"
        )


def _check_constraint(field: pa.Field, kind: Kind, file: str) -> None:
    plain = _without_json(plain_type(field.type))
    item = item_type(plain)
    is_list = kind == "choices" and item is not None and (is_text(plain_type(item)) or pa.types.is_null(item))
    if not (is_text(plain) or pa.types.is_null(plain) or is_list):
        wanted = {
            "choices": "lists of strings, or the same as JSON text",
            "regex": "strings",
            "json_schema": "JSON schemas as text",
        }[kind]
        option = option_of(f"{kind}_column")
        raise InputError(f"{file}: column {field.name!r} ({option}) is {field.type}; it must be {wanted}")


def _check_sampling(field: pa.Field, file: str) -> None:
    plain = _without_json(plain_type(field.type))
    is_struct = pa.types.is_struct(plain) and set(plain.names) <= {part.name for part in fields(Sampling)}
    if not (is_text(plain) or is_struct or pa.types.is_null(plain)):
        raise InputError(
            f"{file}: column {field.name!r} (--sampling-column) is {field.type}; it must be structs of temperature and "
            "such, or the same as JSON text"
        )


def _without_json(kind: pa.DataType) -> pa.DataType:
    """The type itself, or for parquet's own type for JSON the text that it is."""
    return kind.storage_type if isinstance(kind, pa.JsonType) else kind
