"""Prediction by several workers: the same bytes, whatever happens to the workers."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from predict_tools import aluminium, settings, small_model

import gpurho
from gpurho.densityfile import verify
from gpurho.errors import OutputExistsError, SettingsError, StoreError
from gpurho.journal import read_journal

distributed = pytest.importorskip("distributed")

TESTS = Path(__file__).parent
# Sockets and event loops of the cluster are closed by the garbage collector when it pleases.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
GRID = {"grid": (24, 18, 17)}


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """Workers of the machine that the tests run on take one thread each."""
    before = dict(os.environ)
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def cluster(_one_thread):
    from gpurho.pipelines.cluster import local_options

    with distributed.LocalCluster(**local_options(2, "cpu")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def client(cluster):
    with distributed.Client(cluster, set_as_default=False) as client:
        client.wait_for_workers(2, timeout=120)
        yield client


@pytest.fixture(scope="module")
def one(model):
    """The same density by one device."""
    return gpurho.predict(aluminium(), model, **GRID, **settings())


def assert_same(found: Any, wanted: Any) -> None:
    for name in ("mean", "aleatoric", "epistemic", "std"):
        np.testing.assert_array_equal(np.asarray(getattr(found, name)), np.asarray(getattr(wanted, name)), name)
    assert found.totals == wanted.totals
    assert (found.electrons, found.electrons_std) == (wanted.electrons, wanted.electrons_std)
    assert found.info["settings"] == wanted.info["settings"]


# -- workers ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_workers_give_the_bytes_of_one_device(client, model, one, tmp_path):
    import h5py

    out = tmp_path / "50%b.h5"
    with gpurho.predict(aluminium(), model, client=client, out=out, **GRID, **settings()) as rho:
        assert_same(rho, one)
        np.testing.assert_array_equal(rho.mean[3:20, ::-2, 5], one.mean[3:20, ::-2, 5])
        assert rho.info["timing"]["n_points"] == 24 * 18 * 17
    assert verify(out) == []
    with h5py.File(out) as h5:  # what other programs see
        np.testing.assert_array_equal(h5["mean"][()], one.mean)
    folder = tmp_path / "50%b.h5.shards"
    assert {p.suffix for p in folder.iterdir()} == {".h5"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["50%b.h5", "50%b.h5.shards"]
    # One device opens what several have made, and the reverse; it does not compute.
    gpurho.predict(aluminium(), model, out=out, **GRID, **settings()).close()
    from gpurho.pipelines.shardwork import _HELD

    loads = client.run(lambda held=None: __import__("gpurho.pipelines.shardwork", fromlist=["_"])._HELD.loads)
    assert set(loads.values()) <= {0, 1}, "a worker loads the model once"
    assert _HELD.loads == 0
    # Moved together, they are read; a shard that is missing is named.
    (tmp_path / "moved").mkdir()
    moved = out.rename(tmp_path / "moved" / out.name)
    with pytest.raises(StoreError, match=r"000000.h5 of .* is missing .* move the folder"):
        gpurho.Density.open(moved)
    folder.rename(tmp_path / "moved" / folder.name)
    with gpurho.Density.open(moved) as rho:
        np.testing.assert_array_equal(np.asarray(rho.mean), one.mean)
        single = rho.write(tmp_path / "single.h5")
    assert_same_field(single, one)
    shard = tmp_path / "moved" / folder.name / "000003.h5"
    data = bytearray(shard.read_bytes())
    with h5py.File(shard) as h5:
        place = h5["mean"].id.get_chunk_info(0)
    data[place.byte_offset + place.size // 2] ^= 0xFF
    shard.write_bytes(data)
    assert len(verify(moved)) == 1
    shard.unlink()
    with pytest.raises(StoreError, match=r"000003\.h5"):
        gpurho.Density.open(moved)


def assert_same_field(path: Path, wanted: Any) -> None:
    with gpurho.Density.open(path) as rho:
        np.testing.assert_array_equal(np.asarray(rho.mean), wanted.mean)


def test_region_conservation_and_no_output_file(client, model):
    options = GRID | settings(region=((3, 20), (0, 18), (7, 15)))
    found = gpurho.predict(aluminium(), model, client=client, **options)
    assert isinstance(found.mean, np.ndarray)
    assert_same(found, gpurho.predict(aluminium(), model, **options))
    options = GRID | settings(conserve="uncertainty")
    found = gpurho.predict(aluminium(), model, client=client, **options)
    assert_same(found, gpurho.predict(aluminium(), model, **options))
    assert found.electrons == pytest.approx(12.0)


@pytest.mark.slow
def test_killed_worker_costs_its_unfinished_tiles_alone(client, model, tmp_path):
    """kill -9 of a worker in the middle of a run: the next one takes its finished tiles over."""
    out = tmp_path / "rho.h5"
    big = {"grid": (64, 64, 64)} | settings(tile_shape=(4, 16, 16))
    killed: dict[str, Any] = {}

    def kill() -> None:
        folder = tmp_path / "rho.h5.shards"
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline:
            for journal in folder.glob("*.journal"):
                n = len(read_journal(journal)) - 1
                pid = _writer(journal) if 2 <= n <= 4 else None
                if pid is not None:
                    os.kill(pid, signal.SIGKILL)
                    if journal.exists():  # else it finished the run just before
                        killed["tiles"] = n
                        return
            time.sleep(0.002)

    killer = threading.Thread(target=kill)
    killer.start()
    with gpurho.predict(aluminium(2), model, client=client, out=out, **big) as rho:
        killer.join()
        assert killed
        assert rho.info["tiles"]["taken over"] >= killed["tiles"]
        assert sum(rho.info["tiles"].values()) == 16 * 4 * 4
        assert_same(rho, gpurho.predict(aluminium(2), model, **big))
    assert verify(out) == []
    assert {p.suffix for p in (tmp_path / "rho.h5.shards").iterdir()} == {".h5"}


def _writer(path: Path) -> int | None:
    """The process that has a file open."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if os.readlink(link) == str(path):
                return int(link.parts[2])
    return None


