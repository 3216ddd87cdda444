"""The HDF5 file of a density.

Layout of the file, version 1 (``format = "gpurho-density"`` among the root's attributes):

- ``mean``, ``aleatoric``, ``epistemic``: (nx, ny, nz) float32, e/angstrom^3, over the whole grid; a chunk is a tile;
  shuffle and gzip, which every HDF5 reads; NaN outside of the region of a partial prediction. Values as the network
  gave them: the attributes ``scale`` and ``shift`` of the root hold the electron conservation,
  ``mean -> scale * mean + shift * (aleatoric^2 + epistemic^2)``, both sigmas times ``scale``.
- ``coarse``, ``slices``, ``atoms``, ``histograms``: where the prediction was asked to keep them (`gpurho.keep`), with
  or without the fields above; the attribute ``keep`` of the root names them. ``coarse/mean`` and its sisters hold means
  over blocks of points (of the sigmas the roots of mean squares), ``slices/z_17/mean`` and so on the plane of points 17
  across the third cell vector, all as the network gave them. ``atoms/sums`` (n_atoms, n_columns, 2) int64: sums over
  the points nearest to each atom of what the attribute ``columns`` names, as ``[0] * 2^-32 + [1] * 2^-72``.
  ``histograms/mean`` and ``histograms/std`` have ``counts`` and ``edges``.
- ``grid``: attributes ``shape``, ``cell``, ``origin``, ``pbc``, ``region``.
- ``structure``: ``positions``, ``numbers``, attributes ``cell``, ``pbc``.
- ``tiles``: ``start``, ``stop``, ``done``, ``crc32`` (of the tile's float32 values in C order, one for each field)
  and ``sums``, whose columns the attribute ``columns`` names; ``errors``, where there are sigmas: a vector whose
  length, times the volume per point, is the epistemic sigma of the integral (`gpurho.integrals`).
- ``shards``: only where several workers made the prediction. The fields are then virtual data sets over files in a
  folder beside this one, and the format's version is 2; see `gpurho.virtual`.
- ``trust``: only where the model keeps statistics of its training atoms. ``per_atom`` and ``why``, (n_atoms,), and the
  attribute ``summary``, JSON: see `gpurho.trust.Trust`.
- ``provenance``: JSON with the settings, the model's fingerprint and full specification, and versions.

Arrays without a filter carry their CRC-32 in the attribute ``crc32`` (files of earlier versions have none), so that
every byte that matters is under a checksum: see `gpurho.checksums`.

The file holds no date: it is a function of its inputs, the same bytes whenever and however often it was interrupted.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import HDF5_FORMAT, get, get_text, put, put_text
from gpurho.deflate import deflate
from gpurho.density import Density
from gpurho.densitychecks import (
    check_sums,
    checked_field,
    damage_error,
    damaged_tile,
    finite_values,
    real_attribute,
    values_of,
)
from gpurho.errors import OutputExistsError, SettingsError, StoreError
from gpurho.fields import NAMES, Box, Correction, LazyField, Totals
from gpurho.grid import Grid, region_grid
from gpurho.hdf5guard import DAMAGE
from gpurho.journal import first_difference
from gpurho.keep import Keep, Piece, kept_planes, pieces_of, plane_name, shifted
from gpurho.kept import COLUMNS as ATOM_COLUMNS
from gpurho.kept import Histogram, Kept, SumStore
from gpurho.partition import Tile, TileSet
from gpurho.sources import StructureSource
from gpurho.storedatoms import atoms_of, put_atoms
from gpurho.structure import Structure
from gpurho.trust import Trust
from gpurho.truststore import read_trust, write_trust
from gpurho.versions import check_version
from gpurho.virtual import ShardedFields, check_heaps, is_sharded, refuse_external

FORMAT = "gpurho-density"
FORMAT_VERSION = 2
"""Of files whose fields lie in shards; version 1 of all others, which older libraries read too."""

Region = tuple[tuple[int, int], ...]
COLUMNS = [field.name for field in fields(Totals)]
"""Columns of the table of sums."""


@dataclass(frozen=True)
class Layout:
    """What an output holds: the grid and tiles, the atoms, which fields, the settings, and where it all came from."""

    grid: Grid
    tiles: TileSet
    structure: Structure | StructureSource
    names: tuple[str, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    region: Region | None = None
    keep: Keep = field(default_factory=Keep)

    @property
    def pieces(self) -> list[Piece]:
        """The arrays that tiles are stored in."""
        low = [a for a, _ in self.region or ((0, 0),) * 3]
        planes = kept_planes(self.keep, region_grid(self.grid, self.region), low)
        return pieces_of(self.keep, self.names, self.grid.shape, self.tiles.tile_shape, planes)

    @property
    def chunk(self) -> tuple[int, int, int]:
        """Shape of the chunks: a tile, or the grid where that is smaller."""
        shape = tuple(min(t, n) for t, n in zip(self.tiles.tile_shape, self.grid.shape, strict=True))
        return (shape[0], shape[1], shape[2])

    @property
    def raw_bytes(self) -> int:
        """Bytes of the arrays, and of the sums of atoms, before compression."""
        n = 0
        for piece in self.pieces:
            spans = [b - a for a, b in zip(self.tiles.start, self.tiles.stop, strict=True)]
            if piece.plane is not None:
                spans[piece.plane[0]] = 1
            n += 4 * math.prod(span // f for span, f in zip(spans, piece.factors, strict=True))
        return n + (16 * len(ATOM_COLUMNS) * len(self.structure) if self.keep.atoms else 0)


def compress_chunk(value: NDArray[np.float32], box: tuple[slice, ...], chunk: tuple[int, ...]) -> bytes:
    """The bytes that HDF5's shuffle and deflate filters make of the chunk that `box` lies in."""
    shape = tuple(s.stop - s.start for s in box)
    part = value.reshape(shape)
    if shape != chunk:
        whole = np.full(chunk, np.nan, dtype=np.float32)
        offset = [s.start % c for s, c in zip(box, chunk, strict=True)]
        whole[tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))] = part
        part = whole
    plain = np.ascontiguousarray(part, dtype="<f4").reshape(-1).view(np.uint8)
    return deflate(np.ascontiguousarray(plain.reshape(-1, 4).T))


