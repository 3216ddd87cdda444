"""What a training run learns from: snapshots by use, valence electrons, and points with their features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Dataset, Snapshot
from gpurho.descriptors import DescriptorSpec, Environment
from gpurho.errors import DatasetError
from gpurho.partition import make_tiles


@dataclass(frozen=True)
class Split:
    """Snapshots by use, as indices into the data set. Points of one snapshot are never in two of the three."""

    train: tuple[int, ...]
    validation: tuple[int, ...]
    test: tuple[int, ...]


def split_snapshots(
    dataset: Dataset,
    test: Sequence[int] | None = None,
    validation: Sequence[int] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.1,
) -> Split:
    """Split by snapshot: those named, or a share of them spread evenly over the temperatures.

    Raises
    ------
    DatasetError
        When nothing would be left to train on, or an index is out of range or used twice.
    """
    n = len(dataset)
    order = sorted(range(n), key=lambda i: (float(dataset.meta(i).get("temperature_K", 0.0)), i))
    if test is None:
        count = max(1, round(test_fraction * n))
        edges = [round(k * n / count) for k in range(count + 1)]
        used: dict[Any, int] = {}
        test = []
        for low, high in pairwise(edges):
            # One of each stretch of temperatures, near its middle, from the trajectory taken least so far.
            middle = (low + high - 1) / 2
            options = [
                (used.get(dataset.meta(order[k]).get("trajectory"), 0), abs(k - middle), k) for k in range(low, high)
            ]
            pick = order[min(options)[2]]
            used[dataset.meta(pick).get("trajectory")] = used.get(dataset.meta(pick).get("trajectory"), 0) + 1
            test.append(pick)
    taken = set(test)
    if validation is None:
        rest = [i for i in order if i not in taken]
        count = max(1, round(validation_fraction * n))
        validation = [rest[int((k + 0.5) * len(rest) / count)] for k in range(count)] if len(rest) > count else []
    held = [*test, *validation]
    if any(not 0 <= i < n for i in held) or len(set(held)) != len(held):
        raise DatasetError(
            f"test {list(test)} and validation {list(validation)} must be different snapshots from 0 to {n - 1}"
        )
    train = tuple(i for i in range(n) if i not in set(held))
    if not train or not validation:
        raise DatasetError(f"{n} snapshots leave none to train or validate on; give more snapshots or name the split")
    return Split(train, tuple(sorted(validation)), tuple(sorted(test)))


def valence_electrons(dataset: Dataset) -> dict[str, float]:
    """Electrons per atom of each species, from the numbers of electrons of the snapshots."""
    from ase.data import chemical_symbols

    rows = [(np.bincount(s.structure.numbers, minlength=119), s.electrons) for s in dataset]
    counts = np.array([r[0] for r in rows], float)
    present = np.flatnonzero(counts.any(axis=0))
    solution, *_ = np.linalg.lstsq(counts[:, present], np.array([r[1] for r in rows]), rcond=None)
    whole = np.atleast_1d(np.round(solution))
    if np.abs(solution - whole).max() > 0.02 or whole.min() < 1:
        raise DatasetError(
            f"the numbers of electrons give {solution.round(3).tolist()} per atom; whole numbers are expected"
        )
    return {chemical_symbols[int(z)]: float(v) for z, v in zip(present, whole, strict=True)}


def sample_points(
    snapshot: Snapshot, spec: DescriptorSpec, n_points: int, seed: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features (n, F) and densities (n,) of grid points drawn without repetition; all points when there are fewer."""
    grid = snapshot.grid
    chosen = np.zeros(grid.shape, bool)
    picks = np.random.default_rng(list(seed)).choice(grid.n_points, min(n_points, grid.n_points), replace=False)
    chosen.reshape(-1)[picks] = True
    environment = Environment(snapshot.structure, spec)
    features, density = [], []
    for tile in make_tiles(grid):
        keep = chosen[tile.slices].ravel()
        if keep.any():
            features.append(environment.tile_features(grid, tile).values[keep])
            density.append(np.asarray(snapshot.density[tile.slices], np.float64).ravel()[keep])
    return np.concatenate(features), np.concatenate(density)
