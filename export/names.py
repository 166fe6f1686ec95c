"""Names of nodes, values and weights in the graphs: those of the modules that they were traced in.

    decoder.layers.3.mlp.gate/MatMul      a node: its module, and its operator
    decoder.layers.3.attention/Concat.1   the second one of this operator in this module
    decoder.layers.3.mlp.gate/MatMul:0    the first value that a node computes
    decoder.layers.3.mlp.gate.weight      a weight

A module is one of the model's parts (`part_names`) or inside of one. Reports and options name modules so, too.
"""

import ast
from collections import Counter
from typing import Literal, get_args

import onnx_ir as ir

Tower = Literal["vision", "decoder"]
TOWERS: tuple[Tower, ...] = get_args(Tower)
#: The product of pixels, the head, and the table of tokens.
PATCHES, HEAD, EMBEDDING = "vision.patch_embed", "decoder.head", "decoder.embed.weight"
#: Hidden states in the plain graphs: before the first layer, and after each.
PLAIN_STATES: dict[Tower, tuple[str, str]] = {
    "vision": ("vision.patch_embed/MatMul:0", "vision.blocks.{}/Add.2:0"),
    "decoder": ("decoder.embed/Where:0", "decoder.layers.{}/Add.3:0"),
}
#: Where the tracer says which modules a node is in, outermost first; the last one is the node itself.
_SCOPES = "pkg.torch.onnx.name_scopes"


def name_all(model: ir.Model, tower: Tower) -> None:
    """Name all nodes, values and initializers of a graph that was just traced; inputs and outputs keep their names."""
    outputs, seen, modules = set(model.graph.outputs), Counter[str](), dict[ir.Node, str]()
    for value in list(model.graph.initializers.values()):
        value.name = f"{tower}.{value.name}"
    for node in model.graph:
        modules[node] = module = _module(node, modules)
        name = f"{tower}.{module}/{node.op_type}" if module else f"{tower}/{node.op_type}"
        node.name = f"{name}.{seen[name]}" if seen[name] else name
        seen[name] += 1
        for number, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{node.name}:{number}"


def module_of(node: ir.Node) -> str:
    """Name of the module that a node is in."""
    return str(node.name).split("/")[0]


def _module(node: ir.Node, modules: dict[ir.Node, str]) -> str:
    """Name of the module that a node was traced in, within the tower; '' for the tower itself."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:  # a node that the tracer made of another one, whose input it has
        producers = (value.producer() for value in node.inputs if value is not None)
        return next((modules[producer] for producer in producers if producer is not None), "")
    *around, _ = ast.literal_eval(scopes)
    # The tracer's own steps have a name that begins with an underscore.
    return next((scope for scope in reversed(around) if not scope.startswith("_")), "")
