"""CUDA driver of the scalar-product descriptors (Numba): device arrays in, features left on the device.

The same two paths as `gpurho.kernels.cpu`. A thread block per batch of 64 grid points and species finds the candidate
atoms and sorts the batch into a class by their number; the class's kernel orders the candidates of each point by a
sorting network in registers and takes the cosines; the points that this cannot do are listed and done by the exact
formulas in float64. Results do not depend on timing: a point's row is written by one thread in a fixed order.

Importing this module needs Numba's CUDA target, but no device.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numba import cuda

from gpurho.errors import DeviceError, MissingDependencyError, SettingsError
from gpurho.kernels import _cuda_exact, _cuda_select
from gpurho.kernels._cuda_sources import GATHER_THREADS, SIMULATOR, class_sizes, compiled
from gpurho.kernels.batches import LANES, Batches
from gpurho.kernels.celllist import SpeciesCells
from gpurho.kernels.scalar_product import TIE_TOLERANCE, FeatureSizes, NeighborArrays

SCRATCH_BYTES = 2**28
"""Most memory for the exact path's scratch; its points are done in chunks that keep to it."""
BLOCK = 128
"""Threads of a block of the kernels that have a thread per point."""


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
        raise DeviceError("no CUDA device can be used here (no driver or no GPU); use device='cpu'")


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
    device = 0 if SIMULATOR else cuda.get_current_device().id
    work = Workspace() if workspace is None else workspace
    with warnings.catch_warnings():
        # Numba warns about small grids, which tiles of few points rightly have.
        warnings.filterwarnings("ignore", message=".*[Gg]rid size.*")
        try:
            return _launch(points, batches, cells, neighbors, sizes, out, work, stream, device)
        except Exception as error:
            if "OUT_OF_MEMORY" in str(error):
                raise no_room(len(points)) from error
            raise


def no_room(n_points: int) -> DeviceError:
    """The error for features that the device's memory does not hold."""
    return DeviceError(f"the GPU's memory does not hold the descriptors of {n_points} points; use smaller tiles")


