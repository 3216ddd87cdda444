"""Gaussian cube files: lengths in Bohr, density in e/Bohr^3, the last grid axis fastest; any grid, also of a region.

The same layout serves the ``.dens`` files of SPARC (`gpurho.formats_sparc`) and the cubes of Quantum ESPRESSO's pp.x.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import TextReader, fixed, floats, put_rows, slabs
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import Field
from gpurho.grid import Grid
from gpurho.structure import Structure
from gpurho.units import BOHR, PER_ANGSTROM3, PER_BOHR3


@dataclass(frozen=True, eq=False)
class Cube:
    """What a cube file says, in angstrom and in the unit of its values."""

    titles: tuple[str, str]
    shape: tuple[int, int, int]
    cell: NDArray[np.float64]
    origin: NDArray[np.float64]
    numbers: NDArray[np.int64]
    positions: NDArray[np.float64]
    values: NDArray[np.float32]


def parse_cube(reader: TextReader) -> Cube:
    """A cube file of one value a point, to its end."""
    path = reader.path
    titles = (reader.line().strip(), reader.line().strip())
    head = reader.line().split()
    n_atoms, origin = int(head[0]), floats(head[1:4])
    if n_atoms < 0 or (len(head) > 4 and int(head[4]) != 1):
        raise FormatError(f"{path} holds orbitals or several values a point; give a cube of one density")
    rows = [reader.line().split() for _ in range(3)]
    counts = [int(row[0]) for row in rows]
    if 0 in counts or len({count > 0 for count in counts}) != 1:
        raise FormatError(f"{path} names {counts} grid points; give three counts of one sign and none of them zero")
    # Negative counts say that the lengths are in angstrom; the unit of the values is not touched by it.
    unit = 1.0 if counts[0] < 0 else BOHR
    shape = (abs(counts[0]), abs(counts[1]), abs(counts[2]))
    steps = np.array([floats(row[1:4]) for row in rows])
    atoms = [reader.line().split() for _ in range(n_atoms)]
    n = shape[0] * shape[1] * shape[2]
    values = reader.values(n).reshape(shape)
    reader.end(n)
    return Cube(
        titles,
        shape,
        steps * np.array(shape)[:, None] * unit,
        origin * unit,
        np.array([int(row[0]) for row in atoms], dtype=np.int64),
        np.array([floats(row[2:5]) for row in atoms]).reshape(-1, 3) * unit,
        values,
    )


def read_cube(reader: TextReader, scale: float | None = None) -> Density:
    """The density of a cube file; `scale` takes its values to e/angstrom^3, by default from e/Bohr^3."""
    cube = parse_cube(reader)
    grid = Grid(cube.shape, cube.cell, cube.origin)
    structure = Structure(cube.positions, cube.numbers, cube.cell, np.array([True, True, True]))
    values = cube.values
    values *= np.float32(PER_BOHR3 if scale is None else scale)
    return Density(grid, structure, values, info={"source": str(reader.path)})


def write_cube(file: IO[str], density: Density, values: Field, field: str) -> None:
    """Write one field of a density as a cube."""
    titles = (f"electron density, {field}, e/Bohr^3", "written by gpurho; lengths in Bohr, last axis fastest")
    put_head(file, titles, density.grid, density.structure)
    for slab in slabs(values, 0):
        put_rows(file, slab.reshape(-1, density.shape[2]).astype(np.float64) * PER_ANGSTROM3, " %.6E")


def put_head(
    file: IO[str],
    titles: tuple[str, str],
    grid: Grid,
    structure: Structure,
    valence: NDArray[np.float64] | None = None,
) -> None:
    """The lines before the values; `valence` (one number an atom) fills the column of nuclear charges."""
    charges = np.zeros(len(structure)) if valence is None else valence
    file.write(f"{titles[0]}\n{titles[1]}\n")
    file.write(f"{len(structure):5d} {fixed(grid.origin / BOHR, 16, 10)}\n")
    for n, step in zip(grid.shape, grid.steps / BOHR, strict=True):
        file.write(f"{n:5d} {fixed(step, 16, 12)}\n")
    for number, charge, position in zip(structure.numbers, charges, structure.positions / BOHR, strict=True):
        file.write(f"{number:5d} {charge:12.6f} {fixed(position, 16, 10)}\n")
