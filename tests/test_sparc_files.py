"""Readers of SPARC's files, on recorded output."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from ase import units
from sparc_recorded import AL_CELL, unpack

from gpurho.dft.sparc_files import read_aimd, read_eigen, read_out, read_static
from gpurho.errors import (
    FormatError,
)
from gpurho.formats import read_density, snapshot_from_density_file
from gpurho.formats_sparc import read_inpt, read_ion, read_structure
from gpurho.units import BOHR, HARTREE


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The recorded files, unpacked."""
    return unpack(tmp_path_factory.mktemp("sparc"))


def test_structure(files):
    al = read_structure(files / "al32_m030.ion")
    np.testing.assert_allclose(al.cell, AL_CELL, atol=1e-12)
    assert al.numbers.tolist() == [13] * 32
    np.testing.assert_allclose(al.positions[1] / BOHR, [14.9537389735, 3.9710874633, 3.8843525691], atol=1e-12)
    sige = read_structure(files / "sige64_m045")
    assert sige.numbers.tolist() == [14] * 32 + [32] * 32
    np.testing.assert_allclose(sige.positions[32] / BOHR, [0.2753258805, 5.2249496389, 5.2248139934], atol=1e-12)
    assert read_ion(files / "sige64_m045.ion").pseudopotentials["Ge"] == "psps/32_Ge_14_2.2_2.3_pbe_n_v1.0.psp8"
    assert read_inpt(files / "al32_m030.inpt").values["MESH_SPACING"] == ("0.3",)
    # An echo of SPARC runs two keywords together in a line.
    assert read_out(files / "hf_rt25.out").values["OUTPUT_FILE"] == ("hf_rt25",)
    assert read_out(files / "hf_rt25.out").values["INPUT_DENS_FILE"] == ("al32_p0.0.dens",)


def test_cells_of_inpt(tmp_path):
    path = tmp_path / "x.inpt"
    rows = np.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.5, 0.0, 0.5]])
    body = "LATVEC: # a comment\n0.5 0.5 0.0\n0.0 0.5 0.5\n0.5 0.0 0.5\nBC: P P P\n"
    path.write_text("latvec_scale: 7 8 9\n" + body)
    np.testing.assert_allclose(read_inpt(path).cell, rows * [[7], [8], [9]] * BOHR)
    # CELL gives lengths along the vectors, whatever theirs are.
    path.write_text("CELL: 7 8 9\n" + body)
    np.testing.assert_allclose(np.linalg.norm(read_inpt(path).cell, axis=1), np.array([7, 8, 9]) * BOHR)
    path.write_text("CELL: 7 8 9\n")
    np.testing.assert_allclose(read_inpt(path).cell, np.diag([7, 8, 9]) * BOHR)
    path.write_text("MESH_SPACING: 0.3\n")
    assert read_inpt(path).cell is None


def test_ion_variants(tmp_path):
    """Fractions, keywords after the coordinates, constraints, spins, numbered types, comments."""
    path = tmp_path / "x.ion"
    path.write_text(
        "# two types\nATOM_TYPE: Si1\nN_TYPE_ATOM: 2\nCOORD_FRAC:\n0.5 0.25 0 # first\n0 0 1.0D-1\n"
        "RELAX:\n1 0 1\n1 1 1\nSPIN:\n1.0\n-1.0\nPSEUDO_POT: a.psp8\n"
        "\nATOM_TYPE: O\nPSEUDO_POT: b.psp8\nN_TYPE_ATOM: 1\nCOORD:\n1 2 3\n"
    )
    cell = np.array([[4.0, 0, 0], [1, 5, 0], [0, 1, 6]])
    atoms = read_ion(path)
    found = atoms.structure(cell)
    np.testing.assert_allclose(found.positions[:2], [[2.25, 1.25, 0], [0, 0.1, 0.6]])
    np.testing.assert_allclose(found.positions[2], np.array([1, 2, 3]) * BOHR)
    assert found.numbers.tolist() == [14, 14, 8]
    assert atoms.pseudopotentials == {"Si": "a.psp8", "O": "b.psp8"}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("ATOM_TYPE: Al", "ATOM_TYPE: Xy"), "'Xy', which is no element"),
        (("N_TYPE_ATOM: 32", "N_TYPE_ATOM: 31"), "more than the 31 atoms"),
        (("N_TYPE_ATOM: 32", "N_TYPE_ATOM: 33"), "whole|too early"),
        (("N_TYPE_ATOM: 32\n", ""), "before a positive N_TYPE_ATOM"),
        (("11.3510848050", "11.35x"), "'11.35x'"),
        ((" 7.1746501874", ""), "without three numbers"),
        (("COORD:", "POSITIONS:"), "no atoms"),
    ],
)
def test_damaged_ion(files, tmp_path, change, reason):
    path = tmp_path / "x.ion"
    path.write_text((files / "al32_m030.ion").read_text().replace(*change))
    with pytest.raises(FormatError, match=reason) as caught:
        read_ion(path)
    assert "\n" not in str(caught.value)


