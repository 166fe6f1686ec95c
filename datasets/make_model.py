"""Write a checkpoint of a named shape with made-up weights, for measuring speed.

    python datasets/make_model.py OUTPUT [--shape bench]

It has the layout of a real one, around the tiny checkpoint's tokenizer; its answers mean nothing.
Weights are drawn from a seed, scaled so that states keep their size from layer to layer.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

TINY = Path(__file__).parent / "tiny-qwen2.5-vl"
SEED = 5
#: Fields of `config.json` and of its `vision_config` that differ from the tiny checkpoint's.
SHAPES = {
    # 70 M parameters: large enough that matrix products, and not calls, take the time on a CPU.
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
}


def make_model(output: Path, shape: str) -> int:
    """Write the checkpoint; returns its number of parameters."""
    text, vision = SHAPES[shape]
    shutil.copytree(TINY, output, ignore=shutil.ignore_patterns("*.safetensors"))
    settings = json.loads((output / "config.json").read_text())
    settings |= text
    settings["vision_config"] |= vision
    (output / "config.json").write_text(json.dumps(settings, indent=1))
    torch.manual_seed(SEED)
    model = Qwen2_5_VLForConditionalGeneration._from_config(
        Qwen2_5_VLConfig.from_pretrained(output), dtype=torch.float32
    )
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        elif "bias" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    model.to(torch.bfloat16).save_pretrained(output / "saved")
    (output / "saved" / "model.safetensors").rename(output / "model.safetensors")
    shutil.rmtree(output / "saved")
    return sum(parameter.numel() for parameter in model.parameters())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="bench")
    args = parser.parse_args()
    print(f"{make_model(args.output, args.shape):,} parameters")
