"""Files that name other files: shards beside the output are read, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from predict_tools import aluminium, settings, small_model

import gpurho
from gpurho.densityfile import verify
from gpurho.errors import OutputExistsError, StoreError
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import run_tiles
from gpurho.shards import ShardFolder, remove_shards, shard_folder
from gpurho.shardsink import ShardSink

GRID = (20, 18, 17)
REGION = ((3, 20), (0, 13), (7, 17))


@pytest.fixture(scope="module")
def model():
    return small_model()


def sharded(path: Path, model: Any, per_run: int = 5, **changes: Any) -> gpurho.Density:
    """A prediction in shards, made run by run in this process."""
    from dataclasses import replace

    from gpurho.fields import Correction

    options = {k: v for k, v in settings(**changes).items() if k != "progress"}
    job = settle(aluminium(), model, grid=GRID, **options)
    folder = ShardFolder(path, job.layout(), per_run)
    try:
        for run in reversed(folder.runs):  # the order of runs must not matter
            sink = ShardSink(folder.folder, run.name, folder.run_layout(run), "test")
            run_tiles(replace(job, tiles=run.tiles), sink, lambda n: None)
            sink.finish()
        return folder.finish(Correction())
    finally:
        folder.close()


@pytest.fixture
def output(tmp_path, model):
    path = tmp_path / "rho.h5"
    sharded(path, model).close()
    return path


@pytest.mark.parametrize("per_run", [1, 2, 3, 9, 27])
@pytest.mark.parametrize("region", [None, REGION])
def test_one_file_of_all_shards(tmp_path, model, per_run, region):
    path = tmp_path / "rho.h5"
    wanted = gpurho.predict(aluminium(), model, grid=GRID, **settings(region=region))
    with sharded(path, model, per_run, region=region) as rho:
        for name in ("mean", "aleatoric", "epistemic"):
            np.testing.assert_array_equal(np.asarray(getattr(rho, name)), getattr(wanted, name))
        for key in (np.s_[3], np.s_[1:9, ..., 2::3], np.s_[4:4], np.s_[-1, 2], np.s_[1, 2, 3]):
            np.testing.assert_array_equal(rho.mean[key], wanted.mean[key])
        assert (rho.totals, rho.electrons_std) == (wanted.totals, wanted.electrons_std)
        points = wanted.grid.points()[5::97]
        np.testing.assert_array_equal(rho.at(points)[0], wanted.at(points)[0])
    assert verify(path) == []
    box = tuple(slice(*pair) for pair in region) if region else np.s_[:]
    with h5py.File(path) as h5:
        assert h5["mean"].is_virtual
        np.testing.assert_array_equal(h5["mean"][box], wanted.mean)
        assert np.isfinite(h5["mean"][()]).sum() == wanted.mean.size
        assert h5.attrs["format_version"] == 2


def test_the_bytes_are_those_of_the_inputs(tmp_path, model):
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        sharded(tmp_path / name / "rho.h5", model).close()
        files.append({p.name: p.read_bytes() for p in (tmp_path / name).rglob("*.h5")})
    assert files[0] == files[1]


def test_density_may_be_closed_and_opened_again(output):
    rho = gpurho.Density.open(output)
    rho.close()
    with pytest.raises(gpurho.SettingsError, match="closed"):
        rho.mean[0]


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.h5", "rho.h5.shards/../../secret.h5", ""])
def test_sources_elsewhere_are_refused(output, name):
    with h5py.File(output, "r+") as h5:
        names = h5["shards/names"][()].tolist()
        del h5["shards/names"]
        h5["shards/names"] = np.array([name.encode(), *names[1:]])
    with pytest.raises(StoreError, match="not in its own folder"):
        gpurho.Density.open(output)


def test_links_out_of_the_folder_are_refused(output, tmp_path):
    shard = sorted(shard_folder(output).glob("*.h5"))[0]
    away = tmp_path.parent / f"{tmp_path.name}-away.h5"
    shard.rename(away)
    shard.symlink_to(away)
    with pytest.raises(StoreError, match="out of its own folder"):
        gpurho.Density.open(output)
    away.unlink()


def test_foreign_virtual_and_external_data_are_refused(tmp_path, model):
    plain = tmp_path / "plain.h5"
    gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=plain, **settings()).close()
    data = plain.read_bytes()
    secret = tmp_path / "secret.h5"
    with h5py.File(secret, "w") as h5:
        h5["x"] = np.ones((8, 8, 8), np.float32)
    (tmp_path / "raw").write_bytes(bytes(2048))

    def virtual(h5: Any) -> None:
        layout = h5py.VirtualLayout((8, 8, 8), np.float32)
        layout[:] = h5py.VirtualSource(str(secret), "x", (8, 8, 8))
        h5.create_virtual_dataset("mean", layout)

    def external(h5: Any) -> None:
        h5.create_dataset("mean", (8, 8, 8), np.float32, external=[(str(tmp_path / "raw"), 0, 2048)])

    def link(h5: Any) -> None:
        h5["mean"] = h5py.ExternalLink(str(secret), "x")

    for trick in (virtual, external, link):
        plain.write_bytes(data)
        with h5py.File(plain, "r+") as h5:
            del h5["mean"]
            trick(h5)
        with pytest.raises(StoreError, match="is not read"):
            gpurho.Density.open(plain)
        with pytest.raises((StoreError, OutputExistsError), match="is not read"):
            gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=plain, **settings())


def test_virtual_sources_that_differ_from_the_table_are_refused(output, tmp_path):
    with h5py.File(output, "r+") as h5:
        del h5["mean"]
        layout = h5py.VirtualLayout(GRID, np.float32)
        layout[:] = h5py.VirtualSource("../secret.h5", "mean", GRID)
        h5.create_virtual_dataset("mean", layout)
        del h5["shards/heaps"]  # checksums of what was there
    with pytest.raises(StoreError, match="not in its own folder"):
        gpurho.Density.open(output)


def test_shards_of_another_prediction_are_named(output, tmp_path, model):
    other = tmp_path / "other.h5"
    sharded(other, model, uncertainty=None).close()
    (shard_folder(output) / "000002.h5").write_bytes((shard_folder(other) / "000002.h5").read_bytes())
    with gpurho.Density.open(output) as rho, pytest.raises(StoreError, match=r"000002\.h5 belongs to another"):
        np.asarray(rho.mean)


def test_damaged_shards_are_named(output):
    shard = shard_folder(output) / "000001.h5"
    shard.write_bytes(shard.read_bytes()[:900])
    with gpurho.Density.open(output) as rho, pytest.raises(StoreError, match=r"000001\.h5"):
        np.asarray(rho.mean)
    assert 0 < len(verify(output)) < 27


def test_only_what_is_ours_is_removed(output):
    folder = shard_folder(output)
    (folder / "thesis.tex").write_text("mine")
    remove_shards(output)
    assert [p.name for p in folder.iterdir()] == ["thesis.tex"]
