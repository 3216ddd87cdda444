"""CUDA driver of the smooth descriptors (Numba): device arrays in, features left on the device.

A thread block per batch of 64 grid points and species finds the atoms around the batch, another puts them in order,
and a third, of a thread per point, makes all features of the batch. Importing this module needs Numba's CUDA target,
but no device.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from gpurho.kernels._cuda_sources import GATHER_THREADS, SIMULATOR, compiled
from gpurho.kernels._smooth_cuda import column_order
from gpurho.kernels._smooth_formulas import DAMPING, UNIT
from gpurho.kernels.batches import LANES, Batches
from gpurho.kernels.celllist import SpeciesCells
from gpurho.kernels.cuda import BLOCK, CudaFeatures, Workspace, device_view, no_room, require_cuda
from gpurho.kernels.smooth import SmoothSizes

ALL = 2**31 - 1
"""As the number of nearest atoms that are wanted: all within the cutoff."""
FIRST_ROOM = 96
"""Places for the atoms of a batch and species, to begin with."""


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
    require_cuda()
    device = 0 if SIMULATOR else cuda.get_current_device().id
    work = Workspace() if workspace is None else workspace
    with warnings.catch_warnings():
        # Numba warns about small grids, which tiles of few points rightly have.
        warnings.filterwarnings("ignore", message=".*[Gg]rid size.*")
        try:
            return _launch(points, batches, cells, sizes, out, work, stream, device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise no_room(len(points)) from error
            raise


def _launch(
    points: Any, batches: Batches, cells: SpeciesCells, sizes: SmoothSizes, out: Any,
    work: Workspace, stream: Any, device: int,
) -> tuple[int, int, int]:  # fmt: skip
    n_points, n_batches, n_atoms = (int(n) for n in (len(points), len(batches.start) - 1, len(cells.positions)))
    if n_points == 0:
        return 0, 0, 0
    n_entries = n_batches * sizes.n_species
    points, features = device_view(points), device_view(out)
    order, batch_start = device_view(batches.order), device_view(batches.start)
    positions, cell_start = device_view(cells.positions), device_view(cells.start)
    box = (*(float(x) for x in cells.origin), float(cells.edge), *(int(n) for n in cells.shape))

    def run(name: str, blocks: int, threads: int, *arguments: Any) -> None:
        compiled(sizes, name, device)[blocks, threads, stream](*arguments)

    def read(array: Any) -> Any:
        values = array.copy_to_host(stream=stream)
        if stream:
            stream.synchronize()
        return values

    def constant(name: str, values: Any) -> Any:
        array = work.array(name, values.shape, values.dtype)
        array.copy_to_device(values, stream=stream)
        return array

    columns = constant("columns", _columns(sizes))
    counters = work.array("counters", (1,), np.int32)
    atoms = work.array("atoms", (n_atoms, 4), np.int32)
    spheres = work.array("spheres", (n_batches, 4), np.float64)
    cuts = work.array("cuts", (n_entries,), np.float64)
    counts = work.array("counts", (n_entries,), np.int32)
    # One class, into which every batch falls.
    class_sizes = constant("class_sizes", np.array([ALL], np.int32))
    class_counts = work.array("class_counts", (2,), np.int32)
    entries = work.array("entries", (1, n_entries), np.int32)
    nothing = work.array("nothing", (1,), np.uint8)
    if n_atoms:
        run("coordinates", -(-n_atoms // BLOCK), BLOCK, positions, atoms)
    room, most = work.sizes.setdefault("room", FIRST_ROOM), 0
    while True:
        lists = work.array("lists", (n_entries, room), np.int32)
        run("reset", 1, BLOCK, nothing, counters, class_counts)
        run(
            "gather", n_entries, GATHER_THREADS,
            points, order, batch_start, positions, cell_start, *box, ALL, 0, sizes.cutoff, class_sizes,
            spheres, cuts, counts, lists, class_counts, entries, nothing,
        )  # fmt: skip
        most = int(read(class_counts)[1])
        if most <= room:
            break
        room = work.sizes["room"] = most + most // 8
    quads = work.array("quads", (n_entries, room, 4), np.int32)
    run("arrange", n_entries, LANES, atoms, counts, lists, quads)
    run(
        "expand", n_batches, LANES,
        points, order, batch_start, counts, quads, columns,
        np.float32((UNIT / sizes.cutoff) ** 2), np.float32((DAMPING / UNIT) ** 2), counters, features,
    )  # fmt: skip
    return int(read(counters)[0]), 0, 0


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

    def _run(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any, work: Workspace, stream: Any
    ) -> tuple[int, int, int]:
        return smooth_features(points, batches, cells, self.sizes, out, work, stream)
