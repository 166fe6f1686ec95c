"""The files that an input names.

What enters: paths and globs of the settings. What leaves: parquet files, in order. In folders, names that
begin with a dot or an underscore are passed over, links are followed, and a folder of a table is refused,
since it holds files of all its versions, also where a glob leads into it. Files that are named one by one are taken
as they are.
"""

import glob
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError

#: Formats of tables: what in a folder says that it is one, and Python that lists the files of a version.
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
    """Parquet files, those of a folder or glob in order of name: where each is named, and where links lead from there.

    What is in the output folder is never input: a job writes it, and may delete it.
    """
    output = _output_folder(config)
    files: dict[str, Path] = {}
    for item in config.input:
        if "://" in item:
            raise InputError(f"--input {item}: only files that are mounted can be read; give their path")
        try:
            found = {str(path): path.resolve() for path in _named_by(item)}
        except (OSError, RuntimeError, ValueError) as error:  # not to be listed; a loop of links; a name that is none
            raise InputError(f"--input {item} cannot be looked into: {error}") from error
        if not found:
            raise InputError(f"--input {item}: no parquet file is there")
        if output is not None:
            found = {
                path: target
                for path, target in found.items()
                if not (Path(path).is_relative_to(output) or target.is_relative_to(output))
            }
        if not found:
            raise InputError(
                f"--input {item} has no file but those of the output folder {output}: give another --output"
            )
        files |= found
    return files


def _output_folder(config: JobConfig) -> Path | None:
    """Where answers are written, None if that is not among local files."""
    place = str(config.output)
    if not place or "://" in place:
        return None
    try:
        return Path(place).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--output {place} cannot be a folder: {error}") from error


def _named_by(item: str) -> list[Path]:
    """Parquet files that a path or glob names, in its order of names, in folders as they are behind links."""
    found: dict[str, Path] = {}
    matches = _matches(item)
    above: set[Path] = set()
    for match in matches:
        if not match.is_dir():
            found[str(match)] = match.parent.resolve() / match.name
            above.update(found[str(match)].parents if matches != [Path(item)] else ())
            continue
        above.update(match.resolve().parents)
        for folder, names in _folders(match):
            real = folder.resolve()
            _refuse_table(real)
            found |= {str(folder / name): real / name for name in names if _is_parquet(name)}
    for folder in above:
        _refuse_table(folder)
    return [found[name] for name in sorted(found)]


def passed_over(config: JobConfig) -> Iterator[str]:
    """Files in folders of the input that are not taken for parquet, as their names say nothing of it."""
    for item in config.input:
        for match in _matches(item):
            if match.is_dir():
                for folder, names in _folders(match):
                    yield from (str(folder / name) for name in names if not _is_parquet(name))


def _is_parquet(name: str) -> bool:
    return name.lower().endswith((".parquet", ".pq"))


def _matches(pattern: str) -> list[Path]:
    """The path of that name, or what a glob matches; `glob.glob` would pass over folders that it may not list."""
    if (path := Path(pattern)).exists():
        return [path]
    found = [Path()]
    for part in Path(pattern).parts:
        if part == "**":
            found = [folder for path in found if path.is_dir() for folder, _ in _folders(path)]
        elif glob.has_magic(part):
            folders = [path for path in found if path.is_dir()]
            found = [each for path in folders for each in path.iterdir() if _is_meant(each, part)]
        else:
            found = [each for path in found if (each := path / part).exists() or each.is_symlink()]
    return found


def _is_meant(path: Path, pattern: str) -> bool:
    """Whether a pattern with wildcards matches; names of a dot, and folders of an underscore, must begin it."""
    hidden = path.name.startswith(".") or (_hidden(path) and path.is_dir())
    return fnmatchcase(path.name, pattern) and (not hidden or pattern[0] == path.name[0])


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and all below it, with names of files. Links are followed, and each folder is taken once."""
    taken: set[Path] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in taken:
            continue
        taken.add(real)
        with os.scandir(folder) as entries:
            shown = sorted((path, entry.is_dir()) for entry in entries if not _hidden(path := Path(entry.path)))
        waiting += [path for path, is_folder in reversed(shown) if is_folder]
        yield folder, [path.name for path, is_folder in shown if not is_folder]


def _hidden(path: Path) -> bool:
    """Names that begin with a dot or an underscore are not data, as in Hive and Spark."""
    return path.name.startswith((".", "_"))


def _refuse_table(folder: Path) -> None:
    """Refuse a folder of a table, whose files are those of all its versions.

    Raises:
        InputError: says how to name the files of one.
    """
    for kind, (signs, listing) in TABLES.items():
        if any(True for sign in signs for _ in folder.glob(sign)):  # none in a folder that may not be listed
            raise InputError(
                f"{folder} is {kind}: its files also hold rows that it has deleted. Name the files of one version, as "
                f"{listing.format(folder)} lists them in Python, or, if deleted rows are marked beside them, write it "
                "out as plain parquet"
            )
