"""What a model keeps of its training atoms, to tell which others are unlike them; found by `fit_trust`.

Atoms are compared by the model's own inputs at their nuclei, standardised species by species over the training data and
turned to its principal axes, each divided by its own spread. There are two distances.

- Along the first axes, which hold `VARIANCE` of the variance: to the nearest training atom of the species.
- Along the next, up to `THIN_VARIANCE`: to the middle of the training atoms. What hardly varied in training may matter
  most: in an alloy neighbours change their kind but never their number, and a vacancy shows here alone. Below 1 this
  distance is squared, so that it is silent where all is well.

The larger one counts. The unit of each is what 3 in 400 training atoms are beyond (for the first, from those of the
other training snapshots), so that of the larger one about one in a hundred is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import ModelError
from gpurho.structure import Structure
from gpurho.surroundings import AtomBatches, Surroundings, first_shell

if TYPE_CHECKING:
    from gpurho.model import DensityModel

Floats = NDArray[np.float64]

VERSION = 1
VARIANCE, THIN_VARIANCE = 0.95, 0.999
"""Shares of the variance. Measured on Al and SiGe: without thin axes vacancies of SiGe are missed; with those up to
0.9999 one in ten atoms of held-out snapshots is beyond 1."""

MOST_AXES, MOST_THIN = 48, 128
MOST_KNOWN = 1500
"""Training atoms that a model keeps; a random choice where there are more."""

FOLDS = 5
"""Parts of the training snapshots, each of which is looked at along the thin axes of the others."""

EDGE = 0.9925
"""Share of the training atoms whose distance, of either kind, is below 1."""

FEWEST = 20
"""Training atoms of a species from which on there is something to compare with."""


@dataclass(frozen=True)
class TrustStatistics:
    """Numbers about the training atoms; tuples of lists have an entry for each species of the model, in its order.

    Attributes
    ----------
    atoms : tuple of int
        Training atoms kept in the tensor ``trust_known``.
    axes, thin : int
        Its columns, and the further axes of the tensor ``trust_basis``.
    snapshots : int
        Training snapshots.
    shell : float, angstrom
        Radius of the first shell of neighbours.
    nearest : float, angstrom
        Shortest distance of two atoms.
    coordination : tuple of (low, median, high)
        Neighbours in the shell: the 1st, 50th and 99th percentile.
    bond : tuple of (low, high), angstrom
        Mean distance of the neighbours in the shell, 0.5th and 99.5th percentile.
    volume : (low, high), angstrom^3
        Volume of the cell per atom, over the snapshots.
    composition : tuple of (low, high)
        Share of each species among the atoms, over the snapshots.
    """

    atoms: tuple[int, ...]
    axes: int
    thin: int
    snapshots: int
    shell: float
    nearest: float
    coordination: tuple[tuple[float, float, float], ...]
    bond: tuple[tuple[float, float], ...]
    volume: tuple[float, float]
    composition: tuple[tuple[float, float], ...]
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("atoms", "coordination", "bond", "volume", "composition"):
            object.__setattr__(self, name, _tupled(getattr(self, name)))
        n = len(self.atoms)
        whole = [*self.atoms, self.axes, self.thin, self.snapshots, self.version]
        if not all(isinstance(x, int) and not isinstance(x, bool) and 0 <= x <= 10**7 for x in whole):
            raise ModelError(f"trust statistics have counts {whole} that are not whole numbers")
        if self.version != VERSION:
            raise ModelError(f"trust statistics have version {self.version}; this version reads {VERSION}")
        if self.axes < 1 or sum(self.atoms) < 1:
            raise ModelError(f"trust statistics have {sum(self.atoms)} atoms and {self.axes} axes; 1 or more belong")
        for name, wide in (("coordination", 3), ("bond", 2), ("composition", 2)):
            rows = getattr(self, name)
            if len(rows) != n or any(len(row) != wide for row in rows):
                raise ModelError(f"trust statistics {name} {rows} have not {n} rows of {wide} numbers")
        if len(self.volume) != 2:
            raise ModelError(f"trust statistics volume {self.volume} is not two numbers")
        numbers = [self.shell, self.nearest, *self.volume]
        numbers += [x for rows in (self.coordination, self.bond, self.composition) for row in rows for x in row]
        if not all(isinstance(x, int | float) and math.isfinite(x) and 0 <= x < 1e9 for x in numbers):
            raise ModelError("trust statistics have values that are not finite and positive")

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def tensor_shapes(self, n_features: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that go with the numbers."""
        return {
            "trust_mean": (len(self.atoms), n_features),
            "trust_basis": (n_features, self.axes + self.thin),
            "trust_known": (sum(self.atoms), self.axes),
        }


