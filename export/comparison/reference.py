"""The checkpoint's side of a comparison: transformers, in PyTorch, fp32.

Template, tokenizer, image processor, M-RoPE positions and greedy decoding are all transformers'
own; of the worker, only the pixels of images as they are seen are used, which both sides start from.

Only rows with the same number of tokens are batched, so that there is no padding and a row gives the
same result as alone (a test compares them).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import GenerationConfig
from transformers.vision_utils import get_vision_window_index

from export.checkpoint import Checkpoint
from export.comparison.questions import Question
from export.comparison.traces import Array, States, Trace
from export.vision import window_order
from qvl_batch.config import DeviceOption
from qvl_batch.conversation import Message, images_of
from qvl_batch.errors import DeviceError, PromptError
from qvl_batch.images.pixels import Seen
from qvl_batch.schema import Failure

#: Rows in one call of `generate`.
BATCH = 8


class PyTorch:
    """A checkpoint as a side.

    Args:
        checkpoint: what `export.checkpoint.load_checkpoint` gives.
        system_prompt: text of a system message for conversations without one, None for the template's own default.
        max_new_tokens: longest answer in tokens.
        max_seq_len: longest row in tokens, the bundle's.
        native: the bundle's images keep their own size; `states` have the order of its graph.
        device: where to run.

    Raises:
        DeviceError: CUDA was asked for and PyTorch has none.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        system_prompt: str | None = None,
        max_new_tokens: int = 64,
        max_seq_len: int = 1024,
        native: bool = False,
        device: DeviceOption = "auto",
    ) -> None:
        self.device = _torch_device(device)
        self.model = checkpoint.model.to(self.device)
        self.config = self.model.config
        self.tokenizer, self.processor = checkpoint.tokenizer, checkpoint.image_processor
        self.generation = checkpoint.generation
        self._image_token = self.tokenizer.convert_ids_to_tokens(self.config.image_token_id)
        added = self.tokenizer.added_tokens_decoder.values()
        self._special_tokens = [token.content for token in added if token.special]
        vision = self.config.vision_config
        self._unit = vision.patch_size * vision.spatial_merge_size
        self._system_prompt, self._native = system_prompt, native
        self._max_new_tokens, self._max_seq_len = max_new_tokens, max_seq_len

    def answer(self, questions: Sequence[Question]) -> list[Trace | Failure]:
        """Answer questions that have no failure, in order."""
        rows = [self.input_ids(question) for question in questions]
        results: dict[int, Trace | Failure] = {}
        by_length: defaultdict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(rows):
            if len(ids) < self._max_seq_len:
                by_length[len(ids)].append(index)
            else:
                message = (
                    f"the row has {len(ids)} tokens before its answer; the bundle takes {self._max_seq_len} with it"
                )
                results[index] = Failure.of(PromptError(message))
        for indices in by_length.values():
            for start in range(0, len(indices), BATCH):
                batch = indices[start : start + BATCH]
                traces = self._generate([questions[i] for i in batch], [rows[i] for i in batch])
                results.update(zip(batch, traces, strict=True))
        return [results[index] for index in range(len(questions))]

    def states(self, question: Question) -> States:
        """Hidden states of a question, vision patches in the order of the graph."""
        inputs = self.inputs([question], [self.input_ids(question)])
        visual, text = self.model.model.visual, self.model.model.language_model
        with (
            torch.inference_mode(),
            _layer_states(visual.blocks) as vision,
            _layer_states(text.layers) as decoder,
            _features(visual) as features,
        ):
            logits = self.model(**inputs, logits_to_keep=1).logits[0, -1]
        order = self._graph_order(inputs["image_grid_thw"])
        return States(
            # (N, D_vision) to merge groups, in the graph's order, and back to patches
            vision=[_array(state.reshape(len(order), -1, state.shape[-1])[order].flatten(0, 1)) for state in vision],
            features=_array(features[0]),
            decoder=[*(_array(state[0]) for state in decoder[:-1]), _array(decoder[-1][0, -1:])],
            logits=_array(logits),
        )

    def input_ids(self, question: Question) -> list[int]:
        """Token ids of a row up to its answer, the image's token repeated for each merged patch."""
        messages = list(question.conversation)
        if self._system_prompt is not None and all(message.role != "system" for message in messages):
            messages.insert(0, Message("system", self._system_prompt))
        texts = [part for message in messages for part in message.parts if isinstance(part, str)]
        if any(token in text for token in self._special_tokens for text in texts):
            ids = self._stretches(messages)
        else:
            ids = self.tokenizer(self._rendered(messages, lambda text: text), add_special_tokens=False).input_ids
        tokens = iter([image.pixels.shape[0] * image.pixels.shape[1] // self._unit**2 for image in _shown(question)])
        pad = self.config.image_token_id
        return [each for token in ids for each in ([pad] * next(tokens) if token == pad else [token])]

    def _rendered(self, messages: Sequence[Message], text: Callable[[str], str]) -> str:
        """What the template prints, with each piece of text passed through `text`."""

        def part(each: str | int) -> dict[str, str]:
            return {"type": "text", "text": text(each)} if isinstance(each, str) else {"type": "image"}

        chat = [
            {
                "role": message.role,
                "content": text(message.content)
                if isinstance(message.content, str)
                else [part(each) for each in message.content],
            }
            for message in messages
        ]
        rendered: str = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return rendered

    def _stretches(self, messages: Sequence[Message]) -> list[int]:
        """Token ids where text spells special tokens, which is then text: what is between the template's own is
        tokenized with `split_special_tokens`.
        """
        texts: list[str] = []

        def marked(text: str) -> str:
            texts.append(text)
            return f"\ue000{len(texts) - 1}\ue001"

        ids: list[int] = []
        special = re.compile("(" + "|".join(map(re.escape, sorted(self._special_tokens, key=len, reverse=True))) + ")")
        for stretch in special.split(self._rendered(messages, marked)):
            if special.fullmatch(stretch):
                ids.append(self.tokenizer.convert_tokens_to_ids(stretch))
                continue
            whole = re.sub("\ue000([0-9]+)\ue001", lambda mark: texts[int(mark[1])], stretch)
            ids += self.tokenizer(whole, add_special_tokens=False, split_special_tokens=True).input_ids
        return ids

    def inputs(self, questions: Sequence[Question], rows: Sequence[list[int]]) -> dict[str, Tensor]:
        """Inputs of the model for rows of one length."""
        pictures = [Image.fromarray(image.pixels) for question in questions for image in _shown(question)]
        # Resized already: the checkpoint's own limits of sizes may be others than the bundle's.
        images = self.processor(pictures, do_resize=False, return_tensors="pt") if pictures else {}
        ids = torch.tensor(rows)
        inputs = {
            **images,
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.config.image_token_id).int(),
        }
        return {name: tensor.to(self.device) for name, tensor in inputs.items()}

    def _generate(self, questions: Sequence[Question], rows: Sequence[list[int]]) -> list[Trace]:
        length = len(rows[0])
        settings = GenerationConfig(
            max_new_tokens=min(self._max_new_tokens, self._max_seq_len - length),
            do_sample=False,
            eos_token_id=list(self.generation.eos_token_ids),
            pad_token_id=self.generation.pad_token_id,
            repetition_penalty=self.generation.repetition_penalty,
            output_logits=True,
            return_dict_in_generate=True,
        )
        with torch.inference_mode(), _features(self.model.model.visual) as features:
            output = self.model.generate(**self.inputs(questions, rows), generation_config=settings)
        tokens = output.sequences[:, length:].tolist()
        logits = _array(torch.stack(output.logits, dim=1))
        width = self.config.text_config.hidden_size
        whole = _array(features[0]) if features else np.zeros((0, width), np.float32)
        counts = [row.count(self.config.image_token_id) for row in rows]
        by_row = np.split(whole, np.cumsum(counts)[:-1])
        return [self._trace(*row) for row in zip(rows, tokens, logits, by_row, strict=True)]

    def _trace(self, input_ids: list[int], tokens: list[int], logits: Array, features: Array) -> Trace:
        ends = [index for index, token in enumerate(tokens) if token in self.generation.eos_token_ids]
        tokens = tokens[: ends[0] + 1] if ends else tokens
        text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        return Trace(text, tokens, input_ids, features, logits[: len(tokens)])

    def _graph_order(self, grid: Tensor) -> Tensor:
        """Index in transformers' window order of each merge group in the graph's order, int64 (T_img,)."""
        vision = self.config.vision_config
        index, _ = get_vision_window_index(grid, vision.spatial_merge_size, vision.window_size, vision.patch_size)
        orders: list[Tensor] = []
        start = 0
        for image in grid:
            tokens = int(image.prod()) // vision.spatial_merge_size**2
            # A graph for any size has transformers' own order.
            order = index[start : start + tokens] if self._native else window_order(image[None], vision)[0] + start
            orders.append(order)
            start += tokens
        return torch.argsort(index)[torch.cat(orders)]


def _shown(question: Question) -> list[Seen]:
    """Images in the order in which the conversation shows them."""
    return [question.images[index] for index in images_of(question.conversation)]


@contextmanager
def _layer_states(layers: Any) -> Iterator[list[Tensor]]:
    """Hidden states before the first of `layers` and after each, of the next forward pass."""
    states: list[Tensor] = []

    def before(_module: Any, inputs: tuple[Tensor, ...]) -> None:
        states.append(inputs[0])

    def after(_module: Any, _inputs: Any, output: Tensor) -> None:
        states.append(output)

    hooks = [layers[0].register_forward_pre_hook(before), *(layer.register_forward_hook(after) for layer in layers)]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _features(visual: Any) -> Iterator[list[Tensor]]:
    """Features (rows * T_img, D) of each forward pass of the vision tower."""
    features: list[Tensor] = []
    hook = visual.register_forward_hook(lambda _module, _inputs, output: features.append(output.pooler_output))
    try:
        yield features
    finally:
        hook.remove()


def _array(tensor: Tensor) -> Array:
    return tensor.float().cpu().numpy()


def _torch_device(device: DeviceOption) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise DeviceError("--device cuda: PyTorch finds no usable GPU here; use --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    # Full fp32: TF32 would keep ten bits of the mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda")
