"""GPAW against Quantum ESPRESSO: the same atoms, pseudopotentials, cutoff and k-mesh; agreement and time.

    python benchmarks/engines.py al32.xyz --meshes 1x1x1 2x2x2:0.5 --json out.json

Time is processor time of the calculation and its children, so that other work on the machine counts for less.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from gpurho.dft.base import DFTSettings, KMesh
from gpurho.dft.engines import make_engine
from gpurho.dft.grids import fourier_resample
from gpurho.pipelines.converge import parse_mesh
from gpurho.pipelines.structures import read_structures
from gpurho.structure import as_structure
from gpurho.units import HARTREE


def spent() -> float:
    """Processor seconds of this process and its finished children."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def compare(path: Path, mesh: KMesh, cutoff: float | None) -> dict[str, Any]:
    """Both engines on one structure; a result row."""
    structure = as_structure(read_structures(path)[-1])
    settings = DFTSettings(kmesh=mesh, cutoff=cutoff)
    settings = replace(settings, grid=settings.fft_shape(structure))
    labels, seconds = {}, {}
    for name in ("qe", "gpaw"):
        engine = make_engine(name)
        start = spent()
        labels[name] = engine.ground_state(structure, settings)
        seconds[name] = spent() - start
    qe, gpaw = labels["qe"], labels["gpaw"]
    density = fourier_resample(gpaw.density, qe.density.shape)
    per_atom = 1000 / HARTREE / len(structure)
    forces = 0.0 if qe.forces is None or gpaw.forces is None else float(np.abs(qe.forces - gpaw.forces).max())
    return {
        "structure": path.name,
        "atoms": len(structure),
        "kmesh": str(mesh),
        "cutoff_ev": qe.settings.cutoff,
        "l1_percent": 100 * float(np.abs(density - qe.density).sum() / qe.density.sum()),
        "free_energy_mha_per_atom": (gpaw.energies.free_energy - qe.energies.free_energy) * per_atom,
        "largest_force_difference_ev_per_angstrom": forces,
        "cpu_seconds": seconds,
        "iterations": {name: label.iterations for name, label in labels.items()},
        "versions": {name: label.engine for name, label in labels.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structure", type=Path)
    parser.add_argument("--meshes", nargs="+", default=["1x1x1"], metavar="MESH")
    parser.add_argument("--cutoff", type=float, metavar="EV")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for text in options.meshes:
        rows.append(compare(options.structure, parse_mesh(text), options.cutoff))
        print(json.dumps(rows[-1]), flush=True)
        if options.json is not None:
            record = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "rows": rows}
            options.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
