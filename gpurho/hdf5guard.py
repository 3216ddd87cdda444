"""Reading HDF5 files of strangers: nothing of another file, and no memory for what is not stored.

A file of a few hundred bytes can claim an array of petabytes, since HDF5 stores no chunk that was not written, and can
name any file of the reader's by external links, external storage and virtual data sets.
"""

from __future__ import annotations

import math
from typing import Any

MAX_DEFLATE = 1032
"""Largest ratio of bytes that zlib's deflate unpacks to."""

DAMAGE = (OSError, KeyError, RuntimeError, ValueError, TypeError, AttributeError, IndexError, ArithmeticError)
"""What h5py and NumPy raise for files that are damaged, or made to be."""

FREE_BYTES = 1 << 24
"""Bytes of an array that need not be stored: HDF5 leaves out what equals the fill value."""


def own(group: Any, name: str) -> Any:
    """The object `name` of a group, which lies in the same file.

    Raises
    ------
    KeyError
        Where there is none.
    OSError
        For a link, and for an array of which a part lies in another file.
    """
    import h5py

    owner = group
    for part in name.strip("/").split("/"):
        if not isinstance(owner, h5py.Group):
            raise KeyError(f"{owner.name} is no group, so {name!r} is not in it")
        link = owner.get(part, getlink=True)
        if link is None:
            raise KeyError(f"object {name!r} does not exist")
        if not isinstance(link, h5py.HardLink):
            where = f" to the file {link.filename!r}" if isinstance(link, h5py.ExternalLink) else ""
            raise OSError(f"{part} is a link{where}; links are not followed")
        owner = owner[part]
    if isinstance(owner, h5py.Dataset) and (owner.external or owner.is_virtual):
        raise OSError(f"{name} lies in another file; it is not read")
    return owner


def array_of(group: Any, name: str) -> Any:
    """The data set `name` of a group, in the same file and not larger than what is stored can unpack to.

    Raises
    ------
    KeyError, OSError
        As `own`; also for a group, for compound and variable-length values, and for a size that is not stored.
    """
    import h5py

    dataset = own(group, name)
    if not isinstance(dataset, h5py.Dataset) or dataset.shape is None:
        raise OSError(f"{name} is no array")
    if dataset.dtype.kind not in "biufS":
        raise OSError(f"{name} holds values of type {dataset.dtype}, not numbers or text")
    stored, claimed = dataset.id.get_storage_size(), math.prod(dataset.shape) * dataset.dtype.itemsize
    if claimed > FREE_BYTES + MAX_DEFLATE * stored:
        raise OSError(f"{name} claims {claimed:.3g} bytes, and {stored} are stored")
    return dataset


__all__ = ["DAMAGE", "array_of", "own"]
