"""The smooth descriptors on the CPU: a float64 oracle by Legendre polynomials, symmetries, tiles, specification."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st
from oracles import smooth_features as oracle
from scipy.spatial.transform import Rotation

from gpurho.descriptors import DescriptorSpec, Environment, descriptors
from gpurho.errors import SettingsError
from gpurho.grid import Grid
from gpurho.kernels import _smooth_formulas as formulas
from gpurho.kernels._smooth_emit import CONTRACTED, FACTORED
from gpurho.kernels.smooth import contraction_matrix
from gpurho.partition import make_tiles
from gpurho.structure import Structure

AL = DescriptorSpec(("Al",), family="smooth", cutoff=5.0)
ACCURACY = 1e-5
"""Of the largest value of a column, or of 1 where the column is smaller."""


def combinations(n_species, n_basis, n_radial, identity=0.0):
    rows = np.random.default_rng(0).normal(0, 0.4, (n_species, n_basis, n_radial))
    return tuple(tuple(map(tuple, block)) for block in rows + identity * np.eye(n_basis, n_radial))


# Few sizes, each of which is compiled once.
SPECS = [
    AL,
    DescriptorSpec(("Al", "Ge"), family="smooth", cutoff=4.0, n_radial=9, n_basis=4, l_max=3),
    DescriptorSpec(
        ("Al", "Si", "Ge"),
        family="smooth",
        cutoff=3.5,
        n_radial=10,
        n_basis=3,
        l_max=6,
        contraction=combinations(3, 3, 10),
    ),
    DescriptorSpec(("Al",), family="smooth", cutoff=6.5, n_radial=13, n_basis=0),
    DescriptorSpec(
        ("Al", "Si", "Ge"),
        family="smooth",
        cutoff=4.5,
        n_radial=8,
        n_basis=5,
        l_max=4,
        contraction=combinations(3, 5, 8, identity=3.0),
    ),
    DescriptorSpec(
        ("Al",),
        family="smooth",
        cutoff=4.0,
        n_radial=2,
        n_basis=2,
        l_max=1,
        contraction=combinations(1, 2, 2, identity=3.0),
    ),
]


def assert_agrees(values, expected, accuracy=ACCURACY):
    assert values.shape == expected.shape
    assert values.dtype == np.float32
    scale = np.maximum(np.abs(expected).max(axis=0, initial=1.0), 1.0)
    assert (np.abs(values - expected) / scale).max(initial=0.0) < accuracy


def random_cell(rng, scale):
    while True:
        cell = scale * (np.eye(3) * rng.uniform(0.6, 1.6, 3) + rng.uniform(-0.6, 0.6, (3, 3)))
        if np.abs(1 / np.linalg.norm(np.linalg.inv(cell), axis=0)).min() > scale / 3:
            return cell


@st.composite
def cases(draw):
    """Atoms, symbols, cell, periodicity, points and a specification: cells far smaller than the cutoff, too."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    spec = draw(st.sampled_from(SPECS))
    cell = random_cell(rng, draw(st.sampled_from([2.5, 4.0, 8.0])))
    n = draw(st.integers(1, max(2, int(0.05 * abs(np.linalg.det(cell))))))
    positions = rng.uniform(-1, 2, (n, 3)) @ cell
    points = rng.uniform(-0.5, 1.5, (draw(st.integers(1, 12)), 3)) @ cell
    if draw(st.booleans()):
        points[0] = positions[0]
    if draw(st.booleans()):
        points[-1] = positions[-1] + rng.normal(0, 1e-3, 3)
    pbc = draw(st.tuples(st.booleans(), st.booleans(), st.booleans()))
    # Some species may be absent.
    symbols = rng.choice(spec.species[: draw(st.integers(1, len(spec.species)))], n)
    return positions, symbols, cell, pbc, points, spec


@given(cases())
def test_any_structure_agrees_with_the_oracle(case):
    positions, symbols, cell, pbc, points, spec = case
    numbers = [{"Al": 13, "Si": 14, "Ge": 32}[s] for s in symbols]
    result = Environment(Structure(positions, numbers, cell, pbc), spec).point_features(points)
    expected = oracle(positions, symbols, cell, pbc, points, spec)
    assert_agrees(result.values, expected)
    n = len(spec.species) * spec.n_radial
    assert result.n_capped == (~expected[:, :n].any(axis=1)).sum()
    assert result.n_tied == result.n_exact == 0


