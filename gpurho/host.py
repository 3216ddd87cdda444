"""What a CPU's threads and memory are told, so that torch and Numba make good use of them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

MALLOC = {-3: 2**25, -1: 2**28}
"""glibc's M_MMAP_THRESHOLD (the most it takes) and M_TRIM_THRESHOLD: bytes from which on freed memory goes back."""

Item = TypeVar("Item")


@cache
def keep_freed_memory() -> None:
    """Let this process keep the memory that one batch frees for the next, where the C library is glibc.

    Otherwise every page is cleared and mapped anew, batch by batch; Dask even tells its workers to hand all memory back
    at once (measured: half of their time).
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        for parameter, size in MALLOC.items():
            mallopt(parameter, size)


@cache
def launch_numba() -> None:
    """Start Numba's threads, and leave torch as many as it had.

    Where both use the same OpenMP runtime, Numba's first parallel loop sets the number of threads for torch too: a
    program that asked torch for one thread then ran its networks on all, waiting for each other (measured: 30 times
    the time on a busy machine).
    """
    import numba

    torch = sys.modules.get("torch")
    before = None if torch is None else torch.get_num_threads()
    numba.get_num_threads()  # starts them
    if torch is not None:
        torch.set_num_threads(before)


def side_by_side(work: Callable[[Item], None], items: Iterable[Item]) -> None:
    """``work(item)`` for each item, as many at a time as torch may use threads, each with one thread of its own.

    Small operations gain nothing from several threads that share them (measured: networks of width 32 on 4096 points
    are slower on two threads than on one), and what one thread computes does not depend on their number.
    """
    import torch

    threads = torch.get_num_threads()
    if threads == 1:
        for item in items:
            work(item)
        return
    for _ in _pool(threads).map(work, items):
        pass


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Threads in each of which torch's operations run on one."""
    import torch

    pool = ThreadPoolExecutor(threads, thread_name_prefix="gpurho", initializer=_take_one)
    everyone = threading.Barrier(threads)
    list(pool.map(lambda _: everyone.wait(), range(threads)))
    # A thread's number is its own, but also that of all threads to come.
    torch.set_num_threads(threads)
    return pool


def _take_one() -> None:
    import torch

    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread's first look sets its number to that of the process, so it has to be now


if hasattr(os, "register_at_fork"):
    # A child has none of its parent's threads.
    os.register_at_fork(after_in_child=_pool.cache_clear)


__all__ = ["keep_freed_memory", "launch_numba", "side_by_side"]