@pytest.mark.slow
def test_added_worker_gets_work(cluster, client, model, one, tmp_path):
    cluster.scale(1)
    _until(lambda: len(client.scheduler_info(n_workers=-1)["workers"]) == 1)
    seen: set[str] = set()
    done = threading.Event()

    def add() -> None:
        folder = tmp_path / "rho.h5.shards"
        _until(lambda: any(folder.glob("*.journal")) or done.is_set())
        cluster.scale(2)
        while not done.is_set():
            seen.update(address for address, keys in client.processing().items() if keys)
            time.sleep(0.01)

    watch = threading.Thread(target=add)
    watch.start()
    big = {"grid": (96, 96, 96)} | settings(tile_shape=(8, 16, 16))
    try:
        with gpurho.predict(aluminium(2), model, client=client, out=tmp_path / "rho.h5", **big) as rho:
            found = np.asarray(rho.mean)
    finally:
        done.set()
        watch.join()
        cluster.scale(2)
        client.wait_for_workers(2, timeout=120)
    assert len(seen) == 2
    np.testing.assert_array_equal(found, gpurho.predict(aluminium(2), model, **big).mean)


def _until(condition: Any, seconds: float = 100.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _script(out: Path, extra: str = "") -> str:
    return textwrap.dedent(f"""
        import sys
        sys.path.insert(0, {str(TESTS)!r})
        import gpurho
        from predict_tools import aluminium, settings, small_model
        if __name__ == "__main__":
            gpurho.predict(aluminium(2), small_model(), grid=(64, 64, 64), out={str(out)!r}, devices=2,
                           **settings(tile_shape=(4, 16, 16)){extra})
    """)


@pytest.mark.slow
def test_killed_altogether_and_resumed(client, model, tmp_path):
    """kill -9 of the process that waits, and so of its workers; another number of workers goes on."""
    out, folder = tmp_path / "rho.h5", tmp_path / "rho.h5.shards"
    script = tmp_path / "run.py"
    script.write_text(_script(out))
    process = subprocess.Popen([sys.executable, str(script)], start_new_session=True)
    try:
        _until(lambda: process.poll() is not None or len(list(folder.glob("??????.h5"))) >= 3)
        assert process.poll() is None, "it ended before it was killed"
    finally:
        process.kill()
        process.wait()
    before = {p.name: p.stat().st_mtime_ns for p in folder.glob("??????.h5")}
    assert (folder / "manifest").exists()
    assert not out.exists()
    big = {"grid": (64, 64, 64)} | settings(tile_shape=(4, 16, 16))
    with pytest.raises(OutputExistsError, match="with uncertainty"):
        gpurho.predict(aluminium(2), model, client=client, out=out, **(big | {"uncertainty": None}))
    with pytest.raises(OutputExistsError, match="several devices"):
        gpurho.predict(aluminium(2), model, out=out, **big)
    with gpurho.predict(aluminium(2), model, client=client, out=out, **big) as rho:
        assert_same(rho, gpurho.predict(aluminium(2), model, **big))
        assert rho.info["timing"]["n_points"] < 64**3
    kept = {name: (folder / name).stat().st_mtime_ns for name in before}
    assert kept == before, "finished shards are left as they are"
    assert {p.suffix for p in folder.iterdir()} == {".h5"}
    with pytest.raises(OutputExistsError, match="with uncertainty"):
        gpurho.predict(aluminium(2), model, client=client, out=out, **(big | {"uncertainty": None}))
    # One device replaces what several made, and takes their shards away.
    gpurho.predict(aluminium(), model, out=out, resume=False, grid=(8, 8, 8), **settings()).close()
    assert not folder.exists()


def test_errors_of_workers_come_back(client, tmp_path, model):
    broken = small_model()
    broken.tensors["layers.0.bias_mean"][0] = float("nan")
    with pytest.raises(gpurho.ModelError, match="not finite"):
        gpurho.predict(aluminium(), broken, client=client, out=tmp_path / "rho.h5", **GRID, **settings())
    assert not (tmp_path / "rho.h5").exists()
    assert not (tmp_path / "rho.h5.lock").exists()


# -- arguments --------------------------------------------------------------------------------------------------


def test_arguments_are_checked(client, model, tmp_path):
    for changes, error, text in (
        ({"client": client, "devices": 2}, SettingsError, "exclude"),
        ({"client": client, "device": "cuda:1"}, SettingsError, "one device of several"),
        ({"devices": 2, "device": "cuda:1"}, SettingsError, "one device of several"),
        ({"devices": 1.5}, SettingsError, "devices 1.5"),
    ):
        with pytest.raises(error, match=text):
            gpurho.predict(aluminium(), model, **GRID, **(settings() | changes))
    with pytest.raises(SettingsError, match="leave out client"):
        gpurho.plan(aluminium(), model, client=client)


def test_unfinished_work_of_one_device_is_not_lost(client, model, tmp_path):
    (tmp_path / "rho.h5.journal").write_bytes(b"")
    with pytest.raises(OutputExistsError, match="one device"):
        gpurho.predict(aluminium(), model, client=client, out=tmp_path / "rho.h5", **GRID, **settings())
    assert (tmp_path / "rho.h5.journal").exists()
