"""How atoms stand among their neighbours: nearest distance, coordination, mean bond; in batches, for any number."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpurho.kernels.celllist import AtomBins, atoms_around, bin_atoms
from gpurho.structure import Structure
from gpurho.trees import nearest

Floats = NDArray[np.float64]

BATCH = 8192
"""Atoms that are looked at together."""

MOST = 20
"""Neighbours that are counted; more in the shell count as this many."""

PEAK = 0.3
"""Height of the first peak of the pair distances, at least, in that of the highest."""

PAIRS_TO = 6.5
"""Pair distances are looked at up to here for the first shell, angstrom."""


@dataclass(frozen=True)
class Surroundings:
    """The first shell of some atoms.

    Attributes
    ----------
    nearest : (n,) float, angstrom
        Distance of the nearest atom; infinite where the shell is empty.
    coordination : (n,) int
        Atoms in the shell, up to `MOST`.
    bond : (n,) float, angstrom
        Mean distance of those atoms; 0 where there is none.
    """

    nearest: NDArray[np.floating]
    coordination: NDArray[np.signedinteger]
    bond: NDArray[np.floating]

    @classmethod
    def joined(cls, parts: Sequence[Surroundings]) -> Surroundings:
        """Those of several sets of atoms, one after another."""
        names = ("nearest", "coordination", "bond")
        return cls(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))


class AtomBatches:
    """The atoms of a structure in batches that lie together, so that each meets few others.

    Parameters
    ----------
    structure : Structure
    wanted : (n_atoms,) bool array, optional
        Atoms to go through; all by default.
    """

    def __init__(self, structure: Structure, wanted: NDArray[np.bool_] | None = None) -> None:
        self.bins: AtomBins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        chosen = slice(None) if wanted is None else wanted[self.bins.owners]
        self.order = self.bins.owners[chosen].astype(np.int64)
        self._fractional = self.bins.fractional[chosen]

    def __iter__(self) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """Indices of the atoms of a batch, (n,), and their places in the cell, (n, 3) angstrom."""
        for at in range(0, len(self.order), BATCH):
            rows = slice(at, at + BATCH)
            yield self.order[rows], np.ascontiguousarray(self._fractional[rows] @ self.bins.cell)

    def surroundings(self, points: Floats, shell: float) -> Surroundings:
        """Of the atoms at `points`, within `shell` angstrom."""
        distances = self._distances(points, shell, MOST)
        near = np.isfinite(distances)
        count = near.sum(axis=1)
        total = np.where(near, distances, 0.0).sum(axis=1)
        return Surroundings(distances[:, 0], count, total / np.maximum(count, 1))

    def _distances(self, points: Floats, reach: float, most: int) -> Floats:
        """Of the nearest other atoms, (n, most), ascending; infinite beyond `reach`."""
        from scipy.spatial import cKDTree

        images, _ = atoms_around(self.bins, points, reach)
        distances, _ = nearest(cKDTree(images), points, most + 1, distance_upper_bound=reach)
        # The first one is the atom itself.
        return np.asarray(distances[:, 1:])

    def pairs(self) -> Floats:
        """Distances of atoms up to `PAIRS_TO` angstrom, as seen from one batch."""
        _, points = next(iter(self))
        distances = self._distances(points, PAIRS_TO, 80)
        return distances[np.isfinite(distances)]


def first_shell(structures: Sequence[Structure]) -> float:
    """Radius of the first shell of neighbours, angstrom: where pairs are fewest between the first two peaks.

    Of the pair distances of all structures together; where they have no second peak, 1.25 times the first.
    """
    edges = np.linspace(0.5, PAIRS_TO, 241)
    middle = 0.5 * (edges[1:] + edges[:-1])
    counts = sum(np.histogram(AtomBatches(s).pairs(), edges)[0] for s in structures) / middle**2
    # Gaussian of 0.1 angstrom.
    offsets = np.arange(-12, 13) * (edges[1] - edges[0])
    weights = np.exp(-0.5 * (offsets / 0.1) ** 2)
    smooth = np.convolve(counts, weights / weights.sum(), mode="same")
    high = int(np.argmax(smooth >= PEAK * smooth.max()))
    peak = high + int(np.argmax(np.diff(smooth[high:], append=-1.0) < 0))
    beyond = np.flatnonzero((middle > middle[peak]) & (middle < min(1.6 * middle[peak], PAIRS_TO - 0.4)))
    if not len(beyond):
        return float(1.25 * middle[peak])
    # The gap of a cold crystal is wide: its middle.
    few = smooth[beyond] <= smooth[beyond].min() + 0.02 * smooth[peak]
    first = int(np.argmax(few))
    length = int(np.argmin(few[first:])) or len(few) - first
    return float(0.5 * (middle[beyond[first]] + middle[beyond[first + length - 1]]))
