"""CPU driver of dense networks: raw features to the outputs of a network and their variance, in one pass.

Points go through all layers a few blocks of 32 at a time, so that activations stay in a core's cache, and GELU, skips
and what the variance needs are taken from a product's results while these are in its first level. A point's results
depend on its own features alone: they have the same bits in whatever batch and on however many threads.
"""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
import ctypes
import platform
import sys
import zlib
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from llvmlite import binding
from numba import carray, cfunc, config

from gpurho.kernels import _dense_emit, _dense_lanes, _dense_products, _smooth_emit
from gpurho.kernels._dense_emit import (
    BLOCK,
    KINDS,
    RESULT_BYTES,
    ROW_BYTES,
    N,
    element_bytes,
    floats,
    longs,
)
from gpurho.kernels._dense_lanes import (
    ANALYTIC,
    LAST_LAYER,
    SUM_BYTES,
    add_squares,
    backward,
    clear,
    hidden,
    reduce_rows,
    standardise,
)
from gpurho.kernels._dense_products import configure_tiles, product, release_tiles
from gpurho.kernels._smooth_emit import DENSE, X86

LAST_ROWS = 3
"""Rows of the last layer per chunk: density, logarithm of the variance, variances of the density's weights."""
WEIGHTS, BIAS, VARIANCES, BIAS_VARIANCES, TRANSPOSED = range(5)
"""Columns of a hidden layer's places in the packed numbers; those of the row behind the last one are `LAST` ff."""
LAST, FACTOR, FACTOR_REST, FACTOR_BIAS, ZEROS = range(5)

(
    FEATURES, ROWS, CHUNKS, HIDDEN, SETS, SET_BYTES, POINTS, INNER,
    COLUMNS_AT, PACKED_AT, PLACES_AT, SKIP_AT, SHIFTS_AT, TILES_AT,
) = range(14)  # fmt: skip
"""What the table of a network holds, see `make_kernel`."""


TILES = np.zeros(64, np.uint8)
"""Shapes of the tiles: eight of 16 rows of 64 bytes."""
TILES[0] = 1
TILES[16:32].view(np.uint16)[:] = 64
TILES[48:56] = N


@cache
def bf16_kind() -> str:
    """The kind of product for bfloat16 on this processor; "fp32" where it has none."""
    features = binding.get_host_cpu_features()
    # Code that is made for another processor than this one may not use what this one has.
    if any(getattr(config, name, None) for name in ("CPU_NAME", "CPU_FEATURES")) or platform.machine() not in X86:
        return "fp32"
    if features.get("amx-bf16") and features.get("avx512bf16") and _tiles_allowed():
        return "amx"
    # Intel's processors are faster in float32 than with these dot products (measured: 7.0 and 9.9 us a point).
    return "dot" if features.get("avx512bf16") and binding.get_host_cpu_name().startswith("znver") else "fp32"


def _tiles_allowed() -> bool:
    """Ask Linux for the tiles, which programs have to before they use them."""
    if sys.platform != "linux":
        return False
    arch_prctl, request, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request, tile_data) == 0


