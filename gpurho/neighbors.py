"""Neighbour graph of the atoms: one signature, three providers (our own cell list, torch-cluster, pyg-lib).

The providers only propose pairs. Distances, the cutoff and the order of the result are computed here, once,
so that all providers give the same graph bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpurho._neighbor_providers import (
    PROVIDERS,
    available_providers,
    cell_list,
    propose_pairs,
    resolve_provider,
)
from gpurho.errors import NeighborOverflowError, SettingsError
from gpurho.structure import Structure

__all__ = [
    "PROVIDERS",
    "NeighborGraph",
    "NeighborTable",
    "available_providers",
    "nearest_table",
    "radius_graph",
]

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]

TIE_TOLERANCE = 1.0e-5
"""Distances that differ by no more than this count as equal, angstrom."""

GROWTH = 1.4
"""Factor by which the search radius grows for the atoms that have found too few neighbours."""


@dataclass(frozen=True, eq=False)
class NeighborTable:
    """Nearest neighbours of every atom, row by row.

    Attributes
    ----------
    start : (n_atoms + 1,) int64
        Row i of the others is ``start[i]:start[i + 1]``.
    vectors : (nnz, 3) float64, angstrom
        From the atom to its neighbour's image.
    distances : (nnz,) float64, angstrom
        Ascending in each row.
    """

    start: I64
    vectors: F64
    distances: F64


@dataclass(frozen=True, eq=False)
class NeighborGraph:
    """Pairs of atoms within a cutoff, ordered by (receiver, distance, sender, shift).

    Attributes
    ----------
    senders, receivers : (n_pairs,) int64
        Atom indices.
    shifts : (n_pairs, 3) int64
        Cell vectors that take the sender to its image.
    vectors : (n_pairs, 3) float64, angstrom
        ``positions[senders] + shifts @ cell - positions[receivers]``.
    distances : (n_pairs,) float64, angstrom
    """

    senders: I64
    receivers: I64
    shifts: I64
    vectors: F64
    distances: F64


def nearest_table(
    structure: Structure,
    species_index: NDArray[np.integer[Any]],
    k: int,
    cutoff: float,
    tie_tolerance: float = TIE_TOLERANCE,
    provider: str = "auto",
) -> NeighborTable:
    """The `k` nearest atoms of the same species around every atom, ties kept whole.

    Periodic images count as atoms, an atom's own images too; only the atom itself is left out. Distances
    that agree within `tie_tolerance` form a group, anchored at its smallest distance, and the group that
    holds rank `k` is kept whole: every atom of perfect fcc has twelve entries for any `k` up to twelve. So
    the table does not depend on the order of the atoms, nor on rounding.

    Parameters
    ----------
    structure : Structure
    species_index : (n_atoms,) array of int
        Species of each atom; atoms with -1 have no row entries and are nobody's neighbours.
    k : int
        Neighbours per atom, 0 or more.
    cutoff : float, angstrom
        No neighbour lies farther; an atom with fewer than `k` within it has fewer entries.
    tie_tolerance : float, angstrom
    provider : str
        "auto" or one of `PROVIDERS`.

    Returns
    -------
    NeighborTable

    Raises
    ------
    SettingsError
        For arguments out of range.
    MissingDependencyError
        For a provider that is not installed.
    """
    n_atoms = len(structure)
    species = np.asarray(species_index)
    if species.shape != (n_atoms,) or not np.issubdtype(species.dtype, np.integer):
        raise SettingsError(
            f"species_index has shape {species.shape} and type {species.dtype}; give {n_atoms} integers"
        )
    if k < 0:
        raise SettingsError(f"k is {k}; give 0 or more neighbours")
    _check_length("cutoff", cutoff)
    if not 0.0 <= tie_tolerance < np.inf:
        raise SettingsError(f"tie_tolerance is {tie_tolerance}; give 0 or more, in angstrom")
    name = resolve_provider(provider, "cpu")
    kinds = [np.flatnonzero(species == kind) for kind in np.unique(species[species >= 0])] if k else []
    search = _nearest_own if name == "gpurho" else _nearest_by_pairs
    counts = np.zeros(n_atoms, dtype=np.int64)
    fills = [search(structure, members, counts, k, cutoff, tie_tolerance, name) for members in kinds]
    start = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    table = NeighborTable(start, np.empty((start[-1], 3)), np.empty(start[-1]))
    for fill in fills:
        fill(table)
    return table


def _nearest_own(
    structure: Structure,
    members: I64,
    counts: I64,
    k: int,
    cutoff: float,
    tolerance: float,
    provider: str,
) -> Callable[[NeighborTable], None]:
    """Search among `members` with our cell list; OUTPUT counts[members]; returns what fills the table."""
    from gpurho.kernels.neighborsearch import fill_nearest, nearest_limits

    cells, _ = cell_list(structure, members)
    limits = np.full(len(members), np.nan)
    found = np.zeros(len(members), dtype=np.int64)
    active = np.arange(len(members))
    radius = _first_radius(cells.density, k, cutoff)
    while len(active):
        nearest_limits(*cells.arrays, active, radius, cutoff, k, tolerance, limits, found)
        active = active[np.isnan(limits[active])]
        radius = min(GROWTH * radius, cutoff)
    atoms = members[cells.order]
    counts[atoms] = found

    def fill(table: NeighborTable) -> None:
        fill_nearest(*cells.arrays, limits, table.start[atoms], table.vectors, table.distances)

    return fill


def _nearest_by_pairs(
    structure: Structure,
    members: I64,
    counts: I64,
    k: int,
    cutoff: float,
    tolerance: float,
    provider: str,
) -> Callable[[NeighborTable], None]:
    """The same from the pairs of another provider."""
    from gpurho.kernels.neighborsearch import row_limits

    among = Structure(structure.positions[members], structure.numbers[members], structure.cell, structure.pbc)
    cells, _ = cell_list(among)
    radius = _first_radius(cells.density, k, cutoff)
    open_atoms = np.ones(len(members), dtype=np.bool_)
    found: list[NeighborGraph] = []
    while open_atoms.any():
        graph = _graph(among, radius, provider, "cpu", open_atoms)
        limits = np.empty(len(members))
        start = np.searchsorted(graph.receivers, np.arange(len(members) + 1))
        row_limits(start, graph.distances, k, tolerance, limits)
        done = open_atoms & ((limits <= radius) | (radius >= cutoff))
        found.append(_select(graph, done[graph.receivers] & (graph.distances <= limits[graph.receivers])))
        open_atoms &= ~done
        radius = min(GROWTH * radius, cutoff)
    receivers = np.concatenate([part.receivers for part in found])
    order = np.argsort(receivers, kind="stable")
    per_member = np.bincount(receivers, minlength=len(members))
    counts[members] = per_member

    def fill(table: NeighborTable) -> None:
        first = np.repeat(table.start[members] - np.cumsum(per_member) + per_member, per_member)
        rows = first + np.arange(len(receivers))
        table.vectors[rows] = np.concatenate([part.vectors for part in found])[order]
        table.distances[rows] = np.concatenate([part.distances for part in found])[order]

    return fill


def radius_graph(
    structure: Structure,
    cutoff: float,
    *,
    provider: str = "auto",
    max_neighbors: int | None = None,
    device: str = "cpu",
) -> NeighborGraph:
    """All pairs of atoms within `cutoff`, periodic images included.

    An atom is no neighbour of itself, but its images are, and so are other atoms at the same place.

    Parameters
    ----------
    structure : Structure
    cutoff : float, angstrom
    provider : str
        "gpurho", "torch-cluster" or "pyg-lib"; "auto" is our own on the CPU, and on a CUDA device the first
        other one that is installed. torch-cluster and pyg-lib know no periodicity and cut off in silence at
        a cap: they are given the images around the cell as points, and a cap from a count.
    max_neighbors : int, optional
        The most neighbours that any atom may have.
    device : str
        "cpu" or "cuda[:index]": where the provider searches. The result is in host memory.

    Returns
    -------
    NeighborGraph

    Raises
    ------
    NeighborOverflowError
        When an atom has more than `max_neighbors`, or a provider met its cap.
    MissingDependencyError, DeviceError
        When the provider is not installed, or cannot run on the device.
    """
    _check_length("cutoff", cutoff)
    if max_neighbors is not None and max_neighbors < 0:
        raise SettingsError(f"max_neighbors is {max_neighbors}; give 0 or more")
    graph = _graph(structure, cutoff, resolve_provider(provider, device), device)
    if max_neighbors is not None:
        counts = np.bincount(graph.receivers, minlength=1)
        if counts.max() > max_neighbors:
            raise NeighborOverflowError(
                f"atom {int(counts.argmax())} has {counts.max()} neighbours within {cutoff:g} angstrom, but"
                f" max_neighbors is {max_neighbors}; raise it or shorten the cutoff"
            )
    return graph


def _graph(
    structure: Structure, cutoff: float, provider: str, device: str, wanted: NDArray[np.bool_] | None = None
) -> NeighborGraph:
    """The graph from the pairs a provider proposes; only of the receivers `wanted` (n_atoms,), if given."""
    from gpurho.kernels.neighborsearch import SLACK

    cells, combination = cell_list(structure)
    receivers, senders, shifts = propose_pairs(cells, cutoff + SLACK, provider, device, wanted)
    shifts = shifts @ combination
    positions = structure.positions
    vectors = positions[senders] - positions[receivers] + shifts @ structure.cell
    distances = np.sqrt((vectors * vectors).sum(axis=1))
    graph = NeighborGraph(senders, receivers, shifts, vectors, distances)
    keep = (distances <= cutoff) & ((senders != receivers) | shifts.any(axis=1))
    order = np.lexsort((shifts[:, 2], shifts[:, 1], shifts[:, 0], senders, distances, receivers))
    return _select(graph, order[keep[order]])


def _select(graph: NeighborGraph, rows: NDArray[Any]) -> NeighborGraph:
    """Some of the pairs, in the order of `rows`."""
    return NeighborGraph(
        graph.senders[rows], graph.receivers[rows], graph.shifts[rows], graph.vectors[rows], graph.distances[rows]
    )


def _first_radius(density: float, k: int, cutoff: float) -> float:
    """Radius of a sphere that holds about 2 k + 4 atoms, which is enough for nearly all in a dense phase."""
    return min(cutoff, float(np.cbrt((2 * k + 4) / (4.0 / 3.0 * np.pi * density))))


def _check_length(name: str, value: float) -> None:
    if not 0.0 < value < np.inf:
        raise SettingsError(f"{name} is {value}; give a positive length in angstrom")
