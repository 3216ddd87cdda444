"""Descriptors against a brute-force float64 oracle, their symmetries, and the tie rule in perfect crystals."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from ase.build import bulk
from ase.data import atomic_numbers
from hypothesis import given
from hypothesis import strategies as st
from oracles import features as oracle
from scipy.spatial.transform import Rotation

from gpurho.descriptors import DescriptorSpec, Environment, descriptors
from gpurho.errors import GridError, SettingsError, UnknownSpeciesError
from gpurho.grid import Grid
from gpurho.partition import make_tiles
from gpurho.structure import Structure

AL = DescriptorSpec(("Al",))


def columns(spec):
    """Which columns are distances."""
    return np.array([name.startswith("d_") for name in spec.feature_names()])


def assert_agrees(values, expected, spec, distance=1e-5, angle=1e-4):
    is_distance = columns(spec)
    assert values.shape == expected.shape
    assert np.abs(values[:, is_distance] - expected[:, is_distance]).max(initial=0) < distance
    assert np.abs(values[:, ~is_distance] - expected[:, ~is_distance]).max(initial=0) < angle


def random_cell(rng, scale):
    """A triclinic cell, sheared and sometimes left-handed, with no height under a third of `scale`."""
    while True:
        cell = scale * (np.eye(3) * rng.uniform(0.6, 1.6, 3) + rng.uniform(-0.6, 0.6, (3, 3)))
        if rng.random() < 0.3:
            cell = cell[[1, 0, 2]]
        if np.abs(1 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min() > scale / 3:
            return cell


@st.composite
def cases(draw):
    """A structure, points in and around its cell, and a specification."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    n_species = draw(st.integers(1, 3))
    species = ("Al", "Si", "Ge")[:n_species]
    scale = draw(st.sampled_from([2.5, 4.0, 8.0]))
    cell = random_cell(rng, scale)
    n = draw(st.integers(1, max(2, int(0.05 * abs(np.linalg.det(cell))))))
    positions = rng.uniform(-1, 2, (n, 3)) @ cell
    if draw(st.booleans()) and n > 1:
        positions[1] = positions[0] + draw(st.sampled_from([0.0, 1e-3, 0.3]))
    points = rng.uniform(-0.5, 1.5, (draw(st.integers(1, 12)), 3)) @ cell
    if draw(st.booleans()):
        points[0] = positions[0]
    if draw(st.booleans()):
        points[-1] = positions[-1] + [0.01, 0.0, -0.02]
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    m = draw(st.sampled_from([1, 3, 9, 20, 60]))
    spec = DescriptorSpec(
        species,
        n_distances=m,
        n_angle_atoms=min(m, draw(st.integers(0, 8))),
        n_angle_neighbors=draw(st.integers(0, 4)),
        n_cross=min(m, draw(st.integers(0, 3))),
        cutoff=draw(st.sampled_from([2.0, 4.5, 7.0])),
    )
    symbols = np.array(species)[rng.integers(0, n_species, n)]
    return positions, symbols, cell, pbc, points, spec


def structure(positions, symbols, cell, pbc):
    return Structure(positions, [atomic_numbers[s] for s in symbols], cell, pbc)


@given(cases())
def test_any_structure_agrees_with_the_oracle(case):
    positions, symbols, cell, pbc, points, spec = case
    values = descriptors(structure(positions, symbols, cell, pbc), points, spec)
    assert values.dtype == np.float32
    assert_agrees(values, oracle(positions, symbols, cell, pbc, points, spec)[0], spec)


def rattled_fcc(n=3, amplitude=0.1, seed=0):
    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(n)
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return atoms


def test_paper_specification_on_rattled_aluminium_takes_the_fast_path_and_agrees():
    atoms = rattled_fcc()
    environment = Environment(Structure.from_ase(atoms), AL)
    grid = Grid.from_spacing(atoms.cell, 0.25)
    tile = make_tiles(grid, (20, 24, 12))[0]
    result = environment.tile_features(grid, tile)
    assert result.n_exact < 0.02 * tile.n_points
    assert result.n_capped == 0
    pick = np.random.default_rng(1).choice(tile.n_points, 60, replace=False)
    points = grid.points(tile.start, tile.stop)[pick]
    expected, _ = oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, AL)
    assert_agrees(result.values[pick], expected, AL)


