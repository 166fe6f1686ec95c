"""What the checkpoint does with a user's rows: its fp32 graphs' answers, and hidden states of some rows.

Arrays are on disk, so that a sample of any size takes little memory.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from export.comparison.bundle_side import BundleSide
from export.comparison.config import MAX_NEW_TOKENS
from export.comparison.traces import States, Trace
from export.disk import Disk
from export.sample import SampleRow
from qvl_batch.bundle.loading import Bundle
from qvl_batch.errors import ExportError
from qvl_batch.schema import Failure

#: Rows that are answered at a time.
ROWS_AT_ONCE = 16
#: Rows whose hidden states are compared. Errors are means over a row's tokens, so a few rows tell layers apart.
PROBED_ROWS = 8


@dataclass(frozen=True, slots=True)
class Reference:
    """The fp32 graphs' results.

    Args:
        rows: of the sample that they could answer.
        traces: answers to these rows.
        states: hidden states of the first rows with an image.
        penalty: the repetition penalty.
    """

    rows: list[SampleRow]
    traces: list[Trace]
    states: list[tuple[SampleRow, States]]
    penalty: float

    @classmethod
    def of(cls, bundle: Bundle, rows: Sequence[SampleRow], disk: Disk) -> "Reference":
        """Answer rows with a bundle in fp32.

        Raises:
            ExportError: it could answer none of them.
        """
        side = side_of(bundle, layers=True)
        answers = [_trace_on(disk, each) for each in answered(side, rows)]
        failed = next((each for each in answers if isinstance(each, Failure)), None)
        if failed and all(isinstance(each, Failure) for each in answers):
            raise ExportError(f"--sample: the checkpoint answers none of its rows: {failed.type}: {failed.message}")
        pairs = [(row, each) for row, each in zip(rows, answers, strict=True) if isinstance(each, Trace)]
        kept = [row for row, _ in pairs]
        probed = [row for row in kept if row.pixels][:PROBED_ROWS]
        if not probed:
            raise ExportError("--recipe auto: none of the rows of --sample has an image; give rows with images")
        states = [(row, _states_on(disk, side.probe.states(row))) for row in probed]
        return cls(kept, [trace for _, trace in pairs], states, bundle.manifest.generation.repetition_penalty)


def side_of(bundle: Bundle, *, layers: bool) -> BundleSide:
    """A bundle that answers rows, on the CPU; with `layers`, also its hidden states."""
    return BundleSide(bundle, MAX_NEW_TOKENS, bundle.manifest.layout.max_seq_len, layers=layers, device="cpu")


def answered(side: BundleSide, rows: Sequence[SampleRow]) -> Iterator[Trace | Failure]:
    """Answers to rows, in order."""
    for first in range(0, len(rows), ROWS_AT_ONCE):
        yield from side.answer_rows(rows[first : first + ROWS_AT_ONCE])


def _trace_on(disk: Disk, trace: Trace | Failure) -> Trace | Failure:
    """The same with its arrays on disk."""
    if isinstance(trace, Failure):
        return trace
    return replace(trace, features=disk.keep(trace.features), logits=disk.keep(trace.logits))


def _states_on(disk: Disk, states: States) -> States:
    """The same with its arrays on disk."""
    return States(
        vision=list(map(disk.keep, states.vision)),
        features=disk.keep(states.features),
        decoder=list(map(disk.keep, states.decoder)),
        logits=disk.keep(states.logits),
    )
