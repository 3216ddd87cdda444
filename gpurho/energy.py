"""Energies of a density: Harris-Foulkes through a DFT engine, beside the self-consistent ones where they are asked for.

One diagonalisation in the potential of a predicted density gives its total energy with an error of second order in that
of the density, its Fermi level and its eigenvalues with one of first order, like its exchange-correlation energy.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from gpurho.density import Density
from gpurho.dft.base import DFTSettings, Energies, Engine, Label
from gpurho.dft.engines import make_engine
from gpurho.dft.grids import fourier_resample
from gpurho.errors import GridError, SettingsError, StoreError, StructureError
from gpurho.metrics import l1_per_electron
from gpurho.structure import Structure, as_structure
from gpurho.units import HARTREE

if TYPE_CHECKING:
    from ase import Atoms

CELL_TOLERANCE = 1e-4
"""Largest difference of two cells that count as one, relative to their longest vector."""

POSITION_TOLERANCE = 0.01
"""Largest distance, angstrom, between the atoms of a density and those it is used for."""


@dataclass(frozen=True, eq=False)
class EnergyReport:
    """Energies of a density.

    Attributes
    ----------
    harris : Energies
        Of the density that was given, rescaled to the number of electrons; eV.
    scf : Label or None
        The self-consistent ground state of the same atoms.
    density_l1 : float or None
        Integral of the absolute difference of the two densities, per electron; the given one as rescaled.
    engine : str
    settings : DFTSettings
        With cutoff, k-mesh and grid as they were.
    grid : 3 ints
        Points of the density that was given.

    Notes
    -----
    Fermi level and eigenvalues are in the engine's own zero of potential: compare them within one engine only.
    """

    harris: Energies
    scf: Label | None
    density_l1: float | None
    engine: str
    settings: DFTSettings
    grid: tuple[int, int, int]

    @property
    def free_energy(self) -> float:
        """Free energy of the density (Harris-Foulkes), eV."""
        return self.harris.free_energy

    @property
    def energy(self) -> float:
        """Energy extrapolated to zero smearing, eV."""
        return self.harris.energy

    @property
    def xc(self) -> float:
        """Exchange-correlation energy of the density, eV."""
        return self.harris.xc

    @property
    def fermi_level(self) -> float:
        """Fermi level, eV."""
        return self.harris.fermi_level

    @property
    def eigenvalues(self) -> NDArray[np.float64]:
        """Eigenvalues (n_kpoints, n_bands), eV."""
        return self.harris.eigenvalues

    @property
    def per_atom(self) -> dict[str, float]:
        """free_energy, energy and xc in eV per atom."""
        return _per_atom(self.harris)

    @property
    def differences(self) -> dict[str, float] | None:
        """From the self-consistent values, Harris-Foulkes less SCF; None where there is no SCF.

        free_energy, energy, xc and fermi_level in eV; the first three also in mHa per atom (``*_mha_per_atom``);
        eigenvalue_rms in eV, weighted by the occupations; density_l1 per electron.
        """
        if self.scf is None or self.density_l1 is None:
            return None
        ours, theirs = self.harris, self.scf.energies
        result = {}
        for name in ("free_energy", "energy", "xc"):
            difference = getattr(ours, name) - getattr(theirs, name)
            result[name] = difference
            result[f"{name}_mha_per_atom"] = 1000.0 * difference / HARTREE / ours.n_atoms
        result["fermi_level"] = ours.fermi_level - theirs.fermi_level
        result["eigenvalue_rms"] = _eigenvalue_rms(ours, theirs, self.settings.smearing_hartree * HARTREE)
        result["density_l1"] = self.density_l1
        return result

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON; eigenvalues are left to `write`."""
        return {
            "engine": self.engine,
            "settings": self.settings.to_dict(),
            "grid": list(self.grid),
            "n_atoms": self.harris.n_atoms,
            "electrons": self.harris.electrons,
            "electrons_given": self.harris.electrons_given,
            "harris": _plain(self.harris),
            "scf": None if self.scf is None else _plain(self.scf.energies),
            "differences": self.differences,
        }

    def write(self, path: str | os.PathLike[str]) -> Path:
        """Eigenvalues with k-points, weights and Fermi levels, and all energies, to ``*.h5`` or ``*.npz``.

        Names are those of `Energies`; those of the self-consistent state have ``scf_`` before them. Energies in eV,
        k-points in reciprocal vectors. The file is written whole or not at all.
        """
        target = check_target(path)
        values = _arrays(self.harris, "")
        if self.scf is not None and self.density_l1 is not None:
            values |= _arrays(self.scf.energies, "scf_") | {"density_l1": np.array(self.density_l1)}
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, "wb+") as file:
                if target.suffix == ".npz":
                    np.savez_compressed(file, **values)  # type: ignore[arg-type]
                else:
                    import h5py

                    with h5py.File(file, "w") as root:
                        root.attrs["engine"], root.attrs["unit"] = self.engine, "eV"
                        root.attrs["format"], root.attrs["format_version"] = "gpurho-energies", 1
                        for name, value in values.items():
                            root.create_dataset(name, data=value).flush()  # else a full disk goes unnoticed
                        root.flush()
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, target)
        except OSError as error:
            raise StoreError(f"{target} cannot be written: {error.strerror}; what was there is unchanged") from None
        finally:
            temporary.unlink(missing_ok=True)
        return target

    def __str__(self) -> str:
        h, n = self.harris, self.harris.n_atoms
        columns = [("density", h)] if self.scf is None else [("density", h), ("SCF", self.scf.energies)]
        mesh = self.settings.kmesh
        lines = [
            f"{n} atoms, {h.electrons:g} electrons (the density had {h.electrons_given:.6g});"
            f" {self.engine}, {self.settings.cutoff:g} eV, k-mesh {mesh}, kT {self.settings.smearing_hartree:g} Ha",
            f"{'':24}" + "".join(f"{name:>18}" for name, _ in columns) + ("" if self.scf is None else _HEAD),
        ]
        rows = (
            ("free energy, eV", "free_energy"),
            ("energy (kT to 0), eV", "energy"),
            ("exchange-correlation, eV", "xc"),
            ("Fermi level, eV", "fermi_level"),
        )
        differences = self.differences
        for text, name in rows:
            line = f"{text:24}" + "".join(f"{getattr(e, name):18.6f}" for _, e in columns)
            if differences is not None:
                line += f"{differences[name]:14.6f}"
                if name != "fermi_level":
                    line += f"{differences[f'{name}_mha_per_atom']:12.4f}"
            lines.append(line)
        per_atom = self.per_atom
        lines.append(f"per atom: free energy {per_atom['free_energy']:.6f} eV, xc {per_atom['xc']:.6f} eV")
        if differences is not None:
            lines.append(
                f"density error {100 * differences['density_l1']:.3f} % L1 per electron; occupied eigenvalues"
                f" {differences['eigenvalue_rms']:.4f} eV RMS"
            )
        wanted = self.settings.grid
        if wanted is not None and any(n < m for n, m in zip(self.grid, wanted, strict=True)):
            lines.append(
                f"note: the density's grid, {'x'.join(map(str, self.grid))}, is coarser than"
                f" {'x'.join(map(str, wanted))} of a label at this cutoff: its short waves are missing"
            )
        return "\n".join(lines)


