"""Active learning: uncertain regions, and what about them is new."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from defect_tools import fcc, from_site, known_bulk, without

from gpurho.activelearning import (
    APART,
    Coverage,
    Environments,
    Peculiarity,
    Region,
    alike,
    atom_scores,
    find_regions,
    outlier_level,
)
from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.grid import Grid
from gpurho.structure import Structure


@pytest.fixture(scope="module")
def known() -> list[Structure]:
    return known_bulk()


# -- scores and regions -------------------------------------------------------------------------------------------


def test_scores_are_those_of_the_points_nearest_to_each_atom() -> None:
    rng = np.random.default_rng(3)
    cell = np.array([[5.0, 0.3, 0.1], [1.2, 4.6, -0.4], [-0.7, 0.9, 5.4]])
    structure = Structure(rng.uniform(0, 1, (4, 3)) @ cell, np.full(4, 13), cell, np.ones(3, bool))
    grid = Grid((14, 13, 15), cell)
    sigma = rng.uniform(0.1, 2.0, grid.shape).astype(np.float32)
    rho = Density(grid, structure, np.ones(grid.shape, np.float32), sigma, sigma)
    shifts = np.array(list(np.ndindex(5, 5, 5))) - 2
    apart = grid.points()[:, None, None] - structure.positions[:, None] - (shifts @ cell)
    owner = np.linalg.norm(apart, axis=-1).min(-1).argmin(-1)
    want = [np.sqrt(np.mean(sigma.ravel()[owner == i].astype(float) ** 2)) for i in range(4)]
    np.testing.assert_allclose(atom_scores(rho), want, rtol=1e-6)
    with pytest.raises(SettingsError, match="uncertainty"):
        atom_scores(Density(grid, structure, np.ones(grid.shape, np.float32)))


def test_regions_are_linked_atoms_across_the_borders() -> None:
    structure = Structure.from_ase(fcc(5))
    scores = np.ones(len(structure))
    corner = np.linalg.norm((structure.positions + 10.125) % 20.25 - 10.125, axis=1)
    middle = np.linalg.norm(structure.positions - structure.positions[222], axis=1)
    scores[corner < 3.0] = 3.0  # an atom and its 12 neighbours, in all eight corners of the cell
    scores[corner < 1.0] = 5.0
    scores[middle < 1.0] = 4.0
    found = find_regions(structure, scores, 2.0, 1.0)
    assert [len(r.atoms) for r in found] == [13, 1]
    assert found[0].atoms[0] == 0
    assert set(found[0].atoms) == set(np.flatnonzero(corner < 3.0))
    assert from_site(structure, found[0].position, np.zeros(3)) < 1e-9
    assert found[0].peak == 5.0
    assert found[0].score == pytest.approx(np.sqrt(24 + 12 * 8))
    assert found[1].atoms.tolist() == [222]
    np.testing.assert_allclose(found[1].position, structure.positions[222])
    assert find_regions(structure, scores, 6.0, 1.0) == []


def test_no_region_outgrows_its_radius() -> None:
    structure = Structure.from_ase(fcc(5))
    line = np.abs(structure.positions[:, 1:]).max(axis=1) < 2.5
    scores = np.where(line, 2.0 + 0.01 * structure.positions[:, 0], 1.0)
    found = find_regions(structure, scores, 1.5, 1.0, link=4.0, radius=6.0)
    assert len(found) > 1
    assert sorted(np.concatenate([r.atoms for r in found])) == np.flatnonzero(line).tolist()
    for region in found:
        peak = structure.positions[region.atoms[0]]
        assert max(from_site(structure, structure.positions[i], peak) for i in region.atoms) <= 6.0 + 1e-9


def test_what_stands_out_does_so_by_spread_and_by_ratio() -> None:
    rng = np.random.default_rng(0)
    quiet = 1.0 + 0.001 * rng.normal(size=1000)
    assert outlier_level(quiet) == pytest.approx(1.3, rel=0.01)
    wide = 1.0 + 0.1 * rng.normal(size=100_000)
    assert outlier_level(wide) == pytest.approx(1.5, rel=0.01)


# -- what is new --------------------------------------------------------------------------------------------------


def test_vacancies_are_new_until_one_is_known(known: list[Structure]) -> None:
    space = Environments(["Al"])
    large, (site,) = without(fcc(4, 0.1, 70), [8.1, 8.1, 8.1])
    other, _ = without(fcc(3, 0.1, 71), [6.0, 6.0, 6.0])
    structure = Structure.from_ase(large)
    near = np.flatnonzero([from_site(structure, p, site) < 3.5 for p in structure.positions])
    hot = space.of(Structure.from_ase(fcc(3, 0.25, 72)))
    groups = [space.of(s) for s in known]
    before = Coverage(groups)
    after = Coverage([*groups, space.of(Structure.from_ase(other))])
    vacancy = space.of(structure, near)
    assert np.median(before.novelty(vacancy)) > 1.15
    assert np.median(after.novelty(vacancy)) < 0.85
    # Hot bulk lies far from everything, but as far as the hot bulk that is known.
    assert np.median(before.novelty(hot)) < 1.25
    assert np.median(before.novelty(groups[3])) == 0.0


def test_units_of_the_descriptors_do_not_matter() -> None:
    rng = np.random.default_rng(1)
    groups = [np.hstack([rng.normal(size=(20, 6)), np.full((20, 1), APART)]) for _ in range(5)]
    values = np.hstack([rng.normal(size=(30, 6)) * np.linspace(0.3, 2, 30)[:, None], np.full((30, 1), APART)])
    factors, shift = np.array([1, 1e3, 1e-3, 7, 50, 1, 1]), np.array([0, 1e5, 0, -30, 0, 4, 0])
    want = Coverage(groups).novelty(values)
    got = Coverage([g * factors + shift for g in groups]).novelty(values * factors + shift)
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert want.max() > 1 > want.min()


def test_novelty_against_a_plain_search() -> None:
    rng = np.random.default_rng(2)
    groups = [rng.normal(size=(int(n), 3)) for n in (4, 7, 2, 30)]
    values = rng.normal(size=(25, 3)) * 1.5
    everything, owner = np.concatenate(groups), np.repeat(range(4), [len(g) for g in groups])
    z = (everything - everything.mean(0)) / everything.std(0) / np.sqrt(3)
    own = [min(np.linalg.norm(z[j] - z[i]) for j in range(43) if owner[j] != owner[i]) for i in range(43)]
    limit = np.quantile(own, 0.95)
    want = []
    for v in (values - everything.mean(0)) / everything.std(0) / np.sqrt(3):
        d = np.linalg.norm(z - v, axis=1)
        want.append(d.min() / min(own[int(d.argmin())], limit))
    np.testing.assert_allclose(Coverage(groups).novelty(values), want, rtol=1e-9)


def test_species_are_never_alike() -> None:
    space = Environments(["Si", "Ge"])
    zincblende = bulk("SiGe", "zincblende", 5.5, cubic=True).repeat(2)
    groups = [space.of(Structure.from_ase(zincblende))]
    rattled = zincblende.copy()
    rattled.rattle(0.02, seed=1)
    swapped = zincblende.copy()
    swapped.numbers[0] = 32
    coverage = Coverage([*groups, space.of(Structure.from_ase(rattled))])
    first = space.of(Structure.from_ase(swapped), np.array([0]))
    assert coverage.novelty(first)[0] > 100 * coverage.novelty(groups[0][:1])[0]
    with pytest.raises(SettingsError):
        Coverage([])


def test_kinds_of_defects_are_told_apart(known: list[Structure]) -> None:
    space = Environments(["Al"])
    coverage = Coverage([space.of(s) for s in known])

    def peculiarity(seed: int, double: bool) -> np.ndarray:
        places = [[8.1, 8.1, 8.1], [10.1, 10.1, 8.1]][: 1 + double]
        atoms, sites = without(fcc(4, 0.08, seed), *places)
        region = Region(np.array([0]), np.mean(sites, axis=0), 1.0, 1.0)
        return Peculiarity(Structure.from_ase(atoms), space, coverage).of(region)

    one, same, two = peculiarity(1, False), peculiarity(2, False), peculiarity(3, True)
    assert alike(one, same)
    assert not alike(one, two)
