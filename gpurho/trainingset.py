"""What a training run learns from: data sets with their snapshots by use, valence electrons, points and features."""

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
from gpurho.pointsampling import choose_uniform

SPARSE = 0.6
"""Below this share of a grid's points their features are computed one by one, above it tile by tile: measured."""

POINTS_PER_CALL = 32_768


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
    split = _split(dataset, test, validation, test_fraction, validation_fraction, 1)
    if not split.train or not split.validation:
        raise DatasetError(
            f"{len(dataset)} snapshots leave none to train or validate on; give more snapshots or name the split"
        )
    return split


def split_all(
    datasets: Sequence[Dataset],
    test: Sequence[Sequence[int]] | None = None,
    validation: Sequence[Sequence[int]] | None = None,
    test_fraction: float = 0.25,
    validation_fraction: float = 0.1,
) -> list[Split]:
    """Split several data sets, each by itself; `test` and `validation` name the snapshots of each in turn.

    A data set of so few snapshots that a share rounds to none gives all of them to training.

    Raises
    ------
    DatasetError
        As `split_snapshots`, over all data sets together; or for names that are not one list per data set.
    """
    if len(datasets) == 1:
        named = [None if n is None else _flat(n) for n in (test, validation)]
        return [split_snapshots(datasets[0], named[0], named[1], test_fraction, validation_fraction)]
    for name, lists in (("test", test), ("validation", validation)):
        if lists is not None and (len(lists) != len(datasets) or any(isinstance(part, int) for part in lists)):
            raise DatasetError(
                f"{name} {lists!r} is not one list of snapshots for each of the {len(datasets)} data sets;"
                " give for instance [[0, 4], []]"
            )
    splits = [
        _split(
            data,
            None if test is None else test[i],
            None if validation is None else validation[i],
            test_fraction,
            validation_fraction,
            0,
        )
        for i, data in enumerate(datasets)
    ]
    if not any(s.train for s in splits) or not any(s.validation for s in splits):
        raise DatasetError("no snapshots are left to train or to validate on; give more snapshots or name the split")
    return splits


def check_apart(datasets: Sequence[Dataset], splits: Sequence[Split]) -> None:
    """Raise `DatasetError` when one data set holds out a structure that another one trains on."""
    uses: dict[str, tuple[str, str]] = {}
    for data, split in zip(datasets, splits, strict=True):
        for use in ("train", "validation", "test"):
            for i in getattr(split, use):
                where = f"snapshot {i} of {data.path.name}"
                other, place = uses.setdefault(data[i].structure.fingerprint(), (use, where))
                if other != use:
                    raise DatasetError(
                        f"{where} ({use}) has the structure of {place} ({other}); name test and validation so that"
                        " each structure has one use"
                    )


def _flat(named: Sequence[Any]) -> list[int]:
    """The snapshots of a single data set, named as a list or as a list of one list."""
    return list(named[0]) if len(named) == 1 and not isinstance(named[0], int) else list(named)


def _split(
    dataset: Dataset,
    test: Sequence[int] | None,
    validation: Sequence[int] | None,
    test_fraction: float,
    validation_fraction: float,
    least: int,
) -> Split:
    """Snapshots by use, held-out ones at least `least` of each kind where they are not named."""
    n = len(dataset)
    order = sorted(range(n), key=lambda i: (float(dataset.meta(i).get("temperature_K", 0.0)), i))
    if test is None:
        count = max(least, round(test_fraction * n))
        edges = [round(k * n / count) for k in range(count + 1)] if count else []
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
        count = max(least, round(validation_fraction * n))
        validation = [rest[int((k + 0.5) * len(rest) / count)] for k in range(count)] if len(rest) > count else []
    held = [*test, *validation]
    if any(not 0 <= i < n for i in held) or len(set(held)) != len(held):
        raise DatasetError(
            f"test {list(test)} and validation {list(validation)} must be different snapshots from 0 to {n - 1}"
        )
    train = tuple(i for i in range(n) if i not in set(held))
    return Split(train, tuple(sorted(validation)), tuple(sorted(test)))


def valence_electrons(*datasets: Dataset) -> dict[str, float]:
    """Electrons per atom of each species, from the numbers of electrons of the snapshots."""
    from ase.data import chemical_symbols

    rows = [(np.bincount(s.structure.numbers, minlength=119), s.electrons) for data in datasets for s in data]
    counts = np.array([r[0] for r in rows], float)
    present = np.flatnonzero(counts.any(axis=0))
    solution, *_ = np.linalg.lstsq(counts[:, present], np.array([r[1] for r in rows]), rcond=None)
    whole = np.atleast_1d(np.round(solution))
    if np.abs(solution - whole).max() > 0.02 or whole.min() < 1:
        raise DatasetError(
            f"the numbers of electrons give {solution.round(3).tolist()} per atom; whole numbers are expected"
        )
    return {chemical_symbols[int(z)]: float(v) for z, v in zip(present, whole, strict=True)}


def point_features(
    snapshot: Snapshot, spec: DescriptorSpec, index: NDArray[np.int64], device: str = "cpu"
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features (n, F) and densities (n,), e/angstrom^3, of grid points by their flat indices, in the order given."""
    grid = snapshot.grid
    environment = Environment(snapshot.structure, spec, device)
    features = np.empty((len(index), spec.n_features), np.float32)
    if len(index) < SPARSE * grid.n_points:
        # In ascending order, so that the points of a call are neighbours.
        order = np.argsort(index)
        for start in range(0, len(order), POINTS_PER_CALL):
            places = order[start : start + POINTS_PER_CALL]
            steps = np.stack(np.unravel_index(index[places], grid.shape), -1)[:, :, None] * grid.steps
            points = grid.origin + steps[:, 0] + steps[:, 1] + steps[:, 2]
            features[places] = _on_host(environment.point_features(points).values)
    else:
        rank = np.full(grid.shape, -1, np.int64)
        rank.reshape(-1)[index] = np.arange(len(index))
        for tile in make_tiles(grid):
            places = rank[tile.slices].ravel()
            keep = places >= 0
            if keep.any():
                features[places[keep]] = _on_host(environment.tile_features(grid, tile).values)[keep]
    return features, np.asarray(snapshot.density, np.float64).reshape(-1)[index]


def _on_host(values: Any) -> NDArray[np.float32]:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def sample_points(
    snapshot: Snapshot, spec: DescriptorSpec, n_points: int, seed: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Features (n, F) and densities (n,) of grid points drawn without repetition; all points when there are fewer."""
    return point_features(snapshot, spec, choose_uniform(snapshot.grid.n_points, n_points, seed).index)
