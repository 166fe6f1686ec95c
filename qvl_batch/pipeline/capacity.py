"""Memory: how many slots of the KV cache fit on a GPU beside the model, or into a machine or container.

What enters: a bundle's manifest, and the GPU or the nodes. What leaves: numbers of slots, or a `DeviceError` where not
one fits. Nothing is loaded or allocated for it.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pynvml

from qvl_batch.bundle.manifest import DECODER, HALVES, INTEGERS, VISION, Manifest, dtypes_of
from qvl_batch.decoder.decoder import PREFILL_ROWS, PREFIX_ENTRIES, prefill_tokens
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import DeviceError

#: Largest share of the machine's memory for the KV cache of all decoders.
CACHE_SHARE = 0.25
#: Share of a GPU's memory that is kept free, and bytes that CUDA, its libraries and captured steps take.
CARD_RESERVE, CUDA_BYTES = 0.05, 1_500_000_000
#: Memory limit of a container, in versions 2 and 1 of control groups.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
#: Arrays (N, V) in fp32 of a guided decoder: looked-up masks, logits, scores, and scores at the row's temperature.
GUIDED_ARRAYS = 4
#: Images that a decoder's actor encodes at a time on its GPU: one runs while the next one's pixels are copied.
CUDA_VISION_THREADS = 2


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: its name, and its memory in bytes, free and total."""

    name: str
    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster, or the only one.

    Args:
        name: as messages name it.
        cpus: that Ray may use.
        memory: bytes, or the limit of the container that Ray runs in.
    """

    name: str
    cpus: int
    memory: int


def card_of_this_process() -> Card:
    """The GPU that Ray assigned to this process, by NVML: a CUDA context would take some of its memory.

    Raises:
        DeviceError: there is no driver, or no such GPU.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # an index, or the UUID of a card or MIG slice
    try:
        pynvml.nvmlInit()
        try:
            by_index, by_uuid = pynvml.nvmlDeviceGetHandleByIndex, pynvml.nvmlDeviceGetHandleByUUID
            handle = by_index(int(visible)) if visible.isdigit() else by_uuid(visible)
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            return Card(pynvml.nvmlDeviceGetName(handle), int(memory.free), int(memory.total))
        finally:
            pynvml.nvmlShutdown()
    except pynvml.NVMLError as error:
        is_missing = error.value == pynvml.NVML_ERROR_LIBRARY_NOT_FOUND
        advice = "install the NVIDIA driver" if is_missing else "see CUDA_VISIBLE_DEVICES, and `nvidia-smi -L`"
        raise DeviceError(f"NVML does not say how much memory GPU {visible!r} has ({error}): {advice}") from error


def slots_on_card(card: Card, manifest: Manifest, *, vision_too: bool, guided: bool = False) -> int:
    """Slots that fit on a GPU beside weights, activations of a prefill, prefix-cache entries and CUDA itself.

    Args:
        card: the GPU.
        manifest: of the bundle.
        vision_too: the vision tower runs on the same GPU.
        guided: the decoder runs the graph for guided answers.

    Raises:
        DeviceError: not one slot fits.
    """
    taken = bytes_beside_slots(manifest, vision_too=vision_too)
    left = card.free - CARD_RESERVE * card.total - taken
    entry = slot_bytes(manifest)
    slot = entry + guided * GUIDED_ARRAYS * 4 * manifest.decoder.vocab_size
    slots = int((left - PREFIX_ENTRIES * entry) / slot)
    if slots < 1:
        advice = "run the vision tower on the CPU (--vision-device cpu), or " if vision_too else ""
        raise DeviceError(
            f"the GPU ({card}) is too small: weights and activations take {taken / 1e9:.1f} GB and a row's KV cache "
            f"{slot_bytes(manifest) / 1e6:.0f} MB; {advice}export in half precision, with a smaller --max-seq-len, "
            "or take a larger card"
        )
    return slots


def bytes_beside_slots(manifest: Manifest, *, vision_too: bool) -> int:
    """Bytes on a GPU besides the slots: weights, activations of the largest prefill and of images, and CUDA itself.

    ONNX Runtime's arena has a chunk for each activation that is alive at the same time as others of its size, and does
    not reuse it for another size. Per token: the embedding, the residual stream, its norm and its update (five in fp32
    and two in the graph's type); queries, keys and values with and without biases; queries and keys before and after
    rotation, in both types; gate, up and their product. The sum is 8 to 15 % above what a prefill of real shapes takes.
    """
    shape, layout = manifest.decoder, manifest.layout
    size = 2 if manifest.dtype in HALVES else 4
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    token = (5 * 4 + 2 * size) * shape.hidden_size + 3 * size * shape.intermediate_size
    token += 2 * size * (queries + 2 * keys) + 2 * (size + 4) * (queries + keys)
    image_embeds = 4 * shape.hidden_size
    tokens = prefill_tokens(manifest, "cuda")
    prefill = tokens * (token + image_embeds)
    logits = PREFILL_ROWS * shape.vocab_size * (size + 4)
    if manifest.dtype not in HALVES:  # attention in standard operators materialises all scores
        prefill += 2 * 4 * tokens * shape.heads * layout.max_seq_len
    weights = manifest.bytes_of(DECODER)
    if not dtypes_of("decoder", manifest.dtype, manifest.layers_dtype).isdisjoint(INTEGERS):
        # A product of many tokens first writes its weight in the graph's type; the largest one is an MLP's.
        weights += size * shape.hidden_size * shape.intermediate_size
    vision = 0
    if vision_too:  # activations of an image token's four patches are as wide as those of two tokens, in fp32 of four
        width = 2 if manifest.vision_dtype in HALVES else 4
        vision = manifest.bytes_of(VISION) + CUDA_VISION_THREADS * width * layout.resolution.max_tokens * token
    return weights + prefill + logits + vision + CUDA_BYTES


def slots_in_memory(manifest: Manifest, decoders: int, memory: int) -> int:
    """Slots of each of so many decoders that fit into a node's memory of so many bytes."""
    return int(CACHE_SHARE * memory / decoders / slot_bytes(manifest))


def machine_memory() -> int:
    """Memory of this machine in bytes, or the limit of the container that this process runs in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            memory = min(memory, int(limit.read_text()))
    return memory
