"""An ASE calculator on top of an engine: molecular dynamics, relaxations and elastic constants with DFT."""

from __future__ import annotations

from typing import Any

import numpy as np
from ase.calculators.calculator import Calculator, all_changes
from numpy.typing import NDArray

from gpurho.dft.base import DFTSettings, Engine
from gpurho.dft.engines import make_engine
from gpurho.structure import as_structure


class EngineCalculator(Calculator):
    """Energies and forces of an engine; each calculation starts from the density of the one before.

    Parameters
    ----------
    engine : str or Engine
    settings : DFTSettings, optional
        The k-mesh is fixed at the first structure.
    """

    implemented_properties = ["energy", "free_energy", "forces"]  # noqa: RUF012 (as ASE has it)

    def __init__(self, engine: str | Engine = "qe", settings: DFTSettings | None = None, **options: Any) -> None:
        super().__init__()
        self.engine = make_engine(engine, **options) if isinstance(engine, str) else engine
        self.settings = settings or DFTSettings()
        self._last: tuple[tuple[int, ...], NDArray[np.float64]] | None = None

    def calculate(
        self,
        atoms: Any = None,
        properties: Any = ("energy",),
        system_changes: Any = all_changes,
    ) -> None:
        """One ground state."""
        super().calculate(atoms, properties, system_changes)
        structure = as_structure(self.atoms)
        self.settings = self.settings.at(structure)
        numbers = tuple(int(z) for z in structure.numbers)
        start = self._last[1] if self._last is not None and self._last[0] == numbers else None
        label = self.engine.ground_state(structure, self.settings, density=start)
        self._last = (numbers, label.density)
        self.results = {
            "energy": label.energies.energy,
            "free_energy": label.energies.free_energy,
            "forces": label.forces,
        }
