"""Signals, clocks that jump, and two runs on one output."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from faults.bench import LABEL, PREDICT, TRAIN, Bench, Job
from faults.clock import CLOCKS, YEAR
from faults.harness import FaultError, Outcome
from faults.kills import after_the_end, nothing

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def signals(bench: Bench) -> dict[str, Any]:
    """SIGTERM and SIGINT, once or in quick succession, at random moments: exit codes, one line, and a way on."""
    draw = bench.random("signals")
    sent, early = 0, 0
    for i in range(bench.count(3, 90)):
        job = (PREDICT, LABEL, TRAIN)[i % 3]
        number = (signal.SIGTERM, signal.SIGINT)[i // 3 % 2]
        folder, seconds = bench.fresh(), bench.calm(job).seconds
        running = bench.server.start(*job.words(bench, folder), forked=True)
        if running.hit(number, draw.uniform(0.05, 0.95) * seconds):
            if i % 4 == 3:  # somebody who does not wait
                time.sleep(draw.uniform(0, 0.02))
                os.kill(running.pid, number)
            outcome = running.outcome()
            if outcome.code == 0:
                early += 1  # it was at the end of its work
            elif "gpurho: interrupted" not in outcome.said and outcome.code == -number:
                early += 1  # before the command took signals into its hands, or after
            else:
                # A second signal may come when the command has ended; a shell gives such an end the same number.
                ended = Outcome(
                    outcome.code if outcome.code >= 0 else 128 - outcome.code, outcome.said, outcome.seconds
                )
                _one_line(ended.expect(CODES[number]).said)
                sent += 1
        outcome = job.run(bench, folder)
        if not (job.name == "train" and outcome.code == 1 and "exists" in outcome.said):
            outcome.expect()
        job.check(bench, folder, after_the_end if job.name == "train" else nothing)
    return {"signals": sent, "at the very beginning or end": early}


def _one_line(said: str) -> None:
    lines = [line for line in said.splitlines() if line.startswith("gpurho: ")]
    if len(lines) != 1 or "Traceback" in said or "the same command again" not in lines[0]:
        raise FaultError(f"not one line that says how to go on: {said[-2000:]}")


def clocks(bench: Bench) -> dict[str, Any]:
    """Clocks that go back, jump by years or stand still, and files from the future: the same bytes."""
    draw = bench.random("clocks")
    jobs = (PREDICT, LABEL, TRAIN)
    done = 0
    for i in range(bench.count(3, 45)):
        job, clock = jobs[i % 3], list(CLOCKS)[i // 3 % 3 if bench.full else 1]
        folder = bench.fresh()
        running = bench.server.start(*job.words(bench, folder), forked=True, clock=clock)
        if running.hit(signal.SIGKILL, draw.uniform(0.2, 0.9) * bench.calm(job).seconds):
            running.outcome()
        for path in folder.rglob("*"):
            when = time.time() + draw.choice((-20, 20)) * YEAR
            os.utime(path, (when, when))
        outcome = job.run(bench, folder, clock=clock)
        if not (job.name == "train" and outcome.code == 1 and "exists" in outcome.said):
            outcome.expect()
        job.check(bench, folder, after_the_end if job.name == "train" else nothing)
        done += 1
    return {"runs": done, "clocks": list(CLOCKS) if bench.full else ["jumps"]}


def two_runs(bench: Bench) -> dict[str, Any]:
    """Two runs on one output: the second is told of the first in a line, and the first is not disturbed."""
    turned_away = 0
    for i in range(bench.count(3, 30)):
        turned_away += _two(bench, (PREDICT, LABEL, TRAIN)[i % 3], bench.fresh())
    return {"runs turned away": turned_away}


def _two(bench: Bench, job: Job, folder: Path) -> int:
    bench.calm(job)
    first = bench.server.start(*job.words(bench, folder), forked=True)
    deadline = time.monotonic() + 20.0
    while not any(folder.rglob("*lock")) and time.monotonic() < deadline:
        time.sleep(0.002)
    second = bench.server.start(*job.words(bench, folder), forked=True)
    one, two = first.wait(), second.wait()
    # On a busy machine the second may come first, or when the first is done.
    for outcome in (one, two):
        if outcome.code != 0 and "exists" not in outcome.said:
            outcome.refused(job.output, "wait for it")
    if one.code != 0 and two.code != 0:
        raise FaultError(f"neither of two runs finished: {one.said} {two.said}")
    job.check(bench, folder)
    return int(one.code != 0) + int(two.code != 0)
