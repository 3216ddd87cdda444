"""Sums that do not depend on their order: numbers as whole multiples of 2^-72 in two 64-bit halves.

A float32 of 2^-48 or more is such a multiple itself, so sums of densities are exact; squares and shares are rounded to
2^-73 once for each point. Whole numbers add up to the same bits in whatever order, on whatever device and by however
many workers they are added. A number is ``high * 2^-32 + low * 2^-72`` with ``0 <= low < 2^40``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

HIGH = 32
LOW = 40
LARGEST = 512.0
"""Numbers must be smaller than this in size, so that a float64 holds sums of 4096 halves without rounding."""

AT_ONCE = 4096
BATCH = 1 << 20
"""Numbers whose lower halves may be added in 64 bits before the carry, with much to spare."""


def split(values: Tensor) -> tuple[Tensor, Tensor]:
    """Both halves of float64 numbers below `LARGEST`, as whole numbers in float64; `AT_ONCE` of them add up exactly."""
    scaled = values * float(1 << HIGH)
    high = scaled.floor()
    return high, scaled.sub_(high).mul_(float(1 << LOW)).round_()


def carried(high: Tensor, low: Tensor) -> tuple[Tensor, Tensor]:
    """The same numbers with lower halves below 2^40; float64 in, int64 out."""
    up = (low * 2.0**-LOW).floor()
    return (high + up).long(), (low - up * float(1 << LOW)).long()


def exact_sum(values: Tensor) -> Tensor:
    """The sum of (n,) float64 numbers below `LARGEST`, as the (2,) int64 halves."""
    import torch

    total = torch.zeros(2, dtype=torch.int64, device=values.device)
    for start in range(0, len(values), BATCH):
        high, low = (half.long().sum() for half in split(values[start : start + BATCH]))
        total += torch.stack([high + (low >> LOW), low & ((1 << LOW) - 1)])
    return torch.stack([total[0] + (total[1] >> LOW), total[1] & ((1 << LOW) - 1)])


def carry(halves: NDArray[np.int64]) -> NDArray[np.int64]:
    """Halves (..., 2) with the lower ones brought below 2^40."""
    up = halves[..., 1] >> LOW
    return np.stack([halves[..., 0] + up, halves[..., 1] & ((1 << LOW) - 1)], axis=-1)


def to_float(halves: NDArray[np.int64]) -> NDArray[np.float64]:
    """The numbers of halves (..., 2), rounded to float64."""
    return np.asarray(halves[..., 0] * 2.0**-HIGH + halves[..., 1] * 2.0 ** -(HIGH + LOW))
