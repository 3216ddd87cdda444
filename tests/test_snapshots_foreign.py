"""Snapshots of data sets made of density files of other programs."""

from __future__ import annotations

import numpy as np
import pytest
from foreign_texts import SHAPE, TEXTS, VOLUME, closed_form, cube_text
from predict_tools import TRICLINIC, triclinic_structure

from gpurho.datasets import open_dataset, write_dataset
from gpurho.density import Density
from gpurho.errors import DatasetError, FormatError
from gpurho.formats import snapshot_from_density_file
from gpurho.grid import Grid, region_grid
from gpurho.structure import Structure
from gpurho.units import BOHR


@pytest.fixture(scope="module")
def structure():
    return triclinic_structure()


@pytest.fixture(scope="module")
def whole():
    """The closed form with three electrons in the cell."""
    return closed_form() * (3 / (0.3 * VOLUME))


@pytest.mark.parametrize("name", TEXTS)
def test_snapshot(tmp_path, whole, structure, name):
    path = tmp_path / name
    field = whole * BOHR**3 if name == "rho.xsf" else whole
    path.write_text(TEXTS[name](field, structure))
    found = snapshot_from_density_file(path, temperature_K=315.0)
    assert found.electrons == 3
    np.testing.assert_allclose(found.density, whole, rtol=3e-5)
    assert found.meta == {"source": str(path), "temperature_K": 315.0}
    data = write_dataset(tmp_path / "set.h5", [found])
    again = open_dataset(data.path)[0]
    np.testing.assert_array_equal(again.density, found.density)
    assert again.meta["temperature_K"] == 315.0
    np.testing.assert_array_equal(again.structure.positions, found.structure.positions)


def test_snapshot_of_this_librarys_file(tmp_path, whole, structure):
    rho = Density(Grid(SHAPE, TRICLINIC), structure, whole.astype(np.float32))
    rho.write(tmp_path / "rho.h5")
    found = snapshot_from_density_file(tmp_path / "rho.h5")
    np.testing.assert_array_equal(found.density, whole.astype(np.float32))
    part = Density(region_grid(rho.grid, ((0, 3), (0, 5), (0, 7))), structure, whole[:3].astype(np.float32))
    part.write(tmp_path / "part.h5")
    with pytest.raises(FormatError, match="does not match its atoms' cell"):
        snapshot_from_density_file(tmp_path / "part.h5")


def test_snapshot_moves_the_origin(tmp_path, structure):
    """A grid that begins elsewhere: the atoms move with it, and the density at each atom stays what it was."""
    from gpurho.sections import interpolate

    shape, origin = (24, 20, 28), np.array([0.7, -0.4, 1.1])
    grid = Grid(shape, TRICLINIC, origin)
    fractions = (grid.points() @ np.linalg.inv(TRICLINIC)).T * 2 * np.pi
    field = (0.3 + 0.1 * np.cos(fractions[0]) + 0.05 * np.sin(2 * fractions[1] - fractions[2])).reshape(shape)
    field *= 3 / (0.3 * VOLUME)
    path = tmp_path / "rho.cube"
    path.write_text(cube_text(field, structure, head=" ".join(f"{x / BOHR:.8f}" for x in origin)))
    found = snapshot_from_density_file(path)
    np.testing.assert_allclose(found.structure.positions, structure.positions - origin, atol=1e-7)
    s = (structure.positions @ np.linalg.inv(TRICLINIC)).T * 2 * np.pi
    want = (0.3 + 0.1 * np.cos(s[0]) + 0.05 * np.sin(2 * s[1] - s[2])) * 3 / (0.3 * VOLUME)
    at = interpolate(found.density, found.grid, found.structure.positions, 3)
    np.testing.assert_allclose(at, want, rtol=2e-3)
    assert np.ptp(want) > 0.03


def test_snapshot_errors(tmp_path, whole, structure):
    path = tmp_path / "rho.cube"
    path.write_text(cube_text(whole, structure))
    with pytest.raises(DatasetError, match="not the 4"):
        snapshot_from_density_file(path, electrons=4)
    assert snapshot_from_density_file(path, structure=structure).electrons == 3
    stretched = Structure(structure.positions, structure.numbers, TRICLINIC * 1.001, [True] * 3)
    with pytest.raises(FormatError, match="does not match its atoms' cell"):
        snapshot_from_density_file(path, structure=stretched)
    other = Structure(structure.positions, [13, 13, 14], TRICLINIC, [True] * 3)
    with pytest.raises(FormatError, match="other elements"):
        snapshot_from_density_file(path, structure=other)
    path.write_text(cube_text(whole * 1.2, structure))
    with pytest.raises(FormatError, match="no whole number"):
        snapshot_from_density_file(path)
    path.write_text(cube_text(whole * 14, structure))
    with pytest.raises(FormatError, match="unit"):
        snapshot_from_density_file(path)
    # The atoms of a larger cell, folded into that of the grid, meet each other.
    double = Structure(
        np.concatenate([structure.positions, structure.positions + TRICLINIC[0]]),
        [14, 13, 14] * 2,
        TRICLINIC,
        [True] * 3,
    )
    path.write_text(cube_text(whole, double))
    with pytest.raises(FormatError, match="apart"):
        snapshot_from_density_file(path)
