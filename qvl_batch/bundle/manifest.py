"""`bundle.json`, the manifest of a bundle: contract, sizes, precision, measured parity, and its files.

What enters: the file's text. What leaves: a validated `Manifest`. The exporter creates one and writes it.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qvl_batch.bundle.layout import Layout
from qvl_batch.config import Device
from qvl_batch.errors import BundleError

FORMAT_VERSION = 10
MANIFEST = "bundle.json"
VISION = "vision.onnx"
DECODER = "decoder.onnx"
DECODER_GUIDED = "decoder_guided.onnx"
DECODER_DRAWN = "decoder_drawn.onnx"
DECODER_FULL = "decoder_full.onnx"
VISION_FULL = "vision_full.onnx"
TOKENIZER = "tokenizer.json"
CHAT_TEMPLATE = "chat_template.jinja"
KNOWN_ANSWERS = "known_answers.npz"
#: Optional folder of a bundle in reduced precision: the same checkpoint as a bundle in fp32.
FP32 = "fp32"

#: Precision of weights and matrix products: fp32; half precision; int8 weights and activations; int8 or int4 weights
#: only.
Dtype = Literal["fp32", "bf16", "fp16", "int8", "int8wo", "int4wo"]
HALVES: tuple[Dtype, ...] = ("bf16", "fp16")
INTEGERS: tuple[Dtype, ...] = ("int8", "int8wo", "int4wo")
#: What a recipe shall have least of: seconds, or bytes.
Prefer = Literal["speed", "size"]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of the decoder. The KV cache of a row has 2 x layers x kv_heads x S x head_dim values."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Generation:
    """Settings for greedy decoding, from the checkpoint's generation config."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class CheckpointSource:
    """The checkpoint that was exported: its directory's name, and a hash of its contents."""

    name: str
    sha256: str


