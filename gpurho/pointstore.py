"""The points of a training run, in memory or in a scratch file, read block by block or shard by shard.

A block holds the points of one snapshot in random order. A shard takes the same part of every block, so that it is
itself a random sample of all snapshots: shuffling the shards, and the points within each, stands for shuffling all.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import DAMAGED_ARCHIVE, DatasetError, SettingsError

Block = tuple[NDArray[np.float32], NDArray[np.float64], NDArray[np.float32]]
"""Features (n, F), densities (n,) in e/angstrom^3, weights (n,)."""

READ_BYTES = 1 << 24

FORMAT_VERSION = 1
BYTES_BESIDE = 12
"""Bytes of density and weight of a point, which stay in memory."""


class PointStore:
    """Points with their features, densities and weights.

    Parameters
    ----------
    n_features : int
    capacity : int
        Largest number of points; memory is taken for so many when the features stay there.
    path : path, optional
        Scratch file for the features, replaced where it exists; in memory without it.
    """

    def __init__(self, n_features: int, capacity: int, path: str | os.PathLike[str] | None = None) -> None:
        self.n_features, self.path = n_features, None if path is None else Path(path)
        self.counts: list[int] = []
        self.density: NDArray[np.float64] = np.empty(0)
        self.weights: NDArray[np.float32] = np.empty(0, np.float32)
        self._parts: list[tuple[NDArray[np.float64], NDArray[np.float32]]] = []
        self._crc = 0
        self._memory: NDArray[np.float32] | None = None
        if self.path is None:
            self._memory = np.empty((capacity, n_features), np.float32)
        else:
            self._write(b"", "wb")

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def starts(self) -> list[int]:
        """First row of every block, and the number of rows."""
        return [0, *np.cumsum(self.counts, dtype=np.int64).tolist()]

    # --- filling -----------------------------------------------------------------------------------------------

    def append(self, features: NDArray[np.float32], density: NDArray[np.float64], weights: NDArray[np.float32]) -> None:
        """Add a block."""
        start = len(self)
        if self._memory is None:
            data = np.ascontiguousarray(features, np.float32).tobytes()
            self._write(data, "ab")
            self._crc = zlib.crc32(data, self._crc)
        else:
            self._memory[start : start + len(features)] = features
        self.counts.append(len(features))
        self._parts.append((np.asarray(density, np.float64), np.asarray(weights, np.float32)))

    def finish(self) -> None:
        """End the filling."""
        self.density = np.concatenate([p[0] for p in self._parts]) if self._parts else np.empty(0)
        self.weights = np.concatenate([p[1] for p in self._parts]) if self._parts else np.empty(0, np.float32)
        self._parts = []

    def compact(self, keep: NDArray[np.bool_], weights: NDArray[np.float32]) -> None:
        """Keep some points alone, with new weights (of all points, as many as `keep` has entries)."""
        starts, at = self.starts, 0
        counts: list[int] = []
        self._crc = 0
        for i in range(len(self.counts)):
            rows = keep[starts[i] : starts[i + 1]]
            kept = self.rows(starts[i], starts[i + 1])[rows]
            # What is written ends before what is still to be read begins.
            if self._memory is None:
                self._write(kept.tobytes(), "r+b", at * self.n_features * 4)
                self._crc = zlib.crc32(kept.tobytes(), self._crc)
            else:
                self._memory[at : at + len(kept)] = kept
            at += len(kept)
            counts.append(len(kept))
        if self.path is None:
            self._memory = None if self._memory is None else self._memory[:at]
        else:
            os.truncate(self.path, at * self.n_features * 4)
        self.counts, self.density, self.weights = counts, self.density[keep], weights[keep]

    # --- reading -----------------------------------------------------------------------------------------------

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Features of a range of rows; a view where they are in memory."""
        if self._memory is not None:
            return self._memory[start:stop]
        n = (stop - start) * self.n_features
        try:
            found = np.fromfile(str(self.path), np.float32, n, offset=start * self.n_features * 4)
        except OSError as error:
            raise DatasetError(f"{self.path}: scratch file cannot be read ({error}); train again") from None
        if len(found) != n:
            raise DatasetError(f"{self.path}: scratch file is cut off at row {start}; remove it and train again")
        return found.reshape(-1, self.n_features)

    def blocks(self) -> Iterator[Block]:
        """The blocks in the order in which they came."""
        starts = self.starts
        for a, b in pairwise(starts):
            yield self.rows(a, b), self.density[a:b], self.weights[a:b]

    def chunks(self, size: int) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """First row and features of ranges of at most `size` rows."""
        for a in range(0, len(self), size):
            yield a, self.rows(a, min(a + size, len(self)))

    def shard_ranges(self, n_shards: int, shard: int) -> list[tuple[int, int]]:
        """Row ranges of a shard, one per block."""
        starts = self.starts
        return [(a + (b - a) * shard // n_shards, a + (b - a) * (shard + 1) // n_shards) for a, b in pairwise(starts)]

    def shard(self, n_shards: int, shard: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Features of a shard, and the row of each of its points; without a copy where there is one shard."""
        if n_shards == 1 and self._memory is not None:
            return self._memory[: len(self)], np.arange(len(self))
        ranges = self.shard_ranges(n_shards, shard)
        features = np.empty((sum(b - a for a, b in ranges), self.n_features), np.float32)
        at = 0
        for a, b in ranges:
            features[at : at + b - a] = self.rows(a, b)
            at += b - a
        return features, np.concatenate([np.arange(a, b) for a, b in ranges])

    # --- scratch file ------------------------------------------------------------------------------------------

    @property
    def _record(self) -> Path:
        if self.path is None:
            raise SettingsError("points in memory have no scratch file")
        return self.path.with_name(self.path.name + ".npz")

    def seal(self, key: str) -> None:
        """Write beside the scratch file what `reopen` needs; `key` says what it holds. Nothing in memory."""
        if self.path is None:
            return
        temporary = self._record.with_name(self._record.name + ".tmp.npz")
        facts: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "counts": self.counts,
            "key": key,
            "crc32": np.uint32(self._crc),
        }
        try:
            np.savez(temporary, density=self.density, weights=self.weights, **facts)
            os.replace(temporary, self._record)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise DatasetError(
                f"{self._record}: record of the scratch file cannot be written ({error.strerror or error}); free disk"
                " space and run again"
            ) from None

    @classmethod
    def reopen(cls, n_features: int, path: str | os.PathLike[str], key: str) -> PointStore | None:
        """The store in a scratch file that was sealed with the same key; None where there is none, or it is damaged."""
        store = object.__new__(cls)
        store.n_features, store.path, store._memory, store._parts = n_features, Path(path), None, []
        try:
            with open(store._record, "rb") as file, np.load(file, allow_pickle=False) as record:
                if str(record["key"]) != key:
                    return None
                # Of another version: drawn again, as of another key.
                if "format_version" in record and int(record["format_version"]) > FORMAT_VERSION:
                    return None
                counts, n = np.atleast_1d(record["counts"]), os.path.getsize(path) // (4 * n_features)
                store.density, store.weights = record["density"], record["weights"]
                if counts.dtype.kind not in "iu" or counts.min(initial=0) < 0 or counts.sum() != n:
                    return None
                if store.density.shape != (n,) or store.weights.shape != (n,):
                    return None
                store.counts, store._crc = counts.tolist(), int(record["crc32"])
            complete = os.path.getsize(path) == len(store) * n_features * 4 and store._crc_on_disk() == store._crc
        except DAMAGED_ARCHIVE:
            return None
        return store if complete else None

    def _crc_on_disk(self) -> int:
        found = 0
        with open(str(self.path), "rb") as file:
            while data := file.read(READ_BYTES):
                found = zlib.crc32(data, found)
        return found

    def remove(self) -> None:
        """Remove the scratch file, where there is one."""
        if self.path is not None:
            remove_scratch(self.path)

    def _write(self, data: bytes, mode: str, offset: int = 0) -> None:
        try:
            with open(str(self.path), mode) as file:
                if offset:
                    file.seek(offset)
                file.write(data)
        except OSError as error:
            raise DatasetError(
                f"{self.path}: scratch file of features cannot be written ({error}); free disk space, or draw fewer"
                " points_per_snapshot"
            ) from None


def remove_scratch(path: Path) -> None:
    """Remove a scratch file and its record, where they exist."""
    path.unlink(missing_ok=True)
    path.with_name(path.name + ".npz").unlink(missing_ok=True)
    path.with_name(path.name + ".npz.tmp.npz").unlink(missing_ok=True)


def shard_order(n_shards: int, seed: Sequence[int]) -> list[int]:
    """The shards in random order."""
    return [int(k) for k in np.random.default_rng(list(seed)).permutation(n_shards)]


def store_key(**values: Any) -> str:
    """A fingerprint of what decides the contents of a store."""
    import hashlib

    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


__all__ = ["Block", "PointStore", "remove_scratch", "shard_order", "store_key"]
