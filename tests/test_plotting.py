"""Planes: the numbers drawn, scales, atoms, and what is refused."""

from __future__ import annotations

import itertools
import sys

import matplotlib
import numpy as np
import pytest
from ase.build import bulk
from matplotlib.contour import ContourSet
from plot_tools import SHAPE, atoms_drawn, drawn, labels, make, meshes, wave_at
from predict_tools import TRICLINIC, wave

from gpurho import plotplanes, plotting
from gpurho.density import Density
from gpurho.errors import FormatError, SettingsError, StoreError
from gpurho.grid import Grid
from gpurho.structure import Structure


@pytest.fixture(scope="module")
def density():
    return make()


@pytest.fixture(scope="module")
def reference(density):
    rng = np.random.default_rng(3)
    values = density.mean + rng.normal(0, 0.003, SHAPE).astype(np.float32)
    return Density(density.grid, density.structure, values)


# -- planes of grid points --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg", "jpg"])
def test_writes_files_and_leaves_no_trace(density, tmp_path, suffix):
    before = dict(matplotlib.rcParams)
    path = tmp_path / f"slice.{suffix}"
    density.plot(path, dpi=60)
    assert path.stat().st_size > 3000
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert dict(matplotlib.rcParams) == before
    assert not sys.modules.get("matplotlib.pyplot") or not sys.modules["matplotlib.pyplot"].get_fignums()
    if suffix in ("svg", "pdf"):
        first = path.read_bytes()
        density.plot(path, dpi=60)
        assert path.read_bytes() == first


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_slice_shows_the_field_from_edge_to_edge(density, axis):
    index = 3
    figure = density.plot(axis=axis, position=index / SHAPE[axis])
    fields = [density.mean, density.aleatoric, density.epistemic]
    first, second = (d for d in range(3) if d != axis)
    n1, n2 = SHAPE[first] + 1, SHAPE[second] + 1
    # In-plane coordinates by hand: x along the first vector, y across it.
    a, b = TRICLINIC[first], TRICLINIC[second]
    e1 = a / np.linalg.norm(a)
    e2 = b - (b @ e1) * e1
    e2 /= np.linalg.norm(e2)
    s, t = np.linspace(0, 1, n1)[:, None, None], np.linspace(0, 1, n2)[None, :, None]
    points = s * a + t * b
    found = meshes(figure)
    assert len(found) == 3
    for mesh, field in zip(found, fields, strict=True):
        plane = np.take(field, index, axis=axis)
        want = np.pad(plane, ((0, 1), (0, 1)), mode="wrap")
        np.testing.assert_allclose(drawn(mesh).reshape(n1, n2), want, rtol=1e-6)
        np.testing.assert_allclose(mesh.get_coordinates()[..., 0], points @ e1, atol=1e-9)
        np.testing.assert_allclose(mesh.get_coordinates()[..., 1], points @ e2, atol=1e-9)
    x, y = points @ e1, points @ e2
    assert found[0].axes.get_xlim() == pytest.approx((x.min(), x.max()))
    assert found[0].axes.get_ylim() == pytest.approx((y.min(), y.max()))


def test_between_planes_and_through_an_atom(density):
    figure = density.plot(position=0.3, fields=("mean",))
    k = 0.3 * SHAPE[2]
    low, part = int(k), k - int(k)
    want = (1 - part) * density.mean[..., low] + part * density.mean[..., low + 1]
    np.testing.assert_allclose(drawn(meshes(figure)[0]).reshape(15, 17)[:-1, :-1], want, rtol=1e-5)
    through = density.plot(atom=0, fields=("mean",))
    np.testing.assert_allclose(drawn(meshes(through)[0]), drawn(meshes(figure)[0]), rtol=1e-5)
    places = atoms_drawn(meshes(through)[0].axes)
    # Atom 0 lies at fractions 0.1, 0.2 of a and b.
    relative = 0.1 * TRICLINIC[0] + 0.2 * TRICLINIC[1]
    e1 = TRICLINIC[0] / np.linalg.norm(TRICLINIC[0])
    want = [relative @ e1, np.sqrt(relative @ relative - (relative @ e1) ** 2)]
    assert np.abs(places - want).sum(axis=1).min() < 1e-9


