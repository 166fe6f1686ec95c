"""From an answer with boxes to boxes in pixels of the user's files.

What enters: the text of an answer, and the sizes of its row's images. What leaves: boxes; or None if the answer is not
readable as boxes.

Qwen2.5-VL writes boxes and points as JSON, mostly in a fence, in pixels of the image that it saw:

    ```json
    [
        {"bbox_2d": [12, 40, 210, 300], "label": "dog"},
        {"point_2d": [88, 90], "label": "ball"}
    ]
    ```

Names are under `label`, `sub_label` or, where it reads text, `text_content`.

This module knows nothing of pixels, nor of rows.
"""

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qvl_batch.config import Fit
from qvl_batch.images.view import ImageSize
from qvl_batch.schema import Answer

_BOX, _POINT = "bbox_2d", "point_2d"
#: Keys of an entry's name, and of the image that it is in; the first that has a text or a number counts.
_LABELS = ("label", "sub_label", "text_content")
_IMAGES = ("image", "image_index", "image_id", "image_number")
_FENCE = re.compile(r"```\w*")
#: Where JSON of objects or lists begins, or is cut off; a `[` in prose is followed by other things.
_BEGINNING = re.compile(r'\{\s*(?:["}]|\Z)|\[\s*(?:[\[{\]]|\Z)')
#: A string, which can be cut off; or a comma before a closing bracket, which JSON does not allow and the model writes.
_STRING_OR_COMMA = re.compile(r'("(?:[^"\\]|\\.?)*+"?)|,(?=\s*[\]}])', re.DOTALL)
_IMAGE_NUMBER = re.compile(r"(?:(?:image|picture)[\s_#-]*)?(\d{1,6})", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Box:
    """A box in the user's file; a point is a box of no size.

    Args:
        image: index of its image among the row's images; None if the answer does not say which of several it is.
        label: what is in it, None if the answer does not say.
        x0, y0, x1, y1: left, top, right, bottom in pixels; None if `image` is.
    """

    image: int | None
    label: str | None
    x0: float | None
    y0: float | None
    x1: float | None
    y1: float | None


def boxes(
    answer: str | None, images: Sequence[ImageSize], fit: Fit | None, *, upright: bool = False
) -> list[Box] | None:
    """Boxes of an answer, in pixels of the files that the images came from.

    Coordinates are those of the picture as it is stored: fit, padding and scale are undone, and so is the turn that a
    file's EXIF orientation asks for. That is the array that `numpy.asarray(PIL.Image.open(file))` gives. Most
    programs show the picture turned upright; `upright=True` gives boxes in that one, whose size is `image_width` x
    `image_height` of the output. (0, 0) is the top left corner, (width, height) the bottom right one.

    Boxes are clipped to the picture, so one that lies wholly in the bars of a letterbox becomes a line or a point on
    the picture's edge.

    An answer on one image is about that image, whatever its entries say. An answer on several has to name the image of
    each entry under `image` (also `image_index`, `image_id`, `image_number`), as a number from 1 on, or a text such as
    "image 2". If an entry names none, or one that the row does not have, its box is kept with its label alone: image
    and coordinates are None, since images differ in how they were scaled.

    Args:
        answer: text of the answer.
        images: sizes of the row's images, in order.
        fit: how images became square, `--fit` of the job; None if they kept their proportions.
        upright: leave the pictures upright, as most programs show them.

    Returns:
        Boxes in the order of the answer, none if it says that there are none, `[]`. None if it is unreadable: it has no
        JSON with boxes, the JSON is damaged or cut off, or a box has other than four finite numbers. Then no box is
        returned, even if some could be read, since the others would be lacking without a sign.
    """
    entries = None if answer is None else _entries(answer)
    if entries is None:
        return None
    found: list[Box] = []
    for entry in entries:
        places = _places(entry)
        if places is None:
            return None
        label, image = _label(entry), 0 if len(images) == 1 else _image(entry, len(images))
        if image is None or not images:
            found.extend(Box(None, label, None, None, None, None) for _ in places)
        else:
            found.extend(Box(image, label, *_in_file(place, images[image], fit, upright=upright)) for place in places)
    return found


def complete(answer: Answer) -> str | None:
    """The text of an answer, None if it failed or was cut off: JSON can be cut where it still reads well."""
    return answer.answer if answer.finish_reason in {"stop", "abstain"} else None


def _entries(answer: str) -> list[dict[str, Any]] | None:
    """JSON objects of an answer that have a box or a point; None if there is no readable JSON that could have some."""
    outside, *fenced = _FENCE.split(answer)
    values: list[Any] = []
    for text in fenced[::2] or [outside]:
        try:
            values.extend(_json_values(text))
        except (ValueError, RecursionError):
            return None
    entries: list[dict[str, Any]] = []
    says_none = False
    pending = values[::-1]
    while pending:  # no recursion: the model can nest as deeply as the parser allows
        value = pending.pop()
        if isinstance(value, dict):
            if _BOX in value or _POINT in value:
                entries.append(value)
            parts = [part for key, part in value.items() if key not in {_BOX, _POINT}]
            pending.extend(reversed(parts))
        elif isinstance(value, list):
            says_none |= not value
            pending.extend(reversed(value))
    return entries if entries or says_none else None


def _json_values(text: str) -> Iterator[Any]:
    """JSON values in a text, which other words may surround.

    Raises:
        ValueError: something that begins like one is none, has a key twice, or is cut off.
        RecursionError: a value is nested too deeply.
    """
    first = _BEGINNING.search(text)
    if first is None:
        return
    text = _STRING_OR_COMMA.sub(lambda match: match[1] or "", text[first.start() :])
    decoder = json.JSONDecoder(strict=False, object_pairs_hook=_object)
    at = 0
    while beginning := _BEGINNING.search(text, at):
        value, at = decoder.raw_decode(text, beginning.start())
        yield value
    if text[at:].strip() == ",":
        raise ValueError("cut off between two objects")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice: one of two boxes would be lost")
    return found


def _places(entry: dict[str, Any]) -> list[tuple[float, float, float, float]] | None:
    """Boxes of an entry, or its points if it has no box, in pixels of what the model saw; None if one is unreadable."""
    key = _BOX if entry.get(_BOX) or _POINT not in entry else _POINT
    value = entry[key] or []
    if not isinstance(value, list):
        return None
    places = value if all(isinstance(each, list) for each in value) else [value]
    found: list[tuple[float, float, float, float]] = []
    for place in places:
        numbers = [_number(each) for each in place]
        if key == _POINT:
            numbers *= 2
        match numbers:
            case [float(x0), float(y0), float(x1), float(y1)]:
                found.append((x0, y0, x1, y1))
            case _:
                return None
    return found


def _number(value: object) -> float | None:
    """A finite number, also from a text; None for all else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _label(entry: dict[str, Any]) -> str | None:
    values = (entry.get(key) for key in _LABELS)
    value = next((value for value in values if isinstance(value, str | int | float) and value != ""), None)
    # JSON can hold half a surrogate pair, which is no text.
    return None if value is None else str(value).encode(errors="replace").decode()


def _image(entry: dict[str, Any], images: int) -> int | None:
    """Index of the image that an entry names, None if it names none of the row's."""
    values = (entry.get(key) for key in _IMAGES)
    name = next((str(value) for value in values if isinstance(value, str | int)), "")
    match = _IMAGE_NUMBER.fullmatch(name.strip())
    return int(match[1]) - 1 if match and 1 <= int(match[1]) <= images else None


def _in_file(
    place: tuple[float, float, float, float], image: ImageSize, fit: Fit | None, *, upright: bool
) -> tuple[float, float, float, float]:
    """A box in what the model saw, as a box in the file: left, top, right, bottom."""
    corners = []
    for seen in (place[:2], place[2:]):
        x, y = image.original_point(fit, seen)
        corner = (min(max(x, 0.0), float(image.width)), min(max(y, 0.0), float(image.height)))
        corners.append(corner if upright else image.stored_point(corner))
    (x0, x1), (y0, y1) = (sorted(pair) for pair in zip(*corners, strict=True))
    return x0, y0, x1, y1
