"""Error bars: closed form against samples, the posterior object, calibration."""

import numpy as np
import pytest
import torch

from gpurho.errors import SettingsError
from gpurho.layers import DensityNetwork, NetworkSpec, propagate, propagate_variance
from gpurho.metrics import spearman
from gpurho.uncertainty import CalibrationFactors, Posterior, draw_weights, fit_calibration


@pytest.mark.parametrize(("scale", "tolerance"), [(0.003, 0.05), (0.03, 0.10)])
def test_closed_form_agrees_with_2000_samples_on_random_posteriors(scale: float, tolerance: float) -> None:
    """Standard deviations; the closed form is that of the linearised network, so it departs at large spreads."""
    torch.manual_seed(0)
    spec = NetworkSpec(3, 3, 48)
    net = DensityNetwork(spec, 20, [], initial_scale=scale)
    with torch.no_grad():
        for layer in net.linears:
            layer.weight_mean *= 2.0  # as after training: outputs that vary from point to point
            layer.weight_rho += torch.randn_like(layer.weight_rho)  # sigmas of different sizes
    weights, biases = [x.weight_mean.detach() for x in net.linears], [x.bias_mean.detach() for x in net.linears]
    s = torch.nn.functional.softplus
    sigma_w, sigma_b = [s(x.weight_rho.detach()) for x in net.linears], [s(x.bias_rho.detach()) for x in net.linears]
    x, skip = torch.randn(150, 20), net.skip.detach()
    _, variance = propagate_variance(
        x, weights, biases, [w.square() for w in sigma_w], [b.square() for b in sigma_b], skip, 3
    )
    draws = []
    n = len(weights)
    for k in range(2000):
        drawn = draw_weights([*weights, *biases], [*sigma_w, *sigma_b], 0, k)
        draws.append(propagate(x, drawn[:n], drawn[n:], skip, 3)[:, 0])
    sampled = torch.stack(draws).std(0)
    ratio = (variance.sqrt() / sampled).numpy()
    assert abs(np.median(ratio) - 1) < tolerance
    assert spearman(variance.numpy(), sampled.numpy()) > 0.95


def test_draws_depend_on_seed_and_index_alone() -> None:
    means, sigmas = [torch.zeros(4, 3), torch.zeros(5)], [torch.ones(4, 3), torch.full((5,), 2.0)]
    a = draw_weights(means, sigmas, 3, 7)
    torch.manual_seed(99)
    for x, y in zip(a, draw_weights(means, sigmas, 3, 7), strict=True):
        assert torch.equal(x, y)
    for other in ((3, 8), (4, 7), (7, 3)):
        assert not torch.equal(a[0], draw_weights(means, sigmas, *other)[0])
    with pytest.raises(SettingsError, match="-1"):
        draw_weights(means, sigmas, -1, 0)


def test_draws_have_the_moments_asked_for() -> None:
    draws = torch.stack(
        [draw_weights([torch.tensor([1.0, -2.0])], [torch.tensor([0.5, 3.0])], 0, k)[0] for k in range(4000)]
    )
    torch.testing.assert_close(draws.mean(0), torch.tensor([1.0, -2.0]), atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), torch.tensor([0.5, 3.0]), rtol=0.05, atol=0)


def test_posterior_adds_variances_and_draws() -> None:
    posterior = Posterior(torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0]), torch.tensor([4.0, 1.0]))
    assert posterior.variance.tolist() == [25.0, 1.0]
    assert posterior.std.tolist() == [5.0, 1.0]
    draws = posterior.rsample(20_000, torch.Generator().manual_seed(0))
    assert draws.shape == (20_000, 2)
    torch.testing.assert_close(draws.mean(0), posterior.mean, atol=0.15, rtol=0)
    torch.testing.assert_close(draws.std(0), posterior.std, rtol=0.03, atol=0)
    mean = torch.zeros(2, requires_grad=True)
    Posterior(mean, torch.ones(2), torch.ones(2)).rsample(3).sum().backward()
    assert mean.grad.tolist() == [3.0, 3.0]
    with pytest.raises(SettingsError, match="shapes"):
        Posterior(torch.zeros(2), torch.zeros(3), torch.zeros(2))


@pytest.mark.parametrize("truth", [0.5, 1.0, 2.0])
def test_calibration_finds_the_factor(truth: float) -> None:
    rng = np.random.default_rng(0)
    aleatoric, epistemic = rng.uniform(0.5, 2, 40_000), rng.uniform(0.1, 1, 40_000)
    error = rng.normal(0, truth * np.hypot(aleatoric, epistemic))
    factors = fit_calibration(error, aleatoric, epistemic)
    assert factors.aleatoric == factors.epistemic == pytest.approx(truth, rel=0.02)


def test_calibration_is_bounded_and_checked() -> None:
    ones = np.ones(10)
    assert fit_calibration(100 * ones, ones, ones).aleatoric == 4.0
    with pytest.raises(SettingsError, match="positive variance"):
        fit_calibration(ones, 0 * ones, 0 * ones)
    with pytest.raises(SettingsError, match="aleatoric"):
        CalibrationFactors(aleatoric=float("nan"))
