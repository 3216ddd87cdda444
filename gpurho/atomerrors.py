"""Epistemic error bars of the electrons of each atom, by one more pass of descriptors and network."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.fields import blocks
from gpurho.partition import Tile
from gpurho.peratom import NearestAtoms

if TYPE_CHECKING:
    from gpurho.model import DensityModel

STEP = 0.45
"""Step of the points that stand for the others, angstrom: some 150 for an atom of aluminium."""


def atom_errors(density: Density, model: DensityModel, device: str = "cpu") -> NDArray[np.float64]:
    """Epistemic sigma of the mean density of each atom's points, (n_atoms,), e/angstrom^3, before conservation.

    Raises
    ------
    SettingsError
        When `density` was not predicted by `model`.
    """
    import torch

    from gpurho.descriptors import Environment
    from gpurho.integrals import IntegralErrors, sublattice

    made = density.info.get("settings", {})
    if made.get("model") != model.fingerprint():
        raise SettingsError("the density was not predicted by this model; give the model of the prediction, or none")
    seen = {name: made[name] for name in ("samples", "seed") if made.get(name) is not None}
    vectors = IntegralErrors(model, str(made["uncertainty"]), device, **seen)
    environment = Environment(density.structure, model.spec.descriptor, device)
    finder = NearestAtoms(density.structure, density.grid)
    n = len(density.structure)
    total = np.zeros((n, vectors.size))
    counts = np.zeros(n)
    for box in blocks(density.mean):
        tile = Tile(0, *(tuple(getattr(s, end) for s in box) for end in ("start", "stop")))
        thin, weight = sublattice(tile, density.grid.steps, STEP)
        places = density.grid.points(tile.start, tile.stop).reshape(*tile.shape, 3)[thin].reshape(-1, 3)
        points, owners, shares = finder.owners(places)
        values = environment.point_features(places).values
        features = values if isinstance(values, torch.Tensor) else torch.from_numpy(values)
        # Atoms that this block meets, numbered from 0.
        atoms, local = np.unique(owners, return_inverse=True)
        where = torch.from_numpy(points).to(features.device)
        found = vectors(
            features[where], torch.from_numpy(weight * shares), torch.from_numpy(local.reshape(-1)), max(2, len(atoms))
        )
        total[atoms] += found[: len(atoms)].cpu().numpy()
        counts += np.bincount(owners, weight * shares, n)
    return np.asarray(np.linalg.norm(total, axis=1) / np.maximum(counts, 1e-300))
