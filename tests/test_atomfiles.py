"""Atoms in files: dumps and HDF5 read in pieces, damaged ones refused, atoms served by place."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import TRICLINIC, small_model, source_of

from gpurho.descriptors import Environment
from gpurho.dumpfile import Header
from gpurho.errors import FormatError, StoreError, StructureError
from gpurho.grid import Grid
from gpurho.kernels.celllist import atoms_around, bin_atoms
from gpurho.partition import make_tiles
from gpurho.pipelines.structures import read_structure
from gpurho.sources import StructureSource
from gpurho.structure import Structure


def write_dump(path: Path, structure: Structure, kind: str = "x", origin: tuple[float, ...] = (0.0, 0.0, 0.0)) -> None:
    """A LAMMPS dump, its atoms in a random order, of a structure whose cell is lower triangular."""
    cell = structure.cell
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    low = np.array(origin) + np.array([min(0, xy, xz, xy + xz), min(0, yz), 0])
    high = np.array(origin) + np.diag(cell) + np.array([max(0, xy, xz, xy + xz), max(0, yz), 0])
    periods = " ".join("pp" if p else "ff" for p in structure.pbc)
    columns = {"x": "id type x y z", "xs": "id element xs ys zs q", "xu": "type id xu yu zu"}[kind]
    head = f"ITEM: TIMESTEP\n7\nITEM: NUMBER OF ATOMS\n{len(structure)}\nITEM: BOX BOUNDS xy xz yz {periods}\n"
    for a, b, tilt in zip(low, high, (xy, xz, yz), strict=True):
        head += f"{a!r} {b!r} {tilt!r}\n".replace("np.float64(", "").replace(")", "")
    lines = []
    types = {13: 1, 14: 2, 32: 3}
    names = {13: "Al", 14: "Si", 32: "Ge"}
    scaled = structure.positions @ np.linalg.inv(cell)
    for i in np.random.default_rng(1).permutation(len(structure)):
        z = int(structure.numbers[i])
        if kind == "xs":
            lines.append(f"{i + 1} {names[z]} {scaled[i, 0]:.17g} {scaled[i, 1]:.17g} {scaled[i, 2]:.17g} 0.5")
        else:
            p = structure.positions[i] + origin
            first = f"{i + 1} {types[z]}" if kind == "x" else f"{types[z]} {i + 1}"
            lines.append(f"{first} {p[0]:.17g} {p[1]:.17g} {p[2]:.17g}")
    path.write_text(head + f"ITEM: ATOMS {columns}\n" + "\n".join(lines) + "\n")


def scattered(pbc: tuple[bool, bool, bool] = (True, True, True), n: int = 3000) -> Structure:
    """Atoms of three species at random in a triclinic cell of some bins, some of them outside of it."""
    cell = np.array([[141.0, 0, 0], [6.0, 38.0, 0], [-4.0, 9.0, 52.0]])
    rng = np.random.default_rng(5)
    positions = rng.uniform(-0.05, 1.05, (n, 3)) @ cell
    return Structure(positions, rng.choice([13, 14, 32], n), cell, np.array(pbc))


@pytest.mark.parametrize("kind", ["x", "xs", "xu"])
@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
def test_a_dump_gives_the_atoms_of_every_tile(tmp_path, kind, pbc):
    structure = scattered(pbc)
    origin = (0.0, 0.0, 0.0) if kind == "xs" else (-3.0, 7.0, 100.0)
    write_dump(tmp_path / "a.dump", structure, kind, origin)
    if all(pbc) and kind != "xs":  # where no direction has an end, the box has no place
        structure = Structure(structure.positions + origin, structure.numbers, structure.cell, structure.pbc)
    spec = small_model(("Al", "Si", "Ge")).spec.descriptor
    grid = Grid((40, 36, 50), structure.cell, pbc=list(pbc))
    with StructureSource.from_dump(tmp_path / "a.dump", ["Al", "Si", "Ge"], tmp_path) as source:
        assert len(source) == 3000
        assert source.counts == {z: int((structure.numbers == z).sum()) for z in (13, 14, 32)}
        assert source.pbc.tolist() == list(pbc)
        np.testing.assert_allclose(source.cell, structure.cell, atol=1e-12)
        found = source.structure()
        np.testing.assert_allclose(found.positions, structure.positions, atol=1e-10)
        np.testing.assert_array_equal(found.numbers, structure.numbers)
        whole = Environment(structure, spec)
        some = 0
        for tile in make_tiles(grid, (10, 12, 10)):
            if tile.index % 11:
                continue
            part, index = source.near(grid, tile, spec.reach)
            assert (np.diff(index) > 0).all()
            np.testing.assert_allclose(part.positions, structure.positions[index], atol=1e-10)
            np.testing.assert_array_equal(part.numbers, structure.numbers[index])
            some += len(index) < 3000
            got = Environment(part, spec).tile_features(grid, tile).values
            np.testing.assert_allclose(got, whole.tile_features(grid, tile).values, atol=2e-5)
        assert some, "no tile was served by a part of the atoms, so nothing was tested"


def test_hdf5_atoms(tmp_path):
    structure = scattered()
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        group = h5.create_group("structure")
        group["positions"], group["numbers"] = structure.positions, structure.numbers
        group.attrs["cell"], group.attrs["pbc"] = structure.cell, structure.pbc
    grid = Grid((40, 36, 50), structure.cell)
    with StructureSource.from_hdf5(tmp_path / "a.h5") as source:
        part, index = source.near(grid, make_tiles(grid, (10, 12, 10))[40], 6.0)
        np.testing.assert_array_equal(part.positions, structure.positions[index])
        whole, every = source.near(grid, make_tiles(grid)[0], 60.0)
        assert len(every) == len(whole) == 3000
    with pytest.raises(StoreError, match="closed"):
        source.near(grid, make_tiles(grid)[0], 6.0)
    with pytest.raises(FormatError, match="no atoms in group 'other'"):
        StructureSource.from_hdf5(tmp_path / "a.h5", "other")


@pytest.mark.parametrize("kind", ["x", "xs", "xu"])
@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
@pytest.mark.parametrize("step", [1, 3])
def test_a_dump_in_pieces_is_what_ase_reads(tmp_path, kind, pbc, step):
    """Also of a part of the atoms, whose ids have gaps."""
    path = tmp_path / "a.dump"
    write_dump(path, scattered(pbc, 500), kind, (-3.0, 7.0, 100.0) if kind != "xs" else (0.0, 0.0, 0.0))
    head, lines = path.read_text().split("ITEM: ATOMS")
    columns, *rows = lines.strip().split("\n")
    where = columns.split().index("id")
    rows = [row for row in rows if int(row.split()[where]) % step == 0]
    path.write_text(
        "\n".join([f"{head.replace(chr(10) + '500', f'{chr(10)}{len(rows)}')}ITEM: ATOMS {columns}", *rows, ""])
    )
    wanted = Structure.from_ase(read_structure(path, ["Al", "Si", "Ge"]))
    with StructureSource.from_dump(path, ["Al", "Si", "Ge"]) as source:
        found = source.structure()
        assert len(source) == len(found) == 500 // step
        np.testing.assert_array_equal(found.numbers, wanted.numbers)
        np.testing.assert_array_equal(found.pbc, wanted.pbc)
        np.testing.assert_allclose(found.cell, wanted.cell, atol=1e-12)
        np.testing.assert_allclose(found.positions, wanted.positions, atol=1e-12)
        assert source.fingerprint() == found.fingerprint()
        assert source.symbols == found.symbols == ("Al", "Ge", "Si")
        assert source.volume == pytest.approx(found.volume)
    path.write_text(path.read_text().replace(rows[7], rows[8]))
    with pytest.raises(FormatError, match="two atoms with"):
        StructureSource.from_dump(path, ["Al", "Si", "Ge"])


@pytest.mark.parametrize("pbc", [(True, True, True), (False, True, False)])
def test_parts_hold_each_atom_once_and_all_around(monkeypatch, pbc):
    monkeypatch.setattr("gpurho.sources.BLOCK_ATOMS", 400)
    structure, reach = scattered(pbc, 2000), 5.0
    with source_of(structure) as source:
        times = np.zeros(2000, int)
        bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        count = 0
        for part in source.parts(reach):
            count += 1
            times[part.index[part.inside]] += 1
            np.testing.assert_array_equal(part.structure.positions, structure.positions[part.index])
            points = (bins.fractional @ bins.cell)[np.isin(bins.owners, part.index[part.inside])]
            for point in points[::40]:
                positions, owners = atoms_around(bins, point[None], reach)
                near = owners[np.linalg.norm(positions - point, axis=1) <= reach]
                assert set(near) <= set(part.index)
        assert count > 3
        assert (times == 1).all()


def test_empty_space_still_gives_a_structure():
    cell = np.diag([100.0, 20, 20])
    header = Header(1, cell, np.zeros(3), np.zeros(3, bool))
    source = StructureSource.from_chunks(header, iter([(np.array([[1.0, 1, 1]]), np.array([13]), np.zeros(1, int))]))
    grid = Grid((100, 20, 20), cell)
    part, index = source.near(grid, make_tiles(grid, (10, 20, 20))[9], 5.0)
    assert len(part) == 1
    assert index.tolist() == [0]
    assert part.numbers.tolist() == [13]
    source.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.replace("ITEM: NUMBER", "NUMBER"), "no LAMMPS text dump"),
        (lambda t: t.replace("\n50\n", "\n60\n"), "ends after atom 50 of 60"),
        (lambda t: "\n".join(t.split("\n")[:-20]), "ends after atom 31 of 50"),
        (lambda t: t.replace("id type", "id kind"), "type, mass or element are needed"),
        (lambda t: t.replace("\n50 ", "\nx50 3 nonsense "), "damaged after atom 0|elements"),
        (lambda t: t.replace("ITEM: BOX BOUNDS", "ITEM: BOX SIZES"), "no LAMMPS|no box|damaged"),
    ],
)
def test_damaged_dumps(tmp_path, change, message):
    path = tmp_path / "a.dump"
    write_dump(path, scattered(n=50))
    path.write_text(change(path.read_text()))
    with pytest.raises(FormatError, match=message) as error:
        StructureSource.from_dump(path, ["Al", "Si", "Ge"], tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.dump"]


def test_wrong_atoms_are_refused(tmp_path):
    path = tmp_path / "a.dump"
    write_dump(path, scattered(n=50))
    with pytest.raises(FormatError, match=r"atoms of type 3, and elements"):
        StructureSource.from_dump(path, ["Al", "Si"])
    with pytest.raises(FormatError, match="no chemical symbol"):
        StructureSource.from_dump(path, ["Al", "Si", "Xx"])
    header = Header(1, TRICLINIC, np.zeros(3), np.ones(3, bool))
    with pytest.raises(StructureError, match="atom 0 has position"):
        StructureSource.from_chunks(header, iter([(np.array([[1.0, np.nan, 1]]), np.array([13]), np.zeros(1, int))]))
    with pytest.raises(FormatError, match=r"cannot be read: No such file"):
        StructureSource.from_dump(tmp_path / "none.dump", ["Al"])


MILLION = """
import resource, sys
import numpy as np
from pathlib import Path
from gpurho.grid import Grid
from gpurho.partition import make_tiles
from gpurho.pipelines.calibration import Rates
from gpurho.pipelines.scale import scale_plan
from gpurho.pipelines.structures import read_structure
from gpurho.sources import StructureSource

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

