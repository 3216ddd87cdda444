"""The command line: ``gpurho predict al.xyz --out rho.h5`` and its sisters."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from gpurho.errors import GpurhoError, ModelError, SettingsError

INTERRUPTED = 130


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 when interrupted."""
    parser = _build_parser()
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)

    try:
        code: int = options.run(options) or 0
        sys.stdout.flush()
        return code
    except GpurhoError as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        kept = getattr(options, "kept", None) if getattr(options, "out", None) else None
        return _fail("interrupted" + (f"; {kept}" if kept else ""), INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone; nothing is left to say, not even by the interpreter at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MemoryError:
        return _fail("not enough memory; pass --out to stream to disk, or a smaller --tile-shape")
    except OSError as error:
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _fail(message: str, code: int = 1) -> int:
    print("gpurho: " + " ".join(message.split()), file=sys.stderr)
    return code


# -- arguments --------------------------------------------------------------------------------------------------


def _build_parser() -> argparse.ArgumentParser:
    from importlib.metadata import PackageNotFoundError, version

    parser = _Parser(prog="gpurho", description="Electron densities with error bars, for systems of millions of atoms.")
    try:
        number = version("gpurho")
    except PackageNotFoundError:
        number = "0+unknown"
    parser.add_argument("--version", action="version", version=f"gpurho {number}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)

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

    convert = commands.add_parser("convert", help="from one density file to another, or to one of atoms")
    convert.add_argument("source", type=Path, help="*.h5, *.cube, CHGCAR, *.xsf, *.dens or *.vti")
    convert.add_argument("target", type=Path, help="the same; *.xyz, *.dump: electrons and sigmas of the atoms")
    convert.add_argument("--field", default="mean", choices=("mean", "std", "aleatoric", "epistemic"))
    convert.add_argument(
        "--region", type=int, nargs=6, metavar=("I0", "I1", "J0", "J1", "K0", "K1"), help="only this box of grid points"
    )
    convert.add_argument("--coarse", metavar="N", help="means over blocks of N points along each axis, or 4x4x2")
    convert.add_argument("--overwrite", action="store_true", help="replace the target")
    convert.set_defaults(run=_convert)

    evaluate = commands.add_parser("evaluate", help="errors and calibration of a model on a data set")
    evaluate.add_argument("model", help="name of a shipped model, or a file")
    evaluate.add_argument("dataset", type=Path, help="HDF5 data set")
    evaluate.add_argument("--snapshots", metavar="WHICH", help="test, validation, train, all, or numbers: 0,3,5")
    evaluate.add_argument("--device")
    evaluate.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    evaluate.add_argument("--uncertainty", default="analytic", choices=("analytic", "last-layer", "sampled", "none"))
    evaluate.add_argument("--samples", type=int, default=30, metavar="N")
    evaluate.add_argument("--plot", type=Path, metavar="FILE", help="write a picture of the calibration")
    evaluate.add_argument("--quiet", action="store_true", help="no progress bar")
    evaluate.add_argument("--json", action="store_true", help="as JSON")
    evaluate.set_defaults(run=_evaluate)

    from gpurho.pipelines import (
        build,
        calibrate,
        collect,
        converge,
        energy,
        label,
        learncommands,
        paper,
        plot,
        report,
        restart,
        sample,
        traincommands,
    )

    traincommands.add_parser(commands)
    learncommands.add_parser(commands)
    build.add_parser(commands)
    sample.add_parser(commands)
    calibrate.add_parser(commands)
    label.add_parser(commands)
    converge.add_parser(commands)
    energy.add_parser(commands)
    restart.add_parser(commands)
    collect.add_parser(commands)
    paper.add_parser(commands)
    plot.add_parser(commands)
    report.add_parser(commands)

    models = commands.add_parser("models", help="the models that come with the library")
    models.add_argument("name", nargs="?", help="print the card of this one: data, accuracy, where not to use it")
    models.add_argument("--json", action="store_true", help="as JSON, with all that is known of each")
    models.set_defaults(run=_models)

    check = commands.add_parser("check", help="what this machine can do, one line each")
    check.add_argument("--json", action="store_true", help="as JSON")
    check.set_defaults(run=_check)
    return parser


def _job_arguments(parser: argparse.ArgumentParser, nargs: str | None = None) -> None:
    parser.add_argument("structure", nargs=nargs, type=Path, help="xyz, cif, POSCAR, LAMMPS, SPARC .ion, ...")
    parser.add_argument("--species", metavar="Al,Si", help="elements of the types of a LAMMPS file that names none")
    parser.add_argument("--model", default="auto", help="name of a shipped model, or a file (default: by species)")
    parser.add_argument("--device", help="cpu or cuda[:n] (default: the GPU where there is one)")
    parser.add_argument("--devices", type=int, metavar="N", help="so many GPUs, or with --device cpu processes")
    parser.add_argument("--spacing", type=float, metavar="ANGSTROM", help="largest step of the grid")
    parser.add_argument("--grid", type=int, nargs=3, metavar=("NX", "NY", "NZ"), help="shape of the grid instead")
    parser.add_argument("--uncertainty", default="analytic", choices=("analytic", "last-layer", "sampled", "none"))
    parser.add_argument("--samples", type=int, default=30, metavar="N", help="weight samples of 'sampled' (30)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of the weight samples (0)")
    parser.add_argument("--conserve", choices=("uniform", "uncertainty"), help="make the integral the electron number")
    parser.add_argument(
        "--region", type=int, nargs=6, metavar=("I0", "I1", "J0", "J1", "K0", "K1"), help="only this box of grid points"
    )
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument(
        "--keep",
        action="append",
        metavar="WHAT",
        help="keep this instead of the whole field, and may be given several times: field, coarse:4, slice:z=0.5,"
        " atoms, histogram, electrons",
    )
    parser.add_argument("--tile-shape", type=int, nargs=3, metavar=("I", "J", "K"), help="points of a tile (64 64 64)")


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
        "tile_shape": options.tile_shape,
        "keep": options.keep,
    }


def read_structure(options: argparse.Namespace) -> Any:
    """The atoms that a command is about; raises `StructureError` in one line."""
    from gpurho.pipelines import structures

    species = None if options.species is None else [name.strip() for name in options.species.split(",")]
    return structures.read_structure(options.structure, species)


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
    atoms, settings = read_structure(options), _settings(options)
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
        cost = plan(read_structure(options), **settings)
    else:
        foreign = [name for name in ("grid", "region", "conserve") if settings.pop(name) is not None]
        if foreign or settings.pop("client", None) is not None:
            raise SettingsError(f"--atoms does not go with --{(foreign or ['scheduler'])[0]}; leave one out")
        settings |= {"density": options.density, "price": options.price, "devices": settings["devices"] or 1}
        cost = plan(options.atoms, **{k: v for k, v in settings.items() if k != "seed"})
    print(json.dumps(cost.to_dict()) if options.json else cost)


def _convert(options: argparse.Namespace) -> None:
    from gpurho.formats import kind_of
    from gpurho.pipelines.convert import CHGCAR_NOTE, blocks_of, convert

    i = options.region
    path = convert(
        options.source,
        options.target,
        options.field,
        options.overwrite,
        region=None if i is None else (i[0:2], i[2:4], i[4:6]),
        coarse=None if options.coarse is None else blocks_of(options.coarse),
    )
    print(f"wrote {path}")
    if kind_of(path) == "chgcar":
        print(f"note: {CHGCAR_NOTE}")


def _evaluate(options: argparse.Namespace) -> None:
    from gpurho.pipelines.calibrate import snapshot_names
    from gpurho.pipelines.evaluate import evaluate
    from gpurho.pipelines.settings import resolve_device
    from gpurho.plotting import check_picture_name

    snapshots = None if options.snapshots is None else snapshot_names(options.snapshots)
    if options.plot is not None:
        check_picture_name(options.plot)
    report = evaluate(
        options.model,
        options.dataset,
        snapshots=snapshots,
        device=resolve_device(options.device),
        precision=options.precision,
        uncertainty=None if options.uncertainty == "none" else options.uncertainty,
        samples=options.samples,
        progress=not options.quiet,
    )
    if options.plot is not None:
        report.plot(options.plot)
    print(json.dumps(report.to_dict()) if options.json else report)


def _models(options: argparse.Namespace) -> None:
    from gpurho.pipelines.models import models

    found = models()
    if options.name is not None:
        found = [m for m in found if m.name == options.name]
        if not found:
            names = ", ".join(m.name for m in models()) or "none"
            raise ModelError(f"model {options.name!r} is not shipped (shipped: {names})")
    if options.json:
        print(json.dumps([{"name": m.name, "path": str(m.path), "spec": m.spec.to_dict()} for m in found]))
        return
    if not found:
        print("no model is shipped with this installation; train one with gpurho train, and pass --model FILE")
    if options.name is not None and (card := found[0].path.with_suffix(".md")).is_file():
        print(card.read_text(), end="")
        return
    for m in found:
        valence = ", ".join(f"{s} ({m.spec.valence[s]:g} electrons)" for s in m.spec.species)
        label = ", ".join(f"{k} {v}" for k, v in m.spec.dft.items() if isinstance(v, str | int | float))
        print(f"{m.name}: {valence}; {m.spec.descriptor.n_features} features" + (f"; {label}" if label else ""))


def _check(options: argparse.Namespace) -> None:
    from gpurho.pipelines.check import check

    lines = check()
    if options.json:
        print(json.dumps([line.to_dict() for line in lines]))
        return
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{'ok' if line.ok else '--':3}{line.name:{width}}  {line.text}")
