"""From one density file to another."""

from __future__ import annotations

from pathlib import Path

from gpurho.density import Density
from gpurho.errors import OutputExistsError


def convert(source: str | Path, target: str | Path, field: str = "mean", overwrite: bool = False) -> Path:
    """Write the density of `source` to `target`; their names say the formats.

    Parameters
    ----------
    source, target : path
        ``*.h5``, ``*.cube``, or ``*CHGCAR*`` (also ``*.vasp``).
    field : str
        "mean", "aleatoric", "epistemic" or "std"; HDF5 takes all that there are.
    overwrite : bool
        Replace `target` where it exists.

    Raises
    ------
    FormatError, StoreError
        For files that cannot be read or written.
    OutputExistsError
        When `target` exists and `overwrite` is False.
    """
    path = Path(target)
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; give another name, or overwrite=True (--overwrite) to replace it")
    with Density.open(source) as density:
        return density.write(path, field)
