"""Thermal snapshots of a structure: ``gpurho sample al.xyz --temperatures 315 1866 --count 60 --out al32.xyz``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from gpurho.sampling import POTENTIALS, sample


def add_parser(commands: Any) -> None:
    """The command ``gpurho sample``."""
    parser = commands.add_parser("sample", help="decorrelated thermal snapshots, to be labelled")
    parser.add_argument("structure", type=Path, help="any file that ASE reads")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="snapshots: *.xyz or what ASE writes")
    parser.add_argument("--temperatures", type=float, nargs=2, required=True, metavar=("LOW", "HIGH"), help="kelvin")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="snapshots in all (%(default)s)")
    parser.add_argument("--levels", type=int, default=6, metavar="N", help="temperatures (%(default)s)")
    parser.add_argument("--potential", default="auto", choices=("auto", *POTENTIALS))
    parser.add_argument("--engine", choices=("qe", "gpaw"), help="molecular dynamics with DFT instead of a potential")
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--timestep", type=float, default=2.0, metavar="FS", help="(%(default)s fs)")
    parser.add_argument("--family", help="name recorded with each snapshot")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Run ``gpurho sample``."""
    from tqdm import tqdm

    from gpurho.errors import OutputExistsError
    from gpurho.pipelines.structures import read_structures, write_structures

    if options.out.exists() and not options.overwrite:
        raise OutputExistsError(f"{options.out} exists; pass --overwrite to replace it")
    calculator = None
    if options.engine:
        from gpurho.dft.calculator import EngineCalculator

        calculator = EngineCalculator(options.engine)
    with tqdm(total=options.count, desc="sample", unit="snapshot", disable=True if options.quiet else None) as bar:
        result = sample(
            read_structures(options.structure)[-1],
            (options.temperatures[0], options.temperatures[1]),
            options.count,
            potential=options.potential,
            calculator=calculator,
            levels=options.levels,
            seed=options.seed,
            timestep=options.timestep,
            family=options.family,
            progress=lambda done, total: bar.update(done - bar.n) and None,
        )
    write_structures(options.out, result.snapshots, options.overwrite)
    print(result)
    print(f"wrote {len(result.snapshots)} snapshots to {options.out}")
