"""Strong and weak scaling of prediction over workers of one machine, in one run.

Strong: one system on 1, 2, ... workers. Weak: as many points for each worker. Every worker takes one thread, or one GPU
with ``--device cuda``; on CPUs ``--bind`` gives each a core of its own, as Slurm does, so that one worker's compression
does not run on a core that is another's. Each figure is the best of ``--repeat`` runs, taken in turn, so that other
work on the machine meets all of them alike; workers are warm. The time is that of the whole call, shards, tables and
the one file included.

    python benchmarks/scaling.py --workers 1 2 --points 400000 --json scaling.json --plot scaling.png
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS")


def aluminium(repeat: tuple[int, int, int], seed: int = 0) -> Any:
    """fcc aluminium, displaced by 0.1 angstrom at random."""
    import numpy as np
    from ase.build import bulk

    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(repeat)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, atoms.positions.shape)
    return atoms


def measure(client: Any, points: int, tile: int, options: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Predict about `points` points of a bar of aluminium to a file; a result row."""
    import gpurho

    # A bar whose length grows with the points, so that every tile is the same work.
    length = max(1, round(points / (2 * tile) ** 2 / tile))
    cells = max(1, round(length * tile * 0.2 / 4.05))
    atoms = aluminium((cells, 2, 2))
    out = folder / "rho.h5"
    start = time.perf_counter()
    with gpurho.predict(
        atoms, client=client, grid=(length * tile, 2 * tile, 2 * tile), tile_shape=(tile,) * 3, out=out, resume=False,
        progress=False, **options,
    ) as rho:  # fmt: skip
        seconds = time.perf_counter() - start
        timing, n = rho.info["timing"], rho.grid.n_points
    # What the workers computed for, beside what starting, waiting and the one file cost.
    busy = sum(timing[name] for name in ("features", "network"))
    return {
        "points": n,
        "atoms": len(atoms),
        "seconds": seconds,
        "busy_seconds": busy,
        "points_per_second": n / seconds,
    }


def bind(core: int) -> None:
    """Keep all threads of this process, and those that they start, on one core."""
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread.name), {core})


