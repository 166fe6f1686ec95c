"""Without Ray: answers in order, a failure only in its own row, and no torch or transformers anywhere."""

import base64
import io
import os
import subprocess
import sys
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from answers import demo_rows
from conftest import ROOT
from image_files import image_file
from interrupts import press_ctrl_c
from PIL import Image

from qvl_batch import Captioner, JobError
from qvl_batch.decoder.answerer import Answerer
from qvl_batch.decoder.decoder import Decoder
from qvl_batch.decoder.engine import Engine
from qvl_batch.errors import ConfigError, DeviceError
from qvl_batch.images.pixels import decode_image
from qvl_batch.vision.encoder import VisionEncoder

ROWS = demo_rows(8)


@pytest.fixture(scope="module")
def captioner(tiny_bundle):
    with Captioner(tiny_bundle.path) as captioner:
        yield captioner


def test_rows_that_fail_leave_the_others_alone(captioner):
    images = [row["image"]["bytes"] for row in ROWS]
    prompts = [row["prompt"] for row in ROWS]
    whole = captioner.caption(images, prompts)
    assert [answer.finish_reason for answer in whole] == ["stop"] * 8
    broken = captioner.caption([*images[:3], b"no image", *images[4:]], [*prompts[:6], None, prompts[7]])
    for index, (found, expected) in enumerate(zip(broken, whole, strict=True)):
        if index not in {3, 6}:
            assert found == expected
    assert [(broken[i].failure.stage, broken[i].failure.type) for i in (3, 6)] == [
        ("image", "ImageError"),
        ("layout", "PromptError"),
    ]
    assert broken[3].answer is None


def test_images_may_come_as_people_have_them(captioner, tmp_path):
    data = ROWS[0]["image"]["bytes"]
    (tmp_path / "image").write_bytes(data)
    picture = decode_image(data)
    pixels, file = np.asarray(picture), io.BytesIO(data)
    tensor = torch.tensor(pixels).permute(2, 0, 1)
    text = base64.b64encode(data).decode()
    with (tmp_path / "image").open("rb") as opened:
        images = [
            data, bytearray(data), memoryview(data), tmp_path / "image", str(tmp_path / "image"), file, file, opened,
            text, f"data:image/png;base64,{text}",
            {"bytes": data, "path": "ignored"}, {"bytes": None, "path": tmp_path / "image"}, {"bytes": text},
            picture, pixels, pixels.astype(np.float64) / 255, pixels.astype(np.float32), pixels.astype(np.int64),
            pixels.astype(np.uint16) * 257, tensor, tensor.numpy(), (tensor / 255).requires_grad_(),
            tensor.to(torch.bfloat16), np.asfortranarray(pixels),
        ]  # fmt: skip
        answers = captioner.caption(images, ROWS[0]["prompt"])
        parts = [[{"type": "image", "image": image}, ROWS[0]["prompt"]] for image in images]
        answers += captioner.caption(messages=[[{"role": "user", "content": each}] for each in parts])
    assert {(answer.answer, answer.failure) for answer in answers} == {(answers[0].answer, None)}
    assert answers[0].finish_reason == "stop"


