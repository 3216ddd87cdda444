"""Sites of fcc crystals in rotated axes, and how sizes in angstrom become numbers of periods."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.builders import check_length
from gpurho.errors import StructureError

if TYPE_CHECKING:
    from ase import Atoms

Floats: TypeAlias = NDArray[np.float64]


def fcc_constant(symbol: str, a: float | None = None) -> float:
    """Lattice constant in angstrom: `a` where it is given, else ASE's for an element that is fcc."""
    from ase.data import atomic_numbers, reference_states

    if symbol not in atomic_numbers or symbol == "X":
        raise StructureError(f"symbol {symbol!r} is no element; give for instance Al")
    if a is not None:
        return check_length("a", a)
    reference: dict[str, Any] = reference_states[atomic_numbers[symbol]] or {}
    if reference.get("symmetry") != "fcc":
        raise StructureError(f"{symbol} is not fcc ({reference.get('symmetry')}); give an fcc metal, or its a as fcc")
    return float(reference["a"])


def fcc_cell(axes: Sequence[Sequence[int]], a: float) -> tuple[Floats, tuple[float, float, float]]:
    """Sites of the smallest orthogonal fcc cell with these axes, in fractions of it, and its three lengths."""
    from ase.lattice.cubic import FaceCenteredCubic

    cell = FaceCenteredCubic(directions=[list(v) for v in axes], symbol="Al", latticeconstant=a)
    # A site is a/2 times whole numbers, and a period a or a/2 times an axis, so these are whole.
    parts = 2 * np.sum(np.square(axes), axis=1)
    fractions = np.rint(cell.get_scaled_positions(wrap=False) * parts) % parts / parts
    x, y, z = cell.cell.lengths()
    return fractions, (float(x), float(y), float(z))


def fcc_atoms(symbol: str, sites: Floats, cell: ArrayLike) -> Atoms:
    """Periodic atoms of one element at `sites`, (n, 3), angstrom."""
    from ase import Atoms
    from ase.data import atomic_numbers

    return Atoms(numbers=np.full(len(sites), atomic_numbers[symbol]), positions=sites, cell=cell, pbc=True)


def repeated(unit: Floats, periods: Sequence[float], counts: tuple[int, int, int]) -> Floats:
    """Sites of a block of unit cells, (n, 3), in the unit of `periods`; `unit` in fractions of its cell."""
    corners = np.stack(np.meshgrid(*map(np.arange, counts), indexing="ij"), axis=-1).reshape(-1, 1, 3)
    return ((corners + unit) * np.asarray(periods)).reshape(-1, 3)


def periods_in(name: str, value: float, period: float, minimum: int = 1) -> int:
    """How many periods are nearest to `value`, a length."""
    count = round(check_length(name, value) / period)
    if count < minimum:
        raise StructureError(f"{name} {value:.4g} angstrom is too small; give {minimum * period:.4g} or more")
    return count


def periods_or_one(name: str, value: float | None, period: float) -> int:
    """As `periods_in`; 1 where no value is given."""
    return 1 if value is None else periods_in(name, value, period)
