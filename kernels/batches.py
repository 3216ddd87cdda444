"""Grid points in batches that are compact in space: a batch shares its candidate atoms, a block shares its batches'."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numba import njit
from numpy.typing import NDArray

LANES = 64
"""Most points of a batch: one SIMD lane (CPU) or thread (CUDA) each."""

BRICK = 4
BLOCK = 8
"""Edges, in points, of a batch and of a block of a grid."""

MIN_CUBE, MAX_CUBE = 0.5, 1.2
"""Edges of the cubes that gather scattered points, angstrom."""

CACHED_POINTS = 2**21
"""Orders of larger boxes are made, and sent to a GPU, anew each time, so that the cache stays small: 16 of 8 MiB."""


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


def grid_batches(shape: tuple[int, int, int]) -> Batches:
    """Bricks of 4 x 4 x 4 points of a box in C order, in blocks of 8 x 8 x 8."""
    if shape[0] * shape[1] * shape[2] <= CACHED_POINTS:
        return _cached_grid_batches(shape)
    return _make_grid_batches(shape)


@lru_cache(maxsize=16)
def _cached_grid_batches(shape: tuple[int, int, int]) -> Batches:
    return _make_grid_batches(shape)


def _make_grid_batches(shape: tuple[int, int, int]) -> Batches:
    bricks, blocks = (int(np.prod([-(-n // edge) for n in shape])) for edge in (BRICK, BLOCK))
    order = np.empty(shape[0] * shape[1] * shape[2], np.int32)
    start, block_start = np.zeros(bricks + 1, np.int32), np.zeros(blocks + 1, np.int32)
    _fill_bricks(shape[0], shape[1], shape[2], order, start, block_start)
    for array in (order, start, block_start):
        array.setflags(write=False)
    return Batches(order, start, block_start)


@njit(cache=True)
def _fill_bricks(nx, ny, nz, order, start, block_start):
    """Walk blocks, their bricks and their points (OUTPUT: order, start, block_start)."""
    n = 0
    brick = 0
    block = 0
    for bx in range(0, nx, BLOCK):
        for by in range(0, ny, BLOCK):
            for bz in range(0, nz, BLOCK):
                for x0 in range(bx, min(bx + BLOCK, nx), BRICK):
                    for y0 in range(by, min(by + BLOCK, ny), BRICK):
                        for z0 in range(bz, min(bz + BLOCK, nz), BRICK):
                            # In columns of 2 x 2, so that the 16 points of a SIMD register are near each other.
                            for x2 in range(x0, min(x0 + BRICK, nx), 2):
                                for y2 in range(y0, min(y0 + BRICK, ny), 2):
                                    for x in range(x2, min(x2 + 2, nx)):
                                        for y in range(y2, min(y2 + 2, ny)):
                                            for z in range(z0, min(z0 + BRICK, nz)):
                                                order[n] = (x * ny + y) * nz + z
                                                n += 1
                            brick += 1
                            start[brick] = n
                block += 1
                block_start[block] = brick


def point_batches(points: NDArray[np.float64]) -> Batches:
    """Batches of any points: bricks where they are a regular grid in C order, else gathered by cubes.

    Parameters
    ----------
    points : (n, 3) float64, angstrom
    """
    n = len(points)
    if n == 0:
        return Batches(np.zeros(0, np.int32), np.zeros(1, np.int32), np.zeros(1, np.int32))
    shape = grid_shape(points)
    if shape is not None:
        return grid_batches(shape)
    low = points.min(axis=0)
    # Cubes of about half a batch each where the points fill space; small enough to share their candidates anyway.
    extent = np.maximum(points.max(axis=0) - low, MIN_CUBE)
    edge = min(max(float(np.prod(extent) * (LANES // 2) / n) ** (1 / 3), MIN_CUBE), MAX_CUBE)
    cube = ((points - low) / edge).astype(np.int64)
    code = (cube[:, 0] * (int(extent[1] / edge) + 1) + cube[:, 1]) * (int(extent[2] / edge) + 1) + cube[:, 2]
    order = np.argsort(code, kind="stable").astype(np.int32)
    changes = np.diff(code[order], prepend=-1) != 0
    rank = np.arange(n) - np.flatnonzero(changes)[np.cumsum(changes) - 1]
    first = np.flatnonzero(rank % LANES == 0)
    start = np.append(first, n).astype(np.int32)
    block_start = np.arange(len(start), dtype=np.int32)
    # As those of grids are, so that compiled functions meet one type.
    for array in (order, start, block_start):
        array.setflags(write=False)
    return Batches(order, start, block_start)


def grid_shape(points: NDArray[np.float64], tolerance: float = 1.0e-6) -> tuple[int, int, int] | None:
    """Shape of the regular grid, in C order, that the points are to `tolerance` angstrom; None where they are not.

    A line or a plane of points has two axes or one of length 1.
    """
    n = len(points)
    steps = np.zeros((3, 3))
    shape = [1, 1, 1]
    stride = 1
    for axis in (2, 1, 0):
        if stride >= n:
            break
        steps[axis] = points[stride] - points[0]
        line = points[::stride]
        off = np.abs(line - (points[0] + np.arange(len(line))[:, None] * steps[axis])).max(axis=1) > tolerance
        length = int(np.argmax(off)) if off.any() else len(line)
        shape[axis] = length
        stride *= length
    if stride != n or n < 8:
        return None
    x, y, z = (np.arange(shape[d], dtype=float)[:, None] * steps[d] for d in range(3))
    lattice = ((points[0] + x)[:, None, None] + y[None, :, None]) + z[None, None]
    if np.abs(lattice.reshape(n, 3) - points).max() > tolerance:
        return None
    return shape[0], shape[1], shape[2]
