"""Grid points in batches that are compact in space: a batch shares its candidate atoms, a block shares its batches'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

LANES = 64
"""Most points of a batch: one SIMD lane (CPU) or thread (CUDA) each."""

BRICK = 4
BLOCK = 8
"""Edges, in points, of a batch and of a block of a grid."""

MIN_CUBE, MAX_CUBE = 0.5, 1.2
"""Edges of the cubes that gather scattered points, angstrom."""


@dataclass(frozen=True)
class Batches:
    """An order of points.

    Parameters
    ----------
    order : (n_points,) int32
        Batch b holds the points ``order[start[b]:start[b + 1]]``.
    start : (n_batches + 1,) int32
    block_start : (n_blocks + 1,) int32
        Block c holds the batches from ``block_start[c]`` up to ``block_start[c + 1]``.
    """

    order: NDArray[np.int32]
    start: NDArray[np.int32]
    block_start: NDArray[np.int32]


@lru_cache(maxsize=16)
def grid_batches(shape: tuple[int, int, int]) -> Batches:
    """Bricks of 4 x 4 x 4 points of a box in C order, in blocks of 8 x 8 x 8."""
    axes = [np.arange(n, dtype=np.int64) for n in shape]
    code = np.zeros(shape, np.int64)
    for axis, (index, n) in enumerate(zip(axes, shape, strict=True)):
        view = [1, 1, 1]
        view[axis] = n
        blocks = -(-shape[axis] // BLOCK)
        code = code * blocks + (index // BLOCK).reshape(view)
    block = code
    brick = block
    for axis, index in enumerate(axes):
        view = [1, 1, 1]
        view[axis] = len(index)
        brick = brick * (BLOCK // BRICK) + (index % BLOCK // BRICK).reshape(view)
    flat = brick.ravel()
    order = np.argsort(flat, kind="stable").astype(np.int32)
    return _batches(order, flat[order], block.ravel()[order])


def _batches(order: NDArray[np.int32], brick: NDArray[np.int64], block: NDArray[np.int64]) -> Batches:
    """Batches from points sorted by brick (each of at most `LANES` points), bricks sorted by block."""
    start = np.concatenate([np.flatnonzero(np.diff(brick, prepend=-1)), [len(order)]]).astype(np.int32)
    first = block[start[:-1]]
    block_start = np.concatenate([np.flatnonzero(np.diff(first, prepend=-1)), [len(start) - 1]]).astype(np.int32)
    for array in (order, start, block_start):
        array.setflags(write=False)
    return Batches(order, start, block_start)


def point_batches(points: NDArray[np.float64]) -> Batches:
    """Batches of any points, gathered by cubes; a cube of many points gives several batches.

    Parameters
    ----------
    points : (n, 3) float64, angstrom
    """
    n = len(points)
    if n == 0:
        return Batches(np.zeros(0, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))
    low = points.min(axis=0)
    # Cubes of about half a batch each where the points fill space; small enough to share their candidates anyway.
    extent = np.maximum(points.max(axis=0) - low, MIN_CUBE)
    edge = min(max(float(np.prod(extent) * (LANES // 2) / n) ** (1 / 3), MIN_CUBE), MAX_CUBE)
    cube = np.floor((points - low) / edge).astype(np.int64)
    order = np.lexsort((cube[:, 2], cube[:, 1], cube[:, 0]))
    changes = np.any(np.diff(cube[order], axis=0, prepend=-1) != 0, axis=1)
    group = np.cumsum(changes) - 1
    first = np.flatnonzero(changes)
    rank = np.arange(n) - first[group]
    brick = np.cumsum((rank % LANES == 0) | changes) - 1
    return _batches(order.astype(np.int32), brick, brick)
