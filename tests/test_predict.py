"""Prediction end to end with the real descriptors and a small real network."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk, fcc111
from predict_tools import aluminium, settings, small_model

import gpurho
from gpurho.errors import (
    DeviceError,
    FormatError,
    GridError,
    ModelError,
    SettingsError,
    StoreError,
    StructureError,
    UnknownSpeciesError,
)
from gpurho.pipelines.predict import run_job
from gpurho.pipelines.settings import settle
from gpurho.pipelines.summary import summarize, summary_text


@pytest.fixture(scope="module")
def model():
    return small_model()


def test_in_memory(model):
    atoms = aluminium(2)
    rho = gpurho.predict(atoms, model, spacing=0.45, **settings())
    assert rho.shape == (18, 18, 18)
    assert rho.mean.dtype == np.float32
    assert np.std(rho.mean) > 1e-3, "the small model must not be flat, or the tests below prove nothing"
    assert (rho.aleatoric > 0).all()
    assert (rho.epistemic > 0).all()
    np.testing.assert_allclose(rho.std, np.hypot(rho.aleatoric, rho.epistemic), rtol=1e-6)
    np.testing.assert_allclose(rho.electrons, rho.mean.sum(dtype=float) * rho.grid.dv, rtol=1e-12)
    a, e, dv = rho.aleatoric.astype(float), rho.epistemic.astype(float), rho.grid.dv
    bound = dv * np.hypot(np.sqrt((a**2).sum()), e.sum())
    assert rho.correlated
    assert 0.3 * bound < rho.electrons_std < 0.9 * bound
    plain = gpurho.Density(rho.grid, rho.structure, rho.mean, rho.aleatoric, rho.epistemic)
    np.testing.assert_allclose(plain.electrons_std, bound, rtol=1e-6)
    assert not plain.correlated
    assert rho.info["model"]["spec"]["valence"] == {"Al": 3.0}
    json.dumps(rho.info)


def test_matches_descriptors_and_network(model):
    import torch

    atoms = aluminium()
    rho = gpurho.predict(atoms, model, grid=(9, 10, 11), **settings(tile_shape=(4, 5, 6)))
    features = gpurho.descriptors(atoms, rho.grid.points(), model.spec.descriptor)
    mean, aleatoric, epistemic = model.evaluator("cpu", "fp32")(torch.from_numpy(features))
    for got, want in zip((rho.mean, rho.aleatoric, rho.epistemic), (mean, aleatoric, epistemic), strict=True):
        np.testing.assert_allclose(got, want.numpy().reshape(rho.shape), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("tile_shape", [(64, 64, 64), (1, 20, 7), (5, 3, 20), (20, 20, 1)])
def test_tile_shapes_agree_to_rounding(model, tile_shape):
    atoms = aluminium()
    want = gpurho.predict(atoms, model, grid=(20, 20, 20), **settings())
    got = gpurho.predict(atoms, model, grid=(20, 20, 20), **settings(tile_shape=tile_shape))
    np.testing.assert_allclose(got.mean, want.mean, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.epistemic, want.epistemic, rtol=1e-3, atol=1e-5)


def test_region_has_the_bits_of_the_whole(model):
    atoms = aluminium()
    whole = gpurho.predict(atoms, model, grid=(24, 20, 17), **settings())
    region = ((8, 24), (0, 16), (8, 17))
    part = gpurho.predict(atoms, model, grid=(24, 20, 17), region=region, **settings())
    box = tuple(slice(a, b) for a, b in region)
    for name in ("mean", "aleatoric", "epistemic"):
        assert np.array_equal(getattr(part, name), getattr(whole, name)[box]), name
    np.testing.assert_allclose(part.grid.points(), whole.grid.points(*zip(*region, strict=True)), atol=1e-12)
    assert part.grid.pbc == (False, False, False)
    # A box that cuts tiles agrees to rounding.
    cut = gpurho.predict(atoms, model, grid=(24, 20, 17), region=((3, 13), (5, 6), (0, 17)), **settings())
    np.testing.assert_allclose(cut.mean, whole.mean[3:13, 5:6, :], rtol=1e-4, atol=1e-5)
    assert cut.grid.pbc == (False, False, True)


def test_region_of():
    grid = gpurho.Grid((10, 20, 30), np.eye(3) * 5)
    assert gpurho.region_of(grid, (0, 0.25, 0.5), (0.1, 0.75, 1)) == ((0, 1), (5, 15), (15, 30))


@pytest.mark.parametrize("kind", ["uniform", "uncertainty"])
@pytest.mark.parametrize("stored", [False, True])
def test_conservation(model, kind, stored, tmp_path):
    atoms = aluminium()
    out = tmp_path / "rho.h5" if stored else None
    raw = gpurho.predict(atoms, model, grid=(16, 16, 16), **settings())
    rho = gpurho.predict(atoms, model, grid=(16, 16, 16), conserve=kind, out=out, **settings())
    assert abs(raw.electrons - 12) > 0.01, "the raw density must miss the charge, or this proves nothing"
    assert rho.electrons == pytest.approx(12, rel=1e-12)
    assert np.asarray(rho.mean).sum(dtype=float) * rho.grid.dv == pytest.approx(12, rel=1e-6)
    assert rho.electrons_predicted == pytest.approx(raw.electrons, rel=1e-12)
    change = np.asarray(rho.mean, dtype=float) - raw.mean
    if kind == "uniform":
        factor = 12 / raw.electrons
        np.testing.assert_allclose(rho.mean, raw.mean * factor, rtol=1e-6)
        np.testing.assert_allclose(rho.std, raw.std * factor, rtol=1e-5)
        assert rho.mean_std == pytest.approx(np.asarray(rho.std).mean(dtype=float), rel=1e-5)
    else:
        np.testing.assert_allclose(change / change.sum(), raw.std**2 / (raw.std.astype(float) ** 2).sum(), rtol=1e-2)
        np.testing.assert_array_equal(np.asarray(rho.epistemic), raw.epistemic)


def test_conservation_is_refused_where_it_means_nothing(model):
    atoms = aluminium()
    with pytest.raises(SettingsError, match="whole grid"):
        gpurho.predict(atoms, model, grid=(8, 8, 8), region=((0, 4), (0, 8), (0, 8)), conserve="uniform", **settings())
    with pytest.raises(SettingsError, match="needs sigmas"):
        gpurho.predict(atoms, model, grid=(8, 8, 8), uncertainty=None, conserve="uncertainty", **settings())
    grid = gpurho.Grid((8, 8, 8), 2 * atoms.cell.array)
    with pytest.raises(SettingsError, match="structure's cell"):
        gpurho.predict(atoms, model, grid=grid, conserve="uniform", **settings())


def test_uncertainty_kinds(model):
    atoms, small = aluminium(), settings(grid=(8, 8, 8))
    none = gpurho.predict(atoms, model, uncertainty=None, **small)
    assert none.std is None
    assert none.electrons_std is None
    analytic = gpurho.predict(atoms, model, **small)
    sampled = gpurho.predict(atoms, model, uncertainty="sampled", samples=40, seed=3, **small)
    other = gpurho.predict(atoms, model, uncertainty="sampled", samples=40, seed=4, **small)
    np.testing.assert_array_equal(none.mean, analytic.mean)
    np.testing.assert_allclose(sampled.mean, analytic.mean, rtol=1e-5)
    assert not np.array_equal(sampled.epistemic, other.epistemic)


def test_primitive_cell_smaller_than_the_cutoff(model):
    one = bulk("Al", "fcc", a=4.05)
    rho = gpurho.predict(one, model, grid=(10, 10, 10), **settings())
    many = gpurho.predict(one.repeat(2), model, grid=(20, 20, 20), **settings())
    np.testing.assert_allclose(many.mean, np.tile(rho.mean, (2, 2, 2)), rtol=1e-4, atol=1e-5)
    assert rho.n_capped == 0


def test_triclinic_cells_of_one_crystal_agree(model):
    atoms = aluminium()
    sheared = atoms.copy()
    # The same crystal by another choice of cell vectors: c -> c + a.
    cell = np.asarray(atoms.cell.array)
    sheared.set_cell(cell + np.array([[0, 0, 0], [0, 0, 0], cell[0]]))
    want = gpurho.predict(atoms, model, grid=(12, 12, 12), **settings())
    got = gpurho.predict(sheared, model, grid=(12, 12, 12), **settings())
    # Point (i, j, k) of the sheared grid is (i + k, j, k) of the other.
    i, j, k = np.indices((12, 12, 12))
    np.testing.assert_allclose(got.mean, want.mean[(i + k) % 12, j, k], rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(got.electrons, want.electrons, rtol=1e-5)


def test_slab_with_vacuum_and_mixed_periodicity(model):
    atoms = fcc111("Al", (1, 1, 4), a=4.05, vacuum=8.0)
    assert atoms.pbc.tolist() == [True, True, False]
    rho = gpurho.predict(atoms, model, spacing=0.5, **settings())
    assert np.isfinite(rho.mean).all()
    assert rho.grid.pbc == (True, True, False)
    assert 0 < rho.n_capped < rho.grid.n_points
    # Far in the vacuum every feature has its end value, so the density is one number.
    assert np.ptp(rho.mean[:, :, 0]) < 1e-6
    assert np.ptp(rho.mean[:, :, rho.shape[2] // 2]) > 1e-3


def test_atoms_outside_a_cell_without_period(model):
    atoms = fcc111("Al", (1, 1, 4), a=4.05, vacuum=8.0)
    atoms.positions[:, 2] -= 9.0
    with pytest.raises(StructureError, match=r"atom \d+ lies outside"):
        gpurho.predict(atoms, model, spacing=0.5, **settings())


def test_vacancy_moves_charge_locally(model):
    atoms = aluminium(2, rattle=0.0)
    lacking = atoms.copy()
    del lacking[0]
    full = gpurho.predict(atoms, model, grid=(16, 16, 16), **settings())
    hole = gpurho.predict(lacking, model, grid=(16, 16, 16), **settings())
    assert np.abs(hole.mean - full.mean)[0, 0, 0] > 1e-4


def test_species_are_checked_first(model):
    with pytest.raises(UnknownSpeciesError, match=r"structure has Ge, Si; model 'given' knows Al; .*Ge, Si"):
        gpurho.predict(bulk("SiGe", "zincblende", a=5.5), model)
    two = small_model(("Si", "Ge"))
    rho = gpurho.predict(bulk("SiGe", "zincblende", a=5.5), two, grid=(8, 8, 8), **settings())
    assert np.isfinite(rho.mean).all()
    assert rho.info["electrons"] == 8.0


def test_auto_takes_the_model_with_fewest_species(tmp_path, monkeypatch):
    import gpurho.model as module

    monkeypatch.setattr(module, "DATA_FOLDER", tmp_path)
    small_model(("Al", "Si")).save(tmp_path / "alsi.safetensors")
    small_model(("Al",)).save(tmp_path / "pure.safetensors")
    small_model(("Si",)).save(tmp_path / "si.safetensors")
    rho = gpurho.predict(aluminium(), grid=(4, 4, 4), **settings())
    assert rho.info["model"]["name"] == "pure"
    with pytest.raises(UnknownSpeciesError, match=r"structure has Cu; .*'pure' knows Al"):
        gpurho.predict(bulk("Cu"), grid=(4, 4, 4))


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"devices": 0}, SettingsError, "devices 0"),
        ({"client": object()}, SettingsError, "no dask.distributed Client"),
        ({"uncertainty": "both"}, SettingsError, "uncertainty 'both'"),
        ({"conserve": "yes"}, SettingsError, "conserve 'yes'"),
        ({"samples": 1}, SettingsError, "samples 1"),
        ({"seed": -1}, SettingsError, "seed -1"),
        ({"precision": "fp8"}, SettingsError, "fp8"),
        ({"spacing": -0.1}, GridError, "spacing -0.1"),
        ({"spacing": "wide"}, GridError, "spacing 'wide'"),
        ({"spacing": float("nan")}, GridError, "spacing nan"),
        ({"spacing": 0.2, "grid": (4, 4, 4)}, SettingsError, "exclude"),
        ({"region": ((0, 2), (0, 3), (4, 4))}, GridError, "region"),
        ({"tile_shape": (0, 4, 4)}, GridError, "tile shape"),
        ({"tile_shape": (4096, 4096, 4096)}, GridError, "tile shape"),
        ({"device": "tpu"}, DeviceError, "tpu"),
        ({"model": "no-such-model"}, ModelError, "no-such-model"),
        ({"model": 3}, ModelError, "int"),
        ({"spacing": 1e-4}, StoreError, "out="),
    ],
)
def test_arguments(model, changes, error, text):
    with pytest.raises(error, match=text) as caught:
        gpurho.predict(aluminium(), **({"model": model, "device": "cpu", "precision": "fp32"} | changes))
    assert "\n" not in str(caught.value)


def test_missing_gpu_is_an_error(model):
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(DeviceError, match="cuda"):
        gpurho.predict(aluminium(), model, device="cuda")


def test_bad_structures(model):
    atoms = aluminium()
    atoms.positions[1] = atoms.positions[0] + 0.3
    with pytest.raises(StructureError, match="atoms 0 and 1"):
        gpurho.predict(atoms, model, device="cpu")
    atoms.positions[1, 2] = np.nan
    with pytest.raises(StructureError, match="atom 1"):
        gpurho.predict(atoms, model, device="cpu")
    atoms = aluminium()
    atoms.cell[2] = 0
    with pytest.raises(StructureError, match="volume"):
        gpurho.predict(atoms, model, device="cpu")


def test_not_a_number_stops_the_run(model, tmp_path, monkeypatch):
    from gpurho.evaluator import Evaluator
    from gpurho.journal import read_journal

    calls = []
    true_call = Evaluator.unchecked

    def broken(self, features):
        calls.append(1)
        values, flags = true_call(self, features)
        if len(calls) == 3:
            values[0][5] = float("nan")
        return values, flags

    monkeypatch.setattr(Evaluator, "unchecked", broken)
    out = tmp_path / "rho.h5"
    with pytest.raises(ModelError, match=r"tile 2 .*not stored"):
        gpurho.predict(aluminium(), model, grid=(16, 16, 16), out=out, **settings())
    assert not out.exists()
    tiles = [record["tile"] for record in read_journal(out.with_name("rho.h5.journal"))[1:]]
    assert tiles == [0, 1]
    monkeypatch.setattr(Evaluator, "unchecked", true_call)
    resumed = gpurho.predict(aluminium(), model, grid=(16, 16, 16), out=out, **settings())
    fresh = gpurho.predict(aluminium(), model, grid=(16, 16, 16), **settings())
    np.testing.assert_array_equal(np.asarray(resumed.mean), fresh.mean)


def test_plan(model):
    plan = gpurho.plan(aluminium(2), model, spacing=0.3, device="cpu", precision="fp32", out="ignored.h5")
    assert plan.n_atoms == 32
    assert plan.electrons == 96
    assert plan.grid_shape == (27, 27, 27)
    assert plan.n_points == 27**3
    assert plan.n_tiles == 1
    assert plan.field_bytes == 27**3 * 12
    assert plan.seconds == pytest.approx(plan.n_points / plan.points_per_second)
    assert 0 < plan.memory_bytes < 2 * 2**30
    assert "27 x 27 x 27" in str(plan)
    json.dumps(plan.to_dict())
    part = gpurho.plan(aluminium(2), model, spacing=0.3, device="cpu", region=((0, 9), (0, 9), (0, 27)))
    assert part.n_points == 9 * 9 * 27


def test_import_is_light_and_exports_resolve():
    code = (
        "import sys, gpurho; sys.exit(any(m in sys.modules for m in ('torch', 'numba', 'ase', 'h5py', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    for name in gpurho.__all__:
        assert getattr(gpurho, name) is not None
    # Importing the module binds it to its name in the package, which must not hide the function.
    importlib.import_module("gpurho.descriptors")

    assert callable(gpurho.descriptors)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = gpurho.nothing


def test_checkout_on_the_path_without_an_installation(tmp_path):
    """PYTHONPATH=<checkout> is enough: the folders beside the package are found."""
    root = Path(gpurho.__file__).resolve().parents[1]
    if not (root / "kernels").is_dir():
        pytest.skip("this is not a checkout")
    code = f"""
        import sys
        sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]
        sys.path = [p for p in sys.path if "gpurho" not in p]
        sys.path.insert(0, {str(root)!r})
        import gpurho.kernels, gpurho.pipelines.predict
        assert gpurho.kernels.__file__ == {str(root / "kernels" / "__init__.py")!r}
    """
    subprocess.run([sys.executable, "-I", "-c", textwrap.dedent(code)], check=True, cwd=tmp_path)


def test_a_full_device_is_one_line(model, monkeypatch):
    import torch

    from gpurho.evaluator import Evaluator

    def full(self, features):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nSee documentation")

    monkeypatch.setattr(Evaluator, "unchecked", full)
    with pytest.raises(DeviceError, match="--tile-shape") as caught:
        gpurho.predict(aluminium(), model, grid=(8, 8, 8), **settings())
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["rho.cube", "CHGCAR", "rho.vti", "atoms.xyz"])
def test_names_of_other_formats_are_refused_before_any_work(tmp_path, name):
    with pytest.raises(FormatError, match=r"the output is HDF5, and that name says .* rho\.write") as error:
        gpurho.predict(aluminium(), small_model(), out=tmp_path / name, **settings())
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_a_wrong_number_of_electrons_is_told():
    job = settle(aluminium(), small_model(), grid=(8, 8, 8), device="cpu", precision="fp32")
    facts = summarize(job, run_job(job, progress=False))
    off = {**facts, "electrons_expected": 12.0, "electrons_predicted": 12.4, "electrons_std": 0.1}
    assert "warning  the predicted electrons are 4.0 error bars away from those of the atoms" in summary_text(off)
    for fine in ({"electrons_predicted": 12.2}, {"electrons_std": None}, {"electrons_expected": None}):
        assert "error bars away" not in summary_text({**off, **fine})
    assert "1 point has a negative density" in summary_text({**off, "n_negative": 1})
