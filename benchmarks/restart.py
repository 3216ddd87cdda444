"""Steps of self-consistency from a predicted density against those from superposed atoms, engine by engine.

``python benchmarks/restart.py --json benchmarks/results/restart.json`` takes one hot snapshot each of Al 32,
SiGe 64 and Al 107 with a vacancy from ``benchmarks/data``, none of them trained on, and solves each twice with the same
settings: from superposed pseudo-atoms, the default start, and from the density of a shipped model. Both
end at the same tolerance; their densities and energies are compared. Goes on from the JSON that is there.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from datetime import date
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
SYSTEMS = {
    "Al 32": ("al32.h5", "al"),
    "SiGe 64": ("sige64.h5", "sige"),
    "Al 107, vacancy": ("al_vacancies.h5", "al"),
}


def main() -> None:
    """Measure what is asked for and write the JSON after each calculation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--engines", nargs="+", default=["qe", "gpaw"])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--gamma", action="store_true", help="the Gamma point instead of the mesh of the labels")
    options = parser.parse_args()

    record = json.loads(options.json.read_text()) if options.json.is_file() else {"runs": {}}
    record.update(date=str(date.today()), machine=f"{platform.processor() or platform.machine()}, one core")
    for system in options.systems:
        for engine in options.engines:
            name = f"{system}; {engine}; {'Gamma' if options.gamma else 'k-points'}"
            if name not in record["runs"]:
                record["runs"][name] = measure(system, engine, options.gamma)
                options.json.write_text(json.dumps(record, indent=1) + "\n")
            print(name, json.dumps(record["runs"][name]), flush=True)


def measure(system: str, engine: str, gamma: bool) -> dict[str, object]:
    """Both starts of one system with one engine."""
    from gpurho.datasets import open_dataset
    from gpurho.dft.base import DFTSettings, KMesh
    from gpurho.dft.engines import make_engine
    from gpurho.model import load_model
    from gpurho.pipelines.evaluate import recorded_split
    from gpurho.pipelines.predict import predict

    file, name = SYSTEMS[system]
    model = load_model(name)
    snapshots = open_dataset(DATA / file)
    # The hottest one that the model has not seen: the farthest from the lattice, and from superposed atoms.
    unseen = recorded_split(model, snapshots).get("test", range(len(snapshots)))
    chosen = max(unseen, key=lambda i: snapshots[i].meta["temperature_K"])
    structure = snapshots[chosen].structure
    settings = DFTSettings(forces=False, **({"kmesh": KMesh((1, 1, 1))} if gamma else {})).at(structure)
    rho = predict(structure, model, grid=settings.shape(structure), uncertainty=None, progress=False)
    solver = make_engine(engine)
    found = {}
    for start, density in (("atoms", None), ("model", np.asarray(rho.mean, dtype=np.float64))):
        began = time.process_time(), time.perf_counter()
        label = solver.ground_state(structure, settings, density=density)
        found[start] = label
        print(system, engine, start, label.iterations, "steps", flush=True)
        found[start + " seconds"] = time.perf_counter() - began[1]
    atoms, started = found["atoms"], found["model"]
    electrons = started.electrons
    volume = structure.volume / atoms.density.size

    def l1(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).sum() * volume / electrons)

    predicted = np.asarray(rho.mean, dtype=np.float64)
    predicted *= electrons / (predicted.sum() * volume)
    return {
        "snapshot": f"{file} {chosen}, {snapshots[chosen].meta['temperature_K']:g} K",
        "kmesh": str(settings.kmesh),
        "tolerance": settings.tolerance,
        "steps": {"atoms": atoms.iterations, "model": started.iterations},
        "seconds": {"atoms": found["atoms seconds"], "model": found["model seconds"]},
        "l1_of_the_model": l1(predicted, atoms.density),
        "l1_between_ends": l1(started.density, atoms.density),
        "energy_between_ends_ha_per_atom": (started.energies.free_energy - atoms.energies.free_energy)
        / 27.211386
        / len(structure),
    }


if __name__ == "__main__":
    main()
