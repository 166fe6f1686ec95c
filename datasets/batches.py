"""Training batches: pictures of scenes, and rows of questions about them, packed for one call of the model.

What enters: a random generator, and how much to draw. What leaves: a `Batch`: patches, what they show, and rows one
after the other as token ids, labels, positions and masks.

A row is an opening, a piece of conversation with one or two images, and several segments that each continue it: a
question with its answer, or two turns. A mask keeps segments from attending to each other, and all start at the same
position, so they are trained like separate conversations, but the images are computed only once. Where the question
stands before the image, there is one segment a row.

This module knows nothing of losses or optimizers.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from scenes import (
    COLORS,
    FORMATS,
    GREYS,
    RADIUS,
    SHAPES,
    SMALL_AREAS,
    Ranges,
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
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from qvl_batch.images.pixels import LETTERBOX_RGB, decode_image

IGNORE = -100
#: Added to the score of a token that is not seen.
UNSEEN = -1e4
#: Side in pixels of a merged patch, which becomes one token.
UNIT = 28
#: Classes of the probes: kind, colour and size of the shape that a merged patch shows.
PROBED = (SHAPES, (*COLORS, *GREYS), tuple(RADIUS))
#: Least and most pixels of a native image. Half of the small ones may be smaller than the checkpoint's own least.
MIN_PIXELS = (28 * 28, 56 * 56)
MAX_PIXELS = 1280 * UNIT**2
#: System prompts; the first is the chat template's default and the most frequent.
SYSTEM_PROMPTS = ("You are a helpful assistant.", "Be brief.", "Look closely.", "Answer with a word or a sentence.")
#: Texts before the images of a row, None for an image; the first are the most frequent.
OPENINGS = {
    1: ((None,), ("Here is an image. ", None), ("Look at this: ", None), ("Picture 1: ", None)),
    2: (
        (None, None),
        ("Picture 1: ", None, "Picture 2: ", None),
        ("Here are two images. ", None, None),
        ("The first image: ", None, " The second image: ", None),
    ),
}
USUAL = 0.8
TURN_END = "<|im_end|>\n<|im_start|>assistant\n"
ANSWER_END = "<|im_end|>"
NEXT_TURN = "\n<|im_start|>user\n"
#: Kinds of native rows, and how often each is drawn.
NATIVE_ROWS = {"single": 0.30, "pair": 0.24, "question first": 0.18, "next image": 0.16, "fixed": 0.12}
#: Areas of native images, like `scenes.NATIVE_AREAS`: most are smaller, so that there are more of them for the time.
TRAINED_AREAS: Ranges = ((0.14, 1, 9), (0.62, 9, 100), (0.21, 100, 400), (0.03, 400, 1350))
#: How often a native picture is one that another row of the batch has too.
REUSED = 0.75
#: Up to this many image tokens in a row, a question before the image is asked four times, else once.
CHEAP = 250
#: The answer of a row with its question first counts as much as this many.
LONE_WEIGHT = 3.0
#: Where answers in JSON are cut, so that each value counts as much as a short answer, and its name too.
JSON_PARTS = re.compile(r'(?<=":)|(?=,"\w+":)|(?=}$)')
#: An image of this many tokens costs twice as much a token as a very small one.
COSTLY = 600
#: Rows are padded to a multiple of so many tokens: PyTorch compiles its products of matrices for each new shape.
ROUND = 64


@dataclass(frozen=True)
class Picture:
    """An image as the model sees it, uint8 (H, W, 3), and what its merged patches show, int64 (T_img, probes)."""

    scene: Scene
    pixels: np.ndarray
    shown: np.ndarray

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of merged patches."""
        return self.pixels.shape[0] // UNIT, self.pixels.shape[1] // UNIT


#: Text with its special tokens, or the index of a picture, which stands for its tokens.
Part = str | int
#: Parts of a conversation, and for each whether it is an answer to learn.
Segment = list[tuple[Part, bool]]


@dataclass(frozen=True)
class Row:
    """An opening and the segments that continue it."""

    opening: list[Part]
    segments: list[Segment]
    weight: float = 1.0


