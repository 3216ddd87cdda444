"""The atoms of a system: positions, numbers, cell and periodicity, checked once and then trusted."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import StructureError
from gpurho.trees import nearest

if TYPE_CHECKING:
    from ase import Atoms

MAX_COORDINATE = 1.0e6
"""Largest coordinate and cell entry that is accepted, angstrom: beyond it float64 leaves under 1e-9 angstrom."""

MIN_CELL_HEIGHT = 0.1
"""Smallest distance between opposite faces of a cell that is accepted, angstrom."""


@dataclass(frozen=True, eq=False)
class Structure:
    """Atoms in a cell.

    Parameters
    ----------
    positions : (n_atoms, 3) array, angstrom
        Cartesian; may lie outside of the cell.
    numbers : (n_atoms,) array of int
        Atomic numbers.
    cell : (3, 3) array, angstrom
        Cell vectors as rows, linearly independent also along directions without periodicity.
    pbc : (3,) array of bool
        Which cell vectors are periods.

    Raises
    ------
    StructureError
        For shapes that do not match, values that are not finite, no atoms, or a cell without volume.
    """

    positions: NDArray[np.float64]
    numbers: NDArray[np.int64]
    cell: NDArray[np.float64]
    pbc: NDArray[np.bool_]

    def __post_init__(self) -> None:
        for name, dtype in (("positions", float), ("numbers", np.int64), ("cell", float), ("pbc", bool)):
            try:
                given = np.asarray(getattr(self, name))
                if given.dtype.kind == "c":
                    raise TypeError("it has complex numbers")
                with np.errstate(invalid="ignore"):
                    value = np.array(given, dtype=dtype, order="C")
            except (TypeError, ValueError, OverflowError) as error:
                raise StructureError(f"{name} cannot be read as an array of {dtype.__name__}: {error}") from None
            # Number 13.5 must not become 13 in silence.
            if name == "numbers" and not np.array_equal(value, np.asarray(self.numbers)):
                raise StructureError(f"numbers {self.numbers!r} are not whole; give atomic numbers, 1 to 118")
            value.setflags(write=False)
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        positions, cell = self.positions, self.cell
        if positions.ndim != 2 or positions.shape[1] != 3:
            raise StructureError(f"positions have shape {positions.shape}; give (n_atoms, 3), in angstrom")
        if len(positions) == 0:
            raise StructureError("the structure has no atoms; give at least one")
        if self.numbers.shape != (len(positions),):
            raise StructureError(f"numbers have shape {self.numbers.shape} for {len(positions)} atoms; give one each")
        if cell.shape != (3, 3) or self.pbc.shape != (3,):
            raise StructureError(f"cell has shape {cell.shape} and pbc {self.pbc.shape}; give (3, 3) and (3,)")
        bad = np.flatnonzero(~np.isfinite(positions).all(axis=1))
        if bad.size:
            raise StructureError(f"atom {bad[0]} has position {positions[bad[0]]}; all coordinates must be finite")
        if not np.isfinite(cell).all():
            raise StructureError(f"cell {cell.tolist()} is not finite; give three vectors in angstrom")
        largest = max(float(np.abs(positions).max()), float(np.abs(cell).max()))
        if largest > MAX_COORDINATE:
            raise StructureError(
                f"coordinate {largest:.6g} angstrom exceeds {MAX_COORDINATE:.0e}; check that the unit is angstrom"
            )
        bad = np.flatnonzero((self.numbers < 1) | (self.numbers > 118))
        if bad.size:
            raise StructureError(f"atom {bad[0]} has atomic number {self.numbers[bad[0]]}; give 1 to 118")
        height = cell_heights(cell).min()
        if not height >= MIN_CELL_HEIGHT:
            raise StructureError(
                f"cell {np.round(cell, 6).tolist()} has no volume (smallest height {height:.3g} angstrom); give three"
                " independent cell vectors (for a cluster or slab: atoms.center(vacuum=...))"
            )

    @classmethod
    def from_ase(cls, atoms: Atoms) -> Structure:
        """The structure of an ``ase.Atoms``."""
        return cls(atoms.get_positions(), atoms.get_atomic_numbers(), np.asarray(atoms.cell.array), atoms.pbc)

    def to_ase(self) -> Atoms:
        """An ``ase.Atoms`` of this structure."""
        from ase import Atoms

        return Atoms(numbers=self.numbers, positions=self.positions, cell=self.cell, pbc=self.pbc)

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def symbols(self) -> tuple[str, ...]:
        """The chemical symbols present, each once, in alphabetic order."""
        return symbols_of(self.counts)

    @property
    def counts(self) -> dict[int, int]:
        """Atoms of each atomic number."""
        numbers, counts = np.unique(self.numbers, return_counts=True)
        return dict(zip(numbers.tolist(), counts.tolist(), strict=True))

    def pieces(self) -> Iterator[tuple[NDArray[np.float64], NDArray[np.int64]]]:
        """Positions and numbers of all atoms in their order, here in one piece; see `gpurho.sources`."""
        yield self.positions, self.numbers

    def structure(self) -> Structure:
        """Itself, as atoms that lie in a file give the structure that they are."""
        return self

    @property
    def volume(self) -> float:
        """Volume of the cell, angstrom^3."""
        return float(abs(np.linalg.det(self.cell)))

    def fingerprint(self) -> str:
        """SHA-256 of the numbers, positions, cell and periodicity, bit for bit."""
        return fingerprint(len(self), self.pieces, self.cell, self.pbc)

    def check_overlaps(self, minimum: float = 0.5, index: NDArray[np.int64] | None = None) -> None:
        """Raise `StructureError` where two atoms (periodic images included) are closer than `minimum` angstrom.

        `index` are the numbers to say of the atoms, where they are a part of a larger structure's.
        """
        from scipy.spatial import cKDTree

        fractional = self.positions @ np.linalg.inv(self.cell)
        wrapped = np.where(self.pbc, fractional - np.floor(fractional), fractional)
        reach = minimum / cell_heights(self.cell)
        copies, owners = wrapped, np.arange(len(self))
        for axis in np.flatnonzero(self.pbc):
            # Atoms within `minimum` of a face stand again beyond the opposite face.
            pieces, indices = [copies], [owners]
            for shift in range(1, int(np.ceil(reach[axis])) + 1):
                low, high = copies[:, axis] + shift < 1 + reach[axis], copies[:, axis] - shift > -reach[axis]
                step = np.eye(3)[axis] * shift
                pieces += [copies[low] + step, copies[high] - step]
                indices += [owners[low], owners[high]]
            copies, owners = np.concatenate(pieces), np.concatenate(indices)
        if len(copies) < 2:
            return
        distance, partner = nearest(cKDTree(copies @ self.cell), wrapped @ self.cell, 2)
        worst = int(np.argmin(distance[:, 1]))
        if distance[worst, 1] < minimum:
            first, second = sorted((worst, int(owners[partner[worst, 1]])))
            if first == second:
                first, second = sorted((worst, int(owners[partner[worst, 0]])))
            if index is not None:
                first, second = int(index[first]), int(index[second])
            what = f"atoms {first} and {second} are" if first != second else f"atom {first} and its periodic image are"
            raise StructureError(
                f"{what} {distance[worst, 1]:.4g} angstrom apart, under the minimum of {minimum:g};"
                " remove the overlap or check the cell and units"
            )


def as_structure(atoms: Structure | Atoms | Any) -> Structure:
    """`atoms` as a `Structure`: passed through, or taken from ``ase.Atoms``."""
    if isinstance(atoms, Structure):
        return atoms
    if hasattr(atoms, "get_positions") and hasattr(atoms, "get_atomic_numbers"):
        return Structure.from_ase(atoms)
    raise StructureError(f"atoms are {type(atoms).__name__}; give ase.Atoms or gpurho.Structure")


def symbols_of(numbers: Iterable[int]) -> tuple[str, ...]:
    """Chemical symbols of atomic numbers, in alphabetic order."""
    from ase.data import chemical_symbols

    return tuple(sorted(chemical_symbols[z] for z in numbers))


def fingerprint(
    n_atoms: int,
    pieces: Callable[[], Iterable[tuple[NDArray[np.float64], NDArray[np.int64]]]],
    cell: NDArray[np.float64],
    pbc: NDArray[np.bool_],
) -> str:
    """SHA-256 of atoms that come in pieces of positions and numbers, bit for bit; `pieces` is called twice."""
    digest = hashlib.sha256(b"gpurho structure 1")
    for column, shape in ((1, (n_atoms,)), (0, (n_atoms, 3))):
        digest.update(str(shape).encode())
        for piece in pieces():
            digest.update(np.ascontiguousarray(piece[column]).data)
    for array in (cell, pbc):
        digest.update(str(array.shape).encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def real_array(value: Any) -> NDArray[np.float64] | None:
    """A float64 array of its own; None for what is not an array of real numbers."""
    try:
        found = np.array(value)
        return None if found.dtype.kind not in "iufb" else found.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        return None


def cell_heights(cell: ArrayLike) -> NDArray[np.float64]:
    """Distances between opposite faces of a cell, (3,), in the unit of `cell`; 0 for a cell without volume."""
    rows = np.asarray(cell, dtype=float)
    faces = np.linalg.norm(np.cross(rows[[1, 2, 0]], rows[[2, 0, 1]]), axis=1)
    volume = abs(np.linalg.det(rows))
    return np.divide(volume, faces, out=np.zeros(3), where=faces > 0)
