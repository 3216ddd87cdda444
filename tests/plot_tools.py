"""Densities in closed form, and what of a picture tests look at."""

from __future__ import annotations

import numpy as np
from matplotlib.collections import EllipseCollection, QuadMesh
from predict_tools import TRICLINIC, triclinic_structure, wave

from gpurho.density import Density
from gpurho.grid import Grid

SHAPE = (14, 16, 18)


def wave_at(points):
    """`predict_tools.wave` at any points of the triclinic cell, float64."""
    x, y, z = np.moveaxis(2 * np.pi * (points @ np.linalg.inv(TRICLINIC)), -1, 0)
    return 0.3 + 0.1 * np.cos(x) + 0.05 * np.sin(2 * y) + 0.02 * np.cos(3 * z + 0.4) + 0.03 * np.sin(x + y - z)


def make(shape=SHAPE, change=1.0):
    structure = triclinic_structure()
    grid = Grid(shape, TRICLINIC)
    mean = wave(grid, structure).astype(np.float32)
    return Density(grid, structure, mean * np.float32(change), 0.01 * mean, 0.005 * mean[::-1])


def meshes(figure):
    """Values, corners' coordinates and scale of each map."""
    found = []
    for axes in figure.axes:
        for item in axes.collections:
            # Scales are drawn as meshes, too, without numbers in rows and columns.
            if isinstance(item, QuadMesh) and axes.get_aspect() == 1:
                found.append(item)
    return found


def drawn(mesh):
    return np.ma.filled(mesh.get_array().astype(float), np.nan)


def labels(figure):
    return [
        t
        for axes in figure.axes
        for t in (axes.get_xlabel(), axes.get_ylabel())
        if t and "along" not in t and "across" not in t and "distance" not in t
    ]


def atoms_drawn(axes):
    return np.concatenate(
        [np.asarray(c.get_offsets()) for c in axes.collections if isinstance(c, EllipseCollection)]
        or [np.empty((0, 2))]
    )
