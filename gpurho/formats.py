"""Files of densities: Gaussian cube, VASP's CHGCAR, and this library's HDF5, in and out.

Writers read the field in slabs, so that a field on disk is never loaded whole.

- cube: lengths in Bohr, density in e/Bohr^3, the last grid axis fastest. Any grid, also that of a region.
- CHGCAR: density times the volume of the cell, the first grid axis fastest, atoms by fractional coordinates. The grid
  must span the cell of the structure.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import groupby, pairwise
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.densityfile import Layout, open_density
from gpurho.errors import FormatError, GpurhoError, StoreError
from gpurho.fields import NAMES, Field, LazyField
from gpurho.grid import Grid
from gpurho.partition import make_tiles
from gpurho.store import FileSink
from gpurho.structure import Structure
from gpurho.units import BOHR, PER_ANGSTROM3, PER_BOHR3

SLAB_BYTES = 256 * 2**20
"""Most memory that one slab of a writer takes, unless one plane of points is larger."""

LINES_AT_ONCE = 1 << 15
FORMATS = "*.h5, *.cube, *CHGCAR* or *.vasp"


def kind_of(path: str | Path) -> str:
    """ "hdf5", "cube" or "chgcar", from the name of a file."""
    name = Path(path).name.lower()
    if name.endswith((".h5", ".hdf5")):
        return "hdf5"
    if name.endswith((".cube", ".cub")):
        return "cube"
    if "chgcar" in name or name.endswith(".vasp"):
        return "chgcar"
    raise FormatError(f"{path}: the name does not say the format; give {FORMATS}")


def read_density(path: str | Path) -> Density:
    """A density from a file; HDF5 is read on demand, the others whole, and these have no uncertainty."""
    kind = kind_of(path)
    if kind == "hdf5":
        return open_density(path)
    reader = _read_cube if kind == "cube" else _read_chgcar
    try:
        with open(path) as file:
            return reader(file, Path(path))
    except GpurhoError:
        raise
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}; check the name") from None
    except (ValueError, IndexError, StopIteration, UnicodeDecodeError) as error:
        reason = (str(error) or "it ends too early").splitlines()[0]
        raise FormatError(f"{path} is not a whole {kind} file: {reason}; check the file") from None


def write_density(density: Density, path: str | Path, field: str = "mean") -> Path:
    """Write a density; see `Density.write`."""
    target, kind = Path(path), kind_of(path)
    values = getattr(density, field) if field in (*NAMES, "std") else None
    if values is None:
        known = "'mean', 'aleatoric', 'epistemic' or 'std'" if density.uncertain else "'mean', the only one it has"
        raise FormatError(f"the density has no field {field!r}; give {known}")
    if kind == "hdf5":
        _write_hdf5(density, target)
    else:
        _write_text(
            target, lambda file: (_write_cube if kind == "cube" else _write_chgcar)(file, density, values, field)
        )
    return target


def _write_text(path: Path, write: Callable[[IO[str]], None]) -> None:
    """Write beside the target and put it in place when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "w") as file:
            write(file)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; what was there is unchanged") from None
    finally:
        temporary.unlink(missing_ok=True)


