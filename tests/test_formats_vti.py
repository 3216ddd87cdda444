"""VTK images against VTK, PyVista and OVITO, and read back by the library itself."""

from __future__ import annotations

import base64
import re

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

import gpurho._textfields
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import Correction, LazyField
from gpurho.grid import Grid
from gpurho.structure import Structure
from gpurho.views import coarsened, part_of

NAMES = ("mean", "aleatoric", "epistemic")
SHAPE = (12, 10, 17)
CELLS = {
    "triclinic": TRICLINIC,
    "left-handed": TRICLINIC[[1, 0, 2]],
    "orthogonal": np.diag([3.1, 3.6, 4.2]),
    "turned": np.array([[0.0, 3.6, 0.0], [-3.1, 0.0, 0.0], [0.0, 0.0, 4.2]]),
}


def density_of(cell, shape=SHAPE, lazy=False, origin=(0.0, 0.0, 0.0), **more):
    fractions = triclinic_structure().positions @ np.linalg.inv(TRICLINIC)
    structure = Structure(fractions @ cell, np.array([14, 13, 14]), cell, np.array([True, True, True]))
    grid = Grid(shape, cell, origin)
    arrays = [(scale * wave(grid, structure)).astype(np.float32) for scale in (1, 0.1, 0.05)]
    if lazy:
        arrays = [LazyField(a.__getitem__, a.shape, (8, 4, 8)) for a in arrays]
    return Density(grid, structure, *arrays, **more)


@pytest.fixture(params=CELLS)
def density(request):
    return density_of(CELLS[request.param])


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Slabs of a few planes, so that several are written."""
    monkeypatch.setattr(gpurho._textfields, "SLAB_BYTES", 3000)


def vtk_image(path):
    vtk = pytest.importorskip("vtk", exc_type=ImportError)
    reader = vtk.vtkXMLImageDataReader()
    reader.SetFileName(str(path))
    reader.Update()
    assert reader.GetErrorCode() == 0
    return reader.GetOutput()


def vtk_values(image, name, shape=SHAPE):
    from vtk.util.numpy_support import vtk_to_numpy

    return vtk_to_numpy(image.GetPointData().GetArray(name)).reshape(shape[::-1]).transpose(2, 1, 0)


def test_read_by_vtk(density, tmp_path):
    from importlib import import_module

    image = vtk_image(density.write(tmp_path / "rho.vti"))
    vtk = import_module("vtk")
    assert image.GetDimensions() == SHAPE
    assert image.GetPointData().GetNumberOfArrays() == 3
    for name in NAMES:
        np.testing.assert_array_equal(vtk_values(image, name), getattr(density, name))
    array = image.GetPointData().GetArray("epistemic")
    assert array.GetInformation().Get(vtk.vtkDataArray.UNITS_LABEL()).strip() == "e/angstrom^3"
    points = np.array([image.GetPoint(n) for n in range(image.GetNumberOfPoints())])
    want = density.grid.points().reshape(*SHAPE, 3).transpose(2, 1, 0, 3).reshape(-1, 3)
    np.testing.assert_allclose(points, want, atol=1e-12)
    atoms = image.GetFieldData().GetArray("atom_positions")
    found = np.array([atoms.GetTuple(n) for n in range(atoms.GetNumberOfTuples())])
    np.testing.assert_array_equal(found, density.structure.positions)


def test_part_read_by_vtk(density, tmp_path):
    image = vtk_image(part_of(density, ((2, 9), (0, 10), (3, 4))).write(tmp_path / "part.vti"))
    np.testing.assert_allclose(image.GetPoint(0), density.grid.points((2, 0, 3), (3, 1, 4))[0], atol=1e-12)
    np.testing.assert_array_equal(vtk_values(image, "mean", (7, 10, 1)), density.mean[2:9, :, 3:4])


def test_place_found_by_vtk(density, tmp_path):
    """VTK's own search finds a grid point where the grid has it, which a wrong direction would not."""
    image = vtk_image(density.write(tmp_path / "rho.vti"))
    index = (7, 3, 11)
    x = density.grid.points(index, tuple(i + 1 for i in index))[0]
    assert image.FindPoint(x) == index[0] + SHAPE[0] * (index[1] + SHAPE[1] * index[2])


def test_read_by_pyvista(density, tmp_path):
    pyvista = pytest.importorskip("pyvista", exc_type=ImportError)
    image = pyvista.read(density.write(tmp_path / "rho.vti"))
    assert image.dimensions == SHAPE
    for name in NAMES:
        np.testing.assert_array_equal(np.asarray(image[name]).reshape(SHAPE, order="F"), getattr(density, name))
    points = np.asarray(image.points).reshape(*SHAPE, 3, order="F")
    np.testing.assert_allclose(points.reshape(-1, 3), density.grid.points(), atol=1e-6)


