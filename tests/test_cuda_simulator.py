"""The CUDA drivers under Numba's simulator, against the float64 oracle; the sorting networks on the CPU.

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
from oracles import features as oracle

from gpurho.descriptors import DescriptorSpec

SMALL = {"n_distances": 8, "n_angle_atoms": 4, "n_angle_neighbors": 3}


def _rattled(atoms, seed, amplitude=0.1):
    atoms.positions += np.random.default_rng(seed).normal(0, amplitude, atoms.positions.shape)
    return atoms


def cases():
    """Name -> (atoms, points, spec, points per batch or None for cubes, expected n_exact or None)."""
    rng = np.random.default_rng(11)
    al = DescriptorSpec(("Al",), **SMALL)
    sige = DescriptorSpec(("Si", "Ge"), **SMALL, n_cross=3)
    crystal = _rattled(bulk("Al", "fcc", 4.05, cubic=True).repeat(2), 0)
    alloy = _rattled(bulk("Si", "diamond", 5.5, cubic=True).repeat(2), 1)
    alloy.symbols[rng.permutation(64)[:32]] = "Ge"
    triclinic = Atoms("Al3", [[0, 0, 0], [0, 0, 0], [1, 2, 0.5]], cell=[[3, 0.5, 0], [0, 4, 1], [0.3, 0, 3.5]])
    triclinic.pbc = [True, False, True]
    cluster = Atoms("Al12", rng.uniform(0, 5, (12, 3)), cell=np.eye(3) * 20)
    near = rng.uniform(0, 0.7, (9, 3))
    return {
        "crystal": (crystal, rng.uniform(0, 1.5, (20, 3)), al, None, 0),
        "alloy": (alloy, rng.uniform(0, 0.8, (12, 3)), sige, None, 0),
        "one species absent": (crystal, near, DescriptorSpec(("Al", "Si"), **SMALL, n_cross=2), None, 9),
        "equal distances": (
            bulk("SiGe", "zincblende", 5.54),
            np.concatenate([[[0, 0, 0], [0.6925, 0.6925, 0.6925]], rng.uniform(0, 0.7, (3, 3))]),
            sige,
            5,
            5,
        ),
        "fcc sites": (bulk("Al", "fcc", 4.05), np.array([[0, 0, 0], [2.025] * 3, [1.0125] * 3]), al, 3, 3),
        # Half way between two atoms whose own neighbours are at different distances.
        "equal distances alone": (crystal, crystal.positions[[1, 2, 3]] / 2 + crystal.positions[0] / 2, al, 3, 3),
        "single atom": (Atoms("Al", [[5, 5, 5]], cell=np.eye(3) * 10), np.array([[5, 5, 6.5], [90, 0, 0]]), al, 1, 2),
        "coincident atoms, triclinic": (
            triclinic,
            np.array([[0, 0, 0], [1, 1, 1.0], [0.2, 0.1, 0.3]]),
            DescriptorSpec(("Al",), n_distances=9, n_angle_atoms=8, n_angle_neighbors=4, cutoff=5.0),
            3,
            3,
        ),
        # Twelve atoms for twenty ranks: the network is filled up, and the missing distances are the cutoff.
        "missing ranks": (
            cluster,
            2.2 + near,
            DescriptorSpec(("Al",), n_distances=20, n_angle_atoms=3, n_angle_neighbors=2, cutoff=9.0),
            9,
            0,
        ),
        "atom near the point": (crystal, crystal.positions[:1] + np.array([0.01, 0, 0.02]), al, 1, 1),
        # Points so far apart that their common candidates exceed every network.
        "wide batch": (crystal, np.array([[0.3, 0.2, 0.1], [6.2, 7.1, 5.9]]), al, 2, 2),
        # More ranks than shared memory holds: no network serves the specification.
        "many ranks": (crystal, near[:1], DescriptorSpec(("Al",), 200, 4, 2, cutoff=10.0), 1, 1),
        "distances only": (crystal, near, DescriptorSpec(("Al",), 5, 0, 0), 9, 0),
    }


def simulate(atoms, points, spec, batch, known=True):
    """Features and counts by the CUDA drivers: (values, (n_capped, n_tied, n_exact)).

    Where it is `known` what points may need, the driver need not find it out by doing them again.
    """
    from numba import cuda

    from gpurho.kernels._cuda_driver import Workspace
    from gpurho.kernels._cuda_sources import class_sizes
    from gpurho.kernels.batches import Batches, point_batches
    from gpurho.kernels.celllist import SpeciesCells, atoms_around, bin_atoms, species_cells
    from gpurho.kernels.cuda import scalar_product_features
    from gpurho.kernels.scalar_product import TIE_TOLERANCE, NeighborArrays, pack_neighbors
    from gpurho.neighbors import nearest_table
    from gpurho.structure import Structure

    there = cuda.to_device
    structure = Structure.from_ase(atoms)
    species = spec.species_index(structure)
    table = nearest_table(structure, species, spec.n_angle_neighbors, spec.cutoff, TIE_TOLERANCE)
    packed = pack_neighbors(table.start, table.vectors, table.distances, spec.n_angle_neighbors)
    neighbors = NeighborArrays(
        *(there(x) for x in (packed.start, packed.vectors, packed.distances, packed.bonds, packed.tied))
    )
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
    sizes = spec._sizes()
    work = Workspace(sizes={"room": 2000, "classes": (1 << len(class_sizes(sizes))) - 1}) if known else None
    counts = scalar_product_features(there(points), batches, cells, neighbors, sizes, out, work)
    return out.copy_to_host(), counts


def _simulate_all(path):
    results = {}
    for name, (atoms, points, spec, batch, _) in cases().items():
        values, counts = simulate(atoms, points, spec, batch)
        results[name], results[name + " counts"] = values, counts
    results["found out"], results["found out counts"] = simulate(*cases()["equal distances alone"][:4], known=False)
    np.savez(path, **results)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulator") / "features.npz"
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    # Ties and atoms at the point divide by zero in the fast path, before the exact one replaces its result.
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(Path(__file__).resolve()), str(path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as results:
        return dict(results)


@pytest.mark.parametrize("name", cases())
def test_the_cuda_drivers_agree_with_the_oracle(simulated, name):
    atoms, points, spec, _, n_exact = cases()[name]
    values, (capped, tied, exact) = simulated[name], simulated[name + " counts"]
    expected, touched = oracle(atoms.positions, atoms.get_chemical_symbols(), atoms.cell.array, atoms.pbc, points, spec)
    is_distance = np.array([column.startswith("d_") for column in spec.feature_names()])
    assert np.abs(values[:, is_distance] - expected[:, is_distance]).max() < 1e-5
    assert np.abs(values[:, ~is_distance] - expected[:, ~is_distance]).max(initial=0) < 1e-4
    assert exact == n_exact
    assert tied == touched.sum()
    width = spec.n_distances + spec.n_angle_atoms * spec.n_angle_neighbors
    last = expected[:, [s * width + spec.n_distances - 1 for s in range(len(spec.species))]]
    assert capped == np.any(last >= spec.cutoff, axis=1).sum()


def test_a_new_workspace_finds_out_what_points_need(simulated):
    assert np.array_equal(simulated["found out"], simulated["equal distances alone"])
    assert np.array_equal(simulated["found out counts"], simulated["equal distances alone counts"])


@pytest.mark.parametrize(("n_inputs", "keep"), [(32, 9), (32, 32), (80, 60), (96, 60), (112, 17), (224, 60)])
def test_the_pruned_networks_sort(n_inputs, keep):
    from gpurho.kernels._cuda_network import outputs_of

    keys = np.random.default_rng(n_inputs).permuted(np.tile(np.arange(n_inputs), (200, 1)), axis=1)
    rows = list(keys.T)
    for i, j, smaller, larger in outputs_of(n_inputs, keep):
        low, high = np.minimum(rows[i], rows[j]), np.maximum(rows[i], rows[j])
        # An output that is not wanted is left as it was: nothing may read it.
        rows[i], rows[j] = (low if smaller else np.full_like(low, -1)), (high if larger else np.full_like(high, -1))
    assert np.array_equal(np.array(rows[:keep]).T, np.tile(np.arange(keep), (200, 1)))


@pytest.mark.parametrize(("n_inputs", "n_fine", "n_sorted"), [(32, 9, 20), (64, 16, 60)])
def test_the_code_given_to_llvm_does_what_the_simulated_sorter_does(n_inputs, n_fine, n_sorted):
    from numba import int32, njit
    from numba.extending import intrinsic

    from gpurho.kernels._cuda_network import LANES_STRIDE, PAD_KEY, make_sorter, simulated_sorter

    emitted = make_sorter(n_inputs, n_fine, n_sorted, intrinsic)
    simulated_sort = simulated_sorter(n_inputs, n_fine, n_sorted)

    @njit
    def run(quads, x, y, z, lane, nearest, table):
        emitted(quads, x, y, z, int32(lane), nearest, table)

    rng = np.random.default_rng(5)
    for lane in range(5):
        quads = rng.uniform(-20000, 20000, (n_inputs, 4)).astype(np.float32)
        quads[:, 3] = 0
        quads[n_inputs - 5 :] = (0, 0, 0, PAD_KEY)
        point = rng.uniform(-500, 500, 3).astype(np.float32)
        results = []
        for sort in (run, simulated_sort):
            nearest = np.zeros(n_fine * LANES_STRIDE, np.int32)
            table = np.zeros(n_sorted * LANES_STRIDE, np.float32)
            sort(quads.ravel(), *point, lane, nearest, table)
            results.append((nearest, table))
        exact = np.sort(((quads[:-5, :3].astype(float) - point) ** 2).sum(axis=1))
        (nearest, table), (expected_nearest, expected_table) = results
        assert np.array_equal(nearest, expected_nearest)
        assert np.count_nonzero(nearest[lane::LANES_STRIDE]) >= n_fine - 1
        # Contracted multiplications and additions may round the last bits of the key otherwise.
        assert np.abs(table - expected_table).max() <= 2.0**8
        found = table[lane::LANES_STRIDE][n_fine : len(exact)]
        assert np.allclose(found, exact[n_fine : len(found) + n_fine], atol=2.0**8, rtol=1e-6)


if __name__ == "__main__":
    _simulate_all(sys.argv[1])
