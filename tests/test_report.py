"""Reports: figures, pictures and safety of the page."""

from __future__ import annotations

import base64
import hashlib
import math
import re
from itertools import product

import numpy as np
import pytest
from predict_tools import TRICLINIC, aluminium, triclinic_structure
from report_pages import TAGS, first_number, page_of
from report_tools import HOSTILE, Page, arrays, info, toy

from gpurho.density import Density
from gpurho.fields import LazyField, Totals
from gpurho.grid import Grid
from gpurho.pipelines.report import report
from gpurho.pipelines.reportcard import card_html
from gpurho.pipelines.reportfacts import figure, with_error
from gpurho.pipelines.reportslices import (
    Frames,
    close_up,
    common_scale,
    neighbours,
    plane_normal,
    slice_count,
)
from gpurho.structure import Structure
from gpurho.trust import Trust

# -- figures ----------------------------------------------------------------------------------------------------


def test_totals_are_those_of_the_field(tmp_path):
    _, mean, aleatoric, epistemic = arrays()
    page = page_of(toy(), tmp_path)
    dv = abs(np.linalg.det(TRICLINIC)) / mean.size
    electrons = mean.sum(dtype=float) * dv
    sigma = np.hypot(np.sqrt((aleatoric.astype(float) ** 2).sum()), epistemic.sum(dtype=float)) * dv
    std = np.hypot(aleatoric.astype(float), epistemic)
    value, error = (float(x) for x in page.table["Predicted"].split(" ± "))
    assert value == pytest.approx(electrons, abs=0.051)  # shown to a tenth, two digits of the error bar
    assert error == pytest.approx(sigma, rel=0.05)
    assert page.table["Expected"] == "11"
    assert first_number(page.table["Difference"]) == pytest.approx(electrons - 11, abs=0.06)
    bars = float(re.search(r"\(([\d.]+) error bars", page.table["Difference"])[1])
    assert bars == pytest.approx(abs(electrons - 11) / sigma, rel=0.05)
    for label, want in (
        ("Lowest density", mean.min()),
        ("Highest density", mean.max()),
        ("Sigma of a point, average", std.mean()),
        ("Sigma of a point, largest", std.max()),
        ("Noise of the labels (aleatoric), rms", np.sqrt((aleatoric.astype(float) ** 2).mean())),
        ("Model's ignorance (epistemic), rms", np.sqrt((epistemic.astype(float) ** 2).mean())),
    ):
        assert first_number(page.table[label]) == pytest.approx(float(want), rel=0.005), label
        assert page.table[label].endswith("\N{NO-BREAK SPACE}e/Å³")


def test_what_was_run(tmp_path):
    page = page_of(toy("a model"), tmp_path)
    assert page.table["Formula"] == "AlSi2"
    lengths = np.linalg.norm(TRICLINIC, axis=1)
    assert page.table["Cell edges a, b, c"] == ", ".join(f"{x:.4f}" for x in lengths) + " Å"
    cosine = TRICLINIC[0] @ TRICLINIC[1] / lengths[0] / lengths[1]
    assert page.table["Angles α, β, γ"].endswith(f"{np.degrees(np.arccos(cosine)):.2f}°")
    volume = abs(np.linalg.det(TRICLINIC))
    grams = (26.9815 + 2 * 28.085) * 1.66053907e-24
    assert first_number(page.table["Mass density"]) == pytest.approx(grams / (volume * 1e-24), abs=6e-4)
    assert page.table["Grid"] == "20 × 24 × 28 = 13,440 points"
    assert page.table["Labels"].startswith("engine a model, kpts 2 × 2 × 2")
    assert page.table["Time"] == "75 s, 1,234 points/s"
    assert page.table["L1 error per electron"] == "0.439 %"
    assert "RMS error" not in page.table  # not a number in the file
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 4}
    assert rows["1 sigma"] == ["70.0 %", "68.3 %", "+1.7"]
    assert rows["2 sigma"] == ["94.0 %", "95.4 %", "−1.4"]


def charges_by_hand(grid: Grid, structure: Structure, fields: list[np.ndarray]) -> list[np.ndarray]:
    """Sums of fields over the points nearest to each atom, by trying every atom and image for every point."""
    points = grid.points()
    best, owner = np.full(len(points), np.inf), np.zeros(len(points), dtype=int)
    for i, position in enumerate(structure.positions):
        for shift in product((-2, -1, 0, 1, 2), repeat=3):
            far = np.linalg.norm(points - position - np.array(shift) @ structure.cell, axis=1)
            owner[far < best] = i
            best = np.minimum(best, far)
    return [np.bincount(owner, f.astype(float).ravel(), len(structure)) * grid.dv for f in fields]


