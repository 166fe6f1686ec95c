"""Image features cached on disk, so that a second prompt over the same images runs no vision graph.

    DIR/<producer>/<first byte of key>/<key>.f32     float32 (T_img, D), then CRC-32

The key identifies an image's bytes and how it is seen, `<producer>` what computed its features (see
`open_vision_cache`). So cached features are those that would be computed again, bit for bit on the same kind of
processor. Files are written under a temporary name and renamed, so several workers can share a folder and be killed at
any time; a damaged file counts as a miss. When the folder is full, the least recently used features are evicted.

This module knows nothing of how features are computed.
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
#: Age at which a temporary file counts as left behind by a killed worker.
ABANDONED_SECONDS = 3600
#: Files written by this process between two checks of the folder's size.
WRITES_PER_SWEEP = 256
#: An eviction goes down to this fraction of the bound, so that the next is not due at once.
EVICT_TO = 0.9
_CRC_BYTES = 4


class VisionCache:
    """A folder of features, bounded in size, with LRU eviction.

    Args:
        folder: shared by workers and runs; created if missing.
        producer: hash that identifies what computes the features: the vision graph, and the libraries that decode
            images and run the graph.
        hidden_size: width of the features (D).
        max_bytes: bound on the size of all files under `folder`.

    Raises:
        OutputError: the folder cannot be written.
    """

    def __init__(self, folder: Path, producer: str, hidden_size: int, max_bytes: int) -> None:
        self._root, self._folder = folder, folder / producer[:16]
        self._hidden_size, self._max_bytes = hidden_size, max_bytes
        self._writes = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self._folder):
                self.sweep()
        except OSError as error:
            raise OutputError(f"--vision-cache {folder} cannot be used: {error.strerror}") from error

    def get(self, key: bytes, tokens: int) -> Features | None:
        """Cached features of an image of `tokens` image tokens, float32 (T_img, D), or None. Marks them as recently
        used.
        """
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        body = data[:-_CRC_BYTES]
        is_complete = len(body) == 4 * tokens * self._hidden_size
        if not is_complete or zlib.crc32(body).to_bytes(_CRC_BYTES, "little") != data[-_CRC_BYTES:]:
            return None
        return np.frombuffer(body, np.float32).reshape(tokens, self._hidden_size)

    def put(self, key: bytes, features: Features) -> None:
        """Write the features of an image, float32 (T_img, D).

        Raises:
            OutputError: the file cannot be written.
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
        """Delete temporary files of killed workers, and evict least recently used features if the bound is exceeded."""
        found: list[tuple[float, int, Path]] = []
        for path in self._root.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):  # another worker deleted it
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
            if size <= EVICT_TO * self._max_bytes:
                return

    def _path(self, key: bytes) -> Path:
        name = key.hex()
        return self._folder / name[:2] / f"{name}{SUFFIX}"


def open_vision_cache(folder: Path, gigabytes: float, manifest: Manifest) -> VisionCache:
    """The cache of a bundle's vision graph with the installed versions of Pillow and ONNX Runtime. Features of bundles
    with and without known answers are separate, since only the former come from a checked machine.

    Args:
        folder: shared by workers and runs; created if missing.
        gigabytes: bound on the size of the folder.
        manifest: manifest of the bundle.

    Raises:
        OutputError: the folder cannot be written.
    """
    proved = "by nobody" if manifest.tolerance is None else "by known answers"
    producer = combined_sha256(
        [
            ("vision", manifest.vision_sha256),
            ("pillow", PIL.__version__),
            ("onnxruntime", ORT_VERSION),
            ("proved", proved),
        ]
    )
    return VisionCache(folder, producer, manifest.decoder.hidden_size, int(gigabytes * 1e9))
