"""Which device a graph runs on, and the names of this machine's processor and card.

What enters: a device option, and the device that the bundle was exported for. What leaves: a device that is present,
and its memory; or a `DeviceError` that says what is missing.
"""

import contextlib
import ctypes
import importlib.util
import io
import os
import platform
from pathlib import Path
from typing import get_args

import onnxruntime as ort

from qvl_batch.bundle.manifest import HALVES, Manifest
from qvl_batch.config import Device, DeviceOption
from qvl_batch.errors import ConfigError, DeviceError
from qvl_batch.runtime.cuda import Cuda
from qvl_batch.runtime.memory import CudaMemory, HostMemory, Memory
from qvl_batch.runtime.session import CUDA, ORT_VERSION

#: Instruction sets with kernels for matrix products in ONNX Runtime: Linux's name of the CPU flag, and the usual name.
INSTRUCTIONS = {
    "avx2": "AVX2", "avx512f": "AVX-512", "avx_vnni": "AVX-VNNI", "avx512_vnni": "VNNI", "amx_int8": "AMX",
    "asimddp": "dot product", "i8mm": "int8 matrix products",
}  # fmt: skip


def usable_cpus() -> int:
    """CPUs that this process is allowed to use."""
    return len(os.sched_getaffinity(0))


def resolve_device(requested: DeviceOption, manifest: Manifest) -> Device:
    """The device that a bundle's decoder runs on, which is the one that it was exported for.

    Raises:
        DeviceError: another device was requested.
        ConfigError: there is no such device.
    """
    _check_option(requested, "device")
    if requested not in ("auto", manifest.device):
        dtypes = "--dtype bf16" if requested == "cuda" else "--dtype fp32 or int8"
        raise DeviceError(
            f"--device {requested}: this bundle's decoder is in {manifest.dtype} and made for {manifest.device}; "
            f"export the checkpoint with {dtypes}, or leave out --device"
        )
    return manifest.device


def resolve_vision_device(requested: DeviceOption, manifest: Manifest) -> Device:
    """The device that a bundle's vision tower runs on. A tower in fp32 runs on any; `auto` takes the CPU for it.

    Raises:
        DeviceError: the tower does not run on the requested device.
        ConfigError: there is no such device.
    """
    _check_option(requested, "vision device")
    only: Device | None = None
    reduced = manifest.vision_dtypes - {"fp32"}
    if reduced:
        only = "cuda" if reduced <= set(HALVES) else "cpu"
    if requested == "auto":
        return only or "cpu"
    if only not in (None, requested):
        found = ", ".join(sorted(reduced))
        raise DeviceError(
            f"--vision-device {requested}: this bundle's vision tower is in {found}, which runs on "
            f"{only}; export the checkpoint with --vision-dtype fp32, or leave out --vision-device"
        )
    return requested


def machine_of(memory: Memory) -> str:
    """Name of the card or processor that `memory` belongs to, and version of ONNX Runtime."""
    name = memory.card.name if isinstance(memory, CudaMemory) and memory.device == "cuda" else processor()
    return f"{name}, onnxruntime {ORT_VERSION}"


def processor() -> str:
    """Model of this machine's processor, and those of `INSTRUCTIONS` that it has."""
    name, flags = platform.machine(), ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            name = value.strip() if key.strip() == "model name" else name
            flags = value if key.strip() in ("flags", "Features") else flags
    known = [shown for flag, shown in INSTRUCTIONS.items() if flag in flags.split()]
    return f"{name} ({', '.join(known)})" if known else name


def _check_option(requested: DeviceOption, what: str) -> None:
    if requested not in get_args(DeviceOption):
        raise ConfigError(f"{what} must be one of {', '.join(get_args(DeviceOption))}, not {requested!r}")


def require_cuda(option: str) -> int:
    """Check that CUDA can be used; returns the major version of the CUDA runtime that ONNX Runtime was built for.

    Args:
        option: the option that requests CUDA, for the error.

    Raises:
        DeviceError: there is no CUDA provider or no driver.
    """
    if CUDA not in ort.get_available_providers():
        raise DeviceError(f"{option}: this onnxruntime has no CUDA provider: pip install onnxruntime-gpu")
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        raise DeviceError(
            f"{option}: there is no NVIDIA driver on this machine (libcuda.so.1 cannot be loaded); run where there is "
            "a GPU, or export the checkpoint for the CPU (--dtype fp32 or int8)"
        ) from None
    return int(ort.cuda_version.split(".")[0])


def has_cuda() -> bool:
    """Whether ONNX Runtime has a CUDA provider and the machine a driver."""
    try:
        require_cuda("")
    except DeviceError:
        return False
    return True


def open_cuda(option: str) -> Cuda:
    """The GPU of this process.

    Args:
        option: the option that requests CUDA, for the error.

    Raises:
        DeviceError: the GPU cannot be used; the message says what is missing.
    """
    version = require_cuda(option)
    _preload()
    try:
        return Cuda(version)
    except DeviceError as error:
        raise DeviceError(f"{option}: {error}") from error


def _preload() -> None:
    """Load CUDA's libraries from pip's `nvidia` packages, so that later lookups by name find them.

    ONNX Runtime only searches the folder of its own package; theirs can be another one on `sys.path`.
    """
    nvidia = importlib.util.find_spec("nvidia")
    roots = nvidia.submodule_search_locations if nvidia else None
    folders = [str(folder) for root in roots or () for folder in sorted(Path(root).glob("*/lib"))]
    # `preload_dlls` prints every library that it cannot find; one that is needed raises an error of its own later.
    with contextlib.redirect_stdout(io.StringIO()):
        for folder in [*folders, None]:
            ort.preload_dlls(directory=folder)


def memory_on(device: Device, option: str = "--device cuda") -> Memory:
    """Memory of a device.

    Raises:
        DeviceError: the device cannot be used here.
    """
    return CudaMemory(open_cuda(option)) if device == "cuda" else HostMemory()
