"""Memory of processes, from Linux's `/proc`."""

import os
import resource
import threading
from pathlib import Path
from typing import Self

#: Seconds between two samples.
INTERVAL = 0.5


def peak_memory() -> int:
    """Peak resident memory of this process in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class PeakMemory:
    """Context manager that samples the memory of this process and its descendants; `peak` is in bytes.

    Shared memory counts once: a sample is the sum of the processes' proportional set sizes.
    """

    def __init__(self) -> None:
        self.peak = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self.peak = max(self.peak, sum(map(_proportional_set_size, family(os.getpid()))))


def family(root: int) -> list[int]:
    """Ids of a process and its descendants."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                # The process name before it can contain spaces and brackets.
                parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue  # it has just ended
    members = [root]
    for member in members:  # the list grows while it is read
        members += [process for process, parent in parents.items() if parent == member]
    return members


def _proportional_set_size(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
