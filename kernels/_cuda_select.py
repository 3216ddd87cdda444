"""CUDA kernels of the fast path: a thread per grid point sorts the candidates of its batch in registers, in float32."""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32, uint8

from gpurho.kernels._cuda_candidates import PAD
from gpurho.kernels._cuda_network import KEY_RANGE, LANES_STRIDE, PAD_KEY
from gpurho.kernels.batches import LANES
from gpurho.kernels.scalar_product import FeatureSizes

NEAR_ATOM = np.float32(0.05)
"""Points with an atom this near (angstrom) take the exact path: float32 leaves too little of its direction."""
NEAR_RANK = np.float32(0.5)
"""Points whose first distance read from a key is below this (angstrom) do too: the key's rounding shows there."""

SIGNATURE = (
    int32[::1], int32[::1], float64[:, ::1], float64[::1], int32[::1], int32[:, ::1],
    float64[:, ::1], int32[::1], int32[::1], float64[:, ::1], int32[::1], float32[:, :, ::1], uint8[::1],
    float32, float32, uint8[::1], int32[:, ::1], float32[:, ::1],
)  # fmt: skip
CROSS_SIGNATURE = (
    float64[:, ::1], int32[::1], float64[:, ::1], uint8[::1], int32[:, ::1], int32[::1], int32, float32[:, ::1],
)  # fmt: skip


def ranks(sizes: FeatureSizes) -> tuple[int, int, int]:
    """How many nearest atoms have cosines, exact distances, and any distance: (n_whole, n_fine, n_sorted)."""
    n_whole = max(sizes.n_angle_atoms, sizes.n_cross)
    n_fine = max(n_whole, min(8, sizes.n_distances)) + 1
    return n_whole, n_fine, max(sizes.n_distances, n_fine)


def shared_bytes(n_inputs: int, sizes: FeatureSizes) -> int:
    """Shared memory of a block of the kernel for `n_inputs` candidates."""
    _, n_fine, n_sorted = ranks(sizes)
    rows = n_fine + n_sorted + sizes.n_angle_atoms * sizes.n_angle_neighbors
    return 20 * n_inputs + 4 * LANES_STRIDE * rows


