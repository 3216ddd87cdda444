"""Sorting networks: Batcher's merge exchange, pruned to the outputs that are wanted."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

MAX_INPUTS = 512
"""Most candidates that a network sorts; points with more take the exact path."""


def merge_exchange(n: int) -> list[tuple[int, int]]:
    """Comparators (i, j), i < j, that sort n entries (Knuth, volume 3, section 5.2.2, algorithm M)."""
    comparators = []
    t = max(1, math.ceil(math.log2(n))) if n > 1 else 1
    p = 1 << (t - 1)
    while p > 0:
        q, r, d = 1 << (t - 1), 0, p
        while d > 0:
            comparators += [(i, i + d) for i in range(n - d) if (i & p) == r]
            d, q, r = q - p, q >> 1, p
        p >>= 1
    return comparators


def prune(comparators: list[tuple[int, int]], keep: int) -> list[tuple[int, int]]:
    """The comparators on which the `keep` smallest outputs depend."""
    needed = set(range(keep))
    kept = []
    for i, j in reversed(comparators):
        if i in needed or j in needed:
            needed.update((i, j))
            kept.append((i, j))
    return kept[::-1]


def network_sizes() -> list[int]:
    """Numbers of inputs for which networks are made: steps of 4 up to 128, of 16 beyond."""
    return [*range(4, 129, 4), *range(144, MAX_INPUTS + 1, 16)]


@lru_cache(maxsize=32)
def networks(keep: int) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]:
    """All networks for `keep` outputs, one after another.

    Returns
    -------
    size_index : (MAX_INPUTS + 1,) int32
        Which network takes that many inputs: the smallest that is large enough.
    start : (n_networks + 1,) int32
        Where its comparators begin.
    comparators : (n, 2) int32
        Rows to compare and exchange.
    """
    sizes = network_sizes()
    start, pairs = [0], []
    for n in sizes:
        pairs += prune(merge_exchange(n), min(keep, n))
        start.append(len(pairs))
    size_index = np.searchsorted(sizes, np.arange(MAX_INPUTS + 1)).astype(np.int32)
    return size_index, np.array(start, np.int32), np.array(pairs, np.int32).reshape(-1, 2)


SIZES = np.array(network_sizes(), np.int32)
