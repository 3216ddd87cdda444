"""The points of a training run with their features, and the scaling between them and the network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.baseline import fit_baseline, two_body_columns
from gpurho.datasets import Dataset, Snapshot
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError
from gpurho.layers import transform_features
from gpurho.model import DensityModel
from gpurho.modelspec import ModelSpec
from gpurho.pointsampling import Choice, Coverage, choose_by_importance, choose_uniform, cover, pooled_sample
from gpurho.pointstore import PointStore, store_key
from gpurho.trainingset import Split, point_features
from gpurho.trainsettings import TrainingSettings
from gpurho.uncertainty import CalibrationFactors

CHUNK = 8192
"""Rows that are scaled at a time."""

MIN_STD = 1e-5
"""A column of features without spread (far distances that are all capped) must not be blown up."""


@dataclass(frozen=True)
class Part:
    """A data set with its snapshots by use."""

    dataset: Dataset
    split: Split
    fingerprint: str

    def draws(self, use: str, n_points: int) -> int:
        """Points of the snapshots of a use when at most `n_points` are drawn from each."""
        return sum(min(n_points, self.dataset.n_points(i)) for i in getattr(self.split, use))

    @property
    def n_grid(self) -> int:
        """Grid points of the training snapshots."""
        return sum(self.dataset.n_points(i) for i in self.split.train)


def gather_points(
    parts: Sequence[Part],
    use: str,
    descriptor: DescriptorSpec,
    settings: TrainingSettings,
    path: Path | None = None,
    device: str = "cpu",
) -> PointStore:
    """Draw points of the snapshots of a use, "train" or "validation", and compute their features.

    Snapshot by snapshot, each with draws of its own from (seed, data set, snapshot). Points to validate on are drawn
    uniformly and all kept, so that every run is measured alike. A scratch file at `path` that holds just these points
    is taken as it is.
    """
    train = use == "train"
    names = ("points_per_snapshot", "seed") + (
        ("sampling", "importance_share", "importance_power", "keep_fraction", "distance_length") if train else ()
    )
    chosen = {n: getattr(settings, n) for n in names}
    where = [(p.fingerprint, list(getattr(p.split, use))) for p in parts]
    key = store_key(version=1, use=use, descriptor=descriptor.to_dict(), settings=chosen, snapshots=where)
    if path is not None:
        found = PointStore.reopen(descriptor.n_features, path, key)
        if found is not None:
            return found
    most = settings.points_per_snapshot
    store = PointStore(descriptor.n_features, sum(p.draws(use, most) for p in parts), path)
    for d, part in enumerate(parts):
        for i in getattr(part.split, use):
            snapshot, seed = part.dataset[i], (settings.seed, d, i)
            choice = _choose(snapshot, settings, seed, train)
            order = np.random.default_rng([*seed, 1]).permutation(len(choice.index))
            features, density = point_features(snapshot, descriptor, choice.index[order], device)
            store.append(features, density, choice.weights[order])
    store.finish()
    if train and settings.keep_fraction < 1.0:
        _prune(store, descriptor, settings)
    store.seal(key)
    return store


def _choose(snapshot: Snapshot, settings: TrainingSettings, seed: Sequence[int], train: bool) -> Choice:
    n = settings.points_per_snapshot
    if train and settings.sampling == "importance":
        return choose_by_importance(snapshot, n, seed, settings.importance_share, settings.importance_power)
    return choose_uniform(snapshot.grid.n_points, n, seed)


def _prune(store: PointStore, descriptor: DescriptorSpec, settings: TrainingSettings) -> None:
    columns = ModelSpec(descriptor, dict.fromkeys(descriptor.species, 1.0)).distance_columns()

    def inputs(rows: NDArray[np.float32]) -> NDArray[np.float32]:
        return transform_features(torch.from_numpy(rows), columns, settings.distance_length).numpy()

    coverage = Coverage(pooled_sample(inputs(features) for features, _, _ in store.blocks()))
    components = np.concatenate([coverage.components(inputs(rows)) for _, rows in store.chunks(CHUNK)])
    store.compact(*cover(components, store.weights, settings.keep_fraction, (settings.seed, 2)))


@dataclass(frozen=True)
class Scaling:
    """From raw features and densities to the network's inputs and targets.

    Attributes
    ----------
    spec : ModelSpec
        With `density_mean` and `density_std`.
    tensors : dict of Tensor
        feature_mean, feature_std, feature_low, feature_high and, for the target "delta", baseline; (n_features,).
    """

    spec: ModelSpec
    tensors: dict[str, Tensor]

    @classmethod
    def fit(cls, spec: ModelSpec, store: PointStore) -> Scaling:
        """From the training points: weighted moments in float64, extremes, and the two-body superposition."""
        n = spec.descriptor.n_features
        baseline = fit_baseline(store.blocks(), spec.descriptor) if spec.target == "delta" else None
        total, sums, squares = 0.0, np.zeros(n + 1), np.zeros(n + 1)
        origin = np.zeros(n + 1)
        low, high = np.full(n, np.inf), np.full(n, -np.inf)
        for start, rows in store.chunks(CHUNK):
            stop = start + len(rows)
            x = transform_features(torch.from_numpy(rows), spec.distance_columns(), spec.distance_length)
            low, high = np.minimum(low, x.amin(0).numpy()), np.maximum(high, x.amax(0).numpy())
            y = store.density[start:stop] - _superposition(rows, baseline, spec)
            z = np.concatenate([x.numpy().astype(np.float64), y[:, None]], axis=1)
            if start == 0:
                # Moments about a point near the mean, so that nothing cancels.
                origin = z.mean(0)
            z -= origin
            w = store.weights[start:stop].astype(np.float64)
            total, sums, squares = total + w.sum(), sums + w @ z, squares + w @ z**2
        mean = sums / total
        std = np.sqrt(np.maximum(squares / total - mean**2, 0.0))
        mean += origin
        tensors = {
            "feature_mean": _tensor(mean[:n]),
            "feature_std": _tensor(np.maximum(std[:n], MIN_STD)),
            "feature_low": _tensor(low),
            "feature_high": _tensor(high),
        }
        if baseline is not None:
            tensors["baseline"] = _tensor(baseline)
        if not std[n] > 0:
            raise SettingsError("the densities of the training points are all the same; nothing can be learnt")
        return cls(replace(spec, density_mean=float(mean[n]), density_std=float(std[n])), tensors)

    @classmethod
    def of_model(cls, model: DensityModel, store: PointStore) -> Scaling:
        """Those of a model, with bounds of its domain that take in the points of `store` too.

        What the specification says of its error bars and of what it reached is left out.
        """
        plain = CalibrationFactors()
        spec = replace(
            model.spec,
            calibration_factors=plain,
            last_layer_calibration=plain,
            last_layer={},
            trust=None,
            metrics={},
            calibration={},
        )
        tensors = {k: v.clone() for k, v in model.tensors.items() if k.startswith("feature_") or k == "baseline"}
        for _, rows in store.chunks(CHUNK):
            x = transform_features(torch.from_numpy(rows), spec.distance_columns(), spec.distance_length)
            tensors["feature_low"] = torch.minimum(tensors["feature_low"], x.amin(0))
            tensors["feature_high"] = torch.maximum(tensors["feature_high"], x.amax(0))
        return cls(spec, tensors)

    def inputs(self, rows: NDArray[np.float32]) -> Tensor:
        """Standardised features (n, F)."""
        x = transform_features(torch.from_numpy(rows), self.spec.distance_columns(), self.spec.distance_length)
        return (x - self.tensors["feature_mean"]) / self.tensors["feature_std"]

    def standardise(self, rows: NDArray[np.float32]) -> Tensor:
        """As `inputs`, in the memory of `rows`, whose values are lost."""
        for a in range(0, len(rows), CHUNK):
            rows[a : a + CHUNK] = self.inputs(rows[a : a + CHUNK]).numpy()
        return torch.from_numpy(rows)

    def targets(self, store: PointStore) -> Tensor:
        """Standardised targets of all points, (n,) float32."""
        baseline = self.tensors["baseline"].numpy() if "baseline" in self.tensors else None
        found = np.empty(len(store), np.float32)
        for start, rows in store.chunks(CHUNK):
            stop = start + len(rows)
            y = store.density[start:stop] - _superposition(rows, baseline, self.spec)
            found[start:stop] = (y - self.spec.density_mean) / self.spec.density_std
        return torch.from_numpy(found)


def _superposition(rows: NDArray[np.float32], baseline: NDArray[np.float32] | None, spec: ModelSpec) -> Any:
    if baseline is None:
        return 0.0
    k = two_body_columns(spec.descriptor)
    return rows[:, :k].astype(np.float64) @ baseline[:k].astype(np.float64)


def _tensor(values: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.asarray(values, np.float32))


__all__ = ["Part", "Scaling", "gather_points"]
