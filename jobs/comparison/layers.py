"""Layer by layer: reads hidden states from a bundle's graphs, and replaces them.

The residual stream passes through `SkipSimplifiedLayerNormalization` nodes. Both graphs have two of
them in every layer; a vision graph that processes the image in parts has two for each part. In a copy
of a graph in memory (its weights stay on disk) each state between two layers becomes an output, and
gets an input that can replace it:

    part p of state k ──┬───────────────► output
                        └─ Where(use_given, given.k.p, part p of state k) ─► layer k + 1

So one run gives the states with accumulated errors; another, with the reference's states given to
every layer, gives each layer's own error.

What enters: pixels and tokens of rows. What leaves: `States`, and drift at each depth.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from comparison.traces import Array, States
from export.half import emulated_graph, stream_unit
from qvl_batch.bundle.layout import Pixels
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, VISION, Dtype, part_names
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.decoder.prompts import TokenRow
from qvl_batch.errors import BundleError
from qvl_batch.runtime.session import Session

NORM = "SkipSimplifiedLayerNormalization"
USE_GIVEN = "use_given"
#: Outputs of a norm node: the normed sum, and the sum itself.
NORMED, TOTAL = 0, 3


@dataclass(frozen=True, slots=True)
class Drift:
    """Error at each depth of both towers, from the input of the first layer to the last tower's output.

    Args:
        total: accumulated error, that of all depths before it included.
        own: error of the step to this depth alone, from the reference's state before it.
    """

    total: list[float]
    own: list[float]


class LayerProbe:
    """Reads and replaces hidden states in the graphs of a bundle.

    Args:
        bundle: whose graphs.
        decoder: of the same bundle; lays out a row as the worker does.
        threads: threads that one operator may use.
    """

    def __init__(self, bundle: Bundle, decoder: Decoder, threads: int) -> None:
        self._decoder = decoder
        inputs = bundle.manifest.graphs[DECODER].inputs
        self._past: dict[str, Array] = {}
        for name, spec in inputs.items():
            if name.startswith("past_"):
                kind = np.bool_ if spec.dtype == "bool" else np.float32
                self._past[name] = np.zeros((1, *map(int, spec.shape[1:])), kind)
        self._vision = _Tower(bundle.file(VISION), threads, bundle.manifest.vision_dtype)
        # The mean of pixels is repeated for each colour of each pixel of a patch.
        graph = onnx.load(bundle.file(VISION), load_external_data=False).graph
        (rows,) = (weights.dims[0] for weights in graph.initializer if weights.name == "vision.mean")
        self._patches_per_token = 3 * bundle.manifest.layout.resolution.unit**2 // rows
        self._language = _Tower(bundle.file(DECODER), threads, bundle.manifest.dtype)

    def states(self, images: Sequence[Pixels], tokens: TokenRow) -> States:
        """Hidden states of one row.

        Args:
            images: of the row, in the order of its tokens.
            tokens: of the row.
        """
        *vision, features = _joined([self._encode(image) for image in images])
        *decoder, logits = self._language.run(self._row(tokens, features), "logits")
        return States(vision, features, decoder, logits)

    def drift(self, images: Sequence[Pixels], tokens: TokenRow, reference: States) -> Drift:
        """Drift of one row from the reference's states; the other arguments are those of `states`."""
        encoded: list[list[Array]] = []
        own_errors: list[list[Array]] = []
        for image, given in zip(images, _by_image(reference.vision, tokens), strict=True):
            encoded.append(self._encode(image))
            own_errors.append(self._encode(image, given))
        *states, features = _joined(encoded)
        *decoder, logits = self._language.run(self._row(tokens, features), "logits")
        found, vision = States(states, features, decoder, logits), _joined(own_errors)
        # The decoder's own error is measured with the reference's features.
        row = self._row(tokens, reference.features)
        decoder = self._language.run(row, "logits", reference.decoder)
        expected = [*reference.vision, reference.features, *reference.decoder, reference.logits]
        accumulated = [*found.vision, found.features, *found.decoder, found.logits]
        own = [*vision, *decoder]
        return Drift(
            total=[state_error(a, b) for a, b in zip(accumulated, expected, strict=True)],
            own=[state_error(a, b) for a, b in zip(own, expected, strict=True)],
        )

    def _encode(self, image: Pixels, given: list[Array] | None = None) -> list[Array]:
        """States and features of an image, as `_Tower.run`, without patches that the graph adds to fill its parts."""
        *states, features = self._vision.run({"pixels": image[None]}, "image_features", given)
        return [*(state[: len(features) * self._patches_per_token] for state in states), features]

    def _row(self, tokens: TokenRow, features: Array) -> dict[str, Array]:
        parts = np.split(features, _ends(tokens))
        prefill = self._decoder.prefill_inputs([PrefillRow(tokens.input_ids, tokens.images, parts)])
        return {name: buffer.values for name, buffer in prefill.items()} | self._past


