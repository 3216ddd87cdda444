"""The command ``gpurho paper``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpurho.errors import SettingsError


def add_parser(commands: Any) -> None:
    """The command ``gpurho paper``."""
    parser = commands.add_parser("paper", help="the paper's tables and figures with our labels, in one report")
    parser.add_argument("--data", type=Path, required=True, metavar="FOLDER", help="of al32.h5 and the others")
    parser.add_argument("--models", nargs="+", required=True, metavar="NAME=FILE", help="al=FILE, sige=FILE, or both")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="results, pictures, report; resumable"
    )
    parser.add_argument("--snapshots", type=int, metavar="N", help="at most so many of each set (all)")
    parser.add_argument("--energies", type=int, default=2, metavar="N", help="snapshots of each set (%(default)s)")
    parser.add_argument("--no-energies", action="store_true", help="compute none; show those of earlier runs")
    parser.add_argument("--engine", default="qe", choices=("gpaw", "qe", "sparc"), help="of the labels (%(default)s)")
    parser.add_argument("--uncertainty", default="analytic", choices=("analytic", "last-layer", "sampled"))
    parser.add_argument("--device")
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument(
        "--spacing", type=float, default=0.3, metavar="ANGSTROM", help="of built structures (%(default)s)"
    )
    parser.add_argument(
        "--largest", type=int, default=1400, metavar="N", help="atoms of built structures (%(default)s)"
    )
    parser.add_argument("--compare", nargs="+", default=[], metavar="NAME=FILE", help="models for Figure 14")
    parser.add_argument("--with-defects", type=Path, metavar="FILE", help="model trained with a vacancy, for Figure 9e")
    parser.add_argument("--select", type=Path, metavar="FILE", help="record of gpurho select, for Figure 15")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=run, kept="finished pieces are safe: run the same command again to go on")


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho paper``."""
    from gpurho.pipelines.paper import paper
    from gpurho.pipelines.settings import resolve_device

    result = paper(
        options.data,
        _pairs("--models", options.models),
        options.out,
        snapshots=options.snapshots,
        energies=options.energies,
        skip_energies=options.no_energies,
        engine=options.engine,
        uncertainty=options.uncertainty,
        device=resolve_device(options.device),
        precision=options.precision,
        spacing=options.spacing,
        largest=options.largest,
        compare=_pairs("--compare", options.compare),
        with_defects=options.with_defects,
        select=options.select,
        progress=not options.quiet,
    )
    print(json.dumps(result.to_dict()) if options.json else result)


def _pairs(option: str, texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise SettingsError(f"{option} {text!r} is not NAME=FILE; give for instance al=al.safetensors")
        pairs[name] = value
    return pairs
