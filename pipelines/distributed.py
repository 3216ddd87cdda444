"""Prediction by the workers of a Dask cluster, each with its own device and its own files.

This process cuts the tiles into runs, gives workers the atoms around each of them, and waits. Fields go from the
workers to shards on a file system that all of them see (`gpurho.shards`); through the scheduler come only counts.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gpurho.density import Density
from gpurho.errors import GpurhoError, SettingsError, StoreError
from gpurho.fields import Correction
from gpurho.memorystore import in_memory
from gpurho.pipelines.cluster import local_client
from gpurho.pipelines.parts import Nearby
from gpurho.pipelines.settings import Job, versions
from gpurho.pipelines.shardwork import Task, work
from gpurho.pipelines.tiling import Timing
from gpurho.pipelines.trust import job_trust
from gpurho.shards import Run, ShardFolder

if TYPE_CHECKING:
    from distributed import Client, Future

RUNS_PER_WORKER = 16
"""Runs that each worker gets, about: many, so that all end together; not more, since each needs its halo."""

WAITING = 2
"""Runs sent out for each worker: the one at work and the next."""

REMEDY = "finished tiles are safe: run the same command again"

VISIBLE_SECONDS = 90.0
"""Seconds that a network file system has to show what another node wrote; they keep names for up to a minute."""

POLL_SECONDS = 1.0
"""Seconds between looks for workers that came or went."""


def run_distributed(job: Job, out: Path | None, resume: bool = True, progress: bool = True) -> Density:
    """Do a job on its cluster; see `gpurho.predict`. Without `out` the shards are temporary and the field in memory."""
    if out is not None:
        return _run(job, out, resume, progress)
    with (
        tempfile.TemporaryDirectory(prefix="gpurho-") as folder,
        _run(job, Path(folder) / "rho.h5", resume, progress) as density,
    ):
        return in_memory(density)


def _run(job: Job, path: Path, resume: bool, progress: bool) -> Density:
    begin = time.perf_counter()
    with _client(job) as client:
        per_run = max(1, len(job.tiles) // (RUNS_PER_WORKER * max(1, _n_workers(client))))
        folder = ShardFolder(path, job.layout(), per_run, resume)
        try:
            todo = _Work(job, folder, client)
            timing = todo.run(progress)
            correction = Correction.conserving(job.conserve, folder.totals(), job.grid.dv, job.electrons)
            density = folder.finish(correction, job_trust(job, progress))
        finally:
            folder.close()
    timing.total = time.perf_counter() - begin
    density.info["tiles"] = todo.tiles
    density.info["timing"] = {**asdict(timing), "points_per_second": timing.points_per_second}
    return density


@contextlib.contextmanager
def _client(job: Job) -> Iterator[Client]:
    if job.client is not None:
        yield job.client
    else:
        with local_client(job.devices, job.device) as client:
            yield client


def _n_workers(client: Client) -> int:
    return len(client.scheduler_info(n_workers=-1)["workers"])


class _Work:
    """The runs of a job that are not finished, on their way through a cluster."""

    def __init__(self, job: Job, folder: ShardFolder, client: Client) -> None:
        self.job, self.folder, self.client = job, folder, client
        self.session = uuid.uuid4().hex
        self.settings, self.versions = job.settings(), versions()
        self._nearby = Nearby(job)
        self._futures: dict[Future, tuple[Run, Task]] = {}
        self.timing = Timing()
        self.tiles = {"computed": 0, "taken over": 0}

    def run(self, progress: bool) -> Timing:
        """Do all runs; on an error or interrupt, workers stop after the tile that they are at."""
        from tqdm import tqdm

        waiting = deque(run for run in self.folder.runs if run.index not in self.folder.finished)
        with tqdm(
            total=self.job.tiles.n_points,
            initial=self.job.tiles.n_points - sum(run.tiles.n_points for run in waiting),
            unit=" points",
            unit_scale=True,
            desc=f"density of {len(self.job.structure)} atoms",
            disable=None if progress else True,
        ) as bar:
            try:
                if waiting:
                    self._prepare()
                while waiting or self._futures:
                    with self._connected():
                        workers = _n_workers(self.client)
                        while waiting and len(self._futures) < WAITING * max(1, workers):
                            self._send(waiting.popleft())
                        bar.set_postfix_str(f"{workers} workers" if workers else "waiting for workers", refresh=False)
                        for run in self._finished():
                            bar.update(run.tiles.n_points)
                            self.timing.n_points += run.tiles.n_points
            finally:
                self._end()
        return self.timing

    @contextlib.contextmanager
    def _connected(self) -> Iterator[None]:
        """Whatever Dask raises when its scheduler is gone, as one error that says what is safe."""
        from distributed import CancelledError
        from distributed.comm import CommClosedError

        try:
            yield
        except GpurhoError:
            raise
        except Exception as error:
            if not isinstance(error, CancelledError | CommClosedError) and self.client.status == "running":
                raise
            raise StoreError(f"the connection to the scheduler was lost; {REMEDY}") from error

    def _prepare(self) -> None:
        """What all runs share: the model, and the sign that somebody waits for them."""
        task = self._task(self.folder.runs[0])
        try:
            # Whatever an earlier run left there: were it damaged, no run would ever get past it.
            self.job.model.save(task.model)
            for old in self.folder.folder.glob("*.session"):  # of a process that was killed: its workers may stop
                old.unlink(missing_ok=True)
            task.signal.touch()
        except OSError as error:
            raise StoreError(f"cannot write in {self.folder.folder}: {error.strerror}; make room") from None

    def _task(self, run: Run) -> Task:
        job = self.job
        return Task(
            folder=self.folder.folder.absolute(),
            name=run.name,
            tiles=run.tiles,
            grid=job.grid,
            names=job.names,
            settings=self.settings,
            versions=self.versions,
            bins=self._nearby.bins,
            session=self.session,
            device=job.device.split(":")[0],
            precision=job.precision,
            executor=job.executor,
            uncertainty=job.uncertainty,
            samples=job.samples,
            seed=job.seed,
        )

    def _send(self, run: Run) -> None:
        task = self._task(run)
        self._write_atoms(task)
        # The name of the task is new each time: a scheduler that remembers an earlier run must not answer for it.
        future = self.client.submit(work, task, key=f"gpurho-{self.session[:12]}-{run.name}", pure=False)
        self._futures[future] = (run, task)

    def _write_atoms(self, task: Task) -> None:
        """The atoms that the points of a run see, into a file that its worker reads."""
        structure, owners = self._nearby.atoms(task.tiles)
        new = task.atoms.with_suffix(".tmp")
        try:
            with open(new, "wb") as file:
                np.savez(
                    file,
                    positions=structure.positions,
                    numbers=structure.numbers,
                    cell=structure.cell,
                    pbc=structure.pbc,
                    owners=owners,
                )
            os.replace(new, task.atoms)
        except OSError as error:
            raise StoreError(f"cannot write {task.atoms}: {error.strerror}; make room") from None

    def _finished(self) -> list[Run]:
        """Runs that ended within the next second; raises the error of one that failed."""
        from distributed import wait

        with contextlib.suppress(TimeoutError), self.client.as_current():
            wait(list(self._futures), timeout=POLL_SECONDS, return_when="FIRST_COMPLETED")
        done = []
        for future in [future for future in self._futures if future.done()]:
            run, task = self._futures.pop(future)
            facts = self._result(future, run)
            task.atoms.unlink(missing_ok=True)
            self._await_file(self.folder.shard(run))
            self.tiles["computed"] += facts["computed"]
            self.tiles["taken over"] += facts["replayed"]
            timing = facts["timing"]
            for name in ("setup", "features", "network", "wait"):
                setattr(self.timing, name, getattr(self.timing, name) + timing[name])
            done.append(run)
        return done

    def _await_file(self, shard: Path) -> None:
        """Wait until a shard from another node is seen here, which a network file system may put off."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not shard.exists():
            os.listdir(shard.parent)  # makes such a file system look again
            if time.monotonic() > deadline:
                raise StoreError(f"{shard} is finished but not seen here; check that all workers share its folder")
            time.sleep(0.2)

    def _result(self, future: Future, run: Run) -> dict[str, Any]:
        from distributed import KilledWorker

        try:
            facts: dict[str, Any] = future.result()
        except GpurhoError:
            raise
        except KilledWorker as error:
            raise StoreError(
                f"tiles {run.first} to {run.last - 1} killed each worker that tried, most likely for memory; give a"
                f" smaller tile_shape or fewer workers; {REMEDY}"
            ) from error
        except ImportError as error:
            raise SettingsError(f"a worker cannot import gpurho ({error}); install it on all workers") from error
        if facts.get("abandoned"):
            raise StoreError(f"{self.folder.folder} was taken over by another run of the same prediction; wait for it")
        return facts

    def _end(self) -> None:
        """Let workers know that nobody waits any more, and remove what only they needed."""
        with contextlib.suppress(OSError):
            self._task(self.folder.runs[0]).signal.unlink(missing_ok=True)
        for _, task in self._futures.values():
            with contextlib.suppress(OSError):
                task.atoms.unlink(missing_ok=True)
        # The cluster may be gone, which is then what is being said of.
        with contextlib.suppress(Exception):
            self.client.cancel(list(self._futures), force=True)
        self._futures.clear()
