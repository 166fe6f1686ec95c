"""Offline captioning and visual question answering with Qwen2.5-VL on ONNX Runtime and Ray Data.

    from qvl_batch import Captioner
    answers = Captioner("bundle").caption(images=["a.jpg"], prompts=["What is this?"])

The job over files is `jobs/caption.py`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qvl_batch.bundle.loading import Bundle
    from qvl_batch.captioner import Captioner
    from qvl_batch.errors import JobError, QvlBatchError, RowError
    from qvl_batch.grounding import Box, boxes
    from qvl_batch.images.view import ImageSize
    from qvl_batch.schema import Answer, Failure

__all__ = [
    "Answer", "Box", "Bundle", "Captioner", "Failure", "ImageSize", "JobError", "QvlBatchError", "RowError", "boxes",
]  # fmt: skip

_MODULES = {
    "Answer": "schema",
    "Box": "grounding",
    "Bundle": "bundle.loading",
    "Captioner": "captioner",
    "Failure": "schema",
    "ImageSize": "images.view",
    "JobError": "errors",
    "QvlBatchError": "errors",
    "RowError": "errors",
    "boxes": "grounding",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access, so that tasks that only read do not load the tokenizer."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
