"""Reads images that the input names by path or address, from the allowed places only.

What enters: locations from the input, unchecked. What leaves: their bytes, or an `ImageError`. A location must be
inside one of the allowed places after links, `..` and redirects are resolved. A host that resolves to a private address
is refused; such a host must be given by its IP address, in the allowed place and in the location. Size and time of each
image, the number of images that are fetched at a time, and the connections to each server are bounded.
"""

import importlib.metadata
import stat
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from qvl_batch.config import CONNECTIONS_PER_HOST, IMAGES_AT_ONCE, OBJECT_STORES, JobConfig
from qvl_batch.errors import ConfigError, ImageError
from qvl_batch.input.addresses import HTTP, Address, Place, is_local, local_path, short
from qvl_batch.input.ahead import Fetching
from qvl_batch.input.download import Download, Rules, download_object, unreadable
from qvl_batch.input.headers import Headers, read_headers
from qvl_batch.input.request import MAX_BYTES
from qvl_batch.input.servers import Gate, Servers, Slot
from qvl_batch.stores import check_client

#: Files that a task reads at a time.
LOCAL_AT_ONCE = 8
#: Images of one bucket that a task fetches at a time: clients of object stores have few connections.
BUCKET_AT_ONCE = 8
#: Images that are begun ahead of the one that is waited for, as a multiple of those at a time.
AHEAD = 4
#: Characters of the longest path: Linux's `PATH_MAX`.
LONGEST_PATH = 4_096


