"""The fast path from features to densities: fixed batches through a frozen network, on any torch device."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpurho.domain import domain_excess, extrapolation_sigma
from gpurho.errors import DeviceError, ModelError, SettingsError
from gpurho.layers import LOG_VARIANCE_LIMITS, transform_features
from gpurho.prediction import OUTPUT_ROWS
from gpurho.uncertainty import CalibrationFactors, curve_factors

CPU_BATCH = 4096
"""Most points per batch on a CPU; narrow networks take them all, wide ones fewer: `cpu_batch`."""

CPU_ACTIVATION_BYTES = 2**20
"""Most bytes of one layer's activations on a CPU, so that a few of them stay in a core's cache."""

CUDA_BATCH = 65536
"""Points per batch on a GPU: enough to fill it; nine layers of bf16 activations take about 0.3 GB."""

PRECISIONS = ("auto", "fp32", "bf16")
UNCERTAINTIES = ("analytic", "last-layer", "sampled", None)
MAX_SAMPLES = 10_000


class Evaluator:
    """Features in, density and its two standard deviations out; made by `DensityModel.evaluator`.

    Points are taken in batches of one fixed size, the last one padded, so that a point's result has the same bits
    however many points come with it. Features are transformed and standardised in float32, hidden layers run in
    `precision`, the output layer in float32. On one machine and number of threads, results repeat bit for bit;
    between machines or thread counts the matrix products may round differently.

    Attributes
    ----------
    device : torch.device
    precision : "fp32" or "bf16"
        As resolved from "auto".
    uncertainty : "analytic", "last-layer", "sampled" or None
    batch_size : int
    n_outside : int
        Points so far that lay a standard deviation or more outside of the training domain (with uncertainty only).
    """

    def __init__(
        self,
        networks: Sequence[Any],
        *,
        feature_mean: Tensor,
        feature_std: Tensor,
        feature_low: Tensor,
        feature_high: Tensor,
        columns: list[int],
        length: float,
        density_mean: float,
        density_std: float,
        baseline: Tensor | None,
        density_rms: float,
        factors: CalibrationFactors,
        device: torch.device,
        precision: str,
        uncertainty: str | None,
        batch_size: int | None = None,
    ) -> None:
        self.device, self.precision, self.uncertainty = device, precision, uncertainty
        default = CPU_BATCH if device.type == "cpu" else CUDA_BATCH
        self.batch_size = default if batch_size is None else int(batch_size)
        if self.batch_size < 1:
            raise SettingsError(f"batch_size {batch_size!r} is not a whole number from 1 up")
        self._network, self._samples = networks[0], list(networks[1:])
        self._columns, self._length = columns, length
        # (x - mean) / std as one multiply-add.
        self._slope = (1.0 / feature_std).to(device)
        self._shift = (-feature_mean / feature_std).to(device)
        self._low = ((feature_low - feature_mean) / feature_std).to(device)
        self._high = ((feature_high - feature_mean) / feature_std).to(device)
        self.n_outside = 0
        self._offset, self._scale = float(density_mean), float(density_std)
        self._rms = float(density_rms)
        self._baseline: Tensor | None = None
        if baseline is not None:
            # One useful row of many: see the output layer of `PredictionNetwork`.
            self._baseline = F.pad(baseline[None], (0, 0, 0, OUTPUT_ROWS - 1)).to(device)
        self._factors, self._curve = factors, factors.tensors(device)
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32

    @property
    def n_features(self) -> int:
        """Columns that the features must have."""
        return self._slope.numel()

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Evaluate points.

        Parameters
        ----------
        features : (n, n_features) float32 tensor on the evaluator's device

        Returns
        -------
        mean, aleatoric, epistemic : (n,) float32 tensors, e/angstrom^3
            Prediction and standard deviations; the latter two None when `uncertainty` is None.

        Raises
        ------
        SettingsError
            For features of another shape, type or device.
        ModelError
            When an output is not finite.
        """
        self._check(features)
        n = features.size(0)
        with_sigma = self.uncertainty is not None
        mean = torch.empty(n, dtype=torch.float32, device=self.device)
        log_variance = torch.empty_like(mean) if with_sigma else None
        variance = torch.empty_like(mean) if with_sigma else None
        excess = torch.empty_like(mean)
        superposition = torch.empty_like(mean) if self._baseline is not None else torch.zeros(1, device=self.device)
        # Without the profiling executor a call runs the same kernels the first time and every time after.
        with torch.inference_mode(), torch.jit.optimized_execution(False):
            for start in range(0, n, self.batch_size):
                rows = slice(start, min(start + self.batch_size, n))
                count = rows.stop - rows.start
                inputs = self._standardised(features[rows])
                x = self._padded(inputs)
                out, spread = self._network(x)
                mean[rows] = out[:count, 0]
                if self._baseline is not None:
                    superposition[rows] = self._two_body(features[rows], self._baseline)
                if log_variance is not None and variance is not None:
                    excess[rows] = domain_excess(inputs, self._low, self._high)
                    log_variance[rows] = out[:count, 1]
                    variance[rows] = (self._sample_variance(x, out) if self._samples else spread)[:count]
            # In place and once over all points; the network's outputs are in units of the standardised target.
            mean.mul_(self._scale).add_(self._offset).add_(superposition)
            if log_variance is None or variance is None:
                _require_finite(mean, "mean")
                return mean, None, None
            factors = self._factors
            aleatoric = log_variance.clamp_(*LOG_VARIANCE_LIMITS).mul_(0.5).exp_().mul_(self._scale * factors.aleatoric)
            epistemic = variance.sqrt_().mul_(self._scale * factors.epistemic)
            if factors.density:
                factor = curve_factors(mean, *self._curve)
                aleatoric.mul_(factor)
                epistemic.mul_(factor)
            epistemic = epistemic.hypot_(extrapolation_sigma(excess, self._rms))
            self.n_outside += int((excess >= 1.0).sum())
            for name, values in (("mean", mean), ("aleatoric", aleatoric), ("epistemic", epistemic)):
                _require_finite(values, name)
        return mean, aleatoric, epistemic

    def _check(self, features: Tensor) -> None:
        if not isinstance(features, Tensor) or features.ndim != 2 or features.size(1) != self.n_features:
            shape = tuple(getattr(features, "shape", ()))
            raise SettingsError(
                f"features are {type(features).__name__} of shape {shape}; give a tensor (n, {self.n_features})"
            )
        if features.dtype != torch.float32 or features.device.type != self.device.type:
            raise SettingsError(
                f"features are {features.dtype} on {features.device}; give torch.float32 on {self.device}"
            )

    def _standardised(self, features: Tensor) -> Tensor:
        return torch.addcmul(self._shift, transform_features(features, self._columns, self._length), self._slope)

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


