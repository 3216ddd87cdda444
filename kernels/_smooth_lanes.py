"""Pieces of the CPU driver of the smooth descriptors: a few grid points as lanes of one SIMD register, in float32.

All are intrinsics on addresses. Sizes are literal integers, so that every loop over channels and harmonics is unrolled
and every sum over atoms stays in registers.
"""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from gpurho.kernels import _smooth_formulas as formulas
from gpurho.kernels._smooth_emit import (
    CONTRACTED,
    DENSE,
    F32,
    FACTORED,
    I32,
    I64,
    WORD,
    X86,
    Sums,
    Value,
    align_stack,
    groups,
    literals,
    loop,
    pointer,
    times,
)

_FEATURES = binding.get_host_cpu_features()
W = 16 if _FEATURES.get("avx512f") else 8
"""Lanes: grid points that are computed at once."""
REGISTER_SUMS = 24 if _FEATURES.get("avx512f") else 12
"""Sums that a loop keeps in registers, with room for what it adds."""
MOST_CHANNELS = 6

KERNEL = types.void(*(types.uintp,) * 2, types.int64, *(types.uintp,) * 6, *(types.float32,) * 2)
"""Of the kernel that is made for the sizes of a specification; see `gpurho.kernels.smooth_cpu.make_kernel`."""

VECTOR, INTEGERS = ir.VectorType(F32, W), ir.VectorType(I32, W)
ROW_BYTES = W * WORD
ATOM_BYTES = 4 * WORD
NEAR_ROWS = 4
"""Rows of an atom within the cutoff: the vector to it and its squared length."""


def _row(builder: Any, address: Any, offset: Any) -> Value:
    """The row of lanes at an address."""
    load = builder.load(pointer(builder, address, offset, VECTOR))
    load.align = ROW_BYTES
    return Value(builder, load)


def _store(builder: Any, value: Value, address: Any, offset: Any) -> None:
    builder.store(value.value, pointer(builder, address, offset, VECTOR)).align = ROW_BYTES


def _spread(builder: Any, scalar: Any) -> Any:
    """A vector whose lanes all hold `scalar`."""
    kind = ir.VectorType(scalar.type, W)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), scalar, ir.Constant(I32, 0))
    return builder.shuffle_vector(one, ir.Constant(kind, ir.Undefined), ir.Constant(ir.VectorType(I32, W), [0] * W))


@intrinsic(prefer_literal=True)
def project(
    typing_context, atoms, n_atoms, lanes, terms, sums, projections, matrix, inverse_square, damping,
    n_radial, n_basis, l_max, contracted,
):  # fmt: skip
    """Two-body sums and projections of `W` points on the atoms of one species.

    Addresses: `atoms` (n_atoms, 4) int32, x, y, z and anything, and `lanes` (3, W) int32, both in one unit of length;
    `terms` (n_atoms * (`NEAR_ROWS` + n_basis), W) scratch; `sums` (n_radial, W) OUTPUT; `projections` (n_basis,
    n_harmonics, W) OUTPUT, degree by degree; `matrix` (n_basis, n_radial), read where `contracted` is not 0.
    `inverse_square` (of the cutoff) and `damping` are float32 in that unit.
    """
    radial, basis, degree, dense = literals((n_radial, n_basis, l_max, contracted))
    if degree == 0:
        basis = 0
    parts = Parts(radial, basis, degree, dense)
    signature = types.void(
        *(types.uintp, types.int64), *(types.uintp,) * 5, *(types.float32,) * 2, n_radial, n_basis, l_max, contracted
    )

    def generate(context, builder, signature, arguments):
        atoms, n_atoms, lanes, terms, sums, projections, matrix, inverse_square, damping = arguments[:9]
        align_stack(builder)
        scale, soft = (Value(builder, _spread(builder, x)) for x in (inverse_square, damping))
        channels = builder.add(terms, times(builder, n_atoms, NEAR_ROWS * ROW_BYTES))
        n_near = _gather(builder, atoms, n_atoms, lanes, terms, scale)
        parts.functions(builder, terms, n_near, channels, sums, matrix, scale, soft)
        if basis:
            parts.project(builder, terms, n_near, channels, projections)
            if dense == FACTORED:
                parts.mix(builder, projections, matrix)
        return context.get_dummy_value()

    return signature, generate


