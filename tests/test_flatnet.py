"""The network in vectors against the network in layers, closed forms and torch's distributions."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import ModelError
from gpurho.flatnet import FlatNetwork, likelihoods
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel
from gpurho.modelspec import ModelSpec

FEATURES = 8


def spec_of(blocks: int = 2, layers: int = 3, width: int = 7) -> ModelSpec:
    d = DescriptorSpec(("Al",), n_distances=4, n_angle_atoms=2, n_angle_neighbors=2, cutoff=5.0)
    assert d.n_features == FEATURES
    return ModelSpec(d, {"Al": 3.0}, NetworkSpec(blocks, layers, width))


def network(spec: ModelSpec, frozen: int = 0, seed: int = 0) -> FlatNetwork:
    torch.manual_seed(seed)
    net = FlatNetwork(spec, initial_scale=0.3, frozen_layers=frozen)
    with torch.no_grad():
        net.skip.add_(0.1 * torch.randn_like(net.skip))
        net.rho.add_(0.2 * torch.randn_like(net.rho))
    return net


def model_of(net: FlatNetwork, spec: ModelSpec) -> DensityModel:
    scale = {f"feature_{k}": torch.zeros(FEATURES) for k in ("mean", "low", "high")}
    return DensityModel(spec, {**scale, "feature_std": torch.ones(FEATURES), **net.tensors()})


@pytest.mark.parametrize("size", [(2, 3, 7), (1, 1, 5), (0, 3, 5)])
def test_tensors_make_the_network_in_layers_with_the_same_output_and_divergence(size: tuple[int, int, int]) -> None:
    spec = spec_of(*size)
    net = network(spec)
    layered: DensityNetwork = model_of(net, spec).network()
    x = torch.randn(20, FEATURES)
    torch.testing.assert_close(net.at_means(x), layered(x))
    torch.testing.assert_close(net.kl(), layered.kl(), rtol=1e-4, atol=1e-3)
    again = FlatNetwork(spec)
    again.load(net.tensors())
    torch.testing.assert_close(again.mean, net.mean)
    torch.testing.assert_close(again.rho, net.rho, rtol=1e-4, atol=1e-4)


def test_divergence_is_that_of_independent_gaussians() -> None:
    net = network(spec_of())
    net.prior_mean.normal_()
    sigma = torch.nn.functional.softplus(net.rho)
    expected = kl_divergence(Normal(net.mean, sigma), Normal(net.prior_mean, net.prior_sigma)).sum()
    x = torch.randn(3, FEATURES)
    torch.testing.assert_close(net.kl(), expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(net.draw(x, "shared")[1], expected, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(net.draw(x, "local")[1], expected, rtol=1e-4, atol=1e-2)
    net.prior_from_posterior()
    assert abs(float(net.kl().detach())) < 1e-2
    assert abs(float(net.draw(x, "shared")[1].detach())) < 1e-2
    shift = ((net.mean + 0.1 - net.prior_mean) / net.prior_sigma).square().sum() / 2
    with torch.no_grad():
        net.mean.add_(0.1)
    torch.testing.assert_close(net.draw(x, "none")[1], shift)


def test_gradients_of_a_draw_are_those_of_its_formula() -> None:
    spec = spec_of()
    net = network(spec).double()
    x, y = torch.randn(10, FEATURES, dtype=torch.float64), torch.randn(10, dtype=torch.float64)

    def loss(by_hand: bool) -> torch.Tensor:
        torch.manual_seed(3)
        if by_hand:
            return net(x, y, None, "shared", 0.01, 0.0)[0]
        sigma = torch.nn.functional.softplus(net.rho)
        drawn = net.mean + sigma * torch.randn_like(net.mean)
        weights, biases = net._layers(drawn, net.frozen_mean)
        from gpurho.layers import propagate

        out = propagate(x, weights, biases, net.skip, net.n_layers)
        kl = kl_divergence(Normal(net.mean, sigma), Normal(net.prior_mean, net.prior_sigma)).sum()
        return likelihoods(out.float(), y, None, 0.0)[0] + 0.01 * kl

    results = []
    for by_hand in (True, False):
        net.zero_grad()
        value = loss(by_hand)
        value.backward()
        results.append((value.detach(), net.mean.grad.clone(), net.rho.grad.clone(), net.skip.grad.clone()))
    for a, b in zip(*results, strict=True):
        assert float(b.abs().max()) > 1e-3
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("estimator", ["shared", "local"])
def test_draws_have_the_moments_of_the_posterior(estimator: str) -> None:
    net = network(spec_of(blocks=0))
    x = torch.randn(4, FEATURES)
    torch.manual_seed(1)
    net.requires_grad_(False)
    outs = torch.stack([net.draw(x, estimator)[0] for _ in range(4000)])
    weights, biases = net._layers(torch.nn.functional.softplus(net.rho).square(), net.frozen_mean)
    variance = (x**2) @ weights[0].T + biases[0]
    torch.testing.assert_close(outs.mean(0), net.at_means(x).detach(), atol=0.05, rtol=0)
    torch.testing.assert_close(outs.var(0), variance.detach(), atol=0, rtol=0.12)
    # Points share the weights of one draw, or each have their own.
    both = torch.corrcoef(outs[:, :2, 0].T)[0, 1]
    expected = ((x[0] * x[1]) @ weights[0][0] + biases[0][0]) / (variance[0, 0] * variance[1, 0]).sqrt()
    assert abs(float(both) - (float(expected) if estimator == "shared" else 0.0)) < 0.06


@pytest.mark.parametrize("estimator", ["shared", "local", "none"])
def test_frozen_layers_take_part_and_are_not_trained(estimator: str) -> None:
    spec = spec_of()
    free, frozen = network(spec), FlatNetwork(spec, frozen_layers=2)
    frozen.load(free.tensors())
    x, y = torch.randn(20, FEATURES), torch.randn(20)
    torch.testing.assert_close(frozen.at_means(x), free.at_means(x))
    before = frozen.tensors()
    optimizer = torch.optim.Adam(frozen.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        frozen(x, y, None, estimator, 1e-3, 0.0)[0].backward()
        optimizer.step()
    after = frozen.tensors()
    for i in range(7):
        same = all(
            torch.equal(before[f"layers.{i}.{k}_mean"], after[f"layers.{i}.{k}_mean"]) for k in ("weight", "bias")
        )
        assert same == (i < 2)
    # The skip into the second layer belongs to a frozen layer; those into the third and later ones do not.
    assert (before["skip"] == after["skip"]).tolist() == [[True, False], [False, False]]
    with pytest.raises(ModelError, match="frozen_layers 7"):
        FlatNetwork(spec, frozen_layers=7)


def test_likelihoods_weigh_points_and_variances() -> None:
    out, y, w = torch.randn(50, 2), torch.randn(50), torch.rand(50)
    each = -Normal(out[:, 0], torch.exp(out[:, 1] / 2)).log_prob(y) - 0.5 * torch.log(torch.tensor(2 * torch.pi))
    plain, same = likelihoods(out, y, w, 0.0)
    torch.testing.assert_close(plain, (w * each).mean())
    assert torch.equal(plain, same)
    value, weighted = likelihoods(out, y, None, 0.5)
    torch.testing.assert_close(value, each.mean())
    torch.testing.assert_close(weighted, (each * torch.exp(0.5 * out[:, 1])).mean())


def test_full_variance_weighting_pulls_the_mean_like_least_squares() -> None:
    out, y = torch.randn(50, 2, requires_grad=True), torch.randn(50)
    likelihoods(out, y, None, 1.0)[1].backward()
    torch.testing.assert_close(out.grad[:, 0], (out[:, 0] - y).detach() / 50)
