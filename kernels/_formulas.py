"""The formulas of the descriptors, once, as plain scalar functions.

`compile_formulas` compiles them for a target: with ``numba.njit`` for the CPU drivers, with
``numba.cuda.jit(device=True)`` for the CUDA drivers, and with the identity for plain Python. They are written in
float64, take preallocated arrays and return numbers only, so that every target can run them.

Source: preprint, Algorithm 1, and the tie rule of this library: atoms whose distances agree within a tolerance form a
shell; a shell starts at its smallest distance and holds all atoms up to that distance plus the tolerance. Inside a
shell atoms have no order of their own, so each column of cosines is put in descending order over the shell.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

AT_POINT = 1.0e-6
"""An atom closer to the grid point than this (angstrom) is at the point: its direction is undefined, its cosine 0."""


def squared_distance(ax, ay, az, bx, by, bz):
    """Squared distance between two points."""
    dx = ax - bx
    dy = ay - by
    dz = az - bz
    return dx * dx + dy * dy + dz * dz


def cosine(ux, uy, uz, vx, vy, vz):
    """Cosine between two vectors; 0 where one of them is shorter than `AT_POINT`."""
    uu = ux * ux + uy * uy + uz * uz
    vv = vx * vx + vy * vy + vz * vz
    if uu < AT_POINT * AT_POINT or vv < AT_POINT * AT_POINT:
        return 0.0
    return (ux * vx + uy * vy + uz * vz) / math.sqrt(uu * vv)


def insert_descending(out, row, start, stride, filled, slots, value):
    """Put `value` into the descending list ``out[row, start::stride]`` of at most `slots` entries.

    `filled` entries hold values already; returns how many do afterwards. The smallest falls out of a full list.
    """
    if filled == slots:
        if slots == 0 or value <= out[row, start + (slots - 1) * stride]:
            return filled
        i = slots - 1
    else:
        i = filled
        filled += 1
    while i > 0 and out[row, start + (i - 1) * stride] < value:
        out[row, start + i * stride] = out[row, start + (i - 1) * stride]
        i -= 1
    out[row, start + i * stride] = value
    return filled


def sift_down(keys, items, row, i, n):
    """Restore the min-heap below node `i` of the first `n` entries of ``keys[row]``, moving ``items[row]`` along."""
    key = keys[row, i]
    item = items[row, i]
    while True:
        child = 2 * i + 1
        if child >= n:
            break
        if child + 1 < n and keys[row, child + 1] < keys[row, child]:
            child += 1
        if keys[row, child] >= key:
            break
        keys[row, i] = keys[row, child]
        items[row, i] = items[row, child]
        i = child
    keys[row, i] = key
    items[row, i] = item


def order_nearest(px, py, pz, positions, candidates, n_candidates, reach, n_keep, n_whole, tolerance, keys, items, row):
    """Nearest atoms of a point in ascending distance, by a heap: no capacity but the length of `keys`.

    Orders at least `n_keep` atoms (all, where there are fewer), and as many more as the shell of atom `n_whole` has.
    The result stands at the END of ``keys[row, :n_in_reach]`` (OUTPUT: distances) and ``items[row]`` (OUTPUT: atoms),
    nearest last, as heap sort leaves it: entry i lies at ``n_in_reach - 1 - i``. Atoms beyond `reach` are skipped.
    Returns ``(n_ordered, n_in_reach)``.
    """
    n = 0
    for c in range(n_candidates):
        a = candidates[c]
        d2 = squared_distance(positions[a, 0], positions[a, 1], positions[a, 2], px, py, pz)
        if d2 <= reach * reach:
            keys[row, n] = math.sqrt(d2)
            items[row, n] = a
            n += 1
    for i in range(n // 2 - 1, -1, -1):
        sift_down(keys, items, row, i, n)
    ordered = 0
    left = n
    anchor = -1.0
    while left > 0:
        nearest = keys[row, 0]
        if ordered < n_whole and (anchor < 0.0 or nearest > anchor + tolerance):
            anchor = nearest
        if ordered >= n_keep and (n_whole == 0 or (ordered >= n_whole and nearest > anchor + tolerance)):
            break
        item = items[row, 0]
        left -= 1
        keys[row, 0] = keys[row, left]
        items[row, 0] = items[row, left]
        sift_down(keys, items, row, 0, left)
        keys[row, left] = nearest
        items[row, left] = item
        ordered += 1
    return ordered, n


def cosine_row(
    ux, uy, uz, atom, neighbor_start, neighbor_vectors, neighbor_distances, n_neighbors, tolerance, scratch, row
):
    """Cosines at the point between one atom (at u from the point) and its nearest atoms, to ``scratch[row]`` (OUTPUT).

    Shells of equally distant neighbours are sorted by descending cosine; a missing neighbour gives 0. Returns 1 where
    a shell of two or more was met, else 0.
    """
    first = neighbor_start[atom]
    last = neighbor_start[atom + 1]
    tied = 0
    j = 0
    while j < n_neighbors:
        if first + j >= last:
            scratch[row, j] = 0.0
            j += 1
            continue
        anchor = neighbor_distances[first + j]
        slots = 0
        filled = 0
        end = j
        while first + end < last and neighbor_distances[first + end] <= anchor + tolerance:
            end += 1
        slots = min(end, n_neighbors) - j
        if end - j > 1:
            tied = 1
        for e in range(first + j, first + end):
            value = cosine(
                ux,
                uy,
                uz,
                ux + neighbor_vectors[e, 0],
                uy + neighbor_vectors[e, 1],
                uz + neighbor_vectors[e, 2],
            )
            filled = insert_descending(scratch, row, j, 1, filled, slots, value)
        j = end
    return tied


def shell_end(keys, row, n, ordered, i, tolerance):
    """One past the last entry of the shell that starts at entry `i` of an ordered list (see `order_nearest`)."""
    anchor = keys[row, n - 1 - i]
    end = i + 1
    while end < ordered and keys[row, n - 1 - end] <= anchor + tolerance:
        end += 1
    return end


def species_features(
    px, py, pz, positions, owners, keys, items, row, n, ordered, neighbor_start, neighbor_vectors, neighbor_distances,
    n_distances, n_angle_atoms, n_neighbors, cutoff, tolerance, scratch, out, out_row, column
):  # fmt: skip
    """Sets I and II of one species at one point, from its ordered atoms, into ``out[out_row, column:]`` (OUTPUT).

    Returns 1 where a shell of equally distant atoms or neighbours touched the angles, else 0.
    """
    for i in range(n_distances):
        distance = cutoff
        if i < ordered:
            distance = min(keys[row, n - 1 - i], cutoff)
        out[out_row, column + i] = distance
    tied = 0
    base = column + n_distances
    i = 0
    while i < n_angle_atoms:
        if i >= ordered:
            for j in range(n_neighbors):
                out[out_row, base + i * n_neighbors + j] = 0.0
            i += 1
            continue
        end = shell_end(keys, row, n, ordered, i, tolerance)
        slots = min(end, n_angle_atoms) - i
        if end - i > 1:
            tied = 1
        filled = 0
        for q in range(i, end):
            a = items[row, n - 1 - q]
            tied |= cosine_row(
                positions[a, 0] - px,
                positions[a, 1] - py,
                positions[a, 2] - pz,
                owners[a],
                neighbor_start,
                neighbor_vectors,
                neighbor_distances,
                n_neighbors,
                tolerance,
                scratch,
                row,
            )
            now = filled
            for j in range(n_neighbors):
                start = base + i * n_neighbors + j
                now = insert_descending(out, out_row, start, n_neighbors, filled, slots, scratch[row, j])
            filled = now
        i = end
    return tied


def cross_features(
    px, py, pz, positions, keys, items, row_a, n_a, ordered_a, row_b, n_b, ordered_b, n_cross, tolerance, out, out_row,
    column
):  # fmt: skip
    """Cosines at one point between the `n_cross` nearest atoms of two species, into ``out[out_row, column:]`` (OUTPUT).

    Row i belongs to the i-th atom of the first species, column j to the j-th of the second. Where shells meet, the
    cosines of all their pairs are put in descending order and the first ones fill the shells' rectangle row by row.
    Returns 1 where a shell of two or more was met, else 0.
    """
    tied = 0
    for i in range(n_cross * n_cross):
        out[out_row, column + i] = 0.0
    i = 0
    while i < n_cross and i < ordered_a:
        end_i = shell_end(keys, row_a, n_a, ordered_a, i, tolerance)
        rows = min(end_i, n_cross) - i
        j = 0
        while j < n_cross and j < ordered_b:
            end_j = shell_end(keys, row_b, n_b, ordered_b, j, tolerance)
            columns = min(end_j, n_cross) - j
            if end_i - i > 1 or end_j - j > 1:
                tied = 1
            filled = 0
            slots = rows * columns
            for p in range(i, end_i):
                a = items[row_a, n_a - 1 - p]
                for q in range(j, end_j):
                    b = items[row_b, n_b - 1 - q]
                    value = cosine(
                        positions[a, 0] - px,
                        positions[a, 1] - py,
                        positions[a, 2] - pz,
                        positions[b, 0] - px,
                        positions[b, 1] - py,
                        positions[b, 2] - pz,
                    )
                    # The rectangle of the shells is a strided block of the output, walked as one descending list.
                    if filled < slots:
                        s = filled
                        filled += 1
                    elif value > out[out_row, column + (i + rows - 1) * n_cross + j + columns - 1]:
                        s = slots - 1
                    else:
                        continue
                    while s > 0:
                        before = column + (i + (s - 1) // columns) * n_cross + j + (s - 1) % columns
                        if out[out_row, before] >= value:
                            break
                        out[out_row, column + (i + s // columns) * n_cross + j + s % columns] = out[out_row, before]
                        s -= 1
                    out[out_row, column + (i + s // columns) * n_cross + j + s % columns] = value
            j = end_j
        i = end_i
    return tied


FORMULAS: tuple[Callable[..., Any], ...] = (
    squared_distance,
    cosine,
    insert_descending,
    sift_down,
    order_nearest,
    cosine_row,
    shell_end,
    species_features,
    cross_features,
)
"""All formulas, each after those it calls."""


def compile_formulas(jit: Callable[[Any], Any]) -> types.SimpleNamespace:
    """The formulas compiled by `jit`, as attributes of a namespace.

    Each function is given a copy of this module's globals in which the formulas that it calls are the compiled ones.
    """
    names: dict[str, Any] = {"math": math, "AT_POINT": AT_POINT, "__name__": __name__, "__file__": __file__}
    compiled: dict[str, Any] = {}
    for formula in FORMULAS:
        copy = types.FunctionType(formula.__code__, {**names, **compiled}, formula.__name__)
        copy.__module__ = __name__
        copy.__qualname__ = formula.__qualname__
        compiled[formula.__name__] = jit(copy)
    return types.SimpleNamespace(**compiled)
