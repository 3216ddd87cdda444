"""Atoms and cells: what is no structure, what is a strange one, and one structure said in several ways."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import aluminium, settings, small_model

from fuzz.cases import WrongError, finite, whole_density

ODD = (np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-300, 1e9, -1e9, 1e6, 999999.0, 1e18, 1e300, 1e-5, 0.09, 0.11)


@cache
def model() -> Any:
    """The small model."""
    return small_model()


@cache
def smooth_model() -> Any:
    """A model of two species, of the smooth family."""
    from model_tools import delta_model

    return delta_model()


def odd_cell(rng: np.random.Generator) -> np.ndarray:
    """Cells from sound to none: left-handed, flat, nearly singular, tiny, huge, not finite."""
    cell = np.diag(rng.uniform(2.5, 6.0, 3)) + rng.normal(scale=0.5, size=(3, 3))
    what = int(rng.integers(12))
    if what == 0:
        cell = cell[[1, 0, 2]]
    elif what == 1:
        cell[2] = cell[0] + cell[1] * rng.uniform(-1, 1)
    elif what == 2:
        cell[2] = cell[0] + 10.0 ** rng.uniform(-14, 0) * rng.normal(size=3)
    elif what == 3:
        cell *= 10.0 ** rng.uniform(-12, -0.5)
    elif what == 4:
        cell *= 10.0 ** rng.uniform(1, 300)
    elif what == 5:
        cell[int(rng.integers(3)), int(rng.integers(3))] = ODD[int(rng.integers(len(ODD)))]
    elif what == 6:
        cell = np.zeros((3, 3))
    elif what == 7:
        cell[1] += int(rng.integers(-30, 30)) * cell[0]
    return cell


def odd_structure(rng: np.random.Generator) -> tuple[Any, ...]:
    """Arguments of `Structure`, sound or not."""
    n = int(rng.choice([0, 1, 1, 2, 3, 5, 8]))
    cell = odd_cell(rng)
    with np.errstate(all="ignore"):
        positions: Any = rng.uniform(size=(n, 3)) @ cell
    numbers: Any = rng.choice([13, 13, 13, 14, 1, 92], size=n)
    what = int(rng.integers(14))
    if n and what == 0:
        positions[int(rng.integers(n)), int(rng.integers(3))] = ODD[int(rng.integers(len(ODD)))]
    elif n > 1 and what == 1:
        positions[1] = positions[0] + 10.0 ** rng.uniform(-18, 0)
    elif n and what == 2:
        with np.errstate(all="ignore"):
            positions = positions + rng.integers(-100000, 100000, (n, 3)) @ cell
    elif what == 3:
        numbers = [(), "Al", [0] * n, [-1] * n, [119] * n, [13.5] * n, [2**63] * n, None, [[13]] * n][
            int(rng.integers(9))
        ]
    elif what == 4:
        positions = [(), "x", np.zeros((n, 2)), np.zeros(n), [[1j, 0, 0]] * n, None, np.zeros((n, 3, 3)), [["a"] * 3]][
            int(rng.integers(8))
        ]
    elif what == 5:
        cell = [np.eye(2), np.zeros(3), None, "cubic", [[1, 2, 3]] * 3, np.eye(3) * 1j, 4.0][int(rng.integers(7))]
    pbc: Any = rng.random(3) < 0.7
    if what == 6:
        pbc = [True, "ppp", [2, 3, 4], None, [], [[True]] * 3][int(rng.integers(6))]
    return positions, numbers, cell, pbc


def structure_case(rng: np.random.Generator, folder: Path) -> str:
    """Making a structure, and what is asked of one."""
    from gpurho.structure import Structure

    structure = Structure(*odd_structure(rng))
    finite([structure.volume], "volume")
    if structure.volume <= 0:
        raise WrongError("a cell without volume is taken")
    structure.fingerprint()
    again = Structure.from_ase(structure.to_ase())
    if again.fingerprint() != structure.fingerprint():
        raise WrongError("another structure comes back from ASE")
    structure.check_overlaps()
    return "accepted"


def ase_case(rng: np.random.Generator, folder: Path) -> str:
    """Whatever is given in place of atoms."""
    from ase import Atoms

    from gpurho.structure import as_structure

    positions, numbers, cell, pbc = odd_structure(rng)
    try:
        if np.iscomplexobj(cell):
            raise TypeError  # which ASE casts with a warning
        atoms: Any = Atoms(numbers=numbers, positions=positions, cell=cell, pbc=pbc)
    except Exception:  # ASE refuses it itself
        atoms = [None, "al.xyz", 3, [1, 2], {}, np.zeros((3, 3)), Atoms()][int(rng.integers(7))]
    structure = as_structure(atoms)
    finite(structure.positions, "positions")
    return "accepted"


def predict_case(rng: np.random.Generator, folder: Path) -> str:
    """A prediction of a strange structure on a tiny grid."""
    from gpurho.pipelines.predict import predict
    from gpurho.structure import Structure

    structure = Structure(*odd_structure(rng))
    uncertainty = [None, "analytic"][int(rng.integers(2))]
    grid = tuple(int(n) for n in rng.integers(1, 5, 3))
    used = smooth_model() if 14 in structure.numbers else model()
    with predict(structure, used, grid=grid, **settings(uncertainty=uncertainty)) as density:
        whole_density(density)
        finite([density.electrons], "electrons")
    return "accepted"


def rewrite_case(rng: np.random.Generator, folder: Path) -> str:
    """The same crystal said in another way has the same density, to rounding."""
    from ase import Atoms
    from scipy.spatial.transform import Rotation

    from gpurho.pipelines.predict import predict

    atoms = aluminium(rattle=0.15, seed=int(rng.integers(1 << 30)))
    if rng.random() < 0.5:
        atoms.set_cell(atoms.cell.array + rng.normal(scale=0.2, size=(3, 3)), scale_atoms=True)
    shape = tuple(int(n) for n in rng.integers(2, 5, 3))
    options = settings(uncertainty=None, grid=shape)
    want = np.asarray(predict(atoms, model(), **options).mean)
    cell, positions, numbers = atoms.cell.array, atoms.positions, atoms.numbers
    what = int(rng.integers(4))
    if what == 0:
        order = rng.permutation(len(atoms))
        other = Atoms(numbers[order], positions[order], cell=cell, pbc=True)
    elif what == 1:
        other = Atoms(numbers, positions + rng.integers(-3, 4, (len(atoms), 3)) @ cell, cell=cell, pbc=True)
    elif what == 2:
        turn = Rotation.random(rng=rng).as_matrix().T
        other = Atoms(numbers, positions @ turn, cell=cell @ turn, pbc=True)
    else:
        mirror = np.diag([1.0, 1.0, -1.0])
        other = Atoms(numbers, positions @ mirror, cell=cell @ mirror, pbc=True)
    found = np.asarray(predict(other, model(), **options).mean)
    worst = float(np.abs(found - want).max())
    if not worst < 2e-4 * max(1.0, float(np.abs(want).max())):
        raise WrongError(f"rewrite {what} changes the density by {worst:.2e}")
    return "right"


def descriptors_case(rng: np.random.Generator, folder: Path) -> str:
    """Descriptors by a strange specification at strange points."""
    from gpurho.descriptors import DescriptorSpec, descriptors
    from gpurho.structure import Structure

    values: dict[str, Any] = {"species": ("Al",), "n_distances": 8, "n_angle_atoms": 3, "n_angle_neighbors": 2}
    values["cutoff"] = float(rng.uniform(2, 7))
    if rng.random() < 0.5:
        values = {"species": ("Al", "Si"), "family": "smooth", "n_radial": 4, "n_basis": 2, "l_max": 2, "cutoff": 4.0}
    if rng.random() < 0.5:
        name = list(values)[int(rng.integers(len(values)))]
        values[name] = [0, -1, 3.5, None, "x", np.nan, 1e9, (), ("Al", "Al"), True, 2**40][int(rng.integers(11))]
    spec = DescriptorSpec(**values)
    structure = Structure(*odd_structure(rng)) if rng.random() < 0.5 else Structure.from_ase(aluminium())
    points: Any = rng.uniform(-20, 20, (int(rng.integers(0, 6)), 3))
    if rng.random() < 0.5:
        choices = (np.nan, np.inf, 1e9, 1e18, "x", None)
        odd = choices[int(rng.integers(len(choices)))]
        points = [[odd, 0, 0]] if rng.random() < 0.8 else odd
    found = descriptors(structure, points, spec)
    finite(found, "features")
    if found.shape != (len(points), spec.n_features):
        raise WrongError(f"features have shape {found.shape}")
    return "accepted"


KINDS = {
    "structure": structure_case,
    "atoms": ase_case,
    "predict": predict_case,
    "rewrite": rewrite_case,
    "descriptors": descriptors_case,
}
