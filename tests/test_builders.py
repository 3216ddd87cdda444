"""Example structures."""

from __future__ import annotations

import argparse
from importlib.resources import files

import numpy as np
import pytest
from ase.io import read, write

from gpurho import builders
from gpurho.errors import FormatError, GpurhoError, OutputExistsError, SettingsError, StoreError, StructureError
from gpurho.pipelines import build
from gpurho.structure import Structure


def test_vacancy():
    atoms = builders.crystal("Al", (2, 2, 2), a=4.05)
    hole = builders.vacancy(atoms)
    assert len(hole) == len(atoms) - 1 == 31
    gone = [p for p in atoms.positions if np.linalg.norm(hole.positions - p, axis=1).min() > 1]
    np.testing.assert_allclose(gone, [[4.05, 4.05, 4.05]])
    np.testing.assert_array_equal(builders.vacancy(atoms, 3).positions[3], atoms.positions[4])
    with pytest.raises(StructureError, match="atom 32"):
        builders.vacancy(atoms, 32)
    with pytest.raises(StructureError, match="two atoms"):
        builders.vacancy(atoms[:1])


def test_divacancy():
    atoms = builders.crystal("Al", (3, 3, 3), a=4.05)
    for index in (None, 0, -1, 40):  # 0 and -1 lie at the faces, so that the neighbour may be an image
        holes = builders.divacancy(atoms, index)
        assert len(holes) == 106
        gone = np.flatnonzero([np.linalg.norm(holes.positions - p, axis=1).min() > 1 for p in atoms.positions])
        assert len(gone) == 2
        assert index is None or index % 108 in gone
        assert atoms.get_distance(*gone, mic=True) == pytest.approx(4.05 / np.sqrt(2))
    assert len(atoms) == 108, "the input stays as it was"
    apart = builders.divacancy(atoms, 0, 50)
    np.testing.assert_array_equal(apart.positions, np.delete(atoms.positions, [0, 50], axis=0))
    with pytest.raises(StructureError, match="partner 3 is atom 3 itself"):
        builders.divacancy(atoms, 3, 3)
    with pytest.raises(StructureError, match="atom 108"):
        builders.divacancy(atoms, 0, 108)
    with pytest.raises(StructureError, match="three atoms"):
        builders.divacancy(atoms[:2])


def test_supercell():
    atoms = builders.crystal("Al", (1, 1, 1), a=4.0)
    assert len(builders.supercell(atoms, (1, 2, 3))) == 24
    matrix = [[1, 1, 0], [-1, 1, 0], [0, 0, 2]]
    turned = builders.supercell(atoms, matrix)
    assert len(turned) == 16
    np.testing.assert_allclose(turned.cell.array, 4.0 * np.array(matrix), atol=1e-12)
    Structure.from_ase(turned).check_overlaps(2.8)
    assert turned.info["family"] == "al-crystal"
    for bad in ((0, 1, 1), (1.5, 1, 1), (1, 1), np.zeros((3, 3)), (-1, -1, 1)):
        with pytest.raises(StructureError, match="no supercell"):
            builders.supercell(atoms, bad)
    with pytest.raises(StructureError, match="atoms are more than"):
        builders.supercell(atoms, (10_000, 10_000, 10_000))


def test_family_is_that_of_the_last_builder():
    crystal = builders.crystal("Al", (2, 2, 2))
    assert crystal.info["family"] == "al-crystal"
    assert builders.vacancy(crystal).info["family"] == "al-vacancy"
    assert builders.divacancy(crystal).info["family"] == "al-divacancy"
    assert builders.strained(crystal, 0.01).info["family"] == "al-strained"
    assert builders.slab(crystal).info["family"] == "al-slab"
    assert builders.rattled(builders.vacancy(crystal)).info["family"] == "al-vacancy"
    alloy = builders.alloy({"Ge": 0.5, "Si": 0.5})
    assert alloy.info["family"] == "sige-alloy"
    assert builders.vacancy(alloy).info["family"] == "sige-vacancy"
    assert crystal.info["family"] == "al-crystal", "the input stays as it was"


def test_strained():
    atoms = builders.crystal("Al", (1, 1, 1), a=4.0)
    np.testing.assert_allclose(builders.strained(atoms, 0.01).cell.lengths(), 4.04)
    np.testing.assert_allclose(builders.strained(atoms, [0.01, 0, -0.02]).cell.lengths(), [4.04, 4.0, 3.92])
    shear = np.array([[0, 0.1, 0], [0, 0, 0], [0, 0, 0]])
    sheared = builders.strained(atoms, shear)
    np.testing.assert_allclose(sheared.cell.array[1], [0.4, 4, 0])
    np.testing.assert_allclose(sheared.positions, atoms.positions @ (np.eye(3) + shear).T)
    for bad in (-1.0, np.ones((2, 2)), np.nan):
        with pytest.raises(StructureError, match="strain"):
            builders.strained(atoms, bad)


