"""Atoms of structures too large for memory: read in pieces, sorted by place into a file, served around tiles.

A `StructureSource` holds a table of offsets and nothing of the atoms. It is made by one pass over a LAMMPS dump or an
HDF5 file, in pieces of `CHUNK` atoms, and gives what `gpurho.descriptors.Environment` needs for a box of grid points:
the atoms as far as the descriptors look, in their order, so that descriptors have the bits that the whole structure
gives.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import FormatError, StoreError, StructureError
from gpurho.grid import Grid
from gpurho.kernels.lattice import transformed
from gpurho.partition import Tile
from gpurho.structure import MAX_COORDINATE, Structure, cell_heights

CHUNK = 50_000
"""Atoms that are in memory while a file is read."""

BIN_WIDTH = 16.0
"""Least thickness of the bins that atoms are sorted into, angstrom: a tile of the default shape, about."""

MAX_BINS = 1 << 26
RECORD = np.dtype([("index", "<i8"), ("position", "<f8", 3), ("number", "<i2")])

Chunk = tuple[NDArray[np.float64], NDArray[np.int64]]
"""Positions (n, 3) in angstrom and atomic numbers (n,)."""


@dataclass(frozen=True)
class Header:
    """What a file says before its atoms: their number, the cell (rows, angstrom), its origin and its periods."""

    n_atoms: int
    cell: NDArray[np.float64]
    origin: NDArray[np.float64]
    pbc: NDArray[np.bool_]


class StructureSource:
    """The atoms of a huge structure, in a file sorted by place.

    Use `from_dump`, `from_hdf5` or `from_chunks`; the sorted file is temporary and goes with the object, or stays
    where `folder` is given.

    Attributes
    ----------
    cell, pbc
        As of `gpurho.structure.Structure`; the origin of the file's box is moved to zero.
    counts : dict of int to int
        Atoms of each atomic number.
    """

    def __init__(self, file: IO[bytes], header: Header, shape: NDArray[np.int64], start: NDArray[np.int64]) -> None:
        self.cell, self.pbc = header.cell, header.pbc
        self._file, self._header, self._shape, self._start = file, header, shape, start
        self._inverse = np.linalg.inv(header.cell)
        self.counts: dict[int, int] = {}

    def __len__(self) -> int:
        return int(self._start[-1])

    @classmethod
    def from_dump(cls, path: str | Path, elements: Sequence[str], folder: str | Path | None = None) -> StructureSource:
        """From the first frame of a LAMMPS text dump.

        Parameters
        ----------
        path : path
            With columns x y z, xu yu zu or xs ys zs, and `element` or `type`; any box, triclinic included.
        elements : sequence of str
            Chemical symbol of each type, in the order of the types.
        folder : path, optional
            Where the sorted file lies: 34 bytes an atom, twice that while it is made.

        Raises
        ------
        FormatError
            For a file that is no dump, is cut off, or lacks columns; nothing is left behind.
        """
        source = Path(path)
        with _opened(source) as file:
            header, columns = read_dump_header(file, source)
            return cls.from_chunks(header, dump_chunks(file, source, header, columns, elements), folder)

    @classmethod
    def from_hdf5(cls, path: str | Path, group: str = "structure", folder: str | Path | None = None) -> StructureSource:
        """From a group of an HDF5 file with data sets `positions` (n, 3), `numbers` (n,), attributes `cell`, `pbc`.

        Files of densities of this library have it as ``structure``.
        """
        import h5py

        try:
            with h5py.File(path, "r") as h5:
                atoms = h5[group]
                positions, numbers = atoms["positions"], atoms["numbers"]
                pbc = np.asarray(atoms.attrs["pbc"], dtype=bool)
                header = Header(len(numbers), np.asarray(atoms.attrs["cell"], dtype=float), np.zeros(3), pbc)
                chunks = (
                    (positions[i : i + CHUNK].astype(np.float64), numbers[i : i + CHUNK].astype(np.int64))
                    for i in range(0, len(numbers), CHUNK)
                )
                return cls.from_chunks(header, chunks, folder)
        except (OSError, KeyError) as error:
            reason = str(error).splitlines()[0]
            raise FormatError(f"{path} has no atoms in group {group!r}: {reason}; check the file") from None

    @classmethod
    def from_chunks(cls, header: Header, chunks: Iterator[Chunk], folder: str | Path | None = None) -> StructureSource:
        """From pieces of atoms in the order of their indices; positions are counted from the header's origin."""
        heights = cell_heights(header.cell)
        if not heights.min() > 0:
            raise StructureError(f"cell {header.cell.tolist()} has no volume; give three independent cell vectors")
        shape = np.clip((heights / BIN_WIDTH).astype(np.int64), 1, None)
        while int(shape.prod()) > MAX_BINS:
            shape = np.maximum(1, shape // 2)
        inverse = np.asarray(np.linalg.inv(header.cell), dtype=np.float64)
        inside = None if folder is None else str(folder)
        counts = np.zeros(int(shape.prod()), np.int64)
        species = np.zeros(119, np.int64)
        n = 0
        with tempfile.TemporaryFile(dir=inside, prefix="gpurho-atoms-") as unsorted:
            for positions, numbers in chunks:
                _check(positions, numbers, n)
                records = np.empty(len(numbers), RECORD)
                records["index"] = np.arange(n, n + len(numbers))
                records["position"], records["number"] = positions, numbers
                counts += np.bincount(_bins(positions, inverse, header.pbc, shape), minlength=len(counts))
                species += np.bincount(numbers, minlength=119)
                _write(unsorted, records)
                n += len(numbers)
            if n != header.n_atoms or n == 0:
                raise FormatError(f"the file has {n} atoms and says {header.n_atoms}; it is cut off or damaged")
            start = np.concatenate([[0], np.cumsum(counts)])
            # Open until the source is closed or collected; the system removes it then.
            file = tempfile.TemporaryFile(dir=inside, prefix="gpurho-atoms-")  # noqa: SIM115
            try:
                _scatter(unsorted, file, start[:-1].copy(), inverse, header.pbc, shape)
            except BaseException:
                file.close()
                raise
        source = cls(file, header, shape, start)
        source.counts = {int(z): int(species[z]) for z in np.flatnonzero(species)}
        return source

    def near(self, grid: Grid, tile: Tile, reach: float) -> tuple[Structure, NDArray[np.int64]]:
        """The atoms within `reach` angstrom of a box of grid points, periodic images included, and some beyond.

        Returns
        -------
        structure : Structure
            With the cell and periods of the whole; one atom at least.
        index : (n,) int64
            Their indices in the whole, ascending.
        """
        low, high = np.array(tile.start, float), np.array(tile.stop, float) - 1.0
        ends = np.array([[(low, high)[c >> d & 1][d] for d in range(3)] for c in range(8)])
        fractional = (grid.origin + ends @ grid.steps) @ self._inverse
        margin = reach * np.linalg.norm(self._inverse, axis=0) + 1e-9
        axes = [
            _span(a, b, int(n), bool(period))
            for a, b, n, period in zip(
                fractional.min(0) - margin, fractional.max(0) + margin, self._shape, self.pbc, strict=True
            )
        ]
        parts = []
        for ix in axes[0]:
            for iy in axes[1]:
                row = (ix * int(self._shape[1]) + iy) * int(self._shape[2])
                for z0, z1 in _runs(axes[2]):
                    parts.append(self._read(int(self._start[row + z0]), int(self._start[row + z1])))
        records = np.concatenate(parts)
        if len(records) == 0:
            records = self._read(0, 1)
        records = records[np.argsort(records["index"])]
        return (
            Structure(records["position"], records["number"].astype(np.int64), self.cell, self.pbc),
            records["index"].astype(np.int64),
        )

    def chunks(self) -> Iterator[Chunk]:
        """All atoms in the order of places, in pieces."""
        for first in range(0, len(self), CHUNK):
            records = self._read(first, min(first + CHUNK, len(self)))
            yield records["position"].astype(np.float64), records["number"].astype(np.int64)

    def _read(self, first: int, last: int) -> NDArray[Any]:
        if self._file.closed:
            raise StoreError("the atoms' file was closed; read the structure again")
        self._file.seek(first * RECORD.itemsize)
        return np.frombuffer(self._file.read((last - first) * RECORD.itemsize), RECORD)

    def close(self) -> None:
        """Remove the sorted file."""
        self._file.close()

    def __enter__(self) -> StructureSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- sorting ----------------------------------------------------------------------------------------------------


def _check(positions: NDArray[np.float64], numbers: NDArray[np.int64], first: int) -> None:
    bad = np.flatnonzero(~(np.abs(positions) <= MAX_COORDINATE).all(axis=1))
    if bad.size:
        raise StructureError(
            f"atom {first + bad[0]} has position {positions[bad[0]]}; all coordinates must be finite, none beyond"
            f" {MAX_COORDINATE:.0e} angstrom"
        )
    bad = np.flatnonzero((numbers < 1) | (numbers > 118))
    if bad.size:
        raise StructureError(f"atom {first + bad[0]} has atomic number {numbers[bad[0]]}; give 1 to 118")


def _bins(
    positions: NDArray[np.float64], inverse: NDArray[np.float64], pbc: NDArray[np.bool_], shape: NDArray[np.int64]
) -> NDArray[np.int64]:
    fractional = transformed(positions, inverse)
    wrapped = np.where(pbc, fractional - np.floor(fractional), fractional)
    index = np.clip(np.floor(wrapped * shape).astype(np.int64), 0, shape - 1)
    return np.asarray((index[:, 0] * shape[1] + index[:, 1]) * shape[2] + index[:, 2])


def _scatter(
    unsorted: IO[bytes],
    file: IO[bytes],
    place: NDArray[np.int64],
    inverse: NDArray[np.float64],
    pbc: NDArray[np.bool_],
    shape: NDArray[np.int64],
) -> None:
    """Write the atoms of each bin one after another; `place` is where each bin's next atom goes."""
    unsorted.seek(0)
    while data := unsorted.read(CHUNK * RECORD.itemsize):
        records = np.frombuffer(data, RECORD)
        bins = _bins(np.ascontiguousarray(records["position"]), inverse, pbc, shape)
        order = np.argsort(bins, kind="stable")
        records, bins = records[order], bins[order]
        for group in np.split(np.arange(len(bins)), np.flatnonzero(np.diff(bins)) + 1):
            b = int(bins[group[0]])
            file.seek(int(place[b]) * RECORD.itemsize)
            _write(file, records[group[0] : group[-1] + 1])
            place[b] += len(group)
    file.flush()


def _write(file: IO[bytes], records: NDArray[Any]) -> None:
    try:
        file.write(records.tobytes())
    except OSError as error:
        raise StoreError(f"atoms cannot be sorted on the disk: {error.strerror}; give a folder with room") from None


def _span(low: float, high: float, n: int, period: bool) -> list[int]:
    """Bins, ascending, that fractional coordinates from `low` to `high` touch."""
    first, last = int(np.floor(low * n)), int(np.floor(high * n))
    if not period:
        # The outermost bins hold the atoms outside of the cell too.
        first, last = (min(max(end, 0), n - 1) for end in (first, last))
        return list(range(first, last + 1))
    return list(range(n)) if last - first + 1 >= n else sorted({i % n for i in range(first, last + 1)})


def _runs(bins: list[int]) -> list[tuple[int, int]]:
    """Ascending whole numbers as ranges without gaps."""
    breaks = [i for i in range(1, len(bins)) if bins[i] != bins[i - 1] + 1]
    return [(bins[a], bins[b - 1] + 1) for a, b in zip([0, *breaks], [*breaks, len(bins)], strict=True)]


# -- LAMMPS dumps -----------------------------------------------------------------------------------------------


def _opened(path: Path) -> IO[bytes]:
    try:
        return open(path, "rb")
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}; check the name") from None


