"""Scenes of one to three coloured shapes, with questions and their true answers.

What leaves: a `Scene` (positions and sizes as fractions, so that it renders at any
resolution), its PIL image, and `(prompt, answer)` pairs that are true of it. Every answer is
unambiguous by construction: shapes differ in kind, and any two are at least `MIN_GAP` apart in
x and in y, so "left of" and "above" always have a clear answer.

This module knows nothing of models, tokenizers or parquet.
"""

import io
import math
from dataclasses import dataclass

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

#: Radius of a shape as a fraction of the longer side, drawn uniformly from its range.
RADIUS = {"small": (0.055, 0.075), "large": (0.125, 0.155)}
#: Least distance of two centres in x and in y, as a fraction of the longer side.
MIN_GAP = 0.11
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


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _background(rng: np.random.Generator, *, grey: bool) -> tuple[int, int, int]:
    if grey:
        level = int(rng.integers(170, 200))
        return level, level, level
    red, green, blue = (int(value) for value in rng.integers(215, 256, size=3))
    return red, green, blue


def _place(
    rng: np.random.Generator,
    extent: tuple[float, float],
    count: int,
    palette: dict[str, tuple[int, int, int]],
) -> list[Shape] | None:
    """Place `count` shapes of different kinds, or return None when they do not fit."""
    kinds = rng.permutation(SHAPES)[:count]
    placed: list[Shape] = []
    for kind in kinds:
        color = str(rng.choice(list(palette)))
        size = str(rng.choice(list(RADIUS)))
        radius = float(rng.uniform(*RADIUS[size]))
        rgb = tuple(int(np.clip(c + rng.integers(-12, 13), 0, 255)) for c in palette[color])
        if palette is GREYS:
            rgb = (rgb[0],) * 3
        for _ in range(30):
            x, y = (float(rng.uniform(radius + 0.01, side - radius - 0.01)) for side in extent)
            if all(_apart(x, y, radius, other) for other in placed):
                placed.append(Shape(str(kind), color, size, x, y, radius, rgb))
                break
        else:
            return None
    return placed


def _apart(x: float, y: float, radius: float, other: Shape) -> bool:
    dx, dy = abs(x - other.x), abs(y - other.y)
    clear = math.hypot(dx, dy) > (radius + other.radius) * 1.15
    return clear and dx >= MIN_GAP and dy >= MIN_GAP


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
