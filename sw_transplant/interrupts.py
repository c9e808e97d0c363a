"""SIGINT and SIGTERM end the command line: at once, quietly, with exit code 130 or 143.

The package imports this file before anything else, because PyTorch alone takes seconds to import: a program that is
told to stop in that time stops. A process that has inherited an ignored SIGINT (a background job of a shell, some
runners of continuous integration) stops, too. Who imports the package as a library keeps the handlers that are there.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopped(KeyboardInterrupt):
    """A signal told the process to stop; what catches KeyboardInterrupt to clean up catches this one."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.exit_code = 128 + number


def _end(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # an exception out of an import prints a traceback, and there is nothing to clean up yet


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(number)


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Inside, SIGINT and SIGTERM raise `Stopped`, also where they were ignored; afterwards it is as it was.

    Outside of the main thread, where Python allows no handlers, nothing changes.
    """
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: handler for number in SIGNALS if (handler := signal.getsignal(number)) is not None}
    try:
        for number in before:
            signal.signal(number, _stop)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_the_program() -> bool:
    """Whether this process is `sw-transplant` or ``python -m sw_transplant``, which has -m for a name at first."""
    name = sys.argv[0] if sys.argv else ""
    if name == "-m":
        return sys.orig_argv[-len(sys.argv)].removeprefix("-m") == "sw_transplant"
    return Path(name).stem == "sw-transplant"


if _is_the_program() and threading.current_thread() is threading.main_thread():
    for _number in SIGNALS:
        signal.signal(_number, _end)
