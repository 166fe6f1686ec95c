"""Found by every Python process that has this folder in PYTHONPATH: ONNX Runtime's products saturate there.

As a kernel that adds in too few bits would, every product of activations and weights stops at `MOST`; of the graph
that QVL_SATURATES names, or of all.
"""

import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent.parent))
from after_import import AfterImport

sys.path.pop()
#: Largest magnitude of a product.
MOST = 1.0
PRODUCTS = ("MatMul", "Gemm", "MatMulIntegerToFloat", "MatMulNBits")
FOLDER = "session.model_external_initializers_file_folder_path"


def saturated(path):
    """A graph whose products stop at `MOST`, as bytes; its weights are still those beside the file."""
    import onnx  # noqa: PLC0415  (not every process needs it)

    model = onnx.load(path, load_external_data=False)
    for side, value in (("least", -MOST), ("most", MOST)):
        model.graph.initializer.append(
            onnx.helper.make_tensor(f"saturated.{side}", onnx.TensorProto.FLOAT, [], [value])
        )
    nodes = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type in PRODUCTS:
            name = node.output[0]
            node.output[0] = f"{name}.whole"
            limits = ["saturated.least", "saturated.most"]
            nodes.append(onnx.helper.make_node("Clip", [node.output[0], *limits], [name]))
    whole = onnx.helper.make_graph(nodes, "saturated", model.graph.input, model.graph.output, model.graph.initializer)
    model.graph.CopyFrom(whole)
    return model.SerializeToString()


def plant(runtime, name=None):
    """Let the sessions that `qvl_batch.runtime.session` makes of that graph, or of all, saturate."""
    make = runtime.ort.InferenceSession

    def session(graph, options, **others):
        if isinstance(graph, Path) and name in (None, graph.name):
            options.add_session_config_entry(FOLDER, str(graph.parent))
            graph = saturated(graph)
        return make(graph, options, **others)

    runtime.ort.InferenceSession = session


if "QVL_SATURATES" in os.environ:
    AfterImport({"qvl_batch.runtime.session": lambda module: plant(module, os.environ["QVL_SATURATES"])})
