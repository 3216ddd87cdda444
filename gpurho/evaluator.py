"""The fast path from features to densities on any torch device: a network's outputs, scaled and calibrated."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from gpurho.domain import extrapolation_sigma
from gpurho.errors import DeviceError, ModelError, SettingsError
from gpurho.layers import LOG_VARIANCE_LIMITS
from gpurho.uncertainty import CalibrationFactors, curve_factors

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from gpurho.fused import FusedNetwork
    from gpurho.hostnet import HostNetwork
    from gpurho.kernels.smooth import BlockNetwork
    from gpurho.scriptnet import Outputs, ScriptNetwork

PRECISIONS = ("auto", "fp32", "bf16")
EXECUTORS = ("auto", "script", "fused")
UNCERTAINTIES = ("analytic", "last-layer", "sampled", None)
MAX_SAMPLES = 10_000
FIELDS = ("mean", "aleatoric", "epistemic")


class Evaluator:
    """Features in, density and its two standard deviations out; made by `DensityModel.evaluator`.

    A point's result has the same bits however many points come with it, and on however many threads. On one machine
    results repeat bit for bit; between machines the matrix products may round differently.

    Attributes
    ----------
    device : torch.device
    precision : "fp32" or "bf16"
        As resolved from "auto".
    uncertainty : "analytic", "last-layer", "sampled" or None
    n_features : int
        Columns that the features must have.
    n_outside : int
        Points so far that lay a standard deviation or more outside of the training domain (with uncertainty only).
    """

    def __init__(
        self,
        network: ScriptNetwork | FusedNetwork | HostNetwork,
        *,
        n_features: int,
        density_mean: float,
        density_std: float,
        density_rms: float,
        factors: CalibrationFactors,
        precision: str,
        uncertainty: str | None,
    ) -> None:
        self.device, self.precision, self.uncertainty = network.device, precision, uncertainty
        self.n_features, self.n_outside = n_features, 0
        self._network = network
        self._offset, self._scale = float(density_mean), float(density_std)
        self._rms = float(density_rms)
        self._factors, self._curve = factors, factors.tensors(self.device)

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
        values, flags = self.unchecked(features)
        self.settle(flags.tolist(), features.size(0))
        if self.uncertainty is None:
            return values[0], None, None
        mean, aleatoric, epistemic = values
        return mean, aleatoric, epistemic

    def unchecked(self, features: Tensor) -> tuple[list[Tensor], Tensor]:
        """The fields of `__call__` that there are, and what `settle` has to see once it is on the host.

        Nothing waits for the device here.
        """
        self._check(features)
        with torch.inference_mode():
            return self._finished(self._network(features))

    @property
    def by_blocks(self) -> BlockNetwork | None:
        """The network for `gpurho.descriptors.Environment.tile_outputs`, where there is such a one."""
        return getattr(self._network, "by_blocks", None)

    def finished(self, rows: NDArray[np.float32]) -> tuple[list[Tensor], Tensor]:
        """What `unchecked` returns, from rows that the network of `by_blocks` filled."""
        with torch.inference_mode():
            return self._finished(cast("HostNetwork", self._network).outputs(rows))

    def _finished(self, out: Outputs) -> tuple[list[Tensor], Tensor]:
        # In place; the network's outputs are in units of the standardised target.
        mean = out.density.mul_(self._scale).add_(self._offset)
        if out.superposition is not None:
            mean.add_(out.superposition)
        if out.log_variance is None or out.variance is None or out.excess is None:
            return [mean], _flags([mean], None)
        factors = self._factors
        aleatoric = out.log_variance.clamp_(*LOG_VARIANCE_LIMITS).mul_(0.5).exp_()
        aleatoric.mul_(self._scale * factors.aleatoric)
        epistemic = out.variance.sqrt_().mul_(self._scale * factors.epistemic)
        if factors.density:
            factor = curve_factors(mean, *self._curve)
            aleatoric.mul_(factor)
            epistemic.mul_(factor)
        epistemic = epistemic.hypot_(extrapolation_sigma(out.excess, self._rms))
        values = [mean, aleatoric, epistemic]
        return values, _flags(values, out.excess)

    def settle(self, flags: list[int], n_points: int) -> int:
        """Take note of the flags of `n_points` points; returns how many of them lie outside of the training domain.

        Raises `ModelError` when an output is not finite.
        """
        outside, *bad = flags
        for name, count in zip(FIELDS, bad, strict=False):
            if count:
                raise ModelError(
                    f"{name} of {count} of {n_points} points is not finite; check the features and the model file"
                )
        self.n_outside += outside
        return outside

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


def check_uncertainty(uncertainty: str | None, samples: int) -> None:
    """Raise `SettingsError` for an uncertainty that is not known, or a number of samples out of range."""
    if uncertainty not in UNCERTAINTIES:
        raise SettingsError(
            f"uncertainty {uncertainty!r} is not known; give 'analytic', 'last-layer', 'sampled' or None"
        )
    if uncertainty == "sampled" and not (isinstance(samples, int) and 2 <= samples <= MAX_SAMPLES):
        raise SettingsError(f"samples {samples!r} is not a whole number from 2 to {MAX_SAMPLES}")


def resolve_executor(executor: str, device: str, n_hidden: int) -> str:
    """ "script" or "fused": what "auto" means on a kind of device for so many hidden layers, or `executor` itself.

    On CPUs "fused", by measurement: two to five times as fast as TorchScript. On GPUs it has not been measured.
    """
    if executor not in EXECUTORS:
        raise SettingsError(f"executor {executor!r} is not known; give one of {', '.join(EXECUTORS)}")
    if executor == "fused" and n_hidden == 0:
        raise SettingsError("executor 'fused' needs a network with hidden layers; give executor='script'")
    if executor != "auto":
        return executor
    return "fused" if device == "cpu" and n_hidden > 0 else "script"


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


def _flags(fields: list[Tensor], excess: Tensor | None) -> Tensor:
    """(1 + fields,) int64 on the device: points outside of the training domain, and points of each not finite."""
    counts = [torch.count_nonzero(~torch.isfinite(values)) for values in fields]
    outside = torch.zeros_like(counts[0]) if excess is None else torch.count_nonzero(excess >= 1.0)
    return torch.stack([outside, *counts])
