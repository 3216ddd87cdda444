"""What a GPU should do, by counting: instructions per grid point of the smooth descriptors, products of a network.

    python benchmarks/gpu_counts.py [--json FILE]

A prediction, not a measurement. It counts the PTX of the kernel that takes nearly all of the time: what lies outside of
loops once, loops over atoms as often as a batch of points of a real crystal has atoms around it, loops that write
features once for every four. Divided by what the processor can issue it gives an upper bound, of which such kernels
reach about `SHARE`. The shipped networks are small: there the bytes that they move count. Of the paper's network it
counts the products, of which the device does `MATRIX_SHARE` of its peak. Needs numba-cuda and a CUDA tool chain from
PyPI, but no GPU.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from sass_check import shipped

if TYPE_CHECKING:
    from gpurho.kernels.smooth import SmoothSizes

DEVICES = {"H200": (132, 128, 1.98e9, 4.8e12), "A100": (108, 64, 1.41e9, 1.6e12), "V100": (80, 64, 1.53e9, 0.9e12)}
"""Name -> (multiprocessors, float32 lanes of each, clock in Hz, memory in byte/s), from the vendor's data sheets."""
SHARE = 0.5
"""Of the issue rate that a kernel of long dependent chains is expected to reach."""
MATRIX_PEAK = {"H200": 989e12, "A100": 312e12, "V100": 15.7e12}
"""Operations per second of products in bfloat16 (V100: float32, as it has none), from the vendor's data sheets."""
MATRIX_SHARE = 0.4
"""Of that peak: the least that the fused network is to reach."""
PAPER_NETWORK = [(250, 105)] + 8 * [(250, 250)] + [(2, 250)]
"""Outputs and inputs of the layers of the paper's network, 3 blocks of 3 layers, for 105 descriptors."""
PASSES = {"mean": 1, "analytic": 3}
"""Products of every layer: with the means, with the variances of the weights, and on the way back."""
PAPER_POINTS = 175**3 / 1372 * 4.1e6
"""Grid points of 4.1 million aluminium atoms at the paper's production mesh."""
CASES = {"al": ("Al",), "sige": ("Ge", "Si")}
"""Shipped models and their species."""
SPACING = 0.159
BATCH_EDGE = 4


def atoms_of_a_batch(species: tuple[str, ...], cutoff: float) -> dict[str, float]:
    """Mean number of atoms within the cutoff of the sphere around a batch of 4^3 points, by species."""
    from ase.build import bulk
    from scipy.spatial import cKDTree

    if species == ("Al",):
        atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(8)
    else:
        atoms = bulk("Si", "diamond", 5.545, cubic=True).repeat(6)
        atoms.symbols[np.random.default_rng(0).permutation(len(atoms))[::2]] = "Ge"
    radius = np.sqrt(3) / 2 * (BATCH_EDGE - 1) * SPACING
    centre = atoms.cell.array.sum(0) / 2
    places = centre + np.random.default_rng(1).uniform(-8, 8, (2000, 3))
    found = {}
    for symbol in species:
        tree = cKDTree(atoms.positions[atoms.symbols == symbol])
        found[symbol] = float(np.mean([len(hits) for hits in tree.query_ball_point(places, cutoff + radius)]))
    return found


def kernel_ptx(sizes: SmoothSizes) -> str:
    """PTX of the kernel of all features."""
    from numba import cuda

    from gpurho.kernels._cuda_sources import kernel_sources

    source = kernel_sources(sizes)["expand"]
    device = types.SimpleNamespace(compute_capability=(9, 0))
    with mock.patch("numba.cuda.dispatcher.get_current_device", return_value=device):
        return cuda.compile_ptx(source.make(), source.signature, cc=(9, 0), **source.options)[0]


def loops(ptx: str) -> tuple[int, list[list[str]]]:
    """Instructions outside of loops, and the operations of each loop."""
    places: dict[str, int] = {}
    body: list[str] = []
    for line in map(str.strip, ptx.splitlines()):
        if re.fullmatch(r"\$L\w+:", line):
            places[line[:-1]] = len(body)
        elif line and line[0] not in ".{})(/":
            body.append(line)
    found = []
    for i, line in enumerate(body):
        jump = re.search(r"\bbra(?:\.uni)?\s+(\$\w+)", line)
        if jump and places.get(jump.group(1), i + 1) <= i:
            found.append([re.sub(r"^@!?%p\d+\s+", "", x).split()[0] for x in body[places[jump.group(1)] : i + 1]])
    return len(body) - sum(map(len, found)), found


def count(species: tuple[str, ...], sizes: SmoothSizes) -> dict[str, Any]:
    """Instructions per grid point, by part."""
    around = atoms_of_a_batch(species, sizes.cutoff)
    straight, parts = loops(kernel_ptx(sizes))
    over_atoms = [part for part in parts if sum(name.startswith("fma") for name in part) >= 50]
    writing = max((len(part) for part in parts if sum(name.startswith("st.") for name in part) == 4), default=0)
    # Loops over the atoms of one species after the other, in each pass.
    numbers = [around[species[i % len(species)]] for i in range(len(over_atoms))]
    atoms = sum(len(part) * n for part, n in zip(over_atoms, numbers, strict=True))
    return {
        "atoms_of_a_batch": around,
        "instructions_per_atom": [len(part) for part in over_atoms],
        "over_atoms": atoms,
        "writing_features": writing * sizes.n_features / 4,
        "outside_of_loops": straight,
        "total": atoms + writing * sizes.n_features / 4 + straight,
    }


def paper_network() -> dict[str, Any]:
    """Points per second of the paper's network alone, by kind of uncertainty and device."""
    operations = 2 * sum(rows * columns for rows, columns in PAPER_NETWORK)
    found: dict[str, Any] = {"operations_of_mean": operations, "share_of_peak": MATRIX_SHARE}
    for kind, passes in PASSES.items():
        found[kind] = {name: MATRIX_SHARE * peak / (passes * operations) for name, peak in MATRIX_PEAK.items()}
    return found


def main(arguments: list[str] | None = None) -> int:
    """Count and print; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = {"share_of_issue_rate": SHARE, "paper_points": PAPER_POINTS, "models": {}}
    from gpurho.kernels.smooth import SmoothSizes

    for name, species in CASES.items():
        sizes = SmoothSizes(**shipped(name))
        row = count(species, sizes)
        # Features written and read again once, results written.
        row["bytes"] = 2 * 4 * sizes.n_features + 12
        row["points_per_second"] = {
            device: 1 / (row["total"] / (SHARE * units * lanes * clock) + row["bytes"] / memory)
            for device, (units, lanes, clock, memory) in DEVICES.items()
        }
        row["paper_seconds"] = {d: PAPER_POINTS / rate for d, rate in row["points_per_second"].items()}
        report["models"][name] = row
        print(name, json.dumps(row, indent=1))
    report["paper_network"] = paper_network()
    print("the paper's network", json.dumps(report["paper_network"], indent=1))
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
