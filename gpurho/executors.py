"""What runs a model's network: TorchScript, or one kernel (`gpurho.fused`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from gpurho.errors import SettingsError
from gpurho.export import frozen
from gpurho.scriptnet import CUDA_BATCH, BatchedNetwork, Inputs, SampledNetwork, ScriptNetwork, cpu_batch

if TYPE_CHECKING:
    from gpurho.fused import FusedNetwork
    from gpurho.model import DensityModel

KEPT_FROZEN = 4
"""Sets of frozen networks that are kept, the last ones used."""
_FROZEN: dict[tuple[Any, ...], list[Any]] = {}
# TorchScript never gives back what freezing and running a network takes, half a MiB each time, so that a process which
# predicts again and again has to use the same one.


def script_network(
    model: DensityModel,
    where: torch.device,
    precision: str,
    uncertainty: str | None,
    samples: int = 0,
    seed: int = 0,
    batch_size: int | None = None,
) -> ScriptNetwork:
    """The network of a model by TorchScript; `samples` is 0 unless weights are drawn."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if batch_size is None:
        width = model.spec.network.shapes(model.spec.descriptor.n_features)[-1][1]
        batch_size = cpu_batch(width, precision) if where.type == "cpu" else CUDA_BATCH
    if not (isinstance(batch_size, int) and batch_size >= 1):
        raise SettingsError(f"batch_size {batch_size!r} is not a whole number from 1 up")
    inputs = _inputs(model, where)
    networks = _frozen(model, where, dtype, uncertainty, samples, seed, inputs, batch_size)
    return ScriptNetwork(networks, inputs, uncertainty is not None, batch_size)


def fused_network(
    model: DensityModel,
    where: torch.device,
    precision: str,
    uncertainty: str | None,
    samples: int = 0,
    seed: int = 0,
) -> FusedNetwork:
    """The network of a model as one kernel, compared with TorchScript in float32."""
    from gpurho.fused import FusedNetwork

    networks = [model.prediction_network(torch.float32, uncertainty)]
    networks += [model.prediction_network(torch.float32, None, model.drawn(seed, i)) for i in range(samples)]
    fused = FusedNetwork(networks, _inputs(model, where), precision, uncertainty is not None)
    fused.check(script_network(model, where, "fp32", uncertainty, samples, seed))
    return fused


def _inputs(model: DensityModel, where: torch.device) -> Inputs:
    mean, std = model.tensors["feature_mean"], model.tensors["feature_std"]
    low, high = ((model.tensors[name] - mean) / std for name in ("feature_low", "feature_high"))
    # (x - mean) / std as one multiply-add.
    slope, shift, low, high = (t.to(where) for t in (1.0 / std, -mean / std, low, high))
    baseline = None if model.baseline is None else model.baseline.to(where)
    return Inputs(slope, shift, low, high, model.spec.distance_columns(), model.spec.distance_length, baseline)


def _frozen(
    model: DensityModel, where: torch.device, dtype: torch.dtype, uncertainty: str | None, samples: int, seed: int,
    inputs: Inputs, batch_size: int,
) -> list[Any]:  # fmt: skip
    """The network, and those of drawn weights, frozen; the same ones again for the same model and settings."""
    key = (model.fingerprint(), str(where), dtype, uncertainty, samples, seed if samples else 0, batch_size)
    networks = _FROZEN.pop(key, None)
    if networks is None:
        fused = where.type == "cpu" and dtype == torch.bfloat16  # measured: a tenth of the time; in float32 less
        network = model.prediction_network(dtype, uncertainty, fused=fused)
        networks = [frozen(BatchedNetwork(network, inputs, dtype, uncertainty is not None, batch_size), where)]
        for index in range(samples):
            drawn = model.prediction_network(dtype, None, model.drawn(seed, index), fused)
            networks.append(frozen(SampledNetwork(drawn), where))
    _FROZEN[key] = networks
    while len(_FROZEN) > KEPT_FROZEN:
        _FROZEN.pop(next(iter(_FROZEN)), None)
    return networks
