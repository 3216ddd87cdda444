"""Files of atoms: extended xyz, POSCAR, cif, LAMMPS, SPARC, ASE's own, rewritten, packed and damaged."""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import aluminium, triclinic_structure

from fuzz.cases import WrongError, finite
from fuzz.mutations import cut, damaged

FILES = {
    "xyz": "a.xyz",
    "poscar": "POSCAR",
    "cif": "a.cif",
    "lammps-data": "a.data",
    "dump": "a.dump",
    "ion": "a.ion",
    "traj": "a.traj",
    "json": "a.json",
    "pdb": "a.pdb",
}


@cache
def sources(kind: str) -> tuple[bytes, ...]:
    """Whole files of a format."""
    import tempfile

    from ase.io import write

    from gpurho.density import Density
    from gpurho.formats_atoms import write_dump
    from gpurho.grid import Grid
    from gpurho.structure import Structure

    found = []
    for atoms in (aluminium(), triclinic_structure().to_ase()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / FILES[kind]
            if kind == "dump":
                grid = Grid((2, 2, 2), atoms.cell.array)
                with open(path, "w") as file:
                    write_dump(file, Density(grid, Structure.from_ase(atoms), np.full((2, 2, 2), 0.1, np.float32)))
            elif kind == "ion":
                from gpurho.dft.sparc_inputs import ion_text

                structure = Structure.from_ase(atoms)
                path.write_text(ion_text(structure, {s: f"{s}.psp8" for s in structure.symbols}))
            elif kind == "lammps-data":
                write(path, atoms, format="lammps-data", masses=True)
            else:
                write(path, atoms, format={"poscar": "vasp", "pdb": "proteindatabank"}.get(kind))
            found.append(path.read_bytes())
    return tuple(found)


def _inpt() -> str:
    return "CELL: 7.65 7.65 7.65\nLATVEC:\n1 0 0\n0 1 0\n0 0 1\n"


def _read(path: Path, species: list[str] | None) -> list[Any]:
    from gpurho.pipelines.structures import read_structures
    from gpurho.structure import Structure

    frames = read_structures(path, species)
    for atoms in frames:
        structure = Structure.from_ase(atoms)
        finite(structure.positions, "positions")
        finite(structure.cell, "cell")
    return frames


def case_of(kind: str) -> Callable[[np.random.Generator, Path], str]:
    """Cases of a format of atoms."""

    def case(rng: np.random.Generator, folder: Path) -> str:
        text = sources(kind)[int(rng.integers(2))]
        path = folder / FILES[kind]
        if kind == "ion":
            (folder / "a.inpt").write_text(_inpt())
        what = rng.random()
        species = ["Al", "Si"] if kind in ("lammps-data", "dump") and rng.random() < 0.5 else None
        if what < 0.1 and kind in ("xyz", "dump", "ion", "lammps-data"):
            path.write_bytes(text)
            want = _read(path, species)[0]
            path.write_bytes(text.replace(b"\n", b"\r\n"))
            found = _read(path, species)[0]
            if not np.array_equal(found.positions, want.positions) or any(found.numbers != want.numbers):
                raise WrongError("other ends of lines give other atoms")
            return "right"
        if what < 0.2 and kind in ("xyz", "poscar"):
            name, pack = [(".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)][int(rng.integers(3))]
            packed = pack(text)
            path = path.with_name(("a.xyz" if kind == "xyz" else "a.POSCAR") + name)
            path.write_bytes(
                packed if rng.random() < 0.4 else cut(packed, rng) if rng.random() < 0.5 else damaged(packed, rng)
            )
        else:
            path.write_bytes(damaged(text, rng))
        _read(path, species)
        return "accepted"

    return case


def source_case(rng: np.random.Generator, folder: Path) -> str:
    """Dumps that are too large for memory are read by a reader of their own."""
    from gpurho.sources import StructureSource

    path = folder / "a.dump"
    path.write_bytes(damaged(sources("dump")[int(rng.integers(2))], rng))
    with StructureSource.from_dump(path, ["Al", "Si"], folder) as source:
        for positions, _ in source.pieces():
            finite(positions, "positions")
        seen = sum(int(part.inside.sum()) for part in source.parts(3.0))
        if seen != len(source):
            raise AssertionError(f"{seen} of {len(source)} atoms are in parts")
    return "accepted"


KINDS = {f"file-{kind}": case_of(kind) for kind in FILES} | {"source-dump": source_case}
