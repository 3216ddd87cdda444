"""CPU driver of the smooth descriptors (Numba, parallel over blocks of grid points).

The points of a batch are taken a SIMD register at a time. Coordinates are whole numbers of `UNIT`, so that differences
are exact, and the atoms of a block are put in an order that depends on their positions alone: so a point's features
have the same bits in whatever tile it lies.

The loop over points is compiled once. What the sizes of a specification change is a kernel of its own, which the loop
calls by its address.
"""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
import math
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numba import cfunc, njit, prange

from gpurho.kernels import _cpu_fast, _smooth_emit, _smooth_formulas, _smooth_lanes
from gpurho.kernels._cpu_fast import bound, cell_range, gather
from gpurho.kernels._smooth_emit import UNDONE
from gpurho.kernels._smooth_formulas import DAMPING, UNIT
from gpurho.kernels._smooth_lanes import (
    ATOM_BYTES,
    KERNEL,
    NEAR_ROWS,
    ROW_BYTES,
    W,
    call_kernel,
    call_network,
    load_count,
    multiply,
    project,
    take,
    ticks,
    write_rows,
)

WIDEST = 24.0
"""Half the diagonal (angstrom) of a batch beyond which each point is a batch of its own, as differences might wrap."""
PAD = 1.0e-3
"""Slack of every search radius (angstrom)."""


@njit(error_model="numpy")
def _whole(x):
    """A coordinate in units, as int32 that wraps around."""
    return np.int32(np.int64(np.rint(x * (1.0 / UNIT))))