def _tupled(value: Any) -> Any:
    return tuple(_tupled(item) for item in value) if isinstance(value, list | tuple) else value


class AtomInputs:
    """The inputs of a model's network, before standardising, at the nuclei of a structure."""

    def __init__(self, model: DensityModel, structure: Structure, device: str = "cpu") -> None:
        from gpurho.descriptors import Environment

        self._spec = model.spec
        self._environment = Environment(structure, model.spec.descriptor, device)
        self.species = model.spec.descriptor.species_index(structure)

    def at(self, points: Floats) -> Floats:
        """(n, n_features) float64, on the host."""
        import torch

        from gpurho.layers import transform_features

        values = self._environment.point_features(points).values
        inputs = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
        inputs = transform_features(inputs, self._spec.distance_columns(), self._spec.distance_length)
        return np.asarray(inputs.double().cpu().numpy())


def nearest_known(values: Floats, known: Floats, groups: tuple[Any, Any] | None = None) -> Floats:
    """Distance of each row of `values` (n, k) to the nearest of `known` (m, k), (n,).

    `groups` = (n,) and (m,) labels: rows with the same label are not compared.
    """
    found = np.empty(len(values))
    squares = np.square(known).sum(axis=1)
    rows = max(1, (1 << 22) // max(1, len(known)))
    for at in range(0, len(values), rows):
        part = slice(at, at + rows)
        distance = np.square(values[part]).sum(axis=1)[:, None] + squares - 2.0 * values[part] @ known.T
        if groups is not None:
            distance[groups[0][part][:, None] == groups[1]] = np.inf
        found[part] = distance.min(axis=1)
    return np.sqrt(np.maximum(found, 0.0))


def fit_trust(model: DensityModel, structures: Sequence[Structure]) -> DensityModel:
    """The model with the statistics of its training atoms; unchanged predictions.

    Parameters
    ----------
    model : DensityModel
    structures : sequence of Structure
        Those that it was trained on.

    Raises
    ------
    ModelError
        Where the structures say too little: too few atoms, or all of them alike.
    """
    import torch

    values, species, snapshot, around = [], [], [], []
    shell = first_shell(structures)
    for i, structure in enumerate(structures):
        inputs, batches = AtomInputs(model, structure), AtomBatches(structure)
        for atoms, points in batches:
            values.append(inputs.at(points))
            species.append(inputs.species[atoms])
            snapshot.append(np.full(len(atoms), i))
            around.append(batches.surroundings(points, shell))
    x, kinds, groups = np.concatenate(values), np.concatenate(species), np.concatenate(snapshot)
    names = model.spec.species
    counts = np.bincount(kinds, minlength=len(names))
    if counts.max() < FEWEST:
        raise ModelError(f"{counts.max()} training atoms are too few to tell which others are alike; give {FEWEST}")
    means = np.array([x[kinds == s].mean(axis=0) if counts[s] else np.zeros(x.shape[1]) for s in range(len(names))])
    basis, axes = _axes(x - means[kinds])
    z, thin = np.split((x - means[kinds]) @ basis, [axes], axis=1)
    if len(structures) == 1:
        groups = np.arange(len(x))
    kept = _kept(kinds, len(names))
    apart = np.concatenate(
        [
            nearest_known(z[kinds == s], z[k], (groups[kinds == s], groups[k]))
            for s, k in enumerate(kept)
            if counts[s] and (groups[k] != groups[k[0]]).any()
        ]
    )
    unit = float(np.quantile(apart[np.isfinite(apart)], EDGE)) if np.isfinite(apart).any() else 0.0
    if not unit > 0:
        raise ModelError("the training atoms are all alike; give structures that were shaken or strained")
    units = np.full(basis.shape[1], unit)
    thin_unit = np.quantile(_thin_distances(x - means[kinds], groups, axes, thin.shape[1]), EDGE)
    if thin_unit > 0:
        units[axes:] = thin_unit
    else:  # So few atoms that most parts of them have no thin axes.
        basis, units, thin = basis[:, :axes], units[:axes], thin[:, :0]
    shells = Surroundings.joined(around)
    statistics = TrustStatistics(
        atoms=tuple(len(k) for k in kept),
        axes=axes,
        thin=thin.shape[1],
        snapshots=len(structures),
        shell=round(shell, 4),
        nearest=round(float(shells.nearest.min()), 4) if np.isfinite(shells.nearest.min()) else 0.0,
        coordination=tuple(_quantiles(shells.coordination[kinds == s], (0.01, 0.5, 0.99)) for s in range(len(names))),
        bond=tuple(_quantiles(shells.bond[kinds == s], (0.005, 0.995)) for s in range(len(names))),
        volume=_span([s.volume / len(s) for s in structures]),
        composition=_shares(model, structures),
    )
    tensors = {
        **model.tensors,
        "trust_mean": torch.from_numpy(means.astype(np.float32)),
        "trust_basis": torch.from_numpy((basis / units).astype(np.float32)),
        "trust_known": torch.from_numpy((np.concatenate([z[k] for k in kept]) / unit).astype(np.float32)),
    }
    return type(model)(replace(model.spec, trust=statistics), tensors)


def _thin_distances(x: Floats, groups: NDArray[Any], axes: int, thin: int) -> Floats:
    """Of centred inputs along thin axes that were found without them: by folds of whole snapshots."""
    names = np.unique(groups)
    fold = np.searchsorted(names, groups) % min(FOLDS, len(names))
    found = np.zeros(len(x))
    for k in range(int(fold.max()) + 1):
        basis, _ = _axes(x[fold != k], (axes, thin))
        found[fold == k] = np.linalg.norm((x[fold == k] @ basis)[:, axes:], axis=1)
    return found


def combined(nearest: Floats, thin: Floats) -> Floats:
    """One number from the distance to the nearest known atom, (n,), and places along the thin axes, (n, k)."""
    middle = np.linalg.norm(thin, axis=1)
    return np.maximum(nearest, np.where(middle < 1.0, middle**2, middle))


def _axes(x: Floats, numbers: tuple[int, int] | None = None) -> tuple[Floats, int]:
    """(n_features, axes + thin): from centred inputs to principal axes of unit spread, and how many are no thin ones.

    `numbers` = (axes, thin) where these are to be so many, at most.
    """
    spread = x.std(axis=0)
    # A constant input rounds to a spread that is not quite zero.
    moving = spread > 1e-6 * np.maximum(1.0, np.abs(x).max(axis=0))
    if not moving.any():
        raise ModelError("the training atoms are all alike; give structures that were shaken or strained")
    scale = np.where(moving, 1.0 / np.where(moving, spread, 1.0), 0.0)
    scaled = x * scale
    variance, vectors = np.linalg.eigh(scaled.T @ scaled / len(x))
    variance, vectors = variance[::-1], vectors[:, ::-1]
    wide, both = np.searchsorted(np.cumsum(variance) / variance.sum(), (VARIANCE, THIN_VARIANCE)) + 1
    # An axis needs several atoms to have a spread.
    most = max(1, min(len(x) // 5, int((variance > 1e-12 * variance[0]).sum())))
    n = int(min(wide, MOST_AXES, most))
    last = int(min(both, n + MOST_THIN, most))
    if numbers is not None:
        n, last = min(numbers[0], most), min(sum(numbers), most)
    return np.asarray(scale[:, None] * vectors[:, :last] / np.sqrt(variance[:last])), n


def _kept(kinds: NDArray[Any], n_species: int) -> list[NDArray[np.int64]]:
    """Training atoms to keep, species by species, in their order."""
    order = np.random.default_rng(0).permutation(len(kinds))[:MOST_KNOWN]
    chosen = np.sort(order)
    return [chosen[kinds[chosen] == s] for s in range(n_species)]


def _quantiles(values: NDArray[Any], shares: tuple[float, ...]) -> Any:
    return tuple(round(float(q), 4) for q in np.quantile(values, shares)) if len(values) else (0.0,) * len(shares)


def _span(values: Sequence[float]) -> tuple[float, float]:
    return round(float(min(values)), 6), round(float(max(values)), 6)


def _shares(model: DensityModel, structures: Sequence[Structure]) -> tuple[tuple[float, float], ...]:
    index = [model.spec.descriptor.species_index(s) for s in structures]
    return tuple(_span([float(np.mean(i == s)) for i in index]) for s in range(len(model.spec.species)))
