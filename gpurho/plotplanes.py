"""Which plane a picture shows: planes of grid points, Miller indices of a crystal, any direction; and its atoms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.density import Density
from gpurho.errors import SettingsError
from gpurho.sections import MAX_SECTION, Section, mesh_points, plane_mesh
from gpurho.structure import Structure

MAX_PIXELS = 1200
"""Points along an edge of a picture; of larger sections every n-th is drawn."""

MIN_PIXELS = 160
"""Points along an edge of a plane that is not one of grid points: interpolated finer than a coarse grid's."""

PATCH = 120
"""Points along the edges of the patches that planes are interpolated in."""

MAX_INDEX = 99
"""Largest Miller index."""

_TOUCH = 1e-6
"""Atoms so close outside of a section, angstrom, lie on its edge but for rounding."""


@dataclass(frozen=True)
class Cut:
    """A plane through a density, ready to draw.

    Parameters
    ----------
    section : Section
        With at most `MAX_PIXELS` points along each edge; along periodic edges of the cell the first row stands again
        at the end, so that the picture reaches from edge to edge.
    caption : str
        Which plane it is.
    labels : 2 str
        Directions of the axes, without unit.
    """

    section: Section
    caption: str
    labels: tuple[str, str]


def miller_normal(indices: ArrayLike, cell: ArrayLike) -> NDArray[np.float64]:
    """The normal ``h b1 + k b2 + l b3`` of the planes (hkl) of a cell, (3,), 1/angstrom.

    The points x of such a plane have ``normal @ x = h f1 + k f2 + l f3 = constant`` with fractional coordinates f.

    Raises
    ------
    SettingsError
        For indices that are not three whole numbers, or all zero.
    """
    try:
        values = np.asarray(indices, dtype=float)
    except (TypeError, ValueError):
        values = np.empty(0)
    whole = values.shape == (3,) and np.isfinite(values).all() and np.array_equal(values, np.rint(values))
    if not (whole and values.any() and np.abs(values).max() <= MAX_INDEX):
        raise SettingsError(
            f"plane {indices!r} is not one; give three whole Miller indices, not all zero, e.g. (1, 1, 0)"
        )
    normal: NDArray[np.float64] = values @ np.linalg.inv(np.asarray(cell, dtype=float)).T
    return normal


def choose_cut(
    density: Density,
    axis: int | None = None,
    position: float | None = None,
    *,
    plane: Sequence[int] | None = None,
    crystal: ArrayLike | None = None,
    normal: ArrayLike | None = None,
    point: ArrayLike | None = None,
    atom: int | None = None,
    width: float | None = None,
) -> Cut:
    """The plane that the arguments of `gpurho.plotting.plot_density` name; only what lies on it is read.

    Raises
    ------
    SettingsError
        For arguments that name no plane, or more than one.
    """
    centre = _through(density, point, atom, position)
    if plane is None and normal is None:
        if crystal is not None or point is not None or width is not None:
            raise SettingsError("crystal, point and width go with plane or normal; give one of these (--plane 1 1 0)")
        return _grid_cut(density, 2 if axis is None else axis, position, centre)
    if axis is not None:
        raise SettingsError(f"axis {axis!r} is of planes of grid points; leave it out with plane and normal")
    if plane is not None and normal is not None:
        raise SettingsError(f"plane {plane!r} and normal {normal!r} exclude each other; give one")
    if plane is None:
        if crystal is not None or position is not None:
            raise SettingsError("crystal and position do not go with normal; give point, or plane instead of normal")
        return _free_cut(density, normal, centre, width)
    return _crystal_cut(density, plane, _crystal_cell(density.structure.cell, crystal), position, centre, width)


def _through(
    density: Density, point: ArrayLike | None, atom: int | None, position: float | None
) -> NDArray[np.float64] | None:
    if sum(value is not None for value in (point, atom, position)) > 1:
        raise SettingsError("point, atom and position each say where the plane lies; give one of them")
    if atom is not None:
        n = len(density.structure)
        if not 0 <= int(atom) < n:
            raise SettingsError(f"atom {atom!r} is not among the {n} of the structure; give 0 to {n - 1}")
        return np.array(density.structure.positions[int(atom)])
    if point is None:
        return None
    where = np.asarray(point, dtype=float)
    if where.shape != (3,) or not np.isfinite(where).all():
        raise SettingsError(f"point {point!r} is not one; give three coordinates in angstrom")
    return where


def _centre(density: Density) -> NDArray[np.float64]:
    centre: NDArray[np.float64] = density.grid.origin + 0.5 * density.grid.cell.sum(axis=0)
    return centre


# -- the three kinds of planes ----------------------------------------------------------------------------------------


