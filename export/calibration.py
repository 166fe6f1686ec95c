"""`python -m export.calibration`: what tools that quantize feed to the plain graphs, from a user's own rows.

What enters: a bundle and rows of the input, read, seen and laid out as the job does. What leaves: a folder with one
`.npz` for each row, whose arrays are the inputs of `decoder_full.onnx`, one for each image, with the pixels that
`vision_full.onnx` takes, and `calibration.json`, which says which row is where. Only one row is in memory at a time.

    DIR/decoder/000000.npz   input_ids, attention_mask (1, S), image_embeds (1, S, D); position_ids (3, 1, S) where the
                             bundle shows images at their own size
    DIR/vision/000000.npz    pixels (1, H, W, 3)
    DIR/calibration.json     the bundle, rows in order with their files, and rows that were left out
"""

import itertools
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader

from export.sample import INDEX, SampleRows
from qvl_batch.bundle.layout import mrope_positions
from qvl_batch.bundle.loading import Bundle
from qvl_batch.bundle.manifest import Manifest
from qvl_batch.command_line import exit_status, settings, stop_as_by_ctrl_c
from qvl_batch.config import Fit, JobConfig, check_at_least_one
from qvl_batch.decoder.decoder import PrefillRow
from qvl_batch.decoder.prompts import RowLayout
from qvl_batch.errors import ConfigError, InputError, JobError, RowError
from qvl_batch.runtime.devices import usable_cpus
from qvl_batch.schema import Failure
from qvl_batch.vision.encoder import VisionEncoder

Graph = Literal["decoder", "vision"]
Feeds = dict[str, NDArray[Any]]
#: Rows of the input that are read at a time.
ROWS_AT_ONCE = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationConfig(JobConfig):
    """Write what tools that quantize feed to a bundle's plain graphs: one .npz for each row, and one for each image."""

    bundle: Annotated[str, tyro.conf.Positional]
    """Folder of the bundle in fp32, or its address."""
    output: str
    """Folder for the files."""
    fit: Fit | None = None
    """How an image that is not square becomes square. By default, letterbox.
    Not for a bundle that shows images at their own size."""
    limit: int | None = 256
    """Use only the first LIMIT rows."""
    pad_to: int | None = None
    """Pad rows to this many tokens, since ONNX Runtime's percentile and entropy calibration want inputs of one shape.
    Longer rows are left out."""
    overwrite: bool = False
    """Delete the calibration that the output folder already holds."""
    # Options of a job that mean nothing here.
    max_new_tokens: tyro.conf.Suppress[int] = 1
    retry_errors: tyro.conf.Suppress[bool] = False

    def __post_init__(self) -> None:
        """Refuse values that cannot work on any machine.

        Raises:
            ConfigError: names the option, what it was, and what it may be.
        """
        JobConfig.__post_init__(self)  # `super()` without arguments finds no class with slots
        check_at_least_one(self, "pad_to")


class CalibrationReader(CalibrationDataReader):
    """What `python -m export.calibration` wrote, as ONNX Runtime's tools read it.

    Args:
        folder: the folder.
        graph: whose inputs.
        rows: use only so many.

    Raises:
        InputError: the folder holds no calibration.
    """

    def __init__(self, folder: str | Path, graph: Graph = "decoder", rows: int | None = None) -> None:
        if not (Path(folder) / INDEX).is_file():
            raise InputError(f"{folder} has no {INDEX}: make one with `python -m export.calibration`")
        self._files = sorted((Path(folder) / graph).glob("*.npz"))[:rows]
        self.rewind()

    def __len__(self) -> int:
        return len(self._files)

    def rewind(self) -> None:
        """Begin again with the first file."""
        self._left = iter(self._files)

    def get_next(self) -> Feeds | None:
        """Inputs of the next run by their names; None after the last."""
        path = next(self._left, None)
        return None if path is None else dict(np.load(path))


