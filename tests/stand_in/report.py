"""What a decoder and a vision tower ask of a GPU, as JSON: run with the stand-ins in LD_LIBRARY_PATH.

python tests/stand_in/report.py BUNDLE
"""

import collections
import contextlib
import ctypes
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort

from qvl_batch.bundle.layout import PlacedImage
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, VISION
from qvl_batch.decoder.decoder import PREFIX_ENTRIES, Decoder, PrefillRow
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import DeviceError
from qvl_batch.pipeline.capacity import CUDA_BYTES, CUDA_VISION_THREADS, bytes_beside_slots
from qvl_batch.runtime.devices import open_cuda
from qvl_batch.runtime.memory import CudaMemory
from qvl_batch.runtime.session import Session

COUNTERS = ("moves", "moved_bytes", "crossings", "crossed_bytes", "captures", "launches", "mallocs", "frees")


def report(bundle: Bundle) -> dict[str, Any]:
    """Nodes by provider; counts of what six steps and a row's move ask for; kernels of each kind of run; shapes of the
    features of an image that is encoded while this thread captures; bytes that a decoder takes and would take by plan;
    the error that is left of asking for too much memory; and how much of a decoder's memory is not freed with it.
    """
    ort.preload_dlls = lambda **_: None  # pip may have installed the real libraries
    memory = CudaMemory(open_cuda("--device cuda"))
    nodes = {name: _nodes(bundle.file(name), memory, captures=name == DECODER) for name in (DECODER, VISION)}
    decoder = Decoder(bundle, 4, 1, memory=memory, prove=False)  # they compute nothing
    rows = [_turn(bundle, n) for n in (2, 3)]
    _kernels()  # of the largest prefill, which the decoder has run
    decoder.prefill(0, rows)
    kernels = {"prefill": _kernels()}
    steps = [_counted(lambda: decoder.step(np.array([5, 6]))) for _ in range(4)]
    moved = _counted(lambda: decoder.copy(1, 0))
    steps += [_counted(lambda: decoder.step(np.array([5]))) for _ in range(2)]
    kernels["step"] = _kernels()
    prefix = rows[1].images[0].stop
    decoder.store_prefix(0, 0, prefix)
    decoder.prefill_part(1, rows[1], prefix, len(rows[1].input_ids), 0)
    kernels["rest"] = _kernels()
    size = bundle.manifest.layout.resolution.image_size
    vision = Session(bundle.file(VISION), 1, memory=memory)
    _runtime().cudaStreamBeginCapture(None, 0)
    with ThreadPoolExecutor(1) as other:
        pixels = {"pixels": np.zeros((1, size, size, 3), np.uint8)}
        encoded = other.submit(vision.run, ["image_features"], pixels).result()
    _runtime().cudaStreamEndCapture(None, ctypes.byref(ctypes.c_void_p()))
    kernels["vision"] = _kernels()
    memory_taken = _memory_taken(bundle)
    full = memory.card.memory()[1] * 2
    with contextlib.suppress(DeviceError):
        memory.card.allocate(full)
    before = _counts()
    _ = Decoder(bundle, 4, 1, memory=CudaMemory(open_cuda("--device cuda")), prove=False).step(np.array([5]))
    after = _counts()
    return {
        "last_error": _runtime().cudaPeekAtLastError(),
        "not_freed": after["mallocs"] - before["mallocs"] - (after["frees"] - before["frees"]),
        "card": memory.card.name,
        "nodes": nodes,
        "steps": steps,
        "kernels": kernels,
        "memory": memory_taken,
        "moved": moved,
        "features": [list(features.shape) for features in encoded],
    }


def _memory_taken(bundle: Bundle) -> dict[str, int]:
    """Bytes of a card that a decoder takes when it starts, and what many rows of many lengths add to them; the same
    of a vision tower with two threads; and both by plan.
    """
    manifest, memory, slots = bundle.manifest, CudaMemory(open_cuda("--device cuda")), 8
    chance = np.random.default_rng(3)

    def taken() -> int:
        free, total = memory.card.memory()
        return total - free

    before = taken()
    decoder = Decoder(bundle, slots, 1, memory=memory, prove=False)
    decoder.figures()
    started = taken()
    for _ in range(40):
        lengths = chance.integers(2, 300, size=chance.integers(1, slots, endpoint=True))
        decoder.prefill(0, [_turn(bundle, n) for n in lengths])
        decoder.step(np.array([5] * len(lengths)))
    answered = taken()
    vision, size = Session(bundle.file(VISION), 1, memory=memory), manifest.layout.resolution.image_size
    pixels = {"pixels": np.zeros((1, size, size, 3), np.uint8)}
    with ThreadPoolExecutor(CUDA_VISION_THREADS) as threads:
        list(threads.map(lambda _: vision.run(["image_features"], pixels), range(16)))
    return {
        "decoder": started - before,
        "added": answered - started,
        "vision": taken() - answered,
        "planned": bytes_beside_slots(manifest, vision_too=True)
        - CUDA_BYTES
        + (slots + PREFIX_ENTRIES) * slot_bytes(manifest),
    }


def _nodes(path: Path, memory: CudaMemory, *, captures: bool) -> dict[str, dict[str, int]]:
    """How many nodes of each type a provider runs, after all of ONNX Runtime's own changes."""
    made: list[ort.InferenceSession] = []

    def observed(model: Path, options: ort.SessionOptions, **others: Any) -> ort.InferenceSession:
        options.optimized_model_filepath = optimized
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
        made.append(session(model, options, **others))
        return made[0]

    session = ort.InferenceSession
    with tempfile.TemporaryDirectory() as folder, mock.patch("onnxruntime.InferenceSession", observed):
        optimized = str(Path(folder) / "optimized.onnx")
        Session(path, 1, memory=memory, captures=captures)
        graph = onnx.load(optimized, load_external_data=False).graph
    found: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for part in made[0].get_provider_graph_assignment_info():
        found[part.ep_name].update(node.op_type for node in part.get_nodes())
    found["copies"] = collections.Counter(node.op_type for node in graph.node if node.op_type.startswith("Memcpy"))
    return {provider: dict(counts) for provider, counts in found.items()}


def _turn(bundle: Bundle, prompt_tokens: int) -> PrefillRow:
    layout = bundle.manifest.layout
    size = layout.resolution.image_size
    assert size is not None
    image = PlacedImage(layout.image_start, *layout.resolution.grid(size, size))
    features = np.zeros((image.tokens, bundle.manifest.decoder.hidden_size), np.float32)
    return PrefillRow(layout.row_ids([5] * prompt_tokens, image.tokens), [image], [features])


def _counted(work: Any) -> dict[str, int]:
    before = _counts()
    work()
    return {name: count - before[name] for name, count in _counts().items()}


def _counts() -> dict[str, int]:
    return {name: ctypes.c_size_t.in_dll(_runtime(), name).value for name in COUNTERS}


def _kernels() -> dict[str, int]:
    """How often each kernel was launched since this was last called, by its mangled name."""
    take = _runtime().take_kernels
    take.restype = ctypes.c_char_p
    return dict(collections.Counter(take().decode().split()))


def _runtime() -> ctypes.CDLL:
    return ctypes.CDLL(f"libcudart.so.{ort.cuda_version.split('.')[0]}")


if __name__ == "__main__":
    print(json.dumps(report(Bundle.load(sys.argv[1]))))
