"""Crystals with defects, and made-up densities over them."""

from __future__ import annotations

import numpy as np
from ase import Atoms
from ase.build import bulk
from ase.neighborlist import neighbor_list

from gpurho.cutting import Cut
from gpurho.density import Density
from gpurho.grid import Grid
from gpurho.structure import Structure

A = 4.05


def fcc(repeat: int = 4, rattle: float = 0.0, seed: int = 0, symbol: str = "Al") -> Atoms:
    atoms = bulk(symbol, "fcc", A, cubic=True).repeat(repeat)
    atoms.positions += np.random.default_rng(seed).normal(0, rattle, atoms.positions.shape) if rattle else 0.0
    return atoms


def without(atoms: Atoms, *places) -> tuple[Atoms, list[np.ndarray]]:
    """Without the atoms nearest to some places, and where these were."""
    atoms = atoms.copy()
    index = [int(np.argmin(np.linalg.norm(atoms.positions - place, axis=1))) for place in places]
    sites = [atoms.positions[i].copy() for i in index]
    del atoms[index]
    return atoms, sites


def from_site(structure: Structure, position: np.ndarray, site: np.ndarray) -> float:
    from ase.geometry import find_mic

    return float(find_mic((position - site)[None], structure.cell, structure.pbc)[1][0])


def shortest(structure: Structure) -> float:
    return float(neighbor_list("d", structure.to_ase(), 4.0).min())


def density_with(atoms: Atoms, bumps, spacing: float = 0.5, base: float = 1e-3) -> Density:
    """A density whose epistemic sigma is higher around the places given: (place, height) each."""
    structure = Structure.from_ase(atoms)
    shape = tuple(int(n) for n in np.round(atoms.cell.lengths() / spacing))
    grid = Grid(shape, structure.cell)
    points, inverse = grid.points(), np.linalg.inv(structure.cell)
    sigma = np.full(len(points), base)
    for place, height in bumps:
        f = (points - place) @ inverse
        d = np.linalg.norm((f - np.round(f)) @ structure.cell, axis=1)
        sigma += height * np.exp(-((d / 1.8) ** 2))
    # Not the same everywhere else, as real ones are not.
    sigma *= 1 + 0.03 * np.sin(points @ np.array([1.1, 2.3, 0.7]))
    sigma = sigma.reshape(shape).astype(np.float32)
    mean = np.full(shape, 3 * len(atoms) / grid.volume, np.float32)
    return Density(grid, structure, mean, 0.5 * sigma, sigma)


def known_bulk() -> list[Structure]:
    """Bulk, from cold to hot."""
    return [Structure.from_ase(fcc(2, rattle, seed)) for seed, rattle in enumerate([0.05, 0.1, 0.15, 0.2, 0.25] * 4)]


def check_cut(structure: Structure, cut: Cut, max_atoms: int) -> None:
    """What holds for every cell: size, distances, and that its atoms are those of the structure."""
    cell = cut.structure
    assert len(cell) <= max_atoms
    assert cell.pbc.all()
    assert np.linalg.det(cell.cell) > 0
    assert shortest(cell) >= cut.min_distance - 1e-9
    np.testing.assert_array_equal(cell.numbers, structure.numbers[cut.owners])
    assert len(cut.owners) - cut.added + cut.removed <= 1.1 * max_atoms
    images = np.array(list(np.ndindex(5, 5, 5))) - 2
    back = np.linalg.inv(structure.cell)
    for position, owner in zip(cell.positions + cut.origin, structure.positions[cut.owners], strict=True):
        f = (position + images @ cell.cell - owner) @ back
        f -= np.round(f) * structure.pbc
        assert np.linalg.norm(f @ structure.cell, axis=1).min() < 1e-6
