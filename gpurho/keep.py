"""What a prediction keeps: the full field, or parts and sums of it that need no room for the field."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import GridError, SettingsError
from gpurho.grid import Grid
from gpurho.partition import DEFAULT_TILE, Tile, TileSet, Triple

AXES = {"x": 0, "y": 1, "z": 2, "a": 0, "b": 1, "c": 2}
"""Names of the cell vectors in slices."""

HISTOGRAM = (1.2, 120)
"""Upper end in e/angstrom^3 and number of bins of the density's histogram, unless the user says otherwise."""

SIGMA_EDGES = np.logspace(-5.0, 0.0, 61)
"""Edges of the histogram of the total sigma, e/angstrom^3."""

MAX_FACTOR = 64
MAX_BINS = 100_000
KNOWN = "'field', 'coarse:4' or 'coarse:4x4x2', 'slice:z=0.5', 'atoms', 'histogram' or 'histogram:2.5,250', 'electrons'"


@dataclass(frozen=True)
class Keep:
    """What to keep of a predicted field. The integral with its error bar is always kept.

    Parameters
    ----------
    field : bool
        The whole field.
    coarse : 3 ints, optional
        Means over blocks of so many points along each axis.
    slices : tuple of (axis, position)
        Planes of grid points at fractions of the cell vectors, as `Density.slice` takes them.
    atoms : bool
        Electrons, sigmas and volumes of the points nearest to each atom.
    histogram : (float, int), optional
        Distribution of the density in bins of equal width from 0 to so many e/angstrom^3, and that of the total sigma
        in the bins of `SIGMA_EDGES`. What lies beyond counts in the outermost bins.
    """

    field: bool = True
    coarse: Triple | None = None
    slices: tuple[tuple[int, float], ...] = ()
    atoms: bool = False
    histogram: tuple[float, int] | None = None

    @classmethod
    def of(cls, items: Keep | str | Sequence[str] | None) -> Keep:
        """From ``keep=`` of `gpurho.predict`: one or several of the words that `to_items` gives.

        Raises
        ------
        SettingsError
            For a word that is not known, a value out of range, or the same thing asked for in two ways.
        """
        if isinstance(items, Keep):
            return items
        if items is None:
            return cls()
        if not isinstance(items, str | Sequence):
            raise SettingsError(f"keep {items!r} is a {type(items).__name__}; give words: {KNOWN}")
        words = [items] if isinstance(items, str) else list(items)
        if not words:
            raise SettingsError(f"keep is empty; give one or more of {KNOWN}")
        found: dict[str, Any] = {"field": False}
        for word in words:
            if not isinstance(word, str):
                raise SettingsError(f"keep {word!r} is a {type(word).__name__}; give words: {KNOWN}")
            name, _, value = word.strip().partition(":")
            if name in ("field", "atoms", "electrons") and not value:
                found |= {} if name == "electrons" else {name: True}
            elif name == "coarse":
                _once(found, "coarse", _factors(word, value))
            elif name in ("slice", "slices"):
                found["slices"] = tuple(dict.fromkeys((*found.get("slices", ()), *_planes(word, value))))
            elif name == "histogram":
                _once(found, "histogram", _bins(word, value))
            else:
                raise SettingsError(f"keep {word!r} is not known; give one or more of {KNOWN}")
        return cls(**found)

    def to_items(self) -> list[str]:
        """The words that give this again."""
        items = ["field"] if self.field else ["electrons"]
        if self.coarse is not None:
            items.append("coarse:" + "x".join(map(str, self.coarse)))
        items += [f"slice:{'xyz'[axis]}={position!r}" for axis, position in self.slices]
        if self.atoms:
            items.append("atoms")
        if self.histogram is not None:
            items.append(f"histogram:{self.histogram[0]!r},{self.histogram[1]}")
        return items

    @property
    def field_alone(self) -> bool:
        """Whether nothing but the full field is kept."""
        return self == Keep()

    def tile_shape(self) -> Triple:
        """The default tile shape, made so that blocks of the coarse field do not cross tiles."""
        i, j, k = (t // f * f for t, f in zip(DEFAULT_TILE, self.coarse or (1, 1, 1), strict=True))
        return (i, j, k)

    def fitting(self, shape: Sequence[int]) -> Triple:
        """The smallest grid shape from `shape` up that the blocks of the coarse field divide."""
        i, j, k = (-(-int(n) // f) * f for n, f in zip(shape, self.coarse or (1, 1, 1), strict=True))
        return (i, j, k)

    def check(self, grid: Grid, tiles: TileSet) -> None:
        """Raise `GridError` where blocks of the coarse field would cross the ends of the grid, region or tiles."""
        factors = self.coarse or (1, 1, 1)
        for what, numbers in (("grid shape", grid.shape), ("tile shape", tiles.tile_shape)):
            if any(n % f for n, f in zip(numbers, factors, strict=True)):
                near = tuple(max(1, round(n / f)) * f for n, f in zip(numbers, factors, strict=True))
                raise GridError(f"{what} {tuple(numbers)} does not divide into blocks of {factors}; give e.g. {near}")
        box = tuple(zip(tiles.start, tiles.stop, strict=True))
        if any(a % f or b % f for (a, b), f in zip(box, factors, strict=True)):
            raise GridError(f"region {box} cuts blocks of {factors} points; let it begin and end at multiples of these")

    def bin_edges(self) -> dict[str, NDArray[np.float64]]:
        """Edges of the histograms "mean" and "std"; empty where none is kept."""
        if self.histogram is None:
            return {}
        return {"mean": density_edges(*self.histogram), "std": SIGMA_EDGES}


def density_edges(top: float = HISTOGRAM[0], bins: int = HISTOGRAM[1]) -> NDArray[np.float64]:
    """Edges of a histogram of the density, (bins + 1,), e/angstrom^3."""
    return np.linspace(0.0, top, bins + 1)


def _once(found: dict[str, Any], name: str, value: Any) -> None:
    if name in found and found[name] != value:
        raise SettingsError(f"keep asks for {name} twice, {found[name]} and {value}; give one")
    found[name] = value


def _factors(word: str, value: str) -> Triple:
    try:
        parts = [int(part) for part in value.split("x")]
    except ValueError:
        parts = []
    factors = parts * 3 if len(parts) == 1 else parts
    if len(factors) != 3 or not all(1 <= f <= MAX_FACTOR for f in factors):
        raise SettingsError(
            f"keep {word!r} does not say blocks of 1 to {MAX_FACTOR} points; give e.g. 'coarse:4' or 'coarse:4x4x2'"
        )
    return (factors[0], factors[1], factors[2])


def _planes(word: str, value: str) -> list[tuple[int, float]]:
    planes = []
    for part in value.split(","):
        axis, _, number = part.strip().partition("=")
        try:
            position = float(number)
        except ValueError:
            position = math.nan
        if axis not in AXES or not 0 <= position <= 1:
            raise SettingsError(
                f"keep {word!r} does not name planes; give a cell vector x, y or z and a fraction of it from 0 to 1,"
                " e.g. 'slice:z=0.5'"
            )
        planes.append((AXES[axis], position))
    return planes


def _bins(word: str, value: str) -> tuple[float, int]:
    top, _, number = value.partition(",")
    try:
        found = (float(top or HISTOGRAM[0]), int(number or HISTOGRAM[1]))
    except ValueError:
        found = (math.nan, 0)
    if not (0 < found[0] < math.inf and 1 <= found[1] <= MAX_BINS):
        raise SettingsError(
            f"keep {word!r} does not give the upper end (e/angstrom^3) and number of bins; e.g. 'histogram:2.5,250'"
        )
    return found


# -- where the parts lie ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """An array made of tiles: the full field, the coarse one or a plane, of one of the three quantities.

    Parameters
    ----------
    name : str
        Name of the data set: "mean", "coarse/mean", "slices/z_17/mean".
    quantity : str
        "mean", "aleatoric" or "epistemic".
    shape, chunk : tuples of int
        Of the array over the whole grid, and of the part that a whole tile fills.
    factors : 3 ints
        Points of a block.
    plane : (axis, index), optional
        The plane of grid points, two-dimensional without this axis.
    """

    name: str
    quantity: str
    shape: tuple[int, ...]
    chunk: tuple[int, ...]
    factors: Triple = (1, 1, 1)
    plane: tuple[int, int] | None = None

    def box(self, tile: Tile) -> tuple[slice, ...] | None:
        """Where a tile lies in the array; None for a tile that the plane misses."""
        spans = [slice(a // f, b // f) for a, b, f in zip(tile.start, tile.stop, self.factors, strict=True)]
        if self.plane is None:
            return tuple(spans)
        axis, index = self.plane
        if not tile.start[axis] <= index < tile.stop[axis]:
            return None
        return tuple(span for d, span in enumerate(spans) if d != axis)

    def reduced(self, numbers: Sequence[int]) -> tuple[int, ...]:
        """A shape or point of the grid (three whole numbers, in whole blocks) as the array counts them."""
        few = [n // f for n, f in zip(numbers, self.factors, strict=True)]
        return tuple(n for d, n in enumerate(few) if self.plane is None or d != self.plane[0])

    def corner(self, box: tuple[slice, ...]) -> tuple[int, ...]:
        """Where the chunk that holds a tile's box begins."""
        return tuple(span.start // c * c for span, c in zip(box, self.chunk, strict=True))


def pieces_of(
    keep: Keep, names: Sequence[str], shape: Triple, tile_shape: Triple, planes: Sequence[tuple[int, int]]
) -> list[Piece]:
    """The arrays that a prediction of the quantities `names` keeps, in the order of a tile's results."""
    found = []
    whole = tuple(min(t, n) for t, n in zip(tile_shape, shape, strict=True))
    if keep.field:
        found += [Piece(name, name, shape, whole) for name in names]
    if keep.coarse is not None:
        few, part = (tuple(n // f for n, f in zip(sizes, keep.coarse, strict=True)) for sizes in (shape, whole))
        found += [Piece(f"coarse/{name}", name, few, part, keep.coarse) for name in names]
    for axis, index in planes:
        flat, part = (tuple(n for d, n in enumerate(sizes) if d != axis) for sizes in (shape, whole))
        for name in names:
            found.append(Piece(plane_name(axis, index, name), name, flat, part, plane=(axis, index)))
    return found


def plane_name(axis: int, index: int, quantity: str) -> str:
    """Name of the data set of a plane; `index` counts in the whole grid."""
    return f"slices/{'xyz'[axis]}_{index}/{quantity}"


def plane_indices(grid: Grid, axis: int, position: float) -> tuple[int, int, float]:
    """The planes of points below and above a fraction of a cell vector, and the weight of the one above."""
    n = grid.shape[axis]
    place = float(position) * n
    place = float(np.rint(place)) if abs(place - np.rint(place)) < 1e-9 else place
    low = int(np.floor(place))
    part = place - low
    if grid.pbc[axis]:
        return low % n, (low + 1) % n, part
    return min(low, n - 1), min(low + 1, n - 1), part


def kept_planes(keep: Keep, part: Grid, low: Sequence[int]) -> list[tuple[int, int]]:
    """Axes and indices, in the whole grid, of the planes that the slices need, each once, in order.

    `part` is the grid of the region, whose first point is the point `low` of the whole grid.
    """
    found = set()
    for axis, position in keep.slices:
        below, above, weight = plane_indices(part, axis, position)
        found |= {(axis, below + low[axis])} | ({(axis, above + low[axis])} if weight > 0 else set())
    return sorted(found)


def shifted(box: tuple[slice, ...], low: Sequence[int]) -> tuple[slice, ...]:
    """A box counted from the point `low`."""
    return tuple(slice(s.start - lo, s.stop - lo) for s, lo in zip(box, low, strict=True))
