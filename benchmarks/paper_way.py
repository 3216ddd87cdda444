"""The paper's way to a density, written down plainly: k-d trees, NumPy cosines and an eager float32 network.

Preprint, Algorithm 1 and section V.F. `features` takes many points at a time, which is kinder to the paper than its
Algorithm 1, whose outer loop over the points is in `features_point_by_point`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from descriptors import F64, Surroundings, cosines, surroundings
from numpy.typing import NDArray

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.descriptors import DescriptorSpec
    from gpurho.model import DensityModel

POINTS, BATCH = 4_000, 1_024
"""Points that the descriptors and the network take at a time: measured to be the fastest here."""


class PaperDescriptors:
    """The scalar-product family of atoms in a cube: set I, set II of every species, and their cross cosines.

    `cutoff` has to lie beyond the last atom that counts, which makes the definition that of the paper.
    """

    def __init__(self, atoms: Atoms, spec: DescriptorSpec) -> None:
        from scipy.spatial import cKDTree

        self.spec = spec
        edge = float(atoms.cell.lengths()[0])
        positions = atoms.get_positions() % edge
        symbols = np.array(atoms.get_chemical_symbols())
        k = spec.n_angle_neighbors
        self.species = [surroundings(positions[symbols == s], edge, spec.cutoff, k) for s in spec.species]
        self.trees = [cKDTree(around.images) for around in self.species]

    def features(self, points: F64) -> NDArray[np.float32]:
        """(n, n_features) of points (n, 3)."""
        out = np.empty((len(points), self.spec.n_features), np.float32)
        for begin in range(0, len(points), POINTS):
            part = slice(begin, begin + POINTS)
            out[part] = self._together(points[part])
        return out

    def features_point_by_point(self, points: F64) -> NDArray[np.float32]:
        """The same, one point after the other with the inner loops vectorised, as Algorithm 1 says."""
        return np.concatenate([self._together(point[None]) for point in points]).astype(np.float32)

    def _together(self, points: F64) -> F64:
        spec = self.spec
        columns, nearest = [], []
        for tree, around in zip(self.trees, self.species, strict=True):
            distances, index = tree.query(points, k=spec.n_distances)
            columns += [distances, cosines(around, points, index[:, : spec.n_angle_atoms])]
            nearest.append(_directions(around, points, index[:, : spec.n_cross]))
        for i, first in enumerate(nearest):
            columns += [(first @ second.swapaxes(1, 2)).reshape(len(points), -1) for second in nearest[i + 1 :]]
        return np.concatenate(columns, axis=1)


def _directions(around: Surroundings, points: F64, index: NDArray[Any]) -> F64:
    vectors = around.images[index] - points[:, None]
    return vectors / np.sqrt((vectors * vectors).sum(-1, keepdims=True))


class PaperNetwork:
    """Dense blocks of linear layers, GELU and weighted skips in eager float32, at the means of a model's weights."""

    def __init__(self, model: DensityModel) -> None:
        self.spec, self.tensors = model.spec, model.tensors

    def density(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        """Densities (n,) in e/angstrom^3 of raw features (n, n_features)."""
        with torch.inference_mode():
            parts = [self._batch(part) for part in torch.from_numpy(features).split(BATCH)]
            return torch.cat(parts).numpy()

    def _batch(self, features: torch.Tensor) -> torch.Tensor:
        spec, t = self.spec, self.tensors
        x = features.clone()
        ranges = spec.distance_columns()
        for start, stop in zip(ranges[::2], ranges[1::2], strict=True):
            x[:, start:stop] = torch.exp(-x[:, start:stop] / spec.distance_length)
        h = (x - t["feature_mean"]) / t["feature_std"]
        n = spec.network.n_hidden
        for i in range(n):
            a = F.gelu(F.linear(h, t[f"layers.{i}.weight_mean"], t[f"layers.{i}.bias_mean"]))
            block, layer = divmod(i, spec.network.layers)
            h = a + t["skip"][block, layer - 1] * h if layer else a
        out = F.linear(h, t[f"layers.{n}.weight_mean"], t[f"layers.{n}.bias_mean"])
        return out[:, 0] * spec.density_std + spec.density_mean
