"""Atoms of structures too large for memory: read in pieces, sorted by place into a file, served around tiles.

A `StructureSource` holds a table of offsets and nothing of the atoms. It is made by one pass over a LAMMPS dump or an
HDF5 file, in pieces of `CHUNK` atoms, and gives what `gpurho.descriptors.Environment` needs for a box of grid points:
the atoms as far as the descriptors look, in their order, so that descriptors have the bits that the whole structure
gives. `gpurho.predict` takes it in place of atoms.
"""

from __future__ import annotations

import errno
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import reason_of
from gpurho.dumpfile import CHUNK, Chunk, Header, dump_chunks, opened, read_dump_header, seek_frame
from gpurho.errors import FormatError, GpurhoError, StoreError, StructureError
from gpurho.grid import Grid
from gpurho.hdf5atoms import hdf5_chunks
from gpurho.hdf5guard import DAMAGE
from gpurho.kernels.lattice import transformed
from gpurho.partition import Tile, TileSet
from gpurho.structure import MAX_COORDINATE, Structure, cell_heights, fingerprint, symbols_of

BIN_WIDTH = 16.0
"""Least thickness of the bins that atoms are sorted into, angstrom: a tile of the default shape, about."""

MAX_BINS = 1 << 26
BLOCK_ATOMS = 30_000
"""Atoms in a block of bins, about: what is in memory where all atoms are gone through with their neighbours."""

RECORD = np.dtype([("index", "<i8"), ("position", "<f8", 3), ("number", "<i2")])


@dataclass(frozen=True)
class Part:
    """Some atoms of a structure and all around them: `index` are their numbers in the whole, ascending.

    `inside` tells those that the part is about, each of which is in one part, from those around them.
    """

    structure: Structure
    index: NDArray[np.int64]
    inside: NDArray[np.bool_]