_HEAD = f"{'difference':>14}{'mHa/atom':>12}"


def energies(
    atoms: Atoms | Structure,
    density: Density | NDArray[np.floating] | str | os.PathLike[str],
    engine: str | Engine = "qe",
    settings: DFTSettings | None = None,
    self_consistent: bool = False,
    progress: Callable[[str], None] | None = None,
) -> EnergyReport:
    """Energies of a density by one diagonalisation in its own potential (Harris-Foulkes).

    Parameters
    ----------
    atoms : ase.Atoms or Structure
    density : Density, (nx, ny, nz) array in e/angstrom^3, or path
        Of the whole cell, at fractional coordinates (i/nx, j/ny, k/nz); files as in `gpurho.formats.read_density`.
        It is rescaled to the number of valence electrons.
    engine : "qe", "gpaw", "sparc" or Engine
    settings : DFTSettings, optional
        Cutoff, k-points, smearing. Take those of the labels that the density's model was trained on.
    self_consistent : bool
        Also find the ground state, and compare. It starts from the density.
    progress : callable, optional
        Told what is being computed.

    Raises
    ------
    StructureError, UnknownSpeciesError
        Where the engine cannot do the structure, or the density belongs to other atoms.
    GridError
        Where the grid of the density does not span the cell of the atoms.
    EngineError, ConvergenceError, MissingDependencyError
    """
    structure = as_structure(atoms)
    solver = make_engine(engine) if isinstance(engine, str) else engine
    used = (settings or DFTSettings()).at(structure)
    values = density_values(structure, density)

    def tell(text: str) -> None:
        if progress is not None:
            progress(text)

    tell(f"one diagonalisation with {solver.name}")
    harris = solver.one_shot(structure, values, used)
    grid = (values.shape[0], values.shape[1], values.shape[2])
    if not self_consistent:
        return EnergyReport(harris, None, None, solver.name, used, grid)
    tell(f"self-consistency with {solver.name}")
    label = solver.ground_state(structure, used, density=values)
    reference = fourier_resample(label.density, values.shape)
    rescaled = values * (harris.electrons / harris.electrons_given)
    l1 = l1_per_electron(reference, rescaled, harris.electrons, structure.volume / values.size)
    return EnergyReport(harris, label, l1, label.engine, used, grid)


