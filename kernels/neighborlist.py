"""Cell list of points under periodic boundaries, for the searches of `gpurho.kernels.neighborsearch`.

The list bins points by their coordinates in a frame of three vectors. Periodic images are never stored: a
bin index beyond the frame stands for the same bin of an image, and its integer offset gives the image's
shift. So cells far smaller than the search radius, sheared and left-handed cells, and any mix of
periodicity take one path.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpurho.kernels.lattice import transformed

TARGET_PER_BIN = 2.0
"""Points per occupied bin that the bin size aims at."""

FLAT = 1.0e-6
"""A set of points thinner than this along an axis takes one bin there, angstrom."""

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]
Bool: TypeAlias = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class CellList:
    """Points sorted by bin. "Slot" is a place in that order.

    Attributes
    ----------
    points : (n, 3) float64, angstrom
        Wrapped positions by slot.
    coords : (n, 3) float64
        The same in units of bins, counted from bin 0 along each frame vector.
    order : (n,) int64
        Index of the point in the caller's order, by slot.
    wraps : (n, 3) int64
        By slot: position = wrapped position + wraps @ frame.
    bins : (3,) int64
        Number of bins along each frame vector; the last axis is the fast one.
    bin_start : (n_bins + 1,) int64
        First slot of each bin.
    frame : (3, 3) float64, angstrom
        Frame vectors as rows.
    periodic : (3,) bool
        Which frame vectors are periods.
    reach : (3,) float64, 1/angstrom
        Bins that one angstrom spans along each axis, measured across the bins' faces.
    density : float, 1/angstrom^3
        Points per volume as a point sees it (of the occupied bins).
    """

    points: F64
    coords: F64
    order: I64
    wraps: I64
    bins: I64
    bin_start: I64
    frame: F64
    periodic: Bool
    reach: F64
    density: float

    @property
    def arrays(self) -> tuple[F64, F64, I64, I64, F64, Bool, F64]:
        """What the search kernels take, in their order."""
        return self.points, self.coords, self.bins, self.bin_start, self.frame, self.periodic, self.reach


def build_cell_list(positions: F64, frame: F64, periodic: Bool) -> CellList:
    """Sort points into bins.

    Parameters
    ----------
    positions : (n, 3) float64, angstrom
        At least one point; anywhere.
    frame : (3, 3) float64, angstrom
        Linearly independent rows.
    periodic : (3,) bool
        Which rows of `frame` are periods; the others only give directions.

    Returns
    -------
    CellList
        Its bins are sized for `TARGET_PER_BIN` points where there are points; at most max(8 n, 2^21) bins.
    """
    fractional = transformed(positions, np.linalg.inv(frame))
    wraps = np.where(periodic, np.floor(fractional), 0.0)
    fractional -= wraps
    # A coordinate just below zero rounds up to one, which is the next image's zero.
    over = periodic & (fractional >= 1.0)
    fractional[over] = 0.0
    wraps[over] += 1.0
    low = np.where(periodic, 0.0, fractional.min(axis=0))
    extent = np.where(periodic, 1.0, fractional.max(axis=0) - low)
    volume = abs(float(np.linalg.det(frame)))
    unit_heights = volume / np.linalg.norm(np.cross(frame[[1, 2, 0]], frame[[2, 0, 1]]), axis=1)
    heights = unit_heights * extent
    most = max(8 * len(positions), 2**21)
    bins = _bin_counts(heights, min(len(positions) / TARGET_PER_BIN, most))
    coords, index, counts, seen = _bin(fractional, low, extent, bins)
    for _ in range(4):
        # Where points cluster in a large box, the bins shrink until they fit the cluster.
        if seen <= 4.0 * TARGET_PER_BIN:
            break
        finer = _bin_counts(heights, min(int(np.prod(bins)) * seen / TARGET_PER_BIN, most))
        if (finer <= bins).all():
            break
        bins = finer
        coords, index, counts, seen = _bin(fractional, low, extent, bins)
    order = np.argsort(index, kind="stable")
    # A flat or single set of points counts as one angstrom thick.
    bin_volume = float(np.prod(np.maximum(heights, 1.0) / bins)) * volume / float(np.prod(unit_heights))
    return CellList(
        points=np.ascontiguousarray((positions - transformed(wraps, frame))[order]),
        coords=np.ascontiguousarray(coords[order]),
        order=order,
        wraps=wraps[order].astype(np.int64),
        bins=bins,
        bin_start=np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        frame=np.ascontiguousarray(frame, dtype=np.float64),
        periodic=np.ascontiguousarray(periodic, dtype=np.bool_),
        reach=np.divide(bins, heights, out=np.zeros(3), where=heights > FLAT),
        density=max(seen - 1.0, len(positions) / len(counts)) / bin_volume,
    )


def _bin_counts(heights: F64, wanted: float) -> I64:
    """(3,) bins of about equal heights, `wanted` in all or a few less."""
    bins = np.ones(3)
    free = heights > FLAT
    while free.any():
        # Axes thinner than a bin take one bin; the others share what is left.
        edge = (float(np.prod(heights[free])) / max(wanted, 1.0)) ** (1.0 / int(free.sum()))
        thin = free & (heights < edge)
        if not thin.any():
            bins[free] = np.floor(heights[free] / edge)
            break
        free &= ~thin
    return np.maximum(bins, 1.0).astype(np.int64)


def _bin(fractional: F64, low: F64, extent: F64, bins: I64) -> tuple[F64, I64, I64, float]:
    """Coordinates in bins (n, 3), bin index (n,), points per bin, and the mean over points of their bin's."""
    coords = (fractional - low) / np.where(extent > 0, extent, 1.0) * bins
    index = np.zeros(len(coords), dtype=np.int64)
    for axis in range(3):
        index = index * bins[axis] + np.clip(coords[:, axis].astype(np.int64), 0, bins[axis] - 1)
    counts = np.bincount(index, minlength=int(np.prod(bins)))
    return coords, index, counts, float((counts.astype(np.float64) ** 2).sum() / len(coords))
