"""Inputs of a DFT code that start from a given density, in a folder that can be carried to where the code runs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.base import DFTSettings, check_density, check_structure
from gpurho.dft.sparc_calculation import valence_electrons, write_calculation
from gpurho.dft.sparc_program import Pseudos
from gpurho.errors import SettingsError
from gpurho.structure import Structure

Potentials = str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]]


@dataclass(frozen=True)
class Restart:
    """What was written, and the command that goes on from it in the folder."""

    files: tuple[Path, ...]
    command: str


def write_restart(
    folder: Path,
    structure: Structure,
    density: NDArray[np.float64],
    engine: str,
    settings: DFTSettings | None = None,
    pseudos: Potentials | None = None,
) -> Restart:
    """Write a ground state that starts from a density instead of superposed atoms.

    Parameters
    ----------
    folder : Path
        Is there, and empty.
    structure : Structure
    density : (nx, ny, nz), e/angstrom^3
        On any grid of the cell; rescaled to the valence electrons and brought to the grid of the settings.
    engine : str
        "sparc" writes ``.inpt``, ``.ion``, psp8 files and ``start.dens``, and needs no program here. "qe" writes
        ``pw.in``, UPF files and ``gpurho.save``; pw.x makes the list of plane waves. "gpaw" writes a Python script, the
        structure and the density.
    settings : DFTSettings, optional
    pseudos : path or mapping, optional
        Of SPARC: a folder of psp8 files or a file for each symbol (default: $SPARC_PSP_PATH). Of Quantum ESPRESSO: a
        file for each symbol (default: GTH-PBE).

    Raises
    ------
    SettingsError
        For an engine of another name.
    StructureError, EngineError, MissingDependencyError
        As the engine itself.
    """
    if engine not in WRITERS:
        raise SettingsError(f"engine {engine!r} has no restart files; give one of {', '.join(WRITERS)}")
    return WRITERS[engine](folder, structure, density, settings or DFTSettings(), pseudos)


def _sparc(
    folder: Path,
    structure: Structure,
    density: NDArray[np.float64],
    settings: DFTSettings,
    pseudos: Potentials | None,
) -> Restart:
    table = Pseudos(pseudos)
    electrons = float(valence_electrons(structure, table).sum())
    start = check_density(structure, density, electrons)
    files = write_calculation(folder, "gpurho", structure, settings.at(structure), table, start=start)
    return Restart(tuple(files), "sparc -name gpurho")


def _qe(
    folder: Path,
    structure: Structure,
    density: NDArray[np.float64],
    settings: DFTSettings,
    pseudos: Potentials | None,
) -> Restart:
    from gpurho.dft.qe import QeEngine

    if pseudos is not None and not isinstance(pseudos, Mapping):
        raise SettingsError("pseudopotentials of Quantum ESPRESSO are one file for each symbol; give Al=Al.upf")
    files = QeEngine(pseudos=pseudos).write_restart(folder, structure, settings, density)
    return Restart(tuple(files), "pw.x -in pw.in")


def _gpaw(
    folder: Path,
    structure: Structure,
    density: NDArray[np.float64],
    settings: DFTSettings,
    pseudos: Potentials | None,
) -> Restart:
    from ase.io import write

    if pseudos is not None:
        raise SettingsError("GPAW runs with its built-in GTH-PBE pseudopotentials; leave pseudopotentials out")
    values = check_density(structure, density, check_structure(structure))
    files = (folder / "run.py", folder / "atoms.traj", folder / "density.npy")
    fixed = settings.at(structure)
    assert fixed.kmesh is not None
    files[0].write_text(
        SCRIPT.format(
            cutoff=fixed.cutoff,
            size=fixed.kmesh.size,
            shift=fixed.kmesh.shift,
            grid=fixed.grid,
            smearing=fixed.smearing_hartree,
            tolerance=fixed.tolerance,
            steps=fixed.max_iterations,
        )
    )
    # A text format would round the positions.
    write(files[1], structure.to_ase())
    np.save(files[2], values)
    return Restart(files, "python run.py")


SCRIPT = '''"""Ground state with GPAW from a predicted density; GTH-PBE pseudopotentials, log in gpaw.txt."""

import numpy as np
from ase.io import read

from gpurho import DFTSettings, KMesh, Structure
from gpurho.dft.gpaw import GpawEngine

structure = Structure.from_ase(read("atoms.traj"))
settings = DFTSettings(
    cutoff={cutoff},
    kmesh=KMesh({size}, {shift}),
    grid={grid},
    smearing_hartree={smearing},
    tolerance={tolerance},
    max_iterations={steps},
)
start = np.load("density.npy")  # e/angstrom^3
label = GpawEngine(txt="gpaw.txt").ground_state(structure, settings, density=start)
np.save("ground_state.npy", label.density)
print(f"{{label.iterations}} steps, free energy {{label.energies.free_energy:.6f}} eV, forces up to", end=" ")
print(f"{{np.abs(label.forces).max():.4f}} eV/angstrom; density in ground_state.npy, e/angstrom^3")
'''

WRITERS: dict[str, Callable[[Path, Structure, NDArray[np.float64], DFTSettings, Potentials | None], Restart]] = {
    "sparc": _sparc,
    "qe": _qe,
    "gpaw": _gpaw,
}
