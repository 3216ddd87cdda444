"""Clocks that jump: what `time.time` says is changed, never the machine's own clock."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable

YEAR = 365.25 * 86400

_true_time = time.time


def disturb(kind: str) -> None:
    """Let this process see another time of day: "back" (ever earlier), "jumps" (years to and fro) or "still"."""
    clock = CLOCKS[kind]()
    time.time = clock
    time.time_ns = lambda: int(clock() * 1e9)
    import tqdm.std

    tqdm.std.time = clock  # type: ignore[attr-defined]


def _back() -> Callable[[], float]:
    begin, count = _true_time(), itertools.count(1)
    return lambda: begin - 3600.0 * next(count)


def _jumps() -> Callable[[], float]:
    draw = random.Random(11)
    return lambda: max(1.0, _true_time() + draw.uniform(-20, 20) * YEAR)


def _still() -> Callable[[], float]:
    now = _true_time()
    return lambda: now


CLOCKS: dict[str, Callable[[], Callable[[], float]]] = {"back": _back, "jumps": _jumps, "still": _still}
