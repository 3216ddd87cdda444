"""CUDA driver of the scalar-product descriptors (Numba): device arrays in, features left on the device.

The same two paths as `gpurho.kernels.cpu`. A thread block per batch of 64 grid points and species finds the candidate
atoms and sorts the batch into a class by their number; the class's kernel orders the candidates of each point by a
sorting network in registers and takes the cosines; the points that this cannot do are listed and done by the exact
formulas in float64. Results do not depend on timing: a point's row is written by one thread in a fixed order. No
number is read from the device on the way: blocks and threads are as many as there may be work for, and look there.

Importing this module needs Numba's CUDA target, but no device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
from numba import cuda

from gpurho.errors import DeviceError, SettingsError
from gpurho.kernels import _cuda_exact, _cuda_select
from gpurho.kernels._cuda_driver import (
    BLOCK,
    MOST,
    Workspace,
    begun,
    counts,
    finished,
    known_sizes,
    no_room,
    require_cuda,
)
from gpurho.kernels._cuda_exact import N_COUNTERS
from gpurho.kernels._cuda_sources import GATHER_THREADS, class_sizes, compiled
from gpurho.kernels.batches import LANES, Batches
from gpurho.kernels.celllist import SpeciesCells
from gpurho.kernels.scalar_product import TIE_TOLERANCE, FeatureSizes, NeighborArrays


def scalar_product_features(
    points: Any,
    batches: Batches,
    cells: SpeciesCells,
    neighbors: NeighborArrays,
    sizes: FeatureSizes,
    out: Any,
    workspace: Workspace | None = None,
    stream: Any = 0,
) -> tuple[int, int, int]:
    """Descriptors of points on the current CUDA device.

    As `gpurho.kernels.scalar_product.scalar_product_features`, with device arrays (anything that has
    ``__cuda_array_interface__``: torch tensors, cupy and Numba arrays) in C order for `points`, `out` and the arrays
    of `batches`, `cells` and `neighbors`; only ``cells.origin``, ``cells.edge`` and ``cells.shape`` stay on the host.

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
    """
    require_cuda()
    work = Workspace() if workspace is None else workspace
    if len(points) == 0:
        return 0, 0, 0

    def begin(marks: Any) -> tuple[int, int]:
        return start_scalar_product(points, batches, cells, neighbors, sizes, out, marks, work, stream)

    return finished(begin, suffices, n_marks(sizes), work, stream)


def n_marks(sizes: FeatureSizes) -> int:
    """How many marks `start_scalar_product` takes."""
    return N_COUNTERS + len(_networks(sizes)) + 1


def suffices(marks: Any, given: tuple[int, int], workspace: Workspace) -> bool:
    """Whether features are right, by the `marks` of `start_scalar_product`; else it gives more next time.

    `given` is what it returned: every class that has batches has to be among it, and room for the candidates of every
    batch, where points took the exact path.
    """
    room, classes = given
    occupied = sum(1 << group for group, n in enumerate(marks[N_COUNTERS:MOST]) if n > 0)
    needed = int(marks[MOST]) + _cuda_exact.ROOM
    workspace.enlarge("room", needed)
    workspace.sizes["classes"] = workspace.sizes.get("classes", 0) | occupied
    enough_room = room > 0 and (needed <= room or marks[_cuda_exact.N_LISTED] == 0)
    return enough_room and occupied | classes == classes


def start_scalar_product(
    points: Any,
    batches: Batches,
    cells: SpeciesCells,
    neighbors: NeighborArrays,
    sizes: FeatureSizes,
    out: Any,
    marks: Any,
    workspace: Workspace,
    stream: Any = 0,
) -> tuple[int, int]:
    """Begin what `scalar_product_features` does; nothing waits for the device, and nothing comes from it.

    Parameters
    ----------
    marks : (n_marks(sizes),) int32 device array
        OUTPUT: see `gpurho.kernels._cuda_driver`.

    Returns
    -------
    room, classes : int
        Places for the candidates of a point on the exact path, and the classes (bit by bit) whose kernels were
        launched: those that earlier points had batches in, because each takes seconds to compile. Where
        `suffices` finds that the points needed more, `out` is of no use.
    """

    def launch(device: int) -> tuple[int, int]:
        return _launch(points, batches, cells, neighbors, sizes, out, marks, workspace, stream, device)

    return begun(launch, len(points))


@lru_cache(maxsize=64)
def _networks(sizes: FeatureSizes) -> Any:
    """Candidates that each class takes; without a usable network, one that nothing fits into."""
    return np.array(class_sizes(sizes) or [0], np.int32)


def _launch(
    points: Any, batches: Batches, cells: SpeciesCells, neighbors: NeighborArrays, sizes: FeatureSizes, out: Any,
    marks: Any, work: Workspace, stream: Any, device: int,
) -> tuple[int, int]:  # fmt: skip
    n_points, n_batches = int(points.shape[0]), int(batches.start.shape[0]) - 1
    _, n_fine, n_sorted = _cuda_select.ranks(sizes)
    networks = _networks(sizes)
    n_entries = n_batches * sizes.n_species
    cutoff, gap = np.float32(sizes.cutoff), np.float32(1.5 * TIE_TOLERANCE + 3.0e-6)
    view = work.view
    points, features, marks = view(points), view(out), view(marks)
    order, batch_start = view(batches.order), view(batches.start)
    positions, owners, cell_start = view(cells.positions), view(cells.owners), view(cells.start)
    box = (*(float(x) for x in cells.origin), float(cells.edge), *(int(n) for n in cells.shape))
    bonds, tied_atoms = view(neighbors.bonds), view(neighbors.tied)

    def run(name: str, blocks: int, threads: int, *arguments: Any) -> None:
        compiled(sizes, name, device)[blocks, threads, stream](*arguments)

    per_point = -(-n_points // BLOCK)
    exact = work.array("exact", (n_points,), np.uint8)
    counters, class_counts = marks[:N_COUNTERS], marks[N_COUNTERS:]
    network_sizes = work.constant("network_sizes", networks, stream)
    spheres = work.array("spheres", (n_batches, 4), np.float64)
    cuts = work.array("cuts", (n_entries,), np.float64)
    n_candidates = work.array("counts", (n_entries,), np.int32)
    lists = work.array("lists", (n_entries, int(networks[-1])), np.int32)
    entries = work.array("entries", (len(networks), n_entries), np.int32)
    crossing = work.array("crossing", (sizes.n_species * sizes.n_cross, n_points), np.int32)
    run("reset", per_point, BLOCK, exact, counters, class_counts)
    run(
        "gather", n_entries, GATHER_THREADS,
        points, order, batch_start, positions, cell_start, *box,
        n_sorted, n_fine, sizes.cutoff + TIE_TOLERANCE, network_sizes,
        spheres, cuts, n_candidates, lists, class_counts, entries, exact,
    )  # fmt: skip
    room, classes = work.sizes.get("room", 0), work.sizes.get("classes", 0)
    if room == 0:
        # The first points of all: there is nothing to go by, and their marks tell what they need.
        return room, classes
    for group, n_inputs in enumerate(networks):
        if classes >> group & 1:
            run(
                f"select_{n_inputs}", n_entries, LANES,
                class_counts[group : group + 1], entries[group], spheres, cuts, n_candidates, lists,
                points, order, batch_start, positions, owners, bonds, tied_atoms,
                cutoff, gap, exact, crossing, features,
            )  # fmt: skip
    if sizes.n_cross > 0 and sizes.n_species > 1:
        run(
            "cross", per_point, BLOCK, points, order, positions, exact, crossing, class_counts, classes, features
        )  # fmt: skip
    listed = work.array("listed", (n_points,), np.int32)
    run("list_exact", per_point, BLOCK, order, exact, counters, listed)
    threads = _cuda_exact.n_threads(sizes, room, n_points)
    keys = work.array("keys", (sizes.n_species * threads, room), np.float64, "F")
    items = work.array("items", (sizes.n_species * threads, room), np.int32, "F")
    scratch = work.array("scratch", (sizes.n_species * threads, sizes.n_angle_neighbors + 2), np.float64, "F")
    table = view(neighbors.start), view(neighbors.vectors), view(neighbors.distances)
    run(
        "exact", threads // LANES, LANES,
        listed, class_counts, points, order, batch_start, spheres, cuts,
        positions, owners, cell_start, *box, *table, sizes.cutoff, TIE_TOLERANCE,
        keys, items, scratch, counters, features,
    )  # fmt: skip
    run("capped", per_point, BLOCK, cutoff, features, counters)
    return room, classes


class CudaFeatures:
    """Descriptors of one structure on one CUDA device, as torch tensors.

    Parameters
    ----------
    neighbors : NeighborArrays, optional
        Host arrays; they are uploaded once.
    sizes : FeatureSizes
    device : str
        A CUDA device as torch names it.

    Raises
    ------
    MissingDependencyError
        Without numba-cuda.
    DeviceError
        Where torch or Numba cannot use the device.
    """

    def __init__(self, neighbors: NeighborArrays | None, sizes: Any, device: str) -> None:
        import torch

        require_cuda()
        if not torch.cuda.is_available():
            raise DeviceError(
                f"device {device!r} needs a CUDA build of torch, and this is {torch.__version__}; install one"
            )
        try:
            self.device = torch.device(device)
        except RuntimeError as error:
            raise DeviceError(f"device {device!r} is not known; give 'cuda' or 'cuda:0'") from error
        index = torch.cuda.current_device() if self.device.index is None else self.device.index
        if index >= torch.cuda.device_count():
            raise DeviceError(f"device {device!r} is not there; this machine has {torch.cuda.device_count()} GPUs")
        self.device = torch.device("cuda", index)
        self.sizes = sizes
        self._neighbors: Any = None
        if neighbors is not None:
            self._neighbors = NeighborArrays(
                *(self._upload(x, kept=True) for x in (neighbors.start, neighbors.vectors, neighbors.distances)),
                self._upload(neighbors.bonds, kept=True),
                self._upload(neighbors.tied, kept=True),
            )
        self._workspaces: dict[int, Workspace] = {}
        self._batches: dict[int, tuple[Batches, Batches]] = {}
        self._mesh: tuple[Any, Any] | None = None

    def _upload(self, array: Any, *, kept: bool = False) -> Any:
        """The array as a tensor on the device; a tensor that is there stays itself.

        What is `kept` serves later work on any stream, which no copy on the current one would wait for: it is there
        on return.
        """
        import torch

        if isinstance(array, torch.Tensor):
            return array.to(self.device).contiguous()
        # torch warns about arrays that are read-only.
        writable = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
        tensor = torch.from_numpy(writable)
        if kept:
            return tensor.to(self.device)
        # From pinned memory, so that the host need not wait for what the device is at work on.
        return (tensor.pin_memory() if tensor.numel() else tensor).to(self.device, non_blocking=True)

    def _on_device(self, batches: Batches) -> Batches:
        """The batches' arrays on the device; kept, because tiles of one shape share theirs."""
        kept = self._batches.get(id(batches))
        if kept is None:
            if len(self._batches) >= 8:
                self._batches.pop(next(iter(self._batches)))
            there = Batches(*(self._upload(x, kept=True) for x in (batches.order, batches.start, batches.block_start)))
            kept = self._batches[id(batches)] = batches, there
        return kept[1]

    def grid_points(self, origin: Any, steps: Any, start: Any, stop: Any) -> Any:
        """Points of a box of a grid, made on the device: the bits of `gpurho.grid.Grid.points`.

        Parameters
        ----------
        origin : (3,) float64, angstrom
        steps : (3, 3) float64, angstrom
            Rows: from a point to the next along each axis.
        start, stop : 3 ints
        """
        import torch

        numbers = np.array([*steps, origin], dtype=np.float64)
        if self._mesh is None or not np.array_equal(self._mesh[0], numbers):
            self._mesh = numbers, torch.tensor(numbers, device=self.device)
        *step, zero = self._mesh[1]
        x, y, z = (
            torch.arange(int(start[d]), int(stop[d]), dtype=torch.float64, device=self.device)[:, None] * step[d]
            for d in range(3)
        )
        box = (zero + x)[:, None, None, :] + y[None, :, None, :] + z[None, None, :, :]
        return box.reshape(-1, 3).contiguous()

    def __call__(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any = None
    ) -> tuple[Any, int, int, int]:
        """Descriptors of points: (values, n_capped, n_tied, n_exact).

        Parameters
        ----------
        points : (n_points, 3) float64, angstrom
            Host array, or tensor on the device.
        batches : Batches
        cells : SpeciesCells
            Host arrays.
        out : (n_points, n_features) float32 tensor on the device, optional
            OUTPUT: the values.
        """
        out = self._output(len(points), out)
        if len(points) == 0:
            return out, 0, 0, 0

        def run(points: Any, there: SpeciesCells, work: Workspace, stream: Any) -> tuple[int, int, int]:
            def begin(marks: Any) -> Any:
                return self._begin(points, self._on_device(batches), there, out, marks, work, stream)

            return finished(begin, self._suffices, self._n_marks(), work, stream)

        return out, *self._on_stream(points, cells, run)

    def start(self, points: Any, batches: Batches, cells: SpeciesCells, out: Any) -> tuple[Any, Any, Any]:
        """Begin what a call does: (values, marks, given), the marks as a tensor on the device; see `counts`.

        Nothing waits for the device.
        """
        import torch

        out = self._output(len(points), out)
        marks = torch.zeros(self._n_marks(), dtype=torch.int32, device=self.device)
        if len(points) == 0:
            return out, marks, None

        def begin(points: Any, there: SpeciesCells, work: Workspace, stream: Any) -> Any:
            return self._begin(points, self._on_device(batches), there, out, marks, work, stream)

        return out, marks, self._on_stream(points, cells, begin)

    def counts(self, marks: Any, given: Any) -> tuple[int, int, int] | None:
        """(n_capped, n_tied, n_exact) of points that `start` began, by their marks on the host.

        None where they needed more than they were given: then they have to be started again, and are given more.
        """
        enough = given is None or self._suffices(marks, given, self._workspace())
        return counts(marks) if enough else None

    def _output(self, n_points: int, out: Any) -> Any:
        """`out`, checked, or a new tensor for the values."""
        import torch

        shape = (n_points, self.sizes.n_features)
        if out is None:
            try:
                out = torch.empty(shape, dtype=torch.float32, device=self.device)
            except torch.OutOfMemoryError as error:
                raise no_room(n_points) from error
        elif (
            not isinstance(out, torch.Tensor)
            or tuple(out.shape) != shape
            or out.dtype != torch.float32
            or out.device != self.device
            or not out.is_contiguous()
        ):
            raise SettingsError(f"out is not a contiguous float32 tensor of shape {shape} on {self.device}; give one")
        return out

    def _on_stream(self, points: Any, cells: SpeciesCells, work_on: Callable[..., Any]) -> Any:
        """``work_on(points, cells, workspace, stream)`` with arrays on the device, on torch's current stream."""
        import torch

        with torch.cuda.device(self.device), cuda.gpus[self.device.index]:
            handle = torch.cuda.current_stream(self.device).cuda_stream
            stream = cuda.external_stream(handle) if handle else cuda.default_stream()
            there = SpeciesCells(
                self._upload(cells.positions), self._upload(cells.owners), self._upload(cells.start),
                cells.origin, cells.edge, cells.shape,
            )  # fmt: skip
            return work_on(self._upload(points), there, self._workspace(), stream)

    def _workspace(self) -> Workspace:
        """That of torch's current stream."""
        import torch

        handle = torch.cuda.current_stream(self.device).cuda_stream
        return self._workspaces.setdefault(handle, Workspace(sizes=known_sizes(self.sizes)))

    def _n_marks(self) -> int:
        return n_marks(self.sizes)

    def _begin(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any, marks: Any, work: Workspace, stream: Any
    ) -> Any:
        """Begin on the device; returns what the points are given, for `_suffices`."""
        return start_scalar_product(points, batches, cells, self._neighbors, self.sizes, out, marks, work, stream)

    def _suffices(self, marks: Any, given: Any, workspace: Workspace) -> bool:
        return suffices(marks, given, workspace)
