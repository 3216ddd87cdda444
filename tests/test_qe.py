"""Quantum ESPRESSO: files against its own tools, calculations against identities."""

from __future__ import annotations

import gzip
import io
import shutil
import stat
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.io.cube import read_cube
from scipy.ndimage import gaussian_filter

from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.occupations import band_terms, fermi_level
from gpurho.dft.qe import QeEngine
from gpurho.dft.qe_files import input_text, read_charge, read_result, replace_charge
from gpurho.dft.upf import upf_text
from gpurho.errors import ConvergenceError, EngineError, FormatError, MissingDependencyError
from gpurho.structure import Structure
from gpurho.units import BOHR, HARTREE

DATA = Path(__file__).parent / "data" / "qe"
VOLUME = 4.1 * 3.8 * 4.4
needs_pw = pytest.mark.skipif(shutil.which("pw.x") is None, reason="Quantum ESPRESSO is not installed")


@pytest.mark.parametrize("name", ["gamma", "k"])
def test_charge_density_is_what_their_own_tool_says(name):
    # A two-atom triclinic cell; the cube was written by pp.x from the same run, on its own grid.
    cube = read_cube(io.StringIO(gzip.decompress((DATA / f"{name}.cube.gz").read_bytes()).decode()))
    values = read_charge(DATA / f"{name}.dat", cube["data"].shape)
    np.testing.assert_allclose(values * BOHR**3, cube["data"], rtol=5.1e-5, atol=1e-8)
    assert values.mean() * VOLUME == pytest.approx(7, abs=1e-6)
    # The smallest grid and a larger one hold the same plane waves.
    small, large = read_charge(DATA / f"{name}.dat"), read_charge(DATA / f"{name}.dat", (18, 20, 24))
    np.testing.assert_allclose(large.mean(), small.mean(), rtol=1e-12)
    np.testing.assert_allclose((large**2).mean(), (small**2).mean(), rtol=1e-12)


@pytest.mark.parametrize("name", ["gamma", "k"])
def test_a_density_goes_into_their_file_and_comes_back(name, tmp_path):
    file = tmp_path / "charge-density.dat"
    shutil.copy(DATA / f"{name}.dat", file)
    grid = (14, 14, 16)
    first = read_charge(file, grid)
    other = first + 0.1 * np.cos(2 * np.pi * np.arange(14) / 14)[:, None, None] + 0.2
    replace_charge(file, other)
    np.testing.assert_allclose(read_charge(file, grid), other, atol=1e-12)
    assert file.stat().st_size == (DATA / f"{name}.dat").stat().st_size


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw[:-7], "cut short"),
        (lambda raw: b"", "0 records"),
        (lambda raw: b"not fortran at all, just some text", "cut short or no charge"),
        (lambda raw: raw[:12] + (2).to_bytes(4, "little") + raw[16:], "2 spin components"),
        (lambda raw: raw[:8] + (9999).to_bytes(4, "little") + raw[12:], "9999 plane waves"),
    ],
)
def test_a_damaged_charge_density_is_refused(tmp_path, change, words):
    file = tmp_path / "charge-density.dat"
    file.write_bytes(change((DATA / "k.dat").read_bytes()))
    with pytest.raises(FormatError, match=words):
        read_charge(file)


def test_results_of_a_run():
    # The figures are those that pw.x printed of these runs.
    gamma, k = read_result(DATA / "gamma.xml"), read_result(DATA / "k.xml")
    assert gamma.converged
    assert gamma.terms["etot"] == pytest.approx(-11.20232108 * HARTREE / 2, abs=1e-6)
    assert gamma.terms["demet"] == pytest.approx(-0.00570416 * HARTREE / 2, abs=1e-6)
    assert gamma.terms["etxc"] == pytest.approx(-3.58676748 * HARTREE / 2, abs=1e-6)
    assert gamma.fermi_level == pytest.approx(2.6073, abs=1e-4)
    np.testing.assert_allclose(
        gamma.forces[0], np.array([-0.09096728, 0.02286539, -0.00651090]) * HARTREE / 2 / BOHR, atol=1e-6
    )
    assert k.eigenvalues.shape[0] == 2
    assert gamma.version.startswith("6.")


@pytest.mark.parametrize("text", ["", "<a>", "<qes><output/></qes>"])
def test_a_damaged_result_is_refused(tmp_path, text):
    (tmp_path / "result.xml").write_text(text)
    with pytest.raises(FormatError, match=r"no whole result of pw\.x"):
        read_result(tmp_path / "result.xml")


