"""Checkpoints with the attention of published models, in two layers with a narrow inside."""

from pathlib import Path
from unittest import mock

import make_model


def make_shallow(folder: Path, shape: str) -> Path:
    """Write one with made-up weights; `shape` is a name in `datasets/make_model.py`."""
    text, vision = make_model.SHAPES[shape]
    text = text | {"num_hidden_layers": 2, "max_window_layers": 2, "intermediate_size": 1024, "vocab_size": 512}
    vision = vision | {"depth": 2, "fullatt_block_indexes": [1], "intermediate_size": 256}
    with mock.patch.dict(make_model.SHAPES, shallow=(text, vision)):
        make_model.make_model(folder, "shallow")
    return folder
