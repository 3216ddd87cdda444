"""A prediction in shards: what many workers write, each on its own, and the one file that is made of them.

Beside the output ``rho.h5`` lies the folder ``rho.h5.shards`` with a shard for each run of tiles. A run is a box of the
grid and a range of consecutive tiles at once, so that one line of a virtual data set covers it. While it is written a
shard has the name of its run and of the attempt, with a journal beside it as `gpurho.journal` says: should a worker
die, or be taken for dead, the next attempt takes the tiles that are whole over into a file of its own, and no two
workers ever write to one file. A finished shard has the same bytes whoever made it.

Besides the shards the folder holds, until the output is whole, ``manifest`` (settings, and tiles in a run), ``model``,
``atoms`` of the runs at work, and a ``session``, by which workers know that somebody still waits for them.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import get, put, put_text, reason_of, unheard
from gpurho.density import Density
from gpurho.densitychecks import DAMAGE
from gpurho.densityfile import COLUMNS, Layout, create_file, open_density, write_tables
from gpurho.errors import OutputExistsError, StoreError
from gpurho.fields import Correction, Totals
from gpurho.journal import Journal, Lock, blobs_path, read_journal
from gpurho.kept import SumStore
from gpurho.partition import TileSet
from gpurho.shardsink import copy_pieces, kept_sums, shard_origin, shard_shape
from gpurho.store import added, check_room, check_same, lock_output, sync_file
from gpurho.trust import Trust
from gpurho.virtual import heaps_of, is_sharded, open_shard, settings_digest

FOLDER_SUFFIX = ".shards"
PATTERNS = ("manifest", "*.session", "*.safetensors", "*.npz", "*.tmp", "*.h5", "*.part", "*.journal", "*.sums")
"""All that a folder of shards ever holds; nothing else in it is ever removed."""


@dataclass(frozen=True)
class Run:
    """Consecutive tiles that fill a box: tiles `first` up to `last` (exclusive) of the job."""

    index: int
    first: int
    last: int
    tiles: TileSet

    @property
    def name(self) -> str:
        """Name of the run's shard, less its ending."""
        return f"{self.index:06d}"


