"""Loads a bundle and checks it.

What enters: a directory written by `python -m export`, or the address of one. What leaves: a `Bundle` with a validated
manifest, whose files are complete.

This module runs no graph and imports neither torch, transformers nor onnxruntime.
"""

import socket
from collections.abc import Container
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Self

from qvl_batch.bundle.cache import BundleCache
from qvl_batch.bundle.external_data import external_locations
from qvl_batch.bundle.manifest import FP32, MANIFEST, File, Manifest, combined_sha256, file_sha256, read_manifest
from qvl_batch.errors import BundleError
from qvl_batch.stores import is_address


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk, with its validated manifest.

    Args:
        path: its directory.
        manifest: what is in it.
        address: where it was fetched from, None if it was not.
        cache: what it was fetched into.
    """

    path: Path
    manifest: Manifest
    address: str | None = None
    cache: BundleCache | None = None

    @classmethod
    def load(cls, place: str | Path, *, verify: bool = True, cache: BundleCache | None = None) -> Self:
        """Read and check a bundle.

        Args:
            place: the bundle's directory, or its address, from which it is fetched into the cache.
            cache: by default that in the user's own cache folder.
            verify: also hash every file, and check that the graphs load weights from no other file. A job does
                this once; its workers skip it.

        Raises:
            BundleError: there is no bundle, or it is of another format, incomplete, or damaged.
        """
        address: str | None = None
        if is_address(place):
            cache, address = cache or BundleCache(), str(place)
            path = cache.fetch(address)
        else:
            cache, path = None, Path(place).resolve()
        manifest = read_manifest(path)
        for name, file in manifest.files.items():
            _check_file(path, name, file, verify=verify)
            if verify and name.endswith(".onnx"):
                _check_weights(path, name, manifest.files)
        return cls(path, manifest, address, cache)

    @property
    def sha256(self) -> str:
        """Identifies the contents of the bundle: a hash of its files' hashes."""
        return combined_sha256((name, file.sha256) for name, file in self.manifest.files.items())

    def in_fp32(self) -> "Bundle | None":
        """The bundle of the same checkpoint in fp32, for rows that fail in reduced precision; None if there is none."""
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


@dataclass(frozen=True, slots=True)
class BundleReference:
    """A bundle that several processes and machines load.

    Args:
        place: its directory, which every machine sees, or its address.
        sha256: of its manifest.
        cache: what it is fetched into from an address, None for a directory.
    """

    place: str
    sha256: str
    cache: BundleCache | None = None

    @classmethod
    def of(cls, bundle: Bundle) -> Self:
        """A reference to a bundle that is loaded here."""
        return cls(bundle.address or str(bundle.path), file_sha256(bundle.path / MANIFEST), bundle.cache)

    def load(self) -> Bundle:
        """The bundle on this machine; its files are not hashed again.

        Raises:
            BundleError: it is not there, or is another one.
        """
        if self.cache is not None:
            return Bundle.load(self.cache.fetch(self.place, self.sha256), verify=False)
        bundle = Bundle.load(self.place, verify=False)
        if file_sha256(bundle.path / MANIFEST) != self.sha256:
            raise BundleError(
                f"{self.place} is another bundle on {socket.gethostname()} than on the machine that runs the job: copy "
                "it there again, or give its address"
            )
        return bundle


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
    """Check that a graph loads weights from listed files only; hashes cover only the files that are listed."""
    try:
        locations = external_locations((bundle / name).read_bytes())
    except ValueError as error:
        raise BundleError(f"{bundle / name} is not an ONNX graph ({error}): export the checkpoint again") from error
    for location in sorted(locations):
        if (PurePosixPath(name).parent / location).as_posix() not in files:
            raise BundleError(
                f"{bundle / name} takes weights from {location}, which {MANIFEST} does not list: "
                "do not use this bundle, export the checkpoint again"
            )
