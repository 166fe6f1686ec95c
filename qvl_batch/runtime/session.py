"""The only module that talks to ONNX Runtime.

What leaves: sessions on a device that was really found, and bindings of arrays by address, so
that a run copies nothing that is where it is needed already. Failures of ONNX Runtime become
`BundleError` or `DeviceError`.
"""

import contextlib
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
#: Numbers of ONNX's types that NumPy does not have, and of all halves.
ONNX_TYPES = {"float16": 10, "bfloat16": 16}
_ERRORS_ONLY = 3
SPIN_MICROSECONDS = 50
#: Of a run that is not captured, nor played back, as a CUDA graph.
NO_GRAPH = -1
# Of what belongs to no session: it warns of an unknown kind of plug-in whenever CUDA is asked for.
ort.set_default_logger_severity(_ERRORS_ONLY)
_OUT_OF_MEMORY = re.compile(r"out of memory|Failed to allocate memory|CUBLAS_STATUS_ALLOC_FAILED", re.IGNORECASE)


class Session:
    """A loaded graph.

    Args:
        path: the ONNX file.
        threads: threads that one operator may use.
        model: contents to load in place of the file's; its weights are still those beside `path`.
        memory: of the device that it runs on.
        captures: runs may be captured as CUDA graphs, so nothing may run beside the GPU.

    Raises:
        BundleError: the graph cannot be loaded.
        DeviceError: not on that device, or it does not fit there.
    """

    def __init__(
        self,
        path: Path,
        threads: int,
        model: bytes | None = None,
        memory: Memory | None = None,
        *,
        captures: bool = False,
    ) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        # Several sessions share the cores: a waiting thread may spin on one from operator to operator
        # (without that a decode step takes a quarter longer), but not from run to run.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
        # Of its own threads; the calling one, which works as hard, is up to each run.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        # A plan of memory for each shape of inputs takes room of its own on a card, and keeps it.
        options.enable_mem_pattern = memory is None or memory.device == "cpu"
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        self.memory: Memory = memory or HostMemory()
        providers = _providers(self.memory, captures=captures)
        with _on(self.memory):
            try:
                with subnormals_flushed():  # or the first session would set this thread for good
                    self._session = ort.InferenceSession(model or path, options, providers=providers)
            except Exception as error:  # ONNX Runtime's own classes, which differ between its builds
                raise BundleError(f"{path} cannot be loaded: {error}") from error
        if providers[0] != CPU and CUDA not in self._session.get_providers():
            raise DeviceError(
                "ONNX Runtime could not start its CUDA provider (its own lines above say why): "
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
        """Run once, outputs in arrays of their own."""
        with subnormals_flushed(), _on(self.memory):
            results: list[NDArray[Any]] = self._session.run(list(outputs), inputs)
        return results

    def bind(self, inputs: dict[str, Buffer], outputs: dict[str, Buffer], graph: int = NO_GRAPH) -> "Binding":
        """Bind arrays for running again and again; an output may be an input's own memory.

        Args:
            inputs: by name.
            outputs: by name.
            graph: number under which a GPU captures the run, and plays it back from then on. The same arrays must
                be bound whenever it is given.
        """
        return Binding(self._session, self.memory, inputs, outputs, graph)


class Binding:
    """Arrays bound to a session by address. It keeps them alive and reads them anew each run."""

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
            # Outputs are copied in the same stream before anybody waits for it.
            self._options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def run(self) -> None:
        """Read the inputs as they are now, write the outputs in place."""
        inputs, outputs = self._arrays
        for array in inputs.values():
            self._memory.upload(array)
        with subnormals_flushed(), _on(self._memory):
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
        # Memory beyond what graphs ask for is the cache's.
        "arena_extend_strategy": "kSameAsRequested",
        # What is in fp32 is meant to be.
        "use_tf32": "0",
        # Flash (1) or memory-efficient (2) attention. Of its own accord, ONNX Runtime takes cuDNN's on new cards, which
        # needs a plan for every shape (tens of milliseconds each), and on others none that is fused for bf16 windows.
        "sdpa_kernel": "3",
        "enable_cuda_graph": str(int(captures)),
    }
    # Shapes are computed on the host.
    return [(CUDA, options), CPU]


@contextlib.contextmanager
def _on(memory: Memory) -> Iterator[None]:
    """Where ONNX Runtime may ask for memory, whatever is captured meanwhile; a full card is named."""
    if isinstance(memory, CudaMemory) and memory.device == "cuda":
        memory.card.ignore_captures()
    try:
        yield
    except Exception as error:
        if _OUT_OF_MEMORY.search(str(error)):
            raise out_of_memory() from error
        raise
