"""Reports of reductions, of the mean alone, of files of other programs; warnings, refusals, the command."""

from __future__ import annotations

import numpy as np
import pytest
from predict_tools import TRICLINIC, aluminium, settings, small_model, triclinic_structure
from report_pages import page_of
from report_tools import Page, arrays, info, toy

import gpurho
from gpurho.cli import main
from gpurho.density import Density
from gpurho.errors import ModelError, SettingsError, StoreError
from gpurho.fields import Totals
from gpurho.pipelines.report import report
from gpurho.pipelines.reportslices import (
    axis_slices,
)
from gpurho.structure import Structure
from gpurho.trust import KINDS, Trust

# -- what was kept, what is missing -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def predicted():
    """Predictions of the same structure that keep different things."""
    atoms, model = aluminium(), small_model()

    def run(**options):
        return gpurho.predict(atoms, model=model, **settings(grid=(12, 12, 12)) | options)

    return run


def test_reductions_show_what_there_is(predicted, tmp_path):
    page = page_of(predicted(keep=["electrons"]), tmp_path)
    assert "neither the field nor planes" in page.text
    assert "kept no sums of atoms" in page.text
    assert "Predicted" in page.table

    page = page_of(predicted(keep=["slice:z=0.5", "atoms", "histogram"]), tmp_path)
    assert [v["id"] for v in page.data["views"]] == ["view-c"]
    half, planes = page.planes("view-c-mean")
    whole = predicted()
    assert np.abs(planes[0] - np.asarray(whole.mean)[:, :, 6]).max() <= 1.01 * half
    assert "disabled" in page.ids["slice-c"]
    assert len([row for row in page.rows if len(row) == 8]) == 1 + 4
    assert "Histogram of the density" in str(page.elements)

    page = page_of(predicted(keep=["coarse:2"], tile_shape=(4, 4, 4)), tmp_path)
    assert "blocks of 2 × 2 × 2 points" in page.text
    _, planes = page.planes("view-a-mean")
    assert planes[0].shape == (6, 6)


def test_the_mean_alone_and_regions(predicted, tmp_path):
    page = page_of(predicted(uncertainty=None), tmp_path)
    assert not [name for name in page.ids if name.endswith("-std")]
    assert "without error bars" in page.text
    assert "sigmas of atoms are not known" in page.text
    page = page_of(predicted(region=((2, 8), (0, 12), (3, 12))), tmp_path)
    assert page.table["Region"] == "points 2 to 7, 0 to 11, 3 to 11"
    assert "Expected" not in page.table
    assert len(page.planes("view-a-mean")[1]) == 6


def test_warnings(tmp_path):
    grid, mean, aleatoric, epistemic = arrays()
    made = Totals.of_block(mean, aleatoric, epistemic, {"n_outside": 1344, "n_capped": 200})
    facts = info() | {"electrons": 500.0}
    del facts["model"]["spec"]["calibration"]
    density = Density(grid, triclinic_structure(), mean, aleatoric, epistemic, totals=made, info=facts)
    density.trust = Trust.from_parts(
        np.array([0.5, 2.0, np.nan]),
        np.array([0, KINDS.index("open"), 0]),
        {"level": "outside", "sentence": "OUTSIDE of the training data, 1 of 3 atoms", "reasons": []},
    )
    page = page_of(density, tmp_path)
    grave = [v for tag, v in page.elements if tag == "li" and v.get("class") == "grave"]
    assert len(grave) == 5  # trust, points outside, electrons, capped, not calibrated
    for text in (
        "The structure is OUTSIDE of the training data, 1 of 3 atoms.",
        "1,344 of 13,440 points (10 %) lie outside of the training domain",
        "error bars away from that of the atoms",
        "has not been calibrated",
        "upper bound",
    ):
        assert text in page.text, text
    rows = {row[1]: row[5:7] for row in page.rows if len(row) == 10}
    assert rows["Al 1"] == ["2.00", "surface or void"]
    assert rows["Si 2"] == ["–", ""]
    assert "Nothing that counts against" not in page.text