def _gather(builder: Any, atoms: Any, n_atoms: Any, lanes: Any, near: Any, scale: Any) -> Any:
    """Vector and squared length to each atom within the cutoff of any lane, to `near`; how many atoms these are."""
    points = [builder.load(pointer(builder, lanes, d * ROW_BYTES, INTEGERS), align=ROW_BYTES) for d in range(3)]
    place = _variable(builder, near)
    with loop(builder, n_atoms) as i:
        atom = builder.add(atoms, times(builder, i, ATOM_BYTES))
        here = builder.load(place)
        deltas = []
        for d in range(3):
            position = builder.load(pointer(builder, atom, d * WORD, I32))
            difference = builder.sub(_spread(builder, position), points[d])
            deltas.append(Value(builder, builder.sitofp(difference, VECTOR)))
        dx, dy, dz = deltas
        square = dx * dx + dy * dy + dz * dz
        for d, value in enumerate((dx, dy, dz, square)):
            _store(builder, value, here, d * ROW_BYTES)
        inside = builder.fcmp_ordered("<", (square * scale).value, square.constant(1.0))
        mask = builder.bitcast(inside, ir.IntType(W))
        step = builder.select(
            builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0)),
            ir.Constant(I64, NEAR_ROWS * ROW_BYTES), ir.Constant(I64, 0),
        )  # fmt: skip
        builder.store(builder.add(here, step), place)
    return builder.udiv(builder.sub(builder.load(place), near), ir.Constant(I64, NEAR_ROWS * ROW_BYTES))


