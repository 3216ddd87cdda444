"""Errors of gpurho: one family, so that ``except GpurhoError`` catches every refusal and nothing else.

Every message is one line that names the value received and the remedy.
"""

from __future__ import annotations

import zipfile
import zlib

REASON_LENGTH = 200
"""Most characters of another library's message, or of a file's text, that a message of ours takes over."""

MESSAGE_LENGTH = 900


def reason_of(error: BaseException) -> str:
    """What another library's error says, as a part of one line: printable, and no longer than `REASON_LENGTH`."""
    text = " ".join((str(error) or type(error).__name__)[: 4 * REASON_LENGTH].split()) or type(error).__name__
    plain = "".join(c if c.isprintable() else "?" for c in text)
    return plain if len(plain) <= REASON_LENGTH else plain[: REASON_LENGTH - 3] + "..."


def one_line(text: str) -> str:
    """A message in one printable line; of a longer one the middle is left out, since the remedy stands at its end."""
    line = " ".join(text.split()) if "\n" in text or "\r" in text else text
    if not line.isprintable():
        line = "".join(c if c.isprintable() else "?" for c in line)
    if len(line) <= MESSAGE_LENGTH:
        return line
    return line[: 2 * MESSAGE_LENGTH // 3] + " ... " + line[-MESSAGE_LENGTH // 3 :]


DAMAGED_ARCHIVE = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    TypeError,
    NotImplementedError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy raises for a damaged ``.npz``; `NotImplementedError` where its bytes name a compression that none has."""


class GpurhoError(Exception):
    """Base of every error that gpurho raises on purpose.

    Whatever a file or a caller put into the message, it is one line of at most about `MESSAGE_LENGTH` characters.
    """

    def __init__(self, *parts: object) -> None:
        super().__init__(*(one_line(part) if isinstance(part, str) else part for part in parts))


class StructureError(GpurhoError, ValueError):
    """The atoms cannot be used: not finite, overlapping, no atoms, or a cell without volume."""


class UnknownSpeciesError(GpurhoError, ValueError):
    """The structure has species that the model or the descriptor specification does not know."""


class GridError(GpurhoError, ValueError):
    """A grid, spacing, region or tile shape that cannot be used."""


class SettingsError(GpurhoError, ValueError):
    """A setting has a value outside its range, or two settings exclude each other."""


class NeighborOverflowError(GpurhoError, RuntimeError):
    """A neighbour list met its capacity, so that neighbours would have been lost."""


class HaloTooSmallError(GpurhoError, RuntimeError):
    """The atoms that a worker has around a tile do not reach as far as what is computed there looks."""


class DeviceError(GpurhoError, RuntimeError):
    """The device that was asked for is not there, or has too little memory."""


class MissingDependencyError(GpurhoError, ImportError):
    """An optional package is needed; the message says which extra to install."""


class ModelError(GpurhoError, ValueError):
    """A model file is damaged, of a newer format, or does not fit its specification."""


class DatasetError(GpurhoError, ValueError):
    """A training data set is damaged, empty or of the wrong kind."""


class EngineError(GpurhoError, RuntimeError):
    """A DFT engine is missing, failed, or cannot do what was asked."""


class ConvergenceError(EngineError):
    """A DFT calculation did not reach self-consistency."""


class FormatError(GpurhoError, ValueError):
    """A file could not be read or written in the format asked for."""


class StoreError(GpurhoError, RuntimeError):
    """The output file cannot be written, or is damaged; the message says what is safe."""


class OutputExistsError(StoreError):
    """The output file exists and was made with other settings."""
