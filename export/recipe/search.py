"""Finds a recipe for a checkpoint on a user's rows.

What enters: a writer of bundles, rows, and a goal. What leaves: the choice, the weights that were rounded, and all that
was measured on the way.
"""

import math
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from export.bundle_writer import BundleWriter
from export.calibrated import Calibrated, calibrate
from export.comparison.layers import Drift
from export.disk import Disk
from export.names import TOWERS, Tower
from export.precision import Precision, products, tower_of
from export.progress import Progress
from export.recipe.choice import Choice, Option, path
from export.recipe.cost import REST, Workload, bytes_by_part, seconds_by_part
from export.recipe.reference import Reference, side_of
from export.recipe.sensitivity import Sensitivity
from export.recipe.trial import Goal, Trial, cheapest, measure
from export.sample import SampleRow
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import FP32, INTEGERS, Dtype, is_in, part_names

#: Dtypes that a part can have: those of a CPU.
CANDIDATES: tuple[Dtype, ...] = ("fp32", *INTEGERS)


@dataclass(frozen=True, slots=True)
class Costs:
    """Bytes and seconds of the parts in each dtype, and of the rest of a bundle."""

    bytes: Mapping[tuple[str, Dtype], float]
    seconds: Mapping[tuple[str, Dtype], float]

    def of(self, choice: Choice) -> tuple[float, float]:
        """Bytes and seconds of a choice."""
        sums = [
            costs[REST, "fp32"] + sum(costs[part, dtype] for part, dtype in choice.items())
            for costs in (self.bytes, self.seconds)
        ]
        return sums[0], sums[1]


@dataclass(frozen=True, slots=True)
class Recipe:
    """A recipe and how it was found.

    Args:
        goal: what it was to keep.
        chosen: the trial that meets the goal at the least cost.
        trials: all trials, those with one dtype for all parts first.
        costs: of parts.
        sensitivity: of parts.
        shares: of the square of the largest drift allowed, how much a part takes in a dtype, as estimated: of features,
            and of logits.
        workload: what a row takes.
    """

    goal: Goal
    chosen: Trial
    trials: list[Trial]
    costs: Costs
    sensitivity: Sensitivity
    shares: Mapping[tuple[str, Dtype], tuple[float, float]]
    workload: Workload

    def __str__(self) -> str:
        """The choice in one line."""
        chosen = self.chosen
        counts = ", ".join(f"{dtype}: {count}" for dtype, count in Counter(chosen.choice.values()).most_common())
        low, high = chosen.lost["interval"]
        return (
            f"recipe    {chosen.name} (parts in {counts}): {chosen.bytes / 1e6:,.1f} MB, "
            f"{chosen.seconds * 1e3:,.1f} ms a row, drift {chosen.drift:.1e}, "
            f"{chosen.rows - chosen.equal} of {chosen.rows} answers lost "
            f"(95 %: {low:.1%} to {high:.1%})"
        )

    @property
    def precision(self) -> Precision:
        """The precision of all products."""
        return precision_of(self.chosen.choice)


def _in_tower(parts: Iterable[str], tower: Tower) -> list[str]:
    return [part for part in parts if tower_of(part) == tower]


def precision_of(choice: Choice) -> Precision:
    """The precision of all products: of each tower that of most of its parts, and of the others their own."""
    dtypes: dict[Tower, Dtype] = {}
    for tower in TOWERS:
        own = [choice[part] for part in _in_tower(choice, tower)]
        dtypes[tower] = max(CANDIDATES, key=own.count)
    others = {part: dtype for part, dtype in choice.items() if dtype != dtypes[tower_of(part)]}
    return Precision(dtypes["decoder"], dtypes["vision"], others)


def find_recipe(
    writer: BundleWriter, rows: Sequence[SampleRow], goal: Goal, folder: Path, *, gate: bool
) -> tuple[Recipe, Calibrated]:
    """Measure, choose and try.

    Args:
        writer: of bundles of the checkpoint.
        rows: of the sample.
        goal: what to keep, and what to have least of.
        folder: for everything on the way, tens of gigabytes at real size. Its `fp32` is the bundle in fp32 afterwards.
        gate: compare the graphs in fp32 with PyTorch.

    Raises:
        ExportError: the graphs in fp32 differ from PyTorch, or the checkpoint answers no row of the sample.
    """
    search = _Search(writer, rows, goal, folder, gate=gate)
    return search.find(), search.calibrated


