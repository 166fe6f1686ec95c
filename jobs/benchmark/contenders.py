"""Contenders on CPUs: their names, how each is started in its own process, and the check that they do the same work."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from benchmark.figures import Contender
from benchmark.host import Host
from benchmark.rows import Rows
from qvl_batch.bundle.layout import Resolution
from qvl_batch.errors import JobError

OURS = FP32, REDUCED, NATIVE = "qvl-batch fp32", "qvl-batch reduced", "qvl-batch fp32, native"
HF_FP32, HF_BF16 = "transformers fp32", "transformers bf16"
OV_FP32, OV_OWN = "OpenVINO GenAI fp32", "OpenVINO GenAI"
#: Peers by the names that `--against` has for them: in fp32, and in reduced precision.
PEERS = {"hf": (HF_FP32, HF_BF16), "openvino": (OV_FP32, OV_OWN)}
#: Rows whose numbers of tokens are compared: a peer takes as long to count them as to answer.
CHECKED_ROWS = 4
#: Share of a peer's answers in fp32 that must equal the reference's; with made-up weights some tokens are near ties.
LEAST_EQUAL = 0.9


@dataclass(frozen=True, slots=True)
class Starter:
    """Starts contenders, each in its own process.

    Args:
        stack: ends the processes.
        checkpoint: folder of the checkpoint.
        openvino: folder of OpenVINO's environment, `venv`, and of the checkpoint converted for it, `model`.
        slots: rows that our decoder answers at a time.
        new_tokens: tokens of each answer.
    """

    stack: ExitStack
    checkpoint: Path
    openvino: Path
    slots: int
    new_tokens: int

    def ours(self, name: str, bundle: Path) -> Host:
        """Our engine with a bundle."""
        return self.stack.enter_context(Host(name, "benchmark.ours", "Ours", bundle, self.slots, self.new_tokens))

    def transformers(self, name: str, bundle: Path) -> Host:
        """`generate` of transformers, in the type that its name says, on images as a bundle sees them."""
        dtype = {HF_FP32: "float32", HF_BF16: "bfloat16"}[name]
        arguments = (self.checkpoint, dtype, bundle, self.new_tokens)
        return self.stack.enter_context(Host(name, "benchmark.transformers_generate", "HuggingFace", *arguments))

    def openvino_genai(self, name: str, resolution: Resolution) -> Host:
        """OpenVINO GenAI, in fp32 or in its own choice of precision, on images of a bundle's sizes."""
        precision = {OV_FP32: "f32", OV_OWN: None}[name]
        arguments = (self.openvino / "model", precision, resolution, self.new_tokens)
        return self.stack.enter_context(
            Host(name, "benchmark.openvino_genai", "OpenVino", *arguments, python=openvino_python(self.openvino))
        )


def openvino_python(openvino: Path) -> Path:
    """Interpreter of OpenVINO's environment."""
    return openvino / "venv" / "bin" / "python"


def check_equal_work(hosts: Mapping[str, Contender], rows: Rows, counted: int = CHECKED_ROWS) -> dict[str, list[int]]:
    """Answer once to warm up; returns how many answers of each contender equal the reference's, and of how many.

    The reference is transformers' `generate` in fp32 if it takes part, else the first contender.

    Args:
        hosts: contenders by name.
        rows: rows to answer.
        counted: number of rows whose tokens are counted.

    Raises:
        JobError: the contenders do not do the same work.
    """
    first = next(iter(hosts))
    lengths = {name: host.call("prompt_tokens", rows.part(0, counted)) for name, host in hosts.items()}
    if any(found != lengths[first] for found in lengths.values()):
        raise JobError(
            f"contenders count different numbers of tokens for the same rows, so they are not compared: {lengths}"
        )
    answers = {name: host.call("answer", rows) for name, host in hosts.items()}
    reference = answers.get(HF_FP32, answers[first])
    equal = {name: sum(a == b for a, b in zip(found, reference, strict=True)) for name, found in answers.items()}
    for name, share in ((FP32, 1), (NATIVE, 1), (OV_FP32, LEAST_EQUAL)):
        if equal.get(name, len(rows)) < share * len(rows):
            raise JobError(f"only {equal[name]} of {len(rows)} answers of {name} equal those of the reference in fp32")
    return {name: [count, len(rows)] for name, count in equal.items()}
