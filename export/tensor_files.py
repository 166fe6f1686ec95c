"""The files of a checkpoint's weights: safetensors, or `pytorch_model.bin`, which torch.save wrote.

What enters: a checkpoint's folder. What leaves: its files, as transformers chooses them; the names and types of the
tensors in a file, and single tensors. Of a file that torch.save wrote, only tensors are unpickled, and they stay on
disk until they are read.
"""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvl_batch.errors import ExportError

#: A file of all weights, and the index of several, as transformers looks for them, one pair after the other.
NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
#: Types as safetensors names them.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


def weight_files(path: Path) -> list[Path]:
    """Files of the weights: the first of `NAMES` that are there.

    Raises:
        ExportError: there are none, or some are missing.
    """
    for single, index in NAMES:
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            return _of_index(path / index)
    tried = " and no ".join(name for pair in NAMES for name in pair)
    raise ExportError(f"{path} has no {tried}: it is not a checkpoint, or was not downloaded completely")


def has_weights(path: Path) -> bool:
    """Whether a folder has one of `NAMES`."""
    return any((path / name).is_file() for pair in NAMES for name in pair)


def types_in(file: Path) -> dict[str, str]:
    """The type of each tensor in a file, as safetensors names it.

    Raises:
        ExportError: it cannot be read.
    """
    if file.suffix == ".bin":
        return {name: TYPES.get(tensor.dtype, str(tensor.dtype)) for name, tensor in _unpickled(file).items()}
    try:
        with safe_open(file, "pt") as opened:
            return {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read: {error}; download it again") from error


def read_tensor(file: Path, name: str) -> Tensor:
    """A tensor of a file that `types_in` could read."""
    if file.suffix == ".bin":
        return _unpickled(file)[name]
    # Opened for each tensor: pages that were read stay mapped, and count as memory, while a file is open.
    with safe_open(file, "pt") as opened:
        tensor: Tensor = opened.get_tensor(name)
    return tensor


def _of_index(index: Path) -> list[Path]:
    path = index.parent
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} cannot be read: {error}; download it again") from error
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise ExportError(f"{path} lacks {missing[0]}, which its index names: download it")
    return sorted(path / name for name in names)


def _unpickled(file: Path) -> dict[str, Tensor]:
    try:
        found = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises errors of many types
        raise ExportError(
            f"{file} cannot be read as tensors alone ({type(error).__name__}): download it again, or save the model "
            "as safetensors"
        ) from error
    if not isinstance(found, dict) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ExportError(f"{file} has more than tensors: save the model as safetensors")
    return found
