"""Energies from predicted densities by one diagonalisation, against those of the labels.

    python benchmarks/energies.py al benchmarks/data/al32.h5 1 13 25 37 50 --json benchmarks/results/energies_al.json

The numbers are test snapshots of the data set. Each is predicted on the grid of its label, made to hold its electrons,
and given to Quantum ESPRESSO with the label's settings. What is done is kept in the JSON: run again it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

SHOWN = ("energy", "xc", "fermi_level", "eigenvalue")
"""Errors that are kept: of total and exchange-correlation energy (Ha/atom), Fermi level and worst eigenvalue (Ha)."""


def predicted(model: str, snapshot: Any) -> tuple[Any, dict[str, Any]]:
    """The density of a snapshot, and its error."""
    import gpurho
    from gpurho.metrics import l1_per_electron

    rho = gpurho.predict(
        snapshot.structure, model, grid=snapshot.grid, uncertainty=None, precision="fp32", conserve="uniform",
        progress=False,
    )  # fmt: skip
    reference, dv = np.asarray(snapshot.density, np.float64), snapshot.structure.volume / snapshot.grid.n_points
    error = l1_per_electron(reference, rho.mean, float(reference.sum() * dv), dv)
    facts = {"temperature": snapshot.meta.get("temperature_K"), "atoms": len(snapshot.structure), "density_l1": error}
    return np.asarray(rho.mean, np.float64), facts


def one(model: str, snapshot: Any) -> dict[str, Any]:
    """Errors of one snapshot."""
    from gpurho.dft.engines import make_engine
    from gpurho.pipelines.paper_work import energy_errors

    density, facts = predicted(model, snapshot)
    found = energy_errors(make_engine("qe"), snapshot, density)
    return {**facts, **{name: found[name] for name in SHOWN}}


def main(arguments: list[str] | None = None) -> int:
    """Compute and print; returns the exit status."""
    from gpurho.datasets import open_dataset

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("dataset", type=Path)
    parser.add_argument("snapshots", type=int, nargs="+")
    parser.add_argument("--json", type=Path, required=True, help="file of the results")
    options = parser.parse_args(arguments)
    data = open_dataset(options.dataset)
    report: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {"snapshots": {}}
    report |= {"model": options.model, "dataset": options.dataset.name}
    for number in options.snapshots:
        row = report["snapshots"].get(str(number))
        if row is None:
            row = report["snapshots"][str(number)] = one(options.model, data[number])
            options.json.write_text(json.dumps(report, indent=1) + "\n")
        print(number, json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
