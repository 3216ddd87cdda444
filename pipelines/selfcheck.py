"""Invariance of a model's density on the user's own structure: ``gpurho check --structure al.xyz``.

Turned, moved by periods, with atoms in another order, cut into other tiles or shared among processes, a structure is
the same structure, and its density at the same points has to be the same. Whatever differs is rounding; how much is
measured here at points drawn from the grid, so that a structure of any size takes seconds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.descriptors import Environment
from gpurho.errors import SettingsError
from gpurho.pipelines.predict import predict
from gpurho.pipelines.settings import Job, settle
from gpurho.structure import Structure, as_structure

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.model import DensityModel

POINTS = 2000
"""Grid points that are compared."""

TOLERANCES = {"fp32": 5e-5, "bf16": 3e-2}
"""Largest deviation of the density and of its sigma, in parts of the largest density at the points."""


@dataclass(frozen=True)
class Deviation:
    """What one rewrite of the structure changes.

    Parameters
    ----------
    name : str
    mean, sigma : float, e/angstrom^3
        Largest change of the density and of its total sigma.
    tolerance : float, e/angstrom^3
        What either may be; 0 where the same bits are promised.
    text : str
        What was done.
    """

    name: str
    mean: float
    sigma: float
    tolerance: float
    text: str

    @property
    def ok(self) -> bool:
        """Whether both are within the tolerance."""
        return max(self.mean, self.sigma) <= self.tolerance


@dataclass(frozen=True)
class SelfCheck:
    """Deviations on one structure; printed as a table."""

    n_atoms: int
    n_points: int
    model: str
    device: str
    precision: str
    largest: float
    deviations: tuple[Deviation, ...]

    @property
    def ok(self) -> bool:
        """Whether all are within their tolerances."""
        return all(d.ok for d in self.deviations)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        rows = [{**asdict(d), "ok": d.ok} for d in self.deviations]
        return {**asdict(self), "deviations": rows, "ok": self.ok}

    def __str__(self) -> str:
        head = (
            f"{self.n_atoms} atoms, {self.n_points} points, model {self.model}, {self.device}, {self.precision};"
            f" largest density {self.largest:.4g} e/angstrom^3"
        )
        rows = [f"   {'':12}  {'density':>9}  {'sigma':>9}  {'tolerance':>9}  e/angstrom^3"]
        rows += [
            f"{'ok' if d.ok else 'NO':3}{d.name:12}  {d.mean:9.2e}  {d.sigma:9.2e}  {d.tolerance:9.2e}  {d.text}"
            for d in self.deviations
        ]
        return "\n".join([head, *rows])


Values = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Density and total sigma, (n,), e/angstrom^3."""


def self_check(
    atoms: Atoms | Structure,
    model: str | Path | DensityModel = "auto",
    *,
    device: str | None = None,
    spacing: float | None = None,
    precision: str = "fp32",
    points: int = POINTS,
    processes: int = 2,
    seed: int = 0,
) -> SelfCheck:
    """How far the density of a structure depends on what it must not depend on.

    Parameters
    ----------
    atoms : ase.Atoms or Structure
    model, device, spacing, precision
        As of `gpurho.predict`; "fp32" is what makes small deviations visible.
    points : int
        Grid points that are compared, 8 to a million.
    processes : int
        Workers that share the tiles in the last check, of `device`; 1 leaves it out.
    seed : int
        Of the rewrites.

    Raises
    ------
    SettingsError, StructureError, UnknownSpeciesError, ModelError
        As of `gpurho.predict`.
    """
    if isinstance(points, bool) or not isinstance(points, int) or not 8 <= points <= 1_000_000:
        raise SettingsError(f"points {points!r} is not a whole number from 8 to a million")
    if isinstance(processes, bool) or not isinstance(processes, int) or not 1 <= processes <= 64:
        raise SettingsError(f"processes {processes!r} is not a whole number from 1 to 64")
    structure = as_structure(atoms)
    job = settle(structure, model, device=device, spacing=spacing, precision=precision, seed=seed)
    rng = np.random.default_rng(job.seed)
    chosen = _points(job, points, rng)
    reference = _at(job, structure, chosen)
    largest = float(np.abs(reference[0]).max())
    tolerance = TOLERANCES[job.precision] * largest
    found = []
    for name, text, rewrite in _REWRITES:
        written, moved = rewrite(structure, chosen, rng)
        found.append(Deviation(name, *_difference(_at(job, written, moved), reference), tolerance, text))
    found += _tiles(job, points, processes, tolerance)
    return SelfCheck(len(structure), len(chosen), job.model_name, job.device, job.precision, largest, tuple(found))