class _Tower:
    """One instrumented graph, on the CPU."""

    def __init__(self, path: Path, threads: int, dtype: Dtype) -> None:
        if dtype in HALVES:
            model = onnx.load_from_string(emulated_graph(path))
        else:
            model = onnx.load(path, load_external_data=False)
        self._unit = stream_unit(dtype)
        self._states = instrument(model, path)
        self._session = Session(path, threads, model.SerializeToString())
        #: Lengths of the parts that the last run had each state in.
        self._lengths: list[list[int]] = []

    def run(self, inputs: dict[str, Array], output: str, given: list[Array] | None = None) -> list[Array]:
        """States of the single row in `inputs`, then `output`; states that are `given` replace them in the graph, after
        a run of the same row without them.
        """
        feeds: dict[str, Any] = {USE_GIVEN: np.array(given is not None)}
        for depth, names in enumerate(self._states):
            unused = [np.zeros((1,), np.float32)] * len(names)
            parts = unused
            if given is not None:
                lengths = self._lengths[depth]
                missing = [(0, sum(lengths) - len(given[depth])), (0, 0)]
                parts = np.split(np.pad(given[depth] / self._unit, missing), np.cumsum(lengths)[:-1])
            feeds |= {f"given.{depth}.{part}": state[None] for part, state in enumerate(parts)}
        *found, result = self._session.run([*chain(*self._states), output], inputs | feeds)
        each = iter(found)
        parts_of = [[next(each)[0] for _ in names] for names in self._states]
        self._lengths = [[len(part) for part in parts] for parts in parts_of]
        return [*(self._unit * np.concatenate(parts) for parts in parts_of), result[0]]


def _ends(tokens: TokenRow) -> Array:
    """Where the features of each image but the last end."""
    return np.cumsum([image.tokens for image in tokens.images], dtype=np.int64)[:-1]


def _by_image(states: list[Array], tokens: TokenRow) -> list[list[Array]]:
    """States (N, D) of all images, by image."""
    patches = len(states[0]) // sum(image.tokens for image in tokens.images)
    return [list(parts) for parts in zip(*(np.split(state, patches * _ends(tokens)) for state in states), strict=True)]


def _joined(runs: list[list[Array]]) -> list[Array]:
    """The inverse of `_by_image`."""
    return [np.concatenate(parts) for parts in zip(*runs, strict=True)]


def depth_names(depths: int, decoder: int) -> list[str]:
    """Names of the depths of a `Drift`, of which there are `depths`, for a decoder with `decoder` layers."""
    # Both towers have a depth before their first layer and one after their last.
    return part_names(depths - decoder - 4, decoder)