def _grid_cut(density: Density, axis: int, position: float | None, centre: NDArray[np.float64] | None) -> Cut:
    place = 0.5 if position is None else position
    if centre is not None and axis in (0, 1, 2):
        place = float(((centre - density.grid.origin) @ np.linalg.inv(density.grid.cell))[axis])
        place = place - np.floor(place) if density.grid.pbc[axis] else place
    section = density.slice(axis, place)
    first, second = (d for d in range(3) if d != axis)
    section = thinned(section, (density.grid.pbc[first], density.grid.pbc[second]))
    names = "abc"[first], "abc"[second]
    square = abs(section.u @ section.v) < 1e-6 * np.linalg.norm(section.u) * np.linalg.norm(section.v)
    labels = f"along $\\mathbf{{{names[0]}}}$", f"along $\\mathbf{{{names[1]}}}$"
    if not square:
        labels = labels[0], f"across $\\mathbf{{{names[0]}}}$"
    return Cut(section, f"plane at {place:.4g} of cell vector $\\mathbf{{{'abc'[axis]}}}$", labels)


def _free_cut(
    density: Density, normal: ArrayLike | None, centre: NDArray[np.float64] | None, width: float | None
) -> Cut:
    through = _centre(density) if centre is None else centre
    origin, u, v, _ = plane_mesh(density.grid, normal, through, width, None)  # type: ignore[arg-type]
    text = ", ".join(f"{x:g}" for x in np.asarray(normal, dtype=float))
    labels = _direction(u, np.eye(3)), _direction(v, np.eye(3))
    return Cut(_sampled(density, origin, u, v), f"plane across ({text})", labels)


def _crystal_cut(
    density: Density,
    plane: Sequence[int],
    cell: NDArray[np.float64],
    position: float | None,
    centre: NDArray[np.float64] | None,
    width: float | None,
) -> Cut:
    normal = miller_normal(plane, cell)
    through = _centre(density) if centre is None else centre
    if position is not None:
        if not np.isfinite(position):
            raise SettingsError(f"position {position!r} is not finite; give h x + k y + l z of the plane's points")
        through = through + (float(position) - normal @ through) * normal / (normal @ normal)
    u = _shortest(plane, cell)
    u /= np.linalg.norm(u)
    # A square as `plane_mesh` checks it, turned to the crystal's own direction.
    corner, side, _, _ = plane_mesh(density.grid, normal, through, width, None)
    edge = float(np.linalg.norm(side))
    v = np.cross(normal / np.linalg.norm(normal), u)
    corner = through - 0.5 * edge * (u + v)
    labels = _direction(u, cell), _direction(v, cell)
    name = "".join(_digit(int(i)) for i in plane) if max(abs(int(i)) for i in plane) < 10 else _spaced(plane)
    return Cut(_sampled(density, corner, edge * u, edge * v), f"plane $({name})$", labels)


def _crystal_cell(cell: NDArray[np.float64], crystal: ArrayLike | None) -> NDArray[np.float64]:
    """The crystal's cell: that of the structure, a part of it, or one of its own."""
    if crystal is None:
        return cell
    given = np.asarray(crystal, dtype=float)
    if given.shape == (3,) and np.array_equal(given, np.rint(given)) and (given >= 1).all():
        return np.asarray(cell / given[:, None])
    if given.shape == (3, 3) and np.isfinite(given).all() and abs(np.linalg.det(given)) > 1e-6:
        return given
    raise SettingsError(
        f"crystal {np.round(given, 4).tolist()} is not known; give how many crystal cells the cell holds along each"
        " vector, e.g. (3, 3, 3), or the crystal's three cell vectors in angstrom"
    )


def _sampled(density: Density, origin: NDArray[np.float64], u: NDArray[np.float64], v: NDArray[np.float64]) -> Section:
    """Values on a parallelogram, the far edges included, as fine as the grid within what a picture shows."""
    step = float(np.linalg.norm(density.grid.steps, axis=1).min())
    counts = [int(np.clip(np.ceil(np.linalg.norm(e) / step), MIN_PIXELS, MAX_PIXELS)) for e in (u, v)]
    assert counts[0] * counts[1] <= MAX_SECTION  # MAX_PIXELS is far below
    # One row more than `Section` counts: the last one lies on the far edge.
    whole = [e * (n / (n - 1)) for e, n in zip((u, v), counts, strict=True)]
    points = mesh_points(origin, whole[0], whole[1], (counts[0], counts[1]))
    fields = [np.empty(points.shape[:2], np.float32) for _ in range(3 if density.uncertain else 1)]
    # Patches rather than rows: each lies in few chunks of a field on disk, which are read for it.
    for i, j in product(range(0, counts[0], PATCH), range(0, counts[1], PATCH)):
        part = slice(i, i + PATCH), slice(j, j + PATCH)
        for field, values in zip(fields, density.at(points[part]), strict=True):
            field[part] = values
    aleatoric, epistemic = fields[1:] if len(fields) == 3 else (None, None)
    return Section(origin, whole[0], whole[1], fields[0], aleatoric, epistemic)


# -- directions -------------------------------------------------------------------------------------------------------


