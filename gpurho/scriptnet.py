"""The network by TorchScript, batch by batch: the reference on every device, and what CPUs run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpurho.domain import domain_excess
from gpurho.host import keep_freed_memory, side_by_side
from gpurho.layers import transform_features
from gpurho.prediction import OUTPUT_ROWS, PredictionNetwork

CPU_BATCH = 4096
"""Most points per batch on a CPU; narrow networks take them all, wide ones fewer: `cpu_batch`."""

CPU_ACTIVATION_BYTES = 2**20
"""Most bytes of one layer's activations on a CPU, so that a few of them stay in a core's cache."""

MOST_BATCHES = 16
"""Batches that one call of TorchScript does on a CPU, at most."""

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


class BatchedNetwork(nn.Module):
    """Raw features to rows of `Outputs`, batch by batch; for TorchScript, which runs all of a call without Python.

    Every batch has one fixed size, the last one padded, so that a point's result has the same bits however many points
    come with it. Features are transformed and standardised in float32, hidden layers run in the type of `network`, the
    output layer in float32.
    """

    if TYPE_CHECKING:  # TorchScript reads annotations that exist at run time
        slope: Tensor
        shift: Tensor
        low: Tensor
        high: Tensor
        baseline: Tensor

    def __init__(
        self, network: PredictionNetwork, inputs: Inputs, dtype: torch.dtype, with_sigma: bool, batch_size: int
    ) -> None:
        super().__init__()
        self.network, self.dtype, self.batch_size, self.with_sigma = network, dtype, batch_size, with_sigma
        for name in ("slope", "shift", "low", "high"):
            self.register_buffer(name, getattr(inputs, name))
        self.columns = inputs.columns or [0, 0]  # TorchScript cannot tell the type of an empty list
        self.length = float(inputs.length)
        self.two_body = inputs.baseline is not None
        # One useful row of many: see the output layer of `PredictionNetwork`.
        row = torch.zeros(1, 0) if inputs.baseline is None else inputs.baseline[None]
        self.register_buffer("baseline", F.pad(row, (0, 0, 0, OUTPUT_ROWS - 1)))

    def forward(self, features: Tensor, first: int, last: int, out: Tensor) -> Tensor:
        """Fill the columns from `first` to `last` of `out`, (rows, n); returns the inputs of the last batch.

        The rows are the density, the superposition where there is one and, with sigma, the logarithm of the variance,
        the excess, and the epistemic variance where the network gives one.
        """
        x = features[:0]
        for start in range(first, last, self.batch_size):
            stop = min(start + self.batch_size, last)
            count = stop - start
            raw = features[start:stop]
            inputs = torch.addcmul(self.shift, transform_features(raw, self.columns, self.length), self.slope)
            x = inputs.to(self.dtype)
            if count < self.batch_size:
                x = F.pad(x, [0, 0, 0, self.batch_size - count])
            result, variance = self.network(x)
            out[0, start:stop] = result[:count, 0]
            row = 1
            if self.two_body:
                # A whole batch, for the sake of its bits.
                leading = F.pad(raw[:, : self.baseline.size(1)], [0, 0, 0, self.batch_size - count])
                out[row, start:stop] = F.linear(leading, self.baseline)[:count, 0]
                row += 1
            if self.with_sigma:
                out[row, start:stop] = result[:count, 1]
                out[row + 1, start:stop] = domain_excess(inputs, self.low, self.high)
                if variance.numel() > 0:
                    out[row + 2, start:stop] = variance[:count]
        return x


class SampledNetwork(nn.Module):
    """One network of drawn weights; for TorchScript."""

    def __init__(self, network: PredictionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, mean: Tensor, total: Tensor, squares: Tensor) -> Tensor:
        """Add what it says of the inputs `x` of a batch beyond `mean`, (count,), and its square."""
        difference = self.network(x)[0][: mean.size(0), 0] - mean
        squares.addcmul_(difference, difference)
        return total.add_(difference)


class ScriptNetwork:
    """Frozen TorchScript networks: batches side by side on the threads of a CPU, one after the other on a GPU.

    Parameters
    ----------
    networks : frozen `BatchedNetwork`, then frozen `SampledNetwork`s
    inputs : Inputs
    with_sigma : bool
    batch_size : int
        That of the networks.
    """

    def __init__(self, networks: Sequence[Any], inputs: Inputs, with_sigma: bool, batch_size: int) -> None:
        self._network, self._samples = networks[0], list(networks[1:])
        self._two_body, self._with_sigma, self.batch_size = inputs.baseline is not None, with_sigma, batch_size
        self.device = inputs.slope.device
        if self.device.type == "cpu":
            keep_freed_memory()

    def __call__(self, features: Tensor) -> Outputs:
        """Outputs for features (n, n_features)."""
        n, size = features.size(0), self.batch_size
        rows = 1 + self._two_body + 3 * self._with_sigma
        out = torch.empty((rows, n), dtype=torch.float32, device=self.device)
        inference = torch.is_inference_mode_enabled()
        on_cpu = self.device.type == "cpu"
        # Some batches in a call; few enough that threads which are slower do not keep the others waiting.
        batches = 1 if self._samples else max(1, min(MOST_BATCHES, -(-n // size) // (4 * torch.get_num_threads())))
        step = size * batches if on_cpu or self._samples else max(1, n)

        def part(first: int) -> None:
            # Modes are those of a thread. Without the profiling executor a call runs the same kernels the first time
            # and every time after.
            with torch.inference_mode(inference), torch.jit.optimized_execution(False):
                last = min(first + step, n)
                x = self._network(features, first, last, out)
                if self._samples:
                    out[-1, first:last] = self._spread(x, out[0, first:last])

        if on_cpu:
            side_by_side(part, range(0, n, step))
        else:
            for first in range(0, n, step):
                part(first)
        log_variance, excess, variance = out[-3:] if self._with_sigma else (None, None, None)
        return Outputs(out[0], log_variance, variance, excess, out[1] if self._two_body else None)

    def _spread(self, x: Tensor, mean: Tensor) -> Tensor:
        """Variance of the sampled networks, equation (4); shifted by the prediction, so that nothing cancels."""
        total, squares = torch.zeros_like(mean), torch.zeros_like(mean)
        for network in self._samples:
            network(x, mean, total, squares)
        count = float(len(self._samples))
        return (squares / count - (total / count).square()).clamp_(min=0.0)


def cpu_batch(width: int, precision: str) -> int:
    """Points per batch on a CPU for a network of `width` units: a power of two from 512 to `CPU_BATCH`.

    Measured with one thread and with two, against 4096 points: width 250 in fp32 (1024 points) 1.2 to 1.6 times as
    fast, in bf16 (2048) as fast, or up to 1.5 times with analytic uncertainty; width 64 is fastest with 4096.
    """
    points = CPU_ACTIVATION_BYTES // (max(1, width) * (2 if precision == "bf16" else 4))
    return min(CPU_BATCH, max(512, 1 << (points.bit_length() - 1 if points else 0)))
