"""The benchmark of the paper's tables: that its plain way is gpurho's definition, and that figures scale as stated."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not FOLDER.exists():
        pytest.skip("the benchmarks are not installed with the package")
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("paper_tables")


@pytest.mark.parametrize("material", [0, 1])
def test_the_plain_way_agrees_on_features_and_densities(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch, material: int
) -> None:
    monkeypatch.setattr(tables, "CHECK_BOX", (6, 6, 6))
    system = tables.systems(quick=True)[material]
    model = tables.models_of(system)["same"]
    found = tables.agreement(system, model)
    assert found["agrees"], found
    # A wrong weight or a wrong atom must show.
    model.tensors["layers.0.weight_mean"][:, 0] += 0.5
    points = tables.paper_points(system, (2, 2, 2))
    way = tables.PaperDescriptors(system.atoms, model.spec.descriptor)
    np.testing.assert_allclose(way.features_point_by_point(points), way.features(points), rtol=0, atol=1e-6)
    good = tables.PaperNetwork(tables.models_of(system)["same"]).density(way.features(points))
    bad = tables.PaperNetwork(model).density(way.features(points))
    assert np.abs(good - bad).max() > tables.DENSITY_TOLERANCE


def test_time_scales_with_the_points_but_for_the_set_up(tables: ModuleType) -> None:
    row = tables.scaled(setup=1.0, descriptors=2.0, network=3.0, total=7.0, points=10, all_points=100)
    assert row["cpu_seconds"] == pytest.approx(1 + 6 * 10)
    assert row["share"]["descriptors"] == pytest.approx(20 / 61)
    assert row["share"]["rest"] == pytest.approx(1 - 50 / 61)
    assert row["points_per_cpu_second"] == pytest.approx(100 / 61)


def test_a_measurement_counts_its_box_and_its_stages(tables: ModuleType) -> None:
    system = tables.systems(quick=True)[0]
    row = tables.measure_gpurho(system, tables.models_of(system)["shipped"], None, "fp32", (8, 8, 4))
    assert row["points_measured"] == 256
    assert row["fraction_measured"] == pytest.approx(256 / 60**3)
    assert row["precision"] == "fp32"
    assert 0 < row["cpu_seconds_setup"] < row["cpu_seconds_measured"]
