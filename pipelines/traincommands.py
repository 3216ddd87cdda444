"""The commands ``gpurho train``, ``gpurho transfer`` and ``gpurho calibrate``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from gpurho.errors import SettingsError

CALIBRATION_POINTS = 10_000
"""Grid points drawn from every snapshot by ``gpurho calibrate``."""

AGAIN = "run the same command again to go on from the last checkpoint"


def add_parser(commands: Any) -> None:
    """All three commands."""
    train = commands.add_parser("train", help="train a model on data sets")
    train.add_argument("datasets", type=Path, nargs="+", metavar="dataset", help="HDF5 data sets")
    train.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    _add_run(train)
    train.set_defaults(run=_train, kept=AGAIN)

    transfer = commands.add_parser("transfer", help="train a model further on larger cells; --guide: on which")
    transfer.add_argument(
        "sources",
        type=Path,
        nargs="+",
        metavar="source",
        help="model, then data sets; with --guide only these",
    )
    transfer.add_argument("--out", type=Path, metavar="FILE", help="model file to write")
    transfer.add_argument("--freeze", type=float, default=0.333, metavar="SHARE", help="of the layers (%(default)s)")
    transfer.add_argument("--freeze-layers", type=int, metavar="N", help="number of layers to freeze instead")
    transfer.add_argument("--prior", default="standard", choices=("standard", "posterior"), help="(%(default)s)")
    transfer.add_argument("--guide", action="store_true", help="compare data sets of growing cells; train nothing")
    transfer.add_argument("--model", help="with --guide: compare the features of this model")
    transfer.add_argument("--points", type=int, default=20_000, metavar="N", help="with --guide: of each (%(default)s)")
    _add_run(transfer)
    transfer.set_defaults(run=_transfer, kept=AGAIN)
    _add_calibrate(commands)


def _add_calibrate(commands: Any) -> None:
    parser = commands.add_parser("calibrate", help="calibrate the error bars of a trained model on held-out snapshots")
    parser.add_argument("model", help="name of a shipped model, or a file")
    parser.add_argument("dataset", type=Path, help="HDF5 data set")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="model file to write")
    parser.add_argument(
        "--snapshots", default="validation", metavar="WHICH", help="held out: validation, or numbers: 0,3"
    )
    parser.add_argument(
        "--train", default="train", metavar="WHICH", help="that the last layer is fitted to: train, numbers, or none"
    )
    parser.add_argument("--refit", action="store_true", help="take the last layer's posterior mean for its weights")
    parser.add_argument(
        "--noise", default="learned", choices=("learned", "constant"), help="of the last layer's labels"
    )
    parser.add_argument(
        "--points", type=int, default=CALIBRATION_POINTS, metavar="N", help="of every snapshot (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N")
    parser.add_argument(
        "--known", type=Path, action="append", default=[], metavar="FILE", help="more data it was trained on, for trust"
    )
    parser.add_argument("--trust-only", action="store_true", help="note the training atoms; all else stays")
    parser.add_argument("--overwrite", action="store_true", help="replace the output")
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.set_defaults(run=_calibrate)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--epochs", type=int, metavar="N")
    parser.add_argument("--seed", type=int, metavar="N")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="any other training setting")
    parser.add_argument("--device", help="cpu or cuda[:n] (default: the GPU where there is one)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="GPUs, or processes on the CPU (1)")
    parser.add_argument("--tensorboard", type=Path, metavar="FOLDER", help="also write TensorBoard's event files")
    parser.add_argument("--no-resume", action="store_true", help="do not go on from a checkpoint")
    parser.add_argument("--overwrite", action="store_true", help="replace a finished model")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")
    parser.add_argument("--json", action="store_true", help="as JSON")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    settings = dict(assignment(text) for text in options.set)
    for name in ("epochs", "seed"):
        if getattr(options, name) is not None:
            settings[name] = getattr(options, name)
    return settings


def _run_options(options: argparse.Namespace) -> dict[str, Any]:
    from gpurho.pipelines.settings import resolve_device

    return {
        "device": resolve_device(options.device),
        "devices": options.devices,
        "tensorboard": options.tensorboard,
        "resume": not options.no_resume,
        "progress": not options.quiet,
        "overwrite": options.overwrite,
        **_settings(options),
    }


def _train(options: argparse.Namespace) -> None:
    from gpurho.pipelines.train import train

    try:
        result = train(options.datasets, options.out, **_run_options(options))
    except TypeError as error:
        raise SettingsError(f"{error}; see gpurho train --help") from None
    print(json.dumps(result.to_dict()) if options.json else result)


def _transfer(options: argparse.Namespace) -> None:
    from gpurho.pipelines.transfer import size_guide, transfer

    if options.guide:
        guide = size_guide(options.sources, options.model, options.points, **_settings(options))
        print(json.dumps(guide.to_dict()) if options.json else guide)
        return
    if options.out is None or len(options.sources) < 2:
        raise SettingsError(
            "transfer needs a model, data sets and --out FILE, for instance"
            " gpurho transfer small.safetensors al108.h5 --out al.safetensors"
        )
    model, *datasets = options.sources
    try:
        result = transfer(
            str(model),
            datasets,
            options.out,
            freeze=options.freeze,
            freeze_layers=options.freeze_layers,
            prior=options.prior,
            **_run_options(options),
        )
    except TypeError as error:
        raise SettingsError(f"{error}; see gpurho transfer --help") from None
    print(json.dumps(result.to_dict()) if options.json else result)


def _calibrate(options: argparse.Namespace) -> None:
    from gpurho.pipelines.calibrate import calibrate, snapshot_names

    train = None if options.train == "none" else snapshot_names(options.train)
    found = calibrate(
        options.model,
        options.dataset,
        options.out,
        snapshots=snapshot_names(options.snapshots),
        train=train,
        refit=options.refit,
        noise=options.noise,
        points=options.points,
        seed=options.seed,
        overwrite=options.overwrite,
        known=options.known,
        trust_only=options.trust_only,
        progress=True,
    )
    print(json.dumps(found.to_dict()) if options.json else found)


def assignment(text: str) -> tuple[str, Any]:
    """NAME=VALUE, where the value is JSON or else text."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise SettingsError(f"--set {text!r} is not NAME=VALUE; give for instance --set learning_rate=0.001")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


__all__ = ["add_parser", "assignment"]
