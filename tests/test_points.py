"""Points to train on: how they are drawn, thinned out, stored, and scaled; and the two-body superposition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from training_tools import SMALL, SMOOTH, toy_snapshot

from gpurho.baseline import RIDGE, fit_baseline
from gpurho.datasets import Dataset, Snapshot, write_dataset
from gpurho.descriptors import DescriptorSpec
from gpurho.errors import DatasetError, SettingsError
from gpurho.modelspec import ModelSpec
from gpurho.pointsampling import Coverage, choose_by_importance, choose_uniform, cover, inclusion, nucleus_distances
from gpurho.pointstore import PointStore, shard_order
from gpurho.structure import Structure
from gpurho.trainingpoints import Part, Scaling, gather_points
from gpurho.trainingset import Split, point_features
from gpurho.trainsettings import TrainingSettings


@pytest.fixture(scope="module")
def snapshot() -> Snapshot:
    return toy_snapshot(1)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return write_dataset(tmp_path_factory.mktemp("data") / "toy.h5", [toy_snapshot(i, points=10) for i in range(4)])


# --- drawing ------------------------------------------------------------------------------------------------------


def test_inclusion_probabilities_add_up_and_are_capped() -> None:
    scores = np.array([1.0, 1.0, 2.0, 50.0, 100.0])
    found = inclusion(scores, 3)
    np.testing.assert_allclose(found, [0.25, 0.25, 0.5, 1.0, 1.0])


def test_draws_by_importance_have_their_probabilities_and_sums_stay_unbiased(snapshot: Snapshot) -> None:
    n, grid = 300, snapshot.density.size
    values = snapshot.density.ravel().astype(float)
    hits, sums, sizes = np.zeros(grid), [], set()
    for k in range(400):
        choice = choose_by_importance(snapshot, n, (5, k))
        assert len(np.unique(choice.index)) == len(choice.index)
        sizes.add(len(choice.index))
        hits[choice.index] += 1
        sums.append(np.array([choice.weights.sum(), (choice.weights * values[choice.index] ** 2).sum()]) * grid / n)
    assert sizes == {n}
    mean, error = np.mean(sums, 0), np.std(sums, 0) / np.sqrt(len(sums))
    np.testing.assert_allclose(mean / [grid, (values**2).sum()], 1.0, atol=0.01)
    assert np.all(np.abs(mean - [grid, (values**2).sum()]) < 4 * error + 1e-6 * grid)
    # Weights are the inverse of how often points are drawn, which the frequencies over all draws confirm.
    choice = choose_by_importance(snapshot, n, (5, 0))
    often = choice.weights < np.quantile(choice.weights, 0.2)
    expected = (n / grid / choice.weights[often]).mean()
    assert hits[choice.index[often]].mean() / 400 == pytest.approx(expected, rel=0.15)
    assert expected > 3 * n / grid


def test_importance_prefers_nuclei_and_rare_densities(snapshot: Snapshot) -> None:
    choice = choose_by_importance(snapshot, 300, (0,), share=0.9)
    distances = nucleus_distances(snapshot.structure, snapshot.grid)
    near = distances < 0.5
    assert near[choice.index].mean() > 3 * near.mean()
    high = snapshot.density.ravel() > 0.9 * snapshot.density.max()
    assert high[choice.index].mean() > 3 * high.mean()
    even = choose_by_importance(snapshot, 300, (0,), share=0.0)
    np.testing.assert_allclose(even.weights, 1.0, rtol=1e-6)


def test_weights_may_be_tempered(snapshot: Snapshot) -> None:
    full, half, none = (choose_by_importance(snapshot, 300, (2,), power=p) for p in (1.0, 0.5, 0.0))
    np.testing.assert_array_equal(full.index, half.index)
    np.testing.assert_allclose(none.weights, none.weights[0])
    ratio = half.weights / np.sqrt(full.weights)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-4)
    assert 0.8 < half.weights.mean() < 1.2


def test_draws_follow_the_seed_and_take_all_points_when_there_are_few(snapshot: Snapshot) -> None:
    for choose in (
        lambda n, s: choose_uniform(snapshot.density.size, n, s),
        lambda n, s: choose_by_importance(snapshot, n, s),
    ):
        a, b, c = choose(200, (1, 2)), choose(200, (1, 2)), choose(200, (1, 3))
        np.testing.assert_array_equal(a.index, b.index)
        assert not np.array_equal(a.index, c.index)
        everything = choose(10**6, (0,))
        np.testing.assert_array_equal(everything.index, np.arange(snapshot.density.size))
        assert np.all(everything.weights == 1)


@pytest.mark.parametrize("pbc", [(True, True, True), (True, False, True), (False, False, False)])
def test_distances_to_nuclei_see_every_image(pbc: tuple[bool, bool, bool]) -> None:
    rng = np.random.default_rng(3)
    cell = np.array([[4.0, 0.0, 0.0], [1.5, 3.5, 0.0], [-1.0, 0.7, 11.0]])
    positions = rng.random((3, 3)) @ cell * np.array([1, 1, 0.2]) + [0, 0, 0.2]
    structure = Structure(positions, np.full(3, 13), cell, np.array(pbc))
    small = Snapshot(structure, np.ones((5, 4, 6), np.float32), 1.0)
    found = nucleus_distances(structure, small.grid)
    shifts = [s for s in np.ndindex(7, 7, 7) if all(p or k == 3 for p, k in zip(pbc, s, strict=True))]
    images = np.concatenate([positions + (np.array(s) - 3) @ cell for s in shifts])
    points = small.grid.points()
    expected = np.sqrt(((points[:, None] - images[None]) ** 2).sum(-1)).min(1)
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found.max() > 4.0


# --- thinning out -------------------------------------------------------------------------------------------------


def test_covered_points_leave_their_weight_to_those_that_stay() -> None:
    rng = np.random.default_rng(0)
    dense, sparse = rng.normal(0, 0.01, (5000, 2)), rng.uniform(5, 50, (500, 2))
    points, weights = np.concatenate([dense, sparse]).astype(np.float32), rng.random(5500).astype(np.float32)
    keep, merged = cover(points, weights, 0.1, (0,))
    assert 0.97 * 550 <= keep.sum() <= 550
    assert merged[keep].sum() == pytest.approx(weights.sum(), rel=1e-5)
    assert np.all(merged[~keep] == 0)
    # The crowd is thinned out, the lonely points stay.
    assert keep[5000:].mean() > 0.6
    assert keep[:5000].mean() < 0.06
    again = cover(points, weights, 0.1, (0,))
    np.testing.assert_array_equal(keep, again[0])
    assert not np.array_equal(keep, cover(points, weights, 0.1, (1,))[0])
    everything, _ = cover(points, weights, 1.0, (0,))
    assert everything.mean() > 0.97


def test_components_are_those_of_the_standardised_features() -> None:
    rng = np.random.default_rng(1)
    x = (rng.normal(size=(500, 3)) @ rng.normal(size=(3, 9)) * 100 + 5).astype(np.float32)
    x[:, 4] = 7.0
    found = Coverage(x).components(x)
    z = (x - x.mean(0, dtype=float)) / np.where(x.std(0) > 1e-3, x.std(0, dtype=float), np.inf)
    u, s, _ = np.linalg.svd(z, full_matrices=False)
    np.testing.assert_allclose(np.abs(found[:, :3]), np.abs(u * s)[:, :3], atol=1e-3 * s[0] / 20)


# --- storing ------------------------------------------------------------------------------------------------------


def blocks_of(store: PointStore) -> list[np.ndarray]:
    return [np.concatenate([f, d[:, None], w[:, None]], axis=1) for f, d, w in store.blocks()]


def filled(path: Path | None) -> PointStore:
    rng = np.random.default_rng(0)
    store = PointStore(3, 60, path)
    for n in (10, 17, 25):
        store.append(rng.random((n, 3)).astype(np.float32), rng.random(n), rng.random(n).astype(np.float32))
    store.finish()
    return store


def test_a_scratch_file_holds_what_memory_does(tmp_path: Path) -> None:
    memory, disk = filled(None), filled(tmp_path / "x.features")
    for a, b in zip(blocks_of(memory), blocks_of(disk), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(memory.rows(8, 30), disk.rows(8, 30))
    keep = np.random.default_rng(1).random(52) < 0.4
    before, weights = np.concatenate(blocks_of(memory)), np.arange(52, dtype=np.float32)
    for store in (memory, disk):
        store.compact(keep, weights)
        after = np.concatenate(blocks_of(store))
        np.testing.assert_array_equal(after[:, :4], before[keep][:, :4])
        np.testing.assert_array_equal(after[:, 4], weights[keep])
        assert store.counts == [int(keep[:10].sum()), int(keep[10:27].sum()), int(keep[27:].sum())]
    assert (tmp_path / "x.features").stat().st_size == keep.sum() * 12


def test_shards_part_every_block_evenly_and_miss_nothing(tmp_path: Path) -> None:
    store = filled(tmp_path / "x.features")
    everything = store.rows(0, len(store))
    rows = []
    for k in range(4):
        features, index = store.shard(4, k)
        np.testing.assert_array_equal(features, everything[index])
        assert {int(np.searchsorted(store.starts, i, side="right")) for i in index} == {1, 2, 3}
        rows += index.tolist()
    assert sorted(rows) == list(range(52))
    assert sorted(shard_order(7, (0, 1))) == list(range(7))
    assert shard_order(7, (0, 1)) != shard_order(7, (0, 2))


def test_scratch_files_are_reopened_by_key_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.features"
    store = filled(path)
    assert PointStore.reopen(3, path, "key") is None
    store.seal("key")
    assert PointStore.reopen(3, path, "other") is None
    again = PointStore.reopen(3, path, "key")
    assert again is not None
    np.testing.assert_array_equal(np.concatenate(blocks_of(again)), np.concatenate(blocks_of(store)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    assert PointStore.reopen(3, path, "key") is None
    with pytest.raises(DatasetError, match="cut off"):
        again.rows(0, 52)
    path.write_bytes(whole)
    (tmp_path / "x.features.npz").write_bytes(b"PK nonsense")
    assert PointStore.reopen(3, path, "key") is None
    again.remove()
    assert not list(tmp_path.iterdir())
    with pytest.raises(DatasetError, match="scratch file"):
        PointStore(3, 10, tmp_path / "none" / "x.features")


# --- gathering and scaling ----------------------------------------------------------------------------------------


def test_gathered_points_are_those_of_the_snapshots(data: Dataset, tmp_path: Path) -> None:
    settings = TrainingSettings(**{**SMALL, "points_per_snapshot": 200})
    part = Part(data, Split((0, 2), (1,), (3,)), "print")
    spec = settings.descriptor(["Al"])
    store = gather_points([part], "train", spec, settings)
    assert store.counts == [200, 200]
    for k, (features, density, weights) in zip((0, 2), store.blocks(), strict=True):
        index = choose_uniform(1000, 200, (0, 0, k)).index
        every, truth = point_features(data[k], spec, np.arange(1000))
        assert sorted(density.tolist()) == sorted(truth[index].tolist())
        for row in range(0, 200, 40):
            place = index[int(np.flatnonzero(truth[index] == density[row])[0])]
            np.testing.assert_allclose(features[row], every[place], atol=1e-5)
        assert np.all(weights == 1)
    on_disk = gather_points([part], "train", spec, settings, tmp_path / "x.features")
    np.testing.assert_array_equal(np.concatenate(blocks_of(store)), np.concatenate(blocks_of(on_disk)))


def test_thinned_training_points_keep_their_share_and_weight(data: Dataset) -> None:
    settings = TrainingSettings(**{**SMALL, "points_per_snapshot": 400, "keep_fraction": 0.3})
    part = Part(data, Split((0, 2), (1,), (3,)), "print")
    spec = settings.descriptor(["Al"])
    store = gather_points([part], "train", spec, settings)
    assert 0.25 * 800 < len(store) <= 0.3 * 800
    assert store.weights.sum() == pytest.approx(800)
    assert len(gather_points([part], "validation", spec, settings)) == 400


@pytest.mark.parametrize("kind", [SMALL, SMOOTH])
def test_scaling_is_that_of_weighted_moments(data: Dataset, kind: dict) -> None:
    settings = TrainingSettings(**{**kind, "points_per_snapshot": 300, "sampling": "importance"})
    part = Part(data, Split((0, 2), (1,), (3,)), "print")
    spec = ModelSpec(
        settings.descriptor(["Al"]),
        {"Al": 3.0},
        settings.network(),
        distance_length=1.5,
        target=settings.target,
    )
    store = gather_points([part], "train", spec.descriptor, settings)
    scaling = Scaling.fit(spec, store)
    raw, w = store.rows(0, 600).astype(float).copy(), store.weights.astype(float)
    assert w.std() > 0.1
    x = raw.copy()
    if settings.family == "scalar-product":
        x[:, :8] = np.exp(-x[:, :8] / 1.5)
    mean = np.average(x, axis=0, weights=w)
    std = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=w))
    np.testing.assert_allclose(scaling.tensors["feature_mean"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaling.tensors["feature_std"], np.maximum(std, 1e-5), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(scaling.tensors["feature_low"], x.min(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaling.tensors["feature_high"], x.max(0), rtol=1e-5, atol=1e-6)
    baseline = (
        scaling.tensors["baseline"].numpy().astype(float) if settings.target == "delta" else np.zeros(raw.shape[1])
    )
    y = store.density - raw @ baseline
    assert scaling.spec.density_mean == pytest.approx(np.average(y, weights=w))
    deviation = np.sqrt(np.average((y - np.average(y, weights=w)) ** 2, weights=w))
    assert scaling.spec.density_std == pytest.approx(deviation, rel=1e-5)
    np.testing.assert_allclose(scaling.targets(store), (y - scaling.spec.density_mean) / deviation, atol=2e-5)
    inputs = scaling.inputs(store.rows(0, 600))
    np.testing.assert_allclose(inputs, (x - mean) / np.maximum(std, 1e-5), atol=2e-3)
    copy = store.rows(0, 600).copy()
    assert torch.equal(scaling.standardise(copy), inputs)


# --- two-body superposition ---------------------------------------------------------------------------------------


def test_baseline_solves_the_weighted_normal_equations() -> None:
    spec = DescriptorSpec(("Si", "Ge"), family="smooth", cutoff=4.0, n_radial=5, n_basis=2, l_max=1)
    rng = np.random.default_rng(0)
    n, k = 700, 10
    features = rng.normal(3.0, 1.0, (n, spec.n_features)).astype(np.float32)
    features[:, :k] = features[:, :k] @ rng.normal(size=(k, k)).astype(np.float32)
    density = features[:, :k] @ rng.normal(size=k) + 0.3 * features[:, k] + 2.0 + rng.normal(size=n)
    weights = rng.random(n).astype(np.float32)
    parts = [(features[a:b], density[a:b], weights[a:b]) for a, b in ((0, 100), (100, 500), (500, n))]
    found = fit_baseline(parts, spec)
    root = np.sqrt(weights.astype(float))[:, None]
    design = np.concatenate([features[:, :k].astype(float), np.ones((n, 1))], axis=1)
    expected = np.linalg.lstsq(design * root, density * root[:, 0], rcond=None)[0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:k], expected[:k], atol=1e-4)
    assert np.all(found[k:] == 0)
    assert RIDGE < 1e-5


def test_columns_without_spread_and_equal_ones_do_not_upset_the_baseline() -> None:
    spec = DescriptorSpec(("Al",), family="smooth", cutoff=4.0, n_radial=4, n_basis=0, l_max=0)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(200, 4)).astype(np.float32)
    features[:, 1] = 2.0
    features[:, 3] = features[:, 2]
    density = features[:, 0] - 3.0 * features[:, 2]
    found = fit_baseline([(features, density.astype(float), np.ones(200, np.float32))], spec)
    np.testing.assert_allclose(found, [1.0, 0.0, -1.5, -1.5], atol=1e-3)
    with pytest.raises(SettingsError, match="no two-body sums"):
        fit_baseline([], DescriptorSpec(("Al",)))
