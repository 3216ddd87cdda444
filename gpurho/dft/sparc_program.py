"""The program of SPARC: where it is, where its pseudopotentials are, how it is run and what it says when it fails."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path

from gpurho.errors import EngineError, MissingDependencyError, UnknownSpeciesError

REMEDY = (
    "build it from github.com/SPARC-X/SPARC (or: conda install -c conda-forge sparc-x) and put it on the PATH, or set"
    " GPURHO_SPARC"
)


def find_sparc(command: str | None = None) -> list[str]:
    """The words that start SPARC: `command`, $GPURHO_SPARC, or ``sparc`` on the PATH.

    Raises
    ------
    MissingDependencyError
        Where its first word is no program.
    """
    words = shlex.split(command or os.environ.get("GPURHO_SPARC") or "sparc")
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise MissingDependencyError(f"the program {' '.join(words)!r} is not there; {REMEDY}")
    # Runs take place in folders of their own, where a relative path means something else.
    return [os.path.abspath(found), *(os.path.abspath(w) if os.path.isfile(w) else w for w in words[1:])]


class Pseudos:
    """The psp8 files of the user's: a folder of them, or one for each symbol."""

    def __init__(self, given: str | os.PathLike[str] | Mapping[str, str | os.PathLike[str]] | None) -> None:
        self._files: dict[str, Path] = {}
        self._folder: Path | None = None
        if isinstance(given, Mapping):
            self._files = {symbol: Path(path) for symbol, path in given.items()}
            for symbol, path in self._files.items():
                if not path.is_file():
                    raise EngineError(f"the psp8 file of {symbol}, {path}, is not there; check the name")
            return
        name = given or os.environ.get("SPARC_PSP_PATH")
        if not name:
            raise EngineError(
                "no pseudopotentials for SPARC; pass pseudos= (a folder of psp8 files, as of"
                " github.com/SPARC-X/SPMS-psps), or set SPARC_PSP_PATH"
            )
        self._folder = Path(name)
        if not self._folder.is_dir():
            raise EngineError(f"the folder of pseudopotentials {name} is not there; check the name")

    def file(self, symbol: str) -> Path:
        """The file of an element.

        Raises
        ------
        UnknownSpeciesError
            Where there is none.
        EngineError
            Where there are several.
        """
        if self._folder is None:
            if symbol not in self._files:
                raise UnknownSpeciesError(f"no psp8 file for {symbol}; pseudos has {', '.join(self._files) or 'none'}")
            return self._files[symbol]
        found = [p for p in sorted(self._folder.glob("*.psp8")) if symbol in re.split(r"[_.\-]", p.name)]
        if not found:
            raise UnknownSpeciesError(f"no psp8 file for {symbol} in {self._folder}; put one there, as {symbol}.psp8")
        if len(found) > 1:
            names = ", ".join(p.name for p in found)
            raise EngineError(
                f"{self._folder} has several psp8 files for {symbol} ({names}); pass pseudos= as a file for each symbol"
            )
        return found[0]


def reason(log: Path) -> str:
    """What a failed run says of itself, in one line; SPARC colours its errors."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", log.read_text(errors="replace"))
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.search(r"error|fatal|cannot", line, re.IGNORECASE)]
    return ((errors or lines or ["no output"])[-1 if not errors else 0])[:300]
