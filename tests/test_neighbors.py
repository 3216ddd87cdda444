"""The neighbour graph and the table of nearest atoms, against a float64 search over explicit images."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator
from itertools import product

import numpy as np
import pytest
from ase.build import bulk
from ase.neighborlist import neighbor_list
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from gpurho import _neighbor_providers, neighbors
from gpurho.errors import DeviceError, MissingDependencyError, NeighborOverflowError, SettingsError
from gpurho.neighbors import (
    NeighborGraph,
    NeighborTable,
    available_providers,
    nearest_table,
    radius_graph,
)
from gpurho.structure import Structure, cell_heights

REQUIRED = os.environ.get("GPURHO_REQUIRE_PROVIDER", "").split(",")
"""Providers that must be there: their tests fail, instead of being skipped, where they are not."""

OUTSIDE = ("torch-cluster", "pyg-lib", "mock of pyg-lib")

Rows = list[NDArray[np.float64]]


# --- oracle ---------------------------------------------------------------------------------------------


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


# --- the table of nearest atoms -------------------------------------------------------------------------


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


# --- the graph, by every provider -----------------------------------------------------------------------


def mock_pyg_lib() -> types.ModuleType:
    """A stand-in with pyg-lib's interface: no periodicity, distances below r, cut off in silence by index."""
    import torch

    def radius(x, y, r=1.0, ptr_x=None, ptr_y=None, max_num_neighbors=32, num_workers=1, ignore_same_index=False):
        close = torch.cdist(y, x, compute_mode="donot_use_mm_for_euclid_dist") < r
        close &= torch.cumsum(close, dim=1) <= max_num_neighbors
        return close.nonzero().T

    module = types.ModuleType("pyg_lib")
    module.ops = types.SimpleNamespace(radius=radius)  # type: ignore[attr-defined]
    return module


