"""Which precision each part gets next, from the cheapest choice to the most exact one.

What enters: cost and error of every part in every dtype. What leaves: a path of choices. Nothing here runs a model.

A choice costs the sum of its parts' costs, and its error is the sum of its parts' errors (squares of independent errors
add up). For a price of error, the best choice gives each part the dtype with the least cost + price x error, whatever
the others have. As the price rises, parts change their dtype one after the other, in the order of the error that they
save for a unit of cost: these are the choices on the lower convex hull of all (Everett 1963, generalized Lagrange
multipliers).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from qvl_batch.bundle.manifest import Dtype

#: The dtype of each part, by the part's name.
Choice = dict[str, Dtype]


@dataclass(frozen=True, slots=True)
class Option:
    """A dtype that a part can have: what it costs, and its error."""

    dtype: Dtype
    cost: float
    error: float


def path(options: Mapping[str, Sequence[Option]], others: Mapping[str, Dtype] | None = None) -> list[Choice]:
    """Choices with rising cost and falling error.

    Args:
        options: of each part.
        others: parts that keep their dtype.
    """
    hulls = {part: _hull(each) for part, each in options.items()}
    steps = [
        (_slope(before, after), part, after.dtype) for part, hull in hulls.items() for before, after in pairwise(hull)
    ]
    found = [dict(others or {}) | {part: hull[0].dtype for part, hull in hulls.items()}]
    for _, part, dtype in sorted(steps, key=lambda step: -step[0]):
        found.append(found[-1] | {part: dtype})
    return found


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, from the cheapest option to the most exact one."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.cost, each.error)):
        if hull and option.error >= hull[-1].error:
            continue  # another one costs less and is as exact
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Error that is saved for a unit of cost."""
    return (before.error - after.error) / (after.cost - before.cost)
