"""VASP's CHGCAR: density times the volume of the cell, the first grid axis fastest, atoms by fractional coordinates.

The grid spans the cell of the structure. Of a spin-polarised file the first block is the total density and the others
are magnetisations, which are left out, as are the augmentation occupancies.

A predicted density is that of valence electrons and pseudopotentials: a file written here holds no augmentation
occupancies, so that it serves pictures and analysis, and VASP cannot keep to it (ICHARG = 11) where it uses PAW.
"""

from __future__ import annotations

from itertools import groupby
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import TextReader, fixed, floats, put, slabs
from gpurho.density import Density
from gpurho.errors import FormatError
from gpurho.fields import Field
from gpurho.grid import Grid
from gpurho.structure import Structure


def spans_cell(density: Density) -> bool:
    """Whether the grid is that of the whole cell, from its corner."""
    grid, cell = density.grid, density.structure.cell
    return bool(np.allclose(grid.cell, cell, rtol=0, atol=1e-6) and np.allclose(grid.origin, 0))


def refuse_part(density: Density, what: str, origin: bool = False) -> None:
    """Raise `FormatError` unless the grid is that of the whole cell; with `origin` it may begin anywhere in it."""
    grid = density.grid
    if not np.allclose(grid.cell, density.structure.cell, rtol=0, atol=1e-6):
        raise FormatError(f"{what} holds the whole cell, and this density is of a part of it; write a *.cube instead")
    if not origin and not spans_cell(density):
        raise FormatError(
            f"{what} has its first point at the corner of the cell, and this grid begins at"
            f" {np.round(grid.origin, 4).tolist()}, as that of a coarse field does; write a *.cube or *.xsf instead"
        )


def write_chgcar(file: IO[str], density: Density, values: Field, field: str) -> None:
    """Write one field of a density as a CHGCAR."""
    from ase.data import chemical_symbols

    grid, structure = density.grid, density.structure
    refuse_part(density, "a CHGCAR")
    order = np.argsort(structure.numbers, kind="stable")
    groups = [(z, len(list(g))) for z, g in groupby(structure.numbers[order].tolist())]
    file.write(f"gpurho {field} density, no PAW augmentation\n   1.00000000000000\n")
    for row in grid.cell:
        file.write(f" {fixed(row, 21, 16)}\n")
    file.write("".join(f" {chemical_symbols[z]:>5}" for z, _ in groups) + "\n")
    file.write("".join(f" {n:>5}" for _, n in groups) + "\nDirect\n")
    fractional = structure.positions[order] @ np.linalg.inv(structure.cell)
    for row in fractional:
        file.write(f" {fixed(row, 19, 16)}\n")
    file.write(f"\n {' '.join(map(str, grid.shape))}\n")
    rest = np.empty(0)
    for slab in slabs(values, 2):
        flat = np.concatenate([rest, slab.transpose(2, 1, 0).reshape(-1).astype(np.float64) * grid.volume])
        whole = len(flat) // 5 * 5
        put(file, flat[:whole], 5, " %.11E")
        rest = flat[whole:]
    put(file, rest, 5, " %.11E")


def read_chgcar(reader: TextReader) -> Density:
    """The total density of a CHGCAR of VASP 5 or newer (also CHG and AECCAR, which share its layout)."""
    from ase.data import atomic_numbers

    path = reader.path
    reader.line()
    scale = floats(reader.line().split("!")[0].split("#")[0].split()[:3])
    cell = reader.vectors()
    if len(scale) == 1 and scale[0] < 0:
        # A negative scale is the volume of the cell.
        scale = np.cbrt(-scale / abs(np.linalg.det(cell)))
    if len(scale) not in (1, 3) or not (scale > 0).all():
        raise FormatError(f"{path} has {scale.tolist()} for a scale; give one number or three positive ones")
    cell = cell * scale
    symbols = [word.split("_")[0].split("/")[0] for word in reader.line().split()]
    if not symbols or any(s not in atomic_numbers or s == "X" for s in symbols):
        raise FormatError(f"{path} names no elements in its sixth line; give a CHGCAR of VASP 5 or newer")
    counts = [int(n) for n in reader.line().split()]
    if len(counts) != len(symbols):
        raise FormatError(f"{path} has {len(counts)} counts of atoms for {len(symbols)} elements; check the file")
    numbers = np.repeat([atomic_numbers[s] for s in symbols], counts)
    mode = reader.line().strip().lower()
    if mode.startswith("s"):
        mode = reader.line().strip().lower()
    positions = np.array([reader.row(3) for _ in range(len(numbers))]).reshape(-1, 3)
    positions = positions * scale if mode.startswith(("c", "k")) else positions @ cell
    shape = [int(n) for n in (reader.filled() or "").split()]
    grid = Grid(shape, cell)
    structure = Structure(positions, numbers, cell, np.array([True, True, True]))
    values = reader.values(grid.n_points)
    _check_rest(reader, grid, len(numbers))
    values /= np.float32(grid.volume)
    field: NDArray[np.float32] = np.ascontiguousarray(values.reshape(grid.shape[::-1]).transpose(2, 1, 0))
    return Density(grid, structure, field, info={"source": str(path)})


def _check_rest(reader: TextReader, grid: Grid, n_atoms: int) -> None:
    """What may follow the total density: augmentation, moments of the atoms, the same grid again, or nothing."""
    line, found = reader.filled(), 0
    grid_line = [str(n) for n in grid.shape]
    while line is not None and not line.startswith("augmentation") and line.split() != grid_line and found <= n_atoms:
        found += len(line.split())
        line = reader.filled()
    again = line is not None and line.split() == grid_line
    if found not in ((0, n_atoms) if again else (0,)):
        raise FormatError(f"{reader.path} has more than the {grid.n_points} values of its grid; check its counts")
