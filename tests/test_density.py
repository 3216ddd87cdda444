"""The density field on closed forms: integrals, interpolation, sections, charges of atoms."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho.density import Density
from gpurho.errors import GridError, SettingsError
from gpurho.fields import Correction, LazyField, Totals, blocks, take
from gpurho.grid import Grid, region_grid
from gpurho.structure import Structure


def lazy(array: np.ndarray, chunks=(8, 8, 8), phase=(0, 0, 0)) -> tuple[LazyField, list]:
    """A lazy field over an array, and the list of boxes that were read of it."""
    read: list = []

    def get(box):
        read.append(box)
        return array[box]

    return LazyField(get, array.shape, chunks, phase), read


@pytest.fixture(scope="module")
def fields():
    structure = triclinic_structure()
    grid = Grid((24, 26, 30), TRICLINIC)
    mean = wave(grid, structure).astype(np.float32)
    aleatoric, epistemic = (0.02 + 0.05 * mean).astype(np.float32), (0.01 * (1 + mean**2)).astype(np.float32)
    return grid, structure, mean, aleatoric, epistemic


@pytest.fixture(scope="module")
def pair(fields):
    """The same density in memory and read on demand."""
    grid, structure, *arrays = fields
    return Density(grid, structure, *arrays), Density(grid, structure, *(lazy(a)[0] for a in arrays))


def test_a_field_on_disk_answers_like_an_array(fields):
    array = fields[2]
    field, read = lazy(array, (8, 8, 8), (3, 0, 0))
    for name in ("min", "max", "sum", "mean", "std"):
        assert getattr(field, name)() == pytest.approx(getattr(array.astype(np.float64), name)(), rel=1e-12)
    assert {(box[0].start, box[0].stop) for box in read} == {(0, 5), (5, 13), (13, 21), (21, 24)}
    assert max(np.prod([s.stop - s.start for s in box]) for box in read) == 8**3, "more than a chunk was in memory"
    for mine, true in ((2 * field, 2 * array), (field - array, array - array), (field > 0.3, array > 0.3)):
        np.testing.assert_array_equal(mine, true)
    np.testing.assert_array_equal(np.hypot(field, field), np.hypot(array, array))
    with pytest.raises(AttributeError, match=r"no 'argmax'; read it first: np.asarray\(field\).argmax"):
        field.argmax()
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        field.nonsense  # noqa: B018


def test_integrals(fields, pair):
    grid, _, mean, a, e = fields
    for rho in pair:
        # The waves integrate to zero over the cell, which leaves the constant.
        assert rho.electrons == pytest.approx(0.3 * grid.volume, rel=1e-6)
        want = grid.dv * np.hypot(np.sqrt((a.astype(float) ** 2).sum()), e.sum(dtype=float))
        assert rho.electrons_std == pytest.approx(want, rel=1e-6)
        assert rho.max_std == pytest.approx(np.hypot(a, e).max(), rel=1e-6)
        assert rho.totals.min_mean == mean.min()


def test_interpolation_meets_the_grid(fields, pair):
    grid, _, mean, a, e = fields
    points = grid.points()[::37]
    for rho in pair:
        for order in (1, 3):
            got = rho.at(points, order)
            for value, want in zip(got, (mean, a, e), strict=True):
                np.testing.assert_allclose(value, want.reshape(-1)[::37], atol=1e-6)


def test_interpolation_between_points_and_across_borders(fields, pair):
    grid, *_ = fields
    rng = np.random.default_rng(0)
    points = rng.uniform(-1.5, 2.5, size=(400, 3)) @ grid.cell
    x, y, z = (2 * np.pi * points @ np.linalg.inv(grid.cell)).T
    want = 0.3 + 0.1 * np.cos(x) + 0.05 * np.sin(2 * y) + 0.02 * np.cos(3 * z + 0.4) + 0.03 * np.sin(x + y - z)
    errors = {}
    for order in (1, 3):
        memory, disk = (rho.at(points, order)[0] for rho in pair)
        np.testing.assert_array_equal(memory, disk)
        errors[order] = np.abs(memory - want).max()
    assert errors[1] < 1e-2
    assert errors[3] < 1e-3
    assert errors[3] < 0.3 * errors[1]


def test_lazy_reads_only_what_it_needs(fields):
    grid, structure, mean, *_ = fields
    field, read = lazy(mean)
    rho = Density(grid, structure, field)
    rho.line(grid.cell[0] * 0.1, grid.cell[0] * 0.2, 50)
    assert sum((s.stop - s.start) * (t.stop - t.start) * (u.stop - u.start) for s, t, u in read) < 0.2 * mean.size
    read.clear()
    rho.slice(0, 0.5)
    assert [box[0] for box in read] == [slice(12, 13)]


def test_line(fields, pair):
    a, b = np.array([0.3, 0.1, 0.2]), np.array([5.0, 7.0, -3.0])
    line = pair[0].line(a, b, 31)
    assert line.distance[-1] == pytest.approx(np.linalg.norm(b - a))
    np.testing.assert_allclose(line.points[[0, -1]], [a, b])
    np.testing.assert_array_equal(line.mean, pair[1].line(a, b, 31).mean)
    np.testing.assert_allclose(line.std, np.hypot(line.aleatoric, line.epistemic))
    for bad in ((a, [np.nan, 0, 0], 5), (a, b, 1), ([1, 2], b, 5)):
        with pytest.raises(SettingsError):
            pair[0].line(*bad)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice(fields, pair, axis):
    grid, _, mean, *_ = fields
    n = grid.shape[axis]
    for rho in pair:
        got = rho.slice(axis, 5 / n)
        np.testing.assert_array_equal(got.mean, np.take(mean, 5, axis))
        half = rho.slice(axis, (n - 0.5) / n)
        want = 0.5 * (np.take(mean, n - 1, axis).astype(float) + np.take(mean, 0, axis))
        np.testing.assert_allclose(half.mean, want, rtol=1e-5)
    # In-plane coordinates and the origin give the points of the grid back.
    x, y = got.coordinates()
    points = got.origin + x[..., None] * got.axes[0] + y[..., None] * got.axes[1]
    start, stop = [0, 0, 0], list(grid.shape)
    start[axis], stop[axis] = 5, 6
    np.testing.assert_allclose(points.reshape(-1, 3), grid.points(start, stop), atol=1e-9)
    for bad in ((3, 0.5), (axis, -0.1), (axis, np.nan)):
        with pytest.raises(SettingsError):
            pair[0].slice(*bad)


def test_plane(fields, pair):
    normal, point = np.array([1.0, 2.0, -1.0]), np.array([2.0, 1.0, 3.0])
    plane = pair[0].plane(normal, point, width=4.0, spacing=0.25)
    assert plane.mean.shape == (16, 16)
    assert abs(plane.normal @ normal) == pytest.approx(np.linalg.norm(normal))
    assert plane.u @ plane.v == pytest.approx(0, abs=1e-12)
    middle = plane.origin + 0.5 * (plane.u + plane.v)
    np.testing.assert_allclose(middle, point, atol=1e-12)
    np.testing.assert_allclose(plane.mean[8, 8], pair[0].at(point)[0], rtol=1e-6)
    np.testing.assert_array_equal(plane.mean, pair[1].plane(normal, point, 4.0, 0.25).mean)
    for bad in (([0, 0, 0], point), (normal, point, -1.0), (normal, point, 4.0, 1e-9)):
        with pytest.raises(SettingsError):
            pair[0].plane(*bad)


def test_points_beyond_an_axis_without_period(fields):
    grid, structure, mean, *_ = fields
    open_grid = Grid(grid.shape, grid.cell, pbc=(True, True, False))
    rho = Density(open_grid, structure, mean)
    c = grid.cell[2]
    inside, above, below = rho.at(np.array([0.99 * c, 1.2 * c, -0.2 * c]), order=1)[0]
    assert inside == pytest.approx(mean[0, 0, -1], abs=1e-6)
    assert np.isnan(above)
    assert np.isnan(below)


def test_sigma_stays_positive_beside_sharp_peaks():
    grid = Grid((8, 8, 8), np.eye(3) * 4)
    peak = np.zeros(grid.shape, dtype=np.float32)
    peak[4, 4, 4] = 1
    rho = Density(grid, Structure([[2, 2, 2]], [13], grid.cell, [True] * 3), peak, peak, peak)
    mean, aleatoric, _ = rho.at(grid.points() + 0.21)
    assert mean.min() < 0, "the cubic must swing here, or the check below proves nothing"
    assert aleatoric.min() == 0


def test_per_atom_in_a_perfect_crystal_is_equal():
    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    structure = Structure.from_ase(atoms)
    grid = Grid((16, 16, 16), atoms.cell.array)
    mean = np.full(grid.shape, 12 / grid.volume, dtype=np.float32)
    sigma = np.full(grid.shape, 0.01, dtype=np.float32)
    for field in (mean, lazy(mean)[0]):
        rho = Density(grid, structure, field, *((sigma, sigma) if field is mean else ()))
        charges = rho.per_atom()
        # Points on the faces between atoms are shared, so that symmetry holds to rounding.
        np.testing.assert_allclose(charges.electrons, 3, rtol=1e-6)
        np.testing.assert_allclose(charges.volumes, 16, rtol=1e-9)
    charges = Density(grid, structure, mean, sigma, sigma).per_atom()
    n = 16**3 / 4
    want = 0.01 * grid.dv * np.hypot(n, np.sqrt(n))
    np.testing.assert_allclose(charges.electrons_std, want, rtol=0.1)


def test_per_atom_matches_brute_force(fields, pair):
    grid, structure, mean, *_ = fields
    images = np.array([[i, j, k] for i in range(-3, 4) for j in range(-3, 4) for k in range(-3, 4)]) @ grid.cell
    copies = (structure.positions[:, None] + images).reshape(-1, 3)
    points = grid.points()
    owner = np.concatenate(
        [np.argmin(((p[:, None] - copies) ** 2).sum(-1), axis=1) // len(images) for p in np.array_split(points, 40)]
    )
    want = np.bincount(owner, mean.reshape(-1).astype(float)) * grid.dv
    for rho in pair:
        got = rho.per_atom()
        np.testing.assert_allclose(got.electrons, want, rtol=1e-6)
        assert got.electrons.sum() == pytest.approx(rho.electrons, rel=1e-9)
        assert got.volumes.sum() == pytest.approx(grid.volume)


def test_per_atom_far_from_matter():
    """In vacuum the nearest image may lie farther than the first guess; a lone atom owns everything."""
    structure = Structure([[1, 1, 1], [1.5, 9, 9]], [13, 13], np.diag([3.0, 40.0, 40.0]), [True, True, True])
    grid = Grid((3, 40, 40), structure.cell)
    rho = Density(grid, structure, np.ones(grid.shape, dtype=np.float32))
    shift = np.array([[i, j, k] for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]) @ grid.cell
    d = np.linalg.norm(grid.points()[:, None, None] - structure.positions[:, None] - shift, axis=-1).min(axis=2)
    near, tied = d[:, 0] < d[:, 1] - 1e-9, np.abs(d[:, 0] - d[:, 1]) < 1e-9
    assert rho.per_atom().volumes[0] / grid.dv == pytest.approx(near.sum() + 0.5 * tied.sum())


@pytest.mark.parametrize("kind", ["uniform", "uncertainty"])
def test_correction(fields, kind):
    grid, structure, mean, a, e = fields
    raw = Density(grid, structure, mean, a, e)
    target = 20.0
    correction = Correction.conserving(kind, raw.totals, grid.dv, target)
    for arrays in ((mean, a, e), tuple(lazy(x)[0] for x in (mean, a, e))):
        rho = Density(grid, structure, *arrays, correction=correction)
        assert rho.electrons == pytest.approx(target, rel=1e-12)
        assert np.asarray(rho.mean).sum(dtype=float) * grid.dv == pytest.approx(target, rel=1e-6)
        assert rho.electrons_predicted == pytest.approx(raw.electrons)
        np.testing.assert_array_equal(np.asarray(rho.mean)[3:5, 2], rho.mean[3:5, 2])
    with pytest.raises(SettingsError):
        Correction.conserving("other", raw.totals, grid.dv, target)
    with pytest.raises(SettingsError, match="integrates to"):
        Correction.conserving("uniform", Totals(), grid.dv, target)
    with pytest.raises(SettingsError, match="variance"):
        Correction.conserving("uncertainty", Totals(sum_mean=1.0), grid.dv, target)


def test_totals_merge_in_any_order(fields):
    _, _, mean, a, e = fields
    parts = [Totals.of_block(mean[box], a[box], e[box], {"n_capped": 1}) for box in blocks(mean, (7, 5, 11))]
    merged, reversed_ = Totals.merged(parts), Totals.merged(parts[::-1])
    assert merged == reversed_
    whole = Totals.of_block(mean, a, e)
    assert merged.n_points == whole.n_points
    assert merged.sum_std == pytest.approx(whole.sum_std, rel=1e-12)
    assert (merged.min_mean, merged.max_mean) == (whole.min_mean, whole.max_mean)
    assert merged.n_capped == len(parts)
    assert not Totals.of_block(np.array([1, np.nan], dtype=np.float32)).finite


@pytest.mark.parametrize("phase", [(0, 0, 0), (3, 0, 7)])
def test_blocks_cover_once_and_keep_to_chunks(phase):
    array = np.arange(20 * 9 * 17, dtype=np.float32).reshape(20, 9, 17)
    field, _ = lazy(array, (8, 8, 8), phase)
    count = np.zeros(array.shape, dtype=int)
    for box in blocks(field):
        count[box] += 1
        for s, p in zip(box, phase, strict=True):
            assert (s.start + p) // 8 == (s.stop - 1 + p) // 8
    assert (count == 1).all()
    i, j, k = (np.random.default_rng(0).integers(0, n, size=(50, 2)) for n in array.shape)
    np.testing.assert_array_equal(take(field, i, j, k), array[i, j, k])


def test_region_grid():
    grid = Grid((10, 12, 14), TRICLINIC, (1.0, 2.0, 3.0))
    assert region_grid(grid, None) is grid
    part = region_grid(grid, ((2, 7), (0, 12), (13, 14)))
    np.testing.assert_allclose(part.points(), grid.points((2, 0, 13), (7, 12, 14)), atol=1e-12)
    assert part.pbc == (False, True, False)
    assert part.dv == pytest.approx(grid.dv)


def test_refusals(fields):
    grid, structure, mean, a, _ = fields
    with pytest.raises(SettingsError, match="neither"):
        Density(grid, structure, mean, a)
    with pytest.raises(GridError, match="shape"):
        Density(grid, structure, mean[1:])
    rho = Density(grid, structure, mean)
    assert rho.std is None
    assert rho.electrons_std is None
    assert rho.per_atom().electrons_std is None
    assert rho.line([0, 0, 0], [1, 1, 1], 3).std is None
    with pytest.raises(SettingsError, match="order"):
        rho.at([0, 0, 0], order=2)
