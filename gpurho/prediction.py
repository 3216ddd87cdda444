"""The network as it predicts: constants to be frozen, and the epistemic variance in one of its closed forms."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpurho.layers import N_OUTPUTS, last_activations, propagate, propagate_variance

OUTPUT_ROWS = 16
"""Rows that the output layer is padded to for prediction."""


class PredictionNetwork(nn.Module):
    """Standardised features in, float32 out.

    Holds float32 or bfloat16 hidden weights and a float32 output layer. `forward` returns the output (n, 2) and the
    epistemic variance (n,) of its first column: by `propagate_variance` where ``variances`` are given; by the
    posterior of the last layer, ``|L^T (h, 1)|^2`` with the last activations h, where ``last_layer`` = L, (W + 1,
    W + 1), is; and empty otherwise. `fused` is that of `last_activations`.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations that exist at run time
        layers: Any
        skip: Tensor
        factor: Tensor
        factor_bias: Tensor

    def __init__(
        self,
        weights: list[Tensor],
        biases: list[Tensor],
        skip: Tensor,
        layers: int,
        dtype: torch.dtype = torch.float32,
        weight_variances: list[Tensor] | None = None,
        bias_variances: list[Tensor] | None = None,
        last_layer: Tensor | None = None,
        fused: bool = False,
    ) -> None:
        super().__init__()
        last = len(weights) - 1
        self.n_layers, self.fused = layers, fused
        self.analytic = weight_variances is not None
        self.last_layer = last_layer is not None
        self.register_buffer("skip", skip.detach().to(dtype))
        square = torch.zeros(1, 1) if last_layer is None else last_layer.detach().float()
        self.register_buffer("factor", square[:-1].T.contiguous())
        self.register_buffer("factor_bias", square[-1].contiguous())
        self.layers = nn.ModuleList()
        for i in range(last + 1):
            kind = torch.float32 if i == last and dtype == torch.bfloat16 else dtype
            weight, bias = weights[i].detach(), biases[i].detach()
            if i == last:
                # Products with very few outputs take a kernel that rounds a row by its place in the batch.
                extra = OUTPUT_ROWS - N_OUTPUTS
                weight, bias = F.pad(weight, (0, 0, 0, extra)), F.pad(bias, (0, extra))
            w_var = weight_variances[i] if weight_variances is not None else torch.zeros(0)
            b_var = bias_variances[i] if bias_variances is not None else torch.zeros(0)
            self.layers.append(_Constants(weight, bias, w_var, b_var, kind))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(n, F) standardised features in the network's dtype -> output (n, 2), variance (n,) or (0,)."""
        weights: list[Tensor] = []
        biases: list[Tensor] = []
        weight_variances: list[Tensor] = []
        bias_variances: list[Tensor] = []
        for layer in self.layers:
            weights.append(layer.weight)
            biases.append(layer.bias)
            weight_variances.append(layer.weight_variance)
            bias_variances.append(layer.bias_variance)
        if self.analytic:
            out, variance = propagate_variance(
                x, weights, biases, weight_variances, bias_variances, self.skip, self.n_layers
            )
        elif self.last_layer:
            h = last_activations(x, weights, biases, self.skip, self.n_layers, self.fused)
            out = F.linear(h, weights[-1], biases[-1])
            variance = F.linear(h, self.factor, self.factor_bias).square().sum(dim=1)
        else:
            out = propagate(x, weights, biases, self.skip, self.n_layers, self.fused)
            variance = torch.zeros(0, device=x.device)
        return out[:, :2], variance


class _Constants(nn.Module):
    """Tensors of one layer of `PredictionNetwork`."""

    def __init__(
        self, weight: Tensor, bias: Tensor, weight_variance: Tensor, bias_variance: Tensor, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.register_buffer("weight", weight.detach().to(dtype).contiguous())
        self.register_buffer("bias", bias.detach().to(dtype).contiguous())
        self.register_buffer("weight_variance", weight_variance.detach().to(dtype).contiguous())
        self.register_buffer("bias_variance", bias_variance.detach().to(dtype).contiguous())
