"""Where finished tiles go: one HDF5 file that survives being killed. (`gpurho.memorystore`: arrays in memory.)

While it is being written it is called ``*.part``, with a journal beside it (`gpurho.journal`). Chunks are compressed
here and handed to HDF5 as they are, so that their bytes are in the file as soon as they are written. A resumed run
replays the verified chunks into a new file with the same calls, which gives the same bytes.
"""

from __future__ import annotations

import os
import shutil
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import drop_objects, reason_of, unheard
from gpurho.density import Density
from gpurho.densityfile import COLUMNS, Layout, compress_chunk, create_file, open_density, write_tables
from gpurho.errors import GpurhoError, ModelError, OutputExistsError, StoreError
from gpurho.fields import Correction, Totals
from gpurho.journal import Blobs, Journal, Lock, blobs_path, first_difference, read_blob, read_journal
from gpurho.kept import SumStore, TileSums
from gpurho.partition import Tile
from gpurho.trust import Trust

SYNC_SECONDS = 10.0
"""Most seconds of work that a failure of the machine, not of the process, can cost."""


@dataclass(frozen=True)
class FinishedTile:
    """A tile ready for its sink.

    Totals, the chunks' stored bytes (or arrays) of the pieces that the tile meets, their checksums, the vector of the
    tile's integral, and sums of atoms and histograms with their stored bytes.
    """

    tile: Tile
    totals: Totals
    payload: tuple[Any, ...]
    crc: tuple[int, ...] = ()
    stored_crc: tuple[int, ...] = ()
    errors: NDArray[np.float64] | None = None
    sums: TileSums | None = None
    blob: bytes = b""


def checked_totals(tile: Tile, values: Sequence[NDArray[np.float32]], counts: dict[str, int]) -> Totals:
    """The sums of a tile; raises `ModelError` when the network gave anything but finite numbers."""
    with np.errstate(invalid="ignore", over="ignore"):
        aleatoric, epistemic = (values[1], values[2]) if len(values) == 3 else (None, None)
        totals = Totals.of_block(values[0], aleatoric, epistemic, counts)
    if not totals.finite:
        bad = sum(int((~np.isfinite(value)).sum()) for value in values)
        raise ModelError(
            f"the model gave {bad} values that are not finite in tile {tile.index} (points {tile.start} to"
            f" {tile.stop}); the tile was not stored: check the model, or try precision='fp32'"
        )
    return totals


