"""A store of S3 that runs here, and folders of this machine that are copied there as they change."""

import logging
import os
import uuid
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import fsspec
import requests
from moto.server import ThreadedMotoServer

#: Credentials that any such store takes.
KEYS = {"AWS_ACCESS_KEY_ID": "access", "AWS_SECRET_ACCESS_KEY": "hidden-word", "AWS_DEFAULT_REGION": "us-east-1"}


def variables():
    """What of this process's environment says where the store is."""
    return {name: value for name, value in os.environ.items() if name.startswith("AWS_")}


@contextmanager
def environment(endpoint):
    """Where clients find the store, in this process and in those that it starts."""
    before = dict(os.environ)
    os.environ.update(KEYS, AWS_ENDPOINT_URL=endpoint, AWS_EC2_METADATA_DISABLED="true", AWS_MAX_ATTEMPTS="1")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    yield
    os.environ.clear()
    os.environ.update(before)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@contextmanager
def serving():
    """The store, with a bucket `data`: its client."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    with environment(endpoint):
        files = fsspec.filesystem("s3", use_listings_cache=False)
        files.mkdir("data")
        yield files
    # All of its servers in a process have the same buckets.
    requests.post(f"{endpoint}/moto-api/reset", timeout=10)
    server.stop()


class Mirror:
    """A folder whose files are in the store too.

    Args:
        files: client of the store.
        folder: of this machine.
    """

    def __init__(self, files, folder):
        self._files, self.folder = files, folder
        self._path = f"data/{uuid.uuid4().hex}"
        self._there = {}

    @property
    def address(self):
        return f"s3://{self._path}"

    def sync(self):
        """Copy what changed."""
        found = {path.relative_to(self.folder): path for path in self.folder.rglob("*") if path.is_file()}
        data = {str(name): path.read_bytes() for name, path in found.items()}
        for name in self._there.keys() - data.keys():
            self._files.rm_file(f"{self._path}/{name}")
        for name, content in data.items():
            if self._there.get(name) != content:
                self._files.pipe_file(f"{self._path}/{name}", content)
        self._there = data

    def at(self, place):
        """The address of a path of the folder."""
        return str(place).replace(str(self.folder), self.address, 1)

    def config(self, config):
        """Settings with inputs there, as they are now."""
        self.sync()
        given = tuple(map(self.at, config.input))
        output = self.at(config.output) if Path(config.output).is_relative_to(self.folder) else config.output
        return replace(
            config, input=given, output=output, allow_images_from=tuple(map(self.at, config.allow_images_from))
        )
