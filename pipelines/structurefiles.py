"""What ASE does not tell by a file's name: data files and dumps of LAMMPS, and structures of SPARC.

Types of LAMMPS are numbers. Where a file does not say which elements they are (an ``element`` or ``mass`` column of a
dump, ``Masses`` or ``Atom Type Labels`` of a data file) they have to be named; nothing is guessed from the number.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.dumpfile import read_dump_header
from gpurho.errors import StructureError
from gpurho.pipelines.structureguards import opened, refuse_counts

if TYPE_CHECKING:
    from ase import Atoms

HEAD_LINES = 60
"""Lines in which the header of a data file of LAMMPS ends."""

_SECTION = re.compile(r"^\s*(Masses|Atom Type Labels)\b", re.MULTILINE)


def read_special(path: Path, index: str | int, species: Sequence[str] | None = None) -> list[Atoms] | None:
    """The frames of a file of LAMMPS or SPARC, or the atoms of a density; None for any other, which is for ASE to tell.

    Parameters
    ----------
    path : path
    index : str or int
        Of the frames, as ASE has it.
    species : list of str, optional
        Elements of the types 1, 2, ... of a file of LAMMPS.

    Raises
    ------
    StructureError
        Where a file does not name the elements and `species` does not either.
    """
    if path.suffix.lower() in (".ion", ".inpt"):
        from gpurho.formats_sparc import read_structure

        return [read_structure(path).to_ase()]
    if path.suffix.lower() in (".h5", ".hdf5", ".dens", ".vti") or "chgcar" in path.name.lower():
        from gpurho.formats import read_density

        with read_density(path) as density:
            return [density.structure.to_ase()]
    head = _head(path)
    if head and head[0].startswith("ITEM: "):
        refuse_counts(path, "lammps-dump-text")
        return _dump(path, index, species)
    if len(head) > 1 and _is_data(head[1:]):
        refuse_counts(path, "lammps-data")
        return _data(path, species)
    return None


def _open(path: Path) -> Any:
    return io.TextIOWrapper(opened(path), encoding="utf-8", errors="replace")


def _head(path: Path) -> list[str]:
    try:
        with _open(path) as file:
            # A binary file may have no ends of lines.
            text = file.read(4096)
    except (OSError, EOFError):
        return []
    return text.splitlines()[:HEAD_LINES]


def _is_data(lines: list[str]) -> bool:
    text = "\n".join(line.split("#")[0].rstrip() for line in lines)
    return bool(re.search(r"^\s*\d+\s+atoms$", text, re.MULTILINE)) and bool(
        re.search(r"\s(xlo\s+xhi|avec)$", text, re.MULTILINE)
    )


def _known(species: Sequence[str] | None) -> dict[int, str]:
    from ase.data import atomic_numbers

    for name in species or ():
        if atomic_numbers.get(name, 0) == 0:
            raise StructureError(f"species {name!r} is no element; give chemical symbols, e.g. --species Al,Si")
    return dict(enumerate(species or (), 1))


def _nameless(path: Path, what: str) -> StructureError:
    return StructureError(
        f"structure file {path} does not say which elements its types are; {what}, or name them in their order:"
        " species=['Al', 'Si'] (gpurho predict --species Al,Si)"
    )


def _named(types: Any, names: dict[int, str], path: Path) -> None:
    if len(types) and int(np.max(types)) > len(names):
        raise StructureError(
            f"structure file {path} has type {int(np.max(types))} and species names {len(names)}; name one of each type"
        )


def _dump(path: Path, index: str | int, species: Sequence[str] | None) -> list[Atoms]:
    from ase.io import read

    with opened(path) as file:
        _, columns = read_dump_header(file, path)
    names = _known(species)
    options: dict[str, Any] = {}
    if not {"element", "mass"} & set(columns):
        if not names:
            raise _nameless(path, "write it with an element column (dump_modify ... element Al Si)")
        # One name too many, so that ASE does not fail on a type that has none before it can be named here.
        options["specorder"] = [*names.values(), *["X"] * 64]
    found = read(path, index=index, format="lammps-dump-text", **options)
    frames = found if isinstance(found, list) else [found]
    for atoms in frames:
        if options:
            _named(atoms.arrays["type"], names, path)
        _from_corner(atoms, scaled="x" not in columns and bool({"xs", "xsu"} & set(columns)))
    return frames


def _from_corner(atoms: Atoms, scaled: bool) -> None:
    """Without periods the cell has a place: its corner goes to zero, where grids begin."""
    if not all(atoms.pbc) and not scaled:
        atoms.positions -= atoms.get_celldisp().reshape(3)
    atoms.set_celldisp(np.zeros(3))


def _data(path: Path, species: Sequence[str] | None) -> list[Atoms]:
    from ase.io import read

    names = _known(species)
    options: dict[str, Any] = {}
    if names:
        from ase.data import atomic_numbers

        options["Z_of_type"] = {number: atomic_numbers[name] for number, name in names.items()}
    else:
        with _open(path) as file:
            if not any(_SECTION.match(line) for line in file):
                raise _nameless(path, "add its Masses section")
    try:
        atoms = read(path, format="lammps-data", **options)
    except KeyError as error:
        if not names:
            raise
        raise StructureError(
            f"structure file {path} has type {error.args[0]} and species names {len(names)}; name one of each type"
        ) from None
    assert not isinstance(atoms, list)  # a data file holds one structure
    atoms.set_celldisp(np.zeros(3))
    return [atoms]
