"""A checkpoint can be an id of the Hugging Face hub: downloaded once, and only what an export reads."""

import hashlib
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from conftest import TINY
from huggingface_hub import constants
from safetensors.torch import load_file

from export.checkpoint import checkpoint_source, load_checkpoint
from export.config import ExportConfig
from export.package import export_bundle
from qvl_batch.errors import ExportError

ID, COMMIT = "someone/Tiny-VL.1", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def _put(cache, checkpoint=TINY):
    """A checkpoint in the cache, as the hub's library leaves it."""
    folder = cache / f"models--{ID.replace('/', '--')}"
    shutil.copytree(checkpoint, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    (folder / "refs" / "v1").write_text(COMMIT)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("revision", [None, "v1", COMMIT])
def test_what_is_in_the_cache_needs_no_network(revision, cache):
    _put(cache)
    checkpoint = load_checkpoint(Path(ID), revision)
    assert checkpoint.source.name == ID
    assert checkpoint.source == checkpoint_source(Path(ID), revision)
    assert checkpoint.source.sha256 == checkpoint_source(TINY).sha256


@pytest.mark.usefixtures("offline", "cache")
def test_an_id_that_cannot_be_had_is_one_line(tmp_path):
    with pytest.raises(
        ExportError, match=f"^{ID} is no folder here, and cannot be had from the Hugging Face hub: "
    ) as no:
        export_bundle(ExportConfig(checkpoint=Path(ID), output=tmp_path / "out"))
    assert "\n" not in str(no.value)


def test_a_folder_has_no_revision():
    with pytest.raises(ExportError, match=r"--revision is for an id of the Hugging Face hub, and .* is a folder"):
        load_checkpoint(TINY, "main")


class _Hub(BaseHTTPRequestHandler):
    """The part of the hub that a download asks, for one checkpoint."""

    folder: Path
    asked: list[str]

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{ID}"):
            names = sorted(file.name for file in self.folder.iterdir())
            files = [
                {"type": "file", "path": name, "size": (self.folder / name).stat().st_size, "oid": "0"}
                for name in names
            ]
            siblings = [{"rfilename": name} for name in names]
            whole = {"id": ID, "modelId": ID, "sha": COMMIT, "siblings": siblings}
            self._send(json.dumps(files if "/tree/" in path else whole).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/{ID}/resolve/"):
            name = path.rpartition("/")[2]
            self.asked.append(name)
            body = (self.folder / name).read_bytes()
            self._send(body, {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT})  # noqa: S324
        else:
            self.send_error(404)

    def _send(self, body, headers):
        self.send_response(200)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with a checkpoint and files beside it, and what was downloaded of it."""
    folder = Path(shutil.copytree(TINY, tmp_path / "hub"))
    (folder / "training_args.bin").write_bytes(b"x")
    (folder / "consolidated.safetensors").write_bytes(b"x")
    (folder / "README.md").write_text("x")
    handler = type("Handler", (_Hub,), {"folder": folder, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", constants.ENDPOINT + "/{repo_id}/resolve/{revision}/{filename}"
    )
    yield handler
    server.shutdown()


@pytest.mark.usefixtures("cache")
def test_only_what_an_export_reads_is_downloaded_and_only_once(hub):
    source = load_checkpoint(Path(ID)).source
    assert source.sha256 == checkpoint_source(TINY).sha256
    assert {*hub.asked} == {file.name for file in TINY.iterdir()}
    hub.asked.clear()
    assert load_checkpoint(Path(ID)).source == source
    assert hub.asked == []


@pytest.mark.usefixtures("cache")
def test_without_safetensors_the_files_of_torch_are_downloaded(hub):
    tensors = load_file(hub.folder / "model.safetensors")
    (hub.folder / "model.safetensors").unlink()
    torch.save(tensors, hub.folder / "pytorch_model.bin")
    weights = load_checkpoint(Path(ID)).weights.module("lm_head").weight
    assert torch.equal(weights, load_checkpoint(TINY).weights.module("lm_head").weight)
    assert "pytorch_model.bin" in hub.asked
    assert "training_args.bin" not in hub.asked
