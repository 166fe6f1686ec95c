"""Scenes of one to three coloured shapes, with questions and their true answers.

What leaves: a `Scene` (positions and sizes as fractions, so that it renders at any
resolution), its PIL image, and questions with answers that are true of it: about one scene, about two,
with a follow-up, and for JSON. Every answer is unambiguous by construction: shapes differ in kind, and any two are
at least `MIN_GAP` apart in x and in y, so "left of" and "above" always have a clear answer.

A scene of `sample_scene` is drawn at a size that its user chooses. One of `sample_native_scene` is for one
size in pixels, from 28 x 28 to about a megapixel and up to 20 times as wide as high or as high as wide, and
holds only what can be seen at that size.

This module knows nothing of models, tokenizers or parquet.
"""

import io
import json
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLORS = {
    "red": (214, 36, 36),
    "orange": (245, 140, 20),
    "yellow": (240, 220, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 214),
    "purple": (140, 50, 170),
}
GREYS = {"black": (15, 15, 15), "gray": (105, 105, 105), "white": (250, 250, 250)}

#: Radius of a shape, drawn uniformly from its range, as a fraction of the longer side or, in a scene more than twice
#: as long as it is short, of twice the shorter side.
RADIUS = {"small": (0.055, 0.075), "large": (0.125, 0.155)}
#: Least distance of two centres in x and in y, as a fraction of the same length.
MIN_GAP = 0.11
#: In a native scene, the least radius of a shape and the least distance of two centres in x and in y, in pixels. The
#: tiny checkpoint learned both at 224 x 224, where they are 12 and 25.
LEGIBLE = 10
LEGIBLE_GAP = 24
#: Largest radius of the only shape of a very small scene, as a fraction of the shorter side.
FILLING = 0.42
#: Least side of a native scene in pixels, and its area, as a multiple of the area of the smallest: how likely a range
#: is, and the range, in which the area is drawn log-uniformly.
NATIVE_SIDE = 28
Ranges = tuple[tuple[float, float, float], ...]
NATIVE_AREAS: Ranges = ((0.14, 1, 9), (0.82, 9, 400), (0.04, 400, 1350))
#: The same, for images that are described as JSON.
SMALL_AREAS: Ranges = ((0.1, 1, 9), (0.9, 9, 100))
#: Longer side over shorter: how likely a range is, and the range.
NATIVE_PROPORTIONS: Ranges = ((0.65, 1, 2), (0.25, 2, 4), (0.1, 4, 20))
ORDINALS = ("first", "second")
FORMATS = ("PNG", "JPEG", "WEBP")
#: Images are drawn this many times larger and reduced, for smooth edges.
SUPERSAMPLE = 2


@dataclass(frozen=True)
class Shape:
    """One shape; `x`, `y` and `radius` are fractions of the image's longer side."""

    kind: str
    color: str
    size: str
    x: float
    y: float
    radius: float
    rgb: tuple[int, int, int]

    @property
    def phrase(self) -> str:
        """Size, colour and kind, for example `large red circle`."""
        return f"{self.size} {self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Shapes from left to right on a plain background; `aspect` is width over height."""

    shapes: tuple[Shape, ...]
    aspect: float
    background: tuple[int, int, int]

    @property
    def extent(self) -> tuple[float, float]:
        """Width and height as fractions of the longer side."""
        return min(1.0, self.aspect), min(1.0, 1.0 / self.aspect)


def sample_scene(rng: np.random.Generator, *, grey: bool = False) -> Scene:
    """A random scene; `grey` uses only black, gray and white, which survive a greyscale file."""
    while True:
        aspect = float(np.exp(rng.uniform(np.log(0.65), np.log(1.55))))
        scene = Scene((), aspect, _background(rng, grey=grey))
        shapes = _place(rng, scene.extent, int(rng.integers(1, 4)), GREYS if grey else COLORS)
        if shapes is not None:
            ordered = tuple(sorted(shapes, key=lambda shape: shape.x))
            return Scene(ordered, aspect, scene.background)


def sample_size(rng: np.random.Generator, areas: Ranges = NATIVE_AREAS) -> tuple[int, int]:
    """A random width and height in pixels, for a native scene."""
    area = NATIVE_SIDE**2 * _log_uniform(rng, areas)
    proportion = min(_log_uniform(rng, NATIVE_PROPORTIONS), area / NATIVE_SIDE**2)
    longer, shorter = round(math.sqrt(area * proportion)), round(math.sqrt(area / proportion))
    return (longer, shorter) if rng.random() < 0.5 else (shorter, longer)


def sample_native_scene(rng: np.random.Generator, width: int, height: int, *, grey: bool = False) -> Scene:
    """A random scene to be drawn at this size in pixels, with as many shapes as are legible there."""
    aspect, least = width / height, LEGIBLE / max(width, height)
    background = _background(rng, grey=grey)
    extent = Scene((), aspect, background).extent
    most = 1 if least > RADIUS["large"][1] * _reference(extent) else 3
    while True:
        shapes = _place(rng, extent, int(rng.integers(1, most + 1)), GREYS if grey else COLORS, least)
        if shapes is not None:
            return Scene(tuple(sorted(shapes, key=lambda shape: shape.x)), aspect, background)


