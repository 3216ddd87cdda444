"""The table of nearest atoms, against a float64 search over explicit images."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from neighbor_tools import (
    assert_consistent,
    assert_same_rows,
    crystal,
    oracle_table,
    random_structure,
    table_rows,
    zeros,
)
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from gpurho import _neighbor_providers, neighbors
from gpurho.neighbors import (
    available_providers,
    nearest_table,
)
from gpurho.structure import Structure


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 10**6),
    n_atoms=st.integers(1, 9),
    n_species=st.integers(1, 3),
    pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()),
    k=st.integers(1, 7),
    cutoff=st.floats(1.0, 5.5),
    shear=st.sampled_from([0.0, 0.8, 3.0]),
    left_handed=st.booleans(),
    coincident=st.booleans(),
    tolerance=st.sampled_from([1e-5, 0.3]),
)
def test_table_against_all_images(
    seed: int,
    n_atoms: int,
    n_species: int,
    pbc: tuple[bool, ...],
    k: int,
    cutoff: float,
    shear: float,
    left_handed: bool,
    coincident: bool,
    tolerance: float,
) -> None:
    structure = random_structure(seed, n_atoms, pbc, shear, left_handed)
    if coincident and n_atoms > 1:
        positions = structure.positions.copy()
        positions[1] = positions[0] + np.asarray(pbc)[0] * structure.cell[0]
        structure = Structure(positions, structure.numbers, structure.cell, structure.pbc)
    species = np.random.default_rng(seed).integers(-1 if n_species > 2 else 0, n_species, n_atoms)
    table = nearest_table(structure, species, k, cutoff, tolerance)
    assert_consistent(table)
    assert_same_rows(table_rows(table), oracle_table(structure, species, k, cutoff, tolerance))


@pytest.mark.parametrize(("name", "shell"), [("Al", 12), ("Fe", 8), ("Si", 4)])
@pytest.mark.parametrize("repeat", [1, 3])
@pytest.mark.parametrize("rotate", [None, 0, 1])
def test_shells_of_perfect_crystals_stay_whole(name: str, shell: int, repeat: int, rotate: int | None) -> None:
    structure = crystal(name, repeat, rotate)
    for k in (1, 3, shell):
        table = nearest_table(structure, zeros(structure), k, 9.0)
        assert (np.diff(table.start) == shell).all()
        assert np.ptp(table.distances) < 1e-9
    assert (np.diff(nearest_table(structure, zeros(structure), shell + 1, 9.0).start) > shell).all()


def test_groups_are_anchored_at_their_smallest_distance() -> None:
    # Gaps of 0.6 tolerances chain from one distance to the next; only the first two form a group.
    x = np.array([0.0, 2.0, -2.0 - 6e-6, 2.0 + 12e-6, -2.0 - 18e-6])
    structure = Structure(x[:, None] * [[1.0, 0, 0]], np.full(5, 13), np.eye(3) * 10, np.zeros(3, bool))
    counts = [int(np.diff(nearest_table(structure, zeros(structure), k, 5.0).start)[0]) for k in (1, 2, 3, 4)]
    assert counts == [2, 2, 4, 4]


@pytest.mark.parametrize("name", available_providers())
def test_a_group_that_reaches_beyond_the_first_search_stays_whole(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbors, "_first_radius", lambda density, k, cutoff: 2.0)
    x = np.array([0.0, 1.9, -2.1, 4.5])
    structure = Structure(x[:, None] * [[1.0, 0, 0]], np.full(4, 13), np.eye(3) * 10, np.zeros(3, bool))
    table = nearest_table(structure, zeros(structure), 1, 9.0, tie_tolerance=0.3, provider=name)
    np.testing.assert_allclose(table.distances[: table.start[1]], [1.9, 2.1])


def test_flat_and_nearly_flat_sets_of_atoms() -> None:
    x, y = np.meshgrid(np.arange(4.0), np.arange(3.0))
    for thickness in (0.0, 1e-300, 1e-13, 1e-5):
        z = thickness * (np.arange(12) % 2)
        positions = np.column_stack([x.ravel(), y.ravel(), z])
        structure = Structure(positions, np.full(12, 13), np.eye(3) * 10, np.zeros(3, bool))
        table = nearest_table(structure, zeros(structure), 2, 9.0)
        assert_same_rows(table_rows(table), oracle_table(structure, zeros(structure), 2, 9.0, 1e-5))


def test_isolated_atom_dimer_and_no_neighbours_wanted() -> None:
    free = np.zeros(3, bool)
    atom = Structure(np.zeros((1, 3)), np.array([13]), np.eye(3) * 5, free)
    assert len(nearest_table(atom, zeros(atom), 3, 9.0).distances) == 0
    dimer = Structure(np.array([[0.0, 0, 0], [0, 0, 2.5]]), np.full(2, 13), np.eye(3) * 5, free)
    table = nearest_table(dimer, zeros(dimer), 3, 9.0)
    np.testing.assert_array_equal(table.start, [0, 1, 2])
    np.testing.assert_allclose(table.vectors, [[0, 0, 2.5], [0, 0, -2.5]])
    assert len(nearest_table(dimer, zeros(dimer), 3, 2.4).distances) == 0
    assert len(nearest_table(dimer, np.array([0, 1]), 3, 9.0).distances) == 0
    assert len(nearest_table(dimer, zeros(dimer), 0, 9.0).distances) == 0
    assert len(nearest_table(dimer, np.full(2, -1), 3, 9.0).distances) == 0


def test_own_images_of_one_atom_in_a_small_cell() -> None:
    atom = Structure(np.array([[0.3, 7.0, -4.0]]), np.array([13]), np.diag([2.0, 2.5, 20.0]), np.ones(3, bool))
    table = nearest_table(atom, zeros(atom), 6, 9.0)
    np.testing.assert_allclose(table.distances, [2.0, 2.0, 2.5, 2.5] + [np.hypot(2.0, 2.5)] * 4)


def test_search_grows_where_atoms_are_sparse_and_bins_shrink_where_they_are_dense() -> None:
    # A dense cluster, atoms 8.5 angstrom apart, and a huge cell around them.
    rng = np.random.default_rng(3)
    cluster = crystal("Al", 6).positions + rng.normal(0, 0.1, (864, 3))
    lonely = np.array([[600.0, 600, 600], [608.5, 600, 600], [600, 608.5, 600], [100.0, 900, 5]])
    positions = np.concatenate([cluster, lonely])
    for pbc in (np.ones(3, bool), np.zeros(3, bool)):
        structure = Structure(positions, np.full(len(positions), 13), np.eye(3) * 1000, pbc)
        table = nearest_table(structure, zeros(structure), 3, 9.0)
        assert list(np.diff(table.start)[-4:]) == [2, 1, 1, 0]
        expected, _ = cKDTree(positions).query(positions[:864], k=4)
        rows = table.distances[: table.start[864]].reshape(864, 3)
        np.testing.assert_allclose(rows, expected[:, 1:], atol=1e-10)


def test_bins_follow_the_atoms_not_the_box() -> None:
    for edge in (25.0, 1000.0):
        structure = Structure(crystal("Al", 6).positions, np.full(864, 13), np.eye(3) * edge, np.ones(3, bool))
        cells, _ = _neighbor_providers.cell_list(structure)
        assert len(cells.bin_start) <= 2**21 + 1
        assert np.diff(cells.bin_start).max() <= 32


def test_many_atoms_against_a_periodic_tree() -> None:
    rng = np.random.default_rng(5)
    edges = np.array([31.0, 40.0, 52.0])
    positions = rng.uniform(0, 1, (4000, 3)) * edges
    structure = Structure(positions, np.full(4000, 13), np.diag(edges), np.ones(3, bool))
    species = rng.integers(0, 2, 4000)
    table = nearest_table(structure, species, 5, 9.0, tie_tolerance=0.0)
    for kind in (0, 1):
        members = np.flatnonzero(species == kind)
        expected, _ = cKDTree(positions[members], boxsize=edges).query(positions[members], k=6)
        rows = np.array([table.distances[table.start[atom] : table.start[atom + 1]] for atom in members])
        np.testing.assert_allclose(rows, expected[:, 1:], atol=1e-10)


@pytest.mark.parametrize("name", ["Al", "Si", "random"])
def test_table_does_not_depend_on_how_the_structure_is_written(name: str) -> None:
    rng = np.random.default_rng(11)
    start = random_structure(4, 8, (True, True, True), 0.8, False) if name == "random" else crystal(name, 2)
    species = np.arange(len(start)) % 2 if name == "random" else zeros(start)
    rows = table_rows(nearest_table(start, species, 3, 9.0))

    order = rng.permutation(len(start))
    assert (order != np.arange(len(order))).any()
    permuted = Structure(start.positions[order], start.numbers[order], start.cell, start.pbc)
    assert_same_rows(table_rows(nearest_table(permuted, species[order], 3, 9.0)), [rows[atom] for atom in order], 1e-8)

    turn = Rotation.random(random_state=2).as_matrix()
    assert np.abs(turn - np.eye(3)).max() > 0.1
    turned = Structure(start.positions @ turn, start.numbers, start.cell @ turn, start.pbc)
    assert_same_rows(table_rows(nearest_table(turned, species, 3, 9.0)), [row @ turn for row in rows], 1e-8)

    moves = rng.integers(-4, 5, (len(start), 3))
    assert moves.any()
    drift = rng.uniform(-9, 9, 3)
    moved = Structure(start.positions + moves @ start.cell + drift, start.numbers, start.cell, start.pbc)
    assert_same_rows(table_rows(nearest_table(moved, species, 3, 9.0)), rows, 1e-8)

    other_basis = np.array([[1, 0, 0], [4, 1, 0], [-3, 3, -1]]) @ start.cell
    sheared = Structure(start.positions, start.numbers, other_basis, start.pbc)
    assert_same_rows(table_rows(nearest_table(sheared, species, 3, 9.0)), rows, 1e-8)


def test_result_does_not_depend_on_threads() -> None:
    import numba

    structure = random_structure(1, 700, (True, False, True), 0.5, True)
    results = []
    threads = numba.get_num_threads()
    try:
        for n in {1, threads}:
            numba.set_num_threads(n)
            results.append(nearest_table(structure, zeros(structure), 4, 9.0).vectors.tobytes())
    finally:
        numba.set_num_threads(threads)
    assert len(set(results)) == 1
