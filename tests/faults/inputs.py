"""What the commands of the suite work on, small enough that a run takes a second; and how results are compared."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from ase.build import bulk
from ase.io import write
from predict_tools import aluminium, small_model
from toy_engine import ToyEngine
from training_tools import SMALL, toy_snapshot

from gpurho.checksums import get_text
from gpurho.datasets import write_dataset
from gpurho.model import DensityModel


class PacedToy(ToyEngine):
    """An engine whose calculations take long enough to be killed in."""

    def __init__(self) -> None:
        super().__init__(seconds=0.04)


class Inputs:
    """Structure, model, data set and structures to label, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.structure, self.model = folder / "al.xyz", folder / "small.safetensors"
        self.data, self.frames = folder / "toy.h5", folder / "frames.xyz"
        write(self.structure, aluminium())
        small_model().save(self.model)
        write_dataset(self.data, [toy_snapshot(i, points=8) for i in range(5)])
        frames = []
        for i in range(8):
            atoms = bulk("Al", cubic=True, a=4.05)
            atoms.positions[0, 0] = 0.001 * (i + 1)
            atoms.info.update(temperature_K=300.0 + i, family="al4")
            frames.append(atoms)
        write(self.frames, frames)

    def predict(self, out: Path, *more: object) -> list[object]:
        """``gpurho predict`` of 64 tiles."""
        fixed = ["--model", self.model, "--device", "cpu", "--precision", "fp32", "--grid", 24, 24, 24]
        return ["predict", self.structure, "--out", out, *fixed, "--tile-shape", 6, 6, 6, *more]

    def label(self, out: Path, *more: object) -> list[object]:
        """``gpurho label`` of eight structures."""
        engine = ["--engine", "faults.inputs:PacedToy", "--gamma", "--cutoff", 100, "--workers", 1]
        return ["label", self.frames, "--out", out, *engine, *more]

    def train(self, out: Path, *more: object) -> list[object]:
        """``gpurho train`` of 60 steps with a checkpoint every five."""
        small = {**SMALL, "points_per_snapshot": 200, "batch_size": 32, "width": 12, "checkpoint_steps": 5}
        words = ["train", self.data, "--out", out, "--device", "cpu", "--epochs", 3, "--set", "threads=1"]
        for name, value in small.items():
            if name != "epochs":
                words += ["--set", f"{name}={value}"]
        return [*words, *more]


def result_of(path: Path) -> dict[str, Any]:
    """What a finished output says, to compare with ``==``: bytes, or values bit for bit where times stand in them."""
    if path.suffix == ".safetensors":
        return _model(path)
    with h5py.File(path) as h5:
        kind = get_text(h5, "format")
    return {"values": dict(_values(path))} if kind == "gpurho-dataset" else _bytes(path)


def _bytes(path: Path) -> dict[str, Any]:
    found = {path.name: path.read_bytes()}
    folder = path.with_name(path.name + ".shards")
    return found | {f"shards/{p.name}": p.read_bytes() for p in sorted(folder.glob("*"))}


def _values(path: Path) -> Iterator[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []

    def visit(name: str, item: Any) -> None:
        found.append((name, {k: np.asarray(v).tolist() for k, v in item.attrs.items()}))
        if isinstance(item, h5py.Dataset):
            found.append((f"{name}:", (item.dtype.str, item.shape, np.asarray(item[()]).tobytes())))

    with h5py.File(path) as h5:
        h5.visititems(visit)
    return iter(found)


def _model(path: Path) -> dict[str, Any]:
    model = DensityModel.load(path)
    spec = model.spec.to_dict()
    spec["training"]["final"].pop("seconds")
    tensors = {name: hashlib.sha256(value.numpy().tobytes()).hexdigest() for name, value in model.tensors.items()}
    log = path.with_suffix(".csv").read_text().splitlines()
    return {"spec": spec, "tensors": tensors, "log": [row.rsplit(",", 1)[0] for row in log]}


def names_in(folder: Path) -> set[str]:
    """Names of all files below a folder."""
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
