"""Runs of tiles that workers get: boxes, few atoms, small tasks, and shards that are taken over; without a cluster."""

from __future__ import annotations

import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from predict_tools import aluminium, settings, small_model

from gpurho.journal import read_journal
from gpurho.pipelines.parts import Nearby
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import Stages
from gpurho.shards import runs_of

pytest.importorskip("distributed")

GRID = {"grid": (24, 18, 17)}


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.mark.parametrize("per_run", [1, 2, 3, 5, 7, 14, 20, 35, 70, 10_000])
@pytest.mark.parametrize("region", [None, ((3, 22), (8, 30), (5, 41))])
def test_runs_are_boxes_of_consecutive_tiles(per_run, region):
    from gpurho.grid import Grid
    from gpurho.partition import make_tiles

    tiles = make_tiles(Grid((24, 33, 50), np.eye(3) * 9), (8, 8, 8), region)
    runs = runs_of(tiles, per_run)
    assert [run.index for run in runs] == list(range(len(runs)))
    assert [run.first for run in runs] + [len(tiles)] == [0] + [run.last for run in runs]
    for run in runs:
        own, ours = list(run.tiles), tiles[run.first : run.last]
        assert [(t.start, t.stop) for t in own] == [(t.start, t.stop) for t in ours]
        assert len(own) <= max(per_run, 1)


def _far_apart() -> Any:
    """Atoms of two species in a sheared cell so large that the halo of a tile holds a few of them."""
    from ase import Atoms

    rng = np.random.default_rng(3)
    cell = np.array([[60.0, 2.0, 0.0], [-9.0, 50.0, 3.0], [4.0, 0.0, 55.0]])
    fractions = rng.random((900, 3))
    keep = [0]
    positions = fractions @ cell
    for i in range(1, 900):
        if np.linalg.norm(positions[keep] - positions[i], axis=1).min() > 1.8:
            keep.append(i)
    numbers = rng.choice([14, 32], len(keep))
    return Atoms(numbers, positions[keep], cell=cell, pbc=(True, True, False))


def test_a_worker_gets_few_atoms_and_finds_the_same_bits():
    options = {k: v for k, v in settings().items() if k != "progress"}
    job = settle(_far_apart(), small_model(("Si", "Ge")), grid=(60, 50, 55), **options)
    structure = job.structure
    nearby, whole = Nearby(job), Stages(job)
    fewest = len(structure)
    for run in runs_of(job.tiles, 3)[:: len(job.tiles) // 20]:
        part = nearby.part(run.tiles)
        fewest = min(fewest, len(part.structure))
        mine = Stages(replace(part, tiles=run.tiles), whole)
        for tile in run.tiles:
            wanted, made = whole.features(tile)
            wanted, counts = wanted.clone(), made.settle()
            found, again = mine.features(tile)
            assert found.numpy().tobytes() == wanted.numpy().tobytes()
            for name in ("n_capped", "n_tied", "n_exact"):
                assert getattr(counts, name) == getattr(again.settle(), name)
    assert fewest < 0.2 * len(structure)


def test_what_goes_through_the_scheduler_is_small(model, tmp_path):
    """Neither atoms nor the model: the size of a task does not grow with the structure."""
    import pickle

    from gpurho.pipelines.distributed import _Work
    from gpurho.shards import ShardFolder

    options = {k: v for k, v in settings().items() if k != "progress"}
    for repeat in (1, 6):
        job = settle(aluminium(repeat), model, **GRID, **options)
        folder = ShardFolder(tmp_path / f"{repeat}.h5", job.layout(), 4)
        client: Any = types.SimpleNamespace(submit=lambda function, task, **names: "future")
        work: Any = _Work(job, folder, client)
        work._send(folder.runs[0])
        folder.close()
        _, task = work._futures["future"]
        assert len(pickle.dumps(task)) < 4000
        assert task.atoms.exists()


def test_unfinished_shard_is_taken_over(model, tmp_path):
    """An attempt whose worker died: whole tiles are kept, a damaged one and those after it are made again."""
    import uuid

    from gpurho.densityfile import Layout
    from gpurho.pipelines.tiling import run_tiles
    from gpurho.shardsink import ShardSink

    options = {k: v for k, v in settings().items() if k != "progress"}
    job = settle(aluminium(), model, **GRID, **options)
    run = runs_of(job.tiles, 9)[1]
    part = replace(job, tiles=run.tiles)
    layout = Layout(job.grid, run.tiles, job.structure, job.names, job.settings(), {})

    def sink() -> Any:
        return ShardSink(tmp_path, run.name, layout, uuid.uuid4().hex)

    calm = sink()
    run_tiles(part, calm, lambda n: None)
    calm.finish()
    shard = tmp_path / f"{run.name}.h5"
    wanted = shard.read_bytes()
    shard.unlink()

    def stop(n: int) -> None:
        count.append(n)
        if len(count) == 5:
            raise KeyboardInterrupt

    count: list[int] = []
    first = sink()
    with pytest.raises(KeyboardInterrupt):
        run_tiles(part, first, stop)
    first.close()
    journal = next(tmp_path.glob("*.journal"))
    records = read_journal(journal)
    assert len(records) == 6
    data = bytearray(journal.with_suffix(".part").read_bytes())
    data[records[4]["offset"][0] + 2] ^= 0x10
    journal.with_suffix(".part").write_bytes(data)
    again = sink()
    assert again.replayed == 3
    assert not journal.exists()
    run_tiles(part, again, lambda n: None)
    again.finish()
    assert shard.read_bytes() == wanted
    assert [p.name for p in tmp_path.iterdir()] == [shard.name]
