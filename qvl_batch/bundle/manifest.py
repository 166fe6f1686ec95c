"""The bundle: one relocatable directory with everything a worker needs, and its manifest.

What enters: a directory written by `python -m export`. What leaves: a `Bundle`, whose manifest
has been checked field by field and whose files are there and whole. The layout contract (where
the image block stands and how long a row may be) is part of the manifest; the exporter derives it
from the checkpoint's own chat template.

This module runs no graph and imports neither torch, transformers nor onnxruntime.
"""

import hashlib
import json
import math
import threading
from collections.abc import Callable, Container, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Generic, Literal, Self, TypeVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from qvl_batch.bundle.external_data import external_locations
from qvl_batch.errors import BundleError

FORMAT_VERSION = 5
MANIFEST = "bundle.json"
VISION = "vision.onnx"
DECODER = "decoder.onnx"
DECODER_FULL = "decoder_full.onnx"
TOKENIZER = "tokenizer.json"
KNOWN_ANSWERS = "known_answers.npz"
#: Folder of a bundle in reduced precision that may hold the same checkpoint as a bundle in fp32.
FP32 = "fp32"

Made = TypeVar("Made")
#: Of weights and products: fp32; half precision; int8 weights and activations; int8 or int4 weights only.
Dtype = Literal["fp32", "bf16", "fp16", "int8", "int8wo", "int4wo"]
HALVES: tuple[Dtype, ...] = ("bf16", "fp16")
#: What a graph can be made for.
GraphDevice = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Layout:
    """Where everything stands in a row of token ids.

        head_ids | image_token_id x image_tokens | bridge_ids | prompt | tail_ids | answer
                 ^ image_start (P)                                     row <= max_seq_len (S)

    The image is square: `image_size` pixels a side, `side` merged patches a side.
    """

    image_size: int
    image_tokens: int
    image_start: int
    max_seq_len: int
    image_token_id: int
    head_ids: tuple[int, ...]
    bridge_ids: tuple[int, ...]
    tail_ids: tuple[int, ...]

    @property
    def side(self) -> int:
        """Merged patches along one side of the image, `sqrt(image_tokens)`."""
        return math.isqrt(self.image_tokens)

    @property
    def room(self) -> int:
        """Tokens that are left for a prompt and its answer together."""
        fixed = len(self.head_ids) + self.image_tokens + len(self.bridge_ids) + len(self.tail_ids)
        return self.max_seq_len - fixed

    def row_ids(self, prompt_ids: Iterable[int]) -> list[int]:
        """Token ids of a whole row up to the point where the answer begins."""
        image = [self.image_token_id] * self.image_tokens
        return [*self.head_ids, *image, *self.bridge_ids, *prompt_ids, *self.tail_ids]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """Sizes of the decoder; the KV cache of a row is 2 x layers x kv_heads x S x head_dim."""

    layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int


@dataclass(frozen=True, slots=True)
class Generation:
    """What the checkpoint's generation config says of greedy decoding."""

    eos_token_ids: tuple[int, ...]
    pad_token_id: int
    repetition_penalty: float


@dataclass(frozen=True, slots=True)
class Source:
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
    """Element type and shape of a graph's input or output; a dynamic dimension has a name."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, slots=True)
class GraphSpec:
    """Tensors of one graph, by name."""

    inputs: dict[str, TensorSpec]
    outputs: dict[str, TensorSpec]


@dataclass(frozen=True, slots=True)
class Parity:
    """What the parity gate measured.

    Of features and logits the largest error over the largest magnitude; of greedy tokens, how many are
    PyTorch's; the largest Kullback-Leibler divergence of PyTorch's first token from the graph's, in nats;
    and the smallest cosine between an image token's features on both sides.
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
    """How near a machine must come to the known answers, by the names of `Parity`."""

    features: float
    feature_cosine: float
    logits: float


@dataclass(frozen=True, slots=True)
class Manifest:
    """Contents of `bundle.json`; `dtype` is the decoder's, but for `fp32_layers` of either tower.

    `device` is what the decoder is made for. The vision tower in fp32 runs on either. Without the parity gate there
    is no `parity`, no `tolerance` and no file of known answers.
    """

    #: Of all that is in it too: a key that nobody knows is refused.
    __pydantic_config__ = ConfigDict(extra="forbid")
    format_version: int
    source: Source
    dtype: Dtype
    device: GraphDevice
    vision_dtype: Dtype
    fp32_layers: tuple[str, ...]
    system_prompt: str | None
    layout: Layout
    decoder: DecoderShape
    generation: Generation
    graphs: dict[str, GraphSpec]
    parity: Parity | None
    tolerance: Tolerance | None
    versions: dict[str, str]
    files: dict[str, File]

    @property
    def feature_shape(self) -> tuple[int, int]:
        """Of an image's features, (T_img, D)."""
        return self.layout.image_tokens, self.decoder.hidden_size

    def bytes_of(self, graph: str) -> int:
        """Size of a graph with its weights."""
        return sum(file.size for name, file in self.files.items() if name in (graph, f"{graph}.data"))

    @property
    def vision_sha256(self) -> str:
        """Identifies the vision graph and its weights."""
        files = {name: file for name, file in self.files.items() if name.startswith(VISION)}
        return combined_sha256((name, file.sha256) for name, file in files.items())

    def write(self, directory: Path) -> None:
        """Write `bundle.json`."""
        text = json.dumps(asdict(self), indent=1)
        (directory / MANIFEST).write_text(text + "\n", encoding="utf-8")


