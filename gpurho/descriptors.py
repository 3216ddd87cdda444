"""Descriptors of grid points: what a model reads of the atoms around a point.

Two families. "scalar-product" is the preprint's (Algorithm 1 and section IV.C), here for any number of species, any
cell and any periodicity. "smooth" holds, of each species' atoms, sums of radial functions and the power spectrum of
their projections on radial functions and spherical harmonics: smooth in all positions, without an order of the atoms.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import DeviceError, GridError, SettingsError, UnknownSpeciesError
from gpurho.features import Features, StartedFeatures
from gpurho.grid import Grid
from gpurho.host import launch_numba
from gpurho.kernels.batches import Batches, grid_batches, point_batches
from gpurho.partition import Tile
from gpurho.structure import MAX_COORDINATE, Structure, as_structure, real_array

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.kernels.smooth import BlockNetwork, SmoothOutputs

FAMILIES = ("scalar-product", "smooth")
COMMON = ("species", "cutoff", "family")
OWN = {
    "scalar-product": ("n_distances", "n_angle_atoms", "n_angle_neighbors", "n_cross"),
    "smooth": ("n_radial", "n_basis", "l_max", "contraction"),
}
"""Settings that both families have, and those that one has."""

SLACK = 0.01
"""Added to the cutoff (angstrom) where atoms are gathered: that of the kernels' own search radii."""


