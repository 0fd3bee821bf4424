"""The bar that shows how training goes on."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

SECONDS = 0.1  # from one drawing to the next: a step costs no more than a look at the clock


class Bar:
    """tqdm's bar with a text at its end, drawn ten times a second at most; or nothing at all.

    Parameters
    ----------
    progress : bool or str
        Whether to show it (with this text before it).
    total, done : int
        Steps in all; steps taken before.
    """

    def __init__(self, progress: bool | str, total: int, done: int) -> None:
        self._bar: Any = None
        self._next = float("inf")
        if not progress:
            return
        try:
            from tqdm import tqdm
        except ImportError as error:
            raise ImportError("progress needs tqdm: pip install 'fastbn[demo]'", name="tqdm") from error
        text = progress if isinstance(progress, str) else None
        self._bar = tqdm(total=total, initial=done, desc=text, unit="step", mininterval=0, miniters=1)
        self._next = 0.0

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def show(self, steps: int, text: Callable[[], str], *, now: bool = False) -> None:
        """Draw it again if it is time, or `now`: steps taken, and what stands at its end."""
        if (now and self._bar is not None) or perf_counter() >= self._next:
            self._bar.set_postfix_str(text(), refresh=False)
            self._bar.update(steps - self._bar.n)
            self._next = perf_counter() + SECONDS
