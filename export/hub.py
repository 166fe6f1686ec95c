"""Checkpoints of the Hugging Face hub, by their ids.

What enters: `Qwen/Qwen2.5-VL-3B-Instruct`. What leaves: the folder of the hub's cache with the files that an export
reads, which are downloaded if they are not there. Cache, token and offline mode are those of `huggingface_hub`, as its
variables say: HF_HOME, HF_TOKEN, HF_HUB_OFFLINE.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from export.checkpoint_files import NAMES, has_weights
from qvl_batch.errors import ExportError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
#: The hub's own folder of a checkpoint is `models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/<commit>`.
_SNAPSHOTS, _PREFIX = "snapshots", "models--"


def is_id(checkpoint: Path) -> bool:
    """Whether this is an id of the hub, and no folder here."""
    return not checkpoint.is_dir() and _ID.fullmatch(str(checkpoint)) is not None


def checkpoint_folder(checkpoint: Path, revision: str | None, files: Sequence[str]) -> Path:
    """The folder of a checkpoint.

    Args:
        checkpoint: the folder, or an id of the hub if there is no such folder.
        revision: branch, tag or commit of an id; by default the main branch.
        files: beside weights, names of files that are wanted.

    Raises:
        ExportError: it is an id, and cannot be had from the hub or its cache; or a folder, and there is a revision.
    """
    if not is_id(checkpoint):
        if revision is not None:
            raise ExportError(f"--revision is for an id of the Hugging Face hub, and {checkpoint} is a folder")
        return checkpoint.resolve()
    from huggingface_hub import snapshot_download  # noqa: PLC0415  (not needed for a folder)

    for single, index in NAMES:
        stem, suffix = single.split(".")
        weights = [single, index, f"{stem}-*.{suffix}"]
        try:
            folder = Path(snapshot_download(str(checkpoint), revision=revision, allow_patterns=[*files, *weights]))
        except Exception as error:  # the library's errors have many types
            reason = " ".join(str(error).split())
            raise ExportError(
                f"{checkpoint} is no folder here, and cannot be had from the Hugging Face hub: {reason}"
            ) from error
        if has_weights(folder):
            break
    return folder


def name_of(folder: Path) -> str:
    """Name of a checkpoint: that of its folder, or its id if the folder is of the hub's cache."""
    if folder.parent.name == _SNAPSHOTS and folder.parent.parent.name.startswith(_PREFIX):
        return folder.parent.parent.name.removeprefix(_PREFIX).replace("--", "/")
    return folder.name
