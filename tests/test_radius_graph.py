"""The neighbour graph by every provider, against a float64 search over explicit images."""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterator

import numpy as np
import pytest
from ase.neighborlist import neighbor_list
from neighbor_tools import (
    assert_consistent,
    assert_same_rows,
    crystal,
    oracle_pairs,
    random_structure,
    table_rows,
    zeros,
)

from gpurho import _neighbor_providers
from gpurho.errors import DeviceError, MissingDependencyError, NeighborOverflowError, SettingsError
from gpurho.neighbors import (
    NeighborGraph,
    available_providers,
    nearest_table,
    radius_graph,
)
from gpurho.structure import Structure

REQUIRED = os.environ.get("GPURHO_REQUIRE_PROVIDER", "").split(",")
"""Providers that must be there: their tests fail, instead of being skipped, where they are not."""

OUTSIDE = ("torch-cluster", "pyg-lib", "mock of pyg-lib")


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
