"""CUDA driver of the smooth descriptors (Numba): device arrays in, features left on the device.

A thread block per batch of 64 grid points and species finds the atoms around the batch, another puts them in order,
and a third, of a thread per point, makes all features of the batch. Importing this module needs Numba's CUDA target,
but no device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np

from gpurho.kernels._cuda_driver import BLOCK, MOST, Workspace, begun, finished
from gpurho.kernels._cuda_exact import N_COUNTERS
from gpurho.kernels._cuda_sources import GATHER_THREADS, compiled
from gpurho.kernels._smooth_cuda import column_order
from gpurho.kernels._smooth_formulas import DAMPING, UNIT
from gpurho.kernels.batches import LANES, Batches
from gpurho.kernels.celllist import SpeciesCells
from gpurho.kernels.cuda import CudaFeatures
from gpurho.kernels.smooth import SmoothSizes

ALL = 2**31 - 1
"""As the number of nearest atoms that are wanted: all within the cutoff."""
FIRST_ROOM = 96
"""Places for the atoms of a batch and species, to begin with."""
EVERYTHING = np.array([ALL], np.int32)
N_MARKS = N_COUNTERS + 2
"""The counters, the one class, and the most atoms of a batch."""


def smooth_features(
    points: Any,
    batches: Batches,
    cells: SpeciesCells,
    sizes: SmoothSizes,
    out: Any,
    workspace: Workspace | None = None,
    stream: Any = 0,
) -> tuple[int, int, int]:
    """Descriptors of points on the current CUDA device.

    As `gpurho.kernels.smooth.smooth_features`, with device arrays in C order for `points`, `out` and the arrays of
    `batches` and `cells`; only ``cells.origin``, ``cells.edge`` and ``cells.shape`` stay on the host.

    Parameters
    ----------
    workspace : Workspace, optional
        Scratch memory to use again.
    stream : numba.cuda stream, optional
        On which the kernels run; the features are complete for work that follows on it.

    Returns
    -------
    n_capped, n_tied, n_exact : int
        As on the CPU.

    Raises
    ------
    DeviceError
        Without a device, or where its memory does not suffice.
    SettingsError
        For more channels than a thread has registers for.
    """
    work = Workspace() if workspace is None else workspace
    if len(points) == 0:
        return 0, 0, 0

    def begin(marks: Any) -> int:
        return start_smooth(points, batches, cells, sizes, out, marks, work, stream)

    return finished(begin, suffices, N_MARKS, work, stream)


def suffices(marks: Any, room: int, workspace: Workspace) -> bool:
    """Whether all atoms of each batch had a place, by the `marks` of `start_smooth`; else there are more next time."""
    workspace.enlarge("room", int(marks[MOST]))
    return bool(marks[MOST] <= room)


def start_smooth(
    points: Any,
    batches: Batches,
    cells: SpeciesCells,
    sizes: SmoothSizes,
    out: Any,
    marks: Any,
    workspace: Workspace,
    stream: Any = 0,
) -> int:
    """Begin what `smooth_features` does; nothing waits for the device, and nothing comes from it.

    Parameters
    ----------
    marks : (N_MARKS,) int32 device array
        OUTPUT: see `gpurho.kernels._cuda_driver`.

    Returns
    -------
    room : int
        Places for the atoms of a batch. Where ``marks[MOST]`` turns out larger, `out` is of no use; see `suffices`.
    """

    def launch(device: int) -> int:
        return _launch(points, batches, cells, sizes, out, marks, workspace, stream, device)

    return begun(launch, len(points))


def _launch(
    points: Any, batches: Batches, cells: SpeciesCells, sizes: SmoothSizes, out: Any, marks: Any,
    work: Workspace, stream: Any, device: int,
) -> int:  # fmt: skip
    n_batches, n_atoms = len(batches.start) - 1, len(cells.positions)
    n_entries = n_batches * sizes.n_species
    points, features, marks = work.view(points), work.view(out), work.view(marks)
    order, batch_start = work.view(batches.order), work.view(batches.start)
    positions, cell_start = work.view(cells.positions), work.view(cells.start)
    box = (*(float(x) for x in cells.origin), float(cells.edge), *(int(n) for n in cells.shape))

    def run(name: str, blocks: int, threads: int, *arguments: Any) -> None:
        compiled(sizes, name, device)[blocks, threads, stream](*arguments)

    columns = work.constant("columns", _columns(sizes), stream)
    # One class, into which every batch falls.
    class_sizes = work.constant("class_sizes", EVERYTHING, stream)
    atoms = work.array("atoms", (n_atoms, 4), np.int32)
    spheres = work.array("spheres", (n_batches, 4), np.float64)
    cuts = work.array("cuts", (n_entries,), np.float64)
    counts = work.array("counts", (n_entries,), np.int32)
    entries = work.array("entries", (1, n_entries), np.int32)
    nothing = work.array("nothing", (1,), np.uint8)
    room = work.sizes.setdefault("room", FIRST_ROOM)
    lists = work.array("lists", (n_entries, room), np.int32)
    quads = work.array("quads", (n_entries, room, 4), np.int32)
    counters, class_counts = marks[:N_COUNTERS], marks[N_COUNTERS:]
    if n_atoms:
        run("coordinates", -(-n_atoms // BLOCK), BLOCK, positions, atoms)
    run("reset", 1, BLOCK, nothing, counters, class_counts)
    run(
        "gather", n_entries, GATHER_THREADS,
        points, order, batch_start, positions, cell_start, *box, ALL, 0, sizes.cutoff, class_sizes,
        spheres, cuts, counts, lists, class_counts, entries, nothing,
    )  # fmt: skip
    run("arrange", n_entries, LANES, atoms, counts, lists, quads)
    run(
        "expand", n_batches, LANES,
        points, order, batch_start, counts, quads, columns,
        np.float32((UNIT / sizes.cutoff) ** 2), np.float32((DAMPING / UNIT) ** 2), counters, features,
    )  # fmt: skip
    return room


@lru_cache(maxsize=64)
def _columns(sizes: SmoothSizes) -> Any:
    return np.array(column_order(sizes), np.int32)


class CudaSmooth(CudaFeatures):
    """Smooth descriptors of one structure on one CUDA device, as torch tensors.

    Parameters
    ----------
    sizes : SmoothSizes
    device : str
        A CUDA device as torch names it.

    Raises
    ------
    MissingDependencyError
        Without numba-cuda.
    DeviceError
        Where torch or Numba cannot use the device.
    """

    def __init__(self, sizes: SmoothSizes, device: str) -> None:
        super().__init__(None, sizes, device)

    def _n_marks(self) -> int:
        return N_MARKS

    def _begin(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any, marks: Any, work: Workspace, stream: Any
    ) -> Any:
        return start_smooth(points, batches, cells, self.sizes, out, marks, work, stream)

    def _suffices(self, marks: Any, given: Any, workspace: Workspace) -> bool:
        return suffices(marks, given, workspace)
