"""Every file says its version: old ones (tests/fixtures) are read, newer ones are refused by name."""

from __future__ import annotations

import importlib
import json
import re
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import aluminium, settings, small_model
from safetensors import safe_open
from safetensors.torch import save_file

from gpurho.checkpoint import read_checkpoint, write_checkpoint
from gpurho.datasets import open_dataset
from gpurho.densityfile import open_density, verify
from gpurho.errors import DatasetError, ModelError, SettingsError, StoreError
from gpurho.journal import Journal, read_journal
from gpurho.model import load_model
from gpurho.pointstore import PointStore
from gpurho.versions import NEWEST, check_version

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures"
SETS = sorted(p.name for p in FIXTURES.iterdir() if p.is_dir())
WRITERS = {
    "gpurho-density": "densityfile",
    "gpurho-shard": "shardsink",
    "gpurho-dataset": "datasets",
    "gpurho-model": "modelspec",
    "gpurho-checkpoint": "checkpoint",
    "gpurho-points": "pointstore",
    "gpurho-paper": "pipelines.paper_store",
}
"""Modules with a constant of the version that they write."""


def test_the_table_of_versions_is_that_of_the_writers_and_of_the_documentation():
    for kind, name in WRITERS.items():
        module = importlib.import_module(f"gpurho.{name}")
        written = getattr(module, "SHARD_VERSION" if kind == "gpurho-shard" else "FORMAT_VERSION")
        assert written == NEWEST[kind], kind
    text = (ROOT / "docs" / "files.md").read_text()
    assert dict(re.findall(r"^\| `(gpurho-[a-z]+)` \| (\d+) \|", text, re.MULTILINE)) == {
        kind: str(version) for kind, version in NEWEST.items()
    }


def test_fixtures_are_small_and_there():
    assert {"first", "before-checksums"} <= set(SETS)
    assert all(path.stat().st_size < 50_000 for path in FIXTURES.rglob("*") if path.is_file())


@pytest.mark.parametrize("name", SETS)
def test_old_models_predict_what_old_fields_hold(name):
    folder = FIXTURES / name
    model = load_model(folder / "model.safetensors")
    assert model.spec.species == ("Al",)
    with open_density(folder / "field.h5") as old:
        new = np.asarray(small_model().tensors["layers.0.weight_mean"])
        assert np.array_equal(model.tensors["layers.0.weight_mean"], new)
        import gpurho

        again = gpurho.predict(aluminium(), model, grid=(4, 4, 4), **settings())
        assert np.abs(old.mean[:, :, :] - again.mean).max() < 1e-5
        assert old.electrons == pytest.approx(again.electrons, rel=1e-6)
    assert verify(folder / "field.h5") == []


