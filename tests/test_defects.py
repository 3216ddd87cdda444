"""Dislocations and grain boundaries: counts, distances, Burgers circuits, periodicity, stress."""

from __future__ import annotations

import time

import numpy as np
import pytest
from ase.calculators.emt import EMT
from ase.io import read, write
from scipy.spatial import cKDTree

from gpurho import defects
from gpurho.errors import StructureError

A = 4.05
NEAREST = A / np.sqrt(2)
BURGERS = NEAREST
BETWEEN_SHELLS = 0.5 * (NEAREST + A)
AXES = {"edge": [[1, 1, 0], [1, -1, 1], [1, -1, -2]], "screw": [[-1, 1, 2], [1, -1, 1], [1, 1, 0]]}
BUILD = {"edge": defects.edge_dislocation, "screw": defects.screw_dislocation}
CLOSEST = {"edge": 2.38, "screw": 2.57}


def images(atoms, reach):
    """Positions of all atoms and of their periodic images within `reach` of the cell, and their numbers."""
    cell = atoms.cell.array
    heights = atoms.get_volume() / np.linalg.norm(np.cross(cell[[1, 2, 0]], cell[[2, 0, 1]]), axis=1)
    n = np.where(atoms.pbc, np.ceil(reach / heights), 0).astype(int)
    shifts = np.stack(np.meshgrid(*[np.arange(-m, m + 1) for m in n], indexing="ij"), -1).reshape(-1, 3)
    positions = (atoms.positions[None] + (shifts @ cell)[:, None]).reshape(-1, 3)
    return positions, np.tile(np.arange(len(atoms)), len(shifts))


def bonds(atoms, reach=BETWEEN_SHELLS):
    """Of each atom, the vectors to all others within `reach`."""
    positions, _ = images(atoms, reach)
    found = cKDTree(positions).query_ball_point(atoms.positions, reach)
    vectors = [positions[near] - centre for near, centre in zip(found, atoms.positions, strict=True)]
    return [v[np.linalg.norm(v, axis=1) > 1e-9] for v in vectors]


def shortest(atoms):
    return min(np.linalg.norm(v, axis=1).min() for v in bonds(atoms) if len(v))


def from_cores(atoms):
    """Distance of each atom from the nearest core, periodic images of the cores included."""
    cell = atoms.cell.array
    n = np.arange(-2, 3)
    shifts = (np.stack(np.meshgrid(n, n), -1).reshape(-1, 2) * atoms.pbc[:2]) @ cell[:2, :2]
    cores = (atoms.info["cores"][:, None] + shifts).reshape(-1, 2)
    return cKDTree(cores).query(atoms.positions[:, :2])[0]


def circuit(atoms, kind, centre, half):
    """Burgers vector by a closed walk from atom to atom, counter-clockwise along a square about `centre`.

    Each step is compared with the lattice vector of the perfect crystal that it stands for; it is not known here
    where the dislocations are, nor how the atoms were displaced.
    """
    steps = np.arange(-half, half, 0.3)
    side = np.stack([steps, np.full_like(steps, -half)], axis=1)
    turn = np.array([[0, 1], [-1, 0]])
    path = np.concatenate([side @ np.linalg.matrix_power(turn, k) for k in range(4)]) + centre
    assert np.linalg.det([path[0] - centre, path[1] - centre]) > 0, "counter-clockwise"
    positions, _ = images(atoms, half + 10)
    middle = atoms.cell.array[2, 2] / 2
    visited = cKDTree(positions).query(np.column_stack([path, np.full(len(path), middle)]))[1]
    hops = np.diff(positions[[*visited, visited[0]]], axis=0)
    rotation = np.array(AXES[kind]) / np.linalg.norm(AXES[kind], axis=1)[:, None]
    n = np.arange(-4, 5)
    whole = np.stack(np.meshgrid(n, n, n), -1).reshape(-1, 3)
    ideal = (whole[whole.sum(axis=1) % 2 == 0] * A / 2) @ rotation.T
    distance, which = cKDTree(ideal).query(hops)
    assert distance.max() < 0.4 * NEAREST, "every step stands for one lattice vector and no other"
    assert len(set(visited)) > 10
    return -ideal[which].sum(axis=0)


