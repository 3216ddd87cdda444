"""Planes of a density for a report: few, thinned, read one at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.keep import plane_indices
from gpurho.sections import Section
from gpurho.structure import Structure, cell_heights

MAX_PIXELS = 160
"""Points along an edge of a picture; of larger planes evenly spread points are shown."""

MAX_SLICES = 24
EASY_POINTS = 5e7
"""Points of a field up to which `MAX_SLICES` planes are read along each axis; of larger ones fewer, so that the time of
reading grows more slowly than the field."""

MAX_ATOMS = 250
"""Atoms that are drawn in one plane; of more, none."""

MANY_ATOMS = 50_000
"""Atoms of a structure from which on none are drawn in slices: a plane has more than can be told apart."""

WITHIN = 0.5
"""Atoms this close to a plane are drawn, angstrom."""

WIDE = 60.0
"""Largest sigma over that of the surest quarter of the points, from which on colours follow the logarithm."""

CLOSE_UP = 8.0
"""Edge of the close-up of an atom, angstrom."""

CLOSE_UP_POINTS = 60

LOOK = 3.0
"""How far around an atom the largest sigma is looked for, angstrom."""

Floats = NDArray[np.float64]
Plane = NDArray[np.float32]


@dataclass(frozen=True)
class Mark:
    """An atom in a plane: in-plane coordinates from the plane's origin along its `axes` (angstrom), and its index."""

    x: float
    y: float
    atom: int


@dataclass(frozen=True, eq=False)
class Frames:
    """Parallel planes of one shape.

    Attributes
    ----------
    axis : int or None
        The cell vector that the planes lie across; None for a plane of another kind.
    fractions : (n,) tuple
        Positions along it.
    u, v : (2,) arrays, angstrom
        Edges of the parallelogram in its own plane; `u` points to the right, `v` up.
    fields : dict of str to list of n (n1, n2) arrays, e/angstrom^3
        "mean" and, where there is an uncertainty, "std".
    wraps : (bool, bool)
        Whether the field goes on periodically beyond the edges.
    marks : list of n tuples, or None where there are too many atoms to draw
    thinned : bool
        Whether some points of the planes are left out.
    """

    axis: int | None
    fractions: tuple[float, ...]
    u: Floats
    v: Floats
    fields: dict[str, list[Plane]]
    wraps: tuple[bool, bool]
    marks: list[tuple[Mark, ...]] | None
    thinned: bool = False


def slice_count(n_points: int, wanted: int | None = None) -> int:
    """Planes to show along an axis of a field with so many points."""
    if wanted is not None:
        if isinstance(wanted, bool) or not 1 <= int(wanted) <= MAX_SLICES:
            raise SettingsError(f"{wanted!r} slices along an axis cannot be shown; give 1 to {MAX_SLICES}")
        return int(wanted)
    return max(6, int(MAX_SLICES * min(1.0, (EASY_POINTS / max(1, n_points)) ** (1 / 3))))


def axis_slices(density: Density, axis: int, count: int, tick: Callable[[int], object] | None = None) -> Frames | None:
    """Planes of grid points across a cell vector: evenly spread, or those that the prediction kept.

    `tick` is called with 1 after each plane. None where no plane across this axis is known.
    """
    fractions = positions(density, axis, count)
    if not fractions:
        return None
    names = ("mean", "std") if density.uncertain else ("mean",)
    fields: dict[str, list[Plane]] = {name: [] for name in names}
    thinned = False
    section: Section | None = None
    for fraction in fractions:
        section = density.slice(axis, fraction)
        for name in names:
            small, less = thin(np.asarray(getattr(section, name)))
            fields[name].append(small)
            thinned = thinned or less
        if tick is not None:
            tick(1)
    assert section is not None  # there is at least one plane
    first, second = (d for d in range(3) if d != axis)
    wraps = (bool(density.grid.pbc[first]), bool(density.grid.pbc[second]))
    u, v = section.axes @ section.u, section.axes @ section.v
    marks = _slice_marks(density, axis, fractions, section.axes)
    return Frames(axis, tuple(fractions), u, v, fields, wraps, marks, thinned)