@pytest.mark.parametrize("name", SETS)
def test_old_data_sets_checkpoints_points_and_journals(name, tmp_path):
    folder = FIXTURES / name
    snapshot = open_dataset(folder / "dataset.h5")[0]
    assert snapshot.electrons == 12.0
    assert snapshot.meta["temperature_K"] == 300.0
    tensors, record = read_checkpoint(folder / "checkpoint.safetensors", "me")
    assert tensors["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert record["epoch"] == 3
    assert read_journal(folder / "run.journal") == [{"journal": 1, "settings": {"a": 1}}]
    store = PointStore.reopen(3, folder / "points.bin", "key")
    # Scratch files without a checksum are drawn again.
    assert store is None or np.array_equal(store.density, np.ones(4))


@pytest.mark.parametrize("name", [n for n in SETS if (FIXTURES / n / "sharded.h5").exists()])
def test_old_shards_and_reductions(name, tmp_path):
    folder = FIXTURES / name
    with open_density(folder / "sharded.h5") as density:
        assert np.isfinite(density.mean[:, :, :]).all()
        assert density.electrons == pytest.approx(float(np.sum(density.mean[:, :, :], dtype=float)) * density.grid.dv)
    assert verify(folder / "sharded.h5") == []
    with open_density(folder / "kept.h5") as density:
        assert len(density.per_atom().electrons) == 4
        assert density.per_atom().electrons.sum() == pytest.approx(density.electrons, rel=1e-6)
        assert density.histogram("mean").n_points == 64


# -- newer files ------------------------------------------------------------------------------------------------


def test_newer_hdf5_files_are_refused_by_name(tmp_path):
    for source, read, error in (
        ("field.h5", open_density, StoreError),
        ("kept.h5", open_density, StoreError),
        ("dataset.h5", open_dataset, DatasetError),
    ):
        path = tmp_path / source
        shutil.copy(FIXTURES / "before-checksums" / source, path)
        for version, match in ((99, "99 is newer than .*upgrade gpurho"), (0, "whole number"), ("x", "whole number")):
            with h5py.File(path, "r+") as h5:
                h5.attrs["format_version"] = version
            with pytest.raises(error, match=match) as caught:
                read(path)
            assert source in str(caught.value)


def test_newer_shards_are_refused_by_name(tmp_path):
    shutil.copytree(FIXTURES / "before-checksums", tmp_path / "x")
    with h5py.File(tmp_path / "x" / "sharded.h5.shards" / "000001.h5", "r+") as h5:
        h5.attrs["format_version"] = 7
    with open_density(tmp_path / "x" / "sharded.h5") as density, pytest.raises(StoreError, match=r"000001.*upgrade"):
        density.mean[:, :, :]


def test_newer_models_and_checkpoints_are_refused_by_name(tmp_path):
    path = tmp_path / "m.safetensors"
    with safe_open(FIXTURES / "first" / "model.safetensors", framework="pt") as file:
        text = json.loads(file.metadata()["gpurho"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    save_file(tensors, path, {"gpurho": json.dumps({**text, "format_version": 99})})
    with pytest.raises(ModelError, match=r"m.safetensors.*99 is newer.*upgrade gpurho"):
        load_model(path)
    write_checkpoint(path, tensors, {"identity": "me"})
    assert read_checkpoint(path, "me")[1] == {"identity": "me"}
    record = json.dumps({"identity": "me"})
    save_file(tensors, path, {"gpurho-checkpoint": record, "format_version": "2"})
    with pytest.raises(ModelError, match=r"m.safetensors.*2 is newer.*upgrade gpurho"):
        read_checkpoint(path, "me")


def test_newer_journals_and_records_are_refused_by_name(tmp_path):
    from gpurho.pipelines.paper_store import Results
    from gpurho.pipelines.select import _read_record

    for name in ("journal", "manifest"):
        journal = Journal(tmp_path / name)
        journal.append({name: 2, "settings": {}})
        journal.close()
        with pytest.raises(StoreError, match=r"2 is newer.*upgrade gpurho"):
            read_journal(tmp_path / name)
    for file, kind, read in (
        ("s.json", "gpurho-selection", _read_record),
        ("results.json", "gpurho-paper", lambda path: Results(path.parent)),
    ):
        path = tmp_path / file
        path.write_text(json.dumps({"format": kind, "format_version": 9, "candidates": {}, "entries": {}}))
        with pytest.raises(StoreError, match=f"{file}.*9 is newer.*upgrade gpurho"):
            read(path)
        path.write_text(json.dumps({"format": kind, "format_version": 1, "candidates": {}, "entries": {}}))
        read(path)


def test_newer_scratch_files_are_drawn_again(tmp_path):
    store = PointStore(3, 4, tmp_path / "p")
    store.append(np.ones((4, 3), np.float32), np.ones(4), np.ones(4, np.float32))
    store.finish()
    store.seal("key")
    assert PointStore.reopen(3, tmp_path / "p", "key") is not None
    with np.load(tmp_path / "p.npz") as record:
        values = dict(record)
    np.savez(tmp_path / "p.npz", **{**values, "format_version": np.array(2)})
    assert PointStore.reopen(3, tmp_path / "p", "key") is None


@pytest.mark.parametrize("value", [0, -1, None, True, 1.0, "1", np.float64(1)])
def test_versions_are_whole_numbers(value):
    with pytest.raises(SettingsError, match="whole number"):
        check_version(value, "gpurho-points", "here", SettingsError)
    assert check_version(np.int64(1), "gpurho-points", "here", SettingsError) == 1
