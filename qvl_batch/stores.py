"""Clients of object stores, by the scheme of an address, and attempts at what stores may refuse for a while.

What enters: addresses (`s3://bucket/folder`). What leaves: clients of fsspec, with the path there. They find
credentials and settings in their own ways: the environment, profiles, roles of machines, and `FSSPEC_*`.

Clients repeat a request by themselves for some seconds; `retried` is for a store that is gone for longer.
"""

import time
from collections.abc import Callable
from typing import Any, TypeVar

import fsspec

from qvl_batch.errors import ConfigError

Result = TypeVar("Result")
#: Pauses in seconds before a request is made again.
WAITS = (1.0, 5.0, 20.0)
#: Requests to S3 at a time. botocore has 10 by default, fewer than there are threads that read.
CONNECTIONS = 32
_S3 = ("s3", "s3a")
#: Errors that another attempt would not change, and names of those of clients that say so of credentials.
FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_REFUSED = {
    "ClientAuthenticationError", "DefaultCredentialsError", "GatedRepoError", "NoCredentialsError",
    "PartialCredentialsError", "ProfileNotFound", "RepositoryNotFoundError",
}  # fmt: skip


def is_address(place: object) -> bool:
    """Whether a place is an address, and not a path of this machine."""
    return "://" in str(place)


def check_client(scheme: str) -> None:
    """Check that there is a client for a kind of store.

    Raises:
        ConfigError: there is none, or it is not installed. The message is a reason, without the address.
    """
    try:
        fsspec.get_filesystem_class(scheme)
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error


def client(address: str) -> tuple[Any, str]:
    """The client for an address, and the path of it there. It remembers no listings: stores change.

    Raises:
        ConfigError: there is none, it is not installed, or it cannot be used.
    """
    scheme = address.partition("://")[0]
    try:
        check_client(scheme)
        kind = fsspec.get_filesystem_class(scheme)
        options = kind._get_kwargs_from_urls(address)  # noqa: SLF001  (fsspec has no public name for it)
        if scheme in _S3:
            own = fsspec.config.conf.get(scheme, {}).get("config_kwargs", {})
            options["config_kwargs"] = {"max_pool_connections": CONNECTIONS} | own
        files = fsspec.filesystem(scheme, use_listings_cache=False, **options)
        return files, str(kind._strip_protocol(address.rstrip("/")))  # noqa: SLF001
    except Exception as error:  # clients raise errors of any type
        raise ConfigError(f"{address}: {error}") from error


def retried(read: Callable[[], Result]) -> Result:
    """The result of `read`, which is called again after errors that can be temporary.

    Raises:
        Exception: the last error; clients of object stores raise errors of any type.
    """
    for wait in WAITS:
        try:
            return read()
        except Exception as error:
            if isinstance(error, FINAL) or type(error).__name__ in _REFUSED:
                raise
            time.sleep(wait)
    return read()
