"""SPARC by files: its inputs by what the program would understand, and the engine on a stand-in."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from sparc_recorded import DATA, unpack

from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.engines import make_engine
from gpurho.dft.scratch import _make
from gpurho.dft.sparc import SparcEngine
from gpurho.dft.sparc_files import read_aimd, read_static
from gpurho.dft.sparc_inputs import Dynamics, inpt_text, ion_order, ion_text, read_psp8
from gpurho.errors import (
    ConvergenceError,
    EngineError,
    FormatError,
    MissingDependencyError,
    SettingsError,
    StructureError,
    UnknownSpeciesError,
)
from gpurho.formats import read_density
from gpurho.formats_sparc import read_inpt, read_structure
from gpurho.labelstore import label_key
from gpurho.structure import Structure
from gpurho.units import BOHR, HARTREE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The recorded files, unpacked."""
    return unpack(tmp_path_factory.mktemp("sparc"))


# -- inputs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def mixed():
    """Si and Al, not in order, in a triclinic cell; positions outside of it."""
    cell = np.array([[5.1, 0.3, 0.0], [0.4, 5.5, 0.2], [-0.3, 0.6, 6.0]])
    fractions = np.array([[0.1, 0.2, 0.3], [0.6, 0.7, 1.2], [0.4, -0.45, 0.8], [0.9, 0.1, 0.75]])
    return Structure(fractions @ cell, np.array([14, 13, 13, 14]), cell, np.array([True, True, True]))


def test_inputs_say_what_was_asked(mixed, tmp_path):
    settings = DFTSettings(kmesh=KMesh((2, 3, 4), (0.25, 0, 0.5)), grid=(20, 21, 24), smearing_hartree=0.003)
    (tmp_path / "x.inpt").write_text(inpt_text(mixed, settings))
    found = read_inpt(tmp_path / "x.inpt")
    np.testing.assert_allclose(found.cell, mixed.cell, atol=1e-12)
    for key, value in {
        "FD_GRID": "20 21 24",
        "KPOINT_GRID": "2 3 4",
        "KPOINT_SHIFT": "0.25 0 0.5",
        "SMEARING": "0.003",
        "ELEC_TEMP_TYPE": "fermi-dirac",
        "EXCHANGE_CORRELATION": "GGA_PBE",
        "PRINT_DENSITY": "1",
        "PRINT_EIGEN": "1",
        "PRINT_FORCES": "1",
        "BC": "P P P",
        "SPIN_TYP": "0",
    }.items():
        assert " ".join(found.values[key]) == value, key
    assert "MESH_SPACING" not in found.values
    assert "MD_FLAG" not in found.values
    (tmp_path / "x.ion").write_text(ion_text(mixed, {"Si": "Si.psp8", "Al": "Al.psp8"}))
    atoms = read_structure(tmp_path / "x")
    order = ion_order(mixed)
    assert order.tolist() == [0, 3, 1, 2]
    np.testing.assert_allclose(atoms.positions, mixed.positions[order], atol=1e-12)
    assert atoms.numbers.tolist() == [14, 14, 13, 13]
    # An even mesh with Gamma in it: the shift stands there, or SPARC would take half a step.
    text = inpt_text(mixed, DFTSettings(kmesh=KMesh((2, 2, 2)), grid=(20, 20, 20)))
    assert "KPOINT_SHIFT: 0 0 0\n" in text
    text = inpt_text(mixed, settings, spacing=0.3 * BOHR, more={"fd_order": 14})
    assert "MESH_SPACING: 0.3\n" in text
    assert "FD_GRID" not in text
    assert "FD_ORDER: 14\n" in text


def test_inputs_of_dynamics_and_one_shot(mixed, tmp_path):
    settings = DFTSettings(kmesh=KMesh(), grid=(20, 20, 20))
    path = tmp_path / "x.inpt"
    path.write_text(inpt_text(mixed, settings, dynamics=Dynamics(631.5, 20, 2.0, temperature_end=900, reseed=True)))
    values = {key: " ".join(words) for key, words in read_inpt(path).values.items()}
    assert values["MD_METHOD"] == "NVT_NH"
    assert (values["MD_NSTEP"], values["MD_TIMESTEP"], values["ION_VEL_DSTR_RAND"]) == ("20", "2", "1")
    assert (values["ION_TEMP"], values["ION_TEMP_END"]) == ("631.5", "900")
    path.write_text(inpt_text(mixed, settings, density="a.dens", one_shot=True))
    values = {key: " ".join(words) for key, words in read_inpt(path).values.items()}
    recorded = {key: " ".join(words) for key, words in read_inpt(DATA / "hf_rt25.inpt").values.items()}
    for key in ("READ_INIT_DENS", "MAXIT_SCF", "MINIT_SCF", "RHO_TRIGGER", "MIXING_VARIABLE", "PRINT_FORCES"):
        assert values[key] == recorded[key], key
    assert values["INPUT_DENS_FILE"] == "a.dens"
    with pytest.raises(SettingsError, match="needs a density"):
        inpt_text(mixed, settings, one_shot=True)
    with pytest.raises(SettingsError, match="temperature 0"):
        Dynamics(0, 10)
    with pytest.raises(SettingsError, match="timestep"):
        Dynamics(300, 10, np.nan)


