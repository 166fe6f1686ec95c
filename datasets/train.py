"""Train the tiny Qwen2.5-VL of this folder on made-up scenes, on a CPU.

    python datasets/train.py --work-dir /tmp/tiny --output datasets/tiny-qwen2.5-vl
    python datasets/train.py --work-dir /tmp/tiny --output /tmp/checkpoint --from-checkpoint datasets/tiny-qwen2.5-vl

Three stages: a long one at 224 x 224 (64 image tokens, a ninth of the cost), a shorter one at 672 x 672, and one with
rows as they come: images at their own size, text before them, two images, two turns, JSON (`batches.py`). With
`--from-checkpoint`, only the last stage, from that checkpoint's weights. `--steps-json` puts a cheap stage before it,
of JSON about small images, for weights that have not seen any. Every step draws its scenes from `(SEED, step)`, and
the state is saved every few minutes, so a run that was stopped resumes where it was, with the same data.

From answers alone, a vision tower this small learns shapes very slowly (2,000 steps were not enough
for a star). So probes on its features also learn the kind, colour and size of the shape that each
merged patch shows. Relations and counts are learned from the answers only.
"""

import argparse
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from batches import IGNORE, PROBED, UNSEEN, Batch, Drawing, Packer, Span
from scenes import ORDINALS
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

SEED = 20_250_127
CHECKPOINT = Path(__file__).parent / "tiny-qwen2.5-vl"
SAVE_EVERY_S = 120
PROBE_WEIGHT = 0.5
#: Patches of a whole window of the vision tower; windows at an image's edge have fewer.
WINDOW = 64
#: From here on PyTorch's own attention is as fast as ours, and takes no memory for scores.
MANY_PATCHES = 2000


@dataclass(frozen=True)
class Stage:
    """Steps `[previous stage's last, last)`.

    Args:
        last: the step after its last.
        image_size: side in pixels that images are fitted to, or what rows have images at their own size.
        size: images of a part of a step, or, of images at their own size, their cost (`Drawing.cost`).
        learning_rate: the highest, after the warm-up.
        final_rate: the last.
        warmup: steps in which the rate rises.
    """

    last: int
    image_size: int | Literal["json", "native"]
    size: int
    learning_rate: float
    final_rate: float
    warmup: int


class Steps(NamedTuple):
    """Steps of each stage."""

    at_224: int
    at_672: int
    json: int
    native: int


#: How many batches of the last stage are of JSON about small images.
JSON_SHARE = 0.35
#: Questions about each image in stages of one image size.
QUESTIONS = 16


def stages(steps: Steps, images: int | None = None, native_rate: float = 8e-4) -> list[Stage]:
    """The stages, with so many images in a part of a step of the first two, and this highest rate of the others."""
    ends = [sum(steps[:n]) for n in range(1, len(steps) + 1)]
    return [
        Stage(ends[0], 224, images or 8, 2e-3, 5e-4, 300),
        Stage(ends[1], 672, images or 2, 1e-3, 1e-5, 50),
        Stage(ends[2], "json", 270, native_rate, native_rate / 2, 100),
        Stage(ends[3], "native", 270, native_rate, 1e-5, 20),
    ]