def rattled_fcc(n=2, seed=0):
    atoms = bulk("Al", "fcc", 4.05, cubic=True).repeat(n)
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, atoms.positions.shape)
    return atoms


def alloy():
    atoms = bulk("Si", "diamond", 5.5, cubic=True).repeat((2, 1, 1))
    atoms.symbols[::3] = "Ge"
    atoms.symbols[1::5] = "Al"
    atoms.positions += np.random.default_rng(2).normal(0, 0.1, atoms.positions.shape)
    return atoms


@pytest.mark.parametrize("spec", SPECS)
def test_a_tile_of_a_sheared_grid_agrees_with_the_oracle(spec):
    atoms = rattled_fcc() if len(spec.species) == 1 else alloy()
    if len(spec.species) == 2:
        atoms.symbols[[s == "Si" for s in atoms.symbols]] = "Al"
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0.2, 0], [0, 1, 0.1], [-0.1, 0, 1]]), scale_atoms=True)
    grid = Grid.from_spacing(atoms.cell, 0.3)
    tile = make_tiles(grid, (9, 10, 14))[1]
    values = Environment(Structure.from_ase(atoms), spec).tile_features(grid, tile).values
    pick = np.random.default_rng(1).choice(tile.n_points, 40, replace=False)
    points = grid.points(tile.start, tile.stop)[pick]
    assert_agrees(values[pick], oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, spec))


@pytest.mark.parametrize("spec", SPECS[:3])
def test_features_do_not_depend_on_orientation_order_or_origin(spec):
    atoms = rattled_fcc() if len(spec.species) == 1 else alloy()
    if len(spec.species) == 2:
        atoms.symbols[[s == "Si" for s in atoms.symbols]] = "Al"
    rng = np.random.default_rng(5)
    points = rng.uniform(0, 8, (50, 3))
    points[0] = atoms.positions[3]
    reference = descriptors(atoms, points, spec)
    assert np.abs(reference - reference[::-1]).max() > 1.0
    for seed in range(3):
        turn = Rotation.random(random_state=seed).as_matrix()
        assert np.abs(turn - np.eye(3)).max() > 0.1
        shift, order = rng.uniform(-30, 30, 3), rng.permutation(len(atoms))
        moved = atoms.copy()
        moved.positions += rng.integers(-3, 4, (len(atoms), 3)) @ atoms.cell.array
        moved = moved[order]
        moved.set_cell(atoms.cell.array @ turn.T)
        moved.positions = moved.positions @ turn.T + shift
        assert_agrees(descriptors(moved, points @ turn.T + shift, spec), reference.astype(float))


def test_other_cells_of_the_same_lattice_give_the_same_descriptors():
    primitive = bulk("Al", "fcc", 4.05)
    cubic = bulk("Al", "fcc", 4.05, cubic=True).repeat((1, 2, 3))
    points = np.random.default_rng(0).uniform(-5, 5, (20, 3))
    points[0] = 0.0
    assert_agrees(descriptors(cubic, points, AL), descriptors(primitive, points, AL).astype(float))


def test_the_sign_of_a_rotation_is_seen_but_not_of_a_reflection():
    """A power spectrum is blind to reflections, and must tell atoms that are moved apart."""
    atoms = rattled_fcc()
    points = np.random.default_rng(0).uniform(0, 8, (20, 3))
    mirror = np.diag([1.0, 1.0, -1.0])
    reflected = atoms.copy()
    reflected.set_cell(atoms.cell.array @ mirror)
    reflected.positions = atoms.positions @ mirror
    reference = descriptors(atoms, points, AL)
    assert_agrees(descriptors(reflected, points @ mirror, AL), reference.astype(float))
    atoms.positions[0] += 0.3
    assert np.abs(descriptors(atoms, points, AL) - reference).max() > 0.1