class TileFile(ABC):
    """Tiles in one HDF5 file that is being written, with its journal; the base of the sinks that write files.

    `path` is the name that the file gets when it is whole; `part` and `journal` are what it has until then.
    """

    def __init__(self, path: Path, part: Path, journal: Path, layout: Layout) -> None:
        self.path, self.layout = path, layout
        self._part, self._journal_path = part, journal
        self._totals: dict[int, Totals] = {}
        self._crc: dict[int, tuple[int, ...]] = {}
        self._earlier = 0  # tiles of the file that is being taken over
        self._h5: Any = None
        self._journal: Journal | None = None
        self._blobs: Blobs | None = None
        self._pieces = layout.pieces
        self._sums = SumStore(layout.keep, len(layout.structure), layout.names)
        self._synced = time.monotonic()

    @property
    def done(self) -> frozenset[int]:
        """Numbers of the tiles that the file holds."""
        return frozenset(self._totals)

    @property
    def totals(self) -> Totals:
        """Sums over the tiles that the file holds."""
        return Totals.merged(self._totals.values())

    @property
    def origin(self) -> tuple[int, ...]:
        """Grid point of the first element of the file's fields."""
        return (0, 0, 0)

    def replay(self, records: list[dict[str, Any]], source: Path, journal: Path) -> None:
        """Take tiles over from the unfinished file `source`, whose `journal` has these records, while all is whole."""
        blobs = blobs_path(journal)
        with open(source, "rb") as old:
            for record in records:
                chunks = []
                for offset, size, crc in zip(record["offset"], record["size"], record["stored_crc"], strict=True):
                    old.seek(offset)
                    data = old.read(size)
                    if zlib.crc32(data) != crc:
                        # Lost with the machine's memory, in order of writing: this tile and the rest are made again.
                        return
                    chunks.append(data)
                blob = b""
                if "blob" in record:
                    found = read_blob(blobs, record["blob"])
                    if found is None:
                        return
                    blob = found
                totals = Totals(**{name: record["sums"][name] for name in COLUMNS})
                tile = self.layout.tiles[record["tile"]]
                errors = record.get("errors")
                self.write(
                    FinishedTile(
                        tile,
                        totals,
                        tuple(chunks),
                        tuple(record["crc"]),
                        tuple(record["stored_crc"]),
                        None if errors is None else np.array(errors, dtype=np.float64),
                        TileSums.unpack(blob) if blob else None,
                        blob,
                    )
                )

    def encode(
        self,
        tile: Tile,
        values: Sequence[NDArray[np.float32]],
        counts: dict[str, int],
        errors: NDArray[np.float64] | None = None,
        totals: Totals | None = None,
        sums: TileSums | None = None,
    ) -> FinishedTile:
        """Check, sum and compress a tile; any thread may call this."""
        found = checked_totals(tile, values, counts) if totals is None else totals
        crc = tuple(zlib.crc32(np.ascontiguousarray(value, dtype="<f4").data) for value in values)
        met = [(piece, box) for piece in self._pieces if (box := piece.box(tile)) is not None]
        stored = tuple(compress_chunk(v, box, piece.chunk) for v, (piece, box) in zip(values, met, strict=True))
        blob = b"" if sums is None else sums.pack()
        return FinishedTile(tile, found, stored, crc, tuple(zlib.crc32(data) for data in stored), errors, sums, blob)

    def write(self, finished: FinishedTile) -> None:
        """Append a tile and its line in the journal; one thread only, in the order of the tiles."""
        tile = finished.tile
        met = [(piece, box) for piece in self._pieces if (box := piece.box(tile)) is not None]
        offsets = []
        with self.guarded():
            for (piece, box), data in zip(met, finished.payload, strict=True):
                dataset = self._h5[piece.name].id
                origin = piece.reduced(self.origin)
                coordinate = tuple(a - o for a, o in zip(piece.corner(box), origin, strict=True))
                dataset.write_direct_chunk(coordinate, data)
                offsets.append(int(dataset.get_chunk_info_by_coord(coordinate).byte_offset))
            assert self._journal is not None  # opened with the file
            blob = {"blob": self._append_blob(finished.blob)} if finished.blob else {}
            self._journal.append(
                {
                    "tile": tile.index,
                    "offset": offsets,
                    "size": [len(data) for data in finished.payload],
                    "stored_crc": finished.stored_crc,
                    "crc": finished.crc,
                    "sums": asdict(finished.totals),
                    # Every digit, so that a resumed run gives the same bits.
                    "errors": None if finished.errors is None else finished.errors.tolist(),
                    **blob,
                }
            )
            if time.monotonic() - self._synced > SYNC_SECONDS:
                os.fsync(self._h5.id.get_vfd_handle())
                if self._blobs is not None:
                    self._blobs.sync()
                self._journal.sync()
                self._synced = time.monotonic()
        self._totals[tile.index] = finished.totals
        crc = iter(finished.crc)
        self._crc[tile.index] = tuple(0 if piece.box(tile) is None else next(crc) for piece in self._pieces)
        self._keep_errors(finished.errors)
        self._sums.add(finished.sums)

    def _append_blob(self, data: bytes) -> list[int]:
        if self._blobs is None:
            assert self._journal is not None  # opened with the file
            self._blobs = Blobs(blobs_path(self._journal.path))
        return self._blobs.append(data)

    @abstractmethod
    def _keep_errors(self, errors: NDArray[np.float64] | None) -> None:
        """Keep what a tile adds to the error bar of the integral."""

    def _publish(self) -> None:
        """Give the closed file its name, on the disk."""
        self._h5.flush()
        with unheard():
            self._h5.close()
        self._h5 = None
        sync_file(self._part)
        os.replace(self._part, self.path)
        sync_file(self.path.parent)

    def close(self) -> None:
        """Release the file; what is written stays for a later run."""
        if self._h5 is not None:
            # After an error the file may refuse to flush; its chunks and the journal are what counts.
            with suppress(OSError, RuntimeError), unheard():
                self._h5.close()
            self._h5 = None
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._blobs is not None:
            self._blobs.close()
            self._blobs = None

    def guarded(self) -> _Guard:
        """A context in which failures of the file system become a `StoreError` that says what is safe."""
        return _Guard(self)


