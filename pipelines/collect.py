"""A data set out of densities that are there already: ``gpurho collect run*/CHGCAR --out data.h5``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.errors import OutputExistsError, SettingsError, StoreError

if TYPE_CHECKING:
    from gpurho.datasets import Dataset, Snapshot


def collect(
    files: Sequence[str | Path],
    out: str | Path,
    *,
    temperatures: Sequence[float] | None = None,
    family: str | None = None,
    electrons: float | None = None,
    unit: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Dataset:
    """Density files of any code as one data set to train on.

    Parameters
    ----------
    files : sequence of paths
        CHGCAR, cube, xsf, SPARC's ``.dens``, vti or HDF5, one snapshot each; whole periodic cells.
    out : path
        HDF5 data set; written whole or not at all.
    temperatures : sequence of float, K, optional
        One for all files, or one for each; held-out snapshots are then drawn from each temperature.
    family : str, optional
        A name that the snapshots share, in tables and splits.
    electrons : float, optional
        Valence electrons of each cell; by default each file's integral, which must then be whole to 0.01.
    unit : str, optional
        See `gpurho.formats.read_density`.
    overwrite, progress : bool

    Returns
    -------
    Dataset

    Raises
    ------
    FormatError
        For a file that cannot be read; nothing is written then.
    SettingsError
        For no files, one file given twice, or temperatures that do not match.
    OutputExistsError, StoreError, DatasetError

    Notes
    -----
    One file is in memory at a time. Densities of VASP are those of its PAW method without the one-centre terms: smooth
    and trainable, not the density of norm-conserving pseudopotentials; do not mix them with others in one model.
    """
    from gpurho.datasets import write_dataset

    paths, target = [Path(file) for file in files], Path(out)
    if not paths:
        raise SettingsError("no density files; give one or more")
    same = {path.resolve(): path for path in paths}
    if len(same) < len(paths):
        raise SettingsError(f"{len(paths) - len(same)} of {len(paths)} files are given twice; give each once")
    given = list(temperatures or [])
    if given and len(given) not in (1, len(paths)):
        raise SettingsError(f"{len(given)} temperatures for {len(paths)} files; give one, or one for each file")
    if bad := [t for t in given if not 0 <= t < 1e6]:
        raise SettingsError(f"temperature {bad[0]!r} K cannot be; give 0 or more")
    if target.exists() and not overwrite:
        raise OutputExistsError(f"{target} is there; give another name, or overwrite=True (--overwrite)")
    if not target.parent.is_dir():
        raise StoreError(f"folder {str(target.parent)!r} does not exist; make it first")
    per_file: list[float | None] = [*(given * len(paths) if len(given) == 1 else given)] or [None] * len(paths)
    return write_dataset(target, _snapshots(paths, per_file, family, electrons, unit, progress))


def _snapshots(
    paths: Sequence[Path],
    temperatures: Sequence[float | None],
    family: str | None,
    electrons: float | None,
    unit: str | None,
    progress: bool,
) -> Iterator[Snapshot]:
    """The snapshots one after the other, so that one is in memory."""
    from tqdm import tqdm

    from gpurho.formats import snapshot_from_density_file

    common: dict[str, Any] = {} if family is None else {"family": family}
    for path, kelvin in zip(tqdm(paths, desc="collect", disable=None if progress else True), temperatures, strict=True):
        meta = common if kelvin is None else {**common, "temperature_K": float(kelvin)}
        yield snapshot_from_density_file(path, electrons, unit=unit, **meta)


def add_parser(commands: Any) -> None:
    """The command ``gpurho collect``."""
    parser = commands.add_parser("collect", help="a data set out of CHGCAR, cube, .dens and other density files")
    parser.add_argument("files", type=Path, nargs="+", help="*.cube, CHGCAR, *.xsf, *.dens, *.vti or *.h5")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="HDF5 data set")
    parser.add_argument(
        "--temperature", type=float, nargs="+", metavar="K", help="of the snapshots: one for all, or one for each"
    )
    parser.add_argument("--family", metavar="NAME", help="a name that the snapshots share")
    parser.add_argument("--electrons", type=float, metavar="N", help="valence electrons (the integral of each file)")
    parser.add_argument("--unit", help="e/bohr^3 or e/angstrom^3, of cube and xsf files")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at --out")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho collect``."""
    import json

    data = collect(
        options.files,
        options.out,
        temperatures=options.temperature,
        family=options.family,
        electrons=options.electrons,
        unit=options.unit,
        overwrite=options.overwrite,
        progress=not options.quiet and sys.stderr.isatty(),
    )
    rows = [(snapshot.structure.to_ase().get_chemical_formula(), snapshot) for snapshot in data]
    if options.json:
        found = [
            {"formula": formula, "electrons": s.electrons, "shape": list(s.density.shape), **s.meta}
            for formula, s in rows
        ]
        print(json.dumps({"file": str(options.out), "snapshots": found}))
        return
    for formula, s in rows:
        print(
            f"{formula:12s} {s.electrons:8g} electrons  {' x '.join(map(str, s.density.shape)):15s} {s.meta['source']}"
        )
    print(f"wrote {options.out}: {len(data)} snapshots")