@njit(error_model="numpy")
def _rows(n):
    """An uninitialised (n, W) float32 array that starts on a cache line."""
    buffer = np.empty(n * W + 16, np.float32)
    offset = np.int64((64 - (buffer.ctypes.data & np.uintp(63))) // np.uintp(4)) & 15
    return buffer[offset : offset + n * W].reshape((n, W))


@njit(error_model="numpy")
def _in_order(positions, ids, n, out):
    """The positions of some atoms, sorted by a number that hardly two of them share (OUTPUT: out)."""
    keys = np.empty(n)
    for i in range(n):
        a = ids[i]
        keys[i] = positions[a, 0] + 0.6180339887498949 * positions[a, 1] + 0.3247179572447461 * positions[a, 2]
    places = np.argsort(keys)
    for i in range(n):
        for d in range(3):
            out[i, d] = positions[ids[places[i]], d]


@njit(error_model="numpy")
def _extent(points, order, first, last, low, high):
    """The box around some points (OUTPUT: low, high)."""
    for d in range(3):
        low[d] = np.inf
        high[d] = -np.inf
    for q in range(first, last):
        p = np.uint64(order[q])
        for d in range(3):
            low[d] = min(low[d], points[p, d])
            high[d] = max(high[d], points[p, d])


@njit(error_model="numpy")
def _middle(low, high):
    """Centre of a box, and half its diagonal."""
    half = math.sqrt((high[0] - low[0]) ** 2 + (high[1] - low[1]) ** 2 + (high[2] - low[2]) ** 2) / 2
    return (low[0] + high[0]) / 2, (low[1] + high[1]) / 2, (low[2] + high[2]) / 2, half


def _make_driver(version: int) -> Any:
    """The compiled driver; `version` is part of the key of Numba's cache, which knows nothing of called functions."""

    @njit(parallel=True, error_model="numpy", cache=True)
    def fill_smooth(
        points, order, batch_start, block_start, positions, cell_start, origin, edge, shape,
        cutoff, n_radial, atom_rows, projection_rows, kernel, matrix, out, network, table, results, chosen, counts,
        n_threads,
    ):  # fmt: skip
        """Descriptors of points into `out` (OUTPUT), or what a network makes of them into `results` (OUTPUT).

        `kernel` is the address of what `make_kernel` returns; `atom_rows` and `projection_rows` the rows of its
        scratch; `network` 0, or the address of what `gpurho.kernels.dense_cpu.make_kernel` returns and `table` that of
        its numbers. It is called for each block while the block's descriptors are in a core's cache. Then `out` takes
        those of the points whose number in `chosen` (n_points,) int32 is not negative, in the row of that number.
        `n_threads` take blocks one after the other. Per block (OUTPUT: counts): points without atoms, and ticks taken
        by descriptors and by the network.
        """
        if version == 0:  # never so: it is read only to be part of the key
            return
        n_species = cell_start.shape[0]
        n_columns = out.shape[1]
        apart = network == 0
        inverse_square = np.float32((UNIT / cutoff) ** 2)
        damping = np.float32((DAMPING / UNIT) ** 2)
        n_blocks = len(block_start) - 1
        taken = np.zeros(1, np.int64)
        for _ in prange(n_threads):
            # One after the other: a thread that something else holds up, or that meets more atoms, takes fewer.
            block = take(taken.ctypes.data)
            while block < n_blocks:
                started = ticks()
                first_batch = block_start[block]
                last_batch = block_start[block + 1]
                first_point = batch_start[first_batch]
                n_points = batch_start[last_batch] - first_point
                boxes = np.empty((last_batch - first_batch + 1, 2, 3))
                around = boxes[0]
                _extent(points, order, 0, 0, around[0], around[1])
                for batch in range(first_batch, last_batch):
                    low_high = boxes[batch - first_batch + 1]
                    _extent(points, order, batch_start[batch], batch_start[batch + 1], low_high[0], low_high[1])
                    for d in range(3):
                        around[0, d] = min(around[0, d], low_high[0, d])
                        around[1, d] = max(around[1, d], low_high[1, d])
                x, y, z, half = _middle(around[0], around[1])
                centre = np.array((x, y, z))
                reach = cutoff + half + PAD
                low, high = cell_range(centre, reach, origin, edge, shape)
                room = 1
                for s in range(n_species):
                    room = max(room, bound(cell_start[s], low, high, shape))
                ids = np.empty(room, np.int32)
                distances2 = np.empty(room, np.float64)
                near = np.empty((n_species, room, 3), np.float64)
                whole = np.empty((n_species, room, 4), np.int32)
                n_near = np.empty(n_species, np.int64)
                for s in range(n_species):
                    n_near[s] = gather(positions, cell_start[s], centre, reach, low, high, shape, ids, distances2)
                    _in_order(positions, ids, n_near[s], near[s])
                    for i in range(n_near[s]):
                        for d in range(3):
                            whole[s, i, d] = _whole(near[s, i, d])
                atoms = np.empty((n_species, room, 4), np.int32)
                n_atoms = np.empty(n_species, np.int64)
                lanes = _rows(3).view(np.int32)
                terms = _rows(room * atom_rows)
                projections = _rows(projection_rows)
                columns = _rows(n_columns)
                rows = np.empty(W, np.uint64)
                features = out if apart else np.empty((n_points, n_columns), np.float32)
                base = np.uint64(features.ctypes.data)
                row_bytes = np.uint64(4 * n_columns)
                for batch in range(first_batch, last_batch):
                    begin = batch_start[batch]
                    last = batch_start[batch + 1]
                    box = boxes[batch - first_batch + 1]
                    x, y, z, half = _middle(box[0], box[1])
                    step = W if half < WIDEST else 1
                    fresh = True
                    while begin < last:
                        end = min(begin + step, last)
                        if step == 1:
                            _extent(points, order, begin, end, box[0], box[1])
                            x, y, z, half = _middle(box[0], box[1])
                        if fresh or step == 1:
                            fresh = False
                            far = (cutoff + half + PAD) ** 2
                            for s in range(n_species):
                                n = 0
                                for i in range(n_near[s]):
                                    ax = near[s, i, 0]
                                    ay = near[s, i, 1]
                                    az = near[s, i, 2]
                                    if (ax - x) ** 2 + (ay - y) ** 2 + (az - z) ** 2 <= far:
                                        for d in range(3):
                                            atoms[s, n, d] = whole[s, i, d]
                                        n += 1
                                n_atoms[s] = n
                        for lane in range(W):
                            # Lanes to spare repeat the last point.
                            q = min(begin + lane, end - 1)
                            p = np.uint64(order[q])
                            lanes[0, lane] = _whole(points[p, 0])
                            lanes[1, lane] = _whole(points[p, 1])
                            lanes[2, lane] = _whole(points[p, 2])
                            rows[lane] = base + (p if apart else np.uint64(q - first_point)) * row_bytes
                        call_kernel(
                            kernel, atoms.ctypes.data, n_atoms.ctypes.data, room, lanes.ctypes.data, terms.ctypes.data,
                            projections.ctypes.data, columns.ctypes.data, matrix.ctypes.data, rows.ctypes.data,
                            inverse_square, damping,
                        )  # fmt: skip
                        if n_columns < W:
                            for lane in range(end - begin):
                                for c in range(n_columns):
                                    q = order[begin + lane] if apart else begin + lane - first_point
                                    features[q, c] = columns[c, lane]
                        for lane in range(end - begin):
                            # The sum of the envelopes.
                            alone = True
                            for s in range(n_species):
                                alone &= columns[s * n_radial, lane] == 0.0
                            if alone:
                                counts[block, 0] += 1
                        begin = end
                described = ticks()
                if not apart:
                    made = np.empty((results.shape[0], n_points), np.float32)
                    made.view(np.int32)[:] = UNDONE
                    call_network(
                        network, features.ctypes.data, 0, n_points, made.ctypes.data, n_points, np.uint64(table)
                    )  # fmt: skip
                    for q in range(n_points):
                        p = order[first_point + q]
                        for r in range(len(made)):
                            results[r, p] = made[r, q]
                        if chosen[p] >= 0:
                            out[chosen[p]] = features[q]
                counts[block, 1] = described - started
                counts[block, 2] = ticks() - described
                block = take(taken.ctypes.data)

    return fill_smooth


@lru_cache(maxsize=64)
def make_kernel(n_species: int, n_radial: int, n_basis: int, l_max: int, contracted: int, version: int) -> Any:
    """The kernel of some sizes, with the signature `KERNEL`; it fills the rows of `W` points.

    `contracted` is how channels are combined, see `gpurho.kernels.smooth.contraction_matrix`; `version` as that of the
    driver.
    """
    n_harmonics = (l_max + 1) ** 2 - 1
    n_channels = n_species * n_basis if l_max else 0
    n_columns = n_species * n_radial + n_channels * (n_channels + 1) // 2 * l_max
    sum_bytes = n_radial * ROW_BYTES
    projection_bytes = n_basis * n_harmonics * ROW_BYTES
    matrix_bytes = 4 * n_basis * n_radial
    many_columns = n_columns >= W

    @cfunc(KERNEL, cache=True)
    def kernel(
        atoms, n_atoms, room, lanes, terms, projections, table, matrix, rows, inverse_square, damping
    ):  # fmt: skip
        if version == 0:
            return
        for s in range(n_species):
            project(
                atoms + s * room * ATOM_BYTES, load_count(n_atoms, s), lanes, terms,
                table + s * sum_bytes, projections + s * projection_bytes, matrix + s * matrix_bytes,
                inverse_square, damping, n_radial, n_basis, l_max, contracted,
            )  # fmt: skip
        multiply(projections, table + n_species * sum_bytes, n_channels, l_max)
        if many_columns:
            write_rows(table, rows, n_columns)

    return kernel


def scratch_rows(n_species: int, n_basis: int, l_max: int) -> tuple[int, int]:
    """Rows of scratch per atom, and of projections."""
    return NEAR_ROWS + n_basis, max(1, n_species * n_basis * ((l_max + 1) ** 2 - 1))


def _source_version() -> int:
    """A number, never 0, that changes with the sources that the driver and the kernels compile in."""
    digest = 1
    for module in (_smooth_formulas, _smooth_emit, _smooth_lanes, _cpu_fast):
        digest = zlib.crc32(Path(module.__file__).read_bytes(), digest)
    return digest | 1


VERSION = _source_version()
fill_smooth = _make_driver(VERSION)
