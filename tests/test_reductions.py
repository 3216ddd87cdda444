"""What `predict(keep=...)` keeps, against the full field of the same prediction."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
from keep_tools import ALL, SHAPE, coarse_oracle
from predict_tools import aluminium, datasets_of, settings, small_model

import gpurho
from gpurho.densityfile import verify
from gpurho.errors import GridError, OutputExistsError, SettingsError
from gpurho.keep import Keep

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def full(model):
    """The full field."""
    return gpurho.predict(aluminium(), model, **settings(**SHAPE))


def check_against_field(rho: gpurho.Density, full: gpurho.Density) -> None:
    """Everything in ALL, from the arrays of the full field."""
    mean, a, e = (np.asarray(f) for f in (full.mean, full.aleatoric, full.epistemic))
    coarse = rho.coarse
    for name, field in (("mean", mean), ("aleatoric", a), ("epistemic", e)):
        want = coarse_oracle(field, (2, 3, 2), name != "mean")
        np.testing.assert_allclose(np.asarray(getattr(coarse, name)), want, rtol=1.2e-7, err_msg=name)
    np.testing.assert_allclose(coarse.electrons, full.electrons, rtol=1e-7)
    centres = full.grid.points((0, 0, 0), (2, 3, 2)).mean(0)
    np.testing.assert_allclose(coarse.grid.points((0, 0, 0), (1, 1, 1))[0], centres, atol=1e-12)
    for axis, position in ((2, 0.5), (0, 0.3), (1, 0.97)):
        got, want = rho.slice(axis, position), full.slice(axis, position)
        for name in ("mean", "aleatoric", "epistemic"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=f"{name} {axis}")
        np.testing.assert_array_equal(got.origin, want.origin)
    bare = gpurho.Density(full.grid, full.structure, mean, a, e, info=full.info)
    got, want = rho.per_atom(), bare.per_atom()
    for name in ("electrons", "electrons_std", "volumes"):
        np.testing.assert_allclose(getattr(got, name), getattr(want, name), rtol=1e-12, err_msg=name)
    assert got.electrons.sum() == pytest.approx(full.electrons, rel=1e-12)
    std = np.sqrt(a.astype(float) ** 2 + e.astype(float) ** 2)
    for name, values in (("mean", mean.astype(float)), ("std", std)):
        found = rho.histogram(name)
        clipped = np.clip(values, found.edges[0], found.edges[-1])
        np.testing.assert_array_equal(found.counts, np.histogram(clipped, found.edges)[0])
        np.testing.assert_array_equal(found.counts, bare.histogram(name).counts)
        assert found.n_points == mean.size
        assert (found.probability() * np.diff(found.edges)).sum() == pytest.approx(1)
    assert np.count_nonzero(rho.histogram().counts) > 3
    for name in ("electrons", "electrons_predicted", "electrons_std", "mean_std", "max_std"):
        assert getattr(rho, name) == pytest.approx(getattr(full, name), rel=1e-12), name
    np.testing.assert_array_equal(rho._errors, full._errors)
    for name in ("n_points", "min_mean", "max_mean", "n_negative", "n_capped", "n_tied", "n_outside"):
        assert getattr(rho.totals, name) == getattr(full.totals, name), name


def test_everything_in_memory_is_that_of_the_full_field(model, full):
    rho = gpurho.predict(aluminium(), model, keep=ALL, **settings(**SHAPE))
    assert not rho.has_field
    assert rho.uncertain
    assert "kept electrons, coarse:2x3x2" in repr(rho)
    check_against_field(rho, full)


def test_beside_the_field_and_without_uncertainty(model, full):
    rho = gpurho.predict(aluminium(), model, keep=["field", *ALL], **settings(**SHAPE))
    np.testing.assert_array_equal(rho.mean, full.mean)
    check_against_field(rho, full)
    mean = gpurho.predict(aluminium(), model, keep=ALL, uncertainty=None, **settings(**SHAPE))
    plain = gpurho.predict(aluminium(), model, uncertainty=None, **settings(**SHAPE))
    np.testing.assert_allclose(mean.per_atom().electrons, plain.per_atom().electrons, rtol=1e-12)
    assert mean.per_atom().electrons_std is None
    assert mean.coarse.aleatoric is None
    assert not mean.uncertain
    assert mean.slice(2, 0.5).aleatoric is None
    with pytest.raises(SettingsError, match="histogram of 'std'"):
        mean.histogram("std")


def test_file_equals_memory_and_says_what_it_holds(model, full, tmp_path):
    out = tmp_path / "rho.h5"
    with gpurho.predict(aluminium(), model, keep=ALL, out=out, **settings(**SHAPE)) as rho:
        check_against_field(rho, full)
    memory = gpurho.predict(aluminium(), model, keep=ALL, **settings(**SHAPE))
    with gpurho.Density.open(out) as rho:
        check_against_field(rho, full)
        for name in ("mean", "aleatoric", "epistemic", "std"):
            np.testing.assert_array_equal(
                np.asarray(getattr(rho.coarse, name)), np.asarray(getattr(memory.coarse, name))
            )
        np.testing.assert_array_equal(rho.per_atom().electrons_std, memory.per_atom().electrons_std)
        assert rho.totals == memory.totals
        with pytest.raises(SettingsError, match="the full field was not kept, only electrons, coarse:2x3x2") as error:
            rho.mean  # noqa: B018
        assert "\n" not in str(error.value)
        for read in (lambda: rho.std, lambda: rho.line((0, 0, 0), (1, 1, 1)), lambda: rho.write(tmp_path / "a.cube")):
            with pytest.raises(SettingsError, match="full field"):
                read()
        with pytest.raises(SettingsError, match="this slice was not kept"):
            rho.slice(2, 0.25)
    assert verify(out) == []
    with h5py.File(out) as h5:
        assert "mean" not in h5
        assert h5["coarse/mean"].shape == (10, 6, 8)
        assert h5["slices/z_8/mean"].shape == (20, 18)
        assert h5["atoms/sums"].shape == (4, 5, 2)
    with h5py.File(out, "r+") as h5:
        h5["slices/z_8/mean"][3, 3] += 1
    assert len(verify(out)) == 1


def test_what_was_not_kept_says_so(model):
    rho = gpurho.predict(aluminium(), model, keep="electrons", **settings(grid=(8, 8, 8)))
    assert rho.electrons_std > 0
    for read, what in (
        (lambda: rho.coarse, "a coarse field"),
        (rho.per_atom, "the full field"),
        (rho.histogram, "a histogram"),
        (rho.slice, "this slice"),
        (lambda: rho.at([[0.0, 0, 0]]), "the full field"),
        (lambda: rho.plot(), "this slice|the full field"),
    ):
        with pytest.raises(SettingsError, match=f"({what}) was not kept, only electrons; predict again with keep="):
            read()
    field = gpurho.predict(aluminium(), model, **settings(grid=(8, 8, 8)))
    with pytest.raises(SettingsError, match="a coarse field was not kept, only field"):
        field.coarse  # noqa: B018
    assert field.histogram().n_points == 512


@pytest.mark.parametrize("kind", ["uniform", "uncertainty"])
def test_conservation(model, kind):
    keep = [word for word in ALL if kind == "uniform" or word != "histogram"]
    rho = gpurho.predict(aluminium(), model, keep=keep, conserve=kind, **settings(**SHAPE))
    want = gpurho.predict(aluminium(), model, conserve=kind, **settings(**SHAPE))
    assert rho.electrons == pytest.approx(12, rel=1e-12)
    assert rho.per_atom().electrons.sum() == pytest.approx(12, rel=1e-12)
    np.testing.assert_allclose(rho.per_atom().electrons, want.per_atom().electrons, rtol=1e-6)
    np.testing.assert_allclose(rho.per_atom().electrons_std, want.per_atom().electrons_std, rtol=1e-6)
    np.testing.assert_allclose(rho.coarse.mean, coarse_oracle(want.mean, (2, 3, 2), False), rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(rho.coarse.std, coarse_oracle(want.std, (2, 3, 2), True), rtol=1e-6)
    np.testing.assert_array_equal(rho.slice(0, 0.3).mean, want.slice(0, 0.3).mean)
    if kind == "uniform":
        found = rho.histogram()
        scaled = want.correction.scale * np.asarray(want.raw_fields()["mean"], dtype=float)
        outer = np.clip(scaled, found.edges[0] + 1e-12, found.edges[-1] - 1e-12)
        assert np.abs(np.histogram(outer, found.edges)[0] - found.counts).sum() <= 2
    else:
        with pytest.raises(SettingsError, match="a histogram cannot follow"):
            gpurho.predict(aluminium(), model, keep="histogram", conserve=kind, **settings(**SHAPE))


def test_region(model, tmp_path):
    region = ((4, 18), (3, 12), (0, 16))
    both = settings(region=region, **SHAPE)
    want = gpurho.predict(aluminium(), model, **both)
    for out in (None, tmp_path / "part.h5"):
        with gpurho.predict(aluminium(), model, keep=ALL, out=out, **both) as rho:
            check_against_field(rho, want)
    assert verify(tmp_path / "part.h5") == []


# -- kill and resume --------------------------------------------------------------------------------------------

KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from predict_tools import aluminium, settings, small_model
from gpurho.store import TileFile
import gpurho
write, left = TileFile.write, [int(sys.argv[3])]
def counted(self, finished):
    write(self, finished)
    left[0] -= 1
    if left[0] == 0:
        os._exit(9)
TileFile.write = counted
gpurho.predict(aluminium(), small_model(), keep=%r, out=sys.argv[2], **settings(**%r))
"""


