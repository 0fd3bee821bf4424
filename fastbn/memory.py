"""Memory for results, where the caller names no `out`: what large ones free is kept for the next of their size."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np

from . import checks

Array = np.ndarray[Any, np.dtype[Any]]


@lru_cache(maxsize=1)
def _compiled() -> Any:
    """What keeps it, loaded at first use; None where fastbn was installed without a compiler."""
    try:
        return import_module("fastbn._kernels.memory")
    except ImportError:
        return None


@lru_cache(maxsize=1)
def _maker() -> Callable[[Array], Array]:
    compiled = _compiled()
    return (lambda x: np.empty_like(x, subok=False)) if compiled is None else compiled.output_like


def output_like(x: Array) -> Array:
    """As `numpy.empty_like`, and always a plain ndarray."""
    return _maker()(x)


def set_kept_memory(most: int) -> None:
    """Choose how much memory of freed results is kept for the next ones, in the whole process.

    A result of 4 MiB or more that no `out` was given for leaves its memory, when it is freed, to the next result of
    as many bytes. Fresh memory would cost more than batch normalization itself: the system clears each page before
    the first write to it.

    Parameters
    ----------
    most : int
        Bytes; where nothing is said, an eighth of the memory that this process may use, as far as the machine, its
        limits and a control group at ``/sys/fs/cgroup`` tell. What was freed first goes first. 0 keeps nothing, and
        gives back what was kept.

    Raises
    ------
    TypeError, ValueError
        If it is not an integer of at least 0.

    Notes
    -----
    What is kept counts as memory of the process, and each process keeps its own. Of all but the newest 256 MiB of it
    (or an eighth of `most`, if that is less) the whole huge pages, of 2 MiB, are marked as free to take: under Linux
    and macOS the system takes them when memory is short. `show_config` says how much is kept.

    A program that gives NumPy's arrays a memory handler of its own (NEP 49) gets its results by that. Installed
    without a compiler, fastbn keeps nothing.
    """
    most = min(checks.not_negative("most", most), sys.maxsize)
    compiled = _compiled()
    if compiled is not None:
        compiled.set_kept(most)


def kept() -> tuple[int, int]:
    """Bytes that are kept now, and that may be."""
    compiled = _compiled()
    return (0, 0) if compiled is None else compiled.kept()
