"""Density files against independent readers and writers, on a closed form that shows a swap of axes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

import gpurho._textfields
from gpurho.density import Density
from gpurho.errors import FormatError, OutputExistsError
from gpurho.fields import Correction, LazyField
from gpurho.grid import Grid, region_grid
from gpurho.pipelines.convert import convert
from gpurho.units import BOHR


@pytest.fixture(scope="module", params=["memory", "lazy"])
def density(request):
    structure = triclinic_structure()
    grid = Grid((12, 10, 17), TRICLINIC)
    arrays = [(scale * wave(grid, structure)).astype(np.float32) for scale in (1, 0.1, 0.05)]
    if request.param == "lazy":
        arrays = [LazyField(a.__getitem__, a.shape, (8, 4, 8)) for a in arrays]
    return Density(grid, structure, *arrays)


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Slabs of a few planes, so that several are written."""
    monkeypatch.setattr(gpurho._textfields, "SLAB_BYTES", 3000)
    monkeypatch.setattr(gpurho._textfields, "LINES_AT_ONCE", 7)


def test_cube_read_by_ase(density, tmp_path):
    from ase.io.cube import read_cube

    path = density.write(tmp_path / "rho.cube")
    with open(path) as file:
        found = read_cube(file)
    want = np.asarray(density.mean) * BOHR**3
    np.testing.assert_allclose(found["data"], want, rtol=2e-6)
    np.testing.assert_allclose(found["atoms"].positions, density.structure.positions, atol=1e-8)
    np.testing.assert_allclose(found["atoms"].cell.array, TRICLINIC, atol=1e-7)
    assert found["atoms"].numbers.tolist() == [14, 13, 14]


def test_cube_read_by_pymatgen(density, tmp_path):
    from pymatgen.io.common import VolumetricData

    path = density.write(tmp_path / "rho.cube")
    found = VolumetricData.from_cube(str(path))
    want = np.asarray(density.mean) * BOHR**3
    np.testing.assert_allclose(found.data["total"], want, rtol=2e-6)


def test_xsf_read_by_ase_and_pymatgen(density, tmp_path):
    from ase.io.xsf import read_xsf
    from pymatgen.io.xcrysden import XSF

    path = density.write(tmp_path / "rho.xsf")
    with open(path) as file:
        data, origin, vectors, atoms = read_xsf(file, read_data=True)
    want = np.asarray(density.mean)
    assert data.shape == tuple(n + 1 for n in want.shape)
    np.testing.assert_allclose(data[:-1, :-1, :-1], want, rtol=1e-7)
    # The general grid of the format repeats its end points.
    np.testing.assert_array_equal(data[-1], data[0])
    np.testing.assert_array_equal(data[:, -1], data[:, 0])
    np.testing.assert_array_equal(data[:, :, -1], data[:, :, 0])
    np.testing.assert_allclose(vectors, TRICLINIC, atol=1e-12)
    np.testing.assert_allclose(origin, 0)
    np.testing.assert_allclose(atoms.positions, density.structure.positions, atol=1e-11)
    assert atoms.numbers.tolist() == [14, 13, 14]
    crystal = XSF.from_str(path.read_text().split("BEGIN_BLOCK")[0]).structure
    np.testing.assert_allclose(crystal.lattice.matrix, TRICLINIC, atol=1e-12)
    np.testing.assert_allclose(crystal.cart_coords, density.structure.positions, atol=1e-11)


def test_dens_read_by_ase(density, tmp_path):
    from ase.io.cube import read_cube

    path = density.write(tmp_path / "rho.dens")
    with open(path) as file:
        found = read_cube(file)
    np.testing.assert_allclose(found["data"], np.asarray(density.mean) * BOHR**3, rtol=1e-7)
    np.testing.assert_allclose(found["atoms"].positions, density.structure.positions, atol=1e-8)
    # A line holds at most six values, and each row of points along the last axis begins a new one.
    lines = path.read_text().splitlines()
    assert lines[1].startswith("Cell length: ")
    assert lines[1].endswith("boundary condition: P P P.")
    assert [len(line.split()) for line in lines[9:12]] == [6, 6, 5]


def test_chgcar_read_by_ase_and_pymatgen(density, tmp_path):
    from ase.calculators.vasp import VaspChargeDensity
    from pymatgen.io.vasp import Chgcar

    path = density.write(tmp_path / "CHGCAR")
    want = np.asarray(density.mean)
    found = VaspChargeDensity(str(path))
    np.testing.assert_allclose(found.chg[0], want, rtol=1e-6)
    order = np.argsort(density.structure.numbers, kind="stable")
    np.testing.assert_allclose(found.atoms[0].positions, density.structure.positions[order], atol=1e-9)
    assert found.atoms[0].numbers.tolist() == [13, 14, 14]
    other = Chgcar.from_file(str(path))
    np.testing.assert_allclose(other.data["total"] / other.structure.volume, want, rtol=1e-6)
    np.testing.assert_allclose(other.structure.lattice.matrix, TRICLINIC, atol=1e-12)


