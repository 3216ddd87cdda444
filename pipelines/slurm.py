"""Prediction on workers that Slurm starts one job at a time (dask-jobqueue), from a login node.

    python -m gpurho.pipelines.slurm --jobs 4 --gpus 4 --queue gpu --walltime 02:00:00 -- al.xyz --out rho.h5

What follows ``--`` goes to ``gpurho predict``. Work begins with the first job that starts, and later ones join. For a
whole allocation at once see ``pipelines/scripts/slurm_cluster.sh``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from gpurho.errors import GpurhoError, MissingDependencyError, SettingsError


def slurm_options(
    gpus: int = 1,
    cpus: int = 8,
    memory: str = "64GB",
    walltime: str = "02:00:00",
    queue: str | None = None,
    account: str | None = None,
    interface: str | None = None,
    directives: Sequence[str] = (),
) -> dict[str, Any]:
    """Arguments of ``dask_jobqueue.SLURMCluster`` for jobs of one node.

    Parameters
    ----------
    gpus : int
        GPUs of a job, each with a worker of its own; 0 for one worker on the job's cores.
    cpus : int
        Cores of a job.
    memory, walltime, queue, account, interface
        As dask-jobqueue takes them.
    directives : strings
        More options of sbatch, e.g. ``--constraint=a100``.
    """
    if gpus < 0 or cpus < 1:
        raise SettingsError(f"gpus {gpus} and cpus {cpus} make no job; give 0 or more GPUs and 1 or more cores")
    options: dict[str, Any] = {
        # One task at a time in each worker, whatever cores the job has.
        "cores": 1,
        "processes": 1,
        "job_cpu": cpus,
        "memory": memory,
        "walltime": walltime,
        "queue": queue,
        "account": account,
        "interface": interface,
        "scheduler_options": {"dashboard": False},
        "job_extra_directives": list(directives),
        "job_script_prologue": [f"export OMP_NUM_THREADS={cpus} NUMBA_NUM_THREADS={cpus}"],
    }
    if gpus:
        options["worker_command"] = "dask_cuda.cli"
        options["job_extra_directives"] = [f"--gpus-per-node={gpus}", *directives]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Start the jobs and predict on them; returns the exit code."""
    parser = argparse.ArgumentParser(prog="gpurho.pipelines.slurm", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="jobs, each on one node (1)")
    parser.add_argument("--gpus", type=int, default=1, metavar="N", help="GPUs of a job; 0 for its cores alone (1)")
    parser.add_argument("--cpus", type=int, default=8, metavar="N", help="cores of a job (8)")
    parser.add_argument("--memory", default="64GB", help="memory of a job (64GB)")
    parser.add_argument("--walltime", default="02:00:00", help="time of a job (02:00:00)")
    parser.add_argument("--queue", help="partition")
    parser.add_argument("--account")
    parser.add_argument("--interface", help="network of the nodes, e.g. ib0")
    parser.add_argument("--sbatch", action="append", default=[], metavar="X", help="e.g. --sbatch=--constraint=a100")
    parser.add_argument("--job-script", action="store_true", help="print the script of a job and end")
    parser.add_argument("predict", nargs="+", metavar="...", help="after --: the arguments of gpurho predict")
    options = parser.parse_args(arguments)
    try:
        chosen = slurm_options(
            options.gpus,
            options.cpus,
            options.memory,
            options.walltime,
            options.queue,
            options.account,
            options.interface,
            options.sbatch,
        )
        kind = _slurm_cluster()
    except GpurhoError as error:
        print(f"gpurho: {error}", file=sys.stderr)
        return 1
    from gpurho.cli import main as gpurho

    with kind(**chosen) as cluster:
        if options.job_script:
            print(cluster.job_script())
            return 0
        cluster.scale(jobs=options.jobs)
        return gpurho(["predict", *options.predict, "--scheduler", cluster.scheduler_address])


def _slurm_cluster() -> Any:
    try:
        from dask_jobqueue import SLURMCluster
    except ImportError:
        raise MissingDependencyError("jobs of Slurm need dask-jobqueue; pip install dask-jobqueue") from None
    return SLURMCluster


if __name__ == "__main__":
    sys.exit(main())
