"""How tokens are drawn, where an answer is not the most probable one at each step.

What enters: values of options, of columns or of callers. What leaves: a `Sampling`, or a `SamplingError` that says what
is wrong with them.

This module knows nothing of probabilities: `decoder.draws` draws.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Self

from qvl_batch.errors import SamplingError

#: Most answers of a row.
MOST_SAMPLES = 1_000
#: The largest seed: it is a part of a key of 64 bits.
MOST_SEED = 2**63 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How tokens are drawn, as in transformers: scores are divided by the temperature; then `top_k`, `top_p` and
    `min_p`, in this order, leave some of the most probable tokens.

    Args:
        temperature: at 0, the most probable token is taken, nothing is drawn, and the other values say nothing.
        top_k: so many tokens are left; None for all.
        top_p: the fewest tokens are left that have at least this probability together, of what is left by then.
        min_p: tokens are left that have at least this share of the probability of the most probable one.
        seed: of the random numbers.
        samples: answers of a row.

    Raises:
        SamplingError: a value cannot be used; names it.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    samples: int = 1

    def __post_init__(self) -> None:
        """Refuse what cannot be used."""
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "a number from 0 on"),
            "top_k": (self.top_k is None or self.top_k >= 1, "at least 1"),
            "top_p": (0 < self.top_p <= 1, "a number above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "a number from 0 to 1"),
            "seed": (0 <= self.seed <= MOST_SEED, f"from 0 to {MOST_SEED:,}"),
            "samples": (1 <= self.samples <= MOST_SAMPLES, f"from 1 to {MOST_SAMPLES:,}"),
        }
        for name, (holds, wanted) in checks.items():
            if not holds:
                raise SamplingError(name, f"must be {wanted}, not {getattr(self, name)}")

    @property
    def is_random(self) -> bool:
        """Whether anything is drawn."""
        return self.temperature > 0

    @property
    def leaves_all(self) -> bool:
        """Whether every token can be drawn."""
        return self.top_k is None and self.top_p == 1 and self.min_p == 0

    def with_values(self, values: object) -> Self:
        """The same with values of one row in place of some.

        Args:
            values: a mapping of names to values, of which nulls change nothing, or JSON text of one; or null.

        Raises:
            SamplingError: names what is wrong with them.
        """
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except (ValueError, RecursionError) as error:
                raise SamplingError("the values", f"are not JSON: {error}") from error
        if values is None:
            return self
        if not isinstance(values, Mapping):
            raise SamplingError("the values", f"are {values!r}; they must be names and values")
        names = {field.name for field in fields(self)}
        if unknown := values.keys() - names:
            raise SamplingError(repr(min(map(str, unknown))), f"is none of {', '.join(sorted(names))}")
        given = {name: _number(name, value) for name, value in values.items() if value is not None}
        return replace(self, **given)

    def to_json(self) -> str:
        """As text, for a column of a table; `from_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


#: Nothing is drawn.
GREEDY = Sampling()


def _number(name: str, value: object) -> Any:
    """A value of a row in the type of its field."""
    is_whole = name in ("top_k", "seed", "samples")
    if isinstance(value, bool) or not isinstance(value, int | float) or (is_whole and not float(value).is_integer()):
        raise SamplingError(name, f"must be a {'whole ' if is_whole else ''}number, not {value!r}")
    return int(value) if is_whole else float(value)