@dataclass(frozen=True)
class Span:
    """Where a row is among the tokens of all rows, and its mask (stop - start, stop - start), to be added to scores."""

    start: int
    stop: int
    mask: Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures, and rows one after the other.

    Args:
        patches: patches of all pictures (4 * T, 1176).
        grids: rows and columns of patches of each picture, (n, 3) with the time first.
        shown: what merged patches show (T, probes).
        shown_weight: weights of merged patches (T,).
        ids: token ids of all rows (1, S).
        labels: the token to learn at each, or `IGNORE` (1, S).
        weight: weights of the labels (1, S).
        position: M-RoPE positions (3, 1, S).
        features: indices of merged patches, in the order of the image tokens in `ids`.
        ordinals: 0 for image tokens of a row's first image, 1 for those of its second, in that order.
        ordinal_weight: weights of image tokens, with a sum of 1 for each image of each row.
        spans: one for each row.
    """

    patches: Tensor
    grids: Tensor
    shown: Tensor
    shown_weight: Tensor
    ids: Tensor
    labels: Tensor
    weight: Tensor
    position: Tensor
    features: Tensor
    ordinals: Tensor
    ordinal_weight: Tensor
    spans: list[Span]


class Drawing:
    """Pictures and rows, drawn from one random generator."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pictures: list[Picture] = []
        self.rows: list[Row] = []
        self._native: list[int] = []

    @property
    def cost(self) -> float:
        """Approximate cost of all pictures, in image tokens of small ones: attention grows with the square."""
        return sum(len(picture.shown) * (1 + len(picture.shown) / COSTLY) for picture in self.pictures)

    def draw_fixed(self, image_size: int, images: int, asked: int) -> None:
        """Rows of one image fitted to a square, with `asked` questions each."""
        for _ in range(images):
            index = self._fixed_picture(image_size)
            segments = [_turns(*pair) for pair in _pick(self.rng, questions(self.pictures[index].scene), asked)]
            self.rows.append(Row(_opening((None,), [index], SYSTEM_PROMPTS[0]), segments))

    def draw_native(self, cost: float) -> None:
        """Rows of all kinds, until the pictures cost that much."""
        while self.cost < cost:
            match self.rng.choice(list(NATIVE_ROWS), p=list(NATIVE_ROWS.values())):
                case "single":
                    self._single(self._native_picture())
                case "pair":
                    self._pair(self._native_pair())
                case "question first":
                    self._question_first()
                case "next image":
                    self._next_image()
                case "fixed" if self.rng.random() < 0.75:
                    self._single(self._fixed_picture(672))
                case "fixed":
                    self._pair([self._fixed_picture(672), self._fixed_picture(672)])

    def draw_json(self, cost: float) -> None:
        """Rows of one small image each that ask for JSON, some for the rest too, until the pictures cost that much."""
        while self.cost < cost:
            index = self._new_picture(SMALL_AREAS)
            if self.rng.random() < 0.3:
                self._single(index)
            else:
                self._json(index)

    def _single(self, index: int) -> None:
        scene = self.pictures[index].scene
        segments = [_turns(*pair) for pair in _pick(self.rng, questions(scene), 8)]
        segments += [_turns(*turns) for turns in _draw(self.rng, follow_ups(scene), 6)]
        self.rows.append(Row(self._some_opening([index]), segments))
        self._json(index)

    def _json(self, index: int) -> None:
        asked = json_questions(self.pictures[index].scene)
        pairs = asked["as json"] + _draw(self.rng, {"one": asked["one as json"]}, 3)
        self.rows.append(Row(self._some_opening([index]), [_json_turn(*pair) for pair in pairs]))

    def _pair(self, indices: list[int]) -> None:
        asked = pair_questions(*(self.pictures[index].scene for index in indices))
        self.rows.append(Row(self._some_opening(indices), [_turns(*pair) for pair in _draw(self.rng, asked, 12)]))

    def _question_first(self) -> None:
        indices = [self._native_picture()] if self.rng.random() < 0.6 else self._native_pair()
        scenes = [self.pictures[index].scene for index in indices]
        asked = questions(*scenes) if len(scenes) == 1 else pair_questions(*scenes)
        cheap = sum(len(self.pictures[index].shown) for index in indices) <= CHEAP
        for prompt, answer in _draw(self.rng, asked, 4 if cheap else 1):
            template = (prompt + str(self.rng.choice(["", " ", "\n"])), *([None] * len(indices)))
            opening = _opening(template, indices, self._system())
            self.rows.append(Row(opening, [[(TURN_END, False), (answer + ANSWER_END, True)]], LONE_WEIGHT))

    def _next_image(self) -> None:
        indices = self._native_pair()
        scenes = [self.pictures[index].scene for index in indices]
        ((prompt, answer, then, last),) = _draw(self.rng, next_image_questions(*scenes), 1)
        opening = _opening((None,), indices[:1], self._system())
        opening += [prompt + TURN_END + answer + ANSWER_END + NEXT_TURN, *_shown([None], indices[1:])]
        pairs = [(then, last), *_draw(self.rng, pair_questions(*scenes), 6)]
        self.rows.append(Row(_joined(opening), [_turns(*pair) for pair in pairs]))

    def _some_opening(self, indices: list[int]) -> list[Part]:
        templates = OPENINGS[len(indices)]
        template = templates[0] if self.rng.random() < USUAL else templates[self.rng.integers(1, len(templates))]
        return _opening(template, indices, self._system())

    def _system(self) -> str:
        return SYSTEM_PROMPTS[0] if self.rng.random() < USUAL else str(self.rng.choice(SYSTEM_PROMPTS[1:]))

    def _native_pair(self) -> list[int]:
        first = self._native_picture()
        while (second := self._native_picture()) == first:
            pass
        return [first, second]

    def _native_picture(self) -> int:
        """A new picture or, more often, one that another row has too: then it costs no time in the vision tower."""
        if self._native and self.rng.random() < REUSED:
            return self._native[self.rng.integers(len(self._native))]
        return self._new_picture(TRAINED_AREAS)

    def _new_picture(self, areas: Ranges) -> int:
        width, height = sample_size(self.rng, areas)
        scene = sample_native_scene(self.rng, width, height, grey=self.rng.random() < 0.125)
        image = self._through_file(scene, max(width, height))
        self.pictures.append(native_picture(scene, image, MIN_PIXELS[self.rng.integers(len(MIN_PIXELS))]))
        self._native.append(len(self.pictures) - 1)
        return self._native[-1]

    def _fixed_picture(self, image_size: int) -> int:
        scene = sample_scene(self.rng, grey=self.rng.random() < 0.125)
        image = self._through_file(scene, round(image_size * self.rng.uniform(0.6, 1.4)))
        self.pictures.append(fixed_picture(scene, image, image_size))
        return len(self.pictures) - 1

    def _through_file(self, scene: Scene, longer_side: int) -> Image.Image:
        image = render(scene, longer_side, transparent=self.rng.random() < 0.125)
        return decode_image(encode(image, FORMATS[self.rng.integers(len(FORMATS))]))