# -- the engine -------------------------------------------------------------------------------------------------


def psp8(path, number, valence):
    path.write_text(f"{number}  ONCVPSP-3.3.0\n  {number}.0  {valence}.0  190101  zatom,zion,pspd\n  8 11 1 4 600 0\n")


@pytest.fixture
def setup(tmp_path, monkeypatch, files):
    """An engine that runs the stand-in, the structure of its recorded output, and what the stand-in saw."""
    pseudos = tmp_path / "with a space"
    pseudos.mkdir()
    psp8(pseudos / "13_Al_3_1.9_1.9_pbe_n_v1.0.psp8", 13, 3)
    psp8(pseudos / "Si.psp8", 14, 4)
    log = tmp_path / "log.json"
    fake = Path(__file__).parent / "fake_sparc.py"
    monkeypatch.setenv("GPURHO_SPARC", f"{sys.executable} {fake} {DATA} {log}")
    monkeypatch.delenv("SPARC_PSP_PATH", raising=False)
    monkeypatch.delenv("FAKE_SPARC", raising=False)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    engine = make_engine("sparc", pseudos=pseudos, scratch=scratch)
    atoms = read_structure(files / "al32_m030")
    settings = DFTSettings(kmesh=KMesh(), grid=(51, 51, 51), tolerance=1e-5)
    yield engine, atoms, settings, lambda: json.loads(log.read_text())
    assert not list(scratch.iterdir()), "a folder of the run was left behind"


def test_the_folder_of_a_killed_run_goes(setup):
    engine, atoms, settings, _ = setup
    left, lock = _make("sparc", engine.scratch)
    os.close(lock)  # as the system does
    engine.ground_state(atoms, settings)
    assert not left.exists()


def test_ground_state(setup, files):
    engine, atoms, settings, seen = setup
    label = engine.ground_state(atoms, settings)
    assert isinstance(engine, SparcEngine)
    assert label.engine == "SPARC December 03, 2025"
    assert label.electrons == 96
    assert label.density.mean() * atoms.volume == pytest.approx(96, abs=1e-10)
    np.testing.assert_allclose(label.density, read_density(files / "al32_m030.dens").mean, rtol=3e-7)
    energies = label.energies
    assert energies.free_energy / HARTREE == pytest.approx(-73.71961137138220, abs=1e-12)
    assert energies.energy - energies.free_energy == pytest.approx(0.5 * 8.4587228598e-3 * HARTREE, abs=1e-9)
    assert energies.weights.tolist() == [1.0]
    np.testing.assert_array_equal(label.forces, read_static(files / "al32_m030.static").forces)
    assert (label.iterations, label.settings.grid) == (29, (51, 51, 51))
    saw = seen()
    assert saw["inputs"]["FD_GRID"] == ["51", "51", "51"]
    assert saw["inputs"]["TOL_SCF"] == ["1e-05"]
    assert saw["threads"] == "1"
    np.testing.assert_allclose(saw["types"][0]["fractions"], atoms.positions / (15.2 * BOHR), atol=1e-13)
    assert "density" not in saw


def test_ground_state_from_a_density(setup):
    engine, atoms, settings, seen = setup
    grid = (30, 32, 36)
    x, y, _ = np.meshgrid(*(np.arange(n) / n * 2 * np.pi for n in grid), indexing="ij")
    density = (96 / atoms.volume) * 1.1 * (1 + 1.5 * np.cos(x) * np.cos(2 * y))
    engine.ground_state(atoms, settings, density)
    saw = seen()["density"]
    assert saw["counts"] == [51, 51, 51]
    np.testing.assert_allclose(saw["steps"], np.eye(3) * 15.2 / 51, atol=1e-11)
    assert saw["integral"] == pytest.approx(96, abs=1e-8)
    assert saw["smallest"] == 0
    assert seen()["inputs"]["READ_INIT_DENS"] == ["1"]
    assert seen()["inputs"]["MAXIT_SCF"] == ["100"]