def _is(value: Any, kinds: Any) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


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
        "scalar-product" or "smooth". `n_distances`, `n_angle_atoms`, `n_angle_neighbors` and `n_cross` are of the
        first, the following of the second; those of the other family keep their defaults.
    n_radial : int
        Radial functions R_n(r) = T_n(2 r / cutoff - 1) (1 + cos(pi r / cutoff)) / 2 whose sums over the atoms of each
        species are features: 1 to 64.
    n_basis : int
        Radial channels of each species in the power spectrum: 0 (no spectrum) to `n_radial`.
    l_max : int
        Largest degree of the spherical harmonics: 0 (no spectrum) to 8. Degree 0 is in the sums already.
    contraction : nested tuples (n_species, n_basis, n_radial), optional
        The channels' radial functions are these combinations of the R_n; without, they are the first `n_basis`.

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
    n_radial: int = 20
    n_basis: int = 6
    l_max: int = 4
    contraction: tuple[tuple[tuple[float, ...], ...], ...] | None = None

    def __post_init__(self) -> None:
        from ase.data import atomic_numbers

        given = self.species
        names = () if isinstance(given, str) or not isinstance(given, Sequence) else tuple(given)
        if not names or any(not isinstance(s, str) or not atomic_numbers.get(s, 0) for s in names):
            raise SettingsError(f"species {self.species!r} are not chemical symbols; give for instance ('Si', 'Ge')")
        object.__setattr__(self, "species", names)
        if len(set(names)) != len(self.species):
            raise SettingsError(f"species {self.species!r} name one element twice; give each once")
        if self.family not in FAMILIES:
            raise SettingsError(f"descriptor family {self.family!r} is not known; give one of {', '.join(FAMILIES)}")
        for name, least, most in (
            ("n_distances", 1, 4096),
            ("n_angle_atoms", 0, self.n_distances),
            ("n_angle_neighbors", 0, 64),
            ("n_cross", 0, self.n_distances),
            ("n_radial", 1, 64),
            ("n_basis", 0, self.n_radial),
            ("l_max", 0, 8),
        ):
            value = getattr(self, name)
            if not _is(value, int | np.integer) or not least <= value <= most:
                raise SettingsError(f"{name} is {value!r}; give a whole number from {least} to {most}")
            object.__setattr__(self, name, int(value))
        if not _is(self.cutoff, int | float | np.integer | np.floating) or not 0.5 <= self.cutoff <= 100.0:
            raise SettingsError(f"cutoff is {self.cutoff!r} angstrom; give 0.5 to 100")
        self._check_contraction()
        for family, names in OWN.items():
            foreign = [n for n in names if getattr(self, n) != self.__dataclass_fields__[n].default]
            if family != self.family and foreign:
                raise SettingsError(f"{', '.join(foreign)} have no meaning for the family {self.family!r}; leave out")

    def _check_contraction(self) -> None:
        if self.contraction is None:
            return
        shape = (len(self.species), self.n_basis, self.n_radial)
        try:
            matrix = np.array(self.contraction, np.float64)
        except (TypeError, ValueError):
            matrix = np.empty(0)
        if matrix.shape != shape or not np.isfinite(matrix).all():
            raise SettingsError(f"contraction has shape {matrix.shape}; give finite numbers in the shape {shape}")
        nested: Any = matrix.tolist()
        rows = tuple(tuple(tuple(float(x) for x in row) for row in part) for part in nested)
        object.__setattr__(self, "contraction", rows)

    @property
    def n_features(self) -> int:
        """Number of descriptors of a point."""
        return self._sizes().n_features

    @property
    def reach(self) -> float:
        """How far from a point, in angstrom, an atom can matter: the cutoff, and for cosines that of its neighbours."""
        bonds = self.family == "scalar-product" and self.n_angle_atoms > 0 and self.n_angle_neighbors > 0
        return self.cutoff * (2 if bonds else 1) + SLACK

    def feature_names(self) -> list[str]:
        """Names of the columns.

        ``d_Al_1`` is set I, ``cos_Al_2_1`` set II, ``cross_Si_1_Ge_2`` the cross cosines; of the smooth family,
        ``two_Al_3`` is the sum of R_3 and ``ps_Al_1_Ge_2_l3`` the product of two channels of degree 3.
        """
        if self.family == "smooth":
            names = [f"two_{s}_{n}" for s in self.species for n in range(self.n_radial)]
            channels = [f"{s}_{n}" for s in self.species for n in range(self.n_basis)]
            return names + [
                f"ps_{a}_{b}_l{degree}"
                for i, a in enumerate(channels)
                for b in channels[i:]
                for degree in range(1, self.l_max + 1)
            ]
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
        """As plain values for JSON: the settings of the family."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__ if name in COMMON + OWN[self.family]}
        return {**values, "species": list(self.species)}

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
        if self.family == "smooth":
            from gpurho.kernels.smooth import SmoothSizes

            return SmoothSizes(
                len(self.species), self.n_radial, self.n_basis, self.l_max, float(self.cutoff), self.contraction
            )
        from gpurho.kernels.scalar_product import FeatureSizes

        return FeatureSizes(
            len(self.species),
            self.n_distances,
            self.n_angle_atoms,
            self.n_angle_neighbors,
            self.n_cross,
            float(self.cutoff),
        )


class Environment:
    """The atoms of a structure, prepared once for descriptors at any points.

    Parameters
    ----------
    structure : Structure
    spec : DescriptorSpec
    device : str
        "cpu", or a CUDA device as torch names it; features are left there.
    bins : 3 ints, optional
        Where the structure has a part of the atoms of a larger one, in their order: the shape of the whole's bins
        (`gpurho.kernels.celllist.bin_atoms`). At points whose surroundings, as far as ``spec.reach``, are complete,
        features then have the bits that the whole gives.

    Raises
    ------
    UnknownSpeciesError
        For an atom that `spec` does not know.
    DeviceError
        For a device that is not there.
    """

    def __init__(
        self, structure: Structure, spec: DescriptorSpec, device: str = "cpu", bins: Sequence[int] | None = None
    ) -> None:
        from gpurho.kernels.celllist import bin_atoms
        from gpurho.kernels.scalar_product import TIE_TOLERANCE, pack_neighbors
        from gpurho.neighbors import nearest_table

        self.structure, self.spec, self.device = structure, spec, str(device)
        if self.device != "cpu" and not self.device.startswith("cuda"):
            raise DeviceError(f"device {device!r} is not known; give 'cpu', 'cuda' or 'cuda:0'")
        launch_numba()
        self._species = spec.species_index(structure)
        self._sizes = spec._sizes()
        self._bins = bin_atoms(structure.positions, structure.cell, structure.pbc, shape=bins)
        self._neighbors: Any = None
        self._cuda: Any = None
        if spec.family == "smooth":
            if self.device != "cpu":
                from gpurho.kernels.smooth_cuda import CudaSmooth

                self._cuda = CudaSmooth(self._sizes, self.device)
            return
        table = nearest_table(structure, self._species, spec.n_angle_neighbors, spec.cutoff, TIE_TOLERANCE)
        self._neighbors = pack_neighbors(table.start, table.vectors, table.distances, spec.n_angle_neighbors)
        if self.device != "cpu":
            from gpurho.kernels.cuda import CudaFeatures

            self._cuda = CudaFeatures(self._neighbors, self._sizes, self.device)

    def tile_features(self, grid: Grid, tile: Tile, out: Any = None) -> Features:
        """Descriptors of the points of a tile, rows in C order.

        `out` takes the values where given: (n_points, n_features) float32, C order, on the environment's device.
        """
        return self._features(*self._tile(grid, tile), out)

    def start_tile(self, grid: Grid, tile: Tile, out: Any) -> StartedFeatures:
        """Begin `tile_features`. On a GPU they are under way then, and nothing waits for them."""
        points, batches, hull = self._tile(grid, tile)
        if self._cuda is None:
            made = self._features(points, batches, hull, out)
            return StartedFeatures(made.values, None, lambda marks: made)
        values, marks, given = self._cuda.start(points, batches, self._cells(hull), out)

        def settle(found: Any) -> Features | None:
            counts = self._cuda.counts(found, given)
            return None if counts is None else Features(values, *counts)

        return StartedFeatures(values, marks, settle)

    def tile_outputs(self, grid: Grid, tile: Tile, network: BlockNetwork, chosen: NDArray[np.integer]) -> SmoothOutputs:
        """What a network says of a tile, on the CPU, of descriptors that are smooth; those of some points with it.

        `chosen` (n_chosen,) are numbers of points of the tile, in C order.
        """
        from gpurho.kernels.smooth import smooth_outputs

        points, batches, hull = self._tile(grid, tile)
        return smooth_outputs(points, batches, self._cells(hull), self._sizes, network, chosen)

    def _tile(self, grid: Grid, tile: Tile) -> tuple[Any, Batches, NDArray[np.float64]]:
        """Points of a tile, on the device; their batches; and the corners."""
        low, high = np.array(tile.start, float), np.array(tile.stop, float) - 1.0
        ends = np.array([[(low, high)[c >> d & 1][d] for d in range(3)] for c in range(8)])
        corners = grid.origin + ends @ grid.steps
        if self._cuda is None:
            points = grid.points(tile.start, tile.stop)
        else:
            points = self._cuda.grid_points(grid.origin, grid.steps, tile.start, tile.stop)
        return points, grid_batches(tile.shape), corners

    def point_features(self, points: ArrayLike, out: Any = None) -> Features:
        """Descriptors of any points, (n_points, 3) angstrom."""
        array = real_array(points)
        if array is None or array.ndim != 2 or array.shape[1] != 3 or not (np.abs(array) <= MAX_COORDINATE).all():
            raise GridError(
                f"points of shape {getattr(array, 'shape', None)} are not finite (n_points, 3) coordinates in angstrom,"
                f" none beyond {MAX_COORDINATE:.0e}"
            )
        return self._features(array, point_batches(array), array, out)

    def atoms_near(self, corners: NDArray[np.float64], reach: float) -> tuple[NDArray[np.float64], NDArray[np.int32]]:
        """Every atom, image by image, within `reach` angstrom of the convex hull of `corners` (n, 3), and some beyond.

        Positions (m, 3) in angstrom and the structure's index of each, (m,).
        """
        from gpurho.kernels.celllist import atoms_around

        return atoms_around(self._bins, corners, reach)

    def _features(self, points: NDArray[np.float64], batches: Batches, hull: NDArray[np.float64], out: Any) -> Features:
        from gpurho.kernels.scalar_product import scalar_product_features
        from gpurho.kernels.smooth import smooth_features

        cells = self._cells(hull)
        shape = (len(points), self._sizes.n_features)
        if self._cuda is not None:
            return Features(*self._cuda(points, batches, cells, out))
        if out is None:
            out = np.empty(shape, np.float32)
        elif out.shape != shape or out.dtype != np.float32 or not out.flags.c_contiguous:
            raise SettingsError(f"out has shape {out.shape} and type {out.dtype}; give {shape} float32 in C order")
        if self.spec.family == "smooth":
            return Features(out, *smooth_features(points, batches, cells, self._sizes, out))
        return Features(out, *scalar_product_features(points, batches, cells, self._neighbors, self._sizes, out))

    def _cells(self, hull: NDArray[np.float64]) -> Any:
        from gpurho.kernels.celllist import atoms_around, species_cells

        positions, owners = atoms_around(self._bins, hull, self.spec.cutoff + SLACK) if len(hull) else _no_atoms()
        return species_cells(positions, owners, self._species[owners], len(self.spec.species))


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
