"""Offline captioning and visual question answering with Qwen2.5-VL on ONNX Runtime and Ray Data.

    from qvl_batch import Captioner
    answers = Captioner("bundle").caption(images=["a.jpg"], prompts=["What is this?"])

The job over parquet files is `jobs/caption.py`.
"""

from qvl_batch.bundle import Bundle
from qvl_batch.captioner import Captioner
from qvl_batch.errors import JobError, QvlBatchError, RowError
from qvl_batch.schema import Answer, Failure

__all__ = ["Answer", "Bundle", "Captioner", "Failure", "JobError", "QvlBatchError", "RowError"]
