"""Ctrl-C while the main thread waits for another one."""

import signal
import threading
import time


def press_ctrl_c() -> None:
    """From another thread, interrupt what the main one waits for by now, or will at once."""
    time.sleep(0.1)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
