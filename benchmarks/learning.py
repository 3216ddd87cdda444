"""What decides the accuracy of a model, and what it costs: descriptors, targets, sizes of networks, roads to a model.

    python benchmarks/learning.py --json benchmarks/results/learning.json --plot benchmarks/results/learning.png

Aluminium, the data of benchmarks/data, split by snapshots. Networks are deterministic (``estimator="none"``), all else
is the default of ``gpurho train`` unless an entry says so. Every entry is trained once and kept in the JSON: run again
after a kill it goes on. ``--only families`` does one part, ``--costs`` measures what a grid point costs, best on a
quiet machine.

- families: the paper's descriptors and the smooth ones, density and delta targets; the same network, points, epochs.
- sizes: from Bayesian linear regression to the paper's network of three blocks of three layers of 250.
- data: the default on half, and a quarter, of the snapshots.
- roads: labels of the Gamma point of small cells and then of larger ones (the paper's road, as its Table VI suggests),
  of large cells alone, converged k-points in small cells alone, and those with transfer, at equal DFT cost.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from gpurho.trainsettings import FAMILY_DEFAULTS

HERE = Path(__file__).resolve().parent
DATA = HERE / "data"
EDGE = 24
"""Costs are those of a tile of so many points along each axis."""

NETWORK = {"blocks": 1, "layers": 3, "width": 64}
"""That of everything but the comparison of sizes."""

PAPER_SIZES = {"family": "scalar-product", "n_distances": 60, "n_angle_atoms": 15, "n_angle_neighbors": 3}
LIKE_SMOOTH = {
    k: v for k, v in FAMILY_DEFAULTS["smooth"].items() if k not in ("cutoff", "target", "estimator", *NETWORK)
}
"""What the family "scalar-product" needs to be trained as the other one is."""

FAMILIES: dict[str, dict[str, Any]] = {
    "paper's descriptors, density": {**PAPER_SIZES, **LIKE_SMOOTH},
    "smooth, density": {"target": "density"},
    "smooth, delta": {},
    "smooth, delta, channels not learned": {"contraction": None},
    "smooth, delta, cutoff 5": {"cutoff": 5.0},
    "smooth, delta, cutoff 7.5": {"cutoff": 7.5, "n_radial": 18},
}
SIZES: dict[str, dict[str, Any]] = {
    "linear": {"blocks": 0},
    "1 x 2 x 32": {"layers": 2, "width": 32},
    "1 x 3 x 32": {"layers": 3, "width": 32},
    "1 x 3 x 64": {"layers": 3, "width": 64},
    "2 x 3 x 64": {"blocks": 2, "layers": 3, "width": 64},
    "1 x 3 x 128": {"layers": 3, "width": 128},
    "3 x 3 x 250": {"blocks": 3, "layers": 3, "width": 250, "learning_rate": 1e-3},
}
SHARES = {"half": 2, "quarter": 4}

TEST_108 = (0, 2, 4)
"""Of al108.h5: 315, 1090 and 1866 K. Roads are tested on these and on the test snapshots of al32.h5."""

ROADS: dict[str, list[tuple[str, int]]] = {
    "Gamma 32, then Gamma 108": [("al32_gamma", 28), ("al108_gamma", 9)],
    "Gamma 108": [("al108_gamma", 12)],
    "k-points 32": [("al32", 7)],
    "k-points 32, twice the cost": [("al32", 16)],
    "k-points 32, then 108, twice the cost": [("al32", 5), ("al108", 1)],
}
"""Data sets in the order of training, and how many snapshots of each."""


def split() -> tuple[list[int], list[int], list[int]]:
    """Training, validation and test snapshots of al32.h5, those of ``gpurho train``."""
    from gpurho.datasets import open_dataset
    from gpurho.trainingset import split_snapshots

    chosen = split_snapshots(open_dataset(DATA / "al32.h5"))
    return list(chosen.train), list(chosen.validation), list(chosen.test)


def spread(values: list[int], n: int) -> list[int]:
    """`n` of the values, evenly."""
    return [values[int(k)] for k in np.linspace(0, len(values) - 1, n).round()]


def trained(folder: Path, name: str, train_on: list[int], settings: dict[str, Any], start: Any = None) -> Any:
    """A model trained on those snapshots of a data set; the others are watched, and decide nothing."""
    from gpurho.datasets import open_dataset
    from gpurho.pipelines.train import train
    from gpurho.pipelines.transfer import transfer

    data = open_dataset(DATA / f"{name}.h5")
    rest = [i for i in range(len(data)) if i not in train_on]
    options: dict[str, Any] = {
        "test": rest[:1],
        "validation": rest[1:],
        "progress": False,
        "estimator": "none",
        "resume": False,
        "overwrite": True,
        **NETWORK,
        **settings,
    }
    # A few snapshots are seen as often as all of them would be.
    options["points_per_snapshot"] = max(12_000, 470_000 // len(train_on) // 3)
    path = folder / f"{name}.safetensors"
    result = train(data, path, **options) if start is None else transfer(start, data, path, **options)
    return result.model


def figures(model: Any, name: str, snapshots: list[int]) -> dict[str, float]:
    """Pooled errors over snapshots of a data set."""
    from gpurho.pipelines.evaluate import evaluate

    total = evaluate(model, DATA / f"{name}.h5", snapshots=snapshots, uncertainty=None, progress=False).total
    return {"rmse_e_per_bohr3": total["rmse_bohr"], "nrmse": total["nrmse"], "l1": total["l1_per_electron"]}


def untrained(settings: dict[str, Any]) -> Any:
    """A model of these settings with random weights, which costs what a trained one costs."""
    import torch

    from gpurho.layers import DensityNetwork
    from gpurho.model import DensityModel, ModelSpec
    from gpurho.trainsettings import TrainingSettings

    chosen = TrainingSettings(**settings)
    descriptor = chosen.descriptor(["Al"])
    spec = ModelSpec(descriptor, {"Al": 3.0}, chosen.network(), 0.2, 0.05, chosen.distance_length)
    torch.manual_seed(0)
    network = DensityNetwork(spec.network, descriptor.n_features, spec.distance_columns(), spec.distance_length)
    return DensityModel.from_network(spec, network)


def costs(settings: dict[str, Any]) -> dict[str, float]:
    """Processor microseconds per grid point: descriptors, mean, and mean with the analytic sigma; one thread."""
    import torch

    from gpurho.datasets import open_dataset
    from gpurho.descriptors import Environment
    from gpurho.partition import Tile

    model = untrained(settings)
    snapshot = open_dataset(DATA / "al32.h5")[30]
    tile = Tile(0, (0, 0, 0), (EDGE, EDGE, EDGE))
    environment = Environment(snapshot.structure, model.spec.descriptor)
    best: dict[str, float] = {}
    for _ in range(6):
        start = time.process_time()
        features = torch.from_numpy(environment.tile_features(snapshot.grid, tile).values)
        best["descriptors_us"] = min(best.get("descriptors_us", np.inf), (time.process_time() - start))
        for kind in (None, "analytic"):
            evaluator = model.evaluator(uncertainty=kind)
            evaluator(features)
            start = time.process_time()
            evaluator(features)
            key = f"{kind or 'mean'}_us"
            best[key] = min(best.get(key, np.inf), time.process_time() - start)
    return {key: round(seconds / tile.n_points * 1e6, 4) for key, seconds in best.items()}


def dft_seconds(name: str, n: int) -> float:
    """Recorded wall seconds of `n` labels, from the median of a set."""
    from gpurho.datasets import open_dataset

    data = open_dataset(DATA / f"{name}.h5")
    return n * float(np.median([data.meta(i)["seconds"] for i in range(len(data))]))


def road(folder: Path, steps: list[tuple[str, int]]) -> dict[str, Any]:
    """One road to a model: trained on the first set, and on the later ones by transfer."""
    from gpurho.datasets import open_dataset

    train32, _, test32 = split()
    data = open_dataset(DATA / "al108.h5")
    tested = {data[i].structure.fingerprint() for i in TEST_108}
    model = None
    for name, n in steps:
        if "32" in name:
            free = train32
        else:
            other = open_dataset(DATA / f"{name}.h5")
            free = [i for i in range(len(other)) if other[i].structure.fingerprint() not in tested]
        model = trained(folder, name, spread(free, n), {}, model)
    return {
        "labels": [{"set": name, "snapshots": n} for name, n in steps],
        "dft_seconds": round(sum(dft_seconds(name, n) for name, n in steps)),
        "al32": figures(model, "al32", test32),
        "al108": figures(model, "al108", list(TEST_108)),
    }


def entries() -> dict[str, dict[str, Any]]:
    """All of them by part and name, as functions of a folder."""
    train32, _, test32 = split()

    def one(settings: dict[str, Any], which: list[int]) -> Any:
        def compute(folder: Path) -> dict[str, Any]:
            start = time.process_time()
            model = trained(folder, "al32", which, settings)
            seconds = time.process_time() - start
            return {
                "features": model.spec.descriptor.n_features,
                "train_cpu_seconds": round(seconds),
                **figures(model, "al32", test32),
            }

        return compute

    return {
        "roads": {name: (lambda folder, s=steps: road(folder, s)) for name, steps in ROADS.items()},
        "families": {name: one(settings, train32) for name, settings in FAMILIES.items()},
        "data": {name: one({}, train32[::step]) for name, step in SHARES.items()},
        "sizes": {name: one(settings, train32) for name, settings in SIZES.items()},
    }


def plot(record: dict[str, Any], path: Path) -> None:
    """Error against cost per point of the sizes, and errors of the roads."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    colours = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for part, marker in (("sizes", "o"), ("families", "s")):
        for k, (name, row) in enumerate(record.get(part, {}).items()):
            if "mean_us" in row:
                x = row["descriptors_us"] + row["mean_us"]
                left.plot(x, 100 * row["l1"], marker, color=colours[k], ms=7, alpha=0.8, label=name)
    left.set(xlabel="processor µs per grid point (mean)", ylabel="L1 per electron on test snapshots, %")
    left.set(xscale="log", yscale="log")
    left.set_yticks([0.4, 0.5, 0.7, 1.0, 1.3], ["0.4", "0.5", "0.7", "1.0", "1.3"], minor=False)
    left.set_xticks([0.3, 0.5, 1, 2], ["0.3", "0.5", "1", "2"], minor=False)
    left.minorticks_off()
    left.legend(fontsize=7, title="circles: size of the network", title_fontsize=7, loc="upper right")
    roads = record.get("roads", {})
    for k, row in enumerate(roads.values()):
        for shift, cells, colour in ((-0.18, "al32", "#0072b2"), (0.18, "al108", "#e69f00")):
            right.barh(k + shift, 100 * row[cells]["l1"], 0.34, color=colour, label=cells if k == 0 else None)
    right.set_yticks(range(len(roads)), [f"{n}\n({r['dft_seconds']} s of DFT)" for n, r in roads.items()], fontsize=7)
    right.invert_yaxis()
    right.set_xlabel("L1 per electron against converged k-points, %")
    if roads:
        right.legend(title="tested on", fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main() -> None:
    """Compute what is missing, write the JSON after every entry, then the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--costs", action="store_true", help="measure the cost per point of all entries, in one go")
    parser.add_argument("--only", choices=("roads", "families", "data", "sizes"))
    options = parser.parse_args()
    record: dict[str, Any] = json.loads(options.json.read_text()) if options.json.exists() else {}
    for part, members in entries().items():
        if options.only not in (None, part):
            continue
        rows = record.setdefault(part, {})
        for name, compute in members.items():
            if name in rows:
                continue
            with tempfile.TemporaryDirectory() as folder:
                rows[name] = compute(Path(folder))
            print(part, name, rows[name], flush=True)
            record["date"] = time.strftime("%Y-%m-%d")
            options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.costs:
        import numba
        import torch

        torch.set_num_threads(1)
        numba.set_num_threads(1)
        for part, members in (("families", FAMILIES), ("sizes", SIZES)):
            for name, row in record.get(part, {}).items():
                row.update(costs({**NETWORK, **members[name]}))
                print(part, name, {key: value for key, value in row.items() if key.endswith("_us")})
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    if options.plot is not None:
        plot(record, options.plot)


if __name__ == "__main__":
    main()
