"""Uncertain densities: the posterior object, draws of weights, and calibration of the error bars.

The variance of a prediction is that of equation (4) of the preprint: aleatoric (noise of the data, an output of
the network) plus epistemic (spread over the posterior of the weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.errors import SettingsError


@dataclass(frozen=True)
class Posterior:
    """Predictive distribution of the density at some points: independent Gaussians.

    Parameters
    ----------
    mean, aleatoric, epistemic : tensors of one shape, e/angstrom^3
        Prediction at the posterior means of the weights, and the two standard deviations.
    """

    mean: Tensor
    aleatoric: Tensor
    epistemic: Tensor

    def __post_init__(self) -> None:
        if not self.mean.shape == self.aleatoric.shape == self.epistemic.shape:
            shapes = [tuple(t.shape) for t in (self.mean, self.aleatoric, self.epistemic)]
            raise SettingsError(f"mean, aleatoric and epistemic have shapes {shapes}; give the same for all three")

    @property
    def variance(self) -> Tensor:
        """Total variance, equation (4), (e/angstrom^3)^2."""
        return self.aleatoric.square() + self.epistemic.square()

    @property
    def std(self) -> Tensor:
        """Total standard deviation, e/angstrom^3."""
        return self.variance.sqrt()

    def rsample(self, n: int = 1, generator: torch.Generator | None = None) -> Tensor:
        """`n` draws, (n, ...), differentiable in `mean` and the deviations."""
        noise = torch.randn((n, *self.mean.shape), generator=generator, dtype=self.mean.dtype).to(self.mean.device)
        return self.mean + self.std * noise


def draw_weights(means: Sequence[Tensor], sigmas: Sequence[Tensor], seed: int, index: int) -> list[Tensor]:
    """Draw number `index` of the run `seed`: one tensor per entry of `means`.

    The same on every machine and device, for every point and tile: the numbers come from a CPU generator that is
    seeded from (seed, index) alone.
    """
    if seed < 0 or index < 0:
        raise SettingsError(f"seed {seed} and sample {index} must not be negative")
    state = np.random.SeedSequence((int(seed), int(index))).generate_state(1, np.uint64)[0]
    generator = torch.Generator().manual_seed(int(state >> np.uint64(1)))
    return [
        m + s * torch.randn(m.shape, generator=generator, dtype=torch.float32).to(m.device)
        for m, s in zip(means, sigmas, strict=True)
    ]


FACTOR_LIMITS = (0.25, 4.0)
"""Fitted calibration factors stay within these; a model that needs more should be trained again."""


@dataclass(frozen=True)
class CalibrationFactors:
    """Factors on the two standard deviations, fitted after training on held-out snapshots.

    Parameters
    ----------
    aleatoric, epistemic : float
        On all points.
    density : tuple of float, e/angstrom^3
        Knots of a curve of further factors by predicted density, ascending; empty for none.
    curve : tuple of float
        Factors on both deviations at the knots: linear between them, constant beyond the first and the last.
    correlation_volume : float, angstrom^3
        Aleatoric errors within this volume go together in integrals, as those of one point; 0 for errors that are
        independent from point to point.
    """

    aleatoric: float = 1.0
    epistemic: float = 1.0
    density: tuple[float, ...] = ()
    curve: tuple[float, ...] = ()
    correlation_volume: float = 0.0

    def __post_init__(self) -> None:
        for name in ("aleatoric", "epistemic"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and np.isfinite(value) and 0 < value < 1e6):
                raise SettingsError(f"calibration factor of the {name} sigma is {value!r}; it must be positive")
        for name in ("density", "curve"):
            object.__setattr__(self, name, tuple(float(v) for v in getattr(self, name)))
        if len(self.density) != len(self.curve) or len(self.density) == 1 or len(self.density) > 1000:
            raise SettingsError(
                f"calibration curve has {len(self.density)} knots and {len(self.curve)} factors; give 2 or more of each"
            )
        volume = self.correlation_volume
        if not (isinstance(volume, float | int) and 0 <= volume < 1e6):
            raise SettingsError(f"correlation volume {volume!r} is not a number from 0 up")
        rising = all(a < b for a, b in pairwise(self.density))
        if not (rising and np.isfinite(self.density).all() and all(0 < v < 1e6 for v in self.curve)):
            raise SettingsError(f"calibration curve {self.curve} at {self.density}: knots rise, factors are positive")

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Knots and factors of the curve as float32 tensors for `curve_factors`."""
        return torch.tensor(self.density, device=device), torch.tensor(self.curve, device=device)

    def at(self, density: Tensor) -> Tensor:
        """Factor of the curve at predicted densities (n,), e/angstrom^3."""
        return curve_factors(density, *self.tensors(density.device))


def curve_factors(density: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The piecewise linear curve through (knots, values) at densities (n,), ones without knots; for TorchScript too."""
    if knots.numel() < 2:
        return torch.ones_like(density)
    i = torch.bucketize(density, knots[1:-1])
    low, high = knots[i], knots[i + 1]
    return torch.lerp(values[i], values[i + 1], ((density - low) / (high - low)).clamp(0.0, 1.0))


def fit_calibration(
    error: NDArray[np.floating], aleatoric: NDArray[np.floating], epistemic: NDArray[np.floating]
) -> CalibrationFactors:
    """The one factor on both deviations that makes the Gaussian likelihood of held-out errors largest.

    One factor, not two: on few snapshots the two deviations are too alike to be told apart. The maximum is
    ``factor^2 = mean(error^2 / variance)``; it is bounded to [1/4, 4], beyond which the model should be retrained.
    """
    variance = np.asarray(aleatoric, float) ** 2 + np.asarray(epistemic, float) ** 2
    if variance.size == 0 or not np.all(variance > 0):
        raise SettingsError("calibration needs points with a positive variance")
    factor = float(np.sqrt(np.mean(np.asarray(error, float) ** 2 / variance)))
    factor = min(FACTOR_LIMITS[1], max(FACTOR_LIMITS[0], factor))
    return CalibrationFactors(factor, factor)
