"""What tests of `predict(keep=...)` keep, and block means by the book."""

from __future__ import annotations

import numpy as np

ALL = ["coarse:2x3x2", "slice:z=0.5", "slice:x=0.3", "slice:y=0.97", "atoms", "histogram"]
GRID = (20, 18, 16)
SHAPE = {"grid": GRID, "tile_shape": (8, 6, 8)}


def coarse_oracle(field: np.ndarray, factors: tuple[int, int, int], root: bool) -> np.ndarray:
    a, b, c = factors
    nx, ny, nz = field.shape
    values = field.astype(np.float64) ** (2 if root else 1)
    means = values.reshape(nx // a, a, ny // b, b, nz // c, c).mean((1, 3, 5))
    return np.sqrt(means) if root else means
