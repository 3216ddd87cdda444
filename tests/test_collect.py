"""Density files of several codes as one data set."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

import gpurho
from gpurho.cli import main
from gpurho.datasets import open_dataset
from gpurho.density import Density
from gpurho.errors import FormatError, OutputExistsError, SettingsError, StoreError
from gpurho.grid import Grid
from gpurho.pipelines.collect import collect
from gpurho.structure import Structure


def density(seed: int) -> Density:
    """Something smooth with twelve electrons, by its own Fourier series."""
    rng = np.random.default_rng(seed)
    atoms = bulk("Al", cubic=True, a=4.05)
    atoms.set_cell(atoms.cell.array + rng.normal(0, 0.1, (3, 3)), scale_atoms=True)
    structure = Structure.from_ase(atoms)
    x, y, z = np.meshgrid(*(np.arange(n) / n * 2 * np.pi for n in (10, 12, 9)), indexing="ij")
    values = 1 + 0.3 * np.cos(x + seed) + 0.2 * np.sin(2 * y - z)
    return Density(Grid(values.shape, structure.cell), structure, (12 / structure.volume * values).astype(np.float32))


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    names = ["a.cube", "run1/CHGCAR", "b.dens", "c.xsf", "d.h5"]
    for i, name in enumerate(names):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        density(i).write(tmp_path / name)
    return [tmp_path / name for name in names]


def test_what_goes_in_comes_out(files, tmp_path):
    data = gpurho.collect(files, tmp_path / "data.h5", temperatures=[1, 2, 3, 4, 5], family="mine", progress=False)
    assert len(data) == 5
    for i, snapshot in enumerate(data):
        wanted = density(i)
        np.testing.assert_allclose(snapshot.density, wanted.mean, rtol=2e-6, err_msg=files[i].name)
        np.testing.assert_allclose(snapshot.structure.cell, wanted.structure.cell, atol=1e-5)
        assert snapshot.electrons == 12
        assert snapshot.meta["temperature_K"] == i + 1
        assert (snapshot.meta["family"], snapshot.meta["source"]) == ("mine", str(files[i]))


def test_command_line_and_one_temperature_for_all(files, tmp_path, capsys):
    out = tmp_path / "data.h5"
    assert main(["collect", *map(str, files[:2]), "--out", str(out), "--temperature", "300"]) == 0
    said = capsys.readouterr().out
    assert "Al4" in said
    assert "2 snapshots" in said
    assert [s.meta["temperature_K"] for s in open_dataset(out)] == [300.0, 300.0]
    assert main(["collect", str(files[2]), "--out", str(out), "--json", "--overwrite"]) == 0
    found = json.loads(capsys.readouterr().out)["snapshots"]
    assert [(s["electrons"], s["shape"]) for s in found] == [(12.0, [10, 12, 9])]


def test_nothing_is_written_when_one_file_is_bad(files, tmp_path):
    bad = tmp_path / "bad.cube"
    bad.write_text("no cube\n")
    with pytest.raises(FormatError, match=r"bad\.cube"):
        collect([*files, bad], tmp_path / "data.h5", progress=False)
    assert not list(tmp_path.glob("*data.h5*"))


def test_what_is_refused(files, tmp_path):
    out = tmp_path / "data.h5"
    with pytest.raises(SettingsError, match="no density files"):
        collect([], out)
    with pytest.raises(SettingsError, match="1 of 3 files are given twice"):
        collect([files[0], files[1], files[0]], out)
    with pytest.raises(SettingsError, match="2 temperatures for 5 files"):
        collect(files, out, temperatures=[1, 2])
    with pytest.raises(SettingsError, match="temperature -1"):
        collect(files, out, temperatures=[-1])
    with pytest.raises(StoreError, match="does not exist"):
        collect(files, tmp_path / "no" / "data.h5")
    out.write_bytes(b"mine")
    with pytest.raises(OutputExistsError, match=r"data\.h5 is there"):
        collect(files, out, progress=False)
    assert out.read_bytes() == b"mine"