def test_a_contraction_is_taken_apart_where_its_first_columns_are_well_conditioned():
    n = SPECS[4].n_basis
    how, taken = contraction_matrix(SPECS[4]._sizes())
    assert how == FACTORED
    whole = taken[:, :, :n] @ np.concatenate([np.broadcast_to(np.eye(n), (3, n, n)), taken[:, :, n:]], axis=2)
    np.testing.assert_allclose(whole, SPECS[4].contraction, atol=1e-6)
    how, taken = contraction_matrix(SPECS[2]._sizes())
    assert how == CONTRACTED
    np.testing.assert_array_equal(taken, np.float32(SPECS[2].contraction))
    singular = replace(SPECS[2]._sizes(), contraction=(((1.0,) * 10,) * 3,) * 3)
    assert contraction_matrix(singular)[0] == CONTRACTED
    assert contraction_matrix(AL._sizes())[0] == 0


@pytest.mark.parametrize("spec", [AL, SPECS[2], SPECS[4]])
def test_tiles_have_the_bits_of_the_grid_whatever_their_shape(spec):
    atoms = rattled_fcc() if len(spec.species) == 1 else alloy()
    atoms.set_cell(atoms.cell.array @ np.array([[1, 0.2, 0], [0, 1, 0.1], [-0.1, 0, 1]]), scale_atoms=True)
    environment = Environment(Structure.from_ase(atoms), spec)
    grid = Grid((13, 9, 11), atoms.cell.array, origin=(0.3, -0.2, 7.0))
    whole = environment.tile_features(grid, make_tiles(grid, grid.shape)[0]).values
    field = whole.reshape(*grid.shape, -1)
    for shape in ((4, 4, 4), (5, 3, 11), (1, 9, 2)):
        for tile in make_tiles(grid, shape):
            piece = environment.tile_features(grid, tile).values.reshape(*tile.shape, -1)
            assert piece.tobytes() == field[tile.slices].tobytes()
    points = grid.points()
    assert environment.point_features(points).values.tobytes() == whole.tobytes()
    pick = np.random.default_rng(0).permutation(len(points))[:321]
    assert environment.point_features(points[pick]).values.tobytes() == whole[pick].tobytes()
    # With others in a register or alone, a point's atoms come in other pairs.
    for i in pick[:40]:
        assert environment.point_features(points[i : i + 1]).values.tobytes() == whole[i].tobytes()


@pytest.mark.parametrize("offset", [1e3, -9e5])
def test_a_cell_far_from_the_origin_loses_nothing(offset):
    atoms = rattled_fcc()
    points = np.random.default_rng(0).uniform(0, 8, (30, 3))
    atoms.positions += offset
    points += offset
    expected = oracle(atoms.positions, atoms.symbols, atoms.cell.array, atoms.pbc, points, AL)
    assert_agrees(descriptors(atoms, points, AL), expected)


def test_coarse_grids_agree_with_the_oracle():
    """Batches so wide that whole-number coordinates wrap around."""
    grid = Grid((4, 5, 6), np.diag([400.0, 500.0, 300.0]))
    points = grid.points()
    rng = np.random.default_rng(0)
    positions = points[rng.integers(0, len(points), 60)] + rng.normal(0, 2, (60, 3))
    # Where numbers wrap around, an atom 256 angstrom away would look near.
    positions = np.concatenate([positions, points[:60:3] + np.array([256.0, 0, 0])])
    structure = Structure(positions, [13] * len(positions), grid.cell, [False] * 3)
    result = Environment(structure, AL).tile_features(grid, make_tiles(grid)[0])
    assert_agrees(result.values, oracle(positions, ["Al"] * len(positions), grid.cell, [False] * 3, points, AL))
    assert 0 < result.n_capped < len(points)


def test_atoms_enter_smoothly_at_the_cutoff_and_points_without_atoms_are_counted():
    one = Structure([[0.0, 0.0, 0.0]], [13], np.eye(3) * 40, [False] * 3)
    r = np.array([4.0, 4.99, 4.9999, 5.0, 5.0001, 30.0])
    result = Environment(one, AL).point_features(r[:, None] * [1.0, 0.0, 0.0])
    assert result.n_capped == 3
    assert np.all(result.values[3:] == 0.0)
    assert np.abs(result.values[1]).max() < 1e-4
    assert np.abs(result.values[2]).max() < 1e-8
    assert result.values[2, 0] > 0.0


