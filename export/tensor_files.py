"""Tensors in files: safetensors, or what torch.save wrote.

What enters: files. What leaves: the names and types of their tensors, and single tensors. Of a file that torch.save
wrote, only tensors are unpickled, and they stay on disk until they are read.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from qvl_batch.errors import ExportError

#: Types as safetensors names them.
TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


class TensorFiles:
    """Tensors of several files.

    Args:
        files: safetensors, or `.bin` of torch.save.

    Attributes:
        kinds: the type of each tensor, as safetensors names it.
        shapes: of each tensor.

    Raises:
        ExportError: a file cannot be read.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.kinds: dict[str, str] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, Path] = {}
        for file in files:
            for name, (kind, shape) in _described(file).items():
                self.kinds[name], self.shapes[name], self._places[name] = kind, tuple(shape), file

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        file = self._places[name]
        if file.suffix == ".bin":
            return _unpickled(file)[name]
        # Opened for each tensor: pages that were read stay mapped, and count as memory, while a file is open.
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor


def check_floats(kinds: Mapping[str, str], names: Iterable[str], where: str) -> None:
    """Refuse tensors that are not floats; `where` begins the message.

    Raises:
        ExportError: names the first one.
    """
    for name in names:
        if kinds[name] not in TYPES.values():
            raise ExportError(f"{where}: {name} is {kinds[name]}: use weights that are not quantized")


def _described(file: Path) -> dict[str, tuple[str, Sequence[int]]]:
    """Type and shape of each tensor, without its values."""
    if file.suffix == ".bin":
        tensors = _unpickled(file).items()
        return {name: (TYPES.get(tensor.dtype, str(tensor.dtype)), tensor.shape) for name, tensor in tensors}
    try:
        with safe_open(file, "pt") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {name: (each.get_dtype(), each.get_shape()) for name, each in slices.items()}
    except (OSError, SafetensorError) as error:
        raise ExportError(f"{file} cannot be read: {error}; download it again") from error


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
