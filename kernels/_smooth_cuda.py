"""CUDA kernels of the smooth descriptors: a thread per grid point, with all sums over atoms in registers.

The sums of large specifications do not fit into registers at once; then several passes over the atoms make a share of
them each. A block of threads holds a batch of points. Its atoms come in an order that depends on their positions alone,
with coordinates in whole numbers of `UNIT`, so that a point's features have the same bits in every tile.
"""

from __future__ import annotations

# Kernels are Numba's language, which mypy does not know.
# mypy: no-check-untyped-defs
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from llvmlite import ir
from numba import cuda, float32, float64, int32, int64, types

from gpurho.errors import SettingsError
from gpurho.kernels import _smooth_formulas as formulas
from gpurho.kernels._smooth_emit import F32, I32, I64, WORD, Sums, Value, loop
from gpurho.kernels._smooth_formulas import UNIT
from gpurho.kernels.batches import LANES
from gpurho.kernels.smooth import SmoothSizes, part_channels, whole_channels

MOST_SUMS = 150
"""Sums that a pass keeps in registers besides the two-body sums."""
STAGED = 32
"""Columns that a block gathers before it writes them, a row of the features after the other."""
STRIDE = LANES + 1
"""Of the table of staged columns: its entries of one column lie in different banks of memory, as those of one row."""

COORDINATES_SIGNATURE = (float64[:, ::1], int32[:, ::1])
ARRANGE_SIGNATURE = (int32[:, ::1], int32[::1], int32[:, ::1], int32[:, :, ::1])
EXPAND_SIGNATURE = (
    float64[:, ::1], int32[::1], int32[::1], int32[::1], int32[:, :, ::1], int32[::1], float32, float32, int32[::1],
    float32[:, ::1],
)  # fmt: skip


@dataclass(frozen=True)
class Pass:
    """One loop over the atoms: the harmonics whose projections it makes, and whether the two-body sums as well."""

    harmonics: tuple[formulas.Harmonic, ...]
    two_body: bool

    @property
    def degrees(self) -> list[int]:
        """Of its harmonics."""
        return sorted({key[0] for key in self.harmonics})


def passes(sizes: SmoothSizes) -> list[Pass]:
    """As few passes as registers allow; the harmonics of one degree are together where they fit."""
    if sizes.n_channels > MOST_SUMS:
        raise SettingsError(
            f"n_basis {sizes.n_basis} for {sizes.n_species} species exceeds the {MOST_SUMS} channels that CUDA takes; "
            "give a smaller n_basis or device 'cpu'"
        )
    if not sizes.n_channels or not sizes.l_max:
        return [Pass((), True)]
    room = MOST_SUMS // sizes.n_channels
    degrees: dict[int, list[formulas.Harmonic]] = {}
    for key in formulas.columns(sizes.l_max):
        degrees.setdefault(key[0], []).append(key)
    shares = [keys[i : i + room] for keys in degrees.values() for i in range(0, len(keys), room)]
    # First fit, the largest first.
    bins: list[list[formulas.Harmonic]] = []
    for share in sorted(shares, key=len, reverse=True):
        fitting = [b for b in bins if len(b) + len(share) <= room]
        if fitting:
            fitting[0].extend(share)
        else:
            bins.append(list(share))
    return [Pass(tuple(sorted(keys)), i == 0) for i, keys in enumerate(bins)]


Column = tuple[int, int, int, int]
"""A result: (-1, species, n, column) for a two-body sum, (degree, channel, channel, column) for a product."""


def two_body_columns(sizes: SmoothSizes, species: int) -> list[Column]:
    """The two-body sums of a species."""
    return [(-1, species, n, species * sizes.n_radial + n) for n in range(sizes.n_radial)]


def product_columns(sizes: SmoothSizes, share: Pass) -> list[Column]:
    """The products that the harmonics of a pass contribute to."""
    column = sizes.n_species * sizes.n_radial
    columns = []
    for a in range(sizes.n_channels):
        for b in range(a, sizes.n_channels):
            columns += [(degree, a, b, column + degree - 1) for degree in share.degrees]
            column += sizes.l_max
    return columns