class Batches:
    """The training batch of a part of a step, from the numbers of both alone."""

    def __init__(self, plan: list[Stage], pack: Packer) -> None:
        self.plan = plan
        self.pack = pack

    def __call__(self, step: int, part: int) -> Batch:
        """The batch."""
        stage = next(stage for stage in self.plan if step < stage.last)
        drawing = Drawing(np.random.default_rng((SEED, step, part)))
        match stage.image_size:
            case "native" if drawing.rng.random() >= JSON_SHARE:
                drawing.draw_native(stage.size)
            case "json" | "native":
                drawing.draw_json(stage.size)
            case image_size:
                drawing.draw_fixed(image_size, stage.size, QUESTIONS)
        return self.pack(drawing)


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
        self.ordinal = nn.Parameter(torch.zeros(len(ORDINALS), hidden_size))

    def forward(self, features: Tensor, embedding: Tensor, shown: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of features (T, D) against classes (T, probes), with weights (T,), summed."""
        losses = [
            (F.cross_entropy(logits, shown[:, i], reduction="none") * weight).sum()
            for i, logits in enumerate(self._logits(features.float(), embedding))
        ]
        return sum(losses)

    def ordinals(self, hidden: Tensor, ordinals: Tensor, weight: Tensor) -> Tensor:
        """Cross-entropy of states of image tokens (n, D) against which image of the row they are of (n,), summed."""
        logits = hidden.float() @ self.ordinal.t()
        return (F.cross_entropy(logits, ordinals, reduction="none") * weight).sum()

    def _logits(self, features: Tensor, embedding: Tensor) -> Iterator[Tensor]:
        for words, ground, scale in zip(self.words, self.ground, self.scale, strict=True):
            yield features @ torch.cat([ground[None], embedding[words]]).t() * scale


@dataclass(frozen=True)
class Loss:
    """Of a batch: cross-entropy of the answers, that of the probes, the share of correctly predicted tokens, and the
    weight of the batch.

    Every answer has the same weight. Otherwise the long description would outweigh the short answers,
    which are decided by their first token.
    """

    answers: Tensor
    probes: Tensor
    right: float
    weight: float


def loss_of(model: Qwen2_5_VLForConditionalGeneration, probes: Probes, batch: Batch) -> Loss:
    """The loss of a batch, for a model that is `prepared`."""
    features = model.model.visual(batch.patches, batch.grids).pooler_output
    embeds = model.get_input_embeddings()(batch.ids)
    image = batch.ids == model.config.image_token_id
    embeds = embeds.masked_scatter(image[..., None], features[batch.features].to(embeds.dtype))
    states = model.model.language_model(
        inputs_embeds=embeds,
        attention_mask={"full_attention": batch.spans},
        position_ids=batch.position,
        use_cache=False,
        output_hidden_states=True,
    )
    answered = batch.labels != IGNORE
    logits = model.lm_head(states.last_hidden_state[answered]).float()
    labels, weights = batch.labels[answered], batch.weight[answered]
    losses = F.cross_entropy(logits, labels, reduction="none")
    right = float((logits.argmax(-1) == labels).float().mean())
    probed = probes(features, model.get_input_embeddings().weight, batch.shown, batch.shown_weight)
    probed = probed / len(batch.grids)
    ordinals = probes.ordinals(states.hidden_states[1][image], batch.ordinals, batch.ordinal_weight)
    probed = probed + ordinals / batch.ordinal_weight.sum()
    return Loss((losses * weights).sum() / weights.sum(), probed, right, float(weights.sum()))


class Gradients:
    """Gradients of a step's parts, worked out by processes that share the weights.

    Processes of one thread each, which take parts as they become free, are not held up by other programs on this
    machine as threads are that wait for each other at every operator.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration, probes: Probes, batches: Batches, parts: int) -> None:
        self.model, self.probes, self.batches, self.parts = model, probes, batches, parts
        self.parameters = [p for p in (*model.parameters(), *probes.parameters()) if p.requires_grad]
        for parameter in self.parameters:
            parameter.share_memory_()

    def set(self, step: int, pool: ProcessPoolExecutor) -> np.ndarray:
        """Set the gradients of a step; returns the means of its two losses and of the share of predicted tokens."""
        results = list(pool.map(_part_of_step, [step] * self.parts, range(self.parts)))
        weights = np.array([weight for *_, weight in results]) / sum(weight for *_, weight in results)
        mean = torch.from_numpy(sum(weight * flat for weight, (_, flat, _) in zip(weights, results, strict=True)))
        for parameter, gradient in zip(
            self.parameters, mean.float().split([p.numel() for p in self.parameters]), strict=True
        ):
            parameter.grad = gradient.view(parameter.shape)
        return weights @ np.array([figures for figures, *_ in results])

    def of_part(self, step: int, part: int) -> tuple[list[float], np.ndarray, float]:
        """Both losses and the share of predicted tokens, the gradient of a part of a step, flat, and its weight."""
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(self.model, self.probes, self.batches(step, part))
        gradients = torch.autograd.grad(loss.answers + PROBE_WEIGHT * loss.probes, self.parameters)
        flat = torch.cat([gradient.flatten() for gradient in gradients]).numpy()
        return [loss.answers.item(), loss.probes.item(), loss.right], flat, loss.weight


