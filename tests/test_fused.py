"""The fused network: by Triton's interpreter against float64 and TorchScript; compiled for GPUs; refused elsewhere."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch

from gpurho import executors, fused, networkcheck
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import DeviceError, MissingDependencyError, ModelError, SettingsError
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import DensityModel, ModelSpec, load_model

HAS_TRITON = importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")
CHECK = Path(__file__).resolve().parents[1] / "benchmarks" / "fused_check.py"
SMALL = DescriptorSpec(("Al",), n_distances=20, n_angle_atoms=5, n_angle_neighbors=3)


def make(network: NetworkSpec, length: float = 0.0, baseline: bool = False, seed: int = 0) -> DensityModel:
    """A model of random weights; its features are 20 distances and 15 cosines, or 41 smooth ones with a baseline."""
    torch.manual_seed(seed)
    descriptor = SMALL
    if baseline:
        descriptor = DescriptorSpec(("Al",), family="smooth", n_radial=11, n_basis=3, l_max=5)
    spec = ModelSpec(descriptor, {"Al": 3.0}, network, 0.2, 0.05, length, target="delta" if baseline else "density")
    net = DensityNetwork(network, descriptor.n_features, spec.distance_columns(), length)
    with torch.no_grad():
        net.feature_mean.copy_(torch.rand(descriptor.n_features))
        net.feature_std.copy_(0.5 + torch.rand(descriptor.n_features))
        net.feature_low.copy_(net.feature_mean - 1.5 * net.feature_std)
        net.feature_high.copy_(net.feature_mean + 1.5 * net.feature_std)
        net.skip.copy_(torch.rand_like(net.skip))
        for layer in net.linears:
            layer.weight_rho.add_(torch.rand_like(layer.weight_rho))
            layer.bias_mean.normal_()
    two_body = torch.zeros(descriptor.n_features)
    two_body[: spec.n_two_body] = torch.randn(spec.n_two_body) * 0.01
    return DensityModel.from_network(spec, net, two_body if baseline else None)


def features(model: DensityModel, n: int) -> torch.Tensor:
    """Random features, some of which lie outside of the training domain."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((n, model.spec.descriptor.n_features), generator=generator)
    return (model.tensors["feature_mean"] + x * model.tensors["feature_std"]).abs()


