"""Pieces of a dense network as LLVM code for CPUs: matrix products, GELU and its derivative, bfloat16, sums of rows.

A block is 32 points by 32 units. Three kinds of products fill one: "amx" (tiles of bfloat16), "dot" (AVX512-BF16) and
"fp32". Everything else runs on vectors of 16 float32, which LLVM splits where registers are shorter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurho.kernels._smooth_emit import F32, I32, Value, pointer

N = 16
"""Lanes of a vector, and rows of a tile."""
BLOCK = 32
"""Points, inputs and units of a block."""
ROW_BYTES = 4 * BLOCK
"""Of a row of a block's float32 results."""
RESULT_BYTES = BLOCK * ROW_BYTES

I8, I16 = ir.IntType(8), ir.IntType(16)
BYTES = I8.as_pointer()
VECTOR, INTEGERS, SHORTS = ir.VectorType(F32, N), ir.VectorType(I32, N), ir.VectorType(I16, N)
PAIR = ir.VectorType(I32, N)
"""A register of 32 bfloat16, as assembly takes it."""

KINDS = ("fp32", "dot", "amx")
binding.initialize_native_asmparser()  # for the instructions that LLVM has no name for

END, TAIL_DEGREE = 5.5, 16
"""Of GELU in float32, ``max(x, 0) - |x| Phi(-|x|)`` with a polynomial of ``|x|``: within 3e-7, near 0 within 2e-7 of
its value; slope within 1e-6."""
ROUGH_END, ROUGH_DEGREE = 4.25, 7
"""Of GELU before it is rounded to bfloat16, where it is ``x / 2`` from an even function: within 1e-4, slope 5e-4."""


class Number(Value):
    """A value whose infinities and NaN count: what is not finite has to reach the outputs."""

    flags = ("contract",)

    def larger(self, other: Any) -> Number:
        """The larger of this and another; this where this is not a number."""
        return self._unless("<", other)

    def smaller(self, number: float) -> Number:
        """The smaller of this and another; this where this is not a number."""
        return self._unless(">", number)

    def _unless(self, comparison: str, other: Any) -> Number:
        other = other.value if isinstance(other, Value) else self.constant(other)
        apart = self.builder.fcmp_ordered(comparison, self.value, other)
        return Number(self.builder, self.builder.select(apart, other, self.value))

    def magnitude(self) -> Number:
        """The absolute value."""
        bits = self.builder.bitcast(self.value, INTEGERS)
        bits = self.builder.and_(bits, ir.Constant(INTEGERS, [2**31 - 1] * N))
        return Number(self.builder, self.builder.bitcast(bits, self.value.type))


def _make_pointer(number: Any) -> Any:
    @intrinsic
    def pointer_to(typing_context, address):
        """What lies at an address, for `numba.carray`."""
        kind = types.CPointer(number)

        def generate(context, builder, signature, arguments):
            return builder.inttoptr(arguments[0], context.get_value_type(kind))

        return kind(types.int64), generate

    return pointer_to


floats, longs = _make_pointer(types.float32), _make_pointer(types.int64)


def element_bytes(kind: str) -> int:
    """Of an activation or a weight."""
    return 4 if kind == "fp32" else 2


def load(builder: Any, address: Any, offset: Any = 0, align: int = 4) -> Number:
    """The vector at an address."""
    return Number(builder, builder.load(pointer(builder, address, offset, VECTOR), align=align))


def store(builder: Any, value: Value, address: Any, offset: Any = 0) -> None:
    """Store a vector at an address."""
    builder.store(value.value, pointer(builder, address, offset, VECTOR)).align = 4


def spread(builder: Any, scalar: Any) -> Any:
    """A vector whose lanes all hold `scalar`."""
    kind = ir.VectorType(scalar.type, N)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(INTEGERS, [0] * N))


def signature_of(addresses: int, numbers: tuple[Any, ...], *literals: Any) -> Any:
    """Of an intrinsic that returns nothing."""
    return types.void(*(types.int64,) * addresses, *numbers, *literals)


def call(builder: Any, name: str, kinds: list[Any], arguments: list[Any], result: Any = None) -> Any:
    """Call one of LLVM's own functions."""
    function = ir.FunctionType(ir.VoidType() if result is None else result, kinds)
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), arguments)


# --- pairs of vectors: 32 activations in memory --------------------------------------------------------------------


def load_pair(builder: Any, kind: str, address: Any) -> list[Number]:
    """32 activations."""
    if kind == "fp32":
        return [load(builder, address, 4 * N * h) for h in range(2)]
    found = []
    for h in range(2):
        short = builder.load(pointer(builder, address, 2 * N * h, SHORTS), align=2)
        wide = builder.shl(builder.zext(short, INTEGERS), ir.Constant(INTEGERS, [16] * N))
        found.append(Number(builder, builder.bitcast(wide, VECTOR)))
    return found


def store_pair(builder: Any, kind: str, values: Sequence[Value], address: Any) -> None:
    """Store 32 activations."""
    if kind == "fp32":
        for h, value in enumerate(values):
            store(builder, value, address, 4 * N * h)
        return
    function = ir.FunctionType(PAIR, [VECTOR, VECTOR])
    # AT&T order: the operand of the low half first.
    code = builder.asm(function, "vcvtne2ps2bf16 $1, $2, $0", "=v,v,v", [v.value for v in values], False)
    builder.store(code, pointer(builder, address, 0, PAIR)).align = 4


# --- functions -----------------------------------------------------------------------------------------------------


def _normal(x: Any) -> Any:
    from scipy.special import erfc

    return 0.5 * erfc(-x / np.sqrt(2.0))


def _slope(x: Any) -> Any:
    return _normal(x) + x * np.exp(-0.5 * x * x) / np.sqrt(2.0 * np.pi)


