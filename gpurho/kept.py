"""Results that a prediction kept instead of its field, or beside it: sums while tiles come in, and what users read."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import ModelError, SettingsError
from gpurho.exactsums import LARGEST, carry, to_float
from gpurho.fields import NAMES, Correction, Field, Totals
from gpurho.grid import Grid
from gpurho.keep import Keep, kept_planes, plane_indices
from gpurho.peratom import AtomCharges

ROWS = 1 << 20
"""Atoms whose sums are turned into results at once."""

COLUMNS = ("points", "mean", "aleatoric2", "epistemic", "epistemic2")
"""Quantities summed for each atom, e/angstrom^3 and its square; the last three only with sigmas."""


@dataclass(frozen=True)
class TileSums:
    """Sums over a tile that no array over the grid holds.

    Parameters
    ----------
    counts : (n_bins,) int64
        Histograms one after another; empty where none is kept.
    atoms : (n_near,) int64
        Atoms that own points of the tile; empty where none are kept.
    sums : (n_near, n_quantities, 2) int64
        Halves (`gpurho.exactsums`) of the sums of `COLUMNS`.
    """

    counts: NDArray[np.int64]
    atoms: NDArray[np.int64]
    sums: NDArray[np.int64]

    @classmethod
    def of(
        cls, counts: NDArray[np.int64] | None, atoms: NDArray[np.int64] | None, sums: NDArray[np.int64] | None
    ) -> TileSums:
        """From what comes from the device; atoms without points are left out."""
        none = np.empty(0, np.int64)
        if atoms is None or sums is None:
            return cls(none if counts is None else counts, none, np.empty((0, 0, 2), np.int64))
        owning = sums[:, 0].any(axis=1)
        return cls(none if counts is None else counts, atoms[owning], sums[owning])

    def pack(self) -> bytes:
        """As bytes for the file of an unfinished run."""
        head = np.array([len(self.counts), *self.sums.shape[:2]], dtype="<i8")
        return zlib.compress(
            b"".join(
                np.ascontiguousarray(a, dtype="<i8").tobytes() for a in (head, self.counts, self.atoms, self.sums)
            ),
            1,
        )

    @classmethod
    def unpack(cls, data: bytes) -> TileSums:
        """From `pack`."""
        values = np.frombuffer(zlib.decompress(data), dtype="<i8").astype(np.int64)
        n_counts, n_atoms, n_columns = (int(n) for n in values[:3])
        counts, atoms, sums = np.split(values[3:], [n_counts, n_counts + n_atoms])
        return cls(counts, atoms, sums.reshape(n_atoms, n_columns, 2))


def totals_of(
    n_points: int, sums: NDArray[np.int64], extremes: NDArray[np.float64], counts: Mapping[str, int]
) -> Totals:
    """The totals of a tile from `gpurho.reductions.tile_totals`; `counts` are n_capped, n_tied, n_outside.

    Raises
    ------
    ModelError
        For densities beyond what the sums hold.
    """
    low, high, largest = (float(x) for x in extremes)
    if not max(-low, high, largest) < LARGEST:
        raise ModelError(
            f"the model gave densities from {low:.4g} to {high:.4g} with sigmas up to {largest:.4g} e/angstrom^3; sums"
            f" are kept of values below {LARGEST:g}: check the model, or keep the field alone"
        )
    values = to_float(sums[:-1].reshape(-1, 2)).tolist()
    names = ("sum_mean", "sum_std", "sum_aleatoric2", "sum_epistemic", "sum_epistemic2")
    found = {**dict(zip(names, values, strict=False)), **counts}
    return Totals(
        n_points,
        min_mean=low,
        max_mean=high,
        max_std=largest,
        n_negative=int(sums[-1]),
        **found,
    )


class SumStore:
    """Adds up the sums of tiles; the same bits in any order.

    Parameters
    ----------
    keep : Keep
    n_atoms : int
    names : tuple of str
        Quantities of the fields.
    """

    def __init__(self, keep: Keep, n_atoms: int, names: Sequence[str]) -> None:
        n_columns = len(COLUMNS) if len(names) == 3 else 2
        self.atoms = np.zeros((n_atoms, n_columns, 2), np.int64) if keep.atoms else None
        self._edges = histogram_edges(keep, names)
        self._counts = np.zeros(sum(len(edges) - 1 for edges in self._edges.values()), np.int64)

    def add(self, sums: TileSums | None) -> None:
        """Add a tile, or what other workers have added up of other tiles."""
        if sums is None:
            return
        if self.atoms is not None and len(sums.atoms):
            self.atoms[sums.atoms] = carry(self.atoms[sums.atoms] + sums.sums)
        if len(self._counts):
            self._counts += sums.counts

    def packed(self, index: NDArray[np.int64]) -> TileSums:
        """All that was added, with the atoms numbered by `index` (n_atoms,): for `add` of a larger sum."""
        if self.atoms is None:
            return TileSums.of(self._counts, None, None)
        return TileSums.of(self._counts, index, self.atoms)

    def histograms(self) -> dict[str, Histogram]:
        """Histograms of "mean" and, with sigmas, of "std"."""
        ends = np.cumsum([len(edges) - 1 for edges in self._edges.values()])
        parts = np.split(self._counts, ends[:-1]) if self._edges else []
        return {name: Histogram(part, self._edges[name]) for name, part in zip(self._edges, parts, strict=True)}


def histogram_edges(keep: Keep, names: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Edges of the histograms that a prediction of the quantities `names` keeps."""
    return {name: edges for name, edges in keep.bin_edges().items() if name == "mean" or len(names) == 3}


