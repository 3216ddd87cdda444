"""Values of a gridded field at arbitrary points, along lines and on planes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import SettingsError
from gpurho.fields import Field, take
from gpurho.grid import Grid

POINTS_AT_ONCE = 1 << 14
"""Points interpolated together; 64 neighbours each for the cubic, so about a million values."""

MAX_SECTION = 1 << 26
"""Most points that a line or plane may have."""


@dataclass(frozen=True)
class Line:
    """A density along a straight line: distances and values, (n,), in angstrom and e/angstrom^3."""

    points: NDArray[np.float64]
    distance: NDArray[np.float64]
    mean: NDArray[np.float32]
    aleatoric: NDArray[np.float32] | None
    epistemic: NDArray[np.float32] | None

    @property
    def std(self) -> NDArray[np.float32] | None:
        """Total standard deviation, (n,)."""
        return _total(self.aleatoric, self.epistemic)


@dataclass(frozen=True)
class Section:
    """A density on a plane: point (i, j) lies at ``origin + (i / n1) u + (j / n2) v``.

    Parameters
    ----------
    origin, u, v : (3,) array, angstrom
        A corner and the two edges of the parallelogram.
    mean, aleatoric, epistemic : (n1, n2) array, e/angstrom^3
        NaN where the plane leaves the field.
    """

    origin: NDArray[np.float64]
    u: NDArray[np.float64]
    v: NDArray[np.float64]
    mean: NDArray[np.float32]
    aleatoric: NDArray[np.float32] | None
    epistemic: NDArray[np.float32] | None
    normal: NDArray[np.float64] = field(init=False)

    def __post_init__(self) -> None:
        normal = np.cross(self.u, self.v)
        object.__setattr__(self, "normal", normal / np.linalg.norm(normal))

    @property
    def std(self) -> NDArray[np.float32] | None:
        """Total standard deviation, (n1, n2)."""
        return _total(self.aleatoric, self.epistemic)

    @property
    def axes(self) -> NDArray[np.float64]:
        """Orthonormal vectors of the plane, (2, 3): along `u`, and across it on the side of `v`."""
        first = self.u / np.linalg.norm(self.u)
        return np.array([first, np.cross(self.normal, first)])

    def coordinates(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Real coordinates of the points in the plane along `axes`, two (n1, n2) arrays in angstrom."""
        n1, n2 = self.mean.shape
        u, v = self.axes @ self.u, self.axes @ self.v
        s, t = np.arange(n1)[:, None] / n1, np.arange(n2)[None, :] / n2
        return s * u[0] + t * v[0], s * u[1] + t * v[1]


def _total(a: NDArray[np.float32] | None, b: NDArray[np.float32] | None) -> NDArray[np.float32] | None:
    return None if a is None or b is None else np.hypot(a, b)


def interpolate(field_: Field, grid: Grid, points: ArrayLike, order: int = 3) -> NDArray[np.float32]:
    """Values of a field at Cartesian points.

    Order 1 is trilinear; order 3 is the local cubic convolution (Keys, a = -1/2), which meets the grid's values at
    the grid's points and errs by the third power of the spacing. Both wrap along periodic axes. Along the others
    the last value is carried on for one step beyond the first and last plane; farther out the result is NaN.

    Parameters
    ----------
    field_ : (nx, ny, nz) array or LazyField
        Of a lazy field only the chunks around the points are read.
    grid : Grid
    points : (..., 3) array, angstrom

    Returns
    -------
    (...) float32 array in the unit of the field
    """
    if order not in (1, 3):
        raise SettingsError(f"interpolation order {order!r} is not known; give 1 (linear) or 3 (cubic)")
    where = np.asarray(points, dtype=float)
    if where.shape[-1:] != (3,):
        raise SettingsError(f"points have shape {where.shape}; give (..., 3), in angstrom")
    if not np.isfinite(where).all():
        raise SettingsError("points hold values that are not finite; give Cartesian coordinates in angstrom")
    flat = where.reshape(-1, 3)
    result = np.empty(len(flat), dtype=np.float32)
    for part in _batches(len(flat)):
        result[part] = _interpolate_some(field_, grid, flat[part], order)
    return result.reshape(where.shape[:-1])


def _batches(n: int) -> Iterator[slice]:
    return (slice(at, min(at + POINTS_AT_ONCE, n)) for at in range(0, n, POINTS_AT_ONCE))


