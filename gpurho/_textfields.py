"""Fields in text files: values read with their counts checked, and written many at a time."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import FormatError, GpurhoError, StoreError, reason_of
from gpurho.fields import Field, LazyField

SLAB_BYTES = 256 * 2**20
"""Most memory that one slab of a writer takes, unless one plane of points is larger."""

LINES_AT_ONCE = 1 << 15

LONGEST_NUMBER = 64
"""Characters of a word that may be a number: a longer one is a damaged file, and slow to look at."""

LARGEST = 1e150
"""Largest number that is taken: a change of unit or a product of two must not overflow."""

_NO_LETTER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+))([-+]\d{2,4})")


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Whatever goes wrong inside, as one `FormatError` of one line that names the file."""
    try:
        with np.errstate(invalid="raise", divide="raise", over="raise"):
            yield
    except FormatError:
        raise
    except GpurhoError as error:
        raise FormatError(f"{path}: {error}") from None
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror or error}; check the name") from None
    except (ValueError, IndexError, KeyError, StopIteration, ArithmeticError) as error:
        reason = reason_of(error) if str(error) else "it ends too early"
        raise FormatError(f"{path} is not a whole {kind} file: {reason}; check the file") from None


@contextmanager
def writing(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file that is written beside `path` and put in its place when it is whole; `mode` is "w" or "wb"."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror}; what was there is unchanged") from None
    finally:
        temporary.unlink(missing_ok=True)


# -- reading ----------------------------------------------------------------------------------------------------


def floats(words: list[str]) -> NDArray[np.float64]:
    """Words as numbers, those of Fortran too: ``1.0D-3``, and ``1.0-103`` where the exponent left no room for an E.

    Raises
    ------
    ValueError
        Naming the first word that is no finite number.
    """
    try:
        values = np.array(words, dtype=np.float64)
    except ValueError:
        values = np.array([_fortran(word) for word in words], dtype=np.float64)
    fine = np.abs(values) <= LARGEST
    if not fine.all():
        raise ValueError(f"{words[int(np.argmin(fine))][:40]!r} is not finite, or beyond all bounds")
    return values


def number(word: str) -> float:
    """One word as a number; see `floats`."""
    return float(floats([word])[0])


def _fortran(word: str) -> float:
    try:
        if len(word) > LONGEST_NUMBER:
            raise ValueError
        found = _NO_LETTER.fullmatch(word)
        return float("E".join(found.groups()) if found else word.replace("D", "E").replace("d", "e"))
    except ValueError:
        raise ValueError(f"{word[:40]!r} stands where a number is expected") from None


