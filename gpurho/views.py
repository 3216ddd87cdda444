"""Parts and block means of a density, as densities that read the field only when their own values are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.errors import GridError, SettingsError
from gpurho.fields import BLOCK, Box, Field, LazyField
from gpurho.grid import Grid, region_grid
from gpurho.keep import MAX_FACTOR, shifted
from gpurho.kept import coarse_grid
from gpurho.partition import Triple, make_tiles


def part_of(density: Density, region: Sequence[Sequence[int]]) -> Density:
    """A box of the points of a density, with all of its atoms.

    Parameters
    ----------
    density : Density
        Must stay open as long as the part is read.
    region : 3 pairs of ints
        ``((i0, i1), (j0, j1), (k0, k1))``, stops exclusive; `gpurho.region_of` finds it from fractional coordinates.

    Returns
    -------
    Density
        On the region's own grid, which has no period along the axes that the region cuts.

    Raises
    ------
    GridError
        For a region that is empty or leaves the grid.
    SettingsError
        Where the full field was not kept.
    """
    tiles = make_tiles(density.grid, region=region)
    low = tiles.start
    grid = region_grid(density.grid, tuple(zip(low, tiles.stop, strict=True)))
    fields = [_cut(field, low, grid.shape) for field in raw_of(density).values()]
    return made_of(density, grid, fields)


def coarsened(density: Density, factors: int | Sequence[int]) -> Density:
    """The density as means over blocks of points, on the grid of the blocks' centres; see `Density.coarse`.

    Its integral is that of `density`. Its sigmas are the roots of the blocks' mean squared sigmas: typical of a point
    in the block, and upper bounds of the sigma of the block's mean.

    Parameters
    ----------
    density : Density
        Must stay open as long as the result is read.
    factors : int or 3 ints
        Points of a block along each axis, 1 to 64; must divide the grid.

    Raises
    ------
    SettingsError
        For factors out of range, or where neither the full field nor this coarse one was kept.
    GridError
        For a grid that does not divide into such blocks; the message names some that it does.
    """
    blocks = _factors(factors)
    if not density.has_field and density.kept is not None and density.kept.keep.coarse == blocks:
        return density.coarse
    raw = raw_of(density)
    if any(n % f for n, f in zip(density.shape, blocks, strict=True)):
        near = [min(_divisors(n), key=lambda d: abs(d - f)) for n, f in zip(density.shape, blocks, strict=True)]
        whole = " ".join(f"0 {n // f * f}" for n, f in zip(density.shape, blocks, strict=True))
        raise GridError(
            f"grid {density.shape} does not divide into blocks of {'x'.join(map(str, blocks))} points; give e.g."
            f" {'x'.join(map(str, near))}, or first a region of multiples of them (--region {whole})"
        )
    fields = [_block_means(field, blocks, root=name != "mean") for name, field in raw.items()]
    return made_of(density, coarse_grid(density.grid, blocks), fields)


def watched(density: Density, tick: Callable[[int], None]) -> Density:
    """The density with `tick` told how many values are read of it; it must have its full field and stay open."""

    def told(field: Field) -> LazyField:
        def read(box: Box) -> NDArray[np.float32]:
            values = np.asarray(field[box])
            tick(values.size)
            return values

        chunks = field.chunks if isinstance(field, LazyField) else (BLOCK, BLOCK, BLOCK)
        i, j, k = field.shape
        return LazyField(read, (i, j, k), chunks, field.phase if isinstance(field, LazyField) else (0, 0, 0))

    return made_of(density, density.grid, [told(field) for field in raw_of(density).values()])


def raw_of(density: Density) -> dict[str, Field]:
    """The fields as they are stored; raises `SettingsError`, which says what was kept, where there are none."""
    if not density.has_field:
        _ = density.mean  # raises, and says what was kept
    return density.raw_fields()


def made_of(density: Density, grid: Grid, fields: Sequence[Field]) -> Density:
    """A density with other fields, on another grid of the same atoms."""
    info = {name: value for name, value in density.info.items() if name not in ("timing", "region")}
    made = Density(grid, density.structure, *fields, correction=density.correction, info=info)
    made.trust = density.trust
    return made


def _factors(factors: int | Sequence[int]) -> Triple:
    values = [factors] * 3 if isinstance(factors, int) else list(factors)
    if len(values) != 3 or not all(isinstance(f, int | np.integer) and 1 <= f <= MAX_FACTOR for f in values):
        raise SettingsError(f"blocks of {factors!r} points are not known; give one or three numbers, 1 to {MAX_FACTOR}")
    return (int(values[0]), int(values[1]), int(values[2]))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, min(n, MAX_FACTOR) + 1) if n % d == 0]


# -- fields -----------------------------------------------------------------------------------------------------


def _cut(field: Field, low: Triple, shape: Triple) -> Field:
    if not isinstance(field, LazyField):
        part: NDArray[np.float32] = field[tuple(slice(a, a + n) for a, n in zip(low, shape, strict=True))]
        return part
    back = [-a for a in low]
    i, j, k = ((p + a) % c for p, a, c in zip(field.phase, low, field.chunks, strict=True))
    return LazyField(lambda box: field[shifted(box, back)], shape, field.chunks, (i, j, k))


def _block_means(field: Field, factors: Triple, root: bool) -> LazyField:
    """Means, or roots of mean squares, over blocks; a chunk of the result needs about a chunk of `field`."""
    lazy = isinstance(field, LazyField)
    chunks = field.chunks if isinstance(field, LazyField) else (BLOCK, BLOCK, BLOCK)
    phase = field.phase if isinstance(field, LazyField) else (0, 0, 0)
    # Where blocks divide chunks, the result has the same chunks, so that each is read once.
    aligned = [lazy and c % f == 0 and p % f == 0 for c, p, f in zip(chunks, phase, factors, strict=True)]
    i, j, k = (max(1, c // f) for c, f in zip(chunks, factors, strict=True))
    a, b, c = (p // f % n if ok else 0 for p, f, n, ok in zip(phase, factors, (i, j, k), aligned, strict=True))
    x, y, z = (n // f for n, f in zip(field.shape, factors, strict=True))

    def read(box: Box) -> NDArray[np.float32]:
        result = np.empty([s.stop - s.start for s in box], dtype=np.float32)
        for part in parts_of(box, (i, j, k), (a, b, c)):
            fine = tuple(slice(s.start * f, s.stop * f) for s, f in zip(part, factors, strict=True))
            values = np.asarray(field[fine], dtype=np.float64)
            shape = [n for s, f in zip(part, factors, strict=True) for n in (s.stop - s.start, f)]
            means = (values**2 if root else values).reshape(shape).mean(axis=(1, 3, 5))
            result[shifted(part, [s.start for s in box])] = np.sqrt(means) if root else means
        return result

    return LazyField(read, (x, y, z), (i, j, k), (a, b, c))


def parts_of(box: Box, chunks: Triple, phase: Triple) -> list[Box]:
    """The pieces of a box that chunks cut it into."""
    spans = []
    for s, c, p in zip(box, chunks, phase, strict=True):
        edges = [s.start, *range(s.start + c - (s.start + p) % c, s.stop, c), s.stop]
        spans.append([slice(low, high) for low, high in pairwise(edges) if low < high])
    return [(x, y, z) for x, y, z in product(*spans)]
