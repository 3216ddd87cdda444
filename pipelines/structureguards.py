"""What is looked at before ASE reads a file of atoms: packed files that are bombs, and counts that no file holds."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from gpurho.errors import StructureError

PACKED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""Endings that ASE unpacks."""

MAX_RATIO = 100
"""Largest unpacked size, in packed sizes: text of atoms packs to a third or a tenth."""

FREE_BYTES = 16 << 20
"""Unpacked size that is always allowed."""

LINE_BYTES = 1 << 20
"""Longest line of a file of atoms."""

MAX_COLUMNS = 10_000
"""Values of one property of an atom; a count beyond it is held to the size of the file, as that of atoms."""

_ENDLESS = 10**40
_PROPERTIES = re.compile(rb"[Pp]roperties\s?=\s?\"?([^\s\"]{1,4096})")
_ATOMS = re.compile(rb"^\s*(\d{1,30})\s+atoms\b")


def opened(path: Path) -> IO[bytes]:
    """A file for reading, unpacked where its name says that it is packed."""
    file: IO[bytes] = PACKED.get(path.suffix.lower(), open)(path, "rb")
    return file


def unpacked_size(path: Path) -> int:
    """Bytes of a file, unpacked; raises `StructureError` for one that unpacks to far more than text can."""
    packed = path.stat().st_size
    if path.suffix.lower() not in PACKED:
        return packed
    limit, size = MAX_RATIO * packed + FREE_BYTES, 0
    with opened(path) as file:
        while part := file.read(1 << 20):
            size += len(part)
            if size > limit:
                raise StructureError(
                    f"structure file {path} unpacks from {packed} to over {limit} bytes, which no text of atoms does;"
                    " unpack it yourself if you trust it"
                )
    return size


def refuse_counts(path: Path, kind: str) -> None:
    """Raise `StructureError` where a file of ASE's format `kind` names more atoms than it has bytes.

    ASE makes room for, or looks for, as many as are named.
    """
    size = unpacked_size(path)
    if kind not in _COUNTS:
        return
    with opened(path) as file:
        for count in _COUNTS[kind](file):
            if count > size:
                raise StructureError(
                    f"structure file {path} names {count:.3g} atoms or columns and has {size} bytes;"
                    " the file is damaged"
                )
            if count < 0:
                raise StructureError(f"structure file {path} names {count} atoms; the file is damaged")


def _lines(file: IO[bytes]) -> Iterator[bytes]:
    while line := file.readline(LINE_BYTES):
        yield line


def _whole(words: list[bytes]) -> list[int]:
    try:
        return [int(word) for word in words if len(word) < 40]
    except ValueError:
        return []


def _xyz(file: IO[bytes]) -> Iterator[int]:
    """The count of each frame; what is no count is for the reader to tell."""
    lines = _lines(file)
    for line in lines:
        found = _whole(line.split()[:1])
        if line.lstrip().startswith(b"VEC"):
            continue
        if not found:
            return
        yield found[0]
        comment = next(lines, b"")
        # Columns of the properties of an atom, each with its number of values.
        for text in _PROPERTIES.findall(comment):
            yield from (n for n in _whole([w for w in text.split(b":") if w.isdigit()]) if n > MAX_COLUMNS)
            if any(len(word) >= 40 for word in text.split(b":") if word.isdigit()):
                yield _ENDLESS
        for _ in range(found[0]):
            if next(lines, None) is None:
                return


def _poscar(file: IO[bytes]) -> Iterator[int]:
    for number, line in zip(range(7), _lines(file), strict=False):
        if number >= 5:
            yield sum(_whole(line.split()))


def _data(file: IO[bytes]) -> Iterator[int]:
    for _, line in zip(range(200), _lines(file), strict=False):
        if found := _ATOMS.match(line):
            yield int(found.group(1))


def _dump(file: IO[bytes]) -> Iterator[int]:
    lines = _lines(file)
    for line in lines:
        if line.startswith(b"ITEM: NUMBER OF ATOMS"):
            yield from _whole(next(lines, b"").split()[:1])


_COUNTS: dict[str, Callable[[IO[bytes]], Iterator[int]]] = {
    "extxyz": _xyz,
    "xyz": _xyz,
    "vasp": _poscar,
    "lammps-data": _data,
    "lammps-dump-text": _dump,
}
