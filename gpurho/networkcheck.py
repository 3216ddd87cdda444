"""Does a network in one kernel say what the reference says? Asked on its first use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gpurho.errors import DeviceError
from gpurho.scriptnet import Inputs, Outputs

BOUNDS = {"fp32": 2e-5, "bf16": 0.02}
"""Root mean square difference from the reference in float32 that passes, by precision: of the density and the logarithm
of its variance in units of the network, of the epistemic sigma in units of its own mean."""
TIMES = 4.0
"""Where the reference itself, in that precision, strays by more, so many times that passes."""
EXACT = 1e-4
"""Difference that passes of what is found in float32 of the raw features, in units of its largest value."""
POINTS, OUTSIDE = 256, 64

Network = Callable[[Tensor], Outputs]


def check_network(
    network: Network, reference: Network, rough: Network | None, inputs: Inputs, precision: str
) -> dict[str, float]:
    """Compare a network with a reference in float32, mostly within the training domain; returns the differences.

    `rough` is the reference in the network's precision; without it, the reference with inputs one rounding off. Nothing
    is compared with a reference that is not finite.

    Raises
    ------
    DeviceError
        Where a difference exceeds `BOUNDS` and `TIMES` that of `rough`.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((POINTS, inputs.n_features), generator=generator).to(inputs.slope.device)
    inside, outside = _raw(x.clamp(inputs.low, inputs.high), inputs), _raw(3.0 * x[:OUTSIDE], inputs)
    with torch.inference_mode():
        mine, true = network(inside), reference(inside)
        if not all(bool(torch.isfinite(values).all()) for values in true if values is not None):
            return {}  # a damaged model, which its first prediction says
        if rough is None:
            moved = x.clamp(inputs.low, inputs.high) * (1.0 + torch.finfo(torch.float32).eps)
            near = reference(_raw(moved, inputs))
        else:
            near = rough(inside)
        exact = _exact(network(outside), reference(outside))
    found, usual = (_differences(outputs, true) for outputs in (mine, near))
    allowed = {name: max(BOUNDS[precision], TIMES * value) for name, value in usual.items()}
    for name, value in (found | exact).items():
        if not value <= allowed.get(name, EXACT):
            raise DeviceError(
                f"the fused network strays from the reference by {value:.2g} ({name}, {precision}; at most"
                f" {allowed.get(name, EXACT):.2g} passes); give executor='script'"
            )
    return found | exact


def _raw(x: Tensor, inputs: Inputs) -> Tensor:
    """Raw features with the standardised inputs `x`."""
    raw = (x - inputs.shift) / inputs.slope
    if inputs.length > 0:
        for start, stop in zip(inputs.columns[::2], inputs.columns[1::2], strict=True):
            raw[:, start:stop] = raw[:, start:stop].clamp(min=1e-30).log().mul(-inputs.length)
    return raw.contiguous()


def _differences(outputs: Outputs, true: Outputs) -> dict[str, float]:
    """Of what depends on the precision."""
    pairs = {"density": (outputs.density, true.density)}
    if outputs.log_variance is not None and true.log_variance is not None:
        pairs["log variance"] = outputs.log_variance, true.log_variance
    if outputs.variance is not None and true.variance is not None:
        sigma, exact = outputs.variance.sqrt(), true.variance.sqrt()
        scale = exact.mean().clamp(min=1e-12)
        pairs["epistemic"] = sigma / scale, exact / scale
    return {name: float((mine - theirs).square().mean().sqrt()) for name, (mine, theirs) in pairs.items()}


def _exact(outputs: Outputs, true: Outputs) -> dict[str, float]:
    """Of what does not."""
    pairs = {"excess": (outputs.excess, true.excess), "superposition": (outputs.superposition, true.superposition)}
    found = {}
    for name, (mine, theirs) in pairs.items():
        if mine is not None and theirs is not None:
            least = 1.0 if name == "excess" else 1e-12  # inside of the domain, the one is 0 and the other a rounding
            found[name] = float((mine - theirs).abs().max() / theirs.abs().max().clamp(min=least))
    return found
