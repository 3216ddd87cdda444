"""Regular grids over any parallelepiped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import GridError
from gpurho.structure import MAX_COORDINATE, MIN_CELL_HEIGHT, cell_heights, real_array

MAX_AXIS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class Grid:
    """Points ``origin + (i / nx) a + (j / ny) b + (k / nz) c`` with ``0 <= i < nx`` and so on.

    The last plane along each axis is left out, whether the axis is periodic or not: a plane sum times `dv` is
    then the integral over the cell, and the layout is that of the density files of DFT codes.

    Parameters
    ----------
    shape : 3 ints
    cell : (3, 3) array, angstrom
        Edge vectors as rows.
    origin : (3,) array, angstrom
    pbc : 3 bools
        Which edges are periods; interpolation wraps along them.
    """

    shape: tuple[int, int, int]
    cell: NDArray[np.float64]
    origin: NDArray[np.float64]
    pbc: tuple[bool, bool, bool]

    def __init__(
        self,
        shape: Sequence[int],
        cell: ArrayLike,
        origin: ArrayLike = (0.0, 0.0, 0.0),
        pbc: Sequence[bool] = (True, True, True),
    ) -> None:
        try:
            sizes = tuple(int(n) for n in shape)
        except (TypeError, ValueError, OverflowError):
            sizes = ()
        if len(sizes) != 3 or any(n < 1 or n > MAX_AXIS for n in sizes) or list(sizes) != list(shape):
            raise GridError(f"grid shape {shape!r} is not three whole numbers from 1 up; give e.g. (64, 64, 64)")
        rows, start = _checked_cell(cell), real_array(origin)
        if start is None or start.shape != (3,) or not (np.abs(start) <= MAX_COORDINATE).all():
            raise GridError(f"grid origin {origin!r} is not a finite point; give (x, y, z) in angstrom")
        periods = list(pbc) if isinstance(pbc, Sequence | np.ndarray) else []
        if len(periods) != 3 or any(p not in (0, 1) for p in periods):
            raise GridError(f"grid pbc {pbc!r} does not say of three axes whether they are periods")
        rows.setflags(write=False)
        start.setflags(write=False)
        object.__setattr__(self, "shape", sizes)
        object.__setattr__(self, "cell", rows)
        object.__setattr__(self, "origin", start)
        object.__setattr__(self, "pbc", tuple(bool(p) for p in periods))

    @classmethod
    def from_spacing(
        cls,
        cell: ArrayLike,
        spacing: float,
        pbc: Sequence[bool] = (True, True, True),
        origin: ArrayLike = (0.0, 0.0, 0.0),
    ) -> Grid:
        """The coarsest grid over `cell` whose step along each cell vector is at most `spacing` angstrom."""
        if not isinstance(spacing, int | float | np.integer | np.floating) or not 0 < spacing < np.inf:
            raise GridError(f"spacing {spacing!r} is not positive; give the mesh spacing in angstrom, e.g. 0.2")
        lengths = np.linalg.norm(_checked_cell(cell), axis=-1)
        # The small slack keeps a spacing that divides the edge exactly from gaining a point through rounding.
        with np.errstate(over="ignore"):
            counts = np.ceil(lengths / float(spacing) * (1 - 1e-12))
        if np.any(counts > MAX_AXIS):
            raise GridError(f"spacing {spacing!r} gives {counts.max():.3g} points along one edge; give a larger one")
        return cls([max(1, int(n)) for n in counts], cell, origin, pbc)

    @property
    def n_points(self) -> int:
        """Number of points, exact for any size."""
        nx, ny, nz = self.shape
        return nx * ny * nz

    @property
    def volume(self) -> float:
        """Volume of the cell, angstrom^3."""
        return float(abs(np.linalg.det(self.cell)))

    @property
    def dv(self) -> float:
        """Volume per point, angstrom^3."""
        return self.volume / self.n_points

    @property
    def steps(self) -> NDArray[np.float64]:
        """Vectors from a point to the next along each axis, (3, 3) rows, angstrom."""
        return self.cell / np.array(self.shape, dtype=float)[:, None]

    def points(self, start: Sequence[int] = (0, 0, 0), stop: Sequence[int] | None = None) -> NDArray[np.float64]:
        """Cartesian points of the box ``start <= (i, j, k) < stop``, (n, 3) angstrom, last index fastest."""
        end = self.shape if stop is None else stop
        steps = self.steps
        # From global indices, so that a point has the same bits in whichever tile it lies.
        x, y, z = (np.arange(int(start[d]), int(end[d]), dtype=float)[:, None] * steps[d] for d in range(3))
        columns = (self.origin + x)[:, None, :] + y[None, :, :]
        box = np.empty((len(x), len(y), len(z), 3))
        # Each component on its own: NumPy is slow where the innermost axis is as short as 3.
        for d in range(3):
            np.add(columns[:, :, None, d], z[:, d], out=box[..., d])
        return box.reshape(-1, 3)

    def same_as(self, other: Grid) -> bool:
        """Whether both grids have the same points, to 1e-9 angstrom."""
        return (
            self.shape == other.shape
            and np.allclose(self.cell, other.cell, rtol=0, atol=1e-9)
            and np.allclose(self.origin, other.origin, rtol=0, atol=1e-9)
        )


def _checked_cell(cell: ArrayLike) -> NDArray[np.float64]:
    rows = real_array(cell)
    if rows is None or rows.shape != (3, 3) or not (np.abs(rows) <= MAX_COORDINATE).all():
        raise GridError(
            f"grid cell {cell!r} is not three finite vectors; give (3, 3) in angstrom, none beyond {MAX_COORDINATE:.0e}"
        )
    if not cell_heights(rows).min() >= MIN_CELL_HEIGHT:
        raise GridError(f"grid cell {rows.tolist()} has no volume; give three independent vectors in angstrom")
    return rows


def region_grid(grid: Grid, region: tuple[tuple[int, int], ...] | None) -> Grid:
    """The part of `grid` that `region` names as a grid of its own; an axis that is cut has no period."""
    if region is None:
        return grid
    start = np.array([low for low, _ in region], dtype=float)
    shape = [high - low for low, high in region]
    whole = [n == full for n, full in zip(shape, grid.shape, strict=True)]
    cell = np.where(np.array(whole)[:, None], grid.cell, grid.steps * np.array(shape, dtype=float)[:, None])
    pbc = [period and full for period, full in zip(grid.pbc, whole, strict=True)]
    return Grid(shape, cell, grid.origin + start @ grid.steps, pbc)
