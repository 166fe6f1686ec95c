"""Reads a checkpoint, and refuses one that the exported graphs could not reproduce exactly.

What enters: a directory in Hugging Face's layout of Qwen2.5-VL. What leaves: its weights, tokenizer,
image processor and generation settings and, on request, the whole model in fp32.
"""

import math
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig, Qwen2_5_VLConfig
from transformers import Qwen2_5_VLForConditionalGeneration as Model
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import logging as transformers_logging

from export.adapter_files import adapter_file
from export.checkpoint_files import ADAPTER_CONFIG, check_folder, read_json, weight_files
from export.hub import checkpoint_folder, name_of
from export.weights import Weights
from qvl_batch.bundle.manifest import CheckpointSource, Generation, combined_sha256, file_sha256
from qvl_batch.errors import ExportError

#: Files copied into the bundle, as far as the checkpoint has them.
COPIED = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
    "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "chat_template.json", "chat_template.jinja",
)  # fmt: skip
#: Settings that make `generate` choose another token than the largest logit after the repetition penalty, unless they
#: are 1 or unset.
NEUTRAL_AT_ONE = ("num_beams", "num_beam_groups", "guidance_scale", "encoder_repetition_penalty")
#: Settings that do so unless they are unset, zero or empty.
NEUTRAL_IF_UNSET = (
    "min_new_tokens", "min_length", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "suppress_tokens", "begin_suppress_tokens", "sequence_bias", "constraints", "force_words_ids",
    "forced_bos_token_id", "forced_eos_token_id", "stop_strings", "exponential_decay_length_penalty",
    "watermarking_config", "penalty_alpha", "dola_layers",
)  # fmt: skip
#: Rotary embeddings whose frequencies do not depend on the length of a row.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
#: Settings of the image processor that are in the vision graph.
PROCESSOR = {"do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint."""

    path: Path
    weights: Weights
    tokenizer: Any
    image_processor: Any
    generation: Generation
    adapter: Path | None = None

    @property
    def config(self) -> Any:
        """The model's config."""
        return self.weights.skeleton.config

    @property
    def special_tokens(self) -> dict[str, str]:
        """Variables of the chat template that name special tokens, such as `eos_token`, as transformers sets them."""
        return {name: str(token) for name, token in self.tokenizer.special_tokens_map.items() if isinstance(token, str)}

    @cached_property
    def model(self) -> Any:
        """The whole model in memory, in fp32 and in evaluation mode: as transformers loads it, if it reads these
        weights itself, which is not so with an adapter, with other names, or where weights are quantized.
        """
        if not self.weights.are_usual:
            return self.weights.whole()
        model = Model.from_pretrained(
            self.path, config=self.config, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        return model.eval()

    @cached_property
    def source(self) -> CheckpointSource:
        """Name and hash that identify the checkpoint; all its files are read once."""
        return _source(self.path, self.adapter)

    @property
    def copied_files(self) -> list[Path]:
        """Files that go into the bundle unchanged, since the worker reads them."""
        return _copied_files(self.path)


def load_checkpoint(
    path: Path, revision: str | None = None, adapter: Path | None = None, *, ignore_extra: bool = False
) -> Checkpoint:
    """Load a checkpoint for export.

    Args:
        path: its folder, or its id on the Hugging Face hub.
        revision: of an id.
        adapter: folder of an adapter that is merged into its weights.
        ignore_extra: leave out tensors that are not weights of the model.

    Raises:
        ExportError: not a checkpoint of Qwen2.5-VL, incomplete, or of a variant that the graphs
            do not cover.
    """
    path = checkpoint_folder(path, revision, COPIED)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # its warnings are of checkpoints that are checked here
    config = _read_config(path)
    tokenizer = _load(path, "tokenizer", partial(AutoTokenizer.from_pretrained, trust_remote_code=False))
    tokenizer.chat_template = _processors_template(path) or tokenizer.chat_template
    if not tokenizer.chat_template:
        raise ExportError(f"{path} has no chat template: use an instruction-tuned checkpoint")
    if not isinstance(tokenizer.chat_template, str):
        raise ExportError(f"{path} has several chat templates: leave the one to use in tokenizer_config.json")
    if "strftime_now" in tokenizer.chat_template:
        raise ExportError(f"{path}: the chat template prints the date, so that answers depend on it: take it out")
    if tokenizer.clean_up_tokenization_spaces:
        raise ExportError(f"{path}: tokenizer_config.json sets clean_up_tokenization_spaces, which is not supported")
    processor = _load(path, "image processor", Qwen2VLImageProcessorPil.from_pretrained)
    vision = config.vision_config
    if (processor.patch_size, processor.merge_size) != (vision.patch_size, vision.spatial_merge_size):
        raise ExportError(f"{path}: preprocessor_config.json and config.json differ in patch or merge size")
    _check_processor(path, processor)
    weights = Weights(path, config, adapter, ignore_extra=ignore_extra)
    return Checkpoint(path, weights, tokenizer, processor, _generation(path, tokenizer), adapter)


def checkpoint_source(path: Path, revision: str | None = None, adapter: Path | None = None) -> CheckpointSource:
    """Its name, and a hash over weights and settings; arguments are those of `load_checkpoint`.

    Raises:
        ExportError: there is no checkpoint.
    """
    return _source(checkpoint_folder(path, revision, COPIED), adapter)


def _source(path: Path, adapter: Path | None) -> CheckpointSource:
    files, name = [*weight_files(path), *_copied_files(path)], name_of(path)
    if adapter is not None:
        files += [adapter_file(adapter), adapter / ADAPTER_CONFIG]
        name += f" + {adapter.resolve().name}"
    return CheckpointSource(name, combined_sha256((f.name, file_sha256(f)) for f in files))


def _copied_files(path: Path) -> list[Path]:
    return [path / name for name in COPIED if (path / name).is_file()]


def _read_config(path: Path) -> Any:
    check_folder(path)
    config = _load(path, "config", Qwen2_5_VLConfig.from_pretrained)
    text, vision = config.text_config, config.vision_config
    unsupported = {
        "text hidden_act": (text.hidden_act, "silu"),
        "vision hidden_act": (vision.hidden_act, "silu"),
        "temporal_patch_size": (vision.temporal_patch_size, 2),
        "sliding window layers": (sum(kind != "full_attention" for kind in text.layer_types), 0),
    }
    for name, (found, supported) in unsupported.items():
        if found != supported:
            raise ExportError(f"{path}: {name} is {found}; only {supported} is supported")
    rope = text.rope_parameters["rope_type"]
    if rope not in ROPE_TYPES:
        raise ExportError(f"{path}: rope_type is {rope}; only {', '.join(ROPE_TYPES)} are supported")
    return config


def _check_processor(path: Path, processor: Any) -> None:
    """Refuse settings of the image processor that the vision graph does not have, or that say no sizes."""
    for name, supported in PROCESSOR.items():
        found = getattr(processor, name)
        if found != supported and not (name == "rescale_factor" and math.isclose(found, supported)):
            raise ExportError(f"{path}: {name} of the image processor is {found}; only {supported} is supported")
    size = processor.size
    if not size["shortest_edge"] or not size["longest_edge"]:
        given = {name: value for name, value in dict(size).items() if value is not None}
        raise ExportError(
            f"{path}: size of the image processor is {given}, with which transformers takes no image: "
            "preprocessor_config.json must have min_pixels and max_pixels"
        )


def _load(path: Path, what: str, load: Any) -> Any:
    try:
        return load(path, local_files_only=True)
    except Exception as error:  # transformers raises errors of many types
        # Then it says what to do with an id of the hub.
        first_line = str(error).strip().split("\n")[0].split(" If you were trying")[0]
        raise ExportError(f"{path}: the {what} cannot be loaded: {first_line}") from error


def _processors_template(path: Path) -> str | None:
    """The processor's own chat template, None if it has no file. The tokenizer does not read that file."""
    file = path / "chat_template.json"
    if not file.is_file() or (path / "chat_template.jinja").is_file():
        return None
    found = read_json(file, f"{file} cannot be read").get("chat_template")
    if found is None:
        raise ExportError(f"{file} has no chat template")
    return str(found)


def _generation(path: Path, tokenizer: Any) -> Generation:
    read = GenerationConfig.from_pretrained
    if not (path / "generation_config.json").is_file():  # older checkpoints keep these settings in config.json
        read = partial(read, config_file_name="config.json", _from_model_config=True)
    settings = _load(path, "generation config", read)
    for name in (*NEUTRAL_AT_ONE, *NEUTRAL_IF_UNSET):
        value = getattr(settings, name, None)
        if value and not (name in NEUTRAL_AT_ONE and value == 1):
            raise ExportError(
                f"{path}: the generation config sets {name} to {value}; only greedy decoding with a repetition "
                "penalty is supported: remove the setting to export without it"
            )
    eos = settings.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None or eos == []:
        raise ExportError(f"{path} has no end token: set eos_token_id in generation_config.json")
    eos_ids = tuple(eos) if isinstance(eos, list | tuple) else (eos,)
    pad = settings.pad_token_id if settings.pad_token_id is not None else tokenizer.pad_token_id
    return Generation(
        eos_token_ids=tuple(int(token) for token in eos_ids),
        pad_token_id=int(pad if pad is not None else eos_ids[0]),
        repetition_penalty=float(settings.repetition_penalty or 1.0),
    )
