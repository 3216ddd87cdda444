"""CUDA kernels of the exact path: the formulas in float64, a thread per point, for any number of candidates."""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
from collections.abc import Callable
from typing import Any

import numpy as np
from numba import cuda, float32, float64, int32, int64, uint8

from gpurho.kernels._cuda_candidates import cell_index
from gpurho.kernels._formulas import compile_formulas
from gpurho.kernels.batches import LANES
from gpurho.kernels.scalar_product import FeatureSizes

LIST_SIGNATURE = (int32[::1], uint8[::1], int32[::1], int32[::1])
EXACT_SIGNATURE = (
    int32[::1], int32[::1], float64[:, ::1], int32[::1], int32[::1], float64[:, ::1], float64[::1],
    float64[:, ::1], int32[::1], int32[:, ::1], float64, float64, float64, float64, int32, int32, int32,
    int64[::1], float64[:, ::1], float64[::1], float64, float64,
    float64[::1, :], int32[::1, :], float64[::1, :], int32[::1], float32[:, ::1],
)  # fmt: skip
CAPPED_SIGNATURE = (float32, float32[:, ::1], int32[::1])

N_CAPPED, N_TIED, N_LISTED, N_COUNTERS = 0, 1, 2, 3
"""Places in the array of counters, and their number."""

RESET_SIGNATURE = (uint8[::1], int32[::1], int32[::1])

SCRATCH_BYTES = 2**28
"""Most memory for the exact kernel's scratch: its threads are as many as keep to it, and share the points."""
ROOM = 8
"""Places beyond the counted candidates: two kernels may round an atom on the rim of a batch's sphere differently."""


def reset(exact, counters, class_counts):
    """Set all to zero (OUTPUT)."""
    i = cuda.grid(1)
    if i < len(exact):
        exact[i] = 0
    if i < len(counters):
        counters[i] = 0
    if i < len(class_counts):
        class_counts[i] = 0


def list_exact(order, exact, counters, listed):
    """The slots of the points marked in `exact`, into `listed` (OUTPUT), how many into `counters` (OUTPUT)."""
    slot = cuda.grid(1)
    if slot < len(order) and exact[order[slot]] != 0:
        listed[cuda.atomic.add(counters, N_LISTED, 1)] = slot


def make_capped(sizes: FeatureSizes) -> Callable[..., Any]:
    """The kernel that counts the points with missing atoms: a thread per point."""
    n_species = sizes.n_species
    width = sizes.n_distances + sizes.n_angle_atoms * sizes.n_angle_neighbors
    last = sizes.n_distances - 1

    def capped(cutoff, out, counters):
        """Count the rows of `out` with a last distance at the cutoff (OUTPUT: counters)."""
        p = cuda.grid(1)
        if p < out.shape[0]:
            for s in range(n_species):
                if out[p, s * width + last] >= cutoff:
                    cuda.atomic.add(counters, N_CAPPED, 1)
                    break

    return capped


def _batch_of(batch_start, slot):
    """The batch that holds a place in the order of the points."""
    batch = 0
    above = len(batch_start) - 1
    while above - batch > 1:
        middle = (batch + above) // 2
        if batch_start[middle] <= slot:
            batch = middle
        else:
            above = middle
    return batch


def _make_candidates(cell_of: Callable[..., int]) -> Callable[..., int]:
    """Device function that lists the candidates of an entry once more."""

    def candidates(
        sphere, far, positions, cell_start, species,
        origin_x, origin_y, origin_z, edge, cells_x, cells_y, cells_z, items, row,
    ):  # fmt: skip
        """Atoms within `far` of a sphere's centre into ``items[row]`` (OUTPUT), as many as fit; returns how many."""
        x = sphere[0]
        y = sphere[1]
        z = sphere[2]
        first_x = max(0, cell_of(x - far, origin_x, edge))
        first_y = max(0, cell_of(y - far, origin_y, edge))
        first_z = max(0, cell_of(z - far, origin_z, edge))
        last_x = min(cells_x - 1, cell_of(x + far, origin_x, edge))
        last_y = min(cells_y - 1, cell_of(y + far, origin_y, edge))
        last_z = min(cells_z - 1, cell_of(z + far, origin_z, edge))
        n = 0
        for i in range(first_x, last_x + 1):
            for j in range(first_y, last_y + 1):
                if first_z <= last_z:
                    cell = (i * cells_y + j) * cells_z
                    for a in range(cell_start[species, cell + first_z], cell_start[species, cell + last_z + 1]):
                        square = (positions[a, 0] - x) ** 2 + (positions[a, 1] - y) ** 2 + (positions[a, 2] - z) ** 2
                        if square <= far * far and n < items.shape[1]:
                            items[row, n] = a
                            n += 1
        return n

    return candidates