def test_atoms_are_ranked_by_their_sigma(tmp_path):
    grid, mean, aleatoric, epistemic = arrays()
    electrons, noise, common = charges_by_hand(
        grid, triclinic_structure(), [mean, aleatoric.astype(float) ** 2, epistemic]
    )
    sigma = np.hypot(np.sqrt(noise * grid.dv), common)
    page = page_of(toy(), tmp_path, atoms=2)
    rows = [row for row in page.rows if len(row) == 8 and row[0] in "12"]
    order = np.argsort(-sigma)[:2]
    symbols = ["Si", "Al", "Si"]
    assert [row[1] for row in rows] == [f"{symbols[i]} {i}" for i in order]
    for row, i in zip(rows, order, strict=True):
        assert float(row[2]) == pytest.approx(sigma[i], rel=0.05)
        assert float(row[3]) == pytest.approx(sigma[i] / np.median(sigma), abs=0.006)
        assert float(row[4]) == pytest.approx(electrons[i], abs=0.6 * 10.0 ** -len(row[4].split(".")[1]))
        assert [float(x) for x in row[5:8]] == pytest.approx(triclinic_structure().positions[i], abs=6e-4)
    assert len([name for name in page.ids if re.fullmatch(r"near-\d-std", name)]) == 2


def test_numbers_for_people():
    numbers = {0.28: "0.280", 0: "0", -0.0045: "−0.00450", 3e-7: "3.00 × 10⁻⁷", 321.0: "321", 4.2e7: "4.20 × 10⁷"}
    assert {x: figure(x) for x in numbers} == numbers
    assert with_error(320.98712, 0.21401) == "320.99 ± 0.21"
    assert with_error(180.6, 180.0) == "181 ± 180"
    assert with_error(-0.5, None) == "−0.5"


# -- pictures ---------------------------------------------------------------------------------------------------


