"""Error bars of integrals: against explicit covariances, drawn weights, and gradients by autograd."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_tools import delta_model, features
from predict_tools import aluminium, datasets_of, settings, small_model

import gpurho
from gpurho.errors import SettingsError
from gpurho.integrals import SKETCH, IntegralErrors, sublattice
from gpurho.lastlayer import activations, fit_last_layer
from gpurho.layers import propagate
from gpurho.model import DensityModel
from gpurho.partition import Tile
from gpurho.uncertainty import CalibrationFactors

CURVE = CalibrationFactors(1.0, 1.5, (-0.5, 0.0, 0.5), (0.5, 1.0, 2.0))


def model_for(kind: str, blocks: int = 1) -> DensityModel:
    model, x = delta_model(blocks), inside(500, 9)
    if kind == "last-layer":
        model = fit_last_layer(model, x, model.evaluator(uncertainty=None)(x)[0], tempering=0.1)
    name = "last_layer_calibration" if kind == "last-layer" else "calibration_factors"
    return model.with_spec(**{name: CURVE})


def inside(n: int, seed: int = 1) -> torch.Tensor:
    """Features within the training domain."""
    x = torch.randn(n, delta_model().spec.descriptor.n_features, generator=torch.Generator().manual_seed(seed))
    return x.clamp(-3.9, 3.9)


def gradient_sum(model: DensityModel, x: torch.Tensor, shares: np.ndarray) -> np.ndarray:
    """d sum_i c_i f_i / dw, times the weights' sigmas, over all weights: by autograd in float64."""
    net = model.network().double()
    out = net(x.double())[:, 0] * model.spec.density_std
    mean = model.evaluator(precision="fp32", uncertainty=None)(x)[0]
    factors = model.spec.factors("analytic")
    seeds = torch.from_numpy(shares) * factors.at(mean).double() * factors.epistemic
    (out * seeds).sum().backward()
    parts = []
    for layer in net.linears:
        for kind in ("weight", "bias"):
            sigma = torch.nn.functional.softplus(getattr(layer, f"{kind}_rho").detach())
            parts.append((getattr(layer, f"{kind}_mean").grad * sigma).numpy().ravel())
    return np.concatenate(parts)


@pytest.mark.parametrize("blocks", [0, 1, 2])
def test_analytic_length_is_that_of_the_summed_gradient(blocks: int) -> None:
    model, x = model_for("analytic", blocks), inside(300)
    shares = np.random.default_rng(0).uniform(0, 1, 300)
    exact = np.linalg.norm(gradient_sum(model, x, shares))
    vectors = IntegralErrors(model, "analytic")
    assert vectors.size == SKETCH + 1
    got = float(vectors(x, torch.from_numpy(shares)).norm())
    assert got == pytest.approx(exact, rel=0.12)
    # Deviations do not add: the bound is far from what gradients give.
    bound = float(shares @ model.evaluator(precision="fp32")(x)[2].double().numpy())
    assert exact < (0.8 if blocks < 2 else 0.99) * bound


def test_sketch_is_exact_for_one_point_on_average_and_linear() -> None:
    model, x = model_for("analytic"), inside(200)
    vectors = IntegralErrors(model, "analytic")
    each = vectors(x, None, torch.arange(200), 200)
    sigma = model.evaluator(precision="fp32")(x)[2].double()
    ratio = (each.norm(dim=1) / sigma).numpy()
    assert ratio.mean() == pytest.approx(1, abs=0.03)
    assert ratio.std() < 0.12
    torch.testing.assert_close(each.sum(0), vectors(x)[0], rtol=1e-4, atol=1e-6)


def test_last_layer_against_the_explicit_covariance_of_the_points() -> None:
    model, x = model_for("last-layer"), inside(300)
    shares = np.random.default_rng(0).uniform(0, 1, 300)
    phi = np.concatenate([p for _, p, _ in activations(model, x)])
    mean, _, epistemic = model.evaluator(precision="fp32", uncertainty="last-layer")(x)
    factor = model.last_layer().double().numpy()
    scale = CURVE.at(mean).double().numpy() * CURVE.epistemic * model.spec.density_std
    covariance = np.outer(scale, scale) * (phi @ factor @ factor.T @ phi.T)
    np.testing.assert_allclose(np.sqrt(np.diag(covariance)), epistemic, rtol=2e-3)
    got = IntegralErrors(model, "last-layer")(x, torch.from_numpy(shares)).norm()
    assert float(got) == pytest.approx(np.sqrt(shares @ covariance @ shares), rel=1e-3)


def test_sampled_against_integrals_of_drawn_networks() -> None:
    model, x = model_for("sampled"), inside(300)
    vectors = IntegralErrors(model, "sampled", samples=40, seed=3)
    mean = model.evaluator(precision="fp32", uncertainty=None)(x)[0]
    seeds = (CURVE.at(mean) * CURVE.epistemic * model.spec.density_std).double()
    z = (x - model.tensors["feature_mean"]) / model.tensors["feature_std"]
    sums = []
    for k in range(40):
        weights, biases = model.drawn(3, k)
        sums.append(float(propagate(z, weights, biases, model.tensors["skip"], 2)[:, 0].double() @ seeds))
    assert float(vectors(x).norm()) == pytest.approx(np.std(sums), rel=1e-3)


