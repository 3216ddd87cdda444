"""Error bars of integrals of the density: how the epistemic errors of many points go together.

The epistemic error of a sum over points, ``F = sum_i c_i f_i``, comes from one set of weights w. To first order
``var F = (dF/dw)^T C (dF/dw)`` with the posterior's covariance C, so that gradients add, not deviations. For every kind
of error bar there is a vector u, linear in the density, with ``var F = |u|^2``; vectors of parts add up to that of the
whole:

- "last-layer": ``u = L^T sum c_i phi_i``, exact.
- "sampled": ``u_s = (F_s - mean of F_s) / sqrt(S)``, exact for the S samples.
- "analytic": dF/dw is as long as there are weights; u is its product with the weights' sigmas, folded into
  `SKETCH` sums with random signs, which keeps the length of any vector to about ``1 / sqrt(2 SKETCH)``, 4 %.

One more component holds the sigma of extrapolation, taken as fully correlated.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.domain import domain_excess, extrapolation_sigma
from gpurho.host import side_by_side
from gpurho.layers import last_activations, transform_features
from gpurho.uncertainty import curve_factors

if TYPE_CHECKING:
    from gpurho.model import DensityModel
    from gpurho.partition import Tile

SKETCH = 256
"""Length of the vectors of "analytic"."""

SUBLATTICE = 0.8
"""Largest step of the points that stand for the others in a tile's integral, angstrom. Measured on aluminium: the
sigma of a cell's electrons changes by up to 2 % at a step of 0.68, and by up to 10 % at 1.0."""

BATCH = {"cpu": 4096, "cuda": 1 << 16}
"""Points at a time. A GPU would spend more time on beginning smaller ones than on their work."""


