"""The descriptor benchmark itself: that it runs, agrees, and would notice a disagreement."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numba
import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "descriptors.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if not SCRIPT.exists():
        pytest.skip("the benchmarks are not installed with the package")
    for name in ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS"):
        monkeypatch.setenv(name, str(numba.get_num_threads()))
    spec = importlib.util.spec_from_file_location("benchmark_descriptors", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_descriptors", module)
    spec.loader.exec_module(module)
    return module


def test_methods_agree_and_the_report_says_on_what(benchmark: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    threads = str(numba.get_num_threads())
    arguments = ["--cells", "2", "--planes", "2", "--repeats", "1", "--threads", threads, "--json", str(path)]
    assert benchmark.main(arguments) == 0
    report = json.loads(path.read_text())
    assert report["machine"]["threads"] == int(threads)
    assert {"numpy", "numba", "scipy"} <= set(report["machine"]["versions"])
    (system,) = report["systems"]
    assert system["atoms"] == 32
    assert system["points"] == 2 * system["grid"][1] * system["grid"][2]
    reference, *_, ours = system["methods"]
    assert "cKDTree" in reference["method"]
    assert "gpurho" in ours["method"]
    assert ours["points_with_other_distances"] == ours["points_with_other_cosines_elsewhere"] == 0
    smooth = system["smooth"][-1]
    assert "gpurho" in smooth["method"]
    assert smooth["points_with_other_features"] == 0
    assert 0 < smooth["largest_difference"] < 1e-5
    assert all(row["points_per_second_median"] > 0 for row in [*system["methods"], *system["smooth"]])


def test_differences_are_counted(benchmark: ModuleType) -> None:
    case = benchmark.make_case(2, 0.4, 1)
    reference = np.empty((len(case.points), case.spec.n_features), np.float32)
    benchmark.scipy_method(case, 1).run(reference)
    case.ties[:] = False
    case.ties[0] = True
    values = reference.copy()
    values[0, -1] += 0.01
    values[1, -1] += 0.01
    values[2, -1] = np.nan
    values[3, 0] += 1e-3
    found = benchmark.agreement(values, reference, case)
    assert found["points_with_other_cosines_at_ties"] == 1
    assert found["points_with_other_cosines_elsewhere"] == 2
    assert found["points_with_other_distances"] == 1
    assert found["largest_distance_difference"] == pytest.approx(1e-3, rel=1e-3)
    smooth = np.full((4, 2), 2.0, np.float32)
    changed = smooth.copy()
    changed[0, 1] += 1e-3
    changed[1, 0] = np.nan
    assert benchmark.smooth_agreement(changed, smooth)["points_with_other_features"] == 2
