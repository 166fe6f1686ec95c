"""The files of an adapter, before any of its tensors is read: what can be refused without torch, in no time.

What enters: a folder as peft saves it. What leaves: its settings, which a merge can have, and the file of its tensors.
"""

from pathlib import Path
from typing import Any

from export.checkpoint_files import ADAPTER_CONFIG, read_json
from qvl_batch.errors import ExportError

#: Files of an adapter's tensors, the first that is there.
FILES = ("adapter_model.safetensors", "adapter_model.bin")
#: Settings that a merge needs, or that do not change it.
_KNOWN = {
    "alpha_pattern", "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying",
    "eva_config", "exclude_modules", "fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern",
    "layers_to_transform", "loftq_config", "lora_alpha", "lora_bias", "lora_dropout", "lora_ga_config", "megatron_core",
    "modules_to_save", "peft_type", "peft_version", "qalora_group_size", "r", "rank_pattern", "revision",
    "runtime_config", "target_modules", "task_type", "trainable_token_indices", "use_dora", "use_rslora",
}  # fmt: skip
#: The same of each kind that is supported. That of single tokens is also a part of LoRA, under another name.
_SETTINGS = {"LORA": _KNOWN, "TRAINABLE_TOKENS": _KNOWN | {"init_weights", "token_indices"}}
#: `init_lora_weights` that leave the checkpoint's weights as they are. The others subtract from them what the adapter
#: began with, so that it belongs to weights that are in no file.
_PLAIN_STARTS = {True, False, None, "gaussian", "eva", "orthogonal", "mica"}


def adapter_file(path: Path) -> Path:
    """The file of an adapter's tensors.

    Raises:
        ExportError: there is none.
    """
    found = next((path / name for name in FILES if (path / name).is_file()), None)
    if found is None:
        raise ExportError(f"--adapter {path} has no {' and no '.join(FILES)}: give the folder that peft saved")
    return found


def adapter_settings(path: Path) -> dict[str, Any]:
    """An adapter's settings.

    Raises:
        ExportError: there are none, or one that is not supported.
    """
    settings = read_json(path / ADAPTER_CONFIG, f"--adapter {path} is not an adapter")
    kind = settings.get("peft_type")
    if kind not in _SETTINGS:
        raise ExportError(
            f"--adapter {path} is {kind}; only {' and '.join(_SETTINGS)} are supported: merge it with peft"
        )
    start = settings.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise ExportError(
            f"--adapter {path} began with init_lora_weights {start}, which changed the checkpoint's weights too: "
            "convert it (peft's save_pretrained with path_initial_model_for_weight_conversion), or merge it with peft"
        )
    other = next((name for name, value in settings.items() if value and name not in _SETTINGS[kind]), None)
    if other:
        raise ExportError(f"--adapter {path} has {other}, which is not supported: merge it with peft")
    needed = ("r", "lora_alpha") if kind == "LORA" else ()
    missing = next((name for name in needed if not isinstance(settings.get(name), int | float)), None)
    if missing:
        raise ExportError(f"--adapter {path}: {ADAPTER_CONFIG} has no number {missing}")
    return settings
