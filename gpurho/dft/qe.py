"""Quantum ESPRESSO as an engine: ``pw.x`` by its files, with GTH-PBE potentials tabulated here or any of the user's."""

from __future__ import annotations

import hashlib
import math
import os
import re
import shutil
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from gpurho.dft.base import DFTSettings, Energies, Label, check_density, check_structure
from gpurho.dft.occupations import band_terms, fermi_level
from gpurho.dft.processes import execute
from gpurho.dft.qe_files import PwResult, Value, input_text, read_charge, read_result, replace_charge
from gpurho.dft.scratch import scratch_folder
from gpurho.dft.upf import upf_text
from gpurho.errors import ConvergenceError, EngineError, MissingDependencyError, SettingsError
from gpurho.structure import Structure
from gpurho.units import HARTREE

REMEDY = "install Quantum ESPRESSO (Debian: apt-get install quantum-espresso) or set GPURHO_PW to its pw.x"
RYDBERG = HARTREE / 2
EXTRA_BANDS = (0.15, 0.5, 1.0, 2.0)
"""Empty bands, as a share of the occupied ones; the next is tried where the highest band is not empty."""

DENSITY_CUTOFF = 3.0
"""Cutoff of the density over that of the orbitals. 4 would hold every product of two orbitals; 3 changes the density by
6e-6 L1 per electron and the energy by 1e-6 eV per atom (Al 32), and saves a quarter of the time."""

TAIL = 1e-4
"""Largest occupation (0 to 1) of the highest band: beyond it bands are missing."""

MIXING: dict[str, Value] = {"mixing_mode": "local-TF", "mixing_ndim": 20}
"""How densities are mixed. Charge sloshes along long cells, and by default QE forgets how after eight steps: 52 steps
for eight cells of aluminium in a row, 17 with twenty remembered, 8 with screening too; three of SiGe 11, 11, 7."""

ERROR_PER_ROOT = 0.04
"""L1 error per electron of a density whose estimated SCF accuracy is 1 Ry per 32 atoms; measured on Al 32: it falls as
the root of the accuracy (4.9e-4 at 1e-4 Ry, 1.1e-4 at 1e-5 Ry, 4.8e-5 at 1e-6 Ry)."""


