"""How a job uses the machine: workers, threads, slots, and the Ray CPUs that each worker reserves.

The rules come from measurements on two cores:

- The actors leave `FOR_TASKS` CPUs of each node to Ray's tasks. With less, the tasks that feed the actors wait for each
  other: with one CPU, a job of one large row group stalled for ten seconds before its first image. One task reserves a
  whole CPU, which must be free on a single node; leaving `FOR_TASKS` on every node makes sure of that wherever Ray
  places the actors.
- More busy threads than cores do not make a job faster.

A decoder on a GPU has the card to itself. If the vision tower runs on a GPU too, one actor runs both; slots take the
memory that is left.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from qvl_batch.bundle.manifest import Manifest
from qvl_batch.config import CaptionConfig, Device
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import ConfigError
from qvl_batch.pipeline.capacity import (
    CACHE_SHARE,
    CUDA_VISION_THREADS,
    Card,
    machine_memory,
    slots_in_memory,
    slots_on_card,
)

#: Most rows of a block. Small, so that several batches are in the engine at once.
ROWS_PER_BLOCK = 8
#: A block has fewer rows if their images have more tokens than this, which is those of 672 x 672 pixels.
USUAL_TOKENS = 576
#: Share of the cores for the decoder; the vision graph does more work per row. Both shares are rounded up: one thread
#: too many costs less than an idle core (5 % on two cores).
DECODER_SHARE = 0.4
#: Images that a vision worker encodes at a time, one thread each: all of a block.
VISION_THREADS = ROWS_PER_BLOCK
#: Ray CPUs that a reading or image-decoding task reserves.
TASK_CPUS = 0.25
#: Batches that a vision worker has at a time. With one, cores are idle between the last image of a batch and the first
#: of the next: 7 % of a job on two cores.
CALLS_PER_VISION_WORKER = 2
#: CPUs left to tasks: one for the task that cuts blocks, `TASK_CPUS` each for reading and for decoding images.
FOR_TASKS = 1 + 2 * TASK_CPUS
#: CPUs per concurrent task of a stage. Each task needs a process, and starting one costs two CPU-seconds; without this
#: limit, six of them took a tenth of a job of one minute.
CPUS_PER_TASK = 4
#: Most slots of a decoder by default. A decode step reads all weights once for any number of rows; beyond this number,
#: reading the rows' KV caches takes longer than that.
DEFAULT_SLOTS = 32
#: The same on a GPU, where a step of this many rows takes little more time than reading the weights.
DEFAULT_CUDA_SLOTS = 128


@dataclass(frozen=True, slots=True)
class Plan:
    """Workers of each kind, their threads and Ray CPUs, and the slots of each decoder.

    Args:
        vision_workers: actors of the vision stage.
        vision_threads: images that each encodes at a time, one thread each.
        vision_cpus: Ray CPUs that each reserves; 0 if the decoder's actors run the vision tower too.
        decoder_workers: actors of the decoder stage.
        decoder_threads: threads of each.
        decoder_cpus: Ray CPUs that each reserves.
        slots: rows that each answers at a time.
        slot_bytes: KV cache of one slot.
        slots_in_memory: slots that would fit into memory.
        block_bytes: most bytes of a block, pixels and features; a single row can have more.
        calls_per_decoder: blocks that a decoder has at a time: enough to fill its slots, and half as many rows waiting,
            even if all images are as large as they can be.
        tasks_at_once: concurrent tasks of the reading and of the image-decoding stage.
        card: the GPU with the least free memory of those that decoders run on, None on the CPU.
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
    block_bytes: int
    calls_per_decoder: int
    tasks_at_once: int
    card: Card | None = None

    def bytes_in_flight(self) -> float:
        """Object-store budget for back-pressure: twice the blocks that workers have at a time.

        Without a limit, images are decoded ahead of the vision workers until half of Ray's object store is full.
        """
        calls = 0 if self.is_joined else self.vision_workers * (CALLS_PER_VISION_WORKER + 1)
        return 2.0 * (calls + self.decoder_workers * self.calls_per_decoder) * self.block_bytes

    @property
    def is_joined(self) -> bool:
        """Whether the decoder's actors run the vision tower too."""
        return not self.vision_cpus

    @property
    def threads(self) -> dict[str, int]:
        """Threads of each stage, over all its tasks or workers."""
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
            f"a GPU ({self.card}) and {slots} (beside weights and activations, {self.slots_in_memory:,} fit; "
            f"by default at most {DEFAULT_CUDA_SLOTS})"
        )


def make_plan(
    config: CaptionConfig,
    manifest: Manifest,
    nodes: Sequence[int],
    cards: Sequence[Card] = (),
    vision_device: Device = "cpu",
) -> Plan:
    """Plan a job.

    Args:
        config: workers and slots that it names are taken as they are.
        manifest: of the bundle.
        nodes: CPUs of each node, at least 2 of one.
        cards: GPUs, one for each decoder; none if decoders run on the CPU.
        vision_device: where the vision tower runs; on `cuda`, it shares the GPU of a decoder.

    Raises:
        ConfigError: more decoders or slots are asked for than the GPUs hold, or more workers than the CPUs.
        DeviceError: the model does not fit on the smallest GPU.
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
    block_bytes, rows_per_block = _blocks(manifest)
    slots, in_memory = _slots(config, manifest, decoders, len(nodes), card, vision_too=joined)
    # All actors together reserve what is left of the CPUs, in proportion to their threads.
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
        slots=slots,
        slot_bytes=slot_bytes(manifest),
        slots_in_memory=in_memory,
        block_bytes=block_bytes,
        calls_per_decoder=math.ceil(1.5 * slots / rows_per_block) + 1,
        tasks_at_once=math.ceil(cpus / CPUS_PER_TASK),
        card=card,
    )


def _blocks(manifest: Manifest) -> tuple[int, int]:
    """Most bytes of a block, and how many rows it has if images are as large as they can be."""
    resolution = manifest.layout.resolution
    token = 3 * resolution.unit**2 + 4 * manifest.decoder.hidden_size
    # Sizes, keys, prompts and kept columns come on top.
    block = math.ceil(1.25 * ROWS_PER_BLOCK * USUAL_TOKENS * token)
    return block, min(ROWS_PER_BLOCK, max(1, block // (resolution.max_tokens * token)))


def _slots(
    config: CaptionConfig, manifest: Manifest, decoders: int, nodes: int, card: Card | None, *, vision_too: bool
) -> tuple[int, int]:
    """Slots of a decoder, and how many fit into its memory.

    Raises:
        ConfigError: more are asked for than fit.
        DeviceError: the model does not fit on the card.
    """
    if card is not None:
        held = slots_on_card(card, manifest, vision_too=vision_too, guided=config.is_guided)
        if config.slots and config.slots > held:
            raise ConfigError(f"--slots {config.slots}: beside weights and activations, {held} fit on the GPU ({card})")
        return config.slots or min(DEFAULT_CUDA_SLOTS, held), held
    held = slots_in_memory(manifest, decoders)
    default = max(1, min(DEFAULT_SLOTS, held))
    size, memory = decoders * (config.slots or 0) * slot_bytes(manifest), machine_memory()
    if nodes == 1 and size > memory:  # the memory of other nodes is not known here
        raise ConfigError(
            f"--slots {config.slots}: their KV caches take {size / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB; by default there would be {default}"
        )
    return config.slots or default, held


def _floor(cpus: float) -> float:
    """Rounded down to Ray's unit of 1/10,000 CPU, so that the sum stays within what there is."""
    return math.floor(cpus * 10_000) / 10_000


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
