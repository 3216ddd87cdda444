"""Dislocations and grain boundaries of fcc crystals.

Dislocations are perfect a/2 [110] ones on the (1-11) plane, along z with the glide plane normal to y, by the
displacements of isotropic linear elasticity (Hirth and Lothe, Theory of Dislocations, 2nd edition, chapter 3).
Cores are unrelaxed and undissociated.

In a cell with three periods the Burgers vectors must sum to zero: there are two opposite dislocations in it, whose
images form a quadrupole lattice, so that no dislocation feels a force from the others. A row of dislocations
with the period p has a closed form, since with z = x + iy, counted from one of them, and L = log sin(pi z / p)

    screw: u_z = b / (2 pi) Im L
    edge:  u_x + i u_y = -i b / (8 pi (1 - nu)) [(3 - 4 nu) L - conj(L) + 2 i y conj(dL/dz)]

and each consists of a part linear in x, different above and below, and one that decays as exp(-2 pi |y| / p).
The decaying parts of all rows are summed; the linear parts go into the cell and into the reference crystal exactly,
and so that the mean stress vanishes (in linear elasticity).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho._fcc import Floats, fcc_atoms, fcc_cell, fcc_constant, periods_in, periods_or_one, repeated
from gpurho.builders import check_count, check_length, named
from gpurho.errors import StructureError

if TYPE_CHECKING:
    from ase import Atoms

EDGE_AXES = ((1, 1, 0), (1, -1, 1), (1, -1, -2))
SCREW_AXES = ((-1, 1, 2), (1, -1, 1), (1, 1, 0))

DECAY = 5.2
"""Rows farther away than this many periods have less than exp(-2 pi 5.2) = 7e-15 of their amplitude left."""


def edge_dislocation(
    symbol: str = "Al",
    size: Sequence[float] = (27.0, 28.0),
    length: float | None = None,
    *,
    a: float | None = None,
    poisson: float = 0.347,
    radius: float | None = None,
    vacuum: float = 10.0,
) -> Atoms:
    """Edge dislocations a/2 [110] in fcc: x along [110] (Burgers vector), y [1-11], z [1-1-2] (line).

    Without `radius`, two opposite dislocations in a cell with three periods: +b near a quarter, -b near three
    quarters of the cell, with an additional pair of (220) half-planes between their heights. The second cell vector
    is tilted by half a Burgers vector, which is the slip of the pair. With `radius`, one dislocation along a cylinder
    that has a free surface, vacuum, and a period along z alone.

    Parameters
    ----------
    symbol : str
        An element; fcc.
    size : (width, height), angstrom
        Of the periodic cell; the nearest possible one is built: (n + 1/2) b by a multiple of 2 sqrt(3) a.
    length : float, angstrom
        Along the line, rounded to a multiple of a sqrt(6) / 2; one such period by default.
    a : float, angstrom
        Lattice constant; ASE's by default.
    poisson : float
        Poisson's ratio; that of Al by default.
    radius : float, angstrom
        One dislocation in a cylinder of this radius.
    vacuum : float, angstrom
        Around the cylinder, on each side.

    Returns
    -------
    ase.Atoms
        With `info`: "family", "cores" ((n, 2) x and y of each core, angstrom) and "burgers" ((n, 3), angstrom; a
        circuit counter-clockwise about z gathers this displacement).

    Raises
    ------
    StructureError
        For sizes that are no lengths or too small, or an element that is not fcc.
    """
    a = fcc_constant(symbol, a)
    if not -1 < poisson < 0.5:
        raise StructureError(f"poisson {poisson!r} is no Poisson's ratio of a stable solid; give -1 to 0.5")
    unit, (b, tall, along) = fcc_cell(EDGE_AXES, a)
    n_z = periods_or_one("length", length, along)
    if radius is not None:
        sites = _cylinder(unit, (b, tall, along), radius, n_z, core=(0.0, tall / 6))
        x, y = sites[:, 0], sites[:, 1]
        angle, r_squared = np.arctan2(y, x), x**2 + y**2
        sites[:, 0] += b / (2 * np.pi) * (angle + x * y / (2 * (1 - poisson) * r_squared))
        sites[:, 1] -= (
            b / (8 * np.pi * (1 - poisson)) * ((1 - 2 * poisson) * np.log(r_squared / b**2) + (x**2 - y**2) / r_squared)
        )
        return _in_vacuum(symbol, sites, n_z * along, vacuum, (b, 0.0, 0.0), "edge")

    width, height = _pair("size", size)
    n = periods_in("width", width - 0.5 * b, b, minimum=3)
    n_y = 2 * periods_in("height", height, 2 * tall)
    check_count((2 * n + 1) * n_y * n_z * len(unit) // 2)
    sites, cell, cores = _edge_pair(unit, (b, tall, along), (n, n_y, n_z), poisson)
    return _in_cell(symbol, sites, cell, cores, (b, 0.0, 0.0), "edge")


def screw_dislocation(
    symbol: str = "Al",
    size: Sequence[float] = (30.0, 28.0),
    length: float | None = None,
    *,
    a: float | None = None,
    radius: float | None = None,
    vacuum: float = 10.0,
) -> Atoms:
    """Screw dislocations a/2 [110] in fcc: x along [-112], y [1-11], z [110] (line and Burgers vector).

    Without `radius`, two opposite dislocations in a cell with three periods: +b near a quarter, -b near three
    quarters of the cell, whose first two vectors are tilted along z by half a Burgers vector, which is the slip of the
    pair. With `radius`, one dislocation along a cylinder that has a free surface, vacuum, and a period along z alone.

    Parameters
    ----------
    symbol : str
        An element; fcc.
    size : (width, height), angstrom
        Of the periodic cell, rounded to multiples of a sqrt(6) / 2 and 2 sqrt(3) a.
    length : float, angstrom
        Along the line, rounded to a multiple of b = a / sqrt(2); one such period by default.
    a, radius, vacuum, Returns, Raises
        As for `edge_dislocation`.
    """
    a = fcc_constant(symbol, a)
    unit, (wide, tall, b) = fcc_cell(SCREW_AXES, a)
    n_z = periods_or_one("length", length, b)
    if radius is not None:
        sites = _cylinder(unit, (wide, tall, b), radius, n_z, core=(_screw_core(0) * wide, tall / 6))
        sites[:, 2] += b / (2 * np.pi) * np.arctan2(sites[:, 1], sites[:, 0])
        return _in_vacuum(symbol, sites, n_z * b, vacuum, (0.0, 0.0, b), "screw")

    width, height = _pair("size", size)
    n_x = periods_in("width", width, wide, minimum=2)
    n_y = 2 * periods_in("height", height, 2 * tall)
    check_count(n_x * n_y * n_z * len(unit))
    sites, cell, cores = _screw_pair(unit, (wide, tall, b), (n_x, n_y, n_z))
    return _in_cell(symbol, sites, cell, cores, (0.0, 0.0, b), "screw")


def tilt_grain_boundary(
    symbol: str = "Al",
    plane: Sequence[int] = (2, 1, 0),
    grain: float = 18.0,
    width: float | None = None,
    depth: float | None = None,
    *,
    a: float | None = None,
    min_distance: float | None = None,
    gap: float = 0.0,
    shift: Sequence[float] = (0.0, 0.0),
) -> Atoms:
    """Symmetric [001] tilt boundaries of an fcc crystal, two of them in a cell with three periods.

    x lies in the boundary plane, y is its normal, z the tilt axis [001]. The second grain is the mirror image of the
    first at the plane (h k 0), which is a rotation by 2 atan(k / h) about z; the coincidence-site lattice has
    Sigma = h^2 + k^2, halved where even: (210) and (310) are the two boundaries of Sigma 5. The boundaries stand at a
    quarter and three quarters of the height.

    Parameters
    ----------
    symbol : str
        An element; fcc.
    plane : (h, k) or (h, k, 0)
        Of both boundaries: whole, positive, different, without a common divisor.
    grain : float, angstrom
        Thickness of each grain, rounded to a multiple of the period along the normal.
    width, depth : float, angstrom
        Of the cell along x and z, rounded to multiples of their periods; one period by default.
    a : float, angstrom
        Lattice constant; ASE's by default.
    min_distance : float, angstrom
        Atoms of the second grain closer than this to one of the first are removed; 0.8 of the nearest-neighbour
        distance by default.
    gap : float, angstrom
        By which the grains are drawn apart, at each boundary.
    shift : (dx, dz), angstrom
        Of the second grain parallel to the boundary.

    Returns
    -------
    ase.Atoms
        With `info`: "family", "sigma", "boundaries" (their two heights along y, angstrom) and "removed" (atoms).

    Raises
    ------
    StructureError
        For a plane that gives no boundary, sizes that are no lengths, or an element that is not fcc.
    """
    from scipy.spatial import cKDTree

    a = fcc_constant(symbol, a)
    h, k = _tilt_plane(plane)
    unit, periods = fcc_cell(((-k, h, 0), (h, k, 0), (0, 0, -1)), a)
    nearest = a / np.sqrt(2)
    minimum = 0.8 * nearest if min_distance is None else min_distance
    if not 0 < minimum <= nearest:
        raise StructureError(
            f"min_distance {minimum!r} is out of range; give up to {nearest:.4g}, the one of the crystal"
        )
    if not (np.isfinite(gap) and gap >= 0):
        raise StructureError(f"gap {gap!r} is not a length; give angstrom from 0 up")
    move = np.array(shift, dtype=float)
    if move.shape != (2,) or not np.isfinite(move).all():
        raise StructureError(f"shift {shift!r} is not two lengths; give (dx, dz) in angstrom")
    n_y = periods_in("grain", grain, periods[1])
    n_x, n_z = periods_or_one("width", width, periods[0]), periods_or_one("depth", depth, periods[2])
    check_count(2 * n_x * n_y * n_z * len(unit))
    thickness = n_y * periods[1]
    lengths = np.array([n_x * periods[0], 2 * (thickness + gap), n_z * periods[2]])

    first = repeated(unit, periods, (n_x, n_y, n_z))
    # Each grain has a plane of lattice sites at both of its faces.
    face = first[first[:, 1] < 1e-6 * a] + np.array([0, thickness, 0])
    first = np.concatenate([first, face])
    second = first * np.array([1, -1, 1]) + np.array([move[0], 0, move[1]])
    first[:, 1] += 0.5 * (thickness + gap) + 0.5 * gap
    second[:, 1] += 0.5 * (thickness + gap) - 0.5 * gap
    first, second = _into(first, lengths), _into(second, lengths)
    distance, _ = cKDTree(first, boxsize=lengths).query(second, distance_upper_bound=minimum)
    kept = distance > minimum - 1e-6
    atoms = fcc_atoms(symbol, np.concatenate([first, second[kept]]), np.diag(lengths))
    sigma = h * h + k * k
    sigma //= 2 if sigma % 2 == 0 else 1
    boundaries = np.array([0.25, 0.75]) * lengths[1]
    atoms.info.update(sigma=sigma, boundaries=boundaries, removed=int(len(second) - kept.sum()))
    return named(atoms, "tilt-gb")


# -- two opposite dislocations in a periodic cell -----------------------------------------------------------------


def _edge_pair(
    unit: Floats, periods: tuple[float, float, float], counts: tuple[int, int, int], poisson: float
) -> tuple[Floats, Floats, Floats]:
    """Sites, cell and cores: n + 1 cells in the period between the two rows, n elsewhere, strained to fit."""
    (b, tall, along), (n, n_y, n_z) = periods, counts
    p, h = (n + 0.5) * b, n_y * tall
    _, low, high = _glide_planes(tall, n_y)
    lift = np.array([0, tall / 6, 0])
    inner = repeated(unit, periods, (n + 1, n_y, n_z)) + lift
    outer = repeated(unit, periods, counts) + lift
    inner = inner[(inner[:, 1] > low) & (inner[:, 1] < high)]
    outer = outer[(outer[:, 1] < low) | (outer[:, 1] > high)]
    tilt = -p / (2 * n)
    inner[:, 0] = p / 4 + b / 4 + inner[:, 0] * p / ((n + 1) * b)
    outer[:, 0] = p / 4 - b / 4 + outer[:, 0] * p / (n * b) + np.where(outer[:, 1] > high, tilt, 0.0)
    sites = np.concatenate([inner, outer])

    x, y = sites[:, 0].copy(), sites[:, 1].copy()
    cores = np.array([[p / 4, low], [3 * p / 4, high]])
    field = np.zeros(len(sites), dtype=complex)
    for sign, x_core, y_core in _rows(cores, p, (tilt, h)):
        w, logarithm = _row(x - x_core, y - y_core, p)
        slope = -4 * np.pi / p * np.abs(y - y_core) * np.conj(w / (1 - w))
        field += sign * ((3 - 4 * poisson) * logarithm - np.conj(logarithm) + slope)
    field *= -1j * b / (8 * np.pi * (1 - poisson))
    # What is compressed along x expands along y, and the other way round.
    stretch = poisson / (1 - poisson) * b / (2 * p)
    above = y - (low + high) / 2
    sites[:, 0] += np.real(field)
    sites[:, 1] += np.imag(field) + stretch * np.where(np.abs(above) < h / 4, above, np.sign(above) * h / 2 - above)
    return sites, np.array([[p, 0, 0], [tilt, h, 0], [0, 0, n_z * along]]), cores


def _screw_pair(
    unit: Floats, periods: tuple[float, float, float], counts: tuple[int, int, int]
) -> tuple[Floats, Floats, Floats]:
    """Sites, cell and cores."""
    (wide, tall, b), (n_x, n_y, n_z) = periods, counts
    p, h = n_x * wide, n_y * tall
    below, low, high = _glide_planes(tall, n_y)
    cores = np.array([[p / 4, low], [3 * p / 4, high]])
    sites = repeated(unit, periods, counts) + np.array([p / 4 - _screw_core(below) * wide, tall / 6, 0])
    x, y = sites[:, 0], sites[:, 1]
    angle = np.zeros(len(sites))
    for sign, x_core, y_core in _rows(cores, p, (0.0, h)):
        angle += sign * _row(x - x_core, y - y_core, p)[1].imag
    # Shear between the rows and none elsewhere, less its mean, which goes into the first cell vector.
    linear = np.where(y < low, 0.25, np.where(y > high, -0.25, 0.5 - (x - p / 2) / p)) + 0.5 * x / p
    sites[:, 2] += b * (angle / (2 * np.pi) + linear)
    return sites, np.array([[p, 0, b / 2], [0, h, -b / 2], [0, 0, n_z * b]]), cores


def _glide_planes(tall: float, n_y: int) -> tuple[int, float, float]:
    """The layer below the first glide plane, and the heights of both, half a cell apart; layer k is at k + 1/2."""
    below = 3 * n_y // 4 - 1
    low = (below + 1) * tall / 3
    return below, low, low + n_y * tall / 2


def _screw_core(below: int) -> float:
    """x of a screw core above the layer with this number, in periods.

    Rows of atoms stand half a period apart, and each layer is a sixth ahead of the one below. Of the two centres of
    inversion on the glide plane, at 1/12 and 1/3, this is the one with the lower energy and the smaller forces.
    """
    return below % 3 / 6 + 1 / 3


def _cylinder(unit: Floats, periods: Sequence[float], radius: float, n_z: int, core: tuple[float, float]) -> Floats:
    """Sites within `radius` of the line through `core`, which becomes the origin of x and y."""
    radius = check_length("radius", radius)
    if radius < periods[1]:
        raise StructureError(
            f"radius {radius:g} angstrom is too small for a dislocation; give {periods[1]:.1f} or more"
        )
    n_x, n_y = (int(np.ceil(radius / period)) + 1 for period in periods[:2])
    check_count(4 * n_x * n_y * n_z * len(unit))
    sites = repeated(unit, periods, (2 * n_x, 2 * n_y, n_z))
    sites[:, :2] -= np.array([n_x * periods[0], n_y * periods[1]]) + core
    return sites[np.hypot(sites[:, 0], sites[:, 1]) < radius]


# -- rows of dislocations -----------------------------------------------------------------------------------------


def _rows(cores: Floats, period: float, up: tuple[float, float]) -> list[tuple[int, float, float]]:
    """(sign, x, y) of one dislocation of each row that matters; `up` leads from a cell to the next."""
    far = int(np.ceil(DECAY * period / up[1])) + 1
    return [
        (sign, x + m * up[0], y + m * up[1])
        for m in range(-far, far + 1)
        for sign, (x, y) in zip((1, -1), cores.tolist(), strict=True)
    ]


def _row(x: Floats, y: Floats, period: float) -> tuple[NDArray[np.complex128], NDArray[np.complex128]]:
    """w = exp(2 pi i z / period) above the row, exp(-2 pi i z / period) below; log(1 - w) is what of L decays."""
    w = np.exp(2j * np.pi / period * np.sign(y) * (x + 1j * y))
    return w, np.log1p(-w)


# -- atoms --------------------------------------------------------------------------------------------------------


def _into(sites: Floats, lengths: Floats) -> Floats:
    """Sites in [0, length), also where rounding would give the length itself."""
    wrapped = sites % lengths
    return np.where(wrapped < lengths, wrapped, 0.0)


def _in_cell(
    symbol: str, sites: Floats, cell: ArrayLike, cores: Floats, burgers: tuple[float, float, float], kind: str
) -> Atoms:
    atoms = fcc_atoms(symbol, sites, cell)
    atoms.wrap()
    atoms.info.update(cores=cores, burgers=np.outer([1, -1], burgers) + 0.0)
    return named(atoms, kind)


def _in_vacuum(
    symbol: str, sites: Floats, length: float, vacuum: float, burgers: tuple[float, float, float], kind: str
) -> Atoms:
    if not (np.isfinite(vacuum) and vacuum >= 0):
        raise StructureError(f"vacuum {vacuum!r} is not a length; give angstrom from 0 up")
    low = sites[:, :2].min(axis=0) - vacuum
    width, height = sites[:, :2].max(axis=0) + vacuum - low
    atoms = fcc_atoms(symbol, sites - [*low, 0.0], np.diag([width, height, length]))
    atoms.set_pbc((False, False, True))
    atoms.wrap()
    atoms.info.update(cores=-low[None], burgers=np.array([burgers]))
    return named(atoms, kind)


def _pair(name: str, values: Sequence[float]) -> tuple[float, float]:
    if np.shape(values) != (2,):
        raise StructureError(f"{name} {values!r} is not two lengths; give (width, height) in angstrom")
    return check_length("width", values[0]), check_length("height", values[1])


def _tilt_plane(plane: Sequence[int]) -> tuple[int, int]:
    indices = np.asarray(plane, dtype=float)
    whole = indices.shape in ((2,), (3,)) and np.array_equal(indices, np.rint(indices)) and not np.any(indices[2:])
    if whole:
        h, k = int(indices[0]), int(indices[1])
        if h > 0 and k > 0 and h != k and np.gcd(h, k) == 1:
            return h, k
    raise StructureError(
        f"plane {tuple(plane)} is no tilt boundary; give coprime h and k above 0: (2, 1, 0), (3, 1, 0)"
    )
