"""Models, checkpoints, data sets, densities, scratch files and records: damaged, or made to do harm."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from predict_tools import aluminium, settings, triclinic_structure, wave

from fuzz.cases import finite, whole_density
from fuzz.mutations import ACCIDENTS
from fuzz.structures import model, smooth_model

JSON_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3.5, 1e308, -1e308, 10**18, 2**63, 2**70, "", "x", "Al", "\x00", "../../x", [], {}, [[]]),
    *([1, 2, 3], ["Al", "Al"], {"a": 1}, [None], "9" * 400, [[[1e300]]]),
)


def changed(value: Any, rng: np.random.Generator) -> Any:
    """A JSON value with one place in it changed, removed or added."""
    places: list[tuple[Any, Any]] = []

    def look(item: Any) -> None:
        pairs = item.items() if isinstance(item, dict) else enumerate(item) if isinstance(item, list) else ()
        for key, inner in pairs:
            places.append((item, key))
            look(inner)

    value = json.loads(json.dumps(value))
    look(value)
    if not places:
        return JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
    owner, key = places[int(rng.integers(len(places)))]
    what = rng.random()
    if what < 0.15:
        del owner[key]
    elif what < 0.25 and isinstance(owner, dict):
        owner[str(key) + "x"] = owner.pop(key)
    elif what < 0.35 and isinstance(owner[key], int | float) and not isinstance(owner[key], bool):
        owner[key] *= [-1, 2, 1000, 10**9][int(rng.integers(4))]
    else:
        owner[key] = JSON_VALUES[int(rng.integers(len(JSON_VALUES)))]
    return value


def noisy(data: bytes, rng: np.random.Generator) -> bytes:
    """One accident of `fuzz.mutations`, anywhere."""
    return ACCIDENTS[int(rng.integers(len(ACCIDENTS)))](data, rng)


# -- safetensors ------------------------------------------------------------------------------------------------


def broken_tensors(data: bytes, rng: np.random.Generator) -> bytes:
    """A safetensors file with another header, other tensors or other bytes."""
    size = int.from_bytes(data[:8], "little")
    what = rng.random()
    if what < 0.1:
        wrong = [0, 1, size - 1, size + 8, 2**31, 10**18, 2**63, 2**64 - 1, len(data)][int(rng.integers(9))]
        return int(wrong).to_bytes(8, "little") + data[8:]
    if what < 0.35:
        return noisy(data, rng)
    header = json.loads(data[8 : 8 + size])
    meta = header["__metadata__"]
    if what < 0.75:
        # The checksum is of the texts, and somebody who means harm makes a new one: leave it out.
        meta.pop("checksum", None)
        key = next(k for k in meta if k.startswith("gpurho"))
        meta[key] = json.dumps(changed(json.loads(meta[key]), rng))
    elif what < 0.9:
        header = changed(header, rng)
    body = data[8 + size :]
    if what >= 0.9:
        meta.pop("checksum", None)
        values = np.frombuffer(body, "<f4").copy()
        values[int(rng.integers(len(values)))] = [np.nan, np.inf, -1.0, 1e38, 0.0, 1e-45][int(rng.integers(6))]
        body = values.tobytes()
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + body


@cache
def model_bytes() -> tuple[bytes, ...]:
    """Whole model files."""
    import tempfile

    found = []
    for one in (model(), smooth_model()):
        with tempfile.TemporaryDirectory() as folder:
            one.save(Path(folder) / "m.safetensors")
            found.append((Path(folder) / "m.safetensors").read_bytes())
    return tuple(found)


def model_case(rng: np.random.Generator, folder: Path) -> str:
    """A model file; what loads has to predict finite numbers or say why not."""
    from gpurho.model import DensityModel
    from gpurho.pipelines.predict import predict

    path = folder / "m.safetensors"
    path.write_bytes(broken_tensors(model_bytes()[int(rng.integers(2))], rng))
    loaded = DensityModel.load(path)
    if rng.random() < 0.15 and loaded.spec.descriptor.n_features < 500:
        atoms = aluminium() if "Al" in loaded.spec.species else triclinic_structure()
        with predict(atoms, loaded, **settings(grid=(2, 2, 2))) as density:
            whole_density(density)
    return "accepted"


def checkpoint_case(rng: np.random.Generator, folder: Path) -> str:
    """A checkpoint of a training run."""
    import torch

    from gpurho.checkpoint import read_checkpoint, write_checkpoint

    path = folder / "c.safetensors"
    write_checkpoint(path, {"a": torch.arange(6.0).reshape(2, 3)}, {"identity": "me", "epoch": 3, "rows": [{"a": 1}]})
    path.write_bytes(broken_tensors(path.read_bytes(), rng))
    read_checkpoint(path, "me")
    return "accepted"


# -- HDF5 -------------------------------------------------------------------------------------------------------


def broken_h5(path: Path, rng: np.random.Generator) -> None:
    """Change an object or an attribute of an HDF5 file, as somebody with h5py would; or cut the file off."""
    import h5py

    if rng.random() < 0.12:
        data = path.read_bytes()
        path.write_bytes(data[: int(rng.integers(len(data)))])
        return
    with h5py.File(path, "r+") as h5:
        names: list[str] = []
        h5.visit(names.append)
        owners = [(h5, key) for key in h5.attrs] + [(h5[n], key) for n in names for key in h5[n].attrs]
        if rng.random() < 0.45 and owners:
            owner, key = owners[int(rng.integers(len(owners)))]
            odd: list[Any] = [
                *(
                    -1,
                    0,
                    2,
                    1.5,
                    np.nan,
                    np.inf,
                    2**62,
                    "x",
                    b"\xff",
                    np.zeros(3),
                    np.zeros((3, 3)),
                    np.full(3, np.nan),
                ),
                *(np.array([10**9] * 3), np.array([-1, 2, 2]), np.array([], float), "[]", "{}", '["coarse:2"]', "null"),
                *(np.array(["a", "b"], dtype="S1"), h5py.Empty("f4"), True, 1e300, np.array([1, 2]), 3 + 1j),
            ]
            if rng.random() < 0.2:
                del owner.attrs[key]
            else:
                owner.attrs[key] = odd[int(rng.integers(len(odd)))]
            return
        name = names[int(rng.integers(len(names)))]
        kind = h5[name]
        what = int(rng.integers(9))
        shape = kind.shape if isinstance(kind, h5py.Dataset) else (3,)
        del h5[name]
        if what == 1:
            h5.create_group(name)
        elif what == 2:
            h5.create_dataset(name, data=np.zeros(shape), dtype=["f8", "i8", "f2", "u1"][int(rng.integers(4))])
        elif what == 3:
            # Nothing is stored: a claim of petabytes costs the one who makes it some hundred bytes.
            h5.create_dataset(name, shape=(10**5,) * 3, dtype="f4", chunks=(16, 16, 16))
        elif what == 4:
            h5.create_dataset(name, shape=(10**15, *shape[1:2]), dtype="f8", chunks=(1, *shape[1:2]))
        elif what == 5:
            h5.create_dataset(name, data=np.full(shape, [np.nan, np.inf, -1.0, 1e300, 0.0][int(rng.integers(5))]))
        elif what == 6:
            h5.create_dataset(name, data=json.dumps(changed({"a": [1, 2]}, rng)))
        elif what == 7:
            h5[name] = [h5py.SoftLink("/nowhere"), h5py.SoftLink("/"), h5py.ExternalLink("/etc/hostname", "/x")][
                int(rng.integers(3))
            ]
        elif what == 8:
            h5.create_dataset(name, data=np.zeros([max(1, n - 1) for n in shape]))


@cache
def dataset_bytes() -> bytes:
    """A whole data set."""
    import tempfile

    from gpurho.datasets import Snapshot, write_dataset

    structure = triclinic_structure()
    from gpurho.grid import Grid

    grid = Grid((4, 4, 4), structure.cell)
    values = wave(grid, structure).astype(np.float32)
    electrons = float(values.sum(dtype=np.float64)) * grid.dv
    shots = [
        Snapshot(
            structure, values, electrons, {"temperature_K": 300.0, "kpts": [2, 2, 2]}, {"forces": np.zeros((3, 3))}
        )
    ] * 2
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(Path(folder) / "d.h5", shots)
        return (Path(folder) / "d.h5").read_bytes()


def dataset_case(rng: np.random.Generator, folder: Path) -> str:
    """A data set; every snapshot that opens is finite."""
    from gpurho.datasets import open_dataset

    path = folder / "d.h5"
    path.write_bytes(dataset_bytes())
    broken_h5(path, rng)
    data = open_dataset(path)
    data.fingerprint()
    for i, snapshot in enumerate(data):
        finite(snapshot.density)
        for array in snapshot.arrays.values():
            finite(array, "an array")
        data.meta(i)
        data.n_points(i)
    return "accepted"


@cache
def density_bytes() -> tuple[bytes, ...]:
    """Whole files of predictions."""
    import tempfile

    from gpurho.pipelines.predict import predict

    found = []
    for options in ({}, {"keep": ["field", "atoms", "coarse:2", "slice:z=0.5", "histogram"]}, {"uncertainty": None}):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "r.h5"
            predict(aluminium(), model(), out=path, **settings(grid=(4, 4, 4), **options)).close()
            found.append(path.read_bytes())
    return tuple(found)


def density_h5_case(rng: np.random.Generator, folder: Path) -> str:
    """A file of a prediction: opened, read, summed, verified."""
    from gpurho.densityfile import open_density, verify
    from gpurho.errors import SettingsError

    path = folder / "r.h5"
    path.write_bytes(density_bytes()[int(rng.integers(3))])
    broken_h5(path, rng)
    with open_density(path) as density:
        whole_density(density)
        finite([density.electrons], "electrons")
        finite(density.structure.positions, "positions")
        if rng.random() < 0.3:
            finite(density.per_atom().electrons, "electrons of atoms")
        if density.kept is not None:
            with suppress(SettingsError):
                whole_density(density.coarse)
    if rng.random() < 0.3:
        verify(path)
    return "accepted"


# -- scratch files and records ----------------------------------------------------------------------------------


def points_case(rng: np.random.Generator, folder: Path) -> str:
    """The scratch file of training points and its record."""
    from gpurho.pointstore import PointStore

    path = folder / "p.bin"
    store = PointStore(3, 10, path)
    store.append(np.ones((4, 3), np.float32), np.ones(4), np.ones(4, np.float32))
    store.finish()
    store.seal("key")
    record = path.with_name("p.bin.npz")
    what = rng.random()
    if what < 0.5:
        record.write_bytes(noisy(record.read_bytes(), rng))
    elif what < 0.7:
        path.write_bytes(noisy(path.read_bytes(), rng))
    else:
        values: dict[str, Any] = {"density": np.ones(4), "weights": np.ones(4), "counts": [4], "key": "key", "crc32": 0}
        name = list(values)[int(rng.integers(5))]
        odd = [np.array([object()]), [-4], [10**15], "x", np.zeros((2, 2)), np.nan, [2, 2], [4.5]]
        values[name] = odd[int(rng.integers(len(odd)))]
        np.savez(record, **values)
        if rng.random() < 0.3:
            with zipfile.ZipFile(record, "a") as archive:
                archive.writestr("../../evil.npy", b"x")
    found = PointStore.reopen(3, path, "key")
    if found is None:
        return "right"  # the points are drawn again
    for features, density, _ in found.blocks():
        finite(features, "features")
        finite(density)
    return "accepted"


def record_case(read: Callable[[Path], Any], value: Any, name: str) -> Callable[[np.random.Generator, Path], str]:
    """Cases of a record in JSON."""

    def case(rng: np.random.Generator, folder: Path) -> str:
        path = folder / name
        text = json.dumps(value).encode() if rng.random() < 0.4 else json.dumps(changed(value, rng)).encode()
        path.write_bytes(noisy(text, rng) if rng.random() < 0.6 else text)
        read(path)
        return "accepted"

    return case


def _select(path: Path) -> Any:
    from gpurho.pipelines.select import _read_record

    return _read_record(path)


def _paper(path: Path) -> Any:
    from gpurho.pipelines.paper_store import Results

    results = Results(path.parent)
    return [results.get(key) for key in results.entries]


def _journal(path: Path) -> Any:
    from gpurho.journal import read_journal

    return read_journal(path)


SELECT = {
    "format": "gpurho-selection",
    "format_version": 1,
    "candidates": {"a" * 20: {"series": "s", "sizes": {"n": 1}, "n_features": 3, "rmse": 0.1}},
}
PAPER = {
    "format": "gpurho-paper",
    "format_version": 1,
    "tables": {},
    "entries": {"k/a/1": {"values": {"x": 1}, "arrays": ["a"], "seconds": 0.1}},
}
KINDS = {
    "model": model_case,
    "checkpoint": checkpoint_case,
    "dataset": dataset_case,
    "density-h5": density_h5_case,
    "points": points_case,
    "record-select": record_case(_select, SELECT, "s.json"),
    "record-paper": record_case(_paper, PAPER, "results.json"),
    "journal": record_case(_journal, {"journal": 1, "settings": {}}, "r.journal"),
}
