"""Pieces of the fast path of the CPU driver: 64 grid points as SIMD lanes, in float32."""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurho.kernels.batches import LANES as W

INVALID = np.int32(0x7FFFFFFF)
"""The key of a row without a candidate; larger than any key of one."""
BINS = 257
"""Bins of the histogram that bounds the distance of the M-th atom, the last one for all beyond."""
NEAR_ATOM = np.float32(0.05)
"""Points with an atom this near (angstrom) take the exact path: float32 leaves too little of its direction."""


@intrinsic
def compare_exchange(typing_context, base, low, high):
    """Order two rows of 64 int32 at byte offsets from an address: the smaller values go to `low`."""
    signature = types.void(types.uintp, types.int32, types.int32)

    def generate(context, builder, signature, arguments):
        vector = ir.VectorType(ir.IntType(32), W)
        pointers = [
            builder.inttoptr(builder.add(arguments[0], builder.zext(x, ir.IntType(64))), vector.as_pointer())
            for x in arguments[1:]
        ]
        x, y = builder.load(pointers[0]), builder.load(pointers[1])
        x.align = y.align = 64
        smaller = builder.icmp_signed("<", x, y)
        builder.store(builder.select(smaller, x, y), pointers[0]).align = 64
        builder.store(builder.select(smaller, y, x), pointers[1]).align = 64
        return context.get_dummy_value()

    return signature, generate


@njit(error_model="numpy")
def aligned(rows, dtype):
    """An uninitialised (rows, 64) array of 4-byte items that starts on a cache line."""
    n = np.int64(rows)
    buffer = np.empty(n * W + 16, dtype)
    offset = np.int64((64 - (buffer.ctypes.data & np.uintp(63))) // np.uintp(4)) & 15
    return buffer[offset : offset + n * W].reshape((n, W))


@intrinsic
def prefetch_for_write(typing_context, address):
    """Ask for the cache line at an address, to be written soon."""

    def generate(context, builder, signature, arguments):
        pointer = ir.PointerType(ir.IntType(8))
        number = ir.IntType(32)
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), [pointer, number, number, number]), "llvm.prefetch.p0"
        )
        place = builder.inttoptr(arguments[0], pointer)
        builder.call(function, [place, number(1), number(3), number(1)])
        return context.get_dummy_value()

    return types.void(types.uintp), generate


@njit(error_model="numpy")
def prefetch_rows(out, order, first, n_lanes):
    """Fetch the rows of a batch's points while the batch is computed: writing them would wait for memory otherwise."""
    base = out.ctypes.data
    stride = np.uintp(out.shape[1] * 4)
    for lane in range(n_lanes):
        row = base + np.uintp(order[first + lane]) * stride
        for offset in range(0, out.shape[1] * 4, 64):
            prefetch_for_write(row + np.uintp(offset))


@njit(error_model="numpy")
def histogram(distances2, n, limit, bins):
    """Count squared distances in equal bins up to the square of `limit`, all beyond in the last (OUTPUT: bins)."""
    for b in range(BINS):
        bins[b] = 0
    scale = (BINS - 1) / (limit * limit)
    for i in range(n):
        bins[min(np.int64(distances2[i] * scale), BINS - 1)] += 1


@njit(error_model="numpy")
def radius_of_count(bins, count, limit):
    """A radius that holds at least `count` of a histogram's distances; infinity where `limit` does not."""
    seen = 0
    for b in range(BINS - 1):
        seen += bins[b]
        if seen >= count:
            return limit * math.sqrt((b + 1) / (BINS - 1))
    return np.inf


@njit(error_model="numpy")
def sphere(points, order, first, last):
    """Centre of the bounding box of some points and the largest distance to it."""
    low = points[order[first]].copy()
    high = low.copy()
    for q in range(first, last):
        for d in range(3):
            low[d] = min(low[d], points[order[q], d])
            high[d] = max(high[d], points[order[q], d])
    centre = 0.5 * (low + high)
    radius = 0.0
    for q in range(first, last):
        p = order[q]
        radius = max(
            radius,
            (points[p, 0] - centre[0]) ** 2 + (points[p, 1] - centre[1]) ** 2 + (points[p, 2] - centre[2]) ** 2,
        )
    return centre, math.sqrt(radius)


