"""Recorded output of the program SPARC."""

from __future__ import annotations

import lzma
import shutil
from pathlib import Path

import numpy as np

from gpurho.units import BOHR

DATA = Path(__file__).parent / "data" / "sparc"
AL_CELL = np.eye(3) * 15.2 * BOHR


def unpack(folder: Path) -> Path:
    """The recorded files, unpacked into a folder."""
    for path in DATA.iterdir():
        if path.suffix == ".xz":
            (folder / path.stem).write_bytes(lzma.decompress(path.read_bytes()))
        else:
            shutil.copy(path, folder / path.name)
    return folder
