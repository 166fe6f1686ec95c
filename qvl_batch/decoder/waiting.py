"""Rows that wait for a slot: which are prefilled next, and what they take over from rows before them.

What enters: requests with their futures, in order, and contents of the prefix-cache entries. What leaves: those to
prefill next.

This module knows nothing of slots or graphs.
"""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from qvl_batch.decoder.requests import Completion, Request

#: Largest share of padding in a prefill of several rows.
PADDING = 0.1

Pending = tuple[Request, "Future[Completion]"]
#: Answers to one row: one prefill serves them all.
Group = list[Pending]


def fit_one_prefill(lengths: Sequence[int], most_tokens: int) -> bool:
    """Whether rows of these lengths can be one prefill: of at most so many tokens, and with little padding."""
    padded = len(lengths) * max(lengths)
    return padded <= most_tokens and sum(lengths) >= (1 - PADDING) * padded


class Waiting:
    """Waiting requests, in order.

    Args:
        slots: most requests that are admitted at a time; of a row with more answers, some wait for another prefill.
        prefix_entries: prefix-cache entries that there are.
    """

    def __init__(self, slots: int, prefix_entries: int) -> None:
        self._groups: deque[Group] = deque()
        self._slots, self._entries = slots, prefix_entries
        #: Contents of the prefix-cache entries, by entry, the least recently used first.
        self._prefixes: dict[int, NDArray[np.int64]] = {}

    def __len__(self) -> int:
        """How many answers wait."""
        return sum(map(len, tuple(self._groups)))

    def add(self, item: Pending) -> None:
        """Add a request behind all others, or beside those that have its row."""
        for group in reversed(self._groups):  # other threads can have added theirs in between
            if group[0][0].row is item[0].row and len(group) < self._slots:
                group.append(item)
                return
        self._groups.append([item])

    def after_prefix(self) -> tuple[Group, int, int | None]:
        """The first waiting row whose prefix is cached, with the length of the prefix and its entry; else the first
        waiting row, 0 and None.
        """
        for group in self._groups:
            shared, entry = max(
                ((group[0][0].shared_with(content), entry) for entry, content in self._prefixes.items()),
                default=(0, None),
            )
            if entry is not None and shared:
                self._prefixes[entry] = self._prefixes.pop(entry)  # most recently used
                return group, shared, entry
        return self._groups[0], 0, None

    def take(self, group: Group) -> Group:
        """Take a row, without requests that were cancelled."""
        # By identity: requests and futures have no equality.
        self._groups = deque(each for each in self._groups if each is not group)
        return [item for item in group if item[1].set_running_or_notify_cancel()]

    def take_alike(self, rows: int, slots: int, tokens: int) -> list[Group]:
        """Take waiting rows for one prefill: the first, and rows of about its length, so that there is little padding;
        no two that share a prefix, since the second can take over that of the first.

        Args:
            rows: most rows.
            slots: most answers to them; the first row is taken in any case.
            tokens: most tokens of the prefill, padding included.
        """
        length = [len(group[0][0].row.input_ids) for group in self._groups]
        chosen, left = [0], slots - len(self._groups[0])
        for index in sorted(range(1, len(length)), key=lambda index: abs(length[index] - length[0])):
            if len(chosen) == rows or left <= 0:
                break
            group = self._groups[index]
            if (
                len(group) <= left
                and fit_one_prefill([length[at] for at in (*chosen, index)], tokens)
                and not any(group[0][0].shared_with(self._groups[other][0][0].content) for other in chosen)
            ):
                chosen.append(index)
                left -= len(group)
        groups = [self._groups[index] for index in sorted(chosen)]
        return [taken for group in groups if (taken := self.take(group))]

    def prefix_to_store(self, request: Request) -> tuple[int, int] | None:
        """The length of the longest prefix that a waiting row shares with a row that was prefilled, and the entry that
        is to hold it; None if an entry has as much.
        """
        lengths = [(group[0][0].shared_with(request.content), group[0][0]) for group in self._groups]
        length, waiting = max(lengths, key=lambda pair: pair[0], default=(0, request))
        if length <= max((waiting.shared_with(content) for content in self._prefixes.values()), default=0):
            return None
        # A free entry, or that of the least recently used prefix.
        entry = len(self._prefixes) if len(self._prefixes) < self._entries else next(iter(self._prefixes))
        self._prefixes.pop(entry, None)
        self._prefixes[entry] = request.content[:length]
        return length, entry

    def clear(self) -> list["Future[Completion]"]:
        """Take all; returns the futures of those that were not cancelled."""
        futures = [future for group in self._groups for _, future in group]
        self._groups.clear()
        return [future for future in futures if future.set_running_or_notify_cancel()]