@pytest.mark.parametrize("name", ["rho.cube", "CHGCAR", "rho.vasp", "rho.h5", "rho.xsf", "rho.dens"])
def test_read_back(density, tmp_path, name):
    path = density.write(tmp_path / name)
    with Density.open(path) as found:
        np.testing.assert_allclose(np.asarray(found.mean), np.asarray(density.mean), rtol=3e-6)
        assert found.grid.same_as(density.grid) or np.allclose(found.grid.cell, density.grid.cell, atol=1e-7)
        order = np.argsort(density.structure.numbers, kind="stable") if "CHG" in name or "vasp" in name else slice(None)
        np.testing.assert_allclose(found.structure.positions, density.structure.positions[order], atol=1e-7)
        assert found.structure.numbers.tolist() == density.structure.numbers[order].tolist()
        assert found.electrons == pytest.approx(density.electrons, rel=1e-6)
        assert found.uncertain == (name == "rho.h5")
        if found.uncertain:
            np.testing.assert_array_equal(np.asarray(found.epistemic), np.asarray(density.epistemic))


def test_foreign_cube_of_ase_is_read(density, tmp_path):
    from ase.io.cube import write_cube

    path = tmp_path / "ase.cube"
    want = np.asarray(density.mean)
    with open(path, "w") as file:
        write_cube(file, density.structure.to_ase(), want * BOHR**3)
    found = Density.open(path)
    np.testing.assert_allclose(found.mean, want, rtol=1e-5)
    np.testing.assert_allclose(found.structure.positions, density.structure.positions, atol=1e-5)


def test_foreign_chgcar_of_pymatgen_is_read(density, tmp_path):
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal
    from pymatgen.io.vasp import Chgcar, Poscar

    crystal = Crystal(
        Lattice(TRICLINIC), ["Al", "Si", "Si"], np.array([[0.6, 0.7, 0.2], [0.1, 0.2, 0.3], [0.4, 0.45, 0.8]])
    )
    want = np.asarray(density.mean)
    Chgcar(Poscar(crystal), {"total": want.astype(float) * density.grid.volume}).write_file(str(tmp_path / "CHGCAR"))
    found = Density.open(tmp_path / "CHGCAR")
    np.testing.assert_allclose(found.mean, want, rtol=1e-6)
    assert found.structure.numbers.tolist() == [13, 14, 14]


def test_other_fields(density, tmp_path):
    for name in ("aleatoric", "epistemic", "std"):
        found = Density.open(density.write(tmp_path / f"{name}.cube", name))
        np.testing.assert_allclose(found.mean, np.asarray(getattr(density, name)), rtol=3e-6)
    with pytest.raises(FormatError, match="'sigma'"):
        density.write(tmp_path / "x.cube", "sigma")
    with pytest.raises(FormatError, match="the only one"):
        Density(density.grid, density.structure, density.mean).write(tmp_path / "x.cube", "std")


def test_conservation_travels(density, tmp_path):
    rho = Density(
        density.grid,
        density.structure,
        density.mean,
        density.aleatoric,
        density.epistemic,
        correction=Correction("uniform", scale=1.25),
    )
    for name in ("rho.cube", "CHGCAR", "rho.h5", "rho.xsf", "rho.dens"):
        with Density.open(rho.write(tmp_path / name)) as found:
            assert found.electrons == pytest.approx(1.25 * density.electrons, rel=1e-6)


def test_region(density, tmp_path):
    region = ((2, 9), (0, 10), (3, 4))
    part = Density(region_grid(density.grid, region), density.structure, np.asarray(density.mean)[2:9, :, 3:4])
    found = Density.open(part.write(tmp_path / "part.cube"))
    np.testing.assert_allclose(found.grid.points(), part.grid.points(), atol=1e-6)
    np.testing.assert_allclose(found.mean, part.mean, rtol=3e-6)
    for name in ("CHGCAR", "part.xsf", "part.dens"):
        with pytest.raises(FormatError, match="whole cell"):
            part.write(tmp_path / name)
        assert not (tmp_path / name).exists()


@pytest.mark.parametrize("name", ["rho.cube", "CHGCAR", "rho.xsf", "rho.dens"])
def test_damaged_files_are_one_line(density, tmp_path, name):
    path = density.write(tmp_path / name)
    text = path.read_text()
    for cut in (0, 10, 60, 200, len(text) // 2, len(text) - 30):
        path.write_text(text[:cut])
        with pytest.raises(FormatError) as caught:
            Density.open(path)
        assert "\n" not in str(caught.value)
    path.write_text(re.sub(r"E([+-])0", r"E\1x", text, count=1))
    with pytest.raises(FormatError):
        Density.open(path)
    with pytest.raises(FormatError, match="check the name"):
        Density.open(tmp_path / f"none-{name}")


def test_names():
    with pytest.raises(FormatError, match=r"rho\.txt"):
        Density.open("rho.txt")


def test_convert(density, tmp_path):
    source = density.write(tmp_path / "rho.h5")
    target = tmp_path / "rho.cube"
    convert(source, target)
    before = target.read_text()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        convert(source, target)
    convert(source, target, "std", overwrite=True)
    assert target.read_text() != before
    convert(target, tmp_path / "CHGCAR")
    found = Density.open(tmp_path / "CHGCAR")
    np.testing.assert_allclose(found.mean, np.asarray(density.std), rtol=1e-5)
