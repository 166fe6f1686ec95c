"""Write scenes, a question each, and the true answers, as a parquet file.

    python datasets/make_demo.py datasets/demo/questions.parquet
    python datasets/make_demo.py build/native.parquet --rows 500 --seed 11 --style native

Styles, all with the columns `id`, `image` and `expected`:

    fixed       one image of 240 to 900 pixels, nearly a square, and `prompt`; it is for images fitted to a square; with
                `choices`, null where the question is for a description
    native      one image of 28 x 28 pixels to about a megapixel, up to 20 times as long as wide, and `prompt`
    pairs       two such images, in a list, and `prompt`
    turns       one such image, and `messages`: a question, its answer, and a question that refers to them
    text-first  one such image, and `messages`: a question before its image
    next-image  two such images, in a list, and `messages`: a question about one, its answer, and the next image
    json        one such image, at most as large as 280 x 280, and `prompt`, which wants JSON; so is
                `demo/scenes.parquet`, of 24 rows
    mixed       rows of the five before `json` in turn, all with images in a list, `messages`, and `prompt`, their text
                to be read; so is `demo/conversations.parquet`, of 40 rows

An image has the layout of Hugging Face datasets, struct<bytes, path>; there are three formats and three modes.
`messages` has the layout that chat templates take: a list of struct<role, content>, content a list of
struct<type, text>; a part of type `image` stands for the row's next image. Training does not use this seed.
"""

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from scenes import (
    COLORS,
    FORMATS,
    GREYS,
    NATIVE_AREAS,
    RADIUS,
    SMALL_AREAS,
    Scene,
    encode,
    follow_ups,
    json_questions,
    next_image_questions,
    pair_questions,
    questions,
    render,
    sample_native_scene,
    sample_scene,
    sample_size,
)

KINDS = ("describe", "color", "count", "left of", "above", "size", "presence", "describe")
#: All answers to a question of a kind that has few.
CHOICES = {
    "color": [*COLORS, *GREYS],
    "count": ["1", "2", "3"],
    "size": [*RADIUS],
    **{kind: ["yes", "no"] for kind in ("presence", "left of", "above")},
}
#: Kinds of question of each style, in turn.
NATIVE_KINDS = {
    "native": ("describe", "color", "count", "left of", "above", "size", "presence"),
    "pairs": ("which has", "both", "more", "count in", "color in", "describe in"),
    "turns": ("its size", "its color", "color of it", "another", "and a", "above it", "what are they"),
    "text-first": ("describe", "color", "count", "left of", "above", "size", "presence"),
    "next-image": ("count here", "presence here", "describe here"),
    "json": ("as json",),
}
MIXED = "mixed"
#: Styles of rows in a file of `MIXED`.
MIXED_STYLES = ("native", "pairs", "turns", "text-first", "next-image")
#: Styles of rows; files can also be of `MIXED`.
STYLES = ("fixed", *NATIVE_KINDS)
#: Parquet types of an image, and of messages.
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
PART = pa.struct([("type", pa.string()), ("text", pa.string())])
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(PART))]))
#: Questions of each style about its scenes, by kind: all texts in turn, the expected answer last.
QUESTIONS: dict[str, Callable[..., dict[str, list[tuple[str, ...]]]]] = {
    "native": questions,
    "pairs": pair_questions,
    "turns": follow_ups,
    "text-first": questions,
    "next-image": next_image_questions,
    "json": json_questions,
}


@dataclass(frozen=True)
class NativeRow:
    """A row of scenes at their own size: the images' bytes and formats, messages as chat templates take them, and the
    expected answer.
    """

    kind: str
    scenes: tuple[Scene, ...]
    images: tuple[tuple[bytes, str], ...]
    messages: list[dict[str, Any]]
    expected: str


def demo_rows(count: int, seed: int) -> list[dict[str, object]]:
    """Rows of `id`, `image`, `prompt`, `choices` and `expected` for images fitted to a square, kinds of question in
    turn.
    """
    rng = np.random.default_rng((seed, 2025))
    return [_row(rng, index) for index in range(count)]


