"""Energies that take minutes each: kept the moment they are known, found again by what decides them.

The file is a journal (`gpurho.journal`): a line for each energy, with a checksum. A last line that is torn is nothing
but an energy to compute again.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from gpurho.errors import StoreError
from gpurho.journal import Journal, Lock, encode_line, read_journal
from gpurho.labelstore import sync_folder
from gpurho.versions import NEWEST

HEAD = {"journal": NEWEST["gpurho-journal"], "holds": "free energies, eV"}
"""The first line."""


class EnergyJournal:
    """Free energies by key; a context manager that keeps other runs out.

    Parameters
    ----------
    path : path
        Made where it does not exist; its folder too, where that alone is missing.

    Raises
    ------
    StoreError
        Where the file is of another kind, a newer version or damaged, cannot be written, or another run writes it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._found: dict[str, float] = {}
        self._lock: Lock | None = None
        self._journal: Journal | None = None

    def __enter__(self) -> EnergyJournal:
        if self.path.suffix in (".h5", ".hdf5"):
            raise StoreError(f"{self.path} would hold lines of text, no HDF5; give a name like {self.path.stem}.eos")
        try:
            self.path.parent.mkdir(exist_ok=True)
            self._lock = Lock(self.path.with_name(self.path.name + ".lock"), self.path)
            self._open()
        except OSError as error:
            self._close()
            raise StoreError(f"{self.path} cannot be used ({error.strerror}); nothing was computed") from None
        except BaseException:
            self._close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def __len__(self) -> int:
        return len(self._found)

    def make(self, key: str, compute: Callable[[], float], **about: Any) -> float:
        """The energy of a key, eV: the one kept, or what `compute` gives, which is then kept, with words `about` it.

        Raises
        ------
        StoreError
            Where it cannot be written; those before are safe.
        """
        if key in self._found:
            return self._found[key]
        value = float(compute())
        assert self._journal is not None
        if math.isfinite(value):  # else it is no energy, as who asked for it will say
            try:
                self._journal.append({"key": key, "free_energy": value, **about})
                self._journal.sync()
            except OSError as error:
                raise StoreError(
                    f"{self.path} cannot be written ({error.strerror or error}); {len(self)} energies are safe in it:"
                    " make room and run the same command again"
                ) from None
            self._found[key] = value
        return value

    def _open(self) -> None:
        other = StoreError(f"{self.path} is no file of kept energies; give another name, or move that file away")
        data = self.path.read_bytes() if self.path.exists() else b""
        try:
            records = read_journal(self.path)
            if records and records[0]["holds"] != HEAD["holds"]:
                raise other
            found = {str(record["key"]): float(record["free_energy"]) for record in records[1:]}
        except (ValueError, KeyError, TypeError):
            raise other from None
        if not records and not encode_line(HEAD).startswith(data):
            raise other
        whole = sum(len(line) + 1 for line in data.split(b"\n")[: len(records)])
        if whole < len(data):  # what is added to a torn line would be lost with it
            os.truncate(self.path, whole)
        self._journal = Journal(self.path)
        if not records:
            self._journal.append(HEAD)
            self._journal.sync()
            sync_folder(self.path.absolute().parent)
        self._found = found

    def _close(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        if self._lock is not None:
            self._lock.release()
            self._lock = None


__all__ = ["HEAD", "EnergyJournal"]
