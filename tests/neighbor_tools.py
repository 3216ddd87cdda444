"""A float64 search over explicit images, and the structures that neighbour searches are tried on."""

from __future__ import annotations

from itertools import product

import numpy as np
from ase.build import bulk
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from gpurho.neighbors import (
    NeighborTable,
)
from gpurho.structure import Structure, cell_heights

Rows = list[NDArray[np.float64]]


def oracle_pairs(structure: Structure, cutoff: float) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """All (receiver, sender, shift) within the cutoff, (n, 5), and their vectors, by trying every image."""
    positions, cell = structure.positions, structure.cell
    fractional = positions @ np.linalg.inv(cell)
    spread = np.ptp(fractional, axis=0)
    reach = np.where(structure.pbc, np.ceil(cutoff / cell_heights(cell) + spread), 0).astype(int)
    pairs, vectors = [], []
    for shift in product(*(range(-n, n + 1) for n in reach)):
        difference = positions[None] - positions[:, None] + np.array(shift) @ cell
        receivers, senders = np.nonzero(np.linalg.norm(difference, axis=2) <= cutoff)
        keep = (receivers != senders) | any(shift)
        receivers, senders = receivers[keep], senders[keep]
        pairs.append(np.column_stack([receivers, senders, np.tile(shift, (len(receivers), 1))]))
        vectors.append(difference[receivers, senders])
    return np.concatenate(pairs).astype(np.int64), np.concatenate(vectors)


def oracle_table(structure: Structure, species: NDArray[np.int64], k: int, cutoff: float, tolerance: float) -> Rows:
    """The vectors of each atom's nearest atoms with ties, ascending in distance."""
    pairs, vectors = oracle_pairs(structure, cutoff)
    rows = []
    for atom in range(len(structure)):
        mine = (pairs[:, 0] == atom) & (species[pairs[:, 1]] == species[atom]) & (species[atom] >= 0)
        row = vectors[mine]
        distances = np.linalg.norm(row, axis=1)
        row, distances = row[np.argsort(distances)], np.sort(distances)
        kept = 0
        while kept < min(k, len(row)):
            kept += int((distances[kept:] <= distances[kept] + tolerance).sum())
        rows.append(row[:kept])
    return rows


def table_rows(table: NeighborTable) -> Rows:
    return [table.vectors[begin:end] for begin, end in zip(table.start[:-1], table.start[1:], strict=True)]


def assert_same_rows(ours: Rows, expected: Rows, atol: float = 1e-9) -> None:
    """Same distances in the same order, same vectors up to the order of equal distances."""
    assert [len(row) for row in ours] == [len(row) for row in expected]
    for mine, other in zip(ours, expected, strict=True):
        np.testing.assert_allclose(np.linalg.norm(mine, axis=1), np.linalg.norm(other, axis=1), atol=atol)
        left = list(range(len(other)))
        for vector in mine:
            gaps = np.abs(other[left] - vector).max(axis=1)
            assert gaps.min() < atol, f"{vector} is not among {other[left]}"
            left.pop(int(gaps.argmin()))


def assert_consistent(table: NeighborTable) -> None:
    np.testing.assert_allclose(np.linalg.norm(table.vectors, axis=1), table.distances, rtol=1e-13)
    for begin, end in zip(table.start[:-1], table.start[1:], strict=True):
        assert (np.diff(table.distances[begin:end]) >= 0).all()


def random_structure(seed: int, n_atoms: int, pbc: tuple[bool, ...], shear: float, left_handed: bool) -> Structure:
    """A random triclinic cell of 1.5 to 6 angstrom with atoms in and far outside of it."""
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(1.5, 6.0, 3)) + rng.uniform(-1.0, 1.0, (3, 3)) * 0.4
    cell[2] += shear * cell[0] + 0.37 * shear * cell[1]
    cell = cell @ Rotation.random(random_state=seed).as_matrix()
    if left_handed:
        cell = cell[[1, 0, 2]]
    fractional = rng.uniform(-0.2, 1.2, (n_atoms, 3))
    fractional += rng.integers(-2, 3, (n_atoms, 3)) * np.asarray(pbc)
    return Structure(fractional @ cell, np.full(n_atoms, 13), cell, np.asarray(pbc))


def crystal(name: str, repeat: int = 1, rotate: int | None = None) -> Structure:
    atoms = bulk(name, cubic=repeat > 1) * ((repeat,) * 3)
    if rotate is not None:
        matrix = Rotation.random(random_state=rotate).as_matrix()
        atoms.set_cell(atoms.cell @ matrix, scale_atoms=True)
    return Structure.from_ase(atoms)


def zeros(structure: Structure) -> NDArray[np.int64]:
    return np.zeros(len(structure), dtype=np.int64)
