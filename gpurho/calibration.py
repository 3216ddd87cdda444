"""Calibration of error bars after training, on snapshots that were held out.

A factor on sigma is chosen so that the shares of errors within 1, 2 and 3 sigma come as near as they can to those of
a Gaussian, each in units of what it may be off: errors have heavier tails than a Gaussian, so that a fit to the rms
error (the Gaussian likelihood) would make sigma too wide at the centre, and one to the centre too narrow in the tails.
The factor may follow the predicted density, piecewise linearly, where that helps snapshots it was not fitted to.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import ModelError, SettingsError
from gpurho.uncertainty import FACTOR_LIMITS, CalibrationFactors

if TYPE_CHECKING:
    from torch import Tensor

    from gpurho.model import DensityModel

TARGETS = (0.682689492, 0.954499736, 0.997300204)
"""Shares of a Gaussian within 1, 2, 3 sigma."""

TOLERANCES = (0.03, 0.02, 0.01)
"""How far from them the shares may be."""

KNOTS = 8
MIN_POINTS = 500
"""Fewest points between two borders of the bins that knots stand for."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class ReliabilityBin:
    """Points of a range of predicted densities: e/angstrom^3, and the shares of errors within 1, 2, 3 sigma."""

    low: float
    high: float
    n_points: int
    rmse: float
    sigma: float
    coverage: tuple[float, float, float]


def reliability(mean: ArrayLike, error: ArrayLike, sigma: ArrayLike, bins: int = 8) -> list[ReliabilityBin]:
    """Error, sigma (root mean squares) and coverage in `bins` ranges of the predicted density with equal numbers."""
    m, e, s = (np.asarray(v, np.float64).ravel() for v in (mean, error, sigma))
    if not m.size == e.size == s.size or m.size < bins:
        raise SettingsError(f"{m.size} densities, {e.size} errors and {s.size} sigmas; give {bins} or more of each")
    order = np.argsort(m, kind="stable")
    found = []
    for rows in np.array_split(order, bins):
        z = np.abs(e[rows]) / np.maximum(s[rows], 1e-30)
        within = (float(np.mean(z <= 1)), float(np.mean(z <= 2)), float(np.mean(z <= 3)))
        rms, spread = (float(np.sqrt(np.mean(v[rows] ** 2))) for v in (e, s))
        found.append(ReliabilityBin(float(m[rows[0]]), float(m[rows[-1]]), len(rows), rms, spread, within))
    return found


def coverage_loss(scores: Array) -> float:
    """How far the shares of ``|error| / sigma`` within 1, 2, 3 are from a Gaussian's: sum of squares in tolerances."""
    within = [float(np.mean(scores <= k)) for k in (1, 2, 3)]
    return sum(((c - t) / tol) ** 2 for c, t, tol in zip(within, TARGETS, TOLERANCES, strict=True))


def best_factor(scores: ArrayLike) -> float:
    """The factor on sigma with the smallest `coverage_loss` for scores ``|error| / sigma``, within `FACTOR_LIMITS`."""
    z = np.sort(np.asarray(scores, np.float64).ravel())
    if z.size == 0 or not np.isfinite(z).all():
        raise SettingsError("calibration needs points with a positive variance")
    grid = np.geomspace(*FACTOR_LIMITS, 1401)
    loss = np.zeros(len(grid))
    for k, (target, tolerance) in enumerate(zip(TARGETS, TOLERANCES, strict=True), 1):
        loss += ((np.searchsorted(z, k * grid, side="right") / z.size - target) / tolerance) ** 2
    # Shares are steps: of the factors that do equally well, the one nearest to the rms score.
    equal = grid[loss <= loss.min() + 1e-9]
    rms = max(float(np.sqrt(np.mean(z**2))), FACTOR_LIMITS[0])
    return float(equal[np.argmin(np.abs(np.log(equal / rms)))])


