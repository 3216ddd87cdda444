"""Cells cut out of crystals and liquids."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import neighbor_list
from defect_tools import A, check_cut, fcc, shortest, without

from gpurho.cutting import cut_cell
from gpurho.errors import SettingsError
from gpurho.structure import Structure


@pytest.mark.parametrize("max_atoms", [30, 60, 110])
def test_a_vacancy_in_a_perfect_crystal_is_cut_without_a_seam(max_atoms: int) -> None:
    atoms, (site,) = without(fcc(5), [10.0, 10.0, 12.0])
    structure = Structure.from_ase(atoms)
    cut = cut_cell(structure, site, max_atoms)
    check_cut(structure, cut, max_atoms)
    assert cut.mismatch < 1e-6
    assert cut.worst < 1e-6
    sites = cut.structure.volume / (A**3 / 4)
    assert sites == pytest.approx(len(cut.structure) + 1, abs=1e-6)
    assert len(cut.structure) > 0.75 * max_atoms
    # The vacancy is in it: twelve atoms miss a neighbour.
    neighbours = np.bincount(neighbor_list("i", cut.structure.to_ase(), 3.4))
    assert np.bincount(neighbours).tolist() == [0] * 11 + [12, len(cut.structure) - 12]


def test_a_thermal_vacancy_gets_the_same_lattice_as_a_perfect_one() -> None:
    atoms, (site,) = without(fcc(5, 0.1, 1), [10.0, 10.0, 12.0])
    structure = Structure.from_ase(atoms)
    cut = cut_cell(structure, site, 110)
    check_cut(structure, cut, 110)
    # Left and right face show different atoms, each 0.1 angstrom off in three directions.
    assert 0.1 < cut.mismatch < 0.45
    assert cut.structure.volume / (A**3 / 4) == pytest.approx(len(cut.structure) + 1, abs=0.6)
    again = cut_cell(structure, site, 110)
    assert again.structure.fingerprint() == cut.structure.fingerprint()


def test_sheared_and_mixed_crystals() -> None:
    zincblende = bulk("SiGe", "zincblende", 5.5, cubic=True).repeat(3)
    sheared = zincblende.copy()
    sheared.set_cell(
        sheared.cell.array @ (np.eye(3) + np.array([[0, 0.06, 0], [0, 0, 0.04], [0.02, 0, 0]])), scale_atoms=True
    )
    for atoms in (zincblende, sheared):
        structure = Structure.from_ase(atoms)
        cut = cut_cell(structure, atoms.positions[100], 64)
        check_cut(structure, cut, 64)
        assert cut.mismatch < 1e-6
        assert len(cut.structure) % 2 == 0
        assert np.ptp(np.bincount(cut.structure.numbers)[[14, 32]]) == 0
        # As in the crystal, every Si has four Ge.
        i, j = neighbor_list("ij", cut.structure.to_ase(), 2.7)
        assert (cut.structure.numbers[i] != cut.structure.numbers[j]).all()
        assert (np.bincount(i) == 4).all()


def test_cells_out_of_a_liquid_keep_their_atoms_apart() -> None:
    rng = np.random.default_rng(4)
    cell = 22.0 * np.eye(3) + [[0, 0, 0], [5.0, 0, 0], [0, 3.0, 0]]
    points: list[np.ndarray] = []
    while len(points) < 560:
        p = rng.uniform(0, 1, 3)
        f = np.array(points).reshape(-1, 3) - p
        if not points or np.linalg.norm((f - np.round(f)) @ cell, axis=1).min() > 2.2:
            points.append(p)
    structure = Structure(np.array(points) @ cell, np.full(560, 13), cell, np.ones(3, bool))
    cut = cut_cell(structure, np.array([3.0, 20.0, 1.0]), 90)
    check_cut(structure, cut, 90)
    assert len(cut.structure) > 60
    assert cut.mismatch > 0.3
    wide = cut_cell(structure, np.array([3.0, 20.0, 1.0]), 90, min_distance=2.1)
    assert shortest(wide.structure) >= 2.1
    # Its density is about that of the liquid.
    assert len(cut.structure) / cut.structure.volume == pytest.approx(560 / structure.volume, rel=0.15)


def test_slabs_and_small_structures() -> None:
    slab = fcc(4)
    slab.center(vacuum=8.0, axis=2)
    slab.pbc = [True, True, False]
    structure = Structure.from_ase(slab)
    cut = cut_cell(structure, slab.positions[slab.positions[:, 2].argmax()], 60)
    check_cut(structure, cut, 60)
    small = Structure.from_ase(fcc(2))
    whole = cut_cell(small, np.zeros(3), 40)
    assert whole.whole
    assert whole.structure is small
    assert not cut_cell(small, np.zeros(3), 20).whole


def test_cells_that_cannot_be() -> None:
    structure = Structure.from_ase(fcc(3))
    for wrong in ({"max_atoms": 3}, {"min_distance": -1.0}, {"min_distance": float("nan")}):
        with pytest.raises(SettingsError):
            cut_cell(structure, np.zeros(3), **wrong)
