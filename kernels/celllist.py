"""Cell lists: the atoms of a structure in periodic bins, and the atoms around a box with their images explicit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numba import njit
from numpy.typing import NDArray

from gpurho.kernels.lattice import transformed

Floats = NDArray[np.float64]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class AtomBins:
    """Atoms of a structure, wrapped into the cell along periodic directions and sorted into fractional bins.

    Parameters
    ----------
    fractional : (n_atoms, 3) float64
        In bin order; within [0, 1) along periodic directions.
    owners : (n_atoms,) int32
        The structure's index of each atom.
    occupied : (n_occupied,) int64
        The bins with atoms, ``(ix * by + iy) * bz + iz``, ascending. The others are not listed, so that a part of a
        large structure, or few atoms in a vast cell, take no memory by volume.
    start : (n_occupied + 1,) int64
        Where the atoms of each of them begin.
    shape : (3,) int64
        Bins along each cell vector.
    """

    fractional: Floats
    owners: Ints
    occupied: NDArray[np.int64]
    start: NDArray[np.int64]
    shape: NDArray[np.int64]
    cell: Floats
    inverse: Floats
    pbc: NDArray[np.bool_]


def bin_atoms(
    positions: Floats,
    cell: Floats,
    pbc: NDArray[np.bool_],
    bin_width: float = 5.0,
    shape: Sequence[int] | None = None,
) -> AtomBins:
    """Sort atoms into bins at least `bin_width` angstrom thick (one bin where the cell is thinner).

    A part of a structure's atoms, in their order and with the `shape` (3 ints) of the whole structure's bins, gets the
    bins' atoms in the same order and with the same bits.
    """
    inverse = np.linalg.inv(cell).astype(np.float64)
    fractional = transformed(positions, inverse)
    wrapped = np.where(pbc, fractional - np.floor(fractional), fractional)
    # A tiny negative coordinate rounds up to 1 when it is wrapped.
    wrapped[(wrapped >= 1.0) & pbc] = 0.0
    bins = bin_shape(len(positions), inverse, bin_width) if shape is None else np.array(shape, np.int64)
    index = np.clip(np.floor(wrapped * bins).astype(np.int64), 0, bins - 1)
    flat = (index[:, 0] * bins[1] + index[:, 1]) * bins[2] + index[:, 2]
    order = np.argsort(flat, kind="stable")
    occupied, first = np.unique(flat[order], return_index=True)
    start = np.append(first, len(flat)).astype(np.int64)
    fractional = np.ascontiguousarray(wrapped[order])
    rows = np.array(cell, dtype=np.float64, order="C")
    inverse = np.asarray(inverse, np.float64)
    return AtomBins(fractional, order.astype(np.int32), occupied.astype(np.int64), start, bins, rows, inverse, pbc)


def bin_shape(n_atoms: int, inverse: Floats, bin_width: float = 5.0) -> NDArray[np.int64]:
    """Bins along each cell vector for so many atoms; `inverse` (3, 3) is that of the cell, 1/angstrom."""
    heights = 1.0 / np.linalg.norm(inverse, axis=0)
    # No more bins than atoms along an axis: those around a tile of a sparse system in a vast cell are all looked at.
    most = max(1, int(np.ceil(n_atoms ** (1 / 3))) * 4)
    return np.clip((heights / bin_width).astype(np.int64), 1, most)


@njit(cache=True)
def _visit(fractional, owners, occupied, start, shape, cell, pbc, low, high, fill, out_positions, out_owners):
    """Count the images whose fractional coordinates lie in [low, high]; where `fill`, write them (OUTPUT) too."""
    first = np.empty(3, np.int64)
    last = np.empty(3, np.int64)
    for d in range(3):
        first[d] = int(np.floor(low[d] * shape[d]))
        last[d] = int(np.floor(high[d] * shape[d]))
        if not pbc[d]:
            # The outermost bins hold the atoms outside of the cell too.
            first[d] = min(max(first[d], 0), shape[d] - 1)
            last[d] = min(max(last[d], 0), shape[d] - 1)
    n = 0
    for ix in range(first[0], last[0] + 1):
        sx = ix // shape[0]
        for iy in range(first[1], last[1] + 1):
            sy = iy // shape[1]
            for iz in range(first[2], last[2] + 1):
                sz = iz // shape[2]
                b = ((ix - sx * shape[0]) * shape[1] + iy - sy * shape[1]) * shape[2] + iz - sz * shape[2]
                place = np.searchsorted(occupied, b)
                if place == len(occupied) or occupied[place] != b:
                    continue
                for a in range(start[place], start[place + 1]):
                    f0 = fractional[a, 0] + sx
                    f1 = fractional[a, 1] + sy
                    f2 = fractional[a, 2] + sz
                    if f0 < low[0] or f0 > high[0] or f1 < low[1] or f1 > high[1] or f2 < low[2] or f2 > high[2]:
                        continue
                    if fill:
                        f = fractional[a]
                        for d in range(3):
                            # From the wrapped atom and a whole shift: the same bits for every box.
                            atom = f[0] * cell[0, d] + f[1] * cell[1, d] + f[2] * cell[2, d]
                            out_positions[n, d] = atom + (sx * cell[0, d] + sy * cell[1, d] + sz * cell[2, d])
                        out_owners[n] = owners[a]
                    n += 1
    return n


def atoms_around(bins: AtomBins, corners: Floats, reach: float) -> tuple[Floats, Ints]:
    """Every atom, image by image, that lies within `reach` of a box.

    Parameters
    ----------
    bins : AtomBins
    corners : (n, 3) float64, angstrom
        Points whose convex hull is the box.
    reach : float, angstrom

    Returns
    -------
    positions : (m, 3) float64, angstrom
    owners : (m,) int32
        Some atoms a little farther than `reach` are among them; none nearer is missing.
    """
    fractional = corners @ bins.inverse
    margin = reach * np.linalg.norm(bins.inverse, axis=0) + 1e-9
    low, high = fractional.min(axis=0) - margin, fractional.max(axis=0) + margin
    arguments = (bins.fractional, bins.owners, bins.occupied, bins.start, bins.shape, bins.cell, bins.pbc, low, high)
    none = np.empty((0, 3)), np.empty(0, np.int32)
    n = _visit(*arguments, False, *none)
    positions, owners = np.empty((n, 3)), np.empty(n, np.int32)
    _visit(*arguments, True, positions, owners)
    return positions, owners


@dataclass(frozen=True)
class SpeciesCells:
    """Atoms sorted by species and Cartesian cell, for the search around points.

    Parameters
    ----------
    positions : (m, 3) float64, angstrom
    owners : (m,) int32
        The structure's index of each atom.
    start : (n_species, n_cells + 1) int32
        Where the atoms of each cell begin; cell ``(ix * ny + iy) * nz + iz``.
    origin : (3,) float64
    edge : float
    shape : (3,) int64
    """

    positions: Floats
    owners: Ints
    start: Ints
    origin: Floats
    edge: float
    shape: NDArray[np.int64]


def species_cells(positions: Floats, owners: Ints, species: Ints, n_species: int, edge: float = 3.0) -> SpeciesCells:
    """Sort atoms (with their `species`, 0 up) into cubic cells of at least `edge` angstrom."""
    if len(positions) == 0:
        start = np.zeros((n_species, 2), np.int32)
        return SpeciesCells(positions, owners, start, np.zeros(3), edge, np.ones(3, np.int64))
    origin = positions.min(axis=0)
    extent = positions.max(axis=0) - origin
    # Not many more cells than atoms, however sparse they are.
    edge = max(edge, float(np.prod(np.maximum(extent, edge)) / (8.0 * len(positions))) ** (1 / 3))
    shape = (extent / edge).astype(np.int64) + 1
    index = np.minimum(((positions - origin) / edge).astype(np.int64), shape - 1)
    n_cells = int(shape.prod())
    flat = ((species.astype(np.int64) * shape[0] + index[:, 0]) * shape[1] + index[:, 1]) * shape[2] + index[:, 2]
    order = np.argsort(flat, kind="stable")
    edges = np.searchsorted(flat[order], np.arange(n_species * n_cells + 1)).astype(np.int32)
    start = np.empty((n_species, n_cells + 1), np.int32)
    for s in range(n_species):
        start[s] = edges[s * n_cells : (s + 1) * n_cells + 1]
    return SpeciesCells(np.ascontiguousarray(positions[order]), owners[order], start, origin, edge, shape)
