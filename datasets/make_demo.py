"""Write datasets/demo/questions.parquet: 64 scenes, a question each, and the true answers.

    python datasets/make_demo.py datasets/demo/questions.parquet [--rows 64] [--seed 7]

Images have the layout of Hugging Face datasets, struct<bytes, path>, in three formats, three modes
and many sizes. Training does not use this seed.
"""

import argparse
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scenes import FORMATS, Scene, encode, questions, render, sample_scene

KINDS = ("describe", "color", "count", "left of", "above", "size", "presence", "describe")


def demo_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Rows of `id`, `image`, `prompt` and `expected`, kinds of question in turn."""
    rng = np.random.default_rng((seed, 2025))
    return [_row(rng, index) for index in range(count)]


def _row(rng: np.random.Generator, index: int) -> dict[str, object]:
    kind = KINDS[index % len(KINDS)]
    mode = ("RGB", "RGB", "RGBA", "RGB", "L")[index % 5]
    scene = _scene_with(rng, kind, grey=mode == "L")
    image = render(scene, int(rng.integers(240, 900)), transparent=mode == "RGBA")
    file_format = FORMATS[(index // 2) % len(FORMATS)]
    if mode == "RGBA" and file_format == "JPEG":
        file_format = "PNG"
    data = encode(image.convert("L") if mode == "L" else image, file_format)
    pairs = questions(scene)[kind]
    prompt, expected = pairs[int(rng.integers(len(pairs)))]
    path = f"scene-{index:04d}.{file_format.lower()}"
    return {"id": f"scene-{index:04d}", "image": {"bytes": data, "path": path}, "prompt": prompt, "expected": expected}


def _scene_with(rng: np.random.Generator, kind: str, *, grey: bool) -> Scene:
    """A scene that allows a question of this kind: a relation needs two shapes."""
    while True:
        scene = sample_scene(rng, grey=grey)
        if questions(scene)[kind]:
            return scene


def write_demo(path: Path, count: int, seed: int) -> None:
    """Write the parquet file."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("id", pa.string()), ("image", image), ("prompt", pa.string()), ("expected", pa.string())])
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(demo_rows(count, seed), schema), path, row_group_size=16)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    write_demo(args.output, args.rows, args.seed)