def test_which_images_are_shown_is_asked_for(tiny_bundle):
    data = ROWS[0]["image"]["bytes"]
    images = [data, data[: len(data) * 2 // 3], Image.new("RGB", (1000, 1000))]
    with Captioner(tiny_bundle.path, max_image_pixels=999_999) as strict:
        whole, cut, large = strict.caption(images, "What color is it?", max_new_tokens=2)
    assert "--allow-truncated shows the rest" in cut.failure.message
    assert "has 1,000,000 pixels; the limit is 999,999" in large.failure.message
    with Captioner(tiny_bundle.path, max_image_pixels=10**6, allow_truncated=True) as lenient:
        answers = lenient.caption(images, "What color is it?", max_new_tokens=2)
    assert not any(answer.failure for answer in answers)
    assert answers[0].answer == whole.answer
    with pytest.raises(ConfigError, match="max_image_pixels must be at least 1, not 0"):
        Captioner(tiny_bundle.path, max_image_pixels=0)


def test_answers_abstain_below_a_confidence_and_values_have_theirs(tiny_bundle):
    schema = {"type": "object", "properties": {"color": {"enum": ["red", "blue"]}}, "required": ["color"]}
    open_ended = {"type": "object", "properties": {"next": {"$ref": "#"}, "sure": {"type": "boolean"}}}
    images, prompts = [row["image"]["bytes"] for row in ROWS[:4]], [row["prompt"] for row in ROWS[:4]]
    with Captioner(tiny_bundle.path) as captioner:
        plain = captioner.caption(images, prompts, json_schema=schema)
    assert {(answer.finish_reason, answer.parsed_confidence) for answer in plain} == {("stop", None)}
    with Captioner(tiny_bundle.path, confidence=True) as captioner:
        sure = captioner.caption(images, prompts, json_schema=schema)
        assert captioner.caption(images[:1], prompts[:1], json_schema=open_ended)[0].parsed_confidence is None
    assert all(answer.confidence <= answer.parsed_confidence["color"] <= 1 for answer in sure)
    least = sorted(answer.confidence for answer in sure)[2]
    with Captioner(tiny_bundle.path, abstain_below=least) as captioner:
        held = captioner.caption(images, prompts, json_schema=schema)
    expected = ["abstain" if answer.confidence < least else "stop" for answer in sure]
    assert [answer.finish_reason for answer in held] == expected
    assert [replace(answer, finish_reason="stop") for answer in held] == sure
    assert expected.count("abstain") == 2
    for wrong in (0, 1.5, float("nan")):
        with pytest.raises(ConfigError, match=f"abstain_below must be above 0 and at most 1, not {wrong}"):
            Captioner(tiny_bundle.path, abstain_below=wrong)


def test_a_file_that_is_not_there_fails_its_row(captioner):
    (answer,) = captioner.caption(["/nowhere.png"], ["What?"])
    assert answer.failure.message == "/nowhere.png: No such file or directory"


def _truncated():
    return Image.open(io.BytesIO(image_file(Image.new("RGB", (64, 64), "red"), "AVIF")[:-20]))


@pytest.mark.parametrize(
    ("image", "prompt", "kind", "message"),
    [
        (np.zeros((2, 2, 7), np.uint8), "What?", "ImageError", "a uint8 array of shape (2, 2, 7) is not an image"),
        (
            np.zeros((3, 9, 3)),
            "What?",
            "ImageError",
            "a float64 array of shape (3, 9, 3) can be read as (height, ",
        ),
        (
            np.full((5, 5, 3), -0.5),
            "What?",
            "ImageError",
            "the image has samples from -0.5 to -0.5; they must be",
        ),
        (np.full((5, 5), 1j), "What?", "ImageError", "a complex128 array of shape (5, 5) is not an image"),
        (io.StringIO("text"), "What?", "ImageError", "the file of the image is open as text: open it with mode 'rb'"),
        (io.BytesIO(b"no image"), "What?", "ImageError", "the bytes are no image of AVIF, "),
        ({"bytes": None, "path": None}, "What?", "ImageError", "NoneType is not an image: give a path"),
        ({"path": "/nowhere.png"}, "What?", "ImageError", "/nowhere.png: No such file or directory"),
        ({"bytes": "no base64!"}, "What?", "ImageError", "an image in base64 of 10 characters has invalid base64"),
        (torch.empty((3, 9, 9), device="meta"), "What?", "ImageError", "Tensor cannot be made an array: "),
        (torch.zeros((1, 3, 9, 9)), "What?", "ImageError", "a float32 array of shape (1, 3, 9, 9) is not an image"),
        (np.zeros((), np.uint8), "What?", "ImageError", "a uint8 array of shape () is not an image"),
        (None, "What?", "ImageError", "NoneType is not an image: give a path"),
        ("a\0b", "What?", "ImageError", r"'a\x00b' is not a valid path: embedded null byte"),
        ("a\ud800b", "What?", "ImageError", r"'a\ud800b' is not a valid path: "),
        (_truncated(), "What?", "ImageError", "SyntaxError: "),
        (np.zeros((2, 2, 3), np.uint8), float("nan"), "PromptError", "the prompt is of type float, not text"),
    ],
)
def test_what_is_no_image_or_no_prompt_fails_its_row_alone(image, prompt, kind, message, captioner):
    good, bad = captioner.caption([ROWS[0]["image"]["bytes"], image], ["What?", prompt], max_new_tokens=1)
    assert good.failure is None
    assert (bad.failure.type, bad.failure.message[: len(message)]) == (kind, message)


@pytest.mark.parametrize(
    "image",
    [
        "a.jpg",
        Path("a.jpg"),
        b"any",
        np.zeros((2, 2, 3), np.uint8),
        Image.new("L", (2, 2)),
        io.BytesIO(b"any"),
        {"bytes": b"any", "path": None},
        torch.zeros((3, 9, 9)),
    ],
    ids=type,
)
def test_one_image_in_place_of_a_list_is_refused(image, captioner):
    with pytest.raises(ConfigError, match=r"images is a single \w+, not one for each row: give a list, \[image\]"):
        captioner.caption(image, "What?")


@pytest.fixture
def encoded(monkeypatch):
    """Pixels that went through the vision graph."""
    images, encode = [], VisionEncoder.encode
    monkeypatch.setattr(VisionEncoder, "encode", lambda self, image: images.append(image) or encode(self, image))
    return images


@pytest.mark.parametrize("kind", ["int16", "int32", "int64", "uint64"])
def test_shades_of_a_byte_may_be_in_wider_integers(kind, tiny_bundle, encoded):
    size = tiny_bundle.manifest.layout.resolution.image_size
    shades = np.resize(np.arange(0, 256, 17), (size, size))
    with Captioner(tiny_bundle.path, slots=1) as captioner:
        captioner.caption([shades.astype(kind)], "What?", max_new_tokens=1)
    (pixels,) = encoded
    assert np.array_equal(pixels[..., 0], shades)


def test_pixels_pass_through_unchanged(tiny_bundle, encoded):
    size = tiny_bundle.manifest.layout.resolution.image_size
    one, other = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), dtype=np.uint8)
    with Captioner(tiny_bundle.path, slots=1) as captioner:
        captioner.caption([one, Image.fromarray(other)], "What?", max_new_tokens=1)
    assert np.array_equal(encoded, [one, other])


