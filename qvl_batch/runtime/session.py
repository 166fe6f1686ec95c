"""Sessions of ONNX Runtime, and arrays bound to them.

What enters: ONNX files, the memory of a device, arrays. What leaves: sessions on that device, and bindings of arrays by
address, so that a run copies only host mirrors. Errors of ONNX Runtime become `BundleError` or `DeviceError`.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from qvl_batch.errors import BundleError, DeviceError
from qvl_batch.runtime.cuda import out_of_memory
from qvl_batch.runtime.memory import ELEMENTS, Buffer, CudaMemory, HostMemory, Memory
from qvl_batch.runtime.subnormals import subnormals_flushed

ORT_VERSION: str = ort.__version__
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"
#: Half precision types as numbers of `TensorProto.DataType`, since NumPy does not have both.
ONNX_TYPES = {"float16": 10, "bfloat16": 16}
#: Log severity: errors and worse.
_ERRORS_ONLY = 3
#: How long an idle thread of a session spins before it sleeps.
SPIN_MICROSECONDS = 50
#: `gpu_graph_id` of a run that is neither captured nor replayed as a CUDA graph.
NO_GRAPH = -1
# The default logger, used outside of sessions, warns of an unknown kind of plug-in whenever CUDA is requested.
ort.set_default_logger_severity(_ERRORS_ONLY)
_OUT_OF_MEMORY = re.compile(r"out of memory|Failed to allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


class Session:
    """A loaded graph.

    Args:
        path: the ONNX file.
        threads: threads for one operator.
        model: contents to load in place of the file; weights are still read from the folder of `path`.
        memory: memory of the device that the graph runs on; by default of the host.
        captures: allow runs to be captured as CUDA graphs; all nodes must then run on the GPU, but for shapes.
        prepack: copy weights into the order that kernels want. Without it, weights stay mapped from disk and take no
            memory, and products in fp32 are slower.
        profile: record the time of every node of every run in a file in this folder; see `end_profile`.

    Raises:
        BundleError: the graph cannot be loaded.
        DeviceError: the device cannot be used, or is out of memory.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        model: bytes | None = None,
        memory: Memory | None = None,
        *,
        captures: bool = False,
        prepack: bool = True,
        profile: Path | None = None,
    ) -> None:
        options = ort.SessionOptions()
        if not prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile / path.name)
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        # Several sessions share the cores: an idle thread spins between operators (without that, a decode step takes
        # a quarter longer), but not between runs.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
        # For the session's own threads; each run sets it for the calling thread, which computes too.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # On a GPU, the memory pattern of every input shape would allocate memory of its own and never free it.
        options.enable_mem_pattern = memory is None or memory.device == "cpu"
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.memory: Memory = memory or HostMemory()
        providers = _providers(self.memory, captures=captures)
        with _allocating(self.memory):
            try:
                with subnormals_flushed():  # the first session changes the mode of this thread; this restores it
                    self._session = ort.InferenceSession(model or path, options, providers=providers)
            except Exception as error:  # ONNX Runtime's error classes differ between its builds
                raise BundleError(f"{path} cannot be loaded: {error}") from error
        if providers[0] != CPU and CUDA not in self._session.get_providers():
            raise DeviceError(
                "ONNX Runtime could not start its CUDA provider (its log lines above say why): "
                "install its libraries with pip install 'onnxruntime-gpu[cuda,cudnn]'"
            )

    @property
    def inputs(self) -> dict[str, str]:
        """Element types of the inputs, by name."""
        return {value.name: value.type.removeprefix("tensor(").rstrip(")") for value in self._session.get_inputs()}

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """Shapes of the outputs, by name."""
        return {value.name: value.shape for value in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run once; returns the outputs in new arrays."""
        with subnormals_flushed(), _allocating(self.memory):
            results: list[NDArray[Any]] = self._session.run(list(outputs), inputs)
        return results

    def end_profile(self) -> list[dict[str, Any]]:
        """Stop recording; returns the events as ONNX Runtime names them."""
        file = Path(self._session.end_profiling())
        events: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        file.unlink()
        return events

    def bind(self, inputs: dict[str, Buffer], outputs: dict[str, Buffer], graph: int = NO_GRAPH) -> "Binding":
        """Bind arrays for repeated runs. An output can share memory with an input.

        Args:
            inputs: arrays by input name.
            outputs: arrays by output name.
            graph: number under which the first run on a GPU is captured as a CUDA graph; later runs replay it. All
                bindings with the same number must have the same arrays.
        """
        return Binding(self._session, self.memory, inputs, outputs, graph)


class Binding:
    """Arrays bound to a session by address. It keeps them alive, and each run reads their current values.

    Outputs that are not bound are computed all the same: only builds of ONNX Runtime for training can leave them out.
    """

    def __init__(
        self,
        session: ort.InferenceSession,
        memory: Memory,
        inputs: dict[str, Buffer],
        outputs: dict[str, Buffer],
        graph: int,
    ) -> None:
        self._session, self._memory = session, memory
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for arrays, bind in ((inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name, array in arrays.items():
                element = ONNX_TYPES.get(array.element, ELEMENTS[array.element])
                bind(name, array.device, 0, element, array.shape, array.address)
        self._options = ort.RunOptions()
        if memory.device == "cuda":
            self._options.add_run_config_entry("gpu_graph_id", str(graph))
            # `run` copies the outputs in the same stream, then waits for it once.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        """Read the current inputs, and write the outputs in place."""
        inputs, outputs = self._arrays
        for array in inputs.values():
            self._memory.upload(array)
        with subnormals_flushed(), _allocating(self._memory):
            self._session.run_with_iobinding(self._binding, self._options)
        for array in outputs.values():
            self._memory.download(array)
        self._memory.synchronize()


def _providers(memory: Memory, *, captures: bool) -> list[Any]:
    if not isinstance(memory, CudaMemory) or memory.device == "cpu":
        return [CPU]
    options = {
        "device_id": "0",
        "user_compute_stream": str(memory.card.stream),
        # Allocate no more than graphs request: the rest of the card's memory is for the KV cache.
        "arena_extend_strategy": "kSameAsRequested",
        # Products in fp32 must not be rounded to TF32.
        "use_tf32": "0",
        # Flash (1) or memory-efficient (2) attention. By default, ONNX Runtime uses cuDNN's on new cards, which needs a
        # plan for every shape (tens of milliseconds each), and on others no fused kernel for windows in bf16.
        "sdpa_kernel": "3",
        "enable_cuda_graph": str(int(captures)),
    }
    # The CPU provider computes shapes.
    return [(CUDA, options), CPU]


@contextlib.contextmanager
def _allocating(memory: Memory) -> Iterator[None]:
    """For calls in which ONNX Runtime allocates: allow it during captures, and translate out-of-memory errors."""
    if isinstance(memory, CudaMemory) and memory.device == "cuda":
        memory.card.ignore_captures()
    try:
        yield
    except Exception as error:
        if _OUT_OF_MEMORY.search(str(error)):
            raise out_of_memory() from error
        raise
