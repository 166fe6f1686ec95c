"""Locks of a folder: what identifies their holder, and whether that process still runs."""

import os
import socket
from pathlib import Path
from typing import Any

from qvl_batch.errors import OutputError

#: Name of the lock file, and prefix of the lock objects in an object store.
LOCK = "_lock"


def this_process() -> str:
    """Names this process, for messages."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def this_machine() -> str:
    """Identifies this machine until its next boot; containers on one machine differ by their host name."""
    return f"{socket.gethostname()} {Path('/proc/sys/kernel/random/boot_id').read_text().strip()}"


def died_here(holder: dict[str, Any]) -> bool:
    """Whether a lock's holder was a process of this machine that no longer runs. False if that is not known.

    Args:
        holder: contents of the lock.
    """
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
