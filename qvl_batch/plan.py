"""How a job uses the machine: workers, threads, slots, and what each may claim of Ray's CPUs.

The rules, from measurements on two cores: the actors must leave Ray's tasks `FOR_TASKS` CPUs, or
those that feed them wait for one another (with one CPU for them, a job of one large row group
stood still for ten seconds before its first image); and more processes than cores only share
them out thinner. A task that claims a whole CPU needs it on one node: so many are left for each
node, and then, wherever Ray puts the actors, some node has them.
"""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

from qvl_batch.bundle import Manifest
from qvl_batch.config import CaptionConfig
from qvl_batch.kv_cache import slot_bytes

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


@dataclass(frozen=True, slots=True)
class Plan:
    """Workers, threads each (of a vision worker: images at a time), Ray CPUs each, and slots of a decoder."""

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

    @property
    def calls_per_decoder(self) -> int:
        """Batches that a decoder works on at a time: enough to fill its slots and have some waiting."""
        return math.ceil(1.5 * self.slots / ROWS_PER_BLOCK) + 1

    def bytes_under_way(self, manifest: Manifest) -> float:
        """What may wait between the stages: twice the pixels and features of the rows that workers hold.

        Without a limit, images are decoded ahead of the vision workers until half of Ray's store is full of them.
        """
        row = 3 * manifest.layout.image_size**2 + 4 * math.prod(manifest.feature_shape)
        blocks = self.vision_workers * (CALLS_PER_VISION_WORKER + 1) + self.decoder_workers * self.calls_per_decoder
        return 2.0 * blocks * ROWS_PER_BLOCK * row

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
        return (
            f"{_count(self.vision_workers, 'vision worker')} of {_count(self.vision_threads, 'thread')}, "
            f"{_count(self.decoder_workers, 'decoder')} of {_count(self.decoder_threads, 'thread')} and "
            f"{_count(self.slots, 'slot')} of {self.slot_bytes / 1e6:.1f} MB "
            f"({CACHE_SHARE:.0%} of memory holds {self.slots_in_memory:,}; by default at most {DEFAULT_SLOTS})"
        )


def make_plan(config: CaptionConfig, manifest: Manifest, nodes: Sequence[int]) -> Plan:
    """Plan a job.

    Args:
        config: where it names workers or slots, they stand.
        manifest: of the bundle.
        nodes: CPUs of each node, at least 2 of one.
    """
    cpus, node_cpus = sum(nodes), max(nodes)
    decoders = config.decoder_workers or 1
    decoder_threads = max(1, min(round(DECODER_SHARE * cpus / decoders), node_cpus))
    for_vision = math.ceil((1 - DECODER_SHARE) * cpus)
    vision = config.vision_workers or math.ceil(for_vision / VISION_THREADS)
    vision_threads = max(1, min(for_vision // vision, node_cpus))
    in_memory = _slots_in_memory(manifest, decoders)
    # All actors together claim what is left of the CPUs, in proportion to their threads.
    left = sum(max(each - FOR_TASKS, 0) for each in nodes)
    per_thread = left / (decoders * decoder_threads + vision * vision_threads)
    return Plan(
        vision_workers=vision,
        vision_threads=vision_threads,
        vision_cpus=_floor(vision_threads * per_thread),
        decoder_workers=decoders,
        decoder_threads=decoder_threads,
        decoder_cpus=_floor(decoder_threads * per_thread),
        slots=config.slots or max(1, min(DEFAULT_SLOTS, in_memory)),
        slot_bytes=slot_bytes(manifest),
        slots_in_memory=in_memory,
        tasks_at_once=math.ceil(cpus / CPUS_PER_TASK),
    )


def _slots_in_memory(manifest: Manifest, decoders: int) -> int:
    """Slots of a decoder that its part of this machine's memory holds."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return int(CACHE_SHARE * memory / decoders / slot_bytes(manifest))


def _floor(cpus: float) -> float:
    """To hundredths, downwards, so that the sum stays within what there is; Ray counts in 1/10,000."""
    return max(0.01, math.floor(cpus * 100) / 100)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
