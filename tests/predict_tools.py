"""A small model with random weights and a few structures, shared by the tests of prediction and its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.build import bulk

from gpurho.descriptors import DescriptorSpec
from gpurho.dumpfile import Header
from gpurho.grid import Grid
from gpurho.sources import StructureSource
from gpurho.structure import Structure

VALENCE = {"Al": 3.0, "Si": 4.0, "Ge": 4.0}


def small_model(species: tuple[str, ...] = ("Al",), seed: int = 0, **changes: Any) -> Any:
    """A model of a thousand weights whose output varies from point to point, around 0.2 e/angstrom^3."""
    import torch

    from gpurho.layers import DensityNetwork, NetworkSpec
    from gpurho.model import DensityModel, ModelSpec

    descriptor = DescriptorSpec(
        species, n_distances=8, n_angle_atoms=4, n_angle_neighbors=2, n_cross=2 if len(species) > 1 else 0, cutoff=6.0
    )
    spec = ModelSpec(
        descriptor,
        {s: VALENCE[s] for s in species},
        NetworkSpec(blocks=1, layers=2, width=16),
        density_mean=0.2,
        density_std=0.05,
        distance_length=1.5,
        **changes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = DensityNetwork(spec.network, descriptor.n_features, spec.distance_columns(), spec.distance_length)
        model = DensityModel.from_network(spec, network)
    # Fresh networks give almost the same value everywhere; larger weights make errors of order and place visible.
    tensors = {name: value * 6 if name.endswith("weight_mean") else value for name, value in model.tensors.items()}
    return DensityModel(spec, tensors)


def aluminium(repeat: int = 1, rattle: float = 0.1, seed: int = 0) -> Atoms:
    """Conventional cells of fcc aluminium, shaken."""
    atoms = bulk("Al", "fcc", a=4.05, cubic=True).repeat(repeat)
    atoms.positions += np.random.default_rng(seed).normal(scale=rattle, size=(len(atoms), 3))
    return atoms


def settings(**changes: Any) -> dict[str, Any]:
    """Arguments of `predict` that keep a test small and exact."""
    return {"device": "cpu", "precision": "fp32", "progress": False, "tile_shape": (8, 8, 8)} | changes


def source_of(structure: Structure, folder: Path | None = None) -> StructureSource:
    """The atoms in pieces whose order is not theirs."""
    order = np.random.default_rng(2).permutation(len(structure))
    header = Header(len(structure), structure.cell, np.zeros(3), structure.pbc)
    chunks = ((structure.positions[part], structure.numbers[part], part) for part in np.array_split(order, 5))
    return StructureSource.from_chunks(header, chunks, folder)


TRICLINIC = np.array([[3.1, 0.2, -0.3], [0.9, 3.6, 0.4], [-0.5, 1.1, 4.2]])


def wave(grid: Grid, structure: Structure) -> np.ndarray:
    """A periodic field with a different period along each cell vector, so that a swap of axes shows."""
    s = (grid.points() - grid.origin) @ np.linalg.inv(structure.cell)
    x, y, z = (2 * np.pi * s).T
    value = 0.3 + 0.1 * np.cos(x) + 0.05 * np.sin(2 * y) + 0.02 * np.cos(3 * z + 0.4) + 0.03 * np.sin(x + y - z)
    return value.reshape(grid.shape)


def triclinic_structure() -> Structure:
    """Three atoms of two species in a triclinic cell, the species not in order."""
    fractions = np.array([[0.1, 0.2, 0.3], [0.6, 0.7, 0.2], [0.4, 0.45, 0.8]])
    return Structure(fractions @ TRICLINIC, np.array([14, 13, 14]), TRICLINIC, np.array([True, True, True]))


def datasets_of(path: Path) -> dict[str, bytes]:
    """The bytes of every dataset in an HDF5 file."""
    import h5py

    found: dict[str, bytes] = {}
    with h5py.File(path, "r") as h5:
        h5.visititems(
            lambda name, item: found.update({name: np.asarray(item[()]).tobytes()}) if hasattr(item, "shape") else None
        )
    return found
