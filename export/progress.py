"""Progress of a long export."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

#: Reports how far a step has got.
Update = Callable[[str], None]


class Progress:
    """Receives the steps of an export; this base class shows nothing."""

    def say(self, line: str) -> None:
        """Show a result."""

    @contextmanager
    def step(self, name: str) -> Iterator[Update]:
        """A step that takes a while; gives an `Update` for its progress."""
        del name
        yield lambda _: None


class ShownProgress(Progress):
    """Prints each finished step with its seconds; on a terminal, also shows the running one."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def say(self, line: str) -> None:
        """As `Progress.say`."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def step(self, name: str) -> Iterator[Update]:
        """As `Progress.step`."""
        began = time.perf_counter()
        with self._console.status(escape(name)) as status:
            yield lambda detail: status.update(escape(f"{name}: {detail}"))
        self.say(f"{name:<40} {time.perf_counter() - began:6.1f} s")
