"""The command line with words of all kinds, in process: an exit code, and one line where it fails."""

from __future__ import annotations

import contextlib
import io
import os
import signal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from fuzz.cases import WrongError
from fuzz.mutations import TOKENS
from fuzz.structures import model

COMMANDS = (
    *("predict", "predict", "predict", "plan", "convert", "evaluate", "train", "transfer", "select", "suggest"),
    *("build", "sample", "calibrate", "label", "converge", "energy", "paper", "models", "check", "plot", "report"),
    *("trust", "nonsense", "", "--version", "--help"),
)
OPTIONS = (
    *("--spacing", "--grid", "--region", "--keep", "--tile-shape", "--samples", "--seed", "--uncertainty", "--json"),
    *("--conserve", "--precision", "--device", "--model", "--out", "--write", "--plot", "--quiet", "--overwrite"),
    *(
        "--field",
        "--coarse",
        "--snapshots",
        "--species",
        "--atoms",
        "--density",
        "--nonsense",
        "-x",
        "--",
        "--no-resume",
    ),
)
WORDS = (
    *(
        "4",
        "0",
        "-1",
        "1e9",
        "nan",
        "inf",
        "0.3",
        "cpu",
        "cuda",
        "fp32",
        "analytic",
        "none",
        "uniform",
        "atoms",
        "field",
    ),
    *(
        "coarse:2",
        "slice:z=0.5",
        "histogram",
        "mean",
        "al",
        "al-vacancy",
        "all",
        "0,1",
        "Al",
        "Al,Si",
        "",
        " ",
        "\u00e9",
    ),
    *("a.xyz", "m.safetensors", "r.h5", "d.h5", "bad.xyz", "bad.h5", "missing.xyz", "a.cube", "out.cube", "CHGCAR"),
    *("out.h5", "out.png", "no/such/folder/x.h5", ".", "/", "../x.xyz", "x" * 300, "{}", "%s", "$HOME", "a.xyz@0:1"),
)
SLOW = {"label", "train", "transfer", "select", "sample", "paper", "converge", "energy", "suggest"}
"""Commands that would work for minutes if the words made sense; they get files that are not there."""


@cache
def parser() -> Any:
    """One parser for all cases: it is half of the cost."""
    from gpurho import cli

    return cli._build_parser()


def _files(folder: Path) -> None:
    from fuzz.binaries import dataset_bytes, density_bytes, model_bytes
    from fuzz.structurefiles import sources

    (folder / "a.xyz").write_bytes(sources("xyz")[0])
    (folder / "m.safetensors").write_bytes(model_bytes()[0])
    (folder / "r.h5").write_bytes(density_bytes()[0])
    (folder / "d.h5").write_bytes(dataset_bytes())
    (folder / "bad.xyz").write_bytes(b"3\n\nAl 0 0 nan\n")
    (folder / "bad.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(200))


def words_of(rng: np.random.Generator) -> list[str]:
    """A command line, often nearly right."""

    def word() -> str:
        if rng.random() < 0.15:
            return TOKENS[int(rng.integers(len(TOKENS)))].decode("latin1").replace("\x00", "?")
        return WORDS[int(rng.integers(len(WORDS)))]

    command = COMMANDS[int(rng.integers(len(COMMANDS)))]
    words = [command]
    if command in ("predict", "plan") and rng.random() < 0.7:
        words += ["a.xyz", "--model", "m.safetensors", "--device", "cpu"]
        if rng.random() < 0.8:
            words += ["--grid", "3", "4", "2"]
    elif command == "convert" and rng.random() < 0.7:
        words += ["r.h5", ("out.cube", "CHGCAR", "out.xsf", "out.vti", "out.dens", "out.xyz")[int(rng.integers(6))]]
    elif command == "evaluate" and rng.random() < 0.5:
        words += ["m.safetensors", "d.h5"]
    for _ in range(int(rng.integers(0, 4))):
        words += [OPTIONS[int(rng.integers(len(OPTIONS)))]] if rng.random() < 0.6 else []
        words += [word() for _ in range(int(rng.choice([0, 1, 1, 1, 2, 3])))]
    if command in SLOW:
        words = ["gone-" + w if w.endswith((".h5", ".xyz", ".safetensors")) else w for w in words]
    return words


def command_case(rng: np.random.Generator, folder: Path) -> str:
    """A command line; the exit code and the words on standard error."""
    from gpurho import cli

    _files(folder)
    words = words_of(rng)
    model()
    out, err = io.StringIO(), io.StringIO()
    before, real = os.getcwd(), cli._build_parser
    handler = signal.getsignal(signal.SIGTERM)
    os.chdir(folder)
    try:
        parser()
        cli._build_parser = parser
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = cli.main(words)
            except SystemExit as leave:
                code = leave.code
    finally:
        cli._build_parser = real
        os.chdir(before)
        signal.signal(signal.SIGTERM, handler)
    said = err.getvalue()
    if code not in (0, 1, 2):
        raise WrongError(f"{words}: exit code {code!r}")
    if "Traceback" in said or (code != 0 and len(said.strip().splitlines()) != 1 and "usage" not in said):
        raise WrongError(f"{words}: {said[-400:]!r}")
    return "accepted" if code == 0 else "refused"


KINDS = {"command": command_case}
