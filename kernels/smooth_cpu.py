"""CPU driver of the smooth descriptors (Numba, parallel over blocks of grid points).

The points of a batch are taken a SIMD register at a time. Coordinates are whole numbers of `UNIT`, so that differences
are exact, and the atoms of a block are put in an order that depends on their positions alone: so a point's features
have the same bits in whatever tile it lies.
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
from numba import njit, prange

from gpurho.kernels import _cpu_fast, _smooth_emit, _smooth_formulas, _smooth_lanes
from gpurho.kernels._cpu_fast import bound, cell_range, gather
from gpurho.kernels._smooth_formulas import DAMPING
from gpurho.kernels._smooth_lanes import DIRECTION_ROWS, W, multiply, project, write_rows

PER_ANGSTROM = 2.0**24
"""Units of a coordinate. Numbers wrap around at 2^32 units, which differences survive below 128 angstrom."""
WIDEST = 24.0
"""Radius (angstrom) of a batch beyond which each point is a batch of its own, so that no difference wraps around."""
PAD = 1.0e-3
"""Slack of every search radius (angstrom)."""


@njit(error_model="numpy")
def _whole(x):
    """A coordinate in units, as int32 that wraps around."""
    return np.int32(np.int64(np.rint(x * PER_ANGSTROM)))


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
def _box(points, order, first, last):
    """Centre of the box around some points, and half its diagonal."""
    p = np.uint64(order[first])
    low_x = high_x = points[p, 0]
    low_y = high_y = points[p, 1]
    low_z = high_z = points[p, 2]
    for q in range(first + 1, last):
        p = np.uint64(order[q])
        low_x = min(low_x, points[p, 0])
        low_y = min(low_y, points[p, 1])
        low_z = min(low_z, points[p, 2])
        high_x = max(high_x, points[p, 0])
        high_y = max(high_y, points[p, 1])
        high_z = max(high_z, points[p, 2])
    half = math.sqrt((high_x - low_x) ** 2 + (high_y - low_y) ** 2 + (high_z - low_z) ** 2) / 2
    return (low_x + high_x) / 2, (low_y + high_y) / 2, (low_z + high_z) / 2, half


@lru_cache(maxsize=64)
def driver(n_species: int, n_radial: int, n_basis: int, l_max: int, contracted: int, version: int) -> Any:
    """The compiled driver of some sizes.

    `contracted` is 1 where the channels are combinations of radial functions; `version` is part of the key of Numba's
    cache, which knows nothing of called functions.
    """
    n_channels = n_species * n_basis if l_max else 0
    n_harmonics = (l_max + 1) ** 2 - 1
    n_columns = n_species * n_radial + n_channels * (n_channels + 1) // 2 * l_max

    @njit(parallel=True, error_model="numpy", cache=True)
    def fill_smooth(
        points, order, batch_start, block_start, positions, cell_start, origin, edge, shape,
        cutoff, matrix, weights, out, counts,
    ):  # fmt: skip
        """Descriptors of points into `out` (OUTPUT), and per block the points without atoms (OUTPUT: counts)."""
        if version == 0:  # never so: it is read only to be part of the key
            return
        inverse_square = np.float32(1.0 / (cutoff * PER_ANGSTROM) ** 2)
        damping = np.float32((DAMPING * PER_ANGSTROM) ** 2)
        for block in prange(len(block_start) - 1):
            first_batch = block_start[block]
            last_batch = block_start[block + 1]
            p0 = batch_start[first_batch]
            x, y, z, radius = _box(points, order, p0, batch_start[last_batch])
            centre = np.array((x, y, z))
            reach = cutoff + radius + PAD
            low, high = cell_range(centre, reach, origin, edge, shape)
            room = 1
            for s in range(n_species):
                room = max(room, bound(cell_start[s], low, high, shape))
            ids = np.empty(room, np.int32)
            distances2 = np.empty(room, np.float64)
            near = np.empty((n_species, room, 3), np.float64)
            n_near = np.empty(n_species, np.int64)
            for s in range(n_species):
                n_near[s] = gather(positions, cell_start[s], centre, reach, low, high, shape, ids, distances2)
                _in_order(positions, ids, n_near[s], near[s])
            atoms = np.empty((n_species, room, 4), np.int32)
            n_atoms = np.empty(n_species, np.int64)
            lanes = _rows(3).view(np.int32)
            terms = _rows(room * (DIRECTION_ROWS + n_basis))
            projections = _rows(max(1, n_channels * n_harmonics))
            table = _rows(n_columns)
            rows = np.empty(W, np.uint64)
            out_base = np.uint64(out.ctypes.data)
            row_bytes = np.uint64(4 * n_columns)
            for batch in range(first_batch, last_batch):
                p0 = batch_start[batch]
                p1 = batch_start[batch + 1]
                x, y, z, radius = _box(points, order, p0, p1)
                whole = radius < WIDEST
                begin = p0
                while begin < p1:
                    end = min(begin + W, p1) if whole else begin + 1
                    if begin == p0 or not whole:
                        if not whole:
                            x, y, z, radius = _box(points, order, begin, end)
                        far = (cutoff + radius + PAD) ** 2
                        for s in range(n_species):
                            n = 0
                            for i in range(n_near[s]):
                                ax = near[s, i, 0]
                                ay = near[s, i, 1]
                                az = near[s, i, 2]
                                if (ax - x) ** 2 + (ay - y) ** 2 + (az - z) ** 2 <= far:
                                    atoms[s, n, 0] = _whole(ax)
                                    atoms[s, n, 1] = _whole(ay)
                                    atoms[s, n, 2] = _whole(az)
                                    n += 1
                            n_atoms[s] = n
                    for lane in range(W):
                        p = order[min(begin + lane, end - 1)]
                        for d in range(3):
                            lanes[d, lane] = _whole(points[p, d])
                    for s in range(n_species):
                        project(
                            atoms[s].ctypes.data, n_atoms[s], lanes.ctypes.data, terms.ctypes.data,
                            table[s * n_radial :].ctypes.data, projections[s * n_basis * n_harmonics :].ctypes.data,
                            matrix[s].ctypes.data, inverse_square, damping, n_radial, n_basis, l_max, contracted,
                        )  # fmt: skip
                    multiply(
                        projections.ctypes.data, weights.ctypes.data, table[n_species * n_radial :].ctypes.data,
                        n_channels, l_max,
                    )  # fmt: skip
                    if n_columns >= W:
                        for lane in range(W):
                            rows[lane] = out_base + np.uint64(order[min(begin + lane, end - 1)]) * row_bytes
                        write_rows(table.ctypes.data, rows.ctypes.data, n_columns)
                    else:
                        for lane in range(end - begin):
                            for c in range(n_columns):
                                out[order[begin + lane], c] = table[c, lane]
                    for lane in range(end - begin):
                        alone = True
                        for s in range(n_species):
                            alone &= table[s * n_radial, lane] == 0.0
                        if alone:
                            counts[block] += 1
                    begin = end

    return fill_smooth


def source_version() -> int:
    """A number, never 0, that changes with the sources that the driver compiles in."""
    digest = 1
    for module in (_smooth_formulas, _smooth_emit, _smooth_lanes, _cpu_fast):
        digest = zlib.crc32(Path(module.__file__).read_bytes(), digest)
    return digest | 1
