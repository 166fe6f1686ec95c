"""Finds the parquet files that `--input` names.

What enters: paths and globs of the settings. What leaves: parquet files, in order. In folders, names that begin with a
dot or an underscore are skipped, and links are followed. A folder of a table (Delta, Iceberg, Hudi) is refused, since
it holds the files of all its versions; so is a glob that matches inside one. Files that are named one by one are not
checked in this way.
"""

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError

#: Table formats: globs that recognise a table's folder, and a Python expression that lists the files of one version.
TABLES = {
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


def find_files(config: JobConfig) -> dict[str, Path]:
    """Find the parquet files of the input, in the order of `--input`; those of a folder or glob are sorted by name.

    Files in the output folder are never input: a job writes there, and `--overwrite` deletes there.

    Returns:
        Paths with links to folders resolved: for each, the path with a link to the file resolved too.

    Raises:
        InputError: a path of the input has no such files, cannot be accessed, or is a table.
        ConfigError: `--output` is not a valid path.
    """
    output = _output_folder(config)
    files: dict[str, Path] = {}
    for item in config.input:
        if "://" in item:
            raise InputError(f"--input {item}: only local or mounted files can be read; give their path")
        try:
            found = {str(path): path.resolve() for path in _named_by(item)}
        except (OSError, RuntimeError, ValueError) as error:  # no permission; a loop of links; an invalid name
            raise InputError(f"--input {item} cannot be accessed: {error}") from error
        if not found:
            raise InputError(f"--input {item}: no parquet file found")
        if output is not None:
            found = {
                path: target
                for path, target in found.items()
                if not (Path(path).is_relative_to(output) or target.is_relative_to(output))
            }
        if not found:
            raise InputError(f"--input {item} has only files of the output folder {output}: give another --output")
        files |= found
    return files


def _output_folder(config: JobConfig) -> Path | None:
    """The local folder of the answers with links resolved, None if they go to an object store."""
    place = str(config.output)
    if not place or "://" in place:
        return None
    try:
        return Path(place).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--output {place} is not a valid path of a folder: {error}") from error


def _named_by(item: str) -> list[Path]:
    """Parquet files that a path or glob names, with links to folders resolved; sorted by their names before that.

    Raises:
        InputError: a folder is a table, or is inside one.
        OSError, RuntimeError, ValueError: a path cannot be accessed.
    """
    found: dict[str, Path] = {}
    matches = _matches(item)
    parents: set[Path] = set()
    for match in matches:
        if not match.is_dir():
            found[str(match)] = match.parent.resolve() / match.name
            parents.update(found[str(match)].parents if matches != [Path(item)] else ())
            continue
        parents.update(match.resolve().parents)
        for folder, names in _folders(match):
            real = folder.resolve()
            _refuse_table(real)
            found |= {str(folder / name): real / name for name in names if _is_parquet(name)}
    for folder in parents:
        _refuse_table(folder)
    return [found[name] for name in sorted(found)]


def passed_over(config: JobConfig) -> Iterator[str]:
    """Files in folders of the input that are skipped because their names do not end like those of parquet files."""
    for item in config.input:
        for match in _matches(item):
            if match.is_dir():
                for folder, names in _folders(match):
                    yield from (str(folder / name) for name in names if not _is_parquet(name))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith((".parquet", ".pq"))


def _matches(pattern: str) -> list[Path]:
    """The path of that name if it exists, else what matches it as a glob.

    `glob.glob` would skip folders that it has no permission to list; this raises.
    """
    if (path := Path(pattern)).exists():
        return [path]
    found = [Path()]
    for part in Path(pattern).parts:
        if part == "**":
            found = [folder for path in found if path.is_dir() for folder, _ in _folders(path)]
        elif glob.has_magic(part):
            folders = [path for path in found if path.is_dir()]
            found = [each for path in folders for each in path.iterdir() if _is_matched(each, part)]
        else:
            found = [each for path in found if (each := path / part).exists() or each.is_symlink()]
    return found


def _is_matched(path: Path, pattern: str) -> bool:
    """Whether a pattern with wildcards matches a name.

    A name that begins with a dot, and a folder's that begins with an underscore, matches only if the pattern begins
    with that character.
    """
    hidden = path.name.startswith(".") or (_is_hidden(path) and path.is_dir())
    return fnmatchcase(path.name, pattern) and (not hidden or pattern[0] == path.name[0])


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """Walk a folder and all folders below it, each once: path, and names of its files. Hidden names are skipped.

    Links are followed.
    """
    visited: set[Path] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in visited:
            continue
        visited.add(real)
        with os.scandir(folder) as entries:
            shown = sorted((path, entry.is_dir()) for entry in entries if not _is_hidden(path := Path(entry.path)))
        waiting += [path for path, is_folder in reversed(shown) if is_folder]
        yield folder, [path.name for path, is_folder in shown if not is_folder]


def _is_hidden(path: Path) -> bool:
    """Whether a name begins with a dot or an underscore; such files are not data, as in Hive and Spark."""
    return path.name.startswith((".", "_"))


def _refuse_table(folder: Path) -> None:
    """Refuse the folder of a table, which holds the files of all its versions.

    Raises:
        InputError: the folder is a table; the message says how to list the files of one version.
    """
    for kind, (signs, listing) in TABLES.items():
        if any(True for sign in signs for _ in folder.glob(sign)):  # no match in a folder without read permission
            raise InputError(
                f"{folder} is {kind}: its files also hold deleted rows. Give the files of one version, which in Python "
                f"{listing.format(folder)} lists; if the table keeps deletes in files of their own, write it out as "
                "plain parquet instead"
            )
