"""Fields on periodic grids, through their Fourier coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.gth import free_atom
from gpurho.errors import GridError
from gpurho.structure import Structure
from gpurho.units import BOHR, PER_BOHR3


def fourier_resample(values: NDArray[np.floating], shape: Sequence[int]) -> NDArray[np.float64]:
    """A periodic field on another grid of the same cell: the trigonometric polynomial through its points.

    Parameters
    ----------
    values : (nx, ny, nz) array
    shape : 3 ints

    Returns
    -------
    (mx, my, mz) float64 array
        Its mean, and so its integral, is that of `values`. Waves that the new grid cannot hold are left out; of the
        highest wave of an even grid, which has no sign, half goes to each sign, so that the result stays real.
    """
    field = np.asarray(values, dtype=np.float64)
    new = tuple(int(n) for n in shape)
    if field.ndim != 3 or len(new) != 3 or min(new) < 1:
        raise GridError(f"field of shape {field.shape} cannot go to a grid of shape {shape}; both have three axes")
    for axis, n in enumerate(new):
        old = field.shape[axis]
        if n == old:
            continue
        waves = np.fft.rfft(field, axis=axis)
        keep = min(old, n) // 2 + 1
        kept = np.zeros((*field.shape[:axis], n // 2 + 1, *field.shape[axis + 1 :]), dtype=complex)
        part = [slice(None)] * 3
        part[axis] = slice(0, keep)
        kept[tuple(part)] = waves[tuple(part)]
        if min(old, n) % 2 == 0:
            part[axis] = slice(keep - 1, keep)
            edge = kept[tuple(part)]
            # One coefficient stands for both signs on the smaller grid and for one of two on the larger.
            kept[tuple(part)] = 0.5 * edge if n > old else 2.0 * np.real(edge)
        field = np.fft.irfft(kept, n, axis=axis) * (n / old)
    return np.ascontiguousarray(field)


def atomic_superposition(structure: Structure, shape: Sequence[int]) -> NDArray[np.float64]:
    """Sum of the free atoms' valence densities on the grid of a periodic cell, e/angstrom^3; not negative.

    Self-consistency starts from it. It integrates to the number of valence electrons.
    """
    from ase.data import chemical_symbols

    n = [int(m) for m in shape]
    fractional = structure.positions @ np.linalg.inv(structure.cell)
    reciprocal = 2.0 * np.pi * np.linalg.inv(structure.cell).T * BOHR
    indices = [np.fft.fftfreq(n[0], 1 / n[0]), np.fft.fftfreq(n[1], 1 / n[1]), np.arange(n[2] // 2 + 1.0)]
    total = np.zeros((n[0], n[1], n[2] // 2 + 1), dtype=complex)
    length = np.zeros(total.shape)
    for d in range(3):
        step = sum(
            index.reshape([-1 if a == e else 1 for e in range(3)]) * reciprocal[a, d] for a, index in enumerate(indices)
        )
        length += step**2
    np.sqrt(length, out=length)
    electrons = 0.0
    for z in np.unique(structure.numbers):
        atom = free_atom(chemical_symbols[z])
        weights = 4.0 * np.pi * atom.density * atom.r**2 * (atom.r[1] - atom.r[0])
        q = np.linspace(0.0, float(length.max()) + 1e-9, 2000)
        form = np.array([weights @ np.sinc(k * atom.r / np.pi) for k in q])
        where = fractional[structure.numbers == z]
        electrons += len(where) * float(form[0])
        phases = [np.exp(-2j * np.pi * np.outer(index, where[:, a])) for a, index in enumerate(indices)]
        factor = np.einsum("ia,ja,ka->ijk", *phases, optimize=True)
        total += factor * np.interp(length, q, form)
    volume = structure.volume / BOHR**3
    density = np.fft.irfftn(total, n, axes=(0, 1, 2)) * (np.prod(n) / volume)
    np.maximum(density, 0.0, out=density)
    return density * (electrons / (density.mean() * volume) * PER_BOHR3)
