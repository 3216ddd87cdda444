"""Calibration on held-out points: factors, curves, what they do to predictions, files and exports, and the report."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_tools import delta_model, features

from gpurho.calibration import (
    best_factor,
    calibrate,
    coverage_loss,
    fit_calibration_curve,
    fit_correlation_volume,
    reliability,
)
from gpurho.calibrationplot import plot_calibration
from gpurho.errors import FormatError, SettingsError
from gpurho.lastlayer import fit_last_layer
from gpurho.metrics import coverage
from gpurho.model import DensityModel, load_exported
from gpurho.uncertainty import CalibrationFactors, curve_factors

RNG = np.random.default_rng(0)


def test_factor_covers_gaussian_and_heavy_tailed_errors() -> None:
    z = np.abs(RNG.normal(size=200_000))
    assert best_factor(2.5 * z) == pytest.approx(2.5, rel=0.02)
    assert best_factor(z / 3) == pytest.approx(1 / 3, rel=0.02)
    heavy = np.abs(RNG.standard_t(8, size=200_000))
    chosen = best_factor(heavy)
    rms = np.sqrt(np.mean(heavy**2))
    assert chosen < 0.97 * rms, "the tail decides the rms, and must not decide the factor"
    for share, target, tolerance in zip(
        coverage(heavy / chosen, np.ones(200_000)), (68.27, 95.45, 99.73), (3, 2, 1), strict=True
    ):
        assert abs(100 * share - target) < tolerance
    # No other factor does better.
    losses = [coverage_loss(heavy / f) for f in chosen * np.linspace(0.8, 1.25, 41)]
    assert coverage_loss(heavy / chosen) <= min(losses) + 1e-3


def test_factor_is_bounded() -> None:
    assert best_factor(1e3 * np.abs(RNG.normal(size=1000))) == 4.0
    assert best_factor(1e-3 * np.abs(RNG.normal(size=1000))) <= 0.26
    with pytest.raises(SettingsError, match="positive variance"):
        best_factor(np.array([]))
    with pytest.raises(SettingsError, match="positive variance"):
        fit_calibration_curve([0.1], [0.1], [0.0], [0.0])


def _points(n: int, curved: bool, seed: int = 1) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    density = rng.uniform(0.0, 0.4, n)
    factor = 0.6 + 4 * density if curved else np.full(n, 1.3)
    aleatoric, epistemic = rng.uniform(0.5, 2, n), rng.uniform(0.1, 1, n)
    return density, rng.normal(0, factor * np.hypot(aleatoric, epistemic)), aleatoric, epistemic, factor


def test_curve_by_density_is_found_where_there_is_one_and_only_there() -> None:
    for curved in (True, False):
        density, error, aleatoric, epistemic, truth = _points(60_000, curved)
        groups = np.arange(60_000) % 5
        factors = fit_calibration_curve(density, error, aleatoric, epistemic, groups)
        found = factors.at(torch.from_numpy(density).float()).numpy() * factors.aleatoric
        np.testing.assert_allclose(found, truth, rtol=0.2)
        assert np.median(np.abs(found / truth - 1)) < 0.03
        assert (len(factors.density) > 0) == curved or np.ptp(factors.curve) < 0.15
    assert not fit_calibration_curve(density, error, aleatoric, epistemic).density


def test_a_curve_that_does_not_hold_on_other_snapshots_is_dropped() -> None:
    """Each of two snapshots has its own curve, which says nothing about the other."""
    rng = np.random.default_rng(2)
    density = rng.uniform(0, 0.4, 40_000)
    groups = np.arange(40_000) // 20_000
    slope = np.array([8.0, -8.0])[groups]
    error = rng.normal(0, np.exp(slope * (density - 0.2)))
    ones = np.ones(40_000)
    assert not fit_calibration_curve(density, error, ones, 0 * ones, groups).density


def test_curve_is_that_of_numpy_and_flat_beyond_its_ends() -> None:
    factors = CalibrationFactors(1.0, 1.0, (0.1, 0.2, 0.25), (0.5, 2.0, 1.0))
    density = torch.linspace(-1, 2, 997)
    want = np.interp(density.numpy(), factors.density, factors.curve)
    np.testing.assert_allclose(factors.at(density), want, atol=1e-5)
    scripted = torch.jit.script(curve_factors)
    assert torch.equal(scripted(density, *factors.tensors()), factors.at(density))
    assert torch.equal(CalibrationFactors().at(density), torch.ones(997))


@pytest.mark.parametrize(
    "values",
    [
        {"density": (0.1,), "curve": (1.0,)},
        {"density": (0.1, 0.2), "curve": (1.0,)},
        {"density": (0.2, 0.1), "curve": (1.0, 1.0)},
        {"density": (0.1, float("nan")), "curve": (1.0, 1.0)},
        {"density": (0.1, 0.2), "curve": (1.0, -1.0)},
    ],
)
def test_curves_are_checked(values: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(SettingsError, match="calibration curve"):
        CalibrationFactors(**values)  # type: ignore[arg-type]


def calibrated_model(kind: str = "analytic") -> tuple[DensityModel, torch.Tensor, torch.Tensor, np.ndarray]:
    """A model whose error bars are wrong by a factor that follows the density, and points to see it on."""
    model, x = delta_model(), features(12_000).clamp(-3.9, 3.9)
    if kind == "last-layer":
        model = fit_last_layer(model, x, model.evaluator(uncertainty=None)(x)[0])
    mean, aleatoric, epistemic = model.evaluator(precision="fp32", uncertainty=kind)(x)
    sigma = torch.hypot(aleatoric, epistemic)
    factor = 0.5 + 1.5 * torch.sigmoid((mean - mean.median()) / mean.std())
    noise = torch.randn(12_000, generator=torch.Generator().manual_seed(7))
    return model, x, mean + factor * sigma * noise, np.arange(12_000) % 4


@pytest.mark.parametrize("kind", ["analytic", "last-layer"])
def test_calibrated_predictions_cover_in_every_range_of_densities(kind: str, tmp_path: Path) -> None:
    model, x, y, groups = calibrated_model(kind)
    better = calibrate(model, x[:8000], y[:8000], groups[:8000], kind)
    assert better.spec.factors(kind).density
    other = "analytic" if kind == "last-layer" else "last-layer"
    assert better.spec.factors(other) == CalibrationFactors()
    evaluate = better.evaluator(precision="fp32", uncertainty=kind)
    before = model.evaluator(precision="fp32", uncertainty=kind)(x[8000:])
    mean, aleatoric, epistemic = evaluate(x[8000:])
    assert torch.equal(mean, before[0])
    torch.testing.assert_close(aleatoric / before[1], epistemic / before[2], rtol=1e-4, atol=0)
    error = (mean - y[8000:]).numpy()
    for sigma, good in ((torch.hypot(before[1], before[2]), False), (torch.hypot(aleatoric, epistemic), True)):
        rows = reliability(mean, error, sigma, 4)
        assert all(abs(row.coverage[0] - 0.683) < 0.05 for row in rows) == good
    # The same in files, exports and fingerprints.
    better.save(tmp_path / "m.safetensors")
    again = DensityModel.load(tmp_path / "m.safetensors")
    assert again.spec == better.spec
    assert again.fingerprint() == better.fingerprint() != model.fingerprint()
    better.export(tmp_path / "m.pt", kind)
    for got, want in zip(load_exported(tmp_path / "m.pt", trusted=True)(x[:500]), evaluate(x[:500]), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    whole = evaluate(x[:300])
    for part, full in zip(evaluate(x[5:250]), whole, strict=True):
        assert torch.equal(part, full[5:250])


def test_correlation_volume_is_found() -> None:
    noise, epistemic = RNG.uniform(1, 2, 20_000), RNG.uniform(0, 1, 20_000)
    error = RNG.normal(0, np.sqrt(0.7 * noise + epistemic**2))
    assert fit_correlation_volume(error, epistemic, noise) == pytest.approx(0.7, rel=0.03)
    assert fit_correlation_volume(0.1 * epistemic, epistemic, noise) == 0.0
    with pytest.raises(SettingsError, match="positive aleatoric variance"):
        fit_correlation_volume([1.0], [0.0], [0.0])
    with pytest.raises(SettingsError, match=r"correlation volume -1\.0"):
        CalibrationFactors(correlation_volume=-1.0)


def test_reliability_counts_equal_bins() -> None:
    density = RNG.uniform(0, 1, 999)
    sigma = np.where(density < 0.5, 1.0, 2.0)
    rows = reliability(density, np.full(999, 1.5), sigma, 2)
    assert [r.n_points for r in rows] == [500, 499]
    assert rows[0].high <= rows[1].low
    assert rows[0].rmse == rows[1].rmse == pytest.approx(1.5)
    assert rows[0].coverage[0] < 0.15 < 0.85 < rows[1].coverage[0]
    with pytest.raises(SettingsError, match="8 or more"):
        reliability(density[:5], density[:5], density[:5])


def test_calibration_plot(tmp_path: Path) -> None:
    density = RNG.uniform(0, 0.4, 3000)
    sigma = RNG.uniform(0.5, 2, 3000)
    error = RNG.normal(0, sigma)
    figure = plot_calibration(density, error, sigma, tmp_path / "c.png", "title")
    assert (tmp_path / "c.png").stat().st_size > 10_000
    curve = next(line for line in figure.axes[0].lines if line.get_label() == "observed")
    np.testing.assert_allclose(curve.get_ydata(), curve.get_xdata(), atol=0.04)
    with pytest.raises(FormatError, match="name does not say"):
        plot_calibration(density, error, sigma, tmp_path / "c.txt")
    with pytest.raises(SettingsError, match="100 of each"):
        plot_calibration(density[:9], error[:9], sigma[:9])