def make_select(n_inputs: int, sizes: FeatureSizes, sort: Any) -> Callable[..., Any]:
    """The kernel for batches of at most `n_inputs` candidates: a block of 64 threads per entry.

    `sort` is what `make_sorter` returns for the same numbers.
    """
    n_whole, n_fine, n_sorted = ranks(sizes)
    n_distances, n_angle_atoms = sizes.n_distances, sizes.n_angle_atoms
    n_neighbors, n_cross = sizes.n_angle_neighbors, sizes.n_cross
    width = n_distances + n_angle_atoms * n_neighbors
    cosine_row = n_sorted
    table_length = (n_sorted + n_angle_atoms * n_neighbors) * LANES_STRIDE
    nearest_length = n_fine * LANES_STRIDE
    quads_length = 4 * n_inputs
    range_of_points = 2147483000.0 - PAD_KEY
    zero, pad_key, one = np.float32(0.0), np.float32(PAD_KEY), np.float32(1.0)

    def select(
        n_entries, entries, spheres, cuts, counts, lists,
        points, order, batch_start, positions, owners, bonds, tied_atoms,
        cutoff, gap, exact, crossing, out,
    ):  # fmt: skip
        """Sets I and II of the points of one entry into `out` (OUTPUT); there are ``n_entries[0]`` entries.

        OUTPUT: ``exact`` 1 for points that need the exact path; ``crossing[species * n_cross + i, slot]`` the i-th
        nearest atom.
        """
        # The host does not know how many there are, and launches as many blocks as there may be.
        if cuda.blockIdx.x >= n_entries[0]:
            return
        lane = cuda.threadIdx.x
        entry = entries[cuda.blockIdx.x]
        n_batches = len(batch_start) - 1
        species = entry // n_batches
        batch = entry - species * n_batches
        quads = cuda.shared.array(quads_length, float32)
        owner = cuda.shared.array(n_inputs, int32)
        nearest = cuda.shared.array(nearest_length, int32)
        table = cuda.shared.array(table_length, float32)
        first = batch_start[batch]
        n_lanes = batch_start[batch + 1] - first
        x = spheres[batch, 0]
        y = spheres[batch, 1]
        z = spheres[batch, 2]
        radius = spheres[batch, 3]
        # Padding stands behind every candidate, and stays within an int32 when the point is off the centre.
        longest = cuts[entry] + radius + PAD
        scale = min(KEY_RANGE / (longest * longest), range_of_points / (radius * radius + PAD))
        root = float32(math.sqrt(scale))
        unit = float32(1.0 / math.sqrt(scale))
        n = counts[entry]
        for c in range(lane, n_inputs, LANES):
            if c < n:
                a = lists[entry, c]
                quads[4 * c] = float32(positions[a, 0] - x) * root
                quads[4 * c + 1] = float32(positions[a, 1] - y) * root
                quads[4 * c + 2] = float32(positions[a, 2] - z) * root
                quads[4 * c + 3] = zero
                o = owners[a]
                # A negative number marks an atom whose neighbours are ambiguous.
                owner[c] = o if tied_atoms[o] == 0 else -1 - o
            else:
                quads[4 * c] = zero
                quads[4 * c + 1] = zero
                quads[4 * c + 2] = zero
                quads[4 * c + 3] = pad_key
                owner[c] = 0
        cuda.syncthreads()
        slot = first + min(lane, n_lanes - 1)
        p = order[slot]
        gx = float32(points[p, 0] - x) * root
        gy = float32(points[p, 1] - y) * root
        gz = float32(points[p, 2] - z) * root
        sort(quads, gx, gy, gz, int32(lane), nearest, table)

        flag = False
        previous = zero
        for c in range(n_fine):
            e = nearest[c * LANES_STRIDE + lane]
            ux = (quads[4 * e] - gx) * unit
            uy = (quads[4 * e + 1] - gy) * unit
            uz = (quads[4 * e + 2] - gz) * unit
            square = ux * ux + uy * uy + uz * uz
            distance = math.sqrt(square)
            if c < n_distances:
                table[c * LANES_STRIDE + lane] = min(distance, cutoff)
            if c == 0:
                flag |= distance < NEAR_ATOM
            elif c <= n_whole:
                flag |= distance - previous <= gap
            if c == n_whole - 1:
                flag |= distance > cutoff - float32(1.0e-4)
            previous = distance
            if c < n_angle_atoms:
                o = owner[e]
                if o < 0:
                    flag = True
                    o = -1 - o
                for j in range(n_neighbors):
                    vx = ux + bonds[o, j, 0]
                    vy = uy + bonds[o, j, 1]
                    vz = uz + bonds[o, j, 2]
                    product = square * (vx * vx + vy * vy + vz * vz)
                    table[(cosine_row + c * n_neighbors + j) * LANES_STRIDE + lane] = (ux * vx + uy * vy + uz * vz) * (
                        one / math.sqrt(product)
                    )
            if c < n_cross:
                crossing[species * n_cross + c, slot] = lists[entry, e]
        inverse = unit * unit
        for c in range(n_fine, n_distances):
            distance = math.sqrt(table[c * LANES_STRIDE + lane] * inverse)
            if c == n_fine:
                flag |= distance < NEAR_RANK
            table[c * LANES_STRIDE + lane] = min(distance, cutoff)
        if flag:
            exact[p] = 1
        cuda.syncthreads()

        # Consecutive threads write consecutive columns of a row.
        column = species * width
        c = lane
        row = 0
        while row < n_lanes:
            while c >= width:
                c -= width
                row += 1
            if row < n_lanes:
                source = c
                if c >= n_distances:
                    source = c - n_distances + cosine_row
                out[order[first + row], column + c] = table[source * LANES_STRIDE + row]
            c += LANES

    return select


def make_cross(sizes: FeatureSizes) -> Callable[..., Any]:
    """The kernel of the cross cosines: a thread per slot (place in `order`)."""
    n_cross, n_species = sizes.n_cross, sizes.n_species
    start = n_species * (sizes.n_distances + sizes.n_angle_atoms * sizes.n_angle_neighbors)

    def cross(points, order, positions, exact, crossing, class_counts, classes, out):
        """Cosines between the nearest atoms of each pair of species into `out` (OUTPUT), but for exact points.

        Does nothing where a class has batches and is not among `classes`: then `crossing` holds no atoms for them.
        """
        slot = cuda.grid(1)
        if slot >= len(order):
            return
        for group in range(len(class_counts) - 1):
            if class_counts[group] > 0 and (classes >> group) & 1 == 0:
                return
        p = order[slot]
        if exact[p] != 0:
            return
        column = start
        for s in range(n_species):
            for t in range(s + 1, n_species):
                for i in range(n_cross):
                    a = crossing[s * n_cross + i, slot]
                    ux = float32(positions[a, 0] - points[p, 0])
                    uy = float32(positions[a, 1] - points[p, 1])
                    uz = float32(positions[a, 2] - points[p, 2])
                    uu = ux * ux + uy * uy + uz * uz
                    for j in range(n_cross):
                        b = crossing[t * n_cross + j, slot]
                        vx = float32(positions[b, 0] - points[p, 0])
                        vy = float32(positions[b, 1] - points[p, 1])
                        vz = float32(positions[b, 2] - points[p, 2])
                        product = uu * (vx * vx + vy * vy + vz * vz)
                        out[p, column + i * n_cross + j] = (ux * vx + uy * vy + uz * vz) / math.sqrt(product)
                column += n_cross * n_cross

    return cross
