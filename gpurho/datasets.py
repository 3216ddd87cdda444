"""Data sets of densities to train on and to test against, in HDF5.

Layout of version 1 (``format = "gpurho-dataset"``, ``format_version = 1`` on the root)::

    /snapshots/000000            one group per snapshot, numbered from 0 without gaps
        positions  (n, 3) f8     angstrom                      (attribute ``unit``)
        cell       (3, 3) f8     angstrom, vectors as rows
        numbers    (n,)   i8     atomic numbers
        pbc        (3,)   bool
        density    (nx, ny, nz) f4 or f8   e/angstrom^3 at fractional coordinates (i/nx, j/ny, k/nz)
        forces     (n, 3) f8     eV/angstrom                   (this and the next three where known)
        eigenvalues (nk, nb) f8  eV, in the engine's own zero of potential
        kpoints    (nk, 3) f8    reciprocal vectors
        weights    (nk,)  f8     sum to 1
        attributes: electrons; and, where known, temperature_K, kpts (3 ints), engine, family,
        trajectory, index, energy_free_hartree, or any other plain value

Each array has its CRC-32 in the attribute ``crc32`` (files of earlier versions of this library have none).

Files of the older kind are read too: groups ``snapshot_NNN`` on the root, density in e/Bohr^3, periodic cells.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import HDF5_FORMAT, get, let_go, put, put_text, reason_of, unheard
from gpurho.errors import DatasetError, GridError, StructureError
from gpurho.grid import Grid
from gpurho.hdf5guard import DAMAGE, own
from gpurho.structure import Structure
from gpurho.units import PER_BOHR3
from gpurho.versions import check_version

FORMAT = "gpurho-dataset"
FORMAT_VERSION = 1
ELECTRONS_TOLERANCE = 1e-3
"""Largest relative difference between the integral of a density and its number of electrons."""

_UNITS = {
    "positions": "angstrom",
    "cell": "angstrom",
    "density": "e/angstrom^3",
    "forces": "eV/angstrom",
    "eigenvalues": "eV",
}
EXTRAS = ("forces", "eigenvalues", "kpoints", "weights")
"""Arrays that a snapshot may have besides its density."""
MAX_POINTS = 2**33

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One structure with its reference density.

    Parameters
    ----------
    structure : Structure
    density : (nx, ny, nz) array, e/angstrom^3
        Values at the points of `grid`.
    electrons : float
    meta : dict
        Attributes of the snapshot: temperature_K, kpts, trajectory, index, ...
    arrays : dict
        Any of forces (n, 3), eV/angstrom; eigenvalues (nk, nb), eV; kpoints (nk, 3); weights (nk,).
    """

    structure: Structure
    density: NDArray[np.floating]
    electrons: float
    meta: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, NDArray[np.floating]] = field(default_factory=dict)

    @property
    def grid(self) -> Grid:
        """The points of the density."""
        return Grid(self.density.shape, self.structure.cell, pbc=[bool(p) for p in self.structure.pbc])

    def check(self, where: str = "snapshot") -> None:
        """Raise `DatasetError` unless the density is a finite field that integrates to `electrons`."""
        if self.density.ndim != 3 or self.density.size == 0:
            raise DatasetError(f"{where}: density has shape {self.density.shape}; three axes are expected")
        if not np.isfinite(self.density).all():
            raise DatasetError(
                f"{where}: density has {int((~np.isfinite(self.density)).sum())} values that are not finite"
            )
        bad = [
            name for name, array in self.arrays.items() if array.dtype.kind not in "iuf" or not np.isfinite(array).all()
        ]
        if bad:
            raise DatasetError(f"{where}: {bad[0]} has values that are not finite numbers")
        if not (np.isfinite(self.electrons) and self.electrons > 0):
            raise DatasetError(f"{where}: electrons is {self.electrons!r}; a positive number is expected")
        integral = float(self.density.sum(dtype=np.float64)) * self.grid.dv
        if abs(integral / self.electrons - 1) > ELECTRONS_TOLERANCE:
            raise DatasetError(
                f"{where}: density integrates to {integral:.5g} electrons, not the {self.electrons:.5g} it names;"
                " check its unit"
            )


