"""The commands ``gpurho select`` and ``gpurho suggest``; what they run is imported when it is run."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gpurho.errors import SettingsError
from gpurho.pipelines.traincommands import assignment
from gpurho.selection import SEARCHES, SearchSettings


def add_parser(commands: Any) -> None:
    """Both commands."""
    default = SearchSettings()
    select = commands.add_parser("select", help="choose descriptors by training on ever more of them")
    select.add_argument("dataset", type=Path, nargs="+", help="HDF5 data sets")
    select.add_argument("--out", type=Path, required=True, metavar="FILE", help="record, *.json; resumable")
    select.add_argument("--family", default="scalar-product", choices=tuple(SEARCHES))
    select.add_argument(
        "--tolerance", type=float, default=default.tolerance, metavar="X", help="share of the error (%(default)s)"
    )
    select.add_argument("--angle-tolerance", type=float, metavar="X", help="of Algorithm 3 (as --tolerance)")
    select.add_argument(
        "--stop", default=default.stop, choices=("either", "both"), help="end of a series (%(default)s)"
    )
    select.add_argument("--repeats", type=int, default=1, metavar="N", help="trainings of each candidate (1)")
    select.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="any setting of the search or of training"
    )
    select.add_argument("--device", default="cpu")
    select.add_argument("--quiet", action="store_true", help="the table alone")
    select.add_argument("--json", action="store_true", help="as JSON")
    select.set_defaults(run=_select, kept="candidates are safe: run the same command again to go on")

    suggest = commands.add_parser("suggest", help="structures to label next, from what a model is unsure of")
    suggest.add_argument("structures", type=Path, nargs="+", help="files of structures, or predicted densities (*.h5)")
    suggest.add_argument("--model", default="auto", help="name of a shipped model, or a file (default: by species)")
    suggest.add_argument("--count", type=int, default=5, metavar="N", help="most suggestions (%(default)s)")
    suggest.add_argument("--out", type=Path, metavar="FOLDER", help="where suggestions and inputs are written")
    suggest.add_argument("--training", type=Path, nargs="+", metavar="FILE", help="data sets that the model knows")
    suggest.add_argument("--max-atoms", type=int, default=110, metavar="N", help="of a cell (%(default)s)")
    suggest.add_argument("--min-distance", type=float, metavar="A", help="of atoms across faces (by the structure)")
    suggest.add_argument("--level", type=float, metavar="SIGMA", help="e/A^3 from which on atoms stand out")
    suggest.add_argument("--uncertainty", default="auto", choices=("auto", "last-layer", "analytic"))
    suggest.add_argument("--spacing", type=float, default=0.4, metavar="A", help="of the grid (%(default)s)")
    suggest.add_argument("--device", help="cpu or cuda[:n] (default: the GPU where there is one)")
    suggest.add_argument("--write", nargs="+", default=[], choices=("qe", "sparc"), help="inputs of these, too")
    suggest.add_argument("--overwrite", action="store_true", help="replace the folder")
    suggest.add_argument("--quiet", action="store_true", help="no progress bar")
    suggest.add_argument("--json", action="store_true", help="as JSON")
    suggest.set_defaults(run=_suggest)


def _select(options: argparse.Namespace) -> None:
    from gpurho.pipelines.select import select

    settings = dict(assignment(text) for text in options.set)
    search = {f.name: settings.pop(f.name) for f in fields(SearchSettings) if f.name in settings}
    for name in ("tolerance", "angle_tolerance", "stop"):
        search.setdefault(name, getattr(options, name))
    try:
        result = select(
            options.dataset,
            options.out,
            family=options.family,
            search=SearchSettings(**search),
            repeats=options.repeats,
            device=options.device,
            progress=not (options.quiet or options.json),
            **settings,
        )
    except TypeError as error:
        raise SettingsError(f"{error}; see gpurho select --help") from None
    if options.json:
        print(json.dumps({"settings": result.settings, "candidates": [asdict(c) for c in result.candidates]}))
        return
    print(result)
    print(f"record {options.out}, plot {options.out.with_suffix('.png')}")


def _suggest(options: argparse.Namespace) -> None:
    from gpurho.pipelines.suggest import suggest

    found = suggest(
        options.structures,
        options.model,
        count=options.count,
        out=options.out,
        training=options.training,
        max_atoms=options.max_atoms,
        min_distance=options.min_distance,
        level=options.level,
        uncertainty=options.uncertainty,
        spacing=options.spacing,
        device=options.device,
        inputs=options.write,
        overwrite=options.overwrite,
        progress=not (options.quiet or options.json),
    )
    if options.json:
        print(json.dumps([s.record() for s in found]))
        return
    for number, suggestion in enumerate(found):
        print(f"{number}: {suggestion.reason}")
    if not found:
        print("nothing stands out that is not known; give --level to look closer")
    elif options.out is not None:
        print(f"wrote {options.out}; compute with: gpurho label {options.out / 'suggestions.xyz'} --out labels.h5")


__all__ = ["add_parser"]