@cache
def _tail(slope: bool) -> list[float]:
    """Of GELU's slope, or ``gelu(x) / x``, at ``-t``: a polynomial in ``2 t / END - 1`` for t from 0 to `END`."""
    function = _slope if slope else _normal
    fit = np.polynomial.Chebyshev.interpolate(lambda s: function(-(s + 1.0) * END / 2.0), TAIL_DEGREE)
    return [float(c) for c in fit.convert(kind=np.polynomial.Polynomial).coef]


@cache
def _odd(slope: bool) -> list[float]:
    """Of the odd function that is GELU's slope, or ``gelu(x) / x``, less a half: a polynomial in x^2, to times x.

    It ends at `ROUGH_END` in the half that it has from there on. Least squares, with more and more weight on the
    largest errors.
    """
    x = ROUGH_END * np.sin(np.linspace(0.0, np.pi / 2.0, 1001)[1:])
    wanted = (_slope(x) if slope else _normal(x)) - 0.5 - x / (2.0 * ROUGH_END)
    square = np.polynomial.Polynomial([ROUGH_END**2, -1.0])
    columns = np.polynomial.chebyshev.chebvander(2.0 * (x / ROUGH_END) ** 2 - 1.0, ROUGH_DEGREE - 1)
    columns *= (square(x * x) * x)[:, None]
    importance = np.ones_like(x) if slope else x
    weights = importance
    for _ in range(50):
        found = np.linalg.lstsq(columns * weights[:, None], wanted * weights, rcond=None)[0]
        errors = np.abs(columns @ found - wanted) * importance
        weights = weights * (errors / errors.max() + 0.05) ** 0.3
    series = np.polynomial.Chebyshev(found, domain=[0.0, ROUGH_END**2]).convert(kind=np.polynomial.Polynomial)
    return [float(c) for c in (series * square + 0.5 / ROUGH_END).coef]


def _horner(points: Sequence[Value], coefficients: list[float]) -> list[Any]:
    """A polynomial of several vectors, side by side: a processor looks ahead only so far for what it can do next."""
    values: list[Any] = [x * coefficients[-1] + coefficients[-2] for x in points]
    for c in coefficients[-3::-1]:
        values = [value * x + c for value, x in zip(values, points, strict=True)]
    return values


def gelu(vectors: Sequence[Number], kind: str, with_slope: bool = False) -> tuple[list[Number], list[Number]]:
    """GELU, ``x Phi(x)``, and its derivative if asked for. A NaN stays one."""
    if kind == "fp32":
        return _exact_gelu(vectors, with_slope)
    near = [x.larger(-ROUGH_END).smaller(ROUGH_END) for x in vectors]
    squares = [x * x for x in near]

    def odd(slope: bool) -> list[Number]:
        found = _horner(squares, _odd(slope))
        return [Number(x.builder, (value * x + 0.5).value) for value, x in zip(found, near, strict=True)]

    values = [Number(x.builder, (x * value).value) for x, value in zip(vectors, odd(False), strict=True)]
    return values, odd(True) if with_slope else []


def _exact_gelu(vectors: Sequence[Number], with_slope: bool) -> tuple[list[Number], list[Number]]:
    far = [x.magnitude() for x in vectors]
    places = [t.smaller(END) * (2.0 / END) + (-1.0) for t in far]
    # What the tail leaves beyond its end is less than the rounding of x, and of an infinity makes no number.
    tails = [q * t for q, t in zip(_horner(places, _tail(False)), far, strict=True)]
    values = [Number(x.builder, (x.larger(0.0) - tail).value) for x, tail in zip(vectors, tails, strict=True)]
    slopes = []
    for x, below in zip(vectors, _horner(places, _tail(True)) if with_slope else [], strict=with_slope):
        positive = x.builder.fcmp_ordered(">", x.value, x.constant(0.0))
        slopes.append(Number(x.builder, x.builder.select(positive, (1.0 - below).value, below.value)))
    return values, slopes


def exponential(x: Number) -> Number:
    """``exp(x)`` to a few units of the last place: ``exp(-87)`` below that, infinite from 89 on."""
    builder = x.builder
    y = x.larger(-87.0).smaller(89.0) * (1.0 / np.log(2.0))
    whole = Number(builder, y._call(f"llvm.rint.v{N}f32").value)
    coefficients = [math.log(2.0) ** k / math.factorial(k) for k in range(8)]
    (value,) = _horner([y - whole], coefficients)
    exponent = builder.fptosi(whole.value, INTEGERS)
    bits = builder.shl(builder.add(exponent, ir.Constant(INTEGERS, [127] * N)), ir.Constant(INTEGERS, [23] * N))
    return Number(builder, (value * Number(builder, builder.bitcast(bits, VECTOR))).value)


def across(vectors: Sequence[Number], largest: bool = False) -> Number:
    """From 16 vectors one, whose lane i is the sum (or the largest) of the lanes of vector i."""
    left, width = list(vectors), N
    while len(left) > 1:
        builder, half = left[0].builder, width // 2
        # Of each group of `width` lanes the first halves of both vectors, and then the second halves.
        first = [g * width + i + n * N for g in range(N // width) for n in range(2) for i in range(half)]
        masks = [ir.Constant(INTEGERS, mask) for mask in (first, [i + half for i in first])]
        pairs = zip(left[: len(left) // 2], left[len(left) // 2 :], strict=True)
        shuffled = [[Number(builder, builder.shuffle_vector(a.value, b.value, m)) for m in masks] for a, b in pairs]
        left = [a.larger(b) if largest else Number(builder, (a + b).value) for a, b in shuffled]
        width = half
    return left[0]
