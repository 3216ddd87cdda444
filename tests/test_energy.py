"""Energies of densities, equations of state, and their commands."""

from __future__ import annotations

import json
from dataclasses import replace

import h5py
import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import write
from energy_tools import SHAPE, EmtEngine, ToyEngine, command
from scipy.optimize import minimize_scalar

from gpurho.datasets import Snapshot, write_dataset
from gpurho.density import Density
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.grids import atomic_superposition
from gpurho.energy import energies
from gpurho.eos import FORMS, GPA, fit_eos
from gpurho.errors import DatasetError, EngineError, GpurhoError, GridError, SettingsError, StructureError
from gpurho.grid import Grid
from gpurho.pipelines import energy as pipeline
from gpurho.structure import Structure
from gpurho.units import HARTREE


@pytest.fixture
def al():
    atoms = bulk("Al", "fcc", a=4.05, cubic=True)
    atoms.positions += np.random.default_rng(0).normal(0, 0.05, (4, 3))
    return Structure.from_ase(atoms)


@pytest.fixture
def density(al):
    """1 % more electrons than there are, and a wave of 4 % on top."""
    exact = atomic_superposition(al, SHAPE)
    x = np.arange(SHAPE[0])[:, None, None] / SHAPE[0]
    values = 1.01 * (exact + 0.04 * exact.mean() * np.cos(2 * np.pi * x))
    return Density(Grid(SHAPE, al.cell), al, values.astype(np.float32))


def l1(al, density):
    values = density.mean / density.mean.mean()
    exact = atomic_superposition(al, SHAPE)
    return np.abs(values - exact / exact.mean()).mean()


# -- energies -----------------------------------------------------------------------------------------------------


def test_report_without_self_consistency(al, density):
    engine = ToyEngine()
    report = energies(al, density, engine)
    assert engine.calls == ["one_shot"]
    assert report.grid == SHAPE
    assert report.differences is None
    assert report.scf is None
    error = l1(al, density)
    assert report.free_energy == pytest.approx(-200 + 4000 * error**2)
    assert report.xc == pytest.approx(-80 + 120 * error)
    assert report.per_atom["free_energy"] == pytest.approx(report.free_energy / 4)
    assert report.harris.electrons_given == pytest.approx(12.12, rel=1e-5)
    assert report.settings.cutoff == 400.0
    assert report.settings.kmesh is not None
    assert "12 electrons (the density had 12.12)" in str(report)
    assert "the density's grid, 8x9x10, is coarser than" in str(report)
    fitting = energies(al, density, engine, replace(DFTSettings(), grid=SHAPE))
    assert "coarser" not in str(fitting)


def test_report_against_the_ground_state(al, density):
    engine = ToyEngine()
    report = energies(al.to_ase(), density, engine, self_consistent=True)
    assert engine.calls == ["one_shot", "scf from density"]
    d, error = report.differences, l1(al, density)
    assert 0.02 < error < 0.03
    assert d["density_l1"] == pytest.approx(error, rel=1e-5)
    assert d["free_energy"] == pytest.approx(4000 * error**2)
    assert d["free_energy_mha_per_atom"] == pytest.approx(1000 * 1000 * error**2 / HARTREE)
    assert d["xc"] == pytest.approx(120 * error)
    assert d["fermi_level"] == pytest.approx(100 * error)
    assert d["eigenvalue_rms"] == pytest.approx(100 * error)
    assert f"{100 * error:.3f} % L1 per electron" in str(report)
    plain = json.loads(json.dumps(report.to_dict()))
    assert plain["scf"]["free_energy"] == -200.0
    assert plain["differences"]["density_l1"] == d["density_l1"]


def test_arrays_and_files_are_densities_too(al, density, tmp_path):
    expected = energies(al, density, ToyEngine()).free_energy
    assert energies(al, np.asarray(density.mean), ToyEngine()).free_energy == pytest.approx(expected)
    for name in ("rho.h5", "rho.cube", "CHGCAR"):
        density.write(tmp_path / name)
        assert energies(al, tmp_path / name, ToyEngine()).free_energy == pytest.approx(expected, rel=1e-4)
        assert energies(al, str(tmp_path / name), ToyEngine()).free_energy == pytest.approx(expected, rel=1e-4)


def test_the_order_and_the_images_of_the_atoms_do_not_matter(density):
    s = density.structure
    moved = s.positions[[2, 0, 3, 1]] + np.array([1, -2, 0]) @ s.cell
    energies(Structure(moved, s.numbers, s.cell, s.pbc), density, ToyEngine())


