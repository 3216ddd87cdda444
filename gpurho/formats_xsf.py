"""XCrySDen's xsf: lengths in angstrom, the first grid axis fastest, a general grid that repeats its end points.

The format fixes no unit of the values. Files written here say e/angstrom^3 in their comments, and a unit that a file
names is believed; others are taken as e/Bohr^3, which is what Quantum ESPRESSO, Abinit and Siesta write.
"""

from __future__ import annotations

import re
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import TextReader, fixed, floats, put_rows, slabs
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import Field
from gpurho.formats_vasp import refuse_part
from gpurho.grid import Grid
from gpurho.structure import Structure
from gpurho.units import PER_BOHR3

_PERIODS = {"MOLECULE": 0, "POLYMER": 1, "SLAB": 2, "CRYSTAL": 3}
_CELL_TOLERANCE = 1e-4
"""Largest difference of the grid's vectors and the cell's that rounding in a file explains, relative."""

_REPEAT_TOLERANCE = 1e-4
"""Largest difference of the last plane and the first, relative to the largest value."""


def write_xsf(file: IO[str], density: Density, values: Field, field: str) -> None:
    """Write one field of a density as an xsf file."""
    grid, structure = density.grid, density.structure
    refuse_part(density, "an xsf file", origin=True)
    file.write(f"# electron density, {field}, e/angstrom^3, written by gpurho\nCRYSTAL\nPRIMVEC\n")
    vectors = "".join(f" {fixed(row, 19, 14)}\n" for row in grid.cell)
    file.write(f"{vectors}PRIMCOORD\n{len(structure):5d} 1\n")
    for number, position in zip(structure.numbers, structure.positions, strict=True):
        file.write(f"{number:5d} {fixed(position, 19, 12)}\n")
    file.write("BEGIN_BLOCK_DATAGRID_3D\nelectron_density_in_e/angstrom^3\nBEGIN_DATAGRID_3D_density\n")
    file.write(" ".join(str(n + 1) for n in grid.shape) + f"\n {fixed(grid.origin, 19, 14)}\n{vectors}")
    for slab in slabs(values, 2):
        _put_planes(file, slab)
    _put_planes(file, np.asarray(values[:, :, 0:1]))
    file.write("END_DATAGRID_3D\nEND_BLOCK_DATAGRID_3D\n")


def _put_planes(file: IO[str], slab: NDArray[np.float32]) -> None:
    planes = np.pad(slab.transpose(2, 1, 0), ((0, 0), (0, 1), (0, 1)), mode="wrap")
    put_rows(file, planes.reshape(-1, planes.shape[2]).astype(np.float64), " %.8E")


def read_xsf(reader: TextReader, scale: float | None = None) -> Density:
    """The density of an xsf file of one data grid; `scale` takes its values to e/angstrom^3."""
    head = _Head(reader)
    path = reader.path
    shape = [int(n) for n in reader.line().split()]
    if len(shape) != 3 or min(shape) < 2:
        raise FormatError(f"{path} names {shape} grid points; three counts of at least 2 are expected")
    origin, vectors = reader.row(3), reader.vectors()
    n = shape[0] * shape[1] * shape[2]
    values = reader.values(n).reshape(shape[::-1]).transpose(2, 1, 0)
    line = reader.filled("#")
    if line is None or not line.startswith("END_DATAGRID"):
        said = (line or "nothing")[:30]
        raise FormatError(f"{path} has {said!r} where its data grid should end after {n} values; check its counts")
    while (line := reader.filled("#")) is not None:
        if "DATAGRID" in line and not line.startswith("END_"):
            raise FormatError(f"{path} holds more than one data grid; give a file of the total density alone")
    values, cell = _without_repeats(path, values, vectors, head.cell)
    if scale is None:
        text = " ".join(head.comments).lower().replace("ang^3", "angstrom^3")
        scale = 1.0 if "e/angstrom^3" in text else PER_BOHR3
    field = np.ascontiguousarray(values)
    field *= np.float32(scale)
    pbc = np.arange(3) < head.periods
    structure = Structure(head.positions, head.numbers, cell, pbc)
    grid = Grid(field.shape, cell, origin, [bool(p) for p in pbc])
    return Density(grid, structure, field, info={"source": str(path)})


