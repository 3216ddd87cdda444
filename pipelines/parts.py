"""A job in parts, each with the atoms around a run of its tiles, where the atoms are too many for memory."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from gpurho.kernels.celllist import AtomBins, atoms_around, bin_atoms, bin_shape
from gpurho.partition import Tile, TileSet
from gpurho.pipelines.settings import Job
from gpurho.shards import runs_of
from gpurho.sources import StructureSource
from gpurho.structure import Structure

TILES = 64
"""Tiles whose atoms are in memory together, at most."""


def parts_of(job: Job, done: Collection[int] = ()) -> Iterator[tuple[Job, Iterable[Tile]]]:
    """The job, or parts of it, each with the tiles that are not `done`, in their order.

    A structure in memory makes one part. Of a `StructureSource` each part has the atoms that a run of tiles sees. The
    values have the same bits either way.
    """
    if isinstance(job.structure, Structure):
        yield job, (tile for tile in job.tiles if tile.index not in done)
        return
    nearby = Nearby(job)
    for run in runs_of(job.tiles, TILES):
        tiles = [job.tiles[i] for i in range(run.first, run.last) if i not in done]
        if tiles:
            yield nearby.part(run.tiles), tiles


class Nearby:
    """Gives the atoms around boxes of grid points of a job, whether they are in memory or in a file."""

    def __init__(self, job: Job) -> None:
        self.job, self.reach = job, job.model.spec.descriptor.reach
        structure = job.structure
        self._bins: AtomBins | None = None
        if isinstance(structure, Structure):
            self._bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
        shape = bin_shape(len(structure), np.linalg.inv(structure.cell).astype(np.float64))
        self.bins: tuple[int, int, int] = (int(shape[0]), int(shape[1]), int(shape[2]))

    def atoms(self, tiles: Tile | TileSet) -> tuple[Structure, NDArray[np.int64]]:
        """Those that can matter to the points of a box, one at least, and their numbers in the whole, ascending."""
        structure, grid = self.job.structure, self.job.grid
        if isinstance(structure, StructureSource):
            return structure.near(grid, tiles, self.reach)
        assert self._bins is not None
        low, high = np.array(tiles.start, float), np.array(tiles.stop, float) - 1.0
        ends = np.array([[(low, high)[c >> d & 1][d] for d in range(3)] for c in range(8)])
        _, near = atoms_around(self._bins, grid.origin + ends @ grid.steps, self.reach)
        # A structure has an atom, even where nothing is near.
        owners = np.unique(near).astype(np.int64) if len(near) else np.zeros(1, dtype=np.int64)
        part = Structure(structure.positions[owners], structure.numbers[owners], structure.cell, structure.pbc)
        return part, owners

    def part(self, tiles: Tile | TileSet) -> Job:
        """The job with these atoms alone; its tiles stay all of them."""
        structure, owners = self.atoms(tiles)
        return replace(self.job, structure=structure, bins=self.bins, halo=self.reach, owners=owners)


__all__ = ["Nearby", "parts_of"]
