"""Radial channels fitted to densities."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from gpurho.contraction import fit_contraction, projections
from gpurho.datasets import Snapshot
from gpurho.descriptors import DescriptorSpec, descriptors
from gpurho.errors import SettingsError
from gpurho.grid import Grid
from gpurho.structure import Structure

SPEC = DescriptorSpec(("Si", "Ge"), family="smooth", cutoff=4.5, n_radial=8, n_basis=3, l_max=3)


def structure(seed: int, n: int = 8) -> Structure:
    rng = np.random.default_rng(seed)
    cell = np.diag([5.4, 5.6, 5.2]) + 0.4 * rng.standard_normal((3, 3))
    numbers = np.where(np.arange(n) % 2, 14, 32)
    return Structure(rng.random((n, 3)) @ cell, numbers, cell, (True, True, True))


def power_spectrum(moments: np.ndarray, matrix: np.ndarray, l_max: int) -> np.ndarray:
    """By the definition: contract, multiply, add up over m; (n_points, pairs * l_max)."""
    c = np.einsum("pskq,snk->psnq", moments.astype(float), matrix).reshape(len(moments), -1, moments.shape[-1])
    columns = [
        (c[:, a, degree**2 : (degree + 1) ** 2] * c[:, b, degree**2 : (degree + 1) ** 2]).sum(-1)
        for a in range(c.shape[1])
        for b in range(a, c.shape[1])
        for degree in range(1, l_max + 1)
    ]
    return np.stack(columns, 1)


@pytest.mark.parametrize("seed", [1, 2])
def test_projections_give_the_descriptors(seed):
    atoms = structure(seed)
    points = np.random.default_rng(seed).uniform(-3, 8, (600, 3))
    moments = projections(atoms, SPEC, points)
    assert moments.shape == (600, 2, 8, 16)
    matrix = np.random.default_rng(5).standard_normal((2, 3, 8))
    spec = replace(SPEC, contraction=tuple(tuple(tuple(row) for row in block) for block in matrix))
    found = descriptors(atoms, points, spec)
    two = moments[..., 0].reshape(600, -1)
    expected = np.concatenate([two, power_spectrum(moments, matrix, 3)], 1)
    assert np.abs(found - expected).max(0) / expected.std(0) == pytest.approx(0, abs=1e-4)


def test_projections_where_a_species_or_every_atom_is_missing():
    atoms = Structure(np.zeros((1, 3)), np.array([14]), 30 * np.eye(3), (False, False, False))
    moments = projections(atoms, SPEC, np.array([[1.0, 0, 0], [20.0, 20, 20]]))
    assert np.abs(moments[0, 0]).max() > 0.1
    assert not moments[0, 1].any()
    assert not moments[1].any()


def labelled(seed: int, matrix: np.ndarray) -> Snapshot:
    """A density that depends on the anisotropy of silicon in one hidden radial channel."""
    atoms = structure(seed)
    grid = Grid((12, 12, 12), atoms.cell)
    points = grid.points((0, 0, 0), grid.shape)
    spectrum = power_spectrum(projections(atoms, SPEC, points), matrix, 3)
    silicon = spectrum[:, 1]  # channel 1 with itself, l = 2
    rho = 1.0 + 0.1 * silicon / silicon.std()
    return Snapshot(atoms, rho.reshape(grid.shape), float(rho.sum() * grid.dv), {})


def test_fitted_channels_describe_more_than_the_first_ones():
    hidden = np.zeros((2, 3, 8))
    hidden[:, 0, 5] = 1.0
    snapshots = [labelled(seed, hidden) for seed in (1, 2, 3)]
    torch.manual_seed(3)
    before = torch.get_rng_state()
    fit = fit_contraction(snapshots, SPEC, points_per_snapshot=800, epochs=25, seed=4)
    assert torch.equal(before, torch.get_rng_state())
    assert fit.n_points == 2400
    assert len(fit.losses) == 25
    assert fit.losses[-1] < 0.5 * fit.losses[1]
    matrix = np.array(fit.spec.contraction)
    assert matrix.shape == (2, 3, 8)
    assert np.linalg.norm(matrix, axis=-1) == pytest.approx(1, abs=1e-5)
    again = fit_contraction(snapshots, SPEC, points_per_snapshot=800, epochs=25, seed=4)
    assert again.spec == fit.spec
    # On atoms not seen, a linear fit to the features of the channels found must beat that to the first ones.
    test = labelled(9, hidden)
    points = test.grid.points((0, 0, 0), test.grid.shape)
    errors = []
    for spec in (SPEC, fit.spec):
        train = np.concatenate(
            [descriptors(s.structure, s.grid.points((0, 0, 0), s.grid.shape), spec) for s in snapshots]
        )
        rho = np.concatenate([s.density.ravel() for s in snapshots])
        mean, std = train.mean(0), train.std(0)
        weights, *_ = np.linalg.lstsq(np.c_[(train - mean) / std, np.ones(len(train))], rho, rcond=1e-6)
        x = np.c_[(descriptors(test.structure, points, spec) - mean) / std, np.ones(len(points))]
        errors.append(np.sqrt(np.mean((x @ weights - test.density.ravel()) ** 2)))
    assert errors[1] < 0.7 * errors[0]


def test_descriptors_without_channels_are_refused():
    for spec in (DescriptorSpec(("Al",)), DescriptorSpec(("Al",), family="smooth", n_basis=0)):
        with pytest.raises(SettingsError, match="no radial channels"):
            fit_contraction([], spec)
