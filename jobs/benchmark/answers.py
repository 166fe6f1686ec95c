"""Kinds of answers beside others of as many tokens: those that must be something or have a confidence beside free text,
and several drawn ones of a row beside one.

All run in this process through `Answerer`, as in a job, and take turns in each round. Rows are text alone, and their
prefill is short: what a kind of answers costs has a larger share here than in a job. Rows with several answers have an
image, of made-up features, since their prefill is what the answers share. The steps behind them are timed by
themselves, too.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from rich.console import Console

from benchmark.contenders import openvino_python
from benchmark.figures import DEMO, circumstances, keep, read_rows
from benchmark.host import Host
from benchmark.rows import seconds
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import Manifest
from qvl_batch.config import check_at_least_one
from qvl_batch.constraints import Constraint, constraint_of
from qvl_batch.conversation import single_turn
from qvl_batch.decoder.answerer import Answerer, EncodedImage, EncodedRow, grammars_of
from qvl_batch.decoder.decoder import Decoder, PrefillRow, Tokens
from qvl_batch.decoder.grammar import Guide
from qvl_batch.decoder.guidance import ALL
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.pipeline.plan import DEFAULT_SLOTS
from qvl_batch.runtime.devices import usable_cpus
from qvl_batch.sampling import GREEDY, Sampling

#: What a caption in JSON can be. A made-up model ends no text by itself, so the answer is as long as the schema allows.
SCHEMA = {
    "type": "object",
    "properties": {
        "caption": {"type": "string", "maxLength": 100},
        "color": {"enum": ["red", "green", "blue", "yellow"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "indoors": {"type": "boolean"},
    },
    "required": ["caption", "color", "count", "indoors"],
}
#: What a caption in JSON can be beside a peer: JSON by a schema has white space there, and other lengths.
PATTERN = (
    r'\{"caption":"[a-zA-Z0-9 ,.]{1,100}","color":"(red|green|blue|yellow)","count":[1-9]?[0-9],'
    r'"indoors":(true|false)\}'
)
#: Every tokenizer has each of these as one token.
CHOICES = ("A", "B", "C", "D")
#: Most tokens of an answer that must be JSON, and all of those that are not.
MOST_TOKENS, FREE_TOKENS = 256, 32
#: Rounds to measure. One of JSON takes thirteen seconds.
ROUNDS = 7
#: Rounds beside a peer.
PEER_ROUNDS = 3
#: Steps that are timed of each graph.
STEPS = 24

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswersConfig:
    """Measure what constraints and confidence cost, beside free text of as many tokens, on CPUs."""

    only: Literal["answers"] = "answers"
    """Measure nothing else."""
    answers_bundle: Path
    """Folder of a bundle with a vocabulary of real size."""
    input: Path = DEMO
    """Parquet file of `id`, `image` and `prompt`, of which the prompts are asked."""
    rows: int = DEFAULT_SLOTS
    """Rows to answer; the input is repeated if it has fewer."""
    rounds: int = ROUNDS
    """Rounds to measure, after one to warm up."""
    slots: int = DEFAULT_SLOTS
    """Rows that are answered at a time."""
    against: tuple[Literal["openvino"], ...] = ()
    """Peers to measure: OpenVINO GenAI, by its structured output (openvino)."""
    openvino: Path = Path("build/openvino")
    """Folder with OpenVINO's environment, `venv`, and the bundle's checkpoint converted for it, `vocabulary-model`."""
    output: Path = Path("build/bench/answers")
    """Folder for the figures."""

    def __post_init__(self) -> None:
        """Refuse settings that cannot be measured.

        Raises:
            ConfigError: names the option and what to do.
        """
        check_at_least_one(self, "rows", "rounds", "slots")
        if self.against and not self.openvino_model.exists():
            raise ConfigError(f"--against openvino: {self.openvino_model} is missing; `make openvino` makes it")

    @property
    def openvino_model(self) -> Path:
        """The checkpoint as OpenVINO reads it."""
        return self.openvino / "vocabulary-model"


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of answers.

    Args:
        constraint: what they must be.
        tokens: of each; with a constraint, of the longest.
        options: of `Answerer`.
        sampling: how they are drawn; several of a row are measured beside one.
    """

    constraint: Constraint | None = None
    tokens: int = FREE_TOKENS
    options: Mapping[str, Any] = field(default_factory=dict)
    sampling: Sampling = GREEDY

    @property
    def beside(self) -> "Kind":
        """What it is measured beside: one answer in place of several, or else free text."""
        return replace(self, sampling=replace(self.sampling, samples=1)) if self.sampling.is_random else Kind()

    def rows(self, prompts: Sequence[str], manifest: Manifest) -> list[EncodedRow]:
        """Rows that ask for answers of this kind; those that are drawn have an image."""
        images: tuple[EncodedImage, ...] = ()
        side = manifest.layout.resolution.image_size
        if self.sampling.is_random and side is not None:
            rows, columns = manifest.layout.resolution.grid(side, side)
            shape = (rows * columns, manifest.decoder.hidden_size)
            features = np.random.default_rng(0).normal(size=shape).astype(np.float32)
            images = (EncodedImage(features, rows, columns),)
        asked = [single_turn(prompt, len(images)) for prompt in prompts]
        return [EncodedRow(each, images, self.constraint, self.sampling) for each in asked]


