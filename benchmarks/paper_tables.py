"""Tables I and II of the paper redone on one machine in one run: its way, and gpurho in both of its forms.

Ways: "paper" is SciPy's cKDTree with NumPy cosines and an eager float32 network of 3 x 3 x 250 (`paper_way`);
"same" is gpurho with the same descriptors and the same network; "shipped" is gpurho with the shipped models `al` and
`sige` (smooth descriptors, one block of 2 x 32). The weights of the paper's network are random, which changes no time.

One thread throughout. The figures to compare are seconds of CPU time, of the best of a few rounds, since whatever else
the machine does only adds; wall seconds stand beside them. Most are measured on a box of the grid, about one cubic cell
of the crystal or a few, and scaled to all of its points, set-up excepted; each row says how many points were measured.
The mean of the largest aluminium cell is measured whole.

    python benchmarks/paper_tables.py --json tables.json --plot tables.png
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numba
import numpy as np
import torch
import torch.nn.functional as F
from descriptors import COSINE_TOLERANCE, DISTANCE_TOLERANCE, machine
from paper_report import KINDS, SAMPLES, TARGETS, plot, show
from paper_way import PaperDescriptors, PaperNetwork
from predict import aluminium

if TYPE_CHECKING:
    from ase import Atoms

    from gpurho.descriptors import DescriptorSpec
    from gpurho.model import DensityModel

Box = tuple[int, int, int]
TILE: Box = (64, 64, 64)
BOXES: dict[str, dict[str, Box]] = {
    "same": {"mean": TILE, "analytic": TILE, "last-layer": TILE, "sampled": (32, 32, 32)},
    "shipped": {"mean": TILE, "analytic": TILE, "last-layer": TILE, "sampled": (64, 64, 32)},
}
"""Points of the grid that each way and kind is measured on: a tile of the default shape, or part of one."""
PAPER_BOX, LOOP_BOX, CHECK_BOX = (32, 32, 32), (10, 10, 10), (16, 16, 16)
DENSITY_TOLERANCE = 1e-4
"""e/angstrom^3, between the plain network and gpurho in float32."""
TIED_SHARE = 0.01
"""Points whose cosines may be ordered otherwise, because two atoms are equally far to gpurho's tolerance."""


@dataclass
class System:
    """A column of the paper's tables: its grid, and its seconds there."""

    material: str
    atoms: Atoms
    grid: int
    published: dict[str, float]

    @property
    def name(self) -> str:
        return f"{self.material} {len(self.atoms)}"

    @property
    def n_points(self) -> int:
        return self.grid**3


def systems(quick: bool) -> list[System]:
    """Grids: 0.25 Bohr for Al (60^3 and 90^3 are the paper's, the others follow from the same step), 0.4 Bohr for SiGe
    (53^3, 79^3 and 132^3 are the paper's, 106^3 for 512 atoms follows)."""
    from gpurho.builders import alloy, rattled

    al = zip(
        (32, 108, 256, 500),
        (60, 90, 120, 150),
        (43.25, 151.52, 367.54, 739.58),
        (2.76, 9.67, 23.46, 47.20),
        strict=True,
    )
    sige = zip(
        (2, 3, 4, 5), (53, 79, 106, 132), (38.82, 115.23, 291.45, 611.2), (2.22, 7.37, 17.37, 33.05), strict=True
    )
    found = [System("Al", aluminium(n), g, {"descriptors": d, "network_cpu": w}) for n, g, d, w in al]
    for n, g, d, w in sige:
        atoms = rattled(alloy({"Si": 0.5, "Ge": 0.5}, (n, n, n), seed=n), 0.1, seed=n)
        found.append(System("SiGe", atoms, g, {"descriptors": d, "network_cpu": w}))
    return found[:1] + found[4:5] if quick else found


# --- models -------------------------------------------------------------------------------------------------------


