"""Outside of the training domain sigma must say so; inside, nothing may change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111

import gpurho
from gpurho.domain import UNBOUNDED, domain_excess, extrapolation_sigma


def test_excess_is_the_largest_distance_from_the_box():
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 2.0])
    x = torch.tensor([[0.0, 1.0], [1.5, 1.0], [1.5, -3.0], [-1.0, 2.0]])
    assert domain_excess(x, low, high).tolist() == [0.0, 0.5, 3.0, 0.0]
    everywhere = torch.full((2,), UNBOUNDED)
    assert domain_excess(x, -everywhere, everywhere).tolist() == [0.0] * 4


def test_sigma_of_extrapolation_grows_up_to_the_rms_density():
    sigma = extrapolation_sigma(torch.tensor([0.0, 1.0, 5.0, 10.0, 40.0]), 5.0)
    assert sigma.tolist() == pytest.approx([0.0, 0.05, 1.25, 5.0, 5.0])


def test_a_surface_is_not_predicted_with_confidence_by_a_model_of_the_bulk():
    slab = fcc111("Al", (1, 1, 4), a=4.05, vacuum=7.0)
    rho = gpurho.predict(slab, spacing=0.5, progress=False)
    vacuum = np.abs((np.arange(rho.shape[2]) / rho.shape[2]) - 0.5) > 0.42
    assert rho.epistemic[:, :, vacuum].min() > 0.1
    inside = np.asarray(rho.epistemic)[:, :, rho.shape[2] // 2]
    assert inside.max() < 0.1
    # The missing electrons of the vacuum lie within the error bar of the total.
    assert abs(rho.electrons - 12.0) < rho.electrons_std


def test_a_thermal_crystal_lies_inside():
    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(2)
    atoms.rattle(0.1, seed=3)
    rho = gpurho.predict(atoms, spacing=0.35, progress=False)
    assert np.mean(np.asarray(rho.epistemic) > 0.02) < 0.02
