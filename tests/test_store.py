"""The output file: killed, full, locked, of other settings, damaged; and always the same bytes."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pytest
from predict_tools import aluminium, datasets_of, settings, small_model

import gpurho
from gpurho.densityfile import verify
from gpurho.errors import OutputExistsError, SettingsError, StoreError
from gpurho.journal import Journal, Lock, encode_line, first_difference, read_journal

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """An undisturbed run's file and the same density in memory."""
    out = tmp_path_factory.mktemp("store") / "rho.h5"
    atoms = aluminium()
    gpurho.predict(atoms, model, grid=(20, 18, 17), out=out, **settings()).close()
    return out, gpurho.predict(atoms, model, grid=(20, 18, 17), **settings())


def test_file_equals_memory(whole):
    path, memory = whole
    with gpurho.Density.open(path) as rho:
        for name in ("mean", "aleatoric", "epistemic", "std"):
            np.testing.assert_array_equal(np.asarray(getattr(rho, name)), getattr(memory, name))
        assert rho.totals == memory.totals
        assert rho.electrons == memory.electrons
        assert rho.info["settings"] == memory.info["settings"]
        assert rho.structure.fingerprint() == memory.structure.fingerprint()
        assert rho.grid.same_as(memory.grid)
    assert verify(path) == []
    assert not list(path.parent.glob("rho.h5.*")), "no journal, lock or part stays behind"


def test_layout_for_other_readers(whole):
    path, memory = whole
    with h5py.File(path) as h5:
        assert h5.attrs["format"] == b"gpurho-density"
        assert h5["mean"].chunks == (8, 8, 8)
        assert h5["mean"].compression == "gzip"
        assert h5["mean"].shuffle
        np.testing.assert_array_equal(h5["mean"][()], memory.mean)
        assert h5["tiles/done"][()].all()
        assert len(h5["tiles/done"]) == 3 * 3 * 3
        sums = h5["tiles/sums"][()]
        assert sums[:, 0].sum() == 20 * 18 * 17


def test_lazy_indexing(whole):
    path, memory = whole
    with gpurho.Density.open(path) as rho:
        for key in (
            np.s_[3],
            np.s_[-1, 2],
            np.s_[1:9, ..., 2::3],
            np.s_[::-2, 5, 3:4],
            np.s_[..., -3],
            np.s_[4:4],
            np.s_[...],
            np.s_[19:2:-5, :, 7],
            np.s_[1, 2, 3],
        ):
            np.testing.assert_array_equal(rho.mean[key], memory.mean[key], err_msg=repr(key))
            np.testing.assert_array_equal(rho.std[key], memory.std[key], err_msg=repr(key))
        for key in (np.s_[20], np.s_[0, 0, 0, 0], np.s_[[1, 2]], np.s_[True], np.s_[1.5]):
            with pytest.raises(IndexError):
                rho.mean[key]
        assert np.asarray(rho.mean, dtype=float).dtype == float
    with pytest.raises(SettingsError, match="closed"):
        rho.mean[0]


def test_finished_output_is_opened_not_computed(model, tmp_path, monkeypatch):
    out, small = tmp_path / "rho.h5", settings(grid=(8, 8, 8))
    gpurho.predict(aluminium(), model, out=out, **small).close()
    before = out.read_bytes(), out.stat().st_mtime_ns

    def never(*_, **__):
        raise AssertionError("it computed")

    monkeypatch.setattr("gpurho.pipelines.predict.run_tiles", never)
    gpurho.predict(aluminium(), model, out=out, **small).close()
    assert (out.read_bytes(), out.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"grid": (8, 8, 9)}, "grid shape"),
        ({"uncertainty": None}, "uncertainty"),
        ({"conserve": "uniform"}, "conserve"),
        ({"precision": "bf16"}, "precision"),
        ({"tile_shape": (4, 4, 4)}, "tile shape"),
        ({"region": ((0, 4), (0, 8), (0, 8))}, "region"),
    ],
)
def test_other_settings_are_refused_by_name(model, tmp_path, changes, name):
    out, small = tmp_path / "rho.h5", settings(grid=(8, 8, 8))
    gpurho.predict(aluminium(), model, out=out, **small).close()
    before = out.read_bytes()
    with pytest.raises(OutputExistsError, match=f"with {name}") as caught:
        gpurho.predict(aluminium(), model, out=out, **(small | changes))
    assert "\n" not in str(caught.value)
    assert out.read_bytes() == before
    gpurho.predict(aluminium(), model, out=out, resume=False, **(small | changes)).close()
    assert out.read_bytes() != before


