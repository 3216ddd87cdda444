"""Everything that needs a GPU, by one command, in under ten minutes: tests, agreement with the CPU, speed, memory.

    python benchmarks/gpu_check.py --json gpu.json

The exit status is 0 where all tests pass and CUDA agrees with the CPU, 1 where not, and 3 without a usable GPU.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.metadata
import importlib.util
import json
import math
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
SLABS = {"script": [(101, 64), (101, 128), (14, 64), (63, 64), (136, 64)], "fused": [(101, 64), (101, 128)]}
"""Unit cells along each axis, and tiles, of the crystals of `slab`."""
BEGUN = 8
"""Tiles that are begun one after the other when the device is timed."""
PACKAGES = ("gpurho", "torch", "numba", "numba-cuda", "cuda-toolkit", "numpy", "cupy-cuda13x", "cupy-cuda12x")
DISTANCE, ANGLE, SMOOTH = 2e-5, 1e-4, 1e-5
"""Largest differences from the CPU that pass (angstrom; cosine; share of a smooth column's largest value): the paths of
a tied point may differ."""


def unusable() -> str | None:
    """Why no GPU can be used here; None where one can."""
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    import torch

    if not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA device"
    if importlib.util.find_spec("numba_cuda") is None:
        return "numba-cuda is not installed; pip install 'gpurho[cuda13]' or 'gpurho[cuda12]'"
    from numba import cuda

    return None if cuda.is_available() else "numba-cuda finds no CUDA device or no tool chain"


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    driver = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip().splitlines()[:1]
    device = torch.cuda.get_device_properties(0)
    return {
        "date": time.strftime("%Y-%m-%d %H:%M"),
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_gib": device.total_memory / 2**30,
        "multiprocessors": device.multi_processor_count,
        "driver": driver,
        "torch_cuda": torch.version.cuda,
        "python": platform.python_version(),
        "versions": versions,
    }


def run_tests(seconds: float) -> dict[str, Any]:
    """The tests marked `gpu`."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--durations=8", "--continue-on-collection-errors"]
    command.append(str(ROOT / "tests"))
    start = time.perf_counter()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired as error:
        text = error.stdout or b""  # bytes here, whatever was asked for
        lines = (text if isinstance(text, str) else text.decode(errors="replace")).splitlines()
        return {"passed": False, "summary": [f"stopped after {seconds:.0f} s", *lines[-12:]]}
    tail = done.stdout.strip().splitlines()[-24:]
    return {"passed": done.returncode == 0, "seconds": time.perf_counter() - start, "summary": tail}


