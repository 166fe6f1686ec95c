"""Train the tiny Qwen2.5-VL of this folder on made-up scenes, on a CPU.

    python datasets/train.py --work-dir /tmp/tiny --output datasets/tiny-qwen2.5-vl

Two stages: a long one at 224 x 224 (64 image tokens, a ninth of the cost), then a shorter one at
672 x 672, the size that bundles use. Every step draws its scenes from `(SEED, step)`, and the state is
saved every few minutes, so a run that was stopped resumes where it was, with the same data.

One row of a batch is one image followed by several questions with their answers. A mask keeps the
questions from attending to each other, and all start at the same position, so they are trained like
separate conversations, but the image is computed only once.

From answers alone, a vision tower this small learns shapes very slowly (2,000 steps were not enough
for a star). So probes on its features also learn the kind, colour and size of the shape that each
merged patch shows. Relations and counts are learned from the answers only.
"""

import argparse
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scenes import COLORS, FORMATS, GREYS, RADIUS, SHAPES, Scene, encode, questions, render, sample_scene
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from qvl_batch.images.pixels import decode_image, fit_image

SEED = 20_250_127
CHECKPOINT = Path(__file__).parent / "tiny-qwen2.5-vl"
SAVE_EVERY_S = 120
IGNORE = -100
#: Classes of the probes: kind, colour and size of the shape that a merged patch shows.
PROBED = (SHAPES, (*COLORS, *GREYS), tuple(RADIUS))
PROBE_WEIGHT = 0.5


@dataclass(frozen=True)
class Stage:
    """Steps `[previous stage's last, last)` at one image size (pixels) and batch size (images)."""

    last: int
    image_size: int
    batch_size: int
    questions: int
    learning_rate: float
    final_rate: float
    warmup: int


def stages(steps_224: int, steps_672: int, images: int | None = None) -> list[Stage]:
    return [
        Stage(steps_224, 224, images or 32, 16, 2e-3, 5e-4, 300),
        Stage(steps_224 + steps_672, 672, images or 8, 16, 1e-3, 1e-5, 50),
    ]