class TextReader:
    """The lines and the values of a text file, in their order.

    Parameters
    ----------
    file : text file
        Opened with universal newlines, so that files of Windows read alike.
    path : path
        For messages.
    """

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file, self.path = file, path
        self._back: list[str] = []
        self._size = os.fstat(file.fileno()).st_size

    def next(self) -> str | None:
        """The next line, or None at the end."""
        return self._back.pop() if self._back else next(self._file, None)

    def line(self) -> str:
        """The next line, which must be there."""
        line = self.next()
        if line is None:
            raise FormatError(f"{self.path} ends too early; the file is not whole")
        return line

    def filled(self, comment: str | None = None) -> str | None:
        """The next line that is neither blank nor a comment, or None at the end."""
        while (line := self.next()) is not None:
            text = line.strip()
            if text and not (comment and text.startswith(comment)):
                return text
        return None

    def push(self, line: str) -> None:
        """Give a line back, to be read again."""
        self._back.append(line)

    def row(self, n: int) -> NDArray[np.float64]:
        """The first `n` numbers of the next line."""
        words = self.line().split()[:n]
        if len(words) < n:
            raise FormatError(f"{self.path} has {len(words)} numbers in a line where {n} are expected; check the file")
        return floats(words)

    def vectors(self) -> NDArray[np.float64]:
        """The next three lines of three numbers each."""
        return np.array([self.row(3) for _ in range(3)])

    def values(self, n: int) -> NDArray[np.float32]:
        """The next `n` values, which end with a line, a few megabytes of text at a time.

        Raises
        ------
        FormatError
            Where the file ends before, where the last line goes on, or for values that are no finite numbers.
        """
        if n > self._size:
            raise FormatError(f"{self.path} names {n} values and has {self._size} bytes; the file is not whole")
        values = np.empty(n, dtype=np.float32)
        at, width, shortest = 0, 0, 0
        while at < n:
            # Half of what remains at a time, then line by line, so that nothing after the values is taken.
            count = max(1, min((n - at) // (2 * width), LINES_AT_ONCE)) if width else 1
            lines = self._back[::-1] or list(islice(self._file, count))
            self._back.clear()
            if not lines:
                raise FormatError(f"{self.path} ends after {at} of {n} values; the file is not whole")
            words = " ".join(lines).split()
            width = max(width, -(-len(words) // len(lines)))
            if len(words) > n - at:
                raise FormatError(f"{self.path} has more than the {n} values of its grid; check its counts")
            # The file may be cut within its last value, which then looks like another number.
            shortest = min(map(len, words[:-1]), default=shortest)
            if not lines[-1].endswith("\n") and words and len(words[-1]) < shortest:
                raise FormatError(f"{self.path} ends within a value, {words[-1][:40]!r}; the file is not whole")
            try:
                part = floats(words)
            except ValueError as error:
                raise FormatError(f"{self.path} after {at} of {n} values: {error}; the file is not whole") from None
            with np.errstate(over="ignore"):
                values[at : at + len(words)] = part
            at += len(words)
        if not np.isfinite(values).all():
            raise FormatError(f"{self.path} holds values that are not finite; check the file")
        return values

    def end(self, n: int) -> None:
        """Raise `FormatError` unless nothing but blank lines is left after the `n` values."""
        line = self.filled()
        if line is not None:
            raise FormatError(
                f"{self.path} goes on with {line[:20]!r} after the {n} values of its grid; check its counts"
            )


# -- writing ----------------------------------------------------------------------------------------------------


def slabs(field: Field, axis: int) -> Iterator[NDArray[np.float32]]:
    """The field in order along `axis`, in slabs that are whole chunks where memory allows."""
    shape = field.shape
    plane = 4 * int(np.prod([n for d, n in enumerate(shape) if d != axis], dtype=np.int64))
    depth = max(1, SLAB_BYTES // plane)
    phase = 0
    if isinstance(field, LazyField):
        chunk = field.chunks[axis]
        phase = field.phase[axis] % chunk
        depth = depth // chunk * chunk if depth >= chunk else depth
    edges = [0, *range(depth - phase % depth, shape[axis], depth), shape[axis]]
    for low, high in pairwise(edges):
        yield np.asarray(field[tuple(slice(low, high) if d == axis else slice(None) for d in range(3))])


def fixed(values: NDArray[np.float64], width: int, digits: int) -> str:
    """A few numbers in fixed columns."""
    return " ".join(f"{value:{width}.{digits}f}" for value in values)


def put(file: IO[str], values: NDArray[np.float64], columns: int, form: str) -> None:
    """Numbers in lines of `columns`, formatted many at a time."""
    row = form * columns + "\n"
    whole = len(values) // columns * columns
    step = columns * LINES_AT_ONCE
    for at in range(0, whole, step):
        part = values[at : min(at + step, whole)]
        file.write(row * (len(part) // columns) % tuple(part.tolist()))
    if whole < len(values):
        file.write(form * (len(values) - whole) % tuple(values[whole:].tolist()) + "\n")


def put_rows(file: IO[str], rows: NDArray[np.float64], form: str) -> None:
    """Rows (n, length), each beginning a line of its own, six numbers a line."""
    length = rows.shape[1]
    tail = length % 6
    line = (form * 6 + "\n") * (length // 6) + (form * tail + "\n" if tail else "")
    step = max(1, 6 * LINES_AT_ONCE // length)
    for at in range(0, len(rows), step):
        part = rows[at : at + step]
        file.write(line * len(part) % tuple(part.reshape(-1).tolist()))
