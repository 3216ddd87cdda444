"""The formulas of the smooth descriptors, once, for any kind of number.

They use ``+``, ``-``, ``*`` and the functions `square_root`, `inverse_root` and `smaller` only.
`gpurho.kernels._smooth_emit` runs them on values of LLVM, a vector of grid points on the CPU or a scalar on a CUDA
device, and so compiles them for both; on floats they run as they stand, as in Numba's CUDA simulator.

With d the vector from the point to an atom, r its length and rc the cutoff: R_n(r) = T_n(2 r / rc - 1) f(r), with
Chebyshev's T_n and the envelope f(r) = (1 + cos(pi r / rc)) / 2; and the real solid harmonics of the damped direction
d / sqrt(r^2 + `DAMPING`^2), whose sum of squares over m is its length to the power 2 l.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

Number: TypeAlias = Any

DAMPING = 1.0
"""Length (angstrom) below which the direction to an atom fades out, so that the features are smooth at the nuclei."""

UNIT = 2.0**-24
"""Of whole-number coordinates, angstrom. They wrap around at 2^32 units; differences below 128 angstrom survive."""

ENVELOPE = (
    0.9999999991138825, -0.46740103628085444, 0.09455311296259773,
    -0.011119339929582556, 0.0008600616134097623, -4.252328299841977e-05,
)  # fmt: skip
"""Coefficients, in powers of u, of cos(pi sqrt(u) / 2)^2 / (1 - u)^2 to 1e-9 on [0, 1]."""


def square_root(x: Number) -> Number:
    """The square root."""
    return x.square_root() if hasattr(x, "square_root") else math.sqrt(x)


def inverse_root(x: Number) -> Number:
    """One over the square root."""
    return x.inverse_root() if hasattr(x, "inverse_root") else 1.0 / math.sqrt(x)


def smaller(x: Number, y: float) -> Number:
    """The smaller of a number and a constant."""
    return x.smaller(y) if hasattr(x, "smaller") else min(x, y)


def envelope(u: Number) -> Number:
    """f as a function of u = (r / rc)^2 in [0, 1]; 0 at 1, as is its derivative."""
    rest = 1.0 - u
    value = u * ENVELOPE[-1] + ENVELOPE[-2]
    for coefficient in ENVELOPE[-3::-1]:
        value = value * u + coefficient
    return rest * rest * value


def radial_functions(u: Number, n: int) -> list[Number]:
    """R_0 to R_(n-1) of u = (r / rc)^2; beyond the cutoff all are 0."""
    u = smaller(u, 1.0)
    # T_n = 2 T_k T_(n-k) - T_(n-2k): steps of k = 4 make a chain of operations a quarter as long as those of 1.
    doubled = {1: square_root(u) * 4.0 - 2.0}
    for k in (1, 2):
        doubled[2 * k] = doubled[k] * doubled[k] - 2.0
    values = [envelope(u)]
    values.append(values[0] * doubled[1] * 0.5)
    while len(values) < n:
        m = len(values)
        k = 1 if m < 3 else 2 if m < 6 else 4
        values.append(doubled[k] * values[m - k] - values[abs(m - 2 * k)])
    return values[:n]


def direction(dx: Number, dy: Number, dz: Number, square: Number, damping: Number) -> tuple[Number, ...]:
    """The damped direction and its squared length; `damping` is the square of `DAMPING` in the unit of `square`."""
    scale = inverse_root(square + damping)
    return dx * scale, dy * scale, dz * scale, square * (scale * scale)


Harmonic: TypeAlias = tuple[int, int, int]
"""A column of the projections: degree l, order m, and 0 for the part with cos(m phi), 1 for that with sin(m phi)."""


def columns(l_max: int) -> list[Harmonic]:
    """The harmonics of degrees 1 to `l_max`, those that share factors side by side."""
    return [
        (degree, m, part)
        for m in range(l_max + 1)
        for degree in range(max(1, m), l_max + 1)
        for part in range(2 if m else 1)
    ]


def harmonics(x: Number, y: Number, z: Number, square: Number, wanted: list[Harmonic]) -> list[Number]:
    """Solid harmonics of (x, y, z), each up to the factor `norm`; `square` is x^2 + y^2 + z^2."""
    powers: dict[tuple[int, int], Number] = {(1, 0): x, (1, 1): y}
    rests: dict[tuple[int, int], Number] = {}

    def power(m: int, part: int) -> Number:
        """A part of (x + i y)^m."""
        if (m, part) not in powers:
            n = m - 1 if m % 2 else m // 2
            cosine, sine = power(n, 0), power(n, 1)
            if m % 2:
                powers[m, part] = x * sine + y * cosine if part else x * cosine - y * sine
            else:
                powers[m, part] = cosine * sine * 2.0 if part else cosine * cosine - sine * sine
        return powers[m, part]

    def rest(degree: int, m: int) -> Number:
        """The other factor, a polynomial of z and the square, for degree > m."""
        if (degree, m) not in rests:
            if degree == m + 1:
                rests[degree, m] = z
            else:
                factor = (degree + m - 1) * (degree - m - 1) / ((2 * degree - 1) * (2 * degree - 3))
                before = square * factor
                rests[degree, m] = (
                    z * z - before if degree == m + 2 else z * rest(degree - 1, m) - before * rest(degree - 2, m)
                )
        return rests[degree, m]

    def value(degree: int, m: int, part: int) -> Number:
        if degree == m:
            return power(m, part)
        return rest(degree, m) * power(m, part) if m else rest(degree, m)

    return [value(*key) for key in wanted]


def norm(degree: int, m: int) -> float:
    """What a value of `harmonics` is to be multiplied by for the sum of squares of its degree to be 1."""
    leading = math.prod((2 * k - 1) / (k - m) for k in range(m + 1, degree + 1)) * math.prod(range(1, 2 * m, 2))
    return leading * math.sqrt((2 if m else 1) * math.factorial(degree - m) / math.factorial(degree + m))


def place(degree: int, m: int, part: int) -> int:
    """Where a harmonic stands among all, degree by degree."""
    return degree * degree - 1 + (2 * m - 1 + part if m else 0)
