"""Where the pairs of the neighbour graph come from: our own cell list, torch-cluster or pyg-lib.

A provider proposes pairs within a radius, a little more than needed; `gpurho.neighbors` measures and
selects them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from gpurho.errors import DeviceError, MissingDependencyError, NeighborOverflowError, SettingsError
from gpurho.structure import Structure

if TYPE_CHECKING:
    from gpurho.kernels.neighborlist import CellList

F64: TypeAlias = NDArray[np.float64]
I64: TypeAlias = NDArray[np.int64]
Pairs: TypeAlias = tuple[I64, I64, I64]

PROVIDERS = ("gpurho", "torch-cluster", "pyg-lib")
"""Names of the providers, in the order of preference."""

INSTALL = {
    "torch-cluster": "it with pip install --no-build-isolation torch-cluster (it compiles against your torch)",
    "pyg-lib": "pyg-lib 0.7 or newer for your torch, from the wheel index of the PyG project",
}
"""How to get the providers that are not our own."""

MARGIN = 8
"""Added to the counted neighbours for a provider's cap, so that meeting the cap can only mean a loss."""

CUDA_CHUNK = 2**24
"""Entries of the table (receivers times cap) that a CUDA provider allocates at a time."""


def available_providers() -> tuple[str, ...]:
    """The providers that can be used here."""
    return tuple(name for name in PROVIDERS if name == "gpurho" or _missing(name) is None)


def _missing(provider: str) -> str | None:
    """Why a provider cannot be used, or None."""
    try:
        _search_function(provider)
    except (ImportError, OSError, AttributeError) as error:
        # OSError: an extension built against another torch does not load. AttributeError: it is too old.
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _search_function(provider: str) -> Callable[..., Any]:
    """``radius(x, y, r, max_num_neighbors=...)`` of an outside provider: rows (index of y, index of x)."""
    if provider == "torch-cluster":
        import torch_cluster

        return torch_cluster.radius
    import pyg_lib

    return pyg_lib.ops.radius


def resolve_provider(provider: str, device: str) -> str:
    """Name of the provider to use, after checks that it is there and works on `device`."""
    kind = device.split(":")[0]
    if kind not in ("cpu", "cuda"):
        raise DeviceError(f"device is {device!r}; give 'cpu' or 'cuda'")
    if provider not in ("auto", *PROVIDERS):
        raise SettingsError(f"provider is {provider!r}; give 'auto' or one of {', '.join(PROVIDERS)}")
    if kind == "cuda":
        if provider == "gpurho":
            raise DeviceError(
                f"device is {device!r}, but gpurho's own list runs on the CPU; give provider='torch-cluster'"
            )
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"device is {device!r}, but torch finds no CUDA device; give device='cpu'")
        if provider == "auto":
            provider = next((name for name in PROVIDERS[1:] if _missing(name) is None), PROVIDERS[1])
    elif provider == "auto":
        return "gpurho"
    if provider != "gpurho" and (why := _missing(provider)) is not None:
        raise MissingDependencyError(f"provider {provider!r} cannot be used ({why}); install {INSTALL[provider]}")
    return provider


def cell_list(structure: Structure, members: I64 | None = None) -> tuple[CellList, I64]:
    """Cell list of some of the atoms in the reduced frame, and the frame's vectors in terms of the cell's."""
    from gpurho.kernels.lattice import reduced_frame
    from gpurho.kernels.neighborlist import build_cell_list

    frame, combination = reduced_frame(structure.cell, structure.pbc)
    positions = structure.positions if members is None else structure.positions[members]
    return build_cell_list(positions, frame, structure.pbc), combination


def propose_pairs(
    cells: CellList, radius: float, provider: str, device: str, wanted: NDArray[np.bool_] | None
) -> Pairs:
    """Receivers, senders (n_pairs,) and shifts (n_pairs, 3) along the frame's vectors.

    Holds every pair within `radius` whose receiver is `wanted` (n_atoms,), perhaps a few beyond rounding, and
    perhaps each atom itself.
    """
    if provider == "gpurho":
        return _own_pairs(cells, radius, wanted)
    return _outside_pairs(cells, radius, provider, device, wanted)


