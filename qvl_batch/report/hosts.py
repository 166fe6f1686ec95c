"""Failures by host, of images that rows name by address: in bounded memory, for any number of hosts.

What enters: tables of answers with the pipeline's own columns. What leaves: the hosts with the most failures.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from qvl_batch.columns import LOCATIONS
from qvl_batch.input.addresses import host_of
from qvl_batch.report.sample import short
from qvl_batch.schema import LOCATION_FIELD, readable

#: Hosts that are shown; most hosts that are counted at a time; most reasons of one.
TOP, MOST_HOSTS, MOST_REASONS = 20, 10_000, 8
#: An address in a message, and what is said of its length where it was cut.
_ADDRESS = re.compile(r"[a-z0-9]+://\S+( \([\d,]+ characters\))?")


@dataclass(slots=True)
class _Host:
    rows: int = 0
    failures: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def fail(self, reason: str) -> None:
        """Count a failure. A reason of more than half of the failures is kept, whatever the others are."""
        self.failures += 1
        if reason not in self.reasons and len(self.reasons) >= MOST_REASONS:
            self.reasons = Counter({each: count - 1 for each, count in self.reasons.items() if count > 1})
        else:
            self.reasons[reason] += 1


class HostFailures:
    """Counts rows and failures by host.

    With more than `MOST_HOSTS`, those with the fewest failures are forgotten; counts are then the least that they can
    be.
    """

    def __init__(self) -> None:
        self._hosts: dict[str, _Host] = {}
        self._are_all = True

    def add(self, table: pa.Table) -> None:
        """Add a table of answers."""
        named = table.filter(pc.greater(pc.list_value_length(table[LOCATIONS]), 0))
        columns = (named[LOCATIONS].to_pylist(), named[LOCATION_FIELD.name].to_pylist())
        for locations, failed, message in zip(*columns, readable(named["error_message"]), strict=True):
            for host in {host_of(each) for each in locations if each is not None}:
                if host is not None:
                    self._hosts.setdefault(host, _Host()).rows += 1
            if failed is not None and (host := host_of(failed)) is not None:
                self._hosts[host].fail(reason_of(message))
        if len(self._hosts) > MOST_HOSTS:
            kept = sorted(self._hosts, key=self._weight, reverse=True)[: MOST_HOSTS // 2]
            self._hosts = {host: self._hosts[host] for host in kept}
            self._are_all = False

    def _weight(self, host: str) -> tuple[int, int]:
        return self._hosts[host].failures, self._hosts[host].rows

    def record(self) -> dict[str, Any] | None:
        """The entry in `_run.json`; None if no image came from a host."""
        if not self._hosts:
            return None
        failing = [host for host, each in self._hosts.items() if each.failures]
        top = sorted(failing, key=lambda host: (-self._hosts[host].failures, host))[:TOP]
        return {
            "hosts": len(self._hosts),
            "failing": len(failing),
            "are_all": self._are_all,
            "most_failures": [
                {
                    "host": short(host),
                    "failures": self._hosts[host].failures,
                    "rows": self._hosts[host].rows,
                    "reason": next((reason for reason, _ in self._hosts[host].reasons.most_common(1)), "various"),
                }
                for host in top
            ],
        }


def reason_of(message: str) -> str:
    """The message of a row without addresses, so that those of other images are alike."""
    text = re.sub(r"^image \d+ of \d+: ", "", message)
    return short(_ADDRESS.sub("…", text).removeprefix("… ")) or ""
