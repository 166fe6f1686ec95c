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
#: By default a decoder has at most so many slots: a step reads all weights for any number of rows, but beyond these
#: the rows' own caches take longer.
DEFAULT_SLOTS = 32
#: On a GPU a step of so many rows still takes little more than its weights' way to the cores.
DEFAULT_CUDA_SLOTS = 128


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

    def bytes_in_flight(self, manifest: Manifest) -> float:
        """Object-store budget for back-pressure: twice the pixels and features of the rows in flight.

        Without a limit, images are decoded ahead of the vision workers until half of Ray's object store is full.
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
            f"a GPU ({self.card}) and {slots} (beside weights and work, it holds {self.slots_in_memory:,}; "
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
    slots, in_memory = _slots(config, manifest, decoders, len(nodes), card, vision_too=joined)
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
        slots=slots,
        slot_bytes=slot_bytes(manifest),
        slots_in_memory=in_memory,
        tasks_at_once=math.ceil(cpus / CPUS_PER_TASK),
        card=card,
    )


def _slots(
    config: CaptionConfig, manifest: Manifest, decoders: int, nodes: int, card: Card | None, *, vision_too: bool
) -> tuple[int, int]:
    """Slots of a decoder, and how many its memory holds.

    Raises:
        ConfigError: more are asked for than the memory holds.
        DeviceError: the card does not hold the model.
    """
    if card is not None:
        held = slots_on_card(card, manifest, vision_too=vision_too)
        if config.slots and config.slots > held:
            raise ConfigError(f"--slots {config.slots}: the GPU ({card}) holds {held} beside weights and work")
        return config.slots or min(DEFAULT_CUDA_SLOTS, held), held
    held = slots_in_memory(manifest, decoders)
    default = max(1, min(DEFAULT_SLOTS, held))
    size, memory = decoders * (config.slots or 0) * slot_bytes(manifest), machine_memory()
    if nodes == 1 and size > memory:  # of other machines nothing is known
        raise ConfigError(
            f"--slots {config.slots}: their caches take {size / 1e9:,.1f} GB, and this machine has "
            f"{memory / 1e9:,.1f} GB; by default there would be {default}"
        )
    return config.slots or default, held


def _floor(cpus: float) -> float:
    """As Ray counts, in 1/10,000, downwards, so that the sum stays within what there is."""
    return math.floor(cpus * 10_000) / 10_000


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
