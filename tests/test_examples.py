"""The examples run as they stand, and what they say of their results is so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, folder):
    """Run an example as a user does; its results, and what it printed."""
    if name == "train_on_five_snapshots" and not (EXAMPLES.parent / "benchmarks" / "data" / "al32.h5").exists():
        pytest.skip("the data set lies in a checkout alone")
    environment = os.environ | {"GPURHO_PICTURES": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", EXAMPLES / f"{name}.py"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / f"{name}.json").read_text()), done.stdout


def pictures(folder):
    found = sorted(p.name for p in folder.glob("*.png"))
    assert all((folder / name).stat().st_size > 20_000 for name in found)
    return found


def test_vacancy(tmp_path):
    results, text = run("al_vacancy", tmp_path)
    assert abs(results["electrons"] - results["valence"]) < 3 * results["electrons_std"]
    assert results["electrons_std"] < 1.0
    # The model has seen no vacancy, and says so.
    assert results["epistemic_in_the_hole"] > 1.5 * results["epistemic_in_the_bulk"]
    assert 0.5 < results["electrons_in_the_hole"] < 2.0
    # The nearest neighbours of the hole are 2.86 angstrom away.
    assert results["distance_of_the_least_sure"] < 3.5
    assert "least sure of: atom" in text
    assert pictures(tmp_path) == [f"al_vacancy_{x}.png" for x in ("001", "110", "histogram", "line")]
    assert "electrons_std" in (tmp_path / "al_vacancy_atoms.xyz").read_text().split("\n")[1]


def test_composition(tmp_path):
    results, _ = run("sige_composition", tmp_path)
    shares, sigma = results["germanium"], results["epistemic"]
    for electrons, error in zip(results["electrons"], results["electrons_std"], strict=True):
        assert abs(electrons - 256) < 3 * error
    # Trained at equal parts: pure elements are farther than a quarter of the other element.
    assert min(sigma[0], sigma[-1]) > 1.5 * sigma[shares.index(0.5)]
    assert sum(bond[0] for bond in results["bonds"].values()) == 128
    for _, mean, spread, error in results["bonds"].values():
        assert 0.4 < mean < 0.65
        assert error < spread
    assert pictures(tmp_path) == ["sige_110_100.png", "sige_110_50.png", "sige_composition.png"]


def test_five_snapshots(tmp_path):
    results, _ = run("train_on_five_snapshots", tmp_path)
    assert results["l1"]["al"] < results["l1"]["five"] < 0.012
    assert 0.55 < results["coverage"]["five"][0] < 0.8
    assert results["coverage"]["five"][1] > 0.85
    assert abs(results["electrons"] - 96) < 3 * results["electrons_std"]
    assert pictures(tmp_path) == [f"five_{x}.png" for x in ("calibration", "error", "line")]


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda p: p.stem)
def test_cells_are_marked(path):
    """Percent scripts, as Jupytext and editors read them: text in cells of Markdown, each line a comment."""
    lines = path.read_text().splitlines()
    assert lines[0] == "# %% [markdown]"
    assert lines[1].startswith("# # ")
    inside = False
    for line in lines:
        if line.startswith("# %%"):
            inside = line.endswith("[markdown]")
        elif inside and line:
            assert line.startswith("#"), line
