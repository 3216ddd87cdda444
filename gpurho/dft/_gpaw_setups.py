"""GTH-PBE pseudopotentials in the form that GPAW takes a setup: from our own table, for any element in it.

GPAW's PseudoPotential splits the local part into the field of a Gaussian charge (`rcgauss`), which it adds to the
electrons' in the Poisson equation, and a short-ranged rest (``vbar``). Everything is in Hartree atomic units.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gpurho.dft.gth import Channel, free_atom, gth

REACH = 9.0
"""Radial functions exp(-x^2 / 2) end at this x, where they are 3e-18."""

POINTS = 1001
"""Points of a radial function, evenly spaced."""

BASIS_REACH = 6.0
"""Radius of the atomic orbitals that start the wave functions, Bohr; they end smoothly."""


def _spread(l: int, r_max: float, values: NDArray[np.floating]) -> Any:  # noqa: E741
    """A GPAW spline of f(r) / r^l through values at evenly spaced radii from 0 to `r_max`."""
    from gpaw.spline import Spline

    return Spline.from_data(l, r_max, values)


class GTHSetupData:
    """What GPAW asks of the data of a norm-conserving pseudopotential; see `gpaw.pseudopotential.PseudoPotential`.

    Parameters
    ----------
    symbol : str
        An element of `gpurho.dft.gth`; raises `UnknownSpeciesError` for any other.
    """

    name = "PBE"

    def __init__(self, symbol: str) -> None:
        from ase.data import atomic_numbers
        from gpaw.atom.radialgd import EquidistantRadialGridDescriptor

        self.gth = gth(symbol)
        self.symbol = symbol
        self.Z = atomic_numbers[symbol]
        self.Nv = self.gth.valence
        self.Nc = self.Z - self.Nv
        # GPAW wants at least one projector: one without coupling where an element has none.
        self.channels = [c for c in self.gth.channels if c.h] or [Channel(0, self.gth.r_local, ((0.0,),))]
        self.projectors = [(c, i) for c in self.channels for i in range(len(c.h))]
        self.l_j = [c.l for c, _ in self.projectors]
        self.n_j = [i + 1 for _, i in self.projectors]
        self.l_orb_J = self.l_j
        # The starting density comes from elsewhere, so that no occupations have to match the projectors.
        self.f_j = [0] * len(self.projectors)
        self.r_max = REACH * max(c.r for c in self.channels)
        self.rcut_j = [self.r_max] * len(self.projectors)
        self.rgd = EquidistantRadialGridDescriptor(self.r_max / (POINTS - 1), POINTS)
        self.rcgauss = float(np.sqrt(2.0) * self.gth.r_local)
        self.Delta0 = -self.Nv / np.sqrt(4.0 * np.pi)
        # Energy of the Gaussian charge in its own field, which GPAW takes off again.
        self.Eh_compcharge = self.Nv**2 / (self.rcgauss * np.sqrt(2.0 * np.pi))

    def get_projectors(self) -> list[Any]:
        """A spline for each projector."""
        r = np.linspace(0.0, self.r_max, POINTS)
        r[0] = 1e-10
        return [_spread(c.l, self.r_max, self.gth.projector(c, i, r) / r**c.l) for c, i in self.projectors]

    def get_local_potential(self) -> Any:
        """The short-ranged local part, in GPAW's normalisation: coefficient of Y_00."""
        x = np.linspace(0.0, REACH, POINTS)
        polynomial = np.zeros(POINTS)
        for i, c in enumerate(self.gth.c):
            polynomial += c * x ** (2 * i)
        values = np.sqrt(4.0 * np.pi) * np.exp(-0.5 * x**2) * polynomial
        return _spread(0, REACH * self.gth.r_local, values)

    def get_compensation_charge_functions(self) -> tuple[NDArray[np.floating], list[int], list[NDArray[np.floating]]]:
        """The Gaussian charge: radii, l, and values for a charge of sqrt(4 pi)."""
        r = np.linspace(0.0, REACH / np.sqrt(2.0) * self.rcgauss, POINTS)
        g = 4.0 / np.sqrt(np.pi) / self.rcgauss**3 * np.exp(-((r / self.rcgauss) ** 2))
        return r, [0], [g]

    def expand_hamiltonian_matrix(self) -> NDArray[np.floating]:
        """Couplings of all projectors and their m, packed."""
        from gpaw.utilities import pack_hermitian

        sizes = [2 * c.l + 1 for c, _ in self.projectors]
        start = np.concatenate([[0], np.cumsum(sizes)])
        matrix = np.zeros((start[-1], start[-1]))
        for a, (first, i) in enumerate(self.projectors):
            for b, (second, j) in enumerate(self.projectors):
                if first is second:
                    matrix[start[a] : start[a + 1], start[b] : start[b + 1]] = first.h[i][j] * np.eye(sizes[a])
        return pack_hermitian(matrix)

    def create_basis_functions(self) -> Any:
        """Orbitals of the free atom, cut off smoothly, from which the wave functions start."""
        from gpaw.atom.radialgd import EquidistantRadialGridDescriptor
        from gpaw.basis_data import Basis, BasisFunction

        atom = free_atom(self.symbol)
        rgd = EquidistantRadialGridDescriptor(0.02, int(BASIS_REACH / 0.02) + 1)
        r = np.maximum(rgd.r_g, 1e-4)
        taper = np.cos(0.5 * np.pi * r / BASIS_REACH) ** 2
        functions = []
        for n, (l, _, u) in enumerate(atom.orbitals):  # noqa: E741
            radial = np.interp(r, atom.r, u / atom.r) * taper
            radial /= np.sqrt(rgd.integrate(radial**2) / (4.0 * np.pi))
            functions.append(BasisFunction(n + 1, l, rgd.r_g[-1], radial, "atomic"))
        return Basis(self.symbol, "atomic", rgd=rgd, bf_j=functions)

    def print_info(self, text: Any, _setup: Any = None) -> None:
        """One line for GPAW's log."""
        text(f"{self.symbol}: GTH-PBE pseudopotential, {self.Nv} valence electrons, {len(self.projectors)} projectors")

    def build(self, xcfunc: Any, lmax: int, basis: Any, filter: Any = None) -> Any:
        """The setup itself; called by GPAW."""
        import hashlib

        from gpaw.pseudopotential import PseudoPotential

        setup: Any = PseudoPotential(self, basis or self.create_basis_functions())
        setup.fingerprint = hashlib.sha256(repr(self.gth).encode()).hexdigest()
        return setup


@cache
def gth_setup(symbol: str) -> GTHSetupData:
    """The setup data of an element."""
    return GTHSetupData(symbol)
