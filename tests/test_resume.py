"""Training runs that are interrupted: resumed, they give the same bits as undisturbed ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from training_tools import SMALL, toy_snapshot

from gpurho.datasets import Dataset, write_dataset
from gpurho.errors import ModelError
from gpurho.training import Trainer, TrainingSettings
from gpurho.trainingset import Split, split_snapshots


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "toy.h5", [toy_snapshot(i) for i in range(8)])


class _StopError(Exception):
    pass


RUNS = {
    "shared": {},
    "local": {"estimator": "local"},
    "averaged and stopped": {"ema": 0.9, "patience": 1, "schedule": "constant", "learning_rate": 0.02, "epochs": 6},
    "two stages": {"kl_start": 1.0, "kl_ramp": 1.0},
    "rare points": {"sampling": "importance", "points_per_snapshot": 900, "keep_fraction": 0.8},
}


@pytest.mark.parametrize("name", RUNS)
def test_interrupted_and_resumed_is_bit_for_bit_an_undisturbed_run(data: Dataset, tmp_path: Path, name: str) -> None:
    settings = TrainingSettings(**{**SMALL, "epochs": 3, **RUNS[name]})
    split = split_snapshots(data, test=[2, 7], validation=[1])
    whole, part = _interrupted(data, split, settings, tmp_path)
    assert part[0] == 51
    if name.endswith("stopped"):
        assert whole.stopped
        assert whole.step < whole.n_steps


def test_streamed_training_resumes_without_computing_features_again(
    data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gpurho import trainingpoints

    calls: list[int] = []
    original = trainingpoints.point_features

    def counted(*arguments: Any) -> Any:
        calls.append(1)
        return original(*arguments)

    monkeypatch.setattr(trainingpoints, "point_features", counted)
    split = split_snapshots(data, test=[2, 7], validation=[1])
    settings = TrainingSettings(**{**SMALL, "epochs": 3, "memory_limit": 2e-4})
    whole, part = _interrupted(data, split, settings, tmp_path)
    assert part[0] == 51
    # Six snapshots for the undisturbed run, six for the interrupted one, none for its resumption.
    assert len(calls) == 12
    assert whole.data.n_shards > 2
    assert whole.data.limit >= max(whole.data._x.nbytes, 0)
    assert sorted(p.name for p in tmp_path.glob("whole*.features*")) == [
        "whole.train.features",
        "whole.train.features.npz",
        "whole.validation.features",
        "whole.validation.features.npz",
    ]
    whole.clean()
    assert not list(tmp_path.glob("whole*.features*"))


def _interrupted(data: Dataset, split: Split, settings: TrainingSettings, folder: Path) -> tuple[Trainer, list[int]]:
    """An undisturbed trainer, and the steps of a resumed one that gave the same bits and log."""

    def trainer(name: str) -> Trainer:
        return Trainer(data, split, settings, folder / f"{name}.checkpoint")

    undisturbed = trainer("whole")
    whole = undisturbed.run()

    def stop(run: Trainer, loss: float) -> None:
        if run.step == 60:  # ten steps after a checkpoint
            raise _StopError

    with pytest.raises(_StopError):
        trainer("part").run(stop)
    torch.rand(100)  # whatever else draws random numbers must not matter
    steps: list[int] = []
    resumed = trainer("part")
    again = resumed.run(lambda run, loss: steps.append(run.step))
    assert again.fingerprint() == whole.fingerprint()
    assert resumed.step == undisturbed.step

    def columns(name: str) -> list[str]:
        return [r.rsplit(",", 1)[0] for r in (folder / f"{name}.csv").read_text().splitlines()]

    assert columns("part") == columns("whole")
    return undisturbed, steps


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
