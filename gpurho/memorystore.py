"""Where finished tiles go that no file takes: arrays in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density
from gpurho.densityfile import Layout
from gpurho.errors import StoreError
from gpurho.fields import NAMES, Correction, Field, Totals
from gpurho.grid import region_grid
from gpurho.keep import plane_name, shifted
from gpurho.kept import Kept, SumStore, TileSums
from gpurho.partition import Tile
from gpurho.store import FinishedTile, added, checked_totals
from gpurho.trust import Trust


class MemorySink:
    """Keeps results as arrays over the region."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.done: frozenset[int] = frozenset()
        self._grid = region_grid(layout.grid, layout.region)
        self._low = layout.tiles.start
        self._pieces = layout.pieces
        try:
            self._arrays = {
                piece.name: np.empty(piece.reduced(self._grid.shape), dtype=np.float32) for piece in self._pieces
            }
        except MemoryError:
            raise StoreError(
                f"the field needs {layout.raw_bytes / 2**30:.3g} GiB of memory; pass out='rho.h5' to stream it to disk"
            ) from None
        self._totals: list[Totals] = []
        self._errors: NDArray[np.float64] | None = None
        self._sums = SumStore(layout.keep, len(layout.structure), layout.names)

    def encode(
        self,
        tile: Tile,
        values: Sequence[NDArray[np.float32]],
        counts: dict[str, int],
        errors: NDArray[np.float64] | None = None,
        totals: Totals | None = None,
        sums: TileSums | None = None,
    ) -> FinishedTile:
        """Check a tile; any thread may call this."""
        found = checked_totals(tile, values, counts) if totals is None else totals
        return FinishedTile(tile, found, tuple(values), errors=errors, sums=sums)

    def write(self, finished: FinishedTile) -> None:
        """Keep a tile."""
        values = iter(finished.payload)
        for piece in self._pieces:
            box = piece.box(finished.tile)
            if box is not None:
                place = shifted(box, piece.reduced(self._low))
                array = self._arrays[piece.name]
                array[place] = next(values).reshape(array[place].shape)
        self._totals.append(finished.totals)
        self._errors = added(self._errors, finished.errors)
        self._sums.add(finished.sums)

    @property
    def totals(self) -> Totals:
        """Sums over the tiles written."""
        return Totals.merged(self._totals)

    def finish(self, correction: Correction, trust: Trust | None = None) -> Density:
        """The field, or what was kept of it."""
        arrays = [self._arrays.get(name) for name in NAMES]
        layout = self.layout
        info = {**layout.provenance, "settings": layout.settings, "region": layout.region}
        density = Density(
            self._grid,
            layout.structure.structure(),
            arrays[0],
            arrays[1],
            arrays[2],
            totals=self.totals,
            errors=self._errors,
            correction=correction,
            info=info,
            kept=None if layout.keep.field_alone else self._kept(),
        )
        density.trust = trust
        return density

    def _kept(self) -> Kept:
        stored = self._arrays
        coarse: dict[str, Field] = {n: stored[f"coarse/{n}"] for n in NAMES if f"coarse/{n}" in stored}
        atoms = self._sums.atoms
        return Kept(
            self.layout.keep,
            coarse,
            lambda axis, index, name: self._arrays[plane_name(axis, index + self._low[axis], name)],
            self._sums.histograms(),
            None if atoms is None else atoms.__getitem__,
        )

    def close(self) -> None:
        """Nothing to release."""


def in_memory(density: Density) -> Density:
    """A density with its fields as arrays, independent of any file."""
    raw = density.raw_fields()
    fields = [np.asarray(raw[name]) if name in raw else None for name in NAMES]
    copy = Density(
        density.grid,
        density.structure,
        *fields,
        totals=density.totals,
        errors=density._errors,
        correction=density.correction,
        info=density.info,
        kept=None if density.kept is None else density.kept.in_memory(density.grid, density.n_atoms),
    )
    copy.trust = density.trust
    return copy