@pytest.mark.parametrize("field", [False, True])
def test_killed_and_resumed_gives_the_same_file(model, tmp_path, field):
    keep = ["field", *ALL] if field else ALL
    whole, out = tmp_path / "whole.h5", tmp_path / "rho.h5"
    gpurho.predict(aluminium(), model, keep=keep, out=whole, **settings(**SHAPE)).close()
    code = textwrap.dedent(KILLED % (keep, SHAPE))
    done = subprocess.run([sys.executable, "-c", code, str(TESTS), str(out), "7"], env=os.environ, check=False)
    assert done.returncode == 9
    assert sorted(p.name for p in tmp_path.glob("rho.h5*")) == [
        "rho.h5.journal",
        "rho.h5.lock",
        "rho.h5.part",
        "rho.h5.sums",
    ]
    if field:
        # The seventh record of the sums was lost with the machine: six tiles stand.
        sums = tmp_path / "rho.h5.sums"
        sums.write_bytes(sums.read_bytes()[:-5])
    with pytest.raises(OutputExistsError, match="unfinished prediction with keep"):
        gpurho.predict(aluminium(), model, keep="atoms", out=out, **settings(**SHAPE))
    ticks: list[int] = []
    from gpurho.pipelines import tiling

    original = tiling.Stages.network

    def counted(self, features, tile):
        ticks.append(tile.index)
        return original(self, features, tile)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiling.Stages, "network", counted)
        gpurho.predict(aluminium(), model, keep=keep, out=out, **settings(**SHAPE)).close()
    assert ticks[0] == (6 if field else 7)
    assert out.read_bytes() == whole.read_bytes()
    assert datasets_of(out) == datasets_of(whole)
    assert [p.name for p in tmp_path.glob("rho.h5.*")] == []


