"""Fields that lie in several files: the shards of a prediction that many workers made, read as one.

The output of such a prediction holds virtual data sets, so that any HDF5 reader finds the fields in it; the values lie
in shards, in a folder beside it. HDF5 gives fill values for a shard that is missing, looks for it in other places too,
and opens whatever a file tells it to. So this library reads the shards itself, by the table in the group ``shards``:

- ``heaps``: see `heaps_of`.
- ``names``: path of each shard, from the output's folder; ``start``, ``stop``: its box of grid points; ``origin``: the
  grid point of its first element. The attribute ``digest`` is that of the settings and stands in each shard too.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import zlib
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.checksums import get, get_text
from gpurho.errors import StoreError
from gpurho.fields import NAMES, Box
from gpurho.versions import check_version

SHARD_FORMAT = "gpurho-shard"
HEAP = b"GCOL\x01\0\0\0"
"""How a global heap of HDF5 begins; its size follows in eight bytes."""

OPEN_SHARDS = 16
"""Shards that are held open: neighbouring reads mostly need the same ones."""


def settings_digest(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the settings of a prediction; what ties shards to their output."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def is_sharded(h5: Any) -> bool:
    """Whether an open file's fields lie in shards."""
    return "shards" in h5


def heaps_of(path: Path) -> NDArray[np.uint64]:
    """Offset, size and CRC-32 of each heap of a flushed file: where HDF5 keeps, unchecked, what virtual data sets are.

    A file that was changed there could make HDF5 crash, so that it must not even look at them.
    """
    found = []
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        at = data.find(HEAP)
        while at >= 0:
            size = int.from_bytes(data[at + len(HEAP) : at + len(HEAP) + 8], "little")
            if size <= len(data) - at:  # else it only looks like one
                found.append((at, size, zlib.crc32(data[at : at + size])))
            at = data.find(HEAP, at + len(HEAP))
    return np.array(found, dtype=np.uint64).reshape(-1, 3)


def check_heaps(h5: Any, path: Path) -> None:
    """Raise `StoreError` where the heaps of a file whose fields lie in shards are not as `heaps_of` found them."""
    if not is_sharded(h5) or "heaps" not in h5["shards"]:
        return
    with open(path, "rb") as file:
        for offset, size, crc in get(h5["shards"], "heaps").tolist():
            file.seek(offset)
            if zlib.crc32(file.read(size)) != crc:
                raise StoreError(
                    f"{path} is damaged: its virtual data sets do not match their checksum; take an undamaged copy"
                )


def refuse_external(h5: Any, path: Path) -> None:
    """Raise `StoreError` where a file would read other files, but for the shards in folders beside it.

    A file from a stranger could name any file of the reader's as a source, and so bring it into what the reader shows.
    """
    import h5py

    links: list[tuple[str, Any]] = []
    # An exception must not leave the library's own loop; what is found is looked at afterwards.
    h5.visititems_links(lambda name, link: links.append((name, link)))
    for name, link in links:
        if isinstance(link, h5py.ExternalLink):
            raise StoreError(f"{path}: {name} is a link to another file, {link.filename!r}; it is not read")
        item = h5.get(name)
        if not isinstance(item, h5py.Dataset):
            continue
        if item.external:
            raise StoreError(f"{path}: {name} lies in another file, {item.external[0][0]!r}; it is not read")
        if item.is_virtual:
            if name not in NAMES or not is_sharded(h5):
                raise StoreError(f"{path}: {name} is a virtual data set without a table of shards; it is not read")
            for source in item.virtual_sources():
                inside(path, source.file_name.replace("%%", "%"))


def inside(path: Path, name: str) -> Path:
    """The shard `name` of the output `path`; raises `StoreError` where it is not in a folder beside the output."""
    parts = PurePosixPath(name).parts
    shard = path.parent.joinpath(*parts)
    if name.startswith("/") or ".." in parts or not parts or "\x00" in name:
        raise StoreError(f"{path} names the source {name!r}, which is not in its own folder; it is not read")
    if not shard.resolve().is_relative_to(path.parent.resolve()):
        raise StoreError(f"{path} names the source {name!r}, which leads out of its own folder; it is not read")
    return shard


