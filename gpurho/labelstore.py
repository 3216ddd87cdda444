"""Finished labels on disk: each durable in a file of its own the moment it is done, gathered into one data set.

A labelling run that writes ``al32.h5`` keeps ``al32.h5.labels/`` beside it::

    lock              held while a run works here
    <key>.h5          a finished label: a data set of one snapshot
    <key>.failed.json a calculation that failed: its structure and the reason

The key is a hash of the structure, the settings and the engine, so a label is found again whatever the order of the
structures, and none is computed twice. `LabelStore.gather` writes the data set, whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Dataset, Snapshot, open_dataset, write_dataset
from gpurho.dft.base import DFTSettings, Label
from gpurho.errors import DatasetError, StoreError
from gpurho.structure import Structure
from gpurho.units import HARTREE

MANTISSA_BITS = 14
"""Bits that a density keeps: 3e-5 relative, under the L1 error that self-consistency leaves (5e-5 by default)."""


def label_key(structure: Structure, settings: DFTSettings, engine: str) -> str:
    """Name of a label: a hash of all that decides it."""
    at = settings.at(structure).to_dict()
    # The mesh itself is in, and the number of steps only decides whether the calculation ends.
    for name in ("k_reach", "k_density", "k_shift", "max_iterations"):
        del at[name]
    text = json.dumps([structure.fingerprint(), at, engine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def rounded(values: NDArray[np.floating], bits: int = MANTISSA_BITS) -> NDArray[np.float32]:
    """`values` as float32 with `bits` mantissa bits, rounded to nearest: zeros at the end compress to nothing."""
    if not 1 <= bits <= 23:
        raise ValueError(f"{bits} mantissa bits; float32 has 1 to 23")
    drop = 23 - bits
    raw = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    mask = np.uint32((0xFFFFFFFF >> drop) << drop)
    return ((raw + np.uint32((1 << drop) >> 1)) & mask).view(np.float32)


def as_snapshot(label: Label, meta: dict[str, Any], key: str, bits: int = MANTISSA_BITS) -> Snapshot:
    """A label as a snapshot of a data set."""
    e, s = label.energies, label.settings
    assert s.kmesh is not None
    attributes = {
        **meta,
        "engine": label.engine,
        "settings": json.dumps(s.to_dict(), sort_keys=True),
        "kpts": np.array(s.kmesh.size),
        "k_shift": np.array(s.kmesh.shift),
        "cutoff_ev": s.energy_cutoff(label.structure),
        "energy_free_hartree": e.free_energy / HARTREE,
        "energy_ev": e.energy,
        "free_energy_ev": e.free_energy,
        "xc_energy_ev": e.xc,
        "entropy_term_ev": e.entropy_term,
        "fermi_level_ev": e.fermi_level,
        "n_atoms": len(label.structure),
        "iterations": label.iterations,
        "seconds": round(label.seconds, 2),
        "structure_fingerprint": label.structure.fingerprint(),
        "label_key": key,
        "mantissa_bits": bits,
    }
    arrays: dict[str, NDArray[np.floating]] = {"eigenvalues": e.eigenvalues, "kpoints": e.kpoints, "weights": e.weights}
    if label.forces is not None:
        arrays["forces"] = label.forces
    return Snapshot(label.structure, rounded(label.density, bits), label.electrons, attributes, arrays)


class LabelStore:
    """The labels of one data set; a context manager that keeps other runs out.

    Parameters
    ----------
    out : path
        The data set.

    Raises
    ------
    StoreError
        Where another run works on the same data set, or the folder cannot be written.
    """

    def __init__(self, out: str | os.PathLike[str]) -> None:
        self.out = Path(out)
        self.folder = self.out.with_name(self.out.name + ".labels")
        self._lock: Any = None
        self._finished: dict[str, int] = {}

    def __enter__(self) -> LabelStore:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.folder / "lock", "w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise StoreError(
                f"{self.out} is being labelled by another run; wait for it or give another --out"
            ) from None
        except OSError as error:
            raise StoreError(f"{self.folder} cannot be written ({error.strerror}); nothing was computed") from None
        for leftover in self.folder.glob(".*.tmp"):
            leftover.unlink(missing_ok=True)
        if self.out.is_file():
            gathered = open_dataset(self.out)
            self._finished = {str(gathered.meta(i).get("label_key", "")): i for i in range(len(gathered))}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        (self.folder / "lock").unlink(missing_ok=True)
        self._lock.close()
        with contextlib.suppress(OSError):  # parts that are still needed keep the folder
            self.folder.rmdir()

    def done(self, key: str) -> bool:
        """Whether a label is finished."""
        return key in self._finished or self._part(key).is_file()

    def count(self, keys: list[str]) -> int:
        """How many of `keys` are finished."""
        return sum(self.done(key) for key in set(keys))

    def failure(self, key: str) -> str | None:
        """Why a calculation failed, where it did."""
        try:
            return str(json.loads(self._failed(key).read_text())["reason"])
        except (OSError, ValueError, KeyError):
            return None

    def save(self, key: str, snapshot: Snapshot) -> None:
        """Make a label durable."""
        try:
            write_dataset(self._part(key), [snapshot])
            _sync_folder(self.folder)
        except (DatasetError, OSError) as error:
            raise StoreError(f"label {key} cannot be kept: {error}") from None
        self._failed(key).unlink(missing_ok=True)

    def fail(self, key: str, reason: str, meta: dict[str, Any]) -> None:
        """Record why a calculation failed."""
        plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float)}
        temporary = self.folder / f".{key}.tmp"
        temporary.write_text(json.dumps({"reason": reason, **plain}, indent=1))
        os.replace(temporary, self._failed(key))

    def gather(self, keys: list[str]) -> Dataset | None:
        """Write the data set: what it held before, then the finished labels of `keys` in their order."""
        new = [key for key in dict.fromkeys(keys) if key not in self._finished and self._part(key).is_file()]
        if not new:
            return open_dataset(self.out) if self.out.is_file() else None
        data = write_dataset(self.out, self._snapshots(new))
        _sync_folder(self.out.absolute().parent)
        for key in new:
            self._finished[key] = len(self._finished)
        return data

    def clear(self) -> None:
        """Remove the parts that the data set holds."""
        for key in self._finished:
            if key:
                self._part(key).unlink(missing_ok=True)

    def _snapshots(self, new: list[str]) -> Iterator[Snapshot]:
        if self.out.is_file():
            yield from open_dataset(self.out)
        for key in new:
            try:
                yield open_dataset(self._part(key))[0]
            except DatasetError as error:
                raise StoreError(f"{error}; delete that file and run again: only its label is computed anew") from None

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}.h5"

    def _failed(self, key: str) -> Path:
        return self.folder / f"{key}.failed.json"


def _sync_folder(folder: Path) -> None:
    """A renamed file survives a power cut only when its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
