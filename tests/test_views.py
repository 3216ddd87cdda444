"""Regions and block means of a density, and their files, which are written without the whole field in memory."""

from __future__ import annotations

import numpy as np
import pytest
from predict_tools import TRICLINIC, triclinic_structure, wave

import gpurho._textfields
from gpurho.cli import main
from gpurho.density import Density
from gpurho.errors import FormatError, GridError, SettingsError
from gpurho.fields import Correction, LazyField
from gpurho.grid import Grid
from gpurho.pipelines.convert import blocks_of, convert
from gpurho.sections import interpolate
from gpurho.views import coarsened, part_of

SHAPE = (12, 20, 18)
REGION = ((2, 11), (0, 20), (5, 9))


class Counting:
    """An array that counts the points of the largest box read from it, and of all."""

    def __init__(self, values):
        self.values, self.largest, self.read = values, 0, 0

    def __call__(self, box):
        part = self.values[box]
        self.largest, self.read = max(self.largest, part.size), self.read + part.size
        return part


def fields():
    structure = triclinic_structure()
    grid = Grid(SHAPE, TRICLINIC)
    return grid, structure, [(scale * wave(grid, structure)).astype(np.float32) for scale in (1, 0.1, 0.05)]


def lazy_density(**more):
    grid, structure, arrays = fields()
    counters = [Counting(a) for a in arrays]
    # The first chunk is a part of one, as in the file of a region.
    lazies = [LazyField(c, SHAPE, (8, 4, 6), (4, 0, 2)) for c in counters]
    return Density(grid, structure, *lazies, **more), counters


@pytest.fixture(params=["memory", "lazy"])
def density(request):
    if request.param == "lazy":
        return lazy_density()[0]
    grid, structure, arrays = fields()
    return Density(grid, structure, *arrays)


def means(values, factors, root=False):
    """Block means by loops over offsets, float64."""
    i, j, k = factors
    parts = [
        np.asarray(values, np.float64)[a::i, b::j, c::k] ** (2 if root else 1)
        for a in range(i)
        for b in range(j)
        for c in range(k)
    ]
    found = sum(parts) / len(parts)
    return np.sqrt(found) if root else found


def test_part(density):
    part = part_of(density, REGION)
    box = tuple(slice(*pair) for pair in REGION)
    for name in ("mean", "aleatoric", "epistemic"):
        whole = np.asarray(getattr(density, name))
        np.testing.assert_array_equal(np.asarray(getattr(part, name)), whole[box])
        np.testing.assert_array_equal(np.asarray(getattr(part, name)[1:4, 3, -2:]), whole[box][1:4, 3, -2:])
    want = density.grid.points().reshape(*SHAPE, 3)[box].reshape(-1, 3)
    np.testing.assert_allclose(part.grid.points(), want, atol=1e-12)
    assert part.grid.pbc == (False, True, False)
    assert part.electrons == pytest.approx(float(np.asarray(density.mean)[box].sum(dtype=float)) * density.grid.dv)
    inner = part_of(part, ((1, 3), (2, 5), (0, 4)))
    np.testing.assert_array_equal(np.asarray(inner.mean), np.asarray(density.mean)[3:5, 2:5, 5:9])
    # A slice of the part is one of the field: chunks and their phase fit.
    np.testing.assert_array_equal(part.slice(0, 0.0).mean, np.asarray(density.mean)[2, :, 5:9])


