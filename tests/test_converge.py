"""Tables of convergence, the ASE calculator of an engine, and the commands around labels."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import units
from ase.build import bulk
from ase.io import read, write
from ase.md.verlet import VelocityVerlet
from toy_engine import ToyEngine

from gpurho.cli import main
from gpurho.datasets import open_dataset
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.calculator import EngineCalculator
from gpurho.errors import SettingsError, StructureError
from gpurho.pipelines.converge import Convergence, Row, converge, parse_mesh
from gpurho.pipelines.structures import read_structures, write_structures
from gpurho.structure import Structure

needs_pw = pytest.mark.skipif(shutil.which("pw.x") is None, reason="Quantum ESPRESSO is not installed")


class Meshy(ToyEngine):
    """A density and an energy that move with the mesh in a known way."""

    def ground_state(self, structure, settings, density=None):
        label = super().ground_state(structure, settings, density)
        share = 0.1 / len(settings.mesh(structure).points()[0])
        wave = np.cos(2 * np.pi * np.arange(label.density.shape[0]) / label.density.shape[0])
        label.density[...] = 12 / structure.volume * (1 + share * wave[:, None, None])
        object.__setattr__(label.energies, "free_energy", -1.0 + share)
        return label


def test_the_table_is_the_difference_from_the_last_row():
    meshes = [KMesh(), KMesh((2, 2, 2)), KMesh((2, 2, 2), (0.5, 0.5, 0.5))]
    table = converge(bulk("Al", cubic=True), meshes, engine=Meshy(), settings=DFTSettings(cutoff=150.0))
    assert [row.points for row in table.rows] == [1, 8, 4]
    n = DFTSettings(cutoff=150.0).shape(Structure.from_ase(bulk("Al", cubic=True)))[0]
    wave = np.cos(2 * np.pi * np.arange(n) / n)
    for row, share in zip(table.rows, (0.1, 0.1 / 8, 0.1 / 4), strict=True):
        assert row.l1 == pytest.approx(100 * abs(share - 0.1 / 4) * np.abs(wave).mean(), rel=1e-6, abs=1e-9)
        assert row.energy == pytest.approx(1000 * (share - 0.1 / 4) / 27.211386245988 / 4, abs=1e-9)
    assert table.rows[-1].l1 == 0
    assert "2x2x2 shifted by 0.5, 0.5, 0.5" in str(table)


def test_cutoffs_share_one_grid_and_the_defaults_double_the_mesh():
    table = converge(bulk("Al", cubic=True), cutoffs=[100, 150], engine=ToyEngine())
    assert [row.cutoff for row in table.rows] == [100, 150]
    usual = converge(bulk("Al", cubic=True), engine=ToyEngine(), settings=DFTSettings(cutoff=100.0, k_reach=5.0))
    assert [row.kmesh.split()[0] for row in usual.rows] == ["1x1x1", "1x1x1", "2x2x2"]
    with pytest.raises(SettingsError, match="at once"):
        converge(bulk("Al", cubic=True), [KMesh()], [100.0], engine=ToyEngine())
    with pytest.raises(SettingsError, match="two or more"):
        converge(bulk("Al", cubic=True), [KMesh()], engine=ToyEngine())

    with pytest.raises(SettingsError, match="leave out --cutoff"):
        converge(bulk("Al", cubic=True), cutoffs=[100, 150], engine=ToyEngine(), settings=DFTSettings(cutoff=120.0))
    with pytest.raises(SettingsError, match="leave out --kmesh"):
        converge(
            bulk("Al", cubic=True),
            [KMesh(), KMesh((2, 2, 2))],
            engine=ToyEngine(),
            settings=DFTSettings(cutoff=100.0, kmesh=KMesh()),
        )


def table(kind, *rows):
    """A table of (L1 error, cutoff, reach)."""
    return Convergence([Row("1x1x1", 1, reach, cutoff, l1, 0, 0, 1) for l1, cutoff, reach in rows], "toy", kind)


def test_verdicts():
    # The same change passes for k-points and not for cutoffs.
    meshes = table("k-mesh", (2, 400, 4), (0.4, 400, 22), (0, 400, 44))
    assert meshes.converged
    assert meshes.verdict == "the last step but one is converged: 0.40 % against a limit of 0.5 %"
    cutoffs = table("cutoff", (0.4, 400, 22), (0, 600, 22))
    assert cutoffs.converged is False
    assert "not converged: 0.40 % against a limit of 0.3 %" in cutoffs.verdict
    assert table("cutoff", (0.29, 400, 22), (0, 600, 22)).converged
    # A coarse reference says nothing.
    lower = table("cutoff", (0.1, 600, 22), (0.1, 400, 22), (0.1, 500, 22), (0, 400, 22))
    assert lower.converged is None
    assert "lower cutoff than row 1, 3;" in lower.verdict
    coarser = table("k-mesh", (0.1, 400, 22), (0, 400, 4))
    assert coarser.verdict.startswith("no verdict: the reference, the last row, has coarser k-points than row 1;")


def test_the_reach_of_rows_ranks_meshes():
    # A shifted mesh with half as many points resolves more.
    meshes = [KMesh((2, 2, 2)), KMesh((2, 2, 2), (0.5, 0.5, 0.5))]
    settings = DFTSettings(cutoff=100.0)
    atoms = bulk("Al", cubic=True, a=4.0)
    right = converge(atoms, meshes, engine=ToyEngine(), settings=settings)
    assert right.rows[0].points > right.rows[1].points
    assert [row.reach for row in right.rows] == pytest.approx([8, 8])
    assert right.finer == []


@needs_pw
def test_the_default_mesh_is_converged_where_doubling_shows_it():
    atoms = bulk("Al", cubic=True, a=4.05)
    atoms.rattle(0.1, seed=1)
    settings = DFTSettings(cutoff=200.0)
    usual = settings.mesh(Structure.from_ase(atoms))
    double = KMesh(tuple(2 * n for n in usual.size), usual.shift)
    found = converge(atoms, [KMesh(), usual, double], settings=settings)
    assert found.rows[0].l1 > 1  # Gamma alone is far off
    assert 0.001 < found.rows[1].l1 < 0.5
    assert found.converged


@needs_pw
def test_the_default_cutoff_of_sige_is_converged():
    atoms = bulk("Si", cubic=True, a=5.54)
    atoms.set_chemical_symbols(["Si", "Ge"] * 4)
    atoms.rattle(0.1, seed=1)
    usual = DFTSettings().energy_cutoff(Structure.from_ase(atoms))
    settings = DFTSettings(kmesh=KMesh((1, 1, 1), (0.25, 0.25, 0.25)))
    found = converge(atoms, cutoffs=[200, usual, 600], settings=settings)
    assert usual == 500
    assert found.rows[0].l1 > 1
    assert 0.001 < found.rows[1].l1 < 0.3
    assert found.converged


def test_meshes_by_name():
    assert parse_mesh("2x3x4") == KMesh((2, 3, 4))
    assert parse_mesh("2x2x2:0.25") == KMesh((2, 2, 2), (0.25, 0.25, 0.25))
    assert parse_mesh("2x2x2:0.5,0,0") == KMesh((2, 2, 2), (0.5, 0, 0))
    for bad in ("2x2", "a", "2x2x2:x", "2x2x2:1,2"):
        with pytest.raises(SettingsError, match="for instance 2x2x2"):
            parse_mesh(bad)


def test_two_ways_to_name_the_meshes_are_refused(tmp_path, capsys):
    write(tmp_path / "al.xyz", bulk("Al", cubic=True))
    command = ["converge", str(tmp_path / "al.xyz"), "--meshes", "1x1x1", "2x2x2", "--k-reach", "20"]
    assert main([*command, "--engine", "toy_engine:ToyEngine"]) == 1
    assert "leave out --k-reach" in capsys.readouterr().err


def test_frames_of_a_file(tmp_path):
    frames = [bulk("Al", cubic=True, a=4 + 0.01 * i) for i in range(5)]
    write_structures(tmp_path / "al.xyz", frames)
    assert len(read_structures(tmp_path / "al.xyz")) == 5
    chosen = read_structures(Path(f"{tmp_path / 'al.xyz'}@1:4:2"))
    assert [a.cell.lengths()[0] for a in chosen] == pytest.approx([4.01, 4.03])
    (one,) = read_structures(Path(f"{tmp_path / 'al.xyz'}@2"))
    assert one.cell.lengths()[0] == pytest.approx(4.02)
    for bad in ("al.xyz@9", "none.xyz", "al.xyz@x"):
        with pytest.raises(StructureError):
            read_structures(tmp_path / bad)


@needs_pw
def test_a_label_by_the_command_line(tmp_path, capsys):
    structures, out = tmp_path / "al.xyz", tmp_path / "al.h5"
    write(structures, [bulk("Al", cubic=True, a=a) for a in (4.0, 4.1)])
    command = ["label", str(structures), "--out", str(out), "--cutoff", "150", "--kmesh", "1", "1", "1", "--quiet"]
    assert main(command) == 0
    assert "2 labels computed" in capsys.readouterr().out
    data = open_dataset(out)
    assert [s.electrons for s in data] == [12, 12]
    assert data[0].meta["engine"].startswith("Quantum ESPRESSO")
    assert json.loads(data[0].meta["settings"])["kmesh"]["shift"] == [0.0, 0.0, 0.0]
    assert main(command) == 0
    assert "0 labels computed" in capsys.readouterr().out


@needs_pw
def test_dynamics_with_an_engine_conserve_energy():
    atoms = bulk("Al", cubic=True, a=4.05)
    atoms.rattle(0.05, seed=0)
    atoms.calc = EngineCalculator("qe", DFTSettings(cutoff=150.0, kmesh=KMesh(), tolerance=1e-6))

    def total():
        # The free energy is what the forces are the slope of.
        return atoms.get_potential_energy(force_consistent=True) + atoms.get_kinetic_energy()

    start = total()
    VelocityVerlet(atoms, 2 * units.fs).run(5)
    assert atoms.get_kinetic_energy() > 0.005
    assert total() == pytest.approx(start, abs=0.05 * atoms.get_kinetic_energy())


def test_a_structure_that_cannot_be_done_leaves_nothing(tmp_path, capsys):
    write(tmp_path / "al.xyz", bulk("Al", cubic=True, a=0.9))
    out = tmp_path / "al.h5"
    engine = ["--engine", "toy_engine:ToyEngine"]
    assert main(["label", str(tmp_path / "al.xyz"), "--out", str(out), *engine]) == 1
    assert "structure 0: atoms" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["al.xyz"]
    assert len(read(tmp_path / "al.xyz", ":")) == 1
