"""Energies of a scan, kept one by one: nothing is computed twice, nothing is taken for something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase.build import bulk
from ase.io import write
from energy_tools import EmtEngine, command
from predict_tools import small_model

from gpurho.dft.base import DFTSettings, KMesh
from gpurho.energyjournal import HEAD, EnergyJournal
from gpurho.errors import EngineError, SettingsError, StoreError
from gpurho.journal import Journal, Lock, encode_line, read_journal
from gpurho.pipelines import energy as pipeline

AL = bulk("Al", "fcc", a=4.0, cubic=True)
SCALES = [0.98, 0.99, 1.0, 1.01, 1.02]
SETTINGS = DFTSettings(cutoff=100.0, kmesh=KMesh())


def scan(out, engine=None, atoms=AL, **options):
    """A scan's rows as plain values, and what the engine was called for."""
    engine = engine or EmtEngine()
    rows = pipeline.eos_scan(atoms, SCALES, engine=engine, out=out, **{"settings": SETTINGS, **options})
    return [row.to_dict() for row in rows], engine.calls


class Failing(EmtEngine):
    """Ends at its fourth calculation."""

    def ground_state(self, structure, settings, density=None):
        if len(self.calls) == 3:
            raise EngineError("the machine is on fire")
        return super().ground_state(structure, settings, density)


def test_the_same_scan_again_computes_nothing(tmp_path):
    out = tmp_path / "al.eos"
    want, calls = scan(None)
    first, again = scan(out)[0], scan(out)
    assert len(calls) == 5
    assert first == want
    assert again == (want, [])
    head, *lines = read_journal(out)
    assert head == HEAD
    assert [line["free_energy"] for line in lines] == (4 * np.array(want[0]["energies"])).tolist()
    assert [line["volume"] for line in lines] == pytest.approx([(4.0 * s) ** 3 for s in SCALES])
    assert {(line["source"], line["engine"], line["atoms"]) for line in lines} == {("SCF", "emt", 4)}
    assert list(tmp_path.iterdir()) == [out]


def test_the_form_and_the_way_there_compute_nothing(tmp_path):
    out = tmp_path / "al.eos"
    scan(out)
    (row,), calls = scan(out, form="vinet", settings=replace(SETTINGS, max_iterations=7))
    assert (row["form"], calls) == ("vinet", [])


@pytest.mark.parametrize(
    "change",
    [
        {"settings": replace(SETTINGS, cutoff=120.0)},
        {"settings": replace(SETTINGS, smearing_hartree=0.004)},
        {"settings": replace(SETTINGS, kmesh=KMesh((2, 2, 2)))},
        {"settings": replace(SETTINGS, tolerance=1e-6)},
        {"atoms": AL.repeat((2, 1, 1))},
        {"atoms": bulk("Al", "fcc", a=4.0 + 1e-9, cubic=True)},
        {"engine": type("Other", (EmtEngine,), {"name": "other"})()},
        {"engine": type("OtherPseudo", (EmtEngine,), {"identity": lambda self, structure: "emt Al 1234"})()},
    ],
)
def test_what_changes_energies_is_computed_and_both_are_kept(tmp_path, change):
    out = tmp_path / "al.eos"
    scan(out)
    found, calls = scan(out, **change)
    assert len(calls) == 5
    change.pop("engine", None)
    assert found == scan(None, **change)[0]
    assert len(read_journal(out)) == 11
    assert scan(out)[1] == []


def test_a_scan_that_fails_goes_on_where_it_was(tmp_path):
    out = tmp_path / "al.eos"
    with pytest.raises(EngineError, match="on fire"):
        scan(out, Failing())
    assert len(read_journal(out)) == 4
    found, calls = scan(out)
    assert len(calls) == 2
    assert found == scan(None)[0]


def test_predictions_of_a_model_are_kept_by_the_model(tmp_path):
    out = tmp_path / "al.eos"
    model = small_model()
    found, calls = scan(out, model=model)
    assert sorted(calls) == ["one_shot"] * 5 + ["scf"] * 5
    assert [row["source"] for row in found] == ["SCF", "model"]
    assert [line["source"] for line in read_journal(out)[1:]] == ["SCF", "model"] * 5
    assert scan(out, model=model) == (found, [])
    # The model alone, or the ground states alone, are parts of both.
    assert scan(out, model=model, self_consistent=False)[1] == []
    assert scan(out) == (found[:1], [])
    assert scan(out, model=small_model(seed=1))[1] == ["one_shot"] * 5
    assert scan(out, model=model, settings=replace(SETTINGS, grid=(9, 9, 9)))[1] == ["scf", "one_shot"] * 5


@pytest.mark.parametrize("cut", [1, 30])
def test_a_torn_line_costs_its_own_energy(tmp_path, cut):
    out = tmp_path / "al.eos"
    want = scan(out)
    out.write_bytes(out.read_bytes()[:-cut])
    assert scan(out) == (want[0], ["scf"])
    assert scan(out) == (want[0], [])
    assert len(read_journal(out)) == 6


def test_an_empty_file_and_a_torn_first_line_are_begun_anew(tmp_path):
    out = tmp_path / "al.eos"
    for text in (b"", encode_line(HEAD)[:20]):
        out.write_bytes(text)
        assert len(scan(out)[1]) == 5
        assert scan(out)[1] == []