class Parts:
    """What `project` does with the atoms that are near."""

    def __init__(self, radial: int, basis: int, degree: int, dense: int) -> None:
        self.radial, self.basis, self.degree, self.dense = radial, basis, degree, dense
        self.n_harmonics = (degree + 1) ** 2 - 1

    def functions(
        self, builder: Any, near: Any, n_near: Any, channels: Any, sums: Any, matrix: Any, scale: Value, soft: Value
    ) -> None:
        """Two-body sums, the channels of each atom and, in place of the vector to it, its damped direction."""
        two_body = Sums(builder, VECTOR, self.radial)
        pairs = builder.udiv(n_near, ir.Constant(I64, 2))

        def part(first: Any, n: int) -> None:
            sources = [builder.add(near, times(builder, first, NEAR_ROWS * ROW_BYTES))]
            targets = [builder.add(channels, times(builder, first, self.basis * ROW_BYTES))]
            for some, rows in ((sources, NEAR_ROWS), (targets, self.basis)):
                while len(some) < n:
                    some.append(builder.add(some[-1], ir.Constant(I64, rows * ROW_BYTES)))

            def keep(value: Side, places: list[Any], row: int) -> None:
                for one, place in zip(value.values, places, strict=True):
                    _store(builder, one, place, row * ROW_BYTES)

            dx, dy, dz, square = (Side(*(_row(builder, s, d * ROW_BYTES) for s in sources)) for d in range(NEAR_ROWS))
            values = formulas.radial_functions(square * scale, self.radial)
            if self.basis:
                for d, value in enumerate(formulas.direction(dx, dy, dz, square, soft)):
                    keep(value, sources, d)
            skip = self.basis if self.dense == FACTORED else 0 if self.dense else self.radial
            totals: list[Any] = list(values[: self.basis]) if self.dense != CONTRACTED else [None] * self.basis
            for k, value in enumerate(values):
                for one in value.values:
                    two_body.add(k, one)
                for j in range(self.basis if k >= skip else 0):
                    number = builder.load(pointer(builder, matrix, (j * self.radial + k) * WORD, F32))
                    term = value * Value(builder, _spread(builder, number))
                    totals[j] = term if totals[j] is None else totals[j] + term
            for j, total in enumerate(totals):
                keep(total, targets, j)

        with loop(builder, pairs) as i:
            part(times(builder, i, 2), 2)
        odd = builder.and_(n_near, ir.Constant(I64, 1))
        with builder.if_then(builder.icmp_unsigned("!=", odd, ir.Constant(I64, 0))):
            part(builder.sub(n_near, odd), 1)
        for n in range(self.radial):
            _store(builder, two_body[n], sums, n * ROW_BYTES)

    def project(self, builder: Any, near: Any, n_near: Any, channels: Any, projections: Any) -> None:
        """Sums over the atoms of the products of channels and harmonics."""
        for some in groups(range(self.basis), MOST_CHANNELS):
            for part in groups(formulas.columns(self.degree), max(1, REGISTER_SUMS // len(some))):
                sums = Sums(builder, VECTOR, len(some) * len(part))
                with loop(builder, n_near) as i:
                    here = builder.add(near, times(builder, i, NEAR_ROWS * ROW_BYTES))
                    atom = builder.add(channels, times(builder, i, self.basis * ROW_BYTES))
                    damped = [_row(builder, here, d * ROW_BYTES) for d in range(NEAR_ROWS)]
                    values = formulas.harmonics(*damped, list(part))
                    for a, n in enumerate(some):
                        radial_value = _row(builder, atom, n * ROW_BYTES)
                        for b, value in enumerate(values):
                            sums.add(a * len(part) + b, radial_value * value)
                for a, n in enumerate(some):
                    for b, key in enumerate(part):
                        row = n * self.n_harmonics + formulas.place(*key)
                        value = sums[a * len(part) + b] * formulas.norm(*key[:2])
                        _store(builder, value, projections, row * ROW_BYTES)

    def mix(self, builder: Any, projections: Any, matrix: Any) -> None:
        """What is left of the contraction."""
        with loop(builder, ir.Constant(I64, self.n_harmonics)) as i:
            column = builder.add(projections, times(builder, i, ROW_BYTES))
            step = self.n_harmonics * ROW_BYTES
            found = [_row(builder, column, n * step) for n in range(self.basis)]
            for n in range(self.basis):
                _store(builder, _combination(builder, found, matrix, n * self.radial), column, n * step)


class Side:
    """Values that one formula makes side by side."""

    def __init__(self, *values: Value) -> None:
        self.values = values

    def _each(self, operate: Any, other: Any = None) -> Side:
        others = other.values if isinstance(other, Side) else (other,) * len(self.values)
        return Side(*(operate(a, b) for a, b in zip(self.values, others, strict=True)))

    def __add__(self, other: Any) -> Side:
        return self._each(lambda a, b: a + b, other)

    def __sub__(self, other: Any) -> Side:
        return self._each(lambda a, b: a - b, other)

    def __rsub__(self, other: Any) -> Side:
        return self._each(lambda a, b: b - a, other)

    def __mul__(self, other: Any) -> Side:
        return self._each(lambda a, b: a * b, other)

    def square_root(self) -> Side:
        """The square roots."""
        return self._each(lambda a, _: a.square_root())

    def inverse_root(self) -> Side:
        """One over the square roots."""
        return self._each(lambda a, _: a.inverse_root())

    def smaller(self, number: float) -> Side:
        """The smaller of each and a constant."""
        return self._each(lambda a, _: a.smaller(number))


def _variable(builder: Any, value: Any) -> Any:
    return cgutils.alloca_once_value(builder, value)


def _combination(builder: Any, values: list[Value], matrix: Any, first: int) -> Value:
    """The sum of the values, each times a number of the matrix."""
    total = None
    for k, value in enumerate(values):
        factor = builder.load(pointer(builder, matrix, (first + k) * WORD, F32))
        term = value * Value(builder, _spread(builder, factor))
        total = term if total is None else total + term
    assert total is not None
    return total


@intrinsic(prefer_literal=True)
def multiply(typing_context, projections, table, n_channels, l_max):
    """The power spectrum of `W` points.

    Addresses: `projections` (n_channels, n_harmonics, W); `table` (n_pairs * l_max, W) OUTPUT: for each pair of
    channels the products of degree 1 to l_max.
    """
    channels, degrees = literals((n_channels, l_max))
    n_harmonics = (degrees + 1) ** 2 - 1
    signature = types.void(types.uintp, types.uintp, n_channels, l_max)
    start = [a * channels - a * (a - 1) // 2 - a for a in range(channels)]  # of the pairs (a, b) less b

    def generate(context, builder, signature, arguments):
        projections, table = arguments[:2]
        one = ir.Constant(I64, 1)
        parts = groups(range(channels), MOST_CHANNELS)
        for left, right in [(a, b) for i, a in enumerate(parts) for b in parts[i:]]:
            for rows in groups(left, 6 if left is right else max(1, REGISTER_SUMS // len(right))):
                pairs = [(a, b) for a in rows for b in right if b >= a]
                with loop(builder, ir.Constant(I64, degrees)) as index:
                    degree = builder.add(index, one)
                    first = builder.sub(builder.mul(degree, degree), one)
                    count = builder.add(builder.add(degree, degree), one)
                    sums = Sums(builder, VECTOR, len(pairs))
                    with loop(builder, count) as i:
                        row = builder.add(projections, times(builder, builder.add(first, i), ROW_BYTES))
                        values = {c: _row(builder, row, c * n_harmonics * ROW_BYTES) for c in {*rows, *right}}
                        for k, (a, b) in enumerate(pairs):
                            sums.add(k, values[a] * values[b])
                    column = builder.add(table, times(builder, index, ROW_BYTES))
                    for k, (a, b) in enumerate(pairs):
                        _store(builder, sums[k], column, (start[a] + b) * degrees * ROW_BYTES)
        return context.get_dummy_value()

    return signature, generate


@intrinsic(prefer_literal=True)
def write_rows(typing_context, table, rows, n_columns):
    """Copy the lanes of a table to the rows of their points, `W` columns at a time.

    `table` is the address of (n_columns, W) numbers, `rows` that of (W,) uint64, the addresses of the points' rows
    (OUTPUT); lanes of the same point hold the same numbers. There are at least `W` columns.
    """
    (columns,) = literals((n_columns,))
    signature = types.void(types.uintp, types.uintp, n_columns)

    def generate(context, builder, signature, arguments):
        table, rows = arguments[:2]
        whole = columns // W

        def block(first: Any) -> None:
            source = builder.add(table, times(builder, first, ROW_BYTES))
            vectors = [_row(builder, source, i * ROW_BYTES).value for i in range(W)]
            step = 1
            while step < W:
                # Exchange the off-diagonal squares of `step` numbers in every square of twice as many.
                low = [i + W - step if i & step else i for i in range(W)]
                high = [i + W if i & step else i + step for i in range(W)]
                masks = [ir.Constant(INTEGERS, mask) for mask in (low, high)]
                for i in range(W):
                    if not i & step:
                        pair = vectors[i], vectors[i + step]
                        vectors[i], vectors[i + step] = (builder.shuffle_vector(*pair, mask) for mask in masks)
                step *= 2
            for lane, vector in enumerate(vectors):
                row = builder.load(pointer(builder, rows, lane * 8, I64))
                target = pointer(builder, row, times(builder, first, WORD), VECTOR)
                builder.store(vector, target).align = WORD

        with loop(builder, ir.Constant(I64, whole)) as i:
            block(times(builder, i, W))
        if columns % W:
            # The last columns once more, with some of those before.
            block(ir.Constant(I64, columns - W))
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def load_count(typing_context, counts, i):
    """Number i of the int64 at an address."""

    def generate(context, builder, signature, arguments):
        return builder.load(pointer(builder, arguments[0], times(builder, arguments[1], 8), I64))

    return types.int64(types.uintp, types.int64), generate


def _called(context: Any, builder: Any, kernel: Any, arguments: Any) -> Any:
    """Call a function of a signature by its address."""
    kinds = [context.get_value_type(kind) for kind in kernel.args]
    target = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
    builder.call(target, arguments[1:])
    return context.get_dummy_value()


@intrinsic
def call_kernel(
    typing_context, address, atoms, n_atoms, room, lanes, terms, projections, table, matrix, rows,
    inverse_square, damping,
):  # fmt: skip
    """Call a function with the signature `KERNEL` by its address."""

    def generate(context, builder, signature, arguments):
        return _called(context, builder, KERNEL, arguments)

    return types.void(types.uintp, *KERNEL.args), generate


@intrinsic
def call_network(typing_context, address, features, first, last, out, n, table):
    """Call a function with the signature `gpurho.kernels.dense_cpu.DENSE` by its address."""

    def generate(context, builder, signature, arguments):
        return _called(context, builder, DENSE, arguments)

    return types.void(types.uintp, *DENSE.args), generate


@intrinsic
def ticks(typing_context):
    """A processor's clock, to compare spans of time with each other; 0 where asking for it may be forbidden."""

    def generate(context, builder, signature, arguments):
        if platform.machine() not in X86:
            return ir.Constant(I64, 0)
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(I64, []), "llvm.readcyclecounter")
        return builder.call(function, [])

    return types.int64(), generate


@intrinsic
def take(typing_context, counter):
    """The int64 at an address, which then is one more, whatever other threads do."""

    def generate(context, builder, signature, arguments):
        return builder.atomic_rmw("add", pointer(builder, arguments[0], 0, I64), ir.Constant(I64, 1), "monotonic")

    return types.int64(types.uintp), generate
