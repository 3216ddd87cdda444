"""Compile every CUDA kernel of the descriptors to machine code, without a GPU, and print registers and spills.

    python benchmarks/sass_check.py [--arch 80 90] [--json FILE]

Needs numba-cuda and a CUDA tool chain from PyPI (the extra ``cuda13``; for compute capability 7.0 ``cuda12``). The
exit status is 1 where a kernel spills registers or does not compile, and 3 where a tool is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Any
from unittest import mock

MODELS = Path(__file__).parent.parent / "gpurho" / "data"


def shipped(name: str) -> dict[str, Any]:
    """Sizes of the smooth descriptors of a shipped model, from the head of its file, without torch."""
    with open(MODELS / f"{name}.safetensors", "rb") as file:
        head = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    spec = json.loads(head["__metadata__"]["gpurho"])["descriptor"]
    sizes = {key: spec[key] for key in ("n_radial", "n_basis", "l_max", "cutoff")}
    rows = tuple(tuple(tuple(row) for row in block) for block in spec["contraction"])
    return {"n_species": len(spec["species"]), **sizes, "contraction": rows}


NUMBERS = {"n_distances": 60, "n_angle_atoms": 15, "n_angle_neighbors": 3, "cutoff": 9.0}
SPECIFICATIONS = {
    "Al": ("FeatureSizes", {**NUMBERS, "n_species": 1, "n_cross": 0}),
    "SiGe": ("FeatureSizes", {**NUMBERS, "n_species": 2, "n_cross": 4}),
    "Al smooth": ("SmoothSizes", {"n_species": 1, "n_radial": 20, "n_basis": 6, "l_max": 4, "cutoff": 5.0}),
    "SiGe smooth": ("SmoothSizes", {"n_species": 2, "n_radial": 20, "n_basis": 6, "l_max": 4, "cutoff": 5.0}),
    "al": ("SmoothSizes", shipped("al")),
    "sige": ("SmoothSizes", shipped("sige")),
    "Al smooth, large": ("SmoothSizes", {"n_species": 1, "n_radial": 24, "n_basis": 8, "l_max": 6, "cutoff": 6.5}),
}
"""Of the scalar-product family the paper's, for one species and for two with cross cosines; of the smooth one the
defaults, those of the shipped models, and a larger one."""

PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
    "stack": r"(\d+) bytes stack frame",
    "shared": r"(\d+) bytes smem",
}


class ToolMissing(RuntimeError):
    """A compiler is not installed."""


def find_ptxas() -> str:
    """The assembler of the installed CUDA packages."""
    spec = importlib.util.find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            return str(path)
    raise ToolMissing("ptxas is not installed; pip install 'gpurho[cuda13]' (or 'gpurho[cuda12]' for sm_70)")


def assemble(ptx: str, arch: int, ptxas: str) -> dict[str, int]:
    """Machine code of one PTX module; what the assembler says of its resources."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [ptxas, f"-arch=sm_{arch}", "-v", str(source), "-o", str(source.with_suffix(".cubin"))]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"ptxas: {result.stderr.strip().splitlines()[0]}")
    # With several functions in a module the worst counts.
    found = {name: [int(x) for x in re.findall(pattern, result.stderr)] for name, pattern in PATTERNS.items()}
    return {name: max(values, default=0) for name, values in found.items()}


def compile_kernel(source: Any, arch: int, ptxas: str) -> dict[str, int]:
    """Registers, spills (bytes), stack (bytes) and shared memory (bytes) of a `KernelSource`."""
    from numba import cuda

    capability = divmod(arch, 10)
    # Numba asks the current device for the target of device functions.
    device = types.SimpleNamespace(compute_capability=capability)
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        ptx, _ = cuda.compile_ptx(source.make(), source.signature, cc=capability, **source.options)
    return assemble(ptx, arch, ptxas)


def check_arch(arch: int, names: list[str] | None = None) -> list[dict[str, Any]]:
    """A row for every kernel of every specification; `names` keeps the kernels that it holds."""
    from gpurho.kernels._cuda_sources import kernel_sources
    from gpurho.kernels.scalar_product import FeatureSizes
    from gpurho.kernels.smooth import SmoothSizes

    families: dict[str, Any] = {"FeatureSizes": FeatureSizes, "SmoothSizes": SmoothSizes}
    ptxas = find_ptxas()
    rows: list[dict[str, Any]] = []
    for label, (family, numbers) in SPECIFICATIONS.items():
        for name, source in kernel_sources(families[family](**numbers)).items():
            if names and name not in names:
                continue
            start = time.perf_counter()
            row: dict[str, Any] = {"spec": label, "kernel": name, "arch": f"sm_{arch}"}
            try:
                row |= compile_kernel(source, arch, ptxas)
            except Exception as error:  # every failure is a row of the table, and fails the check
                row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
    return rows


def failed(row: dict[str, Any]) -> bool:
    """Whether a kernel spills or did not compile."""
    return "error" in row or row["spill_stores"] > 0 or row["spill_loads"] > 0


def default_archs() -> list[int]:
    """What the installed tool chain is checked for."""
    from cuda.bindings import nvrtc

    status, major, _ = nvrtc.nvrtcVersion()
    if int(status) != 0:
        raise ToolMissing("nvrtc is not installed; pip install 'gpurho[cuda13]'")
    return [80, 90] if major >= 13 else [70, 80, 90]


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text."""
    heads = ["spec", "kernel", "arch", *PATTERNS, "seconds"]
    lines = [heads] + [[str(row.get(head, row.get("error", ""))) for head in heads] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    return "\n".join("  ".join(x.ljust(w) for x, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", help="for instance 80 90; default: what the tool chain has")
    parser.add_argument("--kernels", nargs="+", help="names of kernels; default: all")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("numba_cuda") is None:
        print("numba-cuda is not installed; pip install 'gpurho[cuda13]'", file=sys.stderr)
        return 3
    try:
        find_ptxas()
        archs = options.arch or default_archs()
    except (ToolMissing, ImportError) as error:
        print(error, file=sys.stderr)
        return 3
    # Numba keeps one compiled version of a device function: a process per architecture.
    with multiprocessing.get_context("spawn").Pool(options.processes, maxtasksperchild=1) as pool:
        parts = pool.starmap(check_arch, [(arch, options.kernels) for arch in archs], chunksize=1)
    rows = [row for part in parts for row in part]
    print(table(rows))
    bad = [row for row in rows if failed(row)]
    print(f"{len(rows)} kernels, {len(bad)} spill registers or do not compile")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if bad or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