def create_file(path: Path, layout: Layout, link: Callable[[Any], None] | None = None) -> Any:
    """A new file with everything but the tiles; the same bytes for the same layout.

    `link`, where given, is called with the file and makes the fields, which then lie in shards (`gpurho.virtual`).
    """
    import h5py

    h5 = h5py.File(path, "w", libver=HDF5_FORMAT)
    put_text(h5, "format", FORMAT)
    h5.attrs["format_version"] = 1 if link is None else FORMAT_VERSION
    grid = h5.create_group("grid")
    for name in ("shape", "cell", "origin", "pbc"):
        grid.attrs[name] = np.asarray(getattr(layout.grid, name))
    if layout.region is not None:
        grid.attrs["region"] = np.asarray(layout.region, dtype=np.int64)
    put_atoms(h5, layout.structure)
    text = json.dumps({"settings": layout.settings, **layout.provenance}, sort_keys=True)
    put(h5, "provenance", np.bytes_(text.encode()))
    if not layout.keep.field_alone:
        put_text(h5, "keep", json.dumps(layout.keep.to_items()))
    if link is not None:
        link(h5)
    for piece in layout.pieces:
        if link is not None and piece.name in layout.names:
            continue
        create_field(h5, piece, piece.shape)
    return h5


def create_field(h5: Any, piece: Piece, shape: Sequence[int]) -> None:
    """An empty data set of a field: compressed chunks, NaN where nothing was written."""
    dataset = h5.create_dataset(
        piece.name,
        tuple(shape),
        dtype="<f4",
        chunks=piece.chunk,
        shuffle=True,
        compression="gzip",
        compression_opts=1,
        fillvalue=np.nan,
        track_times=False,
    )
    put_text(dataset, "unit", "e/angstrom^3")


def write_tables(
    h5: Any,
    layout: Layout,
    totals: list[Totals],
    crc: dict[int, tuple[int, ...]],
    correction: Correction,
    errors: NDArray[np.float64] | None = None,
    sums: SumStore | None = None,
    trust: Trust | None = None,
) -> None:
    """The per-tile tables, the sums of atoms, the histograms, the conservation and trust, written once at the end."""
    tiles = layout.tiles
    group = h5.create_group("tiles")
    tables = {
        "start": np.array([tile.start for tile in tiles], dtype=np.int64),
        "stop": np.array([tile.stop for tile in tiles], dtype=np.int64),
        "done": np.ones(len(tiles), dtype=np.uint8),
        "crc32": np.array([crc[i] for i in range(len(tiles))], dtype=np.uint32),
        "sums": np.array([[getattr(row, name) for name in COLUMNS] for row in totals], dtype=np.float64),
    }
    if errors is not None:
        tables["errors"] = errors
    for name, table in tables.items():
        put(group, name, table)
    put_text(group["sums"], "columns", json.dumps(COLUMNS))
    put_text(group["crc32"], "columns", json.dumps([piece.name for piece in layout.pieces]))
    if sums is not None:
        _write_sums(h5, sums)
    if trust is not None:
        write_trust(h5, trust)
    group.attrs["tile_shape"] = np.asarray(tiles.tile_shape)
    put_text(h5, "conserve", correction.kind or "none")
    h5.attrs["scale"] = correction.scale
    h5.attrs["shift"] = correction.shift


