"""Scenes, what is asked of them, and the rows that the tiny checkpoint is trained on."""

import copy
import io
import json
import math
from itertools import combinations

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from batches import ANSWER_END, Drawing, Packer, fixed_picture, native_picture, patchify
from conftest import SCENE, TINY
from make_demo import NATIVE_KINDS, STYLES, native_rows, write_demo
from PIL import Image
from scenes import (
    LEGIBLE,
    LEGIBLE_GAP,
    Scene,
    Shape,
    json_questions,
    pair_questions,
    render,
    sample_native_scene,
    sample_size,
)
from train import Probes, loss_of, prepared
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from qvl_batch.json_schema import arrow_type, decided, dumps, value_of

CONFIG = Qwen2_5_VLConfig.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(scope="module")
def drawing():
    """Rows of every kind."""
    drawing = Drawing(np.random.default_rng(8))
    drawing.draw_json(400)
    drawing.draw_native(4000)
    drawing.draw_fixed(224, images=2, asked=3)
    return drawing


def test_shapes_of_a_native_scene_are_legible_and_apart():
    rng = np.random.default_rng(1)
    seen = set()
    for _ in range(400):
        width, height = sample_size(rng)
        scene = sample_native_scene(rng, width, height)
        image = render(scene, max(width, height))
        assert image.size == (width, height)
        assert min(image.size) >= 28
        unit = max(width, height)
        for shape in scene.shapes:
            x, y, radius = shape.x * unit, shape.y * unit, shape.radius * unit
            assert radius >= LEGIBLE - 1e-9
            assert radius <= x <= width - radius
            assert radius <= y <= height - radius
            assert image.getpixel((int(x), int(y))) == shape.rgb
            seen.add((shape.size, shape.kind))
        for a, b in combinations(scene.shapes, 2):
            assert a.kind != b.kind
            assert min(abs(a.x - b.x), abs(a.y - b.y)) * unit >= LEGIBLE_GAP - 1e-9
    assert len(seen) == 10


def test_native_sizes_reach_from_one_token_to_a_megapixel_and_from_wide_to_high():
    rng = np.random.default_rng(2)
    sizes = [sample_size(rng) for _ in range(4000)]
    areas = [width * height / 28**2 for width, height in sizes]
    assert min(areas) < 1.5
    assert 1200 < max(areas) < 1400
    proportions = [math.log(width / height) for width, height in sizes]
    assert max(proportions) > math.log(15)
    assert min(proportions) < -math.log(15)
    assert max(map(abs, proportions)) < math.log(21)


def test_answers_about_two_scenes_are_true():
    def scene(*shapes):
        return Scene(tuple(Shape(kind, color, "small", 0.5, 0.5, 0.06, (0, 0, 0)) for kind, color in shapes), 1.0, ())

    asked = pair_questions(scene(("star", "red"), ("cross", "blue")), scene(("star", "green")))
    assert asked == {
        "which has": [("Which image has the cross?", "The first.")],
        "both": [("Do both images show a star?", "yes"), ("Do both images show a cross?", "no")],
        "more": [("Which image has more shapes?", "The first.")],
        "count in": [
            ("How many shapes are in the first image?", "2"),
            ("How many shapes are in the second image?", "1"),
        ],
        "color in": [
            ("What color is the star in the first image?", "red"),
            ("What color is the cross in the first image?", "blue"),
            ("What color is the star in the second image?", "green"),
        ],
        "describe in": [
            ("Describe the first image.", "A small red star left of a small blue cross."),
            ("Describe the second image.", "A small green star."),
        ],
    }


def test_answers_in_json_are_true():
    cross = Shape("cross", "blue", "large", 0.2, 0.5, 0.14, (0, 0, 0))
    star, circle = (
        Shape(kind, "red", "small", x, 0.2, 0.06, (0, 0, 0)) for kind, x in (("star", 0.5), ("circle", 0.8))
    )
    asked = json_questions(Scene((cross, star, circle), 1.0, ()))
    assert asked["as json"] == [
        (
            "Describe the image as JSON.",
            '{"count":3,"leftmost":"cross","color":"blue","star":true}',
        )
    ]
    assert dict(asked["one as json"])["Only the color, as JSON."] == '{"color":"blue"}'
    assert json_questions(Scene((cross,), 1.0, ()))["one as json"][-1][1] == '{"star":false}'