@pytest.mark.parametrize("kind", ["edge", "screw"])
@pytest.mark.parametrize("size", [(28.0, 28.0), (56.0, 40.0), (50.0, 90.0)])
def test_burgers_vectors_of_a_pair(kind, size):
    atoms = BUILD[kind](size=size, a=A)
    assert atoms.pbc.all()
    cores, burgers = atoms.info["cores"], atoms.info["burgers"]
    along = [BURGERS, 0, 0] if kind == "edge" else [0, 0, BURGERS]
    np.testing.assert_allclose(burgers, [along, np.negative(along)])
    for core, expected in zip(cores, burgers, strict=True):
        np.testing.assert_allclose(circuit(atoms, kind, core, 6.0), expected, atol=1e-9)
        # Across the faces of the cell: the image of the core belongs to the same crystal.
        moved = core + atoms.cell.array[0, :2] + atoms.cell.array[1, :2]
        np.testing.assert_allclose(circuit(atoms, kind, moved, 6.0), expected, atol=1e-9)
    between = cores.mean(axis=0) + np.array([0.25 * atoms.cell[0, 0], -0.25 * atoms.cell[1, 1]])
    np.testing.assert_allclose(circuit(atoms, kind, between, 5.0), 0, atol=1e-9)


@pytest.mark.parametrize("kind", ["edge", "screw"])
def test_burgers_vector_of_one(kind):
    atoms = BUILD[kind](radius=30.0, a=A, length=12.0, vacuum=8.0)
    assert atoms.pbc.tolist() == [False, False, True]
    core = atoms.info["cores"][0]
    assert np.hypot(*(atoms.positions[:, :2] - core).T).max() < 30 + BURGERS / 2
    assert atoms.positions[:, :2].min() == pytest.approx(8.0)
    for half in (6.0, 14.0):
        np.testing.assert_allclose(circuit(atoms, kind, core, half), atoms.info["burgers"][0], atol=1e-9)
    np.testing.assert_allclose(circuit(atoms, kind, core + np.array([14, 0]), 6.0), 0, atol=1e-9)
    assert len(atoms) == pytest.approx(np.pi * 30**2 * atoms.cell[2, 2] * 4 / A**3, rel=0.03)


@pytest.mark.parametrize("kind", ["edge", "screw"])
@pytest.mark.parametrize("size", [(12.0, 14.0), (28.0, 28.0), (37.0, 84.0), (90.0, 28.0)])
def test_crystal_away_from_the_cores(kind, size):
    atoms = BUILD[kind](size=size, a=A)
    assert shortest(atoms) > CLOSEST[kind]
    far = from_cores(atoms) > 6.5
    counts = np.array([len(v) for v in bonds(atoms)])
    assert (counts[far] == 12).all(), "across the periodic faces, too"
    assert far.any() == (size != (12.0, 14.0))


def test_coordination_sees_a_wrong_cell():
    atoms = defects.screw_dislocation(size=(37.0, 84.0), a=A)
    cell = atoms.cell.array.copy()
    cell[0, 2] = 0  # half a Burgers vector off
    atoms.set_cell(cell)
    counts = np.array([len(v) for v in bonds(atoms)])
    assert (counts[from_cores(atoms) > 6.5] != 12).any()


@pytest.mark.parametrize(("size", "n", "n_y"), [((27.0, 28.0), 9, 4), ((10.1, 14.0), 3, 2), ((60.0, 50.0), 20, 8)])
def test_edge_counts(size, n, n_y):
    atoms = defects.edge_dislocation(size=size, length=15.0, a=A)
    lengths = atoms.cell.lengths()
    assert len(atoms) == 3 * (2 * n + 1) * n_y * 3
    assert lengths[0] == pytest.approx((n + 0.5) * BURGERS)
    assert atoms.cell[1, 1] == pytest.approx(n_y * np.sqrt(3) * A)
    assert lengths[2] == pytest.approx(3 * A * np.sqrt(1.5))
    # As dense as the crystal: the mean strain is none.
    assert atoms.get_volume() / len(atoms) == pytest.approx(A**3 / 4, rel=1e-12)
    # The two additional half-planes: in the layers between the cores there are n + 1 periods, in the others n.
    layer = np.rint((atoms.positions[:, 1] - 0.5 * A / np.sqrt(3)) / (A / np.sqrt(3))).astype(int) % (3 * n_y)
    counts = np.sort(np.bincount(layer))
    assert set(counts.tolist()) <= {2 * 3 * n, 2 * 3 * (n + 1)}
    assert (counts == 2 * 3 * n).sum() == (counts == 2 * 3 * (n + 1)).sum()


