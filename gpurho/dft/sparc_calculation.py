"""The files of a SPARC calculation in a folder: inputs, pseudopotentials, and the density to start from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import put_rows
from gpurho.dft.base import DFTSettings, check_structure
from gpurho.dft.grids import fourier_resample
from gpurho.dft.sparc_inputs import Dynamics, inpt_text, ion_order, ion_text, read_psp8
from gpurho.dft.sparc_program import Pseudos
from gpurho.errors import EngineError, StructureError
from gpurho.formats_sparc import put_dens_head
from gpurho.structure import Structure
from gpurho.units import PER_ANGSTROM3


def write_calculation(
    folder: Path,
    stem: str,
    structure: Structure,
    settings: DFTSettings,
    pseudos: Pseudos,
    *,
    start: NDArray[np.float64] | None = None,
    spacing: float | None = None,
    one_shot: bool = False,
    dynamics: Dynamics | None = None,
    keywords: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write ``STEM.inpt``, ``STEM.ion``, a psp8 file for each element, and ``start.dens`` where a start is given.

    Parameters
    ----------
    folder, stem
        Where, and the name that goes to ``sparc -name``.
    structure, settings, pseudos
    start : (nx, ny, nz), e/angstrom^3, optional
        A density on any grid of the cell; it is brought to that of the settings, cut at zero and normalised.
    spacing, one_shot, dynamics, keywords
        See `gpurho.dft.sparc_inputs.inpt_text`.

    Returns
    -------
    list of Path
        What was written.
    """
    valence = valence_electrons(structure, pseudos)
    written = []
    if start is not None:
        if spacing is not None:
            # SPARC takes a density on its own grid alone, so the grid is named.
            lengths = np.linalg.norm(structure.cell, axis=1)
            counts = [int(np.ceil(length / spacing * (1 - 1e-12))) for length in lengths]
            settings, spacing = replace(settings, grid=(counts[0], counts[1], counts[2])), None
        written.append(folder / "start.dens")
        _write_start(written[0], structure, start, settings.shape(structure), valence)
    potentials = {}
    for symbol in structure.symbols:
        # Copies, because SPARC cuts names at spaces.
        written.append(folder / f"{symbol}.psp8")
        shutil.copyfile(pseudos.file(symbol), written[-1])
        potentials[symbol] = f"{symbol}.psp8"
    text = inpt_text(
        structure,
        settings,
        spacing=spacing,
        density=None if start is None else "start.dens",
        one_shot=one_shot,
        dynamics=dynamics,
        more=keywords,
    )
    for suffix, content in (("inpt", text), ("ion", ion_text(structure, potentials))):
        written.append(folder / f"{stem}.{suffix}")
        written[-1].write_text(content)
    return written


def valence_electrons(structure: Structure, pseudos: Pseudos) -> NDArray[np.float64]:
    """Valence electrons of each atom, (n,), of a structure that SPARC can do.

    Raises
    ------
    StructureError, EngineError, UnknownSpeciesError
    """
    from ase.data import chemical_symbols

    if np.linalg.det(structure.cell) < 0:
        raise StructureError("the cell vectors are left-handed, which SPARC refuses; swap two of them")
    valence = {}
    for z in np.unique(structure.numbers):
        symbol = chemical_symbols[z]
        number, electrons = read_psp8(pseudos.file(symbol))
        if number != z:
            raise EngineError(
                f"{pseudos.file(symbol)} is a pseudopotential of {chemical_symbols[number]}, not {symbol}"
            )
        valence[z] = electrons
    check_structure(structure, {chemical_symbols[z]: n for z, n in valence.items()})
    return np.array([valence[z] for z in structure.numbers])


def _write_start(
    path: Path,
    structure: Structure,
    values: NDArray[np.float64],
    shape: tuple[int, int, int],
    valence: NDArray[np.float64],
) -> None:
    """A density for SPARC to start from: on its grid, not negative, normalised, with more digits than SPARC writes."""
    electrons = float(valence.sum())
    field = np.maximum(fourier_resample(values, shape), 0.0)
    field *= electrons / (float(field.mean()) * structure.volume)
    order = ion_order(structure)
    atoms = Structure(structure.positions[order], structure.numbers[order], structure.cell, structure.pbc)
    with open(path, "w") as file:
        put_dens_head(file, atoms, shape, valence=valence[order])
        put_rows(file, field.reshape(-1, shape[2]) * PER_ANGSTROM3, "  %.14E")
