"""Files of the DFT code SPARC that hold a structure or a density: ``.inpt``, ``.ion`` and ``.dens``.

Keywords as in SPARC's manual: https://github.com/SPARC-X/SPARC, folder doc. Lengths in these files are in Bohr.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import TextReader, fixed, floats, put_rows, reading, slabs
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import Field
from gpurho.formats_cube import parse_cube, put_head
from gpurho.formats_vasp import refuse_part
from gpurho.grid import Grid
from gpurho.structure import Structure
from gpurho.units import BOHR, PER_ANGSTROM3, PER_BOHR3

_KEYWORD = re.compile(r"([A-Z][A-Z0-9_]*):", re.IGNORECASE)
_CELL_TOLERANCE = 1e-5
"""Largest relative difference of two cells that the six decimals of a ``.dens`` header explain."""

_COINCIDENT = 0.3
"""Atoms closer than this (angstrom) in a ``.dens`` header are those of a version that wrote wrong positions."""


# -- .inpt ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Inpt:
    """An input file: the cell (3, 3) in angstrom, or None where it names none, and the words of every keyword."""

    cell: NDArray[np.float64] | None
    values: dict[str, tuple[str, ...]]


def parse_inpt(lines: Iterable[str]) -> Inpt:
    """Keywords and cell of the lines of an input file, or of its echo in an output file."""
    words = [word for line in lines for word in line.split("#")[0].split()]
    found_words: dict[str, list[str]] = {}
    key = ""
    for word in words:
        found = _KEYWORD.fullmatch(word)
        if found:
            key = found.group(1).upper()
            found_words[key] = []
        elif key:
            found_words[key].append(word)
    values = {name: tuple(given) for name, given in found_words.items()}
    return Inpt(_cell(values), values)


def _cell(values: dict[str, tuple[str, ...]]) -> NDArray[np.float64] | None:
    """CELL scales unit vectors along LATVEC, LATVEC_SCALE the vectors themselves."""
    key = "CELL" if "CELL" in values else "LATVEC_SCALE"
    if key not in values:
        return None
    scale = floats(list(values[key][:3]))
    rows = floats(list(values["LATVEC"][:9])).reshape(3, 3) if "LATVEC" in values else np.eye(3)
    if scale.shape != (3,):
        raise ValueError(f"{key} has {len(scale)} numbers, three are expected")
    if key == "CELL":
        rows = rows / np.linalg.norm(rows, axis=1)[:, None]
    return rows * scale[:, None] * BOHR


def read_inpt(path: str | Path) -> Inpt:
    """An input file of SPARC.

    Raises
    ------
    FormatError
        For a file that cannot be read, or has no keywords.
    """
    target = Path(path)
    with reading(target, "inpt"), open(target, encoding="utf-8", errors="replace") as file:
        found = parse_inpt(file)
    if not found.values:
        raise FormatError(f"{target} has no keywords; give an input file of SPARC")
    return found


# -- .ion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Ion:
    """A structure file: atoms in its order.

    Attributes
    ----------
    numbers : (n,) array
    coordinates : (n, 3) array
        Angstrom, or fractions of the cell where `fractional` says so.
    fractional : (n,) array of bool
    pseudopotentials : dict
        The file of each chemical symbol.
    """

    numbers: NDArray[np.int64]
    coordinates: NDArray[np.float64]
    fractional: NDArray[np.bool_]
    pseudopotentials: dict[str, str]

    def structure(self, cell: NDArray[np.float64]) -> Structure:
        """The atoms in a cell (3, 3), angstrom."""
        positions = np.where(self.fractional[:, None], self.coordinates @ cell, self.coordinates)
        return Structure(positions, self.numbers, cell, np.array([True, True, True]))


def read_ion(path: str | Path) -> Ion:
    """A structure file of SPARC.

    Raises
    ------
    FormatError
        For a file that cannot be read, names unknown elements, or has other counts than it says.
    """
    from ase.data import atomic_numbers

    target = Path(path)
    numbers: list[int] = []
    rows: list[NDArray[np.float64]] = []
    fractional: list[bool] = []
    potentials: dict[str, str] = {}
    symbol, section, count = "", "", 0
    with reading(target, "ion"), open(target, encoding="utf-8", errors="replace") as file:
        lines = iter([text for line in file if (text := line.split("#")[0].strip())])
        for line in lines:
            words = line.split()
            if not _KEYWORD.fullmatch(words[0]):
                if section.startswith("COORD"):
                    raise FormatError(f"{target} has more than the {count} atoms of {symbol} that N_TYPE_ATOM names")
                continue
            section = words[0][:-1].upper()
            if section == "ATOM_TYPE":
                symbol, count = words[1].rstrip("0123456789"), 0
                if symbol not in atomic_numbers or symbol == "X":
                    raise FormatError(f"{target} names {words[1]!r}, which is no element; check the file")
            elif section == "N_TYPE_ATOM":
                count = int(words[1])
            elif section == "PSEUDO_POT":
                potentials[symbol] = words[1]
            elif section in ("COORD", "COORD_FRAC"):
                if count < 1:
                    raise FormatError(f"{target} has coordinates of {symbol!r} before a positive N_TYPE_ATOM")
                part = [floats(next(lines).split()[:3]) for _ in range(count)]
                if any(row.shape != (3,) for row in part):
                    raise FormatError(
                        f"{target} has a position of {symbol} without three numbers; the file is not whole"
                    )
                rows.append(np.array(part) * (BOHR if section == "COORD" else 1.0))
                numbers += [atomic_numbers[symbol]] * count
                fractional += [section == "COORD_FRAC"] * count
        if not rows:
            raise FormatError(f"{target} has no atoms; give a structure file of SPARC")
        return Ion(np.array(numbers, dtype=np.int64), np.concatenate(rows), np.array(fractional), potentials)


def read_structure(path: str | Path) -> Structure:
    """The structure of a calculation from its ``.ion`` and ``.inpt``; `path` is either, or their common stem."""
    ion, inpt = (_beside(Path(path), suffix) for suffix in (".ion", ".inpt"))
    cell = read_inpt(inpt).cell
    if cell is None:
        raise FormatError(f"{inpt} names no CELL; give the input file of the calculation")
    with reading(ion, "ion"):
        return read_ion(ion).structure(cell)


def _beside(path: Path, suffix: str) -> Path:
    """The file of the same calculation with another suffix; a name may have points in itself, so no with_suffix."""
    name = path.name
    for known in (".dens", ".ion", ".inpt", ".aimd", ".static", ".out", ".eigen"):
        name = name.removesuffix(known)
    return path.with_name(name + suffix)


# -- .dens ------------------------------------------------------------------------------------------------------


def read_dens(reader: TextReader) -> Density:
    """The density of a ``.dens`` file, with the atoms and the cell of the files beside it where these are.

    The header has six decimals, which shift the volume by parts in a million, and older versions of SPARC wrote wrong
    positions into it. So the cell comes from the ``.inpt`` of the same name or from the lengths in the second line,
    and the atoms from the ``.ion``, except after dynamics or relaxation, which move the atoms away from it.

    Raises
    ------
    FormatError
        Also where the files beside it are of another structure, or where the positions of the header coincide and no
        ``.ion`` is there.
    """
    path, cube = reader.path, parse_cube(reader)
    cell = cube.cell
    found = re.search(r"Cell length:\s*(\S+)\s+(\S+)\s+([^\s,]+)", cube.titles[1])
    if found:
        lengths = floats(list(found.groups())) * BOHR
        cell = _same_cell(path, cell, cell * (lengths / np.linalg.norm(cell, axis=1))[:, None], "its own second line")
    inpt, ion = _beside(path, ".inpt"), _beside(path, ".ion")
    if inpt.exists() and (named := read_inpt(inpt).cell) is not None:
        cell = _same_cell(path, cell, named, str(inpt))
    structure = Structure(cube.positions, cube.numbers, cell, np.array([True, True, True]))
    if ion.exists():
        atoms = read_ion(ion).structure(cell)
        if not np.array_equal(atoms.numbers, cube.numbers):
            raise FormatError(
                f"{path} has {len(structure)} atoms, not those of {ion}; remove the file of the other run"
            )
        if not any(_beside(path, suffix).exists() for suffix in (".aimd", ".geopt")):
            structure = atoms
    try:
        structure.check_overlaps(_COINCIDENT)
    except ValueError:
        raise FormatError(
            f"{path} has atoms on top of each other in its header, as older versions of SPARC wrote them; put the .ion"
            " file of the calculation beside it"
        ) from None
    values = cube.values
    values *= np.float32(PER_BOHR3)
    return Density(Grid(cube.shape, cell, cube.origin), structure, values, info={"source": str(path)})


def _same_cell(path: Path, cell: NDArray[np.float64], named: NDArray[np.float64], source: str) -> NDArray[np.float64]:
    """`named`, which must be the cell that the steps of the header make, up to their rounding."""
    # A step is rounded to 5e-7 Bohr and counted some hundred times.
    reach = _CELL_TOLERANCE * np.linalg.norm(cell, axis=1).max() + 5e-4 * BOHR
    if np.abs(cell - named).max() > reach:
        raise FormatError(
            f"{path} has a grid that does not match the cell of {source}: lengths"
            f" {np.round(np.linalg.norm(cell, axis=1), 4).tolist()} and"
            f" {np.round(np.linalg.norm(named, axis=1), 4).tolist()} angstrom; check the files"
        )
    return named


def write_dens(file: IO[str], density: Density, values: Field, field: str) -> None:
    """Write one field of a density in the layout of SPARC, which reads it back through INPUT_DENS_FILE."""
    refuse_part(density, "a .dens file")
    put_dens_head(file, density.structure, density.grid.shape, f"Electron density ({field})")
    for slab in slabs(values, 0):
        put_rows(file, slab.reshape(-1, density.shape[2]).astype(np.float64) * PER_ANGSTROM3, "  %.8E")


def put_dens_head(
    file: IO[str],
    structure: Structure,
    shape: tuple[int, int, int],
    what: str = "Electron density",
    valence: NDArray[np.float64] | None = None,
) -> None:
    """The lines of a ``.dens`` file before its values."""
    lengths = np.linalg.norm(structure.cell, axis=1) / BOHR
    titles = (
        f"{what} in Cube format printed by gpurho",
        f"Cell length: {fixed(lengths, 0, 12)}, boundary condition: P P P.",
    )
    put_head(file, titles, Grid(shape, structure.cell), structure, valence)