class ShardedFields:
    """Boxes of the fields of a sharded output.

    Parameters
    ----------
    path : Path
        The output.
    group : h5py.Group
        Its table of shards.

    Raises
    ------
    StoreError
        Where a shard is missing, lies elsewhere, or belongs to another prediction; the message names it.
    """

    def __init__(self, path: Path, group: Any) -> None:
        self._path = path
        self._digest = get_text(group, "digest")
        names = [bytes(name).decode() for name in get(group, "names")]
        self._files = [inside(path, name) for name in names]
        self._start, self._stop, self._origin = (get(group, name) for name in ("start", "stop", "origin"))
        if not len(names) == len(self._start) == len(self._stop) == len(self._origin):
            raise StoreError(f"{path} is damaged: its table of shards has columns of several lengths")
        missing = [file for file in self._files if not file.is_file()]
        if missing:
            raise StoreError(
                f"shard {missing[0]} of {path} is missing ({len(missing)} of {len(names)} are);"
                f" move the folder {names[0].split('/')[0]} along with the file, or predict again"
            )
        self._open: OrderedDict[int, Any] = OrderedDict()

    def read(self, name: str, box: Box) -> NDArray[np.float32]:
        """A box (unit steps, in points of the whole grid) of the field `name`; NaN where no shard has it."""
        low, high = (np.array([getattr(s, end) for s in box]) for end in ("start", "stop"))
        values = np.full(high - low, np.nan, dtype=np.float32)
        if values.size == 0:
            return values
        for i in np.flatnonzero(((self._start < high) & (self._stop > low)).all(axis=1)):
            a, b = np.maximum(self._start[i], low), np.minimum(self._stop[i], high)
            source = tuple(slice(int(p), int(q)) for p, q in zip(a - self._origin[i], b - self._origin[i], strict=True))
            target = tuple(slice(int(p), int(q)) for p, q in zip(a - low, b - low, strict=True))
            try:
                values[target] = self._shard(int(i))[name][source]
            except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
                reason = str(error).splitlines()[0]
                raise StoreError(f"shard {self._files[i]} of {self._path} cannot be read: {reason}") from None
        return values

    def _shard(self, i: int) -> Any:
        if i not in self._open:
            self._open[i] = open_shard(self._files[i], self._digest)
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(i)
        return self._open[i]

    def close(self) -> None:
        """Close the shards."""
        while self._open:
            self._open.popitem()[1].close()


def open_shard(file: Path, digest: str) -> Any:
    """A finished shard, open for reading; raises `StoreError` where it is none of the prediction with this digest."""
    import h5py

    try:
        h5 = h5py.File(file, "r", rdcc_nbytes=16 << 20)
    except FileNotFoundError:
        raise StoreError(f"shard {file} is missing; move it back, or predict again") from None
    except OSError as error:
        raise StoreError(f"shard {file} cannot be read as HDF5: {str(error).splitlines()[0]}") from None
    try:
        own = all(
            isinstance(h5.get(name, getlink=True), h5py.HardLink) and not h5[name].is_virtual and not h5[name].external
            for name in NAMES
            if name in h5
        )
        own &= get_text(h5, "format", "") == SHARD_FORMAT and get_text(h5, "digest", "") == digest
        if own:
            check_version(h5.attrs.get("format_version", 1), SHARD_FORMAT, file, StoreError)
    except StoreError:
        h5.close()
        raise
    except (OSError, KeyError, RuntimeError, ValueError, TypeError) as error:
        h5.close()
        raise StoreError(f"shard {file} is damaged: {' '.join(str(error).split())}; predict again") from None
    if not own:
        h5.close()
        raise StoreError(f"shard {file} belongs to another prediction; move the right one back, or predict again")
    return h5
