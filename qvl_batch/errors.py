"""Every error this package raises on purpose.

    QvlBatchError
    ├── JobError                 stops the job: one line that says what to do
    │   ├── ConfigError          an option has a value that cannot work
    │   ├── InputError           the input is missing, unreadable, or lacks a column
    │   ├── OutputError          the output folder cannot be written, or holds other answers
    │   ├── BundleError          the bundle is missing, damaged, or breaks its layout contract
    │   ├── DeviceError          the device asked for cannot be used here, or computes a bundle wrongly
    │   └── ExportError          the checkpoint cannot be exported, or the export is not exact
    └── RowError                 goes into its own row; the job goes on
        ├── RecordError          the row, or a value of it, cannot be read (stage `read`)
        ├── ImageError           the image is missing or cannot be decoded (stage `image`)
        ├── PromptError          the prompt is missing or does not fit the contract (stage `layout`)
        ├── NumericError         the model produced values that mean nothing (stage `vision`, `decode`)
        ├── RepetitionError      the answer says one thing over and over until it is cut (stage `decode`)
        └── WorkerLostError      the row ends whatever process works on it (stage `read`, `image`, `vision`, `decode`)

Errors of the libraries below are translated where they are met, so that a caller needs to
catch nothing else.
"""

import re

_MEMORY_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


class QvlBatchError(Exception):
    """Root of every error raised on purpose."""


class JobError(QvlBatchError):
    """Stops the job. Its text is one line and says what to do."""


class ConfigError(JobError):
    """An option has a value that cannot work."""


class InputError(JobError):
    """The input is missing, cannot be read, or lacks a column."""


class OutputError(JobError):
    """The output folder cannot be written, or holds answers of another run."""


class BundleError(JobError):
    """The bundle is missing, damaged, or breaks its layout contract."""


class DeviceError(JobError):
    """The device asked for cannot be used on this machine, or computes a bundle wrongly."""


class ExportError(JobError):
    """The checkpoint cannot be exported, or the exported graphs do not answer like it."""


class RowError(QvlBatchError):
    """Fails one row. `stage` names where: `read`, `image`, `vision`, `layout` or `decode`."""

    stage = "read"


class RecordError(RowError):
    """The row, or a value of it, cannot be read: the file is damaged there, or it is of another type."""


class ImageError(RowError):
    """The image is missing or cannot be decoded."""

    stage = "image"


class PromptError(RowError):
    """The prompt is missing, or leaves no room for an answer."""

    stage = "layout"


class NumericError(RowError):
    """The model produced values that mean nothing (not finite, or all the same)."""

    stage = "decode"

    def __init__(self, message: str, *, stage: str = "decode") -> None:
        super().__init__(message)
        self.stage = stage


class RepetitionError(RowError):
    """The answer says one thing over and over until it is cut."""

    stage = "decode"


class WorkerLostError(RowError):
    """The row ends whatever process works on it."""

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


def stable_message(error: BaseException) -> str:
    """Text of `error` without memory addresses, so that equal failures read equal in every run."""
    return _MEMORY_ADDRESS.sub("", str(error)) or type(error).__name__
