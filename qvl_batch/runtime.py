"""The only module that talks to ONNX Runtime.

What leaves: sessions on a device that was really found, and bindings of arrays by address, so
that a run copies nothing. Failures of ONNX Runtime become `BundleError` or `DeviceError`.
"""

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import onnxruntime as ort
from numpy.typing import NDArray

from qvl_batch.config import Device
from qvl_batch.errors import BundleError, ConfigError, DeviceError
from qvl_batch.subnormals import subnormals_flushed

RealDevice = Literal["cpu"]

_ERRORS_ONLY = 3
SPIN_MICROSECONDS = 50


def usable_cpus() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def resolve_device(requested: Device) -> RealDevice:
    """The device that a request means on this machine.

    Raises:
        DeviceError: CUDA was asked for and cannot be used; the message says what is missing.
        ConfigError: there is no such device.
    """
    if requested not in get_args(Device):
        raise ConfigError(f"device {requested!r} is none of {', '.join(get_args(Device))}")
    if requested == "cuda":
        raise DeviceError(f"--device cuda: {_why_no_cuda()}; use --device cpu")
    return "cpu"


def _why_no_cuda() -> str:
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider (install onnxruntime-gpu)"
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "there is no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded)"
    return "this version of qvl-batch decodes on the CPU only"


class Session:
    """A loaded graph.

    Args:
        path: the ONNX file.
        threads: threads that one operator may use.
        model: contents to load in place of the file's; its weights are still those beside `path`.
    """

    def __init__(self, path: Path, threads: int, model: bytes | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = _ERRORS_ONLY
        # Several sessions share the cores: a waiting thread may spin on one from operator to operator
        # (without that a decode step takes a quarter longer), but not from run to run.
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
        # Of its own threads; the calling one, which works as hard, is up to each run.
        options.add_session_config_entry("session.set_denormal_as_zero", "1")
        if model is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(path.parent))
        try:
            with subnormals_flushed():  # or the first session would set this thread for good
                self._session = ort.InferenceSession(model or path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime's own classes, which differ between its builds
            raise BundleError(f"{path} cannot be loaded: {error}") from error

    @property
    def outputs(self) -> dict[str, list[int | str]]:
        """Shapes of the outputs, by name."""
        return {value.name: value.shape for value in self._session.get_outputs()}

    def run(self, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """Run once, outputs in arrays of their own."""
        with subnormals_flushed():
            results: list[NDArray[Any]] = self._session.run(list(outputs), inputs)
        return results

    def bind(self, inputs: dict[str, NDArray[Any]], outputs: dict[str, NDArray[Any]]) -> "Binding":
        """Bind arrays for running again and again; an output may be an input's own memory."""
        return Binding(self._session, inputs, outputs)


class Binding:
    """Arrays bound to a session by address. It keeps them alive and reads them anew each run."""

    def __init__(
        self,
        session: ort.InferenceSession,
        inputs: dict[str, NDArray[Any]],
        outputs: dict[str, NDArray[Any]],
    ) -> None:
        self._session = session
        self._arrays = (inputs, outputs)
        self._binding = session.io_binding()
        for arrays, bind in ((inputs, self._binding.bind_input), (outputs, self._binding.bind_output)):
            for name, array in arrays.items():
                assert array.flags.c_contiguous, name
                bind(name, "cpu", 0, array.dtype.type, array.shape, array.ctypes.data)

    def run(self) -> None:
        """Read the inputs as they are now, write the outputs in place."""
        with subnormals_flushed():
            self._session.run_with_iobinding(self._binding)