def test_density(files):
    """Its integral, its atoms, and the order of its axes, which the hollow cores of the pseudo-atoms show."""
    from gpurho.sections import interpolate

    found = read_density(files / "al32_m030.dens")
    atoms = read_structure(files / "al32_m030.ion")
    assert found.shape == (51, 51, 51)
    assert found.electrons == pytest.approx(96, rel=1e-7)
    np.testing.assert_allclose(found.grid.cell, AL_CELL, atol=1e-12)
    np.testing.assert_array_equal(found.structure.positions, atoms.positions)
    field = np.asarray(found.mean, dtype=float)
    assert field[0, 0, :2] * BOHR**3 == pytest.approx([1.007206e-03, 2.164073e-03], rel=1e-6)
    at = interpolate(field, found.grid, atoms.positions, 3)
    assert at.max() < 0.1 * field.mean()
    assert interpolate(field.transpose(2, 1, 0), found.grid, atoms.positions, 3).mean() > 1.5 * at.mean()
    snapshot = snapshot_from_density_file(files / "al32_m030.dens")
    assert snapshot.electrons == 96


def test_density_atoms_and_cells(files, tmp_path):
    """Where the atoms and the cell come from, with and without the files beside the density."""
    text = (files / "al32_m030.dens").read_text().split("\n")
    ion, inpt = (files / f"al32_m030.{suffix}" for suffix in ("ion", "inpt"))
    exact = read_structure(ion)
    path = tmp_path / "x.dens"
    path.write_text("\n".join(text))
    found = read_density(path)
    np.testing.assert_allclose(found.structure.positions, exact.positions, atol=1e-6)
    assert np.abs(found.structure.positions - exact.positions).max() > 0
    assert found.electrons == pytest.approx(96, rel=1e-7)
    # Without the lengths in the second line, as of older versions, the rounded steps are all there is.
    path.write_text("\n".join([text[0], "OUTER LOOP: X, MIDDLE LOOP: Y, INNER LOOP: Z.", *text[2:]]))
    assert 1e-7 < abs(read_density(path).electrons / 96 - 1) < 1e-5
    shutil.copy(inpt, tmp_path / "x.inpt")
    assert read_density(path).electrons == pytest.approx(96, rel=1e-7)
    # Positions of the first atom for all of them: the .ion sets them right.
    wrong = [*text[:6], *[text[6]] * 32, *text[38:]]
    path.write_text("\n".join(wrong))
    with pytest.raises(FormatError, match=r"put the \.ion"):
        read_density(path)
    shutil.copy(ion, tmp_path / "x.ion")
    np.testing.assert_array_equal(read_density(path).structure.positions, exact.positions)
    # After dynamics the atoms are no longer those of the .ion, and the header counts.
    path.write_text("\n".join(text))
    (tmp_path / "x.aimd").write_text("")
    moved = exact.positions + np.array([0.1, 0, 0])
    rows = [f"13 3.0 {' '.join(f'{v:.6f}' for v in row)}" for row in moved / BOHR]
    path.write_text("\n".join([*text[:6], *rows, *text[38:]]))
    np.testing.assert_allclose(read_density(path).structure.positions, moved, atol=1e-6)
    # Files of another calculation.
    (tmp_path / "x.inpt").write_text(inpt.read_text().replace("15.20000000", "15.21000000"))
    with pytest.raises(FormatError, match="grid that does not match the cell of"):
        read_density(path)
    shutil.copy(inpt, tmp_path / "x.inpt")
    shutil.copy(files / "sige64_m045.ion", tmp_path / "x.ion")
    with pytest.raises(FormatError, match="not those of"):
        read_density(path)


