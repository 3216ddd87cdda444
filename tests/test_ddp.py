"""Training in two processes: the steps of one, but for rounding."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from training_tools import SMOOTH, toy_snapshot

from gpurho.datasets import write_dataset
from gpurho.errors import DeviceError, SettingsError
from gpurho.pipelines.train import train


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "toy.h5", [toy_snapshot(i, points=10) for i in range(6)])
    settings = {**SMOOTH, "epochs": 3, "ema": 0.9, "patience": 2, "points_per_snapshot": 500, "sampling": "importance"}
    # One draw for all points of a batch, which does not depend on how they are shared out.
    settings |= {"estimator": "shared"}
    one, two = (
        train(data, tmp_path / f"{n}.safetensors", devices=n, progress=False, **settings)  # type: ignore[arg-type]
        for n in (1, 2)
    )
    for name, tensor in one.model.tensors.items():
        torch.testing.assert_close(two.model.tensors[name], tensor, rtol=1e-4, atol=1e-5)
    start = one.model.tensors["layers.0.weight_mean"]
    assert float(start.abs().max()) > 1e-3
    assert len(two.history) == 3
    for a, b in zip(one.history, two.history, strict=True):
        for name in ("train_nll", "validation_rmse", "validation_nll", "kl_per_point"):
            assert b[name] == pytest.approx(a[name], rel=1e-4)
    assert (tmp_path / "2.csv").read_text().count("\n") == 4
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "1.csv", "1.safetensors", "2.csv", "2.safetensors", "toy.h5"
    ]  # fmt: skip


def test_devices_are_checked(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "toy.h5", [toy_snapshot(i, points=10) for i in range(6)])
    with pytest.raises(DeviceError, match="devices 0"):
        train(data, tmp_path / "m.safetensors", devices=0, progress=False, **SMOOTH)
    with pytest.raises(SettingsError, match="batch_size 128 is not a multiple of the 3 devices"):
        train(data, tmp_path / "m.safetensors", devices=3, progress=False, **SMOOTH)
    assert [p.name for p in tmp_path.iterdir()] == ["toy.h5"]