@pytest.fixture(params=["gpurho", *OUTSIDE])
def provider(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each provider; those that are not installed are skipped, or fail where they are required."""
    name: str = request.param
    with pytest.MonkeyPatch.context() as patch:
        if name == "mock of pyg-lib":
            patch.setitem(sys.modules, "pyg_lib", mock_pyg_lib())
            name = "pyg-lib"
        if name not in available_providers():
            message = f"{name} is not installed"
            if name in REQUIRED:
                pytest.fail(message + ", but required")
            pytest.skip(message)
        yield name


def assert_canonical(graph: NeighborGraph) -> None:
    keys = (*graph.shifts.T[::-1], graph.senders, graph.distances, graph.receivers)
    np.testing.assert_array_equal(np.lexsort(keys), np.arange(len(graph.senders)))


def assert_graph(graph: NeighborGraph, structure: Structure, cutoff: float) -> None:
    pairs, vectors = oracle_pairs(structure, cutoff)
    ours = np.column_stack([graph.receivers, graph.senders, graph.shifts])
    order, ours_order = np.lexsort(pairs.T), np.lexsort(ours.T)
    np.testing.assert_array_equal(ours[ours_order], pairs[order])
    np.testing.assert_allclose(graph.vectors[ours_order], vectors[order], atol=1e-9)
    np.testing.assert_allclose(graph.distances, np.linalg.norm(graph.vectors, axis=1), rtol=1e-13)
    assert_canonical(graph)


@pytest.mark.parametrize("seed", range(12))
def test_graph_against_all_images(provider: str, seed: int) -> None:
    pbc = tuple(bool(seed >> axis & 1) for axis in range(3))
    structure = random_structure(seed, 1 + seed % 6, pbc, [0.0, 2.5][seed % 2], seed % 3 == 0)
    for cutoff in (2.0, 5.0):
        assert_graph(radius_graph(structure, cutoff, provider=provider), structure, cutoff)


def test_graph_of_crystals_and_coincident_atoms(provider: str) -> None:
    for name, cutoff in (("Al", 9.1), ("Fe", 5.0), ("Si", 6.0)):
        structure = crystal(name)
        assert_graph(radius_graph(structure, cutoff, provider=provider), structure, cutoff)
    twice = Structure(np.zeros((2, 3)), np.full(2, 13), np.diag([3.0, 4.0, 5.0]), np.ones(3, bool))
    graph = radius_graph(twice, 3.5, provider=provider)
    assert_graph(graph, twice, 3.5)
    assert (graph.distances == 0).sum() == 2
    alone = Structure(np.zeros((1, 3)), np.array([13]), np.eye(3), np.zeros(3, bool))
    assert len(radius_graph(alone, 9.0, provider=provider).senders) == 0


def test_cutoff_on_a_shell_counts_the_shell_for_every_provider(provider: str) -> None:
    cell = np.diag([2.0, 2.0, 2.0])
    structure = Structure(np.zeros((1, 3)), np.array([13]), cell, np.ones(3, bool))
    assert len(radius_graph(structure, 2.0, provider=provider).senders) == 6
    assert len(radius_graph(structure, 2.0 - 5e-7, provider=provider).senders) == 0


def test_providers_agree_bit_for_bit(provider: str) -> None:
    for structure in (crystal("Al", 3), random_structure(8, 60, (True, True, False), 1.0, False)):
        ours = radius_graph(structure, 4.5, provider="gpurho")
        theirs = radius_graph(structure, 4.5, provider=provider)
        for name in ("receivers", "senders", "shifts", "vectors", "distances"):
            np.testing.assert_array_equal(getattr(theirs, name), getattr(ours, name), err_msg=name)
        assert len(ours.senders) > 100


def test_providers_give_the_same_table(provider: str) -> None:
    lonely = np.array([[0.0, 0, 0], [7.9, 0, 0], [0, 40.0, 0]])
    sparse = Structure(lonely, np.full(3, 13), np.eye(3) * 80, np.ones(3, bool))
    for structure in (
        crystal("Al"),
        crystal("Si", 2, rotate=3),
        random_structure(9, 50, (True, False, True), 1.0, True),
        sparse,
    ):
        species = np.arange(len(structure)) % 3 - 1 if len(structure) == 50 else zeros(structure)
        for k in (1, 3, 6):
            ours = nearest_table(structure, species, k, 9.0)
            theirs = nearest_table(structure, species, k, 9.0, provider=provider)
            assert_consistent(theirs)
            assert_same_rows(table_rows(theirs), table_rows(ours))


def test_more_neighbours_than_allowed_raise(provider: str) -> None:
    structure = crystal("Al", 2)
    assert len(radius_graph(structure, 3.0, provider=provider, max_neighbors=12).senders) == 12 * len(structure)
    with pytest.raises(NeighborOverflowError, match=r"12 neighbours.*max_neighbors is 11"):
        radius_graph(structure, 3.0, provider=provider, max_neighbors=11)


def test_a_cap_that_is_met_raises(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if provider == "gpurho":
        pytest.skip("has no cap")
    structure = crystal("Al", 2)
    monkeypatch.setattr(_neighbor_providers, "_most_neighbors", lambda cells, radius: 12)
    monkeypatch.setattr(_neighbor_providers, "MARGIN", 0)
    # Twelve neighbours and the atom itself fill a cap of thirteen: nothing shows that none is lost.
    with pytest.raises(NeighborOverflowError, match="met its cap of 13"):
        radius_graph(structure, 3.0, provider=provider)
    with pytest.raises(NeighborOverflowError, match="met its cap of 13"):
        radius_graph(structure, 9.0, provider=provider)
    monkeypatch.setattr(_neighbor_providers, "MARGIN", 1)
    assert len(radius_graph(structure, 3.0, provider=provider).senders) == 12 * len(structure)


def test_graph_against_ase() -> None:
    structure = random_structure(21, 120, (True, True, False), 0.7, False)
    receivers, senders, shifts = neighbor_list("ijS", structure.to_ase(), 3.0)
    graph = radius_graph(structure, 3.0)
    ours = np.column_stack([graph.receivers, graph.senders, graph.shifts])
    theirs = np.column_stack([receivers, senders, shifts])
    np.testing.assert_array_equal(ours[np.lexsort(ours.T)], theirs[np.lexsort(theirs.T)])


# --- refusals -------------------------------------------------------------------------------------------


def test_provider_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    structure = crystal("Al")
    monkeypatch.setitem(sys.modules, "pyg_lib", None)
    monkeypatch.setitem(sys.modules, "torch_cluster", None)
    assert available_providers() == ("gpurho",)
    for name, remedy in (("pyg-lib", "wheel index"), ("torch-cluster", "pip install --no-build-isolation")):
        with pytest.raises(MissingDependencyError, match=remedy):
            radius_graph(structure, 3.0, provider=name)
        with pytest.raises(MissingDependencyError, match=name):
            nearest_table(structure, zeros(structure), 3, 9.0, provider=name)
    assert len(radius_graph(structure, 3.0).senders) == 12


def test_pyg_lib_without_a_radius_search(monkeypatch: pytest.MonkeyPatch) -> None:
    old = types.ModuleType("pyg_lib")
    old.ops = types.SimpleNamespace()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyg_lib", old)
    with pytest.raises(MissingDependencyError, match=r"pyg-lib 0\.7 or newer"):
        radius_graph(crystal("Al"), 3.0, provider="pyg-lib")


def test_bad_arguments() -> None:
    structure = crystal("Al")
    with pytest.raises(SettingsError, match="cutoff is -1"):
        radius_graph(structure, -1.0)
    with pytest.raises(SettingsError, match="'cell-list'"):
        radius_graph(structure, 3.0, provider="cell-list")
    with pytest.raises(SettingsError, match="max_neighbors is -2"):
        radius_graph(structure, 3.0, max_neighbors=-2)
    with pytest.raises(DeviceError, match="'tpu'"):
        radius_graph(structure, 3.0, device="tpu")
    with pytest.raises(DeviceError, match="runs on the CPU"):
        radius_graph(structure, 3.0, device="cuda", provider="gpurho")
    with pytest.raises(SettingsError, match="species_index has shape"):
        nearest_table(structure, np.zeros(2, int), 3, 9.0)
    with pytest.raises(SettingsError, match="species_index"):
        nearest_table(structure, np.zeros(1), 3, 9.0)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="k is -3"):
        nearest_table(structure, zeros(structure), -3, 9.0)
    with pytest.raises(SettingsError, match="cutoff is nan"):
        nearest_table(structure, zeros(structure), 3, float("nan"))
    with pytest.raises(SettingsError, match="tie_tolerance is -1"):
        nearest_table(structure, zeros(structure), 3, 9.0, tie_tolerance=-1.0)


@pytest.mark.gpu
def test_torch_cluster_on_the_gpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    if "torch-cluster" not in available_providers():
        pytest.skip("torch-cluster is not installed")
    structure = crystal("Al", 3)
    ours = radius_graph(structure, 4.5)
    theirs = radius_graph(structure, 4.5, provider="torch-cluster", device="cuda")
    np.testing.assert_array_equal(theirs.vectors, ours.vectors)