def test_pictures_hold_the_planes_of_the_field(tmp_path):
    _, mean, aleatoric, epistemic = arrays()
    page = page_of(toy(), tmp_path)
    for name, field in (("mean", mean), ("std", np.hypot(aleatoric, epistemic))):
        for axis, letter in enumerate("abc"):
            half, planes = page.planes(f"view-{letter}-{name}")
            n = field.shape[axis]
            assert len(planes) == min(24, n)
            for k, plane in enumerate(planes):
                want = np.take(field, k * n // len(planes), axis=axis)
                assert np.abs(plane - want).max() <= 1.01 * half, (name, letter, k)
    scales = {(v["data-name"], v["data-low"], v["data-high"]) for k, v in page.ids.items() if "data-low" in v}
    assert len(scales) == 2  # one for each quantity, close-ups included


def test_pixels_and_atoms_lie_where_they_are(tmp_path):
    structure = triclinic_structure()
    page = page_of(toy(), tmp_path)
    for axis, view in enumerate(page.data["views"]):
        section = toy().slice(axis, 0.0)
        x, y = section.coordinates()
        a, b, c, d, e, f = view["matrix"]
        n1, n2 = section.mean.shape
        i, j = np.meshgrid(np.arange(n1) + 1.5, np.arange(n2) + 1.5, indexing="ij")
        left, top = view["corner"]
        assert np.allclose((a * i + c * j + e - left) / view["factor"], x, atol=1e-3)
        assert np.allclose((top - b * i - d * j - f) / view["factor"], y, atol=1e-3)
        count = len(view["texts"])
        for k in range(count):
            n = toy().shape[axis]
            origin = (k * n // count) / n * structure.cell[axis]
            want = set()
            for atom, position in enumerate(structure.positions):
                for shift in product((-1, 0, 1), repeat=3):
                    relative = position + np.array(shift) @ structure.cell - origin
                    s = relative @ np.linalg.inv(np.stack([section.u, section.v, section.normal]))
                    if abs(s[2]) <= 0.5 and (s[:2] >= 0).all() and (s[:2] <= 1).all():
                        want.add((*np.round(section.axes @ relative, 1), atom))
            found = {
                (*np.round([(x - left) / view["factor"], (top - y) / view["factor"]], 2), atom)
                for x, y, _, atom in view["atoms"][k]
            }
            for x, y, atom in want:
                assert any(abs(x - p) < 0.08 and abs(y - q) < 0.08 and atom == r for p, q, r in found), (axis, k, atom)


def test_close_up_shows_the_doubt():
    density = toy()
    frames = close_up(density, 1)
    marks = frames.marks[0]
    assert marks[0].atom == 1
    assert (marks[0].x, marks[0].y) == pytest.approx(tuple(0.5 * (frames.u + frames.v)))
    n = len(frames.fields["std"][0])
    want = density.at(density.structure.positions[1])
    assert frames.fields["mean"][0][n // 2, n // 2] == pytest.approx(float(want[0]), abs=1e-5)
    # The plane holds the largest sigma near the atom, but for the steps in which it is looked for.
    offsets = np.random.default_rng(0).uniform(-3, 3, (4000, 3))
    offsets = offsets[np.linalg.norm(offsets, axis=1) < 3]
    most = np.hypot(*density.at(density.structure.positions[1] + offsets)[1:]).max()
    assert frames.fields["std"][0].max() > 0.97 * most


def test_neighbours_against_all_images():
    structure = triclinic_structure()
    vectors, owners = neighbours(structure, 2, 6.2)
    want = sorted(
        (np.linalg.norm(p + np.array(shift) @ structure.cell - structure.positions[2]), i)
        for i, p in enumerate(structure.positions)
        for shift in product(range(-4, 5), repeat=3)
    )
    want = [(d, i) for d, i in want if 1e-6 < d <= 6.2]
    assert np.allclose(np.linalg.norm(vectors, axis=1), [d for d, _ in want])
    assert len(owners) == len(want)
    assert np.allclose(np.abs(plane_normal(np.array([[1, 0, 0], [2.0, 0, 0], [0, 3, 0]]))), [0, 0, 3])


def test_scales():
    def frames(values):
        plane = np.asarray(values, dtype=np.float32).reshape(1, -1)
        return [Frames(0, (0.0,), np.eye(2)[0], np.eye(2)[1], {"mean": [plane], "std": [plane]}, (True, True), [()])]

    smooth = np.linspace(0.1, 0.5, 5000)
    assert common_scale(frames(smooth), "mean").low == 0.0
    assert common_scale(frames(smooth - 0.2), "mean").low == pytest.approx(-0.1)
    assert not common_scale(frames(smooth), "std").log
    spike = common_scale(frames(np.append(smooth, 50.0)), "mean")
    assert spike.clipped
    assert spike.high < 0.51
    wide = common_scale(frames(np.append(np.geomspace(1e-4, 0.2, 5000), np.nan)), "std", 0.15)
    assert wide.log
    assert wide.high == pytest.approx(0.15)
    assert wide.parts(np.array([wide.low, math.sqrt(wide.low * wide.high), 1.0])) == pytest.approx([0, 0.5, 1])


# -- safety and size --------------------------------------------------------------------------------------------


def test_nothing_of_a_file_can_run(tmp_path):
    density = toy(HOSTILE)
    density.trust = Trust.from_parts(
        np.array([0.5, 2.0, 0.7]),
        np.array([0, 2, 0]),
        {"level": "outside", "sentence": HOSTILE, "reasons": []},
    )
    source = tmp_path / "<img src=x onerror=alert(1)>.h5"
    path = report(density, tmp_path / "report.html", file=_touched(source), progress=False)
    page = Page(path.read_text(encoding="utf-8"))
    assert {tag for tag, _ in page.elements} <= TAGS
    assert len(page.scripts) == 2
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (tag, attributes)
        for name in ("src", "href", "data", "action"):
            assert attributes.get(name, "#").startswith(("#", "data:")), (tag, attributes)
    policy = next(v["content"] for tag, v in page.elements if v.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(page.scripts[1].encode()).digest()).decode()
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert HOSTILE in page.table["Elements"] or HOSTILE in page.table["Labels"]  # shown as it is
    assert HOSTILE in page.text


def _touched(path):
    path.touch()
    return path


def test_a_card_is_text():
    html = card_html(
        f"# al: {HOSTILE}\n\n**For** `a<b` {HOSTILE}\n\n| a | b |\n|---|---|\n| 1 | {HOSTILE} |\n\n    code <b>\n"
    )
    page = Page(html)
    assert {tag for tag, _ in page.elements} == {
        "h3",
        "p",
        "strong",
        "code",
        "div",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "pre",
    }
    assert page.rows == [["a", "b"], ["1", HOSTILE]]
    assert "a<b" in page.texts
    assert card_html("```\nx <y>\n```\n") == '<pre tabindex="0"><code>x &lt;y&gt;</code></pre>'
    assert card_html("- one\n  more\n- two") == "<ul><li>one\n  more</li><li>two</li></ul>"


def test_a_large_field_is_read_in_planes_and_the_page_stays_small(tmp_path):
    n = 600
    noise = np.random.default_rng(0).random((n, n)).astype(np.float32)
    read = []

    def get(box):
        shape = [s.stop - s.start for s in box]
        read.append(math.prod(shape))
        assert read[-1] <= n * n, "more than a plane at once"
        return np.resize(noise, math.prod(shape)).reshape(shape)

    structure = Structure(aluminium(2).positions, aluminium(2).numbers, aluminium(2).cell.array, np.ones(3, dtype=bool))
    fields = [LazyField(get, (n, n, n)) for _ in range(3)]
    totals = Totals(n_points=n**3, sum_mean=1.0, sum_std=1.0, max_std=1.5, min_mean=0.0, max_mean=1.0)
    density = Density(Grid((n, n, n), structure.cell), structure, *fields, totals=totals, info=info())
    path = report(density, tmp_path / "r.html", slices=24, progress=False)
    assert path.stat().st_size < 7e6  # noise does not compress: nothing is larger
    page = Page(path.read_text(encoding="utf-8"))
    assert "Not summed over the atoms" in page.text
    assert sum(read) == 3 * 3 * 24 * n * n
    assert "evenly spread ones" in page.text
    _, planes = page.planes("view-c-mean")
    assert planes[0].shape == (160, 160)
    assert [slice_count(x) for x in (1e6, 5e7, 1e9, 1e12)] == [24, 24, 8, 6]
