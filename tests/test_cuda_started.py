"""Tiles of the scalar-product descriptors that are begun and not waited for, under Numba's CUDA simulator.

The simulator is switched on before Numba is imported, so the cases run in a process of their own: this file as a
script. The device's memory is the host's there, and torch's tensors lie in it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from gpurho.descriptors import DescriptorSpec, Environment
from gpurho.grid import Grid
from gpurho.partition import make_tiles
from gpurho.structure import Structure

COUNTS = ("n_capped", "n_tied", "n_exact")


def triclinic():
    """Atoms of two species in a sheared cell of random vectors, their specification, and a tile of a grid.

    One atom lies at a point of the tile, and two at opposite sides of another: the one takes the exact path, the other
    has a tie.
    """
    rng = np.random.default_rng(7)
    cell = np.diag([9.0, 8.0, 10.0]) + rng.normal(0, 1, (3, 3))
    grid = Grid((20, 18, 22), cell)
    tile = make_tiles(grid, (3, 4, 3))[0]
    points = grid.points(tile.start, tile.stop)
    away = np.array([0.9, -0.5, 0.3])
    fixed = [points[20], points[33] + away, points[33] - away]
    free: list[np.ndarray] = []
    while len(free) < 24:
        one = rng.random(3) @ cell
        shifts = np.array([[i, j, k] for i in (-1, 0, 1) for j in (-1, 0, 1) for k in (-1, 0, 1)]) @ cell
        others = np.array(fixed + free)
        if np.linalg.norm((others - one)[:, None] + shifts, axis=2).min() > 1.4:
            free.append(one)
    symbols = ["Si", "Ge", "Ge", *rng.permutation(["Si", "Ge"] * 12)]
    spec = DescriptorSpec(("Si", "Ge"), n_distances=8, n_angle_atoms=3, n_angle_neighbors=2, n_cross=2, cutoff=4.6)
    return Atoms(symbols, fixed + free, cell=cell, pbc=True), spec, grid, tile


def vacuum():
    """A tile without an atom near, of distances alone: no array of atoms or neighbours has an entry."""
    grid = Grid((20, 20, 20), np.eye(3) * 20)
    tile = make_tiles(grid, (2, 2, 2))[-1]
    return Atoms("Al", [[1, 1, 1]], cell=grid.cell), DescriptorSpec(("Al",), 3, 0, 0, cutoff=4.0), grid, tile


def environment(atoms, spec):
    """An environment on the simulator's device."""
    import torch
    from numba import cuda
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray

    from gpurho.kernels._cuda_driver import Workspace
    from gpurho.kernels.celllist import SpeciesCells
    from gpurho.kernels.cuda import CudaFeatures
    from gpurho.kernels.scalar_product import NeighborArrays

    class Simulated(CudaFeatures):
        """Uploads are Numba's own, tensors are used where they lie."""

        def __init__(self, neighbors, sizes):
            self.device, self.sizes, self.workspace = torch.device("cpu"), sizes, Workspace()
            self._batches, self._mesh = {}, None
            packed = neighbors.start, neighbors.vectors, neighbors.distances, neighbors.bonds, neighbors.tied
            self._neighbors = NeighborArrays(*map(self._upload, packed))

        def _upload(self, array, kept=False):
            return cuda.to_device(np.array(array))

        def _on_stream(self, points, cells, work_on):
            there = map(self._upload, (cells.positions, cells.owners, cells.start))
            cells = SpeciesCells(*there, cells.origin, cells.edge, cells.shape)
            return work_on(FakeCUDAArray(points.numpy()), cells, self._workspace(), 0)

        def _workspace(self):
            return self.workspace

        def _begin(self, points, batches, cells, out, marks, work, stream):
            out, marks = (FakeCUDAArray(x.numpy()) for x in (out, marks))
            return super()._begin(points, batches, cells, out, marks, work, stream)

    made = Environment(Structure.from_ase(atoms), spec)
    made._cuda = Simulated(made._neighbors, made._sizes)
    return made