def scaling(options: argparse.Namespace) -> dict[str, Any]:
    """All measurements."""
    from distributed import Client

    from gpurho.pipelines.cluster import _cluster_class, local_options

    chosen = {"device": options.device, "precision": options.precision, "uncertainty": options.uncertainty}
    rows: list[dict[str, Any]] = []
    most = max(options.workers)
    kind = _cluster_class(most, options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        clients = {}
        for n in options.workers:
            cluster = stack.enter_context(kind(**local_options(n, options.device)))
            clients[n] = stack.enter_context(Client(cluster, set_as_default=False))
            clients[n].wait_for_workers(n)
            if options.bind:
                cores = sorted(os.sched_getaffinity(0))
                for i, worker in enumerate(clients[n].scheduler_info(n_workers=-1)["workers"]):
                    clients[n].run(bind, cores[i % len(cores)], workers=[worker])
            # Enough runs that every worker has compiled, loaded and computed something.
            measure(clients[n], 4 * n * options.tile**3, options.tile, chosen, folder)
        for turn in range(options.repeat):
            for n in options.workers:
                for law, points in (("strong", options.points * most), ("weak", options.points * n)):
                    load = os.getloadavg()[0]
                    row = measure(clients[n], points, options.tile, chosen, folder)
                    rows.append({"law": law, "workers": n, "turn": turn, "load": load, **row})
                    print(
                        f"{law:7}{n:3} workers {row['points']:>10,} points {row['seconds']:8.2f} s"
                        f" {row['points_per_second']:>12,.0f} points/s   load {load:.1f}",
                        flush=True,
                    )
    return {"machine": machine(), "options": {k: str(v) for k, v in vars(options).items()}, "rows": rows} | laws(rows)


def laws(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Best rate for each law and number of workers, and the speed against the fewest workers."""
    result: dict[str, Any] = {}
    for law in ("strong", "weak"):
        counts = sorted({row["workers"] for row in rows if row["law"] == law})
        rates = {n: [r["points_per_second"] for r in rows if (r["law"], r["workers"]) == (law, n)] for n in counts}
        best = {n: max(values) for n, values in rates.items()}
        first = counts[0]
        result[law] = {
            str(n): {
                "points_per_second": best[n],
                "speedup": best[n] / best[first] * first,
                "efficiency": best[n] / best[first] * first / n,
            }
            for n in counts
        }
    return result


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "date": time.strftime("%Y-%m-%d"),
        "cpu": cpu,
        "cores": os.cpu_count(),
        "gpus": gpus,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed of a fixed job, and efficiency of a growing one, over workers: best turns joined, every turn a dot."""
    from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator, StrMethodFormatter

    from gpurho.plotstyle import GREY, LINES, SMALL, new_figure, save, style

    with style():
        figure = new_figure(5.4, 2.5)
        for panel, law, what in zip(figure.subplots(1, 2), ("strong", "weak"), ("speedup", "efficiency"), strict=True):
            counts = sorted(int(n) for n in result[law])
            first = counts[0]
            base = result[law][str(first)]["points_per_second"] / first
            rows = [row for row in result["rows"] if row["law"] == law]
            turns = [row["points_per_second"] / base / (1 if law == "strong" else row["workers"]) for row in rows]
            best = [result[law][str(n)][what] for n in counts]
            ideal = counts if law == "strong" else [1.0] * len(counts)
            percent = 1.0 if law == "strong" else 100.0
            panel.plot(counts, [percent * y for y in ideal], color=GREY, linewidth=0.8, linestyle=":", label="ideal")
            panel.plot(counts, [percent * y for y in best], color=LINES["mean"], label="best turn")
            panel.plot(
                [row["workers"] for row in rows],
                [percent * y for y in turns],
                "o",
                color=LINES["mean"],
                markersize=3,
                alpha=0.6,
                markeredgewidth=0,
                label="each turn",
            )
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_locator(FixedLocator(counts))
            panel.set_xlim(first / 1.15, counts[-1] * 1.15)
            panel.set_xlabel("workers")
            if law == "strong":
                panel.set_yscale("log", base=2)
                panel.yaxis.set_major_locator(FixedLocator(counts))
                panel.set_ylabel("speed-up over one worker")
            else:
                panel.set_ylim(0, max(110.0, 105 * max(turns)))
                panel.set_ylabel("efficiency (%)")
            for axis in (panel.xaxis, *((panel.yaxis,) if law == "strong" else ())):
                axis.set_major_formatter(StrMethodFormatter("{x:g}"))
                axis.set_minor_locator(NullLocator())
                axis.set_minor_formatter(NullFormatter())
            panel.tick_params(labelsize=SMALL)
            title = "strong scaling: the job stays" if law == "strong" else "weak scaling: the job grows"
            panel.set_title(title, loc="left")
            panel.legend(loc="upper left" if law == "strong" else "lower left")
        save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--points", type=int, default=400_000, help="points for each worker")
    parser.add_argument("--tile", type=int, default=32, help="points along each edge of a tile")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--bind", action="store_true", help="a core of its own for each worker (Linux)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--precision", default="auto", choices=("auto", "bf16", "fp32"))
    parser.add_argument("--uncertainty", default="analytic")
    parser.add_argument("--folder", type=Path, help="where the fields are written (a temporary folder)")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    options = parser.parse_args()
    options.uncertainty = None if options.uncertainty == "none" else options.uncertainty
    if options.device == "cpu":
        os.environ |= dict.fromkeys(THREADS, "1")
    result = scaling(options)
    for law in ("strong", "weak"):
        for n, found in result[law].items():
            print(f"{law}: {n} workers {found['speedup']:.2f}x, efficiency {found['efficiency']:.0%}")
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.plot is not None:
        plot(result, options.plot)


if __name__ == "__main__":
    main()