def test_out(files):
    al = read_out(files / "al32_m030.out")
    assert (al.version, al.shape, al.electrons, al.n_atoms) == ("December 03, 2025", (51, 51, 51), 96, 32)
    assert al.valence == {"Al": 3.0}
    np.testing.assert_allclose(al.cell, AL_CELL, atol=1e-12)
    (cycle,) = al.cycles
    assert (cycle.iterations, cycle.converged, cycle.residual) == (29, True, 6.349e-06)
    assert cycle.free_energy / HARTREE == pytest.approx(-73.719611371, abs=1e-9)
    assert cycle.xc / HARTREE == pytest.approx(-35.062039276, abs=1e-9)
    assert cycle.entropy_term / HARTREE == pytest.approx(-8.4587228598e-3, abs=1e-12)
    assert cycle.fermi_level / HARTREE == pytest.approx(0.19679356538, abs=1e-11)
    assert cycle.band / HARTREE == pytest.approx(3.3090893332, abs=1e-10)
    assert al.seconds == 285.817
    md = read_out(files / "al32_m040_md.out")
    assert [c.iterations for c in md.cycles][-2:] == [11, 12]
    assert len(md.cycles) == 6
    assert all(c.converged for c in md.cycles)
    one = read_out(files / "hf_rt25.out")
    assert not one.cycles[0].converged
    # The Harris-Foulkes energy at the density that the first step of the dynamics converged to.
    assert abs(one.cycles[0].free_energy - md.cycles[0].free_energy) / HARTREE / 32 < 5e-8
    assert abs(one.cycles[0].xc - md.cycles[0].xc) / HARTREE / 32 < 5e-8
    sige = read_out(files / "sige64_m045.out")
    assert sige.electrons == 32 * sige.valence["Si"] + 32 * sige.valence["Ge"] == 576


def test_static(files):
    al, atoms = read_static(files / "al32_m030.static"), read_structure(files / "al32_m030")
    np.testing.assert_allclose(al.fractions @ atoms.cell, atoms.positions, atol=1e-8)
    assert al.symbols == ("Al",) * 32
    assert al.free_energy / HARTREE == pytest.approx(-73.71961137138220, abs=1e-13)
    sizes = np.linalg.norm(al.forces, axis=1) / (HARTREE / BOHR)
    # As the .out says, which calls the average the root of the mean square.
    assert sizes.mean() == pytest.approx(1.3601598693e-02, rel=1e-8)
    assert sizes.max() == pytest.approx(3.0784634845e-02, rel=1e-8)
    sige = read_static(files / "sige64_m045.static")
    assert sige.symbols == ("Si",) * 32 + ("Ge",) * 32
    np.testing.assert_allclose(sige.forces.sum(axis=0), 0, atol=1e-8)
    assert read_static(files / "hf_rt25.static").forces is None


def test_eigen(files):
    found, out = read_eigen(files / "al32_m030.eigen"), read_out(files / "al32_m030.out")
    assert found.eigenvalues.shape == found.occupations.shape == (1, 62)
    assert found.electrons == pytest.approx(96, abs=1e-8)
    assert found.weights.tolist() == [1.0]
    assert found.eigenvalues[0, 0] / HARTREE == pytest.approx(-0.22138226187, abs=1e-12)
    # Fermi-Dirac at the level and the width that the .out names, and the energy of the bands.
    x = (found.eigenvalues - out.cycles[0].fermi_level) / HARTREE / 0.00200001251
    np.testing.assert_allclose(found.occupations, 2 / (1 + np.exp(x)), atol=1e-6)
    assert (found.occupations * found.eigenvalues).sum() == pytest.approx(out.cycles[0].band, abs=1e-5)