def _row(rng: np.random.Generator, index: int) -> dict[str, object]:
    kind = KINDS[index % len(KINDS)]
    mode = ("RGB", "RGB", "RGBA", "RGB", "L")[index % 5]
    scene = _scene_with(rng, kind, grey=mode == "L")
    image = render(scene, int(rng.integers(240, 900)), transparent=mode == "RGBA")
    data, file_format = _file(image, mode, FORMATS[(index // 2) % len(FORMATS)])
    pairs = questions(scene)[kind]
    prompt, expected = pairs[int(rng.integers(len(pairs)))]
    path = f"scene-{index:04d}.{file_format.lower()}"
    return {
        "id": f"scene-{index:04d}",
        "image": {"bytes": data, "path": path},
        "prompt": prompt,
        "choices": CHOICES.get(kind),
        "expected": expected,
    }


def native_rows(style: str, count: int, seed: int) -> list[NativeRow]:
    """Rows of any other style, kinds of question in turn."""
    rng = np.random.default_rng((seed, 2026, STYLES.index(style)))
    kinds = NATIVE_KINDS[style]
    return [_native_row(rng, style, kinds[index % len(kinds)]) for index in range(count)]


def _native_row(rng: np.random.Generator, style: str, kind: str) -> NativeRow:
    images = 2 if style in {"pairs", "next-image"} else 1
    modes = ["L" if rng.random() < 0.2 else "RGBA" if rng.random() < 0.2 else "RGB" for _ in range(images)]
    while True:
        sizes = [sample_size(rng, SMALL_AREAS if style == "json" else NATIVE_AREAS) for _ in modes]
        scenes = tuple(
            sample_native_scene(rng, *size, grey=mode == "L") for size, mode in zip(sizes, modes, strict=True)
        )
        asked = QUESTIONS[style](*scenes)[kind]
        if asked:
            break
    texts = _balanced(rng, asked)
    files = []
    for scene, size, mode in zip(scenes, sizes, modes, strict=True):
        image = render(scene, max(size), transparent=mode == "RGBA")
        files.append(_file(image, mode, FORMATS[rng.integers(len(FORMATS))]))
    return NativeRow(kind, scenes, tuple(files), _messages(style, texts[:-1]), texts[-1])


def _balanced(rng: np.random.Generator, asked: list[tuple[str, ...]]) -> tuple[str, ...]:
    """One of the questions; all answers that any of them has are equally likely."""
    answers = sorted({texts[-1] for texts in asked})
    answer = answers[rng.integers(len(answers))]
    some = [texts for texts in asked if texts[-1] == answer]
    return some[rng.integers(len(some))]


def _messages(style: str, texts: tuple[str, ...]) -> list[dict[str, Any]]:
    """Texts in turn, with the images where the style has them."""
    image = {"type": "image", "text": None}
    parts = [[{"type": "text", "text": text}] for text in texts]
    match style:
        case "text-first":
            parts[0] = [*parts[0], image]
        case "pairs":
            parts[0] = [image, image, *parts[0]]
        case "next-image":
            parts[0], parts[2] = [image, *parts[0]], [image, *parts[2]]
        case _:
            parts[0] = [image, *parts[0]]
    return [{"role": ("user", "assistant")[turn % 2], "content": content} for turn, content in enumerate(parts)]


def _file(image: Image.Image, mode: str, file_format: str) -> tuple[bytes, str]:
    """Bytes of an image file and its format, PNG where the format has no alpha."""
    if mode == "RGBA" and file_format == "JPEG":
        file_format = "PNG"
    return encode(image.convert("L") if mode == "L" else image, file_format), file_format


def _scene_with(rng: np.random.Generator, kind: str, *, grey: bool) -> Scene:
    """A scene that allows a question of this kind: a relation needs two shapes."""
    while True:
        scene = sample_scene(rng, grey=grey)
        if questions(scene)[kind]:
            return scene


def write_demo(path: Path, count: int, seed: int, style: str = "fixed") -> None:
    """Write the parquet file."""
    is_plain = style in {"fixed", "native", "pairs", "json"}
    asks = [("prompt", pa.string())] if is_plain or style == MIXED else []
    asks += [] if is_plain else [("messages", MESSAGES)]
    asks += [("choices", pa.list_(pa.string()))] if style == "fixed" else []
    images = pa.list_(IMAGE) if style in {"pairs", "next-image", MIXED} else IMAGE
    schema = pa.schema([("id", pa.string()), ("image", images), *asks, ("expected", pa.string())])
    if style == "fixed":
        rows = demo_rows(count, seed)
    else:
        rows = [_record(row, name, schema) for name, row in _named_rows(style, count, seed)]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=16)


def _named_rows(style: str, count: int, seed: int) -> Iterator[tuple[str, NativeRow]]:
    """Rows with their ids."""
    styles = MIXED_STYLES if style == MIXED else (style,)
    by_style = {each: native_rows(each, -(-count // len(styles)), seed) for each in styles}
    for index in range(count):
        at, turn = divmod(index, len(styles))
        yield f"{styles[turn]}-{at:04d}", by_style[styles[turn]][at]


def _record(row: NativeRow, name: str, schema: pa.Schema) -> dict[str, object]:
    """The row of the table."""
    images = [
        {"bytes": data, "path": f"{name}-{i}.{file_format.lower()}"} for i, (data, file_format) in enumerate(row.images)
    ]
    is_text = "messages" not in schema.names
    prompt = row.messages[0]["content"][-1]["text"] if is_text else _readable(row.messages)
    record = {
        "id": name,
        "image": images[0] if schema.field("image").type == IMAGE else images,
        "prompt": prompt,
        "messages": row.messages,
        "expected": row.expected,
    }
    return {column: record[column] for column in schema.names}


def _readable(messages: list[dict[str, Any]]) -> str:
    """Messages as one text."""
    turns = (" ".join(part["text"] or "[image]" for part in message["content"]) for message in messages)
    return " / ".join(turns)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--style", choices=(*STYLES, MIXED), default="fixed")
    args = parser.parse_args()
    write_demo(args.output, args.rows, args.seed, args.style)