def oracle(model: DensityModel, x: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Outputs (n, 2) and epistemic variance (n,) in float64: the gradient by every weight, one by one, by autograd."""
    t = {name: value.double() for name, value in model.tensors.items()}
    spec = model.spec
    f = x.double()
    if spec.distance_length > 0:
        columns = spec.distance_columns()
        for start, stop in zip(columns[::2], columns[1::2], strict=True):
            f[:, start:stop] = torch.exp(-f[:, start:stop] / spec.distance_length)
    inputs = (f - t["feature_mean"]) / t["feature_std"]
    n_layers = spec.network.n_hidden + 1
    names = [f"layers.{i}.{kind}" for i in range(n_layers) for kind in ("weight", "bias")]
    weights = {name: t[f"{name}_mean"].clone().requires_grad_() for name in names}
    out, variances = [], []
    for row in inputs:
        h = row
        for i in range(n_layers):
            z = weights[f"layers.{i}.weight"] @ h + weights[f"layers.{i}.bias"]
            if i == n_layers - 1:
                break
            a = 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))
            j = i % spec.network.layers
            h = a + t["skip"][i // spec.network.layers, j - 1] * h if j else a
        gradients = torch.autograd.grad(z[0], list(weights.values()))
        parts = zip(names, gradients, strict=True)
        variances.append(sum(float((g.square() * t[f"{name}_sigma"].square()).sum()) for name, g in parts))
        out.append(z.detach().numpy())
    return np.array(out), np.array(variances)


@pytest.fixture
def interpreter(monkeypatch):
    """Triton runs kernels on the CPU; its interpreter does not know products of bfloat16, which it keeps as uint16."""
    monkeypatch.setattr(executors, "host_network", executors.triton_network)
    if not fused.interpreted():
        pytest.skip("Triton compiles here: this machine has a CUDA device")
    import triton.language as tl
    from triton.runtime import interpreter as module

    plain = module.InterpreterBuilder.create_dot

    def wide(x):
        if x.dtype != tl.bfloat16:
            return x
        values = module._convert_float(x.data, tl.bfloat16, tl.float32, None).view(np.float32)
        return module.TensorHandle(values, tl.float32)

    monkeypatch.setattr(
        module.InterpreterBuilder, "create_dot", lambda self, a, b, *rest: plain(self, wide(a), wide(b), *rest)
    )


NETWORKS = {
    "one block of two": (NetworkSpec(1, 2, 32), 0.0, False),
    "two blocks of three, decays, a width that is filled up": (NetworkSpec(2, 3, 9), 1.5, False),
    "two blocks of one, which have no skips": (NetworkSpec(2, 1, 16), 0.0, False),
    "one hidden layer": (NetworkSpec(1, 1, 20), 1.5, False),
    "two-body part, wide": (NetworkSpec(1, 2, 100), 0.0, True),
}


@needs_triton
@pytest.mark.parametrize("name", NETWORKS)
def test_the_kernel_against_float64(name, interpreter):
    model = make(*NETWORKS[name])
    x = features(model, 70)
    with torch.inference_mode():
        out, variance = oracle_of(model, x)
        evaluate = model.evaluator("cpu", "fp32", "analytic", executor="fused")
        found = evaluate._network(x)
    np.testing.assert_allclose(found.density.numpy(), out[:, 0], atol=2e-5)
    np.testing.assert_allclose(found.log_variance.numpy(), out[:, 1], atol=2e-5)
    np.testing.assert_allclose(found.variance.numpy(), variance, rtol=2e-4)


def oracle_of(model, x):
    """`oracle` where gradients are on."""
    with torch.inference_mode(False), torch.enable_grad():
        return oracle(model, x.clone())


@needs_triton
@pytest.mark.parametrize(
    ("name", "uncertainty"),
    [("al", "analytic"), ("al", "last-layer"), ("al", "sampled"), ("al", None), ("sige", "analytic")],
)
def test_shipped_models_by_the_kernel_and_by_torchscript(name, uncertainty, interpreter):
    model = load_model(name)
    x = features(model, 130)
    x[7] *= 3.0
    settings = {"uncertainty": uncertainty, "samples": 2, "seed": 5}
    one = model.evaluator("cpu", "fp32", executor="fused", **settings)
    other = model.evaluator("cpu", "fp32", executor="script", **settings)
    for mine, true in zip(one(x), other(x), strict=True):
        if true is None:
            assert mine is None
        else:
            torch.testing.assert_close(mine, true, rtol=1e-3, atol=1e-5 * float(true.abs().max()))
    assert one.n_outside == other.n_outside
    # Whoever comes with a point, its bits are the same.
    assert torch.equal(one(x[3:99])[0], one(x)[0][3:99])
    assert one(x[:0])[0].shape == (0,)
    # However its features lie in memory.
    assert torch.equal(one(x.T.contiguous().T)[0], one(x)[0])


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("uncertainty", ["analytic", "last-layer", "sampled", None])
@pytest.mark.parametrize("name", ["al", "sige"])
def test_shipped_models_on_a_gpu(name, uncertainty, precision):
    """Against float32 on the CPU, at random inputs, where bfloat16 strays more than at those of real atoms."""
    model = load_model(name)
    x = features(model, 5000).clamp(model.tensors["feature_low"], model.tensors["feature_high"])
    settings = {"uncertainty": uncertainty, "samples": 3}
    mine = model.evaluator("cuda", precision, executor="fused", **settings)(x.cuda())
    true = model.evaluator("cpu", "fp32", executor="script", **settings)(x)
    bound = model.spec.metrics["rmse"] / (5 if precision == "bf16" else 500)
    assert float((mine[0].cpu() - true[0]).square().mean().sqrt()) < bound
    if uncertainty in ("analytic", "last-layer"):
        torch.testing.assert_close(mine[2].cpu(), true[2], rtol=0.1, atol=1e-5)


@needs_triton
def test_narrow_products_stray_as_far_as_those_of_torchscript(interpreter):
    model = load_model("al")
    x = features(model, 256)
    true, script, narrow = (
        model.evaluator("cpu", precision, executor=executor)(x)[0]
        for precision, executor in (("fp32", "script"), ("bf16", "script"), ("bf16", "fused"))
    )
    assert 0 < float((narrow - true).square().mean()) < 9 * float((script - true).square().mean())


@needs_triton
def test_a_kernel_that_strays_is_refused(interpreter, monkeypatch):
    model = load_model("al")
    monkeypatch.setattr(networkcheck, "BOUNDS", {"fp32": 1e-12, "bf16": 1e-12})
    monkeypatch.setattr(networkcheck, "TIMES", 0.0)
    with pytest.raises(DeviceError, match=r"strays from the reference.*executor='script'"):
        model.evaluator("cpu", "fp32", executor="fused")


@needs_triton
def test_a_density_by_the_kernel(interpreter):
    from ase.build import bulk

    import gpurho

    atoms = bulk("Al", cubic=True)
    settings = {"device": "cpu", "precision": "fp32", "grid": (5, 6, 4), "progress": False}
    one, other = (gpurho.predict(atoms, executor=executor, **settings) for executor in ("fused", "script"))
    np.testing.assert_allclose(np.asarray(one.mean), np.asarray(other.mean), atol=1e-5)
    np.testing.assert_allclose(np.asarray(one.epistemic), np.asarray(other.epistemic), rtol=1e-3)
    assert one.electrons_std == pytest.approx(other.electrons_std, rel=1e-3)
    assert one.info["settings"]["executor"] == "fused"
    assert "executor" not in other.info["settings"]


@needs_triton
def test_the_kernels_of_the_shipped_models_compile_without_spills(tmp_path):
    report = tmp_path / "fused.json"
    # In a process of its own: what the interpreter changes in Triton stays changed.
    command = [sys.executable, str(CHECK), "--arch", "80", "90", "--networks", "al", "--modes", "analytic"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command += ["--json", str(report)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(report.read_text())
    assert {(row["arch"], row["precision"]) for row in rows} == set(product(("sm_80", "sm_90"), ("fp32", "bf16")))
    assert all(0 < row["registers"] <= 255 for row in rows)


def test_a_spill_too_much_shared_memory_or_a_failure_fails_the_check():
    spec = importlib.util.spec_from_file_location("fused_check", CHECK)
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    good = {"spill_stores": 0, "spill_loads": 0, "shared": 2**17, "arch": "sm_80"}
    assert not check.failed(good)
    for bad in ({"spill_loads": 4}, {"spill_stores": 4}, {"shared": 200 * 1024}, {"error": "no"}):
        assert check.failed({**good, **bad})
    assert not check.failed({**good, "shared": 200 * 1024, "arch": "sm_90"})


def test_where_it_does_not_run_it_says_so(monkeypatch):
    model = load_model("al")
    with pytest.raises(SettingsError, match=r"'onnx'.*auto, script, fused"):
        model.evaluator(executor="onnx")
    monkeypatch.setattr(executors, "host_network", executors.triton_network)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if HAS_TRITON:
        with pytest.raises(DeviceError, match=r"runs on GPUs.*executor='script'"):
            model.evaluator("cpu", executor="fused")
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"Triton.*executor='script'"):
        model.evaluator("cpu", executor="fused")


@needs_triton
@pytest.mark.parametrize("network", [NetworkSpec(1, 2, 129), NetworkSpec(3, 3, 32)])
def test_networks_that_do_not_fit_are_refused(network, interpreter):
    with pytest.raises(ModelError, match="does not fit into one kernel; give executor='script'"):
        make(network).evaluator("cpu", "fp32", executor="fused")
