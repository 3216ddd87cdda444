"""For small blocks of points, the atoms that may be nearest to one of them."""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

SLACK = 1e-5
"""Added to the search radius, angstrom: far above the tolerance of ties and the rounding of positions."""


@njit(cache=True)
def _nearest(centres, positions, squared):
    """Squared distance of the atom nearest to each centre; `squared` is OUTPUT."""
    for b in range(len(centres)):
        best = np.inf
        for a in range(len(positions)):
            x = positions[a, 0] - centres[b, 0]
            y = positions[a, 1] - centres[b, 1]
            z = positions[a, 2] - centres[b, 2]
            best = min(best, x * x + y * y + z * z)
        squared[b] = best


@njit(cache=True)
def _within(centres, positions, limits, fill, counts, lists):
    """Atoms within the square root of `limits` of each centre; `counts` and, where `fill`, `lists` are OUTPUT."""
    for b in range(len(centres)):
        n = 0
        for a in range(len(positions)):
            x = positions[a, 0] - centres[b, 0]
            y = positions[a, 1] - centres[b, 1]
            z = positions[a, 2] - centres[b, 2]
            if x * x + y * y + z * z <= limits[b]:
                if fill:
                    lists[b, n] = a
                n += 1
        counts[b] = n


def block_lists(
    centres: NDArray[np.float64], radius: float, positions: NDArray[np.float64]
) -> tuple[NDArray[np.int64], float]:
    """Candidates for the nearest atom of every point within `radius` of a centre.

    Parameters
    ----------
    centres : (n_blocks, 3) float64, angstrom
    radius : float, angstrom
        No point of a block lies farther than this from the block's centre.
    positions : (m, 3) float64, angstrom
        One atom at least.

    Returns
    -------
    lists : (n_blocks, k) int64
        Indices into `positions`, in their order, filled up with -1.
    reach : float, angstrom
        Distance from the blocks within which `positions` must hold every atom for the lists to be complete.
    """
    squared, counts = np.empty(len(centres)), np.empty(len(centres), np.int64)
    _nearest(centres, positions, squared)
    # A point's nearest atom is at most `radius` farther from it than that of the centre, and so from the centre.
    limits = np.sqrt(squared) + 2.0 * radius + SLACK
    reach = float(limits.max())
    _within(centres, positions, limits**2, False, counts, np.empty((0, 0), np.int64))
    lists = np.full((len(centres), int(counts.max())), -1, np.int64)
    _within(centres, positions, limits**2, True, counts, lists)
    return lists, reach