def positions(density: Density, axis: int, count: int) -> list[float]:
    """Fractions of a cell vector at which planes of points can be shown."""
    n = density.shape[axis]
    if density.has_field:
        few = min(count, n)
        # On planes of points, so that nothing is interpolated and one layer of chunks is read for each.
        return [(i * n // few) / n for i in range(few)]
    if density.kept is None:
        return []
    kept = sorted({position for kept_axis, position in density.kept.keep.slices if kept_axis == axis})
    # Fractions 0 and 1 of a periodic axis are one plane.
    found = {plane_indices(density.grid, axis, position): position for position in reversed(kept)}
    return sorted(found.values())[:MAX_SLICES]


def thin(values: Plane) -> tuple[Plane, bool]:
    """At most `MAX_PIXELS` evenly spread points along each edge, and whether that leaves any out."""
    rows = [np.arange(min(n, MAX_PIXELS)) * n // min(n, MAX_PIXELS) for n in values.shape]
    return values[np.ix_(*rows)], max(values.shape) > MAX_PIXELS


def _slice_marks(
    density: Density, axis: int, fractions: Sequence[float], axes: Floats
) -> list[tuple[Mark, ...]] | None:
    """Atoms in each plane, periodic images at the edges included."""
    structure, grid = density.structure, density.grid
    if len(structure) > MANY_ATOMS:
        return None
    inverse = np.linalg.inv(structure.cell)
    relative = (structure.positions - grid.origin) @ inverse
    relative = np.where(structure.pbc, relative - np.floor(relative), relative)
    shifts = np.array(list(product(*[(-1, 0, 1) if p else (0,) for p in structure.pbc])), dtype=float)
    images = ((relative[:, None, :] + shifts).reshape(-1, 3)) @ structure.cell
    owners = np.repeat(np.arange(len(structure)), len(shifts))
    place = images @ np.linalg.inv(grid.cell)
    margin = WITHIN / cell_heights(grid.cell)
    inside = np.all((place >= -margin) & (place <= 1 + margin), axis=1)
    images, owners, place = images[inside], owners[inside], place[inside]
    result: list[tuple[Mark, ...]] = []
    for fraction in fractions:
        near = np.abs(place[:, axis] - fraction) <= margin[axis]
        flat = (images[near] - fraction * grid.cell[axis]) @ axes.T
        found = [Mark(float(x), float(y), int(i)) for (x, y), i in zip(flat, owners[near], strict=True)]
        if len(found) > MAX_ATOMS:
            return None
        result.append(tuple(found))
    return result


# -- close-ups of atoms -----------------------------------------------------------------------------------------


def close_up(density: Density, atom: int) -> Frames:
    """A square around an atom, in the plane of the atom, the largest sigma near it, and a near neighbour."""
    structure = density.structure
    reach = CLOSE_UP / math.sqrt(2.0) + WITHIN
    vectors, owners = neighbours(structure, atom, reach)
    doubt = doubtful_direction(density, structure.positions[atom])
    spanning = vectors if doubt is None else np.concatenate([doubt[None], vectors])
    section = density.plane(plane_normal(spanning), structure.positions[atom], CLOSE_UP, CLOSE_UP / CLOSE_UP_POINTS)
    names = ("mean", "std") if density.uncertain else ("mean",)
    fields = {name: [np.asarray(getattr(section, name))] for name in names}
    u, v = section.axes @ section.u, section.axes @ section.v
    vectors = np.concatenate([np.zeros((1, 3)), vectors])
    owners = np.concatenate([[atom], owners])
    near = np.abs(vectors @ section.normal) <= WITHIN
    flat = vectors[near] @ section.axes.T + 0.5 * (u + v)
    marks = tuple(Mark(float(x), float(y), int(i)) for (x, y), i in zip(flat, owners[near], strict=True))
    return Frames(None, (0.0,), u, v, fields, (False, False), [marks])


def doubtful_direction(density: Density, centre: Floats) -> Floats | None:
    """The vector from a point to the largest sigma within `LOOK`; None without sigmas, or where it is at the point."""
    if not density.uncertain:
        return None
    steps = np.linspace(-LOOK, LOOK, 13)
    offsets = np.stack(np.meshgrid(steps, steps, steps, indexing="ij"), axis=-1).reshape(-1, 3)
    offsets = offsets[np.linalg.norm(offsets, axis=1) <= LOOK]
    _, aleatoric, epistemic = density.at(centre + offsets, order=1)
    sigma = np.nan_to_num(np.hypot(aleatoric, epistemic), nan=-1.0)
    vector = np.asarray(offsets[int(np.argmax(sigma))])
    return vector if np.linalg.norm(vector) > 1e-6 else None


def neighbours(structure: Structure, atom: int, reach: float) -> tuple[Floats, NDArray[np.int64]]:
    """Vectors to all atoms and images within `reach` (angstrom) of an atom, and their indices, nearest first."""
    heights = cell_heights(structure.cell)
    fractional = (structure.positions - structure.positions[atom]) @ np.linalg.inv(structure.cell)
    fractional = np.where(structure.pbc, fractional - np.rint(fractional), fractional)
    owners = np.arange(len(structure))
    # Axis by axis, so that of millions of atoms only those in a thin layer are looked at again.
    for axis in range(3):
        most = math.ceil(reach / heights[axis] + 0.5) if structure.pbc[axis] else 0
        rows, moved = [], []
        for shift in range(-most, most + 1):
            there = np.flatnonzero(np.abs(fractional[:, axis] + shift) * heights[axis] <= reach)
            rows.append(owners[there])
            moved.append(fractional[there] + shift * np.eye(3)[axis])
        owners, fractional = np.concatenate(rows), np.concatenate(moved)
    vectors = fractional @ structure.cell
    length = np.linalg.norm(vectors, axis=1)
    order = np.argsort(length, kind="stable")
    order = order[(length[order] > 1e-6) & (length[order] <= reach)]
    return vectors[order], owners[order]


def plane_normal(vectors: Floats) -> Floats:
    """Normal of the plane of the first of (n, 3) vectors and the next that is not along it; else the third axis."""
    for other in vectors[1:]:
        normal = np.cross(vectors[0], other)
        if np.linalg.norm(normal) > 0.3 * np.linalg.norm(vectors[0]) * np.linalg.norm(other):
            return np.asarray(normal)
    return np.array([0.0, 0.0, 1.0])


# -- scales -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The colour scale of one quantity.

    Attributes
    ----------
    low, high : float, e/angstrom^3
        Values at both ends.
    clipped : bool
        Whether values above `high` were seen.
    log : bool
        Whether colours follow the logarithm; `low` is positive then.
    """

    low: float
    high: float
    clipped: bool = False
    log: bool = False

    def parts(self, values: NDArray[Any]) -> Floats:
        """Where values lie on the scale, 0 to 1; NaN stays."""
        x = np.asarray(values, dtype=np.float64)
        if self.log:
            x = np.log(np.maximum(x, self.low) / self.low) / math.log(self.high / self.low)
        else:
            x = (x - self.low) / (self.high - self.low)
        return np.clip(x, 0.0, 1.0)


def common_scale(frames: Sequence[Frames], name: str, limit: float | None = None) -> Scale:
    """One scale for all planes of a quantity.

    From the smallest value (of sigmas from zero) to the largest, unless a few points (one in a thousand) lie so far
    above the others that these would have one colour. Of sigmas over more than `WIDE` it follows the logarithm.

    Parameters
    ----------
    limit : float, optional
        The largest value of the field, which interpolated planes may overshoot.
    """
    values = np.concatenate([plane[np.isfinite(plane)] for f in frames for plane in f.fields.get(name, [])])
    if values.size == 0:
        return Scale(0.0, 1.0)
    most = float(values.max()) if limit is None else min(limit, float(values.max()))
    if name == "std":
        low, middle = (float(x) for x in np.quantile(values, (0.01, 0.25)))
        if low > 0 and WIDE * middle < most:
            return Scale(low, most, log=True)
    low = 0.0 if name == "std" else min(0.0, float(values.min()))
    usual = float(np.quantile(values, 0.999))
    high = usual if 0 < 2.0 * usual < most else most
    return Scale(low, high if high > low else low + 1e-6, most > high)


__all__ = ["Frames", "Mark", "Scale", "axis_slices", "close_up", "common_scale", "neighbours", "slice_count"]
