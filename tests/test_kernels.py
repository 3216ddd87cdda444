"""Cell lists, batches and sorting networks, each against the plain way."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurho.kernels.batches import LANES, grid_batches, grid_shape, point_batches
from gpurho.kernels.celllist import atoms_around, bin_atoms, species_cells
from gpurho.kernels.network import MAX_INPUTS, SIZES, merge_exchange, networks, prune
from gpurho.kernels.scalar_product import pack_neighbors


@pytest.mark.parametrize("n", [1, 2, 3, 7, 12])
def test_merge_exchange_sorts_every_input_of_zeros_and_ones(n):
    """By the zero-one principle it then sorts every input."""
    for bits in itertools.product((0, 1), repeat=n):
        values = list(bits)
        for i, j in merge_exchange(n):
            if values[i] > values[j]:
                values[i], values[j] = values[j], values[i]
        assert values == sorted(bits)


def test_pruned_networks_give_the_smallest_in_order():
    size_index, start, comparators = networks(60)
    rng = np.random.default_rng(0)
    for n in (60, 97, 130, MAX_INPUTS):
        network = size_index[n]
        assert SIZES[network] >= n
        values = rng.integers(0, 1000, (200, SIZES[network]))
        expected = np.sort(values, axis=1)[:, :60]
        for i, j in comparators[start[network] : start[network + 1]]:
            values[:, [i, j]] = np.sort(values[:, [i, j]], axis=1)
        assert np.array_equal(values[:, :60], expected)
    full = merge_exchange(128)
    assert len(prune(full, 60)) < len(full) == len(prune(full, 128))


@given(st.integers(0, 2**32 - 1))
def test_atoms_around_a_box_are_all_the_images_within_reach(seed):
    rng = np.random.default_rng(seed)
    cell = np.eye(3) * rng.uniform(2, 9, 3) + rng.uniform(-3, 3, (3, 3))
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    if heights.min() < 1.0:
        cell = np.eye(3) * 3.0
    pbc = rng.random(3) < 0.7
    positions = rng.uniform(-2, 3, (rng.integers(1, 12), 3)) @ cell
    corners = rng.uniform(-2, 2, (1, 3)) @ cell + rng.uniform(-2, 2, (8, 3))
    reach = rng.uniform(0.5, 6.0)
    bins = bin_atoms(positions, cell, pbc, bin_width=rng.uniform(1.0, 6.0))
    found, owners = atoms_around(bins, corners, reach)
    spans = [range(-14, 15) if p else [0] for p in pbc]
    shifts = np.array(list(itertools.product(*spans)), float) @ cell
    images = positions[None] + shifts[:, None]
    # Within reach of some corner is within reach of the hull.
    near = (np.linalg.norm(images[:, :, None] - corners, axis=-1) <= reach).any(axis=-1)
    expected = {(int(a), *np.round(images[s, a], 6)) for s, a in zip(*np.nonzero(near), strict=True)}
    got = [(int(a), *np.round(p, 6)) for a, p in zip(owners, found, strict=True)]
    assert len(got) == len(set(got)), "an image came twice"
    missing = [e for e in expected if not any(g[0] == e[0] and np.allclose(g[1:], e[1:], atol=2e-6) for g in got)]
    assert not missing


def test_species_cells_hold_every_atom_in_its_cell():
    rng = np.random.default_rng(1)
    positions = rng.uniform(-7, 20, (300, 3))
    species = rng.integers(0, 3, 300).astype(np.int32)
    cells = species_cells(positions, np.arange(300, dtype=np.int32), species, 3)
    seen = []
    for s in range(3):
        for c in range(len(cells.start[s]) - 1):
            for a in range(cells.start[s, c], cells.start[s, c + 1]):
                index = np.minimum(((cells.positions[a] - cells.origin) / cells.edge).astype(int), cells.shape - 1)
                assert (index[0] * cells.shape[1] + index[1]) * cells.shape[2] + index[2] == c
                assert species[cells.owners[a]] == s
                assert np.array_equal(positions[cells.owners[a]], cells.positions[a])
                seen.append(int(cells.owners[a]))
    assert sorted(seen) == list(range(300))


@pytest.mark.parametrize("shape", [(1, 1, 1), (8, 8, 8), (5, 9, 64), (64, 2, 13)])
def test_grid_batches_are_bricks_that_cover_the_box_once(shape):
    batches = grid_batches(shape)
    assert np.array_equal(np.sort(batches.order), np.arange(np.prod(shape)))
    assert batches.start[-1] == len(batches.order)
    assert batches.block_start[-1] == len(batches.start) - 1
    index = np.stack(np.unravel_index(batches.order, shape), 1)
    for a, b in itertools.pairwise(batches.start):
        assert 0 < b - a <= LANES
        assert np.all(index[a:b] // 4 == index[a] // 4)
    for a, b in itertools.pairwise(batches.block_start):
        rows = index[batches.start[a] : batches.start[b]]
        assert np.all(rows // 8 == rows[0] // 8)


@given(st.integers(0, 400), st.floats(0.01, 30))
def test_point_batches_cover_the_points_once(n, spread):
    points = np.random.default_rng(n).normal(0, spread, (n, 3))
    batches = point_batches(points)
    assert np.array_equal(np.sort(batches.order), np.arange(n))
    assert np.all(np.diff(batches.start) <= LANES)
    assert len(batches.block_start) == 1 or batches.block_start[-1] == len(batches.start) - 1


@given(st.integers(0, 2**32 - 1))
def test_points_of_a_grid_are_recognised_and_others_are_not(seed):
    rng = np.random.default_rng(seed)
    shape = tuple(int(n) for n in rng.integers(2, 9, 3))
    steps = rng.normal(0, 0.3, (3, 3))
    index = np.stack(np.meshgrid(*(np.arange(n) for n in shape), indexing="ij"), -1).reshape(-1, 3)
    points = rng.normal(0, 5, 3) + index @ steps
    assert grid_shape(points) == shape
    assert np.array_equal(point_batches(points).order, grid_batches(shape).order)
    assert grid_shape(points[: shape[2] * shape[1]]) in {(1, *shape[1:]), None}
    moved = points.copy()
    moved[rng.integers(len(points))] += 1e-3
    assert grid_shape(moved) is None
    assert grid_shape(rng.permutation(points)) is None
    assert grid_shape(points[:-1]) is None


def test_neighbours_that_are_ambiguous_or_missing_are_marked():
    distances = np.array([2.0, 2.5, 2.9, 2.0, 2.000001, 2.9, 2.0, 2.5, 2.5, 2.0])
    start = np.array([0, 3, 6, 9, 10])
    vectors = np.stack([distances, np.zeros(10), np.zeros(10)], 1)
    packed = pack_neighbors(start, vectors, distances, 2)
    assert packed.tied.tolist() == [0, 1, 1, 1]
    assert np.array_equal(packed.bonds[0, :, 0], np.float32([2.0, 2.5]))