def test_random_alloy():
    atoms = builders.crystal("Si", (2, 2, 2))
    alloy = builders.random_alloy(atoms, {"Si": 0.25, "Ge": 0.75}, seed=1)
    assert alloy.get_chemical_symbols().count("Ge") == 48
    assert (
        alloy.get_chemical_symbols()
        == builders.random_alloy(atoms, {"Si": 0.25, "Ge": 0.75}, seed=1).get_chemical_symbols()
    )
    assert len(set(alloy.get_chemical_symbols()[:20])) == 2, "mixed, not in blocks"
    for bad in ({"Si": 0.5}, {}, {"Si": np.nan, "Ge": 0.5}, {"Si": 1.5, "Ge": -0.5}):
        with pytest.raises(StructureError, match="sum to 1"):
            builders.random_alloy(atoms, bad)
    with pytest.raises(StructureError, match="'Qq' is no element"):
        builders.random_alloy(atoms, {"Si": 0.5, "Qq": 0.5})
    with pytest.raises(StructureError, match="seed -1"):
        builders.random_alloy(atoms, {"Si": 1.0}, seed=-1)


@pytest.mark.parametrize(("x", "n_silicon"), [(0.4, 26), (0.45, 29), (0.5, 32), (0.55, 35), (0.6, 38)])
def test_alloy_of_silicon_and_germanium(x, n_silicon):
    alloy = builders.alloy({"Si": x, "Ge": 1 - x}, (2, 2, 2), seed=3)
    assert len(alloy) == 64
    assert alloy.get_chemical_symbols().count("Si") == n_silicon
    a = 5.43 * x + 5.66 * (1 - x)
    np.testing.assert_allclose(alloy.cell.lengths(), 2 * a)
    assert builders.vegard({"Si": x, "Ge": 1 - x}) == pytest.approx(a)
    Structure.from_ase(alloy).check_overlaps(np.sqrt(3) / 4 * a - 1e-6)
    other = builders.alloy({"Si": x, "Ge": 1 - x}, (2, 2, 2), seed=4)
    assert other.get_chemical_symbols() != alloy.get_chemical_symbols()


def test_alloy_on_another_lattice():
    assert len(builders.alloy({"Al": 0.25, "Cu": 0.75}, (1, 1, 1), lattice="fcc")) == 4
    with pytest.raises(StructureError, match="Al is not diamond"):
        builders.alloy({"Al": 0.5, "Si": 0.5})
    assert builders.alloy({"Al": 0.5, "Si": 0.5}, a=5.5).cell.lengths()[0] == pytest.approx(11.0)


def test_slab():
    slab = builders.slab(builders.crystal("Al", (1, 1, 2), a=4.05), vacuum=7.0)
    assert slab.pbc.tolist() == [True, True, False]
    assert slab.positions[:, 2].min() == pytest.approx(7)
    assert slab.cell[2, 2] - slab.positions[:, 2].max() == pytest.approx(7)
    with pytest.raises(StructureError, match="vacuum"):
        builders.slab(slab, vacuum=-1)


def test_rattled():
    atoms = builders.crystal("Al", (3, 3, 3), a=4.05)
    moved = builders.rattled(atoms, 0.1, seed=2).positions - atoms.positions
    assert moved.std() == pytest.approx(0.1, rel=0.1)
    with pytest.raises(StructureError, match="std"):
        builders.rattled(atoms, -0.1)


def test_crystal_that_is_not_known():
    for symbol in ("Xx", "Mg", "H", ""):
        with pytest.raises(StructureError, match=f"crystal of '{symbol}'"):
            builders.crystal(symbol)
    with pytest.raises(StructureError, match="crystal of 'Al'"):
        builders.crystal("Al", lattice="nonsense")
    with pytest.raises(StructureError, match="a 0 is not a length"):
        builders.crystal("Al", a=0)


def test_shipped_example():
    path = files("gpurho") / "data" / "al_vacancy.xyz"
    atoms = read(str(path))
    structure = Structure.from_ase(atoms)
    assert len(structure) == 107
    assert structure.symbols == ("Al",)
    assert structure.pbc.all()
    structure.check_overlaps(2.0)


# -- the command --------------------------------------------------------------------------------------------------


@pytest.fixture
def gpurho_build(tmp_path, monkeypatch, capsys):
    """Runs ``gpurho build`` in an empty folder; returns the line that it prints."""
    monkeypatch.chdir(tmp_path)
    parser = argparse.ArgumentParser()
    build.add_parser(parser.add_subparsers())

    def run(*arguments: str) -> str:
        options = parser.parse_args(["build", *arguments])
        options.run(options)
        line = capsys.readouterr().out
        assert line.count("\n") == 1
        return line.strip()

    return run


