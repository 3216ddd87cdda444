"""Files of densities, in and out: Gaussian cube, VASP's CHGCAR, XCrySDen's xsf, SPARC's .dens, VTK's vti, our HDF5.

The name of a file says its format. Writers read the field in slabs, so that a field on disk is never loaded whole, and
put a file in its place when it is whole. What each format means by its numbers stands in its own module:
`gpurho.formats_cube`, `gpurho.formats_vasp`, `gpurho.formats_xsf`, `gpurho.formats_sparc`, `gpurho.formats_vti`.
Files of atoms with what the density says of each are written too: `gpurho.formats_atoms`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from gpurho._textfields import TextReader, reading, writing
from gpurho.datasets import Snapshot
from gpurho.density import Density
from gpurho.densityfile import Layout, open_density
from gpurho.errors import FormatError, OutputExistsError
from gpurho.fields import NAMES, Field
from gpurho.formats_atoms import write_dump, write_extxyz
from gpurho.formats_cube import read_cube, write_cube
from gpurho.formats_sparc import read_dens, write_dens
from gpurho.formats_vasp import read_chgcar, write_chgcar
from gpurho.formats_vti import read_vti, write_vti
from gpurho.formats_xsf import read_xsf, write_xsf
from gpurho.journal import read_journal
from gpurho.partition import make_tiles
from gpurho.shards import refuse_unfinished
from gpurho.store import FileSink
from gpurho.structure import Structure, as_structure
from gpurho.units import PER_BOHR3

if TYPE_CHECKING:
    from ase import Atoms

FORMATS = "*.h5, *.cube, *CHGCAR* or *.vasp, *.xsf, *.dens, *.vti"
ATOM_FORMATS = "*.xyz, *.dump or *.lammpstrj"
UNITS = {"e/angstrom^3": 1.0, "e/bohr^3": PER_BOHR3}
WHOLE_TOLERANCE = 0.01
"""Largest distance from a whole number at which an integral still tells the number of electrons."""

_ENDINGS = {
    ".h5": "hdf5",
    ".hdf5": "hdf5",
    ".cube": "cube",
    ".cub": "cube",
    ".xsf": "xsf",
    ".dens": "dens",
    ".vasp": "chgcar",
    ".vti": "vti",
    ".xyz": "extxyz",
    ".extxyz": "extxyz",
    ".dump": "dump",
    ".lammpstrj": "dump",
}
_Writer = Callable[[IO[str], Density, Field, str], None]
_WRITERS: dict[str, _Writer] = {"cube": write_cube, "chgcar": write_chgcar, "xsf": write_xsf, "dens": write_dens}
_ATOM_WRITERS: dict[str, Callable[[IO[str], Density], None]] = {"extxyz": write_extxyz, "dump": write_dump}


def kind_of(path: str | Path) -> str:
    """The format that the name of a file says: "hdf5", "cube", "chgcar", "xsf", "dens", "vti", "extxyz" or "dump".

    The last two are of atoms (`holds_atoms`) and are written only.
    """
    name = Path(path).name.lower()
    ending = Path(name).suffix
    if ending in _ENDINGS:
        return _ENDINGS[ending]
    if "chgcar" in name or name == "chg" or name.startswith("aeccar"):
        return "chgcar"
    raise FormatError(f"{path}: the name does not say the format; give {FORMATS}, or of atoms {ATOM_FORMATS}")


def holds_atoms(path: str | Path) -> bool:
    """Whether the name of a file says a format of atoms, with sums of the density over the points of each."""
    return kind_of(path) in _ATOM_WRITERS


def read_density(path: str | Path, unit: str | None = None) -> Density:
    """A density from a file; HDF5 and vti are read on demand, the others whole, and these have no uncertainty.

    Parameters
    ----------
    path : path
        The name says the format: ``*.h5``, ``*.cube``, ``*CHGCAR*`` or ``*.vasp``, ``*.xsf``, ``*.dens``, or ``*.vti``
        that this library wrote.
    unit : str, optional
        "e/angstrom^3" or "e/bohr^3": unit of the values of a cube or xsf file that keeps to another than its format's
        usual one, e/Bohr^3.

    Raises
    ------
    FormatError
        For a file that cannot be read, is cut off or of another format, has other counts than it says, or whose grid
        does not match the cell of its atoms.
    """
    kind, source = kind_of(path), Path(path)
    if kind in _ATOM_WRITERS:
        raise FormatError(f"{path}: the name does not say the format of a density but of atoms; give {FORMATS}")
    if unit is not None and (kind not in ("cube", "xsf") or unit.lower() not in UNITS):
        raise FormatError(
            f"unit {unit!r} does not go with {path}; give {' or '.join(UNITS)}, for a cube or xsf file alone"
        )
    if kind == "hdf5":
        return open_density(path)
    scale = None if unit is None else UNITS[unit.lower()]
    if kind == "vti":
        with reading(source, kind):
            return read_vti(source)
    with reading(source, kind), open(source, encoding="utf-8", errors="replace") as file:
        reader = TextReader(file, source)
        if kind == "cube":
            return read_cube(reader, scale)
        if kind == "xsf":
            return read_xsf(reader, scale)
        return read_chgcar(reader) if kind == "chgcar" else read_dens(reader)


def write_density(density: Density, path: str | Path, field: str = "mean") -> Path:
    """Write a density; see `Density.write`."""
    target, kind = Path(path), kind_of(path)
    if kind in _ATOM_WRITERS:
        if not np.allclose(density.grid.cell, density.structure.cell, rtol=0, atol=1e-6):
            raise FormatError(
                f"{target} is to hold the electrons of all atoms, and this density is of a part of the cell; give that"
                " of the whole cell, or predict it with keep='atoms' (--keep atoms)"
            )
        with writing(target) as file:
            _ATOM_WRITERS[kind](file, density)
        return target
    values = getattr(density, field) if field in (*NAMES, "std") else None
    if values is None:
        known = "'mean', 'aleatoric', 'epistemic' or 'std'" if density.uncertain else "'mean', the only one it has"
        raise FormatError(f"the density has no field {field!r}; give {known}")
    if kind == "hdf5":
        _write_hdf5(density, target)
    elif kind == "vti":
        with writing(target, "wb") as file:
            write_vti(file, density)
    else:
        with writing(target) as file:
            _WRITERS[kind](file, density, values, field)
    return target


def snapshot_from_density_file(
    path: str | Path,
    electrons: float | None = None,
    *,
    structure: Structure | Atoms | None = None,
    unit: str | None = None,
    **meta: Any,
) -> Snapshot:
    """A density file of any code as a snapshot to train on.

    Parameters
    ----------
    path : path
        See `read_density`. The grid must span the whole periodic cell; an origin away from the corner is moved there.
    electrons : float, optional
        Valence electrons of the cell; by default the integral, which must then be whole to 0.01.
    structure : Structure or ase.Atoms, optional
        The atoms, where those of the file are not to be trusted; in the cell of the grid.
    unit : str, optional
        See `read_density`.
    **meta
        Attributes of the snapshot: temperature_K, engine, kpts, ...

    Raises
    ------
    FormatError
        Where the file cannot be read, or grid, atoms and number of electrons do not belong together.
    """
    with read_density(path, unit) as density:
        grid, atoms = density.grid, density.structure if structure is None else as_structure(structure)
        if not np.allclose(grid.cell, atoms.cell, rtol=0, atol=1e-3):
            raise FormatError(
                f"{path} has a grid that does not match its atoms' cell: vectors {np.round(grid.cell, 4).tolist()} and"
                f" {np.round(atoms.cell, 4).tolist()} angstrom; give the density of the whole cell"
            )
        if structure is not None and sorted(atoms.numbers) != sorted(density.structure.numbers):
            raise FormatError(f"{path} has other elements than the {len(atoms)} atoms given; check the structure")
        values = np.asarray(density.mean[:, :, :])
    placed = Structure(atoms.positions - grid.origin, atoms.numbers, grid.cell, atoms.pbc)
    with reading(Path(path), "density"):
        placed.check_overlaps(0.5)
    integral = float(values.sum(dtype=np.float64)) * grid.dv
    if not 0 < integral <= 1.001 * float(atoms.numbers.sum()):
        raise FormatError(
            f"{path} integrates to {integral:.6g} electrons, and its atoms have {atoms.numbers.sum()} in all; check the"
            " unit (unit=) and that it is a density"
        )
    if electrons is None and abs(integral - round(integral)) > WHOLE_TOLERANCE:
        raise FormatError(f"{path} integrates to {integral:.6g} electrons, no whole number; give electrons=")
    number = float(round(integral)) if electrons is None else float(electrons)
    snapshot = Snapshot(placed, values, number, {"source": str(path), **meta})
    snapshot.check(str(path))
    return snapshot


# -- HDF5 -------------------------------------------------------------------------------------------------------


def _refuse_prediction(path: Path) -> None:
    """Raise `OutputExistsError` where a prediction to this name has begun: hours of work that must not be replaced."""
    refuse_unfinished(path)
    part, journal = (path.with_name(path.name + ending) for ending in (".part", ".journal"))
    records = read_journal(journal)
    if records and part.exists() and "written from" not in records[0].get("settings", {}):
        raise OutputExistsError(f"{part} is an unfinished prediction; give another name, or finish or remove that one")


def _write_hdf5(density: Density, path: Path) -> None:
    """The density as a file of its own: raw fields and conservation as they are."""
    _refuse_prediction(path)
    raw = density.raw_fields()
    tiles = make_tiles(density.grid)
    info = {name: value for name, value in density.info.items() if name not in ("timing", "settings", "region")}
    settings = {**density.info.get("settings", {}), "written from": density.info.get("source", "memory")}
    layout = Layout(density.grid, tiles, density.structure, tuple(raw), settings, info)
    sink = FileSink(path, layout, resume=False)
    try:
        for tile in tiles:
            sink.write(sink.encode(tile, [np.asarray(field[tile.slices]) for field in raw.values()], {}))
        sink.finish(density.correction, density.trust).close()
    finally:
        sink.close()
