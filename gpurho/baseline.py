"""The two-body superposition below the delta target, by linear least squares.

The density of a point is fitted with a constant and the two-body sums of its features, species by species:
``rho = c + sum_j b_j x_j``. The network then learns the difference. The constant ends in the mean of that difference.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError

RIDGE = 1e-7
"""Regularisation relative to a column's variance: small enough to cost nothing, and so large that the coefficients
stay of a size at which float32 sums of features times coefficients are exact to 1e-6 of the density."""


def two_body_columns(spec: DescriptorSpec) -> int:
    """Number of leading columns that are two-body sums; raises `SettingsError` for a family without them."""
    if spec.family != "smooth":
        raise SettingsError(f"descriptor family {spec.family!r} has no two-body sums; give family='smooth'")
    return len(spec.species) * spec.n_radial


def fit_baseline(
    parts: Iterable[tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]], spec: DescriptorSpec
) -> NDArray[np.float32]:
    """Coefficients of the two-body sums.

    Parameters
    ----------
    parts : iterable of (features (n, n_features), densities (n,) in e/angstrom^3, weights (n,))
        Read once, one at a time.
    spec : DescriptorSpec

    Returns
    -------
    (n_features,) float32
        Zero beyond the two-body columns.
    """
    k = two_body_columns(spec)
    total, sums, squares = 0.0, np.zeros(k + 1), np.zeros((k + 1, k + 1))
    for features, density, weights in parts:
        w = np.asarray(weights, np.float64)
        z = np.concatenate([features[:, :k].astype(np.float64), density[:, None]], axis=1)
        wz = z * w[:, None]
        total, sums, squares = total + w.sum(), sums + wz.sum(0), squares + z.T @ wz
    mean = sums / total
    covariance = squares / total - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(np.diag(covariance)[:k], 0.0))
    used = spread > 1e-6 * max(1e-30, spread.max(initial=0.0))
    scale = np.where(used, spread, 1.0)
    correlation = covariance[:k, :k] / np.outer(scale, scale)
    correlation[~used] = correlation[:, ~used] = 0.0
    right = np.where(used, covariance[:k, k] / scale, 0.0)
    found = np.zeros(spec.n_features, np.float32)
    found[:k] = np.linalg.solve(correlation + np.diag(np.where(used, RIDGE, 1.0)), right) / scale
    return found


__all__ = ["RIDGE", "fit_baseline", "two_body_columns"]