def _shortest(plane: Sequence[int], cell: NDArray[np.float64]) -> NDArray[np.float64]:
    """The shortest lattice vector in the planes (hkl), angstrom; of equals one like [1-10]."""
    h, k, m = (int(i) for i in plane)
    reach = max(abs(h), abs(k), abs(m), 2)
    # Two of these three always lie in the plane and are not parallel; the shortest is among small sums of them.
    basic = [np.array(w) for w in ((0, m, -k), (-m, 0, h), (k, -h, 0)) if any(w)]
    few = range(-min(reach, 4), min(reach, 4) + 1)
    small = [np.array(w) for w in product(few, repeat=3) if any(w) and h * w[0] + k * w[1] + m * w[2] == 0]
    found = sorted(small + basic, key=lambda w: (round(float(np.linalg.norm(w @ cell)), 6), abs(w[2]), *-w))
    vector: NDArray[np.float64] = found[0] @ cell
    return vector


def _direction(vector: NDArray[np.float64], cell: NDArray[np.float64], largest: int = 6) -> str:
    """The lattice direction of a vector, "along [1-10]"; empty where its indices are not small."""
    fractions = vector @ np.linalg.inv(cell)
    fractions = fractions / np.abs(fractions).max()
    for n in range(1, largest + 1):
        if np.allclose(fractions * n, np.rint(fractions * n), rtol=0, atol=1e-3 * n):
            return "along $[" + "".join(_digit(int(i)) for i in np.rint(fractions * n)) + "]$"
    return ""


def _digit(index: int) -> str:
    return f"\\overline{{{-index}}}" if index < 0 else str(index)


def _spaced(plane: Sequence[int]) -> str:
    return "\\ ".join(_digit(int(i)) for i in plane)


# -- thinning and atoms -----------------------------------------------------------------------------------------------


def thinned(section: Section, periodic: tuple[bool, bool] = (False, False)) -> Section:
    """The section with at most `MAX_PIXELS` points along each edge, and one more along periodic ones."""
    n1, n2 = section.mean.shape
    s1, s2 = -(-n1 // MAX_PIXELS), -(-n2 // MAX_PIXELS)
    index = [np.arange(0, n, s) for n, s in ((n1, s1), (n2, s2))]
    places = [i.astype(float) / n for i, n in zip(index, (n1, n2), strict=True)]
    for d, wraps in enumerate(periodic):
        if wraps:
            index[d], places[d] = np.append(index[d], 0), np.append(places[d], 1.0)
    if any(len(p) < 2 for p in places):
        return section
    if s1 == s2 == 1 and not any(periodic):
        return section
    # Edges such that every point keeps its place. The last step to the far edge of a thinned, periodic section may be
    # shorter than the others; it is left out then, since points are evenly spaced.
    for d in (0, 1):
        if not np.isclose(places[d][-1] - places[d][-2], places[d][1] - places[d][0], rtol=1e-9, atol=0):
            index[d], places[d] = index[d][:-1], places[d][:-1]
    u, v = (e * (p[1] - p[0]) * len(p) for e, p in zip((section.u, section.v), places, strict=True))
    both = np.ix_(index[0], index[1])
    fields = [None if f is None else f[both] for f in (section.aleatoric, section.epistemic)]
    return replace(section, u=u, v=v, mean=section.mean[both], aleatoric=fields[0], epistemic=fields[1])


def atoms_of(
    structure: Structure, section: Section, within: float, margin: float = 0.0
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64]]:
    """Atoms and periodic images close to a section, or at most `margin` beside it.

    Returns
    -------
    places : (n, 2) array, angstrom
        In-plane coordinates along `Section.axes`.
    atoms : (n,) array of int
        Which atom each is.
    heights : (n,) array, angstrom
        Distance from the plane along its normal, with sign.
    """
    # The far edge of a section lies one step before u and v end.
    n1, n2 = section.mean.shape
    u, v = section.u * ((n1 - 1) / n1), section.v * ((n2 - 1) / n2)
    corners = section.origin + np.array([[0.0] * 3, u, v, u + v])
    cell = structure.cell
    inverse = np.linalg.inv(cell)
    fractional = corners @ inverse
    # A plane's atoms may lie across a face of the cell from it.
    reach = max(within, margin) * np.linalg.norm(inverse, axis=0)
    own = structure.positions @ inverse
    own = np.where(structure.pbc, own - np.floor(own), own)
    low = np.where(structure.pbc, np.floor(fractional.min(axis=0) - reach) - 1, 0).astype(int)
    high = np.where(structure.pbc, np.floor(fractional.max(axis=0) + reach) + 1, 0).astype(int)
    edges = np.linalg.inv(np.stack([u, v, section.normal]))
    # The columns of the inverse are across the faces, as the margin is measured.
    slack = (margin + _TOUCH) * np.linalg.norm(edges[:, :2], axis=0)
    places, atoms, heights = [], [], []
    for shift in product(*(range(a, b + 1) for a, b in zip(low, high, strict=True))):
        relative = (own + np.array(shift, dtype=float)) @ cell - section.origin
        along = relative @ edges
        near = np.abs(along[:, 2]) <= within + _TOUCH
        near &= np.all((along[:, :2] >= -slack) & (along[:, :2] <= 1 + slack), axis=1)
        places.append(relative[near] @ section.axes.T)
        atoms.append(np.flatnonzero(near))
        heights.append(along[near, 2])
    return np.concatenate(places), np.concatenate(atoms), np.concatenate(heights)
