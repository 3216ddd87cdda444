"""Metrics against closed forms and SciPy."""

import numpy as np
import pytest
from scipy.stats import norm, spearmanr

from gpurho.errors import SettingsError
from gpurho.metrics import (
    COVERAGE_GAUSSIAN,
    compare_fields,
    coverage,
    gaussian_nll,
    l1_per_electron,
    miscalibration_area,
    spearman,
)
from gpurho.units import BOHR


def test_figures_of_a_small_field() -> None:
    reference = np.array([1.0, 2.0, 3.0, 4.0])
    mean = reference + np.array([0.1, -0.1, 0.3, -0.3])
    m = compare_fields(reference, mean, electrons=5.0, dv=0.5)
    assert m.rmse == pytest.approx(np.sqrt(0.05))
    assert m.rmse_bohr == pytest.approx(np.sqrt(0.05) * BOHR**3)
    assert m.nrmse == pytest.approx(np.sqrt(0.05) / 3)
    assert m.max_error == pytest.approx(0.3)
    assert m.r2 == pytest.approx(1 - 0.2 / 5.0)
    assert m.electrons_error == pytest.approx(0.0)
    assert m.l1_per_electron == pytest.approx(0.8 * 0.5 / 5.0)
    assert m.coverage is None
    assert m.spearman is None


def test_l1_is_taken_after_rescaling_to_the_number_of_electrons() -> None:
    reference = np.random.default_rng(0).uniform(1, 2, (4, 5, 6))
    dv = 0.1
    electrons = reference.sum() * dv
    assert l1_per_electron(reference, 1.7 * reference, electrons, dv) < 1e-12
    assert compare_fields(reference, 1.7 * reference, electrons, dv).electrons_error == pytest.approx(0.7 * electrons)
    with pytest.raises(SettingsError, match="electrons"):
        l1_per_electron(reference, -reference, electrons, dv)


def test_exact_error_bars_are_calibrated_and_others_are_not() -> None:
    rng = np.random.default_rng(1)
    sigma = rng.uniform(0.5, 3, 200_000)
    error = rng.normal(0, sigma)
    np.testing.assert_allclose(coverage(error, sigma), COVERAGE_GAUSSIAN, atol=0.004)
    assert miscalibration_area(error, sigma) < 0.005
    assert miscalibration_area(error, 1e-9 * sigma) == pytest.approx(0.5, abs=0.01)
    assert miscalibration_area(error, 1e9 * sigma) == pytest.approx(0.5, abs=0.01)
    best = gaussian_nll(error, sigma)
    assert best < gaussian_nll(error, 1.2 * sigma)
    assert best < gaussian_nll(error, 0.8 * sigma)


def test_miscalibration_of_a_constant_factor_in_closed_form() -> None:
    rng = np.random.default_rng(2)
    sigma = np.ones(300_000)
    error = rng.normal(0, 1, sigma.size)
    p = np.linspace(0, 1, 4001)[1:-1]
    observed = 2 * norm.cdf(2 * norm.ppf((1 + p) / 2)) - 1
    assert miscalibration_area(error, 2 * sigma) == pytest.approx(np.trapezoid(np.abs(observed - p), p), abs=0.003)


def test_nll_and_spearman_against_scipy() -> None:
    rng = np.random.default_rng(3)
    error, sigma = rng.normal(size=500), rng.uniform(0.5, 2, 500)
    assert gaussian_nll(error, sigma) == pytest.approx(-norm.logpdf(error, 0, sigma).mean())
    ties = np.round(error, 1)
    assert spearman(ties, sigma + ties) == pytest.approx(spearmanr(ties, sigma + ties).statistic)
    assert np.isnan(spearman(np.ones(5), np.arange(5)))


def test_wrong_input_is_refused() -> None:
    ones = np.ones(4)
    for arguments in (
        (ones, np.ones(5), 1.0, 1.0),
        (ones, ones * np.nan, 1.0, 1.0),
        (ones, ones, 0.0, 1.0),
        (ones, ones, 1.0, -1.0),
    ):
        with pytest.raises(SettingsError):
            compare_fields(*arguments)
    with pytest.raises(SettingsError, match="negative"):
        coverage(ones, -ones)