def read_dump_header(file: IO[bytes], path: Path) -> tuple[Header, list[str]]:
    """The header of the next frame of a LAMMPS text dump, and the names of its columns.

    https://docs.lammps.org/dump.html, of the style "atom" or "custom".
    """
    n_atoms, box = 0, None
    while line := file.readline(1 << 16):
        words = line.decode(errors="replace").split()
        if words[:2] != ["ITEM:", words[1] if len(words) > 1 else ""]:
            raise FormatError(f"{path} is no LAMMPS text dump: {line[:40]!r} stands where ITEM: is due; check the file")
        try:
            if words[1] == "NUMBER":
                n_atoms = int(file.readline())
            elif words[1:3] == ["BOX", "BOUNDS"]:
                box = _box(words[3:], [[float(x) for x in file.readline().split()] for _ in range(3)])
            elif words[1] == "ATOMS":
                if box is None or n_atoms < 1:
                    break
                if not all((np.abs(part) <= MAX_COORDINATE).all() for part in box[:2]):
                    raise FormatError(f"{path} has a box that is not finite or beyond {MAX_COORDINATE:.0e} angstrom")
                return Header(n_atoms, *box), words[2:]
            else:
                file.readline()
        except (ValueError, IndexError):
            raise FormatError(f"{path} has a damaged header at {line[:40]!r}; check the file") from None
    raise FormatError(f"{path} has no atoms, or no box before them; give a LAMMPS text dump")