@pytest.mark.parametrize("factors", [(2, 2, 2), (4, 2, 3), (3, 5, 9), (1, 1, 1), (12, 20, 18)])
def test_coarse(density, factors):
    small = coarsened(density, factors)
    for name in ("mean", "aleatoric", "epistemic"):
        want = means(getattr(density, name), factors, root=name != "mean")
        np.testing.assert_allclose(np.asarray(getattr(small, name)), want, rtol=1e-6, err_msg=name)
    one = np.asarray(small.mean[tuple(n // 2 for n in small.shape)])
    assert one == np.asarray(small.mean)[tuple(n // 2 for n in small.shape)]
    assert small.electrons == pytest.approx(density.electrons, rel=1e-6)
    # A block's centre is the mean of its points.
    centres = density.grid.points().reshape(*SHAPE, 3)
    want = np.stack([means(centres[..., d], factors) for d in range(3)], -1).reshape(-1, 3)
    np.testing.assert_allclose(small.grid.points(), want, atol=1e-12)


def test_coarse_is_that_of_a_prediction():
    from predict_tools import aluminium, settings, small_model

    from gpurho.pipelines.predict import predict

    options = settings(grid=(16, 12, 8), conserve="uncertainty")
    kept = predict(aluminium(), small_model(), **options, keep=["field", "coarse:4x2x2"])
    small = coarsened(kept, (4, 2, 2))
    assert small.grid.same_as(kept.coarse.grid)
    for name in ("mean", "aleatoric", "epistemic"):
        np.testing.assert_allclose(np.asarray(getattr(small, name)), getattr(kept.coarse, name), rtol=2e-6)
    alone = predict(aluminium(), small_model(), **options, keep="coarse:4x2x2")
    np.testing.assert_array_equal(np.asarray(coarsened(alone, (4, 2, 2)).mean), np.asarray(kept.coarse.mean))
    with pytest.raises(SettingsError, match="keep='field'"):
        coarsened(alone, 2)
    with pytest.raises(SettingsError, match="keep='field'"):
        part_of(alone, ((0, 4), (0, 4), (0, 4)))


def test_conservation_travels(density):
    raw = density.raw_fields()
    for correction in (Correction("uniform", scale=1.25), Correction("uncertainty", shift=3.0)):
        rho = Density(density.grid, density.structure, *raw.values(), correction=correction)
        np.testing.assert_allclose(np.asarray(coarsened(rho, 2).mean), means(rho.mean, (2, 2, 2)), rtol=1e-6)
        np.testing.assert_array_equal(np.asarray(part_of(rho, REGION).mean), np.asarray(rho.mean)[2:11, :, 5:9])
        assert coarsened(rho, 2).electrons == pytest.approx(rho.electrons, rel=1e-6)


@pytest.mark.parametrize("name", ["rho.vti", "rho.cube", "rho.xsf", "rho.h5"])
def test_writing_reads_a_little_at_a_time(tmp_path, monkeypatch, name):
    monkeypatch.setattr(gpurho._textfields, "SLAB_BYTES", 4 * 700)
    rho, counters = lazy_density()
    coarsened(rho, 2).write(tmp_path / name)
    assert counters[0].read >= np.prod(SHAPE)
    for counter in counters:
        # A chunk of the coarse field is made of one chunk of the fine one.
        assert counter.largest <= 8 * 4 * 6
    counters[0].read = 0
    if name in ("rho.vti", "rho.cube"):
        part_of(rho, REGION).write(tmp_path / f"part-{name}")
        assert counters[0].read == 9 * 20 * 4
    with Density.open(tmp_path / name) as found:
        np.testing.assert_allclose(np.asarray(found.mean), means(counters[0].values, (2, 2, 2)), rtol=3e-6)
        np.testing.assert_allclose(found.grid.points(), coarsened(rho, 2).grid.points(), atol=1e-6)


def test_coarse_xsf_lies_where_it_should(tmp_path):
    """Read by ASE: the first point is the centre of the first block."""
    from ase.io.xsf import read_xsf

    rho = lazy_density()[0]
    path = coarsened(rho, (2, 2, 3)).write(tmp_path / "rho.xsf")
    with open(path) as file:
        data, origin, vectors, _ = read_xsf(file, read_data=True)
    np.testing.assert_allclose(data[:-1, :-1, :-1], means(rho.mean, (2, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(origin, np.array([0.5, 0.5, 1.0]) @ rho.grid.steps, atol=1e-9)
    np.testing.assert_allclose(vectors, TRICLINIC, atol=1e-9)


def test_coarse_cube_read_by_ase(tmp_path):
    from ase.io.cube import read_cube

    rho = lazy_density()[0]
    grid = coarsened(rho, (2, 2, 3)).grid
    with open(coarsened(rho, (2, 2, 3)).write(tmp_path / "rho.cube")) as file:
        found = read_cube(file)
    np.testing.assert_allclose(found["data"], means(rho.mean, (2, 2, 3)) * 0.529177210903**3, rtol=3e-6)
    np.testing.assert_allclose(found["origin"], grid.origin, atol=1e-6)
    assert interpolate(np.asarray(rho.mean), rho.grid, rho.structure.positions).shape == (3,)


def test_refusals(density, tmp_path):
    with pytest.raises(GridError, match="4x4x3"):
        coarsened(density, (4, 4, 4))
    for wrong in (0, 65, (2, 2), (2, 2.5, 2)):
        with pytest.raises(SettingsError, match="one or three numbers"):
            coarsened(density, wrong)
    with pytest.raises(GridError, match="leaves the grid"):
        part_of(density, ((0, 13), (0, 20), (0, 18)))
    for name in ("CHGCAR", "rho.dens"):
        with pytest.raises(FormatError, match="coarse"):
            coarsened(density, 2).write(tmp_path / name)
        with pytest.raises(FormatError, match="whole cell"):
            part_of(density, REGION).write(tmp_path / name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(SettingsError, match="'4by4'"):
        blocks_of("4by4")


def test_command(density, tmp_path, capsys):
    source = density.write(tmp_path / "rho.h5")
    target = tmp_path / "rho.vti"
    words = ["--region", "0", "12", "2", "10", "0", "18", "--coarse", "2x4x3"]
    assert main(["convert", str(source), str(target), *words]) == 0
    with Density.open(target) as found:
        want = means(np.asarray(density.mean)[:, 2:10], (2, 4, 3))
        np.testing.assert_allclose(np.asarray(found.mean), want, rtol=1e-6)
    assert main(["convert", str(source), str(tmp_path / "atoms.xyz")]) == 0
    assert (tmp_path / "atoms.xyz").read_text().startswith("3\n")
    assert main(["convert", str(source), str(tmp_path / "x.cube"), "--coarse", "7"]) == 1
    assert "6x5x6" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "CHGCAR")]) == 0
    assert "PAW" in capsys.readouterr().out
    assert "no PAW augmentation" in (tmp_path / "CHGCAR").read_text().splitlines()[0]
    with pytest.raises(SettingsError, match="takes all fields"):
        convert(source, target, "std", overwrite=True)