class Packer:
    """Turns pictures and rows into tensors."""

    def __init__(self, config: Qwen2_5_VLConfig, checkpoint: Path) -> None:
        self.image_token_id = config.image_token_id
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint)
        self.pad_token_id = self.tokenizer.pad_token_id
        self._ids: dict[str, list[int]] = {}

    def __call__(self, drawing: Drawing) -> Batch:
        """All that was drawn."""
        pictures = drawing.pictures
        starts = np.cumsum([0, *(len(picture.shown) for picture in pictures)])
        rows = [self.tokens_of(row, pictures) for row in drawing.rows]
        ids = torch.tensor([token for row in rows for token in row.ids])
        weight = torch.tensor([weight for row in rows for weight in row.weights]).roll(-1)
        ordinals = [ordinal for row in rows for ordinal in range(len(row.images))]
        features = [np.arange(starts[image], starts[image + 1]) for row in rows for image in row.images]
        lengths = [len(each) for each in features]
        return Batch(
            patches=torch.cat([patchify(picture.pixels) for picture in pictures]),
            grids=torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in (p.grid for p in pictures)]),
            shown=torch.from_numpy(np.concatenate([picture.shown for picture in pictures])),
            shown_weight=torch.cat([_probe_weights(picture.shown) for picture in pictures]),
            ids=ids[None],
            labels=torch.where(weight > 0, ids.roll(-1), IGNORE)[None],
            weight=weight[None],
            position=torch.from_numpy(np.concatenate([each for row in rows for each in row.positions], axis=1))[
                :, None
            ],
            features=torch.from_numpy(np.concatenate(features)),
            ordinals=torch.tensor(ordinals).repeat_interleave(torch.tensor(lengths)),
            ordinal_weight=(1 / torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths)),
            spans=list(_spans(rows)),
        )

    def tokens_of(self, row: Row, pictures: Sequence[Picture]) -> "RowTokens":
        """A row's tokens, opening first, then its segments."""
        tokens = RowTokens(self.image_token_id)
        for part in row.opening:
            self._add(tokens, part, pictures, segment=0)
        resume = tokens.next_position
        for number, segment in enumerate(row.segments, start=1):
            tokens.next_position = resume
            for part, learned in segment:
                self._add(tokens, part, pictures, segment=number, weight=row.weight if learned else 0.0)
        tokens.pad(self.pad_token_id, segment=len(row.segments) + 1)
        return tokens

    def _add(
        self, tokens: "RowTokens", part: Part, pictures: Sequence[Picture], *, segment: int, weight: float = 0.0
    ) -> None:
        if isinstance(part, int):
            tokens.add_image(part, pictures[part].grid, segment)
            return
        if part not in self._ids:
            self._ids[part] = self.tokenizer(part).input_ids
        tokens.add_text(self._ids[part], segment, weight)