def test_read_by_ovito_or_refused(density, tmp_path):
    """OVITO knows no direction matrix: it reads cells along the axes, and refuses others instead of a wrong cell."""
    io = pytest.importorskip("ovito.io", exc_type=ImportError)
    path = density.write(tmp_path / "rho.vti")
    if np.any(density.grid.cell[~np.eye(3, dtype=bool)]):
        with pytest.raises(RuntimeError, match="format"):
            io.import_file(str(path))
        return
    (grid,) = io.import_file(str(path)).compute().grids.values()
    assert tuple(grid.shape) == SHAPE
    for name in NAMES:
        np.testing.assert_array_equal(np.array(grid[name]).reshape(SHAPE, order="F"), getattr(density, name))
    # Points of data at the corners of cells, from the first to the last.
    steps = np.array(SHAPE) - 1
    np.testing.assert_allclose(np.array(grid.domain)[:, :3], (density.grid.steps * steps[:, None]).T, atol=1e-12)


def test_layout(density, tmp_path):
    """By the specification of the format, without VTK."""
    data = density.write(tmp_path / "rho.vti").read_bytes()
    inline = b"Direction" not in data
    assert inline == (not np.any(density.grid.cell[~np.eye(3, dtype=bool)]))
    start = data.index(b'<AppendedData encoding="raw">\n_') + 31 if not inline else 0
    for name in NAMES:
        tag = re.search(rb'<DataArray type="Float32" Name="%s" format="(\w+)"[^>]*>\n([^\n]*)' % name.encode(), data)
        if inline:
            assert tag[1] == b"binary"
            block = base64.b64decode(tag[2], validate=True)
        else:
            assert tag[1] == b"appended"
            block = data[start + int(re.search(rb'offset="(\d+)"', tag[0])[1]) :]
        n = int(np.frombuffer(block[:8], "<u8")[0])
        assert n == 4 * density.grid.n_points
        values = np.frombuffer(block[8 : 8 + n], "<f4").reshape(SHAPE, order="F")
        np.testing.assert_array_equal(values, getattr(density, name))
    assert data.endswith(b"</VTKFile>\n")


@pytest.mark.parametrize("kind", CELLS)
@pytest.mark.parametrize("shape", [SHAPE, (1, 5, 4), (7, 1, 1)])
def test_read_back(tmp_path, kind, shape):
    density = density_of(CELLS[kind], shape, lazy=True, origin=(0.1, -0.2, 0.3))
    with Density.open(density.write(tmp_path / "rho.vti")) as found:
        for name in NAMES:
            np.testing.assert_array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(density, name)))
        assert found.grid.same_as(density.grid)
        assert found.grid.pbc == density.grid.pbc
        np.testing.assert_array_equal(found.structure.positions, density.structure.positions)
        assert found.structure.numbers.tolist() == [14, 13, 14]
        assert isinstance(found.mean, LazyField) == (kind != "orthogonal")
        found.write(tmp_path / "again.vti")
    assert (tmp_path / "again.vti").read_bytes() == (tmp_path / "rho.vti").read_bytes()


def test_conserved_without_sigmas_in_part(tmp_path):
    for kind in ("triclinic", "orthogonal"):
        rho = density_of(CELLS[kind], correction=Correction("uniform", scale=1.25))
        path = part_of(rho, ((2, 9), (0, 10), (3, 4))).write(tmp_path / "part.vti")
        found = Density.open(path)
        np.testing.assert_array_equal(np.asarray(found.mean), np.asarray(rho.mean)[2:9, :, 3:4])
        assert found.grid.pbc == (False, True, False)
        alone = Density(rho.grid, rho.structure, rho.mean)
        assert not Density.open(alone.write(tmp_path / "mean.vti")).uncertain
        small = Density.open(coarsened(rho, (4, 5, 1)).write(tmp_path / "coarse.vti"))
        assert small.electrons == pytest.approx(rho.electrons, rel=1e-6)


def test_damaged_and_foreign_files_are_one_line(density, tmp_path):
    path = density.write(tmp_path / "rho.vti")
    data = path.read_bytes()
    for cut in (0, 30, 300, len(data) // 3, len(data) - 200):
        path.write_bytes(data[:cut])
        with pytest.raises(FormatError) as caught:
            Density.open(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)
    for wrong in (
        data.replace(b'header_type="UInt64"', b'compressor="vtkZLibDataCompressor" header_type="UInt64"'),
        data.replace(b'"ImageData"', b'"RectilinearGrid"'),
        data.replace(b"atom_numbers", b"something"),
        data.replace(b'WholeExtent="0 11', b'WholeExtent="0 12'),
        np.random.default_rng(0).bytes(5000),
    ):
        path.write_bytes(wrong)
        with pytest.raises(FormatError) as caught:
            Density.open(path)
        assert "\n" not in str(caught.value)
