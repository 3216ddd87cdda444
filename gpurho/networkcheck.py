"""Does a network in one kernel say what the reference says? Asked on its first use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpurho.errors import DeviceError
from gpurho.scriptnet import Inputs, Outputs

BOUNDS = {"fp32": 2e-5, "bf16": 0.02}
"""Root mean square difference from the reference in float32 that passes, by precision: of the density in units of the
target's standard deviation, of the epistemic sigma in units of its own mean. bf16 of the reference strays as far."""
ROUNDINGS = 10.0
"""Where rounding the inputs alone moves the reference far, so many times of that passes too."""
POINTS = 1024

Network = Callable[[Tensor], Outputs]


def check_network(
    network: Network, reference: Network, inputs: Inputs, precision: str, with_variance: bool
) -> dict[str, float]:
    """Compare a network with a reference in float32 on points within the training domain; returns the differences.

    Without `with_variance` the density alone is compared: the spread of samples is that of densities.

    Raises
    ------
    DeviceError
        Where they exceed `BOUNDS`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((POINTS, inputs.n_features), generator=generator).to(inputs.slope.device)
    x = x.clamp(inputs.low, inputs.high)
    rounded = x.bfloat16().float() if precision == "bf16" else x * (1.0 + torch.finfo(torch.float32).eps)
    with torch.inference_mode():
        mine, true, moved = network(_raw(x, inputs)), reference(_raw(x, inputs)), reference(_raw(rounded, inputs))
    found, moves = (_differences(outputs, true, with_variance) for outputs in (mine, moved))
    for name, value in found.items():
        allowed = max(BOUNDS[precision], ROUNDINGS * moves[name])
        if not value <= allowed:
            raise DeviceError(
                f"the fused network strays from the reference by {value:.2g} ({name}, {precision}; at most"
                f" {allowed:.2g} passes); give executor='script'"
            )
    return found


def _raw(x: Tensor, inputs: Inputs) -> Tensor:
    """Raw features with the standardised inputs `x`."""
    raw = (x - inputs.shift) / inputs.slope
    if inputs.length > 0:
        for start, stop in zip(inputs.columns[::2], inputs.columns[1::2], strict=True):
            raw[:, start:stop] = raw[:, start:stop].clamp(min=1e-30).log().mul(-inputs.length)
    return raw.contiguous()


def _differences(outputs: Outputs, true: Outputs, with_variance: bool) -> dict[str, float]:
    found = {"density": float((outputs.density - true.density).square().mean().sqrt())}
    if with_variance and outputs.variance is not None and true.variance is not None:
        sigma, exact = outputs.variance.sqrt(), true.variance.sqrt()
        found["epistemic"] = float((sigma - exact).square().mean().sqrt() / exact.mean())
    return found
