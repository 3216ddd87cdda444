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
EVERYTHING = np.array([ALL], np.int32)
ALONE, MOST, N_MARKS = 0, 2, 3
"""Places in the marks of `start_smooth`; between them lies the number of batches."""


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
    while True:
        marks = work.array("marks", (N_MARKS,), np.int32)
        room = start_smooth(points, batches, cells, sizes, out, marks, work, stream)
        found = marks.copy_to_host(stream=stream)
        if stream:
            stream.synchronize()
        if suffices(found, room, work):
            return int(found[ALONE]), 0, 0


def suffices(marks: Any, room: int, workspace: Workspace) -> bool:
    """Whether all atoms of each batch had a place, by the `marks` of `start_smooth`; else there are more next time."""
    most = int(marks[MOST])
    if most > room:
        workspace.sizes["room"] = max(workspace.sizes.get("room", 0), most + most // 8)
    return most <= room


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
        OUTPUT: points with no atom within the cutoff at ``marks[ALONE]``, most atoms of a batch at ``marks[MOST]``.

    Returns
    -------
    room : int
        Places for the atoms of a batch. Where ``marks[MOST]`` turns out larger, `out` is of no use; see `suffices`.
    """
    require_cuda()
    device = 0 if SIMULATOR else cuda.get_current_device().id
    with warnings.catch_warnings():
        # Numba warns about small grids, which tiles of few points rightly have.
        warnings.filterwarnings("ignore", message=".*[Gg]rid size.*")
        try:
            return _launch(points, batches, cells, sizes, out, marks, workspace, stream, device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise no_room(len(points)) from error
            raise


def _launch(
    points: Any, batches: Batches, cells: SpeciesCells, sizes: SmoothSizes, out: Any, marks: Any,
    work: Workspace, stream: Any, device: int,
) -> int:  # fmt: skip
    n_batches, n_atoms = len(batches.start) - 1, len(cells.positions)
    n_entries = n_batches * sizes.n_species
    points, features, marks = device_view(points), device_view(out), device_view(marks)
    order, batch_start = device_view(batches.order), device_view(batches.start)
    positions, cell_start = device_view(cells.positions), device_view(cells.start)
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
    counters, class_counts = marks[: ALONE + 1], marks[ALONE + 1 :]
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

    def _run(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any, work: Workspace, stream: Any
    ) -> tuple[int, int, int]:
        return smooth_features(points, batches, cells, self.sizes, out, work, stream)

    def start(self, points: Any, batches: Batches, cells: SpeciesCells, out: Any) -> tuple[Any, Any, Any]:
        """Begin what a call does: (values, marks, room), the marks as a tensor on the device; see `start_smooth`."""
        import torch

        marks = torch.zeros(N_MARKS, dtype=torch.int32, device=self.device)
        if len(points) == 0:
            return out, marks, 0

        def begin(points: Any, cells: SpeciesCells, work: Workspace, stream: Any) -> int:
            there = self._on_device(batches)
            return start_smooth(points, there, cells, self.sizes, out, marks, work, stream)

        return out, marks, self._on_stream(points, cells, begin)

    def suffices(self, marks: Any, room: int) -> bool:
        """`suffices` of the marks on the host."""
        import torch

        return suffices(marks, room, self._workspaces[torch.cuda.current_stream(self.device).cuda_stream])
