"""The integers that a checkpoint of AWQ or GPTQ has of the decoder, taken over as those of a tool.

What enters: the weights. What leaves: for each product its dtype and its integers; products that the checkpoint has in
floats, such as the head, are in fp32, or for a GPU in half precision.

There, queries, keys and values are one product (see `export.layers`), whose outputs are those of the three. Scales have
the type of the activations, so they must be exact in it.
"""

from collections.abc import Sequence

import numpy as np

from export.half import HALF, TYPES
from export.names import HEAD as HEAD_PRODUCT
from export.rounding import Array
from export.tool_graphs import ToolGraph, most_common
from export.weights import HEAD, Weights
from qvl_batch.bundle.manifest import HALVES, Dtype
from qvl_batch.errors import ExportError

#: A layer's products, and where the model has their weights.
PRODUCTS = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
#: Dtype and integers of a product, None if the checkpoint has it in floats.
Stored = tuple[Dtype, dict[str, Array]] | None


def stored_integers(weights: Weights, floats: Dtype) -> ToolGraph:
    """The decoder of a quantized checkpoint.

    Args:
        weights: of the checkpoint.
        floats: dtype of what it has in floats; in half precision, the decoder is for a GPU.

    Raises:
        ExportError: it has no integers, or some that a bundle cannot have.
    """
    layers = range(len(weights.skeleton.model.language_model.layers))
    parameters = {
        f"decoder.layers.{k}.{product}": f"model.language_model.layers.{k}.{module}.weight"
        for k in layers
        for product, module in PRODUCTS.items()
    }
    found: dict[str, Stored] = {
        product: weights.integers(name) for product, name in {**parameters, HEAD_PRODUCT: HEAD}.items()
    }
    if floats in HALVES:
        for k in layers:
            attention = f"decoder.layers.{k}.attention"
            found[f"{attention}.qkv"] = _joined(attention, [found.pop(f"{attention}.{part}") for part in "qkv"])
        _check_scales(found, floats)
    dtypes: dict[str, Dtype] = {product: floats if made is None else made[0] for product, made in found.items()}
    if set(dtypes.values()) == {floats}:
        raise ExportError("--dtype checkpoint: the checkpoint has its weights in floats, so give the --dtype to have")
    rounded = {(product, made[0]): made[1] for product, made in found.items() if made is not None}
    dtype = floats if floats in HALVES else most_common(dtypes)
    return ToolGraph("decoder", dtype, dtypes, rounded, saturates=False)


def _joined(attention: str, parts: Sequence[Stored]) -> Stored:
    """One product whose outputs are those of `parts`, one after the other.

    Raises:
        ExportError: they differ in bits or groups.
    """
    made = [part for part in parts if part is not None]
    if not made:
        return None
    kinds = {(dtype, *(array.shape[1:] for array in arrays.values())) for dtype, arrays in made}
    if len(made) < len(parts) or len(kinds) > 1:
        raise ExportError(
            f"--dtype checkpoint --device cuda: queries, keys and values of {attention} are one product on a GPU, and "
            "the checkpoint has them in different bits or groups: give --dtype fp16"
        )
    (dtype, first), *_ = made
    return dtype, {name: np.concatenate([arrays[name] for _, arrays in made]) for name in first}


def _check_scales(found: dict[str, Stored], floats: Dtype) -> None:
    """Refuse scales that are not exact in half precision, as some of a checkpoint in bf16 are not in fp16."""
    for product, made in found.items():
        scale = np.zeros(0, np.float32) if made is None else made[1]["scale"]
        with np.errstate(over="ignore"):
            inexact = scale[scale.astype(TYPES[HALF[floats]]).astype(np.float32) != scale]
        if inexact.size:
            raise ExportError(
                f"--dtype checkpoint --device cuda: {product} has the scale {inexact.flat[0]:.3g}, which is not exact "
                f"in {floats}, the type of activations there: give --dtype bf16"
            )
