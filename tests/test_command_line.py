"""What a command was called with is all taken, or refused; what ends jobs stops them as Ctrl-C does."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from qvl_batch.command_line import settings, stop_as_by_ctrl_c
from qvl_batch.config import CaptionConfig
from qvl_batch.errors import ConfigError

CALL = ["caption.py", "--bundle", "b", "--input", "i", "j", "--output", "o"]


def test_an_option_takes_all_values_behind_it(monkeypatch):
    monkeypatch.setattr(sys, "argv", [*CALL, "--keep-columns", "x", "y"])
    config = settings(CaptionConfig)
    assert (config.input, config.keep_columns) == (("i", "j"), ("x", "y"))


@pytest.mark.parametrize("again", [["--input", "k"], ["--input=k"], ["--keep-columns", "x", "--keep_columns", "y"]])
def test_an_option_that_is_there_twice_is_refused(again, monkeypatch):
    monkeypatch.setattr(sys, "argv", [*CALL, *again])
    with pytest.raises(ConfigError, match=r"--(input|keep-columns) is given more than once: give it once, followed by"):
        settings(CaptionConfig)


def test_a_terminal_that_closes_stops_what_does_not_ignore_it(monkeypatch):
    handlers = {}
    monkeypatch.setattr(signal, "signal", handlers.__setitem__)
    monkeypatch.setattr(signal, "getsignal", {signal.SIGHUP: signal.SIG_IGN}.get)
    is_stopped = stop_as_by_ctrl_c()
    assert handlers.keys() == {signal.SIGINT, signal.SIGTERM}
    assert not is_stopped()
    with pytest.raises(KeyboardInterrupt):
        handlers[signal.SIGTERM](signal.SIGTERM, None)
    assert is_stopped()


@pytest.mark.parametrize("variable", ["RAY_TMPDIR", pytest.param("HOME", marks=pytest.mark.long)])
def test_a_ray_that_cannot_be_started_is_one_line(variable, tiny_bundle, tmp_path):
    (tmp_path / "file").write_text("")
    env = {variable: str(tmp_path / "file" / "folder")}
    command = [sys.executable, "jobs/caption.py", "--bundle", tiny_bundle.path, "--output", tmp_path / "out"]
    command += ["--input", "datasets/demo/questions.parquet", "--limit", "1"]
    plain = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    result = subprocess.run(command, cwd=ROOT, env=plain | env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert "caption: Ray cannot be started: " in result.stderr
    assert "Traceback" not in result.stderr
