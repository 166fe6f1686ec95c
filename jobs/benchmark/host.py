"""A contender in a process of its own.

    with Host("fp32", "benchmark.ours", "Ours", bundle, slots, new_tokens) as host:
        answers = host.call("answer", rows)

The child is this module run as a script by whatever Python the contender needs; it imports nothing
but the standard library before the contender.
"""

import importlib
import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

ROOT = Path(__file__).parents[2]


class Host:
    """Parent's end.

    Args:
        name: of the contender, for messages.
        module, kind: where its class is.
        args: what it is made of.
        python: interpreter to run it with.

    Raises:
        RuntimeError: the contender failed; the message has its traceback.
    """

    def __init__(self, name: str, module: str, kind: str, *args: Any, python: Path | None = None) -> None:
        self.name = name
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT / "jobs", ROOT)))}
        ours, theirs = socket.socketpair()
        with theirs:
            command = [str(python or sys.executable), "-m", "benchmark.host", str(theirs.fileno())]
            self._process = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])  # noqa: S603
        self._connection: Connection[Any, Any] = Connection(ours.detach())
        try:
            self._exchange((module, kind, args))
        except RuntimeError:
            self.close()
            raise

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of the contender."""
        return self._exchange((method, args))

    def seconds(self, method: str, *args: Any) -> float:
        """Time of a call, measured beside the contender."""
        return float(self._exchange(("seconds of", method, args)))

    def peak_memory(self) -> int:
        """Bytes of memory that the process has had at most."""
        return int(self._exchange(("peak memory",)))

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.terminate()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _exchange(self, message: tuple[Any, ...]) -> Any:
        try:
            self._connection.send(message)
            failure, result = self._connection.recv()
        except (EOFError, OSError):
            raise RuntimeError(f"{self.name} ended: exit status {self._process.wait()}") from None
        if failure:
            raise RuntimeError(f"{self.name} failed: {failure}")
        return result


def serve(connection: "Connection[Any, Any]") -> None:
    """Child's end: make the contender, then do as told until the parent hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent's to handle
    contender: Any = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            result = _do(contender, message)
            if contender is None:
                contender, result = result, None
        except Exception:  # whatever it is, the parent says it
            connection.send((traceback.format_exc(), None))
        else:
            connection.send((None, result))


def _do(contender: Any, message: tuple[Any, ...]) -> Any:
    if contender is None:
        module, kind, args = message
        return getattr(importlib.import_module(module), kind)(*args)
    match message:
        case ("peak memory",):
            from benchmark.memory import peak_memory  # noqa: PLC0415

            return peak_memory()
        case ("seconds of", method, args):
            from benchmark.rows import seconds  # noqa: PLC0415

            return seconds(lambda: getattr(contender, method)(*args))
        case (method, args):
            return getattr(contender, method)(*args)


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
