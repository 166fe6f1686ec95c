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
    """The command line of this process as settings.

    Args:
        kind: the dataclass of the settings.
        prog: name of the program in its help; by default that of its file.

    Raises:
        ConfigError: an option is given twice, of which the parser would silently take the last; or `kind` refuses it.
        SystemExit: the help was asked for, or there is no such option or value.
    """
    given = [argument.partition("=")[0].replace("_", "-") for argument in sys.argv[1:] if argument.startswith("--")]
    twice = next((option for option in given if given.count(option) > 1), None)
    if twice is not None:
        raise ConfigError(f"{twice} is given more than once: give it once, followed by all its values")
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
    """Let SIGTERM, by which clusters end jobs, and SIGHUP, of a terminal that closes, raise KeyboardInterrupt as Ctrl-C
    does, so that answers are published before the process ends.

    Returns:
        A function that says whether a signal has arrived. Python drops exceptions in some places, such as hooks of a
        fork, so a long job should ask.
    """
    happened: list[int] = []

    def stop(number: int, _: object) -> None:
        happened.append(number)
        raise KeyboardInterrupt

    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(name) is not signal.SIG_IGN:  # `nohup` ignores SIGHUP
            signal.signal(name, stop)
    return lambda: bool(happened)
