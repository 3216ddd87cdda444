"""Steps of a dense network for a block of 32 points on a CPU, as Numba intrinsics on addresses.

Activations and results of products lie as `gpurho.kernels._dense_products` says. Sums are float32, (32 points, 16
lanes); `reduce_rows` makes numbers of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from gpurho.kernels._dense_emit import (
    BLOCK,
    INTEGERS,
    KINDS,
    ROW_BYTES,
    VECTOR,
    N,
    Number,
    across,
    call,
    element_bytes,
    exponential,
    gelu,
    load,
    load_pair,
    signature_of,
    spread,
    store,
    store_pair,
)
from gpurho.kernels._smooth_emit import F32, I32, I64, Sums, literals, loop, pointer, times, zero

COLUMN_ROWS = 6
"""Per chunk of 32 columns of features, 32 numbers each: slope, shift, low, high, baseline, rate of decay."""
SUM_BYTES = BLOCK * N * 4
"""Of the sums of a block's points, lane by lane."""
AT_ONCE = 2
"""Points whose activations are computed side by side."""
MEAN, ANALYTIC, LAST_LAYER = range(3)
"""What `hidden` prepares besides the outputs."""


def _rows(
    builder: Any, kind: str, step: Any, body: Callable[[list[Any], list[Any]], None], at_once: int = AT_ONCE
) -> None:
    """Code for the 32 points of a block, `at_once` at a time.

    `body` takes the points and the bytes to each one's row of 32 activations.
    """
    row_bytes = BLOCK * element_bytes(kind)
    with loop(builder, ir.Constant(I64, 2)) as tile, loop(builder, ir.Constant(I64, N // at_once)) as group:
        row = times(builder, group, at_once)
        first = builder.add(times(builder, tile, N), row)
        place = builder.add(builder.mul(tile, step), times(builder, row, row_bytes))
        each = [ir.Constant(I64, r) for r in range(at_once)]
        body([builder.add(first, r) for r in each], [builder.add(place, times(builder, r, row_bytes)) for r in each])


def _results(builder: Any, address: Any, place: Any) -> list[Number]:
    """The two vectors of a row of 32 float32, `place` bytes behind an address."""
    place = ir.Constant(I64, place) if isinstance(place, int) else place
    return [load(builder, address, builder.add(place, ir.Constant(I64, 4 * N * h))) for h in range(2)]


def _accumulate(builder: Any, address: Any, point: Any, value: Any) -> None:
    """Add a vector to the sums of a point."""
    place = times(builder, point, 4 * N)
    store(builder, load(builder, address, place) + value, address, place)


@intrinsic(prefer_literal=True)
def standardise(
    typing_context, features, columns, inputs, squares, excess, baseline, count, n_features, n_chunks, step,
    kind, decays, with_squares, with_excess, with_baseline,
):  # fmt: skip
    """Raw features (32, n_features) to inputs (OUTPUT), their squares, and lane by lane the excess and the baseline.

    Points from `count` on become zeros. The last five are flags; what they leave out is not written.
    """
    code, decay, square, outside, leading = literals((kind, decays, with_squares, with_excess, with_baseline))
    name = KINDS[code]

    def generate(context, builder, signature, arguments):
        features, columns, inputs, squares, excess, baseline, count, n_features, n_chunks, step = arguments[:10]
        lanes = ir.Constant(INTEGERS, list(range(N)))

        def body(points: list[Any], offsets: list[Any]) -> None:
            (point,), (offset,) = points, offsets
            there = builder.icmp_signed("<", point, count)
            left = builder.select(there, n_features, ir.Constant(I64, 0))
            row = builder.add(features, builder.mul(point, times(builder, n_features, 4)))
            totals = Sums(builder, VECTOR, 2, Number)
            with loop(builder, n_chunks) as chunk:
                table = builder.add(columns, times(builder, chunk, COLUMN_ROWS * 4 * BLOCK))
                pair = []
                for half in range(2):
                    first = builder.add(times(builder, chunk, BLOCK), ir.Constant(I64, half * N))
                    limit = spread(builder, builder.trunc(builder.sub(left, first), I32))
                    mask = builder.icmp_signed("<", lanes, limit)
                    source = pointer(builder, row, times(builder, first, 4), VECTOR)
                    raw = Number(builder, _masked_load(builder, source, mask))
                    slope, shift, low, high, weight, rate = (
                        load(builder, table, 4 * BLOCK * i + 4 * N * half) for i in range(COLUMN_ROWS)
                    )
                    x = raw
                    if decay:
                        decays = builder.fcmp_ordered(">", rate.value, rate.constant(0.0))
                        falling = exponential(Number(builder, (rate * raw * -1.0).value))
                        x = Number(builder, builder.select(decays, falling.value, raw.value))
                    x = Number(builder, builder.select(mask, (x * slope + shift).value, zero(VECTOR)))
                    if outside:
                        # What is not a number is seen in the outputs.
                        most = totals[0].larger(x - high).larger(low - x)
                        builder.store(most.value, totals.slots[0])
                    if leading:
                        totals.add(1, raw * weight)
                    pair.append(x)
                place = builder.add(offset, times(builder, chunk, BLOCK * N * element_bytes(name)))
                store_pair(builder, name, pair, builder.add(inputs, place))
                if square:
                    store_pair(builder, name, [x * x for x in pair], builder.add(squares, place))
            if outside:
                store(builder, totals[0], excess, times(builder, point, 4 * N))
            if leading:
                store(builder, totals[1], baseline, times(builder, point, 4 * N))

        _rows(builder, name, step, body, at_once=1)
        return context.get_dummy_value()

    flags = kind, decays, with_squares, with_excess, with_baseline
    return signature_of(6, (types.int64,) * 4, *flags), generate


def _masked_load(builder: Any, source: Any, mask: Any) -> Any:
    kinds = [VECTOR.as_pointer(), I32, mask.type, VECTOR]
    values = [source, ir.Constant(I32, 4), mask, zero(VECTOR)]
    return call(builder, f"llvm.masked.load.v{N}f32.p0", kinds, values, VECTOR)


@intrinsic(prefer_literal=True)
def hidden(
    typing_context, result, spread_result, before, after, squares, slopes, terms, last, sums, step_before, step,
    is_last, skip, kind, mode,
):  # fmt: skip
    """Activations (OUTPUT: after) of a block of units from its products, ``gelu(result) + skip * before``.

    With `mode` ANALYTIC also their squares, GELU's slopes and ``slope^2 * spread_result`` (OUTPUT: terms). Where
    `is_last`, also what they add to the density, the logarithm of the variance and the epistemic variance (OUTPUT:
    sums, three) by the rows of 32 numbers of `last`. A `skip` of 0 reads nothing of `before`.
    """
    code, how = literals((kind, mode))
    name = KINDS[code]

    def generate(context, builder, signature, arguments):
        result, spread_result, before, after, squares, slopes, terms, last, sums = arguments[:9]
        step_before, step, is_last, skip = arguments[9:13]
        factor = Number(builder, spread(builder, skip))
        skips = builder.fcmp_ordered("!=", skip, ir.Constant(F32, 0.0))
        ends = builder.icmp_signed("!=", is_last, ir.Constant(I64, 0))

        def body(points: list[Any], places: list[Any]) -> None:
            z = [x for point in points for x in _results(builder, result, times(builder, point, ROW_BYTES))]
            values, slope = gelu(z, name, how == ANALYTIC)
            if how == ANALYTIC:
                for r, (point, place) in enumerate(zip(points, places, strict=True)):
                    pair = slope[2 * r : 2 * r + 2]
                    store_pair(builder, name, pair, builder.add(slopes, place))
                    wide = _results(builder, spread_result, times(builder, point, ROW_BYTES))
                    both = [s * s * v for s, v in zip(pair, wide, strict=True)]
                    store_pair(builder, name, both, builder.add(terms, place))
            h = Sums(builder, VECTOR, len(z), Number)
            for n, value in enumerate(values):
                builder.store(value.value, h.slots[n])
            with builder.if_then(skips):
                tile = builder.lshr(points[0], ir.Constant(I64, 4))
                row = builder.and_(points[0], ir.Constant(I64, N - 1))
                row = times(builder, row, BLOCK * element_bytes(name))
                source = builder.add(before, builder.add(builder.mul(tile, step_before), row))
                for r in range(len(points)):
                    here = builder.add(source, ir.Constant(I64, r * BLOCK * element_bytes(name)))
                    for n, value in enumerate(load_pair(builder, name, here)):
                        h.add(2 * r + n, factor * value)
            pairs = [[h[2 * r], h[2 * r + 1]] for r in range(len(points))]
            for place, pair in zip(places, pairs, strict=True):
                store_pair(builder, name, pair, builder.add(after, place))
                if how == ANALYTIC:
                    store_pair(builder, name, [x * x for x in pair], builder.add(squares, place))
            with builder.if_then(ends):
                for k in range(3 if how == ANALYTIC else 2):
                    factors = _results(builder, last, ROW_BYTES * k)
                    for point, pair in zip(points, pairs, strict=True):
                        low, high = [x * x for x in pair] if k == 2 else pair
                        total = low * factors[0] + high * factors[1]
                        _accumulate(builder, builder.add(sums, ir.Constant(I64, k * SUM_BYTES)), point, total)

        _rows(builder, name, step, body)
        return context.get_dummy_value()

    return signature_of(9, (types.int64,) * 3 + (types.float32,), kind, mode), generate


@intrinsic(prefer_literal=True)
def backward(typing_context, result, slopes, terms, deltas, local, sums, result_step, step, skip, kind):
    """One layer of the derivative of the density: ``delta = result + skip * delta``, and what it adds to the variance.

    `result_step` is the bytes from one point's row to the next, 0 where all have the same. The deltas and
    ``delta * slope`` (OUTPUT: deltas, local) are for the layer below. A `skip` of 0 reads no delta.
    """
    (code,) = literals((kind,))
    name = KINDS[code]

    def generate(context, builder, signature, arguments):
        result, slopes, terms, deltas, local, sums, result_step, step, skip = arguments[:9]
        factor = Number(builder, spread(builder, skip))
        skips = builder.fcmp_ordered("!=", skip, ir.Constant(F32, 0.0))

        def body(points: list[Any], places: list[Any]) -> None:
            delta = Sums(builder, VECTOR, 2 * len(points), Number)
            for r, point in enumerate(points):
                for n, value in enumerate(_results(builder, result, builder.mul(point, result_step))):
                    builder.store(value.value, delta.slots[2 * r + n])
            with builder.if_then(skips):
                for r, place in enumerate(places):
                    for n, value in enumerate(load_pair(builder, name, builder.add(deltas, place))):
                        delta.add(2 * r + n, factor * value)
            for r, (point, place) in enumerate(zip(points, places, strict=True)):
                pair = [delta[2 * r], delta[2 * r + 1]]
                term = load_pair(builder, name, builder.add(terms, place))
                slope = load_pair(builder, name, builder.add(slopes, place))
                low, high = (d * d * q for d, q in zip(pair, term, strict=True))
                _accumulate(builder, sums, point, low + high)
                store_pair(builder, name, pair, builder.add(deltas, place))
                store_pair(builder, name, [d * s for d, s in zip(pair, slope, strict=True)], builder.add(local, place))

        _rows(builder, name, step, body)
        return context.get_dummy_value()

    return signature_of(6, (types.int64,) * 2 + (types.float32,), kind), generate


@intrinsic
def add_squares(typing_context, result, sums):
    """Add to the points' sums the squares of the results of a block."""

    def generate(context, builder, signature, arguments):
        result, sums = arguments
        with loop(builder, ir.Constant(I64, BLOCK)) as point:
            low, high = _results(builder, result, times(builder, point, ROW_BYTES))
            _accumulate(builder, sums, point, low * low + high * high)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def reduce_rows(typing_context, sums, out, start, largest):
    """Sum (or largest lane) of each of a block's 32 points, plus `start`, as 32 float32 (OUTPUT: out)."""
    (maximum,) = literals((largest,))

    def generate(context, builder, signature, arguments):
        sums, out, start = arguments[:3]
        for tile in range(2):
            vectors = [load(builder, sums, 4 * N * (tile * N + i)) for i in range(N)]
            total = across(vectors, bool(maximum)) + Number(builder, spread(builder, start))
            store(builder, total, out, 4 * N * tile)
        return context.get_dummy_value()

    return signature_of(2, (types.float32,), largest), generate


@intrinsic
def clear(typing_context, address, n_vectors):
    """Zeros."""

    def generate(context, builder, signature, arguments):
        with loop(builder, arguments[1]) as i:
            store(builder, Number(builder, zero(VECTOR)), arguments[0], times(builder, i, 4 * N))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