def render(scene: Scene, longer_side: int, *, transparent: bool = False) -> Image.Image:
    """Draw `scene` so that its longer side has `longer_side` pixels.

    Returns an RGB image, or an RGBA one without a background if `transparent`.
    """
    scale = longer_side * SUPERSAMPLE
    width, height = (max(1, round(side * longer_side)) for side in scene.extent)
    mode, background = ("RGBA", (0, 0, 0, 0)) if transparent else ("RGB", scene.background)
    canvas = Image.new(mode, (width * SUPERSAMPLE, height * SUPERSAMPLE), background)
    draw = ImageDraw.Draw(canvas)
    for shape in scene.shapes:
        _draw(draw, shape, scale)
    return canvas.reduce(SUPERSAMPLE)


def encode(image: Image.Image, file_format: str) -> bytes:
    """Bytes of an image file; a transparent image becomes PNG where its format has no alpha."""
    if image.mode == "RGBA" and file_format == "JPEG":
        file_format = "PNG"
    buffer = io.BytesIO()
    image.save(buffer, file_format, **({} if file_format == "PNG" else {"quality": 90}))
    return buffer.getvalue()


def describe(scene: Scene) -> str:
    """The one true description: every shape with size, colour and kind, from left to right."""
    phrases = [f"a {shape.phrase}" for shape in scene.shapes]
    match phrases:
        case [only]:
            text = only
        case [left, right]:
            text = f"{left} left of {right}"
        case [*first, last]:
            text = f"{', '.join(first)} and {last}"
    return text[0].upper() + text[1:] + "."


def questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """Every question about this scene, as `(prompt, answer)` pairs by kind of question."""
    present = {shape.kind for shape in scene.shapes}
    pairs = [(a, b) for a in scene.shapes for b in scene.shapes if a is not b]
    return {
        "describe": [("Describe the image.", describe(scene))],
        "count": [("How many shapes are there?", str(len(scene.shapes)))],
        "color": [(f"What color is the {s.kind}?", s.color) for s in scene.shapes],
        "size": [(f"How big is the {s.kind}?", s.size) for s in scene.shapes],
        "presence": [(f"Is there a {kind}?", _yes(kind in present)) for kind in SHAPES],
        "left of": [(f"Is the {a.kind} left of the {b.kind}?", _yes(a.x < b.x)) for a, b in pairs],
        "above": [(f"Is the {a.kind} above the {b.kind}?", _yes(a.y < b.y)) for a, b in pairs],
    }


def pair_questions(first: Scene, second: Scene) -> dict[str, list[tuple[str, str]]]:
    """Every question about two scenes that one row shows, as `(prompt, answer)` pairs by kind of question."""
    scenes = dict(zip(ORDINALS, (first, second), strict=True))
    here, there = ({shape.kind for shape in scene.shapes} for scene in (first, second))
    counts = [len(scene.shapes) for scene in (first, second)]
    more = [("Which image has more shapes?", _which(counts[0] > counts[1]))]
    return {
        "which has": [
            (f"Which image has the {kind}?", _which(kind in here)) for kind in SHAPES if kind in here ^ there
        ],
        "both": [
            (f"Do both images show a {kind}?", _yes(kind in here & there)) for kind in SHAPES if kind in here | there
        ],
        "more": more if counts[0] != counts[1] else [],
        "count in": [
            (f"How many shapes are in the {name} image?", str(len(scene.shapes))) for name, scene in scenes.items()
        ],
        "color in": [
            (f"What color is the {shape.kind} in the {name} image?", shape.color)
            for name, scene in scenes.items()
            for shape in scene.shapes
        ],
        "describe in": [(f"Describe the {name} image.", describe(scene)) for name, scene in scenes.items()],
    }


def follow_ups(scene: Scene) -> dict[str, list[tuple[str, str, str, str]]]:
    """Every question with a follow-up about this scene, as `(prompt, answer, prompt, answer)` by kind of follow-up."""
    asked = questions(scene)
    present = [shape.kind for shape in scene.shapes]
    pairs = [(a, b) for a in scene.shapes for b in scene.shapes if a is not b]
    return {
        "its size": [(f"What color is the {s.kind}?", s.color, "And its size?", s.size) for s in scene.shapes],
        "its color": [(f"How big is the {s.kind}?", s.size, "And its color?", s.color) for s in scene.shapes],
        "color of it": [(f"Is there a {s.kind}?", "yes", "What color is it?", s.color) for s in scene.shapes],
        "another": [(f"What color is the {a.kind}?", a.color, f"And the {b.kind}?", b.color) for a, b in pairs],
        "and a": [
            (f"Is there a {kind}?", _yes(kind in present), f"And a {other}?", _yes(other in present))
            for kind in SHAPES
            for other in SHAPES
            if other != kind
        ],
        "above it": [
            (f"Is the {a.kind} left of the {b.kind}?", _yes(a.x < b.x), "And above it?", _yes(a.y < b.y))
            for a, b in pairs
        ],
        "what are they": [(*asked["count"][0], "What are they?", describe(scene))],
    }