def state_error(found: Array, expected: Array) -> float:
    """Mean over tokens of |found - expected| / |expected|, Euclidean norms.

    Per token, since a few tokens of a language model are orders of magnitude longer than the
    others and would hide them (Sun et al. 2024, arXiv 2402.17762).
    """
    if found.shape != expected.shape:
        return float("inf")
    lengths = np.linalg.norm(expected, axis=-1)
    return float(np.mean(np.linalg.norm(found - expected, axis=-1) / np.maximum(lengths, np.finfo(np.float32).tiny)))


def instrument(model: onnx.ModelProto, path: Path) -> list[list[str]]:
    """Add the outputs and inputs for hidden states to a graph; returns the outputs' names, by depth and part.

    Raises:
        BundleError: the graph does not have the norm nodes that this relies on.
    """
    graph = model.graph
    norms = [node for node in graph.node if node.op_type == NORM]
    parts = _parts(graph, norms)
    if not norms or len(norms) % (2 * parts):
        raise BundleError(
            f"{path}: --layers needs two {NORM} nodes in every layer, and this graph has {len(norms)}: "
            "export the checkpoint again, or leave out --layers"
        )
    graph.input.append(onnx.helper.make_tensor_value_info(USE_GIVEN, onnx.TensorProto.BOOL, []))
    names = [[norm.input[1] for norm in norms[: 2 * parts : 2]]]
    for part, first in enumerate(names[0]):
        _divert(model, f"0.{part}", first, after=_producer(graph, first), normed=None)
    for place, norm in enumerate(norms[1::2]):
        depth, part = place // parts + 1, place % parts
        norm.output.extend([""] * (TOTAL + 1 - len(norm.output)))
        norm.output[TOTAL] = norm.output[TOTAL] or f"total.{depth}.{part}"
        _divert(model, f"{depth}.{part}", norm.output[TOTAL], after=norm, normed=norm)
        names += [[]] if part == 0 else []
        names[depth].append(norm.output[TOTAL])
    known = {value.name: value for value in graph.value_info}
    unknown = onnx.helper.make_tensor_value_info
    graph.output.extend(known.get(name, unknown(name, onnx.TensorProto.FLOAT, None)) for name in chain(*names))
    return names


def _parts(graph: onnx.GraphProto, norms: list[onnx.NodeProto]) -> int:
    """Number of parts: how many first norms of layers precede one whose input is the output of another layer."""
    ends = {norm.output[TOTAL] for norm in norms[1::2] if len(norm.output) > TOTAL}
    for place, norm in enumerate(norms[::2]):
        state = norm.input[1]
        # A decoder's last layer selects tokens of the state before it.
        if not ends.isdisjoint([state, *_producer(graph, state).input]):
            return max(place, 1)
    return 1


def _divert(
    model: onnx.ModelProto, place: str, state: str, after: onnx.NodeProto, normed: onnx.NodeProto | None
) -> None:
    """Let a given state replace `state` for all its consumers, and in the norm node `normed` that computed it."""
    graph, given, chosen = model.graph, f"given.{place}", f"chosen.{place}"
    _redirect(graph, state, chosen)
    graph.input.append(onnx.helper.make_tensor_value_info(given, onnx.TensorProto.FLOAT, None))
    added = [onnx.helper.make_node("Where", [USE_GIVEN, given, state], [chosen])]
    if normed is not None:
        _redirect(graph, normed.output[NORMED], f"normed.{place}")
        zero = f"zero.{place}"
        added.append(onnx.helper.make_node("Sub", [chosen, chosen], [zero]))
        again = onnx.helper.make_node(NORM, [zero, chosen, normed.input[2]], [f"normed.{place}"], domain=normed.domain)
        again.attribute.extend(normed.attribute)
        added.append(again)
    position = list(graph.node).index(after) + 1
    for offset, node in enumerate(added):
        graph.node.insert(position + offset, node)


def _redirect(graph: onnx.GraphProto, name: str, to: str) -> None:
    for node in graph.node:
        for index, value in enumerate(node.input):
            if value == name:
                node.input[index] = to


def _producer(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    return next(node for node in graph.node if name in node.output)