def _own_pairs(cells: CellList, radius: float, wanted: NDArray[np.bool_] | None) -> Pairs:
    """The pairs of our own cell list."""
    from gpurho.kernels import neighborsearch

    counts = np.empty(len(cells.order), dtype=np.int64)
    neighborsearch.count_within(*cells.arrays, radius, counts)
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    receivers, senders = np.empty(starts[-1], dtype=np.int64), np.empty(starts[-1], dtype=np.int64)
    shifts = np.empty((starts[-1], 3), dtype=np.int64)
    neighborsearch.fill_within(*cells.arrays, radius, starts[:-1], receivers, senders, shifts)
    # Shifts of the wrapped positions become shifts of the positions given.
    shifts += cells.wraps[receivers] - cells.wraps[senders]
    receivers, senders = cells.order[receivers], cells.order[senders]
    if wanted is None:
        return receivers, senders, shifts
    keep = wanted[receivers]
    return receivers[keep], senders[keep], shifts[keep]


def _outside_pairs(
    cells: CellList, radius: float, provider: str, device: str, wanted: NDArray[np.bool_] | None
) -> Pairs:
    """The pairs of torch-cluster or pyg-lib, which get the images around the cell as points."""
    import torch

    search = _search_function(provider)
    cap = _most_neighbors(cells, radius) + 1 + MARGIN  # one for the atom itself, which they count
    points, owners, image_shifts = _halo(cells, radius)
    queries = np.arange(len(cells.order)) if wanted is None else np.flatnonzero(wanted[cells.order])
    chunk = max(1, CUDA_CHUNK // cap if device != "cpu" else len(queries))
    everything = torch.as_tensor(points, device=device)
    rows, columns = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for begin in range(0, len(queries), chunk):
        part = queries[begin : begin + chunk]
        pairs = search(everything, torch.as_tensor(cells.points[part], device=device), radius, max_num_neighbors=cap)
        row, column = pairs.cpu().numpy()
        most = np.bincount(row, minlength=1).max()
        if most >= cap:
            raise NeighborOverflowError(
                f"{provider} met its cap of {cap} neighbours within {radius:.6g} angstrom, so some are lost;"
                " use provider='gpurho', which has no cap"
            )
        rows.append(part[row])
        columns.append(column)
    slots, images = np.concatenate(rows), np.concatenate(columns)
    shifts = image_shifts[images] + cells.wraps[slots] - cells.wraps[owners[images]]
    return cells.order[slots], cells.order[owners[images]], shifts


def _most_neighbors(cells: CellList, radius: float) -> int:
    """The most neighbours within `radius` that any point has, by our own count."""
    from gpurho.kernels.neighborsearch import SLACK, count_within

    counts = np.empty(len(cells.order), dtype=np.int64)
    count_within(*cells.arrays, radius + SLACK, counts)
    return int(counts.max())


def _halo(cells: CellList, radius: float) -> tuple[F64, I64, I64]:
    """Images within `radius` of the frame's parallelepiped: positions (m, 3), slots (m,), shifts (m, 3)."""
    coords, owners = cells.coords / cells.bins, np.arange(len(cells.order))
    shifts = np.zeros((len(owners), 3), dtype=np.int64)
    for axis in np.flatnonzero(cells.periodic):
        reach = radius * cells.reach[axis] / cells.bins[axis]
        pieces = []
        for step in range(-int(np.ceil(reach)), int(np.ceil(reach)) + 1):
            moved = coords[:, axis] + step
            keep = np.flatnonzero((moved >= -reach) & (moved <= 1.0 + reach))
            shifted = shifts[keep]
            shifted[:, axis] = step
            pieces.append((coords[keep], owners[keep], shifted))
        coords, owners, shifts = (np.concatenate(part) for part in zip(*pieces, strict=True))
    return cells.points[owners] + shifts @ cells.frame, owners, shifts
