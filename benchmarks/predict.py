"""End-to-end prediction: points per second by stage, memory, and how both grow with the system.

Each system is predicted to a file in a process of its own, so that the peak memory is that of one run.

    python benchmarks/predict.py --atoms 4000 32000 108000 500000 --spacing 0.5 --json out.json
    python benchmarks/predict.py --slab 704 --json slab.json

The second is a box, so many points wide, of the paper's largest system, 4.1 million aluminium atoms at its production
mesh, with sigma and sums of blocks of 4^3 points kept; the time for the whole follows from its rate.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

PAPER_CELLS = 101
"""Unit cells along each axis: 4.1 million atoms."""


def aluminium(n_atoms: int, seed: int = 0):
    """About `n_atoms` atoms of fcc aluminium, displaced by 0.1 angstrom at random."""
    from ase.build import bulk

    n = max(1, round((n_atoms / 4) ** (1 / 3)))
    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(n)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, atoms.positions.shape)
    return atoms


def one(n_atoms: int, spacing: float, uncertainty: str | None, precision: str, folder: Path) -> dict[str, Any]:
    """Predict one system; a result row."""
    import gpurho

    atoms = aluminium(n_atoms)
    # Loading, compiling and the first calls of every library are not what is measured.
    gpurho.predict(aluminium(32), spacing=0.4, uncertainty=uncertainty, precision=precision, progress=False)
    out = folder / f"al{len(atoms)}.h5"
    start = time.perf_counter()
    rho = gpurho.predict(atoms, spacing=spacing, uncertainty=uncertainty, precision=precision, out=out, progress=False)
    seconds = time.perf_counter() - start
    timing = rho.info["timing"]
    return {
        "atoms": len(atoms),
        "points": rho.grid.n_points,
        "seconds": seconds,
        "points_per_second": rho.grid.n_points / seconds,
        "microseconds_per_atom": seconds / len(atoms) * 1e6,
        "share": {k: timing[k] / timing["total"] for k in ("setup", "features", "network", "wait")},
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "file_bytes": out.stat().st_size,
        "electrons_per_atom": rho.electrons / len(atoms),
    }


def exponent(rows: list[dict[str, Any]]) -> float:
    """Slope of log(seconds) over log(atoms)."""
    return float(np.polyfit(np.log([r["atoms"] for r in rows]), np.log([r["seconds"] for r in rows]), 1)[0])


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import os
    import platform

    import torch

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x), "?"
    )
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--atoms", type=int, nargs="+", default=[4000, 32000, 108000])
    parser.add_argument("--spacing", type=float, default=0.5, help="angstrom")
    parser.add_argument("--uncertainty", choices=["none", "analytic", "sampled"], default="none")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    parser.add_argument("--slab", type=int, help="points along each edge of a box of the paper's largest system")
    parser.add_argument("--folder", type=Path, help="where the fields are written (a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    uncertainty = None if args.uncertainty == "none" else args.uncertainty
    if args.child:
        print(json.dumps(one(args.atoms[0], args.spacing, uncertainty, args.precision, args.folder)))
        return
    if args.slab:
        from gpu_check import slab

        found = slab(PAPER_CELLS, args.slab, 64, "auto", "cpu")
        found["peak_rss_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        write(args.json, {"machine": machine(), "slab": found})
        return
    rows = []
    print(
        f"{'atoms':>9} {'points':>12} {'s':>8} {'points/s':>10} {'us/atom':>8}"
        f" {'features':>8} {'network':>8} {'GiB':>6}"
    )
    for n in args.atoms:
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            command = [sys.executable, __file__, "--child", "--atoms", str(n), "--spacing", str(args.spacing)]
            command += ["--uncertainty", args.uncertainty, "--precision", args.precision, "--folder", folder]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{n:>9} failed: {done.stderr.strip().splitlines()[-1:]}")
            continue
        row = json.loads(done.stdout.strip().splitlines()[-1])
        rows.append(row)
        print(
            f"{row['atoms']:>9} {row['points']:>12} {row['seconds']:>8.1f} {row['points_per_second']:>10.3g}"
            f" {row['microseconds_per_atom']:>8.1f} {row['share']['features']:>8.1%} {row['share']['network']:>8.1%}"
            f" {row['peak_rss_gib']:>6.2f}",
            flush=True,
        )
    result: dict[str, Any] = {
        "machine": machine(),
        "spacing": args.spacing,
        "uncertainty": args.uncertainty,
        "rows": rows,
    }
    if len(rows) > 1:
        result["exponent"] = exponent(rows)
        print(f"time grows as atoms^{result['exponent']:.3f}")
    if args.json:
        write(args.json, result)


def write(path: Path | None, result: dict[str, Any]) -> None:
    """Write a result to a file, or print it."""
    text = json.dumps(result, indent=1)
    if path is None:
        print(text)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


if __name__ == "__main__":
    main()
