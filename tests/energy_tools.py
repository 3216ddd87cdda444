"""Engines in the place of DFT for energies of densities and equations of state, and their commands."""

from __future__ import annotations

import argparse
from dataclasses import replace

import numpy as np
from ase.calculators.emt import EMT

from gpurho.dft.base import Energies, Label
from gpurho.dft.grids import atomic_superposition
from gpurho.pipelines import energy as pipeline

SHAPE = (8, 9, 10)


class ToyEngine:
    """A quadratic functional of the density with a known minimum, in the place of DFT."""

    name = "toy"

    def __init__(self):
        self.calls = []

    def exact(self, structure, shape):
        return atomic_superposition(structure, shape)

    def energies(self, structure, error, given):
        n = len(structure)
        eigenvalues = np.array([[-8.0, 1.0, 9.0], [-7.5, 2.0, 8.0]]) + 100 * error
        return Energies(
            free_energy=-50.0 * n + 1000.0 * n * error**2,
            energy=-49.9 * n + 1000.0 * n * error**2,
            xc=-20.0 * n + 30.0 * n * error,
            entropy_term=-0.2 * n,
            band=None,
            fermi_level=5.0 + 100 * error,
            eigenvalues=eigenvalues,
            kpoints=np.array([[0.0, 0, 0], [0.5, 0, 0]]),
            weights=np.array([0.25, 0.75]),
            n_atoms=n,
            electrons=3.0 * n,
            electrons_given=given,
        )

    def one_shot(self, structure, density, settings):
        self.calls.append("one_shot")
        given = float(density.mean()) * structure.volume
        exact = self.exact(structure, density.shape)
        error = np.abs(density * (3.0 * len(structure) / given) - exact).mean() / exact.mean()
        return self.energies(structure, error, given)

    def ground_state(self, structure, settings, density=None):
        self.calls.append("scf" if density is None else "scf from density")
        found = self.energies(structure, 0.0, 3.0 * len(structure))
        exact = self.exact(structure, SHAPE)
        return Label(structure, exact, found, None, 3.0 * len(structure), settings, "toy 1", 3, 0.1)


class EmtEngine(ToyEngine):
    """Energies of ASE's effective medium theory, the same for every density."""

    name = "emt"

    def energies(self, structure, error, given):
        atoms = structure.to_ase()
        atoms.calc = EMT()
        e = atoms.get_potential_energy()
        return replace(super().energies(structure, 0.0, given), free_energy=e, energy=e)


def command(*words):
    """Run a command as the command line does."""
    parser = argparse.ArgumentParser()
    pipeline.add_parser(parser.add_subparsers(required=True))
    options = parser.parse_args([str(word) for word in words])
    options.run(options)
