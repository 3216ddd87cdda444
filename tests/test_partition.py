"""Tiles: every point once, whatever the shapes, and the same tile in a region as in the whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpurho.errors import GridError
from gpurho.grid import Grid
from gpurho.partition import make_tiles

triples = st.tuples(st.integers(1, 13), st.integers(1, 13), st.integers(1, 13))


@given(shape=triples, tile=triples, data=st.data())
def test_tiles_cover_a_region_once(shape, tile, data):
    region = []
    for n in shape:
        low = data.draw(st.integers(0, n - 1))
        region.append((low, data.draw(st.integers(low + 1, n))))
    tiles = make_tiles(Grid(shape, np.eye(3)), tile, region)
    count = np.zeros(shape, dtype=int)
    for number, each in enumerate(tiles):
        assert each.index == number
        assert all(0 < n <= t for n, t in zip(each.shape, tile, strict=True))
        assert all(a // t == (b - 1) // t for a, b, t in zip(each.start, each.stop, tile, strict=True))
        count[each.slices] += 1
    want = np.zeros(shape, dtype=int)
    want[tuple(slice(a, b) for a, b in region)] = 1
    np.testing.assert_array_equal(count, want)
    assert tiles.n_points == want.sum() == sum(each.n_points for each in tiles)


def test_whole_tiles_of_a_region_are_those_of_the_grid():
    grid = Grid((30, 20, 25), np.eye(3))
    whole = {(t.start, t.stop) for t in make_tiles(grid, (8, 8, 8))}
    part = make_tiles(grid, (8, 8, 8), ((8, 24), (8, 20), (16, 25)))
    assert len(part) == 2 * 2 * 2
    assert all((t.start, t.stop) in whole for t in part)


def test_any_tile_in_constant_time_and_memory():
    tiles = make_tiles(Grid((10**6, 10**6, 10**6), np.eye(3) * 100), (10, 10, 10))
    assert len(tiles) == 10**15
    assert tiles[10**15 - 1].stop == (10**6, 10**6, 10**6)
    assert tiles[-1] == tiles[10**15 - 1]
    assert tiles[5:8] == [tiles[5], tiles[6], tiles[7]]
    for index in (10**15, -(10**15) - 1):
        with pytest.raises(IndexError):
            tiles[index]


@pytest.mark.parametrize("tile", [(0, 1, 1), (1, 1), (2.5, 1, 1), 4, (float("inf"), 1, 1), None])
def test_tile_shapes_that_cannot_be(tile):
    with pytest.raises(GridError, match="tile shape"):
        make_tiles(Grid((4, 4, 4), np.eye(3)), tile)


@pytest.mark.parametrize(
    "region",
    [
        ((0, 5), (0, 4), (0, 4)),
        ((-1, 4), (0, 4), (0, 4)),
        ((2, 2), (0, 4), (0, 4)),
        ((0.5, 4), (0, 4), (0, 4)),
        ((0, 4), (0, 4)),
        (0, 4, 0, 4, 0, 4),
        ((0, 4, 1), (0, 4), (0, 4)),
        7,
    ],
)
def test_regions_that_cannot_be(region):
    with pytest.raises(GridError, match="region"):
        make_tiles(Grid((4, 4, 4), np.eye(3)), (2, 2, 2), region)