@dataclass(frozen=True, eq=False)
class Histogram:
    """How many grid points have a value in each bin.

    Parameters
    ----------
    counts : (n_bins,) int64
        Points with ``edges[i] <= value < edges[i + 1]``; those beyond the edges are in the outermost bins.
    edges : (n_bins + 1,) float64, e/angstrom^3
    """

    counts: NDArray[np.int64]
    edges: NDArray[np.float64]

    @classmethod
    def of_values(cls, values: NDArray[np.float64], edges: NDArray[np.float64]) -> Histogram:
        """The histogram of an array."""
        place = np.clip(np.searchsorted(edges, np.ravel(values), side="right") - 1, 0, len(edges) - 2)
        return cls(np.bincount(place, minlength=len(edges) - 1).astype(np.int64), edges)

    def __add__(self, other: Histogram) -> Histogram:
        return Histogram(self.counts + other.counts, self.edges)

    @property
    def centers(self) -> NDArray[np.float64]:
        """Middles of the bins, (n_bins,)."""
        return np.asarray(0.5 * (self.edges[1:] + self.edges[:-1]))

    @property
    def n_points(self) -> int:
        """All points counted."""
        return int(self.counts.sum())

    def probability(self) -> NDArray[np.float64]:
        """Probability density, (n_bins,), (e/angstrom^3)^-1: its integral is 1."""
        return np.asarray(self.counts / (self.n_points * np.diff(self.edges)))


