"""Layer by layer: reads hidden states from a bundle's graphs, and replaces them.

The residual stream passes through `SkipSimplifiedLayerNormalization` nodes. Both graphs have two of
them in every layer; a vision graph that processes the image in parts has two for each part. In a copy
of a graph in memory (its weights stay on disk) each state between two layers becomes an output, and
gets an input that can replace it:

    part p of state k ──┬───────────────► output
                        └─ Where(use_given, given.k.p, part p of state k) ─► layer k + 1

So one run gives the states with accumulated errors; another, with the reference's states given to
every layer, gives each layer's own error.

What enters: rows. What leaves: `States`, and drift at each depth.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from export.calibration import decoder_feeds
from export.comparison.traces import Array, States
from export.half import emulated_graph, stream_unit
from export.names import PLAIN_STATES
from export.names import Tower as TowerName
from export.sample import SampleRow
from qvl_batch.bundle.layout import Pixels, PlacedImage
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, HALVES, VISION, Dtype, part_names
from qvl_batch.decoder.decoder import Decoder, PrefillRow
from qvl_batch.errors import BundleError
from qvl_batch.runtime.session import Session

NORM = "SkipSimplifiedLayerNormalization"
USE_GIVEN = "use_given"
#: Products with integers, in graphs of bundles.
INTEGER_PRODUCTS = ("MatMulNBits", "MatMulIntegerToFloat")
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


#: Inputs of a decoder graph for a row with features (T, D) of all its images.
Feeds = Callable[[SampleRow, Array], dict[str, Array]]


class LayerProbe:
    """Reads and replaces hidden states in graphs.

    Args:
        bundle: whose layout the graphs have.
        vision: the vision graph.
        language: the decoder graph.
        feeds: inputs of the decoder graph.
    """

    def __init__(self, bundle: Bundle, vision: "Tower", language: "Tower", feeds: Feeds) -> None:
        self._vision, self._language, self._feeds = vision, language, feeds
        # The mean of pixels is repeated for each colour of each pixel of a patch.
        graph = onnx.load(bundle.file(VISION), load_external_data=False).graph
        (rows,) = (weights.dims[0] for weights in graph.initializer if weights.name == "vision.mean")
        self._patches_per_token = 3 * bundle.manifest.layout.resolution.unit**2 // rows

    def states(self, row: SampleRow) -> States:
        """Hidden states of one row."""
        *vision, features = _joined([self._encode(image) for image in row.pixels])
        *decoder, logits = self._language.run(self._feeds(row, features))
        return States(vision, features, *_of_last_token(decoder, logits))

    def drift(self, row: SampleRow, reference: States) -> Drift:
        """Drift of one row from the reference's states."""
        encoded: list[list[Array]] = []
        own_errors: list[list[Array]] = []
        for image, given in zip(row.pixels, _by_image(reference.vision, row.images), strict=True):
            encoded.append(self._encode(image))
            own_errors.append(self._encode(image, given))
        *states, features = _joined(encoded)
        *decoder, logits = self._language.run(self._feeds(row, features))
        found, vision = States(states, features, *_of_last_token(decoder, logits)), _joined(own_errors)
        # The decoder's own error is measured with the reference's features.
        *decoder, logits = self._language.run(self._feeds(row, reference.features), reference.decoder)
        expected = [*reference.vision, reference.features, *reference.decoder, reference.logits]
        accumulated = [*found.vision, found.features, *found.decoder, found.logits]
        decoder, logits = _of_last_token(decoder, logits)
        own = [*vision, *decoder, logits]
        return Drift(
            total=[state_error(a, b) for a, b in zip(accumulated, expected, strict=True)],
            own=[state_error(a, b) for a, b in zip(own, expected, strict=True)],
        )

    def _encode(self, image: Pixels, given: list[Array] | None = None) -> list[Array]:
        """States and features of an image, as `_Tower.run`, without patches that the graph adds to fill its parts."""
        *states, features = self._vision.run({"pixels": image[None]}, given)
        return [*(state[: len(features) * self._patches_per_token] for state in states), features]


def worker_feeds(bundle: Bundle, decoder: Decoder) -> Feeds:
    """Inputs of a bundle's `decoder.onnx`, which `decoder` lays out as in a job."""
    past: dict[str, Array] = {}
    for name, spec in bundle.manifest.graphs[DECODER].inputs.items():
        if name.startswith("past_"):
            kind = np.bool_ if spec.dtype == "bool" else np.float32
            past[name] = np.zeros((1, *map(int, spec.shape[1:])), kind)

    def feeds(row: SampleRow, features: Array) -> dict[str, Array]:
        prefill = decoder.prefill_inputs([_with(row, features)])
        return {name: buffer.values for name, buffer in prefill.items()} | past

    return feeds


def plain_feeds(bundle: Bundle) -> Feeds:
    """Inputs of `decoder_full.onnx`, or of what a tool made of it."""
    return lambda row, features: decoder_feeds(_with(row, features), bundle.manifest)


def _with(row: SampleRow, features: Array) -> PrefillRow:
    """A row with features (T, D) of all its images."""
    return PrefillRow(row.input_ids, row.images, np.split(features, _ends(row.images)))


