"""How a job uses the machine: workers, threads, slots, and the Ray CPUs that each worker reserves.

The rules come from measurements on two cores:

- The actors leave `FOR_TASKS` CPUs of each node to Ray's tasks. With less, the tasks that feed the actors wait for each
  other: with one CPU, a job of one large row group stalled for ten seconds before its first image. One task reserves a
  whole CPU, which must be free on a single node; leaving `FOR_TASKS` on every node makes sure of that wherever Ray
  places the actors.
- More busy threads than cores do not make a job faster.

A decoder on a GPU has the card to itself. If the vision tower runs on a GPU too, one actor runs both; slots take the
memory that is left.

On a cluster, nodes come and go, so that shares of the sum of all CPUs would fit no node: a worker of two of three nodes
of 8 CPUs could be larger than what is left on any. There, the nodes are divided into equal places, each for a vision
worker or a decoder. They are as large as the commonest node needs them; a larger node has more of them, a smaller one
fewer or none. The vision workers are as many as there are places that no decoder needs, whatever nodes there are.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qvl_batch.bundle.manifest import Manifest
from qvl_batch.config import CaptionConfig, Device
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.errors import ConfigError
from qvl_batch.pipeline.capacity import (
    CACHE_SHARE,
    CUDA_VISION_THREADS,
    Card,
    Node,
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
#: CPUs of a node that takes part, at least; with fewer, actors would leave none to the tasks that feed them.
LEAST_CPUS = 2
#: Places of a node of a cluster at least, so that a decoder does not take all of one.
LEAST_PLACES = 2
#: Most slots of a decoder by default. A decode step reads all weights once for any number of rows; beyond this number,
#: reading the rows' KV caches takes longer than that.
DEFAULT_SLOTS = 32
#: The same on a GPU, where a step of this many rows takes little more time than reading the weights.
DEFAULT_CUDA_SLOTS = 128


@dataclass(frozen=True, slots=True)
class Places:
    """What the nodes of a cluster are divided into, for a vision worker or a decoder each.

    Args:
        place_cpus: Ray CPUs of a place.
        taken: places that vision workers leave to decoders.
        least: workers at least, even if they must wait for nodes.
        most: workers at most; None for as many as there are places.
    """

    place_cpus: float
    taken: int
    least: int
    most: int | None

    def number_on(self, cpus: Sequence[int]) -> int:
        """Places of nodes that have so many CPUs."""
        # Ray counts in 1/10,000 CPU.
        return sum(math.floor((each - FOR_TASKS) / self.place_cpus + 1e-9) for each in cpus if each > FOR_TASKS)

    def workers_on(self, cpus: Sequence[int]) -> int:
        """Vision workers on nodes that have so many CPUs."""
        size = max(self.least, self.number_on(cpus) - self.taken)
        return size if self.most is None else min(size, self.most)


@dataclass(frozen=True, slots=True)
class Plan:
    """Workers of each kind, their threads and Ray CPUs, and the slots of each decoder.

    Args:
        vision_workers: actors of the vision stage, on the nodes that there are at the start.
        vision_threads: images that each encodes at a time, one thread each.
        vision_cpus: Ray CPUs that each reserves; 0 if the decoder's actors run the vision tower too.
        decoder_workers: actors of the decoder stage.
        decoder_threads: threads of each.
        decoder_cpus: Ray CPUs that each reserves; 0 on a GPU of a cluster.
        slots: rows that each answers at a time.
        slot_bytes: KV cache of one slot.
        slots_in_memory: slots that would fit into memory.
        block_bytes: most bytes of a block, pixels and features; a single row can have more.
        calls_per_decoder: blocks that a decoder has at a time: enough to fill its slots, and half as many rows waiting,
            even if all images are as large as they can be.
        tasks_at_once: concurrent tasks of the reading and of the image-decoding stage, at the start.
        places: of a cluster, which say how many vision workers there are on other nodes; None on one machine.
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
    places: Places | None = None
    card: Card | None = None

    def on(self, cpus: Sequence[int]) -> "Plan":
        """This plan on other nodes: the same workers and tasks, but as many as these nodes are enough for.

        Args:
            cpus: of each node.
        """
        if self.places is None:
            return self
        return replace(self, vision_workers=self.places.workers_on(cpus), tasks_at_once=_tasks_at_once(cpus))

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
        vision = f"{counted(self.vision_workers, 'vision worker')} of {counted(self.vision_threads, 'thread')}"
        if self.places is not None and self.places.least != self.places.most:
            at_most = "" if self.places.most is None else f", at most {self.places.most}"
            vision += f" (with the nodes, more or fewer{at_most})"
        slots = f"{counted(self.slots, 'slot')} of {self.slot_bytes / 1e6:.1f} MB"
        decoders = counted(self.decoder_workers, "decoder")
        if self.card is None:
            return (
                f"{vision}, {decoders} of {counted(self.decoder_threads, 'thread')} and {slots} "
                f"({CACHE_SHARE:.0%} of memory holds {self.slots_in_memory:,}; "
                f"by default at most {DEFAULT_SLOTS})"
            )
        return (
            f"{'vision on the same GPU' if self.is_joined else vision}, {decoders} of "
            f"a GPU ({self.card}) and {slots} (beside weights and activations, {self.slots_in_memory:,} fit; "
            f"by default at most {DEFAULT_CUDA_SLOTS})"
        )


