"""Radial channels of the smooth descriptors, learned from densities.

The power spectrum costs by the square of its radial channels. Chebyshev functions are many and general; a few linear
combinations of them, fitted together with a small network to a sample of the labels, describe the same densities as
well. The fit needs the projections on all Chebyshev functions, for a sample of points only; the kernels then apply
the matrix that is found (`DescriptorSpec.contraction`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from torch import Tensor, nn

from gpurho.datasets import Snapshot
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError
from gpurho.kernels import _smooth_formulas as formulas
from gpurho.kernels.celllist import atoms_around, bin_atoms
from gpurho.structure import Structure

CHUNK = 512
"""Points whose projections are formed at a time."""

WIDTH, DEPTH = 64, 3
BATCH = 1024
"""Points per step, fewer of a small sample."""
RATE = 3e-3
RIDGE = 1e-8


class _Array(np.ndarray[Any, np.dtype[np.float32]]):
    """An array as the formulas of the kernels want a number."""

    def square_root(self) -> Any:
        return np.sqrt(self)

    def inverse_root(self) -> Any:
        return 1 / np.sqrt(self)

    def smaller(self, other: float) -> Any:
        return np.minimum(self, np.float32(other))


@dataclass(frozen=True)
class ContractionFit:
    """A fit of radial channels.

    Attributes
    ----------
    spec : DescriptorSpec
        With the matrix found.
    losses : list of float
        Mean square error per epoch of the standardised target, of the small network that was fitted with it.
    n_points : int
    """

    spec: DescriptorSpec
    losses: list[float]
    n_points: int


def projections(structure: Structure, spec: DescriptorSpec, points: NDArray[np.float64]) -> NDArray[np.float32]:
    """Sums over the atoms of every species of all Chebyshev functions times harmonics.

    Parameters
    ----------
    structure : Structure
    spec : DescriptorSpec
        Of the family "smooth".
    points : (n_points, 3) float64, angstrom

    Returns
    -------
    (n_points, n_species, n_radial, (l_max + 1)^2) float32
        Harmonics degree by degree, such that their squares add up to the power spectrum.
    """
    species = spec.species_index(structure)
    bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
    atoms, owners = atoms_around(bins, points, spec.cutoff)
    wanted = formulas.columns(spec.l_max)
    order = np.argsort([formulas.place(*key) for key in wanted])
    norms = np.array([formulas.norm(*key[:2]) for key in wanted], np.float32)[order]
    n_harmonics = (spec.l_max + 1) ** 2
    out = np.zeros((len(points), len(spec.species), spec.n_radial, n_harmonics), np.float32)
    for s in range(len(spec.species)):
        here = atoms[species[owners] == s]
        if len(here) == 0:
            continue
        tree = cKDTree(here)
        for first in range(0, len(points), CHUNK):
            block = points[first : first + CHUNK]
            lists = tree.query_ball_point(block, spec.cutoff)
            most = max(map(len, lists))
            if most == 0:
                continue
            # Missing atoms lie at the cutoff, where every function is 0.
            d = np.full((len(block), most, 3), spec.cutoff, np.float32)
            for row, members in enumerate(lists):
                d[row, : len(members)] = here[members] - block[row]
            dx, dy, dz = (d[..., k].copy().view(_Array) for k in range(3))
            square = dx * dx + dy * dy + dz * dz
            radial = formulas.radial_functions(square * np.float32(1 / spec.cutoff**2), spec.n_radial)
            angles = np.ones((len(block), most, n_harmonics), np.float32)
            if spec.l_max:
                x, y, z, length2 = formulas.direction(dx, dy, dz, square, formulas.DAMPING**2)
                values = formulas.harmonics(x, y, z, length2, wanted)
                angles[..., 1:] = np.stack(values, -1)[..., order] * norms
            np.matmul(np.stack(radial, 1), angles, out=out[first : first + CHUNK, s])
    return out


def fit_contraction(
    snapshots: Sequence[Snapshot],
    spec: DescriptorSpec,
    *,
    points_per_snapshot: int = 3000,
    epochs: int = 10,
    seed: int = 0,
    on_epoch: Callable[[int, float], None] | None = None,
) -> ContractionFit:
    """Fit the radial channels of `spec` to densities.

    Parameters
    ----------
    snapshots : sequence of Snapshot
        Those trained on; never test snapshots.
    spec : DescriptorSpec
        Of the family "smooth" with `n_basis` from 1 to `n_radial`.
    points_per_snapshot : int
        Grid points of each, drawn from `seed`; projections of all of them are kept in memory.
    epochs : int
    seed : int
    on_epoch : callable, optional
        Told the epoch and its loss.

    Raises
    ------
    SettingsError
        For another family, or nothing to contract.

    Notes
    -----
    The matrix and a network of 3 x 64 units are fitted together by Adam to the density less its two-body
    superposition; the network is then thrown away. Rows are scaled to length 1.
    """
    if spec.family != "smooth" or not 1 <= spec.n_basis <= spec.n_radial or spec.l_max < 1:
        raise SettingsError(f"descriptors {spec.to_dict()} have no radial channels to fit; give family 'smooth'")
    moments, density = _sample(snapshots, spec, points_per_snapshot, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        matrix, losses = _fit(moments, density, spec, epochs, on_epoch)
    rows = matrix / np.linalg.norm(matrix, axis=-1, keepdims=True)
    nested = tuple(tuple(tuple(float(f"{x:.6g}") for x in row) for row in block) for block in rows)
    return ContractionFit(replace(spec, contraction=nested), losses, len(density))


def _sample(
    snapshots: Sequence[Snapshot], spec: DescriptorSpec, points_per_snapshot: int, seed: int
) -> tuple[Tensor, Tensor]:
    moments, density = [], []
    for i, snapshot in enumerate(snapshots):
        shape = snapshot.grid.shape
        n = math.prod(shape)
        picks = np.sort(np.random.default_rng([seed, i]).choice(n, min(points_per_snapshot, n), replace=False))
        index = np.stack(np.unravel_index(picks, shape), 1)
        points = snapshot.grid.origin + index @ snapshot.grid.steps
        moments.append(projections(snapshot.structure, spec, points))
        density.append(np.asarray(snapshot.density, np.float64).ravel()[picks])
    return torch.from_numpy(np.concatenate(moments)), torch.from_numpy(np.concatenate(density))


def _fit(
    moments: Tensor,
    density: Tensor,
    spec: DescriptorSpec,
    epochs: int,
    on_epoch: Callable[[int, float], None] | None,
) -> tuple[NDArray[np.float64], list[float]]:
    n, n_species, n_radial, _ = moments.shape
    channels = n_species * spec.n_basis
    pairs = torch.triu_indices(channels, channels)
    two_body = moments[..., 0].reshape(n, -1)
    residual = _without_superposition(two_body, density)
    start = torch.eye(n_radial, spec.n_basis).expand(n_species, -1, -1)
    matrix = nn.Parameter(start.clone())

    def features(rows: Tensor) -> Tensor:
        c = torch.einsum("pskq,skn->psnq", moments[rows], matrix).reshape(len(rows), channels, -1)
        columns = [two_body[rows]]
        for degree in range(1, spec.l_max + 1):
            part = c[..., degree**2 : (degree + 1) ** 2]
            columns.append((part[:, pairs[0]] * part[:, pairs[1]]).sum(-1))
        return torch.cat(columns, 1)

    with torch.no_grad():
        first = torch.cat([features(rows) for rows in torch.arange(n).split(8192)])
    mean, std = first.mean(0), first.std(0).clamp_min(1e-6)
    sizes = [first.shape[1], *[WIDTH] * DEPTH]
    hidden = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.GELU())]
    network = nn.Sequential(*hidden, nn.Linear(WIDTH, 1))
    optimizer = torch.optim.Adam([*network.parameters(), matrix], RATE, fused=True)
    batch = min(BATCH, max(1, n // 16))
    steps = n // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps * epochs + 1, pct_start=0.1)
    losses = []
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(n)[: steps * batch].split(batch):
            loss = (network((features(rows) - mean) / std)[:, 0] - residual[rows]).square().mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        losses.append(total / steps)
        if on_epoch is not None:
            on_epoch(epoch, losses[-1])
    return matrix.detach().transpose(1, 2).double().numpy(), losses


def _without_superposition(two_body: Tensor, density: Tensor) -> Tensor:
    """The density less its two-body part, standardised."""
    wide = torch.cat([two_body.double(), torch.ones(len(density), 1, dtype=torch.float64)], 1)
    wide /= wide.std(0).clamp_min(1e-6).where(wide.std(0) > 0, torch.ones(wide.shape[1], dtype=torch.float64))
    normal = wide.T @ wide
    normal += RIDGE * normal.diagonal().mean() * torch.eye(len(normal), dtype=torch.float64)
    rest = density - wide @ torch.linalg.solve(normal, wide.T @ density)
    return (rest / rest.std()).float()
