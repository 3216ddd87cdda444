"""SPARC as an engine: real-space finite differences, by its files, with psp8 pseudopotentials of the user's."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.dft.base import DFTSettings, Energies, Label, check_density
from gpurho.dft.processes import execute
from gpurho.dft.scratch import scratch_folder
from gpurho.dft.sparc_calculation import valence_electrons, write_calculation
from gpurho.dft.sparc_files import Cycle, Eigen, Output, Static, Step, read_aimd, read_eigen, read_out, read_static
from gpurho.dft.sparc_inputs import Dynamics, ion_order
from gpurho.dft.sparc_program import REMEDY, Pseudos, find_sparc, reason
from gpurho.errors import ConvergenceError, EngineError, FormatError, SettingsError
from gpurho.formats import read_density
from gpurho.structure import Structure

STEM = "gpurho"
ELECTRONS_TOLERANCE = 1e-5
"""Largest relative distance of a density's integral from the number of electrons: its file has seven digits."""

POSITION_TOLERANCE = 1e-6
"""Largest distance, in fractions of the cell, of the atoms that come back from those that went in."""


@dataclass(frozen=True, eq=False)
class DynamicsRun:
    """A dynamics run: its steps, atoms in the order of the structure that went in, and the density of the last one."""

    steps: list[Step]
    density: NDArray[np.float64]
    converged: tuple[bool, ...]
    engine: str


