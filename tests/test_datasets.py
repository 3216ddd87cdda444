"""Data sets: both layouts, units, and refusal of damaged files."""

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from gpurho.datasets import Snapshot, open_dataset, write_dataset
from gpurho.errors import DatasetError
from gpurho.structure import Structure
from gpurho.units import BOHR

CELL = np.array([[4.0, 0.0, 0.0], [0.5, 4.2, 0.0], [0.0, 0.3, 3.9]])


def make_snapshot(seed: int = 0, **meta: object) -> Snapshot:
    rng = np.random.default_rng(seed)
    structure = Structure(rng.uniform(0, 1, (2, 3)) @ CELL, np.array([13, 13]), CELL, np.ones(3, bool))
    density = rng.uniform(0.5, 1.5, (6, 7, 8))
    density *= 6.0 / (density.sum() * structure.volume / density.size)
    return Snapshot(structure, density.astype(np.float32), 6.0, {"temperature_K": 300, **meta})


def write_older(path: Path, snapshots: list[Snapshot]) -> None:
    with h5py.File(path, "w") as file:
        for i, s in enumerate(snapshots):
            group = file.create_group(f"snapshot_{i:03d}")
            group["positions"], group["cell"], group["numbers"] = (
                s.structure.positions,
                s.structure.cell,
                s.structure.numbers,
            )
            group["density"] = (s.density.astype(float) * BOHR**3).astype(np.float32)
            group.attrs["electrons"] = s.electrons
            group.attrs["kpts"] = np.array([2, 2, 2])
            for key, value in s.meta.items():
                group.attrs[key] = value


def test_round_trip(tmp_path: Path) -> None:
    snapshots = [make_snapshot(i, trajectory=i % 2, kpts=[2, 2, 2], engine="GPAW") for i in range(3)]
    path = tmp_path / "d.h5"
    data = write_dataset(path, snapshots)
    assert len(data) == 3
    for got, want in zip(data, snapshots, strict=True):
        np.testing.assert_array_equal(got.density, want.density)
        assert got.structure.fingerprint() == want.structure.fingerprint()
        assert got.electrons == 6.0
        assert got.meta == want.meta
    assert data.meta(1)["trajectory"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["d.h5"]
    with h5py.File(path) as file:
        assert file["snapshots/000000/density"].attrs["unit"] == b"e/angstrom^3"
    assert [s.meta["trajectory"] for s in data[1:]] == [1, 0]
    with pytest.raises(IndexError):
        data[3]


def test_older_files_are_converted_from_atomic_units(tmp_path: Path) -> None:
    snapshots = [make_snapshot(i) for i in range(2)]
    write_older(tmp_path / "old.h5", snapshots)
    data = open_dataset(tmp_path / "old.h5")
    assert len(data) == 2
    np.testing.assert_allclose(data[1].density, snapshots[1].density, rtol=1e-6)
    assert data[0].meta["kpts"] == [2, 2, 2]
    assert data[0].structure.pbc.all()


def test_fingerprint_follows_the_data_and_nothing_else(tmp_path: Path) -> None:
    a = write_dataset(tmp_path / "a.h5", [make_snapshot(0), make_snapshot(1)])
    b = write_dataset(tmp_path / "b.h5", [make_snapshot(0, note="x"), make_snapshot(1)], compression=1)
    c = write_dataset(tmp_path / "c.h5", [make_snapshot(1), make_snapshot(0)])
    assert a.fingerprint() == b.fingerprint() != c.fingerprint()


def _set(name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        group = file["snapshots/000000"]
        del group[name]
        if value is not None:
            group[name] = value

    return change


def _attribute(where: str, name: str, value: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        if value is None:
            del file[where].attrs[name]
        else:
            file[where].attrs[name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("density", None), "no data set 'density'"),
        (_set("positions", None), "no data set 'positions'"),
        (_set("density", np.ones((3, 3))), "shape"),
        (_set("density", np.ones((3, 3, 3), int)), "floating point"),
        (_set("density", np.full((3, 3, 3), np.nan)), "not finite"),
        (_set("density", np.full((3, 3, 3), 5.0)), "integrates to"),
        (_set("positions", np.ones((2, 2))), "positions"),
        (_set("cell", np.zeros((3, 3))), "volume"),
        (_attribute("snapshots/000000", "electrons", None), "no attribute electrons"),
        (_attribute("snapshots/000000", "electrons", 7.0), "not the 7"),
        (_attribute("snapshots/000000", "electrons", -6.0), "positive"),
    ],
)
def test_damaged_snapshots_are_refused_by_name(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    path = tmp_path / "d.h5"
    write_dataset(path, [make_snapshot()])
    with h5py.File(path, "r+") as file:
        change(file)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(path)[0]
    assert "snapshots/000000" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "d.h5"
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset(path)
    path.write_bytes(b"no HDF5")
    with pytest.raises(DatasetError, match="cannot be read"):
        open_dataset(path)
    with h5py.File(path, "w") as file:
        file["x"] = 1.0
    with pytest.raises(DatasetError, match="no snapshots"):
        open_dataset(path)
    for name, value, message in (("format", "gpurho-field", "gpurho-field"), ("format_version", 2, "newer than 1")):
        write_dataset(path, [make_snapshot()])
        with h5py.File(path, "r+") as file:
            file.attrs[name] = value
        with pytest.raises(DatasetError, match=message):
            open_dataset(path)


def test_wrong_snapshots_are_not_written(tmp_path: Path) -> None:
    good = make_snapshot()
    bad = Snapshot(good.structure, good.density * 2, good.electrons)
    with pytest.raises(DatasetError, match="snapshot 1: density integrates"):
        write_dataset(tmp_path / "d.h5", [good, bad])
    assert list(tmp_path.iterdir()) == []
