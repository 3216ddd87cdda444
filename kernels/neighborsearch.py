"""Neighbour searches on a cell list (Numba, parallel over the points).

No search has a fixed capacity: rows are counted, then filled. Every point is searched by one thread in a
fixed order, so results do not depend on the number of threads. The first arguments of every search are
those of `CellList.arrays`.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numba import njit, prange
from numpy.typing import NDArray

SLACK = 1.0e-6
"""Added to a search radius before it is turned into bins, angstrom: far above rounding, far below a bin."""

BLOCK = 256
"""Points per work item of the parallel loops."""

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]
Bool: TypeAlias = NDArray[np.bool_]


@njit(cache=True)
def _bin_range(coord: float, reach: float, n_bins: int, is_periodic: bool) -> tuple[int, int]:
    """First and last bin within `reach` bins of `coord`; beyond the frame only where it is periodic."""
    low = int(np.floor(coord - reach))
    high = int(np.floor(coord + reach))
    if not is_periodic:
        low = min(max(low, 0), n_bins - 1)
        high = max(min(high, n_bins - 1), 0)
    return low, high


@njit(cache=True)
def _box(
    coords: F64, bins: I64, periodic: Bool, reach: F64, slot: int, radius: float
) -> tuple[int, int, int, int, int, int, int]:
    """Bins around a slot that a sphere can touch, and the number of contiguous runs of slots in them."""
    wide = radius + SLACK
    x0, x1 = _bin_range(coords[slot, 0], reach[0] * wide, bins[0], periodic[0])
    y0, y1 = _bin_range(coords[slot, 1], reach[1] * wide, bins[1], periodic[1])
    z0, z1 = _bin_range(coords[slot, 2], reach[2] * wide, bins[2], periodic[2])
    n_images = z1 // bins[2] - z0 // bins[2] + 1
    return x0, y0, z0, z1, y1 - y0 + 1, n_images, (x1 - x0 + 1) * (y1 - y0 + 1) * n_images


@njit(cache=True)
def _run(
    box: tuple[int, int, int, int, int, int, int], run: int, bins: I64, bin_start: I64
) -> tuple[int, int, int, int, int]:
    """Slots [begin, end) of a run (bins that follow each other on the last axis) and its image's shift."""
    x0, y0, z0, z1, n_y, n_images, _ = box
    row = run // n_images
    x = x0 + row // n_y
    y = y0 + row % n_y
    shift_x, shift_y = x // bins[0], y // bins[1]
    shift_z = z0 // bins[2] + run % n_images
    line = ((x - shift_x * bins[0]) * bins[1] + (y - shift_y * bins[1])) * bins[2]
    first = max(z0 - shift_z * bins[2], 0)
    last = min(z1 - shift_z * bins[2], bins[2] - 1)
    return bin_start[line + first], bin_start[line + last + 1], shift_x, shift_y, shift_z


@njit(cache=True)
def _translation(frame: F64, shift_x: int, shift_y: int, shift_z: int) -> tuple[float, float, float]:
    """The image's translation, angstrom."""
    return (
        shift_x * frame[0, 0] + shift_y * frame[1, 0] + shift_z * frame[2, 0],
        shift_x * frame[0, 1] + shift_y * frame[1, 1] + shift_z * frame[2, 1],
        shift_x * frame[0, 2] + shift_y * frame[1, 2] + shift_z * frame[2, 2],
    )


@njit(cache=True)
def _displacement(
    points: F64, slot: int, other: int, image: tuple[float, float, float]
) -> tuple[float, float, float, float]:
    """From a slot's point to an image of another's: x, y, z and length, angstrom."""
    # The points first: coincident points of the same image then lie at exactly zero.
    x = points[other, 0] - points[slot, 0] + image[0]
    y = points[other, 1] - points[slot, 1] + image[1]
    z = points[other, 2] - points[slot, 2] + image[2]
    return x, y, z, np.sqrt(x * x + y * y + z * z)


@njit(cache=True)
def tie_limit(distances: F64, k: int, tolerance: float) -> float:
    """Largest distance of the tie group that holds rank `k`.

    Groups are anchored: the first starts at the smallest distance and holds all up to `tolerance` beyond
    it; the next starts at the first distance after that. `distances` are ascending, at least the `k`
    smallest of them.
    """
    anchor = distances[0]
    for rank in range(1, k):
        if distances[rank] > anchor + tolerance:
            anchor = distances[rank]
    return anchor + tolerance


@njit(cache=True)
def _nearest_of(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    slot: int, radius: float, nearest: F64,
) -> int:  # fmt: skip
    """OUTPUT nearest (k,): the smallest distances within `radius`, ascending; returns their number."""
    found = 0
    box = _box(coords, bins, periodic, reach, slot, radius)
    for run in range(box[6]):
        begin, end, shift_x, shift_y, shift_z = _run(box, run, bins, bin_start)
        image = _translation(frame, shift_x, shift_y, shift_z)
        home = shift_x == 0 and shift_y == 0 and shift_z == 0
        for other in range(begin, end):
            _, _, _, distance = _displacement(points, slot, other, image)
            if distance > radius or (home and other == slot):
                continue
            if found == len(nearest):
                if distance >= nearest[found - 1]:
                    continue
                place = found - 1
            else:
                place = found
                found += 1
            while place > 0 and nearest[place - 1] > distance:
                nearest[place] = nearest[place - 1]
                place -= 1
            nearest[place] = distance
    return found


