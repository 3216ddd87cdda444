"""Counts of a predicted field that add up over snapshots: distribution of the density, error against sigma."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import SettingsError

DENSITY_EDGES = np.linspace(0.0, 1.2, 121)
"""Edges of the histogram of the density, e/angstrom^3; what lies beyond counts in the outermost bins."""

SIGMA_EDGES = np.logspace(-5.0, 0.0, 61)
"""Edges of the bins of sigma, e/angstrom^3; what lies beyond counts in the outermost bins."""

LEVELS = np.linspace(0.05, 0.95, 19)
"""Probabilities of central intervals for which the share of errors inside is counted."""


@dataclass(frozen=True, eq=False)
class FieldCounts:
    """Counts over points.

    Attributes
    ----------
    reference, predicted : (120,) arrays
        Points in each bin of `DENSITY_EDGES`; `reference` is zero where there is no reference.
    points, variance, error2 : (60,) arrays
        Of each bin of `SIGMA_EDGES`: points, sum of sigma^2, sum of squared errors, (e/angstrom^3)^2.
    inside : (19,) array
        Points whose error lies inside the central interval of each probability in `LEVELS`.
    n_points : int
    """

    reference: NDArray[np.float64]
    predicted: NDArray[np.float64]
    points: NDArray[np.float64]
    variance: NDArray[np.float64]
    error2: NDArray[np.float64]
    inside: NDArray[np.float64]
    n_points: int

    @classmethod
    def of_fields(cls, mean: ArrayLike, sigma: ArrayLike, reference: ArrayLike | None = None) -> FieldCounts:
        """Counts of one field; densities and total standard deviations in e/angstrom^3, arrays of one shape."""
        from scipy.special import erfinv

        p, s = (np.asarray(values, np.float64).ravel() for values in (mean, sigma))
        r = p if reference is None else np.asarray(reference, np.float64).ravel()
        if not p.shape == s.shape == r.shape:
            raise SettingsError(f"{p.size} densities, {s.size} sigmas and {r.size} references; give as many of each")
        error = p - r
        place = np.clip(np.searchsorted(SIGMA_EDGES, s, side="right") - 1, 0, len(SIGMA_EDGES) - 2)
        n = len(SIGMA_EDGES) - 1
        z = np.sort(np.abs(error) / np.maximum(s, 1e-30))
        inside = np.searchsorted(z, np.sqrt(2.0) * erfinv(LEVELS), side="right").astype(np.float64)
        known = reference is not None
        return cls(
            _histogram(r) if known else np.zeros(len(DENSITY_EDGES) - 1),
            _histogram(p),
            np.bincount(place, minlength=n).astype(np.float64),
            np.bincount(place, s**2, n).astype(np.float64),
            np.bincount(place, error**2, n).astype(np.float64),
            inside if known else np.zeros_like(inside),
            p.size,
        )

    @classmethod
    def merged(cls, parts: Iterable[FieldCounts]) -> FieldCounts:
        """The counts of all `parts` together."""
        rows = list(parts)
        if not rows:
            raise SettingsError("no fields to count; give one or more")
        names = ("reference", "predicted", "points", "variance", "error2", "inside")
        sums = [np.sum([getattr(row, name) for row in rows], axis=0) for name in names]
        n_points = sum(row.n_points for row in rows)
        return cls(**dict(zip(names, sums, strict=True)), n_points=n_points)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> FieldCounts:
        """From `to_dict`."""
        arrays: dict[str, Any] = {k: v if k == "n_points" else np.asarray(v, np.float64) for k, v in values.items()}
        return cls(**arrays)

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; counts as whole numbers, sums to six digits."""
        values: dict[str, Any] = {"n_points": self.n_points}
        for name in ("reference", "predicted", "points", "inside"):
            values[name] = getattr(self, name).astype(int).tolist()
        for name in ("variance", "error2"):
            values[name] = [float(f"{x:.6g}") for x in getattr(self, name)]
        return values

    def error_against_sigma(self, least: int = 100) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Root mean square sigma and error of each bin with `least` points or more, e/angstrom^3."""
        full = self.points >= least
        count = self.points[full]
        return np.sqrt(self.variance[full] / count), np.sqrt(self.error2[full] / count)

    def coverage(self) -> NDArray[np.float64]:
        """Share of errors inside the central interval of each probability in `LEVELS`."""
        return self.inside / self.n_points


def _histogram(values: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = np.clip(values, DENSITY_EDGES[0], DENSITY_EDGES[-1])
    return np.histogram(inside, DENSITY_EDGES)[0].astype(np.float64)