def other_journal(path):
    journal = Journal(path)
    journal.append({"journal": 1, "settings": {}})
    journal.close()


@pytest.mark.parametrize(
    ("write_it", "words"),
    [
        (lambda path: path.write_text("4\nLattice=... al\n"), "no file of kept energies"),
        (lambda path: path.write_bytes(bytes(5000)), "no file of kept energies"),
        (other_journal, "no file of kept energies"),
        (lambda path: path.write_bytes(encode_line({**HEAD, "journal": 9})), "newer than 1"),
        (lambda path: path.write_bytes(encode_line(HEAD) + encode_line({"key": "a"})), "no file of kept energies"),
        (lambda path: path.mkdir(), "cannot be used"),
    ],
)
def test_files_of_another_kind_stay_as_they_are(tmp_path, write_it, words):
    out = tmp_path / "al.eos"
    write_it(out)
    before = out.read_bytes() if out.is_file() else None
    engine = EmtEngine()
    with pytest.raises(StoreError, match=words):
        scan(out, engine)
    assert engine.calls == []
    assert before is None or out.read_bytes() == before
    assert list(tmp_path.iterdir()) == [out]


def test_names_and_places_that_cannot_be(tmp_path):
    with pytest.raises(StoreError, match=r"give a name like al\.eos"):
        scan(tmp_path / "al.h5")
    with pytest.raises(StoreError, match="No such file or directory"):
        scan(tmp_path / "no" / "such" / "al.eos")
    scan(tmp_path / "new" / "al.eos")
    assert (tmp_path / "new" / "al.eos").is_file()


def test_two_runs_do_not_share_a_file(tmp_path):
    out = tmp_path / "al.eos"
    lock = Lock(tmp_path / "al.eos.lock", out)
    with pytest.raises(StoreError, match="written by another process"):
        scan(out)
    lock.release()
    assert len(scan(out)[1]) == 5


def test_a_full_disk_keeps_what_was_there(tmp_path, monkeypatch):
    out = tmp_path / "al.eos"
    sound, lines = os.write, []

    def full(file, data):
        if b"free_energy" not in data:
            return sound(file, data)
        lines.append(data)
        return sound(file, data if len(lines) < 3 else data[:10])

    with monkeypatch.context() as patch:
        patch.setattr("gpurho.journal.os.write", full)
        with pytest.raises(StoreError, match="2 energies are safe in it: make room and run the same command again"):
            scan(out)
    found, calls = scan(out)
    assert len(calls) == 3
    assert found == scan(None)[0]


def test_what_is_no_number_is_not_kept(tmp_path):
    with EnergyJournal(tmp_path / "a.eos") as kept:
        assert np.isnan(kept.make("a", lambda: np.nan))
        assert kept.make("b", lambda: np.float64(-1.5)) == -1.5
        assert kept.make("b", lambda: 0.0) == -1.5
        assert len(kept) == 1
    with EnergyJournal(tmp_path / "a.eos") as kept:
        assert kept.make("a", lambda: 2.0) == 2.0
        assert len(kept) == 2


SLOW = """
import sys, time
from ase.build import bulk
from energy_tools import EmtEngine
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.pipelines.energy import eos_scan
class Slow(EmtEngine):
    def ground_state(self, structure, settings, density=None):
        time.sleep(0.15)
        return super().ground_state(structure, settings, density)
eos_scan(bulk("Al", "fcc", a=4.0, cubic=True), [0.98, 0.99, 1.0, 1.01, 1.02], engine=Slow(), out=sys.argv[1],
         settings=DFTSettings(cutoff=100.0, kmesh=KMesh()))
"""


def test_a_killed_scan_goes_on(tmp_path):
    out = tmp_path / "al.eos"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    with subprocess.Popen([sys.executable, "-c", SLOW, str(out)], env=environment) as process:
        until = time.monotonic() + 60
        while len(read_journal(out)) < 3 and time.monotonic() < until:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    kept = len(read_journal(out)) - 1
    assert 2 <= kept < 5
    found, calls = scan(out)
    assert len(calls) == 5 - kept
    assert found == scan(None)[0]
    assert list(tmp_path.iterdir()) == [out]


def test_the_command(tmp_path, capsys, monkeypatch):
    made = []

    def make(name, **options):
        made.append(EmtEngine())
        return made[-1]

    monkeypatch.setattr("gpurho.pipelines.energy.make_engine", make)
    out = tmp_path / "al.eos"
    words = ("eos", "Al", "--a", 3.9, 4.1, "--n", 5, "--cutoff", 100, "--gamma", "--json", "--quiet", "--out", out)
    command(*words)
    first = json.loads(capsys.readouterr().out)
    command(*words)
    assert json.loads(capsys.readouterr().out) == first
    assert [len(engine.calls) for engine in made] == [5, 0]
    write(tmp_path / "two.xyz", [AL, AL])
    for target in ("two.xyz", "none.h5"):
        with pytest.raises(SettingsError, match=f"{target} has its energies.*leave --out out"):
            command("eos", tmp_path / target, "--out", out)