def test_densities_of_other_atoms_are_refused(al, density):
    shifted = al.positions.copy()
    shifted[1, 2] += 0.2
    with pytest.raises(StructureError, match=r"an atom is off by 0\.2 angstrom"):
        energies(Structure(shifted, al.numbers, al.cell, al.pbc), density, ToyEngine())
    with pytest.raises(StructureError, match="density is of Al4, the atoms are Al3Si"):
        energies(Structure(al.positions, [13, 13, 13, 14], al.cell, al.pbc), density, ToyEngine())
    with pytest.raises(GridError, match="give a density of the whole cell"):
        energies(Structure(al.positions, al.numbers, al.cell * 1.01, al.pbc), density, ToyEngine())
    origin = Density(Grid(SHAPE, al.cell, (0.5, 0, 0)), al, np.asarray(density.mean))
    with pytest.raises(GridError, match=r"from \[0\.5, 0\.0, 0\.0\]"):
        energies(al, origin, ToyEngine())


@pytest.mark.parametrize("name", ["e.h5", "e.npz"])
def test_eigenvalues_go_to_a_file(al, density, tmp_path, name):
    report = energies(al, density, ToyEngine(), self_consistent=True)
    assert report.write(tmp_path / name) == tmp_path / name
    with h5py.File(tmp_path / name) if name == "e.h5" else np.load(tmp_path / name) as file:
        assert np.allclose(file["eigenvalues"][...], report.eigenvalues)
        assert np.allclose(file["scf_eigenvalues"][...], report.scf.energies.eigenvalues)
        assert np.allclose(file["weights"][...], [0.25, 0.75])
        assert float(file["density_l1"][...]) == report.density_l1
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_files_that_cannot_be_written(al, density, tmp_path):
    report = energies(al, density, ToyEngine())
    with pytest.raises(SettingsError, match=r"give \*\.h5 or \*\.npz"):
        report.write(tmp_path / "e.txt")
    with pytest.raises(SettingsError, match="does not exist"):
        report.write(tmp_path / "no" / "e.h5")


# -- equations of state -------------------------------------------------------------------------------------------


def birch_murnaghan(v, v0, e0, b, derivative):
    """The closed form; b in eV/angstrom^3."""
    x = (v0 / v) ** (2 / 3)
    return e0 + 9 * v0 * b / 16 * ((x - 1) ** 3 * derivative + (x - 1) ** 2 * (6 - 4 * x))


def test_fit_finds_the_closed_form():
    v = np.linspace(15.0, 18.5, 7)
    e = birch_murnaghan(v, 16.6, -5603.25, 76.0 / GPA, 4.4)
    shuffled = np.random.default_rng(0).permutation(7)
    fit = fit_eos(v[shuffled], e[shuffled])
    assert fit.volume == pytest.approx(16.6, abs=1e-5)
    assert fit.energy == pytest.approx(-5603.25, abs=1e-7)
    assert fit.bulk_modulus == pytest.approx(76.0, abs=1e-3)
    assert fit.lattice_parameter(4) == pytest.approx((4 * 16.6) ** (1 / 3), abs=1e-6)
    assert fit.residual < 1e-8
    assert fit_eos(v[::2], e[::2]).volume == pytest.approx(16.6, abs=1e-5)
    noisy = fit_eos(v, e + 1e-3 * np.array([1, -1, 1, -1, 1, -1, 1]))
    assert 5e-4 < noisy.residual < 1e-3
    for form in FORMS:
        assert fit_eos(v, e, form).bulk_modulus == pytest.approx(76.0, abs=0.7)


def test_fits_that_have_no_minimum():
    v = np.linspace(15.0, 18.5, 7)
    with pytest.raises(SettingsError, match=r"lowest at the last volume.*add larger ones"):
        fit_eos(v, birch_murnaghan(v, 25.0, 0, 0.5, 4))
    with pytest.raises(SettingsError, match=r"lowest at the first volume.*add smaller ones"):
        fit_eos(v, birch_murnaghan(v, 12.0, 0, 0.5, 4))
    with pytest.raises(SettingsError, match="four different volumes"):
        fit_eos([16, 16, 17, 18], [0, 0, -1, 0])
    with pytest.raises(SettingsError, match="finite"):
        fit_eos([15, 16, 17, 18], [0, -1, np.nan, 0])
    with pytest.raises(SettingsError, match="'cubic' is not known"):
        fit_eos(v, v, "cubic")


def test_scan_of_emt_aluminium():
    """Against the curvature of EMT's own energy at its minimum, by finite differences."""

    def energy(volume):
        atoms = bulk("Al", "fcc", a=(4 * volume) ** (1 / 3), cubic=True)
        atoms.calc = EMT()
        return atoms.get_potential_energy() / 4

    v0 = float(minimize_scalar(energy, bounds=(15.5, 16.5), method="bounded").x)
    h = 0.05
    modulus = v0 * (energy(v0 + h) - 2 * energy(v0) + energy(v0 - h)) / h**2 * GPA
    (row,) = pipeline.eos_scan(bulk("Al", "fcc", a=4.0, cubic=True), np.linspace(0.98, 1.02, 7), engine=EmtEngine())
    assert row.source == "SCF"
    assert row.fit.volume == pytest.approx(v0, abs=0.01)
    assert row.fit.bulk_modulus == pytest.approx(modulus, rel=0.03)
    assert row.cell_atoms == 4
    assert row.to_dict()["lattice_parameter"] == pytest.approx((4 * v0) ** (1 / 3), abs=1e-3)


