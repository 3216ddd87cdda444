"""Descriptors of grid points: what a model reads of the atoms around a point.

Source: preprint, Algorithm 1 and section IV.C; here for any number of species, any cell and any periodicity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import DeviceError, GridError, SettingsError, UnknownSpeciesError
from gpurho.grid import Grid
from gpurho.kernels.batches import Batches, grid_batches, point_batches
from gpurho.partition import Tile
from gpurho.structure import Structure, as_structure

if TYPE_CHECKING:
    from ase import Atoms

FAMILIES = ("scalar-product",)


@dataclass(frozen=True)
class DescriptorSpec:
    """Which descriptors: part of every model file.

    Parameters
    ----------
    species : tuple of str
        Chemical symbols, in the order of the columns.
    n_distances : int
        M: distances to the nearest atoms of each species (set I).
    n_angle_atoms : int
        M_a: nearest atoms of each species for which cosines are taken (set II); at most `n_distances`.
    n_angle_neighbors : int
        k: neighbours (of the same species) of each of them.
    n_cross : int
        For each pair of species, nearest atoms of either between which cosines are taken; at most `n_distances`.
    cutoff : float, angstrom
        Distances end here; a missing atom has this distance and cosines of 0.
    family : str
        "scalar-product".

    Raises
    ------
    SettingsError
        For values outside their range.
    """

    species: tuple[str, ...]
    n_distances: int = 60
    n_angle_atoms: int = 15
    n_angle_neighbors: int = 3
    n_cross: int = 0
    cutoff: float = 9.0
    family: str = "scalar-product"

    def __post_init__(self) -> None:
        from ase.data import atomic_numbers

        object.__setattr__(self, "species", tuple(self.species))
        unknown = [s for s in self.species if s not in atomic_numbers or atomic_numbers[s] == 0]
        if isinstance(self.species, str) or not self.species or unknown:
            raise SettingsError(f"species {self.species!r} are not chemical symbols; give for instance ('Si', 'Ge')")
        if len(set(self.species)) != len(self.species):
            raise SettingsError(f"species {self.species!r} name one element twice; give each once")
        if self.family not in FAMILIES:
            raise SettingsError(f"descriptor family {self.family!r} is not known; give one of {', '.join(FAMILIES)}")
        for name, least, most in (
            ("n_distances", 1, 4096),
            ("n_angle_atoms", 0, self.n_distances),
            ("n_angle_neighbors", 0, 64),
            ("n_cross", 0, self.n_distances),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | np.integer) or not least <= value <= most:
                raise SettingsError(f"{name} is {value!r}; give a whole number from {least} to {most}")
        if not (np.isfinite(self.cutoff) and 0.5 <= self.cutoff <= 100.0):
            raise SettingsError(f"cutoff is {self.cutoff!r} angstrom; give 0.5 to 100")

    @property
    def n_features(self) -> int:
        """Number of descriptors of a point."""
        return self._sizes().n_features

    def feature_names(self) -> list[str]:
        """Names of the columns: ``d_Al_1`` is set I, ``cos_Al_2_1`` set II, ``cross_Si_1_Ge_2`` the cross cosines."""
        names = []
        for s in self.species:
            names += [f"d_{s}_{i + 1}" for i in range(self.n_distances)]
            angles = [(i + 1, j + 1) for i in range(self.n_angle_atoms) for j in range(self.n_angle_neighbors)]
            names += [f"cos_{s}_{i}_{j}" for i, j in angles]
        for a, s in enumerate(self.species):
            for t in self.species[a + 1 :]:
                names += [f"cross_{s}_{i + 1}_{t}_{j + 1}" for i in range(self.n_cross) for j in range(self.n_cross)]
        return names

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {**asdict(self), "species": list(self.species)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> DescriptorSpec:
        """From `to_dict`; an entry that is not known raises `SettingsError`."""
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise SettingsError(f"descriptor specification has unknown entries {unknown}; update gpurho to read it")
        return cls(**{**values, "species": tuple(values["species"])})

    def species_index(self, structure: Structure) -> NDArray[np.int32]:
        """Index into `species` of every atom, (n_atoms,); raises `UnknownSpeciesError` for an atom of none."""
        from ase.data import atomic_numbers

        table = np.full(119, -1, np.int32)
        for i, symbol in enumerate(self.species):
            table[atomic_numbers[symbol]] = i
        index = table[structure.numbers]
        if np.any(index < 0):
            unknown = [s for s in structure.symbols if s not in self.species]
            raise UnknownSpeciesError(
                f"the structure has {', '.join(unknown)}, but the descriptors know {', '.join(self.species)} only"
            )
        return index

    def _sizes(self) -> Any:
        from gpurho.kernels.scalar_product import FeatureSizes

        return FeatureSizes(
            len(self.species),
            int(self.n_distances),
            int(self.n_angle_atoms),
            int(self.n_angle_neighbors),
            int(self.n_cross),
            float(self.cutoff),
        )


@dataclass(frozen=True)
class Features:
    """Descriptors of some points.

    Parameters
    ----------
    values : (n_points, n_features) float32
        A NumPy array on the CPU, a torch tensor on a CUDA device.
    n_capped : int
        Points that have fewer atoms of some species within the cutoff than `n_distances`.
    n_tied : int
        Points where the tie rule decided the order of equally distant atoms.
    n_exact : int
        Points that took the exact path of the kernels.
    """

    values: Any
    n_capped: int
    n_tied: int
    n_exact: int


class Environment:
    """The atoms of a structure, prepared once for descriptors at any points.

    Parameters
    ----------
    structure : Structure
    spec : DescriptorSpec
    device : str
        "cpu", or a CUDA device as torch names it; features are left there.

    Raises
    ------
    UnknownSpeciesError
        For an atom that `spec` does not know.
    DeviceError
        For a device that is not there.
    """

    def __init__(self, structure: Structure, spec: DescriptorSpec, device: str = "cpu") -> None:
        from gpurho.kernels.celllist import bin_atoms
        from gpurho.kernels.scalar_product import TIE_TOLERANCE, pack_neighbors
        from gpurho.neighbors import nearest_table

        self.structure, self.spec, self.device = structure, spec, str(device)
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise DeviceError(f"device {device!r} is not known; give 'cpu', 'cuda' or 'cuda:0'")
        self._species = spec.species_index(structure)
        self._sizes = spec._sizes()
        table = nearest_table(structure, self._species, spec.n_angle_neighbors, spec.cutoff, TIE_TOLERANCE)
        self._neighbors = pack_neighbors(table.start, table.vectors, table.distances, spec.n_angle_neighbors)
        self._bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        self._cuda: Any = None
        if self.device != "cpu":
            from gpurho.kernels.cuda import CudaFeatures

            self._cuda = CudaFeatures(self._neighbors, self._sizes, self.device)

    def tile_features(self, grid: Grid, tile: Tile, out: Any = None) -> Features:
        """Descriptors of the points of a tile, rows in C order.

        `out` takes the values where given: (n_points, n_features) float32, C order, on the environment's device.
        """
        low, high = np.array(tile.start, float), np.array(tile.stop, float) - 1.0
        ends = np.array([[(low, high)[c >> d & 1][d] for d in range(3)] for c in range(8)])
        corners = grid.origin + ends @ grid.steps
        if self._cuda is None:
            points = grid.points(tile.start, tile.stop)
        else:
            points = self._cuda.grid_points(grid.origin, grid.steps, tile.start, tile.stop)
        return self._features(points, grid_batches(tile.shape), corners, out)

    def point_features(self, points: ArrayLike, out: Any = None) -> Features:
        """Descriptors of any points, (n_points, 3) angstrom."""
        array = np.ascontiguousarray(points, dtype=np.float64)
        if array.ndim != 2 or array.shape[1] != 3 or not np.isfinite(array).all():
            raise GridError(f"points of shape {array.shape} are not finite (n_points, 3) coordinates in angstrom")
        return self._features(array, point_batches(array), array, out)

    def _features(self, points: NDArray[np.float64], batches: Batches, hull: NDArray[np.float64], out: Any) -> Features:
        from gpurho.kernels.celllist import atoms_around, species_cells
        from gpurho.kernels.scalar_product import scalar_product_features

        # The slack is that of the kernels' own search radii.
        positions, owners = atoms_around(self._bins, hull, self.spec.cutoff + 0.01) if len(hull) else _no_atoms()
        cells = species_cells(positions, owners, self._species[owners], len(self.spec.species))
        shape = (len(points), self._sizes.n_features)
        if self._cuda is not None:
            return Features(*self._cuda(points, batches, cells, out))
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise SettingsError(f"out has shape {out.shape} and type {out.dtype}; give {shape} float32 in C order")
        return Features(out, *scalar_product_features(points, batches, cells, self._neighbors, self._sizes, out))


def _no_atoms() -> tuple[NDArray[np.float64], NDArray[np.int32]]:
    return np.empty((0, 3)), np.empty(0, np.int32)


def descriptors(
    atoms: Atoms | Structure, points: ArrayLike, spec: DescriptorSpec, device: str = "cpu"
) -> NDArray[np.float32] | Any:
    """Descriptors of points around atoms.

    Parameters
    ----------
    atoms : ase.Atoms or Structure
    points : (n_points, 3) array, angstrom
    spec : DescriptorSpec
    device : str
        "cpu" or a CUDA device.

    Returns
    -------
    (n_points, n_features) float32
        Distances in angstrom. A NumPy array on the CPU, a torch tensor on a CUDA device.

    Raises
    ------
    StructureError, UnknownSpeciesError, GridError, DeviceError

    Notes
    -----
    Preprint, Algorithm 1. Atoms whose distances agree to 1e-5 angstrom form a shell, within which each column of
    cosines is in descending order: so the result does not depend on the order, orientation or position of the atoms.
    """
    return Environment(as_structure(atoms), spec, device).point_features(points).values