def test_screw_counts():
    atoms = defects.screw_dislocation(size=(24.0, 30.0), length=9.0, a=A)
    assert len(atoms) == 6 * 5 * 4 * 3
    np.testing.assert_allclose(np.diag(atoms.cell.array), [5 * A * np.sqrt(1.5), 4 * A * np.sqrt(3), 3 * BURGERS])
    np.testing.assert_allclose(atoms.cell.array[:2, 2], [BURGERS / 2, -BURGERS / 2])
    assert atoms.get_volume() / len(atoms) == pytest.approx(A**3 / 4, rel=1e-12)
    assert len(defects.screw_dislocation(size=(10, 14), a=A)) == 24
    assert defects.screw_dislocation("Cu").info["family"] == "cu-screw"


@pytest.mark.parametrize("kind", ["edge", "screw"])
def test_core_of_the_pair_is_the_core_of_one(kind):
    """The sum over all images against the textbook's field of a single dislocation."""
    pair, one = BUILD[kind](size=(160, 160), a=A), BUILD[kind](radius=40.0, a=A)
    environments = []
    for atoms, core in [(one, one.info["cores"][0]), *((pair, core) for core in pair.info["cores"])]:
        distance = np.hypot(*(atoms.positions[:, :2] - core).T)
        near = np.flatnonzero(distance < 9)
        all_bonds = [np.sort(np.linalg.norm(v, axis=1))[:10] for v in bonds(atoms[near], 4.5)]
        inner = [v for v, d in zip(all_bonds, distance[near], strict=True) if d < 4.5]
        environments.append(np.array(sorted(map(tuple, np.round(inner, 1)))).mean(axis=0))
    for environment in environments[1:]:
        np.testing.assert_allclose(environment, environments[0], atol=0.04)
    assert np.ptp(environments[0]) > 0.1, "distorted"


def test_strain_far_from_the_rows_of_edges():
    """Where the rows' decaying fields have gone: plane strain under no stress along the normal."""
    poisson = 0.3
    atoms = defects.edge_dislocation(size=(20.0, 170.0), a=A, poisson=poisson)
    p = atoms.cell[0, 0]
    for centre, sign in ((atoms.info["cores"][:, 1].mean(), 1), (atoms.info["cores"][1, 1] + 31, -1)):
        heights = np.sort(atoms.positions[np.abs(atoms.positions[:, 1] - centre) < 10, 1])
        layers = [part.mean() for part in np.split(heights, np.flatnonzero(np.diff(heights) > 1) + 1)]
        assert len(layers) > 6
        expected = A / np.sqrt(3) * (1 + sign * poisson / (1 - poisson) * BURGERS / (2 * p))
        np.testing.assert_allclose(np.diff(layers), expected, rtol=1e-4)
        assert abs(expected - A / np.sqrt(3)) > 0.05


@pytest.mark.parametrize("kind", ["edge", "screw"])
def test_enough_rows_are_summed(kind, monkeypatch):
    few = BUILD[kind](size=(120.0, 14.0))
    monkeypatch.setattr(defects, "DECAY", 12.0)
    many = BUILD[kind](size=(120.0, 14.0))
    np.testing.assert_allclose(few.positions, many.positions, atol=1e-9)
    monkeypatch.setattr(defects, "DECAY", 0.5)
    assert np.abs(BUILD[kind](size=(120.0, 14.0)).positions - many.positions).max() > 1e-4


def stress(atoms, component):
    atoms.calc = EMT()
    return abs(atoms.get_stress()[("xx", "yy", "zz", "yz", "xz", "xy").index(component)])