def padded(n: int) -> int:
    """The number of units, filled up to whole blocks."""
    return -(-n // BLOCK) * BLOCK


@lru_cache(maxsize=64)
def make_kernel(kind: int, mode: int, sigma: int, decays: int, leading: int, version: int) -> Any:
    """A network for a kind of product, a mode of variance, and flags of what inputs and outputs there are.

    `version` is part of the key of Numba's cache, which knows nothing of called functions. What is returned has the
    signature `DENSE`: (features, first, last, out, n, table) with addresses of

    features : (n_features,) float32 of each point
    out : (ROWS, n) float32
        OUTPUT, of which the columns from `first` to `last` are filled. The rows are the density, the two-body part
        where there is one and, with sigma, the logarithm of the variance, the excess and the epistemic variance: of the
        network of set 0, or of the densities of the other sets.
    table : int64
        Sizes: FEATURES, ROWS, CHUNKS of 32 features, HIDDEN layers, SETS of weights, SET_BYTES from one to the next,
        and how many points go through the inputs (POINTS), and then through the layers (INNER), at a time. Addresses:
        COLUMNS_AT (CHUNKS, COLUMN_ROWS, 32) float32; PACKED_AT (SETS, SET_BYTES); PLACES_AT (SETS, HIDDEN + 1, 5)
        int64, where among the bytes of a set a layer's numbers are; SKIP_AT (HIDDEN,) float32, 0 where there is none;
        SHIFTS_AT (SETS, 3) float32, biases of the outputs; TILES_AT the shapes of the tiles.
    """
    size = element_bytes(KINDS[kind])
    chunk = BLOCK * N * size  # bytes of a tile of points by 32 inputs
    panel = BLOCK * BLOCK * size  # bytes of a block of weights
    amx, analytic, last_layer = (int(x) for x in (KINDS[kind] == "amx", mode == ANALYTIC, mode == LAST_LAYER))

    @cfunc(DENSE, cache=True, error_model="numpy")
    def run(features, first, last, outputs, n, settings):
        if version == 0:  # never so: it is read only to be part of the key
            return
        table = carray(longs(settings), 14)
        n_features = table[FEATURES]
        rows = table[ROWS]
        n_hidden = table[HIDDEN]
        n_sets = table[SETS]
        points = table[POINTS]
        inner = table[INNER]
        places = carray(longs(table[PLACES_AT]), (n_sets, n_hidden + 1, 5))
        skip = carray(floats(table[SKIP_AT]), n_hidden)
        shifts = carray(floats(table[SHIFTS_AT]), (n_sets, 3))
        out = carray(floats(outputs), (rows, n))
        chunks_in = table[CHUNKS]
        units = (places[0, n_hidden, FACTOR] - places[0, n_hidden, LAST]) // (LAST_ROWS * ROW_BYTES)
        step_in = chunks_in * chunk
        step = units * chunk
        inputs_bytes = points // N * step_in
        layer_bytes = inner // N * step
        sums_bytes = inner // BLOCK * SUM_BYTES
        depth = n_hidden if analytic else 0
        scratch = np.empty(
            inputs_bytes * (1 + analytic) + layer_bytes * (2 + 5 * analytic + 2 * depth) + 3 * sums_bytes
            + 2 * SUM_BYTES + 2 * RESULT_BYTES + 64, np.uint8,
        )  # fmt: skip
        inputs = (np.int64(scratch.ctypes.data) + 63) // 64 * 64
        input_squares = inputs + inputs_bytes
        spare = input_squares + inputs_bytes * analytic
        square_spare = spare + 2 * layer_bytes
        local_spare = square_spare + 2 * layer_bytes * analytic
        deltas = local_spare + 2 * layer_bytes * analytic
        slopes = deltas + layer_bytes * analytic
        terms = slopes + layer_bytes * depth
        sums = terms + layer_bytes * depth
        excess = sums + 3 * sums_bytes
        baseline = excess + SUM_BYTES
        result = baseline + SUM_BYTES
        spread = result + RESULT_BYTES
        columns = table[COLUMNS_AT]
        source = np.int64(features)
        found = np.empty(BLOCK, np.float32)
        where = np.int64(found.ctypes.data)
        share = np.float32(max(1, n_sets - 1))
        if amx:
            configure_tiles(table[TILES_AT])
        for begin in range(first, last, points):
            count = min(points, last - begin)
            for b in range((count + BLOCK - 1) // BLOCK):
                at = begin + b * BLOCK
                left = min(BLOCK, last - at)
                standardise(
                    source + at * n_features * 4, columns, inputs + 2 * b * step_in, input_squares + 2 * b * step_in,
                    excess, baseline, left, n_features, chunks_in, step_in, kind, decays, analytic, sigma, leading,
                )  # fmt: skip
                if leading:
                    reduce_rows(baseline, where, np.float32(0.0), 0)
                    out[1, at : at + left] = found[:left]
                if sigma:
                    reduce_rows(excess, where, np.float32(0.0), 1)
                    out[rows - 2, at : at + left] = found[:left]
            average = np.zeros(count if n_sets > 1 else 0, np.float32)
            square = np.zeros(count if n_sets > 1 else 0, np.float32)
            for s in range(n_sets):
                base = table[PACKED_AT] + s * table[SET_BYTES]
                ending = base + places[s, n_hidden, LAST]
                zeros = base + places[s, n_hidden, ZEROS]
                for start in range(0, count, inner):
                    blocks = (min(inner, count - start) + BLOCK - 1) // BLOCK
                    clear(sums, 3 * sums_bytes // (4 * N))
                    here = inputs + start // N * step_in
                    here_squares = input_squares + start // N * step_in
                    here_step = step_in
                    for i in range(n_hidden):
                        after = spare + (i & 1) * layer_bytes
                        after_squares = square_spare + (i & 1) * layer_bytes
                        n_chunks = here_step // chunk
                        weights = base + places[s, i, WEIGHTS]
                        bias = base + places[s, i, BIAS]
                        wide = base + places[s, i, VARIANCES]
                        wide_bias = base + places[s, i, BIAS_VARIANCES]
                        for k in range(units * blocks):
                            p, b = k // blocks, k % blocks
                            before = here + 2 * b * here_step
                            column = p * n_chunks * panel
                            place = 2 * b * step + p * chunk
                            kept = i * layer_bytes + place
                            row = p * ROW_BYTES
                            product(before, weights + column, bias + row, result, here_step, 0, n_chunks, kind)
                            if analytic:
                                product(
                                    here_squares + 2 * b * here_step, wide + column, wide_bias + row, spread,
                                    here_step, 0, n_chunks, kind,
                                )  # fmt: skip
                            hidden(
                                result, spread, before + p * chunk, after + place, after_squares + place, slopes + kept,
                                terms + kept, ending + LAST_ROWS * row, sums + 3 * b * SUM_BYTES, here_step,
                                step, i + 1 == n_hidden, skip[i], kind, mode,
                            )  # fmt: skip
                        here, here_squares, here_step = after, after_squares, step
                    if analytic:
                        for i in range(n_hidden - 1, -1, -1):
                            top = i + 1 == n_hidden
                            local = local_spare + (i & 1) * layer_bytes
                            above = local_spare + (1 - (i & 1)) * layer_bytes
                            weights = base if top else base + places[s, i + 1, TRANSPOSED]
                            factor = np.float32(0.0) if top else skip[i + 1]
                            for k in range(units * blocks):
                                p, b = k // blocks, k % blocks
                                place = 2 * b * step + p * chunk
                                kept = i * layer_bytes + place
                                if not top:
                                    column = weights + p * units * panel
                                    product(above + 2 * b * step, column, zeros, result, step, 0, units, kind)
                                backward(
                                    ending + p * LAST_ROWS * ROW_BYTES if top else result, slopes + kept, terms + kept,
                                    deltas + place, local + place, sums + (3 * b + 2) * SUM_BYTES,
                                    0 if top else ROW_BYTES, step, factor, kind,
                                )  # fmt: skip
                    if last_layer:
                        for p in range(units):
                            weights = base + places[s, n_hidden, FACTOR] + p * units * panel
                            rest = base + places[s, n_hidden, FACTOR_REST] + p * units * panel
                            bias = base + places[s, n_hidden, FACTOR_BIAS] + p * ROW_BYTES
                            for b in range(blocks):
                                product(here + 2 * b * step, weights, bias, result, step, 0, units, kind)
                                if size < 4:
                                    product(here + 2 * b * step, rest, result, result, step, ROW_BYTES, units, kind)
                                add_squares(result, sums + (3 * b + 2) * SUM_BYTES)
                    for b in range(blocks):
                        at = begin + start + b * BLOCK
                        left = min(BLOCK, last - at)
                        reduce_rows(sums + 3 * b * SUM_BYTES, where, shifts[s, 0], 0)
                        if s > 0:
                            for j in range(left):
                                # Differences, so that nothing cancels.
                                difference = found[j] - out[0, at + j]
                                average[at - begin + j] += difference / share
                                square[at - begin + j] += difference * difference / share
                            continue
                        out[0, at : at + left] = found[:left]
                        if sigma:
                            reduce_rows(sums + (3 * b + 1) * SUM_BYTES, where, shifts[s, 1], 0)
                            out[rows - 3, at : at + left] = found[:left]
                        if analytic or last_layer:
                            reduce_rows(sums + (3 * b + 2) * SUM_BYTES, where, shifts[s, 2], 0)
                            out[rows - 1, at : at + left] = found[:left]
            for j in range(len(average)):
                out[rows - 1, begin + j] = max(square[j] - average[j] * average[j], np.float32(0.0))
        if amx:
            release_tiles()
        scratch[0] = 0  # keeps it until here: Numba frees arrays behind their last use
        found[0] = 0.0

    return run


def _source_version() -> int:
    """A number, never 0, that changes with the sources that the driver compiles in."""
    digest = 1
    for module in (_smooth_emit, _dense_emit, _dense_products, _dense_lanes):
        digest = zlib.crc32(Path(str(module.__file__)).read_bytes(), digest)
    return digest | 1


VERSION = _source_version()
