"""The forecast of one trial: everything that the whole job will need, as values for JSON.

What enters: a trial, and how its sample was drawn. What leaves: a `Outlook`, whose record is an entry of `_plan.json`.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from qvl_batch.columns import FILE, ROW
from qvl_batch.forecast.differences import Differences
from qvl_batch.forecast.draw import Sample
from qvl_batch.forecast.intervals import Design, Estimate
from qvl_batch.forecast.rows import SampledRow, sampled_rows
from qvl_batch.forecast.size import output_bytes
from qvl_batch.forecast.speed import Speed, speed_of
from qvl_batch.forecast.trial import Trial
from qvl_batch.report.summary import HOUR
from qvl_batch.report.utilization import advice

#: So many machines like those of the trial are looked at.
NODES = (1, 2, 4, 8, 16)
TOKENS = ("prompt_tokens", "answer_tokens", "image_tokens")


@dataclass(frozen=True, slots=True)
class Outlook:
    """The forecast of a trial.

    Args:
        name: what differs from the other trials.
        trial: the answers to the sample.
        answers: all of them, with the columns of the output, in the order of the input.
        rows: of the sample, in the order of the design.
        design: how the sample was drawn.
        speed: time of the job.
        price: of the machines per hour.
    """

    name: str
    trial: Trial
    answers: pa.Table
    rows: Sequence[SampledRow]
    design: Design
    speed: Speed
    price: float | None

    @classmethod
    def of(cls, name: str, trial: Trial, sample: Sample, startup_seconds: float) -> "Outlook":
        """The forecast of a trial of a sample."""
        job = trial.job
        schema = job.folder().schema
        found = sampled_rows(trial.tables, schema, job.bundle.manifest.layout.resolution.unit)
        rows = [found[place] for place in sample.places]
        tables = pa.concat_tables(trial.tables).sort_by([(FILE, "ascending"), (ROW, "ascending")])
        answers = tables.select(schema.names).cast(schema)
        speed = speed_of(trial, rows, sample.design, startup_seconds)
        return cls(name, trial, answers, rows, sample.design, speed, job.config.price_per_hour)

    def share(self, reason: str) -> Estimate:
        """Share of the rows with a finish reason."""
        return self.design.share([row.finish_reason == reason for row in self.rows])

    def seconds(self, nodes: int = 1) -> Estimate:
        """Seconds of the job on so many times the machines of the trial."""
        return self.speed.on(nodes)

    def cost(self, nodes: int = 1) -> Estimate | None:
        """Cost of the job there; None without a price."""
        return None if self.price is None else self.seconds(nodes).scaled(nodes * self.price / HOUR)

    def tokens(self, name: str) -> list[int]:
        """Tokens of each row of the sample."""
        return [getattr(row, name) for row in self.rows]

    @property
    def size(self) -> Estimate:
        """Bytes of the answers."""
        return output_bytes(self.answers, [row.nbytes for row in self.rows], self.design, self.speed.left)

    @property
    def bottleneck(self) -> str | None:
        """The stage that was busy for the largest share of its time; None if none was busy."""
        busy = {name: stage.busy for name, stage in self.trial.stages.items()}
        return max(busy, key=busy.__getitem__) if any(busy.values()) else None

    def record(self) -> dict[str, Any]:
        """The entry in `_plan.json`."""
        job, design, rows = self.trial.job, self.design, self.rows
        busy = {name: stage.busy for name, stage in self.trial.stages.items()}
        by_kind: dict[str, list[bool]] = {
            kind: [row.error == kind for row in rows] for kind in sorted({row.error for row in rows if row.error})
        }
        reasons = {reason: [row.finish_reason == reason for row in rows] for reason in self._reasons()}
        return {
            "name": self.name,
            "bundle": {
                "path": job.bundle.address or str(job.bundle.path),
                "sha256": job.bundle.sha256,
                "source": asdict(job.bundle.manifest.source),
                "dtype": job.bundle.manifest.dtype,
            },
            "max_pixels": job.view.resolution.max_pixels if job.view.resolution.is_native else None,
            "hours": self.seconds().scaled(1 / HOUR).record(),
            "cost": None if (cost := self.cost()) is None else cost.record(),
            "rows_per_second": self.speed.rows_per_second.record(),
            "no_interval": self.speed.why_no_interval,
            "once_seconds": round(self.speed.once, 3),
            "nodes": [self._on(nodes) for nodes in NODES],
            "finish_reasons": {reason: _counted(design, flags) for reason, flags in reasons.items()},
            "errors": {kind: _counted(design, flags) for kind, flags in by_kind.items()},
            "tokens": {
                name: {"mean": design.mean(values).record(), "total": design.total(values).record()}
                for name in TOKENS
                for values in [self.tokens(name)]
            },
            "output_bytes": self.size.record(),
            "memory_bytes": dict(self.trial.memory),
            "stages": {name: stage.record(len(rows)) for name, stage in self.trial.stages.items()},
            "bottleneck": self.bottleneck,
            "advice": advice(busy),
            "error_examples": dict(self.trial.examples),
            "sample_seconds": round(self.trial.seconds, 3),
            "workers_seconds": round(self.trial.workers_seconds, 3),
            "plan": asdict(self.trial.plan),
        }

    def _reasons(self) -> list[str]:
        """Finish reasons that are told: those that the sample has, and those that a user looks for."""
        found = {row.finish_reason for row in self.rows} | {"length", "error"}
        return sorted(found | ({"abstain"} if self.trial.job.config.abstain_below is not None else set()))

    def _on(self, nodes: int) -> dict[str, Any]:
        cost = self.cost(nodes)
        return {
            "nodes": nodes,
            "hours": self.seconds(nodes).scaled(1 / HOUR).record(),
            "cost": None if cost is None else cost.record(),
        }


def compared(first: Outlook, other: Outlook) -> dict[str, Any]:
    """How the answers of another trial differ from those of the first: an entry of `_plan.json`."""
    found = Differences.of(first.rows, other.rows, first.design)
    return {"equal": found.equal.record(), "edit_similarity": found.similarity.record()}


def _counted(design: Design, flags: Sequence[bool]) -> dict[str, Any]:
    share = design.share(flags)
    return {
        "sampled": sum(flags),
        "share": share.record(),
        "rows": share.scaled(design.population).record(),
    }
