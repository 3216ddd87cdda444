"""Inputs of SPARC: the ``.inpt`` and ``.ion`` files of a calculation, and what a pseudopotential says of itself.

Keywords as in SPARC's manual (https://github.com/SPARC-X/SPARC, folder doc); lengths in the files are in Bohr.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho._textfields import floats, reading
from gpurho.dft.base import DFTSettings
from gpurho.errors import FormatError, SettingsError
from gpurho.structure import Structure
from gpurho.units import BOHR


@dataclass(frozen=True)
class Dynamics:
    """Molecular dynamics in SPARC: Nose-Hoover NVT.

    Parameters
    ----------
    temperature : float, K
    steps : int
        The first is the structure as it was given.
    timestep : float, fs
    temperature_end : float, K, optional
        The thermostat goes there linearly.
    reseed : bool
        Other initial velocities (Maxwell-Boltzmann) in every run; otherwise always the same.
    """

    temperature: float
    steps: int
    timestep: float = 1.0
    temperature_end: float | None = None
    reseed: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (("temperature", 1, 1e5), ("steps", 1, 10**7), ("timestep", 1e-3, 20)):
            value = getattr(self, name)
            if not (np.isfinite(value) and low <= value <= high):
                raise SettingsError(f"{name} {value!r} cannot be used; give {low:g} to {high:g}")
        if self.temperature_end is not None and not 1 <= self.temperature_end <= 1e5:
            raise SettingsError(f"temperature_end {self.temperature_end!r} cannot be used; give 1 to 100000")


def inpt_text(
    structure: Structure,
    settings: DFTSettings,
    *,
    spacing: float | None = None,
    density: str | None = None,
    one_shot: bool = False,
    dynamics: Dynamics | None = None,
    more: Mapping[str, Any] | None = None,
) -> str:
    """An ``.inpt`` file.

    Parameters
    ----------
    structure : Structure
        Its cell; the atoms go into the ``.ion``.
    settings : DFTSettings
        The density's grid is that of `DFTSettings.shape`, whose step serves finite differences of order 12 as well as
        plane waves up to the cutoff.
    spacing : float, angstrom, optional
        A mesh spacing instead, which SPARC fits to the cell.
    density : str, optional
        Name of a ``.dens`` file to start from; SPARC neither rescales nor resamples it.
    one_shot : bool
        Diagonalise once in the potential of that density, well converged, and leave it.
    dynamics : Dynamics, optional
    more : mapping, optional
        Keywords added or replaced, for instance ``{"FD_ORDER": 14}``.
    """
    lengths = np.linalg.norm(structure.cell, axis=1)
    unit = structure.cell / lengths[:, None]
    mesh = settings.mesh(structure)
    values: dict[str, Any] = {
        "CELL": " ".join(f"{x:.14f}" for x in lengths / BOHR),
        "LATVEC": "\n" + "\n".join(" ".join(f"{x:.16f}" for x in row) for row in unit),
    }
    if spacing is None:
        values["FD_GRID"] = " ".join(map(str, settings.shape(structure)))
    else:
        values["MESH_SPACING"] = f"{spacing / BOHR:.12g}"
    values |= {
        "FD_ORDER": 12,
        "BC": "P P P",
        "KPOINT_GRID": " ".join(map(str, mesh.size)),
        # Said even where it is zero: SPARC shifts even meshes by half a step on its own.
        "KPOINT_SHIFT": " ".join(f"{s:g}" for s in mesh.shift),
        "SPIN_TYP": 0,
        "EXCHANGE_CORRELATION": "GGA_PBE",
        "ELEC_TEMP_TYPE": "fermi-dirac",
        "SMEARING": f"{settings.smearing_hartree:.12g}",
        "TOL_SCF": f"{settings.tolerance:g}",
        "MAXIT_SCF": settings.max_iterations,
        "MIXING_VARIABLE": "density",
        "CALC_STRESS": 0,
        "CALC_PRES": 0,
        "PRINT_ATOMS": 1,
        "PRINT_FORCES": int(settings.forces and not one_shot),
        "PRINT_EIGEN": 1,
        "PRINT_DENSITY": int(not one_shot),
    }
    if density is not None:
        values |= {"READ_INIT_DENS": 1, "INPUT_DENS_FILE": density}
    if one_shot:
        if density is None:
            raise SettingsError("a one-shot calculation needs a density; give the name of its file")
        # The filter runs often enough before the only step that the orbitals are those of the given density.
        values |= {"MAXIT_SCF": 1, "MINIT_SCF": 1, "RHO_TRIGGER": 25}
    if dynamics is not None:
        end = dynamics.temperature if dynamics.temperature_end is None else dynamics.temperature_end
        values |= {
            "MD_FLAG": 1,
            "MD_METHOD": "NVT_NH",
            "MD_TIMESTEP": f"{dynamics.timestep:g}",
            "MD_NSTEP": dynamics.steps,
            "ION_TEMP": f"{dynamics.temperature:.10g}",
            "ION_TEMP_END": f"{end:.10g}",
            "ION_VEL_DSTR": 2,
            "ION_VEL_DSTR_RAND": int(dynamics.reseed),
            "PRINT_MDOUT": 1,
            "PRINT_VELS": 1,
            "RESTART_FLAG": 0,
        }
    values |= {key.upper(): value for key, value in (more or {}).items()}
    return "".join(f"{key}: {value}\n" for key, value in values.items())


def ion_order(structure: Structure) -> NDArray[np.int64]:
    """The atoms in the order of an ``.ion`` file: by element, elements as they first appear."""
    _, first = np.unique(structure.numbers, return_index=True)
    elements = structure.numbers[np.sort(first)]
    return np.concatenate([np.flatnonzero(structure.numbers == z) for z in elements])


def ion_text(structure: Structure, pseudopotentials: Mapping[str, str]) -> str:
    """An ``.ion`` file, atoms in the order of `ion_order`; `pseudopotentials` names a file for each symbol."""
    from ase.data import atomic_masses, chemical_symbols

    order = ion_order(structure)
    fractions = structure.positions[order] @ np.linalg.inv(structure.cell)
    numbers = structure.numbers[order]
    text = []
    for z in dict.fromkeys(numbers.tolist()):
        rows = "\n".join(" ".join(f"{x:.15f}" for x in row) for row in fractions[numbers == z])
        symbol = chemical_symbols[z]
        text.append(
            f"ATOM_TYPE: {symbol}\nN_TYPE_ATOM: {np.count_nonzero(numbers == z)}\nATOMIC_MASS: {atomic_masses[z]:.8g}\n"
            f"PSEUDO_POT: {pseudopotentials[symbol]}\nCOORD_FRAC:\n{rows}\n"
        )
    return "\n".join(text)


def read_psp8(path: str | Path) -> tuple[int, float]:
    """Atomic number and valence electrons of a psp8 pseudopotential.

    Raises
    ------
    FormatError
        For a file that is no psp8 file.
    """
    target = Path(path)
    with reading(target, "psp8"), open(target, encoding="utf-8", errors="replace") as file:
        lines = [next(file) for _ in range(3)]
        number, valence = floats(lines[1].split()[:2])
        if lines[2].split()[0] != "8" or number != round(number) or not 0 < valence <= number <= 118:
            raise FormatError(
                f"{target} is no pseudopotential of the kind psp8; give one, for instance of the SPMS table"
            )
        return int(number), float(valence)
