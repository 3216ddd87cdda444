"""Example structures."""

from __future__ import annotations

from importlib.resources import files

import numpy as np
import pytest
from ase.io import read

from gpurho import builders
from gpurho.errors import StructureError
from gpurho.structure import Structure


def test_vacancy():
    atoms = builders.crystal("Al", (2, 2, 2), a=4.05)
    hole = builders.vacancy(atoms)
    assert len(hole) == len(atoms) - 1 == 31
    gone = [p for p in atoms.positions if np.linalg.norm(hole.positions - p, axis=1).min() > 1]
    np.testing.assert_allclose(gone, [[4.05, 4.05, 4.05]])
    np.testing.assert_array_equal(builders.vacancy(atoms, 3).positions[3], atoms.positions[4])
    with pytest.raises(StructureError, match="atom 32"):
        builders.vacancy(atoms, 32)
    with pytest.raises(StructureError, match="two atoms"):
        builders.vacancy(atoms[:1])


def test_strained():
    atoms = builders.crystal("Al", (1, 1, 1), a=4.0)
    np.testing.assert_allclose(builders.strained(atoms, 0.01).cell.lengths(), 4.04)
    shear = np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    sheared = builders.strained(atoms, shear)
    np.testing.assert_allclose(sheared.cell.array[1], [0.4, 4, 0])
    np.testing.assert_allclose(sheared.positions, atoms.positions @ (np.eye(3) + shear).T)
    for bad in (-1.0, np.ones((2, 2)), np.nan):
        with pytest.raises(StructureError, match="strain"):
            builders.strained(atoms, bad)


def test_random_alloy():
    atoms = builders.crystal("Si", (2, 2, 2))
    alloy = builders.random_alloy(atoms, {"Si": 0.25, "Ge": 0.75}, seed=1)
    assert alloy.get_chemical_symbols().count("Ge") == 48
    assert (
        alloy.get_chemical_symbols()
        == builders.random_alloy(atoms, {"Si": 0.25, "Ge": 0.75}, seed=1).get_chemical_symbols()
    )
    assert len(set(alloy.get_chemical_symbols()[:20])) == 2, "mixed, not in blocks"
    with pytest.raises(StructureError, match="sum to 1"):
        builders.random_alloy(atoms, {"Si": 0.5})


def test_slab():
    slab = builders.slab(builders.crystal("Al", (1, 1, 2), a=4.05), vacuum=7.0)
    assert slab.pbc.tolist() == [True, True, False]
    assert slab.positions[:, 2].min() == pytest.approx(7)
    assert slab.cell[2, 2] - slab.positions[:, 2].max() == pytest.approx(7)
    with pytest.raises(StructureError, match="vacuum"):
        builders.slab(slab, vacuum=-1)


def test_rattled():
    atoms = builders.crystal("Al", (3, 3, 3), a=4.05)
    moved = builders.rattled(atoms, 0.1, seed=2).positions - atoms.positions
    assert moved.std() == pytest.approx(0.1, rel=0.1)
    with pytest.raises(StructureError, match="std"):
        builders.rattled(atoms, -0.1)


def test_crystal_that_is_not_known():
    with pytest.raises(StructureError, match="crystal of 'Xx'"):
        builders.crystal("Xx")


def test_shipped_example():
    path = files("gpurho") / "data" / "al_vacancy.xyz"
    atoms = read(str(path))
    structure = Structure.from_ase(atoms)
    assert len(structure) == 107
    assert structure.symbols == ("Al",)
    assert structure.pbc.all()
    structure.check_overlaps(2.0)