class RowTokens:
    """Tokens of a row as they are laid out: ids, segments, weights of the answers' tokens, and M-RoPE positions, after
    Qwen2-VL, arXiv 2409.12191, section 2.1.
    """

    def __init__(self, image_token_id: int) -> None:
        self.image_token_id = image_token_id
        self.ids: list[int] = []
        self.segments: list[int] = []
        self.weights: list[float] = []
        self.positions: list[np.ndarray] = []
        self.images: list[int] = []
        self.next_position = 0

    def __len__(self) -> int:
        return len(self.ids)

    def add_text(self, ids: list[int], segment: int, weight: float) -> None:
        """Text, or an answer with a weight, which its tokens share."""
        self._add(ids, segment, weight / len(ids))
        self.positions.append(np.tile(self.next_position + np.arange(len(ids)), (3, 1)))
        self.next_position += len(ids)

    def add_image(self, index: int, grid: tuple[int, int], segment: int) -> None:
        """The tokens of a picture."""
        rows, columns = grid
        self._add([self.image_token_id] * (rows * columns), segment, 0.0)
        row, column = np.divmod(np.arange(rows * columns), columns)
        self.positions.append(self.next_position + np.stack([np.zeros_like(row), row, column]))
        self.next_position += max(rows, columns)
        self.images.append(index)

    def pad(self, token_id: int, segment: int) -> None:
        """Tokens that nothing learns from or attends to, up to a multiple of `ROUND`."""
        if missing := -len(self) % ROUND:
            self.add_text([token_id] * missing, segment, 0.0)

    def _add(self, ids: list[int], segment: int, weight: float) -> None:
        self.ids += ids
        self.segments += [segment] * len(ids)
        self.weights += [weight] * len(ids)


def native_picture(scene: Scene, image: Image.Image, min_pixels: int) -> Picture:
    """An image at its own size, rounded to whole merged patches as the checkpoint's processor does it."""
    height, width = smart_resize(image.height, image.width, UNIT, min_pixels, MAX_PIXELS)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    rows, columns = height // UNIT, width // UNIT
    x, y = ((np.arange(n) + 0.5) / n * side for n, side in zip((columns, rows), scene.extent, strict=True))
    return Picture(scene, pixels, what_patches_show(scene, x, y, max(scene.extent) / max(rows, columns)))


def fixed_picture(scene: Scene, image: Image.Image, image_size: int) -> Picture:
    """An image fitted to a square, with bars in the mean colour."""
    size = (image_size, image_size)
    pixels = np.asarray(ImageOps.pad(image, size, Image.Resampling.BICUBIC, LETTERBOX_RGB))
    merged = image_size // UNIT
    centres = (np.arange(merged) + 0.5) / merged
    x, y = (centres - (1 - side) / 2 for side in scene.extent)
    return Picture(scene, pixels, what_patches_show(scene, x, y, 1 / merged))


