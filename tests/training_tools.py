"""Tiny data sets to train on, from densities in closed form."""

from __future__ import annotations

import numpy as np

from gpurho.datasets import Snapshot
from gpurho.structure import Structure

SMALL: dict = {
    "family": "scalar-product",
    "n_distances": 8,
    "n_angle_atoms": 3,
    "n_angle_neighbors": 2,
    "cutoff": 5.0,
    "blocks": 2,
    "layers": 2,
    "width": 24,
    "points_per_snapshot": 1200,
    "batch_size": 128,
    "warmup_steps": 20,
    "epochs": 12,
    "learning_rate": 5e-3,
    "checkpoint_steps": 25,
    "precision": "fp32",
}


def toy_snapshot(seed: int, cells: int = 1, points: int = 14) -> Snapshot:
    """Atoms with a density of overlapping Gaussians: a field that the features determine."""
    rng = np.random.default_rng(seed)
    a, n = 4.05, points
    base = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * a
    base = np.concatenate([base + np.array([k * a, 0.0, 0.0]) for k in range(cells)])
    positions = base + rng.normal(0, 0.05 + 0.03 * (seed % 4), base.shape)
    cell = np.diag([cells * a, a, a])
    structure = Structure(positions, np.full(4 * cells, 13), cell, np.ones(3, bool))
    axis = np.arange(n) * a / n
    grid = np.stack(np.meshgrid(np.arange(cells * n) * a / n, axis, axis, indexing="ij"), -1)
    density = np.zeros(grid.shape[:3])
    for shift in np.ndindex(3, 3, 3):
        for p in positions + (np.array(shift) - 1) @ cell:
            density += np.exp(-((grid - p) ** 2).sum(-1) / 0.9)
    density *= 12.0 * cells / (density.sum() * (a / n) ** 3)
    meta = {"temperature_K": 300 * (seed % 4 + 1), "trajectory": seed % 2}
    return Snapshot(structure, density.astype(np.float32), 12.0 * cells, meta)


SMOOTH: dict = {
    "family": "smooth",
    "cutoff": 4.0,
    "n_radial": 6,
    "n_basis": 3,
    "l_max": 2,
    **{k: v for k, v in SMALL.items() if not k.startswith("n_") and k not in ("cutoff", "family")},
}
