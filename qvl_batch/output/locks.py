"""Who holds a folder: what a lock says of its holder, and whether that one can still be alive."""

import os
import socket
from pathlib import Path
from typing import Any

from qvl_batch.errors import OutputError

#: Name of a lock's file, and what the names of its objects begin with.
LOCK = "_lock"


def this_process() -> str:
    """Names this process for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def this_machine() -> str:
    """Names a machine from boot to boot, and its containers apart."""
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def died_here(holder: dict[str, Any]) -> bool:
    """Whether a process of this machine held a lock and is no more."""
    if holder.get("machine") != this_machine():
        return False
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, KeyError):
        return False
    return False


def held_by(folder: object, holder: str | None) -> OutputError:
    """The error for a folder that another job holds."""
    return OutputError(
        f"another job is writing to {folder} ({holder or 'unknown'}): wait for it, or give another --output"
    )
