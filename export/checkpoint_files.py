"""The files of a checkpoint, before any of their tensors is read: what can be refused without torch, in no time.

What enters: a checkpoint's folder. What leaves: its settings as they are in config.json, and the files of its weights
as transformers chooses them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qvl_batch.errors import ExportError

MODEL_TYPE = "qwen2_5_vl"
_ORIGINAL = "export the checkpoint that it was made from, with --dtype for a reduced precision"
#: A file of all weights, and the index of several, as transformers looks for them, one pair after the other.
NAMES = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
#: Other files that a checkpoint must have, by the names that each can have.
_NEEDED = (("tokenizer.json", "vocab.json"), ("preprocessor_config.json", "processor_config.json"))
#: Settings of an adapter, as peft saves them.
ADAPTER_CONFIG = "adapter_config.json"
#: What a checkpoint says of its quantization; tools of another kind than transformers' own say it under the second.
QUANTIZATION, COMPRESSION = "quantization_config", "compression_config"
#: Quantizations that can be read, and the settings they must have.
_QUANTIZATIONS: dict[str, dict[str, tuple[Any, ...]]] = {
    "awq": {"bits": (4,), "version": ("gemm", "GEMM", None)},
    "gptq": {"bits": (4, 8), "checkpoint_format": ("gptq", "gptq_v2", None)},
    "fp8": {},
    "bitsandbytes": {"load_in_4bit": (True,)},
}


def check_folder(path: Path) -> dict[str, Any]:
    """Refuse what is not a folder of a complete checkpoint of Qwen2.5-VL; returns its config.json.

    Raises:
        ExportError: says what the folder is, or what it lacks.
    """
    if not path.is_dir():
        raise ExportError(f"{path} is not a directory: give the folder or the hub id of a Qwen2.5-VL checkpoint")
    if (path / ADAPTER_CONFIG).exists():
        if has_weights(path):
            raise ExportError(
                f"{path} holds weights and an adapter ({ADAPTER_CONFIG}), which may be merged or not: move the files "
                "of the adapter to a folder of their own, and give it to --adapter if it is not"
            )
        raise ExportError(
            f"{path} holds an adapter{_base_of(path)}: give that checkpoint, and this folder to --adapter"
        )
    settings = read_json(path / "config.json", f"{path} is not a checkpoint")
    if settings.get("model_type") != MODEL_TYPE:
        raise ExportError(f"{path} is a {settings.get('model_type')} checkpoint; only {MODEL_TYPE} is supported")
    for part in (settings, settings.get("text_config") or {}):
        if part.get(COMPRESSION):
            raise ExportError(f"{path} is quantized ({COMPRESSION}): {_ORIGINAL}")
        if part.get(QUANTIZATION):
            _check_quantization(path, part[QUANTIZATION])
    for names in _NEEDED:
        if not any((path / name).is_file() for name in names):
            raise ExportError(
                f"{path} lacks {names[0]}: copy it from the checkpoint that this one was made from, such as "
                "Qwen/Qwen2.5-VL-3B-Instruct"
            )
    weight_files(path)
    return settings


def method_of(quantization: Mapping[str, Any]) -> str:
    """The method that a `quantization_config` names."""
    return str(quantization.get("quant_method") or "unknown method")


def read_json(path: Path, what: str) -> dict[str, Any]:
    """An object in a JSON file; `what` begins the message if there is none.

    Raises:
        ExportError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ExportError(f"{what}: {path.name}: {error.strerror}") from error
    except ValueError as error:
        raise ExportError(f"{what}: {path.name}: {error}") from error
    if not isinstance(found, dict):
        raise ExportError(f"{what}: {path.name} holds no object")
    return found


def weight_files(path: Path) -> list[Path]:
    """Files of the weights: the first of `NAMES` that are there.

    Raises:
        ExportError: there are none, or some are missing.
    """
    for single, index in NAMES:
        if (path / single).is_file():
            return [path / single]
        if (path / index).is_file():
            return _of_index(path / index)
    tried = " and no ".join(name for pair in NAMES for name in pair)
    raise ExportError(f"{path} has no {tried}: it is not a checkpoint, or was not downloaded completely")


def has_weights(path: Path) -> bool:
    """Whether a folder has one of `NAMES`."""
    return any((path / name).is_file() for pair in NAMES for name in pair)


def _check_quantization(path: Path, settings: Any) -> None:
    """Refuse a quantization that cannot be read."""
    method = method_of(settings) if isinstance(settings, dict) else str(settings)
    needed = _QUANTIZATIONS.get(method)
    wrong = next(
        (f", {key} {settings.get(key)}" for key, can in (needed or {}).items() if settings.get(key) not in can), ""
    )
    if needed is None or wrong:
        raise ExportError(
            f"{path} is quantized ({method}{wrong}); awq of 4 bits, gptq of 4 and 8, fp8, and bitsandbytes of 4 can be "
            f"read: {_ORIGINAL}"
        )


def _of_index(index: Path) -> list[Path]:
    path = index.parent
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ExportError(f"{index} cannot be read: {error}; download it again") from error
    missing = sorted(name for name in names if not (path / name).is_file())
    if missing:
        raise ExportError(f"{path} lacks {missing[0]}, which its index names: download it")
    return sorted(path / name for name in names)


def _base_of(adapter: Path) -> str:
    """What an adapter was trained on, in words, if it says so."""
    try:
        base = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        return f" ({ADAPTER_CONFIG})"
    return f" of {base} ({ADAPTER_CONFIG})"