def test_one_shot(setup):
    engine, atoms, _, seen = setup
    density = np.full((38, 38, 38), 96.5 / atoms.volume)
    found = engine.one_shot(atoms, density, DFTSettings(kmesh=KMesh(), grid=(38, 38, 38)))
    assert found.free_energy / HARTREE == pytest.approx(-73.72036450799942, abs=1e-12)
    assert found.xc / HARTREE == pytest.approx(-35.061772218, abs=1e-9)
    assert found.fermi_level / HARTREE == pytest.approx(0.19678621801, abs=1e-11)
    assert found.electrons_given == pytest.approx(96.5)
    assert found.electrons == 96
    assert found.eigenvalues.shape == (1, 62)
    saw = seen()
    assert saw["inputs"]["MAXIT_SCF"] == ["1"]
    assert saw["density"]["integral"] == pytest.approx(96, abs=1e-8)


def test_spacing(setup, tmp_path):
    _, atoms, settings, seen = setup
    coarse = SparcEngine(
        pseudos={"Al": tmp_path / "with a space" / "13_Al_3_1.9_1.9_pbe_n_v1.0.psp8"}, spacing=0.3 * BOHR
    )
    assert coarse.ground_state(atoms, settings).settings.grid == (51, 51, 51)
    assert seen()["inputs"]["MESH_SPACING"] == ["0.3"]
    assert "FD_GRID" not in seen()["inputs"]
    # A density must lie on SPARC's own grid, so that grid is then named.
    coarse.ground_state(atoms, settings, np.full((20, 20, 20), 96 / atoms.volume))
    assert seen()["inputs"]["FD_GRID"] == ["51", "51", "51"]
    assert seen()["density"]["counts"] == [51, 51, 51]
    with pytest.raises(SettingsError, match="spacing"):
        SparcEngine(pseudos=tmp_path, spacing=-1)


def test_the_label_of_a_structure_is_named_by_what_decides_it(setup, tmp_path):
    engine, atoms, settings, _ = setup
    file = tmp_path / "Al.psp8"
    psp8(file, 13, 3)
    names = [SparcEngine(pseudos={"Al": file}, spacing=spacing).identity(atoms) for spacing in (None, 0.2)]
    file.write_text(file.read_text() + " ")
    names.append(SparcEngine(pseudos={"Al": file}).identity(atoms))
    # The same file in another place is the same potential.
    assert engine.identity(atoms) == names[0]
    assert len({label_key(atoms, settings, name) for name in names}) == 3


def test_dynamics(setup, files):
    engine, atoms, settings, seen = setup
    run = engine.dynamics(atoms, settings, Dynamics(631.554, 6))
    want = read_aimd(files / "al32_m040_md.aimd")
    assert len(run.steps) == 6
    assert run.converged == (True,) * 6
    np.testing.assert_array_equal(run.steps[5].structure.positions, want[5].structure.positions)
    np.testing.assert_array_equal(run.steps[5].forces, want[5].forces)
    assert run.density.shape == (38, 38, 38)
    assert run.density.mean() * atoms.volume == pytest.approx(96, abs=1e-10)
    with pytest.raises(EngineError, match="6 of 7 steps"):
        engine.dynamics(atoms, settings, Dynamics(631.554, 7))
    assert seen()["inputs"]["MD_NSTEP"] == ["7"]
    assert seen()["inputs"]["ION_TEMP"] == ["631.554"]


def test_order_of_atoms_comes_back(mixed):
    """Rows of SPARC's order go back to the atoms that they belong to."""
    from gpurho.dft import sparc

    order = ion_order(mixed)
    rows = np.arange(12.0).reshape(4, 3)
    np.testing.assert_array_equal(sparc._unsorted(mixed, rows[order]), rows)


@pytest.mark.parametrize(
    ("fail", "error", "reason"),
    [
        ("crash", EngineError, r"exit code 1\): ERROR: Cannot read the pseudopotential!$"),
        ("silent", EngineError, r"exit code 0\): no output"),
        ("cut out", EngineError, "has no end"),
        ("cut static", EngineError, "static"),
        ("cut eigen", EngineError, "eigen"),
        ("cut dens", EngineError, "dens"),
        ("unconverged", ConvergenceError, r"Al32: no self-consistency in 29 steps \(residual 6.3e-06\)"),
    ],
)
def test_failures(setup, monkeypatch, fail, error, reason):
    engine, atoms, settings, _ = setup
    monkeypatch.setenv("FAKE_SPARC", fail)
    with pytest.raises(error, match=reason) as caught:
        engine.ground_state(atoms, settings)
    assert "\n" not in str(caught.value)


