"""Sums on the device, exact to the bit: against fractions, a search tree and block means in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase import Atoms
from keep_tools import coarse_oracle
from predict_tools import TRICLINIC, aluminium, small_model

from gpurho.descriptors import Environment
from gpurho.errors import HaloTooSmallError
from gpurho.exactsums import carry, exact_sum, to_float
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.kept import SumStore, TileSums
from gpurho.partition import make_tiles
from gpurho.peratom import NearestAtoms, per_atom
from gpurho.reductions import AtomSums, block_means
from gpurho.structure import Structure


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_exact_sums_have_the_bits_of_exact_arithmetic():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    values = (rng.lognormal(-2, 2, 5000).astype(np.float32) * rng.choice([1, -1], 5000)).clip(-500, 500)
    values = values[np.abs(values) > 2.0**-40].astype(np.float64)
    want = sum((Fraction(v) for v in values.tolist()), Fraction(0))
    halves = exact_sum(torch.from_numpy(values)).numpy()
    assert Fraction(int(halves[0]), 2**32) + Fraction(int(halves[1]), 2**72) == want
    assert to_float(halves) == pytest.approx(float(want), rel=1e-15)
    backwards = exact_sum(torch.from_numpy(values[::-1].copy())).numpy()
    np.testing.assert_array_equal(halves, backwards)
    parts = np.array([exact_sum(torch.from_numpy(part)).numpy() for part in np.array_split(values, 7)])
    np.testing.assert_array_equal(carry(parts.sum(0)), halves)


def test_block_means_of_a_known_field():
    field = torch.arange(4 * 6 * 2, dtype=torch.float32).view(4, 6, 2)
    got = block_means(field, (2, 3, 1)).numpy()
    assert got[0, 0, 0] == np.mean([0, 2, 4, 12, 14, 16])
    np.testing.assert_allclose(got, coarse_oracle(field.numpy(), (2, 3, 1), False))
    rms = block_means(field, (2, 3, 1), root=True).numpy()
    np.testing.assert_allclose(rms, coarse_oracle(field.numpy(), (2, 3, 1), True), rtol=1e-6)


def structures() -> dict[str, tuple[Structure, tuple[int, int, int]]]:
    """Systems in which the owner of a point is hard to find, and grids that do not fill blocks."""
    perfect = Structure.from_ase(aluminium(1, rattle=0.0))
    rng = np.random.default_rng(3)
    lone = Structure(np.array([[1.0, 1, 1]]), np.array([13]), TRICLINIC, np.array([True] * 3))
    triclinic = Structure(rng.uniform(0, 1, (5, 3)) @ TRICLINIC, np.full(5, 13), TRICLINIC, np.array([1, 0, 1], bool))
    slab = aluminium(1)
    slab.center(vacuum=14, axis=2)
    slab.pbc = (True, True, False)
    molecule = Atoms("Al2", [[3, 3, 3], [5.5, 3, 3]], cell=[9, 8, 30], pbc=False)
    return {
        "perfect crystal": (perfect, (16, 16, 16)),
        "one atom": (lone, (7, 9, 11)),
        "triclinic": (triclinic, (13, 11, 17)),
        "slab": (Structure.from_ase(slab), (9, 9, 50)),
        "molecule": (Structure.from_ase(molecule), (12, 10, 33)),
    }


@pytest.mark.parametrize("name", structures())
@pytest.mark.parametrize("tile_shape", [(64, 64, 64), (5, 8, 7)])
def test_sums_of_atoms_against_a_search_tree(model, name, tile_shape):
    structure, shape = structures()[name]
    grid = Grid(shape, structure.cell, pbc=structure.pbc.tolist())
    rng = np.random.default_rng(0)
    fields = [rng.uniform(0.01, 1, shape).astype(np.float32) for _ in range(3)]
    environment = Environment(structure, model.spec.descriptor)
    atoms = AtomSums(grid, environment, "cpu")
    store = SumStore(Keep(field=False, atoms=True), len(structure), ("mean", "aleatoric", "epistemic"))
    again = SumStore(Keep(field=False, atoms=True), len(structure), ("mean", "aleatoric", "epistemic"))
    found = []
    for tile in make_tiles(grid, tile_shape):
        parts = [torch.from_numpy(field[tile.slices].reshape(-1).astype(np.float64)) for field in fields]
        near, sums = atoms(tile, [parts[0], parts[1].square(), parts[2], parts[2].square()])
        found.append(TileSums.of(None, near, sums.numpy()))
        store.add(found[-1])
    for sums in found[::-1]:
        again.add(TileSums.unpack(sums.pack()))
    np.testing.assert_array_equal(store.atoms, again.atoms)
    want = per_atom(structure, grid, *fields)
    got = to_float(store.atoms)
    if name == "perfect crystal":
        points = NearestAtoms(structure, grid).owners(grid.points())[0]
        assert len(points) > 1.05 * grid.n_points, "many points must lie between atoms, or ties are not tested"
    np.testing.assert_allclose(got[:, 0] * grid.dv, want.volumes, rtol=1e-12)
    np.testing.assert_allclose(got[:, 1] * grid.dv, want.electrons, rtol=1e-12)
    std = np.hypot(np.sqrt(got[:, 2]), got[:, 3]) * grid.dv
    np.testing.assert_allclose(std, want.electrons_std, rtol=1e-12)


def test_bits_do_not_depend_on_how_many_distances_are_held_at_once(model, monkeypatch):
    structure = Structure.from_ase(aluminium(2))
    grid = Grid((20, 20, 20), structure.cell)
    tile = make_tiles(grid)[0]
    fields = [torch.rand(8000, generator=torch.Generator().manual_seed(0)).double() for _ in range(3)]
    environment = Environment(structure, model.spec.descriptor)
    first = AtomSums(grid, environment, "cpu")(tile, fields)[1]
    monkeypatch.setattr("gpurho.reductions.AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("gpurho.reductions.BLOCK_EDGE", 0.9)
    second = AtomSums(grid, environment, "cpu")(tile, fields)[1]
    assert bool((first[:, 0, 0] != 0).any())
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_halo_that_may_hide_the_nearest_atom_is_refused(model):
    structure, shape = structures()["slab"]
    grid = Grid(shape, structure.cell, pbc=structure.pbc.tolist())
    tile = make_tiles(grid, (9, 9, 8))[0]
    sums = AtomSums(grid, Environment(structure, model.spec.descriptor), "cpu", halo=6.0)
    with pytest.raises(HaloTooSmallError, match="predict on one device"):
        sums(tile, [torch.zeros(tile.n_points, dtype=torch.float64)])
