"""Thermal snapshots of a structure: ``gpurho sample al.xyz --temperatures 315 1866 --count 60 --out al32.xyz``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gpurho.sampling import MAX_PILOT, POTENTIALS, sample

if TYPE_CHECKING:
    from ase import Atoms
    from ase.calculators.calculator import Calculator

INTERRUPTED = 130


def add_parser(commands: Any) -> None:
    """The command ``gpurho sample``."""
    from gpurho.pipelines.label import add_settings

    parser = commands.add_parser(
        "sample",
        help="decorrelated thermal snapshots, to be labelled",
        epilog="Cutoff, k-points, smearing, grid and SCF are those of --engine.",
    )
    parser.add_argument("structure", type=Path, help="any file that ASE reads; the last frame, without constraints")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="snapshots: *.xyz or *.traj")
    parser.add_argument("--temperatures", type=float, nargs=2, required=True, metavar=("LOW", "HIGH"), help="kelvin")
    parser.add_argument("--count", type=int, default=20, metavar="N", help="snapshots in all (%(default)s)")
    parser.add_argument("--levels", type=int, default=6, metavar="N", help="temperatures (%(default)s)")
    parser.add_argument("--potential", default="auto", choices=("auto", *POTENTIALS))
    parser.add_argument(
        "--engine", help="molecular dynamics with DFT instead: qe, gpaw, sparc, or package.module:Class"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument("--timestep", type=float, default=2.0, metavar="FS", help="(%(default)s fs)")
    parser.add_argument("--friction", type=float, default=0.01, metavar="F", help="of the thermostat (%(default)s/fs)")
    parser.add_argument(
        "--equilibration", type=int, default=1500, metavar="STEPS", help="before anything is looked at (%(default)s)"
    )
    parser.add_argument(
        "--pilot",
        type=int,
        default=1000,
        metavar="STEPS",
        help=f"to measure how long forces are remembered (%(default)s; doubled as needed, up to {MAX_PILOT})",
    )
    parser.add_argument("--family", help="name recorded with each snapshot")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="as JSON")
    add_settings(parser)
    parser.set_defaults(run=run)


class Kept:
    """Finished snapshots of a run, on disk beside its output as soon as they are there.

    They lie in ``.<out>.part`` during the run, and in ``<out>.partial.xyz`` when it ends early.
    """

    def __init__(self, out: Path) -> None:
        self.out, self.part, self.number = out, out.with_name(f".{out.name}.part"), 0
        self.rescue()  # of a run that was killed

    def add(self, snapshot: Atoms) -> None:
        """Append a snapshot and bring it to the disk."""
        from ase.io.extxyz import write_xyz

        with open(self.part, "a") as file:
            write_xyz(file, [snapshot])
            file.flush()
            os.fsync(file.fileno())
        self.number += 1

    def rescue(self) -> Path | None:
        """Give what there is a name of its own, which replaces no file; None where there is nothing."""
        if not self.part.is_file():
            return None
        names = (self.out.with_name(f"{self.out.name}.partial{n if n > 1 else ''}.xyz") for n in count(1))
        target = next(name for name in names if not name.exists())
        self.part.rename(target)
        return target

    def rescued(self) -> str:
        """`rescue`, in words for the end of a message."""
        target = self.rescue()
        return f"; {self.number} finished snapshots are in {target}" if target else "; no snapshot was finished"

    def clear(self) -> None:
        """Remove what is now in the output."""
        self.part.unlink(missing_ok=True)


def run(options: argparse.Namespace) -> int:
    """Run ``gpurho sample``."""
    from tqdm import tqdm

    from gpurho.errors import GpurhoError, StoreError
    from gpurho.pipelines.structures import check_snapshots_name, read_structures, write_structures

    check_snapshots_name(options.out, options.overwrite)
    atoms = read_structures(options.structure)[-1]
    calculator = _calculator(options)
    kept = Kept(options.out)
    with tqdm(desc="sample", unit="step", disable=True if options.quiet else None) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.set_postfix(snapshots=f"{kept.number}/{options.count}", refresh=False)
            bar.update(done - bar.n)

        try:
            result = sample(
                atoms,
                (options.temperatures[0], options.temperatures[1]),
                options.count,
                potential=options.potential,
                calculator=calculator,
                levels=options.levels,
                seed=options.seed,
                timestep=options.timestep,
                friction=options.friction,
                equilibration=options.equilibration,
                pilot=options.pilot,
                family=options.family,
                progress=show,
                keep=kept.add,
            )
            write_structures(options.out, result.snapshots, options.overwrite)
        except KeyboardInterrupt:
            bar.close()
            print(f"gpurho: interrupted{kept.rescued()}", file=sys.stderr)
            return INTERRUPTED
        except GpurhoError as error:
            if not kept.number:
                raise
            raise type(error)(f"{error}{kept.rescued()}") from error
        except OSError as error:
            reason = f"{error.filename or options.out} cannot be written ({error.strerror or error})"
            raise StoreError(f"{reason}{kept.rescued()}") from error
        except Exception:  # raised again at once: only the snapshots are put away first
            kept.rescue()
            raise
    kept.clear()
    if options.json:
        known = [{n: v for n, v in vars(t).items() if v == v} for t in result.trajectories]  # no NaN
        found = {"snapshots": len(result.snapshots), "trajectories": known, "warnings": list(result.warnings)}
        print(json.dumps({"file": str(options.out), **found}))
        return 0
    print(result)
    print(f"wrote {len(result.snapshots)} snapshots to {options.out}")
    return 0


def _calculator(options: argparse.Namespace) -> Calculator | None:
    from gpurho.dft.base import DFTSettings
    from gpurho.errors import SettingsError
    from gpurho.pipelines.label import settings_of

    settings = settings_of(options)
    if not options.engine:
        if settings != DFTSettings():
            raise SettingsError(
                "cutoff, k-points, smearing, grid and SCF belong to DFT; add --engine, or leave them out"
            )
        return None
    if options.potential != "auto":
        raise SettingsError(f"--engine {options.engine} excludes --potential {options.potential}; give one of them")
    from gpurho.dft.calculator import EngineCalculator

    return EngineCalculator(options.engine, settings)