def runs_of(tiles: TileSet, per_run: int) -> list[Run]:
    """Runs of about `per_run` tiles, at least one: parts of a row, whole rows, or whole planes of tiles."""
    nx, ny, nz = tiles.counts
    if per_run < nz:
        spans = [((x, x + 1), (y, y + 1), z) for x in range(nx) for y in range(ny) for z in _pieces(nz, per_run)]
    elif per_run < ny * nz:
        spans = [((x, x + 1), y, (0, nz)) for x in range(nx) for y in _pieces(ny, per_run // nz)]
    else:
        spans = [(x, (0, ny), (0, nz)) for x in _pieces(nx, per_run // (ny * nz))]
    runs = []
    for index, ((x0, x1), (y0, y1), (z0, z1)) in enumerate(spans):
        first, last = (x0 * ny + y0) * nz + z0, ((x1 - 1) * ny + y1 - 1) * nz + z1
        start, stop = tiles[first].start, tiles[last - 1].stop
        runs.append(Run(index, first, last, TileSet(start, stop, tiles.tile_shape)))
    return runs


def _pieces(n: int, size: int) -> list[tuple[int, int]]:
    """0 up to `n` in nearly equal ranges of at most `size`."""
    count = -(-n // max(1, size))
    edges = [n * i // count for i in range(count + 1)]
    return list(itertools.pairwise(edges))


class ShardFolder:
    """The folder of shards of an output, held by the process that waits for them.

    Parameters
    ----------
    path : Path
        The output.
    layout : Layout
        Of all of it.
    per_run : int
        Tiles in a run, where the work begins anew; what is resumed keeps its runs.
    resume : bool
        Go on with shards of the same settings; otherwise remove what is there, the output too.

    Raises
    ------
    OutputExistsError
        For unfinished work of other settings, or of one device.
    StoreError
        When another process writes the same output, or the disk cannot hold it.
    """

    def __init__(self, path: Path, layout: Layout, per_run: int, resume: bool = True) -> None:
        self.path, self.layout = path, layout
        self.folder = shard_folder(path)
        self.digest = settings_digest(layout.settings)
        self._lock = lock_output(path)
        try:
            self.runs = runs_of(layout.tiles, self._begin(per_run, resume))
            self.finished = {run.index for run in self.runs if self._is_finished(run)}
        except BaseException:
            self._lock.release()
            raise

    def _begin(self, per_run: int, resume: bool) -> int:
        """Prepare the folder; returns the tiles in a run."""
        single = [self.path.with_name(self.path.name + ending) for ending in (".part", ".journal")]
        manifest = self.folder / "manifest"
        records = read_journal(manifest)
        if not resume:
            for file in (self.path, *single):
                file.unlink(missing_ok=True)
            remove_shards(self.path)
        elif any(file.exists() for file in single):
            raise OutputExistsError(
                f"{single[0]} is an unfinished prediction on one device; finish it so (leave out devices and client),"
                " give another output, or resume=False (--no-resume) to replace it"
            )
        elif records:
            check_same(self.folder, self.layout.settings, records[0]["settings"])
            return int(records[0]["per_run"])
        check_room(self.path.parent, self.layout.raw_bytes)
        try:
            self.folder.mkdir(exist_ok=True)
            new = manifest.with_name("manifest.tmp")
            new.unlink(missing_ok=True)
            journal = Journal(new)
            journal.append({"manifest": 1, "per_run": per_run, "settings": self.layout.settings})
            journal.sync()
            journal.close()
            os.replace(new, manifest)
        except OSError as error:
            raise StoreError(f"cannot write in {self.folder}: {error.strerror}; give another output") from None
        return per_run

    def _is_finished(self, run: Run) -> bool:
        file = self.shard(run)
        if not file.exists():
            return False
        try:
            with open_shard(file, self.digest) as h5:
                return tuple(h5.attrs["start"]) == run.tiles.start and tuple(h5.attrs["stop"]) == run.tiles.stop
        except (StoreError, KeyError):
            return False  # of an earlier output, or damaged: made again

    def shard(self, run: Run) -> Path:
        """The finished shard of a run."""
        return self.folder / f"{run.name}.h5"

    def run_layout(self, run: Run) -> Layout:
        """What a run's shard holds."""
        return run_layout(self.layout, run.tiles)

    def _tables(self) -> Iterator[tuple[Run, Any]]:
        """The tables of all shards, in the order of tiles."""
        for run in self.runs:
            with self._opened(run) as h5:
                yield run, h5["tiles"]

    @contextmanager
    def _opened(self, run: Run) -> Iterator[Any]:
        """A finished shard; damage becomes an error that says what to do."""
        file = self.shard(run)
        with open_shard(file, self.digest) as h5:
            try:
                yield h5
            except DAMAGE as error:
                raise StoreError(
                    f"shard {file} is damaged: {' '.join(str(error).split())}; remove it and run the same command again"
                ) from None

    def totals(self) -> Totals:
        """Sums over all tiles."""
        return Totals.merged(row for _, group in self._tables() for row in _rows(group))

    def finish(self, correction: Correction, trust: Trust | None = None) -> Density:
        """Make one file of the shards, remove what only the work needed, and open it."""
        missing = [run.name for run in self.runs if not self.shard(run).exists()]
        if missing:
            raise StoreError(f"shard {missing[0]} of {self.folder} is missing; run the same command again")
        rows: list[Totals] = []
        crc: dict[int, tuple[int, ...]] = {}
        errors: NDArray[np.float64] | None = None
        for run, group in self._tables():
            rows += _rows(group)
            crc |= {run.first + i: tuple(int(x) for x in row) for i, row in enumerate(get(group, "crc32"))}
            # One by one and in the order of tiles, so that the bits are those of a run on one device.
            for row in get(group, "errors") if "errors" in group else ():
                errors = added(errors, row)
        part = self.path.with_name(self.path.name + ".assembly.tmp")
        try:
            keep = self.layout.keep
            sums = SumStore(keep, len(self.layout.structure), self.layout.names)
            with unheard(), create_file(part, self.layout, self._link if keep.field else None) as h5:
                for run in self.runs if not keep.field_alone else []:
                    with self._opened(run) as shard:
                        copy_pieces(shard, h5, self.run_layout(run))
                        sums.add(kept_sums(shard))
                write_tables(h5, self.layout, rows, crc, correction, errors, sums, trust)
                h5.flush()
                if keep.field:
                    put(h5["shards"], "heaps", heaps_of(part))
                    h5.flush()
            sync_file(part)
            os.replace(part, self.path)
            sync_file(self.path.parent)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise StoreError(
                f"cannot write {self.path}: {reason_of(error)}; all shards are safe in"
                f" {self.folder.name}: make room and run the same command again"
            ) from error
        if not keep.field:  # all of it is in the one file
            remove_shards(self.path)
            return open_density(self.path)
        remove_shards(self.path, keep=("*.h5",))
        ours = {self.shard(run) for run in self.runs}
        for file in self.folder.glob("*.h5"):
            if file not in ours:
                file.unlink()
        return open_density(self.path)

    def _link(self, h5: Any) -> None:
        """The virtual data sets, and the table of shards by which this library reads them."""
        import h5py

        layouts = [self.run_layout(run) for run in self.runs]
        names = [f"{self.folder.name}/{run.name}.h5" for run in self.runs]
        for name in self.layout.names:
            # The low-level calls, because the others note the time.
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_obj_track_times(False)
            plist.set_fill_value(np.array(np.nan, dtype="<f4"))
            for layout, shard in zip(layouts, names, strict=True):
                count = [b - a for a, b in zip(layout.tiles.start, layout.tiles.stop, strict=True)]
                target = h5py.h5s.create_simple(self.layout.grid.shape)
                target.select_hyperslab(tuple(layout.tiles.start), tuple(count))
                source = h5py.h5s.create_simple(shard_shape(layout))
                inner = [a - o for a, o in zip(layout.tiles.start, shard_origin(layout), strict=True)]
                source.select_hyperslab(tuple(inner), tuple(count))
                # HDF5 takes a percent sign in the name of a source for a pattern.
                plist.set_virtual(target, shard.replace("%", "%%").encode(), name.encode(), source)
            space = h5py.h5s.create_simple(self.layout.grid.shape)
            dataset = h5py.h5d.create(h5.id, name.encode(), h5py.h5t.IEEE_F32LE, space, plist)
            put_text(h5py.Dataset(dataset), "unit", "e/angstrom^3")
        group = h5.create_group("shards")
        put_text(group, "digest", self.digest)
        columns = {
            "names": np.array([name.encode() for name in names]),
            "start": np.array([layout.tiles.start for layout in layouts], dtype=np.int64),
            "stop": np.array([layout.tiles.stop for layout in layouts], dtype=np.int64),
            "origin": np.array([shard_origin(layout) for layout in layouts], dtype=np.int64),
        }
        for key, column in columns.items():
            put(group, key, column)

    def close(self) -> None:
        """Let the output go; shards stay for a later run."""
        self._lock.release()


def run_layout(layout: Layout, tiles: TileSet) -> Layout:
    """The layout of the part of an output that has these tiles."""
    return replace(layout, tiles=tiles)


def _rows(group: Any) -> list[Totals]:
    return [Totals.of_row(COLUMNS, row) for row in get(group, "sums").tolist()]


def shard_folder(path: Path) -> Path:
    """The folder of the shards of an output."""
    return path.with_name(path.name + FOLDER_SUFFIX)


def remove_shards(path: Path, keep: Sequence[str] = ()) -> None:
    """Remove the shards of an output and what work on them left, but for the patterns to `keep`."""
    folder = shard_folder(path)
    if not folder.is_dir() or folder.is_symlink():
        return
    for pattern in PATTERNS:
        if pattern not in keep:
            for file in folder.glob(pattern):
                file.unlink(missing_ok=True)
    if not keep:
        with suppress(OSError):  # not empty: something else lies in it
            folder.rmdir()


def tidy(path: Path) -> None:
    """Remove what a run left beside its finished output when it was killed while it cleaned up.

    Nothing is removed while another process works on the output, nor what an unfinished replacement needs.
    """
    import h5py

    part, journal = (path.with_name(path.name + ending) for ending in (".part", ".journal"))
    lock, manifest = path.with_name(path.name + ".lock"), shard_folder(path) / "manifest"
    if not any(file.exists() for file in (lock, journal, manifest)):
        return
    with suppress(StoreError, OSError):
        held = Lock(lock, path)
        try:
            if not part.exists():
                journal.unlink(missing_ok=True)
                blobs_path(journal).unlink(missing_ok=True)
            if manifest.exists():
                with h5py.File(path, "r") as h5:
                    keep = ("*.h5",) if is_sharded(h5) else ()
                remove_shards(path, keep)
        finally:
            held.release()


def refuse_unfinished(path: Path) -> None:
    """Raise `OutputExistsError` where several workers began this output and did not end."""
    if (shard_folder(path) / "manifest").exists():
        raise OutputExistsError(
            f"{shard_folder(path)} holds an unfinished prediction on several devices; finish it so (give devices or"
            " client), give another output, or resume=False (--no-resume) to replace it"
        )


def folder_bytes(path: Path) -> int:
    """Bytes of an output, its shards included."""
    shards = shard_folder(path)
    files = [path, *shards.glob("*.h5")] if shards.is_dir() else [path]
    return sum(file.stat().st_size for file in files)
