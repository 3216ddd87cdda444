"""CUDA against the CPU on a device (marked `gpu`), and the refusals without one."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import numpy as np
import pytest
import torch
from ase.build import bulk, fcc111

from gpurho.descriptors import DescriptorSpec, Environment
from gpurho.errors import DeviceError, MissingDependencyError, SettingsError
from gpurho.grid import Grid
from gpurho.kernels.scalar_product import FeatureSizes, NeighborArrays
from gpurho.partition import make_tiles
from gpurho.structure import Structure

HAS_GPU = torch.cuda.is_available() and importlib.util.find_spec("numba_cuda") is not None
skip = pytest.mark.skipif(not HAS_GPU, reason="no CUDA device, or numba-cuda is not installed")


def on_gpu(test):
    """Marks a test that needs a device."""
    return pytest.mark.gpu(skip(test))


AL = DescriptorSpec(("Al",))
SIGE = DescriptorSpec(("Si", "Ge"), n_cross=4)


def systems():
    """Name -> (atoms, spec, spacing)."""
    rng = np.random.default_rng(4)
    rattled = bulk("Al", "fcc", 4.05, cubic=True).repeat(3)
    rattled.positions += rng.normal(0, 0.1, rattled.positions.shape)
    sheared = rattled.copy()
    sheared.set_cell(rattled.cell.array @ np.array([[1, 0.3, 0], [0, 1, -0.2], [0.1, 0, 1]]), scale_atoms=True)
    alloy = bulk("Si", "diamond", 5.5, cubic=True).repeat(2)
    alloy.symbols[rng.permutation(64)[:32]] = "Ge"
    alloy.positions += rng.normal(0, 0.1, alloy.positions.shape)
    slab = fcc111("Al", (3, 3, 4), vacuum=12.0)
    slab.positions += rng.normal(0, 0.05, slab.positions.shape)
    return {
        "rattled": (rattled, AL, 0.3),
        "sheared": (sheared, AL, 0.35),
        "coarse grid": (rattled, AL, 0.9),
        "perfect": (bulk("Al", "fcc", 4.05, cubic=True), AL, 0.5),
        "vacancy": (bulk("Al", "fcc", 4.05, cubic=True).repeat(3)[1:], AL, 0.6),
        "slab": (slab, AL, 0.5),
        "alloy": (alloy, SIGE, 0.4),
        "zincblende": (bulk("SiGe", "zincblende", 5.54), SIGE, 0.5),
    }


def both(name, shape=(24, 24, 24)):
    atoms, spec, spacing = systems()[name]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, shape)[0]
    return [Environment(structure, spec, device).tile_features(grid, tile) for device in ("cpu", "cuda")], spec


@on_gpu
@pytest.mark.parametrize("name", systems())
def test_cuda_agrees_with_the_cpu(name):
    (cpu, cuda), spec = both(name)
    assert cuda.values.device.type == "cuda"
    assert cuda.values.dtype == torch.float32
    difference = np.abs(cuda.values.cpu().numpy() - cpu.values)
    is_distance = np.array([column.startswith("d_") for column in spec.feature_names()])
    assert difference[:, is_distance].max() < 2e-5
    assert difference[:, ~is_distance].max() < 1e-4
    # Points within rounding of a flag's threshold may take either path.
    assert abs(cuda.n_exact - cpu.n_exact) <= 2 + 0.01 * len(cpu.values) or name == "coarse grid"
    assert cuda.n_capped == pytest.approx(cpu.n_capped, abs=2)


SMOOTH = {
    "rattled": DescriptorSpec(("Al",), family="smooth", cutoff=5.0),
    "sheared": DescriptorSpec(("Al",), family="smooth", cutoff=6.5, n_radial=24, n_basis=8, l_max=6),
    "coarse grid": DescriptorSpec(("Al",), family="smooth", cutoff=5.0, n_basis=0),
    "perfect": DescriptorSpec(("Al",), family="smooth", cutoff=4.0, n_radial=5, n_basis=2, l_max=1),
    "slab": DescriptorSpec(("Al",), family="smooth", cutoff=5.0),
    "alloy": DescriptorSpec(("Si", "Ge"), family="smooth", cutoff=5.0),
    "zincblende": DescriptorSpec(
        ("Si", "Ge"),
        family="smooth",
        cutoff=5.0,
        n_radial=6,
        n_basis=3,
        contraction=np.random.default_rng(0).normal(0, 0.4, (2, 3, 6)).tolist(),
    ),
}


@on_gpu
@pytest.mark.parametrize("name", SMOOTH)
def test_smooth_cuda_agrees_with_the_cpu(name):
    atoms, _, spacing = systems()[name]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, (24, 24, 24))[-1]
    cpu, cuda = (Environment(structure, SMOOTH[name], d).tile_features(grid, tile) for d in ("cpu", "cuda"))
    assert cuda.values.device.type == "cuda"
    scale = np.maximum(np.abs(cpu.values).max(axis=0), 1.0)
    assert (np.abs(cuda.values.cpu().numpy() - cpu.values) / scale).max() < 1e-5
    # A point may have an atom within rounding of the cutoff.
    assert cuda.n_capped == pytest.approx(cpu.n_capped, abs=2)
    assert cuda.n_tied == cuda.n_exact == 0


@on_gpu
@pytest.mark.parametrize("name", ["sheared", "alloy"])
def test_smooth_tiles_have_the_bits_of_the_grid_on_a_gpu(name):
    atoms, _, spacing = systems()[name]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    environment = Environment(structure, SMOOTH[name], "cuda")
    tile = make_tiles(grid, (17, 18, 19))[0]
    whole = environment.tile_features(grid, tile).values.reshape(*tile.shape, -1)
    assert torch.equal(environment.tile_features(grid, tile).values.reshape(whole.shape), whole)
    region = list(zip(tile.start, tile.stop, strict=True))
    for part in make_tiles(grid, (5, 18, 7), region=region):
        piece = environment.tile_features(grid, part).values.reshape(*part.shape, -1)
        assert torch.equal(piece, whole[part.slices])


@on_gpu
def test_results_are_the_same_bits_each_time_and_on_other_streams():
    first = both("rattled")[0][1].values
    atoms, spec, spacing = systems()["rattled"]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, (24, 24, 24))[0]
    environment = Environment(structure, spec, "cuda")
    out = torch.empty_like(first)
    with torch.cuda.stream(torch.cuda.Stream()):
        again = environment.tile_features(grid, tile, out)
        torch.cuda.current_stream().synchronize()
    assert again.values.data_ptr() == out.data_ptr()
    assert torch.equal(first, out)


@on_gpu
def test_points_one_by_one_equal_the_tile():
    atoms, spec, spacing = systems()["alloy"]
    structure = Structure.from_ase(atoms)
    grid = Grid.from_spacing(structure.cell, spacing)
    tile = make_tiles(grid, (9, 10, 11))[0]
    environment = Environment(structure, spec, "cuda")
    whole = environment.tile_features(grid, tile).values
    points = grid.points(tile.start, tile.stop)
    for pick in (slice(0, 1), slice(5, 200), slice(17, 900, 31)):
        assert torch.allclose(environment.point_features(points[pick]).values, whole[pick], atol=1e-4)
    assert environment.point_features(np.zeros((0, 3))).values.shape == (0, spec.n_features)


@on_gpu
def test_wrong_outputs_and_devices_are_refused_on_a_gpu():
    atoms, spec, _ = systems()["perfect"]
    structure = Structure.from_ase(atoms)
    environment = Environment(structure, spec, "cuda")
    with pytest.raises(SettingsError, match="float32"):
        environment.point_features(np.zeros((2, 3)), torch.empty((2, spec.n_features)))
    with pytest.raises(DeviceError, match="cuda:99"):
        Environment(structure, spec, "cuda:99")


@pytest.mark.skipif(HAS_GPU, reason="this machine has a CUDA device")
def test_cuda_without_a_device_is_refused():
    structure = Structure.from_ase(bulk("Al", "fcc", 4.05))
    with pytest.raises((DeviceError, MissingDependencyError), match="CUDA"):
        Environment(structure, AL, "cuda")


def test_other_devices_are_refused():
    with pytest.raises(DeviceError, match="tpu"):
        Environment(Structure.from_ase(bulk("Al", "fcc", 4.05)), AL, "tpu")


def test_points_made_on_the_device_have_the_bits_of_the_grid():
    from types import SimpleNamespace

    from gpurho.kernels.cuda import CudaFeatures

    grid = Grid((13, 9, 11), [[8.1, 0.3, 0], [0.1, 7.7, -1], [0, 2, 9.3]], origin=(0.3, -0.2, 7.0))
    start, stop = (3, 0, 2), (13, 7, 11)
    # The same operations on the CPU: a device adds and multiplies in float64 as IEEE 754 says, too.
    there = CudaFeatures.grid_points(SimpleNamespace(device="cpu", _mesh=None), grid.origin, grid.steps, start, stop)
    assert there.numpy().tobytes() == grid.points(start, stop).tobytes()


def test_importing_the_kernels_starts_no_cuda():
    code = (
        "import sys, gpurho, gpurho.kernels, gpurho.kernels.scalar_product, gpurho.descriptors;"
        "cuda = [m for m in sys.modules if m.startswith(('numba.cuda', 'numba_cuda', 'cuda.'))];"
        "sys.exit(f'{cuda} were imported' if cuda else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_missing_package_is_named(monkeypatch):
    from gpurho.kernels import _cuda_driver as driver
    from gpurho.kernels.cuda import CudaFeatures

    monkeypatch.setattr(driver, "SIMULATOR", False)
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"gpurho\[cuda13\]"):
        driver.require_cuda()
    monkeypatch.setattr(driver.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(driver.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="device='cpu'"):
        driver.require_cuda()
    nothing = np.zeros((0, 3))
    empty = NeighborArrays(np.zeros(1, np.int64), nothing, np.zeros(0), nothing, np.zeros(0, np.uint8))
    with pytest.raises(DeviceError):
        CudaFeatures(empty, FeatureSizes(1, 60, 15, 3, 0, 9.0), "cuda")
