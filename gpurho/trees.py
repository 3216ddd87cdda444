"""Nearest points by SciPy's trees in several threads, none of which may fail unnoticed."""

from __future__ import annotations

from typing import Any

import numpy as np

FEW = 20_000
"""Points for which threads are not worth it: an interrupt takes SciPy's threads their arrays from under their feet."""


def nearest(tree: Any, points: Any, k: Any, **options: Any) -> tuple[Any, Any]:
    """Distances and indices as of ``cKDTree.query``, for many points with all cores; each must have a neighbour at all.

    Raises
    ------
    MemoryError
        Where a thread got no memory. SciPy prints its traceback and gives back what it had, infinite distances.
    """
    distances, index = tree.query(points, k=k, workers=-1 if len(points) > FEW else 1, **options)
    if np.isinf(distances if np.ndim(distances) == 1 else distances[:, 0]).any():
        raise MemoryError("the search for neighbours ended early")
    return distances, index


__all__ = ["nearest"]
