"""The comparison from its settings to its report."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from export.comparison.bundle_side import BundleSide, Graphs
from export.comparison.config import CompareConfig
from export.comparison.layers import Drift, depth_names
from export.comparison.measures import Measures
from export.comparison.page import render
from export.comparison.plain_graphs import graph_sha256
from export.comparison.questions import Question, Questions, open_questions
from export.comparison.records import PAGE, Records, record
from export.comparison.summary import STAGES, Bounds, difference, summarize
from export.comparison.traces import INPUT_STAGES, Side, Trace
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import CheckpointSource
from qvl_batch.errors import ConfigError, JobError
from qvl_batch.input.input_columns import BY_PLACE
from qvl_batch.report.progress import ProgressLine, progress_line
from qvl_batch.report.summary import installed_versions
from qvl_batch.schema import Failure

#: Most questions in one chunk, and most bytes of its logits on both sides together.
CHUNK, LOGITS_BYTES = 32, 1 << 30
#: Rows that a decoder without a KV cache is asked by default.
PLAIN_ROWS = 64
PACKAGES = ("qvl-batch", "onnxruntime-gpu", "onnxruntime", "torch", "transformers")


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished comparison: its summary, and where its page is."""

    summary: dict[str, Any]
    page: Path

    @property
    def passed(self) -> bool:
        """Whether everything was within its bounds."""
        return bool(self.summary["verdict"]["passed"])

    def __str__(self) -> str:
        summary, agreement = self.summary, self.summary["agreement"]
        low, high = agreement["interval"]
        fits = len(summary["settings"]["fit"])
        what = "questions" if fits > 1 else "rows"
        lines = {
            what: f"{summary['rows']:,}, {summary['compared']:,} compared",
            "equal": f"{agreement['count']:,} of {agreement['of']:,} answers, token for token "
            f"({agreement['share']:.1%}, 95 %: {low:.1%} to {high:.1%})",
            "differ": f"{agreement['ties']:,} tied within noise, {agreement['real_differences']:,} really, "
            f"{agreement['failed']:,} failed",
            "drift": ", ".join(f"{stage} {_figure(summary['drift'][stage]['max'])}" for stage in STAGES),
        }
        if apart := summary["rows"] - summary["compared"]:
            lines["apart"] = f"{apart:,} of {summary['rows']:,} {what} could not be compared"
        if fits > 1:
            lines["fits"] = f"{fits} of each row; the intervals hold for one fit alone"
        if expected := summary["expected"]:
            shares = (expected[side]["share"] for side in ("reference", "bundle"))
            lines["expected"] = "given in {:.1%} of rows by the reference, in {:.1%} by the bundle".format(*shares)
        if layers := summary["layers"]:
            lines["layers"] = (
                f"drift begins at {layers['begins_at'] or 'no layer'}, "
                f"largest error of its own: {layers['largest_own_error'] or 'none'}"
            )
        lines["report"] = str(self.page)
        return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def compare(config: CompareConfig, say: Callable[[str], None] = lambda _: None) -> Outcome:
    """Start or resume a comparison, and write the report.

    Args:
        config: what to compare.
        say: receives lines about the comparison when it starts.

    Raises:
        JobError: input, output, bundle, checkpoint or settings make the comparison impossible.
    """
    if config.decoder_graph and config.limit is None:
        config = replace(config, limit=PLAIN_ROWS)
    sides = _Sides(config, Bundle.load(config.bundle))
    questions = open_questions(config, sides.bundle.manifest.layout.resolution, say)
    settings = _settings(config, sides, questions)
    id_type = questions.source.columns.id_type
    if config.graphs:
        sides.load_candidate()  # a graph that cannot be used leaves no trace in the output
    records = Records.open(config.folder, id_type, settings, overwrite=config.overwrite)
    _say_what(say, config, sides, questions)
    failures = records.failures()
    left = questions.without(row for row, failed in failures.items() if not (failed and config.retry_errors))
    if failures:
        _say_resuming(say, len(questions) - len(left), sum(failures.values()), again=config.retry_errors)
    with progress_line(len(left)) as progress:
        _answer(left, sides, records, _rows_per_chunk(config, sides.bundle), progress)
    return _report(config, sides, records, settings)


def _answer(
    questions: Questions, sides: "_Sides", records: Records, rows_per_chunk: int, progress: ProgressLine
) -> None:
    """Answer the questions, a chunk at a time."""
    done, failed, started = 0, 0, time.monotonic()
    for chunk in questions.chunks(rows_per_chunk):
        rows = _rows(chunk, sides)
        records.add(rows)
        done += len(rows)
        failed += sum(row["error_side"] is not None for row in rows)
        progress.show(done, failed, time.monotonic() - started)


