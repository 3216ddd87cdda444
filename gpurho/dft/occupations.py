"""Fermi-Dirac occupations of given eigenvalues."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import entr, expit

from gpurho.errors import EngineError


def fermi_level(
    eigenvalues: NDArray[np.float64], weights: NDArray[np.float64], electrons: float, width: float
) -> float:
    """Fermi level of (n_kpoints, n_bands) doubly occupied bands; `weights` sum to 1, `width` is kT in the same unit.

    Raises
    ------
    EngineError
        Where there are too few bands.
    """
    if 2 * eigenvalues.shape[1] <= electrons:
        raise EngineError(f"{eigenvalues.shape[1]} bands cannot hold {electrons:g} electrons with a tail; ask for more")

    def surplus(level: float) -> float:
        return float(2 * weights @ expit((level - eigenvalues) / width).sum(axis=1) - electrons)

    return float(brentq(surplus, eigenvalues.min() - 50 * width, eigenvalues.max() + 50 * width, xtol=1e-13))


def band_terms(
    eigenvalues: NDArray[np.float64], weights: NDArray[np.float64], level: float, width: float
) -> tuple[float, float]:
    """Sum of occupied eigenvalues, and -TS, both in the unit of the eigenvalues."""
    f = expit((level - eigenvalues) / width)
    band = 2 * weights @ (f * eigenvalues).sum(axis=1)
    entropy = 2 * weights @ (entr(f) + entr(1 - f)).sum(axis=1)
    return float(band), float(-width * entropy)
