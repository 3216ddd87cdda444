"""Compile the fused network to machine code, without a GPU, and print registers, spills and shared memory.

    python benchmarks/fused_check.py [--arch 80 90] [--networks al] [--modes analytic] [--json FILE]

Needs Triton, which brings its assembler. The exit status is 1 where a kernel spills registers, asks for more shared
memory than a block has, or does not compile, and 3 without Triton.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NETWORKS = {"al": (100, 32, 2), "sige": (344, 32, 2), "1 x 3 x 64": (100, 64, 3), "1 x 2 x 128": (100, 128, 2)}
"""Name -> (features, width, hidden layers)."""
MODES = {0: "mean", 1: "analytic", 2: "last-layer", 3: "sampled"}
SHARED = {80: 163 * 1024, 90: 227 * 1024}
"""Bytes of shared memory that a block can have, by architecture."""
TENSORS = ("first", "first_variance", "hidden", "hidden_variance")
"""Arguments of the type of the products' factors."""
PATTERNS = {
    "registers": r"Used (\d+) registers",
    "spill_stores": r"(\d+) bytes spill stores",
    "spill_loads": r"(\d+) bytes spill loads",
}


def compile_network(n_features: int, width: int, n_hidden: int, mode: int, precision: str, arch: int) -> dict[str, int]:
    """Registers, spills (bytes) and shared memory (bytes) of one kernel."""
    import triton
    import triton.language as tl
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from gpurho.fused import CHUNK, block, kernel

    function = kernel()
    points, warps = block(width, mode)
    constants = {
        "N_FEATURES": n_features,
        "WIDTH": width,
        "N_HIDDEN": n_hidden,
        "POINTS": points,
        "CHUNK": CHUNK,
        "TYPE": tl.bfloat16 if precision == "bf16" else tl.float32,
        "MODE": mode,
        "DECAYS": False,
        "BASELINE": True,
    }
    factors = "*bf16" if precision == "bf16" else "*fp32"
    signature, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name == "n_points":
            signature[name] = "i32"
        else:
            signature[name] = factors if name in TENSORS else "*fp32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    places = {(function.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(function, signature, places, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return {**_resources(made.asm["ptx"], arch), "shared": int(made.metadata.shared), "warps": warps}


def _resources(ptx: str, arch: int) -> dict[str, int]:
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.ptx")
        path.write_text(ptx)
        name = f"sm_{arch}a" if arch == 90 else f"sm_{arch}"
        command = [knobs.nvidia.ptxas.path, "-v", f"-arch={name}", str(path), "-o", str(path.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas: {done.stderr.strip().splitlines()[0]}")
    return {name: max(map(int, re.findall(pattern, done.stderr)), default=0) for name, pattern in PATTERNS.items()}


def check(arch: int, networks: list[str], modes: list[str]) -> list[dict[str, Any]]:
    """A row for every network, mode and precision."""
    rows = []
    for label in networks:
        n_features, width, n_hidden = NETWORKS[label]
        for mode, name in ((mode, name) for mode, name in MODES.items() if name in modes):
            for precision in ("fp32", "bf16"):
                start = time.perf_counter()
                row: dict[str, Any] = {"network": label, "mode": name, "precision": precision, "arch": f"sm_{arch}"}
                try:
                    row |= compile_network(n_features, width, n_hidden, mode, precision, arch)
                except Exception as error:  # every failure is a row of the table, and fails the check
                    row["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                rows.append({**row, "seconds": round(time.perf_counter() - start, 1)})
    return rows


def failed(row: dict[str, Any]) -> bool:
    """Whether a kernel spills, is too large or did not compile."""
    if "error" in row:
        return True
    return row["spill_stores"] + row["spill_loads"] > 0 or row["shared"] > SHARED[int(row["arch"][3:])]


def main(arguments: list[str] | None = None) -> int:
    """Run the check; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED))
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--modes", nargs="+", default=list(MODES.values()), choices=MODES.values())
    parser.add_argument("--json", type=Path, help="file for the table")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed; pip install triton", file=sys.stderr)
        return 3
    rows = []
    for arch in options.arch:
        for row in check(arch, options.networks, options.modes):
            rows.append(row)
            print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)
    bad = [row for row in rows if failed(row)]
    print(f"{len(rows)} kernels, {len(bad)} spill registers, are too large or do not compile")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
