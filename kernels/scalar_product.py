"""Public driver of the scalar-product descriptors: checks, allocates, and runs the driver of the arrays' device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.kernels.batches import Batches
from gpurho.kernels.celllist import SpeciesCells

CHUNK = 4
"""Blocks of points that a thread takes at a time."""

TIE_TOLERANCE = 1.0e-5
"""Distances that agree to this (angstrom) are equal: far above rounding, far below any physical difference."""


@dataclass(frozen=True)
class FeatureSizes:
    """What the descriptors of one specification hold; names as in `gpurho.descriptors.DescriptorSpec`."""

    n_species: int
    n_distances: int
    n_angle_atoms: int
    n_angle_neighbors: int
    n_cross: int
    cutoff: float

    @property
    def n_features(self) -> int:
        """Number of columns."""
        pairs = self.n_species * (self.n_species - 1) // 2
        return (
            self.n_species * (self.n_distances + self.n_angle_atoms * self.n_angle_neighbors) + pairs * self.n_cross**2
        )


@dataclass(frozen=True)
class NeighborArrays:
    """The neighbour table of the atoms in the form that the kernels read.

    Parameters
    ----------
    start : (n_atoms + 1,) int64
        Where the neighbours of each atom begin.
    vectors : (n, 3) float64, angstrom
    distances : (n,) float64, angstrom
    bonds : (n_atoms, n_angle_neighbors, 3) float32, angstrom
        The first neighbours of each atom once more; a missing one is `MISSING_BOND`.
    tied : (n_atoms,) uint8
        Whether the first neighbours of the atom are ambiguous (a shell) or incomplete.
    """

    start: NDArray[np.int64]
    vectors: NDArray[np.float64]
    distances: NDArray[np.float64]
    bonds: NDArray[np.float32]
    tied: NDArray[np.uint8]


MISSING_BOND = 1.0e3
"""Component (angstrom) of a bond to a missing neighbour; its atom is marked as tied, so that nothing uses it."""


def pack_neighbors(
    start: NDArray[np.int64], vectors: NDArray[np.float64], distances: NDArray[np.float64], n_neighbors: int
) -> NeighborArrays:
    """`NeighborArrays` of a table in which each atom's neighbours ascend in distance and shells are whole."""
    n_atoms = len(start) - 1
    bonds = np.full((n_atoms, max(1, n_neighbors), 3), MISSING_BOND, np.float32)
    tied = np.zeros(n_atoms, np.uint8)
    if n_neighbors:
        count = np.diff(start)
        tied[count < n_neighbors] = 1
        for j in range(n_neighbors):
            here = np.flatnonzero(count > j)
            bonds[here, j] = vectors[start[here] + j]
            more = here[count[here] > j + 1]
            first = start[more] + j
            # A shell is anchored at its first distance; a pair within the tolerance is all that has to be seen here.
            tied[more[distances[first + 1] - distances[first] <= TIE_TOLERANCE]] = 1
    return NeighborArrays(start, vectors, distances, bonds, tied)


def scalar_product_features(
    points: NDArray[np.float64],
    batches: Batches,
    cells: SpeciesCells,
    neighbors: NeighborArrays,
    sizes: FeatureSizes,
    out: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Descriptors of points on the CPU.

    Parameters
    ----------
    points : (n_points, 3) float64, angstrom
    batches : Batches
        Of these points.
    cells : SpeciesCells
        All atoms, images explicit, within the cutoff of any point.
    neighbors : NeighborArrays
        Of the structure's atoms, which `cells.owners` index.
    sizes : FeatureSizes
    out : (n_points, n_features) float32
        OUTPUT.

    Returns
    -------
    n_capped, n_tied, n_exact : int
        Points with fewer atoms of some species within the cutoff than `n_distances`; points where the order of atoms
        was decided by the tie rule; points that took the exact path.
    """
    from numba import parallel_chunksize

    from gpurho.kernels.cpu import fill_features
    from gpurho.kernels.network import networks

    n_whole = max(sizes.n_angle_atoms, sizes.n_cross)
    keep = max(sizes.n_distances, max(n_whole, min(8, sizes.n_distances)) + 1)
    size_index, network_start, comparators = networks(keep)
    counts = np.zeros((max(1, len(batches.block_start) - 1), 3), np.int64)
    if len(points):
        arguments: tuple[Any, ...] = (
            points, batches.order, batches.start, batches.block_start,
            cells.positions, cells.owners, cells.start, cells.origin, cells.edge, cells.shape,
            neighbors.start, neighbors.vectors, neighbors.distances, neighbors.bonds, neighbors.tied,
            sizes.n_distances, sizes.n_angle_atoms, sizes.n_angle_neighbors, sizes.n_cross,
            sizes.cutoff, TIE_TOLERANCE, size_index, network_start, comparators, out, counts,
        )  # fmt: skip
        # Small pieces, handed out as threads come free: blocks at surfaces and in perfect crystals cost far more.
        with parallel_chunksize(CHUNK):
            fill_features(*arguments)
    n_capped, n_tied, n_exact = counts.sum(axis=0)
    return int(n_capped), int(n_tied), int(n_exact)
