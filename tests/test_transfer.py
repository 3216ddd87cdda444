"""Transfer to larger cells: what is frozen and kept, what is recorded, and the guide to cell sizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import SMOOTH, toy_snapshot

from gpurho.cli import main
from gpurho.datasets import Dataset, Snapshot, write_dataset
from gpurho.errors import ModelError, SettingsError
from gpurho.layers import NetworkSpec
from gpurho.model import DensityModel
from gpurho.pipelines.train import train
from gpurho.pipelines.transfer import size_guide, transfer
from gpurho.trainsettings import TrainingSettings, settings_of_model
from gpurho.transfer import SizeGuide, SizeRow, divergence, frozen_layers

QUICK = {"epochs": 4, "points_per_snapshot": 600, "batch_size": 128, "warmup_steps": 5, "learning_rate": 5e-3}
KEPT = ("feature_mean", "feature_std", "baseline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transfer")


@pytest.fixture(scope="module")
def large(folder: Path) -> Dataset:
    """Cells twice as long whose density is 5 % higher at its peaks than that of the small cells."""
    snapshots = []
    for i in range(4):
        s = toy_snapshot(20 + i, cells=2, points=10)
        density = s.density + 0.05 * (s.density**2 - (s.density**2).mean() * s.density / s.density.mean())
        density *= s.electrons / (density.sum() * s.grid.dv)
        snapshots.append(Snapshot(s.structure, density, s.electrons, s.meta))
    return write_dataset(folder / "large.h5", snapshots)


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    data = write_dataset(folder / "small.h5", [toy_snapshot(i) for i in range(6)])
    path = folder / "small.safetensors"
    train(data, path, progress=False, **{**SMOOTH, "blocks": 3, "layers": 2, "width": 12, "epochs": 6})
    return path


def layer(model: DensityModel, i: int) -> list[torch.Tensor]:
    return [model.tensors[f"layers.{i}.{k}_{of}"] for k in ("weight", "bias") for of in ("mean", "sigma")]


def test_a_third_of_the_layers_stays_and_the_rest_learns_the_new_cells(
    small: Path, large: Dataset, tmp_path: Path
) -> None:
    old = DensityModel.load(small)
    result = transfer(small, large, tmp_path / "m.safetensors", progress=False, **QUICK)
    new = DensityModel.load(tmp_path / "m.safetensors")
    for i in range(7):
        same = [torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(layer(old, i), layer(new, i), strict=True)]
        assert same == [i < 2] * 4
    for name in KEPT:
        assert torch.equal(old.tensors[name], new.tensors[name])
    assert (new.spec.density_mean, new.spec.density_std) == (old.spec.density_mean, old.spec.density_std)
    low, high = (new.tensors[f"feature_{k}"] - old.tensors[f"feature_{k}"] for k in ("low", "high"))
    assert bool((low <= 0).all() and (high >= 0).all() and (high > 0).any())
    first = result.history[0]["validation_rmse"]
    assert result.history[-1]["validation_rmse"] < first
    start = new.spec.training["start"]
    assert start["file"] == "small.safetensors"
    assert start["model"] == old.fingerprint()
    assert (start["frozen_layers"], start["prior"]) == (2, "standard")
    command = new.spec.training["command"]
    assert command.startswith("gpurho transfer small.safetensors large.h5 --out m.safetensors --freeze-layers 2")
    assert "width" not in command
    assert result.metrics is not None


def test_the_old_posterior_may_be_the_prior(small: Path, large: Dataset, tmp_path: Path) -> None:
    weak, strong = (
        transfer(
            small,
            large,
            tmp_path / f"{w}.safetensors",
            freeze=0,
            prior="posterior",
            kl_weight=w,
            progress=False,
            **QUICK,
        ).model
        for w in (1e-3, 1e4)
    )
    old = DensityModel.load(small)

    def moved(model: DensityModel) -> float:
        return float(
            sum((a - b).square().sum() for i in range(7) for a, b in zip(layer(old, i), layer(model, i), strict=True))
            ** 0.5
        )

    assert moved(weak) > 5 * moved(strong) > 0


def test_models_that_do_not_fit_are_refused(small: Path, large: Dataset, tmp_path: Path) -> None:
    out = tmp_path / "m.safetensors"
    with pytest.raises(SettingsError, match="width 16 is not that of the model, 12"):
        transfer(small, large, out, width=16, progress=False)
    with pytest.raises(SettingsError, match="prior 'x'"):
        transfer(small, large, out, prior="x", progress=False)
    with pytest.raises(SettingsError, match=r"freeze 1\.5"):
        transfer(small, large, out, freeze=1.5, progress=False)
    wrong = [Snapshot(s.structure, s.density * (5 / 3), s.electrons * 5 / 3, s.meta) for s in large]
    data = write_dataset(tmp_path / "wrong.h5", wrong)
    with pytest.raises(ModelError, match="valence electrons"):
        transfer(small, data, out, progress=False)
    assert not out.exists()


def test_frozen_layers_are_counted_as_the_paper_does() -> None:
    assert [frozen_layers(NetworkSpec(3, 3, 8), f) for f in (0.0, 0.333, 0.5, 1.0)] == [0, 3, 4, 9]
    assert frozen_layers(NetworkSpec(0, 3, 8), 0.333) == 0


def test_settings_of_a_model_repeat_it(small: Path) -> None:
    spec = DensityModel.load(small).spec
    settings = settings_of_model(spec, epochs=3)
    assert settings.descriptor(spec.species) == spec.descriptor
    assert settings.network() == spec.network
    assert (settings.target, settings.epochs) == ("delta", 3)


# --- the guide ----------------------------------------------------------------------------------------------------


def test_divergence_of_histograms() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, 200_000), rng.normal(0.5, 1, 200_000)
    assert divergence(a, b) == pytest.approx(0.125, rel=0.05)  # shift^2 / 2 for Gaussians
    assert divergence(a, rng.normal(0, 1, 200_000)) < 1e-3
    # What the smaller cells have more of matters less than what they lack.
    narrow = rng.normal(0, 0.3, 200_000)
    assert divergence(a, narrow) > 3 * divergence(narrow, a)
    assert divergence(np.ones(100), np.ones(100)) == pytest.approx(0.0)


def test_guide_finds_the_size_beyond_which_nothing_new_comes(tmp_path: Path) -> None:
    # Cells of 4, 8 and 12 atoms: the smallest are all alike, the larger ones have the same disorder.
    sizes = []
    for cells in (1, 2, 3):
        seeds = [4] * 6 if cells == 1 else [3 + 4 * k for k in range(6)]
        snapshots = [toy_snapshot(s, cells=cells, points=10) for s in seeds]
        sizes.append(write_dataset(tmp_path / f"{cells}.h5", snapshots))
    guide = size_guide(list(reversed(sizes)), points=5000, **{k: SMOOTH[k] for k in ("family", "cutoff")})
    assert [r.atoms for r in guide.rows] == [4, 8, 12]
    assert guide.rows[0].density_next > 3 * guide.rows[1].density_next
    assert [r.enough for r in guide.rows[:2]] == [False, True]
    assert guide.sufficient == 8
    text = str(guide)
    assert "cells larger than 8 atoms add nothing" in text
    assert [line.split()[-1] for line in text.splitlines()[2:5]] == ["1.h5", "2.h5", "3.h5"]
    with pytest.raises(SettingsError, match="two data sets"):
        size_guide(sizes[:1], family="smooth")


def test_guide_needs_every_larger_size_to_add_nothing() -> None:
    def row(atoms: float, enough: bool) -> SizeRow:
        return SizeRow("x", atoms, 1, 0.1 if enough else 0.5, 0.1, 0.1, 0.1, 0.1, 0.1)

    last = row(500, True)
    assert SizeGuide([row(32, True), row(108, False), row(256, True), last]).sufficient == 256
    assert SizeGuide([row(32, True), row(108, True), last]).sufficient == 32
    assert SizeGuide([row(32, True), row(108, False), last]).sufficient is None


# --- the commands -------------------------------------------------------------------------------------------------


def test_commands(small: Path, large: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "m.safetensors"
    words = [f"{k}={v}" for k, v in QUICK.items() if k != "epochs"]
    sets = [w for word in words for w in ("--set", word)]
    command = [
        "transfer",
        str(small),
        str(large.path),
        "--out",
        str(out),
        "--epochs",
        "1",
        "--quiet",
        "--device",
        "cpu",
    ]
    assert main([*command, *sets, "--freeze-layers", "1"]) == 0
    assert "training" in capsys.readouterr().out
    assert DensityModel.load(out).spec.training["start"]["frozen_layers"] == 1

    assert main(["transfer", "--guide", str(small.parent / "small.h5"), str(large.path), "--points", "600", "--json",
                 "--model", str(small)]) == 0  # fmt: skip
    table = json.loads(capsys.readouterr().out)
    assert [row["atoms"] for row in table["sizes"]] == [4, 8]
    assert table["sizes"][1]["density_next"] is None

    assert main(["transfer", str(small)]) == 1
    assert "transfer needs a model" in capsys.readouterr().err
    assert main(["transfer", str(small), str(large.path), "--out", str(out), "--quiet"]) == 1
    assert "exists" in capsys.readouterr().err
    many = ["train", str(small.parent / "small.h5"), str(large.path), "--out", str(tmp_path / "n.safetensors")]
    small_run = {**SMOOTH, **QUICK, "epochs": 1, "points_per_snapshot": 200}
    sets = [w for k, v in small_run.items() for w in ("--set", f"{k}={v}")]
    assert main([*many, *sets, "--quiet", "--device", "cpu"]) == 0
    assert len(DensityModel.load(tmp_path / "n.safetensors").spec.training["datasets"]) == 2


def test_defaults_of_the_families_are_whole() -> None:
    for family in ("scalar-product", "smooth"):
        settings = TrainingSettings(family=family)
        assert settings.target == ("delta" if family == "smooth" else "density")
        assert settings.descriptor(["Al"]).family == family
    assert TrainingSettings(family="smooth", target="density", cutoff=6.0).cutoff == 6.0