@pytest.mark.parametrize(
    ("kind", "row", "column", "component"), [("edge", 1, 0, "xy"), ("screw", 0, 2, "xz"), ("screw", 1, 2, "yz")]
)
def test_the_tilt_of_the_cell_takes_the_shear_away(kind, row, column, component):
    atoms = BUILD[kind](size=(40.0, 42.0), a=3.995)
    straight = atoms.copy()
    cell = atoms.cell.array.copy()
    assert abs(cell[row, column]) > 1.3
    cell[row, column] = 0
    straight.set_cell(cell, scale_atoms=True)
    assert stress(atoms, component) < 0.02 * stress(straight, component)


def test_large_dislocations_take_seconds():
    start = time.perf_counter()
    edge = defects.edge_dislocation(size=(200, 200), length=80)
    screw = defects.screw_dislocation(size=(200, 200), length=80)
    assert min(len(edge), len(screw)) > 180_000
    assert time.perf_counter() - start < 20


def test_a_file_keeps_what_is_known(tmp_path):
    atoms = defects.edge_dislocation()
    write(tmp_path / "edge.xyz", atoms)
    back = read(tmp_path / "edge.xyz")
    assert back.info["family"] == "al-edge"
    np.testing.assert_allclose(back.info["cores"], atoms.info["cores"])
    np.testing.assert_allclose(back.info["burgers"], atoms.info["burgers"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"symbol": "Fe"}, "Fe is not fcc"),
        ({"symbol": "Xx"}, "'Xx' is no element"),
        ({"a": -1.0}, "a -1.0 is not a length"),
        ({"size": (3.0, 28.0)}, r"width .* too small; give"),
        ({"size": (28.0, 3.0)}, r"height .* too small"),
        ({"size": 28.0}, "size 28.0 is not two lengths"),
        ({"size": (np.nan, 28.0)}, "width nan"),
        ({"size": (1e5, 1e5)}, "atoms are more than"),
        ({"length": 0.0}, "length 0.0"),
        ({"radius": 3.0}, "radius 3"),
        ({"radius": 20.0, "vacuum": -1.0}, "vacuum -1.0"),
    ],
)
@pytest.mark.parametrize("kind", ["edge", "screw"])
def test_bad_dislocations(kind, settings, message):
    with pytest.raises(StructureError, match=message) as caught:
        BUILD[kind](**settings)
    assert "\n" not in str(caught.value)


def test_poisson_ratio_out_of_range():
    with pytest.raises(StructureError, match=r"poisson 0\.5"):
        defects.edge_dislocation(poisson=0.5)


# -- grain boundaries ---------------------------------------------------------------------------------------------


def from_boundaries(atoms):
    height = atoms.cell[1, 1]
    apart = atoms.positions[:, 1][:, None] - atoms.info["boundaries"]
    return np.abs(apart - height * np.rint(apart / height)).min(axis=1)


@pytest.mark.parametrize(
    ("plane", "sigma", "count", "removed"),
    [((2, 1, 0), 5, 76, 8), ((3, 1, 0), 5, 58, 4), ((3, 2), 13, 96, None), ((5, 1, 0), 13, 100, 6)],
)
def test_tilt_boundary(plane, sigma, count, removed):
    atoms = defects.tilt_grain_boundary(plane=plane, a=A)
    h, k = plane[:2]
    assert atoms.info["sigma"] == sigma
    assert atoms.info["family"] == "al-tilt-gb"
    assert len(atoms) == count
    assert removed in (None, atoms.info["removed"])
    period = A * np.hypot(h, k) * (0.5 if h % 2 and k % 2 else 1.0)
    assert atoms.cell[0, 0] == pytest.approx(period)
    assert atoms.cell[1, 1] / (2 * period) == pytest.approx(round(18 / period))
    np.testing.assert_allclose(atoms.cell.angles(), 90)
    assert shortest(atoms) > 0.8 * NEAREST - 1e-9

    vectors, distance = bonds(atoms), from_boundaries(atoms)
    bulk = np.flatnonzero(distance > 4.0)
    assert len(bulk) > 10
    for i in bulk:
        assert len(vectors[i]) == 12
        np.testing.assert_allclose(np.linalg.norm(vectors[i], axis=1), NEAREST, atol=1e-9)
    assert any(len(vectors[i]) != 12 for i in np.flatnonzero(distance < 2))

    # Grain by grain: the twelve neighbours of one, turned about z by 2 atan(k / h), are those of the other.
    low, high = atoms.info["boundaries"]
    inside = (atoms.positions[:, 1] > low) & (atoms.positions[:, 1] < high)
    one = vectors[bulk[inside[bulk]][0]]
    other = vectors[bulk[~inside[bulk]][0]]
    turn = 2 * np.arctan2(k, h)
    rotation = np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1]])
    mismatch = lambda a, b: cKDTree(a).query(b)[0].max()  # noqa: E731
    assert min(mismatch(one @ rotation, other), mismatch(one @ rotation.T, other)) < 1e-9
    assert mismatch(one, other) > 0.3

    # The lattices of both share one site in Sigma.
    n = np.arange(-20, 21)
    whole = np.stack(np.meshgrid(n, n, [0]), -1).reshape(-1, 3)
    sites = whole[whole.sum(axis=1) % 2 == 0]
    turned = sites @ rotation
    shared = np.all(np.abs(turned - np.rint(turned)) < 1e-9, axis=1) & (np.rint(turned).sum(axis=1) % 2 == 0)
    assert shared.mean() == pytest.approx(1 / sigma, rel=0.1)


