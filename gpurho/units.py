"""Units: public API and files in angstrom, eV and e/angstrom^3; DFT and paper comparisons in atomic units.

Values of CODATA 2018, as in the design of the library.
"""

from __future__ import annotations

BOHR = 0.529177210903
"""One Bohr in angstrom."""

HARTREE = 27.211386245988
"""One Hartree in eV."""

PER_BOHR3 = 1.0 / BOHR**3
"""One e/Bohr^3 in e/angstrom^3."""

PER_ANGSTROM3 = BOHR**3
"""One e/angstrom^3 in e/Bohr^3."""