def test_scales_and_units(density):
    figure = density.plot()
    found = meshes(figure)
    for mesh, top in zip(found, (density.mean, density.aleatoric, density.epistemic), strict=True):
        assert mesh.norm.vmin == 0.0
        assert 0 < mesh.norm.vmax <= top.max()
        assert mesh.norm.vmax == pytest.approx(float(drawn(mesh).max()))
    assert labels(figure) == [
        "density (e/Å$^3$)",
        "aleatoric $\\sigma$ (10$^{-3}$ e/Å$^3$)",
        "epistemic $\\sigma$ (10$^{-3}$ e/Å$^3$)",
    ]
    assert [m.cmap.name for m in found] == [plotting.COLORS[n] for n in ("mean", "aleatoric", "epistemic")]
    # The number at a tick of a scale in thousandths is the value times a thousand.
    figure.draw_without_rendering()
    scale = next(axes for axes in figure.axes if "aleatoric" in axes.get_xlabel())
    ticks = {t.get_text(): x for t, x in zip(scale.get_xticklabels(), scale.get_xticks(), strict=True) if t.get_text()}
    assert all(float(text) == pytest.approx(1000 * value) for text, value in ticks.items())
    same = meshes(density.plot(same_scale=True))
    assert same[1].norm.vmax == same[2].norm.vmax == found[1].norm.vmax
    fixed = meshes(density.plot(limits={"mean": (0.2, 0.35)}, fields=("mean",)))[0]
    assert (fixed.norm.vmin, fixed.norm.vmax) == (0.2, 0.35)
    assert fixed.colorbar.extend == "both"
    negative = Density(density.grid, density.structure, density.mean - np.float32(0.2))
    lowest = float((density.mean - np.float32(0.2))[..., 9].min())
    assert lowest < 0
    assert meshes(negative.plot())[0].norm.vmin == pytest.approx(lowest)


def test_lines_of_equal_density_lie_on_it(density):
    fine = make((40, 44, 48))
    levels = [0.25, 0.3, 0.35]
    figure = fine.plot(contours=levels, position=0.25, fields=("std",))
    panel = meshes(figure)[0].axes
    lines = next(c for c in panel.collections if isinstance(c, ContourSet))
    assert list(lines.levels) == levels
    e1 = TRICLINIC[0] / np.linalg.norm(TRICLINIC[0])
    e2 = TRICLINIC[1] - (TRICLINIC[1] @ e1) * e1
    e2 /= np.linalg.norm(e2)
    for level, path in zip(levels, lines.get_paths(), strict=True):
        points = 0.25 * TRICLINIC[2] + path.vertices @ np.array([e1, e2])
        assert len(points) > 20
        np.testing.assert_allclose(wave_at(points), level, atol=2e-3)
    assert not [c for c in meshes(density.plot(contours=0))[0].axes.collections if isinstance(c, ContourSet)]


def test_wide_planes_are_not_darkened():
    atoms = bulk("Al", "fcc", a=4.05, cubic=True).repeat((40, 40, 1))
    structure = Structure.from_ase(atoms)
    grid = Grid((50, 50, 2), structure.cell)
    wide = Density(grid, structure, wave(grid, structure).astype(np.float32))
    panel = meshes(wide.plot(position=0.0))[0].axes
    assert len(atoms_drawn(panel)) == 0
    assert not [c for c in panel.collections if isinstance(c, ContourSet)]
    asked = meshes(wide.plot(position=0.0, contours=[0.3]))[0].axes
    assert [c for c in asked.collections if isinstance(c, ContourSet)]
    part = meshes(wide.plot(plane=(0, 0, 1), width=20.0))[0].axes
    assert len(atoms_drawn(part)) > 20


def test_a_few_points_do_not_stretch_a_scale(density):
    sigma = density.epistemic.copy()
    sigma[3, 4, 9] = 0.5
    spiked = meshes(Density(density.grid, density.structure, density.mean, density.aleatoric, sigma).plot())
    plane = sigma[:, :, 9]
    assert spiked[2].norm.vmax == pytest.approx(np.quantile(np.pad(plane, ((0, 1), (0, 1)), mode="wrap"), 0.995))
    assert spiked[2].norm.vmax < 0.01
    assert spiked[2].colorbar.extend == "max"
    assert spiked[1].colorbar.extend == "neither"


def test_one_field_and_unknown_ones(density):
    bare = Density(density.grid, density.structure, density.mean)
    assert len(meshes(bare.plot())) == 1
    assert bare.plot().get_figwidth() == plotting.COLUMNS["single"]
    assert len(meshes(density.plot(fields=("mean", "std")))) == 2
    with pytest.raises(SettingsError, match="'std'"):
        bare.plot(fields=("std",))
    with pytest.raises(SettingsError, match="'colour'"):
        density.plot(fields=("colour",))


