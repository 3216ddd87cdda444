"""Electrons and error bars of atoms for OVITO and ASE: extended xyz, and dumps as LAMMPS writes them.

Columns, each over the points nearest to an atom (`Density.per_atom`):

- ``electrons``, and its standard deviation ``electrons_std``;
- ``electrons_aleatoric`` and ``electrons_epistemic``, the parts of it that come from the noise of the training labels
  and from what the network does not know;
- ``volume``, angstrom^3;
- ``trust``, where the model knows its training atoms: how far an atom is from them, 1 where they end (`gpurho.trust`).

In a dump they are called ``v_electrons`` and so on, as LAMMPS calls a variable of atoms. Positions stay where the
density has them: a cell that is not the lower triangle of LAMMPS is written as a general triclinic box (``abc origin``,
LAMMPS of April 2024 and newer, OVITO, ASE), not rotated.
"""

from __future__ import annotations

from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.structure import Structure

AT_ONCE = 1 << 15
"""Atoms formatted together."""


def atom_columns(density: Density) -> dict[str, NDArray[np.float64]]:
    """The columns by name, (n_atoms,) each; those that are not known are left out."""
    charges = density.per_atom()
    columns = {
        "electrons": charges.electrons,
        "electrons_std": charges.electrons_std,
        "electrons_aleatoric": charges.electrons_aleatoric,
        "electrons_epistemic": charges.electrons_epistemic,
        "volume": charges.volumes,
        "trust": density.trust.per_atom.astype(np.float64) if density.trust else None,
    }
    return {name: values for name, values in columns.items() if values is not None}


def write_extxyz(file: IO[str], density: Density) -> None:
    """Write the atoms with their columns as extended xyz."""
    structure, columns = density.structure, atom_columns(density)
    lattice = " ".join(f"{x:.12g}" for x in structure.cell.reshape(-1))
    properties = "species:S:1:pos:R:3" + "".join(f":{name}:R:1" for name in columns)
    pbc = " ".join("FT"[int(p)] for p in structure.pbc)
    totals = f"total_electrons={density.electrons:.10g}"
    if density.electrons_std is not None:
        totals += f" total_electrons_std={density.electrons_std:.6g}"
    file.write(f'{len(structure)}\nLattice="{lattice}" Properties={properties} pbc="{pbc}" {totals}\n')
    _put_rows(file, "%-2s", [_symbols(structure)], structure, columns)


def write_dump(file: IO[str], density: Density) -> None:
    """Write the atoms with their columns as one frame of a LAMMPS dump."""
    structure, columns = density.structure, atom_columns(density)
    file.write(f"ITEM: TIMESTEP\n0\nITEM: NUMBER OF ATOMS\n{len(structure)}\n{_box(structure)}")
    file.write("ITEM: ATOMS id type element x y z" + "".join(f" v_{name}" for name in columns) + "\n")
    _, types = np.unique(structure.numbers, return_inverse=True)
    labels: list[list[Any]] = [
        np.arange(1, len(structure) + 1).tolist(),
        (types.reshape(-1) + 1).tolist(),
        _symbols(structure),
    ]
    _put_rows(file, "%d %d %s", labels, structure, columns)


def _symbols(structure: Structure) -> list[str]:
    from ase.data import chemical_symbols

    return [chemical_symbols[z] for z in structure.numbers.tolist()]


def _box(structure: Structure) -> str:
    cell, periods = structure.cell, " ".join("pp" if p else "ff" for p in structure.pbc)
    if np.any(cell[np.triu_indices(3, 1)] != 0) or np.any(np.diag(cell) <= 0):
        rows = "".join(" ".join(f"{x:.12g}" for x in row) + " 0\n" for row in cell)
        return f"ITEM: BOX BOUNDS abc origin {periods}\n{rows}"
    xy, xz, yz = cell[1, 0], cell[2, 0], cell[2, 1]
    low = [min(0, xy, xz, xy + xz), min(0, yz), 0]
    high = [cell[0, 0] + max(0, xy, xz, xy + xz), cell[1, 1] + max(0, yz), cell[2, 2]]
    if not (xy or xz or yz):
        return f"ITEM: BOX BOUNDS {periods}\n" + "".join(f"0 {h:.12g}\n" for h in high)
    rows = "".join(f"{a:.12g} {b:.12g} {t:.12g}\n" for a, b, t in zip(low, high, (xy, xz, yz), strict=True))
    return f"ITEM: BOX BOUNDS xy xz yz {periods}\n{rows}"


def _put_rows(
    file: IO[str], form: str, labels: list[list[Any]], structure: Structure, columns: dict[str, NDArray[np.float64]]
) -> None:
    line = form + " %.10f" * 3 + " %.8g" * len(columns) + "\n"
    numbers = np.column_stack([structure.positions, *columns.values()])
    for at in range(0, len(numbers), AT_ONCE):
        part = slice(at, at + AT_ONCE)
        rows = zip(*(label[part] for label in labels), *numbers[part].T.tolist(), strict=True)
        file.write("".join([line % row for row in rows]))