path, n = Path(sys.argv[1]), 100
side = 2.55 * n
with open(path, "w") as file:
    file.write(f"ITEM: TIMESTEP\\n0\\nITEM: NUMBER OF ATOMS\\n{n ** 3}\\nITEM: BOX BOUNDS pp pp pp\\n")
    file.write(f"0 {side}\\n" * 3 + "ITEM: ATOMS id type x y z\\n")
    # The order of a domain decomposition is not that of places: layers of one axis after another.
    for i in range(n):
        rows = [f"{(i * n + j) * n + k + 1} 1 {2.55 * k + 1:.5f} {2.55 * j + 1:.5f} {2.55 * i + 1:.5f}\\n"
                for j in range(n) for k in range(n)]
        file.write("".join(rows))
np.loadtxt(["1 2"], usecols=[0])  # code and buffers that any use needs
before = peak()
source = StructureSource.from_dump(path, ["Al"], path.parent)
read = peak() - before
grid = Grid((1275, 1275, 1275), source.cell)
tiles = make_tiles(grid)
sizes = [len(source.near(grid, tiles[i], 8.0)[1]) for i in range(0, len(tiles), 97)]
print(len(source), before, read, peak() - before, max(sizes), min(sizes))
"""


def test_a_million_atoms_pass_in_bounded_memory(tmp_path):
    code = textwrap.dedent(MILLION)
    run = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.dump")], capture_output=True, text=True, check=True
    )
    n_atoms, _, read, peak, most, least = (float(x) for x in run.stdout.split())
    assert n_atoms == 1_000_000
    # Positions and numbers alone would take 32 MB; text and tables of ASE or NumPy some hundreds.
    assert read < 24, f"{read} MB to read"
    assert peak < 28, f"{peak} MB in all"
    assert 400 < least <= most < 25_000