def test_json_that_is_taught_is_as_the_demo_holds_answers_to_it(drawing):
    schema = json.loads(SCENE.read_text())
    kind = arrow_type(decided(schema))
    segments = [segment for row in drawing.rows for segment in row.segments]
    texts = ["".join(part for part, learned in each if learned).removesuffix(ANSWER_END) for each in segments]
    found = [text for text in texts if text.startswith("{") and text.count(":") == len(schema["properties"])]
    assert found
    for text in found:
        value = value_of(text, kind)
        assert list(value) == list(schema["properties"]) == schema["required"]
        assert dumps(value) == text
        for name, each in schema["properties"].items():
            allowed = each.get("enum") or each.get("items", {}).get("enum")
            assert not allowed or {*np.atleast_1d(value[name])} <= {*allowed}
    ones = {name for text in texts if text.startswith("{") and text.count(":") == 1 for name in json.loads(text)}
    assert ones == set(schema["properties"])


def test_positions_of_training_rows_are_those_of_transformers(model, drawing):
    packer, several = Packer(CONFIG, TINY), set()
    for row in drawing.rows:
        tokens = packer.tokens_of(row, drawing.pictures)
        positions, segments = np.concatenate(tokens.positions, axis=1), np.array(tokens.segments)
        grids = [drawing.pictures[image].grid for image in tokens.images]
        several.add((len(grids), len(row.segments) > 1))
        for number in range(1, len(row.segments) + 1):
            kept = np.isin(segments, (0, number))
            ids = torch.tensor(tokens.ids)[kept][None]
            grid = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in grids])
            expected, _ = model.model.get_rope_index(ids, (ids == CONFIG.image_token_id).int(), grid)
            np.testing.assert_array_equal(positions[:, kept], expected[:, 0])
    assert several == {(1, True), (1, False), (2, True), (2, False)}


def test_training_rows_are_as_the_chat_template_writes_them(drawing):
    packer, tokenizer = Packer(CONFIG, TINY), AutoTokenizer.from_pretrained(TINY)
    for row in drawing.rows:
        tokens = packer.tokens_of(row, drawing.pictures)
        for number in range(1, len(row.segments) + 1):
            kept = np.isin(tokens.segments, (0, number))
            text = tokenizer.decode(np.array(tokens.ids)[kept])
            assert tokenizer(text).input_ids == np.array(tokens.ids)[kept].tolist()
            messages = _messages(text)
            assert tokenizer.apply_chat_template(messages, tokenize=False) == text.replace("<|image_pad|>", "") + "\n"


def _messages(text):
    """Messages of a conversation in the tiny checkpoint's template, images as their plain tokens."""
    text = text.replace("<|image_pad|>", "")
    turns = [turn.removesuffix("\n").removesuffix("<|im_end|>") for turn in text.split("<|im_start|>")[1:]]
    return [dict(zip(("role", "content"), turn.split("\n", 1), strict=True)) for turn in turns]


