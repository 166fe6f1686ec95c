"""Peak rates of the machine, and the operations and bytes that a model needs.

A multiplication and an addition count as two operations. Causal attention counts as full attention.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from benchmark.rows import median_seconds
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import DECODER, Dtype
from qvl_batch.decoder.kv_cache import slot_bytes
from qvl_batch.runtime.devices import usable_cpus

#: Rows, inputs and outputs of the products that find the peak: large, but within the cache.
SHAPES = ((2304, 384, 1152), (2304, 1152, 384), (600, 512, 1408), (1200, 1408, 512))
#: Operators that read only a few rows of a table.
LOOKUPS = {"Gather", "RotaryEmbedding"}
REPEATS = 15
COPIED_BYTES = 1 << 28


def gemm_peak(dtype: Dtype) -> float:
    """Operations per second of ONNX Runtime's matrix product, at the best of `SHAPES`."""
    return max(_product_speed(dtype, *shape) for shape in SHAPES)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a copy that is larger than any cache."""
    source = np.ones(COPIED_BYTES, np.uint8)
    target = np.empty_like(source)
    return 2 * COPIED_BYTES / median_seconds(lambda: np.copyto(target, source), REPEATS)


def vision_operations(config: Any, sizes: Sequence[tuple[int, int]]) -> float:
    """Operations of the vision tower for one image: the mean over images of these heights and widths in pixels.

    The two equal frames of a still image count as one.
    """
    return sum(_vision_operations(config.vision_config, *size) for size in sizes) / len(sizes)


def _vision_operations(vision: Any, height: int, width: int) -> float:
    rows, columns = height // vision.patch_size, width // vision.patch_size
    patches = rows * columns
    hidden, merged = vision.hidden_size, vision.spatial_merge_size**2 * vision.hidden_size
    block = 4 * hidden**2 + 3 * hidden * vision.intermediate_size
    side, full = vision.window_size // vision.patch_size, len(vision.fullatt_block_indexes)
    pairs = full * patches**2 + (vision.depth - full) * _pairs(rows, side) * _pairs(columns, side)
    products = patches * (3 * vision.patch_size**2 * hidden + vision.depth * block) + 2 * pairs * hidden
    return 2.0 * float(products + patches // vision.spatial_merge_size**2 * merged * (merged + vision.out_hidden_size))


def _pairs(count: int, side: int) -> int:
    """Pairs of patches in the same window, along one side of an image; windows at its end can be shorter."""
    windows, rest = divmod(count, side)
    return windows * side**2 + rest**2


def prefill_operations(config: Any, lengths: Sequence[int]) -> float:
    """Operations of the decoder to prefill a row: the mean over rows of these numbers of tokens."""
    return sum(_prefill_operations(config.text_config, length) for length in lengths) / len(lengths)


def _prefill_operations(text: Any, tokens: int) -> float:
    head_dim = text.hidden_size // text.num_attention_heads
    projections = 2 * text.hidden_size**2 + 2 * text.hidden_size * text.num_key_value_heads * head_dim
    layer = projections + 3 * text.hidden_size * text.intermediate_size + 2 * tokens * text.hidden_size
    return 2.0 * float(tokens * text.num_hidden_layers * layer + text.hidden_size * text.vocab_size)


def step_bytes(bundle: Bundle, rows: int, tokens: float) -> float:
    """Bytes that a decode step must read: the decoder's weights, and the KV cache of `rows` rows of `tokens` tokens.

    Tables from which a step reads only a few rows are left out: rotary tables, and an embedding that is not tied to
    the head.
    """
    manifest = bundle.manifest
    values = ir.load(bundle.file(DECODER)).graph.initializers.values()
    weights: float = sum(
        value.const_value.nbytes
        for value in values
        if value.const_value is not None and any(node.op_type not in LOOKUPS for node, _ in value.uses())
    )
    return weights + float(rows) * tokens * slot_bytes(manifest) / manifest.layout.max_seq_len


def _product_speed(dtype: Dtype, rows: int, inputs: int, outputs: int) -> float:
    rng = np.random.default_rng(0)
    if dtype == "int8":
        values = {"w": rng.integers(-127, 128, (inputs, outputs), dtype=np.int8)}
        values |= {"s": np.ones(outputs, np.float32), "z": np.zeros(outputs, np.int8)}
        values |= {"a": np.array(1, np.float32), "m": np.array(128, np.uint8)}
        node = helper.make_node("MatMulIntegerToFloat", ["x", "w", "a", "s", "m", "z"], ["y"], domain="com.microsoft")
        x = rng.integers(0, 256, (rows, inputs), dtype=np.uint8)
    else:
        values = {"w": rng.standard_normal((inputs, outputs)).astype(np.float32)}
        node = helper.make_node("MatMul", ["x", "w"], ["y"])
        x = rng.standard_normal((rows, inputs)).astype(np.float32)
    kind = TensorProto.UINT8 if dtype == "int8" else TensorProto.FLOAT
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", kind, [rows, inputs])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, outputs])],
        [numpy_helper.from_array(value, name) for name, value in values.items()],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = usable_cpus()
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return 2.0 * rows * inputs * outputs / median_seconds(lambda: session.run(None, {"x": x}), REPEATS)