def make_exact(sizes: FeatureSizes) -> Callable[..., Any]:
    """The kernel: a fixed number of threads share the listed points."""
    formulas = compile_formulas(cuda.jit(device=True))
    batch_of = cuda.jit(device=True)(_batch_of)
    candidates = cuda.jit(device=True)(_make_candidates(cuda.jit(device=True)(cell_index)))
    order_nearest = formulas.order_nearest
    species_features = formulas.species_features
    cross_features = formulas.cross_features
    n_species, n_distances, n_cross = sizes.n_species, sizes.n_distances, sizes.n_cross
    n_angle_atoms, n_neighbors = sizes.n_angle_atoms, sizes.n_angle_neighbors
    n_whole = max(n_angle_atoms, n_cross)
    width = n_distances + n_angle_atoms * n_neighbors

    def exact(
        listed, class_counts, points, order, batch_start, spheres, cuts,
        positions, owners, cell_start, origin_x, origin_y, origin_z, edge, cells_x, cells_y, cells_z,
        neighbor_start, neighbor_vectors, neighbor_distances, cutoff, tolerance,
        keys, items, scratch, counters, out,
    ):  # fmt: skip
        """All descriptors of the points ``listed[:counters[N_LISTED]]`` into `out` (OUTPUT).

        OUTPUT: ``counters[N_TIED]``. `keys`, `items`: (n_species * threads, room), `scratch`: (n_species * threads,
        n_neighbors + 2); in Fortran order, so that neighbouring threads use neighbouring places. Does nothing where
        the most candidates of a batch, ``class_counts[-1]``, and `ROOM` exceed the room.
        """
        thread = cuda.grid(1)
        threads = scratch.shape[0] // n_species
        n_listed = counters[N_LISTED]
        if class_counts[len(class_counts) - 1] + ROOM > items.shape[1]:
            return
        n_batches = len(batch_start) - 1
        index = thread
        while index < n_listed:
            slot = listed[index]
            p = order[slot]
            px = points[p, 0]
            py = points[p, 1]
            pz = points[p, 2]
            batch = batch_of(batch_start, slot)
            tied = 0
            for s in range(n_species):
                row = s * threads + thread
                n = candidates(
                    spheres[batch], cuts[s * n_batches + batch], positions, cell_start, s,
                    origin_x, origin_y, origin_z, edge, cells_x, cells_y, cells_z, items, row,
                )  # fmt: skip
                # They stand in the row of `items` that gets the result: each is read before it is overwritten.
                ordered, reached = order_nearest(
                    px, py, pz, positions, items[row], n, cutoff + tolerance, n_distances, n_whole, tolerance,
                    keys, items, row,
                )  # fmt: skip
                # For the cross cosines.
                scratch[row, n_neighbors] = ordered
                scratch[row, n_neighbors + 1] = reached
                tied |= species_features(
                    px, py, pz, positions, owners, keys, items, row, reached, ordered,
                    neighbor_start, neighbor_vectors, neighbor_distances, n_distances, n_angle_atoms, n_neighbors,
                    cutoff, tolerance, scratch, out, p, s * width,
                )  # fmt: skip
            column = n_species * width
            if n_cross > 0:
                for s in range(n_species):
                    for t in range(s + 1, n_species):
                        row = s * threads + thread
                        other = t * threads + thread
                        tied |= cross_features(
                            px, py, pz, positions, keys, items,
                            row, int(scratch[row, n_neighbors + 1]), int(scratch[row, n_neighbors]),
                            other, int(scratch[other, n_neighbors + 1]), int(scratch[other, n_neighbors]),
                            n_cross, tolerance, out, p, column,
                        )  # fmt: skip
                        column += n_cross * n_cross
            if tied != 0:
                cuda.atomic.add(counters, N_TIED, 1)
            index += threads

    return exact


def n_threads(sizes: FeatureSizes, room: int, n_points: int) -> int:
    """Threads of the exact kernel for so many points, with room for `room` candidates of each species: whole blocks."""
    key, item = np.dtype(np.float64).itemsize, np.dtype(np.int32).itemsize
    each = sizes.n_species * (room * (key + item) + (sizes.n_angle_neighbors + 2) * key)
    return LANES * max(1, min(SCRATCH_BYTES // (each * LANES), -(-n_points // LANES)))