class FileSink(TileFile):
    """Writes the tiles of a prediction to one HDF5 file, in order, so that a killed run can go on.

    Parameters
    ----------
    path : Path
        The output. Until `finish` the work lies in ``<path>.part`` and ``<path>.journal``.
    layout : Layout
    resume : bool
        Go on with an unfinished file of the same settings; otherwise start again and replace what is there.

    Raises
    ------
    OutputExistsError
        When there is an output of other settings, finished or not; the message names the setting.
    StoreError
        When another process writes the same output, or the disk cannot hold it.
    """

    def __init__(self, path: Path, layout: Layout, resume: bool = True) -> None:
        super().__init__(path, path.with_name(path.name + ".part"), path.with_name(path.name + ".journal"), layout)
        self._lock = lock_output(path)
        self._errors: NDArray[np.float64] | None = None
        try:
            self._begin(resume)
        except BaseException:
            self.close()
            raise

    def _begin(self, resume: bool) -> None:
        records = read_journal(self._journal_path) if resume else []
        if records:
            check_same(self._part, self.layout.settings, records[0].get("settings", {}))
        check_room(self.path.parent, self.layout.raw_bytes)
        # Chunks of a killed run are copied into fresh files, which take the old ones' place once they hold them all.
        new_part = self._part.with_name(self._part.name + ".new")
        new_journal = self._journal_path.with_name(self._journal_path.name + ".new")
        new_blobs = blobs_path(new_journal)
        for leftover in (new_part, new_journal, new_blobs):
            leftover.unlink(missing_ok=True)
        self._earlier = max(0, len(records) - 1) if self._part.exists() else 0
        try:
            self._replace(records, (new_part, new_journal, new_blobs))
        except BaseException:
            for leftover in (new_part, new_journal, new_blobs):  # they would only fill the disk
                leftover.unlink(missing_ok=True)
            raise
        self._earlier = 0

    def _replace(self, records: list[dict[str, Any]], new: tuple[Path, Path, Path]) -> None:
        """Take the tiles of `records` over into new files, which take the place of the old ones."""
        (new_part, new_journal, new_blobs), blobs = new, blobs_path(self._journal_path)
        with self.guarded(), unheard():
            self._h5 = create_file(new_part, self.layout)
            self._journal = Journal(new_journal)
            self._journal.append({"journal": 1, "settings": self.layout.settings})
            if len(records) > 1 and self._part.exists():
                self.replay(records[1:], self._part, self._journal_path)
            os.replace(new_part, self._part)
            os.replace(new_journal, self._journal_path)
            self._journal.path = self._journal_path
            if self._blobs is not None:
                os.replace(new_blobs, blobs)
            else:
                blobs.unlink(missing_ok=True)

    def _keep_errors(self, errors: NDArray[np.float64] | None) -> None:
        self._errors = added(self._errors, errors)

    def finish(self, correction: Correction, trust: Trust | None = None) -> Density:
        """Write the tables, give the file its name, and open it."""
        tiles = self.layout.tiles
        missing = len(tiles) - len(self._totals)
        if missing:
            raise StoreError(f"{missing} of {len(tiles)} tiles of {self.path} are missing; run the same command again")
        with self.guarded(), unheard():
            rows = [self._totals[i] for i in range(len(tiles))]
            write_tables(self._h5, self.layout, rows, self._crc, correction, self._errors, self._sums, trust)
            self._publish()
        self._journal_path.unlink(missing_ok=True)
        blobs_path(self._journal_path).unlink(missing_ok=True)
        self.close()
        return open_density(self.path)

    def close(self) -> None:
        """Release file and lock; what is written stays for a later run."""
        super().close()
        self._lock.release()


class _Guard:
    """Turns failures of the file system into a `StoreError` that says what is safe."""

    def __init__(self, sink: TileFile) -> None:
        self._sink = sink

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is None or isinstance(error, GpurhoError) or not isinstance(error, (OSError, RuntimeError)):
            return
        sink = self._sink
        drop_objects(error)
        safe = max(len(sink.done), sink._earlier)
        raise StoreError(
            f"cannot write {sink.path}: {reason_of(error)}; {safe} of {len(sink.layout.tiles)} tiles are safe in"
            f" {sink._part.name}: make room and run the same command again"
        ) from error


def lock_output(path: Path) -> Lock:
    """The lock of an output, whose folder is made where only that is missing."""
    try:
        # One new folder is a wish; several at once are more likely a mistyped path.
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise StoreError(f"folder {path.parent} cannot be made: {error.strerror}; create it first") from None
    try:
        return Lock(path.with_name(path.name + ".lock"), path)
    except OSError as error:
        raise StoreError(f"cannot write in {path.parent}: {error.strerror}; give another output") from None


def check_same(unfinished: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise `OutputExistsError` where an unfinished output was begun with other settings; names the first of them."""
    difference = first_difference(wanted, found)
    if difference is not None:
        name, want, have = difference
        raise OutputExistsError(
            f"{unfinished} is an unfinished prediction with {name} {have!r}, not {want!r};"
            " give another output, or resume=False (--no-resume) to replace it"
        )


def check_room(folder: Path, raw_bytes: int) -> None:
    """Raise `StoreError` where a folder's disk cannot hold fields of `raw_bytes` before compression."""
    free = shutil.disk_usage(folder).free
    if free < 0.4 * raw_bytes:
        raise StoreError(
            f"{folder} has {free / 2**30:.3g} GiB free and the output needs about"
            f" {0.75 * raw_bytes / 2**30:.3g} GiB; free space or give another output"
        )


def added(total: NDArray[np.float64] | None, part: NDArray[np.float64] | None) -> NDArray[np.float64] | None:
    """The sum of vectors so far and the next tile's; tiles come in one order, so the bits are those of any run."""
    return part if total is None or part is None else total + part


def sync_file(path: Path) -> None:
    """Force a file, or the names in a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
