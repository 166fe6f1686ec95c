"""How a job uses the machine: workers, threads, slots, and what each may claim of Ray's CPUs.

The rules, from measurements on two cores: the actors must leave Ray's tasks `FOR_TASKS` CPUs, or
those that feed them wait for one another (with one CPU for them, a job of one large row group
stood still for ten seconds before its first image); and more processes than cores only share
them out thinner. A task that claims a whole CPU needs it on one node: so many are left for each
node, and then, wherever Ray puts the actors, some node has them.

A decoder on a GPU has the card to itself, but for the vision tower if that is on a GPU too: then
one actor does both, and what it does not hold is cache.
"""

import math
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from qvl_batch.bundle.manifest import DECODER, HALVES, VISION, Manifest
from qvl_batch.config import CaptionConfig
from qvl_batch.decoder.decoder import PREFILL_ROWS, SHELVES
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import ConfigError, DeviceError
from qvl_batch.runtime.memory import RealDevice

#: Rows that travel together. Small, so that several batches are in the engine at once.
ROWS_PER_BLOCK = 8
#: Part of the cores that the decoder gets; the vision graph does more of the work of a row. Both
#: parts are rounded up: one thread too many costs less than a core that waits (5 % on two cores).
DECODER_SHARE = 0.4
#: Images that a vision worker encodes at a time, one thread each: all of a block.
VISION_THREADS = ROWS_PER_BLOCK
#: CPUs that a reading or image-decoding task claims.
TASK_CPUS = 0.25
#: With one, cores wait from a batch's last image to the next one's first: 7 % of a job on two cores.
CALLS_PER_VISION_WORKER = 2
#: One for the task that cuts blocks, which claims a whole CPU, and one each for reading and decoding.
FOR_TASKS = 1 + 2 * TASK_CPUS
#: One task of a kind for so many CPUs. Each needs a process, whose start takes a CPU two seconds from
#: the graphs; without a limit, six of them took a tenth of a job of one minute.
CPUS_PER_TASK = 4
#: A decoder's cache takes at most this part of the machine's memory, and by default this many slots:
#: a step reads all weights for any number of rows, but beyond these the rows' own caches take longer.
CACHE_SHARE, DEFAULT_SLOTS = 0.25, 32
#: On a GPU a step of so many rows still takes little more than its weights' way to the cores.
DEFAULT_CUDA_SLOTS = 128
#: Of a card: the part that is never planned for, and what CUDA, its libraries and captured steps take.
CARD_RESERVE, CUDA_BYTES = 0.05, 1_500_000_000
#: Where a container says how much memory it may take, in versions 2 and 1 of control groups.
CONTAINER_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
#: Images that a decoder's actor encodes at a time on its GPU: one runs while the next one's pixels come.
CUDA_VISION_THREADS = 2


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU: its name, and bytes of its memory, free and in all."""

    name: str
    free: int
    total: int

    def __str__(self) -> str:
        return f"{self.name}, {self.free / 1e9:.1f} of {self.total / 1e9:.1f} GB free"


@dataclass(frozen=True, slots=True)
class Plan:
    """Workers, threads each (of a vision worker: images at a time), Ray CPUs each, and slots of a decoder.

    `card` is the GPU with the least memory of those that decoders run on.
    """

    vision_workers: int
    vision_threads: int
    vision_cpus: float
    decoder_workers: int
    decoder_threads: int
    decoder_cpus: float
    slots: int
    slot_bytes: int
    slots_in_memory: int
    tasks_at_once: int
    card: Card | None = None

    @property
    def calls_per_decoder(self) -> int:
        """Batches that a decoder works on at a time: enough to fill its slots and have some waiting."""
        return math.ceil(1.5 * self.slots / ROWS_PER_BLOCK) + 1

    def bytes_under_way(self, manifest: Manifest) -> float:
        """What may wait between the stages: twice the pixels and features of the rows that workers hold.

        Without a limit, images are decoded ahead of the vision workers until half of Ray's store is full of them.
        """
        row = 3 * manifest.layout.image_size**2 + 4 * math.prod(manifest.feature_shape)
        calls = 0 if self.is_joined else self.vision_workers * (CALLS_PER_VISION_WORKER + 1)
        blocks = calls + self.decoder_workers * self.calls_per_decoder
        return 2.0 * blocks * ROWS_PER_BLOCK * row

    @property
    def is_joined(self) -> bool:
        """The decoder's actors run the vision tower too."""
        return not self.vision_cpus

    @property
    def at_once(self) -> dict[str, int]:
        """Pieces of work of each stage that can go on at a time, each by one thread of its own."""
        return {
            "read": self.tasks_at_once,
            "image": self.tasks_at_once,
            "vision": self.vision_workers * self.vision_threads,
            "decoder": self.decoder_workers,
        }

    def __str__(self) -> str:
        vision = f"{_count(self.vision_workers, 'vision worker')} of {_count(self.vision_threads, 'thread')}"
        slots = f"{_count(self.slots, 'slot')} of {self.slot_bytes / 1e6:.1f} MB"
        if self.card is None:
            return (
                f"{vision}, {_count(self.decoder_workers, 'decoder')} of {_count(self.decoder_threads, 'thread')} and "
                f"{slots} ({CACHE_SHARE:.0%} of memory holds {self.slots_in_memory:,}; "
                f"by default at most {DEFAULT_SLOTS})"
            )
        return (
            f"{'vision on the same GPU' if self.is_joined else vision}, {_count(self.decoder_workers, 'decoder')} of "
            f"a GPU ({self.card}) and {slots} (beside weights and work, it holds {self.slots_in_memory:,}; "
            f"by default at most {DEFAULT_CUDA_SLOTS})"
        )


