"""Public driver of the smooth descriptors: two-body sums and a power spectrum of the atoms around a point."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache, reduce
from operator import add, mul
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.kernels.batches import Batches
from gpurho.kernels.celllist import SpeciesCells

WELL_CONDITIONED = 4.0
"""Condition number of the first columns of a contraction up to which they are taken apart: hardly a digit is lost."""

Contraction = tuple[tuple[tuple[float, ...], ...], ...]


@dataclass(frozen=True)
class BlockNetwork:
    """A network that is called for blocks of points.

    Parameters
    ----------
    address, table : int
        Of what `gpurho.kernels.dense_cpu.make_kernel` returns, and of its table.
    n_rows : int
        Rows of its outputs.
    owner : object
        Kept, as it holds what lies at these addresses.
    """

    address: int
    table: int
    n_rows: int
    owner: Any = field(repr=False, compare=False)


@dataclass(frozen=True)
class SmoothSizes:
    """What the descriptors of one specification hold; names as in `gpurho.descriptors.DescriptorSpec`."""

    n_species: int
    n_radial: int
    n_basis: int
    l_max: int
    cutoff: float
    contraction: Contraction | None = None

    @property
    def n_channels(self) -> int:
        """Radial channels of all species."""
        return self.n_species * self.n_basis

    @property
    def n_features(self) -> int:
        """Number of columns."""
        return self.n_species * self.n_radial + self.n_channels * (self.n_channels + 1) // 2 * self.l_max


def smooth_features(
    points: NDArray[np.float64],
    batches: Batches,
    cells: SpeciesCells,
    sizes: SmoothSizes,
    out: NDArray[np.float32],
) -> tuple[int, int, int]:
    """Descriptors of points on the CPU.

    Parameters
    ----------
    points : (n_points, 3) float64, angstrom
    batches : Batches
        Of these points.
    cells : SpeciesCells
        All atoms, images explicit, within the cutoff of any point.
    sizes : SmoothSizes
    out : (n_points, n_features) float32
        OUTPUT.

    Returns
    -------
    n_capped, n_tied, n_exact : int
        Points without any atom within the cutoff; 0 and 0, as smooth descriptors know no order of atoms.
    """
    nothing = np.empty((0, 0), np.float32)
    counts = _fill(points, batches, cells, sizes, out, (0, 0), nothing, np.empty(0, np.int32))
    return int(counts[:, 0].sum()), 0, 0


@dataclass(frozen=True)
class SmoothOutputs:
    """What a network says of points.

    Parameters
    ----------
    rows : (n_rows, n_points) float32
        Outputs of the network.
    features : (n_chosen, n_features) float32
        Descriptors of the points that were asked for.
    n_capped : int
        Points without any atom within the cutoff.
    network_share : float
        Of the time, as far as known; else 0.
    """

    rows: NDArray[np.float32]
    features: NDArray[np.float32]
    n_capped: int
    network_share: float


def smooth_outputs(
    points: NDArray[np.float64],
    batches: Batches,
    cells: SpeciesCells,
    sizes: SmoothSizes,
    network: BlockNetwork,
    chosen: NDArray[np.integer],
) -> SmoothOutputs:
    """What a network says of points on the CPU, block by block: descriptors do not leave a core's cache.

    Parameters
    ----------
    points, batches, cells, sizes
        As for `smooth_features`.
    network : BlockNetwork
    chosen : (n_chosen,) integers
        Points whose descriptors are wanted, too.
    """
    n = len(points)
    rows = np.empty((network.n_rows, n), np.float32)
    features = np.empty((len(chosen), sizes.n_features), np.float32)
    places = np.full(n, -1, np.int32)
    places[chosen] = np.arange(len(chosen))
    counts = _fill(points, batches, cells, sizes, features, (network.address, network.table), rows, places)
    n_capped, described, evaluated = (int(x) for x in counts.sum(axis=0))
    return SmoothOutputs(rows, features, n_capped, evaluated / max(1, described + evaluated))


def _fill(
    points: NDArray[np.float64],
    batches: Batches,
    cells: SpeciesCells,
    sizes: SmoothSizes,
    out: NDArray[np.float32],
    network: tuple[int, int],
    results: NDArray[np.float32],
    chosen: NDArray[np.int32],
) -> NDArray[np.int64]:
    """Run the driver; returns its counts."""
    from numba import get_num_threads

    from gpurho.kernels.smooth_cpu import VERSION, fill_smooth, make_kernel, scratch_rows

    counts = np.zeros((max(1, len(batches.block_start) - 1), 3), np.int64)
    if len(points):
        contracted, matrix = contraction_matrix(sizes)
        numbers = sizes.n_species, sizes.n_radial, sizes.n_basis, sizes.l_max
        kernel = make_kernel(*numbers, contracted, VERSION)
        fill_smooth(
            points, batches.order, batches.start, batches.block_start,
            cells.positions, cells.start, cells.origin, cells.edge, cells.shape,
            sizes.cutoff, sizes.n_radial, *scratch_rows(sizes.n_species, sizes.n_basis, sizes.l_max),
            kernel.address, matrix, out, *network, results, chosen, counts, get_num_threads(),
        )  # fmt: skip
    return counts


@lru_cache(maxsize=16)
def contraction_matrix(sizes: SmoothSizes) -> tuple[int, NDArray[np.float32]]:
    """How the contraction is given to the kernel, and its numbers, (n_species, n_basis, n_radial).

    Where the first n_basis columns A of all matrices C are well conditioned, projections are made with A^-1 C, which
    has the identity in front, and multiplied by A thereafter: fewer products for each atom. The kernel then gets A in
    place of the identity.
    """
    from gpurho.kernels._smooth_emit import CONTRACTED, FACTORED

    n = sizes.n_basis
    if sizes.contraction is None or n == 0:
        return 0, np.zeros((sizes.n_species, max(1, n), sizes.n_radial), np.float32)
    matrix = np.array(sizes.contraction)
    if max(np.linalg.cond(matrix[:, :, :n])) > WELL_CONDITIONED:
        return CONTRACTED, matrix.astype(np.float32)
    matrix[:, :, n:] = np.linalg.solve(matrix[:, :, :n], matrix[:, :, n:])
    return FACTORED, matrix.astype(np.float32)


def part_channels(sizes: SmoothSizes, species: int, values: list[Any]) -> list[Any]:
    """Channels with the identity in front, from radial functions of any kind of number; none if nothing is factored."""
    from gpurho.kernels._smooth_emit import FACTORED

    how, matrix = contraction_matrix(sizes)
    n = sizes.n_basis
    rows = matrix[species].tolist() if how == FACTORED else []
    return [reduce(add, map(mul, values[n:], row[n:]), value) for value, row in zip(values, rows, strict=False)]


def whole_channels(sizes: SmoothSizes, species: int, projections: list[Any]) -> list[Any]:
    """Projections on a species' channels from those on its `part_channels`; none if nothing is factored."""
    from gpurho.kernels._smooth_emit import FACTORED

    how, matrix = contraction_matrix(sizes)
    rows = matrix[species].tolist() if how == FACTORED else []
    return [reduce(add, map(mul, projections, row)) for row in rows]
