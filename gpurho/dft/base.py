"""What every DFT engine takes and gives: settings, k-meshes, labels, energies, and the protocol itself.

Values are in angstrom, eV and e/angstrom^3; names that end in ``_hartree`` are in Hartree.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.gth import gth
from gpurho.errors import SettingsError, StructureError
from gpurho.structure import Structure, cell_heights
from gpurho.units import BOHR, HARTREE

MIN_DISTANCE = 0.7
"""Atoms closer than this (angstrom) are refused before any work."""

MAX_REACH = 200.0
"""Longest reach of a k-mesh that is looked for, angstrom."""

MAX_ASPECT = 20.0
"""Largest ratio of the longest cell vector to the smallest height that a plane-wave engine is asked to do."""

CUTOFFS = {"Al": 400.0, "Si": 400.0, "Ge": 500.0}
"""Plane-wave cutoffs in eV. The density differs from that at 800 eV by 0.13 % (Al, 600 eV), 0.17 % (Si), 0.26 % (SiGe),
0.43 % (Ge), L1 per electron; at 600 eV, from this one by under 0.3 % each. Measured on rattled cells."""

OTHER_CUTOFF = 600.0
"""Cutoff for elements that were not measured, eV: converge it before use."""

REACH = 0.8
"""Share of a density's largest wave vector that its grid resolves: beyond it lie 1.5e-5 of the density, L1 per electron
(Al 4e-6, SiGe 1.5e-5), and the grid has half as many points."""


@dataclass(frozen=True)
class KMesh:
    """A regular mesh of k-points.

    Parameters
    ----------
    size : 3 ints
        Divisions along the reciprocal vectors.
    shift : 3 floats, steps of the mesh
        0 has Gamma in the mesh, 0.5 is the usual shifted mesh of Monkhorst and Pack.

    Notes
    -----
    Point (i, j, k) is ``((i + s1) / n1, (j + s2) / n2, (k + s3) / n3)`` in reciprocal vectors. k and -k have the same
    density (time reversal), so a mesh with shift 0.25, which holds no -k of its points, does the work of twice as many.
    """

    size: tuple[int, int, int] = (1, 1, 1)
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        size, shift = tuple(self.size), tuple(self.shift)
        if len(size) != 3 or any(int(n) != n or not 1 <= n <= 64 for n in size):
            raise SettingsError(f"k-mesh {self.size!r} is not one; give three whole numbers from 1 to 64")
        if len(shift) != 3 or any(not 0 <= s < 1 for s in shift):
            raise SettingsError(f"k-mesh shift {self.shift!r} is not one; give three numbers from 0 to below 1")
        object.__setattr__(self, "size", tuple(int(n) for n in size))
        object.__setattr__(self, "shift", tuple(float(s) for s in shift))

    @property
    def is_gamma(self) -> bool:
        """Whether the mesh is the Gamma point alone, where orbitals can be real."""
        return self.size == (1, 1, 1) and self.shift == (0.0, 0.0, 0.0)

    def points(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Points (n, 3) in reciprocal vectors, from -1/2 to below 1/2, and weights (n,) that sum to 1.

        One of each pair k, -k is kept.
        """
        index = np.stack(np.meshgrid(*(np.arange(n) for n in self.size), indexing="ij"), -1).reshape(-1, 3)
        size, shift = np.array(self.size), np.array(self.shift)
        points = (index + shift) / size
        points -= np.floor(points + 0.5 + 1e-12)
        if any((2 * s) % 1 > 1e-9 for s in self.shift):
            return points, np.full(len(points), 1 / len(points))  # no -k of a point is a point
        partner = (-index - np.rint(2 * shift).astype(int)) % size @ np.array([size[1] * size[2], size[2], 1])
        order = np.arange(len(points))
        kept = order <= partner
        return points[kept], np.where(order < partner, 2.0, 1.0)[kept] / len(points)

    def count(self) -> int:
        """Number of `points`, without making them."""
        if any((2 * s) % 1 > 1e-9 for s in self.shift):
            return math.prod(self.size)  # no -k of a point is a point
        own = [sum((2 * (i + s) / n) % 1 < 1e-9 for i in range(n)) for n, s in zip(self.size, self.shift, strict=True)]
        return (math.prod(self.size) + math.prod(own)) // 2

    def reach(self, cell: NDArray[np.float64], limit: float = 100.0) -> float:
        """Length of the shortest lattice vector that the mesh does not tell from none, angstrom; at most `limit`.

        A sum over the mesh stands for the integral over the zone, but for its Fourier terms at such vectors: periods of
        the supercell ``size * cell`` whose phase at the shift has a real part. The density of a crystal converges
        exponentially with this length (Moreno and Soler, Phys. Rev. B 45, 13891 (1992)).
        """
        periods = np.array(self.size)[:, None] * np.asarray(cell, float)
        bounds = [int(limit / height) + 1 for height in cell_heights(periods)]
        m = np.stack(np.meshgrid(*(np.arange(-b, b + 1) for b in bounds), indexing="ij"), -1).reshape(-1, 3)
        seen = (np.abs(np.cos(2 * np.pi * m @ np.array(self.shift))) > 1e-9) & m.any(axis=1)
        return min(limit, float(np.linalg.norm(m[seen] @ periods, axis=1).min(initial=limit)))

    @classmethod
    def from_reach(cls, cell: NDArray[np.float64], reach: float) -> KMesh:
        """The mesh with the fewest points whose `reach` is at least this long (angstrom), shifted by 0, 1/4 or 1/2."""
        if not (np.isfinite(reach) and 0 < reach <= MAX_REACH):
            raise SettingsError(f"k-mesh reach {reach!r} is none; give angstrom up to {MAX_REACH:g}, for instance 21.5")
        most = [int(np.ceil(reach / height - 1e-9)) for height in cell_heights(np.asarray(cell, float))]
        if max(most) > 64:
            raise SettingsError(
                f"a cell this flat takes a mesh of {max(most)} points along one vector; repeat the cell"
            )
        ranges = [range(max(1, n // 2), max(1, n) + 1) for n in most]
        meshes = [
            cls((i, j, k), (shift, shift, shift))
            for i, j, k in itertools.product(*ranges)
            for shift in (0.25, 0.5, 0.0)
        ]
        found: list[KMesh] = []
        for mesh in sorted(meshes, key=KMesh.count):
            if found and mesh.count() > found[0].count():
                break
            if mesh.reach(cell, reach) >= reach - 1e-6:
                found.append(mesh)
        # Among meshes that cost the same, the one that reaches farthest.
        return min(found, key=lambda mesh: (-round(mesh.reach(cell, 2 * reach), 6), mesh.size))

    @classmethod
    def from_density(cls, cell: NDArray[np.float64], density: float, shift: Sequence[float] = (0, 0, 0)) -> KMesh:
        """The smallest mesh with at least `density` points per 1/angstrom along each vector (ASE's measure)."""
        if not (np.isfinite(density) and density > 0):
            raise SettingsError(f"k-mesh density {density!r} is none; give points per 1/angstrom, for instance 2.5")
        lengths = 2 * np.pi * np.linalg.norm(np.linalg.inv(np.asarray(cell, float)), axis=0)
        size = [max(1, int(np.ceil(density * length - 1e-9))) for length in lengths]
        return cls((size[0], size[1], size[2]), (float(shift[0]), float(shift[1]), float(shift[2])))

    def __str__(self) -> str:
        name = "x".join(map(str, self.size))
        if not any(self.shift):
            return name
        return f"{name} shifted by {', '.join(f'{s:g}' for s in self.shift)}"


@dataclass(frozen=True)
class DFTSettings:
    """What is computed, apart from the engine that does it.

    Parameters
    ----------
    cutoff : float, eV, optional
        Kinetic energy of the largest plane wave; by default the largest of `CUTOFFS` over the elements.
    kmesh : KMesh or None
        A fixed mesh.
    k_reach : float, angstrom
        Otherwise the mesh is the cheapest that reaches so far; see `KMesh.reach`. Measured: with 22 angstrom the
        density of aluminium stands 0.2 (315 K) to 0.3 % (1866 K) L1 per electron from a converged one, with 16 0.8 %.
    k_density : float, points per 1/angstrom, optional
        Instead of a reach, the smallest mesh that is as dense (ASE's measure), shifted by `k_shift` steps.
    smearing_hartree : float, Hartree
        Width kT of the Fermi-Dirac occupations; 0.002 Ha is 631.554 K.
    xc : str
        Exchange-correlation functional.
    grid : 3 ints, optional
        Points of the density; by default the smallest good grid that holds its plane waves up to `REACH`.
    tolerance : float
        Self-consistency: the density is converged to about this L1 error per electron.
    max_iterations : int
        Self-consistency steps before the calculation counts as failed.
    forces : bool
        Whether forces are computed.
    """

    cutoff: float | None = None
    kmesh: KMesh | None = None
    k_reach: float = 21.5
    k_density: float | None = None
    k_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    smearing_hartree: float = 0.002
    xc: str = "PBE"
    grid: tuple[int, int, int] | None = None
    tolerance: float = 5e-5
    max_iterations: int = 100
    forces: bool = True

    def __post_init__(self) -> None:
        if self.kmesh is not None and not isinstance(self.kmesh, KMesh):
            raise SettingsError(f"kmesh {self.kmesh!r} is no KMesh; give KMesh({self.kmesh!r})")
        for name, low, high in (
            ("cutoff", 50.0, 5000.0),
            ("smearing_hartree", 1e-6, 0.1),
            ("tolerance", 1e-10, 1e-2),
            ("max_iterations", 1, 10000),
        ):
            value = getattr(self, name)
            if value is None and name == "cutoff":
                continue
            if not (isinstance(value, Real) and low <= float(value) <= high):
                raise SettingsError(f"{name} {value!r} cannot be used; give {low:g} to {high:g}")
        if self.xc != "PBE":
            raise SettingsError(f"xc {self.xc!r} is not offered; the pseudopotentials are made for 'PBE'")
        if self.grid is not None and (len(self.grid) != 3 or any(int(n) != n or n < 4 for n in self.grid)):
            raise SettingsError(f"grid {self.grid!r} is not one; give three whole numbers from 4")

    def mesh(self, structure: Structure) -> KMesh:
        """The k-mesh for a structure."""
        if self.kmesh is not None:
            return self.kmesh
        if self.k_density is not None:
            return KMesh.from_density(structure.cell, self.k_density, self.k_shift)
        return KMesh.from_reach(structure.cell, self.k_reach)

    def energy_cutoff(self, structure: Structure) -> float:
        """The plane-wave cutoff for a structure, eV."""
        if self.cutoff is not None:
            return self.cutoff
        return max(CUTOFFS.get(symbol, OTHER_CUTOFF) for symbol in structure.symbols)

    def shape(self, structure: Structure) -> tuple[int, int, int]:
        """The grid of the density for a structure: sizes that an FFT likes."""
        if self.grid is not None:
            return (int(self.grid[0]), int(self.grid[1]), int(self.grid[2]))
        return self._grid(structure, REACH)

    def fft_shape(self, structure: Structure) -> tuple[int, int, int]:
        """The smallest good grid that holds every plane wave of the density; what an engine computes on."""
        return self._grid(structure, 1.0)

    def _grid(self, structure: Structure, reach: float) -> tuple[int, int, int]:
        # A density has waves up to twice the largest of the orbitals, in both directions.
        largest = 2.0 * np.sqrt(2.0 * self.energy_cutoff(structure) / HARTREE) / BOHR
        lengths = np.linalg.norm(structure.cell, axis=1)
        low = [int(np.ceil(reach * 2 * largest * length / (2 * np.pi))) for length in lengths]
        return (good_size(low[0]), good_size(low[1]), good_size(low[2]))

    def at(self, structure: Structure) -> DFTSettings:
        """These settings with cutoff, mesh and grid fixed to what they are for a structure."""
        return replace(
            self,
            cutoff=self.energy_cutoff(structure),
            kmesh=self.mesh(structure),
            grid=self.shape(structure),
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def good_size(low: int) -> int:
    """The smallest even number from `low` up whose prime factors are 2, 3, 5 or 7."""
    n = low + low % 2
    while True:
        rest = n
        for p in (2, 3, 5, 7):
            while rest % p == 0:
                rest //= p
        if rest == 1:
            return n
        n += 2


@dataclass(frozen=True, eq=False)
class Energies:
    """Energies of a density: self-consistent, or Harris-Foulkes at a given one.

    Attributes
    ----------
    free_energy : float, eV
        With the entropy of the smeared occupations: the variational quantity.
    energy : float, eV
        Extrapolated to zero smearing, (E + F) / 2.
    xc : float, eV
        Exchange-correlation energy of the input density.
    entropy_term : float, eV
        -TS, not positive.
    band : float, eV or None
        Sum of occupied eigenvalues.
    fermi_level : float, eV
        In the engine's own zero of potential: compare within one engine only.
    eigenvalues : (n_kpoints, n_bands) array, eV
    kpoints : (n_kpoints, 3) array, reciprocal vectors
    weights : (n_kpoints,) array
        Sum to 1.
    n_atoms : int
    electrons : float
    electrons_given : float
        Integral of the density that was given, before it was rescaled; equal to `electrons` for an SCF.
    """

    free_energy: float
    energy: float
    xc: float
    entropy_term: float
    band: float | None
    fermi_level: float
    eigenvalues: NDArray[np.float64]
    kpoints: NDArray[np.float64]
    weights: NDArray[np.float64]
    n_atoms: int
    electrons: float
    electrons_given: float


@dataclass(frozen=True, eq=False)
class Label:
    """A finished ground state.

    Attributes
    ----------
    structure : Structure
    density : (nx, ny, nz) array, e/angstrom^3
        Valence density at fractional coordinates (i/nx, j/ny, k/nz).
    energies : Energies
    forces : (n_atoms, 3) array, eV/angstrom, or None
    electrons : float
        Valence electrons; the density integrates to it within 1e-6.
    settings : DFTSettings
        With mesh and grid as they were.
    engine : str
        Name and version.
    iterations : int
        Self-consistency steps.
    seconds : float
    """

    structure: Structure
    density: NDArray[np.float64]
    energies: Energies
    forces: NDArray[np.float64] | None
    electrons: float
    settings: DFTSettings
    engine: str
    iterations: int
    seconds: float
    meta: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A code that solves the Kohn-Sham equations."""

    @property
    def name(self) -> str:
        """Short name, as in ``--engine``."""
        ...

    def ground_state(
        self, structure: Structure, settings: DFTSettings, density: NDArray[np.float64] | None = None
    ) -> Label:
        """Self-consistent density and energies; `density` (e/angstrom^3) starts the iteration where it is given.

        Raises
        ------
        EngineError
            Where the code is missing, fails, or cannot do the structure.
        ConvergenceError
            Where self-consistency is not reached in `settings.max_iterations` steps.
        """
        ...

    def one_shot(self, structure: Structure, density: NDArray[np.float64], settings: DFTSettings) -> Energies:
        """Harris-Foulkes energies of a density (e/angstrom^3): one diagonalisation in its own fixed potential.

        The density is rescaled to the number of electrons first (equation 6 of the paper's appendix).
        """
        ...


def check_structure(structure: Structure, valence: Mapping[str, float] | None = None) -> float:
    """Number of valence electrons of a structure that a plane-wave engine can do.

    `valence` says how many an atom of a symbol has; GTH-PBE where it does not.

    Raises
    ------
    StructureError
        For a cell without three periods, odd proportions, or overlapping atoms.
    UnknownSpeciesError
        Where an element has no pseudopotential.
    """
    from ase.data import chemical_symbols

    if not structure.pbc.all():
        raise StructureError(
            f"pbc {structure.pbc.tolist()}: plane waves need three periods; set pbc=True and leave vacuum in the cell"
        )
    longest, lowest = float(np.linalg.norm(structure.cell, axis=1).max()), float(cell_heights(structure.cell).min())
    if longest > MAX_ASPECT * lowest:
        raise StructureError(
            f"a cell {longest:.3g} angstrom long and {lowest:.3g} high: over {MAX_ASPECT:g} to 1; make it more compact"
        )
    given = valence or {}
    per_symbol = {symbol: given[symbol] if symbol in given else gth(symbol).valence for symbol in structure.symbols}
    electrons = float(sum(per_symbol[chemical_symbols[z]] for z in structure.numbers))
    structure.check_overlaps(MIN_DISTANCE)
    return electrons


def check_density(structure: Structure, density: NDArray[np.floating], electrons: float) -> NDArray[np.float64]:
    """A density as float64, rescaled to `electrons` (equation 6 of the paper's appendix); e/angstrom^3.

    Raises
    ------
    StructureError
        Where it is not a finite three-dimensional field with a positive integral, or its integral is off by over 20 %.
    """
    values = np.asarray(density, dtype=np.float64)
    if values.ndim != 3 or min(values.shape) < 4:
        raise StructureError(f"density has shape {values.shape}; give (nx, ny, nz), four points or more each")
    if not np.isfinite(values).all():
        raise StructureError(f"density has {int((~np.isfinite(values)).sum())} values that are not finite")
    integral = float(values.mean()) * structure.volume
    if not 0.8 < integral / electrons < 1.25:
        raise StructureError(
            f"density integrates to {integral:.5g} electrons in this cell, the atoms have {electrons:g} valence"
            " electrons; check that density and atoms belong together, and the unit"
        )
    return values * (electrons / integral)
