"""Grids: where the points are, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from gpurho.errors import GridError
from gpurho.grid import Grid

CELL = np.array([[4.0, 0.3, 0.1], [0.5, 5.0, -0.4], [-0.2, 0.8, 6.0]])
ORIGIN = np.array([1.0, -2.0, 0.5])


def test_points_are_where_they_should_be():
    grid = Grid((3, 4, 5), CELL, ORIGIN)
    points = grid.points().reshape(3, 4, 5, 3)
    for i, j, k in np.ndindex(3, 4, 5):
        want = ORIGIN + i / 3 * CELL[0] + j / 4 * CELL[1] + k / 5 * CELL[2]
        np.testing.assert_allclose(points[i, j, k], want, atol=1e-14)
    assert grid.n_points == 60
    assert grid.volume == pytest.approx(abs(np.linalg.det(CELL)))
    assert grid.dv * 60 == pytest.approx(grid.volume)


def test_a_point_has_the_same_bits_in_every_box():
    grid = Grid((7, 9, 11), CELL, ORIGIN)
    whole = grid.points().reshape(7, 9, 11, 3)
    np.testing.assert_array_equal(grid.points((2, 3, 4), (5, 9, 6)).reshape(3, 6, 2, 3), whole[2:5, 3:9, 4:6])


@pytest.mark.parametrize(
    ("edge", "spacing", "n"),
    [(4.0, 0.5, 8), (4.0, 0.4999, 9), (12.15, 0.05, 243), (1.0, 3.0, 1), (0.3, 0.1, 3), (4.05 * 63, 0.5, 511)],
)
def test_spacing(edge, spacing, n):
    grid = Grid.from_spacing(np.diag([edge, 10.0, 10.0]), spacing)
    assert grid.shape[0] == n
    assert edge / n <= spacing * (1 + 1e-9)


def test_many_points_are_counted_exactly():
    grid = Grid((10**6, 10**6, 10**7), np.eye(3) * 1e5)
    assert grid.n_points == 10**19
    assert len(grid.points((0, 0, 10**7 - 2), (1, 1, 10**7))) == 2


def test_same_as():
    grid = Grid((3, 4, 5), CELL)
    assert grid.same_as(Grid((3, 4, 5), CELL + 1e-12))
    assert not grid.same_as(Grid((3, 4, 6), CELL))
    assert not grid.same_as(Grid((3, 4, 5), CELL, ORIGIN))


@pytest.mark.parametrize(
    "arguments",
    [
        ((0, 1, 1), CELL),
        ((1, 1), CELL),
        ((1.5, 1, 1), CELL),
        ((float("inf"), 1, 1), CELL),
        ((float("nan"), 1, 1), CELL),
        (5, CELL),
        ((2**31, 1, 1), CELL),
        ((1, 1, 1), np.zeros((3, 3))),
        ((1, 1, 1), np.eye(2)),
        ((1, 1, 1), np.full((3, 3), np.nan)),
        ((1, 1, 1), CELL, (0, 0)),
        ((1, 1, 1), CELL, (0, 0, np.inf)),
        ((1, 1, 1), CELL, (0, 0, 0), (True,)),
    ],
)
def test_refusals(arguments):
    with pytest.raises(GridError) as caught:
        Grid(*arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spacing", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_spacings_that_cannot_be(spacing):
    with pytest.raises(GridError, match="spacing"):
        Grid.from_spacing(CELL, spacing)
