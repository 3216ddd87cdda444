"""Training: split, learning, checkpoints, bit-exact resume, evaluation."""

from pathlib import Path

import numpy as np
import pytest
import torch

from gpurho.datasets import Dataset, Snapshot, open_dataset, write_dataset
from gpurho.errors import DatasetError, ModelError, OutputExistsError, SettingsError
from gpurho.model import DensityModel
from gpurho.pipelines.evaluate import evaluate
from gpurho.pipelines.train import train
from gpurho.pointsampling import choose_uniform
from gpurho.structure import Structure
from gpurho.training import (
    Trainer,
    TrainingSettings,
    negative_log_likelihood,
)
from gpurho.trainingset import sample_points, split_snapshots, valence_electrons

SMALL = {
    "n_distances": 8,
    "n_angle_atoms": 3,
    "n_angle_neighbors": 2,
    "cutoff": 5.0,
    "blocks": 2,
    "layers": 2,
    "width": 24,
    "points_per_snapshot": 1200,
    "batch_size": 128,
    "warmup_steps": 20,
    "epochs": 12,
    "learning_rate": 5e-3,
    "checkpoint_steps": 25,
    "precision": "fp32",
}


def _snapshot(seed: int) -> Snapshot:
    """Atoms with a density of overlapping Gaussians: a field that the features determine."""
    rng = np.random.default_rng(seed)
    a, n = 4.05, 14
    base = np.array([[0, 0, 0], [0, 0.5, 0.5], [0.5, 0, 0.5], [0.5, 0.5, 0]]) * a
    positions = base + rng.normal(0, 0.05 + 0.03 * (seed % 4), base.shape)
    structure = Structure(positions, np.full(4, 13), a * np.eye(3), np.ones(3, bool))
    axis = np.arange(n) * a / n
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)
    density = np.zeros((n, n, n))
    for shift in np.ndindex(3, 3, 3):
        for p in positions + (np.array(shift) - 1) * a:
            density += np.exp(-((points - p) ** 2).sum(-1) / 0.9)
    density *= 12.0 / (density.sum() * (a / n) ** 3)
    return Snapshot(
        structure, density.astype(np.float32), 12.0, {"temperature_K": 300 * (seed % 4 + 1), "trajectory": seed % 2}
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "toy.h5", [_snapshot(i) for i in range(8)])


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
    other = write_dataset(tmp_path / "other.h5", [_snapshot(9)])
    assert evaluate(model, other, progress=False).use == "all"
    with pytest.raises(DatasetError, match="does not record"):
        evaluate(model, other, snapshots="test", progress=False)
    with pytest.raises(OutputExistsError, match="exists"):
        train(data, path, progress=False, **SMALL)


class _StopError(Exception):
    pass


@pytest.mark.parametrize("estimator", ["shared", "local"])
def test_interrupted_and_resumed_is_bit_for_bit_an_undisturbed_run(
    data: Dataset, tmp_path: Path, estimator: str
) -> None:
    settings = TrainingSettings(**{**SMALL, "epochs": 3, "estimator": estimator})
    split = split_snapshots(data, test=[2, 7], validation=[1])

    def trainer(name: str) -> Trainer:
        return Trainer(data, split, settings, tmp_path / f"{name}.checkpoint")

    whole = trainer("whole").run()

    def stop(run: Trainer, loss: float) -> None:
        if run.step == 60:  # ten steps after a checkpoint, in the second epoch
            raise _StopError

    with pytest.raises(_StopError):
        trainer("part").run(stop)
    torch.rand(100)  # whatever else draws random numbers must not matter
    resumed = trainer("part")
    steps: list[int] = []
    again = resumed.run(lambda run, loss: steps.append(run.step))
    assert steps[0] == 51
    assert again.fingerprint() == whole.fingerprint()

    def columns(name: str) -> list[str]:
        return [r.rsplit(",", 1)[0] for r in (tmp_path / f"{name}.csv").read_text().splitlines()]

    assert columns("part") == columns("whole")


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


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(data: Dataset, tmp_path: Path) -> None:
    split = split_snapshots(data, test=[2, 7], validation=[1])
    path = tmp_path / "a.checkpoint"
    small = {**SMALL, "epochs": 1}
    Trainer(data, split, TrainingSettings(**small), path).run()
    with pytest.raises(ModelError, match="other settings"):
        Trainer(data, split, TrainingSettings(**{**small, "seed": 3}), path).run()
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(ModelError, match="damaged checkpoint"):
        Trainer(data, split, TrainingSettings(**small), path).run()


def test_settings_are_checked(data: Dataset, tmp_path: Path) -> None:
    for wrong in ({"epochs": 0}, {"learning_rate": -1.0}, {"kl_weight": -1.0}, {"estimator": "x"}, {"precision": "x"}):
        with pytest.raises(SettingsError, match=next(iter(wrong))):
            TrainingSettings(**wrong)  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="epoch_count"):
        train(data, tmp_path / "m.safetensors", epoch_count=3, progress=False)
    with pytest.raises(SettingsError, match="safetensors"):
        train(data, tmp_path / "m.pt", progress=False)
    with pytest.raises(SettingsError, match="memory_limit"):
        Trainer(data, split_snapshots(data), TrainingSettings(memory_limit=1e-6), tmp_path / "m.checkpoint").prepare()