def _slabs(field: Field, axis: int) -> Iterator[NDArray[np.float32]]:
    """The field in order along `axis`, in slabs that are whole chunks where memory allows."""
    shape = field.shape
    plane = 4 * int(np.prod([n for d, n in enumerate(shape) if d != axis], dtype=np.int64))
    depth = max(1, SLAB_BYTES // plane)
    phase = 0
    if isinstance(field, LazyField):
        chunk = field.chunks[axis]
        phase = field.phase[axis] % chunk
        depth = depth // chunk * chunk if depth >= chunk else depth
    edges = [0, *range(depth - phase % depth, shape[axis], depth), shape[axis]]
    for low, high in pairwise(edges):
        yield np.asarray(field[tuple(slice(low, high) if d == axis else slice(None) for d in range(3))])


def _row(values: NDArray[np.float64], width: int, digits: int) -> str:
    """A few numbers in fixed columns."""
    return " ".join(f"{value:{width}.{digits}f}" for value in values)


def _put(file: IO[str], values: NDArray[np.float64], columns: int, form: str) -> None:
    """Numbers in rows of `columns`, formatted many at a time."""
    row = form * columns + "\n"
    whole = len(values) // columns * columns
    step = columns * LINES_AT_ONCE
    for at in range(0, whole, step):
        part = values[at : min(at + step, whole)]
        file.write(row * (len(part) // columns) % tuple(part.tolist()))
    if whole < len(values):
        file.write(form * (len(values) - whole) % tuple(values[whole:].tolist()) + "\n")


# -- cube -------------------------------------------------------------------------------------------------------


def _write_cube(file: IO[str], density: Density, values: Field, field: str) -> None:
    grid, structure = density.grid, density.structure
    file.write(f"electron density, {field}, e/Bohr^3\nwritten by gpurho; lengths in Bohr, last axis fastest\n")
    file.write(f"{len(structure):5d} {_row(grid.origin / BOHR, 16, 10)}\n")
    for n, step in zip(grid.shape, grid.steps / BOHR, strict=True):
        file.write(f"{n:5d} {_row(step, 16, 10)}\n")
    for number, position in zip(structure.numbers, structure.positions / BOHR, strict=True):
        file.write(f"{number:5d} {0.0:12.6f} {_row(position, 16, 10)}\n")
    nz = grid.shape[2]
    tail = nz % 6
    for slab in _slabs(values, 0):
        rows = slab.reshape(-1, nz).astype(np.float64) * PER_ANGSTROM3
        # Each row of points along the last axis begins a new line, as the format has it.
        line = (" %.6E" * 6 + "\n") * (nz // 6) + (" %.6E" * tail + "\n" if tail else "")
        step = max(1, 6 * LINES_AT_ONCE // nz)
        for at in range(0, len(rows), step):
            part = rows[at : at + step]
            file.write(line * len(part) % tuple(part.reshape(-1).tolist()))


def _read_cube(file: IO[str], path: Path) -> Density:
    next(file)
    next(file)
    head = next(file).split()
    n_atoms, origin = int(head[0]), np.array(head[1:4], dtype=float)
    if n_atoms < 0 or (len(head) > 4 and int(head[4]) != 1):
        raise FormatError(f"{path} holds orbitals or several values a point; give a cube of one density")
    rows = [next(file).split() for _ in range(3)]
    shape = [int(row[0]) for row in rows]
    # A negative count says that the lengths are in angstrom.
    unit = 1.0 if shape[0] < 0 else BOHR
    shape = [abs(n) for n in shape]
    cell = np.array([row[1:4] for row in rows], dtype=float) * np.array(shape)[:, None] * unit
    atoms = [next(file).split() for _ in range(n_atoms)]
    grid = Grid(shape, cell, origin * unit)
    structure = Structure(
        np.array([row[2:5] for row in atoms], dtype=float).reshape(-1, 3) * unit,
        np.array([int(row[0]) for row in atoms], dtype=np.int64),
        cell,
        np.array([True, True, True]),
    )
    values = _read_numbers(file, grid.n_points, path)
    values *= np.float32(PER_BOHR3)
    return Density(grid, structure, values.reshape(grid.shape), info={"source": str(path)})


# -- CHGCAR -----------------------------------------------------------------------------------------------------


def _write_chgcar(file: IO[str], density: Density, values: Field, field: str) -> None:
    from ase.data import chemical_symbols

    grid, structure = density.grid, density.structure
    if not np.allclose(grid.cell, structure.cell, rtol=0, atol=1e-6) or not np.allclose(grid.origin, 0):
        raise FormatError("a CHGCAR holds the whole cell, and this density is of a part of it; write a *.cube instead")
    order = np.argsort(structure.numbers, kind="stable")
    groups = [(z, len(list(g))) for z, g in groupby(structure.numbers[order].tolist())]
    file.write(f"gpurho electron density, {field}\n   1.00000000000000\n")
    for row in grid.cell:
        file.write(f" {_row(row, 21, 16)}\n")
    file.write("".join(f" {chemical_symbols[z]:>5}" for z, _ in groups) + "\n")
    file.write("".join(f" {n:>5}" for _, n in groups) + "\nDirect\n")
    fractional = structure.positions[order] @ np.linalg.inv(structure.cell)
    for row in fractional:
        file.write(f" {_row(row, 19, 16)}\n")
    file.write(f"\n {' '.join(map(str, grid.shape))}\n")
    rest = np.empty(0)
    for slab in _slabs(values, 2):
        flat = np.concatenate([rest, slab.transpose(2, 1, 0).reshape(-1).astype(np.float64) * grid.volume])
        whole = len(flat) // 5 * 5
        _put(file, flat[:whole], 5, " %.11E")
        rest = flat[whole:]
    _put(file, rest, 5, " %.11E")


def _read_chgcar(file: IO[str], path: Path) -> Density:
    from ase.data import atomic_numbers

    next(file)
    scale = float(next(file).split()[0])
    cell = np.array([next(file).split()[:3] for _ in range(3)], dtype=float)
    # A negative scale is the volume of the cell.
    cell *= scale if scale > 0 else np.cbrt(-scale / abs(np.linalg.det(cell)))
    symbols = next(file).split()
    if not symbols or any(s.split("_")[0].split("/")[0] not in atomic_numbers for s in symbols):
        raise FormatError(f"{path} names no elements in its sixth line; give a CHGCAR of VASP 5 or newer")
    counts = [int(n) for n in next(file).split()]
    numbers = np.repeat([atomic_numbers[s.split("_")[0].split("/")[0]] for s in symbols], counts)
    mode = next(file).strip().lower()
    if mode.startswith("s"):
        mode = next(file).strip().lower()
    positions = np.array([next(file).split()[:3] for _ in range(len(numbers))], dtype=float)
    if mode.startswith(("c", "k")):
        positions *= abs(scale)
    else:
        positions = positions @ cell
    line = next(file)
    while not line.strip():
        line = next(file)
    grid = Grid([int(n) for n in line.split()], cell)
    structure = Structure(positions, numbers, cell, np.array([True, True, True]))
    values = _read_numbers(file, grid.n_points, path)
    values /= np.float32(grid.volume)
    field = np.ascontiguousarray(values.reshape(grid.shape[::-1]).transpose(2, 1, 0))
    return Density(grid, structure, field, info={"source": str(path)})


def _read_numbers(file: IO[str], n: int, path: Path) -> NDArray[np.float32]:
    """The next `n` numbers of a text file, a few megabytes of text at a time."""
    values = np.empty(n, dtype=np.float32)
    at, rest = 0, ""
    while at < n:
        text = file.read(1 << 23)
        if not text and not rest:
            raise FormatError(f"{path} ends after {at} of {n} values; the file is not whole")
        # The last word may go on in the next piece of text.
        cut = max(text.rfind(" "), text.rfind("\n")) + 1 if text else 0
        words = (rest + text[:cut]).split() if text else rest.split()
        rest = text[cut:] if cut else rest + text
        if not text:
            rest = ""
        part = np.array(words[: n - at], dtype=np.float64)
        values[at : at + len(part)] = part
        at += len(part)
    if not np.isfinite(values).all():
        raise FormatError(f"{path} holds values that are not finite; check the file")
    return values


# -- HDF5 -------------------------------------------------------------------------------------------------------


def _write_hdf5(density: Density, path: Path) -> None:
    """The density as a file of its own: raw fields and conservation as they are."""
    raw = density.raw_fields()
    tiles = make_tiles(density.grid)
    info = {name: value for name, value in density.info.items() if name not in ("timing", "settings", "region")}
    settings = {**density.info.get("settings", {}), "written from": density.info.get("source", "memory")}
    layout = Layout(density.grid, tiles, density.structure, tuple(raw), settings, info)
    sink = FileSink(path, layout, resume=False)
    try:
        for tile in tiles:
            sink.write(sink.encode(tile, [np.asarray(field[tile.slices]) for field in raw.values()], {}))
        sink.finish(density.correction).close()
    finally:
        sink.close()
