"""The commands ``gpurho predict``, ``gpurho plan`` and ``gpurho trust``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpurho.errors import SettingsError


def add_parser(commands: Any) -> None:
    """All three commands."""
    predict = commands.add_parser("predict", help="electron density of a structure, with error bars")
    _job_arguments(predict)
    predict.add_argument("--out", type=Path, metavar="FILE", help="stream to this HDF5 file; resumable")
    predict.add_argument("--scheduler", metavar="ADDRESS", help="work on the Dask cluster with this scheduler")
    predict.add_argument("--scheduler-file", type=Path, metavar="FILE", help="the same, by the file that it wrote")
    predict.add_argument("--no-resume", action="store_true", help="start again and replace what is at --out")
    predict.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of a slice with its errors")
    predict.add_argument(
        "--write", type=Path, metavar="FILE", action="append", default=[], help="also *.cube, CHGCAR, *.vti, *.xyz, ..."
    )
    predict.add_argument("--report", type=Path, metavar="FILE", help="write a page about the result, *.html")
    predict.add_argument("--quiet", action="store_true", help="no progress bar")
    predict.add_argument("--json", action="store_true", help="the summary as JSON")
    predict.set_defaults(run=_predict, kept="run the same command again to go on from the tiles that are done")

    plan = commands.add_parser("plan", help="points, tiles, memory, bytes and time of a prediction, before any work")
    _job_arguments(plan, "?")
    plan.add_argument("--atoms", type=float, metavar="N", help="plan for so many atoms instead of a structure")
    plan.add_argument("--density", type=float, metavar="D", help="of --atoms, per angstrom^3: 0.0603 for aluminium")
    plan.add_argument("--price", type=float, metavar="P", help="of a device for an hour, with --atoms")
    plan.add_argument("--json", action="store_true", help="as JSON")
    plan.set_defaults(run=_plan)

    trust = commands.add_parser("trust", help="how like a structure is to the training data, before any work")
    _structure_arguments(trust)
    trust.add_argument("--device", default="cpu", help="cpu or cuda[:n], for the descriptors (%(default)s)")
    trust.add_argument("--write", type=Path, metavar="FILE", help="the atoms with their numbers, *.xyz")
    trust.add_argument("--overwrite", action="store_true", help="replace it")
    trust.add_argument("--json", action="store_true", help="as JSON")
    trust.set_defaults(run=_trust)


def _job_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    _structure_arguments(parser, nargs)
    parser.add_argument("--device", help="cpu or cuda[:n] (default: the GPU where there is one)")
    parser.add_argument("--devices", type=int, metavar="N", help="so many GPUs, or with --device cpu processes")
    parser.add_argument("--spacing", type=float, metavar="ANGSTROM", help="largest step of the grid (0.2)")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("NX", "NY", "NZ"), help="shape of the grid instead")
    parser.add_argument("--uncertainty", default="analytic", choices=("analytic", "last-layer", "sampled", "none"))
    parser.add_argument("--samples", type=int, default=30, metavar="N", help="weight samples of 'sampled' (30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weight samples (0)")
    parser.add_argument("--conserve", choices=("uniform", "uncertainty"), help="make the integral the electron number")
    parser.add_argument(
        "--region", type=int, nargs=6, metavar=("I0", "I1", "J0", "J1", "K0", "K1"), help="only this box of grid points"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--executor", default="auto", choices=("auto", "script", "fused"), help="what runs the network")
    parser.add_argument(
        "--keep",
        action="append",
        metavar="WHAT",
        help="keep this instead of the whole field, and may be given several times: field, coarse:4, slice:z=0.5,"
        " atoms, histogram, electrons",
    )
    parser.add_argument("--tile-shape", type=int, nargs=3, metavar=("I", "J", "K"), help="points of a tile (64 64 64)")


def _structure_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("structure", nargs=nargs, type=Path, help="xyz, cif, POSCAR, LAMMPS, SPARC .ion, ...")
    parser.add_argument("--species", metavar="Al,Si", help="elements of the types of a LAMMPS file that names none")
    parser.add_argument(
        "--scratch",
        type=Path,
        metavar="FOLDER",
        help="sort the atoms of a LAMMPS dump or HDF5 file into a temporary file there, and not into memory",
    )
    parser.add_argument("--model", default="auto", help="name of a shipped model, or a file (default: by species)")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    region = options.region
    return {
        "model": options.model,
        "device": options.device,
        "devices": options.devices,
        "spacing": options.spacing,
        "grid": options.grid,
        "uncertainty": None if options.uncertainty == "none" else options.uncertainty,
        "samples": options.samples,
        "seed": options.seed,
        "conserve": options.conserve,
        "region": None if region is None else (region[0:2], region[2:4], region[4:6]),
        "precision": options.precision,
        "executor": options.executor,
        "tile_shape": options.tile_shape,
        "keep": options.keep,
    }


@contextmanager
def read_atoms(options: argparse.Namespace) -> Iterator[Any]:
    """The atoms that a command is about, in memory or in a temporary file; raises `StructureError` in one line."""
    from gpurho.pipelines import structures

    species = None if options.species is None else [name.strip() for name in options.species.split(",")]
    if options.scratch is None:
        yield structures.read_structure(options.structure, species)
        return
    with structures.structure_source(options.structure, species or (), options.scratch) as source:
        yield source


# -- commands ---------------------------------------------------------------------------------------------------


def _predict(options: argparse.Namespace) -> None:
    from gpurho.formats import kind_of
    from gpurho.plotting import check_picture_name

    for path in options.write:
        kind_of(path)
    if options.plot is not None:
        check_picture_name(options.plot)
    if options.report is not None:
        from gpurho.pipelines.report import check_report_name

        check_report_name(options.report)
    with read_atoms(options) as atoms:
        settings = _settings(options)
        if options.scheduler is None and options.scheduler_file is None:
            _predict_with(options, atoms, settings)
            return
        from gpurho.pipelines.cluster import connect

        with connect(options.scheduler, options.scheduler_file) as client:
            _predict_with(options, atoms, settings | {"client": client})


def _predict_with(options: argparse.Namespace, atoms: Any, settings: dict[str, Any]) -> None:
    from gpurho.pipelines.predict import run_job
    from gpurho.pipelines.settings import settle
    from gpurho.pipelines.summary import summarize, summary_text

    job = settle(atoms, **settings)
    with run_job(job, options.out, resume=not options.no_resume, progress=not options.quiet) as density:
        summary = summarize(job, density, options.out)
        print(json.dumps(summary) if options.json else summary_text(summary))
        for path in options.write:
            density.write(path)
            print(f"wrote    {path}", file=sys.stderr if options.json else sys.stdout)
        if options.plot is not None:
            density.plot(options.plot)
            print(f"picture  {options.plot}", file=sys.stderr if options.json else sys.stdout)
        if options.report is not None:
            from gpurho.pipelines.report import report

            report(density, options.report, file=options.out, progress=not options.quiet)
            print(f"report   {options.report}", file=sys.stderr if options.json else sys.stdout)


def _plan(options: argparse.Namespace) -> None:
    from gpurho.pipelines.plan import plan

    settings = _settings(options)
    if (options.atoms is None) == (options.structure is None):
        raise SettingsError("a plan needs a structure file or --atoms N --density D; give one of them")
    if options.atoms is None:
        with read_atoms(options) as atoms:
            cost = plan(atoms, **settings)
    else:
        foreign = [name for name in ("grid", "region", "conserve") if settings.pop(name) is not None]
        if foreign or settings.pop("client", None) is not None:
            raise SettingsError(f"--atoms does not go with --{(foreign or ['scheduler'])[0]}; leave one out")
        settings |= {"density": options.density, "price": options.price, "devices": settings["devices"] or 1}
        cost = plan(options.atoms, **{k: v for k, v in settings.items() if k != "seed"})
    print(json.dumps(cost.to_dict()) if options.json else cost)


def _trust(options: argparse.Namespace) -> None:
    from gpurho.pipelines.structures import write_structures
    from gpurho.pipelines.trust import trust
    from gpurho.sources import StructureSource
    from gpurho.structure import as_structure

    if options.write is not None and options.write.suffix.lower() not in (".xyz", ".extxyz"):
        raise SettingsError(f"--write {options.write} has no room for the numbers of atoms; give a name *.xyz")
    with read_atoms(options) as atoms:
        found = trust(atoms, options.model, device=options.device, progress=True)
        print(json.dumps(found.to_dict()) if options.json else found)
        if options.write is not None:
            named = (atoms.structure() if isinstance(atoms, StructureSource) else as_structure(atoms)).to_ase()
            named.arrays |= {"trust": found.per_atom, "trust_why": found.why.astype(int)}
            write_structures(options.write, [named], options.overwrite)
            print(f"wrote {options.write}", file=sys.stderr if options.json else sys.stdout)