class QeEngine:
    """Ground states and Harris-Foulkes energies with ``pw.x`` (6.4 or newer).

    Parameters
    ----------
    command : str, optional
        The program; by default $GPURHO_PW, then ``pw.x`` on the PATH.
    pseudos : mapping of symbol to path, optional
        UPF files of the user's, norm-conserving; elements left out use GTH-PBE.
    processes : int
        MPI processes; with k-points each takes its own (pools).
    scratch : path, optional
        Where temporary folders are made; those that killed runs left there are removed.
    """

    name = "qe"

    def __init__(
        self,
        command: str | None = None,
        pseudos: Mapping[str, str | os.PathLike[str]] | None = None,
        processes: int = 1,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        name = command or os.environ.get("GPURHO_PW") or "pw.x"
        found = shutil.which(name)
        if found is None:
            raise MissingDependencyError(f"the program {name!r} is not there; {REMEDY}")
        if scratch is not None and not Path(scratch).is_dir():
            raise SettingsError(f"scratch {str(scratch)!r} is no folder; make it first")
        # Runs take place in folders of their own, where a relative path means something else.
        self.command, self.processes, self.scratch = os.path.abspath(found), processes, scratch
        self.pseudos = {symbol: _read_upf(Path(path)) for symbol, path in (pseudos or {}).items()}

    def identity(self, structure: Structure) -> str:
        """What decides the label of a structure besides settings: the engine, and pseudopotentials of the user's.

        Raises what `ground_state` would, of a structure that cannot be done.
        """
        self._electrons(structure)
        own = {symbol: self.pseudos[symbol][0] for symbol in structure.symbols if symbol in self.pseudos}
        digests = [
            f" {symbol} {hashlib.sha256(text.encode()).hexdigest()[:16]}" for symbol, text in sorted(own.items())
        ]
        return self.name + "".join(digests)

    def ground_state(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64] | None = None
    ) -> Label:
        """See `gpurho.dft.base.Engine`."""
        started = time.monotonic()
        electrons = self._electrons(structure)
        settings = settings.at(structure)
        control = _scf(structure, settings)
        with self._folder() as folder:
            if density is not None:
                self._start_from(folder, structure, settings, check_density(structure, density, electrons))
                control["startingpot"] = "file"
            iterations = 0
            for share in EXTRA_BANDS:
                result = self._run(folder, structure, settings, electrons, {"electrons": control}, share=share)
                iterations += result.iterations
                if result.occupations[:, -1].max() < TAIL:
                    break
                # A metal in an elongated cell, or a hot one: more bands, from the density that is there.
                control["startingpot"] = "file"
            else:
                raise EngineError(_full(result, settings))
            if not result.converged:
                raise ConvergenceError(
                    f"{structure.to_ase().get_chemical_formula()}: no self-consistency in {result.iterations} steps;"
                    " raise max_iterations or the smearing"
                )
            values = read_charge(folder / "gpurho.save" / "charge-density.dat", settings.grid)
        return Label(
            structure,
            values,
            self._energies(result, settings, len(structure), electrons, electrons),
            result.forces,
            electrons,
            settings,
            f"Quantum ESPRESSO {result.version}",
            iterations,
            time.monotonic() - started,
        )

    def one_shot(self, structure: Structure, density: NDArray[np.float64], settings: DFTSettings) -> Energies:
        """See `gpurho.dft.base.Engine`."""
        electrons = self._electrons(structure)
        settings = settings.at(structure)
        given = float(np.mean(density, dtype=np.float64)) * structure.volume
        values = check_density(structure, density, electrons)
        with self._folder() as folder:
            ewald = self._start_from(folder, structure, settings, values, steps=1)
            # The potential of the density and its double counting come from a run of no steps ...
            start: dict[str, Value] = {"electron_maxstep": 0, "startingpot": "file"}
            potential = self._run(folder, structure, settings, electrons, {"electrons": start}, forces=False)
            # ... the bands in that potential from a run that leaves the density alone.
            fixed: dict[str, dict[str, Value]] = {
                "control": {"calculation": "nscf"},
                "electrons": {"diago_thr_init": 1e-12, "diago_full_acc": True},
            }
            width = settings.smearing_hartree * HARTREE
            _, weights = settings.mesh(structure).points()
            for share in EXTRA_BANDS:
                bands = self._run(folder, structure, settings, electrons, fixed, forces=False, share=share)
                level = fermi_level(bands.eigenvalues, weights, electrons, width)
                if expit((level - bands.eigenvalues[:, -1].min()) / width) < TAIL:
                    break
            else:
                raise EngineError(_full(bands, settings))
        band, entropy = band_terms(bands.eigenvalues, weights, level, width)
        t = potential.terms
        free = band - t["ehart"] - t["vtxc"] + t["etxc"] + ewald + entropy
        terms = {**t, "etot": free, "eband": band, "demet": entropy}
        return self._energies(
            replace(bands, terms=terms, fermi_level=level), settings, len(structure), electrons, given
        )

    def write_restart(
        self, folder: Path, structure: Structure, settings: DFTSettings, density: NDArray[np.float64]
    ) -> list[Path]:
        """Lay down a ground state that starts from a density: ``pw.in``, UPF files and ``gpurho.save``.

        A run of no steps makes the list of plane waves first, so ``pw.x`` has to be here too, of the version that goes
        on. `density` is (nx, ny, nz) in e/angstrom^3.
        """
        electrons = self._electrons(structure)
        settings = settings.at(structure)
        self._start_from(folder, structure, settings, check_density(structure, density, electrons))
        control: dict[str, Value] = {**_scf(structure, settings), "startingpot": "file"}
        texts = {symbol: text for symbol, (text, _) in self.pseudos.items()}
        write_inputs(folder, structure, settings, electrons, {"electrons": control}, texts, settings.forces)
        # The wave functions are those of superposed atoms, and large.
        for used in (folder / "pw.out", *folder.glob("gpurho.wfc*"), *folder.glob("gpurho.save/wfc*")):
            used.unlink()
        upf = [folder / f"{symbol}.upf" for symbol in structure.symbols]
        return [folder / "pw.in", *upf, folder / "gpurho.save" / "charge-density.dat"]

    def _electrons(self, structure: Structure) -> float:
        return check_structure(structure, {symbol: valence for symbol, (_, valence) in self.pseudos.items()})

    # -- one run --------------------------------------------------------------------------------------------------

    def _folder(self) -> AbstractContextManager[Path]:
        return scratch_folder("qe", self.scratch)

    def _start_from(
        self, folder: Path, structure: Structure, settings: DFTSettings, density: NDArray[np.float64], steps: int = 0
    ) -> float:
        """Lay a density down where the next run reads it; a short run sets the list of plane waves.

        Returns the Ewald energy (eV), which only a run with a step computes.
        """
        electrons = self._electrons(structure)
        first = self._run(
            folder, structure, settings, electrons, {"electrons": {"electron_maxstep": steps}}, forces=False
        )
        replace_charge(folder / "gpurho.save" / "charge-density.dat", density)
        return first.terms["ewald"]

    def _run(
        self,
        folder: Path,
        structure: Structure,
        settings: DFTSettings,
        electrons: float,
        extra: Mapping[str, Mapping[str, Value]],
        forces: bool | None = None,
        share: float = EXTRA_BANDS[0],
    ) -> PwResult:
        texts = {symbol: text for symbol, (text, _) in self.pseudos.items()}
        forces = settings.forces if forces is None else forces
        write_inputs(folder, structure, settings, electrons, extra, texts, forces, share)
        kmesh = settings.mesh(structure)
        command = [self.command, "-in", "pw.in"]
        if self.processes > 1:
            pools = math.gcd(self.processes, len(kmesh.points()[0]))
            command = ["mpirun", "-np", str(self.processes), *command, "-nk", str(pools)]
        code = execute(command, folder, "pw.out", REMEDY)
        output = (folder / "pw.out").read_text(errors="replace")
        result = folder / "gpurho.save" / "data-file-schema.xml"
        if "JOB DONE" not in output or not result.is_file():
            raise EngineError(f"pw.x failed (exit code {code}): {_reason(output)}")
        return read_result(result)

    def _energies(
        self, result: PwResult, settings: DFTSettings, n_atoms: int, electrons: float, given: float
    ) -> Energies:
        assert settings.kmesh is not None
        points, weights = settings.kmesh.points()
        free, entropy = result.terms["etot"], result.terms.get("demet", 0.0)
        return Energies(
            free_energy=free,
            energy=free - entropy / 2,
            xc=result.terms["etxc"],
            entropy_term=entropy,
            band=result.terms["eband"],
            fermi_level=result.fermi_level,
            eigenvalues=result.eigenvalues,
            kpoints=points,
            weights=weights,
            n_atoms=n_atoms,
            electrons=electrons,
            electrons_given=given,
        )