def test_a_process_that_was_forked_is_told_to_make_its_own(captioner):
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        try:
            captioner.caption([b""], "What?")
        except RuntimeError as error:
            os.write(writer, str(error).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000).startswith(b"this Captioner was created before a fork")


def test_a_failure_is_printed_as_one(captioner):
    (answer,) = captioner.caption(["/nowhere.png"], "What?")
    assert str(answer) == "(ImageError: /nowhere.png: No such file or directory)"


def test_an_array_may_hold_several_images(captioner):
    answers = captioner.caption(np.zeros((2, 5, 5, 3), np.uint8), "What?", max_new_tokens=1)
    assert [answer.failure for answer in answers] == [None, None]


def test_prompts_must_be_as_many_as_images(captioner):
    with pytest.raises(ConfigError, match="2 images and 1 prompts"):
        captioner.caption([b"", b""], ["one"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 0}, "slots must be at least 1, not 0"),
        ({"fit": "squeeze"}, "fit must be one of letterbox, stretch, crop, not 'squeeze'"),
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, not 'tpu'"),
    ],
)
def test_settings_that_cannot_work_are_refused(options, message, tiny_bundle):
    with pytest.raises(ConfigError, match=message):
        Captioner(tiny_bundle.path, **options)


def test_an_answer_has_at_least_one_token(captioner):
    with pytest.raises(ConfigError, match="max_new_tokens must be at least 1"):
        captioner.caption([], [], max_new_tokens=0)


def test_no_images_no_answers(captioner):
    assert captioner.caption([], []) == []


def test_the_limit_ends_an_answer(captioner):
    (answer,) = captioner.caption([ROWS[0]["image"]["bytes"]], ["Describe the image."], max_new_tokens=2)
    assert (answer.finish_reason, answer.answer_tokens) == ("length", 2)


def test_a_device_that_the_bundle_is_not_for_is_an_error(tiny_bundle):
    with pytest.raises(DeviceError, match=r"--device cuda: this bundle's decoder is in fp32 and made for cpu; export"):
        Captioner(tiny_bundle.path, device="cuda")


@pytest.mark.parametrize("end", ["close", "stop", None])
def test_a_captioner_that_is_closed_or_gone_lets_go_of_its_graphs_and_threads(end, tiny_bundle, monkeypatch):
    graphs, before = [], set(threading.enumerate())

    class Session(onnxruntime.InferenceSession):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            graphs.append(weakref.ref(self))

    monkeypatch.setattr("onnxruntime.InferenceSession", Session)
    captioner = Captioner(tiny_bundle.path, slots=2)
    captioner.caption([ROWS[0]["image"]["bytes"]], "What?", max_new_tokens=1)
    threads = set(threading.enumerate()) - before
    if end:
        getattr(captioner, end)()
        getattr(captioner, end)()
        with pytest.raises(RuntimeError, match="the captioner is closed"):
            captioner.caption([], [])
    else:
        del captioner
    assert len(threads) == 2
    while threads:
        threads.pop().join(timeout=60)
    assert [graph() for graph in graphs] == [None, None]


def test_an_exception_within_it_stops_it_at_once(tiny_bundle, monkeypatch):
    stopped = []
    monkeypatch.setattr(Answerer, "stop", lambda _: stopped.append(True))
    with pytest.raises(ZeroDivisionError), Captioner(tiny_bundle.path, slots=1):
        _ = 1 / 0
    assert stopped


def test_rows_of_an_interrupted_call_are_not_answered(tiny_bundle, monkeypatch):
    futures, go = [], threading.Event()
    submit, step = Engine.submit, Decoder.step

    def interrupting(decoder, tokens):
        if not go.is_set():
            while len(futures) < 24:
                time.sleep(0.001)
            press_ctrl_c()
            go.wait(timeout=60)
        return step(decoder, tokens)

    monkeypatch.setattr(Engine, "submit", lambda self, request: futures.append(submit(self, request)) or futures[-1])
    monkeypatch.setattr(Decoder, "step", interrupting)
    captioner = Captioner(tiny_bundle.path, slots=8)
    with pytest.raises(KeyboardInterrupt):
        captioner.caption([ROWS[0]["image"]["bytes"]] * 24, "Describe the image.")
    go.set()
    captioner.close()
    assert sum(future.cancelled() for future in futures) >= 24 - 8


def test_no_bundle_is_one_line(tmp_path):
    with pytest.raises(JobError) as refused:
        Captioner(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_worker_needs_neither_torch_nor_transformers(tiny_bundle):
    script = f"""
import sys
sys.modules["torch"] = sys.modules["transformers"] = None  # importing them fails, as if they were not installed
from PIL import Image
from qvl_batch import Captioner
(answer,) = Captioner({str(tiny_bundle.path)!r}).caption([Image.new("RGB", (9, 9))], ["How many shapes are there?"])
assert answer.finish_reason == "stop", answer
assert "onnx" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True)
