"""CPU driver of the scalar-product descriptors (Numba, parallel over blocks of grid points).

Two paths. The fast one treats the up to 64 points of a batch as SIMD lanes in float32: their common candidates get
fixed-point squared distances as integer keys, a pruned sorting network orders them, the cosines of all near candidates
are computed and then gathered. The exact one runs the formulas of `_formulas` in float64 for one point at a time, for
any number of candidates; it takes the points at which the order of the atoms is a tie, an atom lies at the point, or
atoms are missing within the cutoff, and the batches with more candidates than a network sorts.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numba import njit, prange

from gpurho.kernels import _cpu_fast, _formulas, network
from gpurho.kernels._cpu_fast import (
    BINS,
    aligned,
    bound,
    cell_range,
    compare_exchange,
    covered,
    distances_of_keys,
    flag_lanes,
    flag_tied,
    gather,
    histogram,
    near_cosines,
    pack_keys,
    prefetch_rows,
    radius_of_count,
    shrink,
    sort_out,
    sphere,
    write_rows,
)
from gpurho.kernels._formulas import compile_formulas
from gpurho.kernels.batches import LANES as W
from gpurho.kernels.network import MAX_INPUTS, SIZES

_exact = compile_formulas(njit(error_model="numpy"))
_order_nearest = _exact.order_nearest
_species_features = _exact.species_features
_cross_features = _exact.cross_features

FAR_SLACK = (0.15, 0.27)
FINE_SLACK = (0.25, 0.42)
"""How far beyond the last wanted atom of a batch's centre, and the batch's radius, candidates are taken at first: a
length (angstrom) and a share of the radius, measured to be enough for nearly all batches at 0.2 and 0.5 angstrom."""
PAD = 1.0e-3
"""Slack of every search radius (angstrom), above the tie tolerance and the rounding of float32."""


def _make_driver(version: int) -> Any:
    """The compiled driver; `version` is part of the key of Numba's cache, which knows nothing of called functions."""

    @njit(parallel=True, error_model="numpy", cache=True)
    def fill_features(
        points, order, batch_start, block_start, positions, owners, cell_start, origin, edge, shape,
        neighbor_start, neighbor_vectors, neighbor_distances, bonds, tied_atoms,
        n_distances, n_angle_atoms, n_neighbors, n_cross, cutoff, tolerance,
        size_index, network_start, comparators, out, counts,
    ):  # fmt: skip
        """Descriptors of points into `out` (OUTPUT), and per block the points capped, tied, exact (OUTPUT: counts).

        Arrays as in `gpurho.kernels.scalar_product_features`.
        """
        if version == 0:  # never so: it is read only to be part of the key
            return
        n_species = cell_start.shape[0]
        width = n_distances + n_angle_atoms * n_neighbors
        n_whole = max(n_angle_atoms, n_cross)
        n_fine = max(n_whole, min(8, n_distances)) + 1
        n_sorted = max(n_distances, n_fine)
        gap = np.float32(1.5 * tolerance + 3.0e-6)
        reach = cutoff + tolerance
        for block in prange(len(block_start) - 1):
            first_batch = block_start[block]
            last_batch = block_start[block + 1]
            centre, block_radius = sphere(points, order, batch_start[first_batch], batch_start[last_batch])
            low, high = cell_range(centre, reach + block_radius, origin, edge, shape)
            room = 1
            for s in range(n_species):
                room = max(room, bound(cell_start[s], low, high, shape))
            ids = np.empty((n_species, room), np.int32)
            n_ids = np.empty(n_species, np.int64)
            distances2 = np.empty(room, np.float64)
            bins = np.empty(BINS, np.int32)
            for s in range(n_species):
                n = gather(positions, cell_start[s], centre, reach + block_radius, low, high, shape, ids[s], distances2)
                histogram(distances2, n, reach + block_radius, bins)
                cut = radius_of_count(bins, n_sorted, reach + block_radius) + 2 * block_radius + PAD
                n_ids[s] = shrink(ids[s], distances2, n, cut, ids[s])
            candidates = np.empty((n_species, room), np.int32)
            n_candidates = np.empty(n_species, np.int64)
            heap_keys = np.empty((n_species, room), np.float64)
            heap_items = np.empty((n_species, room), np.int32)
            n_reached = np.empty(n_species, np.int64)
            n_ordered = np.empty(n_species, np.int64)
            row_scratch = np.empty((n_species, max(1, n_neighbors)), np.float64)
            exact_row = np.empty((1, out.shape[1]), np.float64)
            keys = aligned(SIZES[size_index[min(max(room, n_sorted), MAX_INPUTS)]], np.int32)
            table = aligned(width, np.float32)
            fine_distances = aligned(n_fine, np.float32)
            fast_room = min(room, MAX_INPUTS)
            norms = aligned(fast_room, np.float32)
            cosines = aligned(fast_room * max(1, n_neighbors), np.float32)
            cx = np.empty(fast_room, np.float32)
            cy = np.empty(fast_room, np.float32)
            cz = np.empty(fast_room, np.float32)
            near_bonds = np.empty((fast_room, max(1, n_neighbors), 3), np.float32)
            near_tied = np.empty(fast_room, np.uint8)
            units = aligned(max(1, n_species * n_cross * 3), np.float32)
            offsets = np.empty(W, np.float32)
            gx = np.empty(W, np.float32)
            gy = np.empty(W, np.float32)
            gz = np.empty(W, np.float32)
            exact = np.empty(W, np.uint8)
            for batch in range(first_batch, last_batch):
                p0 = batch_start[batch]
                n_lanes = batch_start[batch + 1] - p0
                centre, radius = sphere(points, order, p0, p0 + n_lanes)
                for lane in range(W):
                    p = order[p0 + min(lane, n_lanes - 1)]
                    gx[lane] = points[p, 0] - centre[0]
                    gy[lane] = points[p, 1] - centre[1]
                    gz[lane] = points[p, 2] - centre[2]
                    offsets[lane] = math.sqrt(gx[lane] ** 2 + gy[lane] ** 2 + gz[lane] ** 2)
                    exact[lane] = 0
                prefetch_rows(out, order, p0, n_lanes)
                limit = reach + radius
                far_slack = FAR_SLACK[0] + FAR_SLACK[1] * radius
                fine_slack = FINE_SLACK[0] + FINE_SLACK[1] * radius
                for s in range(n_species):
                    column = s * width
                    for i in range(n_ids[s]):
                        a = ids[s, i]
                        distances2[i] = (
                            (positions[a, 0] - centre[0]) ** 2
                            + (positions[a, 1] - centre[1]) ** 2
                            + (positions[a, 2] - centre[2]) ** 2
                        )
                    histogram(distances2, n_ids[s], limit, bins)
                    whole = radius_of_count(bins, n_sorted, limit) + 2 * radius
                    last_fine = radius_of_count(bins, n_fine, limit)
                    # First with fewer candidates than could be needed, which is nearly always enough and is checked;
                    # then with all that any lane may need.
                    for attempt in range(2):
                        far = whole if attempt else min(whole, whole - radius + far_slack)
                        all_far = attempt == 1 or far >= min(whole, reach + radius)
                        far = min(far, reach + radius) + PAD
                        fine = min(last_fine + radius + (radius if attempt else min(radius, fine_slack)) + PAD, far)
                        all_fine = attempt == 1 or fine >= far
                        # Near candidates first, so that those whose cosines are computed have the lowest indices.
                        n_near = 0
                        n = 0
                        for i in range(n_ids[s]):
                            if distances2[i] <= fine * fine:
                                candidates[s, n] = ids[s, i]
                                n += 1
                        n_near = n
                        for i in range(n_ids[s]):
                            if distances2[i] > fine * fine and distances2[i] <= far * far:
                                candidates[s, n] = ids[s, i]
                                n += 1
                        n_candidates[s] = n
                        # With fewer candidates than ranks that matter, every lane has atoms missing within the cutoff.
                        if max(n, n_sorted) > MAX_INPUTS or n < n_fine:
                            fast = False
                            continue
                        fast = True
                        for c in range(n):
                            a = candidates[s, c]
                            cx[c] = positions[a, 0] - centre[0]
                            cy[c] = positions[a, 1] - centre[1]
                            cz[c] = positions[a, 2] - centre[2]
                        any_tied = False
                        for c in range(n_near):
                            owner = owners[candidates[s, c]]
                            near_tied[c] = tied_atoms[owner]
                            any_tied |= near_tied[c] != 0
                            for j in range(n_neighbors):
                                for d in range(3):
                                    near_bonds[c, j, d] = bonds[owner, j, d]
                        bits = 7
                        while n > (1 << bits):
                            bits += 1
                        mask = np.int32((1 << bits) - 1)
                        largest = far + radius + PAD
                        scale = np.float32(2147483000.0 / (largest * largest))
                        network = size_index[max(n, n_sorted)]
                        padded = SIZES[network]
                        pack_keys(cx, cy, cz, gx, gy, gz, n, padded, scale, mask, keys)
                        base = keys.ctypes.data
                        row_bytes = np.int32(4 * W)
                        for t in range(network_start[network], network_start[network + 1]):
                            compare_exchange(base, comparators[t, 0] * row_bytes, comparators[t, 1] * row_bytes)
                        distances_of_keys(keys, n_distances, mask, np.float32(1.0) / scale, np.float32(cutoff), table)
                        near_cosines(cx, cy, cz, gx, gy, gz, near_bonds, n_near, n_neighbors, norms, cosines)
                        sort_out(
                            keys, norms, cosines, mask, n_distances, n_fine, n_angle_atoms, n_neighbors,
                            np.float32(cutoff), fine_distances, table,
                        )  # fmt: skip
                        if all_far and all_fine:
                            break
                        if covered(
                            keys, mask, np.float32(1.0) / scale, offsets, n_sorted, np.float32(far - PAD), all_far,
                            n_fine, np.float32(fine - PAD), all_fine,
                        ):  # fmt: skip
                            break
                    if not fast:
                        for lane in range(W):
                            exact[lane] = 1
                        continue
                    flag_lanes(
                        fine_distances, table, n_distances, n_fine, n_whole, gap, np.float32(cutoff - 1.0e-4), exact
                    )
                    if any_tied:
                        flag_tied(keys, near_tied, mask, n_angle_atoms, exact)
                    write_rows(table, width, order, p0, n_lanes, column, out)
                    for c in range(n_cross):
                        q = (s * n_cross + c) * 3
                        for lane in range(W):
                            e = keys[c, lane] & mask
                            units[q, lane] = (cx[e] - gx[lane]) / fine_distances[c, lane]
                            units[q + 1, lane] = (cy[e] - gy[lane]) / fine_distances[c, lane]
                            units[q + 2, lane] = (cz[e] - gz[lane]) / fine_distances[c, lane]
                column = n_species * width
                for s in range(n_species):
                    for t in range(s + 1, n_species):
                        for lane in range(n_lanes if n_cross > 0 else 0):
                            if exact[lane]:
                                continue
                            o = order[p0 + lane]
                            for i in range(n_cross):
                                q = (s * n_cross + i) * 3
                                for j in range(n_cross):
                                    r = (t * n_cross + j) * 3
                                    out[o, column + i * n_cross + j] = (
                                        units[q, lane] * units[r, lane]
                                        + units[q + 1, lane] * units[r + 1, lane]
                                        + units[q + 2, lane] * units[r + 2, lane]
                                    )
                        column += n_cross * n_cross
                for lane in range(n_lanes):
                    o = order[p0 + lane]
                    if exact[lane]:
                        counts[block, 2] += 1
                        px = points[o, 0]
                        py = points[o, 1]
                        pz = points[o, 2]
                        tied = 0
                        for s in range(n_species):
                            ordered, reached = _order_nearest(
                                px, py, pz, positions, candidates[s], n_candidates[s], reach, n_distances, n_whole,
                                tolerance, heap_keys, heap_items, s,
                            )  # fmt: skip
                            n_ordered[s] = ordered
                            n_reached[s] = reached
                            tied |= _species_features(
                                px, py, pz, positions, owners, heap_keys, heap_items, s, reached, ordered,
                                neighbor_start, neighbor_vectors, neighbor_distances, n_distances, n_angle_atoms,
                                n_neighbors, cutoff, tolerance, row_scratch, exact_row, 0, s * width,
                            )  # fmt: skip
                        column = n_species * width
                        for s in range(n_species):
                            for t in range(s + 1, n_species):
                                if n_cross > 0:
                                    tied |= _cross_features(
                                        px, py, pz, positions, heap_keys, heap_items, s, n_reached[s], n_ordered[s],
                                        t, n_reached[t], n_ordered[t], n_cross, tolerance, exact_row, 0, column,
                                    )  # fmt: skip
                                column += n_cross * n_cross
                        for c in range(out.shape[1]):
                            out[o, c] = exact_row[0, c]
                        counts[block, 1] += tied
                    capped = False
                    for s in range(n_species):
                        capped |= out[o, s * width + n_distances - 1] >= np.float32(cutoff)
                    if capped:
                        counts[block, 0] += 1

    return fill_features


def _source_version() -> int:
    """A number, never 0, that changes with the sources that the driver compiles in."""
    digest = 1
    for module in (_formulas, _cpu_fast, network):
        digest = zlib.crc32(Path(module.__file__).read_bytes(), digest)
    return digest | 1


fill_features = _make_driver(_source_version())