def make_plan(
    config: CaptionConfig,
    manifest: Manifest,
    nodes: Sequence[Node],
    cards: Sequence[Card] = (),
    vision_device: Device = "cpu",
    *,
    is_cluster: bool = False,
) -> Plan:
    """Plan a job.

    Args:
        config: workers and slots that it names are taken as they are.
        manifest: of the bundle.
        nodes: of which one has at least `LEAST_CPUS`.
        cards: GPUs, one for each decoder; none if decoders run on the CPU.
        vision_device: where the vision tower runs; on `cuda`, it shares the GPU of a decoder.
        is_cluster: whether nodes may come and go.

    Raises:
        ConfigError: more decoders or slots are asked for than the GPUs or nodes hold, or more workers than the CPUs.
        DeviceError: the model does not fit on the smallest GPU.
    """
    each_cpus = [node.cpus for node in nodes]
    decoders = config.decoder_workers or max(1, len(cards))
    if cards and decoders > len(cards):
        raise ConfigError(f"--decoder-workers {decoders}: a decoder takes a GPU, and there are {len(cards)}")
    card = min(cards, key=lambda each: each.free) if cards else None
    joined = vision_device == "cuda"
    wanted = _Wanted(
        decoders,
        1 if card else max(1, min(round(DECODER_SHARE * sum(each_cpus) / decoders), max(each_cpus))),
        max(1, sum(each_cpus) - decoders) if card else math.ceil((1 - DECODER_SHARE) * sum(each_cpus)),
        config.vision_workers or 1,
        config.max_vision_workers or config.vision_workers,
        on_cards=card is not None,
    )
    if joined:
        shares = _Shares(decoders, CUDA_VISION_THREADS, 0.0, wanted.decoder_cpus(_left(each_cpus) / decoders))
    else:
        shares = _places(wanted, each_cpus) if is_cluster or len(nodes) > 1 else _parts(wanted, each_cpus[0])
    if not (shares.decoder_cpus if joined else shares.vision_cpus):
        raise ConfigError(
            f"{sum(each_cpus)} CPUs are too few for {shares.vision} --vision-workers and {decoders} --decoder-workers"
        )
    block_bytes, rows_per_block = _blocks(manifest)
    able = [node for node in nodes if node.cpus - FOR_TASKS >= shares.decoder_cpus]
    slots, in_memory = _slots(config, manifest, decoders, able, card, vision_too=joined)
    return Plan(
        vision_workers=shares.vision,
        vision_threads=shares.vision_threads,
        vision_cpus=shares.vision_cpus,
        decoder_workers=decoders,
        decoder_threads=wanted.decoder_threads,
        decoder_cpus=shares.decoder_cpus,
        slots=slots,
        slot_bytes=slot_bytes(manifest),
        slots_in_memory=in_memory,
        block_bytes=block_bytes,
        calls_per_decoder=math.ceil(1.5 * slots / rows_per_block) + 1,
        tasks_at_once=_tasks_at_once(each_cpus),
        places=shares.places,
        card=card,
    )


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What a plan divides CPUs among: decoders, their threads, threads for vision, vision workers at least and at most
    (None for as many as the CPUs are enough for), and whether decoders are on GPUs.
    """

    decoders: int
    decoder_threads: int
    for_vision: int
    least: int
    most: int | None
    on_cards: bool

    def decoder_cpus(self, cpus: float) -> float:
        """Ray CPUs of a decoder, of which one on a GPU needs no more than one."""
        return _floor(min(1.0, cpus) if self.on_cards else cpus)


@dataclass(frozen=True, slots=True)
class _Shares:
    """Vision workers, threads of each, and Ray CPUs of each and of a decoder."""

    vision: int
    vision_threads: int
    vision_cpus: float
    decoder_cpus: float
    places: Places | None = None


def _parts(wanted: _Wanted, cpus: int) -> _Shares:
    """Shares of one machine: what is left of its CPUs, in proportion to threads."""
    vision = max(wanted.least, math.ceil(wanted.for_vision / VISION_THREADS))
    vision = vision if wanted.most is None else min(vision, wanted.most)
    threads = max(1, min(wanted.for_vision // vision, cpus))
    per_thread = _left([cpus]) / (wanted.decoders * wanted.decoder_threads + vision * threads)
    decoder_cpus = wanted.decoder_cpus(wanted.decoder_threads * per_thread)
    return _Shares(vision, threads, _floor(threads * per_thread), decoder_cpus)


def _places(wanted: _Wanted, cpus: Sequence[int]) -> _Shares:
    """Shares of a cluster: places on each node, for a vision worker or a decoder each.

    Decoders leave vision workers as many places fewer as their threads would fill, but each reserves one at most:
    wherever its node goes, there is then a place for it. One on a GPU reserves none, so that it is never kept from its
    GPU.
    """
    sizes = Counter(each for each in cpus if each >= LEAST_CPUS)
    common, nodes = max(sizes.items(), key=lambda size: (size[1], size[0]))
    usual = max(LEAST_PLACES, math.ceil(common / VISION_THREADS))
    reserved = 0 if wanted.on_cards else wanted.decoders
    number = max(usual, math.ceil((wanted.least + reserved) / nodes))
    place = _floor((common - FOR_TASKS) / number)
    if place == TASK_CPUS:  # Ray Data would run the tasks before a stage in its actors, were they to reserve the same
        place -= 0.0001
    if place <= 0:
        return _Shares(wanted.least, 1, 0.0, 0.0)
    taken = max(reserved, round(wanted.decoders * wanted.decoder_threads * usual / common))
    places = Places(place, taken, wanted.least, wanted.most)
    threads = min(wanted.for_vision // wanted.least, common) if wanted.least == wanted.most else round(common / number)
    return _Shares(places.workers_on(cpus), max(1, threads), place, 0.0 if wanted.on_cards else place, places)


def _left(cpus: Sequence[int]) -> float:
    """CPUs of nodes that actors may reserve."""
    return sum(max(each - FOR_TASKS, 0) for each in cpus)


def _tasks_at_once(cpus: Sequence[int]) -> int:
    return max(1, math.ceil(sum(cpus) / CPUS_PER_TASK))


def _blocks(manifest: Manifest) -> tuple[int, int]:
    """Most bytes of a block, and how many rows it has if images are as large as they can be."""
    resolution = manifest.layout.resolution
    token = 3 * resolution.unit**2 + 4 * manifest.decoder.hidden_size
    # Sizes, keys, prompts and kept columns come on top.
    block = math.ceil(1.25 * ROWS_PER_BLOCK * USUAL_TOKENS * token)
    return block, min(ROWS_PER_BLOCK, max(1, block // (resolution.max_tokens * token)))


def _slots(
    config: CaptionConfig,
    manifest: Manifest,
    decoders: int,
    nodes: Sequence[Node],
    card: Card | None,
    *,
    vision_too: bool,
) -> tuple[int, int]:
    """Slots of a decoder, and how many fit into its memory, on the smallest of the nodes that have CPUs for it.

    Raises:
        ConfigError: more are asked for than fit.
        DeviceError: the model does not fit on the card.
    """
    if card is not None:
        held = slots_on_card(card, manifest, vision_too=vision_too, guided=config.is_guided)
        if config.slots and config.slots > held:
            raise ConfigError(f"--slots {config.slots}: beside weights and activations, {held} fit on the GPU ({card})")
        return config.slots or min(DEFAULT_CUDA_SLOTS, held), held
    node, together = min(nodes, key=lambda each: each.memory), math.ceil(decoders / len(nodes))
    held = slots_in_memory(manifest, together, node.memory)
    default = max(1, min(DEFAULT_SLOTS, held))
    size = together * (config.slots or 0) * slot_bytes(manifest)
    if size > node.memory:
        raise ConfigError(
            f"--slots {config.slots}: their KV caches take {size / 1e9:,.1f} GB, and {node.name} has "
            f"{node.memory / 1e9:,.1f} GB; by default there would be {default}"
        )
    return config.slots or default, held


def _floor(cpus: float) -> float:
    """Rounded down to Ray's unit of 1/10,000 CPU, so that the sum stays within what there is."""
    return math.floor(cpus * 10_000) / 10_000


def counted(number: int, noun: str) -> str:
    """So many of something, in words."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
