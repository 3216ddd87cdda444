"""Finished labels on disk: each durable in a file of its own the moment it is done, gathered into one data set.

A labelling run that writes ``al32.h5`` keeps ``al32.h5.labels/`` beside it::

    lock              held while a run works here
    <key>.h5          a finished label: a data set of one snapshot
    <key>.failed.json a calculation that failed: the reason, and what is known of its structure

The key is a hash of the structure, the settings and the engine, so a label is found again whatever the order of the
structures, and none is computed twice. `LabelStore.gather` writes the data set, whole or not at all.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.datasets import Snapshot, extend_dataset, open_dataset, write_dataset
from gpurho.dft.base import DFTSettings, Engine, Label, check_structure
from gpurho.errors import DatasetError, StoreError
from gpurho.structure import Structure
from gpurho.units import HARTREE

MANTISSA_BITS = 14
"""Bits that a density keeps: 3e-5 relative, under the L1 error that self-consistency leaves (5e-5 by default)."""


KEY_FIELDS = ("cutoff", "kmesh", "smearing_hartree", "xc", "grid", "tolerance", "forces")
"""Settings that decide a label, as they are for its structure; others only say how to get there."""


def label_key(structure: Structure, settings: DFTSettings, engine: str) -> str:
    """Name of a label: a hash of its structure, its settings, and what `engine` says decides its results."""
    at = settings.at(structure).to_dict()
    text = json.dumps([structure.fingerprint(), {name: at[name] for name in KEY_FIELDS}, engine], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


def engine_identity(engine: Engine, structure: Structure) -> str:
    """What of an engine decides its results for a structure, besides the settings.

    Raises
    ------
    StructureError, UnknownSpeciesError
        Where it cannot do the structure.
    """
    identity = getattr(engine, "identity", None)
    if identity is None:
        check_structure(structure)
        return engine.name
    return str(identity(structure))


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
    attributes: dict[str, Any] = {
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
    # What came with the structure under one of these names is kept under another.
    attributes |= {f"info_{k}" if k in attributes or k == "electrons" else k: v for k, v in meta.items()}
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
        self._lock: IO[str] | None = None
        self._finished: list[str] = []

    def __enter__(self) -> LabelStore:
        self._finished = self._keys()
        try:
            self._lock = self._take_lock()
            for leftover in (*self.folder.glob(".*.tmp"), *self.out.parent.glob(f".{self.out.name}.*.tmp")):
                leftover.unlink(missing_ok=True)
            self._finished = self._keys()
        except OSError as error:
            self._release()
            raise StoreError(f"{self.folder} cannot be written ({error.strerror}); nothing was computed") from None
        except StoreError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Still under the lock: who opened this file meanwhile will see that it is no longer the one in the folder.
        (self.folder / "lock").unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # parts that are still needed keep the folder
            self.folder.rmdir()
        self._release()

    def _take_lock(self) -> IO[str]:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = open(self.folder / "lock", "w")  # noqa: SIM115 (held until the store is left)
            except FileNotFoundError:
                continue  # another run has just removed the folder
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(file.fileno()).st_ino == (self.folder / "lock").stat().st_ino:
                    return file
            except BlockingIOError:
                file.close()
                raise StoreError(
                    f"{self.out} is being labelled by another run; wait for it or give another --out"
                ) from None
            except FileNotFoundError:
                pass
            file.close()

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _keys(self) -> list[str]:
        """Keys of the labels that the data set holds now, in its order; empty for snapshots of another origin."""
        if not os.path.lexists(self.out):
            return []
        try:
            data = open_dataset(self.out)
        except DatasetError as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{reason}; give another --out, or move that file away") from None
        if not data.appendable:
            raise StoreError(f"{self.out} is a data set of the older layout, which cannot grow; give another --out")
        return [str(data.meta(i).get("label_key", "")) for i in range(len(data))]

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
            sync_folder(self.folder)
        except (DatasetError, OSError) as error:
            raise StoreError(f"label {key} cannot be kept: {error}") from None
        self._failed(key).unlink(missing_ok=True)

    def fail(self, key: str, reason: str, meta: dict[str, Any]) -> None:
        """Record why a calculation failed."""
        plain = {k: v for k, v in meta.items() if isinstance(v, str | int | float)}
        temporary = self.folder / f".{key}.tmp"
        try:
            temporary.write_text(json.dumps({"reason": reason, **plain}, indent=1))
            os.replace(temporary, self._failed(key))
        except OSError as error:
            raise StoreError(f"{temporary} cannot be written ({error.strerror})") from None

    def gather(self, keys: list[str]) -> None:
        """Bring the data set up to date, whole or not at all: what it held, and the finished labels of `keys` in order.

        Raises
        ------
        StoreError
            Where it cannot be written, or a part is damaged; finished labels are safe.
        """
        self._finished = self._keys()
        held = set(self._finished)
        new = [key for key in dict.fromkeys(keys) if key not in held and self._part(key).is_file()]
        if not new:
            return
        for key in new:
            try:
                open_dataset(self._part(key))[0]
            except DatasetError as error:
                raise StoreError(f"{error}; delete that file and run again: only its label is computed anew") from None
        place = {key: i for i, key in enumerate(dict.fromkeys(keys))}
        # Snapshots of other runs stay first and in their order, whenever this one was stopped and went on.
        order = sorted([*self._finished, *new], key=lambda key: place.get(key, -1))
        try:
            extend_dataset(self.out, [self._part(key) for key in new], _ranks([*self._finished, *new], order))
            sync_folder(self.out.absolute().parent)
        except (DatasetError, OSError) as error:
            reason = " ".join(str(error).split())
            raise StoreError(f"{reason}; the labels are safe in {self.folder}: make room and run again") from None
        self._finished = order

    def clear(self) -> None:
        """Remove the parts that the data set, as it is on disk, holds."""
        for key in self._keys():
            if key:
                self._part(key).unlink(missing_ok=True)

    def _part(self, key: str) -> Path:
        return self.folder / f"{key}.h5"

    def _failed(self, key: str) -> Path:
        return self.folder / f"{key}.failed.json"


def _ranks(items: list[str], order: list[str]) -> list[int]:
    """Where each item stands in `order`; items without a name keep their order."""
    free: dict[str, list[int]] = {}
    for i, name in enumerate(order):
        free.setdefault(name, []).append(i)
    return [free[name].pop(0) for name in items]


def sync_folder(folder: Path) -> None:
    """A renamed file survives a power cut only when its folder is on disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
