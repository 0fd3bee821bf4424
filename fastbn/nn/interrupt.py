"""Ctrl-C, heard between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType


class Interrupt:
    """While it is entered, Ctrl-C sets `asked`, and a second Ctrl-C raises KeyboardInterrupt, as it does elsewhere.

    In other threads than the main one, and where the program has a handler of its own, that stays as it is.

    Attributes
    ----------
    asked : bool
        Whether there was a Ctrl-C.
    closing : bool
        Set it when `asked` is answered. No further Ctrl-C is let through; without it, the one that there was is raised
        at the exit.
    """

    def __init__(self) -> None:
        self.asked = self.closing = self._ours = False

    def __enter__(self) -> Interrupt:
        main = threading.current_thread() is threading.main_thread()
        if main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, self._hear)
            self._ours = True
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if self._ours:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if self.asked and not self.closing and error is None:
            raise KeyboardInterrupt

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.asked and not self.closing:
            raise KeyboardInterrupt
        self.asked = True