def test_the_envelope_is_the_cosine():
    r = np.linspace(0, 1, 1001)
    values = np.array([formulas.envelope(u) for u in r**2])
    assert np.abs(values - 0.5 * (1 + np.cos(np.pi * r))).max() < 2e-9
    assert values[-1] == 0.0


def test_harmonics_of_each_degree_have_unit_sum_and_distinct_places():
    rng = np.random.default_rng(0)
    x, y, z = rng.normal(size=3)
    keys = formulas.columns(8)
    values = formulas.harmonics(x, y, z, x * x + y * y + z * z, keys)
    assert sorted(formulas.place(*k) for k in keys) == list(range(80))
    for degree in range(1, 9):
        total = sum((formulas.norm(*k[:2]) * v) ** 2 for k, v in zip(keys, values, strict=True) if k[0] == degree)
        assert total == pytest.approx((x * x + y * y + z * z) ** degree, rel=1e-12)


def test_columns_are_named_and_the_specification_survives_a_round_trip():
    for spec in SPECS:
        names = spec.feature_names()
        assert len(names) == len(set(names)) == spec.n_features
        again = DescriptorSpec.from_dict(json.loads(json.dumps(spec.to_dict())))
        assert again == spec
        assert hash(again) == hash(spec)
    assert AL.n_features == 20 + 21 * 4
    assert AL.feature_names()[3] == "two_Al_3"
    names = SPECS[1].feature_names()
    assert names[9] == "two_Ge_0"
    assert names[18:22] == ["ps_Al_0_Al_0_l1", "ps_Al_0_Al_0_l2", "ps_Al_0_Al_0_l3", "ps_Al_0_Al_1_l1"]
    assert names[-1] == "ps_Ge_3_Ge_3_l3"
    assert "contraction" not in DescriptorSpec(("Al",)).to_dict()


def test_the_names_say_what_the_columns_hold():
    """Pairs in the order of the names: each column changes with the channels that it names, and only with them."""
    base = SPECS[2]
    atoms = alloy()
    points = np.random.default_rng(0).uniform(0, 5, (5, 3))
    reference = descriptors(atoms, points, base)
    names = np.array(base.feature_names())
    for s, n in itertools.product(range(3), range(3)):
        matrix = np.array(base.contraction)
        matrix[s, n] *= -2.0
        other = DescriptorSpec(**{**base.to_dict(), "contraction": matrix.tolist()})
        changed = np.abs(descriptors(atoms, points, other) - reference).max(axis=0) > 1e-6
        assert np.array_equal(changed, [f"_{base.species[s]}_{n}_" in name and name[0] == "p" for name in names])


def test_dictionaries_of_older_models_load():
    old = {
        "species": ["Al"],
        "n_distances": 60,
        "n_angle_atoms": 15,
        "n_angle_neighbors": 3,
        "n_cross": 0,
        "cutoff": 9.0,
        "family": "scalar-product",
    }
    spec = DescriptorSpec.from_dict(old)
    assert spec == DescriptorSpec(("Al",))
    assert spec.to_dict() == old


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"n_radial": 0}, "n_radial is 0"),
        ({"n_radial": 65}, "n_radial is 65"),
        ({"n_basis": 21}, "n_basis is 21; give a whole number from 0 to 20"),
        ({"n_basis": -1}, "n_basis"),
        ({"l_max": 9}, "l_max is 9"),
        ({"l_max": 1.5}, "l_max is 1.5"),
        ({"contraction": ((1.0,),)}, "contraction"),
        ({"contraction": "abc"}, "contraction"),
        ({"n_basis": 1, "n_radial": 2, "contraction": (((1.0, float("nan")),),)}, "contraction"),
        ({"n_distances": 40}, "n_distances"),
        ({"family": "scalar-product", "l_max": 3}, "l_max"),
    ],
)
def test_bad_specifications_are_refused(values, match):
    with pytest.raises(SettingsError, match=match) as caught:
        DescriptorSpec(**{"species": ("Al",), "family": "smooth", **values})
    assert "\n" not in str(caught.value)