# -- several workers --------------------------------------------------------------------------------------------


def test_results_do_not_depend_on_the_number_of_workers(model, tmp_path, monkeypatch):
    """Two workers and many small runs give the bytes of one device; with the field, and in memory too."""
    pytest.importorskip("distributed")
    from gpurho.pipelines.cluster import local_client

    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    region = ((4, 18), (3, 12), (0, 16))
    with local_client(2, "cpu") as client:
        for name, changes in (
            ("few", {"keep": ALL}),
            ("field", {"keep": ["field", *ALL]}),
            ("mean", {"keep": ["coarse:2", "atoms"], "uncertainty": None, "conserve": "uniform"}),
            ("region", {"keep": ALL, "region": region}),
        ):
            same = settings(**SHAPE) | changes
            one, two = tmp_path / f"{name}_one.h5", tmp_path / f"{name}_two.h5"
            gpurho.predict(aluminium(), model, out=one, **same).close()
            gpurho.predict(aluminium(), model, out=two, **{**same, "device": None}, client=client).close()
            assert verify(two) == []
            if name == "field":
                a, b = datasets_of(one), datasets_of(two)
                assert {k: v for k, v in b.items() if not k.startswith("shards/")} == a
                continue
            assert one.read_bytes() == two.read_bytes()
            assert not (tmp_path / f"{name}_two.h5.shards").exists()
        memory = gpurho.predict(aluminium(), model, keep=ALL, **{**settings(**SHAPE), "device": None}, client=client)
        with gpurho.Density.open(tmp_path / "few_one.h5") as rho:
            np.testing.assert_array_equal(memory.coarse.mean, np.asarray(rho.coarse.mean))
            np.testing.assert_array_equal(memory.slice(0, 0.3).std, rho.slice(0, 0.3).std)
            np.testing.assert_array_equal(memory.per_atom().electrons_std, rho.per_atom().electrons_std)
            np.testing.assert_array_equal(memory.histogram("std").counts, rho.histogram("std").counts)