def test_two_species_with_cross_cosines_take_the_fast_path_and_agree():
    atoms = bulk("Si", "diamond", 5.5, cubic=True).repeat(2)
    rng = np.random.default_rng(2)
    atoms.symbols[rng.permutation(64)[:32]] = "Ge"
    atoms.positions += rng.normal(0, 0.1, atoms.positions.shape)
    spec = DescriptorSpec(("Si", "Ge"), n_distances=20, n_angle_atoms=8, n_cross=4)
    environment = Environment(Structure.from_ase(atoms), spec)
    grid = Grid.from_spacing(atoms.cell, 0.3)
    tile = make_tiles(grid, (10, 11, 12))[3]
    result = environment.tile_features(grid, tile)
    assert result.n_exact < 0.05 * tile.n_points
    pick = rng.choice(tile.n_points, 30, replace=False)
    points = grid.points(tile.start, tile.stop)[pick]
    expected, _ = oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, spec)
    assert_agrees(result.values[pick], expected, spec)


PERFECT = {
    "fcc": (bulk("Al", "fcc", 4.05), ("Al",)),
    "diamond": (bulk("Si", "diamond", 5.43), ("Si",)),
    "zincblende": (bulk("SiGe", "zincblende", 5.54), ("Si", "Ge")),
    "vacancy": (bulk("Al", "fcc", 4.05, cubic=True).repeat(3)[1:], ("Al",)),
}


@pytest.mark.parametrize("name", PERFECT)
def test_perfect_crystals_do_not_depend_on_orientation_order_or_origin(name):
    atoms, species = PERFECT[name]
    spec = DescriptorSpec(species, n_distances=40, n_angle_atoms=15, n_angle_neighbors=3, n_cross=3, cutoff=9.0)
    rng = np.random.default_rng(7)
    conventional = 4.05 if "Al" in species else 5.43
    # Points of high symmetry (atoms, octahedral and tetrahedral sites, bond centres) and common ones.
    sites = np.array([[0, 0, 0], [0.5, 0, 0], [0.25, 0.25, 0.25], [0.125, 0.125, 0.125], [0.25, 0, 0], [0.25, 0.25, 0]])
    points = np.concatenate([sites * conventional, rng.uniform(0, conventional, (6, 3))])
    reference = Environment(Structure.from_ase(atoms), spec).point_features(points)
    assert reference.n_tied > 0
    expected, tied = oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, spec)
    assert_agrees(reference.values, expected, spec)
    assert reference.n_tied == tied.sum()
    for seed in range(4):
        turn = Rotation.random(random_state=seed).as_matrix()
        assert np.abs(turn - np.eye(3)).max() > 0.1
        shift = rng.uniform(-3, 3, 3)
        order = rng.permutation(len(atoms))
        whole = rng.integers(-3, 4, (len(atoms), 3)) * atoms.pbc
        moved = atoms.copy()
        moved.positions += whole @ atoms.cell.array
        moved = moved[order]
        moved.set_cell(atoms.cell.array @ turn.T)
        moved.positions = moved.positions @ turn.T + shift
        values = descriptors(moved, points @ turn.T + shift, spec)
        assert np.abs(values - reference.values).max() < 1e-4


@given(st.integers(0, 2**31))
def test_rattled_crystal_does_not_depend_on_orientation_order_or_origin(seed):
    rng = np.random.default_rng(seed)
    atoms = rattled_fcc(2, seed=seed % 17)
    points = rng.uniform(0, 8.1, (40, 3))
    reference = descriptors(atoms, points, AL)
    turn = Rotation.random(random_state=seed).as_matrix()
    order = rng.permutation(len(atoms))
    shift = rng.uniform(-30, 30, 3)
    moved = atoms[order]
    moved.set_cell(atoms.cell.array @ turn.T)
    moved.positions = moved.positions @ turn.T + shift
    assert np.abs(descriptors(moved, points @ turn.T + shift, AL) - reference).max() < 1e-4


def test_other_cells_of_the_same_lattice_give_the_same_descriptors():
    primitive = bulk("Al", "fcc", 4.05)
    cubic = bulk("Al", "fcc", 4.05, cubic=True).repeat((1, 2, 3))
    sheared = primitive.copy()
    sheared.set_cell(np.array([[1, 3, 0], [0, 1, -2], [0, 0, 1]]) @ primitive.cell.array)
    points = np.random.default_rng(0).uniform(-5, 5, (20, 3))
    reference = descriptors(primitive, points, AL)
    assert np.abs(descriptors(cubic, points, AL) - reference).max() < 1e-5
    assert np.abs(descriptors(sheared, points, AL) - reference).max() < 1e-5


