"""The self-check: it passes where the density is invariant, and finds what is not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from model_tools import delta_model
from predict_tools import aluminium, small_model, triclinic_structure

from gpurho import cli
from gpurho.errors import GpurhoError, SettingsError
from gpurho.pipelines import selfcheck
from gpurho.pipelines.selfcheck import self_check
from gpurho.structure import Structure

NAMES = ["rotation", "reflection", "translation", "periods", "permutation", "tiles"]


def check(atoms, model, **changes):
    return self_check(atoms, model, device="cpu", spacing=0.4, points=60, **{"processes": 1, **changes})


def test_both_families_pass_and_say_their_deviations():
    crystal = triclinic_structure()
    silicon = Structure(crystal.positions, np.array([14, 32, 14]), crystal.cell, crystal.pbc)
    for atoms, model in (
        (aluminium(), small_model()),
        (aluminium(rattle=0.0), small_model()),
        (silicon, delta_model()),
    ):
        found = check(atoms, model)
        assert [d.name for d in found.deviations] == NAMES
        assert found.ok, str(found)
        assert found.n_points == 60
        assert found.deviations[0].tolerance == pytest.approx(5e-5 * found.largest)
        assert "rotation" in str(found)
        assert len(str(found).splitlines()) == 8
        assert found.to_dict()["ok"] is True


def test_slabs_have_periods_along_two_axes():
    slab = aluminium()
    slab.center(vacuum=3.0, axis=2)
    slab.pbc = [True, True, False]
    assert check(slab, small_model()).ok


def test_a_density_that_depends_on_the_frame_is_found(monkeypatch):
    honest = selfcheck._at

    def crooked(job, structure, points):
        mean, sigma = honest(job, structure, points)
        return mean + 1e-3 * points[:, 0], sigma

    monkeypatch.setattr(selfcheck, "_at", crooked)
    found = check(aluminium(), small_model())
    assert not found.ok
    assert [d.ok for d in found.deviations] == [False, True, False, False, True, True]
    assert str(found).count("NO ") == 3


def test_rewrites_are_not_trivial():
    structure, points = Structure.from_ase(aluminium()), np.eye(3)
    for name, _, rewrite in selfcheck._REWRITES:
        other, moved = rewrite(structure, points, np.random.default_rng(1))
        assert np.abs(other.positions - structure.positions).max() > 0.1, name
        assert other.volume == pytest.approx(structure.volume)
        assert moved.shape == points.shape


@pytest.mark.parametrize("changes", [{"points": 3}, {"points": True}, {"processes": 0}, {"processes": 1.5}])
def test_settings_are_checked(changes):
    with pytest.raises(SettingsError, match="whole number"):
        self_check(aluminium(), small_model(), **changes)
    with pytest.raises(GpurhoError):
        self_check(None, small_model())


def test_the_command_prints_and_says_by_its_exit_code(tmp_path, capsys, monkeypatch):
    aluminium().write(tmp_path / "al.xyz")
    small_model().save(tmp_path / "m.safetensors")
    words = ["check", "--structure", str(tmp_path / "al.xyz"), "--model", str(tmp_path / "m.safetensors")]
    words += ["--device", "cpu", "--processes", "1"]
    assert cli.main(words) == 0
    assert "rotation" in capsys.readouterr().out
    assert cli.main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] is True
    monkeypatch.setitem(selfcheck.TOLERANCES, "fp32", 0.0)
    assert cli.main(words) == 1
    assert "NO " in capsys.readouterr().out
    assert cli.main(["check", "--structure", str(tmp_path / "none.xyz")]) == 1
    assert "does not exist" in capsys.readouterr().err


def test_the_error_budget_has_its_stages_and_their_order(tmp_path):
    path = Path(__file__).resolve().parents[1] / "benchmarks" / "error_budget.py"
    spec = importlib.util.spec_from_file_location("error_budget", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    crystal = triclinic_structure()
    silicon = Structure(crystal.positions, np.array([14, 32, 14]), crystal.cell, crystal.pbc)
    rows = module.budget(silicon, delta_model(), np.random.default_rng(0).uniform(0, 4, (20, 3)))
    assert {"descriptors", "standardisation", "two-body part", "network, fp32", "network, bf16"} < set(rows)
    largest = {name: row["density_largest"] for name, row in rows.items()}
    assert 0 < largest["network, fp32"] < 1e-5
    assert largest["all, fp32"] < 1e-4
    assert largest["network, bf16"] > 100 * largest["network, fp32"]
    sums = module.integral_error(10_000)
    assert sums["exact"] == 0.0 < sums["float32, one by one"]
    assert module.table({"stages": rows, "integral": sums}).count("\n") == len(rows) + 3
