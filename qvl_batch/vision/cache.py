"""Image features kept on disk, so that a second prompt over the same images runs no vision.

    DIR/<maker>/<first byte of key>/<key>.f32     float32 (T_img, D), then CRC-32

A key stands for an image's bytes and how it is fitted; the folder for what made features of them. What is
found is therefore what would be made again, bit for bit on the same kind of processor. Files appear whole
(temporary name, rename), so several workers may share a folder and be killed at any time; a file that is
damaged all the same is taken for missing. The oldest, by last use, go when the folder is full.

This module knows nothing of how features are made.
"""

import contextlib
import os
import tempfile
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import PIL

from qvl_batch.bundle.layout import Features
from qvl_batch.bundle.manifest import Manifest, combined_sha256
from qvl_batch.errors import OutputError
from qvl_batch.runtime.session import ORT_VERSION

SUFFIX, PARTIAL = ".f32", ".partial-"
#: A file that is still being written after so long has no writer any more.
ABANDONED_SECONDS = 3600
#: Features written between two looks at the size of the folder.
WRITES_PER_SWEEP = 256
#: A sweep leaves this part of the bound, so that the next is not due at once.
KEPT = 0.9
_CRC_BYTES = 4


class VisionCache:
    """A folder of features, bounded in size.

    Args:
        folder: shared by workers and runs; it is made if it is missing.
        maker: identifies what makes the features: the vision graph, and what decodes images for it and runs it.
        shape: of an image's features, (T_img, D).
        max_bytes: bound on the size of all files under `folder`.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, maker: str, shape: tuple[int, int], max_bytes: int) -> None:
        self._root, self._folder = folder, folder / maker[:16]
        self._shape, self._max_bytes = shape, max_bytes
        self._writes = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                self.sweep()
        except OSError as error:
            raise OutputError(f"--vision-cache {folder} cannot be used: {error.strerror}") from error

    def get(self, key: bytes) -> Features | None:
        """Features of an image, None if they are not there."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        body = data[:-_CRC_BYTES]
        whole = len(body) == 4 * self._shape[0] * self._shape[1]
        if not whole or zlib.crc32(body).to_bytes(_CRC_BYTES, "little") != data[-_CRC_BYTES:]:
            return None
        return np.frombuffer(body, np.float32).reshape(self._shape)

    def put(self, key: bytes, features: Features) -> None:
        """Keep features.

        Raises:
            OutputError: they cannot be written.
        """
        path = self._path(key)
        body = features.tobytes()
        partial = path.with_suffix(f"{PARTIAL}{uuid.uuid4().hex}")
        try:
            path.parent.mkdir(exist_ok=True)
            try:
                partial.write_bytes(body + zlib.crc32(body).to_bytes(_CRC_BYTES, "little"))
                partial.rename(path)
            except OSError:
                partial.unlink(missing_ok=True)
                raise
            self._writes += 1
            if self._writes % WRITES_PER_SWEEP == 0:
                self.sweep()
        except OSError as error:
            raise OutputError(f"--vision-cache {self._root} cannot be written: {error.strerror}") from error

    def sweep(self) -> None:
        """Delete what killed workers left, and the features used longest ago, until the bound is kept."""
        found: list[tuple[float, int, Path]] = []
        for path in self._root.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps too
                status = path.stat()
                if path.suffix == SUFFIX:
                    found.append((status.st_mtime, status.st_size, path))
                elif path.suffix.startswith(PARTIAL) and status.st_mtime < time.time() - ABANDONED_SECONDS:
                    path.unlink()
        size = sum(each for _, each, _ in found)
        if size <= self._max_bytes:
            return
        for _, each, path in sorted(found):
            path.unlink(missing_ok=True)
            size -= each
            if size <= KEPT * self._max_bytes:
                return

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}{SUFFIX}"


def open_vision_cache(folder: Path, gigabytes: float, manifest: Manifest) -> VisionCache:
    """Features that are kept of a bundle's vision graph, and of these versions of Pillow and ONNX Runtime; of a bundle
    with known answers, they are apart from those that were made without.

    Raises:
        OutputError: the folder cannot be written.
    """
    proved = "by nobody" if manifest.tolerance is None else "by known answers"
    maker = combined_sha256(
        [
            ("vision", manifest.vision_sha256),
            ("pillow", PIL.__version__),
            ("onnxruntime", ORT_VERSION),
            ("proved", proved),
        ]
    )
    return VisionCache(folder, maker, manifest.feature_shape, int(gigabytes * 1e9))
