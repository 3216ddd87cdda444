"""Structures: what is refused and how it is said; overlaps against brute force."""

from __future__ import annotations

import numpy as np
import pytest
from ase.build import bulk
from hypothesis import given
from hypothesis import strategies as st

from gpurho.errors import StructureError
from gpurho.structure import Structure, as_structure, cell_heights

CELL = np.array([[4.0, 0.3, 0.1], [0.5, 5.0, -0.4], [-0.2, 0.8, 6.0]])


def test_from_and_to_ase():
    atoms = bulk("Al", "fcc", a=4.05, cubic=True)
    structure = as_structure(atoms)
    assert as_structure(structure) is structure
    back = structure.to_ase()
    np.testing.assert_array_equal(back.positions, atoms.positions)
    assert back.pbc.all()
    assert structure.symbols == ("Al",)
    assert len(structure) == 4
    assert structure.volume == pytest.approx(4.05**3)
    with pytest.raises(StructureError, match="list"):
        as_structure([1, 2])


def test_is_frozen_and_its_own():
    positions = np.zeros((1, 3))
    structure = Structure(positions, [13], CELL, [True] * 3)
    positions[0, 0] = 1
    assert structure.positions[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        structure.positions[0, 0] = 2


def test_fingerprint_sees_everything():
    base = {"positions": [[0, 0, 0], [2, 2, 2]], "numbers": [13, 14], "cell": CELL, "pbc": [True, True, False]}
    prints = {Structure(**base).fingerprint()}
    for change in (
        {"positions": [[0, 0, 0], [2, 2, 2 + 1e-13]]},
        {"numbers": [14, 13]},
        {"cell": CELL + 1e-13},
        {"pbc": [True, False, True]},
    ):
        prints.add(Structure(**(base | change)).fingerprint())
    assert len(prints) == 5
    assert Structure(**base).fingerprint() in prints


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"positions": [[0, 0]]}, "shape"),
        ({"positions": np.empty((0, 3)), "numbers": []}, "no atoms"),
        ({"positions": [[0, 0, np.nan]]}, "atom 0"),
        ({"positions": [[0, 0, 1e9]]}, "the unit is angstrom"),
        ({"positions": "here"}, "positions"),
        ({"numbers": [13, 14]}, "one each"),
        ({"numbers": [0]}, "atomic number 0"),
        ({"numbers": [119]}, "atomic number 119"),
        ({"numbers": [13.5]}, "not whole"),
        ({"numbers": [np.nan]}, "numbers"),
        ({"cell": np.eye(2)}, "shape"),
        ({"cell": np.full((3, 3), np.inf)}, "not finite"),
        ({"cell": np.zeros((3, 3))}, "no volume"),
        ({"cell": [[1, 0, 0], [0, 1, 0], [1, 1, 0]]}, "no volume"),
        ({"pbc": [True]}, "pbc"),
    ],
)
def test_refusals(change, text):
    base = {"positions": [[0, 0, 0]], "numbers": [13], "cell": CELL, "pbc": [True] * 3}
    with pytest.raises(StructureError, match=text) as caught:
        Structure(**(base | change))
    assert "\n" not in str(caught.value)


def smallest_distance(structure: Structure, reach: int) -> float:
    """Brute force over images."""
    shifts = np.array(
        [
            [i, j, k]
            for i in range(-reach, reach + 1)
            for j in range(-reach, reach + 1)
            for k in range(-reach, reach + 1)
            if all(p or n == 0 for p, n in zip(structure.pbc, (i, j, k), strict=True))
        ]
    )
    best = np.inf
    for shift in shifts:
        d = np.linalg.norm(structure.positions[:, None] - structure.positions - shift @ structure.cell, axis=-1)
        if not shift.any():
            np.fill_diagonal(d, np.inf)
        best = min(best, d.min())
    return float(best)


@given(seed=st.integers(0, 10**6), n=st.integers(1, 4), pbc=st.tuples(st.booleans(), st.booleans(), st.booleans()))
def test_overlaps_match_brute_force(seed, n, pbc):
    rng = np.random.default_rng(seed)
    cell = rng.normal(size=(3, 3)) * 1.5
    if cell_heights(cell).min() < 0.5:
        cell += 3 * np.eye(3)
    if cell_heights(cell).min() < 0.5:
        return
    # Wrapped by a lattice vector that the brute force then does not need.
    structure = Structure(rng.uniform(0, 1, (n, 3)) @ cell, [13] * n, cell, pbc)
    distance = smallest_distance(structure, 4)
    shifted = Structure(structure.positions + (rng.integers(-3, 4, (n, 3)) * np.array(pbc)) @ cell, [13] * n, cell, pbc)
    for minimum in (0.3, 0.7, 1.5):
        if abs(distance - minimum) < 1e-9:
            continue
        for each in (structure, shifted):
            if distance < minimum:
                with pytest.raises(StructureError, match="apart"):
                    each.check_overlaps(minimum)
            else:
                each.check_overlaps(minimum)


def test_overlap_names_the_atoms():
    structure = Structure([[0, 0, 0], [2, 2, 2], [3.95, 0.3, 0.1]], [13] * 3, CELL, [True] * 3)
    with pytest.raises(StructureError, match=r"atoms 0 and 2 are 0\.05"):
        structure.check_overlaps(0.5)
    thin = Structure([[0, 0, 0]], [13], np.diag([0.4, 5, 5]), [True] * 3)
    with pytest.raises(StructureError, match=r"atom 0 and its periodic image are 0\.4"):
        thin.check_overlaps(0.5)
    Structure([[0, 0, 0]], [13], np.diag([0.4, 5, 5]), [False, True, True]).check_overlaps(0.5)
    same = Structure([[1, 1, 1], [1, 1, 1]], [13, 13], CELL, [True] * 3)
    with pytest.raises(StructureError, match="atoms 0 and 1 are 0 angstrom apart"):
        same.check_overlaps(0.5)


def test_cell_heights():
    np.testing.assert_allclose(cell_heights(np.diag([1.0, 2.0, 3.0])), [1, 2, 3])
    inverse = np.linalg.inv(CELL)
    np.testing.assert_allclose(cell_heights(CELL), 1 / np.linalg.norm(inverse, axis=0))
    assert cell_heights(np.zeros((3, 3))).tolist() == [0, 0, 0]