def structures() -> dict[str, tuple[Any, Any, float]]:
    """Name -> (atoms, specification, spacing) of the agreement check."""
    from ase.build import bulk, fcc111

    from gpurho.descriptors import DescriptorSpec

    rng = np.random.default_rng(0)
    aluminium, silicon_germanium = DescriptorSpec(("Al",)), DescriptorSpec(("Si", "Ge"), n_cross=4)
    smooth = DescriptorSpec(("Al",), family="smooth", cutoff=5.0)
    smooth_alloy = DescriptorSpec(("Si", "Ge"), family="smooth", cutoff=5.0)
    rattled = bulk("Al", "fcc", 4.05, cubic=True).repeat(4)
    rattled.positions += rng.normal(0, 0.1, rattled.positions.shape)
    sheared = rattled.copy()
    sheared.set_cell(rattled.cell.array @ np.array([[1, 0.3, 0], [0, 1, -0.2], [0.1, 0, 1]]), scale_atoms=True)
    slab = fcc111("Al", (4, 4, 5), vacuum=15.0)
    alloy = bulk("Si", "diamond", 5.5, cubic=True).repeat(3)
    alloy.symbols[rng.permutation(len(alloy))[: len(alloy) // 2]] = "Ge"
    alloy.positions += rng.normal(0, 0.1, alloy.positions.shape)
    return {
        "Al rattled": (rattled, aluminium, 0.25),
        "Al sheared": (sheared, aluminium, 0.4),
        "Al perfect": (bulk("Al", "fcc", 4.05, cubic=True), aluminium, 0.2),
        "Al vacancy": (bulk("Al", "fcc", 4.05, cubic=True).repeat(3)[1:], aluminium, 0.35),
        "Al slab": (slab, aluminium, 0.4),
        "SiGe alloy": (alloy, silicon_germanium, 0.35),
        "Al rattled, smooth": (rattled, smooth, 0.25),
        "Al slab, smooth": (slab, smooth, 0.4),
        "SiGe alloy, smooth": (alloy, smooth_alloy, 0.35),
    }


def agreement(name: str) -> dict[str, Any]:
    """Largest differences between CUDA and the CPU on one system."""
    from gpurho.descriptors import Environment
    from gpurho.grid import Grid
    from gpurho.partition import make_tiles
    from gpurho.structure import Structure

    atoms, spec, spacing = structures()[name]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, (40, 40, 40))[0]
    cpu, cuda = (Environment(structure, spec, d).tile_features(grid, tile) for d in ("cpu", "cuda"))
    difference = np.abs(cuda.values.cpu().numpy() - cpu.values)
    is_distance = np.array([column.startswith("d_") for column in spec.feature_names()])
    if spec.family == "smooth":
        share = float((difference / np.maximum(np.abs(cpu.values).max(axis=0), 1.0)).max())
        found = {"share": share, "agrees": share <= SMOOTH}
    else:
        distance, angle = float(difference[:, is_distance].max()), float(difference[:, ~is_distance].max())
        found = {"distance": distance, "cosine": angle, "agrees": bool(distance <= DISTANCE and angle <= ANGLE)}
    return {
        "points": tile.n_points,
        **found,
        "exact": {"cpu": cpu.n_exact, "cuda": cuda.n_exact},
        "capped": {"cpu": cpu.n_capped, "cuda": cuda.n_capped},
        "tied": {"cpu": cpu.n_tied, "cuda": cuda.n_tied},
    }


def throughput(name: str, spacing: float, edge: int, repeats: int = 9) -> dict[str, Any]:
    """Points per second of one tile: by the device's events, and by the clock with the host's part."""
    import torch

    from gpurho.descriptors import Environment
    from gpurho.grid import Grid
    from gpurho.kernels.batches import grid_batches
    from gpurho.kernels.celllist import atoms_around, species_cells
    from gpurho.partition import make_tiles
    from gpurho.structure import Structure

    atoms, spec, _ = structures()[name]
    repeat = np.maximum(1, np.ceil(edge * spacing / np.linalg.norm(atoms.cell.array, axis=1))).astype(int)
    structure = Structure.from_ase(atoms.repeat(tuple(repeat)))
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, (edge,) * 3)[0]
    free = torch.cuda.mem_get_info()[0]
    environment = Environment(structure, spec, "cuda")
    start = time.perf_counter()
    result = environment.tile_features(grid, tile)
    torch.cuda.synchronize()
    first = time.perf_counter() - start
    out, driver = result.values, environment._cuda
    points = driver.grid_points(grid.origin, grid.steps, tile.start, tile.stop)
    corners = points.cpu().numpy()[:: max(1, tile.n_points // 64)]
    low, high = points.amin(0).cpu().numpy(), points.amax(0).cpu().numpy()
    corners = np.concatenate([corners, [low, high]])
    positions, owners = atoms_around(environment._bins, corners, spec.cutoff + 0.01)
    cells = species_cells(positions, owners, environment._species[owners], len(spec.species))
    batches = grid_batches(tile.shape)
    events, clock = [], []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        # All sizes are known by now: nothing waits, and the host is ahead of the device.
        begin.record()
        for _ in range(BEGUN):
            driver.start(points, batches, cells, out)
        end.record()
        torch.cuda.synchronize()
        events.append(begin.elapsed_time(end) / 1e3 / BEGUN)
        start = time.perf_counter()
        environment.tile_features(grid, tile, out)
        torch.cuda.synchronize()
        clock.append(time.perf_counter() - start)
    return {
        "points": tile.n_points,
        "first_call_s": first,
        "device_s": statistics.median(events),
        "points_per_second": tile.n_points / statistics.median(events),
        "wall_points_per_second": tile.n_points / statistics.median(clock),
        "exact_share": result.n_exact / tile.n_points,
        "memory_gib": (free - torch.cuda.mem_get_info()[0]) / 2**30,
    }


def network_rates(
    name: str, uncertainty: str | None, device: str = "cuda", points: int = 2**20, samples: int = 30
) -> dict[str, Any]:
    """Points per second of a shipped model's network by executor and precision, and how far each is from fp32.

    Differences are root mean squares over points within the training domain, of the density in units of the model's
    own error on its test snapshots, of sigma in units of its mean.
    """
    import torch

    from gpurho.model import load_model

    model = load_model(name)
    t, n = model.tensors, model.spec.descriptor.n_features
    x = torch.randn((points, n), generator=torch.Generator().manual_seed(0))
    x = x * t["feature_std"] + t["feature_mean"]
    features = x.clamp(t["feature_low"], t["feature_high"]).contiguous().to(device)
    error = float(model.spec.metrics["rmse"])
    found: dict[str, Any] = {}
    exact = None
    for executor in ("script", "fused"):
        for precision in ("fp32", "bf16"):
            try:
                evaluate = model.evaluator(device, precision, uncertainty, samples, executor=executor)
                fields = [f for f in evaluate(features) if f is not None]
                exact = fields if exact is None else exact
                rms = [float((a - b).double().square().mean().sqrt()) for a, b in zip(fields, exact, strict=True)]
                row: dict[str, Any] = {"density_error": rms[0] / error}
                if uncertainty is not None:
                    row["epistemic_error"] = rms[2] / float(exact[2].mean())
                row["points_per_second"] = points / _seconds(lambda e=evaluate: e.unchecked(features), device)  # type: ignore[misc]
            except Exception as problem:  # one executor's failure must not cost the others
                row = {"error": f"{type(problem).__name__}: {str(problem).splitlines()[0]}"}
            found[f"{executor} {precision}"] = row
    return found


def _seconds(work: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """Median time of a call on a device."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    times = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def slab(n_cells: int, edge: int, tile: int, executor: str = "script", device: str = "cuda") -> dict[str, Any]:
    """A box of `edge`^3 points of a large crystal at the paper's production mesh, with sigma and sums of blocks kept.

    From its rate follows the time for the whole crystal; the memory tells whether it grows with the atoms.
    """
    import torch
    from ase.build import bulk

    import gpurho
    from gpurho.grid import Grid
    from gpurho.keep import Keep

    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(n_cells)
    atoms.positions += np.random.default_rng(0).normal(0, 0.1, atoms.positions.shape)
    settings: dict[str, Any] = {"spacing": 0.1589, "keep": "coarse:4", "device": device, "tile_shape": (tile,) * 3}
    whole = Keep.of("coarse:4").fitting(Grid.from_spacing(atoms.cell.array, 0.1589).shape)
    edge = min(edge, *whole) // tile * tile
    region = ((0, edge),) * 3
    cuda = device.startswith("cuda")
    if cuda:
        gpurho.predict(atoms, region=((0, tile),) * 3, executor=executor, progress=False, **settings)
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rho = gpurho.predict(atoms, region=region, executor=executor, progress=False, **settings)
    seconds = time.perf_counter() - start
    timing = rho.info["timing"]
    # Of the tiles alone: what is done once for all atoms, checks and trust, is told besides.
    working = timing["total"] - timing["setup"]
    rate = edge**3 / working
    return {
        "atoms": len(atoms),
        "points": edge**3,
        "points_per_second": rate,
        "once_s": seconds - working,
        "whole_minutes": math.prod(whole) / rate / 60,
        "stages_s": {k: v for k, v in timing.items() if isinstance(v, int | float)},
        "peak_torch_gib": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
    }


def prediction(n_cells: int, uncertainty: str | None, precision: str, executor: str = "script") -> dict[str, Any]:
    """`gpurho.predict` of aluminium with the shipped model, by stage."""
    import torch
    from ase.build import bulk

    import gpurho

    small = bulk("Al", "fcc", 4.05, cubic=True)
    settings: dict[str, Any] = {"device": "cuda", "uncertainty": uncertainty, "precision": precision, "progress": False}
    gpurho.predict(small, spacing=0.4, executor=executor, **settings)
    atoms = small.repeat(n_cells)
    atoms.positions += np.random.default_rng(0).normal(0, 0.1, atoms.positions.shape)
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    rho = gpurho.predict(atoms, spacing=0.3, executor=executor, **settings)
    seconds = time.perf_counter() - start
    return {
        "atoms": len(atoms),
        "points": rho.grid.n_points,
        "points_per_second": rho.grid.n_points / seconds,
        "seconds": seconds,
        "stages_s": {k: v for k, v in rho.info["timing"].items() if isinstance(v, int | float)},
        "electrons_per_atom": float(rho.electrons) / len(atoms),
        "peak_torch_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def slab_row(n_cells: int, tile: int, executor: str) -> tuple[str, Callable[[], dict[str, Any]]]:
    """Label and work of a row of `slab`."""
    label = f"{4 * n_cells**3} atoms, tiles of {tile}^3, {executor}"
    return label, lambda: slab(n_cells, 384, tile, executor)


def prediction_row(uncertainty: str | None, precision: str, executor: str) -> tuple[str, Callable[[], dict[str, Any]]]:
    """Label and work of a row of `prediction`."""
    label = f"4000 atoms, uncertainty {uncertainty}, {precision}, {executor}"
    return label, lambda: prediction(10, uncertainty, precision, executor)


def attempt(work: Callable[[], dict[str, Any]], deadline: float) -> dict[str, Any]:
    """The result row of `work`; out of memory, a failure and no time left are rows too."""
    if time.monotonic() > deadline:
        return {"skipped": "no time left"}
    try:
        return work()
    except Exception as error:  # one failed row must not cost the others
        kind = "out_of_memory" if "memory" in str(error).lower() else "error"
        return {kind: f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"}


def main(arguments: list[str] | None = None) -> int:
    """Run all of it; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--seconds", type=float, default=540.0, help="no new measurement starts after so long")
    options = parser.parse_args(arguments)
    try:
        reason = unusable()
    except Exception as error:  # Numba refuses versions of NumPy when it is imported
        reason = f"{type(error).__name__}: {error}"
    if reason is not None:
        print(f"no GPU check here: {reason}", file=sys.stderr)
        if options.json:
            options.json.write_text(json.dumps({"unusable": reason}) + "\n")
        return 3
    deadline = time.monotonic() + options.seconds
    report: dict[str, Any] = {"machine": machine()}
    print(json.dumps(report["machine"], indent=1), flush=True)

    def record(section: str, label: str, work: Callable[[], dict[str, Any]]) -> None:
        row = report.setdefault(section, {})[label] = attempt(work, deadline)
        print(f"{section}: {label}: {json.dumps(row)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")

    # A device that hangs ends the process; the rows so far are kept.
    faulthandler.dump_traceback_later(options.seconds + 45, exit=True)
    # What matters most first, and last what a fault of may cost all that follows: kernels of the network.
    for name in structures():
        record("agreement", name, lambda name=name: agreement(name))  # type: ignore[misc]
    rows = {executor: [slab_row(n, t, executor) for n, t in SLABS[executor]] for executor in SLABS}
    record("slab", *rows["script"].pop(0))
    record("tests", "gpu", lambda: run_tests(min(240.0, options.seconds / 2)))
    for name in ("Al rattled", "Al rattled, smooth", "SiGe alloy", "SiGe alloy, smooth", "Al perfect"):
        for spacing, edge in ((0.2117, 64), (0.2117, 128), (0.3, 64), (0.5, 64)):
            label = f"{name}, {spacing} angstrom, {edge}^3"
            record("descriptors", label, lambda n=name, s=spacing, e=edge: throughput(n, s, e))  # type: ignore[misc]
    for uncertainty, precision in ((None, "auto"), ("analytic", "auto"), ("analytic", "fp32")):
        record("predict", *prediction_row(uncertainty, precision, "script"))
    for row in rows["script"]:
        record("slab", *row)
    for name, kind in (("al", "analytic"), ("al", None), ("sige", "analytic"), ("sige", None), ("al", "sampled")):
        record("network", f"{name}, uncertainty {kind}", lambda m=name, k=kind: network_rates(m, k))  # type: ignore[misc]
    for row in rows["fused"]:
        record("slab", *row)
    for uncertainty, precision in ((None, "fp32"), ("analytic", "fp32"), ("analytic", "bf16")):
        record("predict", *prediction_row(uncertainty, precision, "fused"))
    faulthandler.cancel_dump_traceback_later()
    agrees = all(row.get("agrees", False) for row in report["agreement"].values())
    return 0 if agrees and report["tests"]["gpu"].get("passed") else 1


if __name__ == "__main__":
    sys.exit(main())
