"""Equations of state: lattice parameter and bulk modulus from energies at several volumes."""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gpurho.errors import SettingsError

FORMS = ("birchmurnaghan", "vinet", "murnaghan", "pouriertarantola", "sj")
"""Forms of the curve, by their names in ASE."""

GPA = 160.21766340
"""One eV/angstrom^3 in GPa."""


@dataclass(frozen=True, eq=False)
class EquationOfState:
    """A fitted curve.

    Attributes
    ----------
    volumes, energies : (n,) arrays, angstrom^3 and eV per atom
        The points, in order of volume.
    form : str
    volume : float, angstrom^3 per atom
        At the minimum.
    energy : float, eV per atom
    bulk_modulus : float, GPa
    residual : float, eV per atom
        Root mean square distance of the points from the curve.
    """

    volumes: NDArray[np.float64]
    energies: NDArray[np.float64]
    form: str
    volume: float
    energy: float
    bulk_modulus: float
    residual: float

    def lattice_parameter(self, atoms_per_cell: int = 4) -> float:
        """Edge of a cubic cell of that many atoms, angstrom: 4 for fcc, 2 for bcc, 8 for diamond."""
        return float(np.cbrt(self.volume * atoms_per_cell))

    def to_dict(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in asdict(self).items()}


def fit_eos(volumes: ArrayLike, energies: ArrayLike, form: str = "birchmurnaghan") -> EquationOfState:
    """Fit an equation of state by ASE.

    Parameters
    ----------
    volumes, energies : (n,) arrays, angstrom^3 and eV, both per atom
        Four or more; the minimum must lie between the smallest and the largest volume.
    form : str
        One of `FORMS`; "birchmurnaghan" (F. Birch, Phys. Rev. 71, 809 (1947)) by default, "sj" for the inverse
        polynomial of Alchagirov et al., Phys. Rev. B 67, 026103 (2003).

    Raises
    ------
    SettingsError
        For too few points, values that are not finite, or no minimum between them.
    """
    from ase.eos import EquationOfState as Curve
    from scipy.optimize import OptimizeWarning

    v, e = np.asarray(volumes, dtype=np.float64).reshape(-1), np.asarray(energies, dtype=np.float64).reshape(-1)
    if form not in FORMS:
        raise SettingsError(f"form {form!r} is not known; give {', '.join(map(repr, FORMS))}")
    if v.shape != e.shape or len(np.unique(v)) < 4:
        raise SettingsError(f"{len(np.unique(v))} volumes and {len(e)} energies; give four different volumes or more")
    if not (np.isfinite(v).all() and np.isfinite(e).all() and (v > 0).all()):
        raise SettingsError("volumes must be positive, volumes and energies finite; check the calculations")
    order = np.argsort(v)
    v, e = v[order], e[order]
    lowest = int(np.argmin(e))
    if lowest in (0, len(v) - 1):
        side = "smaller" if lowest == 0 else "larger"
        raise SettingsError(
            f"the energy is lowest at the {'first' if lowest == 0 else 'last'} volume, {v[lowest]:.4g} angstrom^3 per"
            f" atom: the minimum is not between the points; add {side} ones"
        )
    # Energies from their lowest: a fit to thousands of eV would lose the digits that matter.
    shifted = e - e[lowest]
    curve = Curve(v, shifted, eos=form)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            warnings.simplefilter("ignore", OptimizeWarning)  # four points leave the fit no error to estimate
            v0, e0, b = curve.fit(warn=False)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise SettingsError(f"the points fit no {form} curve ({error}); give points nearer to the minimum") from None
    fitted = np.poly1d(curve.fit0)(v ** -(1 / 3)) if form == "sj" else np.asarray(curve.func(v, *curve.eos_parameters))
    if not (np.isfinite([v0, e0, b]).all() and v[0] < v0 < v[-1] and b > 0):
        raise SettingsError(f"the {form} curve through the points has no minimum between them; check the energies")
    residual = float(np.sqrt(np.mean((fitted - shifted) ** 2)))
    return EquationOfState(v, e, form, float(v0), float(e0) + float(e[lowest]), float(b) * GPA, residual)
