"""Transfer from small cells to larger ones: which layers to freeze, and from which size on more cells add nothing.

Preprint, section III.G, and Fig. 15 of its appendix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Dataset
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError
from gpurho.layers import NetworkSpec, transform_features
from gpurho.modelspec import ModelSpec
from gpurho.pointsampling import choose_uniform
from gpurho.trainingset import point_features

BINS = 50
"""Bins of a histogram."""

COMPONENTS = 3
"""Principal components of the features whose histograms are compared."""

NOISE_FACTOR = 2.0
"""A divergence up to so many times that between two halves of the larger cells' own data says nothing."""


def frozen_layers(network: NetworkSpec, freeze: float) -> int:
    """Hidden layers that a share `freeze` of them is, the first of the network; raises `SettingsError`."""
    if not 0 <= freeze <= 1:
        raise SettingsError(f"freeze {freeze!r} is not a share from 0 to 1; the paper takes 0.333")
    return round(freeze * network.n_hidden)


@dataclass(frozen=True)
class SizeRow:
    """How much larger cells differ from those of one size.

    Attributes
    ----------
    name : str
    atoms : float
        Atoms per snapshot, the mean.
    snapshots : int
    density_next, features_next : float, nats
        KL divergence of the next larger size from this one: of histograms of the density, and of the leading principal
        components of the features (the largest of them). NaN for the largest.
    density_largest, features_largest : float, nats
        The same of the largest size.
    density_noise, features_noise : float, nats
        Between two halves of the next larger size: what a divergence is when nothing differs.
    """

    name: str
    atoms: float
    snapshots: int
    density_next: float
    features_next: float
    density_largest: float
    features_largest: float
    density_noise: float
    features_noise: float

    @property
    def enough(self) -> bool:
        """Whether the next larger size adds nothing beyond noise."""
        return (
            self.density_next <= NOISE_FACTOR * self.density_noise
            and self.features_next <= NOISE_FACTOR * self.features_noise
        )


