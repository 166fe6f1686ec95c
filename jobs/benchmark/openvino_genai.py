"""OpenVINO GenAI's continuous batching, in its own environment (see `make openvino`).

Of our code it imports only the decoding of images, which needs NumPy, Pillow and pyarrow.
"""

from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai

from benchmark.rows import Peer, Rows
from qvl_batch.bundle.layout import Resolution
from qvl_batch.images.pixels import decode_image, see
from qvl_batch.images.view import View


class OpenVino(Peer):
    """`ContinuousBatchingPipeline` on images as our bundle sees them.

    It takes images of any size, and leaves those as they are whose sides are multiples of 28, within the limits of the
    checkpoint's image processor. Ours are such images.

    Args:
        model: folder that `optimum-cli export openvino` made of the checkpoint.
        precision: OpenVINO's `INFERENCE_PRECISION_HINT`; None for its own choice.
        resolution: sizes of images of the bundle.
        new_tokens: tokens of each answer; end tokens are ignored.
    """

    def __init__(self, model: Path, precision: str | None, resolution: Resolution, new_tokens: int) -> None:
        self._model, self._view = model, View.of(resolution)
        self._properties = {"INFERENCE_PRECISION_HINT": precision} if precision else {}
        self._requests = 0
        super().__init__(new_tokens)

    @property
    def batch(self) -> int:
        """Batch size: rows that are answered at a time."""
        return self._batch

    @batch.setter
    def batch(self, rows: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = self._batch = rows
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(str(self._model), scheduler, "CPU", self._properties)

    def prompt_tokens(self, rows: Rows) -> list[int]:
        """Tokens up to the answer of each row."""
        return [result.perf_metrics.get_num_input_tokens() for result in self._generate(rows, self._images(rows))]

    def _vision(self, rows: Rows, images: list[Any]) -> float:
        results = self._generate(rows, images)
        return float(np.mean([r.perf_metrics.get_prepare_embeddings_duration().mean for r in results]))

    def _images(self, rows: Rows) -> list[Any]:
        return [openvino.Tensor(see(decode_image(file), self._view).pixels[None]) for file in rows.files]

    def _answer(self, rows: Rows, images: list[Any], new_tokens: int) -> list[list[int]]:
        handles = []
        for prompt, image in zip(rows.prompts, images, strict=True):
            handles.append(self._pipeline.add_request(self._requests, prompt, [image], _forced(new_tokens)))
            self._requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [list(handle.read_all()[0].generated_ids) for handle in handles]

    def _generate(self, rows: Rows, images: list[Any]) -> list[Any]:
        """One token each, with OpenVINO's own measurements."""
        return list(
            self._pipeline.generate(
                rows.prompts, images=[[image] for image in images], generation_config=[_forced(1)] * len(rows)
            )
        )


class OpenVinoText:
    """`ContinuousBatchingPipeline` in fp32 on rows of text: answers of a pattern by structured output, or free text.

    Args:
        model: folder that `optimum-cli export openvino` made of the checkpoint.
        rows: rows that are answered at a time.
    """

    def __init__(self, model: Path, rows: int) -> None:
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.max_num_seqs = rows
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), scheduler, "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        self._requests = 0

    def matching(self, prompts: list[str], pattern: str, most: int) -> list[int]:
        """Answer what matches a regular expression, with at most so many tokens; tokens of each answer."""
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.do_sample = most, False
        config.structured_output_config = openvino_genai.StructuredOutputConfig(regex=pattern)
        return self._answer(prompts, [config] * len(prompts))

    def text(self, prompts: list[str], tokens: list[int]) -> list[int]:
        """Answer in free text of so many tokens each; tokens of each answer."""
        return self._answer(prompts, [_forced(each) for each in tokens])

    def _answer(self, prompts: list[str], configs: list[Any]) -> list[int]:
        handles = []
        for prompt, config in zip(prompts, configs, strict=True):
            handles.append(self._pipeline.add_request(self._requests, prompt, [], config))
            self._requests += 1
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        return [len(handle.read_all()[0].generated_ids) for handle in handles]


def _forced(new_tokens: int) -> Any:
    config = openvino_genai.GenerationConfig()
    config.max_new_tokens, config.ignore_eos, config.do_sample = new_tokens, True, False
    return config