class Tower:
    """One instrumented graph, on the CPU.

    Args:
        path: the graph's file.
        threads: threads that one operator may use.
        model: the instrumented graph.
        states: names of its outputs for hidden states, by depth and part.
        output: name of its result: features, or logits, of which those of the last token are taken.
        unit: divisor of its residual stream.
        prepack: as of `Session`.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        model: onnx.ModelProto,
        states: list[list[str]],
        output: str,
        unit: int = 1,
        *,
        prepack: bool = True,
    ) -> None:
        self._unit, self._states, self._output = unit, states, output
        self._session = Session(path, threads, model.SerializeToString(), prepack=prepack)
        #: Lengths of the parts that the last run had each state in.
        self._lengths: list[list[int]] = []

    @classmethod
    def of_bundle(cls, path: Path, threads: int, tower: TowerName, dtype: Dtype) -> "Tower":
        """A graph of a bundle."""
        output = "image_features" if tower == "vision" else "logits"
        if dtype in HALVES:
            model = onnx.load_from_string(emulated_graph(path))
        else:
            model = onnx.load(path, load_external_data=False)
        states = instrument(model, path)
        # Weights in fp32 take most memory, and they are there for the answers already.
        exact = dtype == "fp32" and not any(node.op_type in INTEGER_PRODUCTS for node in model.graph.node)
        return cls(path, threads, model, states, output, stream_unit(dtype), prepack=not exact)

    @classmethod
    def plain(cls, path: Path, threads: int, tower: TowerName, layers: int) -> "Tower":
        """A plain graph, or what a tool made of it."""
        model = onnx.load(path, load_external_data=False)
        output = model.graph.output[0].name
        return cls(path, threads, model, instrument_plain(model, path, tower, layers), output)

    def run(self, inputs: dict[str, Array], given: list[Array] | None = None) -> list[Array]:
        """States of the single row in `inputs`, then the result; states that are `given` replace them in the graph,
        after a run of the same row without them.
        """
        feeds: dict[str, Any] = {USE_GIVEN: np.array(given is not None)}
        for depth, names in enumerate(self._states):
            unused = [np.zeros((1,), np.float32)] * len(names)
            parts = unused
            if given is not None:
                lengths = self._lengths[depth]
                missing = [(0, sum(lengths) - len(given[depth])), (0, 0)]
                # Patches that a graph adds are dropped; of a decoder's last state, only the last token is used.
                padded = np.pad(given[depth] / self._unit, missing, mode="edge")
                parts = np.split(padded, np.cumsum(lengths)[:-1])
            feeds |= {f"given.{depth}.{part}": state[None] for part, state in enumerate(parts)}
        *found, result = self._session.run([*chain(*self._states), self._output], inputs | feeds)
        each = iter(found)
        parts_of = [[next(each)[0] for _ in names] for names in self._states]
        self._lengths = [[len(part) for part in parts] for parts in parts_of]
        return [*(self._unit * np.concatenate(parts) for parts in parts_of), result[0]]


def _ends(images: Sequence[PlacedImage]) -> Array:
    """Where the features of each image but the last end."""
    return np.cumsum([image.tokens for image in images], dtype=np.int64)[:-1]


def _by_image(states: list[Array], images: Sequence[PlacedImage]) -> list[list[Array]]:
    """States (N, D) of all images, by image."""
    patches = len(states[0]) // sum(image.tokens for image in images)
    ends = patches * _ends(images)
    return [list(parts) for parts in zip(*(np.split(state, ends) for state in states), strict=True)]


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
    names = [[_state_before(graph, norm) for norm in norms[: 2 * parts : 2]]]
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


def instrument_plain(model: onnx.ModelProto, path: Path, tower: TowerName, layers: int) -> list[list[str]]:
    """As `instrument`, for a plain graph with so many layers, or for what a tool made of it.

    Raises:
        BundleError: the graph lacks values of the plain graph's names.
    """
    first, after = PLAIN_STATES[tower]
    names = [first, *(after.format(layer) for layer in range(layers))]
    producers = {name: node for node in model.graph.node for name in node.output}
    missing = next((name for name in names if name not in producers), None)
    if missing is not None:
        raise BundleError(
            f"{path}: --layers needs the values of a plain graph by their names, and {missing!r} is not there: "
            "quantize the bundle's own plain graph without fusing nodes, or leave out --layers"
        )
    model.graph.input.append(onnx.helper.make_tensor_value_info(USE_GIVEN, onnx.TensorProto.BOOL, []))
    for depth, name in enumerate(names):
        _divert(model, f"{depth}.0", name, after=producers[name], normed=None)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    return [[name] for name in names]


def _of_last_token(states: list[Array], logits: Array) -> tuple[list[Array], Array]:
    """States of a decoder, and logits, with the last state and the logits of the last token alone.

    A plain graph computes them for all tokens.
    """
    return [*states[:-1], states[-1][-1:]], logits if logits.ndim == 1 else logits[-1]


def _state_before(graph: onnx.GraphProto, norm: onnx.NodeProto) -> str:
    """The state before the first layer, of whose first norm `norm` is; a decoder's only layer selects tokens of it."""
    state = str(norm.input[1])
    producer = _producer(graph, state)
    return str(producer.input[0]) if producer.op_type == "GatherElements" else state


def _parts(graph: onnx.GraphProto, norms: list[onnx.NodeProto]) -> int:
    """Number of parts: how many first norms of layers precede one whose input is the output of another layer."""
    ends = {norm.output[TOTAL] for norm in norms[1::2] if len(norm.output) > TOTAL}
    for place, norm in enumerate(norms[::2]):
        state = norm.input[1]
        # A decoder's last layer selects tokens of the state before it.
        if not ends.isdisjoint([state, *_producer(graph, state).input]):
            return max(place, 1)
    return max(len(norms) // 2, 1)  # all are of the only layer


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
