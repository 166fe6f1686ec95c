"""Checkpoints with random weights in any shape of Qwen2.5-VL, around the tiny one's tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from conftest import TINY
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration


def penalised_checkpoint(path: Path, penalty: float) -> Path:
    """The tiny checkpoint with a repetition penalty."""
    shutil.copytree(TINY, path)
    settings = json.loads((path / "generation_config.json").read_text())
    (path / "generation_config.json").write_text(json.dumps(settings | {"repetition_penalty": penalty}))
    return path


def make_checkpoint(
    path: Path, *, text: dict[str, Any], vision: dict[str, Any], generation: dict[str, Any] | None = None
) -> Path:
    """Write a checkpoint whose config is the tiny one's with some fields changed."""
    shutil.copytree(TINY, path, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((path / "config.json").read_text())
    config |= text
    config["vision_config"] |= vision
    config["vision_config"]["out_hidden_size"] = config["hidden_size"]
    (path / "config.json").write_text(json.dumps(config))
    if generation:
        settings = json.loads((path / "generation_config.json").read_text())
        (path / "generation_config.json").write_text(json.dumps(settings | generation))
    torch.manual_seed(len(str(text)) + len(str(vision)))
    config = Qwen2_5_VLConfig.from_pretrained(path)
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)  # noqa: SLF001  (no public way)
    for name, parameter in model.named_parameters():
        # Norms and biases too: left at one and zero, they would hide a graph that drops them.
        spread = 0.3 if parameter.ndim == 1 else 1.5 * parameter[0].numel() ** -0.5
        torch.nn.init.normal_(parameter, 1.0 if "norm" in name or "ln_q" in name else 0.0, spread)
    model.save_pretrained(path / "saved")
    (path / "saved" / "model.safetensors").rename(path / "model.safetensors")
    shutil.rmtree(path / "saved")
    return path


def untied(path: Path) -> Path:
    """Write the tiny checkpoint with a head of its own, which holds the same weights."""
    shutil.copytree(TINY, path)
    tensors = load_file(TINY / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return path


def with_outliers(path: Path, factor: int = 64) -> Path:
    """Write the tiny checkpoint with channels that are `factor` times as large between norms and products, in all
    layers of both towers. The model computes the same numbers.
    """
    shutil.copytree(TINY, path)
    tensors = load_file(TINY / "model.safetensors")
    takers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
        "norm1": ("attn.qkv",),
        "norm2": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for name in [name for name in tensors if name.split(".")[-2] in takers]:
        module, norm, _ = name.rsplit(".", 2)
        channels = torch.arange(3, len(tensors[name]), 40)
        tensors[name][channels] *= factor
        for taker in takers[norm]:
            tensors[f"{module}.{taker}.weight"][:, channels] /= factor
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path