def test_eigen_of_k_points(files, tmp_path):
    text = (files / "al32_m030.eigen").read_text()
    head, _, block = text.partition("kred #1 = (0.000000,0.000000,0.000000)\nweight = 1.000000\n")
    path = tmp_path / "x.eigen"
    blocks = [
        f"kred #{i} = ({k},0.250000,-0.333333)\nweight = {w}\n{block}\n"
        for i, (k, w) in enumerate(((0.0, 0.037037), (0.125, 0.074074)), 1)
    ]
    path.write_text(head + "".join(blocks))
    found = read_eigen(path)
    np.testing.assert_allclose(found.kpoints, [[0, 0.25, -0.333333], [0.125, 0.25, -0.333333]])
    np.testing.assert_allclose(found.weights, [1 / 3, 2 / 3])
    assert found.electrons == pytest.approx(96, abs=1e-8)
    for wrong, reason in (
        (head + "".join(blocks).replace("weight = 0.037037\n", ""), "weights"),
        (head + blocks[0] + blocks[1][: len(blocks[1]) // 2].rpartition("\n")[0] + "\n", "different numbers of bands"),
        (head + "".join(blocks)[:-4], "ends within a line"),
        (head, "no k-points"),
        (text.replace("n        eigval", "Spin-up   Spin-down\nn        eigval"), "spin-polarised"),
    ):
        path.write_text(wrong)
        with pytest.raises(FormatError, match=reason):
            read_eigen(path)


def test_dynamics_is_read(files):
    steps, out = read_aimd(files / "al32_m040_md.aimd"), read_out(files / "al32_m040_md.out")
    start = read_structure(files / "al32_m040_md")
    assert [step.number for step in steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(steps[0].structure.positions, start.positions, atol=1e-9)
    assert [step.temperature for step in steps][:2] == [631.554, 629.67369829248]
    mass = 26.9815385 * units._amu
    for step, cycle in zip(steps, out.cycles, strict=True):
        assert step.free_energy == pytest.approx(cycle.free_energy, abs=2e-7)
        assert step.free_energy - step.internal_energy == pytest.approx(cycle.entropy_term, abs=2e-7)
        # SI by way of CODATA: (angstrom/fs)^2 is 1e10 (m/s)^2.
        kinetic = 0.5 * mass * (step.velocities**2).sum() * 1e10 / units._e
        assert step.kinetic_energy == pytest.approx(kinetic, rel=1e-6)
        # 31 of 32 atoms' worth of freedom: the centre of mass stands still.
        assert kinetic == pytest.approx(1.5 * 31 * units.kB * step.temperature, rel=1e-4)
        np.testing.assert_allclose(step.velocities.sum(axis=0), 0, atol=1e-7)
    largest = np.linalg.norm(steps[-1].forces, axis=1).max() / (HARTREE / BOHR)
    assert largest == pytest.approx(3.0592724519e-02, rel=1e-8)  # as the .out says
    # Velocity Verlet of 1 fs: the velocities are the differences of the positions.
    for before, here, after in zip(steps, steps[1:], steps[2:], strict=False):
        difference = (after.structure.positions - before.structure.positions) @ np.linalg.inv(AL_CELL)
        difference = (difference - np.round(difference)) @ AL_CELL / 2.0
        np.testing.assert_allclose(difference, here.velocities, atol=2e-6)


def test_damaged_dynamics(files, tmp_path):
    text = (files / "al32_m040_md.aimd").read_text()
    atoms = read_structure(files / "al32_m040_md")
    path = tmp_path / "x.aimd"
    third = text.index(":MDSTEP: 3")
    for cut in (third + 100, third + 3000, text.index(":MIND:", third) - 20, text.index(":MIND:", third)):
        path.write_text(text[:cut])
        with pytest.raises(FormatError, match="step 3 of 3"):
            read_aimd(path, atoms)
        assert [step.number for step in read_aimd(path, atoms, partial=True)] == [1, 2]
    path.write_text(text.replace("5.3232188899E-04", "5.32x", 1))
    with pytest.raises(FormatError, match=r"step 1 of 6: '5\.32x'"):
        read_aimd(path, atoms, partial=True)
    path.write_text(text.replace(":TWIST: 0", ":CELL: 15.2 15.2 15.2", 1))
    with pytest.raises(FormatError, match="cell moves"):
        read_aimd(path, atoms)
    path.write_text(text.split(":MDSTEP:")[0])
    with pytest.raises(FormatError, match="no steps"):
        read_aimd(path, atoms)
    path.write_text(text)
    with pytest.raises(FormatError, match=r"x\.ion|x\.inpt"):
        read_aimd(path)


@pytest.mark.parametrize(("suffix", "reader"), [("out", read_out), ("static", read_static), ("eigen", read_eigen)])
def test_damaged_outputs(files, tmp_path, suffix, reader):
    text = (files / f"al32_m030.{suffix}").read_text()
    path = tmp_path / f"x.{suffix}"
    cuts = [0, 60, len(text) // 3, len(text) // 2] + ([len(text) - 3] if suffix != "out" else [])
    for cut in cuts:
        # A cut at the end of a line of a table of one k-point leaves a table.
        path.write_text(text[:cut].rstrip("\n"))
        with pytest.raises(FormatError) as caught:
            reader(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(FormatError):
        reader(path)
    with pytest.raises(FormatError, match="check the name"):
        reader(tmp_path / "none")
