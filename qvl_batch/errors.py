"""Every error this package raises on purpose.

    QvlBatchError
    ├── JobError                 stops the job: one line that says what to do
    │   ├── ConfigError          an option has a value that cannot work
    │   ├── InputError           the input is missing, unreadable, or lacks a column
    │   ├── OutputError          the output folder cannot be written, or holds other answers
    │   ├── BundleError          the bundle is missing, damaged, or breaks its layout contract
    │   ├── DeviceError          the requested device cannot be used here, or computes the bundle wrongly
    │   └── ExportError          the checkpoint cannot be exported, or the export is not exact
    └── RowError                 fails one row and is written to its output; the job continues
        ├── RecordError          the row, or one of its values such as its messages, cannot be read (stage `read`)
        ├── ImageError           the image is missing or cannot be decoded (stage `image`)
        ├── PromptError          prompt or conversation cannot be asked, or is too long (stage `layout`)
        ├── ConstraintError      what the answer must be is wrong, or cannot be followed (stage `layout`)
        ├── SamplingError        how the answer is drawn is wrong (stage `layout`)
        ├── NumericError         the model computed unusable values (stage `vision`, `decode`)
        ├── RepetitionError      the answer repeats a phrase until it is cut off (stage `decode`)
        ├── TruncatedError       the answer is cut off before it is what it must be (stage `decode`)
        └── WorkerLostError      the row kills every worker process (stage `read`, `image`, `vision`, `decode`)

Errors of third-party libraries are translated where they occur, so that a caller needs to catch nothing else.
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
    """The output folder cannot be written, or holds answers of another job."""


class BundleError(JobError):
    """The bundle is missing, damaged, or breaks its layout contract."""


class DeviceError(JobError):
    """The requested device cannot be used on this machine, or computes the bundle wrongly."""


class ExportError(JobError):
    """The checkpoint cannot be exported, or the exported graphs deviate from it."""


class RowError(QvlBatchError):
    """Fails one row. `stage` is the stage that failed: `read`, `image`, `vision`, `layout` or `decode`."""

    stage = "read"


class RecordError(RowError):
    """The row, or one of its values, cannot be read: the file is damaged there, or the value has a wrong form."""


class ImageError(RowError):
    """The image is missing or cannot be decoded."""

    stage = "image"


class PromptError(RowError):
    """The prompt or conversation has no text, leaves no room for an answer, or is refused by the chat template."""

    stage = "layout"


class ConstraintError(RowError):
    """What the answer must be is no choices, regular expression or JSON schema, or one that cannot be followed."""

    stage = "layout"


class SamplingError(RowError):
    """A value of how the answer is drawn cannot be used. Its text is the name of the value, and a reason."""

    stage = "layout"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}")
        self.name, self.reason = name, reason


class NumericError(RowError):
    """The model computed unusable values: not finite, or all the same."""

    stage = "decode"

    def __init__(self, message: str, *, stage: str = "decode") -> None:
        super().__init__(message)
        self.stage = stage


class RepetitionError(RowError):
    """The answer repeats a phrase until it is cut off at the token limit."""

    stage = "decode"


class TruncatedError(RowError):
    """The answer is cut off at the token limit before it is what it must be."""

    stage = "decode"


class WorkerLostError(RowError):
    """The row kills every process that works on it."""

    def __init__(self, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.stage = stage


def stable_message(error: BaseException) -> str:
    """Text of `error` without memory addresses, so that the same failure has the same text in every run."""
    return _MEMORY_ADDRESS.sub("", str(error)) or type(error).__name__