@njit(error_model="numpy")
def cell_range(centre, radius, origin, edge, shape):
    low = np.empty(3, np.int64)
    high = np.empty(3, np.int64)
    for d in range(3):
        low[d] = max(0, np.int64(np.floor((centre[d] - radius - origin[d]) / edge)))
        high[d] = min(shape[d] - 1, np.int64(np.floor((centre[d] + radius - origin[d]) / edge)))
    return low, high


@njit(error_model="numpy")
def gather(positions, start, centre, radius, low, high, shape, ids, distances2):
    """Atoms of one species within a sphere: their indices and squared distances (OUTPUT); returns how many."""
    n = 0
    if high[2] < low[2]:
        return n
    for i in range(low[0], high[0] + 1):
        for j in range(low[1], high[1] + 1):
            row = (i * shape[1] + j) * shape[2]
            for a in range(start[row + low[2]], start[row + high[2] + 1]):
                dx = positions[a, 0] - centre[0]
                dy = positions[a, 1] - centre[1]
                dz = positions[a, 2] - centre[2]
                d2 = dx * dx + dy * dy + dz * dz
                if d2 <= radius * radius:
                    ids[n] = a
                    distances2[n] = d2
                    n += 1
    return n


@njit(error_model="numpy")
def bound(start, low, high, shape):
    """Number of atoms of one species in a range of cells: the room that `gather` needs."""
    n = 0
    if high[2] < low[2]:
        return n
    for i in range(low[0], high[0] + 1):
        for j in range(low[1], high[1] + 1):
            row = (i * shape[1] + j) * shape[2]
            n += start[row + high[2] + 1] - start[row + low[2]]
    return n


@njit(error_model="numpy")
def shrink(ids, distances2, n, radius, out):
    """The candidates within `radius`, into `out` (OUTPUT); returns how many."""
    kept = 0
    for i in range(n):
        if distances2[i] <= radius * radius:
            out[kept] = ids[i]
            kept += 1
    return kept


@njit(fastmath=True, error_model="numpy")
def pack_keys(cx, cy, cz, gx, gy, gz, n, padded, scale, index_mask, keys):
    """Fixed-point squared distance | candidate, per candidate and lane (OUTPUT: keys); rows from n up are invalid."""
    for c in range(n):
        ax = cx[c]
        ay = cy[c]
        az = cz[c]
        c32 = np.int32(c)
        for lane in range(W):
            dx = ax - gx[lane]
            dy = ay - gy[lane]
            dz = az - gz[lane]
            keys[c, lane] = (np.int32((dx * dx + dy * dy + dz * dz) * scale) & ~index_mask) | c32
    for c in range(n, padded):
        for lane in range(W):
            keys[c, lane] = INVALID


@njit(fastmath=True, error_model="numpy")
def distances_of_keys(keys, n_distances, index_mask, inverse_scale, cutoff, distances):
    """Distances of the sorted keys, at most the cutoff (OUTPUT: distances)."""
    for c in range(n_distances):
        for lane in range(W):
            key = keys[c, lane]
            d = np.float32(math.sqrt(np.float32(key & ~index_mask) * inverse_scale))
            distances[c, lane] = cutoff if key == INVALID or d > cutoff else d


