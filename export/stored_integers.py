"""The integers that a checkpoint of AWQ or GPTQ has of the decoder, taken over as those of a tool.

What enters: the weights. What leaves: for each product its dtype and its integers; products that the checkpoint has in
floats, such as the head, are in fp32.
"""

from export.names import HEAD as HEAD_PRODUCT
from export.tool_graphs import ToolGraph
from export.weights import HEAD, Weights
from qvl_batch.bundle.manifest import Dtype
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


def stored_integers(weights: Weights) -> ToolGraph:
    """The decoder of a quantized checkpoint.

    Raises:
        ExportError: it has no integers, or some that a bundle cannot have.
    """
    layers = range(len(weights.skeleton.model.language_model.layers))
    parameters = {
        f"decoder.layers.{k}.{product}": f"model.language_model.layers.{k}.{module}.weight"
        for k in layers
        for product, module in PRODUCTS.items()
    }
    found = {product: weights.integers(name) for product, name in {**parameters, HEAD_PRODUCT: HEAD}.items()}
    dtypes: dict[str, Dtype] = {product: "fp32" if made is None else made[0] for product, made in found.items()}
    if set(dtypes.values()) == {"fp32"}:
        raise ExportError("--dtype checkpoint: the checkpoint has its weights in floats, so give the --dtype to have")
    rounded = {(product, made[0]): made[1] for product, made in found.items() if made is not None}
    return ToolGraph("decoder", dtypes, rounded, saturates=False)