class Batches:
    """Generates the training batch of a step from the step's number alone."""

    def __init__(self, config: Qwen2_5_VLConfig, checkpoint: Path) -> None:
        self.config = config
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        user = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}]
        text = self.tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
        before, after = text.split("<|image_pad|>")
        self.before = self.tokenizer(before).input_ids
        vision_end, self.closing = after.split("?")
        self.after_image = self.tokenizer(vision_end).input_ids

    def __call__(self, step: int, stage: Stage) -> dict[str, Tensor]:
        """Patches, what they show, and rows of ids, labels, positions and masks."""
        rng = np.random.default_rng((SEED, step))
        pixels, rows, shown = [], [], []
        for index in range(stage.batch_size):
            scene = sample_scene(rng, grey=index % 8 == 7)
            side = round(stage.image_size * rng.uniform(0.6, 1.4))
            data = encode(render(scene, side, transparent=index % 8 == 6), FORMATS[index % 3])
            pixels.append(fit_image(decode_image(data), stage.image_size))
            rows.append(_pick(rng, questions(scene), stage.questions))
            shown.append(what_patches_show(scene, stage.image_size // 28))
        batch = {"patches": patchify(np.stack(pixels)), "shown": torch.from_numpy(np.stack(shown))}
        return batch | self._pack(rows, stage.image_size // 28)

    def _pack(self, rows: list[list[tuple[str, str]]], merged: int) -> dict[str, Tensor]:
        """Lay out image and questions; all questions attend to segment 0, and -1 is padding."""
        image = [self.config.image_token_id] * merged**2
        prefix = self.before + image + self.after_image
        start = len(self.before)
        resume = start + merged + len(self.after_image)
        turns = [[self._turn(prompt, answer) for prompt, answer in row] for row in rows]
        length = len(prefix) + max(sum(len(ids) for ids, _ in row) for row in turns)
        length = -(-length // 16) * 16
        ids = torch.full((len(rows), length), self.config.text_config.bos_token_id)
        labels = torch.full((len(rows), length), IGNORE)
        segment = torch.full((len(rows), length), -1)
        weight = torch.zeros((len(rows), length))
        position = torch.zeros((3, len(rows), length), dtype=torch.long)
        ids[:, : len(prefix)] = torch.tensor(prefix)
        segment[:, : len(prefix)] = 0
        position[:, :, : len(prefix)] = _prefix_positions(start, merged, len(self.after_image))
        for r, row in enumerate(turns):
            at = len(prefix)
            for s, (turn, answer_length) in enumerate(row, start=1):
                stop = at + len(turn)
                ids[r, at:stop] = torch.tensor(turn)
                labels[r, stop - answer_length - 1 : stop - 1] = ids[r, stop - answer_length : stop]
                weight[r, stop - answer_length - 1 : stop - 1] = 1 / answer_length
                segment[r, at:stop] = s
                position[:, r, at:stop] = torch.arange(resume, resume + len(turn))
                at = stop
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        mask = (causal & same)[:, None]
        return {"ids": ids, "labels": labels, "weight": weight, "position": position, "mask": mask}

    def _turn(self, prompt: str, answer: str) -> tuple[list[int], int]:
        question = self.tokenizer(prompt + self.closing).input_ids
        reply = self.tokenizer(answer + "<|im_end|>").input_ids
        return question + reply, len(reply)


class Probes(nn.Module):
    """Linear classifiers of what a merged patch shows; class 0 is the background.

    The weights of a class are the embedding of its word, so that the features of a patch and the word in
    a question point in the same direction, and attention from the word finds the patch.
    """

    def __init__(self, tokenizer: Any, hidden_size: int) -> None:
        super().__init__()
        ids = [[tokenizer.encode(f" {name}") for name in names] for names in PROBED]
        assert all(len(word) == 1 for words in ids for word in words)
        self.words = [torch.tensor(words)[:, 0] for words in ids]
        self.ground = nn.Parameter(torch.zeros(len(PROBED), hidden_size))
        self.scale = nn.Parameter(torch.ones(len(PROBED)))

    def forward(self, features: Tensor, embedding: Tensor, shown: Tensor) -> Tensor:
        """Cross-entropy of features (B * T_img, D) against classes (B, T_img, probes)."""
        features = features.float()
        shown = shown.view(-1, len(PROBED))
        # Most patches are background: their weight is low, so that together they count as much as shapes.
        weight = torch.where(shown[:, 0] > 0, 1.0, 0.05)
        losses = [
            (F.cross_entropy(logits, shown[:, i], reduction="none") * weight).sum()
            for i, logits in enumerate(self._logits(features, embedding))
        ]
        return sum(losses) / weight.sum()

    def _logits(self, features: Tensor, embedding: Tensor) -> Iterator[Tensor]:
        for words, ground, scale in zip(self.words, self.ground, self.scale, strict=True):
            yield features @ torch.cat([ground[None], embedding[words]]).t() * scale


def what_patches_show(scene: Scene, merged: int) -> np.ndarray:
    """int64 (merged**2, probes): classes of the shape nearest to each merged patch, 0 if none is near."""
    inset_x, inset_y = ((1 - side) / 2 for side in scene.extent)
    centres = (np.arange(merged) + 0.5) / merged
    shown = np.zeros((merged, merged, len(PROBED)), np.int64)
    nearest = np.full((merged, merged), np.inf)
    for shape in scene.shapes:
        dx, dy = centres[None, :] - shape.x - inset_x, centres[:, None] - shape.y - inset_y
        distance = np.hypot(dx, dy)
        near = (distance < shape.radius + 0.3 / merged) & (distance < nearest)
        nearest[near] = distance[near]
        names = (shape.kind, shape.color, shape.size)
        shown[near] = [known.index(name) + 1 for known, name in zip(PROBED, names, strict=True)]
    return shown.reshape(-1, len(PROBED))


def patchify(pixels: np.ndarray) -> Tensor:
    """uint8 (B, H, W, 3) to normalised patches (B * H/14 * W/14, 3 * 2 * 14 * 14), in the order
    of `Qwen2VLImageProcessor`: 2 x 2 merge groups, both temporal frames the same.
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * 255
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * 255
    x = (torch.from_numpy(pixels).float() - mean) / std
    batch, height, width, _ = x.shape
    x = x.view(batch, height // 28, 2, 14, width // 28, 2, 14, 3)
    x = x.permute(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]
    return x.expand(-1, -1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * 14 * 14)


def loss_of(
    model: Qwen2_5_VLForConditionalGeneration, probes: Probes, batch: dict[str, Tensor], side: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Cross-entropy of the answers, that of the probes, and the share of correctly predicted tokens.

    Every answer has the same weight. Otherwise the long description would outweigh the short answers,
    which are decided by their first token.
    """
    ids = batch["ids"]
    grid = torch.tensor([[1, side // 14, side // 14]] * len(ids))
    features = model.model.visual(batch["patches"], grid).pooler_output
    embeds = model.get_input_embeddings()(ids)
    image = ids == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], features.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask=batch["mask"],
        position_ids=batch["position"],
        use_cache=False,
    ).last_hidden_state
    answered = batch["labels"] != IGNORE
    logits = model.lm_head(hidden[answered]).float()
    labels = batch["labels"][answered]
    right = (logits.argmax(-1) == labels).float().mean()
    weight = batch["weight"][answered]
    loss = (F.cross_entropy(logits, labels, reduction="none") * weight).sum() / weight.sum()
    return loss, probes(features, model.get_input_embeddings().weight, batch["shown"]), right


def train(model: nn.Module, batches: Batches, plan: list[Stage], work_dir: Path) -> None:
    probes = Probes(batches.tokenizer, model.config.text_config.hidden_size)
    trained = nn.ModuleList([model, probes])
    optimizer = torch.optim.AdamW(_parameter_groups(trained), betas=(0.9, 0.98), fused=True)
    state = work_dir / "state.pt"
    first = 0
    if state.exists():
        saved = torch.load(state)
        trained.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    start, last_save, shown = 0, time.monotonic(), time.monotonic()
    for stage in plan:
        for step in range(max(first, start), stage.last):
            for group in optimizer.param_groups:
                group["lr"] = _learning_rate(stage, step - start, stage.last - start)
            with torch.autocast("cpu", torch.bfloat16):
                loss, probed, right = loss_of(model, probes, batches(step, stage), stage.image_size)
            (loss + PROBE_WEIGHT * probed).backward()
            norm = nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 20 == 0:
                pace, shown = (time.monotonic() - shown) / 20, time.monotonic()
                print(
                    f"step {step} {stage.image_size}px loss {loss:.4f} tokens right {right:.4f}"
                    f" probes {probed:.4f} norm {norm:.2f} {pace:.2f} s/step",
                    flush=True,
                )
            if time.monotonic() - last_save > SAVE_EVERY_S or step + 1 == stage.last:
                _save(state, trained, optimizer, step + 1)
                last_save = time.monotonic()
        start = stage.last


def batched_vision_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """`Qwen2_5_VLVisionAttention.forward` for windows of equal length, as one batched call.

    transformers loops over windows in Python, which takes most of a training step at 224 x 224.
    """
    windows = cu_seqlens.numel() - 1
    qkv = self.qkv(hidden_states).view(windows, -1, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    cos, sin = (t.view(windows, 1, -1, self.head_dim).to(q.dtype) for t in position_embeddings)
    q = q * cos + qwen.rotate_half(q) * sin
    k = k * cos + qwen.rotate_half(k) * sin
    out = F.scaled_dot_product_attention(q, k, v)
    return self.proj(out.transpose(1, 2).reshape(hidden_states.shape[0], -1))


def _prefix_positions(start: int, merged: int, after: int) -> Tensor:
    """M-RoPE positions (3, 1, start + merged**2 + after) of the text before the image, the image, and
    the text after it: Qwen2-VL, arXiv 2409.12191, section 2.1.
    """
    before = torch.arange(start).expand(3, -1)
    row = torch.arange(merged).repeat_interleave(merged)
    column = torch.arange(merged).repeat(merged)
    image = torch.stack([torch.zeros_like(row), row, column]) + start
    text = torch.arange(start + merged, start + merged + after).expand(3, -1)
    return torch.cat([before, image, text], dim=1)[:, None]


def _pick(rng: np.random.Generator, by_kind: dict[str, list[tuple[str, str]]], count: int) -> list[tuple[str, str]]:
    """The description, and `count - 1` other questions; all kinds of question are equally likely."""
    others = [pairs for kind, pairs in by_kind.items() if kind != "describe" and pairs]
    chosen = [others[i] for i in rng.integers(len(others), size=count - 1)]
    return by_kind["describe"] + [pairs[rng.integers(len(pairs))] for pairs in chosen]


def _parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": 0.05},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]


def _learning_rate(stage: Stage, step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to the stage's final rate."""
    warm = min(1.0, (step + 1) / stage.warmup)
    cosine = 0.5 * (1 + float(np.cos(np.pi * step / steps)))
    return warm * (stage.final_rate + (stage.learning_rate - stage.final_rate) * cosine)


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    partial = path.with_suffix(".tmp")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
    torch.save(state, partial)
    partial.rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="folder for the state of the training")
    parser.add_argument("--output", type=Path, help="folder for the trained checkpoint")
    parser.add_argument("--steps-224", type=int, default=3600)
    parser.add_argument("--steps-672", type=int, default=1400)
    parser.add_argument("--images", type=int, help="images per step in both stages, instead of 32 and 8")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    config = Qwen2_5_VLConfig.from_pretrained(CHECKPOINT)
    qwen.Qwen2_5_VLVisionAttention.forward = batched_vision_attention
    model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    train(model, Batches(config, CHECKPOINT), stages(args.steps_224, args.steps_672, args.images), args.work_dir)
    if args.output:
        model.to(torch.bfloat16).save_pretrained(args.work_dir / "checkpoint")
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.work_dir / "checkpoint" / "model.safetensors", args.output / "model.safetensors")


if __name__ == "__main__":
    main()