@dataclass(frozen=True, slots=True)
class Bundle:
    """A bundle on disk whose manifest has been read and checked."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | Path, *, verify: bool = True) -> Self:
        """Read and check a bundle.

        Args:
            path: the bundle's directory.
            verify: also hash every file, and see that the graphs read no other. A job does so once; its
                workers need not.

        Raises:
            BundleError: no bundle, of another format, incomplete, or damaged.
        """
        path = Path(path).resolve()
        manifest = _read_manifest(path)
        for name, file in manifest.files.items():
            _check_file(path, name, file, verify=verify)
            if verify and name.endswith(".onnx"):
                _check_weights(path, name, manifest.files)
        return cls(path, manifest)

    @property
    def sha256(self) -> str:
        """Identifies what the bundle answers with: a hash of its files' hashes."""
        return combined_sha256((name, file.sha256) for name, file in self.manifest.files.items())

    def in_fp32(self) -> "Bundle | None":
        """The same checkpoint in fp32, if it was exported too: for rows whose numbers fail here."""
        if f"{FP32}/{MANIFEST}" not in self.manifest.files:
            return None
        return Bundle.load(self.path / FP32, verify=False)

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: the manifest does not list it.
        """
        if name not in self.manifest.files:
            raise BundleError(f"{self.path} has no {name}: export the checkpoint again")
        return self.path / name


class InFp32(Generic[Made]):
    """What is made of a bundle in fp32, when it is first asked for; threads may share it.

    Args:
        bundle: that may hold its checkpoint in fp32 too.
        make: of the bundle in fp32.
    """

    def __init__(self, bundle: Bundle, make: Callable[[Bundle], Made]) -> None:
        self._bundle, self._make = bundle, make
        #: None until it is asked for, and where there is no bundle in fp32.
        self.made: Made | None = None
        self._lock = threading.Lock()

    def get(self) -> Made | None:
        """The same for all who ask; None where there is no bundle in fp32."""
        with self._lock:
            bundle = self._bundle.in_fp32() if self.made is None else None
            if bundle is not None:
                self.made = self._make(bundle)
            return self.made


def part_names(vision: int, decoder: int) -> list[str]:
    """Names of what the states of a row pass, for towers of so many layers, in order."""
    return [
        "patch embedding", *(f"vision block {k}" for k in range(vision)), "merger",
        "embedding", *(f"decoder layer {k}" for k in range(decoder)), "head",
    ]  # fmt: skip


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def combined_sha256(hashes: Iterable[tuple[str, str]]) -> str:
    """One hash of many named hashes, whatever their order."""
    lines = "".join(f"{name} {digest}\n" for name, digest in sorted(hashes))
    return hashlib.sha256(lines.encode()).hexdigest()


def _read_manifest(path: Path) -> Manifest:
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise BundleError(
            f"{path} is no bundle ({MANIFEST}: {error.strerror}): make one with `python -m export`"
        ) from error
    try:
        version = json.loads(text).get("format_version")
        if version != FORMAT_VERSION:
            newer = isinstance(version, int) and version > FORMAT_VERSION
            raise BundleError(
                f"{path} has bundle format {version}, this qvl-batch reads {FORMAT_VERSION}: "
                f"{'update qvl-batch' if newer else 'export the checkpoint again'}"
            )
        return TypeAdapter(Manifest).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        if first["type"] == "unexpected_keyword_argument":
            raise BundleError(
                f"{path / MANIFEST} has an unknown key {where}: export the checkpoint again, or update qvl-batch"
            ) from error
        raise BundleError(f"{path / MANIFEST}: {where}: {first['msg']}") from error
    except (ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path / MANIFEST} is not valid JSON: {error}") from error


def _check_file(bundle: Path, name: str, file: File, *, verify: bool) -> None:
    path = bundle / name
    if not path.resolve().is_relative_to(bundle):
        raise BundleError(f"{bundle / MANIFEST} lists {name}, which is outside the bundle")
    if not path.is_file():
        raise BundleError(f"{bundle} lacks {name}: copy the bundle again")
    if path.stat().st_size != file.size:
        raise BundleError(f"{path} has {path.stat().st_size} bytes, not {file.size}: copy the bundle again")
    if verify and file_sha256(path) != file.sha256:
        raise BundleError(f"{path} is damaged (its SHA-256 differs): copy the bundle again")


def _check_weights(bundle: Path, name: str, files: Container[str]) -> None:
    """Hashes say that files are those of the export; only this says that a graph reads no others."""
    try:
        locations = external_locations((bundle / name).read_bytes())
    except ValueError as error:
        raise BundleError(f"{bundle / name} is no ONNX graph ({error}): export the checkpoint again") from error
    for location in sorted(locations):
        if (PurePosixPath(name).parent / location).as_posix() not in files:
            raise BundleError(
                f"{bundle / name} takes weights from {location}, which {MANIFEST} does not list: "
                "do not use this bundle, export the checkpoint again"
            )