def random_model(system: System, spec: DescriptorSpec, network: tuple[int, int, int]) -> DensityModel:
    """Random weights, standardised on points of the system so that every activation has its usual size."""
    from gpurho.descriptors import Environment
    from gpurho.layers import DensityNetwork, NetworkSpec, transform_features
    from gpurho.model import DensityModel, ModelSpec
    from gpurho.structure import as_structure

    rng = np.random.default_rng(0)
    points = rng.random((1000, 3)) @ system.atoms.cell.array
    features = torch.from_numpy(Environment(as_structure(system.atoms), spec).point_features(points).values)
    model = ModelSpec(
        spec,
        {s: 3.0 if s == "Al" else 4.0 for s in spec.species},
        NetworkSpec(*network),
        density_mean=0.2,
        density_std=0.1,
        distance_length=1.5,
        last_layer={"points": 0, "noise": "random"},
    )
    torch.manual_seed(0)
    net = DensityNetwork(model.network, spec.n_features, model.distance_columns(), model.distance_length)
    x = transform_features(features, net.columns, net.length)
    net.feature_mean.copy_(x.mean(0))
    net.feature_std.copy_(x.std(0).clamp(min=1e-3))
    base = DensityModel.from_network(ModelSpec(**{**vars(model), "last_layer": {}}), net)
    size = network[2] + 1
    # Fresh weights give nearly the same density everywhere, which would hide a difference.
    grown = {name: value * (3 if name.endswith("weight_mean") else 1) for name, value in base.tensors.items()}
    tensors = {**grown, "last_layer": torch.randn(size, size).mul_(0.01).tril_()}
    return DensityModel(model, tensors)


def models_of(system: System) -> dict[str, DensityModel]:
    """The paper's descriptors and network with random weights, and the shipped model."""
    from gpurho.descriptors import DescriptorSpec
    from gpurho.model import load_model

    if system.material == "Al":
        return {"same": random_model(system, DescriptorSpec(("Al",)), (3, 3, 250)), "shipped": load_model("al")}
    # The paper does not give its sizes for SiGe: those of Al for either species, and 4 x 4 cross cosines.
    spec = DescriptorSpec(("Si", "Ge"), n_cross=4, cutoff=12.0)
    return {"same": random_model(system, spec, (3, 3, 250)), "shipped": load_model("sige")}


# --- measurements -------------------------------------------------------------------------------------------------


def scaled(
    setup: float, descriptors: float, network: float, total: float, points: int, all_points: int
) -> dict[str, Any]:
    """CPU seconds for all points of a grid from those of some of them."""
    factor = all_points / points
    whole = setup + (total - setup) * factor
    return {
        "points_measured": points,
        "fraction_measured": points / all_points,
        "cpu_seconds_measured": total,
        "cpu_seconds": whole,
        "cpu_seconds_setup": setup,
        "points_per_cpu_second": all_points / whole,
        "share": {
            "descriptors": descriptors * factor / whole,
            "network": network * factor / whole,
            "rest": 1 - (descriptors + network) * factor / whole,
        },
    }


def corner(system: System, box: Box) -> list[tuple[int, int]]:
    """The box of grid points at the cell's corner, at most the whole grid."""
    return [(0, min(n, system.grid)) for n in box]


def paper_points(system: System, box: Box) -> np.ndarray:
    """Grid points (n, 3) of the box."""
    from gpurho.grid import Grid

    return Grid((system.grid,) * 3, system.atoms.cell.array).points((0, 0, 0), [b for _, b in corner(system, box)])


def measure_paper(system: System, model: DensityModel) -> dict[str, Any]:
    """The paper's way: its mean, the samples that follow from it, and Algorithm 1 taken by the letter."""
    points = paper_points(system, PAPER_BOX)
    network = PaperNetwork(model)
    network.density(np.ones((64, model.spec.descriptor.n_features), np.float32))
    wall, t0 = time.perf_counter(), time.process_time()
    descriptors = PaperDescriptors(system.atoms, model.spec.descriptor)
    t1 = time.process_time()
    features = descriptors.features(points)
    t2 = time.process_time()
    network.density(features)
    t3 = time.process_time()
    wall = time.perf_counter() - wall
    n, most = len(points), system.n_points
    mean = scaled(t1 - t0, t2 - t1, t3 - t2, t3 - t0, n, most)
    few = paper_points(system, LOOP_BOX)
    t4 = time.process_time()
    descriptors.features_point_by_point(few)
    t5 = time.process_time()
    loop = (t5 - t4) / len(few) * n
    sampled = SAMPLES * (t3 - t2)
    return {
        "mean": {**mean, "wall_seconds_measured": wall},
        f"sampled-{SAMPLES}": {
            **scaled(t1 - t0, t2 - t1, sampled, t2 - t0 + sampled, n, most),
            "note": f"descriptors once and {SAMPLES} times the network of the mean, computed from that row",
        },
        "mean, point by point": {
            **scaled(t1 - t0, loop, t3 - t2, t1 - t0 + loop + t3 - t2, n, most),
            "points_measured": len(few),
            "fraction_measured": len(few) / most,
            "note": "outer loop over the points in Python, as Algorithm 1; network of the row 'mean'",
        },
    }


