"""The commands ``gpurho convert``, ``gpurho evaluate``, ``gpurho models`` and ``gpurho check``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpurho.errors import ModelError


def add_parser(commands: Any) -> None:
    """All four commands."""
    convert = commands.add_parser("convert", help="from one density file to another, or to one of atoms")
    convert.add_argument("source", type=Path, help="*.h5, *.cube, CHGCAR, *.xsf, *.dens or *.vti")
    convert.add_argument("target", type=Path, help="the same; *.xyz, *.dump: electrons and sigmas of the atoms")
    convert.add_argument("--field", default="mean", choices=("mean", "std", "aleatoric", "epistemic"))
    convert.add_argument(
        "--region", type=int, nargs=6, metavar=("I0", "I1", "J0", "J1", "K0", "K1"), help="only this box of grid points"
    )
    convert.add_argument("--coarse", metavar="N", help="means over blocks of N points along each axis, or 4x4x2")
    convert.add_argument("--spacing", type=float, metavar="ANGSTROM", help="interpolate on a finer grid instead")
    convert.add_argument("--overwrite", action="store_true", help="replace the target")
    convert.add_argument("--json", action="store_true", help="as JSON")
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

    models = commands.add_parser("models", help="the models that come with the library")
    models.add_argument("name", nargs="?", help="print the card of this one: data, accuracy, where not to use it")
    models.add_argument("--json", action="store_true", help="as JSON, with all that is known of each")
    models.set_defaults(run=_models)

    check = commands.add_parser("check", help="what this machine can do, one line each")
    check.add_argument("--fast", action="store_true", help="do not import what is installed to see that it works")
    check.add_argument("--json", action="store_true", help="as JSON")
    about = check.add_argument_group("invariance of the density on a structure of yours")
    about.add_argument(
        "--structure", type=Path, metavar="FILE", help="turn, move and cut this one; deviations, ok or NO"
    )
    about.add_argument("--model", default="auto", help="name of a shipped model, or a file (default: by species)")
    about.add_argument("--device", help="cpu or cuda[:n] (default: the GPU where there is one)")
    about.add_argument("--species", metavar="Al,Si", help="elements of the types of a LAMMPS file that names none")
    about.add_argument("--processes", type=int, default=2, metavar="N", help="workers to compare with one (2)")
    check.set_defaults(run=_check)


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
        spacing=options.spacing,
        progress=True,
    )
    note = CHGCAR_NOTE if kind_of(path) == "chgcar" else None
    if options.json:
        print(json.dumps({"file": str(path), "bytes": path.stat().st_size, "note": note}))
        return
    print(f"wrote {path}")
    if note is not None:
        print(f"note: {note}")


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


def _check(options: argparse.Namespace) -> int:
    if options.structure is not None:
        from gpurho.pipelines import selfcheck

        return selfcheck.run(options)
    from gpurho.pipelines.check import check

    lines = check(imports=not options.fast, progress=True)
    if options.json:
        print(json.dumps([line.to_dict() for line in lines]))
        return 0
    width = max(len(line.name) for line in lines)
    for line in lines:
        print(f"{'ok' if line.ok else '--':3}{line.name:{width}}  {line.text}")
    return 0
