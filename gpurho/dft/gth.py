"""Goedecker-Teter-Hutter pseudopotentials (GTH-PBE): the published parameters and the functions that they define.

Everything here is in Hartree atomic units. References: Goedecker, Teter, Hutter, Phys. Rev. B 54, 1703 (1996);
Hartwigsen, Goedecker, Hutter, Phys. Rev. B 58, 3641 (1998); Krack, Theor. Chem. Acc. 114, 145 (2005).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import eigh
from scipy.special import erf, gamma

from gpurho.errors import UnknownSpeciesError

NAME = "GTH-PBE"


@dataclass(frozen=True)
class Channel:
    """Projectors of one angular momentum `l`: radius `r` (Bohr) and coupling matrix `h` (Hartree)."""

    l: int  # noqa: E741
    r: float
    h: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class GTH:
    """The pseudopotential of one element.

    Attributes
    ----------
    symbol : str
    electrons : tuple of int
        Valence electrons by angular momentum: s, p, d, f.
    r_local : float
        Radius of the local part, Bohr.
    c : tuple of float
        Coefficients of the local polynomial, Hartree.
    channels : tuple of Channel
    """

    symbol: str
    electrons: tuple[int, ...]
    r_local: float
    c: tuple[float, ...]
    channels: tuple[Channel, ...]

    @property
    def valence(self) -> int:
        """Number of valence electrons."""
        return sum(self.electrons)

    def local(self, r: NDArray[np.floating]) -> NDArray[np.floating]:
        """Local potential at distances `r` > 0 (Bohr), Hartree: equation 1 of Hartwigsen et al."""
        x = r / self.r_local
        polynomial = sum(c * x ** (2 * i) for i, c in enumerate(self.c))
        return -self.valence / r * erf(x / np.sqrt(2)) + np.exp(-0.5 * x**2) * polynomial

    def projector(self, channel: Channel, i: int, r: NDArray[np.floating]) -> NDArray[np.floating]:
        """Radial projector `i` (from 0) of a channel, Bohr^(-3/2), of unit norm: equation 3 of Hartwigsen et al."""
        power = channel.l + (4 * (i + 1) - 1) / 2
        norm = np.sqrt(2.0) / (channel.r**power * np.sqrt(gamma(power)))
        return norm * r ** (channel.l + 2 * i) * np.exp(-0.5 * (r / channel.r) ** 2)


@cache
def _table() -> dict[str, GTH]:
    raw = json.loads((files("gpurho.data") / "gth_pbe.json").read_text())
    return {
        symbol: GTH(
            symbol,
            tuple(entry["electrons"]),
            entry["r_local"],
            tuple(entry["c"]),
            tuple(Channel(p["l"], p["r"], tuple(map(tuple, p["h"]))) for p in entry["projectors"]),
        )
        for symbol, entry in raw.items()
    }


def gth(symbol: str) -> GTH:
    """The GTH-PBE pseudopotential of an element; raises `UnknownSpeciesError` where none is published."""
    try:
        return _table()[symbol]
    except KeyError:
        raise UnknownSpeciesError(
            f"no {NAME} pseudopotential for {symbol!r}; the table has {', '.join(_table())}"
        ) from None


def valence_electrons(symbols: Iterable[str]) -> int:
    """Number of valence electrons of a list of atoms."""
    return sum(gth(symbol).valence for symbol in symbols)


# -- the free atom, for starting densities ------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeAtom:
    """Spherical valence density (e/Bohr^3) and orbitals u(r) = r R(r) of a free pseudo-atom, on a radial mesh."""

    r: NDArray[np.floating]
    density: NDArray[np.floating]
    orbitals: tuple[tuple[int, float, NDArray[np.floating]], ...]
    """(l, occupation, u) of each occupied shell."""


@cache
def free_atom(symbol: str, points: int = 1201, step: float = 0.01) -> FreeAtom:
    """The free atom in the local density approximation (exchange and Perdew-Wang correlation left to the SCF code).

    It only starts self-consistency, so Slater exchange scaled by 1.1 stands for exchange and correlation.
    """
    p = gth(symbol)
    r = np.arange(1, points + 1) * step
    weight = np.full(points, step)
    exponents = np.geomspace(0.03, 20.0, 18)
    density = p.valence * np.exp(-r) / (8 * np.pi)
    shells = [(ell, n) for ell, n in enumerate(p.electrons) if n > 0]
    bases = {}
    for l, _ in shells:  # noqa: E741
        u = r[None] ** (l + 1) * np.exp(-exponents[:, None] * r**2)
        du = ((l + 1) / r - 2 * exponents[:, None] * r) * u
        scale = 1 / np.sqrt((u * u) @ weight)
        u, du = u * scale[:, None], du * scale[:, None]
        fixed = 0.5 * (du * weight) @ du.T + 0.5 * l * (l + 1) * (u * (weight / r**2)) @ u.T
        for channel in p.channels:
            if channel.l == l:
                overlap = np.array(
                    [(u * p.projector(channel, i, r) * r) @ weight for i in range(len(channel.h))]
                ).reshape(len(channel.h), -1)
                fixed += overlap.T @ np.array(channel.h) @ overlap
        value, vector = eigh((u * weight) @ u.T)
        keep = value > 1e-8
        bases[l] = (u, fixed, vector[:, keep] / np.sqrt(value[keep]))
    orbitals: list[tuple[int, float, NDArray[np.floating]]] = []
    for _ in range(200):
        charge = 4 * np.pi * np.cumsum(density * r**2 * weight)
        outer = 4 * np.pi * (density * r * weight)[::-1].cumsum()[::-1]
        potential = p.local(r) + charge / r + outer - 1.1 * (3 * density / np.pi) ** (1 / 3)
        new, orbitals = np.zeros(points), []
        for l, n in shells:  # noqa: E741
            u, fixed, transform = bases[l]
            h = transform.T @ (fixed + (u * (weight * potential)) @ u.T) @ transform
            left = float(n)
            for state in eigh(h)[1].T:
                occupation = min(left, 2.0 * (2 * l + 1))
                orbital = u.T @ (transform @ state)
                orbitals.append((l, occupation, orbital * np.sign(orbital[np.argmax(np.abs(orbital))])))
                new += occupation * orbital**2 / (4 * np.pi * r**2)
                left -= occupation
                if left <= 0:
                    break
        change = float(4 * np.pi * np.sum(np.abs(new - density) * r**2 * weight))
        density = 0.7 * density + 0.3 * new
        if change < 1e-5:
            break
    density *= p.valence / float(4 * np.pi * np.sum(density * r**2 * weight))
    return FreeAtom(r, np.asarray(density, np.float64), tuple(orbitals))