#: Set before processes are forked, so that each has it.
_gradients: Gradients


def _one_thread_while(parent: int) -> None:
    """Set up a process: its operators use one thread, and it ends when its parent has ended."""
    torch.set_num_threads(1)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _part_of_step(step: int, part: int) -> tuple[list[float], np.ndarray, float]:
    return _gradients.of_part(step, part)


def train(model: nn.Module, batches: Batches, work_dir: Path, first: int, parts: int) -> None:
    """All steps from `first` on, or from where a saved state is."""
    global _gradients  # noqa: PLW0603  (see there)
    probes = Probes(batches.pack.tokenizer, model.config.text_config.hidden_size)
    trained = nn.ModuleList([model, probes])
    optimizer = torch.optim.AdamW(_parameter_groups(trained), betas=(0.9, 0.98), fused=True)
    state = work_dir / "state.pt"
    if state.exists():
        saved = torch.load(state)
        trained.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        first = saved["step"]
    _gradients = Gradients(model, probes, batches, parts)
    start, last_save, shown = 0, time.monotonic(), time.monotonic()
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(os.cpu_count(), fork, _one_thread_while, (os.getpid(),)) as pool:
        for stage in batches.plan:
            name = f"{stage.image_size}px" if isinstance(stage.image_size, int) else stage.image_size
            for step in range(max(first, start), stage.last):
                for group in optimizer.param_groups:
                    group["lr"] = _learning_rate(stage, step - start, stage.last - start)
                loss, probed, right = _gradients.set(step, pool)
                norm = nn.utils.clip_grad_norm_(_gradients.parameters, 1.0)
                optimizer.step()
                if step % 20 == 0:
                    pace, shown = (time.monotonic() - shown) / 20, time.monotonic()
                    print(
                        f"step {step} {name} loss {loss:.4f} tokens right {right:.4f}"
                        f" probes {probed:.4f} norm {norm:.2f} {pace:.2f} s/step",
                        flush=True,
                    )
                if time.monotonic() - last_save > SAVE_EVERY_S or step + 1 == stage.last:
                    _save(state, trained, optimizer, step + 1)
                    last_save = time.monotonic()
            start = stage.last


def prepared(model: Qwen2_5_VLForConditionalGeneration) -> Qwen2_5_VLForConditionalGeneration:
    """Make a model take the rows of a `Batch`, and train faster on a CPU. transformers' classes are changed too."""
    qwen.Qwen2_5_VLVisionAttention.forward = batched_vision_attention
    qwen.Qwen2_5_VisionPatchEmbed.forward = patch_embedding
    qwen.ALL_ATTENTION_FUNCTIONS["spans"] = attention_in_spans
    model.config.text_config._attn_implementation = "spans"
    return model


def attention_in_spans(module, query, key, value, spans: list[Span], **_):
    """Attention of rows one after the other (1, heads, S, head size), each within itself."""
    # Split first: the gradient of a slice of all rows would be as large as all rows, once for each row.
    lengths = [span.stop - span.start for span in spans]
    key, value = (t.repeat_interleave(module.num_key_value_groups, dim=1) for t in (key, value))
    rows = zip(spans, *(t[0].split(lengths, dim=1) for t in (query, key, value)), strict=True)
    return torch.cat([attention(q, k, v, span.mask) for span, q, k, v in rows], dim=1).transpose(0, 1)[None], None


def patch_embedding(self, patches):
    """`Qwen2_5_VisionPatchEmbed.forward` as a product of matrices, which is faster than a convolution."""
    return F.linear(patches, self.proj.weight.flatten(1))


