"""Densities on finer grids: against closed forms and Fourier series, across the faces of cells, part by part."""

from __future__ import annotations

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure

from gpurho.cli import main
from gpurho.density import Density
from gpurho.errors import GridError, SettingsError
from gpurho.fields import LazyField
from gpurho.formats import read_density
from gpurho.grid import Grid
from gpurho.refinement import refined, weights
from gpurho.views import part_of

SHAPE = (30, 34, 36)
CELL = TRICLINIC


def field(shape: tuple[int, int, int]) -> np.ndarray:
    """Waves up to a quarter of the coarse grid's sampling rate, none of them along an axis alone."""
    x, y, z = np.meshgrid(*(np.arange(n) / n * 2 * np.pi for n in shape), indexing="ij")
    return 1.5 + np.cos(2 * x - 3 * y + z) + 0.3 * np.sin(7 * z + x + 0.4) + 0.1 * np.cos(6 * x + 8 * y - 2 * z)


@pytest.fixture
def density() -> Density:
    values = field(SHAPE).astype(np.float32)
    sigma = (0.01 + 0.005 * values).astype(np.float32)
    scale = 0.19 / np.linalg.norm(Grid(SHAPE, CELL).steps, axis=1).max()
    structure = triclinic_structure()
    cell = structure.cell * scale
    structure = type(structure)(structure.positions * scale, structure.numbers, cell, structure.pbc)
    return Density(Grid(SHAPE, cell), structure, values, sigma, 2 * sigma)


@pytest.mark.parametrize("grid", [(60, 68, 72), (45, 51, 54), (31, 34, 50)])
def test_waves_come_back(density, grid):
    fine = refined(density, grid=grid)
    assert fine.shape == grid
    assert isinstance(fine.mean, LazyField)
    np.testing.assert_allclose(np.asarray(fine.mean), field(grid), atol=4e-4)
    # The interpolation is a real one: the nearest point of the coarse grid would be off by much more.
    nearest = density.mean[tuple(np.ix_(*(np.arange(m) * n // m for m, n in zip(grid, SHAPE, strict=True))))]
    assert np.abs(nearest - field(grid)).max() > 0.3 or grid == (31, 34, 50)
    np.testing.assert_array_equal(fine.grid.cell, density.grid.cell)
    assert fine.electrons == pytest.approx(density.electrons, rel=1e-6)


def test_points_of_both_grids_keep_their_values(density):
    fine = refined(density, grid=(60, 68, 72))
    np.testing.assert_allclose(np.asarray(fine.mean)[::2, ::2, ::2], density.mean, atol=2e-6)
    np.testing.assert_allclose(np.asarray(fine.epistemic)[::2, ::2, ::2], density.epistemic, atol=1e-8)


def test_sigmas_are_linear_between_points(density):
    fine = np.asarray(refined(density, grid=(60, 34, 36)).aleatoric)
    half = 0.5 * (density.aleatoric + np.roll(density.aleatoric, -1, axis=0))
    np.testing.assert_allclose(fine[1::2], half, rtol=1e-6)
    assert fine.min() >= density.aleatoric.min() * (1 - 1e-6)


def test_parts_are_those_of_the_whole(density):
    fine = refined(density, grid=(150, 68, 72))
    whole = np.asarray(fine.mean)
    for box in (np.s_[3:9, :, 60:72], np.s_[147:150, 0:1, 5:6], np.s_[60:70, 20:33, :]):
        np.testing.assert_allclose(fine.mean[box], whole[box], atol=1e-6)


def test_a_field_smaller_than_the_window_wraps(density):
    cell = np.diag([0.6, 0.8, 1.0])
    small = Density(Grid((4, 5, 6), cell), density.structure, field((4, 5, 6)).astype(np.float32) * 0 + 2.0)
    np.testing.assert_allclose(np.asarray(refined(small, spacing=0.1).mean), 2.0, rtol=1e-6)


def test_rows_of_weights_add_up_to_one():
    first, matrix = weights(10, 40, 77, 31, 8)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-6)
    # Its own loop over points, window and all.
    for row, i in enumerate(range(10, 40)):
        at = i * 31 / 77
        for column in range(matrix.shape[1]):
            x = first + column - at
            inside = abs(x) < 8
            w = np.sinc(x) * np.i0(8.0 * np.sqrt(1 - (x / 8) ** 2)) if inside else 0.0
            assert matrix[row, column] == pytest.approx(w / np.i0(8.0), abs=2e-4)


def test_what_is_refused(density):
    with pytest.raises(SettingsError, match="one of them"):
        refined(density)
    with pytest.raises(SettingsError, match="is coarser than"):
        refined(density, grid=(60, 33, 72))
    with pytest.raises(GridError, match="region"):
        refined(part_of(density, ((0, 10), (0, 10), (0, 10))), spacing=0.1)
    structure = density.structure
    with pytest.raises(SettingsError, match=r"steps of 0\.3\d+ angstrom is too coarse"):
        refined(
            Density(Grid((16, 18, 19), structure.cell), structure, field((16, 18, 19)).astype(np.float32)), spacing=0.1
        )


def test_command_line(density, tmp_path, capsys):
    density.write(tmp_path / "rho.h5")
    command = ["convert", str(tmp_path / "rho.h5"), str(tmp_path / "fine.h5"), "--spacing", "0.12"]
    assert main(command) == 0
    with read_density(tmp_path / "fine.h5") as fine, read_density(tmp_path / "rho.h5") as stored:
        assert max(np.linalg.norm(fine.grid.steps, axis=1)) <= 0.12
        np.testing.assert_array_equal(np.asarray(fine.mean), np.asarray(refined(stored, spacing=0.12).mean))
        assert fine.uncertain
    assert main([*command[:2], str(tmp_path / "a.xyz"), "--spacing", "0.1"]) == 1
    assert "leave out region, coarse and spacing" in capsys.readouterr().err