def test_output_of_other_atoms(setup):
    engine, atoms, settings, _ = setup
    moved = Structure(atoms.positions + np.array([0.001, 0, 0]), atoms.numbers, atoms.cell, atoms.pbc)
    with pytest.raises(EngineError, match="elsewhere"):
        engine.ground_state(moved, settings)
    wide = Structure(atoms.positions, atoms.numbers, atoms.cell * 1.01, atoms.pbc)
    with pytest.raises(EngineError, match="another cell"):
        engine.ground_state(wide, settings)
    fewer = Structure(atoms.positions[1:], atoms.numbers[1:], atoms.cell, atoms.pbc)
    with pytest.raises(EngineError, match="32 atoms and 96 electrons, the structure 31 and 93"):
        engine.ground_state(fewer, settings)
    with pytest.raises(EngineError, match="k-points"):
        engine.ground_state(atoms, DFTSettings(kmesh=KMesh((1, 1, 1), (0.5, 0, 0)), grid=(51, 51, 51)))


def test_structures_that_it_cannot_do(setup, tmp_path):
    engine, atoms, settings, _ = setup
    pseudos = tmp_path / "with a space"
    cell, pbc = atoms.cell, [True] * 3

    def refused(error, reason, positions=((1.0, 1, 1),), numbers=(13,), cell=cell, pbc=pbc):
        with pytest.raises(error, match=reason):
            engine.ground_state(Structure(np.array(positions), np.array(numbers), cell, np.array(pbc)), settings)

    refused(UnknownSpeciesError, "no psp8 file for Ge", numbers=(32,))
    refused(StructureError, "0.1 angstrom apart", positions=((1, 1, 1), (1.1, 1, 1)), numbers=(13, 13))
    refused(StructureError, "pbc", pbc=[True, True, False])
    refused(StructureError, "left-handed", cell=cell[[1, 0, 2]])
    refused(StructureError, "compact", cell=np.diag([4.0, 4, 90]))
    shutil.copy(pseudos / "Si.psp8", pseudos / "32_Ge_4.psp8")
    refused(EngineError, "pseudopotential of Si, not Ge", numbers=(32,))
    psp8(pseudos / "Ge.psp8", 32, 4)
    refused(EngineError, "several psp8 files for Ge", numbers=(32,))
    (pseudos / "14_Si_4.txt").write_text("not this one")
    (pseudos / "Si.psp8").write_text("nothing\n")
    refused(FormatError, "Si.psp8", numbers=(14,))
    with pytest.raises(StructureError, match="belong together"):
        engine.one_shot(atoms, np.full((20, 20, 20), 1.0), settings)


def test_psp8(tmp_path):
    psp8(tmp_path / "a.psp8", 32, 14)
    assert read_psp8(tmp_path / "a.psp8") == (32, 14.0)
    text = (tmp_path / "a.psp8").read_text()
    for wrong in (text.replace("  8 11", " 10 11"), text.replace("14.0", "99.0"), "", text.replace("32.0", "x")):
        (tmp_path / "a.psp8").write_text(wrong)
        with pytest.raises(FormatError, match=re.escape(str(tmp_path / "a.psp8"))):
            read_psp8(tmp_path / "a.psp8")


def test_what_is_missing_is_told(tmp_path, monkeypatch):
    for name in ("GPURHO_SPARC", "SPARC_PSP_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"'sparc' is not there; .*GPURHO_SPARC"):
        SparcEngine(pseudos=tmp_path)
    with pytest.raises(MissingDependencyError, match="/nowhere/sparc"):
        SparcEngine(pseudos=tmp_path, command="/nowhere/sparc -x")
    program = tmp_path / "sparc"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    with pytest.raises(EngineError, match="SPARC_PSP_PATH"):
        SparcEngine()
    with pytest.raises(EngineError, match="/nowhere is not there"):
        SparcEngine(pseudos="/nowhere")
    with pytest.raises(EngineError, match=r"Al, /nowhere/Al\.psp8"):
        SparcEngine(pseudos={"Al": "/nowhere/Al.psp8"})
    monkeypatch.setenv("SPARC_PSP_PATH", str(tmp_path))
    assert SparcEngine().command == [str(program)]
    assert SparcEngine(processes=4).command == ["mpirun", "-n", "4", str(program)]