def check_uncertainty(uncertainty: str | None, samples: int) -> None:
    """Raise `SettingsError` for an uncertainty that is not known, or a number of samples out of range."""
    if uncertainty not in UNCERTAINTIES:
        raise SettingsError(
            f"uncertainty {uncertainty!r} is not known; give 'analytic', 'last-layer', 'sampled' or None"
        )
    if uncertainty == "sampled" and not (isinstance(samples, int) and 2 <= samples <= MAX_SAMPLES):
        raise SettingsError(f"samples {samples!r} is not a whole number from 2 to {MAX_SAMPLES}")


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device, checked to be there; raises `DeviceError`."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise DeviceError(f"device {device!r} is not known; give 'cpu', 'cuda' or 'cuda:0'") from None
    if where.type not in ("cpu", "cuda"):
        raise DeviceError(f"device {str(device)!r} is not supported; give 'cpu', 'cuda' or 'cuda:0'")
    if where.type == "cuda":
        if not torch.cuda.is_available():
            raise DeviceError(f"device {str(device)!r} was asked for, but torch finds no CUDA device; give 'cpu'")
        count = torch.cuda.device_count()
        if where.index is not None and where.index >= count:
            raise DeviceError(f"device {str(device)!r} was asked for, but there are {count}; give 'cuda:0' up")
    return where


def resolve_precision(precision: str, device: torch.device) -> str:
    """ "fp32" or "bf16": what "auto" means on `device`, or `precision` itself."""
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r} is not known; give one of {', '.join(PRECISIONS)}")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp32"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware (AVX512-BF16 or AMX)."""
    for probe in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        function = getattr(torch.cpu, probe, None)
        if function is not None and function():
            return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _require_finite(values: Tensor, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        bad = int((~torch.isfinite(values)).sum())
        raise ModelError(
            f"{name} of {bad} of {values.numel()} points is not finite; check the features and the model file"
        )