class StructureSource:
    """The atoms of a huge structure, in files sorted by place and by number.

    Use `from_dump`, `from_hdf5` or `from_chunks`. The files are temporary, 68 bytes an atom and half as much again
    while they are made, and go with the object.

    Attributes
    ----------
    cell, pbc
        As of `gpurho.structure.Structure`.
    counts : dict of int to int
        Atoms of each atomic number.
    """

    def __init__(
        self,
        by_place: IO[bytes],
        by_index: IO[bytes],
        header: Header,
        start: NDArray[np.int64],
        shape: NDArray[np.int64],
        counts: dict[int, int],
    ) -> None:
        self.cell, self.pbc, self.counts = header.cell, header.pbc, counts
        self._by_place, self._by_index, self._shape, self._start = by_place, by_index, shape, start
        self._inverse: NDArray[np.float64] = np.linalg.inv(header.cell).astype(np.float64)

    def __len__(self) -> int:
        return int(self._start[-1])

    @property
    def symbols(self) -> tuple[str, ...]:
        """The chemical symbols present, each once, in alphabetic order."""
        return symbols_of(self.counts)

    @property
    def volume(self) -> float:
        """Volume of the cell, angstrom^3."""
        return float(abs(np.linalg.det(self.cell)))

    def fingerprint(self) -> str:
        """That of `structure`: equal atoms give equal results, wherever they are kept."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(len(self), self.pieces, self.cell, self.pbc)

    @classmethod
    def from_dump(
        cls, path: str | Path, elements: Sequence[str] = (), folder: str | Path | None = None, frame: int = -1
    ) -> StructureSource:
        """From a LAMMPS text dump, the atoms in the order of their ids.

        Parameters
        ----------
        path : path
            With columns x y z, xs ys zs or xu yu zu, and `element` or `type`; any box, triclinic included.
        elements : sequence of str
            Chemical symbol of each type, in the order of the types; not needed where there is a column `element`.
        folder : path, optional
            Where the sorted files lie, on a disk with room; by default where the system keeps temporary files.
        frame : int
            Of several, counted from 0; the last by default.

        Raises
        ------
        FormatError
            For a file that is no dump, is cut off, or lacks columns; nothing is left behind.
        """
        source = Path(path)
        try:
            with opened(source) as file:
                seek_frame(file, source, frame)
                header, columns = read_dump_header(file, source)
                if header.n_atoms == 0:
                    raise FormatError(f"{path} has no atoms in frame {frame}; give another one, e.g. {path}@0")
                return cls.from_chunks(header, dump_chunks(file, source, header, columns, elements), folder)
        except (OSError, EOFError, zlib.error) as error:
            raise FormatError(f"{path} cannot be read: {str(error).splitlines()[0]}; check the file") from None

    @classmethod
    def from_hdf5(cls, path: str | Path, group: str = "structure", folder: str | Path | None = None) -> StructureSource:
        """From a group of an HDF5 file with data sets `positions` (n, 3), `numbers` (n,), attributes `cell`, `pbc`.

        Files of densities of this library have it as ``structure``.
        """
        import h5py

        try:
            with h5py.File(path, "r") as h5:
                return cls.from_chunks(*hdf5_chunks(h5, group), folder)
        except GpurhoError:
            raise
        except DAMAGE as error:
            reason = reason_of(error)
            raise FormatError(f"{path} has no atoms in group {group!r}: {reason}; check the file") from None

    @classmethod
    def from_chunks(cls, header: Header, chunks: Iterator[Chunk], folder: str | Path | None = None) -> StructureSource:
        """From pieces of atoms; their order is that of the numbers in each piece, which need not have all values."""
        Structure(np.zeros((1, 3)), np.ones(1, np.int64), header.cell, header.pbc)  # its checks of the cell
        shape = np.clip((cell_heights(header.cell) / BIN_WIDTH).astype(np.int64), 1, None)
        while int(shape.prod()) > min(MAX_BINS, max(1 << 16, header.n_atoms)):
            shape = np.maximum(1, shape // 2)
        inverse = np.asarray(np.linalg.inv(header.cell), dtype=np.float64)
        order, species = _Order(), np.zeros(119, np.int64)
        counts = np.zeros(int(shape.prod()), np.int64)

        def bins(records: NDArray[Any]) -> NDArray[np.int64]:
            return _flat(_bins(np.ascontiguousarray(records["position"]), inverse, header.pbc, shape), shape)

        with _room(), _temporary(folder) as unsorted:
            for positions, numbers, ids in chunks:
                if not len(ids):
                    continue
                _check(positions, numbers, ids)
                records = np.empty(len(numbers), RECORD)
                records["index"], records["position"], records["number"] = ids, positions, numbers
                counts += np.bincount(bins(records), minlength=len(counts))
                species += np.bincount(numbers, minlength=119)
                order.add(ids)
                _write(unsorted, records)
            if order.n != header.n_atoms or order.n == 0:
                raise FormatError(f"the file has {order.n} atoms and says {header.n_atoms}; it is cut off or damaged")
            order.settle(unsorted)
            start = np.concatenate([[0], np.cumsum(counts)])
            by_place = _temporary(folder)
            try:
                by_index = _temporary(folder)
            except BaseException:
                by_place.close()
                raise
            try:
                _scatter(unsorted, by_place, order, start[:-1].copy(), bins)
                _scatter(unsorted, by_index, order, np.arange(0, order.n, CHUNK), lambda r: r["index"] // CHUNK)
            except BaseException:
                by_place.close()
                by_index.close()
                raise
        found = {int(z): int(species[z]) for z in np.flatnonzero(species)}
        return cls(by_place, by_index, header, start, shape, found)

    def near(self, grid: Grid, tile: Tile | TileSet, reach: float) -> tuple[Structure, NDArray[np.int64]]:
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
        records = self._around(fractional.min(0), fractional.max(0), reach)
        if len(records) == 0:
            records = self._read(self._by_place, 0, 1)
        return self._structure(records), records["index"].astype(np.int64)

    def parts(self, reach: float) -> Iterator[Part]:
        """All atoms, some ten thousands at a time with all others within `reach` angstrom; each is inside once."""
        per_bin = max(1e-9, len(self) / len(self._start))
        edge = max(1, round(float(np.cbrt(BLOCK_ATOMS / per_bin))))
        for low in np.ndindex(*(-(-int(n) // edge) for n in self._shape)):
            first = np.array(low) * edge
            last = np.minimum(first + edge, self._shape)
            records = self._around(first / self._shape, last / self._shape, reach)
            places = _bins(np.ascontiguousarray(records["position"]), self._inverse, self.pbc, self._shape)
            inside = np.asarray(((places >= first) & (places < last)).all(axis=1))
            if inside.any():
                yield Part(self._structure(records), records["index"].astype(np.int64), inside)

    def pieces(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Positions and numbers of all atoms in their order, in pieces."""
        for first in range(0, len(self), CHUNK):
            records = self._read(self._by_index, first, min(first + CHUNK, len(self)))
            records = records[np.argsort(records["index"])]
            yield records["position"].astype(np.float64), records["number"].astype(np.int64)

    def structure(self) -> Structure:
        """All atoms, in memory."""
        positions, numbers = zip(*self.pieces(), strict=True)
        return Structure(np.concatenate(positions), np.concatenate(numbers), self.cell, self.pbc)

    def check_overlaps(self, minimum: float = 0.5) -> None:
        """Raise `StructureError` where two atoms (periodic images included) are closer than `minimum` angstrom."""
        for part in self.parts(minimum):
            part.structure.check_overlaps(minimum, part.index)

    def _around(self, low: NDArray[np.float64], high: NDArray[np.float64], reach: float) -> NDArray[Any]:
        """Records of the atoms within `reach` of a box in fractional coordinates, in the order of their numbers."""
        margin = reach * np.linalg.norm(self._inverse, axis=0) + 1e-9
        axes = [
            _span(a, b, int(n), bool(period))
            for a, b, n, period in zip(low - margin, high + margin, self._shape, self.pbc, strict=True)
        ]
        parts = []
        for ix in axes[0]:
            for iy in axes[1]:
                row = (ix * int(self._shape[1]) + iy) * int(self._shape[2])
                for z0, z1 in _runs(axes[2]):
                    span = int(self._start[row + z0]), int(self._start[row + z1])
                    parts.append(self._read(self._by_place, *span))
        records = np.concatenate(parts)
        records = records[self._within(records, low - margin, high + margin)]
        return records[np.argsort(records["index"])]

    def _within(self, records: NDArray[Any], low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Which atoms have an image in a box of fractional coordinates: bins hold many that have none."""
        fractional = transformed(np.ascontiguousarray(records["position"]), self._inverse)
        offset = np.where(self.pbc, np.mod(fractional - low, 1.0), fractional - low)
        # What lies outside of a cell without period counts as at its edge.
        beyond = ~self.pbc & (((low <= 0.0) & (offset < 0.0)) | ((high >= 1.0) & (fractional > 1.0)))
        return np.asarray((((offset >= 0.0) & (offset <= high - low)) | beyond).all(axis=1))

    def _structure(self, records: NDArray[Any]) -> Structure:
        return Structure(records["position"], records["number"].astype(np.int64), self.cell, self.pbc)

    def _read(self, file: IO[bytes], first: int, last: int) -> NDArray[Any]:
        if file.closed:
            raise StoreError("the atoms' file was closed; read the structure again")
        file.seek(first * RECORD.itemsize)
        data = file.read((last - first) * RECORD.itemsize)
        if len(data) != (last - first) * RECORD.itemsize:
            raise StoreError("the temporary file of the atoms was cut off; read the structure again")
        return np.frombuffer(data, RECORD)

    def close(self) -> None:
        """Remove the sorted files."""
        self._by_place.close()
        self._by_index.close()

    def __enter__(self) -> StructureSource:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# -- sorting ----------------------------------------------------------------------------------------------------


class _Order:
    """The order of atoms by numbers that a file gives them: mostly 1 up to n, but gaps are allowed."""

    def __init__(self) -> None:
        self.n = 0
        self._low, self._high = np.iinfo(np.int64).max, np.iinfo(np.int64).min
        self._sorted: NDArray[np.int64] | None = None

    def add(self, ids: NDArray[np.int64]) -> None:
        """Numbers of some more atoms."""
        self.n += len(ids)
        self._low, self._high = min(self._low, int(ids.min())), max(self._high, int(ids.max()))

    def settle(self, unsorted: IO[bytes]) -> None:
        """All numbers are known; raises `FormatError` where two are equal."""
        whole = self._high - self._low == self.n - 1
        if not whole:  # eight bytes an atom; of a file that has a part of the atoms
            self._sorted = np.sort(np.concatenate([r["index"].astype(np.int64) for r in _records(unsorted)]))
            equal = np.flatnonzero(np.diff(self._sorted) == 0)
            if len(equal):
                raise FormatError(f"the file has two atoms with id {self._sorted[equal[0]]}; it is damaged")
            return
        seen = np.zeros(self.n, dtype=bool)
        for records in _records(unsorted):
            seen[records["index"] - self._low] = True
        if not seen.all():
            lacking = self._low + int(np.argmin(seen))
            raise FormatError(f"the file has two atoms with one id, and none with id {lacking}; it is damaged")

    def __call__(self, ids: NDArray[np.int64]) -> NDArray[np.int64]:
        """Places of atoms in the order."""
        return ids - self._low if self._sorted is None else np.searchsorted(self._sorted, ids)


def _check(positions: NDArray[np.float64], numbers: NDArray[np.int64], ids: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~(np.abs(positions) <= MAX_COORDINATE).all(axis=1))
    if bad.size:
        raise StructureError(
            f"atom {ids[bad[0]]} has position {positions[bad[0]]}; all coordinates must be finite, none beyond"
            f" {MAX_COORDINATE:.0e} angstrom"
        )
    bad = np.flatnonzero((numbers < 1) | (numbers > 118))
    if bad.size:
        raise StructureError(f"atom {ids[bad[0]]} has atomic number {numbers[bad[0]]}; give 1 to 118")


def _bins(
    positions: NDArray[np.float64], inverse: NDArray[np.float64], pbc: NDArray[np.bool_], shape: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The bins of atoms, (n, 3)."""
    fractional = transformed(positions, inverse)
    wrapped = np.where(pbc, fractional - np.floor(fractional), fractional)
    return np.clip(np.floor(wrapped * shape).astype(np.int64), 0, shape - 1)


def _flat(bins: NDArray[np.int64], shape: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.asarray((bins[:, 0] * shape[1] + bins[:, 1]) * shape[2] + bins[:, 2])


def _temporary(folder: str | Path | None) -> IO[bytes]:
    """A file without a name, which the system removes when it is closed."""
    inside = None if folder is None else str(folder)
    try:
        return tempfile.TemporaryFile(dir=inside, prefix="gpurho-atoms-")
    except OSError as error:
        raise StoreError(f"atoms cannot be sorted in {inside}: {error.strerror}; give a folder with room") from None


@contextmanager
def _room() -> Iterator[None]:
    """Says of a full disk that it is one: buffers are written, and fail, where files are searched or closed too."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise StoreError(f"atoms cannot be sorted on the disk: {error.strerror}; give a folder with room") from None


def _records(file: IO[bytes]) -> Iterator[NDArray[Any]]:
    file.seek(0)
    while data := file.read(CHUNK * RECORD.itemsize):
        yield np.frombuffer(data, RECORD).copy()


def _scatter(
    unsorted: IO[bytes],
    file: IO[bytes],
    order: _Order,
    place: NDArray[np.int64],
    groups: Callable[[NDArray[Any]], NDArray[np.int64]],
) -> None:
    """Write the atoms of each group one after another; `place` is where each group's next atom goes."""
    for records in _records(unsorted):
        records["index"] = order(records["index"])
        keys = groups(records)
        sorting = np.argsort(keys, kind="stable")
        records, keys = records[sorting], keys[sorting]
        for group in np.split(np.arange(len(keys)), np.flatnonzero(np.diff(keys)) + 1):
            key = int(keys[group[0]])
            file.seek(int(place[key]) * RECORD.itemsize)
            _write(file, records[group[0] : group[-1] + 1])
            place[key] += len(group)
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
