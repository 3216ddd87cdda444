"""An engine without physics, for tests of what surrounds one: Gaussian densities, a log of calls, faults on demand."""

from __future__ import annotations

import os
import time

import numpy as np

from gpurho.dft.base import Energies, Label, check_structure
from gpurho.errors import ConvergenceError


class ToyEngine:
    """Appends the name of each structure (its first x coordinate) to `log` when it starts and when it ends."""

    name = "toy"

    def __init__(self, log="", seconds=0.0, faults=""):
        self.log, self.seconds, self.faults = log, seconds, faults

    def _note(self, text):
        if self.log:
            handle = os.open(self.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
            os.write(handle, f"{text}\n".encode())
            os.close(handle)

    def ground_state(self, structure, settings, density=None):
        electrons = check_structure(structure)
        settings = settings.at(structure)
        name = f"{structure.positions[0, 0]:.3f}"
        self._note(f"start {name}")
        if density is not None:
            np.save(f"{self.log}.{name}.npy", density)
        time.sleep(self.seconds)
        for fault in self.faults.split(","):
            if fault == f"scf:{name}":
                raise ConvergenceError(f"no self-consistency in {settings.max_iterations} steps")
            if fault == f"die:{name}":
                os._exit(9)
        axes = [np.arange(n) / n for n in settings.grid]
        mesh = np.stack(np.meshgrid(*axes, indexing="ij"), -1)
        values = np.zeros(settings.grid)
        for r in structure.positions @ np.linalg.inv(structure.cell):
            d = (mesh - r + 0.5) % 1 - 0.5
            values += np.exp(-((d @ structure.cell) ** 2).sum(-1))
        values *= electrons / (values.mean() * structure.volume)
        points, weights = settings.kmesh.points()
        energies = Energies(
            -1.0,
            -1.0,
            -0.5,
            0.0,
            None,
            0.0,
            np.zeros((len(points), 4)),
            points,
            weights,
            len(structure),
            electrons,
            electrons,
        )
        self._note(f"end {name}")
        return Label(structure, values, energies, np.zeros((len(structure), 3)), electrons, settings, "toy 1", 3, 0.1)


class SlowToy(ToyEngine):
    """Takes its time."""

    def __init__(self):
        super().__init__(seconds=0.3)
