"""The network as one GPU kernel: `gpurho.kernels._fused_network` compiled for a model.

Not the default: on a GPU it has not been measured yet. `precision` "fp32" takes products of float32 in three steps of
TF32, "bf16" those of bfloat16. On its first use on a device a model's kernel is compared with the reference
(`gpurho.scriptnet`) on points of its own, and refused where it strays.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gpurho.errors import DeviceError, MissingDependencyError, ModelError
from gpurho.scriptnet import Inputs, Outputs

if TYPE_CHECKING:
    from gpurho.prediction import PredictionNetwork

CHUNK = 32
"""Features that are read and multiplied at a time."""
LARGEST_WIDTH = 128
"""The weights of a layer lie in a block's shared memory as a whole."""
MOST_KEPT = 256
"""Units of all hidden layers together that the analytic variance keeps in registers on its way there and back."""
LEAST_CAPABILITY = 8
"""Triton compiles for A100 and newer."""


class _Weights(NamedTuple):
    """Tensors of a network as the kernel reads them."""

    first: Tensor
    first_bias: Tensor
    first_variance: Tensor
    first_bias_variance: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    hidden_variance: Tensor
    hidden_bias_variance: Tensor
    skip: Tensor
    last: Tensor
    last_bias: Tensor
    last_variance: Tensor
    last_bias_variance: Tensor
    factor: Tensor
    factor_bias: Tensor


