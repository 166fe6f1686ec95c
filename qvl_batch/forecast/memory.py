"""Memory of this process and those that it started, from Linux's `/proc`.

What enters: running processes. What leaves: the most bytes that they held, together and by what they do.
"""

import os
import threading
from collections import Counter
from pathlib import Path
from typing import Self

#: Seconds between two samples.
INTERVAL = 0.5
#: What a process does, by a part of its title. Ray gives the processes of its tasks and actors titles.
ROLES = {
    "JoinedWorker": "vision and decoder",
    "VisionWorker": "vision",
    "DecoderWorker": "decoder",
    "ray::": "tasks",
}


class PeakMemory:
    """Context manager that samples the memory of this process and its descendants.

    Shared memory counts once: a sample is the sum of the processes' proportional set sizes.

    Attributes:
        peak: of all processes together, in bytes.
        by_role: of the processes of each of `ROLES`, of this process (`driver`), and of `others`, each at its own time.
    """

    def __init__(self) -> None:
        self.peak = 0
        self.by_role: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="qvl-memory", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            sample: Counter[str] = Counter()
            for process in family(os.getpid()):
                sample[_role(process)] += _proportional_set_size(process)
            self.peak = max(self.peak, sample.total())
            self.by_role |= sample  # the larger of two counts


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


def _role(process: int) -> str:
    if process == os.getpid():
        return "driver"
    try:
        title = Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return "others"  # it has just ended
    return next((role for part, role in ROLES.items() if part in title), "others")


def _proportional_set_size(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0  # it has just ended
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
