"""Uncertain densities: the posterior object, draws of weights, and calibration of the error bars.

The variance of a prediction is that of equation (4) of the preprint: aleatoric (noise of the data, an output of
the network) plus epistemic (spread over the posterior of the weights).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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


@dataclass(frozen=True)
class CalibrationFactors:
    """Factors on the two standard deviations, fitted after training on held-out snapshots."""

    aleatoric: float = 1.0
    epistemic: float = 1.0

    def __post_init__(self) -> None:
        for name in ("aleatoric", "epistemic"):
            value = getattr(self, name)
            if not (isinstance(value, float | int) and np.isfinite(value) and 0 < value < 1e6):
                raise SettingsError(f"calibration factor of the {name} sigma is {value!r}; it must be positive")


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
    factor = min(4.0, max(0.25, factor))
    return CalibrationFactors(factor, factor)
