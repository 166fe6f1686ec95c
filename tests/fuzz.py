"""Decode thousands of damaged images, and see that each becomes pixels or an error that says why not.

    python tests/fuzz.py [--images 10000] [--seed 0] [--save build/fuzz]

Small images of every accepted format are damaged: bytes flipped, cut, grown, spliced from two files,
parts repeated, numbers set to extremes. They go through the job's own function in a process of its own,
so that a crash, a hang and a peak of memory are seen. Exit status 1 says that there was one, or an
exception or a warning that leaves the function; the file is then kept and named.
"""

import argparse
import io
import json
import os
import re
import resource
import select
import signal
import struct
import subprocess
import sys
import time
import traceback
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
from PIL import Image
from profiles import PROPHOTO, rgb_profile
from tiffs import tiff

from qvl_batch.bundle.layout import Resolution
from qvl_batch.config import ImageRules
from qvl_batch.images.formats import FORMATS
from qvl_batch.images.pixels import Seen, seen_or_failure
from qvl_batch.images.view import View
from qvl_batch.schema import Failure

pillow_heif.register_heif_opener()  # to save such files

ROOT = Path(__file__).parent.parent
#: How images are seen: as a square, or at their own size.
VIEWS = (View.square(56), View(Resolution(28, None, 56 * 56, 112 * 112), None))
#: Longest an image may take: the largest that is accepted takes 2 s.
SECONDS = 30.0
#: Most memory of an image, in bytes: the largest WebP takes 1.4 GB, all others less.
PEAK = 1_600_000_000
#: Most address space of the process, so that a bomb does not end the machine.
SPACE = 6 << 30
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I", "I;16", "F")
#: What else a format has that its reader must understand, and the modes that have it.
OPTIONS: dict[str, tuple[tuple[set[str], dict[str, object]], ...]] = {
    "JPEG": (({"L", "RGB", "CMYK"}, {"progressive": True}), ({"L", "RGB"}, {"restart_marker_blocks": 1})),
    "TIFF": (
        *((set(MODES), {"compression": name}) for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd")),
        ({"1"}, {"compression": "group4"}),
        ({"L", "RGB"}, {"compression": "jpeg"}),
    ),
    "WEBP": (({"RGB", "RGBA"}, {"lossless": True}),),
    "JPEG2000": (({"L", "RGBA"}, {"no_jp2": True}), ({"RGB"}, {"tile_size": (16, 16)})),
}
PROFILE = rgb_profile(PROPHOTO, 1.8)
_SAMPLES = np.random.default_rng(0).integers(0, 4096, (32, 40, 3), np.uint16)
#: Of samples that Pillow does not read.
DEEP_TIFFS: tuple[dict[str, Any], ...] = (
    {"samples": _SAMPLES, "planar": True, "rows": 8},
    {"samples": _SAMPLES, "bits": 12, "order": ">"},
    {"samples": _SAMPLES[..., :1], "photometric": 0, "tile": 16, "compression": 8, "predictor": 2},
    {"samples": _SAMPLES[..., :2], "photometric": 1, "extra": (2,), "ahead": 500},
    {"samples": (_SAMPLES / 4096).astype(np.float32), "kind": 3, "compression": 8, "predictor": 3, "tile": 16},
)
ANIMATED = ("AVIF", "GIF", "PNG", "TIFF", "WEBP")
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


@dataclass
class Outcome:
    """How a fuzz ended: what became of the images, and the files of those that did harm."""

    counts: Counter[str] = field(default_factory=Counter)
    harmful: list[Path] = field(default_factory=list)
    slowest: float = 0.0
    largest: int = 0

    @property
    def passed(self) -> bool:
        """Every image became pixels or an error."""
        return not self.harmful

    def __str__(self) -> str:
        lines = [f"{count:7,} {name}" for name, count in self.counts.most_common()]
        lines += [f"slowest {self.slowest:.1f} s, most memory {self.largest / 1e6:,.0f} MB"]
        return "\n".join(lines + [f"kept    {path}" for path in self.harmful])


def fuzz(images: int, seed: int, save: Path) -> Outcome:
    """Damage and decode so many images."""
    outcome, seeds = Outcome(), list(_seeds())
    assert {kind for kind, _ in seeds} == set(FORMATS)
    decoder = Decoder()
    try:
        for number in range(images):
            kind, data = _damaged(np.random.default_rng((seed, number)), seeds)
            name, seconds, peak = decoder.decode(data)
            outcome.counts[name] += 1
            outcome.slowest, outcome.largest = max(outcome.slowest, seconds), max(outcome.largest, peak)
            if not name.startswith(("decoded", "refused")):
                save.mkdir(parents=True, exist_ok=True)
                path = save / f"{seed}-{number}-{name.replace(' ', '-')}.{kind.lower()}"
                path.write_bytes(data)
                outcome.harmful.append(path)
                print(f"image {number}: {name}: {path}", flush=True)
            if number % 1000 == 999:
                print(f"{number + 1:,} of {images:,} images", flush=True)
    finally:
        decoder.stop()
    return outcome


class Decoder:
    """The process that decodes; a new one where it ended."""

    def __init__(self, program: Sequence[str] = (__file__, "--decode")) -> None:
        self._command = [sys.executable, *program]
        self._start()

    def _start(self) -> None:
        env = os.environ | {
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
        }
        # libtiff writes what it thinks of a file to the error stream; that is no Python warning.
        self._process = subprocess.Popen(
            self._command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )

    def decode(self, data: bytes) -> tuple[str, float, int]:
        """What became of an image, in how many seconds, with how many bytes of memory."""
        process, began = self._process, time.monotonic()
        try:
            process.stdin.write(struct.pack("<Q", len(data)) + data)
            process.stdin.flush()
            answered = bool(select.select([process.stdout], [], [], SECONDS)[0])
            line = process.stdout.readline() if answered else b""
        except BrokenPipeError:
            answered, line = True, b""
        if line:
            found = json.loads(line)
            heavy = found["peak"] > PEAK or "MemoryError" in found["name"]
            return ("too much memory" if heavy else found["name"]), time.monotonic() - began, found["peak"]
        if not answered:
            process.kill()
        self.stop()
        self._start()
        how = f"crashed with {signal.Signals(-process.returncode).name}" if process.returncode < 0 else "exited"
        return (how if answered else "hung"), time.monotonic() - began, 0

    def stop(self) -> None:
        """End the process: nothing more is to be decoded."""
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def decode_all() -> None:
    """Read images, answer what became of each."""
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while header := sys.stdin.buffer.read(8):
        data = sys.stdin.buffer.read(*struct.unpack("<Q", header))
        forget_peak()
        before = peak_memory()
        name = _outcome(data)
        print(json.dumps({"name": name, "peak": peak_memory() - before}), flush=True)


def _outcome(data: bytes) -> str:
    warned: list[object] = []
    warnings.resetwarnings()
    warnings.simplefilter("always")
    warnings.showwarning = lambda message, *_: warned.append(message)
    view, rules = VIEWS[len(data) // 2 % 2], ImageRules(allow_truncated=len(data) % 2 == 0)
    try:
        result = seen_or_failure(data, view, rules)
    except BaseException as error:
        traceback.print_exc()
        return f"raised {type(error).__name__}"
    if warned:
        return f"warned {type(warned[0]).__name__}"
    if isinstance(result, Failure):
        known = re.match(r"(\w+(Error|Warning)):", result.message)
        first = known[1] if known else re.sub(r"[\d,]+", "N", " ".join(result.message.split()[:5]))
        return f"refused: {first}"
    if not isinstance(result, Seen):
        return "gave no pixels"
    width, height = view.size_of(result.size.width, result.size.height)
    kind = result.pixels.dtype, result.pixels.shape
    return "decoded" if kind == (np.uint8, (height, width, 3)) else "gave no pixels"


def forget_peak() -> None:
    """Count this process's peak of memory from here on."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """Most bytes that this process held at a time."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def _seeds() -> Iterator[tuple[str, bytes]]:
    """Images of every format, in every mode that it has."""
    Image.init()
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "What it shows"
    for kind in (kind for kind in FORMATS if kind in Image.SAVE):
        for mode in MODES:
            more = [options for modes, options in OPTIONS.get(kind, ()) if mode in modes]
            for options in ({}, {"exif": exif}, {"icc_profile": PROFILE}, *more):
                yield from _saved(kind, _picture(mode), options)
        if kind == "TIFF":
            yield from ((kind, tiff(**options)) for options in DEEP_TIFFS)
        if kind in ANIMATED:
            frames = [_picture("RGB").rotate(90 * turn) for turn in range(1, 4)]
            yield from _saved(kind, _picture("RGB"), {"save_all": True, "append_images": frames})


def _saved(kind: str, image: Image.Image, options: dict[str, object]) -> Iterator[tuple[str, bytes]]:
    buffer = io.BytesIO()
    try:
        image.save(buffer, kind, **options)
    except (OSError, ValueError, KeyError, SystemError):
        return  # the format does not have this mode, or not with these options
    yield kind, buffer.getvalue()


def _picture(mode: str) -> Image.Image:
    shades = np.random.default_rng(0).integers(0, 256, (4, 5, 4), np.uint8)
    picture = Image.fromarray(shades, "RGBA").resize((40, 32), Image.Resampling.BICUBIC)
    if mode in {"RGBA", "LA"}:
        return picture.convert(mode)
    grey = picture.convert("RGB").convert("L")
    return grey.convert(mode) if mode.startswith(("I", "F", "1")) else _coloured(picture.convert("RGB"), mode)


def _coloured(picture: Image.Image, mode: str) -> Image.Image:
    if mode == "LAB":
        return Image.merge("LAB", picture.split())
    if mode == "PA":
        return picture.convert("P").convert("PA")
    return picture.convert(mode)


def _damaged(rng: np.random.Generator, seeds: list[tuple[str, bytes]]) -> tuple[str, bytes]:
    """An image, damaged in one to three ways."""
    kinds = sorted({kind for kind, _ in seeds})
    kind = str(rng.choice(kinds))
    files = [data for of_kind, data in seeds if of_kind == kind]
    data = files[rng.integers(len(files))]
    for _ in range(int(rng.choice([1, 1, 2, 3]))):
        other = files if rng.random() < 0.7 else [each for _, each in seeds]
        damage = DAMAGES[rng.integers(len(DAMAGES))]
        data = damage(rng, data or b"\0", other[rng.integers(len(other))])
    if rng.random() < 0.7:
        data = _checksums_mended(data)
    return kind, data


def _place(rng: np.random.Generator, data: bytes) -> int:
    """Often in the first bytes, where headers are."""
    return int(rng.integers(min(len(data), 64) if rng.random() < 0.3 else len(data)))


def _flipped(rng: np.random.Generator, data: bytes, _other: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 17)):
        damaged[_place(rng, data)] = rng.integers(256)
    return bytes(damaged)


def _cut(rng: np.random.Generator, data: bytes, _other: bytes) -> bytes:
    start = _place(rng, data)
    if rng.random() < 0.5:
        return data[:start]
    return data[:start] + data[start + int(rng.integers(1, 65)) :]


def _grown(rng: np.random.Generator, data: bytes, _other: bytes) -> bytes:
    at = len(data) if rng.random() < 0.3 else _place(rng, data)
    return data[:at] + rng.bytes(rng.integers(1, 257)) + data[at:]


def _spliced(rng: np.random.Generator, data: bytes, other: bytes) -> bytes:
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _repeated(rng: np.random.Generator, data: bytes, _other: bytes) -> bytes:
    start = _place(rng, data)
    stop = start + int(rng.integers(1, 257))
    return data[:start] + data[start:stop] * int(2 ** rng.uniform(1, 10)) + data[stop:]


def _extreme(rng: np.random.Generator, data: bytes, _other: bytes) -> bytes:
    damaged = bytearray(data)
    for _ in range(rng.integers(1, 4)):
        size, value = int(rng.choice([1, 2, 4])), EXTREMES[rng.integers(len(EXTREMES))]
        at = _place(rng, data)
        number = (value & (256**size - 1)).to_bytes(size, "big" if rng.random() < 0.5 else "little")
        damaged[at : at + size] = number[: len(damaged) - at]
    return bytes(damaged)


DAMAGES = (_flipped, _cut, _grown, _spliced, _repeated, _extreme)


def _checksums_mended(data: bytes) -> bytes:
    """A PNG with the checksums that its chunks have now, or its reader would look no further."""
    mended = bytearray(data)
    at = data.find(b"\x89PNG\r\n\x1a\n") + 8
    while at >= 8 and at + 12 <= len(data):
        stop = at + 8 + int.from_bytes(data[at : at + 4])
        mended[stop : stop + 4] = struct.pack(">I", zlib.crc32(data[at + 4 : stop])) if stop + 4 <= len(data) else b""
        at = stop + 4
    return bytes(mended)


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--save", type=Path, default=Path("build/fuzz"), help="folder for files that did harm")
    parser.add_argument("--decode", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.decode:
        decode_all()
        return 0
    began = time.time()
    outcome = fuzz(options.images, options.seed, options.save)
    print(f"{options.images:,} damaged images, {(time.time() - began) / 60:.1f} minutes:\n{outcome}")
    return 0 if outcome.passed else 1


if __name__ == "__main__":
    sys.exit(main())