class IntegralErrors:
    """Vectors of integrals for a model and a kind of error bars, with its calibration; computed in float32."""

    def __init__(
        self,
        model: DensityModel,
        uncertainty: str,
        device: torch.device | str = "cpu",
        samples: int = 30,
        seed: int = 0,
    ) -> None:
        spec = model.spec
        self._model_spec, self.uncertainty, self.device = spec, uncertainty, torch.device(device)
        self._t = {k: v.to(self.device) for k, v in model.tensors.items()}
        n = spec.network.n_hidden + 1
        self._weights = [self._t[f"layers.{i}.weight_mean"] for i in range(n)]
        self._biases = [self._t[f"layers.{i}.bias_mean"] for i in range(n)]
        self._baseline = None if model.baseline is None else model.baseline.to(self.device)
        self._rms = model.density_rms
        factors = spec.factors(uncertainty)
        self._curve, self._factor = factors.tensors(self.device), factors.epistemic * spec.density_std
        self._draws: list[tuple[list[Tensor], list[Tensor]]] = []
        if uncertainty == "last-layer":
            self._factor_matrix = model.last_layer().to(self.device).double()
            self.size = len(self._factor_matrix) + 1
        elif uncertainty == "sampled":
            for k in range(samples):
                weights, biases = model.drawn(seed, k)
                self._draws.append(([w.to(self.device) for w in weights], [b.to(self.device) for b in biases]))
            self.size = samples + 1
        else:
            self._sketch = _Sketch(n, self._t, self.device)
            self.size = SKETCH + 1

    def __call__(
        self, features: Tensor, shares: Tensor | None = None, owners: Tensor | None = None, n_owners: int = 1
    ) -> Tensor:
        """Vectors of sums over points.

        Parameters
        ----------
        features : (n, n_features) float32 tensor on the device
        shares : (n,) tensor, optional
            Weight of each point in its sum; 1 by default. With the volume per point, vectors are in electrons.
        owners : (n,) int64 tensor, optional
            Which sum each point belongs to; all to the one sum by default.
        n_owners : int

        Returns
        -------
        (n_owners, size) float64 tensor
        """
        n = features.size(0)
        weights = torch.ones(n, device=self.device) if shares is None else shares.to(self.device).float()
        where = torch.zeros(n, dtype=torch.long, device=self.device) if owners is None else owners.to(self.device)
        batch = BATCH[self.device.type]
        starts = range(0, n, batch)
        # One sum is made of sums of batches, in their order; of many there is no room for so many.
        apart = n_owners == 1 and self.device.type == "cpu"
        shape = (max(1, len(starts)) if apart else 1, n_owners, self.size)
        found = torch.zeros(shape, dtype=torch.float64, device=self.device)

        def add(start: int) -> None:
            rows = slice(start, start + batch)
            with torch.inference_mode():
                self._add(found[start // batch if apart else 0], features[rows], weights[rows], where[rows])

        if apart:
            side_by_side(add, starts)
        else:
            for start in starts:
                add(start)
        return self._finish(found.sum(0))

    def _add(self, found: Tensor, features: Tensor, shares: Tensor, owners: Tensor) -> None:
        spec, t = self._model_spec, self._t
        inputs = transform_features(features, spec.distance_columns(), spec.distance_length)
        x = (inputs - t["feature_mean"]) / t["feature_std"]
        h = last_activations(x, self._weights, self._biases, t["skip"], spec.network.layers)
        output = torch.addmv(self._biases[-1][0], h, self._weights[-1][0])
        density = output * spec.density_std + spec.density_mean
        if self._baseline is not None:
            density = density + features[:, : len(self._baseline)] @ self._baseline
        seeds = shares * self._factor * curve_factors(density, *self._curve)
        low, high = ((t[f"feature_{end}"] - t["feature_mean"]) / t["feature_std"] for end in ("low", "high"))
        beyond = extrapolation_sigma(domain_excess(x, low, high), self._rms)
        _sum(found[:, -1:], owners, (shares * beyond)[:, None])
        if self.uncertainty == "last-layer":
            phi = torch.cat([h, torch.ones_like(h[:, :1])], dim=1)
            _sum(found[:, :-1], owners, phi * seeds[:, None])
        elif self.uncertainty == "sampled":
            for k, (weights, biases) in enumerate(self._draws):
                drawn = last_activations(x, weights, biases, t["skip"], spec.network.layers)
                difference = torch.addmv(biases[-1][0], drawn, weights[-1][0]) - output
                _sum(found[:, k : k + 1], owners, (seeds * difference)[:, None])
        else:
            tape = _tape(x, self._weights, self._biases, t["skip"], spec.network.layers)
            single = len(found) == 1
            for owner in [0] if single else torch.unique(owners).tolist():
                mine = slice(None) if single else owners == owner
                found[owner, :-1] += self._sketch.fold([(d[mine] * seeds[mine, None], h[mine]) for d, h in tape])

    def _finish(self, found: Tensor) -> Tensor:
        """Raw sums to vectors; linear, so that it may follow the sums."""
        if self.uncertainty == "last-layer":
            return torch.cat([found[:, :-1] @ self._factor_matrix, found[:, -1:]], dim=1)
        if self.uncertainty == "sampled":
            drawn = found[:, :-1]
            centred = (drawn - drawn.mean(dim=1, keepdim=True)) / float(drawn.size(1)) ** 0.5
            return torch.cat([centred, found[:, -1:]], dim=1)
        return found


def _sum(found: Tensor, owners: Tensor, values: Tensor) -> None:
    """Add rows of `values` (n, k) to the rows of `found` that own them."""
    if len(found) == 1:
        found += values.double().sum(0)  # the same bits every time, on a GPU too
    else:
        found.index_add_(0, owners, values.double())


def _tape(
    x: Tensor, weights: list[Tensor], biases: list[Tensor], skip: Tensor, layers: int
) -> list[tuple[Tensor, Tensor]]:
    """For every layer, the derivative (n, out) of the density output by its preactivations, and its inputs (n, in)."""
    n_hidden = len(weights) - 1
    inputs, preactivations = [x], []
    for i in range(n_hidden):
        z = torch.nn.functional.linear(inputs[i], weights[i], biases[i])
        a = torch.nn.functional.gelu(z)
        j = i % layers
        inputs.append(torch.addcmul(a, inputs[i], skip[i // layers, j - 1]) if j > 0 else a)
        preactivations.append(z)
    # Of the last layer only the row of the density counts.
    found = [(torch.ones_like(x[:, :1]), inputs[n_hidden])]
    delta = weights[n_hidden][0].expand(x.size(0), -1)
    for i in reversed(range(n_hidden)):
        local = torch.ops.aten.gelu_backward(delta, preactivations[i])
        found.append((local, inputs[i]))
        j = i % layers
        below = local @ weights[i]
        delta = torch.addcmul(below, delta, skip[i // layers, j - 1]) if j > 0 else below
    return found[::-1]


class _Sketch:
    """Folds a gradient by all weights, times their sigmas, into `SKETCH` sums with random signs."""

    def __init__(self, n_layers: int, tensors: dict[str, Tensor], device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        self._signed = []
        for i in range(n_layers):
            rows = slice(0, 1) if i == n_layers - 1 else slice(None)
            sigmas = torch.cat(
                [tensors[f"layers.{i}.weight_sigma"][rows], tensors[f"layers.{i}.bias_sigma"][rows, None]], dim=1
            )
            signs = 2 * torch.randint(2, sigmas.shape, generator=generator) - 1
            self._signed.append(sigmas * signs.to(device))

    def fold(self, tape: list[tuple[Tensor, Tensor]]) -> Tensor:
        """(SKETCH,) float64 for derivatives by preactivations (n, out) and inputs (n, in) of every layer."""
        found = torch.zeros(SKETCH, dtype=torch.float64, device=tape[0][0].device)
        for (derivative, inputs), signed in zip(tape, self._signed, strict=True):
            gradient = torch.cat([derivative.T @ inputs, derivative.sum(0)[:, None]], dim=1)
            flat = (gradient * signed).double().reshape(-1)
            found += torch.nn.functional.pad(flat, (0, -flat.numel() % SKETCH)).reshape(-1, SKETCH).sum(0)
        return found


def sublattice(
    tile: Tile, steps: NDArray[np.float64], step: float = SUBLATTICE
) -> tuple[tuple[slice, slice, slice], float]:
    """Points of a tile that stand for all of it, along each axis, and how many points each stands for.

    `steps` (3, 3) are the grid's steps, angstrom. Every n-th point along each axis, one at least, counted from the
    grid's origin where the tile holds such a point.
    """
    axes = []
    for start, count, length in zip(tile.start, tile.shape, np.linalg.norm(steps, axis=1), strict=True):
        stride = max(1, int(step / max(float(length), 1e-9) + 1e-9))
        first = -start % stride
        axes.append(slice(first if first < count else count // 2, count, stride))
    chosen = math.prod(len(range(count)[axis]) for axis, count in zip(axes, tile.shape, strict=True))
    return (axes[0], axes[1], axes[2]), tile.n_points / chosen