def fit_calibration_curve(
    mean: ArrayLike,
    error: ArrayLike,
    aleatoric: ArrayLike,
    epistemic: ArrayLike,
    groups: ArrayLike | None = None,
    knots: int = KNOTS,
) -> CalibrationFactors:
    """One factor on both deviations, and a curve by predicted density where that helps.

    Parameters
    ----------
    mean, error, aleatoric, epistemic : (n,) arrays, e/angstrom^3
        Prediction, its error, and the deviations before calibration, at points of snapshots held out.
    groups : (n,) array of int, optional
        Snapshot of each point. The curve is kept only when, fitted without one snapshot at a time, it leaves that
        one better covered than the one factor does; without groups, or with one, there is no curve.
    knots : int
        Knots of the curve, at the mean densities of as many bins of equal numbers.

    Raises
    ------
    SettingsError
        For points without a positive variance.
    """
    m, e = np.asarray(mean, np.float64), np.asarray(error, np.float64)
    sigma = np.hypot(np.asarray(aleatoric, np.float64), np.asarray(epistemic, np.float64))
    if sigma.size == 0 or not np.all(sigma > 0):
        raise SettingsError("calibration needs points with a positive variance")
    z = np.abs(e) / sigma
    factor = best_factor(z)
    single = CalibrationFactors(factor, factor)
    knots = min(knots, len(z) // MIN_POINTS)
    numbers = np.zeros(len(z), int) if groups is None else np.asarray(groups)
    different = np.unique(numbers)
    if len(different) < 2 or knots < 2:
        return single
    gain = 0.0
    for one in different:
        out = numbers == one
        factor, curve = best_factor(z[~out]), _curve(m[~out], z[~out], knots)
        gain += coverage_loss(z[out] / factor) - coverage_loss(z[out] / np.interp(m[out], *curve))
    if gain <= 0:
        return single
    positions, values = _curve(m, z, knots)
    return CalibrationFactors(1.0, 1.0, tuple(positions.tolist()), tuple(values.tolist()))


def _curve(mean: Array, scores: Array, knots: int) -> tuple[Array, Array]:
    """Mean densities of bins of equal numbers, and their factors; knots that coincide are one."""
    parts = np.array_split(np.argsort(mean, kind="stable"), knots)
    positions = np.array([mean[rows].mean() for rows in parts])
    values = np.array([best_factor(scores[rows]) for rows in parts])
    apart = np.r_[True, np.diff(positions) > 1e-6 * max(1.0, float(np.ptp(positions)))]
    return positions[apart], values[apart]


def fit_correlation_volume(error: ArrayLike, epistemic: ArrayLike, noise: ArrayLike) -> float:
    """The volume, angstrom^3, within which aleatoric errors go together, from integrals over regions.

    Its square root scales the part of the integrals' errors that the weights do not account for:
    ``mean(error^2) = mean(epistemic^2) + volume * mean(noise)``.

    Parameters
    ----------
    error, epistemic : (n,) arrays, electrons
        Errors of the integrals over n regions, of the size of an atom, and their epistemic sigmas.
    noise : (n,) array
        Integral of the squared aleatoric sigma over each region, electrons^2 / angstrom^3.
    """
    e, s, a = (np.asarray(v, np.float64) for v in (error, epistemic, noise))
    if e.size == 0 or not a.mean() > 0:
        raise SettingsError("a correlation volume needs regions with a positive aleatoric variance")
    return max(0.0, float((np.mean(e**2) - np.mean(s**2)) / a.mean()))


def calibrate(
    model: DensityModel,
    features: Tensor,
    density: Tensor,
    groups: ArrayLike | None = None,
    uncertainty: str = "analytic",
    samples: int = 30,
) -> DensityModel:
    """The model with its error bars of one kind calibrated on points of snapshots held out.

    Parameters
    ----------
    features : (n, n_features) float32 tensor, raw
    density : (n,) tensor, e/angstrom^3
        Labels.
    groups : (n,) array of int, optional
        Snapshot of each point; see `fit_calibration_curve`.
    uncertainty : "analytic", "sampled" or "last-layer"
        The first two share one calibration.
    """
    name = "last_layer_calibration" if uncertainty == "last-layer" else "calibration_factors"
    plain = model.with_spec(**{name: CalibrationFactors()})
    mean, aleatoric, epistemic = plain.evaluator(precision="fp32", uncertainty=uncertainty, samples=samples)(features)
    if aleatoric is None or epistemic is None:
        raise ModelError("calibration needs an evaluator with uncertainty")
    error = mean.double() - density.double()
    factors = fit_calibration_curve(
        mean.numpy(), error.numpy(), aleatoric.double().numpy(), epistemic.double().numpy(), groups
    )
    volume = getattr(model.spec, name).correlation_volume
    return model.with_spec(**{name: replace(factors, correlation_volume=volume)})