def test_nothing_but_results_is_fetched(model, monkeypatch):
    from gpurho.pipelines.tiling import Stages

    fetched: list[int] = []
    original = Stages.fetch

    def counted(self, values):
        fetched.append(sum(value.numel() * value.element_size() for value in values))
        return original(self, values)

    monkeypatch.setattr(Stages, "fetch", counted)
    same = settings(grid=(32, 32, 32), tile_shape=(32, 32, 32))
    gpurho.predict(aluminium(), model, keep=["coarse:8", "histogram", "electrons"], **same)
    gpurho.predict(aluminium(), model, **same)
    assert fetched[1] >= 3 * 4 * 32**3
    assert fetched[0] < fetched[1] / 50


# -- arguments --------------------------------------------------------------------------------------------------


def test_blocks_must_fit(model):
    atoms = aluminium()
    with pytest.raises(GridError, match=r"grid shape \(10, 12, 12\) does not divide"):
        gpurho.predict(atoms, model, keep="coarse:4", **settings(grid=(10, 12, 12)))
    with pytest.raises(GridError, match=r"tile shape \(6, 6, 6\)"):
        gpurho.predict(atoms, model, keep="coarse:4", **settings(grid=(12, 12, 12), tile_shape=(6, 6, 6)))
    box = ((2, 8), (0, 8), (0, 8))
    with pytest.raises(GridError, match="cuts blocks"):
        gpurho.predict(atoms, model, keep="coarse:4", region=box, **settings(grid=(8, 8, 8)))
    rho = gpurho.predict(atoms, model, keep="coarse:4", spacing=0.45, **settings())
    assert rho.shape == (12, 12, 12)
    assert rho.coarse.shape == (3, 3, 3)


def test_command_line(model, tmp_path, capsys):
    from gpurho.cli import main

    path, out = tmp_path / "small.safetensors", tmp_path / "rho.h5"
    model.save(path)
    aluminium().write(tmp_path / "al.xyz")
    words = ["--keep", "coarse:2", "--keep", "atoms", "--keep", "slices:z=0.5", "--quiet", "--device", "cpu"]
    grid = ["--grid", "8", "8", "8", "--out", str(out), "--model", str(path)]
    assert main(["predict", str(tmp_path / "al.xyz"), *grid, *words]) == 0
    assert "electrons predicted" in capsys.readouterr().out
    with gpurho.Density.open(out) as rho:
        assert rho.kept.keep == Keep.of(["coarse:2", "atoms", "slice:z=0.5"])
    assert main(["predict", str(tmp_path / "al.xyz"), *grid, "--keep", "nonsense"]) == 1
    assert "keep 'nonsense' is not known" in capsys.readouterr().err
