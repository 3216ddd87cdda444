"""Where a prediction is least certain, and whether what lies there is new.

Uncertainty is looked at atom by atom, each with the grid points nearest to it, so that every score covers a nucleus
and its surroundings alike: along a grid, sigma follows the distance to the nucleus before it follows what is unknown.
Whether surroundings are new is decided at the atoms, too, by smooth descriptors of what surrounds each of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.descriptors import DescriptorSpec, Environment
from gpurho.errors import SettingsError
from gpurho.fields import Box, LazyField
from gpurho.kernels.celllist import atoms_around, bin_atoms
from gpurho.peratom import per_atom
from gpurho.structure import Structure

Floats = NDArray[np.float64]

ENVIRONMENT_CUTOFF = 5.0
"""Surroundings of an atom end here, angstrom: three shells of neighbours in aluminium."""

ORDINARY = 500
"""Atoms of a structure whose median says what is ordinary in it."""

APART = 1e3
"""Distance of atoms of two species: they are never alike, however alike their neighbours."""

SAMPLED = 2000
"""Known atoms whose distances from each other are looked at to tell which are odd."""

ODD = 0.95
"""Share of the known atoms that are not."""

FEW = 1e-6
"""Spread of a descriptor below which it is taken for constant."""


def atom_scores(density: Density, tick: Callable[[int], None] | None = None) -> Floats:
    """Root mean square of the epistemic sigma over the points nearest to each atom, (n_atoms,), e/angstrom^3.

    The field is read block by block. Atoms of a prediction for a region that own none of its points get 0.

    Raises
    ------
    SettingsError
        For a density without uncertainty.
    """
    sigma = density.epistemic
    if sigma is None:
        raise SettingsError("the density has no uncertainty; predict it with uncertainty='last-layer' or 'analytic'")

    def square(box: Box) -> NDArray[np.float32]:
        return np.square(np.asarray(sigma[box]))

    chunks = (sigma.chunks, sigma.phase) if isinstance(sigma, LazyField) else ()
    cells = per_atom(density.structure, density.grid, LazyField(square, density.shape, *chunks), None, None, tick)
    share = np.divide(cells.electrons, cells.volumes, out=np.zeros(len(cells.volumes)), where=cells.volumes > 0)
    return np.sqrt(np.maximum(share, 0.0))


def typical(scores: Floats) -> tuple[float, float]:
    """Median of scores, and their spread: the median distance from it, scaled to the standard deviation of normals."""
    middle = float(np.median(scores))
    return middle, 1.4826 * float(np.median(np.abs(scores - middle)))


def outlier_level(scores: Floats, spreads: float = 5.0, ratio: float = 1.3) -> float:
    """The score from which on an atom stands out: `spreads` above the median, and `ratio` times it at least."""
    middle, spread = typical(scores)
    return max(middle + spreads * spread, ratio * middle)


@dataclass(frozen=True, eq=False)
class Region:
    """Atoms near to each other whose scores stand out.

    Attributes
    ----------
    atoms : (n,) int array
        The structure's indices, highest score first.
    position : (3,) array, angstrom
        Centre, weighted by how far the scores stand out.
    score : float, e/angstrom^3
        Root of the summed squares of the scores beyond the typical one: it grows with how much and how many.
    peak : float, e/angstrom^3
        Highest score.
    """

    atoms: NDArray[np.int64]
    position: Floats
    score: float
    peak: float


def find_regions(
    structure: Structure, scores: Floats, level: float, middle: float, link: float = 4.0, radius: float = 6.0
) -> list[Region]:
    """Regions of atoms with scores from `level` on, highest score first.

    Atoms within `link` angstrom of each other belong together; a region ends `radius` angstrom from its highest atom,
    what lies beyond makes regions of its own, so that none outgrows a cell. `middle` is the typical score.
    """
    from scipy.spatial import cKDTree

    flagged = np.flatnonzero(scores >= level)
    if not len(flagged):
        return []
    bins = bin_atoms(structure.positions[flagged], structure.cell, structure.pbc)
    wrapped = np.empty((len(flagged), 3))
    wrapped[bins.owners] = bins.fractional @ bins.cell
    images, owners = atoms_around(bins, wrapped, max(link, radius))
    tree = cKDTree(images)
    left = np.ones(len(flagged), bool)
    regions = []
    for peak in np.argsort(-scores[flagged], kind="stable"):
        if not left[peak]:
            continue
        near = np.array(tree.query_ball_point(wrapped[peak], radius))
        # Of several images of an atom the nearest one.
        near = near[np.argsort(np.linalg.norm(images[near] - wrapped[peak], axis=1), kind="stable")]
        near = near[left[owners[near]]]
        _, first = np.unique(owners[near], return_index=True)
        near = near[np.sort(first)]
        members = near[_linked(images[near], link)]
        atoms = owners[members]
        left[atoms] = False
        values = scores[flagged[atoms]]
        weights = np.maximum(values - middle, 1e-12)
        position = weights @ images[members] / weights.sum()
        excess = float(np.sqrt(np.maximum(values**2 - middle**2, 0.0).sum()))
        order = np.argsort(-values, kind="stable")
        regions.append(Region(flagged[atoms[order]].astype(np.int64), position, excess, float(values.max())))
    return sorted(regions, key=lambda region: -region.score)


def _linked(points: Floats, link: float) -> NDArray[np.int64]:
    """Indices of the points that are linked, in steps of at most `link`, to the first one."""
    from scipy.sparse.csgraph import connected_components
    from scipy.spatial import cKDTree

    tree = cKDTree(points)
    _, labels = connected_components(tree.sparse_distance_matrix(tree, link, output_type="coo_matrix"), directed=False)
    return np.flatnonzero(labels == labels[0])


class Environments:
    """Surroundings of atoms as points of a space in which distance means difference.

    Parameters
    ----------
    species : sequence of str
        All that will occur.
    cutoff : float, angstrom
    """

    def __init__(self, species: Sequence[str], cutoff: float = ENVIRONMENT_CUTOFF) -> None:
        self.spec = DescriptorSpec(
            tuple(species), family="smooth", cutoff=cutoff, n_radial=12, n_basis=4 if len(species) < 3 else 2, l_max=4
        )

    def of(self, structure: Structure, atoms: NDArray[np.int64] | None = None) -> Floats:
        """Raw descriptors at the atoms, (n, F + n_species); the last columns are 0, and `APART` for its own species."""
        index = np.arange(len(structure)) if atoms is None else atoms
        values = Environment(structure, self.spec).point_features(structure.positions[index]).values
        own = np.eye(len(self.spec.species))[self.spec.species_index(structure)[index]]
        return np.hstack([values.astype(np.float64), APART * own])


class Coverage:
    """Which surroundings are known.

    Distances are root mean squares over the descriptors, each in units of its standard deviation over the known
    atoms. What is near depends on where: hot atoms lie far from each other and cold ones close together, so a distance
    is measured by that of the known atom there from others.

    Parameters
    ----------
    groups : sequence of (n, F) arrays
        Descriptors of known atoms (`Environments.of`), one array for each structure.
    """

    def __init__(self, groups: Sequence[Floats]) -> None:
        from scipy.spatial import cKDTree

        if not groups or not sum(map(len, groups)):
            raise SettingsError("no known surroundings to compare with; give at least one structure")
        values = np.concatenate(groups)
        self.mean, spread = values.mean(0), values.std(0)
        self.scale = np.where(spread > FEW * np.maximum(1.0, np.abs(self.mean)), spread, 1.0) * np.sqrt(values.shape[1])
        self.scale[np.isin(values, (0.0, APART)).all(axis=0)] = 1.0
        self._owner = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
        self._nearest_others = 2 if len(groups) == 1 else 1 + max(len(g) for g in groups)
        self._tree = cKDTree(self.scaled(values))
        chosen = np.random.default_rng(0).permutation(len(values))[:SAMPLED]
        # An odd one out among the known must not stand for all that is odd.
        self._limit = float(np.quantile(self._apart(chosen), ODD))

    def scaled(self, values: Floats) -> Floats:
        """Raw descriptors in the units of the distances."""
        return (values - self.mean) / self.scale

    def novelty(self, values: Floats) -> Floats:
        """Distance of each of `values` (raw descriptors) to the nearest known atom, in units of that atom's own.

        Its own is that to the nearest known atom of another structure; from 1 on surroundings are new.
        """
        distance, nearest = self._tree.query(self.scaled(values))
        unique, inverse = np.unique(nearest, return_inverse=True)
        own = np.minimum(self._apart(unique), self._limit)
        return np.asarray(distance / np.maximum(own, FEW)[inverse])

    def _apart(self, index: NDArray[np.int64]) -> Floats:
        """Distance of known atoms to the nearest of another structure, or of any other where there is but one."""
        k = min(len(self._owner), self._nearest_others)
        if k < 2:
            return np.zeros(len(index))
        distance, near = self._tree.query(self._tree.data[index], k=k)
        if self._nearest_others == 2:
            return np.asarray(distance[:, 1])
        other = self._owner[near] != self._owner[index][:, None]
        return np.asarray(np.where(other, distance, np.inf).min(axis=1))


class Peculiarity:
    """What is peculiar about a region: the mean of its surroundings less what is ordinary in its structure.

    A mean over the atoms of a region, and a difference within one structure, because thermal motion moves single atoms
    more than one kind of defect differs from another.

    Parameters
    ----------
    structure : Structure
    space : Environments
    coverage : Coverage
        Gives the units.
    """

    def __init__(self, structure: Structure, space: Environments, coverage: Coverage) -> None:
        self.structure, self.space, self.coverage = structure, space, coverage
        self._bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        chosen = np.sort(np.random.default_rng(0).permutation(len(structure))[:ORDINARY])
        self._ordinary = np.median(coverage.scaled(space.of(structure, chosen)), axis=0)

    def of(self, region: Region, radius: float = 3.5) -> Floats:
        """(F,), over the atoms within `radius` angstrom of the region's centre, or its own where these are few."""
        images, owners = atoms_around(self._bins, region.position[None], radius)
        near = owners[np.linalg.norm(images - region.position, axis=1) <= radius].astype(np.int64)
        atoms = near if len(near) >= 4 else region.atoms
        return np.asarray(self.coverage.scaled(self.space.of(self.structure, atoms)).mean(axis=0) - self._ordinary)


def alike(first: Floats, second: Floats, share: float = 0.4) -> bool:
    """Whether two peculiarities differ by less than a share of their mean size."""
    size = 0.5 * (np.linalg.norm(first) + np.linalg.norm(second))
    return bool(np.linalg.norm(first - second) < share * size)