def test_other_structure_or_model_is_refused(model, tmp_path):
    out, small = tmp_path / "rho.h5", settings(grid=(8, 8, 8))
    gpurho.predict(aluminium(), model, out=out, **small).close()
    with pytest.raises(OutputExistsError, match="with structure"):
        gpurho.predict(aluminium(seed=5), model, out=out, **small)
    with pytest.raises(OutputExistsError, match="with model"):
        gpurho.predict(aluminium(), small_model(seed=9), out=out, **small)


def test_foreign_files_are_left_alone(model, tmp_path):
    out = tmp_path / "rho.h5"
    for content in (b"my thesis", None):
        if content is None:
            with h5py.File(out, "w") as h5:
                h5["mean"] = np.zeros(3)
        else:
            out.write_bytes(content)
        before = out.read_bytes()
        with pytest.raises(OutputExistsError, match="left as it is"):
            gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=out, **settings())
        assert out.read_bytes() == before
    with pytest.raises(StoreError, match="folder"):
        gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=tmp_path, **settings())
    with pytest.raises(StoreError, match="create it first"):
        gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=tmp_path / "no" / "no" / "rho.h5", **settings())
    out.unlink()
    out.write_text("a file where a folder should be")
    with pytest.raises(StoreError, match="create it first"):
        gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=out / "rho.h5", **settings())
    gpurho.predict(aluminium(), model, grid=(8, 8, 8), out=tmp_path / "new" / "rho.h5", **settings()).close()


def _script(out: Path, body: str = "", grid: str = "(64, 64, 64)") -> str:
    return textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        import gpurho
        from predict_tools import aluminium, settings, small_model
        {body}
        gpurho.predict(aluminium(2), small_model(), grid={grid}, out={str(out)!r},
                       **settings(tile_shape=(8, 16, 16)))
    """)


def _environment() -> dict[str, str]:
    return os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}


def test_killed_at_random_moments_the_file_is_the_same(tmp_path):
    """kill -9 at moments spread over the run, as often as it takes; whole files are compared, byte for byte."""
    calm = tmp_path / "calm.h5"
    subprocess.run([sys.executable, "-c", _script(calm)], check=True, env=_environment())
    rng = random.Random(4)
    killed = tmp_path / "killed.h5"
    held = []
    journal = killed.with_name("killed.h5.journal")
    # At most 120 of the 128 tiles are done when the last blow falls, give or take one or two.
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", _script(killed)], env=_environment())
        goal = len(read_journal(journal)) + rng.randint(2, 30)
        while len(read_journal(journal)) < goal:
            assert process.poll() is None, "it ended before it was killed"
            time.sleep(0.002)
        time.sleep(rng.random() * 0.005)
        process.kill()
        process.wait()
        held.append(len(read_journal(journal)))
        assert not killed.exists(), "an unfinished file must not have the output's name"
        with pytest.raises(StoreError, match="unfinished"):
            gpurho.Density.open(killed)
    assert held == sorted(held), "a resumed run keeps what was done"
    assert held[0] > 1
    subprocess.run([sys.executable, "-c", _script(killed)], check=True, env=_environment())
    assert datasets_of(killed) == datasets_of(calm)
    assert killed.read_bytes() == calm.read_bytes()
    assert verify(killed) == []
    assert [p.name for p in tmp_path.glob("killed*")] == ["killed.h5"]


def test_bytes_lost_with_the_machine_are_computed_again(model, tmp_path, monkeypatch):
    """A part file whose last pages never reached the disk: the journal's checksums find it."""
    want, out = tmp_path / "want.h5", tmp_path / "rho.h5"
    small = settings(grid=(16, 16, 16))
    gpurho.predict(aluminium(), model, out=want, **small).close()
    _interrupt_after(monkeypatch, 5)
    with pytest.raises(KeyboardInterrupt):
        gpurho.predict(aluminium(), model, out=out, **small)
    monkeypatch.undo()
    part, journal = tmp_path / "rho.h5.part", tmp_path / "rho.h5.journal"
    records = read_journal(journal)
    assert len(records) >= 4
    place = records[3]["offset"][1]
    data = bytearray(part.read_bytes())
    data[place + 3] ^= 0xFF
    part.write_bytes(data)
    with open(journal, "ab") as file:
        file.write(b"0badc0de {torn")
    gpurho.predict(aluminium(), model, out=out, **small).close()
    assert out.read_bytes() == want.read_bytes()


