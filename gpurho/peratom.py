"""Electrons that belong to each atom: the density summed over the points nearest to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpurho.fields import Box, Field, blocks
from gpurho.grid import Grid
from gpurho.structure import Structure, cell_heights
from gpurho.trees import nearest

TIE = 1e-6
"""Atoms whose distances from a point agree within this many angstrom share it."""

MAX_SHARES = 24
"""Most atoms that can share a point; twelve meet at most in a dense crystal."""


@dataclass(frozen=True)
class AtomCharges:
    """Electrons of each atom with standard deviations and the volume of its points, (n_atoms,) each.

    `electrons_std` adds aleatoric errors as independent beyond a correlation volume, as `Density.electrons_std` does,
    and the epistemic ones as one common error, or as the weights' posterior says; `electrons_aleatoric` and
    `electrons_epistemic` are these two parts. None without uncertainty. Volumes in angstrom^3.

    Borders run along grid points, which the standard deviations do not know: on a grid that does not have the crystal's
    period, equivalent atoms differ, while ``electrons / volumes`` hardly do.
    """

    electrons: NDArray[np.float64]
    electrons_std: NDArray[np.float64] | None
    volumes: NDArray[np.float64]
    electrons_aleatoric: NDArray[np.float64] | None = None
    electrons_epistemic: NDArray[np.float64] | None = None


def per_atom(
    structure: Structure,
    grid: Grid,
    mean: Field,
    aleatoric: Field | None,
    epistemic: Field | None,
    tick: Callable[[int], None] | None = None,
    correlation_volume: float = 0.0,
    epistemic_std: NDArray[np.float64] | None = None,
) -> AtomCharges:
    """Sums over the Voronoi cells of the atoms, block by block; points on a border are shared out equally.

    `correlation_volume`, angstrom^3, is that within which aleatoric errors go together; `epistemic_std`, (n_atoms,)
    e/angstrom^3, the epistemic sigma of each atom's mean density (`gpurho.atomerrors`), where it is known.
    """
    n = len(structure)
    electrons, volumes, independent, common = (np.zeros(n) for _ in range(4))
    finder = NearestAtoms(structure, grid)
    for box in blocks(mean):
        start, stop = [s.start for s in box], [s.stop for s in box]
        points, owners, shares = finder.owners(grid.points(start, stop))
        values = _flat(mean, box)
        electrons += np.bincount(owners, shares * values[points], n)
        volumes += np.bincount(owners, shares, n)
        if aleatoric is not None and epistemic is not None:
            independent += np.bincount(owners, shares * np.square(_flat(aleatoric, box))[points], n)
            common += np.bincount(owners, shares * _flat(epistemic, box)[points], n)
        if tick is not None:
            tick(values.size)
    dv = grid.dv
    known = aleatoric is not None and epistemic is not None
    if not known:
        return AtomCharges(electrons * dv, None, volumes * dv)
    common = common * dv if epistemic_std is None else epistemic_std * volumes * dv
    independent = np.sqrt(independent * dv * max(dv, correlation_volume))
    return AtomCharges(electrons * dv, np.hypot(independent, common), volumes * dv, independent, common)


def _flat(field: Field, box: Box) -> NDArray[np.float64]:
    return np.asarray(field[box], dtype=np.float64).reshape(-1)


class NearestAtoms:
    """Which atoms are nearest to points of a grid, periodic images counted as their atoms."""

    def __init__(self, structure: Structure, grid: Grid) -> None:
        self._structure = structure
        self._inverse = np.linalg.inv(structure.cell)
        self._heights = cell_heights(structure.cell)
        # Twice the mean distance of atoms: enough in matter; vacuum makes it grow.
        self._build(2.0 * float(np.cbrt(grid.volume / max(1, len(structure)))))

    def _build(self, reach: float) -> None:
        from scipy.spatial import cKDTree

        cell, pbc = self._structure.cell, self._structure.pbc
        fractional = self._structure.positions @ self._inverse
        copies = np.where(pbc, fractional - np.floor(fractional), fractional)
        owners = np.arange(len(copies))
        for axis in np.flatnonzero(pbc):
            margin = reach / self._heights[axis]
            pieces, indices = [copies], [owners]
            for shift in range(1, int(np.ceil(margin)) + 1):
                up, down = copies[:, axis] + shift <= 1 + margin, copies[:, axis] - shift >= -margin
                step = np.eye(3)[axis] * shift
                pieces += [copies[up] + step, copies[down] - step]
                indices += [owners[up], owners[down]]
            copies, owners = np.concatenate(pieces), np.concatenate(indices)
        self._reach, self._owners = reach, owners
        self._tree = cKDTree(copies @ cell)

    def owners(self, points: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
        """Indices of points, of the atoms they belong to, and their shares; a tied point stands several times."""
        fractional = points @ self._inverse
        wrapped = np.where(self._structure.pbc, fractional - np.floor(fractional), fractional) @ self._structure.cell
        pair = min(2, self._tree.n)
        distance, index = nearest(self._tree, wrapped, np.arange(1, pair + 1))
        if float(distance[:, 0].max()) + TIE > self._reach and self._structure.pbc.any():
            # An image beyond the copies might be nearer than the atom that was found, but not than this far.
            self._build(1.1 * float(distance[:, 0].max()) + TIE)
            return self.owners(points)
        numbers = np.arange(len(points))
        first = self._owners[index[:, 0]]
        if pair < 2:
            return numbers, first, np.ones(len(points))
        tied = np.flatnonzero(distance[:, 1] - distance[:, 0] < TIE)
        single = np.ones(len(points), dtype=bool)
        single[tied] = False
        rows = [numbers[single]]
        atoms = [first[single]]
        shares = [np.ones(int(single.sum()))]
        if tied.size:
            k = min(MAX_SHARES, self._tree.n)
            far, many = nearest(self._tree, wrapped[tied], np.arange(1, k + 1))
            near = far - far[:, :1] < TIE
            rows.append(np.repeat(tied, near.sum(axis=1)))
            atoms.append(self._owners[many[near]])
            shares.append(np.repeat(1.0 / near.sum(axis=1), near.sum(axis=1)))
        return np.concatenate(rows), np.concatenate(atoms), np.concatenate(shares)
