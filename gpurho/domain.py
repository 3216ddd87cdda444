"""The training domain: outside of it a network extrapolates, and its posterior does not know by how much.

A model keeps the smallest and largest value that each input had in training. A point outside of that box is given an
epistemic sigma that grows with the square of the distance, in standard deviations of the input, up to that of knowing
nothing but how large densities are. This is a rule, not a derivation: it turns a confident wrong number (a surface,
seen by a model of the bulk) into one that says so. Inside the box it changes nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNBOUNDED = 1.0e30
"""Bound of an input that was never seen; stands for infinity in files, where every number is finite."""

SATURATION = 10.0
"""Distance outside of the box, in standard deviations of the input, from which on nothing is claimed to be known."""


def domain_excess(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """How far points lie outside of the box of the training inputs.

    Parameters
    ----------
    x : (n, n_features) standardised inputs
    low, high : (n_features,) bounds, standardised too

    Returns
    -------
    (n,)
        Largest distance of any input from its range, in standard deviations; 0 inside.
    """
    return torch.maximum((x - high).amax(1), (low - x).amax(1)).clamp(min=0.0)


def extrapolation_sigma(excess: Tensor, density_rms: float, saturation: float = SATURATION) -> Tensor:
    """Sigma of extrapolation, (n,), in the unit of the density: quadratic up to `density_rms` at `saturation`."""
    return (excess / saturation).clamp(max=1.0).square() * density_rms
