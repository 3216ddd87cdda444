"""gpurho plot: kinds, sources and references from files, and errors in one line."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.figure import Figure
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho.cli import main
from gpurho.datasets import Snapshot, write_dataset
from gpurho.density import Density
from gpurho.grid import Grid
from gpurho.pipelines.plot import OPTIONS, open_source
from gpurho.plotting import KINDS

SHAPE = (10, 12, 14)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("plots")
    structure = triclinic_structure()
    grid = Grid(SHAPE, TRICLINIC)
    mean = wave(grid, structure).astype(np.float32)
    Density(grid, structure, mean, 0.01 * mean, 0.005 * mean).write(where / "rho.h5")
    other = mean + np.float32(0.002)
    Density(grid, structure, other).write(where / "dft.cube")
    electrons = float(other.sum(dtype=float)) * grid.dv
    write_dataset(where / "set.h5", [Snapshot(structure, other, electrons)] * 2)
    return where


def run(folder, capsys, *words):
    """Exit code, last line of standard output, and of standard error."""
    code = main(["plot", *(w.replace("@", f"{folder}/") for w in words)])
    out, err = capsys.readouterr()
    assert out.count("\n") <= 1
    assert err.count("\n") <= 1
    return code, out.strip(), err.strip()


def test_every_kind_can_be_asked_for():
    assert set(OPTIONS) == set(KINDS)


@pytest.mark.parametrize(
    "words",
    [
        ["--plane", "1", "-1", "0", "--repeats", "1", "1", "1", "--limits", "mean", "0", "0.4", "--same-scale"],
        ["--axis", "a", "--position", "0.3", "--fields", "mean,std", "--contours", "0", "--title", ""],
        ["--line", "0", "0", "0", "3", "3", "-3", "--reference", "@set.h5:1", "--bound", "2"],
        ["--kind", "slice", "--line", "0", "0", "0", "1", "1", "1", "--fields", "mean"],
        ["--kind", "histogram", "--bins", "20", "--column", "single"],
        ["--kind", "error", "--reference", "@dft.cube", "--normal", "1", "1", "0", "--width", "3", "--limit", "0.01"],
        ["--kind", "calibration", "--reference", "@set.h5:0"],
    ],
)
def test_pictures(folder, capsys, words):
    code, out, err = run(folder, capsys, "@rho.h5", "@new.png", "--dpi", "40", *words)
    assert (code, err) == (0, "")
    assert out == f"wrote {folder}/new.png"
    assert (folder / "new.png").read_bytes()[:4] == b"\x89PNG"
    (folder / "new.png").unlink()


def test_arguments_arrive(folder, capsys, monkeypatch):
    seen = {}

    def record(density, path, kind, **options):
        seen.update(options, kind=kind, shape=density.shape)
        return Figure()

    monkeypatch.setattr("gpurho.plotting.plot", record)
    run(folder, capsys, "@set.h5:1", "@x.png", "--axis", "b", "--limits", "std", "0", "1", "--fields", "mean, std")
    assert seen == {
        "kind": "slice",
        "shape": SHAPE,
        "axis": 1,
        "limits": {"std": (0.0, 1.0)},
        "fields": ("mean", "std"),
    }
    seen.clear()
    run(folder, capsys, "@rho.h5", "@x.png", "--line", "0", "1", "2", "3", "4", "-5")
    assert seen == {"kind": "line", "shape": SHAPE, "a": [0.0, 1.0, 2.0], "b": [3.0, 4.0, -5.0]}


def test_a_snapshot_is_its_density(folder):
    with open_source(f"{folder}/set.h5:1") as density, open_source(f"{folder}/dft.cube") as cube:
        np.testing.assert_allclose(np.asarray(density.mean), np.asarray(cube.mean), atol=2e-6)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["@rho.h5", "@x.doc"], "does not say the format"),
        (["@none.h5", "@x.png"], "none.h5"),
        (["@set.h5", "@x.png"], "data set of 2 snapshots"),
        (["@set.h5:7", "@x.png"], "snapshot 7 is not among the 2"),
        (["@set.h5:first", "@x.png"], "file:number"),
        (["@rho.h5", "@x.png", "--plane", "0", "0", "0"], "Miller indices"),
        (["@rho.h5", "@x.png", "--plane", "1", "1", "0", "--axis", "a"], "leave it out"),
        (["@rho.h5", "@x.png", "--bins", "5"], "--bins does not go with a picture of kind slice, only histogram"),
        (["@rho.h5", "@x.png", "--kind", "line", "--repeats", "1", "1", "1"], "--repeats does not go"),
        (["@rho.h5", "@x.png", "--kind", "line"], "needs --line"),
        (["@rho.h5", "@x.png", "--kind", "error"], "needs --reference"),
        (["@rho.h5", "@x.png", "--limits", "mean", "low", "high"], "not two numbers"),
        (["@dft.cube", "@x.png", "--fields", "std"], "'std'"),
        (["@rho.h5", "@x.png", "--column", "wide"], "'single'"),
    ],
)
def test_errors(folder, capsys, words, message):
    before = sorted(p.name for p in folder.iterdir())
    code, out, err = run(folder, capsys, *words)
    assert code == 1
    assert not out
    assert err.startswith("gpurho: ")
    assert message in err
    assert sorted(p.name for p in folder.iterdir()) == before
