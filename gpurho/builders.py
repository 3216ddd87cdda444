"""Example structures, thinly over ASE: supercells, vacancies, strain, random alloys, slabs, thermal rattling.

Dislocations and grain boundaries are in `gpurho.defects`. Every builder leaves its input alone, and says in
``atoms.info["family"]`` what it made: "al-vacancy", "sige-alloy"; the last builder names it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import StructureError

if TYPE_CHECKING:
    from ase import Atoms

MAX_ATOMS = 200_000_000
"""Largest structure that is built: beyond it the positions alone take more than 5 GB."""


def crystal(
    symbol: str, repeat: Sequence[int] = (3, 3, 3), lattice: str | None = None, a: float | None = None
) -> Atoms:
    """A cubic crystal: `repeat` conventional cells of `symbol`, lattice constant `a` in angstrom (ASE's by default)."""
    from ase.build import bulk

    if a is not None:
        check_length("a", a)
    try:
        cell = bulk(symbol, lattice, a=a, cubic=True)
    except (KeyError, ValueError, RuntimeError, AttributeError) as error:
        raise StructureError(f"crystal of {symbol!r} ({lattice or 'reference lattice'}): {error}") from None
    return named(supercell(cell, repeat), "crystal")


def supercell(atoms: Atoms, repeat: ArrayLike) -> Atoms:
    """`atoms` repeated: three numbers, or a (3, 3) matrix of whole numbers whose rows are the new cell vectors."""
    counts = np.asarray(repeat, dtype=float)
    whole = counts.shape in ((3,), (3, 3)) and np.array_equal(counts, np.rint(counts))
    copies = (float(counts.prod()) if counts.shape == (3,) else float(np.linalg.det(counts))) if whole else 0.0
    if not whole or copies < 0.5 or (counts.ndim == 1 and counts.min() < 1):
        raise StructureError(
            f"repeat {np.asarray(repeat).tolist()} is no supercell; give three whole numbers from 1 up"
        )
    check_count(len(atoms) * copies)
    if counts.ndim == 1:
        return atoms.repeat(tuple(counts.astype(int).tolist()))
    from ase.build import make_supercell

    result = make_supercell(atoms, counts)
    result.info = dict(atoms.info)
    return result


def vacancy(atoms: Atoms, index: int | None = None) -> Atoms:
    """`atoms` without one of them: `index`, or the one nearest to the middle of the cell."""
    if len(atoms) < 2:
        raise StructureError(f"a vacancy needs two atoms or more, not {len(atoms)}; repeat the cell first")
    return _without(atoms, [_index(atoms, index)], "vacancy")


def divacancy(atoms: Atoms, index: int | None = None, partner: int | None = None) -> Atoms:
    """`atoms` without two of them: `index` (or the one nearest to the middle of the cell) and `partner`.

    `partner` is the nearest neighbour of the first by default, periodic images included; of several at the same
    distance it is the one with the lowest number.
    """
    from ase.geometry import find_mic

    if len(atoms) < 3:
        raise StructureError(f"a divacancy needs three atoms or more, not {len(atoms)}; repeat the cell first")
    first = _index(atoms, index)
    if partner is None:
        _, distances = find_mic(atoms.positions - atoms.positions[first], atoms.cell, cast(Any, atoms.pbc))
        distances[first] = np.inf
        partner = int(np.flatnonzero(distances < distances.min() + 1e-3)[0])
    second = _index(atoms, partner)
    if second == first:
        raise StructureError(f"partner {partner} is atom {first} itself; give another one")
    return _without(atoms, [first, second], "divacancy")


def strained(atoms: Atoms, strain: ArrayLike) -> Atoms:
    """Cell and atoms under a strain e, by ``r -> (1 + e) r``.

    `strain` is one number (all lengths), three (along x, y and z), or a (3, 3) tensor.
    """
    tensor = np.asarray(strain, dtype=float)
    if tensor.shape in ((), (3,)):
        tensor = tensor * np.eye(3)
    if tensor.shape != (3, 3) or not np.isfinite(tensor).all() or np.linalg.det(np.eye(3) + tensor) <= 0:
        raise StructureError(
            f"strain {strain!r} is no deformation; give one number, three, or a (3, 3) tensor above -1"
        )
    result = atoms.copy()
    result.set_cell(np.asarray(atoms.cell.array) @ (np.eye(3) + tensor).T, scale_atoms=True)
    return named(result, "strained")


def random_alloy(atoms: Atoms, fractions: Mapping[str, float], seed: int = 0) -> Atoms:
    """The sites of `atoms` occupied at random: `fractions` by symbol, which sum to 1; counts are exact to one atom."""
    shares = _shares(fractions)
    if seed < 0:
        raise StructureError(f"seed {seed} is below 0; give 0 or more")
    edges = np.rint(np.cumsum(shares) * len(atoms)).astype(int)
    symbols = np.repeat(list(fractions), np.diff(edges, prepend=0))
    result = atoms.copy()
    result.set_chemical_symbols(np.random.default_rng(seed).permutation(symbols).tolist())
    return named(result, "alloy")


def alloy(
    fractions: Mapping[str, float],
    repeat: Sequence[int] = (2, 2, 2),
    lattice: str = "diamond",
    a: float | None = None,
    seed: int = 0,
) -> Atoms:
    """A random alloy on a cubic lattice: `repeat` conventional cells, `fractions` by symbol, which sum to 1.

    The lattice constant `a`, in angstrom, is that of Vegard's law by default. Counts are exact to one atom.
    """
    if a is None:
        a = vegard(fractions, lattice)
    symbols = list(fractions)
    return random_alloy(crystal(symbols[0] if symbols else "Si", repeat, lattice, a), fractions, seed)


def vegard(fractions: Mapping[str, float], lattice: str = "diamond") -> float:
    """Lattice constant of an alloy in angstrom: the mean of its elements' (ASE's), which must have that lattice."""
    from ase.data import atomic_numbers, reference_states

    constant = 0.0
    for symbol, share in zip(fractions, _shares(fractions), strict=True):
        reference = reference_states[atomic_numbers[symbol]] or {}
        if reference.get("symmetry") != lattice:
            raise StructureError(
                f"{symbol} is not {lattice} ({reference.get('symmetry')}); give the lattice constant a"
            )
        constant += share * reference["a"]
    return float(constant)


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
    return named(result, "slab")


def rattled(atoms: Atoms, std: float = 0.05, seed: int = 0) -> Atoms:
    """Every coordinate moved at random with standard deviation `std` angstrom; the family stays."""
    if not (np.isfinite(std) and std >= 0):
        raise StructureError(f"std {std!r} is not a length; give angstrom from 0 up")
    if seed < 0:
        raise StructureError(f"seed {seed} is below 0; give 0 or more")
    result = atoms.copy()
    result.positions += np.random.default_rng(seed).normal(scale=std, size=(len(atoms), 3))
    return result


# -- what builders share ------------------------------------------------------------------------------------------


def named(atoms: Atoms, kind: str) -> Atoms:
    """`atoms` with their family in `info`: the elements by atomic number, and `kind`."""
    from ase.data import chemical_symbols

    elements = "".join(chemical_symbols[z] for z in np.unique(atoms.numbers)).lower()
    atoms.info["family"] = f"{elements}-{kind}"
    return atoms


def check_count(n_atoms: float) -> None:
    """Raise `StructureError` for more atoms than can be built, before memory is taken."""
    if n_atoms > MAX_ATOMS:
        raise StructureError(
            f"{n_atoms:.3g} atoms are more than the {MAX_ATOMS:.0e} that can be built; give a smaller size"
        )


def check_length(name: str, value: float) -> float:
    """`value`, where it is a length; `StructureError` where it is not."""
    if not (np.isfinite(value) and value > 0):
        raise StructureError(f"{name} {value!r} is not a length; give angstrom above 0")
    return float(value)


def _index(atoms: Atoms, index: int | None) -> int:
    if index is None:
        middle = 0.5 * np.asarray(atoms.cell.array).sum(axis=0)
        return int(np.argmin(np.linalg.norm(atoms.get_positions() - middle, axis=1)))
    if not -len(atoms) <= index < len(atoms):
        raise StructureError(f"atom {index} is not one of {len(atoms)}; give 0 to {len(atoms) - 1}")
    return index % len(atoms)


def _without(atoms: Atoms, indices: list[int], kind: str) -> Atoms:
    result = atoms.copy()
    del result[indices]
    return named(result, kind)


def _shares(fractions: Mapping[str, float]) -> NDArray[np.float64]:
    from ase.data import atomic_numbers

    for symbol in fractions:
        if symbol not in atomic_numbers or symbol == "X":
            raise StructureError(f"symbol {symbol!r} is no element; give for instance {{'Si': 0.5, 'Ge': 0.5}}")
    shares = np.array(list(fractions.values()), dtype=float)
    # A sum that is not a number fails this, too.
    if len(shares) == 0 or np.any(shares < 0) or not abs(shares.sum() - 1) <= 1e-9:
        raise StructureError(f"fractions {dict(fractions)} do not sum to 1; give for instance {{'Si': 0.5, 'Ge': 0.5}}")
    return shares