def _rows(chunk: Sequence[Question], sides: "_Sides") -> list[dict[str, Any]]:
    """Answer a chunk on both sides and measure it; rows of `comparison.parquet`."""
    candidates = _answers(sides.candidate, chunk, [question.failure is None for question in chunk])
    asked = [
        isinstance(answer, Trace) or (isinstance(answer, Failure) and answer.stage not in INPUT_STAGES)
        for answer in candidates
    ]
    references = _answers(sides.reference, chunk, asked)
    return [_row(*row, sides) for row in zip(chunk, references, candidates, strict=True)]


def _answers(side: Side, chunk: Sequence[Question], asked: Sequence[bool]) -> list[Trace | Failure | None]:
    """Answers of one side; None for questions that it is not asked."""
    answers = iter(side.answer([question for question, ask in zip(chunk, asked, strict=True) if ask]))
    return [next(answers) if ask else None for ask in asked]


def _row(
    question: Question, reference: Trace | Failure | None, candidate: Trace | Failure | None, sides: "_Sides"
) -> dict[str, Any]:
    measures: Measures | None = None
    drift: Drift | None = None
    texts: tuple[str | None, str | None] = (None, None)
    if isinstance(reference, Trace) and isinstance(candidate, Trace):
        penalty = sides.bundle.manifest.generation.repetition_penalty
        measures = Measures.of(reference, candidate, penalty)
        token_text = sides.candidate.layout.token_text
        tokens = (measures.reference_token, measures.answer_token)
        texts = (token_text(tokens[0]), token_text(tokens[1]))
        if sides.config.layers and question.images:
            states = sides.reference.states(question)
            drift = sides.candidate.probe.drift(sides.candidate.shown(question), states)
    return record(question, reference, candidate, measures, drift, texts)


class _Sides:
    """The two sides; each is loaded when it is first used."""

    def __init__(self, config: CompareConfig, bundle: Bundle) -> None:
        self.config, self.bundle = config, bundle
        self.other = Bundle.load(config.against_bundle) if config.against_bundle else None
        if self.other:
            _check_comparable(bundle, self.other)

    @cached_property
    def candidate(self) -> BundleSide:
        """The bundle to compare."""
        return self._side_of(self.bundle, Graphs(self.config.decoder_graph, self.config.vision_graph))

    def load_candidate(self) -> None:
        """Load the bundle to compare now.

        Raises:
            ConfigError: a graph cannot take the place of the bundle's.
        """
        _ = self.candidate

    @cached_property
    def reference(self) -> Side:
        """PyTorch, or the other bundle."""
        config = self.config
        if self.other:
            return self._side_of(self.other)
        assert config.checkpoint is not None
        from export.checkpoint import load_checkpoint  # noqa: PLC0415
        from export.comparison.reference import PyTorch  # noqa: PLC0415  (two bundles are compared without torch)

        return PyTorch(
            load_checkpoint(
                config.checkpoint, config.revision, config.adapter, ignore_extra=config.ignore_extra_weights
            ),
            system_prompt=config.system_prompt,
            max_new_tokens=config.max_new_tokens,
            max_seq_len=self.max_seq_len,
            native=self.bundle.manifest.layout.resolution.is_native,
            device=config.device,
        )

    def _side_of(self, bundle: Bundle, graphs: Graphs = Graphs()) -> BundleSide:  # noqa: B008  (cannot be changed)
        config = self.config
        return BundleSide(
            bundle,
            config.max_new_tokens,
            self.max_seq_len,
            layers=config.layers,
            system_prompt=config.system_prompt,
            device=config.device,
            graphs=graphs,
        )

    @cached_property
    def reference_source(self) -> CheckpointSource:
        """Name and hash of the other side."""
        if self.other:
            return CheckpointSource(self.other.path.name, self.other.sha256)
        config = self.config
        assert config.checkpoint is not None
        from export.checkpoint import checkpoint_source  # noqa: PLC0415

        return checkpoint_source(config.checkpoint, config.revision, config.adapter)

    @property
    def max_seq_len(self) -> int:
        """Longest row in tokens that both sides take."""
        lengths = [bundle.manifest.layout.max_seq_len for bundle in (self.bundle, self.other) if bundle]
        return min(lengths)


