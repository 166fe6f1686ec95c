"""Bytes and seconds of each part of a bundle's graphs, on this machine.

What enters: a bundle, and the sizes of a user's rows. What leaves: bytes as they are in the graphs' files, and seconds
as ONNX Runtime's profiler measures them, for one row: its images, its prefill, and its share of the decode steps.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import onnx

from export.sample import SampleRow
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, VISION, is_in
from qvl_batch.decoder.kv_cache import KvCache
from qvl_batch.pipeline.plan import DEFAULT_SLOTS
from qvl_batch.runtime.devices import usable_cpus
from qvl_batch.runtime.memory import Buffer, HostMemory
from qvl_batch.runtime.session import Session

#: Runs of which the fastest counts, after one that warms up.
RUNS = 5
#: Name of what is in no part with products: the table of tokens, norms between towers, the choice of the token.
REST = "rest"


@dataclass(frozen=True, slots=True)
class Workload:
    """What one row takes, on average.

    Args:
        image: (H, W) of an image of the usual size.
        images: number of images.
        row_tokens: tokens up to the answer.
        answer_tokens: tokens of the answer.
    """

    image: tuple[int, int]
    images: float
    row_tokens: int
    answer_tokens: float

    @classmethod
    def of(cls, rows: Sequence[SampleRow], answers: Iterable[Sequence[int]]) -> "Workload":
        """The workload of rows with these answers."""
        sizes = sorted((each.shape[:2] for row in rows for each in row.pixels), key=lambda size: size[0] * size[1])
        height, width = sizes[len(sizes) // 2] if sizes else (0, 0)
        return cls(
            image=(int(height), int(width)),
            images=fmean(len(row.pixels) for row in rows),
            row_tokens=round(fmean(len(row.input_ids) for row in rows)),
            answer_tokens=fmean(map(len, answers)),
        )


def bytes_by_part(bundle: Bundle, parts: Sequence[str]) -> dict[str, float]:
    """Bytes of the weights of each part, and of the rest."""
    found = dict.fromkeys([*parts, REST], 0.0)
    for name in (VISION, DECODER):
        for tensor in onnx.load(bundle.file(name), load_external_data=False).graph.initializer:
            length = next((int(entry.value) for entry in tensor.external_data if entry.key == "length"), None)
            found[_part_of(tensor.name, parts)] += tensor.ByteSize() if length is None else length
    return found


def seconds_by_part(
    bundle: Bundle, parts: Sequence[str], products: Sequence[str], workload: Workload, folder: Path
) -> dict[str, float]:
    """Seconds of the products of each part for one row, and of all other operators.

    Args:
        bundle: whose graphs run.
        parts: names of the parts.
        products: names of the modules with a product.
        workload: of a row.
        folder: where the profiler may write.
    """
    found = dict.fromkeys([*parts, REST], 0.0)
    for share, nodes in _profiled(bundle, workload, folder):
        for node, seconds in nodes.items():
            is_product = is_in(node.split("/")[0], products)
            found[_part_of(node, parts) if is_product else REST] += share * seconds
    return found


def _part_of(name: str, parts: Sequence[str]) -> str:
    """The part that a node or weight is in."""
    return next((part for part in parts if is_in(name.split("/", maxsplit=1)[0], [part])), REST)


def _profiled(bundle: Bundle, workload: Workload, folder: Path) -> Iterable[tuple[float, dict[str, float]]]:
    """How often a row has each kind of run, and the seconds of that run's nodes."""
    threads = usable_cpus()
    if workload.images:
        session = Session(bundle.file(VISION), threads, profile=folder)
        for _ in range(RUNS + 1):
            session.run(["image_features"], {"pixels": np.zeros((1, *workload.image, 3), np.uint8)})
        yield workload.images, _fastest(session, 1)[0]
    session = Session(bundle.file(DECODER), threads, profile=folder)
    memory = HostMemory()
    cache = KvCache(bundle.manifest, DEFAULT_SLOTS, memory=memory)
    for rows, tokens in ((1, workload.row_tokens), (DEFAULT_SLOTS, 1)):
        inputs = {name: memory.zeros(shape, kind) for name, kind, shape in _inputs(bundle, rows, tokens)}
        past = 0 if tokens > 1 else workload.row_tokens
        inputs["cache_position"].values[...] = past + np.arange(tokens)
        inputs["seqlens_k"].values[...] = past + tokens - 1
        inputs["total_sequence_length"].values[...] = past + tokens
        outputs: dict[str, Buffer] = {"next_token": memory.zeros((rows,), "int64")} | cache.present(0, rows)
        if "past_seen" in inputs:
            outputs["present_seen"] = inputs["past_seen"]
        binding = session.bind(inputs | cache.past(0, rows), outputs)
        for _ in range(RUNS + 1):
            binding.run()
    prefill, step = _fastest(session, 2)
    yield 1, prefill
    yield workload.answer_tokens / DEFAULT_SLOTS, step


def _inputs(bundle: Bundle, rows: int, tokens: int) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Names, element types and shapes of the decoder's inputs, without the KV cache."""
    for name, spec in bundle.manifest.graphs[DECODER].inputs.items():
        if not name.startswith(("past_key.", "past_value.")):
            dynamic = iter((rows, tokens))
            yield name, spec.dtype, tuple(each if isinstance(each, int) else next(dynamic) for each in spec.shape)


def _fastest(session: Session, kinds: int) -> list[dict[str, float]]:
    """Seconds of each node in the fastest of its runs, for each of so many kinds of run, one kind after the other."""
    durations: Mapping[str, list[float]] = defaultdict(list)
    for event in session.end_profile():
        if event["cat"] == "Node" and event["name"].endswith("_kernel_time"):
            durations[event["name"].removesuffix("_kernel_time")].append(event["dur"] / 1e6)
    found: list[dict[str, Any]] = []
    for kind in range(kinds):
        first = kind * (RUNS + 1) + 1
        found.append({node: min(each[first : first + RUNS]) for node, each in durations.items()})
    return found
