"""What each matrix product of a model is given when it sees a user's rows.

What enters: a checkpoint's weights, and rows with their pixels. What leaves, for one module after the other: the module
with its weights, and the `Inputs` of each of its products. The vision tower is in memory as a whole. All rows go
through one layer of the decoder before the next is read, so that a decoder of any size takes the memory of its largest
layer and of the rows' hidden states.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Self

import torch
from torch import Tensor, nn

from export.decoder import Embedding, FullDecoder, Layer
from export.layers import Linear
from export.names import HEAD
from export.operators import rms_norm
from export.sample import SampleRow
from export.vision import VisionTower
from export.weights import Weights
from qvl_batch.bundle.layout import Pixels, mrope_positions
from qvl_batch.bundle.manifest import is_in

#: Tokens whose inputs are kept for each product, to measure what a change of the product does.
KEPT_TOKENS = 512
_TEXT = "model.language_model"


class Inputs:
    """Statistics of the vectors that products are given.

    Args:
        size: length of a vector.
        tokens: number of vectors to expect.
    """

    def __init__(self, size: int, tokens: int) -> None:
        #: Weighted mean over tokens of x xᵀ, (in, in): half the Hessian of an output's squared error in its weights.
        self.second_moment = torch.zeros((size, size))
        #: Largest magnitude of each input, (in,).
        self.largest = torch.zeros(size)
        self._seen, self._expected = 0, tokens
        self._kept: list[Tensor] = []
        self._last: Tensor | None = None

    def add(self, x: Tensor, weights: Tensor) -> None:
        """Count vectors (..., in), with weights (tokens,) or (1,), once if a tensor is given to several products."""
        if self.is_last(x):
            return
        self._last = x
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        self.second_moment.addmm_((weights[:, None] * rows).T, rows, alpha=1 / self._expected)
        self.largest = torch.maximum(self.largest, rows.abs().amax(0))
        step = max(1, self._expected // KEPT_TOKENS)
        self._kept.append(rows[-self._seen % step :: step].clone())
        self._seen += len(rows)

    def divide(self, scale: Tensor) -> None:
        """Make these the statistics of the same vectors, divided by scales (in,)."""
        self.second_moment = self.second_moment / (scale * scale[:, None])
        self.largest = self.largest / scale
        self._kept = [kept / scale for kept in self._kept]

    def is_last(self, x: Tensor) -> bool:
        """Whether a tensor is the last one that was counted."""
        return x is self._last

    @property
    def kept(self) -> Tensor:
        """Some of the vectors, evenly spread, (n, in)."""
        return torch.cat(self._kept)


#: Inputs of products, by the names of the products' modules.
InputsOf = dict[str, Inputs]
#: Called with a module's name, the module, and the inputs of its products.
Visit = Callable[[str, Any, InputsOf], None]


def visit_vision(tower: VisionTower, images: Sequence[Pixels], visit: Visit) -> list[Tensor]:
    """Show images to a vision tower, and visit its parts.

    Args:
        tower: in standard operators, with its weights.
        images: uint8 (H, W, 3) each.
        visit: called for `vision.patch_embed`, each `vision.blocks.K`, and `vision.merger`.

    Returns:
        Features (T_img, D) of each image.
    """
    patches = sum(image.shape[0] * image.shape[1] for image in images) // tower.patch**2
    with torch.inference_mode(), _Listener({"vision": tower}, patches) as listener:
        features = [tower(torch.tensor(image)[None])[0] for image in images]
    parts: dict[str, nn.Module] = {"patch_embed": tower.patch_embed}
    parts |= {f"blocks.{k}": block for k, block in enumerate(tower.blocks)} | {"merger": tower.merger}
    for name, part in parts.items():
        prefix = f"vision.{name}"
        visit(prefix, part, {k: v for k, v in listener.inputs.items() if is_in(k, [prefix])})
    return features


def visit_decoder(
    weights: Weights, side: int | None, rows: Sequence[SampleRow], features: Sequence[Tensor], visit: Visit
) -> None:
    """Run rows up to their answers, and visit the decoder's layers.

    Args:
        weights: of the checkpoint.
        side: as of `FullDecoder`.
        rows: the rows.
        features: of their images, one after the other.
        visit: called for each `decoder.layers.K`, and for `decoder.head`.
    """
    decoder, left = FullDecoder(weights.skeleton, side), iter(features)
    tokens = sum(len(row.input_ids) for row in rows)
    with torch.inference_mode():
        table: Any = weights.module(f"{_TEXT}.embed_tokens")
        decoder.embed = Embedding(table.weight)
        del table
        started = [_begin(decoder, row, left) for row in rows]
        hidden, contexts = [state for state, *_ in started], [context for _, *context in started]
        del decoder.embed
        for k in range(len(decoder.layers)):
            name, layer = f"decoder.layers.{k}", Layer(weights.module(f"{_TEXT}.layers.{k}"))
            with _Listener({name: layer}, tokens) as listener:
                for at, (row, context) in enumerate(zip(rows, contexts, strict=True)):
                    listener.weights = _weights(row)
                    hidden[at] = layer(decoder.run_layer, hidden[at], *context)
            visit(name, layer, listener.inputs)
        norm: Any = weights.module(f"{_TEXT}.norm")
        head: Any = weights.module("lm_head")
        inputs = {HEAD: Inputs(len(norm.weight), tokens)}
        for row, state in zip(rows, hidden, strict=True):
            inputs[HEAD].add(rms_norm(state, norm.weight, decoder.eps), (_weights(row) > 1).float())
        visit(HEAD, Linear.of(head), inputs)


def _begin(decoder: FullDecoder, row: SampleRow, features: Iterator[Tensor]) -> tuple[Tensor, Any, Tensor]:
    ids, size = torch.tensor([row.input_ids]), len(row.input_ids)
    embeds = torch.zeros((1, size, decoder.embed.weight.shape[1]))
    for image in row.images:
        embeds[0, image.start : image.stop] = next(features)
    positions = torch.from_numpy(mrope_positions(size, row.images)[:, None])
    return decoder.begin(ids, torch.ones_like(ids), embeds, None if decoder.merged_side else positions)


def _weights(row: SampleRow) -> Tensor:
    """Weights of a row's tokens (S,): those of text together count as much as those of images, of which there are many
    more. An answer is text.
    """
    size = len(row.input_ids)
    is_image = torch.zeros(size, dtype=torch.bool)
    for image in row.images:
        is_image[image.start : image.stop] = True
    images = int(is_image.sum())
    if images == 0:
        return torch.ones(size)
    return torch.where(is_image, size / (2 * images), size / (2 * (size - images)))


class _Listener:
    """Collects the inputs of all products in modules; products of the same inputs share them.

    Args:
        modules: by the prefix of their products' names.
        tokens: as of `Inputs`.
    """

    def __init__(self, modules: dict[str, nn.Module], tokens: int) -> None:
        self._modules, self._tokens = modules, tokens
        self._stack = ExitStack()
        self.inputs: InputsOf = {}
        #: Of the tokens of the row that runs.
        self.weights = torch.ones(1)

    def __enter__(self) -> Self:
        """Begin to listen."""
        for prefix, module in self._modules.items():
            for name, each in module.named_modules():
                if isinstance(each, Linear):
                    full = f"{prefix}.{name}"
                    hook = each.register_forward_pre_hook(lambda _, args, full=full: self._add(full, *args))
                    self._stack.callback(hook.remove)
        return self

    def __exit__(self, *_: object) -> None:
        """Stop listening."""
        self._stack.close()

    def _add(self, name: str, x: Tensor) -> None:
        if name not in self.inputs:
            shared = next((inputs for inputs in self.inputs.values() if inputs.is_last(x)), None)
            self.inputs[name] = shared or Inputs(x.shape[-1], self._tokens)
        self.inputs[name].add(x, self.weights)
