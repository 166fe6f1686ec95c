"""Settings of a comparison: one frozen dataclass that is also the command line."""

from dataclasses import dataclass
from pathlib import Path

from qvl_batch.config import DeviceOption, Fit, JobConfig
from qvl_batch.errors import ConfigError

#: Longest answer in tokens, by default.
MAX_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareConfig(JobConfig):
    """Answer the same questions with a bundle and with PyTorch (or another bundle), and report the differences."""

    bundle: str
    """Folder of the bundle to compare, or its address."""
    output: str
    """Folder for `comparison.parquet`, `summary.json` and `report.html`."""
    max_new_tokens: int = MAX_NEW_TOKENS
    """Longest answer in tokens."""
    limit: int | None = None
    """Compare only this many rows, from the first on."""
    retry_errors: bool = False
    """Ask again about the rows that failed on a side or could not be compared."""
    overwrite: bool = False
    """Delete the comparison that the output folder already holds. Without it, the same comparison is continued."""
    decoder_graph: Path | None = None
    """A plain decoder graph that a tool has quantized (made from `decoder_full.onnx`), to compare in place of the
    bundle's. It has no KV cache, so it is asked the first 64 rows unless --limit says otherwise."""
    vision_graph: Path | None = None
    """A plain vision graph that a tool has quantized (made from `vision_full.onnx`), in place of the bundle's."""
    checkpoint: Path | None = None
    """Folder of the checkpoint that the bundle was exported from, or its id on the Hugging Face hub; it answers in
    PyTorch, in fp32."""
    revision: str | None = None
    """Of an id: branch, tag or commit. Without it, the main branch."""
    adapter: Path | None = None
    """Folder of the adapter that was merged into the checkpoint's weights when the bundle was exported."""
    ignore_extra_weights: bool = False
    """Leave out tensors of the checkpoint that are not weights of the model, as in the export."""
    against_bundle: Path | None = None
    """Another bundle to compare with, in place of a checkpoint."""
    expected_column: str | None = None
    """Column of right answers, of strings or integers; '' for none. Without it, `expected` where the input has such
    a column."""
    fit: tuple[Fit, ...] = ()
    """How an image that is not square becomes square; given several, each row is asked once with each. By default,
    letterbox."""
    layers: bool = False
    """Also compare the hidden state after every vision block and decoder layer. Loads the bundle twice,
    unless it is in fp32."""
    min_agreement: float = 1.0
    """Share of answers that must be equal, token for token."""
    max_drift: float = 1e-3
    """Largest error of features and logits, relative to their largest magnitude, that rounding explains."""
    tie_margin: float = 1e-3
    """Two tokens are tied if their scores differ by at most this on both sides."""
    device: DeviceOption = "auto"
    """Where PyTorch runs, and graphs that are made for a GPU: `auto` takes a GPU if there is one. On a CPU, half
    precision is emulated."""
    gallery: int = 200
    """Rows to show on the page: those that differ or failed first, then others at random."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work on any machine.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        JobConfig.__post_init__(self)  # `super()` without arguments finds no class with slots
        if (self.checkpoint is None) == (self.against_bundle is None):
            raise ConfigError("give one of --checkpoint and --against-bundle: what --bundle is compared with")
        if self.checkpoint is None and (self.adapter is not None or self.ignore_extra_weights):
            raise ConfigError("--adapter and --ignore-extra-weights are for --checkpoint")
        if not 0 <= self.min_agreement <= 1:
            raise ConfigError(f"--min-agreement must be from 0 to 1, not {self.min_agreement}")
        for option, value in (("--max-drift", self.max_drift), ("--tie-margin", self.tie_margin)):
            if not value >= 0:
                raise ConfigError(f"{option} must be at least 0, not {value}")
        if self.gallery < 0:
            raise ConfigError(f"--gallery must be at least 0, not {self.gallery}")
        if len(set(self.fit)) < len(self.fit):
            raise ConfigError("--fit names a way to fit an image more than once")

    @property
    def graphs(self) -> dict[str, Path]:
        """Graphs that take the place of the bundle's, by tower."""
        given = {"decoder": self.decoder_graph, "vision": self.vision_graph}
        return {name: path for name, path in given.items() if path is not None}

    @property
    def folder(self) -> Path:
        """The output folder."""
        return Path(self.output)