@dataclass(frozen=True)
class Kept:
    """What was kept beside the totals.

    Parameters
    ----------
    keep : Keep
    coarse : dict of name to (nx, ny, nz) field
        Block means of the density, roots of the blocks' mean squared sigmas; as the network gave them.
    plane : callable
        The (n1, n2) values of a plane: ``plane(axis, index, quantity)``, the index counted in the grid of the density.
    histograms : dict of name to Histogram
    atom_sums : callable, optional
        Halves of the sums of a range of atoms, (n, n_quantities, 2) int64.
    """

    keep: Keep
    coarse: dict[str, Field] = field(default_factory=dict)
    plane: Callable[[int, int, str], NDArray[np.float32]] | None = None
    histograms: dict[str, Histogram] = field(default_factory=dict)
    atom_sums: Callable[[slice], NDArray[np.int64]] | None = None

    def in_memory(self, grid: Grid, n_atoms: int) -> Kept:
        """The same, independent of any file; `grid` is that of the density."""
        planes = {}
        for axis, index in kept_planes(self.keep, grid, (0, 0, 0)):
            for name in NAMES:
                with suppress(KeyError):  # without sigmas there is the mean alone
                    assert self.plane is not None  # a density that keeps planes has them
                    planes[axis, index, name] = self.plane(axis, index, name)
        atoms = None if self.atom_sums is None else self.atom_sums(slice(0, n_atoms))
        return replace(
            self,
            coarse={name: np.asarray(values) for name, values in self.coarse.items()},
            plane=lambda axis, index, name: planes[axis, index, name],
            atom_sums=None if atoms is None else atoms.__getitem__,
        )

    def missing(self, what: str, ask: str) -> SettingsError:
        """The error for something that was not kept."""
        return SettingsError(
            f"{what} was not kept, only {', '.join(self.keep.to_items())}; predict again with keep={ask!r}"
            f" (--keep {ask})"
        )

    def block(self, name: str, axis: int, index: int, correction: Correction) -> NDArray[np.float32]:
        """A corrected quantity, or "std", on a plane of points."""
        if self.plane is None:
            raise self.missing(f"plane {index} across axis {'xyz'[axis]}", f"slice:{'xyz'[axis]}=0.5")
        if name == "std":
            aleatoric, epistemic = (self.block(part, axis, index, correction) for part in NAMES[1:])
            return np.hypot(aleatoric, epistemic)
        return correction.apply(name, {key: self.plane(axis, index, key) for key in correction.needs(name)})

    def has_slice(self, grid: Grid, axis: int, position: float) -> bool:
        """Whether the planes for `Density.slice` are there; `grid` is that of the density."""
        low, high, weight = plane_indices(grid, axis, position)
        planes = set()
        for kept_axis, kept_position in self.keep.slices:
            below, above, part = plane_indices(grid, kept_axis, kept_position)
            planes |= {(kept_axis, below)} | ({(kept_axis, above)} if part > 0 else set())
        return {(axis, low)} | ({(axis, high)} if weight > 0 else set()) <= planes

    def charges(self, n_atoms: int, dv: float, correction: Correction, correlation_volume: float) -> AtomCharges:
        """Electrons of atoms, as `gpurho.peratom.per_atom` finds them from a field."""
        assert self.atom_sums is not None  # asked for where atoms were kept
        electrons, volumes, independent, common = (np.empty(n_atoms) for _ in range(4))
        uncertain = True
        for start in range(0, n_atoms, ROWS):
            rows = slice(start, min(start + ROWS, n_atoms))
            sums = to_float(self.atom_sums(rows))
            found = dict(zip(COLUMNS, sums.T, strict=False))
            uncertain = "epistemic" in found
            electrons[rows] = correction.scale * found["mean"] * dv
            volumes[rows] = found["points"] * dv
            if uncertain:
                electrons[rows] += correction.shift * (found["aleatoric2"] + found["epistemic2"]) * dv
                noise = np.sqrt(found["aleatoric2"] * dv * max(dv, correlation_volume))
                independent[rows], common[rows] = correction.scale * noise, correction.scale * found["epistemic"] * dv
        if not uncertain:
            return AtomCharges(electrons, None, volumes)
        return AtomCharges(electrons, np.hypot(independent, common), volumes, independent, common)

    def histogram(self, name: str, correction: Correction) -> Histogram:
        """The histogram of the corrected "mean" or "std"."""
        kept = self.histograms[name]
        # Scaled values lie in scaled bins; a shift, which moves each point by its own amount, is refused beforehand.
        return Histogram(kept.counts, kept.edges * correction.scale)


def coarse_grid(grid: Grid, factors: Sequence[int]) -> Grid:
    """The grid whose points are the centres of blocks of points of `grid`."""
    blocks = np.array(factors, dtype=float)
    shape = [n // f for n, f in zip(grid.shape, factors, strict=True)]
    return Grid(shape, grid.cell, grid.origin + 0.5 * (blocks - 1.0) @ grid.steps, grid.pbc)
