"""The posterior of the last layer, against Bayesian linear regression written out in NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_tools import delta_model, features

from gpurho.errors import ModelError, SettingsError
from gpurho.lastlayer import HeldOut, fit_last_layer
from gpurho.layers import propagate
from gpurho.metrics import spearman
from gpurho.model import DensityModel, load_exported


def labels(model: DensityModel, x: torch.Tensor, noise: float = 0.01, seed: int = 0) -> torch.Tensor:
    mean = model.evaluator(precision="fp32", uncertainty=None)(x)[0]
    return mean + noise * torch.randn(len(x), generator=torch.Generator().manual_seed(seed))


def phi_of(model: DensityModel, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Last activations with a column of ones, and the learned variance, in float64 NumPy."""
    from scipy.special import erf

    t = {k: v.double().numpy() for k, v in model.tensors.items()}
    h = (x.double().numpy() - t["feature_mean"]) / t["feature_std"]
    n_hidden = model.spec.network.n_hidden
    for i in range(n_hidden):
        z = h @ t[f"layers.{i}.weight_mean"].T + t[f"layers.{i}.bias_mean"]
        a = z * 0.5 * (1 + erf(z / np.sqrt(2)))
        j = i % model.spec.network.layers
        h = a + (t["skip"][i // model.spec.network.layers, j - 1] * h if j else 0)
    log_variance = h @ t[f"layers.{n_hidden}.weight_mean"][1] + t[f"layers.{n_hidden}.bias_mean"][1]
    return np.c_[h, np.ones(len(h))], np.exp(log_variance)


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("noise", ["learned", "constant"])
def test_the_posterior_is_that_of_bayesian_linear_regression(blocks: int, noise: str) -> None:
    model, x = delta_model(blocks), features(900)
    y, share = labels(model, x), torch.rand(900, generator=torch.Generator().manual_seed(2)) + 0.5
    fitted = fit_last_layer(model, x, y, share, prior_scale=2.0, tempering=0.1, noise=noise, refit=True)
    phi, variance = phi_of(model, x)
    target = (y.double().numpy() - x.double().numpy() @ model.tensors["baseline"].double().numpy() - 0.01) / 0.05
    n, w = model.spec.network.n_hidden, share.double().numpy()
    if noise == "constant":
        old = np.r_[
            model.tensors[f"layers.{n}.weight_mean"][0].numpy(), model.tensors[f"layers.{n}.bias_mean"][0].numpy()
        ]
        variance = np.full(900, np.sum(w * (phi @ old - target) ** 2) / w.sum())
        assert fitted.tensors[f"layers.{n}.bias_mean"][1] == pytest.approx(np.log(variance[0]), abs=1e-4)
        assert not fitted.tensors[f"layers.{n}.weight_mean"][1].any()
    k = phi.shape[1]
    prior = np.r_[np.full(k - 1, (k - 1) / 4.0), 0.25]
    covariance = np.linalg.inv(0.1 * (phi.T * (w / variance)) @ phi + np.diag(prior))
    mean = covariance @ (0.1 * phi.T @ (w / variance * target))
    got = fitted.tensors["last_layer"].double().numpy()
    np.testing.assert_allclose(got @ got.T, covariance, rtol=2e-3, atol=2e-4 * np.abs(covariance).max())
    np.testing.assert_allclose(fitted.tensors[f"layers.{n}.weight_mean"][0], mean[:-1], atol=2e-3 * np.abs(mean).max())
    assert np.ptp(mean) > 0.01
    # The error bars of the evaluator are those of the covariance.
    inside = features(150)
    rows = np.arange(150) if blocks == 0 else np.arange(0, 150, 2)
    sigma = fitted.evaluator(precision="fp32", uncertainty="last-layer")(inside)[2].numpy()[rows]
    test, _ = phi_of(fitted, inside)
    expected = 0.05 * np.sqrt(np.einsum("ni,ij,nj->n", test, covariance, test))[rows]
    near = (inside.numpy()[rows] > -4).all(1) & (inside.numpy()[rows] < 4).all(1)
    assert near.sum() > 20
    np.testing.assert_allclose(sigma[near], expected[near], rtol=5e-3)


def test_sigma_is_the_spread_of_drawn_last_layers() -> None:
    model, x = delta_model(), features(600)
    fitted = fit_last_layer(model, x, labels(model, x), tempering=0.05)
    sigma = fitted.evaluator(precision="fp32", uncertainty="last-layer")(x)[2]
    n = fitted.spec.network.n_hidden
    weights = [fitted.tensors[f"layers.{i}.weight_mean"] for i in range(n + 1)]
    biases = [fitted.tensors[f"layers.{i}.bias_mean"] for i in range(n + 1)]
    z = (x - fitted.tensors["feature_mean"]) / fitted.tensors["feature_std"]
    draws = []
    generator = torch.Generator().manual_seed(0)
    for _ in range(800):
        shift = fitted.tensors["last_layer"] @ torch.randn(13, generator=generator)
        w, b = weights[-1].clone(), biases[-1].clone()
        w[0] += shift[:-1]
        b[0] += shift[-1]
        out = propagate(z, [*weights[:-1], w], [*biases[:-1], b], fitted.tensors["skip"], 2)
        draws.append(out[:, 0] * 0.05)
    spread = torch.stack(draws).std(0)
    inside = ((x > -4) & (x < 4)).all(1)
    ratio = (sigma / spread)[inside].numpy()
    assert np.median(ratio) == pytest.approx(1, abs=0.03)
    assert spearman(sigma[inside].numpy(), spread[inside].numpy()) > 0.99


def test_held_out_points_choose_how_much_a_point_counts() -> None:
    """Labels wrong by a smooth function with far fewer degrees of freedom than points: tempering must fall."""
    model, x = delta_model(), features(2000)
    clean = labels(model, x, 0.0)
    aleatoric = model.evaluator(precision="fp32")(x)[1]
    noise = torch.randn(2000, generator=torch.Generator().manual_seed(3)) * aleatoric
    honest = fit_last_layer(model, x, clean + noise, held_out=HeldOut(x[1000:], (clean + noise)[1000:]))
    phi, _ = phi_of(model, x)
    shift = torch.from_numpy(phi @ np.random.default_rng(0).normal(size=phi.shape[1])).float() * 0.05
    wrong = fit_last_layer(model, x, clean + noise, held_out=HeldOut(x[1000:], (clean + noise + shift)[1000:]))
    assert wrong.spec.last_layer["tempering"] < honest.spec.last_layer["tempering"]
    assert wrong.spec.last_layer["held_out_nll"] > honest.spec.last_layer["held_out_nll"]


@pytest.mark.parametrize("blocks", [0, 1])
def test_files_exports_bits_and_precision(blocks: int, tmp_path: Path) -> None:
    model, x = delta_model(blocks), features(300)
    fitted = fit_last_layer(model, x, labels(model, x))
    assert fitted.fingerprint() != model.fingerprint()
    fitted.save(tmp_path / "m.safetensors")
    again = DensityModel.load(tmp_path / "m.safetensors")
    assert again.spec == fitted.spec
    fitted.export(tmp_path / "m.pt", "last-layer")
    exported = load_exported(tmp_path / "m.pt", trusted=True)
    evaluate = again.evaluator(precision="fp32", uncertainty="last-layer", batch_size=128)
    whole = evaluate(x)
    for got, want in zip(exported(x), whole, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    for rows in (slice(0, 1), slice(5, 250), slice(127, 129)):
        for part, full in zip(evaluate(x[rows]), whole, strict=True):
            assert torch.equal(part, full[rows])
    np.testing.assert_array_equal(whole[0], model.evaluator(precision="fp32", batch_size=128)(x)[0])
    narrow = fitted.evaluator(precision="bf16", uncertainty="last-layer")(x)[2]
    assert (narrow / whole[2] - 1).abs().median() < 0.03
    with pytest.raises(SettingsError, match="sampled"):
        fitted.export(tmp_path / "m.pt", "sampled")


def test_arguments_are_checked() -> None:
    model, x = delta_model(), features(50)
    y = labels(model, x)
    with pytest.raises(ModelError, match="no posterior of its last layer"):
        model.evaluator(uncertainty="last-layer")
    for changes, message in (
        ({"noise": "white"}, "noise 'white'"),
        ({"tempering": 0.0}, "tempering 0.0"),
        ({"prior_scale": -1.0}, "prior_scale -1.0"),
    ):
        with pytest.raises(SettingsError, match=message):
            fit_last_layer(model, x, y, **changes)
    with pytest.raises(SettingsError, match="do not fit"):
        fit_last_layer(model, x, y[:-1])
    fitted = fit_last_layer(model, x, y)
    with pytest.raises(ModelError, match="triangular"):
        DensityModel(fitted.spec, fitted.tensors | {"last_layer": torch.ones(13, 13)})
