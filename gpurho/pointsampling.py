"""Which grid points a training run learns from: uniform or by importance, and without those that others cover."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Snapshot
from gpurho.grid import Grid
from gpurho.structure import Structure

BINS = 64
"""Bins of density and of distance whose frequencies decide what is rare."""

COMPONENTS = 6
"""Leading principal components of the features that decide which points cover each other."""

FIT_POINTS = 1000
"""Points of a snapshot from which the principal components are found."""


@dataclass(frozen=True, eq=False)
class Choice:
    """Grid points chosen: flat indices in ascending order, and their weights (mean about 1)."""

    index: NDArray[np.int64]
    weights: NDArray[np.float32]


def choose_uniform(n_grid: int, n_points: int, seed: Sequence[int]) -> Choice:
    """Points without repetition, each as probable as any other; all of them when there are fewer."""
    picks = np.random.default_rng(list(seed)).choice(n_grid, min(n_points, n_grid), replace=False)
    return Choice(np.sort(picks), np.ones(len(picks), np.float32))


def choose_by_importance(
    snapshot: Snapshot, n_points: int, seed: Sequence[int], share: float = 0.5, power: float = 1.0
) -> Choice:
    """Points without repetition, more of them in rare regions of density and near nuclei.

    Point i is taken with probability ``p_i = min(1, c q_i)``, where q is (1 - share) parts uniform, share / 2 inverse
    to the frequency of its density and share / 2 inverse to the frequency of its distance to the nearest nucleus;
    c makes them add up to `n_points`. With weights ``1 / p_i`` a sum over the points taken is an unbiased estimate
    of the sum over the grid (Horvitz and Thompson).

    Parameters
    ----------
    snapshot : Snapshot
    n_points : int
    seed : sequence of int
    share : float, 0 to 1
    power : float, 0 to 1
        Weights are ``(1 / p_i)^power`` in units of their mean.
    """
    grid = snapshot.grid
    n = grid.n_points
    if n_points >= n:
        return choose_uniform(n, n, seed)
    rarity = 0.5 * (
        _inverse_frequency(np.asarray(snapshot.density, np.float64).ravel())
        + _inverse_frequency(nucleus_distances(snapshot.structure, grid))
    )
    chance = inclusion((1.0 - share) / n + share * rarity, n_points)
    rng = np.random.default_rng(list(seed))
    # Systematic sampling of a shuffled list has exactly these probabilities, and always n_points points.
    order = rng.permutation(n)
    edges = np.cumsum(chance[order])
    hits = np.searchsorted(edges, (np.arange(n_points) + rng.random()) * (edges[-1] / n_points), side="right")
    index = np.sort(order[np.minimum(hits, n - 1)])
    weights = (n_points / n / chance[index]) ** power
    if power < 1.0:
        # The mean over all draws stays 1, so that the divergence keeps its part in the loss.
        weights *= n_points / (chance * (n_points / n / chance) ** power).sum()
    return Choice(index, weights.astype(np.float32))


def inclusion(scores: NDArray[np.float64], n_points: int) -> NDArray[np.float64]:
    """Probabilities ``min(1, c * score)`` that add up to `n_points`."""
    certain = np.zeros(len(scores), bool)
    while True:
        left = n_points - int(certain.sum())
        c = left / scores[~certain].sum()
        more = ~certain & (c * scores >= 1.0)
        if not more.any():
            return np.where(certain, 1.0, c * scores)
        certain |= more


def nucleus_distances(structure: Structure, grid: Grid) -> NDArray[np.float64]:
    """Distance of every grid point to the nearest nucleus, periodic images included; (n_points,) angstrom, C order."""
    from scipy.spatial import cKDTree

    from gpurho.kernels.celllist import atoms_around, bin_atoms

    bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
    points = grid.points()
    # What lies within the reach is there with all its images; so a nearest one within the reach is the nearest.
    reach = 4.0
    while True:
        near, _ = atoms_around(bins, points, reach)
        if len(near):
            distances, _ = cKDTree(near).query(points)
            if distances.max() <= reach:
                return distances
        reach *= 2.0


class Coverage:
    """Keeps one point of every small box in the space of the leading principal components of the features.

    Parameters
    ----------
    features : (n, n_features) array
        A sample of the points, as the network gets them, from which the components are found.
    """

    def __init__(self, features: NDArray[np.float32]) -> None:
        x = features.astype(np.float64)
        self.mean, spread = x.mean(0), x.std(0)
        # A column without spread must not be blown up.
        spread[spread < 1e-9 * max(1.0, float(np.abs(x).max()))] = np.inf
        z = (x - self.mean) / spread
        _, vectors = np.linalg.eigh(z.T @ z)
        k = min(COMPONENTS, z.shape[1])
        self.projection = vectors[:, ::-1][:, :k] / spread[:, None]

    def components(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """(n, k) leading principal components of the standardised features."""
        return ((features.astype(np.float64) - self.mean) @ self.projection).astype(np.float32)


def cover(
    components: NDArray[np.float32], weights: NDArray[np.float32], fraction: float, seed: Sequence[int]
) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Which points to keep so that a share `fraction` is left, and their new weights.

    One point, chosen at random, stands for all of its box and takes over their weight, so that sums over the points
    stay what they were. The edge of the boxes is found by bisection: as large as leaves that share.
    """
    n = len(components)
    wanted = max(1, round(fraction * n))
    order = np.random.default_rng(list(seed)).permutation(n)
    span = float(np.ptp(components, axis=0).max(initial=0.0)) or 1.0
    low, high = np.log(span * 1e-6), np.log(span * 2.0)
    best: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    for _ in range(24):
        middle = 0.5 * (low + high)
        first, boxes = _boxes(components[order], float(np.exp(middle)))
        if len(first) > wanted:
            low = middle
        else:
            high, best = middle, (first, boxes)
            if len(first) > 0.98 * wanted:
                break
    if best is None:
        best = _boxes(components[order], span * 2.0)
    first, boxes = best
    mass = np.bincount(boxes, weights=weights[order], minlength=len(first))
    keep, merged = np.zeros(n, bool), np.zeros(n, np.float32)
    keep[order[first]] = True
    merged[order[first]] = mass
    return keep, merged


def _boxes(components: NDArray[np.float32], edge: float) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First point of every box, and the box of every point."""
    cells = np.floor(components / edge).astype(np.int64)
    keys = np.zeros(len(cells), np.uint64)
    for column in cells.T.astype(np.uint64):
        # A hash of the box; two boxes of one hash merely share their point.
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    _, first, boxes = np.unique(keys, return_index=True, return_inverse=True)
    return first, boxes.ravel()


def _inverse_frequency(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """1 / (points in the bin of a value), over equal bins of the range; adds up to 1."""
    low, high = float(values.min()), float(values.max())
    bins = np.minimum(((values - low) * (BINS / max(high - low, 1e-300))).astype(np.int64), BINS - 1)
    counts = np.bincount(bins, minlength=BINS)
    return 1.0 / counts[bins] / np.count_nonzero(counts)


def pooled_sample(blocks: Iterable[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Up to `FIT_POINTS` rows, evenly spaced, of every block."""
    return np.concatenate([b[:: max(1, -(-len(b) // FIT_POINTS))] for b in blocks])


__all__ = ["Choice", "Coverage", "choose_by_importance", "choose_uniform", "cover", "inclusion", "nucleus_distances"]