def next_image_questions(first: Scene, second: Scene) -> dict[str, list[tuple[str, str, str, str]]]:
    """Every question about one scene with a follow-up about another that is shown only then, like `follow_ups`."""
    asked = [questions(scene) for scene in (first, second)]
    return {
        f"{kind} here": [
            (*before, prompt, after[1]) for before, after in zip(*(pairs[kind] for pairs in asked), strict=True)
        ]
        for kind, prompt in (("count", "And here?"), ("presence", "And here?"), ("describe", "And this one?"))
    }


def facts(scene: Scene) -> dict[str, Any]:
    """What JSON says of this scene: of the leftmost shape kind and colour, and whether there is a star."""
    leftmost = scene.shapes[0]
    return {
        "count": len(scene.shapes),
        "leftmost": leftmost.kind,
        "color": leftmost.color,
        "star": any(shape.kind == "star" for shape in scene.shapes),
    }


def json_questions(scene: Scene) -> dict[str, list[tuple[str, str]]]:
    """Questions about this scene that want compact JSON, as `(prompt, answer)` pairs: for all facts, and for each."""
    known = facts(scene)
    return {
        "as json": [("Describe the image as JSON.", _compact(known))],
        "one as json": [(f"Only the {name}, as JSON.", _compact({name: value})) for name, value in known.items()],
    }


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _which(first: bool) -> str:
    return "The first." if first else "The second."


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _background(rng: np.random.Generator, *, grey: bool) -> tuple[int, int, int]:
    if grey:
        level = int(rng.integers(170, 200))
        return level, level, level
    red, green, blue = (int(value) for value in rng.integers(215, 256, size=3))
    return red, green, blue


def _log_uniform(rng: np.random.Generator, ranges: Ranges) -> float:
    """A number from one of the ranges `(likelihood, low, high)`."""
    _, low, high = ranges[rng.choice(len(ranges), p=[likely for likely, _, _ in ranges])]
    return float(np.exp(rng.uniform(np.log(low), np.log(high))))


def _reference(extent: tuple[float, float]) -> float:
    """The length of which `RADIUS` and `MIN_GAP` are fractions, itself a fraction of the longer side."""
    return min(1.0, 2 * min(extent))


def _place(
    rng: np.random.Generator,
    extent: tuple[float, float],
    count: int,
    palette: dict[str, tuple[int, int, int]],
    least: float = 0.0,
) -> list[Shape] | None:
    """Place `count` shapes of different kinds with at least this radius, or return None when they do not fit."""
    reference = _reference(extent)
    gap = max(MIN_GAP * reference, least * LEGIBLE_GAP / LEGIBLE)
    ranges = {size: (max(low * reference, least), high * reference) for size, (low, high) in RADIUS.items()}
    ranges = {size: (low, high) for size, (low, high) in ranges.items() if low <= high}
    if not ranges:
        ranges = {"large": (least, FILLING * min(extent))}
    kinds = rng.permutation(SHAPES)[:count]
    placed: list[Shape] = []
    for kind in kinds:
        color = str(rng.choice(list(palette)))
        size = str(rng.choice(list(ranges)))
        radius = float(rng.uniform(*ranges[size]))
        rgb = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in palette[color])
        if palette is GREYS:
            rgb = (rgb[0],) * 3
        edge = radius + 0.01 * reference
        for _ in range(30):
            x, y = (float(rng.uniform(edge, side - edge)) for side in extent)
            if all(_apart(x, y, radius, other, gap) for other in placed):
                placed.append(Shape(str(kind), color, size, x, y, radius, rgb))
                break
        else:
            return None
    return placed


def _apart(x: float, y: float, radius: float, other: Shape, gap: float) -> bool:
    dx, dy = abs(x - other.x), abs(y - other.y)
    clear = math.hypot(dx, dy) > (radius + other.radius) * 1.15
    return clear and dx >= gap and dy >= gap


def _draw(draw: ImageDraw.ImageDraw, shape: Shape, scale: float) -> None:
    x, y, r = shape.x * scale, shape.y * scale, shape.radius * scale
    match shape.kind:
        case "circle":
            draw.ellipse((x - r, y - r, x + r, y + r), fill=shape.rgb)
        case "square":
            side = 0.85 * r
            draw.rectangle((x - side, y - side, x + side, y + side), fill=shape.rgb)
        case "triangle":
            draw.polygon(_ring(x, y, (r,), 3), fill=shape.rgb)
        case "star":
            draw.polygon(_ring(x, y, (r, 0.42 * r), 10), fill=shape.rgb)
        case "cross":
            arm = 0.32 * r
            draw.rectangle((x - r, y - arm, x + r, y + arm), fill=shape.rgb)
            draw.rectangle((x - arm, y - r, x + arm, y + r), fill=shape.rgb)


def _ring(x: float, y: float, radii: tuple[float, ...], points: int) -> list[tuple[float, float]]:
    """Corners at equal angles from the top, at distances that cycle through `radii`."""
    angles = [2 * math.pi * i / points - math.pi / 2 for i in range(points)]
    return [
        (x + radii[i % len(radii)] * math.cos(a), y + radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)
    ]