def what_patches_show(scene: Scene, x: np.ndarray, y: np.ndarray, side: float) -> np.ndarray:
    """int64 (T_img, probes): classes of the shape nearest to each merged patch, 0 if none is near.

    Args:
        scene: the scene.
        x: centres of the columns of merged patches, in the unit of the scene's shapes.
        y: centres of the rows.
        side: side of a merged patch.
    """
    shown = np.zeros((len(y), len(x), len(PROBED)), np.int64)
    nearest = np.full((len(y), len(x)), np.inf)
    for shape in scene.shapes:
        distance = np.hypot(x[None, :] - shape.x, y[:, None] - shape.y)
        near = (distance < shape.radius + 0.3 * side) & (distance < nearest)
        nearest[near] = distance[near]
        names = (shape.kind, shape.color, shape.size)
        shown[near] = [known.index(name) + 1 for known, name in zip(PROBED, names, strict=True)]
    return shown.reshape(-1, len(PROBED))


def patchify(pixels: np.ndarray) -> Tensor:
    """uint8 (H, W, 3) to normalised patches (H/14 * W/14, 3 * 2 * 14 * 14), in the order of `Qwen2VLImageProcessor`:
    2 x 2 merge groups, both temporal frames the same.
    """
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]) * 255
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]) * 255
    x = (torch.tensor(pixels).float() - mean) / std
    height, width, _ = x.shape
    x = x.view(height // 28, 2, 14, width // 28, 2, 14, 3)
    x = x.permute(0, 3, 1, 4, 6, 2, 5)[:, :, :, :, :, None]
    return x.expand(-1, -1, -1, -1, -1, 2, -1, -1).reshape(-1, 3 * 2 * 14 * 14)


def _probe_weights(shown: np.ndarray) -> Tensor:
    """Weights (T_img,) of a picture's merged patches, with a sum of 1.

    Most are background: their weight is low, so that together they count as much as shapes.
    """
    weight = torch.where(torch.from_numpy(shown[:, 0]) > 0, 1.0, 0.05)
    return weight / weight.sum()


def _spans(rows: list[RowTokens]) -> Iterator[Span]:
    """Where rows are. All segments attend to segment 0, the opening, and to themselves."""
    start = 0
    for row in rows:
        segments = torch.tensor(row.segments)
        same = (segments == 0) | (segments == segments[:, None])
        seen = same & torch.ones(same.shape, dtype=torch.bool).tril()
        yield Span(start, start + len(segments), torch.where(seen, 0.0, UNSEEN))
        start += len(segments)


def _opening(template: Sequence[str | None], indices: list[int], system: str) -> list[Part]:
    """The conversation up to the last image or text of `template`, where None stands for the next image."""
    return [f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n", *_shown(template, indices)]


def _shown(template: Sequence[str | None], indices: list[int]) -> list[Part]:
    images = iter(indices)
    parts: list[Part] = []
    for piece in template:
        parts += [piece] if piece is not None else ["<|vision_start|>", next(images), "<|vision_end|>"]
    return _joined(parts)


def _joined(parts: Sequence[Part]) -> list[Part]:
    """Neighbouring texts as one: tokens can span them."""
    joined: list[Part] = []
    for part in parts:
        if joined and isinstance(part, str) and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def _turns(*texts: str) -> Segment:
    """Prompt, answer, prompt, answer and so on."""
    segment: Segment = []
    for number, (prompt, answer) in enumerate(zip(texts[::2], texts[1::2], strict=True)):
        segment.append(((NEXT_TURN if number else "") + prompt + TURN_END, False))
        segment.append((answer + ANSWER_END, True))
    return segment


def _json_turn(prompt: str, answer: str) -> Segment:
    """A prompt, and the parts of its answer: whole, names would outweigh values, which are few of its tokens."""
    *parts, last = JSON_PARTS.split(answer)
    return [(prompt + TURN_END, False), *((part, True) for part in parts), (last + ANSWER_END, True)]


def _pick(rng: np.random.Generator, by_kind: dict[str, list[tuple[str, ...]]], count: int) -> list[tuple[str, ...]]:
    """The description, and `count - 1` other questions; all kinds of question are equally likely."""
    others = {kind: pairs for kind, pairs in by_kind.items() if kind != "describe"}
    return by_kind["describe"] + _draw(rng, others, count - 1)


def _draw(rng: np.random.Generator, by_kind: dict[str, list[tuple[str, ...]]], count: int) -> list[tuple[str, ...]]:
    """`count` questions; all kinds that have any are equally likely."""
    kinds = [pairs for pairs in by_kind.values() if pairs]
    chosen = [kinds[i] for i in rng.integers(len(kinds), size=count)]
    return [pairs[rng.integers(len(pairs))] for pairs in chosen]