def test_scan_keeps_the_mesh_of_the_smallest_cell():
    seen = []

    class Watched(EmtEngine):
        def ground_state(self, structure, settings, density=None):
            seen.append((settings.kmesh, settings.cutoff, settings.shape(structure), settings.forces))
            return super().ground_state(structure, settings, density)

    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    calls = []
    pipeline.eos_scan(atoms, [0.9, 0.97, 1.0, 1.03, 1.1], engine=Watched(), progress=lambda: calls.append(1))
    small = Structure.from_ase(bulk("Al", "fcc", a=4.0 * 0.9, cubic=True))
    assert {k for k, *_ in seen} == {DFTSettings().mesh(small)}
    assert len({shape for _, _, shape, _ in seen}) > 1
    assert not any(forces for *_, forces in seen)
    assert len(calls) == 5


def test_scan_of_nothing():
    atoms = bulk("Al", "fcc", a=4.0, cubic=True)
    with pytest.raises(SettingsError, match="neither a model nor self-consistency"):
        pipeline.eos_scan(atoms, [0.97, 0.99, 1.0, 1.01], engine=EmtEngine(), self_consistent=False)
    with pytest.raises(SettingsError, match="four or more"):
        pipeline.eos_scan(atoms, [0.97, 1.0, 1.01], engine=EmtEngine())


def test_cubic_cells():
    assert pipeline.cubic_cell(Structure.from_ase(bulk("Al"))) == 4
    sige = bulk("Si", "diamond", a=5.5)
    sige.symbols[1] = "Ge"
    assert pipeline.cubic_cell(Structure.from_ase(sige)) == 8
    sige.symbols[1] = "Al"
    assert pipeline.cubic_cell(Structure.from_ase(sige)) is None
    assert pipeline.cubic_cell(Structure.from_ase(bulk("Mg"))) is None


# -- commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def toy(monkeypatch):
    made = []

    def make(name, **options):
        made.append((name, options))
        return EmtEngine() if name == "qe" else ToyEngine()

    monkeypatch.setattr("gpurho.energy.make_engine", make)
    monkeypatch.setattr("gpurho.pipelines.energy.make_engine", make)
    return made


def test_energy_command(al, density, tmp_path, capsys, toy):
    write(tmp_path / "al.xyz", al.to_ase())
    density.write(tmp_path / "rho.h5")
    command("energy", tmp_path / "al.xyz", tmp_path / "rho.h5", "--scf", "--out", tmp_path / "e.npz")
    text = capsys.readouterr().out
    assert "density error" in text
    assert "wrote" in text
    assert toy == [("qe", {})]
    command("energy", tmp_path / "al.xyz", tmp_path / "rho.h5", "--engine", "sparc", "--kmesh", 3, 3, 3, "--json")
    found = json.loads(capsys.readouterr().out)
    assert found["settings"]["kmesh"]["size"] == [3, 3, 3]
    assert found["differences"] is None
    with pytest.raises(SettingsError, match="the name does not say the format"):
        command("energy", tmp_path / "al.xyz", tmp_path / "rho.h5", "--out", tmp_path / "e.dat")
    with pytest.raises(GpurhoError, match="does not exist"):
        command("energy", tmp_path / "none.xyz", tmp_path / "rho.h5")


def test_eos_command_scans_an_element(capsys, toy):
    command("eos", "Al", "--a", 3.9, 4.1, "--n", 5, "--json", "--quiet")
    (row,) = json.loads(capsys.readouterr().out)
    assert len(row["volumes"]) == 5
    assert row["volumes"][0] == pytest.approx(3.9**3 / 4)
    assert row["volumes"][-1] == pytest.approx(4.1**3 / 4)
    assert row["lattice_parameter"] == pytest.approx(3.994, abs=0.01)
    command("eos", "Al", "--scale", 0.96, 1.01, "--repeat", 2, 1, 1, "--quiet")
    assert "B GPa" in capsys.readouterr().out
    with pytest.raises(SettingsError, match="exclude each other"):
        command("eos", "Al", "--a", 3.9, 4.1, "--scale", 0.9, 1.1)
    with pytest.raises(SettingsError, match="the smaller value first"):
        command("eos", "Al", "--a", 4.1, 3.9)
    with pytest.raises(SettingsError, match="--n 3"):
        command("eos", "Al", "--n", 3)
    with pytest.raises(StructureError, match="'Xx' is neither a file nor an element"):
        command("eos", "Xx")


