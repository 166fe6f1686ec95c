"""Settings of a calibration: one frozen dataclass that is also the command line."""

from dataclasses import dataclass

from qvl_batch.errors import ConfigError

#: Folder of a calibration in that of the answers, where nothing else is named; readers of the answers skip it.
FOLDER = "_calibration"


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """Say how far confidence can be trusted, and from which confidence on answers are right as often as you need."""

    answers: str
    """Folder that `jobs/caption.py --confidence --keep-columns expected` wrote, or its address."""
    expected_column: str = "expected"
    """Column of right answers; null where nobody knows. Rows that have one must be a random sample of all."""
    field: str | None = None
    """Field of `parsed` to calibrate in place of the whole answer, by its own confidence; `a.b` is field b of a."""
    target_precision: float = 0.99
    """Share of answers that must be right from the threshold on."""
    certainty: float = 0.95
    """How certain that must be."""
    bins: int = 10
    """Bins of the reliability diagram, of equally many rows."""
    next_rows: int = 24
    """Rows without a right answer to list: so many just below the threshold, and so many least sure ones."""
    output: str | None = None
    """Folder for `calibration.json` and `calibration.html`, or its address. By default, `_calibration` in that of the
    answers, and for a field `_calibration-FIELD`."""
    overwrite: bool = False
    """Replace the calibration that the output folder already holds."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        for option, share in (("--target-precision", self.target_precision), ("--certainty", self.certainty)):
            if not 0 < share < 1:
                raise ConfigError(f"{option} must be between 0 and 1, not {share}")
        for option, number, least in (("--bins", self.bins, 1), ("--next-rows", self.next_rows, 0)):
            if number < least:
                raise ConfigError(f"{option} must be at least {least}, not {number}")
        for option, value in (
            ("--answers", self.answers),
            ("--expected-column", self.expected_column),
            ("--field", self.field),
            ("--output", self.output),
        ):
            if value == "":
                raise ConfigError(f"{option} is empty")

    @property
    def folder(self) -> str:
        """Where the results go."""
        if self.output is not None:
            return self.output
        name = f"{FOLDER}-{self.field.replace('/', '_')}" if self.field else FOLDER
        return f"{self.answers.rstrip('/')}/{name}"