@pytest.mark.parametrize(
    ("arguments", "family", "n_atoms"),
    [
        ("al-crystal", "al-crystal", 108),
        ("al-vacancy", "al-vacancy", 107),
        ("al-divacancy", "al-divacancy", 106),
        ("al-strained", "al-strained", 108),
        ("al-edge", "al-edge", 228),
        ("al-screw", "al-screw", 144),
        ("al-tilt-gb", "al-tilt-gb", 76),
        ("sige-alloy", "sige-alloy", 64),
        ("crystal Cu --repeat 1 1 2", "cu-crystal", 8),
        ("vacancy --vacancies 2 --repeat 2 2 2 --index 0", "al-divacancy", 30),
        ("strained Al --strain -0.05 0 0.05 --repeat 1 1 1", "al-strained", 4),
        ("alloy --fractions Al=0.25 Cu=0.75 --lattice fcc --repeat 1 1 1", "alcu-alloy", 4),
        ("edge Al --size 28 14 --length 10 --poisson 0.3", "al-edge", 228),
        ("screw Al --radius 12 --vacuum 5", "al-screw", None),
        ("tilt-gb Al --plane 3 1 0 --width 12 --depth 8 --gap 0.2 --shift 0 0.5", "al-tilt-gb", None),
    ],
)
def test_build(gpurho_build, arguments, family, n_atoms):
    line = gpurho_build(*arguments.split(), "--a", "4.05")
    atoms = read(f"{family}.xyz")
    assert atoms.info["family"] == family
    assert n_atoms in (None, len(atoms))
    assert line.startswith(f"{family}.xyz: {len(atoms)} atoms (")
    for length in atoms.cell.lengths():
        assert f"{length:.3f}" in line


def test_build_says_what_it_made(gpurho_build):
    line = gpurho_build("crystal", "Al", "--repeat", "2", "2", "2", "--a", "4.05", "--out", "al.xyz")
    assert line == "al.xyz: 32 atoms (Al 100 %), cell 8.100 x 8.100 x 8.100 angstrom, shortest distance 2.864 angstrom"
    line = gpurho_build("alloy", "--fractions", "Si=0.25", "Ge=0.75", "--out", "POSCAR")
    assert line.startswith("POSCAR: 64 atoms (Ge 75 %, Si 25 %), cell 11.205")
    assert read("POSCAR").get_chemical_symbols().count("Si") == 16
    assert gpurho_build("strained", "--strain", "5", "--repeat", "1", "1", "1").endswith(
        "no two atoms within 12 angstrom"
    )


def test_build_from_a_structure(gpurho_build):
    write("start.xyz", builders.alloy({"Si": 0.5, "Ge": 0.5}, (1, 1, 1)))
    assert gpurho_build("vacancy", "--structure", "start.xyz").startswith("sige-vacancy.xyz: 7 atoms")
    line = gpurho_build("strained", "--structure", "start.xyz", "--repeat", "2", "1", "1", "--strain", "0.1")
    assert line.startswith("sige-strained.xyz: 16 atoms (Ge 50 %, Si 50 %), cell 12.199 x 6.100 x 6.100")
    with pytest.raises(SettingsError, match="belong to a crystal"):
        gpurho_build("vacancy", "--structure", "start.xyz", "--a", "4")
    with pytest.raises(StructureError, match="does not exist"):
        gpurho_build("vacancy", "--structure", "other.xyz")


def test_build_refuses(gpurho_build, tmp_path):
    gpurho_build("al-vacancy")
    before = (tmp_path / "al-vacancy.xyz").read_text()
    with pytest.raises(OutputExistsError, match="--overwrite"):
        gpurho_build("vacancy", "--repeat", "2", "2", "2")
    assert (tmp_path / "al-vacancy.xyz").read_text() == before
    gpurho_build("vacancy", "--repeat", "2", "2", "2", "--overwrite")
    assert len(read("al-vacancy.xyz")) == 31
    for arguments, error, message in (
        ("crystal --out al.nonsense", FormatError, "no name of a format"),
        ("crystal --out no/al.xyz", StoreError, "folder no does not exist"),
        ("strained --strain 1 2", SettingsError, "--strain has 2 numbers"),
        ("alloy --fractions Si", SettingsError, "SYMBOL=X"),
        ("alloy --fractions Si=0.5 Si=0.5", SettingsError, "Si twice"),
        ("alloy --fractions Si=0.5 Ge=0.4", StructureError, "sum to 1"),
        ("screw Fe", StructureError, "Fe is not fcc"),
        ("tilt-gb --plane 1 1", StructureError, "no tilt boundary"),
    ):
        with pytest.raises(GpurhoError, match=message) as caught:
            gpurho_build(*arguments.split())
        assert isinstance(caught.value, error)
        assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["al-vacancy.xyz"]
