"""What the CUDA drivers of both families of descriptors share: scratch memory, and tiles that nothing waits for.

A driver begins a tile with the memory and the kernels that earlier tiles needed. What a tile needs is counted on the
device, in its marks; where they tell, once they are on the host, that it was more, the tile is done again. Marks are
int32: n_capped, n_tied, n_exact, then the batches in each class, and last the most candidate atoms of a batch.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from gpurho.errors import DeviceError, MissingDependencyError
from gpurho.kernels._cuda_exact import N_COUNTERS
from gpurho.kernels._cuda_sources import SIMULATOR

BLOCK = 128
"""Threads of a block of the kernels that have a thread per point."""
MOST = -1
"""Place in the marks of the most candidate atoms of a batch and species."""


@dataclass
class Workspace:
    """Scratch arrays on a device that grow as needed and are used again from tile to tile.

    One workspace serves one stream. `sizes` holds numbers that a driver has found to suffice.
    """

    arrays: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    constants: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def array(self, name: str, shape: tuple[int, ...], dtype: Any, order: str = "C") -> Any:
        """An uninitialised array of this shape on the current device."""
        shape = tuple(max(1, n) for n in shape)
        length = int(np.prod(shape, dtype=np.int64))
        flat = self.arrays.get(name)
        if flat is None or flat.size < length or flat.dtype != np.dtype(dtype):
            self.arrays[name] = None
            flat = self.arrays[name] = cuda.device_array(length + length // 4, dtype)
        return flat[:length].reshape(*shape, order=order)

    def constant(self, name: str, values: Any, stream: Any = 0) -> Any:
        """An array with these values on the current device, written when it is asked for first."""
        kept = self.constants.get(name)
        if kept is None or kept[0] is not values:
            kept = self.constants[name] = values, cuda.to_device(values, stream=stream)
        return kept[1]

    def view(self, array: Any) -> Any:
        """The device array as Numba's kernels take it; an empty one as one of length 1 that is never read."""
        if 0 in array.shape:
            kind = np.dtype(str(array.dtype).removeprefix("torch."))
            return self.array(f"no {kind}", tuple(int(n) for n in array.shape), kind)
        return array if SIMULATOR else cuda.as_cuda_array(array)

    def enlarge(self, name: str, needed: int) -> None:
        """See to it that ``sizes[name]`` suffices for what was needed, and for a little more."""
        if needed > self.sizes.get(name, 0):
            self.sizes[name] = needed + needed // 8


@lru_cache(maxsize=64)
def known_sizes(sizes: Any) -> dict[str, int]:
    """`Workspace.sizes` of a specification that all structures of this process share, as they share its kernels.

    Results do not depend on it; without it, the first tiles of each structure would be done twice.
    """
    return {}


def require_cuda() -> None:
    """Raise unless Numba can use a CUDA device.

    Raises
    ------
    MissingDependencyError
        Without numba-cuda.
    DeviceError
        Without a device or a driver.
    """
    if SIMULATOR:
        return
    if importlib.util.find_spec("numba_cuda") is None:
        raise MissingDependencyError(
            "CUDA descriptors need numba-cuda, which is not installed; pip install 'gpurho[cuda13]' or 'gpurho[cuda12]'"
        )
    if not cuda.is_available():
        raise DeviceError(
            "no CUDA device can be used here (no driver, no GPU, or no libnvvm: see CUDA_HOME); use device='cpu'"
        )


def no_room(n_points: int) -> DeviceError:
    """The error for features that the device's memory does not hold."""
    return DeviceError(f"the GPU's memory does not hold the descriptors of {n_points} points; use smaller tiles")


def begun(launch: Callable[[int], Any], n_points: int) -> Any:
    """``launch(device)`` for the number of the current device; memory that does not suffice is a `DeviceError`."""
    require_cuda()
    device = 0 if SIMULATOR else cuda.get_current_device().id
    with warnings.catch_warnings():
        # Numba warns about small grids, which tiles of few points rightly have.
        warnings.filterwarnings("ignore", message=".*[Gg]rid size.*")
        try:
            return launch(device)
        except Exception as error:
            if "OUT_OF_MEMORY" not in str(error):
                raise
        # torch keeps memory that it has freed, and Numba cannot take it from there.
        if not SIMULATOR:
            import torch

            torch.cuda.empty_cache()
        try:
            return launch(device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise no_room(n_points) from error
            raise


def finished(
    begin: Callable[[Any], Any],
    suffices: Callable[[Any, Any, Workspace], bool],
    n_marks: int,
    workspace: Workspace,
    stream: Any,
) -> tuple[int, int, int]:
    """Begin some points, as often as needed, and wait for them: (n_capped, n_tied, n_exact).

    Parameters
    ----------
    begin : callable
        Called with the marks, (n_marks,) int32 on the device, which it fills; returns what the points were given.
    suffices : callable
        Whether that was enough, by the marks on the host, what was given, and the workspace, which it may enlarge.
    """
    while True:
        marks = workspace.array("marks", (n_marks,), np.int32)
        given = begin(marks)
        found = marks.copy_to_host(stream=stream)
        if stream:
            stream.synchronize()
        if suffices(found, given, workspace):
            return counts(found)


def counts(marks: Any) -> tuple[int, int, int]:
    """(n_capped, n_tied, n_exact) of marks on the host."""
    n_capped, n_tied, n_exact = (int(x) for x in marks[:N_COUNTERS])
    return n_capped, n_tied, n_exact
