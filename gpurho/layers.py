"""Bayesian layers of the density network, their closed-form variance, and the network that is trained.

Weights and biases have independent Gaussian posteriors (mean-field variational inference, preprint section III.E).
The formulas are plain functions over lists of tensors, so that training, prediction, sampling and TorchScript share
one text; the modules only hold the tensors.

Shapes: ``n`` points, ``F`` features, ``W`` width. The network has ``blocks * layers`` hidden layers of width W and
two outputs, the density and the logarithm of its aleatoric variance, both in units of the standardised target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpurho.domain import UNBOUNDED
from gpurho.errors import ModelError

N_OUTPUTS = 2
LOG_VARIANCE_LIMITS = (-16.0, 10.0)
"""The logarithm of the aleatoric variance is clamped here, in units of the standardised target."""

MAX_BLOCKS, MAX_LAYERS, MAX_WIDTH = 16, 16, 8192


@dataclass(frozen=True)
class NetworkSpec:
    """Size of a network: `blocks` x `layers` hidden layers of `width` units (preprint: 3 x 3 x 250).

    No blocks make the output linear in the standardised features: Bayesian linear regression.
    """

    blocks: int = 3
    layers: int = 3
    width: int = 250

    def __post_init__(self) -> None:
        for name, least, largest in (("blocks", 0, MAX_BLOCKS), ("layers", 1, MAX_LAYERS), ("width", 1, MAX_WIDTH)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= largest:
                raise ModelError(f"network {name} {value!r} is not a whole number from {least} to {largest}")

    @property
    def n_hidden(self) -> int:
        """Number of hidden layers."""
        return self.blocks * self.layers

    @property
    def skip_shape(self) -> tuple[int, int]:
        """Shape of the coefficients of the skips; never empty, though a block of one layer has none."""
        return (max(1, self.blocks), max(1, self.layers - 1))

    def shapes(self, n_features: int) -> list[tuple[int, int]]:
        """(outputs, inputs) of every layer, the output layer last."""
        inputs = [n_features] + [self.width] * self.n_hidden
        return [(self.width, n) for n in inputs[:-1]] + [(N_OUTPUTS, inputs[-1])]


# --- formulas (TorchScript compiles these as they stand) ---------------------------------------------------------


def transform_features(x: Tensor, columns: list[int], length: float) -> Tensor:
    """Replace distances by ``exp(-d / length)`` in the column ranges ``columns = [start, stop, start, stop, ...]``.

    x : (n, F), distances in angstrom. A `length` of 0 leaves the features as they are.
    """
    if length <= 0.0 or len(columns) == 0:
        return x
    pieces: list[Tensor] = []
    at = 0
    for i in range(len(columns) // 2):
        start, stop = columns[2 * i], columns[2 * i + 1]
        if start > at:
            pieces.append(x[:, at:start])
        pieces.append(torch.exp(x[:, start:stop] * (-1.0 / length)))
        at = stop
    if at < x.size(1):
        pieces.append(x[:, at:])
    return torch.cat(pieces, dim=1)


if torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise"):

    def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "gelu", [], "none")

else:

    def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.gelu(F.linear(x, weight, bias))


def last_activations(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor, layers: int, fused: bool = False
) -> Tensor:
    """Inputs (n, W) of the output layer, in its dtype, for standardised features `x` (n, F) in that of the weights.

    Within a block, ``h_i = gelu(W_i h_(i-1) + b_i) + skip * h_(i-1)`` from its second layer on; `skip` is
    (blocks, layers - 1). `fused` lets oneDNN take the GELU of a product before it leaves the registers, and before it
    is rounded; CPU alone.
    """
    h = x
    n_hidden = len(weights) - 1
    for i in range(n_hidden):
        a = _linear_gelu(h, weights[i], biases[i]) if fused else F.gelu(F.linear(h, weights[i], biases[i]))
        j = i % layers
        if j > 0:
            a = torch.addcmul(a, h, skip[i // layers, j - 1])
        h = a
    return h.to(weights[n_hidden].dtype)


def propagate(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor, layers: int, fused: bool = False
) -> Tensor:
    """Network output (n, 2); the last layer runs in the dtype of its own weights, float32 for prediction."""
    return F.linear(last_activations(x, weights, biases, skip, layers, fused), weights[-1], biases[-1])


def propagate_variance(
    x: Tensor,
    weights: list[Tensor],
    biases: list[Tensor],
    weight_variances: list[Tensor],
    bias_variances: list[Tensor],
    skip: Tensor,
    layers: int,
) -> tuple[Tensor, Tensor]:
    """Network output (n, 2) and the epistemic variance (n,) of its first column, in closed form.

    With the network linearised in its weights about their means, independent weights of variance ``V`` give

        var f = sum over layers and units j of (df/dz_j)^2 [(h^2) V^T + v]_j

    where z = W h + b and h are the means of the forward pass. This keeps every correlation between units, which
    a propagation of unit-wise variances drops. Cost: a forward pass, a hand-written backward pass for the one
    output, and one product with V per layer.
    """
    n_hidden = len(weights) - 1
    inputs: list[Tensor] = []
    preactivations: list[Tensor] = []
    h = x
    for i in range(n_hidden):
        inputs.append(h)
        z = F.linear(h, weights[i], biases[i])
        preactivations.append(z)
        a = F.gelu(z)
        j = i % layers
        if j > 0:
            a = torch.addcmul(a, h, skip[i // layers, j - 1])
        h = a
    last = h.to(weights[n_hidden].dtype)
    out = F.linear(last, weights[n_hidden], biases[n_hidden])
    variance = torch.mv(last * last, weight_variances[n_hidden][0]) + bias_variances[n_hidden][0]
    # df/dh of the last hidden layer is the same for every point: the output layer is linear.
    delta = weights[n_hidden][0].to(x.dtype).expand(x.size(0), -1)
    for k in range(n_hidden):
        i = n_hidden - 1 - k
        local = torch.ops.aten.gelu_backward(delta, preactivations[i])
        h = inputs[i]
        spread = F.linear(h * h, weight_variances[i], bias_variances[i])
        # The output layer, and so `variance`, is float32 where the hidden layers are bfloat16.
        variance = variance + (local * local * spread).sum(dim=1, dtype=variance.dtype)
        if i > 0:
            j = i % layers
            below = torch.mm(local, weights[i])
            if j > 0:
                below = torch.addcmul(below, delta, skip[i // layers, j - 1])
            delta = below
    return out, variance


# --- modules ------------------------------------------------------------------------------------------------------


class BayesianLinear(nn.Module):
    """A linear layer whose weights and biases are independent Gaussians.

    Parameters: `weight_mean`, `weight_rho` (out, in) and `bias_mean`, `bias_rho` (out,); sigma = softplus(rho).
    The prior is N(0, prior_std^2) with ``prior_std = prior_scale / sqrt(in)``, the scale at which activations
    keep their size from layer to layer, and N(0, prior_scale^2) for biases.

    `forward` uses the means; `sample` draws by local reparameterisation (a fresh draw for every point), which has
    the same expectation as drawing weights and a far smaller gradient variance.
    """

    def __init__(self, n_in: int, n_out: int, prior_scale: float = 1.0, initial_scale: float = 0.05) -> None:
        super().__init__()
        bound = 1.0 / math.sqrt(n_in)
        self.weight_mean = nn.Parameter(torch.empty(n_out, n_in).uniform_(-bound, bound))
        self.bias_mean = nn.Parameter(torch.empty(n_out).uniform_(-bound, bound))
        rho = inverse_softplus(initial_scale * bound)
        self.weight_rho = nn.Parameter(torch.full((n_out, n_in), rho))
        self.bias_rho = nn.Parameter(torch.full((n_out,), rho))
        self.weight_prior = prior_scale * bound
        self.bias_prior = prior_scale

    def forward(self, x: Tensor) -> Tensor:
        """Output at the means of weights and biases."""
        return F.linear(x, self.weight_mean, self.bias_mean)

    @torch.jit.export
    def sample(self, x: Tensor) -> Tensor:
        """Output for weights drawn anew for every row of `x`."""
        mean = F.linear(x, self.weight_mean, self.bias_mean)
        variance = F.linear(x * x, F.softplus(self.weight_rho).square(), F.softplus(self.bias_rho).square())
        return mean + torch.sqrt(variance + 1e-20) * torch.randn_like(mean)

    @torch.jit.export
    def kl(self) -> Tensor:
        """Kullback-Leibler divergence of the posterior from the prior, nats."""
        return gaussian_kl(self.weight_mean, F.softplus(self.weight_rho), self.weight_prior) + gaussian_kl(
            self.bias_mean, F.softplus(self.bias_rho), self.bias_prior
        )


def inverse_softplus(value: float) -> float:
    """The number whose softplus is `value`."""
    return value + math.log(-math.expm1(-value))


def inverse_softplus_tensor(values: Tensor) -> Tensor:
    """`inverse_softplus` of every element."""
    wide = values.double()
    return (wide + torch.log(-torch.expm1(-wide))).to(values.dtype)


def gaussian_kl(mean: Tensor, sigma: Tensor, prior: float) -> Tensor:
    """Sum of KL[N(mean, sigma^2) || N(0, prior^2)] over the elements, nats."""
    ratio = sigma / prior
    shift = mean / prior
    return 0.5 * (ratio.square() + shift.square() - 1.0 - 2.0 * torch.log(ratio)).sum()


class _DrawWithKL(torch.autograd.Function):
    """A draw ``mean + softplus(rho) * noise`` and its KL divergence from N(0, prior^2), with their gradients.

    By hand because autograd's many passes over the parameters would take half of a training step.
    """

    @staticmethod
    def forward(ctx: Any, mean: Tensor, rho: Tensor, prior: float) -> tuple[Tensor, Tensor]:
        sigma, noise = F.softplus(rho), torch.randn_like(mean)
        ctx.save_for_backward(mean, sigma, noise)
        ctx.prior = prior
        squares = (mean.ravel().dot(mean.ravel()) + sigma.ravel().dot(sigma.ravel())) / prior**2
        kl = 0.5 * (squares - mean.numel()) - torch.log(sigma).sum() + mean.numel() * math.log(prior)
        return torch.addcmul(mean, sigma, noise), kl

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor, None]:
        mean, sigma, noise = ctx.saved_tensors
        factor = float(grad_kl)
        grad_mean = torch.add(grad, mean, alpha=factor / ctx.prior**2)
        grad_sigma = (grad * noise).add_(sigma, alpha=factor / ctx.prior**2).sub_(sigma.reciprocal(), alpha=factor)
        # d softplus / d rho = 1 - exp(-softplus)
        return grad_mean, grad_sigma.mul_(torch.expm1(-sigma).neg_()), None


class DensityNetwork(nn.Module):
    """The network as it is trained: DenseNet-like blocks of `BayesianLinear`, GELU, weighted additive skips.

    Parameters
    ----------
    spec : NetworkSpec
    n_features : int
    columns : list of int
        Column ranges of distances, ``[start, stop, ...]``, that `transform_features` replaces.
    length : float
        Decay length of that transform in angstrom; 0 for raw distances.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations that exist at run time
        linears: Any
        feature_mean: Tensor
        feature_std: Tensor
        feature_low: Tensor
        feature_high: Tensor

    def __init__(
        self,
        spec: NetworkSpec,
        n_features: int,
        columns: list[int],
        length: float = 0.0,
        prior_scale: float = 1.0,
        initial_scale: float = 0.05,
    ) -> None:
        super().__init__()
        self.n_layers = spec.layers
        # TorchScript cannot tell the type of an empty list.
        self.columns = [int(c) for c in columns] or [0, 0]
        self.length = float(length)
        self.linears = nn.ModuleList(
            BayesianLinear(n_in, n_out, prior_scale, initial_scale) for n_out, n_in in spec.shapes(n_features)
        )
        self.skip = nn.Parameter(torch.full(spec.skip_shape, 0.5))
        self.register_buffer("feature_mean", torch.zeros(n_features))
        self.register_buffer("feature_std", torch.ones(n_features))
        self.register_buffer("feature_low", torch.full((n_features,), -UNBOUNDED))
        self.register_buffer("feature_high", torch.full((n_features,), UNBOUNDED))

    def standardise(self, features: Tensor) -> Tensor:
        """Raw features (n, F) to the network's inputs."""
        x = transform_features(features, self.columns, self.length)
        return (x - self.feature_mean) / self.feature_std

    def forward(self, features: Tensor) -> Tensor:
        """Standardised density and log variance, (n, 2), at the means of the posterior."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        for layer in self.linears:
            weights.append(layer.weight_mean)
            biases.append(layer.bias_mean)
        return propagate(self.standardise(features), weights, biases, self.skip, self.n_layers)

    @torch.jit.export
    def sample(self, features: Tensor) -> Tensor:
        """As `forward`, for weights drawn from the posterior anew for every point."""
        h = self.standardise(features)
        last = len(self.linears) - 1
        for i, layer in enumerate(self.linears):
            z = layer.sample(h)
            if i == last:
                h = z
            else:
                a = F.gelu(z)
                j = i % self.n_layers
                if j > 0:
                    a = a + self.skip[i // self.n_layers, j - 1] * h
                h = a
        return h

    @torch.jit.unused
    def sample_shared(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, for one draw of the weights that all points share, and `kl` beside it.

        Half the arithmetic of `sample`; draw and divergence share one pass over the parameters (`_DrawWithKL`).
        """
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        total = torch.zeros([], device=self.skip.device)
        for layer in self.linears:
            weight, weight_kl = _DrawWithKL.apply(layer.weight_mean, layer.weight_rho, layer.weight_prior)
            bias, bias_kl = _DrawWithKL.apply(layer.bias_mean, layer.bias_rho, layer.bias_prior)
            weights.append(weight)
            biases.append(bias)
            total = total + weight_kl + bias_kl
        return propagate(self.standardise(features), weights, biases, self.skip, self.n_layers), total

    @torch.jit.export
    def kl(self) -> Tensor:
        """Kullback-Leibler divergence of all weights and biases from the prior, nats."""
        total = torch.zeros([], device=self.skip.device)
        for layer in self.linears:
            total = total + layer.kl()
        return total
