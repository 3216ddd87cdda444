"""Models whose target is the difference from a two-body superposition, and networks without hidden layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from model_tools import SMOOTH, delta_model, features

from gpurho.descriptors import DescriptorSpec
from gpurho.domain import domain_excess, extrapolation_sigma
from gpurho.errors import ModelError
from gpurho.model import DensityModel, ModelSpec, load_exported


def superposition(model: DensityModel, x: torch.Tensor) -> np.ndarray:
    return x.numpy().astype(float) @ model.tensors["baseline"].numpy().astype(float)


@pytest.mark.parametrize("blocks", [0, 1])
def test_delta_adds_the_two_body_part_of_the_raw_features(blocks: int) -> None:
    model, plain = delta_model(blocks), delta_model(blocks, "density")
    x = features()
    added = superposition(model, x)
    assert np.ptp(added) > 0.1
    got, want = model.evaluator(precision="fp32")(x), plain.evaluator(precision="fp32")(x)
    np.testing.assert_allclose(got[0].numpy() - want[0].numpy(), added, atol=1e-6)
    np.testing.assert_array_equal(got[1], want[1])
    narrow = model.evaluator(precision="bf16")(x)[0].numpy() - plain.evaluator(precision="bf16")(x)[0].numpy()
    np.testing.assert_allclose(narrow, added, atol=1e-6)


def test_delta_bits_do_not_depend_on_the_company(tmp_path: Path) -> None:
    model, x = delta_model(), features()
    for uncertainty in ("analytic", "sampled", None):
        evaluate = model.evaluator(precision="fp32", uncertainty=uncertainty, samples=2, batch_size=64)
        whole = evaluate(x)[0]
        for rows in (slice(0, 1), slice(3, 67), slice(130, 200)):
            assert torch.equal(evaluate(x[rows])[0], whole[rows])


@pytest.mark.parametrize("blocks", [0, 1])
def test_files_networks_and_archives_of_delta(blocks: int, tmp_path: Path) -> None:
    model, x = delta_model(blocks), features()
    model.save(tmp_path / "m.safetensors")
    again = DensityModel.load(tmp_path / "m.safetensors")
    assert again.spec == model.spec
    assert again.fingerprint() == model.fingerprint()
    assert again.fingerprint() != delta_model(blocks, "density").fingerprint()
    model.export(tmp_path / "m.pt")
    exported = load_exported(tmp_path / "m.pt", trusted=True)
    for a, b, c in zip(
        model.evaluator(precision="fp32")(x), again.evaluator(precision="fp32")(x), exported(x), strict=True
    ):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)
    trained = DensityModel.from_network(model.spec, model.network(), model.tensors["baseline"])
    torch.testing.assert_close(trained.evaluator(precision="fp32")(x)[0], model.evaluator(precision="fp32")(x)[0])


def test_far_outside_of_training_sigma_is_of_the_size_of_densities_not_of_differences() -> None:
    model = delta_model()
    x = features()
    x[0, 3] = 1e3
    mean = float(model.tensors["feature_mean"].double() @ model.tensors["baseline"].double()) + 0.01
    sigma = model.evaluator(precision="fp32")(x)[2]
    assert float(sigma[0]) >= 0.999 * np.hypot(mean, 0.05)
    assert model.density_rms == pytest.approx(np.hypot(mean, 0.05))


def test_baseline_is_checked() -> None:
    model = delta_model()
    with pytest.raises(ModelError, match="baseline"):
        DensityModel(model.spec, {k: v for k, v in model.tensors.items() if k != "baseline"})
    wide = torch.ones(SMOOTH.n_features)
    with pytest.raises(ModelError, match="beyond the 10 columns"):
        DensityModel(model.spec, model.tensors | {"baseline": wide})
    with pytest.raises(ModelError, match="smooth"):
        ModelSpec(DescriptorSpec(("Al",)), {"Al": 3.0}, target="delta")


def test_without_hidden_layers_the_model_is_a_linear_one_with_its_variance() -> None:
    """Against NumPy in float64, in every mode."""
    model, x = delta_model(0), features()
    t = {k: v.numpy().astype(float) for k, v in model.tensors.items()}
    z = (x.numpy() - t["feature_mean"]) / t["feature_std"]
    out = z @ t["layers.0.weight_mean"].T + t["layers.0.bias_mean"]
    variance = z**2 @ t["layers.0.weight_sigma"][0] ** 2 + t["layers.0.bias_sigma"][0] ** 2
    low, high = (-4 - t["feature_mean"]) / t["feature_std"], (4 - t["feature_mean"]) / t["feature_std"]
    beyond = extrapolation_sigma(
        domain_excess(torch.tensor(z), torch.tensor(low), torch.tensor(high)), model.density_rms
    ).numpy()
    for precision in ("fp32", "bf16"):
        evaluate = model.evaluator(precision=precision)
        assert evaluate.precision == "fp32"
        mean, aleatoric, epistemic = (v.numpy() for v in evaluate(x))
        np.testing.assert_allclose(mean, out[:, 0] * 0.05 + 0.01 + superposition(model, x), atol=2e-6)
        np.testing.assert_allclose(aleatoric, np.exp(out[:, 1] / 2) * 0.05, rtol=1e-5)
        np.testing.assert_allclose(epistemic, np.hypot(np.sqrt(variance) * 0.05, beyond), rtol=1e-5)
    sampled = model.evaluator(precision="fp32", uncertainty="sampled", samples=500)(x)[2].numpy()
    inside = beyond == 0
    assert np.median(sampled[inside] / epistemic[inside]) == pytest.approx(1, abs=0.05)


def test_a_network_without_hidden_layers_trains_and_scripts() -> None:
    model, x = delta_model(0), features()
    net = model.network()
    out, kl = net.sample_shared(x)
    (out.square().mean() + kl / 1e4).backward()
    assert net.linears[0].weight_mean.grad.abs().max() > 0
    torch.testing.assert_close(torch.jit.script(net)(x), net(x))
    assert net.sample(x).shape == (200, 2)
