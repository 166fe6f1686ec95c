"""A contender in its own process.

    with Host("fp32", "benchmark.ours", "Ours", bundle, slots, new_tokens) as host:
        answers = host.call("answer", rows)

The child runs this module as a script, with the interpreter that the contender needs. Before the
contender it imports only the standard library.
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
    """The parent's side.

    Args:
        name: of the contender, for messages.
        module, kind: module and name of its class.
        args: arguments of its constructor.
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
        """Seconds that a call takes, measured in the child."""
        return float(self._exchange(("seconds of", method, args)))

    def peak_memory(self) -> int:
        """Peak resident memory of the process in bytes."""
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
    """The child's side: create the contender, then serve calls until the parent closes the connection."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles it
    contender: Any = None
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        try:
            result = _handle(contender, message)
            if contender is None:
                contender, result = result, None
        except Exception:  # the parent reports it, whatever it is
            connection.send((traceback.format_exc(), None))
        else:
            connection.send((None, result))


def _handle(contender: Any, message: tuple[Any, ...]) -> Any:
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
