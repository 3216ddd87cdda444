"""GPAW as an engine: plane waves, GTH-PBE pseudopotentials, Fermi-Dirac occupations, any k-mesh."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.base import DFTSettings, Energies, KMesh, Label, check_density, check_structure
from gpurho.dft.grids import atomic_superposition, fourier_resample
from gpurho.errors import ConvergenceError, EngineError, GpurhoError, MissingDependencyError
from gpurho.structure import Structure
from gpurho.units import HARTREE, PER_ANGSTROM3, PER_BOHR3

REMEDY = "install it with pip install 'gpurho[dft]', after Debian's libxc-dev and libopenblas-dev (GPAW is compiled)"

MAX_OCCUPATION = 1e-6
"""Largest occupation of the highest band that is reported; with more, the calculation is repeated with more bands."""

ONE_SHOT_RESIDUAL = 1e-7
"""Squared residual of all reported one-shot eigenstates, eV^2 per electron."""

FOLLOWED, FOLLOW_STEPS = 1e-5, 6
"""Before self-consistency the wave functions follow the start density: to this squared residual, eV^2 per electron, or
in so many steps."""

_HARMLESS = r"Using OMP_NUM_THREADS>1 in PW-mode is not useful!"


class GpawEngine:
    """GPAW 26.7 or newer, in this process.

    Parameters
    ----------
    txt : path, optional
        GPAW's own log goes there, that of the last calculation; without it, it is dropped.
    mixer : dict, optional
        GPAW's mixer; Pulay's by default, because GPAW's own default overshoots on alloys.

    Raises
    ------
    MissingDependencyError
        Where GPAW cannot be imported.
    """

    name = "gpaw"

    def __init__(self, txt: str | PathLike[str] | None = None, mixer: dict[str, Any] | None = None) -> None:
        import_gpaw()
        self.txt = None if txt is None else Path(txt)
        self.mixer = mixer or {"name": "pulay", "beta": 0.25, "nmaxold": 10, "weight": 50.0}

    def ground_state(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64] | None = None
    ) -> Label:
        """Self-consistent density, energies and forces; see `Engine.ground_state`."""
        started = time.perf_counter()
        electrons = check_structure(structure)
        settings = settings.at(structure)
        shape = settings.fft_shape(structure)
        if density is None:
            start = atomic_superposition(structure, shape)
        else:
            start = fourier_resample(check_density(structure, density, electrons), shape)
        dft, reported, steps = self._solve(structure, settings, start, electrons, fixed=False)
        with _failures(structure, settings):
            forces = np.array(dft.calculate_forces()) if settings.forces else None
        field = fourier_resample(_field(dft), settings.shape(structure))
        field *= electrons / (field.mean() * structure.volume)
        return Label(
            structure=structure,
            density=field,
            energies=_energies(dft, reported, len(structure), electrons, electrons),
            forces=forces,
            electrons=electrons,
            settings=settings,
            engine=f"gpaw {version('gpaw')}",
            iterations=steps,
            seconds=time.perf_counter() - started,
        )

    def one_shot(self, structure: Structure, density: NDArray[np.float64], settings: DFTSettings) -> Energies:
        """Harris-Foulkes energies: one tight diagonalisation in the density's own potential; see `Engine.one_shot`.

        Notes
        -----
        F = sum of occupied eigenvalues - integral n v + E_H[n] + E_xc[n] + E_ion - TS with the given density n
        throughout: J. Harris, Phys. Rev. B 31, 1770 (1985). Its error is of second order in that of n.
        """
        electrons = check_structure(structure)
        rescaled = check_density(structure, density, electrons)
        given = float(np.mean(density, dtype=np.float64)) * structure.volume
        settings = settings.at(structure)
        field = fourier_resample(rescaled, settings.fft_shape(structure))
        dft, reported, _ = self._solve(structure, settings, field, electrons, fixed=True)
        return _energies(dft, reported, len(structure), electrons, given)

    def _solve(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64], electrons: float, fixed: bool
    ) -> tuple[Any, int, int]:
        """A finished calculation, its number of bands to report, and its steps; `density` is kept where `fixed`."""
        with _failures(structure, settings):
            # Bands up to some 15 kT above the Fermi level, in a metal about a tenth of the occupied ones.
            bands = int(np.ceil(0.5 * electrons * 1.1)) + 4
            steps = 0
            while True:
                dft = self._run(structure, settings, density, bands, fixed)
                steps += int(dft.scf_loop.niter)
                occupations = dft.ibzwfs.get_all_eigs_and_occs()[1][0]
                if occupations[:, bands - 1].max() < MAX_OCCUPATION:
                    return dft, bands, steps
                bands = int(1.3 * bands) + 2
                if not fixed:
                    density = _field(dft)

    def _run(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64], bands: int, fixed: bool
    ) -> Any:
        from gpaw.dft import Parameters
        from gpaw.mpi import world
        from gpaw.new.calculation import DFT
        from gpaw.new.logger import Logger

        from gpurho.dft._gpaw_setups import gth_setup

        tolerance = settings.tolerance
        if fixed:
            convergence: dict[str, Any] = {"eigenstates": ONE_SHOT_RESIDUAL, "bands": bands}
        else:
            # The residual's square root goes with the density's error, as in GPAW's defaults of 4e-8 and 1e-4.
            convergence = {
                "density": tolerance,
                "eigenstates": max(4e-8 * (tolerance / 1e-4) ** 2, 1e-15),
                "energy": max(tolerance, 1e-8),
            }
        parameters = Parameters(
            mode={"name": "pw", "ecut": settings.energy_cutoff(structure)},
            xc=settings.xc,
            gpts=list(density.shape),
            kpts=full_mesh(settings.mesh(structure)),
            symmetry={"point_group": False},
            setups={symbol: gth_setup(symbol) for symbol in structure.symbols},
            occupations={"name": "fermi-dirac", "width": settings.smearing_hartree * HARTREE},
            # The highest few bands converge slowly; they are there to speed up the ones below.
            nbands=bands + max(6, bands // 10),
            # With the potential fixed, many steps at once; else few, because it changes anyway.
            eigensolver={"name": "ppcg", "niter": 8} if fixed else {"name": "davidson", "niter": 2},
            mixer=self.mixer,
            convergence=convergence,
            maxiter=max(settings.max_iterations, 200) if fixed else settings.max_iterations,
        )
        atoms = structure.to_ase()
        log = Logger(self.txt, cast(Any, world))
        builder = parameters.dft_component_builder(atoms, log=log, comm=world)
        basis = builder.create_basis_set()
        # The Hamiltonian has a plan of Fourier transforms that the rest shares: the loop comes first.
        loop = builder.create_scf_loop()
        calculator = builder.create_potential_calculator()
        field = builder.density_from_superposition(basis)
        field.nt_sR.data[0] = density * PER_ANGSTROM3
        field.normalize(0.0)
        potential, energies, _ = calculator.calculate_without_orbitals(field)
        waves = builder.create_ibz_wave_functions(basis, potential)
        loop.update_density_and_potential = False
        if fixed:
            for criterion in ("energy", "density"):
                loop.convergence.pop(criterion)
        dft = DFT.from_components(
            atoms,
            waves,
            field,
            potential,
            builder.setups,
            loop,
            calculator,
            log,
            params=parameters,
            energies=energies,
            converge=False,
        )
        if not fixed:
            # The first wave functions are rough; until they follow the density, theirs would be worse than the given.
            for step, context in enumerate(dft.iconverge(), 1):
                residual = context.wfs.eigensolver.error * HARTREE**2 / context.wfs.nvalence
                if residual < FOLLOWED or step == FOLLOW_STEPS:
                    break
            loop.update_density_and_potential = True
        dft.converge()
        return dft


def import_gpaw() -> None:
    """Raise `MissingDependencyError` where GPAW's new interface is not there."""
    try:
        import gpaw.dft
        import gpaw.new.calculation  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(f"the engine 'gpaw' needs GPAW 26.7 or newer ({error}); {REMEDY}") from None


