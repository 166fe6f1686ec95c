"""Command lines: the fields of a dataclass are options, their docstrings the help, errors one line and a status.

This module knows nothing of what the options mean.
"""

import signal
import sys
from collections.abc import Callable
from typing import TypeVar

import tyro

from qvl_batch.errors import ConfigError, JobError

#: Exit statuses of a program that could not do its work, and of one that was stopped (128 + SIGINT, as shells have it).
FAILED, STOPPED = 1, 130
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


def exit_status(
    program: str,
    work: Callable[[], int],
    *,
    stopped: Callable[[], str] = lambda: "",
    expected: tuple[type[Exception], ...] = (JobError,),
) -> int:
    """Do the work of a program, and give its exit status.

    Args:
        program: its name, which errors begin with.
        work: returns the status if nothing goes wrong.
        stopped: what to say when Ctrl-C ended it.
        expected: errors that are printed as one line, without a traceback.
    """
    try:
        return work()
    except expected as error:
        print(f"{program}: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt as stop:
        print("; ".join([f"{program}: stopped", *map(str, stop.args), *filter(None, [stopped()])]), file=sys.stderr)
        return STOPPED


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