#: Kinds of answers by their key in `ratios`.
KINDS = {
    "guided": Kind(constraint_of("json_schema", SCHEMA), MOST_TOKENS, {"guided": True}),
    "choices": Kind(constraint_of("choices", CHOICES), 1, {"guided": True}),
    "confidence": Kind(options={"logprobs": True}),
    "four_samples": Kind(options={"drawn": True}, sampling=Sampling(temperature=1.0, samples=4)),
}


def bench(config: AnswersConfig, console: Console) -> dict[str, Any]:
    """Measure, and return what goes into `bench.json`.

    Raises:
        BundleError: there is no bundle.
        JobError: the answers do not have the same number of tokens, or there are no rows.
    """
    prompts = read_rows(config.answers_bundle, config.input, config.rows, config.output).prompts
    figures, ratios = measured(config.answers_bundle, prompts, config.rounds, config.slots, console)
    if config.against:
        keep({"ratios": ratios, "answers": figures}, config.output)
        console.print("answers of a pattern beside OpenVINO GenAI")
        figures["openvino"], beside_it = _beside_openvino(config, prompts)
        ratios |= beside_it
    return {"ratios": ratios, "answers": figures} | circumstances(config, ("onnxruntime-gpu", "llguidance"))


def measured(
    bundle: Path, prompts: Sequence[str], rounds: int, slots: int, console: Console
) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures, and rows/s of each kind of answers over those of free text.

    Args:
        bundle: folder of the bundle.
        prompts: of the rows.
        rounds: rounds to measure, after one to warm up.
        slots: rows that are answered at a time.
        console: to say how far it is.

    Raises:
        JobError: the answers do not have the same number of tokens.
    """
    loaded = Bundle.load(bundle)
    figures: dict[str, Any] = {"steps": steps(loaded, prompts, slots)}
    ratios: dict[str, float] = {}
    with closing(_answerer(loaded, slots, Kind())) as free:
        for name, kind in KINDS.items():
            several = kind.sampling.samples > 1
            # Rows with an image take many times as long.
            few = max(1, rounds // 2) if several else rounds
            with closing(_answerer(loaded, slots, kind)) as own:
                pair = (own, own if several else free)
                figures[name], ratio = beside(kind, pair, prompts, loaded.manifest, few)
            # The goal of several answers is a time.
            ratios[name] = 1 / ratio if several else ratio
            unit = "times as long as one answer" if several else "of free text of as many tokens, rows/s"
            console.print(f"{name}: {ratios[name]:.3f} {unit}")
    return figures, ratios


def _answerer(bundle: Bundle, slots: int, kind: Kind) -> Answerer:
    """Answers of a kind; where there is no constraint, no token ends them."""
    if kind.constraint is None:
        generation = replace(bundle.manifest.generation, eos_token_ids=())
        bundle = replace(bundle, manifest=replace(bundle.manifest, generation=generation))
    return Answerer(bundle, slots, usable_cpus(), allow_repetition=True, **kind.options)


def beside(
    kind: Kind, answerers: tuple[Answerer, Answerer], prompts: Sequence[str], manifest: Manifest, rounds: int
) -> tuple[dict[str, Any], float]:
    """Figures of a kind of answers, and its rows/s over those of what it is measured beside: the median of rounds, in
    each of which both answer the same rows with the same number of tokens.

    Args:
        kind: the kind.
        answerers: for it, and for what it is measured beside.
        prompts: of the rows.
        manifest: of the bundle.
        rounds: rounds to measure.

    Raises:
        JobError: a row fails, or its answer has another number of tokens.
    """
    own, other = answerers
    lengths = _lengths(own, kind.rows(prompts, manifest), kind.tokens)
    # Only rows with the most common length: both then get the same calls.
    length = statistics.mode(lengths)
    alike = [prompt for prompt, each in zip(prompts, lengths, strict=True) if each == length]
    asked = list(itertools.islice(itertools.cycle(alike), len(prompts)))
    calls: list[Callable[[], list[int]]] = [
        partial(_lengths, own, kind.rows(asked, manifest), length),
        partial(_lengths, other, kind.beside.rows(asked, manifest), length),
    ]
    if any(call() != [length] * len(asked) for call in calls):
        raise JobError(f"answers to the same rows do not all have {length} tokens, so they are not compared")
    took: list[tuple[float, float]] = []
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        each = {at: seconds(calls[at]) for at in order}
        took.append((each[0], each[1]))
    owns, frees = zip(*took, strict=True)
    figures = {
        "tokens": length,
        "rows": len(asked),
        "rows_per_second": len(asked) / statistics.median(owns),
        "free_rows_per_second": len(asked) / statistics.median(frees),
        "seconds": {"own": owns, "free": frees},
    }
    return figures, statistics.median(theirs / ours for ours, theirs in took)


def _beside_openvino(config: AnswersConfig, prompts: Sequence[str]) -> tuple[dict[str, Any], dict[str, float]]:
    """Figures of OpenVINO GenAI, and our rows/s over its own, in free text and in answers of the same pattern: medians
    of rounds.

    In free text, both give the same tokens. Its masks leave other tokens than ours for the same text, so that answers
    of the pattern differ, and have other numbers of tokens.
    """
    kind = replace(KINDS["guided"], constraint=constraint_of("regex", PATTERN))
    python, model = openvino_python(config.openvino), (config.openvino_model, config.slots)
    bundle = Bundle.load(config.answers_bundle)
    with (
        closing(_answerer(bundle, config.slots, Kind())) as free,
        closing(_answerer(bundle, config.slots, kind)) as guided,
        Host("OpenVINO GenAI", "benchmark.openvino_genai", "OpenVinoText", *model, python=python) as host,
    ):
        calls = {
            "our_text": partial(_lengths, free, Kind().rows(prompts, bundle.manifest), FREE_TOKENS),
            "their_text": partial(host.call, "text", prompts, [FREE_TOKENS] * len(prompts)),
            "our_pattern": partial(_lengths, guided, kind.rows(prompts, bundle.manifest), kind.tokens),
            "their_pattern": partial(host.call, "matching", prompts, PATTERN, MOST_TOKENS),
        }
        tokens = {name: call() for name, call in calls.items()}
        if tokens["our_text"] != tokens["their_text"]:
            raise JobError("OpenVINO GenAI does not answer with as many tokens as it is asked for")
        # Free text of as many tokens as its answers of the pattern, to see what its masks cost.
        calls["their_text_as_long"] = partial(host.call, "text", prompts, tokens["their_pattern"])
        took = [{name: seconds(call) for name, call in calls.items()} for _ in range(PEER_ROUNDS)]

    def over(one: str, other: str) -> float:
        return statistics.median(each[one] / each[other] for each in took)

    figures = {
        "tokens": {name: statistics.mean(each) for name, each in tokens.items()},
        "rows_per_second": {name: len(prompts) / statistics.median(each[name] for each in took) for name in tokens},
        "their_pattern_over_text": over("their_text_as_long", "their_pattern"),
        "seconds": took,
    }
    ratios = {
        "openvino_text": over("their_text", "our_text"),
        "openvino_guided": over("their_pattern", "our_pattern"),
    }
    return figures, ratios


def _lengths(answerer: Answerer, rows: Sequence[EncodedRow], most: int) -> list[int]:
    """Answer rows; tokens of each answer.

    Raises:
        JobError: a row fails.
    """
    answers = answerer.answer(rows, most)
    for answer in answers:
        if answer.failure:
            raise JobError(f"a row fails: {answer.failure.message}")
    return [answer.answer_tokens or 0 for answer in answers]


def steps(bundle: Bundle, prompts: Sequence[str], slots: int) -> dict[str, float]:
    """Median milliseconds of decode steps of as many rows as there are slots, of one graph after the other in turns,
    and mean microseconds of a row's mask and of following its token.

    The graph for guided answers is timed with and without log-probabilities.
    """
    layout, threads = RowLayout(bundle), usable_cpus()
    asked = list(itertools.islice(itertools.cycle(prompts), slots))
    rows = [PrefillRow(layout.row(single_turn(prompt, 0), []).input_ids) for prompt in asked]
    grammars = grammars_of(bundle, layout, threads)
    grammar = grammars.compile(constraint_of("json_schema", SCHEMA))
    open_decoder = partial(Decoder, bundle, slots, threads, prove=False)
    decoders = {
        "free": open_decoder(),
        "guided": open_decoder(guided=True),
        "logprobs": open_decoder(guided=True, logprobs=True),
    }
    took: dict[str, list[float]] = {name: [] for name in (*decoders, "masks", "accept")}
    guidance = decoders["guided"].guidance
    assert guidance is not None
    masks = guidance.allowed
    masks[...] = grammar.first_mask
    tokens = {name: decoder.prefill(0, rows) for name, decoder in decoders.items()}
    guides = {slot: grammar.guide() for slot in range(slots)}
    for _ in range(STEPS):
        _timed(took, "accept", partial(_accept, guides, tokens["guided"]))
        masks[...] = ALL
        _timed(took, "masks", partial(grammars.fill, [(guide, slot) for slot, guide in guides.items()], masks))
        for name, decoder in decoders.items():
            tokens[name] = _timed(took, name, partial(decoder.step, tokens[name]))
    per_row = 1e6 / (STEPS * slots)
    return {
        "rows": slots,
        **{f"{name}_ms": 1e3 * statistics.median(took[name]) for name in decoders},
        "mask_us": per_row * sum(took["masks"]),
        "accept_us": per_row * sum(took["accept"]),
    }


def _accept(guides: dict[int, Guide], tokens: Tokens) -> None:
    """Append the tokens to the answers, and forget those that are complete."""
    for slot, guide in list(guides.items()):
        guide.accept(int(tokens[slot]))
        if guide.is_complete:
            del guides[slot]


def _timed(took: dict[str, list[float]], name: str, work: Callable[[], T]) -> T:
    """Run `work`, and note its seconds."""
    began = time.perf_counter()
    result = work()
    took[name].append(time.perf_counter() - began)
    return result
