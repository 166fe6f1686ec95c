"""Arrays that are kept in files, and read when they are used."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
#: Returns an array with the same values.
Keep = Callable[[Array], Array]


class Disk:
    """Keeps arrays in a folder, which must outlive them."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._files = folder, 0

    def keep(self, array: Array) -> Array:
        """The same array, mapped from a new file."""
        if not array.size:  # cannot be mapped
            return array
        file = self._folder / f"{self._files}.npy"
        self._files += 1
        np.save(file, array)
        mapped: Array = np.load(file, mmap_mode="r")
        return mapped


def in_memory(array: Array) -> Array:
    """An array as it is."""
    return array
