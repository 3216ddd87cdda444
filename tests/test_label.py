"""Labelling runs: durable, resumable, honest about failures."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.io import read, write

from gpurho.datasets import open_dataset
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.errors import SettingsError, StoreError, StructureError, UnknownSpeciesError
from gpurho.labelstore import LabelStore, label_key, rounded
from gpurho.model import load_model
from gpurho.pipelines.label import label
from gpurho.pipelines.predict import predict
from gpurho.structure import Structure

ENGINE = "toy_engine:ToyEngine"
SETTINGS = DFTSettings(cutoff=100.0, kmesh=KMesh())


@pytest.fixture(autouse=True)
def _workers_find_the_toy(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))


def frames(count):
    """Al4 cells told apart by the x of their first atom."""
    made = []
    for i in range(count):
        atoms = bulk("Al", cubic=True, a=4.05)
        atoms.positions[0, 0] = 0.001 * (i + 1)
        atoms.info.update(temperature_K=300.0 + i, family="al4", index=np.int64(i), nothing=None)
        made.append(atoms)
    return made


def run(atoms, out, log, **options):
    engine_options = {"log": str(log), **options.pop("engine_options", {})}
    return label(atoms, out, engine=ENGINE, engine_options=engine_options, settings=SETTINGS, progress=False, **options)


def test_labels_keep_order_metadata_and_settings(tmp_path):
    atoms = frames(3)
    result = run(atoms, tmp_path / "al.h5", tmp_path / "log", workers=2)
    assert (result.computed, result.found, result.failures) == (3, 0, {})
    data = open_dataset(tmp_path / "al.h5")
    assert len(data) == 3
    for i, snapshot in enumerate(data):
        np.testing.assert_array_equal(snapshot.structure.positions, atoms[i].positions)
        assert snapshot.meta["temperature_K"] == 300.0 + i
        assert (snapshot.meta["family"], snapshot.meta["index"]) == ("al4", i)
        assert snapshot.meta["kpts"] == [1, 1, 1]
        assert snapshot.meta["engine"] == "toy 1"
        assert snapshot.meta["n_atoms"] == 4
        assert snapshot.meta["structure_fingerprint"] == Structure.from_ase(atoms[i]).fingerprint()
        assert json.loads(snapshot.meta["settings"])["cutoff"] == 100.0
        assert snapshot.arrays["forces"].shape == (4, 3)
        assert abs(snapshot.density.mean() * snapshot.structure.volume / 12 - 1) < 1e-5
    assert not (tmp_path / "al.h5.labels").exists()


def test_calculations_start_from_the_density_of_a_model(tmp_path):
    atoms, out, log = frames(2), tmp_path / "al.h5", tmp_path / "log"
    run(atoms[:1], tmp_path / "plain.h5", log, workers=1)
    assert not list(tmp_path.glob("*.npy"))
    run(atoms, out, log, workers=1, start="al")
    model = load_model("al")
    for i, frame in enumerate(atoms):
        given = np.load(f"{log}.{frame.positions[0, 0]:.3f}.npy")
        assert given.shape == SETTINGS.shape(Structure.from_ase(frame))
        np.testing.assert_array_equal(given, predict(frame, "al", grid=given.shape, uncertainty=None).mean)
        meta = open_dataset(out)[i].meta
        assert (meta["start"], meta["start_model"]) == ("al", model.fingerprint())
    # It is the same label, so that the two kinds do not stand side by side.
    keys = [open_dataset(path)[0].meta["label_key"] for path in (tmp_path / "plain.h5", out)]
    assert keys[0] == keys[1]
    assert run(atoms, out, log, workers=1).computed == 0


def test_a_start_from_a_model_that_does_not_know_an_atom_is_told_before_any_work(tmp_path):
    atoms = [*frames(1), bulk("Si", cubic=True)]
    with pytest.raises(UnknownSpeciesError, match=r"structure 1: .*Si"):
        run(atoms, tmp_path / "al.h5", tmp_path / "log", start="al")
    assert not (tmp_path / "log").exists()


def test_a_second_run_computes_nothing_and_more_structures_are_added(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    run(frames(2), out, log, workers=1)
    before = open_dataset(out)[0].density
    assert run(frames(2), out, log, workers=1).computed == 0
    result = run(frames(4), out, log, workers=1)
    assert (result.computed, result.found) == (2, 2)
    assert Counter(log.read_text().splitlines())["start 0.001"] == 1
    np.testing.assert_array_equal(open_dataset(out)[0].density, before)
    assert len(open_dataset(out)) == 4


def test_a_failed_calculation_is_recorded_and_the_run_goes_on(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    result = run(frames(3), out, log, engine_options={"faults": "scf:0.002"}, workers=1)
    assert result.computed == 2
    assert "no self-consistency" in result.failures[1]
    assert [s.meta["temperature_K"] for s in open_dataset(out)] == [300.0, 302.0]
    # The reason stays on disk; the structure is tried again only when asked for.
    assert "no self-consistency" in run(frames(3), out, log, workers=1).failures[1]
    again = run(frames(3), out, log, workers=1, retry_failed=True)
    assert (again.computed, again.failures) == (1, {})
    assert len(open_dataset(out)) == 3


def test_a_worker_that_dies_costs_only_its_structure(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    result = run(frames(4), out, log, engine_options={"faults": "die:0.002", "seconds": 0.05}, workers=2)
    assert result.computed == 3
    assert "killed" in result.failures[1]
    lines = Counter(log.read_text().splitlines())
    assert lines.pop("start 0.002") == 2
    assert set(lines.values()) == {1}, "work beside the dead worker was repeated"


SCRIPT = """
import sys, toy_engine
from ase.io import read
from gpurho.dft.base import DFTSettings, KMesh
from gpurho.pipelines.label import label
if __name__ == "__main__":
    label(read(sys.argv[1], ":"), sys.argv[2], engine="toy_engine:ToyEngine", workers=2, progress=False,
          engine_options={"log": sys.argv[3], "seconds": 0.15}, settings=DFTSettings(cutoff=100.0, kmesh=KMesh()))
