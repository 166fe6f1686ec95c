"""What a long export says meanwhile."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape

#: Says how far a step is.
Update = Callable[[str], None]


class Progress:
    """Steps of an export; this one says nothing of them."""

    def say(self, line: str) -> None:
        """Say something that was found."""

    @contextmanager
    def step(self, name: str) -> Iterator[Update]:
        """Something that takes a while."""
        del name
        yield lambda _: None


class ShownProgress(Progress):
    """A line with its seconds for each step that ends, and on a terminal the one that goes on."""

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