class _Head:
    """The lines up to the data grid: atoms, cell, periods and comments."""

    def __init__(self, reader: TextReader) -> None:
        self.reader, self.path = reader, reader.path
        self.cell: NDArray[np.float64] | None = None
        self.periods = 3
        self.comments: list[str] = []
        self.atoms: list[list[str]] = []
        while True:
            line = self._next()
            if line is None:
                raise FormatError(f"{self.path} has no data grid; give an xsf file with a DATAGRID_3D")
            word = line.split()[0].upper()
            if re.match(r"(BEGIN_)?DATAGRID_3D", word):
                break
            self._section(word, line)
        if not self.atoms:
            raise FormatError(f"{self.path} has no atoms before its data grid; check the file")

    def _next(self) -> str | None:
        """The next line with something in it; comments are kept aside, the unit may stand in one."""
        while (line := self.reader.filled()) is not None and line.startswith("#"):
            self.comments.append(line)
        return line

    def _section(self, word: str, line: str) -> None:
        if word in _PERIODS:
            self.periods = _PERIODS[word]
        elif word == "DIM-GROUP":
            self.periods = int(self.reader.line().split()[0])
        elif word == "PRIMVEC":
            self.cell = self.reader.vectors()
        elif word in ("CONVVEC", "RECIP-PRIMVEC", "RECIP-CONVVEC"):
            self.reader.vectors()
        elif word == "PRIMCOORD":
            self.atoms = [self.reader.line().split() for _ in range(int(self.reader.line().split()[0]))]
        elif word == "ATOMS":
            self.atoms = []
            while (row := self._next()) is not None and len(row.split()) >= 4:
                self.atoms.append(row.split())
            if row is not None:
                self.reader.push(row)
            self.periods = 0 if self.cell is None else self.periods
        elif word == "BEGIN_BLOCK_DATAGRID_3D":
            self.comments.append(self.reader.line())
        else:
            what = "several structures" if word == "ANIMSTEPS" else f"{line[:30]!r}"
            raise FormatError(f"{self.path} holds {what}, which is not read; give one structure with one DATAGRID_3D")

    @property
    def positions(self) -> NDArray[np.float64]:
        return np.array([floats(row[1:4]) for row in self.atoms])

    @property
    def numbers(self) -> NDArray[np.int64]:
        from ase.data import atomic_numbers

        return np.array([int(r[0]) if r[0].isdigit() else atomic_numbers[r[0].capitalize()] for r in self.atoms])


def _without_repeats(
    path: Any, values: NDArray[np.float32], vectors: NDArray[np.float64], cell: NDArray[np.float64] | None
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """The values without end planes that repeat the first, and the cell that they span.

    The points of a general grid go from the origin to the end of its vectors, both included. A grid over the whole
    period repeats itself there; one that ends a step before does not.
    """
    n = np.array(values.shape)[:, None]
    full = vectors * (n / (n - 1))
    if cell is None:
        return values, full
    reach = _CELL_TOLERANCE * np.linalg.norm(cell, axis=1)
    limit = _REPEAT_TOLERANCE * max(float(np.abs(values).max()), 1e-30)
    for axis in range(3):
        if np.abs(vectors[axis] - cell[axis]).max() < reach[axis]:
            moved = np.moveaxis(values, axis, 0)
            if np.abs(moved[-1] - moved[0]).max() > limit:
                raise FormatError(
                    f"{path} does not repeat its first plane at the end of axis {axis}, as a grid over the whole cell"
                    " does in this format; check the grid"
                )
            values = np.moveaxis(moved[:-1], 0, axis)
        elif np.abs(full[axis] - cell[axis]).max() >= reach[axis]:
            raise FormatError(
                f"{path} has a grid that does not match its atoms' cell: vector {axis} of the grid is"
                f" {vectors[axis].tolist()}, that of the cell {cell[axis].tolist()}; check the file"
            )
    return values, cell
