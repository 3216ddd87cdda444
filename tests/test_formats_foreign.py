"""Density files as other programs write them, and their errors."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest
from foreign_texts import SHAPE, TEXTS, VOLUME, check, chgcar_text, closed_form, cube_text, xsf_text
from predict_tools import TRICLINIC, triclinic_structure

from gpurho.errors import FormatError
from gpurho.formats import read_density, snapshot_from_density_file
from gpurho.structure import Structure
from gpurho.units import BOHR


@pytest.fixture(scope="module")
def structure():
    return triclinic_structure()


@pytest.fixture(scope="module")
def values():
    return closed_form()


# -- cube -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outside", [False, True])
@pytest.mark.parametrize("unit", [BOHR, 1.0], ids=["bohr", "angstrom"])
def test_cube_as_pp_writes_it(tmp_path, values, structure, unit, outside):
    path = tmp_path / "rho.cube"
    path.write_text(cube_text(values, structure, unit, outside))
    check(read_density(path), values, structure, outside)
    # Five numbers in the head: one value a point.
    path.write_text(cube_text(values, structure, unit, outside, head="0.0 0.0 0.0 1"))
    check(read_density(path), values, structure, outside)


def test_cube_of_orbitals_is_refused(tmp_path, values, structure):
    path = tmp_path / "rho.cube"
    for text in (cube_text(values, structure, head="0 0 0 2"), cube_text(values, structure).replace("3 0.0", "-3 0.0")):
        path.write_text(text)
        with pytest.raises(FormatError, match="orbitals"):
            read_density(path)


@pytest.mark.parametrize("new", ["-6", "0"])
def test_cube_of_odd_counts_is_refused(tmp_path, values, structure, new):
    path = tmp_path / "rho.cube"
    lines = cube_text(values, structure).split("\n")
    lines[3] = re.sub(r"^6 ", f"{new} ", lines[3])
    path.write_text("\n".join(lines))
    with pytest.raises(FormatError, match="grid points"):
        read_density(path)


# -- CHGCAR -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scale", "cell", "mode"),
    [
        ("1.0", TRICLINIC, "Direct"),
        ("2.0", TRICLINIC / 2, "Direct"),
        ("2.0", TRICLINIC / 2, "Cartesian"),
        (repr(-float(VOLUME)), TRICLINIC * 0.3, "direct"),
        ("2.0 4.0 0.5", TRICLINIC / [2.0, 4.0, 0.5], "Direct"),
        ("1.0", TRICLINIC, "Selective dynamics/Direct"),
    ],
)
def test_chgcar_scales_and_modes(tmp_path, values, structure, scale, cell, mode):
    path = tmp_path / "CHGCAR"
    path.write_text(chgcar_text(values, structure, scale, cell, mode))
    order = np.argsort(structure.numbers)
    check(read_density(path), values, Structure(structure.positions[order], [13, 14, 14], TRICLINIC, [True] * 3))


def test_chgcar_with_spin_gives_the_total(tmp_path, values, structure):
    from pymatgen.core import Lattice
    from pymatgen.core import Structure as Crystal
    from pymatgen.io.vasp import Chgcar, Poscar

    fractions = structure.positions @ np.linalg.inv(TRICLINIC)
    crystal = Crystal(Lattice(TRICLINIC), ["Al", "Si", "Si"], fractions[[1, 0, 2]])
    augmentation = ["augmentation occupancies   1   8\n", " 0.1 0.2 0.3 0.4 0.5\n", " 0.6 0.7 0.8\n"]
    chgcar = Chgcar(
        Poscar(crystal),
        {"total": values * VOLUME, "diff": 0.2 * values[::-1] * VOLUME},
        data_aug={"total": augmentation, "diff": augmentation},
    )
    path = tmp_path / "CHGCAR"
    chgcar.write_file(str(path))
    text = path.read_text()
    assert text.count("augmentation") == 2
    np.testing.assert_allclose(read_density(path).mean, values, rtol=1e-6)
    # As VASP writes it without augmentation, with the moments of the atoms between the blocks.
    total, _, diff = text.partition("augmentation")
    diff = diff[re.search(r"^\s*6\s+5\s+7\s*$", diff, re.MULTILINE).start() :]
    path.write_text(f"{total}  0.1000E+01  0.5000E+00 -0.5000E+00\n  {diff}")
    np.testing.assert_allclose(read_density(path).mean, values, rtol=1e-6)
    # A last line of three numbers more is no block of anything.
    path.write_text(f"{total}  0.1000E+01  0.5000E+00 -0.5000E+00\n")
    with pytest.raises(FormatError, match="more than the 210 values"):
        read_density(path)


def test_chgcar_without_elements(tmp_path, values, structure):
    path = tmp_path / "CHGCAR"
    path.write_text(chgcar_text(values, structure).replace("Al Si\n", ""))
    with pytest.raises(FormatError, match="VASP 5"):
        read_density(path)
    path.write_text(chgcar_text(values, structure).replace("1 2\n", "3\n"))
    with pytest.raises(FormatError, match="1 counts of atoms for 2"):
        read_density(path)


class Fortran:
    """As Fortran prints when the exponent leaves no room for its letter."""

    def format(self, value):
        mantissa, exponent = f"{value:.11E}".split("E")
        return f"{mantissa}{int(exponent):+04d}"


@pytest.mark.parametrize("form", [Fortran(), "D"], ids=["no letter", "letter D"])
def test_exponents_of_fortran(tmp_path, values, structure, form):
    path = tmp_path / "CHGCAR"
    tiny = values.copy()
    tiny[0, 0, 0] = 1e-30 / VOLUME
    text = chgcar_text(tiny, structure, form=Fortran())
    assert "1.00000000000-030" in text
    if form == "D":
        text = chgcar_text(tiny, structure)
        head, grid, body = text.partition(" ".join(map(str, SHAPE)) + "\n")
        text = head + grid + body.replace("E", "D")
        assert "D-30" in text
    path.write_text(text)
    np.testing.assert_allclose(read_density(path).mean, tiny, rtol=1e-6)


# -- xsf --------------------------------------------------------------------------------------------------------


def test_xsf_of_bohr_and_angstrom(tmp_path, values, structure):
    path = tmp_path / "rho.xsf"
    path.write_text(xsf_text(values * BOHR**3, structure))
    check(read_density(path), values, structure)
    path.write_text(xsf_text(values * BOHR**3, structure, repeat=False))
    check(read_density(path), values, structure)
    path.write_text(xsf_text(values, structure, unit="rho_in_e/Ang^3"))
    check(read_density(path), values, structure)
    path.write_text(xsf_text(values, structure))
    check(read_density(path, unit="e/angstrom^3"), values, structure)
    with pytest.raises(FormatError, match="unit 'e/nm"):
        read_density(path, unit="e/nm^3")


def test_xsf_of_ase_is_read(tmp_path, values, structure):
    from ase.io.xsf import write_xsf

    path = tmp_path / "rho.xsf"
    full = np.pad(values, [(0, 1)] * 3, mode="wrap")
    with open(path, "w") as file:
        write_xsf(file, [structure.to_ase()], full, origin=np.zeros(3), span_vectors=TRICLINIC)
    found = read_density(path, unit="e/angstrom^3")
    np.testing.assert_allclose(found.mean, values, atol=1e-6)
    np.testing.assert_allclose(found.structure.positions, structure.positions, atol=1e-12)


def test_xsf_of_a_molecule(tmp_path, values, structure):
    """Without a cell, the cell is that of the grid, and nothing is taken for a repetition."""
    path = tmp_path / "rho.xsf"
    text = xsf_text(values * BOHR**3, structure, repeat=False)
    start, stop = text.index("PRIMVEC"), text.index("3 1\n")
    path.write_text("MOLECULE\nATOMS\n" + text[stop + 4 :])
    assert start < stop
    found = read_density(path)
    np.testing.assert_allclose(found.mean, values, rtol=1e-6)
    np.testing.assert_allclose(found.grid.cell, TRICLINIC, atol=1e-7)
    assert found.grid.pbc == (False, False, False)


def test_xsf_whose_grid_is_not_that_of_its_cell(tmp_path, values, structure):
    path = tmp_path / "rho.xsf"
    path.write_text(xsf_text(values, structure, vectors=TRICLINIC * 1.01))
    with pytest.raises(FormatError, match="does not match its atoms' cell"):
        read_density(path)
    # Axes in another order are another grid.
    path.write_text(xsf_text(values, structure, vectors=TRICLINIC[[1, 0, 2]]))
    with pytest.raises(FormatError, match="does not match its atoms' cell"):
        read_density(path)
    path.write_text(xsf_text(values, structure, repeat=False, vectors=TRICLINIC))
    with pytest.raises(FormatError, match="does not repeat its first plane"):
        read_density(path)


def test_xsf_of_something_else(tmp_path, values, structure):
    path = tmp_path / "rho.xsf"
    text = xsf_text(values, structure)
    for wrong, reason in (
        ("ANIMSTEPS 3\n" + text, "several structures"),
        (text.split("BEGIN_BLOCK")[0], "no data grid"),
        (text + text[text.index("BEGIN_BLOCK") :], "more than one data grid"),
        ("MOLECULE\n" + text[text.index("BEGIN_BLOCK") :], "no atoms"),
        ("hello\n" + text, "'hello'"),
    ):
        path.write_text(wrong)
        with pytest.raises(FormatError, match=reason):
            read_density(path)


# -- all of them ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_lines_of_windows(tmp_path, values, structure, name):
    path = tmp_path / name
    text = TEXTS[name](values, structure)
    path.write_bytes(text.encode())
    want = np.asarray(read_density(path).mean)
    path.write_bytes(text.replace("\n", "\r\n").encode())
    np.testing.assert_array_equal(read_density(path).mean, want)


@pytest.mark.parametrize("name", TEXTS)
def test_wrong_counts(tmp_path, values, structure, name):
    path = tmp_path / name
    text = TEXTS[name](values, structure)
    last = text.rindex("E") if name != "rho.xsf" else text.rindex("\nEND_DATAGRID") - 4
    start, stop = max(text.rindex(" ", 0, last), text.rindex("\n", 0, last)), text.index("\n", last)
    for wrong, reason in (
        (text[:start] + text[stop:], r"of (210|336)|where"),
        (text[:stop] + text[start:stop] + text[stop:], "more than|goes on"),
        (text[:stop] + "\n" + text[start:stop] + text[stop:], "more than|goes on|should end"),
        (text[:start] + " NaN" + text[stop:], "not finite"),
        (text[:start] + " 1e400" + text[stop:], "not finite"),
        (text[:start] + " *****" + text[stop:], r"\*\*\*"),
        (text[: stop - 1], "of (210|336)|ends|cut|where|whole"),
    ):
        path.write_text(wrong)
        with pytest.raises(FormatError, match=reason) as caught:
            read_density(path)
        assert "\n" not in str(caught.value)
        assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", TEXTS)
def test_foreign_bytes(tmp_path, name):
    path = tmp_path / name
    rng = np.random.default_rng(0)
    for text in (rng.bytes(3000), b"", b"\n" * 50, b"1\n" * 500, b"\xff\xfe\x00" * 99, b"Al 1 2 3\n" * 60):
        path.write_bytes(text)
        with pytest.raises(FormatError) as caught:
            read_density(path)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300 + len(str(path))


def test_counts_beyond_all_memory(tmp_path, values, structure):
    path = tmp_path / "rho.cube"
    lines = cube_text(values, structure).split("\n")
    lines[3:6] = [re.sub(r"^\d+", "1000000", line) for line in lines[3:6]]
    path.write_text("\n".join(lines))
    with pytest.raises(FormatError, match="not whole"):
        read_density(path)


# -- Quantum ESPRESSO -------------------------------------------------------------------------------------------


@pytest.mark.skipif(not (shutil.which("pw.x") and shutil.which("pp.x")), reason="Quantum ESPRESSO is not installed")
def test_files_of_quantum_espresso(tmp_path):
    """One density of pw.x, through pp.x as cube and as xsf: the same field, with the electrons that went in."""
    from gpurho.dft.upf import upf_text

    cell = np.array([[0.1, 2.7, 2.75], [2.8, 0.0, 2.7], [2.7, 2.9, 0.2]])
    (tmp_path / "Si.upf").write_text(upf_text("Si"))
    fractions = np.array([[0.02, 0.0, 0.01], [0.26, 0.24, 0.27]])
    lines = ["&control", "prefix='x', outdir='.', pseudo_dir='.'", "/", "&system"]
    lines += ["ibrav=0, nat=2, ntyp=1, ecutwfc=12, nosym=.true.", "/", "&electrons", "/", "ATOMIC_SPECIES"]
    lines += ["Si 28.085 Si.upf", "CELL_PARAMETERS angstrom", *(" ".join(map(str, row)) for row in cell)]
    lines += ["ATOMIC_POSITIONS crystal", *("Si " + " ".join(map(str, row)) for row in fractions), "K_POINTS gamma"]
    (tmp_path / "pw.in").write_text("\n".join(lines) + "\n")
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}

    def run(program, name):
        done = subprocess.run([program, "-in", name], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-500:]

    run("pw.x", "pw.in")
    for number, name in ((5, "rho.xsf"), (6, "rho.cube")):
        text = f"&inputpp\nprefix='x', outdir='.', filplot='f', plot_num=0\n/\n&plot\niflag=3, output_format={number},"
        (tmp_path / "pp.in").write_text(f"{text} fileout='{name}'\n/\n")
        run("pp.x", "pp.in")
    cube, xsf = read_density(tmp_path / "rho.cube"), read_density(tmp_path / "rho.xsf")
    for found in (cube, xsf):
        assert found.electrons == pytest.approx(8, abs=2e-4)
        np.testing.assert_allclose(found.structure.cell, cell, atol=1e-5)
        off = found.structure.positions @ np.linalg.inv(cell) - fractions
        np.testing.assert_allclose(off, np.round(off), atol=1e-5)
    assert cube.shape == xsf.shape
    np.testing.assert_allclose(cube.mean, xsf.mean, rtol=6e-5, atol=2e-6)
    assert snapshot_from_density_file(tmp_path / "rho.xsf").electrons == 8
