"""One case and one batch of cases, and what counts as a failure."""

from __future__ import annotations

import faulthandler
import gc
import importlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Case = Callable[[np.random.Generator, Path], str]

MODULES = (
    "fuzz.structures",
    "fuzz.settings",
    "fuzz.textfiles",
    "fuzz.structurefiles",
    "fuzz.binaries",
    "fuzz.commands",
)
CASE_SECONDS = 30.0
"""Longest that a case may take; most take milliseconds, the first ones compile."""

MEMORY_BYTES = 1 << 30
"""Address space that a batch may take beyond what it has when its libraries are loaded."""

QUIET = ("torch.jit", "numba", "os.fork", "structure file ")
"""Warnings that a user does not see, that are of the tests' own making, or that the library words in one line."""


class WrongError(AssertionError):
    """An accepted input gave a wrong answer."""


def kinds() -> dict[str, Case]:
    """All kinds of cases by name."""
    found: dict[str, Case] = {}
    for name in MODULES:
        found |= importlib.import_module(name).KINDS
    return found


def generator(kind: str, number: int) -> np.random.Generator:
    """The random numbers of a case, the same on every machine."""
    return np.random.default_rng([zlib.crc32(kind.encode()), number])


def finite(array: Any, what: str = "field") -> None:
    """Raise unless all values are finite numbers."""
    values = np.asarray(array)
    if not np.isfinite(values).all():
        raise WrongError(f"{what} has values that are not finite")


def whole_density(density: Any) -> str:
    """Look a density over: its shape, its values, its grid and its atoms."""
    mean = np.asarray(density.mean[:, :, :])
    if mean.shape != density.grid.shape:
        raise WrongError(f"shape {mean.shape} on a grid {density.grid.shape}")
    finite(mean)
    for name in ("aleatoric", "epistemic"):
        field = getattr(density, name)
        if field is not None:
            finite(field[:, :, :], name)
    finite(density.structure.positions, "positions")
    finite(density.grid.cell, "cell")
    return "accepted"


def run_case(case: Case, kind: str, number: int, folder: Path) -> tuple[str, str]:
    """Outcome and, of a failure, what happened."""
    from gpurho.errors import GpurhoError

    started = time.process_time()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            outcome, text = case(generator(kind, number), folder), ""
        except GpurhoError as error:
            outcome, text = "refused", ""
            message = str(error)
            if not message.strip() or "\n" in message.strip() or len(message) > 1200:
                outcome, text = "failed", f"message of {len(message)} characters: {message[:300]!r}"
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)
            places = "; ".join(f"{Path(f.filename).name}:{f.lineno}" for f in last[-6:])
            outcome, text = "failed", f"{type(error).__name__}: {str(error)[:300]} [{places}]"
    foreign = [str(w.message).splitlines()[0][:200] for w in caught if not any(q in str(w.message) for q in QUIET)]
    if foreign and outcome != "failed":
        outcome, text = "failed", f"warning: {foreign[0]} [{Path(caught[0].filename).name}:{caught[0].lineno}]"
    # Of this process alone: the machine may be busy with others, and the first case of a batch loads libraries.
    seconds = time.process_time() - started
    if seconds > CASE_SECONDS and outcome != "failed":
        outcome, text = "failed", f"it took {seconds:.0f} s"
    return outcome, text


def limit_memory(extra: int = MEMORY_BYTES) -> None:
    """Let this process take no more than `extra` bytes beyond what it has."""
    with open("/proc/self/statm") as file:
        size = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + extra, size + extra))


def run_batch(kind: str, first: int, count: int, folder: Path, limited: bool = True) -> dict[str, Any]:
    """Run cases one after another; `folder`/state tells how far it came, should a case end the process."""
    case = kinds()[kind]
    work = folder / "work"
    result: dict[str, Any] = {"kind": kind, "first": first, "count": count, "outcomes": {}, "failures": []}
    words = open(folder / "words", "w+b")  # noqa: SIM115 - what native code prints goes there to the end
    sys.stderr.flush()
    state = open(folder / "state", "w")  # noqa: SIM115 - as long as the batch
    keep = [os.dup(1), os.dup(2)]
    try:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
        for number in range(first, first + count):
            # A case that hangs ends the process and says where.
            patience = CASE_SECONDS if number > first else 10 * CASE_SECONDS
            faulthandler.dump_traceback_later(patience, exit=True, file=words)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir()
            if limited and number == first + 1:
                limit_memory()  # the first case has loaded and compiled what there is
            said = os.fstat(words.fileno()).st_size
            outcome, text = run_case(case, kind, number, work)
            sys.stdout.flush()
            sys.stderr.flush()
            size = os.fstat(words.fileno()).st_size
            if size > said and outcome != "failed":
                spoken = os.pread(words.fileno(), 300, said)
                outcome, text = "failed", f"words: {spoken!r}"
            result["outcomes"][outcome] = result["outcomes"].get(outcome, 0) + 1
            if outcome == "failed":
                result["failures"].append({"number": number, "text": text})
            state.write(f"{outcome}\n")
            state.flush()
            if number % 200 == 0:
                gc.collect()
    finally:
        for number, copy in zip((1, 2), keep, strict=True):
            os.dup2(copy, number)
            os.close(copy)
        faulthandler.cancel_dump_traceback_later()
        words.close()
        state.close()
        shutil.rmtree(work, ignore_errors=True)
    return result


def main(arguments: list[str]) -> int:
    """``python -m fuzz.cases KIND[,KIND...] FIRST COUNT FOLDER``: batches; results as JSON in FOLDER/result."""
    names, first, count, folder = arguments
    results = [
        run_batch(kind, int(first), int(count), Path(folder), limited=i == 0) for i, kind in enumerate(names.split(","))
    ]
    (Path(folder) / "result").write_text(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
