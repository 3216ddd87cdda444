"""Counting the copies between host and device that Numba's CUDA simulator is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def copies() -> Iterator[list[str]]:
    """The names of the functions that copied, in their order; to be used under the simulator."""
    from numba import cuda
    from numba.cuda.simulator.cudadrv import devicearray

    seen: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            seen.append(function.__name__)
            return function(*arguments, **named)

        return call

    array = devicearray.FakeCUDAArray
    plain = cuda.to_device, array.copy_to_host, array.copy_to_device
    cuda.to_device, array.copy_to_host, array.copy_to_device = map(noted, plain)
    try:
        yield seen
    finally:
        cuda.to_device, array.copy_to_host, array.copy_to_device = plain
