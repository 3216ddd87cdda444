"""The CUDA kernels of a specification: which there are, their signatures, and their compilation on demand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

from numba import cuda
from numba.core import config

from gpurho.kernels import _cuda_candidates, _cuda_exact, _cuda_network, _cuda_select, _smooth_cuda
from gpurho.kernels.scalar_product import FeatureSizes
from gpurho.kernels.smooth import SmoothSizes

SIMULATOR = bool(getattr(config, "ENABLE_CUDASIM", 0))
"""Whether Numba runs kernels as Python threads: for tests."""

NETWORKS = (32, 64, 80, 96, 112, 128, 160, 192, 224)
"""Numbers of candidates for which kernels are made; with more, registers would spill."""
SHARED_BYTES = 49152
"""Shared memory that every device gives a block without asking."""
COMMON = ("reset", "gather", "coordinates", "arrange")
"""Kernels that are the same for all specifications of a family."""
GATHER_THREADS, GATHER_BINS = (16, 64) if SIMULATOR else (_cuda_candidates.THREADS, _cuda_candidates.BINS)


@dataclass(frozen=True)
class KernelSource:
    """A kernel before compilation: Python function, signature, options of ``cuda.jit``."""

    name: str
    make: Callable[[], Callable[..., Any]]
    signature: tuple[Any, ...]
    options: dict[str, Any]


def kernel_sources(sizes: FeatureSizes | SmoothSizes) -> dict[str, KernelSource]:
    """Every kernel of a specification, by name; ``select_n`` is the fast path for n candidates."""
    sources = [
        KernelSource("reset", lambda: _cuda_exact.reset, _cuda_exact.RESET_SIGNATURE, {}),
        KernelSource(
            "gather", lambda: _cuda_candidates.make_gather(GATHER_THREADS, GATHER_BINS), _cuda_candidates.SIGNATURE, {}
        ),
    ]
    sources += _smooth_sources(sizes) if isinstance(sizes, SmoothSizes) else _scalar_product_sources(sizes)
    return {source.name: source for source in sources}


def _smooth_sources(sizes: SmoothSizes) -> list[KernelSource]:
    return [
        KernelSource("coordinates", _smooth_cuda.make_coordinates, _smooth_cuda.COORDINATES_SIGNATURE, {}),
        KernelSource("arrange", _smooth_cuda.make_arrange, _smooth_cuda.ARRANGE_SIGNATURE, {}),
        KernelSource("expand", partial(_make_expand, sizes), _smooth_cuda.EXPAND_SIGNATURE, {"fastmath": True}),
    ]


def _scalar_product_sources(sizes: FeatureSizes) -> list[KernelSource]:
    sources = [
        KernelSource("list_exact", lambda: _cuda_exact.list_exact, _cuda_exact.LIST_SIGNATURE, {}),
        KernelSource("exact", lambda: _cuda_exact.make_exact(sizes), _cuda_exact.EXACT_SIGNATURE, {}),
        KernelSource("capped", lambda: _cuda_exact.make_capped(sizes), _cuda_exact.CAPPED_SIGNATURE, {}),
    ]
    for n_inputs in class_sizes(sizes):
        sources.append(
            KernelSource(
                f"select_{n_inputs}",
                partial(_make_select, n_inputs, sizes),
                _cuda_select.SIGNATURE,
                {"fastmath": True},
            )
        )
    if sizes.n_cross > 0 and sizes.n_species > 1:
        sources.append(
            KernelSource(
                "cross", lambda: _cuda_select.make_cross(sizes), _cuda_select.CROSS_SIGNATURE, {"fastmath": True}
            )
        )
    return sources


def class_sizes(sizes: FeatureSizes) -> list[int]:
    """The networks that serve a specification; none where its rows do not fit into shared memory."""
    _, _, n_sorted = _cuda_select.ranks(sizes)
    return [n for n in NETWORKS if n >= n_sorted and _cuda_select.shared_bytes(n, sizes) <= SHARED_BYTES]


def _make_select(n_inputs: int, sizes: FeatureSizes) -> Callable[..., Any]:
    _, n_fine, n_sorted = _cuda_select.ranks(sizes)
    make = _cuda_network.simulated_sorter if SIMULATOR else _cuda_network.make_sorter
    sort = make(n_inputs, n_fine, n_sorted)
    return _cuda_select.make_select(n_inputs, sizes, cuda.jit(device=True)(sort) if SIMULATOR else sort)


def _make_expand(sizes: SmoothSizes) -> Callable[..., Any]:
    if SIMULATOR:
        flush = cuda.jit(device=True)(_smooth_cuda.make_flush())
        return _smooth_cuda.make_expand(sizes, cuda.jit(device=True)(_smooth_cuda.simulated_expander(sizes, flush)))
    return _smooth_cuda.make_expand(sizes, _smooth_cuda.make_expander(sizes, _smooth_cuda.make_flush()))


@dataclass(frozen=True)
class _Wanted:
    """A kernel to compile; equal ones are one."""

    numbers: Any
    name: str
    device: int
    sizes: FeatureSizes | SmoothSizes = field(compare=False)


def compiled(sizes: FeatureSizes | SmoothSizes, name: str, device: int) -> Any:
    """One compiled kernel; compilation happens here, for the current device."""
    return _compiled(_Wanted(type(sizes) if name in COMMON else sizes, name, device, sizes))


@lru_cache(maxsize=512)
def _compiled(wanted: _Wanted) -> Any:
    source = kernel_sources(wanted.sizes)[wanted.name]
    if SIMULATOR:
        return cuda.jit(**source.options)(source.make())
    # Without optimisation at link time, as `benchmarks/sass_check.py` assembles it: a kernel is one module, and CUDA 13
    # drivers refuse what CUDA 12 tools link so.
    options: dict[str, Any] = {"lto": False, **source.options}
    return cuda.jit(source.signature, **options)(source.make())
