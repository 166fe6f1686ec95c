"""Stand-ins for NVIDIA's libraries, built with gcc, for a machine without a GPU.

With those for CUDA's, ONNX Runtime's CUDA provider loads, and says where each node goes, what it copies and what it
captures; nothing is computed. That for the driver's NVML knows two cards.

    folder = build(tmp_path)  # for LD_LIBRARY_PATH
    folder = build_nvml(tmp_path)
"""

import re
import subprocess
from collections import defaultdict
from pathlib import Path

import onnxruntime

DRIVER, RUNTIME, NVML = "libcuda.so.1", "libcudart", "libnvidia-ml.so.1"
#: Opened only when attention runs, so that nobody lists what is asked of it.
CUDNN, OF_CUDNN = "libcudnn.so.9", ["cudnnCreate", "cudnnSetStream", "cudnnDestroy", "cudnnGetVersion"]
#: Of a cuDNN whose attention ONNX Runtime would take on this card, and which the stand-in has not.
RETURNS = {"cudnnGetVersion": 92000}
#: What gives a handle, which nobody looks into.
MAKES = ("cublasCreate_v2", "cublasLtCreate", "cudnnCreate")
SOURCE, NVML_SOURCE = (Path(__file__).with_name(name) for name in ("cudart.c", "nvml.c"))
PROVIDER = Path(onnxruntime.__file__).parent / "capi" / "libonnxruntime_providers_cuda.so"


def build(folder: Path) -> Path:
    """Write all libraries that the provider asks for into a folder.

    Raises:
        subprocess.CalledProcessError: gcc refuses one.
    """
    listed = _output("nm", "-D", "--undefined-only", PROVIDER)
    symbols: dict[str, list[str]] = defaultdict(list, {CUDNN: OF_CUDNN})
    for name, library in re.findall(r"U (\w+)@(lib(?:cu|nv)\S+)", listed):
        symbols[library].append(name)
    symbols[DRIVER] = [*re.findall(r"U (cu[A-Z]\w+)$", listed, re.MULTILINE), "cuInit"]
    for library in re.findall(r"NEEDED\s+(lib(?:cu|nv)\S+)", _output("objdump", "-p", PROVIDER)):
        symbols[library].append(f"stand_in_for_{re.sub(r'[^a-z]', '_', library)}")
    runtime = next(library for library in symbols if library.startswith(RUNTIME))
    _compile(folder, runtime, f'#include "{SOURCE}"\n', symbols.pop(runtime))
    for library, names in symbols.items():
        _compile(folder, library, "", names, folder / runtime)
    return folder


def build_nvml(folder: Path) -> Path:
    """Write NVML, which shows two cards, into a folder.

    Raises:
        subprocess.CalledProcessError: gcc refuses it.
    """
    _output("gcc", "-shared", "-fPIC", NVML_SOURCE, "-o", folder / NVML)
    return folder


def _compile(folder: Path, library: str, text: str, names: list[str], *linked: Path) -> None:
    """One library: what `text` does not define succeeds and does nothing."""
    own = SOURCE.read_text()
    source, versions = folder / f"{library}.c", folder / f"{library}.map"
    stubs = [
        f"long {name}(void **made) {{ {'*made = made; ' if name in MAKES else ''}return {RETURNS.get(name, 0)}; }}"
        for name in names
        if not re.search(rf"\b{name}\(", own)
    ]
    source.write_text(text + "\n".join(stubs))
    versions.write_text(f"{'' if library == DRIVER else library} {{ global: *; }};\n")
    output = folder / library
    command = ["gcc", "-w", "-shared", "-fPIC", source, *linked, "-o", output]
    command += [f"-Wl,--version-script={versions}", f"-Wl,-soname,{library}", "-Wl,--no-as-needed"]
    _output(*command)


def _output(*command: object) -> str:
    return subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
