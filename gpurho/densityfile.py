"""The HDF5 file of a density.

Layout of the file, version 1 (``format = "gpurho-density"`` among the root's attributes):

- ``mean``, ``aleatoric``, ``epistemic``: (nx, ny, nz) float32, e/angstrom^3, over the whole grid; a chunk is a tile;
  shuffle and gzip, which every HDF5 reads; NaN outside of the region of a partial prediction. Values as the network
  gave them: the attributes ``scale`` and ``shift`` of the root hold the electron conservation,
  ``mean -> scale * mean + shift * (aleatoric^2 + epistemic^2)``, both sigmas times ``scale``.
- ``grid``: attributes ``shape``, ``cell``, ``origin``, ``pbc``, ``region``.
- ``structure``: ``positions``, ``numbers``, attributes ``cell``, ``pbc``.
- ``tiles``: ``start``, ``stop``, ``done``, ``crc32`` (of the tile's float32 values in C order, one for each field)
  and ``sums``, whose columns the attribute ``columns`` names; ``errors``, where there are sigmas: a vector whose
  length, times the volume per point, is the epistemic sigma of the integral (`gpurho.integrals`).
- ``provenance``: JSON with the settings, the model's fingerprint and full specification, and versions.

The file holds no date: it is a function of its inputs, the same bytes whenever and however often it was interrupted.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.density import Density, region_grid
from gpurho.errors import OutputExistsError, SettingsError, StoreError
from gpurho.fields import NAMES, Box, Correction, LazyField, Totals
from gpurho.grid import Grid
from gpurho.journal import first_difference
from gpurho.partition import Tile, TileSet
from gpurho.structure import Structure

FORMAT = "gpurho-density"
FORMAT_VERSION = 1

Region = tuple[tuple[int, int], ...]
COLUMNS = [field.name for field in fields(Totals)]
"""Columns of the table of sums."""


@dataclass(frozen=True)
class Layout:
    """What an output holds: the grid and tiles, the atoms, which fields, the settings, and where it all came from."""

    grid: Grid
    tiles: TileSet
    structure: Structure
    names: tuple[str, ...]
    settings: dict[str, Any]
    provenance: dict[str, Any]
    region: Region | None = None

    @property
    def chunk(self) -> tuple[int, int, int]:
        """Shape of the chunks: a tile, or the grid where that is smaller."""
        shape = tuple(min(t, n) for t, n in zip(self.tiles.tile_shape, self.grid.shape, strict=True))
        return (shape[0], shape[1], shape[2])

    @property
    def raw_bytes(self) -> int:
        """Bytes of the fields before compression."""
        return 4 * len(self.names) * self.tiles.n_points


def compress_tile(value: NDArray[np.float32], tile: Tile, chunk: tuple[int, int, int]) -> bytes:
    """The bytes that HDF5's shuffle and deflate filters make of a tile's chunk."""
    box = value.reshape(tile.shape)
    if tile.shape != chunk:
        whole = np.full(chunk, np.nan, dtype=np.float32)
        offset = [a % c for a, c in zip(tile.start, chunk, strict=True)]
        whole[tuple(slice(o, o + n) for o, n in zip(offset, tile.shape, strict=True))] = box
        box = whole
    plain = np.ascontiguousarray(box, dtype="<f4").reshape(-1).view(np.uint8)
    return zlib.compress(np.ascontiguousarray(plain.reshape(-1, 4).T).data, 1)


def create_file(path: Path, layout: Layout) -> Any:
    """A new file with everything but the tiles; the same bytes for the same layout."""
    import h5py

    h5 = h5py.File(path, "w", libver=("v110", "v110"))
    h5.attrs["format"] = FORMAT
    h5.attrs["format_version"] = FORMAT_VERSION
    grid = h5.create_group("grid")
    for name in ("shape", "cell", "origin", "pbc"):
        grid.attrs[name] = np.asarray(getattr(layout.grid, name))
    if layout.region is not None:
        grid.attrs["region"] = np.asarray(layout.region, dtype=np.int64)
    structure = h5.create_group("structure")
    structure.create_dataset("positions", data=layout.structure.positions, track_times=False)
    structure.create_dataset("numbers", data=layout.structure.numbers, track_times=False)
    structure.attrs["cell"] = layout.structure.cell
    structure.attrs["pbc"] = layout.structure.pbc
    text = json.dumps({"settings": layout.settings, **layout.provenance}, sort_keys=True)
    h5.create_dataset("provenance", data=np.bytes_(text.encode()), track_times=False)
    for name in layout.names:
        dataset = h5.create_dataset(
            name,
            layout.grid.shape,
            dtype="<f4",
            chunks=layout.chunk,
            shuffle=True,
            compression="gzip",
            compression_opts=1,
            fillvalue=np.nan,
            track_times=False,
        )
        dataset.attrs["unit"] = "e/angstrom^3"
    return h5


def write_tables(
    h5: Any,
    layout: Layout,
    totals: list[Totals],
    crc: dict[int, tuple[int, ...]],
    correction: Correction,
    errors: NDArray[np.float64] | None = None,
) -> None:
    """The per-tile tables and the conservation, written once at the end."""
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
        group.create_dataset(name, data=table, track_times=False)
    group["sums"].attrs["columns"] = json.dumps(COLUMNS)
    group.attrs["tile_shape"] = np.asarray(tiles.tile_shape)
    h5.attrs["conserve"] = correction.kind or "none"
    h5.attrs["scale"] = correction.scale
    h5.attrs["shift"] = correction.shift


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
    kind, version = h5.attrs.get("format"), int(h5.attrs.get("format_version", 0))
    if kind != FORMAT or "tiles" not in h5 or version > FORMAT_VERSION:
        h5.close()
        if kind == FORMAT and version > FORMAT_VERSION:
            raise StoreError(f"{path} has layout version {version}; update gpurho to read it")
        raise StoreError(f"{path} is not a whole gpurho density; check the name")
    return h5


def existing_difference(path: Path, settings: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """How the finished output at `path` differs from `settings`; None when it is what they would give."""
    try:
        h5 = _open_h5(path)
    except StoreError as error:
        raise OutputExistsError(f"{error}; the file is left as it is, give another output") from None
    with h5:
        return first_difference(settings, json.loads(bytes(h5["provenance"][()]))["settings"])


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
        return _density_of(h5)
    except (KeyError, ValueError, OSError, RuntimeError) as error:
        h5.close()
        raise StoreError(f"{file} is damaged: {str(error).splitlines()[0]}; predict it again") from None


def _density_of(h5: Any) -> Density:
    header, atoms = h5["grid"].attrs, h5["structure"]
    grid = Grid([int(n) for n in header["shape"]], header["cell"], header["origin"], header["pbc"])
    region = tuple((int(a), int(b)) for a, b in header["region"]) if "region" in header else None
    structure = Structure(atoms["positions"][()], atoms["numbers"][()], atoms.attrs["cell"], atoms.attrs["pbc"])
    part = region_grid(grid, region)
    low = [a for a, _ in region] if region else [0, 0, 0]

    def field(name: str) -> LazyField | None:
        if name not in h5:
            return None
        dataset = h5[name]

        def read(box: Box) -> NDArray[np.float32]:
            if not h5:
                raise SettingsError("the density's file was closed; open it again with Density.open")
            try:
                values = dataset[tuple(slice(s.start + lo, s.stop + lo) for s, lo in zip(box, low, strict=True))]
            except OSError as error:
                raise StoreError(f"{name} cannot be read: {str(error).splitlines()[0]}; the file is damaged") from None
            return np.asarray(values, dtype=np.float32)

        c = dataset.chunks
        return LazyField(read, part.shape, c, (low[0] % c[0], low[1] % c[1], low[2] % c[2]))

    columns = json.loads(h5["tiles/sums"].attrs["columns"])
    rows = [Totals.of_row(columns, row) for row in h5["tiles/sums"][()].tolist()]
    kind = str(h5.attrs["conserve"])
    correction = Correction(None if kind == "none" else kind, float(h5.attrs["scale"]), float(h5.attrs["shift"]))
    info = {**json.loads(bytes(h5["provenance"][()])), "region": region}
    mean = field("mean")
    if mean is None:
        raise KeyError("dataset 'mean' is missing")
    return Density(
        part,
        structure,
        mean,
        field("aleatoric"),
        field("epistemic"),
        totals=Totals.merged(rows),
        errors=h5["tiles/errors"][()] if "errors" in h5["tiles"] else None,
        correction=correction,
        info=info,
        close=h5.close,
    )


def verify(path: str | Path) -> list[int]:
    """Numbers of the tiles whose values do not match their checksums; empty for a whole file."""
    with _open_h5(Path(path)) as h5:
        bad = []
        names = [name for name in NAMES if name in h5]
        for i, (start, stop) in enumerate(zip(h5["tiles/start"][()], h5["tiles/stop"][()], strict=True)):
            box = tuple(slice(int(a), int(b)) for a, b in zip(start, stop, strict=True))
            try:
                found = [zlib.crc32(np.ascontiguousarray(h5[name][box]).data) for name in names]
            except OSError:
                found = []
            if found != h5["tiles/crc32"][i].tolist():
                bad.append(i)
        return bad