def test_eos_command_reads_energies_and_scales_structures(tmp_path, capsys, toy):
    frames = []
    for a in np.linspace(3.9, 4.1, 6):
        atoms = bulk("Al", "fcc", a=a, cubic=True)
        atoms.calc = EMT()
        atoms.get_potential_energy()
        frames.append(atoms)
    write(tmp_path / "scan.xyz", frames)
    command("eos", tmp_path / "scan.xyz", "--json")
    (row,) = json.loads(capsys.readouterr().out)
    assert row["lattice_parameter"] == pytest.approx(3.994, abs=0.01)
    write(tmp_path / "one.xyz", frames[2])
    command("eos", tmp_path / "one.xyz", "--json", "--quiet")
    (again,) = json.loads(capsys.readouterr().out)
    assert again["lattice_parameter"] == pytest.approx(row["lattice_parameter"], abs=6e-3)
    with pytest.raises(SettingsError, match="--a is for an element"):
        command("eos", tmp_path / "one.xyz", "--a", 3.9, 4.1)
    for atoms in frames:
        atoms.calc = None
    write(tmp_path / "bare.xyz", frames)
    with pytest.raises(StructureError, match="structure 0 carries no energy"):
        command("eos", tmp_path / "bare.xyz")


def test_eos_command_reads_labels(tmp_path, capsys):
    def snapshot(a, mesh, energy, family="crystal"):
        s = Structure.from_ase(bulk("Al", "fcc", a=a, cubic=True))
        meta = {"kpts": np.array([mesh] * 3), "engine": "toy", "family": family, **energy}
        return Snapshot(s, np.full((4, 4, 4), 12 / s.volume, np.float32), 12.0, meta)

    lengths = np.linspace(3.9, 4.2, 7)
    low, high = (birch_murnaghan(lengths**3 / 4, v0, -57.0, b / GPA, 4.5) for v0, b in ((16.4, 78), (16.6, 75)))
    snapshots = [snapshot(a, 2, {"free_energy_ev": 4 * e}) for a, e in zip(lengths, low, strict=True)]
    snapshots += [snapshot(a, 3, {"energy_free_hartree": 4 * e / HARTREE}) for a, e in zip(lengths, high, strict=True)]
    snapshots += [snapshot(4.05 + i / 100, 3, {"free_energy_ev": -200.0 - i}, "thermal") for i in range(6)]
    write_dataset(tmp_path / "al.h5", snapshots)
    command("eos", tmp_path / "al.h5", "--json")
    rows = json.loads(capsys.readouterr().out)
    assert ["2x2x2" in row["source"] for row in rows] == [True, False]
    assert [row["bulk_modulus"] for row in rows] == pytest.approx([78, 75], abs=0.01)
    assert [row["volume"] for row in rows] == pytest.approx([16.4, 16.6], abs=1e-4)
    write_dataset(tmp_path / "few.h5", snapshots[:3])
    with pytest.raises(DatasetError, match="no four labels of one kind"):
        command("eos", tmp_path / "few.h5")
    write_dataset(tmp_path / "bare.h5", [snapshot(4.0, 2, {})])
    with pytest.raises(DatasetError, match="snapshot 0 has no free energy"):
        command("eos", tmp_path / "bare.h5")


# -- with a real engine ---------------------------------------------------------------------------------------------


def test_energy_command_with_gpaw(al, tmp_path, capsys):
    """End to end: the file of a rough density against the ground state."""
    pytest.importorskip("gpaw.dft")
    settings = DFTSettings(cutoff=200.0, kmesh=KMesh())
    values = atomic_superposition(al, settings.fft_shape(al)).astype(np.float32)
    Density(Grid(values.shape, al.cell), al, values).write(tmp_path / "rho.h5")
    write(tmp_path / "al.extxyz", al.to_ase())
    command(
        "energy",
        tmp_path / "al.extxyz",
        tmp_path / "rho.h5",
        "--engine",
        "gpaw",
        "--cutoff",
        200,
        "--gamma",
        "--scf",
        "--json",
    )
    d = json.loads(capsys.readouterr().out)["differences"]
    assert 0.02 < d["density_l1"] < 0.3
    assert 0.01 < abs(d["free_energy_mha_per_atom"]) < 30
    assert abs(d["xc_mha_per_atom"]) > abs(d["free_energy_mha_per_atom"])
    with pytest.raises(EngineError, match="did not converge"):
        command(
            "energy", tmp_path / "al.extxyz", tmp_path / "rho.h5", "--engine", "gpaw", "--cutoff", 200, "--gamma",
            "--scf", "--max-iterations", 2,
        )  # fmt: skip
