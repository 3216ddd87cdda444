"""Training: split, learning, checkpoints, bit-exact resume, evaluation."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from training_tools import SMALL, SMOOTH, toy_snapshot

from gpurho.datasets import Dataset, open_dataset, write_dataset
from gpurho.errors import DatasetError, MissingDependencyError, OutputExistsError, SettingsError
from gpurho.model import DensityModel
from gpurho.pipelines.evaluate import evaluate
from gpurho.pipelines.train import train
from gpurho.pointsampling import choose_uniform
from gpurho.training import (
    Trainer,
    TrainingSettings,
    negative_log_likelihood,
)
from gpurho.trainingset import point_features, sample_points, split_snapshots, valence_electrons


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "toy.h5", [toy_snapshot(i) for i in range(8)])


def test_split_is_by_snapshot_and_spread_over_temperatures(data: Dataset) -> None:
    split = split_snapshots(data, test_fraction=0.5, validation_fraction=0.125)
    assert sorted(split.train + split.validation + split.test) == list(range(8))
    assert {data.meta(i)["temperature_K"] for i in split.test} == {300, 600, 900, 1200}
    assert {data.meta(i)["trajectory"] for i in split.test} == {0, 1}
    named = split_snapshots(data, test=[3, 1], validation=[0])
    assert named.test == (1, 3)
    assert named.train == (2, 4, 5, 6, 7)
    for wrong in (([0], [0]), ([8], [1]), (list(range(7)), [7])):
        with pytest.raises(DatasetError):
            split_snapshots(data, *wrong)


def test_valence_comes_from_the_data(data: Dataset) -> None:
    assert valence_electrons(data) == {"Al": 3.0}


def test_points_are_drawn_once_each_with_their_densities(data: Dataset) -> None:
    spec = TrainingSettings(**SMALL).descriptor(["Al"])
    snapshot = data[0]
    features, density = sample_points(snapshot, spec, 500, (0, 0))
    assert features.shape == (500, spec.n_features)
    everything, whole = sample_points(snapshot, spec, 10**6, (0, 0))
    np.testing.assert_array_equal(whole, snapshot.density.ravel())
    chosen = choose_uniform(snapshot.density.size, 500, (0, 0)).index
    assert len(set(chosen.tolist())) == 500
    np.testing.assert_allclose(features, everything[chosen], atol=1e-5)
    np.testing.assert_array_equal(density, whole[chosen])
    again = sample_points(snapshot, spec, 500, (0, 0))
    np.testing.assert_array_equal(density, again[1])
    assert not np.array_equal(density, sample_points(snapshot, spec, 500, (1, 0))[1])


def test_likelihood_is_that_of_a_gaussian() -> None:
    out, y = torch.randn(50, 2), torch.randn(50)
    normal = torch.distributions.Normal(out[:, 0], torch.exp(out[:, 1] / 2))
    expected = -normal.log_prob(y).mean() - 0.5 * np.log(2 * np.pi)
    torch.testing.assert_close(negative_log_likelihood(out, y), expected)


def test_train_learns_records_and_is_evaluated(data: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "toy.safetensors"
    result = train(data, path, test=[2, 7], validation=[1], progress=False, dft={"engine": "toy"}, **SMALL)
    model = DensityModel.load(path)
    assert model.spec == result.model.spec
    assert sorted(p.name for p in tmp_path.iterdir()) == ["toy.csv", "toy.safetensors"]
    rows = (tmp_path / "toy.csv").read_text().splitlines()
    assert len(rows) == 1 + SMALL["epochs"]
    assert result.history[-1]["validation_rmse"] < 0.5 * result.history[0]["validation_rmse"]

    spread = np.std(data[2].density)
    report = evaluate(model, open_dataset(data.path), progress=False)
    assert report.use == "test"
    assert [s.snapshot for s in report.snapshots] == [2, 7]
    assert report.total["rmse"] < 0.25 * spread
    assert report.total["l1_per_electron"] == pytest.approx(model.spec.metrics["l1_per_electron"])
    assert report.total["coverage"] == pytest.approx(model.spec.calibration["coverage"])
    assert 0.4 < report.total["coverage"][0] < 0.95
    assert "total" in str(report)
    command = model.spec.training["command"]
    assert command.startswith("gpurho train toy.h5 --out toy.safetensors --set 'test=[2,7]' --set 'validation=[1]'")
    assert "--epochs 12" in command
    assert "width=24" in command
    assert model.spec.dft["engine"] == "toy"

    assert len(evaluate(model, data, snapshots="all", uncertainty=None, progress=False).snapshots) == 8
    with pytest.raises(DatasetError, match="snapshots \\[8\\]"):
        evaluate(model, data, snapshots=[8], progress=False)
    other = write_dataset(tmp_path / "other.h5", [toy_snapshot(9)])
    assert evaluate(model, other, progress=False).use == "all"
    with pytest.raises(DatasetError, match="does not record"):
        evaluate(model, other, snapshots="test", progress=False)
    with pytest.raises(OutputExistsError, match="exists"):
        train(data, path, progress=False, **SMALL)


def test_the_best_state_is_restored_when_training_stops_early(data: Dataset, tmp_path: Path) -> None:
    split = split_snapshots(data, test=[2, 7], validation=[1])
    changes = {"epochs": 40, "patience": 2, "schedule": "constant", "learning_rate": 0.1, "estimator": "none"}
    trainer = Trainer(data, split, TrainingSettings(**{**SMALL, **changes}), tmp_path / "m.checkpoint")
    model = trainer.run()
    errors = [row["validation_rmse"] for row in trainer.history]
    best = int(np.argmin(errors))
    assert len(errors) == best + 1 + 2 < 40
    features, truth = trainer.data.validation_points(10**6)[:2]
    mean = model.evaluator(precision="fp32", uncertainty=None)(features)[0]
    assert float((mean - truth).square().mean().sqrt()) == pytest.approx(errors[best], rel=1e-4)
    assert errors[-1] > 1.001 * errors[best]


@pytest.mark.parametrize(("width", "threads", "found"), [(8, None, 1), (128, None, 2), (8, 2, 2)])
def test_narrow_networks_are_trained_on_one_thread(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, width: int, threads: int | None, found: int
) -> None:
    seen = []
    finish = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, bar: (seen.append(torch.get_num_threads()), finish(self, bar))[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        train(data, tmp_path / "m.safetensors", threads=threads, **{**SMALL, "width": width, "epochs": 1})
        assert (seen, torch.get_num_threads()) == ([found], 2)
    finally:
        torch.set_num_threads(before)


def test_running_mean_is_validated_and_kept(data: Dataset, tmp_path: Path) -> None:
    split = split_snapshots(data, test=[2, 7], validation=[1])
    changes = {"epochs": 2, "ema": 0.95}
    seen: list[torch.Tensor] = []
    trainer = Trainer(data, split, TrainingSettings(**{**SMALL, **changes}), tmp_path / "m.checkpoint")
    trainer.prepare()
    start = trainer.net.mean.detach().clone().double()
    model = trainer.run(lambda run, loss: seen.append(run.net.mean.detach().clone().double()))
    for k, value in enumerate(seen):
        decay = min(0.95, (1 + k) / (10 + k))
        start = decay * start + (1 - decay) * value
    found = torch.cat([model.tensors[f"layers.{i}.{k}_mean"].ravel() for i in range(5) for k in ("weight", "bias")])
    torch.testing.assert_close(found.double(), start, atol=1e-5, rtol=1e-5)
    assert float((found.double() - seen[-1]).abs().max()) > 1e-3
    features, truth = trainer.data.validation_points(10**6)[:2]
    mean = model.evaluator(precision="fp32", uncertainty=None)(features)[0]
    rmse = float((mean - truth).square().mean().sqrt())
    assert rmse == pytest.approx(trainer.history[-1]["validation_rmse"], rel=1e-4)


def test_two_stages_and_deterministic_training_leave_sigmas_alone(data: Dataset, tmp_path: Path) -> None:
    split = split_snapshots(data, test=[2, 7], validation=[1])
    for name, changes, moved in (
        ("none", {"estimator": "none"}, [False, False]),
        ("late", {"kl_start": 1.0}, [False, True]),
        ("early", {}, [True, True]),
    ):
        settings = TrainingSettings(**{**SMALL, "epochs": 2, **changes})
        trainer = Trainer(data, split, settings, tmp_path / f"{name}.checkpoint")
        rhos: list[torch.Tensor] = []
        trainer.run(lambda run, loss, rhos=rhos: rhos.append(run.net.rho.detach().clone()))  # type: ignore[misc]
        first, per = torch.full_like(rhos[0], 0.0), trainer.steps_per_epoch
        trainer.prepare()
        first = trainer.net.rho.detach()
        assert [not torch.equal(first, rhos[k]) for k in (per - 1, 2 * per - 1)] == moved


def test_kl_factor_and_learning_rate_follow_their_schedules() -> None:
    s = TrainingSettings(
        kl_start=2.0, kl_ramp=4.0, kl_weight=0.5, warmup_steps=10, learning_rate=1.0, schedule="cosine"
    )
    assert [s.kl_factor(e) for e in (0.0, 1.99, 2.0, 4.0, 6.0, 9.0)] == [0, 0, 0, 0.25, 0.5, 0.5]
    assert [s.estimator_at(e) for e in (0.0, 2.0)] == ["none", "local"]
    rates = [s.rate_factor(k, 1000) for k in range(1000)]
    assert rates[0] == pytest.approx(0.1, rel=0.01)
    assert max(rates) == pytest.approx(1.0, rel=0.01)
    assert rates[500] == pytest.approx(0.501)
    assert rates[-1] < 0.0011
    cycle = TrainingSettings(schedule="one-cycle")
    rates = [cycle.rate_factor(k, 1000) for k in range(1000)]
    assert int(np.argmax(rates)) == 300
    assert rates[0] == pytest.approx(0.04)
    assert rates[-1] < 0.001
    assert [TrainingSettings(epochs=10).kl_factor(e) for e in (2.9, 4.0, 6.0)] == pytest.approx([0, 0.5, 1])
    assert TrainingSettings(epochs=10, kl_start=0.0, kl_ramp=0.0).kl_factor(0.0) == 1
    flat = TrainingSettings(schedule="constant", warmup_steps=4)
    assert [flat.rate_factor(k, 50) for k in (0, 1, 3, 49)] == [0.25, 0.5, 1.0, 1.0]


def test_several_data_sets_are_split_recorded_and_evaluated_each(data: Dataset, tmp_path: Path) -> None:
    other = write_dataset(tmp_path / "wide.h5", [toy_snapshot(20 + i, cells=2, points=10) for i in range(4)])
    single = write_dataset(tmp_path / "one.h5", [toy_snapshot(40)])
    settings = {**SMALL, "epochs": 4}
    result = train([data.path, other, single], tmp_path / "m.safetensors", progress=False, **settings)
    assert [len(s.train) for s in result.splits] == [5, 3, 1]
    assert [len(s.test) for s in result.splits] == [2, 1, 0]
    record = result.model.spec.training
    assert [d["file"] for d in record["datasets"]] == ["toy.h5", "wide.h5", "one.h5"]
    assert record["dataset"]["fingerprint"] == data.fingerprint() == record["datasets"][0]["fingerprint"]
    assert "gpurho train toy.h5 wide.h5 one.h5 --out m.safetensors --set 'test=[[" in record["command"]
    report = evaluate(result.model, other, progress=False)
    assert (report.use, [s.snapshot for s in report.snapshots]) == ("test", list(result.splits[1].test))
    assert len(result.reports) == 2
    assert [r["dataset"] for r in result.model.spec.metrics["by_dataset"]] == ["toy.h5", "wide.h5"]
    with pytest.raises(DatasetError, match="one list of snapshots for each"):
        train([data, other], tmp_path / "n.safetensors", test=[1, 2], progress=False, **settings)
    subset = write_dataset(tmp_path / "subset.h5", [data[k] for k in (0, 2, 4)])
    with pytest.raises(
        DatasetError, match=r"snapshot 1 of subset.h5 \(train\) has the structure of snapshot 2 of toy.h5"
    ):
        train(
            [data, subset], tmp_path / "n.safetensors", test=[[2], []], validation=[[1], []], progress=False, **settings
        )
    with pytest.raises(DatasetError, match="no snapshots are left"):
        train([single, single], tmp_path / "n.safetensors", progress=False, **settings)


@pytest.mark.parametrize("blocks", [0, 2])
def test_delta_is_learnt_on_top_of_the_two_body_part(data: Dataset, tmp_path: Path, blocks: int) -> None:
    # The density is a sum over atoms, which is what the two-body part can fit; noise-free, nearly all of it.
    path = tmp_path / "m.safetensors"
    result = train(data, path, test=[2, 7], validation=[1], progress=False, **{**SMOOTH, "blocks": blocks})
    model = result.model
    assert model.spec.target == "delta"
    baseline = model.tensors["baseline"].numpy().astype(float)
    assert np.all(baseline[6:] == 0)
    assert np.all(baseline[:6] != 0)
    spread = float(np.std(np.concatenate([data[i].density.ravel() for i in result.split.train])))
    assert model.spec.density_std < 0.3 * spread
    features, truth = point_features(data[2], model.spec.descriptor, np.arange(data[2].density.size))
    linear = features.astype(float) @ baseline + model.spec.density_mean
    alone = float(np.sqrt(np.mean((linear - truth) ** 2)))
    assert result.metrics is not None
    assert result.metrics.snapshots[0].metrics.rmse < 0.8 * alone
    command = model.spec.training["command"]
    assert "family" not in command
    assert "target" not in command
    assert "contraction" not in command


def test_tensorboard_is_asked_for_by_name_only(data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    split = split_snapshots(data, test=[2, 7], validation=[1])
    with pytest.raises(MissingDependencyError, match="pip install tensorboard"):
        Trainer(data, split, TrainingSettings(**SMALL), tmp_path / "m.checkpoint", tensorboard=tmp_path / "board")

    written: list[tuple[str, float, int]] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

        def close(self) -> None:
            written.append(("closed", 0.0, 0))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    settings = TrainingSettings(**{**SMALL, "epochs": 1})
    trainer = Trainer(data, split, settings, tmp_path / "m.checkpoint", tensorboard=tmp_path / "board")
    trainer.run()
    row = trainer.history[0]
    assert ("validation_rmse", row["validation_rmse"], int(row["step"])) in written
    assert written[-1][0] == "closed"


def test_narrow_networks_train_in_fp32_wide_ones_in_bf16_where_there_is_hardware(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurho import training

    split = split_snapshots(data, test=[2, 7], validation=[1])
    for has, width, expected in ((True, 32, False), (True, 128, True), (False, 128, False)):
        monkeypatch.setattr(training, "cpu_has_bf16", lambda has=has: has)
        settings = TrainingSettings(**{**SMALL, "width": width, "precision": "auto", "points_per_snapshot": 50})
        trainer = Trainer(data, split, settings, tmp_path / "m.checkpoint")
        trainer.prepare()
        assert trainer.autocast is expected


def test_training_leaves_the_random_state_and_follows_the_seed(data: Dataset, tmp_path: Path) -> None:
    split = split_snapshots(data, test=[2, 7], validation=[1])
    prints = set()
    for seed in (0, 1):
        settings = TrainingSettings(**{**SMALL, "epochs": 1, "seed": seed})
        torch.manual_seed(5)
        prints.add(Trainer(data, split, settings, tmp_path / f"{seed}.checkpoint").run().fingerprint())
        state = torch.rand(3)
        torch.manual_seed(5)
        assert torch.equal(state, torch.rand(3))
    assert len(prints) == 2


def test_settings_are_checked(data: Dataset, tmp_path: Path) -> None:
    for wrong in (
        {"epochs": 0},
        {"batch_size": 2.5},
        {"learning_rate": -1.0},
        {"kl_weight": -1.0},
        {"estimator": "x"},
        {"precision": "x"},
        {"family": "x"},
        {"schedule": "x"},
        {"sampling": "x"},
        {"target": "delta", "family": "scalar-product"},
        {"ema": 1.0},
        {"beta": 1.5},
        {"keep_fraction": 0.0},
        {"patience": -1},
    ):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            TrainingSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="epoch_count"):
        train(data, tmp_path / "m.safetensors", epoch_count=3, progress=False)
    with pytest.raises(SettingsError, match="safetensors"):
        train(data, tmp_path / "m.pt", progress=False)
    with pytest.raises(SettingsError, match="memory_limit"):
        Trainer(data, split_snapshots(data), TrainingSettings(memory_limit=1e-6), tmp_path / "m.checkpoint").prepare()
