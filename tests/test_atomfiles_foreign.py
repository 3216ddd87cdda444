"""Files of atoms as others write them, or damage them: read in pieces to the bits of memory, or refused in one line."""

from __future__ import annotations

import bz2
import subprocess
import sys
import textwrap
import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import TRICLINIC

from gpurho.dumpfile import Header
from gpurho.errors import FormatError, GpurhoError, StructureError
from gpurho.pipelines.structures import read_structure, structure_source
from gpurho.sources import StructureSource
from gpurho.structure import Structure

SPECIES = ["Al", "Si"]
N = 40


def atoms(cell: np.ndarray, seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Positions and types at random."""
    rng = np.random.default_rng(seed)
    return rng.random((N, 3)) @ cell, rng.integers(1, 3, N)


def dump(box: str, rows: list[str], columns: str = "id type x y z", before: str = "") -> str:
    """A frame."""
    head = f"{before}ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n{len(rows)}\nITEM: BOX BOUNDS {box}\n"
    return f"{head}ITEM: ATOMS {columns}\n" + "".join(f"{row}\n" for row in rows)


def lines(positions: np.ndarray, types: np.ndarray) -> list[str]:
    """id type x y z."""
    return [
        f"{i + 1} {t} " + " ".join(f"{x:.17g}" for x in p)
        for i, (p, t) in enumerate(zip(positions, types, strict=True))
    ]


def tilted_box(cell: np.ndarray, label: str = "xy xz yz pp pp pp", low: tuple[float, ...] = (0.0, 0.0, 0.0)) -> str:
    """The bounds of a lower triangular cell."""
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    first = np.array(low) + np.array([min(0, xy, xz, xy + xz), min(0, yz), 0])
    last = np.array(low) + np.diag(cell) + np.array([max(0, xy, xz, xy + xz), max(0, yz), 0])
    rows = zip(first, last, (xy, xz, yz), strict=True)
    return label + "\n" + "\n".join(f"{a:.17g} {b:.17g} {t:.17g}" for a, b, t in rows)


def same_as_in_memory(path: Path, species: list[str] | None = None) -> Structure:
    """The atoms, whose bits are those that are read into memory."""
    wanted = Structure.from_ase(read_structure(path, species))
    with structure_source(path, species or [], path.parent) as source:
        assert source.fingerprint() == wanted.fingerprint()
    return wanted


def test_general_triclinic_boxes(tmp_path):
    turned = np.linalg.qr(np.random.default_rng(1).normal(size=(3, 3)))[0]
    cell = TRICLINIC @ turned
    positions, types = atoms(cell)
    box = "abc origin pp pp pp\n" + "\n".join(" ".join(f"{x:.17g}" for x in row) + " 0" for row in cell)
    path = tmp_path / "abc.dump"
    path.write_text(dump(box, lines(positions, types)))
    found = same_as_in_memory(path, SPECIES)
    np.testing.assert_allclose(found.cell, cell, rtol=1e-15)
    assert found.pbc.all()


@pytest.mark.parametrize("seed", range(40))
def test_tilted_boxes_to_the_last_bit(tmp_path, seed):
    rng = np.random.default_rng(seed)
    cell = np.diag(rng.uniform(8, 30, 3)) + np.tril(rng.uniform(-6, 6, (3, 3)), -1)
    path = tmp_path / "a.dump"
    positions, types = atoms(cell)
    path.write_text(dump(tilted_box(cell, low=tuple(rng.uniform(-50, 50, 3))), lines(positions, types)))
    same_as_in_memory(path, SPECIES)


def test_masses_name_elements_and_so_does_the_element(tmp_path):
    cell = np.diag([9.0, 9.0, 12.0])
    positions, types = atoms(cell)
    box = "pp pp pp\n0 9\n0 9\n0 12"
    masses = [
        " ".join([*row.split()[:2], str((26.98, 28.09)[t - 1]), *row.split()[2:]])
        for row, t in zip(lines(positions, types), types, strict=True)
    ]
    path = tmp_path / "mass.dump"
    path.write_text(dump(box, masses, "id type mass x y z"))
    assert same_as_in_memory(path).symbols == ("Al", "Si")
    assert same_as_in_memory(path, ["Ge", "Ge"]).symbols == ("Al", "Si")


def test_packed_types_take_the_names_that_are_given(tmp_path):
    cell = np.diag([9.0, 9.0, 12.0])
    text = dump("pp pp pp\n0 9\n0 9\n0 12", lines(*atoms(cell)))
    (tmp_path / "a.dump.bz2").write_bytes(bz2.compress(text.encode()))
    assert Structure.from_ase(read_structure(tmp_path / "a.dump.bz2", SPECIES)).symbols == ("Al", "Si")
    with pytest.raises(GpurhoError, match="does not say which elements"):
        read_structure(tmp_path / "a.dump.bz2")


def test_units_and_times_before_a_frame(tmp_path):
    text = dump(tilted_box(CELL), lines(*atoms(CELL)), before="ITEM: UNITS\nmetal\nITEM: TIME\n0.5\n")
    (tmp_path / "a.dump").write_text(text)
    np.testing.assert_allclose(same_as_in_memory(tmp_path / "a.dump", SPECIES).cell, CELL, rtol=1e-15)


def test_frames_by_number_and_empty_ones(tmp_path):
    cell = np.diag([9.0, 9.0, 12.0])
    box, path = "pp pp pp\n0 9\n0 9\n0 12", tmp_path / "a.dump"
    frames = [[], lines(*atoms(cell)), lines(*atoms(cell, 4))[:7]]
    path.write_text("".join(dump(box, rows) for rows in frames))
    for name, count in (("a.dump@1", N), ("a.dump@-2", N), ("a.dump", 7)):
        with structure_source(tmp_path / name, SPECIES, tmp_path) as source:
            assert len(source) == count
    with pytest.raises(FormatError, match="no atoms in frame 0; give another"):
        structure_source(tmp_path / "a.dump@0", SPECIES, tmp_path)
    with pytest.raises(FormatError, match="3 frames and no frame 3"):
        structure_source(tmp_path / "a.dump@3", SPECIES, tmp_path)


CELL = np.array([[12.0, 0, 0], [2.0, 11.0, 0], [-1.0, 1.5, 14.0]])
DAMAGED = {
    "tilts without their names": (dump(tilted_box(CELL, "pp pp pp"), lines(*atoms(CELL))), "damaged header"),
    "no periods": (dump(tilted_box(CELL, "xy xz yz"), lines(*atoms(CELL))), "damaged header"),
    "bohr": (dump(tilted_box(CELL), lines(*atoms(CELL)), before="ITEM: UNITS\nelectron\n"), "units 'electron', not"),
    "metal, but far": (
        dump(tilted_box(CELL * 1e7), lines(*atoms(CELL)), before="ITEM: UNITS\nmetal\n"),
        "box that is not finite or beyond",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_boxes_and_units_that_would_be_misread_are_refused_by_both(tmp_path, name):
    text, message = DAMAGED[name]
    (tmp_path / "a.dump").write_text(text)
    for read in (lambda p: read_structure(p, SPECIES), lambda p: structure_source(p, SPECIES, tmp_path)):
        with pytest.raises(GpurhoError, match=message) as error:
            read(tmp_path / "a.dump")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("row", ["6 1 2.0 2.1 4.05 7 8", "6 1 0.0 2.0 2.1 4.05", "6 1 2.0 2.1"])
def test_lines_of_other_lengths_are_refused(tmp_path, row):
    rows = lines(*atoms(CELL))
    rows[5] = row
    (tmp_path / "a.dump").write_text(dump(tilted_box(CELL), rows))
    with pytest.raises(FormatError, match="damaged after atom"):
        structure_source(tmp_path / "a.dump", SPECIES, tmp_path)


def test_types_without_names_say_how_to_name_them(tmp_path):
    (tmp_path / "a.dump").write_text(dump(tilted_box(CELL), lines(*atoms(CELL))))
    with pytest.raises(FormatError, match=r"no elements of the types are given, e\.g\. --species Al,Si"):
        structure_source(tmp_path / "a.dump", [], tmp_path)
    (tmp_path / "a.dump").write_text("")
    with pytest.raises(FormatError, match="is empty"):
        structure_source(tmp_path / "a.dump", SPECIES, tmp_path)


# -- HDF5 -------------------------------------------------------------------------------------------------------

POSITIONS = np.random.default_rng(0).random((N, 3)) * 9
WRONG = {
    "numbers with fractions": (POSITIONS, np.full(N, 13.7), "numbers float64"),
    "complex positions": (POSITIONS * 1j, np.full(N, 13), "complex128, not numbers"),
    "text": (np.full((N, 3), b"1.0"), np.full(N, 13), "positions are"),
    "two coordinates": (POSITIONS[:, :2], np.full(N, 13), "shape"),
    "the other way round": (POSITIONS.T.copy(), np.full(N, 13), "shape"),
    "fewer numbers": (POSITIONS, np.full(N - 1, 13), "shape"),
    "numbers in columns": (POSITIONS, np.full((N, 1), 13), "shape"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_are_no_atoms_are_refused(tmp_path, name):
    positions, numbers, message = WRONG[name]
    with h5py.File(tmp_path / "a.h5", "w") as h5:
        group = h5.create_group("structure")
        group["positions"], group["numbers"] = positions, numbers
        group.attrs["cell"], group.attrs["pbc"] = np.eye(3) * 9, [True] * 3
    with pytest.raises(FormatError, match=message) as error:
        StructureSource.from_hdf5(tmp_path / "a.h5", folder=tmp_path)
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.h5"]


def test_a_flipped_bit_or_another_files_atoms_are_refused(tmp_path):
    from gpurho.storedatoms import put_atoms

    path = tmp_path / "a.h5"
    with h5py.File(path, "w") as h5:
        put_atoms(h5, Structure(POSITIONS, np.full(N, 13), np.eye(3) * 9, np.ones(3, bool)))
        place = h5["structure/positions"].id.get_offset()
        filters = h5["structure/positions"].compression
    with StructureSource.from_hdf5(path) as source:
        assert len(source) == N
    with h5py.File(tmp_path / "link.h5", "w") as h5:
        h5["structure"] = h5py.ExternalLink("a.h5", "/structure")
    with pytest.raises(FormatError, match="no atoms in group"):
        StructureSource.from_hdf5(tmp_path / "link.h5")
    assert place is not None
    assert filters is None
    data = bytearray(path.read_bytes())
    data[place + 11] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match="does not match its checksum"):
        StructureSource.from_hdf5(path)


# -- Disks and memory -------------------------------------------------------------------------------------------

FULL = """
import resource, sys
import numpy as np
from pathlib import Path
from gpurho.errors import StoreError
from gpurho.sources import StructureSource

path, scratch = Path(sys.argv[1]), sys.argv[2]
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
outcomes = []
for size in range(1000, 120000, 7000):  # As a disk of that size, which says so with another number
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        StructureSource.from_dump(path, ["Al", "Si"], scratch).close()
        outcomes.append("read")
    except StoreError as error:
        assert "\\n" not in str(error) and "room" in str(error), error
        outcomes.append("full")
    assert not list(Path(scratch).iterdir())
print(outcomes.count("full"), outcomes.count("read"), outcomes == sorted(outcomes))
"""


def test_a_full_disk_is_not_taken_for_a_damaged_file(tmp_path):
    rng = np.random.default_rng(0)
    rows = lines(rng.random((2000, 3)) @ CELL, rng.integers(1, 3, 2000))
    (tmp_path / "a.dump").write_text(dump(tilted_box(CELL), rows))
    (tmp_path / "scratch").mkdir()
    command = [sys.executable, "-c", textwrap.dedent(FULL), str(tmp_path / "a.dump"), str(tmp_path / "scratch")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    full, read, in_order = done.stdout.split()
    assert min(int(full), int(read)) > 3
    assert in_order == "True"


def test_memory_follows_the_atoms_and_not_the_volume():
    header = Header(200, np.eye(3) * 6000, np.zeros(3), np.ones(3, bool))
    positions = np.random.default_rng(0).random((200, 3)) * 6000
    tracemalloc.start()
    with StructureSource.from_chunks(header, iter([(positions, np.full(200, 13), np.arange(200))])) as source:
        source.check_overlaps(0.5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50e6


def test_empty_pieces_and_the_number_of_a_wrong_atom(tmp_path):
    header = Header(1, np.eye(3) * 9, np.zeros(3), np.ones(3, bool))
    nothing = np.zeros((0, 3)), np.zeros(0, int), np.zeros(0, int)
    one = np.ones((1, 3)), np.array([13]), np.zeros(1, int)
    with StructureSource.from_chunks(header, iter([nothing, one, nothing])) as source:
        assert len(source) == 1
    rows = lines(*atoms(CELL))
    rows[3] = "4711 1 1.0 nan 1.0"
    (tmp_path / "a.dump").write_text(dump(tilted_box(CELL), rows))
    with pytest.raises(StructureError, match="atom 4711 has position"):
        structure_source(tmp_path / "a.dump", SPECIES, tmp_path)