def make_plan(
    config: CaptionConfig,
    manifest: Manifest,
    nodes: Sequence[int],
    cards: Sequence[Card] = (),
    vision_device: RealDevice = "cpu",
) -> Plan:
    """Plan a job.

    Args:
        config: where it names workers or slots, they stand.
        manifest: of the bundle.
        nodes: CPUs of each node, at least 2 of one.
        cards: GPUs, of which a decoder takes one each; none if it runs on the CPU.
        vision_device: where the vision tower runs. On a GPU, that of a decoder.

    Raises:
        ConfigError: more decoders or slots are asked for than the GPUs hold, or more workers than the CPUs.
        DeviceError: the smallest GPU does not hold the model.
    """
    cpus, node_cpus = sum(nodes), max(nodes)
    joined = vision_device == "cuda"
    decoders = config.decoder_workers or max(1, len(cards))
    if cards and decoders > len(cards):
        raise ConfigError(f"--decoder-workers {decoders}: a decoder takes a GPU, and there are {len(cards)}")
    card = min(cards, key=lambda each: each.free) if cards else None
    decoder_threads = 1 if card else max(1, min(round(DECODER_SHARE * cpus / decoders), node_cpus))
    for_vision = max(1, cpus - decoders) if card else math.ceil((1 - DECODER_SHARE) * cpus)
    vision = decoders if joined else config.vision_workers or math.ceil(for_vision / VISION_THREADS)
    vision_threads = CUDA_VISION_THREADS if joined else max(1, min(for_vision // vision, node_cpus))
    if card is None:
        in_memory, most = _slots_in_memory(manifest, decoders), DEFAULT_SLOTS
        size, memory = decoders * (config.slots or 0) * slot_bytes(manifest), machine_memory()
        if len(nodes) == 1 and size > memory:  # of other machines nothing is known
            raise ConfigError(
                f"--slots {config.slots}: their caches take {size / 1e9:,.1f} GB, and this machine has "
                f"{memory / 1e9:,.1f} GB; by default there would be {max(1, min(most, in_memory))}"
            )
    else:
        in_memory, most = slots_on_card(card, manifest, vision_too=joined), DEFAULT_CUDA_SLOTS
        if config.slots and config.slots > in_memory:
            raise ConfigError(f"--slots {config.slots}: the GPU ({card}) holds {in_memory} beside weights and work")
    # All actors together claim what is left of the CPUs, in proportion to their threads.
    left = sum(max(each - FOR_TASKS, 0) for each in nodes)
    per_thread = left / (decoders * decoder_threads + (0 if joined else vision * vision_threads))
    if not _floor(per_thread):
        raise ConfigError(f"{cpus} CPUs are too few for {vision} --vision-workers and {decoders} --decoder-workers")
    return Plan(
        vision_workers=vision,
        vision_threads=vision_threads,
        vision_cpus=0.0 if joined else _floor(vision_threads * per_thread),
        decoder_workers=decoders,
        decoder_threads=decoder_threads,
        decoder_cpus=min(1.0, _floor(decoder_threads * per_thread)) if card else _floor(decoder_threads * per_thread),
        slots=config.slots or max(1, min(most, in_memory)),
        slot_bytes=slot_bytes(manifest),
        slots_in_memory=in_memory,
        tasks_at_once=math.ceil(cpus / CPUS_PER_TASK),
        card=card,
    )


def card_of_this_process() -> Card:
    """The GPU that Ray gave this process, as the driver's own tool sees it: to ask CUDA would take memory of it.

    Raises:
        DeviceError: the tool is missing or fails.
    """
    wanted = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    query = [
        "nvidia-smi",
        f"--id={wanted}",
        "--query-gpu=name,memory.free,memory.total",
        "--format=csv,noheader,nounits",
    ]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout  # noqa: S603
        name, free, total = found.strip().split("\n")[0].rsplit(", ", 2)
        return Card(name, int(free) << 20, int(total) << 20)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise DeviceError(
            f"nvidia-smi does not say how much memory the GPU has ({error}): install it with the driver"
        ) from error


def slots_on_card(card: Card, manifest: Manifest, *, vision_too: bool) -> int:
    """Slots that a GPU holds beside the weights, a prefill's states, and what CUDA takes for itself.

    Raises:
        DeviceError: not one.
    """
    taken = bytes_beside_slots(manifest, vision_too=vision_too)
    left = card.free - CARD_RESERVE * card.total - taken
    slots = int(left / slot_bytes(manifest)) - SHELVES
    if slots < 1:
        advice = "run the vision tower on the CPU (--vision-device cpu), or " if vision_too else ""
        raise DeviceError(
            f"the GPU ({card}) is too small: weights and work take {taken / 1e9:.1f} GB and each row's cache "
            f"{slot_bytes(manifest) / 1e6:.0f} MB; {advice}export in half precision, with a smaller --max-seq-len, "
            "or take a larger card"
        )
    return slots


def bytes_beside_slots(manifest: Manifest, *, vision_too: bool) -> int:
    """Bytes on a GPU but for the slots: weights, states of the largest prefill and of an image, and CUDA's own.

    ONNX Runtime keeps a piece of memory for each state of a token that is alive beside others of its size, and lends
    it to no other size: the embedding, residual stream, its norm and an update of it (five in fp32 and two in the
    graph's type); queries, keys and values with and without biases; queries and keys before and after rotation, in
    both types; and gate, up and their product. This is 8 to 15 % more than a prefill of real shapes takes.
    """
    shape, layout = manifest.decoder, manifest.layout
    size = 2 if manifest.dtype in HALVES else 4
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    token = (5 * 4 + 2 * size) * shape.hidden_size + 3 * size * shape.intermediate_size
    token += 2 * size * (queries + 2 * keys) + 2 * (size + 4) * (queries + keys)
    image_embeds = 4 * shape.hidden_size
    prefill = PREFILL_ROWS["cuda"] * layout.max_seq_len * (token + image_embeds)
    logits = PREFILL_ROWS["cuda"] * shape.vocab_size * (size + 4)
    if manifest.dtype not in HALVES:  # attention in standard operators has all its scores in memory
        prefill += 2 * 4 * PREFILL_ROWS["cuda"] * shape.heads * layout.max_seq_len**2
    weights = manifest.bytes_of(DECODER)
    vision = 0
    if vision_too:  # the states of an image token's four patches are as wide as those of two tokens, in fp32 of four
        width = 2 if manifest.vision_dtype in HALVES else 4
        vision = manifest.bytes_of(VISION) + CUDA_VISION_THREADS * width * layout.image_tokens * token
    return weights + prefill + logits + vision + CUDA_BYTES


def _slots_in_memory(manifest: Manifest, decoders: int) -> int:
    """Slots of a decoder that its part of this machine's memory holds."""
    return int(CACHE_SHARE * machine_memory() / decoders / slot_bytes(manifest))


def machine_memory() -> int:
    """Bytes of memory of this machine, or of the container that this process is in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in CONTAINER_LIMITS:
        with suppress(OSError, ValueError):  # no such file, or "max"
            memory = min(memory, int(limit.read_text()))
    return memory


def _floor(cpus: float) -> float:
    """As Ray counts, in 1/10,000, downwards, so that the sum stays within what there is."""
    return math.floor(cpus * 10_000) / 10_000


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
