"""Pieces of the CPU driver of the smooth descriptors: a few grid points as lanes of one SIMD register, in float32.

All are intrinsics on addresses. Sizes are literal integers, so that every loop over channels and harmonics is unrolled
and every sum over atoms stays in registers.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.extending import intrinsic

from gpurho.kernels import _smooth_formulas as formulas
from gpurho.kernels._smooth_emit import F32, I32, I64, WORD, Sums, Value, groups, literals, loop, pointer, times

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
DIRECTION_ROWS = 4
"""Rows of an atom's terms before those of its channels: the damped direction and its squared length."""


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
    `terms` (n_atoms, 4 + n_basis, W) scratch; `sums` (n_radial, W) OUTPUT; `projections` (n_basis, n_harmonics, W)
    OUTPUT, degree by degree; `matrix` (n_basis, n_radial), read where `contracted` is 1.
    `inverse_square` (of the cutoff) and `damping` are float32 in that unit.
    """
    radial, basis, degree, dense = literals((n_radial, n_basis, l_max, contracted))
    if degree == 0:
        basis = 0
    n_harmonics = (degree + 1) ** 2 - 1
    atom_rows = DIRECTION_ROWS + basis
    signature = types.void(
        *(types.uintp, types.int64), *(types.uintp,) * 5, *(types.float32,) * 2, n_radial, n_basis, l_max, contracted
    )

    def first_pass(builder: Any, arguments: Any) -> Any:
        """Two-body sums; the terms of the atoms within the cutoff of any lane, and how many these are."""
        atoms, n_atoms, lanes, terms, sums, _, matrix, inverse_square, damping = arguments[:9]
        points = [builder.load(pointer(builder, lanes, d * ROW_BYTES, INTEGERS), align=ROW_BYTES) for d in range(3)]
        scale, soft = (Value(builder, _spread(builder, x)) for x in (inverse_square, damping))
        two_body = Sums(builder, VECTOR, radial)
        place = _variable(builder, terms)
        with loop(builder, n_atoms) as i:
            atom = builder.add(atoms, times(builder, i, ATOM_BYTES))
            deltas = []
            for d in range(3):
                position = builder.load(pointer(builder, atom, d * WORD, I32))
                difference = builder.sub(_spread(builder, position), points[d])
                deltas.append(Value(builder, builder.sitofp(difference, VECTOR)))
            dx, dy, dz = deltas
            square = dx * dx + dy * dy + dz * dz
            u = square * scale
            near = builder.fcmp_ordered("<", u.value, u.constant(1.0))
            mask = builder.bitcast(near, ir.IntType(W))
            with builder.if_then(builder.icmp_unsigned("!=", mask, ir.Constant(mask.type, 0))):
                values = formulas.radial_functions(u, radial)
                for n in range(radial):
                    two_body.add(n, values[n])
                if basis:
                    here = builder.load(place)
                    for d, value in enumerate(formulas.direction(dx, dy, dz, square, soft)):
                        _store(builder, value, here, d * ROW_BYTES)
                    for n in range(basis):
                        value = values[n]
                        if dense:
                            value = _combination(builder, values, matrix, n * radial)
                        _store(builder, value, here, (DIRECTION_ROWS + n) * ROW_BYTES)
                    builder.store(builder.add(here, ir.Constant(I64, atom_rows * ROW_BYTES)), place)
        for n in range(radial):
            _store(builder, two_body[n], sums, n * ROW_BYTES)
        return builder.udiv(builder.sub(builder.load(place), terms), ir.Constant(I64, atom_rows * ROW_BYTES))

    def generate(context, builder, signature, arguments):
        n_near = first_pass(builder, arguments)
        terms, projections = arguments[3], arguments[5]
        if not basis:
            return context.get_dummy_value()
        for channels in groups(range(basis), MOST_CHANNELS):
            for part in groups(formulas.columns(degree), max(1, REGISTER_SUMS // len(channels))):
                sums = Sums(builder, VECTOR, len(channels) * len(part))
                with loop(builder, n_near) as i:
                    atom = builder.add(terms, times(builder, i, atom_rows * ROW_BYTES))
                    damped = [_row(builder, atom, d * ROW_BYTES) for d in range(DIRECTION_ROWS)]
                    values = formulas.harmonics(*damped, list(part))
                    for a, n in enumerate(channels):
                        radial_value = _row(builder, atom, (DIRECTION_ROWS + n) * ROW_BYTES)
                        for b, value in enumerate(values):
                            sums.add(a * len(part) + b, radial_value * value)
                for a, n in enumerate(channels):
                    for b, key in enumerate(part):
                        row = n * n_harmonics + formulas.place(*key)
                        value = sums[a * len(part) + b] * formulas.norm(*key[:2])
                        _store(builder, value, projections, row * ROW_BYTES)
        return context.get_dummy_value()

    return signature, generate


def _variable(builder: Any, value: Any) -> Any:
    from numba.core import cgutils

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


@intrinsic
def call_kernel(
    typing_context, address, atoms, n_atoms, room, lanes, terms, projections, table, matrix, rows,
    inverse_square, damping,
):  # fmt: skip
    """Call a function with the signature `KERNEL` by its address."""

    def generate(context, builder, signature, arguments):
        kinds = [context.get_value_type(kind) for kind in KERNEL.args]
        target = builder.inttoptr(arguments[0], ir.FunctionType(ir.VoidType(), kinds).as_pointer())
        builder.call(target, arguments[1:])
        return context.get_dummy_value()

    return types.void(types.uintp, *KERNEL.args), generate
