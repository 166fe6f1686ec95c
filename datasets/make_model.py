"""Write a checkpoint of a named shape with made-up weights, for measuring speed and trying real size.

    python datasets/make_model.py OUTPUT [--shape bench]

It has the layout of a real one, with the tiny checkpoint's tokenizer, or, in the shape `vocabulary`,
with one of as many tokens as Qwen2.5's, made up too; its answers mean nothing.
Weights are random from a fixed seed, scaled so that states keep their magnitude from layer to layer,
and written in bf16 a shard at a time, so that a large shape takes no more memory than a small one.
"""

import argparse
import json
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from build_tokenizer import QWEN_VOCAB, build_tokenizer, made_up_words
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig

from export.spelling import published_name
from export.weights import skeleton

TINY = Path(__file__).parent / "tiny-qwen2.5-vl"
SEED = 5
#: The shape with a tokenizer of its own.
OWN_VOCABULARY = "vocabulary"
#: Approximate bytes of a file of weights.
SHARD = 1 << 30
#: Fields of `config.json` and of its `vision_config` that differ from the tiny checkpoint's.
Shape = tuple[dict[str, Any], dict[str, Any]]


def _qwen(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocabulary: int, vision_inner: int) -> Shape:
    """Shape of a published Qwen2.5-VL, from its `config.json`."""
    return (
        {
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_window_layers": layers,
            "max_position_embeddings": 128_000,
            "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
            "tie_word_embeddings": hidden == 2048,  # the 3B alone
        },
        {
            "hidden_size": 1280,
            "intermediate_size": vision_inner,
            "depth": 32,
            "num_heads": 16,
            "fullatt_block_indexes": [7, 15, 23, 31],
            "out_hidden_size": hidden,
        },
    )


SHAPES: dict[str, Shape] = {
    "tiny": ({}, {}),
    # 70 M parameters: large enough that on a CPU matrix products take the time, not the calls of operators.
    "bench": (
        {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 12,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "vocab_size": 32768,
            "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        },
        {
            "hidden_size": 384,
            "intermediate_size": 1152,
            "depth": 8,
            "num_heads": 6,
            "fullatt_block_indexes": [3, 7],
            "out_hidden_size": 512,
        },
    ),
    # For measuring what masks over a vocabulary cost: head and 2 of 36 text layers of 3B. In fp32, a decode step takes
    # about half as long as one of all layers in int8.
    OWN_VOCABULARY: (_qwen(2048, 11008, 2, 16, 2, 151_936, 3420)[0], {"out_hidden_size": 2048}),
    "3b": _qwen(2048, 11008, 36, 16, 2, 151_936, 3420),
    "7b": _qwen(3584, 18944, 28, 28, 4, 152_064, 3420),
    "32b": _qwen(5120, 27648, 64, 40, 8, 152_064, 3456),
    "72b": _qwen(8192, 29568, 80, 64, 8, 152_064, 3456),
}


def make_model(output: Path, shape: str) -> int:
    """Write the checkpoint; returns its number of parameters."""
    model = write_config(output, shape)
    shards: list[dict[str, Tensor]] = [{}]
    shard_of: dict[str, int] = {}
    count = 0
    for name, weight in _random_weights(model):
        if sum(tensor.nbytes for tensor in shards[-1].values()) + weight.nbytes > SHARD and shards[-1]:
            _save(output, shards[-1], len(shards))
            shards[-1] = {}
            shards.append({})
        shards[-1][name], shard_of[name] = weight, len(shards)
        count += weight.numel()
    _save(output, shards[-1], len(shards))
    names = {number: f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)}
    for number, name in names.items():
        (output / _partial(number)).rename(output / name)
    weight_map = {name: names[number] for name, number in shard_of.items()}
    index = {"metadata": {"total_size": 2 * count}, "weight_map": weight_map}
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return count


def write_config(output: Path, shape: str) -> Any:
    """Write everything except the weights; returns the model without weights."""
    text, vision = SHAPES[shape]
    shutil.copytree(TINY, output, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((output / "config.json").read_text())
    settings |= text
    settings["vision_config"] |= vision
    (output / "config.json").write_text(json.dumps(settings, indent=1))
    if shape == OWN_VOCABULARY:
        build_tokenizer(output, made_up_words(), QWEN_VOCAB)
        for name in ("config.json", "generation_config.json"):
            _move_added_tokens(output / name, QWEN_VOCAB)
    return skeleton(Qwen2_5_VLConfig.from_pretrained(output))


def _move_added_tokens(path: Path, first: int) -> None:
    """Change the ids of added tokens in a file of settings, so that they begin with `first`."""
    settings = json.loads(path.read_text())
    by = first - settings["bos_token_id"]  # <|endoftext|>, the first of them
    for name, ids in settings.items():
        if name.endswith("token_id"):
            settings[name] = [each + by for each in ids] if isinstance(ids, list) else ids + by
    path.write_text(json.dumps(settings, indent=1))


def _random_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights in bf16, by their names in files."""
    for name, parameter in model.named_parameters():
        # Seeded by name, so that no weight depends on the others.
        generator = torch.Generator().manual_seed(SEED + zlib.crc32(name.encode()))
        weight = torch.empty(parameter.shape, dtype=torch.bfloat16)
        if parameter.ndim > 1:
            weight.normal_(0, parameter[0].numel() ** -0.5, generator=generator)
        elif "bias" in name:
            weight.normal_(0, 0.02, generator=generator)
        else:
            weight.fill_(1)  # of a norm
        yield published_name(name), weight


def _partial(number: int) -> str:
    return f"model-{number:05d}.partial"


def _save(output: Path, tensors: dict[str, Tensor], number: int) -> None:
    save_file(tensors, output / _partial(number), metadata={"format": "pt"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="bench")
    args = parser.parse_args()
    print(f"{make_model(args.output, args.shape):,} parameters")