def batched_vision_attention(self, hidden_states, cu_seqlens, position_embeddings, **_):
    """`Qwen2_5_VLVisionAttention.forward` with windows padded to one length, as one batched call.

    transformers loops over windows in Python, which takes most of a training step of small images. Whole images of
    different sizes are looped over here too: padding would cost more.
    """
    lengths = cu_seqlens.diff()
    lengths = lengths[lengths > 0]
    longest = int(lengths.max())
    qkv = self.qkv(hidden_states).view(-1, 3, self.num_heads, self.head_dim)
    q, k, v = qkv.unbind(1)
    cos, sin = (t[:, None].to(q.dtype) for t in position_embeddings)
    q = q * cos + qwen.rotate_half(q) * sin
    k = k * cos + qwen.rotate_half(k) * sin
    if (lengths == longest).all():
        q, k, v = (t.view(-1, longest, self.num_heads, self.head_dim).transpose(1, 2) for t in (q, k, v))
        out = attention(q, k, v).transpose(1, 2)
    elif longest <= WINDOW:
        valid = torch.arange(longest) < lengths[:, None]
        index = (lengths.cumsum(0) - lengths)[:, None] + torch.arange(longest)
        index = torch.where(valid, index, 0)
        q, k, v = (t[index].transpose(1, 2) for t in (q, k, v))
        out = attention(q, k, v, torch.where(valid, 0.0, UNSEEN)[:, None, None, :]).transpose(1, 2)[valid]
    else:
        images = zip(*(t.transpose(0, 1).split(lengths.tolist(), dim=1) for t in (q, k, v)), strict=True)
        out = torch.cat([image_attention(*image) for image in images], dim=1).transpose(0, 1)
    return self.proj(out.reshape(hidden_states.shape[0], -1))


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention (..., tokens, head size) in the type of `v`; the mask is added to the scores.

    Forward and backward in bf16 take half the time of PyTorch's own on a CPU.
    """
    with torch.autocast("cpu", enabled=False):  # which would make the softmax fp32
        scores = (q * q.shape[-1] ** -0.5).to(v.dtype) @ k.to(v.dtype).transpose(-1, -2)
        if mask is not None:
            scores = scores + mask.to(scores.dtype)
        return scores.softmax(-1) @ v


def image_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attention` of a whole image (heads, tokens, head size), without its scores in memory if they are many."""
    if q.shape[1] < MANY_PATCHES:
        return attention(q, k, v)
    q, k, v = (t[None].to(v.dtype) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v)[0]


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
    parser.add_argument("--from-checkpoint", type=Path, help="only the last stage, from the weights in this folder")
    parser.add_argument("--steps-224", type=int, default=3600)
    parser.add_argument("--steps-672", type=int, default=1400)
    parser.add_argument("--steps-json", type=int, default=0, help="steps of JSON alone, before the last stage")
    parser.add_argument("--steps-native", type=int, default=4500)
    parser.add_argument("--native-rate", type=float, default=8e-4, help="highest rate of the last two stages")
    parser.add_argument("--parts", type=int, default=4, help="batches of a step, worked out by processes of one thread")
    parser.add_argument("--images", type=int, help="images in a part of a step of the first two stages")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)
    config = Qwen2_5_VLConfig.from_pretrained(CHECKPOINT)
    steps = Steps(args.steps_224, args.steps_672, args.steps_json, args.steps_native)
    plan = stages(steps, args.images, args.native_rate)
    if args.from_checkpoint:
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.from_checkpoint, dtype=torch.float32)
    else:
        model = Qwen2_5_VLForConditionalGeneration._from_config(config, dtype=torch.float32)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    first = plan[1].last if args.from_checkpoint else 0
    train(prepared(model), Batches(plan, Packer(config, CHECKPOINT)), args.work_dir, first, args.parts)
    if args.output:
        model.to(torch.bfloat16).save_pretrained(args.work_dir / "checkpoint")
        args.output.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(args.work_dir / "checkpoint" / "model.safetensors", args.output / "model.safetensors")


if __name__ == "__main__":
    main()
