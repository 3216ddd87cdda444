"""Tiles of a grid: integer geometry only, so that any tile is found in constant time and memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import overload

from gpurho.errors import GridError
from gpurho.grid import Grid

DEFAULT_TILE = (64, 64, 64)
Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Tile:
    """The box ``start <= (i, j, k) < stop`` of a grid, with its running number."""

    index: int
    start: Triple
    stop: Triple

    @property
    def shape(self) -> Triple:
        """Points along each axis."""
        a, b = self.start, self.stop
        return (b[0] - a[0], b[1] - a[1], b[2] - a[2])

    @property
    def n_points(self) -> int:
        """Number of points."""
        nx, ny, nz = self.shape
        return nx * ny * nz

    @property
    def slices(self) -> tuple[slice, slice, slice]:
        """Index of the tile in an array over the grid."""
        a, b = self.start, self.stop
        return (slice(a[0], b[0]), slice(a[1], b[1]), slice(a[2], b[2]))


class TileSet(Sequence[Tile]):
    """The tiles of a box of a grid, the last axis fastest; each is made when it is asked for.

    Tile boundaries are multiples of the tile shape counted from the grid's origin, so that a tile that a region
    contains whole is the same in the region as in the whole grid.
    """

    def __init__(self, start: Triple, stop: Triple, tile_shape: Triple) -> None:
        self.start, self.stop, self.tile_shape = start, stop, tile_shape
        self._first = tuple(a // t for a, t in zip(start, tile_shape, strict=True))
        self.counts = tuple(-(-b // t) - f for b, t, f in zip(stop, tile_shape, self._first, strict=True))

    def __len__(self) -> int:
        return self.counts[0] * self.counts[1] * self.counts[2]

    @property
    def n_points(self) -> int:
        """Points in all tiles."""
        n = 1
        for a, b in zip(self.start, self.stop, strict=True):
            n *= b - a
        return n

    @overload
    def __getitem__(self, index: int) -> Tile: ...
    @overload
    def __getitem__(self, index: slice) -> list[Tile]: ...
    def __getitem__(self, index: int | slice) -> Tile | list[Tile]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = int(index)
        if i < 0:
            i += len(self)
        if not 0 <= i < len(self):
            raise IndexError(f"tile {index} of {len(self)}")
        _, ny, nz = self.counts
        cell = (i // (ny * nz), i // nz % ny, i % nz)
        low = [(f + c) * t for f, c, t in zip(self._first, cell, self.tile_shape, strict=True)]
        start = tuple(max(a, lo) for a, lo in zip(self.start, low, strict=True))
        stop = tuple(min(b, lo + t) for b, lo, t in zip(self.stop, low, self.tile_shape, strict=True))
        return Tile(i, start, stop)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Tile]:
        return (self[i] for i in range(len(self)))


def make_tiles(
    grid: Grid,
    tile_shape: Sequence[int] = DEFAULT_TILE,
    region: Sequence[Sequence[int]] | None = None,
) -> TileSet:
    """Tiles that cover a grid, or the box of it that `region` names.

    Parameters
    ----------
    grid : Grid
    tile_shape : 3 ints
        Points of a whole tile along each axis; those at the far edges are smaller.
    region : 3 pairs of ints, optional
        ``((i0, i1), (j0, j1), (k0, k1))``, the stops exclusive.

    Raises
    ------
    GridError
        For a tile shape below 1 or a region that is empty or leaves the grid.
    """
    shape = _whole(tile_shape)
    if shape is None or len(shape) != 3 or min(shape) < 1:
        raise GridError(f"tile shape {tile_shape!r} is not three whole numbers from 1 up; e.g. (64, 64, 64)")
    try:
        box = [(0, n) for n in grid.shape] if region is None else [_whole(pair) for pair in region]
    except TypeError:
        box = []
    if len(box) != 3 or any(
        pair is None or len(pair) != 2 or not 0 <= pair[0] < pair[1] <= n
        for pair, n in zip(box, grid.shape, strict=False)
    ):
        raise GridError(f"region {region!r} is empty or leaves the grid {grid.shape}; give three (start, stop) pairs")
    (a, b, c), (d, e, f) = zip(*box, strict=True)
    return TileSet((a, b, c), (d, e, f), (shape[0], shape[1], shape[2]))


def _whole(values: Sequence[int]) -> tuple[int, ...] | None:
    """The values as ints, or None where one of them is not a whole number."""
    try:
        whole = tuple(int(value) for value in values)
    except (TypeError, ValueError, OverflowError):
        return None
    return whole if list(whole) == list(values) else None
