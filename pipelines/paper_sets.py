"""Which data sets stand for which of the paper's tests, and which of their snapshots a model has never seen."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.datasets import Dataset, Snapshot, open_dataset
from gpurho.errors import DatasetError

if TYPE_CHECKING:
    from gpurho.model import DensityModel

NAMES = {"al": "Al", "sige": "SiGe"}
"""The two materials, and how figures call them."""


@dataclass(frozen=True)
class TestSet:
    """A data set of labels and the row of the paper's table that it stands beside.

    `row` is None for the scans of lattice parameters, which have a table of their own; `repeat` is their number of
    cubic cells along each edge.
    """

    __test__ = False  # no test, whatever pytest thinks of the name

    name: str
    material: str
    row: str | None
    label: str
    repeat: int = 0


SETS = (
    TestSet("al32", "al", "32", "32 atoms"),
    TestSet("al108", "al", "108", "108 atoms"),
    TestSet("al256", "al", "256", "256 atoms"),
    TestSet("al_vacancies", "al", "vacancies", "vacancies, 106 and 107 atoms"),
    TestSet("al_strained", "al", "strain", "strained by 5 %, 32 atoms"),
    TestSet("sige64", "sige", "64", "64 atoms"),
    TestSet("sige216", "sige", "216", "216 atoms"),
    TestSet("sige_vacancies", "sige", "vacancies", "vacancies, 63 atoms"),
    TestSet("sige64_compositions", "sige", "compositions", "40, 45, 55, 60 % Si, 64 atoms"),
    TestSet("al_lattice", "al", None, "2 x 2 x 2", 2),
    TestSet("al_lattice108", "al", None, "3 x 3 x 3", 3),
)

PAPER_ROWS = {
    "al": {
        "all": "entire test set",
        "32": "32 atoms",
        "108": "108 atoms",
        "256": "256 atoms",
        "500": "500 atoms",
        "vacancies": "vacancies, 108 and 256 atoms",
        "strain": "strained",
    },
    "sige": {
        "all": "entire test set",
        "64": "64 atoms",
        "216": "216 atoms",
        "512": "512 atoms",
        "vacancies": "vacancies, 216 and 512 atoms",
        "compositions": "x not 0.5",
    },
}
"""Rows of the paper's Tables IV and V."""


@dataclass(frozen=True, eq=False)
class TestData:
    """The snapshots of a set that a model may be tested on.

    Attributes
    ----------
    set : TestSet
    dataset : Dataset or None
        None where there are no labels yet.
    indices : tuple of int
        Snapshots that the model has not seen.
    seen : int
        Snapshots left out because the model was trained or stopped on them.
    """

    __test__ = False

    set: TestSet
    dataset: Dataset | None
    indices: tuple[int, ...] = ()
    seen: int = 0

    def spread(self, most: int | None) -> tuple[int, ...]:
        """At most so many of `indices`, spread evenly over them in order of temperature."""
        if self.dataset is None or most is None or most >= len(self.indices):
            return self.indices
        data = self.dataset
        warm = sorted(self.indices, key=lambda i: (float(data.meta(i).get("temperature_K", 0.0)), i))
        return tuple(sorted(warm[int((k + 0.5) * len(warm) / most)] for k in range(most)))


@dataclass(frozen=True)
class SeenData:
    """What a model was trained and stopped on.

    Attributes
    ----------
    structures : set of str
        Fingerprints of the structures, wherever they were found.
    found : list of str
        Data sets of the record that are in the folder.
    missing : list of str
        Those that are not.
    gaps : list of str
        What the record leaves open, in words.
    """

    structures: set[str] = field(default_factory=set)
    found: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)


def paper_numbers() -> dict[str, Any]:
    """The paper's figures and this project's targets, as they lie in the package."""
    numbers: dict[str, Any] = json.loads(files("gpurho.data").joinpath("paper.json").read_text())
    return numbers


