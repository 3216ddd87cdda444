"""The kinds of files that `faults.damage` damages: how one is made, and all that reading it gives."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import aluminium, settings, small_model
from training_tools import toy_snapshot


class Kind(ABC):
    """A kind of file; `cases` is how many damages the full form does to it."""

    cases = 2000

    @abstractmethod
    def make(self, folder: Path) -> None:
        """Write it, and what belongs to it, into an empty folder."""

    @abstractmethod
    def read(self, folder: Path) -> Any:
        """All that reading gives; None where the library sets the file aside and computes anew."""

    def targets(self, folder: Path) -> list[Path]:
        """The files that are damaged, one at a time."""
        return sorted(path for path in folder.rglob("*") if path.is_file())

    def names(self, path: Path, text: str) -> bool:
        """Whether an error names the damaged file."""
        return path.name in text

    def restore(self, folder: Path, everything: dict[Path, bytes]) -> None:
        """Put all files back as they were."""
        for path in folder.rglob("*"):
            if path.is_file() and path not in everything:
                path.unlink()
        for path, data in everything.items():
            path.write_bytes(data)


def _density(path: Path) -> dict[str, Any]:
    from gpurho.density import Density

    with Density.open(path) as rho:
        found: dict[str, Any] = {
            "structure": [rho.structure.positions, rho.structure.numbers, rho.structure.cell, rho.structure.pbc],
            "grid": [rho.grid.shape, rho.grid.cell, rho.grid.origin],
            "totals": repr(rho.totals),
            "electrons": [rho.electrons, rho.electrons_std],
            "info": {k: repr(v) for k, v in rho.info.items() if k != "timing"},
        }
        for name in ("mean", "aleatoric", "epistemic"):
            found[name] = np.asarray(getattr(rho, name))
        if rho.info["settings"].get("keep"):
            found["coarse"] = np.asarray(rho.coarse.mean)
            atoms = rho.per_atom()
            found["atoms"] = [atoms.electrons, atoms.electrons_std]
            histogram = rho.histogram()
            found["histogram"] = [histogram.counts, histogram.edges]
        return found


def _job(**changes: Any) -> Any:
    from gpurho.pipelines.settings import settle

    options = {k: v for k, v in settings(grid=(12, 12, 12), **changes).items() if k != "progress"}
    return settle(aluminium(), small_model(), **options)


class FieldFile(Kind):
    """A finished prediction."""

    keep: Any = None

    def make(self, folder: Path) -> None:
        from gpurho.pipelines.predict import run_job

        run_job(_job(keep=self.keep), folder / "rho.h5", progress=False).close()

    def read(self, folder: Path) -> Any:
        return _density(folder / "rho.h5")


class KeptFile(FieldFile):
    """A finished prediction with sums and means."""

    keep = ("field", "coarse:2", "atoms", "histogram")


class ShardedFile(Kind):
    """A finished prediction by several workers: the file and its shards."""

    def make(self, folder: Path) -> None:
        from gpurho.densityfile import Layout
        from gpurho.fields import Correction
        from gpurho.pipelines.tiling import run_tiles
        from gpurho.shards import ShardFolder
        from gpurho.shardsink import ShardSink

        job = _job()
        shards = ShardFolder(folder / "rho.h5", job.layout(), 4)
        try:
            for run in shards.runs:
                layout = Layout(job.grid, run.tiles, job.structure, job.names, job.settings(), {})
                sink = ShardSink(shards.folder, run.name, layout, uuid.uuid4().hex)
                run_tiles(replace(job, tiles=run.tiles), sink, lambda n: None)
                sink.finish()
            shards.finish(Correction()).close()
        finally:
            shards.close()

    def read(self, folder: Path) -> Any:
        return _density(folder / "rho.h5")


class UnfinishedFile(Kind):
    """An unfinished prediction: its part, journal and sums, of which a resumed run takes what is whole."""

    cases, tiles = 300, 6

    def make(self, folder: Path) -> None:
        from gpurho.pipelines.tiling import run_tiles
        from gpurho.store import FileSink

        job = _job(keep=KeptFile.keep)
        sink = FileSink(folder / "rho.h5", job.layout())
        count = 0

        def stop(n: int) -> None:
            nonlocal count
            count += 1
            if count == self.tiles:
                raise KeyboardInterrupt

        try:
            run_tiles(job, sink, stop)
        except KeyboardInterrupt:
            pass
        finally:
            sink.close()

    def read(self, folder: Path) -> Any:
        from gpurho.pipelines.predict import run_job

        run_job(_job(keep=KeptFile.keep), folder / "rho.h5", progress=False).close()
        left = sorted(path.name for path in folder.iterdir())
        return [left, (folder / "rho.h5").read_bytes()]


class DataSet(Kind):
    """A data set of labels."""

    def make(self, folder: Path) -> None:
        from gpurho.datasets import extend_dataset, write_dataset

        parts = []
        for i in range(3):
            snapshot = toy_snapshot(i, points=8)
            extra = {"forces": np.full((4, 3), 0.25 + i), "eigenvalues": np.arange(6.0).reshape(2, 3)}
            snapshot = replace(snapshot, arrays=extra, meta={**snapshot.meta, "engine": "toy", "index": i})
            parts.append(folder.with_name(f"{folder.name}-part{i}.h5"))
            write_dataset(parts[-1], [snapshot])
        extend_dataset(folder / "al.h5", parts, range(3))
        for part in parts:
            part.unlink()

    def read(self, folder: Path) -> Any:
        from gpurho.datasets import open_dataset

        data = open_dataset(folder / "al.h5")
        found = []
        for i in range(len(data)):
            s = data[i]
            atoms = [s.structure.positions, s.structure.numbers, s.structure.cell, s.structure.pbc]
            found.append([atoms, s.density, s.electrons, s.arrays, data.n_points(i), data.meta(i)])
        return found


class ModelFile(Kind):
    """A model."""

    def make(self, folder: Path) -> None:
        small_model().with_spec(dft={"engine": "toy"}, training={"command": "gpurho train"}).save(
            folder / "al.safetensors"
        )

    def read(self, folder: Path) -> Any:
        from gpurho.model import DensityModel

        model = DensityModel.load(folder / "al.safetensors")
        return {"spec": model.spec.to_dict(), "tensors": {k: v.numpy() for k, v in model.tensors.items()}}


class Checkpoint(Kind):
    """A checkpoint of a training run."""

    def make(self, folder: Path) -> None:
        import torch

        from gpurho.checkpoint import write_checkpoint

        tensors = {f"network.{i}": torch.arange(40.0).reshape(5, 8) * 0.1 + i for i in range(3)}
        record = {"identity": "this run", "step": 20, "history": [{"epoch": 1.0, "step": 9.0}], "epoch_sum": 0.25}
        write_checkpoint(folder / "al.checkpoint", tensors, record)

    def read(self, folder: Path) -> Any:
        from gpurho.checkpoint import read_checkpoint

        tensors, record = read_checkpoint(folder / "al.checkpoint", "this run")
        return {"tensors": {k: v.numpy() for k, v in tensors.items()}, "record": record}


class Points(Kind):
    """The scratch file of a training run."""

    def make(self, folder: Path) -> None:
        from gpurho.pointstore import PointStore

        store = PointStore(7, 100, folder / "al.features")
        draw = np.random.default_rng(0)
        for n in (40, 60):
            store.append(draw.random((n, 7), np.float32), draw.random(n), np.ones(n, np.float32))
        store.finish()
        store.seal("these points")

    def read(self, folder: Path) -> Any:
        from gpurho.pointstore import PointStore

        store = PointStore.reopen(7, folder / "al.features", "these points")
        return None if store is None else [list(block) for block in store.blocks()]


KINDS: dict[str, type[Kind]] = {
    "field": FieldFile,
    "field with sums": KeptFile,
    "shards": ShardedFile,
    "unfinished prediction": UnfinishedFile,
    "data set": DataSet,
    "model": ModelFile,
    "checkpoint": Checkpoint,
    "points": Points,
}