def _write_sums(h5: Any, sums: SumStore) -> None:
    for name, histogram in sums.histograms().items():
        group = h5.create_group(f"histograms/{name}")
        put(group, "counts", histogram.counts)
        put_text(put(group, "edges", histogram.edges), "unit", "e/angstrom^3")
    if sums.atoms is not None:
        rows = (min(len(sums.atoms), 1 << 14), *sums.atoms.shape[1:])
        table = put(
            h5,
            "atoms/sums",
            sums.atoms,
            chunks=rows,
            shuffle=True,
            compression="gzip",
            compression_opts=1,
        )
        put_text(table, "columns", json.dumps(ATOM_COLUMNS[: sums.atoms.shape[1]]))
        put_text(table, "unit", "e/angstrom^3 and its square, [0] * 2^-32 + [1] * 2^-72")


def _open_h5(path: Path) -> Any:
    import h5py

    if not path.exists():
        if path.with_name(path.name + ".part").exists():
            raise StoreError(f"{path} is unfinished; run the predict command that began it again to complete it")
        raise StoreError(f"{path} does not exist; check the name")
    try:
        h5 = h5py.File(path, "r", rdcc_nbytes=16 << 20)
    except OSError as error:
        raise StoreError(f"{path} cannot be read as HDF5: {str(error).splitlines()[0]}; check the file") from None
    try:
        _check_kind(h5, path)
        check_heaps(h5, path)
        refuse_external(h5, path)
    except StoreError:
        h5.close()
        raise
    except DAMAGE as error:
        h5.close()
        raise damage_error(path, error) from None
    return h5


def _check_kind(h5: Any, path: Path) -> None:
    kind = get_text(h5, "format", "")
    if kind == FORMAT:
        check_version(h5.attrs.get("format_version"), FORMAT, path, StoreError)
    if kind != FORMAT or "tiles" not in h5:
        raise StoreError(f"{path} is not a whole gpurho density; check the name")


