"""The network of a CPU in one pass: against float64 and TorchScript, for every kind of product that this one has."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from llvmlite import binding
from numba import njit
from test_fused import NETWORKS as SMALL_NETWORKS
from test_fused import features, make, oracle_of

import gpurho
from gpurho import executors, hostnet, networkcheck
from gpurho.errors import DeviceError, ModelError, SettingsError
from gpurho.executors import _inputs, _networks, script_network
from gpurho.hostnet import HostNetwork, _Packed
from gpurho.kernels import _dense_emit, dense_cpu
from gpurho.kernels._dense_lanes import MEAN, hidden
from gpurho.layers import NetworkSpec
from gpurho.model import load_model

HOST = torch.device("cpu")
HAS_DOTS = bool(binding.get_host_cpu_features().get("avx512bf16"))
HERE = {"fp32": True, "dot": HAS_DOTS, "amx": dense_cpu.bf16_kind() == "amx"}
KINDS = [
    pytest.param(kind, marks=pytest.mark.skipif(not there, reason="this processor has no such instructions"))
    for kind, there in HERE.items()
]
NETWORKS = {
    **SMALL_NETWORKS,
    "two blocks of one, blocks of units": (NetworkSpec(2, 1, 64), 0.0, False),
    "the paper's": (NetworkSpec(3, 3, 250), 0.0, False),
}


def network(model, kind, uncertainty="analytic", samples=0, seed=0):
    """The network of a model with one kind of product."""
    precision = "fp32" if kind == "fp32" else "bf16"
    networks = _networks(model, torch.float32, uncertainty, samples, seed)
    return HostNetwork(networks, _inputs(model, HOST), precision, uncertainty is not None, kind)


def outputs(found):
    """The outputs that there are, by name."""
    return {name: values for name, values in found._asdict().items() if values is not None}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_variance_against_float64(name, kind):
    model = make(*NETWORKS[name])
    x = features(model, 37)
    with torch.inference_mode():
        out, variance = oracle_of(model, x)
        found = network(model, kind)(x)
    if kind == "fp32":
        np.testing.assert_allclose(found.density.numpy(), out[:, 0], atol=3e-5)
        np.testing.assert_allclose(found.log_variance.numpy(), out[:, 1], atol=3e-5)
        np.testing.assert_allclose(found.variance.numpy(), variance, rtol=3e-4)
        return
    # No further from float64 than TorchScript is in bfloat16, but for luck.
    with torch.inference_mode():
        script = script_network(model, HOST, "bf16", "analytic")(x)
    for mine, theirs, true in (
        (found.density, script.density, out[:, 0]),
        (found.log_variance, script.log_variance, out[:, 1]),
        (found.variance, script.variance, variance),
    ):
        strays = [float(np.sqrt(np.mean((values.numpy() - true) ** 2))) for values in (mine, theirs)]
        assert 0.0 < strays[0] < 1.5 * strays[1], (name, strays)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uncertainty", ["analytic", "last-layer", "sampled", None])
@pytest.mark.parametrize("name", ["al", "sige"])
def test_shipped_models_by_this_and_by_torchscript(name, uncertainty, kind):
    model = load_model(name)
    x = features(model, 333)
    x[7] *= 3.0  # outside of the training domain
    samples = 3 if uncertainty == "sampled" else 0
    with torch.inference_mode():
        mine = outputs(network(model, kind, uncertainty, samples)(x))
        true = outputs(script_network(model, HOST, "fp32", uncertainty, samples)(x))
    assert list(mine) == list(true)
    close = {"rtol": 2e-4, "atol": 1e-5} if kind == "fp32" else {"rtol": 0.1, "atol": 0.08}
    for name_of in true:
        # What is found of the raw features is always in float32.
        exact = name_of in ("excess", "superposition")
        limits = {"rtol": 1e-5, "atol": 2e-6} if exact else close
        torch.testing.assert_close(mine[name_of], true[name_of], **limits, msg=lambda text, n=name_of: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("uncertainty", ["analytic", "last-layer", "sampled", None])
def test_bits_of_a_point_do_not_depend_on_who_comes_with_it(uncertainty, kind):
    model = load_model("al")
    x = features(model, 2500)
    evaluate = network(model, kind, uncertainty, 2 if uncertainty == "sampled" else 0)
    whole = outputs(evaluate(x))
    for first, last in ((0, 1), (3, 34), (31, 33), (100, 229), (1023, 1026), (17, 2400), (5, 5)):
        for name, values in outputs(evaluate(x[first:last])).items():
            assert torch.equal(values, whole[name][first:last]), (name, first, last)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    for name, values in outputs(evaluate(x[order])).items():
        assert torch.equal(values, whole[name][order])
    # However its features lie in memory, and on however many threads.
    assert torch.equal(evaluate(x.T.contiguous().T).density, whole["density"])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for name, values in outputs(evaluate(x)).items():
                assert torch.equal(values, whole[name]), (name, threads)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_reaches_the_outputs_of_its_point_alone(kind, bad):
    model = load_model("al")
    x = features(model, 64)
    with torch.inference_mode():
        whole = network(model, kind)(x)
    for column in (0, 15, 16, 31, 32, 99):
        broken = x.clone()
        broken[40, column] = bad
        with torch.inference_mode():
            found = network(model, kind)(broken)
        fine = torch.isfinite(found.density)
        assert not fine[40]
        assert fine.sum() == 63
        assert torch.equal(found.density[fine], whole.density[fine])
        assert torch.equal(found.variance[fine], whole.variance[fine])
    with pytest.raises(ModelError, match="mean of 1 of 64 points is not finite"):
        model.evaluator("cpu")(broken)


@pytest.mark.parametrize("kind", KINDS)
def test_gelu_of_a_block(kind):
    """From one block of results to activations: no skip, and then one."""
    code = dense_cpu.KINDS.index(kind)
    size = _dense_emit.element_bytes(kind)

    @njit
    def run(z, before, after, skip):
        step = 16 * 32 * size
        base, old, new = np.int64(z.ctypes.data), np.int64(before.ctypes.data), np.int64(after.ctypes.data)
        hidden(base, base, old, new, new, new, new, base, base, step, step, 0, skip, code, MEAN)
        return z[0, 0] + before[0] + after[0]  # keeps the arrays until here

    z = np.linspace(-9.0, 9.0, 1024, dtype=np.float32).reshape(32, 32)
    kinds = {4: torch.float32, 2: torch.bfloat16}
    old = torch.linspace(-2.0, 2.0, 1024).to(kinds[size])
    exact = torch.nn.functional.gelu(torch.from_numpy(z).double())
    for skip in (0.0, 0.5):
        after = np.zeros(1024 * size, np.uint8)
        run(z, old.view(torch.uint8).numpy(), after, np.float32(skip))
        found = torch.from_numpy(after).view(kinds[size]).double().reshape(32, 32)
        wanted = exact + skip * old.double().reshape(32, 32)
        allowed = 5e-7 * (1.0 + wanted.abs()) if kind == "fp32" else 1.2e-4 + 2.0**-8 * wanted.abs()
        assert ((found - wanted).abs() <= allowed).all()


def test_a_prediction_takes_it_and_says_so():
    from ase.build import bulk

    atoms = bulk("Al", cubic=True)
    settings = {"device": "cpu", "precision": "fp32", "grid": (9, 6, 7), "progress": False}
    one, other = (gpurho.predict(atoms, executor=executor, **settings) for executor in ("auto", "script"))
    assert one.info["settings"]["executor"] == "fused"
    assert "executor" not in other.info["settings"]
    for name in ("mean", "aleatoric", "epistemic"):
        mine, true = (np.asarray(getattr(rho, name)) for rho in (one, other))
        np.testing.assert_allclose(mine, true, rtol=1e-4, atol=1e-6)
    assert one.electrons_std == pytest.approx(other.electrons_std, rel=1e-3)


def test_one_that_strays_is_refused(monkeypatch, tmp_path):
    from ase.build import bulk

    model = load_model("al")
    monkeypatch.setattr(executors, "_KEPT", {})
    monkeypatch.setattr(networkcheck, "BOUNDS", {"fp32": 1e-12, "bf16": 1e-12})
    monkeypatch.setattr(networkcheck, "TIMES", 0.0)
    with pytest.raises(DeviceError, match=r"strays from the reference.*executor='script'"):
        model.evaluator("cpu", "fp32")
    assert model.evaluator("cpu", "fp32", executor="script").precision == "fp32"
    # Before anything is written; by default TorchScript does it.
    settings = {"device": "cpu", "grid": (5, 6, 4), "progress": False, "out": tmp_path / "rho.h5"}
    with pytest.raises(DeviceError, match=r"strays from the reference"):
        gpurho.predict(bulk("Al", cubic=True), executor="fused", **settings)
    assert not list(tmp_path.iterdir())
    with pytest.warns(UserWarning, match=r"TorchScript runs the network: .* strays"):
        rho = gpurho.predict(bulk("Al", cubic=True), **settings)
    assert "executor" not in rho.info["settings"]


def test_models_that_exaggerate_or_have_no_spread_pass(monkeypatch):
    """What strays then is their own rounding; a wrong number beside it does not pass."""
    loud = make(NetworkSpec(3, 3, 64))
    loud.tensors = {name: t * 3.0 if name.endswith("weight_mean") else t for name, t in loud.tensors.items()}
    sure = load_model("al")
    sure.tensors = {name: t * 0.0 + 1e-30 if name.endswith("_sigma") else t for name, t in sure.tensors.items()}
    steep = load_model("al")
    last = f"layers.{steep.spec.network.n_hidden}.weight_mean"
    steep.tensors = {name: t * 300.0 if name == last else t for name, t in steep.tensors.items()}
    for model in (loud, sure, steep):
        for precision in ("fp32", "bf16"):
            model.evaluator("cpu", precision)
    monkeypatch.setattr(executors, "_KEPT", {})
    monkeypatch.setattr(_Packed, "_panels", lambda self, weights, old=_Packed._panels: old(self, weights * 1.3))
    for model in (loud, steep):
        for precision in ("fp32", "bf16"):
            with pytest.raises(DeviceError, match="strays from the reference"):
                model.evaluator("cpu", precision)


def test_a_damaged_model_is_named_by_its_first_prediction():
    model = make(NetworkSpec(1, 2, 32))
    model.tensors["layers.0.bias_mean"][0] = float("nan")
    for precision in ("fp32", "bf16"):
        with pytest.raises(ModelError, match="not finite"):
            model.evaluator("cpu", precision)(features(model, 10))


def broken_columns(monkeypatch):
    old = hostnet._columns
    monkeypatch.setattr(hostnet, "_columns", lambda inputs: old(replace(inputs, high=inputs.high * 0.0 + 1e30)))


def broken_baseline(monkeypatch):
    old = hostnet._columns
    monkeypatch.setattr(hostnet, "_columns", lambda inputs: old(replace(inputs, baseline=inputs.baseline * 1.01)))


def broken_noise(monkeypatch):
    monkeypatch.setattr(
        _Packed, "shifts", property(lambda self: [0.0, 3.0, 0.0], lambda self, value: None), raising=False
    )


def broken_draws(monkeypatch):
    old = HostNetwork.__init__
    monkeypatch.setattr(
        HostNetwork, "__init__", lambda self, networks, *rest: old(self, [networks[0]] * len(networks), *rest)
    )


@pytest.mark.parametrize("fault", [broken_columns, broken_baseline, broken_noise, broken_draws])
def test_faults_beside_the_density_are_seen(fault, monkeypatch):
    model = load_model("al")
    monkeypatch.setattr(executors, "_KEPT", {})
    fault(monkeypatch)
    with pytest.raises(DeviceError, match=r"strays .*(excess|superposition|log variance|density|epistemic)"):
        model.evaluator("cpu", "fp32", "sampled", samples=3)


def test_small_signals_keep_their_digits():
    """GELU is exact to float32 near 0 too: layers that are scaled down and up again say the same."""
    model = load_model("al")
    x = features(model, 200)
    true = network(model, "fp32", None)(x).density
    first, second = (f"layers.{i}.weight_mean" for i in (0, 1))
    for scale in (1e-3, 1e-5):
        small = load_model("al")
        small.tensors = dict(small.tensors)
        # GELU halves what is near 0; this network is another one, and TorchScript knows it.
        small.tensors[first], small.tensors[second] = small.tensors[first] * scale, small.tensors[second] / scale
        small.tensors["layers.0.bias_mean"] = small.tensors["layers.0.bias_mean"] * scale
        with torch.inference_mode():
            wanted = script_network(small, HOST, "fp32", None)(x).density
            found = network(small, "fp32", None)(x).density
        assert float((found - wanted).abs().max()) < 2e-5 * float(wanted.abs().max()), scale
        assert not torch.equal(found, true)


@pytest.mark.parametrize("distance", [-80.0, -140.0, -1e3, -1e10])
def test_impossible_distances_are_not_finite(distance):
    model = make(NetworkSpec(2, 3, 9), 1.5)
    x = features(model, 40)
    x[7, 3] = distance
    with torch.inference_mode():
        found, true = (n(x).density for n in (network(model, "fp32", None), script_network(model, HOST, "fp32", None)))
    assert torch.equal(torch.isfinite(found), torch.isfinite(true))


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_is_the_same_with_any_uncertainty(kind):
    model = load_model("al")
    x = features(model, 100)
    means = [network(model, kind, uncertainty, 2)(x).density for uncertainty in ("analytic", "last-layer", None)]
    assert torch.equal(means[0], means[1])
    assert torch.equal(means[0], means[2])


def test_networks_without_hidden_layers_stay_with_torchscript():
    model = make(NetworkSpec(0, 1, 8))
    x = features(model, 5)
    script, auto = (model.evaluator("cpu", executor=executor) for executor in ("script", "auto"))
    assert torch.equal(script(x)[0], auto(x)[0])
    with pytest.raises(SettingsError, match="needs a network with hidden layers; give executor='script'"):
        model.evaluator("cpu", executor="fused")


def test_the_kind_of_product_follows_the_processor(monkeypatch):
    def kind(features, name="znver4", machine="x86_64", allowed=True):
        dense_cpu.bf16_kind.cache_clear()
        monkeypatch.setattr(dense_cpu.binding, "get_host_cpu_features", lambda: dict.fromkeys(features, True))
        monkeypatch.setattr(dense_cpu.binding, "get_host_cpu_name", lambda: name)
        monkeypatch.setattr(dense_cpu.platform, "machine", lambda: machine)
        monkeypatch.setattr(dense_cpu, "_tiles_allowed", lambda: allowed)
        return dense_cpu.bf16_kind()

    both = ("avx512bf16", "amx-bf16")
    try:
        assert kind(both, "sapphirerapids") == "amx"
        assert kind(both, "sapphirerapids", allowed=False) == "fp32"
        assert kind(("avx512bf16",)) == "dot"
        assert kind(("avx512bf16",), "cooperlake") == "fp32"
        assert kind(("avx2",), "znver3") == "fp32"
        assert kind(both, machine="aarch64") == "fp32"
        monkeypatch.setattr(dense_cpu.config, "CPU_NAME", "haswell", raising=False)
        assert kind(both) == "fp32"
    finally:
        monkeypatch.undo()
        dense_cpu.bf16_kind.cache_clear()


OLDER = """
import torch
from gpurho.evaluator import resolve_device
from gpurho.executors import host_network, script_network
from gpurho.model import load_model
model = load_model("al")
low, high = model.tensors["feature_low"], model.tensors["feature_high"]
x = low + (high - low) * torch.rand((200, len(low)), generator=torch.Generator().manual_seed(0))
for precision in ("fp32", "bf16"):
    network = host_network(model, torch.device("cpu"), precision, "analytic", 0, 0)
    assert network.kind == "fp32", network.kind
    true = script_network(model, torch.device("cpu"), "fp32", "analytic")(x)
    error = float((network(x).density - true.density).square().mean().sqrt())
    assert error < (1e-5 if precision == "fp32" else 0.02), (precision, error)
print("fine")
"""


@pytest.mark.skipif(dense_cpu.platform.machine() not in dense_cpu.X86, reason="names processors of another kind")
def test_code_for_an_older_processor(tmp_path):
    environment = {**os.environ, "NUMBA_CPU_NAME": "haswell", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", OLDER], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "fine\n", done.stdout + done.stderr