def _points(job: Job, n: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Grid points drawn at random, (n, 3) angstrom."""
    grid = job.grid
    indices = np.stack([rng.integers(0, size, min(n, grid.n_points)) for size in grid.shape], axis=1)
    return np.asarray(grid.origin + indices @ grid.steps)


def _at(job: Job, structure: Structure, points: NDArray[np.float64]) -> Values:
    """The density of a structure at any points."""
    features = Environment(structure, job.model.spec.descriptor, job.device).point_features(points).values
    import torch

    evaluate = job.model.evaluator(job.device, job.precision, job.uncertainty)
    fields = evaluate(torch.as_tensor(features, device=job.device))
    # The job is settled with uncertainty: all three are there.
    mean, aleatoric, epistemic = (part.detach().cpu().double().numpy() for part in fields if part is not None)
    return mean, np.hypot(aleatoric, epistemic)


def _difference(a: Values, b: Values) -> tuple[float, float]:
    mean, sigma = (float(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))
    return mean, sigma


# -- the same structure in other words --------------------------------------------------------------------------------

Rewritten = tuple[Structure, NDArray[np.float64]]


def _rotated(s: Structure, points: NDArray[np.float64], rng: np.random.Generator) -> Rewritten:
    from scipy.spatial.transform import Rotation

    turn = Rotation.random(rng=rng).as_matrix().T
    return Structure(s.positions @ turn, s.numbers, s.cell @ turn, s.pbc), points @ turn


def _mirrored(s: Structure, points: NDArray[np.float64], rng: np.random.Generator) -> Rewritten:
    turn = np.diag([1.0, 1.0, -1.0])
    return Structure(s.positions @ turn, s.numbers, s.cell @ turn, s.pbc), points @ turn


def _moved(s: Structure, points: NDArray[np.float64], rng: np.random.Generator) -> Rewritten:
    shift = rng.uniform(-1.0, 1.0, 3) @ s.cell
    return Structure(s.positions + shift, s.numbers, s.cell, s.pbc), points + shift


def _by_periods(s: Structure, points: NDArray[np.float64], rng: np.random.Generator) -> Rewritten:
    def shifts(n: int) -> NDArray[np.float64]:
        return np.asarray((rng.choice([-2, -1, 1, 2], (n, 3)) * s.pbc) @ s.cell)

    return Structure(s.positions + shifts(len(s)), s.numbers, s.cell, s.pbc), points + shifts(len(points))


def _permuted(s: Structure, points: NDArray[np.float64], rng: np.random.Generator) -> Rewritten:
    order = rng.permutation(len(s))
    if np.array_equal(order, np.arange(len(s))):
        order = order[::-1]
    return Structure(s.positions[order], s.numbers[order], s.cell, s.pbc), points


_Rewrite = Callable[[Structure, NDArray[np.float64], np.random.Generator], Rewritten]
_REWRITES: tuple[tuple[str, str, _Rewrite], ...] = (
    ("rotation", "turned at random", _rotated),
    ("reflection", "mirrored", _mirrored),
    ("translation", "moved as a whole", _moved),
    ("periods", "each atom and point moved by whole cell vectors along the periods", _by_periods),
    ("permutation", "atoms in another order", _permuted),
)


# -- other tiles and processes ----------------------------------------------------------------------------------------


def _tiles(job: Job, points: int, processes: int, tolerance: float) -> list[Deviation]:
    side = max(2, round(points ** (1 / 3)))
    region = tuple((n // 2 - min(side, n) // 2, n // 2 - min(side, n) // 2 + min(side, n)) for n in job.grid.shape)
    options: dict[str, Any] = {
        "grid": job.grid,
        "region": region,
        "device": job.device,
        "precision": job.precision,
        "progress": False,
    }

    def values(**changes: Any) -> Values:
        with predict(job.structure, job.model, **options, **changes) as density:
            assert density.std is not None  # predicted with uncertainty
            return np.asarray(density.mean, np.float64), np.asarray(density.std, np.float64)

    whole = values(tile_shape=(64, 64, 64))
    small = values(tile_shape=(4, 4, 4))
    found = [
        Deviation("tiles", *_difference(small, whole), tolerance, "tiles of 4 x 4 x 4 points, not of 64 x 64 x 64")
    ]
    if processes > 1 and ":" not in job.device:
        # The shape is the same, and so are the bits.
        shared = values(tile_shape=(4, 4, 4), devices=processes)
        found.append(Deviation("processes", *_difference(shared, small), 0.0, f"{processes} workers, not one"))
    return found


# -- command line -----------------------------------------------------------------------------------------------------


def run(options: argparse.Namespace) -> int:
    """``gpurho check --structure``: the table; exit code 1 where something deviates."""
    from gpurho.pipelines.structures import read_structure

    species = None if options.species is None else [name.strip() for name in options.species.split(",")]
    atoms = read_structure(options.structure, species)
    found = self_check(atoms, options.model, device=options.device, processes=options.processes)
    print(json.dumps(found.to_dict()) if options.json else found)
    return 0 if found.ok else 1


__all__ = ["Deviation", "SelfCheck", "run", "self_check"]