def test_both_boundaries_are_alike():
    atoms = defects.tilt_grain_boundary(a=A, width=18, depth=8)
    assert len(atoms) == 4 * 76
    counts = np.array([len(v) for v in bonds(atoms)])
    near = [np.abs(atoms.positions[:, 1] - y) < 6 for y in atoms.info["boundaries"]]
    first, second = (np.sort(counts[chosen]) for chosen in near)
    np.testing.assert_array_equal(first, second)
    assert first.min() < 12


def test_gap_shift_and_distance():
    plain = defects.tilt_grain_boundary(a=A)
    apart = defects.tilt_grain_boundary(a=A, gap=3.0)
    assert apart.cell[1, 1] == pytest.approx(plain.cell[1, 1] + 6)
    assert apart.info["removed"] == 0
    # Two planes of sites face each other across each gap, with nothing between.
    for y in apart.info["boundaries"]:
        heights = apart.positions[:, 1] - y
        assert heights[heights > 0].min() == pytest.approx(1.5)
        assert heights[heights < 0].max() == pytest.approx(-1.5)
    moved = defects.tilt_grain_boundary(a=A, gap=3.0, shift=(0.7, 0.4))
    difference = moved.positions - apart.positions
    difference -= np.rint(difference @ np.linalg.inv(apart.cell.array)) @ apart.cell.array
    half = len(apart) // 2
    np.testing.assert_allclose(difference[:half], 0, atol=1e-9)
    np.testing.assert_allclose(difference[half:], np.tile([0.7, 0, 0.4], (half, 1)), atol=1e-9)
    for distance in (0.5, 1.5, 2.7):
        assert shortest(defects.tilt_grain_boundary(plane=(3, 1), a=A, min_distance=distance)) > distance
    assert shortest(defects.tilt_grain_boundary(plane=(3, 1), a=A, min_distance=0.5)) < 1.3


def test_large_boundary_takes_seconds():
    start = time.perf_counter()
    atoms = defects.tilt_grain_boundary(grain=150, width=100, depth=110)
    assert len(atoms) > 190_000
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plane": (1, 1, 0)}, "no tilt boundary"),
        ({"plane": (4, 2, 0)}, "no tilt boundary"),
        ({"plane": (2, 0, 0)}, "no tilt boundary"),
        ({"plane": (2, 1, 1)}, "no tilt boundary"),
        ({"plane": (2.5, 1, 0)}, "no tilt boundary"),
        ({"plane": (2,)}, "no tilt boundary"),
        ({"grain": 1.0}, "grain 1 angstrom is too small"),
        ({"width": -4.0}, "width -4.0"),
        ({"min_distance": 3.0}, "min_distance 3.0"),
        ({"min_distance": np.nan}, "min_distance nan"),
        ({"gap": -1.0}, "gap -1.0"),
        ({"shift": (1.0,)}, "shift"),
        ({"symbol": "Si"}, "Si is not fcc"),
        ({"grain": 1e6, "width": 1e5}, "atoms are more than"),
    ],
)
def test_bad_boundaries(settings, message):
    with pytest.raises(StructureError, match=message) as caught:
        defects.tilt_grain_boundary(**settings)
    assert "\n" not in str(caught.value)
