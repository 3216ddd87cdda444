"""From one density file to another, whole or in part, or to a file of atoms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from gpurho.density import Density
from gpurho.errors import OutputExistsError, SettingsError
from gpurho.formats import holds_atoms, kind_of
from gpurho.refinement import refined
from gpurho.views import coarsened, part_of, watched

CHGCAR_NOTE = "a CHGCAR of gpurho has no PAW augmentation occupancies: for pictures and analysis, not for ICHARG = 11"


def blocks_of(text: str) -> tuple[int, ...]:
    """The points of a block from "4" or "4x4x2".

    Raises
    ------
    SettingsError
        For other words; numbers are looked at by `gpurho.views.coarsened`.
    """
    try:
        parts = tuple(int(part) for part in text.split("x"))
    except ValueError:
        parts = ()
    if len(parts) not in (1, 3):
        raise SettingsError(f"coarse {text!r} does not say the points of a block; give e.g. 4 or 4x4x2 (--coarse 4)")
    return parts * 3 if len(parts) == 1 else parts


def convert(
    source: str | Path,
    target: str | Path,
    field: str = "mean",
    overwrite: bool = False,
    *,
    region: Sequence[Sequence[int]] | None = None,
    coarse: int | Sequence[int] | None = None,
    spacing: float | None = None,
    progress: bool = False,
) -> Path:
    """Write the density of `source` to `target`; their names say the formats.

    A field in HDF5 or vti is read and written block by block, so that it never needs room in memory.

    Parameters
    ----------
    source, target : path
        ``*.h5``, ``*.cube``, ``*CHGCAR*`` (also ``*.vasp``), ``*.xsf``, ``*.dens`` or ``*.vti``. A target ``*.xyz``
        (extended xyz), ``*.dump`` or ``*.lammpstrj`` (LAMMPS) takes the atoms with their electrons, sigmas and volumes.
    field : str
        "mean", "aleatoric", "epistemic" or "std"; HDF5 and vti take all that there are, and have to be given "mean".
    overwrite : bool
        Replace `target` where it exists.
    region : ((i0, i1), (j0, j1), (k0, k1)), optional
        Only this box of grid points, stops exclusive.
    coarse : int or 3 ints, optional
        Means over blocks of so many points along each axis, after `region`.
    spacing : float, angstrom, optional
        Interpolate on a finer grid of the whole cell; see `gpurho.refinement.refined`.
    progress : bool
        A progress bar, if standard error is a terminal.

    Returns
    -------
    Path
        `target`.

    Raises
    ------
    FormatError, StoreError
        For files that cannot be read or written.
    OutputExistsError
        When `target` exists and `overwrite` is False.
    GridError, SettingsError
        For a region or blocks that do not go with the grid, or with the target's format.
    """
    path = Path(target)
    kind, atoms = kind_of(path), holds_atoms(path)
    if atoms and not (region is None and coarse is None and spacing is None):
        raise SettingsError(f"{path} is to hold sums over the whole field; leave out region, coarse and spacing")
    if coarse is not None and spacing is not None:
        raise SettingsError("coarse and spacing exclude each other; give one of them")
    if field != "mean" and (atoms or kind in ("hdf5", "vti")):
        raise SettingsError(f"{path} takes all fields that there are; leave out field={field!r} (--field {field})")
    if path.exists() and not overwrite:
        raise OutputExistsError(f"{path} exists; give another name, or overwrite=True (--overwrite) to replace it")
    with Density.open(source) as density:
        view = density if region is None else part_of(density, region)
        if coarse is not None:
            view = coarsened(view, coarse)
        if spacing is not None:
            view = refined(view, spacing=spacing)
        if atoms or not view.has_field:
            return view.write(path, field)
        n_fields = len(view.raw_fields()) if kind in ("hdf5", "vti") else 2 if field == "std" else 1
        total = n_fields * math.prod(view.shape)
        with tqdm(
            total=total,
            desc="convert",
            unit=" values",
            unit_scale=True,
            leave=False,
            disable=None if progress else True,
        ) as bar:
            return watched(view, lambda n: (bar.update(n), None)[1]).write(path, field)