def seen_data(model: DensityModel, folder: Path) -> SeenData:
    """Which structures in the data sets of a folder a model was trained or stopped on, by its own record.

    A file that holds the recorded labels is matched by its fingerprint. One of the same name that has changed since is
    matched by temperature, trajectory and index, and every snapshot that agrees counts as seen. Labels of the same
    atoms in other files count as seen, too.
    """
    seen = SeenData()
    for record in _records(model.spec.training):
        name = Path(str(record.get("file", "?"))).name
        entries = [e for use in ("train", "validation") for e in record.get("split", {}).get(use, [])]
        data = _opened(folder / name)
        if data is None:
            seen.missing.append(name)
        elif data.fingerprint() == record.get("fingerprint"):
            seen.structures.update(data[int(e["snapshot"])].structure.fingerprint() for e in entries)
            seen.found.append(name)
        else:
            keys = {_place(e) for e in entries}
            hits = [i for i in range(len(data)) if _place(data.meta(i)) in keys]
            seen.structures.update(data[i].structure.fingerprint() for i in hits)
            seen.found.append(name)
            seen.gaps.append(f"{name} has changed since; snapshots matched by temperature, trajectory and index")
    start = model.spec.training.get("start")
    if isinstance(start, dict) and not any(True for _ in _records(start)):
        seen.gaps.append(f"it went on from {start.get('file', 'a model')}, whose own data the record does not name")
    return seen


def find_tests(model: DensityModel | None, material: str, folder: Path) -> tuple[list[TestData], SeenData]:
    """Every set of a material with the snapshots that a model has not seen; all of them for no model."""
    seen = SeenData() if model is None else seen_data(model, folder)
    tests = []
    for one in SETS:
        if one.material != material:
            continue
        data = _opened(folder / f"{one.name}.h5")
        if data is None:
            tests.append(TestData(one, None))
            continue
        new = tuple(i for i in range(len(data)) if data[i].structure.fingerprint() not in seen.structures)
        tests.append(TestData(one, data, new, len(data) - len(new)))
    return tests, seen


def snapshot_fingerprint(snapshot: Snapshot) -> str:
    """SHA-256 of a structure and its density."""
    digest = hashlib.sha256(snapshot.structure.fingerprint().encode())
    digest.update(str(snapshot.density.shape).encode())
    digest.update(np.ascontiguousarray(snapshot.density, np.float32).tobytes())
    return digest.hexdigest()


def label_seconds(model: DensityModel, folder: Path) -> float | None:
    """Seconds of DFT behind the snapshots a model was trained and stopped on; None where they are not recorded."""
    total = 0.0
    records = list(_records(model.spec.training))
    for record in records:
        data = _opened(folder / Path(str(record.get("file", "?"))).name)
        if data is None or data.fingerprint() != record.get("fingerprint"):
            return None
        for use in ("train", "validation"):
            for entry in record.get("split", {}).get(use, []):
                seconds = data.meta(int(entry["snapshot"])).get("seconds")
                if seconds is None:
                    return None
                total += float(seconds)
    return total if records else None


def _opened(path: Path) -> Dataset | None:
    """A data set; None where the file is missing or holds no snapshot yet."""
    if not path.is_file():
        return None
    try:
        return open_dataset(path)
    except DatasetError as error:
        if "has no snapshots" in str(error):
            return None
        raise


def _place(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(values.get(name) for name in ("temperature_K", "trajectory", "index"))


def _records(training: Any) -> Iterator[dict[str, Any]]:
    """Every data set with a split in a training record, those of the models it went on from included."""
    if isinstance(training, list):
        for entry in training:
            yield from _records(entry)
    elif isinstance(training, dict):
        if "split" in training and "file" in training:
            yield training
        elif "datasets" in training:
            yield from _records(training["datasets"])
            yield from _records({k: v for k, v in training.items() if k not in ("datasets", "dataset", "split")})
        else:
            # The record of a model trained before there could be several data sets.
            if "split" in training and isinstance(training.get("dataset"), dict):
                yield {**training["dataset"], "split": training["split"]}
            for name, entry in training.items():
                if name not in ("dataset", "split"):
                    yield from _records(entry)


__all__ = [
    "NAMES",
    "PAPER_ROWS",
    "SETS",
    "SeenData",
    "TestData",
    "TestSet",
    "find_tests",
    "label_seconds",
    "paper_numbers",
    "seen_data",
    "snapshot_fingerprint",
]
