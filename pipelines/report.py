"""``gpurho report``: one HTML page about a density, for reading and for mailing."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.errors import SettingsError, StoreError

if TYPE_CHECKING:
    from gpurho.density import Density
    from gpurho.model import DensityModel

ATOMS = 12
"""Atoms in the list of those that the model is least sure about."""


def report(
    source: Density | str | Path,
    out: str | Path | None = None,
    *,
    model: str | Path | DensityModel | None = None,
    slices: int | None = None,
    atoms: int = ATOMS,
    all_points: bool = False,
    file: str | Path | None = None,
    progress: bool = True,
) -> Path:
    """Write one self-contained HTML page about a density: totals, slices, doubtful atoms, calibration, warnings.

    Parameters
    ----------
    source : Density, or path of a file that `Density.open` reads
    out : path, optional
        ``*.html``; by default beside the file that `source` names. An older report is replaced.
    model : str, path or DensityModel, optional
        The model of the prediction, where it is not a shipped one, for how far each atom is from its training data.
    slices : int, optional
        Planes along each axis, 1 to 24; by default 24, and fewer for fields of more than 5e7 points.
    atoms : int
        Length of the list of doubtful atoms, 0 to 100.
    all_points : bool
        Sum the field over the atoms even where it has over 1e8 points and no sums were kept.
    file : path, optional
        The file that a `Density` is from, to be named in the page.
    progress : bool
        A progress bar, if standard error is a terminal.

    Returns
    -------
    Path
        The page, which needs no other file. At most about 6 MB, whatever the size of the field, of which only the
        planes that are shown (and, for the sums of atoms, blocks one by one) are read.

    Raises
    ------
    StoreError
        For a density that is missing or unfinished, or a page that cannot be written.
    SettingsError, FormatError, ModelError
    """
    from gpurho.density import Density
    from gpurho.pipelines.reportgather import gather
    from gpurho.pipelines.reporthtml import page
    from gpurho.pipelines.reportslices import slice_count

    path = None if isinstance(source, Density) else Path(source)
    if out is None and path is None:
        raise SettingsError("a report of a density in memory needs a name; give out='report.html'")
    target = check_report_name(out if out is not None else (path or Path()).with_suffix(".html"))
    if not 0 <= int(atoms) <= 100:
        raise SettingsError(f"a list of {atoms!r} atoms cannot be shown; give 0 to 100")
    slice_count(1, slices)  # raises before any work
    if path is not None and path.suffix == ".part":
        raise StoreError(f"{path} is unfinished; run the predict command that began it again to complete it")
    density = source if isinstance(source, Density) else Density.open(source)
    try:
        named = path if file is None else Path(file)
        text = page(gather(density, named, model, slices, int(atoms), all_points, progress))
    finally:
        if path is not None:
            density.close()
    return _write(target, text)


def check_report_name(path: str | Path) -> Path:
    """A name that a report can be written to; raises `SettingsError` or `StoreError` for any other."""
    target = Path(path)
    if target.suffix.lower() not in (".html", ".htm"):
        raise SettingsError(f"{target}: a report is a page; give a name that ends in .html")
    if not target.parent.is_dir():
        raise StoreError(f"folder {str(target.parent)!r} does not exist; make it first")
    return target


def _write(target: Path, text: str) -> Path:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError as error:
        raise StoreError(f"{target} cannot be written: {error.strerror}; give another name") from None
    finally:
        temporary.unlink(missing_ok=True)
    return target


def add_parser(commands: argparse._SubParsersAction[Any]) -> None:
    """Add ``gpurho report``."""
    parser = commands.add_parser("report", help="one HTML page about a density: totals, slices, doubts, calibration")
    parser.add_argument("source", type=Path, help="*.h5 of gpurho predict; or *.cube, CHGCAR, *.xsf, *.dens, *.vti")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (default: beside the source, *.html)")
    parser.add_argument("--model", help="the model of the prediction, where it is not a shipped one")
    parser.add_argument("--slices", type=int, metavar="N", help="planes along each axis, 1 to 24")
    parser.add_argument("--atoms", type=int, default=ATOMS, metavar="N", help="length of the list of doubtful atoms")
    parser.add_argument("--all-points", action="store_true", help="sum over the atoms even over 1e8 points")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho report``."""
    target = report(
        options.source,
        options.out,
        model=options.model,
        slices=options.slices,
        atoms=options.atoms,
        all_points=options.all_points,
        progress=not options.quiet,
    )
    print(f"wrote {target}, {target.stat().st_size / 2**20:.1f} MiB")


__all__ = ["add_parser", "check_report_name", "report", "run"]