def _check_comparable(bundle: Bundle, other: Bundle) -> None:
    """Refuse bundles whose outputs cannot be compared number by number."""
    a, b = bundle.manifest, other.manifest
    for what, ours, theirs in (
        ("sizes of images", a.layout.resolution, b.layout.resolution),
        ("decoder shape", a.decoder, b.decoder),
        ("generation settings", a.generation, b.generation),
    ):
        if ours != theirs:
            raise ConfigError(f"{bundle.path} and {other.path} differ in {what} ({ours}, {theirs}): not comparable")


def _report(config: CompareConfig, sides: _Sides, records: Records, settings: dict[str, Any]) -> Outcome:
    bounds = Bounds(config.min_agreement, config.max_drift, config.tie_margin)
    rows = records.read()
    for row in rows:
        row["difference"] = difference(row, bounds.tie_margin)
    if all(row["difference"] == "not compared" for row in rows):
        raise JobError(f"none of {len(rows):,} rows could be compared: {_first_error(rows)}")
    summary = {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "bundle": {
            "path": ", ".join([str(config.bundle), *map(str, config.graphs.values())]),
            **asdict(sides.bundle.manifest.source),
        },
        "reference": {
            "kind": "bundle" if sides.other else "checkpoint",
            "path": str(config.against_bundle or config.checkpoint),
            **asdict(sides.reference_source),
        },
        "bounds": asdict(bounds),
        "settings": settings,
        **summarize(rows, _depths(rows, sides.bundle), bounds),
    }
    records.publish(rows, summary, render(rows, summary, config.gallery))
    return Outcome(summary, config.folder / PAGE)


def _depths(rows: Sequence[dict[str, Any]], bundle: Bundle) -> list[str]:
    count = next((len(row["layer_error"]) for row in rows if row["layer_error"]), 0)
    return depth_names(count, bundle.manifest.decoder.layers) if count else []


def _first_error(rows: Sequence[dict[str, Any]]) -> str:
    return f"{rows[0]['id']}: {rows[0]['error_type']}: {rows[0]['error_message']}" if rows else "the input is empty"


def _settings(config: CompareConfig, sides: _Sides, questions: Questions) -> dict[str, Any]:
    """Everything that the results depend on; a resumed comparison must have the same."""
    files = questions.source.files
    return {
        "bundle": sides.bundle.sha256,
        "graphs": {name: graph_sha256(f"--{name}-graph", path) for name, path in config.graphs.items()},
        "reference": sides.reference_source.sha256,
        "input files": [[file.path, file.fingerprint] for file in files],
        "limit": config.limit,
        "prompt": config.prompt,
        "allow_images_from": sorted(config.allow_images_from),
        "columns": [
            config.id_column,
            config.image_column,
            config.prompt_column,
            config.messages_column,
            questions.expected,
        ],
        "system_prompt": config.system_prompt,
        "answer_last_turn_again": config.answer_last_turn_again,
        "max_pixels": config.max_pixels,
        "fit": [view.fit or "native" for view in questions.views],
        "max_new_tokens": config.max_new_tokens,
        "layers": config.layers,
        "versions": installed_versions(PACKAGES),
    }


def _rows_per_chunk(config: CompareConfig, bundle: Bundle) -> int:
    logits = 2 * config.max_new_tokens * bundle.manifest.decoder.vocab_size * 4
    return max(1, min(CHUNK, LOGITS_BYTES // logits) // max(1, len(config.fit)))


def _say_what(say: Callable[[str], None], config: CompareConfig, sides: _Sides, questions: Questions) -> None:
    manifest, other = sides.bundle.manifest, sides.reference_source
    say(f"bundle    {config.bundle}, {manifest.source.name}, {manifest.towers}")
    for name, path in config.graphs.items():
        say(f"{name:<10}{path}, in place of the bundle's")
    adapter = f" + {config.adapter}" if config.adapter else ""
    kind = "a bundle" if sides.other else "PyTorch, fp32"
    say(f"against   {config.against_bundle or config.checkpoint}{adapter}, {kind}")
    if not sides.other and other.sha256 != manifest.source.sha256:
        say("note      the bundle's manifest says it was exported from another checkpoint")
    say(f"questions {len(questions):,} from {len(questions.source.files):,} files")
    if questions.source.columns.id is None:
        say(f"note      {BY_PLACE}")


def _say_resuming(say: Callable[[str], None], done: int, failed: int, *, again: bool) -> None:
    what = f"{done:,} are compared already"
    if failed:
        what += (
            f"; {failed:,} that failed are asked again" if again else f"; {failed:,} of them failed (--retry-errors)"
        )
    say(f"resuming  {what}")


def _figure(value: float | str | None) -> str:
    return f"{value:.1e}" if isinstance(value, float) else value or "none"
