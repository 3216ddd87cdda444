"""Example structures, thinly over ASE: vacancies, strain, random alloys, slabs, and thermal rattling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from gpurho.errors import StructureError

if TYPE_CHECKING:
    from ase import Atoms


def crystal(
    symbol: str, repeat: Sequence[int] = (3, 3, 3), lattice: str | None = None, a: float | None = None
) -> Atoms:
    """A cubic crystal: `repeat` conventional cells of `symbol`, lattice constant `a` in angstrom (ASE's by default)."""
    from ase.build import bulk

    try:
        cell = bulk(symbol, lattice, a=a, cubic=True)
    except (KeyError, ValueError, RuntimeError) as error:
        raise StructureError(f"crystal of {symbol!r} ({lattice or 'reference lattice'}): {error}") from None
    return cell.repeat(tuple(repeat))


def vacancy(atoms: Atoms, index: int | None = None) -> Atoms:
    """`atoms` without one of them: `index`, or the one nearest to the middle of the cell."""
    if len(atoms) < 2:
        raise StructureError(f"a vacancy needs two atoms or more, not {len(atoms)}; repeat the cell first")
    if index is None:
        middle = 0.5 * np.asarray(atoms.cell.array).sum(axis=0)
        index = int(np.argmin(np.linalg.norm(atoms.get_positions() - middle, axis=1)))
    if not -len(atoms) <= index < len(atoms):
        raise StructureError(f"atom {index} is not one of {len(atoms)}; give 0 to {len(atoms) - 1}")
    result = atoms.copy()
    del result[index]
    return result


def strained(atoms: Atoms, strain: ArrayLike) -> Atoms:
    """Cell and atoms under a strain: one number (all lengths), or a (3, 3) tensor e with ``r -> (1 + e) r``."""
    tensor = np.asarray(strain, dtype=float)
    tensor = tensor * np.eye(3) if tensor.ndim == 0 else tensor
    if tensor.shape != (3, 3) or not np.isfinite(tensor).all() or np.linalg.det(np.eye(3) + tensor) <= 0:
        raise StructureError(f"strain {strain!r} is no deformation; give a number or a (3, 3) tensor above -1")
    result = atoms.copy()
    result.set_cell(np.asarray(atoms.cell.array) @ (np.eye(3) + tensor).T, scale_atoms=True)
    return result


def random_alloy(atoms: Atoms, fractions: Mapping[str, float], seed: int = 0) -> Atoms:
    """The sites of `atoms` occupied at random: `fractions` by symbol, which sum to 1; counts are exact to one atom."""
    shares = np.array(list(fractions.values()), dtype=float)
    if len(shares) == 0 or np.any(shares < 0) or abs(shares.sum() - 1) > 1e-9:
        raise StructureError(f"fractions {dict(fractions)} do not sum to 1; give for instance {{'Si': 0.5, 'Ge': 0.5}}")
    edges = np.rint(np.cumsum(shares) * len(atoms)).astype(int)
    symbols = np.repeat(list(fractions), np.diff(edges, prepend=0))
    result = atoms.copy()
    result.set_chemical_symbols(np.random.default_rng(seed).permutation(symbols).tolist())
    return result


def slab(atoms: Atoms, vacuum: float = 10.0, axis: int = 2) -> Atoms:
    """`atoms` with `vacuum` angstrom on both sides along cell vector `axis`, which loses its period."""
    if axis not in (0, 1, 2) or not (np.isfinite(vacuum) and vacuum >= 0):
        raise StructureError(
            f"vacuum {vacuum!r} along axis {axis!r} cannot be added; give angstrom from 0 and axis 0 to 2"
        )
    result = atoms.copy()
    result.center(vacuum=vacuum, axis=axis)
    periodic = np.array(result.pbc)
    periodic[axis] = False
    result.set_pbc(periodic)
    return result


def rattled(atoms: Atoms, std: float = 0.05, seed: int = 0) -> Atoms:
    """Every coordinate moved at random with standard deviation `std` angstrom."""
    if not (np.isfinite(std) and std >= 0):
        raise StructureError(f"std {std!r} is not a length; give angstrom from 0 up")
    result = atoms.copy()
    result.positions += np.random.default_rng(seed).normal(scale=std, size=(len(atoms), 3))
    return result