class Fetcher:
    """Reads images from the allowed places.

    Args:
        allowed: local folders, and addresses of folders: `s3://bucket/images`, `https://host/images`, `https://*`.
        user_agent: how requests name this program; None for its name and version.
        headers: a file of what else servers are told.
        at_once: images that are fetched at a time.
        per_host: connections to one host at a time.

    Raises:
        ConfigError: a place is neither, or the client for it is not installed; or the file of headers cannot be used.
    """

    def __init__(
        self,
        allowed: Sequence[str],
        *,
        user_agent: str | None = None,
        headers: Path | None = None,
        at_once: int = IMAGES_AT_ONCE,
        per_host: int = CONNECTIONS_PER_HOST,
    ) -> None:
        self._folders: list[Path] = []
        places: list[Place] = []
        for name in allowed:
            if not name.strip():
                raise ConfigError("--allow-images-from must not be empty")
            try:
                if is_local(name):
                    self._folders.append(_folder(name))
                else:
                    places.append(_place(name))
            except ConfigError as error:
                raise ConfigError(f"--allow-images-from {name}: {error}") from error
        self._rules = Rules(
            tuple(places),
            user_agent or _own_name(),
            Headers() if headers is None else read_headers(headers, places),
        )
        self._at_once, self._per_host = at_once, per_host

    @classmethod
    def of(cls, config: JobConfig) -> "Fetcher":
        """As a job's settings say.

        Raises:
            ConfigError: a place or the file of headers cannot be used.
        """
        return cls(
            config.allow_images_from,
            user_agent=config.user_agent,
            headers=config.image_headers,
            at_once=config.images_at_once,
            per_host=config.connections_per_host,
        )

    def shared_by(self, tasks: int) -> "Fetcher":
        """One for each of so many tasks, which together have the connections to a host; each has at least one."""
        shared = copy(self)
        shared._per_host = max(1, self._per_host // tasks)  # noqa: SLF001
        return shared

    @property
    def ahead(self) -> int:
        """Images that are fetched ahead of the one that is waited for."""
        return AHEAD * self._at_once

    def fetch_all(self, locations: Sequence[str], folder: Path) -> Fetching:
        """Begin to fetch images, several at a time.

        Args:
            locations: paths or addresses.
            folder: folder of the file that names them, to which relative paths refer.
        """
        return Fetching([self._begin(location, folder) for location in locations])

    def fetch(self, location: str, folder: Path) -> bytes:
        """Fetch an image.

        Raises:
            ImageError: it is not allowed, does not exist, is too large, or did not arrive in time.
        """
        (result,) = self.fetch_all([location], folder).results()
        if isinstance(result, ImageError):
            raise result
        return result

    def _begin(self, location: str, folder: Path) -> "Future[bytes | ImageError]":
        """Begin to fetch an image, or have its turn come."""
        image: Future[bytes | ImageError] = Future()
        shared = _of_process(self._at_once, self._per_host)
        try:
            address = _address(location)
            if is_local(location):
                shared.local.submit(_run, image, lambda: self._read(location, folder))
            else:
                try:
                    self._rules.allow(address)
                except ImageError as error:
                    raise ImageError(f"{short(location)} {error}") from error
                servers = shared.hosts if address.scheme in HTTP else shared.buckets
                Slot(shared.all, servers, address.server, lambda slot: self._start(image, location, address, slot))
        except ImageError as error:
            image.set_result(error)
        return image

    def _start(self, image: "Future[bytes | ImageError]", location: str, address: Address, slot: Slot) -> None:
        """Fetch an image in a thread of its own: one that waits for a server must not keep others from theirs."""

        def work() -> bytes:
            if address.scheme in HTTP:
                return Download(address, self._rules, slot).fetch()
            return download_object(location, address.scheme)

        run = partial(_run, image, work, slot.leave)
        threading.Thread(target=run, name="qvl-fetch", daemon=True).start()

    def _read(self, location: str, folder: Path) -> bytes:
        name = short(location)
        if len(location) > LONGEST_PATH:
            raise ImageError(f"{name} is too long for a path")
        try:
            path = (folder / local_path(location)).resolve()
            if not any(path.is_relative_to(allowed) for allowed in self._folders):
                raise ImageError(f"{name} is not inside any folder of --allow-images-from")
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{name} is not a regular file")
            if status.st_size > MAX_BYTES:
                raise ImageError(f"{name} has {status.st_size:,} bytes; the limit is {MAX_BYTES:,}")
            return path.read_bytes()
        except (OSError, ValueError, RuntimeError) as error:  # it does not exist; a null byte; a loop of links
            raise unreadable(location, error) from error


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all fetchers of this process share, so that bounds hold for its tasks together.

    Args:
        local: threads that read files.
        all: images at a time that come over the network.
        hosts: what is known of web servers.
        buckets: what is known of buckets.
    """

    local: ThreadPoolExecutor
    all: Gate
    hosts: Servers
    buckets: Servers


@lru_cache(maxsize=1)
def _of_process(at_once: int, per_host: int) -> _Shared:
    local = ThreadPoolExecutor(LOCAL_AT_ONCE, "qvl-read")
    return _Shared(local, Gate(at_once), Servers(per_host), Servers(BUCKET_AT_ONCE))


def _own_name() -> str:
    """This program and its version, if it is installed and not only on the path."""
    try:
        return f"qvl-batch/{importlib.metadata.version('qvl-batch')}"
    except importlib.metadata.PackageNotFoundError:
        return "qvl-batch"


def _folder(name: str) -> Path:
    folder = Path(local_path(name)).resolve()
    if not folder.is_dir():
        raise ConfigError("there is no such folder")
    return folder


def _place(name: str) -> Place:
    place = Place.of(name)
    if place.scheme in OBJECT_STORES:
        check_client(place.scheme)
    return place


def _address(location: str) -> Address:
    """Parse the location of an image.

    Raises:
        ImageError: it cannot be one.
    """
    if not location.strip():
        raise ImageError("the path of the image is empty")
    try:
        location.encode()
    except UnicodeError as error:  # a message that repeats it could not be written
        raise ImageError(f"the path of the image is not valid Unicode: {error}") from error
    return Address.of(location)


def _run(
    image: "Future[bytes | ImageError]",
    work: Callable[[], bytes],
    done: Callable[[], None] = lambda: None,
) -> None:
    """Fetch an image, unless nobody wants it any longer; then call `done`."""
    try:
        if not image.set_running_or_notify_cancel():
            return
        try:
            image.set_result(work())
        except ImageError as error:
            image.set_result(error)
        except BaseException as error:
            image.set_exception(error)
    finally:
        done()
