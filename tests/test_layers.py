"""Layers: formulas, gradients, TorchScript, precision."""

import io
import math

import numpy as np
import pytest
import torch

from gpurho.errors import ModelError
from gpurho.layers import (
    BayesianLinear,
    DensityNetwork,
    NetworkSpec,
    _DrawWithKL,
    gaussian_kl,
    inverse_softplus,
    inverse_softplus_tensor,
    propagate,
    propagate_variance,
    transform_features,
)
from gpurho.prediction import PredictionNetwork

SPEC = NetworkSpec(2, 3, 16)
COLUMNS = [0, 5, 8, 12]


def _network(dtype: torch.dtype = torch.float32, scale: float = 0.05) -> DensityNetwork:
    torch.manual_seed(7)
    net = DensityNetwork(SPEC, 14, COLUMNS, length=1.5, initial_scale=scale)
    net.feature_mean.uniform_(-1, 1)
    net.feature_std.uniform_(0.5, 2)
    with torch.no_grad():
        net.skip.uniform_(-0.8, 0.8)
    return net.to(dtype)


def _features(n: int = 40, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(n, 14, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype) * 4


def _parts(net: DensityNetwork) -> tuple[list[torch.Tensor], ...]:
    s = torch.nn.functional.softplus
    ls = list(net.linears)
    return (
        [x.weight_mean.detach() for x in ls],
        [x.bias_mean.detach() for x in ls],
        [s(x.weight_rho.detach()).square() for x in ls],
        [s(x.bias_rho.detach()).square() for x in ls],
    )


def test_transform_replaces_the_named_columns_and_no_others() -> None:
    x = _features()
    out = transform_features(x, COLUMNS, 1.5).numpy()
    expected = x.numpy().copy()
    for a, b in ((0, 5), (8, 12)):
        expected[:, a:b] = np.exp(-expected[:, a:b] / 1.5)
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert transform_features(x, COLUMNS, 0.0) is x


def test_forward_is_the_network_of_the_design() -> None:
    """Written out in NumPy from design.md: gelu, additive skips with a coefficient inside a block."""
    net = _network(torch.float64)
    x = _features(dtype=torch.float64)
    w, b, _, _ = _parts(net)
    erf = np.vectorize(math.erf)
    h = net.standardise(x).numpy()
    for block in range(2):
        for layer in range(3):
            i = 3 * block + layer
            z = h @ w[i].numpy().T + b[i].numpy()
            a = 0.5 * z * (1 + erf(z / np.sqrt(2)))
            h = a if layer == 0 else a + float(net.skip[block, layer - 1].detach()) * h
    expected = h @ w[-1].numpy().T + b[-1].numpy()
    np.testing.assert_allclose(net(x).detach().numpy(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 3, 8), (1, 1, 8), (3, 1, 8), (1, 4, 8), (3, 3, 8)])
def test_closed_form_variance_is_that_of_the_linearised_network(shape: tuple[int, int, int]) -> None:
    """Against autograd: the sum over all weights of (df/dw)^2 sigma^2, point by point."""
    torch.manual_seed(3)
    net = DensityNetwork(NetworkSpec(*shape), 14, [], initial_scale=0.3).double()
    x = _features(6, torch.float64)
    w, b, wv, bv = _parts(net)
    out, variance = propagate_variance(x, w, b, wv, bv, net.skip.detach(), shape[1])
    expected = []
    for row in x:
        net.zero_grad()
        net(row[None])[0, 0].backward()
        total = 0.0
        for layer, v, u in zip(net.linears, wv, bv, strict=True):
            total += float((layer.weight_mean.grad.square() * v).sum() + (layer.bias_mean.grad.square() * u).sum())
        expected.append(total)
    np.testing.assert_allclose(variance.numpy(), expected, rtol=1e-10)
    torch.testing.assert_close(out, net(x).detach())


@pytest.mark.parametrize("analytic", [True, False])
def test_scripted_frozen_and_reloaded_agree_with_eager_in_values_and_gradients(analytic: bool) -> None:
    net = _network()
    w, b, wv, bv = _parts(net)
    eager = PredictionNetwork(
        w, b, net.skip, 3, torch.float32, wv if analytic else None, bv if analytic else None
    ).eval()
    scripted = torch.jit.script(eager)
    frozen = torch.jit.freeze(scripted)
    buffer = io.BytesIO()
    torch.jit.save(frozen, buffer)
    buffer.seek(0)
    x = net.standardise(_features()).detach()

    def values_and_gradient(module: torch.nn.Module) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        inputs = x.clone().requires_grad_()
        out, variance = module(inputs)
        out.square().sum().backward()
        return out.detach(), variance.detach(), inputs.grad

    reference = values_and_gradient(eager)
    assert reference[2].abs().max() > 0
    assert reference[1].numel() == (40 if analytic else 0)
    for module in (scripted, frozen, torch.jit.load(buffer)):
        for _ in range(3):  # the profiling executor changes its mind after two runs
            for got, want in zip(values_and_gradient(module), reference, strict=True):
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_training_network_scripts() -> None:
    net = _network()
    scripted = torch.jit.script(net)
    x = _features()
    torch.testing.assert_close(scripted(x), net(x))
    torch.testing.assert_close(scripted.kl(), net.kl())
    torch.manual_seed(0)
    a = scripted.sample(x)
    torch.manual_seed(0)
    torch.testing.assert_close(a, net.sample(x))
    net(x).sum().backward()
    want = net.linears[0].weight_mean.grad.clone()
    net.zero_grad()
    scripted(x).sum().backward()
    torch.testing.assert_close(net.linears[0].weight_mean.grad, want)


