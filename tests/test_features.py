"""An image goes through the vision graph once, whoever asks for it and however many at a time."""

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from interrupts import press_ctrl_c
from PIL import Image

from qvl_batch.bundle.layout import Layout, Resolution
from qvl_batch.errors import NumericError, OutputError
from qvl_batch.schema import Failure
from qvl_batch.vision.cache import VisionCache
from qvl_batch.vision.encoder import VisionEncoder
from qvl_batch.vision.features import RECENT, ImageFeatures


class _Counting:
    """In the graph's place: features are the pixels, and what was encoded is noted."""

    def __init__(self, hold=None):
        self.encoded, self._hold = [], hold

    hidden_size = 3
    layout = Layout(Resolution(1, 3, 9, 9), 7, 0, (), (), ())

    def tokens(self, image):
        return len(image[0])

    def encode(self, image):
        self.encoded.append(int(image[0, 0, 0]))
        if self._hold:
            self._hold.wait(timeout=10)
        if not image.any():
            raise NumericError("all the same", stage="vision")
        return image[0].astype(np.float32)


def _images(*values):
    return [np.full((4, 3, 3), value, np.uint8) for value in values], [bytes([value]) for value in values]


def test_rows_of_one_image_share_its_features():
    vision = _Counting()
    images, keys = _images(1, 2, 1, 1, 2)
    found = ImageFeatures(vision).of(images, keys)
    assert vision.encoded == [1, 2]
    assert [int(row[0, 0]) for row in found] == [1, 2, 1, 1, 2]


def test_calls_at_one_time_share_an_image_that_is_being_encoded():
    hold = threading.Event()
    vision = _Counting(hold)
    features = ImageFeatures(vision, at_once=2)
    with ThreadPoolExecutor(4) as threads:
        calls = [threads.submit(features.of, *_images(1, 2)) for _ in range(4)]
        hold.set()
        results = [call.result() for call in calls]
    assert sorted(vision.encoded) == [1, 2]
    assert all([int(row[0, 0]) for row in rows] == [1, 2] for rows in results)


def test_so_many_are_encoded_at_a_time():
    together = threading.Barrier(3)
    images, keys = _images(*range(1, 7))
    ImageFeatures(_Counting(together), at_once=3).of(images, keys)
    assert not together.broken


def test_the_latest_stay_in_memory_and_others_go():
    vision = _Counting()
    features = ImageFeatures(vision)
    images, keys = _images(*range(1, RECENT + 2))
    features.of(images, keys)
    features.of(images[-1:], keys[-1:])
    assert len(vision.encoded) == RECENT + 1
    features.of(images[:1], keys[:1])
    assert vision.encoded[-1] == 1


def test_large_ones_that_stay_are_fewer(monkeypatch):
    monkeypatch.setattr("qvl_batch.vision.features.RECENT_BYTES", 2 * 4 * 3 * 3)
    vision = _Counting()
    features = ImageFeatures(vision)
    for at in range(3):
        features.of(*([each[at]] for each in _images(1, 2, 3)))
    for at in (2, 1, 0):
        features.of(*([each[at]] for each in _images(1, 2, 3)))
    assert vision.encoded == [1, 2, 3, 1]


def test_features_that_mean_nothing_fail_every_row_of_their_image():
    images, keys = _images(0, 5, 0)
    found = ImageFeatures(_Counting()).of(images, keys)
    assert [isinstance(row, Failure) for row in found] == [True, False, True]
    assert found[0].type == "NumericError"


def test_images_that_leave_no_room_for_an_answer_are_not_encoded():
    vision = _Counting()
    ((a, b, c), keys), ((d,), other) = _images(1, 2, 3), _images(4)
    found = ImageFeatures(vision).of_rows([[d], [a, b, c], [a, b], []], [other, keys, keys[:2], []])
    assert vision.encoded == [4, 1, 2]
    assert [isinstance(row, Failure) or [int(each[0, 0]) for each in row] for row in found] == [[4], True, [1, 2], []]
    assert (found[1].stage, found[1].type) == ("layout", "PromptError")
    assert found[1].message.startswith(
        "the row has too many tokens: 9 of 3 images; the bundle takes 6 beside an answer"
    )


def test_what_happened_once_is_not_remembered_of_an_image():
    vision = _Counting()
    features, images = ImageFeatures(vision), _images(3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vision, "encode", lambda _: (_ for _ in ()).throw(MemoryError))
        with pytest.raises(MemoryError):
            features.of(*images)
    assert int(features.of(*images)[0][0, 0]) == 3


class _Interrupted(_Counting):
    """Who waits for the first image is interrupted, while it is being encoded."""

    def encode(self, image):
        if not self.encoded:
            press_ctrl_c()
        return super().encode(image)


def test_an_interrupt_leaves_nothing_queued():
    hold = threading.Event()
    vision = _Interrupted(hold)
    features, images = ImageFeatures(vision), _images(1, 2, 3)
    with pytest.raises(KeyboardInterrupt):
        features.of(*images)
    hold.set()
    features.close()
    assert vision.encoded == [1]


def test_images_of_an_interrupted_call_can_be_asked_for_again():
    hold = threading.Event()
    features, images = ImageFeatures(_Interrupted(hold)), _images(1, 2, 3)
    with pytest.raises(KeyboardInterrupt):
        features.of(*images)
    hold.set()
    assert [int(row[0, 0]) for row in features.of(*images)] == [1, 2, 3]


def test_kept_features_are_not_made_again(tmp_path):
    images, keys = _images(7, 8)
    encoded = []
    for _ in range(2):
        vision = _Counting()
        features = ImageFeatures(vision, VisionCache(tmp_path, "a" * 64, 3, 10**6)).of(images, keys)
        assert [int(row[0, 0]) for row in features] == [7, 8]
        encoded.append(vision.encoded)
    assert encoded == [[7, 8], []]


def test_a_folder_that_cannot_be_written_ends_the_job(tmp_path):
    kept = VisionCache(tmp_path / "kept", "a" * 64, 3, 10**6)
    for folder in (tmp_path / "kept").iterdir():
        folder.rmdir()
        folder.write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        ImageFeatures(_Counting(), kept).of(*_images(1))


def test_they_are_those_of_the_graph(tiny_bundle):
    vision = VisionEncoder(tiny_bundle, threads=1)
    images = [np.asarray(Image.new("RGB", (672, 672), colour)) for colour in ("red", "blue")]
    found = ImageFeatures(vision, at_once=2).of(images, [b"red", b"blue"])
    assert all((row == vision.encode(image)).all() for row, image in zip(found, images, strict=True))
