"""Short vectors for a cell: the same lattice, whatever shear its cell is given with."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

MAX_STEPS = 1000
"""Far more steps than any cell takes; a frame not fully reduced is still right, only slower to search."""


def transformed(rows: NDArray[np.float64], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """``rows @ matrix`` for (n, 3) and (3, 3), where a row's bits do not depend on the rows that come with it.

    Matrix products of a library may take another path for another number of rows. A worker that has a part of the
    atoms must find the same bits as one that has them all.
    """
    return rows[:, :1] * matrix[0] + rows[:, 1:2] * matrix[1] + rows[:, 2:] * matrix[2]


def reduced_frame(cell: NDArray[np.float64], pbc: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Three vectors whose periodic ones are short and span the same lattice as the cell's.

    Parameters
    ----------
    cell : (3, 3) float64, angstrom
        Linearly independent rows.
    pbc : (3,) bool
        Which rows are periods.

    Returns
    -------
    frame : (3, 3) float64, angstrom
        Row i is a period where ``pbc[i]``; the other rows are unit vectors at right angles to all else.
    combination : (3, 3) int64
        ``frame[i] = combination[i] @ cell`` for periodic i; determinant +-1 among them, zero elsewhere.
    """
    combination = np.diag(pbc.astype(np.int64))
    frame = np.array(cell, dtype=np.float64)
    axes = [int(axis) for axis in np.flatnonzero(pbc)]
    for _ in range(MAX_STEPS if len(axes) > 1 else 0):
        # The longest first: what it loses can make the others reducible, not the reverse.
        for axis in sorted(axes, key=lambda row: -float(frame[row] @ frame[row])):
            others = [row for row in axes if row != axis]
            shorter = _shortened(frame[axis], frame[others])
            if shorter is not None:
                combination[axis] += shorter @ combination[others]
                frame[axis] = combination[axis] @ cell
                break
        else:
            break
    free = np.flatnonzero(~np.asarray(pbc))
    if len(free):
        _, _, directions = np.linalg.svd(frame[axes].reshape(-1, 3), full_matrices=True)
        frame[free] = directions[len(axes) :]
    return frame, combination


def _shortened(vector: NDArray[np.float64], others: NDArray[np.float64]) -> NDArray[np.int64] | None:
    """The multiples of `others` that make `vector` shorter when added; None where none does."""
    centre = -np.linalg.lstsq(others.T, vector, rcond=None)[0]
    best, best_square = None, float(vector @ vector) * (1.0 - 1.0e-9)
    for step in np.ndindex(*(2,) * len(others)):
        corner = np.floor(centre) + step
        candidate = vector + corner @ others
        square = float(candidate @ candidate)
        if square < best_square:
            best, best_square = corner.astype(np.int64), square
    return best
