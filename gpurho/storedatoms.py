"""The atoms of a file of a density: written in pieces, and read when they are asked for where they are very many."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from gpurho.checksums import get, put_pieces
from gpurho.densitychecks import damage_error
from gpurho.errors import SettingsError
from gpurho.hdf5guard import DAMAGE, array_of
from gpurho.sources import StructureSource
from gpurho.structure import Structure

MANY = 1_000_000
"""Atoms from which on they stay in the file until they are asked for."""


class StoredAtoms(Protocol):
    """Atoms that are in memory, or can be brought there."""

    def __len__(self) -> int: ...
    def structure(self) -> Structure: ...


def put_atoms(h5: Any, atoms: Structure | StructureSource) -> None:
    """Write the group ``structure`` of a file."""
    group, n = h5.create_group("structure"), len(atoms)
    put_pieces(group, "positions", (n, 3), np.float64, (positions for positions, _ in atoms.pieces()))
    put_pieces(group, "numbers", (n,), np.int64, (numbers for _, numbers in atoms.pieces()))
    group.attrs["cell"] = atoms.cell
    group.attrs["pbc"] = atoms.pbc


def atoms_of(h5: Any) -> StoredAtoms:
    """Those that `put_atoms` wrote; raises what h5py and NumPy do for damage (`gpurho.hdf5guard.DAMAGE`)."""
    stored = _InFile(h5["structure"])
    return stored if len(stored) > MANY else stored.read()


class _InFile:
    def __init__(self, group: Any) -> None:
        self._group = group
        self._n = len(array_of(group, "numbers"))

    def __len__(self) -> int:
        return self._n

    def read(self) -> Structure:
        """The atoms, now."""
        group = self._group
        return Structure(get(group, "positions"), get(group, "numbers"), group.attrs["cell"], group.attrs["pbc"])

    def structure(self) -> Structure:
        """The atoms; raises `StoreError` where they are damaged, `SettingsError` when the file was closed."""
        if not self._group:
            raise SettingsError("the density's file was closed; open it again with Density.open")
        try:
            return self.read()
        except DAMAGE as error:
            raise damage_error(Path(self._group.file.filename), error) from None
