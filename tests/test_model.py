"""Models: files, evaluation, export."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import DeviceError, ModelError, SettingsError
from gpurho.evaluator import cpu_has_bf16, resolve_precision
from gpurho.layers import DensityNetwork, NetworkSpec
from gpurho.model import (
    DensityModel,
    ModelSpec,
    list_models,
    load_exported,
    load_model,
    read_spec,
)
from gpurho.scriptnet import cpu_batch
from gpurho.uncertainty import CalibrationFactors

DESCRIPTOR = DescriptorSpec(("Si", "Ge"), 6, 3, 2, 2, 5.0)


def make_model(width: int = 16, sigma: float = 0.05, length: float = 1.5, seed: int = 5) -> DensityModel:
    spec = ModelSpec(
        DESCRIPTOR,
        {"Si": 4.0, "Ge": 4.0},
        NetworkSpec(2, 2, width),
        density_mean=0.2,
        density_std=0.1,
        distance_length=length,
        calibration_factors=CalibrationFactors(1.25, 0.5),
        metrics={"l1_per_electron": 0.01},
    )
    torch.manual_seed(seed)
    net = DensityNetwork(spec.network, DESCRIPTOR.n_features, spec.distance_columns(), length, 1.0, sigma)
    net.feature_mean.uniform_(0, 1)
    net.feature_std.uniform_(0.5, 1.5)
    return DensityModel.from_network(spec, net)


def make_features(n: int = 300, seed: int = 0) -> torch.Tensor:
    return torch.rand(n, DESCRIPTOR.n_features, generator=torch.Generator().manual_seed(seed)) * 4


@pytest.fixture
def model() -> DensityModel:
    return make_model()


def test_distance_columns_are_the_features_named_so(model: DensityModel) -> None:
    names = DESCRIPTOR.feature_names()
    columns = model.spec.distance_columns()
    found = [i for a, b in zip(columns[::2], columns[1::2], strict=True) for i in range(a, b)]
    assert found == [i for i, n in enumerate(names) if n.startswith("d_")]


def test_file_gives_the_model_back(model: DensityModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model.save(path)
    again = DensityModel.load(path)
    assert again.spec == model.spec
    assert again.fingerprint() == model.fingerprint()
    x = make_features()
    for a, b in zip(model.evaluator()(x), again.evaluator()(x), strict=True):
        assert torch.equal(a, b)
    assert read_spec(path).metrics == {"l1_per_electron": 0.01}
    assert [p.name for p in tmp_path.iterdir()] == ["m.safetensors"]


def test_fingerprint_follows_what_decides_predictions_only(model: DensityModel) -> None:
    assert model.with_spec(metrics={}).fingerprint() == model.fingerprint()
    assert model.with_spec(density_mean=0.3).fingerprint() != model.fingerprint()
    assert make_model(seed=6).fingerprint() != model.fingerprint()


def test_network_of_a_model_trains_on_from_the_same_posterior(model: DensityModel) -> None:
    again = DensityModel.from_network(model.spec, model.network())
    for name, tensor in model.tensors.items():
        torch.testing.assert_close(again.tensors[name], tensor, rtol=1e-5, atol=1e-8)


def _rewrite(model: DensityModel, path: Path, spec: dict[str, object] | None = None, **tensors: torch.Tensor) -> Path:
    values = {**model.spec.to_dict(), **(spec or {})}
    save_file({**model.tensors, **tensors}, path, metadata={"gpurho": json.dumps(values)})
    return path


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"format_version": 4}, "format_version 4 is newer than 3"),
        ({"format_version": "1"}, "format_version '1'"),
        ({"format": "other"}, "not one of a gpurho model"),
        ({"surprise": 1}, "surprise"),
        ({"network": {"blocks": 3, "layers": 2, "width": 16}}, "missing"),
        ({"network": {"blocks": 2, "layers": 2, "width": 17}}, r"tensor skip|tensor layers.*F32 \(16"),
        ({"network": {"blocks": 2, "layers": 2, "width": 10**9}}, "width 1000000000"),
        ({"network": {"depth": 2}}, "depth"),
        ({"density_std": 0.0}, "density_std"),
        ({"target": "delta"}, "delta.*smooth"),
        ({"target": "difference"}, "target 'difference'"),
        ({"valence": {"Si": 4.0}}, "Ge"),
        ({"valence": None}, "valence None"),
        ({"valence": {"Si": 4.0, "Ge": "four"}}, "Ge: 'four'"),
        ({"training": [1]}, r"training \[1\]"),
        ({"density_mean": float("nan")}, "density_mean nan"),
        ({"calibration_factors": {"aleatoric": -1.0, "epistemic": 1.0}}, "aleatoric"),
    ],
)
def test_damaged_specifications_are_refused_by_name(
    model: DensityModel, tmp_path: Path, spec: dict[str, object], message: str
) -> None:
    path = _rewrite(model, tmp_path / "m.safetensors", spec)
    with pytest.raises(ModelError, match=message) as caught:
        DensityModel.load(path)
    assert "\n" not in str(caught.value)


def test_damaged_tensors_are_refused_by_name(model: DensityModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    bad = model.tensors["layers.1.weight_mean"].clone()
    bad[0, 0] = float("nan")
    for changed, message in (
        ({"layers.1.weight_mean": bad}, "layers.1.weight_mean has values that are not finite"),
        ({"layers.1.weight_mean": bad.double()}, "layers.1.weight_mean is F64"),
        ({"layers.1.weight_mean": bad[:3].clone()}, "layers.1.weight_mean is F32"),
        ({"layers.0.bias_sigma": torch.zeros(16)}, "layers.0.bias_sigma has values that are not positive"),
        ({"feature_std": torch.zeros(DESCRIPTOR.n_features)}, "feature_std"),
        ({"extra": torch.zeros(2)}, "extra"),
    ):
        with pytest.raises(ModelError, match=message):
            DensityModel.load(_rewrite(model, path, **changed))


def test_broken_files_are_refused(model: DensityModel, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    model.save(path)
    whole = path.read_bytes()
    huge = struct.pack("<Q", 2**60) + whole[8:]
    for data in (b"", b"no model", whole[:100], whole[:-10], huge):
        path.write_bytes(data)
        with pytest.raises(ModelError, match=r"m\.safetensors"):
            DensityModel.load(path)
    save_file({"a": torch.zeros(2)}, path)
    with pytest.raises(ModelError, match="without a gpurho specification"):
        DensityModel.load(path)
    with pytest.raises(ModelError, match="neither a file nor a shipped model"):
        load_model(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize("uncertainty", ["analytic", "sampled", None])
def test_a_point_has_the_same_bits_however_many_come_with_it(model: DensityModel, uncertainty: str | None) -> None:
    x = make_features(300)
    for precision in ("fp32", "bf16"):
        evaluate = model.evaluator(precision=precision, uncertainty=uncertainty, samples=3, batch_size=128)
        whole = evaluate(x)
        for rows in (slice(0, 1), slice(0, 128), slice(5, 250), slice(299, 300), slice(127, 129)):
            for part, full in zip(evaluate(x[rows]), whole, strict=True):
                if full is None:
                    assert part is None
                else:
                    assert torch.equal(part, full[rows])
        empty = evaluate(x[:0])
        assert empty[0].shape == (0,)


def test_a_row_does_not_depend_on_its_place_in_the_batch() -> None:
    """At the size of the shipped network, where matrix products run blocked kernels."""
    descriptor = DescriptorSpec(("Al",))
    spec = ModelSpec(descriptor, {"Al": 3.0})
    torch.manual_seed(0)
    net = DensityNetwork(spec.network, descriptor.n_features, spec.distance_columns())
    model = DensityModel.from_network(spec, net)
    x = torch.rand(2048, descriptor.n_features)
    order = torch.randperm(2048)
    for precision in ("fp32", "bf16"):
        evaluate = model.evaluator(precision=precision)
        for a, b in zip(evaluate(x), evaluate(x[order]), strict=True):
            assert torch.equal(a[order], b)


@pytest.mark.parametrize(
    ("width", "precision", "points"),
    [(64, "fp32", 4096), (250, "bf16", 2048), (250, "fp32", 1024), (8192, "fp32", 512)],
)
def test_batches_on_a_cpu_follow_the_width(width: int, precision: str, points: int) -> None:
    assert cpu_batch(width, precision) == points


def test_evaluator_against_the_training_network(model: DensityModel) -> None:
    x = make_features()
    mean, aleatoric, epistemic = model.evaluator(precision="fp32")(x)
    out = model.network()(x).detach()
    torch.testing.assert_close(mean, out[:, 0] * 0.1 + 0.2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(aleatoric, torch.exp(out[:, 1] / 2) * 0.1 * 1.25, rtol=1e-4, atol=1e-6)
    assert epistemic.min() > 0
    plain = model.with_spec(calibration_factors=CalibrationFactors())
    torch.testing.assert_close(plain.evaluator(precision="fp32")(x)[2], epistemic * 2)


def test_bf16_is_near_fp32(model: DensityModel) -> None:
    x = make_features()
    for wide, narrow in zip(model.evaluator(precision="fp32")(x), model.evaluator(precision="bf16")(x), strict=True):
        assert 0 < (wide - narrow).abs().max() < 0.05 * wide.abs().max()


def test_sampled_is_repeatable_and_follows_the_seed(model: DensityModel) -> None:
    x = make_features()
    a = model.evaluator(uncertainty="sampled", samples=5, seed=1)(x)[2]
    assert torch.equal(a, model.evaluator(uncertainty="sampled", samples=5, seed=1)(x)[2])
    assert not torch.equal(a, model.evaluator(uncertainty="sampled", samples=5, seed=2)(x)[2])


def test_export_is_the_evaluator_and_asks_for_trust(model: DensityModel, tmp_path: Path) -> None:
    path = tmp_path / "m.pt"
    model.export(path)
    with pytest.raises(ModelError, match="trusted=True"):
        load_exported(path)
    again = load_exported(path, trusted=True)
    assert again.spec == model.spec
    x = make_features()
    for got, want in zip(again(x), model.evaluator(precision="fp32")(x), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
    path.write_bytes(b"nothing")
    with pytest.raises(ModelError, match=r"m\.pt"):
        load_exported(path, trusted=True)


def test_no_number_that_is_not_finite_leaves(model: DensityModel) -> None:
    x = make_features()
    x[7, 3] = float("nan")
    with pytest.raises(ModelError, match="1 of 300 points is not finite"):
        model.evaluator()(x)


def test_arguments_are_checked(model: DensityModel) -> None:
    with pytest.raises(SettingsError, match="precision 'fp8'"):
        model.evaluator(precision="fp8")
    with pytest.raises(SettingsError, match="uncertainty 'exact'"):
        model.evaluator(uncertainty="exact")
    with pytest.raises(SettingsError, match="samples 1"):
        model.evaluator(uncertainty="sampled", samples=1)
    with pytest.raises(DeviceError, match="tpu"):
        model.evaluator(device="tpu")
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="no CUDA device"):
            model.evaluator(device="cuda")
    evaluate = model.evaluator()
    with pytest.raises(SettingsError, match="float64"):
        evaluate(make_features().double())
    with pytest.raises(SettingsError, match="shape"):
        evaluate(make_features()[:, 1:])
    with pytest.raises(SettingsError, match="ndarray"):
        evaluate(np.zeros((3, DESCRIPTOR.n_features), np.float32))  # type: ignore[arg-type]


def test_auto_precision_is_that_of_the_processor() -> None:
    assert resolve_precision("auto", torch.device("cpu")) == ("bf16" if cpu_has_bf16() else "fp32")


def test_shipped_models_load_and_state_their_figures() -> None:
    shipped = list_models()
    assert "al" in [m.name for m in shipped]
    for info in shipped:
        assert load_model(info.name).spec == info.spec
        assert info.path.stat().st_size < 6e6
        assert info.spec.metrics["l1_per_electron"] < 1.5e-2
        assert info.spec.metrics["use"] == "test"
        split = info.spec.training["split"]
        uses = [{e["snapshot"] for e in split[u]} for u in ("train", "validation", "test")]
        assert all(uses)
        assert len(set.union(*uses)) == sum(map(len, uses))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_agrees_with_the_cpu(model: DensityModel) -> None:
    x = make_features()
    for uncertainty in ("analytic", "sampled"):
        got = model.evaluator("cuda", "fp32", uncertainty, samples=4)(x.cuda())
        want = model.evaluator("cpu", "fp32", uncertainty, samples=4)(x)
        for a, b in zip(got, want, strict=True):
            assert a.is_cuda
            assert (a.cpu() - b).abs().max() < 1e-3 * b.abs().max()
