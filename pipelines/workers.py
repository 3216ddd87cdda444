"""Tasks in worker processes, one process for each slot, so that a worker that dies takes no other's work with it."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from gpurho.dft.processes import end_with_parent

CRASHES = 2
"""Times that a worker may die over one task before the task counts as failed."""

Task = TypeVar("Task")


class WorkerDiedError(RuntimeError):
    """A task whose worker was killed each time."""


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(
    function: Callable[[Task], None], tasks: Sequence[Task], workers: int
) -> Iterator[tuple[Task, BaseException | None]]:
    """Run `function` on each task in worker processes; yields each task as it ends, with its exception or None.

    The function and the tasks must pickle. Workers die with this process, and when the iterator is closed.
    """
    context = multiprocessing.get_context("spawn")
    waiting, again = deque(tasks), dict.fromkeys(range(len(tasks)), 0)
    numbers = {id(task): i for i, task in enumerate(tasks)}
    pools: dict[int, ProcessPoolExecutor] = {}
    running: dict[Future[None], tuple[int, Task]] = {}

    def start(slot: int) -> None:
        if slot not in pools:
            pools[slot] = ProcessPoolExecutor(1, context, initializer=_die_with_parent, initargs=(os.getpid(),))
        task = waiting.popleft()
        running[pools[slot].submit(function, task)] = (slot, task)

    try:
        for slot in range(min(workers, len(tasks))):
            start(slot)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                slot, task = running.pop(future)
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    pools.pop(slot).shutdown(wait=False)
                    number = numbers[id(task)]
                    again[number] += 1
                    if again[number] < CRASHES:
                        waiting.append(task)
                    else:
                        yield task, WorkerDiedError("its worker was killed, most likely for memory; take fewer workers")
                else:
                    yield task, error
                if waiting:
                    start(slot)
    finally:
        for pool in pools.values():
            processes = list((getattr(pool, "_processes", None) or {}).values())
            pool.shutdown(wait=False, cancel_futures=True)
            for process in processes:
                with contextlib.suppress(OSError):
                    process.terminate()


def _die_with_parent(parent: int) -> None:
    """Workers of a killed run must not go on: nobody would wait for them."""
    end_with_parent()
    if os.getppid() != parent:
        os._exit(1)