def _interrupt_after(monkeypatch, n: int) -> None:
    """Ctrl-C at the `n`-th tile."""
    from gpurho.evaluator import Evaluator

    true_call, calls = Evaluator.unchecked, []

    def call(self, features):
        calls.append(1)
        if len(calls) == n:
            raise KeyboardInterrupt
        return true_call(self, features)

    monkeypatch.setattr(Evaluator, "unchecked", call)


def test_interrupt_keeps_what_is_done(model, tmp_path, monkeypatch):
    out, small = tmp_path / "rho.h5", settings(grid=(16, 16, 16))
    _interrupt_after(monkeypatch, 4)
    with pytest.raises(KeyboardInterrupt):
        gpurho.predict(aluminium(), model, out=out, **small)
    monkeypatch.undo()
    done = len(read_journal(tmp_path / "rho.h5.journal")) - 1
    assert done == 2, "tiles that were handed over are kept; the one that was still on the device is not"
    with pytest.raises(OutputExistsError, match="unfinished prediction with uncertainty"):
        gpurho.predict(aluminium(), model, out=out, **(small | {"uncertainty": None}))
    rho = gpurho.predict(aluminium(), model, out=out, **small)
    assert rho.info["timing"]["n_points"] == 16**3 - done * 512


def test_terminate_leaves_a_resumable_file(tmp_path):
    out = tmp_path / "rho.h5"
    model = tmp_path / "m.safetensors"
    small_model().save(model)
    from ase.io import write

    write(tmp_path / "al.xyz", aluminium(2))
    command = [sys.executable, "-m", "gpurho", "predict", str(tmp_path / "al.xyz"), "--model", str(model)]
    command += ["--grid", "64", "64", "64", "--tile-shape", "8", "8", "8", "--precision", "fp32", "--out", str(out)]
    process = subprocess.Popen(command, env=_environment(), stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(read_journal(out.with_name("rho.h5.journal"))) < 5:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 143
    assert message.strip().count("\n") == 0
    assert "run the same command again" in message
    assert len(read_journal(out.with_name("rho.h5.journal"))) >= 5
    assert not out.with_name("rho.h5.lock").exists()


def test_two_writers_of_one_output(tmp_path):
    out = tmp_path / "rho.h5"
    lock = Lock(out.with_name("rho.h5.lock"), out)
    code = _script(out, grid="(8, 8, 8)")
    second = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=False
    )
    assert f"being written by another process (id {os.getpid()})" in second.stderr
    lock.release()
    subprocess.run([sys.executable, "-c", code], env=_environment(), check=True)
    assert out.exists()