@pytest.mark.long
def test_questions_of_a_row_are_trained_like_conversations_of_their_own(model, drawing, monkeypatch):
    for name in ("Qwen2_5_VLVisionAttention", "Qwen2_5_VisionPatchEmbed"):
        monkeypatch.setattr(getattr(qwen, name), "forward", getattr(qwen, name).forward)
    packer = Packer(CONFIG, TINY)
    losses, weights = [], []
    for row in drawing.rows:
        tokens = packer.tokens_of(row, drawing.pictures)
        pictures = [drawing.pictures[image] for image in tokens.images]
        grids = torch.tensor([[1, 2 * rows, 2 * columns] for rows, columns in (picture.grid for picture in pictures)])
        for number in range(1, len(row.segments) + 1):
            kept = np.isin(tokens.segments, (0, number))
            ids = torch.tensor(tokens.ids)[kept][None]
            with torch.no_grad():
                logits = model(
                    input_ids=ids,
                    pixel_values=torch.cat([patchify(picture.pixels) for picture in pictures]),
                    image_grid_thw=grids,
                    mm_token_type_ids=(ids == CONFIG.image_token_id).int(),
                ).logits
            losses.append(torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:], reduction="none"))
            weights.append(torch.tensor(tokens.weights)[kept][1:])
    expected = (torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum()
    taught = prepared(copy.deepcopy(model))
    with torch.no_grad():
        loss = loss_of(taught, Probes(packer.tokenizer, CONFIG.text_config.hidden_size), packer(drawing))
    assert loss.answers.item() == pytest.approx(expected.item(), rel=1e-4)
    assert loss.weight == pytest.approx(sum(len(answers(row)) * row.weight for row in drawing.rows))


def answers(row):
    return [part for segment in row.segments for part, learned in segment if learned]


def test_pictures_are_what_the_image_processor_makes_of_them():
    processor = Qwen2VLImageProcessorPil.from_pretrained(TINY)
    rng = np.random.default_rng(5)
    for width, height in ((28, 28), (400, 90), (61, 700)):
        scene = sample_native_scene(rng, width, height)
        image = render(scene, max(width, height))
        picture = native_picture(scene, image, 56 * 56)
        seen = processor(images=[image], return_tensors="pt")
        assert seen.image_grid_thw.tolist() == [[1, *(2 * n for n in picture.grid)]]
        torch.testing.assert_close(patchify(picture.pixels), seen.pixel_values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fitted", [lambda s, i: native_picture(s, i, 28 * 28), lambda s, i: fixed_picture(s, i, 224)])
def test_probes_learn_what_a_patch_shows(fitted):
    shapes = (
        Shape("square", "red", "large", 0.2, 0.2, 0.15, (214, 36, 36)),
        Shape("circle", "blue", "small", 0.85, 0.35, 0.07, (40, 80, 214)),
    )
    scene = Scene(shapes, 2.0, (240, 240, 240))
    picture = fitted(scene, render(scene, 448))
    rows, columns = picture.grid
    shown = picture.shown.reshape(rows, columns, 3)
    seen = picture.pixels.reshape(rows, 28, columns, 28, 3)[:, 14, :, 14].astype(int)
    red, blue = (np.abs(seen - shape.rgb).max(-1) < 20 for shape in shapes)
    assert red.any()
    assert blue.any()
    assert (shown[red] == [2, 1, 2]).all()
    assert (shown[blue] == [1, 5, 1]).all()
    assert not shown[-1].any()


@pytest.mark.parametrize("style", NATIVE_KINDS)
def test_rows_of_each_style_are_written(style, tmp_path):
    write_demo(tmp_path / "rows.parquet", 8, 7, style)
    table = pq.read_table(tmp_path / "rows.parquet")
    two = style in {"pairs", "next-image"}
    asks = "prompt" if style in {"native", "pairs", "json"} else "messages"
    assert table.column_names == ["id", "image", asks, "expected"]
    for record, row in zip(table.to_pylist(), native_rows(style, 8, 7), strict=True):
        images = record["image"] if two else [record["image"]]
        assert [Image.open(io.BytesIO(image["bytes"])).format for image in images] == [name for _, name in row.images]
        assert record["expected"] == row.expected
        parts = [part for message in row.messages for part in message["content"]]
        assert sum(part["type"] == "image" for part in parts) == len(images) == 1 + two
        if asks == "prompt":
            assert [part["text"] for part in parts[len(images) :]] == [record["prompt"]]
        else:
            assert record["messages"] == row.messages
            assert [message["role"] for message in row.messages][-1] == "user"


def test_styles_have_all_their_kinds_of_question_in_turn():
    assert list(NATIVE_KINDS) == list(STYLES[1:])
    for style, kinds in NATIVE_KINDS.items():
        assert [row.kind for row in native_rows(style, len(kinds), 3)] == list(kinds)