class SparcEngine:
    """Ground states, Harris-Foulkes energies and molecular dynamics with the program ``sparc``.

    Parameters
    ----------
    pseudos : path, or mapping of symbol to path, optional
        A folder of psp8 files with the element in their name (``Al.psp8``, ``13_Al_3_1.9_1.9_pbe_n_v1.0.psp8``), by
        default $SPARC_PSP_PATH; or a file for each element.
    command : str, optional
        How the program is started, for instance ``"mpirun -n 8 /opt/sparc"``; by default $GPURHO_SPARC, then ``sparc``
        on the PATH.
    processes : int
        MPI processes, where `command` does not start them itself.
    spacing : float, angstrom, optional
        Mesh spacing; by default the grid of the settings, whose step at 400 eV is 0.15 angstrom (0.29 Bohr).
    keywords : mapping, optional
        Keywords of SPARC's input added or replaced.
    scratch : path, optional
        Where temporary folders are made; those that killed runs left there are removed.

    Raises
    ------
    MissingDependencyError
        Where the program is not there.
    EngineError
        Where the pseudopotentials are not.

    Notes
    -----
    Number and shape of the valence electrons are those of the pseudopotentials, so that labels of this engine do not
    mix with those of engines that use GTH potentials.
    """

    name = "sparc"

    def __init__(
        self,
        pseudos: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None = None,
        command: str | None = None,
        processes: int = 1,
        spacing: float | None = None,
        keywords: Mapping[str, Any] | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self.command = find_sparc(command)
        if processes > 1:
            self.command = ["mpirun", "-n", str(processes), *self.command]
        if spacing is not None and not (np.isfinite(spacing) and 0.02 <= spacing <= 1.0):
            raise SettingsError(f"spacing {spacing!r} angstrom cannot be used; give 0.02 to 1")
        self.pseudos = Pseudos(pseudos)
        self.spacing, self.keywords, self.scratch = spacing, dict(keywords or {}), scratch

    def identity(self, structure: Structure) -> str:
        """What decides the label of a structure besides settings: psp8 files, mesh spacing and keywords.

        Raises what `ground_state` would, of a structure that cannot be done.
        """
        valence_electrons(structure, self.pseudos)
        files = [f"{s} {hashlib.sha256(self.pseudos.file(s).read_bytes()).hexdigest()[:16]}" for s in structure.symbols]
        return " ".join([self.name, *files, str(self.spacing), str(sorted(self.keywords.items()))])

    # -- the protocol -------------------------------------------------------------------------------------------

    def ground_state(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64] | None = None
    ) -> Label:
        """See `gpurho.dft.base.Engine`; the tolerance goes to TOL_SCF, SPARC's own measure of the residual."""
        started = time.monotonic()
        valence, settings = valence_electrons(structure, self.pseudos), settings.at(structure)
        electrons = float(valence.sum())
        with self._folder() as folder:
            start = None if density is None else check_density(structure, density, electrons)
            self._run(folder, structure, settings, start)
            output, cycle = self._output(folder, structure, electrons)
            if not cycle.converged:
                raise ConvergenceError(
                    f"{_formula(structure)}: no self-consistency in {cycle.iterations} steps (residual"
                    f" {cycle.residual:.2g}); raise max_iterations or the smearing"
                )
            static = self._static(folder, structure)
            eigen = self._eigen(folder, electrons)
            field = self._density(folder, structure, output.shape, electrons)
        forces = None
        if static.forces is not None and settings.forces:
            forces = _unsorted(structure, static.forces)
        return Label(
            structure=structure,
            density=field,
            energies=_energies(cycle, static, eigen, structure, settings, electrons, electrons),
            forces=forces,
            electrons=electrons,
            settings=replace(settings, grid=output.shape),
            engine=f"SPARC {output.version}",
            iterations=cycle.iterations,
            seconds=time.monotonic() - started,
        )

    def one_shot(self, structure: Structure, density: NDArray[np.float64], settings: DFTSettings) -> Energies:
        """See `gpurho.dft.base.Engine`: one step of the SCF cycle, whose energy is the Harris-Foulkes functional."""
        valence, settings = valence_electrons(structure, self.pseudos), settings.at(structure)
        electrons = float(valence.sum())
        given = float(np.mean(density, dtype=np.float64)) * structure.volume
        with self._folder() as folder:
            start = check_density(structure, density, electrons)
            self._run(folder, structure, settings, start, one_shot=True)
            _, cycle = self._output(folder, structure, electrons)
            static, eigen = self._static(folder, structure), self._eigen(folder, electrons)
        return _energies(cycle, static, eigen, structure, settings, electrons, given)

    def dynamics(self, structure: Structure, settings: DFTSettings, dynamics: Dynamics) -> DynamicsRun:
        """Born-Oppenheimer molecular dynamics in the canonical ensemble (Nose-Hoover).

        Raises
        ------
        EngineError
            Where SPARC fails, or ends before the last step.
        """
        valence, settings = valence_electrons(structure, self.pseudos), settings.at(structure)
        electrons = float(valence.sum())
        with self._folder() as folder:
            self._run(folder, structure, settings, dynamics=dynamics)
            output, _ = self._output(folder, structure, electrons)
            order = ion_order(structure)
            sorted_ = Structure(structure.positions[order], structure.numbers[order], structure.cell, structure.pbc)
            with _files():
                steps = read_aimd(folder / f"{STEM}.aimd", sorted_)
            if len(steps) != dynamics.steps or len(output.cycles) != len(steps):
                raise EngineError(f"SPARC made {len(steps)} of {dynamics.steps} steps; see its log")
            field = self._density(folder, structure, output.shape, electrons)
        steps = [
            replace(
                step,
                structure=Structure(
                    _unsorted(structure, step.structure.positions), structure.numbers, structure.cell, structure.pbc
                ),
                velocities=None if step.velocities is None else _unsorted(structure, step.velocities),
                forces=None if step.forces is None else _unsorted(structure, step.forces),
            )
            for step in steps
        ]
        converged = tuple(cycle.converged for cycle in output.cycles)
        return DynamicsRun(steps, field, converged, f"SPARC {output.version}")

    # -- before a run -------------------------------------------------------------------------------------------

    def _folder(self) -> AbstractContextManager[Path]:
        return scratch_folder("sparc", self.scratch)

    def _run(
        self,
        folder: Path,
        structure: Structure,
        settings: DFTSettings,
        start: NDArray[np.float64] | None = None,
        one_shot: bool = False,
        dynamics: Dynamics | None = None,
    ) -> None:
        """Write the inputs, run the program to its end."""
        write_calculation(
            folder,
            STEM,
            structure,
            settings,
            self.pseudos,
            start=start,
            spacing=self.spacing,
            one_shot=one_shot,
            dynamics=dynamics,
            keywords=self.keywords,
        )
        code = execute([*self.command, "-name", STEM], folder, "sparc.log", REMEDY)
        if code != 0 or not (folder / f"{STEM}.out").is_file():
            raise EngineError(f"SPARC failed (exit code {code}): {reason(folder / 'sparc.log')}")

    # -- after a run --------------------------------------------------------------------------------------------

    def _output(self, folder: Path, structure: Structure, electrons: float) -> tuple[Output, Cycle]:
        with _files():
            output = read_out(folder / f"{STEM}.out")
        if output.n_atoms != len(structure) or abs(output.electrons - electrons) > 1e-6 or not output.cycles:
            raise EngineError(
                f"SPARC's output has {output.n_atoms} atoms and {output.electrons:g} electrons, the structure"
                f" {len(structure)} and {electrons:g}; check the pseudopotentials"
            )
        if not np.allclose(output.cell, structure.cell, rtol=0, atol=1e-6):
            raise EngineError("SPARC's output has another cell than the structure; check the keywords")
        return output, output.cycles[-1]

    def _static(self, folder: Path, structure: Structure) -> Static:
        with _files():
            static = read_static(folder / f"{STEM}.static")
        sent = structure.positions[ion_order(structure)] @ np.linalg.inv(structure.cell)
        if static.fractions.shape != sent.shape:
            raise EngineError(f"SPARC's output has {len(static.fractions)} atoms, the structure {len(sent)}")
        off = static.fractions - sent
        if np.abs(off - np.round(off)).max() > POSITION_TOLERANCE:
            raise EngineError("SPARC's output has the atoms elsewhere than the structure; check the keywords")
        return static

    def _eigen(self, folder: Path, electrons: float) -> Eigen:
        with _files():
            eigen = read_eigen(folder / f"{STEM}.eigen")
        if abs(eigen.electrons - electrons) > 1e-4:
            raise EngineError(
                f"SPARC's eigenvalues hold {eigen.electrons:.6g} electrons, not {electrons:g}; add NSTATES"
            )
        return eigen

    def _density(
        self, folder: Path, structure: Structure, shape: tuple[int, int, int], electrons: float
    ) -> NDArray[np.float64]:
        """The density that a run left, exactly normalised."""
        with _files():
            found: Density = read_density(folder / f"{STEM}.dens")
        if found.shape != shape:
            raise EngineError(f"SPARC's density has {found.shape} points, its output says {shape}")
        field = np.asarray(found.mean, dtype=np.float64)
        integral = float(field.mean()) * structure.volume
        if abs(integral / electrons - 1) > ELECTRONS_TOLERANCE:
            raise EngineError(f"SPARC's density integrates to {integral:.8g} electrons, not {electrons:g}")
        return field * (electrons / integral)


