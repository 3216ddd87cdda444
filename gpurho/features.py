"""Descriptors of some points, as they come."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Features:
    """Descriptors of some points.

    Parameters
    ----------
    values : (n_points, n_features) float32
        A NumPy array on the CPU, a torch tensor on a CUDA device; None where they have not been kept.
    n_capped : int
        Points that have fewer atoms of some species within the cutoff than `n_distances`; of the smooth family,
        points that have no atom there.
    n_tied : int
        Points where the tie rule decided the order of equally distant atoms.
    n_exact : int
        Points that took the exact path of the kernels.
    """

    values: Any
    n_capped: int
    n_tied: int
    n_exact: int


@dataclass(frozen=True)
class StartedFeatures:
    """Descriptors of some points that a device may still be at work on.

    Parameters
    ----------
    values : (n_points, n_features) float32
        As those of `Features`, or None; work on the same CUDA stream may follow.
    marks : (n,) int32 CUDA tensor, or None
        For `settle`, once it is on the host; None where nothing is left to be known.
    """

    values: Any
    marks: Any
    _settle: Callable[[Any], Features | None]

    def settle(self, marks: Any = None) -> Features | None:
        """The descriptors with their counts; None where the device had too little room, and all has to be done again.

        `marks` are those of the device, on the host.
        """
        return self._settle(marks)
