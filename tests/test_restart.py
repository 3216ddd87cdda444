"""DFT codes started from a density: what the files say, and that the codes take fewer steps from them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk

from gpurho.cli import main
from gpurho.density import Density
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.grids import fourier_resample
from gpurho.errors import OutputExistsError, SettingsError
from gpurho.formats import read_density
from gpurho.formats_sparc import read_inpt, read_structure
from gpurho.grid import Grid
from gpurho.pipelines.restart import restart
from gpurho.structure import Structure

GAMMA = DFTSettings(cutoff=250.0, kmesh=KMesh(), tolerance=1e-5, forces=False)
WORDS = ["--cutoff", "250", "--gamma", "--tolerance", "1e-5"]


def al4() -> Structure:
    atoms = bulk("Al", cubic=True, a=4.05)
    atoms.rattle(0.1, seed=1)
    return Structure.from_ase(atoms)


def density_of(structure: Structure, values: np.ndarray) -> Density:
    return Density(Grid(values.shape, structure.cell), structure, np.asarray(values, dtype=np.float32))


def smooth(structure: Structure, shape: tuple[int, int, int], electrons: float) -> np.ndarray:
    x, y, z = np.meshgrid(*(np.arange(n) / n * 2 * np.pi for n in shape), indexing="ij")
    return electrons / structure.volume * (1 + 0.3 * np.cos(x + 0.4) * np.cos(2 * y) + 0.2 * np.sin(z))


@pytest.fixture
def pseudos(tmp_path: Path) -> Path:
    folder = tmp_path / "psp"
    folder.mkdir()
    (folder / "Al.psp8").write_text("13\n 13.0 3.0 190101 zatom,zion,pspd\n  8 11 1 4 600 0\n")
    return folder


def test_sparc_reads_the_density_on_its_own_grid(tmp_path, pseudos):
    structure = al4()
    values = smooth(structure, (20, 18, 16), 11.0)
    made = restart(density_of(structure, values), tmp_path / "start", "sparc", GAMMA, pseudos)
    assert {p.name for p in made.files} == {"start.dens", "Al.psp8", "gpurho.inpt", "gpurho.ion"}
    assert all(p.parent == tmp_path / "start" and p.is_file() for p in made.files)
    inputs = read_inpt(tmp_path / "start" / "gpurho.inpt")
    text = (tmp_path / "start" / "gpurho.inpt").read_text().split()
    assert text[text.index("READ_INIT_DENS:") + 1] == "1"
    assert text[text.index("INPUT_DENS_FILE:") + 1] == "start.dens"
    assert inputs is not None
    found = read_density(tmp_path / "start" / "start.dens")
    shape = GAMMA.shape(structure)
    assert found.shape == shape
    # Three valence electrons an atom, whatever the model's integral was.
    wanted = fourier_resample(values * (12.0 / 11.0), shape)
    np.testing.assert_allclose(np.asarray(found.mean), wanted, rtol=1e-6, atol=1e-9)
    read = read_structure(tmp_path / "start" / "gpurho")
    step = (read.positions - structure.positions) @ np.linalg.inv(structure.cell)
    np.testing.assert_allclose(step, np.round(step), atol=1e-12)
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.skipif(shutil.which("pw.x") is None, reason="Quantum ESPRESSO is not there")
def test_quantum_espresso_goes_on_in_fewer_steps(tmp_path):
    from gpurho.dft.qe import QeEngine

    structure = al4()
    cold = QeEngine().ground_state(structure, GAMMA)
    made = restart(density_of(structure, 1.02 * cold.density), tmp_path / "start", "qe", GAMMA)
    assert not [path.name for path in (tmp_path / "start").rglob("*") if "wfc" in path.name]
    done = subprocess.run(made.command.split(), cwd=tmp_path / "start", capture_output=True, text=True, check=True)
    steps = [line for line in done.stdout.splitlines() if "convergence has been achieved in" in line]
    assert int(steps[0].split()[-2]) <= cold.iterations - 3
    energy = next(line for line in done.stdout.splitlines() if line.startswith("!"))
    assert float(energy.split()[-2]) * 13.605693122990 == pytest.approx(cold.energies.free_energy, abs=1e-4)


def test_gpaw_goes_on_in_fewer_steps(tmp_path, capsys):
    pytest.importorskip("gpaw.dft")
    from gpurho.dft.gpaw import GpawEngine

    structure = al4()
    cold = GpawEngine().ground_state(structure, GAMMA)
    density_of(structure, 0.98 * cold.density).write(tmp_path / "rho.cube")
    assert main(["restart", str(tmp_path / "rho.cube"), "--engine", "gpaw", "--out", str(tmp_path / "s"), *WORDS]) == 0
    assert "python run.py" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "run.py"], cwd=tmp_path / "s", capture_output=True, text=True, check=True)
    assert int(done.stdout.split()[0]) < cold.iterations
    energy = float(done.stdout.split("free energy")[1].split()[0])
    assert energy == pytest.approx(cold.energies.free_energy, abs=1e-4)
    again = np.load(tmp_path / "s" / "ground_state.npy")
    assert np.abs(again - cold.density).sum() / cold.density.sum() < 1e-4


def test_what_is_refused_leaves_nothing(tmp_path, pseudos, capsys):
    structure = al4()
    rho = density_of(structure, smooth(structure, (16, 16, 16), 12.0))
    with pytest.raises(SettingsError, match=r"vasp.*sparc"):
        restart(rho, tmp_path / "a", "vasp")
    with pytest.raises(SettingsError, match="leave pseudopotentials out"):
        restart(rho, tmp_path / "a", "gpaw", GAMMA, pseudos)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["psp"]
    with pytest.raises(OutputExistsError, match="psp is there"):
        restart(rho, pseudos, "sparc", GAMMA, pseudos)
    rho.write(tmp_path / "rho.cube")
    command = ["restart", str(tmp_path / "rho.cube"), "--out", str(tmp_path / "b"), "--engine", "sparc"]
    assert main([*command, "--pseudos", "Al=x", "Si"]) == 1
    assert "neither a folder nor files" in capsys.readouterr().err
    assert main([*command, "--pseudos", f"Al={pseudos / 'Al.psp8'}", "--json", *WORDS]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["command"] == "sparc -name gpurho"
    assert all(Path(name).is_file() for name in said["files"])
