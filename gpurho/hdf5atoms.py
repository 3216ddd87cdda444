"""Atoms of an HDF5 file in pieces, checked as those of a file that anybody may have made."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from gpurho.checksums import get_pieces
from gpurho.dumpfile import CHUNK, Chunk, Header
from gpurho.hdf5guard import array_of, own


def hdf5_chunks(h5: Any, group: str) -> tuple[Header, Iterator[Chunk]]:
    """The cell of the atoms in a group of an open file, and the atoms.

    Raises what h5py and NumPy do for damage (`gpurho.hdf5guard.DAMAGE`); `OSError` for arrays of other shapes or kinds,
    and after the last piece for one that does not match its checksum.
    """
    atoms = own(h5, group)
    positions, numbers = array_of(atoms, "positions"), array_of(atoms, "numbers")
    n = len(numbers)
    if (positions.shape, numbers.shape) != ((n, 3), (n,)):
        raise OSError(f"positions have shape {positions.shape} and numbers {numbers.shape}")
    if positions.dtype.kind not in "iuf" or numbers.dtype.kind not in "iu":
        raise OSError(f"positions are {positions.dtype} and numbers {numbers.dtype}")
    pbc = np.asarray(atoms.attrs["pbc"], dtype=bool)
    pairs = zip(get_pieces(positions, CHUNK), get_pieces(numbers, CHUNK), strict=True)
    chunks = (
        (places.astype(np.float64), kinds.astype(np.int64), i * CHUNK + np.arange(len(kinds)))
        for i, (places, kinds) in enumerate(pairs)
    )
    return Header(n, np.asarray(atoms.attrs["cell"], dtype=float), np.zeros(3), pbc), chunks


__all__ = ["hdf5_chunks"]