"""


def test_five_kills_lose_no_finished_label_and_repeat_none(tmp_path):
    out, log, script, structures = (tmp_path / name for name in ("al.h5", "log", "run.py", "al.xyz"))
    script.write_text(SCRIPT)
    atoms = frames(60)
    for a in atoms:
        del a.info["nothing"]
    write(structures, atoms)
    command = [sys.executable, str(script), str(structures), str(out), str(log)]
    rng = random.Random(7)
    names = {
        label_key(Structure.from_ase(a), SETTINGS, "toy"): f"{a.positions[0, 0]:.3f}" for a in read(structures, ":")
    }
    kept: set[str] = set()

    def calls_since(offset):
        return {line.split()[1] for line in log.read_text()[offset:].splitlines() if line.startswith("start")}

    for _ in range(5):
        size = log.stat().st_size if log.exists() else 0
        process = subprocess.Popen(command)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and process.poll() is None:
            if log.exists() and log.stat().st_size > size:
                break
            time.sleep(0.02)
        time.sleep(rng.uniform(0.1, 0.8))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not calls_since(size) & {names[key] for key in kept}, "a finished label was computed again"
        parts = {p.stem for p in (tmp_path / "al.h5.labels").glob("*.h5") if not p.name.startswith(".")}
        assert kept <= parts, "a finished label was lost"
        kept = parts
    assert kept, "nothing was finished before the last kill: the test shows nothing"
    assert len(kept) < len(atoms), "all was finished before the last kill: the test shows nothing"
    # Workers must not outlive the run that started them.
    time.sleep(0.5)
    quiet = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == quiet
    subprocess.run(command, check=True, timeout=120)
    assert not calls_since(quiet) & {names[key] for key in kept}
    data = open_dataset(out)
    assert [s.structure.positions[0, 0] for s in data] == pytest.approx([0.001 * (i + 1) for i in range(len(atoms))])
    assert not (tmp_path / "al.h5.labels").exists()


def test_two_runs_on_one_output_are_kept_apart(tmp_path):
    with LabelStore(tmp_path / "al.h5"), pytest.raises(StoreError, match="another run"):
        run(frames(1), tmp_path / "al.h5", tmp_path / "log")


def test_a_lock_file_that_a_leaving_run_removed_is_not_a_lock(tmp_path, monkeypatch):
    taken = []

    def flock(file, how):
        if not taken:
            # Another run, which held this file until now, leaves and removes it.
            (tmp_path / "al.h5.labels" / "lock").unlink()
        taken.append(file.fileno())

    monkeypatch.setattr("gpurho.labelstore.fcntl.flock", flock)
    with LabelStore(tmp_path / "al.h5") as store:
        assert len(taken) == 2
        assert os.fstat(store._lock.fileno()).st_ino == (tmp_path / "al.h5.labels" / "lock").stat().st_ino


@pytest.mark.parametrize("kind", ["folder", "text", "older layout"])
def test_an_output_that_is_no_data_set_is_refused_before_any_work(tmp_path, kind):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    if kind == "folder":
        out.mkdir()
    elif kind == "text":
        out.write_text("notes")
    else:
        with h5py.File(out, "w") as file:
            file.create_group("snapshot_000")
    for _ in range(2):  # nor does a lock stay behind
        with pytest.raises(StoreError, match=r"give another --out"):
            run(frames(1), out, log)
    assert not log.exists()
    assert not (tmp_path / "al.h5.labels").exists()


def test_what_a_data_set_holds_besides_is_kept(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    run(frames(1), out, log)
    with h5py.File(out, "a") as file:
        file.attrs["reference"] = "ours"
        file["snapshots/000000"]["stress"] = np.eye(3)
    run(frames(3), out, log)
    with h5py.File(out) as file:
        assert file.attrs["reference"] == "ours"
        np.testing.assert_array_equal(file["snapshots/000000/stress"], np.eye(3))
        assert sorted(file["snapshots"]) == ["000000", "000001", "000002"]


def test_the_order_is_that_of_the_input_however_a_run_was_stopped(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    atoms = frames(4)
    run([atoms[3]], out, log)
    run([atoms[1], atoms[2]], out, log)
    run(atoms, out, log)
    assert [s.meta["index"] for s in open_dataset(out)] == [0, 1, 2, 3]


def test_a_data_set_that_vanishes_during_a_run_is_made_again(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    atoms = frames(2)
    run(atoms, tmp_path / "other.h5", log)
    whole = open_dataset(tmp_path / "other.h5")
    keys = [whole.meta(i)["label_key"] for i in range(2)]
    with LabelStore(out) as store:
        store.save(keys[0], whole[0])
        store.gather(keys)
        out.unlink()
        store.save(keys[1], whole[1])
        store.gather(keys)
        store.clear()
    assert len(open_dataset(out)) == 2


def test_duplicates_are_labelled_once_and_told(tmp_path):
    atoms = frames(1) * 3
    atoms[1] = atoms[0].copy()
    atoms[1].info["family"] = "second"
    result = run(atoms, tmp_path / "al.h5", tmp_path / "log")
    assert (result.computed, result.duplicates) == (1, 2)
    assert "given before" in str(result)
    assert open_dataset(tmp_path / "al.h5")[0].meta["family"] == "al4"


@pytest.mark.parametrize("value", [2**70, "a\0b", "\ud800"])
def test_information_that_no_file_can_hold_is_refused_before_any_work(tmp_path, value):
    atoms = frames(1)
    atoms[0].info["bad"] = value
    with pytest.raises(StructureError, match="structure 0: info 'bad'"):
        run(atoms, tmp_path / "al.h5", tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_information_with_the_name_of_a_result_is_kept_beside_it(tmp_path):
    atoms = frames(1)
    atoms[0].info["engine"] = "mine"
    run(atoms, tmp_path / "al.h5", tmp_path / "log")
    meta = open_dataset(tmp_path / "al.h5").meta(0)
    assert (meta["engine"], meta["info_engine"]) == ("toy 1", "mine")


def test_too_few_workers(tmp_path):
    with pytest.raises(SettingsError, match="-1 workers"):
        run(frames(1), tmp_path / "al.h5", tmp_path / "log", workers=-1)


def test_an_interrupt_keeps_what_is_done_and_says_so(tmp_path):
    atoms = frames(20)
    for a in atoms:
        del a.info["nothing"]
    write(tmp_path / "al.xyz", atoms)
    program = "import sys; from gpurho.cli import main; sys.exit(main())"
    arguments = ["label", str(tmp_path / "al.xyz"), "--out", str(tmp_path / "al.h5"), "--engine", "toy_engine:SlowToy"]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *arguments, "--gamma", "--cutoff", "100"], stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not list((tmp_path / "al.h5.labels").glob("[!.]*.h5")):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 143
    assert "finished labels are safe" in said
    assert 0 < len(open_dataset(tmp_path / "al.h5")) < 20


def test_a_full_or_read_only_disk_says_what_is_safe(tmp_path):
    if os.geteuid() == 0:
        (tmp_path / "al.h5.labels").write_text("a file where the folder should be")
    else:
        tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="nothing was computed"):
        run(frames(1), tmp_path / "al.h5", tmp_path / "log")


def test_a_damaged_part_is_named_and_nothing_is_replaced(tmp_path):
    out, log = tmp_path / "al.h5", tmp_path / "log"
    run(frames(1), out, log)
    before = out.read_bytes()
    key = label_key(Structure.from_ase(frames(2)[1]), SETTINGS, "toy")
    (tmp_path / "al.h5.labels").mkdir()
    (tmp_path / "al.h5.labels" / f"{key}.h5").write_bytes(b"torn")
    with pytest.raises(StoreError, match=key):
        run(frames(2), out, log)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda a: a.set_pbc(False), StructureError, "structure 1: pbc"),
        (lambda a: a.positions.__setitem__(1, a.positions[0] + 0.1), StructureError, "structure 1: .*apart"),
        (lambda a: a.set_cell([4.05, 4.05, 300.0]), StructureError, "structure 1: .*compact"),
        (lambda a: a.set_chemical_symbols(["U"] * 4), UnknownSpeciesError, "structure 1: no GTH-PBE"),
    ],
)
def test_structures_that_cannot_be_done_are_refused_before_any_work(tmp_path, change, error, words):
    atoms = frames(2)
    change(atoms[1])
    with pytest.raises(error, match=words):
        run(atoms, tmp_path / "al.h5", tmp_path / "log")
    assert list(tmp_path.iterdir()) == []


def test_no_structures_and_unknown_engines_are_refused(tmp_path):
    with pytest.raises(SettingsError, match="no structures"):
        run([], tmp_path / "al.h5", tmp_path / "log")
    with pytest.raises(SettingsError, match="engine 'vasp' is not known"):
        label([Atoms("Al", cell=[4, 4, 4], pbc=True)], tmp_path / "al.h5", engine="vasp")


def test_keys_depend_on_what_decides_a_label_and_on_nothing_else():
    a, b = (Structure.from_ase(x) for x in frames(2))
    key = label_key(a, SETTINGS, "qe")
    assert key == label_key(a, DFTSettings(cutoff=100.0, kmesh=KMesh(), k_density=9.0, max_iterations=7), "qe")
    others = [(b, SETTINGS, "qe"), (a, SETTINGS, "gpaw"), (a, DFTSettings(cutoff=101.0, kmesh=KMesh()), "qe")]
    assert key not in {label_key(*other) for other in others}
    dense = [label_key(a, DFTSettings(cutoff=100.0, k_reach=r), "qe") for r in (5.0, 10.0, 20.0)]
    assert len(set(dense)) == 3


def test_rounding_keeps_the_bits_it_promises():
    values = np.random.default_rng(0).lognormal(size=10000)
    kept = rounded(values, 14)
    assert np.abs(kept / values - 1).max() < 2**-14
    assert np.abs(kept / values - 1).max() > 2**-17
    assert not (kept.view(np.uint32) & ((1 << 9) - 1)).any()
    assert abs((kept / values).mean() - 1) < 1e-6
