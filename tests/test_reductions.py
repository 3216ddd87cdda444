"""What `predict(keep=...)` keeps, against the full field of the same prediction and independent sums in float64."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from ase import Atoms
from predict_tools import TRICLINIC, aluminium, datasets_of, settings, small_model

import gpurho
from gpurho.densityfile import verify
from gpurho.descriptors import Environment
from gpurho.errors import GridError, HaloTooSmallError, OutputExistsError, SettingsError
from gpurho.exactsums import carry, exact_sum, to_float
from gpurho.grid import Grid
from gpurho.keep import Keep
from gpurho.kept import SumStore, TileSums
from gpurho.partition import make_tiles
from gpurho.peratom import NearestAtoms, per_atom
from gpurho.reductions import AtomSums, block_means
from gpurho.structure import Structure

ALL = ["coarse:2x3x2", "slice:z=0.5", "slice:x=0.3", "slice:y=0.97", "atoms", "histogram"]
GRID = (20, 18, 16)
SHAPE = {"grid": GRID, "tile_shape": (8, 6, 8)}
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def full(model):
    """The full field."""
    return gpurho.predict(aluminium(), model, **settings(**SHAPE))


def coarse_oracle(field: np.ndarray, factors: tuple[int, int, int], root: bool) -> np.ndarray:
    a, b, c = factors
    nx, ny, nz = field.shape
    values = field.astype(np.float64) ** (2 if root else 1)
    means = values.reshape(nx // a, a, ny // b, b, nz // c, c).mean((1, 3, 5))
    return np.sqrt(means) if root else means


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
    np.testing.assert_allclose(rho.coarse.mean, coarse_oracle(want.mean, (2, 3, 2), False), atol=1e-7)
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


# -- sums -------------------------------------------------------------------------------------------------------


def test_exact_sums_have_the_bits_of_exact_arithmetic():
    from fractions import Fraction

    rng = np.random.default_rng(0)
    values = (rng.lognormal(-2, 2, 5000).astype(np.float32) * rng.choice([1, -1], 5000)).clip(-500, 500)
    values = values[np.abs(values) > 2.0**-40].astype(np.float64)
    want = sum((Fraction(v) for v in values.tolist()), Fraction(0))
    halves = exact_sum(torch.from_numpy(values)).numpy()
    assert Fraction(int(halves[0]), 2**32) + Fraction(int(halves[1]), 2**72) == want
    assert to_float(halves) == pytest.approx(float(want), rel=1e-15)
    backwards = exact_sum(torch.from_numpy(values[::-1].copy())).numpy()
    np.testing.assert_array_equal(halves, backwards)
    parts = np.array([exact_sum(torch.from_numpy(part)).numpy() for part in np.array_split(values, 7)])
    np.testing.assert_array_equal(carry(parts.sum(0)), halves)


def test_block_means_of_a_known_field():
    field = torch.arange(4 * 6 * 2, dtype=torch.float32).view(4, 6, 2)
    got = block_means(field, (2, 3, 1)).numpy()
    assert got[0, 0, 0] == np.mean([0, 2, 4, 12, 14, 16])
    np.testing.assert_allclose(got, coarse_oracle(field.numpy(), (2, 3, 1), False))
    rms = block_means(field, (2, 3, 1), root=True).numpy()
    np.testing.assert_allclose(rms, coarse_oracle(field.numpy(), (2, 3, 1), True), rtol=1e-6)


def structures() -> dict[str, tuple[Structure, tuple[int, int, int]]]:
    """Systems in which the owner of a point is hard to find, and grids that do not fill blocks."""
    perfect = Structure.from_ase(aluminium(1, rattle=0.0))
    rng = np.random.default_rng(3)
    lone = Structure(np.array([[1.0, 1, 1]]), np.array([13]), TRICLINIC, np.array([True] * 3))
    triclinic = Structure(rng.uniform(0, 1, (5, 3)) @ TRICLINIC, np.full(5, 13), TRICLINIC, np.array([1, 0, 1], bool))
    slab = aluminium(1)
    slab.center(vacuum=14, axis=2)
    slab.pbc = (True, True, False)
    molecule = Atoms("Al2", [[3, 3, 3], [5.5, 3, 3]], cell=[9, 8, 30], pbc=False)
    return {
        "perfect crystal": (perfect, (16, 16, 16)),
        "one atom": (lone, (7, 9, 11)),
        "triclinic": (triclinic, (13, 11, 17)),
        "slab": (Structure.from_ase(slab), (9, 9, 50)),
        "molecule": (Structure.from_ase(molecule), (12, 10, 33)),
    }


@pytest.mark.parametrize("name", structures())
@pytest.mark.parametrize("tile_shape", [(64, 64, 64), (5, 8, 7)])
def test_sums_of_atoms_against_a_search_tree(model, name, tile_shape):
    structure, shape = structures()[name]
    grid = Grid(shape, structure.cell, pbc=structure.pbc.tolist())
    rng = np.random.default_rng(0)
    fields = [rng.uniform(0.01, 1, shape).astype(np.float32) for _ in range(3)]
    environment = Environment(structure, model.spec.descriptor)
    atoms = AtomSums(grid, environment, "cpu")
    store = SumStore(Keep(field=False, atoms=True), len(structure), ("mean", "aleatoric", "epistemic"))
    again = SumStore(Keep(field=False, atoms=True), len(structure), ("mean", "aleatoric", "epistemic"))
    found = []
    for tile in make_tiles(grid, tile_shape):
        parts = [torch.from_numpy(field[tile.slices].reshape(-1).astype(np.float64)) for field in fields]
        near, sums = atoms(tile, [parts[0], parts[1].square(), parts[2], parts[2].square()])
        found.append(TileSums.of(None, near, sums.numpy()))
        store.add(found[-1])
    for sums in found[::-1]:
        again.add(TileSums.unpack(sums.pack()))
    np.testing.assert_array_equal(store.atoms, again.atoms)
    want = per_atom(structure, grid, *fields)
    got = to_float(store.atoms)
    if name == "perfect crystal":
        points = NearestAtoms(structure, grid).owners(grid.points())[0]
        assert len(points) > 1.05 * grid.n_points, "many points must lie between atoms, or ties are not tested"
    np.testing.assert_allclose(got[:, 0] * grid.dv, want.volumes, rtol=1e-12)
    np.testing.assert_allclose(got[:, 1] * grid.dv, want.electrons, rtol=1e-12)
    std = np.hypot(np.sqrt(got[:, 2]), got[:, 3]) * grid.dv
    np.testing.assert_allclose(std, want.electrons_std, rtol=1e-12)


def test_bits_do_not_depend_on_how_many_distances_are_held_at_once(model, monkeypatch):
    structure = Structure.from_ase(aluminium(2))
    grid = Grid((20, 20, 20), structure.cell)
    tile = make_tiles(grid)[0]
    fields = [torch.rand(8000, generator=torch.Generator().manual_seed(0)).double() for _ in range(3)]
    environment = Environment(structure, model.spec.descriptor)
    first = AtomSums(grid, environment, "cpu")(tile, fields)[1]
    monkeypatch.setattr("gpurho.reductions.AT_ONCE", {"cpu": 1})
    monkeypatch.setattr("gpurho.reductions.BLOCK_EDGE", 0.9)
    second = AtomSums(grid, environment, "cpu")(tile, fields)[1]
    assert bool((first[:, 0, 0] != 0).any())
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_halo_that_may_hide_the_nearest_atom_is_refused(model):
    structure, shape = structures()["slab"]
    grid = Grid(shape, structure.cell, pbc=structure.pbc.tolist())
    tile = make_tiles(grid, (9, 9, 8))[0]
    sums = AtomSums(grid, Environment(structure, model.spec.descriptor), "cpu", halo=6.0)
    with pytest.raises(HaloTooSmallError, match="predict on one device"):
        sums(tile, [torch.zeros(tile.n_points, dtype=torch.float64)])


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


# -- words ------------------------------------------------------------------------------------------------------


def test_words_give_themselves_again():
    for words in (ALL, ["field"], "electrons", ["field", "histogram:2.5,250"], ["slices:z=0.5,x=0.25", "coarse:4"]):
        keep = Keep.of(words)
        assert Keep.of(keep.to_items()) == keep
    assert Keep.of(None) == Keep.of("field") == Keep()
    assert Keep.of("coarse:3").tile_shape() == (63, 63, 63)
    assert Keep.of(["slice:z=0.5", "slice:c=0.5"]).slices == ((2, 0.5),)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("coarse", "blocks of 1 to 64"),
        ("coarse:0", "blocks of 1 to 64"),
        ("coarse:4x4", "blocks of 1 to 64"),
        (["coarse:2", "coarse:4"], "coarse twice"),
        ("slice:z", "a fraction of it"),
        ("slice:w=0.5", "a fraction of it"),
        ("slice:z=1.5", "a fraction of it"),
        ("slice:z=nan", "a fraction of it"),
        ("atoms:3", "not known"),
        ("everything", "not known"),
        ("histogram:-1", "upper end"),
        ("histogram:1,0", "upper end"),
        ([], "empty"),
        ([3], "is a int"),
    ],
)
def test_wrong_words(words, message):
    with pytest.raises(SettingsError, match=message):
        Keep.of(words)


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
