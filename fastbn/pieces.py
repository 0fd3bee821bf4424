"""How work is cut up where that is not the kernels' business: an array into pieces, a batch into parts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

PIECE = 1 << 16
"""Elements of a piece: a few temporaries of this size stay in cache."""


def pieces(outer: int, channels: int, inner: int, most: int) -> Iterator[tuple[slice, slice, slice]]:
    """Indices of an (outer, channels, inner) array in C order: pieces of at most `most` elements, each contiguous.

    Whole rows of channels·inner elements where one fits; else some channels of one row, or a stretch of one channel.
    The pieces follow from the shape alone, so that sums over them, in order, are the same for any number of threads.
    """
    row = channels * inner
    rows = max(1, most // max(1, row))
    some = max(1, channels if row <= most else most // inner)
    for o in range(0, outer, rows):
        for c in range(0, channels, some):
            for i in range(0, inner, most):
                yield slice(o, min(o + rows, outer)), slice(c, min(c + some, channels)), slice(i, min(i + most, inner))


def parts(rows: int, size: int, least: int = 1) -> list[slice]:
    """A batch of `rows` in as few parts as hold at most `size` rows each; their sizes differ by one at most.

    Where a part would have fewer than `least` rows, there are fewer parts, and larger ones.
    """
    count = max(1, min(-(-rows // size), rows // least))
    ends = [rows * k // count for k in range(count + 1)]
    return [slice(start, end) for start, end in pairwise(ends)]