def density_values(
    structure: Structure, density: Density | NDArray[np.floating] | str | os.PathLike[str]
) -> NDArray[np.float64]:
    """The values of a density for a structure, (nx, ny, nz) in e/angstrom^3, once it is sure that they are its own.

    Raises
    ------
    GridError
        Where the grid does not span the cell.
    StructureError
        Where the density names other atoms.
    """
    if isinstance(density, str | os.PathLike):
        # A density in memory needs no readers.
        from gpurho.formats import read_density

        with read_density(Path(density)) as found:
            return density_values(structure, found)
    if not isinstance(density, Density):
        return np.asarray(density, dtype=np.float64)
    cell, grid = structure.cell, density.grid
    scale = float(np.linalg.norm(cell, axis=1).max())
    off = float(np.abs(grid.cell - cell).max())
    if off > CELL_TOLERANCE * scale or not np.allclose(grid.origin, 0, atol=CELL_TOLERANCE * scale):
        raise GridError(
            f"the density's grid has cell {np.round(grid.cell, 4).tolist()} from {np.round(grid.origin, 4).tolist()},"
            f" the atoms have {np.round(cell, 4).tolist()}; give a density of the whole cell of these atoms"
        )
    check_same_atoms(structure, density.structure)
    return np.asarray(density.mean, dtype=np.float64)


def check_same_atoms(structure: Structure, other: Structure) -> None:
    """Raise `StructureError` unless both hold the same atoms, in any order and any periodic image."""
    if sorted(structure.numbers.tolist()) != sorted(other.numbers.tolist()):
        ours, theirs = (s.to_ase().get_chemical_formula() for s in (structure, other))
        raise StructureError(f"the density is of {theirs}, the atoms are {ours}; give those that belong together")
    from scipy.spatial import cKDTree

    inverse = np.linalg.inv(structure.cell)
    worst = 0.0
    for z in np.unique(structure.numbers):
        ours, theirs = ((s.positions[s.numbers == z] @ inverse) % 1.0 % 1.0 for s in (structure, other))
        # Fractional coordinates find the partner across a face; its distance is then taken in angstrom.
        _, partner = cKDTree(theirs, boxsize=1.0).query(ours)
        step = ours - theirs[partner]
        worst = max(worst, float(np.linalg.norm((step - np.round(step)) @ structure.cell, axis=1).max()))
        if len(np.unique(partner)) < len(partner):
            worst = max(worst, np.inf)
    if worst > POSITION_TOLERANCE:
        how = "two of its atoms are one of ours" if np.isinf(worst) else f"an atom is off by {worst:.3g} angstrom"
        raise StructureError(f"the density belongs to other positions: {how}; give the atoms it was made for")


def check_target(path: str | os.PathLike[str]) -> Path:
    """A file name that `EnergyReport.write` can write; raises `SettingsError` for any other."""
    target = Path(path)
    if target.suffix not in (".h5", ".hdf5", ".npz"):
        raise SettingsError(f"{target}: the name does not say the format; give *.h5 or *.npz")
    if not target.parent.is_dir():
        raise SettingsError(f"folder {str(target.parent)!r} does not exist; make it first")
    return target


def _per_atom(e: Energies) -> dict[str, float]:
    return {name: getattr(e, name) / e.n_atoms for name in ("free_energy", "energy", "xc")}


def _plain(e: Energies) -> dict[str, Any]:
    names = ("free_energy", "energy", "xc", "entropy_term", "band", "fermi_level")
    return {**{name: getattr(e, name) for name in names}, "per_atom": _per_atom(e)}


def _arrays(e: Energies, prefix: str) -> dict[str, NDArray[np.floating]]:
    names = ("eigenvalues", "kpoints", "weights", "free_energy", "energy", "xc", "entropy_term", "fermi_level")
    return {prefix + name: np.asarray(getattr(e, name), dtype=np.float64) for name in names}


def _eigenvalue_rms(ours: Energies, theirs: Energies, width: float) -> float:
    """Root mean square difference of the eigenvalues, weighted by k-points and the occupations of the second."""
    bands = min(ours.eigenvalues.shape[1], theirs.eigenvalues.shape[1])
    a, b = ours.eigenvalues[:, :bands], theirs.eigenvalues[:, :bands]
    weights = theirs.weights[:, None] * expit((theirs.fermi_level - b) / width)
    return float(np.sqrt(np.sum(weights * (a - b) ** 2) / weights.sum()))