def write_inputs(
    folder: Path,
    structure: Structure,
    settings: DFTSettings,
    electrons: float,
    extra: Mapping[str, Mapping[str, Value]] | None = None,
    pseudos: Mapping[str, str] | None = None,
    forces: bool = True,
    share: float = EXTRA_BANDS[0],
) -> None:
    """Write ``pw.in`` and the UPF files that it names.

    Parameters
    ----------
    folder : Path
    structure : Structure
    settings : DFTSettings
    electrons : float
        Valence electrons of the structure.
    extra : mapping of namelist to mapping, optional
        Entries added or replaced; by default those of a ground state.
    pseudos : mapping of symbol to text, optional
        UPF files; elements left out use GTH-PBE.
    forces : bool
    share : float
        Bands beyond the occupied ones, as a share of these.
    """
    occupied = math.ceil(electrons / 2)
    sections: dict[str, dict[str, Value]] = {
        "control": {
            "calculation": "scf",
            "prefix": "gpurho",
            "outdir": ".",
            "pseudo_dir": ".",
            # In 6.7 "nowf" writes no density either.
            "disk_io": "low",
            "tprnfor": forces,
        },
        "system": {
            "ibrav": 0,
            "nat": len(structure),
            "ntyp": len(structure.symbols),
            "ecutwfc": settings.energy_cutoff(structure) / RYDBERG,
            "ecutrho": DENSITY_CUTOFF * settings.energy_cutoff(structure) / RYDBERG,
            "nbnd": occupied + max(4, math.ceil(share * occupied)),
            "occupations": "smearing",
            "smearing": "fermi-dirac",
            "degauss": settings.smearing_hartree * 2,
            "nosym": True,
        },
        "electrons": {},
    }
    for name, values in ({"electrons": _scf(structure, settings)} if extra is None else extra).items():
        sections[name].update(values)
    given = pseudos or {}
    for symbol in structure.symbols:
        (folder / f"{symbol}.upf").write_text(given[symbol] if symbol in given else upf_text(symbol))
    text = input_text(structure, settings.mesh(structure), {s: f"{s}.upf" for s in structure.symbols}, sections)
    (folder / "pw.in").write_text(text)


def _scf(structure: Structure, settings: DFTSettings) -> dict[str, Value]:
    threshold = len(structure) / 32 * (settings.tolerance / ERROR_PER_ROOT) ** 2
    return {"electron_maxstep": settings.max_iterations, "conv_thr": threshold, **MIXING}


def _read_upf(path: Path) -> tuple[str, float]:
    """The text of a UPF file and its valence electrons; both versions of the format."""
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        raise EngineError(f"the pseudopotential {path} cannot be read: {error.strerror}; check the name") from None
    found = re.search(r'z_valence\s{0,99}=\s{0,99}"\s{0,99}([0-9.EeDd+-]{1,40})', text) or re.search(
        r"(?<![0-9.EeDd+-])([0-9.EeDd+-]{1,40})[ \t]{1,99}Z valence", text
    )
    if found is None:
        raise EngineError(f"{path} names no z_valence; give a UPF file")
    try:
        valence = float(found[1].upper().replace("D", "E"))
    except ValueError:
        valence = 0.0
    if not 0 < valence < 120:
        raise EngineError(f"{path} names {found[1][:40]!r} for z_valence; give a whole UPF file")
    return text, valence


def _full(result: PwResult, settings: DFTSettings) -> str:
    bands = result.eigenvalues.shape[1]
    return (
        f"the highest of {bands} bands is still occupied with smearing_hartree={settings.smearing_hartree:g};"
        " lower the smearing, or repeat the cell along its short vectors"
    )


def _reason(output: str) -> str:
    """What a failed run says of itself, in one line."""
    lines = [line.strip() for line in output.splitlines()]
    for i, line in enumerate(lines):
        if line.startswith("Error in routine"):
            return f"{line.rstrip(':')}: {lines[i + 1] if i + 1 < len(lines) else ''}"
    said = [line for line in lines if line and not set(line) <= set("%=-")]
    return said[-1] if said else "no output"
