"""kill -9 of Dask's workers and of the scheduler while a prediction is at work on them; then the same command again."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from faults.bench import Bench, Job
from faults.harness import ONE_THREAD, FaultError
from gpurho.journal import read_journal

JOB = Job("predict", ("--tile-shape", 4, 6, 6))
START_SECONDS = 90.0


class Cluster:
    """A scheduler and workers, each a process that can be killed."""

    def __init__(self, folder: Path, workers: int) -> None:
        self.file = folder / "scheduler.json"
        self.file.unlink(missing_ok=True)
        self._log = open(folder / "dask.log", "ab")  # noqa: SIM115 (closed with the cluster)
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        deadline = time.monotonic() + START_SECONDS
        while not self.file.exists():
            if time.monotonic() > deadline or self.scheduler.poll() is not None:
                raise FaultError("Dask's scheduler does not start")
            time.sleep(0.02)
        self.workers = [self.add() for _ in range(workers)]

    def _start(self, kind: str, *words: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", kind, "--scheduler-file", str(self.file), *words]
        return subprocess.Popen(command, stdout=self._log, stderr=self._log, env={**os.environ, **ONE_THREAD})

    def add(self) -> subprocess.Popen[bytes]:
        """One more worker."""
        return self._start("worker", "--nthreads", "1", "--no-nanny", "--no-dashboard", "--host", "127.0.0.1")

    def close(self) -> None:
        """Kill all that is left."""
        for process in (self.scheduler, *self.workers):
            process.kill()
            process.wait()
        self._log.close()


@contextlib.contextmanager
def cluster(folder: Path, workers: int) -> Iterator[Cluster]:
    """A cluster that ends with the context."""
    made = Cluster(folder, workers)
    try:
        yield made
    finally:
        made.close()


def _tiles(folder: Path) -> int:
    """Tiles that lie in shards, finished or not."""
    shards = folder / "rho.h5.shards"
    return sum(max(0, len(read_journal(path)) - 1) for path in shards.glob("*.journal")) + 16 * len(
        list(shards.glob("??????.h5"))
    )


def _begun(running: Any, bench: Bench, folder: Path, least: int) -> bool:
    """Wait until some tiles are written; False when the command ended before."""
    deadline = time.monotonic() + START_SECONDS
    while _tiles(folder) < least:
        code = bench.server.ended(running.pid, 0.005)
        if code is not None:
            running._code = code
            return False
        if time.monotonic() > deadline:
            raise FaultError(f"no tile is written: {running.said()}")
    return True


def workers(bench: Bench) -> dict[str, Any]:
    """Workers, one after the other while the work goes on, each replaced: the command itself does not notice."""
    draw, kills, compared = bench.random("workers"), 0, 0
    wanted = bench.count(1, 30)
    with cluster(bench.folder, bench.count(1, 2)) as dask:
        while kills < wanted:
            folder = bench.fresh()
            words = JOB.words(bench, folder, "--scheduler-file", dask.file)
            running = bench.server.start(*words)
            # Fewer than the three workers over one run of tiles after whose death Dask gives a task up.
            for _ in range(min(2, wanted - kills)):
                if not _begun(running, bench, folder, draw.randrange(1, 60)):
                    break
                time.sleep(draw.uniform(0, 0.05))
                victim = dask.workers.pop(draw.randrange(len(dask.workers)))
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                dask.workers.append(dask.add())
                kills += 1
            running.outcome().expect()
            _same_values(bench, folder)
            compared += 1
    return {"kills": kills, "outputs compared": compared}


def scheduler(bench: Bench) -> dict[str, Any]:
    """The scheduler: the command ends with one clear line; on a new cluster the same command goes on."""
    draw, kills, again = bench.random("scheduler"), 0, 0
    folder = bench.fresh()
    for i in range(bench.count(1, 12)):
        with cluster(bench.folder, 1) as dask:
            words = JOB.words(bench, folder, "--scheduler-file", dask.file)
            running = bench.server.start(*words)
            before = _tiles(folder)
            if _begun(running, bench, folder, before + draw.randrange(1, 40)):
                dask.scheduler.send_signal(signal.SIGKILL)
                dask.scheduler.wait()
                kills += 1
            outcome = running.outcome()
            if outcome.code != 0:
                outcome.refused("run the same command again")
            again += outcome.code == 0
        if i % 4 == 3 or outcome.code == 0:
            folder = _finished(bench, folder)
    if any(folder.iterdir()):
        _finished(bench, folder)
    return {"kills": kills, "finished nevertheless": again}


def _finished(bench: Bench, folder: Path) -> Path:
    """Finish on another cluster, and compare; returns a new folder."""
    with cluster(bench.folder, bench.count(1, 2)) as dask:
        bench.server.run(*JOB.words(bench, folder, "--scheduler-file", dask.file)).expect()
    _same_values(bench, folder)
    return bench.fresh()


def _same_values(bench: Bench, folder: Path) -> None:
    """The fields of a sharded output are, bit for bit, those of one undisturbed device; nothing else lies there."""
    import numpy as np

    from gpurho.density import Density
    from gpurho.densityfile import verify

    calm = bench.folder / "calm-one-device"
    if not calm.exists():
        calm.mkdir()
        JOB.run(bench, calm).expect()
    with Density.open(calm / "rho.h5") as want, Density.open(folder / "rho.h5") as found:
        for name in ("mean", "aleatoric", "epistemic"):
            if np.asarray(getattr(want, name)).tobytes() != np.asarray(getattr(found, name)).tobytes():
                raise FaultError(f"{name} is not that of one undisturbed device")
        if (want.totals, want.electrons, want.electrons_std) != (found.totals, found.electrons, found.electrons_std):
            raise FaultError("the sums are not those of one undisturbed device")
    if verify(folder / "rho.h5"):
        raise FaultError("tiles do not match their checksums")
    left = [p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".h5"]
    if left:
        raise FaultError(f"{left} stay behind")