def existing_difference(path: Path, settings: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """How the finished output at `path` differs from `settings`; None when it is what they would give."""
    try:
        h5 = _open_h5(path)
    except StoreError as error:
        raise OutputExistsError(f"{error}; the file is left as it is, give another output") from None
    try:
        with h5:
            return first_difference(settings, json.loads(bytes(get(h5, "provenance")))["settings"])
    except DAMAGE as error:
        raise OutputExistsError(f"{damage_error(path, error)}; it is left as it is, give another output") from None


def open_density(path: str | Path) -> Density:
    """The density in an HDF5 file of this library; values are read when they are asked for.

    Raises
    ------
    StoreError
        When the file is not there, unfinished, damaged, or no density.
    """
    file = Path(path)
    h5 = _open_h5(file)
    try:
        return _density_of(h5, ShardedFields(file, h5["shards"]) if is_sharded(h5) else None)
    except StoreError:
        h5.close()
        raise
    except DAMAGE as error:
        h5.close()
        raise damage_error(file, error) from None


def _density_of(h5: Any, shards: ShardedFields | None) -> Density:
    header = h5["grid"].attrs
    grid = Grid([int(n) for n in header["shape"]], header["cell"], header["origin"], header["pbc"])
    region = tuple((int(a), int(b)) for a, b in header["region"]) if "region" in header else None
    part = region_grid(grid, region)
    low = [a for a, _ in region] if region else [0, 0, 0]
    keep = Keep.of(json.loads(get_text(h5, "keep"))) if "keep" in h5.attrs else Keep()

    def load(name: str, key: Any) -> NDArray[Any]:
        if not h5:
            raise SettingsError("the density's file was closed; open it again with Density.open")
        try:
            return finite_values(values_of(h5, shards, name, key))
        except (*DAMAGE, StoreError) as error:
            where = damaged_tile(h5, shards, name, key)
            if isinstance(error, StoreError):
                raise StoreError(f"{where}: {error}") from None
            raise damage_error(Path(h5.filename), OSError(f"{where}: {error}")) from None

    def lazy(name: str, factors: tuple[int, ...] = (1, 1, 1)) -> LazyField | None:
        if name not in h5:
            return None
        # Of a region only a part is stored, and of shards nothing here.
        sized = region is None and (shards is None or name not in NAMES)
        stored = checked_field(h5, name, [n // f for n, f in zip(grid.shape, factors, strict=True)], sized)
        chunks = stored.chunks or tuple(
            min(int(t), n) for t, n in zip(h5["tiles"].attrs["tile_shape"], grid.shape, strict=True)
        )
        first = [lo // f for lo, f in zip(low, factors, strict=True)]
        i, j, k = (n // f for n, f in zip(part.shape, factors, strict=True))
        back = [-lo for lo in first]

        def read(box: Box) -> NDArray[np.float32]:
            return load(name, shifted(box, back)).astype(np.float32, copy=False)

        a, b, c = chunks
        return LazyField(read, (i, j, k), (a, b, c), (first[0] % a, first[1] % b, first[2] % c))

    def plane(axis: int, index: int, quantity: str) -> NDArray[np.float32]:
        box = tuple(slice(lo, lo + n) for d, (lo, n) in enumerate(zip(low, part.shape, strict=True)) if d != axis)
        return load(plane_name(axis, index + low[axis], quantity), box).astype(np.float32, copy=False)

    kept = None
    if not keep.field_alone:
        blocks = {name: lazy(f"coarse/{name}", keep.coarse or (1, 1, 1)) for name in NAMES}
        kept = Kept(
            keep,
            {name: value for name, value in blocks.items() if value is not None},
            plane,
            {name: Histogram(get(group, "counts"), get(group, "edges")) for name, group in h5["histograms"].items()}
            if "histograms" in h5
            else {},
            (lambda rows: load("atoms/sums", rows)) if keep.atoms else None,
        )

    def close() -> None:
        if shards is not None:
            shards.close()
        h5.close()

    columns = json.loads(get_text(h5["tiles/sums"], "columns"))
    rows = [Totals.of_row(columns, row) for row in get(h5, "tiles/sums").tolist()]
    kind = get_text(h5, "conserve")
    correction = Correction(None if kind == "none" else kind, real_attribute(h5, "scale"), real_attribute(h5, "shift"))
    info = {**json.loads(bytes(get(h5, "provenance"))), "region": region}
    totals = Totals.merged(rows)
    check_sums(totals, correction)
    mean = lazy("mean")
    if mean is None and keep.field:
        raise KeyError("dataset 'mean' is missing")
    density = Density(
        part,
        atoms_of(h5),
        mean,
        lazy("aleatoric"),
        lazy("epistemic"),
        totals=totals,
        errors=get(h5, "tiles/errors") if "errors" in h5["tiles"] else None,
        correction=correction,
        info=info,
        close=close,
        kept=kept,
    )
    density.trust = read_trust(h5)
    return density


def verify(path: str | Path) -> list[int]:
    """Numbers of the tiles whose values do not match their checksums; empty for a whole file.

    Raises `StoreError` for a file whose tables are damaged.
    """
    with _open_h5(Path(path)) as h5:
        try:
            return _bad_tiles(h5, Path(path))
        except DAMAGE as error:
            raise damage_error(Path(path), error) from None


def _bad_tiles(h5: Any, path: Path) -> list[int]:
    bad = []
    shards = ShardedFields(path, h5["shards"]) if is_sharded(h5) else None

    header = h5["grid"].attrs
    grid = Grid([int(n) for n in header["shape"]], header["cell"], header["origin"], header["pbc"])
    region = tuple((int(a), int(b)) for a, b in header["region"]) if "region" in header else None
    low = [a for a, _ in region] if region else [0, 0, 0]
    keep = Keep.of(json.loads(get_text(h5, "keep"))) if "keep" in h5.attrs else Keep()
    names = [name for name in NAMES if any(f"{place}{name}" in h5 for place in ("", "coarse/"))]
    planes = kept_planes(keep, region_grid(grid, region), low)
    if planes and not names:
        names = [name for name in NAMES if plane_name(*planes[0], name) in h5]
    i, j, k = (int(n) for n in h5["tiles"].attrs["tile_shape"])
    pieces = pieces_of(keep, names, grid.shape, (i, j, k), planes)
    wanted = get(h5, "tiles/crc32").tolist()
    for number, (start, stop) in enumerate(zip(get(h5, "tiles/start"), get(h5, "tiles/stop"), strict=True)):
        tile = Tile(number, *(tuple(int(x) for x in end) for end in (start, stop)))  # type: ignore[arg-type]
        boxes = [piece.box(tile) for piece in pieces]
        try:
            found = [
                0 if box is None else zlib.crc32(np.ascontiguousarray(values_of(h5, shards, piece.name, box)).data)
                for piece, box in zip(pieces, boxes, strict=True)
            ]
        except (*DAMAGE, StoreError):
            found = []
        if found != wanted[number]:
            bad.append(number)
    return bad