def test_tiles_give_the_rows_of_the_grid_whatever_their_shape():
    atoms = rattled_fcc(2)
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0.2, 0], [0, 1, 0.1], [-0.1, 0, 1]]), scale_atoms=True)
    environment = Environment(Structure.from_ase(atoms), AL)
    grid = Grid((13, 9, 11), atoms.cell.array, origin=(0.3, -0.2, 7.0))
    whole = environment.tile_features(grid, make_tiles(grid, grid.shape)[0]).values.reshape(*grid.shape, -1)
    for shape in ((4, 4, 4), (5, 3, 11), (1, 9, 2)):
        pieces = np.full_like(whole, np.nan)
        for tile in make_tiles(grid, shape):
            pieces[tile.slices] = environment.tile_features(grid, tile).values.reshape(*tile.shape, -1)
        assert np.abs(pieces - whole).max() < 1e-5


def test_coarse_grids_beyond_the_sorting_network_agree():
    """So many candidates per batch that the network cannot take them: nothing may be lost."""
    atoms = rattled_fcc(4)
    atoms.positions *= 0.62
    atoms.set_cell(atoms.cell * 0.62)
    environment = Environment(Structure.from_ase(atoms), AL)
    grid = Grid.from_spacing(atoms.cell, 2.0)
    tile = make_tiles(grid)[0]
    result = environment.tile_features(grid, tile)
    assert result.n_exact > tile.n_points / 2
    points = grid.points()[:20]
    expected, _ = oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, AL)
    assert_agrees(result.values[:20], expected, AL)


def test_missing_atoms_give_the_cutoff_and_no_angle_and_are_counted():
    one = Structure([[5.0, 5.0, 5.0]], [13], np.eye(3) * 10, [False] * 3)
    result = Environment(one, AL).point_features([[5.0, 5.0, 6.5], [90.0, 0.0, 0.0]])
    assert result.n_capped == 2
    assert result.values[0, 0] == pytest.approx(1.5)
    assert np.all(result.values[0, 1:60] == 9.0)
    assert np.all(result.values[1, :60] == 9.0)
    assert np.all(result.values[:, 60:] == 0.0)
    periodic = Structure([[5.0, 5.0, 5.0]], [13], np.eye(3) * 10, [True] * 3)
    assert (
        Environment(periodic, DescriptorSpec(("Al",), n_distances=3, n_angle_atoms=3))
        .point_features([[0.1, 0.2, 0.3]])
        .n_capped
        == 0
    )


def test_results_are_the_same_bits_each_time():
    atoms = rattled_fcc(2)
    points = np.random.default_rng(3).uniform(0, 8, (500, 3))
    assert descriptors(atoms, points, AL).tobytes() == descriptors(atoms, points, AL).tobytes()


def test_columns_are_named_and_the_specification_survives_a_round_trip():
    spec = DescriptorSpec(("Si", "Ge"), n_distances=4, n_angle_atoms=2, n_angle_neighbors=2, n_cross=2)
    names = spec.feature_names()
    assert len(names) == len(set(names)) == spec.n_features == 2 * (4 + 4) + 4
    assert names[:5] == ["d_Si_1", "d_Si_2", "d_Si_3", "d_Si_4", "cos_Si_1_1"]
    assert names[-1] == "cross_Si_2_Ge_2"
    assert DescriptorSpec.from_dict(spec.to_dict()) == spec
    assert AL.n_features == 105


@pytest.mark.parametrize(
    "values",
    [
        {"species": ()},
        {"species": ("Xx",)},
        {"species": ("Al", "Al")},
        {"n_distances": 0},
        {"n_distances": 2.5},
        {"n_angle_atoms": 61},
        {"n_cross": -1},
        {"cutoff": float("nan")},
        {"cutoff": -1.0},
        {"family": "soap"},
    ],
)
def test_bad_specifications_are_refused(values):
    with pytest.raises(SettingsError):
        DescriptorSpec(**{"species": ("Al",), **values})


def test_unknown_species_and_bad_points_are_refused():
    with pytest.raises(UnknownSpeciesError, match="Si"):
        descriptors(bulk("Si"), [[0, 0, 0]], AL)
    for points in ([[0, 0]], [[0, 0, np.nan]], 3.0):
        with pytest.raises(GridError):
            descriptors(bulk("Al"), points, AL)
    assert descriptors(bulk("Al"), np.zeros((0, 3)), AL).shape == (0, 105)


def test_torch_keeps_its_number_of_threads():
    # In a process of its own: Numba's threads start once.
    code = (
        "import torch; torch.set_num_threads(1); assert torch.get_num_threads() == 1\n"
        "from ase.build import bulk\n"
        "from gpurho.descriptors import DescriptorSpec, descriptors\n"
        "spec = DescriptorSpec(('Al',), family='smooth', cutoff=5.0)\n"
        "descriptors(bulk('Al'), [[0.0, 0.0, 0.001 * k] for k in range(2000)], spec)\n"
        "assert torch.get_num_threads() == 1"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment | {"NUMBA_NUM_THREADS": "2"})