def test_analytic_agrees_with_many_samples() -> None:
    model, x = model_for("analytic"), inside(400)
    small = DensityModel(
        model.spec, {k: v * 0.2 if k.endswith("_sigma") else v for k, v in model.tensors.items()}
    )  # small sigmas, where the linearisation holds
    analytic = float(IntegralErrors(small, "analytic")(x).norm())
    sampled = float(IntegralErrors(small, "sampled", samples=600)(x).norm())
    assert analytic == pytest.approx(sampled, rel=0.12)


def test_points_outside_of_training_go_together() -> None:
    model, x = model_for("last-layer"), features(50)
    x[:, 3] = 1e3
    sigma = model.evaluator(precision="fp32", uncertainty="last-layer")(x)[2].double()
    got = float(IntegralErrors(model, "last-layer")(x).norm())
    assert got >= 0.99 * 50 * model.density_rms
    assert got <= 1.01 * float(sigma.sum())


@pytest.mark.parametrize("kind", ["analytic", "last-layer", "sampled"])
def test_owners_split_the_sum(kind: str) -> None:
    model, x = model_for(kind), inside(150)
    vectors = IntegralErrors(model, kind, samples=5)
    owners = torch.from_numpy(np.random.default_rng(1).integers(0, 4, 150))
    shares = torch.rand(150, generator=torch.Generator().manual_seed(0))
    split = vectors(x, shares, owners, 4)
    for k in range(4):
        one = vectors(x[owners == k], shares[owners == k])[0]
        torch.testing.assert_close(split[k], one, rtol=1e-4, atol=1e-6)


def test_sublattice_stands_for_the_tile() -> None:
    steps = np.diag([0.2, 0.3, 0.8])
    tile = Tile(0, (4, 5, 6), (24, 17, 9))
    box, weight = sublattice(tile, steps, 0.7)
    index = np.indices(tile.shape)[:, *box].reshape(3, -1).T + np.array(tile.start)
    assert (index[:, 0] % 3 == 0).all()
    assert (index[:, 1] % 2 == 0).all()
    assert len(np.unique(index[:, 2])) == 3
    assert weight * len(index) == pytest.approx(tile.n_points)
    box, weight = sublattice(Tile(0, (1, 1, 1), (2, 2, 2)), steps, 5.0)
    assert np.arange(1).reshape(1, 1, 1)[box].tolist() == [[[0]]]
    assert weight == 1.0


@pytest.mark.parametrize("kind", ["analytic", "sampled"])
def test_electrons_std_of_a_prediction(kind: str, tmp_path: Path) -> None:
    """Against the vector of all points at once, in memory and on disk."""
    model, atoms = small_model(), aluminium()
    options = settings(uncertainty=kind, samples=10, spacing=0.33, tile_shape=(7, 8, 9))
    rho = gpurho.predict(atoms, model, **options)
    stored = gpurho.predict(atoms, model, out=tmp_path / "rho.h5", **options)
    assert stored.electrons_std == rho.electrons_std
    assert "tiles/errors" in datasets_of(tmp_path / "rho.h5")
    x = torch.from_numpy(gpurho.descriptors(atoms, rho.grid.points(), model.spec.descriptor))
    common = float(IntegralErrors(model, kind, samples=10)(x).norm()) * rho.grid.dv
    noise = np.sqrt(np.square(rho.aleatoric, dtype=float).sum()) * rho.grid.dv
    assert rho.electrons_std == pytest.approx(np.hypot(common, noise), rel=0.03)


def test_noise_goes_together_within_the_correlation_volume() -> None:
    factors = CalibrationFactors(correlation_volume=0.5)
    plain, model = small_model(), small_model(calibration_factors=factors)
    options = settings(spacing=0.4)
    before, rho = (gpurho.predict(aluminium(), m, **options) for m in (plain, model))
    a2, dv = np.square(rho.aleatoric, dtype=float).sum(), rho.grid.dv
    assert dv < 0.5
    extra = rho.electrons_std**2 - before.electrons_std**2
    assert extra == pytest.approx(a2 * dv * (0.5 - dv), rel=1e-6)
    gain = rho.per_atom().electrons_std ** 2 - before.per_atom().electrons_std ** 2
    assert gain.sum() == pytest.approx(a2 * dv * (0.5 - dv), rel=1e-6)


def test_atoms_against_their_points_at_once() -> None:
    from gpurho.peratom import NearestAtoms

    model, atoms = small_model(), aluminium()
    rho = gpurho.predict(atoms, model, **settings(spacing=0.42))
    charges, bound = rho.per_atom(model), rho.per_atom()
    assert (charges.electrons_std < bound.electrons_std).all()
    np.testing.assert_array_equal(charges.electrons, bound.electrons)
    points, owners, shares = NearestAtoms(rho.structure, rho.grid).owners(rho.grid.points())
    x = torch.from_numpy(gpurho.descriptors(atoms, rho.grid.points(), model.spec.descriptor))[points]
    found = IntegralErrors(model, "analytic")(x, torch.from_numpy(shares), torch.from_numpy(owners), len(atoms))
    noise = np.bincount(owners, shares * np.square(rho.aleatoric, dtype=float).reshape(-1)[points])
    expected = np.hypot(found.norm(dim=1).numpy(), np.sqrt(noise)) * rho.grid.dv
    np.testing.assert_allclose(charges.electrons_std, expected, rtol=0.03)
    with pytest.raises(SettingsError, match="not predicted by this model"):
        rho.per_atom(small_model(seed=1))
