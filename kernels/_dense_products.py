"""Matrix products of a dense network for a block of 32 points and 32 units on a CPU, as Numba intrinsics on addresses.

Activations lie tile by tile: (tiles of 16 points, chunks of 32 inputs, 16, 32), in bfloat16 or float32 by the kind of
product; `step` is the bytes from one tile to the next. Weights lie (blocks of 32 units, chunks of 32 inputs, 32 * 32),
within a chunk input by unit, in bfloat16 two halves of 16 units with pairs of inputs side by side. Results are float32,
(32 points, 32 units).
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from gpurho.kernels._dense_emit import (
    BLOCK,
    BYTES,
    I8,
    INTEGERS,
    KINDS,
    ROW_BYTES,
    VECTOR,
    N,
    Number,
    call,
    element_bytes,
    load,
    signature_of,
    spread,
    store,
)
from gpurho.kernels._smooth_emit import F32, I32, I64, Sums, literals, loop, pointer, times

ROWS, VECTORS = (8, 2) if binding.get_host_cpu_features().get("avx512f") else (4, 1)
"""Of the sums that are kept in registers."""


@intrinsic
def configure_tiles(typing_context, address):
    """Load the shapes of the tiles from the 64 bytes at an address."""

    def generate(context, builder, signature, arguments):
        call(builder, "llvm.x86.ldtilecfg", [BYTES], [pointer(builder, arguments[0], 0, I8)])
        return context.get_dummy_value()

    return types.void(types.int64), generate


@intrinsic
def release_tiles(typing_context):
    """Let go of the tiles."""

    def generate(context, builder, signature, arguments):
        call(builder, "llvm.x86.tilerelease", [], [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic(prefer_literal=True)
def product(typing_context, inputs, weights, start, result, step, start_step, n_chunks, kind):
    """Fill `result` (OUTPUT) with the inputs' products with a block of weights, plus what `start` says.

    Row i begins as 32 float32 at ``start + i * start_step``: biases with a step of 0, or earlier results.
    """
    (code,) = literals((kind,))

    def generate(context, builder, signature, arguments):
        (_tiles if KINDS[code] == "amx" else _registers)(builder, KINDS[code], *arguments[:7])
        return context.get_dummy_value()

    return signature_of(4, (types.int64,) * 3, kind), generate


def _tiles(
    builder: Any, kind: str, inputs: Any, weights: Any, start: Any, result: Any, step: Any, start_step: Any, n: Any
) -> None:
    """Two tiles of points by two of units."""

    def transfer(name: str, number: int, address: Any, stride: Any) -> None:
        values = [ir.Constant(I8, number), pointer(builder, address, 0, I8), stride]
        call(builder, f"llvm.x86.{name}", [I8, BYTES, I64], values)

    square = [(i, j) for i in range(2) for j in range(2)]
    for i, j in square:
        row = builder.add(start, times(builder, start_step, i * N))
        transfer("tileloadd64", 2 * i + j, builder.add(row, ir.Constant(I64, 4 * N * j)), start_step)
    stride = ir.Constant(I64, 2 * BLOCK)
    with loop(builder, n) as chunk:
        here = builder.add(inputs, times(builder, chunk, 2 * BLOCK * N))
        column = builder.add(weights, times(builder, chunk, 2 * BLOCK * BLOCK))
        for i in range(2):
            transfer("tileloadd64", 4 + i, builder.add(here, times(builder, step, i)), stride)
            transfer("tileloadd64", 6 + i, builder.add(column, ir.Constant(I64, 2 * BLOCK * N * i)), stride)
        for i, j in square:
            call(builder, "llvm.x86.tdpbf16ps", [I8] * 3, [ir.Constant(I8, k) for k in (2 * i + j, 4 + i, 6 + j)])
    for i, j in square:
        place = builder.add(result, ir.Constant(I64, i * N * ROW_BYTES + 4 * N * j))
        transfer("tilestored64", 2 * i + j, place, ir.Constant(I64, ROW_BYTES))


def _registers(
    builder: Any, kind: str, inputs: Any, weights: Any, start: Any, result: Any, step: Any, start_step: Any, n: Any
) -> None:
    """A few rows by one or two vectors at a time, their sums in registers."""
    size = element_bytes(kind)
    rows, vectors = ROWS, VECTORS
    depth = 4  # elements of an input's row and rows of weights that one turn of the loop takes, 4 bytes each
    steps = BLOCK * size // 4
    vector_step = 4 * N if kind == "fp32" else steps * 4 * N
    row_step = 4 * BLOCK if kind == "fp32" else 4 * N

    def part(tile: Any, first_row: Any, first_vector: int) -> None:
        row = builder.add(times(builder, tile, N), first_row)
        sums = Sums(builder, VECTOR, rows * vectors, Number)
        for r in range(rows):
            begin = builder.add(start, builder.mul(builder.add(row, ir.Constant(I64, r)), start_step))
            for v in range(vectors):
                value = load(builder, begin, 4 * N * (first_vector + v))
                builder.store(value.value, sums.slots[r * vectors + v])
        here = builder.add(builder.add(inputs, builder.mul(tile, step)), times(builder, first_row, BLOCK * size))
        with loop(builder, n) as chunk, loop(builder, ir.Constant(I64, steps // depth)) as turn:
            left = builder.add(here, times(builder, chunk, BLOCK * N * size))
            left = builder.add(left, times(builder, turn, 4 * depth))
            right = builder.add(weights, times(builder, chunk, BLOCK * BLOCK * size))
            right = builder.add(right, times(builder, turn, depth * row_step))
            for k in range(depth):
                columns = [
                    load(builder, right, k * row_step + (first_vector + v) * vector_step) for v in range(vectors)
                ]
                for r in range(rows):
                    place = r * BLOCK * size + 4 * k
                    if kind == "fp32":
                        scalar = builder.load(pointer(builder, left, place, F32), align=4)
                        factor = Number(builder, spread(builder, scalar))
                        for v in range(vectors):
                            sums.add(r * vectors + v, factor * columns[v])
                    else:
                        scalar = builder.load(pointer(builder, left, place, I32), align=4)
                        for v in range(vectors):
                            slot = sums.slots[r * vectors + v]
                            _add_pairs(builder, slot, spread(builder, scalar), columns[v].value)
        for r in range(rows):
            target = builder.add(result, times(builder, builder.add(row, ir.Constant(I64, r)), ROW_BYTES))
            for v in range(vectors):
                store(builder, sums[r * vectors + v], target, 4 * N * (first_vector + v))

    with loop(builder, ir.Constant(I64, 2)) as tile, loop(builder, ir.Constant(I64, N // rows)) as group:
        for first_vector in range(0, 2, vectors):
            part(tile, times(builder, group, rows), first_vector)


def _add_pairs(builder: Any, slot: Any, left: Any, right: Any) -> None:
    """Add to 16 sums the products of two pairs of bfloat16 each."""
    function = ir.FunctionType(VECTOR, [VECTOR, INTEGERS, INTEGERS])
    values = [builder.load(slot), left, builder.bitcast(right, INTEGERS)]
    builder.store(builder.asm(function, "vdpbf16ps $3, $2, $0", "=v,0,v,v", values, False), slot)
