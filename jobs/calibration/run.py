"""The calibration from its settings to its report."""

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibration.config import CalibrateConfig
from calibration.measures import histogram, reliability, risk, share
from calibration.page import render
from calibration.reading import UNKNOWN, Columns, Rows, details, read_rows
from calibration.threshold import Threshold, least_rows, threshold_of
from qvl_batch.errors import OutputError
from qvl_batch.output.parts import cannot_write
from qvl_batch.output.resume import Job
from qvl_batch.output.storage import Folder, folder_at

RESULT, PAGE = "calibration.json", "calibration.html"
Places = NDArray[np.intp]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished calibration: its record, and where its page is."""

    record: dict[str, Any]
    page: str

    @property
    def holds(self) -> bool:
        """Whether a threshold reaches the target."""
        return self.record["threshold"]["confidence"] is not None

    def __str__(self) -> str:
        record, threshold = self.record, self.record["threshold"]
        accuracy, error = record["accuracy"], record["reliability"]
        low, high = accuracy["interval"]
        cut = f", {record['cut']:,} cut off" if record["cut"] else ""
        lines = {
            "rows": f"{record['rows']:,}, {record['failed']:,} failed{cut}; {record['labelled']:,} have a right answer",
            "right": f"{accuracy['count']:,} of {accuracy['of']:,} answers compared "
            f"({accuracy['share']:.1%}, 95 %: {low:.1%} to {high:.1%})",
            "sure": f"{record['mean_confidence']:.1%} on average; calibration error {error['error']:.3f}, "
            f"of which up to {error['error_by_chance']:.3f} can be chance",
            "threshold": f"none: {threshold['reason']}",
        }
        if self.holds:
            kept, of_all = threshold["of_labelled"], threshold["of_all"]
            lines["threshold"] = (
                f"{threshold['confidence']!r}: from it on, at least {record['target_precision']:.4g} of answers are "
                f"right, with certainty {record['certainty']:.4g}; {threshold['right']:,} of {kept['count']:,} were"
            )
            lines["covers"] = (
                f"{kept['count']:,} of {kept['of']:,} labelled rows ({kept['share']:.1%}), "
                f"{of_all['count']:,} of all {of_all['of']:,} ({of_all['share']:.1%})"
            )
        lines["report"] = self.page
        return "\n".join(f"{name:<10}{text}" for name, text in lines.items())


def calibrate(config: CalibrateConfig) -> Outcome:
    """Read the answers, find the threshold, and write `calibration.json` and the page.

    Raises:
        JobError: answers, output or settings make the calibration impossible.
    """
    answers, output = folder_at(config.answers), folder_at(config.folder)
    _check_output(output, overwrite=config.overwrite)
    columns = Columns(config.expected_column, tuple(config.field.split(".")) if config.field else ())
    rows = read_rows(answers, columns)
    record = _record(config, rows)
    threshold = record["threshold"]["confidence"]
    record["next"] = {
        name: details(answers, columns, rows, places.tolist())
        for name, places in next_places(rows, threshold, config.next_rows).items()
    }
    files = {RESULT: json.dumps(record, indent=1, allow_nan=False) + "\n", PAGE: render(record)}
    try:
        with output.held():
            for name, text in files.items():
                output.write(name, text.encode())
    except OSError as error:
        raise cannot_write(output, error) from error
    return Outcome(record, f"{output}/{PAGE}")


def _check_output(output: Folder, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else.

    Raises:
        OutputError: it holds the answers of a job, or a calibration that is not to be replaced, or is no folder.
    """
    if Job.of(output):
        raise OutputError(f"{output} holds the answers of a job: give another --output")
    try:
        if not overwrite and any(output.names(name) for name in (RESULT, PAGE)):
            raise OutputError(f"{output} holds a calibration already: give another --output, or --overwrite")
    except OSError as error:
        raise cannot_write(output, error) from error


def _record(config: CalibrateConfig, rows: Rows) -> dict[str, Any]:
    """All figures, for JSON."""
    confidence, right = rows.confidence[rows.is_compared], rows.state[rows.is_compared] == 1
    threshold = threshold_of(confidence, right, config.target_precision, config.certainty)
    found = reliability(confidence, right, config.bins)
    lowest = float(np.floor(10 * min(confidence.min(), 0.9)) / 10)
    return {
        "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "answers": config.answers,
        "field": config.field,
        "expected_column": config.expected_column,
        "target_precision": config.target_precision,
        "certainty": config.certainty,
        "rows": len(rows.state),
        "failed": rows.failed,
        "cut": rows.cut,
        "answered": int(rows.is_answered.sum()),
        "labelled": rows.labelled,
        "labelled_failed": rows.labelled_failed,
        "accuracy": share(int(right.sum()), len(right)),
        "mean_confidence": float(confidence.mean()),
        "threshold": _covered(threshold, rows, least_rows(config.target_precision, config.certainty)),
        "reliability": found,
        "risk": risk(confidence, right),
        "histogram": histogram(confidence, right, lowest),
    }


def _covered(threshold: Threshold, rows: Rows, least: int) -> dict[str, Any]:
    """The threshold, and how many rows it covers, of those with a right answer and of all. Rows that failed or were cut
    off are rows too: nothing covers them.
    """
    covered = rows.confidence >= (np.inf if threshold.confidence is None else threshold.confidence)
    labelled = int((covered & (rows.state != UNKNOWN)).sum())
    return {
        **asdict(threshold),
        "least_labelled": least,
        "of_labelled": share(labelled, rows.labelled),
        "of_all": share(int(covered.sum()), len(rows.state)),
    }


def next_places(rows: Rows, threshold: float | None, count: int) -> dict[str, Places]:
    """Places of rows without a right answer that people should look at next: `count` just below the threshold, the
    nearest first, and `count` of the others that the model is least sure of.
    """
    places = np.flatnonzero(rows.is_answered & (rows.state == UNKNOWN))
    ranked = places[np.argsort(rows.confidence[places], kind="stable")]
    below = int(np.searchsorted(rows.confidence[ranked], threshold)) if threshold is not None else 0
    nearest = ranked[max(0, below - count) : below][::-1]
    return {"below_threshold": nearest, "least_sure": ranked[~np.isin(ranked, nearest)][:count]}