def test_without_sigmas_atoms_are_ranked_by_distance(tmp_path):
    density = toy(uncertain=False)
    density.trust = Trust.from_parts(
        np.array([0.2, np.nan, 1.7]),
        np.array([0, 0, KINDS.index("missing")]),
        {"level": "edge", "sentence": "at the EDGE of the training data", "reasons": []},
    )
    page = page_of(density, tmp_path)
    rows = [row for row in page.rows if len(row) == 7]
    assert [(row[1], row[2], row[3]) for row in rows[1:]] == [
        ("Si 2", "1.70", "neighbour missing"),
        ("Si 0", "0.20", ""),
    ]
    assert "near-2-mean" in page.ids
    assert "Unlike training" in page.text


def test_a_file_of_another_program(tmp_path):
    toy(uncertain=False).write(tmp_path / "rho.cube")
    assert report(tmp_path / "rho.cube", progress=False) == tmp_path / "rho.html"
    page = Page((tmp_path / "rho.html").read_text(encoding="utf-8"))
    assert "does not say which model made it" in page.text
    assert page.table["File"] == "rho.cube"


def test_refusals(tmp_path):
    density = toy()
    for path, error, match in (
        ("report.h5", SettingsError, r"ends in \.html"),
        ("none/report.html", StoreError, "does not exist"),
    ):
        with pytest.raises(error, match=match):
            report(density, tmp_path / path)
    with pytest.raises(SettingsError, match="needs a name"):
        report(density)
    for options in ({"slices": 0}, {"slices": 25}, {"atoms": -1}):
        with pytest.raises(SettingsError, match="cannot be shown"):
            report(density, tmp_path / "r.html", **options)
    with pytest.raises(ModelError, match="not the one that made the density"):
        report(density, tmp_path / "r.html", model=small_model())
    (tmp_path / "rho.h5.part").touch()
    for name in ("rho.h5", "rho.h5.part"):
        with pytest.raises(StoreError, match="unfinished"):
            report(tmp_path / name)
    assert not list(tmp_path.glob("*.html"))


def test_command_line(tmp_path, capsys):
    from ase.io import write

    atoms, model = aluminium(), small_model()
    write(tmp_path / "al.xyz", atoms)
    model.save(tmp_path / "toy.safetensors")
    common = ["predict", str(tmp_path / "al.xyz"), "--model", str(tmp_path / "toy.safetensors"), "--grid"]
    common += ["10", "10", "10", "--quiet", "--device", "cpu", "--precision", "fp32"]
    out, page = str(tmp_path / "rho.h5"), tmp_path / "now.html"
    assert main([*common, "--out", out, "--report", str(page)]) == 0
    assert "now.html" in capsys.readouterr().out
    assert "points/s" in Page(page.read_text(encoding="utf-8")).table["Time"]
    assert main(["report", out, "--model", str(tmp_path / "toy.safetensors"), "--slices", "3", "--quiet"]) == 0
    later = Page((tmp_path / "rho.html").read_text(encoding="utf-8"))
    assert later.table["File"] == "rho.h5"
    assert later.table["Model"].startswith("toy, fingerprint")
    assert len(later.data["views"][0]["texts"]) == 3
    assert main([*common, "--report", str(tmp_path / "page.txt")]) == 1
    assert "ends in .html" in capsys.readouterr().err


def test_the_shipped_card_comes_along(tmp_path):
    from gpurho.model import DensityModel, list_models

    shipped = next(m for m in list_models() if m.name == "al")
    facts = info("al")
    facts["model"]["fingerprint"] = DensityModel.load(shipped.path).fingerprint()
    grid, mean, aleatoric, epistemic = arrays()
    numbers = np.full(3, 13)
    structure = Structure(triclinic_structure().positions, numbers, TRICLINIC, np.ones(3, dtype=bool))
    page = page_of(Density(grid, structure, mean, aleatoric, epistemic, info=facts), tmp_path, atoms=0)
    assert "Card of the model" in page.text
    assert any(row[0].startswith("Al 32") for row in page.rows if row)
    assert axis_slices(toy(), 0, 3) is not None
