"""What runs a model's network: TorchScript, or one kernel (`gpurho.fused`, on CPUs `gpurho.hostnet`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from gpurho.errors import SettingsError
from gpurho.export import frozen
from gpurho.networkcheck import POINTS, check_network
from gpurho.scriptnet import CUDA_BATCH, BatchedNetwork, Inputs, SampledNetwork, ScriptNetwork, cpu_batch

if TYPE_CHECKING:
    from gpurho.fused import FusedNetwork
    from gpurho.hostnet import HostNetwork
    from gpurho.model import DensityModel
    from gpurho.prediction import PredictionNetwork

MOST_KEPT = 4
"""Networks that are kept, the last ones used."""
_KEPT: dict[tuple[Any, ...], Any] = {}
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
) -> FusedNetwork | HostNetwork:
    """The network of a model in one kernel, compared with the reference in float32."""
    make = host_network if where.type == "cpu" else triton_network
    return make(model, where, precision, uncertainty, samples, seed)


def triton_network(
    model: DensityModel, where: torch.device, precision: str, uncertainty: str | None, samples: int, seed: int
) -> FusedNetwork:
    """That of a GPU."""
    from gpurho.fused import FusedNetwork

    inputs = _inputs(model, where)
    networks = _networks(model, torch.float32, uncertainty, samples, seed)
    fused = FusedNetwork(networks, inputs, precision, uncertainty is not None)

    def script(kind: str) -> ScriptNetwork:
        return script_network(model, where, kind, uncertainty, samples, seed)

    check_network(fused, script("fp32"), script("bf16") if precision == "bf16" else None, inputs, precision)
    return fused


def host_network(
    model: DensityModel, where: torch.device, precision: str, uncertainty: str | None, samples: int, seed: int
) -> HostNetwork:
    """That of a CPU; the same one again for the same model and settings."""
    from gpurho.hostnet import HostNetwork

    inputs, with_sigma = _inputs(model, where), uncertainty is not None

    def script(networks: list[PredictionNetwork], dtype: torch.dtype) -> ScriptNetwork:
        # Not frozen, which would take longer than all else here.
        first = BatchedNetwork(networks[0], inputs, dtype, with_sigma, POINTS)
        return ScriptNetwork([first, *map(SampledNetwork, networks[1:])], inputs, with_sigma, POINTS)

    def make() -> HostNetwork:
        networks = _networks(model, torch.float32, uncertainty, samples, seed)
        fused = HostNetwork(networks, inputs, precision, with_sigma)
        narrow = _networks(model, torch.bfloat16, uncertainty, samples, seed) if precision == "bf16" else None
        rough = None if narrow is None else script(narrow, torch.bfloat16)
        check_network(fused, script(networks, torch.float32), rough, inputs, precision)
        return fused

    return _kept(("fused", *_key(model, where, precision, uncertainty, samples, seed)), make)


def _networks(
    model: DensityModel, dtype: torch.dtype, uncertainty: str | None, samples: int, seed: int
) -> list[PredictionNetwork]:
    """That of the posterior means, then those of drawn weights."""
    networks = [model.prediction_network(dtype, uncertainty)]
    return networks + [model.prediction_network(dtype, None, model.drawn(seed, i)) for i in range(samples)]


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

    def make() -> list[Any]:
        fused = where.type == "cpu" and dtype == torch.bfloat16  # measured: a tenth of the time; in float32 less
        network = model.prediction_network(dtype, uncertainty, fused=fused)
        networks = [frozen(BatchedNetwork(network, inputs, dtype, uncertainty is not None, batch_size), where)]
        for index in range(samples):
            drawn = model.prediction_network(dtype, None, model.drawn(seed, index), fused)
            networks.append(frozen(SampledNetwork(drawn), where))
        return networks

    return _kept((*_key(model, where, str(dtype), uncertainty, samples, seed), batch_size), make)


def _key(
    model: DensityModel, where: torch.device, precision: str, uncertainty: str | None, samples: int, seed: int
) -> tuple[Any, ...]:
    return model.fingerprint(), str(where), precision, uncertainty, samples, seed if samples else 0


def _kept(key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """What `make` made for this key, if that is not long ago."""
    found = _KEPT.pop(key, None)
    if found is None:
        found = make()
    _KEPT[key] = found
    while len(_KEPT) > MOST_KEPT:
        _KEPT.pop(next(iter(_KEPT)), None)
    return found
