"""The network as it is trained: all its parameters in a few vectors.

One draw of the weights, one divergence and one update of Adam are then a few operations on long vectors, whatever
the number of layers, which is what a narrow network's step would otherwise spend its time on. The order within a
vector is layer by layer: weight (out, in) in C order, then bias.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpurho.errors import ModelError
from gpurho.layers import LOG_VARIANCE_LIMITS, inverse_softplus, inverse_softplus_tensor, propagate
from gpurho.modelspec import ModelSpec


class _Draw(torch.autograd.Function):
    """A draw ``mean + softplus(rho) * noise`` and KL[N(mean, sigma^2) || N(prior_mean, prior_sigma^2)].

    By hand because autograd's many passes over the parameters would take half of a training step.
    """

    @staticmethod
    def forward(
        ctx: Any, mean: Tensor, rho: Tensor, prior_mean: Tensor, prior_sigma: Tensor, log_prior: Tensor
    ) -> tuple[Tensor, Tensor]:
        sigma, noise = F.softplus(rho), torch.randn_like(mean)
        shift, ratio = (mean - prior_mean) / prior_sigma, sigma / prior_sigma
        kl = 0.5 * (ratio.dot(ratio) + shift.dot(shift) - mean.numel()) - torch.log(sigma).sum() + log_prior
        ctx.save_for_backward(sigma, noise, shift, ratio, prior_sigma)
        return torch.addcmul(mean, sigma, noise), kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        sigma, noise, shift, ratio, prior_sigma = ctx.saved_tensors
        grad_mean = torch.addcmul(grad, grad_kl, shift / prior_sigma)
        grad_sigma = torch.addcmul(grad * noise, grad_kl, ratio / prior_sigma - sigma.reciprocal())
        # d softplus / d rho = 1 - exp(-softplus)
        return grad_mean, grad_sigma.mul_(torch.expm1(-sigma).neg_()), None, None, None


class FlatNetwork(nn.Module):
    """A Bayesian network to train, in vectors.

    Parameters
    ----------
    spec : ModelSpec
        Sizes of the network.
    prior_scale, initial_scale : float
        Standard deviations of prior and initial posterior, in units of 1 / sqrt(inputs) for weights; a bias has a
        prior of `prior_scale`.
    frozen_layers : int
        The first hidden layers, which are not trained.

    Attributes
    ----------
    mean, rho : Parameter
        Means and inverse softplus of the standard deviations of the layers that are trained.
    skip : Parameter
    frozen_mean, frozen_rho : Tensor
        The same of the frozen layers.
    """

    if TYPE_CHECKING:
        mean: Tensor
        rho: Tensor
        frozen_mean: Tensor
        frozen_rho: Tensor
        prior_mean: Tensor
        prior_sigma: Tensor
        log_prior: Tensor
        skip_trained: Tensor

    def __init__(
        self, spec: ModelSpec, prior_scale: float = 1.0, initial_scale: float = 0.05, frozen_layers: int = 0
    ) -> None:
        super().__init__()
        self.shapes = spec.network.shapes(spec.descriptor.n_features)
        self.n_layers, self.n_hidden, self.n_frozen = spec.network.layers, len(self.shapes) - 1, frozen_layers
        if not 0 <= frozen_layers <= self.n_hidden:
            raise ModelError(f"frozen_layers {frozen_layers} is not from 0 to the {self.n_hidden} hidden layers")
        self.sizes = [n for rows, columns in self.shapes for n in (rows * columns, rows)]
        self.n_fixed = sum(self.sizes[: 2 * frozen_layers])
        bounds = [1.0 / math.sqrt(columns) for _, columns in self.shapes]
        means, rhos, priors = [], [], []
        for (rows, columns), bound in zip(self.shapes, bounds, strict=True):
            means.append(torch.empty(rows * columns + rows).uniform_(-bound, bound))
            rhos.append(torch.full((rows * columns + rows,), inverse_softplus(initial_scale * bound)))
            priors += [torch.full((rows * columns,), prior_scale * bound), torch.full((rows,), prior_scale)]
        mean, rho, prior = torch.cat(means), torch.cat(rhos), torch.cat(priors)
        n = self.n_fixed
        self.mean, self.rho = nn.Parameter(mean[n:].clone()), nn.Parameter(rho[n:].clone())
        self.register_buffer("frozen_mean", mean[:n].clone())
        self.register_buffer("frozen_rho", rho[:n].clone())
        skip_shape = spec.tensor_shapes()["skip"]
        self.skip = nn.Parameter(torch.full(skip_shape, 0.5))
        index = torch.arange(skip_shape[0])[:, None] * self.n_layers + 1 + torch.arange(skip_shape[1])[None, :]
        self.register_buffer("skip_trained", index >= frozen_layers)
        self.register_buffer("prior_mean", torch.zeros_like(self.mean))
        self.register_buffer("prior_sigma", prior[n:].clone())
        self.register_buffer("log_prior", torch.log(self.prior_sigma).sum())

    # --- parameters --------------------------------------------------------------------------------------------

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Take the posterior and the skips of a model's tensors."""
        mean, sigma = (
            torch.cat([tensors[f"layers.{i}.{k}_{of}"].ravel() for i in range(len(self.shapes)) for k in KINDS])
            for of in ("mean", "sigma")
        )
        rho, n = inverse_softplus_tensor(sigma), self.n_fixed
        with torch.no_grad():
            self.mean.copy_(mean[n:])
            self.rho.copy_(rho[n:])
            self.frozen_mean.copy_(mean[:n])
            self.frozen_rho.copy_(rho[:n])
            self.skip.copy_(tensors["skip"])

    def prior_from_posterior(self) -> None:
        """Make the present posterior the prior of what is to come."""
        with torch.no_grad():
            self.prior_mean.copy_(self.mean)
            self.prior_sigma.copy_(F.softplus(self.rho))
            self.log_prior.copy_(torch.log(self.prior_sigma).sum())

    def tensors(self) -> dict[str, Tensor]:
        """The posterior and the skips with the names that a model's tensors have, on the CPU."""
        found = {"skip": self.skip.detach().cpu().clone()}
        for of, flat in (
            ("mean", torch.cat([self.frozen_mean, self.mean.detach()])),
            ("sigma", F.softplus(torch.cat([self.frozen_rho, self.rho.detach()]))),
        ):
            weights, biases = self._views(flat.cpu(), 0, len(self.shapes))
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
                found |= {f"layers.{i}.weight_{of}": weight.clone(), f"layers.{i}.bias_{of}": bias.clone()}
        return found

    def _views(self, flat: Tensor, first: int, stop: int) -> tuple[list[Tensor], list[Tensor]]:
        """Weights and biases of the layers from `first` to `stop` as views of their vector."""
        pieces = flat.split(self.sizes[2 * first : 2 * stop])
        return [w.view(s) for w, s in zip(pieces[::2], self.shapes[first:stop], strict=True)], list(pieces[1::2])

    def _layers(self, trained: Tensor, frozen: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        k, end = self.n_frozen, len(self.shapes)
        weights, biases = self._views(trained, k, end)
        if k == 0:
            return weights, biases
        fixed, offsets = self._views(frozen, 0, k)
        return fixed + weights, offsets + biases

    def _skips(self) -> Tensor:
        return self.skip if self.n_frozen == 0 else torch.where(self.skip_trained, self.skip, self.skip.detach())

    # --- outputs -----------------------------------------------------------------------------------------------

    def at_means(self, x: Tensor) -> Tensor:
        """Output (n, 2) for standardised features (n, F) at the means of the posterior."""
        weights, biases = self._layers(self.mean, self.frozen_mean)
        return propagate(x, weights, biases, self._skips(), self.n_layers)

    def draw(self, x: Tensor, estimator: str) -> tuple[Tensor, Tensor]:
        """Output (n, 2) by an estimator of `TrainingSettings`, and the divergence that belongs to it, nats.

        "none" gives the output at the means, and of the divergence what depends on them: half of the squared means
        in units of the prior.
        """
        if estimator == "none":
            shift = (self.mean - self.prior_mean) / self.prior_sigma
            # rho takes part with no weight, so that every parameter has a gradient whatever the estimator.
            return self.at_means(x), 0.5 * shift.dot(shift) + 0.0 * self.rho.sum()
        drawn, divergence = _Draw.apply(self.mean, self.rho, self.prior_mean, self.prior_sigma, self.log_prior)
        if estimator == "local":
            return self._local(x), divergence
        frozen = self.frozen_mean
        if self.n_frozen > 0:
            frozen = torch.addcmul(frozen, F.softplus(self.frozen_rho), torch.randn_like(frozen))
        weights, biases = self._layers(drawn, frozen)
        return propagate(x, weights, biases, self._skips(), self.n_layers), divergence

    def _local(self, x: Tensor) -> Tensor:
        """Output for weights drawn anew for every row, by the distribution of each layer's sums."""
        weights, biases = self._layers(self.mean, self.frozen_mean)
        spreads, offsets = self._layers(F.softplus(self.rho).square(), F.softplus(self.frozen_rho).square())
        skip, h = self._skips(), x
        for i in range(self.n_hidden + 1):
            mean = F.linear(h, weights[i], biases[i])
            variance = F.linear(h * h, spreads[i], offsets[i])
            z = mean + torch.sqrt(variance + 1e-20) * torch.randn_like(mean)
            if i == self.n_hidden:
                return z
            a, j = F.gelu(z), i % self.n_layers
            h = a if j == 0 else torch.addcmul(a, h, skip[i // self.n_layers, j - 1])
        raise ModelError("a network has at least its output layer")

    def kl(self) -> Tensor:
        """Divergence of the posterior of the trained layers from their prior, nats."""
        sigma = F.softplus(self.rho)
        shift, ratio = (self.mean - self.prior_mean) / self.prior_sigma, sigma / self.prior_sigma
        return 0.5 * (shift.square() + ratio.square() - 1.0 - 2.0 * torch.log(ratio)).sum()

    def forward(
        self, x: Tensor, y: Tensor, w: Tensor | None, estimator: str, kl_factor: float, beta: float
    ) -> tuple[Tensor, Tensor]:
        """Loss of a batch, and its mean negative log likelihood."""
        out, divergence = self.draw(x, estimator)
        likelihood, weighted = likelihoods(out.float(), y, w, beta)
        return weighted + kl_factor * divergence, likelihood.detach()


KINDS = ("weight", "bias")


def likelihoods(out: Tensor, target: Tensor, weights: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """Mean negative log likelihood of points, and the same with each point weighted by its variance to `beta`.

    out : (n, 2), target : (n,), weights : (n,) or None for all 1. Without its constant, ln(2 pi) / 2.
    """
    log_variance = out[:, 1].clamp(*LOG_VARIANCE_LIMITS)
    each = 0.5 * (log_variance + (out[:, 0] - target).square() * torch.exp(-log_variance))
    if weights is not None:
        each = each * weights
    likelihood = each.mean()
    if beta == 0.0:
        return likelihood, likelihood
    return likelihood, (each * torch.exp(beta * log_variance.detach())).mean()


__all__ = ["FlatNetwork", "likelihoods"]