def _launch(
    points: Any, batches: Batches, cells: SpeciesCells, neighbors: NeighborArrays, sizes: FeatureSizes, out: Any,
    work: Workspace, stream: Any, device: int,
) -> tuple[int, int, int]:  # fmt: skip
    n_points, n_batches = int(points.shape[0]), int(batches.start.shape[0]) - 1
    if n_points == 0:
        return 0, 0, 0
    _, n_fine, n_sorted = _cuda_select.ranks(sizes)
    networks = class_sizes(sizes)
    n_entries = n_batches * sizes.n_species
    cutoff, gap = np.float32(sizes.cutoff), np.float32(1.5 * TIE_TOLERANCE + 3.0e-6)
    view = device_view
    points, features = view(points), view(out)
    order, batch_start = view(batches.order), view(batches.start)
    positions, owners, cell_start = view(cells.positions), view(cells.owners), view(cells.start)
    box = (*(float(x) for x in cells.origin), float(cells.edge), *(int(n) for n in cells.shape))
    bonds, tied_atoms = view(neighbors.bonds), view(neighbors.tied)

    def run(name: str, blocks: int, threads: int, *arguments: Any) -> None:
        compiled(sizes, name, device)[blocks, threads, stream](*arguments)

    def read(array: Any) -> Any:
        values = array.copy_to_host(stream=stream)
        if stream:
            stream.synchronize()
        return values

    per_point = -(-n_points // BLOCK)
    exact = work.array("exact", (n_points,), np.uint8)
    counters = work.array("counters", (3,), np.int32)
    class_counts = work.array("class_counts", (max(1, len(networks)) + 1,), np.int32)
    # Without a usable network, one that nothing fits into: every point takes the exact path.
    network_sizes = work.array("network_sizes", (max(1, len(networks)),), np.int32)
    network_sizes.copy_to_device(np.array(networks or [0], np.int32), stream=stream)
    spheres = work.array("spheres", (n_batches, 4), np.float64)
    cuts = work.array("cuts", (n_entries,), np.float64)
    counts = work.array("counts", (n_entries,), np.int32)
    lists = work.array("lists", (n_entries, max(networks, default=1)), np.int32)
    entries = work.array("entries", (max(1, len(networks)), n_entries), np.int32)
    crossing = work.array("crossing", (sizes.n_species * sizes.n_cross, n_points), np.int32)
    run("reset", per_point, BLOCK, exact, counters, class_counts)
    run(
        "gather", n_entries, GATHER_THREADS,
        points, order, batch_start, positions, cell_start, *box,
        n_sorted, n_fine, sizes.cutoff + TIE_TOLERANCE, network_sizes,
        spheres, cuts, counts, lists, class_counts, entries, exact,
    )  # fmt: skip
    *occupied, most = read(class_counts)
    for group, n_inputs in enumerate(networks):
        if occupied[group] > 0:
            run(
                f"select_{n_inputs}", int(occupied[group]), LANES,
                entries[group], spheres, cuts, counts, lists,
                points, order, batch_start, positions, owners, bonds, tied_atoms,
                cutoff, gap, exact, crossing, features,
            )  # fmt: skip
    if sizes.n_cross > 0 and sizes.n_species > 1:
        run("cross", per_point, BLOCK, points, order, positions, exact, crossing, features)
    listed = work.array("listed", (n_points,), np.int32)
    run("list_exact", per_point, BLOCK, order, exact, counters, listed)
    n_exact = int(read(counters)[_cuda_exact.N_LISTED])
    if n_exact > 0:
        room = int(most) + _cuda_exact.ROOM
        fitting = SCRATCH_BYTES // _cuda_exact.bytes_per_thread(sizes, room)
        threads = LANES * max(1, min(fitting // LANES, -(-n_exact // LANES)))
        keys = work.array("keys", (sizes.n_species * threads, room), np.float64, "F")
        items = work.array("items", (sizes.n_species * threads, room), np.int32, "F")
        scratch = work.array("scratch", (sizes.n_species * threads, sizes.n_angle_neighbors + 2), np.float64, "F")
        table = view(neighbors.start), view(neighbors.vectors), view(neighbors.distances)
        for first in range(0, n_exact, threads):
            run(
                "exact", threads // LANES, LANES,
                listed, first, min(first + threads, n_exact), points, order, batch_start, spheres, cuts,
                positions, owners, cell_start, *box, *table, sizes.cutoff, TIE_TOLERANCE,
                keys, items, scratch, counters, features,
            )  # fmt: skip
    run("capped", per_point, BLOCK, cutoff, features, counters)
    totals = read(counters)
    return int(totals[_cuda_exact.N_CAPPED]), int(totals[_cuda_exact.N_TIED]), n_exact


def device_view(array: Any) -> Any:
    """The array as Numba's kernels take it; an empty one as one of length 1 that is never read."""
    if 0 in array.shape:
        shape = tuple(max(1, int(n)) for n in array.shape)
        return cuda.to_device(np.zeros(shape, np.dtype(str(array.dtype).removeprefix("torch."))))
    return array if SIMULATOR else cuda.as_cuda_array(array)


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
                *(self._upload(x) for x in (neighbors.start, neighbors.vectors, neighbors.distances)),
                self._upload(neighbors.bonds),
                self._upload(neighbors.tied),
            )
        self._workspaces: dict[int, Workspace] = {}
        self._batches: dict[int, tuple[Batches, Batches]] = {}
        self._mesh: tuple[Any, Any] | None = None

    def _upload(self, array: Any) -> Any:
        """The array as a tensor on the device; a tensor that is there stays itself."""
        import torch

        if isinstance(array, torch.Tensor):
            return array.to(self.device).contiguous()
        # torch warns about arrays that are read-only.
        writable = array if array.flags.writeable and array.flags.c_contiguous else np.array(array, order="C")
        tensor = torch.from_numpy(writable)
        # From pinned memory, so that the host need not wait for what the device is at work on.
        return (tensor.pin_memory() if tensor.numel() else tensor).to(self.device, non_blocking=True)

    def _on_device(self, batches: Batches) -> Batches:
        """The batches' arrays on the device; kept, because tiles of one shape share theirs."""
        kept = self._batches.get(id(batches))
        if kept is None:
            if len(self._batches) >= 8:
                self._batches.pop(next(iter(self._batches)))
            there = Batches(*(self._upload(x) for x in (batches.order, batches.start, batches.block_start)))
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
        import torch

        shape = (len(points), self.sizes.n_features)
        if out is None:
            try:
                out = torch.empty(shape, dtype=torch.float32, device=self.device)
            except torch.OutOfMemoryError as error:
                raise no_room(len(points)) from error
        elif (
            not isinstance(out, torch.Tensor)
            or tuple(out.shape) != shape
            or out.dtype != torch.float32
            or out.device != self.device
            or not out.is_contiguous()
        ):
            raise SettingsError(f"out is not a contiguous float32 tensor of shape {shape} on {self.device}; give one")

        def run(points: Any, there: SpeciesCells, work: Workspace, stream: Any) -> tuple[int, int, int]:
            return self._run(points, self._on_device(batches), there, out, work, stream)

        return out, *self._on_stream(points, cells, run)

    def _on_stream(self, points: Any, cells: SpeciesCells, work_on: Callable[..., Any]) -> Any:
        """``work_on(points, cells, workspace, stream)`` with arrays on the device, on torch's current stream."""
        import torch

        with torch.cuda.device(self.device), cuda.gpus[self.device.index]:
            handle = torch.cuda.current_stream(self.device).cuda_stream
            stream = cuda.external_stream(handle) if handle else cuda.default_stream()
            work = self._workspaces.setdefault(handle, Workspace())
            there = SpeciesCells(
                self._upload(cells.positions), self._upload(cells.owners), self._upload(cells.start),
                cells.origin, cells.edge, cells.shape,
            )  # fmt: skip
            return work_on(self._upload(points), there, work, stream)

    def _run(
        self, points: Any, batches: Batches, cells: SpeciesCells, out: Any, work: Workspace, stream: Any
    ) -> tuple[int, int, int]:
        return scalar_product_features(points, batches, cells, self._neighbors, self.sizes, out, work, stream)