def test_full_disk(tmp_path):
    """A limit on the size of files stands for a full disk: it fails in the same calls."""
    out = tmp_path / "rho.h5"
    body = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))"
    code = _script(out, body)
    failed = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert "StoreError" in last
    assert "tiles are safe in rho.h5.part" in last
    safe = int(last.split(";")[1].split()[0])
    assert 1 <= safe == len(read_journal(out.with_name("rho.h5.journal"))) - 1
    subprocess.run([sys.executable, "-c", _script(out)], env=_environment(), check=True)
    calm = tmp_path / "calm.h5"
    subprocess.run([sys.executable, "-c", _script(calm)], env=_environment(), check=True)
    assert out.read_bytes() == calm.read_bytes()


def test_too_little_room_is_said_before_work(model, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 99, 1))
    with pytest.raises(StoreError, match="free space"):
        gpurho.predict(aluminium(), model, grid=(16, 16, 16), out=tmp_path / "rho.h5", **settings())


def test_damaged_files(whole, tmp_path):
    path, _ = whole
    data = path.read_bytes()
    cut = tmp_path / "cut.h5"
    cut.write_bytes(data[: len(data) // 2])
    with pytest.raises(StoreError, match="cannot be read"):
        gpurho.Density.open(cut)
    with pytest.raises(StoreError, match="does not exist"):
        gpurho.Density.open(tmp_path / "none.h5")
    bad = tmp_path / "bad.h5"
    with h5py.File(path) as h5:
        place = h5["epistemic"].id.get_chunk_info(4)
    changed = bytearray(data)
    changed[place.byte_offset + place.size // 2] ^= 0x55
    bad.write_bytes(changed)
    assert len(verify(bad)) == 1


def test_region_file(model, tmp_path):
    region = ((3, 13), (8, 16), (0, 5))
    out, small = tmp_path / "rho.h5", settings(grid=(16, 16, 16), region=region)
    memory = gpurho.predict(aluminium(), model, **small)
    with gpurho.predict(aluminium(), model, out=out, **small) as rho:
        assert rho.shape == (10, 8, 5)
        np.testing.assert_array_equal(np.asarray(rho.mean), memory.mean)
        points = rho.grid.points()[::7]
        np.testing.assert_array_equal(rho.at(points)[0], memory.at(points)[0])
        assert rho.info["region"] == region
    with h5py.File(out) as h5:
        assert h5["mean"].shape == (16, 16, 16)
        assert np.isfinite(h5["mean"][()]).sum() == 400
    assert verify(out) == []


def test_memory_stays_bounded(tmp_path):
    """The peak of a run to disk does not grow with the field: 43 times the points, little more memory."""
    peaks = []
    for n in (32, 112):
        code = _script(tmp_path / f"{n}.h5", grid=f"({n}, {n}, {n})")
        code += "import resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
        done = subprocess.run(
            [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True
        )
        peaks.append(int(done.stdout))
    field = 112**3 * 12 / 1024
    assert peaks[1] - peaks[0] < 0.5 * field
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * 2**20


def test_journal_stops_at_a_torn_line(tmp_path):
    journal = Journal(tmp_path / "j")
    journal.append({"a": 1})
    journal.append({"b": [1, 2.5]})
    journal.sync()
    journal.close()
    assert read_journal(tmp_path / "j") == [{"a": 1}, {"b": [1, 2.5]}]
    data = (tmp_path / "j").read_bytes()
    for cut in range(len(data)):
        (tmp_path / "cut").write_bytes(data[:cut])
        n = data[:cut].count(b"\n")
        assert len(read_journal(tmp_path / "cut")) == n
    (tmp_path / "bad").write_bytes(data.replace(b'"a":1', b'"a":2') + encode_line({"c": 3}))
    assert read_journal(tmp_path / "bad") == []
    assert read_journal(tmp_path / "none") == []


def test_first_difference():
    assert first_difference({"a": (1, 2), "b": None}, {"a": [1, 2], "b": None}) is None
    assert first_difference({"a": 1, "b": 2}, {"a": 1, "b": 3}) == ("b", 2, 3)
    assert first_difference({"a": 1}, {"a": 1, "c": 0}) == ("c", None, 0)
