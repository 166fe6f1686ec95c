"""The result of a run: the summary that is printed at its end, and the record `_run.json`.

What enters: counts, times, utilization of stages, settings. What leaves: text for a terminal, and values for JSON.
"""

import importlib.metadata
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from typing import Any

from qvl_batch.bundle.loading import Bundle
from qvl_batch.config import CaptionConfig
from qvl_batch.images.view import View
from qvl_batch.output.parts import Tally
from qvl_batch.output.unreadable import UNREADABLE, Unreadable
from qvl_batch.report.confidence import probability
from qvl_batch.report.utilization import Utilization, advice

MILLION, HOUR = 1_000_000, 3600
#: Answered rows, and seconds since workers have started, from which on the rate is extrapolated to a million images: a
#: pipeline fills and drains in the time of about twenty rows, and rows arrive in tables, seconds apart.
ENOUGH_ROWS, ENOUGH_SECONDS = 100, 10.0


@dataclass(frozen=True, slots=True)
class Report:
    """A finished run.

    Args:
        output: folder of the answers.
        before: counts of the answers of earlier runs.
        tally: counts of the answers of this run.
        seconds: from the start of the pipeline to the last answer written.
        startup_seconds: before that, mostly to start Ray.
        workers_seconds: the part of `seconds` before the first image entered the vision graph, mostly to start workers.
        price_per_hour: of the machines, in any currency.
        stages: utilization of each.
        sample: rows to show on the page.
        least_sure: the same of those that the model was least sure of.
        unreadable: the rows that could not be read.
        details: further entries of the record about this run.
        settings: entries of the record about the job.
    """

    output: str
    before: Tally
    tally: Tally = field(default_factory=Tally)
    seconds: float = 0.0
    startup_seconds: float = 0.0
    workers_seconds: float = 0.0
    price_per_hour: float | None = None
    stages: Mapping[str, Utilization] = field(default_factory=dict)
    sample: Sequence[dict[str, Any]] = ()
    least_sure: Sequence[dict[str, Any]] = ()
    unreadable: Unreadable = field(default_factory=Unreadable)
    details: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def total(self) -> Tally:
        """Counts of all answers."""
        return self.before + self.tally

    @property
    def images_per_second(self) -> float:
        """Rows, answered or failed, over `seconds`."""
        return self.tally.rows / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens of answers over `seconds`."""
        return self.tally.answer_tokens / self.seconds if self.seconds else 0.0

    @property
    def steady_seconds(self) -> float:
        """Seconds since the first image entered the vision graph, that is without start-up."""
        return max(self.seconds - self.workers_seconds, 0.0)

    @property
    def steady_images_per_second(self) -> float:
        """Rows, answered or failed, over `steady_seconds`."""
        return self.tally.rows / self.steady_seconds if self.steady_seconds else 0.0

    @property
    def hours_per_million(self) -> float | None:
        """Hours that a million images take at the steady rate, None if the run is too short to tell."""
        answered = self.tally.rows - self.tally.finish_reasons["error"]
        if answered < ENOUGH_ROWS or self.steady_seconds < ENOUGH_SECONDS:
            return None
        return MILLION / self.steady_images_per_second / HOUR

    @property
    def cost_per_million(self) -> float | None:
        """Cost of a million images, None without a price or if the run is too short to tell."""
        hours, price = self.hours_per_million, self.price_per_hour
        return None if hours is None or price is None else hours * price

    @property
    def busy(self) -> dict[str, float]:
        """For each stage, the share of its time that it was busy."""
        return {name: stage.busy for name, stage in self.stages.items()}

    def record(self) -> dict[str, Any]:
        """Contents of `_run.json`. Counts cover all answers, times and speeds this run."""
        total = self.total
        return {
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "rows": total.rows,
            "finish_reasons": dict(total.finish_reasons),
            "errors": dict(total.errors),
            "unreadable": self.unreadable.record(),
            "prompt_tokens": total.prompt_tokens,
            "answer_tokens": total.answer_tokens,
            "rows_of_this_run": self.tally.rows,
            "seconds": round(self.seconds, 3),
            "startup_seconds": round(self.startup_seconds, 3),
            "workers_seconds": round(self.workers_seconds, 3),
            "images_per_second": round(self.images_per_second, 3),
            "steady_images_per_second": round(self.steady_images_per_second, 3),
            "tokens_per_second": round(self.tokens_per_second, 3),
            "hours_per_million": _rounded(self.hours_per_million),
            "price_per_hour": self.price_per_hour,
            "cost_per_million": _rounded(self.cost_per_million),
            "stages": {name: stage.record(self.tally.rows) for name, stage in self.stages.items()},
            "advice": advice(self.busy),
            **self.details,
            "output": self.output,
            **self.settings,
        }

    def __str__(self) -> str:
        total = self.total
        failed, unread = total.finish_reasons["error"], self.unreadable.rows
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in sorted(total.finish_reasons.items()))
        lines = [
            f"rows      {total.rows:,}" + (f" ({reasons})" if reasons else ""),
            *([f"          {self.before.rows:,} of them by earlier runs"] if self.before.rows else []),
            f"errors    {failed:,}",
            *(f"          {count:,} {kind}" for kind, count in total.errors.most_common()),
            *([f"          {unread:,} could not be read: {self.output}/{UNREADABLE}"] if unread else []),
        ]
        if (hosts := self.details.get("hosts")) is not None and hosts["most_failures"]:
            most, count = hosts["most_failures"][0], hosts["failing"]
            of = f"{most['failures']:,} of its {most['rows']:,} rows: {most['reason']}"
            lines += [f"hosts     {count:,} of {hosts['hosts']:,} with failed images, most of {most['host']}, {of}"]
        if (unreadable := self.details.get("unreadable_boxes")) is not None:
            answered = self.tally.rows - self.tally.finish_reasons["error"]
            lines += [f"boxes     {unreadable:,} of {answered:,} answers of this run are not readable as boxes"]
        if (sure := self.details.get("confidence")) is not None:
            few, median = probability(sure["quantiles"]["0.05"]), probability(sure["quantiles"]["0.5"])
            lines += [f"sure      median confidence {median}, 5 % of the answers of this run below {few}"]
        return "\n".join([*lines, *(self._speeds() if self.tally.rows else []), f"answers   {self.output}"])

    def _speeds(self) -> list[str]:
        """Lines about the speed of this run."""
        lines = [
            f"speed     {self.images_per_second:.2f} images/s, {self.tokens_per_second:.1f} tokens/s",
            f"time      {self.seconds:.1f} s, {self.workers_seconds:.1f} s of it to start workers",
            f"          {self.startup_seconds:.1f} s before it to start Ray",
        ]
        if self.stages:
            lines += ["busy      " + ", ".join(f"{name} {share:.0%}" for name, share in self.busy.items())]
        if (hours := self.hours_per_million) is not None:
            cost = self.cost_per_million
            price = "" if cost is None else f", {cost:,.2f} at {self.price_per_hour:,.2f} an hour"
            lines += [f"million   {hours:,.1f} hours{price}"]
        return lines


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def recorded_settings(
    config: CaptionConfig, files: int, bundle: Bundle, view: View, devices: Mapping[str, str]
) -> dict[str, Any]:
    """The settings that `_run.json` records: those that answers or speed depend on."""
    packages = ("qvl-batch", "ray", "onnxruntime-gpu", "onnxruntime", "tokenizers", "pyarrow", "pillow", "pillow-heif")
    return {
        "bundle": {
            "path": bundle.address or str(bundle.path),
            "sha256": bundle.sha256,
            "source": asdict(bundle.manifest.source),
            "dtype": bundle.manifest.dtype,
            "vision_dtype": bundle.manifest.vision_dtype,
            "layers_dtype": bundle.manifest.layers_dtype,
        },
        "decoding": {
            "method": "sampling" if config.sampling.is_random or config.sampling_column else "greedy",
            **(asdict(config.sampling) if config.sampling.is_random else {}),
            "stop": list(config.stop) or None,
            "min_new_tokens": config.min_new_tokens,
            "repetition_penalty": bundle.manifest.generation.repetition_penalty,
            "eos_token_ids": bundle.manifest.generation.eos_token_ids,
            "max_new_tokens": config.max_new_tokens,
            "allow_repetition": config.allow_repetition,
            "abstain_below": config.abstain_below,
            "system_prompt": config.system_prompt,
            "prompt": config.prompt,
        },
        "fit": view.fit or "native",
        "resolution": asdict(view.resolution),
        "images": asdict(config.image_rules),
        "files": files,
        "limit": config.limit,
        "devices": dict(devices),
        "versions": installed_versions(packages),
    }


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed."""
    versions: dict[str, str] = {}
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