def calibrate(config: CalibrationConfig, say: Callable[[str], None] = lambda _: None) -> int:
    """Write the files.

    Args:
        config: of which rows, and where to.
        say: receives a line about rows that are left out.

    Returns:
        How many rows were written.

    Raises:
        JobError: bundle, input or output cannot be used, or no row can.
    """
    bundle, output = Bundle.load(config.bundle), Path(config.output)
    rows = SampleRows(config, RowLayout(bundle, config.system_prompt), config.fit, config.pad_to)
    _clear(output, overwrite=config.overwrite)
    vision = VisionEncoder(bundle, usable_cpus())
    written: list[dict[str, Any]] = []
    left_out: list[dict[str, Any]] = []
    images = itertools.count()
    for place, found in rows:
        row = asdict(place)
        if isinstance(found, Failure):
            left_out.append(row | asdict(found))
            continue
        try:
            features = [vision.encode(pixels) for pixels in found.pixels]
        except RowError as error:
            left_out.append(row | asdict(Failure.of(error)))
            continue
        own = [f"vision/{next(images):06}.npz" for _ in found.pixels]
        for file, pixels in zip(own, found.pixels, strict=True):
            np.savez(output / file, pixels=pixels[None])
        file = f"decoder/{len(written):06}.npz"
        feeds = decoder_feeds(PrefillRow(found.input_ids, found.images, features), bundle.manifest, config.pad_to)
        np.savez(output / file, allow_pickle=False, **feeds)
        written.append(row | {"decoder": file, "vision": own})
    if left_out:
        first = left_out[0]
        say(f"left out  {len(left_out)} rows; the first, {first['id']}: {first['type']}: {first['message']}")
    if not written:
        raise JobError(f"none of the {len(left_out)} rows can be used: there is nothing to calibrate on")
    index = {"bundle": bundle.sha256, "rows": written, "left_out": left_out}
    (output / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return len(written)


def decoder_feeds(row: PrefillRow, manifest: Manifest, pad_to: int | None = None) -> Feeds:
    """Inputs of `decoder_full.onnx` for one row.

    Args:
        row: its tokens, images and features.
        manifest: of the bundle.
        pad_to: tokens to pad the row to, on the right; None for no padding.
    """
    length = len(row.input_ids)
    size = pad_to or length
    ids = np.full((1, size), manifest.generation.pad_token_id)
    ids[0, :length] = row.input_ids
    embeds = np.zeros((1, size, manifest.decoder.hidden_size), np.float32)
    for image, found in zip(row.images, row.features, strict=True):
        embeds[0, image.start : image.stop] = found
    mask = (np.arange(size) < length).astype(np.int64)[None]
    feeds: Feeds = {"input_ids": ids, "attention_mask": mask, "image_embeds": embeds}
    if manifest.layout.resolution.is_native:
        feeds["position_ids"] = mrope_positions(size, row.images)[:, None]
    return feeds


def _clear(output: Path, *, overwrite: bool) -> None:
    """Make the folders, without an earlier calibration's files."""
    folders = [output / "decoder", output / "vision"]
    old = [path for path in (output / INDEX, *folders) if path.exists()]
    if old and not overwrite:
        raise ConfigError(f"--output {output} holds a calibration already: give another one, or --overwrite")
    for path in old:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    for folder in folders:
        folder.mkdir(parents=True)


def work() -> int:
    """Write the files and say where they are; returns the exit status."""
    config = settings(CalibrationConfig, prog="python -m export.calibration")
    rows = calibrate(config, say=lambda line: print(line, file=sys.stderr, flush=True))
    print(f"{config.output}: {rows} rows")
    return 0


def main() -> int:
    """Run the command; 0 if there is a calibration, 1 if not, 130 if it was stopped."""
    stop_as_by_ctrl_c()
    return exit_status("calibration", work, stopped=lambda: "the folder is not complete", expected=(JobError, OSError))


if __name__ == "__main__":
    sys.exit(main())