def _interpolate_some(field_: Field, grid: Grid, points: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    counts = np.array(grid.shape)
    t = (points - grid.origin) @ np.linalg.inv(grid.cell) * counts
    # A point of the grid stays one: rounding must not push it to the far side of a voxel.
    t = np.where(np.abs(t - np.rint(t)) < 1e-9, np.rint(t), t)
    base = np.floor(t).astype(np.int64)
    offsets = np.arange(2) if order == 1 else np.arange(-1, 3)
    indices, weights = [], []
    outside = np.zeros(len(points), dtype=bool)
    for axis in range(3):
        index = base[:, axis, None] + offsets
        if grid.pbc[axis]:
            index = index % counts[axis]
        else:
            outside |= (t[:, axis] < -1) | (t[:, axis] > counts[axis])
            index = np.clip(index, 0, counts[axis] - 1)
        indices.append(index)
        weights.append(_weights(np.asarray(t[:, axis] - base[:, axis], dtype=np.float64), order))
    n = len(offsets)
    shape = (len(points), n, n, n)
    i = np.broadcast_to(indices[0][:, :, None, None], shape)
    j = np.broadcast_to(indices[1][:, None, :, None], shape)
    k = np.broadcast_to(indices[2][:, None, None, :], shape)
    values = take(field_, i, j, k).astype(np.float64)
    result: NDArray[np.float64] = np.einsum("pijk,pi,pj,pk->p", values, *weights, optimize=False)
    result[outside] = np.nan
    return result


def _weights(s: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """Weights of the neighbours of a point at the fraction `s` of its step, (n_points, 2 or 4)."""
    if order == 1:
        return np.stack([1 - s, s], axis=1)
    s2, s3 = s * s, s * s * s
    return 0.5 * np.stack([-s3 + 2 * s2 - s, 3 * s3 - 5 * s2 + 2, -3 * s3 + 4 * s2 + s, s3 - s2], axis=1)


def line_points(a: ArrayLike, b: ArrayLike, n: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`n` points from `a` to `b`, both included, and their distances from `a`, in angstrom."""
    start, end = _vector("a", a), _vector("b", b)
    if not 2 <= int(n) <= MAX_SECTION:
        raise SettingsError(f"a line of {n!r} points cannot be drawn; give n from 2 to {MAX_SECTION}")
    s = np.linspace(0.0, 1.0, int(n))
    return start + s[:, None] * (end - start), s * float(np.linalg.norm(end - start))


def plane_mesh(
    grid: Grid, normal: ArrayLike, point: ArrayLike, width: float | None, spacing: float | None
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], tuple[int, int]]:
    """Corner, edges and shape of a square around `point` across `normal`; see `Density.plane`."""
    direction, centre = _vector("normal", normal), _vector("point", point)
    length = np.linalg.norm(direction)
    if not length > 1e-12:
        raise SettingsError(f"normal {direction.tolist()} has no direction; give a vector that is not zero")
    direction = direction / length
    side = float(np.cbrt(grid.volume)) if width is None else float(width)
    step = float(np.linalg.norm(grid.steps, axis=1).min()) if spacing is None else float(spacing)
    if not (np.isfinite(side) and side > 0 and np.isfinite(step) and step > 0):
        raise SettingsError(f"width {width!r} and spacing {spacing!r} must be positive lengths in angstrom")
    n = max(2, int(np.ceil(side / step)))
    if n * n > MAX_SECTION:
        raise SettingsError(f"a plane of {n} x {n} points is too large; give a larger spacing or a smaller width")
    # The Cartesian axis that lies flattest in the plane points to the right, so that pictures stand upright.
    axis = np.eye(3)[int(np.argmin(np.abs(direction)))]
    u = axis - (axis @ direction) * direction
    u /= np.linalg.norm(u)
    v = np.asarray(np.cross(direction, u), dtype=np.float64)
    return centre - 0.5 * side * (u + v), side * u, side * v, (n, n)


def mesh_points(
    origin: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64], shape: tuple[int, int]
) -> NDArray[np.float64]:
    """Points of a parallelogram, (n1, n2, 3), angstrom."""
    s, t = np.arange(shape[0]) / shape[0], np.arange(shape[1]) / shape[1]
    return origin + s[:, None, None] * u + t[None, :, None] * v


def _vector(name: str, value: ArrayLike) -> NDArray[np.float64]:
    vector = np.asarray(value, dtype=float)
    if vector.shape != (3,) or not np.isfinite(vector).all():
        raise SettingsError(f"{name} {value!r} is not a vector; give three finite numbers")
    return vector