@dataclass(frozen=True)
class SizeGuide:
    """The table of `size_guide`, by size."""

    rows: list[SizeRow]

    @property
    def sufficient(self) -> float | None:
        """Atoms of the smallest cells beyond which no larger ones add anything; None when the largest still do."""
        answer = None
        for row in reversed(self.rows[:-1]):
            if not row.enough:
                break
            answer = row.atoms
        return answer

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; what is not defined is None."""
        rows = [{k: None if v != v else v for k, v in vars(r).items()} | {"enough": r.enough} for r in self.rows]
        return {"sufficient_atoms": self.sufficient, "sizes": rows}

    def __str__(self) -> str:
        lines = [
            "KL divergence of larger cells from these (nats), noise: between halves of the next larger",
            "   atoms  snapshots   density: next   noise  largest   features: next   noise  largest  data set",
        ]
        for r in self.rows:
            lines.append(
                f"{r.atoms:8.0f} {r.snapshots:10d} {_number(r.density_next):>15s} {_number(r.density_noise):>7s}"
                f" {_number(r.density_largest):>8s} {_number(r.features_next):>16s} {_number(r.features_noise):>7s}"
                f" {_number(r.features_largest):>8s}  {r.name}"
            )
        largest = self.rows[-1].atoms
        if self.sufficient is None:
            text = f"cells of {largest:.0f} atoms differ from smaller ones: they are worth training on, or larger ones"
        else:
            text = f"cells larger than {self.sufficient:.0f} atoms add nothing beyond noise"
        return "\n".join([*lines, text])


def size_guide(
    datasets: Sequence[Dataset],
    descriptor: DescriptorSpec,
    points: int = 20_000,
    distance_length: float = 1.5,
    seed: int = 0,
) -> SizeGuide:
    """Compare data sets of cells of several sizes, as Fig. 15 of the preprint does.

    Every data set gives the same number of points, spread evenly over its snapshots. Principal components are those
    of the largest cells. Histograms have 50 equal bins over the common range and a pseudo-count of a half per bin.

    Parameters
    ----------
    datasets : sequence of Dataset
        Two or more.
    descriptor : DescriptorSpec
    points : int
        From every data set.
    distance_length : float, angstrom
        Distances are compared as ``exp(-d / distance_length)``.
    seed : int

    Raises
    ------
    SettingsError
        For fewer than two data sets, or fewer than 200 points.
    UnknownSpeciesError
        For an atom that `descriptor` does not know.
    """
    if len(datasets) < 2 or points < 200:
        raise SettingsError(
            f"{len(datasets)} data sets and {points} points say nothing; give two data sets or more and 200 points"
        )
    atoms = [float(np.mean([len(s.structure.numbers) for s in data])) for data in datasets]
    order = sorted(range(len(datasets)), key=lambda i: atoms[i])
    drawn = [_draw(datasets[i], descriptor, points, distance_length, (seed, rank)) for rank, i in enumerate(order)]
    largest = drawn[-1].features
    mean, spread = largest.mean(0), largest.std(0)
    spread[spread < 1e-6 * max(1e-30, spread.max())] = np.inf
    z = (largest - mean) / spread
    _, vectors = np.linalg.eigh(z.T @ z)
    axes = vectors[:, ::-1][:, :COMPONENTS] / spread[:, None]
    projected = [(d.features - mean) @ axes for d in drawn]
    rows = []
    for k, i in enumerate(order):
        nan = float("nan")
        values = [nan] * 6
        if k + 1 < len(order):
            n, half = k + 1, drawn[k + 1].half
            values = [
                divergence(drawn[n].density, drawn[k].density),
                _largest(projected[n], projected[k]),
                divergence(drawn[-1].density, drawn[k].density),
                _largest(projected[-1], projected[k]),
                divergence(drawn[n].density[half], drawn[n].density[~half]),
                _largest(projected[n][half], projected[n][~half]),
            ]
        rows.append(SizeRow(datasets[i].path.name, atoms[i], len(datasets[i]), *values))
    return SizeGuide(rows)


def divergence(larger: NDArray[np.float64], smaller: NDArray[np.float64], bins: int = BINS) -> float:
    """KL divergence, nats, of the histogram of `larger` from that of `smaller`: sum of p ln(p / q)."""
    low = min(larger.min(), smaller.min())
    high = max(larger.max(), smaller.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    p, q = (np.histogram(values, edges)[0] + 0.5 for values in (larger, smaller))
    p, q = p / p.sum(), q / q.sum()
    return float((p * np.log(p / q)).sum())


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Points of a data set; `half` parts its snapshots, or the points where there is one."""

    features: NDArray[np.float64]
    density: NDArray[np.float64]
    half: NDArray[np.bool_]


def _draw(
    data: Dataset, descriptor: DescriptorSpec, points: int, distance_length: float, seed: tuple[int, int]
) -> _Drawn:
    import torch

    columns = ModelSpec(descriptor, dict.fromkeys(descriptor.species, 1.0)).distance_columns()
    features, density, half = [], [], []
    each = -(-points // len(data))
    for i, snapshot in enumerate(data):
        index = choose_uniform(snapshot.grid.n_points, each, (*seed, i)).index
        x, y = point_features(snapshot, descriptor, index)
        features.append(transform_features(torch.from_numpy(x), columns, distance_length).numpy().astype(np.float64))
        density.append(y)
        # Halves by snapshot, or of the points of the only one, which differ less than snapshots do.
        rng = np.random.default_rng([*seed, i, 1])
        half.append(np.full(len(y), i % 2 == 0) if len(data) > 1 else rng.permutation(len(y)) % 2 == 0)
    return _Drawn(np.concatenate(features), np.concatenate(density), np.concatenate(half))


def _largest(larger: NDArray[np.float64], smaller: NDArray[np.float64]) -> float:
    return max(divergence(larger[:, j], smaller[:, j]) for j in range(larger.shape[1]))


def _number(value: float) -> str:
    return "-" if value != value else f"{value:.4f}"


__all__ = ["SizeGuide", "SizeRow", "divergence", "frozen_layers", "size_guide"]
