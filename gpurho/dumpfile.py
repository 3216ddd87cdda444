"""LAMMPS text dumps read in pieces: https://docs.lammps.org/dump.html, of the style "atom" or "custom"."""

from __future__ import annotations

import gzip
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import FormatError
from gpurho.structure import MAX_COORDINATE

CHUNK = 50_000
"""Atoms that are in memory while a file is read."""

BLOCK = 1 << 20
"""Bytes that are in memory where frames are passed over."""

Chunk = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]
"""Positions (n, 3) in angstrom, atomic numbers (n,), and the atoms' places (n,) in the order of the whole."""


@dataclass(frozen=True)
class Header:
    """What a file says before its atoms: their number, the cell (rows, angstrom), its origin and its periods."""

    n_atoms: int
    cell: NDArray[np.float64]
    origin: NDArray[np.float64]
    pbc: NDArray[np.bool_]


def opened(path: Path) -> IO[bytes]:
    """The file, unpacked where its name ends in .gz."""
    try:
        return cast(IO[bytes], gzip.open(path, "rb")) if path.suffix.lower() == ".gz" else open(path, "rb")
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}; check the name") from None


def seek_frame(file: IO[bytes], path: Path, frame: int) -> None:
    """Go to a frame of a dump, counted from 0, or from the end with -1."""
    starts: list[int] = []
    while not 0 <= frame < len(starts):
        here = file.tell()
        while (line := file.readline(1 << 16)) and not line.strip():  # at the end
            here = file.tell()
        if not line:
            break
        file.seek(here)
        header, _ = read_dump_header(file, path)
        starts.append(here)
        if frame != len(starts) - 1:
            _skip_lines(file, header.n_atoms)
    if not starts:
        raise FormatError(f"{path} is empty; give a LAMMPS text dump")
    if not -len(starts) <= frame < len(starts):
        raise FormatError(f"{path} has {len(starts)} frames and no frame {frame}; give 0 to {len(starts) - 1}, or -1")
    file.seek(starts[frame])


def _skip_lines(file: IO[bytes], count: int) -> None:
    while count and (data := file.read(BLOCK)):
        ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n"))
        if len(ends) >= count:
            file.seek(int(ends[count - 1]) + 1 - len(data), 1)
            return
        count -= len(ends)


def read_dump_header(file: IO[bytes], path: Path) -> tuple[Header, list[str]]:
    """The header of the next frame of a LAMMPS text dump, and the names of its columns.

    https://docs.lammps.org/dump.html, of the style "atom" or "custom".
    """
    n_atoms, box = -1, None
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
                if box is None or n_atoms < 0:  # Frames of groups may have none.
                    break
                if not all((np.abs(part) <= MAX_COORDINATE).all() for part in box[:2]):
                    raise FormatError(f"{path} has a box that is not finite or beyond {MAX_COORDINATE:.0e} angstrom")
                return Header(n_atoms, *box), words[2:]
            elif words[1] == "UNITS":
                if (unit := file.readline().decode(errors="replace").strip()) not in ("metal", "real"):
                    raise FormatError(f"{path} has units {unit!r}, not 'metal' or 'real'; give lengths in angstrom")
            else:
                file.readline()
        except FormatError:
            raise
        except (ValueError, IndexError):
            raise FormatError(f"{path} has a damaged header at {line[:40]!r}; check the file") from None
    raise FormatError(f"{path} has no atoms, or no box before them; give a LAMMPS text dump")


def _box(
    words: Sequence[str], rows: Sequence[Sequence[float]]
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.bool_]]:
    """Cell, origin and periods from the three lines of a box; bounds of a tilted box enclose its corners."""
    general, tilted = words[:2] == ["abc", "origin"], words[:3] == ["xy", "xz", "yz"]
    periods = words[2:5] if general else words[3:6] if tilted else words[:3]
    if len(periods) != 3 or any(len(row) != (4 if general else 3 if tilted else 2) for row in rows):
        raise ValueError("numbers of a box that its line does not name")
    if general:
        table = np.array(rows)
        cell, low = table[:, :3].copy(), table[:, 3].copy()
    else:
        xy, xz, yz = (rows[0][2], rows[1][2], rows[2][2]) if tilted else (0.0, 0.0, 0.0)
        low, high = np.array([row[0] for row in rows]), np.array([row[1] for row in rows])
        # In the order of ASE's sums, for the same bits.
        lengths = (high - low) - [abs(xy), abs(yz), 0.0] - [abs(xz), 0.0, 0.0]
        low = low - [min(0.0, xy), min(0.0, yz), 0.0] - [min(0.0, xz), 0.0, 0.0]
        cell = np.array([[lengths[0], 0, 0], [xy, lengths[1], 0], [xz, yz, lengths[2]]])
    return cell, low, np.array([p == "pp" for p in periods])