@njit(cache=True)
def _count_of(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    slot: int, radius: float,
) -> int:  # fmt: skip
    """Neighbours of a slot within `radius`."""
    count = 0
    box = _box(coords, bins, periodic, reach, slot, radius)
    for run in range(box[6]):
        begin, end, shift_x, shift_y, shift_z = _run(box, run, bins, bin_start)
        image = _translation(frame, shift_x, shift_y, shift_z)
        home = shift_x == 0 and shift_y == 0 and shift_z == 0
        for other in range(begin, end):
            _, _, _, distance = _displacement(points, slot, other, image)
            if distance <= radius and not (home and other == slot):
                count += 1
    return count


@njit(parallel=True, cache=True)
def nearest_limits(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    active: I64, radius: float, cutoff: float, k: int, tolerance: float, limits: F64, counts: I64,
) -> None:  # fmt: skip
    """How far to look from each active slot for its `k` nearest with ties, and how many that finds.

    OUTPUT limits (n_slots,): the distance up to which all neighbours belong, at most `cutoff`; NaN where
    `radius` is too small to tell.
    OUTPUT counts (n_slots,): neighbours within the limit; the slots that stay open keep theirs.
    """
    for block in prange((len(active) + BLOCK - 1) // BLOCK):
        nearest = np.empty(k)
        for item in range(block * BLOCK, min((block + 1) * BLOCK, len(active))):
            slot = active[item]
            found = _nearest_of(points, coords, bins, bin_start, frame, periodic, reach, slot, radius, nearest)
            limit = tie_limit(nearest, k, tolerance) if found == k else np.inf
            if limit > radius and radius < cutoff:
                limits[slot] = np.nan
                continue
            limit = min(limit, cutoff)
            limits[slot] = limit
            counts[slot] = _count_of(points, coords, bins, bin_start, frame, periodic, reach, slot, limit)


@njit(parallel=True, cache=True)
def fill_nearest(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    limits: F64, starts: I64, vectors: F64, distances: F64,
) -> None:  # fmt: skip
    """Write the neighbours within each slot's limit, ascending in distance.

    starts (n_slots,): row of the outputs where a slot's neighbours begin.
    OUTPUT vectors (nnz, 3), distances (nnz,), angstrom. Equal distances are ordered by x, y and z.
    """
    for block in prange((len(points) + BLOCK - 1) // BLOCK):
        for slot in range(block * BLOCK, min((block + 1) * BLOCK, len(points))):
            head = starts[slot]
            tail = head
            box = _box(coords, bins, periodic, reach, slot, limits[slot])
            for run in range(box[6]):
                begin, end, shift_x, shift_y, shift_z = _run(box, run, bins, bin_start)
                image = _translation(frame, shift_x, shift_y, shift_z)
                home = shift_x == 0 and shift_y == 0 and shift_z == 0
                for other in range(begin, end):
                    x, y, z, distance = _displacement(points, slot, other, image)
                    if distance > limits[slot] or (home and other == slot):
                        continue
                    row = tail
                    tail += 1
                    while row > head and _before(distance, x, y, z, distances[row - 1], vectors[row - 1]):
                        distances[row] = distances[row - 1]
                        vectors[row] = vectors[row - 1]
                        row -= 1
                    distances[row] = distance
                    vectors[row, 0] = x
                    vectors[row, 1] = y
                    vectors[row, 2] = z


@njit(cache=True)
def _before(distance: float, x: float, y: float, z: float, other_distance: float, other: F64) -> bool:
    """Whether a neighbour stands before another: by distance, then by x, y, z."""
    if distance != other_distance:
        return distance < other_distance
    if x != other[0]:
        return x < other[0]
    if y != other[1]:
        return y < other[1]
    return z < other[2]


@njit(parallel=True, cache=True)
def count_within(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    radius: float, counts: I64,
) -> None:  # fmt: skip
    """OUTPUT counts (n_slots,): neighbours of each slot within `radius`."""
    for block in prange((len(points) + BLOCK - 1) // BLOCK):
        for slot in range(block * BLOCK, min((block + 1) * BLOCK, len(points))):
            counts[slot] = _count_of(points, coords, bins, bin_start, frame, periodic, reach, slot, radius)


@njit(parallel=True, cache=True)
def fill_within(
    points: F64, coords: F64, bins: I64, bin_start: I64, frame: F64, periodic: Bool, reach: F64,
    radius: float, starts: I64, receivers: I64, senders: I64, shifts: I64,
) -> None:  # fmt: skip
    """Write the pairs within `radius` as slots.

    starts (n_slots,): row of the outputs where a slot's neighbours begin.
    OUTPUT receivers, senders (n_pairs,): slots. OUTPUT shifts (n_pairs, 3): of the sender's wrapped position.
    """
    for block in prange((len(points) + BLOCK - 1) // BLOCK):
        for slot in range(block * BLOCK, min((block + 1) * BLOCK, len(points))):
            row = starts[slot]
            box = _box(coords, bins, periodic, reach, slot, radius)
            for run in range(box[6]):
                begin, end, shift_x, shift_y, shift_z = _run(box, run, bins, bin_start)
                image = _translation(frame, shift_x, shift_y, shift_z)
                home = shift_x == 0 and shift_y == 0 and shift_z == 0
                for other in range(begin, end):
                    _, _, _, distance = _displacement(points, slot, other, image)
                    if distance > radius or (home and other == slot):
                        continue
                    receivers[row] = slot
                    senders[row] = other
                    shifts[row, 0] = shift_x
                    shifts[row, 1] = shift_y
                    shifts[row, 2] = shift_z
                    row += 1


@njit(parallel=True, cache=True)
def row_limits(start: I64, distances: F64, k: int, tolerance: float, limits: F64) -> None:
    """OUTPUT limits (n_rows,): `tie_limit` of each row of ascending distances; inf for fewer than `k`."""
    for row in prange(len(start) - 1):
        if start[row + 1] - start[row] >= k:
            limits[row] = tie_limit(distances[start[row] : start[row + 1]], k, tolerance)
        else:
            limits[row] = np.inf
