"""Where a worker's tiles go: the shard of one run of tiles; see `gpurho.shards`."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import HDF5_FORMAT, get, put, put_text, unheard
from gpurho.densityfile import COLUMNS, Layout, create_field
from gpurho.errors import StoreError
from gpurho.journal import Journal, blobs_path, read_journal
from gpurho.keep import Piece
from gpurho.kept import TileSums
from gpurho.partition import Triple
from gpurho.store import TileFile
from gpurho.virtual import SHARD_FORMAT, settings_digest

SHARD_VERSION = 1


class ShardSink(TileFile):
    """Writes the tiles of one run; takes those of earlier attempts over.

    Parameters
    ----------
    folder : Path
    name : str
        Of the run.
    layout : Layout
        Of the run alone: its tiles, and as structure whatever atoms the worker has.
    attempt : str
        A name that no other attempt has.
    owners : (n_atoms,) int64, optional
        Numbers in the whole structure of the atoms that the worker has; needed where sums of atoms are kept.
    """

    def __init__(
        self, folder: Path, name: str, layout: Layout, attempt: str, owners: NDArray[np.int64] | None = None
    ) -> None:
        stem = f"{name}.{attempt}"
        super().__init__(folder / f"{name}.h5", folder / f"{stem}.part", folder / f"{stem}.journal", layout)
        self._rows: dict[int, NDArray[np.float64] | None] = {}
        self._owners = np.arange(len(layout.structure)) if owners is None else owners
        earlier = sorted(folder.glob(f"{name}.*.journal"))
        self.replayed = 0
        try:
            with self.guarded(), unheard():
                self._h5 = _create_shard(self._part, layout, self.origin)
                self._journal = Journal(self._journal_path)
                self._journal.append({"journal": 1, "digest": settings_digest(layout.settings)})
                self._adopt(earlier)
        except BaseException:
            self.close()
            raise

    @property
    def origin(self) -> tuple[int, ...]:
        """Grid point of the first element of the shard's fields: where the first chunk begins."""
        return shard_origin(self.layout)

    def _adopt(self, earlier: list[Path]) -> None:
        """Take tiles over from the attempt that got farthest, and remove what is left of all of them."""
        digest = settings_digest(self.layout.settings)
        best: tuple[list[dict[str, Any]], Path, Path] | None = None
        for path in earlier:
            records = read_journal(path)
            part = path.with_suffix(".part")
            if len(records) > 1 and records[0].get("digest") == digest and part.exists():
                best = max(best or ([], part, path), (records[1:], part, path), key=lambda item: len(item[0]))
        if best is not None:
            self.replay(*best)
            self.replayed = len(self.done)
            assert self._journal is not None  # opened before
            os.fsync(self._h5.id.get_vfd_handle())
            self._journal.sync()
        for path in earlier:
            path.unlink(missing_ok=True)
            for file in (path.with_suffix(".part"), blobs_path(path)):
                file.unlink(missing_ok=True)

    def _keep_errors(self, errors: NDArray[np.float64] | None) -> None:
        self._rows[len(self._rows)] = errors

    def finish(self) -> None:
        """Write the tables and give the shard its name."""
        tiles = self.layout.tiles
        if len(self._totals) != len(tiles):
            raise StoreError(f"{len(tiles) - len(self._totals)} of {len(tiles)} tiles of {self.path} are missing")
        with self.guarded(), unheard():
            group = self._h5.create_group("tiles")
            tables: dict[str, NDArray[Any]] = {
                "crc32": np.array([self._crc[i] for i in range(len(tiles))], dtype=np.uint32),
                "sums": np.array(
                    [[getattr(self._totals[i], name) for name in COLUMNS] for i in range(len(tiles))], dtype=np.float64
                ),
            }
            rows = [self._rows[i] for i in range(len(tiles))]
            if rows[0] is not None:
                tables["errors"] = np.array(rows, dtype=np.float64)
            for name, table in tables.items():
                put(group, name, table)
            if not self.layout.keep.field_alone:
                found = self._sums.packed(self._owners)
                for name in ("counts", "atoms", "sums"):
                    put(self._h5, f"kept/{name}", getattr(found, name))
            self._publish()
        self._journal_path.unlink(missing_ok=True)
        blobs_path(self._journal_path).unlink(missing_ok=True)
        self.close()


def shard_origin(layout: Layout) -> Triple:
    """Grid point of the first element of the fields of a run's shard."""
    a, b, c = (s // n * n for s, n in zip(layout.tiles.start, layout.chunk, strict=True))
    return (a, b, c)


def shard_shape(layout: Layout) -> Triple:
    """Shape of the fields of a run's shard: whole chunks."""
    origin = shard_origin(layout)
    a, b, c = (-(-(e - o) // n) * n for e, o, n in zip(layout.tiles.stop, origin, layout.chunk, strict=True))
    return (a, b, c)


def shard_pieces(layout: Layout) -> list[Piece]:
    """The arrays that a run's shard has a part of."""
    a, b = layout.tiles.start, layout.tiles.stop
    return [p for p in layout.pieces if p.plane is None or a[p.plane[0]] <= p.plane[1] < b[p.plane[0]]]


def copy_pieces(shard: Any, target: Any, layout: Layout) -> None:
    """Copy the stored chunks of all but the full fields from an open shard of a run into the open output."""
    for tile in layout.tiles:
        for piece in shard_pieces(layout):
            box = piece.box(tile)
            if box is None or piece.name in layout.names:
                continue
            corner = piece.corner(box)
            inner = tuple(a - o for a, o in zip(corner, piece.reduced(shard_origin(layout)), strict=True))
            mask, data = shard[piece.name].id.read_direct_chunk(inner)
            try:
                zlib.decompress(data)
            except zlib.error as error:
                raise OSError(f"{piece.name} of tile {tile.index}: {error}") from None
            target[piece.name].id.write_direct_chunk(corner, data, mask)


def kept_sums(shard: Any) -> TileSums:
    """The sums of atoms and the histograms of an open shard."""
    return TileSums(*(get(shard, f"kept/{name}") for name in ("counts", "atoms", "sums")))


def _create_shard(path: Path, layout: Layout, origin: Sequence[int]) -> Any:
    """A new shard with everything but the tiles; the same bytes for the same run."""
    import h5py

    h5 = h5py.File(path, "w", libver=HDF5_FORMAT)
    put_text(h5, "format", SHARD_FORMAT)
    h5.attrs["format_version"] = SHARD_VERSION
    put_text(h5, "digest", settings_digest(layout.settings))
    for name, value in (("start", layout.tiles.start), ("stop", layout.tiles.stop), ("origin", origin)):
        h5.attrs[name] = np.asarray(value, dtype=np.int64)
    for piece in shard_pieces(layout):
        create_field(h5, piece, piece.reduced(shard_shape(layout)))
    return h5
