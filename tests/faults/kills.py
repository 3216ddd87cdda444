"""kill -9 of a command at random moments, as often as it takes; then the same command again, until it is done."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from typing import Any

from faults.bench import LABEL, PREDICTIONS, TRAININGS, Bench, Job
from faults.harness import FaultError

MOST_RUNS = 60
"""Runs after which a chain that does not end makes no headway."""


def predict(bench: Bench) -> dict[str, Any]:
    """Predictions in several settings."""
    return killed(bench, PREDICTIONS, bench.count(3, 60))


def label(bench: Bench) -> dict[str, Any]:
    """Labelling runs, whose workers have to end with them."""
    return killed(bench, [LABEL], bench.count(2, 60))


def train(bench: Bench) -> dict[str, Any]:
    """Training, with features in memory and on disk."""
    return killed(bench, TRAININGS[: bench.count(1, 3)], bench.count(2, 60))


def after_the_end(name: str) -> bool:
    """What may stay of a training run that was killed between its model and its own cleaning, and is then refused."""
    return name.endswith((".checkpoint", ".lock", ".channels.json", ".features", ".npz"))


def nothing(name: str) -> bool:
    """Nothing may stay."""
    return False


def killed(bench: Bench, jobs: Sequence[Job], kills: int) -> dict[str, Any]:
    """Kill `jobs` in turn, `kills` times in all; each chain ends with the bytes of an undisturbed run."""
    draw = bench.random(f"kills {jobs[0].name}")
    done, chains, by_itself = 0, 0, 0
    while done < kills:
        job = jobs[chains % len(jobs)]
        seconds = bench.calm(job).seconds
        folder = bench.fresh()
        for _ in range(MOST_RUNS):
            running = bench.server.start(*job.words(bench, folder), forked=True)
            # The last chain is left alone when it has had its kills.
            if done < kills and running.hit(signal.SIGKILL, draw.uniform(0.0, seconds)):
                outcome = running.outcome()
                if outcome.code == -signal.SIGKILL:
                    done += 1
                    continue
            outcome = running.outcome()  # it was faster
            if job.name == "train" and outcome.code == 1 and "exists" in outcome.said:
                by_itself += 1
                break
            outcome.expect()
            break
        else:
            raise FaultError(f"{job.name}: no end after {MOST_RUNS} runs")
        job.check(bench, folder, after_the_end if job.name == "train" else nothing)
        chains += 1
    return {"kills": done, "outputs compared": chains, "finished before the last kill": by_itself}
