"""How good a predicted density and its error bars are."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import SettingsError
from gpurho.units import PER_ANGSTROM3

COVERAGE_GAUSSIAN = (0.682689492, 0.954499736, 0.997300204)
"""Share of errors within 1, 2, 3 sigma of an exact Gaussian error bar."""


@dataclass(frozen=True)
class FieldMetrics:
    """Errors of one predicted field against its reference; densities in e/angstrom^3 unless the name says otherwise.

    `rmse`, `nrmse`, `max_error`, `r2` and the calibration figures are those of the raw prediction;
    `l1_per_electron` is taken after the rescaling to the number of electrons of equation (6) of the preprint,
    as there. `nrmse` is the RMSE over the range of the reference. Calibration figures are None without sigmas:
    `coverage` (shares within 1, 2, 3 sigma), `miscalibration_area`, mean `nll` (nats per point, unit
    e/angstrom^3), `spearman` of |error| and sigma, and the root mean squares of the two deviations.
    """

    n_points: int
    rmse: float
    rmse_bohr: float
    nrmse: float
    l1_per_electron: float
    max_error: float
    r2: float
    electrons_error: float
    coverage: tuple[float, float, float] | None = None
    miscalibration_area: float | None = None
    nll: float | None = None
    spearman: float | None = None
    aleatoric_rms: float | None = None
    epistemic_rms: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        values = asdict(self)
        values["coverage"] = None if self.coverage is None else list(self.coverage)
        return values


def compare_fields(
    reference: ArrayLike,
    mean: ArrayLike,
    electrons: float,
    dv: float,
    aleatoric: ArrayLike | None = None,
    epistemic: ArrayLike | None = None,
) -> FieldMetrics:
    """Metrics of a predicted field over a whole cell.

    Parameters
    ----------
    reference, mean : arrays of one shape, e/angstrom^3
    electrons : float
        Electrons in the cell, for the rescaling and the L1 error per electron.
    dv : float, angstrom^3
        Volume per point.
    aleatoric, epistemic : arrays, e/angstrom^3, optional
        Standard deviations; give both or neither.
    """
    ref, pred = _flat(reference, "reference"), _flat(mean, "mean")
    if ref.shape != pred.shape or ref.size < 2:
        raise SettingsError(f"reference has {ref.size} points and mean {pred.size}; give the same number, two at least")
    if not (electrons > 0 and dv > 0):
        raise SettingsError(f"electrons {electrons!r} and dv {dv!r} must be positive")
    error = pred - ref
    rmse = float(np.sqrt(np.mean(error**2)))
    spread = float(ref.max() - ref.min())
    integral = float(pred.sum() * dv)
    values: dict[str, Any] = {}
    if aleatoric is not None and epistemic is not None:
        a, e = _flat(aleatoric, "aleatoric"), _flat(epistemic, "epistemic")
        sigma = np.sqrt(a**2 + e**2)
        values = {
            "coverage": coverage(error, sigma),
            "miscalibration_area": miscalibration_area(error, sigma),
            "nll": gaussian_nll(error, sigma),
            "spearman": spearman(np.abs(error), sigma),
            "aleatoric_rms": float(np.sqrt(np.mean(a**2))),
            "epistemic_rms": float(np.sqrt(np.mean(e**2))),
        }
    return FieldMetrics(
        n_points=ref.size,
        rmse=rmse,
        rmse_bohr=rmse * PER_ANGSTROM3,
        nrmse=rmse / spread if spread > 0 else float("nan"),
        l1_per_electron=l1_per_electron(ref, pred, electrons, dv),
        max_error=float(np.abs(error).max()),
        r2=float(1.0 - np.sum(error**2) / np.sum((ref - ref.mean()) ** 2)) if spread > 0 else float("nan"),
        electrons_error=integral - electrons,
        **values,
    )


def l1_per_electron(reference: ArrayLike, mean: ArrayLike, electrons: float, dv: float) -> float:
    """Integral of |error| per electron, after the prediction is rescaled to `electrons` (equation 6)."""
    ref, pred = _flat(reference, "reference"), _flat(mean, "mean")
    integral = float(pred.sum() * dv)
    if not integral > 0:
        raise SettingsError(f"the predicted density integrates to {integral:.4g} electrons; it cannot be rescaled")
    return float(np.abs(pred * (electrons / integral) - ref).sum() * dv / electrons)


def coverage(error: ArrayLike, sigma: ArrayLike) -> tuple[float, float, float]:
    """Shares of errors within 1, 2 and 3 sigma; `COVERAGE_GAUSSIAN` for exact Gaussian error bars."""
    z = _scores(error, sigma)
    return float(np.mean(z <= 1)), float(np.mean(z <= 2)), float(np.mean(z <= 3))


def miscalibration_area(error: ArrayLike, sigma: ArrayLike) -> float:
    """Area between the calibration curve and the diagonal: 0 for exact error bars, 0.5 at worst.

    The curve is the share of errors inside the central interval of probability p, over p.
    """
    from scipy.special import erf

    # |z| lies inside the interval of probability erf(|z| / sqrt 2): sorted, these are the steps of the curve.
    levels = np.sort(erf(_scores(error, sigma) / np.sqrt(2.0)))
    p = np.linspace(0.0, 1.0, 2001)
    observed = np.searchsorted(levels, p, side="right") / levels.size
    return float(np.trapezoid(np.abs(observed - p), p))


def gaussian_nll(error: ArrayLike, sigma: ArrayLike) -> float:
    """Mean negative log likelihood of Gaussian errors, nats per point (with the constant 1/2 log 2 pi)."""
    s = np.maximum(_flat(sigma, "sigma"), 1e-30)
    return float(np.mean(0.5 * np.log(2 * np.pi) + np.log(s) + 0.5 * (_flat(error, "error") / s) ** 2))


def spearman(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation; NaN where one of the two is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(_flat(first, "first")), rankdata(_flat(second, "second"))
    if a.size != b.size:
        raise SettingsError(f"rank correlation of {a.size} and {b.size} values; give the same number")
    a, b = a - a.mean(), b - b.mean()
    norm = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / norm if norm > 0 else float("nan")


def _scores(error: ArrayLike, sigma: ArrayLike) -> NDArray[np.float64]:
    e, s = _flat(error, "error"), _flat(sigma, "sigma")
    if e.shape != s.shape:
        raise SettingsError(f"{e.size} errors and {s.size} sigmas; give the same number")
    if not np.all(s >= 0):
        raise SettingsError("a sigma is negative; standard deviations are expected")
    return np.abs(e) / np.maximum(s, 1e-30)


def _flat(values: ArrayLike, name: str) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()
    if not np.isfinite(array).all():
        raise SettingsError(f"{name} has values that are not finite")
    return array