def test_occupations_agree_with_the_run():
    for name, mesh in (("gamma", KMesh()), ("k", KMesh((1, 2, 1), (0.25, 0.25, 0.25)))):
        run = read_result(DATA / f"{name}.xml")
        weights, width = mesh.points()[1], 0.002 * HARTREE
        level = fermi_level(run.eigenvalues, weights, 7, width)
        band, entropy = band_terms(run.eigenvalues, weights, level, width)
        assert level == pytest.approx(run.fermi_level, abs=1e-6)
        assert band == pytest.approx(run.terms["eband"], abs=1e-5)
        assert entropy == pytest.approx(run.terms["demet"], abs=1e-6)
    with pytest.raises(EngineError, match="3 bands cannot hold 7"):
        fermi_level(run.eigenvalues[:, :3], weights, 7, width)


def test_the_input_names_everything():
    s = Structure.from_ase(bulk("Al", cubic=True, a=4.05))
    text = input_text(s, KMesh((1, 1, 2), (0.25, 0.5, 0)), {"Al": "Al.upf"}, {"control": {"tprnfor": True, "x": 1.5}})
    assert "tprnfor = .true." in text
    assert "x = 1.500000000000d+00" in text
    assert "Al 26.9815 Al.upf" in text
    assert "K_POINTS crystal\n2\n0.25" in text
    assert input_text(s, KMesh(), {"Al": "Al.upf"}, {}).endswith("K_POINTS gamma\n")


