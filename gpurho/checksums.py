"""What HDF5 does not check by itself: arrays without a filter get a CRC-32 beside them, and texts a place that counts.

The checksum is the attribute ``crc32`` of an array, where any reader finds it. Files of earlier versions of this
library have none and are read without. HDF5 itself checks its own tables in files of its format 1.10, which is what
this library writes, and compressed chunks by their Adler-32. Attributes are in those tables, but for texts of variable
length, as h5py writes them: these lie in a heap without checksums, in which one changed byte can make HDF5 search for
ever. So texts have a fixed length here.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from gpurho.hdf5guard import array_of

ATTRIBUTE = "crc32"
HDF5_FORMAT = ("v110", "v110")
"""Format of the files that are written, the first whose tables carry checksums; for ``libver`` of h5py."""


def put(group: Any, name: str, data: Any, **options: Any) -> Any:
    """Write an array, or text as ``numpy.bytes_``, with its checksum; `options` as of ``create_dataset``.

    The array is in the file when this returns. What HDF5 keeps to write later is lost on a full disk without an error:
    it fails when the object goes, where h5py can raise nothing.
    """
    dataset = group.create_dataset(name, data=data, track_times=False, **options)
    dataset.attrs[ATTRIBUTE] = np.uint32(_sum(data))
    dataset.flush()
    return dataset


def put_pieces(group: Any, name: str, shape: Sequence[int], dtype: Any, pieces: Iterable[Any]) -> Any:
    """Write an array as `put` does, from pieces of its rows in their order; the same bytes."""
    dataset = group.create_dataset(name, tuple(shape), dtype=dtype, track_times=False)
    done = crc = 0
    for piece in pieces:
        values = np.ascontiguousarray(piece, dtype=dtype)
        dataset[done : done + len(values)] = values
        crc = _sum(values, crc)
        done += len(values)
    if done != shape[0]:
        raise ValueError(f"{done} rows for an array of {shape[0]}")
    dataset.attrs[ATTRIBUTE] = np.uint32(crc)
    dataset.flush()
    return dataset


def get(group: Any, name: str) -> Any:
    """Read all of an array; raises `OSError`, as HDF5 does for damage, where it does not match its checksum.

    Also where it lies in another file or claims more than is stored (`gpurho.hdf5guard`).
    """
    dataset = array_of(group, name)
    values = dataset[()]
    if ATTRIBUTE in dataset.attrs:
        _compare(dataset, _sum(values))
    return values


def get_pieces(dataset: Any, rows: int) -> Iterator[Any]:
    """An array of `array_of` in pieces of its rows.

    Raises `OSError` after the last one where they do not match its checksum.
    """
    crc = 0
    for first in range(0, len(dataset), rows):
        values = dataset[first : first + rows]
        crc = _sum(values, crc)
        yield values
    if ATTRIBUTE in dataset.attrs:
        _compare(dataset, crc)


def _compare(dataset: Any, crc: int) -> None:
    wanted = dataset.attrs[ATTRIBUTE]
    if not (isinstance(wanted, np.integer) and int(wanted) == crc):
        raise OSError(f"{dataset.name} does not match its checksum")


def put_text(owner: Any, name: str, text: str) -> None:
    """Write an attribute that is text."""
    import h5py

    data = text.encode(errors="replace") or b"\0"
    owner.attrs.create(name, data, dtype=h5py.string_dtype("utf-8", len(data)))


def get_text(owner: Any, name: str, default: str | None = None) -> str:
    """Read an attribute that is text, of whatever length; raises `KeyError` where there is none and no default."""
    value = owner.attrs[name] if default is None else owner.attrs.get(name, default)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


@contextmanager
def unheard() -> Iterator[None]:
    """While a file is written or closed: h5py prints what HDF5 failed with when an object goes, beside raising it."""
    seen, unraisable = sys.excepthook, sys.unraisablehook

    def about_h5py(error: BaseException | None) -> bool:
        return "id ref count" in str(error)

    sys.excepthook = lambda kind, error, trace: None if about_h5py(error) else seen(kind, error, trace)
    sys.unraisablehook = lambda what: None if about_h5py(what.exc_value) else unraisable(what)
    try:
        yield
    finally:
        sys.excepthook, sys.unraisablehook = seen, unraisable


def let_go(error: BaseException, path: str | os.PathLike[str]) -> None:
    """Give up a file whose writing in h5py failed with `error`, in functions that have ended.

    HDF5 keeps its rest and tries again to write it when the last object of the file goes. So the file is emptied, which
    makes room, and its objects go here.
    """
    with suppress(OSError):
        os.truncate(path, 0)
    drop_objects(error)


def drop_objects(error: BaseException) -> None:
    """Let go, unheard, of the HDF5 objects in functions that ended with `error`."""
    with unheard():
        traceback.clear_frames(error.__traceback__)


def reason_of(error: BaseException) -> str:
    """Why h5py failed, in a few words of one line: what the system said, where it said something."""
    text = " ".join(str(error).split())
    found = re.search(r"error message = '([^']*)'", text)
    if found:
        return found.group(1)
    if isinstance(error, OSError) and error.strerror and error.errno:
        text = error.strerror
    return text.strip("'\"")[:200]


def _sum(values: Any, before: int = 0) -> int:
    if isinstance(values, bytes):
        return zlib.crc32(values, before)
    return zlib.crc32(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data, before)


__all__ = [
    "ATTRIBUTE",
    "HDF5_FORMAT",
    "drop_objects",
    "get",
    "get_pieces",
    "get_text",
    "let_go",
    "put",
    "put_pieces",
    "put_text",
    "reason_of",
    "unheard",
]