def measure_gpurho(
    system: System, model: DensityModel, uncertainty: str | None, precision: str, box: Box | None
) -> dict[str, Any]:
    """All that `gpurho.predict` does, to memory, with the CPU time of its stages."""
    from gpurho.fields import Correction
    from gpurho.memorystore import MemorySink
    from gpurho.pipelines.settings import settle
    from gpurho.pipelines.tiling import Stages, run_tiles

    class Timed(Stages):
        seconds: dict[str, float]

        def evaluate(self, tile: Any, wait: bool = False) -> Any:
            start = time.process_time()
            begun = super().evaluate(tile, wait)
            spent = time.process_time() - start
            network = spent * begun.network_seconds / (begun.feature_seconds + begun.network_seconds)
            self.seconds["descriptors"] += spent - network
            self.seconds["network"] += network
            return begun

    made: list[Timed] = []

    def stages(job: Any) -> Timed:
        made.append(Timed(job))
        if len(made[0]._features):
            made[0]._features.fill(0.0)  # fresh pages: once a run, not once a point
        made[0].seconds = {"setup": time.process_time() - start, "descriptors": 0.0, "network": 0.0}
        return made[0]

    wall, start = time.perf_counter(), time.process_time()
    job = settle(
        system.atoms, model, device="cpu", grid=(system.grid,) * 3, uncertainty=uncertainty, samples=SAMPLES,
        region=None if box is None else corner(system, box), precision=precision,
    )  # fmt: skip
    sink = MemorySink(job.layout())
    run_tiles(job, sink, lambda n: None, stages)
    sink.finish(Correction())
    total, wall = time.process_time() - start, time.perf_counter() - wall
    seconds = made[0].seconds
    row = scaled(
        seconds["setup"], seconds["descriptors"], seconds["network"], total, job.tiles.n_points, system.n_points
    )
    return {**row, "wall_seconds_measured": wall, "precision": job.precision}


def agreement(system: System, model: DensityModel) -> dict[str, Any]:
    """The paper's way against gpurho in float32 on one box: features and densities."""
    import gpurho

    spec = model.spec.descriptor
    points = paper_points(system, CHECK_BOX)
    reference = PaperDescriptors(system.atoms, spec).features(points)
    ours = gpurho.descriptors(system.atoms, points, spec)
    difference = np.abs(ours.astype(np.float64) - reference)
    distance = np.array([name.startswith("d_") for name in spec.feature_names()])
    same = (difference[:, ~distance] <= COSINE_TOLERANCE).all(axis=1)
    rho = gpurho.predict(
        system.atoms, model, device="cpu", grid=(system.grid,) * 3, region=corner(system, CHECK_BOX),
        uncertainty=None, precision="fp32", progress=False,
    )  # fmt: skip
    density = np.abs(np.asarray(rho.mean).ravel() - PaperNetwork(model).density(reference))
    found = {
        "points": len(points),
        "largest_distance_difference": float(difference[:, distance].max()),
        "points_with_cosines_in_another_order": int((~same).sum()),
        "largest_density_difference_elsewhere": float(density[same].max()),
        "density_standard_deviation": float(np.asarray(rho.mean).std()),
    }
    found["agrees"] = bool(
        found["largest_distance_difference"] <= DISTANCE_TOLERANCE
        and (~same).mean() <= TIED_SHARE
        and found["largest_density_difference_elsewhere"] <= DENSITY_TOLERANCE
    )
    return found