def _unsorted(structure: Structure, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rows in the order of the ``.ion`` file back in that of the structure."""
    result = np.empty_like(rows)
    result[ion_order(structure)] = rows
    return result


def _energies(
    cycle: Cycle,
    static: Static,
    eigen: Eigen,
    structure: Structure,
    settings: DFTSettings,
    electrons: float,
    given: float,
) -> Energies:
    if abs(static.free_energy - cycle.free_energy) > 1e-8 * abs(cycle.free_energy) + 1e-6:
        raise EngineError("SPARC's .static and .out have different free energies; they are of two runs")
    mesh = settings.mesh(structure)
    # The file has six decimals; points of the mesh and numbers of equivalent points are exact.
    size, shift = np.array(mesh.size), np.array(mesh.shift)
    steps = np.round(eigen.kpoints * size - shift)
    counts = np.round(eigen.weights * size.prod())
    kpoints = (steps + shift) / size
    if np.abs(kpoints - eigen.kpoints).max() > 1e-5 or counts.sum() != size.prod() or counts.min() < 1:
        raise EngineError(f"SPARC's k-points are not those of the mesh {mesh}; check the keywords")
    return Energies(
        # The .static file has more digits.
        free_energy=static.free_energy,
        energy=static.free_energy - 0.5 * cycle.entropy_term,
        xc=cycle.xc,
        entropy_term=cycle.entropy_term,
        band=cycle.band,
        fermi_level=cycle.fermi_level,
        eigenvalues=eigen.eigenvalues,
        kpoints=kpoints,
        weights=counts / size.prod(),
        n_atoms=len(structure),
        electrons=electrons,
        electrons_given=given,
    )


@contextmanager
def _files() -> Iterator[None]:
    """A file that a finished run should have left whole, and did not, is a failure of the engine."""
    try:
        yield
    except FormatError as error:
        raise EngineError(f"SPARC's output cannot be used: {error}") from None


def _formula(structure: Structure) -> str:
    return str(structure.to_ase().get_chemical_formula())
