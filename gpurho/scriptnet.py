"""The network by TorchScript, batch by batch: the reference on every device, and what CPUs run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpurho.domain import domain_excess
from gpurho.errors import SettingsError
from gpurho.layers import transform_features
from gpurho.prediction import OUTPUT_ROWS

CPU_BATCH = 4096
"""Most points per batch on a CPU; narrow networks take them all, wide ones fewer: `cpu_batch`."""

CPU_ACTIVATION_BYTES = 2**20
"""Most bytes of one layer's activations on a CPU, so that a few of them stay in a core's cache."""

CUDA_BATCH = 65536
"""Points per batch on a GPU: enough to fill it; nine layers of bf16 activations take about 0.3 GB."""


@dataclass(frozen=True)
class Inputs:
    """How raw features become the inputs of a network, as tensors on one device.

    Parameters
    ----------
    slope, shift : (n_features,) float32
        The standardised input is ``slope * x + shift``.
    low, high : (n_features,) float32
        Range of the standardised inputs in training.
    columns : list of int
    length : float, angstrom
        See `gpurho.layers.transform_features`.
    baseline : (k,) float32 or None
        Coefficients of the leading raw features in the density, e/angstrom^3.
    """

    slope: Tensor
    shift: Tensor
    low: Tensor
    high: Tensor
    columns: list[int]
    length: float
    baseline: Tensor | None

    @property
    def n_features(self) -> int:
        """Columns of the features."""
        return self.slope.numel()


class Outputs(NamedTuple):
    """What a network says of points, (n,) float32 each; in units of the standardised target, but `superposition`.

    `log_variance`, `variance` (epistemic) and `excess` (see `gpurho.domain`) are None without uncertainty;
    `superposition`, e/angstrom^3, is None of a model without a two-body part.
    """

    density: Tensor
    log_variance: Tensor | None
    variance: Tensor | None
    excess: Tensor | None
    superposition: Tensor | None


class ScriptNetwork:
    """Frozen TorchScript networks over batches of one fixed size, the last one padded.

    So a point's result has the same bits however many points come with it. Features are transformed and standardised
    in float32, hidden layers run in `dtype`, the output layer in float32.

    Parameters
    ----------
    networks : sequence of frozen `gpurho.prediction.PredictionNetwork`
        That of the posterior means, then those of drawn weights.
    inputs : Inputs
    dtype : torch.float32 or torch.bfloat16
    with_sigma : bool
    batch_size : int, optional
    """

    def __init__(
        self, networks: Sequence[Any], inputs: Inputs, dtype: torch.dtype, with_sigma: bool, batch_size: int | None
    ) -> None:
        self._network, self._samples = networks[0], list(networks[1:])
        self._inputs, self._dtype, self._with_sigma = inputs, dtype, with_sigma
        self.device = inputs.slope.device
        default = CPU_BATCH if self.device.type == "cpu" else CUDA_BATCH
        self.batch_size = default if batch_size is None else int(batch_size)
        if self.batch_size < 1:
            raise SettingsError(f"batch_size {batch_size!r} is not a whole number from 1 up")
        self._baseline: Tensor | None = None
        if inputs.baseline is not None:
            # One useful row of many: see the output layer of `PredictionNetwork`.
            self._baseline = F.pad(inputs.baseline[None], (0, 0, 0, OUTPUT_ROWS - 1))

    def __call__(self, features: Tensor) -> Outputs:
        """Outputs for features (n, n_features)."""
        n = features.size(0)
        mean = torch.empty(n, dtype=torch.float32, device=self.device)
        log_variance, variance, excess = (torch.empty_like(mean) if self._with_sigma else None for _ in range(3))
        superposition = torch.empty_like(mean) if self._baseline is not None else None
        # Without the profiling executor a call runs the same kernels the first time and every time after.
        with torch.jit.optimized_execution(False):
            for start in range(0, n, self.batch_size):
                rows = slice(start, min(start + self.batch_size, n))
                count = rows.stop - rows.start
                inputs = self._standardised(features[rows])
                x = self._padded(inputs)
                out, spread = self._network(x)
                mean[rows] = out[:count, 0]
                if superposition is not None and self._baseline is not None:
                    superposition[rows] = self._two_body(features[rows], self._baseline)
                if log_variance is not None and variance is not None and excess is not None:
                    excess[rows] = domain_excess(inputs, self._inputs.low, self._inputs.high)
                    log_variance[rows] = out[:count, 1]
                    variance[rows] = (self._sample_variance(x, out) if self._samples else spread)[:count]
        return Outputs(mean, log_variance, variance, excess, superposition)

    def _standardised(self, features: Tensor) -> Tensor:
        x = transform_features(features, self._inputs.columns, self._inputs.length)
        return torch.addcmul(self._inputs.shift, x, self._inputs.slope)

    def _padded(self, x: Tensor) -> Tensor:
        """Inputs in the network's precision, filled up to a whole batch."""
        if x.size(0) == self.batch_size:
            return x.to(self._dtype)
        padded = torch.zeros((self.batch_size, x.size(1)), dtype=self._dtype, device=self.device)
        padded[: x.size(0)] = x
        return padded

    def _two_body(self, features: Tensor, baseline: Tensor) -> Tensor:
        """The part of the density that is linear in the leading columns, in a whole batch for the sake of its bits."""
        leading = torch.zeros((self.batch_size, baseline.size(1)), dtype=torch.float32, device=self.device)
        leading[: features.size(0)] = features[:, : baseline.size(1)]
        return F.linear(leading, baseline)[: features.size(0), 0]

    def _sample_variance(self, x: Tensor, out: Tensor) -> Tensor:
        """Spread of the sampled networks, equation (4); shifted by the prediction, so that nothing cancels."""
        total = torch.zeros_like(out[:, 0])
        squares = torch.zeros_like(total)
        for network in self._samples:
            difference = network(x)[0][:, 0] - out[:, 0]
            total += difference
            squares.addcmul_(difference, difference)
        count = float(len(self._samples))
        return (squares / count - (total / count).square()).clamp_(min=0.0)


def cpu_batch(width: int, precision: str) -> int:
    """Points per batch on a CPU for a network of `width` units: a power of two from 512 to `CPU_BATCH`.

    Measured with one thread and with two, against 4096 points: width 250 in fp32 (1024 points) 1.2 to 1.6 times as
    fast, in bf16 (2048) as fast, or up to 1.5 times with analytic uncertainty; width 64 is fastest with 4096.
    """
    points = CPU_ACTIVATION_BYTES // (max(1, width) * (2 if precision == "bf16" else 4))
    return min(CPU_BATCH, max(512, 1 << (points.bit_length() - 1 if points else 0)))