def _out_of_memory():
    """What becomes of launches that find no memory once, always, or fail otherwise."""
    from gpurho.errors import DeviceError
    from gpurho.kernels._cuda_driver import begun

    def launch(*failures):
        left = list(failures)

        def run(device):
            if left:
                raise RuntimeError(left.pop(0))
            return "done"

        try:
            return begun(run, 7)
        except (DeviceError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"

    full = "[CUresult.CUDA_ERROR_OUT_OF_MEMORY] Call to cuMemAlloc"
    return [launch(full), launch(full, full), launch("other"), launch(full, "other")]


def _simulate_all(path):
    import torch
    from cuda_copies import copies

    results = {}

    def tried(label, environment, grid, tile):
        """Begin a tile once: its values, its counts where they are known, and the copies."""
        out = torch.full((tile.n_points, environment.spec.n_features), torch.nan)
        with copies() as seen:
            made = environment.start_tile(grid, tile, out)
        found = made.settle(made.marks.numpy())
        known = [] if found is None else [getattr(found, name) for name in COUNTS]
        results[f"{label} values"], results[f"{label} counts"] = out.numpy(), np.array(known, int)
        results[f"{label} copies"] = np.array(seen, str)
        results[f"{label} most"] = made.marks.numpy()[-1]

    atoms, spec, grid, tile = triclinic()
    there = environment(atoms, spec)
    sizes = there._cuda.workspace.sizes
    for label in ("first", "second", "third"):
        tried(label, there, grid, tile)
    sizes["room"] = results["third most"].item() - 3
    tried("less room", there, grid, tile)
    results["next room"] = np.array(sizes["room"])
    tried("more room", there, grid, tile)
    sizes["classes"] = 0
    tried("other class", there, grid, tile)
    tried("both classes", there, grid, tile)
    results["launches"] = np.array(_out_of_memory())
    atoms, spec, grid, tile = vacuum()
    there = environment(atoms, spec)
    for label in ("empty first", "empty", "empty again"):
        tried(label, there, grid, tile)
    np.savez(path, **results)


@pytest.fixture(scope="module")
def simulated(tmp_path_factory):
    path = tmp_path_factory.mktemp("simulator") / "features.npz"
    # The fast path divides by zero where an atom lies at the point, before the exact one replaces its result.
    command = [sys.executable, "-W", "ignore::RuntimeWarning", str(Path(__file__).resolve()), str(path)]
    environment = {**os.environ, "NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with np.load(path) as results:
        return dict(results)


@pytest.fixture(scope="module")
def expected():
    atoms, spec, grid, tile = triclinic()
    return Environment(Structure.from_ase(atoms), spec).tile_features(grid, tile)


def test_begun_tiles_have_the_features_and_counts_of_the_cpu(simulated, expected):
    _, spec, _, tile = triclinic()
    assert all(0 < getattr(expected, name) < tile.n_points for name in COUNTS)
    for label in ("second", "third"):
        assert simulated[f"{label} counts"].tolist() == [getattr(expected, name) for name in COUNTS]
        difference = np.abs(simulated[f"{label} values"] - expected.values)
        is_distance = np.array([column.startswith("d_") for column in spec.feature_names()])
        assert difference[:, is_distance].max() < 2e-5
        assert difference[:, ~is_distance].max() < 1e-4
    assert np.array_equal(simulated["second values"], simulated["third values"])


def test_the_first_tile_tells_what_the_next_ones_need(simulated):
    assert simulated["first counts"].size == 0
    assert np.isnan(simulated["first values"]).all()


def test_only_atoms_are_copied(simulated):
    """The three arrays of the atoms; those of the neighbours, the batches and the networks are there from before."""
    for label in ("third", "less room", "other class", "empty again"):
        assert simulated[f"{label} copies"].tolist() == ["to_device"] * 3


def test_a_launch_without_memory_is_tried_once_more(simulated):
    once, always, other, then_other = simulated["launches"].tolist()
    assert once == "done"
    assert always == "DeviceError: the GPU's memory does not hold the descriptors of 7 points; use smaller tiles"
    assert other == then_other == "RuntimeError: other"


def test_too_little_room_is_noticed_and_grows(simulated):
    assert simulated["less room counts"].size == 0
    # Only the points of the exact path were left out.
    left = np.isnan(simulated["less room values"]).any(axis=1)
    assert 0 < left.sum() <= simulated["third counts"][COUNTS.index("n_exact")]
    assert simulated["next room"] > simulated["third most"]
    assert np.array_equal(simulated["more room values"], simulated["third values"])
    assert np.array_equal(simulated["more room counts"], simulated["third counts"])


def test_a_class_of_batches_that_no_tile_had_before_is_noticed(simulated):
    assert simulated["other class counts"].size == 0
    assert np.isnan(simulated["other class values"]).any()
    assert np.array_equal(simulated["both classes values"], simulated["third values"])
    assert np.array_equal(simulated["both classes counts"], simulated["third counts"])


def test_a_tile_without_atoms(simulated):
    _, spec, _, tile = vacuum()
    assert simulated["empty counts"].tolist() == [tile.n_points, 0, tile.n_points]
    assert (simulated["empty values"] == spec.cutoff).all()


if __name__ == "__main__":
    _simulate_all(sys.argv[1])
