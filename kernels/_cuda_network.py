"""Sorting the candidates of a grid point in the registers of one CUDA thread.

A pruned sorting network is straight-line code. As Python source it takes Numba minutes, so it is handed to LLVM as
such: `make_sorter` returns an intrinsic that emits the keys, the comparators and the stores of one network. Numba's
simulator, which cannot run intrinsics, is given a Python function that does the same.
"""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
from collections.abc import Callable
from typing import Any

import numpy as np

from gpurho.kernels.network import merge_exchange

LANES_STRIDE = 65
"""Rows of the shared tables are this long: 64 lanes, and one so that a column's entries lie in different banks."""

PAD_KEY = 2.0e9
"""Fixed-point squared distance of the entries that fill a network up; those of candidates end at `KEY_RANGE`."""
KEY_RANGE = 1.9e9
SHARED = 3
"""NVVM's address space of shared memory."""


def outputs_of(n_inputs: int, keep: int) -> list[tuple[int, int, bool, bool]]:
    """Comparators (i, j, smaller wanted, larger wanted) of a network of which the first `keep` outputs are wanted."""
    needed = set(range(keep))
    kept = []
    for i, j in reversed(merge_exchange(n_inputs)):
        if i in needed or j in needed:
            kept.append((i, j, i in needed, j in needed))
            needed.update((i, j))
    return kept[::-1]


def index_bits(n_inputs: int) -> int:
    """Low bits of a key that hold the index of its candidate."""
    return max(1, (n_inputs - 1).bit_length())


def simulated_sorter(n_inputs: int, n_fine: int, n_sorted: int) -> Callable[..., None]:
    """What `make_sorter` returns, as plain Python."""
    comparators = outputs_of(n_inputs, n_sorted)
    mask = (1 << index_bits(n_inputs)) - 1

    def sort(quads, gx, gy, gz, lane, nearest, table):
        keys = []
        for c in range(n_inputs):
            dx, dy, dz = quads[4 * c] - gx, quads[4 * c + 1] - gy, quads[4 * c + 2] - gz
            keys.append(int(dz * dz + (dy * dy + (dx * dx + quads[4 * c + 3]))) & ~mask | c)
        for i, j, _, _ in comparators:
            keys[i], keys[j] = min(keys[i], keys[j]), max(keys[i], keys[j])
        for c in range(n_sorted):
            if c < n_fine:
                nearest[c * LANES_STRIDE + lane] = keys[c] & mask
            else:
                table[c * LANES_STRIDE + lane] = np.float32((keys[c] & ~mask) + (mask >> 1))

    return sort


def make_sorter(n_inputs: int, n_fine: int, n_sorted: int, intrinsic: Any = None) -> Any:
    """Device function that sorts the candidates of one grid point.

    Parameters
    ----------
    n_inputs : int
        Candidates, with padding.
    n_fine : int
        Of so many nearest the indices are wanted.
    n_sorted : int
        So many nearest are ordered; of those from `n_fine` up only the distances are wanted.
    intrinsic : callable, optional
        The decorator of the target; by default that of Numba's CUDA target. Tests run the same code on the CPU.

    Returns
    -------
    sort(quads, gx, gy, gz, lane, nearest, table)
        `quads` (4 * n_inputs,) float32 in shared memory: x, y, z of a candidate and what is added to its squared
        distance (`PAD_KEY` for padding), scaled so that squared distances are whole numbers up to `KEY_RANGE`;
        gx, gy, gz : float32, the grid point, scaled likewise; lane : int32;
        OUTPUT: ``nearest[c * LANES_STRIDE + lane]`` int32, index of candidate c < n_fine in ascending distance;
        OUTPUT: ``table[c * LANES_STRIDE + lane]`` float32, scaled squared distance of candidate n_fine <= c < n_sorted.
    """
    from llvmlite import ir
    from numba import types

    if intrinsic is None:
        from numba.cuda.extending import intrinsic

    comparators = outputs_of(n_inputs, n_sorted)
    mask = (1 << index_bits(n_inputs)) - 1
    i32, f32 = ir.IntType(32), ir.FloatType()
    quad = ir.VectorType(f32, 4)

    @intrinsic
    def sort(typing_context, quads, gx, gy, gz, lane, nearest, table):
        signature = types.void(quads, types.float32, types.float32, types.float32, types.int32, nearest, table)

        def generate(context, builder, signature, arguments):
            def data(position):
                array = context.make_array(signature.args[position])(context, builder, value=arguments[position])
                return array.data

            def constant(value):
                return ir.Constant(i32, value)

            # The four numbers of a candidate are one load; Numba aligns shared arrays to their items only.
            for variable in builder.module.global_values:
                if isinstance(variable, ir.GlobalVariable) and variable.type.addrspace == SHARED:
                    variable.align = 16
            point, rank = arguments[1:4], arguments[4]
            pointer = builder.bitcast(data(0), quad.as_pointer(getattr(data(0).type, "addrspace", 0)))
            keys = []
            for c in range(n_inputs):
                values = builder.load(builder.gep(pointer, [constant(c)]))
                values.align = 16
                square = builder.extract_element(values, constant(3))
                for d in range(3):
                    delta = builder.fsub(builder.extract_element(values, constant(d)), point[d])
                    square = builder.fadd(square, builder.fmul(delta, delta, flags=("contract",)), flags=("contract",))
                key = builder.and_(builder.fptosi(square, i32), constant(~mask))
                keys.append(builder.or_(key, constant(c)))
            for i, j, smaller, larger in comparators:
                less = builder.icmp_signed("<", keys[i], keys[j])
                low = builder.select(less, keys[i], keys[j]) if smaller else keys[i]
                high = builder.select(less, keys[j], keys[i]) if larger else keys[j]
                keys[i], keys[j] = low, high
            indices, squares = data(5), data(6)
            for c in range(n_sorted):
                place = builder.add(rank, constant(c * LANES_STRIDE))
                if c < n_fine:
                    builder.store(builder.and_(keys[c], constant(mask)), builder.gep(indices, [place]))
                else:
                    whole = builder.add(builder.and_(keys[c], constant(~mask)), constant(mask >> 1))
                    builder.store(builder.sitofp(whole, f32), builder.gep(squares, [place]))
            return context.get_dummy_value()

        return signature, generate

    return sort
