"""What is kept of a tile, made from its fields where they lie: nothing but the results leaves the device.

Every sum is one of whole numbers (`gpurho.exactsums`) or over a block that lies in one tile, so that results have the
same bits in whatever order tiles come, on whatever number of workers, and however the device schedules its threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gpurho.errors import HaloTooSmallError
from gpurho.exactsums import LOW, carried, exact_sum, split
from gpurho.grid import Grid
from gpurho.keep import Keep, Piece
from gpurho.kernels.blocklists import block_lists
from gpurho.partition import Tile, Triple
from gpurho.peratom import TIE

if TYPE_CHECKING:
    from gpurho.descriptors import Environment

BLOCK_EDGE = 1.6
"""Edge in angstrom of the blocks of points that share one list of atoms: some twenty atoms in aluminium."""

MAX_BLOCK = 16
"""Most points along an edge of a block; its cube is what `gpurho.exactsums` adds at once."""

AT_ONCE = {"cpu": 1 << 18, "cuda": 1 << 25}
"""Distances held at once."""

COUNTERS = 64
"""Copies of a histogram on a GPU, so that threads seldom wait for one another."""

FAR = 1e30
"""Squared distance of an atom that is not there, angstrom^2."""


class Reducer:
    """Reduces the fields of tiles.

    Parameters
    ----------
    keep : Keep
    pieces : list of Piece
        The arrays that tiles are cut into; see `gpurho.keep.pieces_of`.
    grid : Grid
    names : tuple of str
        Quantities of the fields.
    environment : Environment
        Atoms around tiles; indices of atoms are those of its structure.
    device : str
    halo : float, angstrom, optional
        How far around its tiles the environment knows all atoms; everywhere by default.
    """

    def __init__(
        self,
        keep: Keep,
        pieces: Sequence[Piece],
        grid: Grid,
        names: Sequence[str],
        environment: Environment,
        device: str,
        halo: float | None = None,
    ) -> None:
        self._pieces, self._names = list(pieces), list(names)
        self._edges = [torch.from_numpy(edges).to(device) for edges in keep.bin_edges().values()]
        self._atoms = AtomSums(grid, environment, device, halo) if keep.atoms else None

    def __call__(self, tile: Tile, fields: Sequence[Tensor]) -> tuple[list[Tensor], NDArray[np.int64] | None]:
        """The results of a tile on the device, and the atoms that its last tensor sums over.

        Parameters
        ----------
        tile : Tile
        fields : (n_points,) float32 tensors
            Mean and, where there are, aleatoric and epistemic sigmas, in C order.

        Returns
        -------
        tensors : list
            The parts of all pieces that the tile meets, float32; sums of the tile, int64, and extremes, float64 (see
            `tile_totals`); counts of the histograms one after another, int64, where kept; halves of the sums of atoms,
            (n_near, n_quantities, 2) int64, where kept: of the points' shares, and of `tile_columns` but the second.
        atoms : (n_near,) int64, or None
        """
        by_name = dict(zip(self._names, fields, strict=True))
        results = []
        for piece in self._pieces:
            if piece.box(tile) is not None:
                results.append(_part(piece, tile, by_name[piece.quantity]))
        columns = tile_columns(fields)
        results += tile_totals(columns)
        if self._edges:
            # Densities and total sigmas are the first two columns.
            results.append(torch.cat([_histogram(c, e) for c, e in zip(columns, self._edges, strict=False)]))
        if self._atoms is None:
            return results, None
        atoms, sums = self._atoms(tile, [columns[0], *columns[2:]])
        return [*results, sums], atoms


def _part(piece: Piece, tile: Tile, field: Tensor) -> Tensor:
    box = field.view(tile.shape)
    if piece.plane is not None:
        axis, index = piece.plane
        return box.select(axis, index - tile.start[axis]).contiguous()
    if piece.factors == (1, 1, 1):
        return field
    return block_means(box, piece.factors, root=piece.quantity != "mean")


def block_means(field: Tensor, factors: Triple, root: bool = False) -> Tensor:
    """Means, or roots of mean squares, over blocks of a (nx, ny, nz) field; sums in float64 in a fixed order."""
    sums = field.double().square() if root else field.double()
    for axis, f in enumerate(factors):
        parts = [sums[(slice(None),) * axis + (slice(offset, None, f),)] for offset in range(f)]
        # One after another: the same bits on every device.
        sums = parts[0].clone()
        for part in parts[1:]:
            sums += part
    sums /= float(factors[0] * factors[1] * factors[2])
    return (sums.sqrt_() if root else sums).float()


def tile_columns(fields: Sequence[Tensor]) -> list[Tensor]:
    """In float64 the mean; and with sigmas the total sigma, aleatoric^2, epistemic, epistemic^2."""
    if len(fields) == 1:
        return [fields[0].double()]
    mean, aleatoric, epistemic = (field.double() for field in fields)
    a2, e2 = aleatoric * aleatoric, epistemic * epistemic
    return [mean, (a2 + e2).sqrt_(), a2, epistemic, e2]


def tile_totals(columns: Sequence[Tensor]) -> list[Tensor]:
    """Sums of `tile_columns` as `gpurho.kept.totals_of` reads them.

    (2 k + 1,) int64: the halves of the sum of each column, then the number of negative densities. And (3,) float64:
    smallest and largest mean, largest total sigma.
    """
    mean = columns[0]
    largest = columns[1].amax() if len(columns) > 1 else torch.zeros_like(mean[0])
    extremes = torch.stack([mean.amin(), mean.amax(), largest])
    return [torch.cat([*(exact_sum(column) for column in columns), (mean < 0).sum()[None]]), extremes]


def _histogram(values: Tensor, edges: Tensor) -> Tensor:
    """Counts (n_bins,) int64; what lies beyond the edges counts in the outermost bins."""
    n = len(edges) - 1
    copies = COUNTERS if values.device.type == "cuda" else 1
    place = torch.bucketize(values, edges, right=True).sub_(1).clamp_(0, n - 1)
    if copies > 1:
        place += torch.arange(len(values), device=values.device).remainder_(copies).mul_(n)
    counts = torch.zeros(copies * n, dtype=torch.int64, device=values.device)
    counts.scatter_add_(0, place, torch.ones_like(place))
    return counts.view(copies, n).sum(0)


class AtomSums:
    """Sums over the points nearest to each atom; points whose nearest atoms agree within `TIE` are shared equally."""

    def __init__(self, grid: Grid, environment: Environment, device: str, halo: float | None = None) -> None:
        self._grid, self._environment, self._device, self._halo = grid, environment, torch.device(device), halo
        lengths = np.linalg.norm(grid.steps, axis=1)
        edges = [int(np.clip(round(BLOCK_EDGE / length), 1, MAX_BLOCK)) for length in lengths]
        self._block: Triple = (edges[0], edges[1], edges[2])
        local = np.stack(np.meshgrid(*(np.arange(b) - (b - 1) / 2 for b in edges), indexing="ij"), -1).reshape(-1, 3)
        offsets = local @ grid.steps
        squares = np.square(offsets).sum(1)
        self._radius = float(np.sqrt(squares.max()))
        # |p - a|^2 as one product of matrices: (-2 a, |a|^2, 1) with (p, 1, |p|^2), counted from the block's centre.
        rows = np.vstack([offsets.T, np.ones(len(offsets)), squares])
        self._points = torch.from_numpy(rows).to(self._device)
        # Enough in a solid; elsewhere the search is done once more.
        self._start = 2.0 * self._radius + float(np.cbrt(environment.structure.volume / len(environment.structure)))
        self._places: dict[Triple, tuple[Tensor, Tensor]] = {}

    def __call__(self, tile: Tile, columns: Sequence[Tensor]) -> tuple[NDArray[np.int64], Tensor]:
        """Atoms near a tile, (n_near,), and the halves of their sums, (n_near, 1 + n_columns, 2) int64.

        The first is the sum of the points' shares, the others of the `columns`, (n_points,) float64 on the device.
        """
        centres = self._centres(tile)
        positions, owners, lists = self._candidates(centres)
        atoms, local = np.unique(owners, return_inverse=True)
        # One more row takes what fills the lists up.
        rows = np.append(local.reshape(-1), len(atoms))[lists]
        index, inside = self._place(tile.shape)
        near_atoms = self._matrix(centres, positions, lists)
        where = self._there(rows)
        n_columns = 1 + len(columns)
        found = torch.zeros((len(atoms) + 1, 2 * n_columns), dtype=torch.int64, device=self._device)
        n_points, n_atoms = index.size(1), lists.shape[1]
        at_once = max(1, AT_ONCE[self._device.type] // (n_points * n_atoms))
        for first in range(0, len(index), at_once):
            rows_now = slice(first, first + at_once)
            # (blocks, atoms, points)
            squared = torch.matmul(near_atoms[rows_now], self._points)
            nearest = squared.amin(1, keepdim=True).clamp_(min=0.0)
            near = (squared < nearest.sqrt_().add_(TIE).square_()).double()
            share = inside[rows_now] / near.sum(1)
            values = [share, *(column[index[rows_now]] * share for column in columns)]
            high, low = split(torch.stack(values, -1))
            sums = torch.matmul(near, torch.cat([high, low], -1))
            whole = torch.cat(carried(sums[..., :n_columns], sums[..., n_columns:]), -1)
            found.index_add_(0, where[rows_now].reshape(-1), whole.view(-1, 2 * n_columns))
        high, low = found[:-1, :n_columns], found[:-1, n_columns:]
        return atoms.astype(np.int64), torch.stack([high + (low >> LOW), low & ((1 << LOW) - 1)], -1)

    def _centres(self, tile: Tile) -> NDArray[np.float64]:
        axes = [
            start + np.arange(0, count, b) + (b - 1) / 2
            for start, count, b in zip(tile.start, tile.shape, self._block, strict=True)
        ]
        index = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
        return np.ascontiguousarray(self._grid.origin + index @ self._grid.steps)

    def _candidates(
        self, centres: NDArray[np.float64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int64]]:
        """Atoms, image by image, and for each block a list of those that may be nearest to its points."""
        reach = self._start if self._halo is None else min(self._start, self._halo)
        # Centres of blocks that stand out of the tile lie up to a radius beyond it.
        limit = np.inf if self._halo is None else self._halo - self._radius
        while True:
            positions, owners = self._environment.atoms_near(centres, reach)
            if len(owners):
                lists, needed = block_lists(centres, self._radius, positions)
                if needed <= reach:
                    return positions, owners, lists
            else:
                needed = 2.0 * reach
            if needed > limit:
                raise HaloTooSmallError(
                    f"the nearest atom of a point may lie {needed:.3g} angstrom away, beyond the halo of"
                    f" {limit:.3g} of the atoms at hand; predict on one device with all atoms in memory, or leave out"
                    " keep='atoms'"
                )
            reach = needed

    def _place(self, shape: Triple) -> tuple[Tensor, Tensor]:
        """For a tile's blocks, the numbers of their points, (n_blocks, n) int64, and 1 for points inside, else 0."""
        if shape not in self._places:
            axes = [np.arange(-(-n // b) * b).reshape(-1, b) for n, b in zip(shape, self._block, strict=True)]
            x = axes[0][:, None, None, :, None, None]
            y = axes[1][None, :, None, None, :, None]
            z = axes[2][None, None, :, None, None, :]
            inside = (x < shape[0]) & (y < shape[1]) & (z < shape[2])
            flat = (np.minimum(x, shape[0] - 1) * shape[1] + np.minimum(y, shape[1] - 1)) * shape[2]
            flat = flat + np.minimum(z, shape[2] - 1)
            n = self._points.size(1)
            self._places[shape] = (
                torch.from_numpy(flat.reshape(-1, n)).to(self._device),
                torch.from_numpy(inside.reshape(-1, n).astype(np.float64)).to(self._device),
            )
        return self._places[shape]

    def _there(self, array: NDArray[np.float64] | NDArray[np.int64]) -> Tensor:
        """On the device; from pinned memory, so that the host need not wait for what the device is at work on."""
        tensor = torch.from_numpy(array)
        if self._device.type != "cuda" or not tensor.numel():
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _matrix(self, centres: NDArray[np.float64], positions: NDArray[np.float64], lists: NDArray[np.int64]) -> Tensor:
        """(n_blocks, n_listed, 5): -2 a, |a|^2, 1 of each block's atoms, counted from its centre."""
        index = self._there(lists)
        places = self._there(positions)[index.clamp(min=0)]
        away = places - self._there(centres)[:, None, :]
        squares = away.square().sum(-1, keepdim=True).masked_fill_(index[..., None] < 0, FAR)
        return torch.cat([-2.0 * away, squares, torch.ones_like(squares)], -1)
