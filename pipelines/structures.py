"""Structures from files and into files, by ASE; those of LAMMPS and SPARC by `gpurho.pipelines.structurefiles`."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.errors import FormatError, GpurhoError, OutputExistsError, StoreError, StructureError, one_line, reason_of
from gpurho.pipelines.structurefiles import read_special
from gpurho.pipelines.structureguards import refuse_counts, unpacked_size
from gpurho.sources import StructureSource

if TYPE_CHECKING:
    from ase import Atoms

WHOLE = ("extxyz", "traj")
"""ASE's formats that hold many frames, and ``info`` with each."""


def read_structures(path: Path, species: Sequence[str] | None = None, index: str = ":") -> list[Atoms]:
    """Frames of a file: those of `index`, or of ``file@start:stop:step`` as ASE has it.

    Whatever ASE reads, data files and dumps of LAMMPS by whatever name, and ``.ion`` of SPARC with its ``.inpt``.
    `species` are the elements of the types 1, 2, ... of a file of LAMMPS that does not name them.

    Raises `StructureError` in one line whatever the reader raises.
    """
    if not path.is_file() and "@" in path.name:
        name, _, index = path.name.rpartition("@")
        path = path.with_name(name)
    if not path.is_file():
        raise StructureError(f"structure file {path} does not exist; check the name")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            unpacked_size(path)
            frames = read_special(path, index, species) or _by_ase(path, index)
    except GpurhoError as error:
        raise StructureError(str(error)) from None
    except Exception as error:  # each of ASE's many readers fails in its own way
        reason = reason_of(error)
        raise StructureError(f"structure file {path} cannot be read: {reason}; give a file that ASE reads") from None
    for text in dict.fromkeys(one_line(str(w.message)) for w in caught if w.category is UserWarning):
        # Of a table of a cif file, and of a dump, this means that atoms are left out.
        if text.startswith(("Wrong number", "loadtxt")):
            raise StructureError(f"structure file {path} is damaged: {text[:200]}; check the file")
        warnings.warn(f"structure file {path}: {text[:200]}", stacklevel=2)
    if not frames:
        raise StructureError(f"structure file {path} holds no structure")
    return list(frames) if isinstance(frames, list) else [frames]


def _by_ase(path: Path, index: str) -> Any:
    from ase.io import read
    from ase.io.formats import filetype

    kind = filetype(str(path))
    refuse_counts(path, kind)
    return read(path, index=index, format=kind)


def read_structure(path: Path, species: Sequence[str] | None = None) -> Atoms:
    """The last frame of a file; see `read_structures`."""
    return read_structures(path, species, "-1")[-1]


def structure_source(path: Path, species: Sequence[str], folder: Path) -> StructureSource:
    """The atoms of the last frame of a LAMMPS text dump, or of an HDF5 file, sorted into a temporary file in `folder`.

    `species` as in `read_structures`. Raises `FormatError` for any other file, and `StoreError` where the folder cannot
    be written to.
    """
    if path.suffix.lower() in (".h5", ".hdf5"):
        return StructureSource.from_hdf5(path, folder=folder)
    frame = -1
    if not path.is_file() and re.search(r"@-?\d+$", path.name):
        name, _, index = path.name.rpartition("@")
        path, frame = path.with_name(name), int(index)
    return StructureSource.from_dump(path, species, folder, frame)


def check_snapshots_name(path: Path, overwrite: bool = False) -> None:
    """Refuse, before any work, a name that snapshots cannot be written to whole: several frames, each with its info.

    Raises
    ------
    FormatError
        Where the format of the name is not known, holds one frame alone, or loses what is recorded of each.
    OutputExistsError
    StoreError
        Where the folder is not there or cannot be written to.
    """
    from ase.io.formats import UnknownFileTypeError, filetype

    if path.is_dir() or not path.name:
        raise StoreError(f"{path} is a folder; give the name of a file, for instance *.xyz")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; pass --overwrite to replace it")
    try:
        kind = filetype(path.name, read=False)
    except UnknownFileTypeError:
        kind = "unknown"
    if kind not in WHOLE:
        raise FormatError(
            f"{path.name} (format {kind}) cannot hold several snapshots and what is recorded of each; take *.xyz"
        )
    if not path.parent.is_dir():
        raise StoreError(f"folder {path.parent} does not exist; make it first")
    if not os.access(path.parent, os.W_OK):
        raise StoreError(f"folder {path.parent} cannot be written to; give another")


def write_structures(path: Path, frames: Sequence[Atoms], overwrite: bool = False) -> None:
    """Write frames, whole or not at all, in the format of the file's name."""
    from ase.io import write
    from ase.io.formats import filetype

    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; pass --overwrite to replace it")
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        write(temporary, list(frames), format=filetype(path.name, read=False))
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror})") from None
    except Exception as error:  # each of ASE's many writers fails in its own way
        reason = reason_of(error)
        raise StoreError(
            f"{path} cannot be written: {reason}; give a name that ASE knows, for instance *.xyz"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
