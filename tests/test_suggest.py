"""Active learning: uncertain regions, what is new, cells cut out of crystals and liquids, the files written."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read
from ase.neighborlist import neighbor_list
from fake_sparc import read_input
from predict_tools import small_model

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
from gpurho.cli import main
from gpurho.cutting import Cut, cut_cell
from gpurho.datasets import Snapshot, write_dataset
from gpurho.density import Density
from gpurho.errors import GpurhoError, OutputExistsError, SettingsError, StoreError
from gpurho.grid import Grid
from gpurho.pipelines import suggest as module
from gpurho.pipelines.suggest import suggest
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


@pytest.fixture(scope="module")
def known() -> list[Structure]:
    """Bulk, from cold to hot."""
    return [Structure.from_ase(fcc(2, rattle, seed)) for seed, rattle in enumerate([0.05, 0.1, 0.15, 0.2, 0.25] * 4)]


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


# -- cells --------------------------------------------------------------------------------------------------------


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


# -- suggestions --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory, known: list[Structure]):
    """Two vacancies far from each other and a divacancy, each uncertain; and training data: bulk, and a vacancy."""
    folder = tmp_path_factory.mktemp("scene")
    places = ([4.0, 4.0, 4.0], [16.2, 16.2, 16.2], [16.2, 4.0, 4.0], [18.2, 6.0, 4.0])
    atoms, sites = without(fcc(6, 0.08, 1), *places)
    pair = 0.5 * (sites[2] + sites[3])
    rho = density_with(atoms, [(sites[0], 4e-3), (sites[1], 3e-3), (pair, 6e-3)])
    rho.write(folder / "large.h5")
    grid = (12, 12, 12)

    def snapshot(structure: Structure) -> Snapshot:
        electrons = 3.0 * len(structure)
        return Snapshot(structure, np.full(grid, electrons / structure.volume, np.float32), electrons)

    vacancy, _ = without(fcc(3, 0.08, 50), [6.0, 6.0, 6.0])
    write_dataset(folder / "bulk.h5", [snapshot(s) for s in known])
    write_dataset(folder / "vacancy.h5", [snapshot(Structure.from_ase(vacancy))])
    return folder, rho, [sites[0], sites[1], pair]


def test_each_kind_of_defect_is_asked_for_once(scene) -> None:
    folder, rho, sites = scene
    found = suggest(rho, training=folder / "bulk.h5", max_atoms=60)
    assert len(found) == 2
    assert from_site(rho.structure, found[0].position, sites[2]) < 1.0  # the divacancy: the highest score
    assert from_site(rho.structure, found[1].position, sites[0]) < 1.0  # of two alike the more uncertain one
    assert found[0].score > found[1].score
    for s in found:
        assert s.novelty > 1
        check_cut(rho.structure, s.cut, 60)
        assert s.atoms.info["family"] == "suggested"
        assert "times as far from the training data" in s.reason
    again = suggest([rho], training=[folder / "bulk.h5"], max_atoms=60)
    assert [a.record() for a in again] == [b.record() for b in found]


def test_what_training_covers_is_not_asked_for(scene) -> None:
    folder, rho, sites = scene
    found = suggest(rho, training=[folder / "bulk.h5", folder / "vacancy.h5"], max_atoms=60)
    assert all(min(from_site(rho.structure, s.position, place) for place in sites[:2]) > 3.0 for s in found)


def test_without_training_data_the_sure_atoms_are_what_is_known(scene) -> None:
    _, rho, sites = scene
    found = suggest(rho, max_atoms=60)
    assert from_site(rho.structure, found[0].position, sites[2]) < 1.0
    assert "atoms that the model is sure of" in found[0].reason
    assert suggest(density_with(fcc(3, 0.05), []), max_atoms=60) == []


def test_files_that_programs_read(scene, tmp_path: Path) -> None:
    from ase.io.espresso import read_espresso_in

    from gpurho.dft.base import DFTSettings
    from gpurho.formats_sparc import read_structure

    folder, rho, _ = scene
    out = tmp_path / "cells"
    found = suggest(rho, training=folder / "bulk.h5", max_atoms=60, out=out, inputs=("qe", "sparc"))
    assert sorted(p.name for p in out.iterdir()) == ["000", "001", "suggestions.json", "suggestions.xyz"]
    assert json.loads((out / "suggestions.json").read_text()) == [s.record() for s in found]
    frames = read(out / "suggestions.xyz", ":")
    for number, (frame, s) in enumerate(zip(frames, found, strict=True)):
        assert frame.info["suggest_reason"] == s.reason
        np.testing.assert_allclose(frame.positions, s.atoms.positions, atol=1e-7)
        np.testing.assert_allclose(frame.cell.array, s.atoms.cell.array, atol=1e-12)
        with open(out / f"{number:03d}" / "qe" / "pw.in") as file:
            qe = read_espresso_in(file)
        sparc = read_structure(out / f"{number:03d}" / "sparc" / "sparc.ion").to_ase()
        for other in (qe, sparc):
            assert len(other) == len(frame)
            np.testing.assert_allclose(other.cell.array, s.atoms.cell.array, atol=1e-6)
            f = (other.positions - s.atoms.positions) @ np.linalg.inv(s.atoms.cell.array)
            assert np.abs((f - np.round(f)) @ s.atoms.cell.array).max() < 1e-6
        assert (out / f"{number:03d}" / "qe" / "Al.upf").is_file()
        mesh = DFTSettings().at(Structure.from_ase(s.atoms)).kmesh
        words = read_input(out / f"{number:03d}" / "sparc" / "sparc.inpt")
        assert tuple(map(int, words["KPOINT_GRID"])) == mesh.size
    assert list(tmp_path.iterdir()) == [out]
    with pytest.raises(OutputExistsError, match="--overwrite"):
        suggest(rho, out=out)
    suggest(rho, training=folder / "bulk.h5", max_atoms=60, out=out, count=1, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == ["suggestions.json", "suggestions.xyz"]


def test_structures_are_predicted_and_refused(tmp_path: Path) -> None:
    model = small_model()
    atoms, _ = without(fcc(3, 0.05), [6.0, 6.0, 6.0])
    options = {"spacing": 0.8, "uncertainty": "analytic", "device": "cpu", "progress": False, "max_atoms": 40}
    found = suggest([atoms, fcc(3, 0.05, 1)], model, level=1e-9, **options)
    assert {s.source for s in found} <= {"Al107", "Al108"}
    # Any level: all atoms stand out, and what differs most is asked for.
    assert 1 <= len(found) <= 5
    single = suggest(atoms, model, level=1e-9, **options)
    assert single[0].source == "Al107"
    small_model().save(tmp_path / "m.safetensors")
    from ase.io import write

    write(tmp_path / "many.xyz", [atoms, fcc(3, 0.05, 1)])
    stored = suggest(tmp_path / "many.xyz", tmp_path / "m.safetensors", level=1e-9, out=tmp_path / "o", **options)
    assert [(s.position.round(3).tolist(), len(s.atoms)) for s in stored] == [
        (s.position.round(3).tolist(), len(s.atoms)) for s in found
    ]
    assert stored[0].source.startswith("many.xyz@")


def test_a_large_scan_goes_through_a_file_that_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MEMORY_POINTS", 100)
    options = {"spacing": 0.8, "uncertainty": "analytic", "device": "cpu", "progress": False, "max_atoms": 40}
    atoms, model = fcc(3, 0.05), small_model()
    streamed = suggest(atoms, model, level=1e-9, out=tmp_path / "o", **options)
    assert [p.name for p in tmp_path.iterdir()] == ["o"]
    monkeypatch.setattr(module, "MEMORY_POINTS", 10**9)
    assert [s.record() for s in streamed] == [s.record() for s in suggest(atoms, model, level=1e-9, **options)]


def test_what_is_refused(scene, tmp_path: Path) -> None:
    _, rho, _ = scene
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    for kind, arguments in (
        (SettingsError, {"count": 0}),
        (SettingsError, {"inputs": ("vasp",), "out": tmp_path / "a"}),
        (SettingsError, {"inputs": ("qe",)}),
        (SettingsError, {"uncertainty": "sampled"}),
        (OutputExistsError, {"out": tmp_path / "file"}),
        (OutputExistsError, {"out": tmp_path / "mine"}),
        (OutputExistsError, {"out": tmp_path / "mine", "overwrite": True}),
        (StoreError, {"out": tmp_path / "none" / "a"}),
        (GpurhoError, {"training": tmp_path / "none.h5"}),
    ):
        with pytest.raises(kind) as caught:
            suggest(rho, **arguments)
        assert "\n" not in str(caught.value)
    with pytest.raises(SettingsError):
        suggest([])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "mine"]


def test_nothing_is_left_of_a_failed_write(scene, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    _, rho, _ = scene
    monkeypatch.setattr("gpurho.pipelines.suggestfiles.engine_input", fails)
    with pytest.raises(StoreError, match="No space left"):
        suggest(rho, max_atoms=60, out=tmp_path / "o", inputs=("qe",))
    assert list(tmp_path.iterdir()) == []


def test_command(scene, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _, _ = scene
    words = ["suggest", str(folder / "large.h5"), "--training", str(folder / "bulk.h5"), "--max-atoms", "60"]
    assert main([*words, "--out", str(tmp_path / "o"), "--write", "qe", "--quiet"]) == 0
    text = capsys.readouterr().out.splitlines()
    assert text[0].startswith("0: epistemic sigma")
    assert text[1].startswith("1: epistemic sigma")
    assert text[2].startswith(f"wrote {tmp_path / 'o'}; compute with: gpurho label")
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "o" / "suggestions.json").read_text())
    assert main([*words, "--level", "1"]) == 0
    assert "nothing stands out" in capsys.readouterr().out
    assert main([*words, "--out", str(tmp_path / "o")]) == 1
    assert "--overwrite" in capsys.readouterr().err