def dump_chunks(
    file: IO[bytes], path: Path, header: Header, columns: Sequence[str], elements: Sequence[str] = ()
) -> Iterator[Chunk]:
    """The atoms of a frame in pieces, in the order of the file, where ASE puts them.

    Positions are as in the file where all directions are periodic, and else counted from the box's origin.
    """
    kind, what = _chosen(path, columns)
    names: Mapping[str, int] = {name: i for i, name in enumerate(columns)}
    table = _elements_of_types(elements)
    fields = [kind.replace("x", axis) for axis in "xyz"]
    row = [("x", "f8"), ("y", "f8"), ("z", "f8"), ("what", {"type": "i8", "mass": "f8"}.get(what, "U8"))]
    used = [*(names[name] for name in fields), names[what]]
    if "id" in names:
        row.append(("id", "i8"))
        used.append(names["id"])
    shift = np.zeros(3) if header.pbc.all() else header.origin
    done = 0
    while done < header.n_atoms:
        rows = _rows(file, path, np.dtype(row), used, len(columns), done, header.n_atoms)
        values, inverse = np.unique(rows["what"], return_inverse=True)
        found = _numbers(values, what, table)
        if isinstance(found, str):
            known = f"elements={list(elements)} are given"
            if what == "type" and not elements:
                known = "no elements of the types are given, e.g. --species Al,Si"
            raise FormatError(f"{path} has atoms of {what} {found}, and {known}")
        positions = np.stack([rows[axis] for axis in "xyz"], axis=1)
        ids = rows["id"] if "id" in names else np.arange(done, done + len(rows))
        yield (positions @ header.cell if "s" in kind else positions - shift), found[inverse], ids
        done += len(rows)


def _chosen(path: Path, columns: Sequence[str]) -> tuple[str, str]:
    """The first of the columns of positions, and that of the kind of atom; the order is ASE's."""
    kind = next((k for k in ("x", "xs", "xu", "xsu") if {k.replace("x", axis) for axis in "xyz"} <= {*columns}), None)
    what = next((name for name in ("element", "mass", "type") if name in columns), None)
    if kind is None or what is None:
        raise FormatError(
            f"{path} has columns {' '.join(columns)}; x y z (or xs, xu) and type, mass or element are needed"
        )
    return kind, what


def _elements_of_types(elements: Sequence[str]) -> NDArray[np.int64]:
    """Atomic number of each type, 0 at place 0."""
    from ase.data import atomic_numbers

    unknown = [symbol for symbol in elements if symbol not in atomic_numbers]
    if unknown:
        raise FormatError(f"elements {list(elements)} name {unknown[0]!r}, no chemical symbol; give e.g. ['Si', 'Ge']")
    return np.array([0, *(atomic_numbers[symbol] for symbol in elements)], dtype=np.int64)


def _rows(
    file: IO[bytes], path: Path, row: np.dtype[Any], used: Sequence[int], width: int, done: int, of: int
) -> NDArray[Any]:
    """The next lines of atoms, each of `width` words."""
    count = min(CHUNK, of - done)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")  # counted below
            lines = _of_width(islice(file, count), width)
            rows = np.atleast_1d(np.loadtxt(lines, row, usecols=used, comments=None, encoding="latin1"))
    except ValueError as error:
        reason = str(error).split(";")[0]
        raise FormatError(f"{path} is damaged after atom {done}: {reason}; check the file") from None
    if len(rows) != count:
        raise FormatError(f"{path} ends after atom {done + len(rows)} of {of}; it is cut off")
    return np.asarray(rows)


def _of_width(lines: Iterator[bytes], width: int) -> Iterator[bytes]:
    """Lines of so many words: loadtxt looks at those that are used alone."""
    for line in lines:
        if len(line.split()) not in (0, width):
            raise ValueError(f"a line has {len(line.split())} words for {width} columns")
        yield line


def _numbers(values: NDArray[Any], what: str, table: NDArray[np.int64]) -> NDArray[np.int64] | str:
    """Atomic numbers of types or symbols, or the first one that is not known."""
    from ase.data import atomic_numbers

    if what == "type":
        wrong = [value for value in values.tolist() if not 1 <= value < len(table)]
        return str(wrong[0]) if wrong else table[values]
    if what == "mass":
        from ase.data import atomic_masses

        return np.abs(np.asarray(atomic_masses)[:, None] - values).argmin(axis=0)
    names = [str(value) for value in values]
    unknown = [name for name in names if name not in atomic_numbers]
    return repr(unknown[0]) if unknown else np.array([atomic_numbers[name] for name in names], dtype=np.int64)
