"""Many predictions in one process: memory and open files stay as they are; and a long labelling run full of faults."""

from __future__ import annotations

import gc
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from faults.bench import LABEL, Bench
from faults.harness import FaultError

WARM_UP = 0.3
"""Share of the predictions after which memory must no longer grow."""

MOST_KIB = 12.0
"""Growth of the resident memory per prediction that is taken for none: a leaked field of the test has 40 KiB."""


def predictions(bench: Bench) -> dict[str, Any]:
    """Predictions with mixed settings in one process."""
    report = bench.folder / "soak.json"
    arguments = {"folder": str(bench.fresh()), "report": str(report), "count": bench.count(14, 200)}
    bench.server.start(call="faults.soak:many", arguments=arguments).wait(1800.0).expect()
    found: dict[str, Any] = json.loads(report.read_text())
    if found["open files"][1] > found["open files"][0]:
        raise FaultError(f"open files grow from {found['open files'][0]} to {found['open files'][1]}")
    # Few predictions say nothing about a slope.
    if bench.full and found["kib per prediction"] > MOST_KIB:
        raise FaultError(f"memory grows by {found['kib per prediction']} KiB with each prediction")
    return found


def many(folder: str, report: str, count: int) -> None:
    """The predictions; runs in a child."""
    import numpy as np
    import psutil
    from predict_tools import aluminium, settings, small_model

    import gpurho

    process, where, model = psutil.Process(), Path(folder), small_model()
    ways: list[dict[str, Any]] = [
        {"grid": (16, 15, 14)},
        {"grid": (16, 15, 14), "out": where / "a.h5", "resume": False},
        {"grid": (16, 16, 16), "keep": ("coarse:2", "atoms", "histogram", "slice:z=0.5")},
        {"grid": (16, 16, 16), "keep": ("field", "atoms"), "out": where / "b.h5", "resume": False},
        {"grid": (16, 15, 14), "uncertainty": "sampled", "samples": 3, "conserve": "uniform"},
        {"grid": (16, 15, 14), "uncertainty": None, "out": where / "c.h5"},
        {"grid": (16, 15, 14), "region": ((2, 9), (0, 15), (3, 11))},
        {"grid": (16, 15, 14), "conserve": "uncertainty", "out": where / "d.h5", "resume": False},
    ]
    if count >= 100:
        ways.append({"grid": (16, 15, 14), "devices": 1})
    memory, files, used = [], [], np.zeros(len(ways), int)
    for i in range(count):
        # The one on workers takes seconds to start them, and a few are enough.
        kind = i % 8 if i % 40 != 39 or len(ways) < 9 else 8
        used[kind] += 1
        options = settings(**ways[kind])
        with gpurho.predict(aluminium(seed=i % 3 if "out" not in options else 0), model, **options) as rho:
            if rho.kept is None or rho.kept.keep.field:
                float(np.asarray(rho.mean).sum())
            if kind == 0 and i % 16 == 0:
                rho.write(where / "a.cube")
                rho.line([0, 0, 0], [2, 2, 2], 20)
        del rho
        gc.collect()
        memory.append(process.memory_info().rss / 1024)
        files.append(process.num_fds())
    first = int(WARM_UP * count)
    slope = float(np.polyfit(np.arange(count - first), memory[first:], 1)[0])
    found = {
        "predictions": count,
        "by kind": used.tolist(),
        "mib after warm-up": round(memory[first] / 1024, 1),
        "mib at the end": round(memory[-1] / 1024, 1),
        "kib per prediction": round(slope, 2),
        "open files": [max(files[: first + 1]), max(files[first:])],
        "threads": process.num_threads(),
    }
    Path(report).write_text(json.dumps(found))


def labels(bench: Bench) -> dict[str, Any]:
    """Labelling runs for ``--minutes``, killed, stopped and starved of disk at random; every output compared."""
    from faults.disk import LARGE, disk

    draw = bench.random("labels")
    calm = bench.calm(LABEL)
    deadline = time.monotonic() + 60.0 * (bench.minutes if bench.full else 0.05)
    counts = {"runs": 0, "kills": 0, "signals": 0, "full disks": 0, "labels computed and compared": 0}
    with disk(bench) as small:
        while time.monotonic() < deadline:
            out = small.folder / f"out{counts['runs']}"
            out.mkdir()
            for _ in range(200):
                fault = draw.choice(("kill", "signal", "disk", "none"))
                small.room(draw.randrange(64 << 10) if fault == "disk" else LARGE)
                running = bench.server.start(*LABEL.words(bench, out), forked=True, **small.conditions)
                if fault in ("kill", "signal") and running.hit(
                    signal.SIGKILL if fault == "kill" else signal.SIGTERM, draw.uniform(0, 1.0) * calm.seconds
                ):
                    counts["kills" if fault == "kill" else "signals"] += 1
                outcome = running.outcome()
                if outcome.code == 0:
                    break
                if fault == "disk":
                    outcome.refused("al.h5")
                    counts["full disks"] += 1
                elif fault == "none":
                    outcome.expect()
            small.room(LARGE)
            LABEL.run(bench, out).expect()
            LABEL.check(bench, out)
            counts["labels computed and compared"] += 8
            counts["runs"] += 1
            for path in out.rglob("*"):
                if path.is_file():
                    path.unlink()
            os.rmdir(out)
    return {**counts, "minutes": round(bench.minutes if bench.full else 0.05, 2)}