def test_a_missing_or_failing_program_is_said(tmp_path):
    with pytest.raises(MissingDependencyError, match="apt-get install quantum-espresso"):
        QeEngine(command=str(tmp_path / "pw.x"))
    program = tmp_path / "pw.x"
    program.write_text(
        "#!/bin/sh\necho '%%%%%%'\necho ' Error in routine readpp (2):'\necho ' file Al.upf not found'\nexit 3\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    s = Structure.from_ase(bulk("Al", cubic=True, a=4.05))
    with pytest.raises(EngineError, match=r"exit code 3.*readpp.*file Al.upf not found"):
        QeEngine(command=str(program), scratch=tmp_path).ground_state(s, DFTSettings())
    assert [p.name for p in tmp_path.iterdir()] == ["pw.x"], "the temporary folder stayed"


# -- calculations -------------------------------------------------------------------------------------------------


def rattled_al4():
    atoms = bulk("Al", cubic=True, a=4.05)
    atoms.rattle(0.1, seed=1)
    return Structure.from_ase(atoms)


def sige8():
    atoms = bulk("Si", "diamond", cubic=True, a=5.54)
    atoms.set_chemical_symbols(["Si", "Ge"] * 4)
    atoms.rattle(0.1, seed=2)
    return Structure.from_ase(atoms)


CASES = {
    "Al4, Gamma": (rattled_al4, DFTSettings(cutoff=300.0, kmesh=KMesh(), tolerance=1e-7)),
    "Al4, k": (rattled_al4, DFTSettings(cutoff=300.0, kmesh=KMesh((2, 2, 2), (0.25,) * 3), tolerance=1e-7)),
    "SiGe8": (sige8, DFTSettings(cutoff=250.0, kmesh=KMesh(), tolerance=1e-7)),
}


@needs_pw
@pytest.mark.parametrize("case", CASES)
def test_harris_energy_is_exact_at_the_ground_state_and_second_order_beside_it(case):
    make, settings = CASES[case]
    structure, engine = make(), QeEngine()
    # The finest grid: a coarser one would leave out plane waves that the energy knows.
    settings = replace(settings, grid=settings.fft_shape(structure))
    label = engine.ground_state(structure, settings)
    assert label.density.mean() * structure.volume == pytest.approx(label.electrons, abs=1e-6)
    at = engine.one_shot(structure, label.density, settings)
    per_atom = HARTREE * len(structure)
    assert abs(at.free_energy - label.energies.free_energy) / per_atom < 1e-6
    assert abs(at.xc - label.energies.xc) / per_atom < 1e-6
    assert at.fermi_level == pytest.approx(label.energies.fermi_level, abs=1e-4)

    bump = gaussian_filter(np.random.default_rng(0).normal(size=label.density.shape), 2, mode="wrap")
    # With a part along the density itself, so that the first order of the exchange energy is not small by chance.
    bump = bump / bump.std() + label.density / label.density.std()
    bump -= bump.mean()
    bump *= label.density.mean() / np.abs(bump).mean()
    sizes = np.array([0.02, 0.01, 0.005])
    moved = [engine.one_shot(structure, label.density + x * bump, settings) for x in sizes]
    total = np.array([m.free_energy for m in moved]) - label.energies.free_energy
    xc = np.array([m.xc for m in moved]) - label.energies.xc
    assert np.polyfit(np.log(sizes), np.log(np.abs(total)), 1)[0] == pytest.approx(2, abs=0.1)
    assert np.polyfit(np.log(sizes), np.log(np.abs(xc)), 1)[0] == pytest.approx(1, abs=0.1)


@needs_pw
def test_forces_are_the_slope_of_the_free_energy():
    settings = DFTSettings(cutoff=250.0, kmesh=KMesh((2, 1, 1), (0.25,) * 3), tolerance=1e-8)
    structure, engine, step = rattled_al4(), QeEngine(), 0.01
    force = engine.ground_state(structure, settings).forces[1, 2]
    energies = []
    for sign in (1, -1):
        positions = structure.positions.copy()
        positions[1, 2] += sign * step
        moved = Structure(positions, structure.numbers, structure.cell, structure.pbc)
        energies.append(engine.ground_state(moved, settings).energies.free_energy)
    assert -(energies[0] - energies[1]) / (2 * step) == pytest.approx(force, abs=2e-3)


@needs_pw
def test_the_given_density_is_rescaled_and_may_lie_on_another_grid():
    structure, engine = rattled_al4(), QeEngine()
    settings = DFTSettings(cutoff=200.0, kmesh=KMesh(), tolerance=1e-7)
    settings = replace(settings, grid=settings.fft_shape(structure))
    label = engine.ground_state(structure, settings)
    n = label.density.shape[0]
    fine = replace(settings, grid=(2 * n,) * 3)
    other = engine.ground_state(structure, fine)
    np.testing.assert_allclose(other.density[::2, ::2, ::2], label.density, atol=2e-5)
    scaled = engine.one_shot(structure, 1.05 * other.density, settings)
    assert scaled.electrons_given == pytest.approx(1.05 * 12)
    assert scaled.free_energy == pytest.approx(label.energies.free_energy, abs=1e-5)


@needs_pw
def test_a_metal_in_an_elongated_cell_gets_the_bands_it_takes():
    structure = Structure.from_ase(bulk("Al", cubic=True, a=4.05).repeat((3, 1, 1)))
    settings = DFTSettings(cutoff=150.0, kmesh=KMesh((1, 2, 2), (0.25,) * 3), tolerance=1e-5, forces=False)
    label = QeEngine().ground_state(structure, settings)
    e = label.energies
    occupied = 2 * e.weights @ (1 / (1 + np.exp((e.eigenvalues - e.fermi_level) / (0.002 * HARTREE)))).sum(axis=1)
    assert occupied == pytest.approx(36, abs=1e-3)
    harris = QeEngine().one_shot(structure, label.density, settings)
    assert harris.free_energy == pytest.approx(e.free_energy, abs=1e-3)


@needs_pw
def test_pseudopotentials_of_the_users(tmp_path):
    file = tmp_path / "mine.upf"
    file.write_text(upf_text("Al"))
    settings = DFTSettings(cutoff=150.0, kmesh=KMesh(), forces=False)
    structure, own = rattled_al4(), QeEngine(pseudos={"Al": file})
    energies = [e.ground_state(structure, settings).energies.free_energy for e in (QeEngine(), own)]
    assert energies[0] == pytest.approx(energies[1], abs=1e-9)
    assert QeEngine().identity(structure) == "qe" != own.identity(structure)
    # Their valence counts, not that of the table.
    file.write_text(upf_text("Si"))
    assert QeEngine(pseudos={"Al": file})._electrons(structure) == 16
    with pytest.raises(EngineError, match="cannot be read"):
        QeEngine(pseudos={"Al": tmp_path / "none.upf"})
    file.write_text("text")
    with pytest.raises(EngineError, match="names no z_valence"):
        QeEngine(pseudos={"Al": file})


@needs_pw
def test_left_handed_cells_and_atoms_outside_change_nothing():
    structure = rattled_al4()
    settings = DFTSettings(cutoff=150.0, kmesh=KMesh((1, 1, 2), (0.25, 0, 0.25)), tolerance=1e-7)
    label = QeEngine().ground_state(structure, settings)
    swapped = Structure(
        structure.positions + structure.cell[1] * 2, structure.numbers, structure.cell[[0, 2, 1]], [1, 1, 1]
    )
    other = QeEngine().ground_state(swapped, replace(settings, kmesh=KMesh((1, 2, 1), (0.25, 0.25, 0))))
    assert other.energies.free_energy == pytest.approx(label.energies.free_energy, abs=1e-5)
    np.testing.assert_allclose(other.density, label.density.transpose(0, 2, 1), atol=1e-5)
    np.testing.assert_allclose(other.forces, label.forces, atol=1e-3)


@needs_pw
def test_no_self_consistency_is_an_error():
    with pytest.raises(ConvergenceError, match="no self-consistency in 2 steps"):
        QeEngine().ground_state(rattled_al4(), DFTSettings(cutoff=200.0, kmesh=KMesh(), max_iterations=2))


@needs_pw
def test_a_label_changes_little_with_more_plane_waves():
    structure, engine = rattled_al4(), QeEngine()
    mesh = KMesh((2, 2, 2), (0.25,) * 3)
    low = DFTSettings(cutoff=400.0, kmesh=mesh, grid=(30, 30, 30), forces=False)
    labels = [engine.ground_state(structure, s).density for s in (low, replace(low, cutoff=600.0))]
    assert np.abs(labels[0] - labels[1]).sum() / labels[1].sum() < 3e-3
