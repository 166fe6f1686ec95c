"""Settings as command lines: the fields of a dataclass are options, their docstrings the help.

This module knows nothing of what they mean.
"""

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from qvl_batch.errors import ConfigError

T = TypeVar("T")


def settings(kind: type[T], prog: str | None = None) -> T:
    """What this process was called with, as `kind` has it.

    Args:
        kind: the dataclass.
        prog: name of the program in its help, if not that of its file.

    Raises:
        ConfigError: an option is there twice, of which the parser would take the last without a word; or `kind` says.
        SystemExit: the help was asked for, or there is no such option or value.
    """
    given = [argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:] if argument.startswith("--")]
    twice = next((option for option in given if given.count(option) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is there more than once: give it once, with all its values behind it")
    return tyro.cli(kind, prog=prog, config=(tyro.conf.FlagCreatePairsOff,))


def stop_as_by_ctrl_c() -> Callable[[], bool]:
    """Let what a cluster ends jobs by, and a terminal that closes, stop as Ctrl-C does: so that no answer is lost.

    Returns:
        Says whether one of them has happened. Python drops the exception where it lets none through, such as in hooks
        of a fork, so that a long job had better ask.
    """
    happened: list[int] = []

    def stop(number: int, _: object) -> None:
        happened.append(number)
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # as `nohup` has it
            signal.signal(name, stop)
    return lambda: bool(happened)