def bare_gemm(model: DensityModel, precision: str, points: int) -> float:
    """CPU seconds of a point in the network's matrix products alone, at the best of some sizes of batches."""
    from gpurho.prediction import OUTPUT_ROWS

    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    shapes = model.spec.network.shapes(model.spec.descriptor.n_features)
    weights = [torch.randn(OUTPUT_ROWS if i + 1 == len(shapes) else m, n).to(dtype) for i, (m, n) in enumerate(shapes)]
    best = float("inf")
    with torch.inference_mode():
        for batch in (1024, 2048, 4096):
            x = torch.randn(batch, shapes[0][1]).to(dtype)
            for count in (1, points // batch):  # once to warm up
                start = time.process_time()
                for _ in range(count):
                    h = x
                    for weight in weights:
                        h = F.linear(h, weight)
                seconds = time.process_time() - start
            best = min(best, seconds / (points // batch * batch))
    return best


def cpu_ratios(system: System, models: dict[str, DensityModel], repeats: int) -> list[dict[str, Any]]:
    """Prediction against its own matrix products, and kinds of uncertainty against the mean; the best of a few."""
    rows = []
    for way, model in models.items():
        for precision in ("bf16", "fp32"):
            boxes = BOXES[way]
            taken: dict[str, list[float]] = {}
            for _ in range(repeats):
                taken.setdefault("gemm", []).append(bare_gemm(model, precision, 65_536 if way == "shipped" else 16_384))
                for kind, uncertainty in KINDS.items():
                    row = measure_gpurho(system, model, uncertainty, precision, boxes[uncertainty or "mean"])
                    # Without the set-up, which does not grow with the points.
                    per_point = (row["cpu_seconds_measured"] - row["cpu_seconds_setup"]) / row["points_measured"]
                    taken.setdefault(kind, []).append(per_point)
                    if kind == "mean":
                        taken.setdefault("network", []).append(per_point * row["share"]["network"])
            cost = {name: min(values) for name, values in taken.items()}
            rows.append(
                {
                    "way": way,
                    "precision": precision,
                    "cpu_microseconds_per_point": {name: 1e6 * value for name, value in cost.items()},
                    "predict_over_gemm": cost["gemm"] / cost["mean"],
                    "network_over_gemm": cost["gemm"] / cost["network"],
                    "analytic_over_mean": cost["analytic"] / cost["mean"],
                    "last_layer_over_mean": cost["last-layer"] / cost["mean"],
                    "sampled_over_mean": cost[f"sampled-{SAMPLES}"] / cost["mean"],
                }
            )
    return rows


def table(system: System, whole: bool, repeats: int) -> dict[str, Any]:
    """One column of Table I or II; of each row the round that took least."""
    models = models_of(system)
    ways: dict[str, Any] = {"paper": {}, **{way: {} for way in models}}

    def keep(way: str, kind: str, row: dict[str, Any]) -> None:
        before = ways[way].get(kind)
        if before is None or row["cpu_seconds"] < before["cpu_seconds"]:
            ways[way][kind] = row

    for _ in range(repeats):
        for kind, row in measure_paper(system, models["same"]).items():
            keep("paper", kind, row)
        for way, model in models.items():
            for kind, uncertainty in KINDS.items():
                box = None if whole and uncertainty is None else BOXES[way][uncertainty or "mean"]
                keep(way, kind, measure_gpurho(system, model, uncertainty, "auto", box))
    slow = ways["paper"]
    for way in models:
        for kind, row in ways[way].items():
            row["speedup"] = slow[kind if "sampled" in kind else "mean"]["cpu_seconds"] / row["cpu_seconds"]
            if kind == "mean":
                row["speedup_over_point_by_point"] = slow["mean, point by point"]["cpu_seconds"] / row["cpu_seconds"]
    return {
        "system": system.name,
        "atoms": len(system.atoms),
        "grid": [system.grid] * 3,
        "points": system.n_points,
        "published_seconds": system.published,
        "features": {way: model.spec.descriptor.n_features for way, model in models.items()},
        "network": {way: vars(model.spec.network) for way, model in models.items()},
        "agreement": agreement(system, models["same"]),
        "ways": ways,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run it; returns 0 where the two ways agree."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plot", type=Path, help="file for the picture")
    parser.add_argument("--quick", action="store_true", help="the smallest cell of either material, no ratios")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of everything")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    numba.set_num_threads(1)
    begin, begin_cpu = time.perf_counter(), time.process_time()
    report: dict[str, Any] = {
        "benchmark": "paper_tables",
        "machine": machine(1),
        "notes": (__doc__ or "").split("\n\n")[1:3],
        "tables": [],
    }
    chosen = systems(options.quick)
    for system in chosen[:1] + [s for s in chosen if s.material == "SiGe"][:1]:
        for model in models_of(system).values():  # compiles and loads all that is to be
            for uncertainty in KINDS.values():
                measure_gpurho(system, model, uncertainty, "auto", (8, 8, 8))
    for system in chosen:
        column = table(system, system.name == "Al 500", options.repeats)
        show(column)
        report["tables"].append(column)
    if not options.quick:
        report["cpu_ratios"] = cpu_ratios(chosen[1], models_of(chosen[1]), options.repeats)
        report["targets"] = TARGETS
        for row in report["cpu_ratios"]:
            print(json.dumps(row), flush=True)
    report["seconds"] = {"wall": time.perf_counter() - begin, "cpu": time.process_time() - begin_cpu}
    print(f"{report['seconds']['wall']:.0f} s, of these {report['seconds']['cpu']:.0f} s of CPU time")
    if options.json:
        options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.plot:
        plot(report, options.plot)
    return 0 if all(c["agreement"]["agrees"] for c in report["tables"]) else 1


if __name__ == "__main__":
    sys.exit(main())
