"""The folder of ``gpurho suggest``: cells to label, why, and inputs of DFT programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gpurho.errors import OutputExistsError, SettingsError, StoreError
from gpurho.structure import Structure
from gpurho.versions import NEWEST

if TYPE_CHECKING:
    from gpurho.pipelines.suggest import Suggestion


FORMAT = "gpurho-suggestions"


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise unless suggestions may be written to the folder."""
    if path.is_file():
        raise OutputExistsError(f"{path} is a file; give the name of a folder")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise OutputExistsError(f"folder {path} is not empty; pass --overwrite to replace it")
    if not path.parent.is_dir():
        raise StoreError(f"folder {path.parent} does not exist; make it first")
    if path.is_dir() and overwrite and any(path.iterdir()) and not (path / "suggestions.json").is_file():
        raise OutputExistsError(f"folder {path} was not written by gpurho suggest; give another name")


@contextmanager
def _folder(path: Path) -> Iterator[Path]:
    """A folder that takes its place when all is written."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    former = temporary.with_suffix(".old")
    try:
        temporary.mkdir()
        yield temporary
        if path.is_dir():
            os.replace(path, former)
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written ({error.strerror or error})") from None
    finally:
        if former.is_dir() and not path.exists():
            os.replace(former, path)
        for leftover in (temporary, former):
            shutil.rmtree(leftover, ignore_errors=True)


def write_suggestions(path: Path, suggestions: Sequence[Suggestion], inputs: Sequence[str]) -> None:
    """The folder with ``suggestions.xyz``, ``suggestions.json`` and inputs of some programs, whole or not at all."""
    from gpurho.pipelines.structures import write_structures

    with _folder(path) as folder:
        if suggestions:
            write_structures(folder / "suggestions.xyz", [s.atoms for s in suggestions])
        for number, suggestion in enumerate(suggestions):
            for engine in inputs:
                place = folder / f"{number:03d}" / engine
                place.mkdir(parents=True)
                engine_input(place, engine, Structure.from_ase(suggestion.atoms))
        record = {"format": FORMAT, "format_version": NEWEST[FORMAT], "suggestions": [s.record() for s in suggestions]}
        text = json.dumps(record, indent=1)
        (folder / "suggestions.json").write_text(text + "\n")


def engine_input(folder: Path, engine: str, structure: Structure) -> None:
    """Inputs of a program with the default settings of labels."""
    from gpurho.dft.base import DFTSettings, check_structure

    settings = DFTSettings().at(structure)
    if engine == "qe":
        from gpurho.dft.qe import write_inputs

        write_inputs(folder, structure, settings, check_structure(structure))
        return
    from gpurho.dft.sparc_inputs import inpt_text, ion_text

    if np.linalg.det(structure.cell) < 0:
        raise SettingsError("SPARC refuses left-handed cells; leave out 'sparc', or swap two cell vectors")
    # The user's psp8 files go beside them: there are none that may be shipped.
    (folder / "sparc.inpt").write_text(inpt_text(structure, settings))
    (folder / "sparc.ion").write_text(ion_text(structure, {s: f"{s}.psp8" for s in structure.symbols}))


__all__ = ["check_folder", "write_suggestions"]