def _box(
    words: Sequence[str], rows: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Cell, origin and periods from the three lines of a box; bounds of a tilted box enclose its corners."""
    tilted = words[:3] == ["xy", "xz", "yz"]
    xy, xz, yz = (rows[0][2], rows[1][2], rows[2][2]) if tilted else (0.0, 0.0, 0.0)
    low, high = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
    low -= [min(0.0, xy, xz, xy + xz), min(0.0, yz), 0.0]
    high -= [max(0.0, xy, xz, xy + xz), max(0.0, yz), 0.0]
    lengths = high - low
    cell = np.array([[lengths[0], 0, 0], [xy, lengths[1], 0], [xz, yz, lengths[2]]])
    periods = words[3:6] if tilted else words[:3]
    return cell, low, np.array([p == "pp" for p in periods] if periods else [True] * 3)


def dump_chunks(
    file: IO[bytes], path: Path, header: Header, columns: Sequence[str], elements: Sequence[str]
) -> Iterator[Chunk]:
    """The atoms of a frame in pieces, in the order of the file; positions counted from the box's origin."""
    from ase.data import atomic_numbers

    names: Mapping[str, int] = {name: i for i, name in enumerate(columns)}
    kinds = [kind for kind in ("x", "xu", "xs") if kind in names]
    kind = next((k for k in kinds if all(k.replace("x", axis) in names for axis in "yz")), None)
    what = next((name for name in ("element", "type") if name in names), None)
    if kind is None or what is None:
        raise FormatError(f"{path} has columns {' '.join(columns)}; x y z (or xs, xu) and element or type are needed")
    unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
    if unknown:
        raise FormatError(f"elements {list(elements)} name {unknown[0]!r}, no chemical symbol; give e.g. ['Si', 'Ge']")
    table = np.array([0, *(atomic_numbers[symbol] for symbol in elements)])
    used = [*(names[kind.replace("x", axis)] for axis in "xyz"), names[what]]
    row = np.dtype([("x", "f8"), ("y", "f8"), ("z", "f8"), ("what", "i8" if what == "type" else "U8")])
    done = 0
    while done < header.n_atoms:
        count = min(CHUNK, header.n_atoms - done)
        try:
            lines = islice(file, count)
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # counted below
                rows = np.atleast_1d(np.loadtxt(lines, row, usecols=used, comments=None, encoding="latin1"))
        except ValueError as error:
            reason = str(error).split(";")[0]
            raise FormatError(f"{path} is damaged after atom {done}: {reason}; check the file") from None
        if len(rows) != count:
            raise FormatError(f"{path} ends after atom {done + len(rows)} of {header.n_atoms}; it is cut off")
        values, inverse = np.unique(rows["what"], return_inverse=True)
        wrong: list[Any]
        if what == "type":
            wrong = [int(value) for value in values if not 1 <= value < len(table)]
            found = None if wrong else table[values]
        else:
            wrong = [str(value) for value in values if value not in atomic_numbers]
            found = None if wrong else np.array([atomic_numbers[str(value)] for value in values])
        if found is None:
            raise FormatError(f"{path} has atoms of {what} {wrong[0]!r}, and elements={list(elements)} are given")
        positions = np.stack([rows[axis] for axis in "xyz"], axis=1)
        yield (positions @ header.cell if kind == "xs" else positions - header.origin), found[inverse]
        done += count