def staged(sizes: SmoothSizes) -> Iterator[tuple[Pass, int, list[Column], bool]]:
    """What is written at a time: pass, species (-1 after all of them), columns, and whether they are added to."""
    begun: set[int] = set()
    for share in passes(sizes):
        if share.two_body:
            for s in range(sizes.n_species):
                yield from ((share, s, chunk, False) for chunk in _chunks(two_body_columns(sizes, s)))
        columns = product_columns(sizes, share)
        for again in (False, True):
            wanted = [c for c in columns if (c[0] in begun) is again]
            yield from ((share, -1, chunk, again) for chunk in _chunks(wanted))
        begun.update(share.degrees)


def _chunks(columns: list[Column]) -> list[list[Column]]:
    return [columns[i : i + STAGED] for i in range(0, len(columns), STAGED)]


def column_order(sizes: SmoothSizes) -> list[int]:
    """The columns in the order in which they are staged; one whose sum takes several passes comes several times."""
    return [column[3] for _, _, columns, _ in staged(sizes) for column in columns]


def make_flush() -> Callable[..., None]:
    """Device function that writes the staged columns to the features."""

    def flush(table, columns, start, n, again, lane, order, first, n_lanes, out):
        """Copy ``table[c, row]`` to ``out[order[first + row], columns[start + c]]`` (OUTPUT), or add it `again`."""
        cuda.syncthreads()
        c = lane % STAGED
        if c < n:
            column = columns[start + c]
            for row in range(lane // STAGED, n_lanes, LANES // STAGED):
                value = table[c * STRIDE + row]
                o = order[first + row]
                if again != 0:
                    value += out[o, column]
                out[o, column] = value
        cuda.syncthreads()

    return flush


def channels_of(sizes: SmoothSizes, species: int, values: list[Any]) -> list[Any]:
    """The channels of a species from the radial functions."""
    if sizes.contraction is None:
        return values[: sizes.n_basis]
    return [
        _sum(value * factor for value, factor in zip(values, row, strict=True)) for row in sizes.contraction[species]
    ]


def _sum(terms: Iterator[Any]) -> Any:
    """The sum of at least one term."""
    total = next(terms)
    for term in terms:
        total = total + term
    return total


def product(share: Pass, column: Column, projection: Callable[[int, formulas.Harmonic], Any]) -> Any:
    """A column of the power spectrum, from the harmonics of one pass."""
    degree, a, b, _ = column
    keys = [key for key in share.harmonics if key[0] == degree]
    return _sum(projection(a, key) * projection(b, key) for key in keys)


def radial_count(sizes: SmoothSizes, share: Pass) -> int:
    """Radial functions that a pass needs."""
    return sizes.n_radial if share.two_body or sizes.contraction is not None else sizes.n_basis


def simulated_expander(sizes: SmoothSizes, flush: Any) -> Callable[..., float]:
    """What `make_expander` returns, as plain Python."""

    def expand(
        quads, counts, n_batches, batch, gx, gy, gz, inverse_square, damping, table, lane,
        columns, order, first, n_lanes, out,
    ):  # fmt: skip
        def difference(x, g):
            return float((int(x) - int(g) + 2**31) % 2**32 - 2**31)

        start, alone, done = 0, 0.0, None
        sums: dict[Any, float] = {}
        for share, species, chunk, again in staged(sizes):
            if done != share:
                done, sums = share, {}
                for s in range(sizes.n_species):
                    entry = s * n_batches + batch
                    for q in quads[entry][: counts[entry]]:
                        dx, dy, dz = (difference(x, g) for x, g in zip(q, (gx, gy, gz), strict=False))
                        square = dx * dx + dy * dy + dz * dz
                        if square * inverse_square >= 1:
                            continue
                        values = formulas.radial_functions(square * inverse_square, radial_count(sizes, share))
                        if share.two_body:
                            for n, value in enumerate(values):
                                sums[s, n] = sums.get((s, n), 0.0) + value
                            alone += values[0]
                        if share.harmonics:
                            damped = formulas.direction(dx, dy, dz, square, damping)
                            angular = formulas.harmonics(*damped, list(share.harmonics))
                            for n, value in enumerate(channels_of(sizes, s, values)):
                                for key, y in zip(share.harmonics, angular, strict=True):
                                    place = s * sizes.n_basis + n, key
                                    sums[place] = sums.get(place, 0.0) + value * y * formulas.norm(*key[:2])
            for c, column in enumerate(chunk):
                if species >= 0:
                    value = sums.get(column[1:3], 0.0)
                else:
                    value = product(share, column, lambda a, key, sums=sums: sums.get((a, key), 0.0))
                table[c * STRIDE + lane] = value
            flush(table, columns, start, len(chunk), int(again), lane, order, first, n_lanes, out)
            start += len(chunk)
        return alone

    return expand


class DeviceValue(Value):
    """A float32 on a CUDA device."""

    def inverse_root(self) -> Value:
        """One over the square root, by the device's own instruction."""
        return self._call("llvm.nvvm.rsqrt.approx.ftz.f")


def make_expander(sizes: SmoothSizes, flush: Callable[..., None], intrinsic: Any = None, number: Any = None) -> Any:
    """Device function that computes all features of one grid point.

    Parameters
    ----------
    sizes : SmoothSizes
    flush : callable
        As `make_flush` returns it, not compiled.
    intrinsic, number : optional
        The decorator and the class of numbers of the target; by default those of Numba's CUDA target. Tests run the
        same code on the CPU.

    Returns
    -------
    expand(quads, counts, n_batches, batch, gx, gy, gz, inverse_square, damping, table, lane, columns, ...)
        `quads` (n_entries, room, 4) int32: x, y, z in units and anything; `counts` (n_entries,) int32: atoms of an
        entry; gx, gy, gz : int32, the point; `inverse_square` of the cutoff and `damping` in units; `table`
        (`STAGED` * `STRIDE`,) float32 in shared memory; the rest as for `flush`. Returns the sum of the envelopes,
        which is 0 for a point without atoms. OUTPUT: ``out``, by `flush`.
    """
    if intrinsic is None:
        from numba.cuda.extending import intrinsic
    if number is None:
        number = DeviceValue

    @intrinsic
    def expand(
        typing_context, quads, counts, n_batches, batch, gx, gy, gz, inverse_square, damping, table, lane,
        columns, order, first, n_lanes, out,
    ):  # fmt: skip
        i, f = types.int32, types.float32
        signature = f(quads, counts, i, i, i, i, i, f, f, table, i, columns, order, i, i, out)

        def generate(context, builder, signature, arguments):
            def struct(position):
                return context.make_array(signature.args[position])(context, builder, value=arguments[position])

            def wide(value):
                return builder.sext(value, I64)

            room = builder.extract_value(struct(0).shape, 1)
            n_batches, batch = (wide(x) for x in arguments[2:4])
            point = arguments[4:7]
            scale, soft = (number(builder, x) for x in arguments[7:9])
            lane = arguments[10]
            alone = Sums(builder, F32, 1, number)
            quad = ir.VectorType(I32, 4)

            def accumulate(share, species, two_body, projections):
                entry = builder.add(builder.mul(ir.Constant(I64, species), n_batches), batch)
                count = wide(builder.load(builder.gep(struct(1).data, [entry])))
                base = builder.gep(struct(0).data, [builder.mul(builder.mul(entry, room), ir.Constant(I64, 4))])
                base = builder.bitcast(base, quad.as_pointer(getattr(base.type, "addrspace", 0)))
                with loop(builder, count) as i:
                    atom = builder.load(builder.gep(base, [i]), align=4 * WORD)
                    deltas = []
                    for d in range(3):
                        x = builder.extract_element(atom, ir.Constant(I32, d))
                        deltas.append(number(builder, builder.sitofp(builder.sub(x, point[d]), F32)))
                    dx, dy, dz = deltas
                    square = dx * dx + dy * dy + dz * dz
                    u = square * scale
                    with builder.if_then(builder.fcmp_ordered("<", u.value, u.constant(1.0))):
                        values = formulas.radial_functions(u, radial_count(sizes, share))
                        if two_body is not None:
                            alone.add(0, values[0])
                            for n, value in enumerate(values):
                                two_body.add(n, value)
                        if not share.harmonics:
                            return
                        damped = formulas.direction(dx, dy, dz, square, soft)
                        radial = part_channels(sizes, species, values) or channels_of(sizes, species, values)
                        for k, y in enumerate(formulas.harmonics(*damped, list(share.harmonics))):
                            for n, value in enumerate(radial):
                                projections.add((species * sizes.n_basis + n) * len(share.harmonics) + k, value * y)

            def write(start, values, again):
                for c, value in enumerate(values):
                    slot = builder.add(lane, ir.Constant(I32, c * STRIDE))
                    builder.store(value.value, builder.gep(struct(9).data, [slot]))
                numbers = [ir.Constant(I32, x) for x in (start, len(values), int(again))]
                passed = [arguments[9], arguments[11], *numbers, lane, *arguments[12:16]]
                kinds = [signature.args[9], signature.args[11], i, i, i, i, *signature.args[12:16]]
                context.compile_internal(builder, flush, types.void(*kinds), passed)

            start, chunks = 0, list(staged(sizes))
            for share in passes(sizes):
                projections = Sums(builder, F32, sizes.n_channels * len(share.harmonics), number)
                for species in range(sizes.n_species):
                    two_body = Sums(builder, F32, sizes.n_radial, number) if share.two_body else None
                    accumulate(share, species, two_body, projections)
                    for _, _, chunk, _ in (x for x in chunks if x[0] == share and x[1] == species):
                        write(start, [two_body[column[2]] for column in chunk], False)
                        start += len(chunk)

                for species, (k, key) in itertools.product(range(sizes.n_species), enumerate(share.harmonics)):
                    slots = [(species * sizes.n_basis + n) * len(share.harmonics) + k for n in range(sizes.n_basis)]
                    found = [projections[slot] * formulas.norm(*key[:2]) for slot in slots]
                    for slot, value in zip(slots, whole_channels(sizes, species, found) or found, strict=True):
                        projections.put(slot, value)

                def projection(channel, key, share=share, projections=projections):
                    return projections[channel * len(share.harmonics) + share.harmonics.index(key)]

                for _, _, chunk, again in (x for x in chunks if x[0] == share and x[1] < 0):
                    write(start, [product(share, column, projection) for column in chunk], again)
                    start += len(chunk)
            return alone[0].value

        return signature, generate

    return expand


def whole_number(x):
    """A coordinate in units, as int32 that wraps around."""
    units = math.floor(x * (1.0 / UNIT) + 0.5)
    return int32(units - math.floor(units * 2.0**-32 + 0.5) * 2.0**32)


def make_coordinates() -> Callable[..., Any]:
    """The kernel that makes whole-number coordinates: a thread per atom."""
    whole = cuda.jit(device=True)(whole_number)

    def coordinates(positions, quads):
        """``quads[a]``: x, y, z in units and a number that hardly two atoms share (OUTPUT)."""
        a = cuda.grid(1)
        if a < len(positions):
            x = whole(positions[a, 0])
            y = whole(positions[a, 1])
            z = whole(positions[a, 2])
            quads[a, 0] = x
            quads[a, 1] = y
            quads[a, 2] = z
            quads[a, 3] = int32(((int64(x) * 40503 + int64(y)) * 40503 + int64(z)) & 0x7FFFFFFF)

    return coordinates


def make_arrange() -> Callable[..., Any]:
    """The kernel that puts the atoms of each entry in order: a block of `LANES` threads per entry."""

    def arrange(atoms, counts, lists, quads):
        """``quads[entry]``: the listed atoms by their number (OUTPUT); `counts` falls to what is listed (OUTPUT)."""
        entry = cuda.blockIdx.x
        n = min(counts[entry], lists.shape[1])
        cuda.syncthreads()
        if cuda.threadIdx.x == 0:
            counts[entry] = n
        for i in range(cuda.threadIdx.x, n, LANES):
            a = lists[entry, i]
            mine = atoms[a, 3]
            rank = 0
            for j in range(n):
                other = atoms[lists[entry, j], 3]
                if other < mine or (other == mine and j < i):
                    rank += 1
            for d in range(4):
                quads[entry, rank, d] = atoms[a, d]

    return arrange


def make_expand(sizes: SmoothSizes, expander: Any) -> Callable[..., Any]:
    """The kernel: a block of `LANES` threads per batch; `expander` is what `make_expander` returns."""
    whole = cuda.jit(device=True)(whole_number)
    length = STAGED * STRIDE

    def expand(points, order, batch_start, counts, quads, columns, inverse_square, damping, counters, out):
        """All features of the points of a batch (OUTPUT: out), and how many have no atom (OUTPUT: counters)."""
        lane = cuda.threadIdx.x
        batch = cuda.blockIdx.x
        table = cuda.shared.array(length, float32)
        first = batch_start[batch]
        n_lanes = batch_start[batch + 1] - first
        p = order[first + min(lane, n_lanes - 1)]
        alone = expander(
            quads, counts, int32(len(batch_start) - 1), int32(batch),
            whole(points[p, 0]), whole(points[p, 1]), whole(points[p, 2]),
            inverse_square, damping, table, int32(lane), columns, order, int32(first), int32(n_lanes), out,
        )  # fmt: skip
        if lane < n_lanes and alone == float32(0.0):
            cuda.atomic.add(counters, 0, 1)

    return expand
