"""Very large systems: counts beyond 32 bits, atoms that are never all in memory, plans for a billion atoms."""

from __future__ import annotations

import itertools
import json
import math
import time

import numpy as np
import pytest
import torch
from predict_tools import aluminium, small_model

from gpurho.densityfile import Layout
from gpurho.descriptors import Environment, StartedFeatures
from gpurho.errors import SettingsError
from gpurho.fields import Totals
from gpurho.grid import Grid
from gpurho.integrals import sublattice
from gpurho.keep import Keep
from gpurho.partition import make_tiles
from gpurho.pipelines.calibration import Rates, measure
from gpurho.pipelines.plan import plan_job
from gpurho.pipelines.scale import scale_plan
from gpurho.pipelines.settings import settle
from gpurho.pipelines.tiling import Stages
from gpurho.structure import Structure

# -- counts beyond 32 bits --------------------------------------------------------------------------------------

HUGE = Grid((20_000, 15_001, 14_000), np.diag([4000.0, 3000.2, 2800.0]))


def test_tiles_of_a_huge_grid_count_in_64_bits():
    assert HUGE.n_points == 20_000 * 15_001 * 14_000 > 2**41
    tiles = make_tiles(HUGE)
    assert len(tiles) == 313 * 235 * 219 > 2**23
    assert tiles.n_points == HUGE.n_points
    last = tiles[len(tiles) - 1]
    assert last.stop == HUGE.shape
    assert last.start == (312 * 64, 234 * 64, 218 * 64)
    flat = (last.start[0] * HUGE.shape[1] + last.start[1]) * HUGE.shape[2] + last.start[2]
    assert flat > 2**41
    edges = [tiles[i] for i in (0, 219, 219 * 235, len(tiles) // 2, len(tiles) - 2)]
    for tile in edges:
        i, j, k = (start // 64 for start in tile.start)
        assert (i * 235 + j) * 219 + k == tile.index
    thin = make_tiles(Grid((2**31 - 1, 2, 2), np.diag([1e5, 1.0, 1.0])), (1, 1, 1))
    assert len(thin) == 4 * (2**31 - 1)
    assert thin[2**33 - 5].stop == (2**31 - 1, 2, 2)


def test_points_of_a_far_tile_are_where_they_should_be():
    tiles = make_tiles(HUGE)
    last = tiles[len(tiles) - 1]
    points = HUGE.points(last.start, last.stop)
    assert points.shape == (last.n_points, 3)
    want = np.array(last.stop, float) - 1
    np.testing.assert_allclose(points[-1], want * [4000.0 / 20_000, 3000.2 / 15_001, 2800.0 / 14_000], rtol=1e-15)
    box, weight = sublattice(last, HUGE.steps)
    chosen = [len(range(n)[axis]) for axis, n in zip(box, last.shape, strict=True)]
    assert weight * math.prod(chosen) == pytest.approx(last.n_points)


def test_sums_and_sizes_of_a_huge_grid():
    parts = [Totals(n_points=3 * 10**9, sum_mean=5.0e8, n_capped=2**31, n_negative=7) for _ in range(2000)]
    merged = Totals.merged(parts)
    assert merged.n_points == 6 * 10**12
    assert merged.n_capped == 2000 * 2**31
    assert merged.sum_mean == 1.0e12
    structure = Structure.from_ase(aluminium())
    grid = Grid((20_000, 15_004, 14_000), HUGE.cell)

    def size(words: list[str]) -> int:
        tiles = make_tiles(grid)
        names = ("mean", "aleatoric", "epistemic")
        return Layout(grid, tiles, structure, names, {}, {}, None, Keep.of(words)).raw_bytes

    assert size(["field"]) == 12 * grid.n_points > 2**45
    assert size(["coarse:4"]) * 64 == size(["field"])
    assert size(["slice:y=0.5"]) == 12 * 20_000 * 14_000
    assert size(["electrons"]) == 0


def test_kernels_count_with_64_bits_at_the_edges():
    """Descriptors in the last tile of a grid of 4e12 points, against those of the same points near the origin."""
    model = small_model()
    corner = np.array([3990.0, 2990.0, 2790.0])
    rng = np.random.default_rng(0)
    near = rng.uniform(0, 9, (60, 3))
    far = Structure(corner + near, np.full(60, 13), HUGE.cell, np.zeros(3, bool))
    tiles = make_tiles(HUGE, (8, 8, 8))
    tile = tiles[len(tiles) - 1]
    got = Environment(far, model.spec.descriptor).tile_features(HUGE, tile).values
    here = Structure(near, np.full(60, 13), np.eye(3) * 30, np.zeros(3, bool))
    points = HUGE.points(tile.start, tile.stop) - corner
    want = Environment(here, model.spec.descriptor).point_features(points).values
    np.testing.assert_allclose(got, want, atol=2e-4)


# -- plans ------------------------------------------------------------------------------------------------------

RATES = Rates(1e-8, 4e-9, 1e-9, 3e-9, 1e-6, 2e-6, 4e-6)


def test_a_plan_for_a_billion_atoms_by_hand():
    model = small_model()
    options = {"density": 0.06, "device": "cpu", "precision": "fp32", "calibrated": RATES, "devices": 8}
    plan = scale_plan(10**9, model, spacing=0.25, keep=["coarse:4", "atoms", "slice:z=0.5"], price=2.0, **options)
    edge = (1e9 / 0.06) ** (1 / 3)
    axis = int(np.ceil(edge / 0.25))
    axis = -(-axis // 4) * 4
    assert plan.grid_shape == (axis,) * 3
    assert plan.n_points == axis**3 > 2**39
    assert plan.n_tiles == int(np.ceil(axis / 64)) ** 3
    assert plan.electrons == 3e9
    assert plan.network_seconds == pytest.approx(axis**3 * 4e-9 / 8)
    assert plan.driver_seconds == pytest.approx(2000)
    assert plan.reading_seconds == pytest.approx(4000)
    run = (axis**3 * (edge / axis) ** 3 / 128) ** (1 / 3)
    halo = (1 + 2 * model.spec.descriptor.reach / run) ** 3
    assert plan.setup_seconds == pytest.approx(1e9 * halo * 1e-6 / 8, rel=1e-6)
    raw = 12 * (axis // 4) ** 3 + 12 * axis**2 + 80 * 10**9
    assert plan.stored_bytes == pytest.approx(0.75 * raw, rel=1e-9)
    assert plan.disk_seconds == pytest.approx(0.75 * raw / 1e9, rel=1e-6)
    device = plan.setup_seconds + plan.feature_seconds + plan.network_seconds + plan.reduction_seconds
    assert plan.seconds == pytest.approx(2000 + max(device, plan.encoding_seconds, plan.disk_seconds))
    assert plan.dominant == "one process before"
    assert plan.price == pytest.approx(2.0 * plan.device_hours)
    assert plan.device_hours == pytest.approx(8 * plan.seconds / 3600)
    json.dumps(plan.to_dict())
    text = str(plan)
    for word in ("1,000,000,000", "one process before takes longest", "device hours", "coarse:4x4x4"):
        assert word in text


def test_plans_grow_as_they_must():
    options = {"density": 0.06, "device": "cpu", "precision": "fp32", "calibrated": RATES}
    plans = [scale_plan(n, small_model(), spacing=0.25, **options) for n in (10**6, 10**8, 10**10)]
    for small, large in itertools.pairwise(plans):
        assert large.n_points / small.n_points == pytest.approx(100, rel=0.02)
        assert large.network_seconds / small.network_seconds == pytest.approx(100, rel=0.02)
        assert large.stored_bytes / small.stored_bytes == pytest.approx(100, rel=0.02)
    many = scale_plan(10**8, small_model(), spacing=0.25, devices=100, **options)
    assert many.feature_seconds == pytest.approx(plans[1].feature_seconds / 100)
    assert many.driver_seconds == plans[1].driver_seconds
    assert many.worker_bytes < plans[1].worker_bytes
    full = plans[1]
    few = scale_plan(10**8, small_model(), spacing=0.25, keep="electrons", **options)
    assert few.stored_bytes == 0 < full.stored_bytes == int(0.75 * 12 * full.n_points)


def test_rates_are_measured_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gpurho.pipelines.calibration.MANY_EDGE", 8)
    monkeypatch.setattr("gpurho.pipelines.calibration.PROBE_POINTS", 12)
    model, options = small_model(), {"density": 0.06, "device": "cpu", "precision": "fp32", "keep": "atoms"}
    first = scale_plan(10**9, model, **options)
    assert all(getattr(first, f"{name}_seconds") > 0 for name in ("driver", "setup", "feature", "network", "reading"))
    file = tmp_path / "gpurho" / "calibration.json"
    assert len(json.loads(file.read_text())) == 1

    def never(*_):
        raise AssertionError("it measured again")

    with monkeypatch.context() as patch:
        patch.setattr("gpurho.pipelines.calibration.measure", never)
        assert scale_plan(10**9, model, **options) == first
        with pytest.raises(AssertionError, match="again"):
            scale_plan(10**9, model, **{**options, "uncertainty": None})
    file.write_text("{ damaged")
    assert scale_plan(10**9, model, **options).n_points == first.n_points
    assert len(json.loads(file.read_text())) == 1


def test_tiles_that_a_device_cut_short_are_not_measured(monkeypatch):
    features, calls = Stages.features, []

    def cut_short(stages, tile):
        calls.append(tile)
        values, made = features(stages, tile)
        if len(calls) <= 2:
            return values, StartedFeatures(made.values, torch.zeros(1), lambda marks: None)
        time.sleep(0.05)
        return values, made

    monkeypatch.setattr(Stages, "features", cut_short)
    monkeypatch.setattr("gpurho.pipelines.calibration.MANY_EDGE", 8)
    monkeypatch.setattr("gpurho.pipelines.calibration.PROBE_POINTS", 6)
    job = settle(aluminium(), small_model(), spacing=0.5, device="cpu")
    assert measure(job).features * 6**3 > 0.05
    calls.clear()
    found = plan_job(job)
    assert found.n_points / found.feature_seconds < 16**3 / 0.05
    assert len(calls) == 5


def test_a_cache_that_cannot_be_written_costs_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("gpurho.pipelines.calibration.measure", lambda job: RATES)
    assert scale_plan(10**6, small_model(), density=0.06, device="cpu").driver_seconds == pytest.approx(2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_atoms": 1.5}, "not a whole number"),
        ({"n_atoms": 0}, "out of range"),
        ({"n_atoms": 10**13}, "out of range"),
        ({"density": None}, "density .* or the cell"),
        ({"cell": (10.0, 10, 10)}, "density .* or the cell"),
        ({"density": 60.0}, "not one of matter"),
        ({"density": None, "cell": (1.0, 1.0, 0.0)}, "no volume"),
        ({"devices": 0}, "devices 0"),
        ({"disk_rate": 0}, "disk_rate"),
        ({"composition": {"Cu": 1}}, "composition"),
        ({"model": "auto"}, "name the model"),
        ({"keep": "nothing"}, "not known"),
    ],
)
def test_wrong_plans(changes, message):
    options = {"n_atoms": 10**9, "model": small_model(), "density": 0.06, "device": "cpu", "calibrated": RATES}
    with pytest.raises(SettingsError, match=message):
        scale_plan(**(options | changes))


def test_plan_by_number_from_python_and_the_command_line(tmp_path, monkeypatch, capsys):
    from gpurho.cli import main
    from gpurho.pipelines.plan import plan

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("gpurho.pipelines.calibration.measure", lambda job: RATES)
    model = small_model()
    model.save(tmp_path / "small.safetensors")
    found = plan(10**9, model, cell=(2600.0, 2600.0, 2500.0), device="cpu", devices=4)
    assert found.density == pytest.approx(1e9 / (2600.0 * 2600 * 2500))
    words = ["plan", "--atoms", "1e9", "--density", "0.06", "--model", str(tmp_path / "small.safetensors")]
    assert main([*words, "--device", "cpu", "--devices", "4", "--price", "2.5", "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["n_atoms"] == 10**9
    assert values["price"] == pytest.approx(2.5 * values["device_hours"])
    assert main(["plan"]) == 1
    assert "structure file or --atoms" in capsys.readouterr().err
    assert main([*words, "--grid", "8", "8", "8"]) == 1
    assert "--atoms does not go with --grid" in capsys.readouterr().err
