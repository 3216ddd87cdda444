"""The formulas of the smooth descriptors as LLVM code: vectors of grid points on the CPU, scalars on a CUDA device.

Source code with everything unrolled would take Numba minutes, so the formulas are run on `Value`, whose operations
write instructions. Here is what both targets share: the loops over the atoms of a point, with all sums in registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils, errors

FLAGS = ("contract", "nnan", "ninf", "nsz", "arcp")
"""A multiplication and an addition may become one instruction; the order of the operations stays."""
WORD = 4
"""Bytes of a float32 and of an int32."""

X86 = ("x86_64", "AMD64")
DENSE = types.void(types.uintp, types.int64, types.int64, types.uintp, types.int64, types.uintp)
"""Signature of a network that is called by its address, see `gpurho.kernels.dense_cpu.make_kernel`."""

CONTRACTED, FACTORED = 1, 2
"""How a contraction's matrix is given: as it is, or taken apart by `gpurho.kernels.smooth.contraction_matrix`."""

UNDONE = 0x7FC0DEAD
"""Bits of the float32, not a number, that such a network is to overwrite: it cannot raise an error."""

I32, I64, F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


class Value:
    """A float32, or a vector of them, of LLVM code under construction."""

    flags = FLAGS

    def __init__(self, builder: Any, value: Any) -> None:
        self.builder, self.value = builder, value

    def constant(self, number: float) -> Any:
        """The LLVM constant of this value's type."""
        kind = self.value.type
        return ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number)

    def _operate(self, name: str, left: Any, right: Any) -> Value:
        pair = [x.value if isinstance(x, Value) else self.constant(x) for x in (left, right)]
        return type(self)(self.builder, getattr(self.builder, name)(*pair, flags=self.flags))

    def __add__(self, other: Any) -> Value:
        return self._operate("fadd", self, other)

    def __sub__(self, other: Any) -> Value:
        return self._operate("fsub", self, other)

    def __rsub__(self, other: Any) -> Value:
        return self._operate("fsub", other, self)

    def __mul__(self, other: Any) -> Value:
        return self._operate("fmul", self, other)

    def __rtruediv__(self, other: Any) -> Value:
        return self._operate("fdiv", other, self)

    def square_root(self) -> Value:
        """The square root."""
        kind = self.value.type
        suffix = f"v{kind.count}f32" if isinstance(kind, ir.VectorType) else "f32"
        return self._call(f"llvm.sqrt.{suffix}")

    def inverse_root(self) -> Value:
        """One over the square root."""
        return 1.0 / self.square_root()

    def _call(self, name: str) -> Value:
        kind = self.value.type
        function = cgutils.get_or_insert_function(self.builder.module, ir.FunctionType(kind, [kind]), name)
        return type(self)(self.builder, self.builder.call(function, [self.value], fastmath=self.flags))

    def smaller(self, number: float) -> Value:
        """The smaller of this and a constant."""
        limit = self.constant(number)
        less = self.builder.fcmp_ordered("<", self.value, limit, flags=self.flags)
        return type(self)(self.builder, self.builder.select(less, self.value, limit))


class Sums:
    """Numbers that a loop adds to: LLVM keeps them in registers as far as there are some."""

    def __init__(self, builder: Any, kind: Any, n: int, number: type[Value] = Value) -> None:
        self.builder, self.number = builder, number
        self.slots = [cgutils.alloca_once(builder, kind) for _ in range(n)]
        for slot in self.slots:
            builder.store(zero(kind), slot)

    def add(self, i: int, value: Value) -> None:
        """Add to one of the sums."""
        self.builder.store((self[i] + value).value, self.slots[i])

    def put(self, i: int, value: Value) -> None:
        """Replace one of the sums."""
        self.builder.store(value.value, self.slots[i])

    def __getitem__(self, i: int) -> Value:
        return self.number(self.builder, self.builder.load(self.slots[i]))


def zero(kind: Any) -> Any:
    """The zero of a float32 or of a vector."""
    return ir.Constant(kind, [0.0] * kind.count if isinstance(kind, ir.VectorType) else 0.0)


@contextmanager
def loop(builder: Any, count: Any) -> Iterator[Any]:
    """Code for i = 0 ... count - 1; yields i."""
    with cgutils.for_range(builder, count) as state:
        yield state.index


def pointer(builder: Any, address: Any, offset: Any, kind: Any) -> Any:
    """A pointer `offset` bytes (a number or a value) behind an address."""
    step = ir.Constant(I64, offset) if isinstance(offset, int) else offset
    return builder.inttoptr(builder.add(address, step), kind.as_pointer())


def times(builder: Any, value: Any, factor: int) -> Any:
    """A whole number times a constant."""
    return builder.mul(value, ir.Constant(I64, factor))


def groups(items: Sequence[Any], most: int) -> list[Sequence[Any]]:
    """The items in as few groups of about equal size, at most `most`, as possible."""
    n = -(-len(items) // most) if items else 0
    ends = [len(items) * i // n for i in range(n + 1)] if n else [0]
    return [items[a:b] for a, b in itertools.pairwise(ends)]


def literals(values: Sequence[Any]) -> list[int]:
    """The numbers of an intrinsic's arguments that have to be constants."""
    if not all(isinstance(v, types.IntegerLiteral) for v in values):
        raise errors.RequireLiteralValue("sizes, kinds and flags must be constants")
    return [v.literal_value for v in values]


def align_stack(builder: Any) -> None:
    """Let vectors that do not fit into registers lie on whole cache lines (measured: 1.5 % of the time)."""
    # llvmlite checks the names of attributes, and knows none that are strings.
    set.add(builder.function.attributes, '"stackrealign"')