class _Search:
    def __init__(
        self, writer: BundleWriter, rows: Sequence[SampleRow], goal: Goal, folder: Path, *, gate: bool
    ) -> None:
        self._goal, self._folder = goal, folder
        # Its steps are within those of the search.
        self._writer, self._progress = replace(writer, progress=Progress()), writer.progress
        model = writer.checkpoint.weights.skeleton
        self._products = products(model)
        decoder = writer.checkpoint.config.text_config.num_hidden_layers
        self._names = part_names(len(model.model.visual.blocks), decoder)
        self._parts = [name for name in self._names if any(is_in(product, [name]) for product in self._products)]
        with self._progress.step("recipe: fp32"):
            exact = self._writer.write(folder / FP32, Precision(), Calibrated(), gate=gate)
            (folder / "arrays").mkdir()
            disk = Disk(folder / "arrays")
            self._reference = Reference.of(exact, rows, disk)
        self._workload = Workload.of(self._reference.rows, [trace.token_ids for trace in self._reference.traces])
        self.calibrated = calibrate(
            writer.checkpoint, writer.layout, rows, lambda _: INTEGERS, self._progress, keep=disk.keep
        )
        self._bytes: dict[tuple[str, Dtype], float] = {}
        self._seconds: dict[tuple[str, Dtype], float] = {}
        self._costs = Costs(self._bytes, self._seconds)
        self._cost_of_parts("fp32", exact)
        self._trials: list[Trial] = []

    def find(self) -> Recipe:
        everywhere: dict[Dtype, Choice] = {dtype: dict.fromkeys(self._parts, dtype) for dtype in CANDIDATES}
        answers = len(self._reference.rows)
        cost = self._costs.of(everywhere["fp32"])
        # The graphs in fp32 are the reference itself.
        self._add(Trial("fp32", everywhere["fp32"], 0, 0, 0, answers, answers, *cost))
        drifts = {dtype: self._uniform(dtype, everywhere[dtype]) for dtype in INTEGERS}
        sensitivity = Sensitivity.of(self._names, self._parts, drifts)
        shares = self._shares(sensitivity)
        costs = getattr(self._costs, self._goal.least)
        options = {
            part: [Option(dtype, costs[part, dtype], sum(shares[part, dtype])) for dtype in CANDIDATES]
            for part in self._parts
        }
        self._first_that_meets(path(options))
        # Both bounds, of features and of logits, are seldom reached together: so each tower goes on alone.
        for tower in reversed(TOWERS):
            best = cheapest(self._trials, self._goal).choice
            own = {part: options[part] for part in _in_tower(self._parts, tower)}
            others = {part: dtype for part, dtype in best.items() if part not in own}
            self._first_that_meets(path(own, others))
        chosen = cheapest(self._trials, self._goal)
        return Recipe(self._goal, chosen, self._trials, self._costs, sensitivity, shares, self._workload)

    def _first_that_meets(self, choices: Sequence[Choice]) -> None:
        """Bisect for the cheapest of choices with falling error that meets the goal."""
        known = [(at, trial.meets(self._goal)) for at, each in enumerate(choices) if (trial := self._known(each))]
        meeting = next((at for at, meets in known if meets), len(choices) - 1)
        failing = max((at for at, meets in known if not meets and at < meeting), default=-1)
        while meeting - failing > 1:
            middle = (failing + meeting) // 2
            if self._try(choices[middle]).meets(self._goal):
                meeting = middle
            else:
                failing = middle
        # The last one has not been tried if all others failed; of a tower alone, it can fail too.
        self._try(choices[meeting])

    def _known(self, choice: Choice) -> Trial | None:
        return next((trial for trial in self._trials if trial.choice == choice), None)

    def _try(self, choice: Choice) -> Trial:
        known = self._known(choice)
        if known is not None:
            return known
        choice = {part: choice[part] for part in self._parts}  # in the order of the forward pass
        name = f"mixed {sum(trial.name not in CANDIDATES for trial in self._trials) + 1}"
        with self._progress.step(f"recipe: {name}"), self._bundle(choice) as bundle:
            trial = measure(name, choice, side_of(bundle, layers=False), self._reference, self._costs.of(choice))
        return self._add(trial)

    def _uniform(self, dtype: Dtype, choice: Choice) -> list[Drift]:
        """Try one dtype for all parts, and measure each part."""
        with self._progress.step(f"recipe: {dtype}"), self._bundle(choice) as bundle:
            self._cost_of_parts(dtype, bundle)
            side = side_of(bundle, layers=True)
            trial = measure(dtype, choice, side, self._reference, self._costs.of(choice))
            drifts = [side.probe.drift(row, states) for row, states in self._reference.states]
        self._add(trial)
        return drifts

    def _add(self, trial: Trial) -> Trial:
        self._trials.append(trial)
        self._progress.say(
            f"  {trial.bytes / 1e6:,.1f} MB, {trial.seconds * 1e3:,.1f} ms a row, "
            f"drift of features {trial.vision:.1e}, of logits {trial.logits:.1e}, "
            f"{trial.equal} of {trial.rows} answers equal"
        )
        return trial

    def _shares(self, sensitivity: Sensitivity) -> dict[tuple[str, Dtype], tuple[float, float]]:
        """What each part takes in each dtype of the square of the largest drift allowed, of features and of logits.

        The largest error of any row is larger than the mean one, by a factor that the uniform trials show.
        """
        reduced = [trial for trial in self._trials if trial.name in INTEGERS]
        features = _typical((trial.vision**2, sensitivity.features(trial.choice)) for trial in reduced)
        logits = _typical((trial.logits**2, sensitivity.logits(trial.choice)) for trial in reduced)
        allowed = self._goal.max_drift**2
        return {
            (part, dtype): (
                features * sensitivity.features({part: dtype}) / allowed,
                logits * sensitivity.logits({part: dtype}) / allowed,
            )
            for part in self._parts
            for dtype in CANDIDATES
        }

    def _cost_of_parts(self, dtype: Dtype, bundle: Bundle) -> None:
        sizes = bytes_by_part(bundle, self._parts)
        seconds = seconds_by_part(bundle, self._parts, self._products, self._workload, self._folder)
        for part in [*self._parts, REST]:
            self._bytes[part, dtype], self._seconds[part, dtype] = sizes[part], seconds[part]

    @contextmanager
    def _bundle(self, choice: Choice) -> Iterator[Bundle]:
        """A bundle with a choice, without the decoders that no trial runs, which is removed afterwards."""
        folder = self._folder / "trial"
        try:
            yield self._writer.write(folder, precision_of(choice), self.calibrated, with_guided=False, gate=False)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _typical(pairs: Iterable[tuple[float, float]]) -> float:
    """Geometric mean of the ratios of pairs of positive numbers; 1 without any."""
    logs = [math.log(a / b) for a, b in pairs if 0 < a < math.inf and 0 < b < math.inf]
    return math.exp(fmean(logs)) if logs else 1.0
