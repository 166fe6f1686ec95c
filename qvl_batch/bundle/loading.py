"""A bundle on disk: read, and checked file by file.

What enters: a directory written by `python -m export`. What leaves: a `Bundle`, whose manifest has been checked field
by field and whose files are there and whole.

This module runs no graph and imports neither torch, transformers nor onnxruntime.
"""

from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from qvl_batch.bundle.external_data import external_locations
from qvl_batch.bundle.manifest import FP32, MANIFEST, File, Manifest, combined_sha256, file_sha256, read_manifest
from qvl_batch.errors import BundleError


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest has been read and checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Read and check a bundle.

        Args:
            path: the bundle's directory.
            verify: also hash every file, and see that the graphs read no other. A job does so once; its
                workers need not.

        Raises:
            BundleError: no bundle, of another format, incomplete, or damaged.
        """
        path = Path(path).resolve()
        manifest = read_manifest(path)
        for name, file in manifest.files.items():
            _check_file(path, name, file, verify=verify)
            if verify and name.endswith(".onnx"):
                _check_weights(path, name, manifest.files)
        return cls(path, manifest)

    @property
    def sha256(self) -> str:
        """Identifies what the bundle answers with: a hash of its files' hashes."""
        return combined_sha256((name, file.sha256) for name, file in self.manifest.files.items())

    def in_fp32(self) -> "Bundle | None":
        """The same checkpoint in fp32, if it was exported too: for rows whose numbers fail here."""
        if f"{FP32}/{MANIFEST}" not in self.manifest.files:
            return None
        return Bundle.load(self.path / FP32, verify=False)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}: export the checkpoint again")
        return self.path / name


def _check_file(bundle: Path, name: str, file: File, *, verify: bool) -> None:
    path = bundle / name
    if not path.resolve().is_relative_to(bundle):
        raise BundleError(f"{bundle / MANIFEST} lists {name}, which is outside the bundle")
    if not path.is_file():
        raise BundleError(f"{bundle} lacks {name}: copy the bundle again")
    if path.stat().st_size != file.size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, not {file.size}: copy the bundle again")
    if verify and file_sha256(path) != file.sha256:
        raise BundleError(f"{path} is damaged (its SHA-256 differs): copy the bundle again")


def _check_weights(bundle: Path, name: str, files: Container[str]) -> None:
    """Hashes say that files are those of the export; only this says that a graph reads no others."""
    try:
        locations = external_locations((bundle / name).read_bytes())
    except ValueError as error:
        raise BundleError(f"{bundle / name} is no ONNX graph ({error}): export the checkpoint again") from error
    for location in sorted(locations):
        if (PurePosixPath(name).parent / location).as_posix() not in files:
            raise BundleError(
                f"{bundle / name} takes weights from {location}, which {MANIFEST} does not list: "
                "do not use this bundle, export the checkpoint again"
            )