def test_large_sections_are_thinned(density, monkeypatch):
    monkeypatch.setattr(plotplanes, "MAX_PIXELS", 8)
    section = density.slice(0, 0.0)
    thin = plotplanes.thinned(section)
    step = 2, 3
    for full, part in zip(section.coordinates(), thin.coordinates(), strict=True):
        np.testing.assert_allclose(full[:: step[0], :: step[1]], part, atol=1e-9)
    np.testing.assert_array_equal(section.mean[:: step[0], :: step[1]], thin.mean)
    # Periodic and even: the far edge stands at the end.
    wrapped = plotplanes.thinned(section, (True, True))
    assert wrapped.mean.shape == (9, 7)
    np.testing.assert_array_equal(wrapped.mean[-1], wrapped.mean[0])
    x, y = wrapped.coordinates()
    corner = wrapped.axes @ (TRICLINIC[1] + TRICLINIC[2])
    assert (x[-1, -1], y[-1, -1]) == pytest.approx(tuple(corner))
    # Periodic and odd: the last step would be shorter, so the far edge is left out.
    monkeypatch.setattr(plotplanes, "MAX_PIXELS", 4)
    assert plotplanes.thinned(section, (True, True)).mean.shape == (5, 4)


# -- planes of crystals -----------------------------------------------------------------------------------------------


def plane_points(mesh, cut):
    """Cartesian points of a map from its coordinates."""
    return cut.section.origin + np.asarray(mesh.get_coordinates()) @ cut.section.axes


@pytest.mark.parametrize("indices", [(1, 1, 0), (1, 1, -1), (0, 0, 1), (2, -1, 3)])
def test_miller_planes_of_a_triclinic_cell(indices):
    fine = make((40, 44, 48))
    figure = fine.plot(plane=indices, fields=("mean",))
    cut = plotplanes.choose_cut(fine, plane=indices)
    mesh = meshes(figure)[0]
    points = plane_points(mesh, cut)
    # h x + k y + l z is the same everywhere, that of the centre.
    constant = points @ np.linalg.inv(TRICLINIC) @ np.array(indices, float)
    np.testing.assert_allclose(constant, 0.5 * sum(indices), atol=1e-9)
    assert np.ptp(points.reshape(-1, 3), axis=0).max() > 1
    np.testing.assert_allclose(drawn(mesh).reshape(points.shape[:2]), wave_at(points), atol=2e-3)
    shifted = plotplanes.choose_cut(fine, plane=indices, position=0.3)
    assert shifted.section.origin @ np.linalg.inv(TRICLINIC) @ np.array(indices, float) == pytest.approx(0.3)
    # The first axis is a lattice direction in the plane.
    axis = cut.section.axes[0] @ np.linalg.inv(TRICLINIC)
    assert abs(axis @ np.array(indices, float)) < 1e-9
    axis /= np.abs(axis)[np.abs(axis) > 1e-9].min()
    np.testing.assert_allclose(axis, np.rint(axis), atol=1e-6)


def fcc(n=2, cubic=True):
    atoms = bulk("Al", "fcc", a=4.05, cubic=cubic).repeat(n)
    structure = Structure.from_ase(atoms)
    grid = Grid((12, 12, 12), structure.cell)
    return Density(grid, structure, np.full((12, 12, 12), 0.2, np.float32))


@pytest.mark.parametrize("cubic", [True, False])
def test_110_of_fcc_holds_its_rectangle_of_atoms(cubic):
    """Rows along [1-10], a / sqrt(2) apart in the row, and rows a apart: whatever cell the crystal is in."""
    density = fcc(3, cubic)
    crystal = (3, 3, 3) if cubic else 4.05 * np.eye(3)
    figure = density.plot(plane=(1, 1, 0), crystal=crystal, atom=5, width=12.0, atoms_within=0.01)
    panel = meshes(figure)[0].axes
    places = atoms_drawn(panel) - 6.0
    assert panel.get_xlabel() == "along $[001]$ (Å)"
    assert panel.get_ylabel() in ("along $[1\\overline{1}0]$ (Å)", "along $[\\overline{1}10]$ (Å)")
    # Around the atom in the middle; half an angstrom beyond the edges, discs may still be seen.
    rows = [(i * 4.05, j * 4.05 / np.sqrt(2)) for i in range(-3, 4) for j in range(-3, 4)]
    want = np.array([p for p in rows if max(map(abs, p)) <= 6.5])
    key = np.lexsort(np.round(places, 6).T), np.lexsort(np.round(want, 6).T)
    np.testing.assert_allclose(places[key[0]], want[key[1]], atol=1e-6)
    # Halfway to the next plane of atoms there is none.
    between = density.plot(plane=(1, 1, 0), crystal=crystal, position=0.25, atoms_within=0.5)
    assert len(atoms_drawn(meshes(between)[0].axes)) == 0


