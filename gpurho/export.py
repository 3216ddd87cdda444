"""Models as TorchScript: frozen networks for prediction, and self-contained archives for C++ and other hosts.

TorchScript is deprecated in current PyTorch, though it works; it is used in this module alone.
"""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gpurho.domain import domain_excess, extrapolation_sigma
from gpurho.errors import ModelError
from gpurho.layers import LOG_VARIANCE_LIMITS, transform_features
from gpurho.modelspec import ModelSpec
from gpurho.uncertainty import curve_factors

if TYPE_CHECKING:
    from gpurho.model import DensityModel

FEATURE_TENSORS = ("feature_mean", "feature_std", "feature_low", "feature_high")


class _Exported(nn.Module):
    """Raw features to (mean, aleatoric, epistemic), float32, in one module."""

    if TYPE_CHECKING:  # TorchScript reads annotations that exist at run time
        feature_mean: Tensor
        feature_std: Tensor
        feature_low: Tensor
        feature_high: Tensor
        baseline: Tensor
        knots: Tensor
        curve: Tensor

    def __init__(self, model: DensityModel, uncertainty: str) -> None:
        super().__init__()
        spec = model.spec
        self.network = model.prediction_network(torch.float32, uncertainty)
        for name in FEATURE_TENSORS:
            self.register_buffer(name, model.tensors[name])
        self.register_buffer("baseline", torch.zeros(0) if model.baseline is None else model.baseline)
        self.columns = spec.distance_columns() or [0, 0]  # TorchScript cannot tell the type of an empty list
        self.length, self.offset, self.scale = (
            float(spec.distance_length),
            float(spec.density_mean),
            float(spec.density_std),
        )
        self.rms = model.density_rms
        factors = spec.factors(uncertainty)
        self.aleatoric_factor, self.epistemic_factor = float(factors.aleatoric), float(factors.epistemic)
        for name, values in zip(("knots", "curve"), factors.tensors(), strict=True):
            self.register_buffer(name, values)
        self.low, self.high = LOG_VARIANCE_LIMITS

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = (transform_features(features, self.columns, self.length) - self.feature_mean) / self.feature_std
        out, variance = self.network(x)
        log_variance = torch.clamp(out[:, 1], self.low, self.high)
        mean = out[:, 0] * self.scale + self.offset + torch.mv(features[:, : self.baseline.numel()], self.baseline)
        factor = curve_factors(mean, self.knots, self.curve) * self.scale
        aleatoric = torch.exp(0.5 * log_variance) * factor * self.aleatoric_factor
        low = (self.feature_low - self.feature_mean) / self.feature_std
        high = (self.feature_high - self.feature_mean) / self.feature_std
        beyond = extrapolation_sigma(domain_excess(x, low, high), self.rms)
        epistemic = torch.hypot(torch.sqrt(variance) * factor * self.epistemic_factor, beyond)
        return mean, aleatoric, epistemic


@dataclass(frozen=True)
class ExportedModel:
    """A TorchScript archive read back: call it with features (n, n_features)."""

    spec: ModelSpec
    module: Any

    def __call__(self, features: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(mean, aleatoric, epistemic), each (n,), e/angstrom^3."""
        with torch.inference_mode():
            return self.module(features)


def exported_archive(model: DensityModel, uncertainty: str) -> bytes:
    """The archive that `DensityModel.export` writes."""
    buffer = io.BytesIO()
    with _quiet_script():
        script = torch.jit.freeze(torch.jit.script(_Exported(model, uncertainty).eval()))
        torch.jit.save(script, buffer, _extra_files={"spec.json": model.spec.to_json().encode()})
    return buffer.getvalue()


def load_exported(path: str | os.PathLike[str], trusted: bool = False) -> ExportedModel:
    """Read an archive that `DensityModel.export` wrote.

    Raises
    ------
    ModelError
        Without ``trusted=True``, since a TorchScript archive is code that runs here; or for a damaged file.
    """
    if trusted is not True:
        raise ModelError(
            f"{path}: a TorchScript archive is code that would run here; pass trusted=True if you trust its source"
        )
    extra = {"spec.json": ""}
    try:
        with _quiet_script():
            module = torch.jit.load(str(path), map_location="cpu", _extra_files=extra)
    except (RuntimeError, ValueError, OSError) as error:
        raise ModelError(f"{path}: not a readable TorchScript archive ({str(error).splitlines()[0]})") from None
    text = extra["spec.json"]
    return ExportedModel(ModelSpec.from_json(text if isinstance(text, str) else text.decode(), str(path)), module)


def frozen(network: nn.Module, device: torch.device) -> Any:
    """A network scripted, with its tensors as constants."""
    with _quiet_script():
        return torch.jit.freeze(torch.jit.script(network.to(device).eval()))


@contextlib.contextmanager
def _quiet_script() -> Iterator[None]:
    """TorchScript without the notices of its deprecation, which a user can do nothing about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*torch\.jit.*")
        yield
