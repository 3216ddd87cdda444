"""k-meshes and settings against their definitions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from ase.build import bulk

from gpurho.dft.base import DFTSettings, KMesh, check_density, good_size
from gpurho.errors import SettingsError, StructureError
from gpurho.structure import Structure


@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (3, 3, 3), (2, 3, 1)])
@pytest.mark.parametrize("shift", [(0, 0, 0), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), (0.5, 0, 0)])
def test_points_and_weights_stand_for_the_whole_mesh(size, shift):
    points, weights = KMesh(size, shift).points()
    assert weights.sum() == pytest.approx(1)
    assert (points >= -0.5).all()
    assert (points < 0.5 + 1e-9).all()
    # A sum over the mesh of exp(2 pi i k.R), for all R, says which points it holds; k and -k give the same real part.
    full = np.array([[(i + s) / n for i, s, n in zip(index, shift, size, strict=True)] for index in np.ndindex(*size)])
    for r in itertools.product(range(-3, 4), repeat=3):
        expected = np.cos(2 * np.pi * full @ r).mean()
        assert weights @ np.cos(2 * np.pi * points @ r) == pytest.approx(expected, abs=1e-12)


def test_time_reversal_halves_what_it_can():
    assert len(KMesh((2, 2, 2)).points()[0]) == 8
    assert len(KMesh((2, 2, 2), (0.5, 0.5, 0.5)).points()[0]) == 4
    assert len(KMesh((2, 2, 2), (0.25, 0.25, 0.25)).points()[0]) == 8
    assert len(KMesh((3, 3, 3)).points()[0]) == 14
    assert KMesh().is_gamma
    assert not KMesh((1, 1, 1), (0.25, 0.25, 0.25)).is_gamma


@pytest.mark.parametrize("shift", [0.0, 0.25, 0.5])
@pytest.mark.parametrize("size", [(1, 1, 1), (2, 2, 2), (3, 1, 2)])
def test_reach_is_where_the_mesh_stops_seeing(size, shift):
    cell = np.array([[4.0, 0, 0], [1.0, 3.5, 0], [-0.5, 0.3, 5.0]])
    mesh = KMesh(size, (shift,) * 3)
    points, weights = mesh.points()
    assert mesh.count() == len(points)
    # Straight from the definition: the sum over the mesh of exp(2 pi i k.R), up to a generous radius.
    lengths = [
        np.linalg.norm(r @ cell)
        for r in itertools.product(range(-9, 10), repeat=3)
        if any(r) and abs(weights @ np.cos(2 * np.pi * points @ np.array(r))) > 1e-9
    ]
    assert mesh.reach(cell, 15.0) == pytest.approx(min([15.0, *lengths]))


def test_the_cheapest_mesh_for_a_reach():
    cell = np.array([[8.1, 0, 0], [0, 8.1, 0], [0, 0, 8.1]])
    assert KMesh.from_reach(cell, 21.5) == KMesh((2, 2, 2), (0.25,) * 3)
    assert KMesh.from_reach(cell, 8.0).count() == 1
    skewed = np.array([[4.0, 0, 0], [1.5, 3.5, 0], [-0.5, 1.3, 6.0]])
    for reach in (5.0, 10.0, 20.0):
        mesh = KMesh.from_reach(skewed, reach)
        assert mesh.reach(skewed, 60.0) >= reach - 1e-6
        for n in itertools.product(*(range(1, s + 2) for s in mesh.size)):
            for shift in (0, 0.25, 0.5):
                other = KMesh(n, (shift,) * 3)
                assert other.count() >= mesh.count() or other.reach(skewed, reach) < reach
    for bad in (0.0, -1.0, float("nan"), 1e9):
        with pytest.raises(SettingsError, match="reach"):
            KMesh.from_reach(cell, bad)
    with pytest.raises(SettingsError, match="repeat the cell"):
        KMesh.from_reach(np.diag([0.2, 4, 4]), 21.5)


def test_density_of_the_mesh_counts_points_by_the_heights_of_the_cell():
    cell = np.array([[8.1, 0, 0], [0, 4.05, 0], [3.0, 0, 12.0]])
    mesh = KMesh.from_density(cell, 2.0)
    for n, height in zip(mesh.size, 1 / np.linalg.norm(np.linalg.inv(cell), axis=0), strict=True):
        # (n - 1) points would be too few, n are enough.
        assert n / (2 * np.pi / height) >= 2.0 - 1e-9
        assert (n - 1) / (2 * np.pi / height) < 2.0


def test_defaults_by_cell_and_element():
    def at(symbol, a, repeat):
        lattice = "fcc" if symbol == "Al" else "diamond"
        return DFTSettings().at(Structure.from_ase(bulk(symbol, lattice, cubic=True, a=a).repeat(repeat)))

    al32 = at("Al", 4.05, 2)
    assert (al32.kmesh.size, al32.cutoff) == ((2, 2, 2), 400.0)
    assert at("Al", 4.05, 3).kmesh.count() == 4
    ge64 = at("Ge", 5.66, 2)
    assert (ge64.kmesh.count(), ge64.kmesh.shift, ge64.cutoff) == (4, (0.25,) * 3, 500.0)
    assert at("Al", 4.05, 4).kmesh.count() == 1
    assert al32.at(Structure.from_ase(bulk("Al", cubic=True).repeat(2))) == al32


@pytest.mark.parametrize(
    "settings",
    [
        {"cutoff": 1.0},
        {"cutoff": float("nan")},
        {"smearing_hartree": 0.0},
        {"tolerance": 1.0},
        {"xc": "LDA"},
        {"grid": (1, 2, 3)},
        {"max_iterations": 0},
    ],
)
def test_bad_settings_name_the_value(settings):
    (value,) = settings.values()
    with pytest.raises(SettingsError, match=repr(value).replace("(", r"\(").replace(")", r"\)")):
        DFTSettings(**settings)


@pytest.mark.parametrize(
    "arguments", [((0, 1, 1),), ((1, 1),), ((1, 1, 1.5),), ((1, 1, 1), (1.0, 0, 0)), ((1, 1, 65),)]
)
def test_bad_meshes_are_refused(arguments):
    with pytest.raises(SettingsError, match="k-mesh"):
        KMesh(*arguments)


def test_good_sizes_are_even_and_smooth():
    assert [good_size(n) for n in (1, 7, 11, 13, 22, 45, 53, 79, 97)] == [2, 8, 12, 14, 24, 48, 54, 80, 98]


def test_densities_are_rescaled_or_refused():
    s = Structure.from_ase(bulk("Al", cubic=True, a=4.05))
    field = np.full((8, 8, 8), 12 / s.volume)
    np.testing.assert_allclose(check_density(s, field * 1.02, 12.0), field)
    for bad in (field * 2, field[0], np.where(field > 0, np.nan, 0), -field):
        with pytest.raises(StructureError):
            check_density(s, bad, 12.0)
