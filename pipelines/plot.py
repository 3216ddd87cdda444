"""Pictures from the command line: ``gpurho plot rho.h5 slice.pdf --plane 1 1 0``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpurho.density import Density
from gpurho.errors import DatasetError, FormatError, SettingsError

PLANE = ("axis", "position", "plane", "crystal", "normal", "point", "atom", "width", "atoms_within", "contours")
LOOK = ("column", "title", "dpi")
OPTIONS = {
    "slice": (*PLANE, "fields", "limits", "same_scale", "line", *LOOK),
    "line": ("line", "reference", "bound", "atoms_within", *LOOK),
    "histogram": ("reference", "bins", *LOOK),
    "error": (*PLANE, "reference", "limit", *LOOK),
    "calibration": ("reference", *LOOK),
}
"""What goes with each kind of picture."""

_FLAGS = {"crystal": "repeats"}
NEEDS = {"line": "line", "error": "reference", "calibration": "reference"}


def add_parser(commands: Any) -> None:
    """Add ``gpurho plot`` to the command line."""
    parser = commands.add_parser("plot", help="pictures of a density: slices, lines, histograms, errors, calibration")
    add = parser.add_argument
    add("source", help="density file, or snapshot of a data set: al32.h5:14")
    add("out", type=Path, help="picture: *.png, *.pdf, *.svg or *.jpg")
    add("--kind", choices=tuple(OPTIONS), help="(slice; line where --line is given)")
    add("--axis", choices=("a", "b", "c"), help="slice: across this cell vector (c)")
    add("--position", type=float, metavar="F", help="of the plane: fraction of the cell vector, or h x + k y + l z")
    add("--plane", type=int, nargs=3, metavar=("H", "K", "L"), help="Miller indices of the plane instead")
    add("--repeats", dest="crystal", type=int, nargs=3, metavar="N", help="crystal cells in the cell, for --plane")
    add("--normal", type=float, nargs=3, metavar=("X", "Y", "Z"), help="any plane, by the vector across it")
    add("--point", type=float, nargs=3, metavar=("X", "Y", "Z"), help="in the plane, angstrom (centre of the cell)")
    add("--atom", type=int, metavar="N", help="through this atom instead, counted from 0")
    add("--width", type=float, metavar="ANGSTROM", help="edge of the part of the plane that is shown")
    add("--fields", metavar="NAMES", help="mean,aleatoric,epistemic,std")
    add("--limits", nargs=3, action="append", metavar=("FIELD", "LOW", "HIGH"), help="ends of a scale, e/angstrom^3")
    add("--limit", type=float, metavar="E", help="error: end of its scale, e/angstrom^3")
    add("--same-scale", action="store_true", default=None, help="one scale for all sigmas")
    add("--line", type=float, nargs=6, metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"), help="ends of a line, angstrom")
    add("--bound", type=float, metavar="N", help="line: half-width of the bands in sigmas (3)")
    add("--reference", metavar="FILE", help="density to compare with: a file, or al32.h5:14")
    add("--bins", type=int, metavar="N", help="histogram: bins of the density (100)")
    add("--atoms-within", type=float, metavar="ANGSTROM", help="atoms so close are drawn (0.5)")
    add("--contours", type=int, metavar="N", help="about so many lines of equal density (6), 0 for none")
    add("--column", metavar="WIDTH", help="single, double, or inches")
    add("--title", help="instead of the one that says what is shown; '' for none")
    add("--dpi", type=int, metavar="N", help="of png and jpg, and of maps in pdf and svg (300)")
    parser.set_defaults(run=_run)


def open_source(name: str) -> Density:
    """A density from a file, or from a snapshot of a data set by ``file:number``.

    Raises
    ------
    FormatError, DatasetError
    """
    from gpurho.datasets import open_dataset

    path, _, number = name.rpartition(":")
    if path and not Path(name).exists():
        try:
            index = int(number)
        except ValueError:
            raise FormatError(f"{name} is not a file; give a density file, or a snapshot as file:number") from None
        data = open_dataset(path)
        if not 0 <= index < len(data):
            raise DatasetError(f"snapshot {index} is not among the {len(data)} of {path}; give 0 to {len(data) - 1}")
        snapshot = data[index]
        return Density(snapshot.grid, snapshot.structure, snapshot.density)
    if _is_dataset(name):
        raise FormatError(f"{name} is a data set of {len(open_dataset(name))} snapshots; name one, e.g. {name}:0")
    return Density.open(name)


def _is_dataset(name: str) -> bool:
    import h5py

    from gpurho.datasets import FORMAT

    if not Path(name).is_file() or not h5py.is_hdf5(name):
        return False
    with h5py.File(name, "r") as file:
        kind = file.attrs.get("format", "")
    return (kind.decode(errors="replace") if isinstance(kind, bytes) else str(kind)) == FORMAT


def settings_of(options: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Kind of the picture and arguments of its function, the reference by name.

    Raises
    ------
    SettingsError
        For options that do not go with the kind, or are missing.
    """
    kind = options.kind or ("slice" if options.line is None else "line")
    names = dict.fromkeys(name for group in OPTIONS.values() for name in group)
    given: dict[str, Any] = {name: value for name in names if (value := getattr(options, name)) is not None}
    for name in given:
        if name not in OPTIONS[kind]:
            where = ", ".join(k for k, known in OPTIONS.items() if name in known)
            raise SettingsError(
                f"--{_FLAGS.get(name, name).replace('_', '-')} does not go with a picture of kind {kind}, only {where}"
            )
    need = NEEDS.get(kind)
    if need is not None and need not in given:
        raise SettingsError(f"a picture of kind {kind} needs --{need}; see gpurho plot --help")
    if "axis" in given:
        given["axis"] = "abc".index(given["axis"])
    if "fields" in given:
        given["fields"] = tuple(name.strip() for name in given["fields"].split(","))
    if "limits" in given:
        given["limits"] = {name: _pair(name, low, high) for name, low, high in given["limits"]}
    if "line" in given:
        line = given.pop("line")
        ends = line[:3], line[3:]
        given |= {"line": ends} if kind == "slice" else {"a": ends[0], "b": ends[1]}
    return kind, given


def _pair(name: str, low: str, high: str) -> tuple[float, float]:
    try:
        return float(low), float(high)
    except ValueError:
        raise SettingsError(f"limits {low} {high} of {name} are not two numbers; give e.g. {name} 0 0.3") from None


def _run(options: argparse.Namespace) -> None:
    from gpurho.plotting import check_picture_name, plot

    check_picture_name(options.out)
    kind, settings = settings_of(options)
    with open_source(options.source) as density:
        if "reference" not in settings:
            plot(density, options.out, kind, **settings)
        else:
            with open_source(settings.pop("reference")) as reference:
                plot(density, options.out, kind, reference=reference, **settings)
    print(f"wrote {options.out}")
