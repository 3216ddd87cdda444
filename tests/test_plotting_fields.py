"""Lines, histograms, errors and calibration: the numbers drawn; legibility of all pictures."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from matplotlib.text import Text
from plot_tools import SHAPE, drawn, labels, make, meshes, wave_at
from predict_tools import TRICLINIC, wave

from gpurho import plotting
from gpurho.density import Density
from gpurho.errors import GridError, SettingsError, StructureError
from gpurho.fields import LazyField
from gpurho.grid import Grid
from gpurho.plothistograms import SIGMAS
from gpurho.plotlines import atoms_along
from gpurho.structure import Structure


@pytest.fixture(scope="module")
def density():
    return make()


@pytest.fixture(scope="module")
def reference(density):
    rng = np.random.default_rng(3)
    values = density.mean + rng.normal(0, 0.003, SHAPE).astype(np.float32)
    return Density(density.grid, density.structure, values)


# -- lines, histograms, errors ----------------------------------------------------------------------------------------


def line_of(panel, label):
    return next(line for line in panel.lines if line.get_label() == label)


def band(panel, gid):
    """Lower and upper edge of a band at its points."""
    found = next(c for c in panel.collections if c.get_gid() == gid)
    vertices = found.get_paths()[0].vertices[:-1]
    half = len(vertices) // 2
    return vertices[1:half], vertices[half + 1 :][::-1]


def test_line_shows_mean_bands_and_reference(density, reference):
    a, b = np.array([0.2, 0.1, 0.3]), np.array([3.0, 4.0, 3.5])
    figure = density.plot(kind="line", a=a, b=b, reference=reference, bound=2.0, atoms_within=1.0)
    upper, lower = figure.axes
    x, y = line_of(upper, "predicted").get_data()
    points = a + np.linspace(0, 1, len(x))[:, None] * (b - a)
    np.testing.assert_allclose(x, np.linspace(0, np.linalg.norm(b - a), len(x)))
    np.testing.assert_allclose(y, wave_at(points), atol=6e-3)
    ours = density.at(points)
    np.testing.assert_allclose(y, ours[0], rtol=1e-6)
    theirs = reference.at(points)[0]
    np.testing.assert_allclose(line_of(upper, "reference").get_ydata(), theirs, rtol=1e-6)
    np.testing.assert_allclose(lower.lines[-1].get_ydata(), theirs - ours[0], atol=1e-6)
    sigma = {"std": np.sqrt(ours[1] ** 2 + ours[2] ** 2), "epistemic": ours[2]}
    for panel, middle in ((upper, ours[0]), (lower, np.zeros_like(ours[0]))):
        for name in ("std", "epistemic"):
            low, high = band(panel, name)
            np.testing.assert_allclose(low[:, 0], x, atol=1e-6)
            np.testing.assert_allclose(low[:, 1], middle - 2 * sigma[name], atol=1e-6)
            np.testing.assert_allclose(high[:, 1], middle + 2 * sigma[name], atol=1e-6)
    names = [t.get_text() for t in upper.get_legend().get_texts()]
    assert names[:4] == ["$\\pm$2 total $\\sigma$", "$\\pm$2 epistemic $\\sigma$", "predicted", "reference"]
    # Atoms along the line, by brute force.
    shifts = np.array(list(itertools.product(range(-3, 4), repeat=3))) @ TRICLINIC
    local = (density.structure.positions[:, None] + shifts).reshape(-1, 3) - a
    unit = (b - a) / np.linalg.norm(b - a)
    along = local @ unit
    off = np.linalg.norm(local - along[:, None] * unit, axis=1)
    want = np.sort(along[(off <= 1.0) & (along >= 0) & (along <= np.linalg.norm(b - a))])
    assert len(want)
    np.testing.assert_allclose(atoms_along(density.structure, a, b, 1.0), want, atol=1e-9)
    np.testing.assert_allclose(line_of(upper, "atoms within 1 Å").get_xdata(), want, atol=1e-9)


def test_line_without_sigmas_and_wrong_lines(density):
    bare = Density(density.grid, density.structure, density.mean)
    assert len(bare.plot(kind="line", a=(0, 0, 0), b=(1, 1, 1)).axes) == 1
    with pytest.raises(SettingsError, match="no length"):
        density.plot(kind="line", a=(1, 1, 1), b=(1, 1, 1))
    with pytest.raises(SettingsError, match="not a vector"):
        density.plot(kind="line", a=(1, 1), b=(1, 1, 1))
    with pytest.raises(SettingsError, match="bound"):
        density.plot(kind="line", a=(0, 0, 0), b=(1, 1, 1), bound=0)


def stairs(panel, gid):
    data = next(p for p in panel.patches if p.get_gid() == gid).get_data()
    return data.values, data.edges


@pytest.mark.parametrize("lazy", [False, True])
def test_histograms_count_every_point_once(density, reference, lazy):
    largest = 0
    if lazy:

        def reader(values):
            def read(box):
                nonlocal largest
                largest = max(largest, values[box].size)
                return values[box]

            return read

        fields = [LazyField(reader(f), SHAPE, (4, 5, 6)) for f in density.raw_fields().values()]
        density = Density(density.grid, density.structure, *fields)
    figure = density.plot(kind="histogram", bins=40, reference=reference)
    left, right = figure.axes
    mean = np.asarray(density.mean, np.float64)
    both = [mean, np.asarray(reference.mean, np.float64)]
    edges = np.linspace(min(f.min() for f in both), max(f.max() for f in both), 41)
    for gid, values in zip(("mean", "reference"), both, strict=True):
        counts, found = stairs(left, gid)
        want = np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
        full = np.flatnonzero(want)
        np.testing.assert_array_equal(counts, want[full[0] : full[-1] + 1])
        np.testing.assert_allclose(found, edges[full[0] : full[-1] + 2])
        assert counts.sum() == np.prod(SHAPE)
    a, e = (np.asarray(f, np.float64) for f in (density.aleatoric, density.epistemic))
    for gid, values in (("std", np.hypot(a, e)), ("aleatoric", a), ("epistemic", e)):
        want = np.histogram(values, SIGMAS)[0]
        counts, _ = stairs(right, gid)
        np.testing.assert_array_equal(counts, want[want.nonzero()[0][0] : want.nonzero()[0][-1] + 1])
    assert left.get_yscale() == right.get_yscale() == right.get_xscale() == "log"
    if lazy:
        assert largest == np.prod(SHAPE)  # `np.asarray` of this test; the picture itself:
        largest = 0
        density.plot(kind="histogram", bins=40)
        assert 0 < largest <= 4 * 5 * 6
        largest = 0
        density.plot(axis=0, position=0.0)
        assert 0 < largest <= SHAPE[1] * SHAPE[2]


def test_histogram_of_kept_counts():
    from predict_tools import aluminium, settings, small_model

    from gpurho.pipelines.predict import predict

    kept = predict(aluminium(), small_model(), **settings(grid=(8, 8, 8), keep="histogram:1.2,60"))
    left, right = kept.plot(kind="histogram").axes
    counts, edges = stairs(left, "mean")
    assert counts.sum() == 512
    np.testing.assert_allclose(np.diff(edges), 0.02)
    assert stairs(right, "std")[0].sum() == 512
    with pytest.raises(SettingsError, match="not kept"):
        kept.plot(plane=(1, 1, 0))


def test_error_map(density, reference):
    figure = density.plot(kind="error", reference=reference, axis=1, position=0.25)
    index = SHAPE[1] // 4
    mean, error, ratio = meshes(figure)
    diff = density.mean[:, index].astype(float) - reference.mean[:, index]
    sigma = np.hypot(density.aleatoric[:, index].astype(float), density.epistemic[:, index])
    n = (SHAPE[0] + 1, SHAPE[2] + 1)
    np.testing.assert_allclose(drawn(mean).reshape(n)[:-1, :-1], density.mean[:, index], rtol=1e-6)
    np.testing.assert_allclose(drawn(error).reshape(n)[:-1, :-1], diff, atol=1e-7)
    np.testing.assert_allclose(drawn(ratio).reshape(n)[:-1, :-1], np.abs(diff) / sigma, rtol=1e-4, atol=1e-5)
    assert error.norm.vmax == -error.norm.vmin == pytest.approx(np.abs(diff).max(), rel=1e-5)
    assert (ratio.norm.vmin, ratio.norm.vmax) == (0.0, 3.0)
    assert labels(figure)[1].startswith("predicted $-$ reference (10$^{-3}$ e/Å$^3$)")
    assert meshes(density.plot(kind="error", reference=reference, limit=0.5))[1].norm.vmax == 0.5
    bare = Density(density.grid, density.structure, density.mean)
    assert len(meshes(bare.plot(kind="error", reference=reference, plane=(1, 1, 0)))) == 2


def test_calibration_of_a_field(density, reference):
    figure = density.plot(kind="calibration", reference=reference)
    error = (density.mean.astype(float) - reference.mean).ravel()
    z = np.abs(error) / np.hypot(density.aleatoric.astype(float), density.epistemic).ravel()
    level, share = line_of(figure.axes[0], "observed").get_data()
    for p, quantile in ((0.5, 0.67448975), (0.9, 1.64485363)):
        assert share[np.argmin(np.abs(level - p))] == pytest.approx((z <= quantile).mean(), abs=2e-3)
    with pytest.raises(SettingsError, match="has none"):
        reference.plot(kind="calibration", reference=density)


def test_references_that_do_not_fit(density, reference):
    def refused(other, error, match):
        for kind, options in (("error", {}), ("line", {"a": (0, 0, 0), "b": (1, 1, 1)}), ("histogram", {})):
            with pytest.raises(error, match=match) as found:
                density.plot(kind=kind, reference=other, **options)
            assert "\n" not in str(found.value)

    coarse = make((12, 16, 18))
    refused(coarse, GridError, "12x16x18 points, the density one of 14x16x18.*--grid 12 16 18")
    stretched = Density(Grid(SHAPE, 1.01 * TRICLINIC), density.structure, density.mean)
    refused(stretched, GridError, "another cell")
    s = density.structure
    moved = Structure(s.positions + np.array([[0, 0, 0], [0, 0.3, 0], [0, 0, 0]]), s.numbers, s.cell, s.pbc)
    refused(Density(density.grid, moved, density.mean), StructureError, "0.3 angstrom")
    other = Structure(s.positions, np.array([14, 14, 14]), s.cell, s.pbc)
    refused(Density(density.grid, other, density.mean), StructureError, "Si3")
    # Another order of the atoms and other images of them are the same structure.
    order = np.array([2, 0, 1])
    shifted = s.positions[order] + np.array([[1, 0, 0], [0, -2, 0], [0, 0, 1]]) @ s.cell + 1e-4
    same = Structure(shifted, s.numbers[order], s.cell, s.pbc)
    density.plot(kind="error", reference=Density(density.grid, same, reference.mean))


# -- legibility -------------------------------------------------------------------------------------------------------


# Three and four panels are for the width of a page.
@pytest.mark.parametrize(
    ("kind", "column"),
    [
        *itertools.product(("slice", "line", "histogram"), ("single", "double")),
        *itertools.product(("error", "calibration"), ("double",)),
    ],
)
def test_type_is_legible_and_nothing_is_cut_off(density, reference, kind, column):
    options = {"slice": {}, "line": {"a": (0, 0, 0), "b": (3, 3, 3)}}.get(kind, {"reference": reference})
    if column == "single" and kind == "slice":
        options = {"fields": ("mean",), "atoms_within": 3.0}
    figure = density.plot(kind=kind, column=column, **options)
    figure.draw_without_rendering()
    width, height = figure.get_size_inches() * figure.dpi
    for text in figure.findobj(Text):
        if text.get_text().strip() and text.get_visible():
            assert text.get_fontsize() >= 7.0, text
            box = text.get_window_extent()
            # Numbers of ticks beyond the limits have no place; matplotlib does not draw them.
            if box.width and not _unseen(figure, text):
                assert box.x0 > -1, text
                assert box.y0 > -1, text
                assert box.x1 < width + 1, text
                assert box.y1 < height + 1, text
    assert figure.get_figwidth() == plotting.COLUMNS[column]


def _unseen(figure, text):
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if text in (tick.label1, tick.label2) and not low <= tick.get_loc() <= high:
                    return True
    return False


def test_flat_planes_stand_one_below_the_other():
    cell = np.diag([20.0, 4.0, 4.0])
    structure = Structure(np.array([[1.0, 1, 2], [12, 3, 2]]), [14, 32], cell, np.array([True] * 3))
    grid = Grid((40, 8, 8), cell)
    mean = wave(grid, structure).astype(np.float32)
    figure = Density(grid, structure, mean, 0.1 * mean, 0.1 * mean).plot()
    boxes = [m.axes.get_position() for m in meshes(figure)]
    assert boxes[0].y0 > boxes[1].y1 > boxes[1].y0 > boxes[2].y1
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["Si", "Ge"]
