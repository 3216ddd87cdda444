"""Tasks in worker processes, one process for each slot, so that a worker that dies takes no other's work with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from gpurho.dft.processes import end_with_parent
from gpurho.errors import SettingsError

DIED = "its worker was killed, most likely for memory; take fewer workers"
PATIENCE = 5.0
"""Seconds that workers have to end."""

CRASHES = 2
"""Times that a worker may die over one task before the task counts as failed."""

Task = TypeVar("Task")


class WorkerDiedError(RuntimeError):
    """A task whose worker was killed each time."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], None],
    tasks: Sequence[Task],
    workers: int,
    finished: Callable[[Task], bool] = lambda task: False,
) -> Iterator[tuple[Task, BaseException | None]]:
    """Run `function` on each task in worker processes; yields each task as it ends, with its exception or None.

    The function and the tasks must pickle. Workers end with this process, and when the iterator is closed. Of a task
    whose worker died, `finished` says whether it was done nevertheless.

    Raises
    ------
    SettingsError
        For fewer than one worker, or where workers cannot start at all.
    """
    if workers < 1:
        raise SettingsError(f"{workers} workers cannot work; give 1 or more")
    context = multiprocessing.get_context("spawn")
    waiting = deque(enumerate(tasks))
    crashes = [0] * len(tasks)
    pools: dict[int, ProcessPoolExecutor] = {}
    running: dict[Future[None], tuple[int, int]] = {}

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, context, initializer=_worker, initargs=(os.getpid(),))

    def start(slot: int) -> None:
        number, task = waiting.popleft()
        if slot not in pools:
            pools[slot] = new_pool()
        try:
            future = pools[slot].submit(function, task)
        except BrokenProcessPool:  # it died while it was idle, over nothing
            pools[slot] = new_pool()
            future = pools[slot].submit(function, task)
        running[future] = (slot, number)

    try:
        if waiting:
            pools[0] = new_pool()
            _probe(pools[0])
        for slot in range(min(workers, len(tasks))):
            start(slot)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, number = running.pop(future)
                task, error, over = tasks[number], future.exception(), True
                if isinstance(error, BrokenProcessPool):
                    pools.pop(slot).shutdown(wait=False)
                    crashes[number] += 1
                    over = finished(task) or crashes[number] >= CRASHES
                    error = None if finished(task) else WorkerDiedError(DIED)
                    if not over:
                        waiting.append((number, task))
                # The worker goes on before the caller looks at the result.
                if waiting:
                    start(slot)
                if over:
                    yield task, error
    finally:
        _end(list(pools.values()))


def _probe(pool: ProcessPoolExecutor) -> None:
    """A worker that cannot start is told of as what it is, and not as a task that failed."""
    try:
        pool.submit(os.getpid).result()
    except BrokenProcessPool:
        raise SettingsError(
            "workers cannot start: call this from a file, under if __name__ == '__main__':, as multiprocessing asks"
        ) from None


def _end(pools: list[ProcessPoolExecutor]) -> None:
    """Stop all workers: politely, so that they remove their temporary files, then by force."""
    processes = [p for pool in pools for p in (getattr(pool, "_processes", None) or {}).values()]
    for pool in pools:
        pool.shutdown(wait=False, cancel_futures=True)
    for process in processes:
        with contextlib.suppress(OSError):
            process.terminate()
    deadline = time.monotonic() + PATIENCE
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()


def _worker(parent: int) -> None:
    """Workers of a killed run must not go on: nobody would wait for them."""
    end_with_parent()
    # An interrupt at the terminal is for the parent, which then ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if os.getppid() != parent:
        os._exit(1)