def test_float32_agrees_with_float64() -> None:
    net = _network()
    w, b, wv, bv = _parts(net)
    x = net.standardise(_features()).detach()
    single = propagate_variance(x, w, b, wv, bv, net.skip.detach(), 3)

    def wide(ts: list[torch.Tensor]) -> list[torch.Tensor]:
        return [t.double() for t in ts]

    double = propagate_variance(x.double(), wide(w), wide(b), wide(wv), wide(bv), net.skip.detach().double(), 3)
    for got, want in zip(single, double, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_local_reparameterisation_has_the_moments_of_drawn_weights() -> None:
    torch.manual_seed(0)
    layer = BayesianLinear(6, 3, initial_scale=0.5)
    x = torch.randn(2, 6)
    with torch.no_grad():
        draws = torch.stack([layer.sample(x) for _ in range(20_000)])
    sigma_w = torch.nn.functional.softplus(layer.weight_rho)
    sigma_b = torch.nn.functional.softplus(layer.bias_rho)
    variance = (x**2) @ (sigma_w**2).T + sigma_b**2
    torch.testing.assert_close(draws.mean(0), layer(x), atol=0.02, rtol=0)
    torch.testing.assert_close(draws.var(0), variance, rtol=0.05, atol=0)


def test_kl_is_that_of_torch_distributions() -> None:
    mean, sigma = torch.randn(5, 4), torch.rand(5, 4) + 0.1
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, sigma), torch.distributions.Normal(0.0, 0.7)
    ).sum()
    torch.testing.assert_close(gaussian_kl(mean, sigma, 0.7), expected)


def test_shared_draw_and_its_hand_written_gradient() -> None:
    mean = torch.randn(5, 7, dtype=torch.double) * 0.3
    rho = torch.randn(5, 7, dtype=torch.double) - 2

    def grads(by_hand: bool) -> list[torch.Tensor]:
        m, r = mean.clone().requires_grad_(), rho.clone().requires_grad_()
        torch.manual_seed(3)
        if by_hand:
            w, kl = _DrawWithKL.apply(m, r, 0.3)
        else:
            sigma = torch.nn.functional.softplus(r)
            w, kl = m + sigma * torch.randn_like(m), gaussian_kl(m, sigma, 0.3)
        (w.pow(3).sum() + 0.1 * kl).backward()
        return [w.detach(), kl.detach(), m.grad, r.grad]

    for got, want in zip(grads(True), grads(False), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


def test_shared_sample_is_propagate_with_one_draw_and_reports_the_kl() -> None:
    net = _network(scale=1e-6)
    out, kl = net.sample_shared(_features())
    torch.testing.assert_close(out, net(_features()), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(kl, net.kl(), rtol=1e-4, atol=0)
    wide, _ = _network(scale=0.5).sample_shared(_features())
    assert (wide - net(_features())).abs().max() > 0.05


def test_inverse_softplus() -> None:
    for value in (1e-6, 0.01, 1.0, 20.0):
        assert torch.nn.functional.softplus(
            torch.tensor(inverse_softplus(value), dtype=torch.double)
        ).item() == pytest.approx(value)
        rho = inverse_softplus_tensor(torch.tensor([value]))
        assert torch.nn.functional.softplus(rho).item() == pytest.approx(value, rel=1e-5)


def test_bf16_hidden_layers_keep_a_float32_output_layer() -> None:
    net = _network()
    w, b, _, _ = _parts(net)
    narrow = PredictionNetwork(w, b, net.skip, 3, torch.bfloat16)
    assert narrow.layers[0].weight.dtype == torch.bfloat16
    assert narrow.layers[-1].weight.dtype == torch.float32
    x = net.standardise(_features()).detach()
    out, _ = narrow(x.bfloat16())
    want = propagate(x, w, b, net.skip.detach(), 3)
    assert out.dtype == torch.float32
    assert 0 < (out - want).abs().max() < 0.05 * want.std()


@pytest.mark.parametrize("values", [{"blocks": -1}, {"layers": 17}, {"width": 2.5}, {"width": True}, {"width": 10**9}])
def test_network_spec_refuses_sizes_out_of_range(values: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=next(iter(values))):
        NetworkSpec(**values)  # type: ignore[arg-type]