@dataclass(frozen=True, slots=True)
class File:
    """Size in bytes and SHA-256 of one file of the bundle."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Element type and shape of a graph's input or output; dynamic dimensions are names."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Inputs and outputs of one graph, by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Parity:
    """Measurements of the parity gate, graphs against PyTorch.

    `features` and `logits` are the largest absolute error over the largest magnitude; `tokens_equal` of `tokens` greedy
    tokens are PyTorch's; `first_token_kl` is the largest Kullback-Leibler divergence, in nats, of PyTorch's first token
    from the graph's; `feature_cosine` is the smallest cosine similarity of an image token's features.
    """

    features: float
    logits: float
    tokens: int
    tokens_equal: int
    first_token_kl: float
    feature_cosine: float

    @property
    def agreement(self) -> float:
        """Share of greedy tokens that are PyTorch's."""
        return self.tokens_equal / self.tokens


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Bounds for the known answers; the names are those of `Parity`."""

    features: float
    feature_cosine: float
    logits: float


@dataclass(frozen=True, slots=True)
class Calibration:
    """Rows on which the rounding of weights was calibrated: how many, and a hash of their tokens and pixels."""

    rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class MeasuredRecipe:
    """How the precision of layers was chosen: by measuring them on the rows of the calibration.

    `max_drift`, `min_agreement` and `prefer` are what was asked for; `features` and `logits` the largest errors that
    were found, and `answers_equal` of `answers` are those of fp32, token for token.
    """

    max_drift: float
    min_agreement: float
    prefer: Prefer
    features: float
    logits: float
    answers: int
    answers_equal: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `bundle.json`.

    `dtype` is the precision of the decoder, `vision_dtype` of the vision tower, and `layers_dtype` of modules of either
    tower that differ from it. Without `calibration`, weights in integers are rounded to nearest. `recipe` says how
    `layers_dtype` was found, if it was measured. `device` is the device that the decoder was exported for; a vision
    tower in fp32 runs on any. Without the parity gate there is no `parity`, no `tolerance` and no file of known
    answers. `special_tokens` are the variables of the chat template that name them, such as `eos_token`.
    """

    #: Unknown keys are refused, in nested objects too.
    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int
    source: CheckpointSource
    dtype: Dtype
    device: Device
    vision_dtype: Dtype
    layers_dtype: dict[str, Dtype]
    calibration: Calibration | None
    recipe: MeasuredRecipe | None
    special_tokens: dict[str, str]
    layout: Layout
    decoder: DecoderShape
    generation: Generation
    graphs: dict[str, GraphSpec]
    parity: Parity | None
    tolerance: Tolerance | None
    versions: dict[str, str]
    files: dict[str, File]

    def bytes_of(self, graph: str) -> int:
        """Size in bytes of a graph with its weights."""
        return sum(file.size for name, file in self.files.items() if name in (graph, f"{graph}.data"))

    @property
    def vision_dtypes(self) -> set[Dtype]:
        """All dtypes of the vision tower's products."""
        return dtypes_of("vision", self.vision_dtype, self.layers_dtype)

    @property
    def towers(self) -> str:
        """Precision of both towers, in words."""
        vision, decoder = self._in_words("vision", self.vision_dtype), self._in_words("decoder", self.dtype)
        return f"vision in {vision}, decoder in {decoder}"

    def _in_words(self, tower: str, dtype: Dtype) -> str:
        others = Counter(each for name, each in self.layers_dtype.items() if is_in(name, [tower]) and each != dtype)
        named = ", ".join(f"{other}: {count}" for other, count in sorted(others.items()))
        return f"{dtype} ({named})" if named else dtype

    @property
    def vision_sha256(self) -> str:
        """Identifies the vision graph and its weights."""
        files = {name: file for name, file in self.files.items() if name.startswith(VISION)}
        return combined_sha256((name, file.sha256) for name, file in files.items())

    def write(self, directory: Path) -> None:
        """Write `bundle.json`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


def mask_bytes(vocab_size: int) -> int:
    """Bytes of the mask of a row for `decoder_guided.onnx`: a bit for each token, in words of 32."""
    return 4 * -(-vocab_size // 32)


def part_names(vision: int, decoder: int) -> list[str]:
    """Names of the model's parts, in the order of the forward pass, for towers of `vision` and `decoder` layers.

    The names of nodes in the graphs begin with them.
    """
    return [
        "vision.patch_embed", *(f"vision.blocks.{k}" for k in range(vision)), "vision.merger",
        "decoder.embed", *(f"decoder.layers.{k}" for k in range(decoder)), "decoder.head",
    ]  # fmt: skip


def is_in(module: str, others: Iterable[str]) -> bool:
    """Whether a module is one of the others or inside of one: `decoder.layers.3.mlp.gate` is in `decoder.layers.3`."""
    return any(module == other or module.startswith(f"{other}.") for other in others)


def dtypes_of(tower: str, dtype: Dtype, layers: Mapping[str, Dtype]) -> set[Dtype]:
    """All dtypes of a tower in `dtype`, some of whose modules have others."""
    return {dtype, *(each for name, each in layers.items() if is_in(name, [tower]))}


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(hashes: Iterable[tuple[str, str]]) -> str:
    """One hash of many named hashes, independent of their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def read_manifest(path: Path) -> Manifest:
    """Read the manifest in a bundle's directory.

    Raises:
        BundleError: there is none, or it is of another format, or invalid.
    """
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} is no bundle ({MANIFEST}: {error.strerror}): make one with `python -m export`"
        ) from error
    return parse_manifest(text, str(path))


def parse_manifest(text: bytes, place: str) -> Manifest:
    """Parse the manifest of the bundle at a path or an address.

    Raises:
        BundleError: it is of another format, or invalid.
    """
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise BundleError(
                f"{place} has bundle format {version}, this qvl-batch reads {FORMAT_VERSION}: "
                f"{'update qvl-batch' if newer else 'export the checkpoint again'}"
            )
        return TypeAdapter(Manifest).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise BundleError(
                f"{place}/{MANIFEST} has an unknown key {where}: export the checkpoint again, or update qvl-batch"
            ) from error
        raise BundleError(f"{place}/{MANIFEST}: {where}: {first['msg']}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{place}/{MANIFEST} is not valid JSON: {error}") from error