class Dataset(Sequence[Snapshot]):
    """A data set on disk; snapshots are read when they are asked for, and checked then. Made by `open_dataset`."""

    def __init__(self, path: Path, groups: list[str], scale: float) -> None:
        self.path, self._groups, self._scale = path, groups, scale

    @property
    def appendable(self) -> bool:
        """Whether the file has the current layout, which `extend_dataset` can extend."""
        return self._groups[0].startswith("snapshots/")

    def __len__(self) -> int:
        return len(self._groups)

    @overload
    def __getitem__(self, index: int) -> Snapshot: ...
    @overload
    def __getitem__(self, index: slice) -> list[Snapshot]: ...
    def __getitem__(self, index: int | slice) -> Snapshot | list[Snapshot]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if not -len(self) <= i < len(self):
            raise IndexError(f"snapshot {index} of {len(self)}")
        import h5py

        name = self._groups[i]
        where = f"{self.path}: {name}"
        try:
            with h5py.File(self.path, "r") as file:
                return self._read(own(file, name), where)
        except DatasetError:
            raise
        except DAMAGE as error:
            raise DatasetError(f"{where}: cannot be read ({reason_of(error)})") from None

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[i] for i in range(len(self)))

    def meta(self, index: int) -> dict[str, Any]:
        """Attributes of a snapshot, without reading its density."""
        return self._look(index, _attributes)

    def n_points(self, index: int) -> int:
        """Grid points of a snapshot, without reading its density."""
        return self._look(index, lambda group: int(group["density"].size))

    def _look(self, index: int, what: Callable[[Any], _T]) -> _T:
        import h5py

        try:
            with h5py.File(self.path, "r") as file:
                return what(own(file, self._groups[index]))
        except DAMAGE as error:
            raise DatasetError(f"{self.path}: {self._groups[index]}: cannot be read ({reason_of(error)})") from None

    def fingerprint(self) -> str:
        """SHA-256 of every structure and density in their order: the same for the same data in any layout."""
        digest = hashlib.sha256(b"gpurho dataset 1")
        for snapshot in self:
            digest.update(snapshot.structure.fingerprint().encode())
            digest.update(str(snapshot.density.shape).encode())
            digest.update(np.ascontiguousarray(snapshot.density, np.float32).tobytes())
        return digest.hexdigest()

    def _read(self, group: Any, where: str) -> Snapshot:
        import h5py

        for name in ("positions", "cell", "numbers", "density"):
            if not isinstance(group, h5py.Group) or name not in group:
                raise DatasetError(f"{where}: has no data set {name!r}")
        shape = own(group, "density").shape
        if len(shape) != 3 or not 0 < int(np.prod([float(n) for n in shape])) <= MAX_POINTS:
            raise DatasetError(
                f"{where}: density has shape {shape}; three axes and at most {MAX_POINTS} points are expected"
            )
        pbc = get(group, "pbc") if "pbc" in group else np.ones(3, bool)
        density = get(group, "density")
        if density.dtype.kind != "f":
            raise DatasetError(f"{where}: density is {density.dtype}; floating point is expected")
        meta = _attributes(group)
        electrons = meta.pop("electrons", None)
        if not isinstance(electrons, int | float):
            raise DatasetError(f"{where}: has no attribute electrons")
        if self._scale != 1.0:
            density = (density.astype(np.float64) * self._scale).astype(np.float32)
        try:
            structure = Structure(get(group, "positions"), get(group, "numbers"), get(group, "cell"), pbc)
            arrays = {name: get(group, name) for name in EXTRAS if name in group}
            snapshot = Snapshot(structure, density, float(electrons), meta, arrays)
            snapshot.check(where)
        except (StructureError, GridError) as error:
            raise DatasetError(f"{where}: {error}") from None
        return snapshot