def full_mesh(mesh: KMesh) -> list[list[float]]:
    """All points of a mesh; GPAW finds the pairs k, -k itself and takes one of each."""
    points, weights = mesh.points()
    twice = np.round(weights * np.prod(mesh.size)) > 1
    return np.concatenate([points, -points[twice]]).tolist()


@contextmanager
def _failures(structure: Structure, settings: DFTSettings) -> Iterator[None]:
    """GPAW's errors as ours, and its warnings heard: one that says that results may be wrong is an error."""
    # Where GPAW is not installed, pyright takes this file for it.
    from gpaw import KohnShamConvergenceError  # pyright: ignore[reportAttributeAccessIssue]

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=_HARMLESS)
        warnings.filterwarnings("error", message="The angles between your unit-cell vectors")
        try:
            yield
        except (GpurhoError, MemoryError, OSError):
            raise
        except KohnShamConvergenceError:
            raise ConvergenceError(
                f"GPAW did not converge {structure.to_ase().get_chemical_formula()} (tolerance {settings.tolerance:g})"
                f" in {settings.max_iterations} steps; raise max_iterations, the tolerance or the smearing"
            ) from None
        except Exception as error:  # each part of GPAW and of the libraries below it fails in its own way
            reason = " ".join((str(error) or type(error).__name__).split())
            raise EngineError(f"GPAW failed: {reason[:300]}; check the structure, or pass txt= for its log") from error


def _field(dft: Any) -> NDArray[np.float64]:
    """The density of a calculation on its own grid, e/angstrom^3."""
    return np.array(dft.density.nt_sR.data[0], dtype=np.float64) * PER_BOHR3


def _energies(dft: Any, bands: int, n_atoms: int, electrons: float, given: float) -> Energies:
    """The energies of a finished calculation, in eV."""
    eigenvalues = dft.ibzwfs.get_all_eigs_and_occs()[0][0]
    parts = dft.energies._energies
    free = float(dft.energies.total_free) * HARTREE
    entropy = float(parts["entropy"]) * HARTREE
    return Energies(
        free_energy=free,
        energy=free - 0.5 * entropy,
        xc=float(parts["xc"]) * HARTREE,
        entropy_term=entropy,
        band=float(parts["band"]) * HARTREE,
        fermi_level=float(dft.ibzwfs.fermi_level) * HARTREE,
        eigenvalues=np.array(eigenvalues[:, :bands]) * HARTREE,
        kpoints=np.array(dft.ibzwfs.ibz.kpt_kc),
        weights=np.array(dft.ibzwfs.ibz.weight_k),
        n_atoms=n_atoms,
        electrons=electrons,
        electrons_given=given,
    )
