"""The journal of an unfinished output file: which of its bytes are whole, and the lock that keeps writers apart.

HDF5 keeps its index in memory and writes it when it pleases, so a file whose writer was killed may be unreadable. The
bytes of the chunks are in it nevertheless. The journal has one line for each finished tile: where its chunks lie,
their checksums and the sums over the tile. A line counts only if its own checksum holds, so a torn last line is
nothing but a tile to compute again.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from gpurho.errors import StoreError
from gpurho.versions import check_version


class _Appended:
    """A file that only grows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def sync(self) -> None:
        """Force the records to the disk."""
        os.fsync(self._file)

    def close(self) -> None:
        """Close the file; the records stay."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1


class Journal(_Appended):
    """Append-only lines of JSON, each with its CRC-32."""

    def append(self, record: dict[str, Any]) -> None:
        """Add one record; it survives the death of this process, and with `sync` that of the machine."""
        line = encode_line(record)
        if os.write(self._file, line) != len(line):
            raise OSError("the journal's line was written in part")


class Blobs(_Appended):
    """Append-only binary records beside a journal, which says where each lies: what is too long for its lines."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._end = os.fstat(self._file).st_size

    def append(self, data: bytes) -> list[int]:
        """Add a record; returns offset, size and CRC-32 for the journal."""
        if os.write(self._file, data) != len(data):
            raise OSError("a record was written in part")
        place = [self._end, len(data), zlib.crc32(data)]
        self._end += len(data)
        return place


def blobs_path(journal: Path) -> Path:
    """Name of the binary records of a journal: ``rho.h5.sums`` beside ``rho.h5.journal``."""
    return journal.with_name(journal.name.replace(".journal", ".sums"))


def read_blob(path: Path, place: list[int]) -> bytes | None:
    """The record at a place that `Blobs.append` gave; None where it is not whole."""
    offset, size, crc = place
    try:
        with open(path, "rb") as file:
            file.seek(offset)
            data = file.read(size)
    except FileNotFoundError:
        return None
    return data if len(data) == size and zlib.crc32(data) == crc else None


def encode_line(record: dict[str, Any]) -> bytes:
    """A record as a line with its checksum."""
    text = json.dumps(record, separators=(",", ":"), allow_nan=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_journal(path: Path) -> list[dict[str, Any]]:
    """The records up to the first line that is torn; empty when there is no journal.

    Raises `StoreError` for a journal that a newer version began.
    """
    records: list[dict[str, Any]] = []
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return records
    for line in data.split(b"\n")[:-1]:
        checksum, _, text = line.partition(b" ")
        if checksum != b"%08x" % zlib.crc32(text):
            break
        records.append(json.loads(text))
    if records and isinstance(records[0], dict):
        found = records[0].get("journal", records[0].get("manifest", 1))
        check_version(found, "gpurho-journal", path, StoreError)
    return records


class Lock:
    """An exclusive lock on an output path, held by a file beside it; the system drops it when the process dies."""

    def __init__(self, path: Path, output: Path) -> None:
        import fcntl

        self.path = path
        while True:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                owner = os.read(self._file, 32).decode(errors="replace").strip() or "unknown"
                os.close(self._file)
                raise StoreError(
                    f"{output} is being written by another process (id {owner}); wait for it or give another output"
                ) from None
            # The file may have been removed between opening and locking by the process that held it.
            try:
                if os.stat(path).st_ino == os.fstat(self._file).st_ino:
                    break
            except FileNotFoundError:
                pass
            os.close(self._file)
        try:
            os.ftruncate(self._file, 0)
            os.write(self._file, f"{os.getpid()}\n".encode())
        except OSError:  # a full disk
            self.release()
            raise

    def release(self) -> None:
        """Give the lock up and remove its file."""
        if self._file >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = -1


def first_difference(wanted: dict[str, Any], found: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """Name and the two values of the first setting in which two runs differ; None when they agree."""
    plain = json.loads(json.dumps(wanted))
    for name in [*plain, *(key for key in found if key not in plain)]:
        if plain.get(name) != found.get(name):
            return name, plain.get(name), found.get(name)
    return None