def open_dataset(path: str | os.PathLike[str]) -> Dataset:
    """Open a data set of either kind.

    Raises
    ------
    DatasetError
        For a file that is missing, not HDF5, of an unknown kind or newer version, or without snapshots.
    """
    import h5py

    where = Path(path)
    try:
        with h5py.File(where, "r") as file:
            kind = file.attrs.get("format")
            if kind is None:
                groups = sorted(n for n in file if n.startswith("snapshot_"))
                scale = PER_BOHR3
            else:
                if isinstance(kind, bytes):
                    kind = kind.decode()
                if kind != FORMAT:
                    raise DatasetError(f"{where}: format {kind!r} is not a {FORMAT}")
                check_version(file.attrs.get("format_version"), FORMAT, where, DatasetError)
                root = own(file, "snapshots") if "snapshots" in file else None
                groups = [f"snapshots/{n}" for n in sorted(root or ())] if isinstance(root, h5py.Group) else []
                scale = 1.0
    except DatasetError:
        raise
    except DAMAGE as error:
        raise DatasetError(f"{where}: cannot be read as HDF5 ({reason_of(error)})") from None
    if not groups:
        raise DatasetError(f"{where}: has no snapshots; expected groups snapshots/NNNNNN or snapshot_NNN")
    return Dataset(where, groups, scale)


def write_dataset(path: str | os.PathLike[str], snapshots: Iterable[Snapshot], compression: int = 4) -> Dataset:
    """Write a data set of version 1, whole or not at all; an existing file is replaced."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with unheard():
            _fill(temporary, snapshots, compression)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        let_go(error, temporary)
        raise DatasetError(f"{target}: cannot be written ({reason_of(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return open_dataset(target)


def _fill(path: Path, snapshots: Iterable[Snapshot], compression: int) -> None:
    import h5py

    with h5py.File(path, "w", libver=HDF5_FORMAT) as file:
        put_text(file, "format", FORMAT)
        file.attrs["format_version"] = FORMAT_VERSION
        root = file.create_group("snapshots")
        for i, snapshot in enumerate(snapshots):
            snapshot.check(f"snapshot {i}")
            group = root.create_group(f"{i:06d}")
            s = snapshot.structure
            for name, value in (
                ("positions", s.positions),
                ("cell", s.cell),
                ("numbers", s.numbers),
                ("pbc", s.pbc),
                *((name, snapshot.arrays[name]) for name in EXTRAS if name in snapshot.arrays),
            ):
                put(group, name, value)
            put(
                group,
                "density",
                snapshot.density,
                chunks=True,
                shuffle=True,
                compression="gzip",
                compression_opts=compression,
            )
            for name, unit in _UNITS.items():
                if name in group:
                    put_text(group[name], "unit", unit)
            for key, value in {**snapshot.meta, "electrons": snapshot.electrons}.items():
                if isinstance(value, str):
                    put_text(group, key, value)
                else:
                    group.attrs[key] = value
        file.flush()


def extend_dataset(
    path: str | os.PathLike[str], parts: Sequence[str | os.PathLike[str]], ranks: Sequence[int]
) -> Dataset:
    """Add the first snapshot of each of `parts` to a data set, whole or not at all; all that the file holds is kept.

    Parameters
    ----------
    path : path
        Made where it does not exist.
    parts : sequence of paths
        Data sets.
    ranks : sequence of int
        The number that each snapshot gets: first those that the file has, then those of `parts`.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        if target.exists():
            shutil.copyfile(target, temporary)
        with unheard():
            _extend(temporary, parts, ranks)
        with open(temporary, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:
        let_go(error, temporary)
        raise DatasetError(f"{target}: cannot be written ({reason_of(error)})") from None
    finally:
        temporary.unlink(missing_ok=True)
    return open_dataset(target)


def _extend(path: Path, parts: Sequence[str | os.PathLike[str]], ranks: Sequence[int]) -> None:
    import h5py

    with h5py.File(path, "a", libver=HDF5_FORMAT) as file:
        put_text(file, "format", FORMAT)
        file.attrs["format_version"] = FORMAT_VERSION
        root = file.require_group("snapshots")
        names = sorted(root)
        for i, part in enumerate(parts):
            with h5py.File(part, "r") as source:
                source.copy(source["snapshots/000000"], root, name=f"new{i}")
            names.append(f"new{i}")
        for name in names:
            root.move(name, f"old_{name}")
        for name, rank in zip(names, ranks, strict=True):
            root.move(f"old_{name}", f"{rank:06d}")
        file.flush()


def _attributes(group: Any) -> dict[str, Any]:
    """Attributes as plain Python values, so that JSON can hold them."""
    values: dict[str, Any] = {}
    for key, value in group.attrs.items():
        if isinstance(value, np.ndarray):
            value = value.tolist()
        elif isinstance(value, np.generic):
            value = value.item()
        values[key] = value.decode(errors="replace") if isinstance(value, bytes) else value
    return values
