"""Damaged images do no harm, and a fuzz that finds harm says so."""

import subprocess
import sys

import fuzz
import pytest
from conftest import ROOT


def test_three_hundred_damaged_images_do_no_harm(tmp_path):
    command = [sys.executable, "tests/fuzz.py", "--images", "300", "--seed", "1", "--save", str(tmp_path / "kept")]
    result = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "300 damaged images" in result.stdout
    for outcome in ("decoded", "refused: the bytes begin like PNG", "refused: the bytes are no image"):
        assert outcome in result.stdout
    assert not (tmp_path / "kept").exists()


HARM = {
    "os.kill(os.getpid(), 11)": "crashed with SIGSEGV",
    "os._exit(0)": "exited",
    "time.sleep(1000)": "hung",
    "np.ones(100_000_000, np.uint8)": "too much memory",
    "bytes(1 << 34)": "too much memory",
    "1 / 0": "raised ZeroDivisionError",
    "warnings.warn('odd')": "warned UserWarning",
    "_seen(np.zeros((56, 56, 3), np.float32))": "gave no pixels",
    "_seen(np.zeros((3, 56, 56), np.uint8))": "gave no pixels",
}


PROGRAM = """
import fuzz, os, time, warnings
import numpy as np
from qvl_batch.images.pixels import Seen
from qvl_batch.images.view import ImageSize
def _seen(pixels):
    return Seen(pixels, ImageSize(56, 56, 56, 56))
fuzz.seen_or_failure = lambda *_: {}
fuzz.decode_all()
"""


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_seen_kept_and_named(harm, tmp_path, monkeypatch, capsys):
    decoder = fuzz.Decoder
    monkeypatch.setattr(fuzz, "Decoder", lambda: decoder(["-c", PROGRAM.format(harm)]))
    monkeypatch.setattr(fuzz, "SECONDS", 1.0 if "sleep" in harm else 60.0)
    monkeypatch.setattr(fuzz, "PEAK", 80_000_000)
    outcome = fuzz.fuzz(2, 0, tmp_path)
    assert outcome.counts == {HARM[harm]: 2}
    assert not outcome.passed
    assert sorted(tmp_path.iterdir()) == sorted(outcome.harmful)
    assert all(path.stat().st_size and str(path) in capsys.readouterr().out + str(outcome) for path in outcome.harmful)
