"""Finds the files that `--input` names.

What enters: paths and globs of the settings. What leaves: files of rows, and folders of images, in order. In folders,
names that begin with a dot or an underscore are skipped, and links are followed.

A folder is one of images if neither it nor what else the same path or glob of `--input` names has files of rows: beside
those, images are what rows refer to. A folder with several kinds of files of rows is refused, since they can be the
same rows twice. Of the folder of a Delta table, the files of its current version are read (`tables`); other tables are
refused, and so is what is inside of one or around it. Files that are named one by one are not checked in these ways.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from glob import has_magic
from pathlib import Path

from qvl_batch.config import JobConfig
from qvl_batch.errors import ConfigError, InputError
from qvl_batch.input.endings import is_image, kind_of, spelled
from qvl_batch.input.files import (
    FilePath,
    check_address,
    entries,
    is_inside,
    place_at,
    place_of,
    start_of,
)
from qvl_batch.input.store_files import StorePath
from qvl_batch.input.tables import files_of_table, refuse_table


@dataclass(frozen=True, slots=True)
class Found:
    """What `--input` names, in its order; what a folder or glob names is sorted by name.

    Args:
        paths: of files with links to folders resolved, and of folders of images with a slash at their end; for each,
            the path with all links resolved.
        passed_over: how many other files these folders have.
        example: one of those.
    """

    paths: dict[str, FilePath]
    passed_over: int = 0
    example: str | None = None


def find_files(config: JobConfig) -> Found:
    """Find the input.

    Files in the output folder are never input: a job writes there, and `--overwrite` deletes there.

    Raises:
        InputError: a path of the input has no files of rows and no images, cannot be accessed, is a table, or has
            several kinds of files of rows.
        ConfigError: `--output` is not a valid path.
    """
    output = output_folder(config)
    paths: dict[str, FilePath] = {}
    passed_over, example = 0, None
    for item in config.input:
        try:
            check_address(item)
            named = _named_by(item)
        except ConfigError as error:
            raise InputError(f"--input {error}") from error
        except (OSError, RuntimeError, ValueError) as error:  # no permission; a loop of links; an invalid name
            raise InputError(f"--input {item} cannot be accessed: {error}") from error
        found = named.paths
        if not found:
            raise InputError(f"--input {item}: no file found that ends in {spelled()}, and no images")
        if output is not None:
            found = {
                path: target
                for path, target in found.items()
                if not (is_inside(place_of(path, target), output) or is_inside(target, output))
            }
        if not found:
            raise InputError(f"--input {item} has only files of the output folder {output}: give another --output")
        paths |= found
        passed_over, example = passed_over + named.passed_over, example or named.example
    return Found(_outermost(paths), passed_over, example)


def _outermost(paths: dict[str, FilePath]) -> dict[str, FilePath]:
    """Without folders of images that are inside others: these have their images."""
    folders = {target for path, target in paths.items() if path.endswith("/")}
    return {
        path: target for path, target in paths.items() if not path.endswith("/") or folders.isdisjoint(target.parents)
    }


def output_folder(config: JobConfig) -> FilePath | None:
    """The folder of the answers, with links resolved.

    Raises:
        ConfigError: it is not a valid path.
    """
    place = str(config.output)
    if not place:
        return None
    try:
        return place_at(place).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"--output {place} is not a valid path of a folder: {error}") from error


def _named_by(item: str) -> Found:
    """What a path or glob names, sorted by the names before links are resolved.

    Raises:
        InputError: a folder is a table or is inside one, or has several kinds of files of rows; or images are named.
        OSError, RuntimeError, ValueError: a path cannot be accessed.
    """
    matches = _matches(item)
    parents: set[FilePath] = set()
    files: dict[str, FilePath] = {}
    walked: list[_Walk] = []
    for match in matches:
        if not match.is_dir():
            files[str(match)] = match.parent.resolve() / match.name
            parents.update(files[str(match)].parents if matches != [place_at(item)] else ())
            continue
        parents.update(match.resolve().parents)
        if (live := files_of_table(match.resolve())) is not None:
            files |= {str(path): path for path in live}
        else:
            walked.append(_Walk.of(match))
    for folder in parents:
        refuse_table(folder)
    if (image := next((name for name in files if is_image(name) and kind_of(name) is None), None)) is not None:
        raise InputError(f"--input {item} names images, such as {image}: images are read by folder, so give theirs")
    files |= {name: path for each in walked for name, path in each.files.items()}
    if files:
        paths = {str(files[name]): files[name].resolve() for name in sorted(files)}
        others = [counted for each in walked for counted in (each.images, each.texts, each.others)]
    else:
        folders_of_images = (each.top.resolve() for each in walked if each.images.count)
        paths = {f"{str(folder).rstrip('/')}/": folder for folder in folders_of_images}
        others = [each.others for each in walked]
    return Found(paths, sum(each.count for each in others), next((each.first for each in others if each.count), None))


@dataclass(slots=True)
class _Counted:
    """Files of one sort in a folder: how many there are, and the first."""

    count: int = 0
    first: str = ""

    def add(self, folder: FilePath, name: str) -> None:
        if not self.count:
            self.first = str(folder / name)
        self.count += 1


@dataclass(slots=True)
class _Walk:
    """What a folder and all folders below it have: files of rows, by their names before links are resolved; images,
    texts, which are prompts beside images, and others.
    """

    top: FilePath
    files: dict[str, FilePath] = field(default_factory=dict)
    images: _Counted = field(default_factory=_Counted)
    texts: _Counted = field(default_factory=_Counted)
    others: _Counted = field(default_factory=_Counted)

    @classmethod
    def of(cls, top: FilePath) -> "_Walk":
        """Walk a folder.

        Raises:
            InputError: it is a table, or has several kinds of files of rows.
        """
        walked, kinds = cls(top), dict[str, str]()
        for folder, names in walk(top):
            real = folder.resolve()
            refuse_table(real)
            for name in names:
                if (kind := kind_of(name)) is not None:
                    walked.files[str(folder / name)] = real / name
                    kinds.setdefault(kind, str(folder / name))
                else:
                    others = walked.texts if name.endswith(".txt") else walked.others
                    (walked.images if is_image(name) else others).add(folder, name)
        if len(kinds) > 1:
            kind, other = sorted(kinds)[:2]
            raise InputError(
                f"{top} has files of {kind} ({kinds[kind]}) and of {other} ({kinds[other]}), which may be the same "
                f"rows twice: name those that are meant, such as --input '{top}/**/*{Path(kinds[kind]).suffix}'"
            )
        return walked


def _matches(pattern: str) -> list[FilePath]:
    """The path of that name if it exists, else what matches it as a glob.

    `glob.glob` would skip folders that it has no permission to list; this raises.
    """
    if (path := place_at(pattern)).exists():
        return [path]
    start, parts = start_of(pattern)
    found = [start] if parts else []
    for part in parts:
        if part == "**":
            found = [folder for path in found if path.is_dir() for folder, _ in walk(path)]
        elif has_magic(part):
            folders = [path for path in found if path.is_dir()]
            found = [each for path in folders for each in path.iterdir() if _is_matched(each, part)]
        else:
            found = [each for path in found if (each := path / part).exists() or each.is_symlink()]
    return found


def _is_matched(path: FilePath, pattern: str) -> bool:
    """Whether a pattern with wildcards matches a name.

    A name that begins with a dot, and a folder's that begins with an underscore, matches only if the pattern begins
    with that character.
    """
    hidden = path.name.startswith(".") or (_is_hidden(path.name) and path.is_dir())
    return fnmatchcase(path.name, pattern) and (not hidden or pattern[0] == path.name[0])


def walk(top: FilePath) -> Iterator[tuple[FilePath, list[str]]]:
    """Walk a folder and all folders below it, each once: path, and names of its files. Hidden names are skipped.

    Links are followed. Of a store, all are listed at once.
    """
    if isinstance(top, StorePath):
        top.store.list_all(top.address)
    visited: set[FilePath] = set()
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        real = folder.resolve()
        if real in visited:
            continue
        visited.add(real)
        shown = sorted((name, is_folder) for name, is_folder in entries(folder) if not _is_hidden(name))
        waiting += [folder / name for name, is_folder in reversed(shown) if is_folder]
        yield folder, [name for name, is_folder in shown if not is_folder]


def _is_hidden(name: str) -> bool:
    """Whether a name begins with a dot or an underscore; such files are not data, as in Hive and Spark."""
    return name.startswith((".", "_"))