class FusedNetwork:
    """A network in one kernel on one device.

    Parameters
    ----------
    networks : sequence of PredictionNetwork
        In float32, not frozen: that of the posterior means, then those of drawn weights.
    inputs : Inputs
    precision : "fp32" or "bf16"
    with_sigma : bool

    Raises
    ------
    MissingDependencyError
        Without Triton.
    DeviceError
        Where the device is no GPU that Triton compiles for.
    ModelError
        For a network that is too large.
    """

    def __init__(self, networks: Sequence[PredictionNetwork], inputs: Inputs, precision: str, with_sigma: bool) -> None:
        require_triton(inputs.slope.device)
        network = networks[0]
        self.n_hidden = len(network.layers) - 1
        self.width = max(16, 1 << (network.layers[-1].weight.size(1) - 1).bit_length()) if self.n_hidden else 0
        mode = 1 if network.analytic else 2 if network.last_layer else 0
        if not 0 < self.width <= LARGEST_WIDTH or (mode == 1 and self.width * self.n_hidden > MOST_KEPT):
            raise ModelError(
                f"a network of {self.n_hidden} hidden layers of {self.width} units does not fit into one kernel;"
                " give executor='script'"
            )
        self.device, self.precision = inputs.slope.device, precision
        self._inputs, self._with_sigma, self._mode = inputs, with_sigma, mode
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self._weights = [_weights(n, self.width, dtype, self.device) for n in networks]
        rates = torch.zeros_like(inputs.slope)
        if inputs.length > 0:
            for start, stop in zip(inputs.columns[::2], inputs.columns[1::2], strict=True):
                rates[start:stop] = 1.0 / inputs.length
        self._rates, self._decays = rates, bool(rates.any())
        baseline = torch.zeros_like(inputs.slope)
        if inputs.baseline is not None:
            baseline[: len(inputs.baseline)] = inputs.baseline
        self._baseline = baseline

    def __call__(self, features: Tensor) -> Outputs:
        """Outputs for features (n, n_features)."""
        # Without samples, points outside of the training domain matter only where there is a sigma.
        mode = self._mode if self._mode or not self._with_sigma else 3
        features = features.contiguous()
        out, variance, excess, superposition = self._run(features, self._weights[0], mode)
        if len(self._weights) > 1:
            variance = self._sample_variance(features, out[0])
        return Outputs(
            out[0],
            out[1] if self._with_sigma else None,
            variance if self._with_sigma else None,
            excess if self._with_sigma else None,
            superposition if self._inputs.baseline is not None else None,
        )

    def _run(self, features: Tensor, weights: _Weights, mode: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        import triton.language as tl

        n, inputs = features.size(0), self._inputs
        out = torch.empty((2, n), dtype=torch.float32, device=self.device)
        variance, excess, superposition = torch.empty((3, n), dtype=torch.float32, device=self.device).unbind()
        points, warps = block(self.width, mode)
        constants = {
            "N_FEATURES": inputs.n_features,
            "WIDTH": self.width,
            "N_HIDDEN": self.n_hidden,
            "POINTS": points,
            "CHUNK": CHUNK,
            "TYPE": tl.bfloat16 if self.precision == "bf16" else tl.float32,
            "MODE": mode,
            "DECAYS": self._decays,
            "BASELINE": inputs.baseline is not None,
        }
        if n > 0:
            # Triton launches on torch's current device, not on that of the tensors; -1, of the CPU, changes nothing.
            with torch.cuda.device(features.get_device()):
                kernel()[(-(-n // points),)](
                    features, n, inputs.slope, inputs.shift, self._rates, inputs.low, inputs.high, self._baseline,
                    *weights, out, variance, excess, superposition, **constants, num_warps=warps,
                )  # fmt: skip
        return out, variance, excess, superposition

    def _sample_variance(self, features: Tensor, density: Tensor) -> Tensor:
        """As that of `gpurho.scriptnet.ScriptNetwork`."""
        total, squares = torch.zeros_like(density), torch.zeros_like(density)
        for weights in self._weights[1:]:
            difference = self._run(features, weights, 0)[0][0] - density
            total += difference
            squares.addcmul_(difference, difference)
        count = float(len(self._weights) - 1)
        return (squares / count - (total / count).square()).clamp_(min=0.0)


def block(width: int, mode: int) -> tuple[int, int]:
    """Points of a program and its warps, with which the compiler spills no registers (`benchmarks/fused_check.py`)."""
    if width <= 32:
        return (32 if mode == 2 else 64), 4
    if width <= 64:
        return (16 if mode == 1 else 32), 4
    return (16 if mode == 1 else 32), 8


def require_triton(device: torch.device) -> None:
    """Raise unless Triton is there and compiles for `device`."""
    if importlib.util.find_spec("triton") is None:
        raise MissingDependencyError(
            "executor 'fused' needs Triton, which CUDA builds of torch bring; give executor='script'"
        )
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        if major < LEAST_CAPABILITY:
            raise DeviceError(
                f"executor 'fused' needs an A100 or newer, and {device} has compute capability {major}.{minor};"
                " give executor='script'"
            )
    elif not interpreted():
        raise DeviceError(f"executor 'fused' runs on GPUs, not on {str(device)!r}; give executor='script'")


def interpreted() -> bool:
    """Whether Triton is told (TRITON_INTERPRET=1) to run kernels on the CPU, as tests do."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@lru_cache(maxsize=2)
def _compiled(interpret: bool) -> Any:
    import triton

    from gpurho.kernels import _fused_network

    return triton.jit(_fused_network.network)


def kernel() -> Any:
    """The kernel, as Triton compiles or interprets it."""
    return _compiled(interpreted())


def _weights(network: PredictionNetwork, width: int, dtype: torch.dtype, device: torch.device) -> _Weights:
    """Tensors of a network, input by output, filled up with zeros to `width` units."""
    layers, n_hidden = list(network.layers), len(network.layers) - 1
    extra = width - layers[-1].weight.size(1)

    def matrices(kind: str) -> tuple[Tensor, Tensor]:
        found = [getattr(layer, kind).detach() for layer in layers[:n_hidden]]
        if found[0].numel() == 0:  # no variances are kept
            return torch.zeros(1), torch.zeros(1)
        first = F.pad(found[0].T, (0, extra))
        rest = [F.pad(w.T, (0, extra, 0, extra)) for w in found[1:]]
        return first, torch.stack(rest) if rest else torch.zeros(1)

    def offsets(kind: str) -> tuple[Tensor, Tensor]:
        found = [getattr(layer, kind).detach() for layer in layers[:n_hidden]]
        if found[0].numel() == 0:
            return torch.zeros(1), torch.zeros(1)
        padded = [F.pad(b, (0, extra)) for b in found]
        return padded[0], torch.stack(padded[1:]) if len(padded) > 1 else torch.zeros(1)

    skips = torch.zeros(n_hidden)
    for i in range(n_hidden):
        if i % network.n_layers:
            skips[i] = network.skip[i // network.n_layers, i % network.n_layers - 1]
    last = layers[-1]
    variance, bias_variance = torch.zeros(1), torch.zeros(1)
    if network.analytic:
        variance, bias_variance = F.pad(last.weight_variance[0], (0, extra)), last.bias_variance[:1]
    factor, factor_bias = torch.zeros(1), torch.zeros(1)
    if network.last_layer:
        w = network.factor.size(1)
        # (W + 1, W): the row of the bias comes behind those that fill up.
        factor = torch.zeros((width + 1, width))
        factor[:w, :w], factor[width, :w] = network.factor[:w], network.factor[w]
        factor_bias = torch.cat([F.pad(network.factor_bias[:w], (0, extra)), network.factor_bias[w:]])
    (first, hidden), (first_variance, hidden_variance) = matrices("weight"), matrices("weight_variance")
    (first_bias, hidden_bias), (first_bias_variance, hidden_bias_variance) = offsets("bias"), offsets("bias_variance")
    products = (first, first_variance, hidden, hidden_variance)
    first, first_variance, hidden, hidden_variance = (t.to(device, dtype).contiguous() for t in products)
    sums = (
        first_bias, first_bias_variance, hidden_bias, hidden_bias_variance, skips,
        F.pad(last.weight[:2], (0, extra)), last.bias[:2], variance, bias_variance, factor, factor_bias,
    )  # fmt: skip
    a, b, c, d, e, *rest = (t.detach().to(device, torch.float32).contiguous() for t in sums)
    return _Weights(first, a, first_variance, b, hidden, c, hidden_variance, d, e, *rest)
