"""The command line: ``gpurho predict al.xyz --out rho.h5`` and its sisters.

Exit codes: 0 where all is done; 1 for an error, which is said in one line; 2 for wrong usage; 130 when interrupted
(Ctrl-C); 143 when told to stop (SIGTERM, as queues and ``kill`` do).
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from types import FrameType
from typing import Any, NoReturn

from gpurho.errors import GpurhoError

INTERRUPTED = 130
TERMINATED = 143

PATIENCE = 2.0
"""Seconds after a signal in which others do not count: they would disturb what leaves the files in order."""

COMMANDS = {
    "predict": ("predictcommands", "electron density of a structure, with error bars"),
    "plan": ("predictcommands", "points, tiles, memory, bytes and time of a prediction, before any work"),
    "trust": ("predictcommands", "how like a structure is to the training data, before any work"),
    "convert": ("basiccommands", "from one density file to another, or to one of atoms"),
    "plot": ("plot", "pictures of a density: slices, lines, histograms, errors, calibration"),
    "report": ("report", "one HTML page about a density: totals, slices, doubts, calibration"),
    "energy": ("energy", "energies of a density by one diagonalisation (Harris-Foulkes)"),
    "eos": ("energy", "lattice parameter and bulk modulus by an equation of state"),
    "restart": ("restart", "inputs of a DFT code that start from a density"),
    "evaluate": ("basiccommands", "errors and calibration of a model on a data set"),
    "train": ("traincommands", "train a model on data sets"),
    "transfer": ("traincommands", "train a model further on larger cells; --guide: on which"),
    "calibrate": ("traincommands", "calibrate the error bars of a trained model on held-out snapshots"),
    "select": ("learncommands", "choose descriptors by training on ever more of them"),
    "suggest": ("learncommands", "structures to label next, from what a model is unsure of"),
    "build": ("build", "crystals, vacancies, alloys, dislocations, grain boundaries"),
    "sample": ("sample", "decorrelated thermal snapshots, to be labelled"),
    "label": ("label", "reference densities by DFT, into an HDF5 data set"),
    "collect": ("collect", "a data set out of CHGCAR, cube, .dens and other density files"),
    "converge": ("converge", "change of a density with k-points or cutoff, as a table"),
    "paper": ("papercommands", "the paper's tables and figures with our labels, in one report"),
    "models": ("basiccommands", "the models that come with the library"),
    "check": ("basiccommands", "what this machine can do, one line each"),
    "completion": ("completion", "completion of commands and options for a shell"),
}
"""Module of `gpurho.pipelines` and a line for each command; only the module of the one that is asked for is loaded."""


class _Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


class _Stop:
    """What SIGTERM does: the same as Ctrl-C, with an exit code of its own. Either counts while a command is at work."""

    def __init__(self) -> None:
        self.code, self.came, self._last = INTERRUPTED, False, -math.inf
        numbers = [signal.SIGTERM]
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody else's
            numbers.append(signal.SIGINT)
        self._before = {number: signal.signal(number, self) for number in numbers}

    def __call__(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._last < PATIENCE:
            return
        if not self.came:
            self.code = TERMINATED if number == signal.SIGTERM else INTERRUPTED
        self.came, self._last = True, now
        raise KeyboardInterrupt

    def end(self) -> None:
        """Give the signals back, unless one came: what ends the interpreter must not be interrupted by an exception."""
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if self.came else handler or signal.SIG_DFL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0, 1 for an error, 2 for wrong usage, 130 or 143 when stopped."""
    stop = _Stop()
    try:
        return _run(arguments, stop)
    finally:
        stop.end()


def _run(arguments: Sequence[str] | None, stop: _Stop) -> int:
    options = argparse.Namespace()
    try:
        words = sys.argv[1:] if arguments is None else list(arguments)
        options = build_parser(_command(words)).parse_args(words)
        code: int = options.run(options) or 0
        sys.stdout.flush()
        # A command that put its work away and came back says so with the code of Ctrl-C.
        return stop.code if code == INTERRUPTED else code
    except (Exception, KeyboardInterrupt) as error:
        # Within a library in C an interrupt may turn into any other exception.
        if stop.came or isinstance(error, KeyboardInterrupt):
            kept = getattr(options, "kept", None) if getattr(options, "out", None) else None
            return _fail("interrupted" + (f"; {kept}" if kept else ""), stop.code)
        return _failed(error)


def _failed(error: BaseException) -> int:
    """Say what went wrong in one line and return the exit code; raises what is a mistake of this library."""
    if isinstance(error, GpurhoError):
        return _fail(str(error))
    if isinstance(error, BrokenPipeError):
        # The reader of our output has gone; nothing is left to say, not even by the interpreter at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if isinstance(error, MemoryError):
        return _fail("not enough memory; pass --out to stream to disk, or a smaller --tile-shape")
    if isinstance(error, OSError):
        return _fail(f"{error.filename or 'file system'}: {error.strerror or error}")
    raise error


def _fail(message: str, code: int = 1) -> int:
    print("gpurho: " + " ".join(message.split()), file=sys.stderr)
    return code


def _command(words: Sequence[str]) -> str:
    """The command among the words of a command line; "" where there is none."""
    return next((word for word in words if not word.startswith("-")), "")


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of `command`, which knows no more than the names of the others; of all commands where None is given.

    So the help of one, or the list of all, loads little.
    """
    parser = _Parser(
        prog="gpurho",
        description="Electron densities with error bars, for systems of millions of atoms.",
        epilog="exit codes: 0 done; 1 an error, said in one line; 2 wrong usage; 130 interrupted; 143 terminated",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    wanted = {COMMANDS[command][0]} if command in COMMANDS else set() if command is not None else None
    loaded = set()
    for name, (module, line) in COMMANDS.items():
        if wanted is not None and module not in wanted:
            commands.add_parser(name, help=line)
        elif module not in loaded:
            loaded.add(module)
            import_module(f"gpurho.pipelines.{module}").add_parser(commands)
    return parser


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from importlib.metadata import PackageNotFoundError, version

        try:
            number = version("gpurho")
        except PackageNotFoundError:
            number = "0+unknown"
        print(f"gpurho {number}")
        parser.exit()


_build_parser = build_parser