def test_atoms_near_by_brute_force(density):
    section = plotplanes.choose_cut(density, plane=(2, 1, -1), width=9.0).section
    places, which, heights = plotplanes.atoms_of(density.structure, section, 0.6)
    shifts = np.array(list(itertools.product(range(-9, 10), repeat=3))) @ TRICLINIC
    images = density.structure.positions[:, None] + shifts[None]
    local = images - section.origin
    far = np.abs(local @ section.normal)
    x, y = local @ section.axes[0], local @ section.axes[1]
    edge = 9.0 + 1e-6
    near = (far <= 0.6) & (x >= -1e-6) & (x <= edge) & (y >= -1e-6) & (y <= edge)
    assert near.sum() > 3
    found = sorted(
        zip(which.tolist(), np.round(places, 6).tolist(), np.round(np.abs(heights), 6).tolist(), strict=True)
    )
    atoms, images_ = np.nonzero(near)
    want = sorted(
        (int(i), [round(float(x[i, j]), 6), round(float(y[i, j]), 6)], round(float(far[i, j]), 6))
        for i, j in zip(atoms, images_, strict=True)
    )
    for ours, theirs in zip(found, want, strict=True):
        assert ours[0] == theirs[0]
        np.testing.assert_allclose([*ours[1], ours[2]], [*theirs[1], theirs[2]], atol=2e-6)
    assert len(plotting.atoms_near(density.structure, section, 0.6)) == len(want)


def test_any_normal_and_beyond_the_field(density):
    figure = density.plot(normal=(1, 2, 0.5), point=(1.0, 1.0, 1.0), width=4.0, fields=("mean",))
    cut = plotplanes.choose_cut(density, normal=(1, 2, 0.5), point=(1.0, 1.0, 1.0), width=4.0)
    points = plane_points(meshes(figure)[0], cut)
    np.testing.assert_allclose((points - 1.0) @ np.array([1, 2, 0.5]), 0, atol=1e-9)
    np.testing.assert_allclose(points.mean(axis=(0, 1)), 1.0, atol=1e-6)
    slab = Density(Grid(SHAPE, TRICLINIC, pbc=(True, True, False)), density.structure, density.mean)
    partly = meshes(slab.plot(normal=(1, 0, 0), width=8.0))[0]
    assert np.isnan(drawn(partly)).any()
    assert np.isfinite(drawn(partly)).any()
    with pytest.raises(SettingsError, match="leaves the field everywhere"):
        slab.plot(normal=(0, 0, 1), point=(0, 0, 30.0))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"plane": (0, 0, 0)}, "three whole Miller indices"),
        ({"plane": (1, 0.5, 0)}, "three whole Miller indices"),
        ({"plane": (1, 0)}, "three whole Miller indices"),
        ({"plane": (1, 1, 0), "normal": (1, 1, 0)}, "exclude each other"),
        ({"plane": (1, 1, 0), "axis": 1}, "axis 1"),
        ({"plane": (1, 1, 0), "crystal": (0, 1, 1)}, "crystal"),
        ({"normal": (0, 0, 0)}, "no direction"),
        ({"normal": (1, 0, 0), "position": 0.5}, "point"),
        ({"plane": (1, 1, 0), "atom": 3}, "atom 3 is not among the 3"),
        ({"plane": (1, 1, 0), "point": (0, 0)}, "three coordinates"),
        ({"plane": (1, 1, 0), "atom": 0, "position": 0.5}, "one of them"),
        ({"width": 4.0}, "plane"),
        ({"axis": 3}, "axis 3"),
        ({"position": 1.5}, "position 1.5"),
        ({"column": "triple"}, "'single', 'double'"),
        ({"limits": {"mean": (1.0, 0.0)}}, "lower and upper end"),
        ({"kind": "movie"}, "'movie'"),
        ({"kind": "error"}, r"'error' needs reference; give plot\(\.\.\., reference=\.\.\.\)"),
        ({"kind": "line"}, r"'line' needs a and b; give plot\(\.\.\., a=\.\.\., b=\.\.\.\)"),
        ({"dpi": 0}, "20 to 2400"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_line(density, tmp_path, options, match):
    with pytest.raises(SettingsError, match=match) as error:
        density.plot(tmp_path / "slice.png", **options)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_names_that_cannot_be_written(density, tmp_path):
    with pytest.raises(FormatError, match=r"\.png"):
        density.plot(tmp_path / "slice.doc")
    with pytest.raises(StoreError, match="cannot be written"):
        density.plot(tmp_path / "no" / "slice.png", dpi=40)
