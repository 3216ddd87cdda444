"""One OpenMP runtime, two libraries that count its threads."""

from __future__ import annotations

import sys
from functools import cache


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


__all__ = ["launch_numba"]
