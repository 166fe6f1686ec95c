"""No run computes with subnormal numbers, whichever thread it is called from, and no caller notices."""

import platform
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from qvl_batch.runtime.memory import on_this_machine
from qvl_batch.runtime.session import Session
from qvl_batch.runtime.subnormals import subnormals_flushed

HAS_REGISTER = (platform.system(), platform.machine()) == ("Linux", "x86_64")
pytestmark = pytest.mark.skipif(not HAS_REGISTER, reason="only x86-64 Linux has the register")
#: Enough for every thread of a session to take part.
VALUES = 1 << 20


def _tenth(normal):
    return normal * np.float32(0.1)


def test_subnormals_are_zero_within_and_numbers_outside():
    smallest = np.full(8, np.finfo(np.float32).tiny)
    assert _tenth(smallest).min() > 0
    with subnormals_flushed():
        assert _tenth(smallest).max() == 0
    assert _tenth(smallest).min() > 0
    with pytest.raises(KeyError), subnormals_flushed():
        raise KeyError
    assert _tenth(smallest).min() > 0


@pytest.mark.parametrize("threads", [1, 2])
def test_no_thread_of_a_run_computes_with_subnormals(threads, tmp_path):
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [VALUES]) for name in "xy"]
    tenth = helper.make_tensor("tenth", TensorProto.FLOAT, [], [0.1])
    node = helper.make_node("Mul", ["x", "tenth"], ["y"])
    graph = helper.make_graph([node], "tenth", *([v] for v in values), [tenth])
    path = tmp_path / "tenth.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    smallest = np.full(VALUES, np.finfo(np.float32).tiny)
    found = np.ones(VALUES, np.float32)

    with ThreadPoolExecutor(1) as before:  # this thread is older than the session
        before.submit(lambda: None).result()
        session = Session(path, threads)
        assert before.submit(session.run, ["y"], {"x": smallest}).result()[0].max() == 0
        before.submit(session.bind({"x": on_this_machine(smallest)}, {"y": on_this_machine(found)}).run).result()
        assert found.max() == 0
        assert before.submit(_tenth, smallest).result().min() > 0
    assert _tenth(smallest).min() > 0
