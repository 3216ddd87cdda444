"""The CUDA driver of the smooth descriptors under Numba's simulator and its LLVM code on the CPU, against the oracle.

The simulator is switched on before Numba is imported, so the cases run in a process of their own: this file as a
script. It runs every CUDA thread as a Python thread, so the cases are small.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from oracles import smooth_features as oracle

from gpurho.descriptors import DescriptorSpec
from gpurho.errors import SettingsError

ACCURACY = 1e-5


def smooth(species, cutoff, *sizes, **more):
    return DescriptorSpec(
        species,
        family="smooth",
        cutoff=cutoff,
        **dict(zip(("n_radial", "n_basis", "l_max"), sizes, strict=False)),
        **more,
    )


def rattled(atoms, seed):
    atoms.positions += np.random.default_rng(seed).normal(0, 0.1, atoms.positions.shape)
    return atoms


def cases():
    """Name -> (atoms, points, spec, points per batch or None for cubes)."""
    rng = np.random.default_rng(11)
    crystal = rattled(bulk("Al", "fcc", 4.05, cubic=True).repeat(2), 0)
    alloy = rattled(bulk("Si", "diamond", 5.5, cubic=True), 1)
    alloy.symbols[rng.permutation(8)[:4]] = "Ge"
    triclinic = Atoms("Al3", [[0, 0, 0], [0, 0, 0], [1, 2, 0.5]], cell=[[3, 0.5, 0], [0, 4, 1], [0.3, 0, 3.5]])
    triclinic.pbc = [True, False, True]
    single = Atoms("Al", [[5, 5, 5]], cell=np.eye(3) * 10)
    distant = Atoms("Al4", rng.uniform(0, 3, (4, 3)) - 9e5, cell=np.eye(3) * 8)
    near = rng.uniform(0, 0.7, (5, 3))
    mixture = rng.normal(0, 0.4, (2, 3, 5))
    apart, mixture = (mixture + 3.0 * np.eye(3, 5)).tolist(), mixture.tolist()
    return {
        "crystal": (crystal, near, smooth(("Al",), 4.0), None),
        "alloy": (alloy, near, smooth(("Si", "Ge"), 3.5, 5, 3, 3), None),
        "combined channels": (alloy, near, smooth(("Si", "Ge"), 3.5, 5, 3, 2, contraction=mixture), 5),
        "a contraction taken apart": (alloy, near, smooth(("Si", "Ge"), 3.5, 5, 3, 2, contraction=apart), 5),
        "one species absent": (crystal, near, smooth(("Si", "Al"), 3.5, 4, 2, 2), 3),
        "sums only": (crystal, near, smooth(("Al",), 4.0, 40, 0), 2),
        "several passes": (crystal, near[:3], smooth(("Al",), 3.0, 8, 8, 6), 3),
        # So many channels that the harmonics of one degree are shared between passes.
        "partial sums": (crystal, near[:2], smooth(("Al",), 3.0, 31, 31, 2), 1),
        "single atom": (single, np.array([[5, 5, 6.5], [90, 0, 0]]), smooth(("Al",), 5.0, 6, 2, 2), 1),
        "coincident atoms": (triclinic, np.array([[0, 0, 0], [1, 1, 1.0]]), smooth(("Al",), 4.0, 6, 2, 3), 2),
        "far from the origin": (distant, near - 9e5, smooth(("Al",), 5.0, 6, 2, 3), None),
        "many atoms": (bulk("Al", "fcc", 2.6), near[:2], smooth(("Al",), 5.0, 3, 1, 1), 2),
    }


def simulate(atoms, points, spec, batch):
    """Features and counts by the CUDA driver."""
    from gpurho.kernels.smooth_cuda import smooth_features

    arguments = on_device(atoms, points, spec, batch)
    counts = smooth_features(*arguments)
    return arguments[-1].copy_to_host(), counts


def on_device(atoms, points, spec, batch):
    """What `smooth_features` takes."""
    from numba import cuda

    from gpurho.kernels.batches import Batches, point_batches
    from gpurho.kernels.celllist import SpeciesCells, atoms_around, bin_atoms, species_cells
    from gpurho.structure import Structure

    there = cuda.to_device
    structure = Structure.from_ase(atoms)
    species = spec.species_index(structure)
    bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
    positions, owners = atoms_around(bins, points, spec.cutoff + 0.01)
    cells = species_cells(positions, owners, species[owners], len(spec.species))
    cells = SpeciesCells(
        there(cells.positions), there(cells.owners), there(cells.start), cells.origin, cells.edge, cells.shape
    )
    batches = point_batches(points)
    if batch is not None:
        start = np.append(np.arange(0, len(points), batch), len(points)).astype(np.int32)
        batches = Batches(np.arange(len(points), dtype=np.int32)[::-1].copy(), start, start)
    batches = Batches(there(np.array(batches.order)), there(np.array(batches.start)), batches.block_start)
    out = there(np.full((len(points), spec.n_features), np.nan, np.float32))
    return there(points), batches, cells, spec._sizes(), out


def started(atoms, points, spec, room):
    """Features, marks and copies between host and device of `start_smooth`, once its constants are there."""
    from cuda_copies import copies
    from numba import cuda

    from gpurho.kernels import smooth_cuda
    from gpurho.kernels._cuda_driver import Workspace

    arguments = on_device(atoms, points, spec, None)
    work = Workspace(sizes={"room": room})
    marks = cuda.to_device(np.zeros(smooth_cuda.N_MARKS, np.int32))
    smooth_cuda.start_smooth(*arguments, marks, work)
    with copies() as seen:
        smooth_cuda.start_smooth(*arguments, marks, work)
    found = marks.copy_to_host()
    return arguments[-1].copy_to_host(), found, seen, smooth_cuda.suffices(found, room, work), work.sizes["room"]


def _simulate_all(path):
    results = {}
    for name, case in cases().items():
        results[name], results[name + " counts"] = simulate(*case)
    atoms, points, spec, _ = cases()["alloy"]
    for label, room in (("enough", 96), ("too little", 1)):
        values, marks, seen, suffices, next_room = started(atoms, points, spec, room)
        results |= {f"{label} room": values, f"{label} marks": marks, f"{label} copies": np.array(seen, str)}
        results[f"{label} facts"] = np.array([suffices, next_room])
    np.savez(path, **results)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulator") / "features.npz"
    command = [sys.executable, str(Path(__file__).resolve()), str(path)]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as results:
        return dict(results)


def expected_of(atoms, points, spec):
    return oracle(atoms.positions, atoms.get_chemical_symbols(), atoms.cell.array, atoms.pbc, points, spec)


def assert_agrees(values, expected):
    scale = np.maximum(np.abs(expected).max(axis=0), 1.0)
    assert (np.abs(values - expected) / scale).max() < ACCURACY


def test_nothing_is_copied_between_the_atoms_and_the_features(simulated):
    assert simulated["enough copies"].tolist() == []
    assert np.array_equal(simulated["enough room"], simulated["alloy"])
    assert simulated["enough marks"][0] == simulated["alloy counts"][0]
    assert simulated["enough facts"].tolist() == [1, 96]


def test_too_little_room_is_noticed(simulated):
    suffices, room = simulated["too little facts"].tolist()
    most = simulated["too little marks"][-1]
    assert not suffices
    assert most == simulated["enough marks"][-1] > 1
    assert room >= most
    assert not np.array_equal(simulated["too little room"], simulated["alloy"])


@pytest.mark.parametrize("name", cases())
def test_the_cuda_driver_agrees_with_the_oracle(simulated, name):
    atoms, points, spec, _ = cases()[name]
    expected = expected_of(atoms, points, spec)
    assert_agrees(simulated[name], expected)
    n = len(spec.species) * spec.n_radial
    assert simulated[name + " counts"].tolist() == [(~expected[:, :n].any(axis=1)).sum(), 0, 0]


@pytest.mark.parametrize("name", ["crystal", "combined channels", "several passes", "partial sums", "single atom"])
def test_the_code_given_to_llvm_agrees_with_the_oracle(name):
    """What a CUDA thread computes, compiled for the CPU as it is for a device."""
    from numba import njit
    from numba.extending import intrinsic

    from gpurho.kernels import _smooth_cuda
    from gpurho.kernels._smooth_emit import Value
    from gpurho.kernels._smooth_formulas import DAMPING, UNIT
    from gpurho.kernels.celllist import atoms_around, bin_atoms
    from gpurho.structure import Structure

    atoms, points, spec, _ = cases()[name]
    sizes = spec._sizes()
    stride = _smooth_cuda.STRIDE

    def flush(table, columns, start, n, again, lane, order, first, n_lanes, out):
        for c in range(n):
            value = table[c * stride + lane]
            if again != 0:
                value += out[order[first], columns[start + c]]
            out[order[first], columns[start + c]] = value

    expander = _smooth_cuda.make_expander(sizes, flush, intrinsic, Value)

    @njit
    def run(quads, counts, x, y, z, inverse_square, damping, table, columns, order, out):
        zero = np.int32(0)
        return expander(
            quads, counts, np.int32(1), zero, x, y, z, inverse_square, damping, table, zero,
            columns, order, zero, np.int32(1), out,
        )  # fmt: skip

    def whole(x):
        return np.rint(np.asarray(x) / UNIT).astype(np.int64).astype(np.int32)

    structure = Structure.from_ase(atoms)
    bins = bin_atoms(structure.positions, structure.cell, structure.pbc)
    species = spec.species_index(structure)
    expected = expected_of(atoms, points, spec)
    table = np.empty(_smooth_cuda.STAGED * stride, np.float32)
    columns = np.array(_smooth_cuda.column_order(sizes), np.int32)
    for point, row in zip(points, expected, strict=True):
        positions, owners = atoms_around(bins, point[None], spec.cutoff)
        each = [positions[species[owners] == s] for s in range(len(spec.species))]
        quads = np.zeros((len(each), max(1, len(positions)), 4), np.int32)
        for s, own in enumerate(each):
            quads[s, : len(own), :3] = whole(own)
        counts = np.array([len(own) for own in each], np.int32)
        out = np.full((1, len(row)), np.nan, np.float32)
        inverse_square, damping = np.float32((UNIT / spec.cutoff) ** 2), np.float32((DAMPING / UNIT) ** 2)
        total = run(quads, counts, *whole(point), inverse_square, damping, table, columns, np.zeros(1, np.int32), out)
        assert (total == 0) == (not row.any())
        assert_agrees(out, row[None])


def test_the_passes_hold_every_harmonic_once_and_fit():
    from gpurho.kernels import _smooth_cuda
    from gpurho.kernels._smooth_formulas import columns

    for n_basis in range(1, 64, 3):
        for l_max in range(1, 9):
            sizes = smooth(("Al",), 5.0, 64, n_basis, l_max)._sizes()
            passes = _smooth_cuda.passes(sizes)
            keys = [key for share in passes for key in share.harmonics]
            assert sorted(keys) == sorted(columns(l_max))
            assert max(len(share.harmonics) for share in passes) * n_basis <= _smooth_cuda.MOST_SUMS
            assert [share.two_body for share in passes] == [True] + [False] * (len(passes) - 1)
    with pytest.raises(SettingsError, match="n_basis 64 for 3 species"):
        _smooth_cuda.passes(smooth(("Al", "Si", "Ge"), 5.0, 64, 64, 1)._sizes())


if __name__ == "__main__":
    _simulate_all(sys.argv[1])