@njit(fastmath=True, error_model="numpy")
def near_cosines(cx, cy, cz, gx, gy, gz, bonds, n_near, n_neighbors, norms, cosines):
    """Distances and cosines of every near candidate at every lane (OUTPUT: norms, cosines)."""
    for c in range(n_near):
        ax = cx[c]
        ay = cy[c]
        az = cz[c]
        for lane in range(W):
            ux = ax - gx[lane]
            uy = ay - gy[lane]
            uz = az - gz[lane]
            norms[c, lane] = math.sqrt(ux * ux + uy * uy + uz * uz)
        for j in range(n_neighbors):
            ex = bonds[c, j, 0]
            ey = bonds[c, j, 1]
            ez = bonds[c, j, 2]
            row = c * n_neighbors + j
            for lane in range(W):
                ux = ax - gx[lane]
                uy = ay - gy[lane]
                uz = az - gz[lane]
                vx = ux + ex
                vy = uy + ey
                vz = uz + ez
                cosines[row, lane] = (ux * vx + uy * vy + uz * vz) / math.sqrt(
                    (vx * vx + vy * vy + vz * vz) * (ux * ux + uy * uy + uz * uz)
                )


@njit(fastmath=True, error_model="numpy")
def sort_out(keys, norms, cosines, mask, n_distances, n_fine, n_angle_atoms, n_neighbors, cutoff, fine, table):
    """Put the exact distances of the nearest ranks and the cosines in the order of the keys (OUTPUT: fine, table).

    `table` has a row per column of the descriptors and holds the distances of the keys already.
    """
    for c in range(n_fine):
        for lane in range(W):
            fine[c, lane] = norms[np.uint32(keys[c, lane] & mask), lane]
    for c in range(min(n_fine, n_distances)):
        for lane in range(W):
            table[c, lane] = min(fine[c, lane], cutoff)
    for c in range(n_angle_atoms):
        for j in range(n_neighbors):
            row = n_distances + c * n_neighbors + j
            for lane in range(W):
                table[row, lane] = cosines[np.uint32((keys[c, lane] & mask) * n_neighbors + j), lane]


@njit(error_model="numpy")
def covered(keys, mask, inverse_scale, offsets, n_sorted, far, all_far, n_fine, fine, all_fine):
    """Whether no lane's wanted atoms can lie beyond the candidates: all atoms within `far` (near ones: `fine`) of the
    centre are among these, and each lane is `offsets` away from it.
    """
    for lane in range(W):
        if not all_far:
            key = keys[n_sorted - 1, lane]
            if key == INVALID or math.sqrt(np.float32(key & ~mask) * inverse_scale) + offsets[lane] > far:
                return False
        if not all_fine:
            key = keys[n_fine - 1, lane]
            if key == INVALID or math.sqrt(np.float32(key & ~mask) * inverse_scale) + offsets[lane] > fine:
                return False
    return True


@njit(fastmath=True, error_model="numpy")
def flag_lanes(fine, table, n_distances, n_fine, n_whole, gap, far, exact):
    """Mark the lanes that need the exact path (OUTPUT: exact): near ties, missing atoms, an atom at the point."""
    for c in range(1, n_whole + 1):
        for lane in range(W):
            exact[lane] |= fine[c, lane] - fine[c - 1, lane] <= gap
    for lane in range(W):
        exact[lane] |= fine[0, lane] < NEAR_ATOM
    if n_whole > 0:
        for lane in range(W):
            exact[lane] |= fine[n_whole - 1, lane] > far
    # The ranks beyond the fine ones carry the rounding of the keys, which is small only away from the point.
    if n_fine < n_distances:
        for lane in range(W):
            exact[lane] |= table[n_fine, lane] < np.float32(0.5)


@njit(error_model="numpy")
def flag_tied(keys, near_tied, mask, n_angle_atoms, exact):
    """Mark the lanes one of whose nearest atoms has ambiguous neighbours (OUTPUT: exact)."""
    for c in range(n_angle_atoms):
        for lane in range(W):
            exact[lane] |= near_tied[keys[c, lane] & mask]


@njit(error_model="numpy")
def write_rows(table, width, order, first, n_lanes, column, out):
    """Copy the lanes of `table` to the rows of their points (OUTPUT: out)."""
    # A cache line of columns at a time: the rows of the table that it reads stay in the first-level cache.
    for start in range(0, width, 16):
        end = min(start + 16, width)
        for lane in range(n_lanes):
            o = np.uint64(order[first + lane])
            for c in range(start, end):
                out[o, np.uint64(column + c)] = table[c, lane]
