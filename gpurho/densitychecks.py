"""Which file is damaged, and which tile of it: what to say when HDF5 cannot read a field."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import get
from gpurho.errors import StoreError
from gpurho.fields import NAMES, Correction, Totals
from gpurho.hdf5guard import DAMAGE, array_of
from gpurho.virtual import ShardedFields

LARGEST = 1e30
"""Largest scale or shift of a correction that is taken; sums of float32 must not overflow."""


def damage_error(path: Path, error: Exception) -> StoreError:
    """What to say of a file that h5py failed on."""
    reason = " ".join(str(error).split()).strip("'\"")
    return StoreError(f"{path} is damaged: {reason}; take an undamaged copy, or predict it again")


def values_of(h5: Any, shards: ShardedFields | None, name: str, key: Any) -> NDArray[Any]:
    """A part of an array, wherever it lies."""
    return shards.read(name, key) if shards is not None and name in NAMES else np.asarray(h5[name][key])


def checked_field(h5: Any, name: str, shape: Sequence[int], sized: bool) -> Any:
    """The data set of a field; `sized` also compares what it claims with what is stored.

    Raises
    ------
    OSError, KeyError, ValueError
        For another shape or type, or what `gpurho.hdf5guard` refuses.
    """
    stored = array_of(h5, name) if sized else h5[name]
    if stored.shape != tuple(shape) or stored.dtype.kind != "f":
        raise ValueError(f"{name} has shape {stored.shape} of {stored.dtype} on a grid of shape {tuple(shape)}")
    return stored


def finite_values(values: NDArray[Any]) -> NDArray[Any]:
    """The values, which the writer has seen to be finite; raises ValueError where they are not."""
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ValueError("it has values that are not finite")
    return values


def real_attribute(owner: Any, name: str) -> float:
    """An attribute that is a real number; raises KeyError, TypeError or ValueError for others."""
    value = owner.attrs[name]
    if np.iscomplexobj(value):
        raise TypeError(f"{name} is {value!r}, no real number")
    return float(value)


def check_sums(totals: Totals, correction: Correction) -> None:
    """Raise ValueError where the sums of a field are not finite, or its correction would overflow."""
    if not (totals.finite and abs(correction.scale) < LARGEST and abs(correction.shift) < LARGEST):
        raise ValueError("its sums are not finite")


def damaged_tile(h5: Any, shards: ShardedFields | None, name: str, key: Any) -> str:
    """Name of an array and, of a field, of its first tile in the box `key` that cannot be read."""
    if name not in NAMES:
        return name
    with suppress(*DAMAGE):
        for number, (start, stop) in enumerate(zip(get(h5, "tiles/start"), get(h5, "tiles/stop"), strict=True)):
            low = [max(int(a), s.start) for a, s in zip(start, key, strict=True)]
            high = [min(int(b), s.stop) for b, s in zip(stop, key, strict=True)]
            if all(a < b for a, b in zip(low, high, strict=True)):
                try:
                    values_of(h5, shards, name, tuple(slice(a, b) for a, b in zip(low, high, strict=True)))
                except (*DAMAGE, StoreError):
                    return f"{name} of tile {number} (points {tuple(start.tolist())} to {tuple(stop.tolist())})"
    return name
